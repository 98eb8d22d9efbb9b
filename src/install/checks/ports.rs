//! Rules about ports: who holds those that k3s binds, what firewalls and proxies do to them, what
//! can be reached from outside.

use std::net::IpAddr;

use super::InstallTarget;
use crate::base::cidr::globally_routable;
use crate::base::http::credential_free_proxy;
use crate::install::effective_settings::EffectiveSettings;
use crate::install::facts::{Facts, Listener};
use crate::install::finding::{Finding, Level};
use crate::install::network;

/// A port that k3s or a part of it binds.
pub(crate) struct Port {
    protocol: &'static str,
    number: u16,
    purpose: &'static str,
    /// Bound on loopback only: who holds it on another address is not in the way.
    loopback: bool,
}

impl Port {
    fn tcp(number: u16, purpose: &'static str) -> Port {
        Port { protocol: "tcp", number, purpose, loopback: false }
    }

    fn local(number: u16, purpose: &'static str) -> Port {
        Port { protocol: "tcp", number, purpose, loopback: true }
    }

    fn meets(&self, listener: &Listener) -> bool {
        let address = listener.address.parse::<IpAddr>().ok();
        let apart = self.loopback
            && address.is_some_and(|a| {
                !a.is_unspecified()
                    && a != IpAddr::from([127, 0, 0, 1])
                    && a != IpAddr::V6(std::net::Ipv6Addr::LOCALHOST)
            });
        listener.protocol == self.protocol && listener.port == self.number && !apart
    }
}

/// The port in an argument such as `metrics-bind-address=127.0.0.1:10249`, which may lack it.
fn port_of(address: Option<String>, default: u16) -> u16 {
    address.and_then(|a| a.rsplit_once(':').and_then(|(_, p)| p.parse().ok())).unwrap_or(default)
}

/// Ports that are bound with the chosen settings (k3s documentation, "Networking"; the others in
/// k3s-io/k3s: pkg/daemons/control/server.go, pkg/daemons/config/types.go StreamServerPort,
/// pkg/etcd/etcd.go, pkg/spegel/spegel.go).
pub(crate) fn needed_ports(facts: &Facts, target: &InstallTarget<'_>) -> Vec<Port> {
    let effective = EffectiveSettings::planned(facts, target.settings);
    let argument = |key: &str, name: &str, default: u16| {
        effective.argument(key, name).map_or(default, |p| p.parse().unwrap_or(default))
    };
    let mut ports = Vec::new();
    if target.server() {
        let api = effective.api_port();
        ports.push(Port::tcp(api, "Kubernetes API"));
        if let Some(supervisor) = effective.port("supervisor-port").filter(|p| *p != api) {
            ports.push(Port::tcp(supervisor, "k3s supervisor"));
        }
        ports.push(Port::local(
            effective.port("apiserver-port").unwrap_or(api.saturating_add(1)),
            "API server",
        ));
        ports.push(Port::local(
            argument("kube-controller-manager-arg", "secure-port", 10257),
            "controller manager",
        ));
        if !effective.flag("disable-cloud-controller") {
            ports.push(Port::local(10258, "cloud controller"));
        }
        ports.push(Port::local(argument("kube-scheduler-arg", "secure-port", 10259), "scheduler"));
        if effective.flag("cluster-init") && !effective.has("datastore-endpoint") {
            ports.extend([
                Port::tcp(2379, "etcd"),
                Port::tcp(2380, "etcd peers"),
                Port::local(2381, "etcd metrics"),
                Port::local(2382, "etcd over HTTP"),
            ]);
        }
        if effective.flag("embedded-registry") {
            ports.push(Port::tcp(5001, "embedded registry"));
        }
    } else {
        ports.push(Port::local(
            effective.port("lb-server-port").unwrap_or(6444),
            "API load balancer",
        ));
    }
    if !target.server() || !effective.flag("disable-agent") {
        ports.push(Port::tcp(argument("kubelet-arg", "port", 10250), "kubelet"));
        ports.push(Port::local(argument("kubelet-arg", "healthz-port", 10248), "kubelet health"));
        if !effective.flag("disable-kube-proxy") {
            ports.push(Port::local(
                port_of(effective.argument("kube-proxy-arg", "metrics-bind-address"), 10249),
                "kube-proxy metrics",
            ));
            ports.push(Port::local(
                port_of(effective.argument("kube-proxy-arg", "healthz-bind-address"), 10256),
                "kube-proxy health",
            ));
        }
        if effective.bundled_containerd() || effective.flag("docker") {
            ports.push(Port::local(10010, "containerd streams"));
        }
        let overlay = network::overlay_ports(facts, target.settings);
        ports.extend(overlay.into_iter().map(|(number, purpose)| Port {
            protocol: "udp",
            number,
            purpose,
            loopback: false,
        }));
    }
    // 0 is how one says that nothing shall listen
    ports.retain(|p| p.number != 0);
    ports
}

fn holders(facts: &Facts, needed: &[Port]) -> Vec<(String, String)> {
    needed
        .iter()
        .filter_map(|port| {
            let holder = facts.listeners.iter().find(|l| port.meets(l))?;
            let who = match (&holder.process, holder.pid) {
                (Some(name), Some(pid)) => format!("`{name}` (pid {pid})"),
                _ if port.protocol == "udp" => {
                    "the kernel (an interface of WireGuard or VXLAN) or a process of another \
                     container"
                        .into()
                }
                _ => "a process of another container or namespace".into(),
            };
            let what =
                format!("port {}/{} ({}) is taken", port.number, port.protocol, port.purpose);
            Some((what, format!("held by {who} on {}", holder.address)))
        })
        .collect()
}

