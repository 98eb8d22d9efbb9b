//! The objects that a tenant consists of in Kubernetes, and what may become of it. Pure: nothing is
//! requested here.

use serde_json::{Map, Value, json};

use crate::base::cidr::Cidr;
use crate::base::text::printable;
use crate::contract::tenant::{
    HOSTS_ANNOTATION, SetTenant, TENANT_DEPLOYER, TENANT_LABEL, TENANT_VIEWER, TenantQuota, covers,
    overlap,
};

/// The first minor of Kubernetes 1 whose API server keeps tenants apart: there
/// ValidatingAdmissionPolicy is stable (kubernetes/kubernetes, CHANGELOG-1.30).
pub const MIN_MINOR: u32 = 30;

/// The policies of `deployments/tenants.yaml`, and their bindings, which have the same names.
pub const POLICIES: &[&str] = &[
    "pipeops-agent-namespaces",
    "pipeops-agent-objects",
    "pipeops-agent-rolebindings",
    "pipeops-tenant-labels",
    "pipeops-tenant-objects",
    "pipeops-tenant-pods",
    "pipeops-tenant-secrets",
    "pipeops-tenant-services",
    "pipeops-tenant-ingresses",
    "pipeops-tenant-routes",
];

/// Label of a namespace: the level of Pod Security that it enforces.
pub const POD_SECURITY_LABEL: &str = "pod-security.kubernetes.io/enforce";
/// The NetworkPolicy that says what of outside the pods of a tenant reach.
pub const INTERNET_POLICY: &str = "pipeops-internet";

/// Where the bindings are.
pub const BINDINGS: &str =
    "/apis/admissionregistration.k8s.io/v1/validatingadmissionpolicybindings";

/// Where ingress controllers run, as namespace and, where others run there too, label of the pods:
/// k3s' Traefik, and the component of `deployments/components/ingress.yaml`.
const INGRESS_CONTROLLERS: &[(&str, Option<(&str, &str)>)] =
    &[("kube-system", Some(("app.kubernetes.io/name", "traefik"))), ("nginx-ingress", None)];

/// What is not the internet (IANA special-purpose address registries): private networks and with
/// them pods, Services and nodes, metadata services of clouds, shared and reserved ranges.
const NOT_INTERNET: &[&str] = &[
    "0.0.0.0/8",
    "10.0.0.0/8",
    "100.64.0.0/10",
    "127.0.0.0/8",
    // the metadata service of Azure
    "168.63.129.16/32",
    "169.254.0.0/16",
    "172.16.0.0/12",
    "192.0.0.0/24",
    "192.168.0.0/16",
    "198.18.0.0/15",
    "224.0.0.0/4",
    "240.0.0.0/4",
];
/// The addresses of IPv6 that are routed (RFC 4291 §2.4): private, link-local and multicast ones
/// lie outside. 6to4 (RFC 3056) holds any address of IPv4.
const INTERNET_V6: &str = "2000::/3";
const NOT_INTERNET_V6: &[&str] = &["2002::/16"];

/// Objects that cost nothing but the memory of the API server and the disk of the datastore, where
/// one tenant's would take everybody's. Each revision of an application and each version of a
/// config set is one.
const MAX_COUNTS: &[(&str, &str)] = &[
    ("count/secrets", "500"),
    ("count/configmaps", "500"),
    ("count/services", "200"),
    ("count/jobs.batch", "200"),
    ("count/ingresses.networking.k8s.io", "200"),
];

/// Metadata services in ranges that a tenant may ask for: of AWS by IPv6, and of Alibaba Cloud.
const METADATA: &[&str] = &["fd00:ec2::254", "100.100.100.200"];

/// Pods of k3s' ServiceLB have this label; they take in what is for a LoadBalancer (k3s
/// `pkg/cloudprovider/servicelb.go`).
const SERVICE_LB: &str = "svccontroller.k3s.cattle.io/svcname";

