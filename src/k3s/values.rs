//! Ranges, labels, taints and names as k3s and the kubelet judge them, so that a node does not end
//! at its start for one of them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use serde_json::Value;

use super::keys;
use crate::base::cidr::{Cidr, network_address};
use crate::base::error::nearest;
use crate::base::order;
use crate::base::text::is_dns_name;

/// All faults in the `[k3s]` table, one line each.
pub fn faults(table: &BTreeMap<String, Value>) -> Vec<String> {
    let mut found: Vec<String> = table
        .iter()
        .filter_map(|(key, value)| {
            keys::value_fault(key, value).map(|why| format!("[k3s] {key}: {why}"))
        })
        .collect();
    let known = order::map(table.iter().map(|(key, value)| (keys::canonical_key(key), value)));
    let list = |key: &str| known.get(key).map(|value| words(value));
    // how ranges fit together and to the node is CIDR_MISFIT
    for key in ["cluster-cidr", "service-cidr"] {
        let parts = list(key).unwrap_or_default();
        found.extend(
            parts
                .iter()
                .filter_map(|part| range(part).err())
                .map(|why| format!("[k3s] {key}: {why}")),
        );
    }
    let servers = list("cluster-dns").unwrap_or_default();
    found.extend(
        servers
            .iter()
            .filter(|s| s.parse::<IpAddr>().is_err())
            .map(|s| format!("[k3s] cluster-dns: `{s}` is not an IP address")),
    );
    if let Some(Value::String(text)) = known.get("service-node-port-range")
        && !port_range(text)
    {
        found.push(format!(
            "[k3s] service-node-port-range: `{text}` is not a range such as 30000-32767"
        ));
    }
    for arg in known.get("kubelet-arg").map(|value| raw(value)).unwrap_or_default() {
        match arg.trim_start_matches('-').split_once('=') {
            Some(("node-labels", labels)) => found.extend(
                labels
                    .split(',')
                    .filter_map(|l| check_label(l).err())
                    .map(|why| format!("[k3s] kubelet-arg: {why}")),
            ),
            Some(("register-with-taints", taints)) => {
                found.extend(
                    self::taint_faults(&taints.split(',').map(str::to_owned).collect::<Vec<_>>())
                        .into_iter()
                        .map(|w| format!("[k3s] kubelet-arg: {w}")),
                );
            }
            _ => {}
        }
    }
    found
}

/// The strings of a list or of one text.
fn raw(value: &Value) -> Vec<String> {
    match value {
        Value::Array(items) => {
            items.iter().map(|i| i.as_str().map_or_else(|| i.to_string(), str::to_owned)).collect()
        }
        Value::String(one) => vec![one.clone()],
        other => vec![other.to_string()],
    }
}

/// A list as k3s takes it where values may also stand with commas between them
/// (`pkg/util/client.go`, `SplitStringSlice`).
fn words(value: &Value) -> Vec<String> {
    raw(value)
        .iter()
        .flat_map(|text| text.split(',').map(str::to_owned).collect::<Vec<_>>())
        .collect()
}

/// An address range as Go's `net.ParseCIDR` takes it, or why not.
fn range(text: &str) -> Result<Cidr, String> {
    let not = |why: &str| Err(format!("`{text}` is not an address range: {why}"));
    if text.trim() != text {
        return not("it has a blank in it");
    }
    let Some((address, length)) = text.split_once('/') else {
        return match text.parse::<IpAddr>() {
            Ok(IpAddr::V4(ip)) => not(&format!("its length is missing, as in {ip}/16")),
            Ok(IpAddr::V6(ip)) => not(&format!("its length is missing, as in {ip}/112")),
            Err(_) => not("it looks like 10.42.0.0/16"),
        };
    };
    let Ok(ip) = address.parse::<IpAddr>() else {
        let numbers = address.split('.').count();
        return if !address.contains(':')
            && (1..4).contains(&numbers)
            && address.split('.').all(|n| n.parse::<u8>().is_ok())
        {
            not(&format!(
                "an IPv4 address has four numbers, as in {address}{}/{length}",
                ".0".repeat(4 - numbers)
            ))
        } else {
            not(&format!("`{address}` is not an address"))
        };
    };
    let max = if ip.is_ipv4() { 32 } else { 128 };
    // Go takes no sign and no leading zero
    let number = length.parse::<u8>().ok().filter(|n| n.to_string() == length && *n <= max);
    match number {
        Some(prefix) => Ok(Cidr { address: ip, prefix }),
        None => not(&format!("its length is a number from 0 to {max}")),
    }
}

