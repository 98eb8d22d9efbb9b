//! Everything around the agent, in this process: a control plane, an FRP server, a Kubernetes API
//! that records.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use hyper_util::rt::TokioIo;
use pipeops::base::secret::Secret;
use pipeops::frp::codec::Io;
use pipeops::frp::server::{Server, ServerConfig};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::agent::Agent;
pub(crate) use crate::fake_control_plane::{FakeControlPlane, Scripted, TOKEN};
use crate::fake_control_plane::{identity, listen};
use crate::support::Sandbox;

/// A request that reached the fake Kubernetes API.
#[derive(Clone, Debug)]
pub(crate) struct RecordedRequest {
    pub(crate) method: String,
    pub(crate) uri: String,
    pub(crate) headers: Vec<(String, String)>,
}

impl RecordedRequest {
    pub(crate) fn all(&self, name: &str) -> Vec<&str> {
        self.headers.iter().filter(|(n, _)| n == name).map(|(_, v)| v.as_str()).collect()
    }
}

/// An answer that Kubernetes gives once instead of its own.
pub(crate) struct Fault {
    pub(crate) method: &'static str,
    /// Part of the path that it is for.
    pub(crate) part: &'static str,
    pub(crate) status: u16,
    /// It does what was asked for, and only its answer is another one.
    pub(crate) done: bool,
}

#[derive(Default)]
pub(crate) struct Kube {
    pub(crate) seen: Mutex<Vec<RecordedRequest>>,
    /// What was applied, by path.
    pub(crate) objects: Mutex<BTreeMap<String, Value>>,
    /// Each change that was made by a patch: path and body, in their order.
    pub(crate) patched: Mutex<Vec<(String, Value)>>,
    touched: Mutex<BTreeSet<String>>,
    /// Deployments have their pods.
    pub(crate) ready: AtomicBool,
    /// What else is answered, by path and the part of the query that must be there: a text as it
    /// is, `null` as 404, anything else as JSON.
    pub(crate) planted: Mutex<Vec<(&'static str, &'static str, Value)>>,
    /// The pods of the node `vm1`.
    pub(crate) pods: Mutex<Vec<Value>>,
    /// How many evictions of a pod its budget refuses before one passes, by name.
    pub(crate) budgets: Mutex<BTreeMap<String, usize>>,
    /// The pods that were evicted, in their order.
    pub(crate) evicted: Mutex<Vec<String>>,
    /// Nobody may evict in this namespace.
    pub(crate) guarded: Mutex<&'static str>,
    /// What goes wrong with objects that are kept, each once.
    pub(crate) faults: Mutex<Vec<Fault>>,
}

/// What a merge patch (RFC 7396) makes of an object.
fn merge(object: &mut Value, patch: &Value) {
    let Some(fields) = patch.as_object() else {
        *object = patch.clone();
        return;
    };
    if !object.is_object() {
        *object = json!({});
    }
    for (name, value) in fields {
        if value.is_null() {
            object.as_object_mut().unwrap().remove(name);
        } else {
            merge(&mut object[name], value);
        }
    }
}

/// Paths below which objects are kept.
const KEPT: [&str; 8] = [
    "/apis/batch/v1/namespaces/beta/jobs/",
    "/apis/apps/v1/namespaces/beta/deployments/",
    "/api/v1/namespaces/beta/configmaps/",
    "/api/v1/namespaces/beta/secrets/",
    "/api/v1/nodes/",
    // a tenant's
    "/api/v1/namespaces/acme",
    "/apis/networking.k8s.io/v1/namespaces/acme/",
    "/apis/rbac.authorization.k8s.io/v1/namespaces/acme/",
];

impl Kube {
    /// An object that is there before anybody touches it.
    pub(crate) fn put(&self, path: &str, object: Value) {
        self.objects.lock().unwrap().insert(path.into(), object);
        self.touched.lock().unwrap().insert(path.into());
    }

