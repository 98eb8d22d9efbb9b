//! What would hold up the jobs behind it: a cluster that is gone, an agent that never does it.

use std::time::{Duration, Instant};

use serde_json::json;

use super::{CANARY, Jobs, answer_of, restart, text};
use crate::control_plane::SimulatedAgent;

#[tokio::test(flavor = "multi_thread")]
async fn a_job_whose_cluster_is_gone_ends() {
    for direct in [false, true] {
        let maker = json!({"name": "maker", "role": "operator"});
        let jobs = Jobs::with(&["operation_tokens"], maker).await;
        let body = restart(&jobs.agent.cluster).to_string();
        let issued = jobs.issued(&body, json!({})).await;
        let (token, id) = (text(&issued["token"]), text(&issued["id"]));
        let request = json!({"token": token, "message": body, "direct": direct});
        let (_, taken) = jobs.bring_as(&jobs.runner, request.clone()).await;
        assert_eq!((&taken["state"], taken["direct"].is_object()), (&json!("running"), direct));
        let waiting = jobs.waiting(&id);
        tokio::time::sleep(Duration::from_millis(300)).await;
        let verb = if direct { "revoke" } else { "remove" };
        let words = ["control-plane", "cluster", verb, &jobs.agent.cluster];
        jobs.control_plane.sandbox.subcommand(&words).ended(0);
        let begun = Instant::now();
        let (status, ended) = answer_of(waiting.await.unwrap().unwrap()).await;
        assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
        assert_eq!((status, &ended["state"]), (200, &json!("interrupted")), "{ended}");
        assert_eq!(ended["operation"]["reason"], "cluster_gone", "{ended}");
        // it is not done somewhere else when it comes again
        let (status, same) = jobs.bring_as(&jobs.runner, request).await;
        assert_eq!((status, &same), (202, &ended));
        assert_eq!(jobs.asked().len(), usize::from(!direct));
    }
}

/// An agent that refuses whenever it is asked keeps nobody waiting for the life of a token.
#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_cannot_do_it_now_is_asked_for_a_while_and_then_it_is_refused() {
    let jobs = Jobs::new().await;
    let busy = json!({"code": "kubernetes_waiting", "message": CANARY});
    let plant = ("POST /api/v1/operations", 503, busy);
    jobs.agent.record.planted.lock().unwrap().push(plant);
    let body = restart(&jobs.agent.cluster).to_string();
    let issued = jobs.issued(&body, json!({})).await;
    let (token, id) = (text(&issued["token"]), text(&issued["id"]));
    let begun = Instant::now();
    let refused = loop {
        let (status, refused) = jobs.again(&token, &body).await;
        assert_eq!(refused["code"], "kubernetes_waiting", "{refused}");
        if status == 409 {
            break refused;
        }
        assert_eq!(status, 503, "{refused}");
        assert!(begun.elapsed() < Duration::from_secs(70), "{refused}");
        tokio::time::sleep(Duration::from_secs(1)).await;
    };
    assert!(begun.elapsed() > Duration::from_secs(20), "{:?}", begun.elapsed());
    assert_eq!(refused["job"], id);
    // then it stands, also when the agent would do it
    jobs.agent.record.planted.lock().unwrap().clear();
    let asked = jobs.asked().len();
    assert_eq!(jobs.again(&token, &body).await, (409, refused));
    assert_eq!(jobs.asked().len(), asked);
}

/// The agent that has it already may be called otherwise by now.
#[tokio::test(flavor = "multi_thread")]
async fn a_name_that_means_something_else_later_brings_a_job_to_no_other_cluster() {
    let maker = json!({"name": "maker", "role": "operator"});
    let jobs = Jobs::with(&["operation_tokens"], maker).await;
    let body = restart("n").to_string();
    let request = json!({"token": jobs.token(&body).await, "message": body, "direct": true});
    let (_, first) = jobs.bring_as(&jobs.runner, request.clone()).await;
    assert_eq!(first["direct"]["cluster_id"], jobs.agent.cluster, "{first}");
    let dir = tempfile::tempdir().unwrap();
    let enrolment = jobs.control_plane.enrol().0;
    let _other = SimulatedAgent::new(&jobs.control_plane, dir.path(), &enrolment).await;
    let (status, again) = jobs.bring_as(&jobs.runner, request).await;
    assert_eq!((status, &again["direct"]["cluster_id"]), (202, &json!(jobs.agent.cluster)));
    assert_eq!(again["direct"]["key"], first["direct"]["key"]);
    // one that comes first now does not know where to go
    let (status, refused) = jobs.bring(&jobs.token(&body).await, &body).await;
    assert_eq!((status, &refused["code"]), (409, &json!("name_ambiguous")), "{refused}");
}
