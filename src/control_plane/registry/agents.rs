//! What agents report, and what ends one.

use std::collections::BTreeMap;

use super::entry::Entry;
use super::events::Topic;
use super::{Inner, Registry};
use crate::contract::types::{Directive, Heartbeat, StatusReport};
use crate::control_plane::error::{HttpError, not_found};
use crate::control_plane::model::{Liveness, OperationRecord};
use crate::control_plane::store::{Change, RowKind};

impl Registry {
    /// A heartbeat. It is kept in memory; [`Registry::flush`] writes it.
    ///
    /// # Errors
    /// 404 for an unknown agent, 409 while two machines have its identity.
    pub fn heartbeat(
        &self,
        id: &str,
        beat: &Heartbeat,
        now: i64,
    ) -> Result<Vec<Directive>, HttpError> {
        let mut inner = self.inner();
        let entry = inner.agents.get_mut(id).ok_or_else(|| not_found("agent", id))?;
        if entry.conflict_until > now {
            return Err(duplicate());
        }
        entry.seen_at = now;
        entry.dirty = true;
        entry.draining = beat.state == "draining";
        entry.tunnel = serde_json::to_value(beat.tunnel.state)
            .ok()
            .and_then(|v| v.as_str().map(str::to_owned))
            .unwrap_or_default();
        entry.uptime_s = beat.uptime_s;
        Ok(Vec::new())
    }

    /// # Errors
    /// 404 for an unknown agent.
    pub fn report(&self, id: &str, report: StatusReport) -> Result<(), HttpError> {
        let mut inner = self.inner();
        let entry = inner.agents.get_mut(id).ok_or_else(|| not_found("agent", id))?;
        entry.report = Some(report);
        entry.report_unannounced = self.event_base_url.is_some();
        Ok(())
    }

    /// Writes the changes of all heartbeats in one transaction.
    ///
    /// # Errors
    /// When the database cannot be written; the next flush tries again.
    pub async fn flush(&self) -> anyhow::Result<()> {
        let change = |inner: &mut Inner| {
            let (mut changes, mut ids) = (Vec::new(), Vec::new());
            for entry in inner.agents.values_mut().filter(|e| e.dirty || e.report_unannounced) {
                entry.row.seen_at = entry.seen_at;
                changes.push(Change::put(RowKind::Agent, &entry.row.id, &entry.row)?);
                if entry.report_unannounced {
                    changes.extend(self.event(
                        &entry.row,
                        Topic::Status(entry.report.as_ref()),
                        entry.seen_at,
                    ));
                }
                (entry.dirty, entry.report_unannounced) = (false, false);
                ids.push(entry.row.id.clone());
            }
            Ok((changes, ids))
        };
        let undo = |inner: &mut Inner, ids: Vec<String>| {
            for id in ids {
                if let Some(entry) = inner.agents.get_mut(&id) {
                    (entry.dirty, entry.report_unannounced) = (
                        true,
                        entry.report_unannounced
                            || entry.report.is_some() && self.event_base_url.is_some(),
                    );
                }
            }
        };
        self.transact(change, undo, |_, _| ()).await
    }

    /// Revokes an agent: it is refused from now on, and its streams end.
    ///
    /// # Errors
    /// 404, or a database that cannot be written.
    pub async fn revoke_agent(&self, cluster: &str) -> Result<(), HttpError> {
        let change = |inner: &mut Inner| {
            let id = inner.find(cluster, None)?.row.id.clone();
            let entry = inner.agents.get_mut(&id).ok_or_else(|| not_found("cluster", cluster))?;
            entry.row.revoked = true;
            Ok::<_, HttpError>((vec![Change::put(RowKind::Agent, &id, &entry.row)?], id))
        };
        let undo = |inner: &mut Inner, id: String| {
            if let Some(entry) = inner.agents.get_mut(&id) {
                entry.row.revoked = false;
            }
        };
        let done = |inner: &mut Inner, id: String| {
            if let Some(entry) = inner.agents.get_mut(&id) {
                entry.row.revoked = true;
                entry.revocation.cancel();
            }
        };
        self.transact(change, undo, done).await
    }

    /// Removes an agent and its cluster.
    ///
    /// # Errors
    /// 404, or a database that cannot be written.
    pub async fn remove_agent(&self, id: &str, now: i64) -> Result<(), HttpError> {
        let change = |inner: &mut Inner| {
            let entry = inner.agents.remove(id).ok_or_else(|| not_found("agent", id))?;
            let (mut changes, operations) = inner.remove_operations(id);
            changes.push(Change::remove(RowKind::Agent, id));
            changes.push(Change::remove(RowKind::Labels, id));
            changes.extend(self.event(&entry.row, Topic::Deregistered, now));
            Ok::<_, HttpError>((changes, (entry, operations)))
        };
        let undo = |inner: &mut Inner, (entry, operations): (Entry, Vec<OperationRecord>)| {
            inner.agents.entry(id.to_owned()).or_insert(entry);
            inner.operations.extend(
                operations
                    .into_iter()
                    .map(|record| ((record.agent.clone(), record.operation.id.clone()), record)),
            );
        };
        let done = |inner: &mut Inner, (entry, _): (Entry, Vec<OperationRecord>)| {
            entry.revocation.cancel();
            for credential in &entry.row.credentials {
                inner.tokens.remove(&credential.hash);
            }
        };
        self.transact(change, undo, done).await
    }

    /// How many agents are in each state, for metrics.
    pub fn count_by_liveness(&self, now: i64) -> BTreeMap<&'static str, usize> {
        let mut counts = BTreeMap::new();
        for entry in self.inner().agents.values() {
            let name = match entry.liveness(now, self.started).0 {
                Liveness::Online => "online",
                Liveness::Late => "late",
                Liveness::Offline => "offline",
                Liveness::Draining => "draining",
                Liveness::Duplicate => "duplicate",
                Liveness::Expired => "expired",
                Liveness::Revoked => "revoked",
            };
            *counts.entry(name).or_default() += 1;
        }
        counts
    }
}

pub(super) fn duplicate() -> HttpError {
    HttpError::new(
        409,
        "duplicate_identity",
        "another machine shows the same identity",
        Some(
            "on the copied disk: stop pipeops-agent, remove /var/lib/pipeops-agent, enrol it again",
        ),
    )
}
