//! `pipeops run`: keeps a truthful account of node and cluster, tells systemd, answers on its socket, stops in order.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use sd_notify::NotifyState;
use serde::Deserialize;
use tokio::net::UnixListener;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::cluster::{Cluster, status};
use crate::error::Failure;
use crate::host::Host;
use crate::k3s::{AGENT_SOCKET, CREDENTIAL};
use crate::status::{Agent, Enrolment, Kubernetes, Node};

/// How often the cluster is looked at.
const LOOK: Duration = Duration::from_secs(10);
/// Longest time for open answers after a stop.
const DRAIN: Duration = Duration::from_secs(5);

/// `/etc/pipeops/agent.toml`, as `install-server` writes it.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct AgentConfig {
    pub control_plane_url: Option<String>,
    pub control_plane_pin: Vec<String>,
    pub cluster_name: Option<String>,
    pub max_role: Option<String>,
    pub kubeconfig: Option<String>,
    pub socket: Option<String>,
}

impl AgentConfig {
    /// # Errors
    /// Exit 2, so that systemd does not try a wrong file again and again.
    pub fn load(host: &Host, path: &str) -> anyhow::Result<AgentConfig> {
        let Some(text) = host.read(path)? else { return Ok(AgentConfig::default()) };
        toml::from_str(&text).map_err(|e| {
            Failure::usage("CONFIG_INVALID", format!("{path} is wrong"))
                .why(e.to_string())
                .hint("correct it, or run `pipeops install-server` again, then `systemctl restart pipeops-agent`")
                .into()
        })
    }
}

/// Runs until `stop`. READY means: configuration valid, socket open, tasks started; not that any server answered.
///
/// # Errors
/// When the configuration is wrong, the socket cannot be opened, or a task ends that should not.
pub async fn run(host: Host, config: AgentConfig, kubeconfig: Option<String>, token: bool, stop: CancellationToken) -> anyhow::Result<()> {
    let started_at = jiff::Timestamp::now().as_second();
    let enrolment = if token { Enrolment::Waiting } else { Enrolment::Unenrolled };
    let first = Agent { version: env!("CARGO_PKG_VERSION").into(), enrolment, started_at, reason: "not looked yet".into(), ..Agent::default() };
    let (publish, state) = watch::channel(first);
    let socket = host.at(config.socket.as_deref().unwrap_or(AGENT_SOCKET));
    let listener = listen(&socket).with_context(|| format!("opening {}", socket.display()))?;
    let credential = kubeconfig.or(config.kubeconfig).unwrap_or_else(|| CREDENTIAL.into());

    let mut tasks: JoinSet<(&'static str, anyhow::Result<()>)> = JoinSet::new();
    let beat = Beat::default();
    {
        let (host, stop, beat) = (host, stop.clone(), beat.clone());
        tasks.spawn(async move { ("observer", observe(&host, &credential, &publish, &beat, &stop).await) });
    }
    {
        let (state, stop) = (state.clone(), stop.clone());
        tasks.spawn(async move { ("socket", serve(listener, state, stop).await) });
    }
    {
        let stop = stop.clone();
        tasks.spawn(async move { ("notifier", notify(state, &beat, &stop).await) });
    }
    let mut result = Ok(());
    while let Some(ended) = tasks.join_next().await {
        match ended {
            Ok((_, Ok(()))) if stop.is_cancelled() => {}
            Ok((name, Ok(()))) => result = Err(anyhow::anyhow!("task {name} ended by itself")),
            Ok((name, Err(error))) => result = Err(error.context(format!("task {name}"))),
            Err(panic) => result = Err(anyhow::anyhow!("a task panicked: {panic}")),
        }
        if !stop.is_cancelled() {
            tell(&[NotifyState::Stopping]);
            stop.cancel();
        }
    }
    let _ = std::os::unix::net::UnixStream::connect(&socket).is_err().then(|| unlink(&socket));
    result
}

/// When the observer last came round, for the watchdog: a hung look must not be covered by a healthy timer.
#[derive(Clone, Default)]
struct Beat(std::sync::Arc<std::sync::atomic::AtomicI64>);

impl Beat {
    fn touch(&self) {
        self.0.store(jiff::Timestamp::now().as_second(), std::sync::atomic::Ordering::Relaxed);
    }

    fn fresh(&self) -> bool {
        let age = jiff::Timestamp::now().as_second() - self.0.load(std::sync::atomic::Ordering::Relaxed);
        age.abs() < 120
    }
}

/// The socket of a former run is replaced: two agents cannot run, systemd sees to it.
#[expect(clippy::disallowed_methods, reason = "the socket is the agent's own, in its RuntimeDirectory")]
fn listen(path: &PathBuf) -> anyhow::Result<UnixListener> {
    use std::os::unix::fs::PermissionsExt as _;
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir)?;
    }
    unlink(path);
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o660))?;
    Ok(listener)
}

#[expect(clippy::disallowed_methods, reason = "the socket is the agent's own, in its RuntimeDirectory")]
fn unlink(path: &PathBuf) {
    let _ = std::fs::remove_file(path);
}

