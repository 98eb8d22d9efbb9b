//! The Runner's settings: its file, overridden by the environment; and the secrets that they name,
//! which are read again for each connection, so that a new token needs no restart.

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::base::config_file::parse_checked;
use crate::base::error::{Exit, Failure};
use crate::base::http::check_url;
use crate::base::secret::{Secret, register_secret};
use crate::base::trust::{Pin, Trust};
use crate::broker::{self, Broker};
use crate::contract::job::PARTITIONS;
use crate::contract::sealing::SealingKey;
use crate::contract::types::DEFAULT_CONTROL_PLANE;
use crate::host::Host;
use crate::host::state::StateDir;
use crate::host::user_files::unreadable;

pub const CONFIG: &str = "/etc/pipeops/runner.toml";
/// The directory for the state of the Runner, unless systemd names another one.
const STATE_DIR: &str = "/var/lib/pipeops-runner";
/// The key that opens what is sealed, in that directory.
const KEY: &str = "sealing-key";

/// `/etc/pipeops/runner.toml`.
#[derive(Default, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct RunnerConfig {
    control_plane_url: Option<String>,
    control_plane_pin: Vec<String>,
    /// File with the certificates, in PEM, that may sign the control plane's.
    control_plane_ca: Option<String>,
    /// File with the Runner's token.
    token_file: Option<String>,
    /// File with the broker's URL.
    amqp_url_file: Option<String>,
    /// File with the CA of the broker, PEM.
    amqp_ca: Option<String>,
    /// Id of the project whose jobs it takes.
    pub(super) project: Option<String>,
    /// The same file for all Runners of a project.
    sealing_key_file: Option<String>,
    /// Jobs at once.
    concurrency: Option<usize>,
    /// Straight through the tunnel to the agent, where it can.
    pub(super) direct: bool,
    /// It makes exchanges and queues, and not only looks for them.
    declare: Option<bool>,
    /// It logs the events of agents and operations, from the queue that all Runners share.
    pub(super) events: bool,
    /// Where secrets are that no file of the settings names: systemd's `LoadCredential=`.
    #[serde(skip)]
    credentials: Option<String>,
    /// The broker's URL, from the environment.
    #[serde(skip)]
    amqp_url: Option<Secret>,
    #[serde(skip)]
    state_dir: String,
}

/// The keys of the file; a test holds them against [`RunnerConfig`].
const KEYS: &[&str] = &[
    "control-plane-url",
    "control-plane-pin",
    "control-plane-ca",
    "token-file",
    "amqp-url-file",
    "amqp-ca",
    "project",
    "sealing-key-file",
    "concurrency",
    "direct",
    "declare",
    "events",
];

/// What `runner --help` says of the file.
pub fn keys_help() -> String {
    format!("Keys of FILE (TOML, or YAML where its name ends so): {}", KEYS.join(", "))
}

fn invalid(why: impl Into<String>) -> anyhow::Error {
    Failure::usage("CONFIG_INVALID", "the Runner's settings are wrong")
        .why(why)
        .hint(format!("correct {CONFIG}, then `systemctl restart pipeops-runner`"))
        .into()
}

/// Where a Runner keeps its state.
pub fn state_dir(env: &BTreeMap<String, String>) -> String {
    let named = env.get("STATE_DIRECTORY").filter(|dir| !dir.is_empty());
    named.map_or(STATE_DIR, |dirs| dirs.split(':').next().unwrap_or(STATE_DIR)).to_owned()
}