/// Ranges with bits beyond their length, with the range that k3s makes of them.
pub fn ranges_with_host_bits(table: &BTreeMap<String, Value>) -> Vec<(String, String, String)> {
    let mut found = Vec::new();
    for (key, value) in table.iter().filter(|(key, _)| {
        ["cluster-cidr", "service-cidr"].contains(&keys::canonical_key(key).as_str())
    }) {
        for text in words(value) {
            if let Ok(c) = range(&text)
                && network_address(c) != c.address
            {
                found.push((key.clone(), text, format!("{}/{}", network_address(c), c.prefix)));
            }
        }
    }
    found
}

/// `30000-32767`, `30000+2767`, or one port (k8s.io/apimachinery, `net.ParsePortRange`).
fn port_range(text: &str) -> bool {
    let port = |t: &str| t.trim().parse::<u16>().ok();
    match (text.split_once('-'), text.split_once('+')) {
        (Some((low, high)), _) => port(low).zip(port(high)).is_some_and(|(l, h)| l <= h),
        (None, Some((low, size))) => {
            port(low).zip(port(size)).is_some_and(|(l, s)| l.checked_add(s).is_some())
        }
        (None, None) => port(text).is_some(),
    }
}

/// A part of a label or taint key, or a value: 63 characters of letters, digits, `-`, `_`, `.`, the
/// first and last no mark.
fn name(text: &str) -> bool {
    let inner = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let edge = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric());
    text.len() <= 63
        && text.chars().all(inner)
        && edge(text.chars().next())
        && edge(text.chars().next_back())
}

/// k8s.io/apimachinery, `validation.IsQualifiedName`.
fn qualified(key: &str) -> Result<(), &'static str> {
    let (prefix, rest) =
        key.split_once('/').map_or((None, key), |(prefix, rest)| (Some(prefix), rest));
    if prefix.is_some_and(|p| !is_dns_name(p)) {
        return Err("what stands before the `/` must be a lower-case DNS name");
    }
    match name(rest) {
        true => Ok(()),
        false => {
            Err("a key is up to 63 letters, digits, `-`, `_` and `.`, and begins and ends with a \
                 letter or digit")
        }
    }
}

/// Labels below kubernetes.io and k8s.io that a kubelet may give its own node, and the prefixes
/// under which it may give any (k8s.io/kubelet, `pkg/apis/well_known_labels.go`).
const LABELS: [&str; 11] = [
    "kubernetes.io/hostname",
    "kubernetes.io/os",
    "kubernetes.io/arch",
    "topology.kubernetes.io/zone",
    "topology.kubernetes.io/region",
    "node.kubernetes.io/instance-type",
    "beta.kubernetes.io/instance-type",
    "beta.kubernetes.io/os",
    "beta.kubernetes.io/arch",
    "failure-domain.beta.kubernetes.io/zone",
    "failure-domain.beta.kubernetes.io/region",
];
const PREFIXES: [&str; 2] = ["node.kubernetes.io", "kubelet.kubernetes.io"];

/// Whether `name` is `suffix` or below it.
fn below(name: &str, suffix: &str) -> bool {
    name == suffix || name.strip_suffix(suffix).is_some_and(|head| head.ends_with('.'))
}

/// A label as the kubelet takes it at its start (kubernetes, `cmd/kubelet/app/options`).
///
/// # Errors
/// A sentence that quotes it.
pub fn check_label(text: &str) -> Result<(), String> {
    let fault = |why: &str| Err(format!("`{text}` is not a label: {why}"));
    let Some((key, value)) = text.split_once('=') else { return fault("it is KEY=VALUE") };
    if let Err(why) = qualified(key) {
        return fault(why);
    }
    let space = key.split_once('/').map_or("", |(prefix, _)| prefix);
    let reserved = below(space, "kubernetes.io") || below(space, "k8s.io");
    if reserved && !LABELS.contains(&key) && !PREFIXES.iter().any(|p| below(space, p)) {
        let role = if space == "node-role.kubernetes.io" {
            format!(
                "; a role is given by the server once the node is there: kubectl label node NAME \
                 {text}"
            )
        } else {
            String::new()
        };
        return Err(format!(
            "`{text}`: the kubelet ends with a label of that prefix; below kubernetes.io and \
             k8s.io a node may only give itself {}/…, {}/… and {}{role}",
            PREFIXES[0],
            PREFIXES[1],
            LABELS.join(", ")
        ));
    }
    if !value.is_empty() && !name(value) {
        return fault(
            "a value is up to 63 letters, digits, `-`, `_` and `.`, and begins and ends with a \
             letter or digit",
        );
    }
    Ok(())
}

