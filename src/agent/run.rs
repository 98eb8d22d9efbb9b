//! `pipeops run`: starts the tasks of the agent, merges what they report into one status, and stops
//! them in order.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

use crate::agent::api::audit::AuditLog;
use crate::agent::api::operations::Operations;
use crate::agent::api::permits::{self, StreamLimits};
use crate::agent::api::{self, Api};
use crate::agent::config::AgentConfig;
use crate::agent::local::{self, ObserverLiveness};
use crate::agent::merge::{StatusMerger, cluster_info, facts, fixed_info, hostname};
use crate::agent::observer::Observer;
use crate::agent::place::{self, Place};
use crate::agent::session::client::{ControlPlaneClient, ReportedState};
use crate::agent::session::identity::{self, Identity, LoadedIdentity};
use crate::agent::session::{self, ControlPlaneStatus};
use crate::agent::status::AgentStatus;
use crate::base::error::{Exit, Failure};
use crate::base::secret::Secret;
use crate::base::task::boxed;
use crate::contract::types::{AuditHead, ClusterInfo, Config, StatusReport};
use crate::frp::client::{Client, WorkConnection};
use crate::frp::{self, ProxyKind, TunnelConfig};
use crate::host::paths::{AGENT_SOCKET, CREDENTIAL};
use crate::host::state::StateDir;
use crate::host::{self, Host};
use crate::kubernetes::upstream::Upstream;

/// Time for the report to the control plane that the agent stops.
const DRAIN_REPORT_TIMEOUT: Duration = Duration::from_secs(3);
/// Time for calls that are under way, after that; systemd kills the unit at 30 s.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(20);

