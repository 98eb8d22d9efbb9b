//! Who is known and what he may: decided in memory, under one lock that is never held over a wait, durable before it is answered.

mod admin;
pub mod enrol;
mod events;
mod names;
mod operations;
mod transact;

use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, MutexGuard};

use serde::Serialize;
use tokio_util::sync::CancellationToken;

use crate::base::secret::{Secret, constant_time_eq};
use crate::contract::token::Role;
use crate::contract::types::{Directive, Heartbeat, StatusReport};
use crate::control_plane::keys::{Keys, random_token};
use crate::control_plane::model::{Access, Admin, Agent, Enrolment, Job, Liveness, Project};
use crate::control_plane::store::{Change, RowKind, Store};
use events::Topic;
use names::{check_facts, check_name};

/// How often agents speak, seconds.
pub const HEARTBEAT: u64 = 10;
pub const STATUS: u64 = 60;
/// A heartbeat that is this late is late, and this late is offline, seconds.
const LATE: i64 = 25;
const OFFLINE: i64 = 45;
/// The subject of what the local socket asks for.
const LOCAL: &str = "admin:local";

/// A refusal: status, stable code, what, and what to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HttpError {
    pub status: u16,
    pub code: &'static str,
    pub message: String,
    pub hint: Option<&'static str>,
}

impl HttpError {
    pub fn new(
        status: u16,
        code: &'static str,
        message: impl Into<String>,
        hint: Option<&'static str>,
    ) -> HttpError {
        HttpError { status, code, message: message.into(), hint }
    }
}

/// Who asks, once that is known. There is none of these for a request that shows nothing: what it may call is told of nobody.
#[derive(Clone, Debug)]
pub enum Principal {
    Enrolment(String),
    Agent(String),
    Access(Box<Access>),
    Admin(String),
    /// Whoever can open the socket in the data directory. It has no token, and no administrator can have its name.
    Local,
}

impl Principal {
    /// The `sub` of tokens that are minted for him.
    pub fn subject(&self) -> String {
        match self {
            Principal::Access(access) => access.id.clone(),
            Principal::Admin(name) => {
                format!("admin:{}", name.replace(|c: char| !c.is_ascii_graphic(), "_"))
            }
            Principal::Local => LOCAL.into(),
            Principal::Agent(id) | Principal::Enrolment(id) => id.clone(),
        }
    }

    /// May do everything that there is.
    pub fn all(&self) -> bool {
        matches!(self, Principal::Admin(_) | Principal::Local)
    }

    /// The project that bounds what he sees; an administrator sees all.
    pub fn project(&self) -> Option<&str> {
        match self {
            Principal::Access(access) => Some(&access.project),
            Principal::Enrolment(_)
            | Principal::Agent(_)
            | Principal::Admin(_)
            | Principal::Local => None,
        }
    }
}

/// What is known of an agent and not written at each breath.
struct Entry {
    row: Agent,
    seen_at: i64,
    /// It must be written at the next flush.
    dirty: bool,
    draining: bool,
    conflict_until: i64,
    tunnel: String,
    uptime_s: u64,
    report: Option<StatusReport>,
    /// The report came after the last one that Runners were told.
    report_unannounced: bool,
    /// Cancelled when it is revoked or removed: its open streams end.
    revocation: CancellationToken,
}

#[derive(Default)]
struct Inner {
    projects: BTreeMap<String, Project>,
    enrolments: BTreeMap<String, Enrolment>,
    agents: BTreeMap<String, Entry>,
    accesses: BTreeMap<String, (Access, CancellationToken)>,
    admins: BTreeMap<String, (Admin, CancellationToken)>,
    jobs: operations::Jobs,
    delivering: operations::Delivering,
    /// Hash of a token → kind and id of its row.
    tokens: HashMap<String, (RowKind, String)>,
}

/// The registry of a control plane.
pub struct Registry {
    inner: Mutex<Inner>,
    store: Store,
    /// Base of the gateway's URLs, where Runners are told of agents.
    event_base_url: Option<String>,
    /// Agents are not called offline for the time in which nobody listened.
    started: i64,
}

/// A cluster as the API and the page show it.
#[derive(Clone, Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "Cluster"))]
pub struct ClusterView {
    pub id: String,
    pub name: String,
    pub project: String,
    pub agent_id: String,
    pub state: Liveness,
    pub reason: String,
    pub version: String,
    pub agent_version: String,
    pub provider: String,
    pub nodes: u32,
    pub max_role: String,
    pub tunnel: String,
    pub seen_at: i64,
    pub registered_at: i64,
    pub uptime_s: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub report: Option<StatusReport>,
}

