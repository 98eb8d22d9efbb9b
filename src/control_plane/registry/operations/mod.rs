//! Operations in the registry: queued, running and ended.

use std::collections::{BTreeMap, BTreeSet};

use super::events::Topic;
use super::{HttpError, Inner, Registry, database_unavailable, not_found};
use crate::base::order;
use crate::contract::types::{Operation, OperationState};
use crate::control_plane::clock::rfc3339;
use crate::control_plane::model::OperationRecord;
use crate::control_plane::store::{Change, RowKind};

/// The most queued operations of one agent, of one tenant there, and of all tenants together: what
/// is of no tenant has a place whatever they do.
const MAX_QUEUED: usize = 16;
const MAX_QUEUED_OF_TENANT: usize = 4;
const MAX_QUEUED_OF_TENANTS: usize = 12;
/// The most bytes of all queued ones. Tenants together have half of them.
const MAX_QUEUED_BYTES: usize = 64 << 20;
/// Ended operations kept for each agent, in the same way, and for how long, seconds.
const MAX_ENDED: usize = 256;
const MAX_ENDED_OF_TENANT: usize = 64;
const MAX_ENDED_OF_TENANTS: usize = 192;
const RETENTION: i64 = 7 * 86_400;

/// By agent and id; without the logs, which only the database keeps.
pub(super) type OperationRecords = BTreeMap<(String, String), OperationRecord>;
/// Those that are being passed to their agents: they cannot be ended here, as the agent may have
/// them.
pub(super) type Delivering = BTreeSet<(String, String)>;

fn key_of(record: &OperationRecord) -> (String, String) {
    (record.agent.clone(), record.operation.id.clone())
}

fn row_id(record: &OperationRecord) -> String {
    format!("{}/{}", record.agent, record.operation.id)
}

fn put_change(record: &OperationRecord) -> Result<Change, HttpError> {
    Change::put(RowKind::Operation, &row_id(record), record).map_err(|e| database_unavailable(&e))
}

impl OperationRecord {
    /// Ends it here, not at the agent.
    fn end(&mut self, state: OperationState, message: &str, now: i64) {
        (self.operation.state, self.operation.message, self.operation.finished_at) =
            (state, message.into(), rfc3339(now));
        self.changed_at = now;
        self.forget_request();
    }
}

impl Registry {
    /// An operation of an agent, without its log.
    pub fn operation(&self, agent: &str, id: &str) -> Option<OperationRecord> {
        self.inner().operations.get(&(agent.to_owned(), id.to_owned())).cloned()
    }

