//! What a program has done on a cluster that it hears of over RabbitMQ: it deploys through the
//! gateway, once more straight through the tunnel, once as an operation whose end it hears, and once
//! as a job, which a `pipeops runner` takes from the queue and answers.
//!
//! DIR holds what such a program is given: `amqp-url`, `control-plane` (URL), `ca.pem`, `token`.

use std::collections::{BTreeMap, HashSet};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use http_body_util::{BodyExt as _, Full};
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use lapin::options::{
    BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, ConfirmSelectOptions,
    QueueBindOptions, QueueDeclareOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Connection, ConnectionProperties};
use pipeops::base::encoding::hex;
use pipeops::base::secret::Secret;
use pipeops::base::trust::{Pin, Trust};
use pipeops::frp::{TunnelConfig, TunnelTls};
use serde_json::{Value, json};
use sha2::Digest as _;

/// How a Runner speaks to a cluster: through the gateway, or through the tunnel's FRP server.
enum Way {
    Gateway { client: reqwest::Client, base: String, token: String },
    Direct { config: Box<TunnelConfig>, proxy: String, key: Secret, agent: Pin, token: String },
}

impl Way {
    async fn call(&self, method: &str, path: &str, body: Option<&Value>) -> (u16, Value) {
        let text = body.map(Value::to_string).unwrap_or_default();
        let kind =
            if method == "PATCH" { "application/apply-patch+yaml" } else { "application/json" };
        match self {
            Way::Gateway { client, base, token } => {
                let request = client
                    .request(method.parse().unwrap(), format!("{base}{path}"))
                    .bearer_auth(token)
                    .header("content-type", kind);
                let answer = request.body(text).send().await.unwrap();
                let status = answer.status().as_u16();
                (status, serde_json::from_slice(&answer.bytes().await.unwrap()).unwrap_or_default())
            }
            Way::Direct { config, proxy, key, agent, token } => {
                let mut tasks = tokio::task::JoinSet::new();
                let connector = pipeops::frp::dial::Dialer::new(config, false)
                    .unwrap()
                    .connect(&mut tasks)
                    .await
                    .unwrap();
                let io = pipeops::frp::client::visit(&connector, "", proxy, key).await.unwrap();
                // whoever runs the FRP server sees nothing: TLS to the agent's own key inside
                let tls = Trust { pins: vec![agent.clone()], ..Trust::default() }
                    .client_config()
                    .unwrap();
                let name =
                    rustls_pki_types::ServerName::try_from("agent.pipeops.internal").unwrap();
                let io = tokio_rustls::TlsConnector::from(Arc::new(tls))
                    .connect(name, io)
                    .await
                    .unwrap();
                let (mut sender, connection) =
                    hyper::client::conn::http1::handshake(TokioIo::new(io)).await.unwrap();
                tasks.spawn(async move { drop(connection.await) });
                let request = http::Request::builder()
                    .method(method)
                    .uri(path)
                    .header("host", "agent")
                    .header("content-type", kind);
                let request = request
                    .header("authorization", format!("Bearer {token}"))
                    .body(Full::new(Bytes::from(text)))
                    .unwrap();
                let answer = sender.send_request(request).await.unwrap();
                let status = answer.status().as_u16();
                (
                    status,
                    serde_json::from_slice(&answer.into_body().collect().await.unwrap().to_bytes())
                        .unwrap_or_default(),
                )
            }
        }
    }