/// What is wrong with taints, as the kubelet reads them (kubernetes, `pkg/util/taints`).
pub fn taint_faults(list: &[String]) -> Vec<String> {
    const EFFECTS: [&str; 3] = ["NoSchedule", "PreferNoSchedule", "NoExecute"];
    let mut found = Vec::new();
    let mut seen = BTreeSet::new();
    for text in list {
        let mut fault = |why: String| found.push(format!("`{text}` is not a taint: {why}"));
        let parts: Vec<&str> = text.split(':').collect();
        let [head, effect] = parts.as_slice() else {
            fault("it is KEY=VALUE:EFFECT or KEY:EFFECT".into());
            continue;
        };
        if !EFFECTS.contains(effect) {
            let near = nearest(effect, EFFECTS)
                .map(|n| format!("; did you mean {n}?"))
                .unwrap_or_default();
            fault(format!("`{effect}` is none of the effects {}{near}", EFFECTS.join(", ")));
            continue;
        }
        let (key, value) = head.split_once('=').unwrap_or((head, ""));
        if let Err(why) = qualified(key) {
            fault(why.into());
        } else if !value.is_empty() && !name(value) {
            fault(
                "its value is up to 63 letters, digits, `-`, `_` and `.`, and begins and ends with \
                 a letter or digit"
                    .into(),
            );
        } else if !seen.insert((key.to_owned(), (*effect).to_owned())) {
            fault("the same key and effect are there already".into());
        }
    }
    found
}

/// Names and addresses for a certificate as they are typed: commas, blanks, upper case, a dot
/// at the end.
pub fn normalized_sans(list: &[String]) -> Vec<String> {
    let mut out: Vec<String> = Vec::new();
    for part in list.iter().flat_map(|text| text.split(',')) {
        let mut name =
            part.trim().trim_start_matches('[').trim_end_matches(']').to_ascii_lowercase();
        if name.ends_with('.') && name.len() > 1 {
            name.pop();
        }
        if !name.is_empty() && !out.contains(&name) {
            out.push(name);
        }
    }
    out
}

