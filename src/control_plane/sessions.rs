//! Sessions of the page: each in a cookie, with a CSRF token that calls of other pages do not have.

use std::collections::HashMap;

use http::{HeaderMap, Method, header};
use parking_lot::{Mutex, MutexGuard};

use super::error::{HttpError, database_unavailable};
use super::keys::{Keys, random_token};
use crate::base::secret::constant_time_eq;

/// Name of the cookie. Browsers refuse one with this prefix that is not Secure, or is set for other
/// hosts or paths.
const COOKIE: &str = "__Host-pipeops";
/// Header that a request carries which our own page sent.
const CSRF: &str = "x-csrf-token";
/// Life of a session, seconds, and how many there may be.
const LIFE: i64 = 12 * 3600;
const MAX: usize = 1000;

/// All sessions. A restart of the control plane ends them.
#[derive(Default)]
pub(super) struct Sessions {
    /// By the keyed hash of the cookie's value.
    open: Mutex<HashMap<String, Session>>,
}

struct Session {
    /// Hash of the token that was shown; what it may do is looked up at each call.
    token: String,
    csrf: String,
    until: i64,
}

fn cookie(headers: &HeaderMap) -> Option<&str> {
    let all = headers
        .get_all(header::COOKIE)
        .into_iter()
        .filter_map(|v| v.to_str().ok())
        .flat_map(|v| v.split(';'));
    let mut values = all.filter_map(|pair| pair.trim().strip_prefix(COOKIE)?.strip_prefix('='));
    // of two cookies with this name one is not ours
    values.next().filter(|value| !value.is_empty() && value.len() <= 128 && values.next().is_none())
}

/// The `Set-Cookie` that keeps a session; with no value and no lifetime, the one that ends it.
fn set_cookie(value: &str, life: i64) -> String {
    format!("{COOKIE}={value}; Path=/; Secure; HttpOnly; SameSite=Strict; Max-Age={life}")
}

impl Sessions {
    fn open(&self) -> MutexGuard<'_, HashMap<String, Session>> {
        self.open.lock()
    }

    /// A session for a token that was checked: its CSRF token, and the value of `Set-Cookie`.
    ///
    /// # Errors
    /// 503 when there are too many.
    pub(super) fn create(
        &self,
        keys: &Keys,
        token_hash: String,
        now: i64,
    ) -> Result<(String, String), HttpError> {
        let random = || random_token().map_err(|e| database_unavailable(&e));
        let (value, csrf) = (random()?, random()?);
        let mut open = self.open();
        open.retain(|_, s| s.until > now);
        if open.len() >= MAX {
            return Err(HttpError::new(
                503,
                "too_many_sessions",
                "too many people are logged in",
                Some("log out elsewhere, or wait"),
            ));
        }
        open.insert(
            keys.token_hash(&value),
            Session { token: token_hash, csrf: csrf.clone(), until: now + LIFE },
        );
        Ok((csrf, set_cookie(&value, LIFE)))
    }

    /// Ends the session of a request's cookie; returns the `Set-Cookie` that removes it.
    pub(super) fn end(&self, keys: &Keys, headers: &HeaderMap) -> String {
        if let Some(value) = cookie(headers) {
            self.open().remove(&keys.token_hash(value));
        }
        set_cookie("", 0)
    }

    /// The CSRF token of the session of a request's cookie.
    pub(super) fn csrf(&self, keys: &Keys, headers: &HeaderMap) -> String {
        cookie(headers)
            .and_then(|value| self.open().get(&keys.token_hash(value)).map(|s| s.csrf.clone()))
            .unwrap_or_default()
    }

    /// The hash of the token behind a request's cookie, if it has one.
    ///
    /// # Errors
    /// 401 when the session has ended, 403 for a request that another page made the browser send.
    pub(super) fn token(
        &self,
        keys: &Keys,
        method: &Method,
        headers: &HeaderMap,
        now: i64,
    ) -> Result<Option<String>, HttpError> {
        let Some(value) = cookie(headers) else { return Ok(None) };
        let open = self.open();
        let session = open.get(&keys.token_hash(value)).filter(|s| s.until > now);
        let session = session.ok_or_else(|| {
            HttpError::new(401, "session_over", "the session is over", Some("log in again"))
        })?;
        let text = |name: &str| headers.get(name).and_then(|v| v.to_str().ok());
        // browsers say where a request comes from, and a page cannot change what they say
        let foreign = text("sec-fetch-site").is_some_and(|site| site != "same-origin");
        let safe = matches!(*method, Method::GET | Method::HEAD);
        let csrf = text(CSRF).is_some_and(|shown| constant_time_eq(shown, &session.csrf));
        if foreign || !(safe || csrf) {
            return Err(HttpError::new(
                403,
                "foreign_request",
                "this request does not come from the control plane's page",
                None,
            ));
        }
        Ok(Some(session.token.clone()))
    }
}
