//! Operations that ran when the agent stopped: they go on as the same caller, once the Kubernetes
//! API is there.
//!
//! What was done before is not done again: each object that was dealt with is on disk. A change in
//! the moment between its answer and the disk is made twice, and is the same both times. Once the
//! time of an operation is over nothing more is changed: what others did since stays. One look
//! tells whether what was asked for is there.

use std::time::Duration;

use http::{Method, Request, Uri};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tokio::time::{sleep, timeout};

use super::executor::Before;
use super::store::{Progress, StoredOperation};
use super::{ExecutionFailure, Run};
use crate::agent::api::Api;
use crate::agent::api::permits::StreamClass;
use crate::base::connection::Body;
use crate::base::task::boxed;
use crate::contract::operation::OperationRequest;
use crate::contract::token::Caller;
use crate::contract::types::OperationState;
use crate::kubernetes::upstream::Upstream;

/// How often one operation is resumed: it may be what ends the agent.
pub(super) const MAX_RESUMPTIONS: u32 = 3;
/// Time beyond `timeout_s` for what the agent missed while it was away, seconds.
const GRACE_S: i64 = 30;
/// The least time that the Kubernetes API gets to answer: after a boot it starts with the agent.
const MIN_PATIENCE_S: i64 = 300;
/// Between looks at it, and the time for its answer.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
const LOOK_TIMEOUT: Duration = Duration::from_secs(5);

/// What it takes to go on with an operation.
#[derive(Clone, Serialize, Deserialize)]
pub(super) struct ResumePoint {
    /// The request as it came: never one with values of a Secret.
    body: String,
    caller: Caller,
    /// Seconds since 1970: what is not done by then is not done any more.
    deadline: i64,
    /// How often it was resumed.
    #[serde(default)]
    pub(super) attempts: u32,
}

/// The caller as it is on disk. A version before tenants does not read the tenant, and would go on
/// for all namespaces: for it, the caller has none.
fn stored_caller(caller: &Caller) -> Caller {
    let mut stored = caller.clone();
    if stored.tenant.is_some() && stored.namespaces.is_none() {
        stored.namespaces = Some(Vec::new());
    }
    stored
}

/// The caller that asked.
fn caller_of(mut stored: Caller) -> Caller {
    if stored.tenant.is_some() && stored.namespaces.as_ref().is_some_and(Vec::is_empty) {
        stored.namespaces = None;
    }
    stored
}

impl ResumePoint {
    /// Of a request that came at this moment; none if it may not stand on a disk.
    pub(super) fn of(
        requested: &OperationRequest,
        body: &[u8],
        caller: &Caller,
    ) -> Option<ResumePoint> {
        let timeout_s = requested.timeout_s() + requested.rollback_s();
        let timeout_s = i64::try_from(timeout_s).unwrap_or(i64::MAX);
        // one that reaches no namespace would reach all of its tenant's afterwards
        let is_readable = caller_of(caller.clone()) == *caller;
        (requested.is_resumable() && is_readable).then(|| ResumePoint {
            body: String::from_utf8_lossy(body).into_owned(),
            caller: stored_caller(caller),
            deadline: now_s().saturating_add(timeout_s).saturating_add(GRACE_S),
            attempts: 0,
        })
    }

    /// What is left of its time; zero when it is over.
    fn remaining(&self, now: i64) -> Duration {
        Duration::from_secs(u64::try_from(self.deadline.saturating_sub(now)).unwrap_or(0))
    }

    /// How long the Kubernetes API is waited for.
    fn patience(&self, now: i64) -> Duration {
        self.remaining(now.min(self.deadline.saturating_sub(MIN_PATIENCE_S)))
    }
}

fn now_s() -> i64 {
    Timestamp::now().as_second()
}

/// Whether the API server has started whole: before that it may refuse what it allows later.
async fn is_ready(upstream: &Upstream) -> bool {
    let mut request = Request::new(Body::empty());
    *request.uri_mut() = Uri::from_static("/readyz");
    let answer = timeout(LOOK_TIMEOUT, upstream.send(request, false)).await;
    matches!(answer, Ok(Ok(answer)) if answer.status() == 200)
}

impl Api {
    /// Goes on with what ran when the agent stopped.
    pub(in crate::agent::api) fn resume_running(&self) {
        let running: Vec<StoredOperation> = self
            .operations()
            .all
            .lock()
            .values()
            .filter(|live| !live.stored.operation.state.ended())
            .map(|live| live.stored.clone())
            .collect();
        for stored in running {
            tokio::spawn(boxed(self.clone().resume(stored)));
        }
    }

