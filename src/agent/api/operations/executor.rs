//! What each kind of operation does on Kubernetes: as its caller, one request after the other, until what was asked for stands.

use std::collections::HashMap;
use std::time::Duration;

use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, header};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Bytes;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::{Progress, describe_refusal};
use crate::agent::api::Api;
use crate::agent::api::audit::{AuditRecord, Phase};
use crate::contract::operation::{Apply, Delete, OperationRequest, Reference, is_path_safe};
use crate::contract::token::Caller;
use crate::kubernetes::header_policy;
use crate::kubernetes::path::{self, PathError};
use crate::kubernetes::upstream::Upstream;

/// Field manager of what Runners apply; it takes no field from another.
const MANAGER: &str = "pipeops-runner";
/// One request, and the largest answer to it.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);
const MAX_RESPONSE: usize = 8 << 20;
/// Between looks at what is waited for.
const POLL_INTERVAL: Duration = Duration::from_secs(1);
/// How long a kind may take to be known after its definition was applied.
const DISCOVERY_TIMEOUT: Duration = Duration::from_secs(10);

/// What an operation came to when it did not succeed.
pub(super) enum ExecutionError {
    Failed(String),
    Cancelled,
    Interrupted,
}

fn failed<T>(why: impl Into<String>) -> Result<T, ExecutionError> {
    Err(ExecutionError::Failed(why.into()))
}

/// Whether an object does what it is for.
#[derive(Debug, PartialEq, Eq)]
enum Readiness {
    Ready,
    /// What is still missing.
    NotYet(String),
    Never(String),
}

/// As `kubectl rollout status` and `kubectl wait` judge (kubernetes/kubectl `pkg/polymorphichelpers/rollout_status.go`).
fn readiness(object: &Value) -> Readiness {
    let (spec, status) = (&object["spec"], &object["status"]);
    let number = |v: &Value| v.as_u64().unwrap_or(0);
    let condition = |kind: &str| {
        status["conditions"].as_array().into_iter().flatten().find(|c| c["type"] == kind)
    };
    let seen = object["metadata"]["generation"].is_null()
        || number(&status["observedGeneration"]) >= number(&object["metadata"]["generation"]);
    let counted = |done: u64, wanted: u64, what: &str| {
        if !seen {
            Readiness::NotYet("its controller has not seen it yet".into())
        } else if done >= wanted {
            Readiness::Ready
        } else {
            Readiness::NotYet(format!("{done} of {wanted} {what}"))
        }
    };
    let replicas = spec["replicas"].as_u64().unwrap_or(1);
    match object["kind"].as_str().unwrap_or_default() {
        "Deployment" => {
            if seen
                && condition("Progressing")
                    .is_some_and(|c| c["reason"] == "ProgressDeadlineExceeded")
            {
                return Readiness::Never(
                    "it made no progress within its progressDeadlineSeconds".into(),
                );
            }
            match counted(number(&status["updatedReplicas"]), replicas, "pods updated") {
                Readiness::Ready
                    if number(&status["replicas"]) > number(&status["updatedReplicas"]) =>
                {
                    Readiness::NotYet("former pods are still ending".into())
                }
                Readiness::Ready => {
                    counted(number(&status["availableReplicas"]), replicas, "pods available")
                }
                not => not,
            }
        }
        "StatefulSet" => {
            // with another strategy its pods are renewed by hand
            let rolling = spec["updateStrategy"]["type"] != "OnDelete";
            let kept = number(&spec["updateStrategy"]["rollingUpdate"]["partition"]).min(replicas);
            match counted(number(&status["readyReplicas"]), replicas, "pods ready") {
                Readiness::Ready
                    if rolling && status["updateRevision"] != status["currentRevision"] =>
                {
                    counted(number(&status["updatedReplicas"]), replicas - kept, "pods updated")
                }
                judged => judged,
            }
        }
        "DaemonSet" => {
            let wanted = number(&status["desiredNumberScheduled"]);
            match counted(number(&status["updatedNumberScheduled"]), wanted, "pods updated") {
                Readiness::Ready => {
                    counted(number(&status["numberAvailable"]), wanted, "pods available")
                }
                not => not,
            }
        }
        "Job" => {
            let is = |kind: &str| condition(kind).is_some_and(|c| c["status"] == "True");
            if is("Failed") {
                Readiness::Never("the job failed".into())
            } else if is("Complete") {
                Readiness::Ready
            } else {
                Readiness::NotYet("the job runs".into())
            }
        }
        _ => Readiness::Ready,
    }
}

