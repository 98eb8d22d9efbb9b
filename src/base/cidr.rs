//! Address ranges, and what kind of address one is.

use std::net::IpAddr;

use ipnet::IpNet;

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
        let max = if address.is_ipv4() { 32 } else { 128 };
        let prefix = match prefix {
            Some(p) if !p.is_empty() && p.bytes().all(|b| b.is_ascii_digit()) => p.parse().ok()?,
            Some(_) => return None,
            None => max,
        };
        (prefix <= max).then_some(Cidr { address, prefix })
    }

    fn net(&self) -> IpNet {
        let max = if self.address.is_ipv4() { 32 } else { 128 };
        IpNet::new_assert(self.address, self.prefix.min(max))
    }

    /// Whether the two ranges share an address.
    pub fn overlaps(&self, other: &Cidr) -> bool {
        let (a, b) = (self.net(), other.net());
        a.contains(&b.network()) || b.contains(&a.network())
    }

    pub fn contains(&self, address: IpAddr) -> bool {
        self.net().contains(&address)
    }
}

/// The first address of a range.
pub fn network_address(range: Cidr) -> IpAddr {
    range.net().network()
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
                // carrier NAT, RFC 6598; Tailscale lives there too
                || (a == 100 && (64..128).contains(&b))
                // benchmarks, RFC 2544
                || (a == 198 && (18..20).contains(&b))
                || (a == 192 && b == 0 && c == 0))
        }
        IpAddr::V6(v6) => (v6.segments()[0] & 0xe000) == 0x2000,
    }
}

/// Whether an address holds on one link only.
pub fn link_local(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => (v6.segments()[0] & 0xffc0) == 0xfe80,
    }
}

/// `[addr]:port` or `addr:port` or `name:port`, as URLs want it.
pub fn host_in_url(host: &str) -> String {
    if host.parse::<std::net::Ipv6Addr>().is_ok() { format!("[{host}]") } else { host.to_owned() }
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
