//! The network of pods: interfaces, namespaces, rules, address sets and tables.

use super::{QUICK, kernel, rules};
use crate::host::{Host, HostWriter};
use crate::install::engine::leftover::Leftover;

/// Programs that k3s carries for machines that lack them.
const AUX: &str = "/var/lib/rancher/k3s/data/current/bin/aux";
const INTERFACES: &[&str] = &[
    "cni0",
    "flannel.1",
    "flannel-v6.1",
    "kube-ipvs0",
    "flannel-wg",
    "flannel-wg-v6",
    "kube-bridge",
];

/// A program of this machine, or else the one that k3s brought: its directories are removed last.
fn program(writer: &HostWriter, name: &str) -> Option<String> {
    let own = writer.real_path(&format!("{AUX}/{name}")).display().to_string();
    [name.to_owned(), own].into_iter().find(|p| writer.which(p).is_some())
}

/// Interfaces, network namespaces, rules and sets of pods. Foreign rules, tables and sets are not
/// touched. Gives what could not be removed.
pub(super) async fn remove(writer: &HostWriter) -> Vec<Leftover> {
    for name in writer.list("/run/netns").iter().filter(|n| n.starts_with("cni-")) {
        let _ = writer.output("ip", &["netns", "delete", name], QUICK).await;
    }
    let links = writer.list("/sys/class/net");
    let (pods, own): (Vec<&String>, Vec<&String>) = links
        .iter()
        .filter(|n| {
            INTERFACES.contains(&n.as_str())
                || n.starts_with("veth") && on_bridge(writer, n, "cni0")
        })
        .partition(|n| n.starts_with("veth"));
    // the pods' ends first: they are known by the bridge that they are attached to
    for name in pods.into_iter().chain(own) {
        let _ = writer.output("ip", &["link", "delete", name], QUICK).await;
    }
    for tool in ["iptables", "ip6tables"] {
        let Some(tool) = program(writer, tool) else { continue };
        for table in ["mangle", "nat", "filter"] {
            let Ok(saved) = writer.output(&format!("{tool}-save"), &["-t", table], QUICK).await
            else {
                continue;
            };
            for args in rules::removals(&saved.stdout, table) {
                let args: Vec<&str> =
                    std::iter::once("-w").chain(args.iter().map(String::as_str)).collect();
                let _ = writer.output(&tool, &args, QUICK).await;
            }
        }
    }
    remove_sets(writer).await
}

/// Address sets of network policies and of kube-proxy: after the rules that use them. Those that
/// are still in use are named.
async fn remove_sets(writer: &HostWriter) -> Vec<Leftover> {
    let Some(ipset) = program(writer, "ipset") else { return Vec::new() };
    let Ok(listed) = writer.output(&ipset, &["list", "-name"], QUICK).await else {
        return Vec::new();
    };
    let mut left = Vec::new();
    for name in listed
        .stdout
        .lines()
        .map(str::trim)
        .filter(|n| rules::is_kubernetes(n.trim_start_matches("inet6:")))
    {
        if !writer.output(&ipset, &["destroy", name], QUICK).await.is_ok_and(|o| o.ok()) {
            left.push(Leftover::kept(format!(
                "ipset {name}: another program's rule uses it (`ipset destroy {name}` once it is \
                 gone)"
            )));
        }
    }
    left
}

/// Tables that came with us. iptables over nftables makes its own at first use: those go when they
/// hold no rule and no foreign chain. What kube-proxy and flannel make in their nftables modes is
/// theirs alone.
pub(super) async fn drop_tables(writer: &HostWriter, before: &str) {
    for table in kernel::tables(writer).await {
        let Some((family, name)) = table.split_once('/') else { continue };
        let shared =
            matches!(family, "ip" | "ip6") && ["filter", "nat", "mangle", "raw"].contains(&name);
        let alone = matches!(family, "ip" | "ip6")
            && ["kube-proxy", "flannel-ipv4", "flannel-ipv6"].contains(&name);
        if !(shared || alone) || before.split(' ').any(|b| b == table) {
            continue;
        }
        if alone {
            let _ = writer.output("nft", &["delete", "table", family, name], QUICK).await;
            continue;
        }
        let Ok(listing) = writer.output("nft", &["list", "table", family, name], QUICK).await
        else {
            continue;
        };
        let built_in = |line: &str| {
            let chain = line.strip_prefix("chain ").and_then(|l| l.strip_suffix(" {"));
            line.is_empty()
                || line == "}"
                || line.starts_with("table ")
                || line.starts_with("type ")
                || chain.is_some_and(|c| c.chars().all(|c| c.is_ascii_uppercase()))
        };
        if listing.ok() && listing.stdout.lines().all(|l| built_in(l.trim())) {
            let _ = writer.output("nft", &["delete", "table", family, name], QUICK).await;
        }
    }
}

fn on_bridge(host: &Host, link: &str, bridge: &str) -> bool {
    host.link_target(&format!("/sys/class/net/{link}/master")).is_some_and(|t| t.ends_with(bridge))
}
