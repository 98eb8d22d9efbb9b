//! A control plane in miniature: registers, hands out a tunnel, signs tokens, and misbehaves on
//! request.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::body::Bytes;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use pipeops::base::trust::{Pin, Trust};
use pipeops::frp::codec::Io;
use ring::signature::{ECDSA_P256_SHA256_ASN1, Ed25519KeyPair, KeyPair as _, UnparsedPublicKey};
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpSocket};

/// A port on which nobody listens. It stays bound for as long as the tests run, so that nothing
/// else is given it meanwhile; who asks for it by its number gets it all the same: a bound socket
/// that does not listen stands in nobody's way. It is held on all addresses: RabbitMQ listens on
/// them all, and another test's client may be at 127.0.0.3 with the same port.
pub(crate) fn free_port() -> u16 {
    static HELD: Mutex<Vec<TcpSocket>> = Mutex::new(Vec::new());
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_reuseaddr(true).unwrap();
    socket.bind(SocketAddr::from(([0, 0, 0, 0], 0))).unwrap();
    let port = socket.local_addr().unwrap().port();
    HELD.lock().unwrap().push(socket);
    port
}

pub(crate) const TOKEN: &str = "enrol-planted-canary-4711-in-plain-text";
pub(crate) const FRP_TOKEN: &str = "frp-planted-canary-4711-in-plain-text";

/// A self-made certificate as a server needs it, and its pin.
pub(crate) fn identity() -> (Arc<rustls::ServerConfig>, String) {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let made = rcgen::generate_simple_self_signed(vec!["frps.test".into()]).unwrap();
    let key = rustls_pki_types::PrivateKeyDer::try_from(made.signing_key.serialize_der()).unwrap();
    let pin = Pin::from_certificate(made.cert.der()).unwrap().to_string();
    let config = rustls::ServerConfig::builder()
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key)
        .unwrap();
    (Arc::new(config), pin)
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
pub(crate) struct FakeControlPlane {
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

async fn handle(State(control_plane): State<Arc<FakeControlPlane>>, request: Request) -> Response {
    let path = request.uri().path().to_owned();
    let headers: HeaderMap = request.headers().clone();
    let method = request.method().to_string();
    let body = axum::body::to_bytes(request.into_body(), 1 << 20).await.unwrap();
    let value: Value = serde_json::from_slice(&body).unwrap_or_default();
    let bearer = headers
        .get("authorization")
        .and_then(|v| v.to_str().ok())
        .unwrap_or_default()
        .trim_start_matches("Bearer ")
        .to_owned();
    control_plane.calls.lock().unwrap().push((
        format!("{method} {path}"),
        bearer.clone(),
        value.clone(),
    ));
    let mut answer = respond(&control_plane, &path, &headers, &body, &value, &bearer);
    let then = jiff::Timestamp::now().as_second() + *control_plane.clock.lock().unwrap();
    let date = jiff::fmt::rfc2822::to_string(
        &jiff::Timestamp::from_second(then).unwrap().to_zoned(jiff::tz::TimeZone::UTC),
    )
    .unwrap();
    answer.headers_mut().insert("date", date.parse().unwrap());
    answer
}

fn respond(
    control_plane: &FakeControlPlane,
    path: &str,
    headers: &HeaderMap,
    body: &Bytes,
    value: &Value,
    bearer: &str,
) -> Response {
    {
        let mut script = control_plane.script.lock().unwrap();
        if let Some(at) = script.iter().position(|s| path.contains(s.path) && s.times > 0) {
            script[at].times -= 1;
            let s = script[at].clone();
            let mut answer =
                (StatusCode::from_u16(s.status).unwrap(), axum::Json(s.body)).into_response();
            for (name, value) in s.headers {
                answer.headers_mut().insert(name, value.parse().unwrap());
            }
            return answer;
        }
    }
    let credential = format!(
        "credential-planted-canary-4711-in-plain-text-{}",
        control_plane.credential.lock().unwrap()
    );
    let refuse = |status: u16, code: &str| {
        (StatusCode::from_u16(status).unwrap(), axum::Json(json!({"code": code, "message": "no"})))
            .into_response()
    };
    let registering = path.ends_with("/register");
    if bearer != credential && !(registering && bearer == TOKEN) {
        return refuse(401, "credential_unknown");
    }
    let expires = |s: i64| {
        jiff::Timestamp::from_second(jiff::Timestamp::now().as_second() + s).unwrap().to_string()
    };
    if registering {
        let pem = value["agent"]["public_key"].as_str().unwrap();
        let der = STANDARD
            .decode(pem.lines().filter(|l| !l.starts_with('-')).collect::<String>())
            .unwrap();
        let signature = STANDARD.decode(headers["pipeops-signature"].to_str().unwrap()).unwrap();
        // the uncompressed point stands at the end of a P-256 SubjectPublicKeyInfo
        if UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, &der[der.len() - 65..])
            .verify(body, &signature)
            .is_err()
        {
            return refuse(400, "bad_signature");
        }
        *control_plane.public_key.lock().unwrap() = pem.to_owned();
        let config = control_plane.config.lock().unwrap().clone();
        return axum::Json(
            json!({"agent_id": value["agent"]["id"], "cluster_id": "c-1", "credential": credential,
                "credential_expires_at": expires(3600),
            "config": config}),
        )
        .into_response();
    }
    if path.ends_with("/config") {
        return axum::Json(control_plane.config.lock().unwrap().clone()).into_response();
    }
    if path.ends_with("/heartbeat") {
        let directives: Vec<&str> = std::mem::take(&mut control_plane.directives.lock().unwrap());
        return axum::Json(json!({"config_version": control_plane.config.lock().unwrap()["config_version"], "directives": directives})).into_response();
    }
    if path.ends_with("/credential") {
        *control_plane.credential.lock().unwrap() += 1;
        let credential = format!(
            "credential-planted-canary-4711-in-plain-text-{}",
            control_plane.credential.lock().unwrap()
        );
        return axum::Json(
            json!({"credential": credential, "credential_expires_at": expires(3600)}),
        )
        .into_response();
    }
    StatusCode::NO_CONTENT.into_response()
}

