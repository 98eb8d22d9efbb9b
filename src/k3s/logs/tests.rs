//! Lines as k3s and what it carries print them, each with the code that it must get, and what ends
//! a wait.

use std::time::Duration;

use super::*;

/// Message formats of k3s 1.33 to 1.36 and of the parts that it embeds, filled in.
#[rustfmt::skip]
const FIXTURES: &[(&str, &str)] = &[
    ("DATA_TOKEN_CONFLICT", r#"level=fatal msg="starting kubernetes: preparing server: bootstrap data already found and encrypted with different token""#),
    ("NODE_NAME_TAKEN", r#"level=error msg="Node password rejected, duplicate hostname or contents of '/etc/rancher/node/password' may not match server node-passwd entry, try enabling a unique node name with the --with-node-id flag""#),
    ("JOIN_CA_MISMATCH", r#"level=fatal msg="Error: token CA hash does not match the Cluster CA certificate hash: 1111 != 2222""#),
    ("JOIN_TOKEN_REJECTED", r#"level=error msg="Failed to retrieve agent configuration: https://10.0.0.1:6443/v1-k3s/config: 401 Unauthorized""#),
    ("JOIN_TOKEN_REJECTED", r#"level=fatal msg="starting kubernetes: preparing server: failed to validate token: not authorized""#),
    ("CLOCK_SKEW", r#"level=error msg="failed to get CA certs: Get \"https://127.0.0.1:6444/cacerts\": x509: certificate has expired or is not yet valid: current time 2020-01-01T00:00:00Z is before 2026-01-01T00:00:00Z""#),
    ("TLS_SAN_MISSING", r#"level=error msg="Get \"https://203.0.113.7:6443/v1-k3s/config\": tls: failed to verify certificate: x509: certificate is valid for 10.0.0.1, 10.43.0.1, 127.0.0.1, not 203.0.113.7""#),
    ("JOIN_CA_MISMATCH", r#"level=error msg="x509: certificate signed by unknown authority""#),
    ("K3S_SETTING_UNKNOWN", r#"Incorrect Usage: flag provided but not defined: -flannel-backend"#),
    ("CGROUP_V1_UNSUPPORTED", r#"E0101 kubelet.go:1 "Failed to run kubelet" err="failed to run Kubelet: kubelet is configured to not run on a host using cgroup v1. cgroup v1 support is unsupported""#),
    ("CGROUP_MEMORY_OFF", r#"level=fatal msg="failed to find memory cgroup, you may need to add \"cgroup_memory=1 cgroup_enable=memory\" to your linux cmdline (/boot/cmdline.txt on a Raspberry Pi)""#),
    ("PORT_IN_USE", r#"level=fatal msg="Failed to start networking: unable to listen: listen tcp 0.0.0.0:6443: bind: address already in use""#),
    ("ROUTE_NONE", r#"level=fatal msg="no default routes found in \"/proc/net/route\" or \"/proc/net/ipv6_route\"""#),
    ("DISK_LOW", r#"level=fatal msg="extracting data: write /var/lib/rancher/k3s/data/.x/bin/containerd: no space left on device""#),
    ("LXC_FEATURES", r#"E0101 server.go:1 "Failed to run kubelet" err="failed to run Kubelet: failed to create kubelet: open /dev/kmsg: no such file or directory""#),
    ("SERVER_CONFIG_MISMATCH", r#"level=fatal msg="starting kubernetes: preparing server: failed to validate server configuration: critical configuration value mismatch between servers""#),
    ("DATASTORE_DAMAGED", r#"level=error msg="error while range on /registry/health: database disk image is malformed""#),
    ("SERVER_UNREACHABLE", r#"level=error msg="failed to get CA certs: Get \"https://127.0.0.1:6444/cacerts\": dial tcp 127.0.0.1:6444: connect: connection refused /cacerts""#),
    // as k3s v1.35.0+k3s1 printed them
    ("DATA_NOEXEC", r#"level=fatal msg="Error: exec: \"k3s-server\": executable file not found in $PATH""#),
    ("DISK_LOW", r#"level=fatal msg="Error: extracting data: error writing to /var/lib/rancher/k3s/data/x-tmp/bin/k3s: write /var/lib/rancher/k3s/data/x-tmp/bin/k3s: no space left on device""#),
    ("DISK_READ_ONLY", r#"level=fatal msg="Error: extracting data: read-only file system""#),
    ("DATASTORE_DAMAGED", r#"level=error msg="Failed to ping database connection: file is not a database""#),
    ("INTERFACE_UNKNOWN", r#"level=fatal msg="Error: interface eth9 does not have a correct global unicast ip: route ip+net: no such network interface""#),
    ("JOIN_TOKEN_MALFORMED", r#"level=fatal msg="Error: preparing server: failed to bootstrap cluster data: failed to normalize server token; must be in format K10<CA-HASH>::<USERNAME>:<PASSWORD> or <PASSWORD>""#),
    ("CGROUP_V1_UNSUPPORTED", r#"level=error msg="Shutdown request received: kubelet exited: failed to validate kubelet configuration, error: kubelet is configured to not run on a host using cgroup v1. cgroup v1 support is unsupported and will be removed in a future release, path: &TypeMeta{Kind:,APIVersion:,}""#),
    ("K3S_SETTING_INVALID", r#"level=fatal msg="Error: preparing server: failed to generate server dependencies: unsupported secrets-encryption-provider rot13""#),
    ("ADDRESS_FAMILY", r#"level=fatal msg="Error: cluster-cidr: [10.42.0.0/16] and service-cidr: [fd43::/112], must share the same IP version (IPv4, IPv6 or dual-stack)""#),
    ("DATASTORE_URL_INVALID", r#"level=fatal msg="Error: preparing server: failed to bootstrap cluster data: creating storage endpoint: failed to create driver for configured endpoint: unknown driver""#),
    ("K3S_CONFIG_INVALID", r#"level=fatal msg="yaml: line 1: did not find expected node content""#),
    ("K3S_SETTING_UNKNOWN", r#"level=error msg="Shutdown request received: apiserver exited: unknown flag: --no-such""#),
    ("K3S_SETTING_UNKNOWN", r#"level=error msg="Shutdown request received: apiserver exited: enable-admission-plugins plugin \"NoSuch\" is unknown""#),
    ("NODE_LABEL_INVALID", r#"level=error msg="Shutdown request received: kubelet exited: failed to validate kubelet flags: unknown 'kubernetes.io' or 'k8s.io' labels specified with --node-labels: [node-role.kubernetes.io/worker]""#),
    ("SERVER_UNREACHABLE", r#"level=error msg="Failed to validate connection to cluster at https://127.0.0.1:7443: failed to get CA certs: Get \"https://127.0.0.1:6444/cacerts\": read tcp 127.0.0.1:46872->127.0.0.1:6444: read: connection reset by peer""#),
    ("K3S_SETTING_UNKNOWN", r#"level=fatal msg="Error: flag provided but not defined: -no-such-flag""#),
    ("BOOTSTRAP_CONFLICT", r#"level=fatal msg="/var/lib/rancher/k3s/server/tls/server-ca.crt, /var/lib/rancher/k3s/server/cred/passwd newer than datastore and could cause a cluster outage. Remove the file(s) from disk and restart to be recreated from datastore.""#),
    ("DATA_TOKEN_CONFLICT", r#"level=fatal msg="Error: starting kubernetes: preparing server: failed to bootstrap cluster data: failed to reconcile with local datastore: no bootstrap data found in datastore - check server token value and verify datastore integrity""#),
    ("NODE_NAME_TAKEN", r#"level=info msg="Waiting to retrieve agent configuration; server is not ready: Node password rejected, duplicate hostname or contents of '/etc/rancher/node/password' may not match server node-passwd entry, try enabling a unique node name with the --with-node-id flag""#),
    ("JOIN_CA_MISMATCH", r#"level=error msg="Failed to validate connection to cluster at https://10.0.0.1:6443: token CA hash does not match the Cluster CA certificate hash: 0000 != 1111""#),
    ("JOIN_TOKEN_MALFORMED", r#"level=fatal msg="Error: starting kubernetes: preparing server: failed to normalize server token; must be in format K10<CA-HASH>::<USERNAME>:<PASSWORD> or <PASSWORD>""#),
    ("JOIN_TOKEN_MALFORMED", r#"level=error msg="Failed to validate connection to cluster at https://10.0.0.1:6443: invalid token CA hash length""#),
    ("JOIN_TOKEN_MALFORMED", r#"level=error msg="Failed to validate connection to cluster at https://10.0.0.1:6443: invalid token format""#),
    ("TOKEN_MISSING", r#"level=fatal msg="Error: --token is required""#),
    ("TOKEN_MISSING", r#"level=error msg="Failed to validate connection to cluster at https://10.0.0.1:6443: token must not be empty""#),
    ("MASTER_INVALID", r#"level=error msg="Failed to validate connection to cluster at http://10.0.0.1:6443: only https:// URLs are supported, invalid scheme: http://10.0.0.1:6443""#),
    ("VERSION_SKEW", r#"level=fatal msg="Error: failed to start networking: incompatible down-level server detected; servers must be upgraded to at least v1.35.0+k3s1, or restarted with --disable-network-policy""#),
    ("CLOCK_SKEW", r#"level=fatal msg="Error: server time isn't set properly: 1970-01-01 00:01:02 +0000 UTC""#),
    ("K3S_SETTING_UNKNOWN", r#"level=error msg="Shutdown request received: \"kubelet exited: failed to parse kubelet flag: unknown flag: --max-podz\"""#),
    ("K3S_SETTING_UNKNOWN", r#"level=fatal msg="apiserver exited: unknown flag: --auditlog""#),
    ("K3S_SETTING_UNKNOWN", r#"level=error msg="Shutdown request received: \"kubelet exited: failed to set feature gates from initial flags-based config: unrecognized feature gate: NoSuchGate\"""#),
    ("K3S_SETTING_INVALID", r#"level=error msg="Shutdown request received: \"apiserver exited: cannot set feature gate AnonymousAuthConfigurableEndpoints to false, feature is locked to true\"""#),
    ("K3S_SETTING_UNKNOWN", r#"level=error msg="Shutdown request received: \"apiserver exited: enable-admission-plugins plugin \\\"PodSecurityPolicy\\\" is unknown\"""#),
    ("K3S_SETTING_INVALID", r#"level=fatal msg="Error: failed to start kubelet: value required for kubelet-arg --config""#),
    ("K3S_SETTING_INVALID", r#"level=error msg="Shutdown request received: \"kubelet exited: failed to parse kubelet flag: invalid argument \\\"many\\\" for \\\"--max-pods\\\" flag: strconv.ParseInt: parsing \\\"many\\\": invalid syntax\"""#),
    ("K3S_CONFIG_INVALID", r#"level=fatal msg="yaml: line 3: mapping values are not allowed in this context""#),
    ("K3S_CONFIG_INVALID", r#"level=fatal msg="failed to parse config location /etc/rancher/k3s/\x7fconfig.yaml: parse error""#),
    ("K3S_SETTING_INVALID", r#"level=fatal msg="Error: invalid cluster-cidr 10.42/16: invalid CIDR address: 10.42/16""#),
    ("K3S_SETTING_INVALID", r#"level=fatal msg="Error: invalid service-cidr 10.43.0.0: invalid CIDR address: 10.43.0.0""#),
    ("K3S_SETTING_INVALID", r#"level=fatal msg="Error: invalid cluster-dns address ten""#),
    ("K3S_SETTING_INVALID", r#"level=fatal msg="Error: cannot configure default cluster-dns address: can't generate IP with index 10 from subnet. subnet too small. subnet: \"10.43.0.0/29\"""#),
    ("K3S_SETTING_INVALID", r#"level=fatal msg="Error: invalid port range 32767-30000: end port cannot be less than start port: 32767-30000""#),
    ("K3S_SETTING_INVALID", r#"level=fatal msg="Error: invalid tls-min-version: unknown tls version \"VersionTLS19\"""#),
    ("K3S_SETTING_INVALID", r#"level=fatal msg="Error: invalid tls-cipher-suites: Cipher suite NO_SUCH not supported or doesn't exist""#),
    ("K3S_SETTING_INVALID", r#"level=fatal msg="Error: invalid egress-selector-mode sometimes""#),
    ("K3S_SETTING_INVALID", r#"level=fatal msg="Error: invalid flag use; cannot use --disable-etcd with --datastore-endpoint""#),
    ("K3S_SETTING_INVALID", r#"level=fatal msg="Error: starting kubernetes: preparing server: failed to generate server dependencies: unsupported secrets-encryption-provider rot13""#),
    ("K3S_SETTING_INVALID", r#"level=error msg="Shutdown request received: \"apiserver exited: error determining service IP ranges: the service cluster IP range must be at least 8 IP addresses\"""#),
    ("K3S_SETTING_INVALID", r#"level=error msg="Shutdown request received: \"apiserver exited: specified --service-cluster-ip-range is too large; for 32-bit addresses, the mask must be >= 12\"""#),
    ("K3S_SETTING_INVALID", r#"level=error msg="Shutdown request received: \"apiserver exited: loading audit policy file: failed to read file path \\\"/etc/audit.yaml\\\": open /etc/audit.yaml: no such file or directory\"""#),
    ("ADDRESS_FAMILY", r#"level=fatal msg="Error: cluster-cidr: [10.42.0.0/16 fd42::/56] and node-ip: [10.0.0.5], must share the same IP version (IPv4, IPv6 or dual-stack)""#),
    ("ADDRESS_UNKNOWN", r#"level=fatal msg="Error: invalid node-ip: invalid ip format '10.0.0'""#),
    ("ADDRESS_UNKNOWN", r#"level=error msg="Shutdown request received: \"kubelet exited: failed to run Kubelet: bad --node-ip \\\"127.0.0.1\\\": must be a valid IP\"""#),
    ("NIC_AMBIGUOUS", r#"level=fatal msg="Error: multiple global unicast addresses defined for eth0, please set ip from one of [10.0.0.5 10.0.0.6]""#),
    ("INTERFACE_UNKNOWN", r#"level=info msg="Waiting to retrieve agent configuration; server is not ready: unable to find interface eth9: route ip+net: no such network interface""#),
    ("INTERFACE_DOWN", r#"level=fatal msg="Error: the interface eth1 is not up""#),
    ("ROUTE_NONE", r#"level=error msg="Shutdown request received: \"flannel exited: failed to find the interface: failed to get default interface: unable to find default route\"""#),
    ("K3S_SETTING_INVALID", r#"level=fatal msg="Error: Cannot configure unknown flannel backend 'vxlam'""#),
    ("KMOD_MISSING", r#"level=error msg="Shutdown request received: \"flannel exited: failed to register flannel network: failed to create vxlan device: operation not supported\"""#),
    ("KMOD_MISSING", r#"level=error msg="Shutdown request received: \"flannel exited: failed to register flannel network: could not create wireguard interface: operation not supported\"""#),
    ("NODE_LABEL_INVALID", r#"level=error msg="Shutdown request received: \"kubelet exited: failed to validate kubelet flags: unknown 'kubernetes.io' or 'k8s.io' labels specified with --node-labels: [node-role.kubernetes.io/worker]\\n--node-labels in the 'kubernetes.io' namespace must begin with an allowed prefix\"""#),
    ("NODE_LABEL_INVALID", r#"level=error msg="Shutdown request received: \"kubelet exited: failed to validate kubelet flags: invalid node labels: 'a b' - a valid label must be an empty string\"""#),
    ("NODE_TAINT_INVALID", r#"level=fatal msg="Error: failed to start kubelet: failed to parse node taints: invalid taint effect: NoShedule, unsupported taint effect""#),
    ("KUBELET_CONFIG_INVALID", r#"level=error msg="Shutdown request received: \"kubelet exited: failed to validate kubelet configuration, error: invalid configuration: imageGCHighThresholdPercent must be between 0 and 100\"""#),
    ("KUBELET_CONFIG_INVALID", r#"level=error msg="Shutdown request received: \"kubelet exited: failed to merge kubelet configs: failed to load kubelet dropin file, path: /var/lib/rancher/k3s/agent/etc/kubelet.conf.d/90-mine.conf, error: yaml: line 2\"""#),
    ("KUBELET_CONFIG_INVALID", r#"level=fatal msg="Error: failed to start kubelet: prepare user configuration drop-ins: copy config \"/etc/kubelet.yaml\" into managed drop-in dir \"/var/lib\": no such file or directory""#),
    ("KUBELET_STATE", r#"level=error msg="Shutdown request received: \"kubelet exited: failed to run Kubelet: start cpu manager error: could not restore state from checkpoint: configured policy \\\"static\\\" differs from state checkpoint policy \\\"none\\\"\"""#),
    ("SWAP_ON", r#"level=error msg="Shutdown request received: \"kubelet exited: failed to run Kubelet: running with swap on is not supported, please disable swap or set --fail-swap-on flag to false\"""#),
    ("CGROUP_CONTROLLERS", r#"level=fatal msg="Error: failed to find cpuset cgroup (v2)""#),
    ("CGROUP_MEMORY_OFF", r#"level=fatal msg="Error: failed to find memory cgroup (v2)""#),
    ("CGROUP_CONTROLLERS", r#"level=error msg="Shutdown request received: \"kubelet exited: failed to run Kubelet: system validation failed - Following Cgroup subsystem not mounted: [memory]\"""#),
    ("SNAPSHOTTER_REFUSED", r#"level=info msg="Waiting to retrieve agent configuration; server is not ready: \"overlayfs\" snapshotter cannot be enabled for \"/var/lib/rancher/k3s/agent/containerd\", try using \"fuse-overlayfs\" or \"native\": failed to mount overlay: invalid argument""#),
    ("SNAPSHOTTER_REFUSED", r#"level=info msg="Waiting to retrieve agent configuration; server is not ready: \"fuse-overlayfs\" snapshotter cannot be enabled for \"/var/lib/rancher/k3s/agent/containerd\", try using \"native\": fuse-overlayfs not functional""#),
    ("SNAPSHOTTER_REFUSED", r#"level=info msg="Waiting to retrieve agent configuration; server is not ready: \"overlayfs\" snapshotter cannot be enabled for \"/var/lib/rancher/k3s/agent/containerd\", try using \"fuse-overlayfs\" or \"native\": /var/lib/rancher/k3s/agent/containerd does not support d_type. If the backing filesystem is xfs, please reformat with ftype=1 to enable d_type support""#),
    ("LXC_FEATURES", r#"level=info msg="Waiting to retrieve agent configuration; server is not ready: \"overlayfs\" snapshotter cannot be enabled for \"/var/lib/rancher/k3s/agent/containerd\", try using \"fuse-overlayfs\" or \"native\": failed to mount overlay: operation not permitted""#),
    ("KMOD_MISSING", r#"level=info msg="Waiting to retrieve agent configuration; server is not ready: \"overlayfs\" snapshotter cannot be enabled for \"/var/lib/rancher/k3s/agent/containerd\", try using \"fuse-overlayfs\" or \"native\": failed to mount overlay: no such device""#),
    ("K3S_SETTING_INVALID", r#"level=fatal msg="Error: default runtime nvidia was not found""#),
    ("IPTABLES_BAD", r#"level=error msg="Shutdown request received: \"kube-proxy exited: iptables is not available on this host : exec: \\\"iptables\\\": executable file not found in $PATH\"""#),
    ("IPTABLES_BAD", r#"level=fatal msg="Error: failed to start networking: failed to create iptables handler: iptables not found""#),
    ("KMOD_MISSING", r#"level=fatal msg="Error: failed to start networking: failed to create ipset handler: no such file""#),
    ("DATASTORE_URL_INVALID", r#"level=fatal msg="Error: starting kubernetes: preparing server: creating storage endpoint: failed to create driver for postgres: failed to parse datastore DSN URL; ensure that parameters containing special characters use percent-encoding: parse error""#),
    ("DATASTORE_URL_INVALID", r#"level=fatal msg="Error: starting kubernetes: preparing server: creating storage endpoint: invalid datastore endpoint; endpoint should be a DSN URI in the format <scheme>://<authority>""#),
    ("DATASTORE_REFUSED", r#"level=fatal msg="Error: starting kubernetes: preparing server: creating storage endpoint: failed to create driver for postgres: failed to connect to `host=db user=k3s database=k3s`: server error: FATAL: password authentication failed for user \"k3s\" (SQLSTATE 28P01)""#),
    ("DATASTORE_REFUSED", r#"level=fatal msg="Error: starting kubernetes: preparing server: creating storage endpoint: failed to create driver for mysql: Error 1045 (28000): Access denied for user 'k3s'@'10.0.0.5' (using password: YES)""#),
    ("DATASTORE_UNOPENED", r#"level=fatal msg="Error: starting kubernetes: preparing server: creating storage endpoint: failed to create driver for default: setup db: unable to open database file: no such file or directory""#),
    ("DISK_READ_ONLY", r#"level=fatal msg="Error: starting kubernetes: preparing server: creating storage endpoint: failed to create driver for default: setup db: attempt to write a readonly database""#),
    ("DATASTORE_DAMAGED", r#"level=fatal msg="Error: starting kubernetes: preparing server: creating storage endpoint: failed to create driver for default: setup db: file is not a database""#),
    ("DATASTORE_LOCKED", r#"level=fatal msg="Error: starting kubernetes: preparing server: creating storage endpoint: failed to create driver for default: setup db: database is locked""#),
    ("NODE_NAME_TAKEN", r#"level=error msg="Shutdown request received: \"etcd cluster join failed: duplicate node name found, please use a unique name for this node\"""#),
    ("ETCD_MEMBER_REMOVED", r#"level=fatal msg="Error: starting kubernetes: preparing server: start managed database: tombstone file has been detected but --server is empty: backup and delete ${datadir}/server/db to create a new cluster, or set --server to rejoin the cluster""#),
    ("ETCD_MEMBER_REMOVED", r#"level=fatal msg="the member has been permanently removed from the cluster""#),
    ("ETCD_MEMBER_STALE", r#"level=fatal msg="starting etcd: member 8e9e05c52164694d has already been bootstrapped""#),
    ("ETCD_RESET_DONE", r#"level=fatal msg="Error: starting kubernetes: preparing server: start managed database: Managed etcd cluster membership was previously reset, please remove the cluster-reset flag and start k3s normally. If you need to perform another cluster reset, you must first manually delete the file at /var/lib/rancher/k3s/server/db/reset-flag""#),
    ("ETCD_SNAPSHOT_UNREADABLE", r#"level=fatal msg="Error: starting kubernetes: preparing server: start managed database: etcd: snapshot path does not exist: /snap""#),
    ("DATASTORE_DAMAGED", r#"{"level":"fatal","ts":"2026-11-27T05:00:00.000Z","caller":"etcdserver/bootstrap.go:631","msg":"failed to read WAL, cannot be repaired","error":"walpb: crc mismatch"}"#),
    ("DISK_READ_ONLY", r#"level=fatal msg="Error: starting kubernetes: preparing server: failed to generate server dependencies: open /var/lib/rancher/k3s/server/tls/dynamic-cert.json: read-only file system""#),
    ("INOTIFY_LIMIT", r#"level=fatal msg="Error: failed to create fsnotify watcher: too many open files""#),
    ("MEMORY_LOW", r#"k3s.service: A process of this unit has been killed by the OOM killer."#),
    ("CPU_UNSUPPORTED", r#"k3s.service: Main process exited, code=killed, status=4/ILL"#),
    ("K3S_NOT_RUNNABLE", r#"k3s.service: Failed at step EXEC spawning /usr/local/bin/k3s: Permission denied"#),
    ("K3S_NOT_RUNNABLE", r#"k3s.service: Failed at step EXEC spawning /usr/local/bin/k3s: Exec format error"#),
    ("K3S_NOT_RUNNABLE", r#"k3s.service: Unable to locate executable '/usr/local/bin/k3s': No such file or directory"#),
    ("DATA_NOEXEC", r#"level=fatal msg="exec /var/lib/rancher/k3s/data/current/bin/k3s-server failed: permission denied""#),
    ("CONTAINERD_EXITS", r#"level=error msg="Shutdown request received: \"containerd exited: exit status 1\"""#),
    ("KUBELET_EXITS", r#"level=error msg="Shutdown request received: \"kubelet exited: something that this table does not know\"""#),
    ("APISERVER_EXITS", r#"level=fatal msg="apiserver exited: something that this table does not know""#),
    ("CONTROLLER_EXITS", r#"level=error msg="Shutdown request received: \"controller-manager exited: something that this table does not know\"""#),
    ("K3S_PANIC", r#"level=fatal msg="apiserver panic: runtime error: index out of range" stack="goroutine 1""#),
    ("SERVER_UNREACHABLE", r#"level=error msg="Failed to validate connection to cluster at https://10.0.0.1:6443: failed to get CA certs: Get \"https://10.0.0.1:6443/cacerts\": EOF""#),
];

/// Warnings, which are told beside a cause and are never one.
#[rustfmt::skip]
const WEAK: &[(&str, &str)] = &[
    ("KMOD_MISSING", r#"level=warning msg="Failed to load kernel module br_netfilter with modprobe""#),
    ("KMOD_MISSING", r#"level=warning msg="Failed to load kernel module nft-expr-counter with modprobe""#),
    ("DISK_FSYNC_SLOW", r#"level=info msg="Slow SQL (started: 2026-11-27 05:00:00 +0000 UTC) (total time: 1.2s): SELECT""#),
    ("REGISTRY_RATE_LIMIT", r#"failed to pull and unpack image "docker.io/rancher/mirrored-pause:3.6": 429 Too Many Requests - toomanyrequests: You have reached your unauthenticated pull rate limit"#),
    ("DNS_BROKEN", r#"Failed to pull image "rancher/mirrored-coredns-coredns:1.14.4": dial tcp: lookup registry-1.docker.io: no such host"#),
    ("DISK_FSYNC_SLOW", r#"{"level":"warn","msg":"apply request took too long","took":"2.1s"}"#),
];

/// Near misses: they look like a cause, and are none.
#[rustfmt::skip]
const HARMLESS: &[&str] = &[
    r#"level=info msg="Starting k3s v1.36.2+k3s1""#,
    r#"level=info msg="Waiting for API server to become available""#,
    r#"level=info msg="Waiting for cloud-controller-manager privileges to become available""#,
    r#"level=info msg="Waiting for untainted node""#,
    r#"level=info msg="Waiting for control-plane node agent startup""#,
    r#"level=info msg="Waiting to retrieve kube-proxy configuration; server is not ready: https://127.0.0.1:6443/v1-k3s/readyz: 500 Internal Server Error""#,
    r#"level=info msg="Waiting to retrieve agent configuration; server is not ready: https://127.0.0.1:6443/v1-k3s/serving-kubelet.crt: 503 Service Unavailable""#,
    r#"level=info msg="Waiting for containerd startup: rpc error: code = Unimplemented desc = unknown service runtime.v1.RuntimeService""#,
    r#"level=info msg="Importing images from /var/lib/rancher/k3s/agent/images/k3s-airgap-images-amd64.tar.zst""#,
    r#"level=warning msg="Unknown flag --node_ip found in config.yaml, skipping""#,
    r#"level=warning msg="Failed to find cpuset cgroup, you may need to add "cgroup_enable=cpuset" to your linux cmdline (/boot/cmdline.txt on a Raspberry Pi)""#,
    r#"W1127 05:00:00.000000    1234 options.go:1] unknown flag: --old is ignored"#,
    r#"I1127 05:00:00.000000    1234 server.go:1] "Reserved memory" msg="no space left on device is not what this is""#,
    r#"level=info msg="k3s is up and running""#,
];

const BOOT: &str =
    "time=\"2026-11-27T05:00:00Z\" level=info msg=\"Starting k3s v1.36.2+k3s1 (0000000)\"\n";

fn code(log: &str) -> Option<&'static str> {
    classify(log).map(|s| s.cause.code)
}

#[test]
fn every_fixture_gets_its_code_also_among_warnings() {
    for (expected, line) in FIXTURES {
        let log = format!(
            "{BOOT}time=\"2026-11-27T05:00:01Z\" {line}\nlevel=info msg=\"later chatter\"\n"
        );
        assert_eq!(code(&log), Some(*expected), "{line}");
        for (_, weak) in WEAK {
            assert_eq!(
                code(&format!("{weak}\n{log}{weak}\n")),
                Some(*expected),
                "{line} beside {weak}"
            );
        }
    }
}

#[test]
fn every_code_is_explained_and_every_entry_has_a_next_step() {
    let explained = include_str!("../../cmd/explain.md");
    for (_, cause) in TABLES.into_iter().flatten() {
        assert!(explained.contains(&format!("\n## {}\n", cause.code)), "{}", cause.code);
        for wait in ["longer", "--timeout"] {
            assert!(!cause.fix.contains(wait), "{}", cause.fix);
        }
        assert!(!cause.fix.is_empty() && !cause.fix.ends_with('.') && !cause.what.ends_with('.'));
    }
    for word in [START_LOOP, "START_TIMEOUT"] {
        assert!(explained.contains(&format!("\n## {word}\n")), "{word}");
    }
}

#[test]
fn warnings_and_chatter_have_no_code() {
    let mut all = BOOT.to_owned();
    for (expected, line) in WEAK {
        assert_eq!(classify(line), None, "{line}");
        assert_eq!(related_warning(line).map(|s| s.cause.code), Some(*expected), "{line}");
        all.push_str(&format!("{line}\n"));
    }
    for line in HARMLESS {
        assert_eq!(classify(line), None, "{line}");
        all.push_str(&format!("{line}\n"));
    }
    let dead = UnitHealth {
        restarts: 9,
        restarts_during_wait: 9,
        held: Duration::from_secs(300),
        running: false,
        failed: false,
    };
    assert_eq!((classify(&all), final_failure(&all, 0, dead)), (None, None));
}

#[test]
fn what_the_process_said_as_it_ended_comes_before_what_it_said_beside() {
    let log = "level=error msg=\"Remotedialer proxy error\" error=\"not authorized\"\n\
               level=error msg=\"Shutdown request received: \\\"containerd exited: exit status 1\\\"\"\n\
               level=fatal msg=\"listen tcp 127.0.0.1:10010: bind: address already in use\"\n\
               level=warning msg=\"Failed to load kernel module br_netfilter with modprobe\"\n";
    assert_eq!(code(log), Some("PORT_IN_USE"));
    let part = "level=error msg=\"Remotedialer proxy error\" error=\"401 Unauthorized\"\n\
                level=error msg=\"Shutdown request received: \\\"kubelet exited: something of its own\\\"\"\n";
    assert_eq!(code(part), Some("KUBELET_EXITS"));
}

/// A unit that is not running: its restarts, those during the wait, and how long its cause has
/// stood.
fn health(restarts: u32, restarts_during_wait: u32, held: u64) -> UnitHealth {
    UnitHealth {
        running: false,
        failed: false,
        restarts,
        restarts_during_wait,
        held: Duration::from_secs(held),
    }
}

fn fatal(what: &str, times: usize) -> String {
    format!("{BOOT}level=fatal msg=\"Error: {what}\"\n").repeat(times)
}

fn wait(what: &str, times: usize) -> String {
    let line = "level=info msg=\"Waiting to retrieve agent configuration; server is not ready: ";
    format!("{line}{what}\"\n").repeat(times)
}

/// Its name, the journal, the unit, and the code that ends the wait.
type WaitCase = (&'static str, String, UnitHealth, Option<&'static str>);

/// Units that ended.
fn exit_cases() -> Vec<WaitCase> {
    vec![
        (
            "a setting that is wrong, the second time",
            fatal("invalid cluster-cidr x", 2),
            health(2, 2, 6),
            Some("K3S_SETTING_INVALID"),
        ),
        ("the same after one death", fatal("invalid cluster-cidr x", 1), health(1, 1, 3), None),
        ("a port, after one death", fatal("address already in use", 1), health(1, 1, 30), None),
        ("a port, after two deaths", fatal("address already in use", 2), health(2, 2, 30), None),
        (
            "a port, after three",
            fatal("address already in use", 3),
            health(3, 3, 16),
            Some("PORT_IN_USE"),
        ),
        (
            "deaths that systemd counted before this wait",
            fatal("address already in use", 1),
            health(40, 0, 3),
            None,
        ),
        (
            "the same, and three more",
            fatal("address already in use", 3),
            health(43, 0, 16),
            Some("PORT_IN_USE"),
        ),
        ("an unknown cause, after two", fatal("planted trouble 4711", 2), health(2, 2, 10), None),
        (
            "an unknown cause, after three",
            fatal("planted trouble 4711", 3),
            health(3, 3, 16),
            Some(START_LOOP),
        ),
        (
            "systemd's word alone",
            "k3s.service: Main process exited, code=exited, status=1/FAILURE\n".repeat(3),
            health(3, 3, 0),
            Some(START_LOOP),
        ),
    ]
}

/// Units that said nothing, that stay alive with a refusal, or whose trouble may pass.
fn other_cases() -> Vec<WaitCase> {
    let refused = "\\\"overlayfs\\\" snapshotter cannot be enabled for \\\"/x\\\": failed to mount overlay: invalid argument";
    vec![
        ("nothing said at all", BOOT.repeat(9), health(9, 9, 0), None),
        (
            "refused by the snapshotter, alive",
            wait(refused, 1),
            health(0, 0, 10),
            Some("SNAPSHOTTER_REFUSED"),
        ),
        ("only just", wait(refused, 1), health(0, 0, 3), None),
        (
            "it went on",
            wait(refused, 1) + "level=info msg=\"Running containerd -c x\"\n",
            health(0, 0, 60),
            None,
        ),
        (
            "a token refused for a moment",
            wait("https://127.0.0.1:6444/v1-k3s/x: 401 Unauthorized", 3),
            health(0, 0, 15),
            None,
        ),
        (
            "and for good",
            wait("https://127.0.0.1:6444/v1-k3s/x: 401 Unauthorized", 5),
            health(0, 0, 25),
            Some("JOIN_TOKEN_REJECTED"),
        ),
        (
            "a datastore that is no database, asked again and again",
            "level=error msg=\"Failed to ping database connection: file is not a database\"\n"
                .repeat(12),
            health(0, 0, 11),
            Some("DATASTORE_DAMAGED"),
        ),
        (
            "one that is away",
            "level=error msg=\"Failed to ping database connection: connection refused\"\n"
                .repeat(99),
            health(0, 0, 99),
            None,
        ),
        (
            "a server that is away",
            wait("failed to get CA certs: Get \\\"https://x/cacerts\\\": EOF", 50),
            health(0, 0, 280),
            None,
        ),
        (
            "also where k3s dies of it",
            fatal("failed to get CA certs: Get \\\"https://x/cacerts\\\": EOF", 50),
            health(50, 50, 280),
            None,
        ),
        ("a datastore that is slow", fatal("leaderelection lost", 9), health(9, 9, 280), None),
        (
            "a kubelet that ends with a time-out",
            fatal("kubelet exited: x: context deadline exceeded", 9),
            health(9, 9, 280),
            None,
        ),
    ]
}

#[test]
fn when_a_wait_ends_and_when_it_does_not() {
    for (name, log, health, expected) in exit_cases().into_iter().chain(other_cases()) {
        assert_eq!(
            final_failure(&log, exit_count(&log, health), health).map(|s| s.cause.code),
            expected,
            "{name}"
        );
    }
    // what runs again is not judged by what it said before
    let up = UnitHealth {
        running: true,
        failed: false,
        restarts: 5,
        restarts_during_wait: 2,
        held: Duration::from_secs(60),
    };
    assert_eq!(final_failure(&fatal("address already in use", 5), 2, up), None);
    // what systemd gives up is over at once
    let given_up = UnitHealth { failed: true, ..health(0, 0, 0) };
    assert_eq!(
        final_failure("error: agent.toml: unknown key `x` [CONFIG_INVALID]\n", 0, given_up)
            .map(|s| s.cause.code),
        Some(START_LOOP)
    );
    assert_eq!(
        final_failure(&fatal("leaderelection lost", 1), 0, given_up).map(|s| s.cause.code),
        Some("DISK_FSYNC_SLOW")
    );
}

#[test]
fn alike_lines_stand_once_with_their_number() {
    let mut log = String::new();
    for n in 0..20 {
        log.push_str(&format!(
            "time=\"2026-11-27T05:00:{n:02}Z\" level=fatal msg=\"Error: pid {n} planted trouble\"\n"
        ));
        log.push_str(&format!(
            "E1127 05:00:{n:02}.000{n:03}    12{n:02} server.go:9] failed to do it\n"
        ));
    }
    let told = notable_lines(&log, 20);
    assert_eq!(told.len(), 2, "{told:#?}");
    assert_eq!(told[0], "level=fatal msg=\"Error: pid 19 planted trouble\" (20 times)");
    assert!(told[1].ends_with("failed to do it (20 times)"), "{told:?}");
    assert_eq!(notable_lines("level=info msg=\"Starting\"\n", 20), ["level=info msg=\"Starting\""]);
}
