//! Rollouts: begin, list, show, resume, cancel.

use std::sync::Arc;

use axum::extract::State;
use axum::response::Response;
use http::{HeaderMap, Uri};
use serde_json::{Value, json};

use super::Routes;
use crate::contract::token::Role;
use crate::contract::types::IDEMPOTENCY_KEY_HEADER;
use crate::control_plane::answer::answer;
use crate::control_plane::auth::RunnerCaller;
use crate::control_plane::body::{JsonBody, PathSegments, RawBody};
use crate::control_plane::clock::now;
use crate::control_plane::error::{HttpError, not_found};
use crate::control_plane::registry::Principal;
use crate::control_plane::rollout::RolloutRecord;
use crate::control_plane::rollouts::RolloutRequest;
use crate::control_plane::state::ControlPlane;

/// Rollouts in a list: so many where nothing is said, and at most.
const LISTED: usize = 50;
const MAX_LISTED: usize = 500;

pub(super) fn routes(routes: Routes) -> Routes {
    routes
        .get("/api/v1/rollouts", list)
        .post("/api/v1/rollouts", begin)
        .get("/api/v1/rollouts/{id}", show)
        .delete("/api/v1/rollouts/{id}", cancel)
        .post("/api/v1/rollouts/{id}/resume", resume)
}

async fn begin(
    caller: RunnerCaller,
    State(control_plane): State<ControlPlane>,
    headers: HeaderMap,
    JsonBody(request): JsonBody<RolloutRequest>,
) -> Result<Response, HttpError> {
    let key = headers.get(IDEMPOTENCY_KEY_HEADER).and_then(|v| v.to_str().ok());
    let key = key.unwrap_or_default();
    let (record, is_new) =
        control_plane.begin_rollout(&caller.principal, request, key, now()).await?;
    Ok(answer(if is_new { 202 } else { 200 }, &record.view(true)))
}

async fn list(
    caller: RunnerCaller,
    State(control_plane): State<ControlPlane>,
    uri: Uri,
) -> Result<Response, HttpError> {
    let query = uri.query().unwrap_or_default();
    let limit = url::form_urlencoded::parse(query.as_bytes()).find(|(name, _)| name == "limit");
    let limit = match limit {
        Some((_, text)) => {
            text.parse().ok().filter(|limit| (1..=MAX_LISTED).contains(limit)).ok_or_else(|| {
                let message = format!("limit is a number from 1 to {MAX_LISTED}");
                HttpError::new(400, "bad_limit", message, None)
            })?
        }
        None => LISTED,
    };
    let found = control_plane.registry().rollouts(limit, &|r| may_see(&caller.principal, r));
    let items: Vec<Value> = found.iter().map(|record| record.view(false)).collect();
    Ok(answer(200, &json!({"items": items})))
}

async fn show(
    caller: RunnerCaller,
    State(control_plane): State<ControlPlane>,
    PathSegments([id]): PathSegments<1>,
) -> Result<Response, HttpError> {
    Ok(answer(200, &find(&control_plane, &caller.principal, &id)?.view(true)))
}

async fn resume(
    caller: RunnerCaller,
    State(control_plane): State<ControlPlane>,
    PathSegments([id]): PathSegments<1>,
    _: RawBody,
) -> Result<Response, HttpError> {
    find(&control_plane, &caller.principal, &id)?;
    control_plane.registry().change_rollout(&id, RolloutRecord::resume).await?;
    control_plane.drive_rollout(&id, now()).await;
    show(caller, State(control_plane), PathSegments([id])).await
}

/// One that has ended, or was cancelled before, is shown as it is.
async fn cancel(
    caller: RunnerCaller,
    State(control_plane): State<ControlPlane>,
    PathSegments([id]): PathSegments<1>,
    _: RawBody,
) -> Result<Response, HttpError> {
    if find(&control_plane, &caller.principal, &id)?.goes_on() {
        let why = format!("cancelled by {}", caller.principal.subject());
        control_plane.registry().change_rollout(&id, |record| record.cancel(&why)).await?;
        // the first look cancels what is queued, the second one tells it
        control_plane.drive_rollout(&id, now()).await;
        control_plane.drive_rollout(&id, now()).await;
    }
    show(caller, State(control_plane), PathSegments([id])).await
}

