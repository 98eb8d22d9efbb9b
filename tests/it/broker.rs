//! The control plane with a genuine RabbitMQ and PostgreSQL: Runners hear of every agent, whatever
//! dies on the way.

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use lapin::options::{BasicAckOptions, BasicConsumeOptions, QueueDeclareOptions};
use lapin::types::FieldTable;
use lapin::{Connection, ConnectionProperties};
use serde_json::{Value, json};

use crate::control_plane::{ControlPlane, DATA, SimulatedAgent, certificate, register_many};
use crate::fake_control_plane::free_port;
use crate::operations::secret;
use crate::rollouts::begin;
use crate::support::Sandbox;

/// One of Debian's services on ports of its own, ended with the test.
pub(crate) struct Service {
    name: &'static str,
    pub(crate) dir: tempfile::TempDir,
    pub(crate) url: String,
}

impl Service {
    /// None where its package is not installed; the output says so.
    pub(crate) fn start(name: &'static str) -> Option<Service> {
        Service::with(name, &[])
    }

    /// With files in its directory.
    fn with(name: &'static str, files: &[(&str, &str)]) -> Option<Service> {
        let mut service = Service { name, dir: tempfile::tempdir().unwrap(), url: String::new() };
        for (file, text) in files {
            std::fs::write(service.dir.path().join(file), text).unwrap();
        }
        // nobody else is given these while it starts, or while it is down
        let ports: Vec<_> = (0..4).map(|_| free_port().to_string()).collect();
        std::fs::write(service.dir.path().join("ports"), ports.join(" ") + "\n").unwrap();
        let (code, said) = service.script("start");
        if code == 3 {
            println!(
                "NOT RUN: {}: {}",
                std::thread::current().name().unwrap_or_default(),
                said.trim()
            );
            return None;
        }
        assert_eq!(code, 0, "{said}");
        service.url =
            std::fs::read_to_string(service.dir.path().join("url")).unwrap().trim().to_owned();
        Some(service)
    }

    pub(crate) fn script(&self, verb: &str) -> (i32, String) {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/services");
        let done = Command::new("bash")
            .args([script, self.name, verb])
            .arg(self.dir.path())
            .output()
            .unwrap();
        (done.status.code().unwrap_or(-1), String::from_utf8_lossy(&done.stderr).into_owned())
    }

    pub(crate) fn restart(&self) {
        let (code, said) = self.script("start");
        assert_eq!(code, 0, "{said}");
    }

    /// `rabbitmqctl` with these arguments; it must succeed.
    pub(crate) fn ctl(&self, args: &[&str]) -> String {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/services");
        let mut command = Command::new("bash");
        command.args([script, self.name, "ctl"]).arg(self.dir.path()).args(args);
        let done = command.output().unwrap();
        let said = String::from_utf8_lossy(&done.stderr);
        assert!(done.status.success(), "rabbitmqctl {args:?}: {said}");
        String::from_utf8_lossy(&done.stdout).into_owned()
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.script("kill");
    }
}

/// What a Runner hears: every copy on the wire, in its order.
#[derive(Clone, Debug)]
struct ReceivedEvent {
    id: String,
    seq: i64,
    topic: String,
    body: Value,
}

