//! What is known about a machine, as plain data; the parsers of the text it comes from are below it.

pub mod parse;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

/// Everything the checks and the planner look at. Gathered once by `host::gather`, read-only afterwards.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Facts {
    pub uid: u32,
    pub init: String,
    /// systemd's major version, 0 when unknown.
    pub systemd: u32,
    /// `uname -m`.
    pub machine: String,
    pub kernel: String,
    pub hostname: String,
    pub machine_id: String,
    pub os: Os,
    pub cpus: u32,
    pub memory_bytes: u64,
    pub swap_bytes: u64,
    pub disks: Vec<Disk>,
    /// 99th percentile of a small write with fsync on the data disk, microseconds; `None` when not measured (dry run).
    pub fsync_p99_us: Option<u64>,
    pub listeners: Vec<Listener>,
    pub clock: Clock,
    pub resolver: Resolver,
    pub routes: Vec<Route>,
    pub interfaces: Vec<Interface>,
    pub modules: Modules,
    pub cgroup: Cgroup,
    /// `lxc`, `docker`, `systemd-nspawn`, …; `None` on a machine of its own.
    pub container: Option<String>,
    pub kmsg: bool,
    pub firewalld_active: bool,
    pub ufw_active: bool,
    pub selinux: Selinux,
    pub iptables: Option<Iptables>,
    /// Proxy variables of this environment, upper-case names.
    pub proxy: BTreeMap<String, String>,
    pub trust_store: bool,
    pub k3s: K3s,
    /// Other Kubernetes or container software that would be in the way.
    pub other_kubernetes: Vec<String>,
    /// Programs of the node that checks or steps depend on, name → path.
    pub programs: BTreeMap<String, String>,
    /// IngressClass controllers and images found in a running cluster that are retired.
    pub retired_ingress: Option<u32>,
    /// A k3s of ours runs its own traefik, which its settings do not turn off yet.
    pub traefik: bool,
    /// Files with secrets that every user may read.
    pub readable: Vec<Readable>,
}

/// A file that lays secrets open.
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq)]
pub struct Readable {
    pub path: String,
    /// Permission bits as they were found.
    pub mode: u32,
    /// What it holds, without the secrets themselves.
    pub holds: Vec<String>,
    /// Whether this run has closed it.
    pub closed: bool,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq)]
#[serde(default)]
pub struct Os {
    pub id: String,
    pub id_like: String,
    pub version: String,
    pub pretty: String,
}

/// The file system that holds `path`, or would hold it once made.
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq)]
pub struct Disk {
    pub path: String,
    pub available_bytes: u64,
    pub total_bytes: u64,
    pub inodes_free: u64,
    /// 0 on file systems without a fixed table of inodes.
    pub inodes_total: u64,
    /// Identifies the file system, so that paths on the same one are summed.
    pub device: u64,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq)]
pub struct Listener {
    /// `tcp` or `udp`.
    pub protocol: String,
    pub address: String,
    pub port: u16,
    pub pid: Option<u32>,
    pub process: Option<String>,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq)]
#[serde(default)]
pub struct Clock {
    /// Seconds since 1970 by this machine's clock.
    pub now: i64,
    /// Whether a time service says that it is in sync; `None` when there is none to ask.
    pub synchronized: Option<bool>,
    /// This clock minus a remote one, seconds, and who said so.
    pub offset: Option<(i64, String)>,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq)]
#[serde(default)]
pub struct Resolver {
    pub nameservers: Vec<String>,
    pub search: Vec<String>,
    /// Servers in systemd-resolved's own upstream file, which k3s prefers when it exists.
    pub upstream: Vec<String>,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq)]
pub struct Route {
    /// `0.0.0.0/0` and `::/0` for the default route.
    pub to: String,
    pub device: String,
    pub metric: u32,
    pub source: Option<String>,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq)]
pub struct Interface {
    pub name: String,
    /// Address with prefix length.
    pub addresses: Vec<String>,
    /// Whether an address came by DHCP.
    pub dynamic: bool,
}

/// Kernel modules: loaded, built in, or there to be loaded.
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq)]
#[serde(default)]
pub struct Modules {
    pub loaded: BTreeSet<String>,
    pub available: BTreeSet<String>,
    /// Whether the module lists could be read at all; in many containers they cannot.
    pub known: bool,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq)]
#[serde(default)]
pub struct Cgroup {
    /// 1 or 2; hybrid set-ups count as 1, as the kubelet sees them.
    pub version: u8,
    pub controllers: BTreeSet<String>,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq)]
#[serde(default)]
pub struct Selinux {
    /// `enforcing`, `permissive`, `disabled`.
    pub mode: String,
    pub k3s_policy: bool,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq)]
pub struct Iptables {
    pub version: String,
    /// `nft` or `legacy`.
    pub backend: String,
}

/// What of k3s is on the machine already, and whose it is.
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq)]
#[serde(default)]
pub struct K3s {
    /// Version of `/usr/local/bin/k3s`.
    pub version: Option<String>,
    /// Evidence of a k3s that our journal does not know: units, programs, configuration.
    pub foreign: Vec<String>,
    /// Whether our journal records an installation, and in which role.
    pub ours: Option<crate::settings::Role>,
    pub active: bool,
    /// `server/db` exists under the data directory.
    pub server_data: bool,
    /// `server/token` exists beside it.
    pub server_token: bool,
    /// A token was given that differs from the one in the data.
    pub token_differs: bool,
    pub node_password: bool,
}

