//! Why pods do not run.

use serde_json::Value;

use super::{Condition, brief, condition, number, text};

/// What keeps a pod from running, in the order of how much it explains: the last one most. What is
/// told apart more finely gets a variant of its own.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Cause {
    /// The pod ended as a whole: it was evicted, its node shut down.
    Failed,
    Unschedulable,
    /// A container ended badly.
    Ended,
    /// The kubelet names what a container waits for: an image, its configuration, the back-off
    /// after one crash too many.
    Waiting,
}

/// Whether a pod runs, ready or not.
pub fn is_running(pod: &Value) -> bool {
    text(pod, "/status/phase") == "Running"
}

/// Whether a pod is past its readiness probes.
pub fn is_ready(pod: &Value) -> bool {
    condition(pod, "Ready").is_some_and(|ready| ready.is_true())
}

/// Whether a pod is being deleted: what keeps it from running is of no matter.
pub(super) fn is_leaving(pod: &Value) -> bool {
    !pod["metadata"]["deletionTimestamp"].is_null()
}

/// Why no node takes a pod, where that is so.
pub(super) fn unscheduled(pod: &Value) -> Option<Condition<'_>> {
    condition(pod, "PodScheduled").filter(|scheduled| scheduled.status == "False")
}

/// The states of a pod's containers, those that prepare it first.
pub(super) fn containers(pod: &Value) -> impl Iterator<Item = &Value> {
    let lists = ["/status/initContainerStatuses", "/status/containerStatuses"];
    lists.into_iter().filter_map(move |l| pod.pointer(l).and_then(Value::as_array)).flatten()
}

/// How a container ended, this time or else the last, where that was no success.
pub(super) fn bad_end(state: &Value) -> Option<&Value> {
    [&state["state"]["terminated"], &state["lastState"]["terminated"]]
        .into_iter()
        .find(|t| number(t, "/exitCode") != 0)
}

pub(super) fn after_colon(text: &str) -> String {
    if text.is_empty() { String::new() } else { format!(": {text}") }
}

/// Why pods do not run, by the most telling one; `None` while they are starting.
pub fn problem(pods: &[Value]) -> Option<String> {
    let alive = pods.iter().filter(|p| !is_leaving(p));
    alive.filter_map(pod).max_by_key(|(cause, _)| *cause).map(|(_, why)| why)
}

fn pod(pod: &Value) -> Option<(Cause, String)> {
    let name = text(pod, "/metadata/name");
    if let Some(scheduled) = unscheduled(pod) {
        let why = format!("no node takes {name}: {}", brief(scheduled.message));
        return Some((Cause::Unschedulable, why));
    }
    if text(pod, "/status/phase") == "Failed" {
        let why = [text(pod, "/status/reason"), text(pod, "/status/message")]
            .into_iter()
            .filter(|t| !t.is_empty())
            .collect::<Vec<_>>()
            .join(": ");
        if !why.is_empty() {
            return Some((Cause::Failed, format!("{name} failed: {}", brief(&why))));
        }
    }
    containers(pod).filter_map(|c| container(name, c)).max_by_key(|(cause, _)| *cause)
}

fn container(pod: &str, state: &Value) -> Option<(Cause, String)> {
    let restarts = number(state, "/restartCount");
    let again = if restarts > 0 { format!(", restarted {restarts} times") } else { String::new() };
    let end = bad_end(state).map(end_in_words);
    match text(state, "/state/waiting/reason") {
        "" | "ContainerCreating" | "PodInitializing" => {
            end.map(|end| (Cause::Ended, format!("{pod} ended{again}: {end}")))
        }
        "CrashLoopBackOff" => {
            let end = after_colon(&end.unwrap_or_default());
            let why = format!("{pod} ends again and again (CrashLoopBackOff{again}){end}");
            Some((Cause::Waiting, why))
        }
        reason => {
            let message = after_colon(&brief(text(state, "/state/waiting/message")));
            Some((Cause::Waiting, format!("{pod}: {reason}{again}{message}")))
        }
    }
}

fn end_in_words(end: &Value) -> String {
    let reason = match text(end, "/reason") {
        "" | "Error" => String::new(),
        reason => format!(" ({reason})"),
    };
    let said = after_colon(&brief(text(end, "/message")));
    format!("exit code {}{reason}{said}", number(end, "/exitCode"))
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
            assert_eq!(problem(&[with(json!({})), with(status)]).as_deref(), Some(wanted));
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
            assert_eq!(problem(&[with(status.clone())]), None, "{status}");
        }
        let mut going = with(
            json!({"containerStatuses": [{"state": {"waiting": {"reason": "ErrImagePull"}}}]}),
        );
        going["metadata"]["deletionTimestamp"] = json!("2026-11-27T05:00:00Z");
        assert_eq!(problem(&[going]), None, "a pod that goes is no trouble");
    }

    #[test]
    fn a_pod_runs_when_its_phase_says_so() {
        let phases = ["Pending", "Running", "Succeeded", "Failed", "Unknown"];
        let running = phases.map(|phase| is_running(&with(json!({"phase": phase}))));
        assert_eq!(running, [false, true, false, false, false]);
        assert!(!is_running(&with(json!({}))));
    }
}
