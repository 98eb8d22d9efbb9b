//! The FRP server that agents hold their tunnels at: the one of this process, or somebody's frps, of which we are the auth plugin
//! and a visitor (frp `doc/server_plugin.md`, `server/visitor/visitor.go`).

use std::sync::Arc;

use serde::Deserialize;
use serde_json::Value;
use tokio::task::JoinSet;

use super::ControlPlane;
use super::gateway::proxy_name;
use super::registry::HttpError;
use crate::base::error::Failure;
use crate::base::secret::{Secret, constant_time_eq};
use crate::frp::client::visit;
use crate::frp::codec::Io;
use crate::frp::dial::{Carrier, Dialer};
use crate::frp::server::Server;
use crate::frp::wire::NewProxy;
use crate::frp::{TunnelAuth, TunnelConfig, TunnelTls};

/// Somebody's frps.
pub struct ExternalFrps {
    /// HOST:PORT.
    pub address: String,
    pub token: Secret,
    /// What makes its certificate acceptable: its CA in PEM, or a pin.
    pub ca: Option<String>,
    pub pin: Option<String>,
}

/// The way to it.
pub(super) struct External {
    pub(super) config: TunnelConfig,
    target: Dialer,
    /// One session carries all streams; what runs for it ends with it.
    session: tokio::sync::Mutex<Session>,
}

#[derive(Default)]
struct Session {
    /// Counts them: who was given an old one does not end its successor.
    number: u64,
    carrier: Option<(Carrier, JoinSet<()>)>,
}

#[derive(Clone)]
pub(super) enum Frps {
    Own(Server),
    External(Arc<External>),
}

impl External {
    /// # Errors
    /// Exit 2 for an address or trust that cannot be used.
    pub(super) fn new(settings: ExternalFrps) -> anyhow::Result<External> {
        let wrong = |why: String| {
            Failure::usage("FRPS_WRONG", "the external frps cannot be used")
                .why(why)
                .hint("--frps HOST:PORT with --frps-token-file, and --frps-ca or --frps-pin")
        };
        let (server, port) = settings
            .address
            .rsplit_once(':')
            .ok_or_else(|| wrong(format!("`{}` names no port", settings.address)))?;
        let config = TunnelConfig {
            server: server.to_owned(),
            port: port.parse().map_err(|_| wrong(format!("`{port}` is no port")))?,
            tcp_mux: true,
            pool_count: 1,
            tls: TunnelTls { ca_pem: settings.ca, pin: settings.pin, ..TunnelTls::default() },
            auth: TunnelAuth { token: settings.token, ..TunnelAuth::default() },
            proxies: Vec::new(),
        };
        let target = Dialer::new(&config, false).map_err(wrong)?;
        Ok(External { config, target, session: tokio::sync::Mutex::default() })
    }

    async fn carrier(&self) -> std::io::Result<(u64, Carrier)> {
        let mut session = self.session.lock().await;
        if let Some((carrier, _)) = &session.carrier {
            return Ok((session.number, carrier.clone()));
        }
        let mut tasks = JoinSet::new();
        let carrier =
            self.target.connect(&mut tasks).await.map_err(|e| std::io::Error::other(e.why))?;
        session.number += 1;
        session.carrier = Some((carrier.clone(), tasks));
        Ok((session.number, carrier))
    }

    /// A stream to a proxy. A session that gives none is replaced once; a refusal is an answer.
    async fn dial(&self, proxy: &str, key: &Secret) -> std::io::Result<Io> {
        let (number, carrier) = self.carrier().await?;
        match visit(&carrier, "", proxy, key).await {
            Ok(io) => return Ok(Box::new(io)),
            Err(e) if e.kind() == std::io::ErrorKind::PermissionDenied => return Err(e),
            Err(_) => {
                let mut session = self.session.lock().await;
                if session.number == number {
                    session.carrier = None;
                }
            }
        }
        Ok(Box::new(visit(&self.carrier().await?.1, "", proxy, key).await?))
    }
}

