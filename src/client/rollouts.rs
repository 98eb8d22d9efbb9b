//! A rollout: begun once, followed to its end, and what that end means for a command.

use std::collections::BTreeSet;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

use super::api::Api;
use super::operations::{self, ask};
use crate::base::error::{Exit, Failure};
use crate::base::text::printable;
use crate::contract::types::Operation;

/// Between two looks; for each so many clusters as long again.
const LOOK: Duration = Duration::from_secs(1);
const CLUSTERS_A_LOOK: u64 = 200;
/// How long the control plane may be away while it is followed.
const PATIENCE: Duration = Duration::from_secs(300);

fn path(id: &str) -> String {
    format!("/api/v1/rollouts/{id}")
}

/// Begins a rollout.
///
/// # Errors
/// What is refused.
pub async fn begin(api: &Api, body: &Value, key: &str) -> Result<Value, Failure> {
    let answer = ask(api, "/api/v1/rollouts", body, key).await?;
    serde_json::from_str(&answer).map_err(|_| {
        Failure::new(Exit::Network, "ANSWER_UNREADABLE", "this is no rollout that was answered")
            .hint("is this the address of a control plane?")
    })
}

/// # Errors
/// As [`Api::get`].
pub async fn show(api: &Api, id: &str) -> Result<Value, Failure> {
    api.get(&path(id)).await
}

/// # Errors
/// As [`Api::get`].
pub async fn resume(api: &Api, id: &str) -> Result<Value, Failure> {
    api.call(reqwest::Method::POST, &format!("{}/resume", path(id))).await
}

/// # Errors
/// As [`Api::get`].
pub async fn cancel(api: &Api, id: &str) -> Result<Value, Failure> {
    api.call(reqwest::Method::DELETE, &path(id)).await
}

/// Follows a rollout until it ends or is paused with nothing that runs, and tells each cluster that
/// ends. A control plane that is away for a while is waited for.
///
/// # Errors
/// As [`Api::get`].
pub async fn follow(api: &Api, id: &str, mut told: impl FnMut(&Value)) -> Result<Value, Failure> {
    let (mut ended, mut heard) = (BTreeSet::new(), Instant::now());
    loop {
        let mut pause = LOOK;
        match show(api, id).await {
            Ok(rollout) => {
                heard = Instant::now();
                let clusters = rollout["clusters"].as_array().into_iter().flatten();
                for cluster in clusters.filter(|cluster| has_ended(cluster)) {
                    if ended.insert(cluster["id"].to_string()) {
                        told(cluster);
                    }
                }
                if is_over(&rollout) {
                    return Ok(rollout);
                }
                let total = rollout["counts"]["total"].as_u64().unwrap_or(0);
                pause += LOOK * u32::try_from(total / CLUSTERS_A_LOOK).unwrap_or(0);
            }
            Err(failure) if failure.exit == Exit::Network && heard.elapsed() < PATIENCE => {}
            Err(failure) => return Err(failure),
        }
        sleep(pause).await;
    }
}

fn has_ended(cluster: &Value) -> bool {
    !matches!(cluster["state"].as_str(), Some("waiting" | "queued" | "running") | None)
}

/// Nothing more comes of it by itself.
fn is_over(rollout: &Value) -> bool {
    match rollout["state"].as_str() {
        Some("running") => false,
        Some("paused") => rollout["counts"]["running"] == 0,
        _ => rollout["finished_at"] != "",
    }
}

/// How it stands, in one line: `paused: 3 of 5 clusters succeeded, 1 failed, 1 waiting`.
pub fn summary(rollout: &Value) -> String {
    let empty = serde_json::Map::new();
    let counts = rollout["counts"].as_object().unwrap_or(&empty);
    let count = |name: &str| counts.get(name).and_then(Value::as_u64).unwrap_or(0);
    let state = rollout["state"].as_str().unwrap_or_default();
    let (succeeded, total) = (count("succeeded"), count("total"));
    let clusters = if total == 1 { "cluster" } else { "clusters" };
    let mut line = format!("{state}: {succeeded} of {total} {clusters} succeeded");
    for name in counts.keys().filter(|name| !matches!(&***name, "total" | "succeeded")) {
        if count(name) > 0 {
            line += &format!(", {} {name}", count(name));
        }
    }
    line
}

