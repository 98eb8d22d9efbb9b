//! Jobs at the control plane, as a Runner brings them: done with what their tokens give, once, and
//! refused with a code where anything is wrong.

mod hostile;
mod refused;
mod sealed;
mod stuck;

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use pipeops::agent::session::identity::Identity;
use pipeops::contract::job::{body_digest, idempotency_key};
use pipeops::contract::token::only_operation;
use pipeops::contract::types::tenant_operation_id;
use reqwest::Response;
use ring::signature::{Ed25519KeyPair, KeyPair as _};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use crate::control_plane::{ControlPlane, SimulatedAgent};
use crate::operations::{apply, deployment, texts, wait_for_state};
use crate::tenant_tokens::{Record, RecordingAgent, Seen, make, part, register};
use crate::world::{World, serve_kube};

/// What no answer and no log may show: it stands in specs.
const CANARY: &str = "planted-canary-2718-in-plain-text";

/// A control plane with an agent that writes down what it sees, a Runner that may do nothing by
/// itself, and somebody who makes jobs.
struct Jobs {
    control_plane: ControlPlane,
    agent: RecordingAgent,
    runner: String,
    runner_id: String,
    maker: String,
    maker_id: String,
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_else(|| panic!("no text: {value}")).to_owned()
}

/// A Runner that may bring jobs, and nothing else.
fn for_jobs(name: &str) -> Value {
    json!({"name": name, "role": "viewer", "namespaces": [], "jobs": true})
}

/// A restart that reveals itself where it is quoted.
fn restart(cluster: &str) -> Value {
    json!({"cluster": cluster, "kind": "restart",
        "spec": {"object": {"apiVersion": "apps/v1", "kind": "Deployment", "name": "web",
            "namespace": "beta"}, "note": CANARY}})
}

impl Jobs {
    async fn with(capabilities: &[&str], maker: Value) -> Jobs {
        let control_plane = ControlPlane::with(&[]);
        let agent = RecordingAgent::new(&control_plane, capabilities).await;
        let (runner_row, runner) = make(&control_plane, for_jobs("runner")).await;
        let (row, maker) = make(&control_plane, maker).await;
        let (runner_id, maker_id) = (text(&runner_row["id"]), text(&row["id"]));
        Jobs { control_plane, agent, runner, runner_id, maker, maker_id }
    }

    async fn new() -> Jobs {
        Jobs::with(&["tenants"], json!({"name": "maker", "role": "operator"})).await
    }

    /// A token for a body, with what else is asked for.
    async fn issued(&self, body: &str, more: Value) -> Value {
        let mut request = more;
        request["sha256"] = body_digest(body.as_bytes()).into();
        self.control_plane.json("POST", "/api/v1/job-tokens", &self.maker, request).await
    }

    async fn token(&self, body: &str) -> String {
        text(&self.issued(body, json!({})).await["token"])
    }

    async fn bring_as(&self, runner: &str, request: Value) -> (u16, Value) {
        answer_of(self.control_plane.ask("POST", "/api/v1/jobs", runner, request).await).await
    }

    async fn bring(&self, token: &str, body: &str) -> (u16, Value) {
        self.bring_as(&self.runner, json!({"token": token, "message": body})).await
    }

    async fn again(&self, token: &str, body: &str) -> (u16, Value) {
        let request = json!({"token": token, "message": body, "redelivered": true});
        self.bring_as(&self.runner, request).await
    }

    async fn shown(&self, id: &str) -> Value {
        self.control_plane.get(&format!("/api/v1/jobs/{id}"), &self.runner).await
    }

    /// A call that waits for the end of a job.
    fn waiting(&self, id: &str) -> tokio::task::JoinHandle<reqwest::Result<Response>> {
        let url = format!("{}/api/v1/jobs/{id}?wait_s=50", self.control_plane.url);
        tokio::spawn(self.control_plane.client.get(url).bearer_auth(&self.runner).send())
    }

    async fn answered(&self, id: &str) -> u16 {
        let path = format!("/api/v1/jobs/{id}/answered");
        self.control_plane.ask("POST", &path, &self.runner, json!({})).await.status().as_u16()
    }

