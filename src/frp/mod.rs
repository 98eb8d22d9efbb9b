//! The FRP session as a pure state machine: events and a time in, actions out. Sockets are in `tunnel/client.rs`.

pub mod admission;
pub mod client;
pub mod codec;
pub mod dial;
pub mod mux;
pub mod server;
pub mod wire;

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use crate::base::backoff::Backoff;
use crate::base::secret::Secret;

/// How often an application ping goes out. Always, also with tcpMux: without it a dead link is noticed after minutes.
pub const PING_INTERVAL: Duration = Duration::from_secs(4);
/// Without a pong and without a received byte for this long the link is dead.
pub const LINK_TIMEOUT: Duration = Duration::from_secs(12);
/// A proxy that was not answered is asked for again.
const PROXY_TIMEOUT: Duration = Duration::from_secs(20);
/// A refused proxy is asked for again after this long; sooner while a former session may still hold the name.
const RETRY_PROXY: Duration = Duration::from_secs(30);
const RETRY_NAME_HELD: Duration = Duration::from_secs(4);
/// For this long a held name is put down to a former session of ours.
const FORMER_SESSION: Duration = Duration::from_secs(120);
/// After a try that nobody answered the next one follows within this.
const RETRY_UNANSWERED: Duration = Duration::from_secs(1);
/// Wrong credentials do not get right by hurry.
const RETRY_UNAUTHORIZED: Duration = Duration::from_secs(60);
/// This many sessions lost within a minute, each soon after its login, are two clients with one run id.
const RUN_ID_CONFLICT: usize = 3;

/// The tunnel as the control plane describes it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(default)]
pub struct TunnelConfig {
    /// Name or address of the FRP server.
    pub server: String,
    pub port: u16,
    pub tcp_mux: bool,
    pub pool_count: u16,
    pub tls: TunnelTls,
    pub auth: TunnelAuth,
    pub proxies: Vec<Proxy>,
}

/// How the FRP server proves itself. Without CA or pin the tunnel is refused.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(default)]
pub struct TunnelTls {
    /// Off, anybody on the way sees the login; what callers and agent say stays sealed between them. Refused like a server that
    /// nobody proves.
    pub enable: bool,
    pub ca_pem: Option<String>,
    pub pin: Option<String>,
    pub server_name: Option<String>,
    /// Send 0x17 before the handshake: for servers that share their port with an HTTPS vhost, and for old ones. A server
    /// that hangs up on a handshake without it is tried with it.
    pub custom_first_byte: bool,
}

impl Default for TunnelTls {
    fn default() -> TunnelTls {
        TunnelTls {
            enable: true,
            ca_pem: None,
            pin: None,
            server_name: None,
            custom_first_byte: false,
        }
    }
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(default)]
pub struct TunnelAuth {
    #[cfg_attr(test, schemars(with = "String"))]
    #[serde(serialize_with = "Secret::reveal")]
    pub token: Secret,
    pub user: Option<String>,
    pub metas: BTreeMap<String, String>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum ProxyKind {
    #[default]
    Stcp,
    Tcp,
    Http,
}

impl ProxyKind {
    pub fn name(self) -> &'static str {
        match self {
            ProxyKind::Stcp => "stcp",
            ProxyKind::Tcp => "tcp",
            ProxyKind::Http => "http",
        }
    }
}

/// One way in.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(default)]
pub struct Proxy {
    pub name: String,
    #[serde(rename = "type")]
    pub kind: ProxyKind,
    pub remote_port: u16,
    pub subdomain: String,
    pub custom_domains: Vec<String>,
    #[cfg_attr(test, schemars(with = "String"))]
    #[serde(serialize_with = "Secret::reveal")]
    pub secret_key: Secret,
    pub allow_users: Vec<String>,
    pub use_encryption: bool,
    pub use_compression: bool,
}

/// What the tunnel is doing, as people and machines ask.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum TunnelState {
    /// No settings yet.
    #[default]
    Off,
    Connecting,
    /// Logged in; not every proxy is up yet.
    Opening,
    Up,
    /// Waits before the next try.
    Waiting,
    /// The settings may not be used: no CA and no pin, or a value that is wrong.
    Refused,
    /// The server refuses the token.
    Unauthorized,
    /// Somebody else holds our name or run id.
    Conflict,
}

/// State, reason and since when.
#[derive(Clone, Debug, PartialEq)]
pub struct TunnelStatus {
    pub state: TunnelState,
    pub reason: String,
    pub since: Instant,
}

