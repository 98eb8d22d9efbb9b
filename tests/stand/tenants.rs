//! Two tenants against a real API server: who may do what where, and each way out of a tenant that
//! is known. What writes is a dry run, which passes through admission all the same.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use pipeops::contract::tenant::SetTenant;
use pipeops::kubernetes::client::path_of;
use pipeops::kubernetes::tenant::{namespace_object, objects};
use pipeops::kubernetes::upstream::Upstream;
use serde_json::{Value, json};

use crate::rights::{Identity, READ, VERBS, WRITE, listed, may, own, request};

/// Namespaces of the two tenants, one of them with two.
const ACME: &str = "stand-acme";
const ACME_DB: &str = "stand-acme-db";
const GLOBEX: &str = "stand-globex";
/// Where something of a tenant may not reach; empty is the whole cluster.
const ELSEWHERE: &[&str] = &["", "production", "beta", "pipeops", "kube-system", "default"];

/// Read by both roles in the namespace itself.
const READABLE: &[(&str, &[&str])] = &[
    (
        "",
        &[
            "configmaps",
            "endpoints",
            "events",
            "limitranges",
            "persistentvolumeclaims",
            "pods",
            "pods/log",
            "pods/status",
            "podtemplates",
            "replicationcontrollers",
            "resourcequotas",
            "serviceaccounts",
            "services",
        ],
    ),
    (
        "apps",
        &[
            "controllerrevisions",
            "daemonsets",
            "deployments",
            "deployments/scale",
            "replicasets",
            "replicasets/scale",
            "statefulsets",
            "statefulsets/scale",
        ],
    ),
    ("batch", &["cronjobs", "jobs"]),
    ("autoscaling", &["horizontalpodautoscalers"]),
    ("policy", &["poddisruptionbudgets"]),
    ("networking.k8s.io", &["ingresses", "networkpolicies"]),
    ("gateway.networking.k8s.io", &["httproutes"]),
    ("discovery.k8s.io", &["endpointslices"]),
    ("events.k8s.io", &["events"]),
    ("cert-manager.io", &["certificates", "certificaterequests"]),
    ("acme.cert-manager.io", &["orders", "challenges"]),
];

/// Written by a deployer there.
const DEPLOYABLE: &[(&str, &[&str])] = &[
    ("", &["pods", "services", "configmaps", "persistentvolumeclaims", "replicationcontrollers"]),
    ("apps", &["deployments", "statefulsets", "daemonsets", "replicasets"]),
    ("batch", &["jobs", "cronjobs"]),
    ("autoscaling", &["horizontalpodautoscalers"]),
    ("policy", &["poddisruptionbudgets"]),
    ("networking.k8s.io", &["ingresses"]),
    ("gateway.networking.k8s.io", &["httproutes"]),
];

fn expected(role: &str, verb: &str, group: &str, resource: &str, is_own: bool) -> bool {
    if own(group, resource, verb) {
        return true;
    }
    if !is_own {
        return false;
    }
    match (verb, group, resource) {
        ("get", "", "namespaces") => return true,
        ("get" | "list", "metrics.k8s.io", "pods") => return true,
        _ => {}
    }
    if READ.contains(&verb) && listed(READABLE, group, resource) {
        return true;
    }
    role == "deployer"
        && match (group, resource) {
            ("", "secrets") => matches!(verb, "create" | "update" | "patch" | "delete"),
            ("", "pods/exec" | "pods/attach" | "pods/portforward") => {
                matches!(verb, "create" | "get")
            }
            ("apps", "deployments/scale" | "statefulsets/scale" | "replicasets/scale") => {
                matches!(verb, "update" | "patch")
            }
            _ => WRITE.contains(&verb) && listed(DEPLOYABLE, group, resource),
        }
}

fn user(name: impl Into<String>) -> Identity {
    vec![("Impersonate-User", name.into())]
}

fn account(namespace: &str, role: &str) -> Identity {
    user(format!("system:serviceaccount:{namespace}:pipeops-tenant-{role}"))
}

