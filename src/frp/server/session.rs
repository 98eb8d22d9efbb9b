//! The session of a client, from its login to the end of its control channel.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::io::AsyncReadExt as _;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::{ClientSession, MAX_POOL, OpenProxy, POOL_RESERVE, REFUSAL_TIMEOUT, Server, users};
use crate::base::secret::constant_time_eq;
use crate::base::task::boxed;
use crate::frp::admission::AdmissionPermit;
use crate::frp::codec::{Duplex, Io, encrypted};
use crate::frp::socket::set_socket_options;
use crate::frp::wire::{
    self, CloseProxy, Key, Login, LoginResp, Message, NewProxy, NewProxyResp, Ping, Pong,
    ReqWorkConn,
};

/// Closes what a session opened, however it ends.
struct SessionGuard<'a> {
    server: &'a Server,
    session: Arc<ClientSession>,
}

impl Drop for SessionGuard<'_> {
    fn drop(&mut self) {
        self.server.shared.registry.lock().release(&self.session);
        self.session.finished.cancel();
    }
}

impl Server {
    pub(super) async fn login(
        &self,
        mut io: Io,
        login: Login,
        permit: AdmissionPermit,
    ) -> io::Result<()> {
        let config = &self.shared.config;
        if !constant_time_eq(
            &login.privilege_key,
            &wire::privilege_key(&config.token, login.timestamp),
        ) {
            return refuse(io, "token in login doesn't match token from configuration").await;
        }
        let authorized = config.authorizer.as_ref().map(|a| a.login(&login)).transpose();
        let (owner, revoked) = match authorized {
            Ok(authorized) => authorized.unwrap_or_default(),
            Err(error) => return refuse(io, &error).await,
        };
        let run_id = if login.run_id.is_empty() { wire::fresh_run_id() } else { login.run_id };
        let pool = usize::try_from(login.pool_count).unwrap_or(0).min(MAX_POOL);
        let (control_sender, queue) = mpsc::channel(64);
        let session = Arc::new(ClientSession {
            owner,
            run_id: run_id.clone(),
            control_sender,
            pool: Mutex::default(),
            max_idle: pool + POOL_RESERVE,
            ended: CancellationToken::new(),
            finished: CancellationToken::new(),
        });
        // a run id is no password: only the owner of its session takes it over
        let Ok(former) = self.take_over(&run_id, &session) else {
            return refuse(io, "the run id is another client's").await;
        };
        let _guard = SessionGuard { server: self, session: session.clone() };
        drop(permit);
        if let Some(former) = former {
            // its names are free by now; a task that hangs in a dead connection delays no login
            let _ = timeout(Duration::from_secs(1), former.finished.cancelled()).await;
        }
        let version = wire::VERSION.into();
        wire::write(&mut io, LoginResp { version, run_id, error: String::new() }).await?;
        let channel = encrypted(io, &Key::derive(&config.token));
        self.serve_control_channel(channel, pool, queue, &session, revoked).await
    }

