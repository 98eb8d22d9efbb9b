//! What a rollout does next: from its record and what is seen of its operations, without input or
//! output.

use std::collections::BTreeSet;

use super::{RolloutCluster, RolloutRecord, RolloutState};
use crate::contract::types::OperationState;

/// Most operations that are being sent at once.
pub(super) const MAX_AT_ONCE: usize = 32;

/// An operation that was sent so long ago and that nobody knows any more has ended and was
/// forgotten, seconds: records of operations are kept for a week.
pub(super) const FORGOTTEN: i64 = 6 * 86_400;

/// Why an operation has no end that is known.
pub const DELIVERY_UNKNOWN: &str = "delivery_unknown";
/// Why a rollout is cancelled whose caller may do nothing any more.
const CALLER_REVOKED: &str = "caller_revoked";

/// What is seen of a cluster and its operation.
pub enum Seen {
    /// Its agent was removed or revoked.
    Gone,
    /// The operation is being sent.
    Sending,
    /// It was sent and is refused: reason and message.
    Refused(String, String),
    /// Nobody here knows of an operation.
    Nothing,
    /// Its state, reason and message.
    Operation(OperationState, String, String),
    /// It is queued for an agent that is offline.
    Away,
}

/// What is to be done.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Steps {
    /// The record must be stored, before anything is sent.
    pub changed: bool,
    /// Ids of clusters whose operations are sent.
    pub send: Vec<String>,
    /// Ids of clusters whose operations are queued, and are cancelled.
    pub cancel: Vec<String>,
}

/// Takes in what is seen, and says what is done next. `caller_may`: who asked is still somebody.
pub fn advance(
    record: &mut RolloutRecord,
    caller_may: bool,
    seen: &dyn Fn(&RolloutCluster) -> Seen,
    now: i64,
) -> Steps {
    let mut steps = Steps::default();
    if record.finished_at.is_some() || record.state == RolloutState::Unknown {
        return steps;
    }
    if !caller_may {
        let why = "the token that asked for it was revoked, or its time is over";
        steps.changed = record.cancel(&format!("{CALLER_REVOKED}: {why}"));
    }
    let (mut sending, mut busy, mut waiting) = (0, BTreeSet::new(), Vec::new());
    let mut failed = None;
    let is_cancelled = record.state == RolloutState::Cancelled;
    let places = record.clusters.iter_mut().enumerate();
    for (place, cluster) in places.filter(|(_, cluster)| !cluster.ended()) {
        let seen = seen(cluster);
        let is_away = matches!(seen, Seen::Away);
        match seen {
            Seen::Sending => sending += 1,
            Seen::Operation(state, ..) if !state.ended() => cluster.state = Some(state),
            Seen::Away => cluster.state = Some(OperationState::Queued),
            Seen::Nothing if !is_cancelled && !is_forgotten(cluster, now) => {
                cluster.state = None;
                waiting.push(place);
            }
            ended => end(cluster, ended, is_cancelled),
        }
        if cluster.ended() {
            steps.changed = true;
            if cluster.state != Some(OperationState::Succeeded) && failed.is_none() {
                failed = Some(place);
            }
            continue;
        }
        if !is_away {
            busy.insert(cluster.wave);
        }
        let is_queued = cluster.state == Some(OperationState::Queued);
        if is_cancelled && is_queued {
            steps.cancel.push(cluster.id.clone());
        }
    }
    if let (Some(place), RolloutState::Running, false) = (failed, record.state, waiting.is_empty())
    {
        (record.state, record.paused_at) = (RolloutState::Paused, Some(now));
        record.message = pause_message(&record.clusters[place], waiting.len());
    }
    // what waited is gone: there is nothing to resume
    if record.state == RolloutState::Paused && waiting.is_empty() && sending == 0 {
        steps.changed |= record.resume();
    }
    if record.state == RolloutState::Running {
        let next = waiting.iter().map(|place| record.clusters[*place].wave).min();
        let next = next.filter(|wave| !busy.contains(&(wave - 1)));
        waiting.retain(|place| Some(record.clusters[*place].wave) == next);
        // those whose agents are busy, and are tried again, keep nobody waiting
        waiting.sort_by_key(|place| !record.clusters[*place].operation.is_empty());
        for place in waiting.into_iter().take(MAX_AT_ONCE.saturating_sub(sending)) {
            let operation = record.operation_of(&record.clusters[place].id);
            let cluster = &mut record.clusters[place];
            if cluster.operation.is_empty() {
                (cluster.operation, cluster.sent_at) = (operation, now);
                steps.changed = true;
            }
            steps.send.push(cluster.id.clone());
        }
    }
    if record.clusters.iter().all(RolloutCluster::ended) {
        finish(record, now);
        steps.changed = true;
    }
    steps
}

