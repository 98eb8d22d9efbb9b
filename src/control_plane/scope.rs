//! Limits of a requested token: role, namespaces, tenant and lifetime, never more than the caller
//! has.

use serde::Deserialize;

use super::error::HttpError;
use super::registry::Principal;
use crate::base::text::{is_dns_label, printable};
use crate::contract::tenant::is_tenant_name;
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
    pub(super) tenant: Option<String>,
    pub(super) ttl_s: Option<i64>,
}

/// What a token allows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Scope {
    pub(super) role: Role,
    /// `None` for all of them.
    pub(super) namespaces: Option<Vec<String>>,
    /// Only the namespaces of this tenant.
    pub(super) tenant: Option<String>,
}

impl Scope {
    /// As the row of a token has them: see [`AccessToken::namespaces`].
    pub(super) fn stored_namespaces(&self) -> Option<Vec<String>> {
        let of_tenant = || self.tenant.is_some().then(Vec::new);
        self.namespaces.clone().or_else(of_tenant)
    }
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

/// A tenant that no namespace can be of would reach nothing.
///
/// # Errors
/// 400 for what is no name of a tenant.
pub(super) fn check_tenant(name: Option<&str>) -> Result<(), HttpError> {
    let Some(wrong) = name.filter(|name| !is_tenant_name(name)) else { return Ok(()) };
    let wrong: String = printable(wrong).chars().take(80).collect();
    let hint = Some("a tenant has 1 to 40 lower-case letters, digits and -, as in acme");
    Err(HttpError::new(400, "bad_name", format!("`{wrong}` is no name of a tenant"), hint))
}

/// Role, namespaces and tenant of a requested token, never more than the caller has.
pub(super) fn restrict(principal: &Principal, request: &TokenRequest) -> Result<Scope, HttpError> {
    let (max, limits) = match principal {
        Principal::AccessToken(access) => (access.role, access.namespace_limit().cloned()),
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
    check_tenant(request.tenant.as_deref())?;
    let tenant = match (request.tenant.as_deref(), principal.tenant()) {
        // a tenant is no narrower than a project: it is a place that nobody else has rights in
        (Some(requested), None) if !principal.is_admin() => {
            let message = format!("this token is not for the tenant {requested}");
            let hint = Some("an administrator makes tokens of a tenant: control-plane user create");
            return Err(HttpError::new(403, "tenant_exceeded", message, hint));
        }
        (Some(requested), Some(own)) if requested != own => {
            let message = format!("this token is for the tenant {own}");
            return Err(HttpError::new(403, "tenant_exceeded", message, None));
        }
        (requested, own) => requested.or(own).map(str::to_owned),
    };
    // of a tenant an empty list is no limit
    let requested = request.namespaces.clone().filter(|list| tenant.is_none() || !list.is_empty());
    let namespaces = match (requested, limits) {
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
    Ok(Scope { role, namespaces, tenant })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control_plane::model::{AccessKind, AccessToken};

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    fn access(role: Role, namespaces: Option<&[&str]>, tenant: Option<&str>) -> Principal {
        Principal::AccessToken(Box::new(AccessToken {
            id: "r-1".into(),
            project: "p".into(),
            name: "ci".into(),
            kind: AccessKind::Runner,
            hash: String::new(),
            role,
            clusters: None,
            namespaces: namespaces.map(names),
            tenant: tenant.map(str::to_owned),
            created_at: 0,
            expires_at: None,
            revoked: false,
            maker: None,
            person: false,
            selector: None,
            jobs: false,
        }))
    }

    #[test]
    fn nobody_asks_for_more_than_he_has() {
        let requested = |role: Option<&str>, namespaces: Option<&[&str]>| TokenRequest {
            role: role.map(str::to_owned),
            namespaces: namespaces.map(names),
            ..TokenRequest::default()
        };
        let deployer = access(Role::Deployer, Some(&["beta"]), None);
        assert_eq!(
            restrict(&deployer, &requested(None, None)).unwrap(),
            Scope { role: Role::Deployer, namespaces: Some(names(&["beta"])), tenant: None }
        );
        assert_eq!(
            restrict(&deployer, &requested(Some("viewer"), Some(&["beta"]))).unwrap().role,
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
    fn a_token_of_a_tenant_makes_none_that_reaches_further() {
        let restricted = |limits: Option<&[&str]>, own, namespaces: Option<&[&str]>, tenant| {
            let request = TokenRequest {
                namespaces: namespaces.map(names),
                tenant: Option::map(tenant, str::to_owned),
                ..TokenRequest::default()
            };
            restrict(&access(Role::Deployer, limits, own), &request)
                .map(|scope| (scope.stored_namespaces(), scope.tenant))
                .map_err(|error| error.code)
        };
        let acme = Some("acme");
        let of_acme = |namespaces: &[&str]| Ok((Some(names(namespaces)), Some("acme".to_owned())));
        for (limits, own, namespaces, tenant, wanted) in [
            (None, None, None, None, Ok((None, None))),
            (None, None, Some(&[][..]), None, Ok((Some(Vec::new()), None))),
            (None, None, None, acme, Err("tenant_exceeded")),
            (Some(&["a"][..]), None, None, acme, Err("tenant_exceeded")),
            // as the row of a token has it
            (Some(&[][..]), acme, None, None, of_acme(&[])),
            (Some(&[][..]), acme, None, acme, of_acme(&[])),
            (Some(&[][..]), acme, Some(&["a"][..]), None, of_acme(&["a"])),
            (Some(&["a"][..]), acme, Some(&[][..]), None, of_acme(&["a"])),
            (Some(&["a"][..]), acme, Some(&["b"][..]), None, Err("namespace_exceeded")),
            (Some(&[][..]), acme, None, Some("other"), Err("tenant_exceeded")),
            (None, None, None, Some("A"), Err("bad_name")),
        ] {
            let got = restricted(limits, own, namespaces, tenant);
            assert_eq!(got, wanted, "{limits:?} {own:?} {namespaces:?} {tenant:?}");
        }
        assert_eq!(check_tenant(Some(&"x".repeat(40))), Ok(()));
        assert_eq!(check_tenant(Some(&"x".repeat(41))).unwrap_err().code, "bad_name");
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