    /// The pods of the node, and their evictions.
    fn node(&self, method: &str, path: &str, query: &str, body: &Value) -> Option<(u16, Value)> {
        let mut pods = self.pods.lock().unwrap();
        if path == "/api/v1/pods" && query.contains("fieldSelector=spec.nodeName=vm1") {
            return Some((200, json!({"metadata": {}, "items": *pods})));
        }
        let pod = path.strip_suffix("/eviction").filter(|_| method == "POST")?;
        let (namespace, name) =
            pod.strip_prefix("/api/v1/namespaces/")?.split_once("/pods/").unwrap();
        assert_eq!(body["metadata"], json!({"namespace": namespace, "name": name}));
        let uid = &body["deleteOptions"]["preconditions"]["uid"];
        let at = pods
            .iter()
            .position(|p| p["metadata"]["name"] == name && p["metadata"]["namespace"] == namespace);
        let Some(at) = at else {
            return Some((404, json!({"kind": "Status", "reason": "NotFound"})));
        };
        assert_eq!(&pods[at]["metadata"]["uid"], uid);
        if let Some(left) = self.budgets.lock().unwrap().get_mut(name).filter(|left| **left > 0) {
            *left -= 1;
            let why = "The disruption budget keeper needs 2 healthy pods and has 2 currently";
            let causes = json!([{"reason": "DisruptionBudget", "message": why}]);
            return Some((
                429,
                json!({"kind": "Status", "reason": "TooManyRequests",
                    "message": "Cannot evict pod as it would violate the pod's disruption budget.",
                    "details": {"causes": causes}}),
            ));
        }
        pods.remove(at);
        self.evicted.lock().unwrap().push(name.into());
        Some((201, json!({"kind": "Status", "status": "Success"})))
    }

    /// As a real one answers about single objects; a field of `owned` belongs to somebody else, and
    /// nobody may remove `kept`.
    fn object(&self, method: &str, path: &str, body: &Value, how: &str) -> (u16, Value) {
        let mut objects = self.objects.lock().unwrap();
        let absent = || {
            (
                404,
                json!({"kind": "Status", "reason": "NotFound",
                    "message": format!("{path} not found")}),
            )
        };
        match method {
            "PATCH" if path.ends_with("/owned") => {
                let planted = "Apply failed with 1 conflict: conflict with \"kubectl\": .data.password planted-canary-9911-in-plain-text";
                (409, json!({"kind": "Status", "reason": "Conflict", "message": planted}))
            }
            "PATCH" if path.ends_with("/scale") => {
                match objects.get_mut(path.trim_end_matches("/scale")) {
                    Some(object) => {
                        object["spec"]["replicas"] = body["spec"]["replicas"].clone();
                        (200, body.clone())
                    }
                    None => absent(),
                }
            }
            // steps as RFC 6902 has them
            "PATCH" if body.is_array() => {
                let Some(object) = objects.get_mut(path) else { return absent() };
                for step in body.as_array().unwrap() {
                    let at = object.pointer_mut(step["path"].as_str().unwrap());
                    match (step["op"].as_str(), at) {
                        (Some("test"), Some(at)) if *at == step["value"] => {}
                        (Some("replace"), Some(at)) => *at = step["value"].clone(),
                        _ => return (422, json!({"kind": "Status", "reason": "Invalid"})),
                    }
                }
                (200, object.clone())
            }
            "PATCH"
                if objects
                    .get(path)
                    .is_some_and(|o| o["immutable"] == true && o["data"] != body["data"]) =>
            {
                (422, json!({"kind": "Status", "reason": "Invalid", "details": {"causes": [{}]}}))
            }
            "POST" | "PUT" => {
                let (there, given) = (objects.get(path), &body["metadata"]["resourceVersion"]);
                let version = there.map(|object| object["metadata"]["resourceVersion"].clone());
                if version.clone().unwrap_or_default() != *given {
                    return (409, json!({"kind": "Status", "reason": "Conflict"}));
                }
                let next = version.and_then(|v| v.as_str()?.parse::<u64>().ok()).unwrap_or(0) + 1;
                let mut object = body.clone();
                object["metadata"]["resourceVersion"] = next.to_string().into();
                objects.insert(path.into(), object.clone());
                (if method == "POST" { 201 } else { 200 }, object)
            }
            "PATCH" => {
                let mut object = body.clone();
                if how.contains("merge-patch")
                    && let Some(there) = objects.get(path)
                {
                    object = there.clone();
                    merge(&mut object, body);
                }
                let first = !objects.contains_key(path);
                if !how.contains("dryRun=All") {
                    objects.insert(path.into(), object.clone());
                }
                (if first && !path.contains("/nodes/") { 201 } else { 200 }, object)
            }
            "DELETE" if path.ends_with("/kept") => {
                (403, json!({"kind": "Status", "reason": "Forbidden", "message": "not you"}))
            }
            "DELETE" => objects.remove(path).map_or_else(absent, |object| (200, object)),
            _ => match objects.get(path).cloned() {
                Some(mut object) if object["kind"] == "Deployment" => {
                    let desired = object["spec"]["replicas"].as_u64().unwrap_or(1);
                    let there = if self.ready.load(Relaxed) { desired } else { 0 };
                    object["status"] = json!({"replicas": desired, "updatedReplicas": desired,
                        "availableReplicas": there});
                    (200, object)
                }
                Some(object) => (200, object),
                None => absent(),
            },
        }
    }