/// An address range, v4 or v6.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cidr {
    pub address: IpAddr,
    pub prefix: u8,
}

impl Cidr {
    /// `10.0.0.0/8`, `fd00::/8`, or a bare address as a range of one.
    pub fn parse(text: &str) -> Option<Cidr> {
        let (address, prefix) = match text.split_once('/') {
            Some((address, prefix)) => (address.parse::<IpAddr>().ok()?, Some(prefix)),
            None => (text.parse::<IpAddr>().ok()?, None),
        };
        let most = if address.is_ipv4() { 32 } else { 128 };
        let prefix = match prefix {
            Some(p) if !p.is_empty() && p.bytes().all(|b| b.is_ascii_digit()) => p.parse().ok()?,
            Some(_) => return None,
            None => most,
        };
        (prefix <= most).then_some(Cidr { address, prefix })
    }

    fn bits(address: IpAddr) -> (u128, u8) {
        match address {
            IpAddr::V4(v4) => (u128::from(u32::from(v4)) << 96, 32),
            IpAddr::V6(v6) => (u128::from(v6), 128),
        }
    }

    /// Whether the two ranges share an address.
    pub fn overlaps(&self, other: &Cidr) -> bool {
        let ((a, family), (b, other_family)) = (Cidr::bits(self.address), Cidr::bits(other.address));
        let prefix = u32::from(self.prefix.min(other.prefix));
        family == other_family && (prefix == 0 || a >> (128 - prefix) == b >> (128 - prefix))
    }

    pub fn contains(&self, address: IpAddr) -> bool {
        let one = Cidr { address, prefix: if address.is_ipv4() { 32 } else { 128 } };
        self.prefix <= one.prefix && self.overlaps(&one)
    }
}

/// Whether anybody on the internet could route to this address.
pub fn globally_routable(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => {
            let [a, b, c, _] = v4.octets();
            !(v4.is_private()
                || v4.is_loopback()
                || v4.is_link_local()
                || v4.is_broadcast()
                || v4.is_unspecified()
                || v4.is_multicast()
                || a == 0
                || a >= 240
                || (a == 100 && (64..128).contains(&b)) // carrier NAT, RFC 6598; Tailscale lives there too
                || (a == 198 && (18..20).contains(&b)) // benchmarks, RFC 2544
                || (a == 192 && b == 0 && c == 0))
        }
        IpAddr::V6(v6) => (v6.segments()[0] & 0xe000) == 0x2000,
    }
}

impl Facts {
    /// Interfaces of pods and containers, which never carry the node's address.
    pub fn virtual_interface(name: &str) -> bool {
        ["lo", "cni", "flannel", "veth", "docker", "br-", "virbr", "kube-", "cali", "podman", "lxcbr", "lxdbr", "dummy"]
            .iter()
            .any(|prefix| name == *prefix || name.starts_with(prefix) && *prefix != "lo")
    }

    /// The default IPv4 routes, best metric first.
    pub fn default_routes(&self) -> Vec<&Route> {
        let mut found: Vec<&Route> = self.routes.iter().filter(|r| r.to == "0.0.0.0/0").collect();
        if found.is_empty() {
            found = self.routes.iter().filter(|r| r.to == "::/0").collect();
        }
        found.sort_by_key(|r| r.metric);
        found
    }

    /// Interface and address that the best default route uses.
    pub fn primary(&self) -> Option<(String, IpAddr)> {
        let route = *self.default_routes().first()?;
        let v6 = route.to == "::/0";
        let of_interface = || {
            let interface = self.interfaces.iter().find(|i| i.name == route.device)?;
            interface.addresses.iter().filter_map(|a| Cidr::parse(a)).map(|c| c.address).find(|a| a.is_ipv6() == v6 && !link_local(*a))
        };
        let address = route.source.as_deref().and_then(|s| s.parse().ok()).or_else(of_interface)?;
        Some((route.device.clone(), address))
    }

    /// The interface that has this address.
    pub fn interface_of(&self, address: IpAddr) -> Option<&Interface> {
        self.interfaces.iter().find(|i| i.addresses.iter().any(|a| Cidr::parse(a).is_some_and(|c| c.address == address)))
    }

    pub fn has(&self, module: &str) -> bool {
        self.modules.loaded.contains(module) || self.modules.available.contains(module)
    }
}

pub(crate) fn link_local(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => (v6.segments()[0] & 0xffc0) == 0xfe80,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_overlap_when_one_holds_the_other() {
        let c = |t| Cidr::parse(t).unwrap();
        assert!(c("10.42.0.0/16").overlaps(&c("10.0.0.0/8")));
        assert!(!c("10.42.0.0/16").overlaps(&c("10.43.0.0/16")));
        assert!(c("0.0.0.0/0").overlaps(&c("10.43.0.0/16")));
        assert!(!c("::/0").overlaps(&c("0.0.0.0/0")));
        for bad in ["10.0.0.0/33", "10.0.0.0/", "10.0.0.0/+8", "x/8", "::/129"] {
            assert_eq!(Cidr::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn private_carrier_and_documented_local_ranges_are_not_public() {
        for (text, public) in [
            ("10.1.2.3", false),
            ("100.64.0.1", false),
            ("172.15.0.1", true),
            ("8.8.8.8", true),
            ("fd00::1", false),
            ("2a01::1", true),
            ("fe80::1", false),
        ] {
            assert_eq!(globally_routable(text.parse().unwrap()), public, "{text}");
        }
    }
}
