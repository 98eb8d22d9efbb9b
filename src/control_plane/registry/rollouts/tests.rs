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
    for n in 0..MAX_UNFINISHED {
        registry.add_rollout(record(&principal, &n.to_string(), &[1])).await.unwrap();
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
    assert_eq!(inner.rollouts.len(), MAX_UNFINISHED);
    let cancelled = inner.rollouts.values().find(|r| r.state == RolloutState::Cancelled).unwrap();
    assert_eq!(cancelled.message, "nobody has resumed it for 30 days");
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
    assert!(later.has_patience(1, 200 + PATIENCE - 1) && !later.has_patience(1, 200 + PATIENCE));
}
