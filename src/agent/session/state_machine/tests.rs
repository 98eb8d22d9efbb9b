//! The control-plane session: tables of events, and any order of them.

use crate::contract::types::{HeartbeatAnswer, LEEWAY};
use proptest::prelude::*;

use super::*;

struct Bench {
    session: ControlPlaneSession,
    now: Instant,
}

impl Bench {
    fn start(token: bool, credential: Option<u64>) -> (Bench, Vec<SessionAction>) {
        let now = Instant::now();
        let mut bench = Bench { session: ControlPlaneSession::new(now), now };
        let actions = bench.on(SessionEvent::Start { token, credential });
        (bench, actions)
    }

    fn on(&mut self, event: SessionEvent) -> Vec<SessionAction> {
        self.session
            .on(event, self.now, 0.5)
            .into_iter()
            .filter(|a| *a != SessionAction::Report)
            .collect()
    }

    fn done(&mut self, call: RequestKind, outcome: RequestOutcome) -> Vec<SessionAction> {
        self.on(SessionEvent::Done { call, outcome, offset: Some(0) })
    }

    /// Lets time pass until something is asked for.
    fn tick(&mut self) -> (Duration, Vec<SessionAction>) {
        let begun = self.now;
        for _ in 0..100 {
            self.now = self.session.next_tick().expect("a time to wake");
            let actions = self.on(SessionEvent::Tick);
            if !actions.is_empty() {
                return (self.now - begun, actions);
            }
        }
        panic!("nothing is ever due")
    }

    fn state(&self) -> ControlPlaneState {
        self.session.status().state
    }

    /// Registered, configured, first heartbeat answered.
    fn online() -> Bench {
        let (mut b, actions) = Bench::start(true, None);
        assert_eq!(actions, [SessionAction::Register(RegistrationAuth::Token)]);
        let registered =
            RequestOutcome::Credential { lifetime_s: 3600, config: Some(Box::new(config(1))) };
        assert_eq!(b.done(RequestKind::Register, registered), [SessionAction::Heartbeat]);
        b.done(RequestKind::Heartbeat, heartbeat_response(1, &[]));
        b.done(RequestKind::Deliver, RequestOutcome::Idle);
        assert_eq!(b.state(), ControlPlaneState::Online);
        b
    }
}

#[test]
fn a_capability_that_is_known_later_is_registered_once() {
    let mut b = Bench::online();
    assert_eq!(
        b.on(SessionEvent::CapabilitiesChanged),
        [SessionAction::Register(RegistrationAuth::Credential)]
    );
    let registered =
        RequestOutcome::Credential { lifetime_s: 3600, config: Some(Box::new(config(1))) };
    let actions = b.done(RequestKind::Register, registered);
    assert!(!actions.iter().any(|a| matches!(a, SessionAction::Register(_))), "{actions:?}");
    // without a token there is nothing to register with
    let (mut b, _) = Bench::start(false, None);
    assert_eq!(b.on(SessionEvent::CapabilitiesChanged), []);
}

#[test]
fn a_change_of_the_cluster_is_reported_soon_and_one_that_flaps_not_at_each_turn() {
    let mut b = Bench::online();
    let mut reported = Vec::new();
    let begun = b.now;
    // a node that comes and goes every second for a minute
    for second in 1..=60 {
        b.now = begun + Duration::from_secs(second);
        for event in [SessionEvent::Changed, SessionEvent::Tick] {
            if b.session.on(event, b.now, 0.5).contains(&SessionAction::Report) {
                reported.push(second);
            }
        }
    }
    assert_eq!(reported, [10, 20, 30, 40, 50, 60]);
}

fn config(version: u64) -> Config {
    Config {
        config_version: version,
        heartbeat_interval_s: 10,
        status_interval_s: 100_000,
        ..Config::default()
    }
}

fn heartbeat_response(config_version: u64, directives: &[Directive]) -> RequestOutcome {
    RequestOutcome::Heartbeat(HeartbeatAnswer { config_version, directives: directives.to_vec() })
}

fn refused(status: u16, code: &str) -> RequestOutcome {
    RequestOutcome::Refused { status, code: code.into(), message: "no".into(), retry_after: None }
}

#[test]
fn without_a_token_it_waits_for_ever() {
    let (mut b, actions) = Bench::start(false, None);
    assert!(actions.is_empty());
    b.now += Duration::from_secs(100_000);
    assert!(b.on(SessionEvent::Tick).is_empty());
    assert_eq!(b.state(), ControlPlaneState::Unenrolled);
}

#[test]
fn with_a_credential_the_token_is_not_used() {
    let (mut b, actions) = Bench::start(true, Some(100));
    assert_eq!(actions, [SessionAction::FetchConfig]);
    assert_eq!(
        b.done(RequestKind::Config, RequestOutcome::Config(Box::new(config(1)))),
        [SessionAction::Heartbeat]
    );
}

