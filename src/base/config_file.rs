//! Config files: TOML, or YAML where the file's name ends so. The keys are the same, and every
//! fault is named with its line.

use serde::de::DeserializeOwned;
use serde_json::{Map, Number, Value};
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use crate::base::error::{Failure, nearest};
use crate::base::yaml::{self, EqualKeys};

/// What is wrong with a file, where, and never with what stands there: it may be a secret.
pub struct Fault {
    pub what: String,
    /// From 1.
    pub line: usize,
    pub why: String,
}

impl Fault {
    fn failure(self, origin: &str) -> Failure {
        Failure::usage("CONFIG_INVALID", format!("{}, line {}", self.what, self.line))
            .why(self.why)
            .hint(format!("correct {origin} and run again"))
    }
}

fn is_yaml(origin: &str) -> bool {
    let end = origin.rsplit('.').next().unwrap_or_default();
    origin.contains('.') && (end.eq_ignore_ascii_case("yaml") || end.eq_ignore_ascii_case("yml"))
}

/// The line that a top-level key stands in.
pub fn line_of(text: &str, key: &str) -> usize {
    text.lines()
        .position(|l| l.trim_start().trim_start_matches(['[', '"', '\'']).starts_with(key))
        .map_or(1, |n| n + 1)
}

/// A file's keys and values.
///
/// # Errors
/// What is no TOML, or no YAML that TOML could say too.
pub fn table(text: &str, origin: &str) -> Result<Map<String, Value>, Fault> {
    if !is_yaml(origin) {
        return DeTable::parse(text).map(|table| plain(table.get_ref())).map_err(|e| Fault {
            what: format!("{origin} is not valid TOML"),
            // the parser's own text shows the line, and with it a password
            line: e
                .span()
                .map_or(1, |span| text[..span.start.min(text.len())].lines().count().max(1)),
            why: unquoted(e.message()),
        });
    }
    let fault =
        |line: usize, why: String| Fault { what: format!("{origin} is not valid YAML"), line, why };
    let parsed = yaml::parse(text, EqualKeys::Refused).map_err(|e| {
        let line = e.line.and_then(|line| usize::try_from(line).ok()).unwrap_or(1).max(1);
        fault(
            line,
            "a quote, an indent or a colon is not where YAML needs it, or a key is there twice"
                .into(),
        )
    })?;
    let map = match parsed {
        Value::Object(map) => map,
        Value::Null => return Ok(Map::new()),
        _ => {
            return Err(fault(
                1,
                "it is no mapping of keys to values, as in `cluster-name: prod`".into(),
            ));
        }
    };
    let mut table = map;
    // a key without a value says nothing
    table.retain(|_, value| !value.is_null());
    match table.iter().find(|(_, value)| holds_null(value)) {
        Some((key, _)) => Err(fault(line_of(text, key), format!("`{key}` holds a null"))),
        None => Ok(table),
    }
}

fn holds_null(value: &Value) -> bool {
    match value {
        Value::Object(map) => map.values().any(holds_null),
        Value::Array(list) => list.iter().any(holds_null),
        other => other.is_null(),
    }
}

/// What TOML says. Types are read from that: its own reader is compiled for each type.
pub fn plain(table: &DeTable<'_>) -> Map<String, Value> {
    let value = |value: &Spanned<DeValue<'_>>| plain_value(value.get_ref());
    table.iter().map(|(key, field)| (key.get_ref().to_string(), value(field))).collect()
}

fn plain_value(value: &DeValue<'_>) -> Value {
    match value {
        DeValue::String(text) => text.to_string().into(),
        DeValue::Integer(number) => match i64::from_str_radix(number.as_str(), number.radix()) {
            Ok(number) => number.into(),
            // no setting has a number that long: it is of the wrong type
            Err(_) => number.to_string().into(),
        },
        DeValue::Float(number) => {
            let finite = number.as_str().parse().ok().and_then(Number::from_f64);
            finite.map_or_else(|| number.to_string().into(), Value::Number)
        }
        DeValue::Boolean(is) => (*is).into(),
        DeValue::Datetime(time) => time.to_string().into(),
        DeValue::Array(list) => list.iter().map(|item| plain_value(item.get_ref())).collect(),
        DeValue::Table(table) => plain(table).into(),
    }
}

