//! The applications of a cluster, read through the gateway, as the token may see them.

use std::collections::BTreeMap;

use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde::Serialize;
use serde_json::Value;

use super::api::Api;
use crate::base::error::{Exit, Failure};
use crate::base::json;
use crate::base::order;
use crate::kubernetes::application::revision::{APPLICATION_LABEL, RevisionStatus, object_name};
use crate::kubernetes::readiness::diagnosis::{
    Cause, Evidence, diagnose, is_of, is_owned, newest_replica_set,
};
use crate::kubernetes::readiness::pods::is_ready;
use crate::kubernetes::readiness::rollout::{self, RolloutStatus};
use crate::kubernetes::readiness::workload::{PodCounts, WorkloadKind, selector};

/// What `deploy` makes carries this label.
const OURS: &str = "labelSelector=app.kubernetes.io/managed-by=pipeops&limit=1000";
/// A list without the content of its items (kubernetes.io/docs/reference/using-api/api-concepts,
/// "Metadata-only fetches").
const METADATA: &str = "application/json;as=PartialObjectMetadataList;v=v1;g=meta.k8s.io";
const JSON: &str = "application/json";
/// Pods whose events are read.
const MAX_PODS: usize = 3;

/// An application as a list shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ApplicationRow {
    pub namespace: String,
    pub name: String,
    /// The newest one; none for what was not deployed as an application.
    pub revision: Option<u32>,
    pub image: String,
    pub ready: i64,
    pub wanted: i64,
    pub host: String,
    /// `ready`, `rolling out`, `failed` or `stopped`.
    pub state: &'static str,
    /// What is still missing, or why it failed.
    pub note: String,
}

/// Reads one cluster through the gateway.
pub struct ClusterReader<'a> {
    pub api: &'a Api,
    /// Id of the cluster.
    pub cluster: &'a str,
}

/// What a path needs for the rest of a list, of which this is a part (kubernetes.io
/// `docs/reference/using-api/api-concepts`, "Retrieving large results sets in chunks").
fn rest_of(list: &Value) -> Option<String> {
    let token = text(list, "/metadata/continue");
    let rest = || format!("&continue={}", utf8_percent_encode(token, NON_ALPHANUMERIC));
    (!token.is_empty()).then(rest)
}

/// Items of a list; each is of one kind, which a list leaves out.
fn items(list: Value, kind: &str) -> Vec<Value> {
    let Value::Object(mut list) = list else { return Vec::new() };
    let Some(Value::Array(mut items)) = list.remove("items") else { return Vec::new() };
    for item in items.iter_mut().filter(|item| item.is_object()) {
        item["kind"] = kind.into();
    }
    items
}

fn text<'a>(value: &'a Value, pointer: &str) -> &'a str {
    value.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

