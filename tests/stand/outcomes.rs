//! Planted outcomes: what a cluster makes of workloads that can't run, and what the operation that
//! made them says of it.
//!
//! DIR holds what a Runner is given: `control-plane` (URL), `ca.pem`, `token` (of a deployer),
//! `cluster` (its id). In the cluster stand, made by an administrator: in `beta` a quota of no pods
//! for `quota=none` and a LimitRange of 64 MiB a container, and a webhook that nobody answers for
//! pods with `webhook=down`. On the node `stand registry` listens.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::response::IntoResponse as _;
use serde_json::{Value, json};
use tokio::sync::Semaphore;

use crate::caller::{Runner, count, row};

/// Time in which a cause must be told: what Kubernetes itself needs to know it is part of it.
const TOLD_WITHIN: Duration = Duration::from_secs(60);
/// No more than an agent carries out at once.
const AT_ONCE: usize = 7;
/// Where `stand registry` listens.
pub(crate) const REGISTRY: &str = "127.0.0.1:5999";

/// How an operation must end.
#[derive(Clone, Copy, PartialEq)]
enum End {
    /// By itself, long before its time.
    AtOnce,
    /// It is waited for: cancelled once the cause is told.
    Cancelled,
    /// At its own deadline of this many seconds.
    TimedOut(u64),
    /// It gets what is missing, and succeeds.
    Heals,
}

struct Case {
    name: &'static str,
    reason: &'static str,
    end: End,
    object: Value,
}

/// A pod template of one container that would run, changed by `change`.
fn template(name: &str, image: &str, change: impl FnOnce(&mut Value)) -> Value {
    let mut template = json!({
        "metadata": {"labels": {"app": name}},
        "spec": {"terminationGracePeriodSeconds": 1, "containers": [{
            "name": "web", "image": image, "imagePullPolicy": "IfNotPresent", "command": ["sleep", "3600"],
            "resources": {"limits": {"memory": "32Mi"}, "requests": {"memory": "8Mi"}}
        }]}
    });
    change(&mut template);
    template
}

fn workload(kind: &str, namespace: &str, name: &str, template: &Value) -> Value {
    let (version, mut spec) = match kind {
        "Job" => ("batch/v1", json!({"backoffLimit": 0})),
        _ => ("apps/v1", json!({"selector": {"matchLabels": {"app": name}}})),
    };
    spec["template"] = template.clone();
    if kind == "Job" {
        spec["template"]["spec"]["restartPolicy"] = "Never".into();
    }
    match kind {
        "StatefulSet" => spec["serviceName"] = name.into(),
        // a container that ends at once may have been ready for a moment
        "Deployment" => spec["minReadySeconds"] = 5.into(),
        _ => {}
    }
    json!({"apiVersion": version, "kind": kind, "spec": spec,
        "metadata": {"name": name, "namespace": namespace, "labels": {"outcome": "planted"}}})
}

fn set(pointer: &'static str, value: Value) -> impl FnOnce(&mut Value) {
    move |template| {
        let (parent, key) = pointer.rsplit_once('/').unwrap();
        template.pointer_mut(parent).unwrap()[key] = value;
    }
}

