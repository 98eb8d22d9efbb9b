//! The state machine of the session: events and a time in, actions out. No input, no output.

use std::time::Duration;

use tokio::time::Instant;

use super::{
    ControlPlaneState, ControlPlaneStatus, RegistrationAuth, RequestKind, RequestOutcome,
    SessionAction, SessionEvent, is_permanent_refusal,
};
use crate::base::backoff::Backoff;
use crate::contract::types::{Config, Directive, LEEWAY};

/// Between attempts that fail until a person acts.
const RETRY_UNAUTHORIZED: Duration = Duration::from_secs(300);
const RETRY_CONFLICT: Duration = Duration::from_secs(60);
/// Until the control plane sends other intervals.
const DEFAULT_HEARTBEAT: Duration = Duration::from_secs(15);
const DEFAULT_STATUS: Duration = Duration::from_secs(60);
/// A change of the cluster is reported this long after it is seen, and at least so long after the
/// last report.
const REPORT_DELAY: Duration = Duration::from_secs(1);
const REPORT_MIN_INTERVAL: Duration = Duration::from_secs(10);

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

/// The session. One request is under way at a time.
pub struct ControlPlaneSession {
    status: ControlPlaneStatus,
    token: bool,
    credential: bool,
    expires: Option<Instant>,
    config: Config,
    due: Due,
    busy: bool,
    drain_heartbeat: bool,
    want_config: bool,
    want_register: bool,
    /// How the agent registered last, so that the other way is tried next.
    last_auth: Option<RegistrationAuth>,
    reported: Option<Instant>,
    refusals: u32,
    backoff: Backoff,
    deliver_backoff: Backoff,
}

impl ControlPlaneSession {
    pub fn new(now: Instant) -> ControlPlaneSession {
        let status = ControlPlaneStatus {
            state: ControlPlaneState::Unenrolled,
            reason: "no AGENT_TOKEN".into(),
            since: now,
            last_answer: None,
            clock_offset: 0,
            drain: false,
        };
        ControlPlaneSession {
            status,
            token: false,
            credential: false,
            expires: None,
            config: Config::default(),
            due: Due::default(),
            busy: false,
            drain_heartbeat: false,
            want_config: false,
            want_register: false,
            last_auth: None,
            reported: None,
            refusals: 0,
            backoff: Backoff::default(),
            deliver_backoff: Backoff::default(),
        }
    }

    pub fn status(&self) -> &ControlPlaneStatus {
        &self.status
    }

    /// Whether nothing is left to report after `Drain`.
    pub fn drain_reported(&self) -> bool {
        self.status.state == ControlPlaneState::Draining && !self.busy && !self.drain_heartbeat
    }

    /// When `Tick` is due next; never while a request is under way.
    pub fn next_tick(&self) -> Option<Instant> {
        if self.busy {
            return None;
        }
        let d = &self.due;
        let retry = d.retry.filter(|_| self.status.state != ControlPlaneState::Draining);
        // the others wait until the control plane answers
        let online =
            [d.heartbeat, d.rotate, d.deliver].into_iter().flatten().filter(|_| self.online());
        online.chain(d.report).chain(retry).min()
    }

    fn set_status(&mut self, state: ControlPlaneState, reason: impl Into<String>, now: Instant) {
        let state = if self.status.state == ControlPlaneState::Draining {
            ControlPlaneState::Draining
        } else {
            state
        };
        let since = if self.status.state == state { self.status.since } else { now };
        self.status =
            ControlPlaneStatus { state, reason: reason.into(), since, ..self.status.clone() };
    }

    fn online(&self) -> bool {
        matches!(self.status.state, ControlPlaneState::Online | ControlPlaneState::Skewed)
    }

    /// Takes an event and says what the client has to do. `random` is in 0 to 1.
    pub fn on(&mut self, event: SessionEvent, now: Instant, random: f64) -> Vec<SessionAction> {
        match event {
            SessionEvent::Start { token, credential } => {
                (self.token, self.credential) = (token, credential.is_some());
                self.expires = credential.map(|s| now + Duration::from_secs(s));
                if token || self.credential {
                    self.set_status(ControlPlaneState::Connecting, "not asked yet", now);
                    self.due.retry = Some(now);
                } else {
                    self.set_status(ControlPlaneState::Unenrolled, "no AGENT_TOKEN", now);
                }
                self.due.report = Some(now + DEFAULT_STATUS);
            }
            SessionEvent::Cloned => {
                let reason = "this disk was copied from another machine, and there is no \
                              AGENT_TOKEN to enrol this one with";
                self.set_status(ControlPlaneState::Conflict, reason, now);
                self.due.retry = None;
            }
            SessionEvent::Done { call, outcome, offset } => {
                self.busy = false;
                if let Some(offset) = offset {
                    self.status.clock_offset = offset;
                }
                self.request_done(call, outcome, now, random);
            }
            SessionEvent::Queued => {
                if self.due.deliver.is_none() {
                    self.due.deliver = Some(now);
                }
            }
            SessionEvent::CapabilitiesChanged => {
                // one that has none yet tells it when it gets one
                if self.credential {
                    self.want_register = true;
                    self.due.retry = self.due.retry.or(Some(now));
                }
            }
            SessionEvent::Changed => {
                // a moment later the rest of the change is known as well; a node that flaps is not
                // reported each time
                let soon = self
                    .reported
                    .map_or(now, |at| at + REPORT_MIN_INTERVAL)
                    .max(now + REPORT_DELAY);
                self.due.report = Some(self.due.report.map_or(soon, |due| due.min(soon)));
            }
            SessionEvent::Drain => {
                // the control plane must know it before anything closes
                self.drain_heartbeat = self.online();
                self.set_status(ControlPlaneState::Draining, "the agent stops", now);
            }
            SessionEvent::Tick => {}
        }
        self.next(now, random)
    }

