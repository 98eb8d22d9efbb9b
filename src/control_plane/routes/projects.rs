//! Projects: who owns tokens, agents, clusters and Runners.

use axum::extract::State;
use axum::response::Response;
use serde_json::json;

use super::{Named, Routes};
use crate::control_plane::Hub;
use crate::control_plane::answer::answer;
use crate::control_plane::auth::AdminCaller;
use crate::control_plane::body::Json;
use crate::control_plane::registry::Refused;

pub(super) fn routes(routes: Routes) -> Routes {
    routes.get("/api/v1/projects", list).post("/api/v1/projects", add)
}

async fn list(_: AdminCaller, State(hub): State<Hub>) -> Response {
    answer(200, &json!({"items": hub.registry().projects()}))
}

async fn add(
    _: AdminCaller,
    State(hub): State<Hub>,
    Json(asked): Json<Named>,
) -> Result<Response, Refused> {
    Ok(answer(201, &hub.registry().add_project(&asked.name, crate::control_plane::now()).await?))
}
