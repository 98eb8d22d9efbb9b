//! Applications that can be, and those that cannot.

use serde_json::{Value, json};

use super::*;

/// A full one, with one field changed.
fn verdict(pointer: &str, value: Value) -> String {
    let mut full = json!({
        "name": "web", "namespace": "production", "image": "r.example/web:1", "replicas": 2,
        "ports": [{"container_port": 8080, "name": "http"}, {"container_port": 9000}],
        "command": ["/web"], "args": ["-v"],
        "environment": {"MODE": "fast", "PORT": 8080, "DEBUG": true,
            "URL": {"secret": "db", "key": "url"}, "X": {"config": "c", "key": "x.y"}},
        "environment_from": [{"secret": "s"}, {"config": "c"}],
        "resources": {"limits": {"memory": "128Mi"}, "requests": {"cpu": "250m"}},
        "probes": {"readiness": {"path": "/ready"}, "liveness": {"command": ["true"]}},
        "volumes": [{"mount_path": "/data", "claim": "data"},
            {"mount_path": "/tmp", "empty": true}],
        "host": {"name": "shop.example.com", "port": 9000, "issuer": "letsencrypt"},
        "strategy": {"max_surge": "25%", "max_unavailable": 0},
        "labels": {"team": "a"}, "annotations": {"example.com/x": "any text"},
        "pre_deploy": {"command": ["/migrate"]}, "security": {"user": 1000}
    });
    if !pointer.is_empty() {
        let (parent, key) = pointer.rsplit_once('/').unwrap();
        let parent = full.pointer_mut(parent).unwrap();
        match (parent.is_array(), key.parse::<usize>()) {
            (true, Ok(n)) => parent[n] = value,
            _ => parent[key] = value,
        }
    }
    match serde_json::from_value::<Application>(full) {
        Ok(application) => application.check().err().unwrap_or_default(),
        Err(e) => e.to_string(),
    }
}

#[test]
fn one_that_can_be_is_taken_and_comes_back_as_it_was_given() {
    assert_eq!(verdict("", Value::Null), "");
    let given = json!({"name": "web", "namespace": "beta", "image": "web"});
    let application: Application = serde_json::from_value(given.clone()).unwrap();
    assert_eq!(application.check(), Ok(()));
    assert_eq!(serde_json::to_value(&application).unwrap(), given);
}