fn agent() -> Identity {
    user("system:serviceaccount:pipeops:pipeops-agent")
}

fn tenant(name: &str, namespaces: &[&str], host: &str) -> SetTenant {
    let spec = json!({"tenant": name, "namespaces": namespaces, "hosts": [host],
        "quota": {"pods": 10}});
    serde_json::from_value(spec).unwrap()
}

/// Makes both tenants as the agent does.
async fn make(client: &Upstream) -> Vec<String> {
    let mut wrong = Vec::new();
    let tenants = [
        tenant(ACME, &[ACME, ACME_DB], "*.acme.test"),
        tenant(GLOBEX, &[GLOBEX], "www.globex.test"),
    ];
    for tenant in tenants {
        for namespace in &tenant.namespaces {
            let mut all = vec![namespace_object(&tenant, namespace)];
            all.extend(objects(&tenant, namespace).unwrap());
            for object in all {
                let path = path_of(&object).unwrap();
                let path = format!("{path}?fieldManager=pipeops-runner&force=false");
                let (status, answer) = request(client, &agent(), "PATCH", &path, &object).await;
                if !matches!(status, 200 | 201) {
                    wrong.push(format!("the agent makes {path}: {status} {}", answer["message"]));
                }
            }
        }
    }
    wrong
}

/// Until the API server knows the bindings, and has the ServiceAccounts that pods get.
async fn ready(client: &Upstream) {
    let begun = Instant::now();
    for namespace in [ACME, ACME_DB, GLOBEX] {
        let path = format!("/api/v1/namespaces/{namespace}/serviceaccounts/default");
        loop {
            let there = request(client, &Identity::new(), "GET", &path, &Value::Null).await.0;
            let who = account(namespace, "deployer");
            if there == 200 && may(client, &who, "list", ("", "pods"), (namespace, "")).await {
                break;
            }
            assert!(begun.elapsed() < Duration::from_secs(30), "{namespace} is not ready");
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }
}

/// Role × verb × resource × namespace, of each tenant.
async fn table(client: &Upstream, resources: &BTreeSet<(String, String)>) -> Vec<String> {
    let mut questions = Vec::new();
    for home in [ACME, GLOBEX] {
        for role in ["viewer", "deployer"] {
            for (group, resource) in resources {
                for verb in VERBS {
                    for namespace in ELSEWHERE.iter().chain(&[ACME, ACME_DB, GLOBEX]) {
                        let of = (group.as_str(), resource.as_str());
                        questions.push((home, role, *verb, of, *namespace));
                    }
                }
            }
        }
    }
    let total = questions.len();
    let wrong: Vec<String> = futures_util::stream::iter(questions)
        .map(|(home, role, verb, (group, resource), namespace)| {
            let client = client.clone();
            async move {
                let who = account(home, role);
                let is = may(&client, &who, verb, (group, resource), (namespace, "")).await;
                let should = expected(role, verb, group, resource, namespace == home);
                (is != should).then(|| {
                    format!(
                        "{role} of {home}: {verb} {group}/{resource} in `{namespace}`: is {is}, \
                         should be {should}"
                    )
                })
            }
        })
        .buffer_unordered(16)
        .filter_map(std::future::ready)
        .collect()
        .await;
    println!("{total} verdicts over two tenants, {} wrong", wrong.len());
    wrong
}

/// A request, and whether it must pass: method, path, body.
type Attempt = (&'static str, Identity, bool, &'static str, String, Value);

fn namespace(name: &str, labels: Value) -> Value {
    json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})
}

fn binding(role: &str, subject: Value) -> Value {
    json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "RoleBinding",
        "metadata": {"name": "x"}, "subjects": [subject],
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": role}})
}

