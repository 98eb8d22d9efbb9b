//! Who may do what, written by hand from the promise to users, and asked of a real API server for
//! everything that it serves.

use std::collections::BTreeSet;
use std::path::Path;

use futures_util::StreamExt as _;
use http::Request;
use http_body_util::BodyExt as _;
use pipeops::base::connection::Body;
use pipeops::host::Host;
use pipeops::kubernetes::upstream::Upstream;
use serde_json::{Value, json};

pub(crate) const VERBS: &[&str] = &[
    "get",
    "list",
    "watch",
    "create",
    "update",
    "patch",
    "delete",
    "deletecollection",
    "bind",
    "escalate",
    "impersonate",
    "approve",
    "use",
    "proxy",
];
pub(crate) const READ: &[&str] = &["get", "list", "watch"];
pub(crate) const WRITE: &[&str] =
    &["get", "list", "watch", "create", "update", "patch", "delete", "deletecollection"];
const ROLES: &[&str] = &["viewer", "deployer", "operator"];
/// Empty: the whole cluster.
const NAMESPACES: &[&str] =
    &["", "production", "beta", "monitoring", "pipeops", "kube-system", "default"];

/// What everybody who is authenticated may do in any cluster: ask about themselves
/// (`system:basic-user`).
pub(crate) fn own(group: &str, resource: &str, verb: &str) -> bool {
    verb == "create"
        && matches!(
            (group, resource),
            ("authorization.k8s.io", "selfsubjectaccessreviews" | "selfsubjectrulesreviews")
                | ("authentication.k8s.io", "selfsubjectreviews")
        )
}

