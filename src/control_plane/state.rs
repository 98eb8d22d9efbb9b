//! What the parts of a running control plane share, and what follows from it: its addresses, the
//! settings of its agents.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize};

use parking_lot::Mutex;
use sha2::{Digest as _, Sha256};
use tokio_util::sync::CancellationToken;

use super::agent_client::AgentClients;
use super::frps::{Frps, proxy_name};
use super::keys::{self, Keys};
use super::listeners::ChangesListeners;
use super::outbox::BrokerStatus;
use super::rate_limit::FailureLimiter;
use super::registry::{self, Registry};
use super::sessions::Sessions;
use super::settings::https_url;
use super::store::Store;
use super::tunnel::{AgentAuthorizer, TUNNEL_PROOF};
use crate::base::secret::Secret;
use crate::contract::types::{Config, RunnerAuth};
use crate::frp::{Proxy, ProxyKind, TunnelAuth, TunnelConfig, TunnelTls};
use crate::host::state::StateDir;

/// A running control plane; clones share it.
#[derive(Clone)]
pub(super) struct ControlPlane {
    pub(super) inner: Arc<Inner>,
}

pub(super) struct Inner {
    pub(super) registry: Arc<Registry>,
    pub(super) keys: Arc<Keys>,
    pub(super) store: Store,
    pub(super) agent_clients: AgentClients,
    pub(super) frps: Frps,
    pub(super) agent_authorizer: Arc<AgentAuthorizer>,
    pub(super) state: StateDir,
    pub(super) names: Vec<String>,
    pub(super) port: u16,
    pub(super) tunnel_port: u16,
    /// The state of the connection to the message broker, where there is one.
    pub(super) broker_status: Option<Arc<BrokerStatus>>,
    /// Set where the certificate of the HTTPS API comes from files: its CA, if clients need it.
    pub(super) external_ca: Mutex<Option<Option<String>>>,
    pub(super) failures: FailureLimiter,
    /// Whether the file with the first administrator's token is still there.
    pub(super) bootstrap_token_exists: AtomicBool,
    pub(super) requests: AtomicU64,
    pub(super) open_connections: AtomicUsize,
    pub(super) sessions: Sessions,
    pub(super) listeners: ChangesListeners,
    /// Cancelled when it stops: endless streams end.
    pub(super) shutdown: CancellationToken,
}

impl ControlPlane {
    pub(super) fn registry(&self) -> &Registry {
        &self.inner.registry
    }

    pub(super) fn keys(&self) -> &Keys {
        &self.inner.keys
    }

    pub(super) fn agent_clients(&self) -> &AgentClients {
        &self.inner.agent_clients
    }

    /// One more request that has a route.
    pub(super) fn count_request(&self) {
        self.inner.requests.fetch_add(1, Relaxed);
    }

    /// The issuer of our tokens: those of another control plane are refused.
    pub(super) fn issuer(&self) -> String {
        self.keys().ca_pin.clone()
    }

    pub(super) fn url(&self) -> String {
        https_url(&self.inner.names[0], self.inner.port)
    }

    /// Where the FRP server is, and how its clients know it.
    pub(super) fn tunnel_endpoint(&self) -> TunnelConfig {
        match &self.inner.frps {
            Frps::External(external) => external.config.clone(),
            Frps::Own(_) => TunnelConfig {
                server: self.inner.names[0].clone(),
                port: self.inner.tunnel_port,
                tcp_mux: true,
                pool_count: 1,
                tls: TunnelTls { pin: Some(self.keys().ca_pin.clone()), ..TunnelTls::default() },
                auth: TunnelAuth {
                    token: self.keys().tunnel_token.clone(),
                    ..TunnelAuth::default()
                },
                proxies: Vec::new(),
            },
        }
    }

    pub(super) fn tunnel_open(&self, agent: &str) -> Option<bool> {
        self.inner.frps.has(agent)
    }

    /// Name and key with which a visitor reaches an agent through the FRP server in use.
    pub(super) fn visitor_credentials(
        &self,
        agent: &str,
        runner: Option<&str>,
    ) -> (String, Secret) {
        // an external frps knows only the name and key of the proxy itself
        let runner = runner.filter(|_| matches!(self.inner.frps, Frps::Own(_)));
        let name =
            runner.map_or_else(|| proxy_name(agent), |id| format!("{}.{id}", proxy_name(agent)));
        (name, self.keys().stcp_key(agent, runner))
    }

    /// Connections that are open.
    pub(super) fn open_connections(&self) -> usize {
        self.inner.open_connections.load(Relaxed)
    }

    /// Settings of an agent. They follow from what is known, so their version is a digest of them.
    pub(super) fn config(&self, agent: &str) -> Config {
        let keys = self.keys();
        let mut tunnel = self.tunnel_endpoint();
        let metas = [
            ("agent".to_owned(), agent.to_owned()),
            ("token".to_owned(), keys.derive(TUNNEL_PROOF, agent).expose().to_owned()),
        ];
        tunnel.auth.metas = metas.into();
        tunnel.proxies = vec![Proxy {
            name: proxy_name(agent),
            kind: ProxyKind::Stcp,
            secret_key: self.keys().stcp_key(agent, None),
            ..Proxy::default()
        }];
        let mut config = Config {
            config_version: 0,
            heartbeat_interval_s: registry::HEARTBEAT_INTERVAL_S,
            status_interval_s: registry::STATUS_INTERVAL_S,
            tunnel: Some(tunnel),
            runner_auth: RunnerAuth {
                issuer: self.issuer(),
                audience: agent.into(),
                jwks: keys.jwks(),
            },
        };
        let digest = Sha256::digest(serde_json::to_vec(&config).unwrap_or_default());
        // 48 bits: every JSON reader holds them whole
        config.config_version = digest.iter().take(6).fold(0, |n, b| n << 8 | u64::from(*b));
        config
    }

    /// The line to paste on a VM.
    pub(super) fn install_line(&self, token: &Secret) -> String {
        let pin = self.client_pin();
        let pin = pin.map(|pin| format!(" --control-plane-pin {pin}")).unwrap_or_default();
        // on standard input: a command line can be read by all users
        format!(
            "echo {} | sudo pipeops install-server --yes --agent-token-file - \
             --control-plane-url {}{pin}",
            token.expose(),
            self.url()
        )
    }

    /// The line with which a user logs in; the token goes to its standard input.
    pub(super) fn login_line(&self) -> String {
        let pin = self.client_pin().map(|pin| format!(" --pin {pin}")).unwrap_or_default();
        format!("pipeops login {}{pin}", self.url())
    }

    /// The pin that clients of the HTTPS API must be told of. Without one the system's roots trust
    /// its certificate.
    fn client_pin(&self) -> Option<String> {
        self.client_ca().and_then(|ca| keys::pin_of(&ca)).map(|pin| pin.to_string())
    }

    /// The CA that clients of the HTTPS API must be told of, PEM.
    pub(super) fn client_ca(&self) -> Option<String> {
        self.inner
            .external_ca
            .lock()
            .clone()
            .unwrap_or_else(|| Some(self.keys().ca_certificate.clone()))
    }
}
