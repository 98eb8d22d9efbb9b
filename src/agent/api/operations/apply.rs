//! The objects of an application: checked against what is there, applied, found again, deleted.

use http::Method;
use serde_json::{Value, json};
use tokio::time::Instant;

use super::executor::{Executor, FIELD_MANAGER};
use super::requests::{
    ExecutionError, GET, KubernetesRequest, MERGE, PATIENCE, failed_for, items, refused,
};
use crate::contract::operation::Reference;
use crate::kubernetes::application::ownership::applied;
use crate::kubernetes::application::revision::APPLICATION_LABEL;

/// On the Deployment, not on its pods: they would be replaced for it.
pub(super) const REVISION_ANNOTATION: &str = "pipeops.io/revision";
/// Managers that set the number of pods for an autoscaler; k3s is one program.
const AUTOSCALERS: [&str; 2] = ["kube-controller-manager", "k3s"];

/// Kinds that an application may consist of: `apiVersion`, kind, plural.
const KINDS: &[(&str, &str, &str)] = &[
    ("networking.k8s.io/v1", "Ingress", "ingresses"),
    ("gateway.networking.k8s.io/v1", "HTTPRoute", "httproutes"),
    ("v1", "Service", "services"),
    ("autoscaling/v2", "HorizontalPodAutoscaler", "horizontalpodautoscalers"),
    ("policy/v1", "PodDisruptionBudget", "poddisruptionbudgets"),
    ("apps/v1", "Deployment", "deployments"),
    ("batch/v1", "Job", "jobs"),
    ("v1", "PersistentVolumeClaim", "persistentvolumeclaims"),
];

/// What an apply is for.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Mode {
    /// To find what Kubernetes refuses, before anything is changed.
    Check,
    /// To tell what would change.
    DryRun,
    /// As this revision.
    Write(u32),
}

/// What is applied, and until when it is watched.
pub(super) struct Rollout {
    pub(super) namespace: String,
    pub(super) name: String,
    /// The application as it was described.
    pub(super) application: Value,
    pub(super) objects: Vec<Value>,
    pub(super) take_over: bool,
    /// Claims that are there stay as they are: one that has grown can't shrink.
    pub(super) keep_claims: bool,
    pub(super) end: Instant,
    pub(super) timeout_s: u64,
}

/// An object after its apply.
pub(super) struct Applied {
    pub(super) reference: Reference,
    pub(super) path: String,
    /// As Kubernetes answered it.
    pub(super) object: Value,
}

pub(super) fn reference_of(object: &Value) -> Result<Reference, ExecutionError> {
    match Reference::from_object(object) {
        Ok(reference) => Ok(reference),
        Err(why) => failed_for("invalid", why),
    }
}

/// Whether one of `objects` is meant.
pub(super) fn is_among(reference: &Reference, objects: &[Value]) -> bool {
    objects.iter().any(|object| {
        object["kind"] == reference.kind.as_str()
            && object["metadata"]["name"] == reference.name.as_str()
    })
}

/// The way in, which leads to the new pods only once they are there.
pub(super) fn is_route(object: &Value) -> bool {
    matches!(object["kind"].as_str(), Some("Service" | "Ingress" | "HTTPRoute"))
}

