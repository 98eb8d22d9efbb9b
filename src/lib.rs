//! pipeops: turns bare VMs into managed k3s clusters.
#![doc = ""]
#![doc = include_str!("README.md")]

pub mod agent;
pub mod base;
pub mod broker;
pub mod cli;
pub mod client;
pub mod cmd;
pub mod contract;
pub mod control_plane;
pub mod frp;
pub mod host;
pub mod install;
pub mod k3s;
pub mod kubernetes;
pub mod output;
pub mod runner;
