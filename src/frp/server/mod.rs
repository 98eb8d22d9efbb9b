//! The FRP server half: takes clients, opens their proxies, joins users to work connections.

mod users;

use std::collections::{HashMap, VecDeque};
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::io::AsyncReadExt as _;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

use crate::base::secret::{Secret, constant_time_eq};
use crate::frp::admission::{AdmissionLimiter, AdmissionPermit};
use crate::frp::codec::{Io, encrypted};
use crate::frp::dial::set_socket_options;
use crate::frp::mux::{Limits, Mux, Side};
use crate::frp::wire::{self, Key, LoginResp, Message, NewProxy, NewProxyResp, Pong, ReqWorkConn};

/// Time for TLS and the first message.
const FIRST_MESSAGE_TIMEOUT: Duration = Duration::from_secs(10);
/// Time to read a refusal. frpc hangs up as soon as it has.
const REFUSAL_TIMEOUT: Duration = Duration::from_secs(2);
/// How long a user waits for a work connection.
const WORK_CONNECTION_TIMEOUT: Duration = Duration::from_secs(10);
/// A connection without a stream is closed after this long: a client holds its control channel.
const IDLE_TIMEOUT: Duration = Duration::from_secs(60);
/// Streams of one connection that have not said yet what they are.
const MAX_PENDING_STREAMS: usize = 256;
/// Largest pool of idle work connections a client.
const MAX_POOL: usize = 5;
/// What may wait beyond the pool: bursts ask twice.
const POOL_RESERVE: usize = 10;

/// Who may log in and what he may open. Both are asked within a login's own task: neither may wait.
pub trait TunnelAuthorizer: Send + Sync {
    /// Checks a login whose token is right; gives its owner and what ends his session.
    ///
    /// # Errors
    /// Why not, for the client to read.
    fn login(&self, login: &wire::Login) -> Result<(String, CancellationToken), String>;

    /// # Errors
    /// Why this owner may not open this proxy.
    fn proxy(&self, owner: &str, asked: &NewProxy) -> Result<(), String>;

    /// Somebody who visits an stcp proxy under a name and with a key of his own.
    fn visitor(&self, name: &str, sign_key: &str, timestamp: i64) -> Option<Visitor>;
}

/// A visitor with a key of his own.
pub struct Visitor {
    /// Where he goes.
    pub proxy: String,
    pub key: Secret,
    /// Ends his streams.
    pub revoked: CancellationToken,
}

/// Whether a visitor's proof was made with `key`.
pub fn signed_by(key: &Secret, sign_key: &str, timestamp: i64) -> bool {
    constant_time_eq(sign_key, &wire::privilege_key(key, timestamp))
}

/// How the server is run.
pub struct ServerConfig {
    pub token: Secret,
    pub tls: Option<Arc<rustls::ServerConfig>>,
    pub tcp_mux: bool,
    /// Whether a tcp proxy may open a port on this address.
    pub tcp_bind: Option<std::net::IpAddr>,
    /// A client that pings and is then silent for this long is gone. Without the multiplexer every one pings; with it frpc has
    /// left that to the multiplexer's own pings since 0.58.
    pub heartbeat: Duration,
    /// Nobody is asked without it: the token is enough.
    pub authorizer: Option<Arc<dyn TunnelAuthorizer>>,
}

/// The server; clones are the same one.
#[derive(Clone)]
pub struct Server {
    shared: Arc<Shared>,
}

struct Shared {
    config: ServerConfig,
    admission: AdmissionLimiter,
    registry: Mutex<Registry>,
}

/// What a stream holds until it has said what it is, and a connection until its first stream has.
struct PendingStream {
    opening: Option<OwnedSemaphorePermit>,
    pass: Option<AdmissionPermit>,
}

#[derive(Default)]
struct Registry {
    sessions: HashMap<String, Arc<ClientSession>>,
    proxies: HashMap<String, Arc<OpenProxy>>,
}

/// A client that is logged in.
struct ClientSession {
    owner: String,
    run_id: String,
    control_sender: mpsc::Sender<Message>,
    pool: Mutex<Pool>,
    max_idle: usize,
    /// Another login took the run id, or the connection ended.
    ended: CancellationToken,
    /// Its task has ended, too, and with it the ports that it held.
    finished: CancellationToken,
}

/// Work connections that wait for a user, or users that wait for one.
#[derive(Default)]
struct Pool {
    idle: VecDeque<Io>,
    users: VecDeque<oneshot::Sender<Io>>,
}

