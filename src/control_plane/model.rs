//! Rows of the registry, as they are stored.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::contract::selector::Selector;
use crate::contract::token::Role;
use crate::contract::types::{AgentInfo, ClusterInfo, Operation};

/// A row as the database has it; tokens stand in it as keyed hashes only.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Row {
    pub kind: String,
    pub id: String,
    pub body: String,
}

/// Owner of tokens, agents, clusters and Runners.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Project {
    pub id: String,
    pub name: String,
    /// Seconds since 1970, like every time here.
    pub created_at: i64,
    /// What values in its jobs are sealed to: base64 of the public key (X25519) of its Runners.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sealing_key: Option<String>,
}

/// A token that lets new agents in.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "EnrolmentToken"))]
pub struct Enrolment {
    pub id: String,
    pub project: String,
    pub name: String,
    /// Keyed hash; the token itself was shown once and is nowhere. The API shows neither.
    #[cfg_attr(test, schemars(skip))]
    pub hash: String,
    pub created_at: i64,
    pub expires_at: i64,
    /// How many more agents it lets in; none: as many as come.
    pub uses_left: Option<u32>,
    pub revoked: bool,
    /// The labels that a new cluster gets at the control plane.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
}

/// A credential that an agent holds.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct AgentCredential {
    pub hash: String,
    pub expires_at: i64,
}

/// An agent and the cluster that it speaks for.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Agent {
    /// `a-` and 32 hex digits of its key.
    pub id: String,
    pub cluster_id: String,
    pub project: String,
    pub info: AgentInfo,
    pub cluster: ClusterInfo,
    pub capabilities: Vec<String>,
    pub max_role: String,
    /// The newest last; older ones live through their overlap.
    pub credentials: Vec<AgentCredential>,
    pub registered_at: i64,
    /// When it was last heard, as of the last flush.
    pub seen_at: i64,
    pub revoked: bool,
    /// What Runners were told last: whether it is there.
    #[serde(default)]
    pub online: bool,
    /// The labels of its cluster that were set at the control plane: [`ClusterLabels`].
    #[serde(skip)]
    pub labels: BTreeMap<String, String>,
}

/// The labels of an agent's cluster that were set at the control plane.
// a row of their own: versions before labels write the one of the agent without them
#[derive(Debug, Serialize, Deserialize)]
pub struct ClusterLabels {
    pub agent: String,
    pub labels: BTreeMap<String, String>,
    /// When that agent registered first: one that was removed and registers again has none of them.
    #[serde(default)]
    pub registered_at: i64,
}

/// What a bearer of the Runner side may reach.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "Access"))]
pub struct AccessToken {
    pub id: String,
    pub project: String,
    pub name: String,
    pub kind: AccessKind,
    #[cfg_attr(test, schemars(skip))]
    pub hash: String,
    pub role: Role,
    /// Only these clusters; none: all of the project. Beside a selector an empty list is no limit.
    // versions before selectors read such a row as one that reaches no cluster
    pub clusters: Option<Vec<String>>,
    /// Only these namespaces; none: all. Of a tenant's token an empty list is all of that tenant.
    // versions before tenants read such a row as one that reaches no namespace
    pub namespaces: Option<Vec<String>>,
    /// Only the namespaces of this tenant; none: also those of no tenant.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tenant: Option<String>,
    pub created_at: i64,
    pub expires_at: Option<i64>,
    pub revoked: bool,
    /// Id of the principal that made it: a kubeconfig is revoked with its maker.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub maker: Option<String>,
    /// A user: a Runner whose holder is a person, and who is known by name.
    // no kind of its own: versions before this one read the row as a Runner
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub person: bool,
    /// Only clusters with such labels: those that were set at the control plane, and `id`, count.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub selector: Option<String>,
    /// It brings jobs of its project from RabbitMQ: others answer for what they do.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub jobs: bool,
}

/// What the subject of a user begins with.
pub const USER_PREFIX: &str = "user:";

/// The subject of a user of this name.
pub fn user_subject(name: &str) -> String {
    format!("{USER_PREFIX}{}", name.replace(|c: char| !c.is_ascii_graphic(), "_"))
}

impl AccessToken {
    /// The `sub` of its caller tokens: a person is named in records, a program by its id.
    pub fn subject(&self) -> String {
        if self.person { user_subject(&self.name) } else { self.id.clone() }
    }

