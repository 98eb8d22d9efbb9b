//! What a Runner may ask for of a config set: the keys of a Secret or ConfigMap of a namespace,
//! whose values are kept as versions.

use std::collections::{BTreeMap, BTreeSet};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::base::secret::Secret;
use crate::base::text::{is_dns_label, printable};
use crate::contract::application::requests::default_timeout_s;

/// Most that the values of a set may hold, bytes. Kubernetes takes 1 MiB in one object
/// (kubernetes/kubernetes `pkg/apis/core/types.go`, `MaxSecretSize`), and the whole request is no
/// longer than that.
const MAX_BYTES: usize = (1 << 20) - (64 << 10);
/// Most keys in one request.
const MAX_KEYS: usize = 1000;
/// Longest name of a key, as in kubernetes/apimachinery `pkg/util/validation/validation.go`.
const MAX_KEY: usize = 253;
/// Most versions that a prune may be told to keep.
const MAX_KEEP: usize = 1000;

/// The key of the logins to registries.
pub const IMAGE_PULL_KEY: &str = ".dockerconfigjson";

/// Whether values are secret.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConfigKind {
    Secret,
    ConfigMap,
}

impl ConfigKind {
    /// The kind of Kubernetes that holds the values.
    pub fn object_kind(self) -> &'static str {
        match self {
            ConfigKind::Secret => "Secret",
            ConfigKind::ConfigMap => "ConfigMap",
        }
    }

    /// Its name in paths.
    pub fn plural(self) -> &'static str {
        match self {
            ConfigKind::Secret => "secrets",
            ConfigKind::ConfigMap => "configmaps",
        }
    }
}

/// What a Secret is for. One that is not opaque is complete in each `set`: Kubernetes demands its
/// keys in one object.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SecretType {
    #[default]
    Opaque,
    ImagePull,
    Tls,
}

impl SecretType {
    /// The type as Kubernetes names it (kubernetes/kubernetes `pkg/apis/core/types.go`).
    pub fn name(self) -> &'static str {
        match self {
            SecretType::Opaque => "Opaque",
            SecretType::ImagePull => "kubernetes.io/dockerconfigjson",
            SecretType::Tls => "kubernetes.io/tls",
        }
    }

    /// The keys that Kubernetes demands of it.
    pub fn demanded_keys(self) -> &'static [&'static str] {
        match self {
            SecretType::Opaque => &[],
            SecretType::ImagePull => &[IMAGE_PULL_KEY],
            SecretType::Tls => &["tls.crt", "tls.key"],
        }
    }
}

