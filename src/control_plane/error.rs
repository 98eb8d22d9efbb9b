//! The error of every call of the API.

/// A call that is refused: status, stable code, message, and what to do about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HttpError {
    pub status: u16,
    pub code: &'static str,
    pub message: String,
    pub hint: Option<&'static str>,
    /// An agent may have done what was asked for all the same: no answer has come. Told to nobody.
    pub lost: bool,
}

impl HttpError {
    pub fn new(
        status: u16,
        code: &'static str,
        message: impl Into<String>,
        hint: Option<&'static str>,
    ) -> HttpError {
        HttpError { status, code, message: message.into(), hint, lost: false }
    }
}

pub(super) fn not_found(what: &str, id: &str) -> HttpError {
    HttpError::new(404, "not_found", format!("there is no {what} {id}"), None)
}

pub(super) fn database_unavailable(error: &anyhow::Error) -> HttpError {
    tracing::error!(error = format!("{error:#}"), "the database cannot be used");
    HttpError::new(
        503,
        "database_unavailable",
        "the control plane cannot use its database",
        Some("try again soon; its log says more"),
    )
}
