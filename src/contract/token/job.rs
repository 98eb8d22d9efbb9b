//! The token of a job: what the control plane has signed for the body of one, for whoever made it.
//!
//! A JWT of the keys that sign caller tokens, with a type and an audience of its own: an agent
//! takes it for nothing, and nobody takes a caller token for one of these.

use serde::Deserialize;

use super::{Role, signed};
use crate::base::json;
use crate::contract::types::Jwks;

/// `typ` of its header (RFC 8725 §3.11).
pub const TOKEN_TYPE: &str = "pipeops-job+jwt";
/// Its `aud`.
pub const AUDIENCE: &str = "pipeops-jobs";
/// Longest lifetime, seconds.
pub const LONGEST: i64 = 86_400;
/// It may name 2,000 clusters.
const MAX_LENGTH: usize = 64 << 10;

/// What it says. All of it is what its maker had when it was issued, or less.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct JobClaims {
    iss: String,
    aud: String,
    /// Seconds since 1970.
    pub exp: i64,
    /// `j-` and 32 hex digits: the id of the job.
    pub jti: String,
    /// Id of the access that it was issued to.
    pub maker: String,
    pub project: String,
    pub role: Role,
    /// As those of an access, like the rest: none for all of them.
    #[serde(default)]
    pub namespaces: Option<Vec<String>>,
    #[serde(default)]
    pub tenant: Option<String>,
    /// Ids.
    #[serde(default)]
    pub clusters: Option<Vec<String>>,
    /// Digest of the body: what [`crate::contract::job::body_digest`] gives.
    pub hash: String,
}

/// The claims of a token that one of these keys has signed for a job. Whether its time is over is
/// for the caller to judge.
///
/// # Errors
/// Why it is refused, in words that repeat nothing of it.
pub fn verify(token: &str, keys: &Jwks, issuer: &str) -> Result<JobClaims, &'static str> {
    if token.len() > MAX_LENGTH {
        return Err("the token is too long");
    }
    let (header, claims) = signed(token, keys)?;
    if header.typ.as_deref() != Some(TOKEN_TYPE) || header.kid.is_none() {
        return Err("the token is none of a job");
    }
    let claims: JobClaims =
        json::read(claims).map_err(|_| "a claim is missing or has the wrong type")?;
    if claims.aud != AUDIENCE || claims.iss != issuer || header.tenant != claims.tenant {
        return Err("the token is for something else");
    }
    Ok(claims)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::tests::issuer;
    use super::*;

    fn claims() -> Value {
        json!({"iss": "cp", "aud": AUDIENCE, "exp": 1, "iat": 0, "sub": "user:eve", "maker": "r-1",
            "jti": "j-1", "project": "p-1", "role": "deployer", "clusters": ["c-1"], "hash": "ab"})
    }

    #[test]
    fn it_is_known_by_its_type_and_its_audience() {
        let issuer = issuer();
        let check = |change: &dyn Fn(&mut Value, &mut Value)| {
            let mut head = json!({"alg": "EdDSA", "typ": TOKEN_TYPE, "kid": "k1"});
            let mut claims = claims();
            change(&mut head, &mut claims);
            verify(&issuer.sign(&head, &claims), &issuer.auth.jwks, "cp")
        };
        let good = check(&|_, _| ()).unwrap();
        assert_eq!((good.maker.as_str(), good.role), ("r-1", Role::Deployer));
        let of_tenant = check(&|h, c| {
            (h["crit"], h["tenant"], c["tenant"]) =
                (json!(["tenant"]), json!("acme"), json!("acme"));
        });
        assert_eq!(of_tenant.unwrap().tenant.as_deref(), Some("acme"));
        type Change = dyn Fn(&mut Value, &mut Value);
        let refused: &[(&str, &Change)] = &[
            ("EdDSA", &|h, _| h["alg"] = json!("none")),
            ("EdDSA", &|h, _| h["alg"] = json!("HS256")),
            ("signature", &|h, _| h["kid"] = json!("k2")),
            ("none of a job", &|h, _| h["kid"] = Value::Null),
            ("none of a job", &|h, _| h["typ"] = json!("JWT")),
            ("none of a job", &|h, _| h["typ"] = Value::Null),
            ("something else", &|_, c| c["aud"] = json!("a-1")),
            ("a claim", &|_, c| c["aud"] = json!([AUDIENCE])),
            ("something else", &|_, c| c["iss"] = json!("other")),
            ("something else", &|_, c| c["tenant"] = json!("acme")),
            ("a claim", &|_, c| c["maker"] = Value::Null),
            ("a claim", &|_, c| c["role"] = json!("root")),
            ("a claim", &|_, c| c["hash"] = json!(1)),
            ("a claim", &|_, c| c["clusters"] = json!("all")),
            ("crit", &|h, _| h["crit"] = json!(["exp"])),
        ];
        for (why, change) in refused {
            let verdict = check(*change);
            assert!(verdict.as_ref().is_err_and(|e| e.contains(why)), "{why}: {verdict:?}");
        }
        let head = json!({"alg": "EdDSA", "typ": TOKEN_TYPE, "kid": "k1"});
        let token = issuer.sign(&head, &claims());
        assert!(verify(&token, &super::super::tests::issuer().auth.jwks, "cp").is_err());
        let changed = token.replacen('.', "A.", 1);
        for broken in ["", "a.b.c", &token[1..], &changed, &"x".repeat(MAX_LENGTH + 1)] {
            assert!(verify(broken, &issuer.auth.jwks, "cp").is_err(), "{broken}");
        }
    }

    #[test]
    fn no_agent_takes_it_and_no_caller_token_is_one() {
        let issuer = issuer();
        let now = 1_800_000_000;
        // all that a caller token has, and the audience of the agent
        let mut both = claims();
        (both["aud"], both["exp"]) = (json!("a-1"), json!(now + 200));
        both["iat"] = json!(now);
        let as_caller = |head: Value, claims: &Value| {
            let token = issuer.sign(&head, claims);
            let verified = parking_lot::Mutex::default();
            super::super::verify(&token, &issuer.auth, "a-1", Role::Admin, now, &verified).is_ok()
        };
        let head = |typ: &str| json!({"alg": "EdDSA", "typ": typ, "kid": "k1"});
        assert!(as_caller(head("JWT"), &both));
        assert!(!as_caller(head(TOKEN_TYPE), &both));
        both["aud"] = json!(AUDIENCE);
        assert!(!as_caller(head("JWT"), &both) && !as_caller(head(TOKEN_TYPE), &both));
        let caller = issuer.sign(&head("JWT"), &both);
        assert!(verify(&caller, &issuer.auth.jwks, "cp").is_err());
    }
}
