//! Everything around the agent, in this process: a control plane, an FRP server, a Kubernetes API that records.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use hyper_util::rt::TokioIo;
use pipeops::secret::Secret;
use pipeops::trust::{Pin, Trust};
use pipeops::tunnel::layer::Io;
use pipeops::tunnel::server::{Server, ServerConfig};
use ring::signature::{ECDSA_P256_SHA256_ASN1, Ed25519KeyPair, KeyPair as _, UnparsedPublicKey};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::agent::Agent;
use crate::support::Sandbox;

pub(crate) const TOKEN: &str = "enrol-planted-4711";

/// A request that reached the fake Kubernetes API.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    pub(crate) method: String,
    pub(crate) uri: String,
    pub(crate) headers: Vec<(String, String)>,
}

impl Seen {
    pub(crate) fn all(&self, name: &str) -> Vec<&str> {
        self.headers.iter().filter(|(n, _)| n == name).map(|(_, v)| v.as_str()).collect()
    }
}

#[derive(Default)]
pub(crate) struct Kube {
    pub(crate) seen: Mutex<Vec<Seen>>,
}

impl Kube {
    /// What came through the tunnel: the agent's own questions carry no impersonation.
    pub(crate) fn through(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().iter().filter(|s| !s.all("impersonate-user").is_empty()).cloned().collect()
    }
}