pub(super) fn ports(facts: &Facts, target: &InstallTarget<'_>) -> Vec<Finding> {
    if facts.k3s.installed_role.is_some() && facts.k3s.active {
        return Vec::new();
    }
    holders(facts, &needed_ports(facts, target))
        .into_iter()
        .map(|(what, evidence)| {
            Finding::new("PORT_IN_USE", Level::Error, what, evidence)
                .fix("stop that program, then run again")
        })
        .collect()
}

pub(super) fn ingress_ports(facts: &Facts, target: &InstallTarget<'_>) -> Vec<Finding> {
    if facts.k3s.installed_role.is_some() && facts.k3s.active || !target.ingress() {
        return Vec::new();
    }
    holders(facts, &[Port::tcp(80, "ingress"), Port::tcp(443, "ingress")])
        .into_iter()
        .map(|(what, evidence)| {
            Finding::new("INGRESS_PORT_IN_USE", Level::Error, what, evidence).fix(
                "stop that program, or leave the ingress out: --components \
                 cert-manager,metrics,storage",
            )
        })
        .collect()
}

fn openings(target: &InstallTarget<'_>, facts: &Facts) -> Vec<String> {
    let mut list = vec!["10250/tcp".to_owned()];
    list.extend(
        network::overlay_ports(facts, target.settings)
            .iter()
            .map(|(port, _)| format!("{port}/udp")),
    );
    if target.server() {
        list.insert(
            0,
            format!("{}/tcp", EffectiveSettings::planned(facts, target.settings).api_port()),
        );
        if target.ingress() {
            list.extend(["80/tcp".into(), "443/tcp".into()]);
        }
    }
    list
}

pub(super) fn firewalld(facts: &Facts, target: &InstallTarget<'_>) -> Vec<Finding> {
    if !facts.firewalld_active {
        return Vec::new();
    }
    let ports: Vec<String> =
        openings(target, facts).iter().map(|p| format!("--add-port={p}")).collect();
    let ranges: Vec<String> = network::ranges(facts, target.settings)
        .iter()
        .map(|(_, r)| format!("--add-source={}/{}", r.address, r.prefix))
        .collect();
    vec![
        Finding::new(
            "FW_FIREWALLD",
            Level::Warning,
            "firewalld is active and drops pod traffic unless configured otherwise",
            "firewalld.service is active",
        )
        .fix(format!("firewall-cmd --permanent {}", ports.join(" ")))
        .fix(format!("firewall-cmd --permanent --zone=trusted {}", ranges.join(" ")))
        .fix("firewall-cmd --reload"),
    ]
}

pub(super) fn ufw(facts: &Facts, target: &InstallTarget<'_>) -> Vec<Finding> {
    if !facts.ufw_active {
        return Vec::new();
    }
    let mut finding = Finding::new(
        "FW_UFW",
        Level::Warning,
        "ufw is active and drops pod traffic unless configured otherwise",
        "ufw is enabled",
    );
    for port in openings(target, facts) {
        finding = finding.fix(format!("ufw allow {port}"));
    }
    for (_, range) in network::ranges(facts, target.settings) {
        finding = finding.fix(format!("ufw allow from {}/{} to any", range.address, range.prefix));
    }
    vec![finding]
}

pub(super) fn proxy(facts: &Facts, target: &InstallTarget<'_>) -> Vec<Finding> {
    if !facts.proxy.contains_key("HTTP_PROXY") && !facts.proxy.contains_key("HTTPS_PROXY") {
        return Vec::new();
    }
    let given = facts.proxy.get("NO_PROXY").cloned().unwrap_or_default();
    let missing: Vec<String> = network::no_proxy(facts, target.settings)
        .into_iter()
        .filter(|entry| !given.split(',').any(|g| g.trim() == entry))
        .collect();
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
pub(super) fn proxy_tunnel(facts: &Facts, target: &InstallTarget<'_>) -> Vec<Finding> {
    let Some(host) = target.settings.control_plane_host().filter(|_| target.server()) else {
        return Vec::new();
    };
    let Some(proxy) = network::https_proxy(facts, &host) else { return Vec::new() };
    let calls = match credential_free_proxy(proxy) {
        Some(_) => format!("the agent asks {host} through the proxy of HTTPS_PROXY"),
        // a file that the agent reads is everybody's to read
        None => format!(
            "HTTPS_PROXY holds a user and password, or is no http:// address, and is not handed to \
             the agent: it asks {host} directly"
        ),
    };
    vec![
        Finding::new(
            "PROXY_TUNNEL",
            Level::Warning,
            "the agent's tunnel does not go through a proxy",
            format!("{calls}; its tunnel dials the control plane's tunnel server itself"),
        )
        .fix(
            "let this machine reach the tunnel server directly (port 7000, unless the control \
             plane says otherwise)",
        )
        .fix(format!("where it reaches {host} directly, add {host} to NO_PROXY")),
    ]
}

pub(super) fn public(facts: &Facts, target: &InstallTarget<'_>) -> Vec<Finding> {
    if !target.settings.options.api_allow.is_empty() {
        return Vec::new();
    }
    let Some(address) =
        network::node_address(facts, target.settings).filter(|a| globally_routable(*a))
    else {
        return Vec::new();
    };
    let mut ports: Vec<u16> = facts
        .listeners
        .iter()
        .filter(|l| {
            l.protocol == "tcp"
                && l.address.parse::<IpAddr>().is_ok_and(|ip| ip.is_unspecified() || ip == address)
        })
        .map(|l| l.port)
        .collect();
    ports.push(10250);
    if target.server() {
        ports.push(EffectiveSettings::planned(facts, target.settings).api_port());
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
