//! Labels of clusters: what they select, whose rights follow from them, and where an agent learns
//! the place of its machine.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::response::Response;
use reqwest::Response as Answer;
use serde_json::{Value, json};
use tokio::io::AsyncReadExt as _;

use crate::agent::Agent;
use crate::client::Person;
use crate::control_plane::{ControlPlane, SimulatedAgent, logged, tunnel_of};
use crate::fake_control_plane::{free_port, identity};
use crate::support::{RunOutput, Sandbox};
use crate::world::{FakeControlPlane, TOKEN, serve_kube};

/// A verb of the administrator on the machine of the control plane.
fn verb(control_plane: &ControlPlane, args: &[&str]) -> RunOutput {
    let args = [&["control-plane"][..], args].concat();
    tokio::task::block_in_place(|| control_plane.sandbox.subcommand(&args))
}

/// A Runner whose reach follows from labels.
async fn runner(control_plane: &ControlPlane, name: &str, selector: &str) -> Value {
    let body = json!({"name": name, "role": "deployer", "selector": selector});
    control_plane.json("POST", "/api/v1/runners", &control_plane.admin, body).await
}

/// Reads an answer until its stream ends.
async fn ends(answer: &mut Answer) -> bool {
    let rest = async { while let Ok(Some(_)) = answer.chunk().await {} };
    tokio::time::timeout(Duration::from_secs(5), rest).await.is_ok()
}

/// A visitor's stream straight to an agent, as the token of a Runner opens it.
async fn visit(
    control_plane: &ControlPlane,
    cluster: &str,
    token: &str,
) -> (std::io::Result<pipeops::frp::codec::Io>, tokio::task::JoinSet<()>) {
    let path = format!("/api/v1/clusters/{cluster}/token");
    let minted = control_plane.json("POST", &path, token, json!({})).await;
    let mut endpoints = minted["endpoints"].as_array().unwrap().iter();
    visit_again(endpoints.find(|e| e["type"] == "stcp").unwrap()).await
}

