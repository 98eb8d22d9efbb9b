//! The command line of people and CI, against a control plane with a real agent behind it.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::process::{Command, Stdio};
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use base64::Engine as _;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use crate::control_plane::{ControlPlane, SimulatedAgent};
use crate::fake_control_plane::free_port;
use crate::operations::{apply, deployment, submit, wait_for_state};
use crate::support::{RunOutput, program, run_output};
use crate::tenant_tokens::RecordingAgent;
use crate::world::serve_kube;

/// Somebody with a home of their own.
pub(crate) struct Person {
    pub(crate) home: tempfile::TempDir,
}

impl Person {
    fn new() -> Person {
        Person { home: tempfile::tempdir().unwrap() }
    }

    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(program());
        command.args(args).env_clear().env("HOME", self.home.path());
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    pub(crate) fn run(&self, args: &[&str]) -> RunOutput {
        tokio::task::block_in_place(|| run_output(self.command(args).output().unwrap()))
    }

    pub(crate) fn types(&self, args: &[&str], text: &str) -> RunOutput {
        typed(self.command(args), text)
    }

    /// Logs in as a new user of the control plane.
    pub(crate) fn logged_in(control_plane: &ControlPlane, name: &str, more: &[&str]) -> Person {
        let person = Person::new();
        let (line, token) = user(control_plane, name, more);
        person.types(&words(&line), &token).ended(0);
        person
    }

    fn contexts_file(&self) -> std::path::PathBuf {
        self.home.path().join(".config/pipeops/contexts.toml")
    }
}

/// What becomes of a command that gets this on standard input.
fn typed(mut command: Command, text: &str) -> RunOutput {
    tokio::task::block_in_place(|| {
        let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
        // one that is refused before it reads has gone
        let _ = child.stdin.take().unwrap().write_all(text.as_bytes());
        run_output(child.wait_with_output().unwrap())
    })
}

/// Makes a user; gives the line that logs in, and the token.
fn user(control_plane: &ControlPlane, name: &str, more: &[&str]) -> (String, String) {
    let args = [&["control-plane", "user", "create", name][..], more].concat();
    let made = control_plane.sandbox.subcommand(&args).ended(0).out;
    let mut lines = made.lines().map(str::to_owned);
    let both = (lines.next().unwrap(), lines.next().unwrap());
    assert_eq!(lines.next(), None, "{made}");
    both
}

