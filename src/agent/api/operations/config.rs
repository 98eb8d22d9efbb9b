//! Config sets: new values, their rollout to what uses them, and the end of versions. What is
//! written here may be written again: each request has one effect, however often it is sent.

use http::Method;
use serde_json::{Value, json};

use super::executor::{Executor, FIELD_MANAGER};
use super::requests::{ExecutionError, GET, KubernetesRequest, failed_for, refused};
use super::store::now;
use super::users::Workload;
use crate::contract::config::{ConfigSpec, DeleteConfig, PruneConfig, SetConfig};
use crate::contract::operation::Reference;
use crate::kubernetes::config_set::{
    ConfigKind, ConfigSet, Inventory, MANAGED, MANAGED_LABEL, SET_LABEL, Version,
};
use crate::kubernetes::pod_references::retarget;

/// How often an object is read again that somebody else has changed meanwhile.
const MAX_CONFLICTS: usize = 20;
/// Versions that are read in one answer: each may hold 1 MiB.
const PAGE: usize = 5;

/// A version of a set, or its inventory.
fn reference(set: ConfigSet<'_>, kind: &str, name: String) -> Reference {
    Reference {
        api_version: "v1".into(),
        kind: kind.into(),
        name,
        namespace: Some(set.namespace.into()),
    }
}

fn version_reference(set: ConfigSet<'_>, object: &str) -> (Reference, String) {
    let path = format!("/api/v1/namespaces/{}/{}/{object}", set.namespace, set.kind.plural());
    (reference(set, set.kind.object_kind(), object.into()), path)
}

/// The inventory, and the path of the list that it is in.
fn inventory_reference(set: ConfigSet<'_>) -> (Reference, String) {
    let list = format!("/api/v1/namespaces/{}/configmaps", set.namespace);
    (reference(set, "ConfigMap", set.inventory_name()), list)
}

