//! Long texts that the program carries in Snappy's raw format. `build.rs` packs them.

/// The text that `build.rs` packed.
///
/// # Panics
/// Where `packed` is something else.
pub fn unpacked(packed: &[u8]) -> String {
    let text = snap::raw::Decoder::new().decompress_vec(packed).expect("build.rs packed it");
    String::from_utf8(text).expect("build.rs packs texts")
}
