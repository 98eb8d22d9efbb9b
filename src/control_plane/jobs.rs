//! Jobs: what a Runner brings is checked against its token, and done with the rights that this
//! gives. See [`crate::contract::job`].

use std::collections::BTreeMap;

use axum::response::Response;
use http::{Method, StatusCode};
use serde::Deserialize;
use serde_json::{Value, json};

use super::answer::answer;
use super::caller_token::CallerTokenRequest;
use super::error::HttpError;
use super::model::{AccessToken, JobRecord, Limits};
use super::operations::{OperationRequest, Submission};
use super::registry::jobs::replayed;
use super::registry::{ClusterTarget, Principal};
use super::rollout::{RolloutRecord, RolloutState};
use super::rollouts::{RolloutRequest, is_code};
use super::scope::{TokenRequest, restrict};
use super::state::ControlPlane;
use crate::base::secret::Secret;
use crate::contract::job::{
    BAD_JOB, BODY_CHANGED, CLUSTER_EXCEEDED, Job, MAKER_REVOKED, PROJECT_FOREIGN, Refusal,
    TOKEN_EXPIRED, TOKEN_FORGED, body_digest, idempotency_key,
};
use crate::contract::token::job::{JobClaims, verify};
use crate::contract::token::{TOKEN_LIFETIME, only_operation};
use crate::contract::types::{Operation, OperationState, tenant_operation_id};

/// A job as a Runner brings it.
#[derive(Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub(super) struct BroughtJob {
    #[cfg_attr(test, schemars(with = "String"))]
    token: Secret,
    /// The body of the message.
    #[cfg_attr(test, schemars(with = "String"))]
    message: Secret,
    /// By sealed text, what it says.
    #[cfg_attr(test, schemars(with = "BTreeMap<String, String>"))]
    #[serde(default)]
    opened: BTreeMap<String, Secret>,
    /// Another Runner may have had it before.
    #[serde(default)]
    redelivered: bool,
    /// The Runner would carry it to the agent itself.
    #[serde(default)]
    direct: bool,
}

/// A job that may be done: as whom, what, and where unless it is a rollout.
struct Planned {
    principal: Principal,
    job: Job,
    target: Option<ClusterTarget>,
}

impl From<Refusal> for HttpError {
    fn from(refusal: Refusal) -> HttpError {
        HttpError::new(400, refusal.code, refusal.message, None)
    }
}

fn forbidden(code: &'static str, message: &str) -> HttpError {
    HttpError::new(403, code, message, None)
}

fn expired() -> HttpError {
    forbidden(TOKEN_EXPIRED, "the time of the job's token is over")
}

pub(super) fn bad_job(message: impl Into<String>) -> HttpError {
    HttpError::new(400, BAD_JOB, message, None)
}

impl ControlPlane {
    /// Does what a Runner brings, or says what has become of it.
    ///
    /// # Errors
    /// Why it is refused. A job whose token is good is on record from then on, also one that is
    /// refused: it can be answered, and is not done later.
    pub(super) async fn take_job(
        &self,
        runner: &AccessToken,
        brought: BroughtJob,
        now: i64,
    ) -> Result<Response, HttpError> {
        let claims = self.job_claims(runner, &brought)?;
        let registry = self.registry();
        let known = registry.job(&claims.jti);
        if let Some(record) = &known {
            if record.answered_at.is_some() && !brought.redelivered {
                return Err(replayed());
            }
            let (shown, _) = self.job_view(record);
            let has_begun = !(shown["operation"].is_null() && shown["rollout"].is_null());
            if record.answered_at.is_some() || has_begun {
                return Ok(answer(202, &shown));
            }
        }
        if claims.exp <= now {
            return match known {
                Some(record) => self.find_at_agent(record, now).await,
                None => Err(expired()),
            };
        }
        let (direct, is_new) = (brought.direct, known.is_none());
        let planned = self.plan(&claims, &brought, now);
        let record = match (&planned, known) {
            // what was known of it stays known
            (Err(_), Some(known)) => known,
            (planned, known) => {
                let first = known.map_or(now, |known| known.created_at);
                record_of(&claims, planned.as_ref().ok(), first)
            }
        };
        registry.put_job(record.clone()).await?;
        let Planned { principal, job, target } = planned?;
        match target {
            Some(target) if direct && self.may_go_direct(runner, &target, now) => {
                self.direct_job(runner, &record, &principal, &target, job, now)
            }
            Some(target) => self.submit_job(&record, &principal, &target, job, is_new, now).await,
            None => self.roll_out_job(&record, &principal, job, now).await,
        }
    }

