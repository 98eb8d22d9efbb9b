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
pub const PING: Duration = Duration::from_secs(4);
/// Without a pong and without a received byte for this long the link is dead.
pub const DEAD: Duration = Duration::from_secs(12);
/// A proxy that was not answered is asked for again.
const ANSWER: Duration = Duration::from_secs(20);
/// A refused proxy is asked for again after this long; sooner while a former session may still hold the name.
const AGAIN: Duration = Duration::from_secs(30);
const HELD: Duration = Duration::from_secs(4);
/// For this long a held name is put down to a former session of ours.
const FORMER: Duration = Duration::from_secs(120);
/// After a try that nobody answered the next one follows within this.
const QUICK: Duration = Duration::from_secs(1);
/// Wrong credentials do not get right by hurry.
const REFUSED: Duration = Duration::from_secs(60);
/// This many sessions lost within a minute, each soon after its login, are two clients with one run id.
const FIGHT: usize = 3;

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
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "ProxyKind"))]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    #[default]
    Stcp,
    Tcp,
    Http,
}

impl Kind {
    pub fn name(self) -> &'static str {
        match self {
            Kind::Stcp => "stcp",
            Kind::Tcp => "tcp",
            Kind::Http => "http",
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
    pub kind: Kind,
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
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "TunnelState"))]
#[serde(rename_all = "snake_case")]
pub enum State {
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

/// State, reason and age.
#[derive(Clone, Debug, PartialEq)]
pub struct Status {
    pub state: State,
    pub reason: String,
    pub since: Instant,
}

/// What happens to a session.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
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
pub enum Action {
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
    Asked { at: Instant },
    Up,
    Again { at: Instant },
}

/// One session after another, for ever.
pub struct Machine {
    phase: Phase,
    proxies: BTreeMap<String, ProxyPhase>,
    wanted: Vec<String>,
    status: Status,
    run_id: String,
    silent_logins: u32,
    /// Ends of sessions that were lost soon after their login.
    short: VecDeque<Instant>,
    backoff: Backoff,
}

impl Machine {
    pub fn new(run_id: String, now: Instant) -> Machine {
        let status =
            Status { state: State::Off, reason: "no tunnel settings yet".into(), since: now };
        Machine {
            phase: Phase::Idle,
            proxies: BTreeMap::new(),
            wanted: Vec::new(),
            status,
            run_id,
            silent_logins: 0,
            short: VecDeque::new(),
            backoff: Backoff::default(),
        }
    }

    pub fn status(&self) -> &Status {
        &self.status
    }

    /// A run id was made.
    pub fn use_run_id(&mut self, run_id: String) {
        self.run_id = run_id;
    }

    fn say(&mut self, state: State, reason: impl Into<String>, now: Instant) {
        let reason = reason.into();
        let since = if self.status.state == state { self.status.since } else { now };
        self.status = Status { state, reason, since };
    }

