//! What agents call: registration, signs of life, what they report, and their credential.

use axum::extract::State;
use axum::response::Response;
use http::HeaderMap;
use serde_json::json;

use super::Routes;
use crate::contract::types::{
    Heartbeat, HeartbeatAnswer, Operation, Register, SIGNATURE, StatusReport,
};
use crate::control_plane::Hub;
use crate::control_plane::answer::answer;
use crate::control_plane::auth::{AgentCaller, EnrolmentCaller};
use crate::control_plane::body::{Json, Segments, Whole, parsed};
use crate::control_plane::model::rfc3339;
use crate::control_plane::registry::{Refused, refused};

/// Longest registration: what is in it is kept, and written again with every sign of life.
const REGISTRATION: usize = 64 << 10;

pub(super) fn routes(routes: Routes) -> Routes {
    routes
        .post("/api/v1/agents/register", register)
        .get("/api/v1/agents/{id}/config", config)
        .post("/api/v1/agents/{id}/heartbeat", heartbeat)
        .post("/api/v1/agents/{id}/status", status)
        .post("/api/v1/agents/{id}/operations/{op}/result", result)
        .post("/api/v1/agents/{id}/credential", credential)
        .delete("/api/v1/agents/{id}", deregister)
        // no agent is called so: whoever asks is told of his token, not of the method
        .delete("/api/v1/agents/register", deregister)
}

async fn register(
    caller: EnrolmentCaller,
    State(hub): State<Hub>,
    headers: HeaderMap,
    Whole(bytes): Whole,
) -> Result<Response, Refused> {
    if bytes.len() > REGISTRATION {
        return Err(refused(413, "too_large", "a registration is at most 64 KiB long", None));
    }
    let asked: Register = parsed(&bytes)?;
    let signature = headers.get(SIGNATURE).and_then(|v| v.to_str().ok()).unwrap_or_default();
    let done = hub
        .registry()
        .register(hub.keys(), &caller.who, asked, &bytes, signature, crate::control_plane::now())
        .await?;
    let config = hub.config(&done.agent_id);
    Ok(answer(
        200,
        &json!({"agent_id": done.agent_id, "cluster_id": done.cluster_id, "credential": done.credential.expose(),
            "credential_expires_at": rfc3339(done.expires_at), "config": config}),
    ))
}

async fn config(agent: AgentCaller, State(hub): State<Hub>) -> Response {
    answer(200, &hub.config(&agent.id))
}

async fn heartbeat(
    agent: AgentCaller,
    State(hub): State<Hub>,
    Json(beat): Json<Heartbeat>,
) -> Result<Response, Refused> {
    let directives = hub.registry().heartbeat(&agent.id, &beat, crate::control_plane::now())?;
    let reply =
        HeartbeatAnswer { config_version: hub.config(&agent.id).config_version, directives };
    Ok(answer(200, &reply))
}

async fn status(
    agent: AgentCaller,
    State(hub): State<Hub>,
    Json(report): Json<StatusReport>,
) -> Result<Response, Refused> {
    hub.registry().report(&agent.id, report)?;
    Ok(answer(200, &json!({})))
}

async fn result(
    agent: AgentCaller,
    State(hub): State<Hub>,
    Segments([_, op]): Segments<2>,
    Json(told): Json<Operation>,
) -> Result<Response, Refused> {
    hub.registry().finish_job(&agent.id, &op, told, crate::control_plane::now()).await?;
    Ok(answer(200, &json!({})))
}

async fn credential(
    agent: AgentCaller,
    State(hub): State<Hub>,
    _: Whole,
) -> Result<Response, Refused> {
    let (credential, expires_at) =
        hub.registry().rotate(hub.keys(), &agent.id, crate::control_plane::now()).await?;
    Ok(answer(
        200,
        &json!({"credential": credential.expose(), "credential_expires_at": rfc3339(expires_at)}),
    ))
}

async fn deregister(
    agent: AgentCaller,
    State(hub): State<Hub>,
    _: Whole,
) -> Result<Response, Refused> {
    hub.registry().remove_agent(&agent.id, crate::control_plane::now()).await?;
    Ok(answer(200, &json!({})))
}
