//! Administrators, who may do everything.

use axum::extract::State;
use axum::response::Response;
use serde_json::{Value, json};

use super::{NameRequest, Routes, with_token, without_hash};
use crate::control_plane::answer::answer;
use crate::control_plane::auth::AdminCaller;
use crate::control_plane::body::{JsonBody, PathSegments, RawBody};
use crate::control_plane::clock::now;
use crate::control_plane::error::HttpError;
use crate::control_plane::state::ControlPlane;

pub(super) fn routes(routes: Routes) -> Routes {
    routes
        .get("/api/v1/admins", list)
        .post("/api/v1/admins", add)
        .delete("/api/v1/admins/{id}", remove)
}

async fn list(_: AdminCaller, State(control_plane): State<ControlPlane>) -> Response {
    let items: Vec<Value> = control_plane.registry().admins().iter().map(without_hash).collect();
    answer(200, &json!({"items": items}))
}

async fn add(
    _: AdminCaller,
    State(control_plane): State<ControlPlane>,
    JsonBody(request): JsonBody<NameRequest>,
) -> Result<Response, HttpError> {
    let (row, token) =
        control_plane.registry().add_admin(control_plane.keys(), &request.name, now()).await?;
    Ok(answer(201, &with_token(&row, &token)))
}

async fn remove(
    _: AdminCaller,
    State(control_plane): State<ControlPlane>,
    PathSegments([id]): PathSegments<1>,
    _: RawBody,
) -> Result<Response, HttpError> {
    control_plane.registry().remove_admin(&id).await?;
    Ok(answer(200, &json!({})))
}
