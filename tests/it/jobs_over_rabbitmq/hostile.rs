//! What comes to the queue and can't be done: it is dead-lettered with its reason, shows no secret,
//! has no effect, and keeps nothing behind it waiting.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use lapin::BasicProperties;
use lapin::types::{AMQPValue, FieldTable};
use ring::signature::{Ed25519KeyPair, KeyPair as _};
use serde_json::{Value, json};

use super::{
    Message, Order, Project, Runner, Site, collect, headers, open, properties, send, text,
};
use crate::control_plane::{DATA, SimulatedAgent};
use crate::operations::texts;
use crate::support::{run_output, sha256};

/// In the spec of each job that must not be done.
const CANARY: &str = "planted-canary-8811-in-plain-text";
/// In the spec of a job as its sealed value.
const SEALED: &str = "planted-canary-2277-in-plain-text";

/// A message that is published as it stands.
struct Planted {
    properties: BasicProperties,
    body: Vec<u8>,
}

impl Site {
    fn planted(&self, order: &Order) -> Planted {
        let properties = properties(&self.project, order);
        Planted { properties, body: order.body.clone().into_bytes() }
    }

    async fn plant(&self, all: Vec<Planted>) {
        let channel = open(&self.rabbit.url).await;
        for Planted { properties, body } in all {
            send(&channel, &self.project.exchange, properties, &body).await;
        }
    }

    /// So many dead letters.
    async fn dead(&self, count: usize) -> Vec<Message> {
        collect(&self.rabbit.url, &self.project.dead, |heard| heard.len() >= count).await
    }

    /// What becomes of a message that can't be done: its dead letter.
    async fn refused(&self, planted: Planted, reason: &str) -> Value {
        let (size, digest) = (planted.body.len(), sha256(&planted.body));
        let id = planted.properties.message_id().as_ref().map(ToString::to_string);
        self.plant(vec![planted]).await;
        let dead = self.dead(1).await.remove(0);
        let letter = dead.json();
        assert_eq!(letter["reason"], reason, "{letter}");
        assert!(letter["message"].as_str().is_some_and(|why| !why.is_empty()), "{letter}");
        assert_eq!((&letter["size"], &letter["sha256"]), (&json!(size), &json!(digest)));
        assert_eq!(letter["message_id"].as_str().map(str::to_owned), id, "{letter}");
        nothing_secret(&dead);
        letter
    }

    /// A job whose effect would be seen.
    fn unwanted(&self) -> Value {
        let mut body = self.count(0, 0);
        body["spec"]["objects"][0]["data"] = json!({"number": CANARY});
        body
    }
}

/// Neither a dead letter nor its headers hold what was published, or a token.
fn nothing_secret(dead: &Message) {
    let all = format!("{:?} {}", dead.headers, String::from_utf8_lossy(&dead.body));
    for secret in ["canary-8811-in-plain-text", "eyJ"] {
        assert!(!all.contains(secret), "{all}");
    }
}

fn with_token(order: &Order, token: &str) -> Order {
    Order { token: token.into(), ..order.clone() }
}

fn decoded(part: &str) -> Value {
    serde_json::from_slice(&URL_SAFE_NO_PAD.decode(part).unwrap()).unwrap()
}

fn encoded(value: &Value) -> String {
    URL_SAFE_NO_PAD.encode(value.to_string())
}

