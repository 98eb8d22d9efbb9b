//! Connecting to an FRP server: DNS, TCP, TLS, multiplexer, each within its own time.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use rustls_pki_types::ServerName;
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use crate::base::resolve;
use crate::base::task::boxed;
use crate::base::trust::{Pin, Trust, explain};
use crate::frp::TunnelConfig;
use crate::frp::codec::Io;
use crate::frp::mux::{Limits, Mux, Side};
use crate::frp::socket::TunnelSocket;

/// Longest time of each stage.
pub const STAGE_TIMEOUT: Duration = Duration::from_secs(5);
/// Head start of an address over the next one.
const STAGGER: Duration = Duration::from_millis(250);

/// Why a connection failed: the stage and the reason, in one line.
#[derive(Debug)]
pub struct DialError {
    pub why: String,
    /// Nothing came back at all: packets are dropped, or the host is down.
    pub unanswered: bool,
}

impl From<String> for DialError {
    fn from(why: String) -> DialError {
        DialError { why, unanswered: false }
    }
}

/// Connects to one FRP server, with settings that have been checked.
#[derive(Clone)]
pub struct Dialer {
    server: String,
    port: u16,
    /// None when the settings turn TLS off.
    tls: Option<(TlsConnector, ServerName<'static>)>,
    /// Whether 0x17 goes before the handshake; learned from a server that wants it.
    custom_first_byte: Arc<AtomicBool>,
    tcp_mux: bool,
}

/// A handshake that failed.
struct HandshakeError {
    error: DialError,
    /// The server closed the connection or knows no such name: an old one does the first, one that
    /// shares its port with an HTTPS vhost the second, when the byte is missing (fatedier/frp
    /// `pkg/util/net/tls.go`, `pkg/util/vhost/https.go`).
    wants_byte: bool,
    /// The server showed a certificate that is not trusted.
    certificate: bool,
}

impl Dialer {
    /// # Errors
    /// Why these settings may not or cannot be used.
    pub fn new(config: &TunnelConfig, allow_insecure: bool) -> Result<Dialer, String> {
        if config.server.is_empty() || config.port == 0 {
            return Err("the tunnel settings name no server and port".into());
        }
        let tls = &config.tls;
        let pins = tls.pin.iter().map(|p| Pin::parse(p)).collect::<Result<Vec<_>, _>>()?;
        if !tls.enable && !allow_insecure {
            return Err(
                "the tunnel is to go without TLS: anybody on the way reads and changes it; \
                        enable TLS at the control plane, or set allow-insecure-tunnel here"
                    .into(),
            );
        }
        let accept_any = tls.ca_pem.is_none() && pins.is_empty();
        if accept_any && !allow_insecure {
            return Err(
                "the tunnel has neither CA nor pin: anybody could stand in between; set one at the \
                 control plane, or allow-insecure-tunnel here"
                    .into(),
            );
        }
        let client = Trust { ca_pem: tls.ca_pem.clone(), pins, accept_any }.client_config()?;
        let name = tls
            .server_name
            .as_deref()
            .unwrap_or(&config.server)
            .trim_matches(['[', ']'])
            .to_owned();
        let name = ServerName::try_from(name.clone())
            .map_err(|_| format!("`{name}` is no server name"))?;
        Ok(Dialer {
            server: config.server.trim_matches(['[', ']']).to_owned(),
            port: config.port,
            tls: tls.enable.then(|| (TlsConnector::from(Arc::new(client)), name)),
            custom_first_byte: Arc::new(tls.custom_first_byte.into()),
            tcp_mux: config.tcp_mux,
        })
    }

    async fn dial(&self) -> Result<Io, DialError> {
        let tcp = self.tcp().await?;
        let Some((tls, name)) = &self.tls else { return Ok(Box::new(tcp)) };
        let byte = self.custom_first_byte.load(Relaxed);
        match self.handshake(tls, name, tcp, byte).await {
            Err(first) if first.wants_byte && !byte => {
                // how a server refuses the byte says less than its first answer, except when it is
                // about its certificate
                let again = self.handshake(tls, name, self.tcp().await?, true).await;
                let again =
                    again.map_err(
                        |second| if second.certificate { second.error } else { first.error },
                    )?;
                self.custom_first_byte.store(true, Relaxed);
                Ok(again)
            }
            done => done.map_err(|e| e.error),
        }
    }

