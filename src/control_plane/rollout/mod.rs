//! A rollout: one operation on many clusters, in waves. Its record, and how it is shown; what
//! happens next is decided in [`advance`].

mod state_machine;
pub mod waves;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::clock::rfc3339;
use super::model::Limits;
use crate::contract::types::{OperationState, tenant_operation_id};

pub use state_machine::{DELIVERY_UNKNOWN, Seen, Steps, advance, is_unchanged};

/// Longest message that is kept of a cluster's operation, characters.
const MAX_MESSAGE: usize = 200;
/// Clusters that the message of a rollout names at most.
const NAMED: usize = 3;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum RolloutState {
    Running,
    /// An operation has failed and clusters wait: nothing more is sent until somebody resumes it.
    Paused,
    Succeeded,
    Failed,
    /// Nothing more is sent; what runs ends by itself.
    Cancelled,
    /// One that this version does not know: it is shown, and left to a later version.
    #[serde(other)]
    Unknown,
}

/// A rollout as it is stored.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RolloutRecord {
    /// `ro-` and 32 hex digits: it follows from who asks, and from the key.
    pub id: String,
    /// Empty for one of an administrator over the clusters of several projects.
    pub project: String,
    /// Who asked, by id, and the limits that each operation is asked for within.
    pub caller_id: String,
    pub subject: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limits: Option<Limits>,
    pub kind: String,
    /// Digest of the request: the same key for something else is a mistake.
    pub request: String,
    /// Kind and spec, sealed, as long as something may be sent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sealed: Option<String>,
    /// How long an operation waits for its agent, seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttl_s: Option<i64>,
    pub state: RolloutState,
    pub message: String,
    /// Seconds since 1970, like every time here.
    pub created_at: i64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finished_at: Option<i64>,
    /// When it was paused last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub paused_at: Option<i64>,
    /// All that it was asked for, fixed then.
    pub clusters: Vec<RolloutCluster>,
}

/// A cluster of a rollout, and what became of its operation.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RolloutCluster {
    pub id: String,
    pub name: String,
    pub agent: String,
    /// From 1.
    pub wave: usize,
    /// Id of the operation. It is stored before the operation is sent, so that whoever goes on
    /// after this process knows that it may have been.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub operation: String,
    /// When it was sent first.
    #[serde(default)]
    pub sent_at: i64,
    /// Of the operation, as it was seen last; none: it waits here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<OperationState>,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reason: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub message: String,
}

impl RolloutCluster {
    pub fn ended(&self) -> bool {
        self.state.is_some_and(OperationState::ended)
    }

    fn end(&mut self, state: OperationState, reason: &str, message: &str) {
        // one that this version does not know: it may have had its effect or not
        let is_known = state != OperationState::Unknown;
        self.state = Some(if is_known { state } else { OperationState::Interrupted });
        // it is the agent's word: what is no code is not kept
        let reason = if is_code(reason) { reason } else { "" };
        reason.clone_into(&mut self.reason);
        // one line: it stands among others
        let shown = message.chars().map(|c| if c.is_control() { ' ' } else { c });
        self.message = shown.take(MAX_MESSAGE).collect();
    }

    fn state_name(&self) -> &'static str {
        self.state.map_or("waiting", OperationState::name)
    }

    /// Why it did not succeed, shortly.
    fn cause(&self) -> &str {
        if self.reason.is_empty() { self.state_name() } else { &self.reason }
    }
}

impl RolloutRecord {
    /// Its id, which follows from who asks, and from the key.
    pub fn id_of(caller_id: &str, limits: Option<&Limits>, key: &str) -> String {
        let tenant = limits.and_then(|limits| limits.tenant.as_deref());
        tenant_operation_id(caller_id, tenant, key).replacen("o-", "ro-", 1)
    }

    pub fn tenant(&self) -> Option<&str> {
        self.limits.as_ref().and_then(|limits| limits.tenant.as_deref())
    }

    /// Idempotency-Key of a cluster's operation.
    pub fn key_of(&self, cluster: &str) -> String {
        format!("{}/{cluster}", self.id)
    }

    fn operation_of(&self, cluster: &str) -> String {
        tenant_operation_id(&self.subject, self.tenant(), &self.key_of(cluster))
    }

    /// Whether more may be sent, now or once it is resumed.
    pub fn goes_on(&self) -> bool {
        matches!(self.state, RolloutState::Running | RolloutState::Paused)
    }