/// Whether a cluster of this version keeps tenants apart: `v1.36.2+k3s1`.
pub fn is_supported(version: &str) -> bool {
    let mut numbers = version.trim_start_matches('v').split(['.', '+', '-']);
    let mut next = || numbers.next().and_then(|n| n.parse::<u32>().ok());
    match (next(), next()) {
        (Some(1), Some(minor)) => minor >= MIN_MINOR,
        (Some(major), _) => major > 1,
        _ => false,
    }
}

/// The tenant of a namespace.
pub fn tenant_of(namespace: &Value) -> Option<&str> {
    namespace["metadata"]["labels"][TENANT_LABEL].as_str().filter(|name| !name.is_empty())
}

/// The host names of a namespace's tenant.
pub fn hosts_of(namespace: &Value) -> Vec<&str> {
    let text = namespace["metadata"]["annotations"][HOSTS_ANNOTATION].as_str().unwrap_or_default();
    text.split(',').filter(|host| !host.is_empty()).collect()
}

fn name_of(object: &Value) -> &str {
    object["metadata"]["name"].as_str().unwrap_or_default()
}

/// What keeps a tenant from becoming what is asked for, with its code. `labelled` are all
/// namespaces with the label.
///
/// # Errors
/// A namespace or a host name of another tenant, or a namespace that the request forgets.
pub fn check_set(wanted: &SetTenant, labelled: &[Value]) -> Result<(), (&'static str, String)> {
    let (own, others): (Vec<&Value>, Vec<&Value>) =
        labelled.iter().partition(|namespace| tenant_of(namespace) == Some(&*wanted.tenant));
    for other in &others {
        let (name, tenant) = (name_of(other), tenant_of(other).unwrap_or("?"));
        if wanted.namespaces.iter().chain(&wanted.remove_namespaces).any(|n| n == name) {
            let why = format!("namespace {name} is of the tenant {tenant}: choose another name");
            return Err(("namespace_taken", why));
        }
        for theirs in hosts_of(other) {
            if let Some(host) = wanted.hosts.iter().find(|host| overlap(host, theirs)) {
                let why = format!("host {host}: {theirs} is of the tenant {tenant}");
                return Err(("host_taken", why));
            }
        }
    }
    let named = |name: &str| {
        wanted.namespaces.iter().chain(&wanted.remove_namespaces).any(|namespace| namespace == name)
    };
    let left: Vec<&str> = own.iter().map(|n| name_of(n)).filter(|name| !named(name)).collect();
    if left.is_empty() {
        return Ok(());
    }
    let left = left.join(", ");
    let why = format!(
        "the tenant {} has these namespaces too: {left}. Name them in namespaces, or in \
         remove_namespaces: then they are deleted with all that is in them",
        wanted.tenant
    );
    Err(("namespaces_left", why))
}

/// The host names of an Ingress or HTTPRoute.
fn hosts_used(route: &Value) -> Vec<&str> {
    let rules = route["spec"]["rules"].as_array().into_iter().flatten();
    let hosts = rules.filter_map(|rule| rule["host"].as_str());
    let names = route["spec"]["hostnames"].as_array().into_iter().flatten();
    hosts.chain(names.filter_map(Value::as_str)).collect()
}

/// The first host name that a route has and the tenant would not have.
pub fn host_left<'r>(route: &'r Value, hosts: &[String]) -> Option<&'r str> {
    hosts_used(route).into_iter().find(|used| !hosts.iter().any(|own| covers(own, used)))
}

/// The first of these host names that a route has or overlaps, and what the route has.
pub fn host_taken<'h, 'r>(route: &'r Value, hosts: &[&'h str]) -> Option<(&'h str, &'r str)> {
    let taken = |used| hosts.iter().find(|host| overlap(host, used)).map(|host| (*host, used));
    hosts_used(route).into_iter().find_map(taken)
}

