//! Operations in the registry: queued, running and ended.

use std::collections::{BTreeMap, BTreeSet};

use super::events::Topic;
use super::{HttpError, Inner, Registry, database_unavailable, not_found};
use crate::contract::types::{Operation, OperationState};
use crate::control_plane::clock::rfc3339;
use crate::control_plane::model::Job;
use crate::control_plane::store::{Change, RowKind};

/// The most queued operations of one agent, and the most bytes of all queued ones.
const WAITING: usize = 16;
const BYTES: usize = 64 << 20;
/// Ended operations kept for each agent, and for how long, seconds.
const KEPT: usize = 256;
const DAYS: i64 = 7 * 86_400;

/// By agent and id.
pub(super) type Jobs = BTreeMap<(String, String), Job>;
/// Those that are being passed to their agents: they cannot be ended here, as the agent may have
/// them.
pub(super) type Delivering = BTreeSet<(String, String)>;

fn at(job: &Job) -> (String, String) {
    (job.agent.clone(), job.operation.id.clone())
}

fn row(job: &Job) -> String {
    format!("{}/{}", job.agent, job.operation.id)
}

fn put(job: &Job) -> Result<Change, HttpError> {
    Change::put(RowKind::Operation, &row(job), job).map_err(|e| database_unavailable(&e))
}

impl Job {
    /// Ends it here, not at the agent.
    fn end(&mut self, state: OperationState, message: &str, now: i64) {
        (self.operation.state, self.operation.message, self.operation.finished_at) =
            (state, message.into(), rfc3339(now));
        (self.sealed, self.changed_at) = (None, now);
    }
}

impl Registry {
    /// An operation of an agent.
    pub fn job(&self, agent: &str, id: &str) -> Option<Job> {
        self.inner().jobs.get(&(agent.to_owned(), id.to_owned())).cloned()
    }

    /// Operations of an agent, the newest first.
    pub fn jobs(&self, agent: &str) -> Vec<Job> {
        let inner = self.inner();
        let mut found: Vec<Job> = inner.jobs_of(agent).cloned().collect();
        found.sort_by(|a, b| {
            b.operation
                .created_at
                .cmp(&a.operation.created_at)
                .then(a.operation.id.cmp(&b.operation.id))
        });
        found
    }

    /// The longest waiting operation of each agent.
    pub fn oldest_queued(&self) -> Vec<Job> {
        let inner = self.inner();
        let mut first: BTreeMap<&str, &Job> = BTreeMap::new();
        for job in inner.jobs.values().filter(|j| j.operation.state == OperationState::Queued) {
            let kept = first.entry(&job.agent).or_insert(job);
            if job.asked_ms < kept.asked_ms {
                *kept = job;
            }
        }
        first.into_values().cloned().collect()
    }

    /// Running operations whose caller was revoked.
    pub fn running_for_revoked(&self) -> Vec<Job> {
        let inner = self.inner();
        let revoked =
            |subject: &str| inner.accesses.get(subject).is_some_and(|(access, _)| access.revoked);
        inner
            .jobs
            .values()
            .filter(|j| {
                j.operation.state == OperationState::Running && revoked(&j.operation.subject)
            })
            .cloned()
            .collect()
    }

    /// Whether an operation is queued for an agent.
    pub fn has_queued(&self, agent: &str) -> bool {
        self.inner().jobs_of(agent).any(|j| j.operation.state == OperationState::Queued)
    }

    /// Marks a queued operation as being passed to its agent, until [`Registry::end_delivery`].
    /// False when it is no longer queued.
    pub fn begin_delivery(&self, job: &Job) -> bool {
        let mut inner = self.inner();
        let at = at(job);
        let waits =
            inner.jobs.get(&at).is_some_and(|j| j.operation.state == OperationState::Queued);
        waits && inner.delivering.insert(at)
    }

    /// The agent has the operation, or could not be reached.
    pub fn end_delivery(&self, job: &Job) {
        self.inner().delivering.remove(&at(job));
    }

    /// Stores an operation, with an event when it has ended. One that has ended does not change any
    /// more.
    ///
    /// # Errors
    /// The queue is full, or the database cannot be written: then nothing changes.
    pub async fn put_job(&self, job: Job, now: i64) -> Result<(), HttpError> {
        self.write_job(job, false, now).await
    }

    async fn write_job(
        &self,
        job: Job,
        unless_delivering: bool,
        now: i64,
    ) -> Result<(), HttpError> {
        let at = at(&job);
        let change = |inner: &mut Inner| {
            if unless_delivering && inner.delivering.contains(&at) {
                return Err(HttpError::new(
                    409,
                    "operation_underway",
                    "it is being handed to the agent",
                    Some("try again in a moment"),
                ));
            }
            let agent =
                inner.agents.get(&job.agent).ok_or_else(|| not_found("agent", &job.agent))?;
            let former = inner.jobs.get(&at).cloned();
            let news = |f: &Job| {
                f.operation.state == OperationState::Expired
                    && job.operation.state.ended()
                    && job.operation.state != OperationState::Expired
            };
            // an agent may have received what had expired here: then its report counts
            if former.as_ref().is_some_and(|f| f.operation.state.ended() && !news(f)) {
                return Ok((Vec::new(), former));
            }
            if former.is_none() && job.sealed.is_some() {
                inner.room_for(&job)?;
            }
            let mut changes = vec![put(&job)?];
            if job.operation.state.ended() {
                changes.extend(self.event(&agent.row, Topic::Finished(&job.operation), now));
            }
            inner.jobs.insert(at.clone(), job);
            Ok((changes, former))
        };
        let undo = |inner: &mut Inner, former: Option<Job>| {
            match former {
                Some(former) => inner.jobs.insert(at.clone(), former),
                None => inner.jobs.remove(&at),
            };
        };
        self.transact(change, undo, |_, _| ()).await
    }

