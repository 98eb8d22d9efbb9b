//! Stands between the agent in a VM and its API server, counts what the agent writes, and ends the
//! agent before a write is passed on, or once it is done and before its answer is passed back.
//!
//! The agent is the program as it is: it is led here by `run --kubeconfig`, in a drop-in of its
//! unit that whoever started this takes away again. Requests go on with their own credential, so
//! Kubernetes decides as always.

use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::response::{IntoResponse as _, Response};
use base64::Engine as _;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::watch;

/// The VM with the agent.
const AGENT: &str = "a1";
/// Where the agent is told of the gate, until the next boot at the latest.
const KUBECONFIG: &str = "/run/pipeops-gate";
const DROP_IN: &str = "/run/systemd/system/pipeops-agent.service.d";

/// Runs a line of shell in a VM as root, from the root of the repository; gives what it prints.
pub(crate) fn in_vm(vm: &str, line: &str, input: &str) -> Result<String, String> {
    use std::io::Write as _;
    let run = || {
        let mut child = Command::new("scripts/vm")
            .args(["exec", vm, "sh", "-c", line])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        child.stdin.take().unwrap().write_all(input.as_bytes())?;
        child.wait_with_output()
    };
    let out = tokio::task::block_in_place(run).map_err(|e| format!("scripts/vm: {e}"))?;
    if out.status.success() {
        return Ok(String::from_utf8_lossy(&out.stdout).into_owned());
    }
    Err(format!("{vm}: {line}: {}: {}", out.status, String::from_utf8_lossy(&out.stderr)))
}

/// What an administrator sees of the cluster, past agent and tunnel: the objects that
/// `kubectl ARGS -o json` prints.
pub(crate) fn cluster(args: &str) -> Value {
    let printed = in_vm(AGENT, &format!("kubectl {args} --ignore-not-found -o json"), "");
    let printed = printed.unwrap_or_else(|why| panic!("{why}"));
    // nothing at all where there is none
    serde_json::from_str(&printed).unwrap_or_default()
}

/// When the agent is ended, of one write.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Moment {
    /// It never reaches the API server.
    Before,
    /// The API server has done it, and the agent does not know.
    After,
}

#[derive(Default)]
struct Plan {
    /// Writes since the plan was made.
    writes: Vec<String>,
    /// At which of them, from 1, the agent is ended.
    at: Option<(usize, Moment)>,
}

pub(crate) struct Gate {
    client: reqwest::Client,
    /// URL of the API server.
    api: String,
    plan: Mutex<Plan>,
    killed: watch::Sender<bool>,
}

impl Gate {
    /// Listens on the VMs' bridge, and has the agent come through it.
    pub(crate) async fn open() -> Result<Arc<Gate>, String> {
        let text = in_vm(AGENT, "cat /run/pipeops-credential/kubeconfig", "")?;
        let mut kubeconfig: Value = serde_json::from_str(&text)
            .map_err(|e| format!("the agent's kubeconfig cannot be read: {e}"))?;
        let ca = kubeconfig
            .pointer("/clusters/0/cluster/certificate-authority-data")
            .and_then(Value::as_str)
            .and_then(|ca| base64::engine::general_purpose::STANDARD.decode(ca).ok())
            .ok_or("the agent's kubeconfig names no CA")?;
        let ca = reqwest::Certificate::from_pem(&ca).map_err(|e| e.to_string())?;
        let address = tokio::task::block_in_place(|| {
            Command::new("scripts/vm").args(["ip", AGENT]).output().map_err(|e| e.to_string())
        })?;
        let address = String::from_utf8_lossy(&address.stdout).trim().to_owned();
        let bridge = address.rsplit_once('.').map(|(net, _)| format!("{net}.1"));
        let bridge = bridge.ok_or_else(|| format!("`{address}` is no address of {AGENT}"))?;
        let listener = TcpListener::bind((bridge.as_str(), 0)).await.map_err(|e| e.to_string())?;
        let port = listener.local_addr().map_err(|e| e.to_string())?.port();
        let client = reqwest::Client::builder()
            .tls_certs_only([ca])
            .no_proxy()
            .http1_only()
            .redirect(reqwest::redirect::Policy::none());
        let gate = Arc::new(Gate {
            client: client.build().map_err(|e| e.to_string())?,
            api: format!("https://{address}:6443"),
            plan: Mutex::default(),
            killed: watch::Sender::new(false),
        });
        let router = axum::Router::new().fallback(pass).with_state(gate.clone());
        tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        kubeconfig["clusters"][0]["cluster"] = json!({"server": format!("http://{bridge}:{port}")});
        let lead = format!(
            "set -e; umask 027; cat > {KUBECONFIG}; chgrp pipeops-agent {KUBECONFIG}; \
             umask 022; mkdir -p {DROP_IN}; printf '[Service]\\nRestartSec=200ms\\nExecStart=\\n\
             ExecStart=/usr/local/bin/pipeops run --kubeconfig {KUBECONFIG}\\n' > \
             {DROP_IN}/gate.conf; \
             systemctl daemon-reload; systemctl restart pipeops-agent"
        );
        in_vm(AGENT, &lead, &kubeconfig.to_string())?;
        Ok(gate)
    }

