//! Addresses of a node: which one it takes, which interface carries pods, what a proxy must leave alone.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde_json::Value;

use crate::facts::{Cidr, Facts, globally_routable};
use crate::settings::Settings;

/// Pod and service ranges: the `[k3s]` table's or k3s' defaults (k3s-io/k3s, pkg/cli/cmds/server.go).
pub fn ranges(k3s: &BTreeMap<String, Value>) -> Vec<(&'static str, Cidr)> {
    let mut found = Vec::new();
    for (name, key, default) in [("cluster", "cluster-cidr", "10.42.0.0/16"), ("service", "service-cidr", "10.43.0.0/16")] {
        let text = match k3s.get(key) {
            Some(Value::String(text)) => text.clone(),
            Some(Value::Array(list)) => list.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(","),
            _ => default.to_owned(),
        };
        found.extend(text.split(',').filter_map(|part| Cidr::parse(part.trim())).map(|range| (name, range)));
    }
    found
}

/// The node's address: `--node-ip`, else the source address of the default route.
pub fn node_address(facts: &Facts, settings: &Settings) -> Option<IpAddr> {
    settings.options.node_ip.first().and_then(|ip| ip.parse().ok()).or_else(|| facts.primary().map(|(_, address)| address))
}

/// The interface of the pod network: `--flannel-iface`, else the one that has the node's address.
pub fn flannel_iface(facts: &Facts, settings: &Settings) -> Option<String> {
    settings.options.flannel_iface.clone().or_else(|| {
        let address = node_address(facts, settings)?;
        facts.interface_of(address).map(|i| i.name.clone()).or_else(|| facts.primary().map(|(device, _)| device))
    })
}

/// Whether the pod network is encrypted: always when the node's address is public, for VXLAN would be readable on the way.
pub fn wireguard(facts: &Facts, settings: &Settings) -> bool {
    match settings.options.k3s.get("flannel-backend").and_then(Value::as_str) {
        Some(backend) => backend.starts_with("wireguard"),
        None => node_address(facts, settings).is_some_and(globally_routable),
    }
}

/// What must never go through a proxy, beyond what the user said.
pub fn no_proxy(facts: &Facts, settings: &Settings) -> Vec<String> {
    let mut list: Vec<String> = ["127.0.0.0/8", "::1", "localhost", ".svc", ".cluster.local"].map(str::to_owned).to_vec();
    list.extend(ranges(&settings.options.k3s).iter().map(|(_, r)| format!("{}/{}", r.address, r.prefix)));
    if let Some(address) = node_address(facts, settings) {
        let network = facts.interface_of(address).and_then(|i| {
            i.addresses.iter().filter_map(|a| Cidr::parse(a)).find(|c| c.address == address && c.prefix < if address.is_ipv4() { 32 } else { 128 })
        });
        list.push(network.map_or_else(|| address.to_string(), |c| format!("{}/{}", masked(c), c.prefix)));
    }
    list
}

/// The proxy through which a host is asked, if `HTTPS_PROXY` names one and `NO_PROXY` does not take the host out (names with and
/// without a leading dot stand for all below them, as curl and Go read it).
pub fn https_proxy<'a>(facts: &'a Facts, host: &str) -> Option<&'a str> {
    let proxy = facts.proxy.get("HTTPS_PROXY")?;
    let host = host.trim_matches(['[', ']']).to_ascii_lowercase();
    let address = host.parse::<IpAddr>().ok();
    let past = facts.proxy.get("NO_PROXY").is_some_and(|list| {
        list.split(',').map(str::trim).filter(|entry| !entry.is_empty()).any(|entry| {
            let entry = entry.to_ascii_lowercase();
            let name = entry.trim_start_matches('*').trim_start_matches('.');
            let within = address.is_some_and(|a| Cidr::parse(&entry).is_some_and(|range| range.contains(a)));
            entry == "*" || within || host == name || host.strip_suffix(name).is_some_and(|rest| rest.ends_with('.'))
        })
    });
    let loopback = host == "localhost" || address.is_some_and(|a| a.is_loopback());
    (!past && !loopback).then_some(proxy)
}

/// A proxy's URL as it may stand in a file that everybody reads; none where it holds a user or password, or is none.
pub fn plain_proxy(proxy: &str) -> Option<String> {
    let text = if proxy.contains("://") { proxy.to_owned() } else { format!("http://{proxy}") };
    let url = url::Url::parse(&text).ok()?;
    let plain = matches!(url.scheme(), "http" | "https") && url.host().is_some() && url.username().is_empty() && url.password().is_none();
    plain.then_some(text)
}