/// A proxy that is open.
struct OpenProxy {
    control: Arc<ClientSession>,
    asked: NewProxy,
    closed: CancellationToken,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // a panic inside leaves plain data behind
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Closes what a session opened, however it ends.
struct SessionGuard<'a> {
    server: &'a Server,
    control: Arc<ClientSession>,
}

impl Drop for SessionGuard<'_> {
    fn drop(&mut self) {
        lock(&self.server.shared.registry).release(&self.control);
        self.control.finished.cancel();
    }
}

impl Registry {
    /// Closes what a session opened and ends it.
    fn release(&mut self, control: &Arc<ClientSession>) {
        self.proxies.retain(|_, open| {
            let theirs = Arc::ptr_eq(&open.control, control);
            if theirs {
                open.closed.cancel();
            }
            !theirs
        });
        if self.sessions.get(&control.run_id).is_some_and(|c| Arc::ptr_eq(c, control)) {
            self.sessions.remove(&control.run_id);
        }
        *lock(&control.pool) = Pool::default();
        control.ended.cancel();
    }
}

impl Server {
    pub fn new(config: ServerConfig) -> Server {
        Server {
            shared: Arc::new(Shared {
                config,
                admission: AdmissionLimiter::default(),
                registry: Mutex::default(),
            }),
        }
    }

