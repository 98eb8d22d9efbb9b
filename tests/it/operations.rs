//! Operations: asked for once, carried out as the caller, their end told whatever dies on the way.

use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::control_plane::{ControlPlane, DATA, SimulatedAgent};
use crate::world::{Kube, Scripted, TOKEN, World, serve_kube};

pub(crate) fn deployment(name: &str) -> Value {
    json!({"apiVersion": "apps/v1", "kind": "Deployment",
        "metadata": {"name": name, "namespace": "beta"}, "spec": {"replicas": 2}})
}

pub(crate) fn secret() -> Value {
    json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s", "namespace": "beta"},
        "stringData": {"password": "planted-canary-9911-in-plain-text"}})
}

pub(crate) fn apply(objects: &[Value]) -> Value {
    json!({"kind": "apply", "spec": {"objects": objects}})
}

/// Everything in files below a directory.
pub(crate) fn texts(dir: &std::path::Path) -> String {
    let mut all = String::new();
    for entry in std::fs::read_dir(dir).unwrap().flatten() {
        let path = entry.path();
        if path.is_dir() {
            all.push_str(&texts(&path));
        } else {
            all.push_str(&String::from_utf8_lossy(&std::fs::read(&path).unwrap_or_default()));
        }
    }
    all
}

impl World {
    pub(crate) async fn operate(&self, token: &str, key: &str, body: &Value) -> (u16, Value) {
        self.call(
            "POST",
            "/api/v1/operations",
            token,
            &format!("Idempotency-Key: {key}\r\n"),
            &body.to_string(),
        )
        .await
    }

