//! A job: one operation, on one cluster or on many, that is asked for over RabbitMQ.
//!
//! Who wants something done (the *maker*: a Runner or a user of role deployer or more) writes the
//! body of the job, has the control plane sign a token for the SHA-256 of its exact bytes
//! (`POST /api/v1/job-tokens`), and publishes the body, with the token in the header
//! `cloudEvents:pipeopstoken`, to the exchange [`jobs_exchange`] of its project. A Runner takes it
//! from the queue of the same name, puts it into the partition of its application
//! ([`Job::partition`]), takes it from there, opens what is sealed, and hands all of it to the
//! control plane (`POST /api/v1/jobs`), which checks the token and does it with the rights that the
//! token gives: those of the maker, restricted. The Runner's own rights are never used. It waits
//! (`GET /api/v1/jobs/{id}`), publishes the answer to [`answers_exchange`], and says so
//! (`POST /api/v1/jobs/{id}/answered`). What can't be done goes, without spec and token, to
//! [`dead_exchange`], with one of the codes that the control plane gives.
//!
//! The body is JSON of at most [`MAX_BODY`] bytes; unknown fields are refused:
//!
//! ```json
//! {"cluster": "production", "kind": "restart", "ttl_s": 600,
//!  "spec": {"object": {"apiVersion": "apps/v1", "kind": "Deployment", "name": "web"}}}
//! ```
//!
//! In place of `cluster` stands one of `clusters` (names or ids), `selector` or `all`, with `waves`
//! beside it, for a rollout. Kind, spec and `ttl_s` are those of an operation that is asked for
//! over HTTPS.
//!
//! A broker keeps messages on disk, and more programs than the Runner may read them: the values of
//! a Secret are refused in clear ([`Job::check_secrets`]). In place of any text below `spec`,
//! `{"sealed": "…"}` may stand: base64 of what RFC 9180 (HPKE) makes of the text with the public
//! key of the project's Runners.
//!
//! Where something is sealed and nothing was opened yet, nothing happens, and the control plane
//! says whose job it is (state `sealed`, `maker`): values are sealed for one project and one maker,
//! so that nobody else has them opened by another job. The Runner opens them for that maker,
//! and brings the job again with what they say.
//!
//! A refusal of the control plane is final, but for 401 (the Runner itself is nobody any more),
//! 408, 429 and 5xx, and for 404 `not_found` (a control plane of a version without jobs): then the
//! Runner tries again. One that is final is on record, where the token was genuine and for this
//! body, and `job` in it says for which: the same job is refused so from then on.
//!
//! A job has one effect and one answer, whatever is killed: its operation is asked for under the
//! key [`idempotency_key`], and a job that was answered is not done again.
//!
//! PROJECT in the names of queues and exchanges is the id of the project, as in events: a name may
//! hold a dot, and `pipeops.jobs.NAME` could then be the queue of another project.

use std::collections::{BTreeMap, BTreeSet};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use serde_json::Value;
use sha2::{Digest as _, Sha256};

use crate::base::secret::Secret;
use crate::base::text::{printable, valueless_json_error};

/// Longest body, bytes.
pub const MAX_BODY: usize = 1 << 20;
/// Queues over which the jobs of a project are spread: those of one application are in one, and are
/// done one after another.
pub const PARTITIONS: u8 = 8;
/// Longest time that a job waits for an agent, seconds: what is behind it waits as long.
pub const MAX_TTL: i64 = 900;
/// Shortest that anything sealed can be, bytes: the encapsulated key of X25519 and the tag of
/// ChaCha20-Poly1305 (RFC 9180 §7.1 and §7.3).
const MIN_SEALED: usize = 32 + 16;
/// The one field of what stands for a sealed text.
const SEALED: &str = "sealed";
/// Where `kubectl apply` keeps the whole object once more.
const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";

/// Codes with which the control plane refuses a job for good, beside those of an operation.
pub const BAD_JOB: &str = "bad_job";
pub const SECRET_IN_CLEAR: &str = "secret_in_clear";
pub const TOKEN_FORGED: &str = "token_forged";
pub const TOKEN_EXPIRED: &str = "token_expired";
pub const BODY_CHANGED: &str = "body_changed";
pub const PROJECT_FOREIGN: &str = "project_foreign";
pub const MAKER_REVOKED: &str = "maker_revoked";
pub const CLUSTER_EXCEEDED: &str = "cluster_exceeded";
pub const REPLAYED: &str = "replayed";
pub const CLUSTER_UNKNOWN: &str = "cluster_unknown";
/// Whether its operation was taken, or has ended, can't be found out any more.
pub const DELIVERY_UNKNOWN: &str = "delivery_unknown";
/// What a Runner is told whose token is not for jobs.
pub const NOT_FOR_JOBS: &str = "not_for_jobs";

