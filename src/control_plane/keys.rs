//! The keys of a control plane: its CA, the keys that sign caller tokens, the key for hashes of
//! tokens.

use anyhow::Context as _;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use parking_lot::{RwLock, RwLockReadGuard};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use ring::rand::SecureRandom as _;
use ring::signature::{Ed25519KeyPair, KeyPair as _};
use ring::{aead, hmac};
use rustls::sign::CertifiedKey;
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::base::encoding::hex;
use crate::base::error::Failure;
use crate::base::json;
use crate::base::secret::Secret;
use crate::base::text::unquoted_json_error;
use crate::base::trust::Pin;
use crate::contract::token::UNDERSTOOD;
use crate::contract::token::job::LONGEST;
use crate::contract::types::{Jwk, Jwks};
use crate::host::state::StateDir;

/// Lifetime of the CA and of the certificate that it signs, days. The certificate is renewed after
/// two thirds of its lifetime.
const CA_DAYS: i64 = 3650;
pub(super) const LEAF_DAYS: i64 = 90;
pub(super) const DAY: i64 = 86_400;
/// A key signs tokens for this long. The one before it stays valid for a while, since the token of
/// a job lives a day.
const SIGNING_PERIOD: i64 = 30 * DAY;
const PREVIOUS_VALID: i64 = LONGEST + 900;

/// `keys.json` in the data directory, 0600.
#[derive(Serialize, Deserialize)]
struct StoredKeys {
    #[serde(serialize_with = "Secret::serialize_exposed")]
    ca_key: Secret,
    ca_certificate: String,
    /// PKCS #8 of the Ed25519 keys, base64: the current one, the next one, and for a while the
    /// previous one.
    #[serde(serialize_with = "reveal_all")]
    signing: Vec<Secret>,
    /// When the current key began to sign.
    #[serde(default)]
    signing_since: i64,
    #[serde(serialize_with = "Secret::serialize_exposed")]
    hash: Secret,
    /// The `auth.token` of FRP clients. Each agent has a proof of its own as well.
    #[serde(serialize_with = "Secret::serialize_exposed")]
    tunnel: Secret,
}

fn reveal_all<S: serde::Serializer>(secrets: &[Secret], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(secrets.iter().map(Secret::expose))
}

const FILE: &str = "keys.json";

fn random<const LENGTH: usize>() -> anyhow::Result<[u8; LENGTH]> {
    let mut bytes = [0; LENGTH];
    ring::rand::SystemRandom::new()
        .fill(&mut bytes)
        .map_err(|_| anyhow::anyhow!("the system gives no random numbers"))?;
    Ok(bytes)
}

/// 16 random bytes in hexadecimal.
///
/// # Errors
/// When the system gives no random numbers.
pub fn random_hex() -> anyhow::Result<String> {
    Ok(hex(&random::<16>()?))
}

/// 32 random bytes in URL-safe base64.
///
/// # Errors
/// When the system gives no random numbers.
pub fn random_token() -> anyhow::Result<String> {
    Ok(URL_SAFE_NO_PAD.encode(random::<32>()?))
}

/// The keys, loaded.
pub struct Keys {
    pub ca_certificate: String,
    pub ca_pin: String,
    pub tunnel_token: Secret,
    ca: Issuer<'static, KeyPair>,
    signing: RwLock<Signing>,
    hash: hmac::Key,
}

/// The keys for caller tokens, by id.
struct Signing {
    keys: Vec<(String, Ed25519KeyPair)>,
    since: i64,
}

impl Signing {
    fn of(stored: &StoredKeys) -> anyhow::Result<Signing> {
        let keys = stored.signing.iter().map(|secret| {
            let pkcs8 = URL_SAFE_NO_PAD.decode(secret.expose()).context("a signing key")?;
            let key = Ed25519KeyPair::from_pkcs8(&pkcs8)
                .map_err(|e| anyhow::anyhow!("a signing key: {e}"))?;
            let digest = ring::digest::digest(&ring::digest::SHA256, key.public_key().as_ref());
            Ok((URL_SAFE_NO_PAD.encode(&digest.as_ref()[..9]), key))
        });
        let keys = keys.collect::<anyhow::Result<Vec<_>>>()?;
        anyhow::ensure!(keys.len() >= 2, "there are two signing keys, and here are {}", keys.len());
        Ok(Signing { keys, since: stored.signing_since })
    }
}

