//! What Runners are told of agents: each event is written in the transaction of the change that it speaks of.
//!
//! The body of every event is one JSON object: `message_id`, `type`, `at`, `project`, `agent_id`, `cluster_id`, `cluster_name`, and
//! by type what [`Topic`] says. `agent_seq`, which grows with each event of an agent, joins them when the event is sent.

use serde_json::{Value, json};

use super::{Entry, Inner, Registry};
use crate::contract::types::{Operation, StatusReport};
use crate::control_plane::clock::rfc3339;
use crate::control_plane::model::{Agent, Liveness};
use crate::control_plane::store::{Change, OutboxEvent, RowKind};
use crate::frp::wire::fresh_run_id;

/// What an event is about; its name is the routing key.
#[derive(Clone, Copy, Debug)]
pub(super) enum Topic<'a> {
    /// New, or again with other facts. Adds `cluster_info`, `capabilities`, `max_role`, `endpoint`, `registered_at`.
    Registered,
    /// Heartbeats come. Adds `endpoint`.
    Online,
    /// None came for 45 s, or it was revoked. Adds `state` and `reason`.
    Offline(Liveness, &'a str),
    /// It is gone for good.
    Deregistered,
    /// Only the latest waits for the broker. Adds `status`, as the agent reported it.
    Status(Option<&'a StatusReport>),
    /// An operation came to its end. Adds `operation`, as the agent told it.
    Finished(&'a Operation),
}

impl Topic<'_> {
    fn name(self) -> &'static str {
        match self {
            Topic::Registered => "agent.registered",
            Topic::Online => "agent.online",
            Topic::Offline(..) => "agent.offline",
            Topic::Deregistered => "agent.deregistered",
            Topic::Status(_) => "agent.status",
            Topic::Finished(_) => "operation.finished",
        }
    }
}

impl Registry {
    /// The event to write beside a change, where Runners are told anything.
    pub(super) fn event(&self, row: &Agent, topic: Topic<'_>, now: i64) -> Option<Change> {
        let endpoint = format!("{}/clusters/{}", self.event_base_url.as_ref()?, row.cluster_id);
        let mut body = json!({
            "message_id": fresh_run_id(),
            "type": topic.name(),
            "at": rfc3339(now),
            "project": row.project,
            "agent_id": row.id,
            "cluster_id": row.cluster_id,
            "cluster_name": row.cluster.name,
        });
        let more: Vec<(&str, Value)> = match topic {
            Topic::Registered => vec![
                ("cluster_info", json!(row.cluster)),
                ("capabilities", json!(row.capabilities)),
                ("max_role", json!(row.max_role)),
                ("endpoint", json!(endpoint)),
                ("registered_at", json!(rfc3339(row.registered_at))),
            ],
            Topic::Online => vec![("endpoint", json!(endpoint))],
            Topic::Offline(state, reason) => {
                vec![("state", json!(state)), ("reason", json!(reason))]
            }
            Topic::Deregistered => Vec::new(),
            Topic::Status(report) => vec![("status", json!(report?))],
            Topic::Finished(operation) => vec![("operation", json!(operation))],
        };
        for (name, value) in more {
            body[name] = value;
        }
        let latest = matches!(topic, Topic::Status(_));
        Some(Change::AddEvent(OutboxEvent {
            agent: row.id.clone(),
            topic: topic.name(),
            at: now,
            latest,
            body: body.to_string(),
        }))
    }

    /// Tells of agents that have come or gone since the last look.
    ///
    /// # Errors
    /// When the database takes nothing; the next look tells of them.
    pub async fn announce_liveness(&self, now: i64) -> anyhow::Result<()> {
        let change = |inner: &mut Inner| {
            let (mut changes, mut changed) = (Vec::new(), Vec::new());
            for entry in inner.agents.values_mut() {
                let (state, reason) = entry.liveness(now, self.started);
                let there =
                    !matches!(state, Liveness::Offline | Liveness::Expired | Liveness::Revoked);
                // what an agent was before this start is not known again before it had time to speak
                if there == entry.row.online || (there && entry.seen_at < self.started) {
                    continue;
                }
                entry.row.online = there;
                changes.push(Change::put(RowKind::Agent, &entry.row.id, &entry.row)?);
                changes.extend(self.event(
                    &entry.row,
                    if there { Topic::Online } else { Topic::Offline(state, &reason) },
                    now,
                ));
                changed.push(entry.row.id.clone());
            }
            Ok((changes, changed))
        };
        let undo = |inner: &mut Inner, changed: Vec<String>| {
            for id in changed {
                if let Some(Entry { row, .. }) = inner.agents.get_mut(&id) {
                    row.online = !row.online;
                }
            }
        };
        self.transact(change, undo, |_, _| ()).await
    }

    /// Tells of everybody: Runners are told of agents from now on.
    ///
    /// # Errors
    /// When the database takes nothing.
    pub async fn announce_all(&self, now: i64) -> anyhow::Result<()> {
        let change = |inner: &mut Inner| {
            let mut events = Vec::new();
            for row in inner.agents.values().map(|e| &e.row).filter(|row| !row.revoked) {
                events.extend(self.event(row, Topic::Registered, now));
                if row.online {
                    events.extend(self.event(row, Topic::Online, now));
                }
            }
            Ok((events, ()))
        };
        self.transact(change, |_, ()| (), |_, ()| ()).await
    }
}
