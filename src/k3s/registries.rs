//! registries.yaml as k3s reads it: an unknown key in it has no effect, and nothing says so, so it
//! is named here.
//!
//! Schema of rancher/wharfie, `pkg/registries/types.go`; how it is used: k3s-io/k3s,
//! `pkg/agent/containerd/config.go`.

use serde_json::{Map, Value};

use crate::base::error::nearest;
use crate::base::yaml::{self, EqualKeys};

/// Reads it, or says all that is wrong with it, one line each. Secrets in it are never quoted.
/// `exists` is asked for files of the node.
///
/// # Errors
/// What is wrong, and in which line.
pub fn validate(text: &str, exists: &dyn Fn(&str) -> bool) -> Result<Value, Vec<String>> {
    let text = text.trim_start_matches('\u{feff}');
    if text.lines().all(|l| l.trim().is_empty() || l.trim().starts_with('#') || l.trim() == "---") {
        return Err(vec!["it is empty; it has `mirrors:` or `configs:`".into()]);
    }
    let parsed = yaml::parse(text, EqualKeys::Refused).map_err(|error| vec![error.to_string()])?;
    let mut judge = Validator { text, exists, faults: Vec::new() };
    judge.whole(&parsed);
    if judge.faults.is_empty() { Ok(parsed) } else { Err(judge.faults) }
}

struct Validator<'a> {
    text: &'a str,
    exists: &'a dyn Fn(&str) -> bool,
    faults: Vec<String>,
}

