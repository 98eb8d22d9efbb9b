//! The self-hosted control plane: registry, tunnel server and gateway in one process, from nothing but a data directory.

mod answer;
mod auth;
pub mod backup;
mod body;
pub mod client;
mod dsn;
pub mod frps;
mod gateway;
pub mod keys;
mod listen;
pub mod model;
mod open;
mod operations;
pub mod outbox;
pub mod registry;
pub mod routes;
mod scope;
mod sessions;
pub mod settings;
pub mod store;

use std::net::{Ipv6Addr, SocketAddr};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use sha2::{Digest as _, Sha256};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::base::error::{Exit, Failure};
use crate::base::secret::{Secret, constant_time_eq};
use crate::contract::types::{Config, RunnerAuth};
use crate::frp::server::{Server, ServerConfig, TunnelAuthorizer, Visitor, signed_by};
use crate::frp::wire::{Login, NewProxy};
use crate::frp::{Proxy, ProxyKind, TunnelAuth, TunnelConfig, TunnelTls};
use crate::host::state::StateDir;
use crate::host::{self, Host};
use auth::Failures;
use frps::{External, ExternalFrps, Frps};
use gateway::{Gateway, proxy_name};
use keys::{Certificate, CertificateFiles, Keys};
use listen::{bind, local_socket};
use open::{check_data_dir, check_keys_match, database};
use outbox::{Broker, BrokerStatus};
use registry::{HttpError, Registry};
use routes::Listeners;
use sessions::Sessions;
use store::Store;

/// Where it keeps what must outlive it, unless said otherwise.
pub const STATE: &str = "/var/lib/pipeops-control-plane";
/// The first administrator's token, until it is used.
const BOOTSTRAP_TOKEN: &str = "admin-token";
/// Socket for the administrator's verbs on this machine.
pub const SOCKET: &str = "admin.sock";
/// What an agent's proof at the tunnel server is derived for.
const TUNNEL: &str = "tunnel";
/// Heartbeats are written this often, and who has come or gone is looked for this often.
const FLUSH: Duration = Duration::from_secs(5);
const LOOK: Duration = Duration::from_secs(1);
/// A tunnel whose client pings and falls silent is given up after this long: frps' own measure, since frpc pings every 30 s.
const HEARTBEAT: Duration = Duration::from_secs(90);
/// Calls under way get this long at the end.
const GRACE: Duration = Duration::from_secs(10);

/// How it is run.
pub struct ControlPlaneConfig {
    pub listen: SocketAddr,
    pub tunnel_listen: SocketAddr,
    /// Names and addresses under which agents and Runners reach it; the first stands in what is handed out.
    pub names: Vec<String>,
    pub database: Option<Secret>,
    /// The message broker that Runners hear of agents from.
    pub broker: Option<Broker>,
    /// Somebody's FRP server, instead of the one in this process.
    pub frps: Option<ExternalFrps>,
    /// Certificate of the HTTPS API, where it is not to be self-made.
    pub certificate: Option<CertificateFiles>,
    pub data_dir: String,
    /// Shows the first administrator's token, and the line that adds the first server, instead of leaving the token in a file.
    pub show: Option<fn(&str, &str)>,
}

/// What all parts of a control plane share; clones are the same one.
#[derive(Clone)]
pub struct ControlPlane {
    inner: Arc<Inner>,
}

struct Inner {
    registry: Arc<Registry>,
    keys: Arc<Keys>,
    store: Store,
    gateway: Gateway,
    frps: Frps,
    agent_authorizer: Arc<AgentAuthorizer>,
    state: StateDir,
    names: Vec<String>,
    port: u16,
    tunnel_port: u16,
    /// The way to the message broker, where there is one.
    broker_status: Option<Arc<BrokerStatus>>,
    /// The HTTPS API's certificate is not ours: what stands here is its CA, as far as clients must be told of it.
    foreign: Mutex<Option<Option<String>>>,
    failures: Mutex<Failures>,
    bootstrap_token_waits: std::sync::atomic::AtomicBool,
    requests: std::sync::atomic::AtomicU64,
    open_connections: std::sync::atomic::AtomicUsize,
    sessions: Sessions,
    listeners: Listeners,
    /// Cancelled when it stops: what would go on for ever ends.
    shutdown: CancellationToken,
}