/// What happens to a session.
#[derive(Clone, Debug, PartialEq)]
pub enum TunnelEvent {
    Settings(Option<Box<TunnelConfig>>),
    /// The settings cannot be used, and why.
    Unusable(String),
    Connected,
    /// DNS, TCP, TLS or the multiplexer failed or took too long.
    ConnectFailed(String),
    /// Nothing came back at all within the time of a stage.
    Unanswered(String),
    LoggedIn {
        run_id: String,
    },
    LoginRefused(String),
    LoginSilent,
    ProxyAnswer {
        name: String,
        error: String,
    },
    /// Something was received: the link lives.
    Heard,
    PongRefused(String),
    Lost(String),
    Tick,
}

/// What the driver has to do.
#[derive(Clone, Debug, PartialEq)]
pub enum TunnelAction {
    Connect,
    Login {
        run_id: String,
    },
    /// A new run id has to be made and kept.
    FreshRunId,
    Open {
        name: String,
    },
    Close {
        name: String,
    },
    Ping,
    Disconnect,
}

enum Phase {
    Idle,
    Connecting,
    LoggingIn,
    Session { since: Instant, pinged: Instant, heard: Instant },
    Waiting { until: Instant },
}

#[derive(Clone, Copy)]
enum ProxyPhase {
    Requested { at: Instant },
    Up,
    Retry { at: Instant },
}

/// One session after another, for ever.
pub struct TunnelStateMachine {
    phase: Phase,
    proxies: BTreeMap<String, ProxyPhase>,
    proxy_names: Vec<String>,
    status: TunnelStatus,
    run_id: String,
    silent_logins: u32,
    /// Ends of sessions that were lost soon after their login.
    short_sessions: VecDeque<Instant>,
    backoff: Backoff,
}

impl TunnelStateMachine {
    pub fn new(run_id: String, now: Instant) -> TunnelStateMachine {
        let status = TunnelStatus {
            state: TunnelState::Off,
            reason: "no tunnel settings yet".into(),
            since: now,
        };
        TunnelStateMachine {
            phase: Phase::Idle,
            proxies: BTreeMap::new(),
            proxy_names: Vec::new(),
            status,
            run_id,
            silent_logins: 0,
            short_sessions: VecDeque::new(),
            backoff: Backoff::default(),
        }
    }

    pub fn status(&self) -> &TunnelStatus {
        &self.status
    }

    /// A run id was made.
    pub fn use_run_id(&mut self, run_id: String) {
        self.run_id = run_id;
    }

    fn set_status(&mut self, state: TunnelState, reason: impl Into<String>, now: Instant) {
        let reason = reason.into();
        let since = if self.status.state == state { self.status.since } else { now };
        self.status = TunnelStatus { state, reason, since };
    }

    fn wait(
        &mut self,
        state: TunnelState,
        reason: String,
        least: Duration,
        now: Instant,
        random: f64,
    ) {
        let wait = self.backoff.next(random).max(least.mul_f64(0.8 + random * 0.4));
        self.set_status(state, reason, now);
        self.phase = Phase::Waiting { until: now + wait };
        self.proxies.clear();
    }

    /// When `Tick` is due next.
    pub fn wake(&self) -> Option<Instant> {
        match &self.phase {
            Phase::Idle | Phase::Connecting | Phase::LoggingIn => None,
            Phase::Waiting { until } => Some(*until),
            Phase::Session { pinged, heard, .. } => {
                let proxies = self.proxies.values().filter_map(|p| match p {
                    ProxyPhase::Requested { at } => Some(*at + PROXY_TIMEOUT),
                    ProxyPhase::Retry { at } => Some(*at),
                    ProxyPhase::Up => None,
                });
                proxies.chain([*pinged + PING_INTERVAL, *heard + LINK_TIMEOUT]).min()
            }
        }
    }

