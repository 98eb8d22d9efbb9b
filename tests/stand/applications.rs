//! An application's life on a cluster: what is deployed, brought back, superseded, refused and deleted, seen in the cluster itself.
//!
//! DIR holds what a Runner is given, as for the outcomes; the Runner is a deployer.

use std::time::Duration;

use serde_json::{Value, json};

use crate::caller::Runner;
use crate::outcomes::REGISTRY;

const TIME: Duration = Duration::from_secs(150);
const DEPLOYMENT: &str = "/k8s/apis/apps/v1/namespaces/production/deployments/web";
const SERVICE: &str = "/k8s/api/v1/namespaces/production/services/web";
const REVISIONS: &str =
    "/k8s/api/v1/namespaces/production/configmaps?labelSelector=pipeops.io/application=web";

struct Life {
    runner: Runner,
    image: String,
    wrong: i32,
    /// Second of its start: another run has other keys.
    run: i64,
    keys: u32,
}

impl Life {
    fn say(&mut self, holds: bool, what: &str, evidence: &Value) {
        if holds {
            println!("ok {what}");
        } else {
            self.wrong += 1;
            println!("WRONG {what}: {evidence}");
        }
    }

    /// An application that runs, changed by `change`.
    fn application(&self, change: impl FnOnce(&mut Value)) -> Value {
        let mut application = json!({
            "name": "web", "namespace": "production", "image": self.image, "replicas": 2,
            "command": ["sleep", "3600"], "environment": {"MODE": "1"}, "security": {"user": 1000},
            "probes": {"readiness": {"command": ["true"], "period_s": 1}},
            "resources": {"requests": {"cpu": "10m", "memory": "8Mi"}, "limits": {"memory": "32Mi"}}
        });
        change(&mut application);
        application
    }

    async fn begin(&mut self, kind: &str, spec: Value) -> Value {
        self.keys += 1;
        let key = format!("life-{}-{}", self.run, self.keys);
        let body = json!({"kind": kind, "spec": spec});
        self.runner.call("POST", "/api/v1/operations", &key, &body).await.1
    }

    async fn end(&self, taken: &Value) -> Value {
        let id = taken["id"].as_str().unwrap_or_default();
        let over = |o: &Value| !matches!(o["state"].as_str(), Some("running" | "queued"));
        self.runner.until(id, TIME, over).await
    }

    async fn operate(&mut self, kind: &str, spec: Value) -> Value {
        let taken = self.begin(kind, spec).await;
        if taken["id"].is_null() { taken } else { self.end(&taken).await }
    }

    async fn deploy(&mut self, change: impl FnOnce(&mut Value)) -> Value {
        let application = self.application(change);
        self.operate("deploy", json!({"application": application, "timeout_s": 120})).await
    }

    async fn get(&self, path: &str) -> (u16, Value) {
        self.runner.call("GET", path, "", &Value::Null).await
    }

    /// Names of the pods that serve.
    async fn pods(&self) -> Vec<Value> {
        let path = "/k8s/api/v1/namespaces/production/pods?labelSelector=pipeops.io/application=web,app=web";
        let list = self.get(path).await.1;
        let pods = list["items"].as_array().cloned().unwrap_or_default();
        let mut names: Vec<Value> = pods
            .iter()
            .filter(|pod| pod["metadata"]["deletionTimestamp"].is_null())
            .filter(|pod| pod["status"]["containerStatuses"][0]["ready"] == true)
            .map(|pod| pod["metadata"]["name"].clone())
            .collect();
        names.sort_by_key(Value::to_string);
        names
    }

    async fn deployment(&self) -> Value {
        self.get(DEPLOYMENT).await.1
    }
}

fn is(end: &Value, state: &str, reason: &str, revision: u32) -> bool {
    let number = if revision == 0 { Value::Null } else { revision.into() };
    end["state"] == state
        && end["reason"].as_str().unwrap_or_default() == reason
        && end["revision"] == number
}

fn with_port(application: &mut Value) {
    application["ports"] = json!([{"container_port": 8080}]);
}

fn mode(value: &'static str) -> impl FnOnce(&mut Value) {
    move |application| application["environment"]["MODE"] = value.into()
}

