//! The contract between agent and control plane: the bodies of requests and answers. The OpenAPI
//! document is made of these types.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::base::encoding::hex;
use crate::base::secret::Secret;
use crate::frp::{TunnelConfig, TunnelState};

/// Header with the base64 of an ECDSA P-256 signature (ASN.1) over the exact bytes of the body of a
/// registration.
pub const SIGNATURE_HEADER: &str = "pipeops-signature";

macro_rules! wire {
    ($(
        $(#[$meta:meta])*
        $name:ident { $($(#[$field_meta:meta])* $field:ident : $type:ty),* $(,)? }
    )*) => {
        $(#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
        #[cfg_attr(test, derive(schemars::JsonSchema))]
        #[serde(default)]
        $(#[$meta])*
        pub struct $name { $($(#[$field_meta])* pub $field: $type,)* })*
    };
}

wire! {
    /// Who registers.
    AgentInfo {
        /// `a-` and 32 hex digits of the SHA-256 of the public key.
        id: String,
        /// SubjectPublicKeyInfo of the P-256 key, PEM.
        public_key: String,
        name: String,
        version: String,
        hostname: String,
        os: String,
        arch: String,
        /// Digest that tells one machine from another, never the machine's own identifiers.
        machine: String,
        labels: BTreeMap<String, String>,
    }
    ClusterInfo {
        name: String,
        provider: String,
        /// Version of the API server; empty while it is not known.
        version: String,
        node_count: u32,
        #[serde(skip_serializing_if = "Option::is_none")]
        region: Option<String>,
        #[serde(skip_serializing_if = "Option::is_none")]
        zone: Option<String>,
        labels: BTreeMap<String, String>,
    }
    /// `POST /api/v1/agents/register`, signed in the header `Pipeops-Signature`.
    Register {
        agent: AgentInfo,
        cluster: ClusterInfo,
        capabilities: Vec<String>,
        max_role: String,
        monitoring: BTreeMap<String, String>,
    }
    Registered {
        agent_id: String,
        cluster_id: String,
        #[serde(serialize_with = "Secret::serialize_exposed")]
        #[cfg_attr(test, schemars(with = "String"))]
        credential: Secret,
        /// RFC 3339.
        credential_expires_at: String,
        config: Config,
    }
    /// `GET …/{id}/config`.
    Config {
        config_version: u64,
        heartbeat_interval_s: u64,
        status_interval_s: u64,
        #[serde(skip_serializing_if = "Option::is_none")]
        tunnel: Option<TunnelConfig>,
        runner_auth: RunnerAuth,
    }
    /// Whose tokens open the agent's API.
    RunnerAuth {
        issuer: String,
        audience: String,
        /// JSON Web Key Set with the current and the next Ed25519 key.
        jwks: Jwks,
    }
    Jwks { keys: Vec<Jwk> }
    /// RFC 8037: `kty` is `OKP`, `crv` is `Ed25519`.
    Jwk { kid: String, kty: String, crv: String, x: String }
    /// `POST …/{id}/heartbeat`.
    Heartbeat {
        seq: u64,
        /// RFC 3339, by the control plane's clock as the agent knows it.
        sent_at: String,
        state: String,
        tunnel: TunnelReport,
        uptime_s: u64,
        audit_head: AuditHead,
    }
    TunnelReport { state: TunnelState, since: String }
    AuditHead { seq: u64, hash: String }
    HeartbeatAnswer { config_version: u64, directives: Vec<Directive> }
    /// `POST …/{id}/status`: what the agent sees of the cluster.
    StatusReport {
        at: String,
        kubernetes: String,
        reason: String,
        nodes: Vec<NodeReport>,
        namespaces: Vec<String>,
        workloads: Workloads,
        usage: Usage,
    }
    NodeReport {
        name: String,
        ready: bool,
        role: String,
        version: String,
        address: String,
        note: String,
    }
    Workloads {
        pods: u32,
        pods_running: u32,
        deployments: u32,
        deployments_ready: u32,
        statefulsets: u32,
        daemonsets: u32,
        services: u32,
        ingresses: u32,
    }
    /// The agent's machine.
    Usage { memory_used_bytes: u64, memory_total_bytes: u64 }
    /// `POST …/{id}/credential`: the next one; the former stays valid for an overlap.
    Credential {
        #[serde(serialize_with = "Secret::serialize_exposed")]
        #[cfg_attr(test, schemars(with = "String"))]
        credential: Secret,
        credential_expires_at: String,
    }
    /// An operation as everybody may see it, also the body of `POST …/{id}/operations/{op}/result`:
    /// what was asked in detail, which may hold secrets, stands nowhere in it.
    Operation {
        /// `o-` and 32 hex digits: it follows from who asks, and from the key that it was asked for
        /// under.
        id: String,
        /// `deploy`, `rollback`, `delete_application`, `job`, `cronjob`, `secret`, `configmap`, `apply`,
        /// `delete`, `scale`, `restart`, `cordon`, `uncordon`, `drain` or `remove`.
        kind: String,
        state: OperationState,
        /// Who asked: the `sub` of the token.
        subject: String,
        /// The tenant whose token it was asked for with.
        #[serde(skip_serializing_if = "Option::is_none")]
        tenant: Option<String>,
        /// Why it failed, or what it is at.
        message: String,
        /// Why it failed, or what keeps it, as a stable code: `image_not_found`, `crash_loop`,
        /// `timed_out`, … Absent where there is no more to say than the message.
        #[serde(skip_serializing_if = "String::is_empty")]
        reason: String,
        /// The last lines of the container that failed, or of a job: 20 at most.
        #[serde(skip_serializing_if = "Vec::is_empty")]
        log: Vec<String>,
        created_at: String,
        /// Empty while it runs.
        finished_at: String,
        objects: Vec<ObjectOutcome>,
        /// The revision of an application that it made.
        #[serde(skip_serializing_if = "Option::is_none")]
        revision: Option<u32>,
        /// The revision that runs again, as the new one failed.
        #[serde(skip_serializing_if = "Option::is_none")]
        rolled_back_to: Option<u32>,
        /// Of the command of a job.
        #[serde(skip_serializing_if = "Option::is_none")]
        exit_code: Option<i64>,
    }
    /// An object that an operation has dealt with.
    #[cfg_attr(test, schemars(rename = "Touched"))]
    ObjectOutcome {
        /// `Deployment production/web`.
        object: String,
        /// `applied`, `created`, `deleted`, `kept`, `absent`, `updated`, `scaled`, `restarted`,
        /// `cordoned`, `uncordoned`, `evicted`, `removed`; then `ready`, `drained` or `absent`.
        outcome: String,
    }
    /// Every error, with a stable code.
    Problem {
        code: String,
        message: String,
        #[serde(skip_serializing_if = "Option::is_none")]
        hint: Option<String>,
    }
}

/// How far an operation is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum OperationState {
    /// At the control plane, until the agent is there.
    Queued,
    #[default]
    Running,
    Succeeded,
    Failed,
    Cancelled,
    /// The agent stopped while it ran and does not resume it: part of it may be done. Asking again
    /// is safe.
    Interrupted,
    /// The agent was not there within its time.
    Expired,
    /// One that this version does not know. An agent will give it to what ran when it stopped and
    /// may have had its effect, which nobody can look up: a command in a container.
    #[serde(other)]
    Unknown,
}

impl OperationState {
    /// Nothing more comes of it.
    pub fn ended(self) -> bool {
        !matches!(self, OperationState::Queued | OperationState::Running)
    }

    pub fn name(self) -> &'static str {
        match self {
            OperationState::Queued => "queued",
            OperationState::Running => "running",
            OperationState::Succeeded => "succeeded",
            OperationState::Failed => "failed",
            OperationState::Cancelled => "cancelled",
            OperationState::Interrupted => "interrupted",
            OperationState::Expired => "expired",
            OperationState::Unknown => "unknown",
        }
    }
}

/// Header that makes a request which is sent twice mean one operation.
pub const IDEMPOTENCY_KEY_HEADER: &str = "idempotency-key";

/// Id of the operation that `subject` asks for under `key`: the same one, whatever carries the
/// request.
pub fn operation_id(subject: &str, key: &str) -> String {
    format!("o-{}", &hex(&Sha256::digest(format!("{subject}\0{key}")))[..32])
}

/// The same for a caller of a tenant: a key of another tenant is another key.
pub fn tenant_operation_id(subject: &str, tenant: Option<&str>, key: &str) -> String {
    match tenant {
        // neither a subject nor a key holds a NUL
        Some(tenant) => operation_id(&format!("{subject}\0{tenant}"), key),
        None => operation_id(subject, key),
    }
}

/// A key that an operation may be asked for under: 1 to 128 printable characters.
pub fn check_idempotency_key(key: Option<&str>) -> Result<&str, &'static str> {
    let wrong = "an operation needs a header Idempotency-Key of 1 to 128 printable characters: the \
                 same for each try of the same thing";
    key.filter(|k| (1..=128).contains(&k.len()) && k.bytes().all(|b| b.is_ascii_graphic()))
        .ok_or(wrong)
}

/// What the control plane asks for in an answer to a heartbeat.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum Directive {
    Register,
    RotateCredential,
    Drain,
    /// One that this version does not know: ignored.
    #[serde(other)]
    Unknown,
}

/// Difference of two clocks that is tolerated, seconds.
pub const LEEWAY: i64 = 30;

/// The id of an agent with this public key, DER of its SubjectPublicKeyInfo: `a-` and 32 hex digits
/// of its SHA-256.
pub fn agent_id_of(spki: &[u8]) -> String {
    format!("a-{}", &hex(&Sha256::digest(spki))[..32])
}

/// The control plane of PipeOps, when no other one is configured.
pub const DEFAULT_CONTROL_PLANE: &str = "https://control.pipeops.io";

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_a_newer_peer_adds_is_passed_over_and_what_it_leaves_out_is_empty() {
        let answer: HeartbeatAnswer = serde_json::from_value(
            json!({"config_version": 3, "directives": ["drain", "dance"], "later": 1}),
        )
        .unwrap();
        assert_eq!(answer.directives, [Directive::Drain, Directive::Unknown]);
        let config: Config = serde_json::from_value(
            json!({"config_version": 1, "tunnel": {"server": "x", "port": 7000, "tcp_mux": true}}),
        )
        .unwrap();
        assert!(
            config
                .tunnel
                .is_some_and(|t| t.tcp_mux && t.proxies.is_empty() && t.auth.token.is_empty())
        );
        assert!(serde_json::from_value::<Config>(json!({"heartbeat_interval_s": "soon"})).is_err());
    }

    #[test]
    fn an_operation_is_known_by_who_asks_of_which_tenant_under_which_key() {
        let id = |tenant| tenant_operation_id("r-1", tenant, "k");
        assert_eq!(id(None), operation_id("r-1", "k"));
        assert!(id(None) != id(Some("acme")) && id(Some("acme")) != id(Some("globex")));
        assert_eq!(id(Some("acme")), id(Some("acme")));
    }

    #[test]
    fn no_debug_text_shows_a_credential() {
        let registered = Registered {
            credential: Secret::new("planted-canary-4711-in-plain-text"),
            ..Registered::default()
        };
        assert!(!format!("{registered:?}").contains("canary-4711-in-plain-text"));
    }
}
