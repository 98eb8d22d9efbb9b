//! The kill table: an operation is carried out once in peace, which shows its writes; then once
//! more for each write with the agent killed before it, and once with the agent killed after it.
//! Whatever the moment, it has the one effect that it has in peace, and the same call says what
//! became of it.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::deploys::{Deploys, Ended};
use crate::gate::{Moment, cluster, in_vm};
use crate::seen::Seen;

/// For an operation to come to any of its writes.
const REACHED: Duration = Duration::from_secs(60);

/// An operation that can be done again and again, each time as something new.
struct Repeated {
    title: &'static str,
    kind: &'static str,
    spec: Value,
    /// What is to be there before, if anything.
    prepare: Option<Value>,
    /// What `kubectl get` is asked for.
    look: String,
    /// Whether the difference between two looks is one effect.
    is_once: fn(&Value, &Value) -> bool,
    /// How it must end when the agent is killed.
    state: &'static str,
}

/// The names in a list, of one kind, that begin with a text.
fn names<'v>(list: &'v Value, kind: &str, begin: &str) -> Vec<&'v str> {
    let items = list["items"].as_array().map_or(&[][..], Vec::as_slice);
    let of_kind = items.iter().filter(|item| item["kind"] == kind);
    let names = of_kind.filter_map(|item| item["metadata"]["name"].as_str());
    names.filter(|name| name.starts_with(begin)).collect()
}

/// What there is, without values.
fn shape(seen: &Value) -> String {
    let one = |object: &Value| {
        let meta = &object["metadata"];
        format!("{} {} of generation {}", object["kind"], meta["name"], meta["generation"])
    };
    match seen["items"].as_array() {
        Some(items) => items.iter().map(one).collect::<Vec<_>>().join(", "),
        None => one(seen),
    }
}

/// One change of the spec, or the making, of a single object.
fn one_generation(before: &Value, after: &Value) -> bool {
    let generation = |object: &Value| object["metadata"]["generation"].as_i64().unwrap_or(0);
    generation(after) == generation(before) + 1
}

fn one_job(before: &Value, after: &Value) -> bool {
    let number = |list: &Value| names(list, "Job", "").len();
    let pods = |list: &Value| {
        let all = list["items"].as_array().map_or(&[][..], Vec::as_slice);
        all.iter()
            .filter(|o| o["metadata"]["labels"]["batch.kubernetes.io/job-name"].is_string())
            .count()
    };
    number(after) == number(before) + 1 && pods(after) == pods(before) + 1
}

/// A version is called like its set, with a digest.
fn one_version(before: &Value, after: &Value) -> bool {
    names(after, "ConfigMap", "kept-").len() == names(before, "ConfigMap", "kept-").len() + 1
}

/// It may be there or not: nobody goes on with the values of a secret.
fn one_secret_at_most(before: &Value, after: &Value) -> bool {
    let number = |list: &Value| names(list, "Secret", "kept-").len();
    (number(before)..=number(before) + 1).contains(&number(after))
}

fn all_gone(before: &Value, after: &Value) -> bool {
    let number = |list: &Value| list["items"].as_array().map_or(0, Vec::len);
    number(before) > 0 && number(after) == 0
}

