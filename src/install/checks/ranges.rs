//! Rules about the ranges of pods and services: whether they are free here, and whether they fit
//! together.

use std::net::IpAddr;

use super::InstallTarget;
use crate::base::cidr::Cidr;
use crate::install::effective_settings::EffectiveSettings;
use crate::install::facts::Facts;
use crate::install::finding::{Finding, Level};
use crate::install::network;

/// Interfaces that k3s makes (flannel, the bridge plugin, kube-router, kube-proxy).
const OURS: &[&str] = &["cni0", "flannel", "veth", "kube-bridge", "kube-ipvs0", "kube-dummy-if"];
/// Those of other pod networks, which run where flannel is off.
const OTHERS: &[&str] = &[
    "cali",
    "tunl0",
    "vxlan.calico",
    "vxlan-v6.calico",
    "wireguard.cali",
    "cilium",
    "lxc",
    "weave",
    "antrea",
    "nodelocaldns",
];

/// Whether an interface is made by the k3s that we installed. Before there is one, nothing of that
/// name is its.
fn own(facts: &Facts, effective: &EffectiveSettings, device: &str) -> bool {
    let any = |list: &[&str]| list.iter().any(|prefix| device.starts_with(prefix));
    facts.k3s.installed_role.is_some()
        && (any(OURS) || effective.flannel_backend().as_deref() == Some("none") && any(OTHERS))
}

fn text(range: &Cidr) -> String {
    format!("{}/{}", range.address, range.prefix)
}

pub(super) fn overlap(facts: &Facts, target: &InstallTarget<'_>) -> Vec<Finding> {
    let effective = EffectiveSettings::planned(facts, target.settings);
    let ranges = network::ranges(facts, target.settings);
    let mut found = Vec::new();
    for (name, range) in &ranges {
        let hits = hits(facts, &effective, name, range);
        if hits.is_empty() {
            continue;
        }
        let mut finding = Finding::new(
            "CIDR_OVERLAP",
            Level::Error,
            format!("the {name} range {} is in use here", text(range)),
            hits.join("; "),
        );
        let left = facts.k3s.installed_role.is_none()
            && OURS.iter().any(|o| hits.iter().any(|h| h.contains(&format!(" {o}"))));
        if left {
            finding = finding.fix(
                "left over from a former cluster: `ip link delete cni0; ip link delete flannel.1`, \
                 or reboot",
            );
        }
        let free = free(facts, &effective, &ranges, range.address.is_ipv6());
        found.push(finding.fix(format!(
            "choose another in the [k3s] table of the config: {name}-cidr = \"{free}\""
        )));
    }
    let pairs =
        ranges.iter().enumerate().flat_map(|(n, a)| ranges[n + 1..].iter().map(move |b| (a, b)));
    for ((name, range), (other, second)) in pairs.filter(|(a, b)| a.1.overlaps(&b.1)) {
        let free = free(facts, &effective, &ranges, second.address.is_ipv6());
        found.push(
            Finding::new(
                "CIDR_OVERLAP",
                Level::Error,
                format!("the {name} range and the {other} range share addresses"),
                format!("{name} {}; {other} {}", text(range), text(second)),
            )
            .fix(format!(
                "choose another in the [k3s] table of the config: {other}-cidr = \"{free}\""
            )),
        );
    }
    found
}

/// Routes and addresses of this machine that are inside a range.
fn hits(facts: &Facts, effective: &EffectiveSettings, name: &str, range: &Cidr) -> Vec<String> {
    // with host-gw a node's pods are a route through that node
    let through_nodes = facts.k3s.installed_role.is_some()
        && name == "cluster"
        && effective.flannel_backend().as_deref() == Some("host-gw");
    let routes = facts
        .routes
        .iter()
        .filter(|r| {
            !(r.is_catch_all()
                || own(facts, effective, &r.device)
                || through_nodes && r.gateway.is_some())
        })
        .filter(|r| Cidr::parse(&r.to).is_some_and(|c| c.overlaps(range)))
        .map(|r| {
            if r.device.is_empty() {
                format!("route {} {}", r.kind, r.to)
            } else {
                format!("route {} dev {}", r.to, r.device)
            }
        });
    let addresses =
        facts.interfaces.iter().filter(|i| !own(facts, effective, &i.name)).flat_map(|i| {
            let inside = i.addresses.iter().filter(|a| range.contains(a.ip));
            inside.map(|a| format!("address {a} on {}", i.name)).collect::<Vec<_>>()
        });
    routes.chain(addresses).collect()
}

/// A range of the family that nothing here uses.
fn free(facts: &Facts, effective: &EffectiveSettings, taken: &[(&str, Cidr)], v6: bool) -> String {
    let tries: &[&str] = if v6 {
        &["fd00:96::/112", "fd00:97::/112", "fd00:98::/112"]
    } else {
        &["10.96.0.0/16", "10.97.0.0/16", "172.22.0.0/16", "192.168.0.0/16"]
    };
    let usable = |t: &&&str| {
        let Some(range) = Cidr::parse(t) else { return false };
        hits(facts, effective, "", &range).is_empty()
            && taken.iter().all(|(_, other)| !other.overlaps(&range))
    };
    (*tries.iter().find(usable).unwrap_or(&tries[0])).to_owned()
}

