//! Carries out what the state machine of the session decides: requests to the control plane over
//! HTTPS.

use std::collections::VecDeque;
use std::time::Duration;

use reqwest::{Method, RequestBuilder};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::http::{HttpClient, Reply};
use super::identity::{Identity, StoredCredential};
use super::queue::{EntryKind, Queue};
use super::{
    ControlPlaneSession, ControlPlaneState, ControlPlaneStatus, RegistrationAuth, RequestKind,
    RequestOutcome, SessionAction, SessionEvent, first_event, is_permanent_refusal, tenants_event,
};
use crate::base::backoff::random;
use crate::base::secret::Secret;
use crate::base::trust::Trust;
use crate::contract::tenant::CAPABILITY;
use crate::contract::token::OPERATION_TOKENS;
use crate::contract::types::{
    AgentInfo, AuditHead, ClusterInfo, Config, Credential, Heartbeat, HeartbeatAnswer, NodeReport,
    Register, Registered, SIGNATURE_HEADER, StatusReport, TunnelReport,
};
use crate::frp;
use crate::host::state::StateDir;

/// The control plane that the queue is for.
const QUEUE_URL: &str = "queue-url";

/// What the agent reports to the control plane.
pub struct ReportedState {
    pub name: String,
    pub hostname: String,
    pub max_role: String,
    pub cluster: watch::Receiver<ClusterInfo>,
    /// What of it a registration must say again where it has changed since the last one.
    pub facts: String,
    /// Whether the cluster keeps tenants apart and the agent may make them; `None` until that is
    /// known.
    pub tenants: watch::Receiver<Option<bool>>,
    pub status: watch::Receiver<StatusReport>,
    pub tunnel: watch::Receiver<frp::TunnelStatus>,
    pub audit: watch::Receiver<AuditHead>,
    pub started: Instant,
}

/// The result of an operation, on its way to the control plane.
pub struct FinishedOperation {
    pub operation: String,
    /// [`types::Operation`](crate::contract::types::Operation), JSON.
    pub body: String,
    /// Sent once it is on disk; dropped when it could not be stored.
    pub stored: oneshot::Sender<()>,
}

/// The connection of the agent to its control plane.
pub struct ControlPlaneClient {
    pub url: String,
    pub trust: Trust,
    /// Proxy for these requests; without one, that of the environment.
    pub proxy: Option<String>,
    pub token: Option<Secret>,
    pub state: StateDir,
    /// None on a copied disk without a token: then no request is sent.
    pub identity: Option<Box<Identity>>,
    pub reported: ReportedState,
    pub publish: watch::Sender<ControlPlaneStatus>,
    pub config: watch::Sender<Option<Config>>,
    pub results: mpsc::Receiver<FinishedOperation>,
    pub drain: CancellationToken,
    /// Cancelled once the control plane knows that the agent stops, or does not answer.
    pub drain_reported: CancellationToken,
    pub stop: CancellationToken,
}

/// The paths of this agent at the control plane.
struct AgentEndpoint<'a> {
    http: HttpClient,
    identity: &'a Identity,
    credential: Secret,
}

impl AgentEndpoint<'_> {
    fn request(&self, method: Method, path: &str) -> RequestBuilder {
        let path = format!("/{}{path}", self.identity.id);
        self.http.request(method, &path, &self.credential)
    }
}

/// Sends the oldest entry of the queue.
async fn deliver(queue: &Queue, agent: &AgentEndpoint<'_>) -> Reply<RequestOutcome> {
    let Some((name, entry, body)) = queue.oldest() else {
        return (Ok(RequestOutcome::Idle), None);
    };
    let path = match &entry {
        EntryKind::Status => "/status".to_owned(),
        EntryKind::Result { operation } => format!("/operations/{operation}/result"),
    };
    let request = agent.request(Method::POST, &path).body(body);
    let (answer, offset) = agent.http.send::<serde_json::Value>(request).await;
    if let Err(RequestOutcome::Refused { status, message, .. }) = &answer
        && is_permanent_refusal(*status)
    {
        let what = &entry;
        tracing::warn!(?what, status, message, "the control plane will not take it: dropped");
        queue.remove(&name);
    } else if answer.is_ok() {
        queue.remove(&name);
    }
    (answer.map(|_| RequestOutcome::Delivered), offset)
}

