//! Operations: passed to the agent at once, or queued until it is online.

use std::collections::HashSet;
use std::sync::Arc;

use http::{Method, Request, StatusCode, header};
use hyper::body::Bytes;
use parking_lot::Mutex;
use serde::Deserialize;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use super::caller_token::{CallerTokenRequest, TENANTS_UNSUPPORTED, check_answer, check_tenants};
use super::clock::rfc3339;
use super::error::{HttpError, database_unavailable};
use super::model::OperationRecord;
use super::registry::{ClusterTarget, Principal};
use super::scope::{TokenRequest, checked_ttl, restrict};
use super::state::ControlPlane;
use crate::base::encoding::hex;
use crate::base::task::boxed;
use crate::contract::token::Role;
use crate::contract::types::{
    IDEMPOTENCY_KEY_HEADER, Operation, OperationState, check_idempotency_key, tenant_operation_id,
};

/// Longest time in the queue, seconds.
pub(super) const MAX_TTL: i64 = 7 * 86_400;
/// Queued operations that an agent gets before it is looked whether one is to be cancelled.
const MAX_IN_TURN: usize = 32;

/// Before what is sealed of a caller with limits: a version that would not keep to them does not
/// find it to be of its keys, and ends it.
const LIMITED: &str = "limited.";

#[derive(Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "OperationRequest"))]
#[serde(deny_unknown_fields)]
pub(super) struct OperationRequest {
    /// The agent knows which there are: it may be of a later version than this.
    pub(super) kind: String,
    pub(super) spec: Value,
    /// How long it may wait for an agent that is not there. Without it, it does not wait.
    pub(super) ttl_s: Option<i64>,
}

/// Agents that are told of an operation at the moment, and those whose last turn was a cancel.
#[derive(Clone, Default)]
pub(super) struct InFlight(Arc<Mutex<Turns>>);

#[derive(Default)]
struct Turns {
    busy: HashSet<String>,
    cancelled: HashSet<String>,
}

/// What agents are told, the first of each agent at most: cancels before what waits, but not twice
/// in a row. One that can't be cancelled does not keep the others waiting.
fn in_turn(
    cancels: Vec<OperationRecord>,
    queued: Vec<OperationRecord>,
    cancelled: &HashSet<String>,
) -> Vec<OperationRecord> {
    let (again, first): (Vec<_>, Vec<_>) =
        cancels.into_iter().partition(|record| cancelled.contains(&record.agent));
    first.into_iter().chain(queued).chain(again).collect()
}

/// The outcome of a request for an operation.
pub(super) enum Submission {
    /// It exists already, with the same key.
    Existing(OperationRecord),
    Created(OperationRecord),
    /// The agent's refusal.
    Rejected(StatusCode, Value),
}

impl ControlPlane {
    /// A call to the agent about one operation.
    pub(super) async fn call_operation(
        &self,
        method: Method,
        principal: &Principal,
        target: &ClusterTarget,
        op: &str,
        now: i64,
    ) -> Result<(StatusCode, Value), HttpError> {
        let (token, _) =
            self.caller_token(&CallerTokenRequest::with_own_rights(principal, target, now)?)?;
        let request = Request::builder().method(method);
        let path = format!("api/v1/operations/{op}");
        let clients = self.agent_clients();
        let answer = clients.call(request, &path, target, &token, Bytes::new()).await?;
        check_answer(principal, answer)
    }

