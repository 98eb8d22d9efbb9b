//! The settings that k3s will run with: ours and those of files beside ours, merged as k3s merges
//! them.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::base::yaml::{self, EqualKeys};
use crate::install::facts::{Facts, SettingsFile};
use crate::install::settings::Settings;

/// Keys whose values are looked at. Values of others are not even kept: there are secrets among
/// them.
const READ: &[&str] = &[
    "apiserver-port",
    "cluster-cidr",
    "cluster-dns",
    "cluster-init",
    "container-runtime-endpoint",
    "data-dir",
    "disable",
    "disable-agent",
    "disable-cloud-controller",
    "disable-kube-proxy",
    "docker",
    "embedded-registry",
    "flannel-backend",
    "flannel-iface",
    "https-listen-port",
    "kube-controller-manager-arg",
    "kube-proxy-arg",
    "kube-scheduler-arg",
    "kubelet-arg",
    "lb-server-port",
    "node-ip",
    "node-name",
    "resolv-conf",
    "secrets-encryption",
    "service-cidr",
    "snapshotter",
    "supervisor-port",
    "write-kubeconfig-mode",
];

/// A file of k3s' settings: its keys in order, with the values of those that something here looks
/// at.
///
/// # Errors
/// Says in a few words why k3s would stop over it.
pub fn read_file(text: &str) -> Result<Vec<(String, Value)>, String> {
    // yaml.v2, which k3s uses here, lets the last of equal keys win
    let document =
        yaml::parse(text, EqualKeys::LastWins).map_err(|_| "it is not valid YAML".to_owned())?;
    match document {
        Value::Null => Ok(Vec::new()),
        Value::Object(map) => Ok(map
            .into_iter()
            .map(|(key, value)| {
                let read = READ.contains(&key.trim_end_matches('+'));
                (key, if read { value } else { Value::Null })
            })
            .collect()),
        _ => Err("it is not a list of `key: value`".into()),
    }
}

/// Flags of k3s that have a variable in the environment, by that variable (k3s-io/k3s,
/// pkg/cli/cmds; others name secrets or nothing here).
pub fn flag_of_variable(name: &str) -> Option<&'static str> {
    Some(match name {
        "K3S_DATA_DIR" => "data-dir",
        "K3S_NODE_NAME" => "node-name",
        "K3S_RESOLV_CONF" => "resolv-conf",
        "K3S_LB_SERVER_PORT" => "lb-server-port",
        "K3S_SUPERVISOR_PORT" => "supervisor-port",
        "K3S_APISERVER_PORT" => "apiserver-port",
        "K3S_CLUSTER_INIT" => "cluster-init",
        "K3S_KUBECONFIG_MODE" => "write-kubeconfig-mode",
        "K3S_KUBECONFIG_OUTPUT" => "write-kubeconfig",
        "K3S_KUBECONFIG_GROUP" => "write-kubeconfig-group",
        "K3S_SELINUX" => "selinux",
        "K3S_DATASTORE_ENDPOINT" => "datastore-endpoint",
        "K3S_SYSTEM_DEFAULT_REGISTRY" => "system-default-registry",
        "K3S_CONFIG_FILE" => "config",
        _ => return None,
    })
}

/// The settings that k3s will run with, whichever file they come from.
#[derive(Clone, Debug, Default)]
pub struct EffectiveSettings {
    values: BTreeMap<String, Value>,
}

impl EffectiveSettings {
    /// Of a machine as it is: our file, and those that k3s reads before and after it.
    pub fn on_machine(beside: &[SettingsFile], ours: &SettingsFile) -> EffectiveSettings {
        EffectiveSettings::merged(beside, |effective| effective.read(ours))
    }

    /// Files before ours, ours, files after it.
    fn merged(
        beside: &[SettingsFile],
        ours: impl FnOnce(&mut EffectiveSettings),
    ) -> EffectiveSettings {
        let mut effective = EffectiveSettings::default();
        beside.iter().filter(|f| !f.after_ours).for_each(|f| effective.read(f));
        ours(&mut effective);
        beside.iter().filter(|f| f.after_ours).for_each(|f| effective.read(f));
        effective
    }