    fn wait(&mut self, state: State, reason: String, least: Duration, now: Instant, random: f64) {
        let wait = self.backoff.next(random).max(least.mul_f64(0.8 + random * 0.4));
        self.say(state, reason, now);
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
                    ProxyPhase::Asked { at } => Some(*at + ANSWER),
                    ProxyPhase::Again { at } => Some(*at),
                    ProxyPhase::Up => None,
                });
                proxies.chain([*pinged + PING, *heard + DEAD]).min()
            }
        }
    }

    /// The whole machine. `random` is in 0 to 1.
    pub fn on(&mut self, event: Event, now: Instant, random: f64) -> Vec<Action> {
        let connected =
            matches!(self.phase, Phase::LoggingIn | Phase::Session { .. } | Phase::Connecting);
        match event {
            Event::Settings(None) => {
                self.phase = Phase::Idle;
                self.proxies.clear();
                self.say(State::Off, "no tunnel settings yet", now);
                if connected { vec![Action::Disconnect] } else { Vec::new() }
            }
            Event::Unusable(why) => {
                self.phase = Phase::Idle;
                self.proxies.clear();
                self.say(State::Refused, why, now);
                if connected { vec![Action::Disconnect] } else { Vec::new() }
            }
            Event::Settings(Some(config)) => {
                self.wanted = config.proxies.iter().map(|p| p.name.clone()).collect();
                self.proxies.clear();
                self.backoff.reset();
                let mut actions = if connected { vec![Action::Disconnect] } else { Vec::new() };
                actions.extend(self.connect(now));
                actions
            }
            Event::Connected if matches!(self.phase, Phase::Connecting) => {
                self.phase = Phase::LoggingIn;
                let mut actions = Vec::new();
                if self.run_id.is_empty() {
                    actions.push(Action::FreshRunId);
                }
                actions.push(Action::Login { run_id: self.run_id.clone() });
                actions
            }
            Event::ConnectFailed(why) if matches!(self.phase, Phase::Connecting) => {
                self.wait(State::Waiting, why, Duration::ZERO, now, random);
                vec![Action::Disconnect]
            }
            Event::Unanswered(why) if matches!(self.phase, Phase::Connecting) => {
                // the try itself has taken its time and cost nobody anything: when the network heals, the next one is not far
                self.say(State::Waiting, why, now);
                self.phase = Phase::Waiting { until: now + QUICK.mul_f64(0.2 + random * 0.8) };
                vec![Action::Disconnect]
            }
            Event::LoggedIn { run_id } if matches!(self.phase, Phase::LoggingIn) => {
                self.silent_logins = 0;
                if !run_id.is_empty() {
                    self.run_id = run_id;
                }
                self.phase = Phase::Session { since: now, pinged: now, heard: now };
                self.proxies = self
                    .wanted
                    .iter()
                    .map(|name| (name.clone(), ProxyPhase::Asked { at: now }))
                    .collect();
                self.judge(now);
                self.wanted.iter().map(|name| Action::Open { name: name.clone() }).collect()
            }
            Event::LoginRefused(why) if matches!(self.phase, Phase::LoggingIn) => {
                let token = ["token", "auth", "credential", "revoked"]
                    .iter()
                    .any(|w| why.to_lowercase().contains(w));
                if why.contains("already online") {
                    self.wait(State::Conflict, why, HELD, now, random);
                } else if token {
                    self.wait(State::Unauthorized, why, REFUSED, now, random);
                } else {
                    self.wait(State::Waiting, format!("login refused: {why}"), HELD, now, random);
                }
                vec![Action::Disconnect]
            }
            Event::LoginSilent if matches!(self.phase, Phase::LoggingIn) => {
                // frps 0.65 to 0.70.0 may wait for ever for the session that the run id names (fatedier/frp#5391)
                self.silent_logins += 1;
                self.wait(
                    State::Waiting,
                    "the server does not answer the login".into(),
                    Duration::ZERO,
                    now,
                    random,
                );
                let mut actions = vec![Action::Disconnect];
                if self.silent_logins >= 2 {
                    self.silent_logins = 0;
                    actions.push(Action::FreshRunId);
                }
                actions
            }
            Event::ProxyAnswer { name, error } => self.answered(name, &error, now),
            Event::Heard => {
                if let Phase::Session { heard, .. } = &mut self.phase {
                    *heard = now.max(*heard);
                }
                Vec::new()
            }
            Event::PongRefused(why) if matches!(self.phase, Phase::Session { .. }) => {
                self.wait(State::Unauthorized, why, Duration::ZERO, now, random);
                vec![Action::Disconnect]
            }
            Event::Lost(why) => match self.phase {
                Phase::Session { since, .. } => self.lost(why, since, now, random),
                Phase::LoggingIn => {
                    self.wait(
                        State::Waiting,
                        format!("connection lost at login: {why}"),
                        Duration::ZERO,
                        now,
                        random,
                    );
                    vec![Action::Disconnect]
                }
                Phase::Idle | Phase::Connecting | Phase::Waiting { .. } => Vec::new(),
            },
            Event::Tick => self.tick(now, random),
            // an event of a session that is no more
            Event::Connected
            | Event::ConnectFailed(_)
            | Event::Unanswered(_)
            | Event::LoggedIn { .. }
            | Event::LoginRefused(_)
            | Event::LoginSilent
            | Event::PongRefused(_) => Vec::new(),
        }
    }

    fn connect(&mut self, now: Instant) -> Vec<Action> {
        self.phase = Phase::Connecting;
        // a reason that is worth reading stays until there is news
        let reason = if self.status.state == State::Off {
            String::new()
        } else {
            self.status.reason.clone()
        };
        if matches!(self.status.state, State::Off | State::Up | State::Opening | State::Refused) {
            self.say(State::Connecting, reason, now);
        }
        vec![Action::Connect]
    }

    fn lost(&mut self, why: String, since: Instant, now: Instant, random: f64) -> Vec<Action> {
        let mut actions = vec![Action::Disconnect];
        let mut state = State::Waiting;
        if now - since < Duration::from_secs(20) {
            self.short.push_back(now);
        } else {
            self.short.clear();
            self.backoff.reset();
        }
        while self.short.front().is_some_and(|at| now - *at > Duration::from_secs(60)) {
            self.short.pop_front();
        }
        if self.short.len() >= FIGHT {
            self.short.clear();
            state = State::Conflict;
            actions.push(Action::FreshRunId);
        }
        self.wait(state, format!("connection lost: {why}"), Duration::ZERO, now, random);
        actions
    }

    fn answered(&mut self, name: String, error: &str, now: Instant) -> Vec<Action> {
        let Phase::Session { since, .. } = self.phase else { return Vec::new() };
        let Some(proxy) = self.proxies.get_mut(&name) else { return Vec::new() };
        if error.is_empty() {
            *proxy = ProxyPhase::Up;
            self.judge(now);
            return Vec::new();
        }
        let held = error.contains("already exists")
            || error.contains("already in use")
            || error.contains("already used");
        *proxy =
            ProxyPhase::Again { at: now + if held && now - since < FORMER { HELD } else { AGAIN } };
        let state = if held { State::Conflict } else { State::Opening };
        self.say(state, format!("proxy {name}: {error}"), now);
        Vec::new()
    }

    /// Up means that every proxy is.
    fn judge(&mut self, now: Instant) {
        if self.proxies.values().all(|p| matches!(p, ProxyPhase::Up)) {
            self.say(State::Up, "", now);
        } else if !matches!(self.status.state, State::Conflict | State::Opening) {
            self.say(State::Opening, "waiting for the proxies", now);
        }
    }

    fn tick(&mut self, now: Instant, random: f64) -> Vec<Action> {
        match &mut self.phase {
            Phase::Waiting { until } if *until <= now => self.connect(now),
            Phase::Session { since, pinged, heard } => {
                let since = *since;
                if now >= *heard + DEAD {
                    // the link has died, not the server: what was waited for before has nothing to do with it
                    self.backoff.reset();
                    return self.lost(
                        format!("nothing heard for {} s", DEAD.as_secs()),
                        since,
                        now,
                        random,
                    );
                }
                let mut actions = Vec::new();
                if now >= *pinged + PING {
                    *pinged = now;
                    actions.push(Action::Ping);
                }
                if now - since > Duration::from_secs(60) {
                    self.backoff.reset();
                }
                for (name, proxy) in &mut self.proxies {
                    match *proxy {
                        // unanswered: it may have been opened late, and our own name would then be in the way
                        ProxyPhase::Asked { at } if now >= at + ANSWER => {
                            actions.extend([
                                Action::Close { name: name.clone() },
                                Action::Open { name: name.clone() },
                            ]);
                            *proxy = ProxyPhase::Asked { at: now };
                        }
                        ProxyPhase::Again { at } if now >= at => {
                            actions.push(Action::Open { name: name.clone() });
                            *proxy = ProxyPhase::Asked { at: now };
                        }
                        ProxyPhase::Asked { .. } | ProxyPhase::Again { .. } | ProxyPhase::Up => {}
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
