//! What is kept of operations, of whom, and for how long.

use super::super::access::tests::{named, registry};
use super::super::entry::Entry;
use super::super::entry::tests::agent;
use super::*;
use crate::base::secret::Secret;
use crate::contract::token::Role;
use crate::control_plane::model::AccessToken;
use crate::control_plane::store::Store;

#[tokio::test]
async fn an_operation_goes_with_its_user_also_when_the_name_is_given_again() {
    let dir = tempfile::tempdir().unwrap();
    let (registry, keys) = registry(&dir).await;
    registry.add_project("default", 1).await.unwrap();
    registry.inner().insert_agent(Entry::new(agent()));
    let user = |role| AccessToken { person: true, role, ..named("eve") };
    let add = async |role| registry.add_access_token(&keys, user(role)).await.unwrap().0;
    let record = |id: &str, state, caller_id: &str| OperationRecord {
        agent: "a-1".into(),
        operation: Operation {
            id: id.into(),
            state,
            subject: "user:eve".into(),
            ..Operation::default()
        },
        caller_id: caller_id.into(),
        limits: None,
        tenant: None,
        key: "k".into(),
        request: String::new(),
        sealed: None,
        asked_ms: 0,
        expires_at: 10,
        changed_at: 1,
    };
    let ids = |records: Vec<OperationRecord>| -> Vec<String> {
        records.into_iter().map(|record| record.operation.id).collect()
    };
    let former = add(Role::Deployer).await;
    let (running, queued) = (OperationState::Running, OperationState::Queued);
    for record in [
        record("o-runs", running, &former.id),
        record("o-waits", queued, &former.id),
        record("o-old", running, ""),
    ] {
        registry.put_operation(record, 1).await.unwrap();
    }
    assert!(registry.running_for_revoked().is_empty());
    registry.revoke_access_token("user:eve", 2).await.unwrap();
    assert_eq!(ids(registry.running_for_revoked()), ["o-old", "o-runs"]);
    let later = add(Role::Operator).await;
    // one of a version before this field is known by the name alone
    assert_eq!(ids(registry.running_for_revoked()), ["o-runs"]);
    let caller = |id: &str| {
        let record = registry.operation("a-1", id).unwrap();
        let access = registry.access_token(record.caller()).unwrap();
        (access.id, registry.resolve_subject(record.caller(), 3).is_some())
    };
    // what waits does not go out with the rights of the later one
    assert_eq!(caller("o-waits"), (former.id.clone(), false));
    assert_eq!(caller("o-runs"), (former.id, false));
    assert_eq!(caller("o-old"), (later.id, true));
    // as a version before wrote it, and reads it
    let text = serde_json::to_string(&record("o-old", running, "")).unwrap();
    assert!(!text.contains("caller_id"), "{text}");
    assert!(serde_json::from_str::<OperationRecord>(&text).unwrap().caller_id.is_empty());
}

#[tokio::test]
async fn a_log_is_kept_in_the_database_alone() {
    let dir = tempfile::tempdir().unwrap();
    let url = Secret::new(format!("sqlite:{}?mode=rwc", dir.path().join("t.db").display()));
    let store = Store::open(&url, "i").await.unwrap();
    let registry = Registry::load(store.clone(), None, 0).await.unwrap();
    registry.inner().insert_agent(Entry::new(agent()));
    let id = format!("o-{}", "0".repeat(32));
    let report = Operation {
        id: id.clone(),
        state: OperationState::Failed,
        log: vec!["no such table".into()],
        ..Operation::default()
    };
    registry.finish_operation("a-1", &id, report, 1).await.unwrap();
    for registry in [&registry, &Registry::load(store.clone(), None, 0).await.unwrap()] {
        let record = registry.operation("a-1", &id).unwrap();
        assert!(record.operation.log.is_empty());
        let record = registry.with_log(record).await.unwrap();
        assert_eq!(record.operation.log, ["no such table"]);
    }
    // of a job also where it succeeded
    let id = format!("o-{}", "1".repeat(32));
    let job = Operation {
        id: id.clone(),
        kind: "job".into(),
        state: OperationState::Succeeded,
        log: vec!["migrated".into()],
        ..Operation::default()
    };
    registry.finish_operation("a-1", &id, job, 1).await.unwrap();
    let record = registry.operation("a-1", &id).unwrap();
    assert_eq!(registry.with_log(record).await.unwrap().operation.log, ["migrated"]);
    let record = registry.operation("a-1", &id).unwrap();
    store.close().await;
    assert_eq!(registry.with_log(record).await.unwrap_err().code, "database_unavailable");
}

/// One of an agent that knows of nothing else.
fn record(id: String, tenant: Option<&str>, state: OperationState) -> OperationRecord {
    OperationRecord {
        agent: "a-1".into(),
        operation: Operation { id, state, ..Operation::default() },
        caller_id: "r-1".into(),
        limits: None,
        tenant: tenant.map(str::to_owned),
        key: "k".into(),
        request: String::new(),
        sealed: None,
        asked_ms: 0,
        expires_at: 10,
        changed_at: 1,
    }
}

