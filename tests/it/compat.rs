//! What versions before this one left is read by this one, and a running loop is upgraded and
//! rolled back.
//!
//! `fixtures/` holds what each version left, made with its own program. `PIPEOPS_TEST_BEFORE` names
//! the program of a version before, to be upgraded from while it runs.

mod fixture;
mod make;

use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::agent::Agent;
use crate::control_plane::{ControlPlane, DATA, SimulatedAgent, tunnel_of};
use crate::operations::{apply, deployment, submit, wait_for_state};
use crate::support::{RunOutput, Sandbox, assert_same_tree, program, run_output};
use crate::world::{Kube, credential, serve_kube};
use fixture::{Fixture, Names, metrics};

/// The program of a version before this one; without it the output says what was not run.
fn before(what: &str) -> Option<PathBuf> {
    let named = std::env::var_os("PIPEOPS_TEST_BEFORE").map(PathBuf::from);
    if named.is_none() {
        println!("NOT RUN: {what}: PIPEOPS_TEST_BEFORE names no pipeops of a version before");
    }
    named
}

/// A control plane with a broker that nobody reaches: events wait.
fn with_unreachable_broker(sandbox: Sandbox) -> ControlPlane {
    let _ = rustls::crypto::ring::default_provider().install_default();
    sandbox.beside("amqp-url", "amqp://guest:guest@127.0.0.1:9/\n", 0o600);
    let url = sandbox.path("amqp-url");
    ControlPlane::begin(sandbox, &["--amqp-url-file", &url])
}

fn control_plane_names(control_plane: &ControlPlane) -> Names {
    vec![
        (control_plane.url.trim_start_matches("https://").into(), "127.0.0.1:8443".into()),
        (format!("\"port\":{}", control_plane.ports.1), "\"port\":7000".into()),
    ]
}

fn agent_names(control_plane: &ControlPlane, sandbox: &Sandbox) -> Names {
    [control_plane_names(control_plane), node_names(sandbox)].concat()
}

fn node_names(sandbox: &Sandbox) -> Names {
    let api = std::fs::read_to_string(sandbox.path("api")).unwrap();
    vec![(sandbox.path(""), "/srv/sandbox/".into()), (api, "http://127.0.0.1:6443".into())]
}

/// Everything that a control plane lists, but for what changes by itself.
async fn lists(control_plane: &ControlPlane, admin: &str, cluster: &str) -> Value {
    let mut all = serde_json::Map::new();
    let operations = format!("clusters/{cluster}/operations");
    for list in ["projects", "admins", "runners", "tokens", "clusters", &operations] {
        let mut answer =
            control_plane.json("GET", &format!("/api/v1/{list}"), admin, json!({})).await;
        if list == "clusters" {
            for cluster in answer["items"].as_array_mut().unwrap() {
                // they tell of now
                for moving in ["state", "reason", "seen_at", "tunnel"] {
                    assert!(cluster.as_object_mut().unwrap().remove(moving).is_some(), "{moving}");
                }
            }
        }
        all.insert(list.replace(cluster, "CLUSTER"), answer);
    }
    all.into()
}

/// A control plane on what one of a version before left.
fn on(fixture: &Fixture) -> (ControlPlane, Value) {
    let sandbox = Sandbox::new();
    fixture.put("control-plane", &sandbox, &Names::new());
    let mut control_plane = with_unreachable_broker(sandbox);
    let said = fixture.json("control-plane.json");
    control_plane.admin = said["tokens"]["first_admin"].as_str().unwrap().to_owned();
    (control_plane, said)
}