/// Read by all three roles, everywhere. Not in this list: secrets, and every subresource that is
/// not named.
const READABLE: &[(&str, &[&str])] = &[
    (
        "",
        &[
            "componentstatuses",
            "configmaps",
            "endpoints",
            "events",
            "limitranges",
            "namespaces",
            "nodes",
            "persistentvolumeclaims",
            "persistentvolumes",
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
    ("networking.k8s.io", &["ingresses", "ingressclasses", "networkpolicies"]),
    ("gateway.networking.k8s.io", &["gatewayclasses", "gateways", "httproutes"]),
    ("discovery.k8s.io", &["endpointslices"]),
    ("events.k8s.io", &["events"]),
    (
        "storage.k8s.io",
        &["storageclasses", "csidrivers", "csinodes", "volumeattachments", "csistoragecapacities"],
    ),
    ("scheduling.k8s.io", &["priorityclasses"]),
    ("node.k8s.io", &["runtimeclasses"]),
    ("coordination.k8s.io", &["leases"]),
    (
        "rbac.authorization.k8s.io",
        &["clusterroles", "clusterrolebindings", "roles", "rolebindings"],
    ),
    ("apiextensions.k8s.io", &["customresourcedefinitions"]),
    ("apiregistration.k8s.io", &["apiservices"]),
    (
        "admissionregistration.k8s.io",
        &["mutatingwebhookconfigurations", "validatingwebhookconfigurations"],
    ),
];

/// Written by a deployer in its namespaces.
const DEPLOYABLE: &[(&str, &[&str])] = &[
    (
        "",
        &[
            "pods",
            "services",
            "configmaps",
            "persistentvolumeclaims",
            "serviceaccounts",
            "replicationcontrollers",
        ],
    ),
    ("apps", &["deployments", "statefulsets", "daemonsets", "replicasets"]),
    ("batch", &["jobs", "cronjobs"]),
    ("autoscaling", &["horizontalpodautoscalers"]),
    ("policy", &["poddisruptionbudgets"]),
    ("networking.k8s.io", &["ingresses"]),
    ("gateway.networking.k8s.io", &["httproutes"]),
    ("cert-manager.io", &["certificates"]),
];

pub(crate) fn listed(table: &[(&str, &[&str])], group: &str, resource: &str) -> bool {
    table.iter().any(|(g, list)| *g == group && list.contains(&resource))
}

fn expected(role: &str, verb: &str, group: &str, resource: &str, namespace: &str) -> bool {
    if own(group, resource, verb) || (READ.contains(&verb) && listed(READABLE, group, resource)) {
        return true;
    }
    // the metrics API has no watch
    if matches!((verb, group, resource), ("get" | "list", "metrics.k8s.io", "nodes" | "pods")) {
        return true;
    }
    // a node is drained of the pods of every namespace
    if role == "operator" && (verb, group, resource) == ("create", "", "pods/eviction") {
        return true;
    }
    let mine = match role {
        "deployer" => matches!(namespace, "production" | "beta"),
        "operator" => matches!(namespace, "production" | "beta" | "monitoring"),
        _ => false,
    };
    if role == "operator" && mine && (group, resource) == ("networking.k8s.io", "networkpolicies") {
        return WRITE.contains(&verb);
    }
    mine && match (group, resource) {
        ("", "secrets") => matches!(verb, "create" | "update" | "patch" | "delete"),
        ("", "pods/exec" | "pods/attach" | "pods/portforward") => matches!(verb, "create" | "get"),
        ("apps", "deployments/scale" | "statefulsets/scale" | "replicasets/scale") => {
            matches!(verb, "get" | "update" | "patch")
        }
        _ => WRITE.contains(&verb) && listed(DEPLOYABLE, group, resource),
    }
}

/// Each must be refused to everybody but admin: method, path, body.
fn escalations() -> Vec<(&'static str, &'static str, String, Value)> {
    let pod = |spec: Value| json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": spec});
    let container = json!([{"name": "x", "image": "x", "securityContext": {"privileged": true}}]);
    let rbac = "/apis/rbac.authorization.k8s.io/v1";
    vec![
        (
            "a pod with our ServiceAccount",
            "POST",
            "/api/v1/namespaces/pipeops/pods".into(),
            pod(
                json!({"serviceAccountName": "pipeops-agent", "containers": [{"name": "x", "image": "x"}]}),
            ),
        ),
        (
            "a HelmChart",
            "POST",
            "/apis/helm.cattle.io/v1/namespaces/kube-system/helmcharts".into(),
            json!({"apiVersion": "helm.cattle.io/v1", "kind": "HelmChart", "metadata": {"name": "x"}, "spec": {"chart": "x"}}),
        ),
        (
            "a token of our ServiceAccount",
            "POST",
            "/api/v1/namespaces/pipeops/serviceaccounts/pipeops-agent/token".into(),
            json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}}),
        ),
        (
            "a token in an own namespace",
            "POST",
            "/api/v1/namespaces/beta/serviceaccounts/default/token".into(),
            json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}}),
        ),
        (
            "removing a Pod Security label",
            "PATCH",
            "/api/v1/namespaces/production".into(),
            json!({"metadata": {"labels": {"pod-security.kubernetes.io/enforce": null}}}),
        ),
        (
            "binding cluster-admin",
            "POST",
            format!("{rbac}/clusterrolebindings"),
            json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding", "metadata": {"name": "x"},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "cluster-admin"}, "subjects": [{"kind": "User", "apiGroup": "rbac.authorization.k8s.io", "name": "pipeops:runner"}]}),
        ),
        (
            "binding in an own namespace",
            "POST",
            format!("{rbac}/namespaces/beta/rolebindings"),
            json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "RoleBinding", "metadata": {"name": "x"},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "cluster-admin"}, "subjects": []}),
        ),
        (
            "escalating a role",
            "PATCH",
            format!("{rbac}/clusterroles/pipeops:deployer"),
            json!({"rules": [{"apiGroups": ["*"], "resources": ["*"], "verbs": ["*"]}]}),
        ),
        (
            "the kubelet through nodes/proxy",
            "GET",
            "/api/v1/nodes/x/proxy/pods".into(),
            Value::Null,
        ),
        ("listing secrets", "GET", "/api/v1/namespaces/beta/secrets".into(), Value::Null),
        (
            "a webhook",
            "POST",
            "/apis/admissionregistration.k8s.io/v1/validatingwebhookconfigurations".into(),
            json!({"apiVersion": "admissionregistration.k8s.io/v1", "kind": "ValidatingWebhookConfiguration", "metadata": {"name": "x"}}),
        ),
        (
            "a namespace",
            "POST",
            "/api/v1/namespaces".into(),
            json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "x"}}),
        ),
        (
            "a namespace of a tenant",
            "POST",
            "/api/v1/namespaces".into(),
            json!({"apiVersion": "v1", "kind": "Namespace",
                "metadata": {"name": "x", "labels": {"pipeops.io/tenant": "x"}}}),
        ),
        (
            "an admission policy that goes",
            "DELETE",
            "/apis/admissionregistration.k8s.io/v1/validatingadmissionpolicies/pipeops-tenant-pods"
                .into(),
            Value::Null,
        ),
        ("removing a node", "DELETE", "/api/v1/nodes/x".into(), Value::Null),
        (
            "a taint that empties a node",
            "PATCH",
            "/api/v1/nodes/x".into(),
            json!({"spec": {"taints": [{"key": "x", "effect": "NoExecute"}]}}),
        ),
        (
            "a privileged pod elsewhere",
            "POST",
            "/api/v1/namespaces/kube-system/pods".into(),
            pod(json!({"containers": container})),
        ),
    ]
}

fn client(kubeconfig: &str) -> Upstream {
    let _ = rustls::crypto::ring::default_provider().install_default();
    Upstream::open(&Host::new(Path::new("/"), None), kubeconfig).unwrap()
}

