//! Rollouts in memory and in the database.

use super::super::access::tests::{named, registry};
use super::super::entry::tests::agent;
use super::super::{Entry, Principal};
use super::*;
use crate::contract::token::Role;
use crate::contract::types::Operation;
use crate::control_plane::keys::Keys;
use crate::control_plane::model::{AccessToken, OperationRecord};
use crate::control_plane::rollout::RolloutState;

fn cluster(n: usize, wave: usize) -> RolloutCluster {
    RolloutCluster {
        id: format!("c-{n}"),
        name: format!("eu-{n}"),
        agent: format!("a-{n}"),
        wave,
        operation: String::new(),
        sent_at: 0,
        state: None,
        reason: String::new(),
        message: String::new(),
    }
}

fn record(principal: &Principal, key: &str, waves: &[usize]) -> RolloutRecord {
    let clusters = waves.iter().enumerate();
    RolloutRecord {
        id: RolloutRecord::id_of(&principal.id(), principal.limits().as_ref(), key),
        project: principal.project().unwrap_or_default().into(),
        caller_id: principal.id(),
        subject: principal.subject(),
        limits: principal.limits(),
        kind: "restart".into(),
        request: "digest".into(),
        sealed: Some("sealed".into()),
        ttl_s: None,
        state: RolloutState::Running,
        message: String::new(),
        created_at: 1,
        finished_at: None,
        paused_at: None,
        clusters: clusters.map(|(n, wave)| cluster(n + 1, *wave)).collect(),
    }
}

/// A registry with agents `a-1` to `a-3`, and a Runner.
async fn world(dir: &tempfile::TempDir) -> (Registry, Keys, Principal) {
    let (mut registry, keys) = registry(dir).await;
    registry.event_base_url = Some("https://cp".into());
    let project = registry.add_project("default", 1).await.unwrap().id;
    for n in 1..=3 {
        let mut row = agent();
        (row.id, row.cluster_id, row.project) =
            (format!("a-{n}"), format!("c-{n}"), project.clone());
        registry.inner().insert_agent(Entry::new(row));
    }
    let row = AccessToken { role: Role::Deployer, ..named("ci") };
    let (access, _) = registry.add_access_token(&keys, row).await.unwrap();
    (registry, keys, Principal::AccessToken(Box::new(access)))
}

/// The operation of a cluster, as the driver or a report of the agent puts it.
async fn put(registry: &Registry, id: &str, n: usize, state: OperationState) {
    let place = &registry.rollout(id).unwrap().clusters[n - 1];
    let known = registry.operation(&place.agent, &place.operation);
    let record = known.unwrap_or_else(|| OperationRecord {
        agent: place.agent.clone(),
        operation: Operation::default(),
        caller_id: String::new(),
        limits: None,
        tenant: None,
        key: String::new(),
        request: String::new(),
        sealed: None,
        asked_ms: 0,
        expires_at: i64::MAX,
        changed_at: 1,
    });
    let operation = Operation { id: place.operation.clone(), state, ..record.operation.clone() };
    registry.put_operation(OperationRecord { operation, ..record }, 2).await.unwrap();
    registry.end_sending(id, &place.id, Sent::Maybe);
}