    /// The operation with its log.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub async fn with_log(
        &self,
        mut record: OperationRecord,
    ) -> Result<OperationRecord, HttpError> {
        let Operation { state, kind, .. } = &record.operation;
        if state.ended() && (*state != OperationState::Succeeded || kind == "job") {
            let id = row_id(&record);
            let stored = self.store.one::<OperationRecord>(RowKind::Operation, &id).await;
            let stored = stored.map_err(|e| database_unavailable(&e))?;
            record.operation.log = stored.map(|s| s.operation.log).unwrap_or_default();
        }
        Ok(record)
    }

    /// Operations of an agent, the newest first, without their logs.
    pub fn operations(&self, agent: &str) -> Vec<OperationRecord> {
        let inner = self.inner();
        let mut found: Vec<OperationRecord> = inner.operations_of(agent).cloned().collect();
        order::sort(&mut found, |a, b| {
            b.operation
                .created_at
                .cmp(&a.operation.created_at)
                .then(a.operation.id.cmp(&b.operation.id))
        });
        found
    }

    /// The longest waiting operation of each agent, but for those of rollouts that are paused.
    pub fn oldest_queued(&self) -> Vec<OperationRecord> {
        let inner = self.inner();
        let mut first: BTreeMap<&str, &OperationRecord> = BTreeMap::new();
        for record in inner.operations.values().filter(|record| inner.is_due(record)) {
            let kept = first.entry(&record.agent).or_insert(record);
            if record.asked_ms < kept.asked_ms {
                *kept = record;
            }
        }
        first.into_values().cloned().collect()
    }

    /// The longest waiting one of an agent.
    pub fn next_queued(&self, agent: &str) -> Option<OperationRecord> {
        let inner = self.inner();
        let due = inner.operations_of(agent).filter(|record| inner.is_due(record));
        due.min_by_key(|record| record.asked_ms).cloned()
    }

    /// Running operations whose caller was revoked, or has a selector that no longer names the
    /// cluster.
    pub fn running_for_revoked(&self) -> Vec<OperationRecord> {
        let inner = self.inner();
        let revoked = |record: &&OperationRecord| {
            let agent = inner.agents.get(&record.agent);
            inner.access_of(record.caller()).is_some_and(|access| {
                let is_out = access.selector.is_some()
                    && !agent.is_some_and(|agent| access.reach()(&agent.row));
                access.revoked || is_out
            })
        };
        let running = |j: &&OperationRecord| j.operation.state == OperationState::Running;
        inner.operations.values().filter(running).filter(revoked).cloned().collect()
    }

    /// Whether an operation is queued for an agent.
    pub fn has_queued(&self, agent: &str) -> bool {
        self.inner().operations_of(agent).any(|j| j.operation.state == OperationState::Queued)
    }

    /// Marks a queued operation as being passed to its agent, until [`Registry::end_delivery`].
    /// False when it is no longer queued, or is held.
    pub fn begin_delivery(&self, record: &OperationRecord) -> bool {
        let mut inner = self.inner();
        let key = key_of(record);
        let is_due = inner.operations.get(&key).is_some_and(|record| inner.is_due(record));
        is_due && inner.delivering.insert(key)
    }

    /// The agent has the operation, or could not be reached.
    pub fn end_delivery(&self, record: &OperationRecord) {
        self.inner().delivering.remove(&key_of(record));
    }

    /// Stores an operation, with an event when it has ended. One that has ended does not change any
    /// more.
    ///
    /// # Errors
    /// The queue is full, or the database cannot be written: then nothing changes.
    pub async fn put_operation(&self, record: OperationRecord, now: i64) -> Result<(), HttpError> {
        self.write_operation(record, false, now).await
    }

    async fn write_operation(
        &self,
        record: OperationRecord,
        unless_delivering: bool,
        now: i64,
    ) -> Result<(), HttpError> {
        let (key, has_ended) = (key_of(&record), record.operation.state.ended());
        let change = |inner: &mut Inner| {
            if unless_delivering && inner.delivering.contains(&key) {
                return Err(HttpError::new(
                    409,
                    "operation_underway",
                    "it is being handed to the agent",
                    Some("try again in a moment"),
                ));
            }
            let agent =
                inner.agents.get(&record.agent).ok_or_else(|| not_found("agent", &record.agent))?;
            let former = inner.operations.get(&key).cloned();
            let supersedes = |f: &OperationRecord| {
                f.operation.state == OperationState::Expired
                    && record.operation.state.ended()
                    && record.operation.state != OperationState::Expired
            };
            // an agent may have received what had expired here: then its report counts
            if former.as_ref().is_some_and(|f| f.operation.state.ended() && !supersedes(f)) {
                return Ok((Vec::new(), former));
            }
            if former.is_none() && record.sealed.is_some() {
                inner.check_queue(&record)?;
            }
            let mut changes = vec![put_change(&record)?];
            if record.operation.state.ended() {
                changes.extend(self.event(&agent.row, Topic::Finished(&record.operation), now));
            }
            inner.insert_operation(record);
            Ok((changes, former))
        };
        let undo = |inner: &mut Inner, former: Option<OperationRecord>| {
            match former {
                Some(former) => inner.operations.insert(key.clone(), former),
                None => inner.operations.remove(&key),
            };
        };
        self.transact(change, undo, |_, _| ()).await?;
        if has_ended {
            self.operation_ended.notify_waiters();
        }
        Ok(())
    }

    /// Done when an operation has ended that had not when this was called.
    pub fn operation_ended(&self) -> impl Future<Output = ()> {
        self.operation_ended.notified()
    }

    /// An agent's report of the end of an operation; reported twice, nothing changes.
    ///
    /// # Errors
    /// A state that is no end, or a database that cannot be written.
    pub async fn finish_operation(
        &self,
        agent: &str,
        id: &str,
        report: Operation,
        now: i64,
    ) -> Result<(), HttpError> {
        let hex = |rest: &str| rest.len() == 32 && rest.bytes().all(|b| b.is_ascii_hexdigit());
        if report.id != id || !id.strip_prefix("o-").is_some_and(hex) || !report.state.ended() {
            return Err(HttpError::new(
                400,
                "bad_operation",
                "this is not the end of that operation",
                None,
            ));
        }
        let known = self.operation(agent, id);
        let mut record = known.unwrap_or_else(|| OperationRecord {
            agent: agent.into(),
            operation: Operation::default(),
            caller_id: String::new(),
            limits: None,
            // asked for at the agent itself, which knows with whose token
            tenant: report.tenant.clone(),
            key: String::new(),
            request: String::new(),
            sealed: None,
            asked_ms: 0,
            expires_at: 0,
            changed_at: now,
        });
        (record.operation, record.changed_at) = (report, now);
        record.forget_request();
        self.put_operation(record, now).await
    }

    /// Ends a queued operation, unless it is being passed to its agent.
    ///
    /// # Errors
    /// 409 while it is being passed on; a database that cannot be written.
    pub async fn cancel_queued(
        &self,
        mut record: OperationRecord,
        state: OperationState,
        message: &str,
        now: i64,
    ) -> Result<(), HttpError> {
        record.end(state, message, now);
        self.write_operation(record, true, now).await
    }

    /// Ends queued operations, by agent and id, in one commit: but for those that are being passed
    /// to their agents.
    ///
    /// # Errors
    /// A database that cannot be written: then nothing changes.
    pub async fn cancel_all_queued(
        &self,
        keys: Vec<(String, String)>,
        message: &str,
        now: i64,
    ) -> Result<(), HttpError> {
        let change = |inner: &mut Inner| {
            let (mut changes, mut ended) = (Vec::new(), Vec::new());
            for key in keys.iter().filter(|key| !inner.delivering.contains(*key)) {
                let queued = inner.operations.get(key);
                let queued = queued.filter(|j| j.operation.state == OperationState::Queued);
                let (Some(former), Some(agent)) = (queued, inner.agents.get(&key.0)) else {
                    continue;
                };
                let mut record = former.clone();
                record.end(OperationState::Cancelled, message, now);
                changes.push(put_change(&record)?);
                changes.extend(self.event(&agent.row, Topic::Finished(&record.operation), now));
                ended.push((former.clone(), record));
            }
            let mut formers = Vec::new();
            for (former, record) in ended {
                inner.insert_operation(record);
                formers.push(former);
            }
            Ok::<_, HttpError>((changes, formers))
        };
        let undo = |inner: &mut Inner, formers: Vec<OperationRecord>| {
            formers.into_iter().for_each(|former| inner.insert_operation(former));
        };
        self.transact(change, undo, |_, _| ()).await?;
        self.operation_ended.notify_waiters();
        Ok(())
    }

    /// Ends an operation at once.
    ///
    /// # Errors
    /// No database.
    pub async fn end_operation(
        &self,
        mut record: OperationRecord,
        state: OperationState,
        message: &str,
        now: i64,
    ) -> Result<(), HttpError> {
        record.end(state, message, now);
        self.put_operation(record, now).await
    }

    /// Ends operations that have waited too long, and removes old ones.
    ///
    /// # Errors
    /// When the database cannot be written; the next call tries again.
    pub async fn tidy_operations(&self, now: i64) -> anyhow::Result<()> {
        let (expired, old) = {
            let inner = self.inner();
            let expired: Vec<OperationRecord> = inner
                .operations
                .values()
                .filter(|j| j.is_overdue(now) && !inner.delivering.contains(&key_of(j)))
                .cloned()
                .collect();
            (expired, inner.old_operations(now))
        };
        for record in expired {
            let (state, message) = match record.operation.state {
                OperationState::Queued => {
                    (OperationState::Expired, "the agent was not there in time")
                }
                _ => (OperationState::Interrupted, "the agent has not reported it for 7 days"),
            };
            self.cancel_queued(record, state, message, now)
                .await
                .map_err(|e| anyhow::anyhow!(e.message))?;
        }
        let change = |inner: &mut Inner| {
            let gone: Vec<OperationRecord> =
                old.iter().filter_map(|key| inner.operations.remove(key)).collect();
            let changes = gone
                .iter()
                .map(|record| Change::remove(RowKind::Operation, &row_id(record)))
                .collect();
            Ok((changes, gone))
        };
        let undo = |inner: &mut Inner, gone: Vec<OperationRecord>| {
            inner.operations.extend(gone.into_iter().map(|record| (key_of(&record), record)))
        };
        self.transact(change, undo, |_, _| ()).await
    }
}

