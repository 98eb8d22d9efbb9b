//! Who calls, once that is known, and whose token it was.

use super::Registry;
use super::entry::Entry;
use crate::base::secret::constant_time_eq;
use crate::control_plane::error::HttpError;
use crate::control_plane::model::{AccessKind, AccessToken, Limits};
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

    /// What it may do at most; an administrator is not limited.
    pub fn limits(&self) -> Option<Limits> {
        let Principal::AccessToken(access) = self else { return None };
        Some(Limits {
            project: access.project.clone(),
            role: access.role,
            clusters: cluster_limit(access).cloned(),
            namespaces: access.namespaces.clone(),
            tenant: access.tenant.clone(),
        })
    }

    /// The same caller, who may do no more than `limits`. None where these exceed what it may do:
    /// nobody gains by being limited.
    pub fn within(self, limits: &Limits) -> Option<Principal> {
        let limited = AccessToken {
            id: self.id(),
            project: limits.project.clone(),
            name: self.id(),
            kind: AccessKind::Runner,
            hash: String::new(),
            role: limits.role,
            clusters: limits.clusters.clone(),
            namespaces: limits.namespaces.clone(),
            tenant: limits.tenant.clone(),
            created_at: 0,
            expires_at: None,
            revoked: false,
            maker: None,
            person: false,
            selector: None,
            jobs: false,
        };
        let access = match self {
            Principal::AccessToken(own) => {
                let no_more = own.project == limited.project
                    && own.role >= limited.role
                    && own.tenant == limited.tenant
                    && is_within(limited.clusters.as_ref(), cluster_limit(&own))
                    && is_within(limited.namespace_limit(), own.namespace_limit());
                // beside a selector an empty list would be no limit
                let is_nothing = limited.clusters.as_ref().is_some_and(Vec::is_empty);
                if !no_more || (is_nothing && own.selector.is_some()) {
                    return None;
                }
                let AccessToken { role, namespaces, .. } = limited;
                let clusters = limited.clusters.or_else(|| own.clusters.clone());
                AccessToken { role, clusters, namespaces, ..*own }
            }
            Principal::Admin(_) | Principal::Local => limited,
            Principal::Agent(_) | Principal::Enrolment(_) => return None,
        };
        Some(Principal::AccessToken(Box::new(access)))
    }
}

/// The clusters that an access is limited to, beside the limit of its selector.
fn cluster_limit(access: &AccessToken) -> Option<&Vec<String>> {
    access.clusters.as_ref().filter(|list| access.selector.is_none() || !list.is_empty())
}

/// Whether a list allows nothing that another one does not; none allows everything.
fn is_within(list: Option<&Vec<String>>, other: Option<&Vec<String>>) -> bool {
    other.is_none_or(|other| list.is_some_and(|list| list.iter().all(|name| other.contains(name))))
}

impl Registry {
    /// The principal of that id or subject within limits, if it may still do anything.
    pub fn resolve(&self, caller: &str, limits: Option<&Limits>, now: i64) -> Option<Principal> {
        let principal = self.resolve_subject(caller, now)?;
        match limits {
            Some(limits) => principal.within(limits),
            None => Some(principal),
        }
    }

    /// The limits of a principal that may do less than its token, or its administrator, may.
    pub fn narrower_limits(&self, principal: &Principal, now: i64) -> Option<Limits> {
        let own = self.resolve_subject(&principal.id(), now).and_then(|own| own.limits());
        principal.limits().filter(|limits| own.as_ref() != Some(limits))
    }

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
            RowKind::Project
            | RowKind::Operation
            | RowKind::Job
            | RowKind::Rollout
            | RowKind::Labels => Err(unknown()),
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

#[cfg(test)]
mod tests {
    use super::super::access::tests::{named, registry, row};
    use super::*;
    use crate::contract::token::Role;