/// What keeps a namespace that is being deleted, in Kubernetes' words after a colon; empty where it
/// says nothing.
pub fn what_keeps(namespace: &Value) -> String {
    let conditions = namespace["status"]["conditions"].as_array().into_iter().flatten();
    let held = conditions.filter(|condition| condition["status"] == "True");
    let held: Vec<&str> = held.filter_map(|condition| condition["message"].as_str()).collect();
    if held.is_empty() {
        return String::new();
    }
    let held: String = printable(&held.join("; ")).chars().take(500).collect();
    format!(": {held}")
}

/// All objects of a tenant in one of its namespaces, in the order in which they are applied: rights
/// come once everything that bounds them is there.
///
/// # Errors
/// As [`SetTenant::egress_ranges`].
pub fn objects(tenant: &SetTenant, namespace: &str) -> Result<Vec<Value>, String> {
    let mut all = vec![quota(&tenant.quota, namespace), limits(namespace)];
    all.extend(network_policies(tenant, namespace)?);
    for account in [TENANT_VIEWER, TENANT_DEPLOYER] {
        all.push(json!({
            "apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata(namespace, account),
            "automountServiceAccountToken": false
        }));
    }
    for account in [TENANT_VIEWER, TENANT_DEPLOYER] {
        all.push(json!({
            "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "RoleBinding",
            "metadata": metadata(namespace, account),
            "roleRef": {
                "apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole",
                "name": account.replacen("pipeops-", "pipeops:", 1)
            },
            "subjects": [{"kind": "ServiceAccount", "name": account, "namespace": namespace}]
        }));
    }
    Ok(all)
}

/// One of the namespaces of a tenant.
pub fn namespace_object(tenant: &SetTenant, name: &str) -> Value {
    let mut object = json!({
        "apiVersion": "v1", "kind": "Namespace",
        "metadata": {"name": name, "labels": {
            "app.kubernetes.io/managed-by": "pipeops",
            TENANT_LABEL: tenant.tenant,
            POD_SECURITY_LABEL: tenant.pod_security.name(),
            "pod-security.kubernetes.io/warn": "restricted"
        }}
    });
    if !tenant.hosts.is_empty() {
        object["metadata"]["annotations"] = json!({HOSTS_ANNOTATION: tenant.hosts.join(",")});
    }
    object
}

fn metadata(namespace: &str, name: &str) -> Value {
    json!({
        "name": name, "namespace": namespace, "labels": {"app.kubernetes.io/managed-by": "pipeops"}
    })
}

fn quota(quota: &TenantQuota, namespace: &str) -> Value {
    let mut hard = Map::new();
    let quantities = [
        ("requests.cpu", quota.cpu.clone()),
        ("limits.memory", quota.memory.clone()),
        ("requests.storage", quota.storage.clone()),
        ("pods", quota.pods.map(|n| n.to_string())),
        ("services.loadbalancers", Some(quota.load_balancers.to_string())),
        ("services.nodeports", Some(quota.node_ports.to_string())),
    ];
    let counts = MAX_COUNTS.iter().map(|(resource, max)| (*resource, Some((*max).to_owned())));
    for (resource, quantity) in quantities.into_iter().chain(counts) {
        if let Some(quantity) = quantity {
            hard.insert(resource.into(), quantity.into());
        }
    }
    json!({
        "apiVersion": "v1", "kind": "ResourceQuota",
        "metadata": metadata(namespace, "pipeops-tenant"), "spec": {"hard": hard}
    })
}

/// Those of production, `deployments/namespaces.yaml`, and a bound of the node's disk. A quota
/// refuses what says nothing.
fn limits(namespace: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "LimitRange",
        "metadata": metadata(namespace, "pipeops-defaults"),
        "spec": {"limits": [{
            "type": "Container", "default": {"memory": "512Mi", "ephemeral-storage": "4Gi"},
            "defaultRequest": {"cpu": "50m", "memory": "64Mi", "ephemeral-storage": "64Mi"}
        }]}
    })
}