/// What the agent may not do although it may make tenants.
fn of_the_agent() -> Vec<Attempt> {
    let rbac = |ns: &str| {
        format!("/apis/rbac.authorization.k8s.io/v1/namespaces/{ns}/rolebindings?dryRun=All")
    };
    let all = "/api/v1/namespaces?dryRun=All".to_owned();
    let one = |name: &str| format!("/api/v1/namespaces/{name}?dryRun=All");
    let level = "pod-security.kubernetes.io/enforce";
    let labelled = json!({"pipeops.io/tenant": "x", level: "baseline"});
    let account =
        |name: &str, ns: &str| json!({"kind": "ServiceAccount", "name": name, "namespace": ns});
    let person = json!({"kind": "User", "apiGroup": "rbac.authorization.k8s.io", "name": "eve"});
    let policy = json!({"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": {"name": "x"}, "spec": {"podSelector": {}}});
    let policies =
        |ns: &str| format!("/apis/networking.k8s.io/v1/namespaces/{ns}/networkpolicies?dryRun=All");
    let sa = |name: &str| json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name}});
    let accounts = |ns: &str| format!("/api/v1/namespaces/{ns}/serviceaccounts?dryRun=All");
    let deployer = "pipeops:tenant-deployer";
    let name = "pipeops-tenant-deployer";
    let relabel = |labels: Value| json!({"metadata": {"labels": labels}});
    [
        (
            "a namespace of a tenant",
            true,
            "POST",
            all.clone(),
            namespace("stand-x", labelled.clone()),
        ),
        ("a namespace without label", false, "POST", all.clone(), namespace("stand-x", json!({}))),
        (
            "a namespace that others trust",
            false,
            "POST",
            all.clone(),
            namespace("stand-system", labelled.clone()),
        ),
        (
            "a namespace that looks like ours",
            false,
            "POST",
            all.clone(),
            namespace("pipeops-x", labelled),
        ),
        (
            "a tenant's namespace without Pod Security",
            false,
            "POST",
            all.clone(),
            namespace("stand-x", json!({"pipeops.io/tenant": "x"})),
        ),
        (
            "a tenant's namespace that is privileged",
            false,
            "POST",
            all.clone(),
            namespace("stand-x", json!({"pipeops.io/tenant": "x", level: "privileged"})),
        ),
        (
            "a tenant's namespace with Pod Security of long ago",
            false,
            "POST",
            all,
            namespace(
                "stand-x",
                json!({"pipeops.io/tenant": "x", level: "baseline",
                    "pod-security.kubernetes.io/enforce-version": "v1.0"}),
            ),
        ),
        (
            "a label onto kube-system",
            false,
            "PATCH",
            one("kube-system"),
            relabel(json!({"pipeops.io/tenant": "x", level: "baseline"})),
        ),
        (
            "a namespace that changes its tenant",
            false,
            "PATCH",
            one(GLOBEX),
            relabel(json!({"pipeops.io/tenant": ACME})),
        ),
        (
            "a label taken off",
            false,
            "PATCH",
            one(GLOBEX),
            relabel(json!({"pipeops.io/tenant": null})),
        ),
        (
            "Pod Security relaxed",
            false,
            "PATCH",
            one(GLOBEX),
            relabel(json!({level: "privileged"})),
        ),
        (
            "Pod Security tightened",
            true,
            "PATCH",
            one(GLOBEX),
            relabel(json!({level: "restricted"})),
        ),
        ("production deleted", false, "DELETE", one("production"), Value::Null),
        ("a tenant deleted", true, "DELETE", one(GLOBEX), Value::Null),
        ("a NetworkPolicy in production", false, "POST", policies("production"), policy.clone()),
        ("a NetworkPolicy in a tenant", true, "POST", policies(GLOBEX), policy),
        ("a ServiceAccount in production", false, "POST", accounts("production"), sa(name)),
        ("another ServiceAccount in a tenant", false, "POST", accounts(GLOBEX), sa("x")),
        (
            "the role of a tenant in production",
            false,
            "POST",
            rbac("production"),
            binding(deployer, account(name, "production")),
        ),
        (
            "the role of a tenant",
            true,
            "POST",
            rbac(GLOBEX),
            binding(deployer, account(name, GLOBEX)),
        ),
        (
            "cluster-admin in a tenant",
            false,
            "POST",
            rbac(GLOBEX),
            binding("cluster-admin", account(name, GLOBEX)),
        ),
        (
            "the deployer of everybody in a tenant",
            false,
            "POST",
            rbac(GLOBEX),
            binding("pipeops:deployer", account(name, GLOBEX)),
        ),
        (
            "the account of another tenant",
            false,
            "POST",
            rbac(GLOBEX),
            binding(deployer, account(name, ACME)),
        ),
        (
            "the wrong account",
            false,
            "POST",
            rbac(GLOBEX),
            binding(deployer, account("pipeops-tenant-viewer", GLOBEX)),
        ),
        ("a person", false, "POST", rbac(GLOBEX), binding(deployer, person)),
        (
            "a binding of the whole cluster",
            false,
            "POST",
            "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings?dryRun=All".into(),
            json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding",
                "metadata": {"name": "x"}, "subjects": [account(name, GLOBEX)],
                "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole",
                    "name": deployer}}),
        ),
        (
            "a pod in a tenant",
            false,
            "POST",
            format!("/api/v1/namespaces/{GLOBEX}/pods?dryRun=All"),
            pod(json!({})),
        ),
        (
            "the Secrets of a tenant",
            false,
            "GET",
            format!("/api/v1/namespaces/{GLOBEX}/secrets"),
            Value::Null,
        ),
    ]
    .into_iter()
    .map(|(title, passes, method, path, body)| (title, agent(), passes, method, path, body))
    .collect()
}