    /// The namespaces that it is limited to, beside the limit of its tenant.
    pub fn namespace_limit(&self) -> Option<&Vec<String>> {
        self.namespaces.as_ref().filter(|list| self.tenant.is_none() || !list.is_empty())
    }

    /// Tells whether the cluster of an agent is within its reach. A machine that is taken over
    /// decides nothing of that: what agents report does not count.
    pub fn reach(&self) -> impl Fn(&Agent) -> bool {
        let selector = self.selector.as_deref().map(Selector::parse);
        let limit = self.clusters.as_ref();
        let limit = limit.filter(|list| selector.is_none() || !list.is_empty());
        move |agent| {
            let cluster = &agent.cluster_id;
            let label = |key: &str| match key {
                "id" => Some(cluster.clone()),
                _ => agent.labels.get(key).cloned(),
            };
            let is_selected = match &selector {
                None => true,
                Some(Ok(selector)) => selector.matches(&label),
                // of a later version
                Some(Err(_)) => false,
            };
            agent.project == self.project
                && limit.is_none_or(|list| list.contains(cluster))
                && is_selected
        }
    }
}

/// What a caller may do at most: kept with what is done for it later, as it may be less than its
/// token has. See [`super::registry::Principal::within`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    pub project: String,
    pub role: Role,
    /// None: all of the project, or all that the selector of its token names.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clusters: Option<Vec<String>>,
    /// As those of an [`AccessToken`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespaces: Option<Vec<String>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tenant: Option<String>,
}

/// An operation on a cluster, asked for here or at the agent itself.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct OperationRecord {
    pub agent: String,
    pub operation: Operation,
    /// Id of the principal that asked: a user of a name that was free again has the same subject.
    /// Empty for one that was asked for at the agent, or of a version before this field.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub caller_id: String,
    /// What the caller was limited to beside its token, as long as it waits here: it goes out with
    /// no more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limits: Option<Limits>,
    /// The tenant that the caller was limited to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tenant: Option<String>,
    /// The caller's Idempotency-Key; empty for one that was asked for at the agent.
    pub key: String,
    /// Digest of the request: the same key for something else is a mistake.
    pub request: String,
    /// The request, sealed, as long as it waits here.
    pub sealed: Option<String>,
    /// Milliseconds since 1970: what waits goes out in this order.
    pub asked_ms: i64,
    /// Until when it waits for the agent.
    pub expires_at: i64,
    pub changed_at: i64,
}

impl OperationRecord {
    /// By what its caller is found: the id, else the subject.
    pub fn caller(&self) -> &str {
        if self.caller_id.is_empty() { &self.operation.subject } else { &self.caller_id }
    }

    /// It does not wait here any more: what was asked for is kept no longer.
    pub fn forget_request(&mut self) {
        (self.sealed, self.limits) = (None, None);
    }
}

/// A job that a Runner has brought: who stands behind it, and what has become of it. What it asks
/// for is not kept.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct JobRecord {
    /// `j-` and 32 hex digits.
    pub id: String,
    pub project: String,
    /// Id of the access that its token was issued to.
    pub maker: String,
    /// Id of the agent, and of the operation there; empty for a rollout, and for what was refused
    /// before they were known.
    pub agent: String,
    pub operation: String,
    /// Id of the rollout that it is.
    pub rollout: Option<String>,
    pub created_at: i64,
    /// Of its token.
    pub expires_at: i64,
    /// When its answer was at the broker.
    pub answered_at: Option<i64>,
    /// Why it is not done, not later either.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refused: Option<JobRefusal>,
}

/// Why a job is not done, now or for good.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct JobRefusal {
    /// Of HTTP.
    pub status: u16,
    pub code: String,
    pub message: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// When it was decided; 0 as long as it is not for good.
    pub at: i64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum AccessKind {
    Runner,
    /// Stands in a kubeconfig: the gateway takes it, nothing else does.
    Kubeconfig,
}

/// Somebody who may do everything here.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "Administrator"))]
pub struct Admin {
    pub id: String,
    pub name: String,
    #[cfg_attr(test, schemars(skip))]
    pub hash: String,
    pub created_at: i64,
}

/// How alive an agent is, as people ask.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum Liveness {
    Online,
    /// A heartbeat is overdue.
    Late,
    Offline,
    /// It said that it stops.
    Draining,
    /// Two machines show the same identity.
    Duplicate,
    /// Its credential's time is over.
    Expired,
    Revoked,
}