    async fn tcp(&self) -> Result<TunnelSocket, DialError> {
        // asked at every attempt, with the resolver configuration of that moment
        let addresses = timeout(STAGE_TIMEOUT, resolve::lookup(&self.server))
            .await
            .map_err(|_| format!("dns: no answer for {} in 5 s", self.server))?;
        let addresses = addresses.map_err(|e| e.to_string())?;
        let tcp = timeout(STAGE_TIMEOUT, race(addresses, self.port));
        let tcp = tcp.await.map_err(|_| DialError {
            why: format!("tcp: {self} did not answer in 5 s"),
            unanswered: true,
        })?;
        let tcp = tcp.map_err(|e| format!("tcp: {self}: {e}"))?;
        Ok(TunnelSocket::new(tcp, self.tcp_mux))
    }

    async fn handshake(
        &self,
        tls: &TlsConnector,
        name: &ServerName<'static>,
        mut tcp: TunnelSocket,
        byte: bool,
    ) -> Result<Io, HandshakeError> {
        let handshake = async {
            if byte {
                tcp.write_all(&[0x17]).await?;
            }
            tls.connect(name.clone(), tcp).await
        };
        match timeout(STAGE_TIMEOUT, handshake).await {
            Ok(Ok(stream)) => Ok(Box::new(stream)),
            Ok(Err(e)) => {
                let text = e.to_string();
                let known = explain(&text);
                let why = match known {
                    Some((code, remedy)) => format!("{code}: {self}: {text}; {remedy}"),
                    None => format!("tls: {self}: {text}"),
                };
                let hung_up = matches!(
                    e.kind(),
                    io::ErrorKind::UnexpectedEof
                        | io::ErrorKind::ConnectionReset
                        | io::ErrorKind::ConnectionAborted
                        | io::ErrorKind::BrokenPipe
                );
                let alert = e.get_ref().and_then(|e| e.downcast_ref::<rustls::Error>());
                let unknown = matches!(
                    alert,
                    Some(rustls::Error::AlertReceived(rustls::AlertDescription::UnrecognisedName))
                );
                Err(HandshakeError {
                    error: why.into(),
                    wants_byte: hung_up || unknown,
                    certificate: known.is_some_and(|(code, _)| code != "tls_none"),
                })
            }
            Err(_) => {
                let why = format!(
                    "tls: {self} accepted the connection and did not finish the handshake in 5 s"
                );
                Err(HandshakeError { error: why.into(), wants_byte: false, certificate: false })
            }
        }
    }

    /// Connects. What has to run for the connection goes into `tasks`; aborting them ends it.
    ///
    /// # Errors
    /// The stage that failed, and why, in one line.
    pub async fn connect(&self, tasks: &mut JoinSet<()>) -> Result<Connector, DialError> {
        let io = self.dial().await?;
        if !self.tcp_mux {
            return Ok(Connector::Direct {
                first: Arc::new(tokio::sync::Mutex::new(Some(io))),
                target: self.clone(),
            });
        }
        let (mux, driver) = Mux::new(io, Side::Client, Limits::default());
        tasks.spawn(boxed(async move {
            driver.run().await;
        }));
        Ok(Connector::Mux(mux))
    }
}

impl std::fmt::Display for Dialer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.server.contains(':') {
            write!(f, "[{}]:{}", self.server, self.port)
        } else {
            write!(f, "{}:{}", self.server, self.port)
        }
    }
}

/// A connection that opens byte streams to the server.
#[derive(Clone)]
pub enum Connector {
    Mux(Mux),
    /// Without tcpMux every stream is a connection of its own; the first is already there.
    Direct {
        first: Arc<tokio::sync::Mutex<Option<Io>>>,
        target: Dialer,
    },
}

impl Connector {
    /// # Errors
    /// When the session has ended, or a new connection fails.
    pub async fn open(&self) -> io::Result<Io> {
        match self {
            Connector::Mux(mux) => Ok(Box::new(mux.open().await?)),
            Connector::Direct { first, target } => {
                let waiting = first.lock().await.take();
                match waiting {
                    Some(io) => Ok(io),
                    None => target.dial().await.map_err(|e| io::Error::other(e.why)),
                }
            }
        }
    }

    /// How long nothing was received, where it is known.
    pub fn silence(&self) -> Option<Duration> {
        match self {
            Connector::Mux(mux) => Some(mux.silence()),
            Connector::Direct { .. } => None,
        }
    }
}

/// The first address that answers; the next one starts a moment later (RFC 8305).
async fn race(addresses: Vec<IpAddr>, port: u16) -> io::Result<TcpStream> {
    let mut tries = JoinSet::new();
    for (n, address) in (0_u32..).zip(addresses) {
        tries.spawn(boxed(async move {
            tokio::time::sleep(STAGGER * n).await;
            TcpStream::connect(SocketAddr::new(address, port)).await
        }));
    }
    let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
    while let Some(done) = tries.join_next().await {
        match done {
            Ok(Ok(stream)) => return Ok(stream),
            Ok(Err(e)) => last = e,
            Err(e) => last = io::Error::other(e),
        }
    }
    Err(last)
}