impl Keys {
    /// The keys of the data directory, or new ones, written before they are used.
    ///
    /// # Errors
    /// When the file is damaged or cannot be written.
    pub fn load(state: &StateDir, now: i64) -> anyhow::Result<Keys> {
        let stored: StoredKeys = match state.read(FILE)? {
            Some(text) => json::read(&text).map_err(|e| {
                Failure::usage("KEYS_DAMAGED", "the control plane's keys cannot be read")
                    .why(format!("{FILE}: {}", unquoted_json_error(&e)))
                    .hint(
                        "restore a backup: with other keys no agent would trust this \
                         control plane",
                    )
            })?,
            None => {
                let made = generate(now)?;
                state.write(FILE, &serde_json::to_string(&made)?)?;
                made
            }
        };
        let pin = pin_of(&stored.ca_certificate).context("the CA's certificate")?.to_string();
        let key = KeyPair::from_pem(stored.ca_key.expose()).context("the CA's key")?;
        Ok(Keys {
            ca: Issuer::new(ca_params()?, key),
            signing: RwLock::new(Signing::of(&stored)?),
            ca_certificate: stored.ca_certificate,
            ca_pin: pin,
            tunnel_token: stored.tunnel,
            hash: hmac::Key::new(hmac::HMAC_SHA256, stored.hash.expose().as_bytes()),
        })
    }

    /// Writes the keys of a backup into a data directory, checked.
    ///
    /// # Errors
    /// When it is damaged.
    pub fn restore(state: &StateDir, text: &Secret, now: i64) -> anyhow::Result<Keys> {
        let _: StoredKeys = json::read(text.expose())
            .map_err(|e| anyhow::anyhow!("the keys in the backup: {}", unquoted_json_error(&e)))?;
        state.write(FILE, text.expose())?;
        Keys::load(state, now)
    }

    /// Removes keys that were created a moment ago and were not used yet.
    pub fn discard(state: &StateDir) {
        state.remove(FILE);
    }

    /// Distinguishes these keys from others, without revealing them.
    pub fn fingerprint(&self) -> String {
        self.derive("mark", "").expose().to_owned()
    }

    /// The keys as they stand in a data directory.
    ///
    /// # Errors
    /// When they cannot be read.
    pub fn stored(state: &StateDir) -> anyhow::Result<Option<Secret>> {
        Ok(state.read(FILE)?.map(Secret::new))
    }

    /// The hash of a token that is stored in the database. It is useless without the key, which is
    /// not.
    pub fn token_hash(&self, token: &str) -> String {
        URL_SAFE_NO_PAD.encode(hmac::sign(&self.hash, token.as_bytes()))
    }

    /// A secret for `name`, derived and therefore not stored.
    pub fn derive(&self, purpose: &str, name: &str) -> Secret {
        Secret::new(self.token_hash(&format!("{purpose}\0{name}")))
    }

    /// The key of an agent's stcp proxy: for one Runner, or for the agent and administrators.
    pub fn stcp_key(&self, agent: &str, runner: Option<&str>) -> Secret {
        self.derive("stcp", &runner.map_or_else(|| agent.to_owned(), |id| format!("{agent}/{id}")))
    }

    /// Encrypts a text for the database: a queued operation may contain secrets.
    ///
    /// # Errors
    /// When the system gives no random numbers.
    pub fn seal(&self, text: &str) -> anyhow::Result<String> {
        let nonce = random()?;
        let mut bytes = text.as_bytes().to_vec();
        let sealed = self.encryption_key()?.seal_in_place_append_tag(
            aead::Nonce::assume_unique_for_key(nonce),
            aead::Aad::empty(),
            &mut bytes,
        );
        sealed.map_err(|_| anyhow::anyhow!("a text cannot be sealed"))?;
        Ok(URL_SAFE_NO_PAD.encode([&nonce[..], &bytes].concat()))
    }

