//! What somebody asks for himself: a role, namespaces and a life, never more than he has.

use serde::Deserialize;

use super::registry::{Refused, Who, refused};
use crate::contract::token::Role;

pub(super) const DAY: i64 = 86_400;
/// Longest life of an enrolment token and of a Runner's token, seconds.
pub(super) const YEAR: i64 = 366 * DAY;

/// For a Runner's JWT and for a kubeconfig alike.
#[derive(Default, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "TokenRequest"))]
#[serde(deny_unknown_fields)]
pub(super) struct Wanted {
    #[cfg_attr(test, schemars(with = "Option<Role>"))]
    pub(super) role: Option<String>,
    pub(super) namespaces: Option<Vec<String>>,
    pub(super) ttl_s: Option<i64>,
}

pub(super) fn role(name: Option<&str>, otherwise: Role) -> Result<Role, Refused> {
    let Some(name) = name else { return Ok(otherwise) };
    Role::of(name).ok_or_else(|| {
        refused(400, "bad_role", "a role is viewer, deployer, operator or admin", None)
    })
}

pub(super) fn life(asked: Option<i64>, otherwise: i64, most: i64) -> Result<i64, Refused> {
    let ttl = asked.unwrap_or(otherwise);
    if (1..=most).contains(&ttl) {
        Ok(ttl)
    } else {
        Err(refused(400, "bad_ttl", format!("ttl_s is 1 to {most}"), None))
    }
}

/// Role and namespaces of what is asked for, never more than the asker has.
pub(super) fn narrowed(who: &Who, asked: &Wanted) -> Result<(Role, Option<Vec<String>>), Refused> {
    let (most, limits) = match who {
        Who::Access(access) => (access.role, access.namespaces.clone()),
        _ => (Role::Operator, None),
    };
    let wanted = role(asked.role.as_deref(), most)?;
    if wanted > most && !who.all() {
        return Err(refused(
            403,
            "role_exceeded",
            format!("this token's role is {}", most.name()),
            None,
        ));
    }
    let namespaces = match (asked.namespaces.clone(), limits) {
        (Some(asked), Some(limits)) if asked.iter().any(|n| !limits.contains(n)) => {
            return Err(refused(
                403,
                "namespace_exceeded",
                format!("this token is for {}", limits.join(", ")),
                None,
            ));
        }
        (Some(asked), _) => Some(asked),
        (None, limits) => limits,
    };
    Ok((wanted, namespaces))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control_plane::model::{Access, AccessKind};

    #[test]
    fn nobody_asks_for_more_than_he_has() {
        let access = |role, namespaces: Option<&[&str]>| {
            let namespaces = namespaces.map(|n| n.iter().map(|s| (*s).to_owned()).collect());
            Who::Access(Box::new(Access {
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
            }))
        };
        let wanted = |role: Option<&str>, namespaces: Option<&[&str]>| Wanted {
            role: role.map(str::to_owned),
            namespaces: namespaces.map(|n| n.iter().map(|s| (*s).to_owned()).collect()),
            ttl_s: None,
        };
        let deployer = access(Role::Deployer, Some(&["beta"]));
        assert_eq!(
            narrowed(&deployer, &wanted(None, None)).unwrap(),
            (Role::Deployer, Some(vec!["beta".into()]))
        );
        assert_eq!(
            narrowed(&deployer, &wanted(Some("viewer"), Some(&["beta"]))).unwrap().0,
            Role::Viewer
        );
        assert_eq!(
            narrowed(&deployer, &wanted(Some("operator"), None)).unwrap_err().code,
            "role_exceeded"
        );
        assert_eq!(
            narrowed(&deployer, &wanted(None, Some(&["beta", "production"]))).unwrap_err().code,
            "namespace_exceeded"
        );
        assert_eq!(narrowed(&deployer, &wanted(Some("root"), None)).unwrap_err().code, "bad_role");
    }
}
