//! What knows nothing of Kubernetes, k3s or PipeOps: failures, secrets, trust in certificates,
//! names, addresses, URLs of databases and brokers, text, metrics.

pub mod backoff;
pub mod cidr;
pub mod config_file;
pub mod connection;
pub mod dsn;
pub mod encoding;
pub mod error;
pub mod http;
pub mod json;
pub mod metrics;
pub mod order;
pub mod packed_text;
pub mod resolve;
pub mod secret;
pub mod task;
pub mod text;
pub mod trust;
pub mod yaml;
