//! The tunnel of a client as a pure state machine: events and a time in, actions out. Its driver
//! with the sockets is `frp/client/`.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::config::TunnelConfig;
use crate::base::backoff::Backoff;
use crate::base::order;

/// Interval of application pings. They are sent with tcpMux as well: without them a dead link is
/// noticed after minutes.
pub const PING_INTERVAL: Duration = Duration::from_secs(4);
/// A link is dead when neither a pong nor any byte has been received for this long.
pub const LINK_TIMEOUT: Duration = Duration::from_secs(12);
/// An unanswered request for a proxy is repeated after this long.
const PROXY_TIMEOUT: Duration = Duration::from_secs(20);
/// A refused request for a proxy is repeated after this long; sooner while a former session of ours
/// may still hold the name.
const RETRY_PROXY: Duration = Duration::from_secs(30);
const RETRY_NAME_HELD: Duration = Duration::from_secs(4);
/// For this long a name that is taken is assumed to be held by a former session of ours.
const FORMER_SESSION: Duration = Duration::from_secs(120);
/// The next attempt after one that got no answer follows within this.
const RETRY_UNANSWERED: Duration = Duration::from_secs(1);
/// Wrong credentials are retried slowly.
const RETRY_UNAUTHORIZED: Duration = Duration::from_secs(60);
/// So many sessions lost within a minute, each soon after its login, mean that two clients share a
/// run id.
const RUN_ID_CONFLICT: usize = 3;

/// What the tunnel is doing.
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
    /// Another client holds our name or run id.
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
    Config(Option<Box<TunnelConfig>>),
    /// The settings cannot be used, and why.
    ConfigUnusable(String),
    Connected,
    /// DNS, TCP, TLS or the multiplexer failed or took too long.
    ConnectFailed(String),
    /// Nothing came back at all within the time of a stage.
    ConnectTimedOut(String),
    LoggedIn {
        run_id: String,
    },
    LoginRefused(String),
    LoginTimedOut,
    ProxyAnswer {
        name: String,
        error: String,
    },
    /// Something was received: the link is alive.
    Received,
    PongRefused(String),
    ConnectionLost(String),
    Tick,
}

