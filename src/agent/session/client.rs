//! The control plane over HTTPS: carries out what the machine of `session/mod.rs` decides.

use std::time::Duration;

use reqwest::{Client, Method, RequestBuilder, Response, StatusCode};
use serde::de::DeserializeOwned;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::agent::session::identity::{Identity, StoredCredential};
use crate::agent::session::queue::{EntryKind, Queue};
use crate::agent::session::{
    ControlPlaneSession, ControlPlaneState, ControlPlaneStatus, RegistrationAuth, RequestKind,
    RequestOutcome, SessionAction, SessionEvent, is_permanent_refusal,
};
use crate::base::backoff::random;
use crate::base::http::clock_offset;
use crate::base::resolve::Resolver;
use crate::base::secret::Secret;
use crate::base::trust::{Trust, explain};
use crate::contract::types::{
    AgentInfo, AuditHead, ClusterInfo, Config, Credential, Heartbeat, HeartbeatAnswer, Problem,
    Register, Registered, SIGNATURE, StatusReport, TunnelReport,
};
use crate::frp;
use crate::host::state::StateDir;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const REQUEST_TIMEOUT: Duration = Duration::from_secs(15);
/// The control plane that the queue is for.
const QUEUE_URL: &str = "queue-url";
/// Longest answer, bytes.
const MAX_RESPONSE: usize = 1 << 20;

/// What the agent reports to the control plane.
pub struct ReportedState {
    pub name: String,
    pub hostname: String,
    pub max_role: String,
    pub cluster: watch::Receiver<ClusterInfo>,
    pub status: watch::Receiver<StatusReport>,
    pub tunnel: watch::Receiver<frp::TunnelStatus>,
    pub audit: watch::Receiver<AuditHead>,
    pub started: Instant,
}

/// The end of an operation, on its way to the control plane.
pub struct FinishedOperation {
    pub operation: String,
    /// [`types::Operation`](crate::contract::types::Operation), JSON.
    pub body: String,
    /// Sent once it is on disk; dropped when it could not be stored.
    pub stored: oneshot::Sender<()>,
}

/// The control plane's side of the agent.
pub struct ControlPlaneClient {
    pub url: String,
    pub trust: Trust,
    /// Proxy for these calls; without one, what the environment says.
    pub proxy: Option<String>,
    pub token: Option<Secret>,
    pub state: StateDir,
    /// None on a copied disk without a token: then nobody is asked anything.
    pub identity: Option<Box<Identity>>,
    pub reported: ReportedState,
    pub publish: watch::Sender<ControlPlaneStatus>,
    pub config: watch::Sender<Option<Config>>,
    pub results: mpsc::Receiver<FinishedOperation>,
    pub drain: CancellationToken,
    /// Cancelled once the control plane knows that the agent stops, or cannot be told.
    pub drain_reported: CancellationToken,
    pub stop: CancellationToken,
}

/// Checks an address: https, or http to this machine itself.
///
/// # Errors
/// Why it cannot be used.
pub fn check_url(text: &str) -> Result<(), String> {
    let url = url::Url::parse(text).map_err(|e| format!("`{text}` is no URL: {e}"))?;
    if !url.username().is_empty() || url.password().is_some() {
        return Err("a control plane's URL carries no user and no password".into());
    }
    let loopback = match url.host() {
        Some(url::Host::Ipv4(a)) => a.is_loopback(),
        Some(url::Host::Ipv6(a)) => a.is_loopback(),
        Some(url::Host::Domain(name)) => name == "localhost",
        None => return Err(format!("`{text}` names no host")),
    };
    match url.scheme() {
        "https" => Ok(()),
        "http" if loopback => Ok(()),
        "http" => Err(format!(
            "`{text}` would send the token in clear: use https (http is for loopback only)"
        )),
        other => Err(format!("`{other}` is no scheme for a control plane: use https")),
    }
}

/// What an answer brought besides its outcome.
type Reply<T> = (Result<T, RequestOutcome>, Option<i64>);

struct HttpClient {
    client: Client,
    base: String,
}