    /// What came through the tunnel: the agent's own questions carry no impersonation.
    pub(crate) fn through(&self) -> Vec<RecordedRequest> {
        self.seen
            .lock()
            .unwrap()
            .iter()
            .filter(|s| !s.all("impersonate-user").is_empty())
            .cloned()
            .collect()
    }
}

async fn kube(State(kube): State<Arc<Kube>>, mut request: Request) -> Response {
    let text = |v: &axum::http::HeaderValue| String::from_utf8_lossy(v.as_bytes()).into_owned();
    kube.seen.lock().unwrap().push(RecordedRequest {
        method: request.method().to_string(),
        uri: request.uri().to_string(),
        headers: request.headers().iter().map(|(n, v)| (n.to_string(), text(v))).collect(),
    });
    let (path, query) =
        (request.uri().path().to_owned(), request.uri().query().unwrap_or_default().to_owned());
    let yes = |body: Value| axum::Json(body).into_response();
    if let Some(protocol) = request.headers().get("upgrade").cloned() {
        if query.contains("deny") {
            return (StatusCode::FORBIDDEN, "no exec for you").into_response();
        }
        let spoken = request.headers().get("sec-websocket-protocol").map(text);
        if spoken.is_some_and(|spoken| spoken.starts_with("v5.channel.k8s.io, ")) {
            return crate::exec::answer(request);
        }
        let upgrade = hyper::upgrade::on(&mut request);
        tokio::spawn(async move {
            let mut io = TokioIo::new(upgrade.await.unwrap());
            let mut buffer = vec![0; 4096];
            while let Ok(n @ 1..) = io.read(&mut buffer).await {
                if io.write_all(&buffer[..n]).await.is_err() || buffer[..n].ends_with(b"BYE") {
                    break;
                }
            }
            let _ = io.shutdown().await;
        });
        return (
            StatusCode::SWITCHING_PROTOCOLS,
            [
                ("connection", axum::http::HeaderValue::from_static("Upgrade")),
                ("upgrade", protocol),
            ],
        )
            .into_response();
    }
    let is_list = KEPT.iter().any(|kept| kept.strip_suffix('/') == Some(&*path));
    let created = is_list && request.method() == "POST";
    let kept = created || KEPT.iter().any(|kept| path.starts_with(kept));
    // what no operation ever touched is answered like everything else here
    let operated = query.contains("fieldManager=pipeops-runner")
        || request.method() == "DELETE"
        || path.ends_with(".pipeops.io")
        || path.contains("/jobs/");
    if kept && (operated || kube.touched.lock().unwrap().contains(&path)) {
        let method = request.method().to_string();
        let kind = request.headers().get("content-type").map(text).unwrap_or_default();
        let body = axum::body::to_bytes(request.into_body(), 1 << 20).await.unwrap();
        let body: Value = serde_json::from_slice(&body).unwrap_or_default();
        let path = match body["metadata"]["name"].as_str().filter(|_| created) {
            Some(name) => format!("{path}/{name}"),
            None => path,
        };
        kube.touched.lock().unwrap().insert(path.clone());
        let fault = {
            let mut faults = kube.faults.lock().unwrap();
            let at = faults.iter().position(|f| f.method == method && path.contains(f.part));
            at.map(|at| faults.remove(at))
        };
        let (status, answer) = match &fault {
            Some(fault) if !fault.done => (fault.status, json!({"kind": "Status"})),
            _ => kube.object(&method, &path, &body, &format!("{kind} {query}")),
        };
        let status = fault.map_or(status, |fault| fault.status);
        if method == "PATCH" && status < 300 && !query.contains("dryRun=All") {
            kube.patched.lock().unwrap().push((path, body));
        }
        return (StatusCode::from_u16(status).unwrap(), axum::Json(answer)).into_response();
    }
    if path.ends_with("/eviction") || query.contains("fieldSelector=spec.nodeName=vm1") {
        let method = request.method().to_string();
        let body = axum::body::to_bytes(request.into_body(), 1 << 20).await.unwrap();
        let body = serde_json::from_slice(&body).unwrap_or_default();
        if let Some((status, answer)) = kube.node(&method, &path, &query, &body) {
            return (StatusCode::from_u16(status).unwrap(), axum::Json(answer)).into_response();
        }
        return StatusCode::NOT_FOUND.into_response();
    }
    let answer = {
        let planted = kube.planted.lock().unwrap();
        let found = planted.iter().find(|(at, part, _)| *at == path && query.contains(part));
        found.map(|(_, _, answer)| answer.clone())
    };
    match answer {
        Some(Value::String(text)) => return text.into_response(),
        Some(Value::Null) => return StatusCode::NOT_FOUND.into_response(),
        Some(answer) => return yes(answer),
        None => {}
    }
    match path.as_str() {
        "/api/v1" => yes(json!({"items": [], "path": path, "resources": [
            {"name": "configmaps", "kind": "ConfigMap", "namespaced": true},
            {"name": "secrets", "kind": "Secret", "namespaced": true},
            {"name": "namespaces", "kind": "Namespace", "namespaced": false}]})),
        "/apis/apps/v1" => yes(json!({"items": [], "path": path, "resources": [
            {"name": "deployments", "kind": "Deployment", "namespaced": true},
            {"name": "deployments/scale", "kind": "Scale", "namespaced": true}]})),
        "/apis/batch/v1" => yes(json!({"items": [], "path": path, "resources": [
            {"name": "jobs", "kind": "Job", "namespaced": true}]})),
        "/apis/none/v1" => StatusCode::NOT_FOUND.into_response(),
        "/version" => yes(json!({"gitVersion": "v1.36.2+k3s1"})),
        // the policies act
        "/api/v1/namespaces" if query == "dryRun=All" => {
            let why = "ValidatingAdmissionPolicy 'pipeops-agent-namespaces' with binding 'pipeops-agent-namespaces' denied request: no label";
            let status = json!({"kind": "Status", "reason": "Invalid", "message": why});
            (StatusCode::UNPROCESSABLE_ENTITY, axum::Json(status)).into_response()
        }
        _ if query.contains("watch=") => {
            let first = futures_util::stream::once(async {
                Ok::<_, std::io::Error>(Bytes::from_static(b""))
            });
            Response::new(Body::from_stream(futures_util::StreamExt::chain(
                first,
                futures_util::stream::pending(),
            )))
        }
        "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews" => {
            let body = axum::body::to_bytes(request.into_body(), 1 << 20).await.unwrap();
            let asked: Value = serde_json::from_slice(&body).unwrap();
            let a = &asked["spec"]["resourceAttributes"];
            let allowed = (a["verb"] == "impersonate" && a["name"] != "")
                || (a["subresource"] == "eviction"
                    && a["namespace"] != *kube.guarded.lock().unwrap())
                || (a["resource"] == "pods" && (a["verb"] == "list" || a["verb"] == "watch"));
            yes(json!({"status": {"allowed": allowed}}))
        }
        "/api/v1/nodes" => yes(json!({"metadata": {"resourceVersion": "7"}, "items": [{
            "metadata": {"name": "vm1", "uid": "n"},
            "status": {"conditions": [{"type": "Ready", "status": "True"}],
                "nodeInfo": {"kubeletVersion": "v1.36.2+k3s1"}}}]})),
        "/apis/helm.cattle.io/v1/helmcharts" => StatusCode::NOT_FOUND.into_response(),
        "/api/v1/namespaces/beta/pods/redirect" => {
            (StatusCode::FOUND, [("location", "https://evil.test/")]).into_response()
        }
        "/api/v1/namespaces/beta/pods/hidden/log" => {
            let status = json!({"kind": "Status", "reason": "Forbidden", "message": "not for you"});
            (StatusCode::FORBIDDEN, axum::Json(status)).into_response()
        }
        "/api/v1/namespaces/beta/pods/unauthorized" => StatusCode::UNAUTHORIZED.into_response(),
        // an answer as the query writes it
        "/api/v1/namespaces/beta/pods/answers" => {
            let mut answer = Response::builder();
            let mut body = json!({"made": true}).to_string();
            for (name, value) in url::form_urlencoded::parse(query.as_bytes()) {
                answer = match &*name {
                    "status" => answer.status(value.parse::<u16>().unwrap()),
                    "empty" => {
                        body = String::new();
                        answer
                    }
                    header => answer.header(header, &*value),
                };
            }
            answer.body(Body::from(body)).unwrap()
        }
        "/api/v1/namespaces/beta/pods/sleeps" => {
            tokio::time::sleep(Duration::from_secs(
                query.trim_start_matches("for=").parse().unwrap(),
            ))
            .await;
            yes(json!({}))
        }
        "/api/v1/namespaces/beta/pods/slow" => {
            tokio::time::sleep(Duration::from_secs(2)).await;
            yes(json!({"slow": true}))
        }
        "/api/v1/namespaces/beta/pods/bulk/log" => {
            // a connection that is closed with a body unread is reset, and takes what was sent with
            // it
            let _ = axum::body::to_bytes(request.into_body(), 1 << 20).await;
            let n: u64 = query.trim_start_matches("n=").parse().unwrap_or(0);
            let piece = Bytes::from(vec![b'x'; 64 * 1024]);
            let stream = futures_util::stream::iter(
                (0..n / (64 * 1024)).map(move |_| Ok::<_, std::io::Error>(piece.clone())),
            );
            Response::new(Body::from_stream(stream))
        }
        _ if path.ends_with("/upload") => {
            let mut bytes = 0_u64;
            let mut stream = request.into_body().into_data_stream();
            while let Some(Ok(piece)) = futures_util::StreamExt::next(&mut stream).await {
                bytes += piece.len() as u64;
            }
            yes(json!({"bytes": bytes}))
        }
        _ => yes(json!({"metadata": {"resourceVersion": "7"}, "items": [], "path": path})),
    }
}

