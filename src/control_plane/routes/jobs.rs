//! Jobs: tokens for who makes them, and what Runners bring. The key that values are sealed to.

use std::pin::pin;
use std::time::Duration;

use axum::extract::State;
use axum::response::{IntoResponse as _, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::{StatusCode, Uri};
use serde::Deserialize;
use serde_json::json;
use tokio::time::{Instant, sleep};

use super::Routes;
use crate::base::json;
use crate::base::text::valueless_json_error;
use crate::contract::job::{BAD_JOB, PROJECT_FOREIGN};
use crate::control_plane::answer::answer;
use crate::control_plane::auth::{AdminCaller, JobsCaller, RunnerCaller};
use crate::control_plane::body::{JobBody, JsonBody, PathSegments, RawBody};
use crate::control_plane::clock::now;
use crate::control_plane::error::HttpError;
use crate::control_plane::job_tokens::{JobTokenRequest, project_needed};
use crate::control_plane::jobs::BroughtJob;
use crate::control_plane::registry::jobs::job_unknown;
use crate::control_plane::state::ControlPlane;

/// Longest time that a call waits for the end of a job, seconds.
const MAX_WAIT: u64 = 60;
/// How often a call that waits looks whether its caller is still somebody.
const TICK: Duration = Duration::from_secs(1);

/// What values in jobs are sealed to.
#[derive(Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub(super) struct SealingKey {
    /// Base64 of the 32 bytes of an X25519 key.
    public_key: String,
    /// Id of the project that it is meant for.
    project: Option<String>,
}

pub(super) fn routes(routes: Routes) -> Routes {
    routes
        .post("/api/v1/job-tokens", issue)
        .post("/api/v1/jobs", take)
        .get("/api/v1/jobs/{id}", show)
        .post("/api/v1/jobs/{id}/answered", answered)
        .get("/api/v1/sealing-key", sealing_key)
        .put("/api/v1/sealing-key", set_sealing_key)
        .delete("/api/v1/projects/{id}/sealing-key", reset_sealing_key)
}

async fn issue(
    caller: RunnerCaller,
    State(control_plane): State<ControlPlane>,
    JsonBody(request): JsonBody<JobTokenRequest>,
) -> Result<Response, HttpError> {
    Ok(answer(201, &control_plane.issue_job_token(&caller.principal, request, now())?))
}

async fn take(
    caller: JobsCaller,
    State(control_plane): State<ControlPlane>,
    JobBody(bytes): JobBody,
) -> Result<Response, HttpError> {
    let brought: BroughtJob = json::read(&bytes).map_err(|e| {
        let why = valueless_json_error(&e);
        HttpError::new(400, BAD_JOB, format!("this call brings no job: {why}"), None)
    })?;
    control_plane.take_job(&caller.access, brought, now()).await
}

/// With `?wait_s` when nothing more comes of it, or after that time.
async fn show(
    caller: JobsCaller,
    State(control_plane): State<ControlPlane>,
    PathSegments([id]): PathSegments<1>,
    uri: Uri,
) -> Result<Response, HttpError> {
    let wait_s = match parameter(&uri, "wait_s") {
        Some(text) => {
            text.parse::<u64>().ok().filter(|wait| *wait <= MAX_WAIT).ok_or_else(|| {
                HttpError::new(400, "bad_wait", format!("wait_s is 0 to {MAX_WAIT}"), None)
            })?
        }
        None => 0,
    };
    let end = Instant::now() + Duration::from_secs(wait_s);
    let registry = control_plane.registry();
    loop {
        // what ends from here on is not missed
        let mut ended = pin!(registry.operation_ended());
        registry.authenticate(&caller.token, now())?;
        let record = registry.job(&id).filter(|job| job.project == caller.access.project);
        let (shown, is_over) =
            control_plane.job_view(&record.ok_or_else(|| job_unknown(&id))?, now());
        let left = end.saturating_duration_since(Instant::now());
        if is_over || left.is_zero() {
            return Ok(answer(200, &shown));
        }
        tokio::select! {
            () = &mut ended => {}
            () = sleep(left.min(TICK)) => {}
            () = control_plane.inner.shutdown.cancelled() => return Ok(answer(200, &shown)),
        }
    }
}

async fn answered(
    caller: JobsCaller,
    State(control_plane): State<ControlPlane>,
    PathSegments([id]): PathSegments<1>,
    _: RawBody,
) -> Result<Response, HttpError> {
    control_plane.registry().answer_job(&id, &caller.access.project, now()).await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

async fn sealing_key(
    caller: RunnerCaller,
    State(control_plane): State<ControlPlane>,
) -> Result<Response, HttpError> {
    let project = caller.principal.project().ok_or_else(project_needed)?;
    let project = control_plane.registry().project(project)?;
    let key = project.sealing_key.ok_or_else(|| {
        let message = "no Runner of this project has told its sealing key yet";
        HttpError::new(404, "not_found", message, Some("start one: pipeops runner"))
    })?;
    let maker = caller.principal.id();
    Ok(answer(200, &json!({"public_key": key, "project": project.id, "maker": maker})))
}

async fn set_sealing_key(
    caller: JobsCaller,
    State(control_plane): State<ControlPlane>,
    JsonBody(request): JsonBody<SealingKey>,
) -> Result<Response, HttpError> {
    let bytes = STANDARD.decode(&request.public_key).ok().filter(|bytes| bytes.len() == 32);
    let bytes = bytes.ok_or_else(|| {
        HttpError::new(400, "bad_key", "public_key is the base64 of 32 bytes", None)
    })?;
    let project = &caller.access.project;
    if request.project.is_some_and(|meant| meant != *project) {
        let message = format!("the token is of project {project}");
        let hint = Some("give the Runner the token of a Runner of its project");
        return Err(HttpError::new(409, PROJECT_FOREIGN, message, hint));
    }
    let key = STANDARD.encode(bytes);
    control_plane.registry().set_sealing_key(project, Some(&key)).await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

/// Administrators only: who puts another key in its place reads what is sealed next.
async fn reset_sealing_key(
    _: AdminCaller,
    State(control_plane): State<ControlPlane>,
    PathSegments([project]): PathSegments<1>,
    _: RawBody,
) -> Result<Response, HttpError> {
    let registry = control_plane.registry();
    let project = registry.project(&project)?.id;
    registry.set_sealing_key(&project, None).await?;
    tracing::warn!(project, "the sealing key is forgotten: the next Runner tells it");
    Ok(answer(200, &json!({})))
}

fn parameter(uri: &Uri, name: &str) -> Option<String> {
    let query = uri.query().unwrap_or_default();
    let mut pairs = url::form_urlencoded::parse(query.as_bytes());
    pairs.find(|(key, _)| key == name).map(|(_, value)| value.into_owned())
}
