//! An application as an administrator sees it in the cluster, past agent and tunnel.

use std::fmt::Write as _;

use serde_json::Value;

use crate::gate::cluster;

/// All objects that carry its label.
pub(crate) struct Seen(Vec<Value>);

impl Seen {
    pub(crate) fn of(name: &str) -> Seen {
        let kinds = "deployments,replicasets,pods,services,configmaps,jobs";
        let list = cluster(&format!("-n production get {kinds} -l pipeops.io/application={name}"));
        Seen(list["items"].as_array().cloned().unwrap_or_default())
    }

    pub(crate) fn kind(&self, kind: &str) -> Vec<&Value> {
        self.0.iter().filter(|object| object["kind"] == kind).collect()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn deployment(&self) -> Value {
        self.kind("Deployment").first().map(|found| (*found).clone()).unwrap_or_default()
    }

    pub(crate) fn generation(&self) -> i64 {
        self.deployment()["metadata"]["generation"].as_i64().unwrap_or(0)
    }

    /// Number and status of each revision that is kept.
    pub(crate) fn revisions(&self) -> Vec<(u64, Value)> {
        let number = |object: &Value| {
            let number = object.pointer("/metadata/labels/pipeops.io~1revision")?.as_str()?;
            let status = object.pointer("/metadata/annotations/pipeops.io~1status")?.as_str()?;
            Some((number.parse().ok()?, serde_json::from_str(status).ok()?))
        };
        let mut all: Vec<(u64, Value)> =
            self.kind("ConfigMap").into_iter().filter_map(number).collect();
        all.sort_by_key(|(number, _)| *number);
        all
    }

    /// The revisions that an operation has made, as `3 deployed`.
    pub(crate) fn made_by(&self, id: &str) -> Vec<String> {
        let all = self.revisions();
        let made = all.iter().filter(|(_, status)| status["operation"] == id);
        made.map(|(n, status)| format!("{n} {}", status["state"].as_str().unwrap_or("?"))).collect()
    }

    /// Whether all its pods are those of its template, and available.
    pub(crate) fn is_complete(&self) -> bool {
        let live = self.deployment();
        let (wanted, status) = (live["spec"]["replicas"].as_i64(), &live["status"]);
        let has = |field: &str| Some(status[field].as_i64().unwrap_or(0)) == wanted;
        wanted.is_some()
            && status["observedGeneration"] == live["metadata"]["generation"]
            && ["replicas", "updatedReplicas", "availableReplicas"].into_iter().all(has)
    }

    /// Jobs that have ended, with the number of pods of each: `1 succeeded, 1 pod`.
    pub(crate) fn jobs(&self) -> Vec<String> {
        let pods = self.kind("Pod");
        let told = |job: &&Value| {
            let name = &job["metadata"]["name"];
            let of =
                |pod: &&&Value| pod["metadata"]["labels"]["batch.kubernetes.io/job-name"] == *name;
            let number = |field: &str| job["status"][field].as_i64().unwrap_or(0);
            format!(
                "{} succeeded, {} failed, {} pods",
                number("succeeded"),
                number("failed"),
                pods.iter().filter(of).count()
            )
        };
        self.kind("Job").iter().map(told).collect()
    }

    /// For whoever has to find out what went wrong.
    pub(crate) fn summary(&self) -> String {
        let mut text = String::new();
        for (number, status) in self.revisions() {
            let _ = write!(text, "revision {number} {}, ", status["state"]);
        }
        let live = self.deployment();
        let _ = write!(
            text,
            "Deployment of generation {} with {} of {} available, {} ReplicaSets, {} Services, \
             Jobs {:?}",
            live["metadata"]["generation"],
            live["status"]["availableReplicas"].as_i64().unwrap_or(0),
            live["spec"]["replicas"],
            self.kind("ReplicaSet").len(),
            self.kind("Service").len(),
            self.jobs()
        );
        text
    }
}
