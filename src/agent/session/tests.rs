//! The control-plane session: tables of events, and any order of them.

use crate::contract::types::LEEWAY;
use proptest::prelude::*;

use super::*;

struct Bench {
    session: Session,
    now: Instant,
}

impl Bench {
    fn start(token: bool, credential: Option<u64>) -> (Bench, Vec<Action>) {
        let now = Instant::now();
        let mut bench = Bench { session: Session::new(now), now };
        let actions = bench.on(Event::Start { token, credential });
        (bench, actions)
    }

    fn on(&mut self, event: Event) -> Vec<Action> {
        self.session.on(event, self.now, 0.5).into_iter().filter(|a| *a != Action::Report).collect()
    }

    fn done(&mut self, call: Call, outcome: Outcome) -> Vec<Action> {
        self.on(Event::Done { call, outcome, offset: Some(0) })
    }

    /// Lets time pass until something is asked for.
    fn tick(&mut self) -> (Duration, Vec<Action>) {
        let begun = self.now;
        for _ in 0..100 {
            self.now = self.session.wake().expect("a time to wake");
            let actions = self.on(Event::Tick);
            if !actions.is_empty() {
                return (self.now - begun, actions);
            }
        }
        panic!("nothing is ever due")
    }

    fn state(&self) -> State {
        self.session.status().state
    }

    /// Registered, configured, first heartbeat answered.
    fn online() -> Bench {
        let (mut b, actions) = Bench::start(true, None);
        assert_eq!(actions, [Action::Register(With::Token)]);
        let registered = Outcome::Credential { lives: 3600, config: Some(Box::new(config(1))) };
        assert_eq!(b.done(Call::Register, registered), [Action::Heartbeat]);
        b.done(Call::Heartbeat, beat(1, &[]));
        b.done(Call::Deliver, Outcome::Idle);
        assert_eq!(b.state(), State::Online);
        b
    }
}

