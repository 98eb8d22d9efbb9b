//! Rollouts: begun, and driven to their ends. Each operation goes the way of one that is asked for
//! by itself, as the principal that asked for the rollout.

use std::collections::BTreeSet;
use std::sync::Arc;

use serde::Deserialize;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use super::error::{HttpError, database_unavailable};
use super::operations::{MAX_TTL, OperationRequest, Submission};
use super::registry::rollouts::{Sent, check_same};
use super::registry::{ClusterView, Principal, parse_selector};
use super::rollout::{
    DELIVERY_UNKNOWN, RolloutCluster, RolloutRecord, RolloutState, is_code, waves,
};
use super::scope::{TokenRequest, checked_ttl, restrict};
use super::state::ControlPlane;
use crate::base::encoding::hex;
use crate::base::json;
use crate::base::text::printable;
use crate::contract::token::Role;
use crate::contract::types::{OperationState, check_idempotency_key};

/// An agent that is busy is asked again for so long at least, seconds.
const BUSY: i64 = 600;
/// The most clusters of one rollout.
const MAX_CLUSTERS: usize = 2000;

/// What is asked for, and of which clusters: one of `clusters`, `selector` and `all`.
#[derive(Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub(super) struct RolloutRequest {
    /// As of an operation.
    pub(super) kind: String,
    pub(super) spec: Value,
    /// Names or ids.
    pub(super) clusters: Option<Vec<String>>,
    /// As `kubectl get --selector` takes it.
    pub(super) selector: Option<String>,
    /// All clusters within reach.
    #[serde(default)]
    pub(super) all: bool,
    /// How many clusters at a time, `1,10%,all`: each a number, a part of all, or the rest.
    pub(super) waves: Option<String>,
    /// How long an operation may wait for an agent that is not there. Without it, it fails.
    pub(super) ttl_s: Option<i64>,
}

fn bad_rollout(message: impl Into<String>) -> HttpError {
    let hint = "say which clusters: `clusters`, a list of names or ids, or `selector`; for all \
                that the token reaches: `all`, --all-clusters";
    HttpError::new(400, "bad_rollout", message, Some(hint))
}

impl ControlPlane {
    /// Begins a rollout as `principal`, whose limits it keeps. Under the same key it is the same
    /// one: true where it is new.
    ///
    /// # Errors
    /// 400 for a request that says nothing sensible, 403 for a viewer, 404 for a cluster that is
    /// not within reach, 409 for a key that was used for something else, 429 for one too many.
    pub(super) async fn begin_rollout(
        &self,
        principal: &Principal,
        request: RolloutRequest,
        key: &str,
        now: i64,
    ) -> Result<(Arc<RolloutRecord>, bool), HttpError> {
        let key = check_idempotency_key(Some(key))
            .map_err(|why| HttpError::new(400, "idempotency_key_needed", why, None))?;
        if restrict(principal, &TokenRequest::default())?.role < Role::Deployer {
            return Err(HttpError::new(403, "role_exceeded", "a viewer changes nothing", None));
        }
        if !is_code(&request.kind) {
            let message = "`kind` is that of an operation: restart, deploy and others";
            return Err(HttpError::new(400, "bad_rollout", message, None));
        }
        let ttl_s = request.ttl_s;
        ttl_s.map(|ttl| checked_ttl(Some(ttl), MAX_TTL, MAX_TTL)).transpose()?;
        let waves = request.waves.as_deref().unwrap_or("all");
        check_waves(waves, MAX_CLUSTERS)?;
        let asked = json!([
            request.kind,
            request.spec,
            request.clusters,
            request.selector,
            request.all,
            waves,
            ttl_s
        ]);
        let (limits, digest) = (principal.limits(), hex(&Sha256::digest(asked.to_string())));
        let id = RolloutRecord::id_of(&principal.id(), limits.as_ref(), key);
        if let Some(known) = self.registry().rollout(&id) {
            check_same(&known, &digest)?;
            return Ok((known, false));
        }
        let (mut clusters, project) = self.rollout_clusters(principal, &request, now)?;
        let sizes = check_waves(waves, clusters.len())?;
        let numbers = sizes.iter().enumerate().flat_map(|(n, size)| vec![n + 1; *size]);
        for (cluster, wave) in clusters.iter_mut().zip(numbers) {
            cluster.wave = wave;
        }
        let body = json!({"kind": request.kind, "spec": request.spec}).to_string();
        let sealed = self.keys().seal(&body).map_err(|e| database_unavailable(&e))?;
        let record = RolloutRecord {
            id,
            project,
            caller_id: principal.id(),
            subject: principal.subject(),
            limits,
            kind: request.kind,
            request: digest,
            sealed: Some(sealed),
            ttl_s,
            state: RolloutState::Running,
            message: String::new(),
            created_at: now,
            finished_at: None,
            paused_at: None,
            clusters,
        };
        let (record, is_new) = self.registry().add_rollout(record).await?;
        self.drive_rollout(&record.id, now).await;
        Ok((self.registry().rollout(&record.id).unwrap_or(record), is_new))
    }

