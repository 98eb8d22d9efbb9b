//! `/k8s/…`: the Kubernetes API as the caller, as a stream in both directions.

use std::borrow::Cow;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use http::request::Parts;
use http::{HeaderMap, Method, Request, Response, StatusCode, Uri, Version, header};
use hyper::body::Incoming;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tower::BoxError;

use crate::agent::api::permits::StreamClass;
use crate::agent::api::tenant_scope::{self, NAMESPACES, TenantNamespace};
use crate::agent::api::{Api, AuditedRequest, ByteCounters};
use crate::base::connection::Body;
use crate::contract::token::Caller;
use crate::kubernetes::answer::{ApiError, is_discovery, plain};
use crate::kubernetes::header_policy;
use crate::kubernetes::path::{self, KubernetesPath, PathError};
use crate::kubernetes::reverse_proxy::{
    self, Cut, EarlyEnd, ForwardError, ForwardedBody, Outward, StreamHooks, UpgradedIo,
};
use crate::kubernetes::upstream::Upstream;

/// Subresources that switch protocols: answered only over HTTP/1.1.
const UPGRADING: &[&str] = &["exec", "attach", "portforward"];

/// A request that may be served.
struct CheckedRequest {
    target: KubernetesPath,
    /// Those that go to the API server.
    headers: HeaderMap,
    upgrade: bool,
}

/// Whether all namespaces are asked for, once.
fn is_namespace_list(parts: &Parts, target: &KubernetesPath) -> bool {
    parts.method == Method::GET
        && target.path == NAMESPACES
        && !parts.headers.contains_key(header::UPGRADE)
        && StreamClass::classify(parts, target, false) == StreamClass::Short
}

/// The refusal of a request outside the namespaces of a token: it names them, and what was asked
/// for.
fn namespace_refusal(target: &KubernetesPath, namespaces: &[String]) -> ApiError {
    let own = namespaces.join(", ");
    let message = match &target.namespace {
        Some(asked) if !namespaces.contains(asked) => {
            format!("the token is for other namespaces than {asked}: {own}")
        }
        _ => {
            format!("the token is for namespaces alone ({own}), and this is not inside one of them")
        }
    };
    ApiError::new(
        403,
        "namespace_scope",
        message,
        Some("name a namespace of the token with -n, or ask for another token"),
    )
}

/// The Kubernetes API cannot be asked. There is no `Retry-After`: with one, client-go repeats any
/// 429 or 5xx ten times in silence, each time after that many seconds (kubernetes/client-go
/// `rest/with_retry.go`), and kubectl asks for what a cluster serves five times: it would say why
/// after a minute, or, with a `--request-timeout`, not at all. A cluster that is away stays away
/// for longer than that.
fn unavailable(
    code: &'static str,
    message: impl Into<Cow<'static, str>>,
    hint: &'static str,
) -> ApiError {
    ApiError::new(503, code, message, Some(hint))
}

/// The agent itself has no connection to the Kubernetes API, for the reason in its status.
fn waiting(reason: &str) -> ApiError {
    let mut message = "the agent has no way to the Kubernetes API at the moment".to_owned();
    if !reason.is_empty() {
        message.push_str(": ");
        message.push_str(reason);
    }
    unavailable("kubernetes_waiting", message, "the tunnel stays up; try again soon")
}

/// A stopping agent. One that is restarted is back within seconds, so here the few silent
/// repetitions of client-go help; when it stays away the control plane says so without a
/// `Retry-After`.
fn draining() -> ApiError {
    let hint = Some("it is being stopped or restarted");
    ApiError::new(503, "draining", "the agent takes nothing new", hint).retry_after_s(1)
}