/// The exchange that jobs of a project are published to, and the queue behind it.
pub fn jobs_exchange(project: &str) -> String {
    format!("pipeops.jobs.{project}")
}

/// The exchange that spreads jobs over the partitions; its routing keys are their numbers.
pub fn partitions_exchange(project: &str) -> String {
    format!("pipeops.jobs.{project}.partitions")
}

/// The queue of a partition.
pub fn partition_queue(project: &str, partition: u8) -> String {
    format!("pipeops.jobs.{project}.{partition}")
}

/// The exchange that answers are published to, and the queue behind it; its routing keys are the
/// names of queues: this one, or one that begins with it and a dot.
pub fn answers_exchange(project: &str) -> String {
    format!("pipeops.answers.{project}")
}

/// The exchange for what can't be done, and the queue behind it.
pub fn dead_exchange(project: &str) -> String {
    format!("pipeops.dead.{project}")
}

/// Key of the operation, or rollout, of a job.
pub fn idempotency_key(job: &str) -> String {
    format!("job/{job}")
}

/// What is digested in a token: lower-case hexadecimal of the SHA-256 of the exact body.
pub fn body_digest(body: &[u8]) -> String {
    crate::base::encoding::hex(&Sha256::digest(body))
}

/// Why a job is refused: a stable code, and words that repeat nothing of its spec or token.
#[derive(Debug, PartialEq, Eq)]
pub struct Refusal {
    pub code: &'static str,
    pub message: String,
}

impl Refusal {
    fn new(code: &'static str, message: impl Into<String>) -> Refusal {
        Refusal { code, message: message.into() }
    }
}

/// A job as it is published.
#[derive(Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Job {
    /// Name or id of the cluster; else one of `clusters`, `selector` and `all`.
    pub cluster: Option<String>,
    pub clusters: Option<Vec<String>>,
    /// As `kubectl get --selector`, over the labels of clusters.
    pub selector: Option<String>,
    /// All clusters that the token reaches.
    #[serde(default)]
    pub all: bool,
    /// How many clusters at a time: `1,10%,all`.
    pub waves: Option<String>,
    /// As of an operation.
    pub kind: String,
    pub spec: Value,
    /// How long it may wait for an agent that is not there, seconds: [`MAX_TTL`] at most.
    pub ttl_s: Option<i64>,
}

impl Job {
    /// Reads a body. What its spec says is checked by who carries it out.
    ///
    /// # Errors
    /// `bad_job`.
    pub fn parse(body: &[u8]) -> Result<Job, Refusal> {
        let bad = |why: &str| Refusal::new(BAD_JOB, format!("this is no job: {why}"));
        if body.len() > MAX_BODY {
            return Err(bad("it is larger than 1 MiB"));
        }
        // serde would take a list of the values, in the order of the fields
        if body.trim_ascii_start().first() != Some(&b'{') {
            return Err(bad("it is no object of JSON"));
        }
        let job: Job =
            serde_json::from_slice(body).map_err(|e| bad(&printable(&valueless_json_error(&e))))?;
        let targets =
            [job.cluster.is_some(), job.clusters.is_some(), job.selector.is_some(), job.all];
        if targets.into_iter().filter(|given| *given).count() != 1 {
            return Err(bad("one of cluster, clusters, selector and all says where"));
        }
        if job.waves.is_some() && job.cluster.is_some() {
            return Err(bad("waves are for more than one cluster"));
        }
        if job.ttl_s.is_some_and(|ttl| ttl > MAX_TTL) {
            return Err(bad("ttl_s is 900 at most: what is behind it waits as long"));
        }
        Ok(job)
    }

    /// Whether it is for one cluster that it names, and thus an operation and no rollout.
    pub fn is_operation(&self) -> bool {
        self.cluster.is_some()
    }

    /// What is changed by it, as far as order goes: the application, `namespace/name`; the node or
    /// the tenant; else the kind. Never the cluster: what goes to many clusters must not be
    /// overtaken by what goes to one of them.
    fn subject(&self) -> String {
        let spec = &self.spec;
        for (field, what) in [("node", "Node"), ("tenant", "Tenant")] {
            if let Some(name) = spec[field].as_str() {
                return format!("{what} {name}");
            }
        }
        let first = |list: &Value| list.as_array().and_then(|list| list.first()).cloned();
        let application = &spec["application"];
        let (namespace, name) = match () {
            () if application.is_object() => (&application["namespace"], &application["name"]),
            () if spec["name"].is_string() => (&spec["namespace"], &spec["name"]),
            () if spec["cronjob"].is_string() => (&spec["namespace"], &spec["cronjob"]),
            () => {
                let object = first(&spec["objects"]).unwrap_or_else(|| spec["object"].clone());
                return subject_of(&self.kind, named_by(&object));
            }
        };
        subject_of(&self.kind, (namespace.as_str(), name.as_str()))
    }

