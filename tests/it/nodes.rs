//! Nodes: drained as kubectl does it, and taken out of the cluster.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::operations::written;
use crate::world::World;

/// A pod on the node, of a controller of this kind.
fn pod(namespace: &str, name: &str, kind: &str) -> Value {
    let mut pod = json!({"metadata": {"name": name, "namespace": namespace, "uid": name},
        "spec": {"volumes": [{"name": "v", "emptyDir": {}}]}, "status": {"phase": "Running"}});
    if !kind.is_empty() {
        pod["metadata"]["ownerReferences"] =
            json!([{"apiVersion": "apps/v1", "kind": kind, "name": "x", "controller": true}]);
    }
    pod
}

fn mirror() -> Value {
    let mut pod = pod("kube-system", "mirror", "");
    pod["metadata"]["annotations"] = json!({"kubernetes.io/config.mirror": "abc"});
    pod
}

fn finished() -> Value {
    let mut pod = pod("beta", "finished", "");
    pod["status"]["phase"] = "Succeeded".into();
    pod
}

impl World {
    /// How an operation of an operator on a node ends.
    async fn on_node(&self, key: &str, kind: &str, spec: &Value) -> Value {
        let token = self.token("operator");
        let body = json!({"kind": kind, "spec": spec});
        let (status, taken) = self.operate(&token, key, &body).await;
        assert_eq!(status, 202, "{taken}");
        self.ended(&token, taken["id"].as_str().unwrap()).await
    }