    /// Paused, and nothing of it is known to be under way.
    pub fn rests(&self) -> bool {
        self.state == RolloutState::Paused
            && self.clusters.iter().all(|c| c.ended() || c.state.is_none())
    }

    /// Paused, and nothing that was sent may show up.
    pub fn is_idle(&self) -> bool {
        self.rests() && self.clusters.iter().all(|c| c.ended() || c.operation.is_empty())
    }

    /// Sends no more. False where that is so already.
    pub fn cancel(&mut self, why: &str) -> bool {
        let goes_on = self.goes_on();
        if goes_on {
            self.state = RolloutState::Cancelled;
            why.clone_into(&mut self.message);
            self.sealed = None;
        }
        goes_on
    }

    /// Goes on after a failure. False where it was not paused.
    pub fn resume(&mut self) -> bool {
        let is_paused = self.state == RolloutState::Paused;
        if is_paused {
            self.state = RolloutState::Running;
            self.message.clear();
        }
        is_paused
    }

    fn count(&self, name: &str) -> usize {
        self.clusters.iter().filter(|cluster| cluster.state_name() == name).count()
    }

    /// As everybody may see it who may see it at all: never what was asked in detail.
    pub fn view(&self, with_clusters: bool) -> Value {
        let states = [
            "waiting",
            "queued",
            "running",
            "succeeded",
            "failed",
            "expired",
            "cancelled",
            "interrupted",
        ];
        let mut counts = json!({"total": self.clusters.len()});
        for state in states {
            counts[state] = self.count(state).into();
        }
        let mut view = json!({
            "id": self.id, "kind": self.kind, "subject": self.subject, "state": self.state,
            "message": self.message, "created_at": rfc3339(self.created_at),
            "finished_at": self.finished_at.map(rfc3339).unwrap_or_default(),
            "waves": self.waves(), "counts": counts,
        });
        if let Some(tenant) = self.tenant() {
            view["tenant"] = tenant.into();
        }
        if with_clusters {
            view["clusters"] = self.clusters.iter().map(RolloutCluster::view).collect();
        }
        view
    }

    fn waves(&self) -> Vec<Value> {
        let last = self.clusters.iter().map(|cluster| cluster.wave).max().unwrap_or(0);
        // clusters, those that have ended, those that wait
        let mut waves = vec![(0, 0, 0); last];
        for cluster in &self.clusters {
            let (all, ended, waiting) = &mut waves[cluster.wave.saturating_sub(1)];
            *all += 1;
            *ended += usize::from(cluster.ended());
            *waiting += usize::from(cluster.operation.is_empty());
        }
        let shown = |(all, ended, waiting)| {
            let state = match (ended == all, waiting == all) {
                (true, _) => "done",
                (_, true) => "waiting",
                _ => "running",
            };
            json!({"clusters": all, "state": state})
        };
        waves.into_iter().map(shown).collect()
    }

    /// How many clusters succeeded, and the first ones that did not.
    fn summary(&self) -> String {
        let others: Vec<&RolloutCluster> = self
            .clusters
            .iter()
            .filter(|cluster| cluster.state != Some(OperationState::Succeeded))
            .collect();
        let (all, bad) = (self.clusters.len(), others.len());
        let named: Vec<String> =
            others.iter().take(NAMED).map(|c| format!("{} ({})", c.name, c.cause())).collect();
        let more = if bad > NAMED { ", …" } else { "" };
        let not =
            if bad == 0 { String::new() } else { format!("; not {}{more}", named.join(", ")) };
        format!("{} of {all} clusters succeeded{not}", all - bad)
    }
}

impl RolloutCluster {
    fn view(&self) -> Value {
        let mut view = json!({
            "id": self.id, "name": self.name, "wave": self.wave, "state": self.state_name(),
        });
        for (field, text) in
            [("operation", &self.operation), ("reason", &self.reason), ("message", &self.message)]
        {
            if !text.is_empty() {
                view[field] = text.as_str().into();
            }
        }
        view
    }
}

/// Whether a text is in the form of a code or kind: up to 40 lower-case letters, digits and `_`.
pub fn is_code(text: &str) -> bool {
    (1..=40).contains(&text.len())
        && text.bytes().all(|b| b.is_ascii_lowercase() || b == b'_' || b.is_ascii_digit())
}

#[cfg(test)]
mod tests;
