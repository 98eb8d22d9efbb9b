//! Readiness, in one place: what is not ready, and why, read from the objects themselves.
//!
//! Every function answers `None` when all is well. Reasons fit on one line; nothing is requested
//! here.

use jiff::Timestamp;
use serde_json::Value;

/// Longest part of a foreign message that is repeated.
const MOST: usize = 240;

fn text<'a>(value: &'a Value, pointer: &str) -> &'a str {
    value.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

fn number(value: &Value, pointer: &str) -> i64 {
    value.pointer(pointer).and_then(Value::as_i64).unwrap_or(0)
}

/// The last line of a message: programs say last why they stopped.
fn brief(message: &str) -> String {
    let line = message.lines().rev().map(str::trim).find(|l| !l.is_empty()).unwrap_or_default();
    let short: String = line.chars().filter(|c| !c.is_control()).take(MOST).collect();
    if line.chars().count() > MOST { format!("{short}…") } else { short }
}

/// Why a Node is not Ready.
pub fn node(node: &Value) -> Option<String> {
    match condition(node, "Ready") {
        Some((state, _)) if state == "True" => None,
        Some((_, message)) if message.is_empty() => Some("the node is not Ready".into()),
        Some((_, message)) => Some(message),
        None => Some("the node has no state yet".into()),
    }
}

/// Why a Node says nothing about the kubelet of this k3s: `version` as the kubelets of k3s report
/// it, `""` for any.
pub fn node_version(node: &Value, version: &str) -> Option<String> {
    let now = text(node, "/status/nodeInfo/kubeletVersion");
    // a kubelet that is not k3s' own has its own numbers
    (!version.is_empty() && now.contains("+k3s") && now != version).then(|| {
        format!("the node still reports {now}: the kubelet of {version} has not reported yet")
    })
}

/// The heartbeats of a kubelet: that of its Ready condition and the renewal of its Lease. The node
/// itself writes both times.
pub type NodeHeartbeats = [Option<Timestamp>; 2];

pub fn heartbeats(node: &Value, lease: Option<&Value>) -> NodeHeartbeats {
    let ready = node["status"]["conditions"]
        .as_array()
        .and_then(|all| all.iter().find(|c| c["type"] == "Ready"));
    let times =
        [ready.map(|c| text(c, "/lastHeartbeatTime")), lease.map(|l| text(l, "/spec/renewTime"))];
    times.map(|t| t.and_then(|t| t.parse().ok()))
}

/// Whether a sign of life is of the process that was started at `started`, all by this node's
/// clock. Where the clock was set back since, an older sign looks like one from the future: it
/// proves nothing.
pub fn is_current(heartbeats: NodeHeartbeats, started: Option<Timestamp>, now: Timestamp) -> bool {
    let Some(started) = started else { return true };
    let mut seen = heartbeats.into_iter().flatten().peekable();
    seen.peek().is_none() || seen.any(|at| at > started && at.duration_since(now).as_secs() <= 30)
}

/// Why a Deployment or StatefulSet is not ready, without its pods.
pub fn replicas(object: &Value) -> Option<String> {
    let wanted = object["spec"]["replicas"].as_i64().unwrap_or(1);
    let have = number(object, "/status/readyReplicas");
    if have >= wanted
        && number(object, "/status/observedGeneration") >= number(object, "/metadata/generation")
    {
        return None;
    }
    let mut why = format!("{have} of {wanted} pods are ready");
    // quota, Pod Security and the like keep pods from being made at all
    if let Some((state, message)) = condition(object, "ReplicaFailure")
        && state == "True"
    {
        why = format!("{why}: {}", brief(&message));
    }
    Some(why)
}

/// The labels by which a Deployment or StatefulSet finds its pods, as a selector of the API; `None`
/// where it has no plain ones.
pub fn selector(object: &Value) -> Option<String> {
    let labels = object["spec"]["selector"]["matchLabels"].as_object().filter(|l| !l.is_empty())?;
    let pairs: Vec<String> =
        labels.iter().filter_map(|(k, v)| Some(format!("{k}={}", v.as_str()?))).collect();
    Some(pairs.join(","))
}

/// Why pods do not run, by the most telling one; `None` while they are starting.
pub fn pods(pods: &[Value]) -> Option<String> {
    let alive = pods.iter().filter(|p| p["metadata"]["deletionTimestamp"].is_null());
    alive.filter_map(pod).max_by_key(|(weight, _)| *weight).map(|(_, why)| why)
}

