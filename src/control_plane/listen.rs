//! Listeners: the two ports, the administrator's socket, and each connection until it is closed.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use anyhow::Context as _;
use axum::Router;
use tokio::net::{TcpListener, TcpStream, UnixListener};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::auth::Origin;
use super::client::SOCKET;
use super::routes::respond;
use super::state::{ControlPlane, Inner};
use crate::base::connection::{self, Handler, Io, Versions};
use crate::base::error::{Exit, Failure};
use crate::base::task::boxed;
use crate::frp::admission::AdmissionLimiter;
use crate::host::Host;

const HANDSHAKE: Duration = Duration::from_secs(10);
/// Largest headers of a request over HTTP/2, bytes.
const MAX_HEADERS: u32 = 32 * 1024;

pub(super) async fn bind(
    address: SocketAddr,
    what: &str,
    flag: &str,
) -> anyhow::Result<TcpListener> {
    let mut bound = TcpListener::bind(address).await;
    // all addresses of a machine without IPv6
    if bound
        .as_ref()
        .is_err_and(|e| e.raw_os_error() == Some(nix::errno::Errno::EAFNOSUPPORT as i32))
        && address.ip() == Ipv6Addr::UNSPECIFIED
    {
        bound = TcpListener::bind((Ipv4Addr::UNSPECIFIED, address.port())).await;
    }
    bound.map_err(|e| {
        let (code, hint) = match e.kind() {
            std::io::ErrorKind::AddrInUse => (
                "PORT_TAKEN",
                format!("stop what uses it (ss -ltnp), or choose another with {flag}"),
            ),
            std::io::ErrorKind::PermissionDenied => (
                "PORT_FORBIDDEN",
                format!("choose a port from 1024 up with {flag}, or run it as root"),
            ),
            _ => ("ADDRESS_WRONG", format!("choose an address of this machine with {flag}")),
        };
        Failure::new(Exit::Preflight, code, format!("{what} cannot listen on {address}"))
            .why(e.to_string())
            .hint(hint)
            .into()
    })
}

#[expect(
    clippy::disallowed_methods,
    reason = "the socket is the control plane's own, in its data directory"
)]
pub(super) fn local_socket(host: &Host, data_dir: &str) -> anyhow::Result<UnixListener> {
    use std::os::unix::fs::PermissionsExt as _;
    let path = host.real_path(data_dir).join(SOCKET);
    let _ = std::fs::remove_file(&path);
    let listener =
        UnixListener::bind(&path).with_context(|| format!("opening {}", path.display()))?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

impl ControlPlane {
    pub(super) async fn serve_https(
        self,
        router: Router,
        listener: TcpListener,
        tls: Arc<rustls::ServerConfig>,
        stop: CancellationToken,
        halt: CancellationToken,
    ) {
        let acceptor = tokio_rustls::TlsAcceptor::from(tls);
        let admission = AdmissionLimiter::default();
        let mut open = JoinSet::new();
        loop {
            tokio::select! {
                () = halt.cancelled() => return,
                Some(_) = open.join_next() => {}
                accepted = listener.accept(), if !stop.is_cancelled() => match accepted {
                    Ok((stream, peer)) => {
                        let (control_plane, router) = (self.clone(), router.clone());
                        let (acceptor, stop) = (acceptor.clone(), stop.clone());
                        let admission = admission.clone();
                        open.spawn(boxed(async move {
                            let Some(permit) = admission.acquire(peer.ip()).await else { return };
                            let accepting = acceptor.accept(without_delay(stream));
                            if let Ok(Ok(stream)) = timeout(HANDSHAKE, accepting).await {
                                drop(permit);
                                let origin = Origin::Network(peer.ip().to_canonical());
                                let (io, both) =
                                    (Box::new(stream), Versions::Http1And2(MAX_HEADERS));
                                control_plane.serve(router, io, both, origin, stop).await;
                            }
                        }));
                    }
                    // out of descriptors: some are free again a moment later
                    Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
                },
            }
        }
    }

    pub(super) async fn serve_local(
        self,
        router: Router,
        listener: UnixListener,
        halt: CancellationToken,
    ) {
        let mut open = JoinSet::new();
        loop {
            tokio::select! {
                () = halt.cancelled() => return,
                Some(_) = open.join_next() => {}
                accepted = listener.accept() => match accepted {
                    Ok((stream, _)) => {
                        let (router, halt) = (router.clone(), halt.clone());
                        // HTTP/1.1 alone: its client is this program
                        let versions = Versions::Http1;
                        let (io, origin) = (Box::new(stream), Origin::Local);
                        open.spawn(boxed(self.clone().serve(router, io, versions, origin, halt)));
                    }
                    Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
                },
            }
        }
    }

    /// Serves one connection until it is closed; after `stop` it takes no new request.
    async fn serve(
        self,
        router: Router,
        io: Io,
        versions: Versions,
        origin: Origin,
        stop: CancellationToken,
    ) {
        let _open = ConnectionGuard::new(&self.inner);
        let handler: Handler =
            Box::new(move |request| Box::pin(respond(router.clone(), origin, request)));
        let _ = connection::serve(io, versions, handler, &stop).await;
    }
}

/// A connection, counted until it is dropped.
struct ConnectionGuard(Arc<Inner>);

impl ConnectionGuard {
    fn new(inner: &Arc<Inner>) -> ConnectionGuard {
        inner.open_connections.fetch_add(1, Relaxed);
        ConnectionGuard(inner.clone())
    }
}

impl Drop for ConnectionGuard {
    fn drop(&mut self) {
        self.0.open_connections.fetch_sub(1, Relaxed);
    }
}

fn without_delay(stream: TcpStream) -> TcpStream {
    let _ = stream.set_nodelay(true);
    stream
}
