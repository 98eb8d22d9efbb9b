//! The HTTP way into a tunnel: takes a Runner's bearer, mints the agent's JWT, pins the agent's key, passes bytes both ways.

use std::collections::HashSet;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};

use axum::body::Body;
use futures_util::future::BoxFuture;
use http::{HeaderMap, Request, Response, StatusCode, Uri, header};
use http_body_util::{BodyExt as _, Limited};
use hyper::body::{Bytes, Frame, Incoming, SizeHint};
use hyper_util::client::legacy::connect::{Connected, Connection};
use hyper_util::client::legacy::{Client, ResponseFuture};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use serde::Serialize;
use serde_json::{Value, json};
use tokio_rustls::client::TlsStream;
use tower::{BoxError, Service};

use crate::base::secret::Secret;
use crate::base::trust::{self, Trust};
use crate::contract::token::{Role, TOKEN_LIFETIME};
use crate::control_plane::ControlPlane;
use crate::control_plane::frps::Frps;
use crate::control_plane::keys::Keys;
use crate::control_plane::model::rfc3339;
use crate::control_plane::registry::enrol::spki;
use crate::control_plane::registry::{ClusterView, HttpError, Principal, Registry, Route};
use crate::control_plane::scope::{TokenRequest, restrict};
use crate::frp::codec::Io;
use crate::kubernetes::header_policy;

/// A token for an agent, and where to go with it.
#[derive(Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(super) struct RunnerToken {
    /// A JWT.
    #[serde(serialize_with = "Secret::reveal")]
    #[cfg_attr(test, schemars(with = "String"))]
    token: Secret,
    /// RFC 3339.
    expires_at: String,
    endpoints: [Endpoint; 2],
}

/// A way to an agent. Behind each of them stands the key that `agent_pin` names.
#[derive(Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(tag = "type", rename_all = "lowercase")]
enum Endpoint {
    /// HTTPS, by way of the control plane.
    Gateway { address: String, server_name: String, agent_pin: String },
    /// As a visitor of the FRP server.
    Stcp {
        address: String,
        server_name: String,
        agent_pin: String,
        proxy: String,
        #[serde(serialize_with = "Secret::reveal")]
        #[cfg_attr(test, schemars(with = "String"))]
        secret_key: Secret,
        #[serde(skip_serializing_if = "Option::is_none")]
        server_pin: Option<String>,
        #[serde(skip_serializing_if = "Option::is_none")]
        server_ca: Option<String>,
    },
}

/// A look into a cluster takes at most this long, and this much.
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(10);
const LOOK: usize = 8 << 20;
/// An agent that has not begun an answer for this long is asked whether it lives, and gets as long again to say so.
const QUIET: std::time::Duration = std::time::Duration::from_secs(3);
/// The same for one that was silent a moment ago.
const SILENT: std::time::Duration = std::time::Duration::from_millis(700);
const LOOK_AGAIN: std::time::Duration = std::time::Duration::from_secs(10);

pub(super) fn agent_offline() -> HttpError {
    let hint = "pipeops control-plane cluster list says since when";
    HttpError::new(
        503,
        "agent_offline",
        "the cluster's agent is not reached at the moment",
        Some(hint),
    )
}

fn agent_silent() -> HttpError {
    let hint = "look at pipeops-agent on the node: systemctl status pipeops-agent";
    HttpError::new(
        504,
        "agent_silent",
        "the cluster's agent holds its tunnel and does not answer",
        Some(hint),
    )
}

/// A 401 of an agent is about the token that was minted here: the caller can do nothing about that.
async fn token_rejected(answer: Response<Incoming>) -> HttpError {
    let body =
        tokio::time::timeout(QUIET, Limited::new(answer.into_body(), 64 << 10).collect()).await;
    let body: Value = body
        .ok()
        .and_then(Result::ok)
        .and_then(|b| serde_json::from_slice(&b.to_bytes()).ok())
        .unwrap_or_default();
    // below /k8s the plain words stand among the causes
    let said = [&body["details"]["causes"][0]["message"], &body["message"]]
        .into_iter()
        .find_map(Value::as_str)
        .unwrap_or("no reason given");
    let said: String = crate::base::text::printable(said).chars().take(200).collect();
    let hint = "compare the clocks of the node and of the control plane; the agent fetches fresh keys within seconds";
    HttpError::new(
        502,
        "agent_mistrusts",
        format!("the cluster's agent refuses the control plane's token: {said}"),
        Some(hint),
    )
}

