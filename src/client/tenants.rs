//! The tenants of a cluster, read through the gateway: the namespaces that carry their label, and
//! what limits them.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;
use serde_json::Value;

use super::applications::ClusterReader;
use crate::base::error::{Exit, Failure};
use crate::contract::tenant::{HOSTS_ANNOTATION, TENANT_LABEL};
use crate::kubernetes::tenant::{INTERNET_POLICY, POD_SECURITY_LABEL};

/// A tenant as a list shows it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Tenant {
    pub name: String,
    /// Those that its applications may have.
    pub hosts: BTreeSet<String>,
    pub namespaces: Vec<TenantNamespace>,
}

/// A namespace of a tenant, with what limits it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct TenantNamespace {
    pub name: String,
    /// Level that Pod Security enforces; empty where none is.
    pub pod_security: String,
    /// By the names of Kubernetes: `requests.cpu`, `pods`.
    pub quota: BTreeMap<String, QuotaUse>,
    /// Private ranges that its pods may reach.
    pub egress: BTreeSet<String>,
    /// It is being deleted.
    pub terminating: bool,
}

/// A quantity of a quota: what is used of how much.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct QuotaUse {
    pub used: String,
    pub hard: String,
}

/// The tenants of a cluster, by name, or one of them. Whoever is of a tenant asks for that one:
/// lists of the whole cluster are not for him.
///
/// # Errors
/// As [`ClusterReader::list`].
pub async fn tenants(
    reader: &ClusterReader<'_>,
    tenant: Option<&str>,
) -> Result<Vec<Tenant>, Failure> {
    let namespaces = labelled(reader, tenant).await?;
    let places: Vec<Option<&str>> = match tenant {
        Some(_) => namespaces.iter().map(|object| object["metadata"]["name"].as_str()).collect(),
        None => vec![None],
    };
    let outward = format!("fieldSelector=metadata.name={INTERNET_POLICY}&limit=500");
    let (mut quotas, mut policies) = (Vec::new(), Vec::new());
    for place in places {
        let quota = ("resourcequotas", "ResourceQuota");
        quotas.extend(reader.list("/api/v1", place, quota, "limit=500").await?);
        let policy = ("networkpolicies", "NetworkPolicy");
        policies.extend(reader.list("/apis/networking.k8s.io/v1", place, policy, &outward).await?);
    }
    Ok(grouped(&namespaces, &quotas, &policies))
}

/// That a cluster has no namespace of a tenant.
pub fn unknown(tenant: &str) -> Failure {
    let what = format!("no namespace of this cluster is of a tenant {tenant}");
    Failure::new(Exit::Refused, "TENANT_UNKNOWN", what).hint(
        "`pipeops tenant list` lists those that this token sees; it may be on another cluster: \
         --cluster",
    )
}

/// The names of the namespaces of a tenant, without those that are being deleted: they take nothing
/// any more.
///
/// # Errors
/// As [`ClusterReader::list`].
pub async fn namespaces(reader: &ClusterReader<'_>, tenant: &str) -> Result<Vec<String>, Failure> {
    let found = labelled(reader, Some(tenant)).await?;
    let stays = found.iter().filter(|object| !is_terminating(object));
    let names = stays.filter_map(|object| object["metadata"]["name"].as_str());
    Ok(names.map(str::to_owned).collect())
}

fn is_terminating(object: &Value) -> bool {
    !object["metadata"]["deletionTimestamp"].is_null()
}

/// The namespaces of tenants, or of one. Whoever is of a tenant gets those of that one, whatever is
/// asked for.
async fn labelled(reader: &ClusterReader<'_>, tenant: Option<&str>) -> Result<Vec<Value>, Failure> {
    let value = tenant.map(|name| format!("={name}")).unwrap_or_default();
    let query = format!("labelSelector={TENANT_LABEL}{value}&limit=500");
    let found = reader.list("/api/v1", None, ("namespaces", "Namespace"), &query).await?;
    let is_meant = |object: &Value| {
        tenant.is_none_or(|name| object["metadata"]["labels"][TENANT_LABEL] == name)
    };
    Ok(found.into_iter().filter(is_meant).collect())
}