/// The values of a file's keys.
///
/// # Errors
/// The first key whose value has the wrong type, or that is not known.
pub fn values<T: DeserializeOwned>(
    table: &Map<String, Value>,
    text: &str,
    origin: &str,
) -> Result<T, Fault> {
    let read = |table| serde_json::from_value::<T>(Value::Object(table));
    read(table.clone()).map_err(|error| {
        // the one that fails alone is the one
        let alone = table.iter().find_map(|(key, value)| {
            let one = Map::from_iter([(key.clone(), value.clone())]);
            read(one).err().map(|e| (key, e))
        });
        let (key, error) = alone.map_or(("", error), |(key, e)| (key.as_str(), e));
        let why = unquoted(&error.to_string());
        let why = if key.is_empty() || why.contains(key) { why } else { format!("`{key}`: {why}") };
        Fault {
            what: format!("a value in {origin} has the wrong type"),
            line: line_of(text, key),
            why,
        }
    })
}

/// A config file whose keys are `known` flags of `command` or one of the tables `more`. Unknown
/// keys and wrong types are named with the nearest key and the line.
pub fn parse_checked<T: DeserializeOwned>(
    text: &str,
    origin: &str,
    known: &[String],
    more: &[&str],
    command: &str,
) -> Result<T, Failure> {
    let table = table(text, origin).map_err(|fault| fault.failure(origin))?;
    for key in table.keys() {
        if known.iter().any(|k| k == key) || more.contains(&key.as_str()) {
            continue;
        }
        let what = format!("unknown key `{key}` in {origin}, line {}", line_of(text, key));
        // what holds a secret has no key, only a file that has it
        let file = format!("{key}-file");
        let file = known.iter().find(|k| **k == file).map(String::as_str);
        let near = file
            .or_else(|| nearest(key, known.iter().map(String::as_str).chain(more.iter().copied())));
        return Err(Failure::usage("CONFIG_UNKNOWN_KEY", what).hint(match near {
            Some(near) => format!("did you mean `{near}`? correct {origin} and run again"),
            None => {
                format!("the keys are those of `{command} --help`; correct {origin} and run again")
            }
        }));
    }
    values(&table, text, origin).map_err(|fault| fault.failure(origin))
}

/// A parser's message without the text that it quotes, which may be a secret.
pub fn unquoted(message: &str) -> String {
    // the one quote that is meant
    let message = &message.replace("`\"`", "a double quote");
    let (before, rest) = message.split_once('"').unwrap_or((message, ""));
    let mut out = before.trim_end().to_owned();
    let (mut quoted, mut rest) = (true, rest.chars());
    while let Some(c) = rest.next() {
        match c {
            '"' => quoted = !quoted,
            // a quote that belongs to the text is escaped
            '\\' if quoted => drop(rest.next()),
            _ if !quoted => out.push(c),
            _ => {}
        }
    }
    out
}

pub fn long_flags<T: clap::Args>() -> Vec<String> {
    let command = T::augment_args(clap::Command::new("keys"));
    command.get_arguments().filter_map(|a| a.get_long().map(str::to_owned)).collect()
}

#[cfg(test)]
mod tests {
    use crate::install::settings::parse_file;

