//! The caller's token: a JWT of the control plane, EdDSA and nothing else. The token of a job
//! ([`job`]) is signed with the same keys, and is none: its type and its audience are
//! others.
//!
//! RFC 7519 and RFC 8037. One algorithm is needed: a library would bring the others, and with them
//! the choice.

pub mod job;

use std::collections::HashMap;
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use parking_lot::Mutex;
use ring::signature::{ED25519, UnparsedPublicKey};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::base::json;
use crate::contract::tenant::is_tenant_name;
use crate::contract::types::{Jwks, LEEWAY, RunnerAuth};

/// Longest lifetime of a token, seconds.
pub const TOKEN_LIFETIME: i64 = 300;
const MAX_LENGTH: usize = 8192;
/// What a signer may demand to be understood (RFC 7515 §4.1.11), in this order: with it an agent of
/// a version that knows no tenants refuses a token of one, rather than take it for one of
/// everybody, and one that knows no tokens for one operation does not take it for one for
/// everything.
pub const UNDERSTOOD: [&str; 2] = ["tenant", "operation"];
/// What an agent says among its capabilities that knows tokens for one operation.
pub const OPERATION_TOKENS: &str = "operation_tokens";
/// `typ` of a caller token, where it has one.
pub const CALLER_TOKEN_TYPE: &str = "JWT";

/// What a caller may do at most; Kubernetes enforces what it means.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum Role {
    Viewer,
    Deployer,
    Operator,
    Admin,
}

impl Role {
    pub const ALL: [Role; 4] = [Role::Viewer, Role::Deployer, Role::Operator, Role::Admin];

    /// The role of that name.
    pub fn from_name(name: &str) -> Option<Role> {
        Role::ALL.into_iter().find(|r| r.name() == name)
    }

    pub fn name(self) -> &'static str {
        match self {
            Role::Viewer => "viewer",
            Role::Deployer => "deployer",
            Role::Operator => "operator",
            Role::Admin => "admin",
        }
    }
}

/// Who makes a request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Caller {
    pub subject: String,
    pub role: Role,
    /// Only these namespaces; without it all of them.
    pub namespaces: Option<Vec<String>>,
    /// Only the namespaces of this tenant; without it those of everybody.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tenant: Option<String>,
    /// Id of the token, for the audit log.
    pub token_id: String,
    /// Only this operation, with the body of this digest: what [`only_operation`] gives. Without it
    /// all that the role may do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub operation: Option<String>,
}

/// What a token for one operation says: id and digest of the request's body, both of them
/// hexadecimal.
pub fn only_operation(id: &str, digest: &str) -> String {
    format!("{id}/{digest}")
}

impl Caller {
    /// Whether it may act in some namespaces alone: what is of the whole cluster is not for it.
    pub fn is_limited(&self) -> bool {
        self.namespaces.is_some() || self.tenant.is_some()
    }

    /// Whether an operation is not beyond its token.
    pub fn may_touch(&self, id: &str) -> bool {
        let only = self.operation.as_ref().and_then(|only| only.split_once('/'));
        self.operation.is_none() || only.is_some_and(|(only, _)| only == id)
    }
}

#[derive(Deserialize)]
struct Header {
    alg: String,
    #[serde(default)]
    kid: Option<String>,
    #[serde(default)]
    typ: Option<String>,
    #[serde(default)]
    crit: Option<Vec<String>>,
    /// The same as the claim: what `crit` names stands in the header.
    #[serde(default)]
    tenant: Option<String>,
    #[serde(default)]
    operation: Option<String>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Audience {
    One(String),
    Many(Vec<String>),
}

#[derive(Deserialize)]
struct Claims {
    iss: String,
    aud: Audience,
    exp: i64,
    #[serde(default)]
    nbf: Option<i64>,
    #[serde(default)]
    iat: Option<i64>,
    sub: String,
    role: Role,
    #[serde(default)]
    namespaces: Option<Vec<String>>,
    #[serde(default)]
    tenant: Option<String>,
    #[serde(default)]
    operation: Option<String>,
    jti: String,
}

/// Tokens whose signature was verified, with their claims: the signature of a token is verified
/// once. Its claims are checked on every request.
#[derive(Default)]
pub struct VerifiedTokens {
    /// The keys that they were verified with; with other keys none of them is valid.
    keys: Jwks,
    claims: HashMap<[u8; 32], Arc<Claims>>,
}

/// Most tokens that are remembered; a token lives 300 s.
const MAX_VERIFIED: usize = 1024;

impl VerifiedTokens {
    fn get(&self, digest: &[u8; 32], keys: &Jwks) -> Option<Arc<Claims>> {
        self.claims.get(digest).filter(|_| self.keys == *keys).cloned()
    }

    fn insert(&mut self, digest: [u8; 32], keys: &Jwks, claims: Arc<Claims>) {
        if self.keys != *keys || self.claims.len() >= MAX_VERIFIED {
            self.keys.clone_from(keys);
            self.claims.clear();
        }
        self.claims.insert(digest, claims);
    }
}

/// Checks a token at `now`, seconds since 1970 by the control plane's clock.
///
/// # Errors
/// Why it is refused, in words that repeat nothing of the token.
pub fn verify(
    token: &str,
    auth: &RunnerAuth,
    agent: &str,
    max_role: Role,
    now: i64,
    verified: &Mutex<VerifiedTokens>,
) -> Result<Caller, &'static str> {
    if auth.jwks.keys.is_empty() {
        return Err("this agent has no keys of a control plane yet");
    }
    if token.len() > MAX_LENGTH {
        return Err("the token is too long");
    }
    let digest: [u8; 32] = Sha256::digest(token).into();
    let known_claims = verified.lock().get(&digest, &auth.jwks);
    let claims = match known_claims {
        Some(claims) => claims,
        None => {
            let claims = Arc::new(verify_signature(token, auth)?);
            verified.lock().insert(digest, &auth.jwks, claims.clone());
            claims
        }
    };
    check_claims(&claims, auth, agent, max_role, now)
}