    /// The clusters that are asked for, and the project that they are of.
    fn rollout_clusters(
        &self,
        principal: &Principal,
        request: &RolloutRequest,
        now: i64,
    ) -> Result<(Vec<RolloutCluster>, String), HttpError> {
        let registry = self.registry();
        let targets = [request.clusters.is_some(), request.selector.is_some(), request.all];
        if targets.into_iter().filter(|given| *given).count() != 1 {
            return Err(bad_rollout("a rollout takes one of `clusters`, `selector` and `all`"));
        }
        let selector = request.selector.as_deref().map(parse_selector).transpose()?;
        let many =
            |many: usize| bad_rollout(format!("{many} clusters: {MAX_CLUSTERS} are the most"));
        let meant = match &request.clusters {
            Some(list) if list.len() > MAX_CLUSTERS => return Err(many(list.len())),
            Some(list) if list.is_empty() => {
                return Err(bad_rollout("`clusters` names no cluster"));
            }
            Some(list) => registry.named(principal, list, now)?,
            None => registry.meant(principal, selector.as_ref(), now),
        };
        if meant.len() > MAX_CLUSTERS {
            return Err(many(meant.len()));
        }
        let (mut seen, mut clusters) = (BTreeSet::new(), Vec::new());
        let mut projects = BTreeSet::new();
        for ClusterView { id, name, project, agent_id, .. } in meant {
            if seen.insert(id.clone()) {
                projects.insert(project);
                clusters.push(RolloutCluster {
                    id,
                    name,
                    agent: agent_id,
                    wave: 1,
                    operation: String::new(),
                    sent_at: 0,
                    state: None,
                    reason: String::new(),
                    message: String::new(),
                });
            }
        }
        if clusters.is_empty() {
            let message = match &request.selector {
                Some(text) => format!("no cluster matches `{}`", printable(text)),
                None => "this token reaches no cluster".into(),
            };
            let hint = "`pipeops clusters` lists those within reach, with their labels";
            return Err(HttpError::new(400, "no_cluster_matches", message, Some(hint)));
        }
        let project = if projects.len() == 1 { projects.pop_first() } else { None };
        Ok((clusters, project.unwrap_or_default()))
    }

    /// Brings all rollouts as far as they go now.
    pub(super) async fn drive_rollouts(&self, now: i64) {
        for id in self.registry().active_rollouts(now) {
            self.drive_rollout(&id, now).await;
        }
    }

    /// Brings a rollout as far as it goes now. What fails is tried again by the next call.
    pub(super) async fn drive_rollout(&self, id: &str, now: i64) {
        let registry = self.registry();
        let away = registry.rollout(id).map(|record| self.away(&record, now)).unwrap_or_default();
        let (record, steps) = match registry.advance_rollout(id, &away, now).await {
            Ok(advanced) => advanced,
            Err(error) => {
                tracing::warn!(error = error.message, rollout = id, "a rollout does not go on");
                return;
            }
        };
        for cluster in record.clusters.iter().filter(|cluster| steps.send.contains(&cluster.id)) {
            let (control_plane, record, cluster) = (self.clone(), record.clone(), cluster.clone());
            tokio::spawn(async move {
                let sent = control_plane.send(&record, &cluster, now).await;
                control_plane.registry().end_sending(&record.id, &cluster.id, sent);
            });
        }
        if !steps.cancel.is_empty() {
            let cancel: BTreeSet<String> = steps.cancel.into_iter().collect();
            let cancel = record.clusters.iter().filter(|cluster| cancel.contains(&cluster.id));
            let keys = cancel.map(|c| (c.agent.clone(), c.operation.clone())).collect();
            // one that is being handed over is cancelled next time, or runs
            let why = "its rollout was cancelled before the agent had it";
            if let Err(error) = registry.cancel_all_queued(keys, why, now).await {
                tracing::warn!(error = error.message, rollout = id, "what waits is not cancelled");
            }
        }
    }