/// A container that drops these capabilities.
fn container(drop: Value) -> Value {
    json!({"name": "x", "image": "x", "securityContext": {"capabilities": {"drop": drop}}})
}

/// A pod, with these fields in its spec.
fn pod(fields: Value) -> Value {
    let mut spec = json!({"containers": [container(json!(["NET_RAW"]))]});
    for (name, value) in fields.as_object().unwrap() {
        spec[name] = value.clone();
    }
    json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": spec})
}

fn service(spec: Value) -> Value {
    json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "x"}, "spec": spec})
}

fn ingress(spec: Value) -> Value {
    json!({"apiVersion": "networking.k8s.io/v1", "kind": "Ingress", "metadata": {"name": "x"},
        "spec": spec})
}

fn rules(hosts: &[Option<&str>]) -> Value {
    let backend = json!({"service": {"name": "x", "port": {"number": 80}}});
    let http = json!({"paths": [{"path": "/", "pathType": "Prefix", "backend": backend}]});
    let rules = hosts.iter().map(|host| match host {
        Some(host) => json!({"host": host, "http": http}),
        None => json!({"http": http}),
    });
    Value::Array(rules.collect())
}

/// What `who` writes in a namespace of acme: the deployer of that tenant, and somebody to whom RBAC
/// gives nearly everything, so that the policies alone hold.
fn in_a_tenant(who: &Identity) -> Vec<Attempt> {
    let at = |rest: &str| format!("/api/v1/namespaces/{ACME}/{rest}?dryRun=All");
    let ways = format!("/apis/networking.k8s.io/v1/namespaces/{ACME}/ingresses?dryRun=All");
    let own = Some("shop.acme.test");
    let tls = |hosts: Value| json!({"rules": rules(&[own]), "tls": [{"hosts": hosts, "secretName": "x"}]});
    let mut annotated = ingress(json!({"rules": rules(&[own])}));
    annotated["metadata"]["annotations"] =
        json!({"cert-manager.io/common-name": "www.globex.test"});
    let backend = json!({"service": {"name": "x", "port": {"number": 80}}});
    let mut injected = ingress(json!({"rules": rules(&[own])}));
    injected["spec"]["rules"][0]["http"]["paths"][0]["path"] =
        "/`) || Host(`www.globex.test`) || PathPrefix(`/x".into();
    injected["spec"]["rules"][0]["http"]["paths"][0]["pathType"] = "ImplementationSpecific".into();
    let mut matcher = ingress(json!({"rules": rules(&[own])}));
    matcher["metadata"]["annotations"] = json!({"traefik.ingress.kubernetes.io/router.pathmatcher":
        "PathPrefix(`/`) || Host(`www.globex.test`) && PathPrefix"});
    let ports = json!([{"port": 80}]);
    let mut secret = json!({"apiVersion": "v1", "kind": "Secret",
        "metadata": {"name": "x", "annotations": {
            "kubernetes.io/service-account.name": "pipeops-tenant-deployer"}},
        "type": "kubernetes.io/service-account-token"});
    let token = secret.clone();
    secret["type"] = "Opaque".into();
    let mut attempts = vec![
        ("a pod", true, "POST", at("pods"), pod(json!({}))),
        (
            "a pod with the fixed account",
            false,
            "POST",
            at("pods"),
            pod(json!({"serviceAccountName": "pipeops-tenant-deployer"})),
        ),
        (
            "a pod with it by its old name",
            false,
            "POST",
            at("pods"),
            pod(json!({"serviceAccount": "pipeops-tenant-viewer"})),
        ),
        (
            "a pod as important as the cluster's own",
            false,
            "POST",
            at("pods"),
            pod(json!({"priorityClassName": "system-node-critical"})),
        ),
        (
            "a pod that drops all",
            true,
            "POST",
            at("pods"),
            pod(json!({"containers": [container(json!(["ALL"]))]})),
        ),
        (
            "a pod that says nothing of capabilities",
            false,
            "POST",
            at("pods"),
            pod(json!({"containers": [{"name": "x", "image": "x"}]})),
        ),
        (
            "a pod that drops others",
            false,
            "POST",
            at("pods"),
            pod(json!({"containers": [container(json!(["CHOWN"]))]})),
        ),
        (
            "a pod whose init container drops none",
            false,
            "POST",
            at("pods"),
            pod(json!({"initContainers": [{"name": "y", "image": "x"}]})),
        ),
        ("a privileged pod", false, "POST", at("pods"), pod(json!({"hostNetwork": true}))),
        ("a Service", true, "POST", at("services"), service(json!({"ports": ports}))),
        (
            "an ExternalName",
            false,
            "POST",
            at("services"),
            service(json!({"type": "ExternalName", "externalName": "x.globex.test"})),
        ),
        (
            "externalIPs",
            false,
            "POST",
            at("services"),
            service(json!({"ports": ports, "externalIPs": ["10.0.0.1"]})),
        ),
        (
            "a LoadBalancer",
            false,
            "POST",
            at("services"),
            service(json!({"ports": ports, "type": "LoadBalancer"})),
        ),
        (
            "a NodePort",
            false,
            "POST",
            at("services"),
            service(json!({"ports": ports, "type": "NodePort"})),
        ),
        ("a Secret", true, "POST", at("secrets"), secret),
        ("a token of the fixed account", false, "POST", at("secrets"), token),
        ("an Ingress", true, "POST", ways.clone(), ingress(json!({"rules": rules(&[own])}))),
        ("an Ingress with TLS", true, "POST", ways.clone(), ingress(tls(json!(["a.acme.test"])))),
        (
            "a host of another tenant",
            false,
            "POST",
            ways.clone(),
            ingress(json!({"rules": rules(&[Some("www.globex.test")])})),
        ),
        (
            "a host of nobody",
            false,
            "POST",
            ways.clone(),
            ingress(json!({"rules": rules(&[own, Some("acme.test")])})),
        ),
        (
            "a name that ends the same",
            false,
            "POST",
            ways.clone(),
            ingress(json!({"rules": rules(&[Some("evilacme.test")])})),
        ),
        ("every host", false, "POST", ways.clone(), ingress(json!({"rules": rules(&[own, None])}))),
        (
            "a backend for all",
            false,
            "POST",
            ways.clone(),
            ingress(json!({"defaultBackend": backend})),
        ),
        (
            "a backend for all beside a rule",
            false,
            "POST",
            ways.clone(),
            ingress(json!({"rules": rules(&[own]), "defaultBackend": backend})),
        ),
        (
            "a certificate for another tenant",
            false,
            "POST",
            ways.clone(),
            ingress(tls(json!(["www.globex.test"]))),
        ),
        ("a certificate for every host", false, "POST", ways.clone(), ingress(tls(json!([])))),
        ("a name by annotation", false, "POST", ways.clone(), annotated),
        ("a host in a path", false, "POST", ways.clone(), injected),
        ("a host in a matcher", false, "POST", ways.clone(), matcher),
    ];
    let annotated = |name: &str, value: &str| {
        let mut ingress = ingress(json!({"rules": rules(&[own])}));
        ingress["metadata"]["annotations"] = json!({name: value});
        ingress
    };
    let router = "traefik.ingress.kubernetes.io/router.";
    for (title, passes, name, value) in [
        ("TLS of Traefik", true, format!("{router}tls"), "true"),
        ("entry points of Traefik", true, format!("{router}entrypoints"), "web,websecure"),
        ("an entry point for others", false, format!("{router}entrypoints"), "web,traefik"),
        ("a middleware", false, format!("{router}middlewares"), "kube-system-x@kubernetescrd"),
        ("a resolver of certificates", false, format!("{router}tls.certresolver"), "x"),
        ("a priority", false, format!("{router}priority"), "100000"),
        (
            "an alias",
            false,
            "nginx.ingress.kubernetes.io/server-alias".to_owned(),
            "www.globex.test",
        ),
        (
            "a snippet",
            false,
            "nginx.ingress.kubernetes.io/configuration-snippet".to_owned(),
            "return 200;",
        ),
    ] {
        attempts.push((title, passes, "POST", ways.clone(), annotated(&name, value)));
    }
    attempts.extend(bounds());
    attempts
        .into_iter()
        .map(|(title, passes, method, path, body)| (title, who.clone(), passes, method, path, body))
        .collect()
}

