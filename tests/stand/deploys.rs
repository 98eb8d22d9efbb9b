//! Outcomes of an application's operations while something around them fails: the agent killed at
//! each write (`killed.rs`), the control plane away, the tunnel cut, and those that end otherwise
//! than they were meant to. What is told is compared with what an administrator sees in the
//! cluster.
//!
//! DIR holds what a Runner is given, as for the outcomes. It runs in the root of the repository,
//! beside the VMs `cp` (the control plane) and `a1` (a server, whose agent is led through the
//! gate); whoever starts it sets both right again.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::caller::{Runner, count, row};
use crate::gate::{Gate, in_vm};
use crate::outcomes::REGISTRY;
use crate::seen::Seen;

/// For an operation, with a restart of the agent in it.
const TIME: Duration = Duration::from_secs(180);
/// For the way to the agent to be there.
const PATIENCE: Duration = Duration::from_secs(90);
const OPERATIONS: &str = "/api/v1/operations";
/// How long the tunnel is cut.
const CUT: Duration = Duration::from_secs(30);
const LOOK: Duration = Duration::from_millis(250);

pub(crate) struct Deploys {
    pub(crate) runner: Runner,
    pub(crate) gate: Arc<Gate>,
    pub(crate) image: String,
    /// Second of its start: another run has other keys and names.
    run: i64,
    keys: u32,
    planted: usize,
    told: usize,
}

/// An operation that has ended.
pub(crate) struct Ended {
    pub(crate) id: String,
    /// As it was told; what came instead where it was not.
    pub(crate) end: Value,
    /// Until its end was told, or what is told in it.
    pub(crate) after: Duration,
    /// What was not as it must be.
    pub(crate) wrong: Vec<String>,
}

impl Ended {
    pub(crate) fn demand(&mut self, holds: bool, what: &str) {
        if !holds {
            self.wrong.push(what.to_owned());
        }
    }

    /// What must have been told.
    pub(crate) fn told(&mut self, state: &str, reason: &str) {
        let seen = (&self.end["state"], self.end["reason"].as_str().unwrap_or_default());
        let holds = seen == (&json!(state), reason);
        self.demand(holds, &format!("`{state} {reason}` is what had to be told"));
    }
}

impl Deploys {
    pub(crate) fn key(&mut self) -> String {
        self.keys += 1;
        format!("deploys-{}-{}", self.run, self.keys)
    }

    /// A name that no other application has.
    pub(crate) fn name(&mut self, what: &str) -> String {
        self.keys += 1;
        format!("{what}-{}-{}", self.run % 100_000, self.keys)
    }

    /// An application whose pods are ready at once and end at once, changed by `change`.
    pub(crate) fn application(&self, name: &str, change: impl FnOnce(&mut Value)) -> Value {
        let stays = "trap 'exit 0' TERM; sleep 3600 & wait";
        let mut application = json!({
            "name": name, "namespace": "production", "image": self.image, "replicas": 2,
            "command": ["sh", "-c", stays], "environment": {"MODE": "1"},
            "ports": [{"container_port": 8080}], "security": {"user": 1000},
            "probes": {"readiness": {"command": ["true"], "period_s": 1}},
            "resources": {"requests": {"cpu": "5m", "memory": "4Mi"}, "limits": {"memory": "32Mi"}}
        });
        change(&mut application);
        application
    }