impl ClusterReader<'_> {
    /// The path of the Kubernetes API at the control plane.
    pub fn path(&self, path: &str) -> String {
        format!("/clusters/{}/k8s{path}", self.cluster)
    }

    /// The items of a list; of one that this cluster does not serve, none.
    ///
    /// # Errors
    /// As [`Api::get`].
    pub async fn list(
        &self,
        base: &str,
        namespace: Option<&str>,
        (resource, kind): (&str, &str),
        query: &str,
    ) -> Result<Vec<Value>, Failure> {
        let namespace = namespace.map(|n| format!("/namespaces/{n}")).unwrap_or_default();
        let path = self.path(&format!("{base}{namespace}/{resource}?{query}"));
        self.whole_list(&path, JSON, kind).await
    }

    async fn whole_list(
        &self,
        path: &str,
        accept: &str,
        kind: &str,
    ) -> Result<Vec<Value>, Failure> {
        let (mut whole, mut rest) = (Vec::new(), String::new());
        while let Some(list) = self.api.find_as(&format!("{path}{rest}"), accept).await? {
            let next = rest_of(&list);
            whole.extend(items(list, kind));
            match next {
                Some(next) => rest = next,
                None => break,
            }
        }
        Ok(whole)
    }

    /// The same without the content of the items: revisions hold all of their objects.
    async fn list_metadata(
        &self,
        namespace: Option<&str>,
        query: &str,
    ) -> Result<Vec<Value>, Failure> {
        let namespace = namespace.map(|n| format!("/namespaces/{n}")).unwrap_or_default();
        let path = self.path(&format!("/api/v1{namespace}/configmaps?{query}"));
        self.whole_list(&path, METADATA, "ConfigMap").await
    }

    /// All applications of a namespace, or of the cluster.
    ///
    /// # Errors
    /// As [`Api::get`]; exit 2 for a token that is for some namespaces, where none is given.
    pub async fn applications(
        &self,
        namespace: Option<&str>,
    ) -> Result<Vec<ApplicationRow>, Failure> {
        let revisions = format!("labelSelector={APPLICATION_LABEL}&limit=5000");
        let (deployments, revisions, ingresses, routes) = tokio::try_join!(
            self.list("/apis/apps/v1", namespace, ("deployments", "Deployment"), OURS),
            self.list_metadata(namespace, &revisions),
            self.list("/apis/networking.k8s.io/v1", namespace, ("ingresses", "Ingress"), OURS),
            self.routes(namespace),
        )
        .map_err(|failure| match failure.code.as_str() {
            "NAMESPACE_SCOPE" if namespace.is_none() => {
                Failure::usage("NAMESPACE_NEEDED", "in which namespace is it?")
                    .why(failure.what)
                    .hint("say -n NAMESPACE, or once for all: `pipeops contexts use CONTEXT -n …`")
            }
            _ => failure,
        })?;
        Ok(rows(&deployments, &revisions, &[ingresses, routes].concat()))
    }

    /// A role that may not see routes sees applications without their hosts.
    async fn routes(&self, namespace: Option<&str>) -> Result<Vec<Value>, Failure> {
        let routes = ("httproutes", "HTTPRoute");
        let listed = self.list("/apis/gateway.networking.k8s.io/v1", namespace, routes, OURS).await;
        listed.or_else(|e| if e.exit == Exit::Refused { Ok(Vec::new()) } else { Err(e) })
    }

    /// The revisions of an application, the newest first.
    ///
    /// # Errors
    /// As [`Api::get`].
    pub async fn revisions(
        &self,
        namespace: &str,
        name: &str,
    ) -> Result<Vec<RevisionRow>, Failure> {
        let query = format!("labelSelector={APPLICATION_LABEL}={name}");
        let kept = ("configmaps", "ConfigMap");
        let kept = self.list("/api/v1", Some(namespace), kept, &query).await?;
        let mut rows: Vec<RevisionRow> =
            kept.iter().filter_map(|object| RevisionRow::of(object, name)).collect();
        order::sort(&mut rows, |a, b| b.revision.cmp(&a.revision));
        Ok(rows)
    }

    /// The namespace of an application: the only one of `places` that has one of that name; no
    /// namespace stands for all of the cluster.
    ///
    /// # Errors
    /// As [`ClusterReader::applications`]; exit 2 where several have one, 7 where none has.
    pub async fn namespace_of(
        &self,
        name: &str,
        places: &[Option<String>],
    ) -> Result<String, Failure> {
        let mut namespaces = Vec::new();
        for place in places {
            let rows = self.applications(place.as_deref()).await?.into_iter();
            namespaces.extend(rows.filter(|row| row.name == name).map(|row| row.namespace));
        }
        match &namespaces[..] {
            [one] => Ok(one.clone()),
            [] => Err(not_found(name, None)),
            several => Err(Failure::usage(
                "NAMESPACE_AMBIGUOUS",
                format!("{} namespaces have an application {name}", several.len()),
            )
            .why(several.join(", "))
            .hint("say which one: -n NAMESPACE")),
        }
    }

    /// The Deployment of an application.
    ///
    /// # Errors
    /// Exit 7 where there is none.
    pub async fn deployment(&self, namespace: &str, name: &str) -> Result<Value, Failure> {
        let path = format!("/apis/apps/v1/namespaces/{namespace}/deployments/{name}");
        let found = self.api.find(&self.path(&path)).await?;
        let mut found = found.ok_or_else(|| not_found(name, Some(namespace)))?;
        found["kind"] = "Deployment".into();
        Ok(found)
    }

    /// The pods of an application.
    ///
    /// # Errors
    /// As [`Api::get`].
    pub async fn pods(&self, namespace: &str, name: &str) -> Result<Vec<Value>, Failure> {
        let query = format!("labelSelector=app={name}&limit=500");
        self.list("/api/v1", Some(namespace), ("pods", "Pod"), &query).await
    }

    /// What keeps a Deployment from being ready, by what is there now.
    ///
    /// # Errors
    /// As [`Api::get`].
    pub async fn diagnose(&self, deployment: &Value) -> Result<Option<Cause>, Failure> {
        let namespace = Some(text(deployment, "/metadata/namespace"));
        let Some(labels) = selector(deployment) else { return Ok(None) };
        let query = format!("labelSelector={labels}&limit=100");
        let sets = ("replicasets", "ReplicaSet");
        let sets = self.list("/apis/apps/v1", namespace, sets, &query).await?;
        let Some(newest) = newest_replica_set(deployment, &sets) else { return Ok(None) };
        let own = selector(newest).unwrap_or(labels);
        let query = format!("labelSelector={own}&limit=100");
        let pods = self.list("/api/v1", namespace, ("pods", "Pod"), &query).await?;
        let mut evidence = Evidence { replica_set: newest.clone(), ..Evidence::default() };
        evidence.pods =
            pods.into_iter().filter(|pod| is_owned(pod, newest) && is_of(pod, newest)).collect();
        let waiting = evidence.pods.iter().filter(|pod| !is_ready(pod)).take(MAX_PODS);
        let uids: Vec<&str> =
            std::iter::once(newest).chain(waiting).map(|o| text(o, "/metadata/uid")).collect();
        let mut events = Vec::new();
        for uid in uids.into_iter().filter(|uid| !uid.is_empty()) {
            let query = format!("fieldSelector=involvedObject.uid={uid}&limit=100");
            events.extend(self.list("/api/v1", namespace, ("events", "Event"), &query).await?);
        }
        evidence.events = events;
        Ok(diagnose(&evidence))
    }
}

