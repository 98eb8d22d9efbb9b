//! Whether a Node is ready, and whether what is known of it comes from its kubelet of now.

use jiff::Timestamp;
use serde_json::Value;

use super::{condition, text};

/// Why a Node is not Ready.
pub fn problem(node: &Value) -> Option<String> {
    match condition(node, "Ready") {
        Some(ready) if ready.is_true() => None,
        Some(ready) if ready.message.is_empty() => Some("the node is not Ready".into()),
        Some(ready) => Some(ready.message.to_owned()),
        None => Some("the node has no state yet".into()),
    }
}

/// Why a Node says nothing about the kubelet of this k3s: `version` as the kubelets of k3s report
/// it, `""` for any.
pub fn version_problem(node: &Value, version: &str) -> Option<String> {
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
    let ready = condition(node, "Ready").map(|ready| ready.last_heartbeat);
    let renewed = lease.map(|lease| text(lease, "/spec/renewTime"));
    [ready, renewed].map(|time| time.and_then(|time| time.parse().ok()))
}

/// Whether a sign of life is of the process that was started at `started`, all by this node's
/// clock. Where the clock was set back since, an older sign looks like one from the future: it
/// proves nothing.
pub fn is_current(heartbeats: NodeHeartbeats, started: Option<Timestamp>, now: Timestamp) -> bool {
    let Some(started) = started else { return true };
    let mut seen = heartbeats.into_iter().flatten().peekable();
    seen.peek().is_none() || seen.any(|at| at > started && at.duration_since(now).as_secs() <= 30)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_node_is_ready_when_it_says_so() {
        let node = |conditions: Value| json!({"status": {"conditions": conditions}});
        let ready = |status: &str, message: &str| {
            let kind = "Ready";
            json!({"type": kind, "status": status, "message": message})
        };
        let pressure = json!({"type": "DiskPressure", "status": "True", "message": "disk"});
        for (object, wanted) in [
            (json!({}), Some("the node has no state yet")),
            (node(json!([pressure])), Some("the node has no state yet")),
            (node(json!([pressure, ready("True", "kubelet is posting ready status")])), None),
            (node(json!([ready("False", "cni not initialized")])), Some("cni not initialized")),
            (node(json!([ready("Unknown", "")])), Some("the node is not Ready")),
        ] {
            assert_eq!(problem(&object).as_deref(), wanted, "{object}");
        }
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
        assert_eq!(
            (version_problem(&node, "v1.34.1+k3s1"), version_problem(&node, "")),
            (None, None)
        );
        assert!(
            version_problem(&node, "v1.35.0+k3s1").unwrap().contains("still reports v1.34.1+k3s1")
        );
        assert_eq!(
            version_problem(
                &json!({"status": {"nodeInfo": {"kubeletVersion": "v1.20.2"}}}),
                "v1.35.0+k3s1"
            ),
            None
        );
    }
}