/// What k3s or the controller manager refuses at its start, so that the node never comes up.
pub(super) fn misfit(facts: &Facts, target: &InstallTarget<'_>) -> Vec<Finding> {
    if !target.server() {
        return Vec::new();
    }
    let effective = EffectiveSettings::planned(facts, target.settings);
    let ranges = network::ranges(facts, target.settings);
    let of = |name: &str| -> Vec<Cidr> {
        ranges.iter().filter(|(n, _)| *n == name).map(|(_, r)| *r).collect()
    };
    let (pods, services) = (of("cluster"), of("service"));
    let mut found = family_misfits(&pods, &services);
    // by default k3s chooses ranges of the address's family; where the ranges are set, the address
    // must fit them
    found.extend(lacking_addresses(&network::node_addresses(facts, target.settings), &pods));
    found.extend(size_misfits(&effective, &pods, &services));
    for server in effective.list("cluster-dns") {
        if server.parse::<IpAddr>().is_ok_and(|ip| !services.iter().any(|r| r.contains(ip))) {
            found.push(misfit_of(
                "the cluster's name server is outside the range of services",
                format!("cluster-dns {server}; service-cidr {}", list(&services)),
                "leave cluster-dns out: it is the tenth address of the range",
            ));
        }
    }
    found
}

fn misfit_of(what: &str, evidence: String, fix: &str) -> Finding {
    Finding::new("CIDR_MISFIT", Level::Error, what, evidence).fix(fix)
}

/// Of each range whether it is IPv6.
fn families(ranges: &[Cidr]) -> Vec<bool> {
    ranges.iter().map(|c| c.address.is_ipv6()).collect()
}

fn list(ranges: &[Cidr]) -> String {
    ranges.iter().map(text).collect::<Vec<_>>().join(",")
}

fn family_misfits(pods: &[Cidr], services: &[Cidr]) -> Vec<Finding> {
    let mut found = Vec::new();
    for (key, ranges) in [("cluster-cidr", pods), ("service-cidr", services)] {
        let kinds = families(ranges);
        if kinds.len() > 2 || kinds.len() == 2 && kinds[0] == kinds[1] {
            found.push(misfit_of(
                "a cluster has one range of each family at most",
                format!("{key} {}", list(ranges)),
                "give one IPv4 range, one IPv6 range, or one of each",
            ));
        }
    }
    if families(pods) != families(services) {
        found.push(misfit_of(
            "the ranges of pods and services are of different families",
            format!("cluster-cidr {}; service-cidr {}", list(pods), list(services)),
            "give both settings in the same families and the same order",
        ));
    }
    found
}

fn lacking_addresses(addresses: &[IpAddr], pods: &[Cidr]) -> Option<Finding> {
    let lacking: Vec<&str> = [(false, "IPv4"), (true, "IPv6")]
        .into_iter()
        .filter(|(v6, _)| {
            families(pods).contains(v6) && !addresses.iter().any(|a| a.is_ipv6() == *v6)
        })
        .map(|f| f.1)
        .collect();
    if addresses.is_empty() || lacking.is_empty() {
        return None;
    }
    let have: Vec<String> = addresses.iter().map(ToString::to_string).collect();
    Some(misfit_of(
        "the node has no address of a family that the ranges have",
        format!(
            "cluster-cidr {}; node addresses {}; lacking: {}",
            list(pods),
            have.join(", "),
            lacking.join(", ")
        ),
        "give this machine such an address and a default route for it, name it with --node-ip, or \
         take that range out",
    ))
}

fn size_misfits(effective: &EffectiveSettings, pods: &[Cidr], services: &[Cidr]) -> Vec<Finding> {
    let mut found = Vec::new();
    for range in services {
        // k8s.io/kubernetes, cmd/kube-apiserver/app/options/validation.go: 20 bits at most
        let least = if range.address.is_ipv6() { 108 } else { 12 };
        let (room, bits) =
            (u32::from(range.prefix), if range.address.is_ipv6() { 128 } else { 32 });
        if room < least || bits - room < 3 {
            found.push(misfit_of(
                "the range of services has an impossible size",
                format!("service-cidr {}", text(range)),
                "use /16 for IPv4, /112 for IPv6",
            ));
        }
    }
    for range in pods {
        let (mask, key) = node_mask(effective, range.address.is_ipv6(), pods.len() > 1);
        // k8s.io/kubernetes, pkg/controller/nodeipam/ipam/cidrset: 16 bits at most
        if range.prefix > mask || mask - range.prefix > 16 {
            found.push(misfit_of(
                "the range of pods cannot be cut into networks of nodes",
                format!("cluster-cidr {}, {key} {mask}", text(range)),
                "each node takes one network of that size: choose a wider range, or set \
                 kube-controller-manager-arg = [\"node-cidr-mask-size=…\"]",
            ));
        }
    }
    found
}

fn node_mask(effective: &EffectiveSettings, v6: bool, dual: bool) -> (u8, &'static str) {
    let key = match (v6, dual) {
        (true, true) => "node-cidr-mask-size-ipv6",
        (false, true) => "node-cidr-mask-size-ipv4",
        _ => "node-cidr-mask-size",
    };
    let set = effective.argument("kube-controller-manager-arg", key).and_then(|m| m.parse().ok());
    (set.unwrap_or(if v6 { 64 } else { 24 }), key)
}
