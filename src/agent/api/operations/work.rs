//! What each kind of operation does on Kubernetes: as its caller, one request after the other, until what was asked for stands.

use std::collections::HashMap;
use std::time::Duration;

use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, header};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Bytes;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::{Progress, said};
use crate::agent::api::Api;
use crate::agent::api::audit::{Phase, Record};
use crate::contract::operation::{Apply, Delete, Reference, Wanted, plain};
use crate::contract::token::Caller;
use crate::kubernetes::header_policy;
use crate::kubernetes::path::{Refusal, target};
use crate::kubernetes::upstream::Upstream;

/// Field manager of what Runners apply; it takes no field from another.
const MANAGER: &str = "pipeops-runner";
/// One request, and the largest answer to it.
const PATIENCE: Duration = Duration::from_secs(30);
const ANSWER: usize = 8 << 20;
/// Between looks at what is waited for.
const LOOK: Duration = Duration::from_secs(1);
/// How long a kind may take to be known after its definition was applied.
const DEFINED: Duration = Duration::from_secs(10);

/// What an operation came to when it did not succeed.
pub(super) enum End {
    Failed(String),
    Cancelled,
    Interrupted,
}

fn failed<T>(why: impl Into<String>) -> Result<T, End> {
    Err(End::Failed(why.into()))
}

/// Whether an object does what it is for.
#[derive(Debug, PartialEq, Eq)]
enum Ready {
    Yes,
    /// What is still missing.
    Not(String),
    Never(String),
}

/// As `kubectl rollout status` and `kubectl wait` judge (kubernetes/kubectl `pkg/polymorphichelpers/rollout_status.go`).
fn ready(object: &Value) -> Ready {
    let (spec, status) = (&object["spec"], &object["status"]);
    let number = |v: &Value| v.as_u64().unwrap_or(0);
    let condition = |kind: &str| {
        status["conditions"].as_array().into_iter().flatten().find(|c| c["type"] == kind)
    };
    let seen = object["metadata"]["generation"].is_null()
        || number(&status["observedGeneration"]) >= number(&object["metadata"]["generation"]);
    let counted = |done: u64, wanted: u64, what: &str| {
        if !seen {
            Ready::Not("its controller has not seen it yet".into())
        } else if done >= wanted {
            Ready::Yes
        } else {
            Ready::Not(format!("{done} of {wanted} {what}"))
        }
    };
    let replicas = spec["replicas"].as_u64().unwrap_or(1);
    match object["kind"].as_str().unwrap_or_default() {
        "Deployment" => {
            if seen
                && condition("Progressing")
                    .is_some_and(|c| c["reason"] == "ProgressDeadlineExceeded")
            {
                return Ready::Never(
                    "it made no progress within its progressDeadlineSeconds".into(),
                );
            }
            match counted(number(&status["updatedReplicas"]), replicas, "pods updated") {
                Ready::Yes if number(&status["replicas"]) > number(&status["updatedReplicas"]) => {
                    Ready::Not("former pods are still ending".into())
                }
                Ready::Yes => {
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
                Ready::Yes if rolling && status["updateRevision"] != status["currentRevision"] => {
                    counted(number(&status["updatedReplicas"]), replicas - kept, "pods updated")
                }
                judged => judged,
            }
        }
        "DaemonSet" => {
            let wanted = number(&status["desiredNumberScheduled"]);
            match counted(number(&status["updatedNumberScheduled"]), wanted, "pods updated") {
                Ready::Yes => counted(number(&status["numberAvailable"]), wanted, "pods available"),
                not => not,
            }
        }
        "Job" => {
            let is = |kind: &str| condition(kind).is_some_and(|c| c["status"] == "True");
            if is("Failed") {
                Ready::Never("the job failed".into())
            } else if is("Complete") {
                Ready::Yes
            } else {
                Ready::Not("the job runs".into())
            }
        }
        _ => Ready::Yes,
    }
}

/// A kind as discovery has it.
#[derive(Clone)]
struct Kind {
    kind: String,
    plural: String,
    namespaced: bool,
}

struct Work<'a> {
    api: &'a Api,
    upstream: Upstream,
    caller: &'a Caller,
    progress: &'a Progress,
    cancel: CancellationToken,
    cut: CancellationToken,
    calls: u32,
    /// By `apiVersion`.
    kinds: HashMap<String, Vec<Kind>>,
}

