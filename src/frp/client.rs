//! The FRP client: carries out what the machine of `frp/mod.rs` decides, and yields the streams that the server hands over.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::AsyncWriteExt as _;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

use crate::base::backoff::random;
use crate::base::secret::Secret;
use crate::frp::codec::{Duplex, Io, encrypted, layered};
use crate::frp::dial::{Carrier, Dialer, STAGE_TIMEOUT};
use crate::frp::wire::{
    self, CloseProxy, Key, Login, Message, NewProxy, NewWorkConn, Ping, StartWorkConn,
};
use crate::frp::{
    Proxy, ProxyKind, TunnelAction, TunnelConfig, TunnelEvent, TunnelStateMachine, TunnelStatus,
};

/// A stream of a user, handed over by the server.
pub struct WorkConnection {
    pub proxy: String,
    pub kind: ProxyKind,
    /// Address of the user as the server saw it; empty where it does not say.
    pub from: String,
    pub io: Io,
}

/// What stays the same over sessions.
pub struct Client {
    pub hostname: String,
    pub allow_insecure: bool,
    /// A proxy is what leads out of here, as far as anybody has said: the tunnel does not go through one.
    pub proxied: bool,
    /// Settings as they come and change.
    pub settings: watch::Receiver<Option<TunnelConfig>>,
    pub publish: watch::Sender<TunnelStatus>,
    /// A new run id, to be kept over restarts.
    pub run_ids: mpsc::Sender<String>,
    pub work_connections: mpsc::Sender<WorkConnection>,
    /// Takes nothing new; what is open goes on.
    pub drain: CancellationToken,
    pub stop: CancellationToken,
}

/// Why a server is not reached; where a proxy was named, with the way out.
fn explain_unreachable(proxied: bool, target: &Dialer, why: String) -> String {
    if !proxied || !(why.starts_with("dns: ") || why.starts_with("tcp: ")) {
        return why;
    }
    format!(
        "proxy_only: {why}; a proxy is set, and the tunnel does not go through one: let this machine reach {target} directly"
    )
}

/// What the tasks of one connection tell the driver.
enum ConnectionEvent {
    Event(TunnelEvent),
    Carrier(Carrier),
    Control(mpsc::Sender<Message>),
}

/// Orders waiting for the control channel, and news waiting for the driver.
const QUEUE: usize = 64;
/// Work connections that are being opened at the same time.
const MAX_OPENING: usize = 64;

struct Connection {
    number: u64,
    tasks: JoinSet<()>,
    carrier: Option<Carrier>,
    control_sender: Option<mpsc::Sender<Message>>,
}