/// Deployments that differ from one that runs in a single field.
fn deployments(image: &str) -> Vec<Case> {
    let shell = |script: &str| json!(["sh", "-c", script]);
    let probe = |kind: &str, probe: Value| {
        let (kind, mut probe) = (kind.to_owned(), probe);
        probe["periodSeconds"] = 1.into();
        probe["failureThreshold"] = 1.into();
        move |t: &mut Value| t["spec"]["containers"][0][kind] = probe
    };
    type Change = Box<dyn FnOnce(&mut Value)>;
    let image_of =
        |name: &str| -> Change { Box::new(set("/spec/containers/0/image", json!(name))) };
    let command =
        |command: Value| -> Change { Box::new(set("/spec/containers/0/command", command)) };
    let claim = |name: &str| -> Change {
        Box::new(set(
            "/spec/volumes",
            json!([{"name": "v", "persistentVolumeClaim": {"claimName": name}}]),
        ))
    };
    let rows: Vec<(&str, &str, End, Change)> = vec![
        (
            "image-absent",
            "image_not_found",
            End::Cancelled,
            image_of(&format!("{REGISTRY}/none:1")),
        ),
        (
            "image-private",
            "image_unauthorized",
            End::Cancelled,
            image_of(&format!("{REGISTRY}/private:1")),
        ),
        (
            "registry-unknown",
            "image_pull_failed",
            End::Cancelled,
            image_of("registry.invalid/none:1"),
        ),
        ("image-name", "image_name_invalid", End::AtOnce, image_of("r.test/UPPER:1")),
        (
            "as-root",
            "runs_as_root",
            End::AtOnce,
            Box::new(set("/spec/securityContext", json!({"runAsNonRoot": true}))),
        ),
        (
            "no-secret",
            "config_missing",
            End::Cancelled,
            Box::new(set("/spec/containers/0/envFrom", json!([{"secretRef": {"name": "none"}}]))),
        ),
        (
            "no-config",
            "config_missing",
            End::Cancelled,
            // a volume that no container mounts is not made
            Box::new(|t| {
                let spec = &mut t["spec"];
                spec["volumes"] = json!([{"name": "v", "configMap": {"name": "none"}}]);
                spec["containers"][0]["volumeMounts"] = json!([{"name": "v", "mountPath": "/v"}]);
            }),
        ),
        (
            "no-account",
            "config_missing",
            End::Cancelled,
            Box::new(set("/spec/serviceAccountName", json!("none"))),
        ),
        ("no-command", "command_not_found", End::Cancelled, command(json!(["no-such-program"]))),
        (
            "crash",
            "crash_loop",
            End::TimedOut(25),
            command(shell("for i in $(seq 30); do echo line $i; done; exit 7")),
        ),
        (
            "memory",
            "out_of_memory",
            End::Cancelled,
            command(shell("x=$(head -c 200m /dev/zero | tr '\\0' x); echo ${#x}")),
        ),
        (
            "not-ready",
            "probe_failed",
            End::Cancelled,
            Box::new(probe("readinessProbe", json!({"httpGet": {"port": 1}}))),
        ),
        (
            "not-alive",
            "probe_failed",
            End::Cancelled,
            Box::new(probe("livenessProbe", json!({"exec": {"command": ["sh", "-c", "exit 1"]}}))),
        ),
        (
            "not-begun",
            "probe_failed",
            End::Cancelled,
            Box::new(probe("startupProbe", json!({"tcpSocket": {"port": 1}}))),
        ),
        (
            "no-node",
            "unschedulable",
            End::Cancelled,
            Box::new(set("/spec/nodeSelector", json!({"disk": "none"}))),
        ),
        (
            "too-large",
            "unschedulable",
            End::Cancelled,
            Box::new(set(
                "/spec/containers/0/resources",
                json!({"limits": {"cpu": "500", "memory": "32Mi"}}),
            )),
        ),
        ("no-claim", "volume_pending", End::Cancelled, claim("none")),
        ("on-host", "pod_security", End::AtOnce, Box::new(set("/spec/hostNetwork", json!(true)))),
        (
            "webhook",
            "webhook_failed",
            End::Cancelled,
            Box::new(set("/metadata/labels", json!({"app": "webhook", "webhook": "down"}))),
        ),
        (
            "slow",
            "timed_out",
            End::TimedOut(6),
            Box::new(probe(
                "readinessProbe",
                json!({"exec": {"command": ["true"]}, "initialDelaySeconds": 600}),
            )),
        ),
        (
            "heals",
            "config_missing",
            End::Heals,
            Box::new(set(
                "/spec/containers/0/envFrom",
                json!([{"configMapRef": {"name": "heals"}}]),
            )),
        ),
    ];
    let cases = rows.into_iter().map(|(name, reason, end, change)| {
        let mut object = workload("Deployment", "production", name, &template(name, image, change));
        if name == "not-alive" {
            // longer than it lives
            object["spec"]["minReadySeconds"] = 60.into();
        }
        Case { name, reason, end, object }
    });
    cases.collect()
}

fn cases(image: &str) -> Vec<Case> {
    let mut cases = deployments(image);
    let hosts = |name: &str| template(name, image, set("/spec/hostNetwork", json!(true)));
    let fails = template(
        "job",
        image,
        set("/spec/containers/0/command", json!(["sh", "-c", "echo last; exit 3"])),
    );
    let case = |name, reason, end, object| Case { name, reason, end, object };
    let quota = template("quota", image, |_| {});
    let memory = template(
        "limit",
        image,
        set("/spec/containers/0/resources", json!({"limits": {"memory": "128Mi"}})),
    );
    let mut stuck = workload(
        "Deployment",
        "production",
        "stuck",
        &template("stuck", image, set("/spec/nodeSelector", json!({"disk": "none"}))),
    );
    stuck["spec"]["progressDeadlineSeconds"] = 8.into();
    cases.extend([
        case(
            "stateful",
            "pod_security",
            End::AtOnce,
            workload("StatefulSet", "production", "stateful", &hosts("stateful")),
        ),
        case(
            "daemon",
            "pod_security",
            End::AtOnce,
            workload("DaemonSet", "production", "daemon", &hosts("daemon")),
        ),
        case("job", "exited_with_error", End::AtOnce, workload("Job", "production", "job", &fails)),
        case(
            "quota",
            "quota_exceeded",
            End::Cancelled,
            workload("Deployment", "beta", "quota", &quota),
        ),
        case(
            "limit",
            "limit_exceeded",
            End::AtOnce,
            workload("Deployment", "beta", "limit", &memory),
        ),
        // its own deadline is over before ours
        case("stuck", "unschedulable", End::AtOnce, stuck),
    ]);
    cases
}

