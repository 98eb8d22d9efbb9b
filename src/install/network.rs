//! Addresses of a node: which one it takes, which interface carries pods, what a proxy must leave
//! alone.

use std::net::IpAddr;

use super::effective_settings::EffectiveSettings;
use crate::base::cidr::{Cidr, globally_routable, network_address};
use crate::install::facts::{Address, Facts};
use crate::install::settings::Settings;
use crate::k3s::role::NodeRole;

/// Pod and service ranges: those chosen, else the defaults of k3s for the family of the node's
/// first address (k3s-io/k3s, pkg/util/net.go, GetDefaultAddresses).
pub fn ranges(facts: &Facts, settings: &Settings) -> Vec<(&'static str, Cidr)> {
    let effective = EffectiveSettings::planned(facts, settings);
    let v6 = node_address(facts, settings).is_some_and(|a| a.is_ipv6());
    let mut found = Vec::new();
    for (name, key, v4_default, v6_default) in [
        ("cluster", "cluster-cidr", "10.42.0.0/16", "fd00:42::/56"),
        ("service", "service-cidr", "10.43.0.0/16", "fd00:43::/112"),
    ] {
        let mut list = effective.list(key);
        if list.is_empty() {
            list.push(if v6 { v6_default } else { v4_default }.to_owned());
        }
        found.extend(list.iter().filter_map(|part| Cidr::parse(part)).map(|range| (name, range)));
    }
    found
}

/// Families that the node needs an address of, first one first; empty where no range is set. `true`
/// is IPv6.
fn families(effective: &EffectiveSettings) -> Vec<bool> {
    let mut found = Vec::new();
    for range in effective.list("cluster-cidr").iter().filter_map(|part| Cidr::parse(part)) {
        if !found.contains(&range.address.is_ipv6()) {
            found.push(range.address.is_ipv6());
        }
    }
    found
}

/// The node's addresses, the main one first: what was chosen, else one of each family that is
/// needed. This is the one choice that node-ip, certificates, NO_PROXY and checks follow.
pub fn node_addresses(facts: &Facts, settings: &Settings) -> Vec<IpAddr> {
    let effective = EffectiveSettings::planned(facts, settings);
    let named: Vec<IpAddr> =
        effective.list("node-ip").iter().filter_map(|ip| ip.parse().ok()).collect();
    if !named.is_empty() {
        return named;
    }
    // k3s takes the address from the interface that it is set to use (pkg/cli/server/server.go)
    let interface = effective.text("flannel-iface").and_then(|name| facts.interface(&name));
    let of = |v6: bool| match interface {
        Some(interface) => interface.best_address(v6, None),
        None => facts.address_of_family(v6).map(|(_, address)| address),
    };
    let main = match interface {
        Some(interface) => interface.best_address(false, None).is_none(),
        None => facts.primary().is_some_and(|(_, address)| address.is_ipv6()),
    };
    match families(&effective).as_slice() {
        // a worker does not know the ranges of its cluster: with an address of both families it
        // fits any, as with k3s' own choice
        [] if settings.role == NodeRole::Worker => {
            [main, !main].into_iter().filter_map(of).collect()
        }
        [] => of(main).into_iter().collect(),
        families => families.iter().filter_map(|v6| of(*v6)).collect(),
    }
}

/// The node's main address.
pub fn node_address(facts: &Facts, settings: &Settings) -> Option<IpAddr> {
    node_addresses(facts, settings).first().copied()
}

/// The interface of the pod network: `--flannel-iface`, else the one that has the node's address.
pub fn flannel_iface(facts: &Facts, settings: &Settings) -> Option<String> {
    EffectiveSettings::planned(facts, settings).text("flannel-iface").or_else(|| {
        let address = node_address(facts, settings)?;
        facts
            .interface_of(address)
            .map(|i| i.name.clone())
            .or_else(|| facts.primary().map(|(device, _)| device))
    })
}

/// How pods of different nodes reach each other. A public address gets an encrypted way, for VXLAN
/// would be readable on the way.
pub fn flannel_backend(facts: &Facts, settings: &Settings) -> String {
    EffectiveSettings::planned(facts, settings).flannel_backend().unwrap_or_else(|| {
        let public = node_address(facts, settings).is_some_and(globally_routable);
        if public { "wireguard-native" } else { "vxlan" }.into()
    })
}

/// Whether our file has to ask for the encrypted pod network.
pub fn needs_wireguard(facts: &Facts, settings: &Settings) -> bool {
    flannel_backend(facts, settings).starts_with("wireguard")
}

/// UDP ports of the pod network, with what for. IPv6 has a port of its own with WireGuard (flannel,
/// pkg/backend/wireguard).
pub fn overlay_ports(facts: &Facts, settings: &Settings) -> Vec<(u16, &'static str)> {
    match flannel_backend(facts, settings).as_str() {
        "vxlan" => vec![(8472, "pod network (VXLAN)")],
        "wireguard-native" | "wireguard" => {
            let clusters: Vec<Cidr> = ranges(facts, settings)
                .into_iter()
                .filter(|(name, _)| *name == "cluster")
                .map(|(_, r)| r)
                .collect();
            let has = |v6: bool| clusters.iter().any(|c| c.address.is_ipv6() == v6);
            let v4 = has(false).then_some((51820, "pod network (wireguard)"));
            v4.into_iter()
                .chain(has(true).then_some((51821, "pod network (wireguard, IPv6)")))
                .collect()
        }
        _ => Vec::new(),
    }
}

/// What must never go through a proxy, beyond what the user said.
pub fn no_proxy(facts: &Facts, settings: &Settings) -> Vec<String> {
    let mut list: Vec<String> =
        ["127.0.0.0/8", "::1", "localhost", ".svc", ".cluster.local"].map(str::to_owned).to_vec();
    list.extend(ranges(facts, settings).iter().map(|(_, r)| format!("{}/{}", r.address, r.prefix)));
    for address in node_addresses(facts, settings) {
        let network = facts
            .address(address)
            .map(Address::range)
            .filter(|c| c.prefix < if address.is_ipv4() { 32 } else { 128 });
        list.push(network.map_or_else(
            || address.to_string(),
            |c| format!("{}/{}", network_address(c), c.prefix),
        ));
    }
    list
}

/// The proxy through which a host is asked, if `HTTPS_PROXY` names one and `NO_PROXY` does not take
/// the host out (names with and without a leading dot stand for all below them, as curl and Go read
/// it).
pub fn https_proxy<'a>(facts: &'a Facts, host: &str) -> Option<&'a str> {
    let proxy = facts.proxy.get("HTTPS_PROXY")?;
    let host = host.trim_matches(['[', ']']).to_ascii_lowercase();
    let address = host.parse::<IpAddr>().ok();
    let past = facts.proxy.get("NO_PROXY").is_some_and(|list| {
        list.split(',').map(str::trim).filter(|entry| !entry.is_empty()).any(|entry| {
            let entry = entry.to_ascii_lowercase();
            let name = entry.trim_start_matches('*').trim_start_matches('.');
            let within =
                address.is_some_and(|a| Cidr::parse(&entry).is_some_and(|range| range.contains(a)));
            entry == "*"
                || within
                || host == name
                || host.strip_suffix(name).is_some_and(|rest| rest.ends_with('.'))
        })
    });
    let loopback = host == "localhost" || address.is_some_and(|a| a.is_loopback());
    (!past && !loopback).then_some(proxy)
}