/// Consumes until `enough`, reconnecting as a Runner would.
async fn receive(
    url: &str,
    heard: &mut Vec<ReceivedEvent>,
    enough: impl Fn(&[ReceivedEvent]) -> bool,
) {
    let begun = Instant::now();
    while !enough(heard) {
        assert!(
            begun.elapsed() < Duration::from_secs(90),
            "not heard: {:?}",
            heard.iter().map(|h| (&h.topic, h.seq)).collect::<Vec<_>>()
        );
        let Ok(connection) = Connection::connect(url, ConnectionProperties::default()).await else {
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        let channel = connection.create_channel().await.unwrap();
        // whoever comes first declares it: both sides the same
        let durable = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
        channel
            .queue_declare("pipeops.runners".into(), durable, FieldTable::default())
            .await
            .unwrap();
        let mut consumer = channel
            .basic_consume(
                "pipeops.runners".into(),
                "test".into(),
                BasicConsumeOptions::default(),
                FieldTable::default(),
            )
            .await
            .unwrap();
        while !enough(heard) {
            let Ok(Some(Ok(delivery))) =
                tokio::time::timeout(Duration::from_secs(3), consumer.next()).await
            else {
                break;
            };
            let body: Value = serde_json::from_slice(&delivery.data).unwrap();
            let header = |name: &str| {
                delivery.properties.headers().as_ref().and_then(|h| h.inner().get(name).cloned())
            };
            let seq = body["agent_seq"].as_i64().unwrap();
            assert_eq!(header("agent_seq"), Some(lapin::types::AMQPValue::LongLongInt(seq)));
            assert_eq!(*delivery.properties.delivery_mode(), Some(2));
            let id = delivery.properties.message_id().as_ref().unwrap().to_string();
            assert_eq!(body["message_id"], id.as_str());
            assert_eq!(body["type"], delivery.routing_key.as_str());
            // the same in the words of CloudEvents
            for (name, value) in [
                ("specversion", "1.0".to_owned()),
                ("id", id.clone()),
                ("type", format!("io.pipeops.{}", delivery.routing_key)),
                ("source", format!("/projects/{}", body["project"].as_str().unwrap())),
                ("subject", body["cluster_id"].as_str().unwrap_or_default().to_owned()),
                ("time", body["at"].as_str().unwrap().to_owned()),
            ] {
                // what happened to no cluster has no subject
                let value = (!value.is_empty())
                    .then(|| lapin::types::AMQPValue::LongString(value.as_str().into()));
                assert_eq!(header(&format!("cloudEvents:{name}")), value);
            }
            heard.push(ReceivedEvent { id, seq, topic: delivery.routing_key.to_string(), body });
            delivery.ack(BasicAckOptions::default()).await.unwrap();
        }
        let _ = connection.close(200, "bye".into()).await;
    }
}

/// Without the copies; what is left must be in order for each agent.
fn without_copies(heard: &[ReceivedEvent]) -> Vec<ReceivedEvent> {
    let mut seen = HashSet::new();
    let all: Vec<ReceivedEvent> =
        heard.iter().filter(|h| seen.insert(h.id.clone())).cloned().collect();
    let mut last: HashMap<&str, i64> = HashMap::new();
    for h in &all {
        let before = last.insert(h.body["agent_id"].as_str().unwrap(), h.seq);
        assert!(before.is_none_or(|b| b < h.seq), "out of order: {h:?} after {before:?}");
    }
    all
}

fn events_of<'a>(heard: &'a [ReceivedEvent], topic: &str, agent: &str) -> Vec<&'a ReceivedEvent> {
    heard.iter().filter(|h| h.topic == topic && h.body["agent_id"] == agent).collect()
}

fn unlimited_token(control_plane: &ControlPlane) -> String {
    control_plane
        .sandbox
        .subcommand(&["control-plane", "token", "create", "--uses", "0"])
        .ended(0)
        .out
        .split_whitespace()
        .nth(1)
        .unwrap()
        .to_owned()
}

fn keys(value: &Value) -> Vec<&str> {
    let mut keys: Vec<&str> = value.as_object().unwrap().keys().map(String::as_str).collect();
    keys.sort_unstable();
    keys
}