    /// Passes an operation to its agent, or queues it until the agent is online.
    pub(super) async fn submit_operation(
        &self,
        principal: &Principal,
        target: &ClusterTarget,
        request: OperationRequest,
        key: Option<&str>,
        now: i64,
    ) -> Result<Submission, HttpError> {
        let ttl = request.ttl_s.map(|ttl| checked_ttl(Some(ttl), MAX_TTL, MAX_TTL)).transpose()?;
        let scope = restrict(principal, &TokenRequest::default())?;
        if scope.role < Role::Deployer {
            return Err(HttpError::new(403, "role_exceeded", "a viewer changes nothing", None));
        }
        // what waits for an agent is not refused only when it is there
        if scope.tenant.is_some() {
            check_tenants(target)?;
        }
        let key = check_idempotency_key(key)
            .map_err(|why| HttpError::new(400, "idempotency_key_needed", why, None))?;
        let body = json!({"kind": request.kind, "spec": request.spec}).to_string();
        let (subject, digest) = (principal.subject(), hex(&Sha256::digest(&body)));
        let id = tenant_operation_id(&subject, scope.tenant.as_deref(), key);
        if let Some(known) = self.registry().operation(&target.agent, &id) {
            // one that was requested at the agent is compared there; one of the user who had this
            // name before is another's
            let own = known.caller_id.is_empty() || known.caller_id == principal.id();
            if own && (known.request == digest || known.request.is_empty()) {
                return Ok(Submission::Existing(known));
            }
            let hint = Some("use a fresh key for each thing that is asked for");
            return Err(HttpError::new(
                409,
                "idempotency_mismatch",
                "this Idempotency-Key was used for something else",
                hint,
            ));
        }
        let mut record = OperationRecord {
            agent: target.agent.clone(),
            operation: Operation {
                id: id.clone(),
                kind: request.kind,
                state: OperationState::Queued,
                subject,
                created_at: rfc3339(now),
                ..Operation::default()
            },
            caller_id: principal.id(),
            limits: None,
            tenant: scope.tenant,
            key: key.into(),
            request: digest,
            sealed: None,
            asked_ms: jiff::Timestamp::now().as_millisecond(),
            expires_at: now + ttl.unwrap_or(0),
            changed_at: now,
        };
        // one that may wait does not overtake those in the queue
        if ttl.is_none() || !self.registry().has_queued(&target.agent) {
            match self.submit_to_agent(principal, target, &record, &body, now).await {
                Ok((status, value)) if !status.is_success() => {
                    return Ok(Submission::Rejected(status, value));
                }
                Ok((_, value)) => {
                    record.operation = parse_operation(value)?;
                    self.registry().put_operation(record.clone(), now).await?;
                    return Ok(Submission::Created(record));
                }
                Err(error) if ttl.is_none() || error.code == TENANTS_UNSUPPORTED => {
                    return Err(error);
                }
                Err(_) => {}
            }
        }
        self.keep_request(&mut record, principal, &body, now)?;
        self.registry().put_operation(record.clone(), now).await?;
        Ok(Submission::Created(record))
    }

    /// Seals a request into its record, with what its caller is limited to.
    fn keep_request(
        &self,
        record: &mut OperationRecord,
        principal: &Principal,
        body: &str,
        now: i64,
    ) -> Result<(), HttpError> {
        let sealed = self.keys().seal(body).map_err(|e| database_unavailable(&e))?;
        record.limits = self.registry().narrower_limits(principal, now);
        let mark = if record.limits.is_some() { LIMITED } else { "" };
        record.sealed = Some(format!("{mark}{sealed}"));
        Ok(())
    }

    async fn submit_to_agent(
        &self,
        principal: &Principal,
        target: &ClusterTarget,
        record: &OperationRecord,
        body: &str,
        now: i64,
    ) -> Result<(StatusCode, Value), HttpError> {
        let (token, _) =
            self.caller_token(&CallerTokenRequest::with_own_rights(principal, target, now)?)?;
        let request = Request::builder()
            .method(Method::POST)
            .header(header::CONTENT_TYPE, "application/json")
            .header(IDEMPOTENCY_KEY_HEADER, &record.key);
        let (clients, body) = (self.agent_clients(), Bytes::from(body.to_owned()));
        let answer = clients.call(request, "api/v1/operations", target, &token, body).await?;
        check_answer(principal, answer)
    }

    /// Passes queued operations to agents that are online, one at a time for each agent, and
    /// cancels those whose caller was revoked.
    pub(super) fn deliver(&self, in_flight: &InFlight, now: i64) {
        let cancels = self.registry().running_for_revoked();
        let queued = self.registry().oldest_queued();
        let records = in_turn(cancels, queued, &in_flight.0.lock().cancelled);
        for record in records {
            // with an external FRP server only an attempt shows whether the agent is connected
            if self.tunnel_open(&record.agent) == Some(false)
                || !in_flight.0.lock().busy.insert(record.agent.clone())
            {
                continue;
            }
            let (control_plane, in_flight) = (self.clone(), in_flight.clone());
            tokio::spawn(boxed(async move {
                let agent = record.agent.clone();
                let cancels = record.operation.state == OperationState::Running;
                let done = if cancels {
                    control_plane.cancel_at_agent(record, now).await
                } else {
                    control_plane.deliver_in_turn(record, now).await
                };
                if let Err(error) = done {
                    tracing::warn!(error = error.message, agent, "an operation is not delivered");
                }
                let mut turns = in_flight.0.lock();
                turns.busy.remove(&agent);
                if cancels {
                    turns.cancelled.insert(agent);
                } else {
                    turns.cancelled.remove(&agent);
                }
            }));
        }
    }

    /// Passes an operation to its agent, then those that wait behind it: an agent that comes back has
    /// more than one a second.
    async fn deliver_in_turn(
        &self,
        mut record: OperationRecord,
        now: i64,
    ) -> Result<(), HttpError> {
        for _ in 0..MAX_IN_TURN {
            if !self.registry().begin_delivery(&record) {
                break;
            }
            let done = self.deliver_one(record.clone(), now).await;
            self.registry().end_delivery(&record);
            done?;
            match self.registry().next_queued(&record.agent) {
                // the agent was not reached
                Some(next) if next.operation.id == record.operation.id => break,
                Some(next) => record = next,
                None => break,
            }
        }
        Ok(())
    }