/// The `n`-th attempts.
fn repeated(deploys: &Deploys, steady: &str, n: u32) -> Vec<Repeated> {
    let web = json!({"apiVersion": "apps/v1", "kind": "Deployment", "name": steady,
        "namespace": "production"});
    let look = format!("-n production get deployment {steady}");
    let row = |title, kind, spec: Value, look: &str, is_once| Repeated {
        title,
        kind,
        spec,
        prepare: None,
        look: look.to_owned(),
        is_once,
        state: "succeeded",
    };
    let config = |data: &str| {
        json!({"action": "set", "namespace": "production", "name": "kept",
            "data": {"n": data}})
    };
    let going = format!("going-{n}");
    let gone = deploys.application(&going, |a| a["replicas"] = 0.into());
    let pause = json!({"apiVersion": "apps/v1", "kind": "Deployment",
        "metadata": {"name": format!("applied-{n}"), "namespace": "production",
            "labels": {"pipeops.io/application": steady}},
        "spec": {"replicas": 0, "selector": {"matchLabels": {"app": "applied"}}, "template": {
            "metadata": {"labels": {"app": "applied"}},
            "spec": {"containers": [{"name": "c", "image": "r.test/none:1"}]}}}});
    let nightly = deploys.application(&format!("nightly-{n}"), |a| {
        for field in ["replicas", "ports", "probes"] {
            a.as_object_mut().unwrap().remove(field);
        }
    });
    let one = 1 + n % 2;
    vec![
        row("scale", "scale", json!({"object": web, "replicas": one}), &look, one_generation),
        row("restart", "restart", json!({"object": web}), &look, one_generation),
        row(
            "apply",
            "apply",
            json!({"objects": [pause]}),
            &format!("-n production get deployment applied-{n}"),
            one_generation,
        ),
        row(
            "cronjob",
            "cronjob",
            json!({"application": nightly, "schedule": "0 3 * * *"}),
            &format!("-n production get cronjob nightly-{n}"),
            one_generation,
        ),
        row(
            "job",
            "job",
            json!({"namespace": "production", "name": steady, "command": ["echo", "once"],
                "timeout_s": 60}),
            &format!("-n production get jobs,pods -l pipeops.io/application={steady}"),
            one_job,
        ),
        row(
            "configmap",
            "configmap",
            config(&n.to_string()),
            "-n production get configmaps",
            one_version,
        ),
        Repeated {
            state: "interrupted",
            ..row(
                "secret",
                "secret",
                config("planted-canary-7733-in-plain-text"),
                "-n production get secrets",
                one_secret_at_most,
            )
        },
        Repeated {
            prepare: Some(gone),
            ..row(
                "delete_application",
                "delete_application",
                json!({"namespace": "production", "name": going}),
                &format!(
                    "-n production get deployments,services,configmaps \
                     -l pipeops.io/application={going}"
                ),
                all_gone,
            )
        },
    ]
}

impl Deploys {
    pub(crate) async fn killed(&mut self) {
        self.killed_deploys().await;
        self.killed_rollbacks().await;
        self.killed_others().await;
    }

    /// Ends the agent at a write of an operation, and asks for it three times more: at once, and
    /// after its end.
    async fn kill_at(&mut self, kind: &str, spec: &Value, at: (usize, Moment)) -> Ended {
        let (key, body) = (self.key(), json!({"kind": kind, "spec": spec}));
        self.gate.plan(Some(at));
        let begun = Instant::now();
        let mut ended = self.begin(&key, &body).await;
        let killed = self.gate.has_killed(REACHED).await;
        let writes = self.gate.writes();
        ended.demand(killed, &format!("the agent was not killed, this was written: {writes:?}"));
        // for whoever got no answer; it waits until the agent is back
        self.again(&key, &body, &mut ended).await;
        self.finish(&key, &body, begun, &mut ended).await;
        ended
    }

    /// What an operation that was carried out in peace has written.
    async fn learned(&mut self, title: &str, kind: &str, spec: &Value) -> Vec<String> {
        self.gate.plan(None);
        let ended = self.operate(kind, spec).await;
        let writes = self.gate.writes();
        println!("info {title} writes {}", writes.join(", "));
        if ended.end["state"] != "succeeded" || !ended.wrong.is_empty() || writes.is_empty() {
            println!("WRONG {title}, in peace: {:?}; told: {}", ended.wrong, ended.end);
        }
        writes
    }

