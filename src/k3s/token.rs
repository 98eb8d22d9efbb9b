//! k3s join tokens: reading them, and comparing their hash with what a server shows.
//!
//! Rules as in k3s-io/k3s, `pkg/clientaccess/token.go` (v1.36).

use base64::Engine as _;
use sha2::{Digest, Sha256};

use crate::secret::Secret;

/// What a token says about who its holder is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Credential {
    /// HTTP basic authentication.
    Basic { user: String, password: Secret },
    /// HTTP bearer authentication, `id.secret`; agents only, may expire.
    Bootstrap { id: String, token: Secret },
}

/// A parsed token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Token {
    /// sha256 of the cluster's CA, hexadecimal, lower case; `None` for short tokens, which trust whoever answers.
    pub ca_hash: Option<String>,
    pub credential: Credential,
}

impl Token {
    /// # Errors
    /// What is wrong with the shape; never quotes the token.
    pub fn parse(text: &str) -> Result<Token, String> {
        let text = text.trim();
        if text.is_empty() {
            return Err("the token is empty".into());
        }
        if text.contains(char::is_whitespace) {
            return Err("the token contains white space: was it broken over two lines?".into());
        }
        let Some((head, rest)) = text.split_once("::") else {
            if text.starts_with("K10") && text.len() > 40 {
                return Err("the token starts with K10 but has no `::`; it was cut off".into());
            }
            let credential = bootstrap(text).unwrap_or_else(|| Credential::Basic { user: "node".into(), password: Secret::new(text) });
            return Ok(Token { ca_hash: None, credential });
        };
        let hash = head.strip_prefix("K10").unwrap_or(head);
        if !hash.is_empty() && (hash.len() != 64 || !hash.bytes().all(|b| b.is_ascii_hexdigit())) {
            return Err(format!("the part before `::` must be K10 and 64 hexadecimal digits; it has {} characters after K10", hash.chars().count()));
        }
        let credential = match bootstrap(rest) {
            Some(found) => found,
            None => {
                let (user, password) = rest.split_once(':').ok_or("after `::` a token has user:password or id.secret")?;
                if password.is_empty() {
                    return Err("the token's password is empty; it was cut off".into());
                }
                // agents always come as `node`; a server's token lets them (pkg/agent/config)
                let user = if user.is_empty() { "node" } else { user };
                Credential::Basic { user: user.into(), password: Secret::new(password) }
            }
        };
        Ok(Token { ca_hash: (!hash.is_empty()).then(|| hash.to_ascii_lowercase()), credential })
    }

    /// The value of the `Authorization` header that a worker sends.
    pub fn authorization(&self) -> Secret {
        Secret::new(match &self.credential {
            Credential::Basic { password, .. } => {
                let pair = format!("node:{}", password.expose());
                format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(pair))
            }
            Credential::Bootstrap { token, .. } => format!("Bearer {}", token.expose()),
        })
    }
}

fn bootstrap(text: &str) -> Option<Credential> {
    let (id, secret) = text.split_once('.')?;
    let plain = |part: &str, length: usize| part.len() == length && part.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
    (plain(id, 6) && plain(secret, 16)).then(|| Credential::Bootstrap { id: id.into(), token: Secret::new(text) })
}

/// The hash that a token for this server carries, from the body of its `/cacerts`.
///
/// One certificate: sha256 of the literal answer. Several: sha256 of the DER of the root that the first chains to, so that
/// tokens survive a rotated intermediate.
///
/// # Errors
/// When the body holds no certificate.
pub fn ca_hash(pem: &[u8]) -> Result<String, String> {
    let mut certificates = Vec::new();
    for block in x509_parser::pem::Pem::iter_from_buffer(pem) {
        match block {
            Ok(block) if block.label == "CERTIFICATE" => certificates.push(block.contents),
            Ok(_) => {}
            Err(_) => break,
        }
    }
    match certificates.len() {
        0 => Err("the answer of /cacerts holds no certificate".into()),
        1 => Ok(hex(&Sha256::digest(pem))),
        _ => Ok(hex(&Sha256::digest(root_of(&certificates)?))),
    }
}

/// Follows issuers from the first certificate to the self-signed one.
fn root_of(chain: &[Vec<u8>]) -> Result<&[u8], String> {
    let parsed: Vec<_> = chain
        .iter()
        .map(|der| x509_parser::parse_x509_certificate(der).map(|(_, c)| c).map_err(|e| format!("a certificate in /cacerts is broken: {e}")))
        .collect::<Result<_, _>>()?;
    let mut at = 0;
    for _ in 0..parsed.len() {
        if parsed[at].issuer() == parsed[at].subject() {
            return Ok(&chain[at]);
        }
        let issuer = parsed[at].issuer();
        match parsed.iter().position(|c| c.subject() == issuer) {
            Some(next) => at = next,
            None => break,
        }
    }
    Err("the certificates in /cacerts lead to no root".into())
}

pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn every_kind_is_read() {
        let hash = "ab".repeat(32);
        let full = Token::parse(&format!("K10{hash}::server:s3cret\n")).unwrap();
        assert_eq!(full.ca_hash.as_deref(), Some(hash.as_str()));
        assert_eq!(full.authorization().expose(), "Basic bm9kZTpzM2NyZXQ=");
        let short_lived = Token::parse(&format!("K10{hash}::abcdef.0123456789abcdef")).unwrap();
        assert_eq!(short_lived.authorization().expose(), "Bearer abcdef.0123456789abcdef");
        assert_eq!(Token::parse("just-a-password").unwrap().ca_hash, None);
        assert_eq!(Token::parse("K10::node:x").unwrap().ca_hash, None);
    }

    #[test]
    fn mangled_tokens_are_explained_without_being_shown() {
        let hash = "ab".repeat(32);
        for bad in
            ["", "a b", &format!("K10{hash}"), &format!("K10{}::node:x", &hash[1..]), &format!("K10{hash}::node:"), &format!("K10{hash}::nodex")]
        {
            let why = Token::parse(bad).unwrap_err();
            assert!(!why.contains(&hash[..10]), "{why}");
        }
    }

    proptest! {
        #[test]
        fn no_text_panics(text in "(K10)?\\PC{0,90}(::)?\\PC{0,30}") {
            let _ = Token::parse(&text);
            let _ = ca_hash(text.as_bytes());
        }
    }
}