    /// Answers the client until the channel or the session ends.
    async fn serve_control_channel(
        &self,
        channel: impl Duplex + 'static,
        pool: usize,
        mut queue: mpsc::Receiver<Message>,
        session: &Arc<ClientSession>,
        revoked: CancellationToken,
    ) -> io::Result<()> {
        let (mut reader, mut writer) = tokio::io::split(channel);
        for _ in 0..pool {
            wire::write(&mut writer, ReqWorkConn {}).await?;
        }
        let mut tasks = JoinSet::new();
        tasks.spawn(boxed(async move {
            while let Some(message) = queue.recv().await {
                if wire::write(&mut writer, message).await.is_err() {
                    return;
                }
            }
        }));
        let mut listeners = JoinSet::new();
        let mut pings = !self.shared.config.tcp_mux;
        loop {
            let patience = if pings { self.shared.config.heartbeat } else { Duration::MAX };
            let message = tokio::select! {
                () = session.ended.cancelled() => return Ok(()),
                () = revoked.cancelled() => return Ok(()),
                message = timeout(patience, wire::read(&mut reader)) => message??,
            };
            let answer: Message = match message {
                Message::Ping(ping) => {
                    pings = true;
                    self.answer_ping(&ping).into()
                }
                Message::NewProxy(asked) => {
                    let proxy_name = asked.proxy_name.clone();
                    let (remote_addr, error) = match self.open(session, asked, &mut listeners).await
                    {
                        Ok(address) => (address, String::new()),
                        Err(error) => (String::new(), error),
                    };
                    NewProxyResp { proxy_name, remote_addr, error }.into()
                }
                Message::CloseProxy(close) => {
                    self.close(session, &close);
                    continue;
                }
                _ => continue,
            };
            let sent = session.control_sender.send(answer).await;
            sent.map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))?;
        }
    }

    fn answer_ping(&self, ping: &Ping) -> Pong {
        if self.is_token_valid(&ping.privilege_key, ping.timestamp) {
            return Pong::default();
        }
        Pong { error: "token in heartbeat doesn't match token from configuration".into() }
    }

    fn close(&self, session: &Arc<ClientSession>, close: &CloseProxy) {
        let mut registry = self.shared.registry.lock();
        let open = registry.proxies.get(&close.proxy_name);
        if open.is_some_and(|o| Arc::ptr_eq(&o.session, session))
            && let Some(open) = registry.proxies.remove(&close.proxy_name)
        {
            open.closed.cancel();
        }
    }

    /// The former session with the run id; an error when it is another owner's.
    fn take_over(
        &self,
        run_id: &str,
        session: &Arc<ClientSession>,
    ) -> Result<Option<Arc<ClientSession>>, ()> {
        let mut registry = self.shared.registry.lock();
        let former = registry.sessions.get(run_id).cloned();
        if former.as_ref().is_some_and(|c| c.owner != session.owner) {
            return Err(());
        }
        if let Some(former) = &former {
            registry.release(former);
        }
        registry.sessions.insert(run_id.into(), session.clone());
        Ok(former)
    }

    async fn open(
        &self,
        session: &Arc<ClientSession>,
        asked: NewProxy,
        listeners: &mut JoinSet<()>,
    ) -> Result<String, String> {
        let open = Arc::new(OpenProxy {
            session: session.clone(),
            asked: asked.clone(),
            closed: CancellationToken::new(),
        });
        let name = asked.proxy_name.clone();
        if let Some(authorizer) = &self.shared.config.authorizer {
            authorizer.proxy(&session.owner, &asked)?;
        }
        let listener = match (asked.proxy_type.as_str(), self.shared.config.tcp_bind) {
            // users of an http proxy come through this process as well: there is no vhost port
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
            let mut registry = self.shared.registry.lock();
            if registry.proxies.contains_key(&name) {
                return Err(format!("proxy [{name}] already exists"));
            }
            registry.proxies.insert(name, open.clone());
        }
        let Some(listener) = listener else { return Ok(asked.custom_domains.join(",")) };
        let port = listener.local_addr().map_err(|e| e.to_string())?.port();
        let server = self.clone();
        listeners.spawn(boxed(async move {
            let mut users = JoinSet::new();
            loop {
                tokio::select! {
                    () = open.closed.cancelled() => break,
                    Some(_) = users.join_next() => {}
                    accepted = listener.accept() => {
                        let Ok((mut user, from)) = accepted else { continue };
                        set_socket_options(&user);
                        let (server, open) = (server.clone(), open.clone());
                        users.spawn(boxed(async move {
                            if let Ok(mut work) = server.connect_user(&open, Some(from)).await {
                                users::splice(&mut user, &mut work).await;
                            }
                        }));
                    }
                }
            }
            // existing users go on until the session ends
            drop(listener);
            while users.join_next().await.is_some() {}
        }));
        Ok(format!(":{port}"))
    }
}

/// Refuses a login and waits until the client closes: when an answer and the end of the stream
/// arrive together, the reader of hashicorp/yamux may get only the end (`stream.go`, Read).
async fn refuse(mut io: Io, error: &str) -> io::Result<()> {
    wire::write(
        &mut io,
        LoginResp { version: wire::VERSION.into(), error: error.into(), ..LoginResp::default() },
    )
    .await?;
    let _ = timeout(REFUSAL_TIMEOUT, io.read(&mut [0])).await;
    Ok(())
}