/// What the caller is told when there is no answer for it.
fn refusal(error: ForwardError<Incoming, BoxError>) -> ApiError {
    let never = |code, message| ApiError::new(502, code, message, None);
    match error {
        ForwardError::NoAnswer(error) => {
            tracing::debug!(error, "the Kubernetes API did not answer");
            let hint = "the tunnel stays up; try again soon";
            unavailable("kubernetes_unavailable", "the Kubernetes API does not answer", hint)
        }
        ForwardError::Unauthorized(_) => {
            let message = "the Kubernetes API refuses the agent's credential";
            unavailable("kubernetes_credential", message, "a fresh one is minted within a minute")
        }
        ForwardError::Redirect => never(
            "redirect_refused",
            "the Kubernetes API answers with a redirect to somewhere else",
        ),
        ForwardError::UnaskedUpgrade => {
            never("bad_upgrade", "the Kubernetes API switches protocols unasked")
        }
    }
}

impl Api {
    pub(crate) async fn kubernetes(
        &self,
        parts: Parts,
        body: Incoming,
        caller: Caller,
    ) -> Response<Body> {
        let id = crate::frp::wire::fresh_run_id();
        let raw = parts.uri.path().strip_prefix("/k8s").unwrap_or_default();
        let record = self.record(&caller, &id, &parts.method, raw);
        let checked = self.check_request(&parts, &caller, raw, &id);
        let checked = match checked {
            Ok(checked) => checked,
            Err(problem) => {
                self.counters().refused.fetch_add(1, Ordering::Relaxed);
                let mut record = record;
                (record.verdict, record.status) = (problem.code.into(), problem.status);
                let _ = self.write(record);
                return problem.status(is_discovery(raw));
            }
        };
        let mutating = !matches!(parts.method, Method::GET | Method::HEAD | Method::OPTIONS);
        let stream = StreamClass::classify(&parts, &checked.target, checked.upgrade);
        let mut call = match self.begin_request(
            super::AuditRecord { path: checked.target.path.clone(), ..record },
            stream,
            mutating || checked.upgrade,
        ) {
            Ok(call) => call,
            Err(problem) => return problem.status(is_discovery(raw)),
        };
        let upstream = self.inner.context.upstream.borrow().clone();
        let Some(upstream) = upstream else {
            let reason = self.inner.context.agent_status.borrow().reason.clone();
            // the reason is of the whole cluster
            let problem = waiting(if caller.tenant.is_some() { "" } else { &reason });
            call.status(problem.status, problem.code);
            return problem.status(is_discovery(raw));
        };
        let namespace = match (&caller.tenant, &checked.target.namespace) {
            (Some(tenant), Some(name)) => {
                tenant_scope::check(&upstream, tenant, name).await.map(Some)
            }
            _ => Ok(None),
        };
        let namespace = match namespace {
            Ok(namespace) => namespace,
            Err(problem) => {
                self.counters().refused.fetch_add(1, Ordering::Relaxed);
                call.status(problem.status, problem.code);
                return problem.status(is_discovery(raw));
            }
        };
        // of a tenant's callers nothing else asks for this path
        let mut answer = if caller.tenant.is_some() && checked.target.path == NAMESPACES {
            own_namespaces(&upstream, &caller, parts.uri.query().unwrap_or_default(), call).await
        } else {
            let request = Request::from_parts(parts, body);
            self.forward(&upstream, request, checked, namespace, call).await
        };
        if let Ok(id) = id.parse() {
            answer.headers_mut().insert("x-request-id", id);
        }
        answer
    }

