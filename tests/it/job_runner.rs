//! `pipeops runner` with a genuine RabbitMQ and a control plane in miniature, which counts what has
//! been done: each job once and with one answer, whatever is killed, refused or wrong.

use std::collections::{BTreeMap, HashSet};
use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use lapin::options::{
    BasicAckOptions, BasicConsumeOptions, BasicGetOptions, BasicPublishOptions,
    ConfirmSelectOptions, QueueBindOptions, QueueDeclareOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Connection, ConnectionProperties};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pipeops::contract::sealing::{SealingKey, seal};
use serde_json::{Value, json};

use crate::broker::Service;
use crate::fake_control_plane::listen;
use crate::support::{program, run_output};

const TOKEN: &str = "por_planted-canary-4711-in-plain-text";
const OTHER_TOKEN: &str = "por_other-planted-canary-4711-in-plain-text";
const PROJECT: &str = "p-1";

/// Whether a text has something in it that was planted as a secret, or in a spec.
fn leaks(text: &str) -> bool {
    ["canary-4711-in-plain-text", "canary-4711-in-the-spec", "guest:guest"]
        .iter()
        .any(|planted| text.contains(planted))
}

/// A job as the control plane in miniature knows it.
#[derive(Clone, Default)]
struct KnownJob {
    ended: bool,
    answered: bool,
}

#[derive(Default)]
struct ControlPlane {
    /// Runners that are known.
    tokens: Mutex<HashSet<&'static str>>,
    key: Mutex<String>,
    jobs: Mutex<BTreeMap<String, KnownJob>>,
    /// What was done, in its order: job, and what was opened of it.
    effects: Mutex<Vec<(String, Value)>>,
    /// Jobs end when they are asked for; otherwise they run.
    ends: Mutex<bool>,
    /// So many calls find nobody.
    away: Mutex<usize>,
    /// It is of the version before: no path of jobs is there.
    is_old: Mutex<bool>,
    calls: Mutex<Vec<String>>,
}

fn refuse(status: u16, code: &str) -> Response {
    let body = json!({"code": code, "message": "not this one"});
    (StatusCode::from_u16(status).unwrap(), axum::Json(body)).into_response()
}

/// Who makes all jobs.
const MAKER: &str = "r-maker";

fn refuse_job(status: u16, code: &str, job: &str) -> Response {
    let body = json!({"code": code, "message": "not this one", "job": job});
    (StatusCode::from_u16(status).unwrap(), axum::Json(body)).into_response()
}

/// The token of a job: its id, and who wants it refused.
fn job_token(id: &str, verdict: &str) -> String {
    let claims = URL_SAFE_NO_PAD.encode(json!({"jti": id, "verdict": verdict}).to_string());
    format!("planted-head.{claims}.planted-canary-4711-in-plain-text")
}

impl ControlPlane {
    fn known(&self, token: &str) -> bool {
        self.tokens.lock().unwrap().contains(token)
    }

    fn view(&self, id: &str) -> Response {
        let job = self.jobs.lock().unwrap()[id].clone();
        let state = if job.ended { "succeeded" } else { "running" };
        let operation = json!({"id": format!("o-{id}"), "state": state, "message": "",
            "created_at": "", "finished_at": "", "objects": [], "kind": "restart", "subject": "r"});
        axum::Json(json!({"id": id, "state": state, "answered": job.answered,
            "operation": operation}))
        .into_response()
    }

    fn submit(&self, body: &Value) -> Response {
        let claims = body["token"].as_str().unwrap().split('.').nth(1).unwrap();
        let claims: Value =
            serde_json::from_slice(&URL_SAFE_NO_PAD.decode(claims).unwrap()).unwrap();
        let id = claims["jti"].as_str().unwrap();
        match claims["verdict"].as_str().unwrap() {
            "" => {}
            forged @ "token_forged" => return refuse(403, forged),
            other => return refuse_job(409, other, id),
        }
        {
            let mut jobs = self.jobs.lock().unwrap();
            match jobs.get(id) {
                Some(job) if job.answered && body["redelivered"] == false => {
                    return refuse_job(409, "replayed", id);
                }
                Some(_) => {}
                None if body["message"].as_str().unwrap().contains("\"sealed\"")
                    && body["opened"].is_null() =>
                {
                    let sealed = json!({"id": id, "state": "sealed", "sealed": true,
                        "maker": MAKER});
                    return (StatusCode::ACCEPTED, axum::Json(sealed)).into_response();
                }
                None => {
                    let ended = *self.ends.lock().unwrap();
                    jobs.insert(id.to_owned(), KnownJob { ended, answered: false });
                    let effect = (id.to_owned(), body["opened"].clone());
                    self.effects.lock().unwrap().push(effect);
                }
            }
        }
        self.view(id)
    }

    /// Ends what runs, and what comes.
    fn end(&self) {
        *self.ends.lock().unwrap() = true;
        self.jobs.lock().unwrap().values_mut().for_each(|job| job.ended = true);
    }

