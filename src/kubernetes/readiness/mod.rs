//! Readiness, in one place: what is not ready, and why, read from the objects themselves. Nothing
//! is requested here, and reasons fit on one line.
//!
//! Two questions are asked of a workload:
//!
//! - Does it serve? [`workload::problem`]: as many pods are ready as it wants, whichever template
//!   they were made from. The installer waits for that, the agent counts and reports it.
//! - Has the change arrived? [`rollout::status`]: the pods are made from the template as it is now,
//!   the former ones are gone, and the new ones stayed ready. Operations wait for that.
//!
//! No rule answers both: by the first, an operation would succeed on the pods from before its
//! change; by the second, a Deployment whose pods are replaced one by one would be reported as not
//! ready while it serves. Both count by [`workload::PodCounts`], as the page does. Why its pods do
//! not run is a third question: to the pods alone [`pods::problem`], and with events and for
//! programs [`diagnosis::diagnose`].
//!
//! The objects stay [`Value`]s: client and watches hold them as such, and a judge looks at a few
//! fields, any of which may be absent. The types of `k8s-openapi` bring code to parse every field
//! of a kind, which grows the binary and what the agent maps of it, and one field of another type
//! than they expect would leave the object without a judge.

use serde_json::Value;

pub mod diagnosis;
pub mod node;
pub mod pods;
pub mod rollout;
pub mod workload;

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

/// What an object says of itself in one of its conditions; what it leaves out is empty.
pub struct Condition<'a> {
    /// `True`, `False` or `Unknown`.
    pub status: &'a str,
    pub reason: &'a str,
    pub message: &'a str,
    /// RFC 3339; Nodes only.
    pub last_heartbeat: &'a str,
}

impl Condition<'_> {
    pub fn is_true(&self) -> bool {
        self.status == "True"
    }
}

/// The condition `kind` of an object, once it is reported.
pub fn condition<'a>(object: &'a Value, kind: &str) -> Option<Condition<'a>> {
    let found = object["status"]["conditions"].as_array()?.iter().find(|c| c["type"] == kind)?;
    Some(Condition {
        status: text(found, "/status"),
        reason: text(found, "/reason"),
        message: text(found, "/message"),
        last_heartbeat: text(found, "/lastHeartbeatTime"),
    })
}