#[test]
fn tenants_leave_places_in_the_queue_and_half_of_its_bytes() {
    let mut inner = Inner::default();
    let mut ask = |tenant: Option<&str>, bytes: usize| {
        let id = format!("o-{}", inner.operations.len());
        let waits = OperationRecord {
            sealed: Some("x".repeat(bytes)),
            ..record(id, tenant, OperationState::Queued)
        };
        let answer = inner.check_queue(&waits).map_err(|error| error.code);
        if answer.is_ok() {
            inner.insert_operation(waits);
        }
        answer
    };
    for tenant in ["acme", "globex", "initech"] {
        for _ in 0..4 {
            assert_eq!(ask(Some(tenant), 1), Ok(()), "{tenant}");
        }
        assert_eq!(ask(Some(tenant), 1), Err("queue_full"), "{tenant}");
    }
    assert_eq!(ask(Some("umbrella"), 1), Err("queue_full"));
    for _ in 0..4 {
        assert_eq!(ask(None, 1), Ok(()));
    }
    assert_eq!(ask(None, 1), Err("queue_full"));

    let mut inner = Inner::default();
    let mut ask = |agent: &str, tenant: Option<&str>, bytes: usize| {
        let waits = OperationRecord {
            agent: agent.into(),
            sealed: Some("x".repeat(bytes)),
            ..record("o-1".into(), tenant, OperationState::Queued)
        };
        let answer = inner.check_queue(&waits).map_err(|error| error.code);
        if answer.is_ok() {
            inner.insert_operation(waits);
        }
        answer
    };
    // whichever agents they wait for
    assert_eq!(ask("a-1", Some("acme"), MAX_QUEUED_BYTES / 2), Ok(()));
    assert_eq!(ask("a-2", Some("globex"), 1), Err("queue_full"));
    assert_eq!(ask("a-3", None, MAX_QUEUED_BYTES / 2), Ok(()));
    assert_eq!(ask("a-4", None, 1), Err("queue_full"));
}

#[test]
fn what_a_tenant_ends_takes_the_place_of_its_own() {
    let mut inner = Inner::default();
    let mut end = |tenant: Option<&str>, count: usize, changed_at: i64| {
        for n in 0..count {
            let id = format!("o-{}-{changed_at}-{n:03}", tenant.unwrap_or("all"));
            let ended = record(id, tenant, OperationState::Succeeded);
            inner.insert_operation(OperationRecord { changed_at, ..ended });
        }
    };
    end(None, 64, 1);
    end(Some("globex"), 10, 2);
    end(Some("acme"), 300, 3);
    end(Some("acme"), 1, 4);
    let gone = inner.old_operations(5);
    assert_eq!(gone.len(), 301 - 64);
    assert!(gone.iter().all(|(_, id)| id.starts_with("o-acme-3-")), "{gone:?}");
    // nor do many of them take all places, though they are later
    for tenant in ["one", "two", "three", "four"] {
        for n in 0..64 {
            let ended = record(format!("o-{tenant}-{n}"), Some(tenant), OperationState::Failed);
            inner.insert_operation(OperationRecord { changed_at: 6, ..ended });
        }
    }
    let gone = inner.old_operations(7);
    assert!(!gone.iter().any(|(_, id)| id.starts_with("o-all-")), "{gone:?}");
    let stays = inner.operations.len() - gone.len();
    assert_eq!(stays, MAX_ENDED);
    assert_eq!(inner.old_operations(6 + RETENTION).len(), inner.operations.len());
}

#[tokio::test]
async fn what_was_asked_for_at_the_agent_is_of_the_tenant_that_it_names() {
    let dir = tempfile::tempdir().unwrap();
    let url = Secret::new(format!("sqlite:{}?mode=rwc", dir.path().join("t.db").display()));
    let store = Store::open(&url, "i").await.unwrap();
    let registry = Registry::load(store.clone(), None, 0).await.unwrap();
    registry.inner().insert_agent(Entry::new(agent()));
    let id = format!("o-{}", "0".repeat(32));
    let report = |tenant: Option<&str>| Operation {
        id: id.clone(),
        state: OperationState::Succeeded,
        tenant: tenant.map(str::to_owned),
        ..Operation::default()
    };
    registry.finish_operation("a-1", &id, report(Some("acme")), 1).await.unwrap();
    for registry in [&registry, &Registry::load(store, None, 0).await.unwrap()] {
        assert_eq!(registry.operation("a-1", &id).unwrap().tenant.as_deref(), Some("acme"));
    }
    // of one that is known the agent does not say whose it is
    let id = format!("o-{}", "1".repeat(32));
    let runs = record(id.clone(), Some("globex"), OperationState::Running);
    registry.put_operation(runs, 1).await.unwrap();
    let report = Operation { id: id.clone(), ..report(Some("acme")) };
    registry.finish_operation("a-1", &id, report, 1).await.unwrap();
    assert_eq!(registry.operation("a-1", &id).unwrap().tenant.as_deref(), Some("globex"));
}
