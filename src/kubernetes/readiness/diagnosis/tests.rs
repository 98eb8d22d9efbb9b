//! What Kubernetes says of each outcome, and what is made of it.

use super::*;
use serde_json::json;

const NEEDS: &str = "pods \"web-7d-x\" is forbidden: ";

/// A pod of one container `web` with this state, and events about it.
fn pod(state: Value, events: &[(&str, &str)]) -> Evidence {
    let mut state = state;
    state["name"] = "web".into();
    state["image"] = "r.test/web:1".into();
    let events = events
        .iter()
        .enumerate()
        .map(|(n, (reason, message))| {
            json!({
                "reason": reason, "message": message, "involvedObject": {"uid": "p"},
                "lastTimestamp": format!("2026-01-01T00:00:{n:02}Z")
            })
        })
        .collect();
    let pod = json!({
        "metadata": {"name": "web-1", "uid": "p"},
        "spec": {"containers": [{"name": "web", "resources": {"limits": {"memory": "64Mi"}}}]},
        "status": {"phase": "Pending", "containerStatuses": [state]}
    });
    Evidence { pods: vec![pod], events, ..Evidence::default() }
}

fn waiting(reason: &str, message: &str) -> Value {
    json!({"state": {"waiting": {"reason": reason, "message": message}}})
}

/// A ReplicaSet whose pods are refused, again a moment ago.
fn refused(message: &str) -> Evidence {
    let condition = json!({
        "type": "ReplicaFailure", "status": "True", "reason": "FailedCreate", "message": message
    });
    let event = json!({
        "reason": "FailedCreate", "message": message, "lastTimestamp": "2026-01-01T00:00:09Z"
    });
    Evidence {
        replica_set: json!({"status": {"conditions": [condition]}}),
        events: vec![event],
        since: "2026-01-01T00:00:05Z".into(),
        ..Evidence::default()
    }
}

fn unscheduled(message: &str) -> Evidence {
    let condition = json!({
        "type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message
    });
    let pod = json!({"metadata": {"name": "web-1"}, "status": {"conditions": [condition]}});
    Evidence { pods: vec![pod], ..Evidence::default() }
}

/// What the cluster shows, the code, and a part of what is said.
type Outcome = (Evidence, &'static str, &'static str);

/// Containers whose image or configuration is not there.
fn images() -> Vec<Outcome> {
    vec![
        (
            pod(
                waiting(
                    "ErrImagePull",
                    "rpc error: code = NotFound desc = failed to pull and unpack image \
                     \"r.test/web:1\": failed to resolve reference \"r.test/web:1\": not found",
                ),
                &[],
            ),
            "image_not_found",
            "the registry does not have the image `r.test/web:1` (container web of pod web-1): rpc",
        ),
        (
            // before 1.32 the kubelet says nothing more while it backs off
            pod(
                waiting("ImagePullBackOff", "Back-off pulling image \"r.test/web:1\""),
                &[(
                    "Failed",
                    "Failed to pull image \"r.test/web:1\": rpc error: code = Unknown desc = \
                     failed to resolve: unexpected status: 401 Unauthorized",
                )],
            ),
            "image_unauthorized",
            "refuses `r.test/web:1`: it is private or does not exist (container web of pod web-1)",
        ),
        (
            pod(
                waiting(
                    "ImagePullBackOff",
                    "Back-off pulling image \"nope\": ErrImagePull: failed to pull: pull access \
                     denied, repository does not exist or may require authorization",
                ),
                &[],
            ),
            "image_unauthorized",
            "pull access denied",
        ),
        (
            pod(waiting("ErrImagePull", "dial tcp: lookup r.test: no such host, not found"), &[]),
            "image_pull_failed",
            "no such host",
        ),
        (
            pod(waiting("InvalidImageName", "x"), &[]),
            "image_name_invalid",
            "is no name of an image",
        ),
        (
            pod(
                waiting(
                    "CreateContainerConfigError",
                    "container has runAsNonRoot and image will run as root (pod: \
                     \"web-1_beta(p)\", container: web)",
                ),
                &[],
            ),
            "runs_as_root",
            "runs as root, and must not",
        ),
        (
            pod(waiting("CreateContainerConfigError", "secret \"db\" not found"), &[]),
            "config_missing",
            "secret \"db\" not found",
        ),
        (
            pod(
                waiting("ContainerCreating", ""),
                &[(
                    "FailedMount",
                    "MountVolume.SetUp failed for volume \"c\" : configmap \"app\" not found",
                )],
            ),
            "config_missing",
            "configmap \"app\" not found",
        ),
    ]
}

