//! Which Secrets and ConfigMaps a pod refers to, and how it comes to refer to the current versions
//! of a config set.

mod retarget;

use serde_json::Value;

use super::config_set::{ConfigKind, ConfigSet, Inventory};
use crate::contract::config::IMAGE_PULL_KEY;
pub use retarget::retarget;

/// A place in the spec of a pod that names an object.
#[derive(Debug, PartialEq, Eq)]
pub struct PodReference<'a> {
    pub object: &'a str,
    /// The keys that it takes; `None` for all.
    pub keys: Option<Vec<&'a str>>,
}

/// How the places are called for each kind (kubernetes/api `core/v1/types.go`).
struct Fields {
    /// Below `env[].valueFrom`.
    key: &'static str,
    /// In `envFrom[]`.
    all: &'static str,
    /// In `volumes[]` and `volumes[].projected.sources[]`.
    volume: &'static str,
    /// In a volume, the name of the object.
    name: &'static str,
}

fn fields(kind: ConfigKind) -> Fields {
    match kind {
        ConfigKind::Secret => {
            Fields { key: "secretKeyRef", all: "secretRef", volume: "secret", name: "secretName" }
        }
        ConfigKind::ConfigMap => Fields {
            key: "configMapKeyRef",
            all: "configMapRef",
            volume: "configMap",
            name: "name",
        },
    }
}

/// The lists of a pod's containers.
const CONTAINERS: [&str; 2] = ["containers", "initContainers"];

fn items<'a>(value: &'a Value, field: &str) -> impl Iterator<Item = &'a Value> + use<'a> {
    value[field].as_array().into_iter().flatten()
}

/// The spec of a pod, referring to the current versions of a set.
pub fn current(mut pod: Value, set: ConfigSet<'_>, inventory: &Inventory) -> Value {
    for change in retarget(&pod, "", set, inventory) {
        let path = change["path"].as_str().unwrap_or_default();
        if change["op"] == "replace"
            && let Some(list) = pod.pointer_mut(path)
        {
            *list = change["value"].clone();
        }
    }
    pod
}

/// All references of a pod's spec to objects of a kind.
pub fn references(pod: &Value, kind: ConfigKind) -> Vec<PodReference<'_>> {
    let fields = fields(kind);
    let mut found = Vec::new();
    for container in CONTAINERS.iter().flat_map(|list| items(pod, list)) {
        for env in items(container, "env") {
            let reference = &env["valueFrom"][fields.key];
            let keys = reference["key"].as_str().map(|key| vec![key]);
            push(&mut found, &reference["name"], keys);
        }
        for all in items(container, "envFrom") {
            push(&mut found, &all[fields.all]["name"], None);
        }
    }
    for volume in items(pod, "volumes") {
        let named = &volume[fields.volume];
        push(&mut found, &named[fields.name], taken(named));
        for source in items(&volume["projected"], "sources") {
            let named = &source[fields.volume];
            push(&mut found, &named["name"], taken(named));
        }
        // what drivers of volumes log in with
        let drivers = volume.as_object().filter(|_| kind == ConfigKind::Secret);
        for driver in drivers.into_iter().flat_map(|volume| volume.values()) {
            push(&mut found, &driver["secretRef"]["name"], None);
            push(&mut found, &driver["nodePublishSecretRef"]["name"], None);
        }
        if kind == ConfigKind::Secret {
            push(&mut found, &volume["azureFile"]["secretName"], None);
        }
    }
    if kind == ConfigKind::Secret {
        for login in items(pod, "imagePullSecrets") {
            push(&mut found, &login["name"], Some(vec![IMAGE_PULL_KEY]));
        }
    }
    found
}

fn push<'a>(found: &mut Vec<PodReference<'a>>, name: &'a Value, keys: Option<Vec<&'a str>>) {
    found.extend(name.as_str().map(|object| PodReference { object, keys }));
}

/// The keys that a volume takes of its object; `None` for all.
fn taken(named: &Value) -> Option<Vec<&str>> {
    let items = named["items"].as_array().filter(|items| !items.is_empty())?;
    Some(items.iter().filter_map(|item| item["key"].as_str()).collect())
}

impl PodReference<'_> {
    /// Whether the pod would miss this key of the set.
    pub fn takes(&self, set: ConfigSet<'_>, key: &str) -> bool {
        set.is_version(self.object) && self.keys.as_ref().is_none_or(|keys| keys.contains(&key))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::kubernetes::config_set::Inventory;

    const SET: ConfigSet<'_> =
        ConfigSet { kind: ConfigKind::Secret, namespace: "beta", name: "db" };

    #[test]
    fn every_place_that_names_an_object_is_seen() {
        let pod = json!({
            "containers": [{
                "env": [
                    {"name": "A", "valueFrom": {"secretKeyRef": {"name": "s1", "key": "a"}}},
                    {"name": "B", "valueFrom": {"configMapKeyRef": {"name": "c1", "key": "b"}}},
                    {"name": "C", "value": "s0"},
                    {"name": "D", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}
                ],
                "envFrom": [{"secretRef": {"name": "s2"}}, {"configMapRef": {"name": "c2"}}]
            }],
            "initContainers": [{"envFrom": [{"secretRef": {"name": "s3"}}]}],
            "volumes": [
                {"name": "s0", "secret": {"secretName": "s4"}},
                {"name": "v", "secret": {"secretName": "s5", "items": [{"key": "k", "path": "p"}]}},
                {"name": "v", "configMap": {"name": "c3"}},
                {"name": "v", "projected": {"sources": [
                    {"secret": {"name": "s6"}},
                    {"configMap": {"name": "c4", "items": [{"key": "k", "path": "p"}]}},
                    {"serviceAccountToken": {"path": "t"}}
                ]}},
                {"name": "v", "csi": {"driver": "d", "nodePublishSecretRef": {"name": "s7"}}},
                {"name": "v", "flexVolume": {"driver": "d", "secretRef": {"name": "s8"}}},
                {"name": "v", "azureFile": {"secretName": "s9"}},
                {"name": "v", "emptyDir": {}}
            ],
            "imagePullSecrets": [{"name": "s10"}]
        });
        let seen = |kind| -> Vec<String> {
            let shown = |found: PodReference<'_>| match found.keys {
                Some(keys) => format!("{} {}", found.object, keys.join(",")),
                None => found.object.to_owned(),
            };
            references(&pod, kind).into_iter().map(shown).collect()
        };
        assert_eq!(
            seen(ConfigKind::Secret),
            ["s1 a", "s2", "s3", "s4", "s5 k", "s6", "s7", "s8", "s9", "s10 .dockerconfigjson"]
        );
        assert_eq!(seen(ConfigKind::ConfigMap), ["c1 b", "c2", "c3", "c4 k"]);
        for odd in [json!(null), json!([]), json!({"containers": 7, "volumes": [7, {"secret": 7}]})]
        {
            assert!(references(&odd, ConfigKind::Secret).is_empty(), "{odd}");
            assert!(retarget(&odd, "", SET, &Inventory::default()).is_empty(), "{odd}");
        }
    }

    #[test]
    fn a_key_is_missed_by_what_names_it_or_its_whole_object() {
        let name = SET.version_name("o-1");
        for (object, keys, expected) in [
            (&*name, Some(vec!["a", "b"]), true),
            (&*name, Some(vec!["b"]), false),
            (&*name, None, true),
            ("theirs", None, false),
        ] {
            assert_eq!(PodReference { object, keys }.takes(SET, "a"), expected, "{object}");
        }
    }
}