    #[tokio::test]
    async fn a_caller_comes_back_with_what_it_was_limited_to() {
        let dir = tempfile::tempdir().unwrap();
        let (registry, keys) = registry(&dir).await;
        registry.add_project("default", 1).await.unwrap();
        registry.add_admin(&keys, "eve", 1).await.unwrap();
        let row = AccessToken { role: Role::Deployer, ..named("ci") };
        let (own, _) = registry.add_access_token(&keys, row).await.unwrap();
        let own = Principal::AccessToken(Box::new(own));
        let less = Limits { role: Role::Viewer, ..own.limits().unwrap() };
        for (principal, expected) in [
            (own.clone(), None),
            (own.clone().within(&less).unwrap(), Some(less.clone())),
            (Principal::Admin("eve".into()), None),
            (Principal::Admin("eve".into()).within(&less).unwrap(), Some(less.clone())),
            (Principal::Local, None),
        ] {
            let kept = registry.narrower_limits(&principal, 2);
            assert_eq!(kept, expected, "{principal:?}");
            let back = registry.resolve(&principal.id(), kept.as_ref(), 2).unwrap();
            assert_eq!((back.limits(), back.id()), (principal.limits(), principal.id()));
        }
        registry.revoke_access_token(&own.id(), 2).await.unwrap();
        assert!(registry.resolve(&own.id(), Some(&less), 2).is_none());
        assert!(registry.resolve("admin:bob", Some(&less), 2).is_none());
    }

    #[test]
    fn a_caller_is_limited_to_less_and_never_to_more() {
        let names = |list: &[&str]| Some(list.iter().map(|name| (*name).to_owned()).collect());
        let own = AccessToken {
            id: "r-1".into(),
            project: "p-1".into(),
            role: Role::Deployer,
            clusters: names(&["c-1", "c-2"]),
            namespaces: names(&["beta", "production"]),
            ..row(None)
        };
        let principal = Principal::AccessToken(Box::new(own.clone()));
        let all = principal.limits().unwrap();
        let limits = |limits: Limits| principal.clone().within(&limits).and_then(|p| p.limits());
        assert_eq!(limits(all.clone()), Some(all.clone()));
        let less = Limits {
            role: Role::Viewer,
            clusters: names(&["c-2"]),
            namespaces: names(&[]),
            ..all.clone()
        };
        assert_eq!(limits(less.clone()), Some(less.clone()));
        for more in [
            Limits { project: "p-2".into(), ..all.clone() },
            Limits { role: Role::Operator, ..all.clone() },
            Limits { clusters: None, ..all.clone() },
            Limits { clusters: names(&["c-2", "c-3"]), ..all.clone() },
            Limits { namespaces: None, ..all.clone() },
            Limits { namespaces: names(&["beta", "monitoring"]), ..all.clone() },
            Limits { tenant: Some("acme".into()), ..all },
        ] {
            assert_eq!(limits(more.clone()), None, "{more:?}");
        }
        // of a tenant an empty list is no limit, so none within it is more than a list
        let tenant = AccessToken { tenant: Some("acme".into()), ..own.clone() };
        let principal = Principal::AccessToken(Box::new(tenant));
        let loose = Limits { namespaces: names(&[]), ..principal.limits().unwrap() };
        assert!(principal.clone().within(&loose).is_none());
        let other = Limits { tenant: Some("globex".into()), ..principal.limits().unwrap() };
        assert!(principal.within(&other).is_none());
        // a selector stays, whatever else is limited
        let selected =
            AccessToken { clusters: names(&[]), selector: Some("env=prod".into()), ..own };
        let principal = Principal::AccessToken(Box::new(selected));
        let all = principal.limits().unwrap();
        assert_eq!(all.clusters, None);
        let within = |clusters| {
            let limited = principal.clone().within(&Limits { clusters, ..all.clone() })?;
            let Principal::AccessToken(access) = limited else { return None };
            Some((access.clusters, access.selector))
        };
        let selector = Some("env=prod".to_owned());
        assert_eq!(within(None), Some((names(&[]), selector.clone())));
        assert_eq!(within(names(&["c-1"])), Some((names(&["c-1"]), selector)));
        assert_eq!(within(names(&[])), None);
        // an administrator is who it was, and may do what is said
        let eve = Principal::Admin("eve".into()).within(&less).unwrap();
        assert_eq!((eve.id(), eve.subject()), ("admin:eve".into(), "admin:eve".into()));
        assert_eq!(eve.limits(), Some(less.clone()));
        assert!(!eve.is_admin() && Principal::Agent("a-1".into()).within(&less).is_none());
    }
}
