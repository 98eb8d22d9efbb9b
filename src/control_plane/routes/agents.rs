//! Calls of agents: registration, heartbeats, reports, and their credential.

use axum::extract::State;
use axum::response::Response;
use http::HeaderMap;
use serde_json::json;

use super::Routes;
use crate::contract::types::{
    Heartbeat, HeartbeatAnswer, Operation, Register, SIGNATURE_HEADER, StatusReport,
};
use crate::control_plane::answer::answer;
use crate::control_plane::auth::{AgentCaller, EnrolmentCaller};
use crate::control_plane::body::{JsonBody, PathSegments, RawBody, parsed};
use crate::control_plane::clock::now;
use crate::control_plane::clock::rfc3339;
use crate::control_plane::error::HttpError;
use crate::control_plane::state::ControlPlane;

/// Largest registration: it is stored, and written again with every heartbeat.
const MAX_REGISTRATION: usize = 64 << 10;

pub(super) fn routes(routes: Routes) -> Routes {
    routes
        .post("/api/v1/agents/register", register)
        .get("/api/v1/agents/{id}/config", config)
        .post("/api/v1/agents/{id}/heartbeat", heartbeat)
        .post("/api/v1/agents/{id}/status", status)
        .post("/api/v1/agents/{id}/operations/{op}/result", result)
        .post("/api/v1/agents/{id}/credential", credential)
        .delete("/api/v1/agents/{id}", deregister)
        // no agent has this id: the error is about the token, not about the method
        .delete("/api/v1/agents/register", deregister)
}

async fn register(
    caller: EnrolmentCaller,
    State(control_plane): State<ControlPlane>,
    headers: HeaderMap,
    RawBody(bytes): RawBody,
) -> Result<Response, HttpError> {
    if bytes.len() > MAX_REGISTRATION {
        return Err(HttpError::new(
            413,
            "too_large",
            "a registration is at most 64 KiB long",
            None,
        ));
    }
    let request: Register = parsed(&bytes)?;
    let signature = headers.get(SIGNATURE_HEADER).and_then(|v| v.to_str().ok()).unwrap_or_default();
    let done = control_plane
        .registry()
        .register(control_plane.keys(), &caller.principal, request, &bytes, signature, now())
        .await?;
    let config = control_plane.config(&done.agent_id);
    Ok(answer(
        200,
        &json!({
            "agent_id": done.agent_id,
            "cluster_id": done.cluster_id,
            "credential": done.credential.expose(),
            "credential_expires_at": rfc3339(done.expires_at),
            "config": config,
        }),
    ))
}

async fn config(agent: AgentCaller, State(control_plane): State<ControlPlane>) -> Response {
    answer(200, &control_plane.config(&agent.id))
}

async fn heartbeat(
    agent: AgentCaller,
    State(control_plane): State<ControlPlane>,
    JsonBody(message): JsonBody<Heartbeat>,
) -> Result<Response, HttpError> {
    let directives = control_plane.registry().heartbeat(&agent.id, &message, now())?;
    let reply = HeartbeatAnswer {
        config_version: control_plane.config(&agent.id).config_version,
        directives,
    };
    Ok(answer(200, &reply))
}

async fn status(
    agent: AgentCaller,
    State(control_plane): State<ControlPlane>,
    JsonBody(report): JsonBody<StatusReport>,
) -> Result<Response, HttpError> {
    control_plane.registry().report(&agent.id, report)?;
    Ok(answer(200, &json!({})))
}

async fn result(
    agent: AgentCaller,
    State(control_plane): State<ControlPlane>,
    PathSegments([_, op]): PathSegments<2>,
    JsonBody(report): JsonBody<Operation>,
) -> Result<Response, HttpError> {
    control_plane.registry().finish_operation(&agent.id, &op, report, now()).await?;
    Ok(answer(200, &json!({})))
}

async fn credential(
    agent: AgentCaller,
    State(control_plane): State<ControlPlane>,
    _: RawBody,
) -> Result<Response, HttpError> {
    let (credential, expires_at) =
        control_plane.registry().rotate(control_plane.keys(), &agent.id, now()).await?;
    Ok(answer(
        200,
        &json!({"credential": credential.expose(), "credential_expires_at": rfc3339(expires_at)}),
    ))
}

async fn deregister(
    agent: AgentCaller,
    State(control_plane): State<ControlPlane>,
    _: RawBody,
) -> Result<Response, HttpError> {
    control_plane.registry().remove_agent(&agent.id, now()).await?;
    Ok(answer(200, &json!({})))
}
