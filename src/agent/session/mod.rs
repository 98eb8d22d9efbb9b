//! The session with the control plane as a pure state machine: what happened and when in, what to do out.

pub mod client;
pub mod identity;
pub mod queue;

use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use crate::base::backoff::Backoff;
use crate::contract::types::{Config, Directive, HeartbeatAnswer, LEEWAY};

/// Between tries that only a person can make succeed.
const REFUSED: Duration = Duration::from_secs(300);
const CONFLICT: Duration = Duration::from_secs(60);
/// Before the control plane said otherwise.
const HEARTBEAT: Duration = Duration::from_secs(15);
const STATUS: Duration = Duration::from_secs(60);
/// A change of the cluster is reported this long after it is seen, and never sooner than this after the last report.
const SETTLE: Duration = Duration::from_secs(1);
const BETWEEN: Duration = Duration::from_secs(10);

/// State of the connection to the control plane.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// No enrolment token and no credential: nothing to do but wait for one.
    #[default]
    Unenrolled,
    /// On the way, or the control plane is away.
    Connecting,
    Online,
    /// Online, and this clock is off by more than 30 s.
    Skewed,
    /// Token or credential are refused.
    Unauthorized,
    /// The credential's time is over and nothing gets another.
    Expired,
    /// Another machine uses this identity.
    Conflict,
    /// The agent stops.
    Draining,
}

impl State {
    pub fn name(self) -> &'static str {
        match self {
            State::Unenrolled => "unenrolled",
            State::Connecting => "connecting",
            State::Online => "online",
            State::Skewed => "skewed",
            State::Unauthorized => "unauthorized",
            State::Expired => "expired",
            State::Conflict => "conflict",
            State::Draining => "draining",
        }
    }
}

/// State, reason and age.
#[derive(Clone, Debug, PartialEq)]
pub struct Status {
    pub state: State,
    pub reason: String,
    pub since: Instant,
    /// Last answer that was not an error.
    pub heard: Option<Instant>,
    /// This clock minus the control plane's, seconds.
    pub offset: i64,
    /// The control plane asks to take nothing new.
    pub drain: bool,
}

/// A call that came back.
#[derive(Clone, Debug, PartialEq)]
pub enum Call {
    Register,
    Config,
    Heartbeat,
    /// The oldest entry of the queue.
    Deliver,
    Rotate,
}

/// How a call ended.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// Registered or rotated; seconds that the credential lives.
    Credential {
        lives: u64,
        config: Option<Box<Config>>,
    },
    Config(Box<Config>),
    Heartbeat(HeartbeatAnswer),
    Delivered,
    /// There was nothing to deliver.
    Idle,
    /// An HTTP error with its code and message.
    Refused {
        status: u16,
        code: String,
        message: String,
        retry_after: Option<Duration>,
    },
    /// No answer, or none that can be read.
    Unreachable(String),
}

#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// What there is to work with: an enrolment token, a credential and the seconds that it still lives.
    Start {
        token: bool,
        credential: Option<u64>,
    },
    /// The identity on this disk was made on another machine.
    Cloned,
    Done {
        call: Call,
        outcome: Outcome,
        offset: Option<i64>,
    },
    /// Something waits in the queue.
    Queued,
    /// The cluster is not what the last report said.
    Changed,
    Tick,
    Drain,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum With {
    Token,
    Credential,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    Register(With),
    FetchConfig,
    Heartbeat,
    /// Make a status report and queue it.
    Report,
    /// Send the oldest entry of the queue.
    Deliver,
    Rotate,
}

/// When something is due.
#[derive(Default)]
struct Due {
    heartbeat: Option<Instant>,
    report: Option<Instant>,
    rotate: Option<Instant>,
    deliver: Option<Instant>,
    /// Register or fetch the configuration again.
    retry: Option<Instant>,
}

/// The session. One call is under way at a time.
pub struct Session {
    status: Status,
    token: bool,
    credential: bool,
    expires: Option<Instant>,
    config: Config,
    due: Due,
    busy: bool,
    farewell: bool,
    want_config: bool,
    want_register: bool,
    /// The last way of registering, so that the other is tried next.
    tried: Option<With>,
    reported: Option<Instant>,
    refusals: u32,
    backoff: Backoff,
    deliver_backoff: Backoff,
}

