//! Answers: JSON, text, and errors in the format that the caller expects.

use axum::body::Body;
use axum::response::{IntoResponse, Response};
use http::{HeaderValue, StatusCode, header};
use serde::Serialize;

use super::error::HttpError;
use crate::kubernetes::answer::{ApiError, is_discovery};

pub(super) fn answer(status: u16, body: &impl Serialize) -> Response {
    uncached(status, "application/json", serde_json::to_vec(body).unwrap_or_default())
}

/// An answer that is not cached.
pub(super) fn uncached(status: u16, kind: &'static str, body: impl Into<Body>) -> Response {
    let mut answer = Response::new(body.into());
    *answer.status_mut() =
        StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    answer.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    answer.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    answer
}

/// The answer to a request for `path` that failed. Below a cluster's `/k8s` the caller is a client
/// of Kubernetes and gets no `Retry-After`: it would retry silently for most of a minute. Other
/// callers get one.
pub(super) fn error_answer(error: HttpError, path: &str) -> Response {
    let Some(discovery) = below_k8s(path) else { return error.into_response() };
    let problem = ApiError::new(error.status, error.code, error.message, error.hint);
    problem.status(discovery).map(Body::new)
}

impl IntoResponse for HttpError {
    fn into_response(self) -> Response {
        let status = self.status;
        let problem = ApiError::new(status, self.code, self.message, self.hint);
        let problem = if matches!(status, 429 | 503) { problem.retry_after_s(5) } else { problem };
        problem.plain().map(Body::new)
    }
}

/// For a path to the Kubernetes API of a cluster: whether it is a discovery request.
fn below_k8s(path: &str) -> Option<bool> {
    let (_, rest) = path.strip_prefix("/clusters/")?.split_once('/')?;
    let below =
        rest.strip_prefix("k8s").filter(|below| below.is_empty() || below.starts_with('/'))?;
    Some(is_discovery(below))
}
