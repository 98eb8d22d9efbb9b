//! The session machine: tables of events, and any order of them.

use proptest::prelude::*;

use super::*;

fn config(names: &[&str]) -> Box<TunnelConfig> {
    let proxies = names.iter().map(|n| Proxy { name: (*n).into(), ..Proxy::default() }).collect();
    Box::new(TunnelConfig { server: "frps".into(), port: 7000, proxies, ..TunnelConfig::default() })
}

struct Bench {
    machine: Machine,
    now: Instant,
}

impl Bench {
    fn new() -> Bench {
        let now = Instant::now();
        Bench { machine: Machine::new("r1".into(), now), now }
    }

    fn on(&mut self, event: Event) -> Vec<Action> {
        self.machine.on(event, self.now, 0.5)
    }

    fn state(&self) -> State {
        self.machine.status().state
    }

    /// Lets time pass to the next tick.
    fn tick(&mut self) -> Vec<Action> {
        self.now = self.machine.wake().expect("a time to wake");
        self.on(Event::Tick)
    }

    fn up(&mut self) {
        self.on(Event::Connected);
        assert_eq!(
            self.on(Event::LoggedIn { run_id: "r1".into() }),
            [Action::Open { name: "a".into() }]
        );
        self.on(Event::ProxyAnswer { name: "a".into(), error: String::new() });
        assert_eq!(self.state(), State::Up);
    }
}

fn begun() -> Bench {
    let mut bench = Bench::new();
    assert_eq!(bench.on(Event::Settings(Some(config(&["a"])))), [Action::Connect]);
    bench
}

#[test]
fn it_is_up_only_when_every_proxy_is() {
    let mut b = begun();
    assert_eq!(b.on(Event::Connected), [Action::Login { run_id: "r1".into() }]);
    assert_eq!(b.state(), State::Connecting);
    b.on(Event::LoggedIn { run_id: "r1".into() });
    assert_eq!(b.state(), State::Opening);
    b.on(Event::ProxyAnswer { name: "unknown".into(), error: String::new() });
    assert_eq!(b.state(), State::Opening);
    b.on(Event::ProxyAnswer { name: "a".into(), error: String::new() });
    assert_eq!(b.state(), State::Up);
}

#[test]
fn pings_go_out_every_four_seconds_and_twelve_silent_ones_are_the_end() {
    let mut b = begun();
    b.up();
    let start = b.now;
    assert_eq!(b.tick(), [Action::Ping]);
    assert_eq!(b.now - start, PING);
    b.on(Event::Heard);
    assert_eq!(b.tick(), [Action::Ping]);
    assert_eq!(b.tick(), [Action::Ping]);
    assert_eq!(b.tick(), [Action::Disconnect]);
    assert_eq!(b.now - start, PING + DEAD);
    assert_eq!(b.state(), State::Waiting);
    assert_eq!(b.tick(), [Action::Connect]);
}

#[test]
fn a_name_held_by_our_former_session_is_asked_for_soon_and_another_later() {
    let mut b = begun();
    b.on(Event::Connected);
    b.on(Event::LoggedIn { run_id: "r1".into() });
    b.on(Event::ProxyAnswer { name: "a".into(), error: "proxy [a] already exists".into() });
    assert_eq!(b.state(), State::Conflict);
    let start = b.now;
    while !b.tick().contains(&Action::Open { name: "a".into() }) {
        b.on(Event::Heard);
    }
    assert_eq!(b.now - start, HELD);
    b.on(Event::ProxyAnswer { name: "a".into(), error: "port not allowed".into() });
    let start = b.now;
    while !b.tick().contains(&Action::Open { name: "a".into() }) {
        b.on(Event::Heard);
    }
    assert_eq!(b.now - start, AGAIN);
}

#[test]
fn an_unanswered_proxy_is_closed_and_asked_for_again() {
    let mut b = begun();
    b.on(Event::Connected);
    b.on(Event::LoggedIn { run_id: "r1".into() });
    loop {
        let actions = b.tick();
        b.on(Event::Heard);
        if actions != [Action::Ping] {
            assert!(
                actions.ends_with(&[
                    Action::Close { name: "a".into() },
                    Action::Open { name: "a".into() }
                ]),
                "{actions:?}"
            );
            return;
        }
    }
}

#[test]
fn two_silent_logins_take_a_fresh_run_id() {
    let mut b = begun();
    b.on(Event::Connected);
    assert_eq!(b.on(Event::LoginSilent), [Action::Disconnect]);
    assert_eq!(b.tick(), [Action::Connect]);
    b.on(Event::Connected);
    assert_eq!(b.on(Event::LoginSilent), [Action::Disconnect, Action::FreshRunId]);
}

