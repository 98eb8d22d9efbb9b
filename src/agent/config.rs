//! The agent's settings: its file, overridden by the environment; and what deregistering needs of
//! them.

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::agent::place::METADATA_URL;
use crate::agent::session::http::deregister;
use crate::agent::session::identity::{Identity, StoredCredential};
use crate::base::config_file::parse_checked;
use crate::base::error::Failure;
use crate::base::http::{check_url, credential_free_proxy};
use crate::base::secret::Secret;
use crate::base::trust::{Pin, Trust};
use crate::contract::selector::parse_labels;
use crate::contract::token::Role;
use crate::contract::types::DEFAULT_CONTROL_PLANE;
use crate::host::Host;
use crate::host::paths::AGENT_CONFIG;

/// The directory for the state of the agent, unless systemd names another one.
pub const STATE_DIR: &str = "/var/lib/pipeops-agent";

/// `/etc/pipeops/agent.toml`, as `install-server` writes it.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct AgentConfig {
    pub control_plane_url: Option<String>,
    pub control_plane_pin: Vec<String>,
    /// File with the certificates, in PEM, that may sign the control plane's.
    pub control_plane_ca: Option<String>,
    pub cluster_name: Option<String>,
    /// What the cluster is selected by at the control plane: `KEY=VALUE`, each key once.
    pub cluster_labels: Vec<String>,
    #[serde(skip)]
    pub(super) labels: BTreeMap<String, String>,
    /// Whether the provider's metadata service is asked for region and zone; it is without it.
    pub metadata: Option<bool>,
    /// Where that service is, `http://HOST`.
    pub metadata_url: Option<String>,
    pub max_role: Option<String>,
    pub kubeconfig: Option<String>,
    pub socket: Option<String>,
    /// Loopback address and port for `/metrics`; none without it.
    pub metrics_listen: Option<std::net::SocketAddr>,
    /// Proxy for requests to the control plane, `http://HOST:PORT`; the environment's `HTTPS_PROXY`
    /// overrides it. It holds no password.
    pub https_proxy: Option<String>,
    /// The environment names a proxy.
    #[serde(skip)]
    pub(super) proxy_in_environment: bool,
    /// Use a tunnel that has neither CA nor pin.
    pub allow_insecure_tunnel: bool,
    /// Requests that end by themselves, and upgrades, of one caller and of all together.
    pub streams_per_caller: Option<usize>,
    pub streams: Option<usize>,
    /// Watches and followed logs of one caller and of all together.
    pub watches_per_caller: Option<usize>,
    pub watches: Option<usize>,
}

/// The keys of the file; a test holds them against [`AgentConfig`].
const KEYS: &[&str] = &[
    "control-plane-url",
    "control-plane-pin",
    "control-plane-ca",
    "cluster-name",
    "cluster-labels",
    "metadata",
    "metadata-url",
    "max-role",
    "kubeconfig",
    "socket",
    "metrics-listen",
    "https-proxy",
    "allow-insecure-tunnel",
    "streams-per-caller",
    "streams",
    "watches-per-caller",
    "watches",
];

/// Whether anything here says that this machine or container has an agent.
pub fn is_set_up(host: &Host, path: &str, env: &BTreeMap<String, String>) -> bool {
    let named =
        ["PIPEOPS_CONTROL_PLANE_URL", "CLUSTER_NAME", "STATE_DIRECTORY", "CREDENTIALS_DIRECTORY"];
    path != AGENT_CONFIG
        || host.exists(AGENT_CONFIG)
        || named.iter().any(|name| env.get(*name).is_some_and(|value| !value.is_empty()))
}

/// What `run --help` says of the file.
pub fn keys_help() -> String {
    format!("Keys of FILE (TOML, or YAML where its name ends so): {}", KEYS.join(", "))
}

fn wrong(code: &str, what: String, why: String) -> anyhow::Error {
    let hint = "correct it, or run `pipeops install-server` again, then `systemctl restart \
                pipeops-agent`";
    Failure::usage(code, what).why(why).hint(hint).into()
}

