//! The self-hosted control plane: registry, tunnel server and gateway in one process.

mod agent_client;
mod answer;
mod auth;
pub mod backup;
mod body;
mod bootstrap;
mod caller_token;
pub mod certificate;
pub mod client;
mod clock;
mod error;
pub mod frps;
mod frps_plugin;
mod gateway;
mod job_refusal;
mod job_tokens;
mod jobs;
pub mod keys;
mod listen;
mod listeners;
mod login;
mod metrics;
pub mod model;
mod open;
mod operations;
pub mod outbox;
mod rate_limit;
pub mod registry;
pub mod rollout;
mod rollouts;
pub mod routes;
mod scope;
mod sessions;
pub mod settings;
mod state;
pub mod store;
mod tunnel;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use parking_lot::Mutex;
use tokio::net::{TcpListener, UnixListener};
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, timeout};
use tokio_util::sync::CancellationToken;

use crate::base::error::{Exit, Failure};
use crate::base::secret::Secret;
use crate::base::task::boxed;
use crate::broker::{self, Broker};
use crate::frp::server::{Server, ServerConfig};
use crate::host::state::StateDir;
use crate::host::{self, Host};
use agent_client::AgentClients;
use certificate::{Certificate, CertificateFiles};
use clock::now;
use frps::{External, ExternalFrps, Frps};
use keys::Keys;
use listen::{bind, local_socket};
use listeners::ChangesListeners;
use open::{check_data_dir, check_keys_match, database};
use rate_limit::FailureLimiter;
use registry::Registry;
use sessions::Sessions;
use settings::https_url;
use state::{ControlPlane, Inner};
use tunnel::AgentAuthorizer;

pub use client::SOCKET;
pub use scope::YEAR as LONGEST_TTL;

/// The default data directory.
pub const STATE: &str = "/var/lib/pipeops-control-plane";
/// Heartbeats are written this often.
const FLUSH: Duration = Duration::from_secs(5);
/// Agents that have come or gone are announced this often.
const ANNOUNCE: Duration = Duration::from_secs(1);
/// A tunnel whose client pings and falls silent is closed after this long. frps has the same limit,
/// since frpc pings every 30 s.
const TUNNEL_HEARTBEAT: Duration = Duration::from_secs(90);
/// Open connections get this long at the end.
const GRACE: Duration = Duration::from_secs(10);

/// How a control plane is run.
pub struct ControlPlaneConfig {
    pub listen: SocketAddr,
    pub tunnel_listen: SocketAddr,
    /// Names and addresses under which agents and Runners reach it; the first is handed out.
    pub names: Vec<String>,
    pub database: Option<Secret>,
    /// The message broker for events.
    pub broker: Option<Broker>,
    /// An external FRP server, instead of the one in this process.
    pub frps: Option<ExternalFrps>,
    /// Certificate of the HTTPS API, instead of one by our own CA.
    pub certificate: Option<CertificateFiles>,
    pub data_dir: String,
    /// Shows the first administrator's token, and the line that adds the first server, instead of
    /// leaving the token in a file.
    pub show: Option<fn(&str, &str)>,
}

/// A control plane that is not served yet, and what it is served with.
struct Opened {
    control_plane: ControlPlane,
    certificate: Certificate,
    tunnel_server: Server,
    broker: Option<Broker>,
    https: TcpListener,
    tunnel: Option<TcpListener>,
    socket: UnixListener,
}

/// Runs a control plane until `stop`. `ready` is called with its addresses once it serves.
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
    let show = config.show;
    let opened = open(host, state, config, stop.clone()).await?;
    let control_plane = opened.control_plane.clone();
    control_plane.bootstrap(show).await?;
    announce_existing(&control_plane, opened.broker.is_some()).await?;
    let address = opened.https.local_addr()?;
    let tunnel_address = opened.tunnel.as_ref().map(TcpListener::local_addr).transpose()?;
    let halt = CancellationToken::new();
    let (mut tasks, mut certificate) = serve(opened, &stop, &halt);
    ready(address, tunnel_address);
    let lost = maintain(&control_plane, &mut certificate, host, &stop).await;
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
    let last = control_plane.registry().flush().await;
    control_plane.inner.store.close().await;
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