/// A kind as discovery has it.
#[derive(Clone)]
struct ResourceKind {
    kind: String,
    plural: String,
    namespaced: bool,
}

struct Executor<'a> {
    api: &'a Api,
    upstream: Upstream,
    caller: &'a Caller,
    progress: &'a Progress,
    cancel: CancellationToken,
    cut: CancellationToken,
    calls: u32,
    /// By `apiVersion`.
    kinds: HashMap<String, Vec<ResourceKind>>,
}

/// What a request to Kubernetes is, but for its path.
struct KubernetesRequest<'a> {
    method: Method,
    query: &'a str,
    body: Option<(&'static str, &'a Value)>,
    /// With the agent's own rights instead of the caller's.
    as_agent: bool,
    /// Looks that repeat are on record once.
    recorded: bool,
}

const GET: KubernetesRequest<'_> = KubernetesRequest {
    method: Method::GET,
    query: "",
    body: None,
    as_agent: false,
    recorded: true,
};
const MERGE: &str = "application/merge-patch+json";

/// Carries out what was asked for.
pub(super) async fn run(
    operation: &OperationRequest,
    api: &Api,
    upstream: Upstream,
    caller: &Caller,
    progress: &Progress,
    cancel: CancellationToken,
) -> Result<(), ExecutionError> {
    let cut = api.inner.context.cut.clone();
    let mut executor =
        Executor { api, upstream, caller, progress, cancel, cut, calls: 0, kinds: HashMap::new() };
    match operation {
        OperationRequest::Apply(apply) => executor.apply(apply).await,
        OperationRequest::Delete(delete) => executor.delete(delete).await,
        OperationRequest::Scale(scale) => {
            let patch = json!({"spec": {"replicas": scale.replicas}});
            let path = executor.patch(&scale.object, "/scale", &patch, "scaled").await?;
            executor.wait_ready(&[(scale.object.clone(), path)], scale.wait, scale.timeout_s).await
        }
        OperationRequest::Restart(restart) => {
            let at = jiff::Timestamp::now().to_string();
            let patch = json!({"spec": {"template": {"metadata": {"annotations": {"kubectl.kubernetes.io/restartedAt": at}}}}});
            let path = executor.patch(&restart.object, "", &patch, "restarted").await?;
            executor
                .wait_ready(&[(restart.object.clone(), path)], restart.wait, restart.timeout_s)
                .await
        }
        OperationRequest::Cordon(node) => {
            executor.cordon(&node.node, &json!({"spec": {"unschedulable": true}}), "cordoned").await
        }
        OperationRequest::Uncordon(node) => {
            executor
                .cordon(&node.node, &json!({"spec": {"unschedulable": null}}), "uncordoned")
                .await
        }
    }
}