impl HttpClient {
    fn new(url: &str, trust: &Trust, proxy: Option<&str>) -> Result<HttpClient, String> {
        check_url(url)?;
        let mut client = Client::builder();
        if let Some(proxy) = proxy {
            client = client.proxy(
                reqwest::Proxy::https(proxy)
                    .map_err(|_| "https-proxy is no URL of a proxy".to_owned())?,
            );
        }
        let client = client
            .tls_backend_preconfigured(trust.client()?)
            .connect_timeout(CONNECT_TIMEOUT)
            .timeout(REQUEST_TIMEOUT)
            .dns_resolver(Resolver::shared())
            .pool_idle_timeout(Duration::from_secs(300))
            .redirect(reqwest::redirect::Policy::none())
            .user_agent(concat!("pipeops/", env!("CARGO_PKG_VERSION")))
            .build()
            .map_err(|e| crate::base::http::explain(&e))?;
        Ok(HttpClient { client, base: format!("{}/api/v1/agents", url.trim_end_matches('/')) })
    }

    fn request(&self, method: Method, path: &str, bearer: &Secret) -> RequestBuilder {
        self.client
            .request(method, format!("{}{path}", self.base))
            .bearer_auth(bearer.expose())
            .header("Content-Type", "application/json")
    }

    /// Sends, and judges what comes back.
    async fn send<T: DeserializeOwned>(&self, request: RequestBuilder) -> Reply<T> {
        let unreachable = |e: &reqwest::Error| {
            let text = crate::base::http::explain(e);
            RequestOutcome::Unreachable(match explain(&text) {
                Some((code, remedy)) => format!("{code}: {text}; {remedy}"),
                None => text,
            })
        };
        let mut answer = match request.send().await {
            Ok(answer) => answer,
            Err(e) => return (Err(unreachable(&e)), None),
        };
        let offset = clock_offset(&answer);
        let (status, retry_after) = (answer.status(), retry_after(&answer));
        let mut body = Vec::new();
        loop {
            match answer.chunk().await {
                Ok(Some(chunk)) if body.len() + chunk.len() <= MAX_RESPONSE => {
                    body.extend_from_slice(&chunk)
                }
                Ok(Some(_)) => {
                    return (
                        Err(RequestOutcome::Unreachable("the answer is longer than 1 MiB".into())),
                        offset,
                    );
                }
                Ok(None) => break,
                Err(e) => return (Err(unreachable(&e)), offset),
            }
        }
        if !status.is_success() {
            let problem: Problem = serde_json::from_slice(&body).unwrap_or_default();
            let message = if problem.message.is_empty() {
                status.canonical_reason().unwrap_or("refused").to_owned()
            } else {
                problem.message
            };
            let message = crate::base::text::printable(&message).chars().take(200).collect();
            return (
                Err(RequestOutcome::Refused {
                    status: status.as_u16(),
                    code: problem.code,
                    message,
                    retry_after,
                }),
                offset,
            );
        }
        let text: &[u8] =
            if body.is_empty() || status == StatusCode::NO_CONTENT { b"null" } else { &body };
        let parsed = serde_json::from_slice(text).map_err(|e| {
            RequestOutcome::Unreachable(format!(
                "the answer cannot be read: {e}; is this a control plane?"
            ))
        });
        (parsed, offset)
    }
}

/// Takes the agent `id` off its control plane, with the credential that it gave.
///
/// # Errors
/// Why it still lists the agent, in one line.
pub async fn deregister(
    trust: &Trust,
    proxy: Option<&str>,
    kept: &StoredCredential,
    id: &str,
) -> Result<(), String> {
    let http = HttpClient::new(&kept.url, trust, proxy)?;
    match http
        .send::<serde_json::Value>(http.request(
            Method::DELETE,
            &format!("/{id}"),
            &kept.credential,
        ))
        .await
        .0
    {
        Ok(_) | Err(RequestOutcome::Refused { status: 404 | 410, .. }) => Ok(()),
        Err(RequestOutcome::Refused { status, code, message, .. }) => {
            Err(format!("HTTP {status} {code}: {message}"))
        }
        Err(RequestOutcome::Unreachable(why)) => Err(why),
        Err(_) => Err("no answer that can be read".into()),
    }
}

/// Seconds or a date, an hour at most.
fn retry_after(answer: &Response) -> Option<Duration> {
    let text = answer.headers().get(reqwest::header::RETRY_AFTER)?.to_str().ok()?;
    let seconds = match text.trim().parse::<u64>() {
        Ok(seconds) => seconds,
        Err(_) => {
            let then = jiff::fmt::rfc2822::parse(text).ok()?.timestamp().as_second();
            let now = answer
                .headers()
                .get(reqwest::header::DATE)
                .and_then(|d| jiff::fmt::rfc2822::parse(d.to_str().ok()?).ok());
            u64::try_from(
                then - now.map_or_else(
                    || jiff::Timestamp::now().as_second(),
                    |n| n.timestamp().as_second(),
                ),
            )
            .unwrap_or(0)
        }
    };
    Some(Duration::from_secs(seconds.min(3600)))
}