impl Session {
    pub fn new(now: Instant) -> Session {
        let status = Status {
            state: State::Unenrolled,
            reason: "no AGENT_TOKEN".into(),
            since: now,
            heard: None,
            offset: 0,
            drain: false,
        };
        Session {
            status,
            token: false,
            credential: false,
            expires: None,
            config: Config::default(),
            due: Due::default(),
            busy: false,
            farewell: false,
            want_config: false,
            want_register: false,
            tried: None,
            reported: None,
            refusals: 0,
            backoff: Backoff::default(),
            deliver_backoff: Backoff::default(),
        }
    }

    pub fn status(&self) -> &Status {
        &self.status
    }

    /// Nothing is left to be said after `Drain`.
    pub fn farewell_said(&self) -> bool {
        self.status.state == State::Draining && !self.busy && !self.farewell
    }

    /// When `Tick` is due next; never while a call is under way.
    pub fn wake(&self) -> Option<Instant> {
        if self.busy {
            return None;
        }
        let d = &self.due;
        let retry = d.retry.filter(|_| self.status.state != State::Draining);
        // the others wait until there is somebody to talk to
        let online =
            [d.heartbeat, d.rotate, d.deliver].into_iter().flatten().filter(|_| self.online());
        online.chain(d.report).chain(retry).min()
    }

    fn say(&mut self, state: State, reason: impl Into<String>, now: Instant) {
        let state = if self.status.state == State::Draining { State::Draining } else { state };
        let since = if self.status.state == state { self.status.since } else { now };
        self.status = Status { state, reason: reason.into(), since, ..self.status.clone() };
    }

    fn online(&self) -> bool {
        matches!(self.status.state, State::Online | State::Skewed)
    }

    /// The whole machine. `random` is in 0 to 1.
    pub fn on(&mut self, event: Event, now: Instant, random: f64) -> Vec<Action> {
        match event {
            Event::Start { token, credential } => {
                (self.token, self.credential) = (token, credential.is_some());
                self.expires = credential.map(|s| now + Duration::from_secs(s));
                if token || self.credential {
                    self.say(State::Connecting, "not asked yet", now);
                    self.due.retry = Some(now);
                } else {
                    self.say(State::Unenrolled, "no AGENT_TOKEN", now);
                }
                self.due.report = Some(now + STATUS);
            }
            Event::Cloned => {
                self.say(State::Conflict, "this disk was copied from another machine, and there is no AGENT_TOKEN to enrol this one with", now);
                self.due.retry = None;
            }
            Event::Done { call, outcome, offset } => {
                self.busy = false;
                if let Some(offset) = offset {
                    self.status.offset = offset;
                }
                self.done(call, outcome, now, random);
            }
            Event::Queued => {
                if self.due.deliver.is_none() {
                    self.due.deliver = Some(now);
                }
            }
            Event::Changed => {
                // a moment later the rest of the change is known too; one that flaps is not told at each turn
                let soon = self.reported.map_or(now, |at| at + BETWEEN).max(now + SETTLE);
                self.due.report = Some(self.due.report.map_or(soon, |due| due.min(soon)));
            }
            Event::Drain => {
                // the one thing that the control plane must hear before anything closes
                self.farewell = self.online();
                self.say(State::Draining, "the agent stops", now);
            }
            Event::Tick => {}
        }
        self.next(now, random)
    }