impl RunnerConfig {
    /// Reads the file; the environment overrides it. `amqp_url` is the broker's URL from there.
    ///
    /// # Errors
    /// Exit 2, so that systemd does not restart the Runner with a wrong file again and again.
    pub fn load(
        host: &Host,
        path: &str,
        env: &BTreeMap<String, String>,
        amqp_url: Option<Secret>,
    ) -> anyhow::Result<RunnerConfig> {
        let mut config: RunnerConfig = match host.read_settings(path, CONFIG)? {
            Some(text) => parse_checked(&text, path, &[], KEYS, "pipeops runner")?,
            None => RunnerConfig::default(),
        };
        let var = |name: &str| env.get(name).filter(|v| !v.is_empty()).cloned();
        config.control_plane_url = var("PIPEOPS_CONTROL_PLANE_URL").or(config.control_plane_url);
        if let Some(pins) = var("PIPEOPS_CONTROL_PLANE_PIN") {
            config.control_plane_pin = pins.split(',').map(|p| p.trim().to_owned()).collect();
        }
        config.credentials = var("CREDENTIALS_DIRECTORY");
        config.amqp_url = amqp_url;
        config.state_dir = state_dir(env);
        check_url(config.url()).map_err(invalid)?;
        config.trust(host)?.client_config().map_err(invalid)?;
        config.token(host)?;
        config.broker(host)?;
        if config.project.as_deref().is_some_and(|project| !is_project(project)) {
            return Err(invalid("project is the id of a project, as the control plane shows it"));
        }
        if !(1..=usize::from(PARTITIONS)).contains(&config.concurrency()) {
            return Err(invalid(format!("concurrency is 1 to {PARTITIONS}")));
        }
        Ok(config)
    }

    pub(super) fn url(&self) -> &str {
        self.control_plane_url.as_deref().unwrap_or(DEFAULT_CONTROL_PLANE)
    }

    pub(super) fn concurrency(&self) -> usize {
        self.concurrency.unwrap_or(usize::from(PARTITIONS))
    }

    pub(super) fn declares(&self) -> bool {
        self.declare.unwrap_or(true)
    }

    pub(super) fn trust(&self, host: &Host) -> anyhow::Result<Trust> {
        let pins = self.control_plane_pin.iter().map(|pin| Pin::parse(pin));
        let pins = pins.collect::<Result<Vec<_>, _>>().map_err(invalid)?;
        let ca_pem = self.control_plane_ca.as_deref().map(|path| text(host, path)).transpose()?;
        Ok(Trust { ca_pem, pins, accept_any: false })
    }

    pub(super) fn token(&self, host: &Host) -> anyhow::Result<Secret> {
        let token = self.secret(host, self.token_file.as_deref(), "token")?;
        let token = token.ok_or_else(|| invalid("token-file names no file with its token"))?;
        if token.is_empty() || !token.expose().bytes().all(|b| b.is_ascii_graphic()) {
            return Err(invalid("what token-file names holds no token, alone and on one line"));
        }
        register_secret(token.expose());
        Ok(token)
    }

    pub(super) fn broker(&self, host: &Host) -> anyhow::Result<Broker> {
        let url = match &self.amqp_url {
            Some(url) => Some(url.clone()),
            None => self.secret(host, self.amqp_url_file.as_deref(), "amqp-url")?,
        };
        let url = url.ok_or_else(|| invalid("amqp-url-file names no file with a broker's URL"))?;
        let ca = self.amqp_ca.as_deref().map(|path| text(host, path)).transpose()?;
        Ok(Broker { url: broker::check(&url)?, ca })
    }

    pub(super) fn state(&self, host: &Host) -> anyhow::Result<StateDir> {
        host.state_dir(&self.state_dir)
    }

    /// The key that opens what is sealed; one of its own where none is given.
    ///
    /// # Errors
    /// A file that cannot be read or holds no key; a directory that cannot be written to.
    pub(super) fn sealing_key(&self, host: &Host, state: &StateDir) -> anyhow::Result<SealingKey> {
        let text = match self.secret(host, self.sealing_key_file.as_deref(), KEY)? {
            Some(text) => text,
            None => match state.read(KEY)? {
                Some(text) => Secret::new(text),
                None => {
                    let fresh = SealingKey::fresh().ok_or_else(|| {
                        anyhow::anyhow!("the system gives no random numbers for a key")
                    })?;
                    state.write(KEY, fresh.expose())?;
                    tracing::info!(
                        "a new sealing key: all Runners of the project need the same one"
                    );
                    fresh
                }
            },
        };
        SealingKey::parse(text.expose()).ok_or_else(|| {
            Failure::new(Exit::Usage, "SEALING_KEY_WRONG", "the sealing key cannot be used")
                .why("it is no base64 of 32 bytes")
                .hint(
                    "copy it from another Runner of the project; or remove the file, and have an \
                       administrator remove the project's: `pipeops explain SEALING_KEY_WRONG`",
                )
                .into()
        })
    }