/// Prints a line for each claim. The result is the exit code.
pub(crate) async fn applications(dir: &str, image: &str) -> i32 {
    let (runner, run) = (Runner::open(dir), jiff::Timestamp::now().as_second());
    let mut life = Life { runner, image: image.into(), wrong: 0, run, keys: 0 };
    refused_and_dry(&mut life).await;
    let first = deployed_and_brought_back(&mut life).await;
    failed_and_superseded(&mut life, &first).await;
    before_the_rollout(&mut life).await;
    managers_and_scale(&mut life).await;
    jobs(&mut life).await;
    config_sets(&mut life).await;
    let end =
        life.operate("delete_application", json!({"namespace": "production", "name": "web"})).await;
    let (deployment, revisions) = (life.get(DEPLOYMENT).await.0, life.get(REVISIONS).await.1);
    let gone = deployment == 404 && revisions["items"] == json!([]);
    life.say(gone && is(&end, "succeeded", "", 0), "deleted: it and its revisions are gone", &end);
    let end =
        life.operate("delete_application", json!({"namespace": "production", "name": "web"})).await;
    life.say(is(&end, "succeeded", "", 0), "deleted again: it is absent", &end);
    i32::from(life.wrong > 0)
}

async fn refused_and_dry(life: &mut Life) {
    let refused = life.deploy(|a| a["replicas"] = "three".into()).await;
    let message = refused["message"].as_str().unwrap_or_default();
    let named = refused["code"] == "bad_operation" && message.contains("application.replicas");
    life.say(named, "a wrong type is refused with its field", &refused);
    let application = life.application(with_port);
    let end = life.operate("deploy", json!({"application": application, "dry_run": true})).await;
    let absent =
        life.get(DEPLOYMENT).await.0 == 404 && life.get(REVISIONS).await.1["items"] == json!([]);
    life.say(absent && is(&end, "succeeded", "", 0), "a dry run changes nothing", &end);
    let end = life.deploy(|a| a["namespace"] = "kube-system".into()).await;
    life.say(is(&end, "failed", "forbidden", 0), "a namespace without rights is refused", &end);
}

/// The spec of the first revision comes with it.
async fn deployed_and_brought_back(life: &mut Life) -> Value {
    let end = life.deploy(with_port).await;
    let first = life.deployment().await;
    let service = life.get(SERVICE).await.0 == 200;
    life.say(
        is(&end, "succeeded", "", 1) && service,
        "deployed: revision 1 with its Service",
        &end,
    );
    let end = life.deploy(with_port).await;
    let again = life.deployment().await;
    let same = again["metadata"]["generation"] == first["metadata"]["generation"];
    life.say(same && is(&end, "succeeded", "", 1), "deployed again: still revision 1", &end);
    let end = life.deploy(mode("2")).await;
    let pruned = life.get(SERVICE).await.0 == 404;
    life.say(pruned && is(&end, "succeeded", "", 2), "revision 2 without the Service", &end);
    let end = life.operate("rollback", json!({"namespace": "production", "name": "web"})).await;
    let mut back = life.deployment().await;
    let service = life.get(SERVICE).await.0 == 200;
    // pinned to what ran, where a registry has it
    let pinned =
        back.pointer("/spec/template/spec/containers/0/image").cloned().unwrap_or_default();
    let same_image = pinned
        .as_str()
        .is_some_and(|i| i == life.image || i.starts_with(&format!("{}@", life.image)));
    back["spec"]["template"]["spec"]["containers"][0]["image"] = life.image.as_str().into();
    let same = back["spec"] == first["spec"] && service && same_image;
    life.say(
        same && is(&end, "succeeded", "", 3),
        "brought back: revision 3 has the spec of revision 1",
        &end,
    );
    let end = life
        .operate("rollback", json!({"namespace": "production", "name": "web", "revision": 9}))
        .await;
    life.say(is(&end, "failed", "no_revision", 0), "a revision that is not kept is named", &end);
    first["spec"].clone()
}

