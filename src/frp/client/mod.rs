//! The FRP client: carries out what the state machine decides, and yields the streams that the
//! server hands over.

mod connection;
mod control;

use std::sync::Arc;

use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

use self::connection::{Connection, ConnectionEvent};
use self::control::{new_proxy, wire_name};
use crate::base::backoff::random;
use crate::base::secret::Secret;
use crate::frp::codec::{Duplex, Io};
use crate::frp::dial::{Connector, Dialer, STAGE_TIMEOUT};
use crate::frp::wire::{self, CloseProxy, Login, Message, Ping};
use crate::frp::{
    ProxyKind, TunnelAction, TunnelConfig, TunnelEvent, TunnelStateMachine, TunnelStatus,
};

/// Messages waiting for the control channel, and events waiting for the driver.
const QUEUE: usize = 64;

/// A stream of a user, handed over by the server.
pub struct WorkConnection {
    pub proxy: String,
    pub kind: ProxyKind,
    /// Address of the user as the server saw it; empty where it does not say.
    pub from: String,
    pub io: Io,
}

/// The client. Its tunnel is one session after another.
pub struct Client {
    pub hostname: String,
    pub allow_insecure: bool,
    /// A proxy is set for HTTPS. The tunnel does not go through it, so a failure names it.
    pub proxied: bool,
    /// The settings of the tunnel, whenever they change.
    pub settings: watch::Receiver<Option<TunnelConfig>>,
    pub publish: watch::Sender<TunnelStatus>,
    /// A new run id, to be stored for the next start.
    pub run_ids: mpsc::Sender<String>,
    pub work_connections: mpsc::Sender<WorkConnection>,
    /// Nothing new is taken; what is open continues.
    pub drain: CancellationToken,
    pub stop: CancellationToken,
}

impl Client {
    /// Runs until `stop`. Nothing that a server does or does not do ends it.
    pub async fn run(self, run_id: String) {
        let (events, incoming) = mpsc::channel(QUEUE);
        let mut driver = Driver {
            machine: TunnelStateMachine::new(run_id, Instant::now()),
            connection: Connection::new(events),
            incoming,
            config: Arc::default(),
            dialer: None,
            drained: false,
            client: self,
        };
        driver.client.settings.mark_changed();
        while let Some(event) = driver.next_event().await {
            for action in driver.machine.on(event, Instant::now(), random()) {
                driver.carry_out(action).await;
            }
            driver.publish();
        }
        driver.connection.end();
    }

    fn login(&self, config: &TunnelConfig, run_id: String) -> Login {
        let timestamp = now();
        Login {
            version: wire::VERSION.into(),
            hostname: self.hostname.clone(),
            os: "linux".into(),
            arch: match std::env::consts::ARCH {
                "x86_64" => "amd64".into(),
                "aarch64" => "arm64".into(),
                other => other.into(),
            },
            user: config.auth.user.clone().unwrap_or_default(),
            privilege_key: wire::privilege_key(&config.auth.token, timestamp),
            timestamp,
            run_id,
            metas: config.auth.metas.clone(),
            pool_count: i64::from(config.pool_count),
        }
    }
}

/// A client that runs.
struct Driver {
    client: Client,
    machine: TunnelStateMachine,
    connection: Connection,
    /// Events of all connections, each with the number of its connection.
    incoming: mpsc::Receiver<(u64, ConnectionEvent)>,
    config: Arc<TunnelConfig>,
    dialer: Option<Dialer>,
    drained: bool,
}