/// What is wrong with a pod, and how much that explains.
fn pod(pod: &Value) -> Option<(u8, String)> {
    let name = text(pod, "/metadata/name");
    let scheduled = condition(pod, "PodScheduled");
    if let Some((state, message)) = &scheduled
        && state == "False"
    {
        return Some((3, format!("no node takes {name}: {}", brief(message))));
    }
    if text(pod, "/status/phase") == "Failed" {
        let why = [text(pod, "/status/reason"), text(pod, "/status/message")]
            .into_iter()
            .filter(|t| !t.is_empty())
            .collect::<Vec<_>>()
            .join(": ");
        if !why.is_empty() {
            return Some((2, format!("{name} failed: {}", brief(&why))));
        }
    }
    let lists = ["/status/initContainerStatuses", "/status/containerStatuses"];
    let all = lists.iter().filter_map(|l| pod.pointer(l).and_then(Value::as_array)).flatten();
    all.filter_map(|c| container(name, c)).max_by_key(|(weight, _)| *weight)
}

fn container(pod: &str, state: &Value) -> Option<(u8, String)> {
    let (waiting, message) =
        (text(state, "/state/waiting/reason"), brief(text(state, "/state/waiting/message")));
    let restarts = number(state, "/restartCount");
    // how it ended: this time, or the last
    let ended = [&state["state"]["terminated"], &state["lastState"]["terminated"]]
        .into_iter()
        .find(|t| t.is_object() && number(t, "/exitCode") != 0);
    let end = ended.map(|t| {
        let said = brief(text(t, "/message"));
        let reason = text(t, "/reason");
        let reason =
            if matches!(reason, "" | "Error") { String::new() } else { format!(" ({reason})") };
        format!(
            "exit code {}{reason}{}",
            number(t, "/exitCode"),
            if said.is_empty() { String::new() } else { format!(": {said}") }
        )
    });
    let again = if restarts > 0 { format!(", restarted {restarts} times") } else { String::new() };
    match (waiting, end) {
        ("" | "ContainerCreating" | "PodInitializing", None) => None,
        ("CrashLoopBackOff", Some(end)) => {
            Some((5, format!("{pod} ends again and again (CrashLoopBackOff{again}): {end}")))
        }
        ("CrashLoopBackOff", None) => {
            Some((5, format!("{pod} ends again and again (CrashLoopBackOff{again})")))
        }
        ("" | "ContainerCreating" | "PodInitializing", Some(end)) => {
            Some((4, format!("{pod} ended{again}: {end}")))
        }
        (reason, _) if message.is_empty() => Some((5, format!("{pod}: {reason}{again}"))),
        (reason, _) => Some((5, format!("{pod}: {reason}{again}: {message}"))),
    }
}

