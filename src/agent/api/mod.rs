//! The agent's HTTP API on the streams of the tunnel: TLS, authentication, limits, audit.

pub mod audit;
pub mod operations;
pub mod permits;
mod proxy;
mod tenant_scope;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use http::{HeaderMap, Method, Request, Response, header};
use hyper::body::Incoming;
use parking_lot::Mutex;
use serde_json::json;
use tokio::sync::watch;
use tokio::time::{Instant, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tower::BoxError;

use crate::agent::session;
use crate::agent::status::AgentStatus;
use crate::base::connection::{self, Body, Handler, Io, Versions};
use crate::base::metrics::{self, MetricsText};
use crate::contract::token::{self, Caller, Role};
use crate::contract::types::{AuditHead, Config};
use crate::kubernetes::answer::{ApiError, is_discovery, plain};
use crate::kubernetes::header_policy;
use crate::kubernetes::upstream::Upstream;
use audit::{AuditLog, AuditRecord, Phase};
use operations::Operations;
use permits::{OpenStreams, StreamClass, StreamLimits, StreamPermit};

/// Records that one call of `/api/v1/audit` returns.
const RECENT_RECORDS: usize = 50;
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Largest headers of a request over HTTP/2, bytes.
const MAX_HTTP2_HEADERS: u32 = 16 * 1024;

/// What the API needs.
pub struct ApiContext {
    pub id: String,
    pub max_role: Role,
    pub config: watch::Receiver<Option<Config>>,
    pub control: watch::Receiver<session::ControlPlaneStatus>,
    pub upstream: watch::Receiver<Option<Upstream>>,
    pub agent_status: watch::Receiver<AgentStatus>,
    pub audit_head: watch::Sender<AuditHead>,
    pub limits: StreamLimits,
    /// Operations, which continue without the request that began them.
    pub operations: Operations,
    /// Nothing new is taken.
    pub drain: CancellationToken,
    /// What is still open ends.
    pub abort: CancellationToken,
}

/// The API. Clones share its state.
#[derive(Clone)]
pub struct Api {
    inner: Arc<Inner>,
}

struct Inner {
    context: ApiContext,
    tls: TlsAcceptor,
    audit: Mutex<AuditLog>,
    open: Mutex<OpenStreams>,
    verified_tokens: Mutex<token::VerifiedTokens>,
    counters: ApiCounters,
}

/// Counters since the start, for metrics.
#[derive(Default)]
pub struct ApiCounters {
    pub requests: AtomicU64,
    pub refused: AtomicU64,
    pub upgrades: AtomicU64,
    pub bytes_in: AtomicU64,
    pub bytes_out: AtomicU64,
    pub audit_failed: AtomicU64,
}

impl Api {
    pub fn new(context: ApiContext, tls: rustls::ServerConfig, audit: AuditLog) -> Api {
        context.audit_head.send_replace(audit.head().clone());
        let tls = TlsAcceptor::from(Arc::new(tls));
        let api = Api {
            inner: Arc::new(Inner {
                context,
                tls,
                audit: Mutex::new(audit),
                open: Mutex::default(),
                verified_tokens: Mutex::default(),
                counters: ApiCounters::default(),
            }),
        };
        api.report_unreported();
        api.resume_running();
        api
    }

    /// Whether nothing new is taken.
    fn draining(&self) -> bool {
        self.inner.context.drain.is_cancelled() || self.inner.context.control.borrow().drain
    }

    /// Streams of callers that are open.
    pub fn open_streams(&self) -> usize {
        self.inner.open.lock().total()
    }

    pub fn counters(&self) -> &ApiCounters {
        &self.inner.counters
    }

    /// Serves one stream of the tunnel to its end. The FRP server sees nothing but TLS.
    pub async fn serve(&self, io: Io) {
        match timeout(HANDSHAKE_TIMEOUT, self.inner.tls.accept(io)).await {
            Ok(Ok(stream)) => self.http(Box::new(stream)).await,
            Ok(Err(error)) => tracing::debug!(%error, "TLS on a tunnel stream"),
            Err(_) => tracing::debug!("a tunnel stream did not finish its TLS handshake"),
        }
    }

    /// Serves one stream of an http proxy, which the FRP server can read: it answers whether the
    /// agent runs, and nothing else.
    pub async fn serve_plain(&self, io: Io) {
        let handler: Handler =
            Box::new(|request| Box::pin(std::future::ready(Ok(Api::route_plain(&request)))));
        let drain = &self.inner.context.drain;
        // HTTP/1.1 alone: that is what frps speaks to it
        tokio::select! {
            ended = connection::serve(io, Versions::Http1, handler, drain) => log_end(ended),
            () = drain.cancelled() => {}
        }
    }

    async fn http(&self, io: Io) {
        let api = self.clone();
        let handler: Handler = Box::new(move |request| {
            let api = api.clone();
            Box::pin(async move { Ok(api.route(request).await) })
        });
        let ApiContext { drain, abort, .. } = &self.inner.context;
        let versions = Versions::Http1And2(MAX_HTTP2_HEADERS);
        tokio::select! {
            ended = connection::serve(io, versions, handler, drain) => log_end(ended),
            () = abort.cancelled() => {}
        }
    }

    fn route_plain(request: &Request<Incoming>) -> Response<Body> {
        if request.uri().path() == "/healthz"
            && matches!(*request.method(), Method::GET | Method::HEAD)
        {
            return plain(200, "text/plain", "ok\n".into());
        }
        let hint = Some("use the agent's stcp or tcp proxy, with TLS to the agent");
        ApiError::new(
            403,
            "plain_transport",
            "the operator of the FRP server can read this path",
            hint,
        )
        .plain()
    }

    async fn route(self, request: Request<Incoming>) -> Response<Body> {
        self.inner.counters.requests.fetch_add(1, Ordering::Relaxed);
        let (parts, body) = request.into_parts();
        let below_k8s = parts.uri.path() == "/k8s" || parts.uri.path().starts_with("/k8s/");
        let refusal = |problem: &ApiError| {
            self.inner.counters.refused.fetch_add(1, Ordering::Relaxed);
            match parts.uri.path().strip_prefix("/k8s").filter(|_| below_k8s) {
                Some(path) => problem.status(is_discovery(path)),
                None => problem.plain(),
            }
        };
        if let Err(refused) = header_policy::check_framing(&parts) {
            let mut answer = refusal(&refused.into());
            if parts.version != http::Version::HTTP_2 {
                answer
                    .headers_mut()
                    .insert(header::CONNECTION, header::HeaderValue::from_static("close"));
            }
            return answer;
        }
        if parts.uri.path() == "/healthz" && matches!(parts.method, Method::GET | Method::HEAD) {
            return plain(200, "text/plain", "ok\n".into());
        }
        let caller = match self.authenticate(&parts.headers) {
            Ok(caller) => caller,
            Err(why) => {
                let hint =
                    Some("get a token from the control plane: POST /api/v1/clusters/ID/token");
                return refusal(&ApiError::new(401, "unauthorized", why, hint));
            }
        };
        let path = parts.uri.path();
        let operations = path
            .strip_prefix("/api/v1/operations")
            .filter(|rest| rest.is_empty() || rest.starts_with('/'));
        if caller.operation.is_some() && operations.is_none() {
            self.record_request(&caller, &parts.method, path, 403);
            return refusal(&operations::beyond_token());
        }
        if below_k8s {
            return self.kubernetes(parts, body, caller).await;
        }
        if let Some(rest) = operations {
            let answer = self.operation(&parts, body, &caller, rest).await;
            // one that was accepted has its own records, at its beginning and its end
            if answer.status() != 202 {
                self.record_request(&caller, &parts.method, path, answer.status().as_u16());
            }
            return answer;
        }
        let answer = self.own_path(&parts.method, path, &caller);
        self.record_request(&caller, &parts.method, path, answer.status().as_u16());
        answer
    }

    /// A path of the agent itself.
    fn own_path(&self, method: &Method, path: &str, caller: &Caller) -> Response<Body> {
        let agent_status = || self.inner.context.agent_status.borrow().clone();
        match (path, method) {
            ("/readyz" | "/version" | "/metrics" | "/api/v1/status" | "/api/v1/audit", method)
                if !matches!(*method, Method::GET | Method::HEAD) =>
            {
                ApiError::new(405, "method_not_allowed", "only GET is served here", None).plain()
            }
            // both tell of the whole cluster
            ("/metrics" | "/api/v1/status", _) if caller.tenant.is_some() => {
                tenant_scope::outside(caller.tenant.as_deref().unwrap_or_default()).plain()
            }
            ("/readyz", _) => match agent_status().ready() {
                Ok(()) => plain(200, "text/plain", "ok\n".into()),
                Err(why) => {
                    // why is of the whole cluster
                    let why =
                        caller.tenant.as_ref().map_or(why, |_| "the agent is not ready".into());
                    ApiError::new(503, "not_ready", why, None).retry_after_s(5).plain()
                }
            },
            ("/version", _) => plain(
                200,
                "application/json",
                json!({"version": env!("CARGO_PKG_VERSION"), "agent": self.inner.context.id})
                    .to_string(),
            ),
            ("/metrics", _) => {
                let mut metrics = MetricsText::default();
                agent_status().write_metrics(&mut metrics);
                self.write_metrics(&mut metrics);
                plain(200, metrics::CONTENT_TYPE, metrics.into_string())
            }
            ("/api/v1/status", _) => plain(
                200,
                "application/json",
                serde_json::to_string(&agent_status()).unwrap_or_default(),
            ),
            // who did what is not for every caller
            ("/api/v1/audit", _) if caller.role < Role::Operator || caller.is_limited() => {
                ApiError::new(
                    403,
                    "role_exceeded",
                    "the audit log is for operators of the whole cluster",
                    None,
                )
                .plain()
            }
            ("/api/v1/audit", _) => self.audit_records(),
            _ => ApiError::new(
                404,
                "not_found",
                "there is no such path",
                Some("the Kubernetes API is below /k8s"),
            )
            .plain(),
        }
    }

    fn audit_records(&self) -> Response<Body> {
        match self.inner.audit.lock().recent(RECENT_RECORDS) {
            Ok(lines) => {
                plain(200, "application/json", format!("{{\"items\":[{}]}}", lines.join(",")))
            }
            Err(error) => {
                tracing::warn!(error = format!("{error:#}"), "the audit log cannot be read");
                ApiError::new(500, "audit_unreadable", "the audit log cannot be read", None).plain()
            }
        }
    }

    /// Records a request that is served by the agent itself.
    fn record_request(&self, caller: &Caller, method: &Method, path: &str, status: u16) {
        let record = self.record(caller, &crate::frp::wire::fresh_run_id(), method, path);
        let _ = self.write(AuditRecord {
            phase: Phase::Call,
            verdict: "served".into(),
            status,
            ..record
        });
    }

    /// Adds what is counted in this API to `metrics`.
    pub fn write_metrics(&self, metrics: &mut MetricsText) {
        let counts = &self.inner.counters;
        let get = |n: &AtomicU64| n.load(Ordering::Relaxed);
        metrics.counter("pipeops_api_requests_total", &[], get(&counts.requests));
        metrics.counter("pipeops_api_refused_total", &[], get(&counts.refused));
        metrics.counter("pipeops_api_upgrades_total", &[], get(&counts.upgrades));
        let bytes = "pipeops_api_bytes_total";
        metrics.counter(bytes, &[("direction", "in")], get(&counts.bytes_in));
        metrics.counter(bytes, &[("direction", "out")], get(&counts.bytes_out));
        metrics.gauge("pipeops_api_open_streams", &[], self.open_streams());
        let tasks = tokio::runtime::Handle::try_current()
            .map_or(0, |runtime| runtime.metrics().num_alive_tasks());
        metrics.gauge("pipeops_tasks", &[], tasks);
        metrics.gauge("pipeops_operations_running", &[], self.inner.context.operations.running());
        metrics.counter("pipeops_audit_failed_total", &[], get(&counts.audit_failed));
    }

    fn authenticate(&self, headers: &HeaderMap) -> Result<Caller, &'static str> {
        let token = header_policy::bearer(headers).ok_or("a bearer token is needed")?;
        let parts = &self.inner.context;
        let config = parts.config.borrow();
        let auth = &config.as_ref().ok_or("this agent is not registered yet")?.runner_auth;
        // the times in a token are those of the control plane's clock
        let now = jiff::Timestamp::now().as_second() - parts.control.borrow().clock_offset;
        token::verify(token, auth, &parts.id, parts.max_role, now, &self.inner.verified_tokens)
    }

    fn record(&self, caller: &Caller, request: &str, method: &Method, path: &str) -> AuditRecord {
        AuditRecord {
            phase: Phase::Call,
            request: request.into(),
            subject: caller.subject.clone(),
            role: caller.role.name().into(),
            tenant: caller.tenant.clone().unwrap_or_default(),
            token: caller.token_id.clone(),
            method: method.to_string(),
            path: if path.len() <= 1024 { path.into() } else { path.chars().take(1024).collect() },
            verdict: String::new(),
            status: 0,
            duration_ms: 0,
            bytes_in: 0,
            bytes_out: 0,
        }
    }

    /// Counts a request and, when it changes something, records its beginning. Its end is recorded
    /// when it is dropped.
    ///
    /// # Errors
    /// What is full: the streams, or the disk with the audit log.
    fn begin_request(
        &self,
        record: AuditRecord,
        stream: StreamClass,
        changes: bool,
    ) -> Result<AuditedRequest, ApiError> {
        let tenant = Some(&*record.tenant).filter(|tenant| !tenant.is_empty());
        let permit = self.permit(&record.subject, tenant, stream)?;
        let mut call = AuditedRequest {
            api: self.clone(),
            record,
            begun: Instant::now(),
            counted: Arc::default(),
            _permit: permit,
        };
        if changes {
            let start = AuditRecord {
                phase: Phase::Start,
                verdict: "allowed".into(),
                ..call.record.clone()
            };
            if self.write(start).is_err() {
                call.status(507, "audit_full");
                let message =
                    "what changes something must be put on record, and the disk takes no record";
                return Err(ApiError::new(
                    507,
                    "audit_full",
                    message,
                    Some("free space on the node"),
                ));
            }
            call.record.phase = Phase::End;
        }
        Ok(call)
    }

    fn write(&self, record: AuditRecord) -> std::io::Result<()> {
        let mut audit = self.inner.audit.lock();
        let result = audit.write(record);
        match &result {
            Ok(()) => {
                self.inner.context.audit_head.send_replace(audit.head().clone());
            }
            Err(error) => {
                self.inner.counters.audit_failed.fetch_add(1, Ordering::Relaxed);
                tracing::warn!(%error, "the audit log cannot be written");
            }
        }
        result
    }
}