impl Executor<'_> {
    pub(super) async fn config(
        &mut self,
        kind: ConfigKind,
        spec: &ConfigSpec,
    ) -> Result<(), ExecutionError> {
        let (namespace, name) = spec.target();
        let set = ConfigSet { kind, namespace, name };
        match spec {
            ConfigSpec::Set(change) => self.set_config(set, change).await,
            ConfigSpec::Delete(delete) => self.delete_config(set, delete).await,
            ConfigSpec::Prune(prune) => self.prune_config(set, prune).await,
        }
    }

    /// The inventory of a config set and its `resourceVersion`, if there is one.
    pub(super) async fn inventory(
        &mut self,
        kind: ConfigKind,
        namespace: &str,
        name: &str,
    ) -> Result<Option<(Inventory, String)>, ExecutionError> {
        let set = ConfigSet { kind, namespace, name };
        let (reference, list) = inventory_reference(set);
        let path = format!("{list}/{}", reference.name);
        match self.request_until_answered(&path, GET).await? {
            (200, object) => match Inventory::parse(set, &object) {
                Ok(inventory) => {
                    let version = object["metadata"]["resourceVersion"].as_str();
                    Ok(Some((inventory, version.unwrap_or_default().to_owned())))
                }
                Err(why) => failed_for(
                    "inventory_damaged",
                    format!("{} is no inventory: {why}", reference.title()),
                ),
            },
            (404, _) => Ok(None),
            (status, answer) => refused(&reference, status, &answer),
        }
    }

    async fn set_config(
        &mut self,
        set: ConfigSet<'_>,
        change: &SetConfig,
    ) -> Result<(), ExecutionError> {
        let ConfigSet { kind, namespace, name } = set;
        let inventory = self.inventory(kind, namespace, name).await?;
        let inventory = inventory.map(|(inventory, _)| inventory).unwrap_or_default();
        if !inventory.accepts(change.secret_type) {
            return failed_for(
                "conflict",
                format!(
                    "{} {namespace}/{name} has another type than the one asked for: take a new \
                     name",
                    kind.object_kind()
                ),
            );
        }
        self.check_dropped(set, &inventory.dropped(change)).await?;
        let keys: Vec<String> = change.keys().into_iter().map(str::to_owned).collect();
        let object = set.version_name(&self.progress.id);
        if !keys.is_empty() {
            self.write_version(set, change, &object).await?;
        }
        let by = self.caller.subject.clone();
        let version =
            Version { object: object.clone(), keys, created_at: now(), by, ..Version::default() };
        let merge = |inventory: &mut Inventory| inventory.merge(change, version.clone());
        if let Err(end) = self.change_inventory(set, merge).await {
            // where Kubernetes has refused it nothing names the object; without an answer it may
            if let ExecutionError::Failed(failure) = &end
                && !failure.reason.is_empty()
                && !version.keys.is_empty()
            {
                let _ = self.delete_version(set, &object).await;
            }
            return Err(end);
        }
        if !change.rollout {
            return Ok(());
        }
        let changed = self.roll_out_config(set).await?;
        self.wait_ready(&changed, change.wait, change.timeout_s).await
    }

    /// Refuses to take keys away that applications name.
    async fn check_dropped(
        &mut self,
        set: ConfigSet<'_>,
        keys: &[&str],
    ) -> Result<(), ExecutionError> {
        if keys.is_empty() {
            return Ok(());
        }
        let workloads = self.workloads(set.namespace).await?;
        for key in keys {
            let takes = |w: &&Workload| w.is_current && w.takes(set, key);
            let users = workloads.iter().filter(takes).map(|w| w.title(set.namespace));
            in_use(&format!("the key `{key}`"), &users.collect::<Vec<_>>())?;
        }
        Ok(())
    }

    /// The same object each time, so that it may be sent again. One of this name with other values
    /// is refused by Kubernetes: it is immutable.
    async fn write_version(
        &mut self,
        set: ConfigSet<'_>,
        change: &SetConfig,
        object: &str,
    ) -> Result<(), ExecutionError> {
        let (reference, path) = version_reference(set, object);
        let body = set.version(change, &self.progress.id, &self.caller.subject);
        let query = format!("fieldManager={FIELD_MANAGER}&force=false");
        let request = KubernetesRequest {
            method: Method::PATCH,
            query: &query,
            body: Some(("application/apply-patch+yaml", &body)),
            ..GET
        };
        match self.request_until_answered(&path, request).await? {
            (200 | 201, _) => self.progress.touched(&reference.title(), "created"),
            (status, answer) => return refused(&reference, status, &answer),
        }
        Ok(())
    }

    /// Changes an inventory. What somebody else wrote in between is read and kept.
    async fn change_inventory(
        &mut self,
        set: ConfigSet<'_>,
        change: impl Fn(&mut Inventory),
    ) -> Result<(), ExecutionError> {
        let (reference, list) = inventory_reference(set);
        let query = format!("fieldManager={FIELD_MANAGER}");
        for _ in 0..MAX_CONFLICTS {
            let there = self.inventory(set.kind, set.namespace, set.name).await?;
            let (before, version) = there.unzip();
            let before = before.unwrap_or_default();
            let mut after = before.clone();
            change(&mut after);
            if after == before {
                return Ok(());
            }
            let body = after.to_object(set, version.as_deref());
            let body = Some(("application/json", &body));
            // unlike an apply, both fail where somebody else was faster
            let (method, path) = match version {
                Some(_) => (Method::PUT, format!("{list}/{}", reference.name)),
                None => (Method::POST, list.clone()),
            };
            let request = KubernetesRequest { method, query: &query, body, ..GET };
            match self.request_until_answered(&path, request).await? {
                (200 | 201, _) => {
                    self.progress.touched(&reference.title(), "written");
                    return Ok(());
                }
                (409, _) => {}
                (status, answer) => return refused(&reference, status, &answer),
            }
        }
        changes_too_often(&reference)
    }

    /// Has all applications of ours refer to the current versions; gives those that change.
    async fn roll_out_config(
        &mut self,
        set: ConfigSet<'_>,
    ) -> Result<Vec<(Reference, String)>, ExecutionError> {
        let mut changed = Vec::new();
        for workload in self.workloads(set.namespace).await? {
            if workload.is_current && workload.template.is_changeable {
                changed.extend(self.update_workload(set, workload).await?);
            }
        }
        if set.kind == ConfigKind::Secret {
            self.update_certificates(set).await?;
        }
        Ok(changed)
    }

    /// Has the Ingresses of ours show the current certificate.
    async fn update_certificates(&mut self, set: ConfigSet<'_>) -> Result<(), ExecutionError> {
        let ingresses = self.ingresses(set.namespace).await?;
        // read after them: a change that they hold already is in the inventory too
        let inventory = self.inventory(set.kind, set.namespace, set.name).await?;
        let Some((inventory, _)) = inventory else { return Ok(()) };
        let Some(wanted) = inventory.object_of("tls.crt") else { return Ok(()) };
        let is_managed = |i: &&Value| i["metadata"]["labels"][MANAGED_LABEL] == MANAGED;
        for ingress in ingresses.iter().filter(is_managed) {
            let mut patch = Vec::new();
            for (n, tls) in ingress["spec"]["tls"].as_array().into_iter().flatten().enumerate() {
                let named = tls["secretName"].as_str().unwrap_or_default();
                if set.is_version(named) && named != wanted {
                    let path = format!("/spec/tls/{n}/secretName");
                    patch.push(json!({"op": "test", "path": path, "value": named}));
                    patch.push(json!({"op": "replace", "path": path, "value": wanted}));
                }
            }
            if patch.is_empty() {
                continue;
            }
            let patch = Value::Array(patch);
            let name = ingress["metadata"]["name"].as_str().unwrap_or_default().to_owned();
            let mut reference = reference(set, "Ingress", name);
            reference.api_version = "networking.k8s.io/v1".into();
            let path = self.known_path_of(&reference).await?;
            let request = KubernetesRequest {
                method: Method::PATCH,
                query: &format!("fieldManager={FIELD_MANAGER}"),
                body: Some(("application/json-patch+json", &patch)),
                ..GET
            };
            match self.request_until_answered(&path, request).await? {
                (200, mut live) => {
                    self.own(&reference, &path, &mut live).await?;
                    self.progress.touched(&reference.title(), "updated");
                }
                (404, _) => {}
                (status, answer) => return refused(&reference, status, &answer),
            }
        }
        Ok(())
    }

    /// Has one application refer to the current versions; gives it back if that changed it.
    async fn update_workload(
        &mut self,
        set: ConfigSet<'_>,
        mut workload: Workload,
    ) -> Result<Option<(Reference, String)>, ExecutionError> {
        let template = workload.template;
        let mut reference = reference(set, template.kind, workload.name.clone());
        reference.api_version = template.api_version.into();
        let query = format!("fieldManager={FIELD_MANAGER}");
        for _ in 0..MAX_CONFLICTS {
            // read after the template: a change that it holds already is in the inventory too
            let inventory = self.inventory(set.kind, set.namespace, set.name).await?;
            let Some((inventory, _)) = inventory else { return Ok(None) };
            let patch = Value::Array(retarget(&workload.pod, template.pod, set, &inventory));
            if patch.as_array().is_none_or(Vec::is_empty) {
                return Ok(None);
            }
            if !workload.is_managed {
                let title = reference.title();
                let message = format!("{title} keeps its versions: pipeops does not manage it");
                self.progress.message(message, "");
                return Ok(None);
            }
            let request = KubernetesRequest {
                method: Method::PATCH,
                query: &query,
                body: Some(("application/json-patch+json", &patch)),
                ..GET
            };
            match self.request_until_answered(&workload.path, request).await? {
                (200, mut live) => {
                    self.own(&reference, &workload.path, &mut live).await?;
                    self.progress.touched(&reference.title(), "updated");
                    return Ok(Some((reference, workload.path)));
                }
                (404, _) => return Ok(None),
                // it is not as it was read
                (409, _) => {}
                (422, answer) if answer["details"]["causes"].is_null() => {}
                (status, answer) => return refused(&reference, status, &answer),
            }
            match self.request_until_answered(&workload.path, GET).await? {
                (200, mut object) => {
                    let pod = object.pointer_mut(template.pod);
                    workload.pod = pod.map(Value::take).unwrap_or_default();
                }
                (404, _) => return Ok(None),
                (status, answer) => return refused(&reference, status, &answer),
            }
        }
        changes_too_often(&reference)
    }

    async fn delete_config(
        &mut self,
        set: ConfigSet<'_>,
        delete: &DeleteConfig,
    ) -> Result<(), ExecutionError> {
        if !delete.force {
            let users = self.config_users(set.kind, set.namespace, set.name).await?;
            let title = format!("{} {}/{}", set.kind.object_kind(), set.namespace, set.name);
            in_use(&title, &users.applications)?;
        }
        let (reference, list) = inventory_reference(set);
        let path = format!("{list}/{}", reference.name);
        for _ in 0..MAX_CONFLICTS {
            let there = self.inventory(set.kind, set.namespace, set.name).await?;
            let (inventory, version) = there.unzip();
            let inventory = inventory.unwrap_or_default();
            let mut objects: Vec<String> =
                inventory.versions().iter().map(|version| version.object.clone()).collect();
            objects.extend(self.orphans(set, &inventory).await?);
            for object in &objects {
                self.delete_version(set, object).await?;
            }
            let Some(version) = version else {
                self.progress.touched(&reference.title(), "absent");
                return Ok(());
            };
            // a version that was set meanwhile goes too
            let body = json!({"preconditions": {"resourceVersion": version}});
            let body = Some(("application/json", &body));
            let request = KubernetesRequest { method: Method::DELETE, body, ..GET };
            match self.request_until_answered(&path, request).await? {
                (200 | 202 | 404, _) => {
                    self.progress.touched(&reference.title(), "deleted");
                    return Ok(());
                }
                (409, _) => {}
                (status, answer) => return refused(&reference, status, &answer),
            }
        }
        changes_too_often(&reference)
    }

    async fn prune_config(
        &mut self,
        set: ConfigSet<'_>,
        prune: &PruneConfig,
    ) -> Result<(), ExecutionError> {
        let inventory = self.inventory(set.kind, set.namespace, set.name).await?;
        let inventory = inventory.map(|(inventory, _)| inventory).unwrap_or_default();
        let used = self.config_users(set.kind, set.namespace, set.name).await?.objects;
        let mut objects = inventory.prunable(prune.keep, &used);
        let orphans = self.orphans(set, &inventory).await?;
        objects.extend(orphans.into_iter().filter(|orphan| !used.contains(orphan)));
        // the list loses them last: what a crash leaves is found again
        for object in &objects {
            self.delete_version(set, object).await?;
        }
        self.change_inventory(set, |inventory| inventory.forget(&objects)).await
    }

    /// ConfigMaps of operations that never came to the inventory. Secrets cannot be listed.
    async fn orphans(
        &mut self,
        set: ConfigSet<'_>,
        inventory: &Inventory,
    ) -> Result<Vec<String>, ExecutionError> {
        if set.kind == ConfigKind::Secret {
            return Ok(Vec::new());
        }
        let path = format!("/api/v1/namespaces/{}/configmaps", set.namespace);
        let query = format!("&labelSelector={SET_LABEL}={}", set.name);
        let now = jiff::Timestamp::now().as_second();
        let items = self.list_all(&path, &query, PAGE).await?;
        let orphans = items.iter().filter(|item| inventory.is_orphan(set, item, now));
        Ok(orphans
            .filter_map(|item| item["metadata"]["name"].as_str().map(str::to_owned))
            .collect())
    }

    async fn delete_version(
        &mut self,
        set: ConfigSet<'_>,
        object: &str,
    ) -> Result<(), ExecutionError> {
        let (reference, path) = version_reference(set, object);
        let body = json!({"propagationPolicy": "Background"});
        let body = Some(("application/json", &body));
        let request = KubernetesRequest { method: Method::DELETE, body, ..GET };
        match self.request_until_answered(&path, request).await? {
            (200 | 202, _) => self.progress.touched(&reference.title(), "deleted"),
            (404, _) => self.progress.touched(&reference.title(), "absent"),
            (status, answer) => return refused(&reference, status, &answer),
        }
        Ok(())
    }
}

/// Refuses to take something away that applications use.
fn in_use(what: &str, applications: &[String]) -> Result<(), ExecutionError> {
    if applications.is_empty() {
        return Ok(());
    }
    let users = applications.join(", ");
    failed_for("in_use", format!("{what} is in use: {users} would not start without it"))
}

fn changes_too_often<T>(reference: &Reference) -> Result<T, ExecutionError> {
    let title = reference.title();
    failed_for("conflict", format!("{title} was changed by others {MAX_CONFLICTS} times meanwhile"))
}