    /// Agents of queued operations that are not there to take them.
    fn away(&self, record: &RolloutRecord, now: i64) -> BTreeSet<String> {
        let is_away = |agent: &String| match self.tunnel_open(agent) {
            Some(open) => !open,
            // with an external FRP server the heartbeats are all that is known
            None => !self.registry().is_online(agent, now),
        };
        let queued = record.clusters.iter().filter(|c| c.state == Some(OperationState::Queued));
        queued.map(|cluster| cluster.agent.clone()).filter(is_away).collect()
    }

    /// Asks for the operation of a cluster, as the principal that asked for the rollout.
    async fn send(&self, record: &RolloutRecord, cluster: &RolloutCluster, now: i64) -> Sent {
        let registry = self.registry();
        let refused = |reason: &str, message: &str| Sent::Refused(reason.into(), message.into());
        let body = record.sealed.as_deref().and_then(|sealed| self.keys().unseal(sealed).ok());
        let request = body.and_then(|body| json::read(body.expose()).ok());
        let Some(OperationRequest { kind, spec, .. }) = request else {
            return refused(
                "sealed_foreign",
                "it was kept under other keys than this control plane's",
            );
        };
        // revoked, or removed: the next look at the rollout says so
        let Some(principal) = registry.resolve(&record.caller_id, record.limits.as_ref(), now)
        else {
            return Sent::Maybe;
        };
        if let Principal::AccessToken(access) = &principal
            && registry.check_access(access, &cluster.id).is_err()
        {
            return refused(
                "out_of_reach",
                "the cluster is not within the caller's reach any more",
            );
        }
        let Ok(target) = registry.target(&cluster.id, principal.project()) else {
            return Sent::Maybe;
        };
        let own_time = spec["timeout_s"].as_i64().unwrap_or(0).clamp(0, MAX_TTL);
        let busy = BUSY.max(own_time).max(record.ttl_s.unwrap_or(0));
        let request = OperationRequest { kind, spec, ttl_s: record.ttl_s };
        let key = record.key_of(&cluster.id);
        match self.submit_operation(&principal, &target, request, Some(&key), now).await {
            Ok(Submission::Existing(_) | Submission::Created(_)) => Sent::Maybe,
            Ok(Submission::Rejected(status, value)) => {
                // the agent's message may quote the request, and is shown to others than the caller
                let code = value["code"].as_str().filter(|code| is_code(code)).unwrap_or("refused");
                let message = format!("the agent refuses it: {code}");
                if self.is_asked_again(status.as_u16(), code, cluster, (busy, now)) {
                    return Sent::Maybe;
                }
                refused(code, &message)
            }
            Err(error) => {
                let HttpError { status, code, message, lost, .. } = error;
                if self.is_asked_again(status, code, cluster, (busy, now)) {
                    // what could not be stored the agent may have, too
                    let is_lost = lost || code == "database_unavailable";
                    return if is_lost { Sent::Lost } else { Sent::Maybe };
                }
                let is_silence = status >= 500;
                if lost || (is_silence && registry.may_have_arrived(&record.id, cluster)) {
                    let message = "no answer of the agent came: whether it has received this is \
                                   not known";
                    return refused(DELIVERY_UNKNOWN, message);
                }
                refused(code, &message)
            }
        }
    }

    /// Whether an answer does not stand, and the same is asked again in a moment; of an agent that
    /// is busy, for `busy` seconds.
    fn is_asked_again(
        &self,
        status: u16,
        code: &str,
        cluster: &RolloutCluster,
        (busy, now): (i64, i64),
    ) -> bool {
        let registry = self.registry();
        match (status, code) {
            (_, "database_unavailable") => true,
            (_, "agent_offline") => registry.may_come_back(&cluster.agent, cluster.sent_at, now),
            (429, _) => registry.has_patience(cluster.sent_at, now, busy),
            // 401: the clocks differ at the moment, or its keys are not there yet
            (401 | 408 | 500.., _) => registry.has_patience(cluster.sent_at, now, 0),
            _ => false,
        }
    }
}

fn check_waves(text: &str, clusters: usize) -> Result<Vec<usize>, HttpError> {
    let hint = "as in 1,10%,all: a number of clusters, a part of all, the rest";
    waves::sizes(text, clusters).map_err(|why| HttpError::new(400, "bad_waves", why, Some(hint)))
}
