//! Settings of a control plane: flags, and a config file of the same names under them.

use std::net::{Ipv6Addr, SocketAddr};

use serde::de::Error as _;
use serde::{Deserialize, Deserializer};

use crate::base::config_file::{long_flags, parse_checked};
use crate::base::error::Failure;

/// The config file when no other is named.
pub const CONFIG: &str = "/etc/pipeops/control-plane.toml";

/// The URL of the HTTPS API under a name or an address.
pub(super) fn https_url(name: &str, port: u16) -> String {
    if name.parse::<Ipv6Addr>().is_ok() {
        format!("https://[{name}]:{port}")
    } else {
        format!("https://{name}:{port}")
    }
}

fn listen_address(text: &str) -> Result<SocketAddr, String> {
    text.parse().map_err(|_| {
        let text = text.trim_start_matches(':');
        let port = text.parse::<u16>().map_or_else(|_| "PORT".to_owned(), |port| port.to_string());
        format!("it is an IP address with a port: [::]:{port} for all, or 127.0.0.1:{port}")
    })
}

/// The same in a config file, where it may be no text at all.
fn listen_address_in_file<'de, D: Deserializer<'de>>(
    value: D,
) -> Result<Option<SocketAddr>, D::Error> {
    let value = serde_json::Value::deserialize(value)?;
    let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    listen_address(&text).map(Some).map_err(D::Error::custom)
}

/// All optional, so that flags override the file.
#[derive(Clone, Debug, Default, clap::Args, Deserialize, PartialEq)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
#[allow(rustdoc::broken_intra_doc_links, reason = "help texts: what stands in brackets is no link")]
pub struct ControlPlaneOptions {
    /// Address and port of the HTTPS API, the page and the gateway [default: [::]:8443]
    #[arg(long, value_name = "ADDRESS", value_parser = listen_address)]
    #[serde(deserialize_with = "listen_address_in_file")]
    pub listen: Option<SocketAddr>,
    /// Address and port of the tunnel (FRP) server [default: [::]:7000]
    #[arg(long, value_name = "ADDRESS", value_parser = listen_address)]
    #[serde(deserialize_with = "listen_address_in_file")]
    pub tunnel_listen: Option<SocketAddr>,
    /// Name or address by which agents and Runners reach this machine; the first one is given to
    /// them [default: the address of the default route]
    #[arg(long, value_name = "NAME")]
    pub public_name: Vec<String>,
    /// PostgreSQL database, postgres://USER:PASSWORD@HOST/DATABASE [default: a SQLite file in the
    /// data directory]
    #[arg(long, value_name = "URL", conflicts_with = "database_url_file")]
    #[serde(skip)]
    pub database_url: Option<String>,
    /// File with that URL
    #[arg(long, value_name = "FILE")]
    pub database_url_file: Option<String>,
    /// RabbitMQ server to publish events about agents to, amqp[s]://USER:PASSWORD@HOST/VHOST
    #[arg(long, value_name = "URL", conflicts_with = "amqp_url_file")]
    #[serde(skip)]
    pub amqp_url: Option<String>,
    /// File with that URL
    #[arg(long, value_name = "FILE")]
    pub amqp_url_file: Option<String>,
    /// CA of RabbitMQ's certificate, PEM, where the system does not trust it
    #[arg(long, value_name = "FILE")]
    pub amqp_ca: Option<String>,
    /// A genuine frps instead of the tunnel server of this program; `frps-config` prints the
    /// settings that it needs
    #[arg(long, value_name = "HOST:PORT")]
    pub frps: Option<String>,
    /// File with the auth.token of that frps
    #[arg(long, value_name = "FILE")]
    pub frps_token_file: Option<String>,
    /// CA of its certificate, PEM
    #[arg(long, value_name = "FILE")]
    pub frps_ca: Option<String>,
    /// Or the pin of a key in its certificate chain, `sha256:` and base64
    #[arg(long, value_name = "PIN", conflicts_with = "frps_ca")]
    pub frps_pin: Option<String>,
    /// Certificate chain for the HTTPS API instead of one from the control plane's own CA, PEM;
    /// reloaded when it changes
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    pub tls_cert: Option<String>,
    /// Its key, PEM
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    pub tls_key: Option<String>,
    /// CA of that certificate, PEM, where clients do not trust it already
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    pub tls_ca: Option<String>,
}

