//! `pipeops run`: builds the parts, watches over their tasks, keeps one account of them all, stops in order.

mod local;
mod observer;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use serde::Deserialize;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

use crate::agent::local::Beat;
use crate::api::audit::Audit;
use crate::api::jwt::Role;
use crate::api::operations::Operations;
use crate::api::permits::{self, Limits};
use crate::api::{self, Api};
use crate::cluster::upstream::Upstream;
use crate::control;
use crate::control::client::{self, ControlPlane, Told, check_url};
use crate::control::identity::{self, Found, Identity, Kept};
use crate::control::types::{AuditHead, ClusterInfo, Config, NodeReport, StatusReport, Usage, Workloads};
use crate::error::Failure;
use crate::host::paths::{AGENT_CONFIG, AGENT_SOCKET, CREDENTIAL};
use crate::host::state::StateDir;
use crate::host::{self, Host};
use crate::secret::Secret;
use crate::status::{Agent, Kubernetes};
use crate::trust::{Pin, Trust};
use crate::tunnel::client::{Client, Work};
use crate::tunnel::{self, Kind, TunnelConfig};
use observer::Observer;

/// Where the agent keeps what must outlive it, unless systemd says otherwise.
pub const STATE: &str = "/var/lib/pipeops-agent";
/// How long the control plane may take to hear that the agent stops.
const FAREWELL: Duration = Duration::from_secs(3);
/// How long calls that are under way may take after that; the unit kills at 30 s.
const GRACE: Duration = Duration::from_secs(20);

/// `/etc/pipeops/agent.toml`, as `install-server` writes it.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct AgentConfig {
    pub control_plane_url: Option<String>,
    pub control_plane_pin: Vec<String>,
    /// File with the certificates, in PEM, that may sign the control plane's.
    pub control_plane_ca: Option<String>,
    pub cluster_name: Option<String>,
    pub max_role: Option<String>,
    pub kubeconfig: Option<String>,
    pub socket: Option<String>,
    /// Loopback address and port for `/metrics`; none without it.
    pub metrics_listen: Option<std::net::SocketAddr>,
    /// Proxy for the calls of the control plane, `http://HOST:PORT`; the environment's `HTTPS_PROXY` stands over it. It holds no password.
    pub https_proxy: Option<String>,
    /// The environment names a proxy.
    #[serde(skip)]
    proxy_around: bool,
    /// Use a tunnel that has neither CA nor pin.
    pub allow_insecure_tunnel: bool,
    /// Requests that end by themselves, and upgrades, of one caller and of all together.
    pub streams_per_caller: Option<usize>,
    pub streams: Option<usize>,
    /// Watches and followed logs of one caller and of all together.
    pub watches_per_caller: Option<usize>,
    pub watches: Option<usize>,
}

fn wrong(code: &str, what: String, why: String) -> anyhow::Error {
    Failure::usage(code, what).why(why).hint("correct it, or run `pipeops install-server` again, then `systemctl restart pipeops-agent`").into()
}

fn unreadable(path: &str, error: &anyhow::Error) -> anyhow::Error {
    Failure::usage("FILE_UNREADABLE", format!("cannot read {path}"))
        .why(format!("{:#}", error.root_cause()))
        .hint("check the path and who may read it")
        .into()
}

impl AgentConfig {
    /// The file, with the environment over it.
    ///
    /// # Errors
    /// Exit 2, so that systemd does not try a wrong file again and again.
    pub fn load(host: &Host, path: &str, env: &BTreeMap<String, String>) -> anyhow::Result<AgentConfig> {
        // a file that was named must be there; the usual one may be absent
        let text = if path == AGENT_CONFIG { host.read(path)? } else { Some(host.users_file(path).map_err(|e| unreadable(path, &e))?) };
        let mut config: AgentConfig = match text {
            Some(text) => {
                let fault = |fault: crate::config_file::Fault| wrong("CONFIG_INVALID", format!("{}, line {}", fault.what, fault.line), fault.why);
                let table = crate::config_file::table(&text, path).map_err(fault)?;
                crate::config_file::values(&table, &text, path).map_err(fault)?
            }
            None => AgentConfig::default(),
        };
        let var = |name: &str| env.get(name).filter(|v| !v.is_empty()).cloned();
        config.control_plane_url = var("PIPEOPS_CONTROL_PLANE_URL").or(config.control_plane_url);
        config.cluster_name = var("CLUSTER_NAME").or(config.cluster_name);
        if let Some(pins) = var("PIPEOPS_CONTROL_PLANE_PIN") {
            config.control_plane_pin = pins.split(',').map(|p| p.trim().to_owned()).collect();
        }
        config.proxy_around = ["HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"].into_iter().any(|name| var(name).is_some());
        let invalid = |why: String| wrong("CONFIG_INVALID", "the agent's settings are wrong".into(), why);
        if config.https_proxy.as_deref().is_some_and(|proxy| crate::http::plain_proxy(proxy).is_none()) {
            return Err(invalid("https-proxy is http://HOST:PORT, without a user and a password: everybody can read this file".into()));
        }
        check_url(config.url()).map_err(invalid)?;
        config.role()?;
        config.trust(host)?.client().map_err(|why| wrong("TRUST_INVALID", "the control plane's CA or pin cannot be used".into(), why))?;
        if config.metrics_listen.is_some_and(|a| !a.ip().is_loopback()) {
            return Err(invalid("metrics-listen is for a loopback address: what it shows is nobody else's".into()));
        }
        Ok(config)
    }

