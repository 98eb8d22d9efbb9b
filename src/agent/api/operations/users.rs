//! Which workloads of a namespace use a config set, now or by a former revision.

use std::collections::BTreeSet;

use serde_json::Value;

use super::executor::Executor;
use super::requests::{
    ExecutionError, GET, KubernetesRequest, describe_refusal, failed_for, refusal_reason,
};
use crate::base::json;
use crate::base::order;
use crate::kubernetes::application::revision::NUMBER_LABEL;
use crate::kubernetes::config_set::{ConfigKind, ConfigSet, MANAGED, MANAGED_LABEL};
use crate::kubernetes::pod_references::references;
use crate::kubernetes::readiness::condition;

/// Workloads that are read in one answer.
const PAGE: usize = 100;

/// A kind that holds the template of a pod.
pub(super) struct TemplateKind {
    pub(super) api_version: &'static str,
    plural: &'static str,
    pub(super) kind: &'static str,
    /// Where the spec of the pod is, as a JSON pointer.
    pub(super) pod: &'static str,
    /// What it says now is what runs next: its template can be changed.
    pub(super) is_changeable: bool,
}

const fn template(
    api_version: &'static str,
    plural: &'static str,
    kind: &'static str,
    pod: &'static str,
    is_changeable: bool,
) -> TemplateKind {
    TemplateKind { api_version, plural, kind, pod, is_changeable }
}

/// The revisions of a Deployment are its ReplicaSets, those of the other two ControllerRevisions.
static TEMPLATES: [TemplateKind; 7] = [
    template("apps/v1", "deployments", "Deployment", "/spec/template/spec", true),
    template("apps/v1", "statefulsets", "StatefulSet", "/spec/template/spec", true),
    template("apps/v1", "daemonsets", "DaemonSet", "/spec/template/spec", true),
    template("batch/v1", "cronjobs", "CronJob", "/spec/jobTemplate/spec/template/spec", true),
    template("apps/v1", "replicasets", "ReplicaSet", "/spec/template/spec", false),
    template(
        "apps/v1",
        "controllerrevisions",
        "ControllerRevision",
        "/data/spec/template/spec",
        false,
    ),
    template("batch/v1", "jobs", "Job", "/spec/template/spec", false),
];

/// Something with the template of a pod.
pub(super) struct Workload {
    pub(super) template: &'static TemplateKind,
    pub(super) name: String,
    /// The path of the object.
    pub(super) path: String,
    /// The spec of its pods.
    pub(super) pod: Value,
    /// It has no owner: it is an application, and no revision or run of one.
    pub(super) is_current: bool,
    /// It is ours to change.
    pub(super) is_managed: bool,
}

impl Workload {
    /// `None` where it runs no pod any more.
    fn of(template: &'static TemplateKind, list: &str, mut object: Value) -> Option<Workload> {
        let ended =
            |kind: &str| condition(&object, kind).is_some_and(|condition| condition.is_true());
        if template.kind == "Job" && (ended("Complete") || ended("Failed")) {
            return None;
        }
        let metadata = &object["metadata"];
        let name = metadata["name"].as_str()?.to_owned();
        let is_owned = metadata["ownerReferences"].as_array().is_some_and(|o| !o.is_empty());
        Some(Workload {
            template,
            path: format!("{list}/{name}"),
            name,
            is_current: !is_owned && template.kind != "ControllerRevision",
            is_managed: metadata["labels"][MANAGED_LABEL] == MANAGED,
            pod: object.pointer_mut(template.pod).map(Value::take).unwrap_or_default(),
        })
    }

    /// `Deployment beta/web`.
    pub(super) fn title(&self, namespace: &str) -> String {
        format!("{} {namespace}/{}", self.template.kind, self.name)
    }

    /// Whether its pods would miss a key of the set.
    pub(super) fn takes(&self, set: ConfigSet<'_>, key: &str) -> bool {
        references(&self.pod, set.kind).iter().any(|reference| reference.takes(set, key))
    }
}

/// Who uses a config set.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct ConfigUsers {
    /// What refers to it now, as `Deployment beta/web`.
    pub(super) applications: Vec<String>,
    /// The versions that applications, their former revisions and their runs name.
    pub(super) objects: BTreeSet<String>,
}

/// The Secrets with the certificates of an Ingress.
fn certificates(object: &Value) -> impl Iterator<Item = &str> {
    let tls = object["spec"]["tls"].as_array().into_iter().flatten();
    tls.filter_map(|tls| tls["secretName"].as_str())
}

/// The versions of a set that a pod names.
fn versions(set: ConfigSet<'_>, pod: &Value) -> BTreeSet<String> {
    let named = references(pod, set.kind);
    let named = named.iter().filter(|reference| set.is_version(reference.object));
    order::set(named.map(|reference| reference.object.to_owned()))
}

/// Who of these uses a set.
fn users(set: ConfigSet<'_>, workloads: &[Workload]) -> ConfigUsers {
    let mut users = ConfigUsers::default();
    for workload in workloads {
        let named = versions(set, &workload.pod);
        if workload.is_current && !named.is_empty() {
            users.applications.push(workload.title(set.namespace));
        }
        users.objects.extend(named);
    }
    users
}