impl AgentConfig {
    /// Reads the file; the environment overrides it.
    ///
    /// # Errors
    /// Exit 2, so that systemd does not restart the agent with a wrong file again and again.
    pub fn load(
        host: &Host,
        path: &str,
        env: &BTreeMap<String, String>,
    ) -> anyhow::Result<AgentConfig> {
        let mut config: AgentConfig = match host.read_settings(path, AGENT_CONFIG)? {
            Some(text) => parse_checked(&text, path, &[], KEYS, "pipeops run")?,
            None => AgentConfig::default(),
        };
        let var = |name: &str| env.get(name).filter(|v| !v.is_empty()).cloned();
        config.control_plane_url = var("PIPEOPS_CONTROL_PLANE_URL").or(config.control_plane_url);
        config.cluster_name = var("CLUSTER_NAME").or(config.cluster_name);
        if let Some(labels) = var("CLUSTER_LABELS") {
            config.cluster_labels = labels.split(',').map(|l| l.trim().to_owned()).collect();
        }
        if let Some(pins) = var("PIPEOPS_CONTROL_PLANE_PIN") {
            config.control_plane_pin = pins.split(',').map(|p| p.trim().to_owned()).collect();
        }
        config.proxy_in_environment = ["HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"]
            .into_iter()
            .any(|name| var(name).is_some());
        let invalid =
            |why: String| wrong("CONFIG_INVALID", "the agent's settings are wrong".into(), why);
        if config.https_proxy.as_deref().is_some_and(|proxy| credential_free_proxy(proxy).is_none())
        {
            return Err(invalid(
                "https-proxy is http://HOST:PORT, without a user and a password: everybody can \
                 read this file"
                    .into(),
            ));
        }
        check_url(config.url()).map_err(invalid)?;
        config.labels = parse_labels(&config.cluster_labels).map_err(invalid)?;
        let metadata = url::Url::parse(config.metadata_url());
        if !metadata.is_ok_and(|url| url.scheme() == "http" && url.path() == "/") {
            return Err(invalid(
                "metadata-url is http://HOST, as in http://169.254.169.254".into(),
            ));
        }
        config.role()?;
        config.trust(host)?.client_config().map_err(|why| {
            wrong("TRUST_INVALID", "the control plane's CA or pin cannot be used".into(), why)
        })?;
        if config.metrics_listen.is_some_and(|a| !a.ip().is_loopback()) {
            return Err(invalid(
                "metrics-listen takes a loopback address only: the metrics are for this machine"
                    .into(),
            ));
        }
        Ok(config)
    }

    /// The proxy of the settings, when the environment names none.
    pub(super) fn proxy(&self) -> Option<String> {
        self.https_proxy.clone().filter(|_| !self.proxy_in_environment)
    }

    pub(super) fn metadata_url(&self) -> &str {
        self.metadata_url.as_deref().unwrap_or(METADATA_URL)
    }

    pub(super) fn url(&self) -> &str {
        self.control_plane_url.as_deref().unwrap_or(DEFAULT_CONTROL_PLANE)
    }

    pub(super) fn role(&self) -> anyhow::Result<Role> {
        let name = self.max_role.as_deref().unwrap_or("operator");
        Role::from_name(name).ok_or_else(|| {
            wrong(
                "CONFIG_INVALID",
                "the agent's settings are wrong".into(),
                format!("max-role `{name}` is none of viewer, deployer, operator, admin"),
            )
        })
    }

    pub(super) fn trust(&self, host: &Host) -> anyhow::Result<Trust> {
        let invalid = |why: String| {
            wrong("TRUST_INVALID", "the control plane's CA or pin cannot be used".into(), why)
        };
        let pins = self
            .control_plane_pin
            .iter()
            .map(|p| Pin::parse(p))
            .collect::<Result<Vec<_>, _>>()
            .map_err(invalid)?;
        if pins.len() > 2 {
            return Err(invalid("two pins at most: the current and the next".into()));
        }
        let ca_pem = match &self.control_plane_ca {
            Some(path) => Some(
                host.read(path)
                    .ok()
                    .flatten()
                    .ok_or_else(|| invalid(format!("control-plane-ca: {path} cannot be read")))?,
            ),
            None => None,
        };
        Ok(Trust { ca_pem, pins, accept_any: false })
    }
}

/// What removes this machine's agent from its control plane, read while its files are still there.
pub struct Deregistration {
    id: String,
    stored: StoredCredential,
    trust: Trust,
    proxy: Option<String>,
}

impl Deregistration {
    /// None when there is no agent, or it never registered.
    pub fn read(host: &Host) -> Option<Deregistration> {
        let config = AgentConfig::load(host, AGENT_CONFIG, &BTreeMap::new()).ok()?;
        let state = host.read_only_state_dir(STATE_DIR);
        let stored = StoredCredential::load(&state, config.url())?;
        Some(Deregistration {
            id: Identity::stored_id(&state)?,
            stored,
            trust: config.trust(host).ok()?,
            proxy: config.proxy(),
        })
    }

    /// Sends it, once; gives the URL.
    ///
    /// # Errors
    /// What is left to do by hand, and why.
    pub async fn send(self) -> Result<String, String> {
        let url = self.stored.url.clone();
        match deregister(&self.trust, self.proxy.as_deref(), &self.stored, &self.id).await {
            Ok(()) => Ok(url),
            Err(why) => Err(format!(
                "{url} still lists cluster {} ({why}): remove it there",
                self.stored.cluster_id
            )),
        }
    }
}

/// Checks an enrolment token before it is used.
///
/// # Errors
/// Exit 2: no other attempt can succeed.
pub fn check_token(token: &Secret) -> anyhow::Result<()> {
    let text = token.expose();
    if text.len() > 4096 || !text.bytes().all(|b| b.is_ascii_graphic()) {
        return Err(Failure::usage(
            "TOKEN_MALFORMED",
            "AGENT_TOKEN holds characters that no token has, or is too long",
        )
        .hint("copy it again, alone and on one line")
        .into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_keys_that_are_named_are_those_that_are_read() {
        // serde lists what it knows
        let error = toml::from_str::<AgentConfig>("none = 1").unwrap_err().to_string();
        let known: Vec<&str> =
            error.split_once("one of").unwrap().1.split('`').skip(1).step_by(2).collect();
        assert_eq!(known, KEYS);
    }
}