    /// The whole machine. `random` is in 0 to 1.
    pub fn on(&mut self, event: TunnelEvent, now: Instant, random: f64) -> Vec<TunnelAction> {
        let connected =
            matches!(self.phase, Phase::LoggingIn | Phase::Session { .. } | Phase::Connecting);
        match event {
            TunnelEvent::Settings(None) => {
                self.phase = Phase::Idle;
                self.proxies.clear();
                self.set_status(TunnelState::Off, "no tunnel settings yet", now);
                if connected { vec![TunnelAction::Disconnect] } else { Vec::new() }
            }
            TunnelEvent::Unusable(why) => {
                self.phase = Phase::Idle;
                self.proxies.clear();
                self.set_status(TunnelState::Refused, why, now);
                if connected { vec![TunnelAction::Disconnect] } else { Vec::new() }
            }
            TunnelEvent::Settings(Some(config)) => {
                self.proxy_names = config.proxies.iter().map(|p| p.name.clone()).collect();
                self.proxies.clear();
                self.backoff.reset();
                let mut actions =
                    if connected { vec![TunnelAction::Disconnect] } else { Vec::new() };
                actions.extend(self.connect(now));
                actions
            }
            TunnelEvent::Connected if matches!(self.phase, Phase::Connecting) => {
                self.phase = Phase::LoggingIn;
                let mut actions = Vec::new();
                if self.run_id.is_empty() {
                    actions.push(TunnelAction::FreshRunId);
                }
                actions.push(TunnelAction::Login { run_id: self.run_id.clone() });
                actions
            }
            TunnelEvent::ConnectFailed(why) if matches!(self.phase, Phase::Connecting) => {
                self.wait(TunnelState::Waiting, why, Duration::ZERO, now, random);
                vec![TunnelAction::Disconnect]
            }
            TunnelEvent::Unanswered(why) if matches!(self.phase, Phase::Connecting) => {
                // the try itself has taken its time and cost nobody anything: when the network heals, the next one is not far
                self.set_status(TunnelState::Waiting, why, now);
                self.phase =
                    Phase::Waiting { until: now + RETRY_UNANSWERED.mul_f64(0.2 + random * 0.8) };
                vec![TunnelAction::Disconnect]
            }
            TunnelEvent::LoggedIn { run_id } if matches!(self.phase, Phase::LoggingIn) => {
                self.silent_logins = 0;
                if !run_id.is_empty() {
                    self.run_id = run_id;
                }
                self.phase = Phase::Session { since: now, pinged: now, heard: now };
                self.proxies = self
                    .proxy_names
                    .iter()
                    .map(|name| (name.clone(), ProxyPhase::Requested { at: now }))
                    .collect();
                self.update_proxies_state(now);
                self.proxy_names
                    .iter()
                    .map(|name| TunnelAction::Open { name: name.clone() })
                    .collect()
            }
            TunnelEvent::LoginRefused(why) if matches!(self.phase, Phase::LoggingIn) => {
                let token = ["token", "auth", "credential", "revoked"]
                    .iter()
                    .any(|w| why.to_lowercase().contains(w));
                if why.contains("already online") {
                    self.wait(TunnelState::Conflict, why, RETRY_NAME_HELD, now, random);
                } else if token {
                    self.wait(TunnelState::Unauthorized, why, RETRY_UNAUTHORIZED, now, random);
                } else {
                    self.wait(
                        TunnelState::Waiting,
                        format!("login refused: {why}"),
                        RETRY_NAME_HELD,
                        now,
                        random,
                    );
                }
                vec![TunnelAction::Disconnect]
            }
            TunnelEvent::LoginSilent if matches!(self.phase, Phase::LoggingIn) => {
                // frps 0.65 to 0.70.0 may wait for ever for the session that the run id names (fatedier/frp#5391)
                self.silent_logins += 1;
                self.wait(
                    TunnelState::Waiting,
                    "the server does not answer the login".into(),
                    Duration::ZERO,
                    now,
                    random,
                );
                let mut actions = vec![TunnelAction::Disconnect];
                if self.silent_logins >= 2 {
                    self.silent_logins = 0;
                    actions.push(TunnelAction::FreshRunId);
                }
                actions
            }
            TunnelEvent::ProxyAnswer { name, error } => self.proxy_answered(name, &error, now),
            TunnelEvent::Heard => {
                if let Phase::Session { heard, .. } = &mut self.phase {
                    *heard = now.max(*heard);
                }
                Vec::new()
            }
            TunnelEvent::PongRefused(why) if matches!(self.phase, Phase::Session { .. }) => {
                self.wait(TunnelState::Unauthorized, why, Duration::ZERO, now, random);
                vec![TunnelAction::Disconnect]
            }
            TunnelEvent::Lost(why) => match self.phase {
                Phase::Session { since, .. } => self.lost(why, since, now, random),
                Phase::LoggingIn => {
                    self.wait(
                        TunnelState::Waiting,
                        format!("connection lost at login: {why}"),
                        Duration::ZERO,
                        now,
                        random,
                    );
                    vec![TunnelAction::Disconnect]
                }
                Phase::Idle | Phase::Connecting | Phase::Waiting { .. } => Vec::new(),
            },
            TunnelEvent::Tick => self.tick(now, random),
            // an event of a session that is no more
            TunnelEvent::Connected
            | TunnelEvent::ConnectFailed(_)
            | TunnelEvent::Unanswered(_)
            | TunnelEvent::LoggedIn { .. }
            | TunnelEvent::LoginRefused(_)
            | TunnelEvent::LoginSilent
            | TunnelEvent::PongRefused(_) => Vec::new(),
        }
    }

