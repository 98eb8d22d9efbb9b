//! Labels of clusters, and what selects clusters by them: the grammar of Kubernetes' label selectors
//! (apimachinery, `pkg/labels/selector.go`) without its comparisons of numbers, and without lists
//! that have an empty place, as in `k in (a,)`.

use std::collections::BTreeMap;
use std::fmt::{Display, Formatter};

use crate::base::text::{is_label_key, is_label_value, printable};

/// What a selector sees of a cluster beside its labels: no label is called so.
pub const FACTS: [&str; 5] = ["id", "name", "provider", "region", "zone"];

/// Most labels of one cluster that one side gives it.
pub const MAX_LABELS: usize = 50;

/// Longest text of a selector, bytes.
const MAX_TEXT: usize = 4096;

const BAD_KEY: &str = "a key has up to 63 letters, digits, -, _ and ., begins and ends with a letter \
                       or digit, and may have a DNS name and / before it";
const BAD_VALUE: &str = "a value has up to 63 letters, digits, -, _ and ., and begins and ends with a \
                         letter or digit";

/// Which clusters are meant: all requirements must hold.
#[derive(Clone, Debug, PartialEq)]
pub struct Selector(Vec<Requirement>);

#[derive(Clone, Debug, PartialEq)]
struct Requirement {
    key: String,
    test: Test,
}

#[derive(Clone, Debug, PartialEq)]
enum Test {
    /// The values are sorted, each is there once, and there is one or more.
    In(Vec<String>),
    /// Holds where the key is absent, too.
    NotIn(Vec<String>),
    Exists,
    Absent,
}

impl Selector {
    /// Requirements, separated by commas: `k=v`, `k==v`, `k!=v`, `k in (a,b)`, `k notin (a,b)`, `k`
    /// and `!k`.
    ///
    /// # Errors
    /// Why it is none, with the part that is wrong. An empty text selects nothing by mistake, or
    /// everything: it is refused.
    pub fn parse(text: &str) -> Result<Selector, String> {
        if text.len() > MAX_TEXT {
            return Err(format!("a selector has {MAX_TEXT} bytes at most"));
        }
        if text.trim().is_empty() {
            return Err("a selector is one or more of KEY=VALUE, KEY!=VALUE, KEY in (A,B), KEY \
                        notin (A,B), KEY and !KEY, separated by commas"
                .into());
        }
        let mut inside = false;
        let parts = text.split(|c| {
            inside = (inside || c == '(') && c != ')';
            c == ',' && !inside
        });
        let requirement = |part: &str| {
            let part = part.trim();
            Requirement::parse(part).map_err(|why| format!("`{}`: {why}", printable(part)))
        };
        Ok(Selector(parts.map(requirement).collect::<Result<_, _>>()?))
    }

    /// Whether a cluster is meant; `labels` gives the value of a label or fact that it has.
    pub fn matches(&self, labels: &dyn Fn(&str) -> Option<String>) -> bool {
        self.0.iter().all(|requirement| {
            let value = labels(&requirement.key);
            let is_among = |values: &[String]| value.as_ref().is_some_and(|v| values.contains(v));
            match &requirement.test {
                Test::In(values) => is_among(values),
                Test::NotIn(values) => !is_among(values),
                Test::Exists => value.is_some(),
                Test::Absent => value.is_none(),
            }
        })
    }

    /// The keys that it asks for.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(|requirement| requirement.key.as_str())
    }
}

impl Requirement {
    fn parse(part: &str) -> Result<Requirement, String> {
        if part.is_empty() {
            return Err("a requirement is missing beside a comma".into());
        }
        let (key, test) = if let Some((head, values)) = part.split_once('(') {
            let values = values.strip_suffix(')').ok_or("a ) is missing at its end")?;
            let values = values.split(',').map(str::trim);
            if values.clone().any(str::is_empty) {
                return Err("a value is missing between ( and )".into());
            }
            let mut values: Vec<String> = values.map(str::to_owned).collect();
            values.sort_unstable();
            values.dedup();
            match head.split_whitespace().collect::<Vec<_>>()[..] {
                [key, "in"] => (key, Test::In(values)),
                [key, "notin"] => (key, Test::NotIn(values)),
                _ => return Err("values in ( ) stand after KEY in or KEY notin".into()),
            }
        } else if let Some((key, value)) = part.split_once("!=") {
            (key, Test::NotIn(vec![value.trim().to_owned()]))
        } else if let Some((key, value)) = part.split_once('=') {
            let value = value.strip_prefix('=').unwrap_or(value);
            (key, Test::In(vec![value.trim().to_owned()]))
        } else if let Some(key) = part.strip_prefix('!') {
            (key, Test::Absent)
        } else {
            (part, Test::Exists)
        };
        let key = key.trim().to_owned();
        if !is_label_key(&key) {
            return Err(BAD_KEY.into());
        }
        if let Test::In(values) | Test::NotIn(values) = &test
            && !values.iter().all(|value| is_label_value(value))
        {
            return Err(BAD_VALUE.into());
        }
        Ok(Requirement { key, test })
    }
}

