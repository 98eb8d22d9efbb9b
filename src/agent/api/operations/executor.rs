//! What each kind of operation does on Kubernetes: as its caller, one request after the other,
//! until the objects have the state that was asked for.

use std::collections::HashMap;
use std::time::Duration;

use http::Method;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::nodes::refused_node;
use super::requests::{
    ExecutionError, ExecutionFailure, GET, KubernetesRequest, MERGE, ResourceKind, failed_for,
    refused,
};
use super::{Progress, Run};
use crate::agent::api::Api;
use crate::contract::config::ConfigKind;
use crate::contract::operation::{Apply, Delete, OperationRequest, Reference};
use crate::contract::token::Caller;
use crate::kubernetes::readiness::diagnosis::Cause;
use crate::kubernetes::readiness::rollout::{self, RolloutStatus};
use crate::kubernetes::tenant::what_keeps;
use crate::kubernetes::upstream::Upstream;

/// Field manager of what Runners apply; it takes no field from another one.
pub(super) const FIELD_MANAGER: &str = "pipeops-runner";
/// Between looks at an object that is waited for, after a while.
const POLL_INTERVAL: Duration = Duration::from_secs(1);
/// The first pause of an operation; each is twice as long as the one before, up to that interval.
/// Most of what an operation waits for is there within a fraction of a second.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// Between looks at the pods of a workload that is not ready, at first and later: each takes some
/// requests, and reads the events of the namespace.
const DIAGNOSIS_INTERVAL: Duration = Duration::from_secs(3);
const MAX_DIAGNOSIS_INTERVAL: Duration = Duration::from_secs(9);
/// Time for such a look; a longer one shows nothing.
const DIAGNOSIS_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a kind may take to be served after its definition was applied.
const DISCOVERY_TIMEOUT: Duration = Duration::from_secs(10);

pub(super) struct Executor<'a> {
    pub(super) api: &'a Api,
    pub(super) upstream: Upstream,
    pub(super) caller: &'a Caller,
    pub(super) progress: &'a Progress,
    /// The caller cancels the operation.
    pub(super) cancel: CancellationToken,
    /// The agent stops.
    pub(super) abort: CancellationToken,
    /// Requests sent so far.
    pub(super) calls: u32,
    /// By `apiVersion`.
    pub(super) kinds: HashMap<String, Vec<ResourceKind>>,
    /// Until the next look at what is waited for.
    next_pause: Duration,
    /// It has looked for what keeps a workload.
    pub(super) looked: bool,
    pub(super) before: Before,
    /// What is to be known of an operation that succeeded.
    notes: Vec<String>,
}

/// What an operation has behind it that is resumed; empty for one that begins.
#[derive(Default)]
pub(super) struct Before {
    /// What is left of its time; zero: nothing is changed any more.
    pub(super) left: Option<Duration>,
    /// Titles of the objects that were dealt with.
    pub(super) objects: Vec<String>,
}

/// Carries out what was asked for. What is to be known of its success comes with it.
pub(super) async fn run(
    run: Run,
    api: &Api,
    progress: &Progress,
) -> Result<String, ExecutionError> {
    let mut executor = Executor {
        api,
        upstream: run.upstream,
        caller: &run.caller,
        progress,
        cancel: run.cancel,
        abort: api.inner.context.abort.clone(),
        calls: 0,
        kinds: HashMap::new(),
        next_pause: FIRST_PAUSE,
        looked: false,
        before: run.before,
        notes: Vec::new(),
    };
    executor.carry_out(&run.requested).await?;
    Ok(executor.notes.join("; "))
}

