//! Kernel, programs, file systems, ports, and settings of k3s beside ours.

use super::*;

pub(super) const ROWS: &[Row] = &[
    // kernel
    (
        "k3s#11166",
        "KMOD_MISSING",
        |c| {
            public_address(c);
            c.facts.modules.available.remove("wireguard");
        },
        |c| {
            c.facts.modules.available.remove("wireguard");
        },
    ),
    (
        "k3s#9251: chosen by hand",
        "KMOD_MISSING",
        |c| {
            k3s(c, "flannel-backend", "wireguard-native");
            c.facts.modules.available.remove("wireguard");
        },
        |c| {
            public_address(c);
            k3s(c, "flannel-backend", "host-gw");
            c.facts.modules.available.remove("wireguard");
            c.facts.modules.available.remove("vxlan");
        },
    ),
    (
        "chosen in a file beside ours",
        "KMOD_MISSING",
        |c| {
            beside(c, "config.yaml", "flannel-backend: wireguard-native\n");
            c.facts.modules.available.remove("wireguard");
        },
        |c| {
            beside(c, "config.yaml", "flannel-backend: none\n");
            c.facts.modules.available.remove("vxlan");
        },
    ),
    // programs and accounts
    (
        "k3s#3406",
        "TOOL_MISSING",
        |c| c.facts.apparmor = true,
        |c| {
            c.facts.apparmor = true;
            c.facts.programs.insert("apparmor_parser".into(), "/sbin/apparmor_parser".into());
        },
    ),
    (
        "no useradd",
        "TOOL_MISSING",
        |c| {
            c.facts.programs.remove("useradd");
        },
        |c| {
            c.facts.programs.remove("useradd");
            c.role = NodeRole::Worker;
        },
    ),
    (
        "root under our name",
        "ACCOUNT_CONFLICT",
        |c| {
            c.facts.account.user =
                Some(User { uid: 0, gid: 0, shell: "/usr/sbin/nologin".into(), ..User::default() })
        },
        |c| c.facts.account.gid = Some(997),
    ),
    (
        "a user of LDAP",
        "ACCOUNT_CONFLICT",
        |c| {
            c.facts.account.user = Some(User {
                uid: 997,
                gid: 997,
                shell: "/usr/sbin/nologin".into(),
                from_directory: true,
            })
        },
        |c| {
            c.facts.account.user =
                Some(User { uid: 997, gid: 997, shell: "/bin/false".into(), ..User::default() })
        },
    ),
    // file systems
    (
        "k3s#3266",
        "SNAPSHOTTER_UNFIT",
        |c| c.facts.mounts[0].fs_type = "nfs4".into(),
        |c| c.facts.mounts[0].fs_type = "btrfs".into(),
    ),
    (
        "k3s-ansible#230",
        "SNAPSHOTTER_UNFIT",
        |c| c.facts.mounts[0].fs_type = "overlay".into(),
        |c| c.facts.mounts[1].fs_type = "overlay".into(),
    ),
    (
        "XFS of old",
        "SNAPSHOTTER_UNFIT",
        |c| {
            (c.facts.mounts[0].fs_type, c.facts.mounts[0].entry_types) = ("xfs".into(), Some(false))
        },
        |c| (c.facts.mounts[0].fs_type, c.facts.mounts[0].entry_types) = ("xfs".into(), Some(true)),
    ),
    (
        "a snapshotter of another file system",
        "SNAPSHOTTER_UNFIT",
        |c| k3s(c, "snapshotter", "btrfs"),
        |c| {
            k3s(c, "snapshotter", "btrfs");
            c.facts.mounts[0].fs_type = "btrfs".into();
        },
    ),
    (
        "noexec for our own program",
        "MOUNT_NOEXEC",
        |c| c.facts.mounts[1].no_exec = true,
        |c| c.facts.mounts[2].no_exec = true,
    ),
    // ports
    (
        "containerd's streams",
        "PORT_IN_USE",
        |c| held(c, "tcp", 10010, "127.0.0.1"),
        |c| held(c, "tcp", 10010, "10.0.0.5"),
    ),
    (
        "containerd elsewhere",
        "PORT_IN_USE",
        |c| held(c, "tcp", 10010, "0.0.0.0"),
        |c| {
            held(c, "tcp", 10010, "0.0.0.0");
            k3s(c, "container-runtime-endpoint", "unix:///run/crio/crio.sock");
        },
    ),
    (
        "another port for the API",
        "PORT_IN_USE",
        |c| {
            held(c, "tcp", 7443, "0.0.0.0");
            k3s(c, "https-listen-port", "7443");
        },
        |c| {
            held(c, "tcp", 6443, "0.0.0.0");
            k3s(c, "https-listen-port", "7443");
        },
    ),
    (
        "etcd",
        "PORT_IN_USE",
        |c| {
            held(c, "tcp", 2380, "0.0.0.0");
            k3s(c, "cluster-init", true);
        },
        |c| held(c, "tcp", 2380, "0.0.0.0"),
    ),
    (
        "a worker's load balancer",
        "PORT_IN_USE",
        |c| {
            held(c, "tcp", 6444, "127.0.0.1");
            c.role = NodeRole::Worker;
        },
        |c| {
            held(c, "tcp", 6443, "127.0.0.1");
            c.role = NodeRole::Worker;
        },
    ),
    (
        "the pod network's port follows its kind",
        "PORT_IN_USE",
        |c| {
            held(c, "udp", 51820, "0.0.0.0");
            public_address(c);
        },
        |c| {
            held(c, "udp", 8472, "0.0.0.0");
            k3s(c, "flannel-backend", "host-gw");
        },
    ),
    // settings beside ours
    (
        "data elsewhere",
        "K3S_CONFIG_CLASH",
        |c| beside(c, "config.yaml", "data-dir: /mnt/k3s\n"),
        |c| beside(c, "config.yaml", "data-dir: /var/lib/rancher/k3s/\n"),
    ),
    (
        "a server's setting on a worker",
        "K3S_CONFIG_CLASH",
        |c| {
            beside(c, "90-mine.yaml", "cluster-cidr: 10.52.0.0/16\n");
            c.role = NodeRole::Worker;
        },
        |c| {
            beside(c, "90-mine.yaml", "snapshotter: native\nresolv-conf: /etc/resolv.pods.conf\n");
            c.role = NodeRole::Worker;
        },
    ),
    (
        "etcd's setting on a worker",
        "K3S_CONFIG_CLASH",
        |c| {
            beside(c, "10-mine.yaml", "etcd-expose-metrics: true\n");
            c.role = NodeRole::Worker;
        },
        |c| beside(c, "10-mine.yaml", "etcd-expose-metrics: true\n"),
    ),
    (
        "a list that replaces ours",
        "K3S_CONFIG_CLASH",
        |c| {
            beside(c, "90-mine.yaml", "disable: [servicelb]\n");
            c.options.components = vec!["ingress".into()];
        },
        |c| {
            beside(c, "90-mine.yaml", "disable+: [servicelb]\n");
            c.options.components = vec!["ingress".into()];
        },
    ),
    (
        "k3s of somebody else",
        "K3S_FOREIGN",
        |c| c.facts.k3s.foreign = vec!["/etc/rancher/k3s/config.yaml exists".into()],
        |c| beside(c, "90-mine.yaml", "debug: true\n"),
    ),
];
