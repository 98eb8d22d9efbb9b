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
use open::{belong_together, database, usable};
use outbox::{Broker, Way};
use registry::{Refused, Registry};
use routes::Listeners;
use sessions::Sessions;
use store::Store;

/// Where it keeps what must outlive it, unless said otherwise.
pub const STATE: &str = "/var/lib/pipeops-control-plane";
/// The first administrator's token, until it is used.
const FIRST_TOKEN: &str = "admin-token";
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
pub struct HubConfig {
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
pub struct Hub {
    inner: Arc<Inner>,
}

struct Inner {
    registry: Arc<Registry>,
    keys: Arc<Keys>,
    store: Store,
    gateway: Gateway,
    frps: Frps,
    gate: Arc<Gate>,
    state: StateDir,
    names: Vec<String>,
    port: u16,
    tunnel_port: u16,
    /// The way to the message broker, where there is one.
    way: Option<Arc<Way>>,
    /// The HTTPS API's certificate is not ours: what stands here is its CA, as far as clients must be told of it.
    foreign: Mutex<Option<Option<String>>>,
    failures: Mutex<Failures>,
    first_token: std::sync::atomic::AtomicBool,
    requests: std::sync::atomic::AtomicU64,
    busy: std::sync::atomic::AtomicUsize,
    sessions: Sessions,
    listeners: Listeners,
    /// Cancelled when it stops: what would go on for ever ends.
    ending: CancellationToken,
}

/// Who may hold a tunnel: an agent that is registered, with its own proof, for its own proxy.
struct Gate {
    registry: Arc<Registry>,
    keys: Arc<Keys>,
}

impl Gate {
    /// The agent whose proof stands in a login's metas, and what ends his session.
    fn admitted(
        &self,
        metas: &std::collections::BTreeMap<String, String>,
    ) -> Result<(String, CancellationToken), String> {
        let agent = metas.get("agent").cloned().unwrap_or_default();
        let shown = metas.get("token").map(String::as_str).unwrap_or_default();
        let proof = self.keys.derived(TUNNEL, &agent);
        let over = if constant_time_eq(shown, proof.expose()) {
            self.registry.tunnel(&agent, now())
        } else {
            None
        };
        over.map(|over| (agent, over))
            .ok_or_else(|| "this agent may not hold a tunnel here".to_owned())
    }
}

/// Each agent its own proxy, of the type that nobody reaches without its key.
fn may_open(owner: &str, asked: &NewProxy) -> Result<(), String> {
    if asked.proxy_type == "stcp" && asked.proxy_name == proxy_name(owner) {
        Ok(())
    } else {
        Err(format!("{owner} may open the stcp proxy {} and nothing else", proxy_name(owner)))
    }
}

impl TunnelAuthorizer for Gate {
    fn login(&self, login: &Login) -> Result<(String, CancellationToken), String> {
        self.admitted(&login.metas)
    }

    fn proxy(&self, owner: &str, asked: &NewProxy) -> Result<(), String> {
        may_open(owner, asked)
    }

