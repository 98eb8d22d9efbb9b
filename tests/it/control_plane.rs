//! The control plane as a program: agents come, Runners go through it, nobody gets what belongs to
//! another.

use std::io::{BufRead as _, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use pipeops::agent::session::identity::{Identity, LoadedIdentity};
use pipeops::control_plane::routes::{RequiredAuth, Route};
use pipeops::host::Host;
use reqwest::{Client, Method, Response};
use serde_json::{Value, json};

use crate::agent::Agent;
use crate::fake_control_plane::free_port;
use crate::support::Sandbox;
use crate::world::{credential, serve_kube};

/// A control plane in a sandbox of its own.
pub(crate) struct ControlPlane {
    pub(crate) sandbox: Sandbox,
    pub(crate) child: Child,
    pub(crate) url: String,
    pub(crate) admin: String,
    pub(crate) client: Client,
    /// What it said.
    pub(crate) log: Arc<Mutex<String>>,
    /// Of the API and of the tunnel.
    pub(crate) ports: (u16, u16),
    options: Vec<String>,
}

impl Drop for ControlPlane {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub(crate) const DATA: &str = "var/lib/pipeops-control-plane";

#[expect(clippy::zombie_processes, reason = "it fails the test, which ends everything")]
/// Starts the program and gives the port of its API; what it says goes into `log`.
fn spawn(
    sandbox: &Sandbox,
    ports: (u16, u16),
    options: &[String],
    log: &Arc<Mutex<String>>,
) -> (Child, u16) {
    let (https, tunnel) = (format!("127.0.0.1:{}", ports.0), format!("127.0.0.1:{}", ports.1));
    let mut args = vec![
        "control-plane",
        "--listen",
        &https,
        "--tunnel-listen",
        &tunnel,
        "--public-name",
        "127.0.0.1",
    ];
    args.extend(options.iter().map(String::as_str));
    // few descriptors, as a shell may hand them out: it is up to the program to ask for more
    let plain = sandbox.command(&args);
    let mut command = Command::new("/bin/sh");
    command
        .args(["-c", "ulimit -S -n 200; exec \"$0\" \"$@\""])
        .arg(plain.get_program())
        .args(plain.get_args());
    command.env_clear().envs(plain.get_envs().filter_map(|(name, value)| Some((name, value?))));
    let mut child = command
        .env("LOG_LEVEL", "debug")
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = BufReader::new(child.stderr.take().unwrap());
    loop {
        let mut line = String::new();
        assert!(
            said.read_line(&mut line).unwrap() > 0,
            "it does not serve: {}",
            log.lock().unwrap()
        );
        log.lock().unwrap().push_str(&line);
        let port = line
            .split_once("https=127.0.0.1:")
            .map(|(_, r)| r.chars().take_while(char::is_ascii_digit).collect::<String>());
        if let Some(port) = port.filter(|_| line.contains("serving")) {
            // a log that nobody reads would stop it at its next line
            let log = log.clone();
            std::thread::spawn(move || {
                let mut line = String::new();
                while said.read_line(&mut line).is_ok_and(|n| n > 0) {
                    log.lock().unwrap().push_str(&std::mem::take(&mut line));
                }
            });
            return (child, port.parse().unwrap());
        }
    }
}

impl ControlPlane {
    fn start() -> ControlPlane {
        ControlPlane::with(&[])
    }

    pub(crate) fn with(options: &[&str]) -> ControlPlane {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let mut control_plane = ControlPlane::begin(Sandbox::new(), options);
        control_plane.admin =
            std::fs::read_to_string(control_plane.sandbox.root().join(DATA).join("admin-token"))
                .unwrap();
        control_plane
    }

    pub(crate) fn begin(sandbox: Sandbox, options: &[&str]) -> ControlPlane {
        let ports = (free_port(), free_port());
        let (log, options) =
            (Arc::default(), options.iter().map(|o| (*o).to_owned()).collect::<Vec<_>>());
        let (child, port) = spawn(&sandbox, ports, &options, &log);
        let ca = ControlPlane::stored(&sandbox)["ca_certificate"].as_str().unwrap().to_owned();
        let client = Client::builder()
            .tls_certs_only([reqwest::Certificate::from_pem(ca.as_bytes()).unwrap()])
            .no_proxy()
            .build()
            .unwrap();
        ControlPlane {
            sandbox,
            child,
            url: format!("https://127.0.0.1:{port}"),
            admin: String::new(),
            client,
            log,
            ports,
            options,
        }
    }

    /// On what a sandbox already holds; its administrators are those of before.
    pub(crate) fn on(sandbox: Sandbox) -> ControlPlane {
        ControlPlane::begin(sandbox, &[])
    }

    /// From its next start on.
    pub(crate) fn set_options(&mut self, options: &[&str]) {
        self.options = options.iter().map(|o| (*o).to_owned()).collect();
    }

    /// kill -9, and the same again on the same port.
    pub(crate) fn kill_and_restart(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        self.start_again();
    }

    /// SIGTERM, as systemd ends it.
    pub(crate) fn stop(&mut self) {
        let pid = nix::unistd::Pid::from_raw(self.child.id().try_into().unwrap());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
        assert_eq!(self.child.wait().unwrap().code(), Some(0), "{}", self.log.lock().unwrap());
    }

    /// The program of the sandbox on the same data and the same ports.
    pub(crate) fn start_again(&mut self) {
        self.child = spawn(&self.sandbox, self.ports, &self.options, &self.log).0;
    }

    pub(crate) fn stored(sandbox: &Sandbox) -> Value {
        serde_json::from_str(
            &std::fs::read_to_string(sandbox.root().join(DATA).join("keys.json")).unwrap(),
        )
        .unwrap()
    }

    pub(crate) async fn ask(&self, method: &str, path: &str, token: &str, body: Value) -> Response {
        let request = self
            .client
            .request(method.parse::<Method>().unwrap(), format!("{}{path}", self.url))
            .json(&body);
        let request = if token.is_empty() { request } else { request.bearer_auth(token) };
        request.send().await.unwrap()
    }

    pub(crate) async fn json(&self, method: &str, path: &str, token: &str, body: Value) -> Value {
        let answer = self.ask(method, path, token, body).await;
        let status = answer.status();
        let text = answer.text().await.unwrap();
        assert!(status.is_success(), "{method} {path}: {status} {text}");
        serde_json::from_str(&text).unwrap()
    }

    /// What is there; asking for it must succeed.
    pub(crate) async fn get(&self, path: &str, token: &str) -> Value {
        self.json("GET", path, token, json!({})).await
    }

    pub(crate) async fn try_get(&self, path: &str, token: &str) -> Response {
        self.ask("GET", path, token, json!({})).await
    }

    /// All clusters, as an administrator sees them.
    pub(crate) async fn clusters(&self) -> Value {
        self.get("/api/v1/clusters", &self.admin).await
    }

    /// The cluster of an agent.
    pub(crate) async fn cluster_of(&self, agent: &SimulatedAgent) -> Value {
        let clusters = self.clusters().await;
        let mut all = clusters["items"].as_array().unwrap().iter();
        all.find(|c| c["agent_id"] == agent.id.as_str()).unwrap().clone()
    }

    /// What the verb prints that makes an enrolment token.
    pub(crate) fn enrol(&self) -> (String, String) {
        let line = self.sandbox.subcommand(&["control-plane", "token", "create"]).ended(0).out;
        let words: Vec<&str> = line.split_whitespace().collect();
        let after = |name: &str| {
            words.iter().position(|w| *w == name).map(|at| words[at + 1].to_owned()).unwrap()
        };
        assert_eq!(after("--control-plane-url"), self.url);
        (words[1].to_owned(), after("--control-plane-pin"))
    }

    /// A real agent beside a Kubernetes API, enrolled by the line; gives its cluster's id.
    pub(crate) async fn agent(&self, kube: std::net::SocketAddr) -> (Agent, String) {
        let (token, pin) = self.enrol();
        let sandbox = Sandbox::of(&self.sandbox.program);
        credential(&sandbox, kube);
        sandbox.put("/etc/machine-id", "0123456789abcdef0123456789abcdef\n");
        sandbox.put(
            "/etc/pipeops/agent.toml",
            &format!("control-plane-url = \"{}\"\ncontrol-plane-pin = [\"{pin}\"]\ncluster-name = \"<b>x</b>\"\n", self.url),
        );
        let agent = Agent::start(sandbox, &[("AGENT_TOKEN", &token), ("LOG_LEVEL", "debug")]);
        let begun = Instant::now();
        loop {
            let clusters = self.clusters().await;
            let up = clusters["items"]
                .as_array()
                .unwrap()
                .iter()
                .find(|c| c["state"] == "online" && c["tunnel"] == "up");
            if let Some(found) = up {
                let id = found["id"].as_str().unwrap().to_owned();
                let through = self.version(&id).await;
                if through == 200 {
                    return (agent, id);
                }
            }
            assert!(
                begun.elapsed() < Duration::from_secs(40),
                "never up: {clusters}; {}",
                tokio::task::block_in_place(|| agent.get("/status"))
            );
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// What the cluster's own API answers through the gateway.
    pub(crate) async fn version(&self, cluster: &str) -> u16 {
        self.ask("GET", &format!("/clusters/{cluster}/k8s/version"), &self.admin, json!({}))
            .await
            .status()
            .as_u16()
    }

    /// A new Runner; each has a name of its own.
    pub(crate) async fn runner(&self, role: &str) -> Value {
        static MADE: AtomicU32 = AtomicU32::new(0);
        let name = format!("ci-{}", MADE.fetch_add(1, Ordering::Relaxed));
        self.json("POST", "/api/v1/runners", &self.admin, json!({"name": name, "role": role})).await
    }

    /// A Runner for one cluster, which is gone: it reaches none.
    pub(crate) async fn runner_for_nothing(&self, name: &str) -> Value {
        let dir = tempfile::tempdir().unwrap();
        let agent = SimulatedAgent::new(self, dir.path(), &self.enrol().0).await;
        let cluster = self.cluster_of(&agent).await["id"].clone();
        let body = json!({"name": name, "clusters": [&cluster]});
        let runner = self.json("POST", "/api/v1/runners", &self.admin, body).await;
        let path = format!("/api/v1/clusters/{}", cluster.as_str().unwrap());
        self.json("DELETE", &path, &self.admin, json!({})).await;
        runner
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_runner_reaches_a_cluster_through_the_gateway_and_loses_it_when_he_is_revoked() {
    let control_plane = ControlPlane::start();
    let (kube, address) = serve_kube().await;
    let (agent, cluster) = control_plane.agent(address).await;
    let runner = control_plane.runner("deployer").await;
    let token = runner["token"].as_str().unwrap();
    // the API as the Runner, with nothing of its own credential
    let pods = format!("/clusters/{cluster}/k8s/api/v1/namespaces/beta/pods?limit=5");
    assert_eq!(control_plane.get(&pods, token).await["path"], "/api/v1/namespaces/beta/pods");
    let seen = kube.through().pop().unwrap();
    assert_eq!(
        (seen.all("impersonate-group"), seen.uri.as_str()),
        (vec!["pipeops:deployer"], "/api/v1/namespaces/beta/pods?limit=5")
    );
    assert!(seen.headers.iter().all(|(_, v)| !v.contains(token)), "{seen:?}");
    assert_eq!(
        control_plane
            .json("GET", &format!("/clusters/{cluster}/api/v1/status"), token, json!({}))
            .await["control"],
        "online"
    );
    // a body of 32 MiB, both sizes of client connection
    let bulk = control_plane
        .ask(
            "GET",
            &format!("/clusters/{cluster}/k8s/api/v1/namespaces/beta/pods/bulk/log?n=33554432"),
            token,
            json!({}),
        )
        .await;
    assert_eq!(bulk.headers()["content-security-policy"], "sandbox");
    let whole = bulk.bytes().await.unwrap_or_else(|e| {
        panic!("{e:?}\n{}\n{}", control_plane.log.lock().unwrap(), agent.log())
    });
    assert_eq!(whole.len(), 33_554_432);
    // a kubeconfig carries its own way in
    let answer = control_plane
        .ask(
            "POST",
            &format!("/api/v1/clusters/{cluster}/kubeconfig"),
            token,
            json!({"role": "viewer", "namespaces": ["beta"]}),
        )
        .await;
    assert_eq!(
        (answer.status().as_u16(), answer.headers()["cache-control"].to_str().unwrap()),
        (201, "no-store")
    );
    let config: Value = serde_json::from_str(&answer.text().await.unwrap()).unwrap();
    let own = config["users"][0]["user"]["token"].as_str().unwrap();
    assert_eq!(
        config["clusters"][0]["cluster"]["server"],
        format!("{}/clusters/{cluster}/k8s", control_plane.url)
    );
    control_plane
        .json(
            "GET",
            &format!("/clusters/{cluster}/k8s/api/v1/namespaces/beta/pods"),
            own,
            json!({}),
        )
        .await;
    assert_eq!(kube.through().pop().unwrap().all("impersonate-group"), ["pipeops:viewer"]);
    let scope = control_plane
        .ask(
            "GET",
            &format!("/clusters/{cluster}/k8s/api/v1/namespaces/production/pods"),
            own,
            json!({}),
        )
        .await;
    assert_eq!(scope.status(), 403);
    // it opens the gateway and nothing else
    assert_eq!(
        control_plane
            .ask("POST", &format!("/api/v1/clusters/{cluster}/token"), own, json!({}))
            .await
            .status(),
        403
    );
    // a stream that is open ends with the right to it
    let mut watch = control_plane
        .ask("GET", &format!("/clusters/{cluster}/k8s/api/v1/pods?watch=1"), token, json!({}))
        .await;
    assert_eq!(watch.status(), 200);
    let id = runner["id"].as_str().unwrap();
    control_plane.sandbox.subcommand(&["control-plane", "runner", "revoke", id]).ended(0);
    let ended = tokio::time::timeout(Duration::from_secs(5), async {
        while let Ok(Some(_)) = watch.chunk().await {}
    })
    .await;
    assert!(ended.is_ok(), "the watch goes on");
    assert_eq!(control_plane.try_get(&pods, token).await.status(), 401);
    // and what it has made
    assert_eq!(control_plane.try_get(&pods, own).await.status(), 401);
    // so does everything of an agent that is revoked
    let mut watch = control_plane
        .ask(
            "GET",
            &format!("/clusters/{cluster}/k8s/api/v1/pods?watch=1"),
            &control_plane.admin,
            json!({}),
        )
        .await;
    control_plane.sandbox.subcommand(&["control-plane", "cluster", "revoke", &cluster]).ended(0);
    let ended = tokio::time::timeout(Duration::from_secs(5), async {
        while let Ok(Some(_)) = watch.chunk().await {}
    })
    .await;
    assert!(ended.is_ok(), "the watch goes on");
    let show = control_plane
        .sandbox
        .subcommand(&["control-plane", "cluster", "show", &cluster])
        .ended(0)
        .out;
    assert!(show.contains("revoked"), "{show}");
    // nothing that opens anything stands in the database
    let mut database = Vec::new();
    for file in ["pipeops.db", "pipeops.db-wal"] {
        database.extend(
            std::fs::read(control_plane.sandbox.root().join(DATA).join(file)).unwrap_or_default(),
        );
    }
    let database = String::from_utf8_lossy(&database).into_owned();
    for secret in [token, own, &control_plane.admin] {
        assert!(!database.contains(secret) && !database.contains(&secret[4..]));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_runner_that_would_reach_nothing_is_refused_and_one_is_revoked_by_its_name() {
    let control_plane = ControlPlane::start();
    let dir = tempfile::tempdir().unwrap();
    let agent = SimulatedAgent::new(&control_plane, dir.path(), &control_plane.enrol().0).await;
    let runner = |args: &[&str]| {
        control_plane.sandbox.subcommand(&[&["control-plane", "runner"][..], args].concat())
    };
    for (args, code, said) in [
        (&["--clusters", "nope"][..], 7, "there is no cluster nope"),
        (&["--namespaces", "A B"][..], 2, "`A B` is no name of a namespace"),
        (&["--role", "root"][..], 2, "viewer, deployer, operator or admin"),
        (&["--ttl", "0"][..], 2, "--ttl"),
    ] {
        let refused = runner(&[&["create", "ci"], args].concat()).ended(code);
        assert!(refused.err.contains(said), "{args:?}: {}", refused.err);
    }
    assert_eq!(runner(&["list"]).ended(0).out.trim(), "none yet");
    // the token alone is on standard output; the id stands beside it
    let made = runner(&["create", "ci", "--clusters", "n"]).ended(0);
    assert!(made.out.starts_with("por_") && made.out.trim().lines().count() == 1, "{}", made.out);
    let id = made.err.split_whitespace().find(|w| w.starts_with("r-")).unwrap().to_owned();
    let again = runner(&["create", "ci"]).ended(7);
    assert!(again.err.contains("NAME_TAKEN"), "{}", again.err);
    let free = runner(&["create", "free"]).ended(0);
    assert!(!free.out.contains(&id));
    let rows = runner(&["list", "-o", "json"]).ended(0).json();
    let row = rows["items"].as_array().unwrap().iter().find(|r| r["id"] == id.as_str()).unwrap();
    let clusters = control_plane.clusters().await;
    assert_eq!(clusters["items"][0]["agent_id"], agent.id.as_str());
    assert_eq!(row["clusters"], json!([clusters["items"][0]["id"]]));
    let table = runner(&["list"]).ended(0).out;
    let line = table.lines().find(|l| l.contains("free")).unwrap();
    assert!(
        table.contains("PROJECT")
            && line.contains(row["project"].as_str().unwrap())
            && line.matches(" all ").count() == 3,
        "{table}"
    );
    // the same name in another project: then it is asked for the id
    control_plane
        .json("POST", "/api/v1/projects", &control_plane.admin, json!({"name": "other"}))
        .await;
    runner(&["create", "ci", "--project", "other"]).ended(0);
    let ambiguous = runner(&["revoke", "ci"]).ended(2);
    assert!(ambiguous.err.contains("NAME_AMBIGUOUS"), "{}", ambiguous.err);
    assert!(ambiguous.err.contains(&id), "{}", ambiguous.err);
    runner(&["revoke", &id]).ended(0);
    runner(&["revoke", "ci"]).ended(0);
    runner(&["revoke", "ci"]).ended(7);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_whose_kubernetes_is_away_is_listed_with_the_reason_and_shown_as_the_agent_says()
{
    let control_plane = ControlPlane::start();
    let dir = tempfile::tempdir().unwrap();
    let agent = SimulatedAgent::new(&control_plane, dir.path(), &control_plane.enrol().0).await;
    let told = control_plane
        .ask(
            "POST",
            &format!("/api/v1/agents/{}/status", agent.id),
            &agent.credential,
            json!({"kubernetes": "waiting", "reason": "/k is not there yet",
                   "usage": {"memory_used_bytes": 1 << 30, "memory_total_bytes": 1u64 << 31}}),
        )
        .await;
    assert_eq!(told.status(), 200);
    let list = control_plane.sandbox.subcommand(&["control-plane", "cluster", "list"]).ended(0).out;
    assert!(list.contains("kubernetes waiting: /k is not there yet"), "{list}");
    let show =
        control_plane.sandbox.subcommand(&["control-plane", "cluster", "show", "n"]).ended(0).out;
    let nowhere = control_plane.sandbox.path("nowhere/x");
    for args in [
        &["control-plane", "backup", &nowhere][..],
        &["control-plane", "cluster", "kubeconfig", "n", "--write", &nowhere],
    ] {
        let refused = control_plane.sandbox.subcommand(args).ended(2);
        assert!(refused.err.contains("FILE_UNWRITABLE"), "{args:?}: {}", refused.err);
    }
    // its kubeconfig is nobody else's to read, also where another file was
    let file = control_plane.sandbox.path("n.yaml");
    std::fs::write(&file, "old").unwrap();
    let args = ["control-plane", "cluster", "kubeconfig", "n", "--write", &file];
    assert_eq!(control_plane.sandbox.subcommand(&args).ended(0).out, "");
    let mode =
        std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&file).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o600);
    assert!(std::fs::read_to_string(&file).unwrap().contains("current-context"));
    for line in [
        "reason        kubernetes waiting: /k is not there yet",
        "kubernetes    waiting: /k is not there yet",
        "pods          0 of 0 running",
        "memory        1024 of 2048 MiB used",
    ] {
        assert!(show.lines().any(|l| l == line), "{line}: {show}");
    }
}

/// Waits for a line in an agent's log.
pub(crate) async fn logged(agent: &Agent, wanted: &str) -> String {
    let begun = Instant::now();
    loop {
        if let Some(line) = agent.log().lines().find(|l| l.contains(wanted)) {
            return line.to_owned();
        }
        assert!(begun.elapsed() < Duration::from_secs(30), "{wanted}: {}", agent.log());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_is_refused_or_mistrusts_warns_and_says_that_it_is_stopped() {
    let control_plane = ControlPlane::start();
    let (token, pin) = control_plane.enrol();
    let start = |toml: &str, env: &[(&str, &str)]| {
        let sandbox = Sandbox::of(&control_plane.sandbox.program);
        sandbox.put("/etc/machine-id", "0123456789abcdef0123456789abcdef\n");
        let url = &control_plane.url;
        sandbox.put("/etc/pipeops/agent.toml", &format!("control-plane-url = \"{url}\"\n{toml}"));
        Agent::start(sandbox, env)
    };
    let pinned = format!("control-plane-pin = [\"{pin}\"]\n");
    let wrong = "poe_a-token-that-nobody-has-made";
    let refused = start(&pinned, &[("AGENT_TOKEN", wrong), ("LOG_LEVEL", "warn")]);
    let line = logged(&refused, "unauthorized").await;
    assert!(line.contains("WARN"), "{line}");
    // every key of the server is named, the one that the line to paste has among them
    let other = format!("sha256:{}=", "A".repeat(43));
    let toml = format!("control-plane-pin = [\"{other}\"]\n");
    let mistrusts = start(&toml, &[("AGENT_TOKEN", &token)]);
    let line = logged(&mistrusts, "tls_pin").await;
    assert!(line.contains("WARN") && line.contains(&pin) && line.contains("its own"), "{line}");
    let pid = nix::unistd::Pid::from_raw(mistrusts.child.id().try_into().unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    mistrusts.until("STOPPING=1");
    logged(&mistrusts, "asked to stop").await;
    let log = mistrusts.log();
    assert_eq!(log.matches("asked to stop").count(), 1, "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn where_it_keeps_things_may_be_said_before_a_verb_or_behind_it() {
    let control_plane = ControlPlane::start();
    let data = format!("/{DATA}");
    for args in [
        ["control-plane", "--data-dir", &data, "cluster", "list"],
        ["control-plane", "cluster", "--data-dir", &data, "list"],
    ] {
        assert_eq!(control_plane.sandbox.run(&args).ended(0).out.trim(), "none yet");
    }
    let said = control_plane
        .sandbox
        .run(&["control-plane", "--listen", "127.0.0.1:1", "cluster", "list"])
        .ended(2);
    assert!(said.err.contains("SERVING_OPTION"), "{}", said.err);
}

/// On a terminal the first thing that is shown is all that is needed to go on.
#[tokio::test(flavor = "multi_thread")]
async fn on_a_terminal_it_shows_the_first_token_and_the_line_to_paste() {
    let sandbox = Sandbox::new();
    let plain = sandbox.command(&[
        "control-plane",
        "--listen",
        "127.0.0.1:0",
        "--tunnel-listen",
        "127.0.0.1:0",
        "--public-name",
        "127.0.0.1",
    ]);
    let words = std::iter::once(plain.get_program())
        .chain(plain.get_args())
        .map(|w| format!("'{}'", w.to_str().unwrap()))
        .collect::<Vec<_>>();
    let terminal = Command::new("script")
        .args(["-qfec", &words.join(" "), "/dev/null"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn();
    let Ok(mut terminal) = terminal else {
        return println!("NOT RUN: on a terminal: there is no `script` here");
    };
    let mut lines = BufReader::new(terminal.stdout.take().unwrap()).lines().map_while(Result::ok);
    let token = lines.find(|l| l.contains("pom_")).unwrap();
    let line = lines.find(|l| l.contains("poe_")).unwrap();
    let token = token.split_whitespace().last().unwrap().to_owned();
    let words: Vec<&str> = line.split_whitespace().collect();
    assert_eq!(
        &words[2..8],
        ["|", "sudo", "pipeops", "install-server", "--yes", "--agent-token-file"],
        "{line}"
    );
    let url = words[words.iter().position(|w| *w == "--control-plane-url").unwrap() + 1];
    assert!(lines.any(|l| l.contains("serving")));
    let ca = ControlPlane::stored(&sandbox)["ca_certificate"].as_str().unwrap().to_owned();
    let client = Client::builder()
        .tls_certs_only([reqwest::Certificate::from_pem(ca.as_bytes()).unwrap()])
        .no_proxy()
        .build()
        .unwrap();
    // the one opens the API, the other lets an agent in: all that is wrong with this one is that it
    // says nothing of itself
    assert_eq!(
        client
            .get(format!("{url}/api/v1/clusters"))
            .bearer_auth(&token)
            .send()
            .await
            .unwrap()
            .status(),
        200
    );
    let register = client
        .post(format!("{url}/api/v1/agents/register"))
        .bearer_auth(words[1])
        .body("{}")
        .send()
        .await
        .unwrap();
    assert_eq!(register.json::<Value>().await.unwrap()["code"], "bad_signature");
    assert!(!sandbox.root().join(DATA).join("admin-token").exists());
    // `script` passes its end on
    terminal.kill().unwrap();
    terminal.wait().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kubeconfig_ends_with_whoever_made_it() {
    let control_plane = ControlPlane::start();
    let (_kube, address) = serve_kube().await;
    let (_agent, cluster) = control_plane.agent(address).await;
    let made = async |token: &str| {
        let text = control_plane
            .ask("POST", &format!("/api/v1/clusters/{cluster}/kubeconfig"), token, json!({}))
            .await
            .text()
            .await
            .unwrap();
        serde_json::from_str::<Value>(&text).unwrap()["users"][0]["user"]["token"]
            .as_str()
            .unwrap()
            .to_owned()
    };
    let watch = async |token: &str| {
        control_plane
            .ask("GET", &format!("/clusters/{cluster}/k8s/api/v1/pods?watch=1"), token, json!({}))
            .await
    };
    let ends = async |mut stream: Response| {
        let ended = tokio::time::timeout(Duration::from_secs(5), async {
            while let Ok(Some(_)) = stream.chunk().await {}
        })
        .await;
        assert!(ended.is_ok(), "the watch goes on");
    };
    let runner = control_plane
        .json(
            "POST",
            "/api/v1/runners",
            &control_plane.admin,
            json!({"name": "ci", "role": "viewer", "ttl_s": 3600}),
        )
        .await;
    let admin = control_plane
        .json("POST", "/api/v1/admins", &control_plane.admin, json!({"name": "eve"}))
        .await;
    for taken in ["eve", "local"] {
        assert_eq!(
            control_plane
                .ask("POST", "/api/v1/admins", &control_plane.admin, json!({"name": taken}))
                .await
                .status(),
            409,
            "{taken}"
        );
    }
    let others = made(&control_plane.admin).await;
    for (who, path) in [(&runner, "runners"), (&admin, "admins")] {
        let (token, id) = (who["token"].as_str().unwrap(), who["id"].as_str().unwrap());
        let kubeconfig = made(token).await;
        let streams = [watch(token).await, watch(&kubeconfig).await];
        assert!(streams.iter().all(|s| s.status() == 200));
        // it does not outlive a token that has an end
        let rows = control_plane.get("/api/v1/runners", &control_plane.admin).await;
        let row = rows["items"].as_array().unwrap().iter().find(|r| {
            r["kind"] == "kubeconfig"
                && r["maker"].as_str().unwrap().contains(if path == "admins" { "eve" } else { id })
        });
        if let Some(end) = who["expires_at"].as_i64() {
            assert_eq!(row.unwrap()["expires_at"], end);
        }
        assert_eq!(
            control_plane
                .ask("DELETE", &format!("/api/v1/{path}/{id}"), &control_plane.admin, json!({}))
                .await
                .status(),
            200
        );
        for stream in streams {
            ends(stream).await;
        }
        assert_eq!(
            (watch(token).await.status(), watch(&kubeconfig).await.status()),
            (401.try_into().unwrap(), 401.try_into().unwrap())
        );
    }
    assert_eq!(watch(&others).await.status(), 200, "another one's goes on");
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_month_the_next_key_signs_and_nobody_notices() {
    let mut control_plane = ControlPlane::start();
    let (_kube, address) = serve_kube().await;
    let (_agent, cluster) = control_plane.agent(address).await;
    let before = ControlPlane::stored(&control_plane.sandbox);
    let since = |control_plane: &ControlPlane, value: Option<i64>| {
        let mut stored = ControlPlane::stored(&control_plane.sandbox);
        stored.as_object_mut().unwrap().remove("signing_since");
        if let Some(value) = value {
            stored["signing_since"] = json!(value);
        }
        std::fs::write(
            control_plane.sandbox.root().join(DATA).join("keys.json"),
            stored.to_string(),
        )
        .unwrap();
    };
    let turned = async |control_plane: &ControlPlane, done: &dyn Fn(&Value) -> bool| {
        let begun = Instant::now();
        // through the gateway, with a token that the key of this moment has signed
        while !done(&ControlPlane::stored(&control_plane.sandbox))
            || control_plane.version(&cluster).await != 200
        {
            assert!(
                begun.elapsed() < Duration::from_secs(40),
                "{}",
                control_plane.log.lock().unwrap()
            );
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        ControlPlane::stored(&control_plane.sandbox)["signing"].clone()
    };
    since(&control_plane, Some(1_700_000_000));
    control_plane.kill_and_restart();
    let month =
        turned(&control_plane, &|s| s["signing_since"].as_i64() > Some(1_700_000_000)).await;
    assert_eq!(
        (&month[0], &month[2], month.as_array().unwrap().len()),
        (&before["signing"][1], &before["signing"][0], 3)
    );
    // the one before is forgotten when no token of it lives
    since(&control_plane, Some(jiff::Timestamp::now().as_second() - 86_400 - 1000));
    control_plane.kill_and_restart();
    let later = turned(&control_plane, &|s| s["signing"].as_array().unwrap().len() == 2).await;
    assert_eq!((&later[0], &later[1]), (&month[0], &month[1]));
    // keys from before there was a date begin their month now
    since(&control_plane, None);
    control_plane.kill_and_restart();
    assert_eq!(
        turned(&control_plane, &|s| s["signing_since"].as_i64() > Some(1_700_000_000)).await,
        later
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn upgrades_pass_through_the_gateway() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let control_plane = ControlPlane::start();
    let (_kube, address) = serve_kube().await;
    let (_agent, cluster) = control_plane.agent(address).await;
    let answer = control_plane
        .client
        .get(format!(
            "{}/clusters/{cluster}/k8s/api/v1/namespaces/beta/pods/p/exec?command=sh",
            control_plane.url
        ))
        .version(reqwest::Version::HTTP_11)
        .bearer_auth(&control_plane.admin)
        .header("connection", "Upgrade")
        .header("upgrade", "SPDY/3.1");
    // over h2 an upgrade has no meaning: a client of its own that speaks HTTP/1.1
    let ca =
        ControlPlane::stored(&control_plane.sandbox)["ca_certificate"].as_str().unwrap().to_owned();
    let http1 = Client::builder()
        .tls_certs_only([reqwest::Certificate::from_pem(ca.as_bytes()).unwrap()])
        .no_proxy()
        .http1_only()
        .build()
        .unwrap();
    let answer = http1.execute(answer.build().unwrap()).await.unwrap();
    assert_eq!(answer.status(), 101, "{answer:?}");
    let mut io = answer.upgrade().await.unwrap();
    io.write_all(b"hello").await.unwrap();
    let mut back = [0; 5];
    io.read_exact(&mut back).await.unwrap();
    assert_eq!(&back, b"hello");
    control_plane.sandbox.subcommand(&["control-plane", "cluster", "revoke", &cluster]).ended(0);
    let ended = tokio::time::timeout(Duration::from_secs(5), io.read(&mut back)).await;
    assert!(matches!(ended, Ok(Ok(0) | Err(_))), "{ended:?}");
}

/// The way of a Runner into the tunnel, by the endpoint that it was told.
pub(crate) async fn tunnel_of(
    endpoint: &Value,
    tasks: &mut tokio::task::JoinSet<()>,
) -> std::io::Result<pipeops::frp::dial::Connector> {
    let text = |name: &str| endpoint[name].as_str().unwrap().to_owned();
    let config = pipeops::frp::TunnelConfig {
        server: "127.0.0.1".into(),
        port: text("address").rsplit(':').next().unwrap().parse().unwrap(),
        tcp_mux: true,
        tls: pipeops::frp::TunnelTls { pin: Some(text("server_pin")), ..Default::default() },
        ..Default::default()
    };
    let dialer = pipeops::frp::dial::Dialer::new(&config, false).unwrap();
    dialer.connect(tasks).await.map_err(|e| std::io::Error::other(format!("{e:?}")))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_runner_straight_through_the_tunnel_loses_it_too_when_he_is_revoked() {
    use tokio::io::AsyncReadExt as _;
    let control_plane = ControlPlane::start();
    let (_kube, address) = serve_kube().await;
    let (_agent, cluster) = control_plane.agent(address).await;
    let mut streams = Vec::new();
    for (who, runner) in [
        ("revoked", control_plane.runner("deployer").await),
        ("stays", control_plane.runner("deployer").await),
        ("elsewhere", control_plane.runner_for_nothing("c").await),
    ] {
        let minted = control_plane
            .ask(
                "POST",
                &format!("/api/v1/clusters/{cluster}/token"),
                runner["token"].as_str().unwrap(),
                json!({}),
            )
            .await;
        if who == "elsewhere" {
            assert_eq!(minted.status(), 404);
            continue;
        }
        let minted: Value = minted.json().await.unwrap();
        let endpoint = minted["endpoints"]
            .as_array()
            .unwrap()
            .iter()
            .find(|e| e["type"] == "stcp")
            .unwrap()
            .clone();
        let text = |name: &str| endpoint[name].as_str().unwrap().to_owned();
        let mut tasks = tokio::task::JoinSet::new();
        let connector = tunnel_of(&endpoint, &mut tasks).await.unwrap();
        let visit = async |key: String| {
            pipeops::frp::client::visit(
                &connector,
                "",
                &text("proxy"),
                &pipeops::base::secret::Secret::new(key),
            )
            .await
        };
        assert!(visit("guessed".into()).await.is_err());
        // held open as a half-made TLS connection is: the agent waits for its hello
        streams.push((runner["id"].clone(), visit(text("secret_key")).await.unwrap(), tasks));
    }
    assert_ne!(streams[0].0, streams[1].0);
    control_plane
        .sandbox
        .subcommand(&["control-plane", "runner", "revoke", streams[0].0.as_str().unwrap()])
        .ended(0);
    let mut byte = [0];
    let ended = tokio::time::timeout(Duration::from_secs(5), streams[0].1.read(&mut byte)).await;
    assert!(matches!(ended, Ok(Ok(0) | Err(_))), "{ended:?}");
    let goes_on =
        tokio::time::timeout(Duration::from_millis(300), streams[1].1.read(&mut byte)).await;
    assert!(goes_on.is_err(), "{goes_on:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_route_refuses_every_token_that_is_not_for_it() {
    let control_plane = ControlPlane::start();
    let (_kube, address) = serve_kube().await;
    let (_agent, cluster) = control_plane.agent(address).await;
    let (enrolment, _) = control_plane.enrol();
    let other = control_plane
        .json("POST", "/api/v1/projects", &control_plane.admin, json!({"name": "other"}))
        .await["id"]
        .as_str()
        .unwrap()
        .to_owned();
    let make = async |body: Value| {
        control_plane.json("POST", "/api/v1/runners", &control_plane.admin, body).await["token"]
            .as_str()
            .unwrap()
            .to_owned()
    };
    let runner = make(json!({"name": "mine"})).await;
    let foreign = make(json!({"name": "foreign", "project": other})).await;
    let elsewhere =
        control_plane.runner_for_nothing("elsewhere").await["token"].as_str().unwrap().to_owned();
    let short = make(json!({"name": "short", "ttl_s": 1})).await;
    let kubeconfig = control_plane
        .ask("POST", &format!("/api/v1/clusters/{cluster}/kubeconfig"), &runner, json!({}))
        .await
        .text()
        .await
        .unwrap();
    let kubeconfig: Value = serde_json::from_str(&kubeconfig).unwrap();
    let kubeconfig = kubeconfig["users"][0]["user"]["token"].as_str().unwrap().to_owned();
    // an agent of the test's own, for the tokens of one
    let dir = tempfile::tempdir().unwrap();
    let agent = SimulatedAgent::new(&control_plane, dir.path(), &enrolment).await;
    tokio::time::sleep(Duration::from_millis(1500)).await;
    let (fresh, _) = control_plane.enrol();
    let tokens = [
        ("none", ""),
        ("wrong", "por_wrong"),
        ("expired", &short),
        ("enrolment", &fresh),
        ("agent", &agent.credential),
        ("kubeconfig", &kubeconfig),
        ("foreign", &foreign),
        ("elsewhere", &elsewhere),
        ("runner", &runner),
        ("admin", &control_plane.admin),
    ];
    // a kubeconfig is for its cluster alone; a Runner of another project or cluster does not learn
    // that there is one
    let allowed = |required_auth: RequiredAuth, path: &str, who: &str| match required_auth {
        RequiredAuth::None => true,
        RequiredAuth::Enrolment => matches!(who, "enrolment" | "agent"),
        RequiredAuth::Agent => who == "agent",
        RequiredAuth::Admin => who == "admin",
        RequiredAuth::Local | RequiredAuth::Session => false,
        // what it answers is of the caller's reach
        RequiredAuth::Runner
            if matches!(
                path,
                "/api/v1/clusters" | "/api/v1/changes" | "/api/v1/job-tokens" | "/api/v1/rollouts"
            ) =>
        {
            matches!(who, "runner" | "foreign" | "elsewhere" | "admin")
        }
        // none of these was made for jobs
        RequiredAuth::Jobs => false,
        RequiredAuth::Runner | RequiredAuth::Project => matches!(who, "runner" | "admin"),
        RequiredAuth::Gateway => matches!(who, "runner" | "kubeconfig" | "admin"),
    };
    let mut checked = 0;
    for Route { method, path: template, required_auth } in pipeops::control_plane::routes::table() {
        // it takes its token in the body, or in the path
        if method == "POST" && matches!(template, "/session" | "/frp/handler/{secret}") {
            continue;
        }
        for (who, token) in tokens {
            // what would take the ground from under the rest is asked only by those who may not
            let may = allowed(required_auth, template, who);
            let destructive = method == "DELETE" || template.ends_with("/revoke");
            if may && destructive {
                continue;
            }
            let id = if required_auth == RequiredAuth::Agent {
                agent.id.clone()
            } else {
                cluster.clone()
            };
            let path = template
                .replace("{secret}", "guessed")
                .replace("{id}", &id)
                .replace("{op}", "o-1")
                .replace("{what}", "events")
                .replace('*', "version");
            let answer = control_plane
                .ask(if method == "*" { "GET" } else { method }, &path, token, json!({}))
                .await;
            let status = answer.status().as_u16();
            // after thirty wrong ones an address is not listened to for a while
            let slowed = status == 429 && matches!(who, "wrong" | "expired");
            let refused = slowed
                || matches!(status, 401 | 403)
                || (status == 404 && matches!(who, "foreign" | "elsewhere"));
            assert_eq!(
                !refused,
                may,
                "{method} {path} with {who}: {status} {}",
                answer.text().await.unwrap()
            );
            checked += 1;
        }
    }
    assert!(checked > 200, "{checked}");
    // another agent's path is not this agent's
    assert_eq!(
        control_plane.try_get("/api/v1/agents/a-0/config", &agent.credential).await.status(),
        403
    );
    // guessing is slowed; what was good before goes on
    let mut last = 0;
    for n in 0..60 {
        last = control_plane
            .ask("GET", "/api/v1/clusters", &format!("por_{n}"), json!({}))
            .await
            .status()
            .as_u16();
        if last == 429 {
            break;
        }
    }
    assert_eq!(last, 429);
    assert_eq!(control_plane.try_get("/api/v1/clusters", &runner).await.status(), 200);
    // the first administrator's token is no longer in a file
    assert!(!control_plane.sandbox.root().join(DATA).join("admin-token").exists());
}

/// An agent that only registers.
pub(crate) struct SimulatedAgent {
    pub(crate) id: String,
    pub(crate) credential: String,
}

impl SimulatedAgent {
    pub(crate) fn body(identity: &Identity, machine: &str) -> String {
        json!({"agent": {"id": identity.id, "public_key": identity.public_key, "name": "n",
            "machine": machine},
            "cluster": {"name": "n", "node_count": 1}, "capabilities": [], "max_role": "operator"})
        .to_string()
    }

    pub(crate) fn identity(dir: &std::path::Path) -> Box<Identity> {
        let state = Host::new(dir, None).state_dir("/s").unwrap();
        match Identity::load(&state, "m").unwrap() {
            LoadedIdentity::Own(found) => found,
            LoadedIdentity::Cloned => panic!("a clone"),
        }
    }

    pub(crate) async fn try_register(
        client: &Client,
        url: &str,
        identity: &Identity,
        token: &str,
        body: String,
    ) -> reqwest::Result<Response> {
        let signature = identity.sign(body.as_bytes()).unwrap();
        client
            .post(format!("{url}/api/v1/agents/register"))
            .bearer_auth(token)
            .header("pipeops-signature", signature)
            .body(body)
            .send()
            .await
    }

    pub(crate) async fn new(
        control_plane: &ControlPlane,
        dir: &std::path::Path,
        token: &str,
    ) -> SimulatedAgent {
        let identity = SimulatedAgent::identity(dir);
        let answer = SimulatedAgent::try_register(
            &control_plane.client,
            &control_plane.url,
            &identity,
            token,
            SimulatedAgent::body(&identity, "m"),
        )
        .await
        .unwrap();
        let status = answer.status();
        let text = answer.text().await.unwrap();
        assert_eq!(status, 200, "{text}");
        let value: Value = serde_json::from_str(&text).unwrap();
        SimulatedAgent {
            id: identity.id.clone(),
            credential: value["credential"].as_str().unwrap().to_owned(),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_identity_belongs_to_its_key_and_its_machine() {
    let control_plane = ControlPlane::start();
    let (token, _) = control_plane.enrol();
    let dir = tempfile::tempdir().unwrap();
    let identity = SimulatedAgent::identity(dir.path());
    let register = async |token: &str, body: String| {
        let answer = SimulatedAgent::try_register(
            &control_plane.client,
            &control_plane.url,
            &identity,
            token,
            body,
        )
        .await
        .unwrap();
        (answer.status().as_u16(), answer.json::<Value>().await.unwrap())
    };
    let agent = SimulatedAgent::new(&control_plane, dir.path(), &token).await;
    // again, with the token that is used up: the key is known, and no use is taken
    assert_eq!(register(&token, SimulatedAgent::body(&identity, "m")).await.0, 200);
    // somebody else's key under this id, a changed body, no signature: never
    let stranger_dir = tempfile::tempdir().unwrap();
    let stranger = SimulatedAgent::identity(stranger_dir.path());
    let (fresh, _) = control_plane.enrol();
    let stolen = SimulatedAgent::body(&stranger, "m").replace(&stranger.id, &identity.id);
    let answer = SimulatedAgent::try_register(
        &control_plane.client,
        &control_plane.url,
        &stranger,
        &fresh,
        stolen,
    )
    .await
    .unwrap();
    assert_eq!(answer.status(), 400);
    let signature = identity.sign(b"something else").unwrap();
    let changed = control_plane
        .client
        .post(format!("{}/api/v1/agents/register", control_plane.url))
        .bearer_auth(&fresh)
        .header("pipeops-signature", signature);
    assert_eq!(
        changed.body(SimulatedAgent::body(&identity, "m")).send().await.unwrap().status(),
        400
    );
    // a token for one server lets one in
    let answer = SimulatedAgent::try_register(
        &control_plane.client,
        &control_plane.url,
        &stranger,
        &token,
        SimulatedAgent::body(&stranger, "m"),
    )
    .await
    .unwrap();
    assert_eq!(answer.json::<Value>().await.unwrap()["code"], "token_used_up");
    // the same key on another machine: both are told, neither is believed
    let (status, problem) =
        register(&agent.credential, SimulatedAgent::body(&identity, "another")).await;
    assert_eq!((status, &problem["code"]), (409, &json!("duplicate_identity")));
    let beat = control_plane
        .ask(
            "POST",
            &format!("/api/v1/agents/{}/heartbeat", agent.id),
            &agent.credential,
            json!({"seq": 1}),
        )
        .await;
    assert_eq!(beat.status(), 409);
    let list = control_plane.sandbox.subcommand(&["control-plane", "cluster", "list"]).ended(0).out;
    assert!(list.contains("duplicate"), "{list}");
    // a removed one needs a token to come back
    let cluster = control_plane.clusters().await["items"][0]["id"].as_str().unwrap().to_owned();
    control_plane.sandbox.subcommand(&["control-plane", "cluster", "remove", &cluster]).ended(0);
    assert_eq!(register(&agent.credential, SimulatedAgent::body(&identity, "m")).await.0, 401);
    assert_eq!(register(&fresh, SimulatedAgent::body(&identity, "m")).await.0, 200);
}

/// Agents that register until they are answered, as agents do; each gives its id and credential.
pub(crate) fn register_many(
    control_plane: &ControlPlane,
    dir: &std::path::Path,
    token: &str,
    count: usize,
) -> tokio::task::JoinSet<(String, String)> {
    let mut tasks = tokio::task::JoinSet::new();
    for n in 0..count {
        let (path, url, client, token) = (
            dir.join(n.to_string()),
            control_plane.url.clone(),
            control_plane.client.clone(),
            token.to_owned(),
        );
        tasks.spawn(async move {
            let identity = SimulatedAgent::identity(&path);
            let begun = Instant::now();
            while begun.elapsed() < Duration::from_secs(60) {
                if let Ok(answer) = SimulatedAgent::try_register(
                    &client,
                    &url,
                    &identity,
                    &token,
                    SimulatedAgent::body(&identity, "m"),
                )
                .await
                    && answer.status() == 200
                    && let Ok(value) = answer.json::<Value>().await
                {
                    return (identity.id.clone(), value["credential"].as_str().unwrap().to_owned());
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            panic!("{} was never answered", identity.id);
        });
    }
    tasks
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_under_registrations_it_knows_whom_it_answered_and_nobody_half() {
    let mut control_plane = ControlPlane::start();
    let line = control_plane
        .sandbox
        .subcommand(&["control-plane", "token", "create", "--uses", "0"])
        .ended(0)
        .out;
    let token = line.split_whitespace().nth(1).unwrap().to_owned();
    let dir = tempfile::tempdir().unwrap();
    let mut tasks = register_many(&control_plane, dir.path(), &token, 200);
    let mut done = Vec::new();
    for round in 1..=3 {
        // killed when a part is through: at no particular line
        while done.len() < round * 40 {
            done.push(tasks.join_next().await.unwrap().unwrap());
        }
        control_plane.kill_and_restart();
    }
    while let Some(registered) = tasks.join_next().await {
        done.push(registered.unwrap());
    }
    let clusters = control_plane.clusters().await;
    assert_eq!(clusters["items"].as_array().unwrap().len(), 200);
    for (id, credential) in &done {
        let beat = control_plane
            .ask("POST", &format!("/api/v1/agents/{id}/heartbeat"), credential, json!({"seq": 1}))
            .await;
        assert_eq!(beat.status(), 200, "{id} holds a credential that is not known");
    }
}

#[test]
fn what_it_cannot_use_is_named() {
    let sandbox = Sandbox::new();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let serve = |more: &[&str]| {
        let mut args =
            vec!["control-plane", "--listen", "127.0.0.1:0", "--tunnel-listen", "127.0.0.1:0"];
        args.extend(more);
        sandbox.run(&args)
    };
    let port = serve(&["--listen", &address]);
    assert!(
        port.err.contains("the argument '--listen <ADDRESS>' cannot be used multiple times"),
        "{}",
        port.err
    );
    let port = sandbox
        .run(&["control-plane", "--listen", &address, "--tunnel-listen", "127.0.0.1:0"])
        .ended(3);
    assert!(port.err.contains("PORT_TAKEN") && port.err.contains("--listen"), "{}", port.err);
    let name = serve(&["--public-name", "no name"]).ended(2);
    assert!(name.err.contains("NAME_WRONG"), "{}", name.err);
    sandbox.put("/url", "mysql://x@y/z");
    let url = sandbox.path("root/url");
    let wrong = serve(&["--database-url-file", &url]);
    assert!(wrong.err.contains("DATABASE_URL_WRONG"), "{}", wrong.err);
    for (option, code, url, why) in [
        (
            "--database-url-file",
            "DATABASE_URL_WRONG",
            "postgres://u:planted-canary-4711-in-plain-text/x@db.test/cp",
            "%2F",
        ),
        (
            "--database-url-file",
            "DATABASE_URL_WRONG",
            "postgres://u:planted-canary-4711-in-plain-text@a.test,b.test/cp",
            "several hosts",
        ),
        (
            "--database-url-file",
            "DATABASE_URL_WRONG",
            "postgres://u@db.test/cp?passwort=planted-canary-4711-in-plain-text",
            "did you mean `password`?",
        ),
        (
            "--amqp-url-file",
            "AMQP_URL_WRONG",
            "amqp://u:planted-canary-4711-in-plain-text#x@mq.test/",
            "%23",
        ),
    ] {
        sandbox.put("/url", url);
        let wrong = serve(&[option, &sandbox.path("root/url")]).ended(2);
        assert!(
            wrong.err.contains(code)
                && wrong.err.contains(why)
                && !wrong.err.contains("canary-4711-in-plain-text"),
            "{}",
            wrong.err
        );
    }
    sandbox.put(&format!("/{DATA}/keys.json"), "{\"half\":");
    let keys = serve(&[]).ended(2);
    assert!(keys.err.contains("KEYS_DAMAGED"), "{}", keys.err);
    // what the parser did not expect may be a key
    for text in [
        r#""planted-key-canary-4711-in-plain-text""#,
        r#"{"planted-key-canary-4711-in-plain-text": 1}"#,
    ] {
        sandbox.put(&format!("/{DATA}/keys.json"), text);
        let keys = serve(&[]).ended(2);
        assert!(
            keys.err.contains("KEYS_DAMAGED") && !keys.err.contains("canary-4711-in-plain-text"),
            "{}",
            keys.err
        );
    }
    let away = sandbox.subcommand(&["control-plane", "cluster", "list"]).ended(5);
    assert!(away.err.contains("CONTROL_PLANE_AWAY"), "{}", away.err);
}

/// Asks its auth plugin as frps does (`pkg/plugin/server/http.go`): on Login the metas stand in the
/// content, later in its user.
struct FrpsPlugin {
    url: String,
    pub(crate) client: Client,
    /// Who logged in, by run: later calls carry its metas.
    metas: Mutex<std::collections::BTreeMap<String, String>>,
}

impl FrpsPlugin {
    fn ask(&self, op: &str, content: Value) -> Result<(), String> {
        let call = self
            .client
            .post(format!("{}?op={op}&version=0.1.0", self.url))
            .json(&json!({"version": "0.1.0", "op": op, "content": content}));
        let answer = tokio::task::block_in_place(|| {
            tokio::runtime::Handle::current().block_on(async {
                call.send()
                    .await
                    .unwrap()
                    .error_for_status()
                    .map_err(|e| e.to_string())?
                    .json::<Value>()
                    .await
                    .map_err(|e| e.to_string())
            })
        })?;
        // without it frps takes an empty content for the client's
        assert_eq!(answer["unchange"], true, "{answer}");
        if answer["reject"] == true {
            Err(answer["reject_reason"].as_str().unwrap().to_owned())
        } else {
            Ok(())
        }
    }
}

impl pipeops::frp::server::TunnelAuthorizer for FrpsPlugin {
    fn login(
        &self,
        login: &pipeops::frp::wire::Login,
    ) -> Result<(String, tokio_util::sync::CancellationToken), String> {
        self.ask(
            "Login",
            json!({"version": "0.58.1", "user": "", "metas": login.metas,
                "client_address": "127.0.0.1:1"}),
        )?;
        *self.metas.lock().unwrap() = login.metas.clone();
        Ok((login.metas["agent"].clone(), tokio_util::sync::CancellationToken::new()))
    }

    fn proxy(&self, _: &str, asked: &pipeops::frp::wire::NewProxy) -> Result<(), String> {
        let user = json!({"user": "", "metas": *self.metas.lock().unwrap(), "run_id": "r"});
        for wrong in [
            json!({"proxy_name": "agent-a-0", "proxy_type": "stcp"}),
            json!({"proxy_name": asked.proxy_name, "proxy_type": "tcp"}),
        ] {
            let mut content = wrong.clone();
            content["user"] = user.clone();
            assert!(self.ask("NewProxy", content).is_err(), "{wrong}");
        }
        self.ask(
            "NewProxy",
            json!({"user": user, "proxy_name": asked.proxy_name, "proxy_type": asked.proxy_type}),
        )
    }

    fn visitor(&self, _: &str, _: &str, _: i64) -> Option<pipeops::frp::server::Visitor> {
        None
    }
}

/// `kubectl logs | less`: nothing on the way from the API server to the pager gives up on it.
#[tokio::test(flavor = "multi_thread")]
async fn a_reader_at_the_gateway_who_pauses_is_waited_for() {
    let control_plane = ControlPlane::start();
    let (_kube, kube) = serve_kube().await;
    let (_agent, cluster) = control_plane.agent(kube).await;
    let path = format!("/clusters/{cluster}/k8s/api/v1/namespaces/beta/pods/bulk/log?n=67108864");
    let log = control_plane.try_get(&path, &control_plane.admin).await;
    tokio::time::sleep(Duration::from_secs(20)).await;
    assert_eq!(log.bytes().await.unwrap().len(), 67_108_864);
}

#[tokio::test(flavor = "multi_thread")]
async fn with_somebody_elses_frps_it_is_the_plugin_and_a_visitor() {
    use pipeops::frp::server::{Server, ServerConfig};
    let _ = rustls::crypto::ring::default_provider().install_default();
    let (tls, pin) = crate::fake_control_plane::identity();
    let listener = tokio::net::TcpListener::bind(("127.0.0.1", free_port())).await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let token = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(token.path(), "frps-planted-canary-4711-in-plain-text").unwrap();
    let control_plane = ControlPlane::with(&[
        "--frps",
        &address,
        "--frps-token-file",
        token.path().to_str().unwrap(),
        "--frps-pin",
        &pin,
    ]);
    let config = control_plane.sandbox.subcommand(&["control-plane", "frps-config"]).ended(0).out;
    let path = config
        .lines()
        .find_map(|l| l.strip_prefix("path = \""))
        .unwrap()
        .trim_end_matches('"')
        .to_owned();
    assert!(
        config.contains(&format!("addr = \"{}\"", control_plane.url))
            && !config.contains("canary-4711-in-plain-text"),
        "{config}"
    );
    let plugin = Arc::new(FrpsPlugin {
        url: format!("{}{path}", control_plane.url),
        client: control_plane.client.clone(),
        metas: Mutex::default(),
    });
    let serve = |listener: tokio::net::TcpListener| {
        let frps = Server::new(ServerConfig {
            token: pipeops::base::secret::Secret::new("frps-planted-canary-4711-in-plain-text"),
            tls: Some(tls.clone()),
            tcp_mux: true,
            tcp_bind: None,
            heartbeat: Duration::from_secs(30),
            authorizer: Some(plugin.clone()),
        });
        let halt = tokio_util::sync::CancellationToken::new();
        let task = tokio::spawn({
            let (frps, halt) = (frps.clone(), halt.clone());
            async move { frps.serve(listener, halt).await }
        });
        (frps, halt, task)
    };
    let (frps, halt, task) = serve(listener);
    // strangers, and whoever guesses the path, get nothing
    assert!(
        plugin
            .ask("Login", json!({"metas": {"agent": "a-0", "token": "guessed"}}))
            .unwrap_err()
            .contains("may not")
    );
    assert!(
        plugin.ask("Ping", json!({"user": {"user": "", "metas": null, "run_id": "r"}})).is_err()
    );
    assert!(
        plugin
            .ask("Login", json!({"version": "0.58.1", "user": "", "metas": null}))
            .unwrap_err()
            .contains("may not")
    );
    assert_eq!(
        control_plane
            .ask("POST", "/frp/handler/guessed?op=Login", "", json!({"content": {}}))
            .await
            .status(),
        404
    );
    // the agent holds its tunnel there, and the gateway goes through it
    let (_kube, kube) = serve_kube().await;
    let (_agent, cluster) = control_plane.agent(kube).await;
    let bulk = control_plane
        .ask(
            "GET",
            &format!("/clusters/{cluster}/k8s/api/v1/namespaces/beta/pods/bulk/log?n=1048576"),
            &control_plane.admin,
            json!({}),
        )
        .await;
    assert_eq!(bulk.bytes().await.unwrap().len(), 1_048_576);
    assert!(frps.has_proxy(&format!(
        "agent-{}",
        control_plane.clusters().await["items"][0]["agent_id"].as_str().unwrap()
    )));
    // it dies and comes back: so do the agent's tunnel and the gateway's session
    halt.cancel();
    drop(frps);
    let _ = task.await;
    let listener = loop {
        match tokio::net::TcpListener::bind(&address).await {
            Ok(listener) => break listener,
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    };
    let (_frps, halt, _) = serve(listener);
    let begun = Instant::now();
    while control_plane.version(&cluster).await != 200 {
        assert!(begun.elapsed() < Duration::from_secs(20), "{}", control_plane.log.lock().unwrap());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    // revoked: no login and no sign of life any more
    let metas = plugin.metas.lock().unwrap().clone();
    let user = json!({"user": {"user": "", "metas": metas, "run_id": "r"}});
    assert!(plugin.ask("Ping", user.clone()).is_ok());
    control_plane.sandbox.subcommand(&["control-plane", "cluster", "revoke", &cluster]).ended(0);
    assert!(plugin.ask("Ping", user.clone()).is_err());
    assert!(plugin.ask("CloseProxy", user).is_ok());
    assert_eq!(control_plane.version(&cluster).await, 404);
    halt.cancel();
}

/// A certificate for 127.0.0.1 and its key, PEM, valid until `days` from now.
pub(crate) fn certificate(days: i64) -> (String, String) {
    let mut params = rcgen::CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
    params.subject_alt_names.push(rcgen::SanType::IpAddress("127.0.0.1".parse().unwrap()));
    let now =
        time::OffsetDateTime::from_unix_timestamp(jiff::Timestamp::now().as_second()).unwrap();
    (params.not_before, params.not_after) =
        (now - time::Duration::days(30), now + time::Duration::days(days));
    let key = rcgen::KeyPair::generate().unwrap();
    (params.self_signed(&key).unwrap().pem(), key.serialize_pem())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_of_ones_own_is_checked_shown_and_read_anew() {
    let sandbox = Sandbox::new();
    let (good, key) = certificate(10);
    let (expired, old_key) = certificate(-1);
    for (name, text) in [
        ("good", &good),
        ("key", &key),
        ("expired", &expired),
        ("old-key", &old_key),
        ("none", &"nothing".to_owned()),
    ] {
        sandbox.put(&format!("/{name}"), text);
    }
    let path = |name: &str| sandbox.path(&format!("root/{name}"));
    for (chain, key, code, said) in [
        ("expired", "old-key", "CERTIFICATE_EXPIRED", "renew it"),
        ("good", "old-key", "CERTIFICATE_WRONG", "is not the key of"),
        ("none", "key", "CERTIFICATE_WRONG", "holds no certificate"),
        ("good", "none", "CERTIFICATE_WRONG", "holds no key"),
        ("absent", "key", "CERTIFICATE_UNREADABLE", "who may read it"),
    ] {
        let refused = sandbox.run(&[
            "control-plane",
            "--listen",
            "127.0.0.1:0",
            "--tunnel-listen",
            "127.0.0.1:0",
            "--tls-cert",
            &path(chain),
            "--tls-key",
            &path(key),
        ]);
        let refused = refused.ended(3);
        assert!(
            refused.err.contains(code) && refused.err.contains(said),
            "{chain} {key}: {}",
            refused.err
        );
    }
    let control_plane = ControlPlane::with(&[
        "--tls-cert",
        &path("good"),
        "--tls-key",
        &path("key"),
        "--tls-ca",
        &path("good"),
    ]);
    let trusting = |pem: &str| {
        let ca = reqwest::Certificate::from_pem(pem.as_bytes()).unwrap();
        Client::builder().tls_certs_only([ca]).no_proxy().pool_max_idle_per_host(0).build().unwrap()
    };
    let health = async |client: &Client| {
        client
            .get(format!("{}/api/v1/health", control_plane.url))
            .send()
            .await
            .map(|a| a.status().as_u16())
            .ok()
    };
    assert_eq!(health(&trusting(&good)).await, Some(200));
    // its own CA is the tunnel's; the line pins the one that was given
    assert!(health(&control_plane.client).await.is_none());
    let (token, pin) = control_plane.enrol();
    assert!(token.starts_with("poe_") && pin.starts_with("sha256:"));
    // an agent comes by that line, over the one certificate and the other
    let (_kube, address) = serve_kube().await;
    let renewed = certificate(20);
    sandbox.put("/good", &renewed.0);
    sandbox.put("/key", &renewed.1);
    let client = trusting(&renewed.0);
    let begun = Instant::now();
    while health(&client).await != Some(200) {
        assert!(begun.elapsed() < Duration::from_secs(20), "{}", control_plane.log.lock().unwrap());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let mut control_plane = control_plane;
    control_plane.client = client;
    control_plane.agent(address).await;
}

#[tokio::test]
async fn a_database_that_is_none_or_of_another_time_is_left_alone() {
    let sandbox = Sandbox::new();
    let serve = || {
        sandbox
            .run(&["control-plane", "--listen", "127.0.0.1:0", "--tunnel-listen", "127.0.0.1:0"])
            .ended(3)
    };
    let file = sandbox.root().join(DATA).join("pipeops.db");
    std::fs::create_dir_all(file.parent().unwrap()).unwrap();
    std::fs::write(&file, "something that somebody needs\n".repeat(100)).unwrap();
    let refused = serve();
    assert!(
        refused.err.contains("DATABASE_UNUSABLE") && refused.err.contains("not a database"),
        "{}",
        refused.err
    );
    assert!(std::fs::read_to_string(&file).unwrap().starts_with("something that"));
    std::fs::remove_file(&file).unwrap();
    sqlx::any::install_default_drivers();
    let pool =
        sqlx::AnyPool::connect(&format!("sqlite:{}?mode=rwc", file.display())).await.unwrap();
    sqlx::query("CREATE TABLE pipeops_meta (id TEXT PRIMARY KEY, body TEXT NOT NULL)")
        .execute(&pool)
        .await
        .unwrap();
    sqlx::query("INSERT INTO pipeops_meta VALUES ('schema', '99')").execute(&pool).await.unwrap();
    pool.close().await;
    let refused = serve();
    assert!(
        refused.err.contains("DATABASE_VERSION") && refused.err.contains("99"),
        "{}",
        refused.err
    );
    // one whose first page is overwritten behind its header: said once, with the next step
    for beside in ["-wal", "-shm"] {
        let _ = std::fs::remove_file(format!("{}{beside}", file.display()));
    }
    let damaged = std::fs::OpenOptions::new().write(true).open(&file).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&damaged, &[0xab; 3900], 100).unwrap();
    let refused = serve();
    assert!(
        refused.err.contains("DATABASE_UNUSABLE")
            && refused.err.contains("restore FILE")
            && !refused.err.contains("pool timed out")
            && !refused.err.contains("ERROR"),
        "{}",
        refused.err
    );
    // and a PostgreSQL that is not there
    let url = sandbox.path("url");
    std::fs::write(&url, format!("postgres://u:pw@127.0.0.1:{}/d\n", free_port())).unwrap();
    let away = sandbox.run(&[
        "control-plane",
        "--listen",
        "127.0.0.1:0",
        "--tunnel-listen",
        "127.0.0.1:0",
        "--database-url-file",
        &url,
    ]);
    let away = away.ended(3).err;
    assert!(away.contains("DATABASE_UNUSABLE") && away.contains("refused"), "{away}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_without_its_keys_is_left_alone() {
    let mut control_plane = ControlPlane::start();
    let data = control_plane.sandbox.root().join(DATA);
    let (keys, aside) = (data.join("keys.json"), data.join("aside.json"));
    control_plane.child.kill().unwrap();
    control_plane.child.wait().unwrap();
    std::fs::rename(&keys, &aside).unwrap();
    let serve = || {
        control_plane
            .sandbox
            .run(&["control-plane", "--listen", "127.0.0.1:0", "--tunnel-listen", "127.0.0.1:0"])
            .ended(3)
    };
    let refused = serve();
    assert!(
        refused.err.contains("KEYS_FOREIGN") && refused.err.contains("backup"),
        "{}",
        refused.err
    );
    // nothing was made in their place
    assert!(!keys.exists());
    std::fs::write(
        &keys,
        std::fs::read(ControlPlane::start().sandbox.root().join(DATA).join("keys.json")).unwrap(),
    )
    .unwrap();
    assert!(serve().err.contains("KEYS_FOREIGN"));
    std::fs::rename(&aside, &keys).unwrap();
    control_plane.kill_and_restart();
    assert_eq!(control_plane.try_get("/api/v1/clusters", &control_plane.admin).await.status(), 200);
}

#[test]
fn a_config_file_lies_under_the_flags_and_its_mistakes_are_named() {
    let sandbox = Sandbox::new();
    let serve = || sandbox.run(&["control-plane", "--tunnel-listen", "127.0.0.1:0"]);
    sandbox.put("/etc/pipeops/control-plane.toml", "lisen = \"127.0.0.1:0\"\n");
    let typo = serve().ended(2);
    assert!(
        typo.err.contains("lisen") && typo.err.contains("did you mean `listen`"),
        "{}",
        typo.err
    );
    sandbox.put("/etc/pipeops/control-plane.toml", "listen = \"240.0.0.1:1\"\n");
    let elsewhere = serve().ended(3);
    assert!(
        elsewhere.err.contains("ADDRESS_WRONG") && elsewhere.err.contains("240.0.0.1:1"),
        "{}",
        elsewhere.err
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_uninstalled_is_listed_no_more() {
    let control_plane = ControlPlane::start();
    let install = |sandbox: &Sandbox| {
        let (token, pin) = control_plane.enrol();
        sandbox
            .install(&["--control-plane-url", &control_plane.url, "--control-plane-pin", &pin])
            .ended(0);
        token
    };
    let clusters = async || control_plane.clusters().await["items"].as_array().unwrap().len();
    for away in [false, true] {
        let sandbox = Sandbox::new();
        let token = install(&sandbox);
        let mut agent = Agent::start(sandbox, &[("AGENT_TOKEN", &token)]);
        tokio::task::block_in_place(|| agent.until("STATUS=online"));
        assert_eq!(clusters().await, 1);
        agent.child.kill().unwrap();
        agent.child.wait().unwrap();
        if away {
            nix::sys::signal::kill(
                nix::unistd::Pid::from_raw(control_plane.child.id().try_into().unwrap()),
                nix::sys::signal::Signal::SIGKILL,
            )
            .unwrap();
        }
        let answer = agent.sandbox.run(&["uninstall", "--yes"]).ended(0);
        if away {
            assert!(answer.out.contains("still lists cluster c-"), "{}", answer.out);
        } else {
            assert!(answer.err.contains("taken off https://127.0.0.1"), "{}", answer.err);
            assert_eq!(clusters().await, 0);
        }
    }
}
