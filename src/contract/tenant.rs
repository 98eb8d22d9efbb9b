//! A tenant: a customer's own place in a cluster. It is the namespaces that carry its label, and
//! nothing else says so.

use std::collections::BTreeSet;

use serde::Deserialize;

use super::application::is_quantity;
use super::application::requests::default_timeout_s;
use crate::base::cidr::{Cidr, network_address};
use crate::base::text::{is_dns_label, is_dns_name};

/// What an agent says among its capabilities that can make tenants and keeps them apart.
pub const CAPABILITY: &str = "tenants";
/// Label of a namespace: the tenant that it belongs to.
pub const TENANT_LABEL: &str = "pipeops.io/tenant";
/// Annotation of a tenant's namespaces: its host names, separated by commas.
pub const HOSTS_ANNOTATION: &str = "pipeops.io/hosts";
/// The ServiceAccounts in each namespace of a tenant as which its callers act. No pod has them.
pub const TENANT_VIEWER: &str = "pipeops-tenant-viewer";
pub const TENANT_DEPLOYER: &str = "pipeops-tenant-deployer";

const MAX_NAME: usize = 40;
const MAX_NAMESPACES: usize = 20;
const MAX_HOSTS: usize = 100;
const MAX_EGRESS: usize = 50;

/// Namespaces that no tenant gets, whether they are there yet or not: what runs in them is trusted
/// by everybody. The policy `pipeops-agent-namespaces` has the same list.
const RESERVED: &[&str] = &[
    "beta",
    "cert-manager",
    "default",
    "istio-ingress",
    "monitoring",
    "nginx-ingress",
    "production",
    "traefik",
];

fn is_reserved(namespace: &str) -> bool {
    // Kubernetes' own, ours, and what others call like that
    RESERVED.contains(&namespace)
        || namespace.starts_with("kube-")
        || namespace.starts_with("pipeops")
        || namespace.ends_with("-system")
}

/// Ranges that pods of a tenant reach only where it is asked for (RFC 1918, 6598, 4193).
const PRIVATE: &[&str] =
    &["10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7"];

/// What a tenant may be called: a DNS label of at most 40 characters.
pub fn is_tenant_name(name: &str) -> bool {
    is_dns_label(name) && name.len() <= MAX_NAME
}

/// What an operation of the kind `tenant` does.
#[derive(Deserialize)]
#[serde(tag = "action", rename_all = "snake_case")]
pub enum TenantSpec {
    /// Makes a tenant, or changes it: what is given here is all that it has afterwards.
    Set(Box<SetTenant>),
    /// Its namespaces with all that is in them.
    Delete(DeleteTenant),
}

/// The Pod Security level that is enforced in the namespaces of a tenant.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PodSecurity {
    #[default]
    Baseline,
    Restricted,
}

impl PodSecurity {
    pub fn name(self) -> &'static str {
        match self {
            PodSecurity::Baseline => "baseline",
            PodSecurity::Restricted => "restricted",
        }
    }
}

