//! The status of the agent: one structure for its socket, the tunnel's API, heartbeats, metrics and
//! `cluster-info`.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::agent::session::ControlPlaneState;
use crate::base::metrics::{Labels, MetricsText};
use crate::frp;
use crate::kubernetes::readiness::node;

/// A node of the cluster.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeStatus {
    pub name: String,
    pub ready: bool,
    pub role: String,
    pub version: String,
    pub address: String,
    /// Why it is not ready, or that it is cordoned.
    pub note: String,
}

impl NodeStatus {
    pub fn from_object(object: &Value) -> NodeStatus {
        let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
        let why = node::problem(object);
        let labels = &object["metadata"]["labels"];
        let server = ["node-role.kubernetes.io/control-plane", "node-role.kubernetes.io/master"]
            .iter()
            .any(|l| !labels[*l].is_null());
        let addresses = object["status"]["addresses"].as_array().cloned().unwrap_or_default();
        let address = addresses
            .iter()
            .find(|a| a["type"] == "InternalIP")
            .map(|a| text(&a["address"]))
            .unwrap_or_default();
        let ready = why.is_none();
        let mut note = why.unwrap_or_default();
        if object["spec"]["unschedulable"] == true {
            note = if note.is_empty() { "cordoned".into() } else { format!("cordoned; {note}") };
        }
        NodeStatus {
            name: text(&object["metadata"]["name"]),
            ready,
            role: if server { "server" } else { "worker" }.into(),
            version: text(&object["status"]["nodeInfo"]["kubeletVersion"]),
            address,
            note,
        }
    }
}

/// State of the connection to the Kubernetes API.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KubernetesState {
    /// No credential yet, or the API server does not answer.
    #[default]
    Waiting,
    Connected,
    /// The API server refuses the credential.
    Refused,
}

/// Something that a person should look at, with a code.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Notice {
    pub code: String,
    pub text: String,
}

/// Counts of objects in the cluster, kept up to date by watches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Workloads {
    pub pods: u32,
    pub pods_running: u32,
    pub deployments: u32,
    pub deployments_ready: u32,
    pub statefulsets: u32,
    pub daemonsets: u32,
    pub services: u32,
    pub ingresses: u32,
}

/// The status of the agent and of its cluster.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct AgentStatus {
    pub version: String,
    pub id: String,
    pub control: ControlPlaneState,
    /// Why the control plane is not connected, or what is unusual about it.
    pub control_reason: String,
    /// This clock minus the control plane's, seconds.
    pub clock_offset: i64,
    pub tunnel: frp::TunnelState,
    pub tunnel_reason: String,
    pub kubernetes: KubernetesState,
    /// Why the Kubernetes API is not connected.
    pub reason: String,
    pub api_version: String,
    pub nodes: Vec<NodeStatus>,
    pub namespaces: Vec<String>,
    pub workloads: Workloads,
    pub notices: Vec<Notice>,
    /// Seconds since 1970 of the last look at the cluster that succeeded; 0 for never.
    pub seen_at: i64,
    pub started_at: i64,
    /// This machine, bytes.
    pub memory_used: u64,
    pub memory_total: u64,
}

impl AgentStatus {
    /// Whether everything that a Runner needs is there.
    ///
    /// # Errors
    /// What is not, and why.
    pub fn ready(&self) -> Result<(), String> {
        let mut missing = Vec::new();
        if self.kubernetes != KubernetesState::Connected {
            missing.push(self.kubernetes_line());
        }
        if self.control != ControlPlaneState::Unenrolled {
            if !matches!(self.control, ControlPlaneState::Online | ControlPlaneState::Skewed) {
                missing.push(self.control_line());
            }
            if self.tunnel != frp::TunnelState::Up {
                missing.push(self.tunnel_line());
            }
        }
        if missing.is_empty() { Ok(()) } else { Err(missing.join("; ")) }
    }

    fn with_reason(what: String, reason: &str) -> String {
        if reason.is_empty() { what } else { format!("{what} ({reason})") }
    }

    fn control_line(&self) -> String {
        AgentStatus::with_reason(self.control.name().to_owned(), &self.control_reason)
    }

    fn tunnel_line(&self) -> String {
        AgentStatus::with_reason(
            format!("tunnel {}", tunnel_name(self.tunnel)),
            &self.tunnel_reason,
        )
    }

    fn kubernetes_line(&self) -> String {
        match self.kubernetes {
            KubernetesState::Connected => {
                format!(
                    "kubernetes {}: {} of {} nodes ready",
                    self.api_version,
                    self.nodes.iter().filter(|n| n.ready).count(),
                    self.nodes.len()
                )
            }
            KubernetesState::Waiting => format!("kubernetes: waiting ({})", self.reason),
            KubernetesState::Refused => format!("kubernetes: refused ({})", self.reason),
        }
    }

