//! Workloads: how many pods they want and have, and whether that is enough to serve.

use serde_json::Value;

use super::{brief, condition, number};

/// The kinds whose controller keeps pods running. Where objects stand in a list they do not name
/// theirs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WorkloadKind {
    Deployment,
    StatefulSet,
    DaemonSet,
}

impl WorkloadKind {
    pub fn of(kind: &str) -> Option<WorkloadKind> {
        match kind {
            "Deployment" => Some(WorkloadKind::Deployment),
            "StatefulSet" => Some(WorkloadKind::StatefulSet),
            "DaemonSet" => Some(WorkloadKind::DaemonSet),
            _ => None,
        }
    }
}

/// How many pods a workload wants, and how many it has in each state.
#[derive(Debug, PartialEq, Eq)]
pub struct PodCounts {
    pub wanted: i64,
    /// All that are there.
    pub present: i64,
    /// Made from the template as it is now.
    pub updated: i64,
    /// Past their readiness probes.
    pub ready: i64,
    /// Ready for `minReadySeconds`.
    pub available: i64,
}

impl PodCounts {
    pub fn of(kind: WorkloadKind, object: &Value) -> PodCounts {
        let count = |field: &str| object["status"][field].as_i64().unwrap_or(0);
        match kind {
            WorkloadKind::Deployment | WorkloadKind::StatefulSet => PodCounts {
                // the API server fills in 1
                wanted: object["spec"]["replicas"].as_i64().unwrap_or(1),
                present: count("replicas"),
                updated: count("updatedReplicas"),
                ready: count("readyReplicas"),
                available: count("availableReplicas"),
            },
            WorkloadKind::DaemonSet => PodCounts {
                wanted: count("desiredNumberScheduled"),
                present: count("currentNumberScheduled"),
                updated: count("updatedNumberScheduled"),
                ready: count("numberReady"),
                available: count("numberAvailable"),
            },
        }
    }
}

/// How often pods of a Job have ended. One success ends the Job of a chart; whether another one is
/// over only its conditions say: see [`super::rollout::status`].
#[derive(Debug, PartialEq, Eq)]
pub struct JobCounts {
    pub succeeded: i64,
    pub failed: i64,
}

impl JobCounts {
    pub fn of(job: &Value) -> JobCounts {
        JobCounts {
            succeeded: number(job, "/status/succeeded"),
            failed: number(job, "/status/failed"),
        }
    }
}

/// Whether the controller of an object has seen its latest change: until then the status is about
/// the object as it was.
pub fn is_observed(object: &Value) -> bool {
    number(object, "/status/observedGeneration") >= number(object, "/metadata/generation")
}

/// Whether a workload has as many ready pods as it wants.
pub fn serves(kind: WorkloadKind, object: &Value) -> bool {
    let pods = PodCounts::of(kind, object);
    pods.ready >= pods.wanted && is_observed(object)
}

/// Why a workload does not serve, without its pods.
pub fn problem(kind: WorkloadKind, object: &Value) -> Option<String> {
    if serves(kind, object) {
        return None;
    }
    let PodCounts { wanted, ready, .. } = PodCounts::of(kind, object);
    let why = format!("{ready} of {wanted} pods are ready");
    // quota, Pod Security and the like keep pods from being made at all
    Some(match condition(object, "ReplicaFailure") {
        Some(failure) if failure.is_true() => format!("{why}: {}", brief(failure.message)),
        _ => why,
    })
}

/// The labels by which a Deployment or StatefulSet finds its pods, as a selector of the API; `None`
/// where it has no plain ones.
pub fn selector(object: &Value) -> Option<String> {
    let labels = object["spec"]["selector"]["matchLabels"].as_object().filter(|l| !l.is_empty())?;
    let pairs: Vec<String> =
        labels.iter().filter_map(|(k, v)| Some(format!("{k}={}", v.as_str()?))).collect();
    Some(pairs.join(","))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn each_kind_counts_its_pods_in_its_own_fields() {
        let replicas = json!({
            "spec": {"replicas": 5},
            "status": {
                "replicas": 6, "updatedReplicas": 4, "readyReplicas": 3, "availableReplicas": 2
            }
        });
        let daemons = json!({
            "status": {
                "desiredNumberScheduled": 5, "currentNumberScheduled": 6,
                "updatedNumberScheduled": 4, "numberReady": 3, "numberAvailable": 2,
                "numberMisscheduled": 9
            }
        });
        for (name, object, default) in [
            ("Deployment", &replicas, 1),
            ("StatefulSet", &replicas, 1),
            ("DaemonSet", &daemons, 0),
        ] {
            let kind = WorkloadKind::of(name).unwrap();
            let counts = PodCounts { wanted: 5, present: 6, updated: 4, ready: 3, available: 2 };
            assert_eq!(PodCounts::of(kind, object), counts, "{name}");
            let none =
                PodCounts { wanted: default, present: 0, updated: 0, ready: 0, available: 0 };
            assert_eq!(PodCounts::of(kind, &json!({})), none, "{name}");
        }
        assert_eq!(WorkloadKind::of("Job"), None);
        let job = json!({"status": {"succeeded": 1, "failed": 2}});
        assert_eq!(JobCounts::of(&job), JobCounts { succeeded: 1, failed: 2 });
        assert_eq!(JobCounts::of(&json!({})), JobCounts { succeeded: 0, failed: 0 });
    }

    #[test]
    fn a_daemon_set_is_judged_by_the_nodes_that_want_it() {
        let daemons = |ready: i64, observed: i64| {
            let status = json!({
                "desiredNumberScheduled": 3, "numberReady": ready, "observedGeneration": observed
            });
            let object = json!({"metadata": {"generation": 2}, "status": status});
            problem(WorkloadKind::DaemonSet, &object)
        };
        assert_eq!(daemons(2, 2).unwrap(), "2 of 3 pods are ready");
        assert_eq!(daemons(3, 1).unwrap(), "3 of 3 pods are ready");
        assert_eq!(daemons(3, 2), None);
    }

    #[test]
    fn a_deployment_is_judged_by_what_it_wants() {
        let of = |spec: Value, status: Value| {
            json!({
                "metadata": {"generation": 2}, "spec": spec, "status": status
            })
        };
        let replicas_problem = |object: &Value| {
            let of_set = problem(WorkloadKind::StatefulSet, object);
            let found = problem(WorkloadKind::Deployment, object);
            assert_eq!(found, of_set, "{object}");
            found
        };
        assert_eq!(
            replicas_problem(&of(
                json!({"replicas": 2}),
                json!({"readyReplicas": 2, "observedGeneration": 2})
            )),
            None
        );
        assert_eq!(
            replicas_problem(&of(json!({"replicas": 0}), json!({"observedGeneration": 2}))),
            None
        );
        assert_eq!(
            replicas_problem(&of(json!({}), json!({"readyReplicas": 1, "observedGeneration": 1})))
                .unwrap(),
            "1 of 1 pods are ready"
        );
        let refused = json!({
            "observedGeneration": 2,
            "conditions": [{
                "type": "ReplicaFailure", "status": "True",
                "message": "pods \"x\" is forbidden: exceeded quota"
            }]
        });
        assert_eq!(
            replicas_problem(&of(json!({}), refused)).unwrap(),
            "0 of 1 pods are ready: pods \"x\" is forbidden: exceeded quota"
        );
        assert_eq!(
            selector(&json!({"spec": {"selector": {"matchLabels": {"app": "x", "k8s": "y"}}}}))
                .unwrap(),
            "app=x,k8s=y"
        );
        assert_eq!(selector(&json!({})), None);
    }
}