impl FakeControlPlane {
    /// One whose agents get a tunnel through the FRP server at `frps`.
    pub(crate) fn new(frps: SocketAddr, pin: &str) -> FakeControlPlane {
        let key = Ed25519KeyPair::from_pkcs8(
            Ed25519KeyPair::generate_pkcs8(&ring::rand::SystemRandom::new()).unwrap().as_ref(),
        )
        .unwrap();
        let jwk = json!({"kid": "k1", "kty": "OKP", "crv": "Ed25519",
            "x": URL_SAFE_NO_PAD.encode(key.public_key())});
        let config = json!({"config_version": 1, "heartbeat_interval_s": 1, "status_interval_s": 5,
            "tunnel": {"server": frps.ip().to_string(), "port": frps.port(), "tcp_mux": true,
                "pool_count": 2, "tls": {"pin": pin, "server_name": "frps.test"},
                "auth": {"token": FRP_TOKEN},
                "proxies": [{"name": "agent", "type": "stcp",
                "secret_key": "sk-planted-canary-4711-in-plain-text"}]},
            "runner_auth": {"issuer": "cp", "audience": "", "jwks": {"keys": [jwk]}}});
        FakeControlPlane {
            key: Mutex::new(Some(Arc::new(key))),
            config: Mutex::new(config),
            ..FakeControlPlane::default()
        }
    }

    pub(crate) async fn serve(self: Arc<FakeControlPlane>) -> SocketAddr {
        listen(Router::new().fallback(handle), self).await
    }

