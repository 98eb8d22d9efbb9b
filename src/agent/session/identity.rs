//! The identity of the agent: a P-256 key, generated at the first start and bound to the machine.

use anyhow::Context as _;
use base64::Engine as _;
use rcgen::PublicKeyData as _;
use ring::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::base::encoding::hex;
use crate::base::error::{Exit, Failure};
use crate::base::json;
use crate::base::secret::Secret;
use crate::base::text::unquoted_json_error;
use crate::contract::types::{Config, agent_id_of};
use crate::host::Host;
use crate::host::state::StateDir;

const IDENTITY_FILE: &str = "identity.json";
const CREDENTIAL_FILE: &str = "credential.json";

#[derive(Serialize, Deserialize)]
struct IdentityFile {
    version: u32,
    #[serde(serialize_with = "Secret::serialize_exposed")]
    key: Secret,
    machine: String,
}

/// The agent's key and what follows from it.
pub struct Identity {
    /// `a-` and 32 hex digits of the public key's SHA-256.
    pub id: String,
    pub public_key: String,
    pub machine: String,
    key: rcgen::KeyPair,
    signer: EcdsaKeyPair,
}

/// Whether the identity on the disk belongs to this machine.
pub enum LoadedIdentity {
    Own(Box<Identity>),
    /// The disk was copied: the identity belongs to the machine that generated it.
    Cloned,
}

/// What says which machine this is.
const MACHINE_FILES: [&str; 2] = ["/etc/machine-id", "/run/pipeops/machine"];

/// A digest that differs between a machine and its copies, of what an unprivileged process may
/// read.
pub fn machine_digest(host: &Host) -> String {
    let mut digest = Sha256::new();
    // the first command of the unit writes a digest of the firmware's serial number: a copied disk
    // does not contain it
    for path in MACHINE_FILES {
        digest.update(host.read(path).ok().flatten().unwrap_or_default().trim());
        digest.update([0]);
    }
    hex(&digest.finalize())
}

/// Whether anything says which machine this is: in a pod nothing may.
pub fn is_machine_known(host: &Host) -> bool {
    let has_text =
        |path: &&str| host.read(path).ok().flatten().is_some_and(|t| !t.trim().is_empty());
    MACHINE_FILES.iter().any(has_text)
}

impl Identity {
    /// The stored identity, or a new one, which is stored before it is used.
    ///
    /// # Errors
    /// Exit 2 when the file is damaged: a person must decide, as a new identity is a new agent.
    pub fn load(state: &StateDir, machine: &str) -> anyhow::Result<LoadedIdentity> {
        let Some(text) = state.read(IDENTITY_FILE)? else {
            return Identity::generate(state, machine)
                .map(|made| LoadedIdentity::Own(Box::new(made)));
        };
        let damaged = |why: String| {
            Failure::new(Exit::Usage, "IDENTITY_DAMAGED", "the agent's identity cannot be read")
                .why(format!("{IDENTITY_FILE}: {why}"))
                .hint(
                    "restore /var/lib/pipeops-agent/identity.json, or remove it and enrol again \
                     with a fresh AGENT_TOKEN",
                )
        };
        let stored: IdentityFile =
            json::read(&text).map_err(|e| damaged(unquoted_json_error(&e)))?;
        if stored.machine != machine {
            return Ok(LoadedIdentity::Cloned);
        }
        let ours = Identity::from_pem(stored.key.expose(), stored.machine)
            .map_err(|e| damaged(format!("{e:#}")))?;
        Ok(LoadedIdentity::Own(Box::new(ours)))
    }

    /// The id of the stored identity; none is generated.
    pub fn stored_id(state: &StateDir) -> Option<String> {
        let stored: IdentityFile = json::read(&state.read(IDENTITY_FILE).ok().flatten()?).ok()?;
        Identity::from_pem(stored.key.expose(), stored.machine).ok().map(|identity| identity.id)
    }

    /// Renames the copied identity and generates another.
    ///
    /// # Errors
    /// When the state directory cannot be written.
    pub fn replace_cloned(state: &StateDir, machine: &str) -> anyhow::Result<Identity> {
        state.rename(IDENTITY_FILE, "identity.json.copied")?;
        state.remove(CREDENTIAL_FILE);
        Identity::generate(state, machine)
    }

