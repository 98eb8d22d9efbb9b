//! Operations that ran when the agent stopped: each goes on at its next start, has one effect, and
//! tells what became of it.

use std::path::PathBuf;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::operations::{apply, deployment, texts, written};
use crate::world::{TOKEN, World};

const RESUMED: &str = "resumed after the agent was restarted";
const DEPLOYMENTS: &str = "/apis/apps/v1/namespaces/beta/deployments";

impl World {
    /// Asks for an operation; gives its id.
    async fn begun(&self, role: &str, key: &str, body: &Value) -> String {
        let (status, taken) = self.operate(&self.token(role), key, body).await;
        assert_eq!(status, 202, "{taken}");
        taken["id"].as_str().unwrap().to_owned()
    }

    fn file(&self, id: &str) -> PathBuf {
        self.state().join(format!("operations/{id}.json"))
    }

    /// An operation as it stands on the disk.
    fn stored(&self, id: &str) -> Value {
        serde_json::from_str(&std::fs::read_to_string(self.file(id)).unwrap()).unwrap()
    }

    /// Waits for a state on the disk.
    async fn until_stored(&self, id: &str, what: &str, met: impl Fn(&Value) -> bool) -> Value {
        let begun = Instant::now();
        loop {
            let stored = self.stored(id);
            if met(&stored) {
                return stored;
            }
            assert!(begun.elapsed() < Duration::from_secs(60), "never {what}: {stored}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Waits until a change that was made is on the disk.
    async fn until_changed(&self, id: &str) {
        self.until_stored(id, "a change", |stored| stored["operation"]["objects"] != json!([]))
            .await;
    }

    /// Ends the agent, orderly or not, and waits until it has ended.
    fn end(&mut self, orderly: bool) {
        let pid = nix::unistd::Pid::from_raw(self.agent.child.id().try_into().unwrap());
        let signal = if orderly {
            nix::sys::signal::Signal::SIGTERM
        } else {
            nix::sys::signal::Signal::SIGKILL
        };
        nix::sys::signal::kill(pid, signal).unwrap();
        tokio::task::block_in_place(|| self.agent.child.wait().unwrap());
    }

    fn again(&mut self) {
        self.agent.restart(&[("AGENT_TOKEN", TOKEN)]);
    }
}

fn reference(name: &str) -> Value {
    json!({"apiVersion": "apps/v1", "kind": "Deployment", "name": name, "namespace": "beta"})
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_agent_goes_on_with_each_kind_and_each_has_one_effect() {
    let mut world = World::new().await.up().await;
    for name in ["scaled", "restarted"] {
        world.kube.put(&format!("{DEPLOYMENTS}/{name}"), deployment(name));
    }
    let owner = json!([{"apiVersion": "apps/v1", "kind": "ReplicaSet", "controller": true}]);
    let pod = |name: &str| {
        json!({"metadata": {"name": name, "namespace": "beta", "uid": name,
            "ownerReferences": owner}, "status": {"phase": "Running"}})
    };
    *world.kube.pods.lock().unwrap() = vec![pod("free"), pod("kept")];
    world.kube.budgets.lock().unwrap().insert("kept".into(), usize::MAX);
    let scale = json!({"object": reference("scaled"), "replicas": 3});
    let mut ids = Vec::new();
    for (role, kind, spec, outcome) in [
        ("deployer", "apply", json!({"objects": [deployment("web")]}), "ready"),
        ("deployer", "scale", scale, "ready"),
        ("deployer", "restart", json!({"object": reference("restarted")}), "ready"),
        ("operator", "drain", json!({"node": "vm1"}), "drained"),
    ] {
        let body = json!({"kind": kind, "spec": spec});
        ids.push((world.begun(role, kind, &body).await, kind, outcome));
    }
    for (id, kind, _) in &ids {
        world.until_changed(id).await;
        let file = world.file(id);
        let mode = std::os::unix::fs::MetadataExt::mode(&std::fs::metadata(&file).unwrap());
        assert_eq!(mode & 0o777, 0o600, "{kind}");
        let point = &world.stored(id)["resume"];
        assert!(point["body"].as_str().unwrap().contains(kind), "{point}");
        assert_eq!(point["caller"]["subject"], "runner-1", "{point}");
    }
    let evicted = world.kube.clone();
    world
        .control_plane
        .until("one eviction", |_| !evicted.evicted.lock().unwrap().is_empty())
        .await;
    let changes = |world: &World| {
        let all = written(&world.kube);
        all.into_iter().filter(|w| w.starts_with("PATCH")).collect::<Vec<_>>()
    };
    let before = changes(&world);
    world.end(false);
    world.again();
    // they are waited for as before
    for (id, ..) in &ids {
        world.until_stored(id, "resumed", |stored| stored["resume"]["attempts"] == 1).await;
    }
    world.kube.ready.store(true, Relaxed);
    world.kube.budgets.lock().unwrap().clear();
    for (id, kind, outcome) in &ids {
        let told = world.told(id).await;
        assert_eq!(told["state"], "succeeded", "{kind}: {told}");
        let objects = told["objects"].as_array().unwrap();
        assert!(objects.iter().any(|o| o["outcome"] == *outcome), "{kind}: {told}");
        assert!(world.stored(id)["resume"].is_null(), "{kind}: the request stays on the disk");
    }
    assert_eq!(before, changes(&world), "nothing is written twice");
    assert_eq!(*world.kube.evicted.lock().unwrap(), ["free", "kept"]);
    let objects = world.kube.objects.lock().unwrap().clone();
    assert_eq!(objects[&format!("{DEPLOYMENTS}/scaled")]["spec"]["replicas"], 3);
    let template = &objects[&format!("{DEPLOYMENTS}/restarted")]["spec"]["template"];
    let stamp = &template["metadata"]["annotations"]["kubectl.kubernetes.io/restartedAt"];
    let restart = world.stored(&ids[2].0);
    assert_eq!(*stamp, restart["operation"]["created_at"]);
    // both runs are on record, each with its beginning
    let audit = texts(&world.state().join("audit"));
    for (id, kind, _) in &ids {
        let of = |phase: &str| {
            let (request, phase) =
                (format!("\"request\":\"{id}\""), format!("\"phase\":\"{phase}\""));
            audit.lines().filter(|l| l.contains(&request) && l.contains(&phase)).count()
        };
        assert_eq!((of("start"), of("end")), (2, 1), "{kind}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_in_the_moment_of_the_end_is_made_once_more_and_is_the_same() {
    let mut world = World::new().await.up().await;
    for name in ["restarted", "gone"] {
        world.kube.put(&format!("{DEPLOYMENTS}/{name}"), deployment(name));
    }
    let restart = json!({"kind": "restart", "spec": {"object": reference("restarted")}});
    let restarted = world.begun("deployer", "r", &restart).await;
    world.until_changed(&restarted).await;
    let applied = world.begun("deployer", "a", &apply(&[deployment("web")])).await;
    world.until_changed(&applied).await;
    let at = |world: &World| {
        world.kube.objects.lock().unwrap()[&format!("{DEPLOYMENTS}/restarted")].clone()
    };
    let delete = json!({"kind": "delete", "spec": {"objects": [reference("gone")]}});
    let gone = world.begun("deployer", "d", &delete).await;
    world.told(&gone).await;
    let first = at(&world);
    world.end(false);
    // as if the disk had not been reached any more
    for id in [&restarted, &applied] {
        let mut stored = world.stored(id);
        stored["operation"]["objects"] = json!([]);
        std::fs::write(world.file(id), stored.to_string()).unwrap();
    }
    let mut stored = world.stored(&gone);
    stored["resume"] = world.stored(&applied)["resume"].clone();
    stored["resume"]["body"] = delete.to_string().into();
    (stored["operation"]["state"], stored["told"]) = (json!("running"), json!(false));
    (stored["operation"]["finished_at"], stored["operation"]["objects"]) = (json!(""), json!([]));
    std::fs::write(world.file(&gone), stored.to_string()).unwrap();
    world.kube.ready.store(true, Relaxed);
    world.again();
    for id in [&restarted, &applied] {
        assert_eq!(world.told(id).await["state"], "succeeded");
    }
    assert_eq!(at(&world), first, "its pods are recreated once");
    let gone = world.until_stored(&gone, "an end", |stored| stored["told"] == true).await;
    let ended = json!([{"object": "Deployment beta/gone", "outcome": "absent"}]);
    assert_eq!(
        (&gone["operation"]["state"], &gone["operation"]["objects"]),
        (&json!("succeeded"), &ended)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn once_its_time_is_over_nothing_is_changed_and_the_cluster_tells_how_it_ended() {
    let mut world = World::new().await.up().await;
    let names = ["done", "other", "never"];
    let mut ids = Vec::new();
    for name in names {
        let id = world.begun("deployer", name, &apply(&[deployment(name)])).await;
        world.until_changed(&id).await;
        ids.push(id);
    }
    // an orderly end leaves them as a crash does
    world.end(true);
    for id in &ids {
        let mut stored = world.stored(id);
        assert_eq!(stored["operation"]["state"], "running", "{stored}");
        stored["resume"]["deadline"] = 1.into();
        stored["operation"]["objects"] = json!([]);
        std::fs::write(world.file(id), stored.to_string()).unwrap();
    }
    // meanwhile somebody wants one of them otherwise, and one does not run
    let mut other = deployment("other");
    other["spec"]["replicas"] = 7.into();
    world.kube.put(&format!("{DEPLOYMENTS}/other"), other.clone());
    world.kube.objects.lock().unwrap().remove(&format!("{DEPLOYMENTS}/never"));
    world.kube.ready.store(true, Relaxed);
    world.again();
    for (id, expected) in ids.iter().zip(["succeeded", "failed", "failed"]) {
        let told = world.told(id).await;
        assert_eq!(told["state"], expected, "{told}");
        if expected == "failed" {
            assert_eq!(told["reason"], "timed_out", "{told}");
            assert!(told["message"].as_str().unwrap().contains("was not done"), "{told}");
        }
    }
    let objects = world.kube.objects.lock().unwrap().clone();
    assert_eq!(objects[&format!("{DEPLOYMENTS}/other")], other, "what others did stays");
    assert!(!objects.contains_key(&format!("{DEPLOYMENTS}/never")));
}

#[tokio::test(flavor = "multi_thread")]
async fn one_that_is_cancelled_or_resumed_three_times_ends() {
    let mut world = World::new().await.up().await;
    let id = world.begun("deployer", "k", &apply(&[deployment("web")])).await;
    world.until_changed(&id).await;
    for attempt in 1..=3 {
        world.end(false);
        world.again();
        world.until_stored(&id, "resumed", |stored| stored["resume"]["attempts"] == attempt).await;
    }
    // whoever follows it sees that
    let frps = world.frps.clone();
    world.control_plane.until("the tunnel", |_| frps.proxies() == ["agent"]).await;
    let (path, begun) = (format!("/api/v1/operations/{id}"), Instant::now());
    let token = world.token("deployer");
    let events = loop {
        let text = world.ask("GET", &format!("{path}/events"), &token).await;
        if text.contains(RESUMED) {
            break text;
        }
        assert!(begun.elapsed() < Duration::from_secs(30), "{text}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    assert!(events.contains("id: 1\nevent: step"), "{events}");
    world.end(false);
    world.again();
    let told = world.told(&id).await;
    assert!(
        told["state"] == "interrupted" && told["message"].as_str().unwrap().contains("may be done"),
        "{told}"
    );
    assert_eq!(told["objects"], json!([{"object": "Deployment beta/web", "outcome": "created"}]));
    assert_eq!(written(&world.kube).len(), 1, "it was written once");
    // what its caller has cancelled does not come back
    world.control_plane.until("the tunnel", |_| frps.proxies() == ["agent"]).await;
    let begun = Instant::now();
    let second = loop {
        let body = apply(&[deployment("second")]);
        let (status, taken) = world.operate(&token, "k-2", &body).await;
        if status == 202 {
            break taken["id"].as_str().unwrap().to_owned();
        }
        assert!(begun.elapsed() < Duration::from_secs(20), "{status} {taken}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    world.until_changed(&second).await;
    let path = format!("/api/v1/operations/{second}");
    assert_eq!(world.call("DELETE", &path, &token, "", "").await.0, 200);
    assert!(world.stored(&second)["resume"].is_null());
    world.end(false);
    world.again();
    let state = world.told(&second).await["state"].clone();
    assert!(matches!(state.as_str(), Some("cancelled" | "interrupted")), "{state}");
}
