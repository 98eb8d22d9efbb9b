//! The command line of people and CI, seen from a control plane: where it is logged in, what it
//! asks for, and how it follows what it asked for.

pub mod address;
pub mod api;
pub mod application_file;
pub mod applications;
pub mod clusters;
pub mod contexts;
mod events;
pub mod exec;
pub mod logs;
pub mod operations;
pub mod rollouts;
pub mod tenants;
