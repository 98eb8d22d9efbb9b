//! The connection to a message broker: lapin over our own TLS, with the same trust as all other
//! connections.

use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_rs::traits::{Executor, Reactor, RuntimeKit};
use async_rs::util::Task;
use async_rs::{Runtime, Tokio};
use futures_util::Stream;
use futures_util::io::{AsyncRead, AsyncWrite};
use lapin::tcp::AsyncTcpStream;
use lapin::uri::{AMQPScheme, AMQPUri};
use lapin::{Connection, ConnectionProperties};
use tokio::net::TcpStream;
use tokio_util::compat::{Compat, TokioAsyncReadCompatExt as _};

use crate::base::trust::Trust;
use crate::frp::codec::Io;

/// Tokio with connections that may be encrypted.
#[derive(Clone, Debug)]
struct TokioWithTls(Tokio);

impl RuntimeKit for TokioWithTls {}

impl Executor for TokioWithTls {
    type Task<T: Send + 'static> = <Tokio as Executor>::Task<T>;

    fn block_on<T, F: Future<Output = T>>(&self, f: F) -> T {
        self.0.block_on(f)
    }

    fn spawn<T: Send + 'static, F: Future<Output = T> + Send + 'static>(
        &self,
        f: F,
    ) -> Task<Self::Task<T>> {
        self.0.spawn(f)
    }

    fn spawn_blocking<T: Send + 'static, F: FnOnce() -> T + Send + 'static>(
        &self,
        f: F,
    ) -> Task<Self::Task<T>> {
        self.0.spawn_blocking(f)
    }
}

impl Reactor for TokioWithTls {
    type TcpStream = Compat<Io>;
    type Sleep = <Tokio as Reactor>::Sleep;

    // fewer bounds than the trait has: one of them cannot be named outside its crate
    fn register<H: Read + Write + Send + 'static>(
        &self,
        _: H,
    ) -> io::Result<impl AsyncRead + AsyncWrite + Send + Unpin + 'static> {
        Err::<Compat<Io>, _>(io::Error::new(
            io::ErrorKind::Unsupported,
            "connections are made here, not given",
        ))
    }

    fn sleep(&self, duration: Duration) -> Self::Sleep {
        self.0.sleep(duration)
    }

    fn interval(&self, duration: Duration) -> impl Stream<Item = Instant> + Send + 'static {
        self.0.interval(duration)
    }

    #[expect(
        clippy::manual_async_fn,
        reason = "the future outlives `self`, which an async fn would keep"
    )]
    fn tcp_connect_addr(
        &self,
        address: SocketAddr,
    ) -> impl Future<Output = io::Result<Self::TcpStream>> + Send + 'static {
        async move { Ok((Box::new(TcpStream::connect(address).await?) as Io).compat()) }
    }
}

async fn open_stream(uri: &AMQPUri, ca: Option<&str>) -> io::Result<Io> {
    let host = uri.authority.host.as_str();
    let stream = TcpStream::connect((host.trim_matches(['[', ']']), uri.authority.port)).await?;
    stream.set_nodelay(true)?;
    if uri.scheme == AMQPScheme::AMQP {
        return Ok(Box::new(stream));
    }
    let tls = Trust { ca_pem: ca.map(str::to_owned), ..Trust::default() }
        .client_config()
        .map_err(io::Error::other)?;
    let name = rustls_pki_types::ServerName::try_from(host.trim_matches(['[', ']']).to_owned())
        .map_err(io::Error::other)?;
    Ok(Box::new(tokio_rustls::TlsConnector::from(Arc::new(tls)).connect(name, stream).await?))
}

/// A connection to the broker at `url`, which shows it under `name`; over TLS it must show a
/// certificate of `ca` (PEM), or of the system's roots.
///
/// # Errors
/// What the network, TLS or the broker says; never the URL.
pub(super) async fn connect(
    url: &str,
    ca: Option<String>,
    name: &str,
) -> lapin::Result<Connection> {
    let uri: AMQPUri = url
        .parse()
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "the URL cannot be read"))?;
    let properties = ConnectionProperties::default().with_connection_name(name.into());
    let dial = async move |uri: AMQPUri, _: Runtime<TokioWithTls>| {
        Ok(AsyncTcpStream::Plain(open_stream(&uri, ca.as_deref()).await?.compat()))
    };
    Connection::connector(uri, Runtime::new(TokioWithTls(Tokio::current())), dial, properties).await
}
