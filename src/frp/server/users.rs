//! Users of proxies: each gets a work connection of the client, and bytes go both ways until either
//! end closes.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::oneshot;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::{ClientSession, OpenProxy, Server, WORK_CONNECTION_TIMEOUT, signed_by};
use crate::base::secret::Secret;
use crate::frp::codec::{Io, layered};
use crate::frp::wire::{self, Key, NewVisitorConnResp, ReqWorkConn, StartWorkConn};

impl Server {
    pub(super) async fn accept_work_connection(
        &self,
        mut io: Io,
        hello: &wire::NewWorkConn,
    ) -> io::Result<()> {
        let session = self.shared.registry.lock().sessions.get(&hello.run_id).cloned();
        let refuse =
            |error: &str| StartWorkConn { error: error.into(), ..StartWorkConn::default() };
        let Some(session) = session else {
            return wire::write(&mut io, refuse("no client control found for run id")).await;
        };
        if !self.is_token_valid(&hello.privilege_key, hello.timestamp) {
            return wire::write(
                &mut io,
                refuse("token in NewWorkConn doesn't match token from configuration"),
            )
            .await;
        }
        let surplus = {
            let mut pool = session.pool.lock();
            let mut io = Some(io);
            while let Some(offered) = io.take() {
                match pool.users.pop_front() {
                    // a user that gave up is skipped
                    Some(user) => io = user.send(offered).err(),
                    None if pool.idle.len() < session.max_idle => pool.idle.push_back(offered),
                    None => {
                        io = Some(offered);
                        break;
                    }
                }
            }
            io
        };
        match surplus {
            Some(mut io) => {
                wire::write(&mut io, refuse("work connection pool is full, discarding")).await
            }
            None => Ok(()),
        }
    }

    /// A stream to the client's side of `name`, for a caller in this process.
    ///
    /// # Errors
    /// `NotFound` when no client has opened that proxy, `TimedOut` when it gives no work connection
    /// in time.
    pub async fn dial(&self, name: &str) -> io::Result<Io> {
        let open = self.shared.registry.lock().proxies.get(name).cloned();
        match open {
            Some(open) => self.connect_user(&open, None).await,
            None => {
                Err(io::Error::new(io::ErrorKind::NotFound, format!("no client has opened {name}")))
            }
        }
    }

    pub(super) async fn connect_user(
        &self,
        open: &OpenProxy,
        from: Option<SocketAddr>,
    ) -> io::Result<Io> {
        let session = &open.session;
        let start = StartWorkConn {
            proxy_name: open.asked.proxy_name.clone(),
            src_addr: from.map(|a| a.ip().to_string()).unwrap_or_default(),
            src_port: from.map(|a| a.port()).unwrap_or_default(),
            ..StartWorkConn::default()
        };
        timeout(WORK_CONNECTION_TIMEOUT, async {
            loop {
                let mut io = self.take_work_connection(session).await?;
                // a pooled connection may be dead: take the next one
                if wire::write(&mut io, start.clone()).await.is_ok() {
                    let key =
                        open.asked.use_encryption.then(|| Key::derive(&self.shared.config.token));
                    return Ok(layered(io, key.as_ref(), open.asked.use_compression));
                }
            }
        })
        .await
        .map_err(|_| {
            io::Error::new(io::ErrorKind::TimedOut, "the client gave no work connection")
        })?
    }

    /// Takes a work connection, and asks the client for the next one.
    async fn take_work_connection(&self, session: &ClientSession) -> io::Result<Io> {
        let gone = || io::Error::new(io::ErrorKind::NotConnected, "the client is gone");
        session.control_sender.send(ReqWorkConn {}.into()).await.map_err(|_| gone())?;
        let waiting = {
            let mut pool = session.pool.lock();
            if let Some(io) = pool.idle.pop_front() {
                return Ok(io);
            }
            let (user, waiting) = oneshot::channel();
            // users that gave up do not pile up where a client opens no connection
            pool.users.retain(|u| !u.is_closed());
            pool.users.push_back(user);
            waiting
        };
        waiting.await.map_err(|_| gone())
    }

    pub(super) async fn accept_visitor(
        &self,
        mut io: Io,
        hello: wire::NewVisitorConn,
    ) -> io::Result<()> {
        let name = hello.proxy_name.clone();
        let find = |name: &str| {
            self.shared
                .registry
                .lock()
                .proxies
                .get(name)
                .cloned()
                .filter(|o| o.asked.proxy_type == "stcp")
        };
        let open = find(&name);
        let found = match (&open, &self.shared.config.authorizer) {
            (Some(open), _) => Some((Secret::new(open.asked.sk.clone()), CancellationToken::new()))
                .filter(|(key, _)| signed_by(key, &hello.sign_key, hello.timestamp))
                .map(|(key, revoked)| (open.clone(), key, revoked)),
            (None, Some(authorizer)) => authorizer
                .visitor(&name, &hello.sign_key, hello.timestamp)
                .and_then(|v| Some((find(&v.proxy)?, v.key, v.revoked))),
            (None, None) => None,
        };
        let error = match (&open, &found) {
            (_, Some(_)) => String::new(),
            (None, None) => format!("custom listener for [{name}] doesn't exist"),
            (Some(_), None) => format!("visitor connection of [{name}] auth failed"),
        };
        wire::write(&mut io, NewVisitorConnResp { proxy_name: name, error }).await?;
        let Some((open, key, revoked)) = found else { return Ok(()) };
        let mut user = layered(
            io,
            hello.use_encryption.then(|| Key::derive(&key)).as_ref(),
            hello.use_compression,
        );
        let mut work = self.connect_user(&open, None).await?;
        tokio::select! {
            () = splice(&mut user, &mut work) => {}
            () = revoked.cancelled() => {}
        }
        Ok(())
    }
}

/// Copies both ways; when either direction ends, both do: frp does not half-close.
pub(super) async fn splice<A, B>(a: &mut A, b: &mut B)
where
    A: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
    B: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
{
    {
        let (mut ar, mut aw) = tokio::io::split(&mut *a);
        let (mut br, mut bw) = tokio::io::split(&mut *b);
        tokio::select! {
            _ = copy(&mut ar, &mut bw) => {}
            _ = copy(&mut br, &mut aw) => {}
        }
    }
    let _ = timeout(Duration::from_secs(5), async {
        let _ = a.shutdown().await;
        let _ = b.shutdown().await;
    })
    .await;
}

async fn copy<R: tokio::io::AsyncRead + Unpin, W: tokio::io::AsyncWrite + Unpin>(
    from: &mut R,
    to: &mut W,
) -> io::Result<()> {
    let mut buffer = vec![0; 32 * 1024];
    loop {
        let n = from.read(&mut buffer).await?;
        if n == 0 {
            return to.flush().await;
        }
        to.write_all(&buffer[..n]).await?;
        to.flush().await?;
    }
}
