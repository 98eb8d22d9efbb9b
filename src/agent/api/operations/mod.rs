//! Operations: a Runner asks once, and the agent carries it out and reports the result even when
//! the Runner, the tunnel or the control plane is gone in the meantime.
//!
//! An operation is on disk before it is accepted, and its result is on disk before it is reported.
//! While it runs the request is there too, so that it is resumed after a restart; one that holds
//! values of a Secret is not, and ends with the agent. Whose right to it has ended meanwhile has it
//! cancelled by the control plane, as without the restart.

mod apply;
mod config;
mod deploy;
mod diagnose;
mod events;
mod eviction;
mod executor;
mod hosts;
mod job;
mod nodes;
mod requests;
mod resume;
mod revisions;
mod sources;
mod store;
mod tenants;
mod users;

use std::borrow::Cow;
use std::time::Duration;

use http::request::Parts;
use http::{HeaderValue, Method, Response, header};
use http_body_util::{BodyExt as _, Limited};
use hyper::body::{Bytes, Incoming};
use serde_json::json;
use sha2::{Digest as _, Sha256};
use tokio::sync::oneshot;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::permits::StreamClass;
use super::{Api, AuditedRequest};
use crate::agent::session::client::FinishedOperation;
use crate::base::connection::Body;
use crate::base::encoding::hex;
use crate::base::order;
use crate::base::task::boxed;
use crate::contract::operation::OperationRequest;
use crate::contract::token::{Caller, Role, only_operation};
use crate::contract::types::{
    IDEMPOTENCY_KEY_HEADER, Operation, OperationState, check_idempotency_key, tenant_operation_id,
};
use crate::kubernetes::answer::{ApiError, plain};
use crate::kubernetes::upstream::Upstream;
use executor::Before;
use requests::{ExecutionError, ExecutionFailure};
use resume::ResumePoint;
pub use store::Operations;
use store::{Progress, RunningOperation, StoredOperation, TrackedOperation, check_room, now};

/// Largest request, and how long it may take to arrive.
const MAX_BODY: usize = 1 << 20;
const BODY_TIMEOUT: Duration = Duration::from_secs(15);
/// Between attempts to store or report a result.
const RETRY: Duration = Duration::from_secs(5);

/// An operation that is carried out.
struct Run {
    id: String,
    requested: OperationRequest,
    upstream: Upstream,
    caller: Caller,
    cancel: CancellationToken,
    before: Before,
}

fn operation_response(status: u16, operation: &Operation) -> Response<Body> {
    plain(status, "application/json", serde_json::to_string(operation).unwrap_or_default())
}

impl Api {
    pub(super) fn operations(&self) -> &Operations {
        &self.inner.context.operations
    }

    /// Reports the results that an earlier run of the agent could not report.
    pub(super) fn report_unreported(&self) {
        let unreported: Vec<StoredOperation> = self
            .operations()
            .all
            .lock()
            .values()
            .filter(|l| l.stored.operation.state.ended() && !l.stored.reported)
            .map(|l| l.stored.clone())
            .collect();
        for stored in unreported {
            tokio::spawn(boxed(self.clone().report(stored)));
        }
    }

