//! Error answers in the form that the client reads: `{code, message, hint}` for our own paths, and
//! below `/k8s` a `Status`, the only form whose message kubectl, helm and client-go show
//! (kubernetes/apimachinery `pkg/apis/meta/v1/types.go`).

use std::borrow::Cow;

use http::{HeaderValue, Response, StatusCode, header};
use serde_json::json;

use crate::base::connection::Body;
use crate::base::text::printable;
use crate::kubernetes::header_policy::Rejection;

/// Why a request is not served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiError {
    pub status: u16,
    /// Stable: programs depend on it.
    pub code: &'static str,
    pub message: Cow<'static, str>,
    pub hint: Option<&'static str>,
    /// Seconds after which the same request may succeed. client-go then tries ten times before it
    /// reports an error (kubernetes/client-go `rest/with_retry.go`), so it is set only where
    /// waiting helps.
    pub retry_after: Option<u32>,
}

impl ApiError {
    pub fn new(
        status: u16,
        code: &'static str,
        message: impl Into<Cow<'static, str>>,
        hint: Option<&'static str>,
    ) -> ApiError {
        ApiError { status, code, message: message.into(), hint, retry_after: None }
    }

    #[must_use]
    pub fn retry_after_s(mut self, seconds: u32) -> ApiError {
        self.retry_after = Some(seconds);
        self
    }

    /// The answer on our own paths.
    pub fn plain(&self) -> Response<Body> {
        let mut body = json!({"code": self.code, "message": self.message});
        if let Some(hint) = self.hint {
            body["hint"] = hint.into();
        }
        self.answer(body.to_string())
    }

    /// As a Kubernetes API answers. It is JSON whatever was asked for: clients decode an answer by
    /// its type. Of what a cluster serves (`discovery`) they do not: kubectl then shows a text of
    /// its own, and beside it what a `Warning` says (kubernetes/client-go
    /// `discovery/discovery_client.go`, `rest/warnings.go`).
    pub fn status(&self, discovery: bool) -> Response<Body> {
        // the one text that clients show
        let message = match self.hint {
            Some(hint) => format!("{}: {hint}", self.message),
            None => self.message.clone().into_owned(),
        };
        let mut details = json!({"causes": [{"reason": self.code, "message": self.message}]});
        if let Some(seconds) = self.retry_after {
            details["retryAfterSeconds"] = seconds.into();
        }
        let mut body = json!({
            "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
            "message": message, "details": details, "code": self.status
        });
        if let Some(reason) = reason(self.status) {
            body["reason"] = reason.into();
        }
        let mut answer = self.answer(body.to_string());
        if discovery {
            let message: String =
                printable(&message).chars().map(|c| if c.is_ascii() { c } else { '?' }).collect();
            let quoted = message.replace('\\', "\\\\").replace('"', "\\\"");
            if let Ok(warning) = HeaderValue::try_from(format!("299 - \"{quoted}\"")) {
                answer.headers_mut().insert(header::WARNING, warning);
            }
        }
        answer
    }

    fn answer(&self, body: String) -> Response<Body> {
        let mut answer = plain(self.status, "application/json", body);
        if let Some(seconds) = self.retry_after {
            answer.headers_mut().insert(header::RETRY_AFTER, seconds.into());
        }
        if self.status == 401 {
            answer
                .headers_mut()
                .insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        answer
    }
}

impl From<Rejection> for ApiError {
    fn from((status, code, message): Rejection) -> ApiError {
        ApiError::new(status, code, message, None)
    }
}

/// Whether a path of the Kubernetes API is about what the cluster serves, and not about objects.
pub fn is_discovery(path: &str) -> bool {
    let mut segments = path.split('/').filter(|s| !s.is_empty());
    match segments.next() {
        Some("api") => segments.count() < 2,
        Some("apis") => segments.count() < 3,
        _ => true,
    }
}

/// The reason that clients know for a status, as `NewGenericServerResponse` of
/// kubernetes/apimachinery `pkg/api/errors` maps them.
fn reason(status: u16) -> Option<&'static str> {
    Some(match status {
        400 => "BadRequest",
        401 => "Unauthorized",
        403 => "Forbidden",
        404 => "NotFound",
        405 => "MethodNotAllowed",
        406 => "NotAcceptable",
        409 => "Conflict",
        410 => "Gone",
        413 => "RequestEntityTooLarge",
        415 => "UnsupportedMediaType",
        422 => "Invalid",
        429 => "TooManyRequests",
        503 => "ServiceUnavailable",
        504 => "Timeout",
        500.. => "InternalError",
        _ => return None,
    })
}

/// An answer in one piece that no cache keeps.
pub(crate) fn plain(status: u16, kind: &'static str, body: String) -> Response<Body> {
    let mut answer = Response::new(Body::from(body));
    *answer.status_mut() =
        StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    answer.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    answer.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    answer
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt as _;

    use super::*;

    #[tokio::test]
    async fn a_status_says_what_the_clients_of_kubernetes_look_for() {
        for (status, reason) in [
            (400, "BadRequest"),
            (401, "Unauthorized"),
            (403, "Forbidden"),
            (404, "NotFound"),
            (409, "Conflict"),
            (413, "RequestEntityTooLarge"),
            (429, "TooManyRequests"),
            (500, "InternalError"),
            (502, "InternalError"),
            (503, "ServiceUnavailable"),
            (504, "Timeout"),
            (507, "InternalError"),
        ] {
            let answer = ApiError::new(status, "some_code", "what is wrong", Some("what to do"))
                .retry_after_s(3)
                .status(false);
            assert_eq!(answer.status(), status);
            assert_eq!(answer.headers()["content-type"], "application/json");
            assert_eq!(answer.headers()["retry-after"], "3");
            assert_eq!(answer.headers().contains_key("www-authenticate"), status == 401);
            let body = answer.into_body().collect().await.unwrap().to_bytes();
            let body: serde_json::Value = serde_json::from_slice(&body).unwrap();
            let expected = json!({
                "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
                "message": "what is wrong: what to do", "reason": reason, "code": status,
                "details": {
                    "causes": [{"reason": "some_code", "message": "what is wrong"}],
                    "retryAfterSeconds": 3
                }
            });
            assert_eq!(body, expected);
        }
    }

    #[test]
    fn what_kubectl_does_not_read_of_discovery_it_is_warned_of() {
        let problem =
            ApiError::new(503, "some_code", "the \"cluster\" is – away\r\n", Some("wait"));
        assert!(!problem.status(false).headers().contains_key("warning"));
        let warned = problem.status(true);
        assert_eq!(
            warned.headers()["warning"],
            "299 - \"the \\\"cluster\\\" is ? away\\\\u{d}\\\\u{a}: wait\""
        );
        for path in [
            "",
            "/",
            "/api",
            "/api/v1",
            "/apis",
            "/apis/",
            "/apis/apps",
            "/apis/apps/v1",
            "/version",
            "/openapi/v3/apis/apps/v1",
        ] {
            assert!(is_discovery(path), "{path}");
        }
        for path in [
            "/api/v1/pods",
            "/api/v1/namespaces/beta/pods/p/exec",
            "/apis/apps/v1/deployments",
            "/apis/apps/v1/namespaces/x/deployments",
        ] {
            assert!(!is_discovery(path), "{path}");
        }
    }
}