impl Client {
    /// Runs until `stop`. Nothing that a server does or does not do ends it.
    pub async fn run(mut self, run_id: String) {
        let mut machine = TunnelStateMachine::new(run_id, Instant::now());
        let (news, mut incoming) = mpsc::channel::<(u64, ConnectionEvent)>(QUEUE);
        let mut connection =
            Connection { number: 0, tasks: JoinSet::new(), carrier: None, control_sender: None };
        let mut config = Arc::new(TunnelConfig::default());
        let mut target = None;
        let mut drained = false;
        self.settings.mark_changed();
        loop {
            let wake = machine.wake();
            let timer = async {
                match wake {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            let event = tokio::select! {
                () = self.stop.cancelled() => break,
                () = self.drain.cancelled(), if !drained => {
                    drained = true;
                    for proxy in &config.proxies {
                        connection.send_control(CloseProxy { proxy_name: wire_name(&config, &proxy.name) });
                    }
                    continue;
                }
                changed = self.settings.changed(), if !drained => {
                    if changed.is_err() {
                        break;
                    }
                    let latest = self.settings.borrow_and_update().clone();
                    match latest {
                        None => TunnelEvent::Settings(None),
                        Some(latest) => match Dialer::new(&latest, self.allow_insecure) {
                            Ok(usable) => {
                                target = Some(usable);
                                config = Arc::new(latest.clone());
                                TunnelEvent::Settings(Some(Box::new(latest)))
                            }
                            Err(why) => TunnelEvent::Unusable(why),
                        },
                    }
                }
                Some((number, news)) = incoming.recv() => {
                    if number != connection.number {
                        continue;
                    }
                    match news {
                        ConnectionEvent::Event(event) => event,
                        ConnectionEvent::Carrier(carrier) => {
                            connection.carrier = Some(carrier);
                            TunnelEvent::Connected
                        }
                        ConnectionEvent::Control(control_sender) => {
                            connection.control_sender = Some(control_sender);
                            continue;
                        }
                    }
                }
                () = timer => {
                    // any byte on the shared connection is a sign of life, not only a pong
                    if let Some(silence) = connection.carrier.as_ref().and_then(Carrier::silence)
                        && let Some(heard) = Instant::now().checked_sub(silence)
                    {
                        machine.on(TunnelEvent::Heard, heard, 0.5);
                    }
                    TunnelEvent::Tick
                }
            };
            for action in machine.on(event, Instant::now(), random()) {
                match action {
                    TunnelAction::FreshRunId => {
                        let fresh = wire::fresh_run_id();
                        machine.use_run_id(fresh.clone());
                        let _ = self.run_ids.send(fresh).await;
                    }
                    TunnelAction::Disconnect => connection.end(),
                    TunnelAction::Connect => {
                        connection.begin();
                        if let Some(target) = target.clone() {
                            connection.connect(target, self.proxied, news.clone());
                        }
                    }
                    TunnelAction::Login { run_id } => {
                        let run_id =
                            if run_id.is_empty() { machine.run_id.clone() } else { run_id };
                        connection.login(
                            self.login(&config, run_id),
                            config.clone(),
                            self.work_connections.clone(),
                            news.clone(),
                        );
                    }
                    TunnelAction::Open { name } => {
                        if let Some(proxy) =
                            config.proxies.iter().find(|p| p.name == name).filter(|_| !drained)
                        {
                            connection.send_control(new_proxy(&config, proxy));
                        }
                    }
                    TunnelAction::Close { name } => connection
                        .send_control(CloseProxy { proxy_name: wire_name(&config, &name) }),
                    TunnelAction::Ping => {
                        let timestamp = now();
                        connection.send_control(Ping {
                            privilege_key: wire::privilege_key(&config.auth.token, timestamp),
                            timestamp,
                        });
                    }
                }
            }
            let status = machine.status();
            self.publish.send_if_modified(|s| {
                let news = s != status;
                if news {
                    *s = status.clone();
                }
                news
            });
        }
        connection.end();
    }

    fn login(&self, config: &TunnelConfig, run_id: String) -> Login {
        let timestamp = now();
        Login {
            version: wire::VERSION.into(),
            hostname: self.hostname.clone(),
            os: "linux".into(),
            arch: match std::env::consts::ARCH {
                "x86_64" => "amd64".into(),
                "aarch64" => "arm64".into(),
                other => other.into(),
            },
            user: config.auth.user.clone().unwrap_or_default(),
            privilege_key: wire::privilege_key(&config.auth.token, timestamp),
            timestamp,
            run_id,
            metas: config.auth.metas.clone(),
            pool_count: i64::from(config.pool_count),
        }
    }
}

/// Seconds since 1970, never negative: the server does not judge it.
fn now() -> i64 {
    jiff::Timestamp::now().as_second().max(0)
}

/// A proxy's name on the wire: with the user before it, as frpc does.
fn wire_name(config: &TunnelConfig, name: &str) -> String {
    match config.auth.user.as_deref() {
        Some(user) if !user.is_empty() => format!("{user}.{name}"),
        _ => name.into(),
    }
}

/// The name without exactly one prefix.
fn own_name<'a>(config: &TunnelConfig, name: &'a str) -> &'a str {
    match config.auth.user.as_deref() {
        Some(user) if !user.is_empty() => {
            name.strip_prefix(user).and_then(|n| n.strip_prefix('.')).unwrap_or(name)
        }
        _ => name,
    }
}

fn new_proxy(config: &TunnelConfig, proxy: &Proxy) -> NewProxy {
    NewProxy {
        proxy_name: wire_name(config, &proxy.name),
        proxy_type: proxy.kind.name().into(),
        use_encryption: proxy.use_encryption,
        use_compression: proxy.use_compression,
        remote_port: proxy.remote_port,
        custom_domains: proxy.custom_domains.clone(),
        subdomain: proxy.subdomain.clone(),
        sk: proxy.secret_key.expose().into(),
        allow_users: proxy.allow_users.clone(),
        ..NewProxy::default()
    }
}

impl Connection {
    fn begin(&mut self) {
        self.end();
        self.number += 1;
    }

    /// The connection itself is closed too, so that the server learns of it before the next login.
    fn end(&mut self) {
        self.tasks.abort_all();
        self.tasks = JoinSet::new();
        self.carrier = None;
        self.control_sender = None;
    }