/// The condition `kind` of an object: its status and message.
pub fn condition(object: &Value, kind: &str) -> Option<(String, String)> {
    let found = object["status"]["conditions"].as_array()?.iter().find(|c| c["type"] == kind)?;
    let text = |key: &str| found[key].as_str().unwrap_or_default().to_owned();
    Some((text("status"), text("message")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn with(status: Value) -> Value {
        json!({"metadata": {"name": "web-1"}, "status": status})
    }

    fn assert_reasons(cases: impl IntoIterator<Item = (Value, &'static str)>) {
        for (status, wanted) in cases {
            assert_eq!(pods(&[with(json!({})), with(status)]).as_deref(), Some(wanted));
        }
    }

    #[test]
    fn a_pod_says_what_ended_it() {
        let crash = json!({
            "restartCount": 7,
            "state": {
                "waiting": {"reason": "CrashLoopBackOff", "message": "back-off 5m0s restarting"}
            },
            "lastState": {
                "terminated": {
                    "exitCode": 1, "reason": "Error",
                    "message": "line one\nError: INSTALLATION FAILED: no repo\n"
                }
            }
        });
        let oom = json!({
            "restartCount": 2, "state": {"waiting": {"reason": "CrashLoopBackOff"}},
            "lastState": {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}
        });
        let pull = json!({
            "state": {
                "waiting": {
                    "reason": "ImagePullBackOff", "message": "Back-off pulling image \"x\""
                }
            }
        });
        let between =
            json!({"restartCount": 1, "state": {"terminated": {"exitCode": 2, "reason": "Error"}}});
        assert_reasons([
            (
                json!({"containerStatuses": [crash]}),
                "web-1 ends again and again (CrashLoopBackOff, restarted 7 times): exit code 1: \
                 Error: INSTALLATION FAILED: no repo",
            ),
            (
                json!({"containerStatuses": [oom]}),
                "web-1 ends again and again (CrashLoopBackOff, restarted 2 times): exit code 137 \
                 (OOMKilled)",
            ),
            (
                json!({
                    "initContainerStatuses": [pull],
                    "containerStatuses": [{"state": {"waiting": {"reason": "PodInitializing"}}}]
                }),
                "web-1: ImagePullBackOff: Back-off pulling image \"x\"",
            ),
            (
                json!({"containerStatuses": [between]}),
                "web-1 ended, restarted 1 times: exit code 2",
            ),
        ]);
    }

    #[test]
    fn a_pod_says_what_keeps_it() {
        assert_reasons([
            (
                json!({
                    "containerStatuses": [{
                        "state": {
                            "waiting": {
                                "reason": "CreateContainerConfigError",
                                "message": "secret \"s\" not found"
                            }
                        }
                    }]
                }),
                "web-1: CreateContainerConfigError: secret \"s\" not found",
            ),
            (
                json!({
                    "containerStatuses": [{"state": {"waiting": {"reason": "InvalidImageName"}}}]
                }),
                "web-1: InvalidImageName",
            ),
            (
                json!({
                    "conditions": [{
                        "type": "PodScheduled", "status": "False", "reason": "Unschedulable",
                        "message": "0/1 nodes are available: 1 Insufficient memory."
                    }]
                }),
                "no node takes web-1: 0/1 nodes are available: 1 Insufficient memory.",
            ),
            (
                json!({
                    "phase": "Failed", "reason": "Evicted",
                    "message": "The node was low on resource: memory."
                }),
                "web-1 failed: Evicted: The node was low on resource: memory.",
            ),
        ]);
        let fine = [
            json!({
                "phase": "Running",
                "containerStatuses": [{"restartCount": 3, "ready": true, "state": {"running": {}}}]
            }),
            json!({
                "phase": "Pending",
                "containerStatuses": [{"state": {"waiting": {"reason": "ContainerCreating"}}}]
            }),
            json!({
                "phase": "Succeeded",
                "containerStatuses": [{"state": {"terminated": {"exitCode": 0}}}]
            }),
            json!({}),
        ];
        for status in fine {
            assert_eq!(pods(&[with(status.clone())]), None, "{status}");
        }
        let mut going = with(
            json!({"containerStatuses": [{"state": {"waiting": {"reason": "ErrImagePull"}}}]}),
        );
        going["metadata"]["deletionTimestamp"] = json!("2026-11-27T05:00:00Z");
        assert_eq!(pods(&[going]), None, "a pod that goes is no trouble");
    }

    #[test]
    fn a_deployment_is_judged_by_what_it_wants() {
        let of = |spec: Value, status: Value| {
            json!({
                "metadata": {"generation": 2}, "spec": spec, "status": status
            })
        };
        assert_eq!(
            replicas(&of(
                json!({"replicas": 2}),
                json!({"readyReplicas": 2, "observedGeneration": 2})
            )),
            None
        );
        assert_eq!(replicas(&of(json!({"replicas": 0}), json!({"observedGeneration": 2}))), None);
        assert_eq!(
            replicas(&of(json!({}), json!({"readyReplicas": 1, "observedGeneration": 1}))).unwrap(),
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
            replicas(&of(json!({}), refused)).unwrap(),
            "0 of 1 pods are ready: pods \"x\" is forbidden: exceeded quota"
        );
        assert_eq!(
            selector(&json!({"spec": {"selector": {"matchLabels": {"app": "x", "k8s": "y"}}}}))
                .unwrap(),
            "app=x,k8s=y"
        );
        assert_eq!(selector(&json!({})), None);
    }

    #[test]
    fn a_sign_of_life_is_of_this_start_or_none() {
        let at = |second: i64| Timestamp::from_second(1_790_000_000 + second).unwrap();
        let (now, start) = (at(100), Some(at(50)));
        let one = |at| [Some(at), None];
        assert!(
            !is_current(one(at(49)), start, now)
                && !is_current(one(at(50)), start, now)
                && is_current(one(at(51)), start, now)
        );
        assert!(
            is_current([Some(at(1)), Some(at(51))], start, now)
                && is_current([Some(at(51)), Some(at(1))], start, now)
        );
        assert!(
            !is_current([Some(at(3600)), Some(at(3600))], start, now),
            "the clock was set back since"
        );
        assert!(
            is_current(one(at(110)), start, now)
                && is_current([None, None], start, now)
                && is_current(one(at(1)), None, now)
        );
        let node = json!({
            "status": {
                "conditions": [{
                    "type": "Ready", "status": "True", "lastHeartbeatTime": "2026-09-21T13:46:40Z"
                }],
                "nodeInfo": {"kubeletVersion": "v1.34.1+k3s1"}
            }
        });
        let lease = json!({"spec": {"renewTime": "2026-09-21T13:47:00.123456Z"}});
        assert!(
            matches!(heartbeats(&node, Some(&lease)), [Some(at), Some(renewed)] if renewed > at)
        );
        assert_eq!(heartbeats(&json!({}), None), [None, None]);
        assert_eq!((node_version(&node, "v1.34.1+k3s1"), node_version(&node, "")), (None, None));
        assert!(
            node_version(&node, "v1.35.0+k3s1").unwrap().contains("still reports v1.34.1+k3s1")
        );
        assert_eq!(
            node_version(
                &json!({"status": {"nodeInfo": {"kubeletVersion": "v1.20.2"}}}),
                "v1.35.0+k3s1"
            ),
            None
        );
    }
}
