//! Parsers of the text that facts come from: `/proc`, os-release, `ip -j`. Each takes text and
//! never fails on garbage.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::{Address, Cgroup, Interface, Iptables, Listener, Os, ResolvConf, Route};
use crate::base::json;

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
        .find_map(|line| {
            line.strip_prefix(field)?
                .strip_prefix(':')?
                .split_whitespace()
                .next()?
                .parse::<u64>()
                .ok()
        })
        .map_or(0, |kib| kib.saturating_mul(1024))
}

/// Number of processors in `/proc/cpuinfo`.
pub fn cpus(text: &str) -> u32 {
    let count = text.lines().filter(|l| l.starts_with("processor")).count();
    u32::try_from(count).unwrap_or(u32::MAX)
}

/// Listening sockets of `/proc/net/{tcp,tcp6,udp,udp6}`, with the socket's inode to find its owner
/// by.
pub fn sockets(text: &str, protocol: &str) -> Vec<(Listener, u64)> {
    let mut found = Vec::new();
    for line in text.lines().skip(1) {
        let words: Vec<&str> = line.split_whitespace().collect();
        let (Some(local), Some(state), Some(inode)) = (words.get(1), words.get(3), words.get(9))
        else {
            continue;
        };
        // 0A is LISTEN; a bound UDP socket is 07 (include/net/tcp_states.h)
        let expected = if protocol == "tcp" { "0A" } else { "07" };
        if *state != expected {
            continue;
        }
        let Some((address, port)) = local.split_once(':') else { continue };
        let (Some(address), Ok(port), Ok(inode)) =
            (kernel_address(address), u16::from_str_radix(port, 16), inode.parse())
        else {
            continue;
        };
        found.push((
            Listener {
                protocol: protocol.into(),
                address: address.to_string(),
                port,
                pid: None,
                process: None,
            },
            inode,
        ));
    }
    found
}

/// The kernel prints addresses as native-endian 32-bit words in hexadecimal.
fn kernel_address(hex: &str) -> Option<IpAddr> {
    let word = |at: usize| {
        hex.get(at..at + 8).and_then(|w| u32::from_str_radix(w, 16).ok()).map(u32::to_le_bytes)
    };
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

/// A resolv.conf, as k3s judges it (isValidResolvConf) and as the kubelet reads it
/// (pkg/kubelet/network/dns, parseResolvConf).
pub fn resolv_conf(text: &str) -> ResolvConf {
    let mut found = ResolvConf::default();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        match words.next() {
            Some("nameserver") => {
                let server = words.next().unwrap_or_default().to_owned();
                if !line.starts_with(char::is_whitespace) {
                    // k3s takes everything up to the next space, and a line without any as an
                    // invalid one
                    found.nameservers.push(server.clone());
                }
                found.pod_nameservers.extend((!server.is_empty()).then_some(server));
            }
            Some("search") => {
                found.search = words
                    .map(|w| if w == "." { w } else { w.strip_suffix('.').unwrap_or(w) }.to_owned())
                    .collect()
            }
            _ => {}
        }
    }
    found
}

/// `ip -j -4 route show` or `-6`; `None` for text that is no such list. Nothing at all is an empty
/// one.
pub fn ip_routes(json: &str, v6: bool) -> Option<Vec<Route>> {
    Some(rows(json)?.iter().flat_map(|row| route(row, v6)).collect())
}

fn rows(json: &str) -> Option<Vec<serde_json::Value>> {
    if json.trim().is_empty() {
        return Some(Vec::new());
    }
    match json::read(json) {
        Ok(serde_json::Value::Array(rows)) => Some(rows),
        _ => None,
    }
}

fn route(row: &serde_json::Value, v6: bool) -> Vec<Route> {
    let Some(to) = row.get("dst").and_then(|d| d.as_str()) else { return Vec::new() };
    let to = match to {
        "default" if v6 => "::/0",
        "default" => "0.0.0.0/0",
        other => other,
    };
    let text = |from: &serde_json::Value, key: &str| {
        from.get(key).and_then(|v| v.as_str()).map(str::to_owned)
    };
    let flag = |from: &serde_json::Value, name: &str| {
        from.get("flags").and_then(|f| f.as_array()).is_some_and(|f| f.iter().any(|v| v == name))
    };
    let metric = row
        .get("metric")
        .and_then(serde_json::Value::as_u64)
        .and_then(|m| u32::try_from(m).ok())
        .unwrap_or(0);
    let preference = match text(row, "pref").as_deref() {
        Some("high") => 0,
        Some("low") => 2,
        _ => 1,
    };
    let kind = text(row, "type").unwrap_or_else(|| "unicast".into());
    if !matches!(kind.as_str(), "unicast" | "blackhole" | "unreachable" | "prohibit") {
        return Vec::new();
    }
    let base = Route {
        to: to.to_owned(),
        metric,
        source: text(row, "prefsrc"),
        kind,
        preference,
        ..Route::default()
    };
    let hops = row.get("nexthops").and_then(|h| h.as_array());
    let hops: Vec<&serde_json::Value> =
        hops.map_or_else(|| vec![row], |hops| hops.iter().collect());
    hops.into_iter()
        .filter(|hop| !flag(hop, "dead"))
        .filter_map(|hop| {
            let device = text(hop, "dev").or_else(|| text(row, "dev")).unwrap_or_default();
            let gateway = text(hop, "gateway").or_else(|| text(row, "gateway"));
            // one that throws away has no device, any other has
            (!device.is_empty() || base.kind != "unicast").then(|| Route {
                device,
                gateway,
                link_down: flag(hop, "linkdown"),
                ..base.clone()
            })
        })
        .collect()
}