    /// The most urgent thing that is due.
    fn next(&mut self, now: Instant, random: f64) -> Vec<SessionAction> {
        let mut actions = Vec::new();
        let is_due = |at: Option<Instant>| at.is_some_and(|at| at <= now);
        if is_due(self.due.report) {
            self.due.report = Some(now + jitter(self.status_interval(), random));
            self.reported = Some(now);
            actions.push(SessionAction::Report);
        }
        if self.busy {
            return actions;
        }
        if self.status.state == ControlPlaneState::Draining {
            if std::mem::take(&mut self.drain_heartbeat) {
                self.busy = true;
                actions.push(SessionAction::Heartbeat);
            }
            return actions;
        }
        let call = if is_due(self.due.retry) {
            self.due.retry = None;
            match self.registration_auth() {
                Some(with) => {
                    self.last_auth = Some(with);
                    SessionAction::Register(with)
                }
                None if self.credential => SessionAction::FetchConfig,
                None => return actions,
            }
        } else if !self.online() {
            return actions;
        } else if self.want_config {
            SessionAction::FetchConfig
        } else if is_due(self.due.rotate) {
            self.due.rotate = None;
            SessionAction::Rotate
        } else if is_due(self.due.heartbeat) {
            self.due.heartbeat = Some(now + jitter(self.heartbeat_interval(), random));
            SessionAction::Heartbeat
        } else if is_due(self.due.deliver) {
            self.due.deliver = None;
            SessionAction::Deliver
        } else {
            return actions;
        };
        self.busy = true;
        actions.push(call);
        actions
    }

    fn heartbeat_interval(&self) -> Duration {
        if self.config.heartbeat_interval_s == 0 {
            DEFAULT_HEARTBEAT
        } else {
            Duration::from_secs(self.config.heartbeat_interval_s.clamp(1, 3600))
        }
    }

    /// Time between status reports.
    fn status_interval(&self) -> Duration {
        if self.config.status_interval_s == 0 {
            DEFAULT_STATUS
        } else {
            Duration::from_secs(self.config.status_interval_s.max(5))
        }
    }

    /// Whether and how to register now: the credential first, the token when that was refused.
    fn registration_auth(&self) -> Option<RegistrationAuth> {
        match (self.credential, self.token) {
            (false, true) => Some(RegistrationAuth::Token),
            (true, _) if !self.want_register => None,
            (true, true) if self.last_auth == Some(RegistrationAuth::Credential) => {
                Some(RegistrationAuth::Token)
            }
            (true, _) => Some(RegistrationAuth::Credential),
            (false, false) => None,
        }
    }

