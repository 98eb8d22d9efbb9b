//! Known failures that come from what the kubelet was told: labels, taints, its own settings and
//! state.

use super::Severity::{Fatal, Permanent};
use super::{KnownCause, SETTING, cause};

pub(super) const TABLE: &[(&[&str], KnownCause)] = &[
    // kubernetes cmd/kubelet/app/options/options.go, pkg/daemons/agent/agent.go
    (
        &["labels specified with --node-labels"],
        cause(
            "NODE_LABEL_INVALID",
            Permanent,
            "the kubelet may not give itself one of the labels",
            "take it out of --node-label and set it with `kubectl label node`",
        ),
    ),
    (
        &["invalid node labels"],
        cause(
            "NODE_LABEL_INVALID",
            Permanent,
            "one of the labels is not valid",
            "correct --node-label: NAME=VALUE",
        ),
    ),
    (
        &["failed to parse node taints"],
        cause(
            "NODE_TAINT_INVALID",
            Permanent,
            "one of the taints is not valid",
            "correct --node-taint: NAME=VALUE:EFFECT",
        ),
    ),
    (
        &["invalid taint"],
        cause(
            "NODE_TAINT_INVALID",
            Permanent,
            "one of the taints is not valid",
            "correct --node-taint: NAME=VALUE:EFFECT",
        ),
    ),
    // kubernetes cmd/kubelet/app/server.go, pkg/kubelet/cm/container_manager_linux.go
    (
        &["failed to load kubelet", "file, path"],
        cause(
            "KUBELET_CONFIG_INVALID",
            Permanent,
            "a file of kubelet settings cannot be read",
            "correct it, or take it away",
        ),
    ),
    (
        &["copy config", "into managed drop-in dir"],
        cause(
            "KUBELET_CONFIG_INVALID",
            Permanent,
            "a file of kubelet settings is not there",
            SETTING,
        ),
    ),
    (
        &["--kube-reserved value failed to parse"],
        cause(
            "KUBELET_CONFIG_INVALID",
            Permanent,
            "kube-reserved is not a list of amounts",
            SETTING,
        ),
    ),
    (
        &["--system-reserved value failed to parse"],
        cause(
            "KUBELET_CONFIG_INVALID",
            Permanent,
            "system-reserved is not a list of amounts",
            SETTING,
        ),
    ),
    (
        &["start cpu manager error"],
        cause(
            "KUBELET_STATE",
            Fatal,
            "the CPU manager's state does not fit its settings",
            "remove /var/lib/kubelet/cpu_manager_state",
        ),
    ),
    (
        &["start memory manager error"],
        cause(
            "KUBELET_STATE",
            Fatal,
            "the memory manager's state does not fit its settings",
            "remove /var/lib/kubelet/memory_manager_state",
        ),
    ),
    (
        &["running with swap on is not supported"],
        cause(
            "SWAP_ON",
            Permanent,
            "swap is on, and the kubelet is configured to refuse it",
            "turn it off (`swapoff -a`), or take fail-swap-on out of the settings",
        ),
    ),
    (
        &["cgroup v1", "unsupported"],
        cause(
            "CGROUP_V1_UNSUPPORTED",
            Permanent,
            "this Kubernetes does not start on cgroup v1",
            "boot with systemd.unified_cgroup_hierarchy=1, or use --channel v1.34",
        ),
    ),
    (
        &["kubelet is configured to not run on a host using cgroup v1"],
        cause(
            "CGROUP_V1_UNSUPPORTED",
            Permanent,
            "this Kubernetes does not start on cgroup v1",
            "boot with systemd.unified_cgroup_hierarchy=1, or use --channel v1.34",
        ),
    ),
    // what stands in front of several of the above comes last
    (
        &["failed to validate kubelet configuration"],
        cause("KUBELET_CONFIG_INVALID", Permanent, "the kubelet's settings are not valid", SETTING),
    ),
];
