//! The requests of an operation to Kubernetes: within the caller's namespaces, recorded, and
//! answered in full.

use std::time::Duration;

use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, header};
use http_body_util::{BodyExt as _, Limited};
use hyper::body::Bytes;
use serde_json::Value;
use tokio::time::{Instant, timeout};

use super::executor::Executor;
use crate::agent::api::audit::{AuditRecord, Phase};
use crate::agent::api::tenant_scope;
use crate::base::connection::Body;
use crate::base::text::printable;
use crate::contract::operation::{Reference, is_path_safe};
use crate::kubernetes::header_policy;
use crate::kubernetes::path::{self, KubernetesPath, PathError};
use crate::kubernetes::readiness::diagnosis::admission_cause;

/// Where a caller asks about its rights.
pub(super) const REVIEWS: &str = "/apis/authorization.k8s.io/v1/";
/// One request, and the largest answer to it.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);
const MAX_RESPONSE: usize = 8 << 20;
/// How long an API server that does not answer is asked again.
pub(super) const PATIENCE: Duration = Duration::from_secs(30);

/// Why an operation did not succeed.
pub(super) enum ExecutionError {
    Failed(ExecutionFailure),
    Cancelled,
    Interrupted,
}

/// Why an operation failed.
#[derive(Default)]
pub(super) struct ExecutionFailure {
    /// For people.
    pub(super) message: String,
    /// For programs: a stable code, empty where there is none.
    pub(super) reason: &'static str,
    /// The last lines of the container that failed.
    pub(super) log: Vec<String>,
}

pub(super) fn failed<T>(why: impl Into<String>) -> Result<T, ExecutionError> {
    failed_for("", why)
}

pub(super) fn failed_for<T>(
    reason: &'static str,
    why: impl Into<String>,
) -> Result<T, ExecutionError> {
    let failure = ExecutionFailure { message: why.into(), reason, ..ExecutionFailure::default() };
    Err(ExecutionError::Failed(failure))
}

/// A kind, as discovery names it.
#[derive(Clone)]
pub(super) struct ResourceKind {
    kind: String,
    plural: String,
    namespaced: bool,
}

/// A request to Kubernetes, without its path.
#[derive(Clone)]
pub(super) struct KubernetesRequest<'a> {
    pub(super) method: Method,
    pub(super) query: &'a str,
    pub(super) body: Option<(&'static str, &'a Value)>,
    /// With the agent's own rights instead of the caller's.
    pub(super) as_agent: bool,
    /// Of reads that repeat, only the first one is recorded.
    pub(super) recorded: bool,
}

pub(super) const GET: KubernetesRequest<'_> = KubernetesRequest {
    method: Method::GET,
    query: "",
    body: None,
    as_agent: false,
    recorded: true,
};
pub(super) const MERGE: &str = "application/merge-patch+json";

