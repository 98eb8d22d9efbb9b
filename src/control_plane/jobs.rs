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
use super::job_refusal::passes;
use super::model::{AccessToken, JobRecord, JobRefusal, Limits};
use super::operations::{OperationRequest, Submission};
use super::registry::jobs::replayed;
use super::registry::{ClusterTarget, Principal};
use super::rollout::{RolloutRecord, RolloutState, is_code};
use super::rollouts::RolloutRequest;
use super::scope::{TokenRequest, restrict};
use super::state::ControlPlane;
use crate::base::secret::Secret;
use crate::contract::job::{
    BAD_JOB, BODY_CHANGED, CLUSTER_EXCEEDED, DELIVERY_UNKNOWN, Job, MAKER_REVOKED, PROJECT_FOREIGN,
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
    /// Why it is no job of this project, or that the database cannot be written. A refusal for good
    /// of a job whose token is genuine is on record before it is told: it is not done later.
    pub(super) async fn take_job(
        &self,
        runner: &AccessToken,
        brought: BroughtJob,
        now: i64,
    ) -> Result<Response, HttpError> {
        let claims = self.job_claims(runner, &brought)?;
        let known = self.registry().job(&claims.jti);
        // a token that comes too late says so by itself
        let is_kept = known.is_some() || claims.exp > now;
        let refusal = match self.do_job(runner, &claims, &brought, known, now).await {
            Ok(shown) => return Ok(answer(202, &shown)),
            Err(refusal) if !refusal.is_final() || !is_kept => {
                return Ok(refusal.answer(&claims.jti));
            }
            Err(refusal) => JobRefusal { at: now, ..refusal },
        };
        let record = JobRecord { refused: Some(refusal), ..record_of(&claims, None, now) };
        let record = self.registry().refuse_job(record).await?;
        Ok(match &record.refused {
            Some(refusal) => refusal.answer(&record.id),
            None => answer(202, &self.job_view(&record, now).0),
        })
    }

    async fn do_job(
        &self,
        runner: &AccessToken,
        claims: &JobClaims,
        brought: &BroughtJob,
        known: Option<JobRecord>,
        now: i64,
    ) -> Result<Value, JobRefusal> {
        if let Some(settled) = known.as_ref().and_then(|job| self.settled(job, brought, now)) {
            return settled;
        }
        if claims.exp <= now {
            return match known {
                Some(record) => self.find_at_agent(record, now).await,
                None => Err(expired().into()),
            };
        }
        let Planned { principal, mut job, target } =
            self.plan(claims, brought, known.as_ref(), now)?;
        if brought.opened.is_empty() && !job.sealed().is_empty() {
            return Ok(json!({"id": claims.jti, "state": "sealed", "sealed": true,
                "maker": claims.maker, "answered": false}));
        }
        job.open(&brought.opened)?;
        let (is_new, first) = (known.is_none(), known.map_or(now, |known| known.created_at));
        let record = record_of(claims, Some((&principal, target.as_ref())), first);
        let record = self.registry().put_job(record).await?;
        // another Runner may have brought it meanwhile
        if let Some(settled) = self.settled(&record, brought, now) {
            return settled;
        }
        match target {
            Some(target) if brought.direct && self.may_go_direct(runner, &target, now) => {
                self.direct_job(runner, &record, &principal, &target, job, now)
            }
            Some(target) => self.submit_job(&record, &principal, &target, job, is_new, now).await,
            None => self.roll_out_job(&record, &principal, job, now).await,
        }
    }

    /// What there is to say of a job for which nothing is to be done any more.
    fn settled(
        &self,
        record: &JobRecord,
        brought: &BroughtJob,
        now: i64,
    ) -> Option<Result<Value, JobRefusal>> {
        if let Some(refusal) = &record.refused {
            return Some(Err(refusal.clone()));
        }
        if record.answered_at.is_some() && !brought.redelivered {
            return Some(Err(replayed().into()));
        }
        let (shown, is_over) = self.job_view(record, now);
        let has_begun = !(shown["operation"].is_null() && shown["rollout"].is_null());
        (is_over || has_begun).then_some(Ok(shown))
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
        known: Option<&JobRecord>,
        now: i64,
    ) -> Result<Planned, JobRefusal> {
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
        let job = Job::parse(brought.message.expose().as_bytes())?;
        job.check_secrets()?;
        // the agent may have it already: a name that means another cluster by now changes nothing
        let former = known.and_then(|known| self.registry().cluster_of(&known.agent));
        let target = match &job.cluster {
            Some(name) => Some(self.job_target(&principal, former.as_ref().unwrap_or(name))?),
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
    ) -> Result<Value, JobRefusal> {
        let Job { kind, spec, ttl_s, .. } = job;
        let request = OperationRequest { kind, spec, ttl_s };
        let key = idempotency_key(&record.id);
        let (mut refusal, is_known): (JobRefusal, _) =
            match self.submit_operation(principal, target, request, Some(&key), now).await {
                Ok(Submission::Existing(_) | Submission::Created(_)) => {
                    return Ok(self.job_view(record, now).0);
                }
                Ok(Submission::Rejected(status, value)) => (rejected(status, &value), true),
                Err(error) if error.code == "database_unavailable" => return Err(error.into()),
                Err(error) => (error.into(), false),
            };
        let is_offline = refusal.code == "agent_offline";
        // then nothing was sent
        let is_away = is_offline && is_new && self.tunnel_open(&target.agent) == Some(false);
        let registry = self.registry();
        let may_pass = if is_offline {
            !is_away && registry.may_come_back(&target.agent, record.created_at, now)
        } else {
            registry.has_patience(record.created_at, now, 0)
        };
        if !passes(refusal.status) || may_pass {
            return Err(refusal);
        }
        // it would hold up what is behind it
        if is_offline {
            refusal.hint = Some("give the job a ttl_s: for so long it waits for the agent".into());
        }
        if !is_known && !is_away {
            refusal.message += ": whether it has the job is not known";
        }
        Err(JobRefusal { status: 409, ..refusal })
    }

    async fn roll_out_job(
        &self,
        record: &JobRecord,
        principal: &Principal,
        job: Job,
        now: i64,
    ) -> Result<Value, JobRefusal> {
        let Job { kind, spec, clusters, selector, all, waves, ttl_s, .. } = job;
        let request = RolloutRequest { kind, spec, clusters, selector, all, waves, ttl_s };
        let key = idempotency_key(&record.id);
        self.begin_rollout(principal, request, &key, now).await?;
        Ok(self.job_view(record, now).0)
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
    ) -> Result<Value, JobRefusal> {
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
        let (mut shown, _) = self.job_view(record, now);
        shown["direct"] = direct;
        Ok(shown)
    }

    /// A job whose token has expired since it was brought first: what the agent knows of it, where
    /// the Runner that carried it there has not lived to say so.
    async fn find_at_agent(&self, record: JobRecord, now: i64) -> Result<Value, JobRefusal> {
        // nothing was sent
        if record.agent.is_empty() {
            return Err(expired().into());
        }
        let registry = self.registry();
        let unknown = || {
            let message = "the time of the job's token is over, and the agent does not say whether \
                           it has the job";
            JobRefusal::from(HttpError::new(409, DELIVERY_UNKNOWN, message, None))
        };
        let (Some(cluster), Some(maker)) =
            (registry.cluster_of(&record.agent), registry.resolve_subject(&record.maker, now))
        else {
            return Err(unknown());
        };
        let target = registry.target(&cluster, None)?;
        let id = &record.operation;
        let told = self.call_operation(Method::GET, &maker, &target, id, now).await;
        let refusal = match told {
            Ok((StatusCode::OK, value)) => match serde_json::from_value::<Operation>(value) {
                Ok(operation) => {
                    let (mut shown, _) = self.job_view(&record, now);
                    shown["state"] = operation.state.name().into();
                    shown["operation"] = operation_view(operation, &target.cluster);
                    return Ok(shown);
                }
                Err(_) => unknown(),
            },
            Ok((StatusCode::NOT_FOUND, _)) => return Err(expired().into()),
            Ok((status, value)) => rejected(status, &value),
            Err(error) => error.into(),
        };
        let may_pass = passes(refusal.status) && registry.has_patience(record.expires_at, now, 0);
        Err(if may_pass { refusal } else { unknown() })
    }

    /// A job as its Runner may see it, and whether nothing more comes of it by itself.
    pub(super) fn job_view(&self, record: &JobRecord, now: i64) -> (Value, bool) {
        let registry = self.registry();
        let answered = record.answered_at.is_some();
        let mut shown = json!({"id": record.id, "state": "running", "answered": answered});
        if let Some(refusal) = &record.refused {
            shown["state"] = "refused".into();
            shown["reason"] = refusal.code.as_str().into();
            shown["message"] = refusal.message.as_str().into();
            return (shown, true);
        }
        if let Some(rollout) = record.rollout.as_ref().and_then(|id| registry.rollout(id)) {
            // one that is paused waits for somebody, and what is behind it shall not
            let has_ended = rollout.state != RolloutState::Running;
            shown["state"] = json!(rollout.state);
            shown["rollout"] = rollout.view(true);
            return (shown, has_ended);
        }
        let known = registry.operation(&record.agent, &record.operation);
        let mut known = known.map(|known| known.operation);
        if known.is_none() && answered {
            shown["state"] = OperationState::Unknown.name().into();
            return (shown, true);
        }
        let state = known.as_ref().map_or(OperationState::Running, |operation| operation.state);
        if !record.agent.is_empty()
            && let Some((state, reason, message)) = registry.lost(&record.agent, state, now)
        {
            known = Some(Operation {
                id: record.operation.clone(),
                state,
                reason: reason.into(),
                message: message.into(),
                ..known.unwrap_or_default()
            });
        }
        let Some(operation) = known else { return (shown, false) };
        let is_over = operation.state.ended();
        shown["state"] = operation.state.name().into();
        let cluster = registry.cluster_of(&record.agent).unwrap_or_default();
        shown["operation"] = operation_view(operation, &cluster);
        (shown, is_over)
    }
}

/// What is kept of a job; without who does it and where, of one that is refused.
fn record_of(
    claims: &JobClaims,
    planned: Option<(&Principal, Option<&ClusterTarget>)>,
    now: i64,
) -> JobRecord {
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
        refused: None,
    };
    let key = idempotency_key(&record.id);
    match planned {
        Some((principal, Some(target))) => {
            record.agent.clone_from(&target.agent);
            record.operation = tenant_operation_id(&principal.subject(), principal.tenant(), &key);
        }
        Some((principal, None)) => {
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
fn rejected(status: StatusCode, value: &Value) -> JobRefusal {
    // a 401 would say that the Runner is nobody any more
    if status == StatusCode::UNAUTHORIZED {
        let hint = Some("compare the clocks of the node and of the control plane");
        let message = "the agent refuses the caller of the job";
        return HttpError::new(503, "agent_unready", message, hint).into();
    }
    let code = value["code"].as_str().filter(|code| is_code(code)).unwrap_or("refused").to_owned();
    let message = format!("the agent refuses it: {code}");
    // a path that the agent does not know is none that the control plane lacks
    let status = if status == StatusCode::NOT_FOUND { 409 } else { status.as_u16() };
    JobRefusal { status, code, message, hint: None, at: 0 }
}