/// The tasks of the agent, each with its name.
type Tasks = JoinSet<(&'static str, anyhow::Result<()>)>;

/// The steps of the end, in their order.
#[derive(Clone, Default)]
struct Shutdown {
    /// Nothing new is taken.
    drain: CancellationToken,
    /// The control plane knows that the agent stops, or does not answer.
    drain_reported: CancellationToken,
    /// What is still open ends.
    abort: CancellationToken,
    /// Every task ends.
    halt: CancellationToken,
}

/// The agent while it starts, runs and stops.
struct Agent {
    host: Host,
    config: AgentConfig,
    state: StateDir,
    hostname: String,
    started: Instant,
    status: watch::Sender<AgentStatus>,
    tenants: watch::Sender<Option<bool>>,
    shutdown: Shutdown,
    tasks: Tasks,
}

/// Runs until `stop`, then drains. READY means: configuration valid, socket open, tasks started; it
/// does not mean that any server answered.
///
/// # Errors
/// When the configuration is wrong, the state directory or socket cannot be opened, or a task ends
/// that should not.
pub async fn run(
    host: Host,
    config: AgentConfig,
    kubeconfig: Option<String>,
    token: Option<Secret>,
    state: &str,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    host::raise_descriptor_limit();
    let state = permitted(host.state_dir(state))?;
    let socket = host.real_path(config.socket.as_deref().unwrap_or(AGENT_SOCKET));
    let opened = local::listen(&socket).with_context(|| format!("opening {}", socket.display()));
    let listener = permitted(opened)?;
    let port = metrics_listener(&config).await?;
    let identity = load_identity(&host, &state, token.is_some())?;
    let tls = identity.as_ref().map(|i| i.tls_config()).transpose()?;
    let id = identity.as_ref().map(|i| i.id.clone()).unwrap_or_default();
    let known = session::initial_status(identity.is_some(), token.is_some(), &state, config.url());
    let first = initial_status(&id, &known);
    let fixed = fixed_info(&config, place(&host, &config, &state).await);
    let (cluster, clusters) = watch::channel(cluster_info(&first, &fixed));
    let mut agent = Agent::new(host, config, state, first);
    let (upstream, upstreams) = watch::channel::<Option<Upstream>>(None);
    let (settings, configs) = watch::channel::<Option<Config>>(None);
    let (control_status, control) = watch::channel(known);
    let unused = frp::TunnelStateMachine::new(String::new(), Instant::now());
    let (tunnel_status, tunnel) = watch::channel(unused.status().clone());
    let (tunnel_settings, tunnel_config) = watch::channel::<Option<TunnelConfig>>(None);
    let (audit_head, audit_heads) = watch::channel(AuditHead::default());
    let (finished, results) = mpsc::channel(16);
    let (report, reports) = watch::channel(StatusReport::default());
    let liveness = ObserverLiveness::default();
    agent.start_observer(kubeconfig, upstream, liveness.clone())?;
    let reported = agent.reported_state(clusters, &fixed, reports, tunnel.clone(), audit_heads)?;
    agent.start_control_plane(ControlPlaneClient {
        url: agent.config.url().to_owned(),
        trust: agent.config.trust(&agent.host)?,
        proxy: agent.config.proxy(),
        token,
        state: agent.state.clone(),
        identity,
        reported,
        publish: control_status,
        config: settings,
        results,
        drain: agent.shutdown.drain.clone(),
        drain_reported: agent.shutdown.drain_reported.clone(),
        stop: agent.shutdown.halt.clone(),
    });
    let api = match tls {
        Some(tls) => {
            let context = api::ApiContext {
                id,
                max_role: agent.config.role()?,
                config: configs.clone(),
                control: control.clone(),
                upstream: upstreams,
                agent_status: agent.status.subscribe(),
                audit_head,
                limits: stream_limits(&agent.config),
                operations: Operations::open(agent.state.subdir("operations")?, finished),
                drain: agent.shutdown.drain.clone(),
                abort: agent.shutdown.abort.clone(),
            };
            Some(Api::new(context, tls, AuditLog::open(agent.state.subdir("audit")?)?))
        }
        None => None,
    };
    agent.start_tunnel(tunnel_config, tunnel_status, api.clone())?;
    let merger = StatusMerger {
        status: agent.status.clone(),
        control,
        tunnel,
        configs,
        tunnel_settings,
        cluster,
        report,
        fixed,
        stop: agent.shutdown.halt.clone(),
    };
    agent.tasks.spawn(boxed(async move { ("account", merger.run().await) }));
    agent.start_local(listener, port, api.clone(), liveness);
    let result = agent.wait(&stop, api.as_ref()).await;
    agent.shut_down(api.as_ref(), result.is_ok()).await;
    remove_unused(&socket);
    result
}

async fn place(host: &Host, config: &AgentConfig, state: &StateDir) -> Place {
    match config.metadata {
        Some(false) => Place::default(),
        _ => place::look(host, config.metadata_url(), state).await,
    }
}

/// Tells a user without the rights from a fault of the program.
fn permitted<T>(result: anyhow::Result<T>) -> anyhow::Result<T> {
    result.map_err(|error| {
        let cause = error.root_cause().downcast_ref::<std::io::Error>();
        if cause.is_none_or(|e| e.kind() != std::io::ErrorKind::PermissionDenied) {
            return error;
        }
        Failure::new(Exit::Preflight, "NOT_PERMITTED", "this user may not run the agent")
            .why(format!("{error:#}"))
            .hint("start its unit, `systemctl start pipeops-agent`, or run it as root")
            .into()
    })
}

/// Removes the socket, unless another agent already listens on it.
fn remove_unused(socket: &std::path::Path) {
    if std::os::unix::net::UnixStream::connect(socket).is_err() {
        local::unlink(socket);
    }
}

async fn metrics_listener(config: &AgentConfig) -> anyhow::Result<Option<TcpListener>> {
    let Some(address) = config.metrics_listen else { return Ok(None) };
    let listener = TcpListener::bind(address).await;
    listener.map(Some).with_context(|| format!("listening on {address}"))
}

/// The key that also serves TLS inside the tunnel. A copied one is not used: with a token the agent
/// enrols with a new one, without a token it has none.
fn load_identity(
    host: &Host,
    state: &StateDir,
    has_token: bool,
) -> anyhow::Result<Option<Box<Identity>>> {
    let machine = identity::machine_digest(host);
    Ok(match Identity::load(state, &machine)? {
        LoadedIdentity::Own(identity) => Some(identity),
        LoadedIdentity::Cloned if has_token => {
            tracing::warn!("this disk was copied from another machine: enrolling as a new agent");
            Some(Box::new(Identity::replace_cloned(state, &machine)?))
        }
        LoadedIdentity::Cloned => None,
    })
}

fn initial_status(id: &str, known: &ControlPlaneStatus) -> AgentStatus {
    AgentStatus {
        version: env!("CARGO_PKG_VERSION").into(),
        id: id.into(),
        control: known.state,
        control_reason: known.reason.clone(),
        reason: "not looked yet".into(),
        started_at: jiff::Timestamp::now().as_second(),
        ..AgentStatus::default()
    }
}

fn stream_limits(config: &AgentConfig) -> StreamLimits {
    StreamLimits {
        per_caller: config.streams_per_caller.unwrap_or(permits::STREAMS_PER_CALLER),
        total: config.streams.unwrap_or(permits::STREAMS_TOTAL),
        watches_per_caller: config.watches_per_caller.unwrap_or(permits::WATCHES_PER_CALLER),
        watches_total: config.watches.unwrap_or(permits::WATCHES_TOTAL),
    }
}

impl Agent {
    fn new(host: Host, config: AgentConfig, state: StateDir, status: AgentStatus) -> Agent {
        Agent {
            host,
            config,
            state,
            hostname: hostname(),
            started: Instant::now(),
            status: watch::Sender::new(status),
            tenants: watch::Sender::new(None),
            shutdown: Shutdown::default(),
            tasks: Tasks::new(),
        }
    }

    fn start_observer(
        &mut self,
        kubeconfig: Option<String>,
        upstream: watch::Sender<Option<Upstream>>,
        liveness: ObserverLiveness,
    ) -> anyhow::Result<()> {
        let credential = kubeconfig.or_else(|| self.config.kubeconfig.clone());
        let observer = Observer {
            host: self.host.clone(),
            credential: credential.unwrap_or_else(|| CREDENTIAL.into()),
            max_role: self.config.role()?.name().into(),
            agent_status: self.status.clone(),
            tenants: self.tenants.clone(),
            upstream,
            liveness,
            stop: self.shutdown.halt.clone(),
        };
        self.tasks.spawn(boxed(async move { ("observer", observer.run().await) }));
        Ok(())
    }

    fn reported_state(
        &self,
        cluster: watch::Receiver<ClusterInfo>,
        fixed: &ClusterInfo,
        status: watch::Receiver<StatusReport>,
        tunnel: watch::Receiver<frp::TunnelStatus>,
        audit: watch::Receiver<AuditHead>,
    ) -> anyhow::Result<ReportedState> {
        Ok(ReportedState {
            name: self.config.cluster_name.clone().unwrap_or_else(|| self.hostname.clone()),
            hostname: self.hostname.clone(),
            max_role: self.config.role()?.name().into(),
            cluster,
            facts: facts(fixed),
            tenants: self.tenants.subscribe(),
            status,
            tunnel,
            audit,
            started: self.started,
        })
    }

    fn start_control_plane(&mut self, client: ControlPlaneClient) {
        self.tasks.spawn(boxed(async move { ("control plane", client.run().await) }));
    }

    fn start_tunnel(
        &mut self,
        settings: watch::Receiver<Option<TunnelConfig>>,
        publish: watch::Sender<frp::TunnelStatus>,
        api: Option<Api>,
    ) -> anyhow::Result<()> {
        let (run_ids, fresh_run_ids) = mpsc::channel(4);
        let (work_connections, accepted) = mpsc::channel(64);
        let client = Client {
            hostname: self.hostname.clone(),
            allow_insecure: self.config.allow_insecure_tunnel,
            proxied: self.config.proxy_in_environment || self.config.https_proxy.is_some(),
            settings,
            publish,
            run_ids,
            work_connections,
            drain: self.shutdown.drain.clone(),
            stop: self.shutdown.halt.clone(),
        };
        let run_id = self.state.read("run-id")?.unwrap_or_default().trim().to_owned();
        self.tasks.spawn(boxed(async move {
            client.run(run_id).await;
            ("tunnel", Ok(()))
        }));
        let halt = &self.shutdown.halt;
        self.tasks.spawn(boxed(keep_run_ids(self.state.clone(), fresh_run_ids, halt.clone())));
        self.tasks.spawn(boxed(accept(accepted, api, halt.clone())));
        Ok(())
    }

    /// The socket and port of this machine, and the messages to systemd.
    fn start_local(
        &mut self,
        listener: UnixListener,
        port: Option<TcpListener>,
        api: Option<Api>,
        liveness: ObserverLiveness,
    ) {
        let extra: local::ExtraMetrics = match api {
            Some(api) => Arc::new(move |metrics| api.write_metrics(metrics)),
            None => Arc::new(|_| {}),
        };
        let (status, stop) = (self.status.subscribe(), self.shutdown.halt.clone());
        self.tasks.spawn(boxed(async move {
            ("socket", local::serve(listener, port, status, extra, stop).await)
        }));
        let (status, shutdown) = (self.status.subscribe(), self.shutdown.clone());
        self.tasks.spawn(boxed(async move {
            let systemd = local::SystemdNotifier::new();
            let Shutdown { drain, halt, .. } = &shutdown;
            ("notifier", local::notify(systemd, status, &liveness, drain, halt).await)
        }));
    }

    /// Waits for `stop`, or for the end of a task: none should end before.
    async fn wait(&mut self, stop: &CancellationToken, api: Option<&Api>) -> anyhow::Result<()> {
        tokio::select! {
            () = stop.cancelled() => {
                tracing::info!(
                    open = api.map_or(0, Api::open_streams),
                    "asked to stop: finishing what is under way"
                );
                Ok(())
            }
            Some(ended) = self.tasks.join_next() => Err(match ended {
                Ok((name, Ok(()))) => anyhow::anyhow!("task {name} ended by itself"),
                Ok((name, Err(error))) => error.context(format!("task {name}")),
                Err(panic) => anyhow::anyhow!("a task panicked: {panic}"),
            }),
        }
    }

    /// Stops in order. Open calls are given time when all tasks are still there.
    async fn shut_down(&mut self, api: Option<&Api>, intact: bool) {
        self.shutdown.drain.cancel();
        // the control plane is informed before anything closes
        let _ = timeout(DRAIN_REPORT_TIMEOUT, self.shutdown.drain_reported.cancelled()).await;
        if let Some(api) = api
            && intact
        {
            let idle = async {
                while api.open_streams() > 0 {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            };
            if timeout(DRAIN_TIMEOUT, idle).await.is_err() {
                tracing::info!(
                    open = api.open_streams(),
                    "ending the streams that are still open: their time is over"
                );
            }
        }
        self.shutdown.abort.cancel();
        // the last bytes of what was cut
        tokio::time::sleep(Duration::from_millis(200)).await;
        self.shutdown.halt.cancel();
        let ended = async { while self.tasks.join_next().await.is_some() {} };
        let _ = timeout(Duration::from_secs(4), ended).await;
    }
}

/// Stores the FRP run id, so that the agent takes over its own names after a restart.
async fn keep_run_ids(
    state: StateDir,
    mut fresh: mpsc::Receiver<String>,
    stop: CancellationToken,
) -> (&'static str, anyhow::Result<()>) {
    loop {
        tokio::select! {
            () = stop.cancelled() => return ("run ids", Ok(())),
            Some(id) = fresh.recv() => {
                if let Err(error) = state.write("run-id", &id) {
                    let error = format!("{error:#}");
                    tracing::warn!(error, "the tunnel's run id is not kept over a restart");
                }
            }
        }
    }
}

/// Hands each work connection of the tunnel to the API.
async fn accept(
    mut connections: mpsc::Receiver<WorkConnection>,
    api: Option<Api>,
    stop: CancellationToken,
) -> (&'static str, anyhow::Result<()>) {
    let mut open = JoinSet::new();
    loop {
        tokio::select! {
            () = stop.cancelled() => return ("API", Ok(())),
            Some(_) = open.join_next() => {}
            Some(connection) = connections.recv() => {
                let Some(api) = api.clone() else { continue };
                open.spawn(boxed(async move {
                    match connection.kind {
                        ProxyKind::Stcp | ProxyKind::Tcp => api.serve(connection.io).await,
                        ProxyKind::Http => api.serve_plain(connection.io).await,
                    }
                }));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_without_the_rights_is_told_from_a_fault() {
        let ends = |kind: std::io::ErrorKind| {
            let error = Err::<(), _>(std::io::Error::from(kind)).context("making /var/lib/x");
            let failure = Failure::from_error(&permitted(error).unwrap_err());
            (failure.exit, failure.hint.is_some())
        };
        assert_eq!(ends(std::io::ErrorKind::PermissionDenied), (Exit::Preflight, true));
        assert_eq!(ends(std::io::ErrorKind::NotADirectory), (Exit::Internal, false));
    }
}