/// What bounds a tenant, changed by others than the agent.
fn bounds() -> Vec<(&'static str, bool, &'static str, String, Value)> {
    let at = |rest: &str| format!("/api/v1/namespaces/{ACME}/{rest}?dryRun=All");
    let policies = format!("/apis/networking.k8s.io/v1/namespaces/{ACME}/networkpolicies");
    let bindings = format!("/apis/rbac.authorization.k8s.io/v1/namespaces/{ACME}/rolebindings");
    let level = "pod-security.kubernetes.io/enforce";
    let relabel = |labels: Value| json!({"metadata": {"labels": labels}});
    let home = format!("/api/v1/namespaces/{ACME}?dryRun=All");
    let open = json!({"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": {"name": "x"}, "spec": {"podSelector": {}, "egress": [{}], "policyTypes": ["Egress"]}});
    let account = json!({"kind": "ServiceAccount", "name": "default", "namespace": ACME});
    vec![
        (
            "a NetworkPolicy deleted",
            false,
            "DELETE",
            format!("{policies}/pipeops-default-deny?dryRun=All"),
            Value::Null,
        ),
        (
            "all NetworkPolicies deleted",
            false,
            "DELETE",
            format!("{policies}?dryRun=All"),
            Value::Null,
        ),
        ("a NetworkPolicy that opens all", false, "POST", format!("{policies}?dryRun=All"), open),
        (
            "the quota raised",
            false,
            "PATCH",
            at("resourcequotas/pipeops-tenant"),
            json!({"spec": {"hard": {"pods": "1000"}}}),
        ),
        ("the quota deleted", false, "DELETE", at("resourcequotas/pipeops-tenant"), Value::Null),
        ("the limits deleted", false, "DELETE", at("limitranges/pipeops-defaults"), Value::Null),
        (
            "the fixed account changed",
            false,
            "PATCH",
            at("serviceaccounts/pipeops-tenant-deployer"),
            json!({"automountServiceAccountToken": true}),
        ),
        (
            "a right given on",
            false,
            "POST",
            format!("{bindings}?dryRun=All"),
            binding("pipeops:tenant-deployer", account),
        ),
        (
            "Pod Security relaxed",
            false,
            "PATCH",
            home.clone(),
            relabel(json!({level: "privileged"})),
        ),
        ("Pod Security taken off", false, "PATCH", home.clone(), relabel(json!({level: null}))),
        (
            "the tenant changed",
            false,
            "PATCH",
            home.clone(),
            relabel(json!({"pipeops.io/tenant": GLOBEX})),
        ),
        (
            "the tenant taken off",
            false,
            "PATCH",
            home.clone(),
            relabel(json!({"pipeops.io/tenant": null})),
        ),
        (
            "the tenant changed by the status",
            false,
            "PATCH",
            format!("/api/v1/namespaces/{ACME}/status?dryRun=All"),
            relabel(json!({"pipeops.io/tenant": GLOBEX})),
        ),
        (
            "a host more",
            false,
            "PATCH",
            home,
            json!({"metadata": {"annotations": {"pipeops.io/hosts": "www.globex.test"}}}),
        ),
        (
            "a label onto kube-system",
            false,
            "PATCH",
            "/api/v1/namespaces/kube-system?dryRun=All".into(),
            relabel(json!({"pipeops.io/tenant": ACME})),
        ),
        (
            "a namespace of a tenant",
            false,
            "POST",
            "/api/v1/namespaces?dryRun=All".into(),
            namespace("stand-x", json!({"pipeops.io/tenant": ACME, level: "baseline"})),
        ),
    ]
}

