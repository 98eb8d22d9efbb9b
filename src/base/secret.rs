//! A string that must not be seen: prints as dots, is wiped when dropped.

use parking_lot::Mutex;
use subtle::ConstantTimeEq as _;
use zeroize::Zeroizing;

/// A token or key. `Debug` shows dots; there is no `Display` and no `Serialize`, so it cannot slip
/// into text or JSON.
#[derive(Clone, Default, PartialEq, Eq, serde::Deserialize)]
pub struct Secret(Zeroizing<String>);

impl Secret {
    pub fn new(text: impl Into<String>) -> Self {
        Secret(Zeroizing::new(text.into()))
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// For `serialize_with`, in the few wire types whose purpose is to carry it.
    pub fn serialize_exposed<S: serde::Serializer>(
        &self,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }

    /// The text itself, for the one place that must send or store it.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(MASK)
    }
}

/// Whether two texts are equal, in a time that does not depend on where they differ. The length may
/// show.
pub fn constant_time_eq(a: &str, b: &str) -> bool {
    a.as_bytes().ct_eq(b.as_bytes()).into()
}

/// What stands in a secret's place.
pub const MASK: &str = "••••";

/// Shortest secret that is looked for in other text: dots in place of shorter ones would hide half
/// of the words.
const SHORTEST: usize = 6;

/// Secrets of this run. Whatever is printed or logged goes through [`mask_registered`], so that no
/// text of another program, of a library or of ours can show one of them.
static KNOWN: Mutex<Vec<Secret>> = Mutex::new(Vec::new());

/// Takes note of a secret that no output may show.
pub fn register_secret(text: &str) {
    let text = text.trim();
    if text.len() < SHORTEST {
        return;
    }
    let mut known = KNOWN.lock();
    // the longest first: a secret inside another leaves no rest of it
    if !known.iter().any(|k| k.expose() == text) {
        let at = known.partition_point(|k| k.expose().len() >= text.len());
        known.insert(at, Secret::new(text));
    }
}

/// `text` without the secrets of this run, passwords in URLs, and anything shaped like a k3s token.
pub fn mask_registered(text: &str) -> String {
    let known = KNOWN.lock();
    mask(text, &known)
}

/// Every string of `value` as [`mask_registered`] has it.
pub fn mask_registered_json(value: &mut serde_json::Value) {
    match value {
        serde_json::Value::String(text) => *text = mask_registered(text),
        serde_json::Value::Array(items) => items.iter_mut().for_each(mask_registered_json),
        serde_json::Value::Object(map) => map.values_mut().for_each(mask_registered_json),
        _ => {}
    }
}

/// `text` with every occurrence of a secret, and anything shaped like a k3s token, replaced by
/// dots; passwords in URLs too.
pub fn mask(text: &str, secrets: &[Secret]) -> String {
    let mut out = text.to_owned();
    for secret in secrets.iter().filter(|s| s.expose().len() >= SHORTEST) {
        out = out.replace(secret.expose(), MASK);
    }
    tokens(&urls(&out, &mut Vec::new()))
}

/// Anything shaped like a k3s token replaced by dots.
fn tokens(text: &str) -> String {
    let mut masked = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find("K10") {
        let (before, tail) = rest.split_at(at);
        masked.push_str(before);
        let end = tail
            .find(|c: char| c.is_whitespace() || matches!(c, '"' | '\'' | ',' | ')'))
            .unwrap_or(tail.len());
        let (word, after) = tail.split_at(end);
        masked.push_str(if word.len() >= 20 { "K10••••" } else { word });
        rest = after;
    }
    masked.push_str(rest);
    masked
}

/// The secret parts of the URLs in `text`: passwords, users without a password (a token as a rule),
/// secret query values. As they stand there and percent-decoded.
pub fn secrets_in_urls(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    urls(text, &mut found);
    found
}

/// Stands for a password in a text that shows what a URL looks like.
const PLACEHOLDER: &str = "PASSWORD";

/// Replaces what is secret in URLs and adds it to `found`.
///
/// Passwords are often typed with `/`, `#` or `@` unencoded, so everything up to the last `@` of
/// the word counts as login.
fn urls(text: &str, found: &mut Vec<String>) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find("://") {
        let (before, tail) = rest.split_at(at + 3);
        out.push_str(before);
        let end = end_of(&rest[..at], tail);
        // a list of URLs: the next one begins after a comma
        let end = tail[..end].find("://").and_then(|next| tail[..next].rfind(',')).unwrap_or(end);
        let (word, after) = tail.split_at(end);
        let place = match word.rsplit_once('@') {
            Some((login, place)) => {
                let (user, password) = match login.split_once(':') {
                    Some((user, password)) if !user.contains('/') => (Some(user), password),
                    _ => (None, login),
                };
                if password.is_empty() || password == MASK || password == PLACEHOLDER {
                    out.push_str(login);
                } else {
                    note(password, found);
                    out.extend([
                        user.unwrap_or_default(),
                        if user.is_some() { ":" } else { "" },
                        MASK,
                    ]);
                }
                out.push('@');
                place
            }
            None => word,
        };
        query(place, &mut out, found);
        rest = after;
    }
    out.push_str(rest);
    out
}

/// Where the URL ends that `before` begins and `tail` continues after its `://`.
fn end_of(before: &str, tail: &str) -> usize {
    let quote = |c: char| matches!(c, '"' | '\'' | '`' | '<' | '>');
    let scheme = |c: char| c.is_ascii_alphanumeric() || "+.-".contains(c);
    let closing = match before.trim_end_matches(scheme).chars().next_back() {
        Some('<') => Some('>'),
        before => before.filter(|c| quote(*c)),
    };
    let word = &tail[..tail.find(char::is_whitespace).unwrap_or(tail.len())];
    let first = word.find(quote).unwrap_or(word.len());
    // a quote that closes nothing, with an `@` after it, is part of a password
    let whole = &word[..closing.and_then(|c| word.find(c)).unwrap_or(word.len())];
    match whole.rfind('@') {
        Some(at) if !word[..first].contains('@') => {
            whole[at..].find(quote).map_or(whole.len(), |end| at + end)
        }
        _ => first,
    }
}

