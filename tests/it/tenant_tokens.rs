//! Tokens of tenants at the control plane: what reaches an agent with them, and that nothing of one
//! tenant is told to another.

use std::convert::Infallible;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use http_body_util::{BodyExt as _, Full};
use hyper::body::{Bytes, Incoming};
use hyper_util::rt::TokioIo;
use pipeops::agent::session::identity::Identity;
use pipeops::contract::types::{Registered, tenant_operation_id};
use pipeops::control_plane::routes::{RequiredAuth, Route};
use pipeops::frp::TunnelState;
use serde_json::{Value, json};
use tokio_rustls::TlsAcceptor;

use crate::control_plane::{ControlPlane, SimulatedAgent};
use crate::operations::{submit, wait_for_state};
use crate::tunnel::Frpc;

/// A request that reached an agent.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    /// Method, path and query.
    pub(crate) line: String,
    /// That of the caller's token.
    pub(crate) head: Value,
    /// Those of the caller's token.
    pub(crate) claims: Value,
    pub(crate) body: Value,
}

/// What an agent with a tunnel has seen, and what it answers below `/k8s`, by a part of the line.
#[derive(Default)]
pub(crate) struct Record {
    pub(crate) seen: Mutex<Vec<Seen>>,
    pub(crate) planted: Mutex<Vec<(&'static str, u16, Value)>>,
}

impl Record {
    /// The last request whose line holds `part`.
    pub(crate) fn last(&self, part: &str) -> Seen {
        let seen = self.seen.lock().unwrap();
        let found = seen.iter().rfind(|seen| seen.line.contains(part)).cloned();
        found.unwrap_or_else(|| panic!("no {part} in {seen:?}"))
    }

    fn answer(&self, seen: &Seen, key: &str) -> (u16, Value) {
        let planted = self.planted.lock().unwrap();
        if let Some((_, status, answer)) = planted.iter().find(|p| seen.line.contains(p.0)) {
            return (*status, answer.clone());
        }
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        match seen.line.split_once(' ').unwrap() {
            ("POST", "/api/v1/operations") => {
                let (subject, tenant) = (text(&seen.claims["sub"]), seen.claims["tenant"].as_str());
                let id = tenant_operation_id(&subject, tenant, key);
                // one of a tenant is done at once
                let state = if seen.body["kind"] == "tenant" { "succeeded" } else { "running" };
                let kind = &seen.body["kind"];
                let operation = json!({"id": id, "kind": kind, "state": state,
                    "subject": subject, "created_at": "2026-01-01T00:00:00Z"});
                (202, operation)
            }
            ("DELETE", path) if path.starts_with("/api/v1/operations/") => {
                (200, json!({"id": path.rsplit('/').next(), "state": "cancelled"}))
            }
            (_, path) if path.starts_with("/k8s") => (200, json!({"kind": "List", "items": []})),
            _ => (404, json!({"code": "not_found", "message": "there is no such path"})),
        }
    }
}

/// An agent that registers with these capabilities, holds a tunnel, and writes down what it sees.
pub(crate) struct RecordingAgent {
    pub(crate) id: String,
    pub(crate) cluster: String,
    pub(crate) credential: String,
    pub(crate) record: Arc<Record>,
    identity: Arc<Identity>,
    _tunnel: Frpc,
    _dir: tempfile::TempDir,
}

fn registration(identity: &Identity, capabilities: &[&str]) -> String {
    let mut body: Value = serde_json::from_str(&SimulatedAgent::body(identity, "m")).unwrap();
    body["capabilities"] = json!(capabilities);
    body.to_string()
}

pub(crate) async fn register(
    control_plane: &ControlPlane,
    identity: &Identity,
    token: &str,
    capabilities: &[&str],
) -> Registered {
    let (client, url) = (&control_plane.client, &control_plane.url);
    let body = registration(identity, capabilities);
    let answer = SimulatedAgent::try_register(client, url, identity, token, body).await.unwrap();
    let (status, text) = (answer.status(), answer.text().await.unwrap());
    assert_eq!(status, 200, "{text}");
    serde_json::from_str(&text).unwrap()
}

impl RecordingAgent {
    pub(crate) async fn new(control_plane: &ControlPlane, capabilities: &[&str]) -> RecordingAgent {
        let dir = tempfile::tempdir().unwrap();
        let identity: Arc<Identity> = SimulatedAgent::identity(dir.path()).into();
        let token = control_plane.enrol().0;
        let registered = register(control_plane, &identity, &token, capabilities).await;
        let record = Arc::new(Record::default());
        RecordingAgent::connect(control_plane, (identity, registered), record, dir).await
    }