/// Whom the policies must let pass, and what a controller may not do for a tenant.
fn of_the_cluster() -> Vec<Attempt> {
    let controller = |name: &str| {
        let mut who = user(format!("system:serviceaccount:kube-system:{name}"));
        who.push(("Impersonate-Group", "system:serviceaccounts".into()));
        who.push(("Impersonate-Group", "system:serviceaccounts:kube-system".into()));
        who.push(("Impersonate-Group", "system:authenticated".into()));
        who
    };
    let pods = format!("/api/v1/namespaces/{ACME}/pods?dryRun=All");
    let policy = format!(
        "/apis/networking.k8s.io/v1/namespaces/{ACME}/networkpolicies/pipeops-dns?dryRun=All"
    );
    let level =
        json!({"metadata": {"labels": {"pod-security.kubernetes.io/enforce": "privileged"}}});
    let label = json!({"metadata": {"labels": {"stand": "x"}}});
    let home = format!("/api/v1/namespaces/{ACME}?dryRun=All");
    vec![
        (
            "a controller cleans up",
            controller("namespace-controller"),
            true,
            "DELETE",
            policy,
            Value::Null,
        ),
        (
            "a controller makes a pod",
            controller("replicaset-controller"),
            true,
            "POST",
            pods.clone(),
            pod(json!({})),
        ),
        (
            "a controller makes a pod with the fixed account",
            controller("replicaset-controller"),
            false,
            "POST",
            pods,
            pod(json!({"serviceAccountName": "pipeops-tenant-deployer"})),
        ),
        ("an admin changes Pod Security", Identity::new(), true, "PATCH", home.clone(), level),
        ("somebody labels a tenant's namespace", wide(), true, "PATCH", home, label.clone()),
        (
            "somebody labels kube-system",
            wide(),
            true,
            "PATCH",
            "/api/v1/namespaces/kube-system?dryRun=All".into(),
            label,
        ),
        (
            "somebody makes a namespace",
            wide(),
            true,
            "POST",
            "/api/v1/namespaces?dryRun=All".into(),
            namespace("stand-x", json!({"pod-security.kubernetes.io/enforce": "privileged"})),
        ),
    ]
}