fn not_found(name: &str, namespace: Option<&str>) -> Failure {
    let place = namespace.map(|n| format!(" in {n}")).unwrap_or_default();
    Failure::new(
        Exit::Refused,
        "APPLICATION_UNKNOWN",
        format!("there is no application {name}{place}"),
    )
    .hint("`pipeops apps` lists those that this token sees")
}

/// One row for each Deployment of ours, by namespace and name.
fn rows(deployments: &[Value], revisions: &[Value], ways_in: &[Value]) -> Vec<ApplicationRow> {
    let key = |object: &Value| {
        let text = |field: &str| text(&object["metadata"], field).to_owned();
        (text("/namespace"), text("/name"))
    };
    let mut newest: BTreeMap<(String, String), u32> = BTreeMap::new();
    for (revision, number) in revisions.iter().filter_map(|r| Some((r, number(r)?))) {
        let name = text(&revision["metadata"]["labels"], "/pipeops.io~1application").to_owned();
        let newest = newest.entry((key(revision).0, name)).or_default();
        *newest = (*newest).max(number);
    }
    let host = |object: &Value| {
        let names = [text(object, "/spec/rules/0/host"), text(object, "/spec/hostnames/0")];
        names.into_iter().find(|name| !name.is_empty()).unwrap_or_default().to_owned()
    };
    let hosts = order::map(ways_in.iter().map(|object| (key(object), host(object))));
    let mut rows: Vec<ApplicationRow> = deployments
        .iter()
        .map(|deployment| {
            let place = key(deployment);
            let (state, note) = state(deployment);
            let pods = PodCounts::of(WorkloadKind::Deployment, deployment);
            ApplicationRow {
                revision: newest.get(&place).copied(),
                image: text(deployment, "/spec/template/spec/containers/0/image").to_owned(),
                ready: pods.ready,
                wanted: pods.wanted,
                host: hosts.get(&place).cloned().unwrap_or_default(),
                state,
                note,
                namespace: place.0,
                name: place.1,
            }
        })
        .collect();
    order::sort(&mut rows, |a, b| (&a.namespace, &a.name).cmp(&(&b.namespace, &b.name)));
    rows
}

/// How a Deployment is, in a word, and what is missing.
pub fn state(deployment: &Value) -> (&'static str, String) {
    match rollout::status(deployment) {
        RolloutStatus::Complete if deployment["spec"]["replicas"] == 0 => {
            ("stopped", String::new())
        }
        RolloutStatus::Complete => ("ready", String::new()),
        RolloutStatus::InProgress(missing) => ("rolling out", missing),
        RolloutStatus::Failed(why) => ("failed", why),
    }
}

