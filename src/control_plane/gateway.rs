//! The HTTP gateway into a tunnel: passes a request on with a token for the agent, and its answer
//! back.

use axum::body::Body;
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderValue, Request, Response, Uri, header};
use http_body_util::{BodyExt as _, Limited};
use hyper::body::{Bytes, Incoming};
use serde_json::Value;

use super::agent_client::ANSWER_TIMEOUT;
use super::caller_token::{CallerTokenRequest, reason_of, tenant_refused};
use super::error::HttpError;
use super::registry::Principal;
use super::state::ControlPlane;
use crate::base::secret::Secret;
use crate::contract::token::Role;
use crate::kubernetes::header_policy;
use crate::kubernetes::reverse_proxy::{self, ForwardError, Outward, StreamHooks};

/// A 401 of an agent is about the token that was minted here: the caller cannot fix that.
async fn token_rejected(body: Incoming, principal: &Principal) -> HttpError {
    let body = tokio::time::timeout(ANSWER_TIMEOUT, Limited::new(body, 64 << 10).collect()).await;
    let body: Value = body
        .ok()
        .and_then(Result::ok)
        .and_then(|b| serde_json::from_slice(&b.to_bytes()).ok())
        .unwrap_or_default();
    let said = reason_of(&body);
    if principal.tenant().is_some() {
        return tenant_refused(&said);
    }
    let hint = "compare the clocks of the node and of the control plane; \
                the agent fetches fresh keys within seconds";
    HttpError::new(
        502,
        "agent_mistrusts",
        format!("the cluster's agent refuses the control plane's token: {said}"),
        Some(hint),
    )
}

/// What the caller is told when there is no answer for it.
async fn refusal(error: ForwardError<Incoming, HttpError>, principal: &Principal) -> HttpError {
    let (code, message) = match error {
        ForwardError::NoAnswer(error) => return error,
        ForwardError::Unauthorized(body) => return token_rejected(body, principal).await,
        ForwardError::Redirect => {
            ("redirect_refused", "the agent answers with a redirect to somewhere else")
        }
        ForwardError::UnaskedUpgrade => ("bad_upgrade", "the agent switches protocols unasked"),
    };
    HttpError::new(502, code, message, None)
}

/// A stream into a cluster: the agent has the record of it.
struct GatewayStream;

impl StreamHooks for GatewayStream {
    const BROKEN: &str = "an agent's answer ended early";
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

impl ControlPlane {
    /// One request into a cluster.
    pub(super) async fn forward(
        &self,
        request: Request<Body>,
        id: &str,
        principal: &Principal,
        now: i64,
    ) -> Result<Response<Body>, HttpError> {
        let target = self.registry().target(id, principal.project())?;
        let (token, _) =
            self.caller_token(&CallerTokenRequest::with_own_rights(principal, &target, now)?)?;
        let (prefix, uri) = agent_uri(request.uri(), &target.agent)?;
        let upgrade = request.headers().get(header::UPGRADE).cloned();
        let headers = outward_headers(request.headers(), &token, upgrade.as_ref())?;
        let revocation =
            (target.revocation.clone(), self.registry().revocation_of(principal, &target.agent));
        let upgrade = upgrade.is_some();
        let clients = self.agent_clients();
        let client = if upgrade { &clients.single } else { &clients.pooled };
        let answer = reverse_proxy::forward(
            request,
            Outward { uri, headers, upgrade, prefix: &prefix },
            std::convert::identity,
            |request| clients.await_answer(client.request(request), &target),
        )
        .await;
        let answer = match answer {
            Ok(answer) => answer,
            Err(error) => return Err(refusal(error, principal).await),
        };
        let revoked = Box::pin(async move {
            tokio::select! {
                () = revocation.0.cancelled() => {}
                () = revocation.1.cancelled() => {}
            }
            "the right to this stream was revoked"
        });
        let response = answer.pass_back(GatewayStream, revoked);
        Ok(response.map(|body| body.map_or_else(Body::empty, Body::new)))
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
        let mut own = CallerTokenRequest::with_own_rights(principal, &target, now)?;
        if !own_role {
            own.scope.role = Role::Viewer;
        }
        let (token, _) = self.caller_token(&own)?;
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
