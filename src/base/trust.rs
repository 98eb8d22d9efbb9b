//! What a TLS connection trusts: system roots, a CA, a pinned key, or, only when asked for,
//! anything.

use std::sync::Arc;

use base64::Engine as _;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme,
};
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use sha2::{Digest as _, Sha256};

use crate::base::text::printable;

/// SHA-256 of a certificate's SubjectPublicKeyInfo, written `sha256:` and base64.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pin([u8; 32]);

impl Pin {
    /// # Errors
    /// A text that is no pin, with what a pin looks like.
    pub fn parse(text: &str) -> Result<Pin, String> {
        let wrong = || format!("`{text}` is no pin: `sha256:` and the base64 of 32 bytes is");
        let digest = text.trim().strip_prefix("sha256:").ok_or_else(wrong)?;
        let bytes =
            base64::engine::general_purpose::STANDARD.decode(digest).map_err(|_| wrong())?;
        bytes.try_into().map(Pin).map_err(|_| wrong())
    }

    /// The pin of a certificate.
    pub fn from_certificate(certificate: &[u8]) -> Option<Pin> {
        let (_, parsed) = x509_parser::parse_x509_certificate(certificate).ok()?;
        Some(Pin::from_spki(parsed.tbs_certificate.subject_pki.raw))
    }

    /// The pin of a SubjectPublicKeyInfo, DER.
    pub fn from_spki(spki: &[u8]) -> Pin {
        Pin(Sha256::digest(spki).into())
    }
}

impl std::fmt::Display for Pin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "sha256:{}", base64::engine::general_purpose::STANDARD.encode(self.0))
    }
}

/// A client's certificate, those that signed it, and its key.
pub type ClientIdentity = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

/// What makes a server's certificate acceptable.
#[derive(Clone, Debug, Default)]
pub struct Trust {
    /// Certificates in PEM that may sign the server's. Without them, and without a pin, the
    /// system's roots.
    pub ca_pem: Option<String>,
    /// One of these keys must be in the chain: the server's own, or one that signed it.
    pub pins: Vec<Pin>,
    /// Accept anything.
    pub accept_any: bool,
}

impl Trust {
    /// # Errors
    /// What is wrong with the CA text or the system's roots.
    pub fn client_config(&self) -> Result<ClientConfig, String> {
        self.client_config_with(None)
    }

    /// The same, with a client certificate.
    ///
    /// # Errors
    /// What is wrong with the CA text, the system's roots or the identity.
    pub fn client_config_with(
        &self,
        identity: Option<ClientIdentity>,
    ) -> Result<ClientConfig, String> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let text = |e: Error| e.to_string();
        let builder = ClientConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .map_err(text)?;
        let base: Option<Arc<dyn ServerCertVerifier>> = match &self.ca_pem {
            Some(pem) => Some(anchored(&certificates(pem)?, &provider)?),
            None if self.accept_any || !self.pins.is_empty() => None,
            None => {
                let verifier =
                    rustls_platform_verifier::Verifier::new(provider.clone()).map_err(|e| {
                        format!(
                            "no system certificates: {e}; install ca-certificates, or give a CA or \
                             a pin"
                        )
                    })?;
                Some(Arc::new(verifier))
            }
        };
        let proves_nothing = base.is_none() && self.pins.is_empty();
        let verifier = Verifier { base, pins: self.pins.clone(), proves_nothing, provider };
        let builder = builder.dangerous().with_custom_certificate_verifier(Arc::new(verifier));
        match identity {
            Some((chain, key)) => builder
                .with_client_auth_cert(chain, key)
                .map_err(|e| format!("the client certificate and its key: {e}")),
            None => Ok(builder.with_no_client_auth()),
        }
    }
}

fn certificates(pem: &str) -> Result<Vec<CertificateDer<'static>>, String> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem.as_bytes()).collect();
    match found {
        Ok(list) if !list.is_empty() => Ok(list),
        Ok(_) => Err("the CA text holds no certificate in PEM".into()),
        Err(e) => Err(format!("the CA text is wrong: {e}")),
    }
}

fn anchored(
    anchors: &[CertificateDer<'static>],
    provider: &Arc<CryptoProvider>,
) -> Result<Arc<WebPkiServerVerifier>, String> {
    let mut roots = RootCertStore::empty();
    for anchor in anchors {
        roots.add(anchor.clone()).map_err(|e| format!("a CA certificate cannot be used: {e}"))?;
    }
    WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider.clone())
        .build()
        .map_err(|e| e.to_string())
}

/// Most certificates of a presented chain that are named, and longest subject, characters.
const SHOWN_KEYS: usize = 6;
const SHOWN_SUBJECT: usize = 80;

