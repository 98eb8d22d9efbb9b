//! What the user asked for: options from flags, environment and files, merged and validated in one place.

pub mod k3s_table;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::base::cidr::Cidr;
pub use crate::base::config_file::{Fault, table, unquoted, values};
use crate::base::config_file::{long_flags, parse_checked};
use crate::base::error::{Failure, nearest};
use crate::base::secret::mask;
use crate::base::text::is_dns_name;
use crate::contract::token::Role;
use crate::contract::types::DEFAULT_CONTROL_PLANE;
use crate::k3s::role::NodeRole;
use crate::k3s::version::Version;
use crate::k3s::{keys, values};
use k3s_table::K3sTable;

/// Every setting that may come from a flag, the environment or a config file; all optional, so that layers can be merged.
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
    /// File with the enrolment token, - for standard input [env: AGENT_TOKEN holds the token itself]
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
            agent_token_file: self.agent_token_file.or(lower.agent_token_file),
            k3s: self.k3s.layered_over(lower.k3s),
        }
    }

    /// The options that shape the installation and so are compared between runs, as key and text without secrets.
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
        plain.chain(recorded_k3s_table(&self.k3s)).collect()
    }
}

fn is_empty_table(table: &K3sTable) -> bool {
    table.is_empty()
}

/// The `[k3s]` table as it is compared between runs.
pub fn recorded_k3s_table(table: &K3sTable) -> BTreeMap<String, String> {
    table.redacted().iter().map(|(key, value)| (format!("[k3s] {key}"), text_of(value))).collect()
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
pub fn keys() -> Vec<String> {
    long_flags::<Options>()
}

/// Validated settings; nothing else is passed around.
#[derive(Clone, Debug, Serialize)]
pub struct Settings {
    pub role: NodeRole,
    pub options: Options,
    pub version: Option<Version>,
    pub channel: Option<String>,
    pub components: Option<Vec<String>>,
    /// The highest role that the agent may impersonate; see `deployments/rbac.yaml`.
    pub max_role: Role,
    pub timeout: Duration,
    pub control_plane_url: String,
}

impl Settings {
    /// The control plane's host, as a proxy or a firewall knows it.
    pub fn control_plane_host(&self) -> Option<String> {
        url::Url::parse(&self.control_plane_url).ok()?.host_str().map(str::to_owned)
    }

    /// Checks every value and reports all faults at once.
    ///
    /// # Errors
    /// A [`Failure`] with exit 2, one line of evidence for each fault.
    pub fn resolve(
        mut options: Options,
        role: NodeRole,
        codes: &[&str],
        components: &[&str],
    ) -> Result<Settings, Failure> {
        let mut faults = Vec::new();
        for code in &options.ignore {
            if !codes.contains(&code.as_str()) {
                let near = nearest(code, codes.iter().copied())
                    .map(|n| format!("; did you mean {n}?"))
                    .unwrap_or_default();
                faults.push(format!("--ignore: unknown finding code `{code}`{near}"));
            }
        }
        let version = options.k3s_version.as_deref().and_then(|v| match v.parse::<Version>() {
            Ok(version) => Some(version),
            Err(why) => {
                faults.push(format!("--k3s-version: {why}"));
                None
            }
        });
        if options.k3s_version.is_some() && options.channel.is_some() {
            faults.push("--k3s-version and --channel exclude each other".into());
        }
        if let Some(channel) = &options.channel
            && (channel.is_empty()
                || !channel.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '-')))
        {
            faults.push(format!(
                "--channel: `{channel}` is not a channel name such as stable or v1.36"
            ));
        }
        if let Some(hex) = &options.k3s_sha256
            && (hex.len() != 64 || !hex.chars().all(|c| c.is_ascii_hexdigit()))
        {
            faults.push("--k3s-sha256: a sha256 is 64 hexadecimal digits".into());
        }
        for ip in &options.node_ip {
            if ip.parse::<IpAddr>().is_err() {
                faults.push(format!("--node-ip: `{ip}` is not an IP address"));
            }
        }
        for cidr in &options.api_allow {
            if Cidr::parse(cidr).is_none() {
                faults
                    .push(format!("--api-allow: `{cidr}` is not a network such as 203.0.113.0/24"));
            }
        }
        if let Some(name) = &options.node_name
            && !is_dns_name(name)
        {
            faults.push(format!("--node-name: `{name}` is not a lower-case DNS name"));
        }
        faults.extend(
            options
                .node_label
                .iter()
                .filter_map(|l| values::label(l).err())
                .map(|why| format!("--node-label: {why}")),
        );
        faults.extend(
            values::taints(&options.node_taint)
                .into_iter()
                .map(|why| format!("--node-taint: {why}")),
        );
        options.tls_san = values::normalized_sans(&options.tls_san);
        faults.extend(
            options
                .tls_san
                .iter()
                .filter_map(|s| values::san_fault(s))
                .map(|why| format!("--tls-san: {why}")),
        );
        if let Some(mail) = &options.acme_email
            && !(mail.split('@').count() == 2
                && mail.split('@').all(|part| !part.is_empty())
                && !mail.contains(char::is_whitespace))
        {
            faults.push(format!("--acme-email: `{mail}` is not a mail address"));
        }
        let selected = match options.components.as_slice() {
            [] => None,
            [only] if only == "none" => Some(Vec::new()),
            list => {
                for name in list {
                    if !components.contains(&name.as_str()) {
                        let near = nearest(name, components.iter().copied())
                            .map(|n| format!("; did you mean {n}?"))
                            .unwrap_or_default();
                        faults.push(format!("--components: unknown component `{name}`{near} (known: {}, or none alone)", components.join(", ")));
                    }
                }
                let has = |name: &str| list.iter().any(|n| n == name);
                if has("ingress") && has("traefik") {
                    faults.push("--components: ingress and traefik both answer on ports 80 and 443; choose one".into());
                }
                Some(list.to_vec())
            }
        };
        let max_role = match options.max_role.as_deref() {
            None => Role::Operator,
            Some(text) => Role::of(text).unwrap_or_else(|| {
                faults.push(format!(
                    "--max-role: `{text}` is none of viewer, deployer, operator, admin"
                ));
                Role::Operator
            }),
        };
        let timeout = match options.timeout.as_deref().map(parse_time) {
            None => Duration::from_secs(300),
            Some(Some(time)) if !time.is_zero() => time,
            Some(_) => {
                faults.push("--timeout: give a time such as 300s, 10m or 1h".into());
                Duration::ZERO
            }
        };
        if let Some(url) = &options.artifact_url
            && !url::Url::parse(url).is_ok_and(|u| {
                matches!(u.scheme(), "http" | "https") && u.query().or(u.fragment()).is_none()
            })
        {
            faults.push(format!(
                "--artifact-url: `{url}` is not an http or https URL without `?` and `#`"
            ));
        }
        let control_plane_url =
            options.control_plane_url.clone().unwrap_or_else(|| DEFAULT_CONTROL_PLANE.into());
        if let Err(why) = check_control_plane(&control_plane_url) {
            faults.push(why);
        }
        for pin in &options.control_plane_pin {
            use base64::Engine as _;
            let ok = pin
                .strip_prefix("sha256:")
                .and_then(|b| base64::engine::general_purpose::STANDARD.decode(b).ok())
                .is_some_and(|bytes| bytes.len() == 32);
            if !ok {
                faults.push(
                    "--control-plane-pin: a pin is sha256: and the base64 of 32 bytes".into(),
                );
            }
        }
        if options.control_plane_pin.len() > 2 {
            faults.push("--control-plane-pin: at most two pins (present and next)".into());
        }
        for key in options.k3s.keys() {
            if let Some(flag) = owned_k3s_key(key) {
                faults.push(format!("[k3s] {key}: pipeops owns this setting; use {flag}"));
            }
        }
        faults.extend(values::faults(&options.k3s));
        if faults.is_empty() {
            let channel = options.channel.clone();
            return Ok(Settings {
                role,
                version,
                channel,
                components: selected,
                max_role,
                timeout,
                control_plane_url,
                options,
            });
        }
        let what = if faults.len() == 1 {
            faults.remove(0)
        } else {
            format!("{} settings are wrong", faults.len())
        };
        let mut failure =
            Failure::usage("SETTINGS_INVALID", what).hint("see `pipeops install-server --help`");
        failure.why = faults;
        Err(failure)
    }

    /// The node's name: the option, or the host name in lower case as k3s derives it.
    pub fn node_name(&self, hostname: &str) -> String {
        self.options.node_name.clone().unwrap_or_else(|| hostname.to_ascii_lowercase())
    }
}