    /// Decrypts a text.
    ///
    /// # Errors
    /// When it was encrypted with other keys, or changed since.
    pub fn unseal(&self, sealed: &str) -> anyhow::Result<Secret> {
        let wrong = || anyhow::anyhow!("it was sealed with other keys");
        let bytes = URL_SAFE_NO_PAD.decode(sealed).map_err(|_| wrong())?;
        let (nonce, text) = bytes.split_at_checked(aead::NONCE_LEN).ok_or_else(wrong)?;
        let nonce = aead::Nonce::try_assume_unique_for_key(nonce).map_err(|_| wrong())?;
        let mut text = text.to_vec();
        let text = self
            .encryption_key()?
            .open_in_place(nonce, aead::Aad::empty(), &mut text)
            .map_err(|_| wrong())?;
        Ok(Secret::new(std::str::from_utf8(text).map_err(|_| wrong())?))
    }

    fn encryption_key(&self) -> anyhow::Result<aead::LessSafeKey> {
        let key = hmac::sign(&self.hash, b"seal");
        let key = aead::UnboundKey::new(&aead::CHACHA20_POLY1305, key.as_ref())
            .map_err(|_| anyhow::anyhow!("no key to seal with"))?;
        Ok(aead::LessSafeKey::new(key))
    }

    fn signing(&self) -> RwLockReadGuard<'_, Signing> {
        self.signing.read()
    }

    /// The public keys: the current one, the next one, so that agents know it in time, and for a
    /// while the previous one.
    pub fn jwks(&self) -> Jwks {
        let signing = self.signing();
        let keys = signing.keys.iter().map(|(kid, key)| Jwk {
            kid: kid.clone(),
            kty: "OKP".into(),
            crv: "Ed25519".into(),
            x: URL_SAFE_NO_PAD.encode(key.public_key()),
        });
        Jwks { keys: keys.collect() }
    }

    /// A JWT of this type over `claims`, with the current key. Whoever does not know what a tenant
    /// is, or a token for one operation, has to refuse it (`crit`, RFC 7515 §4.1.11): an agent of a
    /// version before them would read it as one of everybody, or for everything.
    pub fn sign(&self, typ: &str, claims: &Value) -> Secret {
        let signing = self.signing();
        let Some((kid, key)) = signing.keys.first() else { return Secret::default() };
        let part = |v: &Value| URL_SAFE_NO_PAD.encode(v.to_string());
        let mut head = json!({"alg": "EdDSA", "typ": typ, "kid": kid});
        let demanded: Vec<&str> =
            UNDERSTOOD.into_iter().filter(|name| claims[*name].is_string()).collect();
        if !demanded.is_empty() {
            demanded.iter().for_each(|name| head[*name] = claims[*name].clone());
            head["crit"] = json!(demanded);
        }
        let signed = format!("{}.{}", part(&head), part(claims));
        let signature = URL_SAFE_NO_PAD.encode(key.sign(signed.as_bytes()));
        Secret::new(format!("{signed}.{signature}"))
    }

    /// Makes the next key the current one after 30 days, and removes the previous one when its last
    /// token has expired.
    ///
    /// # Errors
    /// When the keys cannot be written; then everything stays as it was.
    pub fn rotate(&self, state: &StateDir, now: i64) -> anyhow::Result<()> {
        let (since, count) = {
            let signing = self.signing();
            (signing.since, signing.keys.len())
        };
        // the clock was wrong, or the keys are from before they were rotated
        let unknown = since == 0 || since > now + DAY;
        let (due, forget) =
            (!unknown && now - since >= SIGNING_PERIOD, count > 2 && now - since >= PREVIOUS_VALID);
        if !(unknown || due || forget) {
            return Ok(());
        }
        let mut stored: StoredKeys = json::read(state.read(FILE)?.unwrap_or_default())
            .map_err(|e| anyhow::anyhow!("{FILE}: {}", unquoted_json_error(&e)))?;
        stored.signing.truncate(2);
        if due {
            let former = stored.signing.remove(0);
            stored.signing.extend([signing_key()?, former]);
        }
        if unknown || due {
            stored.signing_since = now;
        }
        let rotated = Signing::of(&stored)?;
        state.write(FILE, &serde_json::to_string(&stored)?)?;
        *self.signing.write() = rotated;
        if due {
            tracing::info!("the next key signs Runners' tokens from now on");
        }
        Ok(())
    }

    /// A certificate for `names`, valid from an hour before `now`: clocks differ.
    ///
    /// # Errors
    /// When a name is not allowed in a certificate.
    pub(super) fn leaf(&self, names: &[String], now: i64) -> anyhow::Result<CertifiedKey> {
        let mut params = CertificateParams::new(Vec::new())?;
        for name in names {
            let plain = name.parse::<std::net::IpAddr>().is_ok()
                || name
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_'));
            anyhow::ensure!(plain && !name.is_empty(), "`{name}` is no name for a certificate");
            params.subject_alt_names.push(match name.parse() {
                Ok(address) => SanType::IpAddress(address),
                Err(_) => SanType::DnsName(
                    name.as_str()
                        .try_into()
                        .with_context(|| format!("`{name}` is no name for a certificate"))?,
                ),
            });
        }
        params.distinguished_name.push(DnType::CommonName, "pipeops control plane");
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        (params.not_before, params.not_after) = (date(now - 3600)?, date(now + LEAF_DAYS * DAY)?);
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.ca)?;
        let chain = vec![
            certificate.der().clone(),
            CertificateDer::from_pem_slice(self.ca_certificate.as_bytes())?,
        ];
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        Ok(CertifiedKey::new(chain, rustls::crypto::ring::sign::any_supported_type(&key)?))
    }
}

