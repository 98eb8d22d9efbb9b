//! How far a change of an object is on its way to its pods, as kubectl tells it.

use serde_json::Value;

use super::workload::{PodCounts, WorkloadKind, is_observed};
use super::{brief, condition, number};

/// How far the rollout of an object is.
#[derive(Debug, PartialEq, Eq)]
pub enum RolloutStatus {
    Complete,
    /// What is still missing.
    InProgress(String),
    Failed(String),
}

/// Whether objects of a kind need time after a change; the others are complete at once.
pub fn has_rollout(kind: &str) -> bool {
    kind == "Job" || WorkloadKind::of(kind).is_some()
}

/// As `kubectl rollout status` and `kubectl wait` judge (kubernetes/kubectl
/// `pkg/polymorphichelpers/rollout_status.go`).
pub fn status(object: &Value) -> RolloutStatus {
    let kind = object["kind"].as_str().unwrap_or_default();
    match WorkloadKind::of(kind) {
        Some(workload) => of_workload(workload, object),
        None if kind == "Job" => of_job(object),
        None => RolloutStatus::Complete,
    }
}

fn of_workload(kind: WorkloadKind, object: &Value) -> RolloutStatus {
    if !is_observed(object) {
        return RolloutStatus::InProgress("its controller has not seen it yet".into());
    }
    let missing = |done: i64, wanted: i64, what: &str| {
        (done < wanted).then(|| format!("{done} of {wanted} {what}"))
    };
    let PodCounts { wanted, present, updated, ready, available } = PodCounts::of(kind, object);
    let unfinished = match kind {
        WorkloadKind::Deployment => {
            if condition(object, "Progressing")
                .is_some_and(|progress| progress.reason == "ProgressDeadlineExceeded")
            {
                return RolloutStatus::Failed(
                    "it made no progress within its progressDeadlineSeconds".into(),
                );
            }
            missing(updated, wanted, "pods updated")
                .or_else(|| (present > updated).then(|| "former pods are still ending".into()))
                .or_else(|| missing(available, wanted, "pods available"))
        }
        WorkloadKind::StatefulSet => {
            // with another strategy its pods are renewed by hand
            let rolling = object["spec"]["updateStrategy"]["type"] != "OnDelete"
                && object["status"]["updateRevision"] != object["status"]["currentRevision"];
            let kept = number(object, "/spec/updateStrategy/rollingUpdate/partition").min(wanted);
            missing(ready, wanted, "pods ready").or_else(|| {
                if rolling { missing(updated, wanted - kept, "pods updated") } else { None }
            })
        }
        WorkloadKind::DaemonSet => missing(updated, wanted, "pods updated")
            .or_else(|| missing(available, wanted, "pods available")),
    };
    unfinished.map_or(RolloutStatus::Complete, RolloutStatus::InProgress)
}