async fn kube(State(kube): State<Arc<Kube>>, mut request: Request) -> Response {
    let text = |v: &axum::http::HeaderValue| String::from_utf8_lossy(v.as_bytes()).into_owned();
    kube.seen.lock().unwrap().push(Seen {
        method: request.method().to_string(),
        uri: request.uri().to_string(),
        headers: request.headers().iter().map(|(n, v)| (n.to_string(), text(v))).collect(),
    });
    let (path, query) = (request.uri().path().to_owned(), request.uri().query().unwrap_or_default().to_owned());
    let yes = |body: Value| axum::Json(body).into_response();
    if let Some(protocol) = request.headers().get("upgrade").cloned() {
        if query.contains("deny") {
            return (StatusCode::FORBIDDEN, "no exec for you").into_response();
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
        return (StatusCode::SWITCHING_PROTOCOLS, [("connection", axum::http::HeaderValue::from_static("Upgrade")), ("upgrade", protocol)])
            .into_response();
    }
    match path.as_str() {
        "/version" => yes(json!({"gitVersion": "v1.36.2+k3s1"})),
        _ if query.contains("watch=") => {
            let first = futures_util::stream::once(async { Ok::<_, std::io::Error>(Bytes::from_static(b"")) });
            Response::new(Body::from_stream(futures_util::StreamExt::chain(first, futures_util::stream::pending())))
        }
        "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews" => {
            let body = axum::body::to_bytes(request.into_body(), 1 << 20).await.unwrap();
            let asked: Value = serde_json::from_slice(&body).unwrap();
            let a = &asked["spec"]["resourceAttributes"];
            let allowed =
                (a["verb"] == "impersonate" && a["name"] != "") || (a["resource"] == "pods" && (a["verb"] == "list" || a["verb"] == "watch"));
            yes(json!({"status": {"allowed": allowed}}))
        }
        "/api/v1/nodes" => yes(json!({"metadata": {"resourceVersion": "7"}, "items": [{"metadata": {"name": "vm1", "uid": "n"},
            "status": {"conditions": [{"type": "Ready", "status": "True"}], "nodeInfo": {"kubeletVersion": "v1.36.2+k3s1"}}}]})),
        "/apis/helm.cattle.io/v1/helmcharts" => StatusCode::NOT_FOUND.into_response(),
        "/api/v1/namespaces/beta/pods/redirect" => (StatusCode::FOUND, [("location", "https://evil.test/")]).into_response(),
        "/api/v1/namespaces/beta/pods/unauthorized" => StatusCode::UNAUTHORIZED.into_response(),
        "/api/v1/namespaces/beta/pods/slow" => {
            tokio::time::sleep(Duration::from_secs(2)).await;
            yes(json!({"slow": true}))
        }
        "/api/v1/namespaces/beta/pods/bulk/log" => {
            let n: u64 = query.trim_start_matches("n=").parse().unwrap_or(0);
            let piece = Bytes::from(vec![b'x'; 64 * 1024]);
            let stream = futures_util::stream::iter((0..n / (64 * 1024)).map(move |_| Ok::<_, std::io::Error>(piece.clone())));
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

/// What the control plane answers instead of what is right.
#[derive(Clone, Debug)]
pub(crate) struct Scripted {
    /// Part of the path that it is for.
    pub(crate) path: &'static str,
    pub(crate) status: u16,
    pub(crate) body: Value,
    pub(crate) headers: Vec<(&'static str, String)>,
    /// How often.
    pub(crate) times: usize,
}

#[derive(Default)]
pub(crate) struct Plane {
    pub(crate) calls: Mutex<Vec<(String, String, Value)>>,
    pub(crate) config: Mutex<Value>,
    pub(crate) directives: Mutex<Vec<&'static str>>,
    pub(crate) script: Mutex<Vec<Scripted>>,
    /// Seconds that its clock is ahead of this machine's.
    pub(crate) clock: Mutex<i64>,
    key: Mutex<Option<Arc<Ed25519KeyPair>>>,
    pub(crate) public_key: Mutex<String>,
    credential: Mutex<u32>,
}

async fn plane(State(plane): State<Arc<Plane>>, request: Request) -> Response {
    let path = request.uri().path().to_owned();
    let headers: HeaderMap = request.headers().clone();
    let method = request.method().to_string();
    let body = axum::body::to_bytes(request.into_body(), 1 << 20).await.unwrap();
    let value: Value = serde_json::from_slice(&body).unwrap_or_default();
    let bearer = headers.get("authorization").and_then(|v| v.to_str().ok()).unwrap_or_default().trim_start_matches("Bearer ").to_owned();
    plane.calls.lock().unwrap().push((format!("{method} {path}"), bearer.clone(), value.clone()));
    let mut answer = respond(&plane, &path, &headers, &body, &value, &bearer);
    let then = jiff::Timestamp::now().as_second() + *plane.clock.lock().unwrap();
    let date = jiff::fmt::rfc2822::to_string(&jiff::Timestamp::from_second(then).unwrap().to_zoned(jiff::tz::TimeZone::UTC)).unwrap();
    answer.headers_mut().insert("date", date.parse().unwrap());
    answer
}

fn respond(plane: &Plane, path: &str, headers: &HeaderMap, body: &Bytes, value: &Value, bearer: &str) -> Response {
    {
        let mut script = plane.script.lock().unwrap();
        if let Some(at) = script.iter().position(|s| path.contains(s.path) && s.times > 0) {
            script[at].times -= 1;
            let s = script[at].clone();
            let mut answer = (StatusCode::from_u16(s.status).unwrap(), axum::Json(s.body)).into_response();
            for (name, value) in s.headers {
                answer.headers_mut().insert(name, value.parse().unwrap());
            }
            return answer;
        }
    }
    let credential = format!("credential-planted-4711-{}", plane.credential.lock().unwrap());
    let refuse =
        |status: u16, code: &str| (StatusCode::from_u16(status).unwrap(), axum::Json(json!({"code": code, "message": "no"}))).into_response();
    let registering = path.ends_with("/register");
    if bearer != credential && !(registering && bearer == TOKEN) {
        return refuse(401, "credential_unknown");
    }
    let expires = |s: i64| jiff::Timestamp::from_second(jiff::Timestamp::now().as_second() + s).unwrap().to_string();
    if registering {
        let pem = value["agent"]["public_key"].as_str().unwrap();
        let der = STANDARD.decode(pem.lines().filter(|l| !l.starts_with('-')).collect::<String>()).unwrap();
        let signature = STANDARD.decode(headers["pipeops-signature"].to_str().unwrap()).unwrap();
        // the uncompressed point stands at the end of a P-256 SubjectPublicKeyInfo
        if UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, &der[der.len() - 65..]).verify(body, &signature).is_err() {
            return refuse(400, "bad_signature");
        }
        *plane.public_key.lock().unwrap() = pem.to_owned();
        let config = plane.config.lock().unwrap().clone();
        return axum::Json(
            json!({"agent_id": value["agent"]["id"], "cluster_id": "c-1", "credential": credential, "credential_expires_at": expires(3600),
            "config": config}),
        )
        .into_response();
    }
    if path.ends_with("/config") {
        return axum::Json(plane.config.lock().unwrap().clone()).into_response();
    }
    if path.ends_with("/heartbeat") {
        let directives: Vec<&str> = std::mem::take(&mut plane.directives.lock().unwrap());
        return axum::Json(json!({"config_version": plane.config.lock().unwrap()["config_version"], "directives": directives})).into_response();
    }
    if path.ends_with("/credential") {
        *plane.credential.lock().unwrap() += 1;
        let credential = format!("credential-planted-4711-{}", plane.credential.lock().unwrap());
        return axum::Json(json!({"credential": credential, "credential_expires_at": expires(3600)})).into_response();
    }
    StatusCode::NO_CONTENT.into_response()
}

impl Plane {
    /// Calls whose path holds `part`.
    pub(crate) fn calls(&self, part: &str) -> Vec<(String, String, Value)> {
        self.calls.lock().unwrap().iter().filter(|(path, _, _)| path.contains(part)).cloned().collect()
    }

    pub(crate) async fn until(&self, what: &str, mut met: impl FnMut(&Plane) -> bool) {
        for _ in 0..1500 {
            if met(self) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let calls: Vec<String> = self.calls.lock().unwrap().iter().map(|c| c.0.clone()).collect();
        panic!("never: {what}; calls: {calls:?}");
    }

    /// Revokes the credential that is in use.
    pub(crate) fn revoke(&self) {
        *self.credential.lock().unwrap() += 1;
    }

    /// A Runner's token.
    pub(crate) fn token(&self, agent: &str, role: &str, namespaces: Option<&[&str]>) -> String {
        let now = jiff::Timestamp::now().as_second() + *self.clock.lock().unwrap();
        let mut claims = json!({"iss": "cp", "aud": agent, "exp": now + 200, "sub": "runner-1", "role": role, "jti": "t1"});
        if let Some(namespaces) = namespaces {
            claims["namespaces"] = json!(namespaces);
        }
        let part = |v: &Value| URL_SAFE_NO_PAD.encode(v.to_string());
        let signed = format!("{}.{}", part(&json!({"alg": "EdDSA", "kid": "k1"})), part(&claims));
        let key = self.key.lock().unwrap().clone().unwrap();
        format!("{signed}.{}", URL_SAFE_NO_PAD.encode(key.sign(signed.as_bytes())))
    }
}

async fn listen<S: Clone + Send + Sync + 'static>(router: Router<S>, state: S) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let router = router.with_state(state);
    tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
    address
}

/// All of it, with a real `pipeops run` in the middle.
pub(crate) struct World {
    pub(crate) plane: Arc<Plane>,
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
    pub(crate) async fn with(toml: &str, prepare: impl FnOnce(&Plane)) -> World {
        let (tls, pin) = crate::tunnel::identity();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let frps_address = listener.local_addr().unwrap();
        let config = ServerConfig {
            token: Secret::new("frp-planted-4711"),
            tls: Some(tls),
            tcp_mux: true,
            tcp_bind: None,
            heartbeat: Duration::from_secs(30),
        };
        let (frps, stop_frps) = (Server::new(config), CancellationToken::new());
        tokio::spawn({
            let (frps, stop) = (frps.clone(), stop_frps.clone());
            async move { frps.serve(listener, stop).await }
        });
        let kube_state = Arc::new(Kube::default());
        let kube_address = listen(Router::new().fallback(kube), kube_state.clone()).await;
        let plane_state = Arc::new(Plane::default());
        let key = Ed25519KeyPair::from_pkcs8(Ed25519KeyPair::generate_pkcs8(&ring::rand::SystemRandom::new()).unwrap().as_ref()).unwrap();
        let jwk = json!({"kid": "k1", "kty": "OKP", "crv": "Ed25519", "x": URL_SAFE_NO_PAD.encode(key.public_key())});
        *plane_state.key.lock().unwrap() = Some(Arc::new(key));
        *plane_state.config.lock().unwrap() = json!({"config_version": 1, "heartbeat_interval_s": 1, "status_interval_s": 5,
            "tunnel": {"server": "127.0.0.1", "port": frps_address.port(), "tcp_mux": true, "pool_count": 2, "tls": {"pin": pin, "server_name": "frps.test"},
                "auth": {"token": "frp-planted-4711"}, "proxies": [{"name": "agent", "type": "stcp", "secret_key": "sk-planted-4711"}]},
            "runner_auth": {"issuer": "cp", "audience": "", "jwks": {"keys": [jwk]}}});
        prepare(&plane_state);
        let plane_address = listen(Router::new().fallback(plane), plane_state.clone()).await;
        let sandbox = Sandbox::new();
        sandbox.put("/etc/machine-id", "0123456789abcdef0123456789abcdef\n");
        sandbox.put("/etc/pipeops/agent.toml", &format!("control-plane-url = \"http://{plane_address}\"\ncluster-name = \"test\"\n{toml}"));
        let kubeconfig = json!({"apiVersion": "v1", "kind": "Config", "current-context": "c",
            "clusters": [{"name": "l", "cluster": {"server": format!("http://{kube_address}")}}],
            "contexts": [{"name": "c", "context": {"cluster": "l", "user": "u"}}], "users": [{"name": "u", "user": {"token": "sa-planted-4711"}}]});
        sandbox.put("/run/pipeops-credential/kubeconfig", &kubeconfig.to_string());
        let agent = Agent::start(sandbox, &[("AGENT_TOKEN", TOKEN), ("LOG_LEVEL", "debug")]);
        World { plane: plane_state, kube: kube_state, frps, agent, id: String::new(), stop_frps }
    }

    /// Waits until a Runner can come through.
    pub(crate) async fn up(mut self) -> World {
        let frps = self.frps.clone();
        self.plane.until("the tunnel", |_| frps.proxies() == ["agent"]).await;
        let plane = self.plane.clone();
        self.plane.until("a heartbeat that says so", |_| plane.calls("/heartbeat").last().is_some_and(|c| c.2["tunnel"]["state"] == "up")).await;
        self.id = self.plane.calls("/register")[0].2["agent"]["id"].as_str().unwrap().to_owned();
        for _ in 0..500 {
            if tokio::task::block_in_place(|| self.agent.get("/readyz")).starts_with("HTTP/1.1 200") {
                return self;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("never ready: {}", self.agent.get("/readyz"));
    }

    /// A TLS stream to the agent, its key pinned as the control plane knows it.
    pub(crate) async fn dial(&self, alpn: &[u8]) -> tokio_rustls::client::TlsStream<Io> {
        let pem = self.plane.public_key.lock().unwrap().clone();
        let der = STANDARD.decode(pem.lines().filter(|l| !l.starts_with('-')).collect::<String>()).unwrap();
        let pin = format!("sha256:{}", STANDARD.encode(ring::digest::digest(&ring::digest::SHA256, &der)));
        let mut client = Trust { pins: vec![Pin::parse(&pin).unwrap()], ..Trust::default() }.client().unwrap();
        client.alpn_protocols = vec![alpn.to_vec()];
        let io = self.frps.dial("agent").await.unwrap();
        let name = rustls_pki_types::ServerName::try_from("agent.test").unwrap();
        tokio_rustls::TlsConnector::from(Arc::new(client)).connect(name, io).await.unwrap()
    }

    /// Sends raw bytes on a stream of its own and reads what comes until the agent closes or falls silent.
    pub(crate) async fn raw(&self, request: &[u8]) -> String {
        let mut io = self.dial(b"http/1.1").await;
        io.write_all(request).await.unwrap();
        io.flush().await.unwrap();
        let mut answer = Vec::new();
        let mut buffer = vec![0; 16 * 1024];
        while let Ok(Ok(n @ 1..)) =
            tokio::time::timeout(Duration::from_millis(if answer.is_empty() { 5000 } else { 150 }), io.read(&mut buffer)).await
        {
            answer.extend_from_slice(&buffer[..n]);
        }
        String::from_utf8_lossy(&answer).into_owned()
    }

    /// One plain request with a token.
    pub(crate) async fn ask(&self, method: &str, path: &str, token: &str) -> String {
        self.raw(format!("{method} {path} HTTP/1.1\r\nHost: agent\r\nAuthorization: Bearer {token}\r\nConnection: close\r\n\r\n").as_bytes()).await
    }

    pub(crate) fn token(&self, role: &str) -> String {
        self.plane.token(&self.id, role, None)
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.stop_frps.cancel();
        let _ = self.agent.child.kill();
        let _ = self.agent.child.wait();
    }
}
