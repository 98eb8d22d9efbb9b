//! HTTP to agents: through their tunnels, over TLS with the agent's key pinned.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use http::{Request, Response, StatusCode, Uri, header};
use http_body_util::{BodyExt as _, Limited};
use hyper::body::{Bytes, Incoming};
use hyper_util::client::legacy::ResponseFuture;
use parking_lot::Mutex;
use serde_json::Value;
use tower::BoxError;

use super::error::HttpError;
use super::frps::Frps;
use super::keys::Keys;
use super::registry::enrol::spki;
use super::registry::{ClusterTarget, Registry};
use crate::base::connection::{self, Body, Client, Connector, Io};
use crate::base::secret::Secret;
use crate::base::trust::{self, Trust};

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

/// Connects to an agent through the FRP server: the host of the URI is the agent's id.
async fn connect(
    frps: Frps,
    registry: Arc<Registry>,
    keys: Arc<Keys>,
    uri: Uri,
) -> Result<Io, BoxError> {
    let agent = uri.host().unwrap_or_default().to_owned();
    let key = registry.public_key(&agent).ok_or("the agent is gone")?;
    let pin = pin(&key).ok_or("the agent's key cannot be read")?;
    let io = frps.dial(&agent, &keys.stcp_key(&agent, None)).await?;
    let mut tls = Trust { pins: vec![pin], ..Trust::default() }.client_config()?;
    tls.alpn_protocols = vec![b"http/1.1".to_vec()];
    let name = rustls_pki_types::ServerName::try_from("agent.pipeops.internal")?;
    let connecting = tokio_rustls::TlsConnector::from(Arc::new(tls)).connect(name, io);
    let stream = tokio::time::timeout(Duration::from_secs(10), connecting).await??;
    Ok(Box::new(stream))
}

/// Two HTTP clients: one keeps connections, the other gives each upgrade its own.
#[derive(Clone)]
pub(super) struct AgentClients {
    pub(super) pooled: Client,
    pub(super) single: Client,
    /// Agents that did not respond last time: kubectl tries five times, and waits each time.
    silent: Arc<Mutex<HashSet<String>>>,
}

impl AgentClients {
    pub(super) fn new(frps: Frps, registry: Arc<Registry>, keys: Arc<Keys>) -> AgentClients {
        let connector =
            Connector::new(move |uri| connect(frps.clone(), registry.clone(), keys.clone(), uri));
        let client = |idle| connection::client(connector.clone(), idle, Duration::from_secs(30));
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
    /// `agent_offline` when no whole answer comes: lost, unless the agent was not reached at all.
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
            let lost = || HttpError { lost: true, ..agent_offline() };
            let answer = self.pooled.request(request).await;
            let answer =
                answer.map_err(|e| if e.is_connect() { agent_offline() } else { lost() })?;
            let status = answer.status();
            let body = Limited::new(answer.into_body(), MAX_ANSWER).collect().await;
            let body = body.map_err(|_| lost())?.to_bytes();
            Ok((status, serde_json::from_slice::<Value>(&body).map_err(|_| lost())?))
        };
        let lost = || HttpError { lost: true, ..agent_offline() };
        tokio::time::timeout(TIMEOUT, whole).await.unwrap_or_else(|_| Err(lost()))
    }
}
