//! Tenants at the agent's front door: as whom their callers act, what they see, and what the
//! operation makes.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::operations::{apply, deployment, written};
use crate::world::{Fault, TOKEN, World};

/// A namespace with the label of a tenant.
fn namespace(name: &str, tenant: &str, hosts: &str) -> Value {
    json!({"metadata": {"name": name, "uid": name, "labels": {"pipeops.io/tenant": tenant},
        "annotations": {"pipeops.io/hosts": hosts}}})
}

impl World {
    fn token_of_tenant(&self, role: &str, tenant: &str) -> String {
        self.control_plane.token_of_tenant(&self.id, role, tenant)
    }

    fn plant(&self, path: &'static str, part: &'static str, answer: Value) {
        self.kube.planted.lock().unwrap().push((path, part, answer));
    }

    /// The agent's own rights are those of this version.
    fn with_rights(&self) {
        let allowed = json!({"status": {"allowed": true}});
        self.plant("/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", "", allowed);
    }

    /// What is answered instead from now on.
    fn replant(&self, path: &'static str, answer: Value) {
        self.kube.planted.lock().unwrap().insert(0, (path, "", answer));
    }

    /// How an operation of an operator of the whole cluster ends.
    async fn tenant(&self, key: &str, spec: &Value) -> Value {
        let token = self.token("operator");
        let body = json!({"kind": "tenant", "spec": spec});
        let (status, taken) = self.operate(&token, key, &body).await;
        assert_eq!(status, 202, "{taken}");
        self.ended(&token, taken["id"].as_str().unwrap()).await
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_of_a_tenant_acts_as_an_account_of_a_namespace_with_its_label() {
    let world = World::new().await.up().await;
    world.plant("/api/v1/namespaces/beta", "", namespace("beta", "acme", ""));
    world.plant("/api/v1/namespaces/other", "", namespace("other", "globex", ""));
    let (viewer, operator) =
        (world.token_of_tenant("viewer", "acme"), world.token_of_tenant("operator", "acme"));
    for (token, account) in [(&viewer, "viewer"), (&operator, "deployer")] {
        let path = "/k8s/api/v1/namespaces/beta/pods";
        assert_eq!(world.call("GET", path, token, "", "").await.0, 200);
        let seen = world.kube.through().pop().unwrap();
        let expected = format!("system:serviceaccount:beta:pipeops-tenant-{account}");
        assert_eq!(seen.all("impersonate-user"), [&*expected]);
        assert!(seen.all("impersonate-group").is_empty());
        assert_eq!(seen.all("impersonate-extra-pipeops.io%2fsubject"), ["runner-1"]);
    }
    assert_eq!(world.call("GET", "/k8s/version", &viewer, "", "").await.0, 200);
    let seen = world.kube.through().pop().unwrap();
    assert_eq!(seen.all("impersonate-user"), ["pipeops:runner"]);
    assert!(seen.all("impersonate-group").is_empty());
    // another tenant's namespace, one of nobody, one that is not there, and the cluster
    let before = world.kube.through().len();
    for path in [
        "/k8s/api/v1/namespaces/other/pods",
        "/k8s/api/v1/namespaces/production/pods",
        "/k8s/api/v1/namespaces/absent",
        "/k8s/api/v1/namespaces?watch=true",
        "/k8s/api/v1/namespaces/",
        "/k8s/api/v1/nodes",
        "/k8s/api/v1/pods",
        "/k8s/apis/rbac.authorization.k8s.io/v1/clusterroles",
        "/k8s/apis/authorization.k8s.io/v1/selfsubjectaccessreviews",
    ] {
        let (status, said) = world.call("GET", path, &operator, "", "").await;
        assert_eq!(
            (status, &said["details"]["causes"][0]["reason"]),
            (403, &json!("namespace_scope")),
            "{path}"
        );
        assert!(!said.to_string().contains("globex"), "{said}");
    }
    for path in ["/api/v1/status", "/api/v1/audit", "/metrics"] {
        let (status, _) = world.call("GET", path, &operator, "", "").await;
        assert_eq!(status, 403, "{path}");
    }
    assert_eq!(world.kube.through().len(), before);
    let log = world.state().join("audit/audit.jsonl");
    let log = std::fs::read_to_string(log).unwrap();
    let of_acme = log.lines().filter(|line| line.contains(r#""tenant":"acme""#)).count();
    assert!(of_acme >= 10, "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operation_of_a_tenant_is_held_to_it_and_seen_by_it_alone() {
    let world = World::new().await.up().await;
    world.plant("/api/v1/namespaces/beta", "", namespace("beta", "acme", "shop.acme.test"));
    world.kube.ready.store(true, std::sync::atomic::Ordering::Relaxed);
    let acme = world.token_of_tenant("deployer", "acme");
    let globex = world.token_of_tenant("operator", "globex");
    let everybody = world.token("deployer");
    let body = apply(&[deployment("web")]);
    let (status, taken) = world.operate(&acme, "k", &body).await;
    assert_eq!(status, 202, "{taken}");
    let id = taken["id"].as_str().unwrap();
    let end = world.ended(&acme, id).await;
    assert_eq!(end["state"], "succeeded", "{end}");
    let patch = world.kube.through().into_iter().rfind(|s| s.method == "PATCH").unwrap();
    let account = "system:serviceaccount:beta:pipeops-tenant-deployer";
    assert_eq!(patch.all("impersonate-user"), [account]);
    // the same key of another tenant is another operation, which may not
    let (status, other) = world.operate(&globex, "k", &body).await;
    assert_eq!(status, 202, "{other}");
    assert_ne!(other["id"], id);
    let refused = world.ended(&globex, other["id"].as_str().unwrap()).await;
    assert_eq!(
        (&refused["state"], &refused["reason"]),
        (&json!("failed"), &json!("namespace_scope")),
        "{refused}"
    );
    // each sees its own; who asked without a tenant sees what he has asked for
    let listed = async |token: &str| {
        let (_, list) = world.call("GET", "/api/v1/operations", token, "", "").await;
        list["items"].as_array().unwrap().len()
    };
    assert_eq!((listed(&acme).await, listed(&globex).await, listed(&everybody).await), (1, 1, 2));
    for rest in ["", "/events"] {
        let path = format!("/api/v1/operations/{id}{rest}");
        assert_eq!(world.call("GET", &path, &globex, "", "").await.0, 404, "{path}");
    }
    assert_eq!(
        world.call("DELETE", &format!("/api/v1/operations/{id}"), &globex, "", "").await.0,
        404
    );
    // a host that is not the tenant's
    let application = |host: &str| {
        json!({"kind": "deploy", "spec": {"application": {"name": "shop", "namespace": "beta",
            "image": "r.example/shop:1", "ports": [{"container_port": 80}],
            "host": {"name": host, "tls": false}}}})
    };
    let (_, taken) = world.operate(&acme, "h", &application("www.globex.test")).await;
    let end = world.ended(&acme, taken["id"].as_str().unwrap()).await;
    assert_eq!(end["reason"], "host_not_allowed", "{end}");
    assert!(end["message"].as_str().unwrap().contains("shop.acme.test"), "{end}");
    for kind in [
        json!({"kind": "cordon", "spec": {"node": "vm1"}}),
        json!({"kind": "tenant", "spec": {"action": "delete", "tenant": "acme", "confirm": "acme"}}),
    ] {
        let own = world.token_of_tenant("operator", "acme");
        assert_eq!(world.operate(&own, "x", &kind).await.0, 403, "{kind}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_is_made_with_the_agents_rights_and_its_bounds_come_first() {
    let world = World::new().await.up().await;
    let set = json!({"action": "set", "tenant": "acme", "namespaces": ["acme"],
        "hosts": ["shop.acme.test"], "quota": {"pods": 5}});
    // of a version before
    let end = world.tenant("t-0", &set).await;
    assert_eq!(
        (&end["state"], &end["reason"]),
        (&json!("failed"), &json!("rights_missing")),
        "{end}"
    );
    assert!(end["message"].as_str().unwrap().contains("pipeops install-server"), "{end}");
    world.with_rights();
    let end = world.tenant("t-1", &set).await;
    // the fake has an answer for every namespace: it is there and of nobody
    assert_eq!(end["reason"], "namespace_taken", "{end}");
    let list = json!({"items": [namespace("acme", "acme", "old.acme.test"),
        namespace("globex", "globex", "www.globex.test,*.globex.net")]});
    world.plant("/api/v1/namespaces", "labelSelector", list);
    let end = world.tenant("t-2", &set).await;
    assert_eq!(end["state"], "succeeded", "{end}");
    let objects: Vec<&str> =
        end["objects"].as_array().unwrap().iter().map(|o| o["object"].as_str().unwrap()).collect();
    assert_eq!((objects[0], objects[1]), ("Namespace acme", "ResourceQuota acme/pipeops-tenant"));
    assert_eq!(objects.last(), Some(&"RoleBinding acme/pipeops-tenant-deployer"));
    assert_eq!(objects.len(), 13);
    // with the agent's own rights alone
    assert!(written(&world.kube).is_empty());
    {
        let kept = world.kube.objects.lock().unwrap();
        let made = &kept["/api/v1/namespaces/acme"]["metadata"];
        assert_eq!(made["labels"]["pod-security.kubernetes.io/enforce"], "baseline");
        assert_eq!(made["annotations"]["pipeops.io/hosts"], "shop.acme.test");
    }
    for (key, field, value, reason) in [
        ("t-3", "hosts", json!(["a.globex.net"]), "host_taken"),
        ("t-4", "namespaces", json!(["globex"]), "namespace_taken"),
        ("t-5", "namespaces", json!(["acme-2"]), "namespaces_left"),
    ] {
        let mut other = set.clone();
        other[field] = value;
        let end = world.tenant(key, &other).await;
        assert_eq!(end["reason"], reason, "{end}");
    }
    // by somebody who needs no tenant for it; the tenant's own are its own
    let mut wider = set.clone();
    wider["hosts"] = json!(["shop.acme.test", "*.prod.test"]);
    let route = |namespace: &str, host: &str| {
        json!({"metadata": {"name": "web", "namespace": namespace},
            "spec": {"rules": [{"host": host}]}})
    };
    let list = json!({"items": [route("acme", "a.prod.test"), route("production", "b.prod.test")]});
    world.plant("/apis/networking.k8s.io/v1/ingresses", "", list);
    let end = world.tenant("t-taken", &wider).await;
    assert_eq!(end["reason"], "host_taken", "{end}");
    assert!(end["message"].as_str().unwrap().contains("production/web"), "{end}");
    // policies that are there and refuse nothing
    world.replant("/api/v1/namespaces", json!({"kind": "Namespace"}));
    let end = world.tenant("t-open", &set).await;
    assert_eq!(end["reason"], "rights_missing", "{end}");
    world.kube.planted.lock().unwrap().remove(0);
    let used = json!({"items": [{"metadata": {"name": "web"},
        "spec": {"rules": [{"host": "old.acme.test"}]}}]});
    world.plant("/apis/networking.k8s.io/v1/namespaces/acme/ingresses", "", used);
    let end = world.tenant("t-6", &set).await;
    assert_eq!(end["reason"], "in_use", "{end}");
    assert!(end["message"].as_str().unwrap().contains("old.acme.test"), "{end}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_goes_with_its_own_namespaces_and_an_old_cluster_has_none() {
    let world = World::new().await.up().await;
    world.with_rights();
    let list = json!({"items": [namespace("acme", "acme", "")]});
    world.plant("/api/v1/namespaces", "tenant%3Dacme", list);
    world.kube.put("/api/v1/namespaces/acme", namespace("acme", "acme", ""));
    let delete = |tenant: &str| json!({"action": "delete", "tenant": tenant, "confirm": tenant});
    let end = world.tenant("d-1", &delete("acme")).await;
    let gone = json!([{"object": "Namespace acme", "outcome": "absent"}]);
    assert_eq!((&end["state"], &end["objects"]), (&json!("succeeded"), &gone), "{end}");
    let end = world.tenant("d-2", &delete("nobody")).await;
    let absent = json!([{"object": "Tenant nobody", "outcome": "absent"}]);
    assert_eq!((&end["state"], &end["objects"]), (&json!("succeeded"), &absent), "{end}");
    world.plant("/version", "", json!({"gitVersion": "v1.29.9+k3s1"}));
    let end = world.tenant("d-3", &delete("acme")).await;
    assert_eq!(end["reason"], "tenants_need_1_30", "{end}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_of_a_tenant_lists_the_namespaces_of_its_tenant_and_no_others() {
    let world = World::new().await.up().await;
    // more than was asked for: what is not the tenant's is not passed on
    let list = json!({"kind": "NamespaceList", "apiVersion": "v1", "metadata": {},
        "items": [namespace("acme", "acme", ""), namespace("acme-2", "acme", ""),
            namespace("globex", "globex", "")]});
    world.plant("/api/v1/namespaces", "labelSelector=pipeops.io%2Ftenant%3Dacme", list);
    let viewer = world.token_of_tenant("viewer", "acme");
    let names = |list: &Value| {
        let items = list["items"].as_array().unwrap().clone();
        items.iter().map(|n| n["metadata"]["name"].clone()).collect::<Vec<_>>()
    };
    let asked = "/k8s/api/v1/namespaces?labelSelector=team%3Dweb&limit=500&fieldSelector=x";
    for path in ["/k8s/api/v1/namespaces", asked] {
        let (status, list) = world.call("GET", path, &viewer, "", "").await;
        assert_eq!((status, &list["kind"]), (200, &json!("NamespaceList")), "{list}");
        assert_eq!(names(&list), ["acme", "acme-2"]);
    }
    let seen = world.kube.seen.lock().unwrap().clone();
    let seen = seen.iter().rfind(|s| s.uri.contains("tenant%3Dacme%2C")).unwrap();
    let uri = "/api/v1/namespaces?labelSelector=pipeops.io%2Ftenant%3Dacme%2Cteam%3Dweb";
    assert_eq!(seen.uri, uri);
    assert!(seen.all("impersonate-user").is_empty());
    // who claims an identity is refused here too, and whoever wants something else as before
    for (method, headers, expected) in [
        ("GET", "Impersonate-User: root\r\n", 400),
        ("GET", "Connection: Upgrade\r\nUpgrade: websocket\r\n", 403),
        ("HEAD", "", 403),
        ("POST", "", 403),
        ("DELETE", "", 403),
    ] {
        let (status, _) = world.call(method, "/k8s/api/v1/namespaces", &viewer, headers, "").await;
        assert_eq!(status, expected, "{method} {headers}");
    }
    let globex = world.token_of_tenant("viewer", "globex");
    let (status, list) = world.call("GET", "/k8s/api/v1/namespaces", &globex, "", "").await;
    assert_eq!((status, list["items"].as_array().map(Vec::len)), (200, Some(0)), "{list}");
    let log = std::fs::read_to_string(world.state().join("audit/audit.jsonl")).unwrap();
    let is_list = |line: &&str| {
        line.contains(r#""path":"/api/v1/namespaces""#) && line.contains(r#""status":200"#)
    };
    assert_eq!(log.lines().filter(is_list).count(), 3, "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_ends_once_its_namespace_is_another_tenants() {
    let world = World::new().await.up().await;
    world.plant("/api/v1/namespaces/beta", "", namespace("beta", "acme", ""));
    let token = world.token_of_tenant("viewer", "acme");
    let mut watch = world.dial(b"http/1.1").await;
    let head = format!(
        "GET /k8s/api/v1/namespaces/beta/pods?watch=true HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {token}\r\n\r\n"
    );
    watch.write_all(head.as_bytes()).await.unwrap();
    watch.flush().await.unwrap();
    let mut first = [0; 12];
    watch.read_exact(&mut first).await.unwrap();
    assert_eq!(&first, b"HTTP/1.1 200");
    world.replant("/api/v1/namespaces/beta", namespace("beta", "globex", ""));
    let mut rest = Vec::new();
    let end = tokio::time::timeout(Duration::from_secs(40), watch.read_to_end(&mut rest)).await;
    // with or without the close_notify of TLS
    assert!(end.is_ok(), "it is still open");
    let log = std::fs::read_to_string(world.state().join("audit/audit.jsonl")).unwrap();
    assert!(log.contains(r#""verdict":"namespace_scope","status":200"#), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_takes_a_part_of_the_agent_and_is_told_nothing_of_the_cluster() {
    let world = World::new().await.up().await;
    world.plant("/api/v1/namespaces/beta", "", namespace("beta", "acme", ""));
    let (acme, everybody) = (world.token_of_tenant("deployer", "acme"), world.token("deployer"));
    for n in 0..3 {
        let body = apply(&[deployment(&format!("web-{n}"))]);
        let (status, taken) = world.operate(&acme, &format!("k-{n}"), &body).await;
        assert_eq!((status, &taken["tenant"]), (202, &json!("acme")), "{taken}");
    }
    let one_more = apply(&[deployment("web-9")]);
    let (status, answer) = world.operate(&acme, "k-9", &one_more).await;
    assert_eq!((status, &answer["code"]), (429, &json!("too_many_operations")), "{answer}");
    let (status, taken) = world.operate(&everybody, "k-9", &one_more).await;
    assert_eq!((status, &taken["tenant"]), (202, &Value::Null), "{taken}");
    let credential = world.agent.sandbox.root().join("run/pipeops-credential/kubeconfig");
    std::fs::remove_file(credential).unwrap();
    let begun = Instant::now();
    let path = "/k8s/api/v1/namespaces/beta/pods";
    loop {
        let (status, said) = world.call("GET", path, &everybody, "", "").await;
        if status == 503 {
            assert!(said.to_string().contains("is not there yet"), "{said}");
            break;
        }
        assert!(begun.elapsed() < Duration::from_secs(30), "{status} {said}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    for (path, code) in [(path, "kubernetes_waiting"), ("/readyz", "not_ready")] {
        let (status, said) = world.call("GET", path, &acme, "", "").await;
        let said = said.to_string();
        assert!(status == 503 && said.contains(code), "{path}: {status} {said}");
        assert!(!said.contains("kubeconfig") && !said.contains("is not there"), "{path}: {said}");
        let (_, why) = world.call("GET", path, &everybody, "", "").await;
        assert!(why.to_string().contains("is not there yet"), "{path}: {why}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_known_of_tenants_is_said_again_where_it_changed_while_the_agent_was_away() {
    let mut world = World::new().await.up().await;
    let said = |world: &World| {
        let calls = world.control_plane.calls("/register");
        let list = |body: &Value| body["capabilities"].to_string().contains("tenants");
        calls.iter().map(|(_, _, body)| list(body)).collect::<Vec<_>>()
    };
    assert_eq!(said(&world), [false]);
    world.with_rights();
    let policy = "/apis/admissionregistration.k8s.io/v1/validatingadmissionpolicybindings/\
                  pipeops-tenant-routes";
    let mut expected = vec![false];
    for (change, can) in [("rights", true), ("no policy", false), ("the policy again", true)] {
        match change {
            "no policy" => world.replant(policy, Value::Null),
            "the policy again" => world.replant(policy, json!({})),
            _ => {}
        }
        world.agent.restart(&[("AGENT_TOKEN", TOKEN)]);
        expected.push(can);
        // an agent that is killed before it has written down what it said says it again
        let written = format!("\"tenants\":{can}");
        let told = || {
            let stored = std::fs::read_to_string(world.state().join("credential.json"));
            said(&world).len() >= expected.len() && stored.unwrap().contains(&written)
        };
        world.control_plane.until(change, |_| told()).await;
        assert_eq!(said(&world), expected, "{change}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_tenant_waits_for_is_superseded_and_keeps_no_other_tenant() {
    let world = World::new().await.up().await;
    world.with_rights();
    let mut going = namespace("acme", "acme", "");
    going["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z".into();
    going["status"] = json!({"conditions": [{"status": "True", "message": "a finalizer remains"}]});
    world.kube.put("/api/v1/namespaces/acme", going.clone());
    world.plant("/api/v1/namespaces", "labelSelector", json!({"items": [going]}));
    let token = world.token("operator");
    let set = |name: &str, timeout_s: u64| {
        let spec = json!({"action": "set", "tenant": name, "namespaces": [name],
            "timeout_s": timeout_s});
        json!({"kind": "tenant", "spec": spec})
    };
    let (_, waits) = world.operate(&token, "w-1", &set("acme", 300)).await;
    let waits = waits["id"].as_str().unwrap();
    // another one comes to its own end meanwhile: the fake has a namespace of that name
    let (_, other) = world.operate(&token, "w-2", &set("globex", 300)).await;
    let end = world.ended(&token, other["id"].as_str().unwrap()).await;
    assert_eq!(end["reason"], "namespace_taken", "{end}");
    let (_, later) = world.operate(&token, "w-3", &set("acme", 2)).await;
    let end = world.ended(&token, waits).await;
    assert_eq!(
        (&end["state"], &end["reason"]),
        (&json!("cancelled"), &json!("superseded")),
        "{end}"
    );
    let end = world.ended(&token, later["id"].as_str().unwrap()).await;
    assert_eq!(end["reason"], "timed_out", "{end}");
    assert!(end["message"].as_str().unwrap().contains("a finalizer remains"), "{end}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deletion_that_is_resumed_leaves_what_was_made_since() {
    let mut world = World::new().await.up().await;
    world.with_rights();
    let made = |at: &str| {
        let mut made = namespace("acme", "acme", "");
        made["metadata"]["creationTimestamp"] = at.into();
        made
    };
    let list = |at: &str| ("/api/v1/namespaces", "tenant%3Dacme", json!({"items": [made(at)]}));
    world.kube.put("/api/v1/namespaces/acme", made("2026-01-01T00:00:00Z"));
    world.kube.planted.lock().unwrap().push(list("2026-01-01T00:00:00Z"));
    // it takes its time to go
    let slow = Fault { method: "DELETE", part: "/namespaces/acme", status: 202, done: false };
    world.kube.faults.lock().unwrap().push(slow);
    let spec = json!({"action": "delete", "tenant": "acme", "confirm": "acme"});
    let body = json!({"kind": "tenant", "spec": spec});
    let (_, taken) = world.operate(&world.token("operator"), "d-1", &body).await;
    let id = taken["id"].as_str().unwrap();
    let deletions = |world: &World| {
        let seen = world.kube.seen.lock().unwrap();
        seen.iter().filter(|s| s.method == "DELETE").count()
    };
    world.control_plane.until("the deletion", |_| deletions(&world) == 1).await;
    world.kube.planted.lock().unwrap().insert(0, list("2099-01-01T00:00:00Z"));
    world.agent.restart(&[("AGENT_TOKEN", TOKEN)]);
    let told = world.told(id).await;
    assert_eq!(told["state"], "succeeded", "{told}");
    assert_eq!(deletions(&world), 1);
}