/// Tokens that the control plane has not made, of one that it has.
fn forged(token: &str) -> Vec<String> {
    let parts: Vec<&str> = token.split('.').collect();
    let (header, claims) = (decoded(parts[0]), decoded(parts[1]));
    let changed = |value: &Value, name: &str, to: Value| {
        let mut changed = value.clone();
        changed[name] = to;
        encoded(&changed)
    };
    let key = Ed25519KeyPair::generate_pkcs8(&ring::rand::SystemRandom::new()).unwrap();
    let key = Ed25519KeyPair::from_pkcs8(key.as_ref()).unwrap();
    let signed = |header: &str, claims: &str| {
        let signature = key.sign(format!("{header}.{claims}").as_bytes());
        format!("{header}.{claims}.{}", URL_SAFE_NO_PAD.encode(signature))
    };
    let own = json!({"alg": "EdDSA", "typ": "pipeops-job+jwt", "jwk": {"kty": "OKP",
        "crv": "Ed25519", "x": URL_SAFE_NO_PAD.encode(key.public_key().as_ref())}});
    let mut signature = URL_SAFE_NO_PAD.decode(parts[2]).unwrap();
    signature[7] ^= 1;
    vec![
        // somebody else's key, also one that the token brings along
        signed(parts[0], parts[1]),
        signed(&encoded(&own), parts[1]),
        // no signature, a changed one, none that is one
        format!("{}.{}.", changed(&header, "alg", json!("none")), parts[1]),
        format!("{}.{}.{}", parts[0], parts[1], URL_SAFE_NO_PAD.encode(signature)),
        format!("{}.{}", parts[0], parts[1]),
        format!("{token}.{}", parts[2]),
        // claims that were not signed
        format!("{}.{}.{}", parts[0], changed(&claims, "role", json!("admin")), parts[2]),
        format!("{}.{}.{}", parts[0], changed(&claims, "exp", json!(4_102_444_800_i64)), parts[2]),
        format!("{}.{}.{}", changed(&header, "kid", json!("other")), parts[1], parts[2]),
        format!("{}.{}.{}", changed(&header, "typ", json!("JWT")), parts[1], parts[2]),
        "x".repeat(20_000),
        "eyJ.eyJ.eyJ".into(),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_whose_token_is_not_for_it_is_refused_and_nothing_is_done() {
    let Some(site) = Site::new().await else { return };
    let mut runner = site.runner("").await;
    site.ready(&site.project, 1).await;
    let order = site.order(&site.unwanted()).await;
    for token in forged(&order.token) {
        site.refused(site.planted(&with_token(&order, &token)), "token_forged").await;
    }
    // a token for the agent is none for a job
    let path = format!("/api/v1/clusters/{}/token", site.cluster);
    let caller = site.control_plane.json("POST", &path, &site.maker, json!({})).await;
    let caller = with_token(&order, caller["token"].as_str().unwrap());
    site.refused(site.planted(&caller), "token_forged").await;
    // nor the other way round
    let gateway = format!("/clusters/{}/k8s/version", site.cluster);
    assert_eq!(site.control_plane.try_get(&gateway, &order.token).await.status(), 401);
    // one byte more, and the body of another job
    let other = site.order(&site.count(1, 1)).await;
    let changed = Order { body: format!("{} ", order.body), ..order.clone() };
    for changed in [changed, Order { body: other.body.clone(), ..order.clone() }] {
        site.refused(site.planted(&changed), "body_changed").await;
    }
    of_others(&site, &order).await;
    reply_queues(&site, &order).await;
    // a token whose time is over
    let body = site.unwanted();
    let short = site.order_of(&site.maker, &body, json!({"ttl_s": 1})).await;
    until_over(&short).await;
    site.refused(site.planted(&short), "token_expired").await;
    assert!(site.kube.patched.lock().unwrap().is_empty(), "something was done");
    // the same token for its own body is as good as before
    site.publish(std::slice::from_ref(&other)).await;
    assert_eq!(site.answer_to(&other).await["state"], "succeeded");
    replays(&site, &other).await;
    assert!(runner.lives());
    assert!(!runner.log().contains("canary-8811-in-plain-text"), "{}", runner.log());
    assert!(!site.control_plane.log.lock().unwrap().contains("canary-8811-in-plain-text"));
}

/// Waits until the token has expired.
async fn until_over(order: &Order) {
    let claims = decoded(order.token.split('.').nth(1).unwrap());
    let end = claims["exp"].as_i64().unwrap() + 1;
    let left = end - jiff::Timestamp::now().as_second();
    tokio::time::sleep(Duration::from_secs(left.max(0).unsigned_abs())).await;
}

/// A job that was answered is not done again, whatever its message says.
async fn replays(site: &Site, order: &Order) {
    let before = site.counted();
    let letter = site.refused(site.planted(order), "replayed").await;
    assert_eq!(letter["job"], order.id.as_str(), "{letter}");
    // somebody who says that it is only a second delivery
    for (name, value) in [
        ("pipeops-redelivered", AMQPValue::Boolean(true)),
        ("pipeops-redelivered", text("true")),
        ("x-delivery-count", AMQPValue::LongLongInt(5)),
    ] {
        let mut headers = headers(&site.project, order);
        headers.insert(name.into(), value);
        let properties = properties(&site.project, order).with_headers(headers);
        let body = order.body.clone().into_bytes();
        site.refused(Planted { properties, body }, "replayed").await;
    }
    let last = site.done(&site.count(2, 2)).await;
    assert_eq!(last["state"], "succeeded", "{last}");
    let mut expected = before;
    expected.insert("app-2".into(), vec![2]);
    assert_eq!(site.counted(), expected);
}

/// Tokens of another project, for another cluster, and of somebody who was revoked.
async fn of_others(site: &Site, order: &Order) {
    let admin = &site.control_plane.admin;
    let post =
        async |path: &str, body: Value| site.control_plane.json("POST", path, admin, body).await;
    post("/api/v1/projects", json!({"name": "other"})).await;
    let theirs = json!({"name": "theirs", "role": "deployer", "project": "other"});
    let theirs = post("/api/v1/runners", theirs).await["token"].as_str().unwrap().to_owned();
    let body: Value = serde_json::from_str(&order.body).unwrap();
    let foreign = site.order_of(&theirs, &body, json!({})).await;
    site.refused(site.planted(&foreign), "project_foreign").await;
    // the maker is gone
    let gone = site.control_plane.runner("deployer").await;
    let orphan = site.order_of(gone["token"].as_str().unwrap(), &body, json!({})).await;
    let revoke = ["control-plane", "runner", "revoke", gone["id"].as_str().unwrap()];
    site.control_plane.sandbox.subcommand(&revoke).ended(0);
    site.refused(site.planted(&orphan), "maker_revoked").await;
    // a token for another cluster alone, and a cluster that is not there
    let dir = tempfile::tempdir().unwrap();
    let agent =
        SimulatedAgent::new(&site.control_plane, dir.path(), &site.control_plane.enrol().0).await;
    let elsewhere = site.control_plane.cluster_of(&agent).await["id"].clone();
    let limited = site.order_of(&site.maker, &body, json!({"clusters": [elsewhere]})).await;
    site.refused(site.planted(&limited), "cluster_exceeded").await;
    let mut nowhere = body.clone();
    nowhere["cluster"] = "c-0000000000000000".into();
    let nowhere = site.order(&nowhere).await;
    site.refused(site.planted(&nowhere), "cluster_unknown").await;
    // a viewer changes nothing, and gets no token for it
    let viewer = site.control_plane.runner("viewer").await;
    let asked = json!({"sha256": sha256(order.body.as_bytes())});
    let token = viewer["token"].as_str().unwrap();
    let refused = site.control_plane.ask("POST", "/api/v1/job-tokens", token, asked).await;
    assert_eq!(refused.status(), 403);
    let less = site.order_of(&site.maker, &body, json!({"namespaces": ["production"]})).await;
    site.publish(std::slice::from_ref(&less)).await;
    let answer = site.answer_to(&less).await;
    assert_eq!(answer["state"], "failed", "{answer}");
    assert!(answer["message"].as_str().unwrap().contains("namespace_scope"), "{answer}");
}

/// Answers go to queues of the project alone; and a message without a token.
async fn reply_queues(site: &Site, order: &Order) {
    let own = &site.project.answers;
    for foreign in [
        "pipeops.answers.p-0000000000000000".to_owned(),
        format!("{own}x"),
        "amq.gen-of-somebody".into(),
        "pipeops.runners".into(),
        site.project.exchange.clone(),
        "\u{202e}".into(),
        "x".repeat(255),
    ] {
        let mut planted = site.planted(order);
        planted.properties = planted.properties.with_reply_to(foreign.as_str().into());
        site.refused(planted, "reply_queue_foreign").await;
    }
    let mut planted = site.planted(order);
    let headers = headers(&site.project, &with_token(order, ""));
    planted.properties = planted.properties.with_headers(headers);
    site.refused(planted, "token_missing").await;
    // and what is refused is told there
    let mut planted = site.planted(order);
    planted.body.push(b' ');
    site.refused(planted, "body_changed").await;
    let is_told = |m: &Message| m.json()["reason"] == "body_changed";
    let told =
        collect(&site.rabbit.url, &site.project.answers, |heard| heard.iter().any(is_told)).await;
    let told = told.iter().find(|m| is_told(m)).unwrap();
    assert_eq!(told.correlation, format!("m-{}", order.id));
    // or the answer to the true one would be taken for a copy
    assert_ne!(told.id, format!("answer-{}", order.id));
    let told = told.json();
    let state = (&told["state"], &told["reason"]);
    assert_eq!(state, (&json!("refused"), &json!("body_changed")), "{told}");
    assert!(!told.to_string().contains("canary-8811-in-plain-text"), "{told}");
}

/// Bodies that are no job, each with a token that is for it.
fn poison(site: &Site) -> Vec<(Vec<u8>, &'static str)> {
    let clear = json!({"password": CANARY});
    let secret = json!({"apiVersion": "v1", "kind": "Secret", "stringData": clear,
        "metadata": {"name": "s", "namespace": "beta"}});
    let set = json!({"action": "set", "namespace": "beta", "name": "db", "data": clear});
    let with = |name: &str, value: Value| {
        let mut body = site.unwanted();
        body[name] = value;
        body.to_string().into_bytes()
    };
    let of = |kind: &str, spec: Value| {
        json!({"cluster": site.cluster, "kind": kind, "spec": spec}).to_string().into_bytes()
    };
    vec![
        (Vec::new(), "bad_job"),
        (b"null".to_vec(), "bad_job"),
        (vec![0xff, 0xfe, 0, 1], "bad_job"),
        ("[".repeat(200_000).into_bytes(), "bad_job"),
        (format!("{{\"cluster\":\"{CANARY}\"").into_bytes(), "bad_job"),
        (with("later", json!(CANARY)), "bad_job"),
        (with("all", json!(true)), "bad_job"),
        (with("ttl_s", json!(CANARY)), "bad_job"),
        (with("padding", json!("x".repeat(1 << 20))), "bad_job"),
        (of("apply", json!({"objects": [secret]})), "secret_in_clear"),
        (of("apply", json!({"objects": [{"kind": "List", "items": [secret]}]})), "secret_in_clear"),
        (of("secret", set), "secret_in_clear"),
        (of("dance", json!({"with": CANARY})), "bad_operation"),
        (of("apply", json!({"objects": CANARY})), "bad_operation"),
        (
            of(
                "secret",
                json!({"action": "set", "namespace": "beta", "name": "db",
            "data": {"password": {"sealed": base64::engine::general_purpose::STANDARD
                .encode([7; 60])}}}),
            ),
            "sealed_unreadable",
        ),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn three_hundred_hostile_messages_have_no_effect_and_keep_nobody_waiting() {
    let Some(site) = Site::new().await else { return };
    let mut runner = site.runner("").await;
    site.ready(&site.project, 1).await;
    let process = runner.child.id();
    for (body, reason) in poison(&site) {
        let asked = json!({"sha256": sha256(&body)});
        let told = site.control_plane.json("POST", "/api/v1/job-tokens", &site.maker, asked).await;
        let text = |name: &str| told[name].as_str().unwrap().to_owned();
        let order = Order { id: text("id"), token: text("token"), body: String::new() };
        let planted = Planted { properties: properties(&site.project, &order), body };
        site.refused(planted, reason).await;
    }
    assert!(site.kube.patched.lock().unwrap().is_empty(), "something was done");
    let order = site.order(&site.unwanted()).await;
    let other = site.order(&site.count(3, 3)).await;
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let all: Vec<Planted> =
        (0..300).map(|_| hostile(&site.project, &order, &other, &mut random)).collect();
    let begun = Instant::now();
    site.plant(all).await;
    // behind them, one that is good
    site.publish(&[other]).await;
    let dead = site.dead(300).await;
    let mut reasons = BTreeMap::<String, usize>::new();
    for letter in &dead {
        nothing_secret(letter);
        let reason = letter.json()["reason"].as_str().unwrap().to_owned();
        *reasons.entry(reason).or_default() += 1;
    }
    println!("300 hostile messages in {:?}: {reasons:?}", begun.elapsed());
    for reason in reasons.keys() {
        run_output(
            std::process::Command::new(crate::support::program())
                .args(["explain", reason])
                .output()
                .unwrap(),
        )
        .ended(0);
    }
    let good = |heard: &[Message]| heard.iter().any(|m| m.json()["state"] == "succeeded");
    let answers = collect(&site.rabbit.url, &site.project.answers, good).await;
    for answer in answers {
        nothing_secret(&answer);
    }
    assert_eq!(site.counted(), BTreeMap::from([("app-3".to_owned(), vec![3])]));
    assert!(runner.lives() && runner.child.id() == process, "{}", runner.log());
    assert_eq!(super::waiting(&site.rabbit.url, &site.project.dead).await, 0);
    sealed_values(&site, &runner).await;
}

/// What no client of AMQP in Rust sends: a text of a property that is none.
const UNREADABLE: &str = r#"
import pika, sys
channel = pika.BlockingConnection(pika.URLParameters(sys.argv[1])).channel()
channel.basic_publish(sys.argv[2], "", b"{}", pika.BasicProperties(message_id=b"\xff"))
channel.connection.close()
"#;

/// A message that ends the connection of whoever gets it goes at last, and so do all behind it.
#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_cannot_be_read_is_named_and_gives_way() {
    let Some(site) = Site::new().await else { return };
    let package = match super::cloud_events::packages() {
        Ok(package) => package,
        Err(why) => {
            println!("NOT RUN: pika, a client of RabbitMQ for Python: {why}");
            return;
        }
    };
    let mut runner = site.runner("").await;
    site.ready(&site.project, 1).await;
    let mut python = std::process::Command::new("python3");
    python.args(["-c", UNREADABLE, &site.rabbit.url, &site.project.exchange]);
    run_output(python.env("PYTHONPATH", package).output().unwrap()).ended(0);
    let order = site.order(&site.count(0, 0)).await;
    site.publish(std::slice::from_ref(&order)).await;
    runner.says("message_unreadable", Duration::from_secs(30)).await;
    let begun = Instant::now();
    while site.counted().is_empty() {
        assert!(begun.elapsed() < Duration::from_secs(400), "{}", runner.log());
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    println!("a message that cannot be read is gone after {:?}", begun.elapsed());
    assert_eq!(site.answer_to(&order).await["state"], "succeeded");
    assert!(runner.lives());
}

/// xorshift64: the same messages in each run.
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % u64::try_from(end).unwrap()).unwrap()
    }
}

/// A message that must not be done, made of a job by chance.
fn hostile(project: &Project, order: &Order, other: &Order, random: &mut Random) -> Planted {
    let mut headers = headers(project, order);
    let mut body = order.body.clone().into_bytes();
    let mut properties = properties(project, order);
    match random.below(11) {
        0 => {
            for _ in 0..=random.below(4) {
                let at = random.below(body.len());
                body[at] ^= 1_u8 << random.below(8);
            }
            body.push(b' ');
        }
        1 => body.truncate(random.below(body.len())),
        2 => body = (0..random.below(4096)).map(|_| random.below(256) as u8).collect(),
        3 => body.extend_from_slice(&order.body.clone().into_bytes()),
        // a token of many kinds, but never the right one
        4 => {
            let mut token = order.token.clone().into_bytes();
            let at = random.below(token.len() - 2);
            token[at] = if token[at] == b'A' { b'B' } else { b'A' };
            let token = String::from_utf8(token).unwrap();
            headers.insert("cloudEvents:pipeopstoken".into(), text(&token));
        }
        5 => {
            let mut inner = FieldTable::default();
            inner.insert("token".into(), text(&order.token));
            let value = match random.below(5) {
                0 => AMQPValue::FieldTable(inner),
                1 => AMQPValue::LongLongInt(7),
                2 => AMQPValue::Boolean(true),
                3 => AMQPValue::Void,
                _ => AMQPValue::LongString(vec![0xff_u8; 1 + random.below(9000)].into()),
            };
            headers.insert("cloudEvents:pipeopstoken".into(), value);
        }
        6 => headers = FieldTable::default(),
        // a good one, for another body
        7 => {
            headers.insert("cloudEvents:pipeopstoken".into(), text(&other.token));
        }
        8 => {
            let queues = ["pipeops.dead.x", "pipeops.answers.", "\0", "a b", "pipeops.jobs"];
            properties = properties.with_reply_to(queues[random.below(queues.len())].into());
        }
        9 => {
            // of no use to anybody
            body = "{".repeat(1 + random.below(60_000)).into_bytes();
            properties = BasicProperties::default();
            return Planted { properties, body };
        }
        _ => {
            properties = properties
                .with_content_type("application/xml".into())
                .with_content_encoding("gzip".into())
                .with_expiration("3600000".into())
                .with_priority(255)
                .with_correlation_id("x".repeat(255).as_str().into());
            body = vec![b' '; 1 + random.below(1000)];
        }
    }
    Planted { properties: properties.with_headers(headers), body }
}

/// Values of Secrets come sealed, and nowhere else than in the cluster do they stand in clear.
async fn sealed_values(site: &Site, runner: &Runner) {
    // the first Runner has made the key of its project, and told its public half
    let begun = Instant::now();
    let (key, maker) = loop {
        let told = site.asked(&site.maker, "{}", json!({})).await;
        match told["sealing_key"].as_str() {
            Some(key) => break (key.to_owned(), told["maker"].as_str().unwrap().to_owned()),
            None => assert!(begun.elapsed() < super::PATIENCE, "{}", runner.log()),
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    };
    let sealed = seal(&key, &site.project.id, &maker, SEALED);
    assert_ne!(sealed, seal(&key, &site.project.id, &maker, SEALED), "twice the same");
    let body = json!({"cluster": site.cluster, "kind": "secret", "spec": {"action": "set",
        "namespace": "beta", "name": "db", "data": {"password": {"sealed": sealed}}}});
    let answer = site.done(&body).await;
    assert_eq!(answer["state"], "succeeded", "{answer}");
    let value = base64::engine::general_purpose::STANDARD.encode(SEALED);
    let secrets = "/api/v1/namespaces/beta/secrets/db-";
    let there = |path: &str, object: &Value| {
        path.starts_with(secrets) && object["data"]["password"] == value.as_str()
    };
    let made = site.kube.objects.lock().unwrap().iter().any(|(path, object)| there(path, object));
    assert!(made, "{:?}", site.kube.objects.lock().unwrap());
    // one that is sealed for another project
    let other = seal(&key, "p-0000000000000000", &maker, SEALED);
    let mut foreign = body.clone();
    foreign["spec"]["data"]["password"]["sealed"] = other.into();
    let foreign = site.order(&foreign).await;
    let planted = site.planted(&foreign);
    site.refused(planted, "sealed_unreadable").await;
    // and what one maker has sealed, in a job of another one
    let thief = site.control_plane.runner("deployer").await;
    let stolen = site.order_of(thief["token"].as_str().unwrap(), &body, json!({})).await;
    let planted = site.planted(&stolen);
    site.refused(planted, "sealed_unreadable").await;
    // the broker has it on disk as it came, and in clear nobody has
    let kept = texts(site.rabbit.dir.path());
    assert!(kept.contains(&sealed), "the files of the broker hold no job");
    let elsewhere = [
        kept,
        texts(&site.control_plane.sandbox.root().join(DATA)),
        texts(&site.agent.sandbox.root().join("var/lib/pipeops-agent")),
        texts(site.dir.path()),
        site.control_plane.log.lock().unwrap().clone(),
        site.agent.log(),
        runner.log(),
    ];
    for (which, text) in elsewhere.iter().enumerate() {
        for secret in ["canary-2277-in-plain-text", &value[..20]] {
            assert!(!text.contains(secret), "{which}");
        }
    }
}

/// A value as `pipeops runner seal` seals it.
fn seal(key: &str, project: &str, maker: &str, value: &str) -> String {
    use std::io::Write as _;
    let mut child = std::process::Command::new(crate::support::program())
        .args(["runner", "seal", "--key", key, "--project", project, "--maker", maker])
        .env_clear()
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(value.as_bytes()).unwrap();
    run_output(child.wait_with_output().unwrap()).ended(0).out.trim().to_owned()
}
