//! Jobs over a genuine RabbitMQ: control plane, agent and Runners are the real program, Kubernetes
//! is a fake one that records.

mod cloud_events;
mod hostile;
mod many;
mod permissions;

use std::collections::{BTreeMap, HashSet};
use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::PermissionsExt as _;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use futures_util::StreamExt as _;
use lapin::options::{
    BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, ConfirmSelectOptions,
    QueueDeclareOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Connection, ConnectionProperties};
use ring::rand::{SecureRandom as _, SystemRandom};
use serde_json::{Value, json};

use crate::agent::Agent;
use crate::broker::Service;
use crate::control_plane::ControlPlane;
use crate::support::{program, sha256};
use crate::world::{Kube, serve_kube};

/// Longest wait for anything.
const PATIENCE: Duration = Duration::from_secs(120);
/// To ask for a queue, and not to make it.
const PASSIVE: QueueDeclareOptions = QueueDeclareOptions {
    passive: true,
    durable: false,
    exclusive: false,
    auto_delete: false,
    nowait: false,
};

/// Where the jobs of a project go, as the control plane tells it with each token.
#[derive(Clone, Default)]
struct Project {
    id: String,
    exchange: String,
    answers: String,
    dead: String,
}

impl Project {
    fn partition(&self, number: u8) -> String {
        format!("{}.{number}", self.exchange)
    }

    /// The queue that counts Runners.
    fn runners(&self) -> String {
        format!("{}.runners", self.exchange)
    }
}

/// A job with the token for it.
#[derive(Clone)]
struct Order {
    /// Of the job.
    id: String,
    token: String,
    body: String,
}

/// All that jobs need, but Runners.
struct Site {
    rabbit: Service,
    control_plane: ControlPlane,
    kube: Arc<Kube>,
    agent: Agent,
    cluster: String,
    /// Token of who makes jobs.
    maker: String,
    project: Project,
    dir: tempfile::TempDir,
}

impl Site {
    /// None where RabbitMQ is not installed; the output says so.
    async fn new() -> Option<Site> {
        let rabbit = Service::start("rabbitmq")?;
        let control_plane = ControlPlane::with(&["--amqp-url", &rabbit.url]);
        let (kube, address) = serve_kube().await;
        let (agent, cluster) = control_plane.agent(address).await;
        let maker = control_plane.runner("deployer").await["token"].as_str().unwrap().to_owned();
        let dir = tempfile::tempdir().unwrap();
        let mut site = Site {
            rabbit,
            control_plane,
            kube,
            agent,
            cluster,
            maker,
            project: Project::default(),
            dir,
        };
        site.project = site.project_of(&site.maker).await;
        Some(site)
    }

    /// The project of whose token this is.
    async fn project_of(&self, maker: &str) -> Project {
        let told = self.asked(maker, "{}", json!({})).await;
        let text = |name: &str| told[name].as_str().unwrap_or_default().to_owned();
        let id = text("project");
        let dead = format!("pipeops.dead.{id}");
        Project { id, exchange: text("exchange"), answers: text("reply_queue"), dead }
    }

    /// The answer to a request for a token, for this body.
    async fn asked(&self, maker: &str, body: &str, more: Value) -> Value {
        let mut request = json!({"sha256": sha256(body.as_bytes())});
        request.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        self.control_plane.json("POST", "/api/v1/job-tokens", maker, request).await
    }

    /// A job of the usual maker.
    async fn order(&self, body: &Value) -> Order {
        self.order_of(&self.maker, body, json!({})).await
    }

    async fn order_of(&self, maker: &str, body: &Value, more: Value) -> Order {
        let body = body.to_string();
        let told = self.asked(maker, &body, more).await;
        let text = |name: &str| told[name].as_str().unwrap().to_owned();
        Order { id: text("id"), token: text("token"), body }
    }

    /// A job that writes a number into a ConfigMap, which stands for an application; it waits for
    /// an agent that is not back yet.
    fn count(&self, application: usize, number: usize) -> Value {
        json!({"cluster": self.cluster, "kind": "apply", "ttl_s": 600, "spec": {"wait": false,
            "objects": [{"apiVersion": "v1", "kind": "ConfigMap",
                "metadata": {"name": format!("app-{application}"), "namespace": "beta"},
                "data": {"number": number.to_string()}}]}})
    }

    /// What `count` has written, in its order, by application.
    fn counted(&self) -> BTreeMap<String, Vec<usize>> {
        let mut all = BTreeMap::<String, Vec<usize>>::new();
        for (path, body) in self.kube.patched.lock().unwrap().iter() {
            if let Some(name) = path.strip_prefix("/api/v1/namespaces/beta/configmaps/") {
                let number = body["data"]["number"].as_str().unwrap().parse().unwrap();
                all.entry(name.to_owned()).or_default().push(number);
            }
        }
        all
    }

    /// A Runner with a token of its own, of the least role.
    async fn runner(&self, more: &str) -> Runner {
        let made = self.for_jobs().await;
        self.runner_of(&self.project, &made, &self.rabbit.url, more)
    }

