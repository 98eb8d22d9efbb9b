//! Jobs over RabbitMQ, through Runners, tunnel and agent: how many a second with one, two and three
//! Runners, and how long one takes beside the same operation over HTTPS.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use axum::extract::Request;
use axum::response::{IntoResponse as _, Response};
use futures_util::StreamExt as _;
use lapin::options::{
    BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, ConfirmSelectOptions,
    QueueBindOptions, QueueDeclareOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Connection, ConnectionProperties, Consumer};
use pipeops::base::encoding::hex;
use serde_json::{Value, json};
use sha2::Digest as _;

use crate::caller::Runner;
use crate::fake_control_plane::{free_port, listen};
use crate::overhead::figures;

/// Over how many applications the jobs are spread.
const APPLICATIONS: usize = 64;
/// Jobs one after another, and calls beside them.
const SINGLE: usize = 100;

/// A program that ends with the bench.
struct Program(Child);

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// An API that has config maps, and takes each as it comes.
async fn kube(request: Request) -> Response {
    let path = request.uri().path().to_owned();
    if path == "/api/v1" {
        let resources = json!([{"name": "configmaps", "kind": "ConfigMap", "namespaced": true}]);
        return axum::Json(json!({"resources": resources})).into_response();
    }
    if request.method() == "PATCH" {
        let body = axum::body::to_bytes(request.into_body(), 1 << 20).await.unwrap();
        return axum::Json(serde_json::from_slice::<Value>(&body).unwrap()).into_response();
    }
    let answer =
        json!({"gitVersion": "v1.36.2+k3s1", "metadata": {"resourceVersion": "7"}, "items": []});
    axum::Json(answer).into_response()
}

/// Control plane and agent, in one directory, which also holds what a Runner is given.
struct Site {
    pipeops: String,
    amqp: String,
    dir: tempfile::TempDir,
    pin: String,
    client: reqwest::Client,
    url: String,
    cluster: String,
    /// Of who makes jobs.
    maker: String,
    project: String,
    _programs: [Program; 2],
}