    fn connect(&mut self, now: Instant) -> Vec<TunnelAction> {
        self.phase = Phase::Connecting;
        // a reason that is worth reading stays until there is news
        let reason = if self.status.state == TunnelState::Off {
            String::new()
        } else {
            self.status.reason.clone()
        };
        if matches!(
            self.status.state,
            TunnelState::Off | TunnelState::Up | TunnelState::Opening | TunnelState::Refused
        ) {
            self.set_status(TunnelState::Connecting, reason, now);
        }
        vec![TunnelAction::Connect]
    }

    fn lost(
        &mut self,
        why: String,
        since: Instant,
        now: Instant,
        random: f64,
    ) -> Vec<TunnelAction> {
        let mut actions = vec![TunnelAction::Disconnect];
        let mut state = TunnelState::Waiting;
        if now - since < Duration::from_secs(20) {
            self.short_sessions.push_back(now);
        } else {
            self.short_sessions.clear();
            self.backoff.reset();
        }
        while self.short_sessions.front().is_some_and(|at| now - *at > Duration::from_secs(60)) {
            self.short_sessions.pop_front();
        }
        if self.short_sessions.len() >= RUN_ID_CONFLICT {
            self.short_sessions.clear();
            state = TunnelState::Conflict;
            actions.push(TunnelAction::FreshRunId);
        }
        self.wait(state, format!("connection lost: {why}"), Duration::ZERO, now, random);
        actions
    }

    fn proxy_answered(&mut self, name: String, error: &str, now: Instant) -> Vec<TunnelAction> {
        let Phase::Session { since, .. } = self.phase else { return Vec::new() };
        let Some(proxy) = self.proxies.get_mut(&name) else { return Vec::new() };
        if error.is_empty() {
            *proxy = ProxyPhase::Up;
            self.update_proxies_state(now);
            return Vec::new();
        }
        let held = error.contains("already exists")
            || error.contains("already in use")
            || error.contains("already used");
        *proxy = ProxyPhase::Retry {
            at: now
                + if held && now - since < FORMER_SESSION { RETRY_NAME_HELD } else { RETRY_PROXY },
        };
        let state = if held { TunnelState::Conflict } else { TunnelState::Opening };
        self.set_status(state, format!("proxy {name}: {error}"), now);
        Vec::new()
    }

    /// Up means that every proxy is.
    fn update_proxies_state(&mut self, now: Instant) {
        if self.proxies.values().all(|p| matches!(p, ProxyPhase::Up)) {
            self.set_status(TunnelState::Up, "", now);
        } else if !matches!(self.status.state, TunnelState::Conflict | TunnelState::Opening) {
            self.set_status(TunnelState::Opening, "waiting for the proxies", now);
        }
    }

    fn tick(&mut self, now: Instant, random: f64) -> Vec<TunnelAction> {
        match &mut self.phase {
            Phase::Waiting { until } if *until <= now => self.connect(now),
            Phase::Session { since, pinged, heard } => {
                let since = *since;
                if now >= *heard + LINK_TIMEOUT {
                    // the link has died, not the server: what was waited for before has nothing to do with it
                    self.backoff.reset();
                    return self.lost(
                        format!("nothing heard for {} s", LINK_TIMEOUT.as_secs()),
                        since,
                        now,
                        random,
                    );
                }
                let mut actions = Vec::new();
                if now >= *pinged + PING_INTERVAL {
                    *pinged = now;
                    actions.push(TunnelAction::Ping);
                }
                if now - since > Duration::from_secs(60) {
                    self.backoff.reset();
                }
                for (name, proxy) in &mut self.proxies {
                    match *proxy {
                        // unanswered: it may have been opened late, and our own name would then be in the way
                        ProxyPhase::Requested { at } if now >= at + PROXY_TIMEOUT => {
                            actions.extend([
                                TunnelAction::Close { name: name.clone() },
                                TunnelAction::Open { name: name.clone() },
                            ]);
                            *proxy = ProxyPhase::Requested { at: now };
                        }
                        ProxyPhase::Retry { at } if now >= at => {
                            actions.push(TunnelAction::Open { name: name.clone() });
                            *proxy = ProxyPhase::Requested { at: now };
                        }
                        ProxyPhase::Requested { .. }
                        | ProxyPhase::Retry { .. }
                        | ProxyPhase::Up => {}
                    }
                }
                actions
            }
            Phase::Idle | Phase::Connecting | Phase::LoggingIn | Phase::Waiting { .. } => {
                Vec::new()
            }
        }
    }
}

#[cfg(test)]
mod tests;