/// `ip -j address show`; `None` for text that is no such list.
pub fn ip_addresses(json: &str) -> Option<Vec<Interface>> {
    Some(rows(json)?.iter().filter_map(interface).collect())
}

fn interface(row: &serde_json::Value) -> Option<Interface> {
    let alternative_names = row
        .get("altnames")
        .and_then(|a| a.as_array())
        .into_iter()
        .flatten()
        .filter_map(|n| n.as_str())
        .map(str::to_owned)
        .collect();
    let mut interface = Interface {
        name: row.get("ifname")?.as_str()?.to_owned(),
        alternative_names,
        addresses: Vec::new(),
    };
    for info in row.get("addr_info").and_then(|a| a.as_array()).into_iter().flatten() {
        let (Some(local), Some(prefix)) =
            (info.get("local").and_then(|l| l.as_str()), info.get("prefixlen"))
        else {
            continue;
        };
        let flag =
            |name: &str| info.get(name).and_then(serde_json::Value::as_bool).unwrap_or(false);
        if let Some(address) = Address::parse(&format!("{local}/{prefix}")) {
            interface.addresses.push(Address {
                dynamic: flag("dynamic"),
                secondary: flag("secondary") && !flag("temporary"),
                temporary: flag("temporary"),
                unusable: flag("deprecated") || flag("tentative") || flag("dadfailed"),
                ..address
            });
        }
    }
    Some(interface)
}

/// First column of `/proc/modules`, and the names in `modules.builtin` or `modules.dep`. `-` and
/// `_` are the same.
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
        return Cgroup {
            version: 2,
            controllers: text.split_whitespace().map(str::to_owned).collect(),
        };
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
pub fn version_numbers(version: &str) -> Vec<u32> {
    version
        .split('.')
        .map_while(|part| {
            part.chars().take_while(char::is_ascii_digit).collect::<String>().parse().ok()
        })
        .collect()
}

/// The value that a variable has after `sh` has sourced this text; `None` when it is never set. No
/// expansion is done.
pub fn shell_variable(text: &str, name: &str) -> Option<String> {
    let mut value = None;
    for command in shell_commands(text) {
        let mut words = command.iter().map(String::as_str).peekable();
        // a variable before a command holds for that command only
        let kept = matches!(words.peek(), Some(&"export" | &"readonly")) && words.next().is_some()
            || command.iter().all(|w| w.contains('='));
        if kept {
            let set = words.filter_map(|w| w.split_once('=')).rfind(|(key, _)| *key == name);
            value = set.map(|(_, v)| v.to_owned()).or(value);
        }
    }
    value
}