impl Validator<'_> {
    fn fault(&mut self, path: &[&str], why: &str) {
        let line = self.line(path).map(|n| format!(" (line {n})")).unwrap_or_default();
        let name = path.join(".");
        self.faults.push(format!("{name}{line}: {why}"));
    }

    /// The line of a key: each part of the path is looked for below the one before.
    fn line(&self, path: &[&str]) -> Option<usize> {
        let mut at = 0;
        let lines: Vec<&str> = self.text.lines().collect();
        for part in path {
            let is = |line: &&str| {
                let line = line.trim().trim_start_matches("- ");
                [format!("{part}:"), format!("\"{part}\":"), format!("'{part}':")].iter().any(
                    |key| {
                        line.starts_with(key)
                            || line.contains(&format!("{{{key}"))
                            || line.contains(&format!(" {key}"))
                    },
                )
            };
            at += lines.get(at..)?.iter().position(is)?;
        }
        Some(at + 1)
    }

    /// The map at `path`, whose keys are among `known`; nothing at all is an empty one.
    fn map<'v>(
        &mut self,
        path: &[&str],
        value: &'v Value,
        known: &[&str],
    ) -> Option<&'v Map<String, Value>> {
        let map = match value {
            Value::Object(map) => map,
            Value::Null => return None,
            other => {
                self.fault(path, &format!("it is {}, where keys with values belong", kind(other)));
                return None;
            }
        };
        for key in map.keys().filter(|k| !known.is_empty() && !known.contains(&k.as_str())) {
            let near = nearest(key, known.iter().copied()).map_or_else(
                || format!("known here: {}", known.join(", ")),
                |n| format!("did you mean `{n}`?"),
            );
            self.fault(&[path, &[key.as_str()]].concat(), &format!("there is no such key; {near}"));
        }
        Some(map)
    }

    fn whole(&mut self, value: &Value) {
        let Value::Object(map) = value else {
            self.faults
                .push(format!("it is {}, where `mirrors:` and `configs:` belong", kind(value)));
            return;
        };
        const KNOWN: [&str; 3] = ["mirrors", "configs", "auths"];
        for key in map.keys().filter(|k| !KNOWN.contains(&k.as_str()) && !k.starts_with("x-")) {
            let near = nearest(key, KNOWN).map_or_else(
                || "known here: mirrors, configs".to_owned(),
                |n| format!("did you mean `{n}`?"),
            );
            self.fault(&[key], &format!("there is no such key; {near}"));
        }
        let part = |name: &str| map.get(name).unwrap_or(&Value::Null);
        for (host, mirror) in self.map(&["mirrors"], part("mirrors"), &[]).into_iter().flatten() {
            self.host(&["mirrors", host], host);
            self.mirror(&["mirrors", host], mirror);
        }
        for (host, config) in self.map(&["configs"], part("configs"), &[]).into_iter().flatten() {
            let path = ["configs", host.as_str()];
            self.host(&path, host);
            let Some(config) = self.map(&path, config, &["auth", "tls"]) else { continue };
            self.auth(&[&path[..], &["auth"]].concat(), config.get("auth").unwrap_or(&Value::Null));
            self.tls(&[&path[..], &["tls"]].concat(), config.get("tls").unwrap_or(&Value::Null));
        }
        for (host, auth) in self.map(&["auths"], part("auths"), &[]).into_iter().flatten() {
            self.auth(&["auths", host], auth);
        }
    }

    fn host(&mut self, path: &[&str], host: &str) {
        if host.contains("://") {
            self.fault(path, "it is the registry's name as images have it, without https://");
        } else if host.is_empty() || host.contains(['/', ' ']) {
            self.fault(
                path,
                "it is the registry's name alone, as docker.io or registry.example.com:5000",
            );
        }
    }

    fn mirror(&mut self, path: &[&str], value: &Value) {
        let Some(mirror) = self.map(path, value, &["endpoint", "rewrite"]) else { return };
        let at = [path, &["endpoint"]].concat();
        match mirror.get("endpoint").unwrap_or(&Value::Null) {
            Value::Null => {}
            Value::Array(list) => {
                for endpoint in list {
                    match endpoint.as_str().map(endpoint_fault) {
                        None => self.fault(
                            &at,
                            &format!("an endpoint is {}, where a URL belongs", kind(endpoint)),
                        ),
                        Some(Some(why)) => self.fault(&at, &why),
                        Some(None) => {}
                    }
                }
            }
            other => self.fault(
                &at,
                &format!("it is {}, where a list belongs: endpoint: [\"https://…\"]", kind(other)),
            ),
        }
        let at = [path, &["rewrite"]].concat();
        for (pattern, target) in
            self.map(&at, mirror.get("rewrite").unwrap_or(&Value::Null), &[]).into_iter().flatten()
        {
            if let Err(error) = regex_syntax::ast::parse::Parser::new().parse(pattern) {
                self.fault(
                    &at,
                    &format!("`{pattern}` is not a regular expression: {}", error.kind()),
                );
            }
            if !target.is_string() {
                self.fault(
                    &at,
                    &format!("what `{pattern}` becomes is {}, where text belongs", kind(target)),
                );
            }
        }
    }

    fn auth(&mut self, path: &[&str], value: &Value) {
        let keys = ["username", "password", "auth", "identity_token"];
        for (key, value) in self.map(path, value, &keys).into_iter().flatten() {
            if value.is_array() || value.is_object() {
                self.fault(
                    &[path, &[key.as_str()]].concat(),
                    &format!("it is {}, where text belongs", kind(value)),
                );
            }
        }
    }

    fn tls(&mut self, path: &[&str], value: &Value) {
        let Some(tls) =
            self.map(path, value, &["ca_file", "cert_file", "key_file", "insecure_skip_verify"])
        else {
            return;
        };
        for key in ["ca_file", "cert_file", "key_file"] {
            let at = [path, &[key]].concat();
            match tls.get(key).unwrap_or(&Value::Null) {
                Value::String(file) if file.is_empty() => {}
                Value::String(file) if !file.starts_with('/') => {
                    self.fault(&at, &format!("`{file}` must be a path from the root on"))
                }
                Value::String(file) if !(self.exists)(file) => {
                    self.fault(&at, &format!("{file} is not there: no image could be pulled"))
                }
                Value::String(_) | Value::Null => {}
                other => self.fault(&at, &format!("it is {}, where a path belongs", kind(other))),
            }
        }
        let given = |key: &str| tls.get(key).and_then(Value::as_str).is_some_and(|f| !f.is_empty());
        if given("cert_file") != given("key_file") {
            self.fault(path, "cert_file and key_file come together");
        }
        if let Some(flag) = tls.get("insecure_skip_verify") {
            let words = ["y", "yes", "n", "no", "on", "off", "true", "false"];
            if !flag.is_boolean()
                && !flag.is_null()
                && !flag.as_str().is_some_and(|t| words.contains(&t.to_ascii_lowercase().as_str()))
            {
                self.fault(&[path, &["insecure_skip_verify"]].concat(), "it is true or false");
            }
        }
    }
}

/// What a value is, without the value.
fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "nothing",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "text",
        Value::Array(_) => "a list",
        Value::Object(_) => "a set of keys",
    }
}

