//! pipeops: turns bare VMs into managed k3s clusters. The map of the rooms; `tests/it/architecture.rs` holds the edges.

// pure: no files, no sockets, no clock
pub mod backoff;
pub mod checks;
pub mod cidr;
pub mod components;
pub mod config_file;
pub mod encoding;
pub mod error;
pub mod facts;
pub mod finding;
pub mod http;
pub mod k3s;
pub mod resolve;
pub mod secret;
pub mod settings;
pub mod text;
pub mod trust;

// doors: the only places with side effects
pub mod cluster;
pub mod control;
pub mod host;
pub mod output;
pub mod status;
pub mod supervisor;
pub mod tunnel;

// engines
pub mod agent;
pub mod api;
pub mod credential;
pub mod hub;
pub mod plan;

// front
pub mod cli;
pub mod cmd;