/// `path?password=x&b=c`, the secret values replaced.
fn query(place: &str, out: &mut String, found: &mut Vec<String>) {
    let Some((path, query)) = place.split_once('?') else { return out.push_str(place) };
    out.push_str(path);
    for (number, pair) in query.split('&').enumerate() {
        out.push(if number == 0 { '?' } else { '&' });
        match pair.split_once('=') {
            Some((name, value)) if !value.is_empty() && value != MASK && is_secret_name(name) => {
                note(value, found);
                out.extend([name, "=", MASK]);
            }
            _ => out.push_str(pair),
        }
    }
}

fn note(secret: &str, found: &mut Vec<String>) {
    found.push(secret.to_owned());
    let decoded = percent_encoding::percent_decode_str(secret).decode_utf8_lossy();
    if decoded != secret {
        found.push(decoded.into_owned());
    }
}

/// Whether something of this name is a secret itself: `oidc-client-secret` is, `token-auth-file`
/// and `enable-bootstrap-token-auth` are not.
pub fn is_secret_name(name: &str) -> bool {
    let name = name.to_ascii_lowercase().replace(['_', '.'], "-");
    let words: Vec<&str> = name.split('-').collect();
    let last = words.last().copied().unwrap_or_default();
    if matches!(
        last,
        "file"
            | "path"
            | "dir"
            | "ttl"
            | "expiration"
            | "mode"
            | "url"
            | "enabled"
            | "config"
            | "bin"
    ) {
        return false;
    }
    let joined = words.concat();
    [
        "password",
        "passwd",
        "passphrase",
        "secretkey",
        "accesskey",
        "apikey",
        "authkey",
        "joinkey",
        "identitytoken",
        "signature",
        "credential",
    ]
    .iter()
    .any(|part| joined.contains(part))
        || matches!(last, "token" | "secret" | "pass" | "pw" | "pwd" | "sig")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_shows_the_text() {
        assert_eq!(format!("{:?}", Secret::new("hunter2")), "••••");
        let token = format!("K10{}::server:pw", "a".repeat(64));
        assert_eq!(
            mask(&format!("token {token} and hunter2!"), &[Secret::new("hunter2")]),
            "token K10•••• and ••••!"
        );
    }

    #[test]
    fn passwords_in_urls_are_found_however_they_are_typed() {
        for (text, shown, secrets) in [
            ("postgres://u:hunter2@h/db", "postgres://u:••••@h/db", vec!["hunter2"]),
            // what a URL looks like is no URL
            ("postgres://USER:PASSWORD@HOST/DB", "postgres://USER:PASSWORD@HOST/DB", vec![]),
            (
                "at `https://u:p%40ss@h:1/x`: no",
                "at `https://u:••••@h:1/x`: no",
                vec!["p%40ss", "p@ss"],
            ),
            ("mysql://u:a/b#c@d@tcp(h:3306)/db", "mysql://u:••••@tcp(h:3306)/db", vec!["a/b#c@d"]),
            (
                "https://a:one@x,https://b:two@y",
                "https://a:••••@x,https://b:••••@y",
                vec!["one", "two"],
            ),
            ("https://ghp_token@h/x", "https://••••@h/x", vec!["ghp_token"]),
            (
                "pg://h/db?user=u&password=hunter2&a=b",
                "pg://h/db?user=u&password=••••&a=b",
                vec!["hunter2"],
            ),
            ("https://h:6443/x and a@b", "https://h:6443/x and a@b", vec![]),
            ("https://u:••••@h", "https://u:••••@h", vec![]),
            // a quote ends what it began
            ("--url=https://u:p\"a'ss@h/x", "--url=https://u:••••@h/x", vec!["p\"a'ss"]),
            ("no 'https://u:p\"ss@h' here", "no 'https://u:••••@h' here", vec!["p\"ss"]),
            ("see <https://u:p'ss@h>, a@b", "see <https://u:••••@h>, a@b", vec!["p'ss"]),
            (r#"{"a":"https://h","b":"a@b"}"#, r#"{"a":"https://h","b":"a@b"}"#, vec![]),
        ] {
            assert_eq!(mask(text, &[]), shown);
            assert_eq!(secrets_in_urls(text), secrets, "{text}");
        }
    }

    #[test]
    fn names_of_secrets_are_told_from_names_about_them() {
        for name in [
            "password",
            "oidc-client-secret",
            "etcd-s3-secret-key",
            "AWS_ACCESS_KEY_ID",
            "joinKey",
            "token",
            "identity_token",
        ] {
            assert!(is_secret_name(name), "{name}");
        }
        for name in [
            "token-auth-file",
            "enable-bootstrap-token-auth",
            "service-account-key-file",
            "secrets-encryption",
            "key",
            "node-name",
        ] {
            assert!(!is_secret_name(name), "{name}");
        }
    }

    #[test]
    fn what_is_remembered_is_shown_nowhere() {
        register_secret("a-remembered-secret-0123456789");
        let mut value = serde_json::json!({"a": ["x a-remembered-secret-0123456789 y"]});
        mask_registered_json(&mut value);
        assert_eq!(value, serde_json::json!({"a": ["x •••• y"]}));
        register_secret("short");
        assert_eq!(mask_registered("short"), "short");
    }
}
