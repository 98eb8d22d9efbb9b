//! The FRP server: accepts clients, opens their proxies, connects users to work connections.

mod session;
mod users;

use std::collections::{HashMap, VecDeque};
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::io::AsyncReadExt as _;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

use crate::base::secret::{Secret, constant_time_eq};
use crate::base::task::boxed;
use crate::frp::admission::{AdmissionLimiter, AdmissionPermit};
use crate::frp::codec::Io;
use crate::frp::mux::{Limits, Mux, Side};
use crate::frp::socket::TunnelSocket;
use crate::frp::wire::{self, Message, NewProxy};

/// Time for TLS and the first message.
const FIRST_MESSAGE_TIMEOUT: Duration = Duration::from_secs(10);
/// Time to read a refusal. frpc closes the connection as soon as it has read it.
const REFUSAL_TIMEOUT: Duration = Duration::from_secs(2);
/// How long a user waits for a work connection.
const WORK_CONNECTION_TIMEOUT: Duration = Duration::from_secs(10);
/// A connection without a stream is closed after this long: a client holds its control channel.
const IDLE_TIMEOUT: Duration = Duration::from_secs(60);
/// Streams of one connection whose first message has not arrived.
const MAX_PENDING_STREAMS: usize = 256;
/// Most idle work connections that a client is asked to keep ready.
const MAX_POOL: usize = 5;
/// Idle work connections beyond the pool: in a burst more are asked for than are used.
const POOL_RESERVE: usize = 10;

/// Decides who may log in and what it may open. Called within the task of a login: it must not
/// block.
pub trait TunnelAuthorizer: Send + Sync {
    /// Checks a login whose token is right; gives its owner and what ends the session.
    ///
    /// # Errors
    /// Why not, for the client to read.
    fn login(&self, login: &wire::Login) -> Result<(String, CancellationToken), String>;

    /// # Errors
    /// Why this owner may not open this proxy.
    fn proxy(&self, owner: &str, asked: &NewProxy) -> Result<(), String>;

    /// A visitor of an stcp proxy with a name and a key of its own.
    fn visitor(&self, name: &str, sign_key: &str, timestamp: i64) -> Option<Visitor>;
}

/// A visitor with a key of its own.
pub struct Visitor {
    /// The proxy that it visits.
    pub proxy: String,
    pub key: Secret,
    /// Cancelled when its right ends: its streams end with it.
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
    /// A client that pings and is then silent for this long is gone. Without the multiplexer every
    /// one pings; with it frpc has left that to the multiplexer's own pings since 0.58.
    pub heartbeat: Duration,
    /// Without one the token is enough.
    pub authorizer: Option<Arc<dyn TunnelAuthorizer>>,
}

/// The server. Clones share its state.
#[derive(Clone)]
pub struct Server {
    shared: Arc<Shared>,
}

struct Shared {
    config: ServerConfig,
    admission: AdmissionLimiter,
    registry: Mutex<Registry>,
}

/// What a stream holds until its first message has arrived, and a connection until that of its
/// first stream has.
struct PendingStream {
    opening: Option<OwnedSemaphorePermit>,
    permit: Option<AdmissionPermit>,
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
    /// Its task has ended as well, and the ports that it held are free.
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
    session: Arc<ClientSession>,
    asked: NewProxy,
    closed: CancellationToken,
}