/// Who may hold a tunnel: an agent that is registered, with its own proof, for its own proxy.
struct AgentAuthorizer {
    registry: Arc<Registry>,
    keys: Arc<Keys>,
}

impl AgentAuthorizer {
    /// The agent whose proof stands in a login's metas, and what ends his session.
    fn authorize(
        &self,
        metas: &std::collections::BTreeMap<String, String>,
    ) -> Result<(String, CancellationToken), String> {
        let agent = metas.get("agent").cloned().unwrap_or_default();
        let shown = metas.get("token").map(String::as_str).unwrap_or_default();
        let proof = self.keys.derive(TUNNEL, &agent);
        let revocation = if constant_time_eq(shown, proof.expose()) {
            self.registry.tunnel(&agent, now())
        } else {
            None
        };
        revocation
            .map(|revocation| (agent, revocation))
            .ok_or_else(|| "this agent may not hold a tunnel here".to_owned())
    }
}

/// Each agent its own proxy, of the type that nobody reaches without its key.
fn authorize_proxy(owner: &str, request: &NewProxy) -> Result<(), String> {
    if request.proxy_type == "stcp" && request.proxy_name == proxy_name(owner) {
        Ok(())
    } else {
        Err(format!("{owner} may open the stcp proxy {} and nothing else", proxy_name(owner)))
    }
}

impl TunnelAuthorizer for AgentAuthorizer {
    fn login(&self, login: &Login) -> Result<(String, CancellationToken), String> {
        self.authorize(&login.metas)
    }

    fn proxy(&self, owner: &str, request: &NewProxy) -> Result<(), String> {
        authorize_proxy(owner, request)
    }

    fn visitor(&self, name: &str, sign_key: &str, timestamp: i64) -> Option<Visitor> {
        // each Runner has a name and a key of his own, so that his streams end with his right to them
        let (proxy, runner) = name.split_once('.')?;
        let agent = proxy.strip_prefix(&proxy_name(""))?;
        let revoked = self.registry.runner_revocation(agent, runner, now())?;
        let key = self.keys.stcp_key(agent, Some(runner));
        signed_by(&key, sign_key, timestamp).then(|| Visitor { proxy: proxy.into(), key, revoked })
    }
}

fn url(name: &str, port: u16) -> String {
    if name.parse::<Ipv6Addr>().is_ok() {
        format!("https://[{name}]:{port}")
    } else {
        format!("https://{name}:{port}")
    }
}

fn lock<T>(what: &Mutex<T>) -> MutexGuard<'_, T> {
    what.lock().unwrap_or_else(PoisonError::into_inner)
}

fn now() -> i64 {
    jiff::Timestamp::now().as_second()
}

