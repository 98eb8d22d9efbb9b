//! A string that must not be seen: prints as dots, is wiped when dropped.

use zeroize::Zeroizing;

/// A token or key. `Debug` shows dots; there is no `Display` and no `Serialize`, so it cannot slip into text or JSON.
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
    pub fn reveal<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }

    /// The text itself, for the one place that must send or store it.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("••••")
    }
}

/// Equal, in a time that does not depend on where they differ.
pub fn same(a: &str, b: &str) -> bool {
    a.len() == b.len() && a.bytes().zip(b.bytes()).fold(0, |diff, (x, y)| diff | (x ^ y)) == 0
}

/// `text` with every occurrence of a secret, and anything shaped like a k3s token, replaced by dots.
pub fn mask(text: &str, secrets: &[Secret]) -> String {
    let mut out = text.to_owned();
    for secret in secrets.iter().filter(|s| s.expose().len() >= 6) {
        out = out.replace(secret.expose(), "••••");
    }
    let mut masked = String::with_capacity(out.len());
    let mut rest = out.as_str();
    while let Some(at) = rest.find("K10") {
        let (before, tail) = rest.split_at(at);
        masked.push_str(before);
        let end = tail.find(|c: char| c.is_whitespace() || matches!(c, '"' | '\'' | ',' | ')')).unwrap_or(tail.len());
        let (word, after) = tail.split_at(end);
        masked.push_str(if word.len() >= 20 { "K10••••" } else { word });
        rest = after;
    }
    masked.push_str(rest);
    masked
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_shows_the_text() {
        assert_eq!(format!("{:?}", Secret::new("hunter2")), "••••");
        let token = format!("K10{}::server:pw", "a".repeat(64));
        assert_eq!(mask(&format!("token {token} and hunter2!"), &[Secret::new("hunter2")]), "token K10•••• and ••••!");
    }
}