    /// The proxy that is named here, where the environment names none.
    fn proxy(&self) -> Option<String> {
        self.https_proxy.clone().filter(|_| !self.proxy_around)
    }

    fn url(&self) -> &str {
        self.control_plane_url.as_deref().unwrap_or(crate::settings::DEFAULT_CONTROL_PLANE)
    }

    fn role(&self) -> anyhow::Result<Role> {
        let name = self.max_role.as_deref().unwrap_or("operator");
        Role::of(name).ok_or_else(|| {
            wrong(
                "CONFIG_INVALID",
                "the agent's settings are wrong".into(),
                format!("max-role `{name}` is none of viewer, deployer, operator, admin"),
            )
        })
    }

    fn trust(&self, host: &Host) -> anyhow::Result<Trust> {
        let invalid = |why: String| wrong("TRUST_INVALID", "the control plane's CA or pin cannot be used".into(), why);
        let pins = self.control_plane_pin.iter().map(|p| Pin::parse(p)).collect::<Result<Vec<_>, _>>().map_err(invalid)?;
        if pins.len() > 2 {
            return Err(invalid("two pins at most: the current and the next".into()));
        }
        let ca_pem = match &self.control_plane_ca {
            Some(path) => Some(host.read(path).ok().flatten().ok_or_else(|| invalid(format!("control-plane-ca: {path} cannot be read")))?),
            None => None,
        };
        Ok(Trust { ca_pem, pins, anybody: false })
    }
}

/// What takes this machine's agent off its control plane, read while its files are still there.
pub struct Leave {
    id: String,
    kept: Kept,
    trust: Trust,
    proxy: Option<String>,
}

impl Leave {
    /// None when there is no agent, or it never registered.
    pub fn read(host: &Host) -> Option<Leave> {
        let config = AgentConfig::load(host, AGENT_CONFIG, &BTreeMap::new()).ok()?;
        let state = host.peek_dir(STATE);
        let kept = Kept::load(&state, config.url())?;
        Some(Leave { id: Identity::id_in(&state)?, kept, trust: config.trust(host).ok()?, proxy: config.proxy() })
    }

    /// Says it, once; gives the URL.
    ///
    /// # Errors
    /// What is left to do by hand, and why.
    pub async fn say(self) -> Result<String, String> {
        let url = self.kept.url.clone();
        match client::deregister(&self.trust, self.proxy.as_deref(), &self.kept, &self.id).await {
            Ok(()) => Ok(url),
            Err(why) => Err(format!("{url} still lists cluster {} ({why}): remove it there", self.kept.cluster_id)),
        }
    }
}