/// `https://host:port/path`, or the host alone.
fn endpoint_fault(text: &str) -> Option<String> {
    let shown = crate::base::secret::mask(text, &[]);
    let not = |why: &str| Some(format!("`{shown}` is not an endpoint: {why}"));
    let (scheme, rest) = text.split_once("://").unwrap_or(("https", text));
    if !matches!(scheme, "http" | "https") {
        return not("it is http:// or https://");
    }
    if text.contains(char::is_whitespace) || rest.is_empty() {
        return not("it is a URL such as https://mirror.example.com:5000");
    }
    match url::Url::parse(&format!("{scheme}://{rest}")) {
        Ok(url) if url.host_str().is_some_and(|h| !h.is_empty()) => None,
        Ok(_) => not("it has no host"),
        Err(e) => not(&e.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn faults(text: &str) -> Vec<String> {
        validate(text, &|path| path == "/etc/ssl/mirror.pem").err().unwrap_or_default()
    }

    #[test]
    fn what_k3s_reads_passes() {
        for good in [
            "mirrors: {}\n",
            "mirrors:\n  docker.io:\n    endpoint: [\"https://mirror:5000\"]\n    rewrite: {\"^rancher/(.*)\": \"mirror/$1\"}\n  \"*\":\n",
            "configs:\n  mirror:5000:\n    auth: {username: u, password: 12345}\n    tls: {ca_file: /etc/ssl/mirror.pem, insecure_skip_verify: yes}\n",
            "mirrors: {docker.io: {endpoint: [mirror.example.com, \"http://10.0.0.1:5000/v2/x\"]}}\nconfigs:\n",
            "x-login: &login {username: u, password: p}\nconfigs: {a: {auth: *login}}\n",
        ] {
            assert_eq!(faults(good), Vec::<String>::new(), "{good}");
        }
    }

    #[test]
    fn what_k3s_would_skip_or_end_with_is_named_with_its_line() {
        for (bad, why) in [
            ("", "it is empty"),
            ("# nothing\n---\n", "it is empty"),
            ("just text\n", "it is text"),
            ("- docker.io\n", "it is a list"),
            ("mirrors: [\n", "not valid YAML, line"),
            (
                "mirrros:\n  docker.io: {}\n",
                "mirrros (line 1): there is no such key; did you mean `mirrors`?",
            ),
            (
                "mirrors:\n  docker.io:\n    endpoints: [\"https://m\"]\n",
                "mirrors.docker.io.endpoints (line 3): there is no such key; did you mean `endpoint`?",
            ),
            (
                "mirrors:\n  docker.io:\n    endpoint: https://m\n",
                "mirrors.docker.io.endpoint (line 3): it is text, where a list belongs",
            ),
            (
                "mirrors:\n  docker.io:\n    rewrite:\n      \"rancher/(.*\": x\n",
                "mirrors.docker.io.rewrite (line 3): `rancher/(.*` is not a regular expression: unclosed group",
            ),
            (
                "mirrors:\n  docker.io:\n    rewrite: {\"a(?=b)\": x}\n",
                "is not a regular expression",
            ),
            ("mirrors: {docker.io: {endpoint: [\"ftp://m\"]}}\n", "it is http:// or https://"),
            ("mirrors: {docker.io: {endpoint: [\"https://\"]}}\n", "it is a URL"),
            ("mirrors: {docker.io: {endpoint: [3]}}\n", "an endpoint is a number"),
            ("mirrors: [docker.io]\n", "mirrors (line 1): it is a list"),
            ("mirrors: {\"https://docker.io\": {}}\n", "without https://"),
            ("configs: {a: {tls: {ca_file: /nowhere.pem}}}\n", "/nowhere.pem is not there"),
            ("configs: {a: {tls: {ca_file: ca.pem}}}\n", "from the root on"),
            ("configs: {a: {tls: {cert_file: /etc/ssl/mirror.pem}}}\n", "come together"),
            ("configs: {a: {tls: {insecure: true}}}\n", "did you mean `insecure_skip_verify`?"),
            ("configs: {a: {tls: {insecure_skip_verify: maybe}}}\n", "true or false"),
            ("configs: {a: {auth: {pasword: hunter2}}}\n", "did you mean `password`?"),
            ("configs: {a: {auth: hunter2}}\n", "it is text, where keys"),
            ("configs: {a: {authentication: {}}}\n", "known here: auth, tls"),
        ] {
            let found = faults(bad);
            assert!(found.len() == 1 && found[0].contains(why), "{bad}: {found:?}");
            assert!(!found[0].contains("hunter2"), "{found:?}");
        }
    }
}