    /// One that has registered opens its tunnel.
    pub(crate) async fn connect(
        control_plane: &ControlPlane,
        (identity, registered): (Arc<Identity>, Registered),
        record: Arc<Record>,
        dir: tempfile::TempDir,
    ) -> RecordingAgent {
        let settings = registered.config.tunnel.clone().unwrap();
        let (mut tunnel, mut streams) = Frpc::insecure(settings, "", false);
        let acceptor = TlsAcceptor::from(Arc::new(identity.tls_config().unwrap()));
        tokio::spawn({
            let record = record.clone();
            async move {
                while let Some(stream) = streams.recv().await {
                    let (acceptor, record) = (acceptor.clone(), record.clone());
                    tokio::spawn(async move {
                        let Ok(tls) = acceptor.accept(stream.io).await else { return };
                        let service = hyper::service::service_fn(move |request| {
                            answer(record.clone(), request)
                        });
                        let _ = hyper::server::conn::http1::Builder::new()
                            .serve_connection(TokioIo::new(tls), service)
                            .await;
                    });
                }
            }
        });
        tunnel.until(TunnelState::Up).await;
        let begun = Instant::now();
        while control_plane.version(&registered.cluster_id).await != 200 {
            assert!(begun.elapsed() < Duration::from_secs(20), "the tunnel leads nowhere");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        RecordingAgent {
            id: identity.id.clone(),
            cluster: registered.cluster_id,
            credential: registered.credential.expose().to_owned(),
            record,
            identity,
            _tunnel: tunnel,
            _dir: dir,
        }
    }

    /// It comes back as another version of the program.
    async fn register_again(&mut self, control_plane: &ControlPlane, capabilities: &[&str]) {
        let again = register(control_plane, &self.identity, &self.credential, capabilities).await;
        self.credential = again.credential.expose().to_owned();
    }
}

async fn answer(
    record: Arc<Record>,
    request: hyper::Request<Incoming>,
) -> Result<hyper::Response<Full<Bytes>>, Infallible> {
    let header = |name: &str| {
        let value = request.headers().get(name).and_then(|value| value.to_str().ok());
        value.unwrap_or_default().to_owned()
    };
    let (token, key) = (header("authorization"), header("idempotency-key"));
    let line = format!("{} {}", request.method(), request.uri().path_and_query().unwrap());
    let body = request.into_body().collect().await.map(|body| body.to_bytes()).unwrap_or_default();
    let body = serde_json::from_slice(&body).unwrap_or_default();
    let token = token.trim_start_matches("Bearer ");
    let seen = Seen { line, head: part(token, 0), claims: claims(token), body };
    let (status, answer) = record.answer(&seen, &key);
    record.seen.lock().unwrap().push(seen);
    let answer = hyper::Response::builder()
        .status(status)
        .header("content-type", "application/json")
        .body(Full::new(Bytes::from(answer.to_string())));
    Ok(answer.unwrap())
}

/// What a token says of its caller; nothing of a request that has none.
pub(crate) fn claims(token: &str) -> Value {
    part(token, 1)
}

/// The head of a token, or its claims.
pub(crate) fn part(token: &str, number: usize) -> Value {
    let part = token.split('.').nth(number).unwrap_or_default();
    serde_json::from_slice(&URL_SAFE_NO_PAD.decode(part).unwrap_or_default()).unwrap_or_default()
}

/// A new Runner or user, and its token.
pub(crate) async fn make(control_plane: &ControlPlane, body: Value) -> (Value, String) {
    let made = control_plane.json("POST", "/api/v1/runners", &control_plane.admin, body).await;
    let token = made["token"].as_str().unwrap().to_owned();
    (made, token)
}

async fn code(answer: reqwest::Response) -> (u16, String) {
    let status = answer.status().as_u16();
    let body: Value = answer.json().await.unwrap_or_default();
    let code = [&body["code"], &body["details"]["causes"][0]["reason"]];
    let code = code.into_iter().find_map(Value::as_str).unwrap_or_default().to_owned();
    (status, code)
}

fn tenant_and_namespaces(claims: &Value) -> (&Value, &Value) {
    (&claims["tenant"], &claims["namespaces"])
}

#[tokio::test(flavor = "multi_thread")]
async fn what_asks_with_a_token_of_a_tenant_reaches_the_agent_with_its_name() {
    let control_plane = ControlPlane::with(&[]);
    let agent = RecordingAgent::new(&control_plane, &["tenants"]).await;
    let cluster = &agent.cluster;
    let (made, acme) = make(&control_plane, json!({"name": "ci", "tenant": "acme"})).await;
    assert_eq!((&made["tenant"], &made["namespaces"]), (&json!("acme"), &json!([])));
    let (_, all) = make(&control_plane, json!({"name": "all", "role": "operator"})).await;
    let pods = format!("/clusters/{cluster}/k8s/api/v1/namespaces/shop/pods");
    let seen_with = async |token: &str| {
        assert_eq!(control_plane.try_get(&pods, token).await.status(), 200);
        agent.record.last("/namespaces/shop/pods").claims
    };
    let none = Value::Null;
    let seen = seen_with(&acme).await;
    assert_eq!(tenant_and_namespaces(&seen), (&json!("acme"), &none));
    assert_eq!(seen["role"], "deployer");
    // who does not know what a tenant is has to refuse it
    let head = agent.record.last("/namespaces/shop/pods").head;
    assert_eq!((&head["crit"], &head["tenant"]), (&json!(["tenant"]), &json!("acme")));
    assert_eq!(tenant_and_namespaces(&seen_with(&all).await), (&none, &none));
    let head = agent.record.last("/namespaces/shop/pods").head;
    assert_eq!((&head["crit"], &head["tenant"], &head["alg"]), (&none, &none, &json!("EdDSA")));

    // a kubeconfig and a token for the agent itself have the same limits, or more of them
    let kubeconfig = async |token: &str, body: Value| {
        let path = format!("/api/v1/clusters/{cluster}/kubeconfig");
        let answer = control_plane.ask("POST", &path, token, body).await;
        let file: Value = serde_json::from_str(&answer.text().await.unwrap()).unwrap();
        file["users"][0]["user"]["token"].as_str().unwrap_or_default().to_owned()
    };
    let (one, two) = (json!("acme"), json!(["shop"]));
    for (token, body, namespaces) in [
        (&acme, json!({}), &none),
        (&acme, json!({"namespaces": []}), &none),
        (&acme, json!({"tenant": "acme", "namespaces": ["shop"]}), &two),
        (&control_plane.admin, json!({"tenant": "acme"}), &none),
        (&control_plane.admin, json!({"tenant": "acme", "namespaces": ["shop"]}), &two),
    ] {
        let seen = seen_with(&kubeconfig(token, body.clone()).await).await;
        assert_eq!(tenant_and_namespaces(&seen), (&one, namespaces), "{body}");
        let path = format!("/api/v1/clusters/{cluster}/token");
        let direct = control_plane.json("POST", &path, token, body.clone()).await;
        let head = part(direct["token"].as_str().unwrap(), 0);
        assert_eq!((&head["crit"], &head["tenant"]), (&json!(["tenant"]), &one), "{body}");
        let direct = claims(direct["token"].as_str().unwrap());
        assert_eq!(tenant_and_namespaces(&direct), (&one, namespaces), "{body}");
    }
    for what in ["token", "kubeconfig"] {
        let path = format!("/api/v1/clusters/{cluster}/{what}");
        let ask =
            async |body: Value| code(control_plane.ask("POST", &path, &acme, body).await).await;
        assert_eq!(ask(json!({"tenant": "globex"})).await, (403, "tenant_exceeded".into()));
        // a tenant's namespaces are no part of what a token of the project reaches
        let entered = control_plane.ask("POST", &path, &all, json!({"tenant": "acme"})).await;
        assert_eq!(code(entered).await, (403, "tenant_exceeded".into()));
        assert_eq!(ask(json!({"tenant": "A/b"})).await, (400, "bad_name".into()));
        assert_eq!(ask(json!({"role": "operator"})).await, (403, "role_exceeded".into()));
    }
    let bad = json!({"name": "bad", "tenant": "x".repeat(41)});
    let bad = control_plane.ask("POST", "/api/v1/runners", &control_plane.admin, bad).await;
    assert_eq!(code(bad).await, (400, "bad_name".into()));

    // after a restart as before it
    let mut control_plane = control_plane;
    control_plane.kill_and_restart();
    let path = format!("/api/v1/clusters/{cluster}/token");
    let again = control_plane.json("POST", &path, &acme, json!({})).await;
    assert_eq!(claims(again["token"].as_str().unwrap())["tenant"], "acme");
}

#[tokio::test(flavor = "multi_thread")]
async fn no_operation_of_one_tenant_is_told_to_another() {
    let control_plane = ControlPlane::with(&[]);
    let agent = RecordingAgent::new(&control_plane, &["tenants"]).await;
    let cluster = &agent.cluster;
    let operator =
        |name: &str, tenant: Value| json!({"name": name, "tenant": tenant, "role": "operator"});
    let (_, acme) = make(&control_plane, operator("acme-1", json!("acme"))).await;
    let (_, beside) = make(&control_plane, operator("acme-2", json!("acme"))).await;
    let (_, globex) = make(&control_plane, operator("globex", json!("globex"))).await;
    let (_, all) = make(&control_plane, operator("all", Value::Null)).await;
    let body = json!({"kind": "restart", "spec": {}});
    let begin = async |token: &str| {
        let (status, taken) = submit(&control_plane, cluster, token, "k-1", &body).await;
        assert_eq!(status, 202, "{taken}");
        taken["id"].as_str().unwrap().to_owned()
    };
    let mut mine = [begin(&acme).await, begin(&beside).await];
    assert_eq!(agent.record.last("POST /api/v1/operations").claims["tenant"], "acme");
    let (theirs, everybodys) = (begin(&globex).await, begin(&all).await);
    mine.sort();
    let path = format!("/api/v1/clusters/{cluster}/operations");
    let listed = async |token: &str| {
        let list = control_plane.get(&path, token).await;
        let items = list["items"].as_array().unwrap().iter();
        let mut ids: Vec<_> = items.map(|o| o["id"].as_str().unwrap().to_owned()).collect();
        ids.sort();
        ids
    };
    assert_eq!(listed(&acme).await, mine);
    assert_eq!(listed(&globex).await, std::slice::from_ref(&theirs));
    assert_eq!(listed(&all).await.len(), 4);
    // what is another's is not there, in the same words as what nobody has
    let absent = format!("o-{}", "0".repeat(32));
    let told = async |method: &str, token: &str, id: &str| {
        let answer = control_plane.ask(method, &format!("{path}/{id}"), token, json!({})).await;
        (answer.status().as_u16(), answer.text().await.unwrap().replace(id, "ID"))
    };
    for method in ["GET", "DELETE"] {
        let nobodys = told(method, &globex, &absent).await;
        assert_eq!(nobodys.0, 404);
        for id in mine.iter().chain([&everybodys]) {
            assert_eq!(told(method, &globex, id).await, nobodys, "{method}");
        }
        assert_eq!(told(method, &acme, &theirs).await, nobodys);
    }
    // nor when it has ended, and then its own sees the end
    let end =
        json!({"id": mine[0], "kind": "restart", "state": "failed", "log": ["of acme alone"]});
    let result = format!("/api/v1/agents/{}/operations/{}/result", agent.id, mine[0]);
    control_plane.json("POST", &result, &agent.credential, end).await;
    assert!(told("GET", &acme, &mine[0]).await.1.contains("of acme alone"));
    assert_eq!(told("GET", &globex, &mine[0]).await.0, 404);
    assert_eq!(told("DELETE", &globex, &theirs).await.0, 200);
    assert_eq!(agent.record.last("DELETE /api/v1/operations").claims["tenant"], "globex");

    // a name that is given again in another tenant brings nothing along
    let eve = |tenant: &str| json!({"name": "eve", "tenant": tenant, "person": true});
    let (_, former) = make(&control_plane, eve("acme")).await;
    let before = begin(&former).await;
    control_plane.sandbox.subcommand(&["control-plane", "user", "revoke", "eve"]).ended(0);
    let (_, later) = make(&control_plane, eve("globex")).await;
    assert!(listed(&later).await.is_empty());
    assert_eq!(told("GET", &later, &before).await.0, 404);
    assert_ne!(begin(&later).await, before);

    // what was asked for at the agent itself is of the tenant that the agent names
    let id = format!("o-{}", "a".repeat(32));
    let end = json!({"id": id, "kind": "restart", "state": "failed", "tenant": "acme",
        "subject": "r-x"});
    let result = format!("/api/v1/agents/{}/operations/{id}/result", agent.id);
    control_plane.json("POST", &result, &agent.credential, end).await;
    assert_eq!(told("GET", &acme, &id).await.0, 200);
    assert_eq!(told("GET", &globex, &id).await.0, 404);
}

#[tokio::test(flavor = "multi_thread")]
async fn of_a_cluster_a_tenant_hears_where_it_is_and_nothing_that_goes_on_there() {
    let control_plane = ControlPlane::with(&[]);
    let agent = RecordingAgent::new(&control_plane, &["tenants"]).await;
    let (_, acme) = make(&control_plane, json!({"name": "acme", "tenant": "acme"})).await;
    let report = json!({"at": "2026-01-01T00:00:00Z", "kubernetes": "waiting",
        "reason": "of the whole cluster", "namespaces": ["of-somebody-else"],
        "nodes": [{"name": "node-of-everybody", "ready": true, "role": "server",
            "version": "v1.36.2+k3s1", "address": "10.0.0.1", "note": ""}]});
    let status = format!("/api/v1/agents/{}/status", agent.id);
    control_plane.json("POST", &status, &agent.credential, report).await;
    let one = format!("/api/v1/clusters/{}", agent.cluster);
    let secrets =
        ["of the whole cluster", "of-somebody-else", "node-of-everybody", "\"nodes\"", "report"];
    let seen = control_plane.get(&one, &control_plane.admin).await.to_string();
    assert!(secrets.iter().all(|part| seen.contains(part)), "{seen}");
    let list = control_plane.get("/api/v1/clusters", &acme).await;
    assert_eq!((&list["tenant"], &list["items"][0]["name"]), (&json!("acme"), &json!("n")));
    assert_eq!(list["items"][0]["version"], "v1.36.2+k3s1");
    let mut changes = control_plane.try_get("/api/v1/changes", &acme).await;
    let first = changes.chunk().await.unwrap().unwrap();
    let first = String::from_utf8(first.to_vec()).unwrap();
    assert!(first.contains(&agent.cluster), "{first}");
    for told in [list.to_string(), control_plane.get(&one, &acme).await.to_string(), first] {
        assert!(!secrets.iter().any(|part| told.contains(part)), "{told}");
    }

    // every other route is for others
    for Route { method, path, required_auth } in pipeops::control_plane::routes::table() {
        let may = matches!(
            required_auth,
            RequiredAuth::None | RequiredAuth::Runner | RequiredAuth::Gateway
        );
        if may {
            continue;
        }
        let path =
            path.replace("{id}", &agent.cluster).replace("{op}", "o-1").replace("{what}", "events");
        let answer = control_plane.ask(method, &path, &acme, json!({})).await;
        let status = answer.status().as_u16();
        assert!(matches!(status, 401 | 403), "{method} {path}: {status}");
    }
    // nor has it the page, by which whole clusters are looked at
    let page = control_plane.ask("POST", "/session", "", json!({"token": acme})).await;
    assert_eq!(code(page).await, (403, "forbidden".into()));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_would_not_see_to_tenants_gets_no_token_of_one() {
    let control_plane = ControlPlane::with(&[]);
    let mut agent = RecordingAgent::new(&control_plane, &["operations"]).await;
    let cluster = agent.cluster.clone();
    let (_, acme) = make(&control_plane, json!({"name": "acme", "tenant": "acme"})).await;
    let (_, all) = make(&control_plane, json!({"name": "all", "role": "operator"})).await;
    let refused = (409, "tenants_unsupported".to_owned());
    for path in ["k8s/api/v1/namespaces/shop/pods", "k8s/version", "api/v1/operations"] {
        let path = format!("/clusters/{cluster}/{path}");
        assert_eq!(code(control_plane.try_get(&path, &acme).await).await, refused, "{path}");
        assert_ne!(code(control_plane.try_get(&path, &all).await).await, refused, "{path}");
    }
    for what in ["token", "kubeconfig"] {
        let path = format!("/api/v1/clusters/{cluster}/{what}");
        let asked = control_plane.ask("POST", &path, &acme, json!({})).await;
        assert_eq!(code(asked).await, refused, "{what}");
    }
    // also what would wait
    let restart = json!({"kind": "restart", "spec": {}});
    let waits = json!({"kind": "restart", "spec": {}, "ttl_s": 60});
    for body in [&restart, &waits] {
        let (status, answer) = submit(&control_plane, &cluster, &acme, "k", body).await;
        assert_eq!((status, &answer["code"]), (409, &json!("tenants_unsupported")), "{body}");
        assert!(answer["hint"].as_str().unwrap().contains("install-server"), "{answer}");
    }
    let seen = agent.record.seen.lock().unwrap().clone();
    assert!(seen.iter().all(|seen| seen.claims["tenant"].is_null()), "{seen:?}");
    assert!(!seen.iter().any(|seen| seen.line.starts_with("POST")), "{seen:?}");
    // with the next version it does
    agent.register_again(&control_plane, &["operations", "tenants"]).await;
    assert_eq!(submit(&control_plane, &cluster, &acme, "k", &restart).await.0, 202);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_does_not_take_all_places_where_operations_wait() {
    let control_plane = ControlPlane::with(&[]);
    let dir = tempfile::tempdir().unwrap();
    let identity = SimulatedAgent::identity(dir.path());
    let token = control_plane.enrol().0;
    // it has no tunnel: what is asked of it waits
    let cluster = register(&control_plane, &identity, &token, &["tenants"]).await.cluster_id;
    let (_, acme) = make(&control_plane, json!({"name": "acme", "tenant": "acme"})).await;
    let (_, globex) = make(&control_plane, json!({"name": "globex", "tenant": "globex"})).await;
    let (_, all) = make(&control_plane, json!({"name": "all"})).await;
    let body = json!({"kind": "restart", "spec": {}, "ttl_s": 600});
    let wait = async |token: &str, key: usize| {
        let key = format!("k-{key}");
        let (status, answer) = submit(&control_plane, &cluster, token, &key, &body).await;
        (status, answer["code"].as_str().unwrap_or_default().to_owned())
    };
    for key in 0..4 {
        assert_eq!(wait(&acme, key).await, (202, String::new()));
    }
    assert_eq!(wait(&acme, 4).await, (429, "queue_full".into()));
    for key in 0..5 {
        assert_eq!(wait(&all, key).await, (202, String::new()));
    }
    assert_eq!(wait(&globex, 0).await, (202, String::new()));
    let path = format!("/api/v1/clusters/{cluster}/operations");
    let count = async |token: &str| {
        control_plane.get(&path, token).await["items"].as_array().unwrap().len()
    };
    assert_eq!((count(&acme).await, count(&globex).await), (4, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn tenants_together_leave_places_where_operations_wait() {
    let control_plane = ControlPlane::with(&[]);
    let dir = tempfile::tempdir().unwrap();
    let identity = SimulatedAgent::identity(dir.path());
    let token = control_plane.enrol().0;
    let cluster = register(&control_plane, &identity, &token, &["tenants"]).await.cluster_id;
    let body = json!({"kind": "restart", "spec": {}, "ttl_s": 600});
    let full = (429, json!("queue_full"));
    let waits = async |name: &str, tenant: Value, count: usize| {
        let (_, token) = make(&control_plane, json!({"name": name, "tenant": tenant})).await;
        for key in 0..count {
            let key = format!("k-{key}");
            let (status, answer) = submit(&control_plane, &cluster, &token, &key, &body).await;
            assert_eq!(status, 202, "{name}: {answer}");
        }
        let (status, answer) = submit(&control_plane, &cluster, &token, "last", &body).await;
        (status, answer["code"].clone())
    };
    for tenant in ["acme", "globex", "initech"] {
        assert_eq!(waits(tenant, json!(tenant), 4).await, full, "{tenant}");
    }
    assert_eq!(waits("umbrella", json!("umbrella"), 0).await, full);
    assert_eq!(waits("all", Value::Null, 4).await, full);
}

/// An agent that went back to the version before tenants says so at its next registration, and
/// refuses their tokens until then.
#[tokio::test(flavor = "multi_thread")]
async fn what_an_agent_does_not_take_keeps_nothing_behind_it_waiting() {
    let control_plane = ControlPlane::with(&[]);
    let (_, acme) = make(&control_plane, json!({"name": "acme", "tenant": "acme"})).await;
    let (_, all) = make(&control_plane, json!({"name": "all"})).await;
    let body = json!({"kind": "restart", "spec": {}, "ttl_s": 600});
    let refusal = json!({"code": "unauthorized", "message": "the token is not signed with EdDSA"});
    for (capabilities, refuses, said) in [
        (&["operations"][..], false, "does not keep tenants apart"),
        (&["operations", "tenants"], true, "refuses tokens of tenants: the token is not signed"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let identity: Arc<Identity> = SimulatedAgent::identity(dir.path()).into();
        let token = control_plane.enrol().0;
        let registered = register(&control_plane, &identity, &token, &["tenants"]).await;
        let cluster = registered.cluster_id.clone();
        let wait = async |token: &str| {
            let (status, taken) = submit(&control_plane, &cluster, token, "k", &body).await;
            assert_eq!(status, 202, "{taken}");
            taken["id"].as_str().unwrap().to_owned()
        };
        let (first, second) = (wait(&acme).await, wait(&all).await);
        let credential = registered.credential.expose().to_owned();
        let again = register(&control_plane, &identity, &credential, capabilities).await;
        let record = Arc::new(Record::default());
        if refuses {
            let planted = ("POST /api/v1/operations", 401, refusal.clone());
            record.planted.lock().unwrap().push(planted);
        }
        let agent = RecordingAgent::connect(&control_plane, (identity, again), record, dir).await;
        let ended = wait_for_state(&control_plane, &cluster, &acme, &first, "failed").await;
        assert!(ended["message"].as_str().unwrap().contains(said), "{ended}");
        agent.record.planted.lock().unwrap().clear();
        wait_for_state(&control_plane, &cluster, &all, &second, "running").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_refuses_the_token_of_a_tenant_is_no_question_of_clocks_alone() {
    let control_plane = ControlPlane::with(&[]);
    let agent = RecordingAgent::new(&control_plane, &["tenants"]).await;
    let cluster = &agent.cluster;
    let eve = json!({"name": "eve", "tenant": "acme", "person": true});
    let (_, eve) = make(&control_plane, eve).await;
    let (_, acme) = make(&control_plane, json!({"name": "acme", "tenant": "acme"})).await;
    let (_, all) = make(&control_plane, json!({"name": "all"})).await;
    let restart = json!({"kind": "restart", "spec": {}});
    let begin = async |token: &str| {
        let (status, running) = submit(&control_plane, cluster, token, "k-1", &restart).await;
        assert_eq!(status, 202, "{running}");
        running["id"].as_str().unwrap().to_owned()
    };
    let (of_eve, of_acme) = (begin(&eve).await, begin(&acme).await);
    let refusal = json!({"code": "unauthorized", "message": "the token is not signed with EdDSA"});
    for part in ["/k8s/", "/api/v1/operations"] {
        agent.record.planted.lock().unwrap().push((part, 401, refusal.clone()));
    }
    let refused = (409, "tenants_unsupported".to_owned());
    let pods = format!("/clusters/{cluster}/k8s/api/v1/namespaces/shop/pods");
    assert_eq!(code(control_plane.try_get(&pods, &acme).await).await, refused);
    let mistrusts = (502, "agent_mistrusts".to_owned());
    assert_eq!(code(control_plane.try_get(&pods, &all).await).await, mistrusts);
    // nor does one wait that would be refused later
    for body in [&restart, &json!({"kind": "restart", "spec": {}, "ttl_s": 600})] {
        let (status, answer) = submit(&control_plane, cluster, &acme, "k-2", body).await;
        assert_eq!((status, &answer["code"]), (409, &json!("tenants_unsupported")), "{answer}");
    }
    let path = format!("/api/v1/clusters/{cluster}/operations/{of_acme}");
    assert_eq!(code(control_plane.ask("DELETE", &path, &acme, json!({})).await).await, refused);
    // and what cannot be cancelled there ends here
    control_plane.sandbox.subcommand(&["control-plane", "user", "revoke", "eve"]).ended(0);
    let admin = control_plane.admin.clone();
    let ended = wait_for_state(&control_plane, cluster, &admin, &of_eve, "interrupted").await;
    assert!(ended["message"].as_str().unwrap().contains("refuses tokens of tenants"), "{ended}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_makes_no_kubeconfigs_without_end() {
    let control_plane = ControlPlane::with(&[]);
    let dir = tempfile::tempdir().unwrap();
    let identity = SimulatedAgent::identity(dir.path());
    let token = control_plane.enrol().0;
    let cluster = register(&control_plane, &identity, &token, &["tenants"]).await.cluster_id;
    let (_, acme) = make(&control_plane, json!({"name": "acme", "tenant": "acme"})).await;
    let (_, beside) = make(&control_plane, json!({"name": "acme-2", "tenant": "acme"})).await;
    let path = format!("/api/v1/clusters/{cluster}/kubeconfig");
    for _ in 0..50 {
        assert_eq!(control_plane.ask("POST", &path, &acme, json!({})).await.status(), 201);
    }
    let one_more = control_plane.ask("POST", &path, &acme, json!({})).await;
    assert_eq!(code(one_more).await, (429, "too_many_kubeconfigs".into()));
    assert_eq!(control_plane.ask("POST", &path, &beside, json!({})).await.status(), 201);
}