/// Runs a control plane until `stop`. `ready` hears its addresses once it serves.
///
/// # Errors
/// Port taken, database unusable, data directory or keys unreadable.
pub async fn run(
    host: &Host,
    config: ControlPlaneConfig,
    stop: CancellationToken,
    ready: impl FnOnce(SocketAddr, Option<SocketAddr>),
) -> anyhow::Result<()> {
    host::raise_descriptor_limit();
    let state = check_data_dir(host.state_dir(&config.data_dir))?;
    // a second one on the same data would undo what the first one writes
    let _only = check_data_dir(state.lock())?;
    let made = check_data_dir(Keys::stored(&state))?.is_none();
    let keys = Arc::new(check_data_dir(Keys::load(&state, now()))?);
    let broker = match config.broker {
        Some(broker) => Some(Broker { url: outbox::check(&broker.url)?, ..broker }),
        None => None,
    };
    let external = config.frps.map(External::new).transpose()?.map(Arc::new);
    let listener = bind(config.listen, "the control plane", "--listen").await?;
    let tunnel = match external {
        Some(_) => None,
        None => Some(bind(config.tunnel_listen, "the tunnel server", "--tunnel-listen").await?),
    };
    let address = listener.local_addr()?;
    let tunnel_address = tunnel.as_ref().map(tokio::net::TcpListener::local_addr).transpose()?;
    let store = database(host, &config.data_dir, &state, config.database).await?;
    check_keys_match(&store, &keys, &config.data_dir).await.inspect_err(|_| {
        if made {
            Keys::forget(&state);
        }
    })?;
    let registry = Arc::new(
        Registry::load(
            store.clone(),
            broker.as_ref().map(|_| url(&config.names[0], address.port())),
            now(),
        )
        .await?,
    );
    let socket = local_socket(host, &config.data_dir)?;
    let mut certificate =
        Certificate::new(&keys, config.names.clone(), config.certificate, host, now())?;
    let agent_authorizer =
        Arc::new(AgentAuthorizer { registry: registry.clone(), keys: keys.clone() });
    let own = Server::new(ServerConfig {
        token: keys.tunnel_token.clone(),
        tls: Some(certificate.tunnel.clone()),
        tcp_mux: true,
        tcp_bind: None,
        heartbeat: HEARTBEAT,
        authorizer: Some(agent_authorizer.clone()),
    });
    let frps = external.map_or_else(|| Frps::Own(own.clone()), Frps::External);
    let control_plane = ControlPlane {
        inner: Arc::new(Inner {
            gateway: Gateway::new(frps.clone(), registry.clone(), keys.clone()),
            registry: registry.clone(),
            keys,
            store: store.clone(),
            frps,
            agent_authorizer,
            state,
            names: config.names,
            port: address.port(),
            tunnel_port: tunnel_address.map_or(0, |a| a.port()),
            broker_status: broker.as_ref().map(|_| Arc::default()),
            foreign: Mutex::new(certificate.foreign()),
            failures: Mutex::default(),
            bootstrap_token_waits: false.into(),
            requests: 0.into(),
            open_connections: 0.into(),
            sessions: Sessions::default(),
            listeners: Listeners::default(),
            shutdown: stop.clone(),
        }),
    };
    control_plane.bootstrap(config.show).await?;
    // whoever listens now is told of everybody who is there
    let told = if broker.is_some() { "yes" } else { "no" };
    if broker.is_some() && store.metadata("tells").await?.as_deref() != Some(told) {
        registry.announce_all(now()).await?;
    }
    store.set_metadata("tells", told).await?;
    let mut tasks = JoinSet::new();
    let halt = CancellationToken::new();
    if let (Some(broker), Some(broker_status)) = (broker, &control_plane.inner.broker_status) {
        tasks.spawn(outbox::run(store.clone(), broker, broker_status.clone(), halt.clone()));
    }
    if let Some(tunnel) = tunnel {
        let halt = halt.clone();
        tasks.spawn(async move { own.serve(tunnel, halt).await });
    }
    let router = routes::router(control_plane.clone());
    tasks.spawn(control_plane.clone().local(router.clone(), socket, halt.clone()));
    tasks.spawn(control_plane.clone().https(
        router,
        listener,
        certificate.config.clone(),
        stop.clone(),
        halt.clone(),
    ));
    ready(address, tunnel_address);
    let mut flush = tokio::time::interval(FLUSH);
    flush.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut look = tokio::time::interval(LOOK);
    look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut lost = false;
    let in_flight = operations::InFlight::default();
    loop {
        tokio::select! {
            () = stop.cancelled() => break,
            () = store.lost() => {
                lost = true;
                stop.cancel();
                break;
            }
            _ = look.tick() => {
                if let Err(error) = registry.announce_liveness(now()).await {
                    tracing::warn!(error = format!("{error:#}"), "who has come and gone is not written");
                }
                control_plane.deliver(&in_flight, now());
            }
            _ = flush.tick() => {
                if let Err(error) = registry.flush().await {
                    tracing::warn!(error = format!("{error:#}"), "heartbeats are not written");
                }
                if let Err(error) = registry.tidy_jobs(now()).await {
                    tracing::warn!(error = format!("{error:#}"), "the end of what has waited too long is not written");
                }
                if let Err(error) = registry.tidy_accesses(now()).await {
                    tracing::warn!(error = format!("{error:#}"), "kubeconfigs whose time is over are not forgotten");
                }
                if let Err(error) = control_plane.inner.keys.rotate(&control_plane.inner.state, now()) {
                    tracing::warn!(error = format!("{error:#}"), "the signing keys are not turned");
                }
                let renewed = certificate.renew(&control_plane.inner.keys, host, now());
                *lock(&control_plane.inner.foreign) = certificate.foreign();
                if let Err(error) = renewed {
                    tracing::warn!(error = format!("{error:#}"), "the certificate is not renewed");
                }
            }
        }
    }
    // what was begun is finished, what is long ends
    let _ = timeout(GRACE, async {
        while control_plane.open_connections() > 0 {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
    .await;
    halt.cancel();
    let _ =
        timeout(Duration::from_secs(2), async { while tasks.join_next().await.is_some() {} }).await;
    let last = registry.flush().await;
    store.close().await;
    if lost {
        return Err(Failure::new(
            Exit::Locked,
            "DATABASE_TAKEN",
            "another control plane has taken the database over",
        )
        .hint("run one control plane on a database, or give each its own")
        .into());
    }
    last.context("writing the last heartbeats")
}

impl ControlPlane {
    fn registry(&self) -> &Registry {
        &self.inner.registry
    }

    fn keys(&self) -> &Keys {
        &self.inner.keys
    }

    fn gateway(&self) -> &Gateway {
        &self.inner.gateway
    }

    /// One more request that has a route.
    fn count_request(&self) {
        self.inner.requests.fetch_add(1, Relaxed);
    }

    /// Names this control plane in tokens: another one's are not taken for ours.
    fn issuer(&self) -> String {
        self.inner.keys.ca_pin.clone()
    }

    fn url(&self) -> String {
        url(&self.inner.names[0], self.inner.port)
    }

    /// Where the FRP server is, and how its clients know it.
    fn tunnel_endpoint(&self) -> TunnelConfig {
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

    fn tunnel_open(&self, agent: &str) -> Option<bool> {
        self.inner.frps.has(agent)
    }

    /// Name and key under which the FRP server in use lets somebody visit an agent.
    fn visitor_credentials(&self, agent: &str, runner: Option<&str>) -> (String, Secret) {
        // somebody else's frps knows the proxy's own name and key alone
        let runner = runner.filter(|_| matches!(self.inner.frps, Frps::Own(_)));
        let name =
            runner.map_or_else(|| proxy_name(agent), |id| format!("{}.{id}", proxy_name(agent)));
        (name, self.inner.keys.stcp_key(agent, runner))
    }

    /// Connections that are open.
    fn open_connections(&self) -> usize {
        self.inner.open_connections.load(Relaxed)
    }

    /// A project to begin with, and the first administrator.
    async fn bootstrap(&self, show: Option<fn(&str, &str)>) -> anyhow::Result<()> {
        let failed = |r: HttpError| anyhow::anyhow!("{}", r.message);
        if self.registry().projects().is_empty() {
            self.registry().add_project("default", now()).await.map_err(failed)?;
        }
        let waiting = self.inner.state.read(BOOTSTRAP_TOKEN)?.is_some();
        self.inner.bootstrap_token_waits.store(waiting, Relaxed);
        if !self.registry().admins().is_empty() {
            return Ok(());
        }
        // the administrator comes last: until then the next start begins anew
        let line = match show {
            Some(_) => {
                let added = self
                    .registry()
                    .add_enrolment(self.keys(), "default", "first", scope::DAY, Some(1), now())
                    .await;
                self.install_line(&added.map_err(failed)?.1)
            }
            None => String::new(),
        };
        let (_, token) =
            self.registry().add_admin(self.keys(), "first", now()).await.map_err(failed)?;
        match show {
            Some(show) => show(token.expose(), &line),
            None => {
                self.inner.state.write(BOOTSTRAP_TOKEN, token.expose())?;
                self.inner.bootstrap_token_waits.store(true, Relaxed);
            }
        }
        Ok(())
    }

    /// An administrator is there: the file with the first token has done its work.
    fn remove_bootstrap_token(&self) {
        if self.inner.bootstrap_token_waits.swap(false, Relaxed) {
            self.inner.state.remove(BOOTSTRAP_TOKEN);
        }
    }

    /// Settings of an agent. They follow from what is known, so their version is a digest of them.
    fn config(&self, agent: &str) -> Config {
        let keys = self.keys();
        let mut tunnel = self.tunnel_endpoint();
        let metas = [
            ("agent".to_owned(), agent.to_owned()),
            ("token".to_owned(), keys.derive(TUNNEL, agent).expose().to_owned()),
        ];
        tunnel.auth.metas = metas.into();
        tunnel.proxies = vec![Proxy {
            name: proxy_name(agent),
            kind: ProxyKind::Stcp,
            secret_key: self.inner.keys.stcp_key(agent, None),
            ..Proxy::default()
        }];
        let mut config = Config {
            config_version: 0,
            heartbeat_interval_s: registry::HEARTBEAT,
            status_interval_s: registry::STATUS,
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
    fn install_line(&self, token: &Secret) -> String {
        // without one the system's roots know the certificate
        let pin = self.shown_ca().and_then(|ca| keys::pin_of(&ca));
        let pin = pin.map(|pin| format!(" --control-plane-pin {pin}")).unwrap_or_default();
        // on standard input: what stands on a command line is everybody's to read
        format!(
            "echo {} | sudo pipeops install-server --yes --agent-token-file - --control-plane-url {}{pin}",
            token.expose(),
            self.url()
        )
    }

    /// The CA that clients of the HTTPS API must be told of, PEM.
    fn shown_ca(&self) -> Option<String> {
        lock(&self.inner.foreign)
            .clone()
            .unwrap_or_else(|| Some(self.keys().ca_certificate.clone()))
    }

    /// Prometheus text.
    fn metrics(&self, now: i64) -> String {
        use std::fmt::Write as _;
        let mut text = String::from("# TYPE pipeops_agents gauge\n");
        for (state, count) in self.registry().count_by_liveness(now) {
            let _ = writeln!(text, "pipeops_agents{{state=\"{state}\"}} {count}");
        }
        let requests = self.inner.requests.load(Relaxed);
        if let Some(tunnels) = self.inner.frps.tunnels() {
            let _ = writeln!(text, "# TYPE pipeops_tunnels gauge\npipeops_tunnels {tunnels}");
        }
        let _ = writeln!(
            text,
            "# TYPE pipeops_requests_total counter\npipeops_requests_total {requests}"
        );
        if let Some(broker_status) = &self.inner.broker_status {
            let _ = writeln!(
                text,
                "# TYPE pipeops_broker_up gauge\npipeops_broker_up {}",
                u8::from(broker_status.down().is_none())
            );
            for (name, kind, value) in [
                ("pipeops_events_waiting", "gauge", broker_status.waiting.load(Relaxed)),
                (
                    "pipeops_events_sent_total",
                    "counter",
                    broker_status.sent.load(Relaxed).cast_signed(),
                ),
                (
                    "pipeops_events_dropped_total",
                    "counter",
                    broker_status.dropped.load(Relaxed).cast_signed(),
                ),
            ] {
                let _ = writeln!(text, "# TYPE {name} {kind}\n{name} {value}");
            }
        }
        text
    }
}
