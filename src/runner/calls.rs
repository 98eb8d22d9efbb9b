//! Calls of the control plane over HTTPS.

use std::time::Duration;

use reqwest::{Client, Method};
use serde_json::Value;

use super::config::RunnerConfig;
use crate::base::http::explain;
use crate::base::resolve::Resolver;
use crate::base::secret::Secret;
use crate::base::trust;
use crate::host::Host;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// The control plane holds a call that waits for the end of a job for this long, seconds.
pub(super) const WAIT_S: u64 = 20;
/// Longest time of a call.
const TIMEOUT: Duration = Duration::from_secs(WAIT_S + 15);
/// Longest answer, bytes: a rollout over 2,000 clusters.
const MAX_ANSWER: usize = 8 << 20;

/// The control plane, as one token of a Runner sees it.
pub(super) struct Calls {
    client: Client,
    base: String,
    token: Secret,
}

impl Calls {
    /// # Errors
    /// Settings, or files that they name, that cannot be used.
    pub(super) fn new(config: &RunnerConfig, host: &Host) -> anyhow::Result<Calls> {
        let tls = config.trust(host)?.client_config().map_err(anyhow::Error::msg)?;
        let mut client = Client::builder();
        // this machine itself: a proxy would send the token on in clear
        if config.url().starts_with("http:") {
            client = client.no_proxy();
        }
        let client = client
            .tls_backend_preconfigured(tls)
            .connect_timeout(CONNECT_TIMEOUT)
            .timeout(TIMEOUT)
            .dns_resolver(Resolver::shared())
            .redirect(reqwest::redirect::Policy::none())
            .user_agent(concat!("pipeops/", env!("CARGO_PKG_VERSION")))
            .build()
            .map_err(|e| anyhow::anyhow!(explain(&e)))?;
        let base = config.url().trim_end_matches('/').to_owned();
        Ok(Calls { client, base, token: config.token(host)? })
    }

    /// The status and the body of the answer; null for a body that is no JSON.
    ///
    /// # Errors
    /// Why there is no answer, in one line.
    pub(super) async fn call(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
    ) -> Result<(u16, Value), String> {
        let mut request = self
            .client
            .request(method, format!("{}{path}", self.base))
            .bearer_auth(self.token.expose());
        if let Some(body) = body {
            request = request.header("Content-Type", "application/json").body(body.to_string());
        }
        let failed = |e: reqwest::Error| {
            let text = explain(&e);
            match trust::explain(&text) {
                Some((code, remedy)) => format!("{code}: {text}; {remedy}"),
                None => text,
            }
        };
        let mut answer = request.send().await.map_err(failed)?;
        let mut body = Vec::new();
        while let Some(piece) = answer.chunk().await.map_err(failed)? {
            if body.len() + piece.len() > MAX_ANSWER {
                return Err("its answer is longer than 8 MiB".into());
            }
            body.extend_from_slice(&piece);
        }
        Ok((answer.status().as_u16(), serde_json::from_slice(&body).unwrap_or_default()))
    }
}
