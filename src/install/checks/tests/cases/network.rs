//! Name servers, names, routes, addresses and ranges.

use super::*;

pub(super) const ROWS: &[Row] = &[
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
            c.facts.resolv_confs.systemd = resolv("nameserver 10.0.0.1\nnameserver fe80::1%2\n");
        },
        |c| {
            etc(c, "nameserver 127.0.0.53\n");
            c.facts.resolv_confs.systemd = resolv("nameserver 10.0.0.1\nnameserver 2001:db8::1\n");
        },
    ),
    (
        "the setting resolv-conf",
        "DNS_LOOPBACK",
        |c| c.facts.resolv_confs.chosen = Some(("/etc/r".into(), resolv("nameserver 127.0.0.1\n"))),
        |c| {
            etc(c, "nameserver 127.0.0.1\n");
            c.facts.resolv_confs.chosen = Some(("/etc/r".into(), resolv("nameserver 10.0.0.1\n")));
        },
    ),
    (
        "the setting resolv-conf names nothing",
        "DNS_NONE",
        |c| c.facts.resolv_confs.chosen = Some(("/etc/r".into(), None)),
        |c| c.facts.resolv_confs.chosen = Some(("/etc/r".into(), resolv("nameserver 10.0.0.1\n"))),
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
            let json = r#"[{"dst":"default","metric":9,"flags":[],"nexthops":
                [{"gateway":"10.0.0.1","dev":"eth0"},{"gateway":"10.1.0.1","dev":"eth1"}]}]"#;
            c.facts.routes.extend(parse::ip_routes(json, false).unwrap())
        },
        |c| {
            let json = r#"[{"dst":"default","metric":9,"flags":[],"nexthops":
                [{"gateway":"10.0.0.1","dev":"eth0"},{"gateway":"10.0.0.2","dev":"eth0"}]}]"#;
            c.facts.routes.extend(parse::ip_routes(json, false).unwrap())
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
                r#"[{"dst":"0.0.0.0/1","gateway":"10.8.0.1","dev":"eth0"},
                    {"dst":"128.0.0.0/1","gateway":"10.8.0.1","dev":"eth0"}]"#,
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
            c.facts.interfaces[0].alternative_names = vec!["enp0s3".into()];
            c.options.flannel_iface = Some("enp0s3".into());
        },
        |c| c.facts.interfaces[0].alternative_names = vec!["enp0s3".into()],
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
];
