//! Sockets that listen, and the processes that hold them.

use std::collections::{BTreeMap, BTreeSet};

use crate::base::order;
use crate::host::Host;
use crate::install::facts::{Listener, parse};

pub(super) fn listeners(host: &Host) -> Vec<Listener> {
    let mut found = Vec::new();
    for (file, protocol) in [("tcp", "tcp"), ("tcp6", "tcp"), ("udp", "udp"), ("udp6", "udp")] {
        found.extend(parse::sockets(&host.text(&format!("/proc/net/{file}")), protocol));
    }
    let inodes = order::set(found.iter().map(|(_, inode)| *inode));
    let owners = if inodes.is_empty() { BTreeMap::new() } else { owners(host, &inodes) };
    found
        .into_iter()
        .map(|(mut listener, inode)| {
            if let Some((pid, name)) = owners.get(&inode) {
                listener.pid = Some(*pid);
                listener.process = Some(name.clone());
            }
            listener
        })
        .collect()
}

/// Which process holds each socket, by the links in `/proc/PID/fd`.
fn owners(host: &Host, inodes: &BTreeSet<u64>) -> BTreeMap<u64, (u32, String)> {
    let mut found = BTreeMap::new();
    for pid in host.list("/proc").iter().filter_map(|n| n.parse::<u32>().ok()) {
        for fd in host.list(&format!("/proc/{pid}/fd")) {
            let inode = host
                .link_target(&format!("/proc/{pid}/fd/{fd}"))
                .and_then(|t| t.strip_prefix("socket:[")?.strip_suffix(']')?.parse::<u64>().ok())
                .filter(|i| inodes.contains(i));
            if let Some(inode) = inode {
                found.entry(inode).or_insert_with(|| {
                    (pid, host.text(&format!("/proc/{pid}/comm")).trim().to_owned())
                });
            }
        }
    }
    found
}
