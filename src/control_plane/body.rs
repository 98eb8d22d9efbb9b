//! Extractors for the parameters of a path, and for a body within limits of size and time.

use std::time::Duration;

use axum::extract::{FromRequest, FromRequestParts, MatchedPath, Request};
use http::request::Parts;
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use hyper::body::Bytes;
use percent_encoding::percent_decode_str;
use serde::de::DeserializeOwned;

use super::error::HttpError;
use crate::base::json;
use crate::base::text::json_error;

/// Largest body of a call that the control plane answers itself, and of a job with what was opened
/// of it: a byte of either may be six as text in JSON (`\u0001`).
const MAX_BODY: usize = 1 << 20;
const MAX_JOB: usize = 8 << 20;
/// Time limit for reading a body.
const READ_TIMEOUT: Duration = Duration::from_secs(15);

/// A body as it came. A call without a body reads it too, under the same limits.
pub(super) struct RawBody(pub(super) Bytes);

/// The same for a job that a Runner brings.
pub(super) struct JobBody(pub(super) Bytes);

/// A body of JSON; an empty one is `{}`.
pub(super) struct JsonBody<T>(pub(super) T);

/// The first parameters of a path.
pub(super) struct PathSegments<const N: usize>(pub(super) [String; N]);

impl<S: Sync> FromRequest<S> for RawBody {
    type Rejection = HttpError;

    async fn from_request(request: Request, _: &S) -> Result<RawBody, HttpError> {
        read(request, MAX_BODY).await.map(RawBody)
    }
}

impl<S: Sync> FromRequest<S> for JobBody {
    type Rejection = HttpError;

    async fn from_request(request: Request, _: &S) -> Result<JobBody, HttpError> {
        read(request, MAX_JOB).await.map(JobBody)
    }
}

async fn read(request: Request, max: usize) -> Result<Bytes, HttpError> {
    let body = Limited::new(request.into_body(), max).collect();
    match tokio::time::timeout(READ_TIMEOUT, body).await {
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(e)) if e.is::<LengthLimitError>() => {
            let message = format!("the body is larger than {} MiB", max >> 20);
            Err(HttpError::new(413, "too_large", message, None))
        }
        Ok(Err(_)) => Err(HttpError::new(
            400,
            "bad_body",
            "the connection closed while the body was read",
            None,
        )),
        Err(_) => Err(HttpError::new(408, "too_slow", "the body took longer than 15 s", None)),
    }
}

impl<S: Sync, T: DeserializeOwned> FromRequest<S> for JsonBody<T> {
    type Rejection = HttpError;

    async fn from_request(request: Request, state: &S) -> Result<JsonBody<T>, HttpError> {
        parsed(&RawBody::from_request(request, state).await?.0).map(JsonBody)
    }
}

impl<S: Sync, const N: usize> FromRequestParts<S> for PathSegments<N> {
    type Rejection = HttpError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<PathSegments<N>, HttpError> {
        let mut open = segments(parts);
        Ok(PathSegments(std::array::from_fn(|_| open.next().unwrap_or_default())))
    }
}

pub(super) fn parsed<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, HttpError> {
    let bytes = if bytes.is_empty() { b"{}" } else { bytes };
    json::read(bytes).map_err(|e| {
        let why = json_error(&e);
        HttpError::new(
            400,
            "bad_body",
            format!("the body is not what this call takes: {why}"),
            None,
        )
    })
}

/// The parameters of a request's path. axum's `Path` refuses what is not UTF-8 once decoded, before
/// the caller is authenticated: here it is a name that does not exist.
pub(super) fn segments(parts: &Parts) -> impl Iterator<Item = String> {
    open(parts).map(decoded)
}

/// # Errors
/// A path with an empty parameter, as in `/clusters//token`: matchit matches it, but there is no
/// such route.
pub(super) fn check_segments(parts: &Parts) -> Result<(), HttpError> {
    if open(parts).any(str::is_empty) { Err(path_not_found()) } else { Ok(()) }
}

pub(super) fn path_not_found() -> HttpError {
    HttpError::new(404, "not_found", "there is no such path", None)
}

fn open(parts: &Parts) -> impl Iterator<Item = &str> {
    let template = parts.extensions.get::<MatchedPath>().map_or("", MatchedPath::as_str);
    let both = template.split('/').zip(parts.uri.path().split('/'));
    both.filter(|(part, _)| part.starts_with('{') && !part.starts_with("{*"))
        .map(|(_, segment)| segment)
}

/// A segment decoded: a name may contain spaces and letters of every script (RFC 3986 §2.1).
fn decoded(segment: &str) -> String {
    percent_decode_str(segment)
        .decode_utf8()
        .map_or_else(|_| segment.to_owned(), std::borrow::Cow::into_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_the_one_that_was_meant() {
        for (segment, name) in [
            ("c-1", "c-1"),
            ("prod%20eu", "prod eu"),
            ("%C5%81%c3%b3d%C5%BA", "Łódź"),
            ("100%", "100%"),
            ("%zz%4", "%zz%4"),
            ("%ff", "%ff"),
        ] {
            assert_eq!(decoded(segment), name);
        }
    }
}
