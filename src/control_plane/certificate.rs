//! The certificates that a control plane shows: its own, renewed in time, or one from files.

use std::sync::Arc;

use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tokio::sync::watch;

use super::keys::{DAY, Keys, LEAF_DAYS};
use crate::base::error::{Exit, Failure};
use crate::host::Host;

/// The certificate in use, which can be replaced while connections are open.
#[derive(Debug)]
struct CertificateResolver(watch::Receiver<Arc<CertifiedKey>>);

impl ResolvesServerCert for CertificateResolver {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.borrow().clone())
    }
}

/// Files with a certificate of another CA, PEM.
#[derive(Clone, Debug)]
pub struct CertificateFiles {
    pub chain: String,
    pub key: String,
    /// Its CA, where clients do not trust it already.
    pub ca: Option<String>,
}

impl CertificateFiles {
    fn read(&self, host: &Host) -> anyhow::Result<[String; 3]> {
        let read = |path: &str| {
            host.read_user_file(path).map_err(|e| {
                Failure::new(
                    Exit::Preflight,
                    "CERTIFICATE_UNREADABLE",
                    format!("cannot read {path}"),
                )
                .why(format!("{:#}", e.root_cause()))
                .hint("check the path and who may read it; the unit's user is not root")
            })
        };
        Ok([
            read(&self.chain)?,
            read(&self.key)?,
            self.ca.as_deref().map(read).transpose()?.unwrap_or_default(),
        ])
    }
}

/// Checks the contents of the files: a certificate that is valid now, with its key.
fn parse(texts: &[String; 3], files: &CertificateFiles, now: i64) -> anyhow::Result<CertifiedKey> {
    let wrong = |what: String, why: String| {
        Failure::new(Exit::Preflight, "CERTIFICATE_WRONG", what)
            .why(why)
            .hint("--tls-cert takes the chain in PEM, its own certificate first; --tls-key its key")
    };
    let certificates = |text: &str, path: &str| -> anyhow::Result<Vec<CertificateDer<'static>>> {
        let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(text.as_bytes()).collect();
        Ok(all.map_err(|e| wrong(format!("{path} is no PEM file"), e.to_string()))?)
    };
    let mut chain = certificates(&texts[0], &files.chain)?;
    let Some(first) = chain.first() else {
        return Err(wrong(
            format!("{} holds no certificate", files.chain),
            "there is no BEGIN CERTIFICATE in it".into(),
        )
        .into());
    };
    let (_, leaf) = x509_parser::parse_x509_certificate(first).map_err(|e| {
        wrong(format!("{} holds no certificate that can be read", files.chain), e.to_string())
    })?;
    let valid = leaf.validity();
    if valid.not_after.timestamp() <= now || valid.not_before.timestamp() > now {
        let day = |at: i64| jiff::Timestamp::from_second(at).unwrap_or_default();
        return Err(Failure::new(
            Exit::Preflight,
            "CERTIFICATE_EXPIRED",
            format!("the certificate in {} is not valid now", files.chain),
        )
        .why(format!(
            "it is valid from {} to {}",
            day(valid.not_before.timestamp()),
            day(valid.not_after.timestamp())
        ))
        .hint("renew it; or leave --tls-cert out: the self-made one renews itself")
        .into());
    }
    for ca in certificates(&texts[2], files.ca.as_deref().unwrap_or_default())? {
        if !chain.contains(&ca) {
            chain.push(ca);
        }
    }
    let key = PrivateKeyDer::from_pem_slice(texts[1].as_bytes())
        .map_err(|e| wrong(format!("{} holds no key", files.key), e.to_string()))?;
    let signer = rustls::crypto::ring::sign::any_supported_type(&key)
        .map_err(|e| wrong(format!("the key in {} cannot be used", files.key), e.to_string()))?;
    let certified = CertifiedKey::new(chain, signer);
    certified.keys_match().map_err(|e| {
        wrong(format!("{} is not the key of {}", files.key, files.chain), e.to_string())
    })?;
    Ok(certified)
}

/// The certificates of a control plane and their renewal. The tunnel server uses one of our own CA,
/// which agents pin; the HTTPS API uses the same, or one from files.
pub struct Certificate {
    pub config: Arc<rustls::ServerConfig>,
    /// Without ALPN: FRP clients send none.
    pub tunnel: Arc<rustls::ServerConfig>,
    own: watch::Sender<Arc<CertifiedKey>>,
    names: Vec<String>,
    made: i64,
    files: Option<(CertificateFiles, [String; 3], watch::Sender<Arc<CertifiedKey>>)>,
}

fn tls_config(
    certificate: watch::Receiver<Arc<CertifiedKey>>,
) -> anyhow::Result<rustls::ServerConfig> {
    Ok(rustls::ServerConfig::builder_with_provider(Arc::new(
        rustls::crypto::ring::default_provider(),
    ))
    .with_safe_default_protocol_versions()?
    .with_no_client_auth()
    .with_cert_resolver(Arc::new(CertificateResolver(certificate))))
}

impl Certificate {
    /// A certificate of our own CA for `names`, and the one in `files`.
    ///
    /// # Errors
    /// When a name is not allowed in a certificate, or the files have no certificate that is valid
    /// now.
    pub fn new(
        keys: &Keys,
        names: Vec<String>,
        files: Option<CertificateFiles>,
        host: &Host,
        now: i64,
    ) -> anyhow::Result<Certificate> {
        let leaf = keys.leaf(&names, now).map_err(|e| {
            Failure::usage("NAME_WRONG", "a public name cannot be used")
                .why(format!("{e:#}"))
                .hint("--public-name takes DNS names and IP addresses")
        })?;
        let (own, receiver) = watch::channel(Arc::new(leaf));
        let tunnel = tls_config(receiver.clone())?;
        let (files, shown) = match files {
            None => (None, receiver),
            Some(files) => {
                let texts = files.read(host)?;
                let (sender, receiver) = watch::channel(Arc::new(parse(&texts, &files, now)?));
                (Some((files, texts, sender)), receiver)
            }
        };
        let mut config = tls_config(shown)?;
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(Certificate {
            tunnel: Arc::new(tunnel),
            config: Arc::new(config),
            own,
            names,
            made: now,
            files,
        })
    }

    /// Set where the certificate of the HTTPS API comes from files: its CA in PEM, if that was
    /// given.
    pub fn external_ca(&self) -> Option<Option<String>> {
        self.files.as_ref().map(|(_, texts, _)| Some(texts[2].clone()).filter(|ca| !ca.is_empty()))
    }

    /// Renews our own certificate after two thirds of its lifetime, and reads the files again when
    /// they have changed.
    ///
    /// # Errors
    /// When that fails; the previous one stays in use.
    pub fn renew(&mut self, keys: &Keys, host: &Host, now: i64) -> anyhow::Result<()> {
        if now - self.made >= LEAF_DAYS * DAY * 2 / 3 || now < self.made - DAY {
            self.own.send_replace(Arc::new(keys.leaf(&self.names, now)?));
            self.made = now;
        }
        if let Some((files, texts, shown)) = &mut self.files {
            let fresh = files.read(host)?;
            if fresh != *texts {
                shown.send_replace(Arc::new(parse(&fresh, files, now)?));
                *texts = fresh;
                tracing::info!(file = files.chain, "the certificate was read again");
            }
        }
        Ok(())
    }
}