/// Checks an enrolment token before anything is asked with it.
///
/// # Errors
/// Exit 2: it can never be right.
pub fn check_token(token: &Secret) -> anyhow::Result<()> {
    let text = token.expose();
    if text.len() > 4096 || !text.bytes().all(|b| b.is_ascii_graphic()) {
        return Err(Failure::usage("TOKEN_MALFORMED", "AGENT_TOKEN holds characters that no token has, or is too long")
            .hint("copy it again, alone and on one line")
            .into());
    }
    Ok(())
}

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
    host::all_descriptors();
    let state = host.state_dir(state)?;
    let started = Instant::now();
    let socket = host.at(config.socket.as_deref().unwrap_or(AGENT_SOCKET));
    let listener = local::listen(&socket).with_context(|| format!("opening {}", socket.display()))?;
    let port = match config.metrics_listen {
        Some(address) => Some(TcpListener::bind(address).await.with_context(|| format!("listening on {address}"))?),
        None => None,
    };
    let machine = identity::machine(&host);
    // the key also serves TLS inside the tunnel; a copied one serves nobody
    let identity = match (Identity::load(&state, &machine)?, &token) {
        (Found::Ours(found), _) => Some(found),
        (Found::Cloned, Some(_)) => {
            tracing::warn!("this disk was copied from another machine: enrolling as a new agent");
            Some(Box::new(Identity::renew(&state, &machine)?))
        }
        (Found::Cloned, None) => None,
    };
    let id = identity.as_ref().map(|i| i.id.clone()).unwrap_or_default();
    let first = Agent {
        version: env!("CARGO_PKG_VERSION").into(),
        id: id.clone(),
        control_reason: "starting".into(),
        reason: "not looked yet".into(),
        started_at: jiff::Timestamp::now().as_second(),
        ..Agent::default()
    };
    let (cluster, clusters) = watch::channel(cluster_info(&first, &config));
    let account = watch::Sender::new(first);
    let (upstream, upstreams) = watch::channel::<Option<Upstream>>(None);
    let (settings, configs) = watch::channel::<Option<Config>>(None);
    let (control_status, control) = watch::channel(control::Session::new(Instant::now()).status().clone());
    let (tunnel_status, tunnel) = watch::channel(tunnel::Machine::new(String::new(), Instant::now()).status().clone());
    let (audit_head, audit_heads) = watch::channel(AuditHead::default());
    let (tunnel_settings, tunnel_config) = watch::channel::<Option<TunnelConfig>>(None);
    let (run_ids, kept_run_ids) = mpsc::channel(4);
    let (work, works) = mpsc::channel::<Work>(64);
    let (ends, results) = mpsc::channel(16);
    let (report, reports) = watch::channel(StatusReport::default());
    // three steps of the end: nothing new, nothing at all, everything gone
    let (drain, cut, halt, farewell) = (CancellationToken::new(), CancellationToken::new(), CancellationToken::new(), CancellationToken::new());

    let mut tasks: JoinSet<(&'static str, anyhow::Result<()>)> = JoinSet::new();
    let beat = Beat::default();
    let observer = Observer {
        host: host.clone(),
        credential: kubeconfig.or(config.kubeconfig.clone()).unwrap_or_else(|| CREDENTIAL.into()),
        max_role: config.role()?.name().into(),
        account: account.clone(),
        upstream,
        beat: beat.clone(),
        stop: halt.clone(),
    };
    tasks.spawn(async move { ("observer", observer.run().await) });
    let hostname = hostname();
    let tls = identity.as_ref().map(|i| i.tls()).transpose()?;
    let plane = ControlPlane {
        url: config.url().to_owned(),
        trust: config.trust(&host)?,
        proxy: config.proxy(),
        token,
        state: state.clone(),
        identity,
        told: Told {
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
        farewell: farewell.clone(),
        stop: halt.clone(),
    };
    tasks.spawn(async move { ("control plane", plane.run().await) });
    let api = match tls {
        Some(tls) => {
            let parts = api::Parts {
                id,
                most: config.role()?,
                config: configs.clone(),
                control: control.clone(),
                upstream: upstreams,
                account: account.subscribe(),
                audit_head,
                limits: Limits {
                    per_caller: config.streams_per_caller.unwrap_or(permits::PER_CALLER),
                    in_all: config.streams.unwrap_or(permits::IN_ALL),
                    watches_per_caller: config.watches_per_caller.unwrap_or(permits::WATCHES_PER_CALLER),
                    watches_in_all: config.watches.unwrap_or(permits::WATCHES_IN_ALL),
                },
                operations: Operations::open(state.sub("operations")?, ends),
                drain: drain.clone(),
                cut: cut.clone(),
            };
            Some(Api::new(parts, tls, Audit::open(state.sub("audit")?)?))
        }
        None => None,
    };
    let client = Client {
        hostname,
        allow_insecure: config.allow_insecure_tunnel,
        proxied: config.proxy_around || config.https_proxy.is_some(),
        settings: tunnel_config,
        publish: tunnel_status,
        run_ids,
        work,
        drain: drain.clone(),
        stop: halt.clone(),
    };
    let run_id = state.read("run-id")?.unwrap_or_default().trim().to_owned();
    tasks.spawn(async move {
        client.run(run_id).await;
        ("tunnel", Ok(()))
    });
    tasks.spawn(keep_run_ids(state, kept_run_ids, halt.clone()));
    tasks.spawn(accept(works, api.clone(), halt.clone()));
    tasks.spawn(merge(account.clone(), control, tunnel, configs, tunnel_settings, cluster, report, config.clone(), halt.clone()));
    let extra: local::Extra = match api.clone() {
        Some(api) => Arc::new(move || api.metrics()),
        None => Arc::new(String::new),
    };
    {
        let (state, stop) = (account.subscribe(), halt.clone());
        tasks.spawn(async move { ("socket", local::serve(listener, port, state, extra, stop).await) });
    }
    {
        let (state, stop, drain) = (account.subscribe(), halt.clone(), drain.clone());
        tasks.spawn(async move { ("notifier", local::notify(local::Systemd::new(), state, &beat, &drain, &stop).await) });
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
    let _ = timeout(FAREWELL, farewell.cancelled()).await;
    if let Some(api) = &api
        && result.is_ok()
    {
        let idle = async {
            while api.open() > 0 {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        if timeout(GRACE, idle).await.is_err() {
            tracing::info!(open = api.open(), "ending the streams that are still open: their time is over");
        }
    }
    cut.cancel();
    // the last bytes of what was cut
    tokio::time::sleep(Duration::from_millis(200)).await;
    halt.cancel();
    let _ = timeout(Duration::from_secs(4), async { while tasks.join_next().await.is_some() {} }).await;
    let _ = std::os::unix::net::UnixStream::connect(&socket).is_err().then(|| local::unlink(&socket));
    result
}

/// The FRP run id outlives the process, so that a restart takes its names over instead of finding them taken.
async fn keep_run_ids(state: StateDir, mut fresh: mpsc::Receiver<String>, stop: CancellationToken) -> (&'static str, anyhow::Result<()>) {
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
async fn accept(mut works: mpsc::Receiver<Work>, api: Option<Api>, stop: CancellationToken) -> (&'static str, anyhow::Result<()>) {
    let mut open = JoinSet::new();
    loop {
        tokio::select! {
            () = stop.cancelled() => return ("API", Ok(())),
            Some(_) = open.join_next() => {}
            Some(work) = works.recv() => {
                let Some(api) = api.clone() else { continue };
                open.spawn(async move {
                    match work.kind {
                        Kind::Stcp | Kind::Tcp => api.serve(work.io).await,
                        Kind::Http => api.serve_plain(work.io).await,
                    }
                });
            }
        }
    }
}

/// One account out of what the tasks tell.
#[expect(clippy::too_many_arguments, reason = "it joins what all the tasks tell")]
async fn merge(
    account: watch::Sender<Agent>,
    mut control: watch::Receiver<control::Status>,
    mut tunnel: watch::Receiver<tunnel::Status>,
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
            let (control, tunnel) = (control.borrow_and_update().clone(), tunnel.borrow_and_update().clone());
            account.send_if_modified(|a| {
                let news = a.control != control.state
                    || a.control_reason != control.reason
                    || a.clock_offset != control.offset
                    || a.tunnel != tunnel.state
                    || a.tunnel_reason != tunnel.reason;
                if news {
                    (a.control, a.clock_offset, a.tunnel) = (control.state, control.offset, tunnel.state);
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

fn cluster_info(a: &Agent, config: &AgentConfig) -> ClusterInfo {
    ClusterInfo {
        name: config.cluster_name.clone().unwrap_or_else(hostname),
        provider: if a.api_version.contains("+k3s") { "k3s" } else { "kubernetes" }.into(),
        version: a.api_version.clone(),
        node_count: u32::try_from(a.nodes.len()).unwrap_or(u32::MAX),
        ..ClusterInfo::default()
    }
}

fn status_report(a: &Agent) -> StatusReport {
    let node = |n: &crate::status::Node| NodeReport {
        name: n.name.clone(),
        ready: n.ready,
        role: n.role.clone(),
        version: n.version.clone(),
        address: n.address.clone(),
        note: n.note.clone(),
    };
    let w = &a.workloads;
    StatusReport {
        at: jiff::Timestamp::from_second(jiff::Timestamp::now().as_second() - a.clock_offset).unwrap_or_default().to_string(),
        kubernetes: match a.kubernetes {
            Kubernetes::Connected => "connected",
            Kubernetes::Waiting => "waiting",
            Kubernetes::Refused => "refused",
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