/// A Kubernetes API that records.
pub(crate) async fn serve_kube() -> (Arc<Kube>, std::net::SocketAddr) {
    let state = Arc::new(Kube::default());
    let address = listen(Router::new().fallback(kube), state.clone()).await;
    (state, address)
}

/// The agent's way to it.
pub(crate) fn credential(sandbox: &Sandbox, kube: std::net::SocketAddr) {
    let kubeconfig = json!({"apiVersion": "v1", "kind": "Config", "current-context": "c",
        "clusters": [{"name": "l", "cluster": {"server": format!("http://{kube}")}}],
        "contexts": [{"name": "c", "context": {"cluster": "l", "user": "u"}}],
        "users": [{"name": "u", "user": {"token": "sa-planted-canary-4711-in-plain-text"}}]});
    sandbox.put("/run/pipeops-credential/kubeconfig", &kubeconfig.to_string());
}

/// All of it, with a real `pipeops run` in the middle.
pub(crate) struct World {
    pub(crate) control_plane: Arc<FakeControlPlane>,
    pub(crate) kube: Arc<Kube>,
    pub(crate) frps: Server,
    pub(crate) agent: Agent,
    pub(crate) id: String,
    pub(crate) stop_frps: CancellationToken,
}

impl World {
    pub(crate) async fn new() -> World {
        World::with("", |_| {}).await
    }

