//! Applications: a new revision is kept, applied and watched; a former one comes back in the same
//! way.

use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::apply::{Mode, Rollout, is_among, is_route};
use super::executor::Executor;
use super::job::{job_name, job_object, template};
use super::requests::{ExecutionError, ExecutionFailure, failed_for};
use crate::contract::application::Application;
use crate::contract::operation::{DeleteApplication, Deploy, ROLLBACK_S, Reference, Rollback};
use crate::kubernetes::application::revision::{
    Revision, RevisionState, former, last_that_ran, restored,
};
use crate::kubernetes::application::{self, ConfigSets};
use crate::kubernetes::readiness::condition;

/// How long a certificate is waited for after the rollout, seconds.
const CERTIFICATE_S: u64 = 20;

impl Rollout {
    /// Whole seconds, the one that has begun included.
    fn left_s(&self) -> u64 {
        let left = self.end.saturating_duration_since(Instant::now()).as_millis();
        u64::try_from(left.div_ceil(1000)).unwrap_or(u64::MAX)
    }
}

impl Executor<'_> {
    pub(super) async fn deploy(&mut self, deploy: &Deploy) -> Result<(), ExecutionError> {
        let application = &deploy.application;
        if self.is_over() {
            return self.look_at_revision(&application.namespace, &application.name).await;
        }
        self.check_host_of_tenant(application).await?;
        let sets = self.config_sets(application).await?;
        let defaults = self.host_defaults(application).await?;
        let mut rollout = Rollout {
            namespace: application.namespace.clone(),
            name: application.name.clone(),
            application: serde_json::to_value(application).unwrap_or_default(),
            objects: application::objects(application, &sets, &defaults),
            take_over: deploy.take_over,
            keep_claims: false,
            end: self.end(deploy.timeout_s),
            timeout_s: deploy.timeout_s,
        };
        let mode = if deploy.dry_run { Mode::DryRun } else { Mode::Check };
        self.apply_all(&rollout, &rollout.objects, mode).await?;
        if deploy.dry_run {
            return Ok(());
        }
        self.supersede(&rollout).await?;
        let revisions = self.revisions(&rollout.namespace, &rollout.name).await?;
        let mut revision = self.begin_revision(&rollout, &revisions, None).await?;
        // those of a former run of this operation, whatever was rotated since
        rollout.objects.clone_from(&revision.objects);
        let ended = revision.status.operation == self.progress.id;
        match revision.status.state {
            // the agent was restarted after it had seen the end
            RevisionState::Deployed if ended => {
                return self.settle(&rollout, &mut revision, revisions).await;
            }
            RevisionState::Failed if ended => {
                let message = revision.status.message.clone();
                let failure = ExecutionFailure { message, ..ExecutionFailure::default() };
                let end = Err(ExecutionError::Failed(failure));
                return self.end_failed(deploy, &rollout, &revisions, end).await;
            }
            _ => {}
        }
        if revision.status.state != RevisionState::Deployed {
            let before = self.before_the_rollout(application, &sets, &rollout).await;
            if let Err(end) = before {
                // nothing of it serves: there is nothing to bring back
                return self.fail_revision(&rollout, &mut revision, revisions, end).await;
            }
        }
        // a secret may have been rotated since
        let objects = rollout.objects;
        rollout.objects = self.with_current(&rollout.application, objects, false).await?;
        let end = match self.roll_out(&rollout, revision.number).await {
            Ok(()) => {
                self.settle(&rollout, &mut revision, revisions).await?;
                return match self.look_at_certificate(&rollout).await {
                    Err(ExecutionError::Failed(failure)) => {
                        self.note(&failure.message);
                        Ok(())
                    }
                    end => end,
                };
            }
            Err(end) => end,
        };
        let failed = self.fail_revision(&rollout, &mut revision, revisions.clone(), end).await;
        self.end_failed(deploy, &rollout, &revisions, failed).await
    }

    /// The end of a rollout that has failed: what ran before comes back where that was asked for.
    async fn end_failed(
        &mut self,
        deploy: &Deploy,
        rollout: &Rollout,
        revisions: &[Revision],
        failed: Result<(), ExecutionError>,
    ) -> Result<(), ExecutionError> {
        let others = revisions.iter().filter(|r| r.status.operation != self.progress.id);
        let others: Vec<Revision> = others.cloned().collect();
        match (failed, last_that_ran(&others)) {
            // what replaced ours is not undone
            (Err(ExecutionError::Failed(failure)), Some(back))
                if deploy.auto_rollback && failure.reason != "conflict" =>
            {
                self.bring_back(rollout, back, failure).await
            }
            (failed, _) => failed,
        }
    }

    pub(super) async fn rollback(&mut self, rollback: &Rollback) -> Result<(), ExecutionError> {
        let Rollback { namespace, name, .. } = rollback;
        if self.is_over() {
            return self.look_at_revision(namespace, name).await;
        }
        let revisions = self.revisions(namespace, name).await?;
        // one that a former run of this operation has kept
        let ours = revisions.iter().find(|r| r.status.operation == self.progress.id);
        let wanted = match (ours, rollback.revision) {
            (Some(ours), _) => Some(ours),
            (None, Some(number)) => revisions.iter().find(|r| r.number == number),
            (None, None) => self.former(&revisions, rollback.with_secrets).await?,
        };
        let Some(wanted) = wanted else {
            let mut kept: Vec<u32> = revisions.iter().map(|r| r.number).collect();
            kept.sort_unstable();
            let what = rollback.revision.map_or("no other revision has run".into(), |number| {
                format!("there is no revision {number}; those that are kept: {kept:?}")
            });
            return failed_for("no_revision", format!("{namespace}/{name}: {what}"));
        };
        let mut objects = restored(wanted);
        if ours.is_none() && !rollback.with_secrets {
            objects = self.with_current(&wanted.application, objects, true).await?;
        }
        let rollout = Rollout {
            namespace: namespace.clone(),
            name: name.clone(),
            application: wanted.application.clone(),
            objects,
            take_over: rollback.take_over,
            keep_claims: true,
            end: self.end(rollback.timeout_s),
            timeout_s: rollback.timeout_s,
        };
        self.apply_all(&rollout, &rollout.objects, Mode::Check).await?;
        self.supersede(&rollout).await?;
        let to = wanted.status.rollback_to.filter(|_| ours.is_some()).unwrap_or(wanted.number);
        let mut revision = self.begin_revision(&rollout, &revisions, Some(to)).await?;
        match self.roll_out(&rollout, revision.number).await {
            Ok(()) => self.settle(&rollout, &mut revision, revisions).await,
            Err(end) => self.fail_revision(&rollout, &mut revision, revisions, end).await,
        }
    }

    pub(super) async fn delete_application(
        &mut self,
        delete: &DeleteApplication,
    ) -> Result<(), ExecutionError> {
        let DeleteApplication { namespace, name, .. } = delete;
        let goes =
            |reference: &Reference| delete.volumes || reference.kind != "PersistentVolumeClaim";
        // what may not be deleted is found before anything is
        for (reference, found) in self.owned(namespace, name).await? {
            if goes(&reference) {
                self.delete_owned(&reference, &found, true).await?;
            }
        }
        let rollout = Rollout {
            namespace: namespace.clone(),
            name: name.clone(),
            application: Value::Null,
            objects: Vec::new(),
            take_over: false,
            keep_claims: !delete.volumes,
            end: self.end(delete.timeout_s),
            timeout_s: delete.timeout_s,
        };
        self.supersede(&rollout).await?;
        let mut going = Vec::new();
        for (reference, found) in self.owned(namespace, name).await? {
            if goes(&reference) {
                let path = self.delete_owned(&reference, &found, false).await?;
                going.push((reference, path));
            } else {
                self.progress.touched(&reference.title(), "kept");
            }
        }
        if going.is_empty() {
            self.progress.touched(&format!("Application {namespace}/{name}"), "absent");
        }
        self.wait_gone(going, rollout.end, rollout.timeout_s).await?;
        self.delete_revisions(namespace, name).await
    }

    /// Ends what else changes the application, once it is known that the caller may change it.
    async fn supersede(&self, rollout: &Rollout) -> Result<(), ExecutionError> {
        let Rollout { namespace, name, .. } = rollout;
        self.supersede_changes_of(&format!("{namespace}/{name}")).await
    }

    /// The same of what [`OperationRequest::application`] names.
    ///
    /// [`OperationRequest::application`]: crate::contract::operation::OperationRequest::application
    pub(super) async fn supersede_changes_of(&self, what: &str) -> Result<(), ExecutionError> {
        let operations = self.api.operations();
        operations.supersede(&self.progress.id, what);
        tokio::select! {
            () = operations.superseded_ended(&self.progress.id) => Ok(()),
            () = self.cancel.cancelled() => Err(ExecutionError::Cancelled),
            () = self.abort.cancelled() => Err(ExecutionError::Interrupted),
        }
    }

    /// The last revision that ran and was another one than the newest. With the secrets of today two
    /// may be the same.
    async fn former<'r>(
        &mut self,
        revisions: &'r [Revision],
        with_secrets: bool,
    ) -> Result<Option<&'r Revision>, ExecutionError> {
        let Some(newest) = revisions.iter().max_by_key(|r| r.number) else { return Ok(None) };
        let mut now = restored(newest);
        if !with_secrets {
            now = self.with_current(&newest.application, now, true).await?;
        }
        for candidate in former(revisions) {
            let mut then = restored(candidate);
            if !with_secrets {
                then = self.with_current(&candidate.application, then, true).await?;
            }
            if then != now {
                return Ok(Some(candidate));
            }
        }
        Ok(None)
    }

    /// The claims, which the command may need, and the command.
    async fn before_the_rollout(
        &mut self,
        application: &Application,
        sets: &ConfigSets,
        rollout: &Rollout,
    ) -> Result<(), ExecutionError> {
        let Some(job) = &application.pre_deploy else { return Ok(()) };
        let claims: Vec<Value> = rollout
            .objects
            .iter()
            .filter(|object| object["kind"] == "PersistentVolumeClaim")
            .cloned()
            .collect();
        self.apply_all(rollout, &claims, Mode::Write(0)).await?;
        let left = rollout.left_s().max(1);
        let timeout_s = job.timeout_s.map_or(left, |s| left.min(s.into()));
        let Application { namespace, name, .. } = application;
        let job_name = job_name(name, "pre", &self.progress.id);
        let template = template(application, sets, &job.command, &job.args);
        let spec = json!({"template": template});
        let object = job_object(namespace, name, &job_name, timeout_s, spec);
        self.run_job(&object, timeout_s).await
    }

    /// Applies all objects, and waits for them. The way in changes last where there is one.
    async fn roll_out(&mut self, rollout: &Rollout, number: u32) -> Result<(), ExecutionError> {
        if rollout.left_s() == 0 {
            return failed_for(
                "timed_out",
                format!("nothing was rolled out: the {} s are over", rollout.timeout_s),
            );
        }
        let has = |kind: &str| rollout.objects.iter().any(|object| object["kind"] == kind);
        let there = self.owned(&rollout.namespace, &rollout.name).await?;
        for (reference, found) in &there {
            // it would set the number of pods back
            if reference.kind == "HorizontalPodAutoscaler" && !has(&reference.kind) {
                self.delete_owned(reference, found, false).await?;
            }
        }
        let is_there = |object: &Value| {
            there.iter().any(|(reference, _)| is_among(reference, std::slice::from_ref(object)))
        };
        let (last, first): (Vec<Value>, Vec<Value>) =
            rollout.objects.iter().cloned().partition(|o| is_route(o) && is_there(o));
        let applied = self.apply_all(rollout, &first, Mode::Write(number)).await?;
        let waited: Vec<(Reference, String)> =
            applied.iter().map(|a| (a.reference.clone(), a.path.clone())).collect();
        self.wait_until(&waited, rollout.end, rollout.timeout_s).await?;
        for deployment in applied.iter().filter(|a| a.reference.kind == "Deployment") {
            let live = self.live(&deployment.reference, &deployment.path).await?;
            // a rotation meanwhile is the same template, with other versions
            let both = vec![live.unwrap_or_default(), deployment.object.clone()];
            let both = self.with_current(&rollout.application, both, false).await?;
            if !is_same_template(&both[0], &both[1]) {
                return failed_for(
                    "conflict",
                    format!(
                        "{}: another change replaced this revision while it was rolled out",
                        deployment.reference.title()
                    ),
                );
            }
        }
        self.apply_all(rollout, &last, Mode::Write(number)).await?;
        Ok(())
    }

    /// Puts a failed rollout back to what ran before; the operation has failed all the same. Its
    /// pods are those that still run: its images are not pinned, or they would be replaced.
    async fn bring_back(
        &mut self,
        failed: &Rollout,
        back: &Revision,
        mut failure: ExecutionFailure,
    ) -> Result<(), ExecutionError> {
        let number = back.number;
        self.progress
            .message(format!("{}; revision {number} is brought back", failure.message), "");
        let current = self.with_current(&back.application, back.objects.clone(), true).await;
        let rollout = Rollout {
            namespace: failed.namespace.clone(),
            name: failed.name.clone(),
            application: back.application.clone(),
            objects: current.unwrap_or_else(|_| back.objects.clone()),
            take_over: failed.take_over,
            keep_claims: true,
            end: Instant::now() + Duration::from_secs(ROLLBACK_S),
            timeout_s: ROLLBACK_S,
        };
        match self.roll_out(&rollout, number).await {
            Ok(()) => {
                self.progress.rolled_back(number);
                failure.message.push_str(&format!("; revision {number} runs again"));
                self.prune(&rollout).await;
            }
            Err(ExecutionError::Failed(again)) => {
                let message = format!("; revision {number} did not come back: {}", again.message);
                failure.message.push_str(&message);
            }
            Err(end) => return Err(end),
        }
        Err(ExecutionError::Failed(failure))
    }

    /// The rollout is complete, and nothing that follows makes a failure of it.
    async fn settle(
        &mut self,
        rollout: &Rollout,
        revision: &mut Revision,
        revisions: Vec<Revision>,
    ) -> Result<(), ExecutionError> {
        // to cancel it comes too late
        self.cancel = CancellationToken::new();
        self.prune(rollout).await;
        match self.finish_revision(rollout, revision, revisions).await {
            Err(ExecutionError::Failed(failure)) => self.note(&failure.message),
            end => end?,
        }
        Ok(())
    }

    /// Deletes what former revisions had besides; data outlives the revision that wrote it.
    async fn prune(&mut self, rollout: &Rollout) {
        let pruned = async {
            for (reference, found) in self.owned(&rollout.namespace, &rollout.name).await? {
                let kept = matches!(reference.kind.as_str(), "PersistentVolumeClaim" | "Job");
                if !kept && !is_among(&reference, &rollout.objects) {
                    self.delete_owned(&reference, &found, false).await?;
                }
            }
            Ok::<(), ExecutionError>(())
        };
        if let Err(ExecutionError::Failed(failure)) = pruned.await {
            self.note(&format!("a former object was not deleted: {}", failure.message));
        }
    }

    /// Says when a host still has no certificate.
    async fn look_at_certificate(&mut self, rollout: &Rollout) -> Result<(), ExecutionError> {
        let issued = |object: &&Value| {
            !object["metadata"]["annotations"]["cert-manager.io/cluster-issuer"].is_null()
        };
        let Some(ingress) = rollout.objects.iter().find(issued) else { return Ok(()) };
        let Some(name) = ingress.pointer("/spec/tls/0/secretName").and_then(Value::as_str) else {
            return Ok(());
        };
        let path = format!(
            "/apis/cert-manager.io/v1/namespaces/{}/certificates/{name}",
            rollout.namespace
        );
        let end = Instant::now() + Duration::from_secs(CERTIFICATE_S);
        loop {
            let (_, certificate) = self.read(&path, "").await?;
            let ready = condition(&certificate, "Ready");
            if ready.as_ref().is_some_and(|ready| ready.is_true()) {
                return Ok(());
            }
            if Instant::now() > end {
                let why = ready.map_or("cert-manager has not taken it up", |ready| ready.message);
                self.note(&format!("the certificate of the host is not there yet: {why}"));
                return Ok(());
            }
            self.pause().await?;
        }
    }
}

/// Whether the pods of two states of a Deployment are the same. A restart only leaves a mark on them.
fn is_same_template(one: &Value, other: &Value) -> bool {
    one["spec"]["template"]["spec"] == other["spec"]["template"]["spec"]
}
