//! What is sealed: for whom it is opened, and whose key it is sealed to.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use super::{CANARY, Jobs, answer_of, restart, text};

/// Who makes a job is known from its token alone, and before anything is opened: what another one
/// sealed is opened for nobody else.
#[tokio::test(flavor = "multi_thread")]
async fn it_is_told_for_whom_something_is_sealed_and_nothing_happens_until_it_is_opened() {
    let mut jobs = Jobs::new().await;
    let sealed = STANDARD.encode([9; 60]);
    let mut job = restart(&jobs.agent.cluster);
    job["spec"]["note"] = json!({"sealed": sealed});
    let body = job.to_string();
    let issued = jobs.issued(&body, json!({})).await;
    assert_eq!(issued["maker"], jobs.maker_id);
    let (token, id) = (text(&issued["token"]), text(&issued["id"]));
    for brought in [jobs.bring(&token, &body).await, jobs.again(&token, &body).await] {
        let expected = json!({"id": id, "state": "sealed", "sealed": true,
            "maker": jobs.maker_id, "answered": false});
        assert_eq!(brought, (202, expected));
    }
    let path = format!("/api/v1/jobs/{id}");
    assert_eq!(jobs.control_plane.try_get(&path, &jobs.runner).await.status(), 404);
    assert!(jobs.asked().is_empty());
    jobs.killed().await;
    let request = json!({"token": token, "message": body, "opened": {&sealed: CANARY}});
    let (status, taken) = jobs.bring_as(&jobs.runner, request.clone()).await;
    assert_eq!((status, &taken["state"]), (202, &json!("running")), "{taken}");
    assert_eq!(jobs.asked()[0].body["spec"]["note"], CANARY);
    // once it has begun it need not be opened again
    let (status, same) = jobs.again(&token, &body).await;
    assert_eq!((status, &same["operation"]["id"]), (202, &taken["operation"]["id"]), "{same}");
    assert_eq!(jobs.asked().len(), 1);
    // opened wrongly it is no job, and one that may not be done is refused before it is opened
    let body = body.replacen("web", "other", 1);
    let token = jobs.token(&body).await;
    let request = json!({"token": token, "message": body, "opened": {"another": CANARY}});
    let (status, refused) = jobs.bring_as(&jobs.runner, request).await;
    assert_eq!((status, &refused["code"]), (400, &json!("bad_job")), "{refused}");
    job["cluster"] = "nope".into();
    let body = job.to_string();
    let (status, refused) = jobs.bring(&jobs.token(&body).await, &body).await;
    assert_eq!((status, &refused["code"]), (404, &json!("cluster_unknown")), "{refused}");
    assert!(!jobs.log().contains(CANARY));
}

/// Long values are longer as text in JSON.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_opened_may_be_six_times_as_long_in_the_call() {
    let jobs = Jobs::new().await;
    let sealed = STANDARD.encode([9; 60]);
    let mut job = restart("nope");
    job["spec"]["note"] = json!({"sealed": sealed});
    let body = job.to_string();
    let long = "\u{1}".repeat(700_000);
    let request = json!({"token": jobs.token(&body).await, "message": body,
        "opened": {&sealed: long}});
    let (status, refused) = jobs.bring_as(&jobs.runner, request).await;
    assert_eq!((status, &refused["code"]), (404, &json!("cluster_unknown")), "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_project_has_one_sealing_key_and_all_who_make_jobs_know_it() {
    let mut jobs = Jobs::new().await;
    let path = "/api/v1/sealing-key";
    let control_plane = &jobs.control_plane;
    assert_eq!(control_plane.try_get(path, &jobs.maker).await.status(), 404);
    let (one, two) = (STANDARD.encode([1; 32]), STANDARD.encode([2; 32]));
    let put = async |path: &str, body: Value| {
        answer_of(control_plane.ask("PUT", path, &jobs.runner, body).await).await
    };
    let key = |key: &str| json!({"public_key": key});
    for wrong in ["", "x", &STANDARD.encode([1; 31]), &STANDARD.encode([1; 33])] {
        assert_eq!(put(path, key(wrong)).await.0, 400, "{wrong}");
    }
    let project = text(&jobs.issued("{}", json!({})).await["project"]);
    // the token of another project's Runner, by mistake
    let (status, foreign) = put(path, json!({"public_key": two, "project": "p-9"})).await;
    assert_eq!((status, &foreign["code"]), (409, &json!("project_foreign")), "{foreign}");
    assert_eq!(control_plane.try_get(path, &jobs.maker).await.status(), 404);
    assert_eq!(put(path, json!({"public_key": one, "project": project})).await.0, 204);
    assert_eq!(put(path, key(&one)).await.0, 204);
    for path in [path, "/api/v1/sealing-key?replace=true"] {
        let (status, differs) = put(path, key(&two)).await;
        assert_eq!((status, &differs["code"]), (409, &json!("sealing_key_differs")), "{differs}");
    }
    // another one is up to administrators
    let reset = format!("/api/v1/projects/{project}/sealing-key");
    for other in [&jobs.runner, &jobs.maker] {
        assert_eq!(control_plane.ask("DELETE", &reset, other, json!({})).await.status(), 403);
    }
    let words = ["control-plane", "project", "reset-sealing-key", &project];
    control_plane.sandbox.subcommand(&words).ended(0);
    assert_eq!(control_plane.try_get(path, &jobs.maker).await.status(), 404);
    let admin = &control_plane.admin;
    assert_eq!(control_plane.ask("DELETE", &reset, admin, json!({})).await.status(), 200);
    let unknown = "/api/v1/projects/none/sealing-key";
    assert_eq!(control_plane.ask("DELETE", unknown, admin, json!({})).await.status(), 404);
    assert_eq!(put(path, key(&two)).await.0, 204);
    jobs.killed().await;
    let known = jobs.control_plane.get(path, &jobs.maker).await;
    assert_eq!(known, json!({"public_key": two, "project": project, "maker": jobs.maker_id}));
    assert_eq!(jobs.issued("{}", json!({})).await["sealing_key"], two);
    assert!(jobs.log().contains("the sealing key is forgotten"), "{}", jobs.log());
}