/// Containers that end, do not start, or are not ready.
fn containers() -> Vec<Outcome> {
    let crash = json!({
        "restartCount": 3, "state": {"waiting": {"reason": "CrashLoopBackOff", "message":
            "back-off 40s restarting failed container=web pod=web-1_beta(p)"}},
        "lastState": {"terminated": {"exitCode": 1, "reason": "Error"}}
    });
    let killed = json!({
        "restartCount": 1, "state": {"running": {}},
        "lastState": {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}
    });
    let exec = "failed to create containerd task: failed to create shim task: OCI runtime create \
                failed: runc create failed: unable to start container process: error during \
                container init: exec: \"nope\": executable file not found in $PATH";
    let unstarted = json!({
        "restartCount": 2, "state": {"waiting": {"reason": "CrashLoopBackOff"}},
        "lastState": {"terminated": {"exitCode": 128, "reason": "StartError", "message": exec}}
    });
    let live = json!({
        "restartCount": 2, "state": {"running": {}},
        "lastState": {"terminated": {"exitCode": 143, "reason": "Error"}}
    });
    let once = json!({"state": {"terminated": {"exitCode": 3, "reason": "Error"}}});
    vec![
        (pod(unstarted, &[]), "command_not_found", "exec: \"nope\": executable file not found"),
        (pod(crash, &[]), "crash_loop", "ends again and again: exit code 1, restarted 3 times"),
        (pod(killed, &[]), "out_of_memory", "more memory than its limit of 64Mi"),
        (pod(once, &[]), "exited_with_error", "container web of pod web-1 ended with exit code 3"),
        (
            pod(
                live,
                &[
                    ("Unhealthy", "Liveness probe failed: HTTP probe failed with statuscode: 500"),
                    ("Killing", "Container web failed liveness probe, will be restarted"),
                ],
            ),
            "probe_failed",
            "is restarted for a failed probe (2 times): Liveness probe failed: HTTP probe",
        ),
        (
            pod(
                json!({"state": {"running": {}}}),
                &[("Unhealthy", "Readiness probe failed: dial tcp 10.42.0.9:80: connect: refused")],
            ),
            "probe_failed",
            "pod web-1 is not ready: Readiness probe failed",
        ),
    ]
}

/// Pods that are not made, or that no node runs.
fn placement() -> Vec<Outcome> {
    vec![
        (
            pod(
                waiting("ContainerCreating", ""),
                &[(
                    "FailedCreatePodSandBox",
                    "plugin type=\"flannel\" failed (add): no subnet.env",
                )],
            ),
            "sandbox_failed",
            "cannot set up the network",
        ),
        (
            unscheduled(
                "0/2 nodes are available: 1 Insufficient cpu, 1 node(s) were unschedulable.",
            ),
            "unschedulable",
            "pod web-1 fits on no node: 0/2 nodes are available: 1 Insufficient cpu",
        ),
        (
            unscheduled(
                "0/1 nodes are available: pod has unbound immediate PersistentVolumeClaims.",
            ),
            "volume_pending",
            "waits for its volume",
        ),
        (
            refused(&format!(
                "{NEEDS}exceeded quota: q, requested: pods=1, used: pods=2, limited: pods=2"
            )),
            "quota_exceeded",
            "exceeded quota: q",
        ),
        (
            refused(&format!(
                "{NEEDS}violates PodSecurity \"baseline:latest\": host namespaces (hostNetwork=true)"
            )),
            "pod_security",
            "Pod Security level refuses the pods",
        ),
        (
            refused(&format!("{NEEDS}maximum memory usage per Container is 1Gi, but limit is 2Gi")),
            "limit_exceeded",
            "LimitRange",
        ),
        (
            refused(
                "Internal error occurred: failed calling webhook \"v.test\": failed to call \
                 webhook: Post \"https://v.test.svc:443/?timeout=10s\": connect: refused",
            ),
            "webhook_failed",
            "does not answer",
        ),
        (
            refused("admission webhook \"v.test\" denied the request: no"),
            "admission_denied",
            "denied the request: no",
        ),
        (
            refused(
                "pods \"w-\" is forbidden: error looking up service account beta/x: \
                 serviceaccount \"x\" not found",
            ),
            "config_missing",
            "serviceaccount \"x\" not found",
        ),
    ]
}

