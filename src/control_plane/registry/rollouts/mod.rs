//! Rollouts in the registry.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::{HttpError, Inner, Registry, not_found};
use crate::contract::types::OperationState;
use crate::control_plane::model::{Liveness, OperationRecord};
use crate::control_plane::rollout::{
    RolloutCluster, RolloutRecord, RolloutState, Seen, Steps, advance, is_unchanged,
};
use crate::control_plane::store::{Change, RowKind};

/// The most of a project that have not ended: each keeps what was asked for.
const MAX_UNFINISHED: Shares = Shares { all: 32, tenants: 24, tenant: 8, caller: 16 };
/// How long ended ones are kept, and paused ones wait for somebody, seconds.
const RETENTION: i64 = 30 * 86_400;
/// The most clusters of all ended rollouts of a project together, each of which counts as so many
/// more: the oldest ones go before.
const MAX_ENDED: Shares = Shares { all: 50_000, tenants: 37_500, tenant: 12_500, caller: 25_000 };
const WEIGHT: usize = 25;
/// An agent that was heard a moment ago, or may not be back yet since this process began, is tried
/// again for this long, seconds.
const PATIENCE: i64 = 45;

/// The most of a project, of its tenants together, of one tenant, and of one caller: nobody takes
/// the places of all others.
struct Shares {
    all: usize,
    tenants: usize,
    tenant: usize,
    caller: usize,
}

/// What is being sent, by rollout and cluster; with why it was refused, until that is stored.
pub(super) type Sending = BTreeMap<(String, String), Option<(String, String)>>;

/// What came of sending an operation.
pub enum Sent {
    /// Its record is there; or it may be, and is sent again under the same key.
    Maybe,
    /// It was handed over, and no answer came.
    Lost,
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
            record.finished_at.is_none()
                && record.state != RolloutState::Unknown
                && !(record.is_idle() && inner.caller_may(record, now))
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
            Ok((changes, (former, record.clone())))
        };
        self.transact(change, take_back, |_, _| ()).await
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
            let caller_may = inner.caller_may(&former, now);
            let seen = |cluster: &RolloutCluster| inner.seen(id, cluster, away);
            if is_unchanged(&former, caller_may, &seen, now) {
                return Ok((Vec::new(), (former.clone(), former, Steps::default())));
            }
            let mut record = RolloutRecord::clone(&former);
            let steps = advance(&mut record, caller_may, &seen, now);
            let mut changes = Vec::new();
            if steps.changed {
                changes.push(put_change(&record)?);
                for cluster in record.clusters.iter().filter(|cluster| cluster.ended()) {
                    let key = (record.id.clone(), cluster.id.clone());
                    inner.sending.remove(&key);
                    inner.unreceived.remove(&key);
                }
            }
            if record.finished_at.is_some() && former.finished_at.is_none() {
                changes.extend(self.rollout_event(&record, now));
            }
            for (before, after) in former.clusters.iter().zip(&record.clusters) {
                if before.operation.is_empty() && !after.operation.is_empty() {
                    inner.unreceived.insert((record.id.clone(), after.id.clone()));
                }
            }
            for cluster in &steps.send {
                inner.sending.insert((record.id.clone(), cluster.clone()), None);
            }
            let record = Arc::new(record);
            inner.rollouts.insert(record.id.clone(), record.clone());
            Ok::<_, HttpError>((changes, (former, record, steps)))
        };
        type Outcome = (Arc<RolloutRecord>, Arc<RolloutRecord>, Steps);
        let undo = |inner: &mut Inner, (former, record, steps): Outcome| {
            for cluster in steps.send {
                inner.sending.remove(&(former.id.clone(), cluster));
            }
            take_back(inner, (former, record));
        };
        self.transact(change, undo, |_, (_, record, steps)| (record, steps)).await
    }

    /// What came of sending an operation: what was refused is stored by the next
    /// [`Registry::advance_rollout`].
    pub fn end_sending(&self, rollout: &str, cluster: &str, sent: Sent) {
        let mut inner = self.inner();
        let key = (rollout.to_owned(), cluster.to_owned());
        // none where the cluster has ended in the meantime
        let Some(sending) = inner.sending.get_mut(&key) else { return };
        if let Sent::Refused(reason, message) = sent {
            *sending = Some((reason, message));
            return;
        }
        inner.sending.remove(&key);
        if matches!(sent, Sent::Lost) {
            inner.unreceived.remove(&key);
        }
    }

    /// Whether an agent may have an operation although no answer has come: one was lost, or the
    /// process that sent it first is gone.
    pub fn may_have_arrived(&self, rollout: &str, cluster: &RolloutCluster) -> bool {
        let key = (rollout.to_owned(), cluster.id.clone());
        !self.inner().unreceived.contains(&key)
    }

    /// Whether an agent that is not reached may be in a moment.
    pub fn may_come_back(&self, agent: &str, sent_at: i64, now: i64) -> bool {
        let inner = self.inner();
        let is_heard = inner.agents.get(agent).is_some_and(|entry| {
            matches!(entry.liveness(now, self.started).0, Liveness::Online | Liveness::Late)
        });
        is_heard && self.has_patience(sent_at, now, 0)
    }

    /// Whether what was sent first then is tried again: for so long, and for 45 s at least.
    pub fn has_patience(&self, sent_at: i64, now: i64, seconds: i64) -> bool {
        now - sent_at.max(self.started) < seconds.max(PATIENCE)
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
            let mut cancelled = Vec::new();
            for record in inner.rollouts.values_mut() {
                let since = record.paused_at.unwrap_or(record.created_at);
                if record.rests() && since + RETENTION <= now {
                    let former = record.clone();
                    Arc::make_mut(record).cancel("nobody has resumed it for 30 days");
                    changes.push(put_change(record)?);
                    cancelled.push((former, record.clone()));
                }
            }
            Ok::<_, anyhow::Error>((changes, (gone, cancelled)))
        };
        type Changed = (Arc<RolloutRecord>, Arc<RolloutRecord>);
        let undo = |inner: &mut Inner,
                    (gone, cancelled): (Vec<Arc<RolloutRecord>>, Vec<Changed>)| {
            inner.rollouts.extend(gone.into_iter().map(|record| (record.id.clone(), record)));
            cancelled.into_iter().for_each(|changed| take_back(inner, changed));
        };
        self.transact(change, undo, |_, _| ()).await
    }
}

