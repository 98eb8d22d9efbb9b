//! Known failures that come from the kernel, or from the container that k3s runs in.

use super::Severity::{Fatal, Permanent};
use super::{KnownCause, MODULES, SETTING, cause};

const CMDLINE: &str =
    "append `cgroup_memory=1 cgroup_enable=memory` to the kernel command line and reboot";

pub(super) const TABLE: &[(&[&str], KnownCause)] = &[
    // pkg/cgroups/cgroups_linux.go, pkg/daemons/agent/agent_linux.go
    (
        &["failed to find memory cgroup"],
        cause("CGROUP_MEMORY_OFF", Permanent, "the memory cgroup controller is off", CMDLINE),
    ),
    (
        &["failed to find cpu", "cgroup (v2)"],
        cause(
            "CGROUP_CONTROLLERS",
            Permanent,
            "a cgroup controller is off",
            "let the host delegate cpu, cpuset and memory; in a container, update its host",
        ),
    ),
    (
        &["pids cgroup controller not found"],
        cause(
            "CGROUP_CONTROLLERS",
            Permanent,
            "the pids cgroup controller is off",
            "boot a kernel that has it",
        ),
    ),
    (
        &["Following Cgroup subsystem not mounted"],
        cause(
            "CGROUP_CONTROLLERS",
            Permanent,
            "a cgroup subsystem is not mounted",
            "boot with systemd.unified_cgroup_hierarchy=1",
        ),
    ),
    (
        &["failed to evacuate root cgroup"],
        cause(
            "LXC_FEATURES",
            Fatal,
            "the cgroups of this container cannot be arranged",
            "turn nesting on for it",
        ),
    ),
    // pkg/agent/config/config_linux.go, containerd plugins/snapshots/overlay/overlayutils
    (
        &["snapshotter cannot be enabled", "operation not permitted"],
        cause(
            "LXC_FEATURES",
            Permanent,
            "the host does not allow overlay mounts in this container",
            "turn nesting on for it",
        ),
    ),
    (
        &["snapshotter cannot be enabled", "no such device"],
        cause("KMOD_MISSING", Permanent, "the kernel has no overlayfs", MODULES),
    ),
    (
        &["snapshotter cannot be enabled", "d_type"],
        cause(
            "SNAPSHOTTER_REFUSED",
            Permanent,
            "the file system below /var/lib/rancher was made without d_type",
            "make it again with `mkfs.xfs -n ftype=1`, or use ext4",
        ),
    ),
    (
        &["snapshotter cannot be enabled"],
        cause(
            "SNAPSHOTTER_REFUSED",
            Permanent,
            "the file system below /var/lib/rancher does not carry the snapshotter",
            "put /var/lib/rancher on ext4 or xfs, or set snapshotter = \"native\" in the [k3s] \
             table",
        ),
    ),
    (
        &["failed to create overlay", "operation not permitted"],
        cause(
            "LXC_FEATURES",
            Permanent,
            "the host does not allow overlay mounts in this container",
            "turn nesting on for it",
        ),
    ),
    (
        &["default runtime", "was not found"],
        cause(
            "K3S_SETTING_INVALID",
            Permanent,
            "default-runtime names one that is not installed",
            SETTING,
        ),
    ),
    (
        &["/dev/kmsg", "no such file"],
        cause(
            "LXC_FEATURES",
            Permanent,
            "/dev/kmsg is missing in this container",
            "let the host bind /dev/kmsg into it",
        ),
    ),
    (
        &["/dev/kmsg", "operation not permitted"],
        cause(
            "LXC_FEATURES",
            Permanent,
            "/dev/kmsg is closed in this container",
            "let the host give it to the container",
        ),
    ),
    (
        &["nf_conntrack_max", "permission denied"],
        cause(
            "LXC_FEATURES",
            Fatal,
            "kube-proxy may not set conntrack limits in this container",
            "set kube-proxy-arg = [\"conntrack-max-per-core=0\"] in the [k3s] table",
        ),
    ),
    // kubernetes cmd/kube-proxy/app/server_linux.go, pkg/agent/netpol/netpol.go, flannel
    // pkg/trafficmngr
    (
        &["iptables is not available on this host"],
        cause(
            "IPTABLES_BAD",
            Fatal,
            "iptables does not work here",
            "set prefer-bundled-bin = true in the [k3s] table, or install iptables",
        ),
    ),
    (
        &["failed to create iptables handler"],
        cause(
            "IPTABLES_BAD",
            Fatal,
            "iptables does not work here",
            "set prefer-bundled-bin = true in the [k3s] table, or install iptables",
        ),
    ),
    (
        &["failed to initialize flannel ipTables manager"],
        cause(
            "IPTABLES_BAD",
            Fatal,
            "iptables does not work here",
            "set prefer-bundled-bin = true in the [k3s] table, or install iptables",
        ),
    ),
    (
        &["failed to create ipset handler"],
        cause("KMOD_MISSING", Fatal, "the kernel has no ip_set", MODULES),
    ),
];