#[tokio::test]
async fn a_rollout_goes_on_in_another_process_and_its_end_is_told_once() {
    let dir = tempfile::tempdir().unwrap();
    let (registry, _, principal) = world(&dir).await;
    let (begun, is_new) = registry.add_rollout(record(&principal, "k", &[1, 1, 2])).await.unwrap();
    assert!(is_new);
    let again = registry.add_rollout(record(&principal, "k", &[1])).await.unwrap();
    assert!(!again.1 && again.0.clusters.len() == 3);
    let other = RolloutRecord { request: "other".into(), ..record(&principal, "k", &[1]) };
    let mismatch = registry.add_rollout(other).await.unwrap_err();
    assert_eq!((mismatch.status, mismatch.code), (409, "idempotency_mismatch"));
    let (id, nobody) = (begun.id.as_str(), BTreeSet::new());
    let sends = async |registry: &Registry| {
        let advanced = registry.advance_rollout(id, &nobody, 2).await.unwrap();
        advanced.1.send.join(" ")
    };
    assert_eq!(sends(&registry).await, "c-1 c-2");
    assert_eq!(sends(&registry).await, "");
    put(&registry, id, 1, OperationState::Running).await;
    put(&registry, id, 1, OperationState::Succeeded).await;
    assert_eq!(sends(&registry).await, "");
    // killed while the second one is sent: the next process sends it again
    let agents: Vec<_> = registry.inner().agents.values().map(|e| e.row.clone()).collect();
    let mut registry = Registry::load(registry.store.clone(), None, 2).await.unwrap();
    registry.event_base_url = Some("https://cp".into());
    for row in agents {
        registry.inner().insert_agent(Entry::new(row));
    }
    assert_eq!(registry.active_rollouts(2), [id]);
    assert_eq!(sends(&registry).await, "c-2");
    put(&registry, id, 2, OperationState::Succeeded).await;
    assert_eq!(sends(&registry).await, "c-3");
    put(&registry, id, 3, OperationState::Succeeded).await;
    sends(&registry).await;
    let ended = registry.rollout(id).unwrap();
    assert_eq!((ended.state, ended.finished_at), (RolloutState::Succeeded, Some(2)));
    sends(&registry).await;
    assert!(registry.active_rollouts(2).is_empty() && registry.inner().sending.is_empty());
    let events = registry.store.pending_events(100).await.unwrap();
    let told: Vec<_> = events.iter().filter(|e| e.topic == "rollout.finished").collect();
    assert_eq!(told.len(), 1);
    let body: serde_json::Value = serde_json::from_str(&told[0].body).unwrap();
    assert_eq!(body["rollout"]["counts"]["succeeded"], 3);
    assert!(body["agent_id"] == "" && body["rollout"].get("clusters").is_none());
    assert!(!told[0].body.contains("sealed"));
    // and what is over is not changed
    let over = registry.change_rollout(id, RolloutRecord::resume).await.unwrap_err();
    assert_eq!((over.status, over.code), (409, "rollout_ended"));
}

#[tokio::test]
async fn what_is_not_written_is_not_sent() {
    let dir = tempfile::tempdir().unwrap();
    let (registry, _, principal) = world(&dir).await;
    let (begun, _) = registry.add_rollout(record(&principal, "k", &[1])).await.unwrap();
    registry.store.clone().close().await;
    let nobody = BTreeSet::new();
    let failed = registry.advance_rollout(&begun.id, &nobody, 2).await.unwrap_err();
    assert_eq!(failed.code, "database_unavailable");
    assert!(registry.inner().sending.is_empty());
    assert!(registry.rollout(&begun.id).unwrap().clusters[0].operation.is_empty());
    let failed = registry.change_rollout(&begun.id, |r| r.cancel("no")).await.unwrap_err();
    assert_eq!(failed.code, "database_unavailable");
    assert_eq!(registry.rollout(&begun.id).unwrap().state, RolloutState::Running);
    let failed = registry.add_rollout(record(&principal, "l", &[1])).await.unwrap_err();
    assert_eq!((failed.code, registry.inner().rollouts.len()), ("database_unavailable", 1));
}