/// What the driver has to do.
#[derive(Clone, Debug, PartialEq)]
pub enum TunnelAction {
    Connect,
    Login {
        run_id: String,
    },
    /// Generate a new run id and store it.
    FreshRunId,
    OpenProxy {
        name: String,
    },
    CloseProxy {
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

/// One session after another, without end. The driver (`frp/client/`) carries out its actions.
pub struct TunnelStateMachine {
    phase: Phase,
    proxies: BTreeMap<String, ProxyPhase>,
    proxy_names: Vec<String>,
    status: TunnelStatus,
    pub(super) run_id: String,
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

    /// Ends the connection and waits before the next try.
    fn wait(
        &mut self,
        state: TunnelState,
        reason: String,
        least: Duration,
        now: Instant,
        random: f64,
    ) -> Vec<TunnelAction> {
        let wait = self.backoff.next(random).max(least.mul_f64(0.8 + random * 0.4));
        self.set_status(state, reason, now);
        self.phase = Phase::Waiting { until: now + wait };
        self.proxies.clear();
        vec![TunnelAction::Disconnect]
    }

    /// When `Tick` is due next.
    pub fn next_tick(&self) -> Option<Instant> {
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

    /// Takes an event and says what the driver has to do. `random` is in 0 to 1.
    pub fn on(&mut self, event: TunnelEvent, now: Instant, random: f64) -> Vec<TunnelAction> {
        let connecting = matches!(self.phase, Phase::Connecting);
        let logging_in = matches!(self.phase, Phase::LoggingIn);
        match event {
            TunnelEvent::Config(None) => {
                self.stay_idle(TunnelState::Off, "no tunnel settings yet".into(), now)
            }
            TunnelEvent::ConfigUnusable(why) => self.stay_idle(TunnelState::Refused, why, now),
            TunnelEvent::Config(Some(config)) => self.use_settings(&config, now),
            TunnelEvent::Connected if connecting => self.log_in(),
            TunnelEvent::ConnectFailed(why) if connecting => {
                self.wait(TunnelState::Waiting, why, Duration::ZERO, now, random)
            }
            TunnelEvent::ConnectTimedOut(why) if connecting => {
                // the attempt took its time already: when the network is back, so is the tunnel
                self.set_status(TunnelState::Waiting, why, now);
                let wait = RETRY_UNANSWERED.mul_f64(0.2 + random * 0.8);
                self.phase = Phase::Waiting { until: now + wait };
                vec![TunnelAction::Disconnect]
            }
            TunnelEvent::LoggedIn { run_id } if logging_in => self.logged_in(run_id, now),
            TunnelEvent::LoginRefused(why) if logging_in => self.login_refused(why, now, random),
            TunnelEvent::LoginTimedOut if logging_in => self.login_unanswered(now, random),
            TunnelEvent::ProxyAnswer { name, error } => self.proxy_answered(name, &error, now),
            TunnelEvent::Received => {
                if let Phase::Session { heard, .. } = &mut self.phase {
                    *heard = now.max(*heard);
                }
                Vec::new()
            }
            TunnelEvent::PongRefused(why) if matches!(self.phase, Phase::Session { .. }) => {
                self.wait(TunnelState::Unauthorized, why, Duration::ZERO, now, random)
            }
            TunnelEvent::ConnectionLost(why) => match self.phase {
                Phase::Session { since, .. } => self.lost(&why, since, now, random),
                Phase::LoggingIn => {
                    let why = format!("connection lost at login: {why}");
                    self.wait(TunnelState::Waiting, why, Duration::ZERO, now, random)
                }
                Phase::Idle | Phase::Connecting | Phase::Waiting { .. } => Vec::new(),
            },
            TunnelEvent::Tick => self.tick(now, random),
            // an event of a session that has ended
            TunnelEvent::Connected
            | TunnelEvent::ConnectFailed(_)
            | TunnelEvent::ConnectTimedOut(_)
            | TunnelEvent::LoggedIn { .. }
            | TunnelEvent::LoginRefused(_)
            | TunnelEvent::LoginTimedOut
            | TunnelEvent::PongRefused(_) => Vec::new(),
        }
    }

    /// Ends a connection that there may be.
    fn disconnect(&self) -> Vec<TunnelAction> {
        match self.phase {
            Phase::Connecting | Phase::LoggingIn | Phase::Session { .. } => {
                vec![TunnelAction::Disconnect]
            }
            Phase::Idle | Phase::Waiting { .. } => Vec::new(),
        }
    }

    /// Does nothing until there are other settings.
    fn stay_idle(&mut self, state: TunnelState, why: String, now: Instant) -> Vec<TunnelAction> {
        let actions = self.disconnect();
        self.phase = Phase::Idle;
        self.proxies.clear();
        self.set_status(state, why, now);
        actions
    }

    fn use_settings(&mut self, config: &TunnelConfig, now: Instant) -> Vec<TunnelAction> {
        self.proxy_names = config.proxies.iter().map(|p| p.name.clone()).collect();
        self.proxies.clear();
        self.backoff.reset();
        let mut actions = self.disconnect();
        actions.extend(self.connect(now));
        actions
    }

    fn log_in(&mut self) -> Vec<TunnelAction> {
        self.phase = Phase::LoggingIn;
        let mut actions = Vec::new();
        if self.run_id.is_empty() {
            actions.push(TunnelAction::FreshRunId);
        }
        actions.push(TunnelAction::Login { run_id: self.run_id.clone() });
        actions
    }

    fn logged_in(&mut self, run_id: String, now: Instant) -> Vec<TunnelAction> {
        self.silent_logins = 0;
        if !run_id.is_empty() {
            self.run_id = run_id;
        }
        self.phase = Phase::Session { since: now, pinged: now, heard: now };
        let requested = |name: &String| (name.clone(), ProxyPhase::Requested { at: now });
        self.proxies = order::map(self.proxy_names.iter().map(requested));
        self.update_proxies_state(now);
        self.proxy_names.iter().map(|name| TunnelAction::OpenProxy { name: name.clone() }).collect()
    }

    fn login_refused(&mut self, why: String, now: Instant, random: f64) -> Vec<TunnelAction> {
        let token = ["token", "auth", "credential", "revoked"]
            .iter()
            .any(|w| why.to_lowercase().contains(w));
        let (state, why, least) = if why.contains("already online") {
            (TunnelState::Conflict, why, RETRY_NAME_HELD)
        } else if token {
            (TunnelState::Unauthorized, why, RETRY_UNAUTHORIZED)
        } else {
            (TunnelState::Waiting, format!("login refused: {why}"), RETRY_NAME_HELD)
        };
        self.wait(state, why, least, now, random)
    }

    /// frps 0.65 to 0.70.0 may wait without end for the session that the run id names
    /// (fatedier/frp#5391).
    fn login_unanswered(&mut self, now: Instant, random: f64) -> Vec<TunnelAction> {
        self.silent_logins += 1;
        let why = "the server does not answer the login".into();
        let mut actions = self.wait(TunnelState::Waiting, why, Duration::ZERO, now, random);
        if self.silent_logins >= 2 {
            self.silent_logins = 0;
            actions.push(TunnelAction::FreshRunId);
        }
        actions
    }

    fn connect(&mut self, now: Instant) -> Vec<TunnelAction> {
        self.phase = Phase::Connecting;
        // the reason of a failure stays until there is a new one
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

    fn lost(&mut self, why: &str, since: Instant, now: Instant, random: f64) -> Vec<TunnelAction> {
        if now - since < Duration::from_secs(20) {
            self.short_sessions.push_back(now);
        } else {
            self.short_sessions.clear();
            self.backoff.reset();
        }
        while self.short_sessions.front().is_some_and(|at| now - *at > Duration::from_secs(60)) {
            self.short_sessions.pop_front();
        }
        let conflict = self.short_sessions.len() >= RUN_ID_CONFLICT;
        let state = if conflict { TunnelState::Conflict } else { TunnelState::Waiting };
        let why = format!("connection lost: {why}");
        let mut actions = self.wait(state, why, Duration::ZERO, now, random);
        if conflict {
            self.short_sessions.clear();
            actions.push(TunnelAction::FreshRunId);
        }
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

    /// The tunnel is up when every proxy is.
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
                    // the link has failed, not the server: earlier failures say nothing about it
                    self.backoff.reset();
                    let why = format!("nothing heard for {} s", LINK_TIMEOUT.as_secs());
                    return self.lost(&why, since, now, random);
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
                        // the server may have opened it late: our own name would then be taken
                        ProxyPhase::Requested { at } if now >= at + PROXY_TIMEOUT => {
                            actions.extend([
                                TunnelAction::CloseProxy { name: name.clone() },
                                TunnelAction::OpenProxy { name: name.clone() },
                            ]);
                            *proxy = ProxyPhase::Requested { at: now };
                        }
                        ProxyPhase::Retry { at } if now >= at => {
                            actions.push(TunnelAction::OpenProxy { name: name.clone() });
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
