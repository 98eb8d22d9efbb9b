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
