//! The keys of a control plane: its CA and certificate, the keys that sign Runners' tokens, the key under which tokens are hashed.

use std::sync::Arc;

use anyhow::Context as _;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use rcgen::{BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType};
use ring::hmac;
use ring::rand::SecureRandom as _;
use ring::signature::{Ed25519KeyPair, KeyPair as _};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::sync::watch;

use crate::control::types::{Jwk, Jwks};
use crate::error::Failure;
use crate::host::state::StateDir;
use crate::secret::Secret;
use crate::trust::Pin;

/// Life of the CA and of the certificate that it signs, days. The certificate is made anew at two thirds of its life.
const CA_DAYS: i64 = 3650;
const LEAF_DAYS: i64 = 90;
const DAY: i64 = 86_400;

/// `keys.json` in the data directory, 0600.
#[derive(Serialize, Deserialize)]
struct Stored {
    #[serde(serialize_with = "Secret::reveal")]
    ca_key: Secret,
    ca_certificate: String,
    /// PKCS #8 of the Ed25519 keys, base64: the one that signs and the one that comes next.
    #[serde(serialize_with = "reveal_all")]
    signing: Vec<Secret>,
    #[serde(serialize_with = "Secret::reveal")]
    hash: Secret,
    /// What FRP clients show before anything else; each agent shows a proof of its own as well.
    #[serde(serialize_with = "Secret::reveal")]
    tunnel: Secret,
}

fn reveal_all<S: serde::Serializer>(secrets: &[Secret], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(secrets.iter().map(Secret::expose))
}

const FILE: &str = "keys.json";

/// 32 random bytes, in letters that need no quoting anywhere.
///
/// # Errors
/// When the system gives no random numbers.
pub fn fresh() -> anyhow::Result<String> {
    let mut bytes = [0; 32];
    ring::rand::SystemRandom::new().fill(&mut bytes).map_err(|_| anyhow::anyhow!("the system gives no random numbers"))?;
    Ok(URL_SAFE_NO_PAD.encode(bytes))
}

/// All of them, loaded.
pub struct Keys {
    pub ca_certificate: String,
    pub ca_pin: String,
    pub tunnel_token: Secret,
    ca: Issuer<'static, KeyPair>,
    signing: Vec<(String, Ed25519KeyPair)>,
    hash: hmac::Key,
}

impl Keys {
    /// Those of the data directory, or new ones, durable before anybody hears of them.
    ///
    /// # Errors
    /// When the file is damaged or cannot be written.
    pub fn load(state: &StateDir, now: i64) -> anyhow::Result<Keys> {
        let stored: Stored = match state.read(FILE)? {
            Some(text) => serde_json::from_str(&text).map_err(|e| {
                Failure::usage("KEYS_DAMAGED", "the control plane's keys cannot be read")
                    .why(format!("{FILE}: {e}"))
                    .hint("restore a backup: with other keys no agent would believe this control plane")
            })?,
            None => {
                let made = make(now)?;
                state.write(FILE, &serde_json::to_string(&made)?)?;
                made
            }
        };
        let der = CertificateDer::from_pem_slice(stored.ca_certificate.as_bytes()).context("the CA's certificate")?;
        let pin = Pin::of(&der).context("the CA's certificate")?.to_string();
        let key = KeyPair::from_pem(stored.ca_key.expose()).context("the CA's key")?;
        let signing = stored.signing.iter().map(|secret| {
            let pkcs8 = URL_SAFE_NO_PAD.decode(secret.expose()).context("a signing key")?;
            let key = Ed25519KeyPair::from_pkcs8(&pkcs8).map_err(|e| anyhow::anyhow!("a signing key: {e}"))?;
            let digest = ring::digest::digest(&ring::digest::SHA256, key.public_key().as_ref());
            Ok((URL_SAFE_NO_PAD.encode(&digest.as_ref()[..9]), key))
        });
        Ok(Keys {
            ca: Issuer::new(ca_params()?, key),
            ca_certificate: stored.ca_certificate,
            ca_pin: pin,
            tunnel_token: stored.tunnel,
            signing: signing.collect::<anyhow::Result<_>>()?,
            hash: hmac::Key::new(hmac::HMAC_SHA256, stored.hash.expose().as_bytes()),
        })
    }

    /// What stands in the database for a token: useless without the key, which does not stand there.
    pub fn hashed(&self, token: &str) -> String {
        URL_SAFE_NO_PAD.encode(hmac::sign(&self.hash, token.as_bytes()))
    }

    /// A secret that is `name`'s alone and need not be stored.
    pub fn derived(&self, purpose: &str, name: &str) -> Secret {
        Secret::new(self.hashed(&format!("{purpose}\0{name}")))
    }

    /// Public halves: the current and the next.
    pub fn jwks(&self) -> Jwks {
        let keys = self.signing.iter().map(|(kid, key)| Jwk {
            kid: kid.clone(),
            kty: "OKP".into(),
            crv: "Ed25519".into(),
            x: URL_SAFE_NO_PAD.encode(key.public_key()),
        });
        Jwks { keys: keys.collect() }
    }

