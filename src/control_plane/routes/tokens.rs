//! Enrolment tokens: what lets new agents in.

use axum::extract::State;
use axum::response::Response;
use serde::Deserialize;
use serde_json::{Value, json};

use super::{Routes, with_token, without_hash};
use crate::control_plane::Hub;
use crate::control_plane::answer::answer;
use crate::control_plane::auth::AdminCaller;
use crate::control_plane::body::{Json, Segments, Whole};
use crate::control_plane::registry::Refused;
use crate::control_plane::scope::{DAY, YEAR, life};

#[derive(Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "NewEnrolmentToken"))]
#[serde(deny_unknown_fields)]
pub(super) struct AddToken {
    project: Option<String>,
    name: Option<String>,
    ttl_s: Option<i64>,
    /// 0: as many agents as come.
    uses: Option<u32>,
}

pub(super) fn routes(routes: Routes) -> Routes {
    routes
        .get("/api/v1/tokens", list)
        .post("/api/v1/tokens", add)
        .delete("/api/v1/tokens/{id}", revoke)
}

async fn list(_: AdminCaller, State(hub): State<Hub>) -> Response {
    let items: Vec<Value> = hub.registry().enrolments().iter().map(without_hash).collect();
    answer(200, &json!({"items": items}))
}

async fn add(
    _: AdminCaller,
    State(hub): State<Hub>,
    Json(asked): Json<AddToken>,
) -> Result<Response, Refused> {
    let ttl = life(asked.ttl_s, DAY, YEAR)?;
    let (name, project) = (
        asked.name.unwrap_or_else(|| "token".into()),
        asked.project.unwrap_or_else(|| "default".into()),
    );
    let uses = asked.uses.or(Some(1)).filter(|n| *n > 0);
    let (row, token) = hub
        .registry()
        .add_enrolment(hub.keys(), &project, &name, ttl, uses, crate::control_plane::now())
        .await?;
    let mut shown = with_token(&row, &token);
    shown["install"] = hub.install_line(&token).into();
    Ok(answer(201, &shown))
}

async fn revoke(
    _: AdminCaller,
    State(hub): State<Hub>,
    Segments([id]): Segments<1>,
    _: Whole,
) -> Result<Response, Refused> {
    hub.registry().revoke_enrolment(&id).await?;
    Ok(answer(200, &json!({})))
}
