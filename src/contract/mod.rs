//! What agent, control plane and Runner say to each other.

pub mod application;
pub mod config;
pub mod job;
pub mod operation;
pub mod sealing;
pub mod selector;
pub mod tenant;
pub mod token;
pub mod types;
