//! The HTTP gateway into a tunnel: passes a request on with a token for the agent, and its answer
//! back.

use std::pin::Pin;
use std::task::{Context, Poll};

use axum::body::Body;
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, Uri, header};
use http_body_util::{BodyExt as _, Limited};
use hyper::body::{Bytes, Frame, Incoming, SizeHint};
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tower::BoxError;

use super::agent_client::QUIET;
use super::caller_token::CallerTokenRequest;
use super::error::HttpError;
use super::registry::Principal;
use super::state::ControlPlane;
use crate::base::secret::Secret;
use crate::contract::token::Role;
use crate::kubernetes::header_policy;

/// A 401 of an agent is about the token that was minted here: the caller cannot fix that.
async fn token_rejected(answer: Response<Incoming>) -> HttpError {
    let body =
        tokio::time::timeout(QUIET, Limited::new(answer.into_body(), 64 << 10).collect()).await;
    let body: Value = body
        .ok()
        .and_then(Result::ok)
        .and_then(|b| serde_json::from_slice(&b.to_bytes()).ok())
        .unwrap_or_default();
    // below /k8s the plain message is among the causes
    let said = [&body["details"]["causes"][0]["message"], &body["message"]]
        .into_iter()
        .find_map(Value::as_str)
        .unwrap_or("no reason given");
    let said: String = crate::base::text::printable(said).chars().take(200).collect();
    let hint = "compare the clocks of the node and of the control plane; \
                the agent fetches fresh keys within seconds";
    HttpError::new(
        502,
        "agent_mistrusts",
        format!("the cluster's agent refuses the control plane's token: {said}"),
        Some(hint),
    )
}

/// A body that ends when the right to it is revoked.
struct RevocableBody {
    inner: Incoming,
    revocation: [Pin<Box<WaitForCancellationFutureOwned>>; 2],
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
            tracing::debug!(error = format!("{error:?}"), "an agent's answer ended early");
        }
        frame.map(|frame| frame.map(|f| f.map_err(Into::into)))
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        // axum makes Content-Length of it: an answer without a body (HEAD, 304) keeps the agent's
        if self.inner.is_end_stream() { SizeHint::default() } else { self.inner.size_hint() }
    }
}

/// Headers that are meant for this server only.
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

/// The headers of a request as the agent gets them.
fn outward_headers(
    headers: &HeaderMap,
    token: &Secret,
    upgrade: Option<&HeaderValue>,
) -> Result<HeaderMap, HttpError> {
    let mut headers = forwarded_headers(headers);
    headers.insert(header::HOST, HeaderValue::from_static("agent"));
    let bearer = HeaderValue::try_from(format!("Bearer {}", token.expose()));
    headers.insert(
        header::AUTHORIZATION,
        bearer.map_err(|_| HttpError::new(500, "internal", "the token cannot be sent", None))?,
    );
    if let Some(protocol) = upgrade {
        headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
        headers.insert(header::UPGRADE, protocol.clone());
    }
    Ok(headers)
}

/// The prefix of a path that names the cluster, and the URI of the rest at its agent. The rest
/// stays as it came: the agent judges it.
fn agent_uri(uri: &Uri, agent: &str) -> Result<(String, Uri), HttpError> {
    let path = uri.path_and_query().map_or("/", PathAndQuery::as_str);
    let mut segments = path.splitn(4, '/').skip(1);
    let mut next = || segments.next().unwrap_or_default();
    let prefix = format!("/{}/{}", next(), next());
    let uri = format!("http://{agent}/{}", next());
    let uri = uri
        .parse()
        .map_err(|_| HttpError::new(400, "bad_path", "the path cannot be read", None))?;
    Ok((prefix, uri))
}

/// Copies bytes between the two ends of an upgraded connection, until one is closed or the right to
/// it is revoked.
async fn relay(client: OnUpgrade, agent: OnUpgrade, revocation: [CancellationToken; 2]) {
    let (Ok(client), Ok(agent)) = (client.await, agent.await) else { return };
    let (mut client, mut agent) = (TokioIo::new(client), TokioIo::new(agent));
    tokio::select! {
        _ = tokio::io::copy_bidirectional(&mut client, &mut agent) => {}
        () = revocation[0].cancelled() => {}
        () = revocation[1].cancelled() => {}
    }
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
        let target = self.registry().target(id, principal.project())?;
        let (token, _) =
            self.caller_token(&CallerTokenRequest::with_own_rights(principal, &target, now)?);
        let (prefix, uri) = agent_uri(request.uri(), &target.agent)?;
        let upgrade = request.headers().get(header::UPGRADE).cloned();
        let headers = outward_headers(request.headers(), &token, upgrade.as_ref())?;
        let client_upgrade = hyper::upgrade::on(&mut request);
        let method = request.method().clone();
        let revocation = [target.revocation.clone(), self.registry().revocation_of(principal)];
        let body = if upgrade.is_some() { Body::empty() } else { request.into_body() };
        let mut outward = Request::new(body);
        (*outward.method_mut(), *outward.uri_mut(), *outward.headers_mut()) =
            (method, uri, headers);
        let clients = self.agent_clients();
        let client = if upgrade.is_some() { &clients.single } else { &clients.pooled };
        let mut answer = clients.await_answer(client.request(outward), &target).await?;
        let status = answer.status();
        if status == StatusCode::UNAUTHORIZED {
            return Err(token_rejected(answer).await);
        }
        let headers = header_policy::response_headers(status, answer.headers(), &prefix);
        let mut headers = headers.ok_or_else(|| {
            let message = "the agent answers with a redirect to somewhere else";
            HttpError::new(502, "redirect_refused", message, None)
        })?;
        let body = if status == StatusCode::SWITCHING_PROTOCOLS {
            if upgrade.is_none() {
                let message = "the agent switches protocols unasked";
                return Err(HttpError::new(502, "bad_upgrade", message, None));
            }
            for name in [header::CONNECTION, header::UPGRADE] {
                if let Some(value) = answer.headers().get(&name) {
                    headers.insert(name, value.clone());
                }
            }
            let agent_upgrade = hyper::upgrade::on(&mut answer);
            tokio::spawn(relay(client_upgrade, agent_upgrade, revocation));
            Body::empty()
        } else {
            let revocation = revocation.map(|token| Box::pin(token.cancelled_owned()));
            Body::new(RevocableBody { inner: answer.into_body(), revocation })
        };
        let mut response = Response::new(body);
        (*response.status_mut(), *response.headers_mut()) = (status, headers);
        Ok(response)
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
        let target = self.registry().target(id, principal.project())?;
        let own = CallerTokenRequest::with_own_rights(principal, &target, now)?;
        let role = if own_role { own.role } else { Role::Viewer };
        let (token, _) = self.caller_token(&CallerTokenRequest { role, ..own });
        let (status, value) = self
            .agent_clients()
            .call(Request::builder(), path, &target, &token, Bytes::new())
            .await?;
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
}
