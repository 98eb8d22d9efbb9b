//! The session machine: tables of events, and any order of them.

use proptest::prelude::*;

use super::*;
use crate::frp::Proxy;

fn config(names: &[&str]) -> Box<TunnelConfig> {
    let proxies = names.iter().map(|n| Proxy { name: (*n).into(), ..Proxy::default() }).collect();
    Box::new(TunnelConfig { server: "frps".into(), port: 7000, proxies, ..TunnelConfig::default() })
}

struct Bench {
    machine: TunnelStateMachine,
    now: Instant,
}

impl Bench {
    fn new() -> Bench {
        let now = Instant::now();
        Bench { machine: TunnelStateMachine::new("r1".into(), now), now }
    }

    fn on(&mut self, event: TunnelEvent) -> Vec<TunnelAction> {
        self.machine.on(event, self.now, 0.5)
    }

    fn state(&self) -> TunnelState {
        self.machine.status().state
    }

    /// Lets time pass to the next tick.
    fn tick(&mut self) -> Vec<TunnelAction> {
        self.now = self.machine.next_tick().expect("a time to wake");
        self.on(TunnelEvent::Tick)
    }

    fn up(&mut self) {
        self.on(TunnelEvent::Connected);
        assert_eq!(
            self.on(TunnelEvent::LoggedIn { run_id: "r1".into() }),
            [TunnelAction::OpenProxy { name: "a".into() }]
        );
        self.on(TunnelEvent::ProxyAnswer { name: "a".into(), error: String::new() });
        assert_eq!(self.state(), TunnelState::Up);
    }
}

fn begun() -> Bench {
    let mut bench = Bench::new();
    assert_eq!(bench.on(TunnelEvent::Config(Some(config(&["a"])))), [TunnelAction::Connect]);
    bench
}

#[test]
fn it_is_up_only_when_every_proxy_is() {
    let mut b = begun();
    assert_eq!(b.on(TunnelEvent::Connected), [TunnelAction::Login { run_id: "r1".into() }]);
    assert_eq!(b.state(), TunnelState::Connecting);
    b.on(TunnelEvent::LoggedIn { run_id: "r1".into() });
    assert_eq!(b.state(), TunnelState::Opening);
    b.on(TunnelEvent::ProxyAnswer { name: "unknown".into(), error: String::new() });
    assert_eq!(b.state(), TunnelState::Opening);
    b.on(TunnelEvent::ProxyAnswer { name: "a".into(), error: String::new() });
    assert_eq!(b.state(), TunnelState::Up);
}

#[test]
fn pings_go_out_every_four_seconds_and_twelve_silent_ones_are_the_end() {
    let mut b = begun();
    b.up();
    let start = b.now;
    assert_eq!(b.tick(), [TunnelAction::Ping]);
    assert_eq!(b.now - start, PING_INTERVAL);
    b.on(TunnelEvent::Received);
    assert_eq!(b.tick(), [TunnelAction::Ping]);
    assert_eq!(b.tick(), [TunnelAction::Ping]);
    assert_eq!(b.tick(), [TunnelAction::Disconnect]);
    assert_eq!(b.now - start, PING_INTERVAL + LINK_TIMEOUT);
    assert_eq!(b.state(), TunnelState::Waiting);
    assert_eq!(b.tick(), [TunnelAction::Connect]);
}

#[test]
fn a_name_held_by_our_former_session_is_asked_for_soon_and_another_later() {
    let mut b = begun();
    b.on(TunnelEvent::Connected);
    b.on(TunnelEvent::LoggedIn { run_id: "r1".into() });
    b.on(TunnelEvent::ProxyAnswer { name: "a".into(), error: "proxy [a] already exists".into() });
    assert_eq!(b.state(), TunnelState::Conflict);
    let start = b.now;
    while !b.tick().contains(&TunnelAction::OpenProxy { name: "a".into() }) {
        b.on(TunnelEvent::Received);
    }
    assert_eq!(b.now - start, RETRY_NAME_HELD);
    b.on(TunnelEvent::ProxyAnswer { name: "a".into(), error: "port not allowed".into() });
    let start = b.now;
    while !b.tick().contains(&TunnelAction::OpenProxy { name: "a".into() }) {
        b.on(TunnelEvent::Received);
    }
    assert_eq!(b.now - start, RETRY_PROXY);
}