    /// What an operation came to.
    pub(crate) async fn ended(&self, token: &str, id: &str) -> Value {
        let begun = Instant::now();
        loop {
            let (status, operation) =
                self.call("GET", &format!("/api/v1/operations/{id}"), token, "", "").await;
            assert_eq!(status, 200, "{operation}");
            if operation["state"] != "running" {
                return operation;
            }
            assert!(begun.elapsed() < Duration::from_secs(30), "it does not end: {operation}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// The end as the control plane was told it.
    pub(crate) async fn told(&self, id: &str) -> Value {
        let (control_plane, part) =
            (self.control_plane.clone(), format!("/operations/{id}/result"));
        self.control_plane.until("the result", |_| !control_plane.calls(&part).is_empty()).await;
        self.control_plane.calls(&part).pop().unwrap().2
    }

    pub(crate) fn state(&self) -> std::path::PathBuf {
        self.agent.sandbox.root().join("var/lib/pipeops-agent")
    }
}

pub(crate) fn written(kube: &Kube) -> Vec<String> {
    kube.through()
        .iter()
        .filter(|s| s.method != "GET")
        .map(|s| format!("{} {}", s.method, s.uri))
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operation_is_carried_out_as_its_caller_and_its_end_is_told() {
    // nobody takes the result the first two times
    let busy =
        Scripted { path: "/operations/", status: 503, body: json!({}), headers: vec![], times: 2 };
    let world = World::with("", |control_plane| control_plane.script.lock().unwrap().push(busy))
        .await
        .up()
        .await;
    world.kube.ready.store(true, Relaxed);
    let token = world.token("deployer");
    let body = apply(&[secret(), deployment("web")]);
    let (status, taken) = world.operate(&token, "k-1", &body).await;
    assert_eq!(
        (status, &taken["kind"], &taken["subject"]),
        (202, &json!("apply"), &json!("runner-1")),
        "{taken}"
    );
    let id = taken["id"].as_str().unwrap();
    let end = world.ended(&token, id).await;
    assert_eq!((&end["state"], &end["message"]), (&json!("succeeded"), &json!("")), "{end}");
    let objects = json!([{"object": "Secret beta/s", "outcome": "created"},
        {"object": "Deployment beta/web", "outcome": "ready"}]);
    assert_eq!(end["objects"], objects);
    // with its own role, and taking no field from anybody
    let seen = world.kube.through().into_iter().filter(|s| s.method == "PATCH").collect::<Vec<_>>();
    let query = "fieldManager=pipeops-runner&force=false";
    assert_eq!(seen[0].uri, format!("/api/v1/namespaces/beta/secrets/s?{query}"));
    assert_eq!(seen[1].uri, format!("/apis/apps/v1/namespaces/beta/deployments/web?{query}"));
    for call in &seen {
        assert_eq!(call.all("impersonate-group"), ["pipeops:deployer"]);
        assert_eq!(call.all("content-type"), ["application/apply-patch+yaml"]);
    }
    // the same request again is the same operation, another one under its key a mistake
    let (status, same) = world.operate(&token, "k-1", &body).await;
    assert_eq!((status, &same["id"], seen.len()), (200, &json!(id), 2));
    let (status, other) = world.operate(&token, "k-1", &apply(&[deployment("other")])).await;
    assert_eq!((status, &other["code"]), (409, &json!("idempotency_mismatch")));
    // another caller under the same key asks for something of its own, and does not see this one
    assert_eq!(world.told(id).await, end);
    let (_, list) = world.call("GET", "/api/v1/operations", &token, "", "").await;
    assert_eq!(list["items"].as_array().unwrap().len(), 1);
    // nothing of what was asked for stands on the disk or goes to the control plane
    let kept = texts(&world.state());
    assert!(kept.contains("Secret beta/s") && !kept.contains("canary-9911-in-plain-text"));
    assert!(
        world
            .control_plane
            .calls("/")
            .iter()
            .all(|c| !c.2.to_string().contains("canary-9911-in-plain-text"))
    );
    let phases = |path: &str| {
        kept.lines()
            .filter(|l| l.contains("\"phase\"") && l.contains(&format!("\"path\":\"{path}\"")))
            .count()
    };
    assert_eq!(phases("/api/v1/namespaces/beta/secrets/s"), 2, "start and end of the write");
    // scaled, begun anew, taken away
    let web =
        json!({"apiVersion": "apps/v1", "kind": "Deployment", "name": "web", "namespace": "beta"});
    for (key, body, outcome) in [
        ("k-2", json!({"kind": "scale", "spec": {"object": web, "replicas": 5}}), "ready"),
        ("k-3", json!({"kind": "restart", "spec": {"object": web, "wait": false}}), "restarted"),
        (
            "k-4",
            json!({"kind": "delete",
                "spec": {"objects": [web, {"apiVersion": "v1", "kind": "ConfigMap", "name": "c",
                "namespace": "beta"}]}}),
            "absent",
        ),
    ] {
        let (status, taken) = world.operate(&token, key, &body).await;
        assert_eq!(status, 202, "{taken}");
        let end = world.ended(&token, taken["id"].as_str().unwrap()).await;
        assert_eq!(
            (&end["state"], &end["objects"][0]["outcome"]),
            (&json!("succeeded"), &json!(outcome)),
            "{end}"
        );
    }
    // a node is the agent's own to cordon, for operators
    let cordon = json!({"kind": "cordon", "spec": {"node": "vm1"}});
    assert_eq!(world.operate(&token, "k-5", &cordon).await.0, 403);
    let operator = world.token("operator");
    let (_, taken) = world.operate(&operator, "k-5", &cordon).await;
    assert_eq!(
        world.ended(&operator, taken["id"].as_str().unwrap()).await["objects"],
        json!([{"object": "Node vm1", "outcome": "cordoned"}])
    );
    assert_eq!(
        world.kube.objects.lock().unwrap()["/api/v1/nodes/vm1"],
        json!({"spec": {"unschedulable": true}})
    );
    assert!(
        !written(&world.kube).iter().any(|w| w.contains("nodes")),
        "nobody is impersonated for it"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_done_is_named_and_leaves_nothing_behind() {
    let world = World::new().await.up().await;
    let token = world.token("deployer");
    let path = "/api/v1/operations";
    let whole = apply(&[deployment("web")]).to_string();
    for (token, headers, body, expected) in [
        (&token, "", whole.as_str(), (400, "idempotency_key_needed")),
        (
            &token,
            "Idempotency-Key: a\r\nIdempotency-Key: b\r\n",
            &whole,
            (400, "idempotency_key_needed"),
        ),
        (&token, "Idempotency-Key: k\r\n", "{", (400, "bad_operation")),
        (&token, "Idempotency-Key: k\r\n", r#"{"kind":"dance","spec":{}}"#, (400, "bad_operation")),
        (&world.token("viewer"), "Idempotency-Key: k\r\n", &whole, (403, "role_exceeded")),
    ] {
        let (status, answer) = world.call("POST", path, token, headers, body).await;
        assert_eq!((status, answer["code"].as_str().unwrap_or_default()), expected, "{answer}");
    }
    let big = format!("{{\"kind\":\"{}\"}}", "x".repeat(1 << 20));
    assert_eq!(world.call("POST", path, &token, "Idempotency-Key: k\r\n", &big).await.0, 413);
    assert_eq!(world.call("PUT", path, &token, "", "").await.0, 405);
    for gone in [
        "/api/v1/operations/o-1",
        "/api/v1/operations/o-1/events",
        "/api/v1/operations/../x",
        "/api/v1/operations/",
    ] {
        assert!(matches!(world.call("GET", gone, &token, "", "").await.0, 400 | 404), "{gone}");
    }
    assert!(written(&world.kube).is_empty());
    // found before anything is written
    let elsewhere = json!({"apiVersion": "v1", "kind": "ConfigMap",
        "metadata": {"name": "c", "namespace": "kube-system"}});
    let unknown = json!({"apiVersion": "none/v1", "kind": "Dance",
        "metadata": {"name": "d", "namespace": "beta"}});
    let lost = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "c"}});
    let scoped = world.control_plane.token(&world.id, "deployer", Some(&["beta"]));
    for (key, token, object, text) in [
        ("e-1", &scoped, elsewhere, "namespace_scope"),
        ("e-2", &token, unknown, "no Dance in none/v1"),
        ("e-3", &token, lost, "names no namespace"),
        (
            "e-4",
            &scoped,
            json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "beta"}}),
            "namespace_scope",
        ),
    ] {
        let (_, taken) = world.operate(token, key, &apply(&[deployment("first"), object])).await;
        let end = world.ended(token, taken["id"].as_str().unwrap()).await;
        assert!(
            end["state"] == "failed" && end["message"].as_str().unwrap().contains(text),
            "{end}"
        );
    }
    assert!(written(&world.kube).is_empty(), "{:?}", written(&world.kube));
    // a field that another manager owns stays as it is; what is quoted of a Secret goes nowhere
    for (key, kind, text) in
        [("f-1", "ConfigMap", "conflict with"), ("f-2", "Secret", "409: Conflict")]
    {
        let owned = json!({"apiVersion": "v1", "kind": kind,
            "metadata": {"name": "owned", "namespace": "beta"}});
        let (_, taken) = world.operate(&token, key, &apply(&[owned])).await;
        let end = world.ended(&token, taken["id"].as_str().unwrap()).await;
        assert!(
            end["state"] == "failed" && end["message"].as_str().unwrap().contains(text),
            "{end}"
        );
        assert_eq!(
            kind == "Secret",
            !end.to_string().contains("canary-9911-in-plain-text"),
            "{end}"
        );
    }
    // what never gets ready fails in its time
    let mut never = apply(&[deployment("never")]);
    never["spec"]["timeout_s"] = 1.into();
    let (_, taken) = world.operate(&token, "g-1", &never).await;
    let end = world.ended(&token, taken["id"].as_str().unwrap()).await;
    assert!(
        end["message"].as_str().unwrap().contains("not ready after 1 s: 0 of 2 pods available"),
        "{end}"
    );
    // a dry run waits for nothing
    let mut dry = apply(&[deployment("never")]);
    dry["spec"]["dry_run"] = true.into();
    let (_, taken) = world.operate(&token, "g-2", &dry).await;
    assert_eq!(world.ended(&token, taken["id"].as_str().unwrap()).await["state"], "succeeded");
    assert!(written(&world.kube).last().unwrap().contains("dryRun=All"));
}

/// What the cluster shows of a Deployment `web` whose container has this state.
fn broken(world: &World, state: &Value, events: &Value) {
    let owner = |uid: &str| json!([{"uid": uid}]);
    let sets =
        json!({"items": [{"metadata": {"uid": "set", "ownerReferences": owner("deployment")}}]});
    let pods = json!({"items": [
        {"metadata": {"name": "old-1", "uid": "old", "ownerReferences": owner("former set")},
         "status": {"containerStatuses": [{"name": "c", "state": {"waiting": {"reason": "InvalidImageName"}}}]}},
        {"metadata": {"name": "web-1", "uid": "pod", "ownerReferences": owner("set")},
         "status": {"containerStatuses": [state]}}]});
    let log: String = (0..30).map(|n| format!("line {n}\n")).collect();
    *world.kube.planted.lock().unwrap() = vec![
        ("/apis/apps/v1/namespaces/beta/replicasets", "labelSelector=app=web", sets),
        ("/api/v1/namespaces/beta/pods", "labelSelector=app=web", pods),
        ("/api/v1/namespaces/beta/events", "involvedObject.uid=pod", events.clone()),
        (
            "/api/v1/namespaces/beta/pods/web-1/log",
            "container=web&previous=true&tailLines=20",
            json!(log),
        ),
    ];
}

#[tokio::test(flavor = "multi_thread")]
async fn what_keeps_a_deployment_from_being_ready_is_told_with_its_reason_and_last_lines() {
    let world = World::new().await.up().await;
    let token = world.token("deployer");
    let web = |timeout_s: u32| {
        let mut object = deployment("web");
        object["metadata"]["uid"] = "deployment".into();
        object["spec"]["selector"] = json!({"matchLabels": {"app": "web"}});
        let mut body = apply(&[object]);
        body["spec"]["timeout_s"] = timeout_s.into();
        body
    };
    let waits = |reason: &str, message: &str| json!({"name": "web", "image": "r.test/web:1", "state": {"waiting": {"reason": reason, "message": message}}});
    let pull = json!({"items": [{"reason": "Failed", "lastTimestamp": "2026-01-01T00:00:00Z", "involvedObject": {"uid": "pod"},
        "message": "Failed to pull image \"r.test/web:1\": rpc error: code = NotFound desc = r.test/web:1: not found"}]});
    let crash = json!({"name": "web", "restartCount": 3, "state": {"waiting": {"reason": "CrashLoopBackOff"}},
        "lastState": {"terminated": {"exitCode": 7, "reason": "Error"}}});
    let root = "container has runAsNonRoot and image will run as root";
    let none = json!({"items": []});
    for (key, state, events, timeout_s, reason, part, lines) in [
        // while it can heal it is waited for
        (
            "k-1",
            waits("ImagePullBackOff", "Back-off pulling image"),
            &pull,
            2,
            "image_not_found",
            "is not ready after 2 s",
            0,
        ),
        ("k-2", crash, &none, 2, "crash_loop", "exit code 7, restarted 3 times", 20),
        // where it can't, it ends long before its time
        (
            "k-3",
            waits("CreateContainerConfigError", root),
            &none,
            3600,
            "runs_as_root",
            "runs as root",
            0,
        ),
    ] {
        broken(&world, &state, events);
        let (status, taken) = world.operate(&token, key, &web(timeout_s)).await;
        assert_eq!(status, 202, "{taken}");
        let end = world.ended(&token, taken["id"].as_str().unwrap()).await;
        assert_eq!((&end["state"], &end["reason"]), (&json!("failed"), &json!(reason)), "{end}");
        assert!(end["message"].as_str().unwrap().contains(part), "{part}: {end}");
        let log = end["log"].as_array().map_or(&[][..], Vec::as_slice);
        assert_eq!(log.len(), lines, "{end}");
        assert!(lines == 0 || log[19] == "line 29", "{end}");
        // the control plane hears the same
        assert_eq!(world.told(taken["id"].as_str().unwrap()).await["reason"], reason);
    }
    // it was looked for with the caller's rights
    let looks = world.kube.through();
    let looks: Vec<_> =
        looks.iter().filter(|s| s.uri.contains("replicasets") || s.uri.contains("/log?")).collect();
    assert!(looks.len() >= 4, "{looks:?}");
    assert!(looks.iter().all(|s| s.all("impersonate-group") == ["pipeops:deployer"]), "{looks:?}");
    // a refusal has a code too
    let owned = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "owned", "namespace": "beta"}});
    let (_, taken) = world.operate(&token, "k-4", &apply(&[owned])).await;
    assert_eq!(world.ended(&token, taken["id"].as_str().unwrap()).await["reason"], "conflict");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operation_can_be_followed_and_cancelled_and_eight_run_at_once() {
    let world = World::new().await.up().await;
    let token = world.token("deployer");
    let mut ids = Vec::new();
    for n in 0..8 {
        let (status, taken) = world
            .operate(&token, &format!("k-{n}"), &apply(&[deployment(&format!("web-{n}"))]))
            .await;
        assert_eq!(status, 202, "{taken}");
        ids.push(taken["id"].as_str().unwrap().to_owned());
    }
    let (status, answer) = world.operate(&token, "k-9", &apply(&[deployment("web-9")])).await;
    assert_eq!((status, &answer["code"]), (429, &json!("too_many_operations")));
    let path = format!("/api/v1/operations/{}", ids[0]);
    let mut io = world.dial(b"http/1.1").await;
    io.write_all(
        format!("GET {path}/events HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {token}\r\n\r\n")
            .as_bytes(),
    )
    .await
    .unwrap();
    io.flush().await.unwrap();
    let mut said = String::new();
    let mut buffer = [0; 4096];
    let mut cancelled = false;
    while !said.contains("event: end") {
        let n = tokio::time::timeout(Duration::from_secs(20), io.read(&mut buffer))
            .await
            .unwrap()
            .unwrap();
        assert!(n > 0, "{said}");
        said.push_str(&String::from_utf8_lossy(&buffer[..n]));
        if said.contains("0 of 2 pods available") && !std::mem::replace(&mut cancelled, true) {
            assert_eq!(world.call("DELETE", &path, &token, "", "").await.0, 200);
        }
    }
    assert!(
        said.contains("text/event-stream") && said.contains("id: 1\nevent: step\ndata: {"),
        "{said}"
    );
    assert!(said.contains("\"state\":\"cancelled\""), "{said}");
    let told = world.told(&ids[0]).await;
    assert_eq!(
        (&told["state"], &told["objects"][0]["outcome"]),
        (&json!("cancelled"), &json!("created"))
    );
    // another Runner's eyes and hands
    let foreign = world.control_plane.token_of(&world.id, "runner-2", "deployer");
    assert_eq!(world.call("GET", &path, &foreign, "", "").await.0, 404);
    assert_eq!(world.call("DELETE", &path, &foreign, "", "").await.0, 404);
    let (_, list) = world.call("GET", "/api/v1/operations", &foreign, "", "").await;
    assert_eq!(list["items"], json!([]));
    let (_, list) = world.call("GET", "/api/v1/operations", &world.token("operator"), "", "").await;
    assert_eq!(list["items"].as_array().unwrap().len(), 8);
}