impl Executor<'_> {
    /// Sends one request as the caller, records it, and reads the answer whole.
    pub(super) async fn request(
        &mut self,
        path: &str,
        request: KubernetesRequest<'_>,
    ) -> Result<(u16, Value), ExecutionError> {
        // what is asked about a right changes nothing
        let changes = request.method != Method::GET && !path.starts_with(REVIEWS);
        if changes && self.before.left == Some(Duration::ZERO) {
            return self.look(path, request).await;
        }
        let (status, bytes) = self.request_bytes(path, request).await?;
        Ok((status, serde_json::from_slice(&bytes).unwrap_or_default()))
    }

    /// Instead of a change whose time was over when the agent was back: whether the object is as
    /// the change would have made it. Nothing is written.
    async fn look(
        &mut self,
        path: &str,
        change: KubernetesRequest<'_>,
    ) -> Result<(u16, Value), ExecutionError> {
        let (method, as_agent) = (change.method.clone(), change.as_agent);
        let query = format!("{}&dryRun=All", change.query);
        let wanted = match method {
            Method::PATCH => {
                let request = KubernetesRequest { query: query.trim_start_matches('&'), ..change };
                let (status, bytes) = self.request_bytes(path, request).await?;
                let object: Value = serde_json::from_slice(&bytes).unwrap_or_default();
                Some(object).filter(|_| status == 200)
            }
            _ => None,
        };
        let request = KubernetesRequest { as_agent, ..GET };
        let (status, bytes) = self.request_bytes(path, request).await?;
        let there: Value = serde_json::from_slice(&bytes).unwrap_or_default();
        let is_done = match (&method, status) {
            (&Method::DELETE, 404) => true,
            (_, 200) => wanted.is_some_and(|wanted| is_same(wanted, there.clone())),
            _ => false,
        };
        if is_done {
            return Ok((status, there));
        }
        failed_for(
            "timed_out",
            format!(
                "its time was over when the agent was back, and this was not done: {method} {path}"
            ),
        )
    }

    /// A request that may be sent again, until it is answered by more than "try again".
    pub(super) async fn request_until_answered(
        &mut self,
        path: &str,
        request: KubernetesRequest<'_>,
    ) -> Result<(u16, Value), ExecutionError> {
        let end = Instant::now() + PATIENCE;
        loop {
            let answer = self.request(path, request.clone()).await;
            let again = match &answer {
                // a webhook that does not answer is a fault of its own
                Ok((500, answer)) => !answer["message"].to_string().contains("webhook"),
                Ok((status, _)) => *status >= 500 || *status == 429,
                Err(ExecutionError::Failed(failure)) => failure.reason.is_empty(),
                Err(_) => false,
            };
            if !again || Instant::now() > end {
                return answer;
            }
            self.pause().await?;
        }
    }

    /// The same as `request` for an answer that is not JSON.
    pub(super) async fn request_bytes(
        &mut self,
        path: &str,
        request: KubernetesRequest<'_>,
    ) -> Result<(u16, Bytes), ExecutionError> {
        if self.abort.is_cancelled() {
            return Err(ExecutionError::Interrupted);
        }
        if self.cancel.is_cancelled() {
            return Err(ExecutionError::Cancelled);
        }
        // what the agent asks for itself is not the caller's: a typed request has decided on it
        let (path, namespace) = if request.as_agent {
            (path.to_owned(), None)
        } else {
            let target = self.check_scope(&request.method, path).await?;
            (target.path, target.namespace)
        };
        self.calls += 1;
        let id = format!("{}-{}", self.progress.id, self.calls);
        let mutating = request.method != Method::GET;
        let record = self.api.record(self.caller, &id, &request.method, &path);
        if mutating
            && self
                .api
                .write(AuditRecord {
                    phase: Phase::Start,
                    verdict: "allowed".into(),
                    ..record.clone()
                })
                .is_err()
        {
            return failed(
                "what changes something must be put on record, and the disk takes no record",
            );
        }
        let begun = Instant::now();
        let sent = request.body.map_or(0, |(_, body)| body.to_string().len() as u64);
        let recorded = request.recorded;
        let answer = timeout(REQUEST_TIMEOUT, self.send(&path, namespace.as_deref(), &id, request))
            .await
            .unwrap_or_else(|_| Err("no answer for 30 s".into()));
        if mutating || recorded {
            let (status, verdict, bytes) = match &answer {
                Ok((status, bytes)) => (*status, "allowed", bytes.len() as u64),
                Err(_) => (503, "kubernetes_unavailable", 0),
            };
            let phase = if mutating { Phase::End } else { Phase::Call };
            let duration_ms = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
            let _ = self.api.write(AuditRecord {
                phase,
                verdict: verdict.into(),
                status,
                duration_ms,
                bytes_in: sent,
                bytes_out: bytes,
                ..record
            });
        }
        match answer {
            Ok((401, _)) => failed(
                "the Kubernetes API refuses the agent's credential: a fresh one is minted within a \
                 minute",
            ),
            Ok(answer) => Ok(answer),
            // a machine that stops takes both down: that is no answer
            Err(_) if self.api.inner.context.drain.is_cancelled() => {
                Err(ExecutionError::Interrupted)
            }
            Err(why) => {
                tracing::debug!(why, "an operation's request");
                failed("the Kubernetes API does not answer")
            }
        }
    }

    async fn send(
        &self,
        path: &str,
        namespace: Option<&str>,
        id: &str,
        request: KubernetesRequest<'_>,
    ) -> Result<(u16, Bytes), String> {
        let text = |e: &dyn std::fmt::Display| e.to_string();
        let mut headers = if request.as_agent {
            HeaderMap::new()
        } else {
            header_policy::request_headers(&HeaderMap::new(), self.caller, namespace, id, None)
                .map_err(|(_, _, why)| why.to_owned())?
        };
        headers.insert(header::ACCEPT, HeaderValue::from_static("application/json"));
        headers.insert(
            HeaderName::from_static("audit-id"),
            HeaderValue::try_from(id).map_err(|e| text(&e))?,
        );
        if let Some((kind, _)) = request.body {
            headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
        }
        let body = request.body.map(|(_, body)| body.to_string()).unwrap_or_default();
        let mut outgoing = Request::new(Body::from(body));
        *outgoing.method_mut() = request.method;
        *outgoing.uri_mut() = if request.query.is_empty() {
            path.parse()
        } else {
            format!("{path}?{}", request.query).parse()
        }
        .map_err(|e| text(&e))?;
        *outgoing.headers_mut() = headers;
        let answer = self.upstream.send(outgoing, false).await.map_err(|e| text(&e))?;
        let status = answer.status().as_u16();
        let body =
            Limited::new(answer.into_body(), MAX_RESPONSE).collect().await.map_err(|e| text(&e))?;
        Ok((status, body.to_bytes()))
    }

    /// The path as it is sent, if it lies within the caller's namespaces and its tenant.
    async fn check_scope(
        &self,
        method: &Method,
        path: &str,
    ) -> Result<KubernetesPath, ExecutionError> {
        let target = match path::parse(path) {
            Ok(target) => target,
            Err(e) => return failed(e.to_string()),
        };
        if let Some(namespaces) = &self.caller.namespaces
            && target.check_namespaces(method, namespaces) == Err(PathError::Scope)
        {
            return failed_for(
                "namespace_scope",
                format!("namespace_scope: the token is for {}", namespaces.join(", ")),
            );
        }
        let Some(tenant) = &self.caller.tenant else { return Ok(target) };
        let checked = match target.tenant_namespace(method) {
            Ok(None) => Ok(()),
            Ok(Some(namespace)) => {
                tenant_scope::check(&self.upstream, tenant, namespace).await.map(drop)
            }
            Err(_) => Err(tenant_scope::outside(tenant)),
        };
        match checked {
            Ok(()) => Ok(target),
            Err(problem) if problem.status == 403 => {
                failed_for("namespace_scope", format!("namespace_scope: {}", problem.message))
            }
            // it is asked again, as is an API server that does not answer
            Err(problem) => failed(problem.message),
        }
    }

    /// The path of an object; none while its kind is not known.
    pub(super) async fn path_of(
        &mut self,
        reference: &Reference,
    ) -> Result<Option<String>, ExecutionError> {
        if !self.kinds.contains_key(&reference.api_version) {
            let (status, list) = self.request(&reference.base(), GET).await?;
            if status != 200 && status != 404 {
                return failed(format!(
                    "discovery of {}: {}",
                    reference.api_version,
                    describe_refusal("", status, &list)
                ));
            }
            let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
            let kinds = list["resources"].as_array().into_iter().flatten().map(|r| ResourceKind {
                kind: text(&r["kind"]),
                plural: text(&r["name"]),
                namespaced: r["namespaced"] == true,
            });
            // a subresource has the kind of its object
            let kinds: Vec<ResourceKind> = kinds.filter(|k| is_path_safe(&k.plural)).collect();
            self.kinds.insert(reference.api_version.clone(), kinds);
        }
        let kind = self
            .kinds
            .get(&reference.api_version)
            .and_then(|kinds| kinds.iter().find(|k| k.kind == reference.kind))
            .cloned();
        let Some(kind) = kind else {
            self.kinds.remove(&reference.api_version);
            return Ok(None);
        };
        let path = match (&reference.namespace, kind.namespaced) {
            (Some(namespace), true) => format!(
                "{}/namespaces/{namespace}/{}/{}",
                reference.base(),
                kind.plural,
                reference.name
            ),
            (None, false) => format!("{}/{}/{}", reference.base(), kind.plural, reference.name),
            (None, true) => return failed(format!("{} names no namespace", reference.title())),
            (Some(_), false) => {
                return failed(format!(
                    "{}: a {} is in no namespace",
                    reference.title(),
                    reference.kind
                ));
            }
        };
        self.check_scope(&Method::PATCH, &path).await?;
        Ok(Some(path))
    }

    pub(super) async fn known_path_of(
        &mut self,
        reference: &Reference,
    ) -> Result<String, ExecutionError> {
        match self.path_of(reference).await? {
            Some(path) => Ok(path),
            None => failed(format!(
                "this cluster has no {} in {}",
                reference.kind, reference.api_version
            )),
        }
    }
}