    /// What a file holds: the one that is named, or systemd's; none where there is neither.
    fn secret(
        &self,
        host: &Host,
        named: Option<&str>,
        credential: &str,
    ) -> anyhow::Result<Option<Secret>> {
        if let Some(path) = named {
            return text(host, path).map(|text| Some(Secret::new(text.trim())));
        }
        let Some(dir) = &self.credentials else { return Ok(None) };
        let path = format!("{dir}/{credential}");
        match host.read_user_file(&path) {
            Ok(text) => Ok(Some(Secret::new(text.trim()))),
            // one that is there and cannot be read is not an absent one: a new key would be made
            Err(e) if is_absent(&e) => Ok(None),
            Err(e) => Err(unreadable(&path, &e).into()),
        }
    }
}

fn text(host: &Host, path: &str) -> anyhow::Result<String> {
    host.read_user_file(path).map_err(|e| unreadable(path, &e).into())
}

fn is_absent(error: &anyhow::Error) -> bool {
    let cause = error.downcast_ref::<std::io::Error>();
    cause.is_some_and(|e| e.kind() == std::io::ErrorKind::NotFound)
}

/// Ids of projects stand in the names of queues.
fn is_project(id: &str) -> bool {
    (1..=100).contains(&id.len())
        && id.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_keys_that_are_named_are_those_that_are_read() {
        // serde lists what it knows
        let error = toml::from_str::<RunnerConfig>("none = 1").err().unwrap().to_string();
        let known: Vec<&str> =
            error.split_once("one of").unwrap().1.split('`').skip(1).step_by(2).collect();
        assert_eq!(known, KEYS);
    }

    #[test]
    fn what_is_missing_or_wrong_is_named_and_a_key_is_made_once() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name).display().to_string();
        let host = Host::new("/", None);
        let put = |name: &str, text: &str| host.write_user_file(&at(name), text).unwrap();
        put("token", "por_planted\n");
        put("amqp-url", "amqp://u:p@mq.test/\n");
        let env: BTreeMap<String, String> = [
            ("CREDENTIALS_DIRECTORY", dir.path().display().to_string()),
            ("STATE_DIRECTORY", at("state")),
            ("PIPEOPS_CONTROL_PLANE_PIN", format!("sha256:{}=", "A".repeat(43))),
        ]
        .map(|(name, value)| (name.to_owned(), value))
        .into();
        let load = |text: &str| {
            put("runner.toml", text);
            RunnerConfig::load(&host, &at("runner.toml"), &env, None)
        };
        for (text, why) in [
            ("control-plane-url = \"http://cp.test\"", "https"),
            ("project = \"a b\"", "project"),
            ("concurrency = 9", "1 to 8"),
            ("concurrency = 0", "1 to 8"),
            ("token-file = \"/nowhere\"", "No such file"),
        ] {
            let failure = Failure::from_error(&load(text).err().unwrap());
            assert!(
                failure.exit == Exit::Usage && failure.why.concat().contains(why),
                "{failure:?}"
            );
        }
        let mut without_pin = env.clone();
        without_pin.remove("PIPEOPS_CONTROL_PLANE_PIN");
        put("runner.toml", "control-plane-pin = [\"x\"]");
        let loaded = RunnerConfig::load(&host, &at("runner.toml"), &without_pin, None);
        assert!(Failure::from_error(&loaded.err().unwrap()).exit == Exit::Usage);
        put("token", "two words");
        let failure = Failure::from_error(&load("").err().unwrap());
        assert!(failure.why.concat().contains("no token"), "{failure:?}");
        put("token", "por_planted");
        let config = load("project = \"default\"\nconcurrency = 2").unwrap();
        assert_eq!((config.concurrency(), config.declares(), config.direct), (2, true, false));
        let state = config.state(&host).unwrap();
        let made = config.sealing_key(&host, &state).unwrap().public();
        assert_eq!(config.sealing_key(&host, &state).unwrap().public(), made);
        put(KEY, "no key");
        let failure = Failure::from_error(&config.sealing_key(&host, &state).err().unwrap());
        assert_eq!(failure.code, "SEALING_KEY_WRONG");
        // what cannot be read is not absent
        let odd = RunnerConfig { credentials: Some(at("token")), ..RunnerConfig::default() };
        let failure = Failure::from_error(&odd.sealing_key(&host, &state).err().unwrap());
        assert!(failure.exit == Exit::Usage && failure.code != "SEALING_KEY_WRONG", "{failure:?}");
    }
}
