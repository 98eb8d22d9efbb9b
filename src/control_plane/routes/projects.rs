//! Projects, which own tokens, agents, clusters and Runners.

use axum::extract::State;
use axum::response::Response;
use serde_json::json;

use super::{NameRequest, Routes};
use crate::control_plane::answer::answer;
use crate::control_plane::auth::AdminCaller;
use crate::control_plane::body::JsonBody;
use crate::control_plane::clock::now;
use crate::control_plane::error::HttpError;
use crate::control_plane::state::ControlPlane;

pub(super) fn routes(routes: Routes) -> Routes {
    routes.get("/api/v1/projects", list).post("/api/v1/projects", add)
}

async fn list(_: AdminCaller, State(control_plane): State<ControlPlane>) -> Response {
    answer(200, &json!({"items": control_plane.registry().projects()}))
}

async fn add(
    _: AdminCaller,
    State(control_plane): State<ControlPlane>,
    JsonBody(request): JsonBody<NameRequest>,
) -> Result<Response, HttpError> {
    Ok(answer(201, &control_plane.registry().add_project(&request.name, now()).await?))
}