impl Executor<'_> {
    async fn carry_out(&mut self, operation: &OperationRequest) -> Result<(), ExecutionError> {
        match operation {
            OperationRequest::Apply(apply) => self.apply(apply).await,
            OperationRequest::Delete(delete) => self.delete(delete).await,
            OperationRequest::Scale(scale) => {
                let patch = json!({"spec": {"replicas": scale.replicas}});
                let path = self.patch(&scale.object, "/scale", &patch, "scaled").await?;
                self.wait_ready(&[(scale.object.clone(), path)], scale.wait, scale.timeout_s).await
            }
            OperationRequest::Restart(restart) => {
                // the same value when it is resumed: the pods are recreated once
                let at = self.progress.created_at();
                let patch = json!({
                    "spec": {
                        "template": {
                            "metadata": {"annotations": {"kubectl.kubernetes.io/restartedAt": at}}
                        }
                    }
                });
                let path = self.patch(&restart.object, "", &patch, "restarted").await?;
                self.wait_ready(&[(restart.object.clone(), path)], restart.wait, restart.timeout_s)
                    .await
            }
            OperationRequest::Deploy(deploy) => self.deploy(deploy).await,
            OperationRequest::Rollback(rollback) => self.rollback(rollback).await,
            OperationRequest::DeleteApplication(delete) => self.delete_application(delete).await,
            OperationRequest::Job(job) => self.job(job).await,
            OperationRequest::CronJob(job) => self.cron_job(job).await,
            OperationRequest::Cordon(node) => {
                self.cordon(&node.node, &json!({"spec": {"unschedulable": true}}), "cordoned").await
            }
            OperationRequest::Uncordon(node) => {
                self.cordon(&node.node, &json!({"spec": {"unschedulable": null}}), "uncordoned")
                    .await
            }
            OperationRequest::Drain(drain) => self.drain(drain).await,
            OperationRequest::Remove(remove) => self.remove(remove).await,
            OperationRequest::Tenant(spec) => self.tenant(spec).await,
            OperationRequest::Secret(spec) => self.config(ConfigKind::Secret, spec).await,
            OperationRequest::ConfigMap(spec) => self.config(ConfigKind::ConfigMap, spec).await,
        }
    }

    /// Whether an object was dealt with before the agent was restarted. What others did to it since
    /// stays.
    pub(super) fn was_touched(&self, reference: &Reference) -> bool {
        self.before.objects.contains(&reference.title())
    }

    /// When it ends that something is waited for.
    pub(super) fn end(&self, timeout_s: u64) -> Instant {
        Instant::now() + self.before.left.unwrap_or(Duration::from_secs(timeout_s))
    }

    /// Its time was over when the agent was back: nothing is changed any more.
    pub(super) fn is_over(&self) -> bool {
        self.before.left == Some(Duration::ZERO)
    }

    /// For the end of an operation that succeeds.
    pub(super) fn note(&mut self, text: &str) {
        self.notes.push(text.to_owned());
    }

    async fn apply(&mut self, apply: &Apply) -> Result<(), ExecutionError> {
        let references: Vec<Reference> =
            apply.objects.iter().filter_map(|o| Reference::from_object(o).ok()).collect();
        let defines = references.iter().any(|r| r.kind == "CustomResourceDefinition");
        // what cannot be done is found before anything is changed
        let mut paths = Vec::new();
        for reference in &references {
            let path = if defines {
                self.path_of(reference).await?
            } else {
                Some(self.known_path_of(reference).await?)
            };
            paths.push(path);
        }
        let mut done = Vec::new();
        // two objects with one title cannot be told apart
        let titles: Vec<String> = references.iter().map(Reference::title).collect();
        let is_single = |title: &String| titles.iter().filter(|t| *t == title).count() == 1;
        for ((reference, object), path) in references.into_iter().zip(&apply.objects).zip(paths) {
            let path = match path {
                Some(path) => path,
                None => self.wait_for_kind(&reference).await?,
            };
            if self.was_touched(&reference) && is_single(&reference.title()) {
                done.push((reference, path));
                continue;
            }
            let (outcome, _) =
                self.apply_object(&reference, &path, object, false, apply.dry_run).await?;
            self.progress.touched(&reference.title(), outcome);
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
            if self.was_touched(reference) {
                going.push((reference.clone(), path));
                continue;
            }
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
                    going.push((reference.clone(), path));
                }
                404 => self.progress.touched(&reference.title(), "absent"),
                _ => {
                    return refused(reference, status, &answer);
                }
            }
        }
        if !delete.wait {
            return Ok(());
        }
        let end = self.end(delete.timeout_s);
        self.wait_gone(going, end, delete.timeout_s).await
    }

    /// Waits until objects that were deleted are gone.
    pub(super) async fn wait_gone(
        &mut self,
        going: Vec<(Reference, String)>,
        end: Instant,
        timeout_s: u64,
    ) -> Result<(), ExecutionError> {
        for (reference, path) in going {
            let mut first = true;
            loop {
                let object = match self.poll(&path, std::mem::take(&mut first)).await? {
                    Some((404, _)) => break,
                    Some((_, object)) => object,
                    None => Value::Null,
                };
                if Instant::now() > end {
                    let title = reference.title();
                    let why =
                        if reference.kind == "Namespace" { what_keeps(&object) } else { "".into() };
                    let message = format!("{title} is still there after {timeout_s} s{why}");
                    return failed_for("timed_out", message);
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
        if self.was_touched(reference) {
            return Ok(path);
        }
        let query = format!("fieldManager={FIELD_MANAGER}");
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
            return refused(reference, status, &answer);
        }
        self.progress.touched(&reference.title(), outcome);
        Ok(path)
    }

    pub(super) async fn cordon(
        &mut self,
        node: &str,
        patch: &Value,
        outcome: &str,
    ) -> Result<(), ExecutionError> {
        let query = format!("fieldManager={FIELD_MANAGER}");
        let request = KubernetesRequest {
            method: Method::PATCH,
            query: &query,
            body: Some((MERGE, patch)),
            as_agent: true,
            recorded: true,
        };
        let (status, answer) = self.request(&format!("/api/v1/nodes/{node}"), request).await?;
        if status != 200 {
            return refused_node(node, status, &answer);
        }
        self.progress.touched(&format!("Node {node}"), outcome);
        Ok(())
    }

    /// An object as it is now; none while the API server does not answer, which is waited for.
    pub(super) async fn poll(
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

    pub(super) async fn pause(&mut self) -> Result<(), ExecutionError> {
        let pause = self.next_pause;
        self.next_pause = (pause * 2).min(POLL_INTERVAL);
        tokio::select! {
            () = sleep(pause) => Ok(()),
            () = self.cancel.cancelled() => Err(ExecutionError::Cancelled),
            () = self.abort.cancelled() => Err(ExecutionError::Interrupted),
        }
    }

    pub(super) async fn wait_ready(
        &mut self,
        objects: &[(Reference, String)],
        wait: bool,
        timeout_s: u64,
    ) -> Result<(), ExecutionError> {
        if !wait {
            return Ok(());
        }
        let end = self.end(timeout_s);
        self.wait_until(objects, end, timeout_s).await
    }

    /// Waits until what was changed is complete, for `timeout_s` seconds that are over at `end`.
    pub(super) async fn wait_until(
        &mut self,
        objects: &[(Reference, String)],
        end: Instant,
        timeout_s: u64,
    ) -> Result<(), ExecutionError> {
        for (reference, path) in objects.iter().filter(|(r, _)| rollout::has_rollout(&r.kind)) {
            self.wait_for_rollout(reference, path, end, timeout_s).await?;
            self.progress.touched(&reference.title(), "ready");
        }
        Ok(())
    }

    /// Waits until a rollout is complete. What keeps it is told as soon as it can be seen; it ends
    /// the wait at once only where it can't heal.
    async fn wait_for_rollout(
        &mut self,
        reference: &Reference,
        path: &str,
        end: Instant,
        timeout_s: u64,
    ) -> Result<(), ExecutionError> {
        let title = reference.title();
        let (mut first, mut last) = (true, String::new());
        let since = super::store::now();
        let (mut looked, mut interval) = (Instant::now(), DIAGNOSIS_INTERVAL);
        let mut cause: Option<Cause> = None;
        loop {
            let (object, missing, over) = match self.poll(path, std::mem::take(&mut first)).await? {
                Some((200, object)) => match rollout::status(&object) {
                    RolloutStatus::Complete => return Ok(()),
                    RolloutStatus::InProgress(why) => (Some(object), why, None),
                    RolloutStatus::Failed(why) => {
                        let job = reference.kind == "Job";
                        let code = if job { "job_failed" } else { "progress_deadline" };
                        (Some(object), why, Some(code))
                    }
                },
                Some((status, answer)) => return refused(reference, status, &answer),
                None => {
                    cause = None;
                    (None, "the Kubernetes API does not answer".into(), None)
                }
            };
            let over = over.or((Instant::now() > end).then_some("timed_out"));
            if let Some(object) = &object
                && (over.is_some() || looked.elapsed() >= interval)
            {
                let look = self.diagnose(reference, object, &since);
                cause = timeout(DIAGNOSIS_TIMEOUT, look).await.unwrap_or(Ok(None))?;
                looked = Instant::now();
                interval = (interval * 2).min(MAX_DIAGNOSIS_INTERVAL);
            }
            let missing = match &cause {
                Some(cause) => format!("{missing}: {}", cause.message),
                None => missing,
            };
            let hopeless = cause.as_ref().is_some_and(|cause| cause.is_final);
            if let Some(code) = over.or(hopeless.then_some("")) {
                let message = match code {
                    "timed_out" => format!("{title} is not ready after {timeout_s} s: {missing}"),
                    _ => format!("{title}: {missing}"),
                };
                let reason = cause.as_ref().map_or(code, |cause| cause.reason.code());
                let read = self.last_lines(reference, cause.as_ref());
                let log = timeout(DIAGNOSIS_TIMEOUT, read).await.unwrap_or(Ok(Vec::new()))?;
                return Err(ExecutionError::Failed(ExecutionFailure { message, reason, log }));
            }
            if missing != last {
                let reason = cause.as_ref().map_or("", |cause| cause.reason.code());
                self.progress.message(format!("{title}: {missing}"), reason);
                last = missing;
            }
            self.pause().await?;
        }
    }
}