#[test]
fn an_unanswered_proxy_is_closed_and_asked_for_again() {
    let mut b = begun();
    b.on(TunnelEvent::Connected);
    b.on(TunnelEvent::LoggedIn { run_id: "r1".into() });
    loop {
        let actions = b.tick();
        b.on(TunnelEvent::Received);
        if actions != [TunnelAction::Ping] {
            assert!(
                actions.ends_with(&[
                    TunnelAction::CloseProxy { name: "a".into() },
                    TunnelAction::OpenProxy { name: "a".into() }
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
    b.on(TunnelEvent::Connected);
    assert_eq!(b.on(TunnelEvent::LoginTimedOut), [TunnelAction::Disconnect]);
    assert_eq!(b.tick(), [TunnelAction::Connect]);
    b.on(TunnelEvent::Connected);
    assert_eq!(
        b.on(TunnelEvent::LoginTimedOut),
        [TunnelAction::Disconnect, TunnelAction::FreshRunId]
    );
}

#[test]
fn three_sessions_lost_at_once_are_a_fight_and_one_gives_in() {
    let mut b = begun();
    for n in 0..3 {
        b.up();
        let actions = b.on(TunnelEvent::ConnectionLost("eof".into()));
        assert_eq!(actions.contains(&TunnelAction::FreshRunId), n == 2, "{n}: {actions:?}");
        assert_eq!(b.state(), if n == 2 { TunnelState::Conflict } else { TunnelState::Waiting });
        assert_eq!(b.tick(), [TunnelAction::Connect]);
    }
}

#[test]
fn a_refused_token_is_not_tried_in_a_hurry() {
    let mut b = begun();
    b.on(TunnelEvent::Connected);
    let start = b.now;
    assert_eq!(
        b.on(TunnelEvent::LoginRefused(
            "token in login doesn't match token from configuration".into()
        )),
        [TunnelAction::Disconnect]
    );
    assert_eq!(b.state(), TunnelState::Unauthorized);
    b.tick();
    assert!(b.now - start >= Duration::from_secs(45));
    assert_eq!(b.state(), TunnelState::Unauthorized);
}

#[test]
fn without_settings_nothing_is_dialled() {
    let mut b = begun();
    b.up();
    assert_eq!(b.on(TunnelEvent::ConfigUnusable("no pin".into())), [TunnelAction::Disconnect]);
    assert_eq!((b.state(), b.machine.next_tick()), (TunnelState::Refused, None));
    assert_eq!(b.on(TunnelEvent::Config(Some(config(&["a"])))), [TunnelAction::Connect]);
    assert_eq!(b.on(TunnelEvent::Config(None)), [TunnelAction::Disconnect]);
    assert_eq!(b.state(), TunnelState::Off);
}

fn events() -> impl Strategy<Value = TunnelEvent> {
    let text = prop_oneof![
        Just(String::new()),
        Just("proxy [a] already exists".into()),
        Just("token wrong".into()),
        Just("other".into())
    ];
    prop_oneof![
        Just(TunnelEvent::Config(None)),
        Just(TunnelEvent::Config(Some(config(&["a", "b"])))),
        Just(TunnelEvent::ConfigUnusable("x".into())),
        Just(TunnelEvent::Connected),
        Just(TunnelEvent::ConnectFailed("x".into())),
        Just(TunnelEvent::ConnectTimedOut("x".into())),
        Just(TunnelEvent::LoggedIn { run_id: "r2".into() }),
        text.clone().prop_map(TunnelEvent::LoginRefused),
        Just(TunnelEvent::LoginTimedOut),
        text.clone().prop_map(|error| TunnelEvent::ProxyAnswer { name: "a".into(), error }),
        Just(TunnelEvent::Received),
        text.prop_map(TunnelEvent::PongRefused),
        Just(TunnelEvent::ConnectionLost("x".into())),
        Just(TunnelEvent::Tick),
        Just(TunnelEvent::Tick),
    ]
}

proptest! {
    #[test]
    fn any_order_of_events_leaves_one_connection_at_most(
        list in prop::collection::vec((events(), 0_u64..40_000, 0.0_f64..1.0), 1..200)
    ) {
        let mut b = Bench::new();
        let mut connections = 0_i32;
        for (event, ms, random) in list {
            b.now += Duration::from_millis(ms);
            for action in b.machine.on(event, b.now, random) {
                match action {
                    TunnelAction::Connect => connections += 1,
                    TunnelAction::Disconnect => connections = 0,
                    TunnelAction::Login { .. }
                    | TunnelAction::OpenProxy { .. }
                    | TunnelAction::CloseProxy { .. }
                    | TunnelAction::Ping => prop_assert_eq!(connections, 1),
                    TunnelAction::FreshRunId => {}
                }
                prop_assert!(connections <= 1);
            }
            if b.state() == TunnelState::Up {
                prop_assert_eq!(connections, 1);
            }
        }
    }
}

#[test]
fn after_minutes_in_which_nothing_comes_back_the_next_try_is_a_second_away() {
    let mut b = begun();
    for _ in 0..40 {
        b.on(TunnelEvent::ConnectTimedOut("tcp: frps:7000 did not answer in 5 s".into()));
        assert!(b.machine.next_tick().unwrap() - b.now <= Duration::from_secs(1));
        assert_eq!((b.tick(), b.state()), (vec![TunnelAction::Connect], TunnelState::Waiting));
    }
    b.up();
    // the link dies again, and soon: what was waited for before is forgotten
    b.now += LINK_TIMEOUT;
    b.on(TunnelEvent::Tick);
    assert!(b.machine.next_tick().unwrap() - b.now <= Duration::from_secs(1));
}

#[test]
fn a_link_that_died_silently_does_not_pay_for_trouble_before_it() {
    let mut b = begun();
    for _ in 0..40 {
        b.on(TunnelEvent::ConnectFailed("tcp: frps:7000: Connection refused".into()));
        b.tick();
    }
    b.up();
    b.now += LINK_TIMEOUT;
    b.on(TunnelEvent::Tick);
    assert!(b.machine.next_tick().unwrap() - b.now <= Duration::from_secs(1));
}
