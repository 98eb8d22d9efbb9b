//! Known failures that come from what was set: what k3s and the parts that it carries print, what it means, and what to do.
//!
//! Messages are quoted from k3s 1.33 to 1.36 (the file of k3s-io/k3s, kubernetes, kine, flannel, etcd or containerd stands beside
//! each group), without what differs from run to run and without quotes, which logrus escapes.

use super::Cause;
use super::Weight::{Certain, Fatal};
use super::cause;

const TOKEN: &str = "get a fresh line with `pipeops cluster-info --join` on the server";
const SERVER_TOKEN: &str = "put the cluster's token back into /var/lib/rancher/k3s/server/token, or correct `token` in the [k3s] table";
const SETTING: &str =
    "correct it in the [k3s] table, or in /etc/rancher/k3s/config.yaml.d where it came from there";
const UNKNOWN: &str = "remove it from the [k3s] table or from /etc/rancher/k3s/config.yaml.d";
const MODULES: &str = "install your distribution's extra kernel modules, or a kernel that has it";

/// Message fragments, all of which must stand in one line, in any case, and what they mean. First match wins.
pub(super) const TABLE: &[(&[&str], Cause)] = &[
    // pkg/cluster/storage.go, bootstrap.go
    (
        &["bootstrap data", "different token"],
        cause(
            "DATA_TOKEN_CONFLICT",
            Certain,
            "the datastore was made with another token",
            "restore the former token, or move /var/lib/rancher/k3s away",
        ),
    ),
    (
        &["newer than datastore and could cause a cluster outage"],
        cause(
            "BOOTSTRAP_CONFLICT",
            Certain,
            "certificates on this disk are newer than those in the datastore",
            "move the named files away; k3s makes them again from the datastore",
        ),
    ),
    (
        &["no bootstrap data found in datastore"],
        cause(
            "DATA_TOKEN_CONFLICT",
            Certain,
            "the datastore holds nothing that this token opens",
            "give the cluster's own token, or check the datastore",
        ),
    ),
    (
        &["critical configuration value mismatch"],
        cause(
            "SERVER_CONFIG_MISMATCH",
            Certain,
            "this server's settings differ from the other servers'",
            "give it the same cluster-cidr, service-cidr and disable settings",
        ),
    ),
    // pkg/agent/config/config.go, pkg/clientaccess/token.go, pkg/util/token.go, pkg/cli/agent/agent.go
    (
        &["Node password rejected"],
        cause(
            "NODE_NAME_TAKEN",
            Certain,
            "the server knows another machine of this name",
            "on the server: kubectl delete node NAME, or choose another --node-name",
        ),
    ),
    (
        &["token CA hash does not match"],
        cause("JOIN_CA_MISMATCH", Certain, "the token belongs to another cluster", TOKEN),
    ),
    (
        &["failed to normalize server token"],
        cause(
            "JOIN_TOKEN_MALFORMED",
            Certain,
            "the server's token is empty or not one of k3s",
            SERVER_TOKEN,
        ),
    ),
    (
        &["invalid token format"],
        cause("JOIN_TOKEN_MALFORMED", Certain, "the token is not one of k3s", TOKEN),
    ),
    (
        &["invalid token CA hash length"],
        cause("JOIN_TOKEN_MALFORMED", Certain, "the token was cut off or mixed up", TOKEN),
    ),
    (
        &["token must not be empty"],
        cause("TOKEN_MISSING", Certain, "the token file is empty", TOKEN),
    ),
    (&["--token is required"], cause("TOKEN_MISSING", Certain, "there is no token", TOKEN)),
    (
        &["only https:// URLs are supported"],
        cause(
            "MASTER_INVALID",
            Certain,
            "the server's address is not an https URL",
            "join with https://SERVER:6443",
        ),
    ),
    (
        &["incompatible down-level server detected"],
        cause(
            "VERSION_SKEW",
            Certain,
            "the server runs an older k3s than this node",
            "upgrade the server first, or give --k3s-version with the server's",
        ),
    ),
    (
        &["not authorized"],
        cause("JOIN_TOKEN_REJECTED", Fatal, "the server refuses the token", TOKEN),
    ),
    (
        &["401 Unauthorized"],
        cause("JOIN_TOKEN_REJECTED", Fatal, "the server refuses the token", TOKEN),
    ),
    (
        &["certificate has expired or is not yet valid"],
        cause(
            "CLOCK_SKEW",
            Fatal,
            "a certificate is outside its time: a clock is wrong",
            "set the clock (`timedatectl set-ntp true`)",
        ),
    ),
    // pkg/cli/cmds/log.go
    (
        &["server time isn't set properly"],
        cause(
            "CLOCK_SKEW",
            Fatal,
            "this clock stands before 1980",
            "set the clock (`timedatectl set-ntp true`)",
        ),
    ),
    (
        &["x509: certificate is valid for", "not"],
        cause(
            "TLS_SAN_MISSING",
            Fatal,
            "the server's certificate does not name the address used",
            "on the server: pipeops install-server --tls-san THAT_ADDRESS",
        ),
    ),
    (
        &["x509: certificate signed by unknown authority"],
        cause(
            "JOIN_CA_MISMATCH",
            Fatal,
            "something else answers in the server's place, or its CA changed",
            "check the address, and for a proxy that opens TLS",
        ),
    ),
    // urfave/cli and spf13/pflag: k3s itself, and what it hands to the kubelet and others
    (
        &["flag provided but not defined"],
        cause(
            "K3S_SETTING_UNKNOWN",
            Certain,
            "this k3s does not know one of the settings",
            UNKNOWN,
        ),
    ),
    (
        &["unknown flag: --"],
        cause(
            "K3S_SETTING_UNKNOWN",
            Certain,
            "this k3s does not know one of the settings",
            UNKNOWN,
        ),
    ),
    (
        &["unrecognized feature gate"],
        cause(
            "K3S_SETTING_UNKNOWN",
            Certain,
            "this Kubernetes does not know a feature gate that is set",
            UNKNOWN,
        ),
    ),
    (
        &["cannot set feature gate"],
        cause(
            "K3S_SETTING_INVALID",
            Certain,
            "a feature gate can no longer be set that way",
            UNKNOWN,
        ),
    ),
    (
        &["admission-plugins plugin", "is unknown"],
        cause(
            "K3S_SETTING_UNKNOWN",
            Certain,
            "this Kubernetes does not know an admission plugin that is set",
            UNKNOWN,
        ),
    ),
    (
        &["value required for kubelet-arg"],
        cause("K3S_SETTING_INVALID", Certain, "a kubelet-arg has no value", SETTING),
    ),
    // component-base: pflag's own words for a value of the wrong kind
    (
        &["invalid argument", "for", "flag: "],
        cause("K3S_SETTING_INVALID", Certain, "a setting has a value of the wrong kind", SETTING),
    ),
    // pkg/configfilearg/parser.go, gopkg.in/yaml
    (
        &["level=fatal", "yaml: "],
        cause(
            "K3S_CONFIG_INVALID",
            Certain,
            "a file of settings is not valid YAML",
            "correct the file in /etc/rancher/k3s, or take it away",
        ),
    ),
    (
        &["failed to parse config location"],
        cause(
            "K3S_CONFIG_INVALID",
            Certain,
            "the place of the settings is not valid",
            "take `config` out of the environment of k3s",
        ),
    ),
    // pkg/cli/server/server.go
    (
        &["invalid cluster-cidr"],
        cause("K3S_SETTING_INVALID", Certain, "cluster-cidr is no network range", SETTING),
    ),
    (
        &["invalid service-cidr"],
        cause("K3S_SETTING_INVALID", Certain, "service-cidr is no network range", SETTING),
    ),
    (
        &["invalid cluster-dns address"],
        cause("K3S_SETTING_INVALID", Certain, "cluster-dns is no address", SETTING),
    ),
    (
        &["cannot configure default cluster-dns address"],
        cause(
            "K3S_SETTING_INVALID",
            Certain,
            "service-cidr is too small to hold the DNS address",
            SETTING,
        ),
    ),
    (
        &["invalid port range"],
        cause(
            "K3S_SETTING_INVALID",
            Certain,
            "service-node-port-range is no range of ports",
            SETTING,
        ),
    ),
    (
        &["invalid tls-min-version"],
        cause("K3S_SETTING_INVALID", Certain, "tls-min-version is not a TLS version", SETTING),
    ),
    (
        &["invalid tls-cipher-suites"],
        cause(
            "K3S_SETTING_INVALID",
            Certain,
            "tls-cipher-suites names one that does not exist",
            SETTING,
        ),
    ),
    (
        &["invalid egress-selector-mode"],
        cause("K3S_SETTING_INVALID", Certain, "egress-selector-mode has an unknown value", SETTING),
    ),
    (
        &["invalid flag use;"],
        cause("K3S_SETTING_INVALID", Certain, "two settings exclude each other", SETTING),
    ),
    (
        &["etcd-snapshot-reconcile-interval must be greater"],
        cause(
            "K3S_SETTING_INVALID",
            Certain,
            "etcd-snapshot-reconcile-interval must be above zero",
            SETTING,
        ),
    ),
    (
        &["cannot perform cluster-reset while server URL is set"],
        cause("K3S_SETTING_INVALID", Certain, "cluster-reset and server are set together", SETTING),
    ),
    // pkg/daemons/control/deps/deps.go
    (
        &["unsupported secrets-encryption-provider"],
        cause(
            "K3S_SETTING_INVALID",
            Certain,
            "secrets-encryption-provider has an unknown value",
            SETTING,
        ),
    ),
    (
        &["the service cluster IP range must be at least"],
        cause("K3S_SETTING_INVALID", Certain, "service-cidr is too small", SETTING),
    ),
    (
        &["too large; for", "the mask must be >="],
        cause("K3S_SETTING_INVALID", Certain, "service-cidr is too large", SETTING),
    ),
    // pkg/server/auth/auth.go, kubernetes pkg/server/options/audit.go
    (
        &["loading audit policy file"],
        cause(
            "K3S_SETTING_INVALID",
            Certain,
            "the audit policy cannot be read",
            "put the file where audit-policy-file says, or take the setting out",
        ),
    ),
    (
        &["Failed to apply authentication configuration"],
        cause(
            "K3S_SETTING_INVALID",
            Certain,
            "the settings of authentication are not valid",
            SETTING,
        ),
    ),
    // pkg/agent/run.go
    (
        &["must share the same IP version"],
        cause(
            "ADDRESS_FAMILY",
            Certain,
            "the ranges and the node's address are of different IP versions",
            "give cluster-cidr, service-cidr and --node-ip the same versions, in the same order",
        ),
    ),
    (
        &["failed to validate kube-proxy conntrack"],
        cause(
            "K3S_SETTING_INVALID",
            Certain,
            "a conntrack setting of kube-proxy is not valid",
            SETTING,
        ),
    ),
    // pkg/util/net.go, pkg/executor/embed/embed.go, pkg/agent/flannel/flannel.go, kubernetes cmd/kubelet
    (
        &["invalid node-ip"],
        cause(
            "ADDRESS_UNKNOWN",
            Certain,
            "node-ip is no address",
            "give --node-ip an address of this machine",
        ),
    ),
    (
        &["invalid node-external-ip"],
        cause("ADDRESS_UNKNOWN", Certain, "node-external-ip is no address", SETTING),
    ),
    (
        &["bad --node-ip"],
        cause(
            "ADDRESS_UNKNOWN",
            Certain,
            "node-ip is not an address that the kubelet takes",
            "give --node-ip an address of this machine",
        ),
    ),
    (
        &["multiple global unicast addresses defined"],
        cause(
            "NIC_AMBIGUOUS",
            Certain,
            "the interface has several addresses",
            "choose one with --node-ip",
        ),
    ),
    (
        &["unable to find interface"],
        cause(
            "INTERFACE_UNKNOWN",
            Fatal,
            "there is no interface of that name",
            "`ip link` names those that are there; choose one with --flannel-iface",
        ),
    ),
    (
        &["no such network interface"],
        cause(
            "INTERFACE_UNKNOWN",
            Fatal,
            "there is no interface of that name",
            "`ip link` names those that are there; choose one with --flannel-iface",
        ),
    ),
    (
        &["the interface", "is not up"],
        cause(
            "INTERFACE_DOWN",
            Fatal,
            "the interface is down",
            "bring it up, or choose another with --flannel-iface",
        ),
    ),
    (
        &["can't find ip for interface"],
        cause(
            "INTERFACE_DOWN",
            Fatal,
            "the interface has no address",
            "give it one, or choose another with --flannel-iface",
        ),
    ),
    (
        &["no IPv4 address found for given interface"],
        cause(
            "INTERFACE_DOWN",
            Fatal,
            "the interface has no IPv4 address",
            "give it one, or choose another with --flannel-iface",
        ),
    ),
    (
        &["no default routes found"],
        cause("ROUTE_NONE", Fatal, "there is no default route", "add one"),
    ),
    (
        &["unable to find default route"],
        cause(
            "ROUTE_NONE",
            Fatal,
            "there is no default route",
            "add one, or name the interface with --flannel-iface",
        ),
    ),
    // pkg/agent/flannel/setup.go, flannel pkg/backend
    (
        &["Cannot configure unknown flannel backend"],
        cause("K3S_SETTING_INVALID", Certain, "flannel-backend has an unknown value", SETTING),
    ),
    (
        &["ipv4 mode requested but no ipv4 network provided"],
        cause(
            "ADDRESS_FAMILY",
            Certain,
            "flannel has no IPv4 range",
            "give cluster-cidr an IPv4 range",
        ),
    ),
    (
        &["failed to create vxlan"],
        cause("KMOD_MISSING", Fatal, "the kernel cannot make a vxlan interface", MODULES),
    ),
    (
        &["could not create wireguard interface"],
        cause(
            "KMOD_MISSING",
            Fatal,
            "the kernel has no wireguard",
            "install the wireguard module, or set flannel-backend = \"vxlan\" in the [k3s] table",
        ),
    ),
    // kubernetes cmd/kubelet/app/options/options.go, pkg/daemons/agent/agent.go
    (
        &["labels specified with --node-labels"],
        cause(
            "NODE_LABEL_INVALID",
            Certain,
            "the kubelet may not give itself one of the labels",
            "take it out of --node-label and set it with `kubectl label node`",
        ),
    ),
    (
        &["invalid node labels"],
        cause(
            "NODE_LABEL_INVALID",
            Certain,
            "one of the labels is not valid",
            "correct --node-label: NAME=VALUE",
        ),
    ),
    (
        &["failed to parse node taints"],
        cause(
            "NODE_TAINT_INVALID",
            Certain,
            "one of the taints is not valid",
            "correct --node-taint: NAME=VALUE:EFFECT",
        ),
    ),
    (
        &["invalid taint"],
        cause(
            "NODE_TAINT_INVALID",
            Certain,
            "one of the taints is not valid",
            "correct --node-taint: NAME=VALUE:EFFECT",
        ),
    ),
    // kubernetes cmd/kubelet/app/server.go, pkg/kubelet/cm/container_manager_linux.go
    (
        &["failed to load kubelet", "file, path"],
        cause(
            "KUBELET_CONFIG_INVALID",
            Certain,
            "a file of kubelet settings cannot be read",
            "correct it, or take it away",
        ),
    ),
    (
        &["copy config", "into managed drop-in dir"],
        cause(
            "KUBELET_CONFIG_INVALID",
            Certain,
            "a file of kubelet settings is not there",
            SETTING,
        ),
    ),
    (
        &["--kube-reserved value failed to parse"],
        cause("KUBELET_CONFIG_INVALID", Certain, "kube-reserved is not a list of amounts", SETTING),
    ),
    (
        &["--system-reserved value failed to parse"],
        cause(
            "KUBELET_CONFIG_INVALID",
            Certain,
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
            Certain,
            "swap is on, and the kubelet is told to refuse it",
            "turn it off (`swapoff -a`), or take fail-swap-on out of the settings",
        ),
    ),
    (
        &["cgroup v1", "unsupported"],
        cause(
            "CGROUP_V1_UNSUPPORTED",
            Certain,
            "this Kubernetes does not start on cgroup v1",
            "boot with systemd.unified_cgroup_hierarchy=1, or use --channel v1.34",
        ),
    ),
    (
        &["kubelet is configured to not run on a host using cgroup v1"],
        cause(
            "CGROUP_V1_UNSUPPORTED",
            Certain,
            "this Kubernetes does not start on cgroup v1",
            "boot with systemd.unified_cgroup_hierarchy=1, or use --channel v1.34",
        ),
    ),
    // what stands in front of several of the above comes last
    (
        &["failed to validate kubelet configuration"],
        cause("KUBELET_CONFIG_INVALID", Certain, "the kubelet's settings are not valid", SETTING),
    ),
];
