//! Rules about name servers: what k3s and the kubelet make of the host's files.

use std::net::IpAddr;

use super::InstallTarget;
use crate::base::cidr::link_local;
use crate::install::facts::{Facts, ResolvConf};
use crate::install::finding::{Finding, Level};

const ETC: &str = "/etc/resolv.conf";
const SYSTEMD: &str = "/run/systemd/resolve/resolv.conf";
/// Most that a pod gets (k8s.io/kubernetes, pkg/apis/core/validation: MaxDNSNameservers,
/// MaxDNSSearchPaths, MaxDNSSearchListChars).
const MAX_SERVERS: usize = 3;
const MAX_DOMAINS: usize = 32;
const MAX_CHARACTERS: usize = 2048;
/// What the cluster puts before the host's list: `default.svc.cluster.local svc.cluster.local
/// cluster.local`.
const CLUSTER_DOMAINS: (usize, usize) = (3, 58);

/// Why k3s takes no server like this one (pkg/agent/config/config.go, isValidNameserver); `None`
/// for a good one.
fn flaw(server: &str) -> Option<&'static str> {
    if server.contains('%') {
        return Some("has a zone");
    }
    let Ok(address) = server.parse::<IpAddr>() else { return Some("is not an address") };
    let address = match address {
        IpAddr::V6(v6) => v6.to_ipv4_mapped().map_or(IpAddr::V6(v6), IpAddr::V4),
        v4 => v4,
    };
    // the metadata service of clouds answers questions about names there
    if address == IpAddr::from([169, 254, 169, 254]) {
        return None;
    }
    let broadcast = address == IpAddr::from([255, 255, 255, 255]);
    match address {
        a if a.is_loopback() => Some("is loopback"),
        a if link_local(a) => Some("is link-local"),
        a if a.is_multicast() => Some("is multicast"),
        a if a.is_unspecified() || broadcast => Some("is no address of a machine"),
        _ => None,
    }
}

/// One bad server makes k3s refuse the whole file.
fn valid(file: Option<&ResolvConf>) -> bool {
    file.is_some_and(|f| {
        !f.nameservers.is_empty() && f.nameservers.iter().all(|s| flaw(s).is_none())
    })
}

/// The file that pods get their servers from, and its path; `None` where k3s writes one with
/// 8.8.8.8.
fn used(facts: &Facts) -> Option<(&str, &ResolvConf)> {
    let resolv_confs = &facts.resolv_confs;
    if let Some((path, file)) = &resolv_confs.chosen {
        return Some((path, file.as_ref()?));
    }
    [(ETC, &resolv_confs.etc), (SYSTEMD, &resolv_confs.systemd)]
        .into_iter()
        .find(|(_, f)| valid(f.as_ref()))
        .and_then(|(p, f)| Some((p, f.as_ref()?)))
}

/// A file that is to be used without systemd-resolved's or with nothing in it.
pub(super) fn none(facts: &Facts, _: &InstallTarget<'_>) -> Vec<Finding> {
    let resolv_confs = &facts.resolv_confs;
    if let Some((path, file)) = &resolv_confs.chosen {
        return match file {
            Some(file) if !file.pod_nameservers.is_empty() => Vec::new(),
            there => {
                let evidence = if there.is_some() {
                    format!("{path} names none")
                } else {
                    format!("{path} is not there")
                };
                let finding = Finding::new(
                    "DNS_NONE",
                    Level::Error,
                    "the file of name servers that was chosen for pods has none",
                    evidence,
                );
                vec![finding.fix(format!(
                    "write `nameserver ADDRESS` into {path}, or leave the setting resolv-conf out"
                ))]
            }
        };
    }
    let named =
        |file: &Option<ResolvConf>| file.as_ref().is_some_and(|f| !f.nameservers.is_empty());
    if named(&resolv_confs.etc) || named(&resolv_confs.systemd) {
        return Vec::new();
    }
    vec![
        Finding::new(
            "DNS_NONE",
            Level::Warning,
            "no name server is configured",
            format!("{ETC} names none; k3s would use 8.8.8.8 for pods"),
        )
        .fix(format!("set your name servers in {ETC}")),
    ]
}

