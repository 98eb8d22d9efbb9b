//! What the node knows about itself: one structure for the agent's socket, `cluster-info` and metrics.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::cluster::condition;

/// A node of the cluster as people ask about it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    pub name: String,
    pub ready: bool,
    pub role: String,
    pub version: String,
    pub address: String,
    /// Why it is not ready, or that it is cordoned.
    pub note: String,
}

impl Node {
    pub fn of(object: &Value) -> Node {
        let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
        let (state, message) = condition(object, "Ready").unwrap_or_default();
        let labels = &object["metadata"]["labels"];
        let server = ["node-role.kubernetes.io/control-plane", "node-role.kubernetes.io/master"].iter().any(|l| !labels[*l].is_null());
        let addresses = object["status"]["addresses"].as_array().cloned().unwrap_or_default();
        let address = addresses.iter().find(|a| a["type"] == "InternalIP").map(|a| text(&a["address"])).unwrap_or_default();
        let mut note = if state == "True" { String::new() } else { message };
        if object["spec"]["unschedulable"] == true {
            note = if note.is_empty() { "cordoned".into() } else { format!("cordoned; {note}") };
        }
        Node {
            name: text(&object["metadata"]["name"]),
            ready: state == "True",
            role: if server { "server" } else { "worker" }.into(),
            version: text(&object["status"]["nodeInfo"]["kubeletVersion"]),
            address,
            note,
        }
    }
}

/// State of the connection to the control plane. `run` without a token stays `unenrolled`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Enrolment {
    #[default]
    Unenrolled,
    /// A token is there. This build has no control-plane client yet, and says so instead of pretending.
    Waiting,
}

/// State of the agent's Kubernetes side.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kubernetes {
    /// No credential yet, or the API server is away.
    #[default]
    Waiting,
    Connected,
    /// The API server refuses the credential.
    Refused,
}

/// The agent's own account, served on its socket.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Agent {
    pub version: String,
    pub enrolment: Enrolment,
    pub kubernetes: Kubernetes,
    /// Why the Kubernetes side is not connected.
    pub reason: String,
    pub api_version: String,
    pub nodes: Vec<Node>,
    /// Seconds since 1970 of the last look at the cluster that succeeded; 0 for never.
    pub seen_at: i64,
    pub started_at: i64,
    /// This machine, bytes.
    pub memory_used: u64,
    pub memory_total: u64,
}

impl Agent {
    /// One line for `systemctl status`.
    pub fn line(&self) -> String {
        let enrolment = match self.enrolment {
            Enrolment::Unenrolled => "unenrolled: no AGENT_TOKEN",
            Enrolment::Waiting => "not registered",
        };
        let kubernetes = match self.kubernetes {
            Kubernetes::Connected => {
                format!("kubernetes {}: {} of {} nodes ready", self.api_version, self.nodes.iter().filter(|n| n.ready).count(), self.nodes.len())
            }
            Kubernetes::Waiting => format!("kubernetes: waiting ({})", self.reason),
            Kubernetes::Refused => format!("kubernetes: refused ({})", self.reason),
        };
        format!("{enrolment}; {kubernetes}")
    }

    /// Prometheus text format.
    pub fn metrics(&self) -> String {
        let connected = u8::from(self.kubernetes == Kubernetes::Connected);
        format!(
            "# TYPE pipeops_agent_info gauge\npipeops_agent_info{{version=\"{}\"}} 1\n\
             # TYPE pipeops_agent_start_time_seconds gauge\npipeops_agent_start_time_seconds {}\n\
             # TYPE pipeops_kubernetes_connected gauge\npipeops_kubernetes_connected {connected}\n\
             # TYPE pipeops_kubernetes_last_seen_seconds gauge\npipeops_kubernetes_last_seen_seconds {}\n\
             # TYPE pipeops_nodes gauge\npipeops_nodes{{ready=\"true\"}} {}\npipeops_nodes{{ready=\"false\"}} {}\n\
             # TYPE pipeops_machine_memory_bytes gauge\npipeops_machine_memory_bytes{{kind=\"used\"}} {}\npipeops_machine_memory_bytes{{kind=\"total\"}} {}\n",
            self.version,
            self.started_at,
            self.seen_at,
            self.nodes.iter().filter(|n| n.ready).count(),
            self.nodes.iter().filter(|n| !n.ready).count(),
            self.memory_used,
            self.memory_total,
        )
    }
}
