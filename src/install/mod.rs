//! From a bare machine to a node of k3s and back: settings and facts, checks, a plan as data, and
//! the engine that carries it out.

pub mod checks;
pub mod components;
pub mod effective_settings;
pub mod engine;
pub mod facts;
pub mod finding;
pub mod gather;
pub mod join;
pub mod network;
pub mod plan;
pub mod planner;
pub mod release;
pub mod settings;
