//! k3s join tokens: reading them, and comparing their hash with what a server shows.
//!
//! Rules as in k3s-io/k3s, `pkg/clientaccess/token.go` (v1.36).

use base64::Engine as _;
use sha2::{Digest, Sha256};

use super::user_input::{is_invisible, is_quote};
use crate::base::encoding::hex;
use crate::base::secret::Secret;

/// What a token says about who its holder is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TokenCredential {
    /// HTTP basic authentication.
    Basic { user: String, password: Secret },
    /// HTTP bearer authentication, `id.secret`; agents only, may expire.
    Bootstrap { id: String, token: Secret },
}

/// A parsed token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Token {
    /// sha256 of the cluster's CA, hexadecimal, lower case; `None` for short tokens, which trust
    /// whoever answers.
    pub ca_hash: Option<String>,
    pub credential: TokenCredential,
}

impl Token {
    /// # Errors
    /// What is wrong with the shape; never quotes the token.
    pub fn parse(text: &str) -> Result<Token, String> {
        let text = trimmed(text);
        let text = text.as_str();
        misread(text)?;
        let Some((head, rest)) = text.split_once("::") else {
            if text.starts_with("K10") && text.len() > 40 {
                return Err("the token starts with K10 but has no `::`; it was cut off".into());
            }
            let credential = bootstrap(text).unwrap_or_else(|| TokenCredential::Basic {
                user: "node".into(),
                password: Secret::new(text),
            });
            return Ok(Token { ca_hash: None, credential });
        };
        let hash = head.strip_prefix("K10").unwrap_or(head);
        if !hash.is_empty() && (hash.len() != 64 || !hash.bytes().all(|b| b.is_ascii_hexdigit())) {
            let must = "the part before `::` must be K10 and 64 hexadecimal digits";
            let wrong = hash.chars().find(|c| !c.is_ascii_hexdigit());
            return Err(match wrong {
                _ if !head.starts_with("K10") => format!("{must}; it does not begin with K10"),
                Some(_) if hash.len() == 64 => {
                    format!("{must}; there is another character among them")
                }
                _ => format!("{must}; it has {} characters after K10", hash.chars().count()),
            });
        }
        if rest.starts_with(':') {
            return Err("there are three colons where `::` belongs".into());
        }
        let credential = match bootstrap(rest) {
            Some(found) => found,
            None => {
                let (user, password) = rest
                    .split_once(':')
                    .ok_or("after `::` a token has user:password or id.secret")?;
                if password.is_empty() {
                    return Err("the token's password is empty; it was cut off".into());
                }
                // agents always come as `node`; a server's token lets them (pkg/agent/config)
                let user = if user.is_empty() { "node" } else { user };
                TokenCredential::Basic { user: user.into(), password: Secret::new(password) }
            }
        };
        Ok(Token { ca_hash: (!hash.is_empty()).then(|| hash.to_ascii_lowercase()), credential })
    }

    /// The value of the `Authorization` header that a worker sends.
    pub fn authorization(&self) -> Secret {
        Secret::new(match &self.credential {
            TokenCredential::Basic { password, .. } => {
                let pair = format!("node:{}", password.expose());
                format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(pair))
            }
            TokenCredential::Bootstrap { token, .. } => format!("Bearer {}", token.expose()),
        })
    }
}

/// The token alone: without blanks, quotes and invisible characters around it, as pasting leaves
/// them.
pub fn trimmed(text: &str) -> String {
    text.trim_matches(|c: char| c.is_whitespace() || is_invisible(c) || is_quote(c)).to_owned()
}

