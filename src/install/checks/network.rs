//! Rules about names, addresses and routes.

use std::net::IpAddr;

use super::InstallTarget;
use crate::base::text::is_dns_name;
use crate::install::effective_settings::EffectiveSettings;
use crate::install::facts::{Facts, Interface, Route};
use crate::install::finding::{Finding, Level};
use crate::install::network;

/// Names of the machine itself, which every machine has.
fn own_name(name: &str) -> bool {
    let mut labels = name.trim_end_matches('.').split('.');
    let first = labels.next().unwrap_or_default();
    let rest: Vec<&str> = labels.collect();
    let local = matches!(
        first,
        "localhost" | "localhost4" | "localhost6" | "ip6-localhost" | "ip6-loopback"
    );
    // as in /etc/hosts of distributions; `localhost.example.com` is a name that was chosen
    local && matches!(rest.as_slice(), [] | ["localdomain" | "localdomain4" | "localdomain6"])
}

pub(super) fn hostname(facts: &Facts, target: &InstallTarget<'_>) -> Vec<Finding> {
    let name = target.settings.node_name(&facts.hostname);
    if is_dns_name(&name) && !own_name(&name) && name.len() <= 63 {
        return Vec::new();
    }
    let why = match name.as_str() {
        "" => "it is empty",
        n if own_name(n) => "every machine calls itself so",
        n if n.len() > 63 => "it is longer than 63 characters",
        n if n.ends_with('.') => "it ends with a dot",
        n if n.contains('_') => "it has an underscore",
        _ => "a node's name has letters, digits, `-` and `.` only",
    };
    vec![
        Finding::new(
            "HOSTNAME_BAD",
            Level::Error,
            "the host name cannot name a node",
            format!("`{name}`: {why}"),
        )
        .fix("set one with `hostnamectl set-hostname NAME` or pass --node-name"),
    ]
}

/// Host names that images come with (k3s takes them; the second machine of the same image cannot
/// join under it).
const IMAGE_NAMES: &[&str] = &[
    "almalinux",
    "alpine",
    "archlinux",
    "armbian",
    "centos",
    "debian",
    "fedora",
    "linux",
    "opensuse",
    "orangepi",
    "raspberrypi",
    "raspberry",
    "rocky",
    "ubuntu",
];

pub(super) fn image_name(facts: &Facts, target: &InstallTarget<'_>) -> Vec<Finding> {
    let name = target.settings.node_name(&facts.hostname);
    // a name that was given is meant
    if target.settings.options.node_name.is_some() || facts.k3s.installed_role.is_some() {
        return Vec::new();
    }
    let first = name.split('.').next().unwrap_or_default();
    if !IMAGE_NAMES.contains(&first) {
        return Vec::new();
    }
    vec![
        Finding::new(
            "HOSTNAME_DEFAULT",
            Level::Info,
            "the host name is the one of the image, and other machines may have it too",
            format!("`{name}`"),
        )
        .fix("give each node a name of its own: `hostnamectl set-hostname NAME` or --node-name"),
    ]
}

pub(super) fn no_route(facts: &Facts, _: &InstallTarget<'_>) -> Vec<Finding> {
    // what `ip` did not list is unknown, not absent
    if facts.ip_fault.is_some()
        || facts.route_to_server.is_some()
        || !facts.deciding_routes().is_empty()
    {
        return Vec::new();
    }
    vec![
        Finding::new(
            "ROUTE_NONE",
            Level::Error,
            "there is no default route",
            "k3s picks addresses by it and stops without one",
        )
        .fix(
            "add one; on an isolated network a dummy does: `ip link add dummy0 type dummy && ip \
             addr add 203.0.113.254/31 dev dummy0 && ip link set dummy0 up && ip route add default \
             via 203.0.113.255 dev dummy0 metric 1000`",
        ),
    ]
}

