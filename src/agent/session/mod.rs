//! The session with the control plane. A pure state machine takes what happened and when, and says
//! what to do; a client carries it out.

pub mod client;
pub mod http;
pub mod identity;
pub mod queue;
mod state_machine;

use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use crate::base::backoff::random;
use crate::contract::types::{Config, HeartbeatAnswer};
use crate::host::state::StateDir;
use identity::StoredCredential;
pub use state_machine::ControlPlaneSession;

/// State of the connection to the control plane.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ControlPlaneState {
    /// No enrolment token and no credential: nothing to do but wait for one.
    #[default]
    Unenrolled,
    /// On the way, or the control plane does not answer.
    Connecting,
    Online,
    /// Online, and this clock is off by more than 30 s.
    Skewed,
    /// Token or credential are refused.
    Unauthorized,
    /// The credential has expired, and there is no token to get another.
    Expired,
    /// Another machine uses this identity.
    Conflict,
    /// The agent stops.
    Draining,
}

impl ControlPlaneState {
    pub fn name(self) -> &'static str {
        match self {
            ControlPlaneState::Unenrolled => "unenrolled",
            ControlPlaneState::Connecting => "connecting",
            ControlPlaneState::Online => "online",
            ControlPlaneState::Skewed => "skewed",
            ControlPlaneState::Unauthorized => "unauthorized",
            ControlPlaneState::Expired => "expired",
            ControlPlaneState::Conflict => "conflict",
            ControlPlaneState::Draining => "draining",
        }
    }
}

/// State, reason and since when.
#[derive(Clone, Debug, PartialEq)]
pub struct ControlPlaneStatus {
    pub state: ControlPlaneState,
    pub reason: String,
    pub since: Instant,
    /// When the last answer came that was no error.
    pub last_answer: Option<Instant>,
    /// This clock minus the control plane's, seconds.
    pub clock_offset: i64,
    /// The control plane asks the agent to take nothing new.
    pub drain: bool,
}

/// A request to the control plane.
#[derive(Clone, Debug, PartialEq)]
pub enum RequestKind {
    Register,
    Config,
    Heartbeat,
    /// The oldest entry of the queue.
    Deliver,
    Rotate,
}

/// How a request ended.
#[derive(Clone, Debug, PartialEq)]
pub enum RequestOutcome {
    /// Registered or rotated; with the seconds that the credential is valid.
    Credential {
        lifetime_s: u64,
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
pub enum SessionEvent {
    /// Whether there is an enrolment token, and for how many seconds a stored credential is still
    /// valid.
    Start {
        token: bool,
        credential: Option<u64>,
    },
    /// The identity on this disk was generated on another machine.
    Cloned,
    Done {
        call: RequestKind,
        outcome: RequestOutcome,
        offset: Option<i64>,
    },
    /// Something waits in the queue.
    Queued,
    /// The cluster has changed since the last report.
    Changed,
    /// What the agent can do, or what it says of its cluster, differs from what it has registered
    /// with.
    CapabilitiesChanged,
    Tick,
    Drain,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RegistrationAuth {
    Token,
    Credential,
}

#[derive(Clone, Debug, PartialEq)]
pub enum SessionAction {
    Register(RegistrationAuth),
    FetchConfig,
    Heartbeat,
    /// Make a status report and queue it.
    Report,
    /// Send the oldest entry of the queue.
    Deliver,
    Rotate,
}

/// Whether the refusal of a queued entry is final: it will never be taken.
pub(crate) fn is_permanent_refusal(status: u16) -> bool {
    matches!(status, 400 | 404 | 405 | 409 | 410 | 413 | 415 | 422)
}

/// The first event of a session. `ours`: the identity on this disk is this machine's.
fn first_event(ours: bool, token: bool, stored: Option<&StoredCredential>) -> SessionEvent {
    if !ours {
        return SessionEvent::Cloned;
    }
    let credential = stored.map(|c| c.remaining_s(jiff::Timestamp::now()));
    SessionEvent::Start { token, credential }
}

/// What follows from `known`: whether tenants can be made here, where that is known.
fn tenants_event(known: Option<bool>, stored: Option<&StoredCredential>) -> SessionEvent {
    // what was said stays believed until something else is, also over a restart
    if known.is_some() && stored.is_none_or(|stored| stored.tenants != known) {
        SessionEvent::CapabilitiesChanged
    } else {
        SessionEvent::Tick
    }
}

/// What is known of the control plane at `url` before anything was asked.
pub fn initial_status(ours: bool, token: bool, state: &StateDir, url: &str) -> ControlPlaneStatus {
    let now = Instant::now();
    let mut session = ControlPlaneSession::new(now);
    let stored = StoredCredential::load(state, url);
    session.on(first_event(ours, token, stored.as_ref()), now, random());
    session.status().clone()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::secret::Secret;
    use crate::host::Host;

    #[test]
    fn the_first_state_is_that_of_the_disk() {
        let dir = tempfile::tempdir().unwrap();
        let state = Host::new(dir.path(), None).state_dir("/s").unwrap();
        let url = "https://cp.test";
        let first = |ours, token| initial_status(ours, token, &state, url).state;
        assert_eq!(first(true, false), ControlPlaneState::Unenrolled);
        assert_eq!(first(true, true), ControlPlaneState::Connecting);
        assert_eq!(first(false, false), ControlPlaneState::Conflict);
        let stored = StoredCredential {
            url: url.into(),
            credential: Secret::new("poc_x"),
            expires_at: String::new(),
            cluster_id: String::new(),
            config: None,
            tenants: None,
            facts: String::new(),
        };
        stored.store(&state).unwrap();
        assert_eq!(first(true, false), ControlPlaneState::Connecting);
        let other = initial_status(true, false, &state, "https://other.test").state;
        assert_eq!(other, ControlPlaneState::Unenrolled);
    }

    #[test]
    fn what_is_known_of_tenants_is_said_where_it_is_not_what_was_said_last() {
        // as a version wrote it that said nothing of tenants
        let before = r#"{"url": "u", "credential": "poc_x", "expires_at": ""}"#;
        let mut stored: StoredCredential = serde_json::from_str(before).unwrap();
        for (known, said, expected) in [
            (None, None, false),
            (None, Some(true), false),
            (Some(true), None, true),
            (Some(true), Some(false), true),
            (Some(true), Some(true), false),
            // it was true at an earlier start, and is believed still
            (Some(false), Some(true), true),
            (Some(false), None, true),
            (Some(false), Some(false), false),
        ] {
            stored.tenants = said;
            let event = tenants_event(known, Some(&stored));
            let registers = matches!(event, SessionEvent::CapabilitiesChanged);
            assert_eq!(registers, expected, "{known:?} {said:?}");
        }
    }
}