    /// Serves connections until `stop`.
    pub async fn serve(&self, listener: TcpListener, stop: CancellationToken) {
        let mut open = JoinSet::new();
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                Some(_) = open.join_next() => {}
                accepted = listener.accept() => match accepted {
                    Ok((stream, peer)) => {
                        let (server, stop) = (self.clone(), stop.clone());
                        open.spawn(async move {
                            tokio::select! {
                                () = stop.cancelled() => {}
                                result = server.connection(stream, peer) => {
                                    if let Err(error) = result {
                                        tracing::debug!(%error, "connection");
                                    }
                                }
                            }
                        });
                    }
                    // out of descriptors: a moment later some are back
                    Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
                },
            }
        }
    }

    /// Ends every client's session; each comes back by itself.
    pub fn end_sessions(&self) {
        lock(&self.shared.registry).sessions.values().for_each(|control| control.ended.cancel());
    }

    /// Whether a proxy of that name is open.
    pub fn has_proxy(&self, name: &str) -> bool {
        lock(&self.shared.registry).proxies.contains_key(name)
    }

    /// Names of the proxies that are open.
    pub fn proxies(&self) -> Vec<String> {
        let mut names: Vec<String> = lock(&self.shared.registry).proxies.keys().cloned().collect();
        names.sort();
        names
    }

    async fn connection(&self, stream: TcpStream, peer: SocketAddr) -> io::Result<()> {
        let Some(pass) = self.shared.admission.acquire(peer.ip()).await else {
            return Err(io::Error::other("too many of this address wait"));
        };
        let io = timeout(FIRST_MESSAGE_TIMEOUT, self.secured(stream)).await??;
        if !self.shared.config.tcp_mux {
            return self
                .first_message(io, PendingStream { opening: None, pass: Some(pass) })
                .await
                .map(drop);
        }
        let (mux, driver) = Mux::new(io, Side::Server, Limits::default());
        let mut driving = JoinSet::new();
        driving.spawn(driver.run());
        let opening = Arc::new(Semaphore::new(MAX_PENDING_STREAMS));
        let next = async || {
            let permit = opening.clone().acquire_owned().await.ok()?;
            Some((permit, mux.accept().await?))
        };
        let mut pass = Some(pass);
        let mut streams = JoinSet::new();
        loop {
            let idle = if pass.is_some() { FIRST_MESSAGE_TIMEOUT } else { IDLE_TIMEOUT };
            tokio::select! {
                () = tokio::time::sleep(idle), if streams.is_empty() => return Err(io::Error::other("nothing came of the connection")),
                // the end of a control channel is the end of its client
                Some(ended) = streams.join_next() => if matches!(ended, Ok(true)) {
                    mux.close();
                    let _ = timeout(Duration::from_secs(1), mux.ended()).await;
                    return Ok(());
                },
                accepted = next() => {
                    let Some((permit, stream)) = accepted else { return Ok(()) };
                    let (server, stranger) = (self.clone(), PendingStream { opening: Some(permit), pass: pass.take() });
                    streams.spawn(async move {
                        server.first_message(Box::new(stream), stranger).await.unwrap_or_else(|error| {
                            tracing::debug!(%error, "stream");
                            false
                        })
                    });
                }
            }
        }
    }

    /// First bytes decide: 0x17 and TLS, TLS, or neither (fatedier/frp `pkg/util/net/tls.go`).
    async fn secured(&self, mut stream: TcpStream) -> io::Result<Io> {
        set_socket_options(&stream, self.shared.config.tcp_mux);
        let mut first = [0];
        stream.peek(&mut first).await?;
        match (&self.shared.config.tls, first[0]) {
            (Some(tls), 0x16 | 0x17) => {
                if first[0] == 0x17 {
                    stream.read_exact(&mut first).await?;
                }
                Ok(Box::new(TlsAcceptor::from(tls.clone()).accept(stream).await?))
            }
            (None, _) => Ok(Box::new(stream)),
            (Some(_), _) => Err(io::Error::other("no TLS")),
        }
    }

    /// Serves a stream to its end; gives whether it was a client's control channel.
    async fn first_message(&self, mut io: Io, stranger: PendingStream) -> io::Result<bool> {
        let first = timeout(FIRST_MESSAGE_TIMEOUT, wire::read(&mut io)).await??;
        let PendingStream { opening, pass } = stranger;
        drop(opening);
        match first {
            Message::Login(login) => {
                // the first stream of a connection is the one that may: one guess each
                let Some(pass) = pass else { return Ok(true) };
                if let Err(error) = self.login(io, login, pass).await {
                    tracing::debug!(%error, "control channel");
                }
                return Ok(true);
            }
            Message::NewWorkConn(hello) => {
                drop(pass);
                self.accept_work_connection(io, &hello).await?;
            }
            Message::NewVisitorConn(hello) => {
                drop(pass);
                self.accept_visitor(io, hello).await?;
            }
            other => {
                return Err(io::Error::other(format!(
                    "a connection began with `{}`",
                    char::from(other.kind())
                )));
            }
        }
        Ok(false)
    }

    async fn login(
        &self,
        mut io: Io,
        login: wire::Login,
        stranger: AdmissionPermit,
    ) -> io::Result<()> {
        let config = &self.shared.config;
        if !constant_time_eq(
            &login.privilege_key,
            &wire::privilege_key(&config.token, login.timestamp),
        ) {
            return refuse(io, "token in login doesn't match token from configuration").await;
        }
        let admitted = self.shared.config.authorizer.as_ref().map(|a| a.login(&login)).transpose();
        let (owner, revoked) = match admitted {
            Ok(admitted) => admitted.unwrap_or_default(),
            Err(error) => return refuse(io, &error).await,
        };
        let run_id = if login.run_id.is_empty() { wire::fresh_run_id() } else { login.run_id };
        let pool = usize::try_from(login.pool_count).unwrap_or(0).min(MAX_POOL);
        let (control_sender, mut queue) = mpsc::channel(64);
        let control = Arc::new(ClientSession {
            owner,
            run_id: run_id.clone(),
            control_sender,
            pool: Mutex::default(),
            max_idle: pool + POOL_RESERVE,
            ended: CancellationToken::new(),
            finished: CancellationToken::new(),
        });
        // a run id is no password: only its own holder takes it over
        let taken = self.take_over(&run_id, &control);
        let Ok(former) = taken else {
            return refuse(io, "the run id is another client's").await;
        };
        let _leave = SessionGuard { server: self, control: control.clone() };
        drop(stranger);
        if let Some(former) = former {
            // its names are free by now; a task that hangs in a dead connection does not hold the login
            let _ = timeout(Duration::from_secs(1), former.finished.cancelled()).await;
        }
        wire::write(
            &mut io,
            LoginResp { version: wire::VERSION.into(), run_id, error: String::new() },
        )
        .await?;
        let (mut reader, mut writer) = tokio::io::split(encrypted(io, &Key::of(&config.token)));
        for _ in 0..pool {
            wire::write(&mut writer, ReqWorkConn {}).await?;
        }
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            while let Some(message) = queue.recv().await {
                if wire::write(&mut writer, message).await.is_err() {
                    return;
                }
            }
        });
        let mut listeners = JoinSet::new();
        let mut pings = !config.tcp_mux;
        loop {
            let patience = if pings { config.heartbeat } else { Duration::MAX };
            let message = tokio::select! {
                () = control.ended.cancelled() => return Ok(()),
                () = revoked.cancelled() => return Ok(()),
                message = timeout(patience, wire::read(&mut reader)) => message??,
            };
            pings |= matches!(message, Message::Ping(_));
            let answer: Option<Message> = match message {
                Message::Ping(ping) if self.is_token_valid(&ping.privilege_key, ping.timestamp) => {
                    Some(Pong::default().into())
                }
                Message::Ping(_) => Some(
                    Pong {
                        error: "token in heartbeat doesn't match token from configuration".into(),
                    }
                    .into(),
                ),
                Message::NewProxy(asked) => {
                    let name = asked.proxy_name.clone();
                    let (remote_addr, error) =
                        match self.open(&control, asked, &mut listeners).await {
                            Ok(address) => (address, String::new()),
                            Err(error) => (String::new(), error),
                        };
                    Some(NewProxyResp { proxy_name: name, remote_addr, error }.into())
                }
                Message::CloseProxy(close) => {
                    let mut registry = lock(&self.shared.registry);
                    if registry
                        .proxies
                        .get(&close.proxy_name)
                        .is_some_and(|o| Arc::ptr_eq(&o.control, &control))
                        && let Some(open) = registry.proxies.remove(&close.proxy_name)
                    {
                        open.closed.cancel();
                    }
                    None
                }
                _ => None,
            };
            if let Some(answer) = answer {
                control
                    .control_sender
                    .send(answer)
                    .await
                    .map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))?;
            }
        }
    }

    /// Whether a message after the login may be believed. frpc proves the token again only where its `additionalScopes` say so: a
    /// ping stands on the session, a work connection on the run id.
    fn is_token_valid(&self, privilege_key: &str, timestamp: i64) -> bool {
        privilege_key.is_empty()
            || constant_time_eq(
                privilege_key,
                &wire::privilege_key(&self.shared.config.token, timestamp),
            )
    }

    /// The session that `control` takes the place of; an error when that is somebody else's.
    fn take_over(
        &self,
        run_id: &str,
        control: &Arc<ClientSession>,
    ) -> Result<Option<Arc<ClientSession>>, ()> {
        let mut registry = lock(&self.shared.registry);
        let former = registry.sessions.get(run_id).cloned();
        if former.as_ref().is_some_and(|c| c.owner != control.owner) {
            return Err(());
        }
        if let Some(former) = &former {
            registry.release(former);
        }
        registry.sessions.insert(run_id.into(), control.clone());
        Ok(former)
    }

    async fn open(
        &self,
        control: &Arc<ClientSession>,
        asked: NewProxy,
        listeners: &mut JoinSet<()>,
    ) -> Result<String, String> {
        let open = Arc::new(OpenProxy {
            control: control.clone(),
            asked: asked.clone(),
            closed: CancellationToken::new(),
        });
        let name = asked.proxy_name.clone();
        if let Some(authorizer) = &self.shared.config.authorizer {
            authorizer.proxy(&control.owner, &asked)?;
        }
        let listener = match (asked.proxy_type.as_str(), self.shared.config.tcp_bind) {
            // users of an http proxy come through this process, too: there is no vhost port
            ("stcp" | "http", _) => None,
            ("tcp" | "", Some(bind)) => Some(
                TcpListener::bind(SocketAddr::new(bind, asked.remote_port))
                    .await
                    .map_err(|e| format!("port unavailable: {e}"))?,
            ),
            ("tcp" | "", None) => return Err("port not allowed".into()),
            (other, _) => return Err(format!("unknown proxy type: {other}")),
        };
        {
            let mut registry = lock(&self.shared.registry);
            if registry.proxies.contains_key(&name) {
                return Err(format!("proxy [{name}] already exists"));
            }
            registry.proxies.insert(name, open.clone());
        }
        let Some(listener) = listener else { return Ok(asked.custom_domains.join(",")) };
        let port = listener.local_addr().map_err(|e| e.to_string())?.port();
        let server = self.clone();
        listeners.spawn(async move {
            let mut users = JoinSet::new();
            loop {
                tokio::select! {
                    () = open.closed.cancelled() => break,
                    Some(_) = users.join_next() => {}
                    accepted = listener.accept() => {
                        let Ok((mut user, from)) = accepted else { continue };
                        set_socket_options(&user, false);
                        let (server, open) = (server.clone(), open.clone());
                        users.spawn(async move {
                            if let Ok(mut work) = server.connect_user(&open, Some(from)).await {
                                users::splice(&mut user, &mut work).await;
                            }
                        });
                    }
                }
            }
            // existing users go on until the session ends
            drop(listener);
            while users.join_next().await.is_some() {}
        });
        Ok(format!(":{port}"))
    }
}

/// Of an answer and a hang-up that come together hashicorp/yamux may give its reader only the latter (`stream.go`, Read): the
/// client is the one who hangs up.
async fn refuse(mut io: Io, error: &str) -> io::Result<()> {
    wire::write(
        &mut io,
        LoginResp { version: wire::VERSION.into(), error: error.into(), ..LoginResp::default() },
    )
    .await?;
    let _ = timeout(REFUSAL_TIMEOUT, io.read(&mut [0])).await;
    Ok(())
}