/// A request that is being served; recorded when it ends, however it ends.
pub(crate) struct AuditedRequest {
    api: Api,
    record: AuditRecord,
    begun: Instant,
    pub(crate) counted: Arc<ByteCounters>,
    _permit: StreamPermit,
}

#[derive(Default)]
pub(crate) struct ByteCounters {
    pub(crate) bytes_in: AtomicU64,
    pub(crate) bytes_out: AtomicU64,
}

impl AuditedRequest {
    pub(crate) fn status(&mut self, status: u16, verdict: &str) {
        self.record.status = status;
        self.record.verdict = verdict.into();
    }
}

impl Drop for AuditedRequest {
    fn drop(&mut self) {
        let mut record = std::mem::take(&mut self.record);
        record.duration_ms = u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        record.bytes_in = self.counted.bytes_in.load(Ordering::Relaxed);
        record.bytes_out = self.counted.bytes_out.load(Ordering::Relaxed);
        self.api.inner.counters.bytes_in.fetch_add(record.bytes_in, Ordering::Relaxed);
        self.api.inner.counters.bytes_out.fetch_add(record.bytes_out, Ordering::Relaxed);
        let _ = self.api.write(record);
    }
}

fn log_end(ended: Result<(), BoxError>) {
    if let Err(error) = ended {
        tracing::debug!(error = format!("{error:?}"), "a connection closed early");
    }
}
