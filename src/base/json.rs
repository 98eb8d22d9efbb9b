//! JSON to types. Types are read from a value: a type is compiled for each form that it is read from.

use serde::de::DeserializeOwned;
use serde_json::Value;

/// What a text of JSON says.
///
/// # Errors
/// Text that is no JSON, with its line; a value that does not fit the type.
pub fn read<T: DeserializeOwned>(text: impl AsRef<[u8]>) -> serde_json::Result<T> {
    serde_json::from_value(value(text.as_ref())?)
}

/// What a value says; the error names the field.
///
/// # Errors
/// A value that does not fit the type.
pub fn fields<T: DeserializeOwned>(
    value: Value,
) -> Result<T, serde_path_to_error::Error<serde_json::Error>> {
    serde_path_to_error::deserialize(value)
}

/// # Errors
/// Text that is no JSON, with its line.
pub fn value(text: &[u8]) -> serde_json::Result<Value> {
    serde_json::from_slice(text)
}

/// A document that is made of types stands in `deployments/` as it is made today; `PIPEOPS_UPDATE`
/// writes it.
#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "a test keeps a committed file fresh")]
pub(crate) fn assert_committed(name: &str, document: &Value, test: &str) {
    let path = format!("{}/deployments/{name}", env!("CARGO_MANIFEST_DIR"));
    let fresh = serde_json::to_string_pretty(document).unwrap() + "\n";
    if std::env::var("PIPEOPS_UPDATE").is_ok() {
        std::fs::write(&path, &fresh).unwrap();
    }
    let committed = std::fs::read_to_string(path).unwrap_or_default();
    assert!(
        committed == fresh,
        "deployments/{name} is stale: PIPEOPS_UPDATE=1 cargo test --lib {test}"
    );
}
