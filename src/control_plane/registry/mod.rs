//! The registry: projects, tokens, agents, Runners. Decisions are made in memory, under one lock
//! that is never held across an await, and are durable before they are answered.

mod access;
mod admin;
mod agents;
#[cfg(test)]
mod asyncapi;
pub mod enrol;
mod entry;
mod events;
pub(super) mod jobs;
mod labels;
mod names;
mod operations;
mod principal;
pub mod rollouts;
mod transact;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use parking_lot::{Mutex, MutexGuard};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::error::{database_unavailable, not_found};
use crate::base::secret::Secret;
use crate::contract::tenant::CAPABILITY;
use crate::contract::token::{OPERATION_TOKENS, Role};
use crate::control_plane::keys::{Keys, random_token};
use crate::control_plane::model::{
    AccessToken, Admin, Agent, Enrolment, JobRecord, OperationRecord, Project,
};
use crate::control_plane::rollout::RolloutRecord;
use crate::control_plane::store::{RowKind, Store};
use agents::duplicate;
use entry::Entry;
use names::{check_facts, check_name};

pub use super::error::HttpError;
pub use admin::NewEnrolment;
pub use entry::ClusterView;
pub(super) use labels::parse_selector;
pub use principal::Principal;

/// Intervals of heartbeats and of status reports, seconds.
pub const HEARTBEAT_INTERVAL_S: u64 = 10;
pub const STATUS_INTERVAL_S: u64 = 60;

#[derive(Default)]
struct Inner {
    projects: BTreeMap<String, Project>,
    enrolments: BTreeMap<String, Enrolment>,
    agents: BTreeMap<String, Entry>,
    access_tokens: BTreeMap<String, (AccessToken, CancellationToken)>,
    admins: BTreeMap<String, (Admin, CancellationToken)>,
    operations: operations::OperationRecords,
    delivering: operations::Delivering,
    /// By id.
    jobs: BTreeMap<String, JobRecord>,
    rollouts: BTreeMap<String, Arc<RolloutRecord>>,
    sending: rollouts::Sending,
    /// Rollout and cluster of what this process has sent first, and certainly nobody has received.
    unreceived: BTreeSet<(String, String)>,
    /// Hash of a token → kind and id of its row.
    tokens: HashMap<String, (RowKind, String)>,
}

/// The registry of a control plane.
pub struct Registry {
    inner: Mutex<Inner>,
    store: Store,
    /// Base of the gateway's URLs in events, where there is a broker.
    event_base_url: Option<String>,
    /// Notified whenever an operation has ended.
    operation_ended: Notify,
    /// Time before this start does not count as silence of an agent.
    started: i64,
}

/// How a cluster is reached.
pub struct ClusterTarget {
    pub agent: String,
    pub cluster: String,
    pub public_key: String,
    pub max_role: Role,
    /// Its agent keeps the token of a tenant within the tenant's namespaces.
    pub tenants: bool,
    /// It knows tokens for one operation.
    pub operation_tokens: bool,
    pub revocation: CancellationToken,
}

/// A new token with a prefix for its kind, and its hash.
fn mint_token(keys: &Keys, prefix: &str) -> Result<(Secret, String), HttpError> {
    let token =
        Secret::new(format!("{prefix}_{}", random_token().map_err(|e| database_unavailable(&e))?));
    let hash = keys.token_hash(token.expose());
    Ok((token, hash))
}

fn name_ambiguous(name: &str, many: usize) -> HttpError {
    let message = format!("{many} clusters are called {name}");
    HttpError::new(409, "name_ambiguous", message, Some("use the id"))
}

impl Registry {
    /// Loads the registry from the database.
    ///
    /// # Errors
    /// When it does not answer, or a row cannot be read.
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
        inner.load_labels(&store).await?;
        for row in store.all(RowKind::Access).await? {
            inner.insert_access_token(row);
        }
        for row in store.all(RowKind::Admin).await? {
            inner.insert_admin(row);
        }
        for record in store.all::<OperationRecord>(RowKind::Operation).await? {
            inner.insert_operation(record);
        }
        for record in store.all::<JobRecord>(RowKind::Job).await? {
            inner.jobs.insert(record.id.clone(), record);
        }
        for record in store.all::<RolloutRecord>(RowKind::Rollout).await? {
            inner.rollouts.insert(record.id.clone(), Arc::new(record));
        }
        let operation_ended = Notify::new();
        let inner = Mutex::new(inner);
        Ok(Registry { inner, store, event_base_url, operation_ended, started: now })
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock()
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
    /// 404 for one outside its project, list or selector: for this caller it does not exist.
    pub fn check_access(&self, access: &AccessToken, id: &str) -> Result<(), HttpError> {
        let inner = self.inner();
        let row = &inner.find(id, Some(&access.project))?.row;
        if access.reach()(row) { Ok(()) } else { Err(not_found("cluster", id)) }
    }

    /// How a caller of `project` reaches a cluster.
    ///
    /// # Errors
    /// 404 when there is none in its project.
    pub fn target(&self, id: &str, project: Option<&str>) -> Result<ClusterTarget, HttpError> {
        let inner = self.inner();
        let entry = inner.find(id, project)?;
        if entry.row.revoked {
            return Err(not_found("cluster", id));
        }
        let can = |what: &str| entry.row.capabilities.iter().any(|have| have == what);
        Ok(ClusterTarget {
            agent: entry.row.id.clone(),
            cluster: entry.row.cluster_id.clone(),
            public_key: entry.row.info.public_key.clone(),
            max_role: Role::from_name(&entry.row.max_role).unwrap_or(Role::Viewer),
            tenants: can(CAPABILITY),
            operation_tokens: can(OPERATION_TOKENS),
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
    pub fn tunnel_revocation(&self, agent: &str, now: i64) -> Option<CancellationToken> {
        let inner = self.inner();
        let entry =
            inner.agents.get(agent).filter(|e| !e.row.revoked && e.conflict_until <= now)?;
        Some(entry.revocation.clone())
    }
}

impl Inner {
    /// The agent of a cluster, by the cluster's id or, where it is the only one of that name, by
    /// name.
    fn find(&self, id: &str, project: Option<&str>) -> Result<&Entry, HttpError> {
        let mine = || self.agents.values().filter(|e| project.is_none_or(|p| e.row.project == p));
        if let Some(entry) = mine().find(|e| e.row.cluster_id == id) {
            return Ok(entry);
        }
        let named: Vec<&Entry> = mine().filter(|e| e.row.cluster.name == id).collect();
        match named[..] {
            [entry] => Ok(entry),
            [] => Err(not_found("cluster", id)),
            _ => Err(name_ambiguous(id, named.len())),
        }
    }

    fn insert_enrolment(&mut self, row: Enrolment) {
        self.tokens.insert(row.hash.clone(), (RowKind::Enrolment, row.id.clone()));
        self.enrolments.insert(row.id.clone(), row);
    }

    fn insert_access_token(&mut self, row: AccessToken) {
        self.tokens.insert(row.hash.clone(), (RowKind::Access, row.id.clone()));
        self.access_tokens.insert(row.id.clone(), (row, CancellationToken::new()));
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