fn is_forgotten(cluster: &RolloutCluster, now: i64) -> bool {
    !cluster.operation.is_empty() && cluster.sent_at + FORGOTTEN <= now
}

/// Whether a look finds all as the one before has left it, with nothing to do.
pub fn is_unchanged(
    record: &RolloutRecord,
    caller_may: bool,
    seen: &dyn Fn(&RolloutCluster) -> Seen,
    now: i64,
) -> bool {
    let is_paused = record.state == RolloutState::Paused;
    let is_known = is_paused || (record.state == RolloutState::Running);
    let mut open = record.clusters.iter().filter(|cluster| !cluster.ended()).peekable();
    is_known
        && caller_may
        && open.peek().is_some()
        && open.all(|cluster| match seen(cluster) {
            Seen::Operation(state, ..) => cluster.state == Some(state) && !state.ended(),
            Seen::Away => cluster.state == Some(OperationState::Queued),
            Seen::Nothing => is_paused && cluster.state.is_none() && !is_forgotten(cluster, now),
            _ => false,
        })
}

/// Ends a cluster's part in it.
fn end(cluster: &mut RolloutCluster, seen: Seen, is_cancelled: bool) {
    use OperationState::{Cancelled, Failed, Interrupted, Queued};
    // one that was never sent, or still waits here, had no effect
    let had_none = cluster.operation.is_empty() || cluster.state == Some(Queued);
    let is_unsent = cluster.operation.is_empty();
    match seen {
        Seen::Operation(state, reason, message) => cluster.end(state, &reason, &message),
        Seen::Refused(reason, message) => {
            let state = if reason == DELIVERY_UNKNOWN { Interrupted } else { Failed };
            cluster.end(state, &reason, &message);
        }
        _ if is_cancelled && is_unsent => cluster.end(Cancelled, "", "not sent any more"),
        Seen::Gone if had_none => {
            cluster.end(Failed, "cluster_gone", "the cluster was removed or revoked before");
        }
        Seen::Gone => {
            let message =
                "the cluster was removed or revoked; what its agent has done is not known";
            cluster.end(Interrupted, "cluster_gone", message);
        }
        _ => {
            let message = "whether the agent has received it is not known: look at the cluster";
            cluster.end(Interrupted, DELIVERY_UNKNOWN, message);
        }
    }
}

fn pause_message(cluster: &RolloutCluster, waiting: usize) -> String {
    let what = match cluster.message.as_str() {
        "" => String::new(),
        message => format!(": {message}"),
    };
    let wait = if waiting == 1 { "cluster waits" } else { "clusters wait" };
    format!("{}: {}{what}; {waiting} {wait}", cluster.name, cluster.cause())
}

fn finish(record: &mut RolloutRecord, now: i64) {
    (record.finished_at, record.sealed) = (Some(now), None);
    let succeeded =
        record.clusters.iter().all(|cluster| cluster.state == Some(OperationState::Succeeded));
    if record.state == RolloutState::Cancelled {
        return;
    }
    record.state = if succeeded { RolloutState::Succeeded } else { RolloutState::Failed };
    record.message = record.summary();
}
