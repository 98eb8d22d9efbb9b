//! Config sets: the keys of a Secret or ConfigMap of a namespace, with their values as versions.
//!
//! Each change makes one immutable object with the keys that it gives. An inventory, a ConfigMap
//! without any value, says which object holds the current value of each key. So a change is merged
//! with what is there, and versions are listed and removed, without reading a Secret: who deploys
//! may write Secrets and not read them. Nothing is requested here.

use std::collections::{BTreeMap, BTreeSet};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use crate::base::encoding::hex;
use crate::base::json;
pub use crate::contract::config::ConfigKind;
use crate::contract::config::{SecretType, SetConfig};

/// On everything that belongs to a set: its name.
pub const SET_LABEL: &str = "pipeops.io/config";
/// On inventories: `secrets` or `configs`.
pub const INVENTORY_LABEL: &str = "pipeops.io/inventory";
/// On all objects that are ours, and its value.
pub const MANAGED_LABEL: &str = "app.kubernetes.io/managed-by";
pub const MANAGED: &str = "pipeops";
/// Which operation made a version, and who asked for it.
const OPERATION: &str = "pipeops.io/operation";
const SUBJECT: &str = "pipeops.io/subject";
/// Digits of the operation in the name of a version.
const DIGITS: usize = 10;
/// A version that no inventory names may be one of an operation that still runs: it is left for so
/// long, seconds.
const ORPHAN_AGE_S: i64 = 3600;

/// What the inventories of a kind list: the value of their label.
pub fn listed(kind: ConfigKind) -> &'static str {
    match kind {
        ConfigKind::Secret => "secrets",
        ConfigKind::ConfigMap => "configs",
    }
}

/// Which set is meant.
#[derive(Clone, Copy)]
pub struct ConfigSet<'a> {
    pub kind: ConfigKind,
    pub namespace: &'a str,
    pub name: &'a str,
}

impl ConfigSet<'_> {
    /// The name of its inventory. The name of a set has no dot, so that no version of any set is
    /// called like that.
    pub fn inventory_name(&self) -> String {
        format!("{}.{}.pipeops.io", self.name, listed(self.kind))
    }

    /// The name of the version that an operation makes: the same each time that it is tried.
    pub fn version_name(&self, operation: &str) -> String {
        format!("{}-{}", self.name, &hex(&Sha256::digest(operation))[..DIGITS])
    }

    /// Whether an object is called like a version of this set.
    pub fn is_version(&self, object: &str) -> bool {
        let digits = object.strip_prefix(self.name).and_then(|rest| rest.strip_prefix('-'));
        digits.is_some_and(|digits| {
            digits.len() == DIGITS && digits.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
        })
    }

    fn metadata(&self, name: &str) -> Value {
        let labels = json!({MANAGED_LABEL: MANAGED, SET_LABEL: self.name});
        json!({"name": name, "namespace": self.namespace, "labels": labels})
    }

    /// The version that `operation` of `subject` makes. It has no time in it: sent again, it is the
    /// same.
    pub fn version(&self, values: &SetConfig, operation: &str, subject: &str) -> Value {
        let mut metadata = self.metadata(&self.version_name(operation));
        metadata["annotations"] = json!({OPERATION: operation, SUBJECT: subject});
        let mut object = json!({
            "apiVersion": "v1", "kind": self.kind.object_kind(), "metadata": metadata,
            "immutable": true
        });
        // Kubernetes has all bytes of a Secret in one field, as base64
        let (text, bytes) = match self.kind {
            ConfigKind::Secret => {
                object["type"] = values.secret_type.name().into();
                ("data", "data")
            }
            ConfigKind::ConfigMap => ("data", "binaryData"),
        };
        for (key, value) in &values.data {
            object[text][key] = match self.kind {
                ConfigKind::Secret => STANDARD.encode(value.expose()).into(),
                ConfigKind::ConfigMap => value.expose().into(),
            };
        }
        for (key, value) in &values.binary {
            object[bytes][key] = value.expose().into();
        }
        object
    }
}

/// Which object holds each key of a set, and which versions there are.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inventory {
    #[serde(rename = "type", default)]
    secret_type: SecretType,
    /// The object that holds the current value of each key.
    keys: BTreeMap<String, String>,
    /// The oldest first.
    versions: Vec<Version>,
}

/// What one operation set.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Version {
    /// From 1 on.
    #[serde(default)]
    pub number: u64,
    pub object: String,
    pub keys: Vec<String>,
    /// RFC 3339.
    pub created_at: String,
    /// Who asked for it: the `sub` of the token.
    pub by: String,
}

impl Inventory {
    /// The object that holds the current value of a key.
    pub fn object_of(&self, key: &str) -> Option<&str> {
        self.keys.get(key).map(String::as_str)
    }