/// Nothing passes but what is named here.
fn network_policies(tenant: &SetTenant, namespace: &str) -> Result<Vec<Value>, String> {
    let policy = |name: &str, types: Value, ingress: Value, egress: Value| {
        let mut spec = json!({"podSelector": {}, "policyTypes": types});
        if !ingress.is_null() {
            spec["ingress"] = ingress;
        }
        if !egress.is_null() {
            spec["egress"] = egress;
        }
        json!({
            "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
            "metadata": metadata(namespace, name), "spec": spec
        })
    };
    let (both, outward, inward) =
        (json!(["Ingress", "Egress"]), json!(["Egress"]), json!(["Ingress"]));
    let named = |name: &str| json!({"matchLabels": {"kubernetes.io/metadata.name": name}});
    let dns = json!([{
        "to": [{
            "namespaceSelector": named("kube-system"),
            "podSelector": {"matchLabels": {"k8s-app": "kube-dns"}}
        }],
        "ports": [{"protocol": "UDP", "port": 53}, {"protocol": "TCP", "port": 53}]
    }]);
    let own = json!([{"namespaceSelector": {"matchLabels": {TENANT_LABEL: tenant.tenant}}}]);
    let controllers = INGRESS_CONTROLLERS.iter().map(|(namespace, label)| {
        let mut peer = json!({"namespaceSelector": named(namespace)});
        if let Some((key, value)) = label {
            peer["podSelector"] = json!({"matchLabels": {(*key): value}});
        }
        peer
    });
    let controllers: Vec<Value> = controllers.collect();
    let mut outside = vec![
        json!({"ipBlock": {"cidr": "0.0.0.0/0", "except": NOT_INTERNET}}),
        json!({"ipBlock": {"cidr": INTERNET_V6, "except": NOT_INTERNET_V6}}),
    ];
    let internet = outside.clone();
    let asked = tenant.egress_ranges()?;
    outside.extend(asked.iter().map(|range| json!({"ipBlock": asked_range(range)})));
    // without such a Service there is nothing to let in
    let is_open = tenant.quota.load_balancers > 0 || tenant.quota.node_ports > 0;
    let entries = if is_open { json!([{"from": entries(internet)}]) } else { json!([]) };
    Ok(vec![
        policy("pipeops-default-deny", both.clone(), Value::Null, Value::Null),
        policy("pipeops-dns", outward.clone(), Value::Null, dns),
        policy("pipeops-tenant", both, json!([{"from": own}]), json!([{"to": own}])),
        policy("pipeops-ingress", inward.clone(), json!([{"from": controllers}]), Value::Null),
        policy("pipeops-outside", inward, entries, Value::Null),
        policy(INTERNET_POLICY, outward, Value::Null, json!([{"to": outside}])),
    ])
}

/// Where requests to a LoadBalancer or NodePort come from: the internet, and k3s' ServiceLB.
fn entries(mut internet: Vec<Value>) -> Vec<Value> {
    internet.push(json!({
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kube-system"}},
        "podSelector": {"matchExpressions": [{"key": SERVICE_LB, "operator": "Exists"}]}
    }));
    internet
}

/// A private range that was asked for, without the metadata services in it; one that is asked for
/// by itself is meant.
fn asked_range(range: &str) -> Value {
    let outer = Cidr::parse(range);
    let is_inside = |address: &&&str| {
        let range = outer.zip(address.parse().ok());
        range.is_some_and(|(outer, address)| !is_single(outer) && outer.contains(address))
    };
    let inside = METADATA.iter().filter(is_inside);
    let except: Vec<String> = inside
        .map(|address| format!("{address}/{}", if address.contains(':') { 128 } else { 32 }))
        .collect();
    if except.is_empty() {
        return json!({"cidr": range});
    }
    json!({"cidr": range, "except": except})
}

fn is_single(range: Cidr) -> bool {
    range.prefix == if range.address.is_ipv6() { 128 } else { 32 }
}

#[cfg(test)]
mod tests;