fn of_job(job: &Value) -> RolloutStatus {
    let is = |kind: &str| condition(job, kind).is_some_and(|c| c.is_true());
    if is("Failed") {
        let why = condition(job, "Failed").map(|c| brief(c.message)).unwrap_or_default();
        RolloutStatus::Failed(match why.as_str() {
            "" => "the job failed".into(),
            why => format!("the job failed: {why}"),
        })
    } else if is("Complete") {
        RolloutStatus::Complete
    } else {
        RolloutStatus::InProgress("the job runs".into())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn missing(object: &Value) -> String {
        match status(object) {
            RolloutStatus::InProgress(why) => why,
            RolloutStatus::Failed(why) => format!("failed: {why}"),
            RolloutStatus::Complete => "ready".into(),
        }
    }

    #[test]
    fn an_object_is_ready_when_kubectl_would_say_so() {
        let deployment = |status: Value| {
            json!({
                "kind": "Deployment", "metadata": {"generation": 2}, "spec": {"replicas": 2},
                "status": status
            })
        };
        for (status, wanted) in [
            (json!({}), "not seen"),
            (
                json!({
                    "observedGeneration": 1, "updatedReplicas": 2, "replicas": 2,
                    "availableReplicas": 2
                }),
                "not seen",
            ),
            (
                json!({"observedGeneration": 2, "updatedReplicas": 1, "replicas": 2}),
                "1 of 2 pods updated",
            ),
            (
                json!({
                    "observedGeneration": 2, "updatedReplicas": 2, "replicas": 3,
                    "availableReplicas": 3
                }),
                "former pods",
            ),
            (
                json!({
                    "observedGeneration": 2, "updatedReplicas": 2, "replicas": 2,
                    "availableReplicas": 1
                }),
                "1 of 2 pods available",
            ),
            (
                json!({
                    "observedGeneration": 2, "updatedReplicas": 2, "replicas": 2,
                    "availableReplicas": 2
                }),
                "ready",
            ),
        ] {
            let said = missing(&deployment(status));
            assert!(said.contains(wanted), "{said}");
        }
        let stuck = deployment(json!({
            "observedGeneration": 2,
            "conditions": [{"type": "Progressing", "reason": "ProgressDeadlineExceeded"}]
        }));
        assert!(matches!(status(&stuck), RolloutStatus::Failed(_)));
        let set = json!({
            "kind": "StatefulSet", "metadata": {"generation": 1},
            "spec": {"replicas": 3, "updateStrategy": {"rollingUpdate": {"partition": 2}}},
            "status": {
                "observedGeneration": 1, "readyReplicas": 3, "updatedReplicas": 1,
                "currentRevision": "a", "updateRevision": "b"
            }
        });
        assert_eq!(status(&set), RolloutStatus::Complete);
        let daemons = json!({
            "kind": "DaemonSet", "metadata": {"generation": 1},
            "status": {
                "observedGeneration": 1, "desiredNumberScheduled": 2, "updatedNumberScheduled": 2,
                "numberAvailable": 1
            }
        });
        assert_eq!(missing(&daemons), "1 of 2 pods available");
        let job = |kind: &str| {
            json!({
                "kind": "Job", "status": {"conditions": [{"type": kind, "status": "True"}]}
            })
        };
        assert_eq!(status(&job("Complete")), RolloutStatus::Complete);
        assert!(matches!(status(&job("Failed")), RolloutStatus::Failed(_)));
        assert!(matches!(status(&json!({"kind": "Job"})), RolloutStatus::InProgress(_)));
        assert_eq!(status(&json!({"kind": "ConfigMap"})), RolloutStatus::Complete);
    }
    #[test]
    fn a_paused_deployment_is_not_finished() {
        let paused = |updated: i64| {
            json!({
                "kind": "Deployment", "metadata": {"generation": 3},
                "spec": {"replicas": 2, "paused": true},
                "status": {
                    "observedGeneration": 3, "replicas": 2, "updatedReplicas": updated,
                    "availableReplicas": 2,
                    "conditions": [
                        {"type": "Progressing", "status": "Unknown", "reason": "DeploymentPaused"}
                    ]
                }
            })
        };
        assert_eq!(missing(&paused(0)), "0 of 2 pods updated");
        assert_eq!(missing(&paused(2)), "ready");
    }

    #[test]
    fn a_stateful_set_is_ready_when_the_pods_above_its_partition_are_renewed() {
        let set = |strategy: Value, ready: i64, updated: i64, revision: &str| {
            missing(&json!({
                "kind": "StatefulSet", "metadata": {"generation": 1},
                "spec": {"replicas": 3, "updateStrategy": strategy},
                "status": {
                    "observedGeneration": 1, "readyReplicas": ready, "updatedReplicas": updated,
                    "currentRevision": "a", "updateRevision": revision
                }
            }))
        };
        let rolling = || json!({"type": "RollingUpdate"});
        let from = |partition: i64| {
            let mut strategy = rolling();
            strategy["rollingUpdate"] = json!({"partition": partition});
            strategy
        };
        let on_delete = || json!({"type": "OnDelete"});
        for (strategy, ready, updated, revision, wanted) in [
            (rolling(), 2, 3, "b", "2 of 3 pods ready"),
            (rolling(), 3, 2, "b", "2 of 3 pods updated"),
            (rolling(), 3, 3, "b", "ready"),
            // a rollout that is over counts no updated pods
            (rolling(), 3, 0, "a", "ready"),
            (from(2), 3, 0, "b", "0 of 1 pods updated"),
            (from(2), 3, 1, "b", "ready"),
            (from(9), 3, 0, "b", "ready"),
            (on_delete(), 3, 0, "b", "ready"),
            (on_delete(), 2, 0, "b", "2 of 3 pods ready"),
        ] {
            let case = format!("{strategy} {ready} {updated} {revision}");
            assert_eq!(set(strategy, ready, updated, revision), wanted, "{case}");
        }
        let unseen = json!({
            "kind": "StatefulSet", "metadata": {"generation": 2}, "spec": {"replicas": 0},
            "status": {"observedGeneration": 1}
        });
        assert_eq!(missing(&unseen), "its controller has not seen it yet");
    }

    #[test]
    fn a_daemon_set_is_ready_when_each_node_has_a_new_pod_that_is_available() {
        for (observed, desired, updated, available, wanted) in [
            (1, 3, 3, 3, "its controller has not seen it yet"),
            (2, 3, 2, 3, "2 of 3 pods updated"),
            (2, 3, 3, 2, "2 of 3 pods available"),
            (2, 3, 3, 3, "ready"),
            (2, 0, 0, 0, "ready"),
        ] {
            let daemons = json!({
                "kind": "DaemonSet", "metadata": {"generation": 2},
                "status": {
                    "observedGeneration": observed, "desiredNumberScheduled": desired,
                    "updatedNumberScheduled": updated, "numberAvailable": available
                }
            });
            assert_eq!(missing(&daemons), wanted, "{daemons}");
        }
    }

    #[test]
    fn a_job_is_ready_when_a_condition_says_so() {
        let condition = |kind: &str, status: &str| json!({"type": kind, "status": status});
        for (conditions, wanted) in [
            (json!([]), "the job runs"),
            (json!([condition("Complete", "False")]), "the job runs"),
            (json!([condition("FailureTarget", "True")]), "the job runs"),
            (
                json!([condition("SuccessCriteriaMet", "True"), condition("Complete", "True")]),
                "ready",
            ),
            (json!([condition("Failed", "True")]), "failed: the job failed"),
        ] {
            let job = json!({
                "kind": "Job", "status": {"succeeded": 1, "conditions": conditions}
            });
            assert_eq!(missing(&job), wanted, "{job}");
        }
    }

    #[test]
    fn kinds_without_a_rollout_are_not_waited_for() {
        for kind in ["Deployment", "StatefulSet", "DaemonSet", "Job"] {
            assert!(has_rollout(kind), "{kind}");
        }
        for kind in ["ConfigMap", "CronJob", "Pod", "ReplicaSet", ""] {
            assert!(!has_rollout(kind), "{kind}");
            assert_eq!(status(&json!({"kind": kind})), RolloutStatus::Complete, "{kind}");
        }
    }
}