/// Why a command ends with another code than 0; none where all succeeded. The code is that of the
/// first operation that did not.
pub fn failure(rollout: &Value) -> Option<Failure> {
    let (id, state) = (rollout["id"].as_str()?, rollout["state"].as_str()?);
    if state == "succeeded" {
        return None;
    }
    let clusters = rollout["clusters"].as_array().into_iter().flatten();
    let bad = clusters.filter(|c| has_ended(c) && c["state"] != "succeeded");
    // one that was cancelled with the rollout says nothing of why
    let bad = bad.min_by_key(|c| c["state"] == "cancelled").cloned().unwrap_or_default();
    let field = |name: &str| bad[name].as_str().unwrap_or_default();
    let operation = json!({
        "state": bad["state"].as_str().unwrap_or("cancelled"), "reason": field("reason"),
    });
    let operation: Operation = serde_json::from_value(operation).unwrap_or_default();
    let mut failure = operations::failure(&operation)
        .unwrap_or_else(|| Failure::new(Exit::Problems, "OPERATION_FAILED", ""));
    let message = rollout["message"].as_str().unwrap_or_default();
    // an agent's words are in it: they are one line
    failure.what = format!("the rollout is {state}: {}", printable(message));
    let next = match state {
        "paused" => format!(
            "`pipeops rollout resume {id}` goes on with those that wait, `pipeops rollout cancel \
             {id}` ends it"
        ),
        _ => format!("`pipeops rollout status {id}` shows each cluster"),
    };
    failure.hint = Some(match failure.hint.take() {
        Some(hint) => format!("{next}; {hint}"),
        None => next,
    });
    Some(failure)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rollout(state: &str, clusters: &[(&str, &str)]) -> Value {
        let mut counts = json!({"total": clusters.len(), "waiting": 0, "queued": 0, "running": 0,
            "succeeded": 0, "failed": 0});
        for (state, _) in clusters {
            counts[*state] = (counts[*state].as_u64().unwrap_or(0) + 1).into();
        }
        let clusters: Vec<Value> = clusters
            .iter()
            .map(|(state, reason)| json!({"id": "c", "state": state, "reason": reason}))
            .collect();
        json!({"id": "ro-1", "state": state, "message": "eu-1: crash_loop", "finished_at": "",
            "counts": counts, "clusters": clusters})
    }

    #[test]
    fn the_first_operation_that_failed_is_the_end_of_the_command() {
        let all_well = rollout("succeeded", &[("succeeded", ""), ("succeeded", "")]);
        assert!(failure(&all_well).is_none());
        assert_eq!(summary(&all_well), "succeeded: 2 of 2 clusters succeeded");
        for (state, clusters, exit, code) in [
            ("failed", &[("succeeded", ""), ("failed", "crash_loop")][..], 13, "crash_loop"),
            ("failed", &[("expired", "")], 8, "OPERATION_FAILED"),
            ("failed", &[("failed", "forbidden"), ("failed", "conflict")], 7, "forbidden"),
            ("cancelled", &[("cancelled", ""), ("interrupted", "")], 10, "OPERATION_FAILED"),
            ("cancelled", &[("cancelled", "")], 13, "OPERATION_FAILED"),
            ("paused", &[("failed", "agent_offline"), ("waiting", "")], 13, "agent_offline"),
        ] {
            let failure = failure(&rollout(state, clusters)).unwrap();
            assert_eq!((failure.exit.number(), &*failure.code), (exit, code), "{clusters:?}");
            assert!(failure.what.contains(state), "{}", failure.what);
        }
        let paused = rollout("paused", &[("failed", "crash_loop"), ("waiting", "")]);
        let hint = failure(&paused).unwrap().hint.unwrap();
        assert!(hint.starts_with("`pipeops rollout resume ro-1`"), "{hint}");
        assert_eq!(summary(&paused), "paused: 0 of 2 clusters succeeded, 1 waiting, 1 failed");
    }

    #[test]
    fn it_is_over_when_nothing_more_comes_of_it_by_itself() {
        assert!(!is_over(&rollout("running", &[("succeeded", "")])));
        assert!(!is_over(&rollout("paused", &[("failed", ""), ("running", "")])));
        assert!(is_over(&rollout("paused", &[("failed", ""), ("queued", ""), ("waiting", "")])));
        // what ran when it was cancelled ends by itself
        let mut cancelled = rollout("cancelled", &[("running", "")]);
        assert!(!is_over(&cancelled));
        cancelled["finished_at"] = "2026-11-28T00:00:00Z".into();
        assert!(is_over(&cancelled));
    }
}