/// What a request to Kubernetes is, but for its path.
struct Ask<'a> {
    method: Method,
    query: &'a str,
    body: Option<(&'static str, &'a Value)>,
    /// With the agent's own rights instead of the caller's.
    own: bool,
    /// Looks that repeat are on record once.
    recorded: bool,
}

const GET: Ask<'_> = Ask { method: Method::GET, query: "", body: None, own: false, recorded: true };
const MERGE: &str = "application/merge-patch+json";

/// Carries out what was asked for.
pub(super) async fn run(
    wanted: &Wanted,
    api: &Api,
    upstream: Upstream,
    caller: &Caller,
    progress: &Progress,
    cancel: CancellationToken,
) -> Result<(), End> {
    let cut = api.inner.parts.cut.clone();
    let mut work =
        Work { api, upstream, caller, progress, cancel, cut, calls: 0, kinds: HashMap::new() };
    match wanted {
        Wanted::Apply(apply) => work.apply(apply).await,
        Wanted::Delete(delete) => work.delete(delete).await,
        Wanted::Scale(scale) => {
            let patch = json!({"spec": {"replicas": scale.replicas}});
            let path = work.patched(&scale.object, "/scale", &patch, "scaled").await?;
            work.until_ready(&[(scale.object.clone(), path)], scale.wait, scale.timeout_s).await
        }
        Wanted::Restart(restart) => {
            let at = jiff::Timestamp::now().to_string();
            let patch = json!({"spec": {"template": {"metadata": {"annotations": {"kubectl.kubernetes.io/restartedAt": at}}}}});
            let path = work.patched(&restart.object, "", &patch, "restarted").await?;
            work.until_ready(&[(restart.object.clone(), path)], restart.wait, restart.timeout_s)
                .await
        }
        Wanted::Cordon(node) => {
            work.cordon(&node.node, &json!({"spec": {"unschedulable": true}}), "cordoned").await
        }
        Wanted::Uncordon(node) => {
            work.cordon(&node.node, &json!({"spec": {"unschedulable": null}}), "uncordoned").await
        }
    }
}

