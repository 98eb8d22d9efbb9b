//! What is asked for wrongly about an application: refused with field, reason and code, before
//! anything of it is on a disk or in the cluster.

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::operations::{deployment, written};
use crate::world::World;

const DEPLOYMENTS: &str = "/apis/apps/v1/namespaces/beta/deployments";

/// A deploy that would be taken, changed by `change`.
fn deploy(change: impl FnOnce(&mut Value)) -> Value {
    let mut application = json!({"name": "web", "namespace": "beta", "image": "r.test/web:1"});
    change(&mut application);
    json!({"kind": "deploy", "spec": {"application": application}})
}

fn with(field: &str, value: Value) -> Value {
    deploy(|application| application[field] = value)
}

fn many(count: usize) -> Value {
    (0..count).map(|n| (format!("V{n}"), json!("x"))).collect::<serde_json::Map<_, _>>().into()
}

impl World {
    /// Nothing is left of what was refused.
    async fn has_nothing(&self, token: &str) {
        assert!(written(&self.kube).is_empty(), "{:?}", written(&self.kube));
        let (_, list) = self.call("GET", "/api/v1/operations", token, "", "").await;
        assert_eq!(list["items"], json!([]));
        let kept: Vec<_> =
            std::fs::read_dir(self.state().join("operations")).into_iter().flatten().collect();
        assert!(kept.is_empty(), "{kept:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_request_about_an_application_is_refused_by_its_field() {
    let world = World::new().await.up().await;
    let token = world.token("deployer");
    let spec = |kind: &str, spec: Value| json!({"kind": kind, "spec": spec});
    let manifest = deployment("web");
    let web = json!({"name": "web", "namespace": "beta", "image": "r.test/web:1"});
    for (body, part) in [
        // kinds and foreign things
        (spec("deplyo", json!({"application": web})), "unknown variant `deplyo`"),
        (spec("deploy", json!({"objects": [manifest]})), "unknown field `objects`"),
        (spec("deploy", manifest.clone()), "unknown field `apiVersion`"),
        (manifest.clone(), "this is no operation"),
        (with("selector", json!({"app": "other"})), "unknown field `selector`"),
        (spec("deploy", json!({})), "application"),
        // types
        (with("replicas", json!("three")), "application.replicas"),
        (with("replicas", json!(-1)), "application.replicas"),
        (with("ports", json!(80)), "application.ports"),
        (with("ports", json!([{"container_port": 70000}])), "application.ports[0].container_port"),
        (with("environment", json!({"A": 1.5})), "application.environment.A"),
        (with("command", json!("sleep 1")), "application.command"),
        (spec("deploy", json!({"application": web, "dry_run": "yes"})), "spec.dry_run"),
        (spec("deploy", json!({"application": web, "timeout_s": 0})), "timeout_s is 1 to 3600"),
        // quantities
        (
            with("resources", json!({"requests": {"cpu": "fast"}})),
            "spec.application.resources.requests.cpu: that is no quantity",
        ),
        (
            with("resources", json!({"limits": {"memory": "-1Mi"}})),
            "spec.application.resources.limits.memory: that is no quantity",
        ),
        (
            with("resources", json!({"limits": {"gpus": "1"}})),
            "spec.application.resources.limits.gpus",
        ),
        // names
        (with("name", json!("Web")), "spec.application.name: 1 to 52 of"),
        (with("name", json!("")), "spec.application.name"),
        (with("name", json!("a".repeat(53))), "spec.application.name"),
        (with("namespace", json!("../kube-system")), "spec.application.namespace"),
        (with("image", json!("https://r.test/web:1")), "spec.application.image"),
        (with("image", json!("r.test/WEB")), "spec.application.image"),
        (with("labels", json!({"app.kubernetes.io/name": "other"})), "pipeops sets this one"),
        (with("labels", json!({"a b": "c"})), "spec.application.labels.a b"),
        (with("environment", json!({"1A": "x"})), "spec.application.environment.1A"),
        (with("service_account", json!("a/b")), "spec.application.service_account"),
        (spec("rollback", json!({"namespace": "beta", "name": "a/b"})), "spec.name: 1 to 63"),
        (spec("delete_application", json!({"namespace": "", "name": "a"})), "spec.namespace"),
        (spec("job", json!({"namespace": "beta", "name": "a", "cronjob": "b"})), "spec: one of"),
        // sizes
        (
            with("environment", many(1000)),
            "spec.application.environment: 1000 variables, 500 at most",
        ),
        (with("environment", json!({"A": "x".repeat(300 << 10)})), "larger than 256 KiB"),
        (with("replicas", json!(1001)), "spec.application.replicas: 0 to 1000"),
    ] {
        let (status, answer) = world.operate(&token, "k", &body).await;
        assert_eq!((status, &answer["code"]), (400, &json!("bad_operation")), "{part}: {answer}");
        let message = answer["message"].as_str().unwrap_or_default();
        assert!(message.contains(part), "`{part}` is wanted: {message}");
    }
    // the most that is taken is no more than what is refused less one
    let (status, answer) =
        world.operate(&world.token("viewer"), "k", &with("environment", many(500))).await;
    assert_eq!((status, &answer["code"]), (403, &json!("role_exceeded")), "{answer}");
    world.has_nothing(&token).await;
    // 2 MiB: it is answered before all of it has come
    let body = with("environment", json!({"A": "x".repeat(2 << 20)})).to_string();
    let request = format!(
        "POST /api/v1/operations HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {token}\r\n\
         Idempotency-Key: k\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    let (mut from, mut to) = tokio::io::split(world.dial(b"http/1.1").await);
    let sends = async {
        let _ = to.write_all(request.as_bytes()).await;
        let _ = to.flush().await;
        std::future::pending::<()>().await;
    };
    let reads = async {
        let (mut said, mut buffer) = (String::new(), [0; 4096]);
        while !said.contains("too_large") {
            let n = from.read(&mut buffer).await.unwrap_or(0);
            assert!(n > 0, "{said}");
            said.push_str(&String::from_utf8_lossy(&buffer[..n]));
        }
        said
    };
    let answer = tokio::time::timeout(std::time::Duration::from_secs(20), async {
        tokio::select! { () = sends => unreachable!(), said = reads => said }
    });
    let said = answer.await.unwrap();
    assert!(said.starts_with("HTTP/1.1 413") && said.contains("larger than 1 MiB"), "{said}");
    world.has_nothing(&token).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_cluster_or_the_token_does_not_allow_leaves_nothing_of_a_deploy() {
    let world = World::new().await.up().await;
    let token = world.token("deployer");
    // somebody else's Deployment of this name
    world.kube.put(&format!("{DEPLOYMENTS}/web"), deployment("web"));
    let scoped = world.control_plane.token(&world.id, "deployer", Some(&["production"]));
    for (key, token, reason, part) in [
        ("k-1", &token, "conflict", "is not of application web"),
        ("k-2", &scoped, "namespace_scope", "the token is for production"),
    ] {
        let (status, taken) = world.operate(token, key, &deploy(|_| {})).await;
        assert_eq!(status, 202, "{taken}");
        let end = world.ended(token, taken["id"].as_str().unwrap()).await;
        assert_eq!((&end["state"], &end["reason"]), (&json!("failed"), &json!(reason)), "{end}");
        assert!(end["message"].as_str().unwrap().contains(part), "{part}: {end}");
        assert!(end.get("revision").is_none_or(Value::is_null), "{end}");
    }
    assert!(written(&world.kube).is_empty(), "{:?}", written(&world.kube));
    let objects = world.kube.objects.lock().unwrap();
    assert_eq!(objects.get(&format!("{DEPLOYMENTS}/web")), Some(&deployment("web")));
}