impl OperationRecord {
    fn is_overdue(&self, now: i64) -> bool {
        match self.operation.state {
            OperationState::Queued => self.expires_at <= now,
            OperationState::Running => self.changed_at + RETENTION <= now,
            _ => false,
        }
    }
}

impl Inner {
    pub(super) fn insert_operation(&mut self, mut record: OperationRecord) {
        record.operation.log = Vec::new();
        self.operations.insert(key_of(&record), record);
    }

    fn operations_of(&self, agent: &str) -> impl Iterator<Item = &OperationRecord> {
        let owner = agent.to_owned();
        self.operations
            .range((owner.clone(), String::new())..)
            .take_while(move |((a, _), _)| *a == owner)
            .map(|(_, record)| record)
    }

    fn check_queue(&self, record: &OperationRecord) -> Result<(), HttpError> {
        let size = |j: &OperationRecord| j.sealed.as_ref().map_or(0, String::len);
        let queued = || self.operations_of(&record.agent).filter(|j| j.sealed.is_some());
        let bytes = |of_tenants: bool| -> usize {
            let counted = |j: &&OperationRecord| !of_tenants || j.tenant.is_some();
            self.operations.values().filter(counted).map(size).sum::<usize>() + size(record)
        };
        let mut full = queued().count() >= MAX_QUEUED || bytes(false) > MAX_QUEUED_BYTES;
        if record.tenant.is_some() {
            let mine = queued().filter(|j| j.tenant == record.tenant).count();
            let of_tenants = queued().filter(|j| j.tenant.is_some()).count();
            full |= mine >= MAX_QUEUED_OF_TENANT
                || of_tenants >= MAX_QUEUED_OF_TENANTS
                || bytes(true) > MAX_QUEUED_BYTES / 2;
        }
        if !full {
            return Ok(());
        }
        Err(HttpError::new(
            429,
            "queue_full",
            "too many operations wait already",
            Some("wait until the agent is back, or cancel some"),
        ))
    }

