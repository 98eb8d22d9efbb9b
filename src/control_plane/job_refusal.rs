//! Why a job is not done: as its Runner is told, and as it is kept.

use axum::response::Response;
use http::header;
use serde_json::json;

use super::answer::answer;
use super::error::HttpError;
use super::model::JobRefusal;
use crate::contract::job::{CLUSTER_UNKNOWN, REPLAYED, Refusal};

/// Longest message that is kept, characters.
const MAX_MESSAGE: usize = 1000;

impl From<HttpError> for JobRefusal {
    fn from(error: HttpError) -> JobRefusal {
        // of a path it would be one that a control plane of a version before does not know
        let code = if error.code == "not_found" { CLUSTER_UNKNOWN } else { error.code };
        // it may quote a name, and is kept
        let message = error.message.chars().take(MAX_MESSAGE).collect();
        let hint = error.hint.map(str::to_owned);
        JobRefusal { status: error.status, code: code.into(), message, hint, at: 0 }
    }
}

impl From<Refusal> for JobRefusal {
    fn from(refusal: Refusal) -> JobRefusal {
        HttpError::new(400, refusal.code, refusal.message, None).into()
    }
}

impl JobRefusal {
    /// It will not be otherwise later.
    pub(super) fn is_final(&self) -> bool {
        !passes(self.status) && self.code != REPLAYED
    }

    /// The answer to who brings this job: its token is genuine, and for what was brought.
    pub(super) fn answer(&self, job: &str) -> Response {
        let mut body = json!({"code": self.code, "message": self.message, "job": job});
        if let Some(hint) = &self.hint {
            body["hint"] = hint.as_str().into();
        }
        let mut answer = answer(self.status, &body);
        if matches!(self.status, 429 | 503) {
            answer.headers_mut().insert(header::RETRY_AFTER, 5.into());
        }
        answer
    }
}

/// Whether the same may be answered otherwise in a moment.
pub(super) fn passes(status: u16) -> bool {
    status >= 500 || matches!(status, 401 | 408 | 429)
}
