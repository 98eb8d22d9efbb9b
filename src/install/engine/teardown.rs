//! Taking a node down: pods, mounts, interfaces, rules, directories; never across a mount, never for ever.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use nix::unistd::Pid;

use super::context::StepContext;
use super::journal::Journal;
use crate::host::{Host, HostWriter};
use crate::install::plan::ProgressEvent;

const QUICK: Duration = Duration::from_secs(10);
/// Hundreds of slices end in this time.
const STOP: Duration = Duration::from_secs(60);
/// A dead network mount answers nobody; after this it is left and named.
const UNMOUNT: Duration = Duration::from_secs(15);
/// Local-path volumes: the users' data.
const VOLUMES: &str = "/var/lib/rancher/k3s/storage";
/// Sysctls that k3s and its parts are known to set (k3s-io/k3s `pkg/agent/syssetup`; kubelet's container manager; kube-proxy's
/// `iptables`, `ipvs` and `conntrack`).
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
/// Where k3s and the kubelet mount, beside the data directories.
const MOUNT_ROOTS: &[&str] =
    &["/run/k3s", "/var/lib/rancher/k3s", "/var/lib/kubelet", "/run/netns/cni-"];
/// Programs that k3s carries for machines that lack them.
const AUX: &str = "/var/lib/rancher/k3s/data/current/bin/aux";
/// Key of the tables that were there before, in the journal's account of the kernel.
const TABLES: &str = "nft tables";
/// Key of the sysctls that were looked at: one that a later version added was not seen, which is not "was not there".
const LOOKED: &str = "sysctls";
/// Slice of all pods where the kubelet uses systemd's cgroup driver.
const SLICE: &str = "kubepods.slice";
const INTERFACES: &[&str] = &[
    "cni0",
    "flannel.1",
    "flannel-v6.1",
    "kube-ipvs0",
    "flannel-wg",
    "flannel-wg-v6",
    "kube-bridge",
];

/// Kernel settings and loaded modules, for telling at the end what k3s changed.
pub(super) async fn kernel_state(host: &Host) -> BTreeMap<String, String> {
    let mut state = sysctls_and_modules(host);
    state.insert(TABLES.into(), tables(host).await.join(" "));
    state.insert(LOOKED.into(), SYSCTLS.join(" "));
    state
}

/// nftables tables, as `FAMILY/NAME`.
async fn tables(host: &Host) -> Vec<String> {
    let said =
        host.ask("nft", &["list", "tables"], QUICK).await.map(|o| o.stdout).unwrap_or_default();
    said.lines()
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
pub(super) fn kernel_changes(host: &Host, then: &BTreeMap<String, String>) -> Vec<String> {
    let mut changes = Vec::new();
    let looked = |key: &str| {
        let name = key.trim_start_matches("sysctl ").replace('.', "/");
        then.get(LOOKED).is_some_and(|all| all.split(' ').any(|l| l == name))
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
            None if looked(&key) => changes.push(format!("{key} = {now}, was not there")),
            _ => {}
        }
    }
    changes
}