/// Why this cannot stand in a certificate; `None` when it can.
pub fn san_fault(name: &str) -> Option<String> {
    if name.parse::<IpAddr>().is_ok() {
        return None;
    }
    let not = |why: &str| Some(format!("`{name}` is neither a DNS name nor an address: {why}"));
    if name.contains("://") {
        return not("leave the scheme out");
    }
    if name.contains('/') {
        return not("a certificate names single addresses, no ranges");
    }
    // as crypto/x509 of Go matches them: the star is the whole first label
    let plain = name.strip_prefix("*.").unwrap_or(name);
    if plain.contains('*') || name.starts_with("*.") && !plain.contains('.') {
        return not("a `*` is the whole first part, as in *.example.com");
    }
    if plain.contains(':') {
        return not("leave the port out");
    }
    if !plain.is_empty() && plain.split('.').all(|p| p.bytes().all(|b| b.is_ascii_digit())) {
        return not("it is all digits, and an IPv4 address has four numbers up to 255");
    }
    // k3s leaves out what begins or ends with it (rancher/dynamiclistener, factory/gen.go)
    let edge = plain.starts_with('_') || plain.ends_with('_');
    if !edge && is_dns_name(&plain.replace('_', "a")) {
        None
    } else {
        not("a name is letters, digits, `-`, `_` and dots")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(text: &str) -> BTreeMap<String, Value> {
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn ranges_are_judged_as_k3s_does() {
        for good in [
            r#"{"cluster-cidr": "10.52.0.0/16"}"#,
            r#"{"cluster-cidr": ["10.42.0.0/16", "fd42::/56"],
                "service-cidr": "10.43.0.0/16,fd43::/112", "cluster-dns": "10.43.0.10"}"#,
            r#"{"cluster-cidr": "fd42::/56", "service-cidr": "fd43::/112"}"#,
            r#"{"cluster-cidr": "10.0.0.0/26",
                "kube-controller-manager-arg": "node-cidr-mask-size=28"}"#,
            r#"{"service-cidr": "10.43.0.0/24", "service-node-port-range": "30000-31000"}"#,
        ] {
            assert_eq!(faults(&table(good)), Vec::<String>::new(), "{good}");
        }
        for (bad, why) in [
            (r#"{"cluster-cidr": "10.42/16"}"#, "as in 10.42.0.0/16"),
            (r#"{"service-cidr": "10.43.0.0"}"#, "as in 10.43.0.0/16"),
            (r#"{"cluster-cidr": "10.42.0.0/33"}"#, "from 0 to 32"),
            (r#"{"cluster-cidr": "10.42.0.0/016"}"#, "from 0 to 32"),
            (r#"{"cluster-cidr": "10.42.0.0-10.42.255.255"}"#, "looks like"),
            (
                r#"{"cluster-cidr": "10.42.0.0/16, fd42::/56",
                    "service-cidr": "10.43.0.0/16,fd43::/112"}"#,
                "blank",
            ),
            (r#"{"cluster-cidr": "10.42.0.300/16"}"#, "not an address"),
            (r#"{"cluster-cidr": ""}"#, "looks like"),
            (r#"{"cluster-dns": "10.43.0"}"#, "not an IP address"),
            (r#"{"service-node-port-range": "32767-30000"}"#, "not a range"),
            (r#"{"cluster_cidr": "10.42/16"}"#, "as in 10.42.0.0/16"),
            (
                r#"{"kubelet-arg": ["node-labels=node-role.kubernetes.io/worker=true"]}"#,
                "kubectl label node",
            ),
        ] {
            let found = faults(&table(bad));
            assert!(found.len() == 1 && found[0].contains(why), "{bad}: {found:?}");
        }
        assert_eq!(
            ranges_with_host_bits(&table(r#"{"cluster-cidr": "10.42.7.0/16"}"#))[0].2,
            "10.42.0.0/16"
        );
        assert!(ranges_with_host_bits(&table(r#"{"cluster-cidr": "10.42.0.0/16"}"#)).is_empty());
    }

    #[test]
    fn labels_are_those_that_a_kubelet_may_give_itself() {
        for good in [
            "a=b",
            "a=",
            "disk.example.com/type=ssd",
            "topology.kubernetes.io/zone=a",
            "node.kubernetes.io/pool=x",
            "x.node.kubernetes.io/a=b",
        ] {
            assert_eq!(check_label(good), Ok(()), "{good}");
        }
        for (bad, why) in [
            ("node-role.kubernetes.io/worker=true", "kubectl label node"),
            ("node-restriction.kubernetes.io/a=b", "may only give itself"),
            ("kubernetes.io/role=worker", "may only give itself"),
            ("x.k8s.io/a=b", "may only give itself"),
            ("a", "KEY=VALUE"),
            ("-a=b", "a key is"),
            ("a=b c", "a value is"),
            ("a=b=c", "a value is"),
            ("Example.COM/a=b", "before the `/`"),
            ("a/b/c=d", "a key is"),
        ] {
            assert!(
                check_label(bad).is_err_and(|w| w.contains(why)),
                "{bad}: {:?}",
                check_label(bad)
            );
        }
        assert_eq!(check_label("notkubernetes.io/a=b"), Ok(()));
    }

    #[test]
    fn taints_are_read_as_the_kubelet_reads_them() {
        let one = |text: &str| taint_faults(&[text.to_owned()]);
        for good in [
            "a=b:NoSchedule",
            "a:NoExecute",
            "node-role.kubernetes.io/control-plane:NoSchedule",
            "a=:PreferNoSchedule",
        ] {
            assert!(one(good).is_empty(), "{good}");
        }
        for (bad, why) in [
            ("a=b", "KEY:EFFECT"),
            ("a=b:noschedule", "did you mean NoSchedule"),
            ("a=b:NoSchedul", "did you mean NoSchedule"),
            ("a=b:c:NoSchedule", "KEY:EFFECT"),
            ("a=b=c:NoSchedule", "its value"),
            ("=b:NoSchedule", "a key is"),
            ("a:NoSchedule-", "none of the effects"),
        ] {
            assert!(one(bad)[0].contains(why), "{bad}: {:?}", one(bad));
        }
        assert_eq!(
            taint_faults(&[
                "a=b:NoSchedule".into(),
                "a=c:NoSchedule".into(),
                "a=c:NoExecute".into()
            ])
            .len(),
            1
        );
    }

    #[test]
    fn names_for_a_certificate_are_taken_as_people_type_them() {
        let typed =
            ["API.Example.COM", "a, b ,b", " [fd00::1] ", "c.example.com."].map(str::to_owned);
        assert_eq!(
            normalized_sans(&typed),
            ["api.example.com", "a", "b", "fd00::1", "c.example.com"]
        );
        for good in
            ["*.example.com", "a", "10.0.0.1", "fd00::1", "xn--bcher-kva.example", "k3s_master"]
        {
            assert_eq!(san_fault(good), None, "{good}");
        }
        for (bad, why) in [
            ("https://a", "scheme"),
            ("a:6443", "port"),
            ("10.0.0.0/8", "ranges"),
            ("_api", "letters"),
            ("a.*.com", "`*`"),
            ("*", "`*`"),
            ("*.com", "`*`"),
            ("10.0.0", "all digits"),
            ("10.0.0.256", "all digits"),
            ("a b", "letters"),
        ] {
            assert!(san_fault(bad).is_some_and(|w| w.contains(why)), "{bad}: {:?}", san_fault(bad));
        }
    }
}
