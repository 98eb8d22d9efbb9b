//! How far an object is on its way to the state that was asked for, as kubectl tells it.

use serde_json::Value;

/// How far the rollout of an object is.
#[derive(Debug, PartialEq, Eq)]
pub enum RolloutStatus {
    Complete,
    /// What is still missing.
    InProgress(String),
    Failed(String),
}

/// As `kubectl rollout status` and `kubectl wait` judge (kubernetes/kubectl
/// `pkg/polymorphichelpers/rollout_status.go`).
pub fn rollout_status(object: &Value) -> RolloutStatus {
    let (spec, status) = (&object["spec"], &object["status"]);
    let number = |v: &Value| v.as_u64().unwrap_or(0);
    let condition = |kind: &str| {
        status["conditions"].as_array().into_iter().flatten().find(|c| c["type"] == kind)
    };
    let seen = object["metadata"]["generation"].is_null()
        || number(&status["observedGeneration"]) >= number(&object["metadata"]["generation"]);
    let counted = |done: u64, wanted: u64, what: &str| {
        if !seen {
            RolloutStatus::InProgress("its controller has not seen it yet".into())
        } else if done >= wanted {
            RolloutStatus::Complete
        } else {
            RolloutStatus::InProgress(format!("{done} of {wanted} {what}"))
        }
    };
    let replicas = spec["replicas"].as_u64().unwrap_or(1);
    match object["kind"].as_str().unwrap_or_default() {
        "Deployment" => {
            if seen
                && condition("Progressing")
                    .is_some_and(|c| c["reason"] == "ProgressDeadlineExceeded")
            {
                return RolloutStatus::Failed(
                    "it made no progress within its progressDeadlineSeconds".into(),
                );
            }
            match counted(number(&status["updatedReplicas"]), replicas, "pods updated") {
                RolloutStatus::Complete
                    if number(&status["replicas"]) > number(&status["updatedReplicas"]) =>
                {
                    RolloutStatus::InProgress("former pods are still ending".into())
                }
                RolloutStatus::Complete => {
                    counted(number(&status["availableReplicas"]), replicas, "pods available")
                }
                not => not,
            }
        }
        "StatefulSet" => {
            // with another strategy its pods are renewed by hand
            let rolling = spec["updateStrategy"]["type"] != "OnDelete";
            let kept = number(&spec["updateStrategy"]["rollingUpdate"]["partition"]).min(replicas);
            match counted(number(&status["readyReplicas"]), replicas, "pods ready") {
                RolloutStatus::Complete
                    if rolling && status["updateRevision"] != status["currentRevision"] =>
                {
                    counted(number(&status["updatedReplicas"]), replicas - kept, "pods updated")
                }
                judged => judged,
            }
        }
        "DaemonSet" => {
            let wanted = number(&status["desiredNumberScheduled"]);
            match counted(number(&status["updatedNumberScheduled"]), wanted, "pods updated") {
                RolloutStatus::Complete => {
                    counted(number(&status["numberAvailable"]), wanted, "pods available")
                }
                not => not,
            }
        }
        "Job" => {
            let is = |kind: &str| condition(kind).is_some_and(|c| c["status"] == "True");
            if is("Failed") {
                RolloutStatus::Failed("the job failed".into())
            } else if is("Complete") {
                RolloutStatus::Complete
            } else {
                RolloutStatus::InProgress("the job runs".into())
            }
        }
        _ => RolloutStatus::Complete,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn an_object_is_ready_when_kubectl_would_say_so() {
        let deployment = |status: Value| {
            json!({
                "kind": "Deployment", "metadata": {"generation": 2}, "spec": {"replicas": 2},
                "status": status
            })
        };
        let missing = |object: &Value| match rollout_status(object) {
            RolloutStatus::InProgress(why) | RolloutStatus::Failed(why) => why,
            RolloutStatus::Complete => "ready".into(),
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
        assert!(matches!(rollout_status(&stuck), RolloutStatus::Failed(_)));
        let set = json!({
            "kind": "StatefulSet", "metadata": {"generation": 1},
            "spec": {"replicas": 3, "updateStrategy": {"rollingUpdate": {"partition": 2}}},
            "status": {
                "observedGeneration": 1, "readyReplicas": 3, "updatedReplicas": 1,
                "currentRevision": "a", "updateRevision": "b"
            }
        });
        assert_eq!(rollout_status(&set), RolloutStatus::Complete);
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
        assert_eq!(rollout_status(&job("Complete")), RolloutStatus::Complete);
        assert!(matches!(rollout_status(&job("Failed")), RolloutStatus::Failed(_)));
        assert!(matches!(rollout_status(&json!({"kind": "Job"})), RolloutStatus::InProgress(_)));
        assert_eq!(rollout_status(&json!({"kind": "ConfigMap"})), RolloutStatus::Complete);
    }
}