    /// What the token of a job says, if it is one, of this project, and for this body.
    fn job_claims(
        &self,
        runner: &AccessToken,
        brought: &BroughtJob,
    ) -> Result<JobClaims, HttpError> {
        let claims = verify(brought.token.expose(), &self.keys().jwks(), &self.issuer())
            .map_err(|why| forbidden(TOKEN_FORGED, why))?;
        if claims.project != runner.project {
            return Err(forbidden(PROJECT_FOREIGN, "the job is of another project"));
        }
        if claims.hash != body_digest(brought.message.expose().as_bytes()) {
            return Err(forbidden(BODY_CHANGED, "the job's token is for another body"));
        }
        Ok(claims)
    }

    fn plan(
        &self,
        claims: &JobClaims,
        brought: &BroughtJob,
        now: i64,
    ) -> Result<Planned, HttpError> {
        let maker = self.registry().resolve_subject(&claims.maker, now);
        let maker = maker.filter(|maker| maker.project().is_some()).ok_or_else(|| {
            forbidden(MAKER_REVOKED, "who made the job may not do anything any more")
        })?;
        let limits = Limits {
            project: claims.project.clone(),
            role: claims.role,
            clusters: claims.clusters.clone(),
            namespaces: claims.namespaces.clone(),
            tenant: claims.tenant.clone(),
        };
        let principal = maker.within(&limits).ok_or_else(|| {
            forbidden(MAKER_REVOKED, "who made the job may do less than when it was made")
        })?;
        let mut job = Job::parse(brought.message.expose().as_bytes())?;
        job.check_secrets()?;
        job.open(&brought.opened)?;
        let target = match &job.cluster {
            Some(name) => Some(self.job_target(&principal, name)?),
            None => {
                for name in job.clusters.iter().flatten() {
                    self.job_target(&principal, name)?;
                }
                None
            }
        };
        Ok(Planned { principal, job, target })
    }

    /// A cluster of the project that the job may reach.
    fn job_target(&self, principal: &Principal, name: &str) -> Result<ClusterTarget, HttpError> {
        // it is quoted where there is none
        if name.len() > 253 {
            return Err(bad_job("a cluster's name has 253 characters at most"));
        }
        let target = self.registry().target(name, principal.project())?;
        if let Principal::AccessToken(access) = principal
            && self.registry().check_access(access, &target.cluster).is_err()
        {
            return Err(forbidden(CLUSTER_EXCEEDED, "the job's token is not for this cluster"));
        }
        Ok(target)
    }

    async fn submit_job(
        &self,
        record: &JobRecord,
        principal: &Principal,
        target: &ClusterTarget,
        job: Job,
        is_new: bool,
        now: i64,
    ) -> Result<Response, HttpError> {
        let Job { kind, spec, ttl_s, .. } = job;
        let request = OperationRequest { kind, spec, ttl_s };
        let key = idempotency_key(&record.id);
        match self.submit_operation(principal, target, request, Some(&key), now).await {
            Ok(Submission::Existing(_) | Submission::Created(_)) => {
                Ok(answer(202, &self.job_view(record).0))
            }
            Ok(Submission::Rejected(status, value)) => rejected(status, &value),
            Err(error) if error.code == "agent_offline" && ttl_s.is_none() => {
                let registry = self.registry();
                // then nothing was sent
                let is_away = is_new && self.tunnel_open(&target.agent) == Some(false);
                if !is_away && registry.may_come_back(&target.agent, record.created_at, now) {
                    return Err(error);
                }
                // it would hold up what is behind it
                let hint = Some("give the job a ttl_s: for so long it waits for the agent");
                let message = if is_away {
                    error.message
                } else {
                    "the agent does not answer any more: whether it has the job is not known".into()
                };
                Err(HttpError { status: 409, message, hint, ..error })
            }
            Err(error) => Err(error),
        }
    }

    async fn roll_out_job(
        &self,
        record: &JobRecord,
        principal: &Principal,
        job: Job,
        now: i64,
    ) -> Result<Response, HttpError> {
        let Job { kind, spec, clusters, selector, all, waves, ttl_s, .. } = job;
        let request = RolloutRequest { kind, spec, clusters, selector, all, waves, ttl_s };
        let key = idempotency_key(&record.id);
        self.begin_rollout(principal, request, &key, now).await?;
        Ok(answer(202, &self.job_view(record).0))
    }

    /// Whether a Runner reaches an agent itself, and the agent takes a token for one operation.
    fn may_go_direct(&self, runner: &AccessToken, target: &ClusterTarget, now: i64) -> bool {
        let registry = self.registry();
        let is_there = self.tunnel_open(&target.agent);
        target.operation_tokens
            && registry.check_access(runner, &target.cluster).is_ok()
            && is_there.unwrap_or_else(|| registry.is_online(&target.agent, now))
    }

