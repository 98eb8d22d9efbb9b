//! Makes the fixtures of a version with its own program: see `fixtures/README.md`.

use std::path::Path;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use sqlx::Row as _;

use super::fixture::{DIR, Fixture, metrics};
use super::{
    PLAN_CASES, agent_names, before, control_plane_names, events_waiting, install, lists, machine,
    node_names, plan_case, with_unreachable_broker,
};
use crate::control_plane::DATA;
use crate::operations::{apply, deployment, submit, wait_for_state};
use crate::support::Sandbox;
use crate::world::serve_kube;

/// 2099: what a fixture holds must not run out.
const FAR: i64 = 4_070_908_800;

/// Every time at which something ends, also inside of lists.
fn stretch(value: &mut Value) {
    match value {
        Value::Object(map) => {
            for (key, value) in map {
                match key.as_str() {
                    "expires_at" if value.is_i64() => *value = FAR.into(),
                    "expires_at" if value.is_string() => *value = "2099-01-01T00:00:00Z".into(),
                    // an operation is forgotten some days after its last change
                    "changed_at" => *value = FAR.into(),
                    _ => stretch(value),
                }
            }
        }
        Value::Array(items) => items.iter_mut().for_each(stretch),
        _ => {}
    }
}

async fn stretch_database(file: &Path) {
    sqlx::any::install_default_drivers();
    let pool = sqlx::AnyPool::connect(&format!("sqlite:{}?mode=rw", file.display())).await.unwrap();
    for row in sqlx::query("SELECT kind, id, body FROM pipeops_row").fetch_all(&pool).await.unwrap()
    {
        let (kind, id, body): (String, String, String) = (row.get(0), row.get(1), row.get(2));
        let mut value: Value = serde_json::from_str(&body).unwrap();
        stretch(&mut value);
        if kind == "agent" {
            value["info"]["hostname"] = "vm1".into();
        }
        let change = sqlx::query("UPDATE pipeops_row SET body = $1 WHERE kind = $2 AND id = $3");
        change.bind(value.to_string()).bind(kind).bind(id).execute(&pool).await.unwrap();
    }
    sqlx::query("UPDATE pipeops_outbox SET at = $1").bind(FAR).execute(&pool).await.unwrap();
    sqlx::query("VACUUM").execute(&pool).await.unwrap();
    pool.close().await;
}

