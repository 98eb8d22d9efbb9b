//! A rollout step by step, against agents that are played by a table.

use std::collections::BTreeMap;

use super::state_machine::{FORGOTTEN, MAX_AT_ONCE};
use super::*;
use crate::contract::token::Role;
use OperationState::{Cancelled, Expired, Failed, Interrupted, Queued, Running, Succeeded};

/// Where a cluster's operation is.
#[derive(Clone, Copy, Debug, PartialEq)]
enum At {
    Sending,
    Refused,
    /// It was handed over, and no answer came.
    Lost,
    Gone,
    /// Queued, and the agent is offline.
    Away,
    Is(OperationState),
}

/// A rollout over clusters `c1`, `c2`, … and what is known of their operations.
struct World {
    record: RolloutRecord,
    /// As it was written last.
    stored: RolloutRecord,
    /// The last look found nothing new.
    was_unchanged: bool,
    at: BTreeMap<String, At>,
    caller_may: bool,
    now: i64,
}

fn world(waves: &[usize]) -> World {
    let clusters = waves.iter().enumerate().flat_map(|(n, size)| vec![n + 1; *size]);
    let cluster = |(n, wave): (usize, usize)| RolloutCluster {
        id: format!("c{}", n + 1),
        name: format!("eu-{}", n + 1),
        agent: format!("a{}", n + 1),
        wave,
        operation: String::new(),
        sent_at: 0,
        state: None,
        reason: String::new(),
        message: String::new(),
    };
    let record = RolloutRecord {
        id: RolloutRecord::id_of("r-1", None, "k"),
        project: "p-1".into(),
        caller_id: "r-1".into(),
        subject: "r-1".into(),
        limits: None,
        kind: "restart".into(),
        request: String::new(),
        sealed: Some("sealed".into()),
        ttl_s: None,
        state: RolloutState::Running,
        message: String::new(),
        created_at: 1,
        finished_at: None,
        paused_at: None,
        clusters: clusters.enumerate().map(cluster).collect(),
    };
    let (stored, at) = (record.clone(), BTreeMap::new());
    World { record, stored, was_unchanged: false, at, caller_may: true, now: 1 }
}

impl World {
    /// One look, after which the control plane sends what it is told to.
    fn step(&mut self) -> Steps {
        self.now += 1;
        let at = &self.at;
        let seen = |cluster: &RolloutCluster| match at.get(&cluster.id) {
            None => Seen::Nothing,
            Some(At::Sending) => Seen::Sending,
            Some(At::Refused) => Seen::Refused("conflict".into(), "no".into()),
            Some(At::Lost) => Seen::Refused(DELIVERY_UNKNOWN.into(), "no answer".into()),
            Some(At::Gone) => Seen::Gone,
            Some(At::Away) => Seen::Away,
            Some(At::Is(state)) if *state == Failed => {
                Seen::Operation(Failed, "crash_loop".into(), "exits with 1".into())
            }
            Some(At::Is(state)) => Seen::Operation(*state, String::new(), String::new()),
        };
        let text = |record: &RolloutRecord| serde_json::to_string(record).unwrap();
        let former = text(&self.record);
        self.was_unchanged = is_unchanged(&self.record, self.caller_may, &seen, self.now);
        let steps = advance(&mut self.record, self.caller_may, &seen, self.now);
        if self.was_unchanged {
            assert_eq!((&steps, text(&self.record)), (&Steps::default(), former));
        }
        if steps.changed {
            self.stored = self.record.clone();
        }
        for id in &steps.send {
            self.at.insert(id.clone(), At::Sending);
        }
        steps
    }

    /// What is sent, as `c1 c2`.
    fn sends(&mut self) -> String {
        self.step().send.join(" ")
    }

    fn set(&mut self, ids: &[&str], at: At) {
        self.at.extend(ids.iter().map(|id| ((*id).to_owned(), at)));
    }

    fn states(&self) -> String {
        self.record.clusters.iter().map(RolloutCluster::state_name).collect::<Vec<_>>().join(" ")
    }