fn date(seconds: i64) -> anyhow::Result<time::OffsetDateTime> {
    time::OffsetDateTime::from_unix_timestamp(seconds).context("a date")
}

/// The CA's certificate, without its dates.
fn ca_params() -> anyhow::Result<CertificateParams> {
    let mut params = CertificateParams::new(Vec::new())?;
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.distinguished_name.push(DnType::CommonName, "pipeops control plane CA");
    Ok(params)
}

fn signing_key() -> anyhow::Result<Secret> {
    let pkcs8 = Ed25519KeyPair::generate_pkcs8(&ring::rand::SystemRandom::new())
        .map_err(|_| anyhow::anyhow!("making a key"))?;
    Ok(Secret::new(URL_SAFE_NO_PAD.encode(pkcs8)))
}

fn generate(now: i64) -> anyhow::Result<StoredKeys> {
    let mut params = ca_params()?;
    (params.not_before, params.not_after) = (date(now - DAY)?, date(now + CA_DAYS * DAY)?);
    let key = KeyPair::generate()?;
    let certificate = params.self_signed(&key)?;
    Ok(StoredKeys {
        ca_key: Secret::new(key.serialize_pem()),
        ca_certificate: certificate.pem(),
        signing: vec![signing_key()?, signing_key()?],
        signing_since: now,
        hash: Secret::new(random_token()?),
        tunnel: Secret::new(random_token()?),
    })
}

/// The pin of the first certificate in a PEM text.
pub(super) fn pin_of(pem: &str) -> Option<Pin> {
    Pin::from_certificate(&CertificateDer::from_pem_slice(pem.as_bytes()).ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::contract::token::job::{AUDIENCE, TOKEN_TYPE, verify};
    use crate::host::Host;

    #[test]
    fn the_token_of_a_job_outlives_a_change_of_keys_by_a_day() {
        let dir = tempfile::tempdir().unwrap();
        let state = Host::new(dir.path(), None).state_dir("/s").unwrap();
        let keys = Keys::load(&state, 1000).unwrap();
        let claims = json!({"iss": "cp", "aud": AUDIENCE, "exp": 1, "jti": "j-1", "maker": "r-1",
            "project": "p-1", "role": "deployer", "hash": "ab", "tenant": "acme"});
        let token = keys.sign(TOKEN_TYPE, &claims);
        let changed = 1000 + SIGNING_PERIOD;
        for (now, known) in [
            (2000, true),
            (changed, true),
            (changed + LONGEST, true),
            (changed + PREVIOUS_VALID, false),
        ] {
            keys.rotate(&state, now).unwrap();
            // as one that was started anew has them
            for keys in [&keys, &Keys::load(&state, now).unwrap()] {
                let verdict = verify(token.expose(), &keys.jwks(), "cp");
                assert_eq!(verdict.is_ok(), known, "{now}: {verdict:?}");
            }
        }
    }
}
