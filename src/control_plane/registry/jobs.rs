//! Jobs that Runners have brought, and the keys that values in them are sealed to.

use std::collections::BTreeSet;

use super::{HttpError, Inner, Registry, not_found};
use crate::contract::job::{DELIVERY_UNKNOWN, MAX_TTL, REPLAYED};
use crate::contract::types::OperationState;
use crate::control_plane::model::JobRecord;
use crate::control_plane::store::{Change, RowKind};

/// A job is kept for this long after its token has expired, seconds: its message may be delivered
/// once more.
const RETENTION: i64 = 7 * 86_400;
/// The most jobs of one project.
const MAX_JOBS: usize = 100_000;
/// Of those that are answered or refused and whose tokens have expired, so many are kept.
const MAX_ANSWERED: usize = 20_000;
/// The most that are removed at once.
const MAX_REMOVED: usize = 1000;

pub(in crate::control_plane) fn replayed() -> HttpError {
    HttpError::new(409, REPLAYED, "this job was answered before", None)
}

/// Not the code for a path that a control plane of a version before does not know.
pub(in crate::control_plane) fn job_unknown(id: &str) -> HttpError {
    HttpError { code: "job_unknown", ..not_found("job", id) }
}

impl Registry {
    pub fn job(&self, id: &str) -> Option<JobRecord> {
        self.inner().jobs.get(id).cloned()
    }

    /// Stores a job before anything is done for it; returns what stands on record then. One that
    /// was answered or refused meanwhile stays as it is.
    ///
    /// # Errors
    /// 429 for one too many, or a database that cannot be written: then nothing changes.
    pub async fn put_job(&self, record: JobRecord) -> Result<JobRecord, HttpError> {
        self.write_job(record, |_, _| false).await
    }

    /// Stores a job that is refused for good; returns what stands on record then: without a refusal
    /// where the job was answered, or its operation taken, meanwhile.
    ///
    /// # Errors
    /// As [`Registry::put_job`].
    pub async fn refuse_job(&self, record: JobRecord) -> Result<JobRecord, HttpError> {
        let is_taken = |inner: &Inner, former: &JobRecord| {
            let operation = (former.agent.clone(), former.operation.clone());
            inner.operations.contains_key(&operation)
                || former.rollout.as_ref().is_some_and(|id| inner.rollouts.contains_key(id))
        };
        self.write_job(record, is_taken).await
    }

    async fn write_job(
        &self,
        record: JobRecord,
        is_taken: fn(&Inner, &JobRecord) -> bool,
    ) -> Result<JobRecord, HttpError> {
        let change = |inner: &mut Inner| {
            let former = inner.jobs.get(&record.id).cloned();
            let mut record = record.clone();
            match &former {
                Some(former)
                    if former.answered_at.is_some()
                        || former.refused.is_some()
                        || is_taken(inner, former) =>
                {
                    return Ok((Vec::new(), (None, former.clone())));
                }
                // what was known of it stays known
                Some(former) if record.refused.is_some() => {
                    record = JobRecord { refused: record.refused, ..former.clone() };
                }
                Some(_) => {}
                None => inner.check_jobs(&record.project)?,
            }
            let change = Change::put(RowKind::Job, &record.id, &record)?;
            inner.jobs.insert(record.id.clone(), record.clone());
            Ok((vec![change], (former, record)))
        };
        let undo = |inner: &mut Inner, (former, record): (Option<JobRecord>, JobRecord)| {
            match former {
                Some(former) => inner.jobs.insert(former.id.clone(), former),
                None => inner.jobs.remove(&record.id),
            };
        };
        self.transact(change, undo, |_, (_, record)| record).await
    }

    /// State, reason and message of what an agent had to do in `state`, where nothing will be heard
    /// of its end: the agent is gone, or was not heard for as long as jobs wait at most.
    pub fn lost(
        &self,
        agent: &str,
        state: OperationState,
        now: i64,
    ) -> Option<(OperationState, &'static str, &'static str)> {
        if state.ended() {
            return None;
        }
        let inner = self.inner();
        match inner.agents.get(agent).filter(|entry| !entry.row.revoked) {
            None => Some((
                OperationState::Interrupted,
                "cluster_gone",
                "the cluster was removed or revoked before the end of it was known",
            )),
            // what waits here ends with its time
            Some(entry)
                if state == OperationState::Running
                    && now - entry.seen_at.max(self.started) > MAX_TTL =>
            {
                Some((
                    OperationState::Unknown,
                    DELIVERY_UNKNOWN,
                    "the agent was not heard for 15 minutes: how it ends is not known",
                ))
            }
            Some(_) => None,
        }
    }

