//! The options of the installers as a flag, the environment or a config file gives them.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::k3s_table::K3sTable;
use crate::base::config_file::{long_flags, parse_checked};
use crate::base::error::Failure;
use crate::base::order;
use crate::base::secret::mask;

/// Every setting that may come from a flag, the environment or a config file; all optional, so that
/// layers can be merged.
///
/// A flag is a config key by construction: same struct, same name in kebab case.
#[derive(Clone, Debug, Default, clap::Args, Serialize, Deserialize, PartialEq)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct Options {
    /// Turn findings with these codes into warnings
    #[arg(long, value_name = "CODE", value_delimiter = ',', help_heading = "Checks")]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ignore: Vec<String>,
    /// k3s version to install, for example v1.36.2+k3s1
    #[arg(long, value_name = "VERSION", help_heading = "k3s")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub k3s_version: Option<String>,
    /// sha256 of the k3s program, for versions and mirrors that this release does not know
    #[arg(long, value_name = "HEX", help_heading = "k3s")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub k3s_sha256: Option<String>,
    /// Release channel to resolve instead of a version: stable, latest, vX.Y
    #[arg(long, value_name = "NAME", help_heading = "k3s")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub channel: Option<String>,
    /// Directory with the release files; nothing is downloaded
    #[arg(long, value_name = "DIR", help_heading = "k3s")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub offline_dir: Option<String>,
    /// Mirror with the layout of the k3s releases (URL/VERSION/FILE)
    #[arg(long, value_name = "URL", help_heading = "k3s")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub artifact_url: Option<String>,
    /// registries.yaml to install
    #[arg(long, value_name = "FILE", help_heading = "k3s")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub registries: Option<String>,
    /// Name of this node in the cluster
    #[arg(long, value_name = "NAME", help_heading = "Node")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node_name: Option<String>,
    /// Address of this node
    #[arg(long, value_name = "IP", value_delimiter = ',', help_heading = "Node")]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub node_ip: Vec<String>,
    /// Network interface of the pod network
    #[arg(long, value_name = "NAME", help_heading = "Node")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub flannel_iface: Option<String>,
    /// Label of this node, KEY=VALUE
    #[arg(long, value_name = "LABEL", value_delimiter = ',', help_heading = "Node")]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub node_label: Vec<String>,
    /// Taint of this node, KEY=VALUE:EFFECT
    #[arg(long, value_name = "TAINT", value_delimiter = ',', help_heading = "Node")]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub node_taint: Vec<String>,
    /// Further name or address that the API server's certificate is valid for
    #[arg(long, value_name = "NAME", value_delimiter = ',', help_heading = "Server")]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tls_san: Vec<String>,
    /// Controllers to install: ingress or traefik, cert-manager, metrics, storage; or none
    #[arg(long, value_name = "LIST", value_delimiter = ',', help_heading = "Server")]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub components: Vec<String>,
    /// Mail address for Let's Encrypt; creates its issuers
    #[arg(long, value_name = "ADDRESS", help_heading = "Server")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub acme_email: Option<String>,
    /// Networks that may reach the node's ports besides 80 and 443
    #[arg(long, value_name = "CIDR", value_delimiter = ',', help_heading = "Server")]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub api_allow: Vec<String>,
    /// Highest role that PipeOps may act in on this cluster: viewer, deployer, operator, admin
    #[arg(long, value_name = "ROLE", help_heading = "Server")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_role: Option<String>,
    /// Also write a kubeconfig, mode 0600, for this local user
    #[arg(long, value_name = "USER", help_heading = "Server")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kubeconfig_for: Option<String>,
    /// Longest time to wait for readiness, for example 300s or 10m
    #[arg(long, value_name = "TIME", help_heading = "Run")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeout: Option<String>,
    /// Control plane that the agent registers with
    #[arg(
        long,
        env = "PIPEOPS_CONTROL_PLANE_URL",
        hide_env_values = true,
        value_name = "URL",
        help_heading = "Agent"
    )]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub control_plane_url: Option<String>,
    /// sha256:BASE64 of a public key in the control plane's certificate chain; two allowed
    #[arg(
        long,
        env = "PIPEOPS_CONTROL_PLANE_PIN",
        hide_env_values = true,
        value_name = "PIN",
        value_delimiter = ',',
        help_heading = "Agent"
    )]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub control_plane_pin: Vec<String>,
    /// Name of the cluster for people
    #[arg(
        long,
        env = "CLUSTER_NAME",
        hide_env_values = true,
        value_name = "NAME",
        help_heading = "Agent"
    )]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cluster_name: Option<String>,
    /// Label of the cluster, KEY=VALUE: it is selected by it at the control plane
    #[arg(
        long,
        env = "CLUSTER_LABELS",
        hide_env_values = true,
        value_name = "LABEL",
        value_delimiter = ',',
        help_heading = "Agent"
    )]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub cluster_label: Vec<String>,
    /// File with the enrolment token, - for standard input [env: AGENT_TOKEN holds the token
    /// itself]
    #[arg(long, value_name = "FILE", help_heading = "Agent")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub agent_token_file: Option<String>,
    /// Any other k3s setting, as in its config.yaml (config file only)
    #[arg(skip)]
    #[serde(skip_serializing_if = "is_empty_table")]
    pub k3s: K3sTable,
}