    /// `/api/v1/operations` and what is below it. `rest` is empty, or begins with a slash.
    pub(super) async fn operation(
        &self,
        parts: &Parts,
        body: Incoming,
        caller: &Caller,
        rest: &str,
    ) -> Response<Body> {
        let mut segments = rest.split('/').skip(1);
        let (id, what, end) = (segments.next(), segments.next(), segments.next());
        match (&parts.method, id, what, end) {
            (&Method::POST, None, ..) => self.begin(parts, body, caller).await,
            (&Method::GET, None, ..) => {
                let all = self.operations().all.lock();
                let mut mine: Vec<Operation> = all
                    .values()
                    .map(|l| &l.stored)
                    .filter(|stored| may_see(caller, stored))
                    // one is asked for by its id with its log
                    .map(|s| Operation { log: Vec::new(), ..s.operation.clone() })
                    .collect();
                order::sort(&mut mine, |a, b| {
                    b.created_at.cmp(&a.created_at).then(a.id.cmp(&b.id))
                });
                plain(200, "application/json", json!({"items": mine}).to_string())
            }
            (&Method::GET, Some(id), None, _) => match self.find(caller, id) {
                Some(operation) => operation_response(200, &operation),
                None => not_found(),
            },
            (&Method::GET, Some(id), Some("events"), None) => match self.find(caller, id) {
                Some(_) => self.events(caller, id.to_owned(), &parts.headers),
                None => not_found(),
            },
            (&Method::DELETE, Some(id), None, _) => match self.find(caller, id) {
                Some(_) => {
                    // one that is cancelled does not come back with the agent
                    self.operations().record(id, |live| {
                        live.stored.resume = None;
                        live.cancel.cancel();
                    });
                    self.find(caller, id)
                        .map_or_else(not_found, |operation| operation_response(200, &operation))
                }
                None => not_found(),
            },
            (_, _, None | Some("events"), None) => {
                problem(405, "method_not_allowed", "this path takes another method", None)
            }
            _ => not_found(),
        }
    }

    fn find(&self, caller: &Caller, id: &str) -> Option<Operation> {
        self.operations()
            .all
            .lock()
            .get(id)
            .map(|l| &l.stored)
            .filter(|stored| may_see(caller, stored))
            .map(|stored| stored.operation.clone())
    }

    async fn begin(&self, parts: &Parts, body: Incoming, caller: &Caller) -> Response<Body> {
        if caller.role < Role::Deployer {
            return problem(403, "role_exceeded", "a viewer changes nothing", None);
        }
        if self.draining() {
            return problem(503, "draining", "the agent takes nothing new", None);
        }
        let mut keys =
            parts.headers.get_all(IDEMPOTENCY_KEY_HEADER).iter().map(HeaderValue::to_str);
        let key = match (keys.next(), keys.next()) {
            (Some(Ok(key)), None) => Some(key),
            _ => None,
        };
        let key = match check_idempotency_key(key) {
            Ok(key) => key,
            Err(why) => return problem(400, "idempotency_key_needed", why, None),
        };
        let bytes = match read_body(body).await {
            Ok(bytes) => bytes,
            Err(refused) => return *refused,
        };
        let id = tenant_operation_id(&caller.subject, caller.tenant.as_deref(), key);
        let request = hex(&Sha256::digest(&bytes));
        if caller.operation.as_ref().is_some_and(|only| *only != only_operation(&id, &request)) {
            return beyond_token().plain();
        }
        let known = self.operations().all.lock().get(&id).map(|l| l.stored.clone());
        if let Some(known) = known {
            return answer_repeated(&known, &request);
        }
        let requested = match OperationRequest::parse(&bytes, caller) {
            Ok(requested) => requested,
            Err((status, code, message)) => return problem(status, code, message, None),
        };
        let Some(upstream) = self.inner.context.upstream.borrow().clone() else {
            return problem(
                503,
                "kubernetes_waiting",
                "the agent has no way to the Kubernetes API at the moment",
                Some("the tunnel stays up; try again soon"),
            );
        };
        let call = match self.begin_request(
            self.record(caller, &id, &parts.method, "/api/v1/operations"),
            StreamClass::Short,
            true,
        ) {
            Ok(call) => call,
            Err(problem) => return problem.plain(),
        };
        let operation = Operation {
            id: id.clone(),
            kind: requested.kind().into(),
            subject: caller.subject.clone(),
            tenant: caller.tenant.clone(),
            created_at: now(),
            ..Operation::default()
        };
        let resume = ResumePoint::of(&requested, &bytes, caller);
        let stored = StoredOperation { operation, request, reported: false, resume };
        let cancel = match self.admit(&stored, requested.application()) {
            Ok(cancel) => cancel,
            Err(refused) => {
                let mut call = call;
                call.status(refused.status().as_u16(), "refused");
                return *refused;
            }
        };
        let (caller, before) = (caller.clone(), Before::default());
        let run = Run { id: id.clone(), requested, upstream, caller, cancel, before };
        tokio::spawn(boxed(self.clone().execute(run, call)));
        let mut answer = operation_response(202, &stored.operation);
        if let Ok(location) = HeaderValue::try_from(format!("/api/v1/operations/{id}")) {
            answer.headers_mut().insert(header::LOCATION, location);
        }
        answer
    }

