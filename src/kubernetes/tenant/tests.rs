//! What stands in the objects of a tenant, what its hosts and ranges may be.

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
        check_set(&acme(change), &there).err().map_or(String::new(), |(c, why)| c.to_owned() + &why)
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
    let ingress = json!({"spec": {"rules": [{"host": "a.apps.acme.com"}, {"host": "b.acme.com"}]}});
    let route = json!({"spec": {"hostnames": ["shop.acme.com"]}});
    assert_eq!(host_taken(&ingress, &["b.com"]), None);
    assert_eq!(
        host_taken(&ingress, &["b.com", "*.acme.com"]),
        Some(("*.acme.com", "a.apps.acme.com"))
    );
    let hosts = acme(|_| {}).hosts;
    assert_eq!(host_left(&ingress, &hosts), Some("b.acme.com"));
    assert_eq!((host_left(&route, &hosts), host_left(&route, &[])), (None, Some("shop.acme.com")));
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
        "NetworkPolicy pipeops-outside",
        "NetworkPolicy pipeops-internet",
        "ServiceAccount pipeops-tenant-viewer",
        "ServiceAccount pipeops-tenant-deployer",
        "RoleBinding pipeops-tenant-viewer",
        "RoleBinding pipeops-tenant-deployer",
    ];
    assert_eq!(names, expected);
    assert!(all.iter().all(|object| object["metadata"]["namespace"] == "acme-web"));
    let hard = json!({"requests.cpu": "2", "limits.memory": "4Gi", "requests.storage": "10Gi",
        "pods": "20", "services.loadbalancers": "0", "services.nodeports": "0",
        "count/secrets": "500", "count/configmaps": "500", "count/services": "200",
        "count/jobs.batch": "200", "count/ingresses.networking.k8s.io": "200"});
    assert_eq!(all[0]["spec"]["hard"], hard);
    assert_eq!(all[2]["spec"], json!({"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}));
    let outside = all[7]["spec"]["egress"][0]["to"].as_array().unwrap();
    assert_eq!(outside[2]["ipBlock"]["cidr"], "10.9.0.0/16");
    for (n, what) in [(10, "viewer"), (11, "deployer")] {
        assert_eq!(all[n]["roleRef"]["name"], format!("pipeops:tenant-{what}"));
        let account = json!({"kind": "ServiceAccount", "namespace": "acme-web",
            "name": format!("pipeops-tenant-{what}")});
        assert_eq!(all[n]["subjects"], json!([account]));
    }
}

#[test]
fn what_comes_from_outside_is_let_in_where_there_is_a_service_for_it() {
    let entries = |quota: Value| {
        let all = objects(&acme(|spec| spec["quota"] = quota.clone()), "acme-web").unwrap();
        let policy = all.iter().find(|o| name_of(o) == "pipeops-outside").unwrap();
        policy["spec"]["ingress"].clone()
    };
    assert_eq!(entries(json!({})), json!([]));
    for quota in [json!({"load_balancers": 1}), json!({"node_ports": 1})] {
        let from = entries(quota)[0]["from"].clone();
        assert_eq!(from[0]["ipBlock"]["cidr"], "0.0.0.0/0");
        assert_eq!(from[0]["ipBlock"]["except"], json!(NOT_INTERNET));
        assert_eq!(from[2]["podSelector"]["matchExpressions"][0]["key"], SERVICE_LB);
    }
}

#[test]
fn a_range_that_is_asked_for_holds_no_metadata_service() {
    for (range, except) in [
        ("10.0.0.0/8", json!(null)),
        ("100.64.0.0/10", json!(["100.100.100.200/32"])),
        ("100.100.100.200/32", json!(null)),
        ("fd00::/8", json!(["fd00:ec2::254/128"])),
        ("fd00:1::/32", json!(null)),
    ] {
        let block = asked_range(range);
        assert_eq!((&block["cidr"], &block["except"]), (&json!(range), &except), "{range}");
    }
}

#[test]
fn what_keeps_a_namespace_is_told() {
    let condition = |status: &str, message: &str| json!({"status": status, "message": message});
    let held = json!({"status": {"conditions": [condition("False", "all is well"),
        condition("True", "a finalizer remains"), condition("True", "pods remain")]}});
    assert_eq!(what_keeps(&held), ": a finalizer remains; pods remain");
    for silent in [json!(null), json!({}), json!({"status": {"phase": "Terminating"}})] {
        assert_eq!(what_keeps(&silent), "");
    }
}

/// A range of its own is part of what it is taken from, or Kubernetes refuses the policy.
#[test]
fn the_internet_is_without_what_is_private() {
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
        "168.63.129.16",
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
