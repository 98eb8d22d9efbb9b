//! Limits of a requested token: role, namespaces and lifetime, never more than the caller has.

use serde::Deserialize;

use super::error::HttpError;
use super::registry::Principal;
use crate::base::text::{is_dns_label, printable};
use crate::contract::token::Role;

pub(super) use super::keys::DAY;
/// Longest lifetime of an enrolment token and of a Runner's token, seconds.
pub const YEAR: i64 = 366 * DAY;

/// For a Runner's JWT and for a kubeconfig alike.
#[derive(Default, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "TokenRequest"))]
#[serde(deny_unknown_fields)]
pub(super) struct TokenRequest {
    #[cfg_attr(test, schemars(with = "Option<Role>"))]
    pub(super) role: Option<String>,
    pub(super) namespaces: Option<Vec<String>>,
    pub(super) ttl_s: Option<i64>,
}

pub(super) fn parse_role(name: Option<&str>, default: Role) -> Result<Role, HttpError> {
    let Some(name) = name else { return Ok(default) };
    Role::from_name(name).ok_or_else(|| {
        HttpError::new(400, "bad_role", "a role is viewer, deployer, operator or admin", None)
    })
}

pub(super) fn checked_ttl(
    requested: Option<i64>,
    default: i64,
    max: i64,
) -> Result<i64, HttpError> {
    let ttl = requested.unwrap_or(default);
    if (1..=max).contains(&ttl) {
        Ok(ttl)
    } else {
        Err(HttpError::new(400, "bad_ttl", format!("ttl_s is 1 to {max}"), None))
    }
}

/// A token for a namespace that cannot exist would reach nothing.
///
/// # Errors
/// 400 for the first that is no RFC 1123 label.
pub(super) fn check_namespaces(names: Option<&[String]>) -> Result<(), HttpError> {
    match names.unwrap_or_default().iter().find(|name| !is_dns_label(name)) {
        None => Ok(()),
        Some(wrong) => {
            let wrong: String = printable(wrong).chars().take(80).collect();
            Err(HttpError::new(
                400,
                "bad_name",
                format!("`{wrong}` is no name of a namespace"),
                Some("a namespace has 1 to 63 lower-case letters, digits and -, as in team-a"),
            ))
        }
    }
}

/// Role and namespaces of a requested token, never more than the caller has.
pub(super) fn restrict(
    principal: &Principal,
    request: &TokenRequest,
) -> Result<(Role, Option<Vec<String>>), HttpError> {
    let (max, limits) = match principal {
        Principal::AccessToken(access) => (access.role, access.namespaces.clone()),
        _ => (Role::Operator, None),
    };
    let role = parse_role(request.role.as_deref(), max)?;
    if role > max && !principal.is_admin() {
        return Err(HttpError::new(
            403,
            "role_exceeded",
            format!("this token's role is {}", max.name()),
            None,
        ));
    }
    check_namespaces(request.namespaces.as_deref())?;
    let namespaces = match (request.namespaces.clone(), limits) {
        (Some(requested), Some(limits)) if requested.iter().any(|n| !limits.contains(n)) => {
            return Err(HttpError::new(
                403,
                "namespace_exceeded",
                format!("this token is for {}", limits.join(", ")),
                None,
            ));
        }
        (Some(requested), _) => Some(requested),
        (None, limits) => limits,
    };
    Ok((role, namespaces))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control_plane::model::{AccessKind, AccessToken};

    #[test]
    fn nobody_asks_for_more_than_he_has() {
        let access = |role, namespaces: Option<&[&str]>| {
            let namespaces = namespaces.map(|n| n.iter().map(|s| (*s).to_owned()).collect());
            Principal::AccessToken(Box::new(AccessToken {
                id: "r-1".into(),
                project: "p".into(),
                name: "ci".into(),
                kind: AccessKind::Runner,
                hash: String::new(),
                role,
                clusters: None,
                namespaces,
                created_at: 0,
                expires_at: None,
                revoked: false,
                maker: None,
                person: false,
            }))
        };
        let requested = |role: Option<&str>, namespaces: Option<&[&str]>| TokenRequest {
            role: role.map(str::to_owned),
            namespaces: namespaces.map(|n| n.iter().map(|s| (*s).to_owned()).collect()),
            ttl_s: None,
        };
        let deployer = access(Role::Deployer, Some(&["beta"]));
        assert_eq!(
            restrict(&deployer, &requested(None, None)).unwrap(),
            (Role::Deployer, Some(vec!["beta".into()]))
        );
        assert_eq!(
            restrict(&deployer, &requested(Some("viewer"), Some(&["beta"]))).unwrap().0,
            Role::Viewer
        );
        assert_eq!(
            restrict(&deployer, &requested(Some("operator"), None)).unwrap_err().code,
            "role_exceeded"
        );
        assert_eq!(
            restrict(&deployer, &requested(None, Some(&["beta", "production"]))).unwrap_err().code,
            "namespace_exceeded"
        );
        assert_eq!(
            restrict(&deployer, &requested(Some("root"), None)).unwrap_err().code,
            "bad_role"
        );
    }

    #[test]
    fn a_namespace_that_cannot_exist_is_refused() {
        let check = |name: &str| check_namespaces(Some(&["beta".into(), name.into()]));
        for name in ["team-a", "0", &"x".repeat(63)] {
            assert_eq!(check(name), Ok(()), "{name}");
        }
        for name in ["A B", "Beta", "", "-a", "a-", "a.b", "a_b", "a\n", &"x".repeat(64)] {
            assert_eq!(check(name).unwrap_err().code, "bad_name", "{name}");
        }
        assert_eq!(check_namespaces(None), Ok(()));
    }
}