impl Executor<'_> {
    /// One request as the caller, on record, answered whole.
    async fn request(
        &mut self,
        path: &str,
        ask: KubernetesRequest<'_>,
    ) -> Result<(u16, Value), ExecutionError> {
        if self.cut.is_cancelled() {
            return Err(ExecutionError::Interrupted);
        }
        if self.cancel.is_cancelled() {
            return Err(ExecutionError::Cancelled);
        }
        let path = self.check_namespaces(&ask.method, path)?;
        self.calls += 1;
        let id = format!("{}-{}", self.progress.id, self.calls);
        let mutating = ask.method != Method::GET;
        let record = self.api.record(self.caller, &id, &ask.method, &path);
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
        let sent = ask.body.map_or(0, |(_, body)| body.to_string().len() as u64);
        let recorded = ask.recorded;
        let answer = timeout(REQUEST_TIMEOUT, self.send(&path, &id, ask))
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
                "the Kubernetes API refuses the agent's credential: a fresh one is minted within a minute",
            ),
            Ok((status, bytes)) => Ok((status, serde_json::from_slice(&bytes).unwrap_or_default())),
            Err(why) => {
                tracing::debug!(why, "an operation's request");
                failed("the Kubernetes API does not answer")
            }
        }
    }

    async fn send(
        &self,
        path: &str,
        id: &str,
        ask: KubernetesRequest<'_>,
    ) -> Result<(u16, Bytes), String> {
        let text = |e: &dyn std::fmt::Display| e.to_string();
        let mut headers = if ask.as_agent {
            HeaderMap::new()
        } else {
            header_policy::request_headers(&HeaderMap::new(), self.caller, id, None)
                .map_err(|(_, _, why)| why.to_owned())?
        };
        headers.insert(header::ACCEPT, HeaderValue::from_static("application/json"));
        headers.insert(
            HeaderName::from_static("audit-id"),
            HeaderValue::try_from(id).map_err(|e| text(&e))?,
        );
        if let Some((kind, _)) = ask.body {
            headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
        }
        let body = ask.body.map(|(_, body)| body.to_string()).unwrap_or_default();
        let mut request = Request::new(
            Full::new(Bytes::from(body)).map_err(|never| match never {}).boxed_unsync(),
        );
        *request.method_mut() = ask.method;
        *request.uri_mut() = if ask.query.is_empty() {
            path.parse()
        } else {
            format!("{path}?{}", ask.query).parse()
        }
        .map_err(|e| text(&e))?;
        *request.headers_mut() = headers;
        let answer = self.upstream.send(request, false).await.map_err(|e| text(&e))?;
        let status = answer.status().as_u16();
        let body =
            Limited::new(answer.into_body(), MAX_RESPONSE).collect().await.map_err(|e| text(&e))?;
        Ok((status, body.to_bytes()))
    }

    /// The path as it is sent, if the caller's namespaces let it through.
    fn check_namespaces(&self, method: &Method, path: &str) -> Result<String, ExecutionError> {
        let target = path::parse(path).map_err(|e| ExecutionError::Failed(e.to_string()))?;
        match &self.caller.namespaces {
            Some(namespaces)
                if target.check_namespaces(method, namespaces) == Err(PathError::Scope) =>
            {
                failed(format!("namespace_scope: the token is for {}", namespaces.join(", ")))
            }
            _ => Ok(target.path),
        }
    }

    /// Where an object is; none while its kind is not known.
    async fn path_of(&mut self, reference: &Reference) -> Result<Option<String>, ExecutionError> {
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
        self.check_namespaces(&Method::PATCH, &path)?;
        Ok(Some(path))
    }

    async fn known_path_of(&mut self, reference: &Reference) -> Result<String, ExecutionError> {
        match self.path_of(reference).await? {
            Some(path) => Ok(path),
            None => failed(format!(
                "this cluster has no {} in {}",
                reference.kind, reference.api_version
            )),
        }
    }

    async fn apply(&mut self, apply: &Apply) -> Result<(), ExecutionError> {
        let references: Vec<Reference> =
            apply.objects.iter().filter_map(|o| Reference::of(o).ok()).collect();
        let defines = references.iter().any(|r| r.kind == "CustomResourceDefinition");
        // what cannot be done is found before anything is
        let mut paths = Vec::new();
        for reference in &references {
            let path = if defines {
                self.path_of(reference).await?
            } else {
                Some(self.known_path_of(reference).await?)
            };
            paths.push(path);
        }
        let query = format!(
            "fieldManager={MANAGER}&force=false{}",
            if apply.dry_run { "&dryRun=All" } else { "" }
        );
        let mut done = Vec::new();
        for ((reference, object), path) in references.into_iter().zip(&apply.objects).zip(paths) {
            let path = match path {
                Some(path) => path,
                None => self.wait_for_kind(&reference).await?,
            };
            let body = Some(("application/apply-patch+yaml", object));
            let (status, answer) = self
                .request(
                    &path,
                    KubernetesRequest { method: Method::PATCH, query: &query, body, ..GET },
                )
                .await?;
            match status {
                200 => self.progress.touched(&reference.title(), "applied"),
                201 => self.progress.touched(&reference.title(), "created"),
                _ => {
                    return failed(format!(
                        "{}: {}",
                        reference.title(),
                        describe_refusal(&reference.kind, status, &answer)
                    ));
                }
            }
            done.push((reference, path));
        }
        self.wait_ready(&done, apply.wait && !apply.dry_run, apply.timeout_s).await
    }

    /// The path of an object whose kind was defined a moment ago.
    async fn wait_for_kind(&mut self, reference: &Reference) -> Result<String, ExecutionError> {
        let end = Instant::now() + DISCOVERY_TIMEOUT;
        loop {
            match self.path_of(reference).await? {
                Some(path) => return Ok(path),
                None if Instant::now() < end => self.pause().await?,
                None => return self.known_path_of(reference).await,
            }
        }
    }

    async fn delete(&mut self, delete: &Delete) -> Result<(), ExecutionError> {
        let mut paths = Vec::new();
        for reference in &delete.objects {
            paths.push(self.known_path_of(reference).await?);
        }
        let body = json!({"propagationPolicy": "Background"});
        let mut going = Vec::new();
        for (reference, path) in delete.objects.iter().zip(paths) {
            let (status, answer) = self
                .request(
                    &path,
                    KubernetesRequest {
                        method: Method::DELETE,
                        body: Some(("application/json", &body)),
                        ..GET
                    },
                )
                .await?;
            match status {
                200 | 202 => {
                    self.progress.touched(&reference.title(), "deleted");
                    going.push((reference, path));
                }
                404 => self.progress.touched(&reference.title(), "absent"),
                _ => {
                    return failed(format!(
                        "{}: {}",
                        reference.title(),
                        describe_refusal(&reference.kind, status, &answer)
                    ));
                }
            }
        }
        if !delete.wait {
            return Ok(());
        }
        let end = Instant::now() + Duration::from_secs(delete.timeout_s);
        for (reference, path) in going {
            let mut first = true;
            while self
                .poll(&path, std::mem::take(&mut first))
                .await?
                .is_none_or(|(status, _)| status != 404)
            {
                if Instant::now() > end {
                    return failed(format!(
                        "{} is still there after {} s",
                        reference.title(),
                        delete.timeout_s
                    ));
                }
                self.pause().await?;
            }
            self.progress.touched(&reference.title(), "absent");
        }
        Ok(())
    }

    async fn patch(
        &mut self,
        reference: &Reference,
        below: &str,
        patch: &Value,
        outcome: &str,
    ) -> Result<String, ExecutionError> {
        let path = self.known_path_of(reference).await?;
        let query = format!("fieldManager={MANAGER}");
        let (status, answer) = self
            .request(
                &format!("{path}{below}"),
                KubernetesRequest {
                    method: Method::PATCH,
                    query: &query,
                    body: Some((MERGE, patch)),
                    ..GET
                },
            )
            .await?;
        if status != 200 {
            return failed(format!(
                "{}: {}",
                reference.title(),
                describe_refusal(&reference.kind, status, &answer)
            ));
        }
        self.progress.touched(&reference.title(), outcome);
        Ok(path)
    }

    async fn cordon(
        &mut self,
        node: &str,
        patch: &Value,
        outcome: &str,
    ) -> Result<(), ExecutionError> {
        let query = format!("fieldManager={MANAGER}");
        let ask = KubernetesRequest {
            method: Method::PATCH,
            query: &query,
            body: Some((MERGE, patch)),
            as_agent: true,
            recorded: true,
        };
        let (status, answer) = self.request(&format!("/api/v1/nodes/{node}"), ask).await?;
        if status != 200 {
            return failed(format!("Node {node}: {}", describe_refusal("Node", status, &answer)));
        }
        self.progress.touched(&format!("Node {node}"), outcome);
        Ok(())
    }

    /// An object as it stands; none while the API server is away, which is waited out.
    async fn poll(
        &mut self,
        path: &str,
        recorded: bool,
    ) -> Result<Option<(u16, Value)>, ExecutionError> {
        match self.request(path, KubernetesRequest { recorded, ..GET }).await {
            Ok((status, _)) if status >= 500 || status == 429 => Ok(None),
            Ok(answer) => Ok(Some(answer)),
            Err(ExecutionError::Failed(_)) => Ok(None),
            Err(end) => Err(end),
        }
    }

    async fn pause(&self) -> Result<(), ExecutionError> {
        tokio::select! {
            () = sleep(POLL_INTERVAL) => Ok(()),
            () = self.cancel.cancelled() => Err(ExecutionError::Cancelled),
            () = self.cut.cancelled() => Err(ExecutionError::Interrupted),
        }
    }

    async fn wait_ready(
        &mut self,
        objects: &[(Reference, String)],
        wait: bool,
        timeout_s: u64,
    ) -> Result<(), ExecutionError> {
        let end = Instant::now() + Duration::from_secs(timeout_s);
        for (reference, path) in objects.iter().filter(|(r, _)| {
            wait && matches!(r.kind.as_str(), "Deployment" | "StatefulSet" | "DaemonSet" | "Job")
        }) {
            let (mut first, mut last) = (true, String::new());
            loop {
                let missing = match self.poll(path, std::mem::take(&mut first)).await? {
                    Some((200, object)) => match readiness(&object) {
                        Readiness::Ready => break,
                        Readiness::NotYet(why) => why,
                        Readiness::Never(why) => {
                            return failed(format!("{}: {why}", reference.title()));
                        }
                    },
                    Some((status, answer)) => {
                        return failed(format!(
                            "{}: {}",
                            reference.title(),
                            describe_refusal(&reference.kind, status, &answer)
                        ));
                    }
                    None => "the Kubernetes API does not answer".into(),
                };
                if Instant::now() > end {
                    return failed(format!(
                        "{} is not ready after {timeout_s} s: {missing}",
                        reference.title()
                    ));
                }
                if missing != last {
                    self.progress.say(format!("{}: {missing}", reference.title()));
                    last = missing;
                }
                self.pause().await?;
            }
            self.progress.touched(&reference.title(), "ready");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_object_is_ready_when_kubectl_would_say_so() {
        let deployment = |status: Value| json!({"kind": "Deployment", "metadata": {"generation": 2}, "spec": {"replicas": 2}, "status": status});
        let missing = |object: &Value| match readiness(object) {
            Readiness::NotYet(why) | Readiness::Never(why) => why,
            Readiness::Ready => "ready".into(),
        };
        for (status, wanted) in [
            (json!({}), "not seen"),
            (
                json!({"observedGeneration": 1, "updatedReplicas": 2, "replicas": 2, "availableReplicas": 2}),
                "not seen",
            ),
            (
                json!({"observedGeneration": 2, "updatedReplicas": 1, "replicas": 2}),
                "1 of 2 pods updated",
            ),
            (
                json!({"observedGeneration": 2, "updatedReplicas": 2, "replicas": 3, "availableReplicas": 3}),
                "former pods",
            ),
            (
                json!({"observedGeneration": 2, "updatedReplicas": 2, "replicas": 2, "availableReplicas": 1}),
                "1 of 2 pods available",
            ),
            (
                json!({"observedGeneration": 2, "updatedReplicas": 2, "replicas": 2, "availableReplicas": 2}),
                "ready",
            ),
        ] {
            let said = missing(&deployment(status));
            assert!(said.contains(wanted), "{said}");
        }
        let stuck = deployment(
            json!({"observedGeneration": 2, "conditions": [{"type": "Progressing", "reason": "ProgressDeadlineExceeded"}]}),
        );
        assert!(matches!(readiness(&stuck), Readiness::Never(_)));
        let set = json!({"kind": "StatefulSet", "metadata": {"generation": 1}, "spec": {"replicas": 3, "updateStrategy": {"rollingUpdate": {"partition": 2}}},
            "status": {"observedGeneration": 1, "readyReplicas": 3, "updatedReplicas": 1, "currentRevision": "a", "updateRevision": "b"}});
        assert_eq!(readiness(&set), Readiness::Ready);
        let daemons = json!({"kind": "DaemonSet", "metadata": {"generation": 1}, "status": {"observedGeneration": 1, "desiredNumberScheduled": 2, "updatedNumberScheduled": 2, "numberAvailable": 1}});
        assert_eq!(missing(&daemons), "1 of 2 pods available");
        let job = |kind: &str| json!({"kind": "Job", "status": {"conditions": [{"type": kind, "status": "True"}]}});
        assert_eq!(readiness(&job("Complete")), Readiness::Ready);
        assert!(matches!(readiness(&job("Failed")), Readiness::Never(_)));
        assert!(matches!(readiness(&json!({"kind": "Job"})), Readiness::NotYet(_)));
        assert_eq!(readiness(&json!({"kind": "ConfigMap"})), Readiness::Ready);
    }
}
