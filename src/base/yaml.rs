//! YAML to values. Types are read from those: the parser is compiled for each type that it gives.

use std::fmt;

use serde_json::Value;

/// Why a text is no YAML. What stands there is left out: it may be a secret.
#[derive(Debug)]
pub struct YamlError {
    /// From 1, where it is known.
    pub line: Option<u64>,
}

impl fmt::Display for YamlError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("it is not valid YAML")?;
        self.line.map_or(Ok(()), |line| write!(f, ", line {line}"))
    }
}

impl std::error::Error for YamlError {}

/// Which of two equal keys counts.
#[derive(Clone, Copy, PartialEq)]
pub enum EqualKeys {
    Refused,
    LastWins,
}

/// What one document says.
///
/// # Errors
/// Text that is no YAML, or has equal keys where they are refused.
pub fn parse(text: &str, keys: EqualKeys) -> Result<Value, YamlError> {
    use serde_saphyr::options::DuplicateKeyPolicy;
    let duplicate_keys = match keys {
        EqualKeys::Refused => DuplicateKeyPolicy::Error,
        EqualKeys::LastWins => DuplicateKeyPolicy::LastWins,
    };
    let options = serde_saphyr::options! { duplicate_keys: duplicate_keys, with_snippet: false };
    serde_saphyr::from_str_with_options(text, options)
        .map_err(|error| YamlError { line: error.location().map(|place| place.line()) })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_line_is_said_and_nothing_of_it() {
        for (text, said) in [
            ("a: 1\na: planted\n", "it is not valid YAML, line 2"),
            ("a: b\n c: planted\n", "it is not valid YAML, line 2"),
        ] {
            assert_eq!(parse(text, EqualKeys::Refused).unwrap_err().to_string(), said);
        }
        let last = parse("a: 1\na: [x, 2, ~, true]\n", EqualKeys::LastWins);
        assert_eq!(last.unwrap(), json!({"a": ["x", 2, null, true]}));
        assert_eq!(parse("# nothing\n", EqualKeys::Refused).unwrap(), json!(null));
    }
}