/// Name of an agent's proxy.
pub(super) fn proxy_name(agent: &str) -> String {
    format!("agent-{agent}")
}

/// The pin of a public key in PEM.
fn pin(public_key: &str) -> Option<trust::Pin> {
    Some(trust::Pin::of_key(&spki(public_key)?))
}

/// Dials agents through the FRP server; the host of the URI is the agent's id.
#[derive(Clone)]
pub(super) struct AgentConnector {
    frps: Frps,
    registry: Arc<Registry>,
    keys: Arc<Keys>,
}

/// A connection to an agent, as the pool wants it.
pub(super) struct AgentConnection(TokioIo<TlsStream<Io>>);

impl Connection for AgentConnection {
    fn connected(&self) -> Connected {
        Connected::new()
    }
}

impl hyper::rt::Read for AgentConnection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: hyper::rt::ReadBufCursor<'_>,
    ) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl hyper::rt::Write for AgentConnection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

impl Service<Uri> for AgentConnector {
    type Response = AgentConnection;
    type Error = std::io::Error;
    type Future = BoxFuture<'static, Result<AgentConnection, std::io::Error>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), std::io::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let AgentConnector { frps, registry, keys } = self.clone();
        Box::pin(async move {
            let other = |e: String| std::io::Error::other(e);
            let agent = uri.host().unwrap_or_default().to_owned();
            let key =
                registry.public_key(&agent).ok_or_else(|| other("the agent is gone".into()))?;
            let pin = pin(&key).ok_or_else(|| other("the agent's key cannot be read".into()))?;
            let io = frps.dial(&agent, &keys.stcp_key(&agent, None)).await?;
            let mut tls = Trust { pins: vec![pin], ..Trust::default() }.client().map_err(other)?;
            tls.alpn_protocols = vec![b"http/1.1".to_vec()];
            let name = rustls_pki_types::ServerName::try_from("agent.pipeops.internal")
                .map_err(|e| other(e.to_string()))?;
            let connecting = tokio_rustls::TlsConnector::from(Arc::new(tls)).connect(name, io);
            let stream =
                tokio::time::timeout(std::time::Duration::from_secs(10), connecting).await??;
            Ok(AgentConnection(TokioIo::new(stream)))
        })
    }
}

/// The two clients of the gateway: one keeps connections, the other gives each upgrade its own.
#[derive(Clone)]
pub(super) struct Gateway {
    pooled: Client<AgentConnector, Body>,
    single: Client<AgentConnector, Body>,
    /// Agents that were silent when they were last asked: kubectl asks five times, and waits for all of them.
    silent: Arc<Mutex<HashSet<String>>>,
}

impl Gateway {
    pub(super) fn new(frps: Frps, registry: Arc<Registry>, keys: Arc<Keys>) -> Gateway {
        let dial = AgentConnector { frps, registry, keys };
        let client = |idle: usize| {
            Client::builder(TokioExecutor::new())
                .pool_timer(TokioTimer::new())
                .pool_idle_timeout(std::time::Duration::from_secs(30))
                .pool_max_idle_per_host(idle)
                .retry_canceled_requests(false)
                .build(dial.clone())
        };
        Gateway { pooled: client(8), single: client(0), silent: Arc::default() }
    }
}

/// A body that ends when somebody's right to it ends.
struct RevocableBody {
    inner: Incoming,
    revocation: [Pin<Box<tokio_util::sync::WaitForCancellationFutureOwned>>; 2],
}

