//! Where pipeops keeps its files, and the user that its agent runs as.

/// Our own state: journal, backups, the lock.
pub const STATE: &str = "/var/lib/pipeops";
/// Logs and reports; the one thing that uninstall leaves.
pub const LOGS: &str = "/var/log/pipeops";
pub const PIPEOPS: &str = "/usr/local/bin/pipeops";
pub const DROP_IN: &str = "/etc/rancher/k3s/config.yaml.d/50-pipeops.yaml";
pub const JOIN_TOKEN: &str = "/etc/rancher/k3s/pipeops-token";
pub const FIREWALL: &str = "/etc/pipeops/api-allow.nft";
pub const FIREWALL_TABLE: &str = "pipeops";
pub const AGENT_TOKEN: &str = "/etc/pipeops/agent-token";
pub const AGENT_CONFIG: &str = "/etc/pipeops/agent.toml";
pub const AGENT_USER: &str = "pipeops-agent";
pub const CREDENTIAL: &str = "/run/pipeops-credential/kubeconfig";
pub const AGENT_SOCKET: &str = "/run/pipeops/agent.sock";