/// https anywhere, plain http only to this machine itself.
fn check_control_plane(text: &str) -> Result<(), String> {
    let url = url::Url::parse(text)
        .map_err(|e| format!("--control-plane-url: `{text}` is not a URL ({e})"))?;
    if !url.username().is_empty() || url.password().is_some() {
        return Err("--control-plane-url: it has a login in it; the agent proves itself by its token (--agent-token-file)".into());
    }
    let loopback = match url.host() {
        Some(url::Host::Ipv4(ip)) => ip.is_loopback(),
        Some(url::Host::Ipv6(ip)) => ip.is_loopback(),
        Some(url::Host::Domain(name)) => name == "localhost",
        None => false,
    };
    match url.scheme() {
        "https" => Ok(()),
        "http" if loopback => Ok(()),
        "http" => Err(format!(
            "--control-plane-url: `{text}` must be https (http is allowed only to this machine itself)"
        )),
        other => Err(format!("--control-plane-url: scheme `{other}` is not https")),
    }
}

/// Our flag for a k3s setting that the drop-in owns, `None` for settings that pass through.
pub fn owned_k3s_key(key: &str) -> Option<&'static str> {
    Some(match keys::canonical_key(key).as_str() {
        "tls-san" => "--tls-san",
        "node-name" => "--node-name",
        "node-ip" => "--node-ip",
        "flannel-iface" => "--flannel-iface",
        "node-label" => "--node-label",
        "node-taint" => "--node-taint",
        "server" => "the MASTER argument of join-worker",
        "token" | "token-file" | "agent-token" | "agent-token-file" => "--token-file",
        "write-kubeconfig-mode" => "--kubeconfig-for (the main file stays 0600)",
        "secrets-encryption" => "nothing: it is always on",
        "private-registry" => "--registries",
        "data-dir" => "nothing: the data directory is fixed to /var/lib/rancher/k3s",
        _ => return None,
    })
}