impl hyper::body::Body for RevocableBody {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        if self.revocation.iter_mut().any(|revocation| revocation.as_mut().poll(cx).is_ready()) {
            return Poll::Ready(Some(Err("the right to this stream was revoked".into())));
        }
        let frame = Pin::new(&mut self.inner).poll_frame(cx);
        if let Poll::Ready(Some(Err(error))) = &frame {
            tracing::debug!(error = format!("{error:?}"), "an agent's answer broke off");
        }
        frame.map(|frame| frame.map(|f| f.map_err(Into::into)))
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        // axum makes a length of it: what has no body at all, as an answer to HEAD or a 304, has none but what the agent says
        if self.inner.is_end_stream() { SizeHint::default() } else { self.inner.size_hint() }
    }
}

/// Headers that speak to this server alone.
const STRIPPED_HEADERS: &[&str] = &[
    "authorization",
    "cookie",
    "forwarded",
    "host",
    "x-forwarded-for",
    "x-forwarded-host",
    "x-forwarded-proto",
    "x-real-ip",
];

/// The headers of a request that go to an agent.
fn forwarded_headers(headers: &HeaderMap) -> HeaderMap {
    let own = header_policy::hop_by_hop(headers);
    let stays = |name: &str| !own(name) && !STRIPPED_HEADERS.contains(&name);
    headers
        .iter()
        .filter(|(name, _)| stays(name.as_str()))
        .map(|(n, v)| (n.clone(), v.clone()))
        .collect()
}

impl ControlPlane {
    /// One request into a cluster.
    pub(super) async fn forward(
        &self,
        mut request: Request<Body>,
        id: &str,
        principal: &Principal,
        now: i64,
    ) -> Result<Response<Body>, HttpError> {
        let route = self.registry().route(id, principal.project())?;
        let (role, namespaces) = restrict(principal, &TokenRequest::default())?;
        let token = self.jwt(principal, &route, role, namespaces, TOKEN_LIFETIME, now).0;
        // the rest of the path as it came: what is odd in it is the agent's to refuse
        let target = request.uri().path_and_query().map_or("/", http::uri::PathAndQuery::as_str);
        let mut segments = target.splitn(4, '/').skip(1);
        let here = format!(
            "/{}/{}",
            segments.next().unwrap_or_default(),
            segments.next().unwrap_or_default()
        );
        let rest = segments.next().unwrap_or_default();
        let uri: Uri = format!("http://{}/{rest}", route.agent)
            .parse()
            .map_err(|_| HttpError::new(400, "bad_path", "the path cannot be read", None))?;
        let upgrade = request.headers().get(header::UPGRADE).cloned();
        let mut headers = forwarded_headers(request.headers());
        headers.insert(header::HOST, header::HeaderValue::from_static("agent"));
        let bearer = header::HeaderValue::try_from(format!("Bearer {}", token.expose()));
        headers.insert(
            header::AUTHORIZATION,
            bearer
                .map_err(|_| HttpError::new(500, "internal", "the token cannot be sent", None))?,
        );
        if let Some(protocol) = &upgrade {
            headers.insert(header::CONNECTION, header::HeaderValue::from_static("Upgrade"));
            headers.insert(header::UPGRADE, protocol.clone());
        }
        let theirs = hyper::upgrade::on(&mut request);
        let method = request.method().clone();
        let revocation = [route.revocation.clone(), self.registry().revocation_of(principal)];
        let body = if upgrade.is_some() { Body::empty() } else { request.into_body() };
        let mut outward = Request::new(body);
        (*outward.method_mut(), *outward.uri_mut(), *outward.headers_mut()) =
            (method, uri, headers);
        let client =
            if upgrade.is_some() { &self.gateway().single } else { &self.gateway().pooled };
        let mut answer = self.await_answer(client.request(outward), &route).await?;
        let status = answer.status();
        if status == StatusCode::UNAUTHORIZED {
            return Err(token_rejected(answer).await);
        }
        let mut headers = header_policy::response_headers(status, answer.headers(), &here)
            .ok_or_else(|| {
                HttpError::new(
                    502,
                    "redirect_refused",
                    "the agent answers with a redirect to somewhere else",
                    None,
                )
            })?;
        if status == StatusCode::SWITCHING_PROTOCOLS {
            if upgrade.is_none() {
                return Err(HttpError::new(
                    502,
                    "bad_upgrade",
                    "the agent switches protocols unasked",
                    None,
                ));
            }
            for name in [header::CONNECTION, header::UPGRADE] {
                if let Some(value) = answer.headers().get(&name) {
                    headers.insert(name, value.clone());
                }
            }
            let ours = hyper::upgrade::on(&mut answer);
            tokio::spawn(async move {
                let (Ok(theirs), Ok(ours)) = (theirs.await, ours.await) else { return };
                let (mut theirs, mut ours) = (TokioIo::new(theirs), TokioIo::new(ours));
                tokio::select! {
                    _ = tokio::io::copy_bidirectional(&mut theirs, &mut ours) => {}
                    () = revocation[0].cancelled() => {}
                    () = revocation[1].cancelled() => {}
                }
            });
            let mut response = Response::new(Body::empty());
            (*response.status_mut(), *response.headers_mut()) = (status, headers);
            return Ok(response);
        }
        let revocation = revocation.map(|token| Box::pin(token.cancelled_owned()));
        let mut response =
            Response::new(Body::new(RevocableBody { inner: answer.into_body(), revocation }));
        (*response.status_mut(), *response.headers_mut()) = (status, headers);
        Ok(response)
    }