pub(super) fn ambiguous(facts: &Facts, target: &InstallTarget<'_>) -> Vec<Finding> {
    let effective = EffectiveSettings::planned(facts, target.settings);
    if !effective.list("node-ip").is_empty()
        || effective.text("flannel-iface").is_some()
        || facts.route_to_server.is_some()
    {
        return Vec::new();
    }
    let routes = facts.deciding_routes();
    let Some(best) = routes.first() else { return Vec::new() };
    let same = |r: &Route| {
        (&r.to, r.metric, r.preference, r.link_down)
            == (&best.to, best.metric, best.preference, best.link_down)
    };
    let rivals: Vec<&str> = routes
        .iter()
        .filter(|r| same(r) && r.device != best.device)
        .map(|r| r.device.as_str())
        .collect();
    if rivals.is_empty() {
        return Vec::new();
    }
    let listed =
        |i: &Interface| i.addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
    let table: Vec<String> = facts
        .interfaces
        .iter()
        .filter(|i| i.name == best.device || rivals.contains(&i.name.as_str()))
        .map(|i| format!("{} {}", i.name, listed(i)))
        .collect();
    vec![
        Finding::new(
            "NIC_AMBIGUOUS",
            Level::Error,
            "two network interfaces are equally good",
            table.join("; "),
        )
        .fix(
            "say which one: --node-ip ADDRESS (and --flannel-iface NAME if the pod network should \
             use another)",
        ),
    ]
}

pub(super) fn address_unknown(facts: &Facts, target: &InstallTarget<'_>) -> Vec<Finding> {
    if facts.ip_fault.is_some() {
        return Vec::new();
    }
    let effective = EffectiveSettings::planned(facts, target.settings);
    let have: Vec<String> =
        facts.interfaces.iter().flat_map(|i| i.addresses.iter().map(ToString::to_string)).collect();
    let absent = effective
        .list("node-ip")
        .into_iter()
        .filter_map(|text| text.parse::<IpAddr>().ok())
        .filter(|ip| facts.interface_of(*ip).is_none());
    let mut found: Vec<Finding> = absent
        .map(|ip| {
            let what = format!("no interface has the address {ip}");
            Finding::new(
                "ADDRESS_UNKNOWN",
                Level::Error,
                what,
                format!("addresses here: {}", have.join(", ")),
            )
            .fix("give one of these with --node-ip, or configure the address first")
        })
        .collect();
    if let Some(name) = effective
        .text("flannel-iface")
        .filter(|name| facts.interfaces.iter().all(|i| i.name != *name))
    {
        let names: Vec<&str> = facts.interfaces.iter().map(|i| i.name.as_str()).collect();
        let finding = Finding::new(
            "ADDRESS_UNKNOWN",
            Level::Error,
            format!("there is no interface {name}"),
            format!("interfaces here: {}", names.join(", ")),
        );
        found.push(match facts.interface(&name) {
            // k3s looks for the first name only
            Some(same) => {
                finding.fix(format!("that is another name of {0}: --flannel-iface {0}", same.name))
            }
            None => finding.fix("give one of these with --flannel-iface"),
        });
    }
    found
}

pub(super) fn dynamic(facts: &Facts, target: &InstallTarget<'_>) -> Vec<Finding> {
    if !target.server() {
        return Vec::new();
    }
    let mine = network::node_addresses(facts, target.settings);
    let dynamic: Vec<String> = mine
        .into_iter()
        .filter(|ip| facts.address(*ip).is_some_and(|a| a.dynamic))
        .map(|ip| format!("{ip} on {}", facts.interface_of(ip).map_or("?", |i| i.name.as_str())))
        .collect();
    if dynamic.is_empty() {
        return Vec::new();
    }
    vec![
        Finding::new(
            "ADDRESS_DYNAMIC",
            Level::Info,
            "the node's address comes by DHCP or from a router",
            dynamic.join("; "),
        )
        .fix("reserve it in your DHCP server: certificates and workers are tied to it"),
    ]
}