/// Who asks, as headers; nothing for the admin himself.
pub(crate) type Identity = Vec<(&'static str, String)>;

/// One request as somebody: its status, and the answer.
pub(crate) async fn request(
    client: &Upstream,
    who: &Identity,
    method: &str,
    path: &str,
    body: &Value,
) -> (u16, Value) {
    let kind = match method {
        "PATCH" if path.contains("fieldManager=") => "application/apply-patch+yaml",
        "PATCH" => "application/merge-patch+json",
        _ => "application/json",
    };
    let mut request = Request::builder().method(method).uri(path).header("Content-Type", kind);
    for (name, value) in who {
        request = request.header(*name, value);
    }
    let body = if body.is_null() { String::new() } else { body.to_string() };
    let answer = client
        .send(request.body(Body::from(body)).unwrap(), false)
        .await
        .unwrap_or_else(|e| panic!("{method} {path}: {e}"));
    let status = answer.status().as_u16();
    let bytes = answer.into_body().collect().await.unwrap().to_bytes();
    (status, serde_json::from_slice(&bytes).unwrap_or_default())
}

async fn ask(
    client: &Upstream,
    role: &str,
    method: &str,
    path: &str,
    body: &Value,
) -> Result<Value, u16> {
    let mut who = Identity::new();
    if !role.is_empty() {
        who.push(("Impersonate-User", "pipeops:runner".into()));
        who.push(("Impersonate-Group", format!("pipeops:{role}")));
    }
    let (status, answer) = request(client, &who, method, path, body).await;
    if (200..300).contains(&status) { Ok(answer) } else { Err(status) }
}

/// Whether somebody may do this, as the API server says it.
pub(crate) async fn may(
    client: &Upstream,
    who: &Identity,
    verb: &str,
    (group, resource): (&str, &str),
    (namespace, name): (&str, &str),
) -> bool {
    let (resource, sub) = resource.split_once('/').unwrap_or((resource, ""));
    let attributes = json!({"verb": verb, "group": group, "resource": resource,
        "subresource": sub, "namespace": namespace, "name": name});
    let review = json!({"apiVersion": "authorization.k8s.io/v1",
        "kind": "SelfSubjectAccessReview", "spec": {"resourceAttributes": attributes}});
    let path = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews";
    let (status, answer) = request(client, who, "POST", path, &review).await;
    assert!(matches!(status, 200 | 201), "{status} {answer}");
    answer["status"]["allowed"] == true
}

async fn resources(client: &Upstream) -> BTreeSet<(String, String)> {
    let mut versions = vec![(String::new(), "/api/v1".to_owned())];
    let groups = ask(client, "", "GET", "/apis", &Value::Null).await.unwrap();
    for group in groups["groups"].as_array().unwrap() {
        for version in group["versions"].as_array().unwrap() {
            versions.push((
                group["name"].as_str().unwrap().to_owned(),
                format!("/apis/{}", version["groupVersion"].as_str().unwrap()),
            ));
        }
    }
    let mut found = BTreeSet::new();
    for (group, path) in versions {
        let Ok(list) = ask(client, "", "GET", &path, &Value::Null).await else { continue };
        for resource in list["resources"].as_array().unwrap() {
            found.insert((group.clone(), resource["name"].as_str().unwrap().to_owned()));
        }
    }
    found
}

/// Prints what differs; gives the exit code.
pub(crate) async fn check(kubeconfig: &str) -> i32 {
    // an admin's kubeconfig, for it impersonates all three roles
    let client = client(kubeconfig);
    let resources = resources(&client).await;
    let mut questions = Vec::new();
    for role in ROLES {
        for (group, resource) in &resources {
            for verb in VERBS {
                for namespace in NAMESPACES {
                    questions.push((*role, *verb, group.as_str(), resource.as_str(), *namespace));
                }
            }
        }
    }
    let total = questions.len();
    let wrong: Vec<String> = futures_util::stream::iter(questions)
        .map(|(role, verb, group, resource, namespace)| {
            let client = client.clone();
            async move {
                let (name, sub) = resource.split_once('/').unwrap_or((resource, ""));
                let attributes = json!({"verb": verb, "group": group, "resource": name, "subresource": sub, "namespace": namespace});
                let review =
                    json!({"apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview", "spec": {"resourceAttributes": attributes}});
                let answer = ask(&client, role, "POST", "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", &review).await.unwrap();
                let (is, should) = (answer["status"]["allowed"] == true, expected(role, verb, group, resource, namespace));
                (is != should).then(|| format!("{role} {verb} {group}/{resource} in `{namespace}`: is {is}, should be {should}"))
            }
        })
        .buffer_unordered(16)
        .filter_map(std::future::ready)
        .collect()
        .await;
    wrong.iter().take(40).for_each(|line| println!("WRONG {line}"));
    println!("{total} verdicts over {} resources, {} wrong", resources.len(), wrong.len());
    let mut failed = wrong.len();
    for role in ROLES {
        for (title, method, path, body) in escalations() {
            match ask(&client, role, method, &path, &body).await {
                // a kind that this server does not have is refused by authorization all the same,
                // or not there
                Err(403) => println!("refused to {role}: {title}"),
                Err(404) if path.contains("helm.cattle.io") => {
                    println!("NOT RUN {role}: {title}: this server has no such kind")
                }
                other => {
                    failed += 1;
                    println!("WRONG {role}: {title}: {other:?}");
                }
            }
        }
    }
    failed += crate::tenants::check(&client, &resources).await;
    i32::from(failed > 0)
}
