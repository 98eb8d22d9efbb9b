//! The caller's token: a JWT of the control plane, EdDSA and nothing else.
//!
//! RFC 7519 and RFC 8037. One algorithm is needed: a library would bring the others, and with them
//! the choice.

use std::collections::HashMap;
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use parking_lot::Mutex;
use ring::signature::{ED25519, UnparsedPublicKey};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::contract::tenant::is_tenant_name;
use crate::contract::types::{Jwks, LEEWAY, RunnerAuth};

/// Longest lifetime of a token, seconds.
pub const TOKEN_LIFETIME: i64 = 300;
const MAX_LENGTH: usize = 8192;
/// What a signer may demand to be understood (RFC 7515 §4.1.11): with it an agent of a version that
/// knows no tenants refuses a token of one, rather than take it for one of everybody.
const UNDERSTOOD: [&str; 1] = ["tenant"];

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
}

impl Caller {
    /// Whether it may act in some namespaces alone: what is of the whole cluster is not for it.
    pub fn is_limited(&self) -> bool {
        self.namespaces.is_some() || self.tenant.is_some()
    }
}

#[derive(Deserialize)]
struct Header {
    alg: String,
    #[serde(default)]
    kid: Option<String>,
    #[serde(default)]
    crit: Option<Vec<String>>,
    /// The same as the claim: what `crit` names stands in the header.
    #[serde(default)]
    tenant: Option<String>,
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

/// The claims of a token that one of the keys has signed.
fn verify_signature(token: &str, auth: &RunnerAuth) -> Result<Claims, &'static str> {
    let mut parts = token.split('.');
    let (Some(head), Some(claims), Some(signature), None) =
        (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return Err("the token is no JWT");
    };
    let decode = |part: &str| URL_SAFE_NO_PAD.decode(part).map_err(|_| "the token is no JWT");
    let parsed: Header =
        serde_json::from_slice(&decode(head)?).map_err(|_| "the token is no JWT")?;
    if parsed.alg != "EdDSA" {
        return Err("the token is not signed with EdDSA");
    }
    if parsed.crit.as_ref().is_some_and(|crit| *crit != UNDERSTOOD) {
        return Err("the token demands something that this agent does not understand (crit)");
    }
    let signed = &token[..head.len() + 1 + claims.len()];
    let signature = decode(signature)?;
    let keys = auth.jwks.keys.iter().filter(|k| {
        k.kty == "OKP" && k.crv == "Ed25519" && parsed.kid.as_ref().is_none_or(|kid| *kid == k.kid)
    });
    let mut keys = keys.filter_map(|k| URL_SAFE_NO_PAD.decode(&k.x).ok());
    if !keys.any(|key| {
        UnparsedPublicKey::new(&ED25519, key).verify(signed.as_bytes(), &signature).is_ok()
    }) {
        return Err("the token's signature is wrong");
    }
    let claims: Claims = serde_json::from_slice(&decode(claims)?)
        .map_err(|_| "a claim is missing or has the wrong type")?;
    let demanded = parsed.crit.is_some() || parsed.tenant.is_some();
    if demanded && (parsed.tenant.is_none() || parsed.tenant != claims.tenant) {
        return Err("header and claims of the token do not name the same tenant");
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
    })
}

#[cfg(test)]
mod tests {
    use ring::signature::{Ed25519KeyPair, KeyPair as _};
    use serde_json::{Value, json};

    use super::*;
    use crate::contract::types::Jwk;

    const NOW: i64 = 1_800_000_000;

    struct Issuer {
        key: Ed25519KeyPair,
        auth: RunnerAuth,
    }

