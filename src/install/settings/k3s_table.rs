//! The `[k3s]` table: settings that pass through to k3s, some of which are secrets that nothing may
//! show.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Deref;

use serde::{Deserialize, Serialize, Serializer};
use serde_json::{Value, json};

use crate::base::json;
use crate::base::order;
use crate::base::secret::{MASK, Secret, is_secret_name, mask, secrets_in_urls};
use crate::k3s::keys;

/// Settings by their k3s name. Reads like a map; `Debug` and `Serialize` show dots where a value is
/// secret.
#[derive(Clone, Default, PartialEq, Deserialize)]
#[serde(transparent)]
pub struct K3sTable(BTreeMap<String, Value>);

impl Deref for K3sTable {
    type Target = BTreeMap<String, Value>;
    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

impl<const N: usize> From<[(String, Value); N]> for K3sTable {
    fn from(pairs: [(String, Value); N]) -> K3sTable {
        K3sTable(pairs.into())
    }
}

impl FromIterator<(String, Value)> for K3sTable {
    fn from_iter<I: IntoIterator<Item = (String, Value)>>(pairs: I) -> K3sTable {
        K3sTable(order::map(pairs))
    }
}

impl fmt::Debug for K3sTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.redacted().fmt(f)
    }
}

impl Serialize for K3sTable {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.redacted().serialize(serializer)
    }
}

/// The name of what fills a hole, as it stands in a plan.
fn placeholder(name: &str) -> String {
    format!("${{secret:{name}}}")
}

/// `text` with its holes filled; `secret_values` is what [`K3sTable::fill`] gave. `None` when one
/// of them has nothing.
pub fn fill_placeholders(text: &str, fill: &Secret) -> Option<String> {
    let values: BTreeMap<String, Value> = json::read(fill.expose()).ok()?;
    let mut out = text.to_owned();
    for (name, value) in &values {
        out = out.replace(&json!(placeholder(name)).to_string(), &value.to_string());
    }
    (!out.contains("\"${secret:")).then_some(out)
}

impl K3sTable {
    /// These values; where a key is missing, those of `lower`.
    #[must_use]
    pub fn layered_over(self, lower: K3sTable) -> K3sTable {
        let mut map = lower.0;
        map.extend(self.0);
        K3sTable(map)
    }

    /// For the file that k3s reads: each secret value is a hole that [`fill_placeholders`] fills.
    pub fn with_placeholders(&self) -> BTreeMap<String, Value> {
        self.each(|name, value| {
            json!(if secrets(name, value).is_empty() {
                value.clone()
            } else {
                placeholder(value_name(name))
            })
        })
    }

    /// For display: secret parts are dots.
    pub fn redacted(&self) -> BTreeMap<String, Value> {
        self.each(|name, value| json!(hidden(name, value)))
    }

    /// What fills the holes, by name; `None` when there are none.
    pub fn secret_values(&self) -> Option<Secret> {
        let mut values = BTreeMap::new();
        self.each(|name, value| {
            if !secrets(name, value).is_empty() {
                values.insert(value_name(name).to_owned(), value.clone());
            }
            Value::Null
        });
        (!values.is_empty()).then(|| Secret::new(json!(values).to_string()))
    }

    /// Every secret word in it.
    pub fn secret_words(&self) -> Vec<String> {
        let mut words = Vec::new();
        self.each(|name, value| {
            words.extend(secrets(name, value));
            Value::Null
        });
        words
    }

    /// Keys that hold a secret, with what may be shown of it.
    pub fn secret_keys(&self) -> Vec<(String, Value)> {
        let mut shown = self.redacted();
        shown.retain(|key, value| self.0.get(key) != Some(value));
        shown.into_iter().collect()
    }

