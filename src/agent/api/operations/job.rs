//! A command that runs once, or by a schedule, in the surroundings of an application.

use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::apply::reference_of;
use super::diagnose::last_lines;
use super::executor::Executor;
use super::requests::{ExecutionError, GET, KubernetesRequest, failed_for};
use crate::base::json;
use crate::contract::application::Application;
use crate::contract::operation::{Reference, RunJob, SetCronJob};
use crate::kubernetes::application::revision::{APPLICATION_LABEL, last_that_ran, pinned};
use crate::kubernetes::application::{ConfigSets, job_template};

/// A finished Job and its log stay so long, seconds.
const KEPT_S: u32 = 86_400;
/// Time in which a container that is told to end does so, twice what Kubernetes gives it, seconds.
const GRACE_S: u64 = 60;

impl Executor<'_> {
    pub(super) async fn job(&mut self, wanted: &RunJob) -> Result<(), ExecutionError> {
        if let Some((reference, path)) = self.begun_job(wanted).await? {
            return self.watch_job(reference, path, wanted.timeout_s).await;
        }
        let (namespace, owner, spec) = if wanted.cronjob.is_empty() {
            let application = self.job_application(wanted).await?;
            let sets = self.config_sets(&application).await?;
            let template = template(&application, &sets, &wanted.command, &wanted.args);
            (application.namespace, application.name, json!({"template": template}))
        } else {
            let spec = self.cron_job_spec(wanted).await?;
            (wanted.namespace.clone(), wanted.cronjob.clone(), spec)
        };
        let name = job_name(&owner, "job", &self.progress.id);
        let object = job_object(&namespace, &owner, &name, wanted.timeout_s, spec);
        self.run_job(&object, wanted.timeout_s).await
    }

    /// Runs a Job to its end. One that a former run of this operation began goes on as it is.
    pub(super) async fn run_job(
        &mut self,
        object: &Value,
        timeout_s: u64,
    ) -> Result<(), ExecutionError> {
        let reference = reference_of(object)?;
        let path = self.known_path_of(&reference).await?;
        if self.live(&reference, &path).await?.is_none() {
            if self.is_over() {
                return failed_for(
                    "timed_out",
                    "its time was over when the agent was back, and it had not begun",
                );
            }
            if self.was_touched(&reference) {
                return failed_for(
                    "not_found",
                    format!(
                        "{} was deleted while the agent was away; it is not run again",
                        reference.title()
                    ),
                );
            }
            self.apply_object(&reference, &path, object, false, false).await?;
            self.progress.touched(&reference.title(), "created");
        }
        self.watch_job(reference, path, timeout_s).await
    }

    /// The Job that a former run of this operation began: what it was made of may be gone by now.
    async fn begun_job(
        &mut self,
        wanted: &RunJob,
    ) -> Result<Option<(Reference, String)>, ExecutionError> {
        let (namespace, owner) = match &wanted.application {
            Some(application) => (&application.namespace, &application.name),
            None if wanted.cronjob.is_empty() => (&wanted.namespace, &wanted.name),
            None => (&wanted.namespace, &wanted.cronjob),
        };
        let reference = Reference {
            api_version: "batch/v1".into(),
            kind: "Job".into(),
            name: job_name(owner, "job", &self.progress.id),
            namespace: Some(namespace.clone()),
        };
        let path = self.known_path_of(&reference).await?;
        Ok(self.live(&reference, &path).await?.map(|_| (reference, path)))
    }

    /// Waits for the end of a Job, and tells what came of it.
    async fn watch_job(
        &mut self,
        reference: Reference,
        path: String,
        timeout_s: u64,
    ) -> Result<(), ExecutionError> {
        // Kubernetes ends it at its own deadline, and says so; ours comes only after it
        let end = self.end(timeout_s) + Duration::from_secs(2 * GRACE_S);
        let ended = self.wait_until(&[(reference.clone(), path.clone())], end, timeout_s).await;
        match ended {
            Err(ExecutionError::Interrupted) => ended,
            Err(ExecutionError::Cancelled) => {
                // it would go on, and nobody would know
                self.cancel = CancellationToken::new();
                if let Some(found) = self.live(&reference, &path).await? {
                    let path = self.delete_owned(&reference, &found, false).await?;
                    let end = Instant::now() + Duration::from_secs(GRACE_S);
                    self.wait_gone(vec![(reference, path)], end, GRACE_S).await?;
                }
                Err(ExecutionError::Cancelled)
            }
            Ok(()) | Err(ExecutionError::Failed(_)) => {
                let namespace = reference.namespace.unwrap_or_default();
                self.job_result(&namespace, &reference.name, timeout_s).await?;
                ended
            }
        }
    }

    /// Sets what runs by a schedule.
    pub(super) async fn cron_job(&mut self, wanted: &SetCronJob) -> Result<(), ExecutionError> {
        let application = &wanted.application;
        let sets = self.config_sets(application).await?;
        let mut spec = json!({
            "schedule": wanted.schedule, "suspend": wanted.suspend,
            // one that takes long is not joined by the next
            "concurrencyPolicy": "Forbid",
            "jobTemplate": {"spec": {
                "backoffLimit": 0, "activeDeadlineSeconds": wanted.timeout_s + GRACE_S,
                "template": template(application, &sets, &wanted.command, &wanted.args)
            }}
        });
        spec["jobTemplate"]["spec"]["template"]["spec"]["activeDeadlineSeconds"] =
            wanted.timeout_s.into();
        if let Some(zone) = &wanted.time_zone {
            spec["timeZone"] = zone.as_str().into();
        }
        let Application { namespace, name, .. } = application;
        let object = json!({
            "apiVersion": "batch/v1", "kind": "CronJob",
            "metadata": {"name": name, "namespace": namespace, "labels": labels(name)},
            "spec": spec
        });
        let reference = reference_of(&object)?;
        let path = self.known_path_of(&reference).await?;
        let (outcome, _) = self.apply_object(&reference, &path, &object, false, false).await?;
        self.progress.touched(&reference.title(), outcome);
        Ok(())
    }

    /// What a CronJob would run, as `kubectl create job --from` takes it.
    async fn cron_job_spec(&mut self, wanted: &RunJob) -> Result<Value, ExecutionError> {
        let reference = Reference {
            api_version: "batch/v1".into(),
            kind: "CronJob".into(),
            name: wanted.cronjob.clone(),
            namespace: Some(wanted.namespace.clone()),
        };
        let path = self.known_path_of(&reference).await?;
        match self.live(&reference, &path).await? {
            Some(mut object) => Ok(object["spec"]["jobTemplate"]["spec"].take()),
            None => failed_for("not_found", format!("there is no {}", reference.title())),
        }
    }

    /// The application that a job belongs to: described, or deployed.
    async fn job_application(&mut self, wanted: &RunJob) -> Result<Application, ExecutionError> {
        if let Some(application) = &wanted.application {
            return Ok((**application).clone());
        }
        let (namespace, name) = (&wanted.namespace, &wanted.name);
        let revisions = self.revisions(namespace, name).await?;
        let Some(revision) = last_that_ran(&revisions) else {
            return failed_for(
                "no_revision",
                format!("no revision of application {namespace}/{name} has run"),
            );
        };
        let Ok(mut application) = json::fields::<Application>(revision.application.clone()) else {
            return failed_for(
                "invalid",
                format!(
                    "revision {} of {namespace}/{name} is of a later version of pipeops",
                    revision.number
                ),
            );
        };
        // the image that runs, whatever its tag means by now
        if let Some(digest) = revision.status.images.get(&application.name) {
            application.image = pinned(&application.image, digest);
        }
        Ok(application)
    }

    /// Exit code and last lines of the pod of a Job.
    async fn job_result(
        &mut self,
        namespace: &str,
        job: &str,
        timeout_s: u64,
    ) -> Result<(), ExecutionError> {
        let path = format!("/api/v1/namespaces/{namespace}/pods");
        let query = format!("labelSelector=batch.kubernetes.io/job-name={job}&limit=10");
        let (_, list) = self.read(&path, &query).await?;
        let Some(pod) = list["items"].as_array().and_then(|pods| pods.iter().max_by_key(made_at))
        else {
            return Ok(());
        };
        let name = pod["metadata"]["name"].as_str().unwrap_or_default();
        let path = format!("/api/v1/namespaces/{namespace}/pods/{name}/log");
        let query = "tailLines=20&limitBytes=65536";
        let (status, log) = self.request_bytes(&path, KubernetesRequest { query, ..GET }).await?;
        let text = String::from_utf8_lossy(&log);
        let lines = if status == 200 { last_lines(&text) } else { Vec::new() };
        let code = pod.pointer("/status/containerStatuses/0/state/terminated/exitCode");
        self.progress.exited(code.and_then(Value::as_i64), lines);
        if pod["status"]["reason"] == "DeadlineExceeded" {
            return failed_for("timed_out", format!("the command was ended after {timeout_s} s"));
        }
        Ok(())
    }
}