    /// The keys that have a value.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.keys.keys().map(String::as_str)
    }

    pub fn versions(&self) -> &[Version] {
        &self.versions
    }

    /// The objects that hold current values, the oldest first, and which keys count of each.
    pub fn sources(&self) -> Vec<(&str, Vec<&str>)> {
        let current = |version: &&Version| self.keys.values().any(|o| *o == version.object);
        let keys = |object: &str| {
            let mine = self.keys.iter().filter(|(_, o)| *o == object);
            mine.map(|(key, _)| key.as_str()).collect()
        };
        let objects = self.versions.iter().filter(current).map(|v| v.object.as_str());
        objects.map(|object| (object, keys(object))).collect()
    }

    /// Reads the inventory of a set.
    ///
    /// # Errors
    /// What is wrong with the ConfigMap.
    pub fn parse(set: ConfigSet<'_>, object: &Value) -> Result<Inventory, String> {
        if object["metadata"]["labels"][MANAGED_LABEL] != MANAGED {
            return Err(format!("it has no label {MANAGED_LABEL}={MANAGED}"));
        }
        let text = object["data"]["inventory"].as_str().ok_or("it has no key `inventory`")?;
        let inventory: Inventory =
            json::read(text).map_err(|e| format!("`inventory` is not its JSON: {e}"))?;
        // what it lists may be deleted: never an object of somebody else
        let objects = inventory.versions.iter().map(|version| &version.object);
        match objects.chain(inventory.keys.values()).find(|object| !set.is_version(object)) {
            Some(foreign) => Err(format!("`{foreign}` is no version of {}", set.name)),
            None => Ok(inventory),
        }
    }

    /// The ConfigMap that holds it. With `resource_version` it is written over that one alone.
    pub fn to_object(&self, set: ConfigSet<'_>, resource_version: Option<&str>) -> Value {
        let mut metadata = set.metadata(&set.inventory_name());
        metadata["labels"][INVENTORY_LABEL] = listed(set.kind).into();
        if let Some(version) = resource_version {
            metadata["resourceVersion"] = version.into();
        }
        let text = serde_json::to_string(self).unwrap_or_default();
        json!({
            "apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata,
            "data": {"inventory": text}
        })
    }

    /// Whether a set of this type may follow.
    pub fn accepts(&self, secret_type: SecretType) -> bool {
        self.versions.is_empty() || self.secret_type == secret_type
    }

    /// The keys that a change takes away.
    pub fn dropped(&self, change: &SetConfig) -> Vec<&str> {
        let given = change.keys();
        let goes = |key: &&str| {
            change.remove.iter().any(|r| r == key) || change.is_complete() && !given.contains(key)
        };
        self.keys().filter(goes).collect()
    }

    /// Merges a change with what is there; `version` has made its object, if it gives values. The
    /// same change again changes nothing.
    pub fn merge(&mut self, change: &SetConfig, mut version: Version) {
        let gone: Vec<String> = self.dropped(change).into_iter().map(str::to_owned).collect();
        self.keys.retain(|key, _| !gone.contains(key));
        let known = self.versions.iter().any(|v| v.object == version.object);
        if version.keys.is_empty() || known {
            return;
        }
        self.secret_type = change.secret_type;
        for key in &version.keys {
            self.keys.insert(key.clone(), version.object.clone());
        }
        version.number = self.versions.last().map_or(0, |last| last.number) + 1;
        self.versions.push(version);
    }

    /// The objects that can go: they hold no current value, are not among the `keep` newest, and
    /// nobody uses them.
    pub fn prunable(&self, keep: usize, used: &BTreeSet<String>) -> Vec<String> {
        let older = self.versions.iter().rev().skip(keep).rev();
        let unneeded = older.filter(|version| {
            !used.contains(&version.object) && !self.keys.values().any(|o| *o == version.object)
        });
        unneeded.map(|version| version.object.clone()).collect()
    }

    /// Takes versions off the list.
    pub fn forget(&mut self, objects: &[String]) {
        self.versions.retain(|version| !objects.contains(&version.object));
    }

    /// Whether a ConfigMap is a version that an operation left behind before it came to the
    /// inventory. `now`: seconds since 1970.
    pub fn is_orphan(&self, set: ConfigSet<'_>, object: &Value, now: i64) -> bool {
        let metadata = &object["metadata"];
        let name = metadata["name"].as_str().unwrap_or_default();
        let made = metadata["creationTimestamp"].as_str().unwrap_or_default();
        let old = made.parse::<jiff::Timestamp>().is_ok_and(|t| t.as_second() + ORPHAN_AGE_S < now);
        set.is_version(name)
            && old
            && metadata["labels"][MANAGED_LABEL] == MANAGED
            && !self.versions.iter().any(|version| version.object == name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SET: ConfigSet<'_> =
        ConfigSet { kind: ConfigKind::Secret, namespace: "beta", name: "db" };

    fn change(mut spec: Value) -> SetConfig {
        (spec["namespace"], spec["name"]) = ("beta".into(), "db".into());
        serde_json::from_value(spec).unwrap()
    }

    /// Merges the change of an operation.
    fn merge(inventory: &mut Inventory, operation: &str, spec: Value) {
        let change = change(spec);
        let version = Version {
            object: SET.version_name(operation),
            keys: change.keys().into_iter().map(str::to_owned).collect(),
            created_at: "2026-01-01T00:00:00Z".into(),
            by: "runner-1".into(),
            ..Version::default()
        };
        inventory.merge(&change, version);
    }

    fn current(inventory: &Inventory) -> Vec<(&str, &str)> {
        inventory.keys().map(|key| (key, inventory.object_of(key).unwrap())).collect()
    }

    #[test]
    fn names_are_told_apart() {
        let name = SET.version_name("o-1");
        assert_eq!(name, SET.version_name("o-1"));
        assert_ne!(name, SET.version_name("o-2"));
        assert_eq!(name.len(), "db-".len() + DIGITS);
        assert!(SET.is_version(&name), "{name}");
        // versions of a set whose name begins alike, or is like a version's, inventories
        let longer = ConfigSet { name: &name, ..SET };
        for other in [
            &*longer.version_name("o-1"),
            &*ConfigSet { name: "db-x", ..SET }.version_name("o-1"),
            &*SET.inventory_name(),
            "db",
            "db-",
            "db-0123456789a",
            "db-012345678G",
            "db-ABCDEF0123",
        ] {
            assert!(!SET.is_version(other), "{other}");
        }
        assert!(!longer.is_version(&name));
        assert_eq!(SET.inventory_name(), "db.secrets.pipeops.io");
        let config = ConfigSet { kind: ConfigKind::ConfigMap, ..SET };
        assert_eq!(config.inventory_name(), "db.configs.pipeops.io");
    }

    #[test]
    fn a_version_holds_what_was_given_and_is_the_same_each_time() {
        let given = change(json!({"data": {"a": "x"}, "binary": {"b": "AA=="}}));
        let secret = SET.version(&given, "o-1", "runner-1");
        assert_eq!(secret, SET.version(&given, "o-1", "runner-1"));
        assert_eq!(
            (&secret["data"], &secret["type"], &secret["immutable"]),
            (&json!({"a": "eA==", "b": "AA=="}), &json!("Opaque"), &json!(true))
        );
        assert_eq!(
            secret["metadata"],
            json!({
                "name": SET.version_name("o-1"), "namespace": "beta",
                "labels": {"app.kubernetes.io/managed-by": "pipeops", "pipeops.io/config": "db"},
                "annotations": {"pipeops.io/operation": "o-1", "pipeops.io/subject": "runner-1"}
            })
        );
        let set = ConfigSet { kind: ConfigKind::ConfigMap, ..SET };
        let config = set.version(&given, "o-1", "runner-1");
        assert_eq!(
            (&config["data"], &config["binaryData"], config.get("type")),
            (&json!({"a": "x"}), &json!({"b": "AA=="}), None)
        );
        let tls = change(json!({"type": "tls", "data": {"tls.crt": "c", "tls.key": "k"}}));
        assert_eq!(SET.version(&tls, "o-1", "r")["type"], "kubernetes.io/tls");
    }

    #[test]
    fn a_change_is_merged_with_what_is_there() {
        let [one, two, three] = ["o-1", "o-2", "o-3"].map(|o| SET.version_name(o));
        let mut inventory = Inventory::default();
        merge(&mut inventory, "o-1", json!({"data": {"a": "1", "b": "1"}}));
        merge(&mut inventory, "o-2", json!({"data": {"b": "2", "c": "2"}}));
        assert_eq!(current(&inventory), [("a", &*one), ("b", &*two), ("c", &*two)]);
        assert_eq!(inventory.sources(), [(&*one, vec!["a"]), (&*two, vec!["b", "c"])]);
        // again, also after a later one: nothing changes
        let before = inventory.clone();
        merge(&mut inventory, "o-1", json!({"data": {"a": "1", "b": "1"}}));
        assert_eq!(inventory, before);
        // a key that goes, one that is not there, and no new object
        merge(&mut inventory, "o-9", json!({"remove": ["c", "none"]}));
        assert_eq!(current(&inventory), [("a", &*one), ("b", &*two)]);
        merge(&mut inventory, "o-3", json!({"data": {"d": "3"}, "remove": ["b"]}));
        assert_eq!(current(&inventory), [("a", &*one), ("d", &*three)]);
        let numbers: Vec<u64> = inventory.versions().iter().map(|v| v.number).collect();
        assert_eq!(numbers, [1, 2, 3]);
        assert_eq!(inventory.dropped(&change(json!({"remove": ["a", "x"]}))), ["a"]);
    }

    #[test]
    fn a_set_with_a_type_is_replaced_as_a_whole() {
        let mut inventory = Inventory::default();
        assert!(inventory.accepts(SecretType::Tls));
        let all = json!({"type": "tls", "data": {"tls.crt": "c", "tls.key": "k", "ca.crt": "c"}});
        merge(&mut inventory, "o-1", all);
        assert!(inventory.accepts(SecretType::Tls) && !inventory.accepts(SecretType::Opaque));
        let less = json!({"type": "tls", "data": {"tls.crt": "c", "tls.key": "k"}});
        assert_eq!(inventory.dropped(&change(less.clone())), ["ca.crt"]);
        merge(&mut inventory, "o-2", less);
        let two = SET.version_name("o-2");
        assert_eq!(current(&inventory), [("tls.crt", &*two), ("tls.key", &*two)]);
        let written = inventory.to_object(SET, Some("7"));
        assert_eq!(written["metadata"]["resourceVersion"], "7");
        assert_eq!(Inventory::parse(SET, &written).unwrap(), inventory);
    }

    #[test]
    fn an_inventory_that_was_changed_by_hand_is_not_obeyed() {
        let mut inventory = Inventory::default();
        merge(&mut inventory, "o-1", json!({"data": {"a": "1"}}));
        let written = inventory.to_object(SET, None);
        assert_eq!(written["metadata"].get("resourceVersion"), None);
        assert_eq!(Inventory::parse(SET, &written).unwrap(), inventory);
        let name = SET.version_name("o-1");
        for (pointer, value, expected) in [
            ("/metadata/labels", json!({}), "no label"),
            ("/data", json!({}), "no key `inventory`"),
            ("/data/inventory", json!("{}"), "missing field"),
            (
                "/data/inventory",
                json!(written["data"]["inventory"].as_str().unwrap().replace(&name, "theirs")),
                "`theirs` is no version of db",
            ),
        ] {
            let mut changed = written.clone();
            *changed.pointer_mut(pointer).unwrap() = value;
            let said = Inventory::parse(SET, &changed).unwrap_err();
            assert!(said.contains(expected), "{expected}: {said}");
        }
    }

    #[test]
    fn only_what_nothing_needs_is_pruned() {
        let mut inventory = Inventory::default();
        for n in 0..6 {
            merge(&mut inventory, &format!("o-{n}"), json!({"data": {"a": "x"}}));
        }
        merge(&mut inventory, "o-6", json!({"data": {"b": "x"}}));
        let names: Vec<String> = (0..7).map(|n| SET.version_name(&format!("o-{n}"))).collect();
        let used = BTreeSet::from([names[1].clone(), "of somebody else".to_owned()]);
        // o-5 holds `a`, o-6 is the newest and holds `b`
        let all = [&names[0], &names[2], &names[3], &names[4]].map(String::clone);
        for (keep, expected) in [(0, 4), (2, 4), (3, 3), (7, 0), (99, 0)] {
            assert_eq!(inventory.prunable(keep, &used), all[..expected], "{keep}");
        }
        inventory.forget(&all);
        let left: Vec<u64> = inventory.versions().iter().map(|v| v.number).collect();
        assert_eq!(left, [2, 6, 7]);
        merge(&mut inventory, "o-7", json!({"data": {"a": "x"}}));
        assert_eq!(inventory.versions().last().unwrap().number, 8);
    }

    #[test]
    fn an_orphan_is_an_old_version_of_ours_that_no_inventory_names() {
        let mut inventory = Inventory::default();
        merge(&mut inventory, "o-1", json!({"data": {"a": "1"}}));
        let now = "2026-01-01T02:00:00Z".parse::<jiff::Timestamp>().unwrap().as_second();
        let object = |name: &str, manager: &str, made: &str| {
            json!({"metadata": {
                "name": name, "creationTimestamp": made, "labels": {MANAGED_LABEL: manager}
            }})
        };
        let (early, known) = ("2026-01-01T00:00:00Z", SET.version_name("o-1"));
        let lost = SET.version_name("o-2");
        assert!(inventory.is_orphan(SET, &object(&lost, "pipeops", early), now));
        for (name, manager, made) in [
            (&*known, "pipeops", early),
            (&*lost, "helm", early),
            (&*lost, "pipeops", "2026-01-01T01:30:00Z"),
            (&*lost, "pipeops", ""),
            ("db", "pipeops", early),
            ("db.configs.pipeops.io", "pipeops", early),
        ] {
            assert!(!inventory.is_orphan(SET, &object(name, manager, made), now), "{name} {made}");
        }
    }
}