/// Whether two states of an object are the same but for what others note on it: its status, and
/// who manages which field.
fn is_same(mut one: Value, mut other: Value) -> bool {
    for object in [&mut one, &mut other] {
        if let Some(fields) = object.as_object_mut() {
            fields.remove("status");
        }
        if let Some(metadata) = object.get_mut("metadata").and_then(Value::as_object_mut) {
            metadata.remove("managedFields");
        }
    }
    one == other
}

/// The items of a list; none where the answer is none.
pub(super) fn items(mut list: Value) -> Vec<Value> {
    match list["items"].take() {
        Value::Array(items) => items,
        _ => Vec::new(),
    }
}

/// The failure of an operation on an object that Kubernetes refuses.
pub(super) fn refused<T>(
    reference: &Reference,
    status: u16,
    answer: &Value,
) -> Result<T, ExecutionError> {
    let why = describe_refusal(&reference.kind, status, answer);
    failed_for(refusal_reason(status, answer), format!("{}: {why}", reference.title()))
}

/// Whether it is refused because the namespace is being deleted: a 403 as one of a missing right is
/// (kubernetes/apiserver `pkg/admission/plugin/namespace/lifecycle/admission.go`).
fn is_terminating(answer: &Value) -> bool {
    let causes = answer["details"]["causes"].as_array().into_iter().flatten();
    causes.into_iter().any(|cause| cause["reason"] == "NamespaceTerminating")
}