/// What stays over the calls of a run.
struct RunState {
    http: Result<HttpClient, String>,
    kept: Option<StoredCredential>,
    queue: Queue,
    seq: u64,
}

impl ControlPlaneClient {
    /// Runs until `stop`. No answer of a remote ends it.
    ///
    /// # Errors
    /// When the state directory cannot be used.
    pub async fn run(mut self) -> anyhow::Result<()> {
        let mut session = ControlPlaneSession::new(Instant::now());
        let (mut known, mut event) = self.begin()?;
        // of the last report: a change of these is reported before the next one is due
        let mut shown = None;
        loop {
            let mut call = None;
            let mut actions =
                std::collections::VecDeque::from(session.on(event, Instant::now(), random()));
            while let Some(action) = actions.pop_front() {
                if action == SessionAction::Report {
                    let body = {
                        let report = self.reported.status.borrow();
                        shown = Some((report.kubernetes.clone(), report.nodes.clone()));
                        serde_json::to_string(&*report)?
                    };
                    match known.queue.push(&EntryKind::Status, &body) {
                        Ok(()) => actions.extend(session.on(
                            SessionEvent::Queued,
                            Instant::now(),
                            random(),
                        )),
                        Err(error) => tracing::warn!(
                            error = format!("{error:#}"),
                            "a status report was dropped"
                        ),
                    }
                } else {
                    call = Some(action);
                }
            }
            self.publish.send_if_modified(|reported| {
                let news = reported != session.status();
                if news {
                    reported.clone_from(session.status());
                }
                news
            });
            if session.drain_reported() {
                self.drain_reported.cancel();
            }
            event = match call {
                Some(action) => tokio::select! {
                    () = self.stop.cancelled() => return Ok(()),
                    event = self.call(&mut known, action, session.status()) => event,
                },
                None => {
                    let wake = session.wake();
                    let timer = async {
                        match wake {
                            Some(at) => tokio::time::sleep_until(at).await,
                            None => std::future::pending().await,
                        }
                    };
                    tokio::select! {
                        () = self.stop.cancelled() => return Ok(()),
                        () = self.drain.cancelled(), if session.status().state != ControlPlaneState::Draining => SessionEvent::Drain,
                        Some(FinishedOperation { operation, body, stored }) = self.results.recv() => {
                            match known.queue.push(&EntryKind::Result { operation }, &body) {
                                Ok(()) => drop(stored.send(())),
                                // whoever sent it keeps it, and sends it again
                                Err(error) => tracing::error!(error = format!("{error:#}"), "a result could not be kept"),
                            }
                            SessionEvent::Queued
                        }
                        Ok(()) = self.reported.status.changed() => {
                            let report = self.reported.status.borrow_and_update();
                            let differs = match &shown {
                                Some((kubernetes, nodes)) => (kubernetes, nodes) != (&report.kubernetes, &report.nodes),
                                // the first one waits for something to tell
                                None => report.kubernetes == "connected",
                            };
                            if differs { SessionEvent::Changed } else { SessionEvent::Tick }
                        }
                        () = timer => SessionEvent::Tick,
                    }
                }
            };
        }
    }

    fn begin(&self) -> anyhow::Result<(RunState, SessionEvent)> {
        let token = self.token.is_some();
        let queue = Queue::open(self.state.sub("queue")?);
        // what one control plane did not take is not for another one
        let former = self.state.read(QUEUE_URL)?;
        if former.as_ref().is_some_and(|url| *url != self.url) {
            queue.clear();
        }
        if former.as_ref() != Some(&self.url)
            && let Err(error) = self.state.write(QUEUE_URL, &self.url)
        {
            tracing::warn!(error = format!("{error:#}"), "whom the queue is for is not kept");
        }
        let mut known = RunState {
            http: HttpClient::new(&self.url, &self.trust, self.proxy.as_deref()),
            kept: StoredCredential::load(&self.state, &self.url),
            queue,
            seq: 0,
        };
        let event = if self.identity.is_some() {
            SessionEvent::Start {
                token,
                credential: known.kept.as_ref().map(|k| k.remaining_s(jiff::Timestamp::now())),
            }
        } else {
            known.kept = None;
            SessionEvent::Cloned
        };
        if let Some(config) = known.kept.as_ref().and_then(|k| k.config.clone()) {
            self.config.send_replace(Some(config));
        }
        Ok((known, event))
    }