    /// The process is killed, and another one reads what was stored last.
    fn killed(&mut self) {
        let text = serde_json::to_string(&self.stored).unwrap();
        self.record = serde_json::from_str(&text).unwrap();
        self.at.retain(|_, at| *at != At::Sending && *at != At::Refused);
    }
}

#[test]
fn a_wave_begins_when_the_one_before_has_ended() {
    let mut world = world(&[1, 2, 1]);
    assert_eq!(world.sends(), "c1");
    assert_eq!(world.sends(), "");
    world.set(&["c1"], At::Is(Running));
    assert_eq!(
        (world.sends(), world.states()),
        ("".into(), "running waiting waiting waiting".into())
    );
    world.set(&["c1"], At::Is(Succeeded));
    assert_eq!(world.sends(), "c2 c3");
    world.set(&["c2"], At::Is(Succeeded));
    assert_eq!(world.sends(), "");
    let waves = world.record.view(false)["waves"].clone();
    let shown = json!([{"clusters": 1, "state": "done"}, {"clusters": 2, "state": "running"},
        {"clusters": 1, "state": "waiting"}]);
    assert_eq!(waves, shown);
    world.set(&["c3"], At::Is(Succeeded));
    assert_eq!(world.sends(), "c4");
    world.set(&["c4"], At::Is(Succeeded));
    assert!(world.step().changed);
    let RolloutRecord { state, message, finished_at, sealed, .. } = &world.record;
    assert_eq!((*state, sealed, *finished_at), (RolloutState::Succeeded, &None, Some(world.now)));
    assert_eq!(message, "4 of 4 clusters succeeded");
    assert_eq!(world.step(), Steps::default());
}

#[test]
fn the_first_failure_pauses_while_clusters_wait() {
    for (at, said) in [
        (At::Is(Failed), "eu-1: crash_loop: exits with 1; 2 clusters wait"),
        (At::Is(Interrupted), "eu-1: interrupted; 2 clusters wait"),
        (At::Is(OperationState::Unknown), "eu-1: interrupted; 2 clusters wait"),
        (At::Is(Expired), "eu-1: expired; 2 clusters wait"),
        (At::Is(Cancelled), "eu-1: cancelled; 2 clusters wait"),
        (At::Refused, "eu-1: conflict: no; 2 clusters wait"),
        (At::Lost, "eu-1: delivery_unknown: no answer; 2 clusters wait"),
        (At::Gone, "eu-1: cluster_gone: the cluster was removed or revoked"),
    ] {
        let mut world = world(&[2, 2]);
        assert_eq!(world.sends(), "c1 c2");
        world.set(&["c1"], at);
        world.set(&["c2"], At::Is(Running));
        let steps = world.step();
        assert!(steps.changed && steps.send.is_empty(), "{at:?}");
        assert_eq!(world.record.state, RolloutState::Paused, "{at:?}");
        assert_eq!(world.record.paused_at, Some(world.now));
        assert!(world.record.message.starts_with(said), "{}", world.record.message);
        // what runs ends; nothing more is sent
        world.set(&["c2"], At::Is(Succeeded));
        assert_eq!((world.sends(), world.record.rests()), (String::new(), true));
        // and what failed stays so when it is resumed
        assert!(world.record.resume() && !world.record.resume());
        assert_eq!(world.sends(), "c3 c4");
        world.set(&["c3", "c4"], At::Is(Succeeded));
        world.step();
        assert_eq!(world.record.state, RolloutState::Failed);
        assert!(world.record.message.starts_with("3 of 4 clusters succeeded; not eu-1 ("));
    }
}

#[test]
fn a_failure_after_it_was_resumed_pauses_again() {
    let mut world = world(&[1, 1, 1]);
    world.step();
    world.set(&["c1"], At::Is(Failed));
    world.step();
    assert!(world.record.resume());
    assert_eq!(world.sends(), "c2");
    world.set(&["c2"], At::Is(Failed));
    assert_eq!((world.sends(), world.record.state), (String::new(), RolloutState::Paused));
    assert!(world.record.resume());
    assert_eq!(world.sends(), "c3");
    // the last one: nothing is left to send
    world.set(&["c3"], At::Is(Failed));
    world.step();
    assert_eq!(
        (world.record.state, world.states()),
        (RolloutState::Failed, "failed failed failed".into())
    );
}