    /// Whether a person has to do something before it works: somebody refuses the agent, or a
    /// server cannot be trusted. Everything else heals when a server is back.
    pub fn needs_help(&self) -> bool {
        let refused = matches!(
            self.control,
            ControlPlaneState::Unauthorized
                | ControlPlaneState::Expired
                | ControlPlaneState::Conflict
        ) || matches!(
            self.tunnel,
            frp::TunnelState::Refused | frp::TunnelState::Unauthorized | frp::TunnelState::Conflict
        ) || self.kubernetes == KubernetesState::Refused;
        // the codes of `base/trust.rs`
        refused
            || [&self.control_reason, &self.tunnel_reason]
                .iter()
                .any(|reason| reason.starts_with("tls_"))
    }

    /// One line for `systemctl status`.
    pub fn summary(&self) -> String {
        let mut parts = vec![self.control_line()];
        if self.control != ControlPlaneState::Unenrolled {
            parts.push(self.tunnel_line());
        }
        parts.push(self.kubernetes_line());
        parts.join("; ")
    }

    /// Adds what is known of this agent to `metrics`.
    pub fn write_metrics(&self, metrics: &mut MetricsText) {
        let flag = u8::from;
        let control = matches!(self.control, ControlPlaneState::Online | ControlPlaneState::Skewed);
        let mut gauge = |name, labels: Labels, value: &dyn std::fmt::Display| {
            metrics.gauge(name, labels, value);
        };
        gauge("pipeops_agent_info", &[("version", &self.version), ("id", &self.id)], &1);
        gauge("pipeops_agent_start_time_seconds", &[], &self.started_at);
        gauge("pipeops_agent_ready", &[], &flag(self.ready().is_ok()));
        gauge("pipeops_control_plane_connected", &[], &flag(control));
        gauge("pipeops_control_plane_state", &[("state", self.control.name())], &1);
        gauge("pipeops_clock_offset_seconds", &[], &self.clock_offset);
        gauge("pipeops_tunnel_connected", &[], &flag(self.tunnel == frp::TunnelState::Up));
        gauge("pipeops_tunnel_state", &[("state", tunnel_name(self.tunnel))], &1);
        let connected = self.kubernetes == KubernetesState::Connected;
        gauge("pipeops_kubernetes_connected", &[], &flag(connected));
        gauge("pipeops_kubernetes_last_seen_seconds", &[], &self.seen_at);
        let ready = self.nodes.iter().filter(|n| n.ready).count();
        gauge("pipeops_nodes", &[("ready", "true")], &ready);
        gauge("pipeops_nodes", &[("ready", "false")], &(self.nodes.len() - ready));
        let w = &self.workloads;
        gauge("pipeops_pods", &[("running", "true")], &w.pods_running);
        gauge("pipeops_pods", &[("running", "false")], &w.pods.saturating_sub(w.pods_running));
        gauge("pipeops_deployments", &[("ready", "true")], &w.deployments_ready);
        let not_ready = w.deployments.saturating_sub(w.deployments_ready);
        gauge("pipeops_deployments", &[("ready", "false")], &not_ready);
        let mut codes: Vec<&str> = self.notices.iter().map(|n| n.code.as_str()).collect();
        codes.sort_unstable();
        // one sample for each code: two with the same labels are invalid
        for equal in codes.chunk_by(PartialEq::eq) {
            gauge("pipeops_notices", &[("code", equal[0])], &equal.len());
        }
        gauge("pipeops_machine_memory_bytes", &[("kind", "used")], &self.memory_used);
        gauge("pipeops_machine_memory_bytes", &[("kind", "total")], &self.memory_total);
    }
}

/// The name of a tunnel state in texts.
pub fn tunnel_name(state: frp::TunnelState) -> &'static str {
    match state {
        frp::TunnelState::Off => "off",
        frp::TunnelState::Connecting => "connecting",
        frp::TunnelState::Opening => "opening",
        frp::TunnelState::Up => "up",
        frp::TunnelState::Waiting => "waiting",
        frp::TunnelState::Refused => "refused",
        frp::TunnelState::Unauthorized => "unauthorized",
        frp::TunnelState::Conflict => "conflict",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_person_has_to_do_is_told_from_what_heals_by_itself() {
        let waits = AgentStatus {
            control: ControlPlaneState::Connecting,
            control_reason: "connection refused".into(),
            tunnel: frp::TunnelState::Waiting,
            kubernetes: KubernetesState::Waiting,
            ..AgentStatus::default()
        };
        assert!(!waits.needs_help() && !AgentStatus::default().needs_help());
        for helpless in [
            AgentStatus { control: ControlPlaneState::Unauthorized, ..waits.clone() },
            AgentStatus { control_reason: "tls_untrusted: unknown CA".into(), ..waits.clone() },
            AgentStatus { tunnel_reason: "tls_pin: not pinned".into(), ..waits.clone() },
            AgentStatus { tunnel: frp::TunnelState::Refused, ..waits.clone() },
            AgentStatus { kubernetes: KubernetesState::Refused, ..waits },
        ] {
            assert!(helpless.needs_help(), "{helpless:?}");
        }
    }
}