/// Where a caller of a cluster goes.
pub struct Route {
    pub agent: String,
    pub cluster: String,
    pub public_key: String,
    pub most: Role,
    pub revocation: CancellationToken,
}

fn not_found(what: &str, id: &str) -> HttpError {
    HttpError::new(404, "not_found", format!("there is no {what} {id}"), None)
}

pub(super) fn database_unavailable(error: &anyhow::Error) -> HttpError {
    tracing::error!(error = format!("{error:#}"), "the database does not take a change");
    HttpError::new(
        503,
        "database_unavailable",
        "the control plane cannot write its database",
        Some("try again soon; its log says more"),
    )
}

/// A fresh token of a kind, and its hash.
fn mint_token(keys: &Keys, prefix: &str) -> Result<(Secret, String), HttpError> {
    let token =
        Secret::new(format!("{prefix}_{}", random_token().map_err(|e| database_unavailable(&e))?));
    let hash = keys.token_hash(token.expose());
    Ok((token, hash))
}

impl Entry {
    fn new(row: Agent) -> Entry {
        let seen_at = row.seen_at;
        Entry {
            row,
            seen_at,
            dirty: false,
            draining: false,
            conflict_until: 0,
            tunnel: String::new(),
            uptime_s: 0,
            report: None,
            report_unannounced: false,
            revocation: CancellationToken::new(),
        }
    }

    fn liveness(&self, now: i64, started: i64) -> (Liveness, String) {
        let silent = now - self.seen_at;
        let judged = now - self.seen_at.max(started);
        if self.row.revoked {
            return (Liveness::Revoked, "revoked by an administrator".into());
        }
        if self.conflict_until > now {
            return (
                Liveness::Duplicate,
                "two machines show this identity: remove the copied disk's /var/lib/pipeops-agent"
                    .into(),
            );
        }
        if judged > OFFLINE && self.row.credentials.iter().all(|c| c.expires_at <= now) {
            return (
                Liveness::Expired,
                format!(
                    "silent for {silent} s, and its credential's time is over: enrol it again with a token"
                ),
            );
        }
        if self.draining {
            let state = if judged <= OFFLINE { Liveness::Draining } else { Liveness::Offline };
            return (state, "it said that it stops".into());
        }
        let overdue = format!("no heartbeat for {silent} s");
        if judged <= LATE {
            (Liveness::Online, String::new())
        } else if judged <= OFFLINE {
            (Liveness::Late, overdue)
        } else {
            (Liveness::Offline, overdue)
        }
    }

    fn view(&self, now: i64, started: i64, deep: bool) -> ClusterView {
        let (state, reason) = self.liveness(now, started);
        let row = &self.row;
        // what it runs now, not what it ran when it registered
        let server = self.report.as_ref().and_then(|r| r.nodes.iter().find(|n| n.role == "server"));
        let reported = server.map(|n| n.version.clone()).filter(|v| !v.is_empty());
        ClusterView {
            id: row.cluster_id.clone(),
            name: row.cluster.name.clone(),
            project: row.project.clone(),
            agent_id: row.id.clone(),
            state,
            reason,
            version: reported.unwrap_or_else(|| row.cluster.version.clone()),
            agent_version: row.info.version.clone(),
            provider: row.cluster.provider.clone(),
            nodes: self.report.as_ref().map_or(row.cluster.node_count, |r| {
                u32::try_from(r.nodes.len()).unwrap_or(u32::MAX)
            }),
            max_role: row.max_role.clone(),
            tunnel: if state == Liveness::Online { self.tunnel.clone() } else { String::new() },
            seen_at: self.seen_at,
            registered_at: row.registered_at,
            uptime_s: self.uptime_s,
            report: self.report.clone().filter(|_| deep),
        }
    }
}

impl Registry {
    /// Everything that the database holds.
    ///
    /// # Errors
    /// When it does not answer or holds what cannot be read.
    pub async fn load(
        store: Store,
        event_base_url: Option<String>,
        now: i64,
    ) -> anyhow::Result<Registry> {
        let mut inner = Inner::default();
        for project in store.all::<Project>(RowKind::Project).await? {
            inner.projects.insert(project.id.clone(), project);
        }
        for row in store.all(RowKind::Enrolment).await? {
            inner.insert_enrolment(row);
        }
        for row in store.all::<Agent>(RowKind::Agent).await? {
            inner.insert_agent(Entry::new(row));
        }
        for row in store.all(RowKind::Access).await? {
            inner.insert_access(row);
        }
        for row in store.all(RowKind::Admin).await? {
            inner.insert_admin(row);
        }
        for job in store.all::<Job>(RowKind::Operation).await? {
            inner.jobs.insert((job.agent.clone(), job.operation.id.clone()), job);
        }
        Ok(Registry { inner: Mutex::new(inner), store, event_base_url, started: now })
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        // every change is whole before the lock is given back
        super::lock(&self.inner)
    }