async fn failed_and_superseded(life: &mut Life, first: &Value) {
    let nothing = format!("{REGISTRY}/none:1");
    let broken = life.application(|a| a["image"] = nothing.as_str().into());
    let spec = json!({"application": broken, "timeout_s": 12, "auto_rollback": true});
    let before = life.pods().await;
    let end = life.operate("deploy", spec).await;
    let (back, after) = (life.deployment().await, life.pods().await);
    let serves = back["status"]["availableReplicas"] == 2
        && back["spec"]["template"]["spec"]["containers"][0]["env"]
            == first["template"]["spec"]["containers"][0]["env"];
    let told = is(&end, "failed", "image_not_found", 4) && end["rolled_back_to"] == 3;
    life.say(serves && told, "a rollout that fails is rolled back when asked to", &end);
    life.say(
        before.len() == 2 && before == after,
        "and its pods served all the time",
        &json!([before, after]),
    );
    let hangs = life.begin("deploy", json!({"application": broken, "timeout_s": 300})).await;
    for _ in 0..100 {
        if life.deployment().await["spec"]["template"]["spec"]["containers"][0]["image"]
            == nothing.as_str()
        {
            break;
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    let end = life.deploy(mode("3")).await;
    let former = life.end(&hangs).await;
    life.say(
        former["state"] == "cancelled" && former["reason"] == "superseded",
        "a rollout that hangs is superseded",
        &former,
    );
    life.say(end["state"] == "succeeded", "by the one that corrects it", &end);
}

async fn before_the_rollout(life: &mut Life) {
    let script = |script: &str| json!({"command": ["sh", "-c", script]});
    let generation = life.deployment().await["metadata"]["generation"].clone();
    let end = life
        .deploy(|a| {
            a["environment"]["MODE"] = "4".into();
            a["pre_deploy"] = script("echo no such table; exit 3");
        })
        .await;
    let untouched = life.deployment().await["metadata"]["generation"] == generation;
    let told = end["reason"] == "exited_with_error" && end["log"] == json!(["no such table"]);
    life.say(
        untouched && told && end["state"] == "failed",
        "a command before the rollout fails: the pods stay, its last line is told",
        &end,
    );
    let end = life
        .deploy(|a| {
            a["environment"]["MODE"] = "4".into();
            a["pre_deploy"] = script("test $MODE = 4");
        })
        .await;
    life.say(end["state"] == "succeeded", "and when it succeeds the rollout follows", &end);
}

async fn managers_and_scale(life: &mut Life) {
    let object = json!({"apiVersion": "apps/v1", "kind": "Deployment", "name": "web", "namespace": "production"});
    let end = life.operate("scale", json!({"object": object, "replicas": 3})).await;
    life.say(end["state"] == "succeeded", "scaled to 3", &end);
    let end = life
        .deploy(|a| {
            a["environment"]["MODE"] = "5".into();
            a.as_object_mut().unwrap().remove("replicas");
        })
        .await;
    let three = life.deployment().await["spec"]["replicas"] == 3;
    life.say(
        three && end["state"] == "succeeded",
        "without replicas it stays as it was scaled",
        &end,
    );
    let end = life.deploy(mode("5")).await;
    let two = life.deployment().await["spec"]["replicas"] == 2;
    life.say(two && end["state"] == "succeeded", "with replicas they count", &end);
    let path = format!("{DEPLOYMENT}?fieldManager=somebody");
    let patch = json!({"spec": {"minReadySeconds": 2}});
    let (status, said) = life.runner.patch(&path, &patch).await;
    life.say(status == 200, "somebody else sets a field", &said);
    let ready = |a: &mut Value| a["strategy"] = json!({"min_ready_s": 1});
    let end = life.deploy(ready).await;
    let named = end["message"].as_str().is_some_and(|m| m.contains("somebody"));
    life.say(named && is(&end, "failed", "conflict", 0), "whose field it is, is said", &end);
    let application = life.application(ready);
    let end = life.operate("deploy", json!({"application": application, "take_over": true})).await;
    life.say(end["state"] == "succeeded", "and it is taken over when asked to", &end);
}

async fn jobs(life: &mut Life) {
    let web = |command: Value, timeout_s: u32| json!({"namespace": "production", "name": "web", "command": command, "timeout_s": timeout_s});
    let end = life.operate("job", web(json!(["sh", "-c", "echo mode $MODE; exit 7"]), 60)).await;
    let told = end["exit_code"] == 7 && end["log"].as_array().is_some_and(|l| l.len() == 1);
    life.say(
        told && is(&end, "failed", "exited_with_error", 0),
        "a job that fails: its exit code and last line",
        &end,
    );
    let end = life.operate("job", web(json!(["sh", "-c", "echo done"]), 60)).await;
    let told = end["exit_code"] == 0 && end["log"] == json!(["done"]);
    life.say(
        told && end["state"] == "succeeded",
        "a job that succeeds: its exit code and log",
        &end,
    );
    let nightly = life.application(|a| {
        a["name"] = "nightly".into();
        let fields = a.as_object_mut().unwrap();
        fields.remove("replicas");
        fields.remove("probes");
    });
    let cron = json!({"application": nightly, "schedule": "0 3 * * *", "time_zone": "Etc/UTC", "command": ["sh", "-c", "echo night"]});
    let end = life.operate("cronjob", cron).await;
    life.say(end["state"] == "succeeded", "a job by a schedule is set", &end);
    let end = life
        .operate("job", json!({"namespace": "production", "cronjob": "nightly", "timeout_s": 60}))
        .await;
    life.say(
        end["log"] == json!(["night"]) && end["exit_code"] == 0,
        "and runs when it is asked for",
        &end,
    );
    let object = json!({"apiVersion": "batch/v1", "kind": "CronJob", "name": "nightly", "namespace": "production"});
    let end = life.operate("delete", json!({"objects": [object]})).await;
    life.say(end["state"] == "succeeded", "and is deleted", &end);
    let end = life.operate("job", web(json!(["sleep", "100"]), 3)).await;
    life.say(
        is(&end, "failed", "timed_out", 0),
        "a job that takes too long is ended, and says so",
        &end,
    );
    let taken = life.begin("job", web(json!(["sleep", "1000"]), 600)).await;
    let id = taken["id"].as_str().unwrap_or_default().to_owned();
    life.runner.until(&id, TIME, |o| o["objects"][0]["outcome"] == "created").await;
    life.runner.call("DELETE", &format!("/api/v1/operations/{id}"), "", &Value::Null).await;
    let end = life.end(&taken).await;
    let job = format!("/k8s/apis/batch/v1/namespaces/production/jobs/web-job-{}", &id[2..12]);
    let mut gone = false;
    for _ in 0..100 {
        gone = life.get(&job).await.0 == 404;
        if gone {
            break;
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    life.say(gone && end["state"] == "cancelled", "a job that is cancelled does not go on", &end);
}

async fn config_sets(life: &mut Life) {
    let set = |kind: &'static str, data: Value| {
        (
            kind,
            json!({"action": "set", "namespace": "production", "name": "settings", "data": data}),
        )
    };
    for (kind, spec) in [
        set("secret", json!({"password": "first", "user": "me"})),
        set("configmap", json!({"level": "low"})),
    ] {
        let end = life.operate(kind, spec).await;
        life.say(end["state"] == "succeeded", &format!("a {kind} is set"), &end);
    }
    let uses = |a: &mut Value| {
        a["environment"] = json!({"PASSWORD": {"secret": "settings", "key": "password"},
            "LEVEL": {"config": "settings", "key": "level"}});
    };
    let end = life.deploy(uses).await;
    life.say(end["state"] == "succeeded", "and an application uses both", &end);
    let spec = json!({"namespace": "production", "name": "web", "timeout_s": 60,
        "command": ["sh", "-c", "echo $PASSWORD $LEVEL"]});
    let end = life.operate("job", spec.clone()).await;
    life.say(end["log"] == json!(["first low"]), "its command sees the values", &end);
    let (kind, rotated) = set("secret", json!({"password": "second"}));
    let end = life.operate(kind, rotated).await;
    let updated = end["objects"].as_array().is_some_and(|all| {
        all.iter().any(|o| o["object"] == "Deployment production/web" && o["outcome"] == "ready")
    });
    life.say(updated && end["state"] == "succeeded", "a rotation rolls out who uses it", &end);
    let end = life.operate("job", spec.clone()).await;
    life.say(end["log"] == json!(["second low"]), "which sees the new value", &end);
    let missing = |a: &mut Value| {
        a["environment"] = json!({"X": {"secret": "settings", "key": "none"}});
    };
    let end = life.deploy(missing).await;
    life.say(is(&end, "failed", "config_missing", 0), "a key that is not there is named", &end);
    let end = life.deploy(mode("6")).await;
    let env = life.deployment().await["spec"]["template"]["spec"]["containers"][0]["env"].clone();
    let gone = env == json!([{"name": "MODE", "value": "6"}]);
    life.say(
        gone && end["state"] == "succeeded",
        "without them it is deployed again",
        &json!([env, end]),
    );
    let end = life.operate("rollback", json!({"namespace": "production", "name": "web"})).await;
    life.say(end["state"] == "succeeded", "and brought back with them", &end);
    let end = life.operate("job", spec).await;
    life.say(end["log"] == json!(["second low"]), "with the secret of today", &end);
    for kind in ["secret", "configmap"] {
        let delete = json!({"action": "delete", "namespace": "production", "name": "settings"});
        let end = life.operate(kind, delete.clone()).await;
        life.say(end["reason"] == "in_use", &format!("a {kind} in use is not deleted"), &end);
    }
}
