//! Log-in to the page and log-out.

use std::net::IpAddr;

use http::HeaderMap;

use super::error::HttpError;
use super::model::AccessKind;
use super::registry::Principal;
use super::state::ControlPlane;
use crate::base::secret::Secret;

/// What a browser is given at a login.
pub(super) struct LoggedIn {
    pub(super) principal: Principal,
    pub(super) csrf: String,
    /// Value of `Set-Cookie`.
    pub(super) cookie: String,
}

impl ControlPlane {
    /// A session for an administrator's or a Runner's token.
    pub(super) fn login(
        &self,
        address: IpAddr,
        token: &Secret,
        now: i64,
    ) -> Result<LoggedIn, HttpError> {
        let hash = self.keys().token_hash(token.expose().trim());
        let failures = &self.inner.failures;
        failures.check(address, &hash, now)?;
        let principal = self
            .registry()
            .authenticate(&hash, now)
            .inspect_err(|_| failures.failed(address, now))?;
        match &principal {
            Principal::Admin(_) => self.remove_bootstrap_token(),
            Principal::AccessToken(access)
                if access.kind == AccessKind::Runner && access.tenant.is_none() => {}
            Principal::AccessToken(access) if access.tenant.is_some() => {
                // the page shows whole clusters
                return Err(HttpError::new(
                    403,
                    "forbidden",
                    "this token is of a tenant, and the page is for those who see all of a cluster",
                    Some("use the command line: pipeops login URL"),
                ));
            }
            _ => {
                return Err(HttpError::new(
                    403,
                    "forbidden",
                    "this token is for something else",
                    Some("log in with an administrator's or a Runner's token"),
                ));
            }
        }
        failures.succeeded(hash.clone());
        let (csrf, cookie) = self.inner.sessions.create(self.keys(), hash, now)?;
        Ok(LoggedIn { principal, csrf, cookie })
    }

    /// Ends the session of a request's cookie; returns the `Set-Cookie` that removes it.
    pub(super) fn logout(&self, headers: &HeaderMap) -> String {
        self.inner.sessions.end(self.keys(), headers)
    }

    /// The CSRF token of the session of a request's cookie.
    pub(super) fn csrf(&self, headers: &HeaderMap) -> String {
        self.inner.sessions.csrf(self.keys(), headers)
    }
}