#[test]
fn those_that_are_offline_catch_up_while_later_waves_run() {
    let mut world = world(&[2, 2, 1]);
    world.step();
    world.set(&["c1"], At::Away);
    world.set(&["c2"], At::Is(Succeeded));
    assert_eq!(world.sends(), "c3 c4");
    // its agent is back, and has not ended: the wave before the next one is what counts
    world.set(&["c1"], At::Is(Running));
    world.set(&["c3", "c4"], At::Is(Succeeded));
    assert_eq!(world.sends(), "c5");
    world.set(&["c5"], At::Is(Succeeded));
    world.step();
    assert_eq!(world.record.state, RolloutState::Running);
    world.step();
    assert!(world.was_unchanged);
    world.set(&["c1"], At::Is(Succeeded));
    world.step();
    assert_eq!(world.record.state, RolloutState::Succeeded);
    // one that is queued at an agent that is there is about to run
    let mut world = self::world(&[1, 1]);
    world.step();
    world.set(&["c1"], At::Is(Queued));
    assert_eq!(world.sends(), "");
    world.set(&["c1"], At::Away);
    assert_eq!(world.sends(), "c2");
    world.set(&["c2"], At::Is(Succeeded));
    world.set(&["c1"], At::Is(Expired));
    world.step();
    assert_eq!(world.record.message, "1 of 2 clusters succeeded; not eu-1 (expired)");
}

#[test]
fn so_many_are_sent_at_once_and_no_more() {
    let mut world = world(&[MAX_AT_ONCE + 3]);
    assert_eq!(world.step().send.len(), MAX_AT_ONCE);
    assert_eq!(world.sends(), "");
    world.set(&["c1", "c2"], At::Is(Running));
    assert_eq!(world.step().send.len(), 2);
    world.set(&["c3"], At::Is(Succeeded));
    assert_eq!(world.step().send.len(), 1);
    // agents that are busy are asked again after those that were not asked yet
    let mut world = self::world(&[MAX_AT_ONCE + 3]);
    world.step();
    world.at.clear();
    let again = world.step().send;
    assert_eq!((again.len(), again[..4].join(" ")), (MAX_AT_ONCE, "c33 c34 c35 c1".into()));
    // and what is queued is cancelled at once, however much it is
    let ids: Vec<&str> = world.record.clusters.iter().map(|c| &*c.id).collect();
    world.at = ids.iter().map(|id| ((*id).to_owned(), At::Away)).collect();
    world.step();
    world.record.cancel("cancelled by user:eve");
    assert_eq!(world.step().cancel.len(), MAX_AT_ONCE + 3);
}

#[test]
fn what_nobody_knows_any_more_is_not_sent_a_second_time() {
    for state in [None, Some(Running), Some(Queued)] {
        let mut world = world(&[1, 1]);
        world.step();
        world.record.clusters[0].state = state;
        world.at.clear();
        world.now += FORGOTTEN - 2;
        assert_eq!(world.sends(), "c1", "{state:?}");
        world.at.clear();
        assert_eq!(world.sends(), "");
        let first = &world.record.clusters[0];
        assert_eq!((first.state, &*first.reason), (Some(Interrupted), DELIVERY_UNKNOWN));
        assert_eq!(world.record.state, RolloutState::Paused);
    }
}

#[test]
fn an_agents_words_are_a_code_and_one_short_line() {
    let mut cluster = world(&[1]).record.clusters.remove(0);
    for reason in ["x".repeat(1 << 20), "no\ncode".into(), "No Code".into()] {
        cluster.end(Failed, &reason, &format!("exits\nwith 1{}", " ".repeat(1 << 20)));
        assert_eq!((&*cluster.reason, cluster.cause()), ("", "failed"));
        assert!(cluster.message.starts_with("exits with 1") && cluster.message.len() == 200);
    }
}