    #[test]
    fn nothing_quoted_is_left_however_it_is_written() {
        for (said, expected) in [
            (
                r#"invalid type: string "secret", expected a list"#,
                "invalid type: string, expected a list",
            ),
            (
                r#"invalid type: string "a\"secret\\", expected x"#,
                "invalid type: string, expected x",
            ),
            (r#"two "secret" and "secret" more"#, "two and  more"),
            (r#"cut off "secret"#, "cut off"),
            ("nothing quoted ", "nothing quoted"),
            (
                "invalid basic string \"secret\", expected `\"`",
                "invalid basic string, expected a double quote",
            ),
        ] {
            assert_eq!(super::unquoted(said), expected);
        }
    }

    #[test]
    fn every_kind_of_value_is_read() {
        let text = "a = 0x1F\nb = -1_000\nc = 1.5\nd = true\ne = 2024-01-01\nf = nan\n\
                    g = [\"x\", {h = 'y'}]\n[i.j]\nk = 99999999999999999999\n";
        let Ok(table) = super::table(text, "f.toml") else { panic!("refused") };
        let expected = serde_json::json!({
            "a": 31, "b": -1000, "c": 1.5, "d": true, "e": "2024-01-01", "f": "nan",
            "g": ["x", {"h": "y"}], "i": {"j": {"k": "99999999999999999999"}}
        });
        assert_eq!(serde_json::Value::from(table), expected);
    }

    #[test]
    fn yaml_says_what_toml_says() {
        let text = "tls-san = [\"a\", \"b\"]\nnode-name = \"vm1\"\n\
                    [k3s]\nkubelet-arg = [\"max-pods=200\"]\n";
        let toml = parse_file(text, "c.toml").unwrap();
        for (name, text) in [
            (
                "c.yaml",
                "# mine\ntls-san: [a, b]\nnode-name: vm1\n\
                 k3s:\n  kubelet-arg:\n    - max-pods=200\n",
            ),
            (
                "c.yml",
                "---\ntls-san:\n- a\n- b\nnode-name: \"vm1\"\ncluster-name:\n\
                 k3s: {kubelet-arg: [\"max-pods=200\"]}\n",
            ),
            (
                "/a.b/C.YAML",
                "{\"tls-san\": [\"a\", \"b\"], \"node-name\": \"vm1\", \
                 \"k3s\": {\"kubelet-arg\": [\"max-pods=200\"]}}",
            ),
        ] {
            assert_eq!(parse_file(text, name).unwrap(), toml, "{name}");
        }
        assert_eq!(parse_file("# nothing\n", "c.yaml").unwrap(), parse_file("", "c.toml").unwrap());
    }

    #[test]
    fn what_is_wrong_in_yaml_is_named_with_its_line_and_without_its_text() {
        for (text, code, word) in [
            ("node-name: vm1\ntls-sn: [a]\n", "CONFIG_UNKNOWN_KEY", "did you mean `tls-san`?"),
            ("node-name: vm1\ntls-sn: [a]\n", "CONFIG_UNKNOWN_KEY", "line 2"),
            ("a: b\n  c: planted-canary-4711-in-plain-text\n", "CONFIG_INVALID", "not valid YAML"),
            (
                "node-name: [\"planted-canary-4711-in-plain-text\n",
                "CONFIG_INVALID",
                "not valid YAML",
            ),
            (
                "node-name: a\nnode-name: planted-canary-4711-in-plain-text\n",
                "CONFIG_INVALID",
                "line 2",
            ),
            (
                "# one\nnode-name: vm1\ntls-san: planted-canary-4711-in-plain-text\n",
                "CONFIG_INVALID",
                "line 3",
            ),
            ("cluster-name: 5\n", "CONFIG_INVALID", "`cluster-name`"),
            ("- node-name\n", "CONFIG_INVALID", "no mapping"),
            ("planted-canary-4711-in-plain-text", "CONFIG_INVALID", "no mapping"),
            ("node-name = \"vm1\"\n", "CONFIG_INVALID", "no mapping"),
        ] {
            let failure = parse_file(text, "/tmp/c.yaml").unwrap_err();
            let said = failure.render();
            assert!(
                failure.code == code
                    && said.contains(word)
                    && said.contains("/tmp/c.yaml")
                    && !said.contains("canary-4711-in-plain-text"),
                "{text}: {said}"
            );
        }
    }
}
