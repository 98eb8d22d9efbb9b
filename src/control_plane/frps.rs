//! The FRP server to which agents open their tunnels: the one in this process, or an external frps,
//! which we reach as a visitor (frp `server/visitor/visitor.go`).

use std::sync::Arc;

use tokio::task::JoinSet;

use crate::base::error::Failure;
use crate::base::secret::Secret;
use crate::frp::client::visit;
use crate::frp::codec::Io;
use crate::frp::dial::{Connector, Dialer};
use crate::frp::server::Server;
use crate::frp::{TunnelAuth, TunnelConfig, TunnelTls};

/// An external frps.
pub struct ExternalFrps {
    /// HOST:PORT.
    pub address: String,
    pub token: Secret,
    /// What makes its certificate acceptable: its CA in PEM, or a pin.
    pub ca: Option<String>,
    pub pin: Option<String>,
}

/// The connection to it.
pub(super) struct External {
    pub(super) config: TunnelConfig,
    dialer: Dialer,
    /// One session carries all streams; its tasks end with it.
    session: tokio::sync::Mutex<FrpsSession>,
}

#[derive(Default)]
struct FrpsSession {
    /// Counts sessions, so that a caller with an old one does not end its successor.
    number: u64,
    connector: Option<(Connector, JoinSet<()>)>,
}

/// The name of an agent's proxy.
pub(super) fn proxy_name(agent: &str) -> String {
    format!("agent-{agent}")
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
        let dialer = Dialer::new(&config, false).map_err(wrong)?;
        Ok(External { config, dialer, session: tokio::sync::Mutex::default() })
    }

    async fn connector(&self) -> std::io::Result<(u64, Connector)> {
        let mut session = self.session.lock().await;
        if let Some((connector, _)) = &session.connector {
            return Ok((session.number, connector.clone()));
        }
        let mut tasks = JoinSet::new();
        let connector =
            self.dialer.connect(&mut tasks).await.map_err(|e| std::io::Error::other(e.why))?;
        session.number += 1;
        session.connector = Some((connector.clone(), tasks));
        Ok((session.number, connector))
    }

    /// A stream to a proxy. A session that gives none is replaced once; a refusal is an answer.
    async fn dial(&self, proxy: &str, key: &Secret) -> std::io::Result<Io> {
        let (number, connector) = self.connector().await?;
        match visit(&connector, "", proxy, key).await {
            Ok(io) => return Ok(Box::new(io)),
            Err(e) if e.kind() == std::io::ErrorKind::PermissionDenied => return Err(e),
            Err(_) => {
                let mut session = self.session.lock().await;
                if session.number == number {
                    session.connector = None;
                }
            }
        }
        Ok(Box::new(visit(&self.connector().await?.1, "", proxy, key).await?))
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
