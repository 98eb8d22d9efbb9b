//! Tokens of callers: what is taken, and each thing that is not.

use ring::signature::{Ed25519KeyPair, KeyPair as _};
use serde_json::{Value, json};

use super::*;
use crate::contract::types::Jwk;

const NOW: i64 = 1_800_000_000;

pub(super) struct Issuer {
    key: Ed25519KeyPair,
    pub(super) auth: RunnerAuth,
}

pub(super) fn issuer() -> Issuer {
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
    pub(super) fn sign(&self, head: &Value, claims: &Value) -> String {
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
        (h["crit"], h["tenant"], c["tenant"]) = (json!(["tenant"]), json!("acme"), json!("acme"));
    });
    assert_eq!(demanded.unwrap(), of_tenant);
    assert!(of_tenant.is_limited() && of_tenant.tenant.as_deref() == Some("acme"));
    let one = issuer().check(|h, c| {
        h["crit"] = json!(["operation"]);
        (h["operation"], c["operation"]) = (json!("o-1/ab"), json!("o-1/ab"));
    });
    let one = one.unwrap();
    assert!(one.may_touch("o-1") && !one.may_touch("o-2") && !one.may_touch("o-1/ab"));
    assert!(of_tenant.operation.is_none() && of_tenant.may_touch("o-2"));
    let both = issuer().check(|h, c| {
        h["crit"] = json!(["tenant", "operation"]);
        for part in [h, c] {
            (part["tenant"], part["operation"]) = (json!("acme"), json!("o-1/ab"));
        }
    });
    assert_eq!(both.unwrap().tenant.as_deref(), Some("acme"));
    assert!(issuer().check(|h, _| h["typ"] = json!("JWT")).is_ok());
    let caller = issuer().check(|_, c| c["namespaces"] = json!(["beta"])).unwrap();
    assert!(caller.is_limited() && caller.tenant.is_none());
    assert!(!issuer().check(|_, c| c["tenant"] = Value::Null).unwrap().is_limited());
    assert_eq!(
        (caller.subject.as_str(), caller.role, caller.namespaces),
        ("runner-1", Role::Deployer, Some(vec!["beta".into()]))
    );
    assert!(
        issuer().check(|h, c| (h["kid"], c["aud"]) = (Value::Null, json!(["x", "a-1"]))).is_ok()
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
        ("the same tenant", &|h, _| h["operation"] = json!("o-1/ab")),
        ("the same tenant", &|h, c| {
            (h["crit"], c["operation"]) = (json!(["operation"]), json!("o-1/ab"));
        }),
        ("the same tenant", &|h, c| {
            (h["operation"], c["operation"]) = (json!("o-1/ab"), json!("o-2/ab"));
        }),
        ("understand (crit)", &|h, _| h["crit"] = json!(["operation", "tenant"])),
        ("understand (crit)", &|h, _| h["crit"] = json!(["operation", "operation"])),
        ("one of a job", &|h, _| h["typ"] = json!(job::TOKEN_TYPE)),
        ("another agent", &|_, c| c["aud"] = json!(job::AUDIENCE)),
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
        verify(&good, &RunnerAuth::default(), "a-1", Role::Admin, NOW, &Mutex::default()).is_err()
    );
    for broken in ["", "a.b", "a.b.c.d", &good[1..], &good[..good.len() - 2], &"x".repeat(10_000)] {
        assert!(verify(broken, &issuer.auth, "a-1", Role::Admin, NOW, &Mutex::default()).is_err());
    }
}

#[test]
fn a_token_that_was_good_before_is_judged_all_the_same() {
    let (mut issuer, known) = (issuer(), Mutex::default());
    let claims = json!({
        "iss": "cp", "aud": "a-1", "exp": NOW + 200, "sub": "r", "role": "viewer", "jti": "t"
    });
    let token = issuer.sign(&json!({"alg": "EdDSA", "kid": "k1"}), &claims);
    let verify =
        |token: &str, auth: &RunnerAuth, now| verify(token, auth, "a-1", Role::Admin, now, &known);
    assert!(verify(&token, &issuer.auth, NOW).is_ok() && verify(&token, &issuer.auth, NOW).is_ok());
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
