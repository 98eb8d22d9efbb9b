//! What other people's machines showed: inputs beyond the first of each code, with a near miss each.
//! Sources are public threads, named as repository#issue.

use super::addresses::dual;
use super::*;

/// Where it was seen, the code, what raises it, what comes near without raising it.
type Row = (&'static str, &'static str, Change, Change);

fn etc(case: &mut Case, text: &str) {
    case.facts.resolver.etc = resolv(text);
}

fn public_address(case: &mut Case) {
    case.facts.interfaces[0] = Interface::new("eth0", &["198.51.100.7/24"]);
    case.facts.routes[0].source = Some("198.51.100.7".into());
}

fn ours(case: &mut Case) {
    case.facts.k3s.ours = Some(NodeRole::Server);
}

fn held(case: &mut Case, protocol: &str, port: u16, address: &str) {
    case.facts.listeners = vec![Listener { protocol: protocol.into(), ..listener(port, address) }];
}

const ROWS: &[Row] = &[
    // name servers
    (
        "k3s#4087",
        "DNS_LOOPBACK",
        |c| etc(c, "nameserver 127.0.0.1\nnameserver 10.0.0.1\n"),
        |c| etc(c, "nameserver 10.0.0.1\nnameserver 10.0.0.2\n"),
    ),
    (
        "k3s#14184",
        "DNS_LOOPBACK",
        |c| etc(c, "nameserver 10.0.0.1\nnameserver fe80::1%eth0\n"),
        |c| etc(c, "nameserver 10.0.0.1\nnameserver fd00::1\n"),
    ),
    (
        "link-local without a zone",
        "DNS_LOOPBACK",
        |c| etc(c, "nameserver fe80::1\n"),
        |c| etc(c, "nameserver 169.254.169.254\n"),
    ),
    (
        "multicast",
        "DNS_LOOPBACK",
        |c| etc(c, "nameserver 224.0.0.251\n"),
        |c| etc(c, "nameserver 223.0.0.251\n"),
    ),
    (
        "a name for a server",
        "DNS_LOOPBACK",
        |c| etc(c, "nameserver dns.example.com\n"),
        |c| etc(c, "# nameserver dns.example.com\nnameserver 10.0.0.1\n"),
    ),
    (
        "trailing text",
        "DNS_LOOPBACK",
        |c| etc(c, "nameserver 10.0.0.1;\n"),
        |c| etc(c, "nameserver 10.0.0.1 ; main\n"),
    ),
    (
        "mapped loopback",
        "DNS_LOOPBACK",
        |c| etc(c, "nameserver ::ffff:127.0.0.1\n"),
        |c| etc(c, "nameserver ::ffff:10.0.0.1\n"),
    ),
    (
        "both files refused",
        "DNS_LOOPBACK",
        |c| {
            etc(c, "nameserver 127.0.0.53\n");
            c.facts.resolver.systemd = resolv("nameserver 10.0.0.1\nnameserver fe80::1%2\n");
        },
        |c| {
            etc(c, "nameserver 127.0.0.53\n");
            c.facts.resolver.systemd = resolv("nameserver 10.0.0.1\nnameserver 2001:db8::1\n");
        },
    ),
    (
        "the setting resolv-conf",
        "DNS_LOOPBACK",
        |c| c.facts.resolver.chosen = Some(("/etc/r".into(), resolv("nameserver 127.0.0.1\n"))),
        |c| {
            etc(c, "nameserver 127.0.0.1\n");
            c.facts.resolver.chosen = Some(("/etc/r".into(), resolv("nameserver 10.0.0.1\n")));
        },
    ),
    (
        "the setting resolv-conf names nothing",
        "DNS_NONE",
        |c| c.facts.resolver.chosen = Some(("/etc/r".into(), None)),
        |c| c.facts.resolver.chosen = Some(("/etc/r".into(), resolv("nameserver 10.0.0.1\n"))),
    ),
    (
        "k3s#5836: domains",
        "DNS_LIMITS",
        |c| etc(c, &format!("nameserver 10.0.0.1\nsearch {}\n", "a.example ".repeat(33))),
        |c| etc(c, &format!("nameserver 10.0.0.1\nsearch {}\n", "a.example ".repeat(29))),
    ),
    (
        "kubernetes#9079: characters",
        "DNS_LIMITS",
        |c| {
            etc(
                c,
                &format!(
                    "nameserver 10.0.0.1\nsearch {} {}\n",
                    "a.".repeat(600) + "example",
                    "b.".repeat(600) + "example"
                ),
            )
        },
        |c| etc(c, &format!("nameserver 10.0.0.1\nsearch {}\n", "a.".repeat(600) + "example")),
    ),
    // names
    (
        "k3s#532",
        "HOSTNAME_BAD",
        |c| c.facts.hostname = "localhost.localdomain".into(),
        |c| c.facts.hostname = "localhost.example.com".into(),
    ),
    (
        "Fedora's second line",
        "HOSTNAME_BAD",
        |c| c.facts.hostname = "localhost6.localdomain6".into(),
        |c| c.facts.hostname = "local".into(),
    ),
    (
        "trailing dot",
        "HOSTNAME_BAD",
        |c| c.facts.hostname = "vm1.example.com.".into(),
        |c| c.facts.hostname = "VM1.Example.com".into(),
    ),
    (
        "64 letters",
        "HOSTNAME_BAD",
        |c| c.facts.hostname = "a".repeat(64),
        |c| c.facts.hostname = "a".repeat(63),
    ),
    (
        "k3sup#233",
        "HOSTNAME_DEFAULT",
        |c| c.facts.hostname = "ubuntu".into(),
        |c| {
            c.facts.hostname = "ubuntu".into();
            c.options.node_name = Some("ubuntu".into());
        },
    ),
    // routes and addresses
    (
        "kube-vip#1371",
        "NIC_AMBIGUOUS",
        |c| {
            c.facts.routes.extend(parse::ip_routes(r#"[{"dst":"default","metric":9,"flags":[],"nexthops":[{"gateway":"10.0.0.1","dev":"eth0"},{"gateway":"10.1.0.1","dev":"eth1"}]}]"#, false).unwrap())
        },
        |c| {
            c.facts.routes.extend(parse::ip_routes(r#"[{"dst":"default","metric":9,"flags":[],"nexthops":[{"gateway":"10.0.0.1","dev":"eth0"},{"gateway":"10.0.0.2","dev":"eth0"}]}]"#, false).unwrap())
        },
    ),
    (
        "a way that throws away",
        "ROUTE_NONE",
        |c| {
            c.facts.routes = parse::ip_routes(
                r#"[{"type":"unreachable","dst":"default","metric":4278198272}]"#,
                false,
            )
            .unwrap()
        },
        |c| {
            c.facts.routes = parse::ip_routes(
                r#"[{"dst":"0.0.0.0/1","gateway":"10.8.0.1","dev":"eth0"},{"dst":"128.0.0.0/1","gateway":"10.8.0.1","dev":"eth0"}]"#,
                false,
            )
            .unwrap()
        },
    ),
    (
        "an old ip knows no -j",
        "TOOL_MISSING",
        |c| {
            c.facts.ip_fault =
                Some("`ip -j address show` ended with 255: Option \"-j\" is unknown".into());
            c.facts.routes.clear();
        },
        |c| c.facts.routes.clear(),
    ),
    (
        "interface that is not there",
        "ADDRESS_UNKNOWN",
        |c| c.options.flannel_iface = Some("eth9".into()),
        |c| c.options.flannel_iface = Some("eth0".into()),
    ),
    (
        "another name of the interface",
        "ADDRESS_UNKNOWN",
        |c| {
            c.facts.interfaces[0].names = vec!["enp0s3".into()];
            c.options.flannel_iface = Some("enp0s3".into());
        },
        |c| c.facts.interfaces[0].names = vec!["enp0s3".into()],
    ),
    (
        "node-ip of a file beside ours",
        "ADDRESS_UNKNOWN",
        |c| beside(c, "90-mine.yaml", "node-ip: 10.0.0.6\n"),
        |c| beside(c, "90-mine.yaml", "node-ip: 10.0.0.5\n"),
    ),
    (
        "static IPv4 beside SLAAC",
        "ADDRESS_DYNAMIC",
        |c| c.facts.interfaces[0].addresses[0].dynamic = true,
        |c| {
            dual(c);
            c.facts.interfaces[0].addresses[1].dynamic = true;
        },
    ),
    // ranges
    (
        "k3s#4627: br-lan",
        "CIDR_OVERLAP",
        |c| {
            c.facts.interfaces.push(Interface::new("br-lan", &["10.42.0.1/16"]));
            c.facts.routes.push(route("10.42.0.0/16", "br-lan"));
        },
        |c| c.facts.interfaces.push(Interface::new("br-lan", &["10.44.0.1/16"])),
    ),
    (
        "kops#710: docker0",
        "CIDR_OVERLAP",
        |c| c.facts.interfaces.push(Interface::new("docker0", &["10.42.0.1/16"])),
        |c| c.facts.interfaces.push(Interface::new("docker0", &["172.17.0.1/16"])),
    ),
    (
        "cni0 of somebody before us",
        "CIDR_OVERLAP",
        |c| c.facts.interfaces.push(Interface::new("cni0", &["10.42.0.1/24"])),
        |c| {
            c.facts.interfaces.push(Interface::new("cni0", &["10.42.0.1/24"]));
            ours(c);
        },
    ),
    (
        "a VPN that takes everything",
        "CIDR_OVERLAP",
        |c| c.facts.routes.push(route("10.0.0.0/8", "tun0")),
        |c| c.facts.routes.extend([route("0.0.0.0/1", "eth0"), route("128.0.0.0/1", "eth0")]),
    ),
    (
        "a range that is thrown away",
        "CIDR_OVERLAP",
        |c| {
            c.facts.routes.extend(
                parse::ip_routes(r#"[{"type":"blackhole","dst":"10.43.0.0/16"}]"#, false).unwrap(),
            )
        },
        |c| {
            c.facts.routes.extend(
                parse::ip_routes(r#"[{"type":"blackhole","dst":"10.99.0.0/16"}]"#, false).unwrap(),
            )
        },
    ),
    (
        "pods behind other nodes, host-gw",
        "CIDR_OVERLAP",
        |c| {
            c.facts
                .routes
                .push(Route { gateway: Some("10.0.0.6".into()), ..route("10.42.1.0/24", "eth0") })
        },
        |c| {
            c.facts
                .routes
                .push(Route { gateway: Some("10.0.0.6".into()), ..route("10.42.1.0/24", "eth0") });
            k3s(c, "flannel-backend", "host-gw");
            ours(c);
        },
    ),
    (
        "coredns#3704",
        "CIDR_OVERLAP",
        |c| k3s(c, "cluster-cidr", "10.43.0.0/16"),
        |c| k3s(c, "cluster-cidr", "10.44.0.0/16"),
    ),
    (
        "one range in the other",
        "CIDR_OVERLAP",
        |c| k3s(c, "cluster-cidr", "10.32.0.0/11"),
        |c| k3s(c, "cluster-cidr", "10.64.0.0/11"),
    ),
    (
        "a file beside ours",
        "CIDR_OVERLAP",
        |c| {
            beside(c, "90-mine.yaml", "cluster-cidr: 10.52.0.0/16\n");
            c.facts.routes.push(route("10.52.0.0/16", "lan0"));
        },
        |c| {
            beside(c, "90-mine.yaml", "cluster-cidr: 10.52.0.0/16\n");
            c.facts.routes.push(route("10.42.0.0/16", "lan0"));
        },
    ),
    (
        "a file before ours has no say against the table",
        "CIDR_OVERLAP",
        |c| {
            beside(c, "10-mine.yaml", "cluster-cidr: 10.52.0.0/16\n");
            c.facts.routes.push(route("10.52.0.0/16", "lan0"));
        },
        |c| {
            beside(c, "10-mine.yaml", "cluster-cidr: 10.52.0.0/16\n");
            k3s(c, "cluster-cidr", "10.62.0.0/16");
            c.facts.routes.push(route("10.52.0.0/16", "lan0"));
        },
    ),
    (
        "k3s#11735: both families",
        "CIDR_MISFIT",
        |c| {
            k3s(c, "cluster-cidr", "10.42.0.0/16,fd42::/56");
            k3s(c, "service-cidr", "10.43.0.0/16,fd43::/112");
        },
        |c| {
            dual(c);
            k3s(c, "cluster-cidr", "10.42.0.0/16,fd42::/56");
            k3s(c, "service-cidr", "10.43.0.0/16,fd43::/112");
        },
    ),
    (
        "families that differ",
        "CIDR_MISFIT",
        |c| {
            dual(c);
            k3s(c, "cluster-cidr", "10.42.0.0/16,fd42::/56");
        },
        |c| k3s(c, "cluster-cidr", "10.44.0.0/16"),
    ),
    (
        "pods narrower than a node's network",
        "CIDR_MISFIT",
        |c| k3s(c, "cluster-cidr", "10.44.0.0/25"),
        |c| k3s(c, "cluster-cidr", "10.44.0.0/24"),
    ),
    (
        "node-cidr-mask-size",
        "CIDR_MISFIT",
        |c| {
            k3s(c, "kube-controller-manager-arg", serde_json::json!(["node-cidr-mask-size=15"]));
        },
        |c| {
            k3s(c, "kube-controller-manager-arg", serde_json::json!(["node-cidr-mask-size=22"]));
        },
    ),
    (
        "services too wide",
        "CIDR_MISFIT",
        |c| k3s(c, "service-cidr", "172.0.0.0/8"),
        |c| k3s(c, "service-cidr", "172.16.0.0/12"),
    ),
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
                directory: true,
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
        |c| c.facts.mounts[0].kind = "nfs4".into(),
        |c| c.facts.mounts[0].kind = "btrfs".into(),
    ),
    (
        "k3s-ansible#230",
        "SNAPSHOTTER_UNFIT",
        |c| c.facts.mounts[0].kind = "overlay".into(),
        |c| c.facts.mounts[1].kind = "overlay".into(),
    ),
    (
        "XFS of old",
        "SNAPSHOTTER_UNFIT",
        |c| (c.facts.mounts[0].kind, c.facts.mounts[0].entry_types) = ("xfs".into(), Some(false)),
        |c| (c.facts.mounts[0].kind, c.facts.mounts[0].entry_types) = ("xfs".into(), Some(true)),
    ),
    (
        "a snapshotter of another file system",
        "SNAPSHOTTER_UNFIT",
        |c| k3s(c, "snapshotter", "btrfs"),
        |c| {
            k3s(c, "snapshotter", "btrfs");
            c.facts.mounts[0].kind = "btrfs".into();
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

#[test]
fn each_symptom_is_found_and_its_near_miss_is_not() {
    let mut wrong = Vec::new();
    for (seen, code, fault, near) in ROWS {
        let (mut bad, mut good) = (case(), case());
        fault(&mut bad);
        near(&mut good);
        let has = |case: &Case| found(case).iter().any(|f| f.code == *code);
        let (raised, missed) = (has(&bad), !has(&good));
        println!(
            "{code:20} {seen:45} raised {raised:5}  near miss {}",
            if missed { "silent" } else { "RAISED" }
        );
        if !raised || !missed {
            wrong.push(format!(
                "{code} ({seen}): raised {raised}, near miss silent {missed}: {:?} / {:?}",
                found(&bad),
                found(&good)
            ));
        }
        assert!(
            found(&bad).iter().all(|f| !f.fix.is_empty() && !f.evidence.is_empty()),
            "{seen}: {:?}",
            found(&bad)
        );
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