/// Each reason with the words of Kubernetes for it, and what is said.
#[test]
fn each_outcome_has_its_reason() {
    let table = images().into_iter().chain(containers()).chain(placement());
    for (evidence, code, part) in table {
        let cause = diagnose(&evidence).unwrap_or_else(|| panic!("no cause: {evidence:?}"));
        assert_eq!(cause.reason.code(), code, "{cause:?}");
        assert!(cause.message.contains(part), "{part}: {}", cause.message);
        assert_eq!(serde_json::to_value(cause.reason).unwrap(), code);
    }
}

#[test]
fn a_pod_that_only_takes_its_time_has_no_cause() {
    for state in [
        waiting("ContainerCreating", ""),
        waiting("PodInitializing", ""),
        json!({"state": {"running": {}}}),
        json!({"state": {"terminated": {"exitCode": 0, "reason": "Completed"}}}),
    ] {
        let evidence = pod(state, &[("Pulling", "Pulling image"), ("Scheduled", "on vm1")]);
        assert_eq!(diagnose(&evidence), None, "{evidence:?}");
    }
    assert_eq!(diagnose(&Evidence::default()), None);
}

#[test]
fn what_cannot_heal_explains_more_than_the_rest() {
    let mut evidence = pod(waiting("ErrImagePull", "not found"), &[]);
    let root = "container has runAsNonRoot and image will run as root";
    evidence.pods.extend(pod(waiting("CreateContainerConfigError", root), &[]).pods);
    assert_eq!(diagnose(&evidence).unwrap().reason, Reason::RunsAsRoot);
    // pods of before run on, new ones are refused
    let mut evidence = refused(&format!("{NEEDS}violates PodSecurity \"restricted:latest\": x"));
    evidence.pods = pod(waiting("ErrImagePull", "not found"), &[]).pods;
    assert_eq!(diagnose(&evidence).unwrap().reason, Reason::PodSecurity);
    assert!(!Reason::PodSecurity.can_heal() && Reason::CrashLoop.can_heal());
}

#[test]
fn a_refusal_from_before_is_told_and_waited_for() {
    let message = format!("{NEEDS}violates PodSecurity \"restricted:latest\": x");
    let mut evidence = refused(&message);
    assert!(diagnose(&evidence).unwrap().is_final);
    // the namespace may have been corrected since: the controller tries again in its time
    evidence.since = "2026-01-01T00:01:00Z".into();
    let cause = diagnose(&evidence).unwrap();
    assert!(cause.reason == Reason::PodSecurity && !cause.is_final, "{cause:?}");
    evidence.events.clear();
    assert!(!diagnose(&evidence).unwrap().is_final);
    // without such a condition the event says it, as long as there is no pod
    let event = json!({"reason": "FailedCreate", "message": message});
    let mut evidence = Evidence { events: vec![event], ..Evidence::default() };
    assert_eq!(diagnose(&evidence).unwrap().reason, Reason::PodSecurity);
    evidence.pods = pod(waiting("ContainerCreating", ""), &[]).pods;
    assert_eq!(diagnose(&evidence), None);
}