/// A request about one set.
#[derive(Deserialize)]
#[serde(tag = "action", rename_all = "snake_case")]
pub enum ConfigSpec {
    /// New values of some keys; the others stay as they are.
    Set(SetConfig),
    /// All versions and the inventory.
    Delete(DeleteConfig),
    /// The versions that nothing needs any more.
    Prune(PruneConfig),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SetConfig {
    pub namespace: String,
    pub name: String,
    /// Text by key.
    #[serde(default)]
    pub data: BTreeMap<String, Secret>,
    /// Base64 by key.
    #[serde(default)]
    pub binary: BTreeMap<String, Secret>,
    /// Keys that go.
    #[serde(default)]
    pub remove: Vec<String>,
    #[serde(default, rename = "type")]
    pub secret_type: SecretType,
    /// What uses the set gets the new values.
    #[serde(default = "yes")]
    pub rollout: bool,
    #[serde(default = "yes")]
    pub wait: bool,
    #[serde(default = "default_timeout_s")]
    pub timeout_s: u64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeleteConfig {
    pub namespace: String,
    pub name: String,
    /// Also while applications use it.
    #[serde(default)]
    pub force: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PruneConfig {
    pub namespace: String,
    pub name: String,
    /// So many of the newest versions stay, whether they are used or not.
    #[serde(default = "default_keep")]
    pub keep: usize,
}

fn yes() -> bool {
    true
}

fn default_keep() -> usize {
    10
}

impl ConfigSpec {
    /// Namespace and name of the set.
    pub fn target(&self) -> (&str, &str) {
        match self {
            ConfigSpec::Set(set) => (&set.namespace, &set.name),
            ConfigSpec::Delete(delete) => (&delete.namespace, &delete.name),
            ConfigSpec::Prune(prune) => (&prune.namespace, &prune.name),
        }
    }

    /// How long it may wait for workloads, seconds, if it does.
    pub fn timeout_s(&self) -> Option<u64> {
        match self {
            ConfigSpec::Set(set) => Some(set.timeout_s),
            ConfigSpec::Delete(_) | ConfigSpec::Prune(_) => None,
        }
    }

    /// # Errors
    /// Which field is wrong, and why; never a value.
    pub fn check(&self, kind: ConfigKind) -> Result<(), String> {
        let (namespace, name) = self.target();
        for (field, text) in [("namespace", namespace), ("name", name)] {
            if !is_dns_label(text) {
                return Err(format!(
                    "{field}: `{}` is not 1 to 63 lower-case letters, digits and -, as in web-1",
                    shown(text)
                ));
            }
        }
        match self {
            ConfigSpec::Set(set) => set.check(kind),
            ConfigSpec::Delete(_) => Ok(()),
            ConfigSpec::Prune(prune) if prune.keep <= MAX_KEEP => Ok(()),
            ConfigSpec::Prune(_) => Err(format!("keep is 0 to {MAX_KEEP}")),
        }
    }
}

impl SetConfig {
    /// The keys that get a value.
    pub fn keys(&self) -> BTreeSet<&str> {
        self.data.keys().chain(self.binary.keys()).map(String::as_str).collect()
    }

    /// Whether it replaces all keys instead of those that it names.
    pub fn is_complete(&self) -> bool {
        self.secret_type != SecretType::Opaque
    }

    fn check(&self, kind: ConfigKind) -> Result<(), String> {
        let fields = [
            ("data", self.data.keys().collect::<Vec<_>>()),
            ("binary", self.binary.keys().collect()),
            ("remove", self.remove.iter().collect()),
        ];
        let mut seen = BTreeMap::new();
        for (field, keys) in fields {
            for key in keys {
                if !is_key(key) {
                    return Err(format!(
                        "{field}: `{}` is no key: 1 to {MAX_KEY} letters, digits, -, _ and dots, \
                         and no two dots in front",
                        shown(key)
                    ));
                }
                if let Some(first) = seen.insert(key, field) {
                    return Err(format!("{field}: `{}` stands in {first} too", shown(key)));
                }
            }
        }
        if !(1..=MAX_KEYS).contains(&seen.len()) {
            return Err(format!("data, binary and remove name 1 to {MAX_KEYS} keys together"));
        }
        self.check_size()?;
        self.check_type(kind)
    }

    fn check_size(&self) -> Result<(), String> {
        let mut bytes: usize = self.data.values().map(|value| value.expose().len()).sum();
        for (key, value) in &self.binary {
            // the error of the decoder quotes a byte of the value
            let decoded = STANDARD
                .decode(value.expose())
                .map_err(|_| format!("binary: `{}` is no base64 (RFC 4648 §4)", shown(key)))?;
            bytes += decoded.len();
        }
        if bytes > MAX_BYTES {
            return Err(format!("data and binary hold {bytes} bytes; {MAX_BYTES} is the most"));
        }
        Ok(())
    }

    fn check_type(&self, kind: ConfigKind) -> Result<(), String> {
        if !self.is_complete() {
            return Ok(());
        }
        if kind == ConfigKind::ConfigMap {
            return Err("type: a configmap has none".into());
        }
        if !self.remove.is_empty() {
            return Err("remove: a set with a type is complete each time: leave the key out".into());
        }
        let (keys, demanded) = (self.keys(), self.secret_type.demanded_keys());
        if let Some(missing) = demanded.iter().find(|key| !keys.contains(*key)) {
            return Err(format!("type: it needs the key `{missing}` in data or binary"));
        }
        let login = self.data.get(IMAGE_PULL_KEY).map(|text| text.expose().as_bytes().to_vec());
        let login = login.or_else(|| {
            let text = self.binary.get(IMAGE_PULL_KEY)?;
            STANDARD.decode(text.expose()).ok()
        });
        let is_object = |text: &[u8]| {
            serde_json::from_slice::<Value>(text).is_ok_and(|login| login["auths"].is_object())
        };
        if self.secret_type == SecretType::ImagePull && !login.is_some_and(|text| is_object(&text))
        {
            return Err(format!("type: `{IMAGE_PULL_KEY}` is JSON with an object `auths`"));
        }
        Ok(())
    }
}

/// Whether a Secret or ConfigMap may have this key (kubernetes/apimachinery
/// `pkg/util/validation/validation.go`, `IsConfigMapKey`).
fn is_key(key: &str) -> bool {
    (1..=MAX_KEY).contains(&key.len())
        && key != "."
        && !key.starts_with("..")
        && key.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._".contains(&b))
}

fn shown(text: &str) -> String {
    printable(text).chars().take(80).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn verdict(kind: ConfigKind, mut spec: Value) -> Result<(), String> {
        let fields = spec.as_object_mut().unwrap();
        for (field, value) in [("namespace", "beta"), ("name", "db"), ("action", "set")] {
            fields.entry(field).or_insert_with(|| value.into());
        }
        let spec: ConfigSpec = serde_json::from_value(spec).map_err(|e| e.to_string())?;
        spec.check(kind)
    }

    #[test]
    fn what_a_set_may_be_is_taken() {
        for spec in [
            json!({"data": {"a": "text", "A_b-c.d": "", ".env": "x"}}),
            json!({"binary": {"a": "AAEC/w=="}, "remove": ["b"]}),
            json!({"remove": ["b"], "rollout": false, "wait": false, "timeout_s": 1}),
            json!({"action": "delete", "force": true}),
            json!({"action": "prune", "keep": 0}),
            json!({"data": {"a": "x".repeat(MAX_BYTES)}}),
        ] {
            for kind in [ConfigKind::Secret, ConfigKind::ConfigMap] {
                assert_eq!(verdict(kind, spec.clone()), Ok(()));
            }
        }
        for spec in [
            json!({"type": "tls", "data": {"tls.crt": "c", "tls.key": "k", "ca.crt": "c"}}),
            json!({"type": "image_pull", "data": {".dockerconfigjson": "{\"auths\": {}}"}}),
            json!({"type": "image_pull", "binary": {".dockerconfigjson": "eyJhdXRocyI6e319"}}),
        ] {
            assert_eq!(verdict(ConfigKind::Secret, spec.clone()), Ok(()));
            let said = verdict(ConfigKind::ConfigMap, spec).unwrap_err();
            assert!(said.starts_with("type: "), "{said}");
        }
    }

    #[test]
    fn what_no_set_can_be_is_refused_by_its_field_and_without_its_value() {
        let value = "planted-canary-2231-in-plain-text";
        for (spec, expected) in [
            (json!({}), "data, binary and remove name 1 to 1000 keys"),
            (json!({"name": "Db", "data": {"a": value}}), "name: `Db`"),
            (json!({"name": "a.b", "data": {"a": value}}), "name: `a.b`"),
            (json!({"name": "n".repeat(64), "data": {"a": value}}), "name: `nnn"),
            (json!({"namespace": "../x", "data": {"a": value}}), "namespace: `../x`"),
            (json!({"data": {"a b": value}}), "data: `a b` is no key"),
            (json!({"data": {"": value}}), "data: `` is no key"),
            (json!({"data": {"..": value}}), "data: `..` is no key"),
            (json!({"data": {"k".repeat(254): value}}), "is no key"),
            (json!({"remove": ["."]}), "remove: `.` is no key"),
            (json!({"data": {"a": value}, "binary": {"a": "AA=="}}), "binary: `a` stands in data"),
            (json!({"data": {"a": value}, "remove": ["a"]}), "remove: `a` stands in data"),
            (json!({"remove": ["a", "a"]}), "remove: `a` stands in remove"),
            (json!({"binary": {"a": value}}), "binary: `a` is no base64"),
            (json!({"data": {"a": "x".repeat(MAX_BYTES + 1)}}), "983040 is the most"),
            (json!({"type": "tls", "data": {"tls.crt": value}}), "needs the key `tls.key`"),
            (json!({"type": "tls", "remove": ["a"]}), "remove: a set with a type"),
            (json!({"type": "image_pull", "data": {".dockerconfigjson": value}}), "is JSON with"),
            (json!({"type": "basic", "data": {"a": value}}), "unknown variant `basic`"),
            (json!({"action": "list"}), "unknown variant `list`"),
            (json!({"action": "prune", "keep": 1001}), "keep is 0 to 1000"),
            (json!({"action": "prune", "data": {"a": value}}), "unknown field `data`"),
            (json!({"action": "delete", "keep": 3}), "unknown field `keep`"),
            (json!({"data": {"a": value}, "force": true}), "unknown field `force`"),
        ] {
            let said = verdict(ConfigKind::Secret, spec).unwrap_err();
            assert!(said.contains(expected), "{expected}: {said}");
            assert!(!said.contains("2231-in-plain-text"), "{said}");
        }
    }
}