    /// A JWT over `claims`, with the current key.
    pub fn sign(&self, claims: &Value) -> Secret {
        let Some((kid, key)) = self.signing.first() else { return Secret::default() };
        let part = |v: &Value| URL_SAFE_NO_PAD.encode(v.to_string());
        let signed = format!("{}.{}", part(&json!({"alg": "EdDSA", "typ": "JWT", "kid": kid})), part(claims));
        let signature = URL_SAFE_NO_PAD.encode(key.sign(signed.as_bytes()));
        Secret::new(format!("{signed}.{signature}"))
    }

    /// A certificate for `names`, valid from an hour before `now`: clocks differ.
    ///
    /// # Errors
    /// When a name cannot stand in a certificate.
    fn leaf(&self, names: &[String], now: i64) -> anyhow::Result<CertifiedKey> {
        let mut params = CertificateParams::new(Vec::new())?;
        for name in names {
            let plain =
                name.parse::<std::net::IpAddr>().is_ok() || name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_'));
            anyhow::ensure!(plain && !name.is_empty(), "`{name}` is no name for a certificate");
            params.subject_alt_names.push(match name.parse() {
                Ok(address) => SanType::IpAddress(address),
                Err(_) => SanType::DnsName(name.as_str().try_into().with_context(|| format!("`{name}` is no name for a certificate"))?),
            });
        }
        params.distinguished_name.push(DnType::CommonName, "pipeops control plane");
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        (params.not_before, params.not_after) = (date(now - 3600)?, date(now + LEAF_DAYS * DAY)?);
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.ca)?;
        let chain = vec![certificate.der().clone(), CertificateDer::from_pem_slice(self.ca_certificate.as_bytes())?];
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        Ok(CertifiedKey::new(chain, rustls::crypto::ring::sign::any_supported_type(&key)?))
    }
}

fn date(seconds: i64) -> anyhow::Result<time::OffsetDateTime> {
    time::OffsetDateTime::from_unix_timestamp(seconds).context("a date")
}

/// What the CA's certificate says, but for its dates.
fn ca_params() -> anyhow::Result<CertificateParams> {
    let mut params = CertificateParams::new(Vec::new())?;
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.distinguished_name.push(DnType::CommonName, "pipeops control plane CA");
    Ok(params)
}

fn make(now: i64) -> anyhow::Result<Stored> {
    let mut params = ca_params()?;
    (params.not_before, params.not_after) = (date(now - DAY)?, date(now + CA_DAYS * DAY)?);
    let key = KeyPair::generate()?;
    let certificate = params.self_signed(&key)?;
    let signing = || -> anyhow::Result<Secret> {
        let pkcs8 = Ed25519KeyPair::generate_pkcs8(&ring::rand::SystemRandom::new()).map_err(|_| anyhow::anyhow!("making a key"))?;
        Ok(Secret::new(URL_SAFE_NO_PAD.encode(pkcs8)))
    };
    Ok(Stored {
        ca_key: Secret::new(key.serialize_pem()),
        ca_certificate: certificate.pem(),
        signing: vec![signing()?, signing()?],
        hash: Secret::new(fresh()?),
        tunnel: Secret::new(fresh()?),
    })
}

/// The certificate that is shown, replaced while connections go on.
#[derive(Debug)]
struct Shown(watch::Receiver<Arc<CertifiedKey>>);

impl ResolvesServerCert for Shown {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.borrow().clone())
    }
}

/// The certificate that a control plane shows, and what keeps it fresh.
pub struct Certificate {
    pub config: Arc<rustls::ServerConfig>,
    /// The same without ALPN: FRP clients name none.
    pub tunnel: Arc<rustls::ServerConfig>,
    shown: watch::Sender<Arc<CertifiedKey>>,
    names: Vec<String>,
    made: i64,
}

impl Certificate {
    /// One of our own CA for `names`.
    ///
    /// # Errors
    /// When a name cannot stand in a certificate.
    pub fn new(keys: &Keys, names: Vec<String>, now: i64) -> anyhow::Result<Certificate> {
        let (shown, receiver) = watch::channel(Arc::new(keys.leaf(&names, now)?));
        let mut config = rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_cert_resolver(Arc::new(Shown(receiver)));
        let tunnel = Arc::new(config.clone());
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(Certificate { tunnel, config: Arc::new(config), shown, names, made: now })
    }

    /// Makes another one when two thirds of its life are over.
    ///
    /// # Errors
    /// When none can be made; the former one stays.
    pub fn renew(&mut self, keys: &Keys, now: i64) -> anyhow::Result<()> {
        if now - self.made >= LEAF_DAYS * DAY * 2 / 3 || now < self.made - DAY {
            self.shown.send_replace(Arc::new(keys.leaf(&self.names, now)?));
            self.made = now;
        }
        Ok(())
    }
}