impl Driver {
    /// What happens next to the tunnel; `None` at the end.
    async fn next_event(&mut self) -> Option<TunnelEvent> {
        loop {
            let wake = self.machine.next_tick();
            let timer = async {
                match wake {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = self.client.stop.cancelled() => return None,
                () = self.client.drain.cancelled(), if !self.drained => {
                    self.drained = true;
                    for proxy in &self.config.proxies {
                        let proxy_name = wire_name(&self.config, &proxy.name);
                        self.connection.send_control(CloseProxy { proxy_name });
                    }
                }
                changed = self.client.settings.changed(), if !self.drained => {
                    changed.ok()?;
                    return Some(self.read_settings());
                }
                Some((number, event)) = self.incoming.recv() => {
                    if number == self.connection.number
                        && let Some(event) = self.connection.take(event)
                    {
                        return Some(event);
                    }
                }
                () = timer => {
                    // any byte on the shared connection is a sign of life, not only a pong
                    if let Some(silence) = self.connection.silence()
                        && let Some(heard) = Instant::now().checked_sub(silence)
                    {
                        self.machine.on(TunnelEvent::Received, heard, 0.5);
                    }
                    return Some(TunnelEvent::Tick);
                }
            }
        }
    }

    fn read_settings(&mut self) -> TunnelEvent {
        let latest = self.client.settings.borrow_and_update().clone();
        let Some(latest) = latest else { return TunnelEvent::Config(None) };
        match Dialer::new(&latest, self.client.allow_insecure) {
            Ok(dialer) => {
                self.dialer = Some(dialer);
                self.config = Arc::new(latest.clone());
                TunnelEvent::Config(Some(Box::new(latest)))
            }
            Err(why) => TunnelEvent::ConfigUnusable(why),
        }
    }

    async fn carry_out(&mut self, action: TunnelAction) {
        match action {
            TunnelAction::FreshRunId => {
                let fresh = wire::fresh_run_id();
                self.machine.use_run_id(fresh.clone());
                let _ = self.client.run_ids.send(fresh).await;
            }
            TunnelAction::Disconnect => self.connection.end(),
            TunnelAction::Connect => {
                self.connection.begin();
                if let Some(dialer) = self.dialer.clone() {
                    self.connection.connect(dialer, self.client.proxied);
                }
            }
            TunnelAction::Login { run_id } => {
                let run_id = if run_id.is_empty() { self.machine.run_id.clone() } else { run_id };
                let login = self.client.login(&self.config, run_id);
                let work_connections = self.client.work_connections.clone();
                self.connection.login(login, self.config.clone(), work_connections);
            }
            TunnelAction::OpenProxy { name } if !self.drained => {
                if let Some(proxy) = self.config.proxies.iter().find(|p| p.name == name) {
                    self.connection.send_control(new_proxy(&self.config, proxy));
                }
            }
            TunnelAction::OpenProxy { .. } => {}
            TunnelAction::CloseProxy { name } => {
                let proxy_name = wire_name(&self.config, &name);
                self.connection.send_control(CloseProxy { proxy_name });
            }
            TunnelAction::Ping => {
                let timestamp = now();
                let privilege_key = wire::privilege_key(&self.config.auth.token, timestamp);
                self.connection.send_control(Ping { privilege_key, timestamp });
            }
        }
    }

    fn publish(&self) {
        let status = self.machine.status();
        self.client.publish.send_if_modified(|published| {
            let changed = published != status;
            if changed {
                published.clone_from(status);
            }
            changed
        });
    }
}

/// Seconds since 1970, never negative: the server does not judge it.
fn now() -> i64 {
    jiff::Timestamp::now().as_second().max(0)
}

/// Asks the FRP server for a stream to an stcp proxy, as a visitor.
///
/// # Errors
/// I/O errors, and the server's refusal as `PermissionDenied`.
pub async fn visit(
    connector: &Connector,
    run_id: &str,
    proxy: &str,
    secret_key: &Secret,
) -> std::io::Result<impl Duplex + use<>> {
    let timestamp = now();
    let mut stream = connector.open().await?;
    let hello = wire::NewVisitorConn {
        run_id: run_id.into(),
        proxy_name: proxy.into(),
        sign_key: wire::privilege_key(secret_key, timestamp),
        timestamp,
        ..wire::NewVisitorConn::default()
    };
    wire::write(&mut stream, hello).await?;
    match timeout(STAGE_TIMEOUT * 2, wire::read(&mut stream))
        .await
        .map_err(|_| std::io::Error::from(std::io::ErrorKind::TimedOut))??
    {
        Message::NewVisitorConnResp(r) if r.error.is_empty() => Ok(stream),
        Message::NewVisitorConnResp(r) => {
            Err(std::io::Error::new(std::io::ErrorKind::PermissionDenied, r.error))
        }
        other => {
            Err(std::io::Error::other(format!("answered with `{}`", char::from(other.kind()))))
        }
    }
}
