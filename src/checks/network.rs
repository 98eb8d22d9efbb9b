//! Rules about addresses, routes, names, ports and firewalls.

use std::net::IpAddr;

use super::{Finding, Level, Target};
use crate::facts::{Cidr, Facts, globally_routable};
use crate::k3s::net;
use crate::settings::is_dns_name;

pub(super) fn hostname(facts: &Facts, target: &Target<'_>) -> Vec<Finding> {
    let name = target.settings.node_name(&facts.hostname);
    if is_dns_name(&name) && name != "localhost" && name.len() <= 63 {
        return Vec::new();
    }
    vec![
        Finding::new("HOSTNAME_BAD", Level::Error, "the host name cannot name a node", format!("`{name}`"))
            .fix("set one with `hostnamectl set-hostname NAME` or pass --node-name"),
    ]
}

pub(super) fn no_route(facts: &Facts, _: &Target<'_>) -> Vec<Finding> {
    if !facts.default_routes().is_empty() {
        return Vec::new();
    }
    vec![
        Finding::new("ROUTE_NONE", Level::Error, "there is no default route", "k3s picks addresses by it and stops without one")
            .fix("add one; on an isolated network a dummy does: `ip link add dummy0 type dummy && ip addr add 203.0.113.254/31 dev dummy0 && ip link set dummy0 up && ip route add default via 203.0.113.255 dev dummy0 metric 1000`"),
    ]
}

pub(super) fn ambiguous(facts: &Facts, target: &Target<'_>) -> Vec<Finding> {
    let options = &target.settings.options;
    if !options.node_ip.is_empty() {
        return Vec::new();
    }
    let routes = facts.default_routes();
    let Some(best) = routes.first() else { return Vec::new() };
    let rivals: Vec<&str> = routes.iter().filter(|r| r.metric == best.metric && r.device != best.device).map(|r| r.device.as_str()).collect();
    if rivals.is_empty() {
        return Vec::new();
    }
    let table: Vec<String> = facts
        .interfaces
        .iter()
        .filter(|i| i.name == best.device || rivals.contains(&i.name.as_str()))
        .map(|i| format!("{} {}", i.name, i.addresses.join(" ")))
        .collect();
    vec![
        Finding::new("NIC_AMBIGUOUS", Level::Error, "two network interfaces are equally good", table.join("; "))
            .fix("say which one: --node-ip ADDRESS (and --flannel-iface NAME if the pod network should use another)"),
    ]
}

pub(super) fn address_unknown(facts: &Facts, target: &Target<'_>) -> Vec<Finding> {
    target
        .settings
        .options
        .node_ip
        .iter()
        .filter_map(|text| text.parse::<IpAddr>().ok())
        .filter(|ip| facts.interface_of(*ip).is_none())
        .map(|ip| {
            let have: Vec<&str> = facts.interfaces.iter().flat_map(|i| i.addresses.iter().map(String::as_str)).collect();
            Finding::new(
                "ADDRESS_UNKNOWN",
                Level::Error,
                format!("no interface has the address {ip}"),
                format!("addresses here: {}", have.join(", ")),
            )
            .fix("give one of these with --node-ip, or configure the address first")
        })
        .collect()
}

pub(super) fn dynamic(facts: &Facts, target: &Target<'_>) -> Vec<Finding> {
    let Some((device, address)) = facts.primary().filter(|_| target.server()) else { return Vec::new() };
    let dynamic = facts.interfaces.iter().any(|i| i.name == device && i.dynamic);
    if !dynamic {
        return Vec::new();
    }
    vec![
        Finding::new("ADDRESS_DYNAMIC", Level::Info, "the node's address comes by DHCP", format!("{address} on {device}"))
            .fix("reserve it in your DHCP server: certificates and workers are tied to it"),
    ]
}

pub(super) fn overlap(facts: &Facts, target: &Target<'_>) -> Vec<Finding> {
    let ranges = net::ranges(&target.settings.options.k3s);
    let mut found = Vec::new();
    for (name, range) in &ranges {
        let hits: Vec<String> = facts
            .routes
            .iter()
            .filter(|r| r.to != "0.0.0.0/0" && r.to != "::/0" && !Facts::virtual_interface(&r.device))
            .filter(|r| Cidr::parse(&r.to).is_some_and(|c| c.overlaps(range)))
            .map(|r| format!("route {} dev {}", r.to, r.device))
            .chain(facts.interfaces.iter().filter(|i| !Facts::virtual_interface(&i.name)).flat_map(|i| {
                let inside = |a: &&String| Cidr::parse(a).is_some_and(|c| range.contains(c.address));
                i.addresses.iter().filter(inside).map(|a| format!("address {a} on {}", i.name)).collect::<Vec<_>>()
            }))
            .collect();
        if !hits.is_empty() {
            found.push(
                Finding::new(
                    "CIDR_OVERLAP",
                    Level::Error,
                    format!("the {name} range {}/{} is in use here", range.address, range.prefix),
                    hits.join("; "),
                )
                .fix(format!("choose another in the [k3s] table of the config: {name}-cidr = \"10.96.0.0/16\"")),
            );
        }
    }
    found
}