/// The last one counts, of a Job that is tried several times.
fn made_at(pod: &&Value) -> String {
    pod["metadata"]["creationTimestamp"].as_str().unwrap_or_default().to_owned()
}

/// Name of the Job of an operation: a second run of it finds what the first one began. A Job's name
/// is a label of its pods: 63 characters.
pub(super) fn job_name(owner: &str, what: &str, operation: &str) -> String {
    let owner: String = owner.chars().take(48).collect();
    let id: String = operation.trim_start_matches("o-").chars().take(10).collect();
    format!("{}-{what}-{id}", owner.trim_end_matches(['-', '.']))
}

fn labels(owner: &str) -> Value {
    json!({
        "app.kubernetes.io/name": owner,
        "app.kubernetes.io/managed-by": "pipeops", APPLICATION_LABEL: owner
    })
}

pub(super) fn template(
    application: &Application,
    sets: &ConfigSets,
    command: &[String],
    args: &[String],
) -> Value {
    job_template(application, &labels(&application.name), sets, command, args)
}

/// A Job that ends after `timeout_s`. The deadline is that of its pod, which stays, with its log; at
/// the Job's own one the pod would be deleted.
pub(super) fn job_object(
    namespace: &str,
    owner: &str,
    name: &str,
    timeout_s: u64,
    mut spec: Value,
) -> Value {
    if spec["backoffLimit"].is_null() {
        spec["backoffLimit"] = 0.into();
    }
    spec["ttlSecondsAfterFinished"] = KEPT_S.into();
    spec["activeDeadlineSeconds"] = (timeout_s + GRACE_S).into();
    spec["template"]["spec"]["activeDeadlineSeconds"] = timeout_s.into();
    json!({
        "apiVersion": "batch/v1", "kind": "Job",
        "metadata": {"name": name, "namespace": namespace, "labels": labels(owner)},
        "spec": spec
    })
}