pub(super) fn refused(facts: &Facts, _: &InstallTarget<'_>) -> Vec<Finding> {
    let resolv_confs = &facts.resolv_confs;
    let flaws = |path: &str, file: &ResolvConf| -> Vec<String> {
        file.nameservers
            .iter()
            .filter_map(|s| {
                Some(format!("{path}: {} {}", if s.is_empty() { "a server" } else { s }, flaw(s)?))
            })
            .collect()
    };
    if let Some((path, Some(file))) = &resolv_confs.chosen {
        // k3s takes it as it is; CoreDNS would ask itself
        let loops = file.pod_nameservers.iter().any(|s| flaw(s) == Some("is loopback"));
        if !loops {
            return Vec::new();
        }
        let what = "the file of name servers that was chosen for pods leads them to themselves";
        return vec![
            Finding::new("DNS_LOOPBACK", Level::Error, what, flaws(path, file).join("; "))
                .fix(format!("put servers into {path} that other machines can ask too")),
        ];
    }
    if resolv_confs.chosen.is_some() || used(facts).is_some() {
        return Vec::new();
    }
    let files = [(ETC, &resolv_confs.etc), (SYSTEMD, &resolv_confs.systemd)];
    let evidence: Vec<String> =
        files.iter().filter_map(|(p, f)| Some(flaws(p, f.as_ref()?))).flatten().collect();
    if evidence.is_empty() {
        return Vec::new();
    }
    let mut good: Vec<&str> = Vec::new();
    for server in files.iter().filter_map(|(_, f)| f.as_ref()).flat_map(|f| &f.nameservers) {
        if flaw(server).is_none() && !good.contains(&server.as_str()) {
            good.push(server);
        }
    }
    let what = if good.is_empty() {
        "pods cannot reach the name servers of this machine: k3s gives them 8.8.8.8"
    } else {
        "k3s refuses a file with one server that pods cannot reach, and gives them 8.8.8.8 instead \
         of all"
    };
    let lines: String = if good.is_empty() {
        "nameserver ADDRESS\\n".into()
    } else {
        good.iter().map(|s| format!("nameserver {s}\\n")).collect()
    };
    vec![
        Finding::new("DNS_LOOPBACK", Level::Error, what, evidence.join("; "))
            .fix(format!("write a file for pods: printf '{lines}' > /etc/resolv.pods.conf"))
            .fix(
                "and set it in the [k3s] table of /etc/pipeops/config.toml: resolv-conf = \
                 \"/etc/resolv.pods.conf\"",
            ),
    ]
}

pub(super) fn wildcard(facts: &Facts, _: &InstallTarget<'_>) -> Vec<Finding> {
    let Some((path, file)) = used(facts).or_else(|| Some((ETC, facts.resolv_confs.etc.as_ref()?)))
    else {
        return Vec::new();
    };
    let wild: Vec<&str> = file
        .search
        .iter()
        .map(String::as_str)
        .filter(|s| *s == "." || s.starts_with('*'))
        .collect();
    if wild.is_empty() {
        return Vec::new();
    }
    vec![
        Finding::new(
            "DNS_WILDCARD",
            Level::Warning,
            "the search list of the resolver has a wildcard",
            format!("search {}", wild.join(" ")),
        )
        .fix(format!("remove it from {path}: every name that pods ask for would match it")),
    ]
}

pub(super) fn limits(facts: &Facts, _: &InstallTarget<'_>) -> Vec<Finding> {
    let Some((path, file)) = used(facts) else { return Vec::new() };
    let mut over = Vec::new();
    if file.pod_nameservers.len() > MAX_SERVERS {
        over.push(format!(
            "{} name servers, pods get the first {MAX_SERVERS}: {}",
            file.pod_nameservers.len(),
            file.pod_nameservers[..MAX_SERVERS].join(", ")
        ));
    }
    let (own, characters) = CLUSTER_DOMAINS;
    let length: usize = file.search.iter().map(|s| s.len() + 1).sum();
    if file.search.len() + own > MAX_DOMAINS {
        over.push(format!(
            "{} search domains, pods get the first {} beside the cluster's {own}",
            file.search.len(),
            MAX_DOMAINS - own
        ));
    } else if length + characters > MAX_CHARACTERS {
        over.push(format!(
            "a search list of {length} characters, pods get as many domains as fit into {}",
            MAX_CHARACTERS - characters
        ));
    }
    if over.is_empty() {
        return Vec::new();
    }
    vec![
        Finding::new(
            "DNS_LIMITS",
            Level::Info,
            "pods get only a part of the name servers or search domains",
            format!("{path}: {}", over.join("; ")),
        )
        .fix(
            "put what pods need first; the rest is left out, and the kubelet says so in an event \
             of each pod",
        ),
    ]
}
