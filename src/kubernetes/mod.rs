//! The Kubernetes API as a client sees it: objects, watches, readiness, and requests that are
//! passed through.

pub mod answer;
pub mod client;
pub mod header_policy;
pub mod path;
pub mod readiness;
pub mod reverse_proxy;
mod transport;
pub mod upstream;
pub mod watch;
