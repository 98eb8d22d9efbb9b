//! Each code with a machine that raises it and a near miss that does not.

use super::*;

/// Code, what raises it, and what comes near without raising it.
pub(super) const ROWS: &[(&str, Change, Change)] = &[
    ("NOT_ROOT", |c| c.facts.uid = 1000, |c| c.facts.uid = 0),
    ("NO_SYSTEMD", |c| c.facts.init = "init".into(), |c| c.facts.systemd = 0),
    (
        "ARCH_UNSUPPORTED",
        |c| c.facts.machine = "riscv64".into(),
        |c| c.facts.machine = "aarch64".into(),
    ),
    (
        "K3S_FOREIGN",
        |c| c.facts.k3s.foreign = vec!["unit k3s.service".into()],
        |c| {
            c.facts.k3s.foreign = vec!["unit k3s.service".into()];
            c.facts.k3s.installed_role = Some(NodeRole::Server);
        },
    ),
    (
        "K3S_CONFIG_INVALID",
        |c| {
            c.facts.k3s.files.push(SettingsFile {
                fault: Some("it is not valid YAML".into()),
                ..SettingsFile::default()
            })
        },
        |c| beside(c, "90-mine.yaml", "# nothing yet\n"),
    ),
    (
        "K3S_CONFIG_CLASH",
        |c| beside(c, "90-mine.yaml", "node-name: other\n"),
        |c| beside(c, "90-mine.yaml", "node-name: VM1\nkubelet-arg: [a=b]\n"),
    ),
    ("K3S_ENVIRONMENT", |c| c.facts.k3s.environment = vec!["K3S_DATA_DIR".into()], |_| {}),
    ("K3S_TOO_OLD", |c| c.version = "v1.27.9+k3s1", |c| c.version = "v1.28.0+k3s1"),
    ("TENANTS_NEED_1_30", |c| c.version = "v1.29.9+k3s1", |c| c.version = "v1.30.0+k3s1"),
    (
        "K3S_DOWNGRADE",
        |c| {
            c.facts.k3s.version = Some("v1.36.3+k3s1".into());
            c.facts.k3s.installed_role = Some(NodeRole::Server);
        },
        |c| {
            c.facts.k3s.version = Some("v1.36.2+k3s1".into());
            c.facts.k3s.installed_role = Some(NodeRole::Server);
        },
    ),
    (
        "DATA_TOKEN_CONFLICT",
        |c| c.facts.k3s.server_data = true,
        |c| {
            c.facts.k3s.server_data = true;
            c.facts.k3s.server_token = true;
        },
    ),
    ("OTHER_KUBERNETES", |c| c.facts.other_kubernetes = vec!["microk8s".into()], |_| {}),
    (
        "CPU_LOW",
        |c| c.facts.cpus = 1,
        |c| {
            c.facts.cpus = 1;
            c.role = NodeRole::Worker;
        },
    ),
    (
        "MEMORY_LOW",
        |c| c.facts.memory_bytes = GIB,
        |c| {
            c.facts.memory_bytes = GIB / 2;
            c.role = NodeRole::Worker;
        },
    ),
    (
        "COMPONENTS_DO_NOT_FIT",
        |c| c.facts.memory_bytes = 1000 << 20,
        |c| {
            c.facts.memory_bytes = 1000 << 20;
            c.options.components = vec!["none".into()];
        },
    ),
    ("SWAP_ON", |c| c.facts.swap_bytes = GIB, |c| c.facts.swap_bytes = 0),
    (
        "MOUNT_READ_ONLY",
        |c| c.facts.mounts[2].read_only = true,
        |c| c.facts.mounts.iter_mut().for_each(|m| m.mount_point = "/ro".into()),
    ),
    ("MOUNT_NOEXEC", |c| c.facts.mounts[0].no_exec = true, |c| c.facts.mounts[3].no_exec = true),
    (
        "SNAPSHOTTER_UNFIT",
        |c| c.facts.mounts[0].fs_type = "zfs".into(),
        |c| {
            c.facts.mounts[0].fs_type = "zfs".into();
            k3s(c, "snapshotter", "native");
        },
    ),
    (
        "DISK_LOW",
        |c| c.facts.disks.iter_mut().for_each(|d| d.available_bytes = 3 * GIB),
        |c| {
            c.facts.disks.iter_mut().for_each(|d| d.available_bytes = 4 * GIB);
        },
    ),
    (
        "INODES_LOW",
        |c| c.facts.disks.iter_mut().for_each(|d| d.inodes_free = 100),
        |c| {
            // btrfs has no table of inodes
            c.facts.disks.iter_mut().for_each(|d| (d.inodes_free, d.inodes_total) = (0, 0));
        },
    ),
    (
        "DISK_FSYNC_SLOW",
        |c| c.facts.fsync_p99_us = Some(80_000),
        |c| c.facts.fsync_p99_us = Some(20_000),
    ),
    (
        "CLOCK_SKEW",
        |c| c.facts.clock.offset = Some((-31, "the server".into())),
        |c| c.facts.clock.offset = Some((30, "the server".into())),
    ),
    (
        "CGROUP_CONTROLLERS",
        |c| {
            c.facts.cgroup.controllers.remove("pids");
        },
        |c| {
            c.facts.cgroup.controllers.remove("io");
        },
    ),
    (
        "CGROUP_MEMORY_OFF",
        |c| {
            c.facts.cgroup.controllers.remove("memory");
        },
        |c| {
            c.facts.cgroup.controllers.remove("io");
        },
    ),
    (
        "CGROUP_V1_UNSUPPORTED",
        |c| c.facts.cgroup.version = 1,
        |c| {
            c.facts.cgroup.version = 1;
            c.version = "v1.34.6+k3s1";
        },
    ),
    (
        "KMOD_MISSING",
        |c| {
            c.facts.modules.available.remove("vxlan");
        },
        |c| {
            c.facts.modules.available.remove("vxlan");
            c.facts.modules.loaded.insert("vxlan".into());
        },
    ),
    ("LXC_FEATURES", |c| c.facts.container = Some("lxc".into()), |c| c.facts.container = None),
    (
        "SELINUX_POLICY",
        |c| c.facts.selinux.mode = "enforcing".into(),
        |c| {
            c.facts.selinux.mode = "enforcing".into();
            c.facts.selinux.k3s_policy = true;
        },
    ),
    (
        "IPTABLES_BAD",
        |c| c.facts.iptables = Some(Iptables { version: "1.8.2".into(), backend: "nft".into() }),
        |c| {
            c.facts.iptables = Some(Iptables { version: "1.8.2".into(), backend: "legacy".into() });
        },
    ),
    (
        "TOOL_MISSING",
        |c| c.options.api_allow = vec!["10.0.0.0/8".into()],
        |c| {
            c.options.api_allow = vec!["10.0.0.0/8".into()];
            c.facts.programs.insert("nft".into(), "/usr/sbin/nft".into());
        },
    ),
    (
        "ACCOUNT_CONFLICT",
        |c| {
            c.facts.account.user =
                Some(User { uid: 1001, gid: 1001, shell: "/bin/bash".into(), ..User::default() })
        },
        |c| {
            c.facts.account.user = Some(User {
                uid: 997,
                gid: 997,
                shell: "/usr/sbin/nologin".into(),
                ..User::default()
            });
            c.facts.account.gid = Some(997);
        },
    ),
    (
        "TRUST_STORE_MISSING",
        |c| c.facts.trust_store = false,
        |c| {
            c.facts.trust_store = false;
            c.options.offline_dir = Some("/media/k3s".into());
        },
    ),
    (
        "INGRESS_NGINX_RETIRED",
        |c| c.facts.retired_ingress = Some(0),
        |c| c.facts.retired_ingress = None,
    ),
    (
        "TRAEFIK_GOES",
        |c| c.facts.bundled_traefik = true,
        |c| {
            c.facts.bundled_traefik = true;
            c.options.components = vec!["traefik".into()];
        },
    ),
    (
        "HOSTNAME_BAD",
        |c| c.facts.hostname = "my_vm".into(),
        |c| c.facts.hostname = "My-VM.example.com".into(),
    ),
    (
        "HOSTNAME_DEFAULT",
        |c| c.facts.hostname = "raspberrypi".into(),
        |c| c.facts.hostname = "raspberrypi-7".into(),
    ),
    ("ROUTE_NONE", |c| c.facts.routes.clear(), |c| c.facts.routes.truncate(1)),
    (
        "NIC_AMBIGUOUS",
        |c| c.facts.routes.push(Route { metric: 100, ..route("0.0.0.0/0", "eth1") }),
        |c| c.facts.routes.push(Route { metric: 200, ..route("0.0.0.0/0", "eth1") }),
    ),
    (
        "ADDRESS_UNKNOWN",
        |c| c.options.node_ip = vec!["10.0.0.6".into()],
        |c| c.options.node_ip = vec!["10.0.0.5".into()],
    ),
    (
        "ADDRESS_DYNAMIC",
        |c| c.facts.interfaces[0].addresses[0].dynamic = true,
        |c| {
            c.facts.interfaces.push(Interface::new("eth1", &["10.1.0.5/24"]));
            c.facts.interfaces[1].addresses[0].dynamic = true;
        },
    ),
    (
        "CIDR_OVERLAP",
        |c| c.facts.routes.push(route("10.43.1.0/24", "vpn0")),
        |c| {
            // k3s' own
            c.facts.k3s.installed_role = Some(NodeRole::Server);
            c.facts.routes.push(route("10.42.0.0/24", "cni0"));
        },
    ),
    (
        "CIDR_MISFIT",
        |c| k3s(c, "cluster-dns", "10.44.0.10"),
        |c| k3s(c, "cluster-dns", "10.43.0.53"),
    ),
    (
        "DNS_NONE",
        |c| c.facts.resolv_confs.etc = resolv("search example.com\n"),
        |c| {
            c.facts.resolv_confs.etc = None;
            c.facts.resolv_confs.systemd = resolv("nameserver 10.0.0.1\n");
        },
    ),
    (
        "DNS_LOOPBACK",
        |c| c.facts.resolv_confs.etc = resolv("nameserver 127.0.0.53\n"),
        |c| {
            c.facts.resolv_confs.etc = resolv("nameserver 127.0.0.53\n");
            c.facts.resolv_confs.systemd = resolv("nameserver 10.0.0.1\n");
        },
    ),
    (
        "DNS_WILDCARD",
        |c| c.facts.resolv_confs.etc = resolv("nameserver 10.0.0.1\nsearch .\n"),
        |c| c.facts.resolv_confs.etc = resolv("nameserver 10.0.0.1\nsearch example.com.\n"),
    ),
    (
        "DNS_LIMITS",
        |c| {
            c.facts.resolv_confs.etc =
                resolv(&(1..=4).map(|n| format!("nameserver 10.0.0.{n}\n")).collect::<String>())
        },
        |c| {
            c.facts.resolv_confs.etc =
                resolv(&(1..=3).map(|n| format!("nameserver 10.0.0.{n}\n")).collect::<String>())
        },
    ),
    (
        "PORT_IN_USE",
        |c| c.facts.listeners = vec![listener(10250, "0.0.0.0")],
        |c| c.facts.listeners = vec![listener(10251, "0.0.0.0")],
    ),
    (
        "INGRESS_PORT_IN_USE",
        |c| c.facts.listeners = vec![listener(80, "0.0.0.0")],
        |c| {
            c.facts.listeners = vec![listener(80, "0.0.0.0")];
            c.options.components = vec!["metrics".into()];
        },
    ),
    ("FW_FIREWALLD", |c| c.facts.firewalld_active = true, |_| {}),
    ("FW_UFW", |c| c.facts.ufw_active = true, |_| {}),
    (
        "PROXY_NOPROXY",
        |c| {
            c.facts.proxy.insert("HTTPS_PROXY".into(), "http://proxy".into());
        },
        |c| {
            c.facts.proxy.insert("HTTPS_PROXY".into(), "http://proxy".into());
            let all = "127.0.0.0/8,::1,localhost,.svc,.cluster.local,10.42.0.0/16,10.43.0.0/16,10.0.0.0/24";
            c.facts.proxy.insert("NO_PROXY".into(), all.into());
        },
    ),
    (
        "PROXY_TUNNEL",
        |c| {
            c.facts.proxy.insert("HTTPS_PROXY".into(), "http://proxy:3128".into());
        },
        |c| {
            c.facts.proxy.insert("HTTPS_PROXY".into(), "http://proxy:3128".into());
            c.facts.proxy.insert("NO_PROXY".into(), "10.0.0.0/8,.pipeops.io".into());
        },
    ),
    (
        "API_PUBLIC",
        |c| public(c),
        |c| {
            public(c);
            c.facts.programs.insert("nft".into(), "/usr/sbin/nft".into());
            c.options.api_allow = vec!["10.0.0.0/8".into()];
        },
    ),
    (
        "NODE_RENAMED",
        |c| c.facts.current_hostname = Some("vm2".into()),
        |c| c.options.node_name = Some("vm2".into()),
    ),
    (
        "K3S_SETTING_UNKNOWN",
        |c| c.options.k3s = [("cluster-cird".to_owned(), serde_json::json!("10.52.0.0/16"))].into(),
        |c| c.options.k3s = [("cluster-cidr".to_owned(), serde_json::json!("10.52.0.0/16"))].into(),
    ),
    (
        "K3S_SETTING_ODD",
        |c| c.options.k3s = [("cluster-cidr".to_owned(), serde_json::json!("10.52.7.0/16"))].into(),
        |c| c.options.k3s = [("cluster-cidr".to_owned(), serde_json::json!("10.52.0.0/16"))].into(),
    ),
    (
        "SECRET_READABLE",
        |c| {
            let holds = vec!["[k3s] datastore-endpoint = postgres://u:••••@h/db".into()];
            c.facts.readable_secrets.push(crate::install::facts::ReadableSecret {
                path: "/root/plan.json".into(),
                mode: 0o644,
                holds,
                made_private: true,
            });
        },
        |_| {},
    ),
];
