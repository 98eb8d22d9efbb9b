//! Tokens of jobs, for whoever makes them: see [`crate::contract::token::job`].

use serde::Deserialize;
use serde_json::{Value, json};

use super::clock::rfc3339;
use super::error::{HttpError, database_unavailable};
use super::jobs::bad_job;
use super::keys::random_hex;
use super::model::AccessToken;
use super::registry::{Principal, parse_selector};
use super::scope::{TokenRequest, checked_ttl, restrict};
use super::state::ControlPlane;
use crate::contract::job::{answers_exchange, jobs_exchange};
use crate::contract::token::Role;
use crate::contract::token::job::{AUDIENCE, LONGEST, TOKEN_TYPE};

/// Lifetime of a job's token where none is asked for, seconds.
const DEFAULT_TTL: i64 = 3600;
/// The most clusters that a token names.
const MAX_CLUSTERS: usize = 2000;

/// For whom a job is, and what it may do at most: never more than who asks.
#[derive(Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub(super) struct JobTokenRequest {
    /// Of the exact bytes of its body, lower-case hexadecimal.
    sha256: String,
    /// Names or ids.
    clusters: Option<Vec<String>>,
    /// In place of `clusters`: those that it names now.
    selector: Option<String>,
    #[cfg_attr(test, schemars(with = "Option<Role>"))]
    role: Option<String>,
    namespaces: Option<Vec<String>>,
    tenant: Option<String>,
    /// Seconds, a day at most.
    ttl_s: Option<i64>,
}

/// Of an administrator, who belongs to no project.
pub(super) fn project_needed() -> HttpError {
    let hint = Some("ask with the token of a Runner or of a user");
    HttpError::new(400, "project_needed", "jobs belong to a project", hint)
}

impl ControlPlane {
    /// A token for the job with this body, and where to publish it.
    ///
    /// # Errors
    /// 400 for what says nothing sensible, 403 for more than the caller has, 404 for a cluster.
    pub(super) fn issue_job_token(
        &self,
        principal: &Principal,
        request: JobTokenRequest,
        now: i64,
    ) -> Result<Value, HttpError> {
        let Principal::AccessToken(maker) = principal else {
            return Err(project_needed());
        };
        let is_hex = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
        if request.sha256.len() != 64 || !request.sha256.bytes().all(is_hex) {
            return Err(bad_job("sha256 is 64 hexadecimal digits, in lower case"));
        }
        let ttl = checked_ttl(request.ttl_s, DEFAULT_TTL, LONGEST)?;
        // not longer than that of its maker
        let expires = maker.expires_at.map_or(now + ttl, |end| end.min(now + ttl));
        let clusters = self.job_clusters(principal, maker, &request, now)?;
        let JobTokenRequest { sha256, role, namespaces, tenant, .. } = request;
        let scope = restrict(principal, &TokenRequest { role, namespaces, tenant, ttl_s: None })?;
        if scope.role < Role::Deployer {
            return Err(HttpError::new(403, "role_exceeded", "a viewer changes nothing", None));
        }
        let id = format!("j-{}", random_hex().map_err(|e| database_unavailable(&e))?);
        let mut claims = json!({
            "iss": self.issuer(), "aud": AUDIENCE, "jti": id, "iat": now, "exp": expires,
            "sub": maker.subject(), "maker": maker.id, "project": maker.project,
            "role": scope.role.name(), "namespaces": scope.stored_namespaces(),
            "clusters": clusters, "hash": sha256,
        });
        if let Some(tenant) = &scope.tenant {
            claims["tenant"] = tenant.as_str().into();
        }
        let project = self.registry().project(&maker.project)?;
        let mut shown = json!({
            "token": self.keys().sign(TOKEN_TYPE, &claims).expose(), "id": id,
            "expires_at": rfc3339(expires), "project": project.id, "maker": maker.id,
            "exchange": jobs_exchange(&project.id), "reply_queue": answers_exchange(&project.id),
        });
        if let Some(key) = project.sealing_key {
            shown["sealing_key"] = key.into();
        }
        Ok(shown)
    }

    /// Ids of the clusters that a token is for; none for all that its maker reaches.
    fn job_clusters(
        &self,
        principal: &Principal,
        maker: &AccessToken,
        request: &JobTokenRequest,
        now: i64,
    ) -> Result<Option<Vec<String>>, HttpError> {
        let registry = self.registry();
        let found = match (&request.clusters, &request.selector) {
            (Some(_), Some(_)) => {
                return Err(bad_job("clusters and a selector exclude each other"));
            }
            (Some(names), None) => {
                let id = |name: &String| -> Result<String, HttpError> {
                    registry.check_access(maker, name)?;
                    Ok(registry.target(name, Some(&maker.project))?.cluster)
                };
                names.iter().map(id).collect::<Result<_, _>>()?
            }
            (None, Some(selector)) => {
                registry.select(principal, Some(&parse_selector(selector)?), now)
            }
            (None, None) if maker.clusters.is_none() && maker.selector.is_none() => {
                return Ok(None);
            }
            (None, None) => registry.select(principal, None, now),
        };
        match found.len() {
            0 => Err(HttpError::new(
                400,
                "no_cluster_matches",
                "the token would be for no cluster",
                Some("`pipeops clusters` lists those within reach, with their labels"),
            )),
            1..=MAX_CLUSTERS => Ok(Some(found)),
            many => Err(bad_job(format!("{many} clusters: a token has {MAX_CLUSTERS} at most"))),
        }
    }
}
