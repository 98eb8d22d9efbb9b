//! What a request makes of a tenant, beside what is there: what it takes away, and which one would
//! take nothing.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use crate::base::json;
use crate::base::order;
use crate::base::text::quoted;
use crate::cli::TenantArgs;
use crate::client::tenants::{QuotaUse, Tenant, TenantNamespace};
use crate::contract::tenant::TenantSpec;

/// Quantities of a quota: in an operation, and in Kubernetes.
const QUANTITIES: [(&str, &str); 6] = [
    ("cpu", "requests.cpu"),
    ("memory", "limits.memory"),
    ("storage", "requests.storage"),
    ("pods", "pods"),
    ("load_balancers", "services.loadbalancers"),
    ("node_ports", "services.nodeports"),
];

/// What an operation is asked for.
pub(super) fn spec_of(args: &TenantArgs) -> Value {
    let quota = order::map(args.quota.iter().map(|(k, v)| (*k, v)));
    json!({
        "action": "set", "tenant": args.name, "namespaces": args.namespace, "quota": quota,
        "pod_security": args.pod_security, "hosts": args.host, "egress": args.egress,
        "remove_namespaces": args.remove_namespace, "timeout_s": args.timeout,
    })
}

/// What a request takes away from a tenant that is there, or loosens: what is not given ends.
pub(super) fn losses(there: &Tenant, args: &TenantArgs) -> Vec<String> {
    let (mut lines, mut open) = (BTreeSet::new(), BTreeSet::new());
    let stays = |namespace: &&TenantNamespace| {
        !namespace.terminating && args.namespace.contains(&namespace.name)
    };
    for namespace in there.namespaces.iter().filter(stays) {
        if namespace.pod_security == "restricted" && args.pod_security != "restricted" {
            lines.insert(format!("Pod Security: restricted becomes {}", args.pod_security));
        }
        for (name, resource) in QUANTITIES {
            let Some(QuotaUse { hard, .. }) = namespace.quota.get(resource) else { continue };
            let option = name.replace('_', "-");
            match wanted(args, name) {
                None => lines.insert(format!("quota {option}: {hard} becomes no limit")),
                Some(wanted) if !is_same_quantity(hard, &wanted) => {
                    lines.insert(format!("quota {option}: {hard} becomes {wanted}"))
                }
                Some(_) => false,
            };
        }
        open.extend(namespace.egress.iter().cloned());
    }
    let gone = there.hosts.iter().filter(|host| !args.host.contains(host));
    lines.extend(gone.map(|host| format!("host {host}: is taken away")));
    let asked = egress_of(args);
    lines.extend(open.difference(&asked).map(|range| format!("egress {range}: is closed")));
    lines.extend(asked.difference(&open).map(|range| format!("egress {range}: is opened")));
    lines.into_iter().collect()
}

/// A quantity that the tenant will have; none where there will be no limit.
fn wanted(args: &TenantArgs, name: &str) -> Option<String> {
    let given = args.quota.iter().rfind(|(given, _)| *given == name);
    let given = given.map(|(_, value)| value.as_str().map_or(value.to_string(), str::to_owned));
    let is_closed = matches!(name, "load_balancers" | "node_ports");
    given.or_else(|| is_closed.then(|| "0".into()))
}

/// The ranges that are asked for, as Kubernetes writes them.
fn egress_of(args: &TenantArgs) -> BTreeSet<String> {
    let ranges = match json::fields(spec_of(args)) {
        Ok(TenantSpec::Set(set)) => set.egress_ranges().ok(),
        _ => None,
    };
    // what cannot be read is refused by the agent
    order::set(ranges.unwrap_or_else(|| args.egress.clone()))
}

/// Whether two quantities of Kubernetes count the same: `1Gi` and `1024Mi`.
fn is_same_quantity(one: &str, other: &str) -> bool {
    match (amount(one), amount(other)) {
        (Some(one), Some(other)) => (one - other).abs() <= 1e-9 * one.abs().max(other.abs()),
        _ => one == other,
    }
}

