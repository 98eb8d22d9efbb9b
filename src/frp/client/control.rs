//! The control channel from login to its end, and the work connections that the server asks for.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncWrite, AsyncWriteExt as _};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::connection::{ConnectionEvent, Events};
use super::{QUEUE, WorkConnection, now};
use crate::base::task::boxed;
use crate::frp::codec::{Io, encrypted, layered};
use crate::frp::dial::{Connector, STAGE_TIMEOUT};
use crate::frp::wire::{self, Key, Login, Message, NewProxy, NewWorkConn, StartWorkConn};
use crate::frp::{Proxy, TunnelConfig, TunnelEvent};

/// Work connections that are being opened at the same time.
const MAX_OPENING: usize = 64;

/// A proxy's name on the wire: with the user before it, as frpc does.
pub(super) fn wire_name(config: &TunnelConfig, name: &str) -> String {
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

pub(super) fn new_proxy(config: &TunnelConfig, proxy: &Proxy) -> NewProxy {
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

pub(super) struct ControlChannel {
    opener: Arc<WorkConnectionOpener>,
    events: Events,
}

impl ControlChannel {
    pub(super) fn new(
        connector: Connector,
        config: Arc<TunnelConfig>,
        work_connections: mpsc::Sender<WorkConnection>,
        events: Events,
    ) -> ControlChannel {
        let proxies = config.proxies.iter().map(|p| (p.name.clone(), p.clone())).collect();
        let opening = Semaphore::new(MAX_OPENING);
        let opener = WorkConnectionOpener { connector, config, proxies, opening, work_connections };
        ControlChannel { opener: Arc::new(opener), events }
    }

    /// Logs in and serves the channel; gives the event that ends it.
    pub(super) async fn run(self, login: Login) -> TunnelEvent {
        let (stream, run_id) = match timeout(STAGE_TIMEOUT, self.log_in(login)).await {
            Err(_) => return TunnelEvent::LoginTimedOut,
            Ok(Err(e)) => return TunnelEvent::ConnectionLost(e.to_string()),
            Ok(Ok((stream, Message::LoginResp(r)))) if r.error.is_empty() => (stream, r.run_id),
            Ok(Ok((_, Message::LoginResp(r)))) => return TunnelEvent::LoginRefused(r.error),
            Ok(Ok((_, other))) => {
                let kind = char::from(other.kind());
                return TunnelEvent::ConnectionLost(format!(
                    "the login was answered with `{kind}`"
                ));
            }
        };
        let key = Key::derive(&self.opener.config.auth.token);
        let (mut reader, writer) = tokio::io::split(encrypted(stream, &key));
        let (control, queue) = mpsc::channel(QUEUE);
        let mut tasks = JoinSet::new();
        tasks.spawn(boxed(write_all(writer, queue)));
        self.events.send(ConnectionEvent::Control(control)).await;
        let logged_in = TunnelEvent::LoggedIn { run_id: run_id.clone() };
        self.events.send(ConnectionEvent::Tunnel(logged_in)).await;
        loop {
            let message = match wire::read(&mut reader).await {
                Ok(message) => message,
                Err(e) if e.kind() == io::ErrorKind::InvalidData => {
                    return TunnelEvent::ConnectionLost(format!(
                        "unreadable message (do both ends have the same token?): {e}"
                    ));
                }
                Err(e) => return TunnelEvent::ConnectionLost(e.to_string()),
            };
            let event = match message {
                Message::ReqWorkConn(_) => {
                    while tasks.try_join_next().is_some() {}
                    tasks.spawn(boxed(open_work_connection(self.opener.clone(), run_id.clone())));
                    TunnelEvent::Received
                }
                Message::NewProxyResp(r) => TunnelEvent::ProxyAnswer {
                    name: own_name(&self.opener.config, &r.proxy_name).to_owned(),
                    error: r.error,
                },
                Message::Pong(p) if p.error.is_empty() => TunnelEvent::Received,
                Message::Pong(p) => TunnelEvent::PongRefused(p.error),
                // known, and not meant for a client: ignored, as frpc does
                _ => TunnelEvent::Received,
            };
            if !self.events.send(ConnectionEvent::Tunnel(event)).await {
                return TunnelEvent::ConnectionLost("stopped".into());
            }
        }
    }

    /// The stream of the channel, and the answer to the login.
    async fn log_in(&self, login: Login) -> io::Result<(Io, Message)> {
        let mut stream = self.opener.connector.open().await?;
        wire::write(&mut stream, login).await?;
        let answer = wire::read(&mut stream).await?;
        Ok((stream, answer))
    }
}

/// Sends the messages of a queue until it is closed.
async fn write_all(mut writer: impl AsyncWrite + Unpin, mut queue: mpsc::Receiver<Message>) {
    while let Some(message) = queue.recv().await {
        // one that is too long is refused here, before it could end the session
        if let Err(e) = wire::write(&mut writer, message).await {
            tracing::debug!(error = %e, "control channel");
            if e.kind() != io::ErrorKind::InvalidInput {
                return;
            }
        }
    }
    let _ = writer.shutdown().await;
}

async fn open_work_connection(opener: Arc<WorkConnectionOpener>, run_id: String) {
    // the server may end one before a user comes
    if let Err(e) = opener.open(run_id).await {
        tracing::debug!(error = %e, "work connection");
    }
}

struct WorkConnectionOpener {
    connector: Connector,
    config: Arc<TunnelConfig>,
    /// By name.
    proxies: HashMap<String, Proxy>,
    opening: Semaphore,
    work_connections: mpsc::Sender<WorkConnection>,
}

impl WorkConnectionOpener {
    /// Opens a work connection, waits without limit for its user, hands it over.
    async fn open(&self, run_id: String) -> io::Result<()> {
        let timed_out = |_| io::Error::from(io::ErrorKind::TimedOut);
        let timestamp = now();
        let privilege_key = wire::privilege_key(&self.config.auth.token, timestamp);
        let hello = NewWorkConn { run_id, privilege_key, timestamp };
        let mut stream = {
            let _permit = self.opening.acquire().await.map_err(io::Error::other)?;
            let opened = timeout(STAGE_TIMEOUT * 2, async {
                let mut stream = self.connector.open().await?;
                wire::write(&mut stream, hello).await?;
                Ok::<_, io::Error>(stream)
            });
            opened.await.map_err(timed_out)??
        };
        let start = match wire::read(&mut stream).await? {
            Message::StartWorkConn(start) => start,
            other => {
                let kind = char::from(other.kind());
                return Err(io::Error::other(format!("started with `{kind}`")));
            }
        };
        if !start.error.is_empty() {
            return Err(io::Error::other(start.error));
        }
        let Some(proxy) = self.proxies.get(own_name(&self.config, &start.proxy_name)) else {
            return Err(io::Error::other(format!("for an unknown proxy {}", start.proxy_name)));
        };
        let key = proxy.use_encryption.then(|| Key::derive(&self.config.auth.token));
        let io = layered(stream, key.as_ref(), proxy.use_compression);
        let from = user_address(&start);
        let handed = WorkConnection { proxy: proxy.name.clone(), kind: proxy.kind, from, io };
        // not taken within the time that a user waits: closed, so that the user learns of it
        timeout(Duration::from_secs(10), self.work_connections.send(handed))
            .await
            .map_err(timed_out)?
            .map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))
    }
}

fn user_address(start: &StartWorkConn) -> String {
    if start.src_addr.is_empty() {
        String::new()
    } else {
        format!("{}:{}", start.src_addr, start.src_port)
    }
}
