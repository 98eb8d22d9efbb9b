//! `pipeops run` as systemd sees it: notifications, the socket, the end.

use std::cell::RefCell;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::process::{Child, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::support::{Sandbox, run_output};

pub(crate) struct Agent {
    pub(crate) child: Child,
    notify: std::sync::mpsc::Receiver<String>,
    /// Every notification so far: one state may say two of the things that a test waits for.
    said: RefCell<Vec<String>>,
    pub(crate) sandbox: Sandbox,
    log: Arc<Mutex<String>>,
}

impl Agent {
    pub(crate) fn start(sandbox: Sandbox, env: &[(&str, &str)]) -> Agent {
        let path = sandbox.path("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        let mut command = sandbox.command(&["run"]);
        command.env("NOTIFY_SOCKET", &path).envs(env.iter().copied()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        // a log that nobody reads would stop the agent at its next line
        let mut lines = BufReader::new(child.stderr.take().unwrap());
        let log = Arc::<Mutex<String>>::default();
        let kept = log.clone();
        std::thread::spawn(move || {
            let mut line = String::new();
            while lines.read_line(&mut line).is_ok_and(|n| n > 0) {
                kept.lock().unwrap().push_str(&std::mem::take(&mut line));
            }
        });
        // nor may systemd's side of the notifications fill up
        let (sender, notify) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(n) = socket.recv(&mut buffer) {
                if sender.send(String::from_utf8_lossy(&buffer[..n]).into_owned()).is_err() {
                    return;
                }
            }
        });
        Agent { child, notify, said: RefCell::default(), sandbox, log }
    }

    /// What it said so far.
    pub(crate) fn log(&self) -> String {
        self.log.lock().unwrap().clone()
    }

    /// The first notification that holds `text`, also one that came before the question.
    pub(crate) fn until(&self, text: &str) -> String {
        let mut said = self.said.borrow_mut();
        let end = Instant::now() + Duration::from_secs(30);
        let mut next = 0;
        loop {
            if let Some(found) = said[next..].iter().find(|s| s.contains(text)) {
                return found.clone();
            }
            next = said.len();
            match self.notify.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok(state) => said.push(state),
                Err(_) => panic!("no notification with `{text}` in {said:?}"),
            }
        }
    }

    /// Two more of the kind than there have been.
    fn wait_for_two_heartbeats(&self) {
        for _ in 0..2 {
            self.said.borrow_mut().clear();
            self.until("WATCHDOG=1");
        }
    }

    pub(crate) fn get(&self, path: &str) -> String {
        let mut stream =
            UnixStream::connect(self.sandbox.root().join("run/pipeops/agent.sock")).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        text
    }

    /// kill -9 where it still runs, and the same again.
    pub(crate) fn restart(&mut self, env: &[(&str, &str)]) {
        let _ = self.child.kill();
        self.child.wait().unwrap();
        self.child = self
            .sandbox
            .command(&["run"])
            .envs(env.iter().copied())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
    }

    pub(crate) fn stop(mut self) {
        nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(self.child.id().try_into().unwrap()),
            nix::sys::signal::Signal::SIGTERM,
        )
        .unwrap();
        self.until("STOPPING=1");
        assert_eq!(self.child.wait().unwrap().code(), Some(0));
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn credential(sandbox: &Sandbox) {
    let api = std::fs::read_to_string(sandbox.path("api")).unwrap();
    let kubeconfig = serde_json::json!({"apiVersion": "v1", "kind": "Config",
        "current-context": "c", "clusters": [{"name": "l", "cluster": {"server": api}}],
        "contexts": [{"name": "c", "context": {"cluster": "l", "user": "u"}}],
        "users": [{"name": "u", "user": {"token": "t"}}]});
    sandbox.put("/run/pipeops-credential/kubeconfig", &kubeconfig.to_string());
}

#[test]
fn without_anything_it_is_ready_unenrolled_and_waiting() {
    let agent = Agent::start(Sandbox::new(), &[]);
    let ready = agent.until("READY=1");
    assert!(ready.contains("STATUS=unenrolled"), "{ready}");
    agent.until("kubeconfig is not there yet");
    // nor is any other file waited for as if it were absent
    agent.sandbox.put("/run/pipeops-credential/kubeconfig", "vm1\n");
    agent.until("/run/pipeops-credential/kubeconfig: it is no kubeconfig");
    assert!(agent.get("/healthz").starts_with("HTTP/1.1 200"));
    assert!(agent.get("/readyz").starts_with("HTTP/1.1 503"));
    assert!(agent.get("/metrics").contains("pipeops_kubernetes_connected 0"));
    assert!(agent.get("/etc/passwd").starts_with("HTTP/1.1 404"));
    agent.stop();
}

#[test]
fn with_a_credential_it_tells_the_truth_about_the_cluster() {
    let sandbox = Sandbox::new();
    credential(&sandbox);
    let agent = Agent::start(
        sandbox,
        &[
            ("AGENT_TOKEN", "planted-canary-4711-in-plain-text"),
            ("PIPEOPS_CONTROL_PLANE_URL", "http://127.0.0.1:1"),
        ],
    );
    // it never was without a token
    let ready = agent.until("READY=1");
    assert!(ready.contains("STATUS=connecting"), "{ready}");
    // each is seen in its own time
    for expected in ["1 of 1 nodes ready", "connecting"] {
        let state = agent.until(expected);
        assert!(!state.contains("canary-4711-in-plain-text"), "{state}");
    }
    // the cluster is there, the control plane is not: that is not ready
    assert!(agent.get("/readyz").starts_with("HTTP/1.1 503"));
    let status = agent.get("/status");
    assert!(
        status.contains("\"name\":\"vm1\"") && !status.contains("canary-4711-in-plain-text"),
        "{status}"
    );
    agent.stop();
}

#[test]
fn the_watchdog_is_fed_in_time() {
    let agent = Agent::start(Sandbox::new(), &[("WATCHDOG_USEC", "3000000")]);
    agent.wait_for_two_heartbeats();
    agent.stop();
}

#[test]
fn a_configuration_in_yaml_has_the_same_keys_and_a_named_file_must_be_there() {
    let sandbox = Sandbox::new();
    let run = |name: &str, text: &str| {
        let path = sandbox.path(name);
        std::fs::write(&path, text).unwrap();
        run_output(sandbox.command(&["run", "--config", &path]).output().unwrap())
    };
    for (name, text, word) in [
        (
            "c.toml",
            "max-role = \"viewer\"\ncontrol-plane-urll = \"https://cp.test\"\n",
            "did you mean `control-plane-url`?",
        ),
        (
            "c.yaml",
            "control-plane-url: https://cp.test\ncontrol-plan-pin: x\n",
            "unknown key `control-plan-pin`",
        ),
        ("c.yaml", "# one\ncontrol-plane-url: https://cp.test\nmax-role: 7\n", "line 3"),
        ("c.yml", "control-plane-url: ftp://cp.test\n", "`ftp` is no scheme"),
        ("c.yaml", "max-role: emperor\n", "`emperor` is none of"),
        ("c.yaml", "a: b\n c: d\n", "not valid YAML"),
        (
            "c.yaml",
            "https-proxy: http://u:planted-canary-of-a-proxy-canary-4711-in-plain-text@proxy.test:3128\n",
            "without a user and a password",
        ),
        ("c.toml", "control-plane-url: https://cp.test\n", "not valid TOML"),
    ] {
        let answer = run(name, text).ended(2);
        assert!(
            answer.err.contains(word)
                && answer.err.contains(
                    if text.contains("control-plan-") || text.contains("urll") {
                        "CONFIG_UNKNOWN_KEY"
                    } else {
                        "CONFIG_INVALID"
                    }
                )
                && !answer.err.contains("canary-4711-in-plain-text"),
            "{text}: {}",
            answer.err
        );
    }
    let gone = run_output(
        sandbox.command(&["run", "--config", &sandbox.path("gone.yaml")]).output().unwrap(),
    )
    .ended(2);
    assert!(gone.err.contains("FILE_UNREADABLE") && gone.err.contains("gone.yaml"), "{}", gone.err);
    // and a right one is used
    let path = sandbox.path("right.yaml");
    std::fs::write(
        &path,
        "control-plane-url: http://127.0.0.1:1\ncluster-name: from yaml\nmax-role: viewer\n",
    )
    .unwrap();
    let mut child = sandbox
        .command(&["run", "--config", &path])
        .env("AGENT_TOKEN", "planted-canary-of-a-token-canary-4711-in-plain-text")
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    while !line.contains("127.0.0.1:1") && !line.contains("connecting (") {
        line.clear();
        assert!(lines.read_line(&mut line).unwrap() > 0, "it ended");
    }
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn a_wrong_configuration_ends_with_two() {
    let sandbox = Sandbox::new();
    sandbox.put("/etc/pipeops/agent.toml", "control-plan-url = \"x\"\n");
    let answer = run_output(sandbox.command(&["run"]).output().unwrap()).ended(2);
    assert!(
        answer.err.contains("unknown key `control-plan-url`")
            && answer.err.contains("did you mean `control-plane-url`?"),
        "{}",
        answer.err
    );
    let help = run_output(sandbox.command(&["run", "--help"]).output().unwrap()).ended(0);
    assert!(help.out.contains("watches-per-caller"), "{}", help.out);
}