#[test]
fn three_sessions_lost_at_once_are_a_fight_and_one_gives_in() {
    let mut b = begun();
    for n in 0..3 {
        b.up();
        let actions = b.on(Event::Lost("eof".into()));
        assert_eq!(actions.contains(&Action::FreshRunId), n == 2, "{n}: {actions:?}");
        assert_eq!(b.state(), if n == 2 { State::Conflict } else { State::Waiting });
        assert_eq!(b.tick(), [Action::Connect]);
    }
}

#[test]
fn a_refused_token_is_not_tried_in_a_hurry() {
    let mut b = begun();
    b.on(Event::Connected);
    let start = b.now;
    assert_eq!(
        b.on(Event::LoginRefused("token in login doesn't match token from configuration".into())),
        [Action::Disconnect]
    );
    assert_eq!(b.state(), State::Unauthorized);
    b.tick();
    assert!(b.now - start >= Duration::from_secs(45));
    assert_eq!(b.state(), State::Unauthorized);
}

#[test]
fn without_settings_nothing_is_dialled() {
    let mut b = begun();
    b.up();
    assert_eq!(b.on(Event::Unusable("no pin".into())), [Action::Disconnect]);
    assert_eq!((b.state(), b.machine.wake()), (State::Refused, None));
    assert_eq!(b.on(Event::Settings(Some(config(&["a"])))), [Action::Connect]);
    assert_eq!(b.on(Event::Settings(None)), [Action::Disconnect]);
    assert_eq!(b.state(), State::Off);
}

fn events() -> impl Strategy<Value = Event> {
    let text = prop_oneof![
        Just(String::new()),
        Just("proxy [a] already exists".into()),
        Just("token wrong".into()),
        Just("other".into())
    ];
    prop_oneof![
        Just(Event::Settings(None)),
        Just(Event::Settings(Some(config(&["a", "b"])))),
        Just(Event::Unusable("x".into())),
        Just(Event::Connected),
        Just(Event::ConnectFailed("x".into())),
        Just(Event::Unanswered("x".into())),
        Just(Event::LoggedIn { run_id: "r2".into() }),
        text.clone().prop_map(Event::LoginRefused),
        Just(Event::LoginSilent),
        text.clone().prop_map(|error| Event::ProxyAnswer { name: "a".into(), error }),
        Just(Event::Heard),
        text.prop_map(Event::PongRefused),
        Just(Event::Lost("x".into())),
        Just(Event::Tick),
        Just(Event::Tick),
    ]
}

proptest! {
    #[test]
    fn any_order_of_events_leaves_one_connection_at_most(list in prop::collection::vec((events(), 0_u64..40_000, 0.0_f64..1.0), 1..200)) {
        let mut b = Bench::new();
        let mut connections = 0_i32;
        for (event, ms, random) in list {
            b.now += Duration::from_millis(ms);
            for action in b.machine.on(event, b.now, random) {
                match action {
                    Action::Connect => connections += 1,
                    Action::Disconnect => connections = 0,
                    Action::Login { .. } | Action::Open { .. } | Action::Close { .. } | Action::Ping => prop_assert_eq!(connections, 1),
                    Action::FreshRunId => {}
                }
                prop_assert!(connections <= 1);
            }
            if b.state() == State::Up {
                prop_assert_eq!(connections, 1);
            }
        }
    }
}

#[test]
fn after_minutes_in_which_nothing_comes_back_the_next_try_is_a_second_away() {
    let mut b = begun();
    for _ in 0..40 {
        b.on(Event::Unanswered("tcp: frps:7000 did not answer in 5 s".into()));
        assert!(b.machine.wake().unwrap() - b.now <= Duration::from_secs(1));
        assert_eq!((b.tick(), b.state()), (vec![Action::Connect], State::Waiting));
    }
    b.up();
    // the link dies again, and soon: what was waited for before is forgotten
    b.now += DEAD;
    b.on(Event::Tick);
    assert!(b.machine.wake().unwrap() - b.now <= Duration::from_secs(1));
}

#[test]
fn a_link_that_died_silently_does_not_pay_for_trouble_before_it() {
    let mut b = begun();
    for _ in 0..40 {
        b.on(Event::ConnectFailed("tcp: frps:7000: Connection refused".into()));
        b.tick();
    }
    b.up();
    b.now += DEAD;
    b.on(Event::Tick);
    assert!(b.machine.wake().unwrap() - b.now <= Duration::from_secs(1));
}
