//! Rollouts in the registry.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::{HttpError, Inner, Registry, not_found};
use crate::contract::types::OperationState;
use crate::control_plane::model::Liveness;
use crate::control_plane::rollout::{RolloutCluster, RolloutRecord, Seen, Steps, advance};
use crate::control_plane::store::{Change, RowKind};

/// The most of a project that have not ended, and of one tenant: each keeps what was asked for.
const MAX_UNFINISHED: usize = 32;
const MAX_UNFINISHED_OF_TENANT: usize = 8;
/// How long ended ones are kept, and paused ones wait for somebody, seconds.
const RETENTION: i64 = 30 * 86_400;
/// The most clusters of all ended rollouts of a project together: the oldest ones go before.
const MAX_ENDED_CLUSTERS: usize = 50_000;
/// An agent that was heard a moment ago, or may not be back yet since this process began, is tried
/// again for this long, seconds.
const PATIENCE: i64 = 45;

/// What is being sent, by rollout and cluster; with why it was refused, until that is stored.
pub(super) type Sending = BTreeMap<(String, String), Option<(String, String)>>;

/// What came of sending an operation.
pub enum Sent {
    /// Its record is there; or it may be, and is sent again under the same key.
    Maybe,
    /// Reason and message.
    Refused(String, String),
}

fn put_change(record: &RolloutRecord) -> anyhow::Result<Change> {
    Change::put(RowKind::Rollout, &record.id, record)
}

fn bad_state(record: &RolloutRecord) -> HttpError {
    let message = format!("the rollout is over: {}", record.message);
    HttpError::new(409, "rollout_ended", message, Some("begin another one"))
}

impl Registry {
    pub fn rollout(&self, id: &str) -> Option<Arc<RolloutRecord>> {
        self.inner().rollouts.get(id).cloned()
    }

    /// Those that `may_see` lets pass, the newest first, `limit` at most.
    pub fn rollouts(
        &self,
        limit: usize,
        may_see: &dyn Fn(&RolloutRecord) -> bool,
    ) -> Vec<Arc<RolloutRecord>> {
        let inner = self.inner();
        let mut seen: Vec<&Arc<RolloutRecord>> =
            inner.rollouts.values().filter(|record| may_see(record)).collect();
        seen.sort_by_key(|record| std::cmp::Reverse(record.created_at));
        seen.into_iter().take(limit).cloned().collect()
    }

    /// Ids of those that have something to do.
    pub fn active_rollouts(&self, now: i64) -> Vec<String> {
        let inner = self.inner();
        let active = |record: &&Arc<RolloutRecord>| {
            record.finished_at.is_none() && !(record.rests() && inner.caller_may(record, now))
        };
        inner.rollouts.values().filter(active).map(|record| record.id.clone()).collect()
    }

    /// Stores a rollout that was just asked for. Of two with the same id the first one counts; true
    /// where it is this one.
    ///
    /// # Errors
    /// 409 for the id of another request, 429 for one too many, or a database that cannot be
    /// written.
    pub async fn add_rollout(
        &self,
        record: RolloutRecord,
    ) -> Result<(Arc<RolloutRecord>, bool), HttpError> {
        let (id, record) = (record.id.clone(), Arc::new(record));
        let change = |inner: &mut Inner| {
            if let Some(known) = inner.rollouts.get(&record.id) {
                check_same(known, &record.request)?;
                return Ok((Vec::new(), (known.clone(), false)));
            }
            inner.check_unfinished(&record)?;
            inner.rollouts.insert(record.id.clone(), record.clone());
            Ok((vec![put_change(&record)?], (record, true)))
        };
        let undo = |inner: &mut Inner, _| drop(inner.rollouts.remove(&id));
        self.transact(change, undo, |_, known| known).await
    }

    /// Changes a rollout by `how`, which says whether it has.
    ///
    /// # Errors
    /// 404; 409 for one that has ended; a database that cannot be written.
    pub async fn change_rollout(
        &self,
        id: &str,
        how: impl FnOnce(&mut RolloutRecord) -> bool,
    ) -> Result<(), HttpError> {
        let change = |inner: &mut Inner| {
            let record = inner.rollouts.get_mut(id).ok_or_else(|| not_found("rollout", id))?;
            if !record.goes_on() {
                return Err(bad_state(record));
            }
            let former = record.clone();
            let changed = how(Arc::make_mut(record));
            let changes = if changed { vec![put_change(record)?] } else { Vec::new() };
            Ok((changes, former))
        };
        self.transact(change, restore, |_, _| ()).await
    }

