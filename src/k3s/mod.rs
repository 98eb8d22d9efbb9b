//! What is known of k3s, and of k3s alone: versions, tokens, settings and their values, paths, what
//! its log says.

pub mod keys;
pub mod logs;
pub mod paths;
pub mod registries;
pub mod role;
pub mod token;
pub mod user_input;
pub mod values;
pub mod version;
