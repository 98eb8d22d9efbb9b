//! A Runner as a program outside of the product has it: requests through the gateway and to the
//! control plane; and the table of outcomes that such a program prints.
//!
//! DIR holds what a Runner is given: `control-plane` (URL), `ca.pem`, `token` (of a deployer),
//! `cluster` (its id).

use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::Value;

/// A line of the table: what was planted, what was told of it, the seconds until it was, evidence.
pub(crate) fn row(planted: &str, told: &str, after: Duration, evidence: &str) -> String {
    format!("{planted:<60} {told:<30} {:>6.1} s  {evidence}", after.as_secs_f32())
}

/// The last line: how many outcomes were planted, and how many were told as they were.
pub(crate) fn count(planted: usize, told: usize) {
    println!("count {planted} {told}");
}

pub(crate) struct Runner {
    client: reqwest::Client,
    base: String,
    /// Where the control plane itself takes operations.
    operations: String,
    token: String,
}

impl Runner {
    /// With what DIR holds.
    pub(crate) fn open(dir: &str) -> Runner {
        Runner::with_token(dir, "token")
    }

    /// The same with the token in another file of DIR.
    pub(crate) fn with_token(dir: &str, token: &str) -> Runner {
        let file = |name: &str| {
            std::fs::read_to_string(Path::new(dir).join(name)).unwrap().trim().to_owned()
        };
        let _ = rustls::crypto::ring::default_provider().install_default();
        let ca = reqwest::Certificate::from_pem(file("ca.pem").as_bytes()).unwrap();
        let client = reqwest::Client::builder().tls_certs_only([ca]).no_proxy().build().unwrap();
        let (url, cluster) = (file("control-plane"), file("cluster"));
        let base = format!("{url}/clusters/{cluster}");
        let operations = format!("{url}/api/v1/clusters/{cluster}/operations");
        Runner { client, base, operations, token: file(token) }
    }

    /// A merge patch.
    pub(crate) async fn patch(&self, path: &str, body: &Value) -> (u16, Value) {
        let request = self
            .client
            .patch(format!("{}{path}", self.base))
            .bearer_auth(&self.token)
            .header("content-type", "application/merge-patch+json")
            .body(body.to_string());
        let answer = request.send().await.unwrap();
        let status = answer.status().as_u16();
        (status, serde_json::from_slice(&answer.bytes().await.unwrap()).unwrap_or_default())
    }

    pub(crate) async fn call(
        &self,
        method: &str,
        path: &str,
        key: &str,
        body: &Value,
    ) -> (u16, Value) {
        let (status, answer) = self.ask(method, path, key, body).await;
        assert!(status > 0, "{method} {path}: {answer}");
        (status, answer)
    }

    /// The same where there may be no answer: status 0, and why.
    pub(crate) async fn ask(
        &self,
        method: &str,
        path: &str,
        key: &str,
        body: &Value,
    ) -> (u16, Value) {
        self.send(method, format!("{}{path}", self.base), key, body).await
    }

    /// Asks the control plane itself about operations; `path` is empty or begins with a slash.
    pub(crate) async fn at_control_plane(
        &self,
        method: &str,
        path: &str,
        key: &str,
        body: &Value,
    ) -> (u16, Value) {
        self.send(method, format!("{}{path}", self.operations), key, body).await
    }

    async fn send(&self, method: &str, url: String, key: &str, body: &Value) -> (u16, Value) {
        let request = self
            .client
            .request(method.parse().unwrap(), url)
            .bearer_auth(&self.token)
            .header("idempotency-key", key);
        let request = if body.is_null() { request } else { request.json(body) };
        let answer = match request.send().await {
            Ok(answer) => answer,
            Err(error) => return (0, format!("{error:?}").into()),
        };
        let status = answer.status().as_u16();
        match answer.bytes().await {
            Ok(bytes) => (status, serde_json::from_slice(&bytes).unwrap_or_default()),
            Err(error) => (0, format!("{error:?}").into()),
        }
    }

    /// Reads the events of an operation until its end.
    pub(crate) async fn followed(&self, id: &str) -> Result<(), String> {
        let url = format!("{}/api/v1/operations/{id}/events", self.base);
        let sent = self.client.get(url).bearer_auth(&self.token).send().await;
        let mut answer = sent.map_err(|e| format!("{e:?}"))?;
        let mut said = String::new();
        while let Some(piece) = answer.chunk().await.map_err(|e| format!("{e:?}"))? {
            said.push_str(&String::from_utf8_lossy(&piece));
            if said.contains("event: end") {
                return Ok(());
            }
        }
        Err(format!("{}: its events have no end: {said}", answer.status()))
    }

    pub(crate) async fn operate(&self, key: &str, body: &Value) -> Result<String, String> {
        let (status, taken) = self.call("POST", "/api/v1/operations", key, body).await;
        match taken["id"].as_str() {
            Some(id) if status == 202 => Ok(id.to_owned()),
            _ => Err(format!("{status} {taken}")),
        }
    }

    /// Asks until the operation is as wanted, or its time is over.
    pub(crate) async fn until(
        &self,
        id: &str,
        within: Duration,
        wanted: impl Fn(&Value) -> bool,
    ) -> Value {
        let begun = Instant::now();
        loop {
            let (_, seen) =
                self.call("GET", &format!("/api/v1/operations/{id}"), "", &Value::Null).await;
            if wanted(&seen) || begun.elapsed() > within {
                return seen;
            }
            tokio::time::sleep(Duration::from_millis(250)).await;
        }
    }
}
