//! Parsers of the text that facts come from: `/proc`, os-release, `ip -j`. Each takes text and never fails on garbage.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::{Cgroup, Interface, Iptables, Listener, Os, Resolver, Route};

/// `/etc/os-release` (freedesktop.org, os-release(5)).
pub fn os_release(text: &str) -> Os {
    let mut os = Os::default();
    for line in text.lines() {
        let Some((key, value)) = line.split_once('=') else { continue };
        let value = value.trim().trim_matches(['"', '\'']).to_owned();
        match key.trim() {
            "ID" => os.id = value,
            "ID_LIKE" => os.id_like = value,
            "VERSION_ID" => os.version = value,
            "PRETTY_NAME" => os.pretty = value,
            _ => {}
        }
    }
    os
}

/// A field of `/proc/meminfo`, in bytes.
pub fn meminfo(text: &str, field: &str) -> u64 {
    text.lines()
        .find_map(|line| line.strip_prefix(field)?.strip_prefix(':')?.split_whitespace().next()?.parse::<u64>().ok())
        .map_or(0, |kib| kib.saturating_mul(1024))
}

/// Number of processors in `/proc/cpuinfo`.
pub fn cpus(text: &str) -> u32 {
    let count = text.lines().filter(|l| l.starts_with("processor")).count();
    u32::try_from(count).unwrap_or(u32::MAX)
}

/// Listening sockets of `/proc/net/{tcp,tcp6,udp,udp6}`, with the socket's inode to find its owner by.
pub fn sockets(text: &str, protocol: &str) -> Vec<(Listener, u64)> {
    let mut found = Vec::new();
    for line in text.lines().skip(1) {
        let words: Vec<&str> = line.split_whitespace().collect();
        let (Some(local), Some(state), Some(inode)) = (words.get(1), words.get(3), words.get(9)) else { continue };
        // 0A is LISTEN; a bound UDP socket is 07 (include/net/tcp_states.h)
        let wanted = if protocol == "tcp" { "0A" } else { "07" };
        if *state != wanted {
            continue;
        }
        let Some((address, port)) = local.split_once(':') else { continue };
        let (Some(address), Ok(port), Ok(inode)) = (kernel_address(address), u16::from_str_radix(port, 16), inode.parse()) else { continue };
        found.push((Listener { protocol: protocol.into(), address: address.to_string(), port, pid: None, process: None }, inode));
    }
    found
}

/// The kernel prints addresses as native-endian 32-bit words in hexadecimal.
fn kernel_address(hex: &str) -> Option<IpAddr> {
    let word = |at: usize| hex.get(at..at + 8).and_then(|w| u32::from_str_radix(w, 16).ok()).map(u32::to_le_bytes);
    match hex.len() {
        8 => word(0).map(|b| IpAddr::V4(Ipv4Addr::from(b))),
        32 => {
            let mut bytes = [0; 16];
            for (n, chunk) in bytes.chunks_mut(4).enumerate() {
                chunk.copy_from_slice(&word(n * 8)?);
            }
            let v6 = Ipv6Addr::from(bytes);
            Some(v6.to_ipv4_mapped().map_or(IpAddr::V6(v6), IpAddr::V4))
        }
        _ => None,
    }
}

/// `/etc/resolv.conf`: servers and search list.
pub fn resolv_conf(text: &str) -> Resolver {
    let mut resolver = Resolver::default();
    for line in text.lines() {
        let mut words = line.split(['#', ';']).next().unwrap_or_default().split_whitespace();
        match words.next() {
            Some("nameserver") => resolver.nameservers.extend(words.next().map(str::to_owned)),
            Some("search" | "domain") => resolver.search = words.map(str::to_owned).collect(),
            _ => {}
        }
    }
    resolver
}

