//! Many operations of several callers at once: none is lost, each ends, each has its effect, nobody
//! is kept waiting by the others, and the agent's memory stays within bounds.
//!
//! DIR holds what a Runner is given, as for the outcomes, with `token-1` to `token-4` in place of
//! `token`. It runs in the root of the repository, beside the VM `a1` with the agent.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::sync::mpsc;

use crate::caller::Runner;
use crate::deploys::has_ended;
use crate::gate::{cluster, in_vm};

const CALLERS: usize = 4;
/// Of each caller.
const OPERATIONS: usize = 50;
/// Open operations of each caller: with four of them more than the 8 that an agent carries out at
/// once, so that all are refused now and then, and ask again.
const AT_ONCE: usize = 3;
/// For one operation, refusals included.
const TIME: Duration = Duration::from_secs(180);
/// Anonymous memory of the agent, KiB: the budget with 1,000 held streams (32 MiB), which is far
/// more than 12 callers hold. What is mapped of the program's file is not counted: it depends on
/// its build.
const BUDGET_KIB: u64 = 32 << 10;

/// An operation that has ended, in the order of the ends.
struct End {
    caller: usize,
    operation: Value,
    /// From the first attempt until the end was told.
    took: Duration,
    refusals: usize,
}

/// A caller stays in a namespace of its own application: two share each namespace.
fn namespace(caller: usize) -> &'static str {
    if caller.is_multiple_of(2) { "production" } else { "beta" }
}

/// The `n`-th operation of a caller. Each can be told from what it leaves: a key of a ConfigMap,
/// one of a Secret, a revision, a number of pods that no other one asks for.
fn wanted(caller: usize, n: usize, image: &str) -> Value {
    let (namespace, name) = (namespace(caller), format!("crowd-{caller}"));
    let set = |key: String| {
        json!({"action": "set", "namespace": namespace, "name": name,
        "data": {key: "planted-canary-6644-in-plain-text"}})
    };
    match n % 4 {
        0 => json!({"kind": "configmap", "spec": set(format!("n{n}"))}),
        1 => json!({"kind": "secret", "spec": set(format!("n{n}"))}),
        2 => json!({"kind": "deploy", "spec": {"timeout_s": 120, "application": {
            "name": format!("crowd-{caller}-{n}"), "namespace": namespace, "image": image,
            "replicas": 0, "command": ["sleep", "3600"]}}}),
        _ => json!({"kind": "apply", "spec": {"objects": [{"apiVersion": "v1", "kind": "ConfigMap",
            "metadata": {"name": format!("applied-{caller}-{n}"), "namespace": namespace},
            "data": {"n": n.to_string()}}]}}),
    }
}

/// How many effects there are: operations are counted by what they have left.
fn effects(namespace: &str) -> usize {
    let list = cluster(&format!("-n {namespace} get configmaps,secrets,deployments"));
    let items = list["items"].as_array().map_or(&[][..], Vec::as_slice);
    let of = |kind: &str, begin: &str| {
        let named = items.iter().filter(|item| {
            let name = item["metadata"]["name"].as_str().unwrap_or_default();
            item["kind"] == kind && name.starts_with(begin) && !name.contains('.')
        });
        named.count()
    };
    // versions of config sets, and what was applied or deployed; `x.secrets.pipeops.io` and
    // `x.revision-1` belong to them
    of("ConfigMap", "crowd-")
        + of("Secret", "crowd-")
        + of("Deployment", "crowd-")
        + of("ConfigMap", "applied-")
}

/// Resident and anonymous memory of the agent, KiB.
fn memory() -> (u64, u64) {
    let line = "cat /proc/$(systemctl show -p MainPID --value pipeops-agent)/status";
    let text = in_vm("a1", line, "").unwrap_or_else(|why| panic!("{why}"));
    let field = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
        line.split_whitespace().next().and_then(|n| n.parse().ok()).unwrap_or(0)
    };
    (field("VmRSS:"), field("RssAnon:"))
}

/// Carries out operations of a caller one after the other, until none is left.
async fn carry_out(
    runner: Arc<Runner>,
    caller: usize,
    next: Arc<AtomicUsize>,
    image: String,
    run: i64,
    ends: mpsc::Sender<Result<End, String>>,
) {
    loop {
        let n = next.fetch_add(1, Ordering::Relaxed);
        if n >= OPERATIONS {
            return;
        }
        let key = format!("crowd-{run}-{caller}-{n}");
        let end = one(&runner, caller, &key, &wanted(caller, n, &image)).await;
        ends.send(end.map_err(|why| format!("{key}: {why}"))).await.unwrap();
    }
}

