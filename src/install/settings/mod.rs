//! What the user asked for: options from flags, environment and files, merged and validated in one
//! place.

pub mod k3s_table;
mod options;
mod validate;

use std::time::Duration;

use serde::Serialize;

use crate::base::error::Failure;
use crate::contract::token::Role;
use crate::contract::types::DEFAULT_CONTROL_PLANE;
use crate::k3s::role::NodeRole;
use crate::k3s::version::Version;
use crate::k3s::{keys, values};

pub use options::{Options, parse_file, recorded_k3s_table};

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
        validate::ignored_codes(&options, codes, &mut faults);
        let version = validate::release(&options, &mut faults);
        validate::node(&options, &mut faults);
        options.tls_san = values::normalized_sans(&options.tls_san);
        validate::server(&options, &mut faults);
        let selected = validate::components(&options, components, &mut faults);
        let max_role = validate::max_role(&options, &mut faults);
        let timeout = validate::timeout(&options, &mut faults);
        validate::artifact_url(&options, &mut faults);
        let control_plane_url =
            options.control_plane_url.clone().unwrap_or_else(|| DEFAULT_CONTROL_PLANE.into());
        validate::control_plane(&control_plane_url, &options.control_plane_pin, &mut faults);
        validate::k3s_table(&options, &mut faults);
        match faults.len() {
            0 => Ok(Settings {
                role,
                version,
                channel: options.channel.clone(),
                components: selected,
                max_role,
                timeout,
                control_plane_url,
                options,
            }),
            count => {
                let k3s = faults.iter().all(|fault| fault.starts_with("[k3s]"));
                let mut failure = match count {
                    1 => Failure::usage("SETTINGS_INVALID", faults.remove(0)),
                    _ => Failure::usage("SETTINGS_INVALID", format!("{count} settings are wrong")),
                };
                failure.why = faults;
                Err(failure.hint(match role {
                    _ if k3s => "the values are those of k3s: see https://docs.k3s.io/cli",
                    NodeRole::Server => "see `pipeops install-server --help`",
                    NodeRole::Worker => "see `pipeops join-worker --help`",
                }))
            }
        }
    }

    /// The node's name: the option, or the host name in lower case as k3s derives it.
    pub fn node_name(&self, hostname: &str) -> String {
        self.options.node_name.clone().unwrap_or_else(|| hostname.to_ascii_lowercase())
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

/// Seconds (`90`), or a duration as jiff reads it (`90s`, `10m`, `1h30m`); `None` for anything
/// else, for less than nothing and beyond a day.
pub fn parse_duration(text: &str) -> Option<Duration> {
    let time = if !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit()) {
        Duration::from_secs(text.parse().ok()?)
    } else {
        text.parse::<jiff::SignedDuration>().ok()?.try_into().ok()?
    };
    (time <= Duration::from_secs(86_400)).then_some(time)
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
    fn a_fault_says_what_to_write_instead() {
        for (options, word) in [
            (
                Options {
                    control_plane_url: Some("cp.example.com:8443".into()),
                    ..Options::default()
                },
                "write https://cp.example.com:8443",
            ),
            (
                Options { components: vec!["none".into(), "ingress".into()], ..Options::default() },
                "`none` stands alone",
            ),
            (
                Options {
                    channel: Some("stable".into()),
                    offline_dir: Some("/opt/release".into()),
                    ..Options::default()
                },
                "--k3s-version",
            ),
        ] {
            let failure = resolve(options).unwrap_err();
            assert!(failure.what.contains(word), "{failure:?}");
            assert!(failure.hint.unwrap().contains("install-server --help"));
        }
        let login = Options { control_plane_url: Some("u:pw@cp:1".into()), ..Options::default() };
        assert!(!resolve(login).unwrap_err().render().contains("pw"));
        let k3s = [("token".to_owned(), serde_json::json!("x"))].into();
        let failure = resolve(Options { k3s, ..Options::default() }).unwrap_err();
        assert!(failure.hint.unwrap().contains("docs.k3s.io"));
        let worker = Options { max_role: Some("king".into()), ..Options::default() };
        let failure = Settings::resolve(worker, NodeRole::Worker, &[], &[]).unwrap_err();
        assert!(failure.hint.unwrap().contains("join-worker --help"));
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
        for (text, seconds) in [("90", 90), ("90s", 90), ("10m", 600), ("1h30m", 5400)] {
            assert_eq!(parse_duration(text), Some(Duration::from_secs(seconds)), "{text}");
        }
        for bad in ["", "s", "-1", "-1s", "+5", "1d", "25h", "99999999999999999999", "é"] {
            assert_eq!(parse_duration(bad), None, "{bad}");
        }
    }
}
