//! The way into a cluster: whatever is asked below these paths goes to its agent as it came.

use axum::extract::{Request, State};
use axum::response::Response;

use super::Routes;
use crate::control_plane::Hub;
use crate::control_plane::answer::problem;
use crate::control_plane::auth::GatewayCaller;
use crate::control_plane::body::Segments;

pub(super) fn routes(routes: Routes) -> Routes {
    routes
        .below(
            "/clusters/{id}/k8s/*",
            ["/clusters/{id}/k8s", "/clusters/{id}/k8s/", "/clusters/{id}/k8s/{*rest}"],
            pass,
        )
        .below(
            "/clusters/{id}/api/*",
            ["/clusters/{id}/api", "/clusters/{id}/api/", "/clusters/{id}/api/{*rest}"],
            pass,
        )
}

async fn pass(
    caller: GatewayCaller,
    State(hub): State<Hub>,
    Segments([id]): Segments<1>,
    request: Request,
) -> Response {
    let uri = request.uri().clone();
    hub.pass(request, &id, &caller.who, crate::control_plane::now())
        .await
        .unwrap_or_else(|refused| problem(refused, uri.path()))
}
