//! The one choice of address, on machines with several.

use super::*;
use crate::install::finding::Level;
use crate::install::network;

fn addresses(case: &mut Case, list: &[&str]) {
    case.facts.interfaces[0] = Interface::new("eth0", list);
    case.facts.routes[0].source = None;
    case.facts.routes[0].gateway = Some("10.0.0.1".into());
}

pub(super) fn dual(case: &mut Case) {
    addresses(case, &["10.0.0.5/24", "2001:db8:1::5/64"]);
    case.facts.routes.push(Route { gateway: Some("fe80::1".into()), ..route("::/0", "eth0") });
}

/// What the drop-in says of addresses.
fn chosen_addresses(change: Change) -> Vec<String> {
    let mut case = case();
    change(&mut case);
    let settings =
        Settings::resolve(case.options.clone(), case.role, &codes(), &components::names()).unwrap();
    network::node_addresses(&case.facts, &settings).iter().map(ToString::to_string).collect()
}

/// Where it was seen, the machine, and the addresses that its node takes.
const CHOICES: &[(&str, Change, &[&str])] = &[
    (
        "openelb#384: a virtual address listed first",
        |c| addresses(c, &["10.0.0.100/32", "10.0.0.5/24"]),
        &["10.0.0.5"],
    ),
    ("the gateway's network", |c| addresses(c, &["192.168.7.5/24", "10.0.0.5/24"]), &["10.0.0.5"]),
    (
        "a secondary one listed first",
        |c| {
            addresses(c, &["10.0.0.9/24", "10.0.0.5/24"]);
            c.facts.interfaces[0].addresses[0].secondary = true;
        },
        &["10.0.0.5"],
    ),
    ("a cloud's /32 alone", |c| addresses(c, &["10.0.0.7/32"]), &["10.0.0.7"]),
    (
        "named by the route",
        |c| {
            addresses(c, &["10.0.0.5/24", "10.0.0.9/24"]);
            c.facts.routes[0].source = Some("10.0.0.9".into());
        },
        &["10.0.0.9"],
    ),
    ("link-local beside", |c| addresses(c, &["169.254.3.4/16", "10.0.0.5/24"]), &["10.0.0.5"]),
    (
        "an address on loopback, the line without one",
        |c| {
            addresses(c, &[]);
            c.facts.interfaces.push(Interface::new("lo", &["127.0.0.1/8", "10.9.9.9/32"]));
        },
        &["10.9.9.9"],
    ),
    ("IPv4 alone needs no IPv6", dual, &["10.0.0.5"]),
    (
        "k3s#11735: ranges of both",
        |c| {
            dual(c);
            k3s(c, "cluster-cidr", "10.42.0.0/16,fd42::/56");
        },
        &["10.0.0.5", "2001:db8:1::5"],
    ),
    (
        "IPv6 first",
        |c| {
            dual(c);
            k3s(c, "cluster-cidr", "fd42::/56,10.42.0.0/16");
        },
        &["2001:db8:1::5", "10.0.0.5"],
    ),
    (
        "IPv6 alone, by its ranges",
        |c| {
            dual(c);
            k3s(c, "cluster-cidr", "fd42::/56");
        },
        &["2001:db8:1::5"],
    ),
    (
        "a worker with both",
        |c| {
            dual(c);
            c.role = NodeRole::Worker;
        },
        &["10.0.0.5", "2001:db8:1::5"],
    ),
    (
        "a machine with IPv6 alone",
        |c| {
            addresses(c, &["fe80::5/64", "2001:db8:1::5/64"]);
            c.facts.routes =
                vec![Route { gateway: Some("fe80::1".into()), ..route("::/0", "eth0") }];
        },
        &["2001:db8:1::5"],
    ),
    (
        "temporary, deprecated and tentative ones",
        |c| {
            addresses(
                c,
                &["2001:db8:1::a/64", "2001:db8:1::b/64", "2001:db8:1::c/64", "2001:db8:1::5/64"],
            );
            let list = &mut c.facts.interfaces[0].addresses;
            (list[0].temporary, list[1].unusable, list[2].unusable) = (true, true, true);
            c.facts.routes = vec![route("::/0", "eth0")];
        },
        &["2001:db8:1::5"],
    ),
    (
        "the router that is preferred",
        |c| {
            addresses(c, &["2001:db8:1::5/64"]);
            c.facts.interfaces.push(Interface::new("eth1", &["2001:db8:2::5/64"]));
            c.facts.routes =
                vec![route("::/0", "eth0"), Route { preference: 0, ..route("::/0", "eth1") }];
        },
        &["2001:db8:2::5"],
    ),
    (
        "a line that is down",
        |c| {
            c.facts.interfaces.push(Interface::new("eth1", &["10.1.0.5/24"]));
            c.facts.routes[0].link_down = true;
            c.facts.routes.push(Route { metric: 900, ..route("0.0.0.0/0", "eth1") });
        },
        &["10.1.0.5"],
    ),
    (
        "the interface that was asked for",
        |c| {
            c.facts.interfaces.push(Interface::new("eth1", &["10.1.0.5/24"]));
            c.options.flannel_iface = Some("eth1".into());
        },
        &["10.1.0.5"],
    ),
    (
        "chosen in a file beside ours",
        |c| {
            addresses(c, &["10.0.0.5/24", "10.0.0.9/24"]);
            beside(c, "config.yaml", "node-ip: 10.0.0.9\n");
        },
        &["10.0.0.9"],
    ),
    (
        "the way to a worker's server",
        |c| {
            c.role = NodeRole::Worker;
            c.facts.interfaces.push(Interface::new("eth1", &["10.1.0.5/24"]));
            c.facts.route_to_server = Some(route("10.1.0.0/24", "eth1"));
        },
        &["10.1.0.5"],
    ),
];