impl Executor<'_> {
    /// Who uses a config set.
    pub(super) async fn config_users(
        &mut self,
        kind: ConfigKind,
        namespace: &str,
        name: &str,
    ) -> Result<ConfigUsers, ExecutionError> {
        let set = ConfigSet { kind, namespace, name };
        let mut users = users(set, &self.workloads(namespace).await?);
        for ingress in self.ingresses(namespace).await? {
            let named = certificates(&ingress).find(|name| set.is_version(name));
            if let Some(named) = named.filter(|_| kind == ConfigKind::Secret) {
                let name = ingress["metadata"]["name"].as_str().unwrap_or_default();
                users.applications.push(format!("Ingress {namespace}/{name}"));
                users.objects.insert(named.to_owned());
            }
        }
        // Kubernetes forgets ReplicaSets on its own account
        let path = format!("/api/v1/namespaces/{namespace}/configmaps");
        let query = format!("&labelSelector={NUMBER_LABEL}");
        for revision in self.list_all(&path, &query, PAGE).await? {
            let text = revision.pointer("/data/objects.json").and_then(Value::as_str);
            let objects: Vec<Value> =
                text.and_then(|text| json::read(text).ok()).unwrap_or_default();
            let shown = objects.iter().flat_map(certificates);
            users.objects.extend(shown.filter(|name| set.is_version(name)).map(str::to_owned));
            for pod in objects.iter().filter_map(|o| o.pointer("/spec/template/spec")) {
                users.objects.extend(versions(set, pod));
            }
        }
        Ok(users)
    }

    pub(super) async fn ingresses(
        &mut self,
        namespace: &str,
    ) -> Result<Vec<Value>, ExecutionError> {
        let path = format!("/apis/networking.k8s.io/v1/namespaces/{namespace}/ingresses");
        self.list_all(&path, "", PAGE).await
    }

    /// Everything in a namespace that has the template of a pod, former revisions too.
    pub(super) async fn workloads(
        &mut self,
        namespace: &str,
    ) -> Result<Vec<Workload>, ExecutionError> {
        let mut found = Vec::new();
        for template in &TEMPLATES {
            let TemplateKind { api_version, plural, .. } = template;
            let path = format!("/apis/{api_version}/namespaces/{namespace}/{plural}");
            let items = self.list_all(&path, "", PAGE).await?;
            found.extend(items.into_iter().filter_map(|item| Workload::of(template, &path, item)));
        }
        Ok(found)
    }

    /// The items of a list, page by page. What decides about deleting must have seen them all: a
    /// refusal is a failure.
    pub(super) async fn list_all(
        &mut self,
        path: &str,
        query: &str,
        page: usize,
    ) -> Result<Vec<Value>, ExecutionError> {
        let mut found = Vec::new();
        let mut next = String::new();
        loop {
            let query = format!("limit={page}{next}{query}");
            let (status, mut answer) = self
                .request_until_answered(path, KubernetesRequest { query: &query, ..GET })
                .await?;
            match status {
                200 => {}
                // a cluster without this kind
                404 => return Ok(found),
                _ => {
                    let why = describe_refusal("", status, &answer);
                    return failed_for(refusal_reason(status, &answer), format!("{path}: {why}"));
                }
            }
            if let Some(Value::Array(items)) = answer.get_mut("items").map(Value::take) {
                found.extend(items);
            }
            match answer["metadata"]["continue"].as_str().filter(|token| !token.is_empty()) {
                Some(token) => {
                    let token: String =
                        url::form_urlencoded::byte_serialize(token.as_bytes()).collect();
                    next = format!("&continue={token}");
                }
                None => return Ok(found),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const SET: ConfigSet<'_> =
        ConfigSet { kind: ConfigKind::Secret, namespace: "beta", name: "db" };

    /// An object of a kind whose pod has all variables of another object.
    fn workload(kind: &str, name: &str, more: Value, refers: &str) -> Option<Workload> {
        let template = TEMPLATES.iter().find(|template| template.kind == kind).unwrap();
        let pod = json!({"containers": [{"envFrom": [{"secretRef": {"name": refers}}]}]});
        let mut object = more;
        object["metadata"]["name"] = name.into();
        let mut spec = pod;
        for field in template.pod.rsplit('/').filter(|field| !field.is_empty()) {
            spec = json!({field: spec});
        }
        for (field, value) in spec.as_object().unwrap() {
            object[field] = value.clone();
        }
        Workload::of(template, "/list", object)
    }

    #[test]
    fn users_are_applications_now_and_objects_of_their_revisions_and_runs_too() {
        let names: Vec<String> = (0..6).map(|n| SET.version_name(&format!("o-{n}"))).collect();
        let owned = || json!({"metadata": {"ownerReferences": [{"uid": "u"}]}});
        let ended = json!({"status": {"conditions": [{"type": "Complete", "status": "True"}]}});
        let workloads = [
            workload("Deployment", "web", json!({}), &names[0]),
            workload("ReplicaSet", "web-1", owned(), &names[1]),
            workload("ControllerRevision", "sts-1", json!({}), &names[2]),
            workload("CronJob", "night", json!({}), &names[3]),
            workload("Job", "night-1", owned(), &names[4]),
            workload("Job", "ended", ended, &names[5]),
            workload("StatefulSet", "other", json!({}), "db"),
        ];
        let workloads: Vec<Workload> = workloads.into_iter().flatten().collect();
        assert_eq!(workloads.len(), 6);
        let found = users(SET, &workloads);
        assert_eq!(found.applications, ["Deployment beta/web", "CronJob beta/night"]);
        assert_eq!(found.objects, names[..5].iter().cloned().collect::<BTreeSet<_>>());
        let other = ConfigSet { kind: ConfigKind::ConfigMap, ..SET };
        assert_eq!(users(other, &workloads), ConfigUsers::default());
    }

    #[test]
    fn a_workload_is_ours_by_its_label_alone() {
        let of = |labels: Value| {
            let object = json!({"metadata": {"labels": labels}});
            workload("Deployment", "web", object, "db").unwrap().is_managed
        };
        assert!(of(json!({"app.kubernetes.io/managed-by": "pipeops"})));
        assert!(!of(json!({"app.kubernetes.io/managed-by": "Helm"})) && !of(json!({})));
    }
}
