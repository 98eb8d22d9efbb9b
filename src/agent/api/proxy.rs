//! `/k8s/…`: the Kubernetes API as the caller, as a stream in both directions.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};

use http::request::Parts;
use http::{HeaderMap, Method, Request, Response, StatusCode, Uri, Version};
use http_body_util::{BodyExt as _, Empty};
use hyper::body::{Bytes, Frame, Incoming, SizeHint};
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio_util::sync::CancellationToken;
use tower::BoxError;

use crate::agent::api::permits::StreamClass;
use crate::agent::api::{Api, AuditedRequest, ByteCounters};
use crate::contract::token::Caller;
use crate::kubernetes::answer::{ApiError, is_discovery};
use crate::kubernetes::header_policy;
use crate::kubernetes::path::{self, KubernetesPath, PathError};
use crate::kubernetes::upstream::{Body, Upstream};

/// Subresources that switch protocols: answered only over HTTP/1.1.
const UPGRADING: &[&str] = &["exec", "attach", "portforward"];

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

fn unavailable() -> ApiError {
    let hint = Some("the tunnel stays up; try again soon");
    ApiError::new(503, "kubernetes_unavailable", "the Kubernetes API does not answer", hint)
        .retry_after_s(1)
}

fn credential_refused() -> ApiError {
    let message = "the Kubernetes API refuses the agent's credential";
    let hint = Some("a fresh one is minted within a minute");
    ApiError::new(503, "kubernetes_credential", message, hint).retry_after_s(1)
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
        let (target, headers, upgrade) = match checked {
            Ok(checked) => checked,
            Err(problem) => {
                self.counts().refused.fetch_add(1, Ordering::Relaxed);
                let mut record = record;
                (record.verdict, record.status) = (problem.code.into(), problem.status);
                let _ = self.write(record);
                return problem.status(is_discovery(raw));
            }
        };
        let mutating = !matches!(parts.method, Method::GET | Method::HEAD | Method::OPTIONS);
        let stream = StreamClass::classify(&parts, &target, upgrade);
        let mut call = match self.begin_request(
            super::AuditRecord { path: target.path.clone(), ..record },
            stream,
            mutating || upgrade,
        ) {
            Ok(call) => call,
            Err(problem) => return problem.status(is_discovery(raw)),
        };
        let upstream = self.inner.context.upstream.borrow().clone();
        let Some(upstream) = upstream else {
            call.status(503, "kubernetes_waiting");
            let hint = Some("the tunnel stays up; try again soon");
            return ApiError::new(
                503,
                "kubernetes_waiting",
                "the agent has no way to the Kubernetes API at the moment",
                hint,
            )
            .retry_after_s(1)
            .status(is_discovery(raw));
        };
        let mut answer = self
            .forward(&upstream, Request::from_parts(parts, body), target, headers, upgrade, call)
            .await;
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
    ) -> Result<(KubernetesPath, HeaderMap, bool), ApiError> {
        if self.draining() {
            return Err(ApiError::new(
                503,
                "draining",
                "the agent takes nothing new",
                Some("it is being stopped or restarted"),
            )
            .retry_after_s(1));
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
        if let Some(namespaces) = &caller.namespaces {
            target
                .check_namespaces(&parts.method, namespaces)
                .map_err(|_| namespace_refusal(&target, namespaces))?;
        }
        let upgrade = header_policy::requested_upgrade(parts)?;
        if parts.version == Version::HTTP_2
            && target.subresource.as_deref().is_some_and(|s| UPGRADING.contains(&s))
        {
            return Err(ApiError::new(400, "use_http1", "upgrades need HTTP/1.1", None));
        }
        let upgrading = upgrade.is_some();
        let headers = header_policy::request_headers(&parts.headers, caller, id, upgrade)?;
        Ok((target, headers, upgrading))
    }

    async fn forward(
        &self,
        upstream: &Upstream,
        mut request: Request<Incoming>,
        target: KubernetesPath,
        headers: HeaderMap,
        upgrade: bool,
        mut call: AuditedRequest,
    ) -> Response<Body> {
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
        let theirs = hyper::upgrade::on(&mut request);
        let method = request.method().clone();
        let body: Body = if upgrade {
            Empty::new().map_err(|never| match never {}).boxed_unsync()
        } else {
            Counting {
                inner: request.into_body(),
                counted: Arc::clone(&call.counted),
                inward: true,
                call: None,
                cut: None,
            }
            .boxed_unsync()
        };
        let mut outward = Request::new(body);
        (*outward.method_mut(), *outward.uri_mut(), *outward.headers_mut()) =
            (method, uri, headers);
        let answer = match upstream.send(outward, upgrade).await {
            Ok(answer) => answer,
            Err(error) => {
                tracing::debug!(error, "the Kubernetes API did not answer");
                call.status(503, "kubernetes_unavailable");
                return unavailable().status(discovery);
            }
        };
        let status = answer.status();
        if status == StatusCode::UNAUTHORIZED {
            // the agent's credential was refused, not the caller's token
            call.status(503, "kubernetes_credential");
            return credential_refused().status(discovery);
        }
        let Some(headers) = header_policy::response_headers(status, answer.headers(), "/k8s")
        else {
            call.status(502, "redirect_refused");
            return ApiError::new(
                502,
                "redirect_refused",
                "the Kubernetes API answers with a redirect to somewhere else",
                None,
            )
            .status(discovery);
        };
        call.status(status.as_u16(), "allowed");
        if status == StatusCode::SWITCHING_PROTOCOLS {
            return if upgrade {
                self.switch(theirs, answer, headers, call)
            } else {
                ApiError::new(
                    502,
                    "bad_upgrade",
                    "the Kubernetes API switches protocols unasked",
                    None,
                )
                .status(discovery)
            };
        }
        let cut = self.inner.context.cut.clone();
        let counted = Arc::clone(&call.counted);
        let body = Counting {
            inner: answer.into_body(),
            counted,
            inward: false,
            call: Some(call),
            cut: Some(Box::pin(cut.cancelled_owned())),
        };
        let mut response = Response::new(body.boxed_unsync());
        (*response.status_mut(), *response.headers_mut()) = (status, headers);
        response
    }

    /// Bytes are passed on only after the API server has answered 101.
    fn switch(
        &self,
        theirs: OnUpgrade,
        mut answer: Response<Incoming>,
        mut headers: HeaderMap,
        call: AuditedRequest,
    ) -> Response<Body> {
        self.counts().upgrades.fetch_add(1, Ordering::Relaxed);
        for name in [http::header::CONNECTION, http::header::UPGRADE] {
            if let Some(value) = answer.headers().get(&name) {
                headers.insert(name, value.clone());
            }
        }
        let ours = hyper::upgrade::on(&mut answer);
        let cut: CancellationToken = self.inner.context.cut.clone();
        tokio::spawn(async move {
            let mut call = call;
            let (Ok(theirs), Ok(ours)) = (theirs.await, ours.await) else {
                call.status(101, "upgrade_failed");
                return;
            };
            let (theirs_r, theirs_w) = tokio::io::split(TokioIo::new(theirs));
            let (ours_r, ours_w) = tokio::io::split(TokioIo::new(ours));
            let counted = Arc::clone(&call.counted);
            tokio::select! {
                // either end closes both, once what it has sent is passed on
                () = copy(theirs_r, ours_w, &counted.bytes_in) => {}
                () = copy(ours_r, theirs_w, &counted.bytes_out) => {}
                () = cut.cancelled() => call.status(101, "drained"),
            }
        });
        let mut response =
            Response::new(Empty::new().map_err(|never| match never {}).boxed_unsync());
        (*response.status_mut(), *response.headers_mut()) =
            (StatusCode::SWITCHING_PROTOCOLS, headers);
        response
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

/// A body whose bytes are counted, and which keeps its request open until it ends.
struct Counting {
    inner: Incoming,
    counted: Arc<ByteCounters>,
    inward: bool,
    call: Option<AuditedRequest>,
    cut: Option<Pin<Box<tokio_util::sync::WaitForCancellationFutureOwned>>>,
}

impl hyper::body::Body for Counting {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = &mut *self;
        if let Some(cut) = &mut this.cut
            && cut.as_mut().poll(cx).is_ready()
        {
            if let Some(call) = &mut this.call {
                call.record.verdict = "drained".into();
            }
            return Poll::Ready(Some(Err("the agent stops".into())));
        }
        let polled = Pin::new(&mut this.inner).poll_frame(cx);
        match &polled {
            Poll::Ready(Some(Ok(frame))) => {
                let n = frame.data_ref().map_or(0, Bytes::len) as u64;
                let count =
                    if this.inward { &this.counted.bytes_in } else { &this.counted.bytes_out };
                count.fetch_add(n, Ordering::Relaxed);
            }
            // recorded when the last byte has come, not when the connection drops the body
            Poll::Ready(None) => this.call = None,
            Poll::Ready(Some(Err(error))) => {
                tracing::debug!(%error, "an answer of Kubernetes ended early");
                if let Some(call) = &mut this.call {
                    call.record.verdict = "broken".into();
                }
                this.call = None;
            }
            Poll::Pending => {}
        }
        polled.map(|frame| frame.map(|f| f.map_err(Into::into)))
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}