    fn generate(state: &StateDir, machine: &str) -> anyhow::Result<Identity> {
        let key = rcgen::KeyPair::generate().context("making a key")?.serialize_pem();
        let stored =
            IdentityFile { version: 1, key: Secret::new(key.clone()), machine: machine.into() };
        state.write(IDENTITY_FILE, &serde_json::to_string(&stored)?)?;
        Identity::from_pem(&key, machine.into())
    }

    fn from_pem(pem: &str, machine: String) -> anyhow::Result<Identity> {
        let key = rcgen::KeyPair::from_pem(pem).context("the key")?;
        let der = key.serialize_der();
        let signer = EcdsaKeyPair::from_pkcs8(
            &ECDSA_P256_SHA256_ASN1_SIGNING,
            &der,
            &ring::rand::SystemRandom::new(),
        )
        .map_err(|e| anyhow::anyhow!("the key is not P-256: {e}"))?;
        Ok(Identity {
            id: agent_id_of(&key.subject_public_key_info()),
            public_key: key.public_key_pem(),
            machine,
            key,
            signer,
        })
    }

    /// Base64 of the signature over `body`.
    ///
    /// # Errors
    /// When the system gives no random numbers.
    pub fn sign(&self, body: &[u8]) -> anyhow::Result<String> {
        let signature = self
            .signer
            .sign(&ring::rand::SystemRandom::new(), body)
            .map_err(|_| anyhow::anyhow!("signing"))?;
        Ok(base64::engine::general_purpose::STANDARD.encode(signature))
    }

    /// The TLS settings of a server inside the tunnel; a Runner pins the key.
    ///
    /// # Errors
    /// When the key cannot be used.
    pub fn tls_config(&self) -> anyhow::Result<rustls::ServerConfig> {
        let mut params = rcgen::CertificateParams::new(vec![self.id.clone()])?;
        params.distinguished_name.push(rcgen::DnType::CommonName, self.id.clone());
        // only the key counts; a date of expiry would be one more thing to fail
        params.not_before = rcgen::date_time_ymd(2020, 1, 1);
        params.not_after = rcgen::date_time_ymd(2120, 1, 1);
        let certificate: CertificateDer<'static> = params.self_signed(&self.key)?.der().clone();
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(self.key.serialize_der()));
        let provider = std::sync::Arc::new(rustls::crypto::ring::default_provider());
        let mut config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(vec![certificate], key)?;
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(config)
    }
}

/// The credential from a control plane, with the URL that it is for.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct StoredCredential {
    pub url: String,
    #[serde(serialize_with = "Secret::serialize_exposed")]
    pub credential: Secret,
    pub expires_at: String,
    #[serde(default)]
    pub cluster_id: String,
    /// The last settings: with them the tunnel connects while the control plane does not answer.
    #[serde(default)]
    pub config: Option<Config>,
    /// Whether the agent said that it can make tenants when it registered last; `None` where that
    /// was a version that does not store it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tenants: Option<bool>,
    /// The labels and the place of the cluster that it registered with last.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub facts: String,
}

impl StoredCredential {
    /// The stored credential, if it is for `url`: another control plane never sees it.
    pub fn load(state: &StateDir, url: &str) -> Option<StoredCredential> {
        let kept: StoredCredential =
            json::read(&state.read(CREDENTIAL_FILE).ok().flatten()?).ok()?;
        (kept.url == url && !kept.credential.is_empty()).then_some(kept)
    }

    /// # Errors
    /// When it cannot be written; the former credential stays.
    pub fn store(&self, state: &StateDir) -> anyhow::Result<()> {
        state.write(CREDENTIAL_FILE, &serde_json::to_string(self)?)
    }

    /// Seconds that it is still valid at `now`.
    pub fn remaining_s(&self, now: jiff::Timestamp) -> u64 {
        let end: Option<jiff::Timestamp> = self.expires_at.parse().ok();
        end.map_or(0, |end| u64::try_from(end.as_second() - now.as_second()).unwrap_or(0))
    }
}