#[test]
fn heartbeats_come_at_the_interval_and_a_new_configuration_at_once() {
    let mut b = Bench::online();
    let (after, actions) = b.tick();
    assert_eq!(
        (after, actions.as_slice()),
        (Duration::from_secs(10), &[SessionAction::Heartbeat][..])
    );
    assert_eq!(
        b.done(RequestKind::Heartbeat, heartbeat_response(2, &[])),
        [SessionAction::FetchConfig]
    );
    b.done(RequestKind::Config, RequestOutcome::Config(Box::new(config(2))));
    assert_eq!(b.state(), ControlPlaneState::Online);
}

#[test]
fn directives_are_followed() {
    let mut b = Bench::online();
    b.tick();
    assert_eq!(
        b.done(
            RequestKind::Heartbeat,
            heartbeat_response(1, &[Directive::RotateCredential, Directive::Unknown])
        ),
        [SessionAction::Rotate]
    );
    b.done(RequestKind::Rotate, RequestOutcome::Credential { lifetime_s: 3600, config: None });
    b.tick();
    b.done(RequestKind::Heartbeat, heartbeat_response(1, &[Directive::Drain]));
    assert!(b.session.status().drain);
    b.tick();
    assert_eq!(
        b.done(RequestKind::Heartbeat, heartbeat_response(1, &[Directive::Register])),
        [SessionAction::Register(RegistrationAuth::Credential)]
    );
    assert!(!b.session.status().drain);
}

#[test]
fn the_credential_is_rotated_in_time_and_a_failure_keeps_it() {
    let mut b = Bench::online();
    let begun = b.now;
    loop {
        let (_, actions) = b.tick();
        match actions.as_slice() {
            [SessionAction::Heartbeat] => {
                drop(b.done(RequestKind::Heartbeat, heartbeat_response(1, &[])))
            }
            [SessionAction::Rotate] => break,
            other => panic!("{other:?}"),
        }
    }
    assert!((0.6..0.72).contains(&((b.now - begun).as_secs_f64() / 3600.0)));
    b.done(RequestKind::Rotate, refused(500, ""));
    assert_eq!(b.state(), ControlPlaneState::Online);
}

#[test]
fn one_refusal_wipes_nothing_and_many_become_slow() {
    let mut b = Bench::online();
    b.tick();
    b.done(RequestKind::Heartbeat, refused(401, "credential_unknown"));
    assert_eq!(b.state(), ControlPlaneState::Connecting);
    assert_eq!(b.tick().1, [SessionAction::Register(RegistrationAuth::Credential)]);
    b.done(RequestKind::Register, refused(401, "credential_unknown"));
    assert_eq!(b.tick().1, [SessionAction::Register(RegistrationAuth::Token)]);
    b.done(RequestKind::Register, refused(401, "token_revoked"));
    assert_eq!(b.state(), ControlPlaneState::Unauthorized);
    assert!(b.session.status().reason.contains("token_revoked"));
    let (after, actions) = b.tick();
    assert!(after >= Duration::from_secs(240), "{after:?}");
    assert_eq!(actions, [SessionAction::Register(RegistrationAuth::Credential)]);
    b.done(
        RequestKind::Register,
        RequestOutcome::Credential { lifetime_s: 3600, config: Some(Box::new(config(1))) },
    );
    assert_eq!(b.state(), ControlPlaneState::Online);
}

#[test]
fn a_duplicate_is_a_conflict_and_tried_rarely() {
    let (mut b, _) = Bench::start(true, None);
    b.done(RequestKind::Register, refused(409, "duplicate_identity"));
    assert_eq!(b.state(), ControlPlaneState::Conflict);
    assert!(b.tick().0 >= Duration::from_secs(45));
    let (mut b, _) = Bench::start(false, None);
    b.on(SessionEvent::Cloned);
    assert_eq!((b.state(), b.session.next_tick().is_some()), (ControlPlaneState::Conflict, true));
}

#[test]
fn retry_after_is_obeyed() {
    for status in [429, 503] {
        let (mut b, _) = Bench::start(true, None);
        let wait = Duration::from_secs(77);
        b.done(
            RequestKind::Register,
            RequestOutcome::Refused {
                status,
                code: String::new(),
                message: String::new(),
                retry_after: Some(wait),
            },
        );
        assert_eq!(b.state(), ControlPlaneState::Connecting);
        assert!(b.tick().0 >= wait);
    }
}

#[test]
fn a_control_plane_that_is_away_is_asked_again_and_again() {
    let mut b = Bench::online();
    b.tick();
    b.done(RequestKind::Heartbeat, RequestOutcome::Unreachable("tcp: refused".into()));
    assert_eq!(
        (b.state(), b.session.status().reason.as_str()),
        (ControlPlaneState::Connecting, "tcp: refused")
    );
    for _ in 0..50 {
        let (after, actions) = b.tick();
        assert!(after <= Duration::from_secs(30));
        assert_eq!(actions, [SessionAction::FetchConfig]);
        b.done(RequestKind::Config, RequestOutcome::Unreachable("tcp: refused".into()));
    }
    b.tick();
    assert_eq!(
        b.done(RequestKind::Config, RequestOutcome::Config(Box::new(config(1)))),
        [SessionAction::Heartbeat]
    );
}