    /// Whose token it is. One that is revoked or whose time is over is nobody's.
    ///
    /// # Errors
    /// 401, with no hint at whether it was ever known, but for its own time being over.
    pub fn authenticate(&self, hash: &str, now: i64) -> Result<Principal, HttpError> {
        let unknown = || {
            HttpError::new(
                401,
                "token_unknown",
                "the token is wrong, revoked, or of another control plane",
                None,
            )
        };
        let expired = || {
            HttpError::new(
                401,
                "token_expired",
                "the token's time is over",
                Some("get another one"),
            )
        };
        let inner = self.inner();
        let (kind, id) = inner.tokens.get(hash).ok_or_else(unknown)?;
        match kind {
            RowKind::Enrolment => {
                let row = inner
                    .enrolments
                    .get(id)
                    .filter(|e| !e.revoked && constant_time_eq(&e.hash, hash))
                    .ok_or_else(unknown)?;
                if row.expires_at <= now {
                    Err(expired())
                } else {
                    Ok(Principal::Enrolment(id.clone()))
                }
            }
            RowKind::Agent => {
                let entry = inner.agents.get(id).ok_or_else(unknown)?;
                let credential = entry
                    .row
                    .credentials
                    .iter()
                    .find(|c| constant_time_eq(&c.hash, hash))
                    .ok_or_else(unknown)?;
                if entry.row.revoked {
                    return Err(HttpError::new(
                        403,
                        "agent_revoked",
                        "this agent was revoked",
                        Some("remove it and enrol it again with a fresh token"),
                    ));
                }
                if credential.expires_at <= now {
                    return Err(HttpError::new(
                        401,
                        "credential_expired",
                        "the credential's time is over",
                        Some("enrol again with a token"),
                    ));
                }
                Ok(Principal::Agent(id.clone()))
            }
            RowKind::Access => {
                let row = inner
                    .accesses
                    .get(id)
                    .map(|a| &a.0)
                    .filter(|a| !a.revoked && constant_time_eq(&a.hash, hash))
                    .ok_or_else(unknown)?;
                if row.expires_at.is_some_and(|at| at <= now) {
                    Err(expired())
                } else {
                    Ok(Principal::Access(Box::new(row.clone())))
                }
            }
            RowKind::Admin => Ok(Principal::Admin(
                inner
                    .admins
                    .get(id)
                    .map(|a| &a.0)
                    .filter(|a| constant_time_eq(&a.hash, hash))
                    .ok_or_else(unknown)?
                    .name
                    .clone(),
            )),
            RowKind::Project | RowKind::Operation => Err(unknown()),
        }
    }

    /// A sign of life. It stays in memory; [`Registry::flush`] writes it.
    ///
    /// # Errors
    /// 404 for one that is not known, 409 while two machines show its identity.
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
    /// 404 for one that is not known.
    pub fn report(&self, id: &str, report: StatusReport) -> Result<(), HttpError> {
        let mut inner = self.inner();
        let entry = inner.agents.get_mut(id).ok_or_else(|| not_found("agent", id))?;
        entry.report = Some(report);
        entry.report_unannounced = self.event_base_url.is_some();
        Ok(())
    }

    /// Writes what heartbeats changed, all in one.
    ///
    /// # Errors
    /// When the database takes nothing; it is tried again at the next flush.
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

    /// Clusters of a project, or all.
    pub fn clusters(&self, project: Option<&str>, now: i64) -> Vec<ClusterView> {
        let inner = self.inner();
        let mine = inner.agents.values().filter(|e| project.is_none_or(|p| e.row.project == p));
        mine.map(|e| e.view(now, self.started, false)).collect()
    }

    /// One cluster by id or, where it is the only one of that name, by name.
    ///
    /// # Errors
    /// 404; 409 for a name that several have.
    pub fn cluster(
        &self,
        id: &str,
        project: Option<&str>,
        now: i64,
    ) -> Result<ClusterView, HttpError> {
        Ok(self.inner().find(id, project)?.view(now, self.started, true))
    }

    /// Whether an access reaches a cluster.
    ///
    /// # Errors
    /// 404 for one outside its project or list: it is not there for him.
    pub fn reaches(&self, access: &Access, id: &str) -> Result<(), HttpError> {
        let inner = self.inner();
        let cluster = &inner.find(id, Some(&access.project))?.row.cluster_id;
        if access.includes(cluster) { Ok(()) } else { Err(not_found("cluster", id)) }
    }

