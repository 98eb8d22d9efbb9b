//! The two roles of a node.

use serde::{Deserialize, Serialize};

/// What a node becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NodeRole {
    Server,
    Worker,
}

impl NodeRole {
    /// The systemd unit of k3s in this role.
    pub fn unit(self) -> &'static str {
        match self {
            NodeRole::Server => "k3s.service",
            NodeRole::Worker => "k3s-agent.service",
        }
    }
}