    fn issuer() -> Issuer {
        let pkcs8 = Ed25519KeyPair::generate_pkcs8(&ring::rand::SystemRandom::new()).unwrap();
        let key = Ed25519KeyPair::from_pkcs8(pkcs8.as_ref()).unwrap();
        let x = URL_SAFE_NO_PAD.encode(key.public_key());
        let jwk = Jwk { kid: "k1".into(), kty: "OKP".into(), crv: "Ed25519".into(), x };
        Issuer {
            key,
            auth: RunnerAuth {
                issuer: "cp".into(),
                audience: "a-1".into(),
                jwks: Jwks { keys: vec![jwk] },
            },
        }
    }

    impl Issuer {
        fn sign(&self, head: &Value, claims: &Value) -> String {
            let part = |v: &Value| URL_SAFE_NO_PAD.encode(v.to_string());
            let signed = format!("{}.{}", part(head), part(claims));
            format!("{signed}.{}", URL_SAFE_NO_PAD.encode(self.key.sign(signed.as_bytes())))
        }

        fn check(&self, change: impl Fn(&mut Value, &mut Value)) -> Result<Caller, &'static str> {
            let mut head = json!({"alg": "EdDSA", "kid": "k1"});
            let mut claims = json!({
                "iss": "cp", "aud": "a-1", "exp": NOW + 200, "sub": "runner-1", "role": "deployer",
                "jti": "t1"
            });
            change(&mut head, &mut claims);
            verify(
                &self.sign(&head, &claims),
                &self.auth,
                "a-1",
                Role::Operator,
                NOW,
                &Mutex::default(),
            )
        }
    }

    #[test]
    fn a_good_token_names_its_caller() {
        let of_tenant = issuer().check(|_, c| c["tenant"] = json!("acme")).unwrap();
        let demanded = issuer().check(|h, c| {
            (h["crit"], h["tenant"], c["tenant"]) =
                (json!(["tenant"]), json!("acme"), json!("acme"));
        });
        assert_eq!(demanded.unwrap(), of_tenant);
        assert!(of_tenant.is_limited() && of_tenant.tenant.as_deref() == Some("acme"));
        let caller = issuer().check(|_, c| c["namespaces"] = json!(["beta"])).unwrap();
        assert!(caller.is_limited() && caller.tenant.is_none());
        assert!(!issuer().check(|_, c| c["tenant"] = Value::Null).unwrap().is_limited());
        assert_eq!(
            (caller.subject.as_str(), caller.role, caller.namespaces),
            ("runner-1", Role::Deployer, Some(vec!["beta".into()]))
        );
        assert!(
            issuer()
                .check(|h, c| (h["kid"], c["aud"]) = (Value::Null, json!(["x", "a-1"])))
                .is_ok()
        );
        assert!(issuer().check(|_, c| c["exp"] = json!(NOW - LEEWAY + 1)).is_ok());
    }

    #[test]
    fn every_other_one_is_refused() {
        type Change = dyn Fn(&mut Value, &mut Value);
        let refused: &[(&str, &Change)] = &[
            ("not signed with EdDSA", &|h, _| h["alg"] = json!("none")),
            ("not signed with EdDSA", &|h, _| h["alg"] = json!("HS256")),
            ("understand (crit)", &|h, _| h["crit"] = json!(["exp"])),
            ("understand (crit)", &|h, _| h["crit"] = json!(["tenant", "exp"])),
            ("understand (crit)", &|h, _| h["crit"] = json!([])),
            // RFC 7515 §4.1.11: what is named there is in the header, and the claim is the same
            ("the same tenant", &|h, _| h["crit"] = json!(["tenant"])),
            ("the same tenant", &|h, c| {
                (h["crit"], c["tenant"]) = (json!(["tenant"]), json!("acme"));
            }),
            ("the same tenant", &|h, _| {
                (h["crit"], h["tenant"]) = (json!(["tenant"]), json!("acme"));
            }),
            ("the same tenant", &|h, c| {
                (h["crit"], h["tenant"], c["tenant"]) =
                    (json!(["tenant"]), json!("acme"), json!("globex"));
            }),
            ("the same tenant", &|h, _| h["tenant"] = json!("acme")),
            ("signature", &|h, _| h["kid"] = json!("other")),
            ("another agent", &|_, c| c["aud"] = json!("a-2")),
            ("another agent", &|_, c| c["aud"] = json!([])),
            ("another issuer", &|_, c| c["iss"] = json!("evil")),
            ("expired", &|_, c| c["exp"] = json!(NOW - LEEWAY)),
            ("longer than 300", &|_, c| c["exp"] = json!(NOW + 3600)),
            ("longer than 300", &|_, c| c["iat"] = json!(NOW - 200)),
            ("not valid yet", &|_, c| c["nbf"] = json!(NOW + 60)),
            ("more than", &|_, c| c["role"] = json!("admin")),
            ("a claim", &|_, c| c["role"] = json!("root")),
            ("a claim", &|_, c| c["exp"] = json!("soon")),
            ("a claim", &|_, c| c["jti"] = Value::Null),
            ("a claim", &|_, c| c["namespaces"] = json!("beta")),
            ("cannot be used", &|_, c| c["sub"] = json!("a\r\nImpersonate-User: root")),
            ("cannot be used", &|_, c| c["sub"] = json!("")),
            // one that is there and empty is not one that is not there
            ("the tenant", &|_, c| c["tenant"] = json!("")),
            ("the tenant", &|_, c| c["tenant"] = json!("Acme")),
            ("the tenant", &|_, c| c["tenant"] = json!("a".repeat(41))),
            ("a claim", &|_, c| c["tenant"] = json!(["acme"])),
        ];
        let issuer = issuer();
        for (why, change) in refused {
            let verdict = issuer.check(change);
            assert!(verdict.as_ref().is_err_and(|e| e.contains(why)), "{why}: {verdict:?}");
        }
        let good = issuer.sign(
            &json!({"alg": "EdDSA"}),
            &json!({
                "iss": "cp", "aud": "a-1", "exp": NOW + 200, "sub": "r", "role": "viewer",
                "jti": "t"
            }),
        );
        let other = self::issuer();
        assert!(verify(&good, &other.auth, "a-1", Role::Admin, NOW, &Mutex::default()).is_err());
        assert!(
            verify(&good, &RunnerAuth::default(), "a-1", Role::Admin, NOW, &Mutex::default())
                .is_err()
        );
        for broken in
            ["", "a.b", "a.b.c.d", &good[1..], &good[..good.len() - 2], &"x".repeat(10_000)]
        {
            assert!(
                verify(broken, &issuer.auth, "a-1", Role::Admin, NOW, &Mutex::default()).is_err()
            );
        }
    }

    #[test]
    fn a_token_that_was_good_before_is_judged_all_the_same() {
        let (mut issuer, known) = (issuer(), Mutex::default());
        let claims = json!({
            "iss": "cp", "aud": "a-1", "exp": NOW + 200, "sub": "r", "role": "viewer", "jti": "t"
        });
        let token = issuer.sign(&json!({"alg": "EdDSA", "kid": "k1"}), &claims);
        let verify = |token: &str, auth: &RunnerAuth, now| {
            verify(token, auth, "a-1", Role::Admin, now, &known)
        };
        assert!(
            verify(&token, &issuer.auth, NOW).is_ok() && verify(&token, &issuer.auth, NOW).is_ok()
        );
        // time, another text with its head, and other keys
        assert_eq!(verify(&token, &issuer.auth, NOW + 400), Err("the token has expired"));
        let (signed, signature) = token.rsplit_once('.').unwrap();
        let forged = format!(
            "{signed}.{}{}",
            if signature.starts_with('A') { 'B' } else { 'A' },
            &signature[1..]
        );
        assert_eq!(verify(&forged, &issuer.auth, NOW), Err("the token's signature is wrong"));
        issuer.auth.jwks = self::issuer().auth.jwks;
        assert_eq!(verify(&token, &issuer.auth, NOW), Err("the token's signature is wrong"));
    }
}
