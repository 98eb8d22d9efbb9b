//! HTTP over whatever carries bytes. Every server and every client of this program speaks it over
//! one type of stream, with one type of body: HTTP is compiled for each pair of them.

use std::convert::Infallible;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::future::BoxFuture;
use http::{Request, Response, Uri};
use hyper::body::Incoming;
use hyper_util::client::legacy;
use hyper_util::client::legacy::connect::{Connected, Connection};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_util::sync::CancellationToken;
use tower::{BoxError, Service};

use crate::base::task::{Executor, boxed};

/// A body of unknown length, in either direction.
pub use axum::body::Body;

/// A byte stream in both directions.
pub trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Duplex for T {}
pub type Io = Box<dyn Duplex>;

/// Time for the headers of a request, and how long a connection may be idle.
const HEAD_TIMEOUT: Duration = Duration::from_secs(60);
/// Concurrent requests on one HTTP/2 connection: a tool that watches every kind of resource has a
/// few hundred open.
const MAX_STREAMS: u32 = 1024;

/// What a server does with a request.
pub type Handler = Box<
    dyn Fn(Request<Incoming>) -> BoxFuture<'static, Result<Response<Body>, Infallible>>
        + Send
        + Sync,
>;

/// Which HTTP a server speaks.
#[derive(Clone, Copy)]
pub enum Versions {
    Http1,
    /// HTTP/2 where the client begins with it, with at most so many bytes of headers.
    Http1And2(u32),
}

/// Serves one connection until it is closed; after `stop` it takes no new request.
///
/// # Errors
/// Why the connection ended early.
pub async fn serve(
    io: Io,
    versions: Versions,
    handler: Handler,
    stop: &CancellationToken,
) -> Result<(), BoxError> {
    let mut builder = auto::Builder::new(Executor);
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(64 * 1024);
    match versions {
        Versions::Http1 => builder = builder.http1_only(),
        Versions::Http1And2(headers) => {
            builder
                .http2()
                .timer(TokioTimer::new())
                .max_concurrent_streams(MAX_STREAMS)
                .max_header_list_size(headers)
                .initial_stream_window_size(1 << 20);
        }
    }
    let service = hyper::service::service_fn(handler);
    let connection = builder.serve_connection_with_upgrades(TokioIo::new(io), service);
    let mut connection = std::pin::pin!(connection);
    tokio::select! {
        ended = connection.as_mut() => return ended,
        () = stop.cancelled() => connection.as_mut().graceful_shutdown(),
    }
    connection.await
}

impl Connection for Io {
    fn connected(&self) -> Connected {
        Connected::new()
    }
}

type Connecting = BoxFuture<'static, Result<TokioIo<Io>, BoxError>>;

/// How a [`Client`] gets a connection to the host of a URI.
#[derive(Clone)]
pub struct Connector(Arc<dyn Fn(Uri) -> Connecting + Send + Sync>);

impl Connector {
    pub fn new<F: Future<Output = Result<Io, BoxError>> + Send + 'static>(
        connect: impl Fn(Uri) -> F + Send + Sync + 'static,
    ) -> Connector {
        Connector(Arc::new(move |uri| {
            let connecting = connect(uri);
            Box::pin(async move { connecting.await.map(TokioIo::new) })
        }))
    }
}

impl Service<Uri> for Connector {
    type Response = TokioIo<Io>;
    type Error = BoxError;
    type Future = BoxFuture<'static, Result<TokioIo<Io>, BoxError>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        (self.0)(uri)
    }
}

/// Follows no redirect, repeats nothing, and has no time-out.
pub type Client = legacy::Client<Connector, Body>;

/// A client that keeps at most `idle` connections a host for later requests, each for `time`.
pub fn client(connector: Connector, idle: usize, time: Duration) -> Client {
    legacy::Client::builder(Executor)
        .pool_timer(TokioTimer::new())
        .pool_idle_timeout(time)
        .pool_max_idle_per_host(idle)
        .retry_canceled_requests(false)
        .build(connector)
}

/// One request, as the first and last of its connection.
///
/// # Errors
/// When no answer comes.
pub async fn send(io: Io, request: Request<Body>) -> hyper::Result<Response<Incoming>> {
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(io)).await?;
    tokio::spawn(boxed(async move {
        let _ = connection.with_upgrades().await;
    }));
    sender.send_request(request).await
}