    /// The head of an agent's answer. What it is asked may take its time; the agent itself may not.
    ///
    /// # Errors
    /// `agent_offline` when it is not reached, `agent_silent` when its tunnel is there and it says nothing at all.
    async fn await_answer(
        &self,
        response: ResponseFuture,
        route: &Route,
    ) -> Result<Response<Incoming>, HttpError> {
        let known = &self.gateway().silent;
        let quiet =
            if crate::control_plane::lock(known).contains(&route.agent) { SILENT } else { QUIET };
        let silence = async {
            tokio::time::sleep(quiet).await;
            while self.is_alive(&route.agent, quiet).await {
                crate::control_plane::lock(known).remove(&route.agent);
                tokio::time::sleep(LOOK_AGAIN).await;
            }
        };
        tokio::select! {
            answer = response => {
                if quiet == SILENT {
                    crate::control_plane::lock(known).remove(&route.agent);
                }
                answer.map_err(|error| {
                    tracing::debug!(error = format!("{error:?}"), cluster = route.cluster, "the agent is not reached");
                    agent_offline()
                })
            }
            () = silence => {
                crate::control_plane::lock(known).insert(route.agent.clone());
                tracing::info!(cluster = route.cluster, "the agent holds its tunnel and says nothing");
                Err(agent_silent())
            }
        }
    }

    /// Whether an agent answers the one question that it answers by itself, on a stream of its own.
    async fn is_alive(&self, agent: &str, within: std::time::Duration) -> bool {
        let request =
            Request::builder().uri(format!("http://{agent}/healthz")).header(header::HOST, "agent");
        let Ok(request) = request.body(Body::empty()) else { return false };
        tokio::time::timeout(within, self.gateway().single.request(request))
            .await
            .is_ok_and(|answer| answer.is_ok())
    }

    /// A GET of the agent's API for the page, read whole: as a viewer, or in the caller's own role.
    pub(super) async fn get_from_agent(
        &self,
        principal: &Principal,
        id: &str,
        path: &str,
        own_role: bool,
        now: i64,
    ) -> Result<Value, HttpError> {
        let route = self.registry().route(id, principal.project())?;
        let (most, namespaces) = restrict(principal, &TokenRequest::default())?;
        let role = if own_role { most } else { Role::Viewer };
        let token = self.jwt(principal, &route, role, namespaces, TOKEN_LIFETIME, now).0;
        let (status, value) =
            self.call_agent(Request::builder(), path, &route, &token, Bytes::new()).await?;
        if status.is_success() {
            return Ok(value);
        }
        let said = value["message"].as_str().unwrap_or("the cluster refuses it").to_owned();
        Err(HttpError::new(
            if status.as_u16() == 403 { 403 } else { 502 },
            "cluster_refused",
            said,
            None,
        ))
    }