/// Opens all that a control plane needs: keys, ports, database, registry, certificate.
async fn open(
    host: &Host,
    state: StateDir,
    config: ControlPlaneConfig,
    stop: CancellationToken,
) -> anyhow::Result<Opened> {
    let made = check_data_dir(Keys::stored(&state))?.is_none();
    let keys = Arc::new(check_data_dir(Keys::load(&state, now()))?);
    let broker = match config.broker {
        Some(broker) => Some(Broker { url: broker::check(&broker.url)?, ..broker }),
        None => None,
    };
    let external = config.frps.map(External::new).transpose()?.map(Arc::new);
    let https = bind(config.listen, "the control plane", "--listen").await?;
    let tunnel = match external {
        Some(_) => None,
        None => Some(bind(config.tunnel_listen, "the tunnel server", "--tunnel-listen").await?),
    };
    let port = https.local_addr()?.port();
    let tunnel_port = tunnel.as_ref().map(TcpListener::local_addr).transpose()?;
    let store = database(host, &config.data_dir, &state, config.database).await?;
    check_keys_match(&store, &keys, &config.data_dir).await.inspect_err(|_| {
        if made {
            Keys::discard(&state);
        }
    })?;
    let event_base_url = broker.as_ref().map(|_| https_url(&config.names[0], port));
    let registry = Arc::new(Registry::load(store.clone(), event_base_url, now()).await?);
    let socket = local_socket(host, &config.data_dir)?;
    let certificate =
        Certificate::new(&keys, config.names.clone(), config.certificate, host, now())?;
    let agent_authorizer =
        Arc::new(AgentAuthorizer { registry: registry.clone(), keys: keys.clone() });
    let tunnel_server = Server::new(ServerConfig {
        token: keys.tunnel_token.clone(),
        tls: Some(certificate.tunnel.clone()),
        tcp_mux: true,
        tcp_bind: None,
        heartbeat: TUNNEL_HEARTBEAT,
        authorizer: Some(agent_authorizer.clone()),
    });
    let frps = external.map_or_else(|| Frps::Own(tunnel_server.clone()), Frps::External);
    let inner = Inner {
        agent_clients: AgentClients::new(frps.clone(), registry.clone(), keys.clone()),
        registry,
        keys,
        store,
        frps,
        agent_authorizer,
        state,
        names: config.names,
        port,
        tunnel_port: tunnel_port.map_or(0, |address| address.port()),
        broker_status: broker.as_ref().map(|_| Arc::default()),
        external_ca: Mutex::new(certificate.external_ca()),
        failures: FailureLimiter::default(),
        bootstrap_token_exists: false.into(),
        requests: 0.into(),
        open_connections: 0.into(),
        sessions: Sessions::default(),
        listeners: ChangesListeners::default(),
        shutdown: stop,
    };
    let control_plane = ControlPlane { inner: Arc::new(inner) };
    Ok(Opened { control_plane, certificate, tunnel_server, broker, https, tunnel, socket })
}

/// Key in the database for whether events went to a broker when it was last opened.
const ANNOUNCED: &str = "tells";

/// Announces the agents that are there already to a broker that is configured for the first time.
async fn announce_existing(control_plane: &ControlPlane, broker: bool) -> anyhow::Result<()> {
    let store = &control_plane.inner.store;
    let announced = if broker { "yes" } else { "no" };
    if broker && store.metadata(ANNOUNCED).await?.as_deref() != Some(announced) {
        control_plane.registry().announce_all(now()).await?;
    }
    store.set_metadata(ANNOUNCED, announced).await
}

/// Starts the tasks that serve: no new connection after `stop`, none at all after `halt`.
fn serve(
    opened: Opened,
    stop: &CancellationToken,
    halt: &CancellationToken,
) -> (JoinSet<()>, Certificate) {
    let Opened { control_plane, certificate, tunnel_server, broker, https, tunnel, socket } =
        opened;
    let mut tasks = JoinSet::new();
    let inner = &control_plane.inner;
    if let (Some(broker), Some(status)) = (broker, &inner.broker_status) {
        tasks.spawn(boxed(outbox::run(inner.store.clone(), broker, status.clone(), halt.clone())));
    }
    if let Some(tunnel) = tunnel {
        let halt = halt.clone();
        tasks.spawn(boxed(async move { tunnel_server.serve(tunnel, halt).await }));
    }
    let router = routes::router(control_plane.clone());
    tasks.spawn(boxed(control_plane.clone().serve_local(router.clone(), socket, halt.clone())));
    tasks.spawn(boxed(control_plane.serve_https(
        router,
        https,
        certificate.config.clone(),
        stop.clone(),
        halt.clone(),
    )));
    (tasks, certificate)
}

/// Does what is due from time to time, until `stop`. True when another control plane has taken the
/// database over.
async fn maintain(
    control_plane: &ControlPlane,
    certificate: &mut Certificate,
    host: &Host,
    stop: &CancellationToken,
) -> bool {
    let (mut flush, mut announce) = (interval(FLUSH), interval(ANNOUNCE));
    flush.set_missed_tick_behavior(MissedTickBehavior::Delay);
    announce.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let in_flight = operations::InFlight::default();
    loop {
        tokio::select! {
            () = stop.cancelled() => return false,
            () = control_plane.inner.store.lost() => {
                stop.cancel();
                return true;
            }
            _ = announce.tick() => {
                let announced = control_plane.registry().announce_liveness(now()).await;
                warn(announced, "agents that came or went are not announced");
                control_plane.deliver(&in_flight, now());
                control_plane.drive_rollouts(now()).await;
            }
            _ = flush.tick() => {
                tidy(control_plane, certificate, host).await;
            }
        }
    }
}

/// Writes heartbeats, ends and forgets what is old, rotates keys, renews the certificate.
async fn tidy(control_plane: &ControlPlane, certificate: &mut Certificate, host: &Host) {
    let (registry, inner) = (control_plane.registry(), &control_plane.inner);
    warn(registry.flush().await, "heartbeats are not written");
    let operations = registry.tidy_operations(now()).await;
    warn(operations, "overdue operations are not ended");
    warn(registry.tidy_jobs(now()).await, "old jobs are not removed");
    let rollouts = registry.tidy_rollouts(now()).await;
    warn(rollouts, "old rollouts are not removed");
    let access_tokens = registry.tidy_access_tokens(now()).await;
    warn(access_tokens, "expired kubeconfigs are not removed");
    warn(inner.keys.rotate(&inner.state, now()), "the signing keys are not rotated");
    let renewed = certificate.renew(&inner.keys, host, now());
    *inner.external_ca.lock() = certificate.external_ca();
    warn(renewed, "the certificate is not renewed");
}

fn warn(result: anyhow::Result<()>, message: &str) {
    if let Err(error) = result {
        tracing::warn!(error = format!("{error:#}"), "{message}");
    }
}