    /// The agent reports the end of an operation.
    async fn end(&self, operation: &str, state: &str) {
        let end = json!({"id": operation, "kind": "restart", "state": state,
            "log": ["printed by a container"]});
        let path = format!("/api/v1/agents/{}/operations/{operation}/result", self.agent.id);
        self.control_plane.json("POST", &path, &self.agent.credential, end).await;
    }

    /// The operations that the agent was asked for.
    fn asked(&self) -> Vec<Seen> {
        let seen = self.agent.record.seen.lock().unwrap();
        seen.iter().filter(|seen| seen.line == "POST /api/v1/operations").cloned().collect()
    }

    /// Kills the control plane, starts it again, and waits for the agent.
    async fn killed(&mut self) {
        self.control_plane.kill_and_restart();
        let begun = Instant::now();
        while self.control_plane.version(&self.agent.cluster).await != 200 {
            assert!(begun.elapsed() < Duration::from_secs(40), "the agent does not come back");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    fn log(&self) -> String {
        self.control_plane.log.lock().unwrap().clone()
    }
}

async fn answer_of(answer: Response) -> (u16, Value) {
    (answer.status().as_u16(), answer.json().await.unwrap_or_default())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_is_done_as_its_maker_within_its_token_and_once() {
    let maker = json!({"name": "maker", "role": "operator", "namespaces": ["beta", "shop"]});
    let mut jobs = Jobs::with(&["tenants"], maker).await;
    let body = restart(&jobs.agent.cluster).to_string();
    let limits = json!({"role": "deployer", "namespaces": ["beta"], "ttl_s": 600});
    let issued = jobs.issued(&body, limits).await;
    let (token, id, project) =
        (text(&issued["token"]), text(&issued["id"]), text(&issued["project"]));
    assert_eq!(id.len(), 34, "{id}");
    assert_eq!(issued["exchange"], format!("pipeops.jobs.{project}"));
    assert_eq!(issued["reply_queue"], format!("pipeops.answers.{project}"));
    assert!(issued.get("sealing_key").is_none(), "{issued}");
    let head = part(&token, 0);
    assert_eq!((&head["alg"], &head["typ"]), (&json!("EdDSA"), &json!("pipeops-job+jwt")));

    // with nothing of the Runner's own rights, and nothing of the maker's beyond the token
    let (status, taken) = jobs.bring(&token, &body).await;
    assert_eq!((status, &taken["state"], &taken["id"]), (202, &json!("running"), &json!(id)));
    let operation = text(&taken["operation"]["id"]);
    assert_eq!(taken["operation"]["cluster_id"], jobs.agent.cluster);
    let claims = &jobs.asked()[0].claims;
    assert_eq!(
        (&claims["sub"], &claims["role"], &claims["namespaces"]),
        (&json!(jobs.maker_id), &json!("deployer"), &json!(["beta"]))
    );
    assert_eq!(operation, tenant_operation_id(&jobs.maker_id, None, &idempotency_key(&id)));

    // twice is once, whoever brings it and however
    for _ in 0..2 {
        for (status, same) in [jobs.bring(&token, &body).await, jobs.again(&token, &body).await] {
            assert_eq!((status, &same["operation"]["id"]), (202, &json!(operation)), "{same}");
        }
        assert_eq!(jobs.asked().len(), 1);
        jobs.killed().await;
    }
    assert_eq!(jobs.shown(&id).await["state"], "running");

    // who waits hears of the end at once
    let waiting = jobs.waiting(&id);
    tokio::time::sleep(Duration::from_millis(300)).await;
    let begun = Instant::now();
    jobs.end(&operation, "succeeded").await;
    let (status, ended) = answer_of(waiting.await.unwrap().unwrap()).await;
    assert!(begun.elapsed() < Duration::from_secs(3), "{:?}", begun.elapsed());
    assert_eq!((status, &ended["state"]), (200, &json!("succeeded")), "{ended}");
    assert_eq!((&ended["answered"], ended["operation"].get("log")), (&json!(false), None));
    // an answer that did not reach the broker is given again
    assert_eq!(jobs.again(&token, &body).await.1["state"], "succeeded");

    // and once it did, there is no other one
    for _ in 0..2 {
        assert_eq!(jobs.answered(&id).await, 204);
        let (status, again) = jobs.again(&token, &body).await;
        assert_eq!((status, &again["answered"]), (202, &json!(true)), "{again}");
        let (status, replayed) = jobs.bring(&token, &body).await;
        assert_eq!((status, &replayed["code"]), (409, &json!("replayed")), "{replayed}");
        jobs.killed().await;
    }
    assert_eq!(jobs.asked().len(), 1);
    let data = texts(&jobs.control_plane.sandbox.root().join(crate::control_plane::DATA));
    assert!(data.contains(&id) && !data.contains(CANARY));
    let log = jobs.log();
    assert!(!log.contains(CANARY) && !log.contains(&token), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn only_a_runner_of_the_project_brings_jobs_and_sees_them() {
    let jobs = Jobs::new().await;
    let control_plane = &jobs.control_plane;
    let body = restart(&jobs.agent.cluster).to_string();
    let issued = jobs.issued(&body, json!({})).await;
    let (token, id) = (text(&issued["token"]), text(&issued["id"]));
    let (_, eve) = make(control_plane, json!({"name": "eve", "person": true})).await;
    let (_, acme) = make(control_plane, json!({"name": "acme", "tenant": "acme"})).await;
    let path = format!("/api/v1/clusters/{}/kubeconfig", jobs.agent.cluster);
    let file = control_plane.ask("POST", &path, &jobs.maker, json!({})).await;
    let file: Value = serde_json::from_str(&file.text().await.unwrap()).unwrap();
    let kubeconfig = text(&file["users"][0]["user"]["token"]);
    let request = json!({"token": token, "message": body});
    let credential = &jobs.agent.credential;
    // a Runner of whatever role that was not made for it is none of them
    for other in [&eve, &acme, &kubeconfig, &control_plane.admin, credential, &jobs.maker] {
        let (status, refused) = jobs.bring_as(other, request.clone()).await;
        assert_eq!((status, &refused["code"]), (403, &json!("not_for_jobs")), "{refused}");
        for (method, path) in [
            ("GET", format!("/api/v1/jobs/{id}")),
            ("POST", format!("/api/v1/jobs/{id}/answered")),
            ("PUT", "/api/v1/sealing-key".to_owned()),
        ] {
            let answer = control_plane.ask(method, &path, other, json!({})).await;
            assert_eq!(answer.status(), 403, "{method} {path}");
        }
    }
    for (name, value) in [("person", json!(true)), ("tenant", json!("acme"))] {
        let mut odd = for_jobs("odd");
        odd[name] = value;
        let made = control_plane.ask("POST", "/api/v1/runners", &control_plane.admin, odd).await;
        let (status, refused) = answer_of(made).await;
        assert_eq!((status, &refused["code"]), (400, &json!("bad_jobs")), "{name}: {refused}");
    }
    let made = ["control-plane", "runner", "create", "by-hand", "--role", "viewer", "--jobs"];
    let by_hand = control_plane.sandbox.subcommand(&made).ended(0).out;
    assert_eq!(jobs.bring_as(by_hand.trim(), json!({})).await.0, 400);
    // the token of a job opens nothing by itself
    let (status, _) = jobs.bring_as(&token, request.clone()).await;
    assert_eq!(status, 401);
    assert_eq!(control_plane.try_get("/api/v1/clusters", &token).await.status(), 401);
    assert!(jobs.asked().is_empty());
    // one of another project does not learn that there is such a job
    let other = json!({"name": "other"});
    let other = control_plane.json("POST", "/api/v1/projects", &control_plane.admin, other).await;
    let (_, foreign) = make(control_plane, {
        let mut far = for_jobs("far");
        far["project"] = other["id"].clone();
        far
    })
    .await;
    assert_eq!(jobs.bring(&token, &body).await.0, 202);
    for (method, path) in
        [("GET", format!("/api/v1/jobs/{id}")), ("POST", format!("/api/v1/jobs/{id}/answered"))]
    {
        let answer = control_plane.ask(method, &path, &foreign, json!({})).await;
        let (status, refused) = answer_of(answer).await;
        assert_eq!((status, &refused["code"]), (404, &json!("job_unknown")), "{refused}");
    }
    assert_eq!(jobs.shown(&id).await["answered"], false);
    let wrong = format!("/api/v1/jobs/{id}?wait_s=61");
    assert_eq!(control_plane.try_get(&wrong, &jobs.runner).await.status(), 400);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_gives_no_more_than_its_maker_has_and_names_its_clusters() {
    let jobs = Jobs::new().await;
    let control_plane = &jobs.control_plane;
    let sha256 = body_digest(b"{}");
    let (_, deployer) = make(control_plane, json!({"name": "dep", "namespaces": ["beta"]})).await;
    let (_, viewer) = make(control_plane, json!({"name": "view", "role": "viewer"})).await;
    let nothing = control_plane.runner_for_nothing("nothing").await;
    let nothing = text(&nothing["token"]);
    let ask = async |token: &str, more: Value| {
        let mut request = more;
        request["sha256"] = sha256.as_str().into();
        let answer = control_plane.ask("POST", "/api/v1/job-tokens", token, request).await;
        let (status, answer) = answer_of(answer).await;
        (status, answer["code"].as_str().unwrap_or_default().to_owned())
    };
    let cluster = jobs.agent.cluster.as_str();
    for (token, more, expected) in [
        (&deployer, json!({"role": "operator"}), (403, "role_exceeded")),
        (&deployer, json!({"role": "viewer"}), (403, "role_exceeded")),
        (&deployer, json!({"role": "root"}), (400, "bad_role")),
        (&viewer, json!({}), (403, "role_exceeded")),
        (&deployer, json!({"namespaces": ["beta", "shop"]}), (403, "namespace_exceeded")),
        (&deployer, json!({"tenant": "acme"}), (403, "tenant_exceeded")),
        (&deployer, json!({"ttl_s": 86_401}), (400, "bad_ttl")),
        (&deployer, json!({"ttl_s": 0}), (400, "bad_ttl")),
        (&deployer, json!({"clusters": ["nope"]}), (404, "not_found")),
        (&deployer, json!({"clusters": []}), (400, "no_cluster_matches")),
        (&deployer, json!({"selector": "env=none"}), (400, "no_cluster_matches")),
        (&deployer, json!({"selector": "env=none,"}), (400, "bad_selector")),
        (&deployer, json!({"clusters": [cluster], "selector": "a"}), (400, "bad_job")),
        (&nothing, json!({"clusters": [cluster]}), (404, "not_found")),
        (&nothing, json!({}), (400, "no_cluster_matches")),
        (&control_plane.admin, json!({}), (400, "project_needed")),
        (&deployer, json!({"more": 1}), (400, "bad_body")),
    ] {
        assert_eq!(ask(token, more.clone()).await, (expected.0, expected.1.to_owned()), "{more}");
    }
    for wrong in ["", "abc", &sha256.to_uppercase(), &format!("{}g", &sha256[1..])] {
        let request = json!({"sha256": wrong});
        let answer = control_plane.ask("POST", "/api/v1/job-tokens", &deployer, request).await;
        assert_eq!(answer.status(), 400, "{wrong}");
    }
    // the ids, not what they were asked for by; all of them only for who reaches all
    for (more, clusters) in [
        (json!({}), Value::Null),
        (json!({"clusters": [cluster]}), json!([cluster])),
        (json!({"selector": format!("id in ({cluster},c-9)")}), json!([cluster])),
    ] {
        let issued = jobs.issued("{}", more).await;
        assert_eq!(part(&text(&issued["token"]), 1)["clusters"], clusters);
    }
    let some = json!({"name": "some", "clusters": [cluster], "ttl_s": 300});
    let (_, some) = make(control_plane, some).await;
    let request = json!({"sha256": sha256, "ttl_s": 86_400});
    let issued = control_plane.json("POST", "/api/v1/job-tokens", &some, request).await;
    let claims = part(&text(&issued["token"]), 1);
    assert_eq!(claims["clusters"], json!([cluster]));
    // and not longer than its maker
    let lives = claims["exp"].as_i64().unwrap() - claims["iat"].as_i64().unwrap();
    assert!((290..=300).contains(&lives), "{lives}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_waits_for_its_agent_goes_out_with_what_the_token_gave() {
    let control_plane = ControlPlane::with(&[]);
    let dir = tempfile::tempdir().unwrap();
    let identity: Arc<Identity> = SimulatedAgent::identity(dir.path()).into();
    let enrolment = control_plane.enrol().0;
    let registered = register(&control_plane, &identity, &enrolment, &["tenants"]).await;
    let cluster = registered.cluster_id.clone();
    let (_, runner) = make(&control_plane, for_jobs("runner")).await;
    let (row, maker) = make(&control_plane, json!({"name": "maker", "role": "operator"})).await;
    let (gone_row, gone) = make(&control_plane, json!({"name": "gone", "role": "operator"})).await;
    let mut body = restart(&cluster);
    body["ttl_s"] = 600.into();
    let body = body.to_string();
    let mut operations = Vec::new();
    for maker in [&maker, &gone] {
        let request = json!({"sha256": body_digest(body.as_bytes()), "role": "deployer",
            "namespaces": ["beta"], "clusters": [cluster]});
        let issued = control_plane.json("POST", "/api/v1/job-tokens", maker, request).await;
        let request = json!({"token": issued["token"], "message": body, "direct": true});
        let taken = control_plane.json("POST", "/api/v1/jobs", &runner, request).await;
        assert_eq!((&taken["state"], taken.get("direct")), (&json!("queued"), None), "{taken}");
        operations.push(text(&taken["operation"]["id"]));
    }
    let revoke = ["control-plane", "runner", "revoke", gone_row["id"].as_str().unwrap()];
    control_plane.sandbox.subcommand(&revoke).ended(0);
    let mut control_plane = control_plane;
    control_plane.kill_and_restart();
    let (of_tunnel, record) = ((identity, registered), Arc::new(Record::default()));
    let agent = RecordingAgent::connect(&control_plane, of_tunnel, record, dir).await;
    let admin = control_plane.admin.clone();
    wait_for_state(&control_plane, &cluster, &admin, &operations[0], "running").await;
    let failed = wait_for_state(&control_plane, &cluster, &admin, &operations[1], "failed").await;
    assert!(failed["message"].as_str().unwrap().contains("may not do this any more"), "{failed}");
    let seen = agent.record.last("POST /api/v1/operations");
    assert_eq!(
        (&seen.claims["sub"], &seen.claims["role"], &seen.claims["namespaces"]),
        (&row["id"], &json!("deployer"), &json!(["beta"]))
    );
    assert_eq!(seen.body["spec"]["note"], CANARY);
    let posts = agent.record.seen.lock().unwrap();
    let posts = posts.iter().filter(|seen| seen.line == "POST /api/v1/operations");
    assert_eq!(posts.count(), 1);
}

/// Between the row of the job and the answer of the agent anything may die.
#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_was_cut_off_is_done_when_it_comes_again() {
    let mut jobs = Jobs::new().await;
    let body = restart(&jobs.agent.cluster).to_string();
    let issued = jobs.issued(&body, json!({})).await;
    let (token, id) = (text(&issued["token"]), text(&issued["id"]));
    let busy = json!({"code": "kubernetes_waiting", "message": CANARY});
    let plant = ("POST /api/v1/operations", 503, busy);
    jobs.agent.record.planted.lock().unwrap().push(plant);
    let (status, refused) = jobs.bring(&token, &body).await;
    assert_eq!((status, &refused["code"]), (503, &json!("kubernetes_waiting")), "{refused}");
    assert!(!refused.to_string().contains(CANARY), "{refused}");
    assert_eq!(jobs.shown(&id).await["state"], "running");
    jobs.killed().await;
    jobs.agent.record.planted.lock().unwrap().clear();
    let (status, taken) = jobs.again(&token, &body).await;
    assert_eq!((status, &taken["state"]), (202, &json!("running")), "{taken}");
    // the control plane knows nothing of what the agent has: under the same key it is the same
    let keys: Vec<Value> = jobs.asked().iter().map(|seen| seen.claims["sub"].clone()).collect();
    assert_eq!(keys, vec![json!(jobs.maker_id); 2]);
    let expected = tenant_operation_id(&jobs.maker_id, None, &idempotency_key(&id));
    assert_eq!(taken["operation"]["id"], expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_runner_that_is_revoked_waits_no_longer_and_another_goes_on() {
    let jobs = Jobs::new().await;
    let body = restart(&jobs.agent.cluster).to_string();
    let issued = jobs.issued(&body, json!({})).await;
    let (token, id) = (text(&issued["token"]), text(&issued["id"]));
    let (_, taken) = jobs.bring(&token, &body).await;
    let waiting = jobs.waiting(&id);
    tokio::time::sleep(Duration::from_millis(500)).await;
    let begun = Instant::now();
    let revoke = ["control-plane", "runner", "revoke", &jobs.runner_id];
    jobs.control_plane.sandbox.subcommand(&revoke).ended(0);
    let (status, refused) = answer_of(waiting.await.unwrap().unwrap()).await;
    assert_eq!((status, &refused["code"]), (401, &json!("token_unknown")), "{refused}");
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    assert_eq!(jobs.bring(&token, &body).await.0, 401);
    let (_, second) = make(&jobs.control_plane, for_jobs("second")).await;
    let request = json!({"token": token, "message": body, "redelivered": true});
    let (status, same) = jobs.bring_as(&second, request).await;
    assert_eq!((status, &same["operation"]["id"]), (202, &taken["operation"]["id"]), "{same}");
    assert_eq!(jobs.asked().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_job_of_a_tenant_stays_in_the_tenant() {
    let maker = json!({"name": "maker", "tenant": "acme", "person": true});
    let jobs = Jobs::with(&["tenants"], maker).await;
    let body = restart(&jobs.agent.cluster).to_string();
    let (status, taken) = jobs.bring(&jobs.token(&body).await, &body).await;
    assert_eq!((status, &taken["operation"]["subject"]), (202, &json!("user:maker")), "{taken}");
    let seen = &jobs.asked()[0];
    assert_eq!((&seen.claims["tenant"], &seen.head["tenant"]), (&json!("acme"), &json!("acme")));
    assert_eq!(seen.claims["namespaces"], Value::Null);
    let expected = |key: &str| tenant_operation_id("user:maker", Some("acme"), key);
    assert_eq!(taken["operation"]["id"], expected(&idempotency_key(&text(&taken["id"]))));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_runner_that_goes_to_the_agent_itself_may_do_that_one_thing_there() {
    let jobs = Jobs::with(&["operation_tokens"], json!({"name": "maker", "role": "admin"})).await;
    let body = restart(&jobs.agent.cluster).to_string();
    let token = jobs.token(&body).await;
    let request = json!({"token": token, "message": body, "direct": true});
    let (status, taken) = jobs.bring_as(&jobs.runner, request.clone()).await;
    assert_eq!((status, &taken["state"]), (202, &json!("running")), "{taken}");
    let direct = &taken["direct"];
    let key = idempotency_key(&text(&taken["id"]));
    let operation = tenant_operation_id(&jobs.maker_id, None, &key);
    assert_eq!((&direct["key"], &direct["operation_id"]), (&json!(key), &json!(operation)));
    let posted: Value = serde_json::from_str(direct["body"].as_str().unwrap()).unwrap();
    assert_eq!(posted["spec"]["note"], CANARY);
    // for this operation with this body, and whoever does not know that refuses it
    let only = only_operation(&operation, &body_digest(text(&direct["body"]).as_bytes()));
    let (head, claims) = (part(&text(&direct["token"]), 0), part(&text(&direct["token"]), 1));
    assert_eq!((&head["crit"], &head["operation"]), (&json!(["operation"]), &json!(only)));
    assert_eq!((&claims["operation"], &claims["sub"]), (&json!(only), &json!(jobs.maker_id)));
    // through the tunnel it comes as itself
    let proxy = text(&direct["endpoints"][1]["proxy"]);
    assert!(proxy.ends_with(&jobs.runner_id) && !proxy.contains(&jobs.maker_id), "{proxy}");
    assert!(jobs.asked().is_empty(), "the control plane does nothing then");
    // what the agent reports is the end of the job
    let id = text(&taken["id"]);
    jobs.end(&operation, "failed").await;
    assert_eq!(jobs.shown(&id).await["state"], "failed");
    let (_, again) = jobs.bring_as(&jobs.runner, request.clone()).await;
    assert_eq!((&again["state"], again.get("direct")), (&json!("failed"), None), "{again}");

    // a Runner that does not reach the cluster itself, and an agent of a version before
    let dir = tempfile::tempdir().unwrap();
    let enrolment = jobs.control_plane.enrol().0;
    let other = SimulatedAgent::new(&jobs.control_plane, dir.path(), &enrolment).await;
    let mut elsewhere = for_jobs("elsewhere");
    elsewhere["clusters"] = json!([jobs.control_plane.cluster_of(&other).await["id"]]);
    let (_, elsewhere) = make(&jobs.control_plane, elsewhere).await;
    let second = jobs.token(&body).await;
    let mut request = json!({"token": second, "message": body, "direct": true});
    let (status, taken) = jobs.bring_as(&elsewhere, request.clone()).await;
    assert_eq!((status, taken.get("direct"), jobs.asked().len()), (202, None, 1), "{taken}");
    let old = Jobs::new().await;
    let body = restart(&old.agent.cluster).to_string();
    (request["token"], request["message"]) = (old.token(&body).await.into(), body.into());
    let (status, taken) = old.bring_as(&old.runner, request).await;
    assert_eq!((status, taken.get("direct"), old.asked().len()), (202, None, 1), "{taken}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_takes_a_token_for_one_operation_for_nothing_else() {
    let world = World::new().await.up().await;
    world.kube.ready.store(true, Relaxed);
    let body = apply(&[deployment("web")]);
    let id = tenant_operation_id("runner-1", None, "job/j-1");
    let only = only_operation(&id, &body_digest(body.to_string().as_bytes()));
    let token = world.control_plane.token_for_operation(&world.id, &only);
    let (_, other) =
        world.operate(&world.token("deployer"), "k", &apply(&[deployment("other")])).await;
    let other = text(&other["id"]);
    let before = world.kube.through().len();
    for (key, body) in [("job/j-1", apply(&[deployment("more")])), ("job/j-2", body.clone())] {
        let (status, refused) = world.operate(&token, key, &body).await;
        assert_eq!((status, &refused["code"]), (403, &json!("operation_exceeded")), "{refused}");
    }
    for path in [
        "/k8s/version",
        "/k8s/api/v1/namespaces/beta/pods",
        "/api/v1/status",
        "/api/v1/audit",
        "/metrics",
        "/readyz",
    ] {
        assert_eq!(world.call("GET", path, &token, "", "").await.0, 403, "{path}");
    }
    let path = |id: &str| format!("/api/v1/operations/{id}");
    for method in ["GET", "DELETE"] {
        assert_eq!(world.call(method, &path(&other), &token, "", "").await.0, 404);
    }
    let (_, list) = world.call("GET", "/api/v1/operations", &token, "", "").await;
    assert_eq!(list["items"], json!([]));
    assert_eq!(world.ended(&world.token("deployer"), &other).await["state"], "succeeded");
    let (status, taken) = world.operate(&token, "job/j-1", &body).await;
    assert_eq!((status, &taken["id"]), (202, &json!(id)), "{taken}");
    assert_eq!(world.ended(&token, &id).await["state"], "succeeded");
    assert_eq!(world.operate(&token, "job/j-1", &body).await.0, 200);
    assert!(world.kube.through().len() > before);
}

/// Through the real agent, from the token to the cluster, for one and for all.
#[tokio::test(flavor = "multi_thread")]
async fn a_job_changes_the_cluster_and_a_rollout_is_one_too() {
    let control_plane = ControlPlane::with(&[]);
    let (kube, address) = serve_kube().await;
    kube.ready.store(true, Relaxed);
    let (_agent, cluster) = control_plane.agent(address).await;
    let (_, runner) = make(&control_plane, for_jobs("runner")).await;
    let (_, maker) = make(&control_plane, json!({"name": "maker"})).await;
    let done = async |job: Value, opened: Value| {
        let body = job.to_string();
        let request = json!({"sha256": body_digest(body.as_bytes())});
        let issued = control_plane.json("POST", "/api/v1/job-tokens", &maker, request).await;
        let request = json!({"token": issued["token"], "message": body, "opened": opened});
        let taken = control_plane.json("POST", "/api/v1/jobs", &runner, request).await;
        let path = format!("/api/v1/jobs/{}?wait_s=30", text(&taken["id"]));
        control_plane.get(&path, &runner).await
    };
    let mut job = apply(&[deployment("web")]);
    job["cluster"] = cluster.as_str().into();
    let ended = done(job, json!({})).await;
    assert_eq!(ended["state"], "succeeded", "{ended}");
    // a value that came sealed is in the Secret, and nowhere else
    let sealed = STANDARD.encode([7; 64]);
    let mut job = apply(&[json!({"apiVersion": "v1", "kind": "Secret",
        "metadata": {"name": "s", "namespace": "beta"},
        "stringData": {"password": {"sealed": sealed}}})]);
    job["cluster"] = cluster.as_str().into();
    let ended = done(job, json!({ &sealed: CANARY })).await;
    assert_eq!(ended["state"], "succeeded", "{ended}");
    let objects = kube.objects.lock().unwrap().clone();
    let secret = &objects["/api/v1/namespaces/beta/secrets/s"];
    assert_eq!(secret["stringData"]["password"], CANARY);
    assert!(!ended.to_string().contains(CANARY), "{ended}");
    assert!(!control_plane.log.lock().unwrap().contains(CANARY));
    // of many clusters, here of one
    for target in [json!({"all": true}), json!({"clusters": [cluster], "waves": "1,all"})] {
        let mut job = apply(&[deployment("wide")]);
        for (name, value) in target.as_object().unwrap() {
            job[name] = value.clone();
        }
        let ended = done(job, json!({})).await;
        assert_eq!((&ended["state"], ended.get("operation")), (&json!("succeeded"), None));
        assert_eq!(ended["rollout"]["counts"]["succeeded"], 1, "{ended}");
        assert_eq!(ended["rollout"]["clusters"][0]["id"], cluster, "{ended}");
    }
}

/// A key of the test's own, or the one that the control plane signs with, and its id.
struct Signer(Ed25519KeyPair);

impl Signer {
    fn genuine(control_plane: &ControlPlane) -> Signer {
        let stored = ControlPlane::stored(&control_plane.sandbox);
        let pkcs8 = URL_SAFE_NO_PAD.decode(stored["signing"][0].as_str().unwrap()).unwrap();
        Signer(Ed25519KeyPair::from_pkcs8(&pkcs8).unwrap())
    }

    fn other() -> Signer {
        let random = ring::rand::SystemRandom::new();
        let pkcs8 = Ed25519KeyPair::generate_pkcs8(&random).unwrap();
        Signer(Ed25519KeyPair::from_pkcs8(pkcs8.as_ref()).unwrap())
    }

    fn kid(&self) -> String {
        URL_SAFE_NO_PAD.encode(&Sha256::digest(self.0.public_key().as_ref())[..9])
    }

    fn sign(&self, head: &Value, claims: &Value) -> String {
        let part = |v: &Value| URL_SAFE_NO_PAD.encode(v.to_string());
        let signed = format!("{}.{}", part(head), part(claims));
        format!("{signed}.{}", URL_SAFE_NO_PAD.encode(self.0.sign(signed.as_bytes())))
    }
}