    fn send_control(&self, message: impl Into<Message>) {
        // a full queue means that the server does not read: the missing pong will tell
        if let Some(control_sender) = &self.control_sender {
            let _ = control_sender.try_send(message.into());
        }
    }

    fn connect(
        &mut self,
        target: Dialer,
        proxied: bool,
        news: mpsc::Sender<(u64, ConnectionEvent)>,
    ) {
        let number = self.number;
        self.tasks.spawn(async move {
            let mut tasks = JoinSet::new();
            let told = match target.connect(&mut tasks).await {
                Ok(carrier) => ConnectionEvent::Carrier(carrier),
                Err(error) if error.unanswered => ConnectionEvent::Event(TunnelEvent::Unanswered(
                    explain_unreachable(proxied, &target, error.why),
                )),
                Err(error) => ConnectionEvent::Event(TunnelEvent::ConnectFailed(
                    explain_unreachable(proxied, &target, error.why),
                )),
            };
            let _ = news.send((number, told)).await;
            // the connection lives as long as this task
            while tasks.join_next().await.is_some() {}
        });
    }

    fn login(
        &mut self,
        login: Login,
        config: Arc<TunnelConfig>,
        work: mpsc::Sender<WorkConnection>,
        news: mpsc::Sender<(u64, ConnectionEvent)>,
    ) {
        let Some(carrier) = self.carrier.clone() else { return };
        let number = self.number;
        self.tasks.spawn(async move {
            let end = run_control_channel(number, carrier, login, config, work, news.clone()).await;
            let _ = news.send((number, ConnectionEvent::Event(end))).await;
        });
    }
}

/// The control channel from login to its end; gives the event that ends it.
async fn run_control_channel(
    number: u64,
    carrier: Carrier,
    login: Login,
    config: Arc<TunnelConfig>,
    work: mpsc::Sender<WorkConnection>,
    news: mpsc::Sender<(u64, ConnectionEvent)>,
) -> TunnelEvent {
    let begun = timeout(STAGE_TIMEOUT, async {
        let mut stream = carrier.open().await?;
        wire::write(&mut stream, login).await?;
        let answer = wire::read(&mut stream).await?;
        Ok::<_, std::io::Error>((stream, answer))
    });
    let (stream, answer) = match begun.await {
        Err(_) => return TunnelEvent::LoginSilent,
        Ok(Err(e)) => return TunnelEvent::Lost(e.to_string()),
        Ok(Ok(both)) => both,
    };
    let run_id = match answer {
        Message::LoginResp(r) if r.error.is_empty() => r.run_id,
        Message::LoginResp(r) => return TunnelEvent::LoginRefused(r.error),
        other => {
            return TunnelEvent::Lost(format!(
                "the login was answered with `{}`",
                char::from(other.kind())
            ));
        }
    };
    let key = Key::of(&config.auth.token);
    let (mut reader, mut writer) = tokio::io::split(encrypted(stream, &key));
    let (control_sender, mut queue) = mpsc::channel::<Message>(QUEUE);
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        while let Some(message) = queue.recv().await {
            // one that is too long is refused here, before it could end the session
            if let Err(e) = wire::write(&mut writer, message).await {
                tracing::debug!(error = %e, "control channel");
                if e.kind() != std::io::ErrorKind::InvalidInput {
                    return;
                }
            }
        }
        let _ = writer.shutdown().await;
    });
    let _ = news.send((number, ConnectionEvent::Control(control_sender))).await;
    let _ = news
        .send((number, ConnectionEvent::Event(TunnelEvent::LoggedIn { run_id: run_id.clone() })))
        .await;
    let kinds: Arc<HashMap<String, Proxy>> =
        Arc::new(config.proxies.iter().map(|p| (p.name.clone(), p.clone())).collect());
    let opening = Arc::new(Semaphore::new(MAX_OPENING));
    loop {
        let message = match wire::read(&mut reader).await {
            Ok(message) => message,
            Err(e) if e.kind() == std::io::ErrorKind::InvalidData => {
                return TunnelEvent::Lost(format!(
                    "unreadable message (do both ends have the same token?): {e}"
                ));
            }
            Err(e) => return TunnelEvent::Lost(e.to_string()),
        };
        let event = match message {
            Message::ReqWorkConn(_) => {
                while tasks.try_join_next().is_some() {}
                let (carrier, config, kinds, work, opening, run_id) = (
                    carrier.clone(),
                    config.clone(),
                    kinds.clone(),
                    work.clone(),
                    opening.clone(),
                    run_id.clone(),
                );
                tasks.spawn(async move {
                    // an end before a user comes is the server's right, and no trouble
                    if let Err(e) =
                        work_connection(&carrier, &config, &kinds, &opening, run_id, work).await
                    {
                        tracing::debug!(error = %e, "work connection");
                    }
                });
                TunnelEvent::Heard
            }
            Message::NewProxyResp(r) => TunnelEvent::ProxyAnswer {
                name: own_name(&config, &r.proxy_name).to_owned(),
                error: r.error,
            },
            Message::Pong(p) if p.error.is_empty() => TunnelEvent::Heard,
            Message::Pong(p) => TunnelEvent::PongRefused(p.error),
            // known, and not for a client: passed over, as the original does
            _ => TunnelEvent::Heard,
        };
        if news.send((number, ConnectionEvent::Event(event))).await.is_err() {
            return TunnelEvent::Lost("stopped".into());
        }
    }
}