/// Quantities as Kubernetes writes them. What is not given is not limited, but for the ways in from
/// outside, of which there are none then. Each namespace of the tenant has all of it.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TenantQuota {
    /// Of the requests of all pods.
    pub cpu: Option<String>,
    /// Of the limits of all containers.
    pub memory: Option<String>,
    /// Of all claims of volumes.
    pub storage: Option<String>,
    pub pods: Option<u32>,
    pub load_balancers: u32,
    pub node_ports: u32,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SetTenant {
    pub tenant: String,
    pub namespaces: Vec<String>,
    #[serde(default)]
    pub pod_security: PodSecurity,
    #[serde(default)]
    pub quota: TenantQuota,
    /// Host names that its applications may have: exact ones, or `*.NAME` for all below it.
    #[serde(default)]
    pub hosts: Vec<String>,
    /// Private ranges that its pods may reach too.
    #[serde(default)]
    pub egress: Vec<String>,
    /// Namespaces that the tenant has today and that are deleted.
    #[serde(default)]
    pub remove_namespaces: Vec<String>,
    #[serde(default = "default_timeout_s")]
    pub timeout_s: u64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeleteTenant {
    pub tenant: String,
    /// The name of the tenant again.
    pub confirm: String,
    #[serde(default = "default_timeout_s")]
    pub timeout_s: u64,
}

impl TenantSpec {
    /// `Tenant name`.
    pub fn title(&self) -> String {
        let name = match self {
            TenantSpec::Set(set) => &set.tenant,
            TenantSpec::Delete(delete) => &delete.tenant,
        };
        format!("Tenant {name}")
    }

    /// Seconds.
    pub fn timeout_s(&self) -> u64 {
        match self {
            TenantSpec::Set(set) => set.timeout_s,
            TenantSpec::Delete(delete) => delete.timeout_s,
        }
    }

    /// # Errors
    /// The field, and what it may be.
    pub fn check(&self) -> Result<(), String> {
        let name = |name: &str| demand(is_tenant_name(name), "tenant", "1 to 40 of a-z, 0-9 and -");
        match self {
            TenantSpec::Set(set) => {
                name(&set.tenant)?;
                set.check()
            }
            TenantSpec::Delete(delete) => {
                name(&delete.tenant)?;
                demand(
                    delete.confirm == delete.tenant,
                    "confirm",
                    "the name of the tenant again: its namespaces go with all data in them",
                )
            }
        }
    }
}

/// A refusal names the field.
fn demand(holds: bool, field: &str, why: &str) -> Result<(), String> {
    if holds { Ok(()) } else { Err(format!("spec.{field}: {why}")) }
}

/// Each once, and no more than `max`.
fn check_list(list: &[String], field: &str, max: usize) -> Result<(), String> {
    demand(list.len() <= max, field, &format!("{max} at most"))?;
    let mut seen = BTreeSet::new();
    match list.iter().find(|item| !seen.insert(*item)) {
        Some(twice) => Err(format!("spec.{field}: {twice} is there twice")),
        None => Ok(()),
    }
}

impl SetTenant {
    fn check(&self) -> Result<(), String> {
        check_list(&self.namespaces, "namespaces", MAX_NAMESPACES)?;
        check_list(&self.remove_namespaces, "remove_namespaces", MAX_NAMESPACES)?;
        check_list(&self.hosts, "hosts", MAX_HOSTS)?;
        check_list(&self.egress, "egress", MAX_EGRESS)?;
        demand(!self.namespaces.is_empty(), "namespaces", "a tenant has one or more")?;
        for namespace in &self.namespaces {
            demand(is_dns_label(namespace), "namespaces", "1 to 63 of a-z, 0-9 and -")?;
            let message = format!("{namespace} is none of a tenant");
            demand(!is_reserved(namespace), "namespaces", &message)?;
        }
        for namespace in &self.remove_namespaces {
            demand(is_dns_label(namespace), "remove_namespaces", "1 to 63 of a-z, 0-9 and -")?;
            let kept = self.namespaces.contains(namespace);
            demand(!kept, "remove_namespaces", &format!("{namespace} is in namespaces too"))?;
        }
        let quantities = [
            ("quota.cpu", &self.quota.cpu),
            ("quota.memory", &self.quota.memory),
            ("quota.storage", &self.quota.storage),
        ];
        for (field, quantity) in quantities {
            let fits = quantity.as_deref().is_none_or(is_quantity);
            demand(fits, field, "that is no quantity: 500m, 2, 512Mi, 10Gi")?;
        }
        for host in &self.hosts {
            let fits = match host.strip_prefix("*.") {
                // `*.com` is nobody's
                Some(domain) => is_dns_name(domain) && domain.contains('.'),
                None => is_dns_name(host),
            };
            demand(fits, "hosts", "names in lower case: shop.example.com, *.example.com")?;
        }
        self.egress_ranges().map(drop)
    }

    /// The ranges of `egress`, as Kubernetes writes them.
    ///
    /// # Errors
    /// One that is none, or is not private.
    pub fn egress_ranges(&self) -> Result<Vec<String>, String> {
        let wrong = |text: &str| {
            let ranges = PRIVATE.join(", ");
            format!("spec.egress: {text} is no range inside of {ranges}")
        };
        let read = |text: &String| {
            let range = Cidr::parse(text).ok_or_else(|| wrong(text))?;
            let network = network_address(range);
            let is_inside = |outer: Cidr| outer.contains(network) && range.prefix >= outer.prefix;
            if PRIVATE.iter().filter_map(|outer| Cidr::parse(outer)).any(is_inside) {
                Ok(format!("{network}/{}", range.prefix))
            } else {
                Err(wrong(text))
            }
        };
        self.egress.iter().map(read).collect()
    }
}

/// Whether a host name of a tenant, which may be `*.NAME`, stands for `host`. The wildcard stands
/// for any depth, as in Gateway API: so it is safe for Ingress too, where it stands for one label.
pub fn covers(own: &str, host: &str) -> bool {
    let below = |suffix: &str| suffix.starts_with('.') && host.ends_with(suffix);
    own == host || own.strip_prefix('*').is_some_and(below)
}

/// Whether two host names have a name in common.
pub fn overlap(one: &str, other: &str) -> bool {
    covers(one, other) || covers(other, one)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn verdict(change: impl Fn(&mut Value)) -> String {
        let mut spec = json!({"action": "set", "tenant": "acme", "namespaces": ["acme", "acme-2"],
            "pod_security": "restricted", "quota": {"cpu": "2", "memory": "4Gi", "pods": 20},
            "hosts": ["shop.acme.com", "*.apps.acme.com"], "egress": ["10.1.2.3", "fd00:1::/32"],
            "remove_namespaces": ["acme-old"]});
        change(&mut spec);
        match serde_json::from_value::<TenantSpec>(spec) {
            Ok(spec) => spec.check().err().unwrap_or_default(),
            Err(e) => e.to_string(),
        }
    }

    #[test]
    fn a_tenant_that_can_be_is_taken_and_others_are_refused_by_field() {
        assert_eq!(verdict(|_| {}), "");
        for (field, value, why) in [
            ("tenant", json!("Acme"), "spec.tenant: 1 to 40"),
            ("tenant", json!("a".repeat(41)), "spec.tenant: 1 to 40"),
            ("namespaces", json!([]), "spec.namespaces: a tenant has"),
            ("namespaces", json!(["a", "a"]), "a is there twice"),
            ("namespaces", json!(["a/b"]), "spec.namespaces: 1 to 63"),
            ("namespaces", json!(["production"]), "production is none of a tenant"),
            ("namespaces", json!(["kube-system"]), "kube-system is none of a tenant"),
            ("namespaces", json!(["nginx-ingress"]), "nginx-ingress is none of a tenant"),
            ("namespaces", json!(["pipeops-2"]), "pipeops-2 is none of a tenant"),
            ("namespaces", json!(["longhorn-system"]), "longhorn-system is none of a tenant"),
            ("namespaces", json!(["traefik"]), "traefik is none of a tenant"),
            ("namespaces", json!(["istio-ingress"]), "istio-ingress is none of a tenant"),
            ("remove_namespaces", json!(["acme"]), "acme is in namespaces too"),
            ("pod_security", json!("privileged"), "unknown variant `privileged`"),
            ("quota", json!({"cpu": "much"}), "spec.quota.cpu: that is no quantity"),
            ("quota", json!({"disk": "1Gi"}), "unknown field `disk`"),
            ("hosts", json!(["*.com"]), "spec.hosts"),
            ("hosts", json!(["*"]), "spec.hosts"),
            ("hosts", json!(["a.*.com"]), "spec.hosts"),
            ("hosts", json!(["A.com"]), "spec.hosts"),
            ("hosts", json!(["a.com,b.com"]), "spec.hosts"),
            ("egress", json!(["8.8.8.8"]), "spec.egress: 8.8.8.8"),
            ("egress", json!(["10.0.0.0/7"]), "spec.egress: 10.0.0.0/7"),
            ("egress", json!(["169.254.169.254"]), "spec.egress: 169.254.169.254"),
            ("egress", json!(["0.0.0.0/0"]), "spec.egress"),
            ("egress", json!(["::/0"]), "spec.egress"),
            ("colour", json!("red"), "unknown field `colour`"),
            ("action", json!("dance"), "unknown variant `dance`"),
        ] {
            let said = verdict(|spec| spec[field] = value.clone());
            assert!(said.contains(why), "{field} {value}: {said}");
        }
        let delete = |confirm: &str| {
            let spec = json!({"action": "delete", "tenant": "acme", "confirm": confirm});
            serde_json::from_value::<TenantSpec>(spec).unwrap().check()
        };
        assert!(delete("acme").is_ok() && delete("acme2").is_err() && delete("").is_err());
    }

    #[test]
    fn ranges_are_written_as_kubernetes_reads_them() {
        let spec = json!({"tenant": "a", "namespaces": ["a"],
            "egress": ["10.1.2.3", "192.168.7.9/24", "fd00:1::/32"]});
        let set: SetTenant = serde_json::from_value(spec).unwrap();
        let expected = ["10.1.2.3/32", "192.168.7.0/24", "fd00:1::/32"];
        assert_eq!(set.egress_ranges().unwrap(), expected);
    }

    #[test]
    fn a_host_name_is_one_tenants_at_any_depth() {
        for (own, host, expected) in [
            ("shop.acme.com", "shop.acme.com", true),
            ("shop.acme.com", "a.shop.acme.com", false),
            ("*.acme.com", "shop.acme.com", true),
            ("*.acme.com", "a.b.acme.com", true),
            ("*.acme.com", "*.b.acme.com", true),
            ("*.acme.com", "acme.com", false),
            ("*.acme.com", "evilacme.com", false),
            ("*.b.acme.com", "*.acme.com", false),
            ("", "acme.com", false),
            ("", "", true),
        ] {
            assert_eq!(covers(own, host), expected, "{own} {host}");
        }
        assert!(overlap("*.b.acme.com", "*.acme.com") && overlap("a.acme.com", "*.acme.com"));
        assert!(!overlap("a.acme.com", "b.acme.com") && !overlap("*.a.com", "*.b.com"));
    }
}