impl Options {
    /// `self` where it says something, else `lower`.
    #[must_use]
    pub fn layered_over(self, lower: Options) -> Options {
        fn list<T>(upper: Vec<T>, lower: Vec<T>) -> Vec<T> {
            if upper.is_empty() { lower } else { upper }
        }
        Options {
            ignore: list(self.ignore, lower.ignore),
            k3s_version: self.k3s_version.or(lower.k3s_version),
            k3s_sha256: self.k3s_sha256.or(lower.k3s_sha256),
            channel: self.channel.or(lower.channel),
            offline_dir: self.offline_dir.or(lower.offline_dir),
            artifact_url: self.artifact_url.or(lower.artifact_url),
            registries: self.registries.or(lower.registries),
            node_name: self.node_name.or(lower.node_name),
            node_ip: list(self.node_ip, lower.node_ip),
            flannel_iface: self.flannel_iface.or(lower.flannel_iface),
            node_label: list(self.node_label, lower.node_label),
            node_taint: list(self.node_taint, lower.node_taint),
            tls_san: list(self.tls_san, lower.tls_san),
            components: list(self.components, lower.components),
            acme_email: self.acme_email.or(lower.acme_email),
            api_allow: list(self.api_allow, lower.api_allow),
            max_role: self.max_role.or(lower.max_role),
            kubeconfig_for: self.kubeconfig_for.or(lower.kubeconfig_for),
            timeout: self.timeout.or(lower.timeout),
            control_plane_url: self.control_plane_url.or(lower.control_plane_url),
            control_plane_pin: list(self.control_plane_pin, lower.control_plane_pin),
            cluster_name: self.cluster_name.or(lower.cluster_name),
            cluster_label: list(self.cluster_label, lower.cluster_label),
            agent_token_file: self.agent_token_file.or(lower.agent_token_file),
            k3s: self.k3s.layered_over(lower.k3s),
        }
    }

    /// Flags with which all but the `[k3s]` table is said again, as name and value.
    pub fn as_flags(&self) -> Vec<(String, String)> {
        let Ok(serde_json::Value::Object(map)) = serde_json::to_value(self) else {
            return Vec::new();
        };
        let plain = map.iter().filter(|(key, _)| *key != "k3s");
        plain.map(|(key, value)| (key.clone(), text_of(value))).collect()
    }

    /// Those that name a file or directory of the user's.
    pub fn paths_mut(&mut self) -> impl Iterator<Item = &mut String> {
        [&mut self.offline_dir, &mut self.registries, &mut self.agent_token_file]
            .into_iter()
            .flatten()
    }

    /// The options that shape the installation and so are compared between runs, as key and text
    /// without secrets.
    pub fn recorded(&self) -> BTreeMap<String, String> {
        let transient = [
            "ignore",
            "timeout",
            "offline-dir",
            "artifact-url",
            "k3s-sha256",
            "registries",
            "agent-token-file",
            "k3s",
        ];
        let Ok(serde_json::Value::Object(map)) = serde_json::to_value(self) else {
            return BTreeMap::new();
        };
        let plain = map
            .iter()
            .filter(|(key, _)| !transient.contains(&key.as_str()))
            .map(|(key, value)| (key.clone(), mask(&text_of(value), &[])));
        order::map(plain.chain(recorded_k3s_table(&self.k3s)))
    }
}

fn is_empty_table(table: &K3sTable) -> bool {
    table.is_empty()
}

/// The `[k3s]` table as it is compared between runs.
pub fn recorded_k3s_table(table: &K3sTable) -> BTreeMap<String, String> {
    let shown = table.redacted();
    order::map(shown.iter().map(|(key, value)| (format!("[k3s] {key}"), text_of(value))))
}

fn text_of(value: &serde_json::Value) -> String {
    match value {
        serde_json::Value::String(text) => text.clone(),
        serde_json::Value::Array(items) => items.iter().map(text_of).collect::<Vec<_>>().join(","),
        other => other.to_string(),
    }
}

/// Reads one config file of the installers.
///
/// # Errors
/// A [`Failure`] with exit 2 that names `origin`.
pub fn parse_file(text: &str, origin: &str) -> Result<Options, Failure> {
    parse_checked(text, origin, &keys(), &["k3s"], "pipeops install-server")
}

/// The names of all config keys: the long flags of [`Options`].
fn keys() -> Vec<String> {
    long_flags::<Options>()
}
