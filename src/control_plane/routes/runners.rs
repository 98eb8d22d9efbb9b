//! Runners' tokens, and those in kubeconfigs.

use axum::extract::State;
use axum::response::Response;
use serde::Deserialize;
use serde_json::{Value, json};

use super::{Routes, with_token, without_hash};
use crate::contract::token::Role;
use crate::control_plane::Hub;
use crate::control_plane::answer::answer;
use crate::control_plane::auth::AdminCaller;
use crate::control_plane::body::{Json, Segments, Whole};
use crate::control_plane::model::{Access, AccessKind};
use crate::control_plane::registry::Refused;
use crate::control_plane::scope::{DAY, YEAR, life, role};

#[derive(Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "NewRunner"))]
#[serde(deny_unknown_fields)]
pub(super) struct AddRunner {
    project: Option<String>,
    name: String,
    #[cfg_attr(test, schemars(with = "Option<Role>"))]
    role: Option<String>,
    clusters: Option<Vec<String>>,
    namespaces: Option<Vec<String>>,
    ttl_s: Option<i64>,
}

pub(super) fn routes(routes: Routes) -> Routes {
    routes
        .get("/api/v1/runners", list)
        .post("/api/v1/runners", add)
        .delete("/api/v1/runners/{id}", revoke)
}

async fn list(_: AdminCaller, State(hub): State<Hub>) -> Response {
    let items: Vec<Value> = hub.registry().accesses().iter().map(without_hash).collect();
    answer(200, &json!({"items": items}))
}

async fn add(
    _: AdminCaller,
    State(hub): State<Hub>,
    Json(asked): Json<AddRunner>,
) -> Result<Response, Refused> {
    let now = crate::control_plane::now();
    let expires_at =
        asked.ttl_s.map(|ttl| life(Some(ttl), DAY, YEAR)).transpose()?.map(|ttl| now + ttl);
    let row = Access {
        id: String::new(),
        project: asked.project.unwrap_or_else(|| "default".into()),
        name: asked.name,
        kind: AccessKind::Runner,
        hash: String::new(),
        role: role(asked.role.as_deref(), Role::Deployer)?,
        clusters: asked.clusters,
        namespaces: asked.namespaces,
        created_at: now,
        expires_at,
        revoked: false,
        maker: None,
    };
    let (row, token) = hub.registry().add_access(hub.keys(), row).await?;
    Ok(answer(201, &with_token(&row, &token)))
}

async fn revoke(
    _: AdminCaller,
    State(hub): State<Hub>,
    Segments([id]): Segments<1>,
    _: Whole,
) -> Result<Response, Refused> {
    hub.registry().revoke_access(&id).await?;
    Ok(answer(200, &json!({})))
}