/// The arguments of a line that somebody was sent.
fn words(line: &str) -> Vec<&str> {
    line.strip_prefix("pipeops ").unwrap().split(' ').collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_logs_in_with_the_line_that_was_sent_and_is_out_once_revoked() {
    let control_plane = ControlPlane::with(&[]);
    let (line, token) = user(&control_plane, "eve", &["--role", "viewer"]);
    let start = format!("pipeops login {} --pin sha256:", control_plane.url);
    assert!(line.starts_with(&start) && token.starts_with("pou_"), "{line}");
    let person = Person::new();
    let words = words(&line);
    // what is refused is not stored
    let closed = format!("https://127.0.0.1:{}", free_port());
    let other = "sha256:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=";
    let url = control_plane.url.as_str();
    for (args, typed, code, said) in [
        (&["clusters"][..], "", 2, "NOT_LOGGED_IN"),
        (&words[..], "", 2, "TOKEN_EMPTY"),
        (&words[..], &format!("{line}\n{token}\n"), 2, "TOKEN_MALFORMED"),
        (&words[..], "pou_planted-canary-4711-in-plain-text", 7, "TOKEN_UNKNOWN"),
        (&["login", url, "--pin", other][..], token.as_str(), 7, "CONTROL_PLANE_FOREIGN"),
        (&["login", url, "--pin", "sha256:x"][..], &token, 2, "is no pin"),
        (&["login", &closed, "--pin", other][..], &token, 5, "CONTROL_PLANE_SILENT"),
        (&["login", "http://example.com"][..], &token, 2, "URL_WRONG"),
    ] {
        let refused = person.types(args, typed).ended(code);
        assert!(refused.err.contains(said), "{args:?}: {}", refused.err);
        assert!(!refused.err.contains(&token[4..]), "{args:?}: {}", refused.err);
        assert!(!person.contexts_file().exists(), "{args:?}");
    }
    // a control plane on this machine is called without a proxy
    let proxy = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    proxy.set_nonblocking(true).unwrap();
    let way = format!("http://{}", proxy.local_addr().unwrap());
    let here = closed.replace("https:", "http:");
    let mut local = person.command(&["login", &here, "--pin", other]);
    for name in ["http_proxy", "https_proxy", "all_proxy"] {
        local.env(name, &way);
    }
    let direct = typed(local, &token).ended(5);
    assert!(direct.err.contains("CONTROL_PLANE_SILENT"), "{}", direct.err);
    assert_eq!(proxy.accept().unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
    let done = person.types(&words, &format!("{token}\n")).ended(0);
    assert!(done.err.contains("as context 127.0.0.1; it reaches no cluster yet"), "{}", done.err);
    let mode = |path: &std::path::Path| std::fs::metadata(path).unwrap().permissions().mode();
    let file = person.contexts_file();
    assert_eq!((mode(&file) & 0o777, mode(file.parent().unwrap()) & 0o777), (0o600, 0o700));
    assert!(std::fs::read_to_string(&file).unwrap().contains(&token));
    for args in [&["contexts"][..], &["contexts", "-o", "json"]] {
        let shown = person.run(args).ended(0).out;
        assert!(shown.contains(url) && !shown.contains(&token[4..]), "{shown}");
    }
    assert_eq!(person.run(&["clusters"]).ended(0).out.trim(), "none");
    let unknown = person.run(&["clusters", "--context", "127.0.0.2"]).ended(2);
    assert!(unknown.err.contains("did you mean `127.0.0.1`?"), "{}", unknown.err);
    // a user is told apart from Runners, and there is one of a name
    let admin =
        |args: &[&str]| control_plane.sandbox.subcommand(&[&["control-plane"][..], args].concat());
    admin(&["runner", "create", "eve"]).ended(0);
    let taken = admin(&["user", "create", "eve"]).ended(7);
    assert!(taken.err.contains("NAME_TAKEN"), "{}", taken.err);
    let pathlike = admin(&["user", "create", "team/eve"]);
    assert!(pathlike.err.contains("a user's name has no /"), "{}", pathlike.err);
    let users = admin(&["user", "list", "-o", "json"]).ended(0).json();
    let users = users["items"].as_array().unwrap();
    assert_eq!((users.len(), &users[0]["role"]), (1, &json!("viewer")), "{users:?}");
    let all = admin(&["runner", "list"]).ended(0).out;
    assert!(all.contains(" user ") && all.contains(" runner "), "{all}");
    admin(&["user", "revoke", "eve"]).ended(0);
    let out = person.run(&["clusters"]).ended(7);
    assert!(out.err.contains("TOKEN_UNKNOWN") && out.err.contains("pipeops login"), "{}", out.err);
    admin(&["user", "revoke", "eve"]).ended(7);
    person.run(&["logout"]).ended(0);
    assert!(!std::fs::read_to_string(&file).unwrap().contains(&token));
    person.run(&["clusters"]).ended(2);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_application_is_changed_and_looked_at_from_afar() {
    let control_plane = ControlPlane::with(&[]);
    let (kube, address) = serve_kube().await;
    let (mut agent, cluster) = control_plane.agent(address).await;
    kube.ready.store(true, Relaxed);
    let admin = control_plane.admin.clone();
    let body = apply(&[deployment("web")]);
    let (_, applied) = submit(&control_plane, &cluster, &admin, "k-1", &body).await;
    let id = applied["id"].as_str().unwrap();
    wait_for_state(&control_plane, &cluster, &admin, id, "succeeded").await;
    let eve = Person::logged_in(&control_plane, "eve", &[]);
    let web = |args: &[&str]| eve.run(&[args, &["-n", "beta"]].concat());

    let scaled = web(&["scale", "web", "3"]).ended(0);
    assert_eq!(scaled.out, "beta/web: 3 pods\n");
    assert!(scaled.err.contains("  Deployment beta/web ready"), "{}", scaled.err);
    let scaled = web(&["scale", "web", "2", "-o", "json"]).ended(0).json();
    assert_eq!((&scaled["state"], &scaled["subject"]), (&json!("succeeded"), &json!("user:eve")));
    // the same key is the same operation
    let once = |pods: &str| web(&["scale", "web", pods, "--idempotency-key", "job-1", "--detach"]);
    let first = once("4").ended(0).out;
    assert!(first.starts_with("o-"), "{first}");
    assert_eq!(once("4").ended(0).out, first);
    assert!(once("5").ended(7).err.contains("IDEMPOTENCY_MISMATCH"));
    wait_for_state(&control_plane, &cluster, &admin, first.trim(), "succeeded").await;

    // what does not get ready in its time, and what somebody no longer waits for
    kube.ready.store(false, Relaxed);
    let late = web(&["scale", "web", "3", "--timeout", "1"]).ended(8);
    assert!(late.err.contains("[timed_out]"), "{}", late.err);
    assert!(late.err.contains("to look: pipeops status web -n beta"), "{}", late.err);
    let args = ["scale", "web", "4", "-n", "beta", "--timeout", "120"];
    let mut watching = eve.command(&args).spawn().unwrap();
    let mut said = BufReader::new(watching.stderr.take().unwrap());
    let (code, err) = tokio::task::block_in_place(|| {
        let mut line = String::new();
        while !line.contains("pods available") {
            line.clear();
            assert!(said.read_line(&mut line).unwrap() > 0, "it has ended");
        }
        kill(Pid::from_raw(watching.id().try_into().unwrap()), Signal::SIGINT).unwrap();
        let mut rest = String::new();
        said.read_to_string(&mut rest).unwrap();
        (watching.wait().unwrap().code(), rest)
    });
    assert_eq!(code, Some(130), "{err}");
    assert!(err.contains("DETACHED") && err.contains("pipeops status web -n beta"), "{err}");
    let status = web(&["status", "web", "-o", "json"]).json();
    assert_eq!((&status["state"], &status["wanted"]), (&json!("rolling out"), &json!(4)));
    assert_eq!(
        (&status["operation"]["kind"], &status["operation"]["state"]),
        (&json!("scale"), &json!("running")),
        "{status}"
    );
    kube.ready.store(true, Relaxed);

    // what is there
    let pod = json!({"metadata": {"name": "web-1", "namespace": "beta", "labels": {"app": "web"}},
        "spec": {"nodeName": "vm1", "containers": [{"name": "web"}]},
        "status": {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}});
    let mut listed = deployment("web");
    listed["spec"]["template"] = json!({"spec": {"containers": [{"image": "web:1"}]}});
    listed["status"] = json!({"replicas": 2, "updatedReplicas": 2, "readyReplicas": 2,
        "availableReplicas": 2});
    // the last line has no end yet
    let log = "2026-11-27T10:00:00.000000001Z one\n2026-11-27T10:00:01Z \u{1b}[31mtwo";
    let mut hidden = pod.clone();
    hidden["metadata"]["name"] = "hidden".into();
    let mut api = listed.clone();
    api["metadata"]["name"] = "api".into();
    kube.planted.lock().unwrap().extend([
        // a list comes in parts
        ("/apis/apps/v1/deployments", "continue=more", json!({"items": [api]})),
        (
            "/apis/apps/v1/deployments",
            "managed-by=pipeops",
            json!({"metadata": {"continue": "more"}, "items": [listed]}),
        ),
        ("/api/v1/namespaces/beta/pods", "labelSelector=app=web", json!({"items": [pod]})),
        ("/api/v1/namespaces/beta/pods", "labelSelector=app=both", json!({"items": [pod, hidden]})),
        ("/api/v1/namespaces/beta/pods/web-1/log", "tailLines=2", json!(log)),
    ]);
    let apps = eve.run(&["apps", "-o", "json"]).ended(0).json();
    let row = |name: &str| {
        json!({"namespace": "beta", "name": name, "revision": null, "image": "web:1", "ready": 2,
            "wanted": 2, "host": "", "state": "ready", "note": ""})
    };
    assert_eq!(apps["items"], json!([row("api"), row("web")]));
    // the namespace is that of the only application of this name
    let status = eve.run(&["status", "web"]).ended(0).out;
    assert!(status.contains("\nweb-1   true "), "{status}");
    let none = eve.run(&["status", "wbe"]).ended(7);
    assert!(none.err.contains("APPLICATION_UNKNOWN"), "{}", none.err);
    let lines = web(&["logs", "web", "--tail", "2"]).ended(0).out;
    assert_eq!(lines, "one\n\\u{1b}[31mtwo\n");
    // one that is not read is no success, and the other is printed all the same
    let half = web(&["logs", "both", "--tail", "2"]).ended(7);
    assert!(half.out.contains("web-1 one\n"), "{}", half.out);
    assert!(half.err.contains("hidden: not for you"), "{}", half.err);
    let now = web(&["logs", "web", "--since", "0s"]).ended(2);
    assert!(now.err.contains("a second to a day"), "{}", now.err);
    // whoever reads has enough
    let args = ["logs", "web", "-n", "beta", "--tail", "2", "-f"];
    let mut unread = eve.command(&args).spawn().unwrap();
    drop(unread.stdout.take());
    let unread = tokio::task::block_in_place(|| unread.wait_with_output().unwrap());
    run_output(unread).ended(0);
    // and whoever may no longer does not wait for ever
    let ann = Person::logged_in(&control_plane, "ann", &[]);
    let mut cut_off = ann.command(&args).spawn().unwrap();
    let cut_off = tokio::task::block_in_place(|| {
        let mut said = BufReader::new(cut_off.stdout.take().unwrap());
        let mut line = String::new();
        said.read_line(&mut line).unwrap();
        assert_eq!(line, "one\n");
        let revoke = ["control-plane", "user", "revoke", "ann"];
        control_plane.sandbox.subcommand(&revoke).ended(0);
        std::io::copy(&mut said, &mut std::io::sink()).unwrap();
        run_output(cut_off.wait_with_output().unwrap())
    });
    let cut_off = cut_off.ended(7);
    assert!(cut_off.err.contains("TOKEN_UNKNOWN"), "{}", cut_off.err);
    assert_eq!(web(&["history", "web"]).ended(0).out.trim(), "none");
    let nodes = eve.run(&["nodes", "list"]).ended(0).out;
    assert!(nodes.contains("vm1 ") && nodes.contains("Ready"), "{nodes}");
    // a machine is for operators
    let refused = eve.run(&["nodes", "drain", "vm1"]).ended(7);
    assert!(refused.err.contains("ROLE_EXCEEDED"), "{}", refused.err);
    let ola = Person::logged_in(&control_plane, "ola", &["--role", "operator"]);
    assert_eq!(ola.run(&["nodes", "drain", "vm1"]).ended(0).out, "vm1: drained\n");
    assert_eq!(ola.run(&["nodes", "uncordon", "vm1"]).ended(0).out, "vm1: takes pods again\n");
    let file = eve.home.path().join("kubeconfig");
    eve.run(&["kubeconfig", "--write", file.to_str().unwrap()]).ended(0);
    assert!(std::fs::read_to_string(&file).unwrap().contains("\"token\": \"pok_"));
    assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);

    assert_eq!(web(&["restart", "web"]).ended(0).out, "beta/web: restarted\n");

    // values by standard input or file, which nobody sees again
    let canary = "planted-canary-7731-in-plain-text";
    let place = ["-n", "beta"];
    let set = |args: &[&str], text: &str| {
        typed(eve.command(&[&["secret", "set", "db"][..], args, &place].concat()), text)
    };
    let done = set(&["--key", "url"], &format!("{canary}\n")).ended(0);
    assert_eq!(done.out, "beta/db: url set\n");
    assert!(!done.err.contains("7731-in-plain-text"), "{}", done.err);
    let stored = {
        let objects = kube.objects.lock().unwrap();
        let inventory = objects["/api/v1/namespaces/beta/configmaps/db.secrets.pipeops.io"].clone();
        let encoded = base64::engine::general_purpose::STANDARD.encode(canary);
        assert!(objects.values().any(|o| o["kind"] == "Secret" && o["data"]["url"] == encoded));
        inventory
    };
    for (args, text, said) in [
        (&["--key", "a=/planted-canary-7731-in-plain-text"][..], "", "FILE_UNREADABLE"),
        (&["--key", "a b"], canary, "is no key"),
        (&["--env-file", "-"], canary, "line 1 is not KEY=VALUE"),
        (&["--key", "a", "--env-file", "-"], canary, "standard input has one value"),
        (&[], "", "name 1 to"),
    ] {
        let refused = set(args, text).ended(2);
        assert!(refused.err.contains(said), "{args:?}: {}", refused.err);
        assert!(!refused.err.contains("7731-in-plain-text"), "{args:?}: {}", refused.err);
    }
    let inventories = ("/api/v1/namespaces/beta/configmaps", "inventory=secrets");
    let sets = json!({"items": [stored]});
    kube.planted.lock().unwrap().push((inventories.0, inventories.1, sets));
    let sets = web(&["secret", "list"]).ended(0).out;
    assert!(sets.contains("beta        db     url    1 ") && sets.contains("user:eve"), "{sets}");
    assert_eq!(web(&["secret", "list", "--config"]).ended(0).out.trim(), "none");

    // a job is one of an application that was deployed
    let job = web(&["job", "run", "web"]).ended(2);
    assert!(job.err.contains("COMMAND"), "{}", job.err);
    let job = eve.run(&["job", "run", "web", "-n", "beta", "--", "true"]).ended(13);
    assert!(job.err.contains("[no_revision]"), "{}", job.err);
    let job = eve.run(&["run", "web"]).ended(2);
    assert!(job.err.contains("did you mean `job run`?"), "{}", job.err);

    // who may not, and where the agent is away
    let viewer = Person::logged_in(&control_plane, "bob", &["--role", "viewer"]);
    let refused = viewer.run(&["scale", "web", "1", "-n", "beta"]).ended(7);
    assert!(refused.err.contains("ROLE_EXCEEDED"), "{}", refused.err);
    let elsewhere = Person::logged_in(&control_plane, "joe", &["--namespaces", "production"]);
    let refused = elsewhere.run(&["apps", "-n", "beta"]).ended(7);
    assert!(refused.err.contains("NAMESPACE_SCOPE"), "{}", refused.err);
    let unclear = elsewhere.run(&["apps"]).ended(2);
    assert!(unclear.err.contains("NAMESPACE_NEEDED"), "{}", unclear.err);
    agent.child.kill().unwrap();
    agent.child.wait().unwrap();
    let begun = Instant::now();
    while control_plane.version(&cluster).await == 200 {
        assert!(begun.elapsed() < Duration::from_secs(20), "the agent's tunnel stays");
    }
    let away = web(&["scale", "web", "1"]).ended(5);
    assert!(away.err.contains("AGENT_OFFLINE"), "{}", away.err);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_clear_is_asked_back_with_the_names() {
    let control_plane = ControlPlane::with(&[]);
    let dir = tempfile::tempdir().unwrap();
    for name in ["one", "two"] {
        let token = control_plane.enrol().0;
        SimulatedAgent::new(&control_plane, &dir.path().join(name), &token).await;
    }
    let eve = Person::logged_in(&control_plane, "eve", &[]);
    let clusters = eve.run(&["clusters", "-o", "json"]).ended(0).json();
    let id = |n: usize| clusters["items"][n]["id"].as_str().unwrap().to_owned();
    // both are called `n`
    for args in [&["apps"][..], &["apps", "--cluster", "n"]] {
        let unclear = eve.run(args).ended(2);
        assert!(unclear.err.contains("CLUSTER_AMBIGUOUS"), "{}", unclear.err);
        assert!(unclear.err.contains(&id(0)) && unclear.err.contains(&id(1)), "{}", unclear.err);
    }
    let first = id(0);
    eve.run(&["contexts", "use", "127.0.0.1", "--cluster", &first, "-n", "beta"]).ended(0);
    let away = eve.run(&["apps"]).ended(5);
    assert!(away.err.contains("AGENT_OFFLINE"), "{}", away.err);

    let file = eve.home.path().join("app.toml");
    let path = file.to_str().unwrap().to_owned();
    let whole = "name = \"shop\"\nimage = \"shop:1\"\n";
    for (text, args, code, said) in [
        ("name = \"shop\"\nimgae = \"x\"\n", &[][..], 2, "line 2, column 1"),
        ("name = \"shop\"\nimgae = \"x\"\n", &[][..], 2, "did you mean `image`?"),
        ("name = \"Shop\"\nimage = \"x\"\n", &[][..], 2, "name: 1 to 52 of a-z"),
        (whole, &["--set-env", "MODE"][..], 2, "NAME=VALUE"),
        (whole, &["-n", "../x"][..], 2, "namespace:"),
        (whole, &["--cluster", "nowhere"][..], 2, "CLUSTER_UNKNOWN"),
        (whole, &[][..], 5, "AGENT_OFFLINE"),
    ] {
        std::fs::write(&file, text).unwrap();
        let refused = eve.run(&[&["deploy", &path][..], args].concat()).ended(code);
        assert!(refused.err.contains(said), "{text} {args:?}: {}", refused.err);
    }
    let absent = eve.run(&["deploy"]).ended(2);
    assert!(absent.err.contains("cannot read pipeops.toml"), "{}", absent.err);
    let unsure = eve.run(&["delete", "shop", "--volumes"]).ended(11);
    let hint = "to delete beta/shop on n with all data of its volumes, run again with --yes\n";
    assert!(unsure.err.contains(hint), "{}", unsure.err);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_revoked_user_began_ends_though_the_name_is_given_again() {
    let control_plane = ControlPlane::with(&[]);
    let (_kube, address) = serve_kube().await;
    let (_agent, cluster) = control_plane.agent(address).await;
    let (_, former) = user(&control_plane, "eve", &[]);
    // nothing gets ready there: it runs until somebody ends it
    let body = apply(&[deployment("web")]);
    let (status, running) = submit(&control_plane, &cluster, &former, "k-1", &body).await;
    assert_eq!(status, 202, "{running}");
    let id = running["id"].as_str().unwrap();
    let admin = control_plane.admin.clone();
    wait_for_state(&control_plane, &cluster, &admin, id, "running").await;
    control_plane.sandbox.subcommand(&["control-plane", "user", "revoke", "eve"]).ended(0);
    let (_, later) = user(&control_plane, "eve", &[]);
    wait_for_state(&control_plane, &cluster, &admin, id, "cancelled").await;
    // nor is it one of hers
    let path = format!("/api/v1/clusters/{cluster}/operations/{id}");
    let seen = control_plane.ask("GET", &path, &later, json!({})).await;
    assert_eq!(seen.status(), 404);
    let (status, again) = submit(&control_plane, &cluster, &later, "k-1", &body).await;
    assert_eq!((status, &again["code"]), (409, &json!("idempotency_mismatch")), "{again}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_is_made_and_looked_at_by_an_operator_and_worked_in_by_its_own() {
    let control_plane = ControlPlane::with(&[]);
    let agent = RecordingAgent::new(&control_plane, &["tenants"]).await;
    let plant = |part: &'static str, status: u16, answer: serde_json::Value| {
        agent.record.planted.lock().unwrap().insert(0, (part, status, answer));
    };
    let ola = Person::logged_in(&control_plane, "ola", &["--role", "operator"]);
    let made = ola.run(&[
        "tenant",
        "set",
        "acme",
        "-n",
        "shop,shop-2",
        "--quota",
        "cpu=2,pods=50",
        "--host",
        "shop.acme.com",
    ]);
    assert_eq!(made.ended(0).out, "acme: shop, shop-2\n");
    let asked = agent.record.last("POST /api/v1/operations");
    assert_eq!(
        (&asked.body["kind"], &asked.claims["role"]),
        (&json!("tenant"), &json!("operator"))
    );
    assert_eq!(
        asked.body["spec"],
        json!({"action": "set", "tenant": "acme", "namespaces": ["shop", "shop-2"],
            "quota": {"cpu": "2", "pods": 50}, "pod_security": "baseline",
            "hosts": ["shop.acme.com"], "egress": [], "remove_namespaces": [], "timeout_s": 300})
    );
    for (args, said) in [
        (&["set", "acme"][..], "--namespace"),
        (&["set", "acme", "-n", "a", "--quota", "disk=1Gi"], "`disk` is not one of cpu"),
        (&["set", "Acme", "-n", "a"], "BAD_NAME"),
        (&["show", "../x"], "BAD_NAME"),
    ] {
        let refused = ola.run(&[&["tenant"][..], args].concat()).ended(2);
        assert!(refused.err.contains(said), "{args:?}: {}", refused.err);
    }

    // what is there
    assert_eq!(ola.run(&["tenant", "list"]).ended(0).out.trim(), "none");
    let namespace = |name: &str| {
        json!({"metadata": {"name": name, "annotations": {"pipeops.io/hosts": "shop.acme.com"},
            "labels": {"pipeops.io/tenant": "acme",
                "pod-security.kubernetes.io/enforce": "baseline"}}})
    };
    let both = json!({"items": [namespace("shop"), namespace("shop-2")]});
    let quota = json!({"items": [{"metadata": {"name": "q", "namespace": "shop"}, "status": {
        "hard": {"requests.cpu": "2", "pods": "50"},
        "used": {"requests.cpu": "500m", "pods": "3"}}}]});
    plant("/k8s/api/v1/namespaces?labelSelector=pipeops.io/tenant&", 200, both.clone());
    plant("/k8s/api/v1/namespaces?labelSelector=pipeops.io/tenant=acme&", 200, both);
    plant("/k8s/api/v1/resourcequotas", 200, quota.clone());
    plant("/k8s/api/v1/namespaces/shop/resourcequotas", 200, quota);
    let list = ola.run(&["tenant", "list"]).ended(0).out;
    assert!(list.contains("500m/2") && list.contains("shop.acme.com"), "{list}");
    let list = ola.run(&["tenant", "list", "-o", "json"]).ended(0).json();
    assert_eq!(list["items"][0]["namespaces"][0]["quota"]["pods"]["used"], "3");
    let shown = ola.run(&["tenant", "show", "acme"]).ended(0).out;
    assert!(shown.contains("shop-2 (Pod Security baseline)"), "{shown}");
    let shown = ola.run(&["tenant", "show", "acme", "-o", "json"]).ended(0).json();
    assert_eq!(shown["hosts"], json!(["shop.acme.com"]));
    let unknown = ola.run(&["tenant", "show", "globex"]).ended(7);
    assert!(unknown.err.contains("TENANT_UNKNOWN"), "{}", unknown.err);

    // nobody deletes one by a slip
    let unsure = ola.run(&["tenant", "delete", "acme"]).ended(11);
    assert!(unsure.err.contains("run again with --yes\n"), "{}", unsure.err);
    for said in ["shop, shop-2 with all data in there", "tokens stay valid"] {
        assert!(unsure.err.contains(said), "{}", unsure.err);
    }
    let unknown = ola.run(&["tenant", "delete", "globex", "--yes"]).ended(7);
    assert!(unknown.err.contains("TENANT_UNKNOWN"), "{}", unknown.err);
    assert_eq!(agent.record.last("POST").body["spec"]["action"], "set");
    let deleted = ola.run(&["tenant", "delete", "acme", "--yes"]).ended(0);
    assert_eq!(deleted.out, "acme: deleted\n");
    assert!(deleted.err.contains("tokens of acme stay valid"), "{}", deleted.err);
    let asked = agent.record.last("POST").body["spec"].clone();
    assert_eq!((&asked["action"], &asked["confirm"]), (&json!("delete"), &json!("acme")));

    // somebody of the tenant
    let eve = Person::new();
    let (line, token) = user(&control_plane, "eve", &["--tenant", "acme"]);
    let login = eve.types(&words(&line), &token).ended(0);
    assert!(login.err.contains("as context 127.0.0.1; tenant acme; clusters: n"), "{}", login.err);
    let contexts = eve.run(&["contexts", "-o", "json"]).ended(0).json();
    assert_eq!(contexts["items"][0]["tenant"], "acme");
    let users = ["control-plane", "user", "list"];
    assert!(control_plane.sandbox.subcommand(&users).ended(0).out.contains(" acme "));
    let file = eve.home.path().join("app.toml");
    std::fs::write(&file, "name = \"web\"\nimage = \"web:1\"\n").unwrap();
    let deploy = ["deploy", file.to_str().unwrap(), "--detach"];
    // several namespaces, none that is told, one
    let unclear = eve.run(&deploy).ended(2);
    assert!(unclear.err.contains("the tenant acme has shop, shop-2"), "{}", unclear.err);
    let scope = json!({"kind": "Status", "status": "Failure", "code": 403, "message": "no",
        "details": {"causes": [{"reason": "namespace_scope"}]}});
    plant("/k8s/api/v1/namespaces?", 403, scope.clone());
    plant("/k8s/apis/apps/v1/deployments?", 403, scope);
    for args in [&deploy[..], &["apps"], &["status", "web"]] {
        let unclear = eve.run(args).ended(2);
        assert!(unclear.err.contains("NAMESPACE_NEEDED"), "{args:?}: {}", unclear.err);
    }
    plant("/k8s/api/v1/namespaces?", 200, json!({"items": [namespace("shop")]}));
    eve.run(&deploy).ended(0);
    let asked = agent.record.last("POST");
    assert_eq!(asked.body["spec"]["application"]["namespace"], "shop");
    assert_eq!(asked.claims["tenant"], "acme");
    // what was looked for was in that namespace alone
    assert_eq!(eve.run(&["apps"]).ended(0).out.trim(), "none");
    agent.record.last("GET /k8s/apis/apps/v1/namespaces/shop/deployments");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_tenant_loses_is_said_before_it_is_changed() {
    let control_plane = ControlPlane::with(&[]);
    let agent = RecordingAgent::new(&control_plane, &["tenants"]).await;
    let plant = |part: &'static str, answer: serde_json::Value| {
        agent.record.planted.lock().unwrap().insert(0, (part, 200, answer));
    };
    let asked = || {
        let seen = agent.record.seen.lock().unwrap();
        seen.iter().filter(|seen| seen.line.starts_with("POST")).count()
    };
    let namespace = |name: &str, ends: serde_json::Value| {
        json!({"metadata": {"name": name, "annotations": {"pipeops.io/hosts": "*.acme.com"},
            "labels": {"pipeops.io/tenant": "acme",
                "pod-security.kubernetes.io/enforce": "restricted"},
            "deletionTimestamp": ends}})
    };
    let nothing = serde_json::Value::Null;
    let gone = namespace("gone", json!("2026-01-01T00:00:00Z"));
    plant("/k8s/api/v1/namespaces?", json!({"items": [namespace("shop", nothing.clone()), gone]}));
    let quota = json!({"items": [{"metadata": {"name": "q", "namespace": "shop"}, "status": {
        "hard": {"requests.cpu": "2", "services.nodeports": "0"}, "used": {}}}]});
    plant("/namespaces/shop/resourcequotas", quota);
    let policy = json!({"items": [{"metadata": {"name": "pipeops-internet", "namespace": "shop"},
        "spec": {"egress": [{"to": [
            {"ipBlock": {"cidr": "0.0.0.0/0", "except": ["10.0.0.0/8"]}},
            {"ipBlock": {"cidr": "10.9.0.0/16"}}]}]}}]});
    plant("/namespaces/shop/networkpolicies", policy);
    let ola = Person::logged_in(&control_plane, "ola", &["--role", "operator"]);
    let list = ola.run(&["tenant", "list"]).ended(0).out;
    assert!(list.contains(" shop ") && list.contains(" gone (Terminating) "), "{list}");
    let shown = ola.run(&["tenant", "show", "acme"]).ended(0).out;
    assert!(shown.contains("\negress     10.9.0.0/16\n"), "{shown}");
    let line = "pipeops tenant set acme -n shop --quota cpu=2 --pod-security restricted \
                --host '*.acme.com' --egress 10.9.0.0/16";
    assert_eq!(shown.lines().last(), Some(line));

    // the line that is shown changes nothing
    let same = line.replace('\'', "");
    let same = words(&same);
    let done = ola.run(&same).ended(0);
    assert!(!done.err.contains("takes away"), "{}", done.err);
    assert_eq!(agent.record.last("POST").body["spec"]["egress"], json!(["10.9.0.0/16"]));
    let before = asked();
    let less = ["tenant", "set", "acme", "-n", "shop"];
    let unsure = ola.run(&less).ended(11);
    let losses = [
        "Pod Security: restricted becomes baseline",
        "quota cpu: 2 becomes no limit",
        "host *.acme.com: is taken away",
        "egress 10.9.0.0/16: is closed",
    ];
    for loss in losses {
        assert!(unsure.err.contains(loss), "{}", unsure.err);
    }
    assert!(unsure.err.contains("to change it so, run again with --yes\n"), "{}", unsure.err);
    assert_eq!(asked(), before);
    let meant = ola.run(&[&less[..], &["--yes"]].concat()).ended(0);
    assert!(losses.iter().all(|loss| meant.err.contains(loss)), "{}", meant.err);

    // what deletes data is asked for as a deletion
    let both = json!({"items": [namespace("shop", nothing.clone()), namespace("old", nothing)]});
    plant("/k8s/api/v1/namespaces?", both);
    let before = asked();
    let without = [&same[..], &["--remove-namespace", "old"]].concat();
    let unsure = ola.run(&without).ended(11);
    let hint = "to delete old of the tenant acme on n with all data in there, run again with \
                --yes\n";
    assert!(unsure.err.contains(hint), "{}", unsure.err);
    assert_eq!(asked(), before);
    ola.run(&[&without[..], &["--yes"]].concat()).ended(0);
    assert_eq!(agent.record.last("POST").body["spec"]["remove_namespaces"], json!(["old"]));

    // somebody of a tenant that has no place here, or is answered what is another's
    let eve = Person::logged_in(&control_plane, "eve", &["--tenant", "globex"]);
    let file = eve.home.path().join("app.toml");
    std::fs::write(&file, "name = \"web\"\nimage = \"web:1\"\n").unwrap();
    let deploy = ["deploy", file.to_str().unwrap(), "--detach"];
    let own = ["tenant", "show", "acme"];
    for args in
        [&deploy[..], &["apps"], &["status", "web"], &["secret", "list"], &["tenant", "list"]]
    {
        let unknown = eve.run(args).ended(7);
        assert!(unknown.err.contains("TENANT_UNKNOWN"), "{args:?}: {}", unknown.err);
        assert!(unknown.err.contains("is of a tenant globex"), "{args:?}: {}", unknown.err);
    }
    plant("/k8s/api/v1/namespaces?", json!({"items": []}));
    assert!(eve.run(&own).ended(7).err.contains("is of a tenant acme"));
}
