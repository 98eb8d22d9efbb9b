//! `pipeops run`: builds the parts, watches over their tasks, keeps one account of them all, stops in order.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use tokio::net::TcpListener;
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
use crate::agent::observer::Observer;
use crate::agent::session;
use crate::agent::session::client::{ControlPlaneClient, ReportedState};
use crate::agent::session::identity::{self, Identity, LoadedIdentity};
use crate::agent::status::{AgentStatus, KubernetesState};
use crate::base::secret::Secret;
use crate::contract::types::{
    AuditHead, ClusterInfo, Config, NodeReport, StatusReport, Usage, Workloads,
};
use crate::frp::client::{Client, WorkConnection};
use crate::frp::{self, ProxyKind, TunnelConfig};
use crate::host::paths::{AGENT_SOCKET, CREDENTIAL};
use crate::host::state::StateDir;
use crate::host::{self, Host};
use crate::kubernetes::upstream::Upstream;

/// How long the control plane may take to hear that the agent stops.
const DRAIN_REPORT_TIMEOUT: Duration = Duration::from_secs(3);
/// How long calls that are under way may take after that; the unit kills at 30 s.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(20);

/// Runs until `stop`, then drains. READY means: configuration valid, socket open, tasks started; not that any server answered.
///
/// # Errors
/// When the configuration is wrong, the state directory or socket cannot be opened, or a task ends that should not.
pub async fn run(
    host: Host,
    config: AgentConfig,
    kubeconfig: Option<String>,
    token: Option<Secret>,
    state: &str,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    host::raise_descriptor_limit();
    let state = host.state_dir(state)?;
    let started = Instant::now();
    let socket = host.at(config.socket.as_deref().unwrap_or(AGENT_SOCKET));
    let listener =
        local::listen(&socket).with_context(|| format!("opening {}", socket.display()))?;
    let port = match config.metrics_listen {
        Some(address) => Some(
            TcpListener::bind(address).await.with_context(|| format!("listening on {address}"))?,
        ),
        None => None,
    };
    let machine = identity::machine_digest(&host);
    // the key also serves TLS inside the tunnel; a copied one serves nobody
    let identity = match (Identity::load(&state, &machine)?, &token) {
        (LoadedIdentity::Ours(found), _) => Some(found),
        (LoadedIdentity::Cloned, Some(_)) => {
            tracing::warn!("this disk was copied from another machine: enrolling as a new agent");
            Some(Box::new(Identity::replace_copied(&state, &machine)?))
        }
        (LoadedIdentity::Cloned, None) => None,
    };
    let id = identity.as_ref().map(|i| i.id.clone()).unwrap_or_default();
    let first = AgentStatus {
        version: env!("CARGO_PKG_VERSION").into(),
        id: id.clone(),
        control_reason: "starting".into(),
        reason: "not looked yet".into(),
        started_at: jiff::Timestamp::now().as_second(),
        ..AgentStatus::default()
    };
    let (cluster, clusters) = watch::channel(cluster_info(&first, &config));
    let account = watch::Sender::new(first);
    let (upstream, upstreams) = watch::channel::<Option<Upstream>>(None);
    let (settings, configs) = watch::channel::<Option<Config>>(None);
    let (control_status, control) =
        watch::channel(session::ControlPlaneSession::new(Instant::now()).status().clone());
    let (tunnel_status, tunnel) = watch::channel(
        frp::TunnelStateMachine::new(String::new(), Instant::now()).status().clone(),
    );
    let (audit_head, audit_heads) = watch::channel(AuditHead::default());
    let (tunnel_settings, tunnel_config) = watch::channel::<Option<TunnelConfig>>(None);
    let (run_ids, kept_run_ids) = mpsc::channel(4);
    let (work_connections, accepted) = mpsc::channel::<WorkConnection>(64);
    let (ends, results) = mpsc::channel(16);
    let (report, reports) = watch::channel(StatusReport::default());
    // three steps of the end: nothing new, nothing at all, everything gone
    let (drain, cut, halt, drain_reported) = (
        CancellationToken::new(),
        CancellationToken::new(),
        CancellationToken::new(),
        CancellationToken::new(),
    );

    let mut tasks: JoinSet<(&'static str, anyhow::Result<()>)> = JoinSet::new();
    let liveness = ObserverLiveness::default();
    let observer = Observer {
        host: host.clone(),
        credential: kubeconfig.or(config.kubeconfig.clone()).unwrap_or_else(|| CREDENTIAL.into()),
        max_role: config.role()?.name().into(),
        account: account.clone(),
        upstream,
        liveness: liveness.clone(),
        stop: halt.clone(),
    };
    tasks.spawn(async move { ("observer", observer.run().await) });
    let hostname = hostname();
    let tls = identity.as_ref().map(|i| i.tls_config()).transpose()?;
    let plane = ControlPlaneClient {
        url: config.url().to_owned(),
        trust: config.trust(&host)?,
        proxy: config.proxy(),
        token,
        state: state.clone(),
        identity,
        reported: ReportedState {
            name: config.cluster_name.clone().unwrap_or_else(|| hostname.clone()),
            hostname: hostname.clone(),
            max_role: config.role()?.name().into(),
            cluster: clusters,
            status: reports,
            tunnel: tunnel.clone(),
            audit: audit_heads,
            started,
        },
        publish: control_status,
        config: settings,
        results,
        drain: drain.clone(),
        drain_reported: drain_reported.clone(),
        stop: halt.clone(),
    };
    tasks.spawn(async move { ("control plane", plane.run().await) });
    let api = match tls {
        Some(tls) => {
            let context = api::ApiContext {
                id,
                max_role: config.role()?,
                config: configs.clone(),
                control: control.clone(),
                upstream: upstreams,
                account: account.subscribe(),
                audit_head,
                limits: StreamLimits {
                    per_caller: config.streams_per_caller.unwrap_or(permits::PER_CALLER),
                    total: config.streams.unwrap_or(permits::TOTAL),
                    watches_per_caller: config
                        .watches_per_caller
                        .unwrap_or(permits::WATCHES_PER_CALLER),
                    watches_total: config.watches.unwrap_or(permits::WATCHES_TOTAL),
                },
                operations: Operations::open(state.sub("operations")?, ends),
                drain: drain.clone(),
                cut: cut.clone(),
            };
            Some(Api::new(context, tls, AuditLog::open(state.sub("audit")?)?))
        }
        None => None,
    };
    let client = Client {
        hostname,
        allow_insecure: config.allow_insecure_tunnel,
        proxied: config.proxy_in_environment || config.https_proxy.is_some(),
        settings: tunnel_config,
        publish: tunnel_status,
        run_ids,
        work_connections,
        drain: drain.clone(),
        stop: halt.clone(),
    };
    let run_id = state.read("run-id")?.unwrap_or_default().trim().to_owned();
    tasks.spawn(async move {
        client.run(run_id).await;
        ("tunnel", Ok(()))
    });
    tasks.spawn(keep_run_ids(state, kept_run_ids, halt.clone()));
    tasks.spawn(accept(accepted, api.clone(), halt.clone()));
    tasks.spawn(merge(
        account.clone(),
        control,
        tunnel,
        configs,
        tunnel_settings,
        cluster,
        report,
        config.clone(),
        halt.clone(),
    ));
    let extra: local::ExtraMetrics = match api.clone() {
        Some(api) => Arc::new(move || api.metrics()),
        None => Arc::new(String::new),
    };
    {
        let (state, stop) = (account.subscribe(), halt.clone());
        tasks.spawn(
            async move { ("socket", local::serve(listener, port, state, extra, stop).await) },
        );
    }
    {
        let (state, stop, drain) = (account.subscribe(), halt.clone(), drain.clone());
        tasks.spawn(async move {
            (
                "notifier",
                local::notify(local::SystemdNotifier::new(), state, &liveness, &drain, &stop).await,
            )
        });
    }
    let mut result = Ok(());
    tokio::select! {
        () = stop.cancelled() => {}
        Some(ended) = tasks.join_next() => {
            result = Err(match ended {
                Ok((name, Ok(()))) => anyhow::anyhow!("task {name} ended by itself"),
                Ok((name, Err(error))) => error.context(format!("task {name}")),
                Err(panic) => anyhow::anyhow!("a task panicked: {panic}"),
            });
        }
    }
    drain.cancel();
    // the control plane hears of it before anything closes
    let _ = timeout(DRAIN_REPORT_TIMEOUT, drain_reported.cancelled()).await;
    if let Some(api) = &api
        && result.is_ok()
    {
        let idle = async {
            while api.open() > 0 {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        if timeout(DRAIN_TIMEOUT, idle).await.is_err() {
            tracing::info!(
                open = api.open(),
                "ending the streams that are still open: their time is over"
            );
        }
    }
    cut.cancel();
    // the last bytes of what was cut
    tokio::time::sleep(Duration::from_millis(200)).await;
    halt.cancel();
    let _ =
        timeout(Duration::from_secs(4), async { while tasks.join_next().await.is_some() {} }).await;
    let _ =
        std::os::unix::net::UnixStream::connect(&socket).is_err().then(|| local::unlink(&socket));
    result
}

/// The FRP run id outlives the process, so that a restart takes its names over instead of finding them taken.
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
                    tracing::warn!(error = format!("{error:#}"), "the tunnel's run id is not kept over a restart");
                }
            }
        }
    }
}

