//! The real executable against sandboxes, fake servers and its own documentation.
#![allow(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::too_many_lines,
    reason = "tests stand outside of the doors, and one may be a long story"
)]

mod agent;
mod architecture;
mod bad_deploys;
mod broker;
mod browser;
mod cli;
mod client;
mod compat;
mod config_sets;
mod control_plane;
mod exec;
mod fake_control_plane;
mod fields;
mod frps;
mod gateway;
mod generations;
mod genuine;
mod hostile;
mod hosts;
mod install;
mod interrupts;
mod intruders;
mod job_runner;
mod jobs;
mod jobs_over_rabbitmq;
mod join;
mod kubernetes;
mod labels;
mod machines;
mod nodes;
mod operations;
mod page;
mod release;
mod resumed;
mod rollouts;
mod routes;
mod runner;
mod scripts;
mod secrets;
mod starts;
mod support;
mod teardown;
mod tenant_tokens;
mod tenants;
mod traefik;
mod tunnel;
mod typed;
mod world;