    fn is_cordoned(&self) -> bool {
        let objects = self.kube.objects.lock().unwrap();
        objects.get("/api/v1/nodes/vm1").is_some_and(|node| node["spec"]["unschedulable"] == true)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_evicts_what_a_controller_recreates_and_waits_for_its_budget() {
    let world = World::new().await.up().await;
    *world.kube.pods.lock().unwrap() = vec![
        pod("kube-system", "coredns", "ReplicaSet"),
        pod("beta", "daemon", "DaemonSet"),
        mirror(),
        finished(),
        pod("beta", "kept", "ReplicaSet"),
    ];
    world.kube.budgets.lock().unwrap().insert("kept".into(), 1);
    let token = world.token("operator");
    let body = json!({"kind": "drain", "spec": {"node": "vm1", "grace_period_s": 7}});
    let (status, taken) = world.operate(&token, "k", &body).await;
    assert_eq!(status, 202, "{taken}");
    let id = taken["id"].as_str().unwrap();
    // what keeps it is told while it waits
    let begun = Instant::now();
    loop {
        let path = format!("/api/v1/operations/{id}");
        let (_, operation) = world.call("GET", &path, &token, "", "").await;
        if operation["reason"] == "disruption_budget" {
            let message = operation["message"].as_str().unwrap();
            assert!(message.contains("Pod beta/kept: The disruption budget keeper"), "{message}");
            break;
        }
        assert_eq!(operation["state"], "running", "{operation}");
        assert!(begun.elapsed() < Duration::from_secs(20), "{operation}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let end = world.ended(&token, id).await;
    assert_eq!(end["state"], "succeeded", "{end}");
    let expected = json!([
        {"object": "Node vm1", "outcome": "drained"},
        {"object": "Pod kube-system/coredns", "outcome": "absent"},
        {"object": "Pod beta/finished", "outcome": "absent"},
        {"object": "Pod beta/kept", "outcome": "absent"}
    ]);
    assert_eq!(end["objects"], expected);
    assert_eq!(*world.kube.evicted.lock().unwrap(), ["coredns", "finished", "kept"]);
    let stay: Vec<Value> = world.kube.pods.lock().unwrap().clone();
    assert_eq!(stay, [pod("beta", "daemon", "DaemonSet"), mirror()]);
    // the node by the agent, the pods as the caller
    assert!(world.is_cordoned());
    let evictions: Vec<_> =
        world.kube.through().into_iter().filter(|s| s.uri.ends_with("/eviction")).collect();
    assert_eq!(evictions.len(), 4, "{evictions:?}");
    for eviction in evictions {
        assert_eq!(eviction.all("impersonate-group"), ["pipeops:operator"]);
    }
    assert!(!written(&world.kube).iter().any(|w| w.contains("/nodes/")));
    let deployer = world.token("deployer");
    for kind in ["drain", "remove"] {
        let body = json!({"kind": kind, "spec": {"node": "vm1"}});
        assert_eq!(world.operate(&deployer, kind, &body).await.0, 403);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_that_cannot_be_done_evicts_nothing_and_one_that_takes_too_long_says_why() {
    let world = World::new().await.up().await;
    *world.kube.pods.lock().unwrap() =
        vec![pod("beta", "web", "ReplicaSet"), pod("beta", "bare", "")];
    for (key, spec, reason, text) in [
        (
            "a-1",
            json!({"node": "vm1"}),
            "not_evictable",
            "Pod beta/bare: no controller recreates it",
        ),
        (
            "a-2",
            json!({"node": "vm1", "force": true, "delete_emptydir_data": false}),
            "not_evictable",
            "Pod beta/web: it has an emptyDir",
        ),
    ] {
        let end = world.on_node(key, "drain", &spec).await;
        assert_eq!((&end["state"], &end["reason"]), (&json!("failed"), &json!(reason)), "{end}");
        assert!(end["message"].as_str().unwrap().contains(text), "{end}");
    }
    // a right that is missing in one namespace is found before the first pod goes
    world.kube.pods.lock().unwrap().push(pod("kube-system", "coredns", "ReplicaSet"));
    *world.kube.guarded.lock().unwrap() = "kube-system";
    let forced = json!({"node": "vm1", "force": true, "timeout_s": 1});
    let end = world.on_node("a-3", "drain", &forced).await;
    assert_eq!(end["reason"], "rights_missing", "{end}");
    let message = end["message"].as_str().unwrap();
    for part in ["Pod kube-system/coredns", "pods/eviction", "pipeops install-server"] {
        assert!(message.contains(part), "{part}: {message}");
    }
    assert!(world.kube.evicted.lock().unwrap().is_empty() && !world.is_cordoned());
    *world.kube.guarded.lock().unwrap() = "";
    // a budget that never lets go
    world.kube.budgets.lock().unwrap().insert("web".into(), usize::MAX);
    let end = world.on_node("a-4", "drain", &forced).await;
    assert_eq!(
        (&end["state"], &end["reason"]),
        (&json!("failed"), &json!("disruption_budget")),
        "{end}"
    );
    let message = end["message"].as_str().unwrap();
    assert!(
        message.contains("is not drained after 1 s: Pod beta/web: The disruption budget keeper"),
        "{message}"
    );
    assert_eq!(*world.kube.evicted.lock().unwrap(), ["bare", "coredns"]);
    assert!(world.is_cordoned());
    world.kube.budgets.lock().unwrap().clear();
    let end = world.on_node("a-5", "drain", &json!({"node": "vm1"})).await;
    assert_eq!(end["state"], "succeeded", "{end}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_is_removed_when_it_is_drained_or_gone_and_no_server_is() {
    let world = World::new().await.up().await;
    let node = |ready: &str, cordoned: bool, role: &str| {
        let mut node = json!({"metadata": {"uid": "n", "labels": {}}, "spec": {},
            "status": {"conditions": [{"type": "Ready", "status": ready}]}});
        if cordoned {
            node["spec"]["unschedulable"] = true.into();
        }
        if !role.is_empty() {
            node["metadata"]["labels"][format!("node-role.kubernetes.io/{role}")] = "true".into();
        }
        node
    };
    let at = |name: &str| format!("/api/v1/nodes/{name}");
    world.kube.put(&at("server"), node("False", true, "control-plane"));
    world.kube.put(&at("vm1"), node("True", true, ""));
    world.kube.put(&at("open"), node("True", false, ""));
    world.kube.put(&at("lost"), node("Unknown", false, ""));
    world.kube.put(&at("kept"), node("Unknown", false, ""));
    *world.kube.pods.lock().unwrap() = vec![pod("beta", "daemon", "DaemonSet"), mirror()];
    world.kube.pods.lock().unwrap().push(pod("beta", "web", "ReplicaSet"));
    for (key, spec, reason, text) in [
        ("r-1", json!({"node": "server", "force": true}), "server_node", "pipeops uninstall"),
        ("r-2", json!({"node": "open"}), "not_drained", "drain it first"),
        ("r-3", json!({"node": "vm1"}), "not_drained", "still has pods (1)"),
        ("r-4", json!({"node": "kept"}), "rights_missing", "pipeops install-server"),
    ] {
        let end = world.on_node(key, "remove", &spec).await;
        assert_eq!((&end["state"], &end["reason"]), (&json!("failed"), &json!(reason)), "{end}");
        assert!(end["message"].as_str().unwrap().contains(text), "{end}");
    }
    world.kube.pods.lock().unwrap().pop();
    for (key, spec, outcome) in [
        ("r-5", json!({"node": "vm1"}), "removed"),
        ("r-6", json!({"node": "open", "force": true}), "removed"),
        ("r-7", json!({"node": "lost"}), "removed"),
        // it was done before
        ("r-8", json!({"node": "lost"}), "absent"),
    ] {
        let end = world.on_node(key, "remove", &spec).await;
        assert_eq!(
            (&end["state"], &end["objects"][0]["outcome"]),
            (&json!("succeeded"), &json!(outcome)),
            "{end}"
        );
    }
    let objects = world.kube.objects.lock().unwrap();
    let left: Vec<_> = objects.keys().filter(|path| path.starts_with("/api/v1/nodes/")).collect();
    assert_eq!(left, ["/api/v1/nodes/kept", "/api/v1/nodes/server"]);
}