impl ControlPlaneOptions {
    /// These settings; those that are not set come from `lower`.
    #[must_use]
    pub fn layered_over(self, lower: ControlPlaneOptions) -> ControlPlaneOptions {
        // a URL in a flag replaces the file with a URL that the config names
        let (database, amqp) = (self.database_url.is_some(), self.amqp_url.is_some());
        ControlPlaneOptions {
            listen: self.listen.or(lower.listen),
            tunnel_listen: self.tunnel_listen.or(lower.tunnel_listen),
            public_name: if self.public_name.is_empty() {
                lower.public_name
            } else {
                self.public_name
            },
            database_url: self.database_url,
            database_url_file: self
                .database_url_file
                .or(lower.database_url_file.filter(|_| !database)),
            amqp_url: self.amqp_url,
            amqp_url_file: self.amqp_url_file.or(lower.amqp_url_file.filter(|_| !amqp)),
            amqp_ca: self.amqp_ca.or(lower.amqp_ca),
            frps: self.frps.or(lower.frps),
            frps_token_file: self.frps_token_file.or(lower.frps_token_file),
            frps_ca: self.frps_ca.or(lower.frps_ca),
            frps_pin: self.frps_pin.or(lower.frps_pin),
            tls_cert: self.tls_cert.or(lower.tls_cert),
            tls_key: self.tls_key.or(lower.tls_key),
            tls_ca: self.tls_ca.or(lower.tls_ca),
        }
    }
}

/// # Errors
/// A [`Failure`] with exit 2 that names `origin`.
pub fn parse_file(text: &str, origin: &str) -> Result<ControlPlaneOptions, Failure> {
    let secret = ["database-url", "amqp-url"];
    let known: Vec<String> = long_flags::<ControlPlaneOptions>()
        .into_iter()
        .filter(|k| !secret.contains(&k.as_str()))
        .collect();
    parse_checked(text, origin, &known, &[], "pipeops control-plane")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_without_its_half_is_answered_with_a_whole_one() {
        assert_eq!(listen_address("[::]:8443").map(|a| a.port()), Ok(8443));
        for text in ["8443", ":8443"] {
            let said = listen_address(text).unwrap_err();
            assert!(said.contains("[::]:8443"), "{text}: {said}");
        }
        for text in ["cp.test:8443", "10.0.0.5", ""] {
            let said = listen_address(text).unwrap_err();
            assert!(said.contains("127.0.0.1:PORT"), "{text}: {said}");
        }
    }

    #[test]
    fn an_address_in_a_file_is_answered_with_its_key_its_line_and_an_example() {
        for (text, key, example) in [
            ("listen = \"8443\"", "listen", "127.0.0.1:8443"),
            ("listen = 8443", "listen", "127.0.0.1:8443"),
            ("listen = [8443]", "listen", "127.0.0.1:PORT"),
            ("tunnel-listen = \"cp.test:7000\"", "tunnel-listen", "127.0.0.1:PORT"),
        ] {
            let said = parse_file(&format!("# ours\n{text}\n"), "/f.toml").unwrap_err().render();
            let address = format!("`{key}`: it is an IP address with a port: ");
            for part in ["/f.toml", "line 2", &address, example] {
                assert!(said.contains(part), "{text}: {part}: {said}");
            }
        }
    }

    #[test]
    fn flags_lie_over_the_file_and_a_password_has_no_place_in_it() {
        let file = parse_file(
            "listen = \"127.0.0.1:1\"\npublic-name = [\"a\"]\namqp-url-file = \"/f\"\n",
            "f",
        )
        .unwrap();
        let flags = ControlPlaneOptions {
            listen: "127.0.0.1:2".parse().ok(),
            amqp_url: Some("amqp://h".into()),
            ..ControlPlaneOptions::default()
        };
        let both = flags.layered_over(file);
        assert_eq!(
            (both.listen.unwrap().port(), both.public_name[0].as_str(), both.amqp_url_file),
            (2, "a", None)
        );
        let refused =
            parse_file("amqp-url = \"amqp://u:planted-canary-4711-in-plain-text@h\"\n", "f")
                .unwrap_err();
        assert!(
            refused.hint.as_deref().unwrap().contains("amqp-url-file")
                && !format!("{refused:?}").contains("canary-4711-in-plain-text"),
            "{refused:?}"
        );
    }
}