/// Takes the node down and removes what k3s filled. Gives what is left, each with its reason.
///
/// `made` are the directories that were not there before us; others keep their own content.
pub(super) async fn node(
    context: &mut StepContext<'_>,
    journal: &Journal,
    dirs: &[String],
    made: &[String],
    purge: bool,
) -> anyhow::Result<Vec<String>> {
    let writer = context.writer;
    writer.disable(journal.role.unit()).await?;
    if writer.is_machine() {
        kill_pods(writer).await;
    }
    let mut left = unmount(writer).await;
    left.extend(network(writer).await);
    if let Some(before) = journal.kernel.get(TABLES) {
        drop_tables(writer, before).await;
    }
    // with systemd's cgroup driver each pod has a transient unit below this one; an error says that there is none
    let _ = writer.ask("systemctl", &["stop", SLICE], STOP).await;
    // processes that were killed take a moment to be gone, and their cgroups are busy until then
    for _ in 0..50 {
        if remove_cgroups(writer) {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let mut keep = Vec::new();
    if !purge && !writer.list(VOLUMES).is_empty() {
        keep.push(VOLUMES.to_owned());
        (context.on_event)(ProgressEvent::Note {
            text: format!("volumes are kept in {VOLUMES}; --purge-data removes them"),
        });
    }
    for dir in dirs {
        if !made.contains(dir) {
            continue;
        }
        for path in writer.remove_tree(dir, &keep)? {
            let why = if keep.contains(&path) {
                "volumes, kept without --purge-data"
            } else {
                "MOUNT_STILL_BUSY: something is mounted there, nothing on it was touched"
            };
            let line = format!("{path}: {why}");
            if !left.iter().any(|l| l.starts_with(&format!("{path}: "))) {
                left.push(line);
            }
        }
    }
    Ok(left)
}

/// Ends every process in a pod: k3s starts a containerd-shim for each, and each shim is the head of its pod's tree.
///
/// The tree is taken down once as a list: with its shim gone a process would belong to init, and nobody could tell whose it was.
async fn kill_pods(writer: &HostWriter) {
    for _ in 0..5 {
        let all = pod_processes(writer);
        if all.is_empty() {
            break;
        }
        let alive = |pids: &[(String, bool)], shims: bool| -> Vec<String> {
            pids.iter()
                .filter(|(pid, shim)| (shims || !shim) && writer.exists(&format!("/proc/{pid}")))
                .map(|(pid, _)| pid.clone())
                .collect()
        };
        signal(Signal::SIGTERM, &alive(&all, false));
        let until = Instant::now() + Duration::from_secs(3);
        while !alive(&all, false).is_empty() && Instant::now() < until {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        signal(Signal::SIGKILL, &alive(&all, true));
        let until = Instant::now() + QUICK;
        while !alive(&all, true).is_empty() && Instant::now() < until {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

/// Some may have ended between the look and the signal, which is as good.
fn signal(signal: Signal, pids: &[String]) {
    for pid in pids.iter().filter_map(|p| p.parse().ok()) {
        let _ = nix::sys::signal::kill(Pid::from_raw(pid), signal);
    }
}

/// The shims of this k3s, by where they live and which socket they were given, and everything below them; `true` for a shim.
fn pod_processes(host: &Host) -> Vec<(String, bool)> {
    let mut parents: Vec<(String, String, bool)> = Vec::new();
    for pid in host.list("/proc").into_iter().filter(|n| n.bytes().all(|b| b.is_ascii_digit())) {
        let command = host.text(&format!("/proc/{pid}/cmdline"));
        let shim = command.contains("containerd-shim")
            && (command.contains("/run/k3s/") || command.contains("/var/lib/rancher/k3s/"));
        // "pid (name) state ppid": the name may hold anything, so count from the last bracket
        let stat = host.text(&format!("/proc/{pid}/stat"));
        let parent = stat
            .rsplit(')')
            .next()
            .and_then(|rest| rest.split_whitespace().nth(1))
            .unwrap_or_default()
            .to_owned();
        parents.push((pid, parent, shim));
    }
    let mut doomed: Vec<(String, bool)> = parents
        .iter()
        .filter(|(_, _, shim)| *shim)
        .map(|(pid, _, _)| (pid.clone(), true))
        .collect();
    let mut at = 0;
    while at < doomed.len() {
        let below: Vec<String> = parents
            .iter()
            .filter(|(_, parent, _)| *parent == doomed[at].0)
            .map(|(pid, _, _)| pid.clone())
            .collect();
        for pid in below {
            if !doomed.iter().any(|(known, _)| *known == pid) {
                doomed.push((pid, false));
            }
        }
        at += 1;
    }
    doomed
}

/// Unmounts what k3s and the kubelet mounted, deepest first. A mount that is busy or dead stays and is named.
async fn unmount(writer: &HostWriter) -> Vec<String> {
    let mut left = Vec::new();
    for root in MOUNT_ROOTS {
        let (dir, prefix) = root
            .rsplit_once('/')
            .filter(|(_, last)| last.ends_with('-'))
            .map_or((*root, None), |(d, p)| (d, Some(p)));
        for (path, kind) in writer.mounts_under(dir) {
            let wanted = prefix.is_none_or(|p| {
                path.strip_prefix(dir)
                    .is_some_and(|rest| rest.trim_start_matches('/').starts_with(p))
            });
            if !wanted {
                continue;
            }
            if let Err(e) = writer.run("umount", &[&path], UNMOUNT).await {
                let reason = e.to_string().lines().last().unwrap_or_default().to_owned();
                left.push(format!("{path}: MOUNT_STILL_BUSY: {kind} mount, {reason}"));
            }
        }
    }
    left
}

/// A program of this machine, or the one that k3s brought where there is none: it is still there, for the directories go last.
fn program(writer: &HostWriter, name: &str) -> Option<String> {
    let own = writer.at(&format!("{AUX}/{name}")).display().to_string();
    [name.to_owned(), own].into_iter().find(|p| writer.which(p).is_some())
}

/// Interfaces, network namespaces, rules and sets of pods. Foreign rules, tables and sets are not touched. Gives what did not go.
async fn network(writer: &HostWriter) -> Vec<String> {
    for name in writer.list("/run/netns").iter().filter(|n| n.starts_with("cni-")) {
        let _ = writer.ask("ip", &["netns", "delete", name], QUICK).await;
    }
    let links = writer.list("/sys/class/net");
    let (pods, own): (Vec<&String>, Vec<&String>) = links
        .iter()
        .filter(|n| {
            INTERFACES.contains(&n.as_str())
                || n.starts_with("veth") && on_bridge(writer, n, "cni0")
        })
        .partition(|n| n.starts_with("veth"));
    // pods' ends first: without the bridge they could not be told from somebody else's
    for name in pods.into_iter().chain(own) {
        let _ = writer.ask("ip", &["link", "delete", name], QUICK).await;
    }
    for tool in ["iptables", "ip6tables"] {
        let Some(tool) = program(writer, tool) else { continue };
        for table in ["mangle", "nat", "filter"] {
            let Ok(saved) = writer.ask(&format!("{tool}-save"), &["-t", table], QUICK).await else {
                continue;
            };
            for args in removals(&saved.stdout, table) {
                let args: Vec<&str> =
                    std::iter::once("-w").chain(args.iter().map(String::as_str)).collect();
                let _ = writer.ask(&tool, &args, QUICK).await;
            }
        }
    }
    remove_sets(writer).await
}

/// Address sets of network policies and of kube-proxy: after the rules that use them. Those that are still in use are named.
async fn remove_sets(writer: &HostWriter) -> Vec<String> {
    let Some(ipset) = program(writer, "ipset") else { return Vec::new() };
    let Ok(listed) = writer.ask(&ipset, &["list", "-name"], QUICK).await else { return Vec::new() };
    let mut left = Vec::new();
    for name in
        listed.stdout.lines().map(str::trim).filter(|n| ours(n.trim_start_matches("inet6:")))
    {
        if !writer.ask(&ipset, &["destroy", name], QUICK).await.is_ok_and(|o| o.ok()) {
            left.push(format!("ipset {name}: a rule of somebody else uses it (`ipset destroy {name}` once it is gone)"));
        }
    }
    left
}

/// Tables that came with us. iptables over nftables makes its own at first use: those go when they hold no rule and no foreign chain.
/// What kube-proxy and flannel make in their nftables modes is theirs alone.
async fn drop_tables(writer: &HostWriter, before: &str) {
    for table in tables(writer).await {
        let Some((family, name)) = table.split_once('/') else { continue };
        let shared =
            matches!(family, "ip" | "ip6") && ["filter", "nat", "mangle", "raw"].contains(&name);
        let alone = matches!(family, "ip" | "ip6")
            && ["kube-proxy", "flannel-ipv4", "flannel-ipv6"].contains(&name);
        if !(shared || alone) || before.split(' ').any(|b| b == table) {
            continue;
        }
        if alone {
            let _ = writer.ask("nft", &["delete", "table", family, name], QUICK).await;
            continue;
        }
        let Ok(listing) = writer.ask("nft", &["list", "table", family, name], QUICK).await else {
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
            let _ = writer.ask("nft", &["delete", "table", family, name], QUICK).await;
        }
    }
}

/// The kubelet's cgroups: empty by now, and left by nobody else. Says whether all are gone.
fn remove_cgroups(writer: &HostWriter) -> bool {
    let mut gone = true;
    let mut roots = vec!["/sys/fs/cgroup".to_owned()];
    roots.extend(writer.list("/sys/fs/cgroup").into_iter().map(|n| format!("/sys/fs/cgroup/{n}")));
    for root in roots {
        for name in ["kubepods", SLICE, "k8s.io"] {
            let path = format!("{root}/{name}");
            remove_cgroup(writer, &path);
            gone &= !writer.exists(&path);
        }
    }
    gone
}

fn remove_cgroup(writer: &HostWriter, path: &str) {
    for name in writer.list(path) {
        let below = format!("{path}/{name}");
        if writer.is_dir(&below) {
            remove_cgroup(writer, &below);
        }
    }
    writer.remove_empty(path);
}

fn on_bridge(host: &Host, link: &str, bridge: &str) -> bool {
    host.link_target(&format!("/sys/class/net/{link}/master")).is_some_and(|t| t.ends_with(bridge))
}

/// Whether a chain or an address set is one that Kubernetes, flannel or the CNI plugins made.
fn ours(chain: &str) -> bool {
    ["KUBE-", "CNI-", "FLANNEL-"].iter().any(|p| chain.starts_with(p))
}

/// The commands that take our chains, and the rules that lead into them, out of a table: rules first, then flush, then delete.
fn removals(saved: &str, table: &str) -> Vec<Vec<String>> {
    let mut commands = Vec::new();
    let mut chains = Vec::new();
    for line in saved.lines() {
        if let Some(chain) =
            line.strip_prefix(':').and_then(|l| l.split_whitespace().next()).filter(|c| ours(c))
        {
            chains.push(chain.to_owned());
        }
        let Some(rule) = line.strip_prefix("-A ") else { continue };
        let words = shell_words(rule);
        let target =
            words.iter().position(|w| w == "-j" || w == "-g").and_then(|at| words.get(at + 1));
        let from_ours = words.first().is_some_and(|c| ours(c));
        // rules with a target of the kernel's own are known by their words: flannel and kube-router put ACCEPT and MASQUERADE into
        // chains that are not theirs
        let marked = words.windows(2).any(|w| match w[0].as_str() {
            "--comment" => ["flanneld", "KUBE-ROUTER ", "kube-router netpol"]
                .iter()
                .any(|c| w[1].starts_with(c)),
            "--match-set" => ours(&w[1]),
            _ => false,
        });
        if !from_ours && (target.is_some_and(|t| ours(t)) || marked) {
            let mut args = vec!["-t".to_owned(), table.to_owned(), "-D".to_owned()];
            args.extend(words);
            commands.push(args);
        }
    }
    let each = |flag: &str| {
        chains
            .iter()
            .map(|c| ["-t", table, flag, c].map(str::to_owned).to_vec())
            .collect::<Vec<_>>()
    };
    commands.extend(each("-F"));
    commands.extend(each("-X"));
    commands
}

/// Splits a line of iptables-save: words, with double quotes around those that hold spaces.
fn shell_words(line: &str) -> Vec<String> {
    let (mut words, mut word, mut quoted, mut escaped) = (Vec::new(), String::new(), false, false);
    for c in line.chars() {
        match c {
            _ if escaped => {
                word.push(c);
                escaped = false;
            }
            '\\' if quoted => escaped = true,
            '"' => quoted = !quoted,
            ' ' if !quoted => words.extend((!word.is_empty()).then(|| std::mem::take(&mut word))),
            _ => word.push(c),
        }
    }
    words.extend((!word.is_empty()).then_some(word));
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As kube-router 2.6 leaves them in the kernel's own chains (cloudnativelabs/kube-router `pkg/controllers/netpol`).
    #[test]
    fn rules_that_accept_for_a_network_policy_go_too() {
        let comment =
            "KUBE-ROUTER rule to explicitly ACCEPT traffic that comply to network policies";
        let saved = format!(
            "*filter\n:INPUT ACCEPT [0:0]\n:KUBE-ROUTER-INPUT - [0:0]\n\
             -A INPUT -m comment --comment \"kube-router netpol - 4IA2OSFRMVNDXBVV\" -j KUBE-ROUTER-INPUT\n\
             -A INPUT -m comment --comment \"{comment}\" -m mark --mark 0x20000/0x20000 -j ACCEPT\n\
             -A INPUT -m comment --comment \"ssh from the office, not KUBE-ROUTER\" -p tcp -m tcp --dport 22 -j ACCEPT\n\
             -A OUTPUT -m set --match-set KUBE-DST-ABC dst -j ACCEPT\n-A OUTPUT -m set --match-set office dst -j ACCEPT\nCOMMIT\n"
        );
        let commands: Vec<String> =
            removals(&saved, "filter").iter().map(|c| c.join(" ")).collect();
        assert_eq!(
            commands,
            [
                "-t filter -D INPUT -m comment --comment kube-router netpol - 4IA2OSFRMVNDXBVV -j KUBE-ROUTER-INPUT".to_owned(),
                format!("-t filter -D INPUT -m comment --comment {comment} -m mark --mark 0x20000/0x20000 -j ACCEPT"),
                "-t filter -D OUTPUT -m set --match-set KUBE-DST-ABC dst -j ACCEPT".to_owned(),
                "-t filter -F KUBE-ROUTER-INPUT".to_owned(),
                "-t filter -X KUBE-ROUTER-INPUT".to_owned(),
            ]
        );
    }

    #[test]
    fn foreign_rules_stay() {
        let saved = "*nat\n:PREROUTING ACCEPT [0:0]\n:KUBE-SERVICES - [0:0]\n:MYCHAIN - [0:0]\n\
                     -A PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES\n\
                     -A PREROUTING -p tcp -m tcp --dport 8080 -j MYCHAIN\n-A KUBE-SERVICES -d 10.43.0.1/32 -j ACCEPT\n\
                     -A POSTROUTING -s 10.42.0.0/16 -m comment --comment \"flanneld masq\" -j MASQUERADE\nCOMMIT\n";
        let commands: Vec<String> = removals(saved, "nat").iter().map(|c| c.join(" ")).collect();
        assert_eq!(
            commands,
            [
                "-t nat -D PREROUTING -m comment --comment kubernetes service portals -j KUBE-SERVICES",
                "-t nat -D POSTROUTING -s 10.42.0.0/16 -m comment --comment flanneld masq -j MASQUERADE",
                "-t nat -F KUBE-SERVICES",
                "-t nat -X KUBE-SERVICES",
            ]
        );
    }
}