    /// Stores a new operation: it is durable from here on.
    fn admit(
        &self,
        stored: &StoredOperation,
        application: Option<String>,
    ) -> Result<CancellationToken, Box<Response<Body>>> {
        let operations = self.operations();
        let mut all = operations.all.lock();
        operations.remove_expired(&mut all);
        let id = &stored.operation.id;
        if let Some(known) = all.get(id) {
            return Err(answer_repeated(&known.stored, &stored.request).into());
        }
        let running: Vec<RunningOperation<'_>> = all
            .values()
            .filter(|live| !live.stored.operation.state.ended())
            .map(|live| RunningOperation {
                tenant: live.stored.operation.tenant.as_deref(),
                is_of_application: live.changes_application(&application),
            })
            .collect();
        if let Err(full) = check_room(&running, stored.operation.tenant.as_deref()) {
            let hint = Some("wait for one of them to end");
            return Err(problem(429, "too_many_operations", full, hint).into());
        }
        if let Err(error) = operations.store(stored) {
            tracing::warn!(error = format!("{error:#}"), "an operation cannot be kept");
            return Err(problem(
                507,
                "disk_full",
                "the agent cannot write the operation down",
                Some("free space on the node"),
            )
            .into());
        }
        let live = TrackedOperation::new(stored.clone()).of_application(application);
        let cancel = live.cancel.clone();
        all.insert(id.clone(), live);
        Ok(cancel)
    }

    async fn execute(self, run: Run, mut call: AuditedRequest) {
        let id = run.id.clone();
        let progress = Progress { api: self.clone(), id: id.clone() };
        let end = executor::run(run, &self, &progress).await;
        let because =
            |message: &str| ExecutionFailure { message: message.into(), ..Default::default() };
        let is_resumable =
            || self.operations().all.lock().get(&id).is_some_and(|l| l.stored.resume.is_some());
        let (state, failure, status) = match end {
            Ok(note) => (OperationState::Succeeded, because(&note), 200),
            Err(ExecutionError::Failed(failure)) => (OperationState::Failed, failure, 422),
            Err(ExecutionError::Cancelled) => {
                (OperationState::Cancelled, self.operations().why_cancelled(&id), 499)
            }
            // it runs on disk, and goes on at the next start
            Err(ExecutionError::Interrupted) if is_resumable() => {
                return call.status(503, OperationState::Interrupted.name());
            }
            Err(ExecutionError::Interrupted) => {
                let message =
                    "the agent stopped while it ran; the objects listed were changed before that";
                (OperationState::Interrupted, because(message), 503)
            }
        };
        call.status(status, state.name());
        drop(call);
        self.end(id, state, failure).await;
    }

    /// Stores and reports the end of an operation.
    async fn end(self, id: String, state: OperationState, failure: ExecutionFailure) {
        let ended = self.operations().change(&id, |live| {
            live.stored.resume = None;
            let operation = &mut live.stored.operation;
            (operation.state, operation.finished_at) = (state, now());
            operation.message = failure.message;
            operation.reason = failure.reason.into();
            // a job has told its own
            if operation.log.is_empty() {
                operation.log = failure.log;
            }
        });
        let Some(ended) = ended else { return };
        loop {
            match self.operations().store(&ended) {
                Ok(()) => break,
                Err(error) => tracing::error!(
                    error = format!("{error:#}"),
                    id,
                    "the end of an operation cannot be written yet"
                ),
            }
            tokio::select! {
                () = sleep(RETRY) => {}
                // on disk it still runs: the next start deals with it
                () = self.inner.context.abort.cancelled() => return,
            }
        }
        self.report(ended).await;
    }