    /// The most urgent thing that is due.
    fn next(&mut self, now: Instant, random: f64) -> Vec<Action> {
        let mut actions = Vec::new();
        let is_due = |at: Option<Instant>| at.is_some_and(|at| at <= now);
        if is_due(self.due.report) {
            self.due.report = Some(now + spread(self.every(), random));
            self.reported = Some(now);
            actions.push(Action::Report);
        }
        if self.busy {
            return actions;
        }
        if self.status.state == State::Draining {
            if std::mem::take(&mut self.farewell) {
                self.busy = true;
                actions.push(Action::Heartbeat);
            }
            return actions;
        }
        let call = if is_due(self.due.retry) {
            self.due.retry = None;
            match self.registering() {
                Some(with) => {
                    self.tried = Some(with);
                    Action::Register(with)
                }
                None if self.credential => Action::FetchConfig,
                None => return actions,
            }
        } else if !self.online() {
            return actions;
        } else if self.want_config {
            Action::FetchConfig
        } else if is_due(self.due.rotate) {
            self.due.rotate = None;
            Action::Rotate
        } else if is_due(self.due.heartbeat) {
            self.due.heartbeat = Some(now + spread(self.heartbeat(), random));
            Action::Heartbeat
        } else if is_due(self.due.deliver) {
            self.due.deliver = None;
            Action::Deliver
        } else {
            return actions;
        };
        self.busy = true;
        actions.push(call);
        actions
    }

    fn heartbeat(&self) -> Duration {
        if self.config.heartbeat_interval_s == 0 {
            HEARTBEAT
        } else {
            Duration::from_secs(self.config.heartbeat_interval_s.clamp(1, 3600))
        }
    }

    /// Between status reports.
    fn every(&self) -> Duration {
        if self.config.status_interval_s == 0 {
            STATUS
        } else {
            Duration::from_secs(self.config.status_interval_s.max(5))
        }
    }

    /// Whether and how to register now: the credential first, the token when that was refused.
    fn registering(&self) -> Option<With> {
        match (self.credential, self.token) {
            (false, true) => Some(With::Token),
            (true, _) if !self.want_register => None,
            (true, true) if self.tried == Some(With::Credential) => Some(With::Token),
            (true, _) => Some(With::Credential),
            (false, false) => None,
        }
    }

    fn done(&mut self, call: Call, outcome: Outcome, now: Instant, random: f64) {
        if !matches!(outcome, Outcome::Refused { .. } | Outcome::Unreachable(_) | Outcome::Idle) {
            self.status.heard = Some(now);
            self.refusals = 0;
            self.backoff.reset();
        }
        match outcome {
            Outcome::Credential { lives, config } => {
                (self.credential, self.tried, self.want_register) = (true, None, false);
                self.expires = Some(now + Duration::from_secs(lives));
                self.due.rotate =
                    Some(now + Duration::from_secs(lives).mul_f64(0.6 + random * 0.1));
                match config {
                    Some(config) => self.configured(*config, now),
                    None if call == Call::Register => self.want_config = true,
                    None => {}
                }
            }
            Outcome::Config(config) => self.configured(*config, now),
            Outcome::Heartbeat(answer) => {
                self.arrive(now);
                self.want_config |= answer.config_version != self.config.config_version;
                self.status.drain = answer.directives.contains(&Directive::Drain);
                if answer.directives.contains(&Directive::RotateCredential) {
                    self.due.rotate = Some(now);
                }
                if answer.directives.contains(&Directive::Register) {
                    self.want_register = true;
                    self.due.retry = Some(now);
                }
            }
            Outcome::Idle => {}
            Outcome::Delivered => {
                self.deliver_backoff.reset();
                self.due.deliver = Some(now);
            }
            Outcome::Refused { status, code, message, retry_after } => {
                self.refused(&call, status, &code, message, retry_after, now, random)
            }
            Outcome::Unreachable(why) => {
                let wait = self.backoff.next(random);
                match call {
                    // the working credential stays; the next try comes soon enough
                    Call::Rotate => self.due.rotate = Some(now + wait.max(Duration::from_secs(30))),
                    Call::Deliver => {
                        self.due.deliver = Some(now + self.deliver_backoff.next(random))
                    }
                    Call::Register | Call::Config | Call::Heartbeat => {}
                }
                self.want_config |= call == Call::Config;
                self.expired_or(State::Connecting, why, now);
                self.due.retry = Some(now + wait);
            }
        }
    }

    /// The control plane is away or unwilling: a credential whose time is over is the deeper trouble.
    fn expired_or(&mut self, state: State, why: String, now: Instant) {
        if self.credential && !self.token && self.expires.is_some_and(|at| at <= now) {
            self.say(State::Expired, format!("the credential's time is over: {why}"), now);
        } else {
            self.say(state, why, now);
        }
    }