    /// A token of the least role that may bring jobs.
    async fn for_jobs(&self) -> Value {
        static MADE: AtomicU32 = AtomicU32::new(0);
        let name = format!("jobs-{}", MADE.fetch_add(1, Ordering::Relaxed));
        let body = json!({"name": name, "role": "viewer", "jobs": true});
        self.control_plane.json("POST", "/api/v1/runners", &self.control_plane.admin, body).await
    }

    /// A Runner of a project with this token, and more lines for its configuration.
    fn runner_of(&self, project: &Project, made: &Value, amqp: &str, more: &str) -> Runner {
        let dir = tempfile::tempdir_in(self.dir.path()).unwrap();
        let pin = self.control_plane.enrol().1;
        let file = |name: &str, text: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, text).unwrap();
            let mode = std::fs::Permissions::from_mode(0o600);
            std::fs::set_permissions(&path, mode).unwrap();
            path.display().to_string()
        };
        let (token, amqp) = (file("token", made["token"].as_str().unwrap()), file("amqp", amqp));
        // Runners of one project share it
        let key = self.dir.path().join(format!("sealing-key-{}", project.id));
        if !key.exists() {
            let mut bytes = [0; 32];
            SystemRandom::new().fill(&mut bytes).unwrap();
            std::fs::write(&key, STANDARD.encode(bytes)).unwrap();
        }
        let config = format!(
            "control-plane-url = \"{}\"\ncontrol-plane-pin = [\"{pin}\"]\ntoken-file = \"{token}\"\n\
             amqp-url-file = \"{amqp}\"\nproject = \"{}\"\nsealing-key-file = \"{}\"\n{more}\n",
            self.control_plane.url,
            project.id,
            key.display(),
        );
        let config = file("runner.toml", &config);
        let id = made["id"].as_str().unwrap().to_owned();
        Runner::start(dir, config, id)
    }

    /// Waits until so many Runners are there for the jobs of a project.
    async fn ready(&self, project: &Project, runners: u32) {
        let begun = Instant::now();
        loop {
            // those that stand by for one of the others are not counted there
            let there = consumers(&self.rabbit.url, &project.runners()).await;
            if there == Some(runners)
                && consumers(&self.rabbit.url, &project.partition(7)).await >= Some(1)
                && consumers(&self.rabbit.url, &project.exchange).await >= Some(1)
            {
                return;
            }
            assert!(begun.elapsed() < PATIENCE, "no Runner takes jobs: {there:?}");
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    /// Publishes jobs in their order.
    async fn publish(&self, orders: &[Order]) {
        let channel = open(&self.rabbit.url).await;
        for order in orders {
            let properties = properties(&self.project, order);
            send(&channel, &self.project.exchange, properties, order.body.as_bytes()).await;
        }
    }

    /// So many answers of different jobs.
    async fn answers(&self, count: usize) -> Vec<Message> {
        let enough = |heard: &[Message]| without_copies(heard).len() >= count;
        without_copies(&collect(&self.rabbit.url, &self.project.answers, enough).await)
    }

    /// What was answered to a job once it was done.
    async fn answer_to(&self, order: &Order) -> Value {
        let is_it = |message: &Message| {
            message.correlation == format!("m-{}", order.id) && message.json()["state"] != "refused"
        };
        let heard = |all: &[Message]| all.iter().any(is_it);
        let all = collect(&self.rabbit.url, &self.project.answers, heard).await;
        all.iter().find(|message| is_it(message)).unwrap().json()
    }

    /// A job from its publication to its answer.
    async fn done(&self, body: &Value) -> Value {
        let order = self.order(body).await;
        self.publish(std::slice::from_ref(&order)).await;
        self.answer_to(&order).await
    }
}

/// A `pipeops runner` in a directory of its own.
struct Runner {
    child: Child,
    config: String,
    /// Of its token.
    id: String,
    log: Arc<Mutex<String>>,
    dir: tempfile::TempDir,
}

impl Runner {
    fn start(dir: tempfile::TempDir, config: String, id: String) -> Runner {
        let log = Arc::<Mutex<String>>::default();
        let child = spawn(&dir, &config, &log);
        Runner { child, config, id, log, dir }
    }

    /// kill -9, and the same again.
    fn kill_and_restart(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        self.child = spawn(&self.dir, &self.config, &self.log);
    }

    fn log(&self) -> String {
        self.log.lock().unwrap().clone()
    }

    /// Waits until it has said this.
    async fn says(&self, text: &str, within: Duration) {
        let begun = Instant::now();
        while !self.log().contains(text) {
            assert!(begun.elapsed() < within, "it does not say `{text}`: {}", self.log());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    fn lives(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }
}

impl Drop for Runner {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn spawn(dir: &tempfile::TempDir, config: &str, log: &Arc<Mutex<String>>) -> Child {
    let mut child = Command::new(program())
        .args(["runner", "--config", config])
        .env_clear()
        .env("STATE_DIRECTORY", dir.path())
        .env("LOG_LEVEL", "debug")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // a log that nobody reads would stop it at its next line
    let (mut said, log) = (BufReader::new(child.stderr.take().unwrap()), log.clone());
    std::thread::spawn(move || {
        let mut line = String::new();
        while said.read_line(&mut line).is_ok_and(|n| n > 0) {
            log.lock().unwrap().push_str(&std::mem::take(&mut line));
        }
    });
    child
}

/// A channel with confirmations, as soon as the broker is there.
async fn open(url: &str) -> Channel {
    let begun = Instant::now();
    loop {
        if let Ok(connection) = Connection::connect(url, ConnectionProperties::default()).await {
            let channel = connection.create_channel().await.unwrap();
            channel.confirm_select(ConfirmSelectOptions::default()).await.unwrap();
            return channel;
        }
        assert!(begun.elapsed() < PATIENCE, "the broker is away");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// How many consumers a queue has; none where it is not there.
async fn consumers(url: &str, queue: &str) -> Option<u32> {
    let (channel, table) = (open(url).await, FieldTable::default());
    let declared = channel.queue_declare(queue.into(), PASSIVE, table).await;
    Some(declared.ok()?.consumer_count())
}

/// How many messages wait in a queue.
async fn waiting(url: &str, queue: &str) -> u32 {
    let (channel, table) = (open(url).await, FieldTable::default());
    channel.queue_declare(queue.into(), PASSIVE, table).await.unwrap().message_count()
}

fn text(value: &str) -> AMQPValue {
    AMQPValue::LongString(value.into())
}

/// Headers as whoever publishes a job sets them.
fn headers(project: &Project, order: &Order) -> FieldTable {
    let mut headers = FieldTable::default();
    for (name, value) in [
        ("specversion", "1.0"),
        ("id", order.id.as_str()),
        ("source", &format!("/projects/{}", project.id)),
        ("type", "io.pipeops.job"),
        ("pipeopstoken", &order.token),
    ] {
        headers.insert(format!("cloudEvents:{name}").into(), text(value));
    }
    headers
}

/// All of a message but its body.
fn properties(project: &Project, order: &Order) -> BasicProperties {
    BasicProperties::default()
        .with_delivery_mode(2)
        .with_content_type("application/json".into())
        .with_message_id(format!("m-{}", order.id).into())
        .with_reply_to(project.answers.as_str().into())
        .with_headers(headers(project, order))
}

/// Publishes to an exchange; the broker must have it.
async fn send(channel: &Channel, exchange: &str, properties: BasicProperties, body: &[u8]) {
    let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
    let sent = channel.basic_publish(exchange.into(), "".into(), options, body, properties).await;
    let confirmed = sent.unwrap().await.unwrap();
    assert!(confirmed.is_ack(), "{confirmed:?}");
}

/// A message as it came.
#[derive(Clone, Debug)]
struct Message {
    id: String,
    correlation: String,
    kind: String,
    headers: FieldTable,
    body: Vec<u8>,
}

impl Message {
    fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap()
    }
}

/// The first of each id.
fn without_copies(heard: &[Message]) -> Vec<Message> {
    let mut seen = HashSet::new();
    heard.iter().filter(|message| seen.insert(message.id.clone())).cloned().collect()
}

/// Consumes a queue until `enough`, whatever becomes of the broker.
async fn collect(url: &str, queue: &str, enough: impl Fn(&[Message]) -> bool) -> Vec<Message> {
    let (begun, mut heard) = (Instant::now(), Vec::new());
    while !enough(&heard) {
        assert!(begun.elapsed() < PATIENCE, "{} messages in {queue}", heard.len());
        let Ok(connection) = Connection::connect(url, ConnectionProperties::default()).await else {
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        let channel = connection.create_channel().await.unwrap();
        let (options, table) = (BasicConsumeOptions::default(), FieldTable::default());
        let consuming = channel.basic_consume(queue.into(), "test".into(), options, table).await;
        // its Runner has not declared it yet
        let Ok(mut consumer) = consuming else {
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        while !enough(&heard) {
            let next = tokio::time::timeout(Duration::from_secs(10), consumer.next()).await;
            let Ok(Some(Ok(delivery))) = next else { break };
            let of = |value: &Option<lapin::types::ShortString>| {
                value.as_ref().map(ToString::to_string).unwrap_or_default()
            };
            let properties = &delivery.properties;
            assert_eq!(*properties.delivery_mode(), Some(2));
            heard.push(Message {
                id: of(properties.message_id()),
                correlation: of(properties.correlation_id()),
                kind: of(properties.content_type()),
                headers: properties.headers().clone().unwrap_or_default(),
                body: delivery.data.clone(),
            });
            delivery.ack(BasicAckOptions::default()).await.unwrap();
        }
        let _ = connection.close(200, "bye".into()).await;
    }
    heard
}