    /// Asks until there is an answer: the agent, or the way to it, may be away.
    pub(crate) async fn ask(&self, key: &str, body: &Value) -> Result<Value, String> {
        let begun = Instant::now();
        loop {
            let (status, answer) = self.runner.ask("POST", OPERATIONS, key, body).await;
            match status {
                200 | 202 if answer["id"].is_string() => return Ok(answer),
                0 | 404 | 429 | 500.. if begun.elapsed() < PATIENCE => {}
                _ => return Err(format!("{status} {answer}")),
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// The same call once more: it must be the same operation.
    pub(crate) async fn again(&self, key: &str, body: &Value, ended: &mut Ended) {
        if ended.id.is_empty() {
            return;
        }
        match self.ask(key, body).await {
            Ok(answer) if answer["id"] == ended.id.as_str() => {}
            other => ended.wrong.push(format!("the same call was another operation: {other:?}")),
        }
    }

    /// The operation as the agent tells it, once it is as wanted or its time is over.
    pub(crate) async fn until(&self, id: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        let (path, begun) = (format!("{OPERATIONS}/{id}"), Instant::now());
        loop {
            let (status, seen) = self.runner.ask("GET", &path, "", &Value::Null).await;
            if (status == 200 && wanted(&seen)) || begun.elapsed() > TIME {
                return seen;
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Waits for the end, asks twice more, and compares with what the control plane was told.
    pub(crate) async fn finish(&self, key: &str, body: &Value, begun: Instant, ended: &mut Ended) {
        if ended.id.is_empty() {
            return;
        }
        ended.end = self.until(&ended.id, has_ended).await;
        ended.after = begun.elapsed();
        for _ in 0..2 {
            self.again(key, body, ended).await;
        }
        let path = format!("/{}", ended.id);
        let end = self.until_at_control_plane(&path, has_ended).await;
        let holds = end["state"] == ended.end["state"];
        ended.demand(holds, &format!("the control plane was told {end}"));
    }

    /// The same as `until` of the control plane itself.
    async fn until_at_control_plane(&self, path: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        let begun = Instant::now();
        loop {
            let (status, seen) = self.runner.at_control_plane("GET", path, "", &Value::Null).await;
            if (status == 200 && wanted(&seen)) || begun.elapsed() > TIME {
                return seen;
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// An operation that is carried out in peace.
    pub(crate) async fn operate(&mut self, kind: &str, spec: &Value) -> Ended {
        let (key, body) = (self.key(), json!({"kind": kind, "spec": spec}));
        let begun = Instant::now();
        let mut ended = self.begin(&key, &body).await;
        self.again(&key, &body, &mut ended).await;
        self.finish(&key, &body, begun, &mut ended).await;
        ended
    }

    pub(crate) async fn begin(&self, key: &str, body: &Value) -> Ended {
        let (id, end, wrong) = match self.ask(key, body).await {
            Ok(taken) => (taken["id"].as_str().unwrap_or_default().to_owned(), taken, Vec::new()),
            Err(why) => (String::new(), Value::Null, vec![format!("it was not taken: {why}")]),
        };
        Ended { id, end, after: Duration::ZERO, wrong }
    }

    pub(crate) async fn deploy(&mut self, application: Value) -> Ended {
        self.operate("deploy", &json!({"application": application, "timeout_s": 120})).await
    }

    /// A line of the table.
    pub(crate) fn row(&mut self, planted: &str, ended: &Ended, seen: &str) {
        self.planted += 1;
        let text = |field: &str| ended.end[field].as_str().unwrap_or_default();
        let told = [text("state"), text("reason")].join(" ");
        if ended.wrong.is_empty() {
            self.told += 1;
            println!("ok {}", row(planted, told.trim_end(), ended.after, text("message")));
        } else {
            let wrong = ended.wrong.join("; ");
            let line = row(planted, told.trim_end(), ended.after, &wrong);
            println!("WRONG {line}; told: {}; the cluster: {seen}", ended.end);
        }
    }

    /// Takes an application away, past the agent.
    pub(crate) fn forget(&self, name: &str) {
        let kinds = "deployments,services,poddisruptionbudgets,configmaps,jobs";
        let line = format!(
            "kubectl -n production delete {kinds} -l pipeops.io/application={name} --wait=false"
        );
        in_vm("a1", &line, "").unwrap_or_else(|why| panic!("{why}"));
    }

    /// Both are ended by the cluster while nobody can be told.
    async fn control_plane_away(&mut self) {
        let script = |script: &str| json!({"command": ["sh", "-c", script]});
        let rows = [
            ("a deploy, the control plane away all the time", script("sleep 10"), "deployed"),
            (
                "a deploy whose command fails, the control plane away all the time",
                script("sleep 10; echo no such table; exit 3"),
                "failed",
            ),
        ];
        let mut begun = Vec::new();
        for (planted, job, state) in rows {
            let (name, key) = (self.name("away"), self.key());
            let application = self.application(&name, |a| a["pre_deploy"] = job);
            let spec = json!({"application": application, "timeout_s": 120});
            let body = json!({"kind": "deploy", "spec": spec});
            let ended = self.begin(&key, &body).await;
            begun.push((planted, state, name, key, body, ended));
        }
        let since = Instant::now();
        let stop =
            "systemctl kill -s KILL pipeops-control-plane; systemctl stop pipeops-control-plane";
        in_vm("cp", stop, "").unwrap_or_else(|why| panic!("{why}"));
        let is_over = |name: &str, state: &str| {
            Seen::of(name).revisions().iter().any(|(_, status)| status["state"] == state)
        };
        while since.elapsed() < TIME && !begun.iter().all(|b| is_over(&b.2, b.1)) {
            tokio::time::sleep(LOOK).await;
        }
        in_vm("cp", "systemctl start pipeops-control-plane", "")
            .unwrap_or_else(|why| panic!("{why}"));
        for (planted, state, name, key, body, mut ended) in begun {
            self.again(&key, &body, &mut ended).await;
            self.finish(&key, &body, since, &mut ended).await;
            let seen = Seen::of(&name);
            let made = seen.made_by(&ended.id);
            ended.demand(made == [format!("1 {state}")], &format!("its revisions are {made:?}"));
            let jobs = seen.jobs();
            if state == "deployed" {
                ended.told("succeeded", "");
                ended.demand(seen.is_complete(), "its pods do not run");
                ended
                    .demand(jobs == ["1 succeeded, 0 failed, 1 pods"], "its command ran otherwise");
            } else {
                ended.told("failed", "exited_with_error");
                let lines = ended.end["log"] == json!(["no such table"]);
                ended.demand(lines, "its last lines are not told");
                ended.demand(seen.kind("Deployment").is_empty(), "it was rolled out");
                ended
                    .demand(jobs == ["0 succeeded, 1 failed, 1 pods"], "its command ran otherwise");
            }
            self.row(planted, &ended, &seen.summary());
            self.forget(&name);
        }
    }

    /// The job ends while the tunnel is cut; its end goes another way, and is told once.
    async fn tunnel_cut(&mut self) {
        let name = self.name("cut");
        let deployed = self.deploy(self.application(&name, |a| a["replicas"] = 1.into())).await;
        let spec = json!({"namespace": "production", "name": name, "timeout_s": 120,
            "command": ["sh", "-c", "sleep 15; echo late; exit 4"]});
        let (key, body) = (self.key(), json!({"kind": "job", "spec": spec}));
        let begun = Instant::now();
        let mut ended = self.begin(&key, &body).await;
        let deployed_well = deployed.wrong.is_empty() && deployed.end["state"] == "succeeded";
        ended.demand(deployed_well, &format!("its application was not deployed: {}", deployed.end));
        self.until(&ended.id, |o| o["objects"][0]["outcome"] == "created" || has_ended(o)).await;
        let rules = "table inet cut {\n\
             chain out { type filter hook output priority 0; tcp dport 7000 drop; }\n\
             chain back { type filter hook input priority 0; tcp sport 7000 drop; }\n}\n";
        in_vm("a1", "nft -f -", rules).unwrap_or_else(|why| panic!("{why}"));
        tokio::time::sleep(CUT).await;
        let jobs = Seen::of(&name).jobs();
        in_vm("a1", "nft delete table inet cut", "").unwrap_or_else(|why| panic!("{why}"));
        ended.demand(
            jobs == ["0 succeeded, 1 failed, 1 pods"],
            &format!("it had not ended when the tunnel was back: {jobs:?}"),
        );
        self.again(&key, &body, &mut ended).await;
        self.finish(&key, &body, begun, &mut ended).await;
        let seen = Seen::of(&name);
        ended.told("failed", "exited_with_error");
        let told = ended.end["exit_code"] == 4 && ended.end["log"] == json!(["late"]);
        ended.demand(told, "exit code 4 and one line `late` are what had to be told");
        let jobs = seen.jobs();
        ended.demand(jobs.len() == 1, &format!("its command ran otherwise: {jobs:?}"));
        self.row("a job that fails, the tunnel cut for 30 s", &ended, &seen.summary());
        self.forget(&name);
    }

    /// Nothing more is done once it is cancelled.
    async fn cancelled(&mut self) {
        let name = self.name("cancel");
        let nothing = format!("{REGISTRY}/none:1");
        let application = self.application(&name, |a| a["image"] = nothing.into());
        let spec = json!({"application": application, "timeout_s": 300});
        let (key, body) = (self.key(), json!({"kind": "deploy", "spec": spec}));
        let begun = Instant::now();
        let mut ended = self.begin(&key, &body).await;
        let cause = |o: &Value| o["reason"] == "image_not_found" || has_ended(o);
        let told = self.until(&ended.id, cause).await;
        let after = begun.elapsed();
        ended.demand(told["reason"] == "image_not_found", &format!("the cause: {told}"));
        let path = format!("{OPERATIONS}/{}", ended.id);
        self.runner.call("DELETE", &path, "", &Value::Null).await;
        self.again(&key, &body, &mut ended).await;
        self.finish(&key, &body, begun, &mut ended).await;
        ended.after = after;
        let seen = Seen::of(&name);
        ended.demand(ended.end["state"] == "cancelled", "`cancelled` is what had to be told");
        let made = seen.made_by(&ended.id);
        ended.demand(made == ["1 failed"], &format!("its revisions are {made:?}"));
        ended.demand(seen.generation() == 1 && !seen.is_complete(), "something else was done");
        self.row("a deploy, cancelled while its image is missing", &ended, &seen.summary());
        self.forget(&name);
    }

    async fn timed_out(&mut self) {
        let name = self.name("slow");
        let application = self.application(&name, |a| {
            a["probes"]["readiness"]["initial_delay_s"] = 600.into();
        });
        let spec = json!({"application": application, "timeout_s": 8});
        let mut ended = self.operate("deploy", &spec).await;
        let seen = Seen::of(&name);
        ended.told("failed", "timed_out");
        let made = seen.made_by(&ended.id);
        ended.demand(made == ["1 failed"], &format!("its revisions are {made:?}"));
        ended.demand(seen.generation() == 1 && !seen.is_complete(), "something else was done");
        self.row("a deploy that is not ready in its time", &ended, &seen.summary());
        self.forget(&name);
    }

    /// Its agent comes too late: nothing of it is done. What was asked for later and may wait is.
    async fn expired(&mut self) {
        let (late, next) = (self.name("late"), self.name("next"));
        let [late_key, next_key] = [self.key(), self.key()];
        let wanted = |name: &str, ttl_s: i64| {
            let application = self.application(name, |a| a["replicas"] = 0.into());
            json!({"kind": "deploy", "ttl_s": ttl_s, "spec": {"application": application}})
        };
        let (body, after) = (wanted(&late, 2), wanted(&next, 300));
        in_vm("a1", "systemctl stop pipeops-agent", "").unwrap_or_else(|why| panic!("{why}"));
        let begun = Instant::now();
        let (status, taken) = self.runner.at_control_plane("POST", "", &late_key, &body).await;
        let id = taken["id"].as_str().unwrap_or_default().to_owned();
        let mut ended = Ended { id, end: taken.clone(), after: Duration::ZERO, wrong: Vec::new() };
        ended.demand(status == 202 && taken["state"] == "queued", &format!("{status} {taken}"));
        let path = format!("/{}", ended.id);
        ended.end = self.until_at_control_plane(&path, has_ended).await;
        ended.after = begun.elapsed();
        let (_, queued) = self.runner.at_control_plane("POST", "", &next_key, &after).await;
        in_vm("a1", "systemctl start pipeops-agent", "").unwrap_or_else(|why| panic!("{why}"));
        let path = format!("/{}", queued["id"].as_str().unwrap_or_default());
        let done = self.until_at_control_plane(&path, has_ended).await;
        ended.demand(done["state"] == "succeeded", &format!("the next in the queue: {done}"));
        for _ in 0..3 {
            let (status, same) = self.runner.at_control_plane("POST", "", &late_key, &body).await;
            let holds = status == 200 && same["id"] == ended.id.as_str() && has_ended(&same);
            ended.demand(holds, &format!("asked again: {status} {same}"));
        }
        let seen = Seen::of(&late);
        ended.demand(ended.end["state"] == "expired", "`expired` is what had to be told");
        ended.demand(seen.is_empty(), "it was delivered");
        self.row("a deploy whose agent comes after its ttl", &ended, &seen.summary());
        self.forget(&next);
    }

    /// The field of somebody else stays as it is, and nothing is kept.
    async fn conflict(&mut self) {
        let name = self.name("owned");
        let deployed = self.deploy(self.application(&name, |a| a["replicas"] = 1.into())).await;
        let path = format!(
            "/k8s/apis/apps/v1/namespaces/production/deployments/{name}?fieldManager=somebody"
        );
        let (status, said) =
            self.runner.patch(&path, &json!({"spec": {"minReadySeconds": 2}})).await;
        let before = Seen::of(&name);
        let application = self.application(&name, |a| {
            a["replicas"] = 1.into();
            a["strategy"] = json!({"min_ready_s": 1});
        });
        let mut ended = self.deploy(application).await;
        ended.demand(status == 200, &format!("somebody could not set it: {status} {said}"));
        ended.demand(deployed.end["state"] == "succeeded", &format!("at first: {}", deployed.end));
        ended.told("failed", "conflict");
        let named = ended.end["message"].as_str().is_some_and(|text| text.contains("somebody"));
        ended.demand(named, "whose field it is, is not told");
        let seen = Seen::of(&name);
        let stays = seen.deployment()["spec"] == before.deployment()["spec"]
            && seen.generation() == before.generation()
            && seen.revisions().len() == 1;
        ended.demand(stays, "it was changed");
        self.row("a deploy that wants the field of another manager", &ended, &seen.summary());
        self.forget(&name);
    }
}

pub(crate) fn has_ended(operation: &Value) -> bool {
    matches!(
        operation["state"].as_str(),
        Some("succeeded" | "failed" | "cancelled" | "interrupted" | "expired" | "unknown")
    )
}

/// Prints a line for each outcome, and at the end how many there were. The result is the exit code.
pub(crate) async fn deploys(dir: &str, image: &str) -> i32 {
    let runner = Runner::open(dir);
    let gate = Gate::open().await.unwrap_or_else(|why| panic!("{why}"));
    let run = jiff::Timestamp::now().as_second();
    let image = image.into();
    let mut deploys = Deploys { runner, gate, image, run, keys: 0, planted: 0, told: 0 };
    deploys.cancelled().await;
    deploys.timed_out().await;
    deploys.conflict().await;
    deploys.restricted(dir).await;
    deploys.killed().await;
    deploys.tunnel_cut().await;
    deploys.control_plane_away().await;
    deploys.expired().await;
    count(deploys.planted, deploys.told);
    i32::from(deploys.told < deploys.planted)
}
