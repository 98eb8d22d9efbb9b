//! Jobs that Runners have brought, and the keys that values in them are sealed to.

use std::collections::BTreeSet;

use super::{HttpError, Inner, Registry, not_found};
use crate::contract::job::REPLAYED;
use crate::control_plane::model::JobRecord;
use crate::control_plane::store::{Change, RowKind};

/// A job is kept for this long after its token has expired, seconds: its message may be delivered
/// once more.
const RETENTION: i64 = 7 * 86_400;
/// The most jobs of one project.
const MAX_JOBS: usize = 100_000;
/// Of those that are answered and whose tokens have expired, so many are kept.
const MAX_ANSWERED: usize = 20_000;
/// The most that are removed at once.
const MAX_REMOVED: usize = 1000;

pub(in crate::control_plane) fn replayed() -> HttpError {
    HttpError::new(409, REPLAYED, "this job was answered before", None)
}

impl Registry {
    pub fn job(&self, id: &str) -> Option<JobRecord> {
        self.inner().jobs.get(id).cloned()
    }

    /// Stores a job before anything is done for it.
    ///
    /// # Errors
    /// 409 for one that was answered meanwhile, 429 for one too many, or a database that cannot be
    /// written: then nothing changes.
    pub async fn put_job(&self, record: JobRecord) -> Result<(), HttpError> {
        let change = |inner: &mut Inner| {
            let former = inner.jobs.get(&record.id).cloned();
            match &former {
                Some(former) if former.answered_at.is_some() => return Err(replayed()),
                Some(_) => {}
                None => inner.check_jobs(&record.project)?,
            }
            let change = Change::put(RowKind::Job, &record.id, &record)?;
            inner.jobs.insert(record.id.clone(), record.clone());
            Ok((vec![change], former))
        };
        let undo = |inner: &mut Inner, former: Option<JobRecord>| {
            match former {
                Some(former) => inner.jobs.insert(former.id.clone(), former),
                None => inner.jobs.remove(&record.id),
            };
        };
        self.transact(change, undo, |_, _| ()).await
    }

    /// The answer of a job is at the broker; told twice, nothing changes.
    ///
    /// # Errors
    /// 404, also for one of another project, or a database that cannot be written.
    pub async fn answer_job(&self, id: &str, project: &str, now: i64) -> Result<(), HttpError> {
        let change = |inner: &mut Inner| {
            let record = inner.jobs.get_mut(id).filter(|record| record.project == project);
            let record = record.ok_or_else(|| not_found("job", id))?;
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
                match record.answered_at {
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

    /// The key that values in jobs of a project are sealed to. True where it has replaced another.
    ///
    /// # Errors
    /// 409 where there is another one and it is not to be replaced, 404 for the project, or a
    /// database that cannot be written.
    pub async fn set_sealing_key(
        &self,
        project: &str,
        key: &str,
        replace: bool,
    ) -> Result<bool, HttpError> {
        let change = |inner: &mut Inner| {
            let row = inner.projects.get_mut(project);
            let row = row.ok_or_else(|| not_found("project", project))?;
            let former = row.sealing_key.clone();
            match former.as_deref() {
                Some(known) if known == key => return Ok((Vec::new(), None)),
                Some(_) if !replace => {
                    return Err(HttpError::new(
                        409,
                        "sealing_key_differs",
                        "the Runners of this project have another sealing key",
                        Some(
                            "all Runners of a project share one key file: copy it to this one; to \
                             use a new key from now on, start the Runner with --replace",
                        ),
                    ));
                }
                _ => {}
            }
            row.sealing_key = Some(key.to_owned());
            Ok((vec![Change::put(RowKind::Project, project, row)?], Some(former)))
        };
        let undo = |inner: &mut Inner, former: Option<Option<String>>| {
            if let (Some(row), Some(former)) = (inner.projects.get_mut(project), former) {
                row.sealing_key = former;
            }
        };
        self.transact(change, undo, |_, former| former.flatten().is_some()).await
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
        let open = self.jobs.values().filter(|job| job.answered_at.is_none());
        open.map(|job| (job.agent.as_str(), job.operation.as_str())).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::super::access::tests::registry;
    use super::*;

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
        }
    }

    #[tokio::test]
    async fn a_job_is_answered_once_and_forgotten_when_nobody_can_bring_it_any_more() {
        let dir = tempfile::tempdir().unwrap();
        let (registry, _) = registry(&dir).await;
        let code = |result: Result<(), HttpError>| result.map_err(|error| error.code);
        registry.put_job(job("j-1", 100)).await.unwrap();
        registry.put_job(job("j-1", 100)).await.unwrap();
        registry.put_job(job("j-2", 100)).await.unwrap();
        assert_eq!(code(registry.answer_job("j-1", "p-2", 5).await), Err("not_found"));
        assert_eq!(code(registry.answer_job("j-9", "p-1", 5).await), Err("not_found"));
        assert!(registry.inner().unanswered().contains(&("a-1", "o-j-1")));
        registry.answer_job("j-1", "p-1", 5).await.unwrap();
        registry.answer_job("j-1", "p-1", 6).await.unwrap();
        assert_eq!(registry.job("j-1").unwrap().answered_at, Some(5));
        assert!(!registry.inner().unanswered().contains(&("a-1", "o-j-1")));
        assert_eq!(code(registry.put_job(job("j-1", 100)).await), Err(REPLAYED));
        // after a restart too
        let store = registry.store.clone();
        let registry = Registry::load(store, None, 0).await.unwrap();
        assert_eq!(registry.job("j-1").unwrap().answered_at, Some(5));
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
            registry.put_job(job("j-2", 100)).await,
            registry.answer_job("j-1", "p-1", 5).await,
            registry.set_sealing_key(&project, "key", false).await.map(drop),
        ] {
            assert_eq!(failed.unwrap_err().code, "database_unavailable");
        }
        assert!(registry.tidy_jobs(100 + RETENTION).await.is_err());
        assert!(registry.job("j-2").is_none());
        assert_eq!(registry.job("j-1").unwrap().answered_at, None);
        assert_eq!(registry.project("default").unwrap().sealing_key, None);
    }

    #[tokio::test]
    async fn a_project_has_one_sealing_key_until_it_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let (registry, _) = registry(&dir).await;
        let project = registry.add_project("default", 1).await.unwrap().id;
        let set = async |key: &str, replace| {
            registry.set_sealing_key(&project, key, replace).await.map_err(|error| error.code)
        };
        assert_eq!(set("one", false).await, Ok(false));
        assert_eq!(set("one", false).await, Ok(false));
        assert_eq!(set("two", false).await, Err("sealing_key_differs"));
        assert_eq!(set("two", true).await, Ok(true));
        let unknown = registry.set_sealing_key("p-9", "one", false).await.unwrap_err();
        assert_eq!(unknown.code, "not_found");
        let registry = Registry::load(registry.store.clone(), None, 0).await.unwrap();
        assert_eq!(registry.project("default").unwrap().sealing_key.as_deref(), Some("two"));
        // as a version before wrote it, and reads it
        let before = r#"{"id": "p-1", "name": "n", "created_at": 1}"#;
        let read: crate::control_plane::model::Project = serde_json::from_str(before).unwrap();
        assert!(!serde_json::to_string(&read).unwrap().contains("sealing_key"));
    }
}
