//! Local interfaces: notifications to systemd, and the status of the agent over a unix socket or,
//! when configured, a loopback port.

use std::error::Error as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use http_body_util::{BodyExt as _, Limited};
use hyper::body::Incoming;
use hyper::{Request, Response, StatusCode, header};
use sd_notify::NotifyState;
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::agent::status::AgentStatus;
use crate::base::connection::{self, Body, Handler, Io, Versions};
use crate::base::json;
use crate::base::metrics::{self, MetricsText};
use crate::base::task::boxed;

/// Time for open answers after a stop.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(2);
/// Most bytes of a status that are read.
const MAX_STATUS_BYTES: usize = 1 << 20;

/// Adds to `/metrics` what the status does not know.
pub(super) type ExtraMetrics = Arc<dyn Fn(&mut MetricsText) + Send + Sync>;

/// When the observer last looked, for the watchdog: a timer alone would hide an observer that
/// hangs.
#[derive(Clone, Default)]
pub(crate) struct ObserverLiveness(Arc<AtomicI64>);

impl ObserverLiveness {
    pub(super) fn touch(&self) {
        self.0.store(jiff::Timestamp::now().as_second(), Ordering::Relaxed);
    }

    pub(super) fn is_fresh(&self) -> bool {
        let age = jiff::Timestamp::now().as_second() - self.0.load(Ordering::Relaxed);
        age.abs() < 120
    }
}

/// Replaces the socket of a former run. systemd lets no two agents run.
#[expect(
    clippy::disallowed_methods,
    reason = "the socket is the agent's own, in its RuntimeDirectory"
)]
pub(super) fn listen(path: &Path) -> anyhow::Result<UnixListener> {
    use std::os::unix::fs::PermissionsExt as _;
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir)?;
    }
    unlink(path);
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o660))?;
    Ok(listener)
}

#[expect(
    clippy::disallowed_methods,
    reason = "the socket is the agent's own, in its RuntimeDirectory"
)]
pub(super) fn unlink(path: &Path) {
    let _ = std::fs::remove_file(path);
}

/// READY once, STATUS on change, WATCHDOG while the observer is alive.
pub(super) async fn notify(
    systemd: SystemdNotifier,
    mut state: watch::Receiver<AgentStatus>,
    liveness: &ObserverLiveness,
    drain: &CancellationToken,
    stop: &CancellationToken,
) -> anyhow::Result<()> {
    let every = sd_notify::watchdog_enabled().map_or(Duration::from_secs(20), |w| w / 3);
    let (mut last_status, needs_help) = summarized(&mut state);
    systemd.send(Some(NotifyState::Ready), Some(&last_status));
    log_status("ready", &last_status, needs_help);
    let mut tick = tokio::time::interval(every);
    loop {
        tokio::select! {
            biased;
            () = drain.cancelled() => {
                let status = "stopping: finishing what is under way";
                systemd.send(Some(NotifyState::Stopping), Some(status));
                stop.cancelled().await;
                return Ok(());
            }
            _ = tick.tick() => {
                if liveness.is_fresh() {
                    systemd.send(Some(NotifyState::Watchdog), None);
                }
            }
            changed = state.changed() => {
                if changed.is_err() {
                    return Ok(());
                }
                let (line, needs_help) = summarized(&mut state);
                if line != last_status {
                    systemd.send(None, Some(&line));
                    log_status("state", &line, needs_help);
                    last_status = line;
                }
            }
        }
    }
}

/// The line for systemd and the log, and whether a person has to do something.
fn summarized(state: &mut watch::Receiver<AgentStatus>) -> (String, bool) {
    let state = state.borrow_and_update();
    (state.summary(), state.needs_help())
}

/// A log that shows warnings alone still has what a person has to do.
fn log_status(event: &str, status: &str, needs_help: bool) {
    if needs_help {
        tracing::warn!(status, "{event}");
    } else {
        tracing::info!(status, "{event}");
    }
}

