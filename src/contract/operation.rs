//! The operations that a Runner may ask for: requests are read and checked before anything is done.

use serde::Deserialize;
use serde_json::Value;

use crate::base::text::valueless_json_error;
use crate::contract::config::{ConfigKind, ConfigSpec};
use crate::contract::token::{Caller, Role};

const MAX_OBJECTS: usize = 200;
const MAX_TIMEOUT_S: u64 = 3600;
const DEFAULT_TIMEOUT_S: u64 = 300;

/// A request, by kind.
#[derive(Deserialize)]
#[serde(tag = "kind", content = "spec", rename_all = "snake_case", deny_unknown_fields)]
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
    /// Keys of a namespace whose values are secret.
    Secret(ConfigSpec),
    /// The same of values that anybody may read.
    #[serde(rename = "configmap")]
    ConfigMap(ConfigSpec),
}

fn default_wait() -> bool {
    true
}

fn default_true() -> bool {
    true
}

fn default_timeout_s() -> u64 {
    DEFAULT_TIMEOUT_S
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
    pub fn parse(
        bytes: &[u8],
        caller: &Caller,
    ) -> Result<OperationRequest, (u16, &'static str, String)> {
        let bad = |why: String| (400, "bad_operation", why);
        let request: OperationRequest = serde_json::from_slice(bytes)
            .map_err(|e| bad(format!("this is no operation: {}", valueless_json_error(&e))))?;
        let objects = |n: usize| {
            if (1..=MAX_OBJECTS).contains(&n) {
                Ok(())
            } else {
                Err(bad(format!("objects are 1 to {MAX_OBJECTS}")))
            }
        };
        let wait = |s: u64| {
            if (1..=MAX_TIMEOUT_S).contains(&s) {
                Ok(())
            } else {
                Err(bad(format!("timeout_s is 1 to {MAX_TIMEOUT_S}")))
            }
        };
        match &request {
            OperationRequest::Apply(apply) => {
                objects(apply.objects.len())?;
                wait(apply.timeout_s)?;
                apply
                    .objects
                    .iter()
                    .try_for_each(|o| Reference::from_object(o).map(drop))
                    .map_err(bad)?;
            }
            OperationRequest::Delete(delete) => {
                objects(delete.objects.len())?;
                wait(delete.timeout_s)?;
                delete.objects.iter().try_for_each(Reference::check).map_err(bad)?;
            }
            OperationRequest::Scale(scale) => {
                wait(scale.timeout_s)?;
                scale.object.check().map_err(bad)?;
            }
            OperationRequest::Restart(restart) => {
                wait(restart.timeout_s)?;
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
            OperationRequest::Secret(config) => {
                config.timeout_s().map_or(Ok(()), wait)?;
                config.check(ConfigKind::Secret).map_err(bad)?;
            }
            OperationRequest::ConfigMap(config) => {
                config.timeout_s().map_or(Ok(()), wait)?;
                config.check(ConfigKind::ConfigMap).map_err(bad)?;
            }
            OperationRequest::Cordon(node) | OperationRequest::Uncordon(node) => {
                check_node(&node.node, caller)?;
            }
            OperationRequest::Drain(drain) => {
                wait(drain.timeout_s)?;
                // 0 would remove the pod without its kubelet having ended it
                if drain.grace_period_s.is_some_and(|s| !(1..=MAX_TIMEOUT_S).contains(&s)) {
                    return Err(bad(format!("grace_period_s is 1 to {MAX_TIMEOUT_S}")));
                }
                check_node(&drain.node, caller)?;
            }
            OperationRequest::Remove(remove) => check_node(&remove.node, caller)?,
        }
        Ok(request)
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
            OperationRequest::Secret(_) => "secret",
            OperationRequest::ConfigMap(_) => "configmap",
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
            OperationRequest::Secret(spec) | OperationRequest::ConfigMap(spec) => {
                spec.timeout_s().unwrap_or(DEFAULT_TIMEOUT_S)
            }
            OperationRequest::Cordon(_)
            | OperationRequest::Uncordon(_)
            | OperationRequest::Remove(_) => DEFAULT_TIMEOUT_S,
        }
    }

    /// Whether it may stand on the agent's disk while it runs, and goes on after a restart of the
    /// agent: it holds no value of a Secret, and what it does is the same when it is done twice.
    pub fn is_resumable(&self) -> bool {
        match self {
            OperationRequest::Apply(apply) => !apply.objects.iter().any(has_secret_values),
            OperationRequest::Secret(spec) => !matches!(spec, ConfigSpec::Set(_)),
            OperationRequest::Delete(_)
            | OperationRequest::ConfigMap(_)
            | OperationRequest::Scale(_)
            | OperationRequest::Restart(_)
            | OperationRequest::Cordon(_)
            | OperationRequest::Uncordon(_)
            | OperationRequest::Drain(_)
            | OperationRequest::Remove(_) => true,
        }
    }
}