/// A control plane with everything that it can hold, and an agent that the control plane left while
/// an operation ran.
async fn both(fixture: &Fixture, program: &Path) {
    let mut control_plane = with_unreachable_broker(Sandbox::of(program));
    let first =
        std::fs::read_to_string(control_plane.sandbox.root().join(DATA).join("admin-token"))
            .unwrap();
    control_plane.admin.clone_from(&first);
    let (kube, address) = serve_kube().await;
    kube.ready.store(true, Relaxed);
    let (mut agent, cluster) = control_plane.agent(address).await;
    let other = control_plane
        .json("POST", "/api/v1/projects", &first, json!({"name": "other"}))
        .await["id"]
        .as_str()
        .unwrap()
        .to_owned();
    let make = async |what: &str, body: Value| {
        control_plane.json("POST", &format!("/api/v1/{what}"), &first, body).await
    };
    let admin = make("admins", json!({"name": "second"})).await;
    let runner = make(
        "runners",
        json!({"name": "deployer", "role": "deployer", "namespaces": ["beta", "production"]}),
    )
    .await;
    let elsewhere =
        make("runners", json!({"name": "elsewhere", "project": other, "ttl_s": 3600})).await;
    let revoked = make("runners", json!({"name": "revoked"})).await;
    control_plane
        .json(
            "DELETE",
            &format!("/api/v1/runners/{}", revoked["id"].as_str().unwrap()),
            &first,
            json!({}),
        )
        .await;
    let enrolment = make("tokens", json!({"name": "for two", "uses": 2})).await;
    let token = runner["token"].as_str().unwrap().to_owned();
    let kubeconfig = control_plane
        .json(
            "POST",
            &format!("/api/v1/clusters/{cluster}/kubeconfig"),
            &token,
            json!({"namespaces": ["beta"]}),
        )
        .await;
    // one that is done, one that runs
    let (_, done) =
        submit(&control_plane, &cluster, &token, "done", &apply(&[deployment("done")])).await;
    let id = |operation: &Value| operation["id"].as_str().unwrap().to_owned();
    wait_for_state(&control_plane, &cluster, &token, &id(&done), "succeeded").await;
    kube.ready.store(false, Relaxed);
    let (_, running) =
        submit(&control_plane, &cluster, &token, "running", &apply(&[deployment("running")])).await;
    wait_for_state(&control_plane, &cluster, &token, &id(&running), "running").await;
    control_plane
        .json(
            "GET",
            &format!("/clusters/{cluster}/k8s/api/v1/namespaces/beta/pods"),
            &token,
            json!({}),
        )
        .await;
    fixture.write(
        "control-plane.metrics",
        &metrics(
            &control_plane.ask("GET", "/metrics", &first, json!({})).await.text().await.unwrap(),
        ),
    );
    fixture.write(
        "agent.metrics",
        &metrics(
            tokio::task::block_in_place(|| agent.get("/metrics")).split_once("\r\n\r\n").unwrap().1,
        ),
    );
    // the end of the one that runs has nobody to hear it
    control_plane.stop();
    kube.ready.store(true, Relaxed);
    let begun = Instant::now();
    let queue = agent.sandbox.root().join("var/lib/pipeops-agent/queue");
    while !std::fs::read_dir(&queue)
        .unwrap()
        .any(|entry| entry.unwrap().file_name().to_string_lossy().contains("-result-"))
    {
        assert!(begun.elapsed() < Duration::from_secs(40), "no result in {}", queue.display());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(agent.child.id().try_into().unwrap()),
        nix::sys::signal::Signal::SIGTERM,
    )
    .unwrap();
    tokio::task::block_in_place(|| agent.child.wait().unwrap());
    // and one waits for the agent
    control_plane.start_again();
    let mut waits = apply(&[deployment("waits")]);
    waits["ttl_s"] = 3600.into();
    let (status, waits) = submit(&control_plane, &cluster, &token, "waits", &waits).await;
    assert_eq!((status, &waits["state"]), (202, &json!("queued")), "{waits}");
    control_plane.stop();

    stretch_database(&control_plane.sandbox.root().join(DATA).join("pipeops.db")).await;
    let kept = agent.sandbox.root().join("var/lib/pipeops-agent/credential.json");
    let mut credential: Value =
        serde_json::from_str(&std::fs::read_to_string(&kept).unwrap()).unwrap();
    stretch(&mut credential);
    std::fs::write(&kept, credential.to_string()).unwrap();
    control_plane.start_again();
    let text = |value: &Value| value["token"].as_str().unwrap().to_owned();
    let said = json!({"cluster": cluster, "tokens": {"first_admin": first,
        "second_admin": text(&admin), "runner": token, "elsewhere": text(&elsewhere),
        "revoked": text(&revoked), "enrolment": text(&enrolment),
        "kubeconfig": kubeconfig["users"][0]["user"]["token"]},
        "events_waiting": events_waiting(&control_plane, 1).await,
        "operations": {"done": id(&done), "running": id(&running), "waits": id(&waits)},
        "lists": lists(&control_plane, &first, &cluster).await});
    control_plane.stop();
    fixture.write_json("control-plane.json", &said);
    fixture.keep(
        "control-plane",
        &control_plane.sandbox,
        &[DATA],
        &control_plane_names(&control_plane),
    );
    fixture.keep(
        "agent",
        &agent.sandbox,
        &["etc/pipeops", "var/lib/pipeops-agent"],
        &agent_names(&control_plane, &agent.sandbox),
    );
}

/// What an install leaves, and a plan with what became of it.
fn node(fixture: &Fixture, program: &Path) {
    let sandbox = machine(program);
    install(&sandbox, &[]).ended(0);
    let places = [
        "etc",
        "home",
        "run/fake-nft",
        "run/fake-systemd",
        "run/pipeops-credential",
        "usr",
        "var/lib",
    ];
    fixture.keep("node", &sandbox, &places, &node_names(&sandbox));
    fixture.write_json("node-objects.json", &json!(*sandbox.api.objects.lock().unwrap()));

    let sandbox = machine(program);
    let plan = sandbox.path("plan.json");
    install(&sandbox, &["--plan-out", &plan]).ended(0);
    let text = super::fixture::renamed(
        &std::fs::read_to_string(&plan).unwrap(),
        &node_names(&sandbox),
        false,
    );
    fixture.write("plan.json", &text);
    let outcomes: serde_json::Map<String, Value> = PLAN_CASES
        .iter()
        .map(|case| ((*case).to_owned(), plan_case(case, program, fixture)))
        .collect();
    fixture.write_json("plan-outcomes.json", &outcomes.into());
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "makes the fixtures of the version that PIPEOPS_TEST_BEFORE names"]
async fn makes_the_fixtures_of_a_version() {
    let Some(program) = before("the fixtures of a version") else { return };
    let name = std::env::var("PIPEOPS_TEST_FIXTURE")
        .expect("PIPEOPS_TEST_FIXTURE names the directory below tests/it/fixtures");
    let fixture = Fixture { dir: Path::new(DIR).join(name) };
    let _ = std::fs::remove_dir_all(&fixture.dir);
    both(&fixture, &program).await;
    tokio::task::block_in_place(|| node(&fixture, &program));
}