/// The same with an endpoint that was told before.
async fn visit_again(
    endpoint: &Value,
) -> (std::io::Result<pipeops::frp::codec::Io>, tokio::task::JoinSet<()>) {
    let text = |name: &str| endpoint[name].as_str().unwrap().to_owned();
    let mut tasks = tokio::task::JoinSet::new();
    let connector = tunnel_of(endpoint, &mut tasks).await.unwrap();
    let key = pipeops::base::secret::Secret::new(text("secret_key"));
    let visited = pipeops::frp::client::visit(&connector, "", &text("proxy"), &key).await;
    (visited.map(|io| Box::new(io) as pipeops::frp::codec::Io), tasks)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_right_follows_from_labels_and_what_is_open_ends_with_them() {
    let control_plane = ControlPlane::with(&[]);
    let (_kube, address) = serve_kube().await;
    let (_agent, cluster) = control_plane.agent(address).await;
    let label = |change: &str| verb(&control_plane, &["cluster", "label", &cluster, change]);
    let limited = runner(&control_plane, "limited", "env == prod, !legacy").await;
    assert_eq!(
        (&limited["selector"], &limited["clusters"]),
        (&json!("env=prod,!legacy"), &json!([]))
    );
    let token = limited["token"].as_str().unwrap();
    let all = control_plane.runner("deployer").await;
    let pods = format!("/clusters/{cluster}/k8s/api/v1/namespaces/beta/pods");
    let status = async |token: &str| control_plane.try_get(&pods, token).await.status().as_u16();
    // as long as nobody has said that it is in production, it is not there
    assert_eq!(status(token).await, 404);
    let list = control_plane.get("/api/v1/clusters", token).await;
    assert_eq!(list["items"], json!([]));
    let named = format!("/api/v1/clusters/{cluster}/token");
    assert_eq!(control_plane.ask("POST", &named, token, json!({})).await.status(), 404);
    assert_eq!(label("env=prod").ended(0).out.trim(), "env=prod");
    assert_eq!(status(token).await, 200);
    let list = control_plane.get("/api/v1/clusters", token).await;
    assert_eq!(list["items"][0]["labels"], json!({"env": "prod"}));
    assert_eq!(list["items"][0]["labels_set"], json!(["env"]));
    // all that can be open: a watch, a visitor of the tunnel, a kubeconfig, the list as it changes
    let path = format!("/api/v1/clusters/{cluster}/kubeconfig");
    let kubeconfig = control_plane.ask("POST", &path, token, json!({})).await;
    let kubeconfig: Value = serde_json::from_str(&kubeconfig.text().await.unwrap()).unwrap();
    let own = kubeconfig["users"][0]["user"]["token"].as_str().unwrap();
    let rows = control_plane.get("/api/v1/runners", &control_plane.admin).await;
    let mut rows = rows["items"].as_array().unwrap().iter();
    let row = rows.find(|row| row["kind"] == "kubeconfig").unwrap();
    assert_eq!(row["selector"], format!("env=prod,!legacy,id={cluster}"));
    assert_eq!(row["clusters"], json!([]), "a version before selectors reaches nothing with it");
    let watch = format!("/clusters/{cluster}/k8s/api/v1/pods?watch=1");
    let mut watches = [
        control_plane.try_get(&watch, token).await,
        control_plane.try_get(&watch, own).await,
        control_plane.try_get(&watch, all["token"].as_str().unwrap()).await,
    ];
    assert!(watches.iter().all(|watch| watch.status() == 200));
    let mut changes = control_plane.try_get("/api/v1/changes", token).await;
    let first = changes.chunk().await.unwrap().unwrap();
    assert!(String::from_utf8_lossy(&first).contains(&cluster));
    let path = format!("/api/v1/clusters/{cluster}/token");
    let minted = control_plane.json("POST", &path, token, json!({})).await;
    let (visitor, _tasks) = visit(&control_plane, &cluster, token).await;
    let (other, _others) = visit(&control_plane, &cluster, all["token"].as_str().unwrap()).await;
    let (mut visitor, mut other) = (visitor.unwrap(), other.unwrap());
    // a label that nothing of it hangs on changes nothing of it
    label("tier=web").ended(0);
    assert_eq!(status(token).await, 200);
    label("legacy=yes").ended(0);
    assert!(ends(&mut watches[0]).await, "the watch goes on");
    assert!(ends(&mut watches[1]).await, "the watch of the kubeconfig goes on");
    let mut byte = [0];
    let ended = tokio::time::timeout(Duration::from_secs(5), visitor.read(&mut byte)).await;
    assert!(matches!(ended, Ok(Ok(0) | Err(_))), "{ended:?}");
    let gone = async {
        loop {
            let event = changes.chunk().await.unwrap().unwrap();
            if String::from_utf8_lossy(&event).contains(&format!("\"gone\":[\"{cluster}\"]")) {
                break;
            }
        }
    };
    assert!(tokio::time::timeout(Duration::from_secs(5), gone).await.is_ok(), "still listed");
    assert_eq!((status(token).await, status(own).await), (404, 404));
    let mut endpoints = minted["endpoints"].as_array().unwrap().iter();
    let stcp = endpoints.find(|e| e["type"] == "stcp").unwrap();
    assert!(visit_again(stcp).await.0.is_err(), "the way through the tunnel is still open");
    // nobody else notices
    let goes_on = tokio::time::timeout(Duration::from_millis(300), other.read(&mut byte)).await;
    assert!(goes_on.is_err(), "{goes_on:?}");
    let goes_on = tokio::time::timeout(Duration::from_millis(300), ends(&mut watches[2])).await;
    assert!(goes_on.is_err(), "the watch of another Runner has ended");
    label("legacy-").ended(0);
    assert_eq!((status(token).await, status(own).await), (200, 200));
    // and it is still revoked with its maker
    let id = limited["id"].as_str().unwrap();
    let mut watch = control_plane.try_get(&watch, own).await;
    verb(&control_plane, &["runner", "revoke", id]).ended(0);
    assert!(ends(&mut watch).await, "the watch goes on");
    assert_eq!((status(token).await, status(own).await), (401, 401));
}

/// An agent that says this of its cluster.
async fn register(
    control_plane: &ControlPlane,
    dir: &std::path::Path,
    token: &str,
    cluster: Value,
) -> (u16, Value) {
    let identity = SimulatedAgent::identity(dir);
    let mut body: Value = serde_json::from_str(&SimulatedAgent::body(&identity, "m")).unwrap();
    for (name, value) in cluster.as_object().unwrap() {
        body["cluster"][name] = value.clone();
    }
    let (client, url) = (&control_plane.client, &control_plane.url);
    let body = body.to_string();
    let answer = SimulatedAgent::try_register(client, url, &identity, token, body).await.unwrap();
    (answer.status().as_u16(), answer.json().await.unwrap())
}

/// An enrolment token whose clusters get this label here.
async fn labelled(control_plane: &ControlPlane, labels: Value) -> String {
    let body = json!({"uses": 0, "labels": labels});
    let made = control_plane.json("POST", "/api/v1/tokens", &control_plane.admin, body).await;
    made["token"].as_str().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_labels_itself_into_nobodys_reach_and_out_of_nobodys() {
    let mut control_plane = ControlPlane::with(&[]);
    let dir = tempfile::tempdir().unwrap();
    let (into, out) = (dir.path().join("into"), dir.path().join("out"));
    let limited = runner(&control_plane, "limited", "env=prod").await;
    let token = limited["token"].as_str().unwrap();
    let not = runner(&control_plane, "not", "quarantine!=yes").await;
    let names = async |control_plane: &ControlPlane, token: &Value, query: &str| -> Vec<String> {
        let path = format!("/api/v1/clusters{query}");
        let list = control_plane.get(&path, token.as_str().unwrap()).await;
        let mut names: Vec<String> = list["items"]
            .as_array()
            .unwrap()
            .iter()
            .map(|c| c["name"].as_str().unwrap().to_owned())
            .collect();
        names.sort();
        names
    };
    let (admin, own) = (json!(control_plane.admin), json!(token));
    let plain = labelled(&control_plane, json!({})).await;
    let says = json!({"name": "into", "provider": "aws", "region": "eu-west-1", "zone":
        "eu-west-1a", "labels": {"env": "prod", "rack": "7"}});
    let (status, registered) = register(&control_plane, &into, &plain, says.clone()).await;
    assert_eq!(status, 200, "{registered}");
    let prod = labelled(&control_plane, json!({"env": "prod", "quarantine": "yes"})).await;
    let says_not = json!({"name": "out", "labels": {"env": "test", "quarantine": "no"}});
    let (status, kept) = register(&control_plane, &out, &prod, says_not.clone()).await;
    assert_eq!(status, 200, "{kept}");
    // what an agent says is there to look at, and here wins what was set here
    let found = async |control_plane: &ControlPlane, selector: &str| {
        names(control_plane, &admin, &format!("?selector={selector}")).await
    };
    assert_eq!(found(&control_plane, "env=prod").await, ["into", "out"]);
    assert_eq!(found(&control_plane, "env%3Dprod%2Crack").await, ["into"]);
    let place = "provider%20in%20(aws,gcp),region=eu-west-1,zone=eu-west-1a,name=into";
    assert_eq!(found(&control_plane, place).await, ["into"]);
    assert_eq!(found(&control_plane, "provider!=aws").await, ["out"]);
    // but rights follow from the latter alone
    assert_eq!(names(&control_plane, &own, "").await, ["out"]);
    assert_eq!(names(&control_plane, &not["token"], "").await, ["into"]);
    // also when it registers again, with its credential or with another token
    let credential = registered["credential"].as_str().unwrap();
    for with in [credential, prod.as_str()] {
        assert_eq!(register(&control_plane, &into, with, says.clone()).await.0, 200);
        let again = register(&control_plane, &out, &plain, says_not.clone()).await;
        assert_eq!(again.0, 200, "{}", again.1);
        assert_eq!(names(&control_plane, &own, "").await, ["out"]);
        assert_eq!(names(&control_plane, &not["token"], "").await, ["into"]);
    }
    let cluster = registered["cluster_id"].as_str().unwrap();
    for path in [
        format!("/api/v1/clusters/{cluster}"),
        "/api/v1/clusters/into".to_owned(),
        format!("/clusters/{cluster}/k8s/version"),
        format!("/api/v1/clusters/{cluster}/operations"),
    ] {
        assert_eq!(control_plane.try_get(&path, token).await.status(), 404, "{path}");
    }
    let labels = format!("/api/v1/clusters/{cluster}/labels");
    let change = json!({"labels": {"env": "prod"}});
    for token in [token, credential] {
        let refused = control_plane.ask("PATCH", &labels, token, change.clone()).await;
        assert_eq!(refused.status(), 403);
    }
    // what is no label is none of an agent either
    let many: Value =
        (0..51).map(|n| (format!("k{n}"), json!("v"))).collect::<serde_json::Map<_, _>>().into();
    for wrong in [json!({"name": "x"}), json!({"a b": "c"}), json!({"a": "b c"}), many] {
        let again = register(&control_plane, &into, &prod, json!({"labels": wrong})).await;
        assert_eq!((again.0, &again.1["code"]), (400, &json!("bad_label")), "{wrong}");
    }
    // all of it is there after kill -9, and goes with the cluster
    control_plane.kill_and_restart();
    assert_eq!(names(&control_plane, &own, "").await, ["out"]);
    let show = verb(&control_plane, &["cluster", "show", "out"]).ended(0).out;
    for line in ["labels        env=prod,quarantine=yes", "set here      env,quarantine"] {
        assert!(show.lines().any(|l| l == line), "{line}: {show}");
    }
    verb(&control_plane, &["cluster", "remove", "out"]).ended(0);
    assert_eq!(register(&control_plane, &out, &plain, says_not).await.0, 200);
    assert!(names(&control_plane, &own, "").await.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn clusters_are_selected_and_grouped_and_mistakes_are_quoted() {
    let control_plane = ControlPlane::with(&[]);
    let dir = tempfile::tempdir().unwrap();
    for (name, provider, env) in [("a", "aws", "prod"), ("b", "gcp", "prod"), ("c", "aws", "test")]
    {
        let token = labelled(&control_plane, json!({"env": env})).await;
        let says = json!({"name": name, "provider": provider, "region": "r-1"});
        assert_eq!(register(&control_plane, &dir.path().join(name), &token, says).await.0, 200);
    }
    let eve = Person::logged_in(&control_plane, "eve", &[]);
    let rows = |out: &str| -> Vec<String> {
        let rows = out.lines().filter(|line| line.starts_with("c-"));
        rows.map(|line| line.split_whitespace().nth(1).unwrap().to_owned()).collect()
    };
    let all = eve.run(&["clusters"]).ended(0).out;
    assert!(all.contains("PROVIDER") && all.contains("REGION") && all.contains("r-1"), "{all}");
    let mut selected =
        rows(&eve.run(&["clusters", "-l", "env in (prod),provider=aws"]).ended(0).out);
    assert_eq!(selected, ["a"]);
    selected = rows(&eve.run(&["clusters", "--selector", "env!=prod"]).ended(0).out);
    assert_eq!(selected, ["c"]);
    assert_eq!(eve.run(&["clusters", "-l", "env=none"]).ended(0).out.trim(), "none");
    let groups = eve.run(&["clusters", "--group-by", "provider"]).ended(0).out;
    assert!(
        groups.contains("provider aws: 2\n") && groups.contains("provider gcp: 1\n"),
        "{groups}"
    );
    let groups = eve.run(&["clusters", "--group-by", "env", "-o", "json"]).ended(0).json();
    let counts: Vec<(&str, usize)> = groups["groups"]
        .as_array()
        .unwrap()
        .iter()
        .map(|g| (g["value"].as_str().unwrap(), g["items"].as_array().unwrap().len()))
        .collect();
    assert_eq!(counts, [("prod", 2), ("test", 1)]);
    let list = verb(&control_plane, &["cluster", "list", "-l", "name in (a,c)"]).ended(0).out;
    let mut listed = rows(&list);
    listed.sort();
    assert_eq!(listed, ["a", "c"]);
    assert!(list.contains("env=prod") && list.contains("LABELS"), "{list}");
    // somebody whose token selects sees these alone, whatever is asked for
    let ops = Person::logged_in(&control_plane, "ops", &["--selector", "env=test"]);
    assert_eq!(rows(&ops.run(&["clusters"]).ended(0).out), ["c"]);
    assert_eq!(ops.run(&["clusters", "-l", "env=prod"]).ended(0).out.trim(), "none");
    let runners = verb(&control_plane, &["runner", "list"]).ended(0).out;
    assert!(runners.contains("env=test"), "{runners}");
    // mistakes, at the command line
    for (args, said) in [
        (&["clusters", "-l", ""][..], "a selector is one or more of"),
        (&["clusters", "-l", "env=prod,"], "a requirement is missing beside a comma"),
        (&["clusters", "-l", "env in prod"], "`env in prod`"),
        (&["clusters", "-l", "tier in (web"], "a ) is missing"),
        (&["clusters", "--group-by", "a b"], "no key of a label"),
    ] {
        let refused = eve.run(args).ended(2);
        assert!(refused.err.contains(said), "{args:?}: {}", refused.err);
    }
    for (args, said) in [
        (&["runner", "create", "x", "--selector", "provider=aws"][..], "no right follows from it"),
        (&["runner", "create", "x", "--selector", "name=a"], "no right follows from it"),
        (&["runner", "create", "x", "--selector", "*"], "`*`"),
        (&["user", "create", "x", "--selector", "env=prod", "--clusters", "a"], "--clusters"),
        (&["cluster", "label", "a", "name=x"], "take another key"),
        (&["cluster", "label", "a", "pipeops.io/x=y"], "reserved"),
        (&["cluster", "label", "a", "env"], "it is KEY=VALUE"),
        (&["cluster", "label", "a", "env=a", "env-"], "twice"),
        (&["token", "create", "--cluster-label", "zone=a"], "take another key"),
        (&["token", "create", "--cluster-label", "env-"], "it is KEY=VALUE"),
    ] {
        let refused = verb(&control_plane, args).ended(2);
        assert!(refused.err.contains(said), "{args:?}: {}", refused.err);
    }
    let unknown = verb(&control_plane, &["cluster", "label", "nope", "a=b"]).ended(7);
    assert!(unknown.err.contains("there is no cluster nope"), "{}", unknown.err);
    // and at the API, where nothing was done of it
    let admin = &control_plane.admin;
    let before = control_plane.get("/api/v1/clusters?selector=name=a", admin).await;
    let cluster = before["items"][0]["id"].as_str().unwrap();
    let labels = format!("/api/v1/clusters/{cluster}/labels");
    let long = "x".repeat(3000);
    for (method, path, body, code) in [
        ("PATCH", labels.as_str(), json!({"labels": {"good": "x", "a b": "c"}}), "bad_label"),
        ("PATCH", &labels, json!({"labels": {"good": "x", "region": "y"}}), "bad_label"),
        ("PATCH", &labels, json!({"labels": {"good": 7}}), "bad_body"),
        ("PATCH", &labels, json!({"good": "x"}), "bad_body"),
        ("POST", "/api/v1/runners", json!({"name": "x", "selector": ""}), "bad_selector"),
        ("POST", "/api/v1/runners", json!({"name": "x", "selector": "zone=a"}), "bad_selector"),
        ("POST", "/api/v1/runners", json!({"name": "x", "selector": long}), "bad_selector"),
        (
            "POST",
            "/api/v1/runners",
            json!({"name": "x", "selector": "a", "clusters": [cluster]}),
            "bad_selector",
        ),
        ("POST", "/api/v1/tokens", json!({"labels": {"id": "x"}}), "bad_label"),
        ("GET", "/api/v1/clusters?selector=", json!({}), "bad_selector"),
        ("GET", "/api/v1/clusters?selector=%2A", json!({}), "bad_selector"),
        ("GET", "/api/v1/clusters?selector=a%00", json!({}), "bad_selector"),
    ] {
        let answer = control_plane.ask(method, path, admin, body.clone()).await;
        let status = answer.status().as_u16();
        let said: Value = answer.json().await.unwrap();
        assert_eq!((status, &said["code"]), (400, &json!(code)), "{path} {body}: {said}");
    }
    let after = control_plane.get("/api/v1/clusters?selector=name=a", admin).await;
    assert_eq!(after["items"][0]["labels"], json!({"env": "prod"}));
}

/// What a metadata service answers to a request, which it may leave without an answer.
type Answers = fn(&str, &str) -> Option<Response>;

struct Metadata {
    answers: Mutex<Answers>,
    /// Method and path of each request.
    calls: Mutex<Vec<String>>,
}

fn answer(status: u16, text: impl Into<Body>) -> Option<Response> {
    Some(Response::builder().status(status).body(text.into()).unwrap())
}

/// The headers that the services demand, each by what it says.
const DEMANDED: [&str; 4] = [
    "x-aws-ec2-metadata-token-ttl-seconds",
    "x-aws-ec2-metadata-token",
    "metadata-flavor",
    "metadata",
];

async fn handle(State(metadata): State<Arc<Metadata>>, request: Request) -> Response {
    let line = format!("{} {}", request.method(), request.uri());
    let value = |name: &str| {
        let value = request.headers().get(name).and_then(|value| value.to_str().ok());
        value.unwrap_or_default().to_owned()
    };
    let shown = DEMANDED.map(value).concat();
    metadata.calls.lock().unwrap().push(line.clone());
    let answers = *metadata.answers.lock().unwrap();
    match answers(&line, &shown) {
        Some(answer) => answer,
        None => std::future::pending().await,
    }
}

/// At an address for which no `NO_PROXY` stands.
async fn serve(answers: Answers) -> (Arc<Metadata>, String) {
    let metadata = Arc::new(Metadata { answers: Mutex::new(answers), calls: Mutex::default() });
    let router = Router::new().fallback(handle).with_state(metadata.clone());
    let listener = tokio::net::TcpListener::bind("127.0.0.2:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
    (metadata, url)
}

fn aws(line: &str, shown: &str) -> Option<Response> {
    let document = r#"{"accountId": "123456789012", "region": "eu-west-1",
        "availabilityZone": "eu-west-1a", "instanceType": "t3.micro"}"#;
    match (line, shown) {
        ("PUT /latest/api/token", "60") => answer(200, "AQAEAtoken=="),
        ("GET /latest/dynamic/instance-identity/document", "AQAEAtoken==") => answer(200, document),
        _ => answer(401, "Unauthorized"),
    }
}

fn gcp(line: &str, shown: &str) -> Option<Response> {
    match (line, shown) {
        ("GET /computeMetadata/v1/instance/zone", "Google") => {
            answer(200, "projects/123456/zones/europe-west1-b")
        }
        _ => answer(403, "Missing Metadata-Flavor:Google header."),
    }
}

fn azure(line: &str, shown: &str) -> Option<Response> {
    match (line, shown) {
        ("GET /metadata/instance/compute?api-version=2021-02-01", "true") => {
            answer(200, r#"{"location": "westeurope", "zone": "2", "name": "vm1", "tags": ""}"#)
        }
        _ => answer(400, r#"{"error": "Bad request. Required metadata header not specified"}"#),
    }
}

fn hetzner(line: &str, _: &str) -> Option<Response> {
    match line {
        "GET /hetzner/v1/metadata/region" => answer(200, "eu-central"),
        "GET /hetzner/v1/metadata/availability-zone" => answer(200, "fsn1-dc14\n"),
        _ => answer(404, "not found"),
    }
}

const AWS: &[(&str, &str)] = &[("sys_vendor", "Amazon EC2\n"), ("product_name", "t3.micro\n")];
const GCP: &[(&str, &str)] = &[("product_name", "Google Compute Engine\n")];
const AZURE: &[(&str, &str)] = &[("chassis_asset_tag", "7783-7084-3265-9085-8269-3286-77\n")];
const HETZNER: &[(&str, &str)] = &[("sys_vendor", "Hetzner\n")];

/// A machine with this firmware, its agent, and who it registers with. Whoever uses the proxy of
/// its environment reaches nobody.
async fn machine(
    firmware: &[(&str, &str)],
    toml: &str,
    env: &[(&str, &str)],
) -> (Agent, Arc<FakeControlPlane>) {
    let pin = identity().1;
    let nowhere = ([127, 0, 0, 1], free_port()).into();
    let control_plane = Arc::new(FakeControlPlane::new(nowhere, &pin));
    let address = control_plane.clone().serve().await;
    let sandbox = Sandbox::new();
    for (name, text) in firmware {
        sandbox.put(&format!("/sys/class/dmi/id/{name}"), text);
    }
    sandbox.put("/etc/machine-id", "0123456789abcdef0123456789abcdef\n");
    let toml = format!("control-plane-url = \"http://{address}\"\n{toml}");
    sandbox.put("/etc/pipeops/agent.toml", &toml);
    let agent = Agent::start(sandbox, &[&environment()[..], env].concat());
    (agent, control_plane)
}

fn environment() -> [(&'static str, &'static str); 5] {
    [
        ("AGENT_TOKEN", TOKEN),
        ("LOG_LEVEL", "debug"),
        ("HTTP_PROXY", "http://127.0.0.1:1"),
        ("http_proxy", "http://127.0.0.1:1"),
        ("NO_PROXY", "127.0.0.1"),
    ]
}

/// The cluster of a registration.
async fn registered(control_plane: &FakeControlPlane, number: usize) -> Value {
    let there = |control_plane: &FakeControlPlane| control_plane.calls("/register").len() > number;
    control_plane.until("a registration", there).await;
    control_plane.calls("/register")[number].2["cluster"].clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_says_where_it_is_as_its_provider_does() {
    for (firmware, answers, provider, region, zone) in [
        (AWS, aws as Answers, "aws", "eu-west-1", "eu-west-1a"),
        (GCP, gcp, "gcp", "europe-west1", "europe-west1-b"),
        (AZURE, azure, "azure", "westeurope", "westeurope-2"),
        (HETZNER, hetzner, "hetzner", "eu-central", "fsn1-dc14"),
    ] {
        let (_metadata, url) = serve(answers).await;
        let toml = format!("metadata-url = \"{url}\"\n");
        let (agent, control_plane) = machine(firmware, &toml, &[]).await;
        let cluster = registered(&control_plane, 0).await;
        let said = (&cluster["provider"], &cluster["region"], &cluster["zone"]);
        let log = agent.log();
        assert_eq!(said, (&json!(provider), &json!(region), &json!(zone)), "{log}");
        assert!(!log.contains("AQAEAtoken"), "{log}");
    }
    // nobody is asked where the firmware names no provider, or where that is switched off
    let (metadata, url) = serve(aws).await;
    let home: &[(&str, &str)] = &[("sys_vendor", "QEMU\n"), ("product_name", "Standard PC\n")];
    for (firmware, more) in [(home, ""), (&[], ""), (AWS, "metadata = false\n")] {
        let toml = format!("metadata-url = \"{url}\"\n{more}");
        let (_agent, control_plane) = machine(firmware, &toml, &[]).await;
        let cluster = registered(&control_plane, 0).await;
        assert_eq!(cluster["provider"], "kubernetes");
        assert!(cluster["region"].is_null() && cluster["zone"].is_null(), "{cluster}");
    }
    assert!(metadata.calls.lock().unwrap().is_empty());
}

/// A body that never comes to its end.
fn endless() -> Body {
    Body::from_stream(futures_util::stream::pending::<Result<Bytes, std::convert::Infallible>>())
}

/// As [`aws`], but for the document.
fn aws_with(
    line: &str,
    shown: &str,
    document: impl FnOnce() -> Option<Response>,
) -> Option<Response> {
    if line.ends_with("/document") { document() } else { aws(line, shown) }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_metadata_service_that_is_away_or_wrong_delays_nobody_and_is_not_believed() {
    let cases: &[(&str, Answers)] = &[
        ("never answers", |_, _| None),
        ("never answers with the document", |line, shown| aws_with(line, shown, || None)),
        ("never comes to the end", |line, shown| aws_with(line, shown, || answer(200, endless()))),
        ("has no such path", |_, _| answer(404, "not found")),
        ("fails", |_, _| answer(500, "")),
        ("asks to log in", |_, _| answer(200, "<html>log in to this network</html>")),
        ("says nothing", |_, _| answer(200, "")),
        ("is not text", |_, _| answer(200, vec![0xff_u8, 0xfe, 0x00, 0x80])),
        ("is of another form", |line, shown| {
            aws_with(line, shown, || answer(200, r#"{"region": ["eu"], "availabilityZone": 7}"#))
        }),
        ("is of two minds", |line, shown| {
            let text = r#"{"region": "eu-west-1", "availabilityZone": "us-east-1a"}"#;
            aws_with(line, shown, || answer(200, text))
        }),
        ("hides something", |line, shown| {
            let text =
                "{\"region\": \"eu-west-\u{202e}1\", \"availabilityZone\": \"eu-west-\u{202e}1a\"}";
            aws_with(line, shown, || answer(200, text))
        }),
        ("is too long", |line, shown| {
            let text = r#"{"region": "eu-west-1", "availabilityZone": "eu-west-1a"}"#;
            aws_with(line, shown, || answer(200, format!("{text}{}", " ".repeat(64 << 10))))
        }),
        ("points elsewhere", |line, shown| {
            aws_with(line, shown, || {
                let there = Response::builder().status(302).header("location", "/elsewhere");
                Some(there.body(Body::empty()).unwrap())
            })
        }),
    ];
    let mut urls = Vec::new();
    for (what, answers) in cases {
        let (metadata, url) = serve(*answers).await;
        urls.push((*what, url, Some(metadata)));
    }
    urls.push(("is refused", format!("http://127.0.0.2:{}", free_port()), None));
    // addresses for documentation: nobody answers there (RFC 5737)
    urls.push(("is nowhere", "http://192.0.2.1".to_owned(), None));
    for (what, url, metadata) in urls {
        let toml = format!("metadata-url = \"{url}\"\n");
        let begun = Instant::now();
        let (agent, control_plane) = machine(AWS, &toml, &[]).await;
        let cluster = registered(&control_plane, 0).await;
        // whose machine it is, its firmware says
        assert_eq!(cluster["provider"], "aws", "{what}");
        assert!(cluster["region"].is_null() && cluster["zone"].is_null(), "{what}: {cluster}");
        // of a second and a start; the answer that never comes would take for ever
        assert!(begun.elapsed() < Duration::from_secs(15), "{what}: {:?}", begun.elapsed());
        agent.until("READY=1");
        let line = logged(&agent, "no metadata service").await;
        let took = line.split_once("took_ms=").unwrap().1;
        let digits: String = took.chars().take_while(char::is_ascii_digit).collect();
        assert!(digits.parse::<u64>().unwrap() < 1500, "{what}: {line}");
        if let Some(metadata) = metadata {
            let calls = metadata.calls.lock().unwrap();
            assert!(
                !calls.is_empty() && !calls.iter().any(|c| c.contains("elsewhere")),
                "{calls:?}"
            );
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_label_is_told_and_a_place_that_was_learned_stays_with_the_machine() {
    let (metadata, url) = serve(aws).await;
    let toml = format!("metadata-url = \"{url}\"\ncluster-labels = [\"env=test\", \"tier=web\"]\n");
    let (mut agent, control_plane) = machine(AWS, &toml, &[]).await;
    let first = registered(&control_plane, 0).await;
    assert_eq!(first["labels"], json!({"env": "test", "tier": "web"}));
    let beats = |control_plane: &FakeControlPlane| control_plane.calls("/heartbeat").len();
    // the second is of the process that runs now, whatever was on its way before
    let beat = async || {
        let before = beats(&control_plane);
        control_plane.until("two heartbeats", |plane| beats(plane) > before + 1).await;
    };
    beat().await;
    // the same again is not told again
    agent.restart(&environment());
    beat().await;
    assert_eq!(control_plane.calls("/register").len(), 1);
    // without its service the machine is still where it was
    *metadata.answers.lock().unwrap() = |_, _| answer(503, "");
    agent.restart(&environment());
    beat().await;
    assert_eq!(control_plane.calls("/register").len(), 1);
    let labels = [&environment()[..], &[("CLUSTER_LABELS", "env=prod")]].concat();
    agent.restart(&labels);
    let second = registered(&control_plane, 1).await;
    assert_eq!(second["labels"], json!({"env": "prod"}));
    assert_eq!((&second["region"], &second["zone"]), (&json!("eu-west-1"), &json!("eu-west-1a")));
    let (_, bearer, _) = control_plane.calls("/register")[1].clone();
    assert!(bearer.starts_with("credential-"), "with what it has, not with a token: {bearer}");
    beat().await;
    // a copy of its disk may be anywhere
    agent.sandbox.put("/etc/machine-id", "fedcba9876543210fedcba9876543210\n");
    agent.restart(&labels);
    let copied = registered(&control_plane, 2).await;
    assert_eq!((&copied["provider"], &copied["region"]), (&json!("aws"), &Value::Null));
}

#[test]
fn labels_of_the_agent_are_judged_where_they_are_typed() {
    let sandbox = Sandbox::new();
    for (args, said) in [
        (&["--cluster-label", "env"][..], "it is KEY=VALUE"),
        (&["--cluster-label", "name=x"], "take another key"),
        (&["--cluster-label", "env=a,env=b"], "its key is there twice"),
        (&["--cluster-label", "a b=c"], "a key has"),
        (&["--cluster-label", "pipeops.io/x=y"], "reserved"),
    ] {
        let release = sandbox.path("release");
        let all = [&["install-server", "--offline-dir", &release, "--dry-run"][..], args].concat();
        let refused = sandbox.run(&all).ended(2);
        assert!(
            refused.err.contains(said) && refused.err.contains("--cluster-label"),
            "{args:?}: {}",
            refused.err
        );
    }
    sandbox.install(&["--cluster-label", "env=prod,tier=web"]).ended(0);
    let toml = sandbox.read("/etc/pipeops/agent.toml");
    assert!(toml.contains("cluster-labels = [\"env=prod\",\"tier=web\"]\n"), "{toml}");
    for (toml, said) in [
        ("cluster-labels = [\"env\"]\n", "it is KEY=VALUE"),
        ("cluster-labels = [\"region=eu\"]\n", "take another key"),
        ("metadata-url = \"https://169.254.169.254\"\n", "metadata-url is http://HOST"),
        ("metadata-url = \"169.254.169.254\"\n", "metadata-url is http://HOST"),
        ("metadata = \"off\"\n", "metadata"),
    ] {
        let other = Sandbox::new();
        other.put("/etc/pipeops/agent.toml", toml);
        let refused = other.run(&["run"]).ended(2);
        assert!(refused.err.contains(said), "{toml}: {}", refused.err);
    }
}
