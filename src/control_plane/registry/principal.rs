//! Who calls, once that is known, and whose token it was.

use super::Registry;
use super::entry::Entry;
use crate::base::secret::constant_time_eq;
use crate::control_plane::error::HttpError;
use crate::control_plane::model::AccessToken;
use crate::control_plane::store::RowKind;

/// The subject of calls over the local socket.
const LOCAL: &str = "admin:local";

/// Who makes a request, once authenticated. A request without a token has no principal.
#[derive(Clone, Debug)]
pub enum Principal {
    Enrolment(String),
    Agent(String),
    AccessToken(Box<AccessToken>),
    Admin(String),
    /// A caller on the socket in the data directory. It has no token, and no administrator can have
    /// its name.
    Local,
}

impl Principal {
    /// The `sub` of its caller tokens.
    pub fn subject(&self) -> String {
        match self {
            Principal::AccessToken(access) => access.subject(),
            Principal::Admin(name) => {
                format!("admin:{}", name.replace(|c: char| !c.is_ascii_graphic(), "_"))
            }
            Principal::Local => LOCAL.into(),
            Principal::Agent(id) | Principal::Enrolment(id) => id.clone(),
        }
    }

    /// By what it is found again: the id of an access, which no other one ever has, else the
    /// subject.
    pub fn id(&self) -> String {
        match self {
            Principal::AccessToken(access) => access.id.clone(),
            _ => self.subject(),
        }
    }

    /// Whether it may do everything.
    pub fn is_admin(&self) -> bool {
        matches!(self, Principal::Admin(_) | Principal::Local)
    }

    /// The project that it may see; an administrator sees all.
    pub fn project(&self) -> Option<&str> {
        match self {
            Principal::AccessToken(access) => Some(&access.project),
            Principal::Enrolment(_)
            | Principal::Agent(_)
            | Principal::Admin(_)
            | Principal::Local => None,
        }
    }

    /// The tenant that it is limited to.
    pub fn tenant(&self) -> Option<&str> {
        match self {
            Principal::AccessToken(access) => access.tenant.as_deref(),
            _ => None,
        }
    }
}

impl Registry {
    /// The principal of a token that is neither revoked nor expired.
    ///
    /// # Errors
    /// 401, without a hint whether it was ever known, unless it has expired.
    pub fn authenticate(&self, hash: &str, now: i64) -> Result<Principal, HttpError> {
        let unknown = || {
            HttpError::new(
                401,
                "token_unknown",
                "the token is wrong, revoked, or of another control plane",
                None,
            )
        };
        let expired = || {
            HttpError::new(
                401,
                "token_expired",
                "the token's time is over",
                Some("get another one"),
            )
        };
        let inner = self.inner();
        let (kind, id) = inner.tokens.get(hash).ok_or_else(unknown)?;
        match kind {
            RowKind::Enrolment => {
                let row = inner
                    .enrolments
                    .get(id)
                    .filter(|e| !e.revoked && constant_time_eq(&e.hash, hash))
                    .ok_or_else(unknown)?;
                if row.expires_at <= now {
                    Err(expired())
                } else {
                    Ok(Principal::Enrolment(id.clone()))
                }
            }
            RowKind::Agent => {
                let entry = inner.agents.get(id).ok_or_else(unknown)?;
                check_credential(entry, hash, now, unknown)?;
                Ok(Principal::Agent(id.clone()))
            }
            RowKind::Access => {
                let row = inner
                    .access_tokens
                    .get(id)
                    .map(|a| &a.0)
                    .filter(|a| !a.revoked && constant_time_eq(&a.hash, hash))
                    .ok_or_else(unknown)?;
                if row.expires_at.is_some_and(|at| at <= now) {
                    Err(expired())
                } else {
                    Ok(Principal::AccessToken(Box::new(row.clone())))
                }
            }
            RowKind::Admin => Ok(Principal::Admin(
                inner
                    .admins
                    .get(id)
                    .map(|a| &a.0)
                    .filter(|a| constant_time_eq(&a.hash, hash))
                    .ok_or_else(unknown)?
                    .name
                    .clone(),
            )),
            RowKind::Project | RowKind::Operation => Err(unknown()),
        }
    }
}

/// # Errors
/// 403 for an agent that was revoked, 401 for a credential that is unknown or has expired.
fn check_credential(
    entry: &Entry,
    hash: &str,
    now: i64,
    unknown: impl Fn() -> HttpError,
) -> Result<(), HttpError> {
    let mut credentials = entry.row.credentials.iter();
    let credential = credentials.find(|c| constant_time_eq(&c.hash, hash)).ok_or_else(unknown)?;
    if entry.row.revoked {
        return Err(HttpError::new(
            403,
            "agent_revoked",
            "this agent was revoked",
            Some("remove it and enrol it again with a fresh token"),
        ));
    }
    if credential.expires_at <= now {
        return Err(HttpError::new(
            401,
            "credential_expired",
            "the credential's time is over",
            Some("enrol again with a token"),
        ));
    }
    Ok(())
}
