//! The objects that a tenant consists of in Kubernetes, and what may become of it. Pure: nothing is
//! requested here.

use serde_json::{Map, Value, json};

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
            "pod-security.kubernetes.io/enforce": tenant.pod_security.name(),
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
    for (resource, quantity) in quantities {
        if let Some(quantity) = quantity {
            hard.insert(resource.into(), quantity.into());
        }
    }
    json!({
        "apiVersion": "v1", "kind": "ResourceQuota",
        "metadata": metadata(namespace, "pipeops-tenant"), "spec": {"hard": hard}
    })
}

/// Those of production: `deployments/namespaces.yaml`. A quota refuses what says nothing.
fn limits(namespace: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "LimitRange",
        "metadata": metadata(namespace, "pipeops-defaults"),
        "spec": {"limits": [{
            "type": "Container", "default": {"memory": "512Mi"},
            "defaultRequest": {"cpu": "50m", "memory": "64Mi"}
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
    let asked = tenant.egress_ranges()?;
    outside.extend(asked.iter().map(|range| json!({"ipBlock": {"cidr": range}})));
    Ok(vec![
        policy("pipeops-default-deny", both.clone(), Value::Null, Value::Null),
        policy("pipeops-dns", outward.clone(), Value::Null, dns),
        policy("pipeops-tenant", both, json!([{"from": own}]), json!([{"to": own}])),
        policy("pipeops-ingress", inward, json!([{"from": controllers}]), Value::Null),
        policy("pipeops-internet", outward, Value::Null, json!([{"to": outside}])),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn acme(change: impl Fn(&mut Value)) -> SetTenant {
        let mut spec = json!({"tenant": "acme", "namespaces": ["acme-web", "acme-db"],
            "hosts": ["shop.acme.com", "*.apps.acme.com"]});
        change(&mut spec);
        serde_json::from_value(spec).unwrap()
    }

    fn namespace(name: &str, tenant: &str, hosts: &str) -> Value {
        json!({"metadata": {"name": name, "labels": {TENANT_LABEL: tenant},
            "annotations": {HOSTS_ANNOTATION: hosts}}})
    }

    #[test]
    fn a_version_is_new_enough_from_1_30_on() {
        for version in ["v1.30.0+k3s1", "v1.36.2", "v2.0.0", "v1.30.0-rc1+k3s1"] {
            assert!(is_supported(version), "{version}");
        }
        for version in ["v1.29.9+k3s1", "v1.3.0", "", "v1", "soon"] {
            assert!(!is_supported(version), "{version}");
        }
    }

    #[test]
    fn what_is_of_another_tenant_is_refused_and_no_namespace_is_forgotten() {
        let there = [
            namespace("acme-web", "acme", "shop.acme.com"),
            namespace("globex", "globex", "www.globex.com,*.globex.net"),
        ];
        let verdict = |change: &dyn Fn(&mut Value)| {
            check_set(&acme(change), &there)
                .err()
                .map_or(String::new(), |(c, why)| c.to_owned() + &why)
        };
        assert_eq!(verdict(&|_| {}), "");
        for (field, value, code, why) in [
            ("namespaces", json!(["acme-web", "globex"]), "namespace_taken", "globex"),
            ("remove_namespaces", json!(["globex"]), "namespace_taken", "globex"),
            ("hosts", json!(["www.globex.com"]), "host_taken", "tenant globex"),
            ("hosts", json!(["a.b.globex.net"]), "host_taken", "*.globex.net"),
            ("hosts", json!(["*.globex.com"]), "host_taken", "www.globex.com"),
            ("namespaces", json!(["acme-db"]), "namespaces_left", "acme-web"),
        ] {
            let said = verdict(&|spec| spec[field] = value.clone());
            assert!(said.starts_with(code) && said.contains(why), "{field} {value}: {said}");
        }
        let moved = |spec: &mut Value| {
            spec["namespaces"] = json!(["acme-db"]);
            spec["remove_namespaces"] = json!(["acme-web"]);
        };
        assert_eq!(verdict(&moved), "");
        let ingress =
            json!({"spec": {"rules": [{"host": "a.apps.acme.com"}, {"host": "b.acme.com"}]}});
        let route = json!({"spec": {"hostnames": ["shop.acme.com"]}});
        let hosts = acme(|_| {}).hosts;
        assert_eq!(host_left(&ingress, &hosts), Some("b.acme.com"));
        assert_eq!(
            (host_left(&route, &hosts), host_left(&route, &[])),
            (None, Some("shop.acme.com"))
        );
    }

    #[test]
    fn a_tenant_has_bounds_before_it_has_rights() {
        let tenant = acme(|spec| {
            spec["quota"] = json!({"cpu": "2", "memory": "4Gi", "storage": "10Gi", "pods": 20});
            spec["egress"] = json!(["10.9.0.0/16"]);
        });
        let made = namespace_object(&tenant, "acme-web");
        assert_eq!((tenant_of(&made), hosts_of(&made).len()), (Some("acme"), 2));
        assert_eq!(made["metadata"]["labels"]["pod-security.kubernetes.io/enforce"], "baseline");
        let bare = namespace_object(&acme(|spec| spec["hosts"] = json!([])), "acme-web");
        assert!(bare["metadata"]["annotations"].is_null() && hosts_of(&bare).is_empty());
        let all = objects(&tenant, "acme-web").unwrap();
        let names: Vec<String> =
            all.iter().map(|o| format!("{} {}", o["kind"].as_str().unwrap(), name_of(o))).collect();
        let expected = [
            "ResourceQuota pipeops-tenant",
            "LimitRange pipeops-defaults",
            "NetworkPolicy pipeops-default-deny",
            "NetworkPolicy pipeops-dns",
            "NetworkPolicy pipeops-tenant",
            "NetworkPolicy pipeops-ingress",
            "NetworkPolicy pipeops-internet",
            "ServiceAccount pipeops-tenant-viewer",
            "ServiceAccount pipeops-tenant-deployer",
            "RoleBinding pipeops-tenant-viewer",
            "RoleBinding pipeops-tenant-deployer",
        ];
        assert_eq!(names, expected);
        assert!(all.iter().all(|object| object["metadata"]["namespace"] == "acme-web"));
        let hard = json!({"requests.cpu": "2", "limits.memory": "4Gi", "requests.storage": "10Gi",
            "pods": "20", "services.loadbalancers": "0", "services.nodeports": "0"});
        assert_eq!(all[0]["spec"]["hard"], hard);
        assert_eq!(
            all[2]["spec"],
            json!({"podSelector": {}, "policyTypes": ["Ingress", "Egress"]})
        );
        let outside = all[6]["spec"]["egress"][0]["to"].as_array().unwrap();
        assert_eq!(outside[2]["ipBlock"]["cidr"], "10.9.0.0/16");
        for (n, what) in [(9, "viewer"), (10, "deployer")] {
            assert_eq!(all[n]["roleRef"]["name"], format!("pipeops:tenant-{what}"));
            let account = json!({"kind": "ServiceAccount", "namespace": "acme-web",
                "name": format!("pipeops-tenant-{what}")});
            assert_eq!(all[n]["subjects"], json!([account]));
        }
    }

    /// A range of its own is part of what it is taken from, or Kubernetes refuses the policy.
    #[test]
    fn the_internet_is_without_what_is_private() {
        use crate::base::cidr::Cidr;
        let within = |text: &str| {
            let address = text.parse().unwrap();
            let holds = |range: &&str| Cidr::parse(range).unwrap().contains(address);
            if text.contains(':') {
                holds(&INTERNET_V6) && !NOT_INTERNET_V6.iter().any(holds)
            } else {
                !NOT_INTERNET.iter().any(holds)
            }
        };
        for outside in ["1.1.1.1", "93.184.216.34", "172.32.0.1", "2606:4700::1111"] {
            assert!(within(outside), "{outside}");
        }
        for inside in [
            "10.42.0.7",
            "10.43.0.1",
            "172.16.3.4",
            "192.168.1.1",
            "169.254.169.254",
            "100.100.100.200",
            "127.0.0.1",
            "224.0.0.1",
            "255.255.255.255",
            "fd00:ec2::254",
            "fe80::1",
            "ff02::1",
            "::1",
            "::ffff:10.0.0.1",
            "64:ff9b::a00:1",
            "2002:a00:1::",
        ] {
            assert!(!within(inside), "{inside}");
        }
    }
}