fn loopback(server: &str) -> bool {
    server.split('%').next().and_then(|s| s.parse::<IpAddr>().ok()).is_some_and(|ip| ip.is_loopback())
}

pub(super) fn no_dns(facts: &Facts, _: &Target<'_>) -> Vec<Finding> {
    if !facts.resolver.nameservers.is_empty() {
        return Vec::new();
    }
    vec![
        Finding::new("DNS_NONE", Level::Warning, "no name server is configured", "/etc/resolv.conf names none; k3s would use 8.8.8.8 for pods")
            .fix("set your name servers in /etc/resolv.conf"),
    ]
}

pub(super) fn dns_loop(facts: &Facts, _: &Target<'_>) -> Vec<Finding> {
    let servers = &facts.resolver.nameservers;
    let real = |list: &[String]| list.iter().any(|s| !loopback(s));
    if servers.is_empty() || real(servers) || real(&facts.resolver.upstream) {
        return Vec::new();
    }
    vec![
        Finding::new(
            "DNS_LOOPBACK",
            Level::Error,
            "the only name servers are on loopback, which pods cannot reach",
            format!("/etc/resolv.conf: {}", servers.join(", ")),
        )
        .fix("name the real servers in a file and set it in the [k3s] table: resolv-conf = \"/etc/resolv.upstream\", with --ignore DNS_LOOPBACK"),
    ]
}

pub(super) fn dns_search(facts: &Facts, _: &Target<'_>) -> Vec<Finding> {
    let wild: Vec<&str> = facts.resolver.search.iter().map(String::as_str).filter(|s| *s == "." || s.starts_with('*')).collect();
    if wild.is_empty() {
        return Vec::new();
    }
    vec![
        Finding::new("DNS_WILDCARD", Level::Warning, "the search list of the resolver has a wildcard", format!("search {}", wild.join(" ")))
            .fix("remove it from /etc/resolv.conf: every name that pods ask for would match it"),
    ]
}

/// Ports that k3s binds, with what for (k3s documentation, "Networking"; loopback ones read in `pkg/`).
pub(crate) fn needed_ports(target_server: bool, wireguard: bool) -> Vec<(&'static str, u16, &'static str)> {
    let mut ports =
        vec![("tcp", 10250, "kubelet"), ("tcp", 10248, "kubelet health"), ("tcp", 10249, "kube-proxy metrics"), ("tcp", 10256, "kube-proxy health")];
    if target_server {
        ports.extend([
            ("tcp", 6443, "Kubernetes API"),
            ("tcp", 6444, "API server"),
            ("tcp", 10257, "controller manager"),
            ("tcp", 10258, "cloud controller"),
            ("tcp", 10259, "scheduler"),
        ]);
    } else {
        ports.push(("tcp", 6444, "API load balancer"));
    }
    ports.push(if wireguard { ("udp", 51820, "pod network (wireguard)") } else { ("udp", 8472, "pod network (VXLAN)") });
    ports
}

fn holders(facts: &Facts, wanted: &[(&str, u16, &str)]) -> Vec<(String, String)> {
    wanted
        .iter()
        .filter_map(|(protocol, port, purpose)| {
            let holder = facts.listeners.iter().find(|l| l.protocol == *protocol && l.port == *port)?;
            let who = match (&holder.process, holder.pid) {
                (Some(name), Some(pid)) => format!("`{name}` (pid {pid})"),
                _ => "a process of another container or namespace".into(),
            };
            Some((format!("port {port}/{protocol} ({purpose}) is taken"), format!("held by {who} on {}", holder.address)))
        })
        .collect()
}

pub(super) fn ports(facts: &Facts, target: &Target<'_>) -> Vec<Finding> {
    if facts.k3s.ours.is_some() && facts.k3s.active {
        return Vec::new();
    }
    holders(facts, &needed_ports(target.server(), net::wireguard(facts, target.settings)))
        .into_iter()
        .map(|(what, evidence)| Finding::new("PORT_IN_USE", Level::Error, what, evidence).fix("stop that program, then run again"))
        .collect()
}

pub(super) fn ingress_ports(facts: &Facts, target: &Target<'_>) -> Vec<Finding> {
    if facts.k3s.ours.is_some() && facts.k3s.active || !target.ingress() {
        return Vec::new();
    }
    holders(facts, &[("tcp", 80, "ingress"), ("tcp", 443, "ingress")])
        .into_iter()
        .map(|(what, evidence)| {
            Finding::new("INGRESS_PORT_IN_USE", Level::Error, what, evidence)
                .fix("stop that program, or leave the ingress out: --components cert-manager,metrics,storage")
        })
        .collect()
}

fn openings(target: &Target<'_>, facts: &Facts) -> Vec<String> {
    let overlay = if net::wireguard(facts, target.settings) { "51820/udp" } else { "8472/udp" };
    let mut list = vec!["10250/tcp".to_owned(), overlay.to_owned()];
    if target.server() {
        list.insert(0, "6443/tcp".into());
        if target.ingress() {
            list.extend(["80/tcp".into(), "443/tcp".into()]);
        }
    }
    list
}