#[test]
fn a_wrong_clock_is_named_and_tolerated() {
    let mut b = Bench::online();
    b.tick();
    b.on(SessionEvent::Done {
        call: RequestKind::Heartbeat,
        outcome: heartbeat_response(1, &[]),
        offset: Some(-3600),
    });
    assert_eq!(b.state(), ControlPlaneState::Skewed);
    assert!(b.session.status().reason.contains("3600 s behind"));
    assert_eq!(b.tick().1, [SessionAction::Heartbeat]);
    b.on(SessionEvent::Done {
        call: RequestKind::Heartbeat,
        outcome: heartbeat_response(1, &[]),
        offset: Some(LEEWAY),
    });
    assert_eq!(b.state(), ControlPlaneState::Online);
}

#[test]
fn an_expired_credential_without_a_token_is_named() {
    let (mut b, actions) = Bench::start(false, Some(5));
    assert_eq!(actions, [SessionAction::FetchConfig]);
    b.now += Duration::from_secs(6);
    b.done(RequestKind::Config, refused(401, "credential_expired"));
    assert_eq!(b.tick().1, [SessionAction::Register(RegistrationAuth::Credential)]);
    b.done(RequestKind::Register, refused(401, "credential_expired"));
    assert_eq!(b.state(), ControlPlaneState::Expired);
}

#[test]
fn the_control_plane_hears_of_the_end_first() {
    let mut b = Bench::online();
    assert_eq!(b.on(SessionEvent::Drain), [SessionAction::Heartbeat]);
    assert!(!b.session.drain_reported());
    b.done(RequestKind::Heartbeat, heartbeat_response(1, &[]));
    assert!(b.session.drain_reported());
    assert_eq!(b.state(), ControlPlaneState::Draining);
    // nobody to tell
    let (mut b, _) = Bench::start(false, None);
    b.on(SessionEvent::Drain);
    assert!(b.session.drain_reported());
}

#[test]
fn the_queue_is_emptied_one_by_one_and_waits_out_an_outage() {
    let mut b = Bench::online();
    assert_eq!(b.on(SessionEvent::Queued), [SessionAction::Deliver]);
    assert_eq!(b.done(RequestKind::Deliver, RequestOutcome::Delivered), [SessionAction::Deliver]);
    assert!(b.done(RequestKind::Deliver, refused(503, "")).is_empty());
    loop {
        match b.tick().1.as_slice() {
            [SessionAction::Deliver] => break,
            [SessionAction::Heartbeat] => {
                drop(b.done(RequestKind::Heartbeat, heartbeat_response(1, &[])))
            }
            other => panic!("{other:?}"),
        }
    }
    // refused for good: the next one
    assert_eq!(b.done(RequestKind::Deliver, refused(422, "")), [SessionAction::Deliver]);
}

fn outcomes() -> impl Strategy<Value = RequestOutcome> {
    prop_oneof![
        Just(RequestOutcome::Credential { lifetime_s: 100, config: None }),
        Just(RequestOutcome::Config(Box::new(config(1)))),
        prop::sample::select(vec![400_u16, 401, 403, 404, 409, 410, 429, 500, 503])
            .prop_map(|s| refused(s, "")),
        Just(heartbeat_response(2, &[Directive::Register, Directive::RotateCredential])),
        Just(heartbeat_response(1, &[])),
        Just(RequestOutcome::Delivered),
        Just(RequestOutcome::Idle),
        Just(RequestOutcome::Unreachable("x".into())),
    ]
}

proptest! {
    #[test]
    fn whatever_comes_back_one_call_is_under_way_at_most_and_it_never_goes_quiet(
        list in prop::collection::vec(
            (outcomes(), 0_u64..20_000, 0.0_f64..1.0, any::<bool>()), 1..150
        )
    ) {
        let now = Instant::now();
        let mut b = Bench { session: ControlPlaneSession::new(now), now };
        let mut pending = b.on(SessionEvent::Start { token: true, credential: None });
        for (outcome, ms, random, queued) in list {
            prop_assert!(pending.len() <= 1, "{:?}", pending);
            b.now += Duration::from_millis(ms);
            let event = match pending.pop() {
                Some(action) => {
                    let call = match action {
                        SessionAction::Register(_) => RequestKind::Register,
                        SessionAction::FetchConfig => RequestKind::Config,
                        SessionAction::Heartbeat => RequestKind::Heartbeat,
                        SessionAction::Rotate => RequestKind::Rotate,
                        SessionAction::Deliver | SessionAction::Report => RequestKind::Deliver,
                    };
                    SessionEvent::Done { call, outcome, offset: None }
                }
                None if queued => SessionEvent::Queued,
                None => {
                    // something is always due
                    let wake = b.session.next_tick();
                    prop_assert!(wake.is_some());
                    b.now = b.now.max(wake.unwrap());
                    SessionEvent::Tick
                }
            };
            let actions = b.session.on(event, b.now, random).into_iter();
            pending = actions.filter(|a| *a != SessionAction::Report).collect();
        }
    }
}
