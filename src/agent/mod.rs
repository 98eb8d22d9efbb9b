//! `pipeops run`: the agent of a cluster. It registers with a control plane, holds the tunnel, and
//! serves Runners through it.

pub mod api;
pub mod config;
pub mod credential;
pub(crate) mod local;
mod merge;
mod observer;
mod place;
pub mod run;
pub mod session;
pub mod status;