/// `90`, `90s`, `10m`, `1h`; `None` for anything else or beyond a day.
pub fn parse_time(text: &str) -> Option<Duration> {
    let (digits, factor) = match text.as_bytes().last()? {
        b's' => (&text[..text.len() - 1], 1),
        b'm' => (&text[..text.len() - 1], 60),
        b'h' => (&text[..text.len() - 1], 3600),
        _ => (text, 1),
    };
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let seconds = digits.parse::<u64>().ok()?.checked_mul(factor)?;
    (seconds <= 86_400).then(|| Duration::from_secs(seconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolve(options: Options) -> Result<Settings, Failure> {
        Settings::resolve(
            options,
            NodeRole::Server,
            &["SWAP_ON", "CLOCK_SKEW"],
            &["ingress", "cert-manager"],
        )
    }

    #[test]
    fn a_typo_in_a_key_is_named_with_the_nearest_key() {
        let failure =
            parse_file("# mine\ntls-sn = [\"a\"]\n", "/etc/pipeops/config.toml").unwrap_err();
        assert_eq!(failure.what, "unknown key `tls-sn` in /etc/pipeops/config.toml, line 2");
        assert!(failure.hint.unwrap().contains("`tls-san`"));
    }

    #[test]
    fn wrong_types_and_broken_toml_name_the_file() {
        assert_eq!(parse_file("tls-san = 3", "f").unwrap_err().code, "CONFIG_INVALID");
        assert_eq!(parse_file("tls-san = [", "f").unwrap_err().code, "CONFIG_INVALID");
    }

    #[test]
    fn all_faults_are_reported_at_once() {
        let options = Options {
            ignore: vec!["CLOCK_SKW".into()],
            node_ip: vec!["10.0.0".into()],
            k3s: [("token".to_owned(), serde_json::json!("x"))].into(),
            components: vec!["ingres".into()],
            control_plane_url: Some("http://example.com".into()),
            ..Options::default()
        };
        let failure = resolve(options).unwrap_err();
        assert_eq!(failure.why.len(), 5, "{failure:?}");
        assert!(failure.why[0].contains("did you mean CLOCK_SKEW"));
    }

    #[test]
    fn upper_layers_win_key_by_key() {
        let upper = Options { tls_san: vec!["a".into()], ..Options::default() };
        let lower = parse_file(
            "tls-san = [\"b\"]\nnode-name = \"n\"\n[k3s]\nkubelet-arg = [\"x=y\"]\n",
            "f",
        )
        .unwrap();
        let merged = upper.layered_over(lower);
        assert_eq!(merged.tls_san, ["a"]);
        assert_eq!(merged.node_name.as_deref(), Some("n"));
        assert!(merged.k3s.contains_key("kubelet-arg"));
    }

    #[test]
    fn times_have_units_and_bounds() {
        assert_eq!(parse_time("10m"), Some(Duration::from_secs(600)));
        for bad in ["", "s", "-1", "1d", "25h", "99999999999999999999", "é"] {
            assert_eq!(parse_time(bad), None, "{bad}");
        }
    }
}