    /// Cancels an operation with the rights of its caller. The agent reports its end as always.
    async fn cancel_at_agent(&self, record: OperationRecord, now: i64) -> Result<(), HttpError> {
        let registry = self.registry();
        let (Some(cluster), Some(access)) =
            (registry.cluster_of(&record.agent), registry.access_token(record.caller()))
        else {
            return Ok(());
        };
        let target = registry.target(&cluster, None)?;
        let caller = Principal::AccessToken(access.into());
        let id = &record.operation.id;
        let why = match self.call_operation(Method::DELETE, &caller, &target, id, now).await {
            Ok((StatusCode::NOT_FOUND, _)) => "the agent no longer knows it".to_owned(),
            Ok(_) => return Ok(()),
            Err(error) if error.code == TENANTS_UNSUPPORTED => error.message,
            Err(error) => return Err(error),
        };
        registry.end_operation(record, OperationState::Interrupted, &why, now).await
    }

    async fn deliver_one(&self, mut record: OperationRecord, now: i64) -> Result<(), HttpError> {
        let registry = self.registry();
        let principal = registry.resolve(record.caller(), record.limits.as_ref(), now);
        let cluster = registry.cluster_of(&record.agent);
        let within = |principal: &Principal, cluster: &str| match principal {
            Principal::AccessToken(access) => {
                registry.check_access(access, cluster).is_ok() && access.role >= Role::Deployer
            }
            _ => true,
        };
        let (Some(principal), Some(cluster)) = (principal, cluster) else {
            return registry
                .end_operation(
                    record,
                    OperationState::Failed,
                    "the caller may not do this any more",
                    now,
                )
                .await;
        };
        if !within(&principal, &cluster) {
            return registry
                .end_operation(
                    record,
                    OperationState::Failed,
                    "the caller may not do this any more",
                    now,
                )
                .await;
        }
        let target = registry.target(&cluster, None)?;
        let sealed = record.sealed.as_deref().and_then(|sealed| match record.limits {
            Some(_) => sealed.strip_prefix(LIMITED),
            None => Some(sealed),
        });
        let Some(body) = sealed.and_then(|sealed| self.keys().unseal(sealed).ok()) else {
            return registry
                .end_operation(
                    record,
                    OperationState::Failed,
                    "it was kept under other keys than this control plane's",
                    now,
                )
                .await;
        };
        let sent = self.submit_to_agent(&principal, &target, &record, body.expose(), now).await;
        let (status, value) = match sent {
            Ok(answer) => answer,
            // it would keep those behind it waiting until its time is over
            Err(error) if error.code == TENANTS_UNSUPPORTED => {
                let failed = OperationState::Failed;
                return registry.end_operation(record, failed, &error.message, now).await;
            }
            Err(_) => return Ok(()),
        };
        if status.is_success() {
            (record.operation, record.changed_at) = (parse_operation(value)?, now);
            record.forget_request();
            return registry.put_operation(record, now).await;
        }
        if matches!(status.as_u16(), 400 | 403 | 405 | 409 | 413 | 422) {
            // the agent's message may quote the request, and is shown to others than the caller
            let message =
                format!("the agent refuses it: {}", value["code"].as_str().unwrap_or("no code"));
            return registry.end_operation(record, OperationState::Failed, &message, now).await;
        }
        Ok(())
    }
}

/// The answer of an agent that accepts an operation.
fn parse_operation(value: Value) -> Result<Operation, HttpError> {
    serde_json::from_value(value).map_err(|_| {
        let message = "the agent's answer cannot be read";
        HttpError { lost: true, ..HttpError::new(502, "bad_answer", message, None) }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cancel_that_fails_does_not_keep_what_waits_from_its_agent() {
        let record = |agent: &str, id: &str| -> OperationRecord {
            serde_json::from_value(json!({"agent": agent, "operation": {"id": id}, "key": "k",
                "request": "", "sealed": null, "asked_ms": 0, "expires_at": 9, "changed_at": 0}))
            .unwrap()
        };
        let order = |cancelled: &[&str]| {
            let cancels = vec![record("a", "cancel-a"), record("b", "cancel-b")];
            let queued = vec![record("a", "waits-a"), record("c", "waits-c")];
            let cancelled = cancelled.iter().map(|agent| (*agent).to_owned()).collect();
            let ordered = in_turn(cancels, queued, &cancelled).into_iter();
            ordered.map(|record| record.operation.id).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(order(&[]), "cancel-a cancel-b waits-a waits-c");
        assert_eq!(order(&["a"]), "cancel-b waits-a waits-c cancel-a");
        assert_eq!(order(&["b"]), "cancel-a waits-a waits-c cancel-b");
    }
}
