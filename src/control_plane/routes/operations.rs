//! Operations on a cluster: submit, show, cancel.

use axum::extract::State;
use axum::response::Response;
use http::{HeaderMap, Method, StatusCode};
use serde_json::json;

use super::Routes;
use crate::contract::token::Role;
use crate::contract::types::{IDEMPOTENCY_KEY, Operation, OperationState};
use crate::control_plane::answer::answer;
use crate::control_plane::auth::RunnerCaller;
use crate::control_plane::body::{PathSegments, RawBody, parsed};
use crate::control_plane::clock::now;
use crate::control_plane::clock::rfc3339;
use crate::control_plane::error::HttpError;
use crate::control_plane::model::Job;
use crate::control_plane::operations::{OperationRequest, Submission};
use crate::control_plane::registry::{Principal, Route};
use crate::control_plane::state::ControlPlane;

pub(super) fn routes(routes: Routes) -> Routes {
    routes
        .get("/api/v1/clusters/{id}/operations", list)
        .post("/api/v1/clusters/{id}/operations", submit)
        .get("/api/v1/clusters/{id}/operations/{op}", show)
        .delete("/api/v1/clusters/{id}/operations/{op}", cancel)
}

async fn list(
    caller: RunnerCaller,
    State(control_plane): State<ControlPlane>,
    PathSegments([id]): PathSegments<1>,
) -> Result<Response, HttpError> {
    let route = control_plane.registry().route(&id, caller.principal.project())?;
    let jobs = control_plane.registry().jobs(&route.agent).into_iter();
    let items: Vec<Operation> =
        jobs.filter(|job| sees(&caller.principal, job)).map(|job| job.operation).collect();
    Ok(answer(200, &json!({"items": items})))
}

async fn submit(
    caller: RunnerCaller,
    State(control_plane): State<ControlPlane>,
    PathSegments([id]): PathSegments<1>,
    headers: HeaderMap,
    RawBody(bytes): RawBody,
) -> Result<Response, HttpError> {
    let route = control_plane.registry().route(&id, caller.principal.project())?;
    let request: OperationRequest = parsed(&bytes)?;
    let key = headers.get(IDEMPOTENCY_KEY).and_then(|v| v.to_str().ok());
    match control_plane.submit_operation(&caller.principal, &route, request, key, now()).await? {
        Submission::Existing(job) => Ok(shown(200, &job, &route.cluster)),
        Submission::Created(job) => Ok(shown(202, &job, &route.cluster)),
        Submission::Rejected(status, value) => Ok(answer(status.as_u16(), &value)),
    }
}

async fn show(
    caller: RunnerCaller,
    State(control_plane): State<ControlPlane>,
    PathSegments([id, op]): PathSegments<2>,
) -> Result<Response, HttpError> {
    let route = control_plane.registry().route(&id, caller.principal.project())?;
    let mut job = found(&control_plane, &caller.principal, &route, &op)?;
    if job.operation.state == OperationState::Running
        && let Ok((StatusCode::OK, value)) =
            control_plane.call_operation(Method::GET, &caller.principal, &route, &op, now()).await
        && let Ok(fresh) = serde_json::from_value(value)
    {
        job.operation = fresh;
    }
    Ok(shown(200, &job, &route.cluster))
}

async fn cancel(
    caller: RunnerCaller,
    State(control_plane): State<ControlPlane>,
    PathSegments([id, op]): PathSegments<2>,
    _: RawBody,
) -> Result<Response, HttpError> {
    let now = now();
    let route = control_plane.registry().route(&id, caller.principal.project())?;
    let job = found(&control_plane, &caller.principal, &route, &op)?;
    match job.operation.state {
        OperationState::Queued => {
            control_plane
                .registry()
                .cancel_queued(
                    job,
                    OperationState::Cancelled,
                    "cancelled before the agent had it",
                    now,
                )
                .await?;
        }
        OperationState::Running => {
            let (status, value) = control_plane
                .call_operation(Method::DELETE, &caller.principal, &route, &op, now)
                .await?;
            return Ok(answer(status.as_u16(), &value));
        }
        _ => {}
    }
    Ok(shown(200, &found(&control_plane, &caller.principal, &route, &op)?, &route.cluster))
}

fn found(
    control_plane: &ControlPlane,
    principal: &Principal,
    route: &Route,
    op: &str,
) -> Result<Job, HttpError> {
    let job = control_plane.registry().job(&route.agent, op).filter(|job| sees(principal, job));
    job.ok_or_else(|| HttpError::new(404, "not_found", format!("there is no operation {op}"), None))
}

fn shown(status: u16, job: &Job, cluster: &str) -> Response {
    let mut body = json!(job.operation);
    body["cluster_id"] = cluster.into();
    if job.operation.state == OperationState::Queued {
        body["expires_at"] = rfc3339(job.expires_at).into();
    }
    answer(status, &body)
}

/// Its own operations, or all of the cluster for an operator of all namespaces.
fn sees(principal: &Principal, job: &Job) -> bool {
    match principal {
        Principal::Admin(_) | Principal::Local => true,
        Principal::Access(access) => {
            access.id == job.operation.subject
                || (access.role >= Role::Operator && access.namespaces.is_none())
        }
        Principal::Agent(_) | Principal::Enrolment(_) => false,
    }
}