/// Opens a work connection, waits without limit for its user, hands it over.
async fn work_connection(
    carrier: &Carrier,
    config: &TunnelConfig,
    kinds: &HashMap<String, Proxy>,
    opening: &Semaphore,
    run_id: String,
    work: mpsc::Sender<WorkConnection>,
) -> std::io::Result<()> {
    let timestamp = now();
    let hello = NewWorkConn {
        run_id,
        privilege_key: wire::privilege_key(&config.auth.token, timestamp),
        timestamp,
    };
    let mut stream = {
        let _permit = opening.acquire().await.map_err(std::io::Error::other)?;
        timeout(STAGE_TIMEOUT * 2, async {
            let mut stream = carrier.open().await?;
            wire::write(&mut stream, hello).await?;
            Ok::<_, std::io::Error>(stream)
        })
        .await
        .map_err(|_| std::io::Error::from(std::io::ErrorKind::TimedOut))??
    };
    let start = match wire::read(&mut stream).await? {
        Message::StartWorkConn(start) => start,
        other => {
            return Err(std::io::Error::other(format!(
                "started with `{}`",
                char::from(other.kind())
            )));
        }
    };
    if !start.error.is_empty() {
        return Err(std::io::Error::other(start.error));
    }
    let Some(proxy) = kinds.get(own_name(config, &start.proxy_name)) else {
        return Err(std::io::Error::other(format!("for an unknown proxy {}", start.proxy_name)));
    };
    let key = proxy.use_encryption.then(|| Key::of(&config.auth.token));
    let io = layered(stream, key.as_ref(), proxy.use_compression);
    let handed =
        WorkConnection { proxy: proxy.name.clone(), kind: proxy.kind, from: peer(&start), io };
    // nobody takes it within the time that a user waits anyway: closed, so that the user hears of it
    timeout(Duration::from_secs(10), work.send(handed))
        .await
        .map_err(|_| std::io::Error::from(std::io::ErrorKind::TimedOut))?
        .map_err(|_| std::io::Error::from(std::io::ErrorKind::BrokenPipe))
}

fn peer(start: &StartWorkConn) -> String {
    if start.src_addr.is_empty() {
        String::new()
    } else {
        format!("{}:{}", start.src_addr, start.src_port)
    }
}

/// Asks the FRP server for a stream to an stcp proxy, as a visitor.
///
/// # Errors
/// I/O errors, and the server's refusal as `PermissionDenied`.
pub async fn visit(
    carrier: &Carrier,
    run_id: &str,
    proxy: &str,
    secret_key: &Secret,
) -> std::io::Result<impl Duplex + use<>> {
    let timestamp = now();
    let mut stream = carrier.open().await?;
    let hello = wire::NewVisitorConn {
        run_id: run_id.into(),
        proxy_name: proxy.into(),
        sign_key: wire::privilege_key(secret_key, timestamp),
        timestamp,
        ..wire::NewVisitorConn::default()
    };
    wire::write(&mut stream, hello).await?;
    match timeout(STAGE_TIMEOUT * 2, wire::read(&mut stream))
        .await
        .map_err(|_| std::io::Error::from(std::io::ErrorKind::TimedOut))??
    {
        Message::NewVisitorConnResp(r) if r.error.is_empty() => Ok(stream),
        Message::NewVisitorConnResp(r) => {
            Err(std::io::Error::new(std::io::ErrorKind::PermissionDenied, r.error))
        }
        other => {
            Err(std::io::Error::other(format!("answered with `{}`", char::from(other.kind()))))
        }
    }
}