    async fn resume(self, stored: StoredOperation) {
        let id = stored.operation.id;
        let Some(mut point) = stored.resume else { return };
        point.caller = caller_of(point.caller);
        let cancel = self.operations().all.lock().get(&id).map(|live| live.cancel.clone());
        let Some(cancel) = cancel else { return };
        let end = |state, message: &str| {
            let failure = ExecutionFailure { message: message.into(), ..Default::default() };
            self.clone().end(id.clone(), state, failure)
        };
        let interrupted = OperationState::Interrupted;
        // the agent may be another version, or have been given less, than when it was accepted
        let requested = OperationRequest::parse(point.body.as_bytes(), &point.caller);
        let is_allowed = point.caller.role <= self.inner.context.max_role;
        let Some(requested) = requested.ok().filter(|_| is_allowed) else {
            let message = "the agent was restarted while it ran, and may not go on with it: the \
                           objects listed were changed before that";
            return end(interrupted, message).await;
        };
        self.operations().change(&id, |live| live.set_application(requested.application()));
        let upstream = tokio::select! {
            // on disk it still runs, for the next start
            () = self.inner.context.abort.cancelled() => return,
            () = cancel.cancelled() => {
                let failure = self.operations().why_cancelled(&id);
                return self.clone().end(id.clone(), OperationState::Cancelled, failure).await;
            }
            upstream = timeout(point.patience(now_s()), self.ready_upstream()) => upstream,
        };
        let Ok(upstream) = upstream else {
            let message = "the agent was restarted while it ran, and the Kubernetes API did not \
                           answer in its time: part of it may be done";
            return end(interrupted, message).await;
        };
        let record = self.record(&point.caller, &id, &Method::POST, "/api/v1/operations");
        let Ok(call) = self.begin_request(record, StreamClass::Short, true) else {
            let message = "the agent was restarted while it ran, and takes no more streams or \
                           records: part of it may be done";
            return end(interrupted, message).await;
        };
        self.operations().record(&id, |live| {
            if let Some(point) = &mut live.stored.resume {
                point.attempts += 1;
            }
        });
        let progress = Progress { api: self.clone(), id: id.clone() };
        progress.message("resumed after the agent was restarted".into(), "");
        let objects = stored.operation.objects.into_iter().map(|touched| touched.object);
        let before = Before { left: Some(point.remaining(now_s())), objects: objects.collect() };
        let run = Run { id, requested, upstream, caller: point.caller, cancel, before };
        self.clone().execute(run, call).await;
    }

    /// The way to the Kubernetes API, once it serves.
    async fn ready_upstream(&self) -> Upstream {
        let mut upstreams = self.inner.context.upstream.clone();
        loop {
            let upstream = match upstreams.wait_for(Option::is_some).await {
                Ok(upstream) => upstream.clone(),
                Err(_) => None,
            };
            if let Some(upstream) = upstream
                && is_ready(&upstream).await
            {
                return upstream;
            }
            sleep(LOOK_INTERVAL).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::contract::token::Role;

    #[test]
    fn a_point_holds_the_request_and_its_time() {
        let caller = Caller {
            subject: "r-1".into(),
            role: Role::Deployer,
            namespaces: Some(vec!["beta".into()]),
            tenant: Some("acme".into()),
            token_id: "t".into(),
            operation: None,
        };
        let point = |body: &str| {
            let requested = OperationRequest::parse(body.as_bytes(), &caller);
            let requested = requested.map_err(|(_, _, why)| why).unwrap();
            ResumePoint::of(&requested, body.as_bytes(), &caller)
        };
        let web = r#"{"apiVersion":"apps/v1","kind":"Deployment","name":"web","namespace":"beta"}"#;
        let body = format!(r#"{{"kind":"restart","spec":{{"object":{web},"timeout_s":100}}}}"#);
        let kept = serde_json::to_string(&point(&body).unwrap()).unwrap();
        let mut kept: ResumePoint = serde_json::from_str(&kept).unwrap();
        assert_eq!((&kept.body, &kept.caller, kept.attempts), (&body, &caller, 0));
        assert!((now_s() + 128..=now_s() + 130).contains(&kept.deadline));
        kept.deadline = 1000;
        for (now, left, patience) in
            [(900, 100, 300), (500, 500, 500), (1000, 0, 300), (9000, 0, 300)]
        {
            assert_eq!(kept.remaining(now).as_secs(), left, "{now}");
            assert_eq!(kept.patience(now).as_secs(), patience, "{now}");
        }
        let secret = concat!(
            r#"{"kind":"apply","spec":{"objects":[{"apiVersion":"v1","kind":"Secret","#,
            r#""metadata":{"name":"s","namespace":"beta"}}]}}"#
        );
        assert!(point(secret).is_none());
    }

    /// The caller as a version before tenants reads it.
    #[derive(Deserialize)]
    struct CallerBefore {
        namespaces: Option<Vec<String>>,
    }

    #[test]
    fn a_version_before_tenants_goes_on_in_no_namespace_and_this_one_as_before() {
        let web = r#"{"apiVersion":"apps/v1","kind":"Deployment","name":"web","namespace":"beta"}"#;
        let body = format!(r#"{{"kind":"restart","spec":{{"object":{web}}}}}"#);
        let body = body.as_bytes();
        let list = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect::<Vec<_>>();
        for (tenant, namespaces, before) in [
            (None, None, Some(None)),
            (None, Some(list(&["beta"])), Some(Some(list(&["beta"])))),
            (None, Some(list(&[])), Some(Some(list(&[])))),
            (Some("acme"), None, Some(Some(list(&[])))),
            (Some("acme"), Some(list(&["beta"])), Some(Some(list(&["beta"])))),
            // it reaches nothing, and does not go on as one that does
            (Some("acme"), Some(list(&[])), None),
        ] {
            let caller = Caller {
                subject: "r-1".into(),
                role: Role::Deployer,
                namespaces,
                tenant: tenant.map(String::from),
                token_id: "t".into(),
                operation: None,
            };
            let requested = OperationRequest::parse(body, &caller);
            let requested = requested.map_err(|(_, _, why)| why).unwrap();
            let point = ResumePoint::of(&requested, body, &caller);
            let kept = point.map(|point| serde_json::to_string(&point.caller).unwrap());
            let read = kept.as_ref().map(|kept| serde_json::from_str(kept).unwrap());
            let read = read.map(|read: CallerBefore| read.namespaces);
            assert_eq!(read, before, "{caller:?}");
            if let Some(kept) = kept {
                assert_eq!(caller_of(serde_json::from_str(&kept).unwrap()), caller);
            }
        }
    }
}