/// A revision as a history shows it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RevisionRow {
    pub revision: u32,
    #[serde(flatten)]
    pub status: RevisionStatus,
    pub image: String,
}

impl RevisionRow {
    /// None for a ConfigMap that is no revision of this application.
    fn of(object: &Value, application: &str) -> Option<RevisionRow> {
        let revision = number(object)?;
        if text(object, "/metadata/name") != object_name(application, revision) {
            return None;
        }
        let content: Value = serde_json::from_str(text(object, "/data/application.json")).ok()?;
        let status = text(object, "/metadata/annotations/pipeops.io~1status");
        Some(RevisionRow {
            revision,
            status: json::read(status).ok()?,
            image: text(&content, "/image").to_owned(),
        })
    }
}

/// Number of a revision.
fn number(object: &Value) -> Option<u32> {
    text(object, "/metadata/labels/pipeops.io~1revision").parse().ok()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn deployment(name: &str, replicas: u32, ready: u32) -> Value {
        json!({
            "kind": "Deployment",
            "metadata": {"name": name, "namespace": "beta", "generation": 1},
            "spec": {"replicas": replicas, "template": {"spec": {
                "containers": [{"image": format!("{name}:1")}]
            }}},
            "status": {
                "observedGeneration": 1, "replicas": replicas, "updatedReplicas": replicas,
                "readyReplicas": ready, "availableReplicas": ready
            }
        })
    }

    #[test]
    fn a_row_tells_what_an_application_is_and_how() {
        let deployments =
            [deployment("web", 2, 2), deployment("api", 2, 1), deployment("off", 0, 0)];
        let revision = |name: &str, number: &str| {
            json!({"metadata": {"namespace": "beta", "labels": {
                "pipeops.io/application": name, "pipeops.io/revision": number
            }}})
        };
        let revisions = [revision("web", "9"), revision("web", "10"), revision("api", "1")];
        let ways_in = [
            json!({"metadata": {"namespace": "beta", "name": "web"},
                "spec": {"rules": [{"host": "web.example"}]}}),
            json!({"metadata": {"namespace": "beta", "name": "api"},
                "spec": {"hostnames": ["api.example"]}}),
        ];
        let rows = rows(&deployments, &revisions, &ways_in);
        let short: Vec<_> = rows
            .iter()
            .map(|r| (r.name.as_str(), r.revision, r.ready, r.host.as_str(), r.state))
            .collect();
        assert_eq!(
            short,
            [
                ("api", Some(1), 1, "api.example", "rolling out"),
                ("off", None, 0, "", "stopped"),
                ("web", Some(10), 2, "web.example", "ready"),
            ]
        );
        assert_eq!(rows[2].image, "web:1");
        assert!(rows[0].note.contains('1'), "{}", rows[0].note);
    }

    #[test]
    fn a_revision_is_read_from_its_config_map() {
        let status = json!({"state": "deployed", "subject": "user:eve", "rollback_to": 2});
        let mut object = json!({
            "metadata": {
                "name": "web.revision-3", "labels": {"pipeops.io/revision": "3"},
                "annotations": {"pipeops.io/status": status.to_string()}
            },
            "data": {"application.json": json!({"image": "web:3", "more": 1}).to_string()}
        });
        let row = RevisionRow::of(&object, "web").unwrap();
        assert_eq!((row.revision, row.image.as_str()), (3, "web:3"));
        let shown = json!(row);
        assert_eq!(
            (&shown["state"], &shown["subject"], &shown["rollback_to"]),
            (&json!("deployed"), &json!("user:eve"), &json!(2))
        );
        assert_eq!(RevisionRow::of(&object, "other"), None);
        object["metadata"]["labels"] = json!({});
        assert_eq!(RevisionRow::of(&object, "web"), None);
    }

    #[test]
    fn items_of_a_list_know_their_kind() {
        let list = json!({"kind": "DeploymentList", "items": [{"metadata": {"name": "a"}}]});
        assert_eq!(items(list, "Deployment")[0]["kind"], "Deployment");
        assert!(items(json!("text"), "Deployment").is_empty());
        let part = json!({"metadata": {"continue": "a+b/c="}, "items": []});
        assert_eq!(rest_of(&part).as_deref(), Some("&continue=a%2Bb%2Fc%3D"));
        assert_eq!(rest_of(&json!({"metadata": {"continue": ""}})), None);
    }
}
