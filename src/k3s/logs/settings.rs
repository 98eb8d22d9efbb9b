//! Known failures that come from a setting of k3s: unknown ones, values, address ranges,
//! interfaces.

use super::Severity::{Fatal, Permanent};
use super::{KnownCause, MODULES, SETTING, cause};

const UNKNOWN: &str = "remove it from the [k3s] table or from /etc/rancher/k3s/config.yaml.d";

pub(super) const TABLE: &[(&[&str], KnownCause)] = &[
    // urfave/cli and spf13/pflag: k3s itself, and what it hands to the kubelet and others
    (
        &["flag provided but not defined"],
        cause(
            "K3S_SETTING_UNKNOWN",
            Permanent,
            "this k3s does not know one of the settings",
            UNKNOWN,
        ),
    ),
    (
        &["unknown flag: --"],
        cause(
            "K3S_SETTING_UNKNOWN",
            Permanent,
            "this k3s does not know one of the settings",
            UNKNOWN,
        ),
    ),
    (
        &["unrecognized feature gate"],
        cause(
            "K3S_SETTING_UNKNOWN",
            Permanent,
            "this Kubernetes does not know a feature gate that is set",
            UNKNOWN,
        ),
    ),
    (
        &["cannot set feature gate"],
        cause(
            "K3S_SETTING_INVALID",
            Permanent,
            "a feature gate can no longer be set that way",
            UNKNOWN,
        ),
    ),
    (
        &["admission-plugins plugin", "is unknown"],
        cause(
            "K3S_SETTING_UNKNOWN",
            Permanent,
            "this Kubernetes does not know an admission plugin that is set",
            UNKNOWN,
        ),
    ),
    (
        &["value required for kubelet-arg"],
        cause("K3S_SETTING_INVALID", Permanent, "a kubelet-arg has no value", SETTING),
    ),
    // component-base: pflag's own words for a value of the wrong kind
    (
        &["invalid argument", "for", "flag: "],
        cause("K3S_SETTING_INVALID", Permanent, "a setting has a value of the wrong kind", SETTING),
    ),
    // pkg/configfilearg/parser.go, gopkg.in/yaml
    (
        &["level=fatal", "yaml: "],
        cause(
            "K3S_CONFIG_INVALID",
            Permanent,
            "a file of settings is not valid YAML",
            "correct the file in /etc/rancher/k3s, or take it away",
        ),
    ),
    (
        &["failed to parse config location"],
        cause(
            "K3S_CONFIG_INVALID",
            Permanent,
            "the place of the settings is not valid",
            "take `config` out of the environment of k3s",
        ),
    ),
    // pkg/cli/server/server.go
    (
        &["invalid cluster-cidr"],
        cause("K3S_SETTING_INVALID", Permanent, "cluster-cidr is no network range", SETTING),
    ),
    (
        &["invalid service-cidr"],
        cause("K3S_SETTING_INVALID", Permanent, "service-cidr is no network range", SETTING),
    ),
    (
        &["invalid cluster-dns address"],
        cause("K3S_SETTING_INVALID", Permanent, "cluster-dns is no address", SETTING),
    ),
    (
        &["cannot configure default cluster-dns address"],
        cause(
            "K3S_SETTING_INVALID",
            Permanent,
            "service-cidr is too small to hold the DNS address",
            SETTING,
        ),
    ),
    (
        &["invalid port range"],
        cause(
            "K3S_SETTING_INVALID",
            Permanent,
            "service-node-port-range is no range of ports",
            SETTING,
        ),
    ),
    (
        &["invalid tls-min-version"],
        cause("K3S_SETTING_INVALID", Permanent, "tls-min-version is not a TLS version", SETTING),
    ),
    (
        &["invalid tls-cipher-suites"],
        cause(
            "K3S_SETTING_INVALID",
            Permanent,
            "tls-cipher-suites names one that does not exist",
            SETTING,
        ),
    ),
    (
        &["invalid egress-selector-mode"],
        cause(
            "K3S_SETTING_INVALID",
            Permanent,
            "egress-selector-mode has an unknown value",
            SETTING,
        ),
    ),
    (
        &["invalid flag use;"],
        cause("K3S_SETTING_INVALID", Permanent, "two settings exclude each other", SETTING),
    ),
    (
        &["etcd-snapshot-reconcile-interval must be greater"],
        cause(
            "K3S_SETTING_INVALID",
            Permanent,
            "etcd-snapshot-reconcile-interval must be above zero",
            SETTING,
        ),
    ),
    (
        &["cannot perform cluster-reset while server URL is set"],
        cause(
            "K3S_SETTING_INVALID",
            Permanent,
            "cluster-reset and server are set together",
            SETTING,
        ),
    ),
    // pkg/daemons/control/deps/deps.go
    (
        &["unsupported secrets-encryption-provider"],
        cause(
            "K3S_SETTING_INVALID",
            Permanent,
            "secrets-encryption-provider has an unknown value",
            SETTING,
        ),
    ),
    (
        &["the service cluster IP range must be at least"],
        cause("K3S_SETTING_INVALID", Permanent, "service-cidr is too small", SETTING),
    ),
    (
        &["too large; for", "the mask must be >="],
        cause("K3S_SETTING_INVALID", Permanent, "service-cidr is too large", SETTING),
    ),
    // pkg/server/auth/auth.go, kubernetes pkg/server/options/audit.go
    (
        &["loading audit policy file"],
        cause(
            "K3S_SETTING_INVALID",
            Permanent,
            "the audit policy cannot be read",
            "put the file where audit-policy-file says, or take the setting out",
        ),
    ),
    (
        &["Failed to apply authentication configuration"],
        cause(
            "K3S_SETTING_INVALID",
            Permanent,
            "the settings of authentication are not valid",
            SETTING,
        ),
    ),
    // pkg/agent/run.go
    (
        &["must share the same IP version"],
        cause(
            "ADDRESS_FAMILY",
            Permanent,
            "the ranges and the node's address are of different IP versions",
            "give cluster-cidr, service-cidr and --node-ip the same versions, in the same order",
        ),
    ),
    (
        &["failed to validate kube-proxy conntrack"],
        cause(
            "K3S_SETTING_INVALID",
            Permanent,
            "a conntrack setting of kube-proxy is not valid",
            SETTING,
        ),
    ),
    // pkg/util/net.go, pkg/executor/embed/embed.go, pkg/agent/flannel/flannel.go, kubernetes
    // cmd/kubelet
    (
        &["invalid node-ip"],
        cause(
            "ADDRESS_UNKNOWN",
            Permanent,
            "node-ip is no address",
            "give --node-ip an address of this machine",
        ),
    ),
    (
        &["invalid node-external-ip"],
        cause("ADDRESS_UNKNOWN", Permanent, "node-external-ip is no address", SETTING),
    ),
    (
        &["bad --node-ip"],
        cause(
            "ADDRESS_UNKNOWN",
            Permanent,
            "node-ip is not an address that the kubelet takes",
            "give --node-ip an address of this machine",
        ),
    ),
    (
        &["multiple global unicast addresses defined"],
        cause(
            "NIC_AMBIGUOUS",
            Permanent,
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
        cause("K3S_SETTING_INVALID", Permanent, "flannel-backend has an unknown value", SETTING),
    ),
    (
        &["ipv4 mode requested but no ipv4 network provided"],
        cause(
            "ADDRESS_FAMILY",
            Permanent,
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
];