    /// The answer of a job is at the broker; told twice, nothing changes.
    ///
    /// # Errors
    /// 404, also for one of another project, or a database that cannot be written.
    pub async fn answer_job(&self, id: &str, project: &str, now: i64) -> Result<(), HttpError> {
        let change = |inner: &mut Inner| {
            let record = inner.jobs.get_mut(id).filter(|record| record.project == project);
            let record = record.ok_or_else(|| job_unknown(id))?;
            if record.answered_at.is_some() {
                return Ok((Vec::new(), false));
            }
            record.answered_at = Some(now);
            Ok::<_, HttpError>((vec![Change::put(RowKind::Job, id, record)?], true))
        };
        let undo = |inner: &mut Inner, _| {
            if let Some(record) = inner.jobs.get_mut(id) {
                record.answered_at = None;
            }
        };
        self.transact(change, undo, |_, _| ()).await
    }

    /// Removes jobs that nobody can bring any more.
    ///
    /// # Errors
    /// When the database cannot be written; the next call tries again.
    pub async fn tidy_jobs(&self, now: i64) -> anyhow::Result<()> {
        let change = |inner: &mut Inner| {
            let mut old: Vec<String> = Vec::new();
            let mut answered: Vec<(i64, &String)> = Vec::new();
            for (id, record) in inner.jobs.iter().filter(|(_, job)| job.expires_at <= now) {
                let refused_at = record.refused.as_ref().map(|refusal| refusal.at);
                match record.answered_at.or(refused_at) {
                    _ if record.expires_at + RETENTION <= now => old.push(id.clone()),
                    Some(at) => answered.push((at, id)),
                    None => {}
                }
            }
            answered.sort_unstable();
            let kept_from = answered.len().saturating_sub(MAX_ANSWERED);
            old.extend(answered[..kept_from].iter().map(|(_, id)| (*id).clone()));
            old.truncate(MAX_REMOVED);
            let changes = old.iter().map(|id| Change::remove(RowKind::Job, id)).collect();
            let gone: Vec<JobRecord> = old.iter().filter_map(|id| inner.jobs.remove(id)).collect();
            Ok((changes, gone))
        };
        let undo = |inner: &mut Inner, gone: Vec<JobRecord>| {
            inner.jobs.extend(gone.into_iter().map(|record| (record.id.clone(), record)));
        };
        self.transact(change, undo, |_, _| ()).await
    }

    /// The key that values in jobs of a project are sealed to; without one it is forgotten.
    ///
    /// # Errors
    /// 409 where there is another one, 404 for the project, or a database that cannot be written.
    pub async fn set_sealing_key(&self, project: &str, key: Option<&str>) -> Result<(), HttpError> {
        let change = |inner: &mut Inner| {
            let row = inner.projects.get_mut(project);
            let row = row.ok_or_else(|| not_found("project", project))?;
            let former = row.sealing_key.clone();
            if former.as_deref() == key {
                return Ok((Vec::new(), former));
            }
            if former.is_some() && key.is_some() {
                return Err(HttpError::new(
                    409,
                    "sealing_key_differs",
                    "the Runners of this project have another sealing key",
                    Some(
                        "all Runners of a project share one key file: copy it to this one; to use \
                         a new key from now on: control-plane project reset-sealing-key PROJECT",
                    ),
                ));
            }
            row.sealing_key = key.map(str::to_owned);
            Ok((vec![Change::put(RowKind::Project, project, row)?], former))
        };
        let undo = |inner: &mut Inner, former: Option<String>| {
            if let Some(row) = inner.projects.get_mut(project) {
                row.sealing_key = former;
            }
        };
        self.transact(change, undo, |_, _| ()).await
    }
}

impl Inner {
    fn check_jobs(&self, project: &str) -> Result<(), HttpError> {
        let of_project = || self.jobs.values().filter(|job| job.project == project).count();
        if self.jobs.len() < MAX_JOBS || of_project() < MAX_JOBS {
            return Ok(());
        }
        let hint = Some("they make room when they are answered and their tokens have expired");
        Err(HttpError::new(429, "too_many_jobs", "this project has too many jobs already", hint))
    }