fn masked(range: Cidr) -> IpAddr {
    match range.address {
        IpAddr::V4(v4) => IpAddr::V4((u32::from(v4) & u32::MAX.checked_shl(32 - u32::from(range.prefix)).unwrap_or(0)).into()),
        IpAddr::V6(v6) => IpAddr::V6((u128::from(v6) & u128::MAX.checked_shl(128 - u32::from(range.prefix)).unwrap_or(0)).into()),
    }
}

/// `[addr]:port` or `addr:port` or `name:port`, as URLs want it.
pub fn host_in_url(host: &str) -> String {
    if host.parse::<std::net::Ipv6Addr>().is_ok() { format!("[{host}]") } else { host.to_owned() }
}

/// MASTER as an operator types it: address, name, IPv6 with or without brackets, URL, each with or without port.
///
/// Gives `https://HOST:PORT`; the port defaults to 6443 (a URL without a port is accepted by k3s and then hangs, k3s#11808).
///
/// # Errors
/// A sentence that quotes the text.
pub fn master_url(text: &str) -> Result<String, String> {
    let text = text.trim();
    let fault = |why: &str| format!("`{text}` is not the address of a server: {why}");
    let rest = match text.split_once("://") {
        Some(("https", rest)) => rest,
        Some((scheme, _)) => return Err(fault(&format!("scheme `{scheme}` is not https"))),
        None => text,
    };
    let rest = rest.trim_end_matches('/');
    if rest.is_empty() || rest.contains(['/', '?', '#', '@']) || rest.contains(char::is_whitespace) {
        return Err(fault("give ADDRESS, NAME, or https://NAME:PORT"));
    }
    let (host, port) = if rest.parse::<std::net::Ipv6Addr>().is_ok() {
        (format!("[{rest}]"), None)
    } else if let Some(bracketed) = rest.strip_prefix('[') {
        let (inside, after) = bracketed.split_once(']').ok_or_else(|| fault("a bracket is not closed"))?;
        inside.parse::<std::net::Ipv6Addr>().map_err(|_| fault("not an IPv6 address"))?;
        match after {
            "" => (format!("[{inside}]"), None),
            port => (format!("[{inside}]"), Some(port.strip_prefix(':').ok_or_else(|| fault("after the bracket comes :PORT"))?)),
        }
    } else {
        match rest.split_once(':') {
            Some((host, port)) => (host.to_owned(), Some(port)),
            None => (rest.to_owned(), None),
        }
    };
    let port = match port {
        None => 6443,
        Some(p) if !p.is_empty() && p.bytes().all(|b| b.is_ascii_digit()) => {
            p.parse::<u16>().ok().filter(|p| *p > 0).ok_or_else(|| fault("no such port"))?
        }
        Some(_) => return Err(fault("the port is not a number")),
    };
    let url = format!("https://{host}:{port}");
    let parsed = url::Url::parse(&url).map_err(|e| fault(&e.to_string()))?;
    let host = parsed.host_str().filter(|h| !h.is_empty()).ok_or_else(|| fault("no host"))?;
    // url drops :443 as https' default; k3s needs it said
    Ok(format!("https://{host}:{port}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_master_may_be_typed_in_many_ways() {
        for (typed, url) in [
            ("10.0.0.1", "https://10.0.0.1:6443"),
            ("https://cp.example.com", "https://cp.example.com:6443"),
            ("cp.example.com:443", "https://cp.example.com:443"),
            ("fd00::1", "https://[fd00::1]:6443"),
            ("[fd00::1]:7443", "https://[fd00::1]:7443"),
            ("https://[fd00::1]/", "https://[fd00::1]:6443"),
        ] {
            assert_eq!(master_url(typed).unwrap(), url);
        }
        for bad in ["", "http://10.0.0.1", "a b", "10.0.0.1:", "10.0.0.1:99999", "[fd00::1", "user@host", "host/path", "host:0"] {
            assert!(master_url(bad).is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn no_text_panics_and_what_passes_is_a_url(text in "\\PC{0,40}") {
            if let Ok(url) = master_url(&text) {
                prop_assert!(url::Url::parse(&url).is_ok());
            }
        }
    }
}
