//! Kernel settings, modules and nftables tables before k3s, to tell at the end what it changed.

use std::collections::BTreeMap;

use super::QUICK;
use crate::host::Host;

/// Sysctls that k3s and its parts are known to set (k3s-io/k3s `pkg/agent/syssetup`; kubelet's
/// container manager; kube-proxy's `iptables`, `ipvs` and `conntrack`).
const SYSCTLS: &[&str] = &[
    "net/ipv4/ip_forward",
    "net/ipv4/conf/all/forwarding",
    "net/ipv4/conf/default/forwarding",
    "net/ipv6/conf/all/forwarding",
    "net/ipv6/conf/default/forwarding",
    "net/bridge/bridge-nf-call-iptables",
    "net/bridge/bridge-nf-call-ip6tables",
    "net/netfilter/nf_conntrack_max",
    "net/netfilter/nf_conntrack_tcp_timeout_established",
    "net/netfilter/nf_conntrack_tcp_timeout_close_wait",
    "net/netfilter/nf_conntrack_tcp_be_liberal",
    "net/netfilter/nf_conntrack_udp_timeout",
    "net/netfilter/nf_conntrack_udp_timeout_stream",
    "net/ipv4/conf/all/route_localnet",
    "net/ipv4/conf/all/arp_ignore",
    "net/ipv4/conf/all/arp_announce",
    "net/ipv4/vs/conntrack",
    "net/ipv4/vs/conn_reuse_mode",
    "net/ipv4/vs/expire_nodest_conn",
    "net/ipv4/vs/expire_quiescent_template",
    "net/core/devconf_inherit_init_net",
    "vm/overcommit_memory",
    "vm/panic_on_oom",
    "kernel/panic",
    "kernel/panic_on_oops",
    "kernel/keys/root_maxkeys",
    "kernel/keys/root_maxbytes",
];
/// Key, in the journal's record of the kernel, of the nftables tables that were there before.
pub(super) const TABLES: &str = "nft tables";
/// Key of the names of the sysctls that were read. One that a later version of pipeops added to the
/// list was not read, which does not mean that it was not there.
const READ_SYSCTLS: &str = "sysctls";

/// Kernel settings and loaded modules, for telling at the end what k3s changed.
pub(in crate::install::engine) async fn state(host: &Host) -> BTreeMap<String, String> {
    let mut state = sysctls_and_modules(host);
    state.insert(TABLES.into(), tables(host).await.join(" "));
    state.insert(READ_SYSCTLS.into(), SYSCTLS.join(" "));
    state
}

/// nftables tables, as `FAMILY/NAME`.
pub(super) async fn tables(host: &Host) -> Vec<String> {
    let listed =
        host.output("nft", &["list", "tables"], QUICK).await.map(|o| o.stdout).unwrap_or_default();
    listed
        .lines()
        .filter_map(|l| l.strip_prefix("table "))
        .map(|l| l.trim().replace(' ', "/"))
        .collect()
}

fn sysctls_and_modules(host: &Host) -> BTreeMap<String, String> {
    let mut state = BTreeMap::new();
    for name in SYSCTLS {
        if let Ok(Some(value)) = host.read(&format!("/proc/sys/{name}")) {
            state.insert(format!("sysctl {}", name.replace('/', ".")), value.trim().to_owned());
        }
    }
    let modules = crate::install::facts::parse::module_names(&host.text("/proc/modules"));
    state.insert("modules".into(), modules.into_iter().collect::<Vec<_>>().join(" "));
    state
}

/// What differs from before k3s: listed, not undone, for other software may rely on it by now.
pub(in crate::install::engine) fn changes(
    host: &Host,
    then: &BTreeMap<String, String>,
) -> Vec<String> {
    let mut changes = Vec::new();
    let was_read = |key: &str| {
        let name = key.trim_start_matches("sysctl ").replace('.', "/");
        then.get(READ_SYSCTLS).is_some_and(|all| all.split(' ').any(|l| l == name))
    };
    for (key, now) in sysctls_and_modules(host) {
        match then.get(&key) {
            Some(before) if key == "modules" => {
                let known: Vec<&str> = before.split(' ').collect();
                let new: Vec<&str> =
                    now.split(' ').filter(|m| !m.is_empty() && !known.contains(m)).collect();
                if !new.is_empty() {
                    changes.push(format!("kernel modules loaded since: {}", new.join(" ")));
                }
            }
            Some(before) if *before != now => changes.push(format!("{key} = {now}, was {before}")),
            None if was_read(&key) => changes.push(format!("{key} = {now}, was not there")),
            _ => {}
        }
    }
    changes
}