#[tokio::test(flavor = "multi_thread")]
async fn runners_hear_of_every_agent_once_and_in_order_whatever_is_killed() {
    let Some(rabbit) = Service::start("rabbitmq") else { return };
    let mut control_plane = ControlPlane::with(&["--amqp-url", &rabbit.url]);
    // the password is on no command line
    let shown =
        std::fs::read_to_string(format!("/proc/{}/cmdline", control_plane.child.id())).unwrap();
    assert!(shown.contains("--amqp-url") && !shown.contains("guest"), "{shown}");
    let token = unlimited_token(&control_plane);
    let dir = tempfile::tempdir().unwrap();
    let mut tasks = register_many(&control_plane, dir.path(), &token, 120);
    let mut done = Vec::new();
    for round in 1..=4 {
        while done.len() < round * 20 {
            done.push(tasks.join_next().await.unwrap().unwrap());
        }
        match round {
            1 => drop(rabbit.script("kill")),
            // the broker is away, and the control plane dies with what waits
            2 => control_plane.kill_and_restart(),
            3 => rabbit.restart(),
            _ => {
                rabbit.script("stop");
                rabbit.restart();
            }
        }
    }
    while let Some(registered) = tasks.join_next().await {
        done.push(registered.unwrap());
    }
    let mut heard = Vec::new();
    let all = |heard: &[ReceivedEvent], topic: &str| {
        done.iter().all(|(id, _)| !events_of(heard, topic, id).is_empty())
    };
    receive(&rabbit.url, &mut heard, |h| all(h, "agent.registered") && all(h, "agent.online"))
        .await;
    let single = without_copies(&heard);
    for (id, credential) in &done {
        assert_eq!(
            (
                events_of(&single, "agent.registered", id).len(),
                events_of(&single, "agent.online", id).len()
            ),
            (1, 1),
            "{id}"
        );
        // the first of its events is the registration
        assert_eq!(
            single.iter().find(|h| h.body["agent_id"] == id.as_str()).unwrap().topic,
            "agent.registered"
        );
        assert!(heard.iter().all(|h| !h.body.to_string().contains(credential.as_str())));
    }
    println!(
        "{} agents, {} messages on the wire, {} of them copies",
        done.len(),
        heard.len(),
        heard.len() - single.len()
    );
    // all of it may have been published before the broker's last restart, and the control plane be
    // on its way back to it
    let begun = Instant::now();
    let metrics = loop {
        let metrics =
            control_plane.try_get("/metrics", &control_plane.admin).await.text().await.unwrap();
        if metrics.contains("pipeops_broker_up 1\n") {
            break metrics;
        }
        assert!(begun.elapsed() < Duration::from_secs(60), "{metrics}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    };
    assert!(metrics.contains("pipeops_events_dropped_total 0\n"), "{metrics}");
    assert!(
        !control_plane.log.lock().unwrap().contains("guest:guest"),
        "{}",
        control_plane.log.lock().unwrap()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn each_event_says_what_its_schema_says_and_nothing_secret() {
    let Some(rabbit) = Service::start("rabbitmq") else { return };
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), &rabbit.url).unwrap();
    // an agent that was there before there was a broker is told of when there is one
    let mut control_plane = ControlPlane::with(&[]);
    let token = unlimited_token(&control_plane);
    let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let early = SimulatedAgent::new(&control_plane, dirs[0].path(), &token).await;
    control_plane.set_options(&["--amqp-url-file", file.path().to_str().unwrap()]);
    control_plane.kill_and_restart();
    let agent = SimulatedAgent::new(&control_plane, dirs[1].path(), &token).await;
    let path = |call: &str| format!("/api/v1/agents/{}/{call}", agent.id);
    // of what an agent reports only the latest waits
    for count in 1..=3 {
        control_plane
            .json("POST", &path("status"), &agent.credential, json!({"at": format!("{count}")}))
            .await;
    }
    // the end of an operation, told again by an agent that did not hear the answer
    let operation = format!("o-{}", "0a".repeat(16));
    let end = json!({"id": operation, "kind": "apply", "state": "succeeded", "subject": "r-1",
        "message": "", "created_at": "c", "finished_at": "f",
        "objects": [{"object": "Deployment beta/web", "outcome": "ready"}]});
    for _ in 0..2 {
        control_plane
            .json(
                "POST",
                &path(&format!("operations/{operation}/result")),
                &agent.credential,
                end.clone(),
            )
            .await;
    }
    for wrong in ["o-1", "../status", operation.to_uppercase().as_str()] {
        let answer = control_plane
            .ask(
                "POST",
                &path(&format!("operations/{wrong}/result")),
                &agent.credential,
                end.clone(),
            )
            .await;
        assert!(matches!(answer.status().as_u16(), 400 | 404), "{wrong}: {}", answer.status());
    }
    let mut running = end.clone();
    running["state"] = "running".into();
    assert_eq!(
        control_plane
            .ask(
                "POST",
                &path(&format!("operations/{operation}/result")),
                &agent.credential,
                running
            )
            .await
            .status(),
        400
    );
    let mut heard = Vec::new();
    receive(&rabbit.url, &mut heard, |h| {
        !events_of(h, "agent.status", &agent.id).is_empty()
            && !events_of(h, "agent.online", &agent.id).is_empty()
    })
    .await;
    let cluster = events_of(&heard, "agent.registered", &agent.id)[0].body["cluster_id"]
        .as_str()
        .unwrap()
        .to_owned();
    control_plane
        .json(
            "POST",
            &format!("/api/v1/clusters/{cluster}/revoke"),
            &control_plane.admin,
            json!({}),
        )
        .await;
    receive(&rabbit.url, &mut heard, |h| !events_of(h, "agent.offline", &agent.id).is_empty())
        .await;
    control_plane
        .json("DELETE", &format!("/api/v1/clusters/{cluster}"), &control_plane.admin, json!({}))
        .await;
    receive(&rabbit.url, &mut heard, |h| !events_of(h, "agent.deregistered", &agent.id).is_empty())
        .await;
    let all = without_copies(&heard);
    assert_eq!(events_of(&all, "agent.registered", &early.id).len(), 1, "{all:?}");
    let common = [
        "agent_id",
        "agent_seq",
        "at",
        "cluster_id",
        "cluster_name",
        "message_id",
        "project",
        "type",
    ];
    for (topic, more) in [
        (
            "agent.registered",
            &["capabilities", "cluster_info", "endpoint", "max_role", "registered_at"][..],
        ),
        ("agent.online", &["endpoint"]),
        ("agent.offline", &["reason", "state"]),
        ("agent.deregistered", &[]),
        ("agent.status", &["status"]),
        ("operation.finished", &["operation"]),
    ] {
        let found = events_of(&all, topic, &agent.id);
        let last = found.last().unwrap_or_else(|| panic!("{topic} was not heard"));
        let mut expected = [&common[..], more].concat();
        expected.sort_unstable();
        assert_eq!(keys(&last.body), expected, "{topic}");
        assert!(
            !last.body.to_string().contains("poa_")
                && !last.body.to_string().contains("public_key"),
            "{}",
            last.body
        );
    }
    let offline = &events_of(&all, "agent.offline", &agent.id)[0].body;
    assert_eq!(
        (&offline["state"], &offline["reason"]),
        (&json!("revoked"), &json!("revoked by an administrator"))
    );
    assert_eq!(
        events_of(&all, "agent.registered", &agent.id)[0].body["endpoint"],
        format!("{}/clusters/{cluster}", control_plane.url)
    );
    let finished = events_of(&all, "operation.finished", &agent.id);
    assert_eq!((finished.len(), &finished[0].body["operation"]), (1, &end));
    // the order of one life
    let order: Vec<&str> = all
        .iter()
        .filter(|h| {
            h.body["agent_id"] == agent.id.as_str()
                && h.topic.starts_with("agent.")
                && h.topic != "agent.status"
        })
        .map(|h| h.topic.as_str())
        .collect();
    assert_eq!(order, ["agent.registered", "agent.online", "agent.offline", "agent.deregistered"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_result_of_a_rollout_is_told_once_and_without_what_was_asked_for() {
    let Some(rabbit) = Service::start("rabbitmq") else { return };
    let control_plane = ControlPlane::with(&["--amqp-url", &rabbit.url]);
    let dir = tempfile::tempdir().unwrap();
    let agent = SimulatedAgent::new(&control_plane, dir.path(), &control_plane.enrol().0).await;
    // it has said that it stops: nothing is tried again
    let path = format!("/api/v1/agents/{}/heartbeat", agent.id);
    let beat = json!({"seq": 1, "state": "draining"});
    control_plane.json("POST", &path, &agent.credential, beat).await;
    let body = json!({"kind": "apply", "spec": {"objects": [secret()]}, "all": true});
    let (status, taken) = begin(&control_plane, &control_plane.admin, "k", &body).await;
    assert_eq!(status, 202, "{taken}");
    let mut heard = Vec::new();
    receive(&rabbit.url, &mut heard, |h| !events_of(h, "rollout.finished", "").is_empty()).await;
    let all = without_copies(&heard);
    let told = events_of(&all, "rollout.finished", "");
    assert_eq!(told.len(), 1, "{told:?}");
    let body = &told[0].body;
    let fields = ["agent_id", "agent_seq", "at", "message_id", "project", "rollout", "type"];
    assert_eq!(keys(body), fields, "{body}");
    let rollout = &body["rollout"];
    assert_eq!((&rollout["id"], &rollout["state"]), (&taken["id"], &json!("failed")));
    assert_eq!(rollout["counts"]["failed"], 1);
    assert_eq!(rollout["message"], "0 of 1 clusters succeeded; not n (agent_offline)");
    assert!(rollout.get("clusters").is_none() && rollout.get("spec").is_none(), "{rollout}");
    assert!(!body.to_string().contains("canary-9911-in-plain-text"), "{body}");
}

#[tokio::test(flavor = "multi_thread")]
async fn over_tls_the_broker_must_show_the_certificate_that_was_named() {
    let ((mine, key), (other, _)) = (certificate(10), certificate(10));
    let Some(rabbit) =
        Service::with("rabbitmq", &[("tls.crt", &mine), ("tls.key", &key), ("other.crt", &other)])
    else {
        return;
    };
    let file = |name: &str| rabbit.dir.path().join(name).to_str().unwrap().to_owned();
    let (url, dirs) =
        (file("url-tls"), [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()]);
    let mut control_plane =
        ControlPlane::with(&["--amqp-url-file", &url, "--amqp-ca", &file("other.crt")]);
    let token = unlimited_token(&control_plane);
    let agent = SimulatedAgent::new(&control_plane, dirs[0].path(), &token).await;
    let begun = Instant::now();
    while !control_plane.log.lock().unwrap().contains("no message broker: events wait") {
        assert!(begun.elapsed() < Duration::from_secs(20), "{}", control_plane.log.lock().unwrap());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let metrics =
        control_plane.try_get("/metrics", &control_plane.admin).await.text().await.unwrap();
    assert!(metrics.contains("pipeops_broker_up 0\n"), "{metrics}");
    control_plane.set_options(&["--amqp-url-file", &url, "--amqp-ca", &file("tls.crt")]);
    control_plane.kill_and_restart();
    let mut heard = Vec::new();
    receive(&rabbit.url, &mut heard, |h| !events_of(h, "agent.registered", &agent.id).is_empty())
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn on_postgresql_nobody_who_was_answered_is_lost() {
    let Some(postgres) = Service::start("postgres") else { return };
    let mut control_plane = ControlPlane::with(&["--database-url", &postgres.url]);
    let password = postgres.url.split(['@', ':']).nth(2).unwrap().to_owned();
    let shown =
        std::fs::read_to_string(format!("/proc/{}/cmdline", control_plane.child.id())).unwrap();
    assert!(!shown.contains(&password), "{shown}");
    let token = unlimited_token(&control_plane);
    let dir = tempfile::tempdir().unwrap();
    let mut tasks = register_many(&control_plane, dir.path(), &token, 120);
    let mut done = Vec::new();
    for round in 1..=3 {
        while done.len() < round * 25 {
            done.push(tasks.join_next().await.unwrap().unwrap());
        }
        match round {
            1 => {
                postgres.script("kill");
                postgres.restart();
            }
            2 => control_plane.kill_and_restart(),
            _ => {
                postgres.script("stop");
                // without its database it goes on with what it knows, and takes nothing new
                let (id, credential) = &done[0];
                let beat = control_plane
                    .ask(
                        "POST",
                        &format!("/api/v1/agents/{id}/heartbeat"),
                        credential,
                        json!({"seq": 1}),
                    )
                    .await;
                assert_eq!(beat.status(), 200);
                // who asks for something that must be kept is told so in time
                let asked = Instant::now();
                let refused = control_plane
                    .ask("POST", "/api/v1/projects", &control_plane.admin, json!({"name": "none"}))
                    .await;
                assert_eq!(refused.json::<Value>().await.unwrap()["code"], "database_unavailable");
                println!(
                    "a write without a database is refused after {:.1} s",
                    asked.elapsed().as_secs_f32()
                );
                postgres.restart();
            }
        }
    }
    while let Some(registered) = tasks.join_next().await {
        done.push(registered.unwrap());
    }
    // another one on the same database is kept away while this one lives
    let other = Sandbox::new();
    other.put("/url", &postgres.url);
    let refused = other
        .run(&[
            "control-plane",
            "--listen",
            "127.0.0.1:0",
            "--tunnel-listen",
            "127.0.0.1:0",
            "--database-url-file",
            &other.path("root/url"),
        ])
        .ended(12);
    assert!(
        refused.err.contains("DATABASE_IN_USE") && !refused.err.contains(&password),
        "{}",
        refused.err
    );
    control_plane.kill_and_restart();
    let clusters = control_plane.clusters().await;
    assert_eq!(clusters["items"].as_array().unwrap().len(), 120);
    for (id, credential) in &done {
        let beat = control_plane
            .ask("POST", &format!("/api/v1/agents/{id}/heartbeat"), credential, json!({"seq": 1}))
            .await;
        assert_eq!(beat.status(), 200, "{id} holds a credential that is not known");
    }
    assert!(!control_plane.log.lock().unwrap().contains(&password));
    // a backup of it fills a SQLite file: the same control plane, elsewhere
    let backup = control_plane.sandbox.path("backup.json");
    control_plane.sandbox.subcommand(&["control-plane", "backup", &backup]).ended(0);
    let place = Sandbox::new();
    place.subcommand(&["control-plane", "restore", &backup]).ended(0);
    assert_eq!(
        std::fs::read(control_plane.sandbox.root().join(DATA).join("keys.json")).unwrap(),
        std::fs::read(place.root().join(DATA).join("keys.json")).unwrap()
    );
    let again = place.subcommand(&["control-plane", "restore", &backup]).ended(3);
    assert!(again.err.contains("NOT_EMPTY"), "{}", again.err);
    let restored = ControlPlane::on(place);
    let clusters = restored.get("/api/v1/clusters", &control_plane.admin).await;
    assert_eq!(clusters["items"].as_array().unwrap().len(), 120);
    let mode = std::os::unix::fs::PermissionsExt::mode(
        &std::fs::metadata(Path::new(&backup)).unwrap().permissions(),
    );
    assert_eq!(mode & 0o777, 0o600);
}
