//! Where k3s keeps its files.

pub const BINARY: &str = "/usr/local/bin/k3s";
pub const REGISTRIES: &str = "/etc/rancher/k3s/registries.yaml";
pub const ADMIN_KUBECONFIG: &str = "/etc/rancher/k3s/k3s.yaml";
pub const KUBELET_KUBECONFIG: &str = "/var/lib/rancher/k3s/agent/kubelet.kubeconfig";
pub const NODE_PASSWORD: &str = "/etc/rancher/node/password";
pub const DATA_DIR: &str = "/var/lib/rancher/k3s";
/// Local-path volumes: the users' data.
pub const VOLUMES: &str = "/var/lib/rancher/k3s/storage";
/// The token with which servers and workers join; k3s itself needs it at each start.
pub const SERVER_TOKEN: &str = "/var/lib/rancher/k3s/server/token";
pub const IMAGES_DIR: &str = "/var/lib/rancher/k3s/agent/images";