/// The private ranges of a policy: the internet is a range with exceptions.
fn egress_of(policy: &Value) -> BTreeSet<String> {
    let rules = policy["spec"]["egress"].as_array().into_iter().flatten();
    let blocks = rules.flat_map(|rule| rule["to"].as_array().into_iter().flatten());
    let blocks = blocks.map(|peer| &peer["ipBlock"]).filter(|block| block["except"].is_null());
    blocks.filter_map(|block| block["cidr"].as_str()).map(str::to_owned).collect()
}

/// Namespaces by their tenant, each with the quota and the policy that it has.
fn grouped(namespaces: &[Value], quotas: &[Value], policies: &[Value]) -> Vec<Tenant> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let mut tenants: BTreeMap<String, Tenant> = BTreeMap::new();
    for namespace in namespaces {
        let metadata = &namespace["metadata"];
        let mut quota = BTreeMap::new();
        let inside = |object: &&Value| object["metadata"]["namespace"] == metadata["name"];
        for status in quotas.iter().filter(inside).map(|object| &object["status"]) {
            for (name, hard) in status["hard"].as_object().into_iter().flatten() {
                let used = text(&status["used"][name]);
                quota.insert(name.clone(), QuotaUse { used, hard: text(hard) });
            }
        }
        let name = text(&metadata["labels"][TENANT_LABEL]);
        let tenant = tenants.entry(name.clone()).or_default();
        tenant.name = name;
        let hosts = text(&metadata["annotations"][HOSTS_ANNOTATION]);
        let hosts = hosts.split(',').map(str::trim).filter(|host| !host.is_empty());
        tenant.hosts.extend(hosts.map(str::to_owned));
        tenant.namespaces.push(TenantNamespace {
            name: text(&metadata["name"]),
            pod_security: text(&metadata["labels"][POD_SECURITY_LABEL]),
            quota,
            egress: policies.iter().filter(inside).flat_map(egress_of).collect(),
            terminating: is_terminating(namespace),
        });
    }
    tenants.into_values().collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_tenant_is_its_namespaces_with_what_they_use_and_its_hosts() {
        let namespace = |name: &str, tenant: &str, hosts: &str| {
            json!({"metadata": {"name": name,
                "labels": {TENANT_LABEL: tenant, POD_SECURITY_LABEL: "restricted"},
                "annotations": {HOSTS_ANNOTATION: hosts}}})
        };
        let quota = json!({"metadata": {"namespace": "shop"}, "status": {
            "hard": {"requests.cpu": "2", "pods": "50"}, "used": {"pods": "3"}}});
        let policy = json!({"metadata": {"namespace": "shop", "name": INTERNET_POLICY}, "spec": {
            "egress": [{"to": [
                {"ipBlock": {"cidr": "0.0.0.0/0", "except": ["10.0.0.0/8"]}},
                {"ipBlock": {"cidr": "10.1.0.0/16"}}]}]}});
        let mut ends = namespace("shop-2", "acme", "b.example");
        ends["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z".into();
        let namespaces =
            [namespace("web", "zeta", ""), namespace("shop", "acme", "b.example,a.example"), ends];
        let found = grouped(&namespaces, &[quota], &[policy]);
        assert_eq!(
            json!(found[0]),
            json!({"name": "acme", "hosts": ["a.example", "b.example"], "namespaces": [
                {"name": "shop", "pod_security": "restricted", "quota": {
                    "pods": {"used": "3", "hard": "50"},
                    "requests.cpu": {"used": "", "hard": "2"}},
                    "egress": ["10.1.0.0/16"], "terminating": false},
                {"name": "shop-2", "pod_security": "restricted", "quota": {}, "egress": [],
                    "terminating": true},
            ]})
        );
        assert_eq!((found.len(), found[1].name.as_str()), (2, "zeta"));
        assert!(found[1].hosts.is_empty());
    }
}