/// What a control plane may ask of this agent.
fn capabilities(tenants: bool) -> Vec<String> {
    let mut names =
        vec!["kubernetes-proxy", "upgrade-websocket", "upgrade-spdy", "audit", "operations"];
    names.push(OPERATION_TOKENS);
    if tenants {
        names.push(CAPABILITY);
    }
    names.into_iter().map(String::from).collect()
}

/// What stays from one request to the next.
struct RunState {
    http: Result<HttpClient, String>,
    credential: Option<StoredCredential>,
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
        let (mut state, mut events) = self.begin()?;
        // of the last report: a change of these is reported before the next one is due
        let mut shown = None;
        loop {
            let mut next = None;
            let mut actions = VecDeque::new();
            for event in events {
                actions.extend(session.on(event, Instant::now(), random()));
            }
            while let Some(action) = actions.pop_front() {
                if action == SessionAction::Report {
                    let body = {
                        let report = self.reported.status.borrow();
                        shown = Some((report.kubernetes.clone(), report.nodes.clone()));
                        serde_json::to_string(&*report)?
                    };
                    match state.queue.push(&EntryKind::Status, &body) {
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
                    next = Some(action);
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
            events = vec![match next {
                Some(action) => tokio::select! {
                    () = self.stop.cancelled() => return Ok(()),
                    event = self.request(&mut state, action, session.status()) => event,
                },
                None => {
                    let draining = session.status().state == ControlPlaneState::Draining;
                    let wake = session.next_tick();
                    let timer = async {
                        match wake {
                            Some(at) => tokio::time::sleep_until(at).await,
                            None => std::future::pending().await,
                        }
                    };
                    tokio::select! {
                        () = self.stop.cancelled() => return Ok(()),
                        () = self.drain.cancelled(), if !draining => SessionEvent::Drain,
                        Some(finished) = self.results.recv() => {
                            let FinishedOperation { operation, body, stored } = finished;
                            match state.queue.push(&EntryKind::Result { operation }, &body) {
                                Ok(()) => drop(stored.send(())),
                                // its sender keeps it, and sends it again
                                Err(error) => {
                                    let error = format!("{error:#}");
                                    tracing::error!(error, "a result could not be kept");
                                }
                            }
                            SessionEvent::Queued
                        }
                        Ok(()) = self.reported.status.changed() => {
                            self.status_event(shown.as_ref())
                        }
                        Ok(()) = self.reported.tenants.changed() => self.tenants_changed(&state),
                        () = timer => SessionEvent::Tick,
                    }
                }
            }];
        }
    }

    /// Whether the cluster differs from what was reported last.
    fn status_event(&mut self, last: Option<&(String, Vec<NodeReport>)>) -> SessionEvent {
        let report = self.reported.status.borrow_and_update();
        let differs = match last {
            Some((kubernetes, nodes)) => (kubernetes, nodes) != (&report.kubernetes, &report.nodes),
            // the first report waits for a connected cluster
            None => report.kubernetes == "connected",
        };
        if differs { SessionEvent::Changed } else { SessionEvent::Tick }
    }

    fn tenants_changed(&mut self, state: &RunState) -> SessionEvent {
        let known = *self.reported.tenants.borrow_and_update();
        tenants_event(known, state.credential.as_ref())
    }

    fn begin(&self) -> anyhow::Result<(RunState, Vec<SessionEvent>)> {
        let token = self.token.is_some();
        let queue = Queue::open(self.state.subdir("queue")?);
        // what was meant for one control plane is not sent to another one
        let former = self.state.read(QUEUE_URL)?;
        if former.as_ref().is_some_and(|url| *url != self.url) {
            queue.clear();
        }
        if former.as_ref() != Some(&self.url)
            && let Err(error) = self.state.write(QUEUE_URL, &self.url)
        {
            tracing::warn!(error = format!("{error:#}"), "the owner of the queue was not saved");
        }
        let mut state = RunState {
            http: HttpClient::new(&self.url, &self.trust, self.proxy.as_deref()),
            credential: StoredCredential::load(&self.state, &self.url),
            queue,
            seq: 0,
        };
        let ours = self.identity.is_some();
        let mut events = vec![first_event(ours, token, state.credential.as_ref())];
        if !ours {
            state.credential = None;
        }
        if state.credential.as_ref().is_some_and(|stored| stored.facts != self.reported.facts) {
            events.push(SessionEvent::CapabilitiesChanged);
        }
        if let Some(config) = state.credential.as_ref().and_then(|c| c.config.clone()) {
            self.config.send_replace(Some(config));
        }
        Ok((state, events))
    }

    /// Sends the request of an action.
    async fn request(
        &self,
        state: &mut RunState,
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
        let (outcome, offset) = match (state.http.clone(), &self.identity) {
            (Ok(http), Some(identity)) => {
                let credential = state.credential.as_ref().map(|c| c.credential.clone());
                let agent =
                    AgentEndpoint { http, identity, credential: credential.unwrap_or_default() };
                match action {
                    SessionAction::Register(auth) => self.register(state, &agent, auth).await,
                    SessionAction::FetchConfig => self.fetch_config(state, &agent).await,
                    SessionAction::Heartbeat => self.send_heartbeat(state, &agent, status).await,
                    SessionAction::Rotate => self.rotate_credential(state, &agent).await,
                    SessionAction::Deliver | SessionAction::Report => {
                        deliver(&state.queue, &agent).await
                    }
                }
            }
            (Err(why), _) => (Err(RequestOutcome::Unreachable(why)), None),
            (_, None) => {
                (Err(RequestOutcome::Unreachable("this agent has no identity".into())), None)
            }
        };
        if matches!(outcome, Err(RequestOutcome::Unreachable(_))) {
            // a client keeps the resolver's settings of the moment when it was made: after a boot
            // without network they would stay wrong
            state.http = HttpClient::new(&self.url, &self.trust, self.proxy.as_deref());
        }
        SessionEvent::Done { call, outcome: outcome.unwrap_or_else(|refusal| refusal), offset }
    }

    async fn register(
        &self,
        state: &mut RunState,
        agent: &AgentEndpoint<'_>,
        auth: RegistrationAuth,
    ) -> Reply<RequestOutcome> {
        let bearer = match auth {
            RegistrationAuth::Token => self.token.clone().unwrap_or_default(),
            RegistrationAuth::Credential => agent.credential.clone(),
        };
        // as long as it is not known, there are none
        let tenants = *self.reported.tenants.borrow() == Some(true);
        let registration = self.registration(agent.identity, tenants);
        let body = serde_json::to_string(&registration).unwrap_or_default();
        let signature = match agent.identity.sign(body.as_bytes()) {
            Ok(signature) => signature,
            Err(e) => return (Err(RequestOutcome::Unreachable(format!("{e:#}"))), None),
        };
        let request = agent
            .http
            .request(Method::POST, "/register", &bearer)
            .header(SIGNATURE_HEADER, signature)
            .body(body);
        let (answer, offset) = agent.http.send::<Registered>(request).await;
        let outcome = answer.and_then(|r| {
            let config = (r.config != Config::default()).then(|| Box::new(r.config));
            let given = Credential {
                credential: r.credential,
                credential_expires_at: r.credential_expires_at,
            };
            let said = Some((r.cluster_id, tenants));
            self.store_credential(&mut state.credential, given, said, config)
        });
        (outcome.inspect(|o| self.publish_config(o)), offset)
    }

    async fn fetch_config(
        &self,
        state: &mut RunState,
        agent: &AgentEndpoint<'_>,
    ) -> Reply<RequestOutcome> {
        let request = agent.request(Method::GET, "/config");
        let (answer, offset) = agent.http.send::<Config>(request).await;
        if let (Ok(config), Some(stored)) = (&answer, &mut state.credential)
            && stored.config.as_ref() != Some(config)
        {
            stored.config = Some(config.clone());
            if let Err(error) = stored.store(&self.state) {
                tracing::warn!(
                    error = format!("{error:#}"),
                    "the settings are not kept over a restart"
                );
            }
        }
        let outcome = answer.map(|c| RequestOutcome::Config(Box::new(c)));
        (outcome.inspect(|o| self.publish_config(o)), offset)
    }

    async fn send_heartbeat(
        &self,
        state: &mut RunState,
        agent: &AgentEndpoint<'_>,
        status: &ControlPlaneStatus,
    ) -> Reply<RequestOutcome> {
        state.seq += 1;
        let body = serde_json::to_string(&self.heartbeat(state.seq, status)).unwrap_or_default();
        let request = agent.request(Method::POST, "/heartbeat").body(body);
        let (answer, offset) = agent.http.send::<HeartbeatAnswer>(request).await;
        (answer.map(RequestOutcome::Heartbeat), offset)
    }

    async fn rotate_credential(
        &self,
        state: &mut RunState,
        agent: &AgentEndpoint<'_>,
    ) -> Reply<RequestOutcome> {
        let request = agent.request(Method::POST, "/credential");
        let (answer, offset) = agent.http.send::<Credential>(request).await;
        let outcome = answer
            .and_then(|given| self.store_credential(&mut state.credential, given, None, None));
        (outcome, offset)
    }

    /// Stores a credential before it is used: after a crash it must be there. With one of a
    /// registration comes the id of the cluster, and whether it said that tenants can be made.
    fn store_credential(
        &self,
        stored: &mut Option<StoredCredential>,
        given: Credential,
        registered: Option<(String, bool)>,
        config: Option<Box<Config>>,
    ) -> Result<RequestOutcome, RequestOutcome> {
        if given.credential.is_empty() {
            return Err(RequestOutcome::Unreachable(
                "the answer holds no credential; is this a control plane?".into(),
            ));
        }
        let (cluster_id, tenants, facts) = match registered {
            Some((cluster_id, tenants)) => (cluster_id, Some(tenants), self.reported.facts.clone()),
            None => stored
                .as_ref()
                .map(|k| (k.cluster_id.clone(), k.tenants, k.facts.clone()))
                .unwrap_or_default(),
        };
        let last =
            config.as_deref().cloned().or_else(|| stored.as_ref().and_then(|k| k.config.clone()));
        let new = StoredCredential {
            url: self.url.clone(),
            credential: given.credential,
            expires_at: given.credential_expires_at,
            cluster_id,
            config: last,
            tenants,
            facts,
        };
        let lifetime_s = new.remaining_s(jiff::Timestamp::now());
        if let Err(error) = new.store(&self.state) {
            tracing::error!(
                error = format!("{error:#}"),
                "the credential could not be stored: it is lost with this process"
            );
        }
        *stored = Some(new);
        Ok(RequestOutcome::Credential { lifetime_s, config })
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

    fn registration(&self, identity: &Identity, tenants: bool) -> Register {
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
            capabilities: capabilities(tenants),
            max_role: self.reported.max_role.clone(),
            ..Register::default()
        }
    }

    fn heartbeat(&self, seq: u64, status: &ControlPlaneStatus) -> Heartbeat {
        let tunnel = self.reported.tunnel.borrow().clone();
        // in the control plane's time, as this clock may be wrong
        let at = |ago: Duration| {
            let now = jiff::Timestamp::now().as_second() - status.clock_offset;
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
