//! What a user of the broker may do with the permissions that the README gives it, and what a
//! Runner says that may not do what it needs.

use std::time::Duration;

use lapin::options::{
    BasicConsumeOptions, BasicPublishOptions, ExchangeDeclareOptions, QueueBindOptions,
    QueueDeclareOptions, QueuePurgeOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Confirmation, ExchangeKind};
use serde_json::{Value, json};

use super::{PASSIVE, Project, Site, consumers, open, properties, send};
use crate::client::Person;
use crate::support::run_output;

/// The rows of the README's table: what may be configured, written and read in a project.
const PERMISSIONS: [(&str, [&str; 3]); 5] = [
    ("runner", [ALL, ALL, ALL]),
    (
        "closed",
        [
            "^$",
            r"^pipeops\.(jobs\.P\.partitions|answers\.P|dead\.P)$",
            r"^pipeops\.jobs\.P(\.([0-7]|runners))?$",
        ],
    ),
    (
        "maker",
        [
            r"^pipeops\.answers\.P\..+$",
            r"^pipeops\.(jobs\.P|answers\.P\..+)$",
            r"^pipeops\.answers\.P(\..+)?$",
        ],
    ),
    ("sender", ["^$", r"^pipeops\.jobs\.P$", "^$"]),
    ("reader", ["^$", "^$", r"^pipeops\.(answers|dead)\.P$"]),
];
const ALL: &str = r"^pipeops\.(jobs|answers|dead)\.P(\..+)?$";