/// `ip -j -4 route show` or `-6`.
pub fn ip_routes(json: &str, v6: bool) -> Vec<Route> {
    let Ok(serde_json::Value::Array(rows)) = serde_json::from_str(json) else { return Vec::new() };
    rows.iter()
        .filter_map(|row| {
            let to = match row.get("dst")?.as_str()? {
                "default" if v6 => "::/0",
                "default" => "0.0.0.0/0",
                other => other,
            };
            let kind = row.get("type").and_then(|t| t.as_str()).unwrap_or("unicast");
            if kind != "unicast" {
                return None;
            }
            Some(Route {
                to: to.to_owned(),
                device: row.get("dev")?.as_str()?.to_owned(),
                metric: row.get("metric").and_then(serde_json::Value::as_u64).and_then(|m| u32::try_from(m).ok()).unwrap_or(0),
                source: row.get("prefsrc").and_then(|s| s.as_str()).map(str::to_owned),
            })
        })
        .collect()
}

/// `ip -j address show`.
pub fn ip_addresses(json: &str) -> Vec<Interface> {
    let Ok(serde_json::Value::Array(rows)) = serde_json::from_str(json) else { return Vec::new() };
    rows.iter()
        .filter_map(|row| {
            let mut interface = Interface { name: row.get("ifname")?.as_str()?.to_owned(), ..Interface::default() };
            for info in row.get("addr_info").and_then(|a| a.as_array()).into_iter().flatten() {
                let (Some(local), Some(prefix)) = (info.get("local").and_then(|l| l.as_str()), info.get("prefixlen")) else { continue };
                interface.addresses.push(format!("{local}/{prefix}"));
                interface.dynamic |= info.get("dynamic").and_then(serde_json::Value::as_bool).unwrap_or(false);
            }
            Some(interface)
        })
        .collect()
}

/// First column of `/proc/modules`, and the names in `modules.builtin` or `modules.dep`. `-` and `_` are the same.
pub fn module_names(text: &str) -> BTreeSet<String> {
    text.lines()
        .filter_map(|line| {
            let first = line.split([' ', ':']).next()?;
            let file = first.rsplit('/').next()?;
            let name = file.split(".ko").next()?;
            (!name.is_empty()).then(|| name.replace('-', "_"))
        })
        .collect()
}

/// Enabled controllers: `cgroup.controllers` of v2, or `/proc/cgroups` of v1.
pub fn cgroups(unified: Option<&str>, proc_cgroups: &str) -> Cgroup {
    if let Some(text) = unified {
        return Cgroup { version: 2, controllers: text.split_whitespace().map(str::to_owned).collect() };
    }
    let controllers = proc_cgroups
        .lines()
        .filter(|l| !l.starts_with('#'))
        .filter_map(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            (words.get(3) == Some(&"1")).then(|| words[0].to_owned())
        })
        .collect();
    Cgroup { version: 1, controllers }
}

/// `iptables --version`: `iptables v1.8.9 (nf_tables)`.
pub fn iptables(text: &str) -> Option<Iptables> {
    let version = text.split_whitespace().find_map(|w| w.strip_prefix('v'))?;
    let backend = if text.contains("nf_tables") { "nft" } else { "legacy" };
    Some(Iptables { version: version.to_owned(), backend: backend.into() })
}

/// Dotted version numbers, up to the first thing that is not one.
pub fn numbers(version: &str) -> Vec<u32> {
    version.split('.').map_while(|part| part.chars().take_while(char::is_ascii_digit).collect::<String>().parse().ok()).collect()
}

/// Mount points below or at `dir`, deepest first, from `/proc/self/mountinfo`, with the type of each file system.
pub fn mounts_under(mountinfo: &str, dir: &str) -> Vec<(String, String)> {
    let below = format!("{}/", dir.trim_end_matches('/'));
    let mut found: Vec<(String, String)> = mountinfo
        .lines()
        .filter_map(|line| {
            let (left, right) = line.split_once(" - ")?;
            let path = unescape(left.split_whitespace().nth(4)?);
            let kind = right.split_whitespace().next()?.to_owned();
            (path == dir || path.starts_with(&below)).then_some((path, kind))
        })
        .collect();
    // the last line on a path is the topmost mount there; undo in reverse order of mounting
    found.reverse();
    found.sort_by_key(|(path, _)| std::cmp::Reverse(path.len()));
    found
}