/// Simple commands of a shell's text as words without quotes and comments (POSIX shell command
/// language, 2.2 and 2.3).
fn shell_commands(text: &str) -> Vec<Vec<String>> {
    let (mut commands, mut words, mut word) = (Vec::new(), Vec::new(), None::<String>);
    let mut quote = None;
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match (quote, c) {
            (Some(q), c) if c == q => quote = None,
            (None | Some('"'), '\\') => match chars.next() {
                Some('\n') | None => {}
                Some(next) => word.get_or_insert_default().push(next),
            },
            (Some(_), c) => word.get_or_insert_default().push(c),
            (None, '\'' | '"') => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            (None, '#') if word.is_none() => {
                let _ = chars.by_ref().find(|c| *c == '\n');
                commands.push(std::mem::take(&mut words));
            }
            (None, '\n' | ';' | '&' | '|') => {
                words.extend(word.take());
                commands.push(std::mem::take(&mut words));
            }
            (None, c) if c.is_whitespace() => words.extend(word.take()),
            (None, c) => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    commands.push(words);
    commands.retain(|c| !c.is_empty());
    commands
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
        assert_eq!(
            (found[0].0.address.as_str(), found[0].0.port, found[0].1),
            ("127.0.0.1", 6443, 1234)
        );
        let v6 = "h\n 0: 00000000000000000000000001000000:0016 0:0 0A 0 0 0 0 0 77 1\n";
        assert_eq!(sockets(v6, "tcp")[0].0.address, "::1");
    }

    #[test]
    fn flags_of_addresses_belong_to_each() {
        let text = r#"[{"ifname":"eth0","altnames":["enp0s3"],"addr_info":[
            {"family":"inet","local":"10.0.0.5","prefixlen":24,"scope":"global","label":"eth0"},
            {"family":"inet","local":"10.0.0.6","prefixlen":24,"secondary":true},
            {"family":"inet6","local":"2001:db8::5","prefixlen":64,"dynamic":true,"mngtmpaddr":true},
            {"family":"inet6","local":"2001:db8::6","prefixlen":64,"secondary":true,"temporary":true,"dynamic":true},
            {"family":"inet6","local":"2001:db8::7","prefixlen":64,"deprecated":true,"dynamic":true},
            {"family":"inet6","local":"2001:db8::8","prefixlen":64,"tentative":true}]},{}]"#;
        let found = ip_addresses(text).unwrap();
        let flags: Vec<_> = found[0]
            .addresses
            .iter()
            .map(|a| (a.dynamic, a.secondary, a.temporary, a.unusable))
            .collect();
        let (no, yes) = (false, true);
        assert_eq!(
            flags,
            [
                (no, no, no, no),
                (no, yes, no, no),
                (yes, no, no, no),
                (yes, no, yes, no),
                (yes, no, no, yes),
                (no, no, no, yes)
            ]
        );
        assert_eq!(found[0].alternative_names, ["enp0s3"]);
    }

    #[test]
    fn routes_of_every_form_are_read() {
        let text = r#"[{"dst":"default","metric":100,"flags":[],"nexthops":[{"gateway":"10.0.0.1","dev":"eth0","weight":1,"flags":["dead","linkdown"]},
            {"gateway":"10.1.0.1","dev":"eth1","weight":1,"flags":[]}]},
            {"dst":"10.9.0.0/16","dev":"eth2","scope":"link","prefsrc":"10.9.0.5","flags":["linkdown"]},
            {"type":"blackhole","dst":"10.8.0.0/16","flags":[]},{"type":"multicast","dst":"ff00::/8","dev":"eth0"},
            {"dst":"default","via":{"family":"inet6","host":"fe80::1"},"dev":"eth3","flags":[]},{"dst":"10.7.0.0/16"}]"#;
        let found = ip_routes(text, false).unwrap();
        let seen: Vec<_> = found
            .iter()
            .map(|r| (r.to.as_str(), r.device.as_str(), r.gateway.as_deref(), r.link_down))
            .collect();
        assert_eq!(
            seen,
            [
                ("0.0.0.0/0", "eth1", Some("10.1.0.1"), false),
                ("10.9.0.0/16", "eth2", None, true),
                ("10.8.0.0/16", "", None, false),
                ("0.0.0.0/0", "eth3", None, false)
            ]
        );
        assert_eq!(
            (
                ip_routes("", false),
                ip_routes("[ ]\n", false),
                ip_routes("default via 10.0.0.1 dev eth0\n", false)
            ),
            (Some(vec![]), Some(vec![]), None)
        );
    }

    #[test]
    fn a_sourced_file_is_read_as_the_shell_reads_it() {
        for (text, value) in [
            ("ENABLED=yes", Some("yes")),
            ("# c\nENABLED=\"yes\"\n", Some("yes")),
            ("  export ENABLED='yes' # on\n", Some("yes")),
            ("ENABLED=no; ENABLED=y\"e\"s", Some("yes")),
            ("ENABLED=yes\nENABLED=no\n", Some("no")),
            ("A=1 ENABLED=yes\n", Some("yes")),
            ("ENABLED=y\\\nes\n", Some("yes")),
            ("#ENABLED=yes\n", None),
            ("ENABLED = yes\n", None),
            ("ENABLED=yes true\n", None),
            ("echo ENABLED=yes\n", None),
            ("X='\nENABLED=yes\n'\n", None),
        ] {
            assert_eq!(shell_variable(text, "ENABLED").as_deref(), value, "{text:?}");
        }
    }

    #[test]
    fn hybrid_hierarchies_count_as_version_one() {
        let text =
            "#subsys_name\thierarchy\tnum_cgroups\tenabled\ncpuset\t3\t1\t1\nmemory\t0\t1\t0\n";
        let cgroup = cgroups(None, text);
        assert_eq!(cgroup.version, 1);
        assert!(cgroup.controllers.contains("cpuset") && !cgroup.controllers.contains("memory"));
    }

    #[test]
    fn module_lists_of_three_kinds_give_names() {
        let names = module_names(
            "br_netfilter 32768 0 - Live 0x0\nkernel/net/ipv4/vxlan-x.ko.xz: a b\n\
             kernel/fs/overlayfs/overlay.ko\n",
        );
        assert_eq!(names.into_iter().collect::<Vec<_>>(), ["br_netfilter", "overlay", "vxlan_x"]);
    }

    proptest! {
        #[test]
        fn no_parser_panics(text in "(?s).{0,300}") {
            let _ = (os_release(&text), meminfo(&text, "MemTotal"), cpus(&text));
            let _ = (sockets(&text, "tcp"), resolv_conf(&text), module_names(&text));
            let _ = (ip_routes(&text, false), ip_addresses(&text));
            let _ = (cgroups(None, &text), cgroups(Some(&text), ""));
            let _ = (iptables(&text), version_numbers(&text));
            let _ = crate::base::cidr::Cidr::parse(&text);
            let _ = shell_variable(&text, "ENABLED");
        }
    }
}