    async fn call(
        &self,
        known: &mut RunState,
        action: SessionAction,
        status: &ControlPlaneStatus,
    ) -> SessionEvent {
        let call = match &action {
            SessionAction::Register(_) => RequestKind::Register,
            SessionAction::FetchConfig => RequestKind::Config,
            SessionAction::Heartbeat => RequestKind::Heartbeat,
            SessionAction::Rotate => RequestKind::Rotate,
            SessionAction::Deliver | SessionAction::Report => RequestKind::Deliver,
        };
        let (outcome, offset) = self.execute(known, action, status).await;
        if matches!(outcome, Err(RequestOutcome::Unreachable(_))) {
            // a client keeps the resolver's settings of its birth: after a boot without network they would be wrong for ever
            known.http = HttpClient::new(&self.url, &self.trust, self.proxy.as_deref());
        }
        SessionEvent::Done { call, outcome: outcome.unwrap_or_else(|refusal| refusal), offset }
    }

    async fn execute(
        &self,
        known: &mut RunState,
        action: SessionAction,
        status: &ControlPlaneStatus,
    ) -> Reply<RequestOutcome> {
        let (http, identity) = match (&known.http, &self.identity) {
            (Ok(http), Some(identity)) => (http, identity),
            (Err(why), _) => return (Err(RequestOutcome::Unreachable(why.clone())), None),
            (_, None) => {
                return (
                    Err(RequestOutcome::Unreachable("this agent has no identity".into())),
                    None,
                );
            }
        };
        let credential = known.kept.as_ref().map(|k| k.credential.clone()).unwrap_or_default();
        let id = &identity.id;
        match action {
            SessionAction::Register(with) => {
                let bearer = if with == RegistrationAuth::Token {
                    self.token.clone().unwrap_or_default()
                } else {
                    credential
                };
                let body = serde_json::to_string(&self.registration(identity)).unwrap_or_default();
                let signature = match identity.sign(body.as_bytes()) {
                    Ok(signature) => signature,
                    Err(e) => return (Err(RequestOutcome::Unreachable(format!("{e:#}"))), None),
                };
                let request = http
                    .request(Method::POST, "/register", &bearer)
                    .header(SIGNATURE, signature)
                    .body(body);
                let (answer, offset) = http.send::<Registered>(request).await;
                let outcome = answer.and_then(|r| {
                    let config =
                        (r.config != Config::default()).then(|| Box::new(r.config.clone()));
                    let given = Credential {
                        credential: r.credential,
                        credential_expires_at: r.credential_expires_at,
                    };
                    let outcome =
                        self.store_credential(&mut known.kept, given, Some(r.cluster_id), config)?;
                    Ok(outcome)
                });
                (outcome.inspect(|o| self.publish_config(o)), offset)
            }
            SessionAction::FetchConfig => {
                let (answer, offset) = http
                    .send::<Config>(http.request(
                        Method::GET,
                        &format!("/{id}/config"),
                        &credential,
                    ))
                    .await;
                if let (Ok(config), Some(kept)) = (&answer, &mut known.kept)
                    && kept.config.as_ref() != Some(config)
                {
                    kept.config = Some(config.clone());
                    if let Err(error) = kept.store(&self.state) {
                        tracing::warn!(
                            error = format!("{error:#}"),
                            "the settings are not kept over a restart"
                        );
                    }
                }
                (
                    answer
                        .map(|c| RequestOutcome::Config(Box::new(c)))
                        .inspect(|o| self.publish_config(o)),
                    offset,
                )
            }
            SessionAction::Heartbeat => {
                known.seq += 1;
                let body =
                    serde_json::to_string(&self.heartbeat(known.seq, status)).unwrap_or_default();
                let request =
                    http.request(Method::POST, &format!("/{id}/heartbeat"), &credential).body(body);
                let (answer, offset) = http.send::<HeartbeatAnswer>(request).await;
                (answer.map(RequestOutcome::Heartbeat), offset)
            }
            SessionAction::Rotate => {
                let (answer, offset) = http
                    .send::<Credential>(http.request(
                        Method::POST,
                        &format!("/{id}/credential"),
                        &credential,
                    ))
                    .await;
                (
                    answer.and_then(|given| {
                        self.store_credential(&mut known.kept, given, None, None)
                    }),
                    offset,
                )
            }
            SessionAction::Deliver | SessionAction::Report => {
                let Some((name, what, body)) = known.queue.oldest() else {
                    return (Ok(RequestOutcome::Idle), None);
                };
                let path = match &what {
                    EntryKind::Status => format!("/{id}/status"),
                    EntryKind::Result { operation } => {
                        format!("/{id}/operations/{operation}/result")
                    }
                };
                let (answer, offset) = http
                    .send::<serde_json::Value>(
                        http.request(Method::POST, &path, &credential).body(body),
                    )
                    .await;
                if let Err(RequestOutcome::Refused { status, message, .. }) = &answer
                    && is_permanent_refusal(*status)
                {
                    tracing::warn!(
                        ?what,
                        status,
                        message,
                        "the control plane will not take it: dropped"
                    );
                    known.queue.remove(&name);
                } else if answer.is_ok() {
                    known.queue.remove(&name);
                }
                (answer.map(|_| RequestOutcome::Delivered), offset)
            }
        }
    }

