//! The change of a pod after which it refers to the current versions of a config set.

use serde_json::{Value, json};

use super::{CONTAINERS, Fields, fields, items, taken};
use crate::contract::config::IMAGE_PULL_KEY;
use crate::kubernetes::config_set::{ConfigKind, ConfigSet, Inventory};

/// The JSON patch (RFC 6902) after which the spec of a pod, which is at `at` of its object, refers to
/// the current versions of a set; empty where it does already. Each list that changes must be as it
/// was read (`test`).
///
/// A key that has no value any more stays where it was. What names a whole object names all keys of
/// the set.
pub fn retarget(pod: &Value, at: &str, set: ConfigSet<'_>, inventory: &Inventory) -> Vec<Value> {
    let target = Target { fields: fields(set.kind), set, inventory };
    let mut patch = Vec::new();
    let mut step = |path: String, list: &Value, to: &dyn Fn(&[Value]) -> Vec<Value>| {
        let Some(before) = list.as_array() else { return };
        let after = to(before);
        if after != *before {
            patch.push(json!({"op": "test", "path": path, "value": list}));
            patch.push(json!({"op": "replace", "path": path, "value": after}));
        }
    };
    for containers in CONTAINERS {
        for (n, container) in items(pod, containers).enumerate() {
            let at = format!("{at}/{containers}/{n}");
            step(format!("{at}/env"), &container["env"], &|list| target.env(list));
            step(format!("{at}/envFrom"), &container["envFrom"], &|list| target.env_from(list));
        }
    }
    step(format!("{at}/volumes"), &pod["volumes"], &|list| target.volumes(list));
    if set.kind == ConfigKind::Secret {
        let logins = &pod["imagePullSecrets"];
        step(format!("{at}/imagePullSecrets"), logins, &|list| target.logins(list));
    }
    patch
}

/// What the lists of a pod have to refer to.
struct Target<'a> {
    fields: Fields,
    set: ConfigSet<'a>,
    inventory: &'a Inventory,
}

impl Target<'_> {
    fn is_ours(&self, name: &Value) -> bool {
        name.as_str().is_some_and(|name| self.set.is_version(name))
    }

    /// The object that has a key now.
    fn current(&self, name: &Value, key: &str) -> Option<&str> {
        if self.is_ours(name) { self.inventory.object_of(key) } else { None }
    }

    fn env(&self, list: &[Value]) -> Vec<Value> {
        let at = format!("/valueFrom/{}", self.fields.key);
        let mut list = list.to_vec();
        for reference in list.iter_mut().filter_map(|item| item.pointer_mut(&at)) {
            let key = reference["key"].as_str().unwrap_or_default();
            if let Some(object) = self.current(&reference["name"], key) {
                reference["name"] = object.into();
            }
        }
        list
    }

    /// Later entries win: the newest version stands last.
    fn env_from(&self, list: &[Value]) -> Vec<Value> {
        let (mut after, mut prefixes) = (Vec::new(), Vec::new());
        let sources = self.inventory.sources();
        for item in list {
            if sources.is_empty() || !self.is_ours(&item[self.fields.all]["name"]) {
                after.push(item.clone());
            } else if !prefixes.contains(&&item["prefix"]) {
                prefixes.push(&item["prefix"]);
                after.extend(sources.iter().map(|(object, _)| {
                    let mut item = item.clone();
                    item[self.fields.all]["name"] = (*object).into();
                    item
                }));
            }
        }
        after
    }

    fn volumes(&self, list: &[Value]) -> Vec<Value> {
        list.iter().map(|volume| self.volume(volume)).collect()
    }

    fn volume(&self, volume: &Value) -> Value {
        let Fields { volume: field, name, .. } = self.fields;
        let mut after = volume.clone();
        if let Some(sources) = volume["projected"]["sources"].as_array() {
            after["projected"]["sources"] = self.projected(sources).into();
        }
        let named = &volume[field];
        if !self.is_ours(&named[name]) {
            return after;
        }
        match self.parts(named, &named[name]).as_slice() {
            [] => {}
            [(object, items)] => {
                after[field][name] = object.as_str().into();
                set_items(&mut after[field], items);
            }
            // one volume of this kind shows one object
            parts => {
                let sources = parts.iter().map(|(object, items)| {
                    let mut source = json!({field: {"name": object, "items": items}});
                    if !named["optional"].is_null() {
                        source[field]["optional"] = named["optional"].clone();
                    }
                    source
                });
                after = json!({
                    "name": volume["name"],
                    "projected": {"sources": sources.collect::<Vec<_>>()}
                });
                if !named["defaultMode"].is_null() {
                    after["projected"]["defaultMode"] = named["defaultMode"].clone();
                }
            }
        }
        after
    }

    fn projected(&self, list: &[Value]) -> Vec<Value> {
        let field = self.fields.volume;
        let (mut after, mut whole) = (Vec::new(), false);
        for source in list {
            let named = &source[field];
            let parts = if self.is_ours(&named["name"]) {
                self.parts(named, &named["name"])
            } else {
                Vec::new()
            };
            if parts.is_empty() {
                after.push(source.clone());
                continue;
            }
            // the first entry without items stands for all keys
            if taken(named).is_none() && std::mem::replace(&mut whole, true) {
                continue;
            }
            after.extend(parts.into_iter().map(|(object, items)| {
                let mut source = source.clone();
                source[field]["name"] = object.into();
                set_items(&mut source[field], &items);
                source
            }));
        }
        after
    }

    /// The objects that have what a volume takes, with its items of each; no items where it takes
    /// the whole object.
    fn parts(&self, named: &Value, name: &Value) -> Vec<(String, Value)> {
        let name = name.as_str().unwrap_or_default();
        let mut parts: Vec<(String, Vec<Value>)> = Vec::new();
        if taken(named).is_some() {
            for item in items(named, "items") {
                let key = item["key"].as_str().unwrap_or_default();
                let object = self.inventory.object_of(key).unwrap_or(name);
                match parts.iter_mut().find(|(known, _)| known == object) {
                    Some((_, items)) => items.push(item.clone()),
                    None => parts.push((object.to_owned(), vec![item.clone()])),
                }
            }
        } else {
            let sources = self.inventory.sources();
            if let [(object, keys)] = sources.as_slice()
                && self
                    .inventory
                    .versions()
                    .iter()
                    .any(|version| version.object == *object && version.keys.len() == keys.len())
            {
                return vec![((*object).to_owned(), Value::Null)];
            }
            parts.extend(sources.into_iter().map(|(object, keys)| {
                let items = keys.into_iter().map(|key| json!({"key": key, "path": key}));
                (object.to_owned(), items.collect())
            }));
        }
        parts.into_iter().map(|(object, items)| (object, items.into())).collect()
    }

    fn logins(&self, list: &[Value]) -> Vec<Value> {
        let mut list = list.to_vec();
        for login in &mut list {
            if let Some(object) = self.current(&login["name"], IMAGE_PULL_KEY) {
                login["name"] = object.into();
            }
        }
        list
    }
}

