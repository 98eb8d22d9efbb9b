//! HTTP to agents: through their tunnels, over TLS with the agent's key pinned.

use std::collections::HashSet;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Body;
use futures_util::future::BoxFuture;
use http::{Request, Response, StatusCode, Uri, header};
use http_body_util::{BodyExt as _, Limited};
use hyper::body::{Bytes, Incoming};
use hyper_util::client::legacy::connect::{Connected, Connection};
use hyper_util::client::legacy::{Client, ResponseFuture};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use parking_lot::Mutex;
use serde_json::Value;
use tokio_rustls::client::TlsStream;
use tower::Service;

use super::error::HttpError;
use super::frps::Frps;
use super::keys::Keys;
use super::registry::enrol::spki;
use super::registry::{ClusterTarget, Registry};
use crate::base::secret::Secret;
use crate::base::trust::{self, Trust};
use crate::frp::codec::Io;

/// A call of an agent's own API takes at most this long, and its answer is at most this large.
const TIMEOUT: Duration = Duration::from_secs(10);
const MAX_ANSWER: usize = 8 << 20;
/// An agent that has not begun an answer for this long gets a health check, and as long again for
/// it.
pub(super) const ANSWER_TIMEOUT: Duration = Duration::from_secs(3);
/// The same for one that did not respond a moment ago.
const ANSWER_TIMEOUT_AFTER_SILENCE: Duration = Duration::from_millis(700);
/// Time between health checks while an answer is awaited.
const CHECK_AGAIN: Duration = Duration::from_secs(10);

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

/// The pin of a public key in PEM.
pub(super) fn pin(public_key: &str) -> Option<trust::Pin> {
    Some(trust::Pin::from_spki(&spki(public_key)?))
}

/// Connects to agents through the FRP server; the host of the URI is the agent's id.
#[derive(Clone)]
pub(super) struct AgentConnector {
    frps: Frps,
    registry: Arc<Registry>,
    keys: Arc<Keys>,
}

/// A connection to an agent, as the pool of hyper needs it.
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
            let mut tls =
                Trust { pins: vec![pin], ..Trust::default() }.client_config().map_err(other)?;
            tls.alpn_protocols = vec![b"http/1.1".to_vec()];
            let name = rustls_pki_types::ServerName::try_from("agent.pipeops.internal")
                .map_err(|e| other(e.to_string()))?;
            let connecting = tokio_rustls::TlsConnector::from(Arc::new(tls)).connect(name, io);
            let stream = tokio::time::timeout(Duration::from_secs(10), connecting).await??;
            Ok(AgentConnection(TokioIo::new(stream)))
        })
    }
}

/// Two HTTP clients: one keeps connections, the other gives each upgrade its own.
#[derive(Clone)]
pub(super) struct AgentClients {
    pub(super) pooled: Client<AgentConnector, Body>,
    pub(super) single: Client<AgentConnector, Body>,
    /// Agents that did not respond last time: kubectl tries five times, and waits each time.
    silent: Arc<Mutex<HashSet<String>>>,
}

impl AgentClients {
    pub(super) fn new(frps: Frps, registry: Arc<Registry>, keys: Arc<Keys>) -> AgentClients {
        let connector = AgentConnector { frps, registry, keys };
        let client = |idle: usize| {
            Client::builder(TokioExecutor::new())
                .pool_timer(TokioTimer::new())
                .pool_idle_timeout(Duration::from_secs(30))
                .pool_max_idle_per_host(idle)
                .retry_canceled_requests(false)
                .build(connector.clone())
        };
        AgentClients { pooled: client(8), single: client(0), silent: Arc::default() }
    }

    /// The head of an agent's answer. The answer may take long, but the agent itself must respond.
    ///
    /// # Errors
    /// `agent_offline` when it is not reached, `agent_silent` when it holds its tunnel and does not
    /// respond.
    pub(super) async fn await_answer(
        &self,
        response: ResponseFuture,
        target: &ClusterTarget,
    ) -> Result<Response<Incoming>, HttpError> {
        let known = &self.silent;
        let quiet = if known.lock().contains(&target.agent) {
            ANSWER_TIMEOUT_AFTER_SILENCE
        } else {
            ANSWER_TIMEOUT
        };
        let silence = async {
            tokio::time::sleep(quiet).await;
            while self.is_alive(&target.agent, quiet).await {
                known.lock().remove(&target.agent);
                tokio::time::sleep(CHECK_AGAIN).await;
            }
        };
        tokio::select! {
            answer = response => {
                if quiet == ANSWER_TIMEOUT_AFTER_SILENCE {
                    known.lock().remove(&target.agent);
                }
                answer.map_err(|error| {
                    let error = format!("{error:?}");
                    tracing::debug!(error, cluster = target.cluster, "the agent is not reached");
                    agent_offline()
                })
            }
            () = silence => {
                known.lock().insert(target.agent.clone());
                let message = "the agent holds its tunnel and does not respond";
                tracing::info!(cluster = target.cluster, "{message}");
                Err(agent_silent())
            }
        }
    }

    /// Whether an agent answers a health check, on a stream of its own.
    async fn is_alive(&self, agent: &str, within: Duration) -> bool {
        let request =
            Request::builder().uri(format!("http://{agent}/healthz")).header(header::HOST, "agent");
        let Ok(request) = request.body(Body::empty()) else { return false };
        tokio::time::timeout(within, self.single.request(request))
            .await
            .is_ok_and(|answer| answer.is_ok())
    }

    /// A call of an agent's own API, with the whole answer. The path has no leading slash.
    ///
    /// # Errors
    /// `agent_offline` when no whole answer comes.
    pub(super) async fn call(
        &self,
        request: http::request::Builder,
        path: &str,
        target: &ClusterTarget,
        token: &Secret,
        body: Bytes,
    ) -> Result<(StatusCode, Value), HttpError> {
        let request = request
            .uri(format!("http://{}/{path}", target.agent))
            .header(header::HOST, "agent")
            .header(header::AUTHORIZATION, format!("Bearer {}", token.expose()))
            .body(Body::from(body));
        let request = request
            .map_err(|_| HttpError::new(500, "internal", "the request cannot be made", None))?;
        let whole = async {
            let answer = self.pooled.request(request).await.ok()?;
            let status = answer.status();
            let body =
                Limited::new(answer.into_body(), MAX_ANSWER).collect().await.ok()?.to_bytes();
            Some((status, serde_json::from_slice::<Value>(&body).ok()?))
        };
        tokio::time::timeout(TIMEOUT, whole).await.ok().flatten().ok_or_else(agent_offline)
    }
}
