//! Foreign text on its way to a terminal or into a name: characters that are invisible or that a
//! terminal obeys.
//!
//! A character may be one that a terminal obeys, that turns the text around it (Unicode TR36 §3.2,
//! CVE-2021-42574), or that nobody sees: two names that look the same are then two names, and a
//! line says something else than it shows.

use std::borrow::Cow;
use std::fmt::Write as _;

/// Ranges of format characters (category Cf), of line and paragraph separators, and of what Unicode
/// lets be ignored or shows as a blank though it is none (`DerivedCoreProperties.txt` 16.0,
/// Default_Ignorable_Code_Point; U+2800, the empty Braille pattern).
const UNSEEN: &[(u32, u32)] = &[
    (0x00ad, 0x00ad),
    (0x034f, 0x034f),
    (0x0600, 0x0605),
    (0x061c, 0x061c),
    (0x06dd, 0x06dd),
    (0x070f, 0x070f),
    (0x0890, 0x0891),
    (0x08e2, 0x08e2),
    (0x115f, 0x1160),
    (0x17b4, 0x17b5),
    (0x180b, 0x180f),
    (0x200b, 0x200f),
    (0x2028, 0x202e),
    (0x2060, 0x206f),
    (0x2800, 0x2800),
    (0x3164, 0x3164),
    (0xfe00, 0xfe0f),
    (0xfeff, 0xfeff),
    (0xffa0, 0xffa0),
    (0xfff0, 0xfffb),
    (0x110bd, 0x110bd),
    (0x110cd, 0x110cd),
    (0x13430, 0x1343f),
    (0x1bca0, 0x1bca3),
    (0x1d173, 0x1d17a),
    (0xe0000, 0xe0fff),
];

/// Whether a character cannot be shown as it is: a control, one that is not seen or turns its
/// neighbours around, one for private use, or none at all.
pub fn is_unprintable(c: char) -> bool {
    let n = u32::from(c);
    if c.is_ascii() {
        return c.is_ascii_control();
    }
    let private = matches!(n, 0xe000..=0xf8ff | 0xf0000..=0x10_ffff);
    let none = n & 0xfffe == 0xfffe || matches!(n, 0xfdd0..=0xfdef);
    c.is_control() || private || none || UNSEEN.iter().any(|(from, to)| (*from..=*to).contains(&n))
}

fn escaped<'a>(
    text: &'a str,
    stays: impl Fn(char) -> bool,
    escape: impl Fn(&mut String, char),
) -> Cow<'a, str> {
    let hurts = |c: char| is_unprintable(c) && !stays(c);
    if !text.contains(hurts) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 8);
    for c in text.chars() {
        if hurts(c) { escape(&mut out, c) } else { out.push(c) }
    }
    Cow::Owned(out)
}

fn named(out: &mut String, c: char) {
    let _ = write!(out, "\\u{{{:x}}}", u32::from(c));
}

/// Text as it may stand in one line of a terminal: what cannot be shown is named, as `\u{202e}`.
pub fn printable(text: &str) -> Cow<'_, str> {
    escaped(text, |_| false, named)
}

/// The same for text of several lines.
pub fn printable_lines(text: &str) -> Cow<'_, str> {
    escaped(text, |c| matches!(c, '\n' | '\t'), named)
}

/// JSON that says the same with nothing in it that a terminal obeys: such characters stand in
/// strings alone (RFC 8259 §7).
pub fn printable_json(json: &str) -> Cow<'_, str> {
    escaped(
        json,
        |c| matches!(c, '\n' | '\t' | '\r'),
        |out, c| {
            for unit in c.encode_utf16(&mut [0; 2]) {
                let _ = write!(out, "\\u{unit:04x}");
            }
        },
    )
}

/// Longest beginning and end that are kept of an error about JSON, characters: serde quotes what it
/// was given, and that may be a megabyte.
const JSON_ERROR: usize = 300;

/// What is wrong with JSON, without the names of our own types: serde says `expected struct Named
/// with 1 element`, and a caller knows of no such thing.
pub fn json_error(error: &serde_json::Error) -> String {
    let text = error.to_string();
    if let Some((cut, _)) = text.char_indices().nth(JSON_ERROR)
        && let Some((end, _)) = text[cut..].char_indices().rev().nth(JSON_ERROR)
    {
        return without_type_names(&format!("{} … {}", &text[..cut], &text[cut + end..]));
    }
    without_type_names(&text)
}

/// The same for a request that may hold secrets: names stay, a value of a wrong type goes.
pub fn valueless_json_error(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let kinds = ["invalid type: ", "invalid value: "];
    let value = kinds.iter().find_map(|kind| text.strip_prefix(kind)).and_then(|value| {
        let shown = value.split(['"', '`']).next().unwrap_or_default();
        Some((shown.trim_end(), value.rfind(", expected ")?, value))
    });
    match value {
        // `null` and the like are not quoted, and end there
        Some((shown, end, value)) if shown.len() < end => {
            let kind = &text[..text.len() - value.len()];
            without_type_names(&format!("{kind}{shown}{}", &value[end..]))
        }
        _ => json_error(error),
    }
}