/// Waits until the metrics have the names, types and labels that they had.
async fn until_metrics(expected: &str, what: &str, mut text: impl AsyncFnMut() -> String) {
    let begun = Instant::now();
    loop {
        let now = metrics(&text().await);
        if now == expected {
            return;
        }
        assert!(
            begun.elapsed() < Duration::from_secs(20),
            "metrics of the {what}\nbefore:\n{expected}\nnow:\n{now}"
        );
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_control_plane_goes_on_with_the_data_of_a_version_before() {
    for fixture in Fixture::all() {
        let (control_plane, said) = on(&fixture);
        let (token, cluster) = (
            |name: &str| said["tokens"][name].as_str().unwrap(),
            said["cluster"].as_str().unwrap(),
        );
        for admin in ["first_admin", "second_admin"] {
            assert_eq!(
                lists(&control_plane, token(admin), cluster).await,
                said["lists"],
                "{admin}"
            );
        }
        // who was let in is, who was not is not
        let status = async |who: &str, path: &str| {
            control_plane.try_get(path, token(who)).await.status().as_u16()
        };
        let (list, version) = ("/api/v1/clusters", format!("/clusters/{cluster}/k8s/version"));
        for (who, path, expected) in [
            ("runner", list, 200),
            ("elsewhere", list, 200),
            ("revoked", list, 401),
            ("kubeconfig", list, 403),
            ("enrolment", list, 403),
            ("runner", &version, 503),
            ("kubeconfig", &version, 503),
            ("elsewhere", &version, 404),
        ] {
            assert_eq!(status(who, path).await, expected, "{who} {path}");
        }
        let show = control_plane
            .sandbox
            .subcommand(&["control-plane", "cluster", "show", cluster])
            .ended(0)
            .out;
        assert!(show.contains(cluster), "{show}");
        // an enrolment token has the uses that were left
        let dir = tempfile::tempdir().unwrap();
        for name in ["one", "two"] {
            SimulatedAgent::new(&control_plane, &dir.path().join(name), token("enrolment")).await;
        }
        let third = SimulatedAgent::identity(&dir.path().join("three"));
        let body = SimulatedAgent::body(&third, "m");
        let third = SimulatedAgent::try_register(
            &control_plane.client,
            &control_plane.url,
            &third,
            token("enrolment"),
            body,
        )
        .await
        .unwrap();
        assert_eq!(third.json::<Value>().await.unwrap()["code"], "token_used_up");
        // what waited for the broker waits still, beside what those two are told of
        let before = said["events_waiting"].as_u64().unwrap();
        assert!(before > 2, "{before}");
        events_waiting(&control_plane, before).await;
    }
}

/// Events that wait for the broker: so many at least, once they have been counted.
async fn events_waiting(control_plane: &ControlPlane, least: u64) -> u64 {
    let begun = Instant::now();
    loop {
        let text =
            control_plane.try_get("/metrics", &control_plane.admin).await.text().await.unwrap();
        let waiting = text
            .lines()
            .find_map(|line| line.strip_prefix("pipeops_events_waiting "))
            .unwrap()
            .parse()
            .unwrap();
        if waiting >= least {
            return waiting;
        }
        assert!(begun.elapsed() < Duration::from_secs(20), "{text}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// The two go on where they were left: an operation ran then, and another one waited.
#[tokio::test(flavor = "multi_thread")]
async fn an_agent_goes_on_with_the_state_of_a_version_before() {
    for fixture in Fixture::all() {
        let (control_plane, said) = on(&fixture);
        let (token, cluster) = (
            |name: &str| said["tokens"][name].as_str().unwrap(),
            said["cluster"].as_str().unwrap(),
        );
        let (kube, address) = serve_kube().await;
        kube.ready.store(true, Relaxed);
        let sandbox = Sandbox::new();
        fixture.put("agent", &sandbox, &agent_names(&control_plane, &sandbox));
        credential(&sandbox, address);
        let file = |name: &str| sandbox.read(&format!("/var/lib/pipeops-agent/{name}"));
        let (identity, audit) = (file("identity.json"), file("audit/audit.jsonl"));
        assert!(audit.lines().count() > 2);
        let verified = |sandbox: &Sandbox| {
            crate::support::run_output(sandbox.command(&["audit", "verify"]).output().unwrap())
                .ended(0)
        };
        verified(&sandbox);
        // no token: what it has is enough
        let agent = Agent::start(sandbox, &[("LOG_LEVEL", "debug")]);
        for operation in ["running", "waits"] {
            wait_for_state(
                &control_plane,
                cluster,
                token("runner"),
                said["operations"][operation].as_str().unwrap(),
                "succeeded",
            )
            .await;
        }
        assert_eq!(control_plane.version(cluster).await, 200);
        for who in ["runner", "kubeconfig"] {
            let path = format!("/clusters/{cluster}/k8s/api/v1/namespaces/beta/pods");
            assert_eq!(control_plane.try_get(&path, token(who)).await.status(), 200, "{who}");
        }
        // the request of then is the operation of then
        let (status, same) =
            submit(&control_plane, cluster, token("runner"), "done", &apply(&[deployment("done")]))
                .await;
        assert_eq!((status, &same["id"]), (200, &said["operations"]["done"]), "{same}");
        let clusters = control_plane.clusters().await;
        assert_eq!(clusters["items"].as_array().unwrap().len(), 1, "{clusters}");
        assert_eq!(agent.sandbox.read("/var/lib/pipeops-agent/identity.json"), identity);
        // one chain, over both
        let now = agent.sandbox.read("/var/lib/pipeops-agent/audit/audit.jsonl");
        assert!(now.starts_with(&audit) && now.len() > audit.len());
        verified(&agent.sandbox);
        let local = async || {
            tokio::task::block_in_place(|| agent.get("/metrics"))
                .split_once("\r\n\r\n")
                .unwrap()
                .1
                .to_owned()
        };
        until_metrics(&fixture.text("agent.metrics"), "agent", local).await;
        let remote = async || {
            control_plane.try_get("/metrics", &control_plane.admin).await.text().await.unwrap()
        };
        until_metrics(&fixture.text("control-plane.metrics"), "control plane", remote).await;
    }
}

/// A machine with something of its own where pipeops will write, and with a user.
fn machine(program: &Path) -> Sandbox {
    let sandbox = Sandbox::of(program);
    sandbox.put("/etc/rancher/k3s/registries.yaml", "mirrors: {}\n");
    std::fs::create_dir_all(sandbox.root().join("home/ops")).unwrap();
    sandbox.beside(
        "registries.yaml",
        "mirrors: {docker.io: {endpoint: [\"https://mirror.invalid\"]}}\n",
        0o600,
    );
    sandbox
}

/// With an option of each kind; fixtures were made with these.
fn install(sandbox: &Sandbox, more: &[&str]) -> RunOutput {
    let (release, registries) = (sandbox.path("release"), sandbox.path("registries.yaml"));
    let mut args = vec![
        "install-server",
        "--offline-dir",
        &release,
        "--registries",
        &registries,
        "--timeout",
        "20s",
    ];
    args.extend([
        "--tls-san",
        "api.example.com",
        "--node-label",
        "pool=a",
        "--api-allow",
        "192.0.2.0/24",
        "--kubeconfig-for",
        "ops",
    ]);
    args.extend([
        "--components",
        "metrics,storage",
        "--cluster-name",
        "prod eu",
        "--control-plane-url",
        "https://cp.invalid",
        "-o",
        "json",
    ]);
    if !more.contains(&"--plan-out") {
        args.push("--yes");
    }
    args.extend(more);
    sandbox.run_with(&args, &[("AGENT_TOKEN", "enrolment-token-of-a-fixture-0001")])
}

/// What another program in the place of the former one makes necessary, with the rights that it has
/// since.
const NEW_PROGRAM: [&str; 5] = [
    "install pipeops",
    "create the access rights",
    "create the rights for tenants",
    "mint the agent's credential",
    "start the agent",
];

#[test]
fn a_node_of_a_version_before_is_known_and_can_be_undone() {
    for fixture in Fixture::all() {
        let sandbox = machine(program());
        let untouched = sandbox.tree();
        fixture.put("node", &sandbox, &node_names(&sandbox));
        *sandbox.api.objects.lock().unwrap() =
            serde_json::from_str(&fixture.text("node-objects.json")).unwrap();
        let changes = install(&sandbox, &[]).ended(0).json()["changes"].clone();
        assert_eq!(changes, json!(NEW_PROGRAM));
        assert_eq!(install(&sandbox, &[]).ended(0).json()["result"], "unchanged");
        assert!(!sandbox.calls().contains("restart --no-block k3s.service"), "{}", sandbox.calls());
        sandbox.run(&["uninstall", "--yes"]).ended(0);
        assert_same_tree(&sandbox.tree(), &untouched, "");
    }
}

/// Machines to which a plan is brought.
const PLAN_CASES: [&str; 3] = ["as it was", "changed since", "another machine"];

/// What becomes of the plan of a fixture there.
fn plan_case(case: &str, program: &Path, fixture: &Fixture) -> Value {
    let sandbox = machine(program);
    match case {
        "changed since" => sandbox.put("/usr/local/bin/kubectl", "mine"),
        "another machine" => sandbox.put("/etc/machine-id", "ffffffffffffffffffffffffffffffff\n"),
        _ => {}
    }
    sandbox.beside("plan.json", &fixture.named("plan.json", &node_names(&sandbox)), 0o600);
    let said = install(&sandbox, &["--apply-plan", &sandbox.path("plan.json")]);
    let json = said.json();
    json!({"exit": said.code, "result": json["result"], "code": json["error"]["code"],
        "changes": json["changes"]})
}

#[test]
fn a_plan_of_a_version_before_is_carried_out_or_refused_as_it_was() {
    for fixture in Fixture::all() {
        let outcomes = fixture.json("plan-outcomes.json");
        for case in PLAN_CASES {
            assert_eq!(plan_case(case, program(), &fixture), outcomes[case], "{case}");
        }
    }
}

#[test]
fn a_node_is_upgraded_and_rolled_back() {
    let Some(before) = before("a node is upgraded and rolled back") else { return };
    let mut sandbox = machine(&before);
    let untouched = sandbox.tree();
    install(&sandbox, &[]).ended(0);
    // a version that knows no step for tenants takes their rights back before it does anything else
    let mut back = NEW_PROGRAM;
    back[..3].rotate_right(1);
    for (what, next, wanted) in
        [("upgraded", program(), NEW_PROGRAM), ("rolled back", &before, back)]
    {
        sandbox.program = next.to_owned();
        assert_eq!(install(&sandbox, &[]).ended(0).json()["changes"], json!(wanted), "{what}");
        assert_eq!(install(&sandbox, &[]).ended(0).json()["result"], "unchanged", "{what}");
        assert_eq!(
            std::fs::read(sandbox.root().join("usr/local/bin/pipeops")).unwrap(),
            std::fs::read(next).unwrap()
        );
    }
    assert!(!sandbox.calls().contains("restart --no-block k3s.service"), "{}", sandbox.calls());
    sandbox.run(&["uninstall", "--yes"]).ended(0);
    assert_same_tree(&sandbox.tree(), &untouched, "");
}

/// What was given out while the version before ran.
struct Given {
    cluster: String,
    /// Of the cluster, as it is listed: nobody has registered again as another one.
    listed: Value,
    runner: String,
    kubeconfig: String,
    /// The answer with a token that the agent judges, and the way to it.
    minted: Value,
    operation: Value,
}

impl Given {
    async fn by(control_plane: &ControlPlane, cluster: String) -> Given {
        let runner = control_plane.runner("deployer").await["token"].as_str().unwrap().to_owned();
        let kubeconfig = control_plane
            .json("POST", &format!("/api/v1/clusters/{cluster}/kubeconfig"), &runner, json!({}))
            .await;
        let minted = control_plane
            .json(
                "POST",
                &format!("/api/v1/clusters/{cluster}/token"),
                &runner,
                json!({"ttl_s": 300}),
            )
            .await;
        let (_, operation) =
            submit(control_plane, &cluster, &runner, "first", &apply(&[deployment("first")])).await;
        wait_for_state(
            control_plane,
            &cluster,
            &runner,
            operation["id"].as_str().unwrap(),
            "succeeded",
        )
        .await;
        let kubeconfig = kubeconfig["users"][0]["user"]["token"].as_str().unwrap().to_owned();
        let mut given = Given {
            cluster,
            listed: Value::Null,
            runner,
            kubeconfig,
            minted,
            operation: operation["id"].clone(),
        };
        given.listed = given.listed(control_plane).await.0;
        given
    }

    /// What stays of the cluster, and whether it is there.
    async fn listed(&self, control_plane: &ControlPlane) -> (Value, bool) {
        let all = control_plane.clusters().await;
        let [cluster] = all["items"].as_array().unwrap().as_slice() else { panic!("{all}") };
        let stays = ["id", "name", "project", "agent_id", "registered_at", "max_role"]
            .map(|name| cluster[name].clone());
        (json!(stays), cluster["state"] == "online" && cluster["tunnel"] == "up")
    }

    /// Straight through the tunnel, as a Runner without a gateway goes.
    async fn straight(&self) -> std::io::Result<String> {
        let endpoint = self.minted["endpoints"]
            .as_array()
            .unwrap()
            .iter()
            .find(|e| e["type"] == "stcp")
            .unwrap();
        let text = |name: &str| endpoint[name].as_str().unwrap().to_owned();
        let mut tasks = tokio::task::JoinSet::new();
        let connector = tunnel_of(endpoint, &mut tasks).await?;
        let key = pipeops::base::secret::Secret::new(text("secret_key"));
        let io = pipeops::frp::client::visit(&connector, "", &text("proxy"), &key).await?;
        let mut io =
            crate::fake_control_plane::pinned(&text("agent_pin"), Box::new(io), b"http/1.1")
                .await?;
        let token = self.minted["token"].as_str().unwrap();
        let head = format!(
            "GET /k8s/version HTTP/1.1\r\nHost: agent\r\nAuthorization: Bearer {token}\r\nConnection: close\r\n\r\n"
        );
        io.write_all(head.as_bytes()).await?;
        io.flush().await?;
        let mut answer = Vec::new();
        // whether it ends TLS in order is not what is asked
        let _ = io.read_to_end(&mut answer).await;
        Ok(String::from_utf8_lossy(&answer).into_owned())
    }

    /// All of it is worth what it was.
    async fn holds(&self, control_plane: &ControlPlane, kube: &Kube, step: &str) {
        let begun = Instant::now();
        let pods = format!("/clusters/{}/k8s/api/v1/namespaces/beta/pods", self.cluster);
        loop {
            let mut found = Vec::new();
            for token in [&control_plane.admin, &self.runner, &self.kubeconfig] {
                found.push(control_plane.try_get(&pods, token).await.status().as_u16());
            }
            let straight = self.straight().await.map_or_else(
                |e| e.to_string(),
                |text| text.lines().next().unwrap_or_default().to_owned(),
            );
            let (listed, there) = self.listed(control_plane).await;
            // never another one, not even for a moment
            assert_eq!(listed, self.listed, "{step}");
            if there && found == [200, 200, 200] && straight == "HTTP/1.1 200 OK" {
                break;
            }
            assert!(
                begun.elapsed() < Duration::from_secs(40),
                "{step}: {found:?} {straight} {there}"
            );
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        let (status, same) = submit(
            control_plane,
            &self.cluster,
            &self.runner,
            "first",
            &apply(&[deployment("first")]),
        )
        .await;
        assert_eq!((status, &same["id"]), (200, &self.operation), "{step}: {same}");
        let (status, taken) = submit(
            control_plane,
            &self.cluster,
            &self.runner,
            &step.replace(' ', "-"),
            &apply(&[deployment("next")]),
        )
        .await;
        assert_eq!(status, 202, "{step}: {taken}");
        wait_for_state(
            control_plane,
            &self.cluster,
            &self.runner,
            taken["id"].as_str().unwrap(),
            "succeeded",
        )
        .await;
        let done = kube
            .through()
            .iter()
            .filter(|s| s.method == "PATCH" && s.uri.contains("/deployments/first?"))
            .count();
        assert_eq!(done, 1, "{step}: the first operation was carried out again");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_control_plane_and_its_agent_are_upgraded_and_rolled_back_while_tokens_and_tunnel_live() {
    let Some(before) = before("a control plane and its agent are upgraded and rolled back") else {
        return;
    };
    let _ = rustls::crypto::ring::default_provider().install_default();
    let mut control_plane = ControlPlane::begin(Sandbox::of(&before), &[]);
    control_plane.admin =
        std::fs::read_to_string(control_plane.sandbox.root().join(DATA).join("admin-token"))
            .unwrap();
    let (kube, address) = serve_kube().await;
    kube.ready.store(true, Relaxed);
    let (mut agent, cluster) = control_plane.agent(address).await;
    let given = Given::by(&control_plane, cluster).await;
    given.holds(&control_plane, &kube, "before").await;
    let identity = agent.sandbox.read("/var/lib/pipeops-agent/identity.json");
    let steps = [
        ("a new control plane, an old agent", Some(program()), None),
        ("both new", None, Some(program())),
        ("an old control plane, a new agent", Some(&*before), None),
        ("both old", None, Some(&*before)),
    ];
    for (step, new_control_plane, new_agent) in steps {
        if let Some(program) = new_control_plane {
            control_plane.stop();
            control_plane.sandbox.program = program.to_owned();
            control_plane.start_again();
        }
        if let Some(program) = new_agent {
            nix::sys::signal::kill(
                nix::unistd::Pid::from_raw(agent.child.id().try_into().unwrap()),
                nix::sys::signal::Signal::SIGTERM,
            )
            .unwrap();
            assert_eq!(tokio::task::block_in_place(|| agent.child.wait()).unwrap().code(), Some(0));
            agent.sandbox.program = program.to_owned();
            // without a token to enrol with
            agent.restart(&[("LOG_LEVEL", "debug")]);
        }
        given.holds(&control_plane, &kube, step).await;
        let state = agent.sandbox.read("/var/lib/pipeops-agent/identity.json");
        assert_eq!(state, identity, "{step}");
        run_output(agent.sandbox.command(&["audit", "verify"]).output().unwrap()).ended(0);
    }
}
