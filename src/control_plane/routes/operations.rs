//! Operations on a cluster: asked for, looked at, called off.

use axum::extract::State;
use axum::response::Response;
use http::{HeaderMap, Method, StatusCode};
use serde_json::json;

use super::Routes;
use crate::contract::token::Role;
use crate::contract::types::{IDEMPOTENCY_KEY, Operation, OperationState};
use crate::control_plane::Hub;
use crate::control_plane::answer::answer;
use crate::control_plane::auth::RunnerCaller;
use crate::control_plane::body::{Segments, Whole, parsed};
use crate::control_plane::model::{Job, rfc3339};
use crate::control_plane::operations::{Asked, Taken};
use crate::control_plane::registry::{Refused, Route, Who, refused};

pub(super) fn routes(routes: Routes) -> Routes {
    routes
        .get("/api/v1/clusters/{id}/operations", list)
        .post("/api/v1/clusters/{id}/operations", ask)
        .get("/api/v1/clusters/{id}/operations/{op}", show)
        .delete("/api/v1/clusters/{id}/operations/{op}", cancel)
}

async fn list(
    caller: RunnerCaller,
    State(hub): State<Hub>,
    Segments([id]): Segments<1>,
) -> Result<Response, Refused> {
    let route = hub.registry().route(&id, caller.who.project())?;
    let jobs = hub.registry().jobs(&route.agent).into_iter();
    let items: Vec<Operation> =
        jobs.filter(|job| sees(&caller.who, job)).map(|job| job.operation).collect();
    Ok(answer(200, &json!({"items": items})))
}

async fn ask(
    caller: RunnerCaller,
    State(hub): State<Hub>,
    Segments([id]): Segments<1>,
    headers: HeaderMap,
    Whole(bytes): Whole,
) -> Result<Response, Refused> {
    let route = hub.registry().route(&id, caller.who.project())?;
    let asked: Asked = parsed(&bytes)?;
    let key = headers.get(IDEMPOTENCY_KEY).and_then(|v| v.to_str().ok());
    match hub.ask_operation(&caller.who, &route, asked, key, crate::control_plane::now()).await? {
        Taken::Known(job) => Ok(shown(200, &job, &route.cluster)),
        Taken::New(job) => Ok(shown(202, &job, &route.cluster)),
        Taken::Refused(status, value) => Ok(answer(status.as_u16(), &value)),
    }
}

async fn show(
    caller: RunnerCaller,
    State(hub): State<Hub>,
    Segments([id, op]): Segments<2>,
) -> Result<Response, Refused> {
    let route = hub.registry().route(&id, caller.who.project())?;
    let mut job = found(&hub, &caller.who, &route, &op)?;
    if job.operation.state == OperationState::Running
        && let Ok((StatusCode::OK, value)) =
            hub.at_agent(Method::GET, &caller.who, &route, &op, crate::control_plane::now()).await
        && let Ok(fresh) = serde_json::from_value(value)
    {
        job.operation = fresh;
    }
    Ok(shown(200, &job, &route.cluster))
}

async fn cancel(
    caller: RunnerCaller,
    State(hub): State<Hub>,
    Segments([id, op]): Segments<2>,
    _: Whole,
) -> Result<Response, Refused> {
    let now = crate::control_plane::now();
    let route = hub.registry().route(&id, caller.who.project())?;
    let job = found(&hub, &caller.who, &route, &op)?;
    match job.operation.state {
        OperationState::Queued => {
            hub.registry()
                .call_off(job, OperationState::Cancelled, "cancelled before the agent had it", now)
                .await?;
        }
        OperationState::Running => {
            let (status, value) =
                hub.at_agent(Method::DELETE, &caller.who, &route, &op, now).await?;
            return Ok(answer(status.as_u16(), &value));
        }
        _ => {}
    }
    Ok(shown(200, &found(&hub, &caller.who, &route, &op)?, &route.cluster))
}

fn found(hub: &Hub, who: &Who, route: &Route, op: &str) -> Result<Job, Refused> {
    let job = hub.registry().job(&route.agent, op).filter(|job| sees(who, job));
    job.ok_or_else(|| refused(404, "not_found", format!("there is no operation {op}"), None))
}

fn shown(status: u16, job: &Job, cluster: &str) -> Response {
    let mut body = json!(job.operation);
    body["cluster_id"] = cluster.into();
    if job.operation.state == OperationState::Queued {
        body["expires_at"] = rfc3339(job.expires_at).into();
    }
    answer(status, &body)
}

/// His own, or all of the cluster as an operator of the whole of it.
fn sees(who: &Who, job: &Job) -> bool {
    match who {
        Who::Admin(_) | Who::Local => true,
        Who::Access(access) => {
            access.id == job.operation.subject
                || (access.role >= Role::Operator && access.namespaces.is_none())
        }
        Who::Agent(_) | Who::Enrolment(_) => false,
    }
}
