//! What a job is, and what is none.

use serde_json::json;

use super::*;

fn job(kind: &str, spec: Value) -> Job {
    Job::parse(json!({"cluster": "c", "kind": kind, "spec": spec}).to_string().as_bytes()).unwrap()
}

fn sealed(byte: u8) -> Value {
    json!({"sealed": STANDARD.encode([byte; 60])})
}

#[test]
fn what_is_no_job_is_refused_and_its_values_are_not_repeated() {
    let good = json!({"cluster": "prod", "kind": "restart", "spec": {}, "ttl_s": 5});
    let read = Job::parse(good.to_string().as_bytes()).unwrap();
    assert!(read.is_operation() && read.kind == "restart" && read.ttl_s == Some(5));
    for (name, value) in [
        ("more", json!(1)),
        ("kind", json!(["planted-canary-4711-in-plain-text"])),
        ("kind", sealed(1)),
        ("kind", Value::Null),
        ("ttl_s", json!("planted-canary-4711-in-plain-text")),
        ("ttl_s", json!(MAX_TTL + 1)),
        ("cluster", Value::Null),
        ("clusters", json!(["a"])),
        ("selector", json!("a=b")),
        ("all", json!(true)),
        ("waves", json!("1,all")),
    ] {
        let mut body = good.clone();
        body[name] = value;
        let refusal = Job::parse(body.to_string().as_bytes()).map(|_| ()).unwrap_err();
        assert_eq!(refusal.code, BAD_JOB, "{body}");
        assert!(!refusal.message.contains("canary"), "{refusal:?}");
    }
    let mut many = json!({"kind": "restart", "spec": {}, "waves": "1,all"});
    for (name, value) in
        [("clusters", json!(["a"])), ("selector", json!("a=b")), ("all", json!(true))]
    {
        many[name] = value;
        assert!(!Job::parse(many.to_string().as_bytes()).unwrap().is_operation());
        many[name].take();
        if name == "all" {
            many[name] = json!(false);
        }
    }
    let list = r#"["prod", null, null, false, null, "restart", {}, 5]"#;
    for body in [list, "", "null", "[]", "{}", "\"x\"", "{\"spec\":", &"[".repeat(10_000)] {
        assert!(Job::parse(body.as_bytes()).is_err(), "{body}");
    }
    let long = json!({"cluster": "c", "kind": "apply", "spec": "x".repeat(MAX_BODY)}).to_string();
    assert!(Job::parse(long.as_bytes()).map(|_| ()).unwrap_err().message.contains("1 MiB"));
    assert!(Job::parse(&[0xff, 0xfe]).is_err());
}

#[test]
fn what_changes_one_application_is_in_one_partition_on_whatever_cluster() {
    let object = json!({"apiVersion": "apps/v1", "kind": "Deployment", "name": "web",
        "namespace": "prod"});
    let whole = json!({"apiVersion": "apps/v1", "kind": "Deployment",
        "metadata": {"name": "web", "namespace": "prod"}});
    let named = json!({"namespace": "prod", "name": "web"});
    let same = [
        job("deploy", json!({"application": {"name": "web", "namespace": "prod", "image": "i"}})),
        job("rollback", named.clone()),
        job("delete_application", named.clone()),
        job("job", json!({"application": {"name": "web", "namespace": "prod", "image": "i"}})),
        job("job", json!({"namespace": "prod", "cronjob": "web"})),
        job("secret", json!({"action": "set", "namespace": "prod", "name": "web"})),
        job("scale", json!({"object": object, "replicas": 2})),
        job("restart", json!({"object": object})),
        job("apply", json!({"objects": [whole, {"metadata": {"name": "other"}}]})),
        job("delete", json!({"objects": [object]})),
        Job { cluster: None, all: true, ..job("rollback", named.clone()) },
        Job { cluster: Some("other".into()), ..job("rollback", named) },
    ];
    for one in &same {
        assert_eq!(one.subject(), "prod/web", "{}", one.kind);
    }
    // a Runner of another version puts it there too
    assert_eq!(same[0].partition(), 0);
    assert_eq!(job("drain", json!({"node": "n1"})).subject(), "Node n1");
    assert_eq!(job("tenant", json!({"action": "set", "tenant": "acme"})).subject(), "Tenant acme");
    assert_eq!(job("x", json!({"objects": [{"metadata": {"name": "n"}}]})).subject(), "default/n");
    for odd in [json!(null), json!([1]), json!("text"), json!({"objects": []}), sealed(1)] {
        assert_eq!(job("x", odd).subject(), "x");
    }
    let mut used: Vec<u8> = Vec::new();
    for n in 0..200 {
        used.push(job("rollback", json!({"name": format!("a{n}"), "namespace": "p"})).partition());
    }
    assert!((0..PARTITIONS).all(|partition| used.contains(&partition)));
    assert!(used.iter().all(|partition| *partition < PARTITIONS));
}

