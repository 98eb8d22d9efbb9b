//! Tokens of Runners, users and kubeconfigs.

use axum::extract::State;
use axum::response::Response;
use serde::Deserialize;
use serde_json::{Value, json};

use super::{Routes, with_token, without_hash};
use crate::contract::token::Role;
use crate::control_plane::answer::answer;
use crate::control_plane::auth::AdminCaller;
use crate::control_plane::body::{JsonBody, PathSegments, RawBody};
use crate::control_plane::clock::now;
use crate::control_plane::error::HttpError;
use crate::control_plane::model::{AccessKind, AccessToken};
use crate::control_plane::scope::{
    DAY, Scope, YEAR, check_namespaces, check_tenant, checked_ttl, parse_role,
};
use crate::control_plane::state::ControlPlane;

/// Longest selector of a right, bytes.
const MAX_SELECTOR: usize = 2000;

#[derive(Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "NewRunner"))]
#[serde(deny_unknown_fields)]
pub(super) struct NewRunner {
    project: Option<String>,
    name: String,
    #[cfg_attr(test, schemars(with = "Option<Role>"))]
    role: Option<String>,
    clusters: Option<Vec<String>>,
    namespaces: Option<Vec<String>>,
    tenant: Option<String>,
    /// Only clusters with such labels, set at the control plane, or such an `id`.
    selector: Option<String>,
    ttl_s: Option<i64>,
    /// A user: a person, known by name.
    person: Option<bool>,
    /// It brings jobs from RabbitMQ.
    jobs: Option<bool>,
}

pub(super) fn routes(routes: Routes) -> Routes {
    routes
        .get("/api/v1/runners", list)
        .post("/api/v1/runners", add)
        .delete("/api/v1/runners/{id}", revoke)
}

async fn list(_: AdminCaller, State(control_plane): State<ControlPlane>) -> Response {
    let items: Vec<Value> =
        control_plane.registry().access_tokens().iter().map(without_hash).collect();
    answer(200, &json!({"items": items}))
}

async fn add(
    _: AdminCaller,
    State(control_plane): State<ControlPlane>,
    JsonBody(request): JsonBody<NewRunner>,
) -> Result<Response, HttpError> {
    let now = now();
    let expires_at = request
        .ttl_s
        .map(|ttl| checked_ttl(Some(ttl), DAY, YEAR))
        .transpose()?
        .map(|ttl| now + ttl);
    let role = parse_role(request.role.as_deref(), Role::Deployer)?;
    check_namespaces(request.namespaces.as_deref())?;
    check_tenant(request.tenant.as_deref())?;
    let bad_selector = |message, hint| Err(HttpError::new(400, "bad_selector", message, hint));
    if let Some(selector) = &request.selector {
        if request.clusters.is_some() {
            let hint = Some("an id can stand in a selector: id in (c-1,c-2)");
            return bad_selector("clusters and a selector exclude each other", hint);
        }
        // a kubeconfig has it with the id of its cluster beside it
        if selector.len() > MAX_SELECTOR {
            return bad_selector("the selector of a right has 2,000 bytes at most", None);
        }
    }
    let (person, jobs) = (request.person.unwrap_or(false), request.jobs.unwrap_or(false));
    if jobs && (person || request.tenant.is_some()) {
        let message = "who brings jobs is neither a user nor of a tenant";
        return Err(HttpError::new(400, "bad_jobs", message, None));
    }
    let scope = Scope { role, namespaces: request.namespaces, tenant: request.tenant };
    let row = AccessToken {
        id: String::new(),
        project: request.project.unwrap_or_else(|| "default".into()),
        name: request.name,
        kind: AccessKind::Runner,
        hash: String::new(),
        role,
        clusters: request.clusters.or_else(|| request.selector.as_ref().map(|_| Vec::new())),
        namespaces: scope.stored_namespaces(),
        tenant: scope.tenant,
        created_at: now,
        expires_at,
        revoked: false,
        maker: None,
        person,
        selector: request.selector,
        jobs,
    };
    let (row, token) = control_plane.registry().add_access_token(control_plane.keys(), row).await?;
    let mut shown = with_token(&row, &token);
    if row.person {
        shown["login"] = control_plane.login_line().into();
    }
    Ok(answer(201, &shown))
}

async fn revoke(
    _: AdminCaller,
    State(control_plane): State<ControlPlane>,
    PathSegments([id]): PathSegments<1>,
    _: RawBody,
) -> Result<Response, HttpError> {
    control_plane.registry().revoke_access_token(&id, now()).await?;
    Ok(answer(200, &json!({})))
}