    fn visitor(&self, name: &str, sign_key: &str, timestamp: i64) -> Option<Visitor> {
        // each Runner has a name and a key of his own, so that his streams end with his right to them
        let (proxy, runner) = name.split_once('.')?;
        let agent = proxy.strip_prefix(&proxy_name(""))?;
        let revoked = self.registry.runner_of(agent, runner, now())?;
        let key = self.keys.stcp(agent, Some(runner));
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
    config: HubConfig,
    stop: CancellationToken,
    ready: impl FnOnce(SocketAddr, Option<SocketAddr>),
) -> anyhow::Result<()> {
    host::raise_descriptor_limit();
    let state = usable(host.state_dir(&config.data_dir))?;
    // a second one on the same data would undo what the first one writes
    let _only = usable(state.lock())?;
    let made = usable(Keys::stored(&state))?.is_none();
    let keys = Arc::new(usable(Keys::load(&state, now()))?);
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
    belong_together(&store, &keys, &config.data_dir).await.inspect_err(|_| {
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
    let gate = Arc::new(Gate { registry: registry.clone(), keys: keys.clone() });
    let own = Server::new(ServerConfig {
        token: keys.tunnel_token.clone(),
        tls: Some(certificate.tunnel.clone()),
        tcp_mux: true,
        tcp_bind: None,
        heartbeat: HEARTBEAT,
        authorizer: Some(gate.clone()),
    });
    let frps = external.map_or_else(|| Frps::Own(own.clone()), Frps::External);
    let hub = Hub {
        inner: Arc::new(Inner {
            gateway: Gateway::new(frps.clone(), registry.clone(), keys.clone()),
            registry: registry.clone(),
            keys,
            store: store.clone(),
            frps,
            gate,
            state,
            names: config.names,
            port: address.port(),
            tunnel_port: tunnel_address.map_or(0, |a| a.port()),
            way: broker.as_ref().map(|_| Arc::default()),
            foreign: Mutex::new(certificate.foreign()),
            failures: Mutex::default(),
            first_token: false.into(),
            requests: 0.into(),
            busy: 0.into(),
            sessions: Sessions::default(),
            listeners: Listeners::default(),
            ending: stop.clone(),
        }),
    };
    hub.first_steps(config.show).await?;
    // whoever listens now is told of everybody who is there
    let told = if broker.is_some() { "yes" } else { "no" };
    if broker.is_some() && store.noted("tells").await?.as_deref() != Some(told) {
        registry.tell_all(now()).await?;
    }
    store.note("tells", told).await?;
    let mut tasks = JoinSet::new();
    let halt = CancellationToken::new();
    if let (Some(broker), Some(way)) = (broker, &hub.inner.way) {
        tasks.spawn(outbox::run(store.clone(), broker, way.clone(), halt.clone()));
    }
    if let Some(tunnel) = tunnel {
        let halt = halt.clone();
        tasks.spawn(async move { own.serve(tunnel, halt).await });
    }
    let router = routes::router(hub.clone());
    tasks.spawn(hub.clone().local(router.clone(), socket, halt.clone()));
    tasks.spawn(hub.clone().https(
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
    let under_way = operations::UnderWay::default();
    loop {
        tokio::select! {
            () = stop.cancelled() => break,
            () = store.lost() => {
                lost = true;
                stop.cancel();
                break;
            }
            _ = look.tick() => {
                if let Err(error) = registry.look(now()).await {
                    tracing::warn!(error = format!("{error:#}"), "who has come and gone is not written");
                }
                hub.deliver(&under_way, now());
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
                if let Err(error) = hub.inner.keys.turn(&hub.inner.state, now()) {
                    tracing::warn!(error = format!("{error:#}"), "the signing keys are not turned");
                }
                let renewed = certificate.renew(&hub.inner.keys, host, now());
                *lock(&hub.inner.foreign) = certificate.foreign();
                if let Err(error) = renewed {
                    tracing::warn!(error = format!("{error:#}"), "the certificate is not renewed");
                }
            }
        }
    }
    // what was begun is finished, what is long ends
    let _ = timeout(GRACE, async {
        while hub.busy() > 0 {
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

impl Hub {
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
    fn tunnel_place(&self) -> TunnelConfig {
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
    fn visit(&self, agent: &str, runner: Option<&str>) -> (String, Secret) {
        // somebody else's frps knows the proxy's own name and key alone
        let runner = runner.filter(|_| matches!(self.inner.frps, Frps::Own(_)));
        let name =
            runner.map_or_else(|| proxy_name(agent), |id| format!("{}.{id}", proxy_name(agent)));
        (name, self.inner.keys.stcp(agent, runner))
    }

    /// Connections that are open.
    fn busy(&self) -> usize {
        self.inner.busy.load(Relaxed)
    }

    /// A project to begin with, and the first administrator.
    async fn first_steps(&self, show: Option<fn(&str, &str)>) -> anyhow::Result<()> {
        let failed = |r: Refused| anyhow::anyhow!("{}", r.message);
        if self.registry().projects().is_empty() {
            self.registry().add_project("default", now()).await.map_err(failed)?;
        }
        let waiting = self.inner.state.read(FIRST_TOKEN)?.is_some();
        self.inner.first_token.store(waiting, Relaxed);
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
                self.inner.state.write(FIRST_TOKEN, token.expose())?;
                self.inner.first_token.store(true, Relaxed);
            }
        }
        Ok(())
    }

    /// An administrator is there: the file with the first token has done its work.
    fn admin_seen(&self) {
        if self.inner.first_token.swap(false, Relaxed) {
            self.inner.state.remove(FIRST_TOKEN);
        }
    }

    /// Settings of an agent. They follow from what is known, so their version is a digest of them.
    fn config(&self, agent: &str) -> Config {
        let keys = self.keys();
        let mut tunnel = self.tunnel_place();
        let metas = [
            ("agent".to_owned(), agent.to_owned()),
            ("token".to_owned(), keys.derived(TUNNEL, agent).expose().to_owned()),
        ];
        tunnel.auth.metas = metas.into();
        tunnel.proxies = vec![Proxy {
            name: proxy_name(agent),
            kind: ProxyKind::Stcp,
            secret_key: self.inner.keys.stcp(agent, None),
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
        for (state, count) in self.registry().census(now) {
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
        if let Some(way) = &self.inner.way {
            let _ = writeln!(
                text,
                "# TYPE pipeops_broker_up gauge\npipeops_broker_up {}",
                u8::from(way.down().is_none())
            );
            for (name, kind, value) in [
                ("pipeops_events_waiting", "gauge", way.waiting.load(Relaxed)),
                ("pipeops_events_sent_total", "counter", way.sent.load(Relaxed).cast_signed()),
                (
                    "pipeops_events_dropped_total",
                    "counter",
                    way.dropped.load(Relaxed).cast_signed(),
                ),
            ] {
                let _ = writeln!(text, "# TYPE {name} {kind}\n{name} {value}");
            }
        }
        text
    }
}