    /// Those of them that are known to hold one. An unknown key is hidden out of caution: it may be
    /// a misspelt setting that is no secret.
    pub fn known_secret_keys(&self) -> Vec<(String, Value)> {
        let mut known = self.secret_keys();
        known.retain(|(key, _)| {
            let name = keys::canonical_key(key);
            keys::value_type(&name).is_some()
                || is_secret_name(&name)
                || self
                    .0
                    .get(key)
                    .is_some_and(|value| !secrets_in_urls(&value.to_string()).is_empty())
        });
        known
    }

    /// The table with each string replaced: `change` gets its name, `KEY` or `KEY.NUMBER` in a
    /// list, and the string.
    fn each(&self, mut change: impl FnMut(Name<'_>, &String) -> Value) -> BTreeMap<String, Value> {
        let one = |key: &str, value: &Value, change: &mut dyn FnMut(Name<'_>, &String) -> Value| {
            match value {
                Value::String(text) => change(Name { key, full: key }, text),
                Value::Array(items) => items
                    .iter()
                    .enumerate()
                    .map(|(number, item)| match item {
                        Value::String(text) => {
                            change(Name { key, full: &format!("{key}.{number}") }, text)
                        }
                        // no k3s setting is deeper than a list of strings
                        Value::Array(_) | Value::Object(_) => json!(MASK),
                        plain => plain.clone(),
                    })
                    .collect(),
                Value::Object(_) => json!(MASK),
                // `token = 1234567890` is a secret too
                plain if whole(key) && plain.is_number() => {
                    change(Name { key, full: key }, &plain.to_string())
                }
                plain => plain.clone(),
            }
        };
        order::map(self.0.iter().map(|(key, value)| (key.clone(), one(key, value, &mut change))))
    }
}

#[derive(Clone, Copy)]
struct Name<'a> {
    key: &'a str,
    full: &'a str,
}

fn value_name(name: Name<'_>) -> &str {
    name.full
}

/// Whether the whole value of this setting is secret. A key that is not known may be one.
fn whole(key: &str) -> bool {
    let key = keys::canonical_key(key);
    key == "vpn-auth" || is_secret_name(&key) || keys::value_type(&key).is_none()
}

/// The secret words in a value: all of it, the passwords of its URLs, the value of
/// `oidc-client-secret=…`.
fn secrets(name: Name<'_>, value: &str) -> Vec<String> {
    if value.is_empty() || value == MASK {
        return Vec::new();
    }
    let key = keys::canonical_key(name.key);
    if key == "vpn-auth" {
        // name=tailscale,joinKey=…,controlServerURL=…
        let parts = value
            .split(',')
            .filter_map(|p| p.split_once('='))
            .filter(|(n, _)| is_secret_name(n))
            .map(|(_, v)| v.to_owned());
        return parts.chain([value.to_owned()]).collect();
    }
    if whole(&key) {
        return vec![value.to_owned()];
    }
    // an address of a database without a scheme: the driver takes `user:password@tcp(host)/db`
    if key == "datastore-endpoint" && !value.contains("://") && value.contains('@') {
        return vec![value.to_owned()];
    }
    let mut found = secrets_in_urls(value);
    if let Some((flag, text)) = value.split_once('=')
        && is_secret_name(flag.trim_start_matches('-'))
        && !text.is_empty()
        && text != MASK
        && !matches!(text, "true" | "false")
    {
        found.push(text.to_owned());
    }
    found
}