#[tokio::test]
async fn refusals_revocations_and_what_an_agent_reports_late_are_seen() {
    let dir = tempfile::tempdir().unwrap();
    let (registry, _, principal) = world(&dir).await;
    let (begun, _) = registry.add_rollout(record(&principal, "k", &[1, 1, 1])).await.unwrap();
    let (id, mut away) = (begun.id.as_str(), BTreeSet::new());
    let states = |registry: &Registry| -> Vec<Option<OperationState>> {
        registry.rollout(id).unwrap().clusters.iter().map(|c| c.state).collect()
    };
    registry.advance_rollout(id, &away, 2).await.unwrap();
    registry.end_sending(id, "c-1", Sent::Refused("conflict".into(), "no".into()));
    put(&registry, id, 2, OperationState::Queued).await;
    away.insert("a-2".into());
    registry.advance_rollout(id, &away, 2).await.unwrap();
    use OperationState::{Failed, Interrupted, Queued, Succeeded};
    assert_eq!(states(&registry), [Some(Failed), Some(Queued), None]);
    registry.revoke_agent("c-3").await.unwrap();
    // it had reported the end of its operation before: that is what counts
    put(&registry, id, 2, Succeeded).await;
    registry.revoke_agent("c-2").await.unwrap();
    registry.advance_rollout(id, &away, 2).await.unwrap();
    assert_eq!(states(&registry), [Some(Failed), Some(Succeeded), Some(Interrupted)]);
    assert_eq!(registry.rollout(id).unwrap().state, RolloutState::Failed);
    // a token that is revoked ends what it began
    let (begun, _) = registry.add_rollout(record(&principal, "l", &[1, 2])).await.unwrap();
    registry.advance_rollout(&begun.id, &away, 2).await.unwrap();
    registry.revoke_access_token(&principal.id(), 2).await.unwrap();
    registry.advance_rollout(&begun.id, &away, 2).await.unwrap();
    assert_eq!(registry.rollout(&begun.id).unwrap().state, RolloutState::Cancelled);
}

#[tokio::test]
async fn so_many_go_on_at_once_and_old_ones_are_removed() {
    let dir = tempfile::tempdir().unwrap();
    let (registry, _, principal) = world(&dir).await;
    for n in 0..MAX_UNFINISHED.all {
        let caller_id = format!("r-{n}");
        let record = RolloutRecord { caller_id, ..record(&principal, &n.to_string(), &[1]) };
        registry.add_rollout(record).await.unwrap();
    }
    let full = registry.add_rollout(record(&principal, "more", &[1])).await.unwrap_err();
    assert_eq!((full.status, full.code), (429, "too_many_rollouts"));
    {
        let mut inner = registry.inner();
        for (n, record) in inner.rollouts.values_mut().enumerate() {
            let record = Arc::make_mut(record);
            match n {
                0 => record.state = RolloutState::Paused,
                1 => (record.state, record.finished_at) = (RolloutState::Failed, Some(1)),
                2 => (record.state, record.finished_at) = (RolloutState::Failed, Some(9)),
                _ => {}
            }
        }
    }
    registry.add_rollout(record(&principal, "more", &[1])).await.unwrap();
    registry.tidy_rollouts(1 + RETENTION).await.unwrap();
    let inner = registry.inner();
    assert_eq!(inner.rollouts.len(), MAX_UNFINISHED.all);
    let cancelled = inner.rollouts.values().find(|r| r.state == RolloutState::Cancelled).unwrap();
    assert_eq!(cancelled.message, "nobody has resumed it for 30 days");
}

/// One of a caller, with the token of a tenant.
fn of(principal: &Principal, caller: &str, tenant: &str, n: usize) -> Arc<RolloutRecord> {
    let mut record = record(principal, &n.to_string(), &[1]);
    (record.id, record.caller_id) = (format!("ro-{caller}-{tenant}-{n}"), caller.into());
    if let Some(limits) = &mut record.limits {
        limits.tenant = (!tenant.is_empty()).then(|| tenant.into());
    }
    Arc::new(record)
}