/// The text that it can be read from again; the same for all texts that mean the same requirements
/// in the same order.
impl Display for Selector {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        for (n, Requirement { key, test }) in self.0.iter().enumerate() {
            f.write_str(if n == 0 { "" } else { "," })?;
            match test {
                Test::In(values) => match &values[..] {
                    [value] => write!(f, "{key}={value}")?,
                    _ => write!(f, "{key} in ({})", values.join(","))?,
                },
                Test::NotIn(values) => match &values[..] {
                    [value] => write!(f, "{key}!={value}")?,
                    _ => write!(f, "{key} notin ({})", values.join(","))?,
                },
                Test::Exists => f.write_str(key)?,
                Test::Absent => write!(f, "!{key}")?,
            }
        }
        Ok(())
    }
}

/// Whether a cluster may have this label.
///
/// # Errors
/// Why not, quoting it.
pub fn check_label(key: &str, value: &str) -> Result<(), String> {
    let why = if !is_label_key(key) {
        BAD_KEY
    } else if FACTS.contains(&key) {
        "id, name, provider, region and zone are what a cluster has anyway: take another key"
    } else if key.starts_with("pipeops.io/") {
        "keys below pipeops.io/ are reserved"
    } else if !is_label_value(value) {
        BAD_VALUE
    } else {
        return Ok(());
    };
    Err(format!("label `{}={}`: {why}", printable(key), printable(value)))
}

/// A label as it is typed: `KEY=VALUE`.
///
/// # Errors
/// Why it is none, quoting it.
pub fn parse_label(text: &str) -> Result<(&str, &str), String> {
    let (key, value) = text
        .split_once('=')
        .ok_or_else(|| format!("label `{}`: it is KEY=VALUE", printable(text)))?;
    check_label(key, value).map(|()| (key, value))
}