/// Every key of a presented chain as a pin, with the subject of its certificate: which of them a
/// pin was meant for, only a person can know.
fn shown_keys(leaf: &CertificateDer<'_>, others: &[CertificateDer<'_>]) -> String {
    let shown = |(certificate, leaf): (&CertificateDer<'_>, bool)| {
        let Ok((_, parsed)) = x509_parser::parse_x509_certificate(certificate) else {
            return "a certificate that cannot be read".to_owned();
        };
        let pin = Pin::from_spki(parsed.tbs_certificate.subject_pki.raw);
        let subject = parsed.subject().to_string();
        let subject: String = printable(&subject).chars().take(SHOWN_SUBJECT).collect();
        format!("{pin} ({}{subject})", if leaf { "its own: " } else { "" })
    };
    let chain = std::iter::once((leaf, true)).chain(others.iter().map(|other| (other, false)));
    let mut keys: Vec<String> = chain.take(SHOWN_KEYS).map(shown).collect();
    let more = (others.len() + 1).saturating_sub(SHOWN_KEYS);
    if more > 0 {
        keys.push(format!("{more} more"));
    }
    keys.join(", ")
}

#[derive(Debug)]
struct Verifier {
    base: Option<Arc<dyn ServerCertVerifier>>,
    pins: Vec<Pin>,
    /// Any server is accepted: its signature would prove nothing, and those of the 1024-bit keys
    /// that frps made for itself for many years could not be checked here.
    proves_nothing: bool,
    provider: Arc<CryptoProvider>,
}