    /// A call of an agent's own API, answered whole. The path has no slash in front.
    ///
    /// # Errors
    /// `agent_offline` when no whole answer comes.
    pub(super) async fn call_agent(
        &self,
        request: http::request::Builder,
        path: &str,
        route: &Route,
        token: &Secret,
        body: Bytes,
    ) -> Result<(StatusCode, Value), HttpError> {
        let request = request
            .uri(format!("http://{}/{path}", route.agent))
            .header(header::HOST, "agent")
            .header(header::AUTHORIZATION, format!("Bearer {}", token.expose()))
            .body(Body::from(body));
        let request = request
            .map_err(|_| HttpError::new(500, "internal", "the request cannot be made", None))?;
        let whole = async {
            let answer = self.gateway().pooled.request(request).await.ok()?;
            let status = answer.status();
            let body = Limited::new(answer.into_body(), LOOK).collect().await.ok()?.to_bytes();
            Some((status, serde_json::from_slice::<Value>(&body).ok()?))
        };
        tokio::time::timeout(PATIENCE, whole).await.ok().flatten().ok_or_else(agent_offline)
    }

    /// A token for one agent, in no higher role than it was given, and when it ends.
    pub(super) fn jwt(
        &self,
        principal: &Principal,
        route: &Route,
        role: Role,
        namespaces: Option<Vec<String>>,
        ttl: i64,
        now: i64,
    ) -> (Secret, i64) {
        let subject = principal.subject();
        let expires = now + ttl;
        let id = crate::frp::wire::fresh_run_id();
        let mut claims = json!({"iss": self.issuer(), "aud": route.agent, "sub": subject, "role": role.min(route.most).name(), "iat": now, "exp": expires, "jti": id});
        if let Some(namespaces) = namespaces {
            claims["namespaces"] = json!(namespaces);
        }
        (self.keys().sign(&claims), expires)
    }

    /// The answer to a Runner who wants a token: with it, and with where to go.
    pub(super) fn runner_token(
        &self,
        principal: &Principal,
        route: &Route,
        role: Role,
        namespaces: Option<Vec<String>>,
        ttl: i64,
        now: i64,
    ) -> RunnerToken {
        let (token, expires) = self.jwt(principal, route, role, namespaces, ttl, now);
        let agent_pin = pin(&route.public_key).map(|p| p.to_string()).unwrap_or_default();
        let place = self.tunnel_endpoint();
        let runner =
            if let Principal::Access(access) = principal { Some(access.id.as_str()) } else { None };
        let (proxy, secret_key) = self.visitor_credentials(&route.agent, runner);
        let gateway = Endpoint::Gateway {
            address: format!("{}/clusters/{}", self.url(), route.cluster),
            server_name: self.inner.names[0].clone(),
            agent_pin: agent_pin.clone(),
        };
        let tunnel = Endpoint::Stcp {
            address: format!("{}:{}", place.server, place.port),
            server_name: place.server,
            agent_pin,
            proxy,
            secret_key,
            server_pin: place.tls.pin,
            server_ca: place.tls.ca_pem,
        };
        RunnerToken { token, expires_at: rfc3339(expires), endpoints: [gateway, tunnel] }
    }

    /// A file with which plain kubectl works.
    pub(super) fn kubeconfig(&self, cluster: &ClusterView, token: &Secret) -> String {
        use base64::Engine as _;
        let name = &cluster.id;
        let mut server = json!({"server": format!("{}/clusters/{name}/k8s", self.url())});
        if let Some(ca) = self.shown_ca() {
            server["certificate-authority-data"] =
                base64::engine::general_purpose::STANDARD.encode(ca).into();
        }
        // JSON is YAML, and needs no quoting of our own
        let file = json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": name, "cluster": server}],
            "users": [{"name": name, "user": {"token": token.expose()}}],
            "contexts": [{"name": name, "context": {"cluster": name, "user": name}}],
            "current-context": name,
        });
        serde_json::to_string_pretty(&file).unwrap_or_default() + "\n"
    }
}