    fn done(&self) -> Vec<String> {
        self.effects.lock().unwrap().iter().map(|(id, _)| id.clone()).collect()
    }

    async fn until(&self, what: &str, met: impl Fn(&ControlPlane) -> bool) {
        let begun = Instant::now();
        while !met(self) {
            let calls = self.calls.lock().unwrap();
            assert!(begun.elapsed() < Duration::from_secs(60), "never: {what}; {calls:?}");
            drop(calls);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

async fn answer(State(control_plane): State<Arc<ControlPlane>>, request: Request) -> Response {
    let call = format!("{} {}", request.method(), request.uri().path());
    let bearer = request.headers()["authorization"].to_str().unwrap().to_owned();
    let token = bearer.trim_start_matches("Bearer ").to_owned();
    let body = axum::body::to_bytes(request.into_body(), 4 << 20).await.unwrap();
    let body: Value = serde_json::from_slice(&body).unwrap_or_default();
    control_plane.calls.lock().unwrap().push(call.clone());
    {
        let mut away = control_plane.away.lock().unwrap();
        if *away > 0 {
            *away -= 1;
            return (StatusCode::BAD_GATEWAY, "<html>").into_response();
        }
    }
    if !control_plane.known(&token) {
        return refuse(401, "token_unknown");
    }
    if *control_plane.is_old.lock().unwrap() {
        return refuse(404, "not_found");
    }
    match call.split_once(' ').unwrap() {
        ("PUT", "/api/v1/sealing-key") => {
            if let Some(project) = body["project"].as_str().filter(|project| *project != PROJECT) {
                let message = format!("the token is of project {PROJECT}, not of {project}");
                let body = json!({"code": "project_foreign", "message": message});
                return (StatusCode::CONFLICT, axum::Json(body)).into_response();
            }
            let mut key = control_plane.key.lock().unwrap();
            let theirs = body["public_key"].as_str().unwrap();
            if !key.is_empty() && *key != theirs {
                return refuse(409, "sealing_key_differs");
            }
            theirs.clone_into(&mut key);
            StatusCode::NO_CONTENT.into_response()
        }
        ("GET", "/api/v1/sealing-key") => {
            let key = control_plane.key.lock().unwrap().clone();
            axum::Json(json!({"public_key": key, "project": PROJECT})).into_response()
        }
        ("POST", "/api/v1/jobs") => control_plane.submit(&body),
        ("POST", path) => {
            let id = path.strip_prefix("/api/v1/jobs/").unwrap().trim_end_matches("/answered");
            match control_plane.jobs.lock().unwrap().get_mut(id) {
                Some(job) => job.answered = true,
                None => return refuse(404, "not_found"),
            }
            StatusCode::NO_CONTENT.into_response()
        }
        (_, path) => {
            let id = path.strip_prefix("/api/v1/jobs/").unwrap().to_owned();
            let begun = Instant::now();
            while !control_plane.jobs.lock().unwrap()[&id].ended
                && begun.elapsed() < Duration::from_secs(20)
            {
                if !control_plane.known(&token) {
                    return refuse(401, "token_unknown");
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            control_plane.view(&id)
        }
    }
}

/// A control plane with two Runners, and where it is.
async fn control_plane() -> (Arc<ControlPlane>, String) {
    let control_plane = Arc::<ControlPlane>::default();
    control_plane.tokens.lock().unwrap().extend([TOKEN, OTHER_TOKEN]);
    let router = Router::new().fallback(answer);
    let address = listen(router, control_plane.clone()).await;
    (control_plane, format!("http://{address}"))
}

/// A Runner as systemd starts it.
struct RunnerProgram {
    child: Child,
    dir: tempfile::TempDir,
    log: Arc<Mutex<String>>,
}

impl Drop for RunnerProgram {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl RunnerProgram {
    fn start(control_plane: &str, amqp: &str, token: &str, more: &str) -> RunnerProgram {
        let dir = tempfile::tempdir().unwrap();
        let put = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
        put("token", token);
        put("amqp-url", amqp);
        // all Runners of a project have the same
        put("sealing-key", &base64::engine::general_purpose::STANDARD.encode([7; 32]));
        // with a pin no certificates of the system are needed
        let pin = format!("sha256:{}=", "A".repeat(43));
        put(
            "runner.toml",
            &format!(
                "control-plane-url = \"{control_plane}\"\ncontrol-plane-pin = [\"{pin}\"]\n{more}\n"
            ),
        );
        let log = Arc::default();
        let child = RunnerProgram::spawn(&dir, &log);
        RunnerProgram { child, dir, log }
    }

    fn spawn(dir: &tempfile::TempDir, log: &Arc<Mutex<String>>) -> Child {
        let mut child = Command::new(program())
            .args(["runner", "--config"])
            .arg(dir.path().join("runner.toml"))
            .env_clear()
            .env("CREDENTIALS_DIRECTORY", dir.path())
            .env("STATE_DIRECTORY", dir.path().join("state"))
            .env("LOG_LEVEL", "debug")
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // a log that nobody reads would stop it at its next line
        let mut lines = BufReader::new(child.stderr.take().unwrap());
        let kept = log.clone();
        std::thread::spawn(move || {
            let mut line = String::new();
            while lines.read_line(&mut line).is_ok_and(|n| n > 0) {
                kept.lock().unwrap().push_str(&std::mem::take(&mut line));
            }
        });
        child
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    fn start_again(&mut self) {
        self.child = RunnerProgram::spawn(&self.dir, &self.log);
    }

    fn log(&self) -> String {
        self.log.lock().unwrap().clone()
    }

    /// What `runner status` prints.
    fn status(&self) -> String {
        let mut command = Command::new(program());
        command.args(["runner", "status"]).env_clear();
        command.env("STATE_DIRECTORY", self.dir.path().join("state"));
        run_output(command.output().unwrap()).out
    }

    async fn until(&self, state: &str) -> String {
        let begun = Instant::now();
        loop {
            let status = tokio::task::block_in_place(|| self.status());
            if status.split([':', '\n']).next() == Some(state) {
                return status;
            }
            let log = self.log();
            assert!(begun.elapsed() < Duration::from_secs(60), "never {state}: {status}\n{log}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

/// A user of the broker who publishes and hears answers.
struct Publisher {
    _connection: Connection,
    channel: Channel,
}

impl Publisher {
    /// Comes back for as long as the broker starts.
    async fn new(url: &str) -> Publisher {
        let begun = Instant::now();
        loop {
            match Connection::connect(url, ConnectionProperties::default()).await {
                Ok(connection) => {
                    let channel = connection.create_channel().await.unwrap();
                    channel.confirm_select(ConfirmSelectOptions::default()).await.unwrap();
                    return Publisher { _connection: connection, channel };
                }
                Err(e) => assert!(begun.elapsed() < Duration::from_secs(60), "{e}"),
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    async fn publish(&self, body: &[u8], properties: BasicProperties) {
        let exchange = format!("pipeops.jobs.{PROJECT}");
        loop {
            let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
            let sent = self.channel.basic_publish(
                exchange.as_str().into(),
                "".into(),
                options,
                body,
                properties.clone(),
            );
            let confirmation = sent.await.unwrap().await.unwrap();
            // a queue that has no leader yet has not taken it
            if confirmation.is_ack() {
                assert!(confirmation.take_message().is_none(), "no queue is bound");
                return;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// A job for an application, with its token.
    async fn job(&self, id: &str, name: &str) {
        self.publish(&body(name), properties(id, "")).await;
    }

    /// Messages of a queue until `enough`.
    async fn hear(&self, queue: &str, enough: impl Fn(&[Heard]) -> bool) -> Vec<Heard> {
        let (begun, mut heard) = (Instant::now(), Vec::new());
        while !enough(&heard) {
            let got = self.channel.basic_get(queue.into(), BasicGetOptions::default()).await;
            match got.unwrap() {
                Some(message) => {
                    message.ack(BasicAckOptions::default()).await.unwrap();
                    let body = serde_json::from_slice(&message.data).unwrap();
                    heard.push(Heard { body, properties: message.properties.clone() });
                }
                None => tokio::time::sleep(Duration::from_millis(20)).await,
            }
            assert!(begun.elapsed() < Duration::from_secs(90), "not heard: {heard:?}");
        }
        heard
    }

    async fn answers(&self, enough: impl Fn(&[Heard]) -> bool) -> Vec<Heard> {
        self.hear(&format!("pipeops.answers.{PROJECT}"), enough).await
    }
}

#[derive(Debug)]
struct Heard {
    body: Value,
    properties: BasicProperties,
}

impl Heard {
    fn id(&self) -> String {
        self.properties.message_id().as_ref().unwrap().to_string()
    }

    fn header(&self, name: &str) -> String {
        match self.properties.headers().as_ref().unwrap().inner().get(name) {
            Some(AMQPValue::LongString(text)) => text.to_string(),
            other => panic!("{name}: {other:?}"),
        }
    }
}

/// Answers without the copies.
fn distinct(heard: &[Heard]) -> BTreeMap<String, &Value> {
    heard.iter().map(|heard| (heard.id(), &heard.body)).collect()
}

fn body(name: &str) -> Vec<u8> {
    let object = json!({"apiVersion": "apps/v1", "kind": "Deployment", "namespace": "beta",
        "name": name, "planted-in-the-spec": "canary-4711-in-the-spec"});
    json!({"cluster": "eu", "kind": "restart", "spec": {"object": object}}).to_string().into()
}

fn properties(id: &str, verdict: &str) -> BasicProperties {
    let mut headers = FieldTable::default();
    let token = AMQPValue::LongString(job_token(id, verdict).into());
    headers.insert("cloudEvents:pipeopstoken".into(), token);
    BasicProperties::default()
        .with_delivery_mode(2)
        .with_message_id(format!("m-{id}").into())
        .with_correlation_id(format!("c-{id}").into())
        .with_headers(headers)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_goes_to_its_answer_and_what_is_sealed_is_opened() {
    let Some(rabbit) = Service::start("rabbitmq") else { return };
    let (control_plane, url) = control_plane().await;
    control_plane.end();
    // nobody answers at first, and once in between
    *control_plane.away.lock().unwrap() = 2;
    let runner = RunnerProgram::start(&url, &rabbit.url, TOKEN, "events = true");
    runner.until("running").await;
    let publisher = Publisher::new(&rabbit.url).await;
    let event = json!({"type": "agent.online", "cluster_name": "eu-1"}).to_string();
    let told = publisher.channel.basic_publish(
        "".into(),
        "pipeops.runners".into(),
        BasicPublishOptions::default(),
        event.as_bytes(),
        BasicProperties::default(),
    );
    assert!(told.await.unwrap().await.unwrap().is_ack());
    let key = control_plane.key.lock().unwrap().clone();
    let private =
        SealingKey::parse(&base64::engine::general_purpose::STANDARD.encode([7; 32])).unwrap();
    assert_eq!(private.public(), key);

    // sealed by the command, as people do it
    let mut command = Command::new(program());
    command.args(["runner", "seal", "--key", &key, "--project", PROJECT, "--maker", MAKER]);
    command.env_clear();
    let mut sealing = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let value = "sealed-planted-canary-4711-in-plain-text";
    sealing.stdin.take().unwrap().write_all(format!("{value}\n").as_bytes()).unwrap();
    let sealed = run_output(sealing.wait_with_output().unwrap()).ended(0).out;
    let sealed = sealed.trim();
    let spec = json!({"action": "set", "namespace": "beta", "name": "db",
        "data": {"PASSWORD": {"sealed": sealed}}});
    let body = json!({"cluster": "eu", "kind": "secret", "spec": spec}).to_string();
    *control_plane.away.lock().unwrap() = 1;

    // to a queue of its own, under the name of the project's
    let queue = format!("pipeops.answers.{PROJECT}.mine");
    let own = QueueDeclareOptions { auto_delete: true, ..QueueDeclareOptions::default() };
    publisher
        .channel
        .queue_declare(queue.as_str().into(), own, FieldTable::default())
        .await
        .unwrap();
    let exchange = format!("pipeops.answers.{PROJECT}");
    publisher
        .channel
        .queue_bind(
            queue.as_str().into(),
            exchange.as_str().into(),
            queue.as_str().into(),
            QueueBindOptions::default(),
            FieldTable::default(),
        )
        .await
        .unwrap();
    publisher
        .publish(body.as_bytes(), properties("j-1", "").with_reply_to(queue.as_str().into()))
        .await;
    let heard = publisher.hear(&queue, |heard| !heard.is_empty()).await;
    let answer = &heard[0];
    assert_eq!(
        (&answer.body["job"], &answer.body["state"], &answer.body["cluster"]),
        (&json!("j-1"), &json!("succeeded"), &json!("eu")),
        "{}",
        answer.body
    );
    assert_eq!(answer.body["operation"]["id"], "o-j-1");
    assert_eq!(answer.id(), "answer-j-1");
    assert_eq!(answer.properties.correlation_id().as_ref().unwrap().as_str(), "c-j-1");
    for (name, value) in [
        ("specversion", "1.0"),
        ("type", "io.pipeops.job.answer"),
        ("id", "answer-j-1"),
        ("subject", "j-1"),
        ("source", "/projects/p-1"),
    ] {
        assert_eq!(answer.header(&format!("cloudEvents:{name}")), value);
    }
    control_plane.until("answered", |c| c.jobs.lock().unwrap()["j-1"].answered).await;
    assert_eq!(control_plane.effects.lock().unwrap()[0].1, json!({sealed: value}));

    // a reply queue that is gone: the project's own has the answer
    let gone = format!("pipeops.answers.{PROJECT}.gone");
    publisher.publish(&self::body("web"), properties("j-2", "").with_reply_to(gone.into())).await;
    let heard = publisher.answers(|heard| !heard.is_empty()).await;
    assert_eq!(heard[0].body["job"], "j-2");

    // sealed for another project, and for another maker
    for (project, maker, id) in [("p-2", MAKER, "j-3"), (PROJECT, "r-other", "j-4")] {
        let other = seal(&key, project, maker, value).unwrap();
        let spec = json!({"action": "set", "namespace": "beta", "name": "db",
            "data": {"PASSWORD": {"sealed": other}}});
        let body = json!({"cluster": "eu", "kind": "secret", "spec": spec}).to_string();
        publisher.publish(body.as_bytes(), properties(id, "")).await;
        let heard = publisher.answers(|heard| !heard.is_empty()).await;
        assert_eq!(heard[0].body["reason"], "sealed_unreadable", "{}", heard[0].body);
    }
    assert_eq!(control_plane.done(), ["j-1", "j-2"]);

    let log = runner.log();
    assert!(log.contains("heard agent.online") && log.contains("eu-1"), "{log}");
    assert!(!leaks(&log), "{log}");
    // what is sealed, the broker has on its disk; what it is, nobody has
    let found = Command::new("grep").args(["-rlF", value]).arg(rabbit.dir.path()).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&found.stdout), "");
    assert!(runner.status().starts_with("running"), "{}", runner.status());
}

#[tokio::test(flavor = "multi_thread")]
async fn jobs_of_an_application_keep_their_order_and_have_one_effect_whatever_is_killed() {
    let Some(rabbit) = Service::start("rabbitmq") else { return };
    let (control_plane, url) = control_plane().await;
    control_plane.end();
    let mut first = RunnerProgram::start(&url, &rabbit.url, TOKEN, "");
    first.until("running").await;
    let second = RunnerProgram::start(&url, &rabbit.url, OTHER_TOKEN, "concurrency = 2");
    second.until("running").await;
    let mut publisher = Publisher::new(&rabbit.url).await;
    let apps = ["web", "api", "db", "mail", "shop", "blog"];
    let id = |round: usize, app: &str| format!("j-{app}-{round:02}");
    for round in 0..12 {
        for app in apps {
            publisher.job(&id(round, app), app).await;
        }
        match round {
            3 => first.kill(),
            5 => first.start_again(),
            7 => {
                tokio::task::block_in_place(|| {
                    rabbit.script("kill");
                    rabbit.restart();
                });
                publisher = Publisher::new(&rabbit.url).await;
            }
            9 => *control_plane.away.lock().unwrap() = 5,
            10 => first.kill(),
            _ => {}
        }
    }
    first.start_again();
    let all = apps.len() * 12;
    let heard = publisher.answers(|heard| distinct(heard).len() >= all).await;
    let answers = distinct(&heard);
    assert!(answers.values().all(|answer| answer["state"] == "succeeded"), "{answers:?}");
    println!("{all} jobs, {} answers on the wire", heard.len());
    let done = control_plane.done();
    assert_eq!(done.len(), all, "an effect too many: {done:?}");
    for app in apps {
        let of: Vec<&String> =
            done.iter().filter(|id| id.starts_with(&format!("j-{app}-"))).collect();
        let expected: Vec<String> = (0..12).map(|round| id(round, app)).collect();
        assert_eq!(of, expected.iter().collect::<Vec<_>>());
    }
    // nothing is left, and nothing was a dead letter
    let dead = format!("pipeops.dead.{PROJECT}");
    let left = publisher.channel.basic_get(dead.as_str().into(), BasicGetOptions::default()).await;
    assert!(left.unwrap().is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_done_is_a_dead_letter_with_a_reason_and_stops_nobody() {
    let Some(rabbit) = Service::start("rabbitmq") else { return };
    let (control_plane, url) = control_plane().await;
    control_plane.end();
    let runner = RunnerProgram::start(&url, &rabbit.url, TOKEN, "project = \"p-1\"");
    runner.until("running").await;
    let publisher = Publisher::new(&rabbit.url).await;
    let plain = |id: &str| properties(id, "");
    let reply = |id: &str, queue: &str| plain(id).with_reply_to(queue.into());
    let unsigned = BasicProperties::default().with_message_id("m-unsigned".into());
    let mut odd = FieldTable::default();
    for (name, value) in [
        ("cloudEvents:pipeopstoken", AMQPValue::LongString(vec![0xff, 0xfe].into())),
        ("pipeops-token", AMQPValue::LongLongInt(7)),
        ("x-delivery-count", AMQPValue::LongString("many".into())),
    ] {
        odd.insert(name.into(), value);
    }
    let too_large = vec![b' '; (1 << 20) + 1];
    let not_utf8 = [b"{\"cluster\": \"".as_slice(), &[0xff, 0xfe], b"\"}"].concat();
    let cases: [(&[u8], BasicProperties, &str); 11] = [
        (b"", plain("j-1"), "bad_job"),
        (b"{", plain("j-2"), "bad_job"),
        (b"[1]", plain("j-3"), "bad_job"),
        (&not_utf8, plain("j-4"), "bad_job"),
        (&too_large, plain("j-5"), "bad_job"),
        (
            b"{\"cluster\": \"eu\", \"kind\": \"apply\", \"spec\": {}, \"more\": 1}",
            plain("j-6"),
            "bad_job",
        ),
        (b"{}", unsigned, "token_missing"),
        (b"{}", BasicProperties::default().with_headers(odd), "token_missing"),
        (b"{}", reply("j-7", "pipeops.answers.p-2"), "reply_queue_foreign"),
        (b"{}", reply("j-8", "amq.rabbitmq.reply-to"), "reply_queue_foreign"),
        (b"{}", reply("j-9", "pipeops.runners"), "reply_queue_foreign"),
    ];
    // a reader of answers directly to its connection, as RabbitMQ's direct reply-to needs one
    let direct = publisher
        .channel
        .basic_consume(
            "amq.rabbitmq.reply-to".into(),
            "".into(),
            BasicConsumeOptions { no_ack: true, ..BasicConsumeOptions::default() },
            FieldTable::default(),
        )
        .await
        .unwrap();
    for (body, properties, _) in &cases {
        publisher.publish(body, properties.clone()).await;
    }
    for (id, verdict) in [("j-10", "token_forged"), ("j-11", "token_expired")] {
        publisher.publish(&body("web"), self::properties(id, verdict)).await;
    }
    // none of them is in the way of a job, whatever else is in its properties
    let mut headers = properties("j-12", "").headers().clone().unwrap();
    headers
        .insert("CC".into(), AMQPValue::FieldArray(vec![AMQPValue::LongString("3".into())].into()));
    let user = BasicProperties::default()
        .with_user_id("guest".into())
        .with_headers(headers)
        .with_message_id("m".repeat(255).into());
    publisher.publish(&body("web"), user).await;
    let answered = |heard: &[Heard]| heard.iter().any(|heard| heard.body["job"] == "j-12");
    let answers = publisher.answers(answered).await;
    let dead = format!("pipeops.dead.{PROJECT}");
    let wanted = cases.len() + 2;
    let letters = publisher.hear(&dead, |heard| heard.len() >= wanted).await;
    let mut reasons: Vec<&str> =
        letters.iter().map(|letter| letter.body["reason"].as_str().unwrap()).collect();
    let mut expected: Vec<&str> = cases.iter().map(|(_, _, reason)| *reason).collect();
    expected.extend(["token_forged", "token_expired"]);
    reasons.sort_unstable();
    expected.sort_unstable();
    assert_eq!(reasons, expected);
    for letter in &letters {
        let text = letter.body.to_string();
        assert!(!leaks(&text), "{text}");
        assert_eq!(letter.header("cloudEvents:type"), "io.pipeops.job.dead");
        assert!(letter.body["size"].is_u64() && letter.body["sha256"].is_string(), "{text}");
    }
    let of = |reason: &str| letters.iter().find(|l| l.body["reason"] == reason).unwrap();
    assert_eq!(of("token_expired").body["job"], "j-11");
    assert_eq!(of("token_forged").body["job"], Value::Null);
    assert_eq!(of("token_expired").body["kind"], "restart");
    // whoever asked is told, where the queue is one of the project's
    let refused = answers.iter().filter(|answer| answer.body["state"] == "refused").count();
    assert!(refused >= cases.len() - 3, "{refused} refusals");
    assert!(answers.iter().all(|answer| answer.body["reason"] != "reply_queue_foreign"));
    drop(direct);

    // a job that is published again after its answer
    publisher.publish(&body("web"), properties("j-12", "")).await;
    let letters = publisher.hear(&dead, |heard| !heard.is_empty()).await;
    assert_eq!(letters[0].body["reason"], "replayed");
    assert_eq!(control_plane.done(), ["j-12"]);
    assert!(!leaks(&runner.log()), "{}", runner.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_runner_that_is_killed_stopped_or_revoked_in_the_middle_leaves_its_job_to_another() {
    let Some(rabbit) = Service::start("rabbitmq") else { return };
    let (control_plane, url) = control_plane().await;
    let mut first = RunnerProgram::start(&url, &rabbit.url, TOKEN, "");
    first.until("running").await;
    let publisher = Publisher::new(&rabbit.url).await;
    let runs = |id: &'static str| move |c: &ControlPlane| c.jobs.lock().unwrap().contains_key(id);
    let asked = |c: &ControlPlane, id: &str| {
        let path = format!("GET /api/v1/jobs/{id}");
        c.calls.lock().unwrap().iter().filter(|call| **call == path).count()
    };

    // killed between its call and the answer
    publisher.job("j-1", "web").await;
    control_plane.until("it runs", runs("j-1")).await;
    first.kill();
    control_plane.end();
    *control_plane.ends.lock().unwrap() = false;
    first.start_again();
    let heard = publisher.answers(|heard| !heard.is_empty()).await;
    assert_eq!(heard[0].id(), "answer-j-1");

    // SIGTERM: within its time, with 0, and the job goes to the next one
    publisher.job("j-2", "web").await;
    control_plane.until("it is waited for", |c| asked(c, "j-2") > 0).await;
    let begun = Instant::now();
    kill(Pid::from_raw(first.child.id().try_into().unwrap()), Signal::SIGTERM).unwrap();
    let code = tokio::task::block_in_place(|| first.child.wait().unwrap().code());
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    assert_eq!(code, Some(0), "{}", first.log());
    assert_eq!(first.status(), "");
    first.start_again();
    control_plane.until("it is waited for again", |c| asked(c, "j-2") > 1).await;

    // revoked: its job is another's within seconds, and it asks again by itself
    let second = RunnerProgram::start(&url, &rabbit.url, OTHER_TOKEN, "");
    second.until("running").await;
    let before = asked(&control_plane, "j-2");
    control_plane.tokens.lock().unwrap().remove(TOKEN);
    let begun = Instant::now();
    let status = first.until("token_revoked").await;
    assert!(status.contains("not this one"), "{status}");
    control_plane.until("the other one waits", |c| asked(c, "j-2") > before).await;
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    control_plane.end();
    let heard = publisher.answers(|heard| !heard.is_empty()).await;
    assert_eq!(heard[0].id(), "answer-j-2");
    assert_eq!(control_plane.done(), ["j-1", "j-2"]);
    // a new token in its file is enough
    std::fs::write(first.dir.path().join("token"), OTHER_TOKEN).unwrap();
    first.until("running").await;
    // and one that is revoked with nothing to do knows it as soon
    control_plane.tokens.lock().unwrap().clear();
    let begun = Instant::now();
    first.until("token_revoked").await;
    second.until("token_revoked").await;
    assert!(begun.elapsed() < Duration::from_secs(6), "{:?}", begun.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_maker_makes_at_the_broker_stops_nobody() {
    let Some(rabbit) = Service::start("rabbitmq") else { return };
    let (control_plane, url) = control_plane().await;
    control_plane.end();
    let runner = RunnerProgram::start(&url, &rabbit.url, TOKEN, "");
    runner.until("running").await;
    let publisher = Publisher::new(&rabbit.url).await;
    let channel = &publisher.channel;
    let (jobs, answers) = (format!("pipeops.jobs.{PROJECT}"), format!("pipeops.answers.{PROJECT}"));
    let bind = async |queue: &str, key: &str| {
        let (options, table) = (QueueBindOptions::default(), FieldTable::default());
        let bound =
            channel.queue_bind(queue.into(), answers.as_str().into(), key.into(), options, table);
        bound.await.unwrap();
    };
    // a queue for an answer that takes none
    let full = format!("{answers}.full");
    let mut arguments = FieldTable::default();
    arguments.insert("x-max-length".into(), AMQPValue::LongInt(0));
    arguments.insert("x-overflow".into(), AMQPValue::LongString("reject-publish".into()));
    let own = QueueDeclareOptions { auto_delete: true, ..QueueDeclareOptions::default() };
    channel.queue_declare(full.as_str().into(), own, arguments).await.unwrap();
    bind(&full, &full).await;
    let properties = properties("j-1", "").with_reply_to(full.as_str().into());
    publisher.publish(&body("web"), properties).await;
    let heard = publisher.answers(|heard| !heard.is_empty()).await;
    assert_eq!(heard[0].body["job"], "j-1");
    // answers that come back as jobs: each ends there
    bind(&jobs, &answers).await;
    publisher.job("j-2", "web").await;
    publisher.publish(b"{}", BasicProperties::default()).await;
    let both = publisher.answers(|heard| heard.len() >= 2).await;
    assert!(both.iter().any(|answer| answer.body["job"] == "j-2"), "{both:?}");
    tokio::time::sleep(Duration::from_secs(3)).await;
    publisher.job("j-3", "web").await;
    let heard = publisher.answers(|heard| !heard.is_empty()).await;
    assert_eq!(heard[0].body["job"], "j-3", "{heard:?}");
    let dead = format!("pipeops.dead.{PROJECT}");
    let letters = publisher.hear(&dead, |heard| !heard.is_empty()).await;
    assert_eq!(letters[0].body["reason"], "token_missing");
    let more = channel.basic_get(dead.as_str().into(), BasicGetOptions::default()).await;
    assert!(more.unwrap().is_none(), "{}", runner.log());
    // a control plane that knows no jobs decides nothing
    *control_plane.is_old.lock().unwrap() = true;
    publisher.job("j-4", "web").await;
    runner.until("control_plane_away").await;
    *control_plane.is_old.lock().unwrap() = false;
    let heard = publisher.answers(|heard| !heard.is_empty()).await;
    assert_eq!(heard[0].body["job"], "j-4", "{heard:?}");
    assert_eq!(control_plane.done(), ["j-1", "j-2", "j-3", "j-4"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn two_runners_share_the_partitions() {
    let Some(rabbit) = Service::start("rabbitmq") else { return };
    let (control_plane, url) = control_plane().await;
    control_plane.end();
    let mut first = RunnerProgram::start(&url, &rabbit.url, TOKEN, "");
    first.until("running").await;
    let second = RunnerProgram::start(&url, &rabbit.url, OTHER_TOKEN, "");
    second.until("running").await;
    let publisher = Publisher::new(&rabbit.url).await;
    for round in 0..20 {
        if round == 12 {
            // one that stops in order gives back what it has in hand before what is behind it
            kill(Pid::from_raw(first.child.id().try_into().unwrap()), Signal::SIGTERM).unwrap();
            tokio::task::block_in_place(|| first.child.wait().unwrap());
            first.start_again();
        }
        for application in 0..24 {
            let name = format!("app-{application}");
            publisher.job(&format!("j-{name}-{round:02}"), &name).await;
        }
    }
    let heard = publisher.answers(|heard| distinct(heard).len() >= 480).await;
    println!("480 jobs, {} answers on the wire", heard.len());
    let done = control_plane.done();
    assert_eq!(done.len(), 480, "an effect too many");
    for application in 0..24 {
        let of = done.iter().filter(|id| id.starts_with(&format!("j-app-{application}-")));
        assert!(of.is_sorted(), "{done:?}");
    }
    let answered = |runner: &RunnerProgram| runner.log().matches("answered").count();
    let (of_first, of_second) = (answered(&first), answered(&second));
    println!("{of_first} of the first Runner, {of_second} of the second");
    assert!(of_first > 40 && of_second > 40, "{of_first} and {of_second}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_with_broker_or_settings_is_named_and_needs_no_restart() {
    let Some(rabbit) = Service::start("rabbitmq") else { return };
    let (control_plane, url) = control_plane().await;
    control_plane.end();
    let at = rabbit.url.trim_start_matches("amqp://guest:guest@").trim_end_matches("/%2f");
    // nobody there
    let runner = RunnerProgram::start(&url, "amqp://u:p@127.0.0.1:1/", TOKEN, "");
    runner.until("broker_away").await;
    let file = runner.dir.path().join("amqp-url");
    let turn = |url: &str| std::fs::write(&file, url).unwrap();
    // wrong password, wrong virtual host
    turn(&format!("amqp://guest:planted-canary-4711-in-plain-text@{at}/%2f"));
    let status = runner.until("broker_refused").await;
    assert!(!status.contains("canary-4711-in-plain-text"), "{status}");
    turn(&format!("amqp://guest:guest@{at}/nowhere"));
    let said = async |what: &str| {
        let begun = Instant::now();
        loop {
            let status = tokio::task::block_in_place(|| runner.status());
            if status.starts_with("broker_refused") && status.contains(what) {
                break;
            }
            assert!(begun.elapsed() < Duration::from_secs(90), "never {what}: {status}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    said("nowhere").await;
    // a user who may not make exchanges
    tokio::task::block_in_place(|| {
        rabbit.ctl(&["add_user", "runner", "secret-planted-canary-4711-in-plain-text"]);
        rabbit.ctl(&["set_permissions", "-p", "/", "runner", "", ".*", ".*"]);
    });
    turn(&format!("amqp://runner:secret-planted-canary-4711-in-plain-text@{at}/%2f"));
    said("pipeops.jobs.p-1").await;
    // a queue with other arguments, which somebody has made
    let publisher = Publisher::new(&rabbit.url).await;
    let durable = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
    let queue = || "pipeops.jobs.p-1.3".into();
    publisher.channel.queue_declare(queue(), durable, FieldTable::default()).await.unwrap();
    tokio::task::block_in_place(|| {
        let own = r"^pipeops\.(jobs|answers|dead)\.p-1(\..*)?$";
        rabbit.ctl(&["set_permissions", "-p", "/", "runner", own, own, own]);
    });
    said("pipeops.jobs.p-1.3").await;
    tokio::task::block_in_place(|| rabbit.ctl(&["delete_queue", "pipeops.jobs.p-1.3"]));
    runner.until("running").await;
    publisher.job("j-1", "web").await;
    publisher.answers(|heard| !heard.is_empty()).await;
    // and one that may only look for what is there
    tokio::task::block_in_place(|| {
        let own = r"^pipeops\.(jobs|answers|dead)\.p-1(\..*)?$";
        rabbit.ctl(&["set_permissions", "-p", "/", "runner", "", own, own]);
    });
    let url_of = std::fs::read_to_string(&file).unwrap();
    let looking = RunnerProgram::start(&url, &url_of, OTHER_TOKEN, "declare = false");
    looking.until("running").await;

    // the settings of another project, and another key
    let foreign = RunnerProgram::start(&url, &rabbit.url, TOKEN, "project = \"p-2\"");
    let status = foreign.until("project_foreign").await;
    assert!(status.contains("p-1") && status.contains("p-2"), "{status}");
    let key = "sealing-key-file = \"/nowhere\"";
    let mut unread = RunnerProgram::start(&url, &rabbit.url, TOKEN, key);
    let code = tokio::task::block_in_place(|| unread.child.wait().unwrap().code());
    assert_eq!(code, Some(2), "{}", unread.log());
    *control_plane.key.lock().unwrap() = "another".into();
    let other = RunnerProgram::start(&url, &rabbit.url, TOKEN, "");
    other.until("sealing_key_differs").await;
    for runner in [&runner, &looking, &foreign, &other] {
        assert!(!leaks(&runner.log()), "{}", runner.log());
    }
}