impl Site {
    async fn new(pipeops: &str, amqp: &str) -> Site {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("control-plane-root").display().to_string();
        let port = free_port();
        let (https, tunnel) = (format!("127.0.0.1:{port}"), format!("127.0.0.1:{}", free_port()));
        let mut control_plane = Command::new(pipeops);
        control_plane
            .args(["control-plane", "--root", &root, "--listen", &https, "--tunnel-listen"])
            .args([tunnel.as_str(), "--public-name", "127.0.0.1"])
            .env("PIPEOPS_AMQP_URL", amqp)
            .stderr(Stdio::null());
        let control_plane = Program(control_plane.spawn().unwrap());
        let verb = |args: &[&str]| {
            let mut command = Command::new(pipeops);
            command.arg("control-plane").args(args).args(["--root", &root]);
            String::from_utf8_lossy(&command.output().unwrap().stdout).trim().to_owned()
        };
        let mut line = String::new();
        for _ in 0..200 {
            line = verb(&["token", "create"]);
            if !line.is_empty() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let words: Vec<&str> = line.split_whitespace().collect();
        let at = words.iter().position(|word| *word == "--control-plane-pin").unwrap();
        let (token, pin) = (words[1].to_owned(), words[at + 1].to_owned());
        let url = format!("https://{https}");
        let agent = start_agent(pipeops, &dir.path().join("agent"), &url, &pin, &token).await;
        let stored = Path::new(&root).join("var/lib/pipeops-control-plane/keys.json");
        let keys: Value = serde_json::from_str(&std::fs::read_to_string(stored).unwrap()).unwrap();
        let ca = keys["ca_certificate"].as_str().unwrap();
        let certificate = reqwest::Certificate::from_pem(ca.as_bytes()).unwrap();
        let client =
            reqwest::Client::builder().tls_certs_only([certificate]).no_proxy().build().unwrap();
        let maker = verb(&["runner", "create", "maker"]);
        for n in 1..=3 {
            let made =
                verb(&["runner", "create", &format!("runner-{n}"), "--role", "viewer", "--jobs"]);
            std::fs::write(dir.path().join(format!("token-{n}")), made).unwrap();
        }
        let cluster = online(&client, &url, &maker).await;
        for (name, text) in [
            ("control-plane", &url),
            ("ca.pem", &ca.to_owned()),
            ("token", &maker),
            ("cluster", &cluster),
        ] {
            std::fs::write(dir.path().join(name), text).unwrap();
        }
        let (pipeops, amqp, project) = (pipeops.to_owned(), amqp.to_owned(), String::new());
        let _programs = [control_plane, agent];
        let mut site =
            Site { pipeops, amqp, dir, pin, client, url, cluster, maker, project, _programs };
        site.project = site.token(b"{}").await["project"].as_str().unwrap().to_owned();
        site
    }

    async fn token(&self, body: &[u8]) -> Value {
        let request = self
            .client
            .post(format!("{}/api/v1/job-tokens", self.url))
            .bearer_auth(&self.maker)
            .json(&json!({"sha256": hex(&sha2::Sha256::digest(body))}));
        request.send().await.unwrap().error_for_status().unwrap().json().await.unwrap()
    }

    /// So many Runners, started together: they share the partitions.
    async fn runners(&self, count: usize) -> Vec<Program> {
        let key = self.dir.path().join("sealing-key");
        std::fs::write(&key, "AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=").unwrap();
        let amqp = self.dir.path().join("amqp-url");
        std::fs::write(&amqp, &self.amqp).unwrap();
        let start = |n: usize| {
            let state = self.dir.path().join(format!("runner-{n}"));
            std::fs::create_dir_all(&state).unwrap();
            let config = self.dir.path().join(format!("runner-{n}.toml"));
            let text = format!(
                "control-plane-url = \"{}\"\ncontrol-plane-pin = [\"{}\"]\ntoken-file = \"{}\"\n\
                 amqp-url-file = \"{}\"\nproject = \"{}\"\nsealing-key-file = \"{}\"\n",
                self.url,
                self.pin,
                self.dir.path().join(format!("token-{n}")).display(),
                amqp.display(),
                self.project,
                key.display(),
            );
            std::fs::write(&config, text).unwrap();
            let mut command = Command::new(&self.pipeops);
            command.args(["runner", "--config"]).arg(config).env("STATE_DIRECTORY", state);
            Program(command.env("LOG_LEVEL", "error").stderr(Stdio::null()).spawn().unwrap())
        };
        let runners = (1..=count).map(start).collect();
        let begun = Instant::now();
        let counted = format!("pipeops.jobs.{}.runners", self.project);
        while consumers(&self.amqp, &counted).await != u32::try_from(count).ok() {
            assert!(begun.elapsed() < Duration::from_secs(60), "the Runners do not come up");
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        runners
    }

    fn body(&self, application: usize, number: usize) -> Value {
        json!({"kind": "apply", "spec": {"wait": false, "objects": [
            {"apiVersion": "v1", "kind": "ConfigMap", "data": {"number": number.to_string()},
             "metadata": {"name": format!("app-{application}"), "namespace": "beta"}}]}})
    }

    /// A job with its token, ready to be published.
    async fn job(&self, number: usize) -> (BasicProperties, Vec<u8>) {
        let mut body = self.body(number % APPLICATIONS, number);
        body["cluster"] = self.cluster.as_str().into();
        let body = body.to_string().into_bytes();
        let told = self.token(&body).await;
        let mut headers = FieldTable::default();
        let token = AMQPValue::LongString(told["token"].as_str().unwrap().into());
        headers.insert("cloudEvents:pipeopstoken".into(), token);
        let properties = BasicProperties::default()
            .with_delivery_mode(2)
            .with_content_type("application/json".into())
            .with_message_id(told["id"].as_str().unwrap().into())
            .with_reply_to(self.answers().as_str().into())
            .with_headers(headers);
        (properties, body)
    }

    fn answers(&self) -> String {
        format!("pipeops.answers.{}.bench", self.project)
    }

    /// A channel, and what comes for who has asked.
    async fn open(&self) -> (Channel, Consumer) {
        let connection =
            Connection::connect(&self.amqp, ConnectionProperties::default()).await.unwrap();
        let channel = connection.create_channel().await.unwrap();
        channel.confirm_select(ConfirmSelectOptions::default()).await.unwrap();
        let (queue, table) = (self.answers(), FieldTable::default);
        let name = || queue.as_str().into();
        channel.queue_declare(name(), QueueDeclareOptions::default(), table()).await.unwrap();
        let exchange = format!("pipeops.answers.{}", self.project);
        let options = QueueBindOptions::default();
        channel
            .queue_bind(name(), exchange.as_str().into(), name(), options, table())
            .await
            .unwrap();
        let options = BasicConsumeOptions::default();
        let consumer = channel.basic_consume(name(), "".into(), options, table()).await.unwrap();
        (channel, consumer)
    }

    async fn publish(&self, channel: &Channel, (properties, body): (BasicProperties, Vec<u8>)) {
        let exchange = format!("pipeops.jobs.{}", self.project);
        let options = BasicPublishOptions::default();
        let sent =
            channel.basic_publish(exchange.as_str().into(), "".into(), options, &body, properties);
        assert!(sent.await.unwrap().await.unwrap().is_ack());
    }
}

async fn start_agent(pipeops: &str, root: &Path, url: &str, pin: &str, token: &str) -> Program {
    let kube = listen(axum::Router::new().fallback(kube), ()).await;
    let put = |path: &str, text: String| {
        let path = root.join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    };
    put("etc/machine-id", "0123456789abcdef0123456789abcdef\n".into());
    put(
        "etc/pipeops/agent.toml",
        format!("control-plane-url = \"{url}\"\ncontrol-plane-pin = [\"{pin}\"]\n"),
    );
    let kubeconfig = json!({"apiVersion": "v1", "kind": "Config", "current-context": "c",
        "clusters": [{"name": "l", "cluster": {"server": format!("http://{kube}")}}],
        "contexts": [{"name": "c", "context": {"cluster": "l", "user": "u"}}],
        "users": [{"name": "u", "user": {"token": "t"}}]});
    put("run/pipeops-credential/kubeconfig", kubeconfig.to_string());
    let mut command = Command::new(pipeops);
    command.args(["run", "--root"]).arg(root).env("AGENT_TOKEN", token);
    Program(command.env("LOG_LEVEL", "error").stderr(Stdio::null()).spawn().unwrap())
}

/// The id of the cluster, once it is reached through the tunnel.
async fn online(client: &reqwest::Client, url: &str, token: &str) -> String {
    let get = async |path: &str| {
        let answer = client.get(format!("{url}{path}")).bearer_auth(token).send().await.ok()?;
        answer.error_for_status().ok()?.json::<Value>().await.ok()
    };
    let begun = Instant::now();
    loop {
        let clusters = get("/api/v1/clusters").await.unwrap_or_default();
        if let Some(id) = clusters["items"][0]["id"].as_str()
            && get(&format!("/clusters/{id}/k8s/version")).await.is_some()
        {
            return id.to_owned();
        }
        assert!(begun.elapsed() < Duration::from_secs(60), "the agent does not come up");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

async fn consumers(url: &str, queue: &str) -> Option<u32> {
    let connection = Connection::connect(url, ConnectionProperties::default()).await.ok()?;
    let channel = connection.create_channel().await.ok()?;
    let options = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
    let declared = channel.queue_declare(queue.into(), options, FieldTable::default()).await;
    Some(declared.ok()?.consumer_count())
}

/// The next answer; its job must have succeeded.
async fn answered(answers: &mut Consumer) {
    let delivery = answers.next().await.unwrap().unwrap();
    let answer: Value = serde_json::from_slice(&delivery.data).unwrap();
    assert_eq!(answer["state"], "succeeded", "{answer}");
    delivery.ack(BasicAckOptions::default()).await.unwrap();
}

/// Prints jobs a second, and the times of single ones.
pub(crate) async fn jobs(pipeops: &str, amqp: &str, count: usize) {
    let site = Site::new(pipeops, amqp).await;
    let mut next = 0;
    for runners in 1..=3 {
        let _runners = site.runners(runners).await;
        let (channel, mut answers) = site.open().await;
        let mut jobs = Vec::new();
        for _ in 0..count {
            jobs.push(site.job(next).await);
            next += 1;
        }
        let begun = Instant::now();
        let published = async {
            for job in jobs {
                site.publish(&channel, job).await;
            }
        };
        let heard = async {
            for _ in 0..count {
                answered(&mut answers).await;
            }
        };
        tokio::join!(published, heard);
        let took = begun.elapsed();
        println!(
            "{count} jobs with {runners} Runner{}: {:.0}/s, {:.2} s",
            if runners == 1 { "" } else { "s" },
            count as f64 / took.as_secs_f64(),
            took.as_secs_f64()
        );
    }
    let _runner = site.runners(1).await;
    let (channel, mut answers) = site.open().await;
    let caller = Runner::open(site.dir.path().to_str().unwrap());
    let [mut ours, mut theirs] = [Vec::new(), Vec::new()];
    for n in 0..SINGLE {
        for side in [n % 2, (n + 1) % 2] {
            next += 1;
            if side == 0 {
                let job = site.job(next).await;
                let begun = Instant::now();
                site.publish(&channel, job).await;
                answered(&mut answers).await;
                ours.push(begun.elapsed());
            } else {
                let body = site.body(next % APPLICATIONS, next);
                let begun = Instant::now();
                let key = format!("bench-{next}");
                let (status, taken) = caller.at_control_plane("POST", "", &key, &body).await;
                assert_eq!(status, 202, "{taken}");
                caller.followed(taken["id"].as_str().unwrap()).await.unwrap();
                theirs.push(begun.elapsed());
            }
        }
    }
    let [p50, p99] = figures("one job, from the queue to its answer", &mut ours);
    let [their_p50, their_p99] = figures("the same operation over HTTPS, to its end", &mut theirs);
    println!(
        "ratio {:.2} at p50, {:.2} at p99, of {SINGLE} each, in turn",
        p50 / their_p50,
        p99 / their_p99
    );
}