    /// Agent and id of operations that are kept until their jobs are answered: the result is not
    /// known elsewhere, and without it the job would be done once more.
    pub(super) fn unanswered(&self) -> BTreeSet<(&str, &str)> {
        let open = self.jobs.values();
        let open = open.filter(|job| job.answered_at.is_none() && job.refused.is_none());
        open.map(|job| (job.agent.as_str(), job.operation.as_str())).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::super::access::tests::registry;
    use super::*;
    use crate::control_plane::model::JobRefusal;

    fn job(id: &str, expires_at: i64) -> JobRecord {
        JobRecord {
            id: id.into(),
            project: "p-1".into(),
            maker: "r-1".into(),
            agent: "a-1".into(),
            operation: format!("o-{id}"),
            rollout: None,
            created_at: 1,
            expires_at,
            answered_at: None,
            refused: None,
        }
    }

    #[tokio::test]
    async fn a_job_is_answered_once_and_forgotten_when_nobody_can_bring_it_any_more() {
        let dir = tempfile::tempdir().unwrap();
        let (registry, _) = registry(&dir).await;
        let code = |result: Result<(), HttpError>| result.map_err(|error| error.code);
        let refusal = || JobRefusal {
            status: 403,
            code: "maker_revoked".into(),
            message: "m".into(),
            hint: None,
            at: 7,
        };
        registry.put_job(job("j-1", 100)).await.unwrap();
        registry.put_job(job("j-1", 100)).await.unwrap();
        registry.put_job(job("j-2", 100)).await.unwrap();
        assert_eq!(code(registry.answer_job("j-1", "p-2", 5).await), Err("job_unknown"));
        assert_eq!(code(registry.answer_job("j-9", "p-1", 5).await), Err("job_unknown"));
        assert!(registry.inner().unanswered().contains(&("a-1", "o-j-1")));
        registry.answer_job("j-1", "p-1", 5).await.unwrap();
        registry.answer_job("j-1", "p-1", 6).await.unwrap();
        assert_eq!(registry.job("j-1").unwrap().answered_at, Some(5));
        assert!(!registry.inner().unanswered().contains(&("a-1", "o-j-1")));
        assert_eq!(registry.put_job(job("j-1", 100)).await.unwrap().answered_at, Some(5));
        // the answer stands, and of one that is refused what was known before stays known
        let refused =
            |id| JobRecord { agent: String::new(), refused: Some(refusal()), ..job(id, 100) };
        assert!(registry.refuse_job(refused("j-1")).await.unwrap().refused.is_none());
        for _ in 0..2 {
            let stored = registry.refuse_job(refused("j-2")).await.unwrap();
            assert_eq!((stored.refused.unwrap().at, stored.agent.as_str()), (7, "a-1"));
        }
        assert!(registry.put_job(job("j-2", 100)).await.unwrap().refused.is_some());
        assert!(!registry.inner().unanswered().contains(&("a-1", "o-j-2")));
        // after a restart too
        let store = registry.store.clone();
        let registry = Registry::load(store, None, 0).await.unwrap();
        assert_eq!(registry.job("j-1").unwrap().answered_at, Some(5));
        assert_eq!(registry.job("j-2").unwrap().refused.unwrap().code, "maker_revoked");
        for now in [99, 100, 99 + RETENTION] {
            registry.tidy_jobs(now).await.unwrap();
            assert!(registry.job("j-1").is_some() && registry.job("j-2").is_some(), "{now}");
        }
        registry.tidy_jobs(100 + RETENTION).await.unwrap();
        assert!(registry.job("j-1").is_none() && registry.job("j-2").is_none());
        assert!(registry.store.all::<JobRecord>(RowKind::Job).await.unwrap().is_empty());
    }

    #[tokio::test]
    async fn what_is_not_written_has_not_happened() {
        let dir = tempfile::tempdir().unwrap();
        let (registry, _) = registry(&dir).await;
        let project = registry.add_project("default", 1).await.unwrap().id;
        registry.put_job(job("j-1", 100)).await.unwrap();
        registry.store.clone().close().await;
        for failed in [
            registry.put_job(job("j-2", 100)).await.map(drop),
            registry.refuse_job(job("j-3", 100)).await.map(drop),
            registry.answer_job("j-1", "p-1", 5).await,
            registry.set_sealing_key(&project, Some("key")).await,
        ] {
            assert_eq!(failed.unwrap_err().code, "database_unavailable");
        }
        assert!(registry.tidy_jobs(100 + RETENTION).await.is_err());
        assert!(registry.job("j-2").is_none() && registry.job("j-3").is_none());
        assert_eq!(registry.job("j-1").unwrap().answered_at, None);
        assert_eq!(registry.project("default").unwrap().sealing_key, None);
    }

    #[tokio::test]
    async fn a_project_has_one_sealing_key_until_it_is_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let (registry, _) = registry(&dir).await;
        let project = registry.add_project("default", 1).await.unwrap().id;
        let set = async |key: Option<&str>| {
            registry.set_sealing_key(&project, key).await.map_err(|error| error.code)
        };
        assert_eq!(set(None).await, Ok(()));
        assert_eq!(set(Some("one")).await, Ok(()));
        assert_eq!(set(Some("one")).await, Ok(()));
        assert_eq!(set(Some("two")).await, Err("sealing_key_differs"));
        assert_eq!(registry.project("default").unwrap().sealing_key.as_deref(), Some("one"));
        assert_eq!(set(None).await, Ok(()));
        assert_eq!(set(Some("two")).await, Ok(()));
        let unknown = registry.set_sealing_key("p-9", Some("one")).await.unwrap_err();
        assert_eq!(unknown.code, "not_found");
        let registry = Registry::load(registry.store.clone(), None, 0).await.unwrap();
        assert_eq!(registry.project("default").unwrap().sealing_key.as_deref(), Some("two"));
        // as a version before wrote it, and reads it
        let before = r#"{"id": "p-1", "name": "n", "created_at": 1}"#;
        let read: crate::control_plane::model::Project = serde_json::from_str(before).unwrap();
        assert!(!serde_json::to_string(&read).unwrap().contains("sealing_key"));
    }
}
