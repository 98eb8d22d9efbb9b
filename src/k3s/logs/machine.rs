//! Known failures that come from the machine, the datastore and the server: what k3s and the parts that it carries print, what it means, and what to do.
//!
//! Messages are quoted from k3s 1.33 to 1.36 (the file of k3s-io/k3s, kubernetes, kine, flannel, etcd or containerd stands beside
//! each group), without what differs from run to run and without quotes, which logrus escapes.

use super::Cause;
use super::Weight::{Certain, Fatal, Part, Passing, Weak};
use super::cause;

const SETTING: &str =
    "correct it in the [k3s] table, or in /etc/rancher/k3s/config.yaml.d where it came from there";
const MODULES: &str = "install your distribution's extra kernel modules, or a kernel that has it";
const RESTORE: &str = "restore /var/lib/rancher/k3s/server/db from a copy";
const CMDLINE: &str =
    "append `cgroup_memory=1 cgroup_enable=memory` to the kernel command line and reboot";
const DATABASE: &str = "correct datastore-endpoint in the [k3s] table; what stands in it for a password is percent-encoded";

/// Message fragments, all of which must stand in one line, in any case, and what they mean. First match wins.
pub(super) const TABLE: &[(&[&str], Cause)] = &[
    // pkg/cgroups/cgroups_linux.go, pkg/daemons/agent/agent_linux.go
    (
        &["failed to find memory cgroup"],
        cause("CGROUP_MEMORY_OFF", Certain, "the memory cgroup controller is off", CMDLINE),
    ),
    (
        &["failed to find cpu", "cgroup (v2)"],
        cause(
            "CGROUP_CONTROLLERS",
            Certain,
            "a cgroup controller is off",
            "let the host delegate cpu, cpuset and memory; in a container, update its host",
        ),
    ),
    (
        &["pids cgroup controller not found"],
        cause(
            "CGROUP_CONTROLLERS",
            Certain,
            "the pids cgroup controller is off",
            "boot a kernel that has it",
        ),
    ),
    (
        &["Following Cgroup subsystem not mounted"],
        cause(
            "CGROUP_CONTROLLERS",
            Certain,
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
            Certain,
            "the host does not allow overlay mounts in this container",
            "turn nesting on for it",
        ),
    ),
    (
        &["snapshotter cannot be enabled", "no such device"],
        cause("KMOD_MISSING", Certain, "the kernel has no overlayfs", MODULES),
    ),
    (
        &["snapshotter cannot be enabled", "d_type"],
        cause(
            "SNAPSHOTTER_REFUSED",
            Certain,
            "the file system below /var/lib/rancher was made without d_type",
            "make it again with `mkfs.xfs -n ftype=1`, or use ext4",
        ),
    ),
    (
        &["snapshotter cannot be enabled"],
        cause(
            "SNAPSHOTTER_REFUSED",
            Certain,
            "the file system below /var/lib/rancher does not carry the snapshotter",
            "put /var/lib/rancher on ext4 or xfs, or set snapshotter = \"native\" in the [k3s] table",
        ),
    ),
    (
        &["failed to create overlay", "operation not permitted"],
        cause(
            "LXC_FEATURES",
            Certain,
            "the host does not allow overlay mounts in this container",
            "turn nesting on for it",
        ),
    ),
    (
        &["default runtime", "was not found"],
        cause(
            "K3S_SETTING_INVALID",
            Certain,
            "default-runtime names one that is not installed",
            SETTING,
        ),
    ),
    (
        &["/dev/kmsg", "no such file"],
        cause(
            "LXC_FEATURES",
            Certain,
            "/dev/kmsg is missing in this container",
            "let the host bind /dev/kmsg into it",
        ),
    ),
    (
        &["/dev/kmsg", "operation not permitted"],
        cause(
            "LXC_FEATURES",
            Certain,
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
    // kubernetes cmd/kube-proxy/app/server_linux.go, pkg/agent/netpol/netpol.go, flannel pkg/trafficmngr
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
    // kine pkg/drivers, pkg/util/url.go
    (
        &["invalid datastore endpoint"],
        cause(
            "DATASTORE_URL_INVALID",
            Certain,
            "datastore-endpoint is no URL of a datastore",
            DATABASE,
        ),
    ),
    (
        &["failed to parse datastore DSN URL"],
        cause(
            "DATASTORE_URL_INVALID",
            Certain,
            "datastore-endpoint is no URL of a datastore",
            DATABASE,
        ),
    ),
    (
        &["creating storage endpoint", "unknown driver"],
        cause(
            "DATASTORE_URL_INVALID",
            Certain,
            "datastore-endpoint names a kind of datastore that k3s does not have",
            DATABASE,
        ),
    ),
    (
        &["password authentication failed for user"],
        cause("DATASTORE_REFUSED", Certain, "the database refuses user or password", DATABASE),
    ),
    (
        &["Error 1045", "Access denied for user"],
        cause("DATASTORE_REFUSED", Certain, "the database refuses user or password", DATABASE),
    ),
    (
        &["no pg_hba.conf entry for host"],
        cause(
            "DATASTORE_REFUSED",
            Fatal,
            "the database does not let this machine in",
            "add this machine to pg_hba.conf there",
        ),
    ),
    (
        &["permission denied for schema"],
        cause(
            "DATASTORE_REFUSED",
            Fatal,
            "the database user may not make tables",
            "make it the owner of its database",
        ),
    ),
    (
        &["unable to open database file"],
        cause(
            "DATASTORE_UNOPENED",
            Fatal,
            "the datastore's file cannot be opened",
            "check /var/lib/rancher/k3s/server/db: its mount, owner and mode",
        ),
    ),
    (
        &["attempt to write a readonly database"],
        cause(
            "DISK_READ_ONLY",
            Fatal,
            "the datastore cannot be written",
            "mount the disk of /var/lib/rancher writable",
        ),
    ),
    (
        &["database disk image is malformed"],
        cause("DATASTORE_DAMAGED", Certain, "the datastore is damaged", RESTORE),
    ),
    (
        &["file is not a database"],
        cause("DATASTORE_DAMAGED", Certain, "the datastore is damaged", RESTORE),
    ),
    (
        &["database is locked"],
        cause(
            "DATASTORE_LOCKED",
            Fatal,
            "another process holds the datastore",
            "`fuser /var/lib/rancher/k3s/server/db/state.db` names it; stop it",
        ),
    ),
    // pkg/etcd/etcd.go, pkg/cluster/managed.go, etcd server/etcdserver
    (
        &["duplicate node name found"],
        cause(
            "NODE_NAME_TAKEN",
            Certain,
            "the cluster has another server of this name",
            "choose another --node-name, or remove the former member",
        ),
    ),
    (
        &["tombstone file has been detected"],
        cause(
            "ETCD_MEMBER_REMOVED",
            Certain,
            "this server was removed from its cluster",
            "move /var/lib/rancher/k3s/server/db away, then join again",
        ),
    ),
    (
        &["permanently removed from the cluster"],
        cause(
            "ETCD_MEMBER_REMOVED",
            Certain,
            "this server was removed from its cluster",
            "move /var/lib/rancher/k3s/server/db away, then join again",
        ),
    ),
    (
        &["has already been bootstrapped"],
        cause(
            "ETCD_MEMBER_STALE",
            Certain,
            "etcd knows this member, but its data is not here",
            "remove the member on another server, then join again",
        ),
    ),
    (
        &["etcd cluster membership was previously reset"],
        cause(
            "ETCD_RESET_DONE",
            Certain,
            "cluster-reset is still set",
            "take cluster-reset out of the settings",
        ),
    ),
    (
        &["etcd: snapshot path"],
        cause(
            "ETCD_SNAPSHOT_UNREADABLE",
            Certain,
            "the snapshot to restore is not a file",
            "correct cluster-reset-restore-path",
        ),
    ),
    (
        &["failed to read WAL, cannot be repaired"],
        cause("DATASTORE_DAMAGED", Certain, "etcd's log is damaged", RESTORE),
    ),
    (
        &["found data inconsistency with peers"],
        cause(
            "DATASTORE_DAMAGED",
            Certain,
            "etcd's data differs from the other servers'",
            "remove this member, move its data away, then join again",
        ),
    ),
    (
        &["mvcc: database space exceeded"],
        cause(
            "ETCD_FULL",
            Fatal,
            "etcd's database is full",
            "compact and defragment it, then disarm its alarm",
        ),
    ),
    (
        &["failed to migrate content from sqlite to etcd"],
        cause(
            "DATASTORE_DAMAGED",
            Fatal,
            "SQLite's content cannot be moved to etcd",
            "look at the line; the SQLite file is untouched",
        ),
    ),
    (
        &["too many learner members"],
        cause(
            "ETCD_BUSY",
            Passing,
            "another server is still joining etcd",
            "wait until it is done",
        ),
    ),
    (
        &["etcdserver: unhealthy cluster"],
        cause("ETCD_BUSY", Passing, "etcd's members do not all answer", "check the other servers"),
    ),
    (
        &["leaderelection lost"],
        cause(
            "DISK_FSYNC_SLOW",
            Passing,
            "the datastore answered too late",
            "use a local SSD for /var/lib/rancher",
        ),
    ),
    // the machine
    (
        &["address already in use"],
        cause(
            "PORT_IN_USE",
            Fatal,
            "a port that k3s needs is taken",
            "`ss -ltnp` names the program; stop it",
        ),
    ),
    (
        &["no space left on device"],
        cause("DISK_LOW", Fatal, "a disk is full", "free space under /var/lib/rancher"),
    ),
    (
        &["read-only file system"],
        cause(
            "DISK_READ_ONLY",
            Fatal,
            "a disk is mounted read-only",
            "mount it writable; `dmesg` tells when the kernel did it",
        ),
    ),
    (
        &["input/output error"],
        cause(
            "DISK_FAILING",
            Fatal,
            "a disk reports errors",
            "look at `dmesg` and at the disk's health",
        ),
    ),
    (
        &["too many open files"],
        cause(
            "INOTIFY_LIMIT",
            Fatal,
            "a limit on open files or watches is reached",
            "raise fs.inotify.max_user_instances (sysctl), for example to 512",
        ),
    ),
    (
        &["cannot allocate memory"],
        cause("MEMORY_LOW", Fatal, "memory is used up", "free some, or add swap or memory"),
    ),
    (
        &["killed by the OOM killer"],
        cause(
            "MEMORY_LOW",
            Fatal,
            "the kernel ended k3s for want of memory",
            "free some, or add swap or memory",
        ),
    ),
    (
        &["status=4/ILL"],
        cause(
            "CPU_UNSUPPORTED",
            Certain,
            "this processor lacks an instruction",
            "install the build for this machine's architecture",
        ),
    ),
    // systemd, and cmd/k3s/main_linux.go
    (
        &["Failed at step EXEC", "Exec format error"],
        cause(
            "K3S_NOT_RUNNABLE",
            Certain,
            "/usr/local/bin/k3s is built for another machine",
            "install the build for this machine's architecture",
        ),
    ),
    (
        &["/usr/local/bin/k3s", "Exec format error"],
        cause(
            "K3S_NOT_RUNNABLE",
            Certain,
            "/usr/local/bin/k3s is built for another machine",
            "install the build for this machine's architecture",
        ),
    ),
    (
        &["/usr/local/bin/k3s", "Permission denied"],
        cause(
            "K3S_NOT_RUNNABLE",
            Certain,
            "/usr/local/bin/k3s may not be run",
            "mount /usr/local without noexec; with SELinux: restorecon /usr/local/bin/k3s",
        ),
    ),
    (
        &["/usr/local/bin/k3s", "No such file or directory"],
        cause(
            "K3S_NOT_RUNNABLE",
            Certain,
            "/usr/local/bin/k3s is not there",
            "look at what takes it away",
        ),
    ),
    (
        &["k3s-server", "executable file not found"],
        cause(
            "DATA_NOEXEC",
            Certain,
            "no program runs below /var/lib/rancher",
            "mount it without noexec; with SELinux: install k3s-selinux",
        ),
    ),
    (
        &["exec /var/lib/rancher", "permission denied"],
        cause(
            "DATA_NOEXEC",
            Certain,
            "no program runs below /var/lib/rancher",
            "mount it without noexec; with SELinux: install k3s-selinux",
        ),
    ),
    // pkg/agent/containerd/containerd.go, pkg/executor/embed/embed.go, pkg/agent/run.go: which part it was
    (
        &["containerd exited"],
        cause(
            "CONTAINERD_EXITS",
            Part,
            "containerd ends again and again",
            "look at /var/lib/rancher/k3s/agent/containerd/containerd.log",
        ),
    ),
    (
        &["failed to start container runtime"],
        cause(
            "CONTAINERD_EXITS",
            Part,
            "containerd does not start",
            "look at /var/lib/rancher/k3s/agent/containerd/containerd.log",
        ),
    ),
    (
        &["kubelet exited"],
        cause(
            "KUBELET_EXITS",
            Part,
            "the kubelet ends again and again",
            "correct what the line names",
        ),
    ),
    (
        &["kube-proxy exited"],
        cause(
            "KUBE_PROXY_EXITS",
            Part,
            "kube-proxy ends again and again",
            "correct what the line names",
        ),
    ),
    (
        &["flannel exited"],
        cause(
            "FLANNEL_EXITS",
            Part,
            "the pod network does not come up",
            "correct what the line names",
        ),
    ),
    (
        &["failed to start networking"],
        cause(
            "FLANNEL_EXITS",
            Part,
            "the pod network does not come up",
            "correct what the line names",
        ),
    ),
    (
        &["controller-manager exited"],
        cause(
            "CONTROLLER_EXITS",
            Part,
            "a controller ends again and again",
            "correct what the line names",
        ),
    ),
    (
        &["scheduler exited"],
        cause(
            "CONTROLLER_EXITS",
            Part,
            "the scheduler ends again and again",
            "correct what the line names",
        ),
    ),
    (
        &["apiserver exited"],
        cause(
            "APISERVER_EXITS",
            Part,
            "the API server ends again and again",
            "correct what the line names",
        ),
    ),
    (
        &["creating storage endpoint"],
        cause(
            "DATASTORE_UNOPENED",
            Part,
            "the datastore cannot be opened",
            "correct what the line names",
        ),
    ),
    (
        &["start managed database"],
        cause("DATASTORE_UNOPENED", Part, "etcd does not start", "correct what the line names"),
    ),
    (
        &["extracting data"],
        cause(
            "K3S_UNPACKED",
            Part,
            "k3s cannot unpack itself into /var/lib/rancher/k3s/data",
            "check space, mount and mode of /var/lib/rancher",
        ),
    ),
    (
        &["panic: "],
        cause(
            "K3S_PANIC",
            Part,
            "k3s breaks off with a fault of its own",
            "try another --k3s-version, and report the lines to k3s-io/k3s",
        ),
    ),
    // what may come right by itself: it names the cause when time is up, and never ends a wait
    (
        &["connection refused", "/cacerts"],
        cause(
            "SERVER_UNREACHABLE",
            Passing,
            "the server refuses connections",
            "check that k3s runs there and the port is 6443",
        ),
    ),
    (
        &["context deadline exceeded", "/cacerts"],
        cause(
            "SERVER_UNREACHABLE",
            Passing,
            "the server does not answer",
            "check the address and firewalls for 6443/tcp",
        ),
    ),
    (
        &["no route to host", "/cacerts"],
        cause(
            "SERVER_UNREACHABLE",
            Passing,
            "there is no way to the server",
            "check the address, routes and firewalls for 6443/tcp",
        ),
    ),
    (
        &["failed to get CA certs"],
        cause(
            "SERVER_UNREACHABLE",
            Passing,
            "the server does not answer",
            "check that k3s runs there, the address, and firewalls for 6443/tcp",
        ),
    ),
    (
        &["failed to ping database connection"],
        cause(
            "DATASTORE_UNREACHABLE",
            Passing,
            "the database does not answer",
            "check that it runs, and datastore-endpoint",
        ),
    ),
    // worth saying beside a cause, and none of itself
    (
        &["failed to load kernel module"],
        cause("KMOD_MISSING", Weak, "a kernel module could not be loaded", MODULES),
    ),
    (
        &["toomanyrequests"],
        cause(
            "REGISTRY_RATE_LIMIT",
            Weak,
            "the image registry limits downloads",
            "wait, or use --registries with a mirror",
        ),
    ),
    (
        &["failed to pull", "no such host"],
        cause(
            "DNS_BROKEN",
            Weak,
            "names cannot be resolved, so images cannot be pulled",
            "check /etc/resolv.conf, or use --offline-dir",
        ),
    ),
    (
        &["failed to pull image"],
        cause(
            "IMAGE_PULL_FAILED",
            Weak,
            "an image cannot be pulled",
            "check the way to the registry, or use --offline-dir",
        ),
    ),
    (
        &["apply request took too long"],
        cause(
            "DISK_FSYNC_SLOW",
            Weak,
            "the data disk is slow",
            "use a local SSD for /var/lib/rancher",
        ),
    ),
    (
        &["Slow SQL"],
        cause(
            "DISK_FSYNC_SLOW",
            Weak,
            "the data disk is slow",
            "use a local SSD for /var/lib/rancher",
        ),
    ),
];