/// mountinfo writes space, tab, newline and backslash as three octal digits.
fn unescape(text: &str) -> String {
    let mut out: Vec<u8> = Vec::with_capacity(text.len());
    let bytes = text.as_bytes();
    let mut at = 0;
    while at < bytes.len() {
        let code = (bytes[at] == b'\\')
            .then(|| text.get(at + 1..at + 4).filter(|d| d.bytes().all(|b| (b'0'..=b'7').contains(&b))))
            .flatten()
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match code {
            Some(byte) => {
                out.push(byte);
                at += 4;
            }
            None => {
                out.push(bytes[at]);
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// `key=value` lines, as `systemctl show` prints them.
pub fn pairs(text: &str) -> BTreeMap<String, String> {
    text.lines().filter_map(|l| l.split_once('=')).map(|(k, v)| (k.trim().to_owned(), v.trim().to_owned())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sockets_of_both_families_are_read() {
        let text = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n   \
                    0: 0100007F:192B 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1234 1\n   \
                    1: 0100007F:192C 00000000:0000 01 00000000:00000000 00:00000000 00000000     0        0 1235 1\n";
        let found = sockets(text, "tcp");
        assert_eq!(found.len(), 1);
        assert_eq!((found[0].0.address.as_str(), found[0].0.port, found[0].1), ("127.0.0.1", 6443, 1234));
        let v6 = "h\n 0: 00000000000000000000000001000000:0016 0:0 0A 0 0 0 0 0 77 1\n";
        assert_eq!(sockets(v6, "tcp")[0].0.address, "::1");
    }

    #[test]
    fn mounts_come_deepest_first_and_unescaped() {
        let text = "1 0 0:1 / / rw - ext4 /dev/a rw\n2 1 0:2 / /var/lib/kubelet rw - tmpfs t rw\n\
                    3 2 0:3 / /var/lib/kubelet/a\\040b rw shared:1 - nfs4 h:/x rw\n4 1 0:4 / /var/lib/kubelet2 rw - tmpfs t rw\n";
        let found = mounts_under(text, "/var/lib/kubelet");
        assert_eq!(found, [("/var/lib/kubelet/a b".to_owned(), "nfs4".to_owned()), ("/var/lib/kubelet".to_owned(), "tmpfs".to_owned())]);
    }

    #[test]
    fn hybrid_hierarchies_count_as_version_one() {
        let text = "#subsys_name\thierarchy\tnum_cgroups\tenabled\ncpuset\t3\t1\t1\nmemory\t0\t1\t0\n";
        let cgroup = cgroups(None, text);
        assert_eq!(cgroup.version, 1);
        assert!(cgroup.controllers.contains("cpuset") && !cgroup.controllers.contains("memory"));
    }

    #[test]
    fn module_lists_of_three_kinds_give_names() {
        let names = module_names("br_netfilter 32768 0 - Live 0x0\nkernel/net/ipv4/vxlan-x.ko.xz: a b\nkernel/fs/overlayfs/overlay.ko\n");
        assert_eq!(names.into_iter().collect::<Vec<_>>(), ["br_netfilter", "overlay", "vxlan_x"]);
    }

    proptest! {
        #[test]
        fn no_parser_panics(text in "(?s).{0,300}") {
            let _ = (os_release(&text), meminfo(&text, "MemTotal"), cpus(&text), sockets(&text, "tcp"), resolv_conf(&text));
            let _ = (ip_routes(&text, false), ip_addresses(&text), module_names(&text), cgroups(None, &text), cgroups(Some(&text), ""));
            let _ = (iptables(&text), numbers(&text), mounts_under(&text, "/var"), pairs(&text), super::super::Cidr::parse(&text));
        }
    }
}