    /// Brings a rollout as far as it goes now: what is seen of its operations is stored, and so is
    /// what the answer says to send, before it is sent. `away`: agents that are offline.
    ///
    /// # Errors
    /// When the database cannot be written: then nothing is to be done.
    pub async fn advance_rollout(
        &self,
        id: &str,
        away: &BTreeSet<String>,
        now: i64,
    ) -> Result<(Arc<RolloutRecord>, Steps), HttpError> {
        let change = |inner: &mut Inner| {
            let former = inner.rollouts.get(id).ok_or_else(|| not_found("rollout", id))?.clone();
            let mut record = RolloutRecord::clone(&former);
            let caller_may = inner.caller_may(&record, now);
            let seen = |cluster: &RolloutCluster| inner.seen(id, cluster, away);
            let steps = advance(&mut record, caller_may, &seen, now);
            let mut changes = Vec::new();
            if steps.changed {
                changes.push(put_change(&record)?);
                for cluster in record.clusters.iter().filter(|cluster| cluster.ended()) {
                    inner.sending.remove(&(record.id.clone(), cluster.id.clone()));
                }
            }
            if record.finished_at.is_some() && former.finished_at.is_none() {
                changes.extend(self.rollout_event(&record, now));
            }
            for cluster in &steps.send {
                inner.sending.insert((record.id.clone(), cluster.clone()), None);
            }
            let record = Arc::new(record);
            inner.rollouts.insert(record.id.clone(), record.clone());
            Ok::<_, HttpError>((changes, (former, record, steps)))
        };
        let undo = |inner: &mut Inner, (former, _, steps): (Arc<RolloutRecord>, _, Steps)| {
            for cluster in steps.send {
                inner.sending.remove(&(former.id.clone(), cluster));
            }
            restore(inner, former);
        };
        self.transact(change, undo, |_, (_, record, steps)| (record, steps)).await
    }

    /// What came of sending an operation: what was refused is stored by the next
    /// [`Registry::advance_rollout`].
    pub fn end_sending(&self, rollout: &str, cluster: &str, sent: Sent) {
        let mut inner = self.inner();
        let key = (rollout.to_owned(), cluster.to_owned());
        match sent {
            Sent::Maybe => drop(inner.sending.remove(&key)),
            Sent::Refused(reason, message) => {
                inner.sending.insert(key, Some((reason, message)));
            }
        }
    }

    /// Whether an agent that is not reached may be in a moment.
    pub fn may_come_back(&self, agent: &str, sent_at: i64, now: i64) -> bool {
        let inner = self.inner();
        let is_heard = inner.agents.get(agent).is_some_and(|entry| {
            matches!(entry.liveness(now, self.started).0, Liveness::Online | Liveness::Late)
        });
        is_heard && self.has_patience(sent_at, now)
    }

    /// Whether what was sent first then is tried again.
    pub fn has_patience(&self, sent_at: i64, now: i64) -> bool {
        now - sent_at.max(self.started) < PATIENCE
    }

    /// Whether heartbeats of an agent arrive.
    pub fn is_online(&self, agent: &str, now: i64) -> bool {
        let inner = self.inner();
        let entry = inner.agents.get(agent);
        entry.is_some_and(|e| e.liveness(now, self.started).0 == Liveness::Online)
    }