    /// Hands a result to the queue for the control plane, until it is there.
    async fn report(self, mut stored: StoredOperation) {
        let id = stored.operation.id.clone();
        loop {
            let Ok(body) = serde_json::to_string(&stored.operation) else { return };
            let (stored_tx, stored_rx) = oneshot::channel();
            if self
                .operations()
                .results
                .send(FinishedOperation { operation: id.clone(), body, stored: stored_tx })
                .await
                .is_err()
            {
                // the agent stops: its next start reports it
                return;
            }
            if stored_rx.await.is_ok() {
                break;
            }
            sleep(RETRY).await;
        }
        stored.reported = true;
        if let Err(error) = self.operations().store(&stored) {
            tracing::warn!(
                error = format!("{error:#}"),
                id,
                "a result that was reported will be reported again"
            );
        }
        self.operations().change(&id, |live| live.stored.reported = true);
    }
}

fn problem(
    status: u16,
    code: &'static str,
    message: impl Into<Cow<'static, str>>,
    hint: Option<&'static str>,
) -> Response<Body> {
    let problem = ApiError::new(status, code, message, hint);
    match status {
        429 => problem.retry_after_s(1).plain(),
        503 => problem.retry_after_s(5).plain(),
        _ => problem.plain(),
    }
}

/// The token of a job that a Runner brings itself is for the one operation of that job.
pub(super) fn beyond_token() -> ApiError {
    let message = "this token is for one operation, and this is not it";
    ApiError::new(403, "operation_exceeded", message, None)
}

/// A caller sees its own operations, with a token for namespaces those of them; an operator of the
/// whole cluster sees all. With a token of a tenant nothing is seen that was asked for without it.
fn may_see(caller: &Caller, stored: &StoredOperation) -> bool {
    let operation = &stored.operation;
    if caller.tenant.is_some() && operation.tenant != caller.tenant
        || !caller.may_touch(&operation.id)
    {
        return false;
    }
    let Some(own) = &caller.namespaces else {
        return operation.subject == caller.subject || caller.role >= Role::Operator;
    };
    // `Kind namespace/name`
    let is_inside = |object: &str| {
        let name = object.split_once(' ').and_then(|(_, name)| name.split_once('/'));
        name.is_some_and(|(namespace, _)| own.iter().any(|n| n == namespace))
    };
    operation.subject == caller.subject && operation.objects.iter().all(|o| is_inside(&o.object))
}

fn not_found() -> Response<Body> {
    problem(404, "not_found", "there is no such operation", None)
}

/// Answers a second request under a key: the same one, or another one by mistake.
fn answer_repeated(known: &StoredOperation, request: &str) -> Response<Body> {
    if known.request == request {
        return operation_response(200, &known.operation);
    }
    problem(
        409,
        "idempotency_mismatch",
        "this Idempotency-Key was used for something else",
        Some("use a fresh key for each thing that is asked for"),
    )
}

/// The request, within its limits of size and time.
async fn read_body(body: Incoming) -> Result<Bytes, Box<Response<Body>>> {
    let closed = "the connection closed while the body was read";
    let refused = match timeout(BODY_TIMEOUT, Limited::new(body, MAX_BODY).collect()).await {
        Ok(Ok(body)) => return Ok(body.to_bytes()),
        Ok(Err(e)) if e.is::<http_body_util::LengthLimitError>() => {
            problem(413, "too_large", "an operation is larger than 1 MiB", None)
        }
        Ok(Err(_)) => problem(400, "bad_body", closed, None),
        Err(_) => problem(408, "too_slow", "the body took longer than 15 s", None),
    };
    Err(Box::new(refused))
}