    /// Merges in the order of k3s: the unit's environment, `config.yaml`, then `config.yaml.d` by
    /// name with our file in its place (k3s-io/k3s, pkg/configfilearg/parser.go, readConfigFile).
    pub fn planned(facts: &Facts, settings: &Settings) -> EffectiveSettings {
        let options = &settings.options;
        EffectiveSettings::merged(&facts.k3s.files, |effective| {
            for (key, value) in options.k3s.iter() {
                effective.set(key, value);
            }
            if !options.node_ip.is_empty() {
                effective.set("node-ip", &json!(options.node_ip.join(",")));
            }
            if let Some(interface) = &options.flannel_iface {
                effective.set("flannel-iface", &json!(interface));
            }
        })
    }

    fn read(&mut self, file: &SettingsFile) {
        for (key, value) in &file.entries {
            self.set(key, value);
        }
    }

    /// `key+` appends to what there is, `key` replaces it.
    fn set(&mut self, key: &str, value: &Value) {
        let name = key.trim_end_matches('+');
        // a value that is not read may be a secret: it is enough to know that it is set
        let value = if READ.contains(&name) { value } else { &Value::Null };
        let appended = key.ends_with('+').then(|| self.values.get(name)).flatten().map(|old| {
            let items = |v: &Value| match v {
                Value::Array(list) => list.clone(),
                one => vec![one.clone()],
            };
            Value::Array(items(old).into_iter().chain(items(value)).collect())
        });
        self.values.insert(name.to_owned(), appended.unwrap_or_else(|| value.clone()));
    }

    /// The value of a setting that is one; of several the last counts.
    pub fn text(&self, key: &str) -> Option<String> {
        let text = |v: &Value| match v {
            Value::String(text) => Some(text.trim().to_owned()),
            Value::Number(_) | Value::Bool(_) => Some(v.to_string()),
            _ => None,
        };
        match self.values.get(key)? {
            Value::Array(list) => text(list.last()?),
            one => text(one),
        }
        .filter(|t| !t.is_empty())
    }

    /// The items of a setting that is a list, also those written with commas between them.
    pub fn list(&self, key: &str) -> Vec<String> {
        let items = match self.values.get(key) {
            Some(Value::Array(list)) => list.clone(),
            Some(one) => vec![one.clone()],
            None => Vec::new(),
        };
        let texts = items.iter().map(|v| v.as_str().map_or_else(|| v.to_string(), str::to_owned));
        texts
            .flat_map(|t| t.split(',').map(|s| s.trim().to_owned()).collect::<Vec<_>>())
            .filter(|t| !t.is_empty() && t != "null")
            .collect()
    }

    /// Whether it is set, to any value.
    pub fn has(&self, key: &str) -> bool {
        self.values.contains_key(key)
    }

    pub fn flag(&self, key: &str) -> bool {
        // yaml.v2 knows the words of YAML 1.1 too
        self.text(key).is_some_and(|t| {
            matches!(t.to_ascii_lowercase().as_str(), "true" | "yes" | "on" | "y" | "1" | "t")
        })
    }

    pub fn port(&self, key: &str) -> Option<u16> {
        self.text(key)?.parse().ok().filter(|p| *p > 0)
    }

    /// A flag handed on to a part of k3s: `argument("kubelet-arg", "root-dir")`. The last one
    /// counts.
    pub fn argument(&self, key: &str, name: &str) -> Option<String> {
        let items = match self.values.get(key)? {
            Value::Array(list) => list.clone(),
            one => vec![one.clone()],
        };
        let mut found = items.iter().filter_map(Value::as_str).filter_map(|item| {
            let (flag, value) = item.trim().trim_start_matches('-').split_once('=')?;
            (flag == name).then(|| value.trim().to_owned())
        });
        found.next_back()
    }