    fn request_done(
        &mut self,
        call: RequestKind,
        outcome: RequestOutcome,
        now: Instant,
        random: f64,
    ) {
        if !matches!(
            outcome,
            RequestOutcome::Refused { .. } | RequestOutcome::Unreachable(_) | RequestOutcome::Idle
        ) {
            self.status.last_answer = Some(now);
            self.refusals = 0;
            self.backoff.reset();
        }
        match outcome {
            RequestOutcome::Credential { lifetime_s, config } => {
                (self.credential, self.last_auth, self.want_register) = (true, None, false);
                self.expires = Some(now + Duration::from_secs(lifetime_s));
                self.due.rotate =
                    Some(now + Duration::from_secs(lifetime_s).mul_f64(0.6 + random * 0.1));
                match config {
                    Some(config) => self.apply_config(*config, now),
                    None if call == RequestKind::Register => self.want_config = true,
                    None => {}
                }
            }
            RequestOutcome::Config(config) => self.apply_config(*config, now),
            RequestOutcome::Heartbeat(answer) => {
                self.set_online(now);
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
            RequestOutcome::Idle => {}
            RequestOutcome::Delivered => {
                self.deliver_backoff.reset();
                self.due.deliver = Some(now);
            }
            RequestOutcome::Refused { status, code, message, retry_after } => {
                self.request_refused(&call, status, &code, message, retry_after, now, random)
            }
            RequestOutcome::Unreachable(why) => {
                let wait = self.backoff.next(random);
                match call {
                    // the working credential stays; the next attempt is soon enough
                    RequestKind::Rotate => {
                        self.due.rotate = Some(now + wait.max(Duration::from_secs(30)))
                    }
                    RequestKind::Deliver => {
                        self.due.deliver = Some(now + self.deliver_backoff.next(random))
                    }
                    RequestKind::Register | RequestKind::Config | RequestKind::Heartbeat => {}
                }
                self.want_config |= call == RequestKind::Config;
                self.set_expired_or(ControlPlaneState::Connecting, why, now);
                self.due.retry = Some(now + wait);
            }
        }
    }

    /// The control plane does not answer or refuses: an expired credential is the more important
    /// reason.
    fn set_expired_or(&mut self, state: ControlPlaneState, why: String, now: Instant) {
        if self.credential && !self.token && self.expires.is_some_and(|at| at <= now) {
            self.set_status(
                ControlPlaneState::Expired,
                format!("the credential's time is over: {why}"),
                now,
            );
        } else {
            self.set_status(state, why, now);
        }
    }

    fn apply_config(&mut self, config: Config, now: Instant) {
        let first = self.config == Config::default();
        self.config = config;
        let soon = if first { now } else { now + self.status_interval() };
        self.due.report = Some(self.due.report.map_or(soon, |at| at.min(soon)));
        self.want_config = false;
        self.set_online(now);
        self.due.heartbeat = Some(now);
        if self.due.rotate.is_none() {
            // a stored credential: after two thirds of the time that is left
            self.due.rotate =
                self.expires.map(|at| now + at.saturating_duration_since(now).mul_f64(0.66));
        }
        if self.due.deliver.is_none() {
            self.due.deliver = Some(now);
        }
    }

    fn set_online(&mut self, now: Instant) {
        let offset = self.status.clock_offset;
        if offset.abs() > LEEWAY {
            let side = if offset > 0 { "ahead of" } else { "behind" };
            self.set_status(
                ControlPlaneState::Skewed,
                format!("this clock is {} s {side} the control plane's", offset.abs()),
                now,
            );
        } else {
            self.set_status(ControlPlaneState::Online, "", now);
        }
    }

    #[expect(clippy::too_many_arguments, reason = "the parts of one answer")]
    fn request_refused(
        &mut self,
        call: &RequestKind,
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
                    RequestKind::Register => {
                        self.last_auth == Some(RegistrationAuth::Credential) && self.token
                    }
                    _ => true,
                };
                self.want_register = true;
                if other && self.refusals <= 3 {
                    // one refusal deletes nothing: register again, with the credential and then the
                    // token
                    self.due.retry = Some(now + quick);
                    self.set_status(ControlPlaneState::Connecting, why, now);
                } else {
                    self.last_auth = None;
                    self.refusals = 0;
                    self.due.retry = Some(now + slow(RETRY_UNAUTHORIZED));
                    self.set_status(
                        if expired {
                            ControlPlaneState::Expired
                        } else {
                            ControlPlaneState::Unauthorized
                        },
                        why,
                        now,
                    );
                }
            }
            409 if *call != RequestKind::Deliver => {
                self.due.retry = Some(now + slow(RETRY_CONFLICT));
                self.want_register = true;
                self.set_status(ControlPlaneState::Conflict, why, now);
            }
            404 | 410
                if matches!(
                    call,
                    RequestKind::Heartbeat | RequestKind::Config | RequestKind::Rotate
                ) =>
            {
                self.want_register = true;
                self.due.retry = Some(now + slow(Duration::from_secs(5)));
                self.set_status(ControlPlaneState::Connecting, why, now);
            }
            _ if *call == RequestKind::Deliver && is_permanent_refusal(status) => {
                // it will never be taken: the client drops it and continues
                self.due.deliver = Some(now);
            }
            _ => {
                let wait = retry_after.unwrap_or_default().max(quick);
                match call {
                    RequestKind::Deliver => {
                        self.due.deliver = Some(now + wait.max(self.deliver_backoff.next(random)))
                    }
                    RequestKind::Rotate => {
                        self.due.rotate = Some(now + wait.max(Duration::from_secs(30)))
                    }
                    RequestKind::Register | RequestKind::Config | RequestKind::Heartbeat => {
                        self.due.retry = Some(now + wait);
                        self.set_expired_or(ControlPlaneState::Connecting, why, now);
                    }
                }
            }
        }
    }
}

/// Ten percent more or less, so that a fleet does not send at the same moment.
fn jitter(every: Duration, random: f64) -> Duration {
    every.mul_f64(0.9 + random * 0.2)
}

#[cfg(test)]
mod tests;
