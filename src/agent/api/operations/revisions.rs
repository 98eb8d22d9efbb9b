//! The revisions of an application, as its caller keeps and reads them.

use std::collections::BTreeMap;

use http::Method;
use serde_json::Value;
use tokio_util::sync::CancellationToken;

use super::apply::{REVISION_ANNOTATION, Rollout, is_route, reference_of};
use super::executor::{Executor, FIELD_MANAGER};
use super::requests::{ExecutionError, GET, KubernetesRequest, MERGE, failed_for, items, refused};
use crate::contract::operation::Reference;
use crate::kubernetes::application::revision::{
    APPLICATION_LABEL, Revision, RevisionState, RevisionStatus, digest, expired, object_name,
};
use crate::kubernetes::readiness::diagnosis::{is_owned, newest_replica_set};
use crate::kubernetes::readiness::pods::is_ready;
use crate::kubernetes::readiness::rollout::{self, RolloutStatus};
use crate::kubernetes::readiness::workload::selector;

/// Tries to keep a revision while others keep theirs.
const NUMBER_TRIES: u32 = 5;

fn config_map(namespace: &str, name: &str) -> Reference {
    Reference {
        api_version: "v1".into(),
        kind: "ConfigMap".into(),
        name: name.into(),
        namespace: Some(namespace.into()),
    }
}

/// The revision that a Deployment was applied as.
fn number_of(deployment: &Value) -> Option<u32> {
    deployment["metadata"]["annotations"][REVISION_ANNOTATION].as_str()?.parse().ok()
}

