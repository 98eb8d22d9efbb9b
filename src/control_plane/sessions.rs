//! Who has logged in on the page: a session in a cookie, and the word that tells a call of our page from one of another.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Mutex, MutexGuard};

use http::{HeaderMap, Method, header};

use super::ControlPlane;
use super::keys::random_token;
use super::model::AccessKind;
use super::registry::{HttpError, Principal, database_unavailable};
use crate::base::secret::{Secret, constant_time_eq};

/// Name of the session's cookie. The prefix makes browsers refuse one that is not Secure, or is set for other hosts or paths.
const COOKIE: &str = "__Host-pipeops";
/// Header that tells a call of our page from one that another page made the browser send.
const CSRF: &str = "x-csrf-token";
/// Life of a session, seconds, and how many there may be.
const LIFE: i64 = 12 * 3600;
const MOST: usize = 1000;

/// Who has logged in. Restarting the control plane ends all of them.
#[derive(Default)]
pub(super) struct Sessions {
    /// By the keyed hash of the cookie's value.
    open: Mutex<HashMap<String, Session>>,
}

struct Session {
    /// Hash of the token that was shown: what it may is asked anew at each call.
    token: String,
    csrf: String,
    until: i64,
}

/// What a browser is given at a login.
pub(super) struct LoggedIn {
    pub(super) principal: Principal,
    pub(super) csrf: String,
    /// Value of `Set-Cookie`.
    pub(super) cookie: String,
}

fn cookie(headers: &HeaderMap) -> Option<&str> {
    let all = headers
        .get_all(header::COOKIE)
        .into_iter()
        .filter_map(|v| v.to_str().ok())
        .flat_map(|v| v.split(';'));
    let mut ours = all.filter_map(|pair| pair.trim().strip_prefix(COOKIE)?.strip_prefix('='));
    // two of them: somebody else has set one
    ours.next().filter(|value| !value.is_empty() && value.len() <= 128 && ours.next().is_none())
}

/// The `Set-Cookie` that keeps a session; with no value and no time, the one that ends it.
fn set_cookie(value: &str, life: i64) -> String {
    format!("{COOKIE}={value}; Path=/; Secure; HttpOnly; SameSite=Strict; Max-Age={life}")
}

impl Sessions {
    fn open(&self) -> MutexGuard<'_, HashMap<String, Session>> {
        super::lock(&self.open)
    }
}

impl ControlPlane {
    /// A session for whoever shows an administrator's or a Runner's token.
    pub(super) fn login(
        &self,
        address: IpAddr,
        token: &Secret,
        now: i64,
    ) -> Result<LoggedIn, HttpError> {
        let hash = self.keys().token_hash(token.expose().trim());
        self.check_rate_limit(address, &hash, now)?;
        let principal = self
            .registry()
            .authenticate(&hash, now)
            .inspect_err(|_| self.record_failure(address, now))?;
        match &principal {
            Principal::Admin(_) => self.remove_bootstrap_token(),
            Principal::Access(access) if access.kind == AccessKind::Runner => {}
            _ => {
                return Err(HttpError::new(
                    403,
                    "forbidden",
                    "this token is for something else",
                    Some("log in with an administrator's or a Runner's token"),
                ));
            }
        }
        self.record_success(hash.clone());
        let (value, csrf) = (
            random_token().map_err(|e| database_unavailable(&e))?,
            random_token().map_err(|e| database_unavailable(&e))?,
        );
        {
            let mut open = self.inner.sessions.open();
            open.retain(|_, s| s.until > now);
            if open.len() >= MOST {
                return Err(HttpError::new(
                    503,
                    "too_many_sessions",
                    "too many people are logged in",
                    Some("log out elsewhere, or wait"),
                ));
            }
            open.insert(
                self.keys().token_hash(&value),
                Session { token: hash, csrf: csrf.clone(), until: now + LIFE },
            );
        }
        Ok(LoggedIn { principal, csrf, cookie: set_cookie(&value, LIFE) })
    }

    /// Ends the session behind a request's cookie; gives what makes the browser forget it.
    pub(super) fn logout(&self, headers: &HeaderMap) -> String {
        if let Some(value) = cookie(headers) {
            self.inner.sessions.open().remove(&self.keys().token_hash(value));
        }
        set_cookie("", 0)
    }

    /// The word of the page whose cookie a request carries.
    pub(super) fn csrf(&self, headers: &HeaderMap) -> String {
        let csrf = cookie(headers).and_then(|v| {
            self.inner.sessions.open().get(&self.keys().token_hash(v)).map(|s| s.csrf.clone())
        });
        csrf.unwrap_or_default()
    }

    /// The hash of the token behind a request's cookie, if it has one.
    ///
    /// # Errors
    /// 401 when the session is over, 403 for a request that another page made the browser send.
    pub(super) fn session_token(
        &self,
        method: &Method,
        headers: &HeaderMap,
        now: i64,
    ) -> Result<Option<String>, HttpError> {
        let Some(value) = cookie(headers) else { return Ok(None) };
        let open = self.inner.sessions.open();
        let session = open.get(&self.keys().token_hash(value)).filter(|s| s.until > now);
        let session = session.ok_or_else(|| {
            HttpError::new(401, "session_over", "the session is over", Some("log in again"))
        })?;
        let text = |name: &str| headers.get(name).and_then(|v| v.to_str().ok());
        // browsers say where a request comes from, and a page cannot change what they say
        let foreign = text("sec-fetch-site").is_some_and(|site| site != "same-origin");
        let safe = matches!(*method, Method::GET | Method::HEAD);
        if foreign
            || (!safe && !text(CSRF).is_some_and(|shown| constant_time_eq(shown, &session.csrf)))
        {
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