    async fn killed_deploys(&mut self) {
        let wanted = |deploys: &Deploys, name: &str| {
            let application = deploys.application(name, |a| {
                a["pre_deploy"] = json!({"command": ["true"]});
            });
            json!({"application": application, "timeout_s": 120})
        };
        let name = self.name("first");
        let spec = wanted(self, &name);
        let writes = self.learned("a deploy", "deploy", &spec).await;
        self.forget(&name);
        for (at, moment, planted) in moments("deploy", &writes) {
            let name = self.name("kill");
            let spec = wanted(self, &name);
            let mut ended = self.kill_at("deploy", &spec, (at, moment)).await;
            let seen = Seen::of(&name);
            ended.told("succeeded", "");
            ended.demand(ended.end["revision"] == 1, "revision 1 is what had to be told");
            let (made, all) = (seen.made_by(&ended.id), seen.revisions().len());
            let once = made == ["1 deployed"] && all == 1;
            ended.demand(once, &format!("its revisions are {made:?}, of {all}"));
            ended.demand(seen.is_complete(), "its pods do not run");
            ended.demand(seen.generation() == 1, "its Deployment was changed twice");
            ended.demand(seen.kind("ReplicaSet").len() == 1, "it is not one ReplicaSet");
            ended.demand(seen.kind("Service").len() == 1, "it is not one Service");
            let jobs = seen.jobs();
            ended.demand(jobs == ["1 succeeded, 0 failed, 1 pods"], "its command ran otherwise");
            self.row(&planted, &ended, &seen.summary());
            self.forget(&name);
        }
    }

    /// Two revisions that differ in a variable and in a config version take turns.
    async fn killed_rollbacks(&mut self) {
        let (name, set) = (self.name("turns"), self.name("level"));
        let level = |value: &str| {
            json!({"action": "set", "namespace": "production", "name": set,
                "data": {"level": value}})
        };
        let mut specs = Vec::new();
        for (mode, value) in [("1", "low"), ("2", "high")] {
            let end = self.operate("configmap", &level(value)).await.end;
            let application = self.application(&name, |a| {
                a["environment"] = json!({"MODE": mode, "LEVEL": {"config": set, "key": "level"}});
            });
            let deployed = self.deploy(application).await;
            if end["state"] != "succeeded" || deployed.end["state"] != "succeeded" {
                println!("WRONG rollback, revision {mode}: {end} {}", deployed.end);
            }
            specs.push(Running::of(self, &name));
        }
        if specs[0].level == specs[1].level {
            println!("WRONG rollback: both revisions have config version {:?}", specs[0].level);
        }
        let spec = json!({"namespace": "production", "name": name, "timeout_s": 120});
        // what a rotation has changed becomes ours at the first one
        self.operate("rollback", &spec).await;
        let writes = self.learned("a rollback", "rollback", &spec).await;
        for (at, moment, planted) in moments("rollback", &writes) {
            let before = Seen::of(&name);
            let last = before.revisions().last().map_or(0, |(number, _)| *number);
            let mut ended = self.kill_at("rollback", &spec, (at, moment)).await;
            let seen = Seen::of(&name);
            // revisions with odd numbers are as the first one
            let wanted = &specs[usize::from(last % 2 == 1)];
            ended.told("succeeded", "");
            let number = last + 1;
            ended.demand(
                ended.end["revision"] == number,
                &format!("revision {number} is what had to be told"),
            );
            let made = seen.made_by(&ended.id);
            let once = made == [format!("{number} deployed")]
                && seen.revisions().last().is_some_and(|(newest, _)| *newest == number);
            ended.demand(once, &format!("its revisions are {made:?}"));
            ended.demand(seen.generation() == before.generation() + 1, "it was changed otherwise");
            ended.demand(seen.is_complete(), "its pods do not run");
            let back = Running::of(self, &name);
            for (what, is, was) in [
                ("spec", &back.spec, &wanted.spec),
                ("image digest", &back.digest, &wanted.digest),
                ("config version", &back.level, &wanted.level),
            ] {
                ended.demand(is == was, &format!("its {what} is {is}, and was {was}"));
            }
            self.row(&planted, &ended, &seen.summary());
        }
        self.forget(&name);
    }