impl Executor<'_> {
    /// A read that waits while the API server does not answer.
    pub(super) async fn read(
        &mut self,
        path: &str,
        query: &str,
    ) -> Result<(u16, Value), ExecutionError> {
        self.request_until_answered(path, KubernetesRequest { query, ..GET }).await
    }

    /// An object as it is; none where there is none.
    pub(super) async fn live(
        &mut self,
        reference: &Reference,
        path: &str,
    ) -> Result<Option<Value>, ExecutionError> {
        match self.read(path, "").await? {
            (200, object) => Ok(Some(object)),
            (404, _) => Ok(None),
            (status, answer) => refused(reference, status, &answer),
        }
    }

    /// Server-side apply of objects of an application, in their order.
    pub(super) async fn apply_all(
        &mut self,
        rollout: &Rollout,
        objects: &[Value],
        mode: Mode,
    ) -> Result<Vec<Applied>, ExecutionError> {
        let mut done = Vec::new();
        for object in objects {
            let reference = reference_of(object)?;
            let path = self.known_path_of(&reference).await?;
            let mut live = self.live(&reference, &path).await?;
            if let (Some(found), Mode::Write(_)) = (&live, mode)
                && !found["metadata"]["deletionTimestamp"].is_null()
            {
                let going = vec![(reference.clone(), path.clone())];
                self.wait_gone(going, rollout.end, rollout.timeout_s).await?;
                live = None;
            }
            if let Some(live) = &live
                && !rollout.take_over
                && live["metadata"]["labels"][APPLICATION_LABEL] != rollout.name.as_str()
            {
                return failed_for(
                    "conflict",
                    format!(
                        "{} is there already and is not of application {}: delete it, choose \
                         another name, or set take_over",
                        reference.title(),
                        rollout.name
                    ),
                );
            }
            if live.is_some() && rollout.keep_claims && reference.kind == "PersistentVolumeClaim" {
                continue;
            }
            if let Some(live) = &mut live
                && mode != Mode::DryRun
            {
                self.own(&reference, &path, live).await?;
            }
            let mut object = object.clone();
            if reference.kind == "Deployment" {
                self.prepare_deployment(&reference, &path, &mut object, live.as_ref(), mode)
                    .await?;
            }
            let dry_run = !matches!(mode, Mode::Write(_));
            let (outcome, answer) = self
                .apply_patiently(&reference, &path, &object, rollout.take_over, dry_run)
                .await?;
            if mode == Mode::Check {
                check_containers(&reference, &object, &answer)?;
            } else {
                self.progress.touched(&reference.title(), outcome);
            }
            done.push(Applied { reference, path, object: answer });
        }
        Ok(done)
    }

    /// What server-side apply can't say of a Deployment.
    async fn prepare_deployment(
        &mut self,
        reference: &Reference,
        path: &str,
        object: &mut Value,
        live: Option<&Value>,
        mode: Mode,
    ) -> Result<(), ExecutionError> {
        if let Mode::Write(number) = mode {
            object["metadata"]["annotations"][REVISION_ANNOTATION] = number.to_string().into();
        }
        let Some(live) = live else { return Ok(()) };
        if object["spec"]["replicas"].is_null() {
            // or the field is nobody's for a moment, and Kubernetes makes one pod of it
            // (kubernetes.io/docs/reference/using-api/server-side-apply, "Transferring ownership")
            object["spec"]["replicas"] = live["spec"]["replicas"].clone();
        }
        if object["spec"]["strategy"]["type"] == "Recreate"
            && !live["spec"]["strategy"]["rollingUpdate"].is_null()
        {
            // a default that nobody owns stays, and is forbidden beside Recreate
            if let Mode::Write(_) = mode {
                let patch =
                    json!({"spec": {"strategy": {"type": "Recreate", "rollingUpdate": null}}});
                let request = KubernetesRequest {
                    method: Method::PATCH,
                    query: &format!("fieldManager={FIELD_MANAGER}"),
                    body: Some((MERGE, &patch)),
                    ..GET
                };
                let (status, answer) = self.request(path, request).await?;
                if status != 200 {
                    return refused(reference, status, &answer);
                }
            } else {
                object["spec"]["strategy"] = live["spec"]["strategy"].clone();
            }
        }
        Ok(())
    }

    /// What we changed of an object in other ways (a rotation) becomes ours by applies, so that a
    /// later one can take it away.
    pub(super) async fn own(
        &mut self,
        reference: &Reference,
        path: &str,
        live: &mut Value,
    ) -> Result<(), ExecutionError> {
        let entries = live["metadata"]["managedFields"].as_array();
        let Some(entries) = entries.and_then(|entries| applied(entries, FIELD_MANAGER)) else {
            return Ok(());
        };
        let patch = json!([
            {"op": "replace", "path": "/metadata/managedFields", "value": entries},
            {"op": "replace", "path": "/metadata/resourceVersion",
                "value": live["metadata"]["resourceVersion"]}
        ]);
        let request = KubernetesRequest {
            method: Method::PATCH,
            query: &format!("fieldManager={FIELD_MANAGER}"),
            body: Some(("application/json-patch+json", &patch)),
            ..GET
        };
        match self.request_until_answered(path, request).await? {
            (200, answer) => *live = answer,
            // it was changed meanwhile: the next apply sees to it
            (404 | 409 | 422, _) => {}
            (status, answer) => return refused(reference, status, &answer),
        }
        Ok(())
    }

    /// An apply that waits while the API server does not answer.
    async fn apply_patiently(
        &mut self,
        reference: &Reference,
        path: &str,
        object: &Value,
        take_over: bool,
        dry_run: bool,
    ) -> Result<(&'static str, Value), ExecutionError> {
        let end = Instant::now() + PATIENCE;
        loop {
            match self.apply_object(reference, path, object, take_over, dry_run).await {
                Err(ExecutionError::Failed(failure))
                    if matches!(failure.reason, "" | "refused") && Instant::now() < end => {}
                end => return end,
            }
            self.pause().await?;
        }
    }

    /// Server-side apply of one object: what became of it, and the object. Fields of another manager
    /// are taken from it only with `take_over`; those that we changed in another way (`scale`), and
    /// those that an autoscaler or cert-manager changes for us, are ours.
    pub(super) async fn apply_object(
        &mut self,
        reference: &Reference,
        path: &str,
        object: &Value,
        take_over: bool,
        dry_run: bool,
    ) -> Result<(&'static str, Value), ExecutionError> {
        let mut force = take_over;
        loop {
            let dry = if dry_run { "&dryRun=All" } else { "" };
            let query = format!("fieldManager={FIELD_MANAGER}&force={force}{dry}");
            let body = Some(("application/apply-patch+yaml", object));
            let request = KubernetesRequest { method: Method::PATCH, query: &query, body, ..GET };
            let (status, answer) = self.request(path, request).await?;
            match status {
                200 => return Ok(("applied", answer)),
                201 => return Ok(("created", answer)),
                409 if !force && is_own_conflict(&answer) => force = true,
                _ => return refused(reference, status, &answer),
            }
        }
    }

    /// The objects of an application that are there, by their labels.
    pub(super) async fn owned(
        &mut self,
        namespace: &str,
        name: &str,
    ) -> Result<Vec<(Reference, Value)>, ExecutionError> {
        let mut all = Vec::new();
        let query = format!(
            "labelSelector={APPLICATION_LABEL}={name},app.kubernetes.io/managed-by=pipeops"
        );
        for (version, kind, plural) in KINDS {
            let of_kind = |name: &str| Reference {
                api_version: (*version).into(),
                kind: (*kind).into(),
                name: name.into(),
                namespace: Some(namespace.into()),
            };
            let path = format!("{}/namespaces/{namespace}/{plural}", of_kind(name).base());
            let (status, list) = self.read(&path, &query).await?;
            match status {
                200 => {}
                404 => continue,
                // rights from before there were routes
                403 if *kind == "HTTPRoute" => continue,
                _ => return refused(&of_kind(name), status, &list),
            }
            let name = |item: &Value| item["metadata"]["name"].as_str().map(of_kind);
            all.extend(items(list).into_iter().filter_map(|item| Some((name(&item)?, item))));
        }
        Ok(all)
    }

    /// Deletes an object as it was found, with its pods, and says where it was.
    pub(super) async fn delete_owned(
        &mut self,
        reference: &Reference,
        found: &Value,
        dry_run: bool,
    ) -> Result<String, ExecutionError> {
        let path = self.known_path_of(reference).await?;
        // in the foreground it is gone when its pods are; of the rest nothing is waited for
        let runs = matches!(reference.kind.as_str(), "Deployment" | "Job");
        let mut body = json!({
            "propagationPolicy": if runs { "Foreground" } else { "Background" },
            "preconditions": {"uid": found["metadata"]["uid"]}
        });
        if dry_run {
            // beside a body the query is not read (apiserver `pkg/endpoints/handlers/delete.go`)
            body["dryRun"] = json!(["All"]);
        }
        let request = KubernetesRequest {
            method: Method::DELETE,
            body: Some(("application/json", &body)),
            ..GET
        };
        match self.request_until_answered(&path, request).await? {
            (200 | 202 | 404, _) => {
                if !dry_run {
                    self.progress.touched(&reference.title(), "deleted");
                }
                Ok(path)
            }
            (status, answer) => refused(reference, status, &answer),
        }
    }
}

