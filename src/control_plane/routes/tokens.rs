//! Enrolment tokens, which admit new agents.

use std::collections::BTreeMap;

use axum::extract::State;
use axum::response::Response;
use serde::Deserialize;
use serde_json::{Value, json};

use super::{Routes, with_token, without_hash};
use crate::control_plane::answer::answer;
use crate::control_plane::auth::AdminCaller;
use crate::control_plane::body::{JsonBody, PathSegments, RawBody};
use crate::control_plane::clock::now;
use crate::control_plane::error::HttpError;
use crate::control_plane::registry::NewEnrolment;
use crate::control_plane::scope::{DAY, YEAR, checked_ttl};
use crate::control_plane::state::ControlPlane;

#[derive(Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "NewEnrolmentToken"))]
#[serde(deny_unknown_fields)]
pub(super) struct NewEnrolmentToken {
    project: Option<String>,
    name: Option<String>,
    ttl_s: Option<i64>,
    /// 0: as many agents as come.
    uses: Option<u32>,
    /// Of the clusters that come with it, set at the control plane.
    #[serde(default)]
    labels: BTreeMap<String, String>,
}

pub(super) fn routes(routes: Routes) -> Routes {
    routes
        .get("/api/v1/tokens", list)
        .post("/api/v1/tokens", add)
        .delete("/api/v1/tokens/{id}", revoke)
}

async fn list(_: AdminCaller, State(control_plane): State<ControlPlane>) -> Response {
    let items: Vec<Value> =
        control_plane.registry().enrolments().iter().map(without_hash).collect();
    answer(200, &json!({"items": items}))
}

async fn add(
    _: AdminCaller,
    State(control_plane): State<ControlPlane>,
    JsonBody(request): JsonBody<NewEnrolmentToken>,
) -> Result<Response, HttpError> {
    let ttl = checked_ttl(request.ttl_s, DAY, YEAR)?;
    let (name, project) = (
        request.name.unwrap_or_else(|| "token".into()),
        request.project.unwrap_or_else(|| "default".into()),
    );
    let uses = request.uses.or(Some(1)).filter(|n| *n > 0);
    let new = NewEnrolment { project: &project, name: &name, ttl, uses, labels: request.labels };
    let (row, token) =
        control_plane.registry().add_enrolment(control_plane.keys(), new, now()).await?;
    let mut shown = with_token(&row, &token);
    shown["install"] = control_plane.install_line(&token).into();
    Ok(answer(201, &shown))
}

async fn revoke(
    _: AdminCaller,
    State(control_plane): State<ControlPlane>,
    PathSegments([id]): PathSegments<1>,
    _: RawBody,
) -> Result<Response, HttpError> {
    control_plane.registry().revoke_enrolment(&id).await?;
    Ok(answer(200, &json!({})))
}