    async fn killed_others(&mut self) {
        let steady = self.name("steady");
        let application = self.application(&steady, |a| a["replicas"] = 1.into());
        let deployed = self.deploy(application).await;
        if deployed.end["state"] != "succeeded" {
            println!("WRONG {steady} was not deployed: {}", deployed.end);
            return;
        }
        let mut n = 0;
        for at in 0..repeated(self, &steady, 0).len() {
            n += 1;
            let first = self.prepared(&steady, n, at).await;
            let writes = self.learned(first.title, first.kind, &first.spec).await;
            for (write, moment, planted) in moments(first.title, &writes) {
                n += 1;
                let it = self.prepared(&steady, n, at).await;
                let before = cluster(&it.look);
                let mut ended = self.kill_at(it.kind, &it.spec, (write, moment)).await;
                let after = cluster(&it.look);
                ended.told(it.state, "");
                ended.demand((it.is_once)(&before, &after), "it does not have one effect");
                if it.kind == "job" {
                    let told = ended.end["exit_code"] == 0 && ended.end["log"] == json!(["once"]);
                    ended.demand(told, "exit code 0 and one line `once` are what had to be told");
                }
                let seen = format!("before {}, after {}", shape(&before), shape(&after));
                self.row(&planted, &ended, &seen);
            }
        }
        self.forget(&steady);
        let rest = "kubectl -n production delete cronjobs -l app.kubernetes.io/managed-by=pipeops; \
                    kubectl -n production get configmaps,secrets -o name | grep /kept- | \
                    xargs -r kubectl -n production delete";
        in_vm("a1", rest, "").unwrap_or_else(|why| panic!("{why}"));
    }

    /// One of them, with what it needs.
    async fn prepared(&mut self, steady: &str, n: u32, at: usize) -> Repeated {
        let it = repeated(self, steady, n).swap_remove(at);
        if let Some(application) = &it.prepare {
            self.deploy(application.clone()).await;
        }
        it
    }
}

/// Before and after each write, with a name.
fn moments(title: &str, writes: &[String]) -> Vec<(usize, Moment, String)> {
    let each = writes.iter().enumerate().flat_map(|(n, write)| {
        [(Moment::Before, "before"), (Moment::After, "after")].map(|(moment, when)| {
            let (at, all) = (n + 1, writes.len());
            // the object's own name is another one each time
            let what = write.rsplit_once('/').map_or(write.as_str(), |(what, _)| what);
            (at, moment, format!("{title}, killed {when} write {at} of {all}, {what}"))
        })
    });
    each.collect()
}

/// What runs of an application, as texts, which are compared byte by byte.
struct Running {
    spec: String,
    digest: String,
    /// The object that holds the variable `LEVEL`.
    level: String,
}

impl Running {
    fn of(deploys: &Deploys, name: &str) -> Running {
        let seen = Seen::of(name);
        let mut spec = seen.deployment()["spec"].clone();
        let mut level = String::new();
        if let Some(ours) = spec.pointer_mut("/template/spec/containers/0") {
            let named =
                ours["env"].as_array().and_then(|env| env.iter().find(|v| v["name"] == "LEVEL"));
            level = named
                .map(|v| v["valueFrom"]["configMapKeyRef"]["name"].to_string())
                .unwrap_or_default();
            // what comes back is pinned to the digest that ran, where a registry has it
            let image = ours["image"].as_str().unwrap_or_default();
            if image.starts_with(&format!("{}@", deploys.image)) {
                ours["image"] = deploys.image.as_str().into();
            }
        }
        let mut digests: Vec<String> = seen
            .kind("Pod")
            .into_iter()
            .filter(|pod| pod["metadata"]["deletionTimestamp"].is_null())
            .map(|pod| pod["status"]["containerStatuses"][0]["imageID"].to_string())
            .collect();
        digests.sort();
        digests.dedup();
        Running { spec: spec.to_string(), digest: digests.join(", "), level }
    }
}