    /// All checks that can refuse a request before anything is done for it.
    fn check_request(
        &self,
        parts: &Parts,
        caller: &Caller,
        raw: &str,
        id: &str,
    ) -> Result<CheckedRequest, ApiError> {
        if self.draining() {
            return Err(draining());
        }
        let target = path::parse(raw).map_err(|refusal| match refusal {
            PathError::Invalid(why) => ApiError::new(400, "bad_path", why, None),
            PathError::Proxy => ApiError::new(
                403,
                "proxy_refused",
                "proxying through the API server is refused",
                Some("use port-forward"),
            ),
            PathError::Scope => {
                ApiError::new(403, "namespace_scope", "the token is for other namespaces", None)
            }
        })?;
        if parts.uri.query().is_some_and(|q| q.bytes().any(|b| b < 0x21 || b == 0x7f || b == b'#'))
        {
            return Err(ApiError::new(
                400,
                "bad_path",
                "the query holds a control character",
                None,
            ));
        }
        let lists_own = caller.tenant.is_some() && is_namespace_list(parts, &target);
        if let Some(namespaces) = &caller.namespaces
            && !lists_own
        {
            target
                .check_namespaces(&parts.method, namespaces)
                .map_err(|_| namespace_refusal(&target, namespaces))?;
        }
        let namespace = match &caller.tenant {
            Some(_) if lists_own => None,
            Some(tenant) => {
                target.tenant_namespace(&parts.method).map_err(|_| tenant_scope::outside(tenant))?
            }
            None => target.namespace.as_deref(),
        };
        let upgrade = header_policy::requested_upgrade(parts)?;
        if parts.version == Version::HTTP_2
            && target.subresource.as_deref().is_some_and(|s| UPGRADING.contains(&s))
        {
            return Err(ApiError::new(400, "use_http1", "upgrades need HTTP/1.1", None));
        }
        let upgrading = upgrade.is_some();
        let headers =
            header_policy::request_headers(&parts.headers, caller, namespace, id, upgrade)?;
        Ok(CheckedRequest { target, headers, upgrade: upgrading })
    }

    async fn forward(
        &self,
        upstream: &Upstream,
        request: Request<Incoming>,
        checked: CheckedRequest,
        namespace: Option<TenantNamespace>,
        mut call: AuditedRequest,
    ) -> Response<Body> {
        let CheckedRequest { target, headers, upgrade } = checked;
        let discovery = is_discovery(&target.path);
        let uri = match request.uri().query() {
            Some(query) => format!("{}?{query}", target.path),
            None => target.path,
        };
        let Ok(uri) = uri.parse::<Uri>() else {
            call.status(400, "bad_path");
            return ApiError::new(400, "bad_path", "the query cannot be read", None)
                .status(discovery);
        };
        let counted = Arc::clone(&call.counted);
        let answer = reverse_proxy::forward(
            request,
            Outward { uri, headers, upgrade, prefix: "/k8s" },
            |body| Body::new(ForwardedBody::new(body, counted, Box::pin(std::future::pending()))),
            |request| upstream.send(request, upgrade),
        )
        .await;
        let answer = match answer {
            Ok(answer) => answer,
            Err(error) => {
                // here the record holds what the API server answered
                let unasked = matches!(error, ForwardError::UnaskedUpgrade);
                let problem = refusal(error);
                let (status, verdict) =
                    if unasked { (101, "allowed") } else { (problem.status, problem.code) };
                call.status(status, verdict);
                return problem.status(discovery);
            }
        };
        call.status(answer.status.as_u16(), "allowed");
        if answer.status == StatusCode::SWITCHING_PROTOCOLS {
            self.counters().upgrades.fetch_add(1, Ordering::Relaxed);
        }
        let cut = self.cut(namespace);
        answer.pass_back(call, cut).map(|body| body.map_or_else(Body::default, Body::new))
    }

    /// When a stream must end: with the agent, or once the namespace that a tenant's caller was let
    /// into is not the tenant's any more.
    fn cut(&self, namespace: Option<TenantNamespace>) -> Cut {
        let context = &self.inner.context;
        let (abort, upstreams) = (context.abort.clone(), context.upstream.clone());
        Box::pin(async move {
            let Some(namespace) = namespace else {
                abort.cancelled().await;
                return "the agent stops";
            };
            let look = || async {
                // that of the moment: its credential is a fresh one
                let upstream = upstreams.borrow().clone();
                let Some(upstream) = upstream else { return Err("no connection".into()) };
                tenant_scope::namespace(&upstream, &namespace.name).await
            };
            tokio::select! {
                () = abort.cancelled() => "the agent stops",
                () = namespace.lost(look) => "the namespace is not the tenant's any more",
            }
        })
    }
}