impl Verifier {
    /// A pinned key counts only when it is proven: the server's own by the handshake, another by
    /// having signed the server's.
    fn pinned(
        &self,
        end: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        now: UnixTime,
    ) -> Result<(), Error> {
        let ours = |certificate: &CertificateDer<'_>| {
            Pin::from_certificate(certificate).is_some_and(|pin| self.pins.contains(&pin))
        };
        if ours(end) {
            return Ok(());
        }
        let anchors: Vec<CertificateDer<'static>> =
            others.iter().filter(|c| ours(c)).map(|c| c.clone().into_owned()).collect();
        if anchors.is_empty() {
            return Err(Error::General(format!(
                "the server's keys are not pinned: {}",
                shown_keys(end, others)
            )));
        }
        let verifier = anchored(&anchors, &self.provider).map_err(Error::General)?;
        verifier.verify_server_cert(end, others, name, &[], now).map(|_| ())
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        if let Some(base) = &self.base {
            base.verify_server_cert(end, others, name, ocsp, now)?;
        }
        if !self.pins.is_empty() {
            self.pinned(end, others, name, now)?;
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        if self.proves_nothing {
            return Ok(HandshakeSignatureValid::assertion());
        }
        verify_tls12_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        if self.proves_nothing {
            return Ok(HandshakeSignatureValid::assertion());
        }
        verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// A TLS failure in an operator's words; `None` when it is none of these.
pub fn explain(text: &str) -> Option<(&'static str, &'static str)> {
    let expired = format!("{:?}", CertificateError::Expired);
    let has = |needles: &[&str]| needles.iter().any(|n| text.contains(n));
    if has(&["not pinned"]) {
        Some((
            "tls_pin",
            "compare the pin with the keys that the server has: it has new ones, or another \
             machine answers in its place",
        ))
    } else if has(&["expired", expired.as_str()]) {
        Some((
            "tls_expired",
            "renew the server's certificate; if it is new, check this machine's clock",
        ))
    } else if has(&["not valid yet", "NotValidYet"]) {
        Some(("tls_clock", "set this machine's clock"))
    } else if has(&["not valid for name", "NotValidForName"]) {
        Some(("tls_name", "use a name that is in the server's certificate"))
    } else if has(&["BadSignature"]) {
        Some((
            "tls_key",
            "give the server a stronger key: RSA below 2048 bits, as older frps makes for itself, \
             is not accepted",
        ))
    } else if has(&["BadEncoding"]) {
        // a name is missing and its days begin in the year 1: so do those that frps before 0.65
        // makes
        let hint = "its certificate breaks the standard, as one does that an old frps makes for \
                    itself at every start: give the server a certificate, and its CA or pin here";
        Some(("tls_untrusted", hint))
    } else if has(&["UnknownIssuer", "CaUsedAsEndEntity", "invalid peer certificate"]) {
        Some(("tls_untrusted", "give the CA that signed the server's certificate, or its pin"))
    } else if has(&["corrupt message", "InvalidContentType", "not TLS"]) {
        Some(("tls_none", "the port does not speak TLS; check address and port"))
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};

    use super::*;

    struct Chain {
        ca: CertificateDer<'static>,
        leaf: CertificateDer<'static>,
        stranger: CertificateDer<'static>,
    }

    fn chain() -> Chain {
        let mut params = CertificateParams::new(vec![]).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let ca = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let key = KeyPair::generate().unwrap();
        let leaf =
            CertificateParams::new(vec!["cp.test".into()]).unwrap().signed_by(&key, &ca).unwrap();
        let stranger = CertificateParams::new(vec!["cp.test".into()])
            .unwrap()
            .self_signed(&KeyPair::generate().unwrap())
            .unwrap();
        Chain { ca: ca.der().clone(), leaf: leaf.der().clone(), stranger: stranger.der().clone() }
    }

    fn verdict(
        trust: &Trust,
        end: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        name: &str,
    ) -> Result<(), Error> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let base = trust.ca_pem.as_ref().map(|pem| {
            anchored(&certificates(pem).unwrap(), &provider).unwrap() as Arc<dyn ServerCertVerifier>
        });
        let verifier = Verifier { base, pins: trust.pins.clone(), proves_nothing: false, provider };
        let name = ServerName::try_from(name.to_owned()).unwrap();
        verifier.verify_server_cert(end, others, &name, &[], UnixTime::now()).map(|_| ())
    }

    #[test]
    fn a_pin_is_no_good_when_it_is_only_shown() {
        let c = chain();
        let pin = |der: &CertificateDer<'_>| Trust {
            pins: vec![Pin::from_certificate(der).unwrap()],
            ..Trust::default()
        };
        assert!(verdict(&pin(&c.leaf), &c.leaf, &[], "cp.test").is_ok());
        assert!(verdict(&pin(&c.ca), &c.leaf, std::slice::from_ref(&c.ca), "cp.test").is_ok());
        // the pinned CA is in the chain but has signed nothing of it
        assert!(verdict(&pin(&c.ca), &c.stranger, std::slice::from_ref(&c.ca), "cp.test").is_err());
        assert!(verdict(&pin(&c.ca), &c.leaf, std::slice::from_ref(&c.ca), "other.test").is_err());
        assert!(verdict(&pin(&c.leaf), &c.stranger, &[], "cp.test").is_err());
        // a CA and a pin must both hold
        let pem = format!(
            "-----BEGIN CERTIFICATE-----\n{}\n-----END CERTIFICATE-----\n",
            base64::engine::general_purpose::STANDARD.encode(&c.ca)
        );
        let both = |pin: &CertificateDer<'_>| Trust {
            ca_pem: Some(pem.clone()),
            pins: vec![Pin::from_certificate(pin).unwrap()],
            accept_any: false,
        };
        assert!(verdict(&both(&c.leaf), &c.leaf, &[], "cp.test").is_ok());
        assert!(verdict(&both(&c.stranger), &c.leaf, &[], "cp.test").is_err());
        assert!(verdict(&both(&c.stranger), &c.stranger, &[], "cp.test").is_err());
    }

    #[test]
    fn a_key_that_is_not_pinned_is_named_with_all_others_of_the_chain() {
        let c = chain();
        let trust = Trust { pins: vec![Pin([7; 32])], ..Trust::default() };
        let others = [c.ca.clone(), c.stranger.clone()];
        let said = verdict(&trust, &c.leaf, &others, "cp.test").unwrap_err().to_string();
        let pin = |der: &CertificateDer<'_>| Pin::from_certificate(der).unwrap();
        assert!(said.contains(&format!("not pinned: {} (its own: CN=", pin(&c.leaf))), "{said}");
        for other in &others {
            assert!(said.contains(&format!("{} (CN=", pin(other))), "{said}");
        }
        assert_eq!(explain(&said).unwrap().0, "tls_pin");
        // a chain is not read to its end, and what it cannot be read from is said
        let many = vec![CertificateDer::from(vec![0u8]); 40];
        let said = verdict(&trust, &c.leaf, &many, "cp.test").unwrap_err().to_string();
        assert!(said.ends_with("that cannot be read, 35 more"), "{said}");
        assert_eq!(said.matches("cannot be read").count(), 5, "{said}");
    }

    #[test]
    fn a_pin_is_read_as_it_is_written() {
        let pin = Pin([7; 32]);
        assert_eq!(Pin::parse(&pin.to_string()), Ok(pin));
        for wrong in ["", "sha256:", "sha256:AAAA", "sha1:AAAA", "sha256:***"] {
            assert!(Pin::parse(wrong).is_err(), "{wrong}");
        }
        assert!(
            Trust { ca_pem: Some("no pem".into()), ..Trust::default() }.client_config().is_err()
        );
    }
}