#[test]
fn the_value_of_a_secret_in_clear_is_found_wherever_it_stands() {
    let secret = |field: &str, value: Value| {
        json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s"},
            field: {"password": value}})
    };
    let clear = json!("hunter2");
    let short = json!({"sealed": STANDARD.encode([1; MIN_SEALED - 1])});
    let set = |field: &str, value: &Value| {
        job(
            "secret",
            json!({"action": "set", "namespace": "n", "name": "s",
            field: {"a": sealed(1), "b": value}}),
        )
    };
    let apply = |object: Value| job("apply", json!({"objects": [{"kind": "Service"}, object]}));
    let wrapped = json!({"kind": "Secret", "data": clear});
    let key_called_so =
        json!({"kind": "Secret", "stringData": {"sealed": STANDARD.encode([1; 60])}});
    let mut applied = secret("data", sealed(1));
    applied["metadata"]["annotations"][LAST_APPLIED] = json!("{\"data\":{\"a\":\"aHVudGVyMg==\"}}");
    let mut hidden = secret("data", clear.clone());
    hidden["kind"] = sealed(2);
    for refused in [
        set("data", &clear),
        set("binary", &clear),
        set("data", &short),
        set("data", &json!({"sealed": "not base64"})),
        set("data", &json!({"sealed": STANDARD.encode([1; 60]), "more": 1})),
        set("data", &json!(["hunter2"])),
        job("secret", json!({"action": "set", "data": "hunter2"})),
        apply(secret("data", clear.clone())),
        apply(secret("stringData", clear.clone())),
        apply(json!({"kind": "List", "items": [secret("data", clear.clone())]})),
        apply(json!({"kind": "Template", "objects": {"deep": [[secret("data", clear.clone())]]}})),
        job("later", json!({"anything": [secret("data", clear.clone())]})),
        apply(wrapped),
        apply(key_called_so),
        apply(applied),
        apply(hidden),
    ] {
        assert_eq!(refused.check_secrets().unwrap_err().code, SECRET_IN_CLEAR, "{}", refused.spec);
    }
    for taken in [
        set("data", &sealed(3)),
        set("binary", &sealed(3)),
        job("secret", json!({"action": "delete", "namespace": "n", "name": "s"})),
        job("configmap", json!({"action": "set", "data": {"a": "plain"}})),
        apply(secret("data", sealed(1))),
        apply(json!({"kind": "ConfigMap", "data": {"a": "plain"}})),
        apply(json!({"kind": "Role", "rules": [{"resources": ["secrets"]}]})),
    ] {
        assert_eq!(taken.check_secrets(), Ok(()), "{}", taken.spec);
    }
}

#[test]
fn what_was_opened_stands_in_place_of_what_is_sealed() {
    let text = |byte: u8| STANDARD.encode([byte; 60]);
    let mut job = job(
        "apply",
        json!({"objects": [{"kind": "Secret", "data": {"a": sealed(1), "b": sealed(2)}},
            {"a": [sealed(1)]}, {"sealed": "x", "more": 1}]}),
    );
    assert_eq!(job.sealed(), BTreeSet::from([text(1).as_str(), text(2).as_str()]));
    let mut opened = BTreeMap::from([(text(1), Secret::new("one"))]);
    assert_eq!(job.open(&opened).unwrap_err().code, BAD_JOB);
    opened.insert(text(2), Secret::new("{\"sealed\": \"two\"}"));
    job.open(&opened).unwrap();
    assert_eq!(
        job.spec,
        json!({"objects": [{"kind": "Secret", "data": {"a": "one", "b": "{\"sealed\": \"two\"}"}},
            {"a": ["one"]}, {"sealed": "x", "more": 1}]})
    );
}

#[test]
fn names_are_those_of_the_topology() {
    assert_eq!(jobs_exchange("p-1"), "pipeops.jobs.p-1");
    assert_eq!(partitions_exchange("p-1"), "pipeops.jobs.p-1.partitions");
    assert_eq!(partition_queue("p-1", 7), "pipeops.jobs.p-1.7");
    assert_eq!(answers_exchange("p-1"), "pipeops.answers.p-1");
    assert_eq!(dead_exchange("p-1"), "pipeops.dead.p-1");
    assert_eq!(body_digest(b"").len(), 64);
    assert!(idempotency_key(&format!("j-{}", "0".repeat(32))).len() <= 128);
}