/// What a quantity counts (apimachinery `pkg/api/resource/quantity.go`).
fn amount(text: &str) -> Option<f64> {
    const DECIMAL: [&str; 10] = ["n", "u", "m", "", "k", "M", "G", "T", "P", "E"];
    const BINARY: [&str; 6] = ["Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];
    if let Ok(plain) = text.parse() {
        return Some(plain);
    }
    let digits = text.bytes().take_while(|b| b.is_ascii_digit() || *b == b'.').count();
    let (number, suffix) = text.split_at(digits);
    let power = |of: &[&str]| i32::try_from(of.iter().position(|known| *known == suffix)?).ok();
    let factor = match (power(&BINARY), power(&DECIMAL)) {
        (Some(power), _) => 1024_f64.powi(power + 1),
        (None, power) => 1000_f64.powi(power? - 3),
    };
    Some(number.parse::<f64>().ok()? * factor)
}

/// The command that makes a tenant as it is there; none where all of it is being deleted.
pub(super) fn line_that_sets(tenant: &Tenant) -> Option<String> {
    let stays: Vec<_> = tenant.namespaces.iter().filter(|place| !place.terminating).collect();
    let limits = |place: &TenantNamespace| -> Vec<(String, String)> {
        let known = QUANTITIES.iter().filter_map(|(name, resource)| {
            let hard = place.quota.get(*resource)?.hard.clone();
            Some((name.replace('_', "-"), hard))
        });
        // what nobody gets unless it is asked for
        let is_default = |(name, hard): &(String, String)| {
            hard == "0" && matches!(&**name, "load-balancers" | "node-ports")
        };
        known.filter(|limit| !is_default(limit)).collect()
    };
    let all_of =
        |place: &TenantNamespace| (place.pod_security.clone(), limits(place), place.egress.clone());
    let (pod_security, quota, egress) = all_of(stays.first()?);
    if stays
        .iter()
        .any(|place| all_of(place) != (pod_security.clone(), quota.clone(), egress.clone()))
    {
        let unlike = "its namespaces differ: `pipeops tenant set` makes them alike";
        return Some(unlike.into());
    }
    let mut line = format!("pipeops tenant set {}", tenant.name);
    let mut option = |name: &str, values: Vec<String>| {
        if !values.is_empty() {
            line += &format!(" {name} {}", quoted(&values.join(",")));
        }
    };
    option("-n", stays.iter().map(|place| place.name.clone()).collect());
    option("--quota", quota.iter().map(|(name, hard)| format!("{name}={hard}")).collect());
    option("--pod-security", vec![pod_security].into_iter().filter(|l| !l.is_empty()).collect());
    option("--host", tenant.hosts.iter().cloned().collect());
    option("--egress", egress.into_iter().collect());
    Some(line)
}

#[cfg(test)]
mod tests {
    use super::super::tenant::tests::parsed;
    use super::*;
    use crate::cli::TenantCommand;

    /// A tenant as it is there.
    fn acme(change: impl Fn(&mut TenantNamespace)) -> Tenant {
        let hard = |hard: &str| QuotaUse { used: "0".into(), hard: hard.into() };
        let quota = [
            ("requests.cpu", "2"),
            ("limits.memory", "4Gi"),
            ("services.loadbalancers", "1"),
            ("services.nodeports", "0"),
        ];
        let mut namespace = TenantNamespace {
            name: "shop".into(),
            pod_security: "restricted".into(),
            quota: quota.iter().map(|(k, v)| ((*k).to_owned(), hard(v))).collect(),
            egress: ["10.1.0.0/16".to_owned()].into(),
            terminating: false,
        };
        let mut ends = namespace.clone();
        change(&mut namespace);
        (ends.name, ends.terminating, ends.egress) = ("old".into(), true, BTreeSet::new());
        Tenant {
            name: "acme".into(),
            hosts: ["*.acme.com", "shop.example"].map(str::to_owned).into(),
            namespaces: vec![namespace, ends],
        }
    }

    #[test]
    fn what_is_shown_of_a_tenant_makes_it_again_and_takes_nothing_away() {
        let line = line_that_sets(&acme(|_| {})).unwrap();
        assert_eq!(
            line,
            "pipeops tenant set acme -n shop --quota cpu=2,memory=4Gi,load-balancers=1 \
             --pod-security restricted --host '*.acme.com,shop.example' --egress 10.1.0.0/16"
        );
        let words: Vec<&str> = line.split(' ').skip(2).map(|w| w.trim_matches('\'')).collect();
        let TenantCommand::Set(args) = parsed(&words).unwrap() else { panic!("{line}") };
        assert!(losses(&acme(|_| {}), &args).is_empty());
        let mut none = acme(|namespace| namespace.terminating = true);
        assert_eq!(line_that_sets(&none), None);
        none.namespaces[0].terminating = false;
        none.namespaces[1].terminating = false;
        assert!(line_that_sets(&none).unwrap().starts_with("its namespaces differ"));
    }

    #[test]
    fn what_a_change_takes_away_or_loosens_is_said() {
        let there = acme(|_| {});
        let said = |more: &[&str]| {
            let args = [&["set", "acme", "-n", "shop,new"][..], more].concat();
            let TenantCommand::Set(args) = parsed(&args).unwrap() else { panic!("{args:?}") };
            losses(&there, &args).join("; ")
        };
        assert_eq!(
            said(&[]),
            "Pod Security: restricted becomes baseline; egress 10.1.0.0/16: is closed; \
             host *.acme.com: is taken away; host shop.example: is taken away; \
             quota cpu: 2 becomes no limit; quota load-balancers: 1 becomes 0; \
             quota memory: 4Gi becomes no limit"
        );
        let same = ["--pod-security", "restricted", "--host", "*.acme.com,shop.example"];
        let with = |quota: &str, egress: &str| {
            said(&[&same[..], &["--quota", quota, "--egress", egress]].concat())
        };
        assert_eq!(with("cpu=2000m,memory=4096Mi,load-balancers=1,pods=9", "10.1.7.7/16"), "");
        assert_eq!(
            with("cpu=4,memory=4Gi,load-balancers=1", "10.1.0.0/16,10.2.0.0/16"),
            "egress 10.2.0.0/16: is opened; quota cpu: 2 becomes 4"
        );
        for (one, other, expected) in [
            ("1", "1000m", true),
            ("1Gi", "1024Mi", true),
            ("1Gi", "1G", false),
            ("1e3", "1k", true),
            ("0", "1", false),
            ("much", "much", true),
        ] {
            assert_eq!(is_same_quantity(one, other), expected, "{one} {other}");
        }
    }
}