/// The answer to the caller of a tenant that lists namespaces.
async fn own_namespaces(
    upstream: &Upstream,
    caller: &Caller,
    query: &str,
    mut call: AuditedRequest,
) -> Response<Body> {
    let tenant = caller.tenant.as_deref().unwrap_or_default();
    match tenant_scope::list(upstream, tenant, caller.namespaces.as_deref(), query).await {
        Ok(list) => {
            call.counted.bytes_out.fetch_add(list.len() as u64, Ordering::Relaxed);
            call.status(200, "allowed");
            plain(200, "application/json", list)
        }
        Err(problem) => {
            call.status(problem.status, problem.code);
            problem.status(false)
        }
    }
}

/// The body of a request.
impl StreamHooks for Arc<ByteCounters> {
    const BROKEN: &str = "a request to Kubernetes ended early";

    fn passed(&mut self, bytes: usize) {
        self.bytes_in.fetch_add(bytes as u64, Ordering::Relaxed);
    }
}

/// The answer, or an upgraded connection.
impl StreamHooks for AuditedRequest {
    const BROKEN: &str = "an answer of Kubernetes ended early";

    fn passed(&mut self, bytes: usize) {
        self.counted.bytes_out.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    fn ended_early(&mut self, why: EarlyEnd) {
        let verdict = match why {
            EarlyEnd::Broken => "broken",
            EarlyEnd::Cut if self.api.inner.context.abort.is_cancelled() => "drained",
            EarlyEnd::Cut => "namespace_scope",
            EarlyEnd::NotUpgraded => "upgrade_failed",
        };
        self.record.verdict = verdict.into();
    }

    async fn relay(&mut self, caller: UpgradedIo, server: UpgradedIo) {
        relay(caller, server, &self.counted).await;
    }
}

/// Copies and counts until either end closes, once what it has sent is passed on. Nobody waits for
/// the other: it would hold one of the caller's streams.
async fn relay(
    caller: impl AsyncRead + AsyncWrite,
    server: impl AsyncRead + AsyncWrite,
    counted: &ByteCounters,
) {
    let (caller_r, caller_w) = tokio::io::split(caller);
    let (server_r, server_w) = tokio::io::split(server);
    tokio::select! {
        () = copy(caller_r, server_w, &counted.bytes_in) => {}
        () = copy(server_r, caller_w, &counted.bytes_out) => {}
    }
}

async fn copy(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    count: &AtomicU64,
) {
    let mut buffer = vec![0; 16 * 1024];
    while let Ok(n @ 1..) = from.read(&mut buffer).await {
        count.fetch_add(n as u64, Ordering::Relaxed);
        if to.write_all(&buffer[..n]).await.is_err() || to.flush().await.is_err() {
            return;
        }
    }
    let _ = to.shutdown().await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kubectl_says_at_once_that_kubernetes_is_away_and_waits_for_an_agent_that_restarts() {
        let away = [
            waiting("/k is not there yet"),
            refusal(ForwardError::NoAnswer("connection refused".into())),
        ];
        for problem in away {
            assert_eq!((problem.status, problem.retry_after), (503, None), "{problem:?}");
            assert!(!problem.status(false).headers().contains_key("retry-after"), "{problem:?}");
        }
        assert!(waiting("/k is absent").message.ends_with("at the moment: /k is absent"));
        assert!(waiting("").message.ends_with("at the moment"));
        assert_eq!(draining().retry_after, Some(1));
    }

    #[tokio::test]
    async fn what_an_end_sent_before_it_closed_is_passed_on_and_the_other_is_not_waited_for() {
        let (mut caller, from_caller) = tokio::io::duplex(64);
        let (mut server, to_server) = tokio::io::duplex(64);
        let counted = ByteCounters::default();
        let ends = async {
            caller.write_all(b"ask").await.unwrap();
            server.read_exact(&mut [0; 3]).await.unwrap();
            server.write_all(b"answer").await.unwrap();
            drop(server);
            let mut got = String::new();
            caller.read_to_string(&mut got).await.unwrap();
            assert_eq!(got, "answer");
        };
        tokio::join!(relay(from_caller, to_server, &counted), ends);
        assert_eq!((counted.bytes_in.into_inner(), counted.bytes_out.into_inner()), (3, 6));
    }
}