#[test]
fn a_state_of_a_later_version_is_left_alone() {
    let mut world = world(&[1]);
    let mut row = json!(world.record);
    row["state"] = "asleep".into();
    world.record = serde_json::from_value(row).unwrap();
    assert_eq!(world.record.state, RolloutState::Unknown);
    assert_eq!(world.step(), Steps::default());
    assert!(!world.record.rests() && !world.record.cancel("x") && !world.record.resume());
}

#[test]
fn one_that_is_cancelled_sends_no_more_and_what_runs_ends_by_itself() {
    let mut world = world(&[3, 1]);
    world.step();
    world.set(&["c1"], At::Is(Running));
    world.set(&["c2"], At::Away);
    world.set(&["c3"], At::Is(Queued));
    world.step();
    assert!(world.record.cancel("cancelled by user:eve") && !world.record.cancel("again"));
    assert_eq!(world.record.sealed, None);
    let steps = world.step();
    assert_eq!((steps.send.len(), steps.cancel.join(" ")), (0, "c2 c3".into()));
    assert_eq!(world.states(), "running queued queued cancelled");
    world.set(&["c2", "c3"], At::Is(Cancelled));
    world.step();
    assert_eq!((world.record.finished_at, world.record.resume()), (None, false));
    world.set(&["c1"], At::Is(Succeeded));
    assert!(world.step().changed);
    assert_eq!(world.record.finished_at, Some(world.now));
    assert_eq!(world.record.state, RolloutState::Cancelled);
    assert_eq!(world.record.message, "cancelled by user:eve");
}

#[test]
fn a_caller_who_is_revoked_ends_it_also_while_it_is_paused() {
    for paused in [false, true] {
        let mut world = world(&[1, 1]);
        world.step();
        world.set(&["c1"], At::Is(if paused { Failed } else { Running }));
        world.step();
        world.caller_may = false;
        let steps = world.step();
        assert!(steps.changed && steps.send.is_empty());
        assert_eq!(world.record.state, RolloutState::Cancelled);
        assert!(world.record.message.starts_with("caller_revoked"), "{}", world.record.message);
        assert_eq!(world.record.finished_at.is_some(), paused);
        world.set(&["c1"], At::Is(Interrupted));
        world.step();
        assert!(world.record.finished_at.is_some());
    }
}

#[test]
fn a_cluster_that_goes_is_told_by_what_it_may_have_done() {
    let mut world = world(&[3, 1]);
    world.step();
    world.set(&["c1"], At::Is(Running));
    world.set(&["c2"], At::Away);
    world.step();
    world.set(&["c1", "c2", "c3", "c4"], At::Gone);
    world.step();
    assert_eq!(world.states(), "interrupted failed interrupted failed");
    assert!(world.record.clusters.iter().all(|cluster| cluster.reason == "cluster_gone"));
    assert_eq!(world.record.state, RolloutState::Failed);
    // what waited is gone: a pause with nothing behind it is none
    let mut world = self::world(&[1, 1, 1]);
    world.step();
    world.set(&["c1"], At::Is(Failed));
    world.step();
    world.set(&["c2"], At::Gone);
    world.step();
    assert_eq!(world.record.state, RolloutState::Paused);
    world.set(&["c3"], At::Gone);
    world.step();
    assert_eq!(world.record.state, RolloutState::Failed);
}