async fn one(runner: &Runner, caller: usize, key: &str, body: &Value) -> Result<End, String> {
    let (begun, mut refusals) = (Instant::now(), 0);
    let id = loop {
        let (status, taken) = runner.ask("POST", "/api/v1/operations", key, body).await;
        match (status, taken["id"].as_str()) {
            (202, Some(id)) => break id.to_owned(),
            (429, _) if begun.elapsed() < TIME => refusals += 1,
            _ => return Err(format!("{status} {taken}")),
        }
        // what `Retry-After` says
        tokio::time::sleep(Duration::from_secs(1)).await;
    };
    loop {
        let path = format!("/api/v1/operations/{id}");
        let (status, operation) = runner.ask("GET", &path, "", &Value::Null).await;
        if status == 200 && has_ended(&operation) {
            return Ok(End { caller, operation, took: begun.elapsed(), refusals });
        }
        if begun.elapsed() > TIME {
            return Err(format!("it does not end: {status} {operation}"));
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// Prints a line for each claim, and what was measured. The result is the exit code.
pub(crate) async fn crowd(dir: &str, image: &str) -> i32 {
    let run = jiff::Timestamp::now().as_second();
    let (ends, mut ended) = mpsc::channel(CALLERS * OPERATIONS);
    let before = memory();
    let begun = Instant::now();
    for caller in 0..CALLERS {
        let runner = Arc::new(Runner::with_token(dir, &format!("token-{}", caller + 1)));
        let next = Arc::new(AtomicUsize::new(0));
        for _ in 0..AT_ONCE {
            let (runner, next, ends) = (runner.clone(), next.clone(), ends.clone());
            tokio::spawn(carry_out(runner, caller, next, image.to_owned(), run, ends));
        }
    }
    drop(ends);
    let (mut all, mut lost, mut most) = (Vec::new(), Vec::new(), before);
    while let Some(end) = ended.recv().await {
        match end {
            Ok(end) => all.push((end, begun.elapsed())),
            Err(why) => lost.push(why),
        }
        if (all.len() + lost.len()).is_multiple_of(20) {
            let now = memory();
            most = (most.0.max(now.0), most.1.max(now.1));
        }
    }
    let took = begun.elapsed();
    report(&all, &lost, (before, most), took)
}

fn report(
    all: &[(End, Duration)],
    lost: &[String],
    (before, most): ((u64, u64), (u64, u64)),
    took: Duration,
) -> i32 {
    let mut code = 0;
    let mut say = |holds: bool, text: &str, evidence: &str| {
        if holds {
            println!("ok {text}");
        } else {
            code = 1;
            println!("WRONG {text}: {evidence}");
        }
    };
    let total = CALLERS * OPERATIONS;
    let ids: HashSet<String> = all.iter().map(|(end, _)| end.operation["id"].to_string()).collect();
    let text = format!("{total} operations of {CALLERS} callers: none is lost, each has ended");
    say(lost.is_empty() && ids.len() == total, &text, &format!("{} ended, {lost:?}", ids.len()));
    let failed: Vec<&Value> =
        all.iter().map(|(end, _)| &end.operation).filter(|o| o["state"] != "succeeded").collect();
    say(failed.is_empty(), "all have succeeded", &format!("{failed:?}"));
    let there = effects("production") + effects("beta");
    say(there == total, "the cluster has one effect of each", &format!("{there} of {total}"));
    // the order of the ends, not their times: nobody is kept out for a quarter of the whole
    let kept_out: Vec<String> = all
        .chunks(total.div_ceil(4))
        .enumerate()
        .flat_map(|(quarter, ends)| {
            let none = move |caller: &usize| !ends.iter().any(|(end, _)| end.caller == *caller);
            let named =
                move |caller: usize| format!("caller {} in quarter {}", caller + 1, quarter + 1);
            (0..CALLERS).filter(none).map(named)
        })
        .collect();
    say(kept_out.is_empty(), "each caller has ends in each quarter", &kept_out.join(", "));
    let bounded = most.1 > 0 && most.1 <= BUDGET_KIB;
    let memory = format!(
        "RSS {} KiB before, {} at most; anonymous {} before, {} at most",
        before.0, most.0, before.1, most.1
    );
    say(bounded, &format!("the agent's memory is bounded: {memory}"), "more than 32 MiB");
    let last = |caller: usize| {
        let own = all.iter().filter(move |(end, _)| end.caller == caller);
        own.map(|(_, at)| at.as_secs_f32()).fold(0.0, f32::max)
    };
    let lasts: Vec<f32> = (0..CALLERS).map(last).collect();
    let (first, latest) =
        lasts.iter().fold((f32::MAX, 0.0_f32), |(f, l), t| (f.min(*t), l.max(*t)));
    println!(
        "info the caller that was ready last took {:.2} times as long as the first",
        latest / first
    );
    for (caller, last) in lasts.iter().enumerate() {
        let own: Vec<&(End, Duration)> =
            all.iter().filter(|(end, _)| end.caller == caller).collect();
        let mut times: Vec<u128> = own.iter().map(|(end, _)| end.took.as_millis()).collect();
        times.sort_unstable();
        let at = |part: usize| times.get(times.len().saturating_sub(1) * part / 100).unwrap_or(&0);
        println!(
            "info caller {}: {} ended, the last after {:.1} s of {:.1}; median {} ms, p99 {} ms; \
             {} refusals",
            caller + 1,
            own.len(),
            last,
            took.as_secs_f32(),
            at(50),
            at(99),
            own.iter().map(|(end, _)| end.refusals).sum::<usize>()
        );
    }
    code
}
