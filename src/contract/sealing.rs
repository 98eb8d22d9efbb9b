//! Values that the Runners of a project alone can read, on their way through a broker: RFC 9180
//! (HPKE) in base mode with DHKEM(X25519, HKDF-SHA256), HKDF-SHA256 and ChaCha20-Poly1305. The info
//! is [`INFO`], the associated data `PROJECT/MAKER`, so that nobody else has it opened in a job;
//! what is sealed is the base64 of the encapsulated key and the ciphertext after it.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hpke::aead::ChaCha20Poly1305;
use hpke::kdf::HkdfSha256;
use hpke::kem::X25519HkdfSha256;
use hpke::{Deserializable as _, Kem, OpModeR, OpModeS, Serializable as _};
use ring::rand::{SecureRandom as _, SystemRandom};
use zeroize::Zeroizing;

use crate::base::secret::Secret;

type PrivateKey = <X25519HkdfSha256 as Kem>::PrivateKey;
type PublicKey = <X25519HkdfSha256 as Kem>::PublicKey;
type EncappedKey = <X25519HkdfSha256 as Kem>::EncappedKey;

/// What the key is used for, and nothing else.
const INFO: &[u8] = b"pipeops job secret";
/// Bytes of each key of X25519 (RFC 9180 §7.1).
const KEY: usize = 32;

/// The key that opens what is sealed for a project.
pub struct SealingKey(PrivateKey);

impl SealingKey {
    /// Reads base64 of 32 bytes; none where it is something else.
    pub fn parse(text: &str) -> Option<SealingKey> {
        let bytes = Zeroizing::new(STANDARD.decode(text.trim()).ok()?);
        PrivateKey::from_bytes(&bytes).ok().map(SealingKey)
    }

    /// A new one, as [`SealingKey::parse`] reads it; none where the system gives no random numbers.
    pub fn fresh() -> Option<Secret> {
        let mut bytes = Zeroizing::new([0; KEY]);
        SystemRandom::new().fill(bytes.as_mut()).ok()?;
        Some(Secret::new(STANDARD.encode(bytes.as_ref())))
    }

    /// Base64 of the public key, which seals.
    pub fn public(&self) -> String {
        STANDARD.encode(X25519HkdfSha256::sk_to_pk(&self.0).to_bytes())
    }

    /// What was sealed for the jobs of a maker (id of its access); none for what was sealed with
    /// another key, for another project or maker, and for what is no text.
    pub fn open(&self, project: &str, maker: &str, sealed: &str) -> Option<Secret> {
        let sealed = STANDARD.decode(sealed).ok()?;
        let (encapped, ciphertext) = sealed.split_at_checked(KEY)?;
        let encapped = EncappedKey::from_bytes(encapped).ok()?;
        let opened = hpke::single_shot_open::<ChaCha20Poly1305, HkdfSha256, X25519HkdfSha256>(
            &OpModeR::Base,
            &self.0,
            &encapped,
            INFO,
            ciphertext,
            &associated(project, maker),
        );
        String::from_utf8(opened.ok()?).ok().map(Secret::new)
    }
}

/// Neither id has a `/` in it.
fn associated(project: &str, maker: &str) -> Vec<u8> {
    format!("{project}/{maker}").into_bytes()
}

/// Seals a value for the Runners of a project, whose public key is base64 of 32 bytes, and for jobs
/// of this maker; none where it is no such key.
pub fn seal(public: &str, project: &str, maker: &str, value: &str) -> Option<String> {
    let key = PublicKey::from_bytes(&STANDARD.decode(public.trim()).ok()?).ok()?;
    let (encapped, ciphertext) =
        hpke::single_shot_seal::<ChaCha20Poly1305, HkdfSha256, X25519HkdfSha256>(
            &OpModeS::Base,
            &key,
            INFO,
            value.as_bytes(),
            &associated(project, maker),
        )
        .ok()?;
    let mut sealed = encapped.to_bytes().to_vec();
    sealed.extend(ciphertext);
    Some(STANDARD.encode(sealed))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sealed_is_read_with_the_key_of_its_project_and_for_its_maker_alone() {
        let key = || SealingKey::parse(SealingKey::fresh().unwrap().expose()).unwrap();
        let (ours, other) = (key(), key());
        let sealed = seal(&ours.public(), "p-1", "m", "väl\nue").unwrap();
        assert_eq!(ours.open("p-1", "m", &sealed).unwrap().expose(), "väl\nue");
        assert_ne!(seal(&ours.public(), "p-1", "m", "väl\nue").unwrap(), sealed);
        assert_eq!(
            seal(&ours.public(), "p-1", "m", "").map(|s| ours.open("p-1", "m", &s)),
            Some(Some(Secret::new("")))
        );
        assert!(other.open("p-1", "m", &sealed).is_none());
        for (project, maker) in [("p-2", "m"), ("p-1", "n"), ("p-1", ""), ("p-1/m", ""), ("", "m")]
        {
            assert!(ours.open(project, maker, &sealed).is_none(), "{project} {maker}");
        }
        let mut bytes = STANDARD.decode(&sealed).unwrap();
        for at in [0, KEY, bytes.len() - 1] {
            bytes[at] ^= 1;
            assert!(ours.open("p-1", "m", &STANDARD.encode(&bytes)).is_none(), "{at}");
            bytes[at] ^= 1;
        }
        for short in ["", "AAAA", "no base64", &sealed[..44]] {
            assert!(ours.open("p-1", "m", short).is_none(), "{short}");
        }
    }

    #[test]
    fn a_key_is_32_bytes_and_one_of_small_order_seals_nothing() {
        for wrong in ["", "AAAA", "no base64!", &STANDARD.encode([1; 33])] {
            assert!(SealingKey::parse(wrong).is_none() && seal(wrong, "p", "m", "v").is_none());
        }
        // RFC 9180 §7.1.4: all zeros come of it, whatever the private key
        assert_eq!(seal(&STANDARD.encode([0; KEY]), "p", "m", "v"), None);
        let text = STANDARD.encode([7; KEY]);
        assert!(SealingKey::parse(&format!("{text}\n")).is_some());
    }
}
