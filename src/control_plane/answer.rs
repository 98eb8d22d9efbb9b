//! Answers of the control plane: JSON, text, and refusals in the words of whoever reads them.

use axum::body::Body;
use axum::response::{IntoResponse, Response};
use http::{HeaderValue, StatusCode, header};
use serde::Serialize;

use super::error::HttpError;
use crate::kubernetes::answer::{ApiError, is_discovery};

pub(super) fn answer(status: u16, body: &impl Serialize) -> Response {
    plain(status, "application/json", serde_json::to_vec(body).unwrap_or_default())
}

/// An answer of one piece that nobody keeps.
pub(super) fn plain(status: u16, kind: &'static str, body: impl Into<Body>) -> Response {
    let mut answer = Response::new(body.into());
    *answer.status_mut() =
        StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    answer.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    answer.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    answer
}

/// A refusal of what was asked at `path`. Below a cluster's `/k8s` the caller is a client of Kubernetes, and it is told at once: with a
/// `Retry-After` it would try in silence for most of a minute. Another caller is told when to come again.
pub(super) fn problem(error: HttpError, path: &str) -> Response {
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

/// Where a path leads to the Kubernetes API of a cluster: whether it is about what the cluster serves.
fn below_k8s(path: &str) -> Option<bool> {
    let (_, rest) = path.strip_prefix("/clusters/")?.split_once('/')?;
    let below =
        rest.strip_prefix("k8s").filter(|below| below.is_empty() || below.starts_with('/'))?;
    Some(is_discovery(below))
}