    /// With lines for `agent.toml`, and a hand on the control plane before the agent starts.
    pub(crate) async fn with(toml: &str, prepare: impl FnOnce(&FakeControlPlane)) -> World {
        let (tls, pin) = identity();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let frps_address = listener.local_addr().unwrap();
        let config = ServerConfig {
            token: Secret::new(crate::fake_control_plane::FRP_TOKEN),
            tls: Some(tls),
            tcp_mux: true,
            tcp_bind: None,
            heartbeat: Duration::from_secs(30),
            authorizer: None,
        };
        let (frps, stop_frps) = (Server::new(config), CancellationToken::new());
        tokio::spawn({
            let (frps, stop) = (frps.clone(), stop_frps.clone());
            async move { frps.serve(listener, stop).await }
        });
        let (kube_state, kube_address) = serve_kube().await;
        let control_plane_state = Arc::new(FakeControlPlane::new(frps_address, &pin));
        prepare(&control_plane_state);
        let control_plane_address = control_plane_state.clone().serve().await;
        let sandbox = Sandbox::new();
        sandbox.put("/etc/machine-id", "0123456789abcdef0123456789abcdef\n");
        sandbox.put(
            "/etc/pipeops/agent.toml",
            &format!(
                "control-plane-url = \"http://{control_plane_address}\"\ncluster-name = \"test\"\n{toml}"
            ),
        );
        credential(&sandbox, kube_address);
        let agent = Agent::start(sandbox, &[("AGENT_TOKEN", TOKEN), ("LOG_LEVEL", "debug")]);
        World {
            control_plane: control_plane_state,
            kube: kube_state,
            frps,
            agent,
            id: String::new(),
            stop_frps,
        }
    }

