//! The gateway: requests below these paths are passed to the cluster's agent.

use axum::extract::{Request, State};
use axum::response::Response;

use super::Routes;
use crate::control_plane::answer::error_answer;
use crate::control_plane::auth::GatewayCaller;
use crate::control_plane::body::PathSegments;
use crate::control_plane::clock::now;
use crate::control_plane::state::ControlPlane;

pub(super) fn routes(routes: Routes) -> Routes {
    routes
        .below(
            "/clusters/{id}/k8s/*",
            ["/clusters/{id}/k8s", "/clusters/{id}/k8s/", "/clusters/{id}/k8s/{*rest}"],
            forward,
        )
        .below(
            "/clusters/{id}/api/*",
            ["/clusters/{id}/api", "/clusters/{id}/api/", "/clusters/{id}/api/{*rest}"],
            forward,
        )
}

async fn forward(
    caller: GatewayCaller,
    State(control_plane): State<ControlPlane>,
    PathSegments([id]): PathSegments<1>,
    request: Request,
) -> Response {
    let uri = request.uri().clone();
    control_plane
        .forward(request, &id, &caller.principal, now())
        .await
        .unwrap_or_else(|error| error_answer(error, uri.path()))
}