    /// Ended operations that are no longer kept: their results and keys go. Those of a tenant make
    /// room for its own before they take that of others.
    fn old_operations(&self, now: i64) -> Vec<(String, String)> {
        let unanswered = self.unanswered();
        let mut ended: BTreeMap<&str, Vec<_>> = BTreeMap::new();
        for (key, record) in self.operations.iter().filter(|(_, j)| j.operation.state.ended()) {
            ended.entry(&record.agent).or_default().push((record.changed_at, key, &record.tenant));
        }
        let mut old = Vec::new();
        for mut of_agent in ended.into_values() {
            of_agent.sort_unstable();
            let (mut all, mut of_tenants, mut of_tenant) = (0, 0, BTreeMap::new());
            for (changed, key, tenant) in of_agent.into_iter().rev() {
                let mine = tenant.as_ref().map(|tenant| of_tenant.entry(tenant).or_insert(0));
                let is_over = changed + RETENTION <= now
                    || all >= MAX_ENDED
                    || mine.as_ref().is_some_and(|mine| {
                        **mine >= MAX_ENDED_OF_TENANT || of_tenants >= MAX_ENDED_OF_TENANTS
                    });
                let is_needed = changed + RETENTION > now
                    && unanswered.contains(&(key.0.as_str(), key.1.as_str()));
                if is_over && !is_needed {
                    old.push(key.clone());
                    continue;
                }
                all += 1;
                if let Some(mine) = mine {
                    *mine += 1;
                    of_tenants += 1;
                }
            }
        }
        old
    }

    /// Removes an agent's operations, and returns the changes to write.
    pub(super) fn remove_operations(&mut self, agent: &str) -> (Vec<Change>, Vec<OperationRecord>) {
        let gone: Vec<OperationRecord> = self.operations_of(agent).cloned().collect();
        for record in &gone {
            self.operations.remove(&(record.agent.clone(), record.operation.id.clone()));
        }
        (
            gone.iter().map(|record| Change::remove(RowKind::Operation, &row_id(record))).collect(),
            gone,
        )
    }
}

#[cfg(test)]
mod tests;