/// The same for a file that may hold secrets: all that stands between the first and the last quote
/// is left out, because a name in backticks may hold one itself.
pub fn unquoted_json_error(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let quotes = ['"', '`'];
    match (text.find(quotes), text.rfind(quotes)) {
        (Some(first), Some(last)) => {
            without_type_names(&format!("{}{}", text[..first].trim_end(), &text[last + 1..]))
        }
        _ => without_type_names(&text),
    }
}

fn without_type_names(text: &str) -> String {
    let (mut rest, mut out) = (text, String::new());
    while let Some((before, after)) = rest.split_once("expected ") {
        out.push_str(before);
        out.push_str("expected ");
        let kinds = [
            "internally tagged enum ",
            "adjacently tagged enum ",
            "tuple struct ",
            "struct ",
            "enum ",
        ];
        rest = match kinds.iter().find_map(|kind| after.strip_prefix(kind)) {
            Some(name) => {
                out.push_str("an object");
                let name = name.trim_start_matches(|c: char| c.is_alphanumeric() || c == '_');
                without_count(name)
            }
            None => after,
        };
    }
    out + rest
}

/// The rest of a text that may begin with ` with 3 elements`.
fn without_count(text: &str) -> &str {
    let Some(count) = text.strip_prefix(" with ") else { return text };
    let count = count.trim_start_matches(|c: char| c.is_ascii_digit());
    let count = count.strip_prefix(" element").unwrap_or(count);
    count.strip_prefix('s').unwrap_or(count)
}

/// Why a text cannot be a name that people read, if it cannot.
///
/// # Errors
/// What is wrong with it, as the end of a sentence that begins with what the name is of.
pub fn check_display_name(text: &str, max: usize) -> Result<(), String> {
    let long = text.chars().count();
    if let Some(c) = text.chars().find(|c| is_unprintable(*c)) {
        return Err(format!(
            "holds U+{:04X}, which cannot be seen or turns text around",
            u32::from(c)
        ));
    }
    if text.trim().is_empty() {
        return Err("is blank".into());
    }
    if text.trim() != text {
        return Err("begins or ends with a blank".into());
    }
    if long > max {
        return Err(format!("has {long} characters; {max} is the most"));
    }
    Ok(())
}

/// RFC 1123 subdomain.
pub fn is_dns_name(name: &str) -> bool {
    name.len() <= 253 && name.split('.').all(is_dns_label)
}

/// RFC 1123 label, as the name of a namespace.
pub fn is_dns_label(label: &str) -> bool {
    (1..=63).contains(&label.len())
        && !label.starts_with('-')
        && !label.ends_with('-')
        && label.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-')
}

/// A value of a Kubernetes label, which may be empty (apimachinery, `validation.IsValidLabelValue`).
pub fn is_label_value(text: &str) -> bool {
    let inner = |b: u8| b.is_ascii_alphanumeric() || b"-_.".contains(&b);
    let edge = |b: Option<&u8>| b.is_none_or(u8::is_ascii_alphanumeric);
    let bytes = text.as_bytes();
    text.len() <= 63 && text.bytes().all(inner) && edge(bytes.first()) && edge(bytes.last())
}

/// A key of one, with or without the DNS name of whose it is before a `/` (`IsQualifiedName`).
pub fn is_label_key(text: &str) -> bool {
    let (prefix, name) = text.rsplit_once('/').map_or((None, text), |(p, n)| (Some(p), n));
    prefix.is_none_or(is_dns_name) && !name.is_empty() && is_label_value(name)
}