impl Executor<'_> {
    /// All revisions of an application that are kept. A rollout that was complete only after its
    /// operation had ended counts.
    pub(super) async fn revisions(
        &mut self,
        namespace: &str,
        name: &str,
    ) -> Result<Vec<Revision>, ExecutionError> {
        let kept = self.revision_objects(namespace, name).await?;
        let parse = |object| Revision::parse(object, namespace, name);
        let mut all: Vec<Revision> = kept.iter().filter_map(parse).collect();
        let newest = all.iter_mut().max_by_key(|revision| revision.number);
        if let Some(newest) = newest
            && newest.status.state != RevisionState::Deployed
            && newest.status.operation != self.progress.id
        {
            let live = self.live_deployment(namespace, name).await?;
            if number_of(&live) == Some(newest.number)
                && rollout::status(&live) == RolloutStatus::Complete
            {
                newest.status.images = self.images(namespace, name).await?;
                self.mark(namespace, name, newest, RevisionState::Deployed).await?;
            }
        }
        Ok(all)
    }

    /// Instead of a change whose time was over when the agent was back: how it has ended.
    pub(super) async fn look_at_revision(
        &mut self,
        namespace: &str,
        name: &str,
    ) -> Result<(), ExecutionError> {
        let kept = self.revision_objects(namespace, name).await?;
        let parsed = kept.iter().filter_map(|object| Revision::parse(object, namespace, name));
        let mut ours = parsed.filter(|r| r.status.operation == self.progress.id);
        let Some(ours) = ours.next() else {
            return failed_for(
                "timed_out",
                "its time was over when the agent was back, and nothing of it was done",
            );
        };
        self.progress.revision(ours.number);
        let live = self.live_deployment(namespace, name).await?;
        if number_of(&live) == Some(ours.number)
            && rollout::status(&live) == RolloutStatus::Complete
        {
            // the way in changes last: nothing is written, it is only compared
            for object in ours.objects.iter().filter(|object| is_route(object)) {
                let reference = reference_of(object)?;
                let path = self.known_path_of(&reference).await?;
                self.apply_object(&reference, &path, object, false, false).await?;
            }
            return Ok(());
        }
        failed_for(
            "timed_out",
            format!(
                "its time was over when the agent was back, and revision {} was not complete",
                ours.number
            ),
        )
    }

    async fn revision_objects(
        &mut self,
        namespace: &str,
        name: &str,
    ) -> Result<Vec<Value>, ExecutionError> {
        let path = format!("/api/v1/namespaces/{namespace}/configmaps");
        match self.read(&path, &format!("labelSelector={APPLICATION_LABEL}={name}")).await? {
            (200, list) => Ok(items(list)),
            (status, answer) => {
                refused(&config_map(namespace, &object_name(name, 0)), status, &answer)
            }
        }
    }

    /// Null where there is none.
    async fn live_deployment(
        &mut self,
        namespace: &str,
        name: &str,
    ) -> Result<Value, ExecutionError> {
        let reference = Reference {
            api_version: "apps/v1".into(),
            kind: "Deployment".into(),
            name: name.into(),
            namespace: Some(namespace.into()),
        };
        let path = self.known_path_of(&reference).await?;
        Ok(self.live(&reference, &path).await?.unwrap_or_default())
    }

    /// The revision of this operation: the one that a former run of it kept, the newest if nothing
    /// differs from it, else a new one.
    pub(super) async fn begin_revision(
        &mut self,
        rollout: &Rollout,
        revisions: &[Revision],
        rollback_to: Option<u32>,
    ) -> Result<Revision, ExecutionError> {
        let Rollout { namespace, name, .. } = rollout;
        let newest = revisions.iter().max_by_key(|revision| revision.number);
        let ours = revisions.iter().find(|r| r.status.operation == self.progress.id);
        let same = newest.filter(|revision| {
            revision.status.state == RevisionState::Deployed
                && revision.objects == rollout.objects
                && revision.application == rollout.application
        });
        if let Some(known) = ours.or(same) {
            if ours.is_none() {
                self.note(&format!("nothing differs from revision {}", known.number));
            }
            self.progress.revision(known.number);
            return Ok(known.clone());
        }
        let mut revision = Revision {
            number: newest.map_or(1, |newest| newest.number + 1),
            status: RevisionStatus {
                operation: self.progress.id.clone(),
                subject: self.caller.subject.clone(),
                created_at: super::store::now(),
                rollback_to,
                ..RevisionStatus::default()
            },
            application: rollout.application.clone(),
            objects: rollout.objects.clone(),
        };
        let path = format!("/api/v1/namespaces/{namespace}/configmaps");
        let query = format!("fieldManager={FIELD_MANAGER}");
        for _ in 0..NUMBER_TRIES {
            let object = revision.config_map(namespace, name);
            let request = KubernetesRequest {
                method: Method::POST,
                query: &query,
                body: Some(("application/json", &object)),
                ..GET
            };
            let (status, answer) = self.request_until_answered(&path, request).await?;
            match status {
                201 => {
                    self.progress.revision(revision.number);
                    return Ok(revision);
                }
                // ours, whose answer was lost, or another agent has kept one under this number
                409 => {
                    let name = object_name(name, revision.number);
                    let (_, there) = self.read(&format!("{path}/{name}"), "").await?;
                    let there = Revision::parse(&there, namespace, &rollout.name);
                    if let Some(there) = there.filter(|r| r.status.operation == self.progress.id) {
                        self.progress.revision(there.number);
                        return Ok(there);
                    }
                    revision.number += 1;
                }
                _ => {
                    let name = object_name(name, revision.number);
                    return refused(&config_map(namespace, &name), status, &answer);
                }
            }
        }
        failed_for("conflict", "other revisions of this application are kept all the time")
    }

    /// The rollout is complete: notes which images run, and drops the oldest revisions.
    pub(super) async fn finish_revision(
        &mut self,
        rollout: &Rollout,
        revision: &mut Revision,
        revisions: Vec<Revision>,
    ) -> Result<(), ExecutionError> {
        revision.status.images = self.images(&rollout.namespace, &rollout.name).await?;
        self.mark(&rollout.namespace, &rollout.name, revision, RevisionState::Deployed).await?;
        self.drop_expired(rollout, revision, revisions).await
    }

    /// The rollout has failed with `end`, which stays what is told. A revision that ran before stays
    /// as it was.
    pub(super) async fn fail_revision(
        &mut self,
        rollout: &Rollout,
        revision: &mut Revision,
        revisions: Vec<Revision>,
        end: ExecutionError,
    ) -> Result<(), ExecutionError> {
        if matches!(end, ExecutionError::Interrupted) {
            return Err(end);
        }
        if let ExecutionError::Failed(failure) = &end {
            revision.status.message.clone_from(&failure.message);
        }
        // a cancelled one is marked too
        let cancel = std::mem::replace(&mut self.cancel, CancellationToken::new());
        let Rollout { namespace, name, .. } = rollout;
        if revision.status.state != RevisionState::Deployed
            && self.mark(namespace, name, revision, RevisionState::Failed).await.is_ok()
        {
            let _ = self.drop_expired(rollout, revision, revisions).await;
        }
        self.cancel = cancel;
        Err(end)
    }

    async fn drop_expired(
        &mut self,
        rollout: &Rollout,
        revision: &Revision,
        mut revisions: Vec<Revision>,
    ) -> Result<(), ExecutionError> {
        revisions.retain(|known| known.number != revision.number);
        revisions.push(revision.clone());
        for old in expired(&revisions) {
            let name = object_name(&rollout.name, old.number);
            self.delete_config_map(&rollout.namespace, &name).await?;
        }
        Ok(())
    }

    /// All revisions of an application, those of later versions of pipeops too.
    pub(super) async fn delete_revisions(
        &mut self,
        namespace: &str,
        name: &str,
    ) -> Result<(), ExecutionError> {
        for object in self.revision_objects(namespace, name).await? {
            let object = object["metadata"]["name"].as_str().unwrap_or_default().to_owned();
            if object.starts_with(&format!("{name}.revision-")) {
                self.delete_config_map(namespace, &object).await?;
            }
        }
        Ok(())
    }

    /// Digests of the images that run in the pods of the newest template, by container.
    async fn images(
        &mut self,
        namespace: &str,
        name: &str,
    ) -> Result<BTreeMap<String, String>, ExecutionError> {
        let mut images = BTreeMap::new();
        let live = self.live_deployment(namespace, name).await?;
        let Some(labels) = selector(&live) else { return Ok(images) };
        let query = format!("labelSelector={labels}&limit=100");
        let path = format!("/apis/apps/v1/namespaces/{namespace}/replicasets");
        let sets = items(self.read(&path, &query).await?.1);
        let path = format!("/api/v1/namespaces/{namespace}/pods");
        let pods = items(self.read(&path, &query).await?.1);
        let Some(newest) = newest_replica_set(&live, &sets) else { return Ok(images) };
        let runs = |pod: &&Value| {
            is_owned(pod, newest) && is_ready(pod) && pod["metadata"]["deletionTimestamp"].is_null()
        };
        for pod in pods.iter().filter(runs) {
            for status in pod["status"]["containerStatuses"].as_array().into_iter().flatten() {
                let wanted = pod["spec"]["containers"].as_array().into_iter().flatten();
                let image = wanted
                    .filter(|container| container["name"] == status["name"])
                    .find_map(|container| container["image"].as_str());
                let (name, id) = (status["name"].as_str(), status["imageID"].as_str());
                if let (Some(name), Some(image), Some(id)) = (name, image, id)
                    && let Some(digest) =
                        image.split_once('@').map_or(digest(image, id), |(_, d)| Some(d))
                {
                    images.insert(name.to_owned(), digest.to_owned());
                }
            }
        }
        Ok(images)
    }

    async fn mark(
        &mut self,
        namespace: &str,
        name: &str,
        revision: &mut Revision,
        state: RevisionState,
    ) -> Result<(), ExecutionError> {
        revision.status.state = state;
        let name = object_name(name, revision.number);
        let path = format!("/api/v1/namespaces/{namespace}/configmaps/{name}");
        let patch = revision.status_patch();
        let request = KubernetesRequest {
            method: Method::PATCH,
            query: &format!("fieldManager={FIELD_MANAGER}"),
            body: Some((MERGE, &patch)),
            ..GET
        };
        match self.request_until_answered(&path, request).await? {
            (200, _) => Ok(()),
            (status, answer) => refused(&config_map(namespace, &name), status, &answer),
        }
    }

    async fn delete_config_map(
        &mut self,
        namespace: &str,
        name: &str,
    ) -> Result<(), ExecutionError> {
        let path = format!("/api/v1/namespaces/{namespace}/configmaps/{name}");
        let request = KubernetesRequest { method: Method::DELETE, ..GET };
        match self.request_until_answered(&path, request).await? {
            (200 | 202 | 404, _) => Ok(()),
            (status, answer) => refused(&config_map(namespace, name), status, &answer),
        }
    }
}