impl Registry {
    /// Closes what a session opened and ends it.
    fn release(&mut self, session: &Arc<ClientSession>) {
        self.proxies.retain(|_, open| {
            let of_session = Arc::ptr_eq(&open.session, session);
            if of_session {
                open.closed.cancel();
            }
            !of_session
        });
        if self.sessions.get(&session.run_id).is_some_and(|c| Arc::ptr_eq(c, session)) {
            self.sessions.remove(&session.run_id);
        }
        *session.pool.lock() = Pool::default();
        session.ended.cancel();
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
                        open.spawn(boxed(async move {
                            tokio::select! {
                                () = stop.cancelled() => {}
                                result = server.connection(stream, peer) => {
                                    if let Err(error) = result {
                                        tracing::debug!(%error, "connection");
                                    }
                                }
                            }
                        }));
                    }
                    // out of file descriptors: try again a moment later
                    Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
                },
            }
        }
    }

    /// Ends every client's session; clients reconnect by themselves.
    pub fn end_sessions(&self) {
        self.shared.registry.lock().sessions.values().for_each(|session| session.ended.cancel());
    }

    /// Whether a proxy of that name is open.
    pub fn has_proxy(&self, name: &str) -> bool {
        self.shared.registry.lock().proxies.contains_key(name)
    }

    /// Names of the proxies that are open.
    pub fn proxies(&self) -> Vec<String> {
        let mut names: Vec<String> = self.shared.registry.lock().proxies.keys().cloned().collect();
        names.sort();
        names
    }

    async fn connection(&self, stream: TcpStream, peer: SocketAddr) -> io::Result<()> {
        let Some(permit) = self.shared.admission.acquire(peer.ip()).await else {
            return Err(io::Error::other("too many of this address wait"));
        };
        let io = timeout(FIRST_MESSAGE_TIMEOUT, self.accept_tls(stream)).await??;
        if !self.shared.config.tcp_mux {
            return self
                .first_message(io, PendingStream { opening: None, permit: Some(permit) })
                .await
                .map(drop);
        }
        let (mux, driver) = Mux::new(io, Side::Server, Limits::default());
        let mut driving = JoinSet::new();
        driving.spawn(boxed(driver.run()));
        let opening = Arc::new(Semaphore::new(MAX_PENDING_STREAMS));
        let next = async || {
            let slot = opening.clone().acquire_owned().await.ok()?;
            Some((slot, mux.accept().await?))
        };
        let mut permit = Some(permit);
        let mut streams = JoinSet::new();
        loop {
            let idle = if permit.is_some() { FIRST_MESSAGE_TIMEOUT } else { IDLE_TIMEOUT };
            tokio::select! {
                () = tokio::time::sleep(idle), if streams.is_empty() => {
                    return Err(io::Error::other("nothing came of the connection"));
                }
                // the end of a control channel is the end of its client
                Some(ended) = streams.join_next() => if matches!(ended, Ok(true)) {
                    mux.close();
                    let _ = timeout(Duration::from_secs(1), mux.ended()).await;
                    return Ok(());
                },
                accepted = next() => {
                    let Some((slot, stream)) = accepted else { return Ok(()) };
                    let pending = PendingStream { opening: Some(slot), permit: permit.take() };
                    let server = self.clone();
                    streams.spawn(boxed(async move {
                        let served = server.first_message(Box::new(stream), pending).await;
                        served.unwrap_or_else(|error| {
                            tracing::debug!(%error, "stream");
                            false
                        })
                    }));
                }
            }
        }
    }

    /// First bytes decide: 0x17 and TLS, TLS, or neither (fatedier/frp `pkg/util/net/tls.go`).
    async fn accept_tls(&self, stream: TcpStream) -> io::Result<Io> {
        let mut stream = TunnelSocket::new(stream, self.shared.config.tcp_mux);
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
    async fn first_message(&self, mut io: Io, pending: PendingStream) -> io::Result<bool> {
        let first = timeout(FIRST_MESSAGE_TIMEOUT, wire::read(&mut io)).await??;
        let PendingStream { opening, permit } = pending;
        drop(opening);
        match first {
            Message::Login(login) => {
                // only the first stream of a connection may log in: one attempt per connection
                let Some(permit) = permit else { return Ok(true) };
                if let Err(error) = self.login(io, login, permit).await {
                    tracing::debug!(%error, "control channel");
                }
                return Ok(true);
            }
            Message::NewWorkConn(hello) => {
                drop(permit);
                self.accept_work_connection(io, &hello).await?;
            }
            Message::NewVisitorConn(hello) => {
                drop(permit);
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

    /// Whether a message after the login is authentic. frpc proves the token again only where its
    /// `additionalScopes` say so: otherwise a ping relies on the session, and a work connection on
    /// the run id.
    fn is_token_valid(&self, privilege_key: &str, timestamp: i64) -> bool {
        privilege_key.is_empty()
            || constant_time_eq(
                privilege_key,
                &wire::privilege_key(&self.shared.config.token, timestamp),
            )
    }
}