/// A word as POSIX' shell reads it (XCU 2.2).
pub fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "_-./:=,@%+".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', "'\\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_error_of_json_names_one_of_our_types() {
        #[derive(Debug, serde::Deserialize)]
        #[expect(dead_code, reason = "only read")]
        struct Named {
            name: String,
            kind: Option<Kind>,
        }
        #[derive(Debug, serde::Deserialize)]
        #[serde(tag = "kind", content = "spec")]
        #[expect(dead_code, reason = "only read")]
        enum Kind {
            Other(Box<Named>),
        }
        for (json, expected) in [
            ("[]", "invalid length 0, expected an object at line 1 column 2"),
            ("7", "invalid type: integer `7`, expected an object at line 1 column 1"),
            (
                r#"{"name": "a", "kind": 7}"#,
                "invalid type: integer `7`, expected an object at line 1 column 23",
            ),
            (r#"{"name": 7}"#, "invalid type: integer `7`, expected a string at line 1 column 10"),
        ] {
            let error = serde_json::from_str::<Named>(json).unwrap_err();
            assert_eq!(json_error(&error), expected, "{json}");
        }
        // nothing of a file with secrets, however it is quoted
        for json in
            [r#"{"a`b\"secret": 1}"#, r#"{"name": 1, "a`secret`b": 2}"#, r#""sec`ret\"secret""#]
        {
            let said = unquoted_json_error(&serde_json::from_str::<Named>(json).unwrap_err());
            assert!(!said.contains("secret") && said.contains(" at line 1 column "), "{said}");
        }
        // nor of a request, of which only a value goes
        for (json, expected) in [
            (r#"{"kind": {"kind": "x"}}"#, "unknown variant `x`, expected `Other`"),
            (r#"{"name": 4711}"#, "invalid type: integer, expected a string at line 1"),
            (r#"{"name": null}"#, "invalid type: null, expected a string at line 1"),
            (r#"{"name": "secret`", "kind": "secret"}"#, "invalid type: string, expected an obj"),
            (r#""secret`\", expected a \"secret""#, "invalid type: string, expected an object at"),
        ] {
            let said = valueless_json_error(&serde_json::from_str::<Named>(json).unwrap_err());
            assert!(said.starts_with(expected) && !said.contains("secret"), "{json}: {said}");
        }
        // what a caller writes is quoted, but not all of it, and looked through once
        let long = format!(r#"{{"{}": 1}}"#, "expected struct .".repeat(60_000));
        #[derive(Debug, serde::Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Nothing {}
        let said = json_error(&serde_json::from_str::<Nothing>(&long).unwrap_err());
        assert!(
            said.starts_with("unknown field `expected an object.expected an object."),
            "{said}"
        );
        assert!(said.contains(" … ") && said.contains("there are no fields"), "{said}");
        assert!(said.len() < 1000, "{}", said.len());
    }

    #[test]
    fn what_hurts_is_named_and_what_people_write_stays() {
        for (given, expected) in [
            ("plain text, grün, 日本語, ‏", "plain text, grün, 日本語, \\u{200f}"),
            ("\u{1b}[31mred", "\\u{1b}[31mred"),
            ("a\rb\nc\td\0e\u{7}", "a\\u{d}b\\u{a}c\\u{9}d\\u{0}e\\u{7}"),
            ("pay\u{202e}txt.exe", "pay\\u{202e}txt.exe"),
            ("\u{2066}isolate\u{2069}", "\\u{2066}isolate\\u{2069}"),
            ("zero\u{200b}width\u{feff}", "zero\\u{200b}width\\u{feff}"),
            ("so\u{ad}ft", "so\\u{ad}ft"),
            ("tag\u{e0041}", "tag\\u{e0041}"),
            ("line\u{2028}para\u{2029}", "line\\u{2028}para\\u{2029}"),
            ("c1\u{9b}31m", "c1\\u{9b}31m"),
            ("private\u{e000}\u{10fffd}", "private\\u{e000}\\u{10fffd}"),
            ("🚀 – „quoted“ ½", "🚀 – „quoted“ ½"),
        ] {
            assert_eq!(printable(given), expected);
        }
        assert_eq!(printable_lines("a\n\tb\u{1b}c\r"), "a\n\tb\\u{1b}c\\u{d}");
        let json = serde_json::to_string_pretty(
            &serde_json::json!({"a": "x\u{202e}\u{9b}\u{e0041}\u{1b}\u{7f}"}),
        )
        .unwrap();
        let safe = printable_json(&json);
        assert!(!safe.contains(|c| is_unprintable(c) && c != '\n'), "{safe}");
        assert_eq!(
            serde_json::from_str::<serde_json::Value>(&safe).unwrap(),
            serde_json::from_str::<serde_json::Value>(&json).unwrap()
        );
    }

    #[test]
    fn a_name_is_seen_and_means_one_thing() {
        for good in ["a", "prod eu-1", "Łódź", "🚀", "東京 1", "<b>x</b>", &"ж".repeat(63)]
        {
            assert_eq!(check_display_name(good, 63), Ok(()), "{good}");
        }
        for (bad, why) in [
            ("", "blank"),
            ("   ", "blank"),
            ("\u{3000}\u{a0}", "blank"),
            (" a", "begins or ends"),
            ("a\u{a0}", "begins or ends"),
            ("\u{3164}", "U+3164"),
            ("\u{2800}", "U+2800"),
            ("a\u{202e}b", "U+202E"),
            ("a\u{200d}b", "U+200D"),
            ("\u{1b}[2J", "U+001B"),
            ("a\nb", "U+000A"),
            ("a\u{fdd0}", "U+FDD0"),
            (&"x".repeat(64), "63 is the most"),
        ] {
            assert!(
                check_display_name(bad, 63).is_err_and(|said| said.contains(why)),
                "{bad:?}: {:?}",
                check_display_name(bad, 63)
            );
        }
    }

    #[test]
    fn a_word_is_quoted_where_a_shell_would_read_something_else() {
        for (word, wanted) in [
            ("/opt/release", "/opt/release"),
            ("a=b,c=d", "a=b,c=d"),
            ("", "''"),
            ("prod eu", "'prod eu'"),
            ("it's $HOME", "'it'\\''s $HOME'"),
        ] {
            assert_eq!(quoted(word), wanted);
        }
    }
}
