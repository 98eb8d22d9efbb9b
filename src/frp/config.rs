//! The settings of a tunnel, as the control plane sends them.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::base::secret::Secret;

/// The tunnel as the control plane describes it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(default)]
pub struct TunnelConfig {
    /// Name or address of the FRP server.
    pub server: String,
    pub port: u16,
    pub tcp_mux: bool,
    pub pool_count: u16,
    pub tls: TunnelTls,
    pub auth: TunnelAuth,
    pub proxies: Vec<Proxy>,
}

/// How the FRP server proves itself. Without CA or pin the tunnel is refused.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(default)]
pub struct TunnelTls {
    /// Off, anybody on the way sees the login; what callers and agent say stays sealed between
    /// them. Refused like a server that nobody proves.
    pub enable: bool,
    pub ca_pem: Option<String>,
    pub pin: Option<String>,
    pub server_name: Option<String>,
    /// Send 0x17 before the handshake: for servers that share their port with an HTTPS vhost, and
    /// for old ones. A server that hangs up on a handshake without it is tried with it.
    pub custom_first_byte: bool,
}

impl Default for TunnelTls {
    fn default() -> TunnelTls {
        TunnelTls {
            enable: true,
            ca_pem: None,
            pin: None,
            server_name: None,
            custom_first_byte: false,
        }
    }
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(default)]
pub struct TunnelAuth {
    #[cfg_attr(test, schemars(with = "String"))]
    #[serde(serialize_with = "Secret::serialize_exposed")]
    pub token: Secret,
    pub user: Option<String>,
    pub metas: BTreeMap<String, String>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum ProxyKind {
    #[default]
    Stcp,
    Tcp,
    Http,
}

impl ProxyKind {
    pub fn name(self) -> &'static str {
        match self {
            ProxyKind::Stcp => "stcp",
            ProxyKind::Tcp => "tcp",
            ProxyKind::Http => "http",
        }
    }
}

/// One way in.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(default)]
pub struct Proxy {
    pub name: String,
    #[serde(rename = "type")]
    pub kind: ProxyKind,
    pub remote_port: u16,
    pub subdomain: String,
    pub custom_domains: Vec<String>,
    #[cfg_attr(test, schemars(with = "String"))]
    #[serde(serialize_with = "Secret::serialize_exposed")]
    pub secret_key: Secret,
    pub allow_users: Vec<String>,
    pub use_encryption: bool,
    pub use_compression: bool,
}
