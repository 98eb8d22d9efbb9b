//! Addresses and routes of a machine, and the one choice between them.

use std::cmp::Reverse;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::Facts;
use crate::base::cidr::{Cidr, link_local};
use crate::base::order;

/// A way into a network. One with several next hops is one route for each, in the kernel's order.
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq)]
#[serde(default)]
pub struct Route {
    /// `0.0.0.0/0` and `::/0` for the default route.
    pub to: String,
    /// Empty where packets are thrown away.
    pub device: String,
    pub metric: u32,
    pub source: Option<String>,
    pub gateway: Option<String>,
    /// `unicast`, or how packets are thrown away: `blackhole`, `unreachable`, `prohibit`.
    pub kind: String,
    /// Preference of a router's advertisement (RFC 4191): 0 high, 1 medium, 2 low.
    pub preference: u8,
    /// The line below is not connected.
    pub link_down: bool,
}

impl Route {
    /// A default route as k3s sees one: the destination is zero, whatever the prefix. A VPN that
    /// takes everything writes `0.0.0.0/1` and `128.0.0.0/1` (k8s.io/apimachinery,
    /// pkg/util/net/interface.go, getIPv4DefaultRoutes).
    fn default_of(&self, v6: bool) -> bool {
        let forwards = self.kind.is_empty() || self.kind == "unicast";
        forwards
            && Cidr::parse(&self.to).is_some_and(|c| {
                c.address.is_unspecified() && c.address.is_ipv6() == v6 && c.prefix <= 1
            })
    }

    /// Leads to everything or to so much that it says nothing about any one network.
    pub fn is_catch_all(&self) -> bool {
        Cidr::parse(&self.to).is_some_and(|c| c.prefix < 8)
    }
}

/// An address of an interface.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq)]
pub struct Address {
    pub ip: IpAddr,
    pub prefix: u8,
    /// Has a lifetime: it came by DHCP or by a router's advertisement.
    pub dynamic: bool,
    /// A second one in the same network.
    pub secondary: bool,
    /// Changes by itself (RFC 8981).
    pub temporary: bool,
    /// Deprecated, or not known to be free yet: nothing new starts from it.
    pub unusable: bool,
}

impl Address {
    /// `10.0.0.5/24`, with nothing special about it.
    pub fn parse(text: &str) -> Option<Address> {
        let Cidr { address, prefix } = Cidr::parse(text)?;
        Some(Address {
            ip: address,
            prefix,
            dynamic: false,
            secondary: false,
            temporary: false,
            unusable: false,
        })
    }

    pub fn range(&self) -> Cidr {
        Cidr { address: self.ip, prefix: self.prefix }
    }

    /// A network of this one address: a virtual address that wanders between machines, or one of a
    /// cloud.
    fn alone(&self) -> bool {
        self.prefix == if self.ip.is_ipv4() { 32 } else { 128 }
    }

    /// Lower is better as the node's address; the order of the kernel decides between equals.
    fn rank(&self, gateway: Option<IpAddr>) -> u8 {
        let reaches = gateway.is_some_and(|g| !self.alone() && self.range().contains(g));
        u8::from(self.unusable) * 32
            + u8::from(self.temporary) * 16
            + u8::from(!reaches) * 8
            + u8::from(self.secondary) * 4
            + u8::from(self.alone()) * 2
    }
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.ip, self.prefix)
    }
}

#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq)]
#[serde(default)]
pub struct Interface {
    pub name: String,
    /// Other names of the same interface (`ip link property add … altname`).
    pub alternative_names: Vec<String>,
    pub addresses: Vec<Address>,
}

impl Interface {
    pub fn new(name: &str, addresses: &[&str]) -> Interface {
        Interface {
            name: name.to_owned(),
            alternative_names: Vec::new(),
            addresses: addresses.iter().filter_map(|a| Address::parse(a)).collect(),
        }
    }

    /// The best address of a family that others can reach.
    pub fn best_address(&self, v6: bool, gateway: Option<IpAddr>) -> Option<IpAddr> {
        let usable = |a: &&Address| {
            a.ip.is_ipv6() == v6
                && !link_local(a.ip)
                && !a.ip.is_loopback()
                && !a.ip.is_unspecified()
        };
        self.addresses.iter().filter(usable).min_by_key(|a| a.rank(gateway)).map(|a| a.ip)
    }

    fn called(&self, name: &str) -> bool {
        self.name == name || self.alternative_names.iter().any(|n| n == name)
    }
}

impl Facts {
    /// The default routes of a family, the one that packets take first: the narrower one, then
    /// metric, then the router's preference.
    pub fn default_routes(&self, v6: bool) -> Vec<&Route> {
        let mut found: Vec<&Route> = self.routes.iter().filter(|r| r.default_of(v6)).collect();
        let prefix = |r: &Route| Cidr::parse(&r.to).map_or(0, |c| c.prefix);
        let place = |r: &Route| (r.link_down, Reverse(prefix(r)), r.metric, r.preference);
        order::sort(&mut found, |a, b| place(a).cmp(&place(b)));
        found
    }

    /// The default routes that decide about the node's address: those of IPv4 where there are any,
    /// as in k3s.
    pub fn deciding_routes(&self) -> Vec<&Route> {
        let v4 = self.default_routes(false);
        if v4.is_empty() { self.default_routes(true) } else { v4 }
    }

    /// Interface and address of a family: those of the route to the server, else of the best
    /// default route.
    pub fn address_of_family(&self, v6: bool) -> Option<(String, IpAddr)> {
        let route_to_server = self
            .route_to_server
            .iter()
            .filter(|r| Cidr::parse(&r.to).is_some_and(|c| c.address.is_ipv6() == v6));
        route_to_server
            .chain(self.default_routes(v6))
            .find_map(|route| Some((route.device.clone(), self.source(route, v6)?)))
    }

    fn source(&self, route: &Route, v6: bool) -> Option<IpAddr> {
        let named = route
            .source
            .as_deref()
            .and_then(|s| s.parse().ok())
            .filter(|ip| self.interface_of(*ip).is_some());
        let gateway = route.gateway.as_deref().and_then(|g| g.parse().ok());
        let of_interface = || self.interface(&route.device)?.best_address(v6, gateway);
        // a router without addresses on its lines has one on loopback (RFC 5549; also in
        // ChooseHostInterface of apimachinery)
        let of_loopback = || self.interface("lo")?.best_address(v6, None);
        named.or_else(of_interface).or_else(of_loopback)
    }

    /// Interface and address that the best route uses.
    pub fn primary(&self) -> Option<(String, IpAddr)> {
        let v6_first = self
            .route_to_server
            .as_ref()
            .and_then(|r| Cidr::parse(&r.to))
            .is_some_and(|c| c.address.is_ipv6());
        self.address_of_family(v6_first).or_else(|| self.address_of_family(!v6_first))
    }

    pub fn interface(&self, name: &str) -> Option<&Interface> {
        self.interfaces.iter().find(|i| i.called(name))
    }

    /// The interface that has this address.
    pub fn interface_of(&self, address: IpAddr) -> Option<&Interface> {
        self.interfaces.iter().find(|i| i.addresses.iter().any(|a| a.ip == address))
    }

    /// What is known of an address of this machine.
    pub fn address(&self, ip: IpAddr) -> Option<&Address> {
        self.interfaces.iter().flat_map(|i| &i.addresses).find(|a| a.ip == ip)
    }
}