    /// `vxlan`, `host-gw`, `wireguard-native`, `none`, …; `None` when it is not set.
    pub fn flannel_backend(&self) -> Option<String> {
        self.text("flannel-backend")
    }

    /// The port of supervisor and API.
    pub fn api_port(&self) -> u16 {
        self.port("https-listen-port").unwrap_or(6443)
    }

    /// The kubelet's directory.
    pub fn kubelet_dir(&self) -> String {
        self.argument("kubelet-arg", "root-dir")
            .filter(|d| d.starts_with('/'))
            .unwrap_or_else(|| "/var/lib/kubelet".into())
    }

    /// The file of name servers that the kubelet is set to use, where one is set.
    pub fn resolv_conf(&self) -> Option<String> {
        self.argument("kubelet-arg", "resolv-conf").or_else(|| self.text("resolv-conf"))
    }

    /// What keeps the layers of images; the default needs overlayfs in the kernel and below the
    /// data directory.
    pub fn snapshotter(&self) -> String {
        self.text("snapshotter").unwrap_or_else(|| "overlayfs".into())
    }

    /// Whether k3s runs its own containerd.
    pub fn bundled_containerd(&self) -> bool {
        !self.flag("docker") && self.text("container-runtime-endpoint").is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::install::settings::Options;
    use crate::k3s::role::NodeRole;

    fn effective(files: &[(&str, bool)], ours: &[(&str, Value)]) -> EffectiveSettings {
        let mut facts = Facts::default();
        for (text, after) in files {
            facts.k3s.files.push(SettingsFile {
                after_ours: *after,
                entries: read_file(text).unwrap(),
                ..SettingsFile::default()
            });
        }
        let k3s = ours.iter().map(|(k, v)| ((*k).to_owned(), v.clone())).collect();
        let options = Options { k3s, ..Options::default() };
        EffectiveSettings::planned(
            &facts,
            &Settings::resolve(options, NodeRole::Server, &[], &[]).unwrap(),
        )
    }

    #[test]
    fn the_last_file_has_the_word_and_a_plus_appends() {
        let c = effective(
            &[("cluster-cidr: 10.50.0.0/16\n", false), ("cluster-cidr: 10.52.0.0/16\n", true)],
            &[("cluster-cidr", json!("10.51.0.0/16"))],
        );
        assert_eq!(c.list("cluster-cidr"), ["10.52.0.0/16"]);
        let c = effective(&[("disable: [traefik]\n", false), ("disable+: servicelb\n", true)], &[]);
        assert_eq!(c.list("disable"), ["traefik", "servicelb"]);
        let c = effective(
            &[
                ("kubelet-arg:\n  - root-dir=/a\n", false),
                ("kubelet-arg+:\n- --root-dir=/b\n", true),
            ],
            &[],
        );
        assert_eq!(c.kubelet_dir(), "/b");
        // nothing to append to: it is the value
        assert_eq!(effective(&[("https-listen-port+: 7443", true)], &[]).api_port(), 7443);
    }

    #[test]
    fn text_is_read_as_k3s_reads_it() {
        assert_eq!(read_file("# only a comment\n").unwrap(), []);
        assert!(
            read_file("just text").is_err()
                && read_file("- a\n- b\n").is_err()
                && read_file("a: [").is_err()
        );
        assert!(effective(&[("embedded-registry: yes\n", true)], &[]).flag("embedded-registry"));
        assert!(effective(&[("docker: false\ndocker: true\n", true)], &[]).flag("docker"));
        assert_eq!(
            effective(&[("cluster-cidr: \"10.52.0.0/16, fd42::/56\"\n", true)], &[])
                .list("cluster-cidr")
                .len(),
            2
        );
    }

    #[test]
    fn values_that_nobody_looks_at_are_not_kept() {
        let entries = read_file(
            "datastore-endpoint: postgres://u:canary-4711-not-to-be-kept@h/d\ntoken: canary\n",
        )
        .unwrap();
        assert!(entries.iter().all(|(_, v)| v.is_null()), "{entries:?}");
    }
}
