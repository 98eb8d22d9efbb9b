//! Operations on a cluster: submit, show, cancel.

use axum::extract::State;
use axum::response::Response;
use http::{HeaderMap, Method, StatusCode};
use serde_json::json;

use super::Routes;
use crate::contract::token::Role;
use crate::contract::types::{IDEMPOTENCY_KEY_HEADER, Operation, OperationState};
use crate::control_plane::answer::answer;
use crate::control_plane::auth::RunnerCaller;
use crate::control_plane::body::{PathSegments, RawBody, parsed};
use crate::control_plane::clock::now;
use crate::control_plane::clock::rfc3339;
use crate::control_plane::error::{HttpError, not_found};
use crate::control_plane::model::OperationRecord;
use crate::control_plane::operations::{OperationRequest, Submission};
use crate::control_plane::registry::{ClusterTarget, Principal};
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
    let target = control_plane.registry().target(&id, caller.principal.project())?;
    let operations = control_plane.registry().operations(&target.agent).into_iter();
    let items: Vec<Operation> = operations
        .filter(|record| may_see(&caller.principal, record))
        .map(|record| record.operation)
        .collect();
    Ok(answer(200, &json!({"items": items})))
}

async fn submit(
    caller: RunnerCaller,
    State(control_plane): State<ControlPlane>,
    PathSegments([id]): PathSegments<1>,
    headers: HeaderMap,
    RawBody(bytes): RawBody,
) -> Result<Response, HttpError> {
    let target = control_plane.registry().target(&id, caller.principal.project())?;
    let request: OperationRequest = parsed(&bytes)?;
    let key = headers.get(IDEMPOTENCY_KEY_HEADER).and_then(|v| v.to_str().ok());
    match control_plane.submit_operation(&caller.principal, &target, request, key, now()).await? {
        Submission::Existing(record) => {
            let record = control_plane.registry().with_log(record).await?;
            Ok(operation_answer(200, &record, &target.cluster))
        }
        Submission::Created(record) => Ok(operation_answer(202, &record, &target.cluster)),
        Submission::Rejected(status, value) => Ok(answer(status.as_u16(), &value)),
    }
}

async fn show(
    caller: RunnerCaller,
    State(control_plane): State<ControlPlane>,
    PathSegments([id, op]): PathSegments<2>,
) -> Result<Response, HttpError> {
    let target = control_plane.registry().target(&id, caller.principal.project())?;
    let mut record = find_operation(&control_plane, &caller.principal, &target, &op).await?;
    if record.operation.state == OperationState::Running
        && let Ok((StatusCode::OK, value)) =
            control_plane.call_operation(Method::GET, &caller.principal, &target, &op, now()).await
        && let Ok(fresh) = serde_json::from_value(value)
    {
        record.operation = fresh;
    }
    Ok(operation_answer(200, &record, &target.cluster))
}

async fn cancel(
    caller: RunnerCaller,
    State(control_plane): State<ControlPlane>,
    PathSegments([id, op]): PathSegments<2>,
    _: RawBody,
) -> Result<Response, HttpError> {
    let now = now();
    let target = control_plane.registry().target(&id, caller.principal.project())?;
    let record = find_operation(&control_plane, &caller.principal, &target, &op).await?;
    match record.operation.state {
        OperationState::Queued => {
            control_plane
                .registry()
                .cancel_queued(
                    record,
                    OperationState::Cancelled,
                    "cancelled before the agent had it",
                    now,
                )
                .await?;
        }
        OperationState::Running => {
            let (status, value) = control_plane
                .call_operation(Method::DELETE, &caller.principal, &target, &op, now)
                .await?;
            return Ok(answer(status.as_u16(), &value));
        }
        _ => {}
    }
    Ok(operation_answer(
        200,
        &find_operation(&control_plane, &caller.principal, &target, &op).await?,
        &target.cluster,
    ))
}

async fn find_operation(
    control_plane: &ControlPlane,
    principal: &Principal,
    target: &ClusterTarget,
    op: &str,
) -> Result<OperationRecord, HttpError> {
    let registry = control_plane.registry();
    let record = registry
        .operation(&target.agent, op)
        .filter(|record| may_see(principal, record))
        .ok_or_else(|| not_found("operation", op))?;
    registry.with_log(record).await
}

fn operation_answer(status: u16, record: &OperationRecord, cluster: &str) -> Response {
    let mut body = json!(record.operation);
    body["cluster_id"] = cluster.into();
    if record.operation.state == OperationState::Queued {
        body["expires_at"] = rfc3339(record.expires_at).into();
    }
    answer(status, &body)
}

/// Its own operations, or all of the cluster for an operator of all namespaces; with the token of a
/// tenant only those that were asked for with one of the same tenant.
fn may_see(principal: &Principal, record: &OperationRecord) -> bool {
    match principal {
        Principal::Admin(_) | Principal::Local => true,
        Principal::AccessToken(access) => {
            let caller = record.caller();
            let is_own = access.id == caller
                || access.subject() == caller
                || (access.role >= Role::Operator && access.namespace_limit().is_none());
            is_own && (access.tenant.is_none() || access.tenant == record.tenant)
        }
        Principal::Agent(_) | Principal::Enrolment(_) => false,
    }
}