impl Runner {
    async fn check(&self, case: &Case) -> Result<String, String> {
        let timeout_s = if let End::TimedOut(s) = case.end { s } else { 300 };
        let body =
            json!({"kind": "apply", "spec": {"objects": [case.object], "timeout_s": timeout_s}});
        let begun = Instant::now();
        let id = self.operate(case.name, &body).await?;
        let over = |o: &Value| !matches!(o["state"].as_str(), Some("running" | "queued"));
        let told = self.until(&id, TOLD_WITHIN, |o| o["reason"] == case.reason || over(o)).await;
        let after = begun.elapsed();
        if told["reason"] != case.reason {
            return Err(format!("wanted {}, was told {told}", case.reason));
        }
        match case.end {
            End::Cancelled if over(&told) => return Err(format!("ended: {told}")),
            End::Cancelled => {
                self.call("DELETE", &format!("/api/v1/operations/{id}"), "", &Value::Null).await;
            }
            End::Heals => {
                let config = json!({"apiVersion": "v1", "kind": "ConfigMap", "data": {"here": "yes"},
                    "metadata": {"name": case.name, "namespace": "production"}});
                self.operate(
                    "heals-config",
                    &json!({"kind": "apply", "spec": {"objects": [config]}}),
                )
                .await?;
            }
            End::AtOnce | End::TimedOut(_) => {}
        }
        let end = self.until(&id, TOLD_WITHIN * 2, over).await;
        let wanted = match case.end {
            End::Cancelled => "cancelled",
            End::Heals => "succeeded",
            End::AtOnce | End::TimedOut(_) => "failed",
        };
        if end["state"] != wanted || (wanted == "failed" && end["reason"] != case.reason) {
            return Err(format!("wanted {wanted}, ended as {end}"));
        }
        let lines = end["log"].as_array().map_or(0, Vec::len);
        let last = match case.name {
            "crash" => Some((20, "line 30")),
            "job" => Some((1, "last")),
            _ => None,
        };
        if let Some(last) = last
            && (lines, end["log"][lines.saturating_sub(1)].as_str().unwrap_or_default()) != last
        {
            return Err(format!("its last lines are not told: {end}"));
        }
        let message = told["message"].as_str().unwrap_or_default();
        Ok(row(case.name, &format!("{wanted}, {}", case.reason), after, message))
    }
}

/// Checks each outcome, and prints a line for it. The result is the exit code.
pub(crate) async fn outcomes(dir: &str, image: &str) -> i32 {
    let runner = Arc::new(Runner::open(dir));
    let (turns, mut tasks) = (Arc::new(Semaphore::new(AT_ONCE)), tokio::task::JoinSet::new());
    for case in cases(image) {
        let (runner, turns) = (runner.clone(), turns.clone());
        tasks.spawn(async move {
            let _turn = turns.acquire().await.unwrap();
            (case.name, runner.check(&case).await)
        });
    }
    let (planted, mut wrong) = (tasks.len(), 0);
    while let Some(done) = tasks.join_next().await {
        match done.unwrap() {
            (_, Ok(said)) => println!("ok {said}"),
            (name, Err(said)) => {
                wrong += 1;
                println!("WRONG {name}: {said}");
            }
        }
    }
    count(planted, planted - wrong);
    i32::from(wrong > 0)
}

/// A registry that has no image, and wants a password for `private`.
pub(crate) async fn registry() {
    let router = axum::Router::new().fallback(async |request: axum::extract::Request| {
        let private = request.uri().path().starts_with("/v2/private/");
        let basic = ("www-authenticate", "Basic realm=\"stand\"");
        if private {
            (http::StatusCode::UNAUTHORIZED, [basic]).into_response()
        } else if request.uri().path() == "/v2/" {
            http::StatusCode::OK.into_response()
        } else {
            http::StatusCode::NOT_FOUND.into_response()
        }
    });
    let listener = tokio::net::TcpListener::bind(REGISTRY).await.unwrap();
    axum::serve(listener, router).await.unwrap();
}