/// Labels as they are typed.
///
/// # Errors
/// As [`parse_label`], and for a key that is there twice or too many of them.
pub fn parse_labels(list: &[String]) -> Result<BTreeMap<String, String>, String> {
    let mut labels = BTreeMap::new();
    for text in list {
        let (key, value) = parse_label(text)?;
        if labels.insert(key.to_owned(), value.to_owned()).is_some() {
            return Err(format!("label `{}`: its key is there twice", printable(text)));
        }
    }
    if labels.len() > MAX_LABELS {
        return Err(format!("a cluster has {MAX_LABELS} labels at most"));
    }
    Ok(labels)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_selector_is_read_as_kubernetes_reads_it() {
        for (text, canonical) in [
            ("env=prod", "env=prod"),
            (" env == prod ", "env=prod"),
            ("env=", "env="),
            ("env != prod,!legacy", "env!=prod,!legacy"),
            ("tier in (web, api,web)", "tier in (api,web)"),
            ("tier in(web)", "tier=web"),
            ("tier notin (web,api) , env", "tier notin (api,web),env"),
            ("! legacy", "!legacy"),
            ("example.com/team=a_b.c-d", "example.com/team=a_b.c-d"),
            // words of the grammar are keys and values like others
            ("in in (in,notin)", "in in (in,notin)"),
            ("notin", "notin"),
            ("name=eu-1,provider=aws,zone!=eu-west-1a", "name=eu-1,provider=aws,zone!=eu-west-1a"),
        ] {
            let selector = Selector::parse(text).unwrap();
            assert_eq!(selector.to_string(), canonical, "{text}");
            assert_eq!(Selector::parse(canonical).unwrap(), selector, "{text}");
        }
    }

    #[test]
    fn what_is_no_selector_is_quoted_with_the_reason() {
        for (text, part, why) in [
            ("", "", "a selector is one or more of KEY=VALUE"),
            (" \t", "", "a selector is one or more of KEY=VALUE"),
            (",", "``", "beside a comma"),
            ("env=prod,", "``", "beside a comma"),
            ("env=prod,,tier=web", "``", "beside a comma"),
            ("env=prod tier=web", "`env=prod tier=web`", "a value has"),
            ("env=a=b", "`env=a=b`", "a value has"),
            ("env===a", "`env===a`", "a value has"),
            ("env=!a", "`env=!a`", "a value has"),
            ("=prod", "`=prod`", "a key has"),
            ("!", "`!`", "a key has"),
            ("!!a", "`!!a`", "a key has"),
            ("!a=b", "`!a=b`", "a key has"),
            ("*", "`*`", "a key has"),
            ("all clusters", "`all clusters`", "a key has"),
            ("cpu>3", "`cpu>3`", "a key has"),
            ("Example.COM/a=b", "`Example.COM/a=b`", "a key has"),
            ("a/b/c=d", "`a/b/c=d`", "a key has"),
            ("tier in ()", "`tier in ()`", "a value is missing"),
            ("tier in (a,)", "`tier in (a,)`", "a value is missing"),
            ("tier in (a", "`tier in (a`", "a ) is missing"),
            ("tier in (a,b", "`tier in (a,b`", "a ) is missing"),
            ("tier in (a))", "`tier in (a))`", "a value has"),
            ("tier in (a) b", "`tier in (a) b`", "a ) is missing"),
            ("tier of (a)", "`tier of (a)`", "after KEY in or KEY notin"),
            ("in (a)", "`in (a)`", "after KEY in or KEY notin"),
            ("tier in a", "`tier in a`", "a key has"),
            ("tier)", "`tier)`", "a key has"),
            ("env=pro\u{202e}d", "`env=pro\\u{202e}d`", "a value has"),
            ("env=grün", "`env=grün`", "a value has"),
            (&format!("env={}", "x".repeat(64)), "`env=xxx", "a value has"),
            (&"a,".repeat(3000), "", "4096 bytes at most"),
        ] {
            let said = Selector::parse(text).unwrap_err();
            assert!(said.starts_with(part) && said.contains(why), "{text}: {said}");
        }
    }

    #[test]
    fn all_requirements_hold_and_an_absent_key_is_not_any_value() {
        let labels = |key: &str| {
            let labels = [("env", "prod"), ("tier", "web"), ("empty", ""), ("region", "eu-1")];
            labels.iter().find(|(k, _)| *k == key).map(|(_, value)| (*value).to_owned())
        };
        for (text, expected) in [
            ("env=prod", true),
            ("env=prod,tier=web,region=eu-1", true),
            ("env=prod,tier=api", false),
            ("env=Prod", false),
            ("env=", false),
            ("empty=", true),
            ("absent=", false),
            ("env!=prod", false),
            ("env!=test", true),
            ("absent!=prod", true),
            ("tier in (web,api)", true),
            ("tier in (api,db)", false),
            ("absent in (web,api)", false),
            ("tier notin (web,api)", false),
            ("tier notin (api,db)", true),
            ("absent notin (web)", true),
            ("empty", true),
            ("absent", false),
            ("!absent", true),
            ("!empty", false),
        ] {
            assert_eq!(Selector::parse(text).unwrap().matches(&labels), expected, "{text}");
        }
        let keys = Selector::parse("env=a,!b,c in (d)").unwrap();
        assert_eq!(keys.keys().collect::<Vec<_>>(), ["env", "b", "c"]);
    }

    #[test]
    fn a_label_is_one_of_kubernetes_and_no_fact() {
        for good in ["env=prod", "env=", "example.com/team=a", "A.b_c-9=Z.y_x-1"] {
            assert!(parse_label(good).is_ok(), "{good}");
        }
        for (bad, why) in [
            ("env", "it is KEY=VALUE"),
            ("", "it is KEY=VALUE"),
            ("=prod", "a key has"),
            ("env =prod", "a key has"),
            ("-env=prod", "a key has"),
            ("/env=prod", "a key has"),
            ("env=prod-", "a value has"),
            ("env=a b", "a value has"),
            ("env=a=b", "a value has"),
            ("env=a,b", "a value has"),
            ("env=\u{1b}[2J", "a value has"),
            ("name=x", "take another key"),
            ("id=x", "take another key"),
            ("provider=aws", "take another key"),
            ("region=eu", "take another key"),
            ("zone=a", "take another key"),
            ("pipeops.io/trusted=yes", "reserved"),
        ] {
            let said = parse_label(bad).unwrap_err();
            assert!(said.starts_with("label `") && said.contains(why), "{bad}: {said}");
        }
        let list = |labels: &[&str]| {
            parse_labels(&labels.iter().map(|label| (*label).to_owned()).collect::<Vec<_>>())
        };
        assert_eq!(list(&["a=b", "c="]).unwrap().len(), 2);
        assert!(list(&["a=b", "a=b"]).unwrap_err().contains("twice"));
        assert!(list(&["a=b", "name=c"]).unwrap_err().contains("another key"));
        let many: Vec<String> = (0..=MAX_LABELS).map(|n| format!("k{n}=v")).collect();
        assert!(parse_labels(&many).unwrap_err().contains("50 labels at most"));
    }
}