#[tokio::test]
async fn nobody_takes_the_places_of_all_others() {
    let dir = tempfile::tempdir().unwrap();
    let (registry, _, principal) = world(&dir).await;
    let mut inner = registry.inner();
    // how many it can begin
    let begun = |inner: &mut Inner, caller: &str, tenant: &str| {
        let mut fits = |n: &usize| {
            let record = of(&principal, caller, tenant, *n);
            let fits = inner.check_unfinished(&record).is_ok();
            if fits {
                inner.rollouts.insert(record.id.clone(), record);
            }
            fits
        };
        (0..40).take_while(|n| fits(n)).count()
    };
    for n in 1..=3 {
        assert_eq!(begun(&mut inner, &format!("r-{n}"), &format!("t-{n}")), 8);
    }
    // the fourth tenant has none, and what is of no tenant has a place
    assert_eq!((begun(&mut inner, "r-4", "t-4"), begun(&mut inner, "r-5", "")), (0, 8));
    inner.rollouts.clear();
    for (caller, places) in [("r-1", 16), ("r-2", 16), ("r-3", 0)] {
        assert_eq!(begun(&mut inner, caller, ""), places, "{caller}");
    }
    // of those that ended a tenant pushes its own out
    inner.rollouts.clear();
    let mut ended = |caller: &str, tenant: &str, n: usize, at: i64| {
        let mut record = of(&principal, caller, tenant, n);
        Arc::make_mut(&mut record).finished_at = Some(at);
        inner.rollouts.insert(record.id.clone(), record);
    };
    ended("r-1", "globex", 0, 1);
    ended("r-2", "", 0, 1);
    (0..1000).for_each(|n| ended("r-3", "acme", n, 9));
    let old = inner.old_rollouts(10);
    assert_eq!(old.len(), 1000 - MAX_ENDED.tenant / (WEIGHT + 1));
    assert!(old.iter().all(|id| id.starts_with("ro-r-3-acme-")), "{old:?}");
}

#[tokio::test]
async fn what_is_queued_is_held_while_its_rollout_is_paused_and_cancelled_with_it() {
    let dir = tempfile::tempdir().unwrap();
    let (registry, _, principal) = world(&dir).await;
    let mut row = agent();
    (row.id, row.cluster_id) = ("a-4".into(), "c-4".into());
    registry.inner().insert_agent(Entry::new(row));
    let (begun, _) = registry.add_rollout(record(&principal, "k", &[1, 1, 1, 2])).await.unwrap();
    let (id, away) = (begun.id.as_str(), BTreeSet::from(["a-1".to_owned(), "a-2".to_owned()]));
    registry.advance_rollout(id, &away, 2).await.unwrap();
    let clusters = registry.rollout(id).unwrap().clusters.clone();
    for cluster in &clusters[..2] {
        put(&registry, id, cluster.id[2..].parse().unwrap(), OperationState::Queued).await;
        let mut queued = registry.operation(&cluster.agent, &cluster.operation).unwrap();
        (queued.key, queued.caller_id) = (begun.key_of(&cluster.id), principal.id());
        registry.inner().insert_operation(queued);
    }
    let queued = |n: usize| {
        registry.operation(&clusters[n].agent, &clusters[n].operation).unwrap().operation.state
    };
    let waiting = || registry.oldest_queued();
    assert_eq!(waiting().len(), 2);
    registry.end_sending(id, "c-3", Sent::Refused("conflict".into(), "no".into()));
    registry.advance_rollout(id, &away, 2).await.unwrap();
    assert_eq!(registry.rollout(id).unwrap().state, RolloutState::Paused);
    let first = registry.operation("a-1", &clusters[0].operation).unwrap();
    assert!(waiting().is_empty() && !registry.begin_delivery(&first));
    registry.change_rollout(id, RolloutRecord::resume).await.unwrap();
    assert!(waiting().len() == 2 && registry.begin_delivery(&first));
    // all at once, but for one that is being handed over
    registry.change_rollout(id, |record| record.cancel("cancelled by r-1")).await.unwrap();
    let (record, steps) = registry.advance_rollout(id, &away, 2).await.unwrap();
    assert_eq!(steps.cancel, ["c-1", "c-2"]);
    let keys =
        || record.clusters[..2].iter().map(|c| (c.agent.clone(), c.operation.clone())).collect();
    registry.cancel_all_queued(keys(), "cancelled", 3).await.unwrap();
    assert_eq!((queued(0), queued(1)), (OperationState::Queued, OperationState::Cancelled));
    registry.end_delivery(&first);
    registry.store.clone().close().await;
    let failed = registry.cancel_all_queued(keys(), "cancelled", 3).await.unwrap_err();
    assert_eq!((failed.code, queued(0)), ("database_unavailable", OperationState::Queued));
}