fn find(
    control_plane: &ControlPlane,
    principal: &Principal,
    id: &str,
) -> Result<Arc<RolloutRecord>, HttpError> {
    let found = control_plane.registry().rollout(id).filter(|record| may_see(principal, record));
    found.ok_or_else(|| not_found("rollout", id))
}

/// Its own rollouts; of others those of no higher role than its own, for an operator who reaches
/// the whole project; with the token of a tenant only those that were asked for with one of the
/// same tenant. Who may see one may resume and cancel it.
fn may_see(principal: &Principal, record: &RolloutRecord) -> bool {
    let Principal::AccessToken(access) = principal else { return principal.is_admin() };
    let asked_with = record.limits.as_ref().map_or(Role::Admin, |limits| limits.role);
    // beside a selector the list is there too, and empty
    let is_everywhere = access.clusters.is_none() && access.namespace_limit().is_none();
    let is_own = access.id == record.caller_id
        || (access.project == record.project
            && access.role >= asked_with.max(Role::Operator)
            && is_everywhere);
    is_own && (access.tenant.is_none() || access.tenant.as_deref() == record.tenant())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control_plane::model::{AccessKind, AccessToken, Limits};
    use crate::control_plane::rollout::RolloutState;

    #[test]
    fn a_rollout_is_seen_by_who_asked_and_by_who_may_as_much_everywhere() {
        let access = AccessToken {
            id: "r-1".into(),
            project: "p-1".into(),
            name: "ci".into(),
            kind: AccessKind::Runner,
            hash: String::new(),
            role: Role::Deployer,
            clusters: None,
            namespaces: None,
            tenant: None,
            created_at: 0,
            expires_at: None,
            revoked: false,
            maker: None,
            person: false,
            selector: None,
            jobs: false,
        };
        let principal = |access: &AccessToken| Principal::AccessToken(Box::new(access.clone()));
        let record = |caller: &Principal| RolloutRecord {
            id: "ro-1".into(),
            project: "p-1".into(),
            caller_id: caller.id(),
            subject: caller.subject(),
            limits: caller.limits(),
            kind: "restart".into(),
            request: String::new(),
            sealed: None,
            ttl_s: None,
            state: RolloutState::Running,
            message: String::new(),
            created_at: 0,
            finished_at: None,
            paused_at: None,
            clusters: Vec::new(),
        };
        let own = record(&principal(&access));
        let operator = AccessToken { id: "r-2".into(), role: Role::Operator, ..access.clone() };
        let acme = |id: &str| AccessToken {
            id: id.into(),
            tenant: Some("acme".into()),
            ..operator.clone()
        };
        let only = || Some(vec!["c-1".to_owned()]);
        for (other, seen) in [
            (access.clone(), true),
            (AccessToken { id: "r-3".into(), ..access }, false),
            (operator.clone(), true),
            (AccessToken { project: "p-2".into(), ..operator.clone() }, false),
            (AccessToken { clusters: only(), ..operator.clone() }, false),
            (AccessToken { namespaces: only(), ..operator.clone() }, false),
            (acme("r-4"), false),
        ] {
            assert_eq!(may_see(&principal(&other), &own), seen, "{other:?}");
        }
        let of_acme = record(&principal(&acme("r-5")));
        assert!(may_see(&principal(&acme("r-6")), &of_acme));
        let globex = AccessToken { tenant: Some("globex".into()), ..acme("r-7") };
        assert!(!may_see(&principal(&globex), &of_acme));
        // what an administrator began goes on with an administrator's rights
        let of_admin = record(&Principal::Admin("eve".into()));
        assert!(!may_see(&principal(&operator), &of_admin));
        let admin = AccessToken { role: Role::Admin, ..operator };
        assert!(may_see(&principal(&admin), &of_admin) && may_see(&Principal::Local, &own));
        let limited: Option<Limits> = own.limits;
        assert_eq!(limited.unwrap().role, Role::Deployer);
    }
}