    fn configured(&mut self, config: Config, now: Instant) {
        let first = self.config == Config::default();
        self.config = config;
        let soon = if first { now } else { now + self.every() };
        self.due.report = Some(self.due.report.map_or(soon, |at| at.min(soon)));
        self.want_config = false;
        self.arrive(now);
        self.due.heartbeat = Some(now);
        if self.due.rotate.is_none() {
            // a credential from the disk: two thirds of what is left
            self.due.rotate =
                self.expires.map(|at| now + at.saturating_duration_since(now).mul_f64(0.66));
        }
        if self.due.deliver.is_none() {
            self.due.deliver = Some(now);
        }
    }

    fn arrive(&mut self, now: Instant) {
        let offset = self.status.offset;
        if offset.abs() > LEEWAY {
            let side = if offset > 0 { "ahead of" } else { "behind" };
            self.say(
                State::Skewed,
                format!("this clock is {} s {side} the control plane's", offset.abs()),
                now,
            );
        } else {
            self.say(State::Online, "", now);
        }
    }

    #[expect(clippy::too_many_arguments, reason = "the parts of one answer")]
    fn refused(
        &mut self,
        call: &Call,
        status: u16,
        code: &str,
        message: String,
        retry_after: Option<Duration>,
        now: Instant,
        random: f64,
    ) {
        let why = if code.is_empty() {
            format!("HTTP {status}: {message}")
        } else {
            format!("{code}: {message}")
        };
        let quick = self.backoff.next(random);
        let slow =
            |base: Duration| retry_after.unwrap_or_default().max(base.mul_f64(0.8 + random * 0.4));
        match status {
            401 | 403 => {
                self.refusals += 1;
                let expired =
                    code == "credential_expired" || self.expires.is_some_and(|at| at <= now);
                let other = match call {
                    Call::Register => self.tried == Some(With::Credential) && self.token,
                    _ => true,
                };
                self.want_register = true;
                if other && self.refusals <= 3 {
                    // one refusal wipes nothing: register again, with the credential and then with the token
                    self.due.retry = Some(now + quick);
                    self.say(State::Connecting, why, now);
                } else {
                    self.tried = None;
                    self.refusals = 0;
                    self.due.retry = Some(now + slow(REFUSED));
                    self.say(if expired { State::Expired } else { State::Unauthorized }, why, now);
                }
            }
            409 if *call != Call::Deliver => {
                self.due.retry = Some(now + slow(CONFLICT));
                self.want_register = true;
                self.say(State::Conflict, why, now);
            }
            404 | 410 if matches!(call, Call::Heartbeat | Call::Config | Call::Rotate) => {
                self.want_register = true;
                self.due.retry = Some(now + slow(Duration::from_secs(5)));
                self.say(State::Connecting, why, now);
            }
            _ if *call == Call::Deliver && for_ever(status) => {
                // it will never be taken: the client drops it and goes on
                self.due.deliver = Some(now);
            }
            _ => {
                let wait = retry_after.unwrap_or_default().max(quick);
                match call {
                    Call::Deliver => {
                        self.due.deliver = Some(now + wait.max(self.deliver_backoff.next(random)))
                    }
                    Call::Rotate => self.due.rotate = Some(now + wait.max(Duration::from_secs(30))),
                    Call::Register | Call::Config | Call::Heartbeat => {
                        self.due.retry = Some(now + wait);
                        self.expired_or(State::Connecting, why, now);
                    }
                }
            }
        }
    }
}

/// Whether a refusal of an entry of the queue is final: it will never be taken.
pub(crate) fn for_ever(status: u16) -> bool {
    matches!(status, 400 | 404 | 405 | 409 | 410 | 413 | 415 | 422)
}

/// Ten percent to either side, so that a fleet does not speak in one instant.
fn spread(every: Duration, random: f64) -> Duration {
    every.mul_f64(0.9 + random * 0.2)
}

#[cfg(test)]
mod tests;