#[test]
fn a_change_of_the_cluster_is_reported_soon_and_one_that_flaps_not_at_each_turn() {
    let mut b = Bench::online();
    let mut reported = Vec::new();
    let begun = b.now;
    // a node that comes and goes every second for a minute
    for second in 1..=60 {
        b.now = begun + Duration::from_secs(second);
        for event in [Event::Changed, Event::Tick] {
            if b.session.on(event, b.now, 0.5).contains(&Action::Report) {
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

fn beat(config_version: u64, directives: &[Directive]) -> Outcome {
    Outcome::Heartbeat(HeartbeatAnswer { config_version, directives: directives.to_vec() })
}

fn refused(status: u16, code: &str) -> Outcome {
    Outcome::Refused { status, code: code.into(), message: "no".into(), retry_after: None }
}

#[test]
fn without_a_token_it_waits_for_ever() {
    let (mut b, actions) = Bench::start(false, None);
    assert!(actions.is_empty());
    b.now += Duration::from_secs(100_000);
    assert!(b.on(Event::Tick).is_empty());
    assert_eq!(b.state(), State::Unenrolled);
}

#[test]
fn with_a_credential_the_token_is_not_used() {
    let (mut b, actions) = Bench::start(true, Some(100));
    assert_eq!(actions, [Action::FetchConfig]);
    assert_eq!(b.done(Call::Config, Outcome::Config(Box::new(config(1)))), [Action::Heartbeat]);
}

#[test]
fn heartbeats_come_at_the_interval_and_a_new_configuration_at_once() {
    let mut b = Bench::online();
    let (after, actions) = b.tick();
    assert_eq!((after, actions.as_slice()), (Duration::from_secs(10), &[Action::Heartbeat][..]));
    assert_eq!(b.done(Call::Heartbeat, beat(2, &[])), [Action::FetchConfig]);
    b.done(Call::Config, Outcome::Config(Box::new(config(2))));
    assert_eq!(b.state(), State::Online);
}

#[test]
fn directives_are_followed() {
    let mut b = Bench::online();
    b.tick();
    assert_eq!(
        b.done(Call::Heartbeat, beat(1, &[Directive::RotateCredential, Directive::Unknown])),
        [Action::Rotate]
    );
    b.done(Call::Rotate, Outcome::Credential { lives: 3600, config: None });
    b.tick();
    b.done(Call::Heartbeat, beat(1, &[Directive::Drain]));
    assert!(b.session.status().drain);
    b.tick();
    assert_eq!(
        b.done(Call::Heartbeat, beat(1, &[Directive::Register])),
        [Action::Register(With::Credential)]
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
            [Action::Heartbeat] => drop(b.done(Call::Heartbeat, beat(1, &[]))),
            [Action::Rotate] => break,
            other => panic!("{other:?}"),
        }
    }
    assert!((0.6..0.72).contains(&((b.now - begun).as_secs_f64() / 3600.0)));
    b.done(Call::Rotate, refused(500, ""));
    assert_eq!(b.state(), State::Online);
}

#[test]
fn one_refusal_wipes_nothing_and_many_become_slow() {
    let mut b = Bench::online();
    b.tick();
    b.done(Call::Heartbeat, refused(401, "credential_unknown"));
    assert_eq!(b.state(), State::Connecting);
    assert_eq!(b.tick().1, [Action::Register(With::Credential)]);
    b.done(Call::Register, refused(401, "credential_unknown"));
    assert_eq!(b.tick().1, [Action::Register(With::Token)]);
    b.done(Call::Register, refused(401, "token_revoked"));
    assert_eq!(b.state(), State::Unauthorized);
    assert!(b.session.status().reason.contains("token_revoked"));
    let (after, actions) = b.tick();
    assert!(after >= Duration::from_secs(240), "{after:?}");
    assert_eq!(actions, [Action::Register(With::Credential)]);
    b.done(Call::Register, Outcome::Credential { lives: 3600, config: Some(Box::new(config(1))) });
    assert_eq!(b.state(), State::Online);
}

#[test]
fn a_duplicate_is_a_conflict_and_tried_rarely() {
    let (mut b, _) = Bench::start(true, None);
    b.done(Call::Register, refused(409, "duplicate_identity"));
    assert_eq!(b.state(), State::Conflict);
    assert!(b.tick().0 >= Duration::from_secs(45));
    let (mut b, _) = Bench::start(false, None);
    b.on(Event::Cloned);
    assert_eq!((b.state(), b.session.wake().is_some()), (State::Conflict, true));
}

#[test]
fn retry_after_is_obeyed() {
    for status in [429, 503] {
        let (mut b, _) = Bench::start(true, None);
        let wait = Duration::from_secs(77);
        b.done(
            Call::Register,
            Outcome::Refused {
                status,
                code: String::new(),
                message: String::new(),
                retry_after: Some(wait),
            },
        );
        assert_eq!(b.state(), State::Connecting);
        assert!(b.tick().0 >= wait);
    }
}

#[test]
fn a_control_plane_that_is_away_is_asked_again_and_again() {
    let mut b = Bench::online();
    b.tick();
    b.done(Call::Heartbeat, Outcome::Unreachable("tcp: refused".into()));
    assert_eq!(
        (b.state(), b.session.status().reason.as_str()),
        (State::Connecting, "tcp: refused")
    );
    for _ in 0..50 {
        let (after, actions) = b.tick();
        assert!(after <= Duration::from_secs(30));
        assert_eq!(actions, [Action::FetchConfig]);
        b.done(Call::Config, Outcome::Unreachable("tcp: refused".into()));
    }
    b.tick();
    assert_eq!(b.done(Call::Config, Outcome::Config(Box::new(config(1)))), [Action::Heartbeat]);
}

#[test]
fn a_wrong_clock_is_named_and_tolerated() {
    let mut b = Bench::online();
    b.tick();
    b.on(Event::Done { call: Call::Heartbeat, outcome: beat(1, &[]), offset: Some(-3600) });
    assert_eq!(b.state(), State::Skewed);
    assert!(b.session.status().reason.contains("3600 s behind"));
    assert_eq!(b.tick().1, [Action::Heartbeat]);
    b.on(Event::Done { call: Call::Heartbeat, outcome: beat(1, &[]), offset: Some(LEEWAY) });
    assert_eq!(b.state(), State::Online);
}

#[test]
fn an_expired_credential_without_a_token_is_named() {
    let (mut b, actions) = Bench::start(false, Some(5));
    assert_eq!(actions, [Action::FetchConfig]);
    b.now += Duration::from_secs(6);
    b.done(Call::Config, refused(401, "credential_expired"));
    assert_eq!(b.tick().1, [Action::Register(With::Credential)]);
    b.done(Call::Register, refused(401, "credential_expired"));
    assert_eq!(b.state(), State::Expired);
}

#[test]
fn the_control_plane_hears_of_the_end_first() {
    let mut b = Bench::online();
    assert_eq!(b.on(Event::Drain), [Action::Heartbeat]);
    assert!(!b.session.farewell_said());
    b.done(Call::Heartbeat, beat(1, &[]));
    assert!(b.session.farewell_said());
    assert_eq!(b.state(), State::Draining);
    // nobody to tell
    let (mut b, _) = Bench::start(false, None);
    b.on(Event::Drain);
    assert!(b.session.farewell_said());
}

#[test]
fn the_queue_is_emptied_one_by_one_and_waits_out_an_outage() {
    let mut b = Bench::online();
    assert_eq!(b.on(Event::Queued), [Action::Deliver]);
    assert_eq!(b.done(Call::Deliver, Outcome::Delivered), [Action::Deliver]);
    assert!(b.done(Call::Deliver, refused(503, "")).is_empty());
    loop {
        match b.tick().1.as_slice() {
            [Action::Deliver] => break,
            [Action::Heartbeat] => drop(b.done(Call::Heartbeat, beat(1, &[]))),
            other => panic!("{other:?}"),
        }
    }
    // refused for good: the next one
    assert_eq!(b.done(Call::Deliver, refused(422, "")), [Action::Deliver]);
}

fn outcomes() -> impl Strategy<Value = Outcome> {
    prop_oneof![
        Just(Outcome::Credential { lives: 100, config: None }),
        Just(Outcome::Config(Box::new(config(1)))),
        prop::sample::select(vec![400_u16, 401, 403, 404, 409, 410, 429, 500, 503])
            .prop_map(|s| refused(s, "")),
        Just(beat(2, &[Directive::Register, Directive::RotateCredential])),
        Just(beat(1, &[])),
        Just(Outcome::Delivered),
        Just(Outcome::Idle),
        Just(Outcome::Unreachable("x".into())),
    ]
}

proptest! {
    #[test]
    fn whatever_comes_back_one_call_is_under_way_at_most_and_it_never_goes_quiet(
        list in prop::collection::vec((outcomes(), 0_u64..20_000, 0.0_f64..1.0, any::<bool>()), 1..150)
    ) {
        let now = Instant::now();
        let mut b = Bench { session: Session::new(now), now };
        let mut pending = b.on(Event::Start { token: true, credential: None });
        for (outcome, ms, random, queued) in list {
            prop_assert!(pending.len() <= 1, "{:?}", pending);
            b.now += Duration::from_millis(ms);
            let event = match pending.pop() {
                Some(action) => {
                    let call = match action {
                        Action::Register(_) => Call::Register,
                        Action::FetchConfig => Call::Config,
                        Action::Heartbeat => Call::Heartbeat,
                        Action::Rotate => Call::Rotate,
                        Action::Deliver | Action::Report => Call::Deliver,
                    };
                    Event::Done { call, outcome, offset: None }
                }
                None if queued => Event::Queued,
                None => {
                    // something is always due
                    let wake = b.session.wake();
                    prop_assert!(wake.is_some());
                    b.now = b.now.max(wake.unwrap());
                    Event::Tick
                }
            };
            pending = b.session.on(event, b.now, random).into_iter().filter(|a| *a != Action::Report).collect();
        }
    }
}
