//! The way to an FRP server: name, TCP, TLS, multiplexer, each within its own time.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use rustls_pki_types::ServerName;
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use crate::trust::{Pin, Trust, explain};
use crate::tunnel::TunnelConfig;
use crate::tunnel::layer::Io;
use crate::tunnel::mux::{Limits, Mux, Side};

/// Longest time of each stage.
pub const STAGE: Duration = Duration::from_secs(5);
/// Head start of an address over the next one.
const STAGGER: Duration = Duration::from_millis(250);
/// Sent, unacknowledged and given up by the kernel after this long.
const USER_TIMEOUT_MS: u32 = 12_000;

/// Why there is no connection: the stage that failed, in one line.
#[derive(Debug)]
pub struct NoWay {
    pub why: String,
    /// Nothing came back at all: the network swallows what is sent, or nobody is there.
    pub unanswered: bool,
}

impl From<String> for NoWay {
    fn from(why: String) -> NoWay {
        NoWay { why, unanswered: false }
    }
}

/// Everything that a connection needs, checked.
#[derive(Clone)]
pub struct Target {
    server: String,
    port: u16,
    name: ServerName<'static>,
    tls: Arc<rustls::ClientConfig>,
    custom_first_byte: bool,
    tcp_mux: bool,
}

impl Target {
    /// # Errors
    /// Why these settings may not or cannot be used.
    pub fn new(config: &TunnelConfig, allow_insecure: bool) -> Result<Target, String> {
        if config.server.is_empty() || config.port == 0 {
            return Err("the tunnel settings name no server and port".into());
        }
        let tls = &config.tls;
        let pins = tls.pin.iter().map(|p| Pin::parse(p)).collect::<Result<Vec<_>, _>>()?;
        if tls.ca_pem.is_none() && pins.is_empty() && !allow_insecure {
            return Err(
                "the tunnel has neither CA nor pin: anybody could stand in between; set one at the control plane, or allow-insecure-tunnel here"
                    .into(),
            );
        }
        let anybody = tls.ca_pem.is_none() && pins.is_empty();
        let client = Trust { ca_pem: tls.ca_pem.clone(), pins, anybody }.client()?;
        let name = tls.server_name.as_deref().unwrap_or(&config.server).trim_matches(['[', ']']).to_owned();
        let name = ServerName::try_from(name.clone()).map_err(|_| format!("`{name}` is no server name"))?;
        Ok(Target {
            server: config.server.trim_matches(['[', ']']).to_owned(),
            port: config.port,
            name,
            tls: Arc::new(client),
            custom_first_byte: tls.custom_first_byte,
            tcp_mux: config.tcp_mux,
        })
    }

    async fn dial(&self) -> Result<Io, NoWay> {
        let at = format!("{}:{}", self.server, self.port);
        let addresses = timeout(STAGE, resolve(&self.server)).await.map_err(|_| format!("dns: no answer for {} in 5 s", self.server))??;
        let tcp = timeout(STAGE, race(addresses, self.port));
        let tcp = tcp.await.map_err(|_| NoWay { why: format!("tcp: {at} did not answer in 5 s"), unanswered: true })?;
        let mut tcp = tcp.map_err(|e| format!("tcp: {at}: {e}"))?;
        tune(&tcp);
        let handshake = async {
            if self.custom_first_byte {
                tcp.write_all(&[0x17]).await?;
            }
            TlsConnector::from(self.tls.clone()).connect(self.name.clone(), tcp).await
        };
        match timeout(STAGE, handshake).await {
            Ok(Ok(stream)) => Ok(Box::new(stream)),
            Ok(Err(e)) => {
                let text = e.to_string();
                Err(match explain(&text) {
                    Some((code, remedy)) => format!("{code}: {at}: {text}; {remedy}"),
                    None => format!("tls: {at}: {text}"),
                }
                .into())
            }
            Err(_) => Err(format!("tls: {at} accepted the connection and did not finish the handshake in 5 s").into()),
        }
    }

    /// Connects; what else has to run for the connection goes into `tasks`, and ends it when it is aborted.
    ///
    /// # Errors
    /// The stage that failed, and why, in one line.
    pub async fn connect(&self, tasks: &mut JoinSet<()>) -> Result<Carrier, NoWay> {
        let io = self.dial().await?;
        if !self.tcp_mux {
            return Ok(Carrier::Direct { first: Arc::new(tokio::sync::Mutex::new(Some(io))), target: self.clone() });
        }
        let (mux, driver) = Mux::new(io, Side::Client, Limits::default());
        tasks.spawn(async move {
            driver.run().await;
        });
        Ok(Carrier::Mux(mux))
    }
}

/// Something that gives byte streams to the server.
#[derive(Clone)]
pub enum Carrier {
    Mux(Mux),
    /// Without tcpMux every stream is a connection of its own; the first is already there.
    Direct {
        first: Arc<tokio::sync::Mutex<Option<Io>>>,
        target: Target,
    },
}

impl Carrier {
    /// # Errors
    /// When the session has ended, or a new connection fails.
    pub async fn open(&self) -> io::Result<Io> {
        match self {
            Carrier::Mux(mux) => Ok(Box::new(mux.open().await?)),
            Carrier::Direct { first, target } => {
                let waiting = first.lock().await.take();
                match waiting {
                    Some(io) => Ok(io),
                    None => target.dial().await.map_err(|e| io::Error::other(e.why)),
                }
            }
        }
    }

    /// How long nothing was received, where that can be told.
    pub fn silence(&self) -> Option<Duration> {
        match self {
            Carrier::Mux(mux) => Some(mux.silence()),
            Carrier::Direct { .. } => None,
        }
    }
}

/// Asked anew at every attempt, with the resolver configuration of this moment.
async fn resolve(server: &str) -> Result<Vec<IpAddr>, String> {
    if let Ok(address) = server.parse() {
        return Ok(vec![address]);
    }
    let wrong = |e: &dyn std::fmt::Display| format!("dns: {server}: {e}");
    let resolver = hickory_resolver::TokioResolver::builder_tokio().and_then(hickory_resolver::ResolverBuilder::build).map_err(|e| wrong(&e))?;
    let found: Vec<IpAddr> = resolver.lookup_ip(server).await.map_err(|e| wrong(&e))?.iter().collect();
    if found.is_empty() { Err(wrong(&"no address")) } else { Ok(found) }
}

/// The first address that answers; the next one starts a moment later (RFC 8305).
async fn race(addresses: Vec<IpAddr>, port: u16) -> io::Result<TcpStream> {
    let mut tries = JoinSet::new();
    for (n, address) in (0_u32..).zip(addresses) {
        tries.spawn(async move {
            tokio::time::sleep(STAGGER * n).await;
            TcpStream::connect(SocketAddr::new(address, port)).await
        });
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

/// Small writes go at once, and a peer that acknowledges nothing is given up by the kernel.
pub fn tune(stream: &TcpStream) {
    use nix::sys::socket::{setsockopt, sockopt};
    let _ = stream.set_nodelay(true);
    let _ = setsockopt(stream, sockopt::TcpUserTimeout, &USER_TIMEOUT_MS);
    let _ = setsockopt(stream, sockopt::KeepAlive, &true);
}
