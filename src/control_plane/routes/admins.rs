//! Administrators: who may do everything here.

use axum::extract::State;
use axum::response::Response;
use serde_json::{Value, json};

use super::{Named, Routes, with_token, without_hash};
use crate::control_plane::Hub;
use crate::control_plane::answer::answer;
use crate::control_plane::auth::AdminCaller;
use crate::control_plane::body::{Json, Segments, Whole};
use crate::control_plane::registry::Refused;

pub(super) fn routes(routes: Routes) -> Routes {
    routes
        .get("/api/v1/admins", list)
        .post("/api/v1/admins", add)
        .delete("/api/v1/admins/{id}", remove)
}

async fn list(_: AdminCaller, State(hub): State<Hub>) -> Response {
    let items: Vec<Value> = hub.registry().admins().iter().map(without_hash).collect();
    answer(200, &json!({"items": items}))
}

async fn add(
    _: AdminCaller,
    State(hub): State<Hub>,
    Json(asked): Json<Named>,
) -> Result<Response, Refused> {
    let (row, token) =
        hub.registry().add_admin(hub.keys(), &asked.name, crate::control_plane::now()).await?;
    Ok(answer(201, &with_token(&row, &token)))
}

async fn remove(
    _: AdminCaller,
    State(hub): State<Hub>,
    Segments([id]): Segments<1>,
    _: Whole,
) -> Result<Response, Refused> {
    hub.registry().remove_admin(&id).await?;
    Ok(answer(200, &json!({})))
}