/// Takes a change back that was not written, unless there was another one since: that one may have
/// been written.
fn take_back(inner: &mut Inner, (former, changed): (Arc<RolloutRecord>, Arc<RolloutRecord>)) {
    if inner.rollouts.get(&former.id).is_some_and(|now| Arc::ptr_eq(now, &changed)) {
        inner.rollouts.insert(former.id.clone(), former);
    }
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
        let mut counts = Counts::default();
        for other in self.rollouts.values().filter(|other| other.finished_at.is_none()) {
            counts.take(other, 1, &MAX_UNFINISHED);
        }
        if counts.take(record, 1, &MAX_UNFINISHED) {
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
        let (mut counts, mut old) = (Counts::default(), Vec::new());
        for (at, record) in ended {
            let weight = WEIGHT + record.clusters.len();
            if at + RETENTION <= now || !counts.take(record, weight, &MAX_ENDED) {
                old.push(record.id.clone());
            }
        }
        old
    }

    /// Whether an operation waits for its agent, and nothing but the agent.
    pub(super) fn is_due(&self, record: &OperationRecord) -> bool {
        record.operation.state == OperationState::Queued && !self.is_held(record)
    }

    /// Whether a queued operation is of a rollout that is paused: its agent gets it when that is
    /// resumed, within its time.
    fn is_held(&self, record: &OperationRecord) -> bool {
        let rollout = record.key.split_once('/').and_then(|(id, _)| self.rollouts.get(id));
        rollout.is_some_and(|rollout| {
            rollout.state == RolloutState::Paused && rollout.caller_id == record.caller_id
        })
    }
}

/// Rollouts of each project, of its tenants, and of each caller.
#[derive(Default)]
struct Counts<'a>(BTreeMap<(&'a str, &'a str, &'a str), usize>);

impl<'a> Counts<'a> {
    /// Counts one where there is place for it.
    fn take(&mut self, record: &'a RolloutRecord, weight: usize, most: &Shares) -> bool {
        let mut kinds = vec![("", "", most.all), ("caller", &*record.caller_id, most.caller)];
        if let Some(tenant) = record.tenant() {
            kinds.extend([("tenants", "", most.tenants), ("tenant", tenant, most.tenant)]);
        }
        let key = |kind: &'a str, name: &'a str| (&*record.project, kind, name);
        let fits = kinds.iter().all(|(kind, name, most)| {
            self.0.get(&key(kind, name)).copied().unwrap_or(0) + weight <= *most
        });
        for (kind, name, _) in kinds.into_iter().filter(|_| fits) {
            *self.0.entry(key(kind, name)).or_default() += weight;
        }
        fits
    }
}

#[cfg(test)]
mod tests;