/// Nearly an admin: every resource of the groups in question.
fn wide() -> Identity {
    user("stand-wide")
}

async fn widen(client: &Upstream) {
    let role = json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole",
        "metadata": {"name": "stand:wide"}, "rules": [{"verbs": ["*"], "resources": ["*"],
            "apiGroups": ["", "apps", "networking.k8s.io", "rbac.authorization.k8s.io"]}]});
    let binding = json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding",
        "metadata": {"name": "stand:wide"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole",
            "name": "stand:wide"},
        "subjects": [{"kind": "User", "apiGroup": "rbac.authorization.k8s.io",
            "name": "stand-wide"}]});
    for object in [role, binding] {
        let path = format!("{}?fieldManager=stand", path_of(&object).unwrap());
        let (status, answer) = request(client, &Identity::new(), "PATCH", &path, &object).await;
        assert!(matches!(status, 200 | 201), "{status} {answer}");
    }
    let begun = Instant::now();
    while !may(client, &wide(), "create", ("", "secrets"), (ACME, "")).await {
        assert!(begun.elapsed() < Duration::from_secs(30), "stand-wide has no rights");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// As whom the agent may act.
async fn impersonation(client: &Upstream) -> Vec<String> {
    let mut wrong = Vec::new();
    for (resource, namespace, name, should) in [
        ("serviceaccounts", ACME, "pipeops-tenant-deployer", true),
        ("serviceaccounts", ACME, "pipeops-tenant-viewer", true),
        ("serviceaccounts", ACME, "default", false),
        ("serviceaccounts", "kube-system", "default", false),
        ("serviceaccounts", "pipeops", "pipeops-agent", false),
        ("users", "", "system:admin", false),
        ("groups", "", "system:masters", false),
        ("groups", "", "system:serviceaccounts:kube-system", false),
    ] {
        let at = (namespace, name);
        let is = may(client, &agent(), "impersonate", ("", resource), at).await;
        if is != should {
            wrong.push(format!("the agent acts as {resource} {namespace}/{name}: is {is}"));
        }
    }
    wrong
}

async fn unmake(client: &Upstream) -> Vec<String> {
    let mut wrong = Vec::new();
    for namespace in [ACME, ACME_DB, GLOBEX] {
        let path = format!("/api/v1/namespaces/{namespace}");
        let (status, answer) = request(client, &agent(), "DELETE", &path, &Value::Null).await;
        if !matches!(status, 200 | 202) {
            wrong.push(format!("the agent deletes {path}: {status} {}", answer["message"]));
        }
    }
    for kind in ["clusterrolebindings", "clusterroles"] {
        let path = format!("/apis/rbac.authorization.k8s.io/v1/{kind}/stand:wide");
        request(client, &Identity::new(), "DELETE", &path, &Value::Null).await;
    }
    wrong
}

/// Prints what differs; gives how much that is.
pub(crate) async fn check(client: &Upstream, resources: &BTreeSet<(String, String)>) -> usize {
    let mut wrong = make(client).await;
    if !wrong.is_empty() {
        wrong.iter().for_each(|line| println!("WRONG {line}"));
        return wrong.len() + unmake(client).await.len();
    }
    ready(client).await;
    widen(client).await;
    wrong.extend(table(client, resources).await);
    wrong.extend(impersonation(client).await);
    let mut attempts = of_the_agent();
    attempts.extend(in_a_tenant(&account(ACME, "deployer")));
    attempts.extend(in_a_tenant(&wide()));
    attempts.extend(of_the_cluster());
    for (title, who, passes, method, path, body) in attempts {
        let (status, answer) = request(client, &who, method, &path, &body).await;
        let named = who.first().map_or("admin", |(_, name)| name.as_str());
        let holds = if passes { status < 300 } else { matches!(status, 403 | 422) };
        match (holds, passes) {
            (true, true) => println!("passes for {named}: {title}"),
            (true, false) => println!("refused to {named}: {title}"),
            (false, _) => {
                wrong.push(format!("{named}: {title}: {status} {}", answer["message"]));
            }
        }
    }
    wrong.extend(unmake(client).await);
    wrong.iter().take(40).for_each(|line| println!("WRONG {line}"));
    println!("tenants: {} wrong", wrong.len());
    wrong.len()
}