/// A node is cordoned and removed with the agent's own rights: nobody is impersonated for it.
fn check_node(name: &str, caller: &Caller) -> Result<(), (u16, &'static str, String)> {
    if !is_path_safe(name) {
        return Err((400, "bad_operation", "that is no name of a node".into()));
    }
    if caller.role < Role::Operator || caller.namespaces.is_some() {
        let message = "nodes are for operators of the whole cluster";
        return Err((403, "role_exceeded", message.into()));
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
mod tests {
    use serde_json::json;

    use super::*;

    fn caller(role: Role, namespaces: Option<&[&str]>) -> Caller {
        let namespaces = namespaces.map(|n| n.iter().map(|s| (*s).to_owned()).collect());
        Caller { subject: "r-1".into(), role, namespaces, token_id: "t".into() }
    }

    fn verdict(text: &str) -> Result<&'static str, String> {
        OperationRequest::parse(text.as_bytes(), &caller(Role::Operator, None))
            .map(|w| w.kind())
            .map_err(|(_, code, why)| format!("{code}: {why}"))
    }

    #[test]
    fn what_is_no_operation_is_refused_by_name() {
        let web = r#"{"apiVersion":"apps/v1","kind":"Deployment","name":"web","namespace":"beta"}"#;
        assert_eq!(
            verdict(&format!(r#"{{"kind":"scale","spec":{{"object":{web},"replicas":3}}}}"#)),
            Ok("scale")
        );
        assert_eq!(
            verdict(concat!(
                r#"{"kind":"apply","spec":{"objects":[{"apiVersion":"v1","kind":"ConfigMap","#,
                r#""metadata":{"name":"c","namespace":"b"}}]}}"#
            )),
            Ok("apply")
        );
        for (text, expected) in [
            ("", "no operation"),
            ("[]", "no operation"),
            (r#"{"kind":"dance","spec":{}}"#, "unknown variant `dance`"),
            (r#"{"kind":"apply","spec":{"objects":[]}}"#, "1 to 200"),
            (r#"{"kind":"apply","spec":{"objects":[{}]}}"#, "without apiVersion"),
            (r#"{"kind":"apply","spec":{"objects":[],"colour":"red"}}"#, "unknown field `colour`"),
            (
                concat!(
                    r#"{"kind":"apply","spec":{"objects":[{"apiVersion":"v1","kind":"Pod","#,
                    r#""metadata":{"name":"../x"}}]}}"#
                ),
                "characters",
            ),
            (
                concat!(
                    r#"{"kind":"apply","spec":{"objects":[{"apiVersion":"a/b/c","kind":"Pod","#,
                    r#""metadata":{"name":"x"}}]}}"#
                ),
                "characters",
            ),
            (
                concat!(
                    r#"{"kind":"delete","spec":{"objects":["#,
                    r#"{"apiVersion":"v1","kind":"Pod","name":".."}]}}"#
                ),
                "characters",
            ),
            (
                concat!(
                    r#"{"kind":"restart","spec":{"object":{"apiVersion":"v1","kind":"Pod","#,
                    r#""name":"p","namespace":"b"}}}"#
                ),
                "can be restarted",
            ),
            (r#"{"kind":"cordon","spec":{"node":"a/b"}}"#, "name of a node"),
            (r#"{"kind":"drain","spec":{"node":"a/b"}}"#, "name of a node"),
            (r#"{"kind":"drain","spec":{"node":"n","grace_period_s":0}}"#, "1 to 3600"),
            (r#"{"kind":"drain","spec":{"node":"n","evict":true}}"#, "unknown field `evict`"),
            (r#"{"kind":"remove","spec":{"node":".."}}"#, "name of a node"),
        ] {
            let said = verdict(text).unwrap_err();
            assert!(said.contains(expected), "{text}: {said}");
        }
        // whatever is wrong with a value, it is not quoted
        for (spec, expected) in [
            (r#""planted-canary-2231-in-plain-text""#, "invalid type: string"),
            (r#"{"data":"planted-canary-2231-in-plain-text"}"#, "invalid type: string"),
            (r#"{"data":{"a":22317713982231771}}"#, "invalid type: integer, expected a string"),
            (r#"{"data":{"a":"x"},"wait":"planted-canary-2231-in-plain-text"}"#, "a boolean"),
            (r#"{"data":{"a":"x"},"timeout_s":0}"#, "timeout_s is 1 to 3600"),
            (r#"{"data":{"a b":"planted-canary-2231-in-plain-text"}}"#, "data: `a b` is no key"),
            (r#"{"data":{"a":"x"},"dat":{}}"#, "unknown field `dat`"),
        ] {
            let head = r#"{"action":"set","namespace":"beta","name":"db","#;
            let spec = spec.strip_prefix('{').map_or(spec.to_owned(), |s| format!("{head}{s}"));
            for kind in ["secret", "configmap"] {
                let said = verdict(&format!(r#"{{"kind":"{kind}","spec":{spec}}}"#)).unwrap_err();
                assert!(said.contains(expected), "{spec}: {said}");
                assert!(!said.contains("2231-in-plain-text"), "{spec}: {said}");
            }
        }
        let long = format!(r#"{{"kind":"restart","spec":{{"object":{web},"timeout_s":0}}}}"#);
        assert!(verdict(&long).unwrap_err().contains("1 to 3600"));
        for (role, namespaces) in [(Role::Deployer, None), (Role::Operator, Some(&["beta"][..]))] {
            for kind in ["cordon", "uncordon", "drain", "remove"] {
                let request = format!(r#"{{"kind":"{kind}","spec":{{"node":"n"}}}}"#);
                let refused =
                    OperationRequest::parse(request.as_bytes(), &caller(role, namespaces))
                        .map(|_| ())
                        .unwrap_err();
                assert_eq!((refused.0, refused.1), (403, "role_exceeded"), "{kind}");
            }
        }
    }

    #[test]
    fn what_holds_values_of_a_secret_is_not_resumed() {
        let applied = |object: Value| {
            let mut object = object;
            object["apiVersion"] = "v1".into();
            object["metadata"] = json!({"name": "x"});
            let request = json!({"kind": "apply", "spec": {"objects": [object], "timeout_s": 7}});
            let parsed = OperationRequest::parse(
                request.to_string().as_bytes(),
                &caller(Role::Deployer, None),
            );
            let parsed = parsed.map_err(|(_, _, why)| why).unwrap();
            assert_eq!(parsed.timeout_s(), 7);
            parsed.is_resumable()
        };
        let inner = json!({"kind": "Secret", "stringData": {"a": "b"}});
        let reference = json!({"kind": "Secret", "name": "tls"});
        for (object, resumable) in [
            (json!({"kind": "ConfigMap", "data": {"a": "b"}}), true),
            (json!({"kind": "Secret", "data": {"a": "b"}}), false),
            (json!({"kind": "Secret"}), false),
            (json!({"kind": "List", "items": []}), false),
            (json!({"kind": "SecretList"}), false),
            (json!({"kind": "Wrapped", "spec": {"manifests": [inner]}}), false),
            // a reference names it and holds nothing of it
            (json!({"kind": "Gateway", "spec": {"certificateRefs": [reference]}}), true),
        ] {
            assert_eq!(applied(object.clone()), resumable, "{object}");
        }
        for kind in ["cordon", "uncordon", "drain", "remove"] {
            let request = format!(r#"{{"kind":"{kind}","spec":{{"node":"n"}}}}"#);
            let parsed = OperationRequest::parse(request.as_bytes(), &caller(Role::Operator, None));
            let parsed = parsed.map_err(|(_, _, why)| why).unwrap();
            assert_eq!((parsed.kind(), parsed.is_resumable()), (kind, true));
            assert_eq!(parsed.timeout_s(), 300);
        }
    }
}
