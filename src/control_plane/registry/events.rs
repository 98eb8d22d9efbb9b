//! Events for Runners: each is written in the transaction of the change that it tells of.
//!
//! The body of every event is one JSON object: `message_id`, `type`, `at`, `project`, `agent_id`,
//! `cluster_id`, `cluster_name`, and by type what [`Topic`] adds. `agent_seq`, which grows with
//! each event of an agent, is added when the event is sent. `rollout.finished` is of no agent and
//! no cluster: `agent_id` is empty, and `rollout` is added as the API shows it, without `clusters`.

use serde_json::{Value, json};

use super::{Entry, Inner, Registry};
use crate::contract::types::{Operation, StatusReport};
use crate::control_plane::clock::rfc3339;
use crate::control_plane::model::{Agent, Liveness};
use crate::control_plane::rollout::RolloutRecord;
use crate::control_plane::store::{Change, OutboxEvent, RowKind};
use crate::frp::wire::fresh_run_id;

/// What an event is about; its name is the routing key.
#[derive(Clone, Copy, Debug)]
pub(super) enum Topic<'a> {
    /// New, or registered again with other facts. Adds `cluster_info`, `capabilities`, `max_role`,
    /// `endpoint`, `registered_at`.
    Registered,
    /// Heartbeats arrive. Adds `endpoint`.
    Online,
    /// No heartbeat for 45 s, or it was revoked. Adds `state` and `reason`.
    Offline(Liveness, &'a str),
    /// It was removed.
    Deregistered,
    /// Only the latest waits for the broker. Adds `status`, as the agent reported it.
    Status(Option<&'a StatusReport>),
    /// An operation has ended. Adds `operation`, as the agent reported it.
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
    /// The event to write with a change, where there is a broker.
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
            Topic::Finished(operation) => {
                // a reader of the queue sees all projects: what a container printed is not for it
                let shown = Operation { log: Vec::new(), ..(*operation).clone() };
                vec![("operation", json!(shown))]
            }
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

    /// The event for a rollout that has ended, where there is a broker.
    pub(super) fn rollout_event(&self, record: &RolloutRecord, now: i64) -> Option<Change> {
        self.event_base_url.as_ref()?;
        let topic = "rollout.finished";
        let body = json!({
            "message_id": fresh_run_id(),
            "type": topic,
            "at": rfc3339(now),
            "project": record.project,
            "agent_id": "",
            "rollout": record.view(false),
        });
        Some(Change::AddEvent(OutboxEvent {
            agent: String::new(),
            topic,
            at: now,
            latest: false,
            body: body.to_string(),
        }))
    }

    /// Announces agents that came online or went offline since the last call.
    ///
    /// # Errors
    /// When the database cannot be written; the next call announces them.
    pub async fn announce_liveness(&self, now: i64) -> anyhow::Result<()> {
        let change = |inner: &mut Inner| {
            let (mut changes, mut changed) = (Vec::new(), Vec::new());
            for entry in inner.agents.values_mut() {
                let (state, reason) = entry.liveness(now, self.started);
                let there =
                    !matches!(state, Liveness::Offline | Liveness::Expired | Liveness::Revoked);
                // after a start, an agent gets time for a heartbeat before its state is announced
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

    /// Announces all agents to a broker that has heard of none.
    ///
    /// # Errors
    /// When the database cannot be written.
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