impl Frps {
    /// A stream to an agent.
    ///
    /// # Errors
    /// When it holds no tunnel, or the server is not reached.
    pub(super) async fn dial(&self, agent: &str, key: &Secret) -> std::io::Result<Io> {
        match self {
            Frps::Own(server) => server.dial(&proxy_name(agent)).await,
            Frps::External(external) => external.dial(&proxy_name(agent), key).await,
        }
    }

    /// Whether an agent's proxy is there, as far as this end knows.
    pub(super) fn has(&self, agent: &str) -> Option<bool> {
        match self {
            Frps::Own(server) => Some(server.has_proxy(&proxy_name(agent))),
            Frps::External(_) => None,
        }
    }

    pub(super) fn tunnels(&self) -> Option<usize> {
        match self {
            Frps::Own(server) => Some(server.proxies().len()),
            Frps::External(_) => None,
        }
    }
}

/// The parts of a plugin call that matter here. On Login the metas stand in the content, later in its user.
#[derive(Default, Deserialize)]
#[serde(default)]
pub(super) struct PluginContent {
    metas: Option<std::collections::BTreeMap<String, String>>,
    user: PluginUser,
    proxy_name: String,
    proxy_type: String,
}

/// On Login `user` is a name, later an object.
#[derive(Deserialize)]
#[serde(untagged)]
enum PluginUser {
    WithMetas {
        #[serde(default)]
        metas: Option<std::collections::BTreeMap<String, String>>,
    },
    Other(#[expect(dead_code, reason = "its shape is all that counts")] Value),
}

impl Default for PluginUser {
    fn default() -> PluginUser {
        PluginUser::Other(Value::Null)
    }
}

/// A call of the plugin.
#[derive(Deserialize)]
pub(super) struct PluginRequest {
    #[serde(default)]
    pub(super) content: PluginContent,
}

impl ControlPlane {
    /// Whether this is the secret of the path at which somebody's frps asks us.
    pub(super) fn is_frps(&self, secret: &str) -> bool {
        matches!(self.inner.frps, Frps::External(_))
            && constant_time_eq(secret, self.frp_secret().expose())
    }

    /// Whether frps is to let somebody in, or why not.
    pub(super) fn plugin(&self, op: &str, content: PluginContent) -> Result<(), String> {
        // who leaves is not asked who he is
        if op == "CloseProxy" {
            return Ok(());
        }
        let metas = match content.user {
            PluginUser::WithMetas { metas: Some(metas) } => metas,
            _ => content.metas.unwrap_or_default(),
        };
        let (owner, _) = self.inner.agent_authorizer.authorize(&metas)?;
        if op == "NewProxy" {
            let proxy = NewProxy {
                proxy_name: content.proxy_name,
                proxy_type: content.proxy_type,
                ..NewProxy::default()
            };
            return super::authorize_proxy(&owner, &proxy);
        }
        Ok(())
    }

    fn frp_secret(&self) -> Secret {
        self.keys().derive("frp-handler", "")
    }

    /// What to put into frps' configuration.
    pub(super) fn frps_config(&self) -> Result<String, HttpError> {
        let Frps::External(external) = &self.inner.frps else {
            return Err(HttpError::new(
                409,
                "own_frps",
                "this control plane is its own FRP server",
                Some("start it with --frps HOST:PORT to use another one"),
            ));
        };
        Ok(format!(
            "# for frps 0.52 and newer; its certificate must fit --frps-ca or --frps-pin\n\
             bindPort = {}\n\
             auth.token = \"the one in --frps-token-file\"\n\
             transport.tls.force = true\n\n\
             [[httpPlugins]]\n\
             name = \"pipeops\"\n\
             addr = \"{}\"\n\
             path = \"/frp/handler/{}\"\n\
             ops = [\"Login\", \"NewProxy\", \"Ping\", \"NewWorkConn\"]\n",
            external.config.port,
            self.url(),
            self.frp_secret().expose()
        ))
    }
}