#[test]
fn one_choice_of_address() {
    for (seen, change, expected) in CHOICES {
        assert_eq!(chosen_addresses(*change), *expected, "{seen}");
    }
}

#[test]
fn a_machine_with_ipv6_alone_gets_the_ranges_of_k3s() {
    let mut case = case();
    addresses(&mut case, &["2001:db8:1::5/64"]);
    case.facts.routes = vec![route("::/0", "eth0")];
    let settings =
        Settings::resolve(case.options.clone(), case.role, &codes(), &components::names()).unwrap();
    let ranges: Vec<String> = network::ranges(&case.facts, &settings)
        .iter()
        .map(|(_, r)| format!("{}/{}", r.address, r.prefix))
        .collect();
    assert_eq!(ranges, ["fd00:42::/56", "fd00:43::/112"]);
    assert!(!found(&case).iter().any(|f| f.level == Level::Error), "{:?}", found(&case));
}

#[test]
fn the_file_of_the_kernels_command_line_is_the_one_that_is_there() {
    for (file, words) in [
        (Some("/boot/firmware/cmdline.txt"), "/boot/firmware/cmdline.txt"),
        (Some("/boot/cmdline.txt"), "/boot/cmdline.txt"),
        (Some("/etc/default/grub"), "update-grub"),
        (Some("/etc/kernel/cmdline"), "kernel-install"),
        (Some("/boot/extlinux/extlinux.conf"), "`append` line of /boot/extlinux"),
        (Some("/boot/armbianEnv.txt"), "extraargs"),
        (None, "boot loader"),
    ] {
        let mut case = case();
        case.facts.cmdline_source = file.map(str::to_owned);
        case.facts.cgroup.controllers.remove("memory");
        let findings = found(&case);
        let finding = findings.iter().find(|f| f.code == "CGROUP_MEMORY_OFF").unwrap();
        assert!(finding.fix[0].contains(words), "{file:?}: {}", finding.fix[0]);
    }
}
