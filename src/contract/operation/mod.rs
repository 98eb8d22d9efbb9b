//! The operations that a Runner may ask for: requests are read and checked before anything is done.

mod form;

use serde::Deserialize;
use serde_json::Value;

use crate::contract::application::requests::{DEFAULT_TIMEOUT_S, check_named, default_timeout_s};
pub use crate::contract::application::requests::{
    DeleteApplication, Deploy, Rollback, RunJob, SetCronJob,
};
use crate::contract::config::{ConfigKind, ConfigSpec};
use crate::contract::tenant::TenantSpec;
use crate::contract::token::{Caller, Role};

const MAX_OBJECTS: usize = 200;
/// Time for the former revision of an application to come back, seconds.
pub const ROLLBACK_S: u64 = 120;
const MAX_TIMEOUT_S: u64 = 3600;

/// Status, code and message.
type Refusal = (u16, &'static str, String);

/// A request, by kind.
pub enum OperationRequest {
    /// Server-side apply of objects, in their order.
    Apply(Apply),
    Delete(Delete),
    /// The number of pods of a workload.
    Scale(Scale),
    /// Recreates the pods of a workload, as `kubectl rollout restart` does.
    Restart(Restart),
    /// No new pods on a node.
    Cordon(NodeSpec),
    Uncordon(NodeSpec),
    /// No new pods on a node, and the pods there go elsewhere, as `kubectl drain` does.
    Drain(Drain),
    /// Takes a node out of the cluster: one that is drained, or no longer there.
    Remove(Remove),
    /// A new revision of an application, watched to its end.
    Deploy(Box<Deploy>),
    /// A former revision of an application as a new one.
    Rollback(Rollback),
    /// Everything that `deploy` made of an application.
    DeleteApplication(DeleteApplication),
    /// A command that runs once in the surroundings of an application, until it ends.
    Job(RunJob),
    /// A command that runs by a schedule.
    CronJob(Box<SetCronJob>),
    /// Keys of a namespace whose values are secret.
    Secret(ConfigSpec),
    /// The same of values that anybody may read.
    ConfigMap(ConfigSpec),
    /// A customer's own place in the cluster.
    Tenant(TenantSpec),
}

fn default_wait() -> bool {
    true
}

fn default_true() -> bool {
    true
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Apply {
    pub objects: Vec<Value>,
    /// Nothing is written: Kubernetes answers what it would do.
    #[serde(default)]
    pub dry_run: bool,
    #[serde(default = "default_wait")]
    pub wait: bool,
    #[serde(default = "default_timeout_s")]
    pub timeout_s: u64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Delete {
    pub objects: Vec<Reference>,
    #[serde(default = "default_wait")]
    pub wait: bool,
    #[serde(default = "default_timeout_s")]
    pub timeout_s: u64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scale {
    pub object: Reference,
    pub replicas: u32,
    #[serde(default = "default_wait")]
    pub wait: bool,
    #[serde(default = "default_timeout_s")]
    pub timeout_s: u64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Restart {
    pub object: Reference,
    #[serde(default = "default_wait")]
    pub wait: bool,
    #[serde(default = "default_timeout_s")]
    pub timeout_s: u64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeSpec {
    pub node: String,
}

/// The options are those of `kubectl drain`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Drain {
    pub node: String,
    /// Time that a pod gets to end, seconds; without it, its own.
    pub grace_period_s: Option<u64>,
    /// Pods with an emptyDir go too, and what is in it is lost.
    #[serde(default = "default_true")]
    pub delete_emptydir_data: bool,
    /// Pods of a DaemonSet stay; without it, they are a reason to evict none.
    #[serde(default = "default_true")]
    pub ignore_daemonsets: bool,
    /// Pods that no controller recreates go too.
    #[serde(default)]
    pub force: bool,
    /// Also until the pods have ended, not only until each eviction is accepted.
    #[serde(default = "default_wait")]
    pub wait: bool,
    #[serde(default = "default_timeout_s")]
    pub timeout_s: u64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Remove {
    pub node: String,
    /// Also one that is ready and was not drained.
    #[serde(default)]
    pub force: bool,
}

/// Which object is meant.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Reference {
    pub api_version: String,
    pub kind: String,
    pub name: String,
    pub namespace: Option<String>,
}

/// Whether a text can be a segment of a path as it is.
pub fn is_path_safe(text: &str) -> bool {
    !text.is_empty()
        && text.len() <= 253
        && !matches!(text, "." | "..")
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._:".contains(&b))
}

impl Reference {
    pub fn from_object(object: &Value) -> Result<Reference, String> {
        let text = |value: &Value, name: &str| {
            value.as_str().map(str::to_owned).ok_or_else(|| format!("an object without {name}"))
        };
        let reference = Reference {
            api_version: text(&object["apiVersion"], "apiVersion")?,
            kind: text(&object["kind"], "kind")?,
            name: text(&object["metadata"]["name"], "metadata.name")?,
            namespace: object["metadata"]["namespace"].as_str().map(str::to_owned),
        };
        reference.check()?;
        Ok(reference)
    }

    fn check(&self) -> Result<(), String> {
        let version = match self.api_version.split_once('/') {
            Some((group, version)) => is_path_safe(group) && is_path_safe(version),
            None => is_path_safe(&self.api_version),
        };
        if version
            && is_path_safe(&self.kind)
            && is_path_safe(&self.name)
            && self.namespace.as_deref().is_none_or(is_path_safe)
        {
            Ok(())
        } else {
            Err(format!("{} holds characters that no object has", self.title()))
        }
    }

    /// `Deployment production/web`.
    pub fn title(&self) -> String {
        match &self.namespace {
            Some(namespace) => format!("{} {namespace}/{}", self.kind, self.name),
            None => format!("{} {}", self.kind, self.name),
        }
    }

    /// The path of its group and version.
    pub fn base(&self) -> String {
        if self.api_version.contains('/') {
            format!("/apis/{}", self.api_version)
        } else {
            format!("/api/{}", self.api_version)
        }
    }
}

impl OperationRequest {
    /// Reads and checks a request, and whether this caller may ask for it at all. Kubernetes
    /// decides on the rest.
    ///
    /// # Errors
    /// Status, code and message of the refusal.
    pub fn parse(bytes: &[u8], caller: &Caller) -> Result<OperationRequest, Refusal> {
        let bad = |why: String| (400, "bad_operation", why);
        let request =
            form::read(bytes).map_err(|why| bad(format!("this is no operation: {why}")))?;
        request.check(caller)?;
        Ok(request)
    }

    /// Whether this caller may ask for it, and whether Kubernetes could take it.
    fn check(&self, caller: &Caller) -> Result<(), Refusal> {
        let bad = |why: String| (400, "bad_operation", why);
        let objects = |n: usize| {
            if (1..=MAX_OBJECTS).contains(&n) {
                Ok(())
            } else {
                Err(bad(format!("objects are 1 to {MAX_OBJECTS}")))
            }
        };
        if !(1..=MAX_TIMEOUT_S).contains(&self.timeout_s()) {
            return Err(bad(format!("timeout_s is 1 to {MAX_TIMEOUT_S}")));
        }
        match self {
            OperationRequest::Apply(apply) => {
                objects(apply.objects.len())?;
                apply
                    .objects
                    .iter()
                    .try_for_each(|o| Reference::from_object(o).map(drop))
                    .map_err(bad)?;
            }
            OperationRequest::Delete(delete) => {
                objects(delete.objects.len())?;
                delete.objects.iter().try_for_each(Reference::check).map_err(bad)?;
            }
            OperationRequest::Scale(scale) => {
                scale.object.check().map_err(bad)?;
            }
            OperationRequest::Restart(restart) => {
                restart.object.check().map_err(bad)?;
                if !matches!(
                    restart.object.kind.as_str(),
                    "Deployment" | "StatefulSet" | "DaemonSet"
                ) {
                    return Err(bad(
                        "a Deployment, StatefulSet or DaemonSet can be restarted".into()
                    ));
                }
            }
            OperationRequest::Deploy(deploy) => {
                let checked = deploy.application.check();
                checked.map_err(|why| bad(format!("spec.application.{why}")))?;
            }
            OperationRequest::Rollback(Rollback { namespace, name, .. })
            | OperationRequest::DeleteApplication(DeleteApplication { namespace, name, .. }) => {
                check_named(namespace, "name", name).map_err(bad)?;
            }
            OperationRequest::CronJob(job) => {
                let checked = job.application.check_for_job();
                checked.map_err(|why| bad(format!("spec.application.{why}")))?;
                if !(1..=MAX_TIMEOUT_S).contains(&job.timeout_s) {
                    return Err(bad(format!("timeout_s is 1 to {MAX_TIMEOUT_S}")));
                }
                if job.schedule.trim().is_empty() {
                    return Err(bad("spec.schedule: \"0 3 * * *\" is every night at three".into()));
                }
            }
            OperationRequest::Job(job) => {
                job.check().map_err(bad)?;
            }
            OperationRequest::Secret(config) => {
                config.check(ConfigKind::Secret).map_err(bad)?;
            }
            OperationRequest::ConfigMap(config) => {
                config.check(ConfigKind::ConfigMap).map_err(bad)?;
            }
            OperationRequest::Tenant(tenant) => {
                tenant.check().map_err(bad).and(check_whole_cluster("tenants", caller))?
            }
            OperationRequest::Cordon(node) | OperationRequest::Uncordon(node) => {
                check_node(&node.node, caller)?;
            }
            OperationRequest::Drain(drain) => {
                // 0 would remove the pod without its kubelet having ended it
                if drain.grace_period_s.is_some_and(|s| !(1..=MAX_TIMEOUT_S).contains(&s)) {
                    return Err(bad(format!("grace_period_s is 1 to {MAX_TIMEOUT_S}")));
                }
                check_node(&drain.node, caller)?;
            }
            OperationRequest::Remove(remove) => check_node(&remove.node, caller)?,
        }
        Ok(())
    }

    /// The application that it changes, `namespace/name`, or the tenant, `Tenant name`: one
    /// operation at a time does.
    pub fn application(&self) -> Option<String> {
        let (namespace, name) = match self {
            OperationRequest::Deploy(deploy) if deploy.dry_run => return None,
            OperationRequest::Deploy(deploy) => {
                (&deploy.application.namespace, &deploy.application.name)
            }
            OperationRequest::Rollback(rollback) => (&rollback.namespace, &rollback.name),
            OperationRequest::DeleteApplication(delete) => (&delete.namespace, &delete.name),
            // a namespace has no blank
            OperationRequest::Tenant(spec) => return Some(spec.title()),
            _ => return None,
        };
        Some(format!("{namespace}/{name}"))
    }

    /// Its name on the wire.
    pub fn kind(&self) -> &'static str {
        match self {
            OperationRequest::Apply(_) => "apply",
            OperationRequest::Delete(_) => "delete",
            OperationRequest::Scale(_) => "scale",
            OperationRequest::Restart(_) => "restart",
            OperationRequest::Cordon(_) => "cordon",
            OperationRequest::Uncordon(_) => "uncordon",
            OperationRequest::Drain(_) => "drain",
            OperationRequest::Remove(_) => "remove",
            OperationRequest::Deploy(_) => "deploy",
            OperationRequest::Rollback(_) => "rollback",
            OperationRequest::DeleteApplication(_) => "delete_application",
            OperationRequest::Job(_) => "job",
            OperationRequest::CronJob(_) => "cronjob",
            OperationRequest::Secret(_) => "secret",
            OperationRequest::ConfigMap(_) => "configmap",
            OperationRequest::Tenant(_) => "tenant",
        }
    }

    /// How long it may take, seconds.
    pub fn timeout_s(&self) -> u64 {
        match self {
            OperationRequest::Apply(apply) => apply.timeout_s,
            OperationRequest::Delete(delete) => delete.timeout_s,
            OperationRequest::Scale(scale) => scale.timeout_s,
            OperationRequest::Restart(restart) => restart.timeout_s,
            OperationRequest::Drain(drain) => drain.timeout_s,
            OperationRequest::Deploy(deploy) => deploy.timeout_s,
            OperationRequest::Rollback(rollback) => rollback.timeout_s,
            OperationRequest::DeleteApplication(delete) => delete.timeout_s,
            OperationRequest::Job(job) => job.timeout_s,
            OperationRequest::Secret(spec) | OperationRequest::ConfigMap(spec) => {
                spec.timeout_s().unwrap_or(DEFAULT_TIMEOUT_S)
            }
            OperationRequest::Tenant(tenant) => tenant.timeout_s(),
            OperationRequest::Cordon(_)
            | OperationRequest::Uncordon(_)
            | OperationRequest::Remove(_)
            | OperationRequest::CronJob(_) => DEFAULT_TIMEOUT_S,
        }
    }

    /// Time that it may take after that, to bring back what ran before, seconds.
    pub fn rollback_s(&self) -> u64 {
        match self {
            OperationRequest::Deploy(deploy) if deploy.auto_rollback => ROLLBACK_S,
            _ => 0,
        }
    }

    /// Whether it may stand on the agent's disk while it runs, and goes on after a restart of the
    /// agent: it holds no value of a Secret, and what it does is the same when it is done twice.
    pub fn is_resumable(&self) -> bool {
        match self {
            OperationRequest::Apply(apply) => !apply.objects.iter().any(has_secret_values),
            OperationRequest::Secret(spec) => !matches!(spec, ConfigSpec::Set(_)),
            OperationRequest::Delete(_)
            | OperationRequest::Deploy(_)
            | OperationRequest::Rollback(_)
            | OperationRequest::DeleteApplication(_)
            | OperationRequest::Job(_)
            | OperationRequest::CronJob(_)
            | OperationRequest::ConfigMap(_)
            | OperationRequest::Scale(_)
            | OperationRequest::Restart(_)
            | OperationRequest::Cordon(_)
            | OperationRequest::Uncordon(_)
            | OperationRequest::Drain(_)
            | OperationRequest::Remove(_)
            | OperationRequest::Tenant(_) => true,
        }
    }
}

/// A node is cordoned and removed with the agent's own rights: nobody is impersonated for it.
fn check_node(name: &str, caller: &Caller) -> Result<(), Refusal> {
    if !is_path_safe(name) {
        return Err((400, "bad_operation", "that is no name of a node".into()));
    }
    check_whole_cluster("nodes", caller)
}

fn check_whole_cluster(what: &str, caller: &Caller) -> Result<(), Refusal> {
    if caller.role < Role::Operator || caller.is_limited() {
        let message = format!("{what} are for operators of the whole cluster");
        return Err((403, "role_exceeded", message));
    }
    Ok(())
}

/// Whether an object is a Secret, or may hold one as lists and templates do.
fn has_secret_values(object: &Value) -> bool {
    let kind = object["kind"].as_str().unwrap_or_default();
    kind == "Secret" || kind.ends_with("List") || holds_secret(object)
}

fn holds_secret(value: &Value) -> bool {
    match value {
        Value::Object(fields) => {
            let here = fields.get("kind").is_some_and(|kind| kind == "Secret")
                && (fields.contains_key("data") || fields.contains_key("stringData"));
            here || fields.values().any(holds_secret)
        }
        Value::Array(items) => items.iter().any(holds_secret),
        _ => false,
    }
}

#[cfg(test)]
mod tests;