/// Something that is tried on a channel of its own.
enum Attempt {
    Publish(String, &'static str),
    Consume(String),
    Purge(String),
    /// A queue, bound to an exchange under a key, and then consumed.
    Queue(String, String, String),
    Bind(String, String),
}

async fn allowed(url: &str, attempt: &Attempt) -> bool {
    let (channel, table) = (open(url).await, FieldTable::default());
    match attempt {
        Attempt::Publish(exchange, key) => published(&channel, exchange, key).await,
        Attempt::Consume(queue) => consumed(&channel, queue).await,
        Attempt::Purge(queue) => {
            channel.queue_purge(queue.as_str().into(), QueuePurgeOptions::default()).await.is_ok()
        }
        Attempt::Queue(queue, exchange, key) => {
            let own = QueueDeclareOptions { auto_delete: true, ..QueueDeclareOptions::default() };
            let (name, options) = (queue.as_str(), QueueBindOptions::default());
            channel.queue_declare(name.into(), own, table.clone()).await.is_ok()
                && channel
                    .queue_bind(
                        name.into(),
                        exchange.as_str().into(),
                        key.as_str().into(),
                        options,
                        table,
                    )
                    .await
                    .is_ok()
                && consumed(&channel, name).await
        }
        Attempt::Bind(queue, exchange) => {
            let options = QueueBindOptions::default();
            let (queue, exchange) = (queue.as_str().into(), exchange.as_str().into());
            channel.queue_bind(queue, exchange, "".into(), options, table).await.is_ok()
        }
    }
}

async fn published(channel: &Channel, exchange: &str, key: &str) -> bool {
    let (options, properties) = (BasicPublishOptions::default(), BasicProperties::default());
    let sent = channel.basic_publish(exchange.into(), key.into(), options, b"{}", properties).await;
    match sent {
        Ok(confirmation) => matches!(confirmation.await, Ok(Confirmation::Ack(_))),
        Err(_) => false,
    }
}

async fn consumed(channel: &Channel, queue: &str) -> bool {
    let (options, table) = (BasicConsumeOptions::default(), FieldTable::default());
    channel.basic_consume(queue.into(), "tries".into(), options, table).await.is_ok()
}

impl Site {
    /// Users of the broker for a project; gives the URL of one.
    fn users(&self, name: &str, project: &Project) -> impl Fn(&str) -> String {
        for (role, permissions) in PERMISSIONS {
            let user = format!("{role}-{name}");
            self.rabbit.ctl(&["add_user", &user, "of-a-test"]);
            let [configure, write, read] =
                permissions.map(|regex| regex.replace('P', &project.id.replace('.', r"\.")));
            self.rabbit.ctl(&["set_permissions", &user, &configure, &write, &read]);
        }
        let (url, name) = (self.rabbit.url.clone(), name.to_owned());
        move |role: &str| url.replace("guest:guest", &format!("{role}-{name}:of-a-test"))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_may_use_the_broker_for_one_project_reaches_no_other() {
    let Some(site) = Site::new().await else { return };
    let admin = &site.control_plane.admin;
    let post =
        async |path: &str, body: Value| site.control_plane.json("POST", path, admin, body).await;
    post("/api/v1/projects", json!({"name": "other"})).await;
    let theirs = json!({"name": "theirs", "role": "deployer", "project": "other", "jobs": true});
    let theirs = post("/api/v1/runners", theirs).await;
    let (a, b) = (site.project.clone(), site.project_of(theirs["token"].as_str().unwrap()).await);
    let (of_a, of_b) = (site.users("a", &a), site.users("b", &b));
    // each declares its own, and one that may not finds what is there
    let made = site.for_jobs().await;
    let first = site.runner_of(&a, &made, &of_a("runner"), "");
    let _second = site.runner_of(&b, &theirs, &of_b("runner"), "");
    site.ready(&a, 1).await;
    site.ready(&b, 1).await;
    drop(first);
    let made = site.for_jobs().await;
    let closed = site.runner_of(&a, &made, &of_a("closed"), "declare = false");
    site.ready(&a, 1).await;
    for project in [&a, &b] {
        let (own, id) = (project.id == a.id, project.id.as_str());
        let partitions = format!("{}.partitions", project.exchange);
        let (jobs, answers, dead) = (&project.exchange, &project.answers, &project.dead);
        let mine = format!("{answers}.mine");
        let publish = |exchange: &str| Attempt::Publish(exchange.into(), "");
        let consume = |queue: &str| Attempt::Consume(queue.into());
        let own_queue =
            |exchange: &str, key: &str| Attempt::Queue(mine.clone(), exchange.into(), key.into());
        for (role, attempt, within_own) in [
            ("maker", publish(jobs), true),
            ("maker", own_queue(answers, &mine), true),
            ("maker", consume(answers), true),
            ("maker", publish(&partitions), false),
            ("maker", publish(answers), false),
            ("maker", publish(dead), false),
            ("maker", consume(jobs), false),
            ("maker", consume(&project.partition(3)), false),
            ("maker", consume(dead), false),
            ("maker", consume(&project.runners()), false),
            ("maker", Attempt::Purge(jobs.clone()), false),
            ("maker", Attempt::Publish(String::new(), "pipeops.runners"), false),
            ("maker", publish("pipeops.agents"), false),
            ("maker", consume("pipeops.runners"), false),
            ("sender", publish(jobs), true),
            ("sender", consume(answers), false),
            ("sender", own_queue(answers, &mine), false),
            ("sender", Attempt::Bind(jobs.clone(), answers.clone()), false),
            ("reader", consume(answers), true),
            ("reader", consume(dead), true),
            ("reader", publish(jobs), false),
            ("reader", Attempt::Purge(answers.clone()), true),
            ("reader", Attempt::Bind(answers.clone(), answers.clone()), false),
            ("closed", publish(&partitions), true),
            ("closed", publish(answers), true),
            ("closed", publish(dead), true),
            ("closed", publish(jobs), false),
            ("closed", consume(&project.partition(3)), true),
            ("closed", consume(&project.runners()), true),
            ("closed", consume(answers), false),
            ("closed", own_queue(answers, &mine), false),
            ("runner", consume(jobs), true),
            ("runner", publish(dead), true),
            ("runner", publish("pipeops.agents"), false),
            ("runner", consume("pipeops.runners"), false),
        ] {
            let is_allowed = allowed(&of_a(role), &attempt).await;
            let what = match attempt {
                Attempt::Publish(exchange, key) => format!("publish to `{exchange}` `{key}`"),
                Attempt::Consume(queue) => format!("consume {queue}"),
                Attempt::Purge(queue) => format!("purge {queue}"),
                Attempt::Queue(queue, exchange, _) => format!("make {queue} for {exchange}"),
                Attempt::Bind(queue, exchange) => format!("bind {queue} to {exchange}"),
            };
            assert_eq!(is_allowed, own && within_own, "{role} of a, in {id}: {what}");
        }
        // nor does a queue of one's own hear what is for the other project
        let elsewhere = Attempt::Queue(format!("{}.x", a.answers), b.answers.clone(), "#".into());
        assert!(!allowed(&of_a("maker"), &elsewhere).await);
    }
    sent_by_the_command_line(&site, &of_a("maker"));
    drop(closed);
}

/// `pipeops runner send` of somebody who may publish and wait for answers, and nothing else: it ends
/// as the job ends.
fn sent_by_the_command_line(site: &Site, url: &str) {
    let person = Person::logged_in(&site.control_plane, "eve", &[]);
    let amqp = person.home.path().join("amqp-url");
    std::fs::write(&amqp, url).unwrap();
    let own_queues = || {
        let (queues, own) =
            (site.rabbit.ctl(&["list_queues", "name"]), format!("{}.", site.project.answers));
        queues.lines().filter(|queue| queue.starts_with(&own)).count()
    };
    let before = own_queues();
    let send = |body: &Value, more: &[&str]| {
        let file = person.home.path().join("job.json");
        std::fs::write(&file, body.to_string()).unwrap();
        let (file, amqp) = (file.to_str().unwrap(), amqp.to_str().unwrap());
        let args = [&["runner", "send", file, "--amqp-url-file", amqp][..], more].concat();
        let mut command = person.command(&args);
        tokio::task::block_in_place(|| run_output(command.output().unwrap()))
    };
    let done = send(&site.count(0, 7), &["-o", "json"]).ended(0).json();
    assert_eq!(
        (&done["state"], site.counted()["app-0"].as_slice()),
        (&json!("succeeded"), &[7][..])
    );
    // one that fails, and one that is refused
    let mut wrong = site.count(0, 8);
    wrong["spec"]["objects"][0]["apiVersion"] = "none/v1".into();
    let failed = send(&wrong, &[]).ended(13);
    assert!(failed.err.contains("none/v1"), "{}", failed.err);
    let mut elsewhere = site.count(0, 8);
    elsewhere["cluster"] = "c-0000000000000000".into();
    let refused = send(&elsewhere, &[]);
    assert!(refused.code != 0 && !refused.err.contains("internal"), "{}", refused.err);
    assert_eq!(site.counted()["app-0"], [7]);
    // a queue of its own is gone with it
    assert_eq!(own_queues(), before);
}

/// Nothing of it ends the Runner: once it is put right, it takes jobs.
#[tokio::test(flavor = "multi_thread")]
async fn a_broker_that_refuses_is_named_and_tried_again() {
    let Some(site) = Site::new().await else { return };
    let made = site.for_jobs().await;
    let start = |url: &str| site.runner_of(&site.project, &made, url, "");
    let soon = Duration::from_secs(20);
    // a vhost that is not there
    let mut lost = start(&site.rabbit.url.replace("%2f", "nowhere"));
    lost.says("nowhere", soon).await;
    assert!(lost.lives());
    drop(lost);
    // a user who may do nothing
    site.rabbit.ctl(&["add_user", "nobody", "of-a-test"]);
    site.rabbit.ctl(&["set_permissions", "nobody", "^$", "^$", "^$"]);
    let mut nobody = start(&site.rabbit.url.replace("guest:guest", "nobody:of-a-test"));
    nobody.says("ACCESS_REFUSED", soon).await;
    nobody.says(&site.project.exchange, soon).await;
    assert!(nobody.lives() && !nobody.log().contains("of-a-test"), "{}", nobody.log());
    let all = ["set_permissions", "nobody", ".*", ".*", ".*"];
    site.rabbit.ctl(&all);
    site.ready(&site.project, 1).await;
    drop(nobody);
    // a password that is wrong
    let mut wrong = start(&site.rabbit.url.replace("guest:guest", "guest:planted-wrong-password"));
    wrong.says("broker_refused", soon).await;
    assert!(wrong.lives() && !wrong.log().contains("planted-wrong-password"), "{}", wrong.log());
    drop(wrong);
    // a queue that somebody made otherwise
    let channel = open(&site.rabbit.url).await;
    let dead = site.project.dead.as_str();
    channel.queue_delete(dead.into(), lapin::options::QueueDeleteOptions::default()).await.unwrap();
    let durable = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
    channel.queue_declare(dead.into(), durable, FieldTable::default()).await.unwrap();
    let mut other = start(&site.rabbit.url);
    other.says("PRECONDITION_FAILED", soon).await;
    other.says(dead, soon).await;
    assert!(other.lives());
    channel.queue_delete(dead.into(), lapin::options::QueueDeleteOptions::default()).await.unwrap();
    site.ready(&site.project, 1).await;
    assert_eq!(site.done(&site.count(0, 0)).await["state"], "succeeded");
}

/// The topology as the README has it, made by somebody else: a Runner that may not make it works
/// with it; where a part is missing, it says which.
#[tokio::test(flavor = "multi_thread")]
async fn what_somebody_else_has_declared_is_used_as_it_is() {
    let Some(site) = Site::new().await else { return };
    let of_a = site.users("a", &site.project);
    let made = site.for_jobs().await;
    let closed = site.runner_of(&site.project, &made, &of_a("closed"), "declare = false");
    let soon = Duration::from_secs(20);
    closed.says(&site.project.exchange, soon).await;
    let channel = open(&site.rabbit.url).await;
    let Project { exchange, answers, dead, .. } = &site.project;
    let mut quorum = FieldTable::default();
    quorum.insert("x-queue-type".into(), super::text("quorum"));
    let mut single = quorum.clone();
    single.insert("x-single-active-consumer".into(), AMQPValue::Boolean(true));
    let partitions = format!("{exchange}.partitions");
    let mut queues = vec![
        (exchange.clone(), exchange, ExchangeKind::Fanout, String::new(), &single),
        (answers.clone(), answers, ExchangeKind::Direct, answers.clone(), &quorum),
        (dead.clone(), dead, ExchangeKind::Fanout, String::new(), &quorum),
    ];
    queues.extend((0..8).map(|n| {
        (site.project.partition(n), &partitions, ExchangeKind::Direct, n.to_string(), &single)
    }));
    for (queue, exchange, kind, key, arguments) in queues {
        let durable = ExchangeDeclareOptions { durable: true, ..ExchangeDeclareOptions::default() };
        let (name, table) = (exchange.as_str(), FieldTable::default());
        channel.exchange_declare(name.into(), kind, durable, table.clone()).await.unwrap();
        let durable = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
        let queue = queue.as_str();
        channel.queue_declare(queue.into(), durable, arguments.clone()).await.unwrap();
        let options = QueueBindOptions::default();
        let bound =
            channel.queue_bind(queue.into(), name.into(), key.as_str().into(), options, table);
        bound.await.unwrap();
    }
    let durable = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
    channel.queue_declare(site.project.runners().into(), durable, quorum.clone()).await.unwrap();
    site.ready(&site.project, 1).await;
    let order = site.order(&site.count(0, 1)).await;
    let channel = open(&of_a("sender")).await;
    let properties = properties(&site.project, &order);
    send(&channel, exchange, properties, order.body.as_bytes()).await;
    assert_eq!(site.answer_to(&order).await["state"], "succeeded");
    assert_eq!(consumers(&of_a("runner"), answers).await, Some(0));
    let declared =
        channel.queue_declare(dead.as_str().into(), PASSIVE, FieldTable::default()).await;
    assert_eq!(declared.unwrap().message_count(), 0);
}
