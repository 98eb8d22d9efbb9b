//! Each way in which a job is refused: with its code, before anything is done.

use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use pipeops::agent::session::identity::Identity;
use serde_json::{Value, json};

use super::{CANARY, Jobs, Signer, for_jobs, restart, text};
use crate::control_plane::SimulatedAgent;
use crate::operations::{apply, deployment};
use crate::tenant_tokens::{Record, RecordingAgent, make, part, register};

type Change<'a> = &'a dyn Fn(&mut Value, &mut Value);

impl Jobs {
    /// It is refused so, nothing was done, and nothing of it is repeated.
    fn refused(&self, what: &str, brought: (u16, Value), expected: (u16, &str)) {
        let (status, answer) = brought;
        assert_eq!((status, &answer["code"]), (expected.0, &json!(expected.1)), "{what}: {answer}");
        assert!(!answer.to_string().contains(CANARY), "{what}: {answer}");
        assert!(self.asked().is_empty(), "{what}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_is_not_one_for_this_job_here_and_now() {
    let jobs = Jobs::new().await;
    let control_plane = &jobs.control_plane;
    let cluster = jobs.agent.cluster.as_str();
    let body = restart(cluster).to_string();
    let token = jobs.token(&body).await;
    let (genuine, other) = (Signer::genuine(control_plane), Signer::other());
    assert_eq!(part(&token, 0)["kid"], genuine.kid());
    let changed = |signer: &Signer, change: Change<'_>| {
        let (mut head, mut claims) = (part(&token, 0), part(&token, 1));
        change(&mut head, &mut claims);
        signer.sign(&head, &claims)
    };
    let project =
        control_plane.json("POST", "/api/v1/projects", &control_plane.admin, json!({"name": "b"}));
    let project = text(&project.await["id"]);
    let past = jiff::Timestamp::now().as_second() - 5;
    let forged = (403, "token_forged");
    let agent = jobs.agent.id.clone();
    for (what, token, expected) in [
        ("another key", changed(&other, &|_, _| ()), forged),
        ("another key by its id", changed(&other, &|h, _| h["kid"] = other.kid().into()), forged),
        ("an id that is unknown", changed(&genuine, &|h, _| h["kid"] = "none".into()), forged),
        ("no id", changed(&genuine, &|h, _| h["kid"] = Value::Null), forged),
        ("alg none", changed(&genuine, &|h, _| h["alg"] = "none".into()), forged),
        ("alg HS256", changed(&genuine, &|h, _| h["alg"] = "HS256".into()), forged),
        ("another audience", changed(&genuine, &|_, c| c["aud"] = agent.as_str().into()), forged),
        ("another type", changed(&genuine, &|h, _| h["typ"] = "JWT".into()), forged),
        ("another issuer", changed(&genuine, &|_, c| c["iss"] = "cp".into()), forged),
        ("no maker", changed(&genuine, &|_, c| c["maker"] = Value::Null), forged),
        ("a claim of a tenant alone", changed(&genuine, &|_, c| c["tenant"] = "a".into()), forged),
        ("expired", changed(&genuine, &|_, c| c["exp"] = past.into()), (403, "token_expired")),
        (
            "another project",
            changed(&genuine, &|_, c| c["project"] = project.as_str().into()),
            (403, "project_foreign"),
        ),
        (
            "another maker's reach",
            changed(&genuine, &|_, c| c["role"] = "admin".into()),
            (403, "maker_revoked"),
        ),
        (
            "a maker that is none",
            changed(&genuine, &|_, c| c["maker"] = "admin:local".into()),
            (403, "maker_revoked"),
        ),
        ("cut", token[..token.len() - 3].to_owned(), forged),
        ("without a signature", token.rsplit_once('.').unwrap().0.to_owned() + ".", forged),
        ("empty", String::new(), forged),
        ("long", "x".repeat(100_000), forged),
    ] {
        jobs.refused(what, jobs.bring(&token, &body).await, expected);
    }
    // a caller token in its place, and the token of a Runner
    let path = format!("/api/v1/clusters/{cluster}/token");
    let caller = control_plane.json("POST", &path, &jobs.maker, json!({})).await;
    for other in [text(&caller["token"]), jobs.maker.clone()] {
        jobs.refused("no token of a job", jobs.bring(&other, &body).await, forged);
    }
    // any other body than the one that was signed for, also one that means the same
    for other in [format!("{body} "), body.replacen("beta", "shop", 1), String::new()] {
        let brought = jobs.bring(&token, &other).await;
        assert!(brought.1.get("job").is_none(), "nobody speaks for a job by its token alone");
        jobs.refused("another body", brought, (403, "body_changed"));
    }
    // of another project's Runner
    let mut far = for_jobs("far");
    far["project"] = project.as_str().into();
    let (_, foreign) = make(control_plane, far).await;
    let brought = jobs.bring_as(&foreign, json!({"token": token, "message": body})).await;
    jobs.refused("a foreign Runner", brought, (403, "project_foreign"));
    // the maker is gone
    let second = jobs.token(&body).await;
    let revoke = ["control-plane", "runner", "revoke", &jobs.maker_id];
    control_plane.sandbox.subcommand(&revoke).ended(0);
    let brought = jobs.bring(&second, &body).await;
    jobs.refused("a maker that was revoked", brought, (403, "maker_revoked"));
    let log = jobs.log();
    let signature = token.rsplit_once('.').unwrap().1;
    assert!(!log.contains(CANARY) && !log.contains(signature), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_goes_beyond_its_token_or_says_nothing_sensible() {
    let jobs = Jobs::new().await;
    let cluster = jobs.agent.cluster.as_str();
    let dir = tempfile::tempdir().unwrap();
    let enrolment = jobs.control_plane.enrol().0;
    let away = SimulatedAgent::new(&jobs.control_plane, dir.path(), &enrolment).await;
    let away = text(&jobs.control_plane.cluster_of(&away).await["id"]);
    let with = |name: &str, value: Value| {
        let mut job = restart(cluster);
        job[name] = value;
        job
    };
    let many = |name: &str, value: Value| {
        let mut job = with(name, value);
        job.as_object_mut().unwrap().remove("cluster");
        job
    };
    let long = "n".repeat(254);
    for (what, job, expected) in [
        ("another cluster", restart(&away), (403, "cluster_exceeded")),
        ("another among them", many("clusters", json!([cluster, away])), (403, "cluster_exceeded")),
        ("no such cluster", restart("nope"), (404, "cluster_unknown")),
        ("no such cluster of many", many("clusters", json!(["nope"])), (404, "cluster_unknown")),
        ("a cluster without end", restart(&long), (400, "bad_job")),
        ("no cluster", many("waves", json!("1")), (400, "bad_job")),
        ("two targets", with("all", json!(true)), (400, "bad_job")),
        ("an empty list", many("clusters", json!([])), (400, "bad_rollout")),
        ("a selector of nothing", many("selector", json!("a=b")), (400, "no_cluster_matches")),
        ("no selector", many("selector", json!("a=b,")), (400, "bad_selector")),
        ("waves of one", with("waves", json!("1,all")), (400, "bad_job")),
        ("an unknown field", with("more", json!(1)), (400, "bad_job")),
        ("a type that is another", with("kind", json!([CANARY])), (400, "bad_job")),
        ("a time that is none", with("ttl_s", json!(CANARY)), (400, "bad_job")),
        ("a time that is too long", with("ttl_s", json!(901)), (400, "bad_job")),
        ("a time that is over", with("ttl_s", json!(0)), (400, "bad_ttl")),
    ] {
        let body = job.to_string();
        let issued = jobs.issued(&body, json!({"clusters": [cluster]})).await;
        let token = text(&issued["token"]);
        let brought = jobs.bring(&token, &body).await;
        assert_eq!(brought.1["job"], issued["id"], "{what}");
        jobs.refused(what, brought, expected);
    }
    // no JSON at all, with a token that is good for it
    for body in ["", "{", "[]", "null", "\"text\"", &"[".repeat(5000)] {
        let token = jobs.token(body).await;
        jobs.refused(body, jobs.bring(&token, body).await, (400, "bad_job"));
    }
    // waves that say nothing
    let mut job = many("all", json!(true));
    job["waves"] = "all,1".into();
    let body = job.to_string();
    jobs.refused("waves", jobs.bring(&jobs.token(&body).await, &body).await, (400, "bad_waves"));
    // the call itself
    let body = restart(cluster).to_string();
    let token = jobs.token(&body).await;
    for request in [
        json!({"token": token, "message": body, "more": 1}),
        json!({"token": token}),
        json!({"token": token, "message": body, "redelivered": CANARY}),
        json!({"token": token, "message": body, "opened": {"a": [CANARY]}}),
        json!([]),
    ] {
        let brought = jobs.bring_as(&jobs.runner, request).await;
        assert!(brought.1.get("job").is_none());
        jobs.refused("the call", brought, (400, "bad_job"));
    }
    // what the agent refuses, in a code alone
    for (status, code, expected) in [
        (400, "bad_operation", (400, "bad_operation")),
        (403, "role_exceeded", (403, "role_exceeded")),
        (401, "unauthorized", (503, "agent_unready")),
        (429, "too_many_operations", (429, "too_many_operations")),
        (404, "not_found", (409, "not_found")),
        (409, "Not a code", (409, "refused")),
    ] {
        let planted = json!({"code": code, "message": format!("{CANARY} is no name")});
        let line = "POST /api/v1/operations";
        *jobs.agent.record.planted.lock().unwrap() = vec![(line, status, planted)];
        let token = jobs.token(&body).await;
        let (status, answer) = jobs.bring(&token, &body).await;
        assert_eq!((status, &answer["code"]), (expected.0, &json!(expected.1)), "{answer}");
        assert!(!answer.to_string().contains(CANARY), "{answer}");
    }
}

/// What can be sealed, and was not opened.
fn sealed() -> Value {
    json!({"sealed": STANDARD.encode([9; 60])})
}

#[tokio::test(flavor = "multi_thread")]
async fn the_value_of_a_secret_in_clear_is_refused_in_each_place() {
    let jobs = Jobs::new().await;
    let cluster = jobs.agent.cluster.as_str();
    let secret = |field: &str, value: Value| {
        json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s"},
            field: {"password": value}})
    };
    let clear = || json!(CANARY);
    let set = |field: &str, value: Value| {
        json!({"kind": "secret", "spec": {"action": "set", "namespace": "beta", "name": "s",
            field: {"password": value}}})
    };
    let list = json!({"kind": "List", "items": [secret("data", clear())]});
    let short = json!({"sealed": STANDARD.encode(CANARY)});
    let mut hidden = secret("data", clear());
    hidden["kind"] = sealed();
    for mut job in [
        set("data", clear()),
        set("binary", clear()),
        set("data", short.clone()),
        set("data", json!({"sealed": CANARY})),
        apply(&[secret("data", clear())]),
        apply(&[secret("stringData", clear())]),
        apply(&[secret("data", short)]),
        apply(&[deployment("web"), list]),
        apply(&[hidden]),
        json!({"kind": "later", "spec": {"deep": [[secret("data", clear())]]}}),
    ] {
        job["cluster"] = cluster.into();
        let body = job.to_string();
        let brought = jobs.bring(&jobs.token(&body).await, &body).await;
        jobs.refused(&body, brought, (400, "secret_in_clear"));
    }
    assert!(!jobs.log().contains(CANARY));
}

/// Whoever was told that it is refused does not find it done later.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_refused_for_good_is_not_done_when_it_comes_once_more() {
    let mut jobs = Jobs::new().await;
    let dir = tempfile::tempdir().unwrap();
    let identity: Arc<Identity> = SimulatedAgent::identity(dir.path()).into();
    let enrolment = jobs.control_plane.enrol().0;
    let registered = register(&jobs.control_plane, &identity, &enrolment, &[]).await;
    let body = restart(&registered.cluster_id).to_string();
    let issued = jobs.issued(&body, json!({})).await;
    let (token, id) = (text(&issued["token"]), text(&issued["id"]));
    let brought = jobs.bring(&token, &body).await;
    assert!(brought.1["hint"].as_str().unwrap().contains("ttl_s"), "{brought:?}");
    jobs.refused("an agent that is away", brought, (409, "agent_offline"));
    let shown = jobs.shown(&id).await;
    assert_eq!((&shown["state"], &shown["reason"]), (&json!("refused"), &json!("agent_offline")));
    let record = Arc::new(Record::default());
    let agent =
        RecordingAgent::connect(&jobs.control_plane, (identity, registered), record, dir).await;
    for _ in 0..2 {
        for again in [jobs.bring(&token, &body).await, jobs.again(&token, &body).await] {
            assert_eq!(again.1["job"], id, "{again:?}");
            jobs.refused("the same again", again, (409, "agent_offline"));
        }
        jobs.killed().await;
    }
    let seen = agent.record.seen.lock().unwrap();
    assert!(!seen.iter().any(|seen| seen.line.starts_with("POST")), "{seen:?}");
}