#[tokio::test(flavor = "multi_thread")]
async fn one_with_a_secret_that_ran_when_the_agent_died_is_told_as_interrupted() {
    let mut world = World::new().await.up().await;
    let token = world.token("deployer");
    let whole = apply(&[secret(), deployment("web")]);
    let (_, taken) = world.operate(&token, "k", &whole).await;
    let id = taken["id"].as_str().unwrap().to_owned();
    let kube = world.kube.clone();
    world.control_plane.until("the writes", |_| written(&kube).len() == 2).await;
    assert!(!texts(&world.state()).contains("canary-9911-in-plain-text"));
    world.agent.restart(&[("AGENT_TOKEN", TOKEN)]);
    let told = world.told(&id).await;
    assert!(
        told["state"] == "interrupted" && told["message"].as_str().unwrap().contains("may be done"),
        "{told}"
    );
    assert_eq!(written(&world.kube).len(), 2, "nothing is done again by itself");
    // an orderly end tells it too, before or after the next start
    let frps = world.frps.clone();
    world.control_plane.until("the tunnel", |_| frps.proxies() == ["agent"]).await;
    let begun = Instant::now();
    let second = loop {
        let (status, taken) = world.operate(&world.token("deployer"), "k-2", &whole).await;
        if status == 202 {
            break taken["id"].as_str().unwrap().to_owned();
        }
        assert!(begun.elapsed() < Duration::from_secs(20), "{status} {taken}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    let again = json!(id);
    let (_, same) = world.operate(&world.token("deployer"), "k", &whole).await;
    assert_eq!((&same["id"], &same["state"]), (&again, &json!("interrupted")));
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(world.agent.child.id().try_into().unwrap()),
        nix::sys::signal::Signal::SIGTERM,
    )
    .unwrap();
    tokio::task::block_in_place(|| world.agent.child.wait().unwrap());
    world.agent.restart(&[("AGENT_TOKEN", TOKEN)]);
    assert_eq!(world.told(&second).await["state"], "interrupted");
}

/// A Runner who asks the control plane.
pub(crate) async fn submit(
    control_plane: &ControlPlane,
    cluster: &str,
    token: &str,
    key: &str,
    body: &Value,
) -> (u16, Value) {
    let path = format!("/api/v1/clusters/{cluster}/operations");
    ask_under(control_plane, &path, token, key, body).await
}

/// What is asked for under a key.
pub(crate) async fn ask_under(
    control_plane: &ControlPlane,
    path: &str,
    token: &str,
    key: &str,
    body: &Value,
) -> (u16, Value) {
    let request = control_plane
        .client
        .post(format!("{}{path}", control_plane.url))
        .bearer_auth(token)
        .header("idempotency-key", key);
    let answer = request.json(body).send().await.unwrap();
    (answer.status().as_u16(), answer.json().await.unwrap_or_default())
}

pub(crate) async fn wait_for_state(
    control_plane: &ControlPlane,
    cluster: &str,
    token: &str,
    id: &str,
    state: &str,
) -> Value {
    let begun = Instant::now();
    loop {
        let seen = control_plane
            .json("GET", &format!("/api/v1/clusters/{cluster}/operations/{id}"), token, json!({}))
            .await;
        if seen["state"] == state {
            return seen;
        }
        assert!(
            begun.elapsed() < Duration::from_secs(40),
            "never {state}: {seen}; {}",
            control_plane.log.lock().unwrap()
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn by_way_of_the_control_plane_an_operation_waits_for_its_agent_and_outlives_both() {
    let mut control_plane = ControlPlane::with(&[]);
    let (kube, address) = serve_kube().await;
    kube.ready.store(true, Relaxed);
    let (mut agent, cluster) = control_plane.agent(address).await;
    let runner = control_plane.runner("deployer").await;
    let token = runner["token"].as_str().unwrap().to_owned();
    let id = |value: &Value| value["id"].as_str().unwrap().to_owned();
    // the agent is there: it has it at once
    let body = apply(&[deployment("web")]);
    let (status, taken) = submit(&control_plane, &cluster, &token, "k-1", &body).await;
    assert_eq!((status, &taken["cluster_id"]), (202, &json!(cluster)), "{taken}");
    wait_for_state(&control_plane, &cluster, &token, &id(&taken), "succeeded").await;
    let (status, same) = submit(&control_plane, &cluster, &token, "k-1", &body).await;
    assert_eq!((status, id(&same)), (200, id(&taken)));
    assert_eq!(
        submit(&control_plane, &cluster, &token, "k-1", &apply(&[deployment("other")])).await.0,
        409
    );
    // what the agent refuses is refused in its words
    let (status, answer) =
        submit(&control_plane, &cluster, &token, "k-2", &json!({"kind": "dance", "spec": {}}))
            .await;
    assert_eq!((status, &answer["code"]), (400, &json!("bad_operation")));
    let request = control_plane
        .client
        .post(format!("{}/api/v1/clusters/{cluster}/operations", control_plane.url))
        .bearer_auth(&token);
    assert_eq!(request.json(&body).send().await.unwrap().status(), 400, "no key");
    let viewer = control_plane.runner("viewer").await;
    let viewer_token = viewer["token"].as_str().unwrap();
    assert_eq!(submit(&control_plane, &cluster, viewer_token, "k", &body).await.0, 403);
    assert_eq!(
        control_plane
            .ask(
                "GET",
                &format!("/api/v1/clusters/{cluster}/operations/{}", id(&taken)),
                viewer_token,
                json!({})
            )
            .await
            .status(),
        404
    );
    // one that runs ends with the right to it
    kube.ready.store(false, Relaxed);
    let gone = control_plane.runner("deployer").await;
    let (_, running) = submit(
        &control_plane,
        &cluster,
        gone["token"].as_str().unwrap(),
        "k",
        &apply(&[deployment("running")]),
    )
    .await;
    let admin = control_plane.admin.clone();
    wait_for_state(&control_plane, &cluster, &admin, &id(&running), "running").await;
    control_plane
        .sandbox
        .subcommand(&["control-plane", "runner", "revoke", gone["id"].as_str().unwrap()])
        .ended(0);
    let begun = Instant::now();
    wait_for_state(&control_plane, &cluster, &admin, &id(&running), "cancelled").await;
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    kube.ready.store(true, Relaxed);
    // the agent is gone
    agent.child.kill().unwrap();
    agent.child.wait().unwrap();
    let begun = Instant::now();
    while control_plane.version(&cluster).await == 200 {
        assert!(begun.elapsed() < Duration::from_secs(20), "the agent's tunnel stays");
    }
    let (status, answer) = submit(&control_plane, &cluster, &token, "k-3", &body).await;
    assert_eq!((status, &answer["code"]), (503, &json!("agent_offline")));
    let waits = |objects: &[Value], ttl: i64| {
        let mut body = apply(objects);
        body["ttl_s"] = ttl.into();
        body
    };
    assert_eq!(
        submit(&control_plane, &cluster, &token, "k-4", &waits(&[secret()], 0)).await.0,
        400
    );
    let (status, queued) =
        submit(&control_plane, &cluster, &token, "k-4", &waits(&[secret()], 600)).await;
    assert_eq!((status, &queued["state"]), (202, &json!("queued")), "{queued}");
    let (_, second) =
        submit(&control_plane, &cluster, &token, "k-5", &waits(&[deployment("second")], 600)).await;
    let (_, short) =
        submit(&control_plane, &cluster, &token, "k-6", &waits(&[deployment("short")], 1)).await;
    let (_, unwanted) =
        submit(&control_plane, &cluster, &token, "k-7", &waits(&[deployment("unwanted")], 600))
            .await;
    let leaver = control_plane.runner("deployer").await;
    let (_, orphan) = submit(
        &control_plane,
        &cluster,
        leaver["token"].as_str().unwrap(),
        "k-8",
        &waits(&[deployment("orphan")], 600),
    )
    .await;
    for n in 0..12 {
        // 16 wait for one agent: with the one that has expired by now, or not yet
        submit(
            &control_plane,
            &cluster,
            &token,
            &format!("m-{n}"),
            &waits(&[deployment(&format!("m-{n}"))], 600),
        )
        .await;
    }
    let (status, answer) =
        submit(&control_plane, &cluster, &token, "m-13", &waits(&[deployment("m-13")], 600)).await;
    assert_eq!((status, &answer["code"]), (429, &json!("queue_full")), "{answer}");
    let path = |op: &Value| format!("/api/v1/clusters/{cluster}/operations/{}", id(op));
    assert_eq!(
        control_plane.json("DELETE", &path(&unwanted), &token, json!({})).await["state"],
        "cancelled"
    );
    control_plane
        .sandbox
        .subcommand(&["control-plane", "runner", "revoke", leaver["id"].as_str().unwrap()])
        .ended(0);
    wait_for_state(&control_plane, &cluster, &token, &id(&short), "expired").await;
    // kill -9, and what waits is still there; nobody can read it in the database
    control_plane.kill_and_restart();
    let data = texts(&control_plane.sandbox.root().join(DATA));
    assert!(data.contains(&id(&queued)) && !data.contains("canary-9911-in-plain-text"));
    let before = kube.through().len();
    agent.restart(&[]);
    wait_for_state(&control_plane, &cluster, &token, &id(&second), "succeeded").await;
    assert_eq!(
        wait_for_state(&control_plane, &cluster, &token, &id(&queued), "succeeded").await["objects"]
            [0]["object"],
        "Secret beta/s"
    );
    let failed = wait_for_state(&control_plane, &cluster, &admin, &id(&orphan), "failed").await;
    assert!(failed["message"].as_str().unwrap().contains("may not do this any more"), "{failed}");
    // in the order in which they were asked for, and each once
    let begun = Instant::now();
    let patched = || {
        kube.through()[before..]
            .iter()
            .filter(|s| s.method == "PATCH")
            .map(|s| s.uri.split(['?', '/']).rev().nth(1).unwrap().to_owned())
            .collect::<Vec<_>>()
    };
    while patched().len() < 13 {
        assert!(begun.elapsed() < Duration::from_secs(40), "{:?}", patched());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let order = patched();
    assert_eq!(order[..2], ["s", "second"]);
    assert!(
        !order.iter().any(|n| matches!(n.as_str(), "short" | "unwanted" | "orphan")),
        "{order:?}"
    );
    assert_eq!(
        kube.through()
            .iter()
            .filter(|s| s.uri.contains("/deployments/second?") && s.method == "PATCH")
            .count(),
        1
    );
}

/// The last lines of a container that failed: in no list, and there after a restart too.
#[tokio::test(flavor = "multi_thread")]
async fn the_log_of_an_operation_is_told_to_whoever_asks_for_it_alone() {
    let mut control_plane = ControlPlane::with(&[]);
    let dir = tempfile::tempdir().unwrap();
    let agent = SimulatedAgent::new(&control_plane, dir.path(), &control_plane.enrol().0).await;
    let cluster = control_plane.cluster_of(&agent).await["id"].as_str().unwrap().to_owned();
    let id = format!("o-{}", "0a".repeat(16));
    let end = json!({"id": id, "kind": "apply", "state": "failed", "subject": "r-1",
        "message": "it ends again and again", "reason": "crash_loop", "log": ["no such table"],
        "created_at": "c", "finished_at": "f", "objects": []});
    let result = format!("/api/v1/agents/{}/operations/{id}/result", agent.id);
    control_plane.json("POST", &result, &agent.credential, end).await;
    let path = format!("/api/v1/clusters/{cluster}/operations");
    for _ in 0..2 {
        let all = control_plane.get(&path, &control_plane.admin).await;
        assert_eq!((&all["items"][0]["id"], all["items"][0].get("log")), (&json!(id), None));
        let one = control_plane.get(&format!("{path}/{id}"), &control_plane.admin).await;
        assert_eq!(one["log"], json!(["no such table"]), "{one}");
        control_plane.kill_and_restart();
    }
}