/// Notifications to systemd, from a thread of its own: a systemd that does not read must block
/// nothing here.
#[derive(Clone)]
pub(super) struct SystemdNotifier(
    std::sync::mpsc::SyncSender<(Option<NotifyState<'static>>, Option<String>)>,
);

impl SystemdNotifier {
    pub(super) fn new() -> SystemdNotifier {
        let (sender, notes) =
            std::sync::mpsc::sync_channel::<(Option<NotifyState<'static>>, Option<String>)>(32);
        std::thread::spawn(move || {
            while let Ok((state, status)) = notes.recv() {
                let states: Vec<NotifyState<'_>> =
                    state.into_iter().chain(status.as_deref().map(NotifyState::Status)).collect();
                // not fatal: outside systemd nothing listens
                if let Err(error) = sd_notify::notify(&states) {
                    tracing::debug!(%error, "systemd was not notified");
                }
            }
        });
        SystemdNotifier(sender)
    }

    fn send(&self, state: Option<NotifyState<'static>>, status: Option<&str>) {
        let _ = self.0.try_send((state, status.map(str::to_owned)));
    }
}

/// HTTP/1.1 on the unix socket, for root and the agent's group, and on a port where one was asked
/// for.
pub(super) async fn serve(
    listener: UnixListener,
    port: Option<TcpListener>,
    state: watch::Receiver<AgentStatus>,
    extra: ExtraMetrics,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let mut open = JoinSet::new();
    let serving =
        |io: Io, metrics_only| boxed(connection(io, state.clone(), extra.clone(), metrics_only));
    loop {
        let tcp = async {
            match &port {
                Some(port) => port.accept().await.map(|(stream, _)| stream),
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = stop.cancelled() => break,
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    open.spawn(serving(Box::new(stream), false));
                }
                Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
            },
            accepted = tcp => match accepted {
                Ok(stream) => {
                    open.spawn(serving(Box::new(stream), true));
                }
                Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
            },
            Some(_) = open.join_next() => {}
        }
    }
    let _ =
        tokio::time::timeout(DRAIN_TIMEOUT, async { while open.join_next().await.is_some() {} })
            .await;
    Ok(())
}

/// A client that sends nothing is disconnected.
async fn connection(
    io: Io,
    state: watch::Receiver<AgentStatus>,
    extra: ExtraMetrics,
    metrics_only: bool,
) {
    let handler: Handler = Box::new(move |request| {
        Box::pin(std::future::ready(Ok(answer(&request, &state, &extra, metrics_only))))
    });
    let never = CancellationToken::new();
    let serving = connection::serve(io, Versions::Http1, handler, &never);
    let _ = tokio::time::timeout(Duration::from_secs(10), serving).await;
}

fn answer(
    request: &Request<Incoming>,
    state: &watch::Receiver<AgentStatus>,
    extra: &ExtraMetrics,
    metrics_only: bool,
) -> Response<Body> {
    let agent = state.borrow().clone();
    let (status, kind, body) = match request.uri().path() {
        "/metrics" => {
            let mut metrics = MetricsText::default();
            agent.write_metrics(&mut metrics);
            extra(&mut metrics);
            (StatusCode::OK, metrics::CONTENT_TYPE, metrics.into_string())
        }
        "/healthz" => (StatusCode::OK, "text/plain", "ok\n".to_owned()),
        "/readyz" if !metrics_only => match agent.ready() {
            Ok(()) => (StatusCode::OK, "text/plain", "ok\n".to_owned()),
            Err(why) => (StatusCode::SERVICE_UNAVAILABLE, "text/plain", format!("{why}\n")),
        },
        "/status" if !metrics_only => {
            (StatusCode::OK, "application/json", serde_json::to_string(&agent).unwrap_or_default())
        }
        _ => (StatusCode::NOT_FOUND, "text/plain", "not found\n".to_owned()),
    };
    let mut response = Response::new(Body::from(body));
    *response.status_mut() = status;
    response.headers_mut().insert("Content-Type", header::HeaderValue::from_static(kind));
    response
}

/// The status of the agent that serves this socket.
///
/// # Errors
/// When it cannot be reached, or answers something else than a status.
pub(crate) async fn ask_status(socket: &Path) -> anyhow::Result<AgentStatus> {
    let stream = UnixStream::connect(socket).await?;
    let request = Request::get("/status").header(header::HOST, "agent").body(Body::empty())?;
    let answer = connection::send(Box::new(stream), request).await.map_err(|error| {
        let io = error.source().is_some_and(|cause| cause.is::<std::io::Error>());
        if io { error.into() } else { anyhow::anyhow!("it spoke no HTTP") }
    })?;
    let body = Limited::new(answer.into_body(), MAX_STATUS_BYTES).collect().await;
    Ok(json::read(body.map_err(anyhow::Error::from_boxed)?.to_bytes())?)
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    #[tokio::test]
    async fn the_status_that_is_served_is_the_one_that_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("run/agent.sock");
        let served = AgentStatus { id: "a-1".into(), ..AgentStatus::default() };
        let (_status, state) = watch::channel(served.clone());
        let extra: ExtraMetrics = Arc::new(|_| {});
        let listener = listen(&socket).unwrap();
        tokio::spawn(serve(listener, None, state, extra, CancellationToken::new()));
        assert_eq!(ask_status(&socket).await.unwrap(), served);
    }

    #[tokio::test]
    async fn what_is_no_agent_is_said_to_be_none() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("agent.sock");
        let said = async || ask_status(&socket).await.unwrap_err().root_cause().to_string();
        assert!(said().await.contains("No such file"));
        let listener = listen(&socket).unwrap();
        for (answer, wanted) in [
            ("", "it spoke no HTTP"),
            ("220 mail.example ESMTP\r\n\r\n", "it spoke no HTTP"),
            ("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nup", "expected value"),
        ] {
            let answers = async {
                let (mut stream, _) = listener.accept().await.unwrap();
                // all of it: what is left unread would reset the connection
                let mut request = Vec::new();
                while !request.ends_with(b"\r\n\r\n") {
                    request.push(stream.read_u8().await.unwrap());
                }
                stream.write_all(answer.as_bytes()).await.unwrap();
            };
            let (said, ()) = tokio::join!(said(), answers);
            assert!(said.starts_with(wanted), "{answer}: {said}");
        }
    }
}