    /// A deployment as PipeOps would make it, until its pods run; then it is taken away.
    async fn deploy(&self, name: &str, image: &str) -> Result<String, String> {
        let path = format!("/k8s/apis/apps/v1/namespaces/production/deployments/{name}");
        let object = deployment(name, image);
        let begun = Instant::now();
        let (status, answer) =
            self.call("PATCH", &format!("{path}?fieldManager=pipeops-runner"), Some(&object)).await;
        if !matches!(status, 200 | 201) {
            return Err(format!("apply: {status} {answer}"));
        }
        loop {
            let (_, seen) = self.call("GET", &path, None).await;
            if seen["status"]["readyReplicas"] == 1 {
                break;
            }
            if begun.elapsed() > Duration::from_secs(120) {
                return Err(format!("never ready: {}", seen["status"]));
            }
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
        let ready = begun.elapsed();
        // what is forbidden to a deployer is forbidden to it
        let (refused, _) =
            self.call("GET", "/k8s/api/v1/namespaces/production/secrets", None).await;
        if refused != 403 {
            return Err(format!("secrets: {refused}"));
        }
        let (status, answer) = self.call("DELETE", &path, None).await;
        if status != 200 {
            return Err(format!("delete: {status} {answer}"));
        }
        Ok(format!("ready after {:.1} s, secrets refused, deleted", ready.as_secs_f32()))
    }
}

/// Hears events until one is what is waited for, each once.
async fn hear(url: &str, mut wanted: impl FnMut(&Value) -> bool) -> Option<Value> {
    let connection = Connection::connect(url, ConnectionProperties::default()).await.unwrap();
    let channel = connection.create_channel().await.unwrap();
    let durable = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
    channel.queue_declare("pipeops.runners".into(), durable, FieldTable::default()).await.unwrap();
    let mut consumer = channel
        .basic_consume(
            "pipeops.runners".into(),
            "runner".into(),
            BasicConsumeOptions::default(),
            FieldTable::default(),
        )
        .await
        .unwrap();
    let (mut seen, mut heard) = (HashSet::new(), BTreeMap::<String, u32>::new());
    while let Ok(Some(Ok(delivery))) =
        tokio::time::timeout(Duration::from_secs(120), consumer.next()).await
    {
        let body: Value = serde_json::from_slice(&delivery.data).unwrap();
        delivery.ack(BasicAckOptions::default()).await.unwrap();
        // a copy of what was heard already
        if !seen.insert(body["message_id"].as_str().unwrap_or_default().to_owned()) {
            continue;
        }
        let what = format!("{} of {}", body["type"], body["cluster_name"]);
        *heard.entry(what).or_default() += 1;
        if wanted(&body) {
            println!("heard {heard:?}");
            return Some(body);
        }
    }
    println!("heard {heard:?}");
    None
}

/// Waits for a cluster to be announced; gives the event of its registration.
async fn announced(url: &str) -> Value {
    let mut registered = Value::Null;
    hear(url, |event| {
        match event["type"].as_str() {
            Some("agent.registered") => registered = event.clone(),
            Some("agent.online") => return registered["agent_id"] == event["agent_id"],
            _ => {}
        }
        false
    })
    .await;
    registered
}

/// The same deployment as an operation: nobody holds a connection, the broker says when it is done.
async fn operate(
    client: &reqwest::Client,
    operations: &str,
    token: &str,
    amqp: &str,
    image: &str,
) -> Result<String, String> {
    let begun = Instant::now();
    let named = json!({"apiVersion": "apps/v1", "kind": "Deployment", "name": "operated", "namespace": "production"});
    for (key, body) in [
        (
            "deploy-1",
            json!({"kind": "apply", "ttl_s": 300, "spec": {"objects": [deployment("operated", image)]}}),
        ),
        ("remove-1", json!({"kind": "delete", "ttl_s": 300, "spec": {"objects": [named]}})),
    ] {
        let answer = client
            .post(operations)
            .bearer_auth(token)
            .header("idempotency-key", key)
            .json(&body)
            .send()
            .await
            .unwrap();
        let (status, taken) =
            (answer.status().as_u16(), answer.json::<Value>().await.unwrap_or_default());
        if status != 202 {
            return Err(format!("{key}: {status} {taken}"));
        }
        let ended = hear(amqp, |event| {
            event["type"] == "operation.finished" && event["operation"]["id"] == taken["id"]
        })
        .await;
        let Some(ended) = ended else { return Err(format!("{key}: its end was not heard")) };
        if ended["operation"]["state"] != "succeeded" {
            return Err(format!("{key}: {}", ended["operation"]));
        }
    }
    Ok(format!("both ends heard after {:.1} s", begun.elapsed().as_secs_f32()))
}

/// The same deployment as jobs: whoever publishes them needs a token for each, and no way to the
/// cluster.
async fn order(
    client: &reqwest::Client,
    url: &str,
    token: &str,
    amqp: &str,
    cluster: &str,
    image: &str,
) -> Result<String, String> {
    let connection = Connection::connect(amqp, ConnectionProperties::default()).await.unwrap();
    let channel = connection.create_channel().await.unwrap();
    channel.confirm_select(ConfirmSelectOptions::default()).await.unwrap();
    let begun = Instant::now();
    let named = json!({"apiVersion": "apps/v1", "kind": "Deployment", "name": "ordered", "namespace": "production"});
    for (kind, objects) in
        [("apply", json!([deployment("ordered", image)])), ("delete", json!([named]))]
    {
        let body = json!({"cluster": cluster, "kind": kind, "spec": {"objects": objects}});
        let body = body.to_string();
        let asked = json!({"sha256": hex(&sha2::Sha256::digest(&body))});
        let request =
            client.post(format!("{url}/api/v1/job-tokens")).bearer_auth(token).json(&asked);
        let told: Value = request.send().await.unwrap().json().await.unwrap();
        let text = |name: &str| told[name].as_str().unwrap_or_default().to_owned();
        if text("token").is_empty() {
            return Err(format!("no token for a job: {told}"));
        }
        let queue = format!("{}.of-{}", text("reply_queue"), text("id"));
        let name = || queue.as_str().into();
        let options = QueueDeclareOptions { exclusive: true, ..QueueDeclareOptions::default() };
        channel.queue_declare(name(), options, FieldTable::default()).await.unwrap();
        let (exchange, options) = (text("reply_queue"), QueueBindOptions::default());
        let bound = channel.queue_bind(
            name(),
            exchange.as_str().into(),
            name(),
            options,
            FieldTable::default(),
        );
        bound.await.map_err(|e| format!("no Runner has made {exchange}: {e}"))?;
        let options = BasicConsumeOptions::default();
        let consumed = channel.basic_consume(name(), "".into(), options, FieldTable::default());
        let mut answers = consumed.await.unwrap();
        let mut headers = FieldTable::default();
        let value = AMQPValue::LongString(text("token").as_str().into());
        headers.insert("cloudEvents:pipeopstoken".into(), value);
        let properties = BasicProperties::default()
            .with_delivery_mode(2)
            .with_content_type("application/json".into())
            .with_message_id(text("id").as_str().into())
            .with_reply_to(name())
            .with_headers(headers);
        let (exchange, options) = (text("exchange"), BasicPublishOptions::default());
        let sent = channel.basic_publish(
            exchange.as_str().into(),
            "".into(),
            options,
            body.as_bytes(),
            properties,
        );
        assert!(sent.await.unwrap().await.unwrap().is_ack());
        let answer = tokio::time::timeout(Duration::from_secs(180), answers.next()).await;
        let Ok(Some(Ok(answer))) = answer else { return Err(format!("{kind}: no answer")) };
        let answer: Value = serde_json::from_slice(&answer.data).unwrap();
        if answer["state"] != "succeeded" || answer["job"] != told["id"] {
            return Err(format!("{kind}: {answer}"));
        }
    }
    Ok(format!("both answered after {:.1} s", begun.elapsed().as_secs_f32()))
}

fn deployment(name: &str, image: &str) -> Value {
    let labels = json!({"app": name});
    json!({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": name, "namespace": "production"},
        "spec": {"replicas": 1, "selector": {"matchLabels": labels}, "template": {
            "metadata": {"labels": labels},
            "spec": {"tolerations": [{"operator": "Exists"}], "terminationGracePeriodSeconds": 1,
                "containers": [{"name": "c", "image": image, "imagePullPolicy": "Never", "command": ["sleep", "100000"]}]}}},
    })
}

/// Exit code of the run: 0 when all ways deployed.
pub(crate) async fn runner(dir: &str, image: &str) -> i32 {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let read =
        |name: &str| std::fs::read_to_string(Path::new(dir).join(name)).unwrap().trim().to_owned();
    let (url, token) = (read("control-plane"), read("token"));
    let event = announced(&read("amqp-url")).await;
    let Some(base) = event["endpoint"].as_str() else {
        println!("WRONG no cluster was announced");
        return 1;
    };
    let ca = reqwest::Certificate::from_pem(read("ca.pem").as_bytes()).unwrap();
    let client = reqwest::Client::builder().tls_certs_only([ca]).no_proxy().build().unwrap();
    let cluster = event["cluster_id"].as_str().unwrap();
    // the first tunnel is up a moment after the registration
    let begun = Instant::now();
    let gateway =
        Way::Gateway { client: client.clone(), base: base.to_owned(), token: token.clone() };
    while gateway.call("GET", "/k8s/version", None).await.0 != 200
        && begun.elapsed() < Duration::from_secs(60)
    {
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    let asked = client
        .post(format!("{url}/api/v1/clusters/{cluster}/token"))
        .bearer_auth(&token)
        .json(&json!({"namespaces": ["production"]}));
    let minted: Value = asked.send().await.unwrap().json().await.unwrap();
    let endpoint =
        minted["endpoints"].as_array().unwrap().iter().find(|e| e["type"] == "stcp").unwrap();
    let text = |name: &str| endpoint[name].as_str().unwrap_or_default().to_owned();
    let address = text("address");
    let (host, port) = address.rsplit_once(':').unwrap();
    let direct = Way::Direct {
        config: Box::new(TunnelConfig {
            server: host.into(),
            port: port.parse().unwrap(),
            tcp_mux: true,
            tls: TunnelTls { pin: Some(text("server_pin")), ..TunnelTls::default() },
            ..TunnelConfig::default()
        }),
        proxy: text("proxy"),
        key: Secret::new(text("secret_key")),
        agent: Pin::parse(&text("agent_pin")).unwrap(),
        token: minted["token"].as_str().unwrap().to_owned(),
    };
    let mut code = 0;
    for (name, way) in [("through the gateway", &gateway), ("straight through the tunnel", &direct)]
    {
        match way.deploy(if code == 0 { "by-runner" } else { "again" }, image).await {
            Ok(text) => println!("ok a deployment {name}: {text}"),
            Err(text) => {
                println!("WRONG a deployment {name}: {text}");
                code = 1;
            }
        }
    }
    match operate(
        &client,
        &format!("{url}/api/v1/clusters/{cluster}/operations"),
        &token,
        &read("amqp-url"),
        image,
    )
    .await
    {
        Ok(text) => println!("ok a deployment as an operation: {text}"),
        Err(text) => {
            println!("WRONG a deployment as an operation: {text}");
            code = 1;
        }
    }
    match order(&client, &url, &token, &read("amqp-url"), cluster, image).await {
        Ok(text) => println!("ok a deployment as a job: {text}"),
        Err(text) => {
            println!("WRONG a deployment as a job: {text}");
            code = 1;
        }
    }
    code
}
