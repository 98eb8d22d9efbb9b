//! The tenants of a cluster, read through the gateway: the namespaces that carry their label, and
//! what limits them.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;
use serde_json::Value;

use super::applications::ClusterReader;
use crate::base::error::{Exit, Failure};

/// Label of a namespace that belongs to a tenant.
const LABEL: &str = "pipeops.io/tenant";
/// Annotation of such a namespace: the host names of its tenant, separated by commas.
const HOSTS: &str = "pipeops.io/hosts";
const POD_SECURITY: &str = "pod-security.kubernetes.io/enforce";

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
/// As [`ClusterReader::list`]; exit 7 where there is no such tenant.
pub async fn tenants(
    reader: &ClusterReader<'_>,
    tenant: Option<&str>,
) -> Result<Vec<Tenant>, Failure> {
    let namespaces = labelled(reader, tenant).await?;
    let places: Vec<Option<&str>> = match tenant {
        Some(_) => namespaces.iter().map(|object| object["metadata"]["name"].as_str()).collect(),
        None => vec![None],
    };
    let mut quotas = Vec::new();
    for place in places {
        let quota = ("resourcequotas", "ResourceQuota");
        quotas.extend(reader.list("/api/v1", place, quota, "limit=500").await?);
    }
    let found = grouped(&namespaces, &quotas);
    match tenant {
        Some(name) if found.is_empty() => Err(Failure::new(
            Exit::Refused,
            "TENANT_UNKNOWN",
            format!("no namespace of this cluster is of a tenant {name}"),
        )
        .hint("`pipeops tenant list` lists those that this token sees")),
        _ => Ok(found),
    }
}

/// The names of the namespaces of a tenant.
///
/// # Errors
/// As [`ClusterReader::list`].
pub async fn namespaces(reader: &ClusterReader<'_>, tenant: &str) -> Result<Vec<String>, Failure> {
    let found = labelled(reader, Some(tenant)).await?;
    let names = found.iter().filter_map(|object| object["metadata"]["name"].as_str());
    Ok(names.map(str::to_owned).collect())
}

async fn labelled(reader: &ClusterReader<'_>, tenant: Option<&str>) -> Result<Vec<Value>, Failure> {
    let value = tenant.map(|name| format!("={name}")).unwrap_or_default();
    let query = format!("labelSelector={LABEL}{value}&limit=500");
    let found = reader.list("/api/v1", None, ("namespaces", "Namespace"), &query).await?;
    // one that ends takes nothing any more
    let stays = |object: &Value| object["metadata"]["deletionTimestamp"].is_null();
    Ok(found.into_iter().filter(stays).collect())
}

/// Namespaces by their tenant, each with the quota that it has.
fn grouped(namespaces: &[Value], quotas: &[Value]) -> Vec<Tenant> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let mut tenants: BTreeMap<String, Tenant> = BTreeMap::new();
    for metadata in namespaces.iter().map(|namespace| &namespace["metadata"]) {
        let mut quota = BTreeMap::new();
        let inside = quotas.iter().filter(|q| q["metadata"]["namespace"] == metadata["name"]);
        for status in inside.map(|object| &object["status"]) {
            for (name, hard) in status["hard"].as_object().into_iter().flatten() {
                let used = text(&status["used"][name]);
                quota.insert(name.clone(), QuotaUse { used, hard: text(hard) });
            }
        }
        let name = text(&metadata["labels"][LABEL]);
        let tenant = tenants.entry(name.clone()).or_default();
        tenant.name = name;
        let hosts = text(&metadata["annotations"][HOSTS]);
        let hosts = hosts.split(',').map(str::trim).filter(|host| !host.is_empty());
        tenant.hosts.extend(hosts.map(str::to_owned));
        tenant.namespaces.push(TenantNamespace {
            name: text(&metadata["name"]),
            pod_security: text(&metadata["labels"][POD_SECURITY]),
            quota,
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
                "labels": {LABEL: tenant, POD_SECURITY: "restricted"},
                "annotations": {HOSTS: hosts}}})
        };
        let quota = json!({"metadata": {"namespace": "shop"}, "status": {
            "hard": {"requests.cpu": "2", "pods": "50"}, "used": {"pods": "3"}}});
        let namespaces = [
            namespace("web", "zeta", ""),
            namespace("shop", "acme", "b.example,a.example"),
            namespace("shop-2", "acme", "b.example"),
        ];
        let found = grouped(&namespaces, &[quota]);
        assert_eq!(
            json!(found[0]),
            json!({"name": "acme", "hosts": ["a.example", "b.example"], "namespaces": [
                {"name": "shop", "pod_security": "restricted", "quota": {
                    "pods": {"used": "3", "hard": "50"},
                    "requests.cpu": {"used": "", "hard": "2"}}},
                {"name": "shop-2", "pod_security": "restricted", "quota": {}},
            ]})
        );
        assert_eq!((found.len(), found[1].name.as_str()), (2, "zeta"));
        assert!(found[1].hosts.is_empty());
    }
}