    /// The partition that it belongs in, 0 to 7.
    pub fn partition(&self) -> u8 {
        Sha256::digest(self.subject())[31] % PARTITIONS
    }

    /// The sealed texts of its spec, each once.
    pub fn sealed(&self) -> BTreeSet<&str> {
        let mut found = BTreeSet::new();
        find_sealed(&self.spec, &mut found);
        found
    }

    /// Puts what was opened in place of what is sealed.
    ///
    /// # Errors
    /// `bad_job` where something is not among what was opened.
    pub fn open(&mut self, opened: &BTreeMap<String, Secret>) -> Result<(), Refusal> {
        open(&mut self.spec, opened)
    }

    /// # Errors
    /// `secret_in_clear` for a job that holds the value of a Secret as it is.
    pub fn check_secrets(&self) -> Result<(), Refusal> {
        let of_set = self.kind == "secret"
            && ["data", "binary"].iter().any(|field| is_clear(&self.spec[field]));
        if of_set || holds_clear_secret(&self.spec) {
            return Err(Refusal::new(
                SECRET_IN_CLEAR,
                "the value of a Secret stands in the job in clear: a broker keeps it on disk",
            ));
        }
        Ok(())
    }
}

/// Namespace and name of an object.
fn named_by(object: &Value) -> (Option<&str>, Option<&str>) {
    // of an object that is applied they are in its metadata
    let meta = Some(&object["metadata"]).filter(|meta| meta.is_object()).unwrap_or(object);
    (meta["namespace"].as_str(), meta["name"].as_str())
}

fn subject_of(kind: &str, (namespace, name): (Option<&str>, Option<&str>)) -> String {
    match name {
        Some(name) => format!("{}/{name}", namespace.unwrap_or("default")),
        None => kind.to_owned(),
    }
}

/// The sealed text that stands for another one: `{"sealed": "…"}` and nothing else.
fn sealed_text(value: &Value) -> Option<&str> {
    let fields = value.as_object().filter(|fields| fields.len() == 1)?;
    fields.get(SEALED)?.as_str()
}

/// Whether a value is sealed, and not only called so.
fn is_sealed(value: &Value) -> bool {
    let bytes = sealed_text(value).and_then(|text| STANDARD.decode(text).ok());
    bytes.is_some_and(|bytes| bytes.len() >= MIN_SEALED)
}

fn find_sealed<'a>(value: &'a Value, found: &mut BTreeSet<&'a str>) {
    match (sealed_text(value), value) {
        (Some(text), _) => {
            found.insert(text);
        }
        (None, Value::Object(fields)) => {
            fields.values().for_each(|field| find_sealed(field, found));
        }
        (None, Value::Array(items)) => items.iter().for_each(|item| find_sealed(item, found)),
        _ => {}
    }
}

fn open(value: &mut Value, opened: &BTreeMap<String, Secret>) -> Result<(), Refusal> {
    if let Some(text) = sealed_text(value) {
        let clear = opened.get(text).ok_or_else(|| {
            Refusal::new(BAD_JOB, "this is no job: something in it is sealed and was not opened")
        })?;
        *value = clear.expose().into();
        return Ok(());
    }
    match value {
        Value::Object(fields) => fields.values_mut().try_for_each(|field| open(field, opened)),
        Value::Array(items) => items.iter_mut().try_for_each(|item| open(item, opened)),
        _ => Ok(()),
    }
}

/// Whether values by key hold one that is not sealed.
fn is_clear(values: &Value) -> bool {
    match values {
        Value::Null => false,
        // `{"sealed": "…"}` is here a key that is called so
        Value::Object(values) => !values.values().all(is_sealed),
        _ => true,
    }
}

/// Whether there is a Secret with values in clear anywhere below: in a list too.
fn holds_clear_secret(value: &Value) -> bool {
    match value {
        Value::Object(fields) => {
            // one whose kind is sealed may turn out to be a Secret
            let is_secret = fields
                .get("kind")
                .is_some_and(|kind| kind == "Secret" || sealed_text(kind).is_some());
            let last_applied = &value["metadata"]["annotations"][LAST_APPLIED];
            (is_secret
                && (["data", "stringData"].iter().any(|field| is_clear(&value[field]))
                    || !(last_applied.is_null() || is_sealed(last_applied))))
                || fields.values().any(holds_clear_secret)
        }
        Value::Array(items) => items.iter().any(holds_clear_secret),
        _ => false,
    }
}

#[cfg(test)]
mod tests;