    /// An agent's report of the end of an operation; reported twice, nothing changes.
    ///
    /// # Errors
    /// A state that is no end, or a database that cannot be written.
    pub async fn finish_job(
        &self,
        agent: &str,
        id: &str,
        told: Operation,
        now: i64,
    ) -> Result<(), HttpError> {
        let hex = |rest: &str| rest.len() == 32 && rest.bytes().all(|b| b.is_ascii_hexdigit());
        if told.id != id || !id.strip_prefix("o-").is_some_and(hex) || !told.state.ended() {
            return Err(HttpError::new(
                400,
                "bad_operation",
                "this is not the end of that operation",
                None,
            ));
        }
        let known = self.job(agent, id);
        let mut job = known.unwrap_or_else(|| Job {
            agent: agent.into(),
            operation: Operation::default(),
            key: String::new(),
            request: String::new(),
            sealed: None,
            asked_ms: 0,
            expires_at: 0,
            changed_at: now,
        });
        (job.operation, job.sealed, job.changed_at) = (told, None, now);
        self.put_job(job, now).await
    }

    /// Ends a queued operation, unless it is being passed to its agent.
    ///
    /// # Errors
    /// 409 while it is being passed on; a database that cannot be written.
    pub async fn cancel_queued(
        &self,
        mut job: Job,
        state: OperationState,
        message: &str,
        now: i64,
    ) -> Result<(), HttpError> {
        job.end(state, message, now);
        self.write_job(job, true, now).await
    }

    /// Ends an operation at once.
    ///
    /// # Errors
    /// No database.
    pub async fn end_job(
        &self,
        mut job: Job,
        state: OperationState,
        message: &str,
        now: i64,
    ) -> Result<(), HttpError> {
        job.end(state, message, now);
        self.put_job(job, now).await
    }

    /// Ends operations that have waited too long, and removes old ones.
    ///
    /// # Errors
    /// When the database cannot be written; the next call tries again.
    pub async fn tidy_jobs(&self, now: i64) -> anyhow::Result<()> {
        let (late, old) = {
            let inner = self.inner();
            let late: Vec<Job> = inner
                .jobs
                .values()
                .filter(|j| j.late(now) && !inner.delivering.contains(&at(j)))
                .cloned()
                .collect();
            (late, inner.old_jobs(now))
        };
        for job in late {
            let (state, message) = match job.operation.state {
                OperationState::Queued => {
                    (OperationState::Expired, "the agent was not there in time")
                }
                _ => (OperationState::Interrupted, "the agent has told nothing of it for 7 days"),
            };
            self.cancel_queued(job, state, message, now)
                .await
                .map_err(|e| anyhow::anyhow!(e.message))?;
        }
        let change = |inner: &mut Inner| {
            let gone: Vec<Job> = old.iter().filter_map(|at| inner.jobs.remove(at)).collect();
            let changes =
                gone.iter().map(|job| Change::remove(RowKind::Operation, &row(job))).collect();
            Ok((changes, gone))
        };
        let undo = |inner: &mut Inner, gone: Vec<Job>| {
            inner.jobs.extend(gone.into_iter().map(|job| (at(&job), job)))
        };
        self.transact(change, undo, |_, _| ()).await
    }
}

impl Job {
    fn late(&self, now: i64) -> bool {
        match self.operation.state {
            OperationState::Queued => self.expires_at <= now,
            OperationState::Running => self.changed_at + DAYS <= now,
            _ => false,
        }
    }
}

impl Inner {
    fn jobs_of(&self, agent: &str) -> impl Iterator<Item = &Job> {
        let owner = agent.to_owned();
        self.jobs
            .range((owner.clone(), String::new())..)
            .take_while(move |((a, _), _)| *a == owner)
            .map(|(_, job)| job)
    }

    fn room_for(&self, job: &Job) -> Result<(), HttpError> {
        let size = |j: &Job| j.sealed.as_ref().map_or(0, String::len);
        let mine = self.jobs_of(&job.agent).filter(|j| j.sealed.is_some()).count();
        let all: usize = self.jobs.values().map(size).sum();
        if mine >= WAITING || all + size(job) > BYTES {
            return Err(HttpError::new(
                429,
                "queue_full",
                "too many operations wait already",
                Some("wait until the agent is back, or cancel some"),
            ));
        }
        Ok(())
    }

    fn old_jobs(&self, now: i64) -> Vec<(String, String)> {
        let mut ended: BTreeMap<&str, Vec<_>> = BTreeMap::new();
        for (at, job) in self.jobs.iter().filter(|(_, j)| j.operation.state.ended()) {
            ended.entry(&job.agent).or_default().push((job.changed_at, at));
        }
        let mut old = Vec::new();
        for mut of_agent in ended.into_values() {
            of_agent.sort_unstable();
            of_agent.reverse();
            old.extend(
                of_agent
                    .iter()
                    .enumerate()
                    .filter(|(n, (changed, _))| *n >= KEPT || changed + DAYS <= now)
                    .map(|(_, (_, at))| (*at).clone()),
            );
        }
        old
    }

    /// Removes an agent's operations, and returns the changes to write.
    pub(super) fn forget_jobs(&mut self, agent: &str) -> (Vec<Change>, Vec<Job>) {
        let gone: Vec<Job> = self.jobs_of(agent).cloned().collect();
        for job in &gone {
            self.jobs.remove(&(job.agent.clone(), job.operation.id.clone()));
        }
        (gone.iter().map(|job| Change::remove(RowKind::Operation, &row(job))).collect(), gone)
    }
}