#[tokio::test]
async fn a_change_that_fails_takes_no_later_one_back() {
    let dir = tempfile::tempdir().unwrap();
    let (registry, _, principal) = world(&dir).await;
    let (former, _) = registry.add_rollout(record(&principal, "k", &[1])).await.unwrap();
    let (failed, later) = (Arc::new(RolloutRecord::clone(&former)), Arc::new((*former).clone()));
    let mut inner = registry.inner();
    inner.rollouts.insert(former.id.clone(), later.clone());
    take_back(&mut inner, (former.clone(), failed));
    assert!(Arc::ptr_eq(&inner.rollouts[&former.id], &later));
    take_back(&mut inner, (former.clone(), later));
    assert!(Arc::ptr_eq(&inner.rollouts[&former.id], &former));
}

#[tokio::test]
async fn what_an_agent_may_have_received_is_remembered() {
    let dir = tempfile::tempdir().unwrap();
    let (registry, _, principal) = world(&dir).await;
    let (begun, _) = registry.add_rollout(record(&principal, "k", &[1, 1])).await.unwrap();
    let (id, nobody) = (begun.id.as_str(), BTreeSet::new());
    registry.advance_rollout(id, &nobody, 2).await.unwrap();
    let clusters = registry.rollout(id).unwrap().clusters.clone();
    let arrived = |registry: &Registry| {
        [&clusters[0], &clusters[1]].map(|cluster| registry.may_have_arrived(id, cluster))
    };
    assert_eq!(arrived(&registry), [false, false]);
    registry.end_sending(id, "c-1", Sent::Lost);
    registry.end_sending(id, "c-2", Sent::Maybe);
    assert_eq!(arrived(&registry), [true, false]);
    // sent again, it is still so; another process knows of none
    registry.advance_rollout(id, &nobody, 2).await.unwrap();
    assert_eq!(arrived(&registry), [true, false]);
    let other = Registry::load(registry.store.clone(), None, 2).await.unwrap();
    assert_eq!(arrived(&other), [true, true]);
    // what ends late leaves nothing behind
    put(&registry, id, 1, OperationState::Succeeded).await;
    put(&registry, id, 2, OperationState::Succeeded).await;
    registry.advance_rollout(id, &nobody, 2).await.unwrap();
    registry.end_sending(id, "c-1", Sent::Refused("conflict".into(), "no".into()));
    let inner = registry.inner();
    assert!(inner.sending.is_empty() && inner.unreceived.is_empty());
}

#[tokio::test]
async fn an_agent_that_may_be_back_in_a_moment_is_tried_again() {
    let dir = tempfile::tempdir().unwrap();
    let (registry, ..) = world(&dir).await;
    // heard at 100, and this process began at 0
    let again = |sent_at, now| registry.may_come_back("a-1", sent_at, now);
    assert!(again(101, 101) && again(101, 100 + PATIENCE) && registry.is_online("a-1", 101));
    assert!(!again(101, 101 + PATIENCE) && !registry.may_come_back("a-9", 101, 101));
    // one that is silent, or said that it stops, is away
    assert!(!again(1000, 1000) && !registry.is_online("a-1", 1000));
    registry.inner().agents.get_mut("a-1").unwrap().draining = true;
    assert!(!again(101, 101) && !registry.is_online("a-1", 101));
    // sent by the process before: the agents come back to this one first
    let later = Registry { started: 200, ..registry };
    let patient = |now, seconds| later.has_patience(1, now, seconds);
    assert!(patient(200 + PATIENCE - 1, 0) && !patient(200 + PATIENCE, 0));
    // of one that is busy
    assert!(patient(200 + 599, 600) && !patient(200 + 600, 600));
}