/// A container of somebody else would run beside ours: server-side apply merges them by name.
fn check_containers(
    reference: &Reference,
    wanted: &Value,
    answer: &Value,
) -> Result<(), ExecutionError> {
    let names = |object: &Value| -> Vec<String> {
        let containers = object.pointer("/spec/template/spec/containers");
        let containers = containers.and_then(Value::as_array).into_iter().flatten();
        containers.filter_map(|c| c["name"].as_str().map(str::to_owned)).collect()
    };
    let ours = names(wanted);
    match names(answer).into_iter().find(|name| !ours.contains(name)) {
        Some(foreign) if !ours.is_empty() => failed_for(
            "conflict",
            format!(
                "{} has a container `{foreign}` of somebody else, which would stay beside ours: \
                 delete the Deployment first",
                reference.title()
            ),
        ),
        _ => Ok(()),
    }
}

/// Whether all fields that a server-side apply was refused for are ours, or were changed for us.
fn is_own_conflict(answer: &Value) -> bool {
    let causes = answer["details"]["causes"].as_array().map_or(&[][..], Vec::as_slice);
    !causes.is_empty()
        && causes.iter().all(|cause| {
            let message = cause["message"].as_str().unwrap_or_default();
            let manager = message.split('"').nth(1).unwrap_or_default();
            cause["reason"] == "FieldManagerConflict"
                && (manager == FIELD_MANAGER
                    || manager.starts_with("cert-manager")
                    || (AUTOSCALERS.contains(&manager)
                        && message.contains("subresource \"scale\"")))
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_that_was_changed_for_us_is_no_conflict() {
        let conflict = |messages: &[&str]| {
            let causes = messages.iter().map(|message| {
                json!({"reason": "FieldManagerConflict", "message": message, "field": ".x"})
            });
            is_own_conflict(&json!({"details": {"causes": causes.collect::<Vec<Value>>()}}))
        };
        let ours = "conflict with \"pipeops-runner\" with subresource \"scale\" using apps/v1";
        let autoscaler = "conflict with \"k3s\" with subresource \"scale\" using apps/v1";
        let theirs = "conflict with \"kubectl\" with subresource \"scale\" using apps/v1";
        assert!(conflict(&[ours]) && conflict(&[ours, autoscaler]));
        assert!(conflict(&[
            "conflict with \"cert-manager-challenges\" using networking.k8s.io/v1"
        ]));
        for refused in
            [&[theirs][..], &[ours, theirs], &["conflict with \"k3s\" using apps/v1"], &[]]
        {
            assert!(!conflict(refused), "{refused:?}");
        }
    }

    #[test]
    fn a_container_of_somebody_else_is_named() {
        let deployment = |names: &[&str]| {
            let containers: Vec<Value> = names.iter().map(|name| json!({"name": name})).collect();
            json!({"apiVersion": "apps/v1", "kind": "Deployment",
                "metadata": {"name": "web", "namespace": "beta"},
                "spec": {"template": {"spec": {"containers": containers}}}})
        };
        let ours = deployment(&["web"]);
        let reference = Reference::from_object(&ours).unwrap();
        assert!(check_containers(&reference, &ours, &ours).is_ok());
        let answer = deployment(&["app", "web"]);
        let Err(ExecutionError::Failed(failure)) = check_containers(&reference, &ours, &answer)
        else {
            panic!("it is taken");
        };
        assert!(failure.message.contains("container `app`"), "{}", failure.message);
    }
}