    /// TLS to the agent over a stream of the tunnel, the key pinned that was registered.
    pub(crate) async fn tls(
        &self,
        io: Io,
        alpn: &[u8],
    ) -> std::io::Result<tokio_rustls::client::TlsStream<Io>> {
        let pem = self.public_key.lock().unwrap().clone();
        let der = STANDARD
            .decode(pem.lines().filter(|l| !l.starts_with('-')).collect::<String>())
            .unwrap();
        let pin = format!(
            "sha256:{}",
            STANDARD.encode(ring::digest::digest(&ring::digest::SHA256, &der))
        );
        pinned(&pin, io, alpn).await
    }

    /// Calls whose path holds `part`.
    pub(crate) fn calls(&self, part: &str) -> Vec<(String, String, Value)> {
        self.calls
            .lock()
            .unwrap()
            .iter()
            .filter(|(path, _, _)| path.contains(part))
            .cloned()
            .collect()
    }

    pub(crate) async fn until(&self, what: &str, mut met: impl FnMut(&FakeControlPlane) -> bool) {
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
        self.minted(agent, "runner-1", role, namespaces, None)
    }

    /// The same for the namespaces of a tenant.
    pub(crate) fn token_of_tenant(&self, agent: &str, role: &str, tenant: &str) -> String {
        self.minted(agent, "runner-1", role, None, Some(tenant))
    }

    /// The same, of somebody else.
    pub(crate) fn token_of(&self, agent: &str, subject: &str, role: &str) -> String {
        self.minted(agent, subject, role, None, None)
    }

    fn minted(
        &self,
        agent: &str,
        subject: &str,
        role: &str,
        namespaces: Option<&[&str]>,
        tenant: Option<&str>,
    ) -> String {
        let now = jiff::Timestamp::now().as_second() + *self.clock.lock().unwrap();
        let mut claims = json!({"iss": "cp", "aud": agent, "exp": now + 200, "sub": subject,
            "role": role, "jti": "t1"});
        if let Some(namespaces) = namespaces {
            claims["namespaces"] = json!(namespaces);
        }
        let mut head = json!({"alg": "EdDSA", "kid": "k1"});
        if let Some(tenant) = tenant {
            claims["tenant"] = json!(tenant);
            (head["crit"], head["tenant"]) = (json!(["tenant"]), json!(tenant));
        }
        self.sign(&head, &claims)
    }

    /// A deployer's token for one operation alone.
    pub(crate) fn token_for_operation(&self, agent: &str, operation: &str) -> String {
        let now = jiff::Timestamp::now().as_second() + *self.clock.lock().unwrap();
        let claims = json!({"iss": "cp", "aud": agent, "exp": now + 200, "sub": "runner-1",
            "role": "deployer", "jti": "t1", "operation": operation});
        let head = json!({"alg": "EdDSA", "kid": "k1", "crit": ["operation"],
            "operation": operation});
        self.sign(&head, &claims)
    }

    fn sign(&self, head: &Value, claims: &Value) -> String {
        let part = |v: &Value| URL_SAFE_NO_PAD.encode(v.to_string());
        let signed = format!("{}.{}", part(head), part(claims));
        let key = self.key.lock().unwrap().clone().unwrap();
        format!("{signed}.{}", URL_SAFE_NO_PAD.encode(key.sign(signed.as_bytes())))
    }
}

/// TLS to an agent over a stream of a tunnel.
pub(crate) async fn pinned(
    pin: &str,
    io: Io,
    alpn: &[u8],
) -> std::io::Result<tokio_rustls::client::TlsStream<Io>> {
    let mut client =
        Trust { pins: vec![Pin::parse(pin).unwrap()], ..Trust::default() }.client_config().unwrap();
    client.alpn_protocols = vec![alpn.to_vec()];
    let name = rustls_pki_types::ServerName::try_from("agent.test").unwrap();
    tokio_rustls::TlsConnector::from(Arc::new(client)).connect(name, io).await
}

pub(crate) async fn listen<S: Clone + Send + Sync + 'static>(
    router: Router<S>,
    state: S,
) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let router = router.with_state(state);
    tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
    address
}