    /// All that the Runner needs to carry a job to the agent: a token for this operation alone, and
    /// its own way in.
    fn direct_job(
        &self,
        runner: &AccessToken,
        record: &JobRecord,
        principal: &Principal,
        target: &ClusterTarget,
        job: Job,
        now: i64,
    ) -> Result<Response, HttpError> {
        let body = json!({"kind": job.kind, "spec": job.spec}).to_string();
        let only = only_operation(&record.operation, &body_digest(body.as_bytes()));
        let request = CallerTokenRequest {
            principal,
            target,
            scope: restrict(principal, &TokenRequest::default())?,
            ttl: TOKEN_LIFETIME,
            now,
            operation: Some(only),
        };
        let visitor = Principal::AccessToken(Box::new(runner.clone()));
        let mut direct = json!(self.runner_token(&request, &visitor)?);
        direct["key"] = idempotency_key(&record.id).into();
        direct["cluster_id"] = target.cluster.as_str().into();
        direct["operation_id"] = record.operation.as_str().into();
        direct["body"] = body.into();
        let (mut shown, _) = self.job_view(record);
        shown["direct"] = direct;
        Ok(answer(202, &shown))
    }

    /// A job whose token has expired since it was brought first: what the agent knows of it, where
    /// the Runner that carried it there has not lived to say so.
    async fn find_at_agent(&self, record: JobRecord, now: i64) -> Result<Response, HttpError> {
        let registry = self.registry();
        let (Some(cluster), Some(maker)) =
            (registry.cluster_of(&record.agent), registry.resolve_subject(&record.maker, now))
        else {
            return Err(expired());
        };
        let target = registry.target(&cluster, None)?;
        let id = &record.operation;
        let told = self.call_operation(Method::GET, &maker, &target, id, now).await;
        let (status, value) = match told {
            Err(error) if registry.has_patience(record.expires_at, now) => return Err(error),
            told => told.map_err(|_| expired())?,
        };
        match (status, serde_json::from_value::<Operation>(value)) {
            (StatusCode::OK, Ok(operation)) => {
                let (mut shown, _) = self.job_view(&record);
                shown["state"] = operation.state.name().into();
                shown["operation"] = operation_view(operation, &target.cluster);
                Ok(answer(202, &shown))
            }
            _ => Err(expired()),
        }
    }

    /// A job as its Runner may see it, and whether nothing more comes of it by itself.
    pub(super) fn job_view(&self, record: &JobRecord) -> (Value, bool) {
        let registry = self.registry();
        let answered = record.answered_at.is_some();
        let mut shown = json!({"id": record.id, "state": "running", "answered": answered});
        if let Some(rollout) = record.rollout.as_ref().and_then(|id| registry.rollout(id)) {
            // one that is paused waits for somebody, and what is behind it shall not
            let has_ended = rollout.state != RolloutState::Running;
            shown["state"] = json!(rollout.state);
            shown["rollout"] = rollout.view(true);
            return (shown, has_ended);
        }
        if let Some(known) = registry.operation(&record.agent, &record.operation) {
            let has_ended = known.operation.state.ended();
            shown["state"] = known.operation.state.name().into();
            let cluster = registry.cluster_of(&record.agent).unwrap_or_default();
            shown["operation"] = operation_view(known.operation, &cluster);
            return (shown, has_ended);
        }
        if answered {
            shown["state"] = OperationState::Unknown.name().into();
        }
        (shown, answered)
    }
}

fn record_of(claims: &JobClaims, planned: Option<&Planned>, now: i64) -> JobRecord {
    let mut record = JobRecord {
        id: claims.jti.clone(),
        project: claims.project.clone(),
        maker: claims.maker.clone(),
        agent: String::new(),
        operation: String::new(),
        rollout: None,
        created_at: now,
        expires_at: claims.exp,
        answered_at: None,
    };
    let key = idempotency_key(&record.id);
    match planned {
        Some(Planned { principal, target: Some(target), .. }) => {
            record.agent.clone_from(&target.agent);
            record.operation = tenant_operation_id(&principal.subject(), principal.tenant(), &key);
        }
        Some(Planned { principal, target: None, .. }) => {
            let limits = principal.limits();
            record.rollout = Some(RolloutRecord::id_of(&principal.id(), limits.as_ref(), &key));
        }
        None => {}
    }
    record
}

/// An operation in an answer: readers of a project's queue may be more than those who may read what
/// its containers print.
fn operation_view(operation: Operation, cluster: &str) -> Value {
    let mut shown = json!(Operation { log: Vec::new(), ..operation });
    shown["cluster_id"] = cluster.into();
    shown
}

/// What an agent says to a job. Its message may quote the spec, and what was sealed in it.
fn rejected(status: StatusCode, value: &Value) -> Result<Response, HttpError> {
    // a 401 would say that the Runner is nobody any more
    if status == StatusCode::UNAUTHORIZED {
        let hint = Some("compare the clocks of the node and of the control plane");
        let message = "the agent refuses the caller of the job";
        return Err(HttpError::new(503, "agent_unready", message, hint));
    }
    let code = value["code"].as_str().filter(|code| is_code(code)).unwrap_or("refused");
    let message = format!("the agent refuses it: {code}");
    Ok(answer(status.as_u16(), &json!({"code": code, "message": message})))
}