impl Work<'_> {
    /// One request as the caller, on record, answered whole.
    async fn ask(&mut self, path: &str, ask: Ask<'_>) -> Result<(u16, Value), End> {
        if self.cut.is_cancelled() {
            return Err(End::Interrupted);
        }
        if self.cancel.is_cancelled() {
            return Err(End::Cancelled);
        }
        let path = self.allowed(&ask.method, path)?;
        self.calls += 1;
        let id = format!("{}-{}", self.progress.id, self.calls);
        let mutating = ask.method != Method::GET;
        let record = self.api.record(self.caller, &id, &ask.method, &path);
        if mutating
            && self
                .api
                .write(Record { phase: Phase::Start, verdict: "allowed".into(), ..record.clone() })
                .is_err()
        {
            return failed(
                "what changes something must be put on record, and the disk takes no record",
            );
        }
        let begun = Instant::now();
        let sent = ask.body.map_or(0, |(_, body)| body.to_string().len() as u64);
        let recorded = ask.recorded;
        let answer = timeout(PATIENCE, self.send(&path, &id, ask))
            .await
            .unwrap_or_else(|_| Err("no answer for 30 s".into()));
        if mutating || recorded {
            let (status, verdict, bytes) = match &answer {
                Ok((status, bytes)) => (*status, "allowed", bytes.len() as u64),
                Err(_) => (503, "kubernetes_unavailable", 0),
            };
            let phase = if mutating { Phase::End } else { Phase::Call };
            let duration_ms = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
            let _ = self.api.write(Record {
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

    async fn send(&self, path: &str, id: &str, ask: Ask<'_>) -> Result<(u16, Bytes), String> {
        let text = |e: &dyn std::fmt::Display| e.to_string();
        let mut headers = if ask.own {
            HeaderMap::new()
        } else {
            header_policy::outward(&HeaderMap::new(), self.caller, id, None)
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
            Limited::new(answer.into_body(), ANSWER).collect().await.map_err(|e| text(&e))?;
        Ok((status, body.to_bytes()))
    }

    /// The path as it is sent, if the caller's namespaces let it through.
    fn allowed(&self, method: &Method, path: &str) -> Result<String, End> {
        let target = target(path).map_err(|e| End::Failed(e.to_string()))?;
        match &self.caller.namespaces {
            Some(namespaces) if target.within(method, namespaces) == Err(Refusal::Scope) => {
                failed(format!("namespace_scope: the token is for {}", namespaces.join(", ")))
            }
            _ => Ok(target.path),
        }
    }

    /// Where an object is; none while its kind is not known.
    async fn path_of(&mut self, reference: &Reference) -> Result<Option<String>, End> {
        if !self.kinds.contains_key(&reference.api_version) {
            let (status, list) = self.ask(&reference.base(), GET).await?;
            if status != 200 && status != 404 {
                return failed(format!(
                    "discovery of {}: {}",
                    reference.api_version,
                    said("", status, &list)
                ));
            }
            let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
            let kinds = list["resources"].as_array().into_iter().flatten().map(|r| Kind {
                kind: text(&r["kind"]),
                plural: text(&r["name"]),
                namespaced: r["namespaced"] == true,
            });
            // a subresource has the kind of its object
            let kinds: Vec<Kind> = kinds.filter(|k| plain(&k.plural)).collect();
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
        self.allowed(&Method::PATCH, &path)?;
        Ok(Some(path))
    }

    async fn known_path_of(&mut self, reference: &Reference) -> Result<String, End> {
        match self.path_of(reference).await? {
            Some(path) => Ok(path),
            None => failed(format!(
                "this cluster has no {} in {}",
                reference.kind, reference.api_version
            )),
        }
    }

    async fn apply(&mut self, apply: &Apply) -> Result<(), End> {
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
                None => self.defined(&reference).await?,
            };
            let body = Some(("application/apply-patch+yaml", object));
            let (status, answer) =
                self.ask(&path, Ask { method: Method::PATCH, query: &query, body, ..GET }).await?;
            match status {
                200 => self.progress.touched(&reference.title(), "applied"),
                201 => self.progress.touched(&reference.title(), "created"),
                _ => {
                    return failed(format!(
                        "{}: {}",
                        reference.title(),
                        said(&reference.kind, status, &answer)
                    ));
                }
            }
            done.push((reference, path));
        }
        self.until_ready(&done, apply.wait && !apply.dry_run, apply.timeout_s).await
    }

    /// The path of an object whose kind was defined a moment ago.
    async fn defined(&mut self, reference: &Reference) -> Result<String, End> {
        let end = Instant::now() + DEFINED;
        loop {
            match self.path_of(reference).await? {
                Some(path) => return Ok(path),
                None if Instant::now() < end => self.pause().await?,
                None => return self.known_path_of(reference).await,
            }
        }
    }

    async fn delete(&mut self, delete: &Delete) -> Result<(), End> {
        let mut paths = Vec::new();
        for reference in &delete.objects {
            paths.push(self.known_path_of(reference).await?);
        }
        let body = json!({"propagationPolicy": "Background"});
        let mut going = Vec::new();
        for (reference, path) in delete.objects.iter().zip(paths) {
            let (status, answer) = self
                .ask(
                    &path,
                    Ask { method: Method::DELETE, body: Some(("application/json", &body)), ..GET },
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
                        said(&reference.kind, status, &answer)
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
                .look(&path, std::mem::take(&mut first))
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

    async fn patched(
        &mut self,
        reference: &Reference,
        below: &str,
        patch: &Value,
        outcome: &str,
    ) -> Result<String, End> {
        let path = self.known_path_of(reference).await?;
        let query = format!("fieldManager={MANAGER}");
        let (status, answer) = self
            .ask(
                &format!("{path}{below}"),
                Ask { method: Method::PATCH, query: &query, body: Some((MERGE, patch)), ..GET },
            )
            .await?;
        if status != 200 {
            return failed(format!(
                "{}: {}",
                reference.title(),
                said(&reference.kind, status, &answer)
            ));
        }
        self.progress.touched(&reference.title(), outcome);
        Ok(path)
    }

    async fn cordon(&mut self, node: &str, patch: &Value, outcome: &str) -> Result<(), End> {
        let query = format!("fieldManager={MANAGER}");
        let ask = Ask {
            method: Method::PATCH,
            query: &query,
            body: Some((MERGE, patch)),
            own: true,
            recorded: true,
        };
        let (status, answer) = self.ask(&format!("/api/v1/nodes/{node}"), ask).await?;
        if status != 200 {
            return failed(format!("Node {node}: {}", said("Node", status, &answer)));
        }
        self.progress.touched(&format!("Node {node}"), outcome);
        Ok(())
    }

    /// An object as it stands; none while the API server is away, which is waited out.
    async fn look(&mut self, path: &str, recorded: bool) -> Result<Option<(u16, Value)>, End> {
        match self.ask(path, Ask { recorded, ..GET }).await {
            Ok((status, _)) if status >= 500 || status == 429 => Ok(None),
            Ok(answer) => Ok(Some(answer)),
            Err(End::Failed(_)) => Ok(None),
            Err(end) => Err(end),
        }
    }

    async fn pause(&self) -> Result<(), End> {
        tokio::select! {
            () = sleep(LOOK) => Ok(()),
            () = self.cancel.cancelled() => Err(End::Cancelled),
            () = self.cut.cancelled() => Err(End::Interrupted),
        }
    }

    async fn until_ready(
        &mut self,
        objects: &[(Reference, String)],
        wait: bool,
        timeout_s: u64,
    ) -> Result<(), End> {
        let end = Instant::now() + Duration::from_secs(timeout_s);
        for (reference, path) in objects.iter().filter(|(r, _)| {
            wait && matches!(r.kind.as_str(), "Deployment" | "StatefulSet" | "DaemonSet" | "Job")
        }) {
            let (mut first, mut last) = (true, String::new());
            loop {
                let missing = match self.look(path, std::mem::take(&mut first)).await? {
                    Some((200, object)) => match ready(&object) {
                        Ready::Yes => break,
                        Ready::Not(why) => why,
                        Ready::Never(why) => {
                            return failed(format!("{}: {why}", reference.title()));
                        }
                    },
                    Some((status, answer)) => {
                        return failed(format!(
                            "{}: {}",
                            reference.title(),
                            said(&reference.kind, status, &answer)
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
        let missing = |object: &Value| match ready(object) {
            Ready::Not(why) | Ready::Never(why) => why,
            Ready::Yes => "ready".into(),
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
        assert!(matches!(ready(&stuck), Ready::Never(_)));
        let set = json!({"kind": "StatefulSet", "metadata": {"generation": 1}, "spec": {"replicas": 3, "updateStrategy": {"rollingUpdate": {"partition": 2}}},
            "status": {"observedGeneration": 1, "readyReplicas": 3, "updatedReplicas": 1, "currentRevision": "a", "updateRevision": "b"}});
        assert_eq!(ready(&set), Ready::Yes);
        let daemons = json!({"kind": "DaemonSet", "metadata": {"generation": 1}, "status": {"observedGeneration": 1, "desiredNumberScheduled": 2, "updatedNumberScheduled": 2, "numberAvailable": 1}});
        assert_eq!(missing(&daemons), "1 of 2 pods available");
        let job = |kind: &str| json!({"kind": "Job", "status": {"conditions": [{"type": kind, "status": "True"}]}});
        assert_eq!(ready(&job("Complete")), Ready::Yes);
        assert!(matches!(ready(&job("Failed")), Ready::Never(_)));
        assert!(matches!(ready(&json!({"kind": "Job"})), Ready::Not(_)));
        assert_eq!(ready(&json!({"kind": "ConfigMap"})), Ready::Yes);
    }
}