#[test]
fn what_has_healed_keeps_nothing() {
    let mut killed = json!({
        "restartCount": 1, "ready": true, "state": {"running": {}},
        "lastState": {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}
    });
    let unready = [("Unhealthy", "Readiness probe failed: HTTP probe failed")];
    // its container runs well again; what keeps the pod is another one's probe
    assert_eq!(diagnose(&pod(killed.clone(), &unready)).unwrap().reason, Reason::ProbeFailed);
    killed["ready"] = false.into();
    let mut evidence = pod(killed, &[]);
    assert_eq!(diagnose(&evidence).unwrap().reason, Reason::OutOfMemory);
    evidence.pods[0]["status"]["conditions"] = json!([{"type": "Ready", "status": "True"}]);
    assert_eq!(diagnose(&evidence), None, "a pod that is ready");
    // a volume that was mounted in the end
    let late = [("FailedMount", "failed to sync configmap cache"), ("Pulling", "Pulling image")];
    assert_eq!(diagnose(&pod(waiting("ContainerCreating", ""), &late)), None);
    // how a pod ended, while the next one waits
    let mut evidence = unscheduled("0/1 nodes are available: 1 Insufficient cpu.");
    evidence.pods.push(json!({
        "metadata": {"name": "web-0"},
        "status": {"phase": "Failed", "reason": "Evicted", "message": "low on memory"}
    }));
    assert_eq!(diagnose(&evidence).unwrap().reason, Reason::Unschedulable);
    evidence.pods.remove(0);
    assert_eq!(diagnose(&evidence).unwrap().reason, Reason::Evicted);
}

#[test]
fn a_pod_of_the_former_template_ends_nothing() {
    let root = "container's runAsUser breaks non-root policy (pod: \"web-1\", container: web)";
    let mut evidence = pod(waiting("CreateContainerConfigError", root), &[]);
    let cause = diagnose(&evidence).unwrap();
    assert!(cause.reason == Reason::RunsAsRoot && cause.is_final, "{cause:?}");
    evidence.is_former = true;
    let cause = diagnose(&evidence).unwrap();
    assert!(!cause.is_final && cause.message.contains("former template"), "{cause:?}");
}

#[test]
fn the_log_that_says_more_is_named() {
    let crash = json!({
        "restartCount": 3, "state": {"waiting": {"reason": "CrashLoopBackOff"}},
        "lastState": {"terminated": {"exitCode": 1, "reason": "Error"}}
    });
    let runs_again = json!({
        "restartCount": 1, "state": {"running": {}},
        "lastState": {"terminated": {"exitCode": 1, "reason": "Error"}}
    });
    let ended = json!({"state": {"terminated": {"exitCode": 3, "reason": "Error"}}});
    for (state, previous) in [(crash, true), (runs_again, true), (ended, false)] {
        let crashed = diagnose(&pod(state, &[])).unwrap().crashed.unwrap();
        assert_eq!((&*crashed.pod, &*crashed.container), ("web-1", "web"));
        assert_eq!(crashed.previous, previous);
    }
}

#[test]
fn only_pods_of_the_newest_template_count() {
    let owner = |uid: &str| json!([{"uid": uid}]);
    let set = |name: &str, revision: &str, of: &str| {
        json!({"metadata": {
            "name": name, "uid": name, "ownerReferences": owner(of),
            "annotations": {"deployment.kubernetes.io/revision": revision}
        }})
    };
    let sets = [set("old", "9", "d"), set("new", "10", "d"), set("foreign", "11", "other")];
    let newest = newest_replica_set(&json!({"metadata": {"uid": "d"}}), &sets).unwrap();
    assert_eq!(newest["metadata"]["name"], "new");
    let pod = json!({"metadata": {"ownerReferences": owner("new"), "labels": {
        "controller-revision-hash": "w-1", "pod-template-generation": "2"
    }}});
    assert!(is_owned(&pod, newest) && is_of(&pod, newest) && !is_owned(&pod, &sets[0]));
    let stateful = |revision: &str| json!({"metadata": {"uid": "new"}, "status": {"updateRevision": revision}});
    assert!(is_of(&pod, &stateful("w-1")) && !is_of(&pod, &stateful("w-2")));
    let daemons = |number: &str| {
        json!({"metadata": {
            "uid": "new", "annotations": {"deprecated.daemonset.template.generation": number}
        }})
    };
    assert!(is_of(&pod, &daemons("2")) && !is_of(&pod, &daemons("3")));
}

#[test]
fn foreign_text_stays_on_one_line_and_short() {
    let long = format!("a\u{1b}[31m\nb {}", "x".repeat(2000));
    let cause = diagnose(&pod(waiting("ErrImagePull", &long), &[])).unwrap();
    assert!(!cause.message.contains(['\n', '\u{1b}']), "{}", cause.message);
    assert!(cause.message.chars().count() < 600, "{}", cause.message);
}