    /// Counts from here on, and ends the agent at one of the writes, or at none.
    pub(crate) fn plan(&self, at: Option<(usize, Moment)>) {
        self.killed.send_replace(false);
        *self.plan.lock().unwrap() = Plan { writes: Vec::new(), at };
    }

    /// What was written since the plan was made, as `PATCH deployments/web`.
    pub(crate) fn writes(&self) -> Vec<String> {
        self.plan.lock().unwrap().writes.clone()
    }

    /// Whether the agent was ended as planned, in time.
    pub(crate) async fn has_killed(&self, within: Duration) -> bool {
        let mut killed = self.killed.subscribe();
        tokio::time::timeout(within, killed.wait_for(|killed| *killed)).await.is_ok()
    }

    /// Counts a write; says whether the agent ends at it.
    fn count(&self, write: String) -> Option<Moment> {
        let mut plan = self.plan.lock().unwrap();
        plan.writes.push(write);
        let number = plan.writes.len();
        let (_, moment) = plan.at.filter(|(at, _)| *at == number)?;
        plan.at = None;
        Some(moment)
    }

    /// Ends the agent. There is nobody left to answer.
    async fn kill(self: Arc<Gate>) -> Response {
        // apart from the request, which ends with its connection
        tokio::spawn(async move {
            // the signal has arrived when systemctl says so; the answer is held until then
            let line = "systemctl kill -s KILL pipeops-agent";
            in_vm(AGENT, line, "").unwrap_or_else(|why| panic!("{why}"));
            self.killed.send_replace(true);
        });
        std::future::pending().await
    }
}

/// A request that changes something, as people read it.
fn write_of(method: &http::Method, uri: &http::Uri, body: &[u8]) -> Option<String> {
    let (path, query) = (uri.path(), uri.query().unwrap_or_default());
    let asks = path.starts_with("/apis/authorization.k8s.io/")
        || path.starts_with("/apis/authentication.k8s.io/");
    let dry = query.contains("dryRun=All") || body.windows(8).any(|part| part == b"\"dryRun\"");
    if asks || dry || matches!(method.as_str(), "GET" | "HEAD" | "OPTIONS") {
        return None;
    }
    let what = path.split_once("/namespaces/").and_then(|(_, rest)| rest.split_once('/'));
    Some(format!("{method} {}", what.map_or(path, |(_, what)| what)))
}

async fn pass(State(gate): State<Arc<Gate>>, request: Request) -> Response {
    let (parts, body) = request.into_parts();
    let Ok(body) = axum::body::to_bytes(body, 16 << 20).await else {
        return http::StatusCode::BAD_REQUEST.into_response();
    };
    let write = write_of(&parts.method, &parts.uri, &body);
    let moment = write.and_then(|write| gate.count(write));
    if moment == Some(Moment::Before) {
        return gate.kill().await;
    }
    let path = parts.uri.path_and_query().map_or("/", |path| path.as_str());
    let mut headers = parts.headers;
    for name in ["host", "connection", "content-length", "transfer-encoding"] {
        headers.remove(name);
    }
    let request = gate.client.request(parts.method, format!("{}{path}", gate.api));
    let answer = match request.headers(headers).body(body).send().await {
        Ok(answer) => answer,
        Err(error) => return (http::StatusCode::BAD_GATEWAY, error.to_string()).into_response(),
    };
    if moment == Some(Moment::After) {
        let _ = answer.bytes().await;
        return gate.kill().await;
    }
    let mut passed = Response::builder().status(answer.status());
    for (name, value) in answer.headers() {
        if !matches!(name.as_str(), "connection" | "transfer-encoding") {
            passed = passed.header(name, value);
        }
    }
    passed.body(Body::from_stream(answer.bytes_stream())).unwrap()
}