    /// Waits until a Runner can come through.
    pub(crate) async fn up(mut self) -> World {
        let frps = self.frps.clone();
        self.control_plane.until("the tunnel", |_| frps.proxies() == ["agent"]).await;
        let control_plane = self.control_plane.clone();
        self.control_plane
            .until("a heartbeat that says so", |_| {
                control_plane
                    .calls("/heartbeat")
                    .last()
                    .is_some_and(|c| c.2["tunnel"]["state"] == "up")
            })
            .await;
        self.id =
            self.control_plane.calls("/register")[0].2["agent"]["id"].as_str().unwrap().to_owned();
        for _ in 0..500 {
            if tokio::task::block_in_place(|| self.agent.get("/readyz")).starts_with("HTTP/1.1 200")
            {
                return self;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("never ready: {}", self.agent.get("/readyz"));
    }

    /// A TLS stream to the agent, its key pinned as the control plane knows it.
    pub(crate) async fn dial(&self, alpn: &[u8]) -> tokio_rustls::client::TlsStream<Io> {
        self.control_plane.tls(self.frps.dial("agent").await.unwrap(), alpn).await.unwrap()
    }

    /// Sends raw bytes on a stream of its own and reads what comes until the agent closes or falls
    /// silent.
    pub(crate) async fn raw(&self, request: &[u8]) -> String {
        let mut io = self.dial(b"http/1.1").await;
        io.write_all(request).await.unwrap();
        io.flush().await.unwrap();
        let mut answer = Vec::new();
        let mut buffer = vec![0; 16 * 1024];
        while let Ok(Ok(n @ 1..)) = tokio::time::timeout(
            Duration::from_millis(if answer.is_empty() { 5000 } else { 150 }),
            io.read(&mut buffer),
        )
        .await
        {
            answer.extend_from_slice(&buffer[..n]);
        }
        String::from_utf8_lossy(&answer).into_owned()
    }

    /// One plain request with a token.
    pub(crate) async fn ask(&self, method: &str, path: &str, token: &str) -> String {
        self.raw(format!("{method} {path} HTTP/1.1\r\nHost: agent\r\nAuthorization: Bearer {token}\r\nConnection: close\r\n\r\n").as_bytes()).await
    }

    /// One request of a Runner with a body; gives status and answer.
    pub(crate) async fn call(
        &self,
        method: &str,
        path: &str,
        token: &str,
        headers: &str,
        body: &str,
    ) -> (u16, Value) {
        let length = body.len();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: agent\r\nAuthorization: Bearer {token}\r\n{headers}Content-Length: {length}\r\nConnection: close\r\n\r\n{body}"
        );
        let answer = self.raw(head.as_bytes()).await;
        let status = answer.split(' ').nth(1).and_then(|s| s.parse().ok()).unwrap_or(0);
        (
            status,
            answer
                .split_once("\r\n\r\n")
                .and_then(|(_, body)| serde_json::from_str(body).ok())
                .unwrap_or_default(),
        )
    }

    pub(crate) fn token(&self, role: &str) -> String {
        self.control_plane.token(&self.id, role, None)
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.stop_frps.cancel();
    }
}