#[test]
fn a_kill_between_any_two_writes_changes_nothing() {
    // every operation runs for a step; the process is killed after the write of step `kill`
    for kill in 0..12 {
        let mut world = world(&[1, 2, 1]);
        let mut sent = BTreeMap::<String, usize>::new();
        for step in 0..20 {
            let at = world.at.clone();
            for (id, at) in at {
                let next = if at == At::Is(Running) { Succeeded } else { Running };
                world.set(&[&id], At::Is(if at == At::Is(Succeeded) { Succeeded } else { next }));
            }
            for id in world.step().send {
                *sent.entry(id).or_default() += 1;
            }
            if step == kill {
                // sent or not: nobody knows
                world.killed();
            }
        }
        assert_eq!(world.record.state, RolloutState::Succeeded, "killed after step {kill}");
        assert_eq!(sent.len(), 4);
        // what was sent again had the same key, so the agent knows it
        let again: usize = sent.values().map(|times| times - 1).sum();
        assert!(again <= 2, "killed after step {kill}: {sent:?}");
    }
    // killed while it was sent, then paused: it is not sent, and not cancelled as if it never was
    let mut world = world(&[2, 1]);
    world.step();
    world.killed();
    world.set(&["c1"], At::Is(Failed));
    assert_eq!((world.sends(), world.record.state), (String::new(), RolloutState::Paused));
    assert!(world.record.rests() && !world.record.is_idle());
    world.record.cancel("cancelled by r-1");
    world.step();
    assert_eq!(world.states(), "failed interrupted cancelled");
    assert_eq!(world.record.clusters[1].reason, "delivery_unknown");
}

#[test]
fn one_cluster_and_all_refused_are_rollouts_too() {
    let mut world = world(&[1]);
    assert_eq!(world.sends(), "c1");
    world.set(&["c1"], At::Refused);
    world.step();
    assert_eq!(world.record.state, RolloutState::Failed);
    assert_eq!(world.record.message, "0 of 1 clusters succeeded; not eu-1 (conflict)");
    let mut world = self::world(&[5]);
    world.step();
    world.set(&["c1", "c2", "c3", "c4", "c5"], At::Refused);
    world.step();
    let said =
        "0 of 5 clusters succeeded; not eu-1 (conflict), eu-2 (conflict), eu-3 (conflict), …";
    assert_eq!((world.record.state, &*world.record.message), (RolloutState::Failed, said));
}

#[test]
fn what_is_shown_counts_and_holds_nothing_of_what_was_asked() {
    let mut world = world(&[2, 1]);
    world.record.sealed = Some("planted-canary-4711-in-plain-text".into());
    world.record.limits = Some(Limits {
        project: "p-1".into(),
        role: Role::Deployer,
        clusters: None,
        namespaces: None,
        tenant: Some("acme".into()),
    });
    world.step();
    world.set(&["c1"], At::Is(Running));
    world.set(&["c2"], At::Away);
    world.step();
    let view = world.record.view(true);
    let counts = json!({"total": 3, "waiting": 1, "queued": 1, "running": 1, "succeeded": 0,
        "failed": 0, "expired": 0, "cancelled": 0, "interrupted": 0});
    assert_eq!(view["counts"], counts);
    assert_eq!((&view["tenant"], &view["finished_at"]), (&json!("acme"), &json!("")));
    let first = &view["clusters"][0];
    assert_eq!((&first["id"], &first["state"]), (&json!("c1"), &json!("running")));
    assert!(first["operation"].as_str().unwrap().starts_with("o-"));
    assert_eq!(
        view["clusters"][2],
        json!({"id": "c3", "name": "eu-3", "wave": 2, "state": "waiting"})
    );
    assert!(world.record.view(false).get("clusters").is_none());
    for hidden in ["canary-4711-in-plain-text", "caller_id", "limits", "sealed"] {
        assert!(!view.to_string().contains(hidden), "{view}");
    }
}

#[test]
fn an_id_follows_from_the_caller_its_tenant_and_the_key() {
    let id = |caller, tenant: Option<&str>, key| {
        let limits = tenant.map(|tenant| Limits {
            project: "p".into(),
            role: Role::Deployer,
            clusters: None,
            namespaces: None,
            tenant: Some(tenant.into()),
        });
        RolloutRecord::id_of(caller, limits.as_ref(), key)
    };
    let one = id("r-1", None, "k");
    assert!(one.len() == 35 && one.starts_with("ro-"), "{one}");
    assert_eq!(one, id("r-1", None, "k"));
    for other in [id("r-2", None, "k"), id("r-1", Some("acme"), "k"), id("r-1", None, "l")] {
        assert_ne!(one, other);
    }
}
