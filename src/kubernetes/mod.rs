//! The Kubernetes API as a client sees it: objects, watches, readiness, and requests that are
//! passed through.

pub mod answer;
pub mod application;
pub mod client;
pub mod config_set;
pub mod header_policy;
pub mod path;
pub mod pod_references;
pub mod readiness;
pub mod reverse_proxy;
pub mod tenant;
mod transport;
pub mod upstream;
pub mod watch;
