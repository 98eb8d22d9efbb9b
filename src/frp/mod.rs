//! The FRP protocol, between agent and control plane and with genuine frps and
//! frpc of many versions.

pub mod admission;
pub mod client;
pub mod codec;
mod config;
pub mod dial;
pub mod mux;
pub mod server;
pub mod socket;
mod state_machine;
pub mod wire;

pub use config::{Proxy, ProxyKind, TunnelAuth, TunnelConfig, TunnelTls};
pub use state_machine::{
    LINK_TIMEOUT, PING_INTERVAL, TunnelAction, TunnelEvent, TunnelState, TunnelStateMachine,
    TunnelStatus,
};