fn set_items(named: &mut Value, items: &Value) {
    if items.is_null() {
        if let Some(named) = named.as_object_mut() {
            named.remove("items");
        }
    } else {
        named["items"] = items.clone();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kubernetes::config_set::Version;

    const SET: ConfigSet<'_> =
        ConfigSet { kind: ConfigKind::Secret, namespace: "beta", name: "db" };
    const CONFIG: ConfigSet<'_> = ConfigSet { kind: ConfigKind::ConfigMap, ..SET };

    fn object(n: u32) -> String {
        SET.version_name(&format!("o-{n}"))
    }

    /// The inventory after operations that each set these keys.
    fn inventory(operations: &[&[&str]]) -> Inventory {
        let mut inventory = Inventory::default();
        for (n, keys) in (1..).zip(operations) {
            let data: serde_json::Map<String, Value> =
                keys.iter().map(|key| ((*key).to_owned(), "x".into())).collect();
            let change = json!({"namespace": "beta", "name": "db", "data": data});
            let version = Version {
                object: object(n),
                keys: keys.iter().map(|key| (*key).to_owned()).collect(),
                ..Version::default()
            };
            inventory.merge(&serde_json::from_value(change).unwrap(), version);
        }
        inventory
    }

    /// A pod's spec after its patch.
    fn retargeted(pod: &Value, set: ConfigSet<'_>, inventory: &Inventory) -> Value {
        let mut object = json!({"spec": pod});
        for step in retarget(pod, "/spec", set, inventory) {
            let at = object.pointer_mut(step["path"].as_str().unwrap()).unwrap();
            match step["op"].as_str().unwrap() {
                "test" => assert_eq!(*at, step["value"]),
                _ => *at = step["value"].clone(),
            }
        }
        let pod = object["spec"].take();
        // and stays there
        assert_eq!(retarget(&pod, "/spec", set, inventory), Vec::<Value>::new());
        pod
    }

    #[test]
    fn variables_change_key_by_key() {
        let reference = |name: &str, key: &str| {
            let reference = json!({"secretKeyRef": {"name": name, "key": key}});
            json!({"name": key, "valueFrom": reference})
        };
        let pod = |first: &str, second: &str| {
            json!({
                "containers": [
                    {"name": "x", "env": [{"name": "PLAIN", "value": "db"}]},
                    {"name": "web", "env": [
                        reference(first, "a"),
                        reference(second, "b"),
                        reference("db", "a"),
                        reference(&object(1), "gone")
                    ]}
                ]
            })
        };
        let inventory = inventory(&[&["a", "b"], &["a"]]);
        assert_eq!(
            retargeted(&pod(&object(1), &object(1)), SET, &inventory),
            pod(&object(2), &object(1))
        );
        // only the list that changes is in the patch
        let patch = retarget(&pod(&object(1), &object(1)), "/spec", SET, &inventory);
        let paths: Vec<&str> = patch.iter().filter_map(|step| step["path"].as_str()).collect();
        assert_eq!(paths, ["/spec/containers/1/env"; 2]);
        // a ConfigMap of that name is another set
        let same = pod(&object(1), &object(1));
        assert_eq!(retargeted(&same, CONFIG, &inventory), same);
    }

    #[test]
    fn a_pod_with_all_keys_as_variables_gets_those_of_each_current_version() {
        let from = |names: &[String], prefix: &str| -> Vec<Value> {
            let item = |name: &String| json!({"prefix": prefix, "secretRef": {"name": name}});
            names.iter().map(item).collect()
        };
        let pod = |lists: [Vec<Value>; 2]| {
            let other = json!({"configMapRef": {"name": "other"}});
            let from = [&lists[0][..], &[other], &lists[1][..]].concat();
            json!({"initContainers": [{"envFrom": from}]})
        };
        let inventory = inventory(&[&["a", "b"], &["c"], &["a"]]);
        let all = [object(1), object(2), object(3)];
        let one = &all[..1];
        assert_eq!(
            retargeted(&pod([from(one, "A_"), from(&all[..2], "B_")]), SET, &inventory),
            pod([from(&all, "A_"), from(&all, "B_")])
        );
    }

    #[test]
    fn a_volume_shows_its_keys_wherever_they_are() {
        let item = |key: &str| json!({"key": key, "path": format!("{key}.txt")});
        let plain = |key: &str| json!({"key": key, "path": key});
        let (one, two) = (object(1), object(2));
        let split = inventory(&[&["a", "b"], &["a"]]);
        let whole = inventory(&[&["a", "b"], &["a", "b"]]);
        let projected = |sources: Value| json!({"name": "v", "projected": {"sources": sources}});
        for (inventory, before, after) in [
            (
                &whole,
                json!({"name": "v", "secret": {"secretName": one, "defaultMode": 256}}),
                json!({"name": "v", "secret": {"secretName": two, "defaultMode": 256}}),
            ),
            (
                &split,
                json!({"name": "v", "secret": {"secretName": one, "items": [item("a")]}}),
                json!({"name": "v", "secret": {"secretName": two, "items": [item("a")]}}),
            ),
            (
                &split,
                json!({"name": "v", "secret": {"secretName": one, "defaultMode": 256}}),
                json!({"name": "v", "projected": {"defaultMode": 256, "sources": [
                    {"secret": {"name": one, "items": [plain("b")]}},
                    {"secret": {"name": two, "items": [plain("a")]}}
                ]}}),
            ),
            (
                &split,
                projected(json!([
                    {"secret": {"name": one, "items": [item("a"), item("b"), item("gone")]}},
                    {"secret": {"name": "theirs"}},
                    {"configMap": {"name": one}}
                ])),
                projected(json!([
                    {"secret": {"name": two, "items": [item("a")]}},
                    {"secret": {"name": one, "items": [item("b"), item("gone")]}},
                    {"secret": {"name": "theirs"}},
                    {"configMap": {"name": one}}
                ])),
            ),
            (
                &whole,
                projected(json!([{"secret": {"name": one, "optional": true}}])),
                projected(json!([{"secret": {"name": two, "optional": true}}])),
            ),
            (
                &split,
                projected(json!([{"secret": {"name": one}}, {"secret": {"name": two}}])),
                projected(json!([
                    {"secret": {"name": one, "items": [plain("b")]}},
                    {"secret": {"name": two, "items": [plain("a")]}}
                ])),
            ),
            // nothing is left to show
            (
                &Inventory::default(),
                json!({"name": "v", "secret": {"secretName": one}}),
                json!({"name": "v", "secret": {"secretName": one}}),
            ),
        ] {
            let pod = |volume: &Value| json!({"volumes": [volume]});
            assert_eq!(retargeted(&pod(&before), SET, inventory), pod(&after));
        }
        let before = json!({"volumes": [{"name": "v", "configMap": {"name": one}}]});
        let after = json!({"volumes": [{"name": "v", "configMap": {"name": two}}]});
        assert_eq!(retargeted(&before, CONFIG, &whole), after);
    }

    #[test]
    fn a_login_to_a_registry_is_the_newest() {
        let pod = |name: &str| json!({"imagePullSecrets": [{"name": name}, {"name": "theirs"}]});
        let inventory = inventory(&[&[IMAGE_PULL_KEY], &[IMAGE_PULL_KEY]]);
        assert_eq!(retargeted(&pod(&object(1)), SET, &inventory), pod(&object(2)));
    }
}