    /// Cancels what was paused and forgotten, and removes what ended long ago.
    ///
    /// # Errors
    /// When the database cannot be written; the next call tries again.
    pub async fn tidy_rollouts(&self, now: i64) -> anyhow::Result<()> {
        let change = |inner: &mut Inner| {
            let gone: Vec<Arc<RolloutRecord>> =
                inner.old_rollouts(now).iter().filter_map(|id| inner.rollouts.remove(id)).collect();
            let mut changes: Vec<Change> =
                gone.iter().map(|record| Change::remove(RowKind::Rollout, &record.id)).collect();
            for record in inner.rollouts.values_mut() {
                if record.rests() && record.created_at + RETENTION <= now {
                    Arc::make_mut(record).cancel("nobody has resumed it for 30 days");
                    changes.push(put_change(record)?);
                }
            }
            Ok::<_, anyhow::Error>((changes, gone))
        };
        let undo = |inner: &mut Inner, gone: Vec<Arc<RolloutRecord>>| {
            inner.rollouts.extend(gone.into_iter().map(|record| (record.id.clone(), record)));
        };
        self.transact(change, undo, |_, _| ()).await
    }
}

fn restore(inner: &mut Inner, former: Arc<RolloutRecord>) {
    inner.rollouts.insert(former.id.clone(), former);
}

/// # Errors
/// 409 where the key was used for something else.
pub(in crate::control_plane) fn check_same(
    known: &RolloutRecord,
    request: &str,
) -> Result<(), HttpError> {
    if known.request == request {
        return Ok(());
    }
    Err(HttpError::new(
        409,
        "idempotency_mismatch",
        "this Idempotency-Key was used for something else",
        Some("use a fresh key for each thing that is asked for"),
    ))
}

impl Inner {
    fn caller_may(&self, record: &RolloutRecord, now: i64) -> bool {
        let principal = self.resolve_subject(&record.caller_id, now);
        match &record.limits {
            Some(limits) => principal.and_then(|p| p.within(limits)).is_some(),
            None => principal.is_some(),
        }
    }

    /// What is seen of a cluster of a rollout. An operation that has ended is one also where its
    /// cluster is gone since.
    fn seen(&self, rollout: &str, cluster: &RolloutCluster, away: &BTreeSet<String>) -> Seen {
        let known = (cluster.agent.clone(), cluster.operation.clone());
        let operation = self.operations.get(&known).map(|record| &record.operation);
        let is_there = self.agents.get(&cluster.agent).is_some_and(|entry| !entry.row.revoked);
        match operation {
            Some(found) if is_there || found.state.ended() => {
                if found.state == OperationState::Queued && away.contains(&cluster.agent) {
                    return Seen::Away;
                }
                Seen::Operation(found.state, found.reason.clone(), found.message.clone())
            }
            _ if !is_there => Seen::Gone,
            _ => match self.sending.get(&(rollout.to_owned(), cluster.id.clone())) {
                Some(None) => Seen::Sending,
                Some(Some((reason, message))) => Seen::Refused(reason.clone(), message.clone()),
                None => Seen::Nothing,
            },
        }
    }

    /// # Errors
    /// 429 for one more than may go on at once.
    fn check_unfinished(&self, record: &RolloutRecord) -> Result<(), HttpError> {
        let unfinished = || {
            let all = self.rollouts.values();
            all.filter(|other| other.finished_at.is_none() && other.project == record.project)
        };
        let of_tenant = || unfinished().filter(|other| other.tenant() == record.tenant()).count();
        if unfinished().count() < MAX_UNFINISHED
            && (record.tenant().is_none() || of_tenant() < MAX_UNFINISHED_OF_TENANT)
        {
            return Ok(());
        }
        Err(HttpError::new(
            429,
            "too_many_rollouts",
            "too many rollouts are running or paused already",
            Some("`pipeops rollout list` shows them: resume or cancel those that are paused"),
        ))
    }

    /// Ids of ended rollouts that are no longer kept.
    fn old_rollouts(&self, now: i64) -> Vec<String> {
        let mut ended: Vec<(i64, &RolloutRecord)> =
            self.rollouts.values().filter_map(|r| Some((r.finished_at?, &**r))).collect();
        ended.sort_by_key(|(at, _)| std::cmp::Reverse(*at));
        let (mut clusters, mut old) = (BTreeMap::<&str, usize>::new(), Vec::new());
        for (at, record) in ended {
            let kept = clusters.entry(&record.project).or_default();
            *kept += record.clusters.len();
            if *kept > MAX_ENDED_CLUSTERS || at + RETENTION <= now {
                old.push(record.id.clone());
            }
        }
        old
    }
}

#[cfg(test)]
mod tests;