    /// The way to a cluster for a caller of `project`.
    ///
    /// # Errors
    /// 404 when there is none that he may know of.
    pub fn route(&self, id: &str, project: Option<&str>) -> Result<Route, HttpError> {
        let inner = self.inner();
        let entry = inner.find(id, project)?;
        if entry.row.revoked {
            return Err(not_found("cluster", id));
        }
        Ok(Route {
            agent: entry.row.id.clone(),
            cluster: entry.row.cluster_id.clone(),
            public_key: entry.row.info.public_key.clone(),
            most: Role::of(&entry.row.max_role).unwrap_or(Role::Viewer),
            revocation: entry.revocation.clone(),
        })
    }

    /// The cluster that an agent speaks for.
    pub fn cluster_of(&self, agent: &str) -> Option<String> {
        self.inner().agents.get(agent).map(|e| e.row.cluster_id.clone())
    }

    /// The key that an agent registered with, in PEM.
    pub fn public_key(&self, agent: &str) -> Option<String> {
        self.inner()
            .agents
            .get(agent)
            .filter(|e| !e.row.revoked)
            .map(|e| e.row.info.public_key.clone())
    }

    /// Whether an agent may hold a tunnel, and what ends it.
    pub fn tunnel(&self, agent: &str, now: i64) -> Option<CancellationToken> {
        let inner = self.inner();
        let entry =
            inner.agents.get(agent).filter(|e| !e.row.revoked && e.conflict_until <= now)?;
        Some(entry.revocation.clone())
    }

    /// Refuses an agent from now on; its streams end.
    ///
    /// # Errors
    /// 404, or no database.
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

    /// Forgets an agent and its cluster.
    ///
    /// # Errors
    /// 404, or no database.
    pub async fn remove_agent(&self, id: &str, now: i64) -> Result<(), HttpError> {
        let change = |inner: &mut Inner| {
            let entry = inner.agents.remove(id).ok_or_else(|| not_found("agent", id))?;
            let (mut changes, jobs) = inner.forget_jobs(id);
            changes.push(Change::remove(RowKind::Agent, id));
            changes.extend(self.event(&entry.row, Topic::Deregistered, now));
            Ok::<_, HttpError>((changes, (entry, jobs)))
        };
        let undo = |inner: &mut Inner, (entry, jobs): (Entry, Vec<Job>)| {
            inner.agents.entry(id.to_owned()).or_insert(entry);
            inner.jobs.extend(
                jobs.into_iter().map(|job| ((job.agent.clone(), job.operation.id.clone()), job)),
            );
        };
        let done = |inner: &mut Inner, (entry, _): (Entry, Vec<Job>)| {
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

fn duplicate() -> HttpError {
    HttpError::new(
        409,
        "duplicate_identity",
        "another machine shows the same identity",
        Some(
            "on the copied disk: stop pipeops-agent, remove /var/lib/pipeops-agent, enrol it anew",
        ),
    )
}

impl Inner {
    /// The agent of a cluster, by the cluster's id or, where it is the only one of that name, by name.
    fn find(&self, id: &str, project: Option<&str>) -> Result<&Entry, HttpError> {
        let mine = || self.agents.values().filter(|e| project.is_none_or(|p| e.row.project == p));
        if let Some(entry) = mine().find(|e| e.row.cluster_id == id) {
            return Ok(entry);
        }
        let named: Vec<&Entry> = mine().filter(|e| e.row.cluster.name == id).collect();
        match named[..] {
            [entry] => Ok(entry),
            [] => Err(not_found("cluster", id)),
            _ => Err(HttpError::new(
                409,
                "name_ambiguous",
                format!("{} clusters are called {id}", named.len()),
                Some("use the id"),
            )),
        }
    }

    fn insert_enrolment(&mut self, row: Enrolment) {
        self.tokens.insert(row.hash.clone(), (RowKind::Enrolment, row.id.clone()));
        self.enrolments.insert(row.id.clone(), row);
    }

    fn insert_access(&mut self, row: Access) {
        self.tokens.insert(row.hash.clone(), (RowKind::Access, row.id.clone()));
        self.accesses.insert(row.id.clone(), (row, CancellationToken::new()));
    }

    fn insert_admin(&mut self, row: Admin) {
        self.tokens.insert(row.hash.clone(), (RowKind::Admin, row.id.clone()));
        self.admins.insert(row.id.clone(), (row, CancellationToken::new()));
    }

    fn insert_agent(&mut self, entry: Entry) {
        for credential in &entry.row.credentials {
            self.tokens.insert(credential.hash.clone(), (RowKind::Agent, entry.row.id.clone()));
        }
        self.agents.insert(entry.row.id.clone(), entry);
    }
}