/// What is no token at all, or one with something else around it; never quotes it.
fn misread(text: &str) -> Result<(), String> {
    if text.is_empty() {
        return Err("the token is empty".into());
    }
    if let Some(c) = text.chars().find(|c| is_invisible(*c) && !c.is_whitespace()) {
        return Err(format!(
            "there is an invisible character in the token (U+{:04X}): copy it again, as plain text",
            u32::from(c)
        ));
    }
    if let Some((name, _)) = text.split_once('=')
        && matches!(
            name.trim_start_matches("export").trim(),
            "K3S_TOKEN" | "TOKEN" | "token" | "--token"
        )
    {
        return Err(format!("it begins with `{}=`: give only what follows the `=`", name.trim()));
    }
    if text.contains(char::is_whitespace) {
        return Err("the token contains white space: was it broken over two lines?".into());
    }
    if let Some(c) =
        text.chars().find(|c| matches!(c, '"' | '“' | '”' | '„' | '‘' | '’' | '«' | '»'))
    {
        return Err(format!("there is a quote in the token ({c})"));
    }
    if text.get(..3) == Some("k10") && text.contains("::") {
        return Err(
            "it begins with k10, and a token begins with K10: was it changed to lower case? its \
             password is lost with that"
                .into(),
        );
    }
    if text.matches("K10").count() > 1 && text.matches("::").count() > 1 {
        return Err("there are two tokens in it: was it pasted twice?".into());
    }
    let address = text.trim_matches(['[', ']']).parse::<std::net::IpAddr>().is_ok();
    if address || text.get(..8).is_some_and(|s| s.eq_ignore_ascii_case("https://")) {
        return Err("this is an address, not a token: MASTER comes first, then TOKEN".into());
    }
    Ok(())
}

fn bootstrap(text: &str) -> Option<TokenCredential> {
    let (id, secret) = text.split_once('.')?;
    let plain = |part: &str, length: usize| {
        part.len() == length && part.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit())
    };
    (plain(id, 6) && plain(secret, 16))
        .then(|| TokenCredential::Bootstrap { id: id.into(), token: Secret::new(text) })
}

/// The hash that a token for this server carries, from the body of its `/cacerts`.
///
/// One certificate: sha256 of the literal answer. Several: sha256 of the DER of the root that the
/// first chains to, so that tokens survive a rotated intermediate.
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
        .map(|der| {
            x509_parser::parse_x509_certificate(der)
                .map(|(_, c)| c)
                .map_err(|e| format!("a certificate in /cacerts is broken: {e}"))
        })
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
    fn what_pasting_leaves_around_a_token_is_taken_off_and_the_rest_is_named() {
        let token = format!("K10{}::server:planted-password-4711", "ab".repeat(32));
        let plain = Token::parse(&token).unwrap();
        for around in [
            "\"_\"",
            "'_'",
            "“_”",
            "\u{feff}_",
            "_\u{200b}",
            "_\r\n",
            "_\n\u{200b}\n",
            "`_`",
            "\t_ ",
        ] {
            assert_eq!(Token::parse(&around.replace('_', &token)).unwrap(), plain, "{around}");
            assert_eq!(trimmed(&around.replace('_', &token)), token);
        }
        let hash = "ab".repeat(32);
        for (bad, why) in [
            (format!("K3S_TOKEN={token}"), "begins with `K3S_TOKEN=`"),
            (format!("export K3S_TOKEN={token}"), "begins with `export K3S_TOKEN=`"),
            (format!("--token={token}"), "begins with `--token=`"),
            (token.replace("K10", "k10"), "begins with k10"),
            (token.replace("::", ":::"), "three colons"),
            (format!("{token}{token}"), "pasted twice"),
            (token.replace("::", "\u{200b}::"), "U+200B"),
            (token.replace("::", "\"::"), "a quote in the token"),
            (token.replacen("ab", "abc", 1), "it has 65 characters after K10"),
            (token.replacen("ab", "xy", 1), "another character among them"),
            (format!("X{token}"), "does not begin with K10"),
            (format!("K10{hash}::\nserver:planted-password-4711"), "white space"),
            ("10.0.0.1".into(), "MASTER comes first"),
            ("https://10.0.0.1:6443".into(), "MASTER comes first"),
        ] {
            let said = Token::parse(&bad).unwrap_err();
            assert!(said.contains(why) && !said.contains("planted-password-4711"), "{said}");
        }
    }

    #[test]
    fn mangled_tokens_are_explained_without_being_shown() {
        let hash = "ab".repeat(32);
        for bad in [
            "",
            "a b",
            &format!("K10{hash}"),
            &format!("K10{}::node:x", &hash[1..]),
            &format!("K10{hash}::node:"),
            &format!("K10{hash}::nodex"),
        ] {
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