#[test]
fn what_cannot_be_is_refused_with_its_field() {
    let many: serde_json::Map<String, Value> =
        (0..1000).map(|n| (format!("V{n}"), json!("x"))).collect();
    for (pointer, value, said) in [
        ("/name", json!("Web"), "name: "),
        ("/name", json!("1web"), "name: "),
        ("/name", json!("w".repeat(53)), "name: "),
        ("/namespace", json!("a/b"), "namespace: "),
        ("/image", json!(""), "image: "),
        ("/image", json!("https://r.example/web"), "scheme"),
        ("/image", json!("a b"), "image: "),
        ("/image", json!("r.example/UPPER:1"), "image: "),
        ("/image", json!("web:"), "image: "),
        ("/image", json!("web@sha256:ab"), "image: "),
        ("/replicas", json!(1001), "replicas: 0 to 1000"),
        ("/replicas", json!("three"), "invalid type"),
        ("/replicas", json!(-1), "invalid value"),
        ("/autoscaling", json!({"min_replicas": 1, "max_replicas": 2}), "replicas: autoscaling"),
        ("/ports/0/container_port", json!(0), "ports[0]: "),
        ("/ports/0/container_port", json!(70000), "invalid value"),
        ("/ports/1/container_port", json!(8080), "ports[1]: it is there twice"),
        ("/ports/1/service_port", json!(8080), "service_port is there twice"),
        ("/ports/0/name", json!("a-name-that-is-long"), "ports[0].name: "),
        ("/ports/0/protocol", json!("tcp"), "unknown variant"),
        ("/environment/1X", json!("x"), "environment.1X: "),
        ("/environment/A", json!({"secret": "db"}), "a variable is text"),
        ("/environment/A", json!(1.25), "write it in quotes"),
        ("/environment/A", json!({"secret": "../x", "key": "k"}), "environment.A: "),
        ("/environment/A", json!({"secret": "db", "key": "a/b"}), "environment.A: "),
        ("/environment", Value::Object(many), "1000 variables, 500 at most"),
        ("/resources/limits/memory", json!("lots"), "resources.limits.memory: "),
        ("/resources/limits/memory", json!("0"), "resources.limits.memory: "),
        ("/resources/limits/gpu", json!("1"), "resources.limits.gpu: "),
        ("/probes/readiness/path", json!("ready"), "probes.readiness.path: "),
        ("/probes/readiness/command", json!(["x"]), "not both"),
        ("/probes/liveness/period_s", json!(0), "probes.liveness.period_s: "),
        ("/volumes/0/mount_path", json!("data"), "volumes[0].mount_path: "),
        ("/volumes/0/size", json!("1Gi"), "go together"),
        ("/volumes/0", json!({"mount_path": "/d", "name": "d", "size": "1Gi"}), "one pod alone"),
        ("/volumes/1/secret", json!("s"), "volumes[1]: one of"),
        ("/volumes/1/mount_path", json!("/data"), "there twice"),
        ("/host/name", json!("Shop.example.com"), "host.name: "),
        ("/host/name", json!("shop"), "host.name: "),
        ("/host/port", json!(1), "host.port: "),
        ("/host/certificate", json!("c"), "not both"),
        ("/host/tls", json!(false), "host.tls: "),
        ("/host/gateway", json!("edge"), "host.gateway: "),
        ("/host/gateway", json!("infra/edge"), "the Gateway's own"),
        ("/strategy/max_surge", json!("a%"), "strategy.max_surge: "),
        ("/strategy/max_surge", json!(0), "no pod can be replaced"),
        ("/strategy/recreate", json!(true), "strategy.max_surge: "),
        ("/strategy/min_ready_s", json!(600), "less than progress_deadline_s"),
        ("/labels/app", json!("x"), "labels.app: pipeops sets this one"),
        ("/labels/team", json!("two words"), "labels.team: "),
        ("/annotations", json!({"pipeops.io/x": "x"}), "annotations.pipeops.io/x: pipeops sets"),
        ("/pre_deploy/command", json!([]), "pre_deploy.command: "),
        ("/security/user", json!(0), "security.user: "),
        ("/colour", json!("red"), "unknown field `colour`"),
        ("/host/colour", json!("red"), "unknown field `colour`"),
        ("/args", json!(["x".repeat(300_000)]), "256 KiB"),
    ] {
        let verdict = verdict(pointer, value);
        assert!(verdict.contains(said), "{pointer}: {verdict}");
    }
    let autoscaled = json!({"name": "web", "namespace": "beta", "image": "web",
        "autoscaling": {"min_replicas": 1, "max_replicas": 3}});
    let application: Application = serde_json::from_value(autoscaled).unwrap();
    assert!(application.check().unwrap_err().starts_with("resources.requests.cpu: "));
}

#[test]
fn quantities_are_those_of_kubernetes() {
    for good in ["1", "0.5", "250m", "128Mi", "1Gi", "2G", "1e3", "1E", "12E6", "100k"] {
        assert!(is_quantity(good), "{good}");
    }
    for bad in ["", "0", "-1", "1.2.3", "Mi", "1mi", "1KB", "1 Gi", "lots", "1e", "inf", "."] {
        assert!(!is_quantity(bad), "{bad}");
    }
}

#[test]
fn names_of_images_are_those_of_registries() {
    let pinned = format!("r.example:5000/a/b_c/web:1.2-x@sha256:{}", "0a".repeat(32));
    for good in ["web", "web:1", "library/web", "R.example/web", "localhost/web:V1_2", &pinned] {
        assert!(is_image(good), "{good}");
    }
    for bad in ["", "/web", "web/", "a//b", "Web", "web:1:2", "-web", "web:.1", "wéb"] {
        assert!(!is_image(bad), "{bad}");
    }
}

#[test]
fn a_job_takes_only_what_has_an_effect_on_it() {
    let job = json!({"name": "nightly", "namespace": "beta", "image": "web"});
    let mut application: Application = serde_json::from_value(job).unwrap();
    assert_eq!(application.check_for_job(), Ok(()));
    application.replicas = Some(1);
    assert_eq!(application.check_for_job(), Err("replicas: a job has none".into()));
}