/// Header and claims of a token that one of the keys has signed.
fn signed(token: &str, keys: &Jwks) -> Result<(Header, Vec<u8>), &'static str> {
    let mut parts = token.split('.');
    let (Some(head), Some(claims), Some(signature), None) =
        (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return Err("the token is no JWT");
    };
    let decode = |part: &str| URL_SAFE_NO_PAD.decode(part).map_err(|_| "the token is no JWT");
    let parsed: Header = json::read(decode(head)?).map_err(|_| "the token is no JWT")?;
    if parsed.alg != "EdDSA" {
        return Err("the token is not signed with EdDSA");
    }
    let demanded = parsed.crit.as_deref();
    let [tenant, operation] = UNDERSTOOD;
    let is_understood =
        |names: &[String]| names == [tenant] || names == [operation] || names == UNDERSTOOD;
    if !demanded.is_none_or(is_understood) {
        return Err("the token demands something that this agent does not understand (crit)");
    }
    let signed = &token[..head.len() + 1 + claims.len()];
    let signature = decode(signature)?;
    let keys = keys.keys.iter().filter(|k| {
        k.kty == "OKP" && k.crv == "Ed25519" && parsed.kid.as_ref().is_none_or(|kid| *kid == k.kid)
    });
    let mut keys = keys.filter_map(|k| URL_SAFE_NO_PAD.decode(&k.x).ok());
    if !keys.any(|key| {
        UnparsedPublicKey::new(&ED25519, key).verify(signed.as_bytes(), &signature).is_ok()
    }) {
        return Err("the token's signature is wrong");
    }
    // what is demanded stands in the header
    let there = [parsed.tenant.is_some(), parsed.operation.is_some()];
    let named = |name: &&str| demanded.is_some_and(|names| names.iter().any(|n| n == name));
    if UNDERSTOOD.iter().zip(there).any(|(name, there)| named(name) && !there) {
        return Err("header and claims of the token do not name the same tenant or operation");
    }
    let claims = decode(claims)?;
    Ok((parsed, claims))
}

/// The claims of a caller token that one of the keys has signed.
fn verify_signature(token: &str, auth: &RunnerAuth) -> Result<Claims, &'static str> {
    let (header, claims) = signed(token, &auth.jwks)?;
    if header.typ.as_deref() == Some(job::TOKEN_TYPE) {
        return Err("the token is one of a job");
    }
    let claims: Claims =
        json::read(claims).map_err(|_| "a claim is missing or has the wrong type")?;
    let differs =
        |header: &Option<String>, claim: &Option<String>| header.is_some() && header != claim;
    if differs(&header.tenant, &claims.tenant) || differs(&header.operation, &claims.operation) {
        return Err("header and claims of the token do not name the same tenant or operation");
    }
    Ok(claims)
}

fn check_claims(
    claims: &Claims,
    auth: &RunnerAuth,
    agent: &str,
    max_role: Role,
    now: i64,
) -> Result<Caller, &'static str> {
    let audience = if auth.audience.is_empty() { agent } else { &auth.audience };
    let meant = match &claims.aud {
        Audience::One(aud) => aud == audience,
        Audience::Many(list) => list.iter().any(|aud| aud == audience),
    };
    if !meant {
        return Err("the token is for another agent");
    }
    if !auth.issuer.is_empty() && claims.iss != auth.issuer {
        return Err("the token is of another issuer");
    }
    if claims.exp.saturating_add(LEEWAY) <= now {
        return Err("the token has expired");
    }
    if claims.exp > now.saturating_add(TOKEN_LIFETIME + LEEWAY)
        || claims.iat.is_some_and(|iat| claims.exp.saturating_sub(iat) > TOKEN_LIFETIME)
    {
        return Err("the token lives longer than 300 s");
    }
    if claims.nbf.or(claims.iat).is_some_and(|from| from > now.saturating_add(LEEWAY)) {
        return Err("the token is not valid yet");
    }
    let plain = |text: &str, max: usize| {
        !text.is_empty() && text.len() <= max && text.bytes().all(|b| b.is_ascii_graphic())
    };
    if !plain(&claims.sub, 253) || !plain(&claims.jti, 128) {
        return Err("subject or id of the token cannot be used");
    }
    if !claims.tenant.as_deref().is_none_or(is_tenant_name) {
        return Err("the tenant of the token cannot be used");
    }
    if claims.role > max_role {
        return Err("the token's role is more than this agent was given");
    }
    Ok(Caller {
        subject: claims.sub.clone(),
        role: claims.role,
        namespaces: claims.namespaces.clone(),
        tenant: claims.tenant.clone(),
        token_id: claims.jti.clone(),
        operation: claims.operation.clone(),
    })
}

#[cfg(test)]
mod tests;