    /// Keeps a credential before it is used: after a crash it must be there.
    fn store_credential(
        &self,
        kept: &mut Option<StoredCredential>,
        given: Credential,
        cluster_id: Option<String>,
        config: Option<Box<Config>>,
    ) -> Result<RequestOutcome, RequestOutcome> {
        if given.credential.is_empty() {
            return Err(RequestOutcome::Unreachable(
                "the answer holds no credential; is this a control plane?".into(),
            ));
        }
        let cluster_id =
            cluster_id.or_else(|| kept.as_ref().map(|k| k.cluster_id.clone())).unwrap_or_default();
        let last =
            config.as_deref().cloned().or_else(|| kept.as_ref().and_then(|k| k.config.clone()));
        let new = StoredCredential {
            url: self.url.clone(),
            credential: given.credential,
            expires_at: given.credential_expires_at,
            cluster_id,
            config: last,
        };
        let lives = new.remaining_s(jiff::Timestamp::now());
        if let Err(error) = new.store(&self.state) {
            tracing::error!(
                error = format!("{error:#}"),
                "the credential could not be kept: it is lost with this process"
            );
        }
        *kept = Some(new);
        Ok(RequestOutcome::Credential { lives, config })
    }

    fn publish_config(&self, outcome: &RequestOutcome) {
        if let RequestOutcome::Config(config)
        | RequestOutcome::Credential { config: Some(config), .. } = outcome
        {
            self.config.send_if_modified(|now| {
                let news = now.as_ref() != Some(&**config);
                if news {
                    *now = Some((**config).clone());
                }
                news
            });
        }
    }

    fn registration(&self, identity: &Identity) -> Register {
        Register {
            agent: AgentInfo {
                id: identity.id.clone(),
                public_key: identity.public_key.clone(),
                name: self.reported.name.clone(),
                version: env!("CARGO_PKG_VERSION").into(),
                hostname: self.reported.hostname.clone(),
                os: "linux".into(),
                arch: std::env::consts::ARCH.into(),
                machine: identity.machine.clone(),
                ..AgentInfo::default()
            },
            cluster: self.reported.cluster.borrow().clone(),
            capabilities: [
                "kubernetes-proxy",
                "upgrade-websocket",
                "upgrade-spdy",
                "audit",
                "operations",
            ]
            .map(String::from)
            .to_vec(),
            max_role: self.reported.max_role.clone(),
            ..Register::default()
        }
    }

    fn heartbeat(&self, seq: u64, status: &ControlPlaneStatus) -> Heartbeat {
        let tunnel = self.reported.tunnel.borrow().clone();
        // in the control plane's time, as this clock may be wrong
        let at = |ago: Duration| {
            let now = jiff::Timestamp::now().as_second() - status.offset;
            jiff::Timestamp::from_second(now - i64::try_from(ago.as_secs()).unwrap_or(0))
                .unwrap_or_default()
                .to_string()
        };
        Heartbeat {
            seq,
            sent_at: at(Duration::ZERO),
            state: if status.state == ControlPlaneState::Draining { "draining" } else { "online" }
                .into(),
            tunnel: TunnelReport { state: tunnel.state, since: at(tunnel.since.elapsed()) },
            uptime_s: self.reported.started.elapsed().as_secs(),
            audit_head: self.reported.audit.borrow().clone(),
        }
    }
}