/// Hands each stream of the tunnel to the API.
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
                open.spawn(async move {
                    match connection.kind {
                        ProxyKind::Stcp | ProxyKind::Tcp => api.serve(connection.io).await,
                        ProxyKind::Http => api.serve_plain(connection.io).await,
                    }
                });
            }
        }
    }
}

/// One account out of what the tasks tell.
#[expect(clippy::too_many_arguments, reason = "it joins what all the tasks tell")]
async fn merge(
    account: watch::Sender<AgentStatus>,
    mut control: watch::Receiver<session::ControlPlaneStatus>,
    mut tunnel: watch::Receiver<frp::TunnelStatus>,
    mut configs: watch::Receiver<Option<Config>>,
    tunnel_settings: watch::Sender<Option<TunnelConfig>>,
    cluster: watch::Sender<ClusterInfo>,
    report: watch::Sender<StatusReport>,
    config: AgentConfig,
    stop: CancellationToken,
) -> (&'static str, anyhow::Result<()>) {
    let mut accounts = account.subscribe();
    loop {
        {
            let (control, tunnel) =
                (control.borrow_and_update().clone(), tunnel.borrow_and_update().clone());
            account.send_if_modified(|a| {
                let news = a.control != control.state
                    || a.control_reason != control.reason
                    || a.clock_offset != control.offset
                    || a.tunnel != tunnel.state
                    || a.tunnel_reason != tunnel.reason;
                if news {
                    (a.control, a.clock_offset, a.tunnel) =
                        (control.state, control.offset, tunnel.state);
                    a.control_reason.clone_from(&control.reason);
                    a.tunnel_reason.clone_from(&tunnel.reason);
                }
                news
            });
            // without an answer the last settings stay good
            let latest = configs.borrow_and_update().clone();
            if let Some(wanted) = latest.map(|c| c.tunnel) {
                tunnel_settings.send_if_modified(|now| {
                    let news = *now != wanted;
                    if news {
                        *now = wanted;
                    }
                    news
                });
            }
            let a = accounts.borrow_and_update().clone();
            cluster.send_replace(cluster_info(&a, &config));
            // whoever waits for news of the cluster is not woken by the time of day, nor by what he has caused himself
            report.send_if_modified(|former| {
                let fresh = status_report(&a);
                former.at.clear();
                let news = *former != StatusReport { at: String::new(), ..fresh.clone() };
                *former = fresh;
                news
            });
        }
        let changed = tokio::select! {
            () = stop.cancelled() => return ("account", Ok(())),
            changed = control.changed() => changed,
            changed = tunnel.changed() => changed,
            changed = configs.changed() => changed,
            changed = accounts.changed() => changed,
        };
        if changed.is_err() {
            // a task has ended: the supervisor says which
            stop.cancelled().await;
        }
        // a burst of events is one account
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn hostname() -> String {
    nix::unistd::gethostname().ok().and_then(|h| h.into_string().ok()).unwrap_or_default()
}

fn cluster_info(a: &AgentStatus, config: &AgentConfig) -> ClusterInfo {
    ClusterInfo {
        name: config.cluster_name.clone().unwrap_or_else(hostname),
        provider: if a.api_version.contains("+k3s") { "k3s" } else { "kubernetes" }.into(),
        version: a.api_version.clone(),
        node_count: u32::try_from(a.nodes.len()).unwrap_or(u32::MAX),
        ..ClusterInfo::default()
    }
}

fn status_report(a: &AgentStatus) -> StatusReport {
    let node = |n: &crate::agent::status::NodeStatus| NodeReport {
        name: n.name.clone(),
        ready: n.ready,
        role: n.role.clone(),
        version: n.version.clone(),
        address: n.address.clone(),
        note: n.note.clone(),
    };
    let w = &a.workloads;
    StatusReport {
        at: jiff::Timestamp::from_second(jiff::Timestamp::now().as_second() - a.clock_offset)
            .unwrap_or_default()
            .to_string(),
        kubernetes: match a.kubernetes {
            KubernetesState::Connected => "connected",
            KubernetesState::Waiting => "waiting",
            KubernetesState::Refused => "refused",
        }
        .into(),
        reason: a.reason.clone(),
        nodes: a.nodes.iter().map(node).collect(),
        namespaces: a.namespaces.clone(),
        workloads: Workloads {
            pods: w.pods,
            pods_running: w.pods_running,
            deployments: w.deployments,
            deployments_ready: w.deployments_ready,
            statefulsets: w.statefulsets,
            daemonsets: w.daemonsets,
            services: w.services,
            ingresses: w.ingresses,
        },
        usage: Usage { memory_used_bytes: a.memory_used, memory_total_bytes: a.memory_total },
    }
}
