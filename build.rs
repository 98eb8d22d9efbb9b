//! Packs the long texts that the program carries; `base/packed_text.rs` unpacks them.

#![allow(clippy::disallowed_methods, reason = "a build script has no host/ to go through")]
use std::{env, fs, path::Path};

/// Path in the project, and name in `OUT_DIR`.
const TEXTS: [(&str, &str); 2] =
    [("src/cmd/explain.md", "explain.md"), ("deployments/openapi.json", "openapi.json")];

fn main() {
    let out = env::var_os("OUT_DIR").expect("cargo gives a build script its directory");
    println!("cargo::rerun-if-changed=build.rs");
    for (path, name) in TEXTS {
        println!("cargo::rerun-if-changed={path}");
        let text = fs::read(path).unwrap_or_else(|error| panic!("{path}: {error}"));
        let packed = snap::raw::Encoder::new().compress_vec(&text).expect("shorter than 4 GiB");
        let to = Path::new(&out).join(format!("{name}.snappy"));
        fs::write(&to, packed).unwrap_or_else(|error| panic!("{}: {error}", to.display()));
    }
}