pub(super) fn firewalld(facts: &Facts, target: &Target<'_>) -> Vec<Finding> {
    if !facts.firewalld_active {
        return Vec::new();
    }
    let ports: Vec<String> = openings(target, facts).iter().map(|p| format!("--add-port={p}")).collect();
    let ranges: Vec<String> =
        net::ranges(&target.settings.options.k3s).iter().map(|(_, r)| format!("--add-source={}/{}", r.address, r.prefix)).collect();
    vec![
        Finding::new(
            "FW_FIREWALLD",
            Level::Warning,
            "firewalld is active and drops pod traffic unless told otherwise",
            "firewalld.service is active",
        )
        .fix(format!("firewall-cmd --permanent {}", ports.join(" ")))
        .fix(format!("firewall-cmd --permanent --zone=trusted {}", ranges.join(" ")))
        .fix("firewall-cmd --reload"),
    ]
}

pub(super) fn ufw(facts: &Facts, target: &Target<'_>) -> Vec<Finding> {
    if !facts.ufw_active {
        return Vec::new();
    }
    let mut finding = Finding::new("FW_UFW", Level::Warning, "ufw is active and drops pod traffic unless told otherwise", "ufw is enabled");
    for port in openings(target, facts) {
        finding = finding.fix(format!("ufw allow {port}"));
    }
    for (_, range) in net::ranges(&target.settings.options.k3s) {
        finding = finding.fix(format!("ufw allow from {}/{} to any", range.address, range.prefix));
    }
    vec![finding]
}

pub(super) fn proxy(facts: &Facts, target: &Target<'_>) -> Vec<Finding> {
    if !facts.proxy.contains_key("HTTP_PROXY") && !facts.proxy.contains_key("HTTPS_PROXY") {
        return Vec::new();
    }
    let given = facts.proxy.get("NO_PROXY").cloned().unwrap_or_default();
    let missing: Vec<String> =
        net::no_proxy(facts, target.settings).into_iter().filter(|entry| !given.split(',').any(|g| g.trim() == entry)).collect();
    if missing.is_empty() {
        return Vec::new();
    }
    vec![
        Finding::new(
            "PROXY_NOPROXY",
            Level::Info,
            "a proxy is set, and NO_PROXY does not cover the cluster",
            format!("missing: {}", missing.join(",")),
        )
        .fix("nothing to do: the k3s unit gets the completed list"),
    ]
}

/// The agent's calls go through a proxy, its tunnel does not.
pub(super) fn proxy_tunnel(facts: &Facts, target: &Target<'_>) -> Vec<Finding> {
    let Some(host) = target.settings.control_plane_host().filter(|_| target.server()) else { return Vec::new() };
    let Some(proxy) = net::https_proxy(facts, &host) else { return Vec::new() };
    let calls = match net::plain_proxy(proxy) {
        Some(_) => format!("the agent asks {host} through the proxy of HTTPS_PROXY"),
        // a file that the agent reads is everybody's to read
        None => format!("HTTPS_PROXY holds a user and password, or is no http:// address, and is not handed to the agent: it asks {host} directly"),
    };
    vec![
        Finding::new(
            "PROXY_TUNNEL",
            Level::Warning,
            "the agent's tunnel does not go through a proxy",
            format!("{calls}; its tunnel dials the control plane's tunnel server itself"),
        )
        .fix("let this machine reach the tunnel server directly (port 7000, unless the control plane says otherwise)")
        .fix(format!("where it reaches {host} directly, add {host} to NO_PROXY")),
    ]
}

pub(super) fn public(facts: &Facts, target: &Target<'_>) -> Vec<Finding> {
    if !target.settings.options.api_allow.is_empty() {
        return Vec::new();
    }
    let Some(address) = net::node_address(facts, target.settings).filter(|a| globally_routable(*a)) else { return Vec::new() };
    let mut ports: Vec<u16> = facts
        .listeners
        .iter()
        .filter(|l| l.protocol == "tcp" && l.address.parse::<IpAddr>().is_ok_and(|ip| ip.is_unspecified() || ip == address))
        .map(|l| l.port)
        .collect();
    ports.push(10250);
    if target.server() {
        ports.push(6443);
        if target.ingress() {
            ports.extend([80, 443]);
        }
    }
    ports.sort_unstable();
    ports.dedup();
    let list: Vec<String> = ports.iter().map(|p| format!("{p}/tcp")).collect();
    vec![
        Finding::new(
            "API_PUBLIC",
            Level::Warning,
            format!("{address} can be reached from the whole internet"),
            format!("will answer from outside: {}", list.join(", ")),
        )
        .fix("close them to all but your networks: --api-allow CIDR,… (80 and 443 stay open)")
        .fix("or let your provider's firewall do it; pipeops itself needs no open port"),
    ]
}