/// The code of what Kubernetes refuses.
pub(super) fn refusal_reason(status: u16, answer: &Value) -> &'static str {
    if is_terminating(answer) {
        return "conflict";
    }
    let said = answer["message"].as_str().and_then(admission_cause);
    match (said, status) {
        (Some(cause), _) => cause.reason.code(),
        (None, 403) => "forbidden",
        (None, 404) => "not_found",
        (None, 409) => "conflict",
        (None, 400 | 422) => "invalid",
        (None, _) => "refused",
    }
}

/// What Kubernetes says is wrong, without what it may quote of a Secret.
pub(super) fn describe_refusal(kind: &str, status: u16, answer: &Value) -> String {
    let reason = answer["reason"].as_str().unwrap_or_default();
    let message = answer["message"].as_str().filter(|_| kind != "Secret").unwrap_or(reason);
    let text: String = printable(message).chars().take(500).collect();
    format!(
        "Kubernetes answers {status}: {}",
        if text.is_empty() { "no reason given" } else { &text }
    )
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_namespace_that_is_being_deleted_is_no_missing_right() {
        let refused = |reason: &str| {
            json!({"reason": "Forbidden", "message": "it is being terminated",
                "details": {"causes": [{"reason": reason}]}})
        };
        assert_eq!(refusal_reason(403, &refused("NamespaceTerminating")), "conflict");
        assert_eq!(refusal_reason(403, &refused("Other")), "forbidden");
        assert_eq!(refusal_reason(403, &json!({})), "forbidden");
    }

    #[test]
    fn a_state_is_the_same_whoever_manages_its_fields() {
        let object = |replicas: u8, manager: &str, ready: u8| {
            json!({"metadata": {"name": "w", "managedFields": [manager]},
                "spec": {"replicas": replicas}, "status": {"readyReplicas": ready}})
        };
        assert!(is_same(object(2, "a", 0), object(2, "b", 2)));
        assert!(!is_same(object(2, "a", 0), object(3, "a", 0)));
        assert!(is_same(json!({"spec": {}}), json!({"spec": {}, "status": {}})));
    }
}