/// A value as people may see it.
fn hidden(name: Name<'_>, value: &str) -> String {
    let found = secrets(name, value);
    if found.iter().any(|s| s == value) {
        return MASK.to_owned();
    }
    let mut text = mask(value, &[]);
    for secret in found {
        text = text.replace(&secret, MASK);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> K3sTable {
        K3sTable::from([
            (
                "datastore-endpoint".to_owned(),
                json!("postgres://u:planted-db-password-canary-4711-in-plain-text@h/db"),
            ),
            (
                "vpn-auth".to_owned(),
                json!("name=tailscale,joinKey=planted-join-key-canary-4711-in-plain-text"),
            ),
            (
                "etcd-s3-secret-key".to_owned(),
                json!("planted-s3-secret-key-canary-4711-in-plain-text"),
            ),
            (
                "etcd_s3_access_key".to_owned(),
                json!("planted-s3-access-key-canary-4711-in-plain-text"),
            ),
            (
                "kube-apiserver-arg".to_owned(),
                json!([
                    "v=2",
                    "oidc-client-secret=planted-oidc-secret-canary-4711-in-plain-text",
                    "etcd-servers=https://u:planted-etcd-password-canary-4711-in-plain-text@e:2379"
                ]),
            ),
            ("tokn".to_owned(), json!({"a": "planted-nested-secret-canary-4711-in-plain-text"})),
            ("flannel-backend".to_owned(), json!("vxlan")),
            ("secrets-encryption".to_owned(), json!(true)),
            ("agent-token".to_owned(), json!(12_345_678_901_234_567_890_u64)),
        ])
    }

    #[test]
    fn nothing_that_shows_the_table_shows_a_secret() {
        let table = table();
        for text in [
            format!("{table:?}"),
            serde_json::to_string(&table).unwrap(),
            json!(table.with_placeholders()).to_string(),
        ] {
            assert!(
                !text.contains("canary-4711-in-plain-text")
                    && !text.contains("12345678901234567890"),
                "{text}"
            );
            assert!(text.contains("vxlan") && text.contains("v=2"), "{text}");
        }
        assert_eq!(table.redacted()["datastore-endpoint"], "postgres://u:••••@h/db");
        assert_eq!(table.redacted()["kube-apiserver-arg"][1], "oidc-client-secret=••••");
        assert_eq!(table.secret_keys().len(), 7);
        assert_eq!(
            table.secret_words().iter().filter(|w| w.contains("canary-4711-in-plain-text")).count(),
            7
        );
    }

    #[test]
    fn an_unknown_key_is_hidden_and_not_called_a_secret() {
        let table = K3sTable::from([
            ("kubelet-argg".to_owned(), json!(["max-pods=200"])),
            ("db".to_owned(), json!("postgres://u:planted-canary-4711-in-plain-text@h/db")),
            ("agent-tokn-password".to_owned(), json!("planted-canary-4711-in-plain-text")),
            ("etcd-s3-secret-key".to_owned(), json!("planted-canary-4711-in-plain-text")),
        ]);
        assert_eq!(table.secret_keys().len(), 4);
        let known: Vec<String> =
            table.known_secret_keys().into_iter().map(|(key, _)| key).collect();
        assert_eq!(known, ["agent-tokn-password", "db", "etcd-s3-secret-key"]);
    }

    #[test]
    fn holes_are_filled_with_what_was_there() {
        let table = K3sTable::from([
            (
                "kubelet-arg".to_owned(),
                json!(["v=2", "x-password=planted \"quoted\" secret canary-4711-in-plain-text"]),
            ),
            (
                "datastore-endpoint".to_owned(),
                json!("postgres://u:planted-db-password-canary-4711-in-plain-text@h/db"),
            ),
        ]);
        let with_placeholders = table.with_placeholders();
        let text = format!(
            "kubelet-arg:\n  - {}\n  - {}\nd: {}\n",
            with_placeholders["kubelet-arg"][0],
            with_placeholders["kubelet-arg"][1],
            with_placeholders["datastore-endpoint"]
        );
        let full = fill_placeholders(&text, &table.secret_values().unwrap()).unwrap();
        assert_eq!(
            full,
            "kubelet-arg:\n  - \"v=2\"\n  - \"x-password=planted \\\"quoted\\\" secret canary-4711-in-plain-text\"\nd: \"postgres://u:planted-db-password-canary-4711-in-plain-text@h/db\"\n"
        );
        assert!(fill_placeholders(&text, &Secret::new("{}")).is_none());
        assert!(
            K3sTable::from([("flannel-backend".to_owned(), json!("vxlan"))])
                .secret_values()
                .is_none()
        );
    }
}