/// Looks at the cluster for ever; every failure is a state, none ends the task.
async fn observe(host: &Host, credential: &str, publish: &watch::Sender<Agent>, beat: &Beat, stop: &CancellationToken) -> anyhow::Result<()> {
    let mut machine = sysinfo::System::new().context("reading this machine")?;
    let mut seen: Option<(i64, Cluster)> = None;
    loop {
        beat.touch();
        machine.refresh_memory();
        let look = look(host, credential, &mut seen).await;
        publish.send_modify(|agent| {
            agent.memory_used = machine.used_memory();
            agent.memory_total = machine.total_memory();
            match look {
                Ok((api_version, nodes)) => {
                    agent.kubernetes = Kubernetes::Connected;
                    agent.reason.clear();
                    agent.seen_at = jiff::Timestamp::now().as_second();
                    (agent.api_version, agent.nodes) = (api_version, nodes);
                }
                Err(error) => {
                    let refused = error.downcast_ref::<kube::Error>().and_then(status).is_some_and(|code| code == 401 || code == 403);
                    agent.kubernetes = if refused { Kubernetes::Refused } else { Kubernetes::Waiting };
                    agent.reason = error.root_cause().to_string().lines().next().unwrap_or_default().chars().take(200).collect();
                    // what was true then is not said now
                    agent.nodes.clear();
                }
            }
        });
        tokio::select! {
            () = stop.cancelled() => return Ok(()),
            () = tokio::time::sleep(LOOK) => {}
        }
    }
}

/// The credential is read again when its file was replaced.
async fn look(host: &Host, credential: &str, seen: &mut Option<(i64, Cluster)>) -> anyhow::Result<(String, Vec<Node>)> {
    let Some(written) = host.modified(credential) else {
        *seen = None;
        anyhow::bail!("{credential} is not there yet");
    };
    let cluster = match seen {
        Some((at, cluster)) if *at == written => cluster.clone(),
        _ => {
            let cluster = Cluster::open(host, credential).await?;
            *seen = Some((written, cluster.clone()));
            cluster
        }
    };
    let version = cluster.version().await?;
    let nodes = cluster.list("/api/v1/nodes?limit=500").await?;
    Ok((version, nodes.iter().map(Node::of).collect()))
}

/// READY once, STATUS on change, WATCHDOG while the observer comes round.
async fn notify(mut state: watch::Receiver<Agent>, beat: &Beat, stop: &CancellationToken) -> anyhow::Result<()> {
    let every = sd_notify::watchdog_enabled().map_or(Duration::from_secs(20), |w| w / 3);
    let mut said = state.borrow_and_update().line();
    tell(&[NotifyState::Ready, NotifyState::Status(&said)]);
    tracing::info!(status = said, "ready");
    let mut tick = tokio::time::interval(every);
    loop {
        tokio::select! {
            // the observer ends with the same stop: its end must not be seen first
            biased;
            () = stop.cancelled() => {
                tell(&[NotifyState::Stopping, NotifyState::Status("stopping")]);
                return Ok(());
            }
            _ = tick.tick() => {
                if beat.fresh() {
                    tell(&[NotifyState::Watchdog]);
                }
            }
            changed = state.changed() => {
                if changed.is_err() {
                    return Ok(());
                }
                let line = state.borrow_and_update().line();
                if line != said {
                    tell(&[NotifyState::Status(&line)]);
                    tracing::info!(status = line, "state");
                    said = line;
                }
            }
        }
    }
}

/// A failed notification is never fatal: outside systemd there is nobody to tell.
fn tell(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::debug!(%error, "systemd was not told");
    }
}

/// HTTP/1.1 on the unix socket, for root and the agent's group.
async fn serve(listener: UnixListener, state: watch::Receiver<Agent>, stop: CancellationToken) -> anyhow::Result<()> {
    let mut open = JoinSet::new();
    loop {
        tokio::select! {
            () = stop.cancelled() => break,
            accepted = listener.accept() => {
                let Ok((stream, _)) = accepted else {
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                };
                let state = state.clone();
                // a client that never speaks is let go
                open.spawn(tokio::time::timeout(Duration::from_secs(10), async move {
                    let service = hyper::service::service_fn(move |request| std::future::ready(answer(&request, &state)));
                    let _ = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
                }));
            }
            Some(_) = open.join_next() => {}
        }
    }
    let _ = tokio::time::timeout(DRAIN, async { while open.join_next().await.is_some() {} }).await;
    Ok(())
}

fn answer(request: &Request<Incoming>, state: &watch::Receiver<Agent>) -> Result<Response<Full<Bytes>>, std::convert::Infallible> {
    let agent = state.borrow().clone();
    let (status, kind, body) = match request.uri().path() {
        "/healthz" => (StatusCode::OK, "text/plain", "ok\n".to_owned()),
        "/readyz" if agent.kubernetes == Kubernetes::Connected => (StatusCode::OK, "text/plain", "ok\n".to_owned()),
        "/readyz" => (StatusCode::SERVICE_UNAVAILABLE, "text/plain", format!("{}\n", agent.line())),
        "/status" => (StatusCode::OK, "application/json", serde_json::to_string(&agent).unwrap_or_default()),
        "/metrics" => (StatusCode::OK, "text/plain; version=0.0.4", agent.metrics()),
        _ => (StatusCode::NOT_FOUND, "text/plain", "not found\n".to_owned()),
    };
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response.headers_mut().insert("Content-Type", hyper::header::HeaderValue::from_static(kind));
    Ok(response)
}
