//! HTTP requests to a control plane, and what their answers mean.

use std::time::Duration;

use reqwest::{Client, Method, RequestBuilder, Response, StatusCode};
use serde::de::DeserializeOwned;

use super::RequestOutcome;
use super::identity::StoredCredential;
use crate::base::http::{check_url, clock_offset};
use crate::base::json;
use crate::base::resolve::Resolver;
use crate::base::secret::Secret;
use crate::base::trust::{Trust, explain};
use crate::contract::types::Problem;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const REQUEST_TIMEOUT: Duration = Duration::from_secs(15);
/// Longest answer, bytes.
const MAX_RESPONSE: usize = 1 << 20;

/// The result of a request, and the offset of this clock that its answer showed, seconds.
pub(super) type Reply<T> = (Result<T, RequestOutcome>, Option<i64>);

/// Requests to the agent paths of one control plane.
#[derive(Clone)]
pub(super) struct HttpClient {
    client: Client,
    base: String,
}

impl HttpClient {
    pub(super) fn new(url: &str, trust: &Trust, proxy: Option<&str>) -> Result<HttpClient, String> {
        check_url(url)?;
        let mut client = Client::builder();
        if let Some(proxy) = proxy {
            client = client.proxy(
                reqwest::Proxy::https(proxy)
                    .map_err(|_| "https-proxy is no URL of a proxy".to_owned())?,
            );
        }
        let client = client
            .tls_backend_preconfigured(trust.client_config()?)
            .connect_timeout(CONNECT_TIMEOUT)
            .timeout(REQUEST_TIMEOUT)
            .dns_resolver(Resolver::shared())
            .pool_idle_timeout(Duration::from_secs(300))
            .redirect(reqwest::redirect::Policy::none())
            .user_agent(concat!("pipeops/", env!("CARGO_PKG_VERSION")))
            .build()
            .map_err(|e| crate::base::http::explain(&e))?;
        Ok(HttpClient { client, base: format!("{}/api/v1/agents", url.trim_end_matches('/')) })
    }

    pub(super) fn request(&self, method: Method, path: &str, bearer: &Secret) -> RequestBuilder {
        self.client
            .request(method, format!("{}{path}", self.base))
            .bearer_auth(bearer.expose())
            .header("Content-Type", "application/json")
    }

    /// Sends a request and reads the answer.
    pub(super) async fn send<T: DeserializeOwned>(&self, request: RequestBuilder) -> Reply<T> {
        let unreachable = |e: &reqwest::Error| {
            let text = crate::base::http::explain(e);
            RequestOutcome::Unreachable(match explain(&text) {
                Some((code, remedy)) => format!("{code}: {text}; {remedy}"),
                None => text,
            })
        };
        let mut answer = match request.send().await {
            Ok(answer) => answer,
            Err(e) => return (Err(unreachable(&e)), None),
        };
        let offset = clock_offset(&answer);
        let (status, retry_after) = (answer.status(), retry_after(&answer));
        let mut body = Vec::new();
        loop {
            match answer.chunk().await {
                Ok(Some(chunk)) if body.len() + chunk.len() <= MAX_RESPONSE => {
                    body.extend_from_slice(&chunk)
                }
                Ok(Some(_)) => {
                    return (
                        Err(RequestOutcome::Unreachable("the answer is longer than 1 MiB".into())),
                        offset,
                    );
                }
                Ok(None) => break,
                Err(e) => return (Err(unreachable(&e)), offset),
            }
        }
        if !status.is_success() {
            let problem: Problem = json::read(&body).unwrap_or_default();
            let message = if problem.message.is_empty() {
                status.canonical_reason().unwrap_or("refused").to_owned()
            } else {
                problem.message
            };
            let message = crate::base::text::printable(&message).chars().take(200).collect();
            return (
                Err(RequestOutcome::Refused {
                    status: status.as_u16(),
                    code: problem.code,
                    message,
                    retry_after,
                }),
                offset,
            );
        }
        let text: &[u8] =
            if body.is_empty() || status == StatusCode::NO_CONTENT { b"null" } else { &body };
        let parsed = json::read(text).map_err(|e| {
            RequestOutcome::Unreachable(format!(
                "the answer cannot be read: {}; is this a control plane?",
                crate::base::text::json_error(&e)
            ))
        });
        (parsed, offset)
    }
}

/// Removes the agent `id` from its control plane, with the credential that it got there.
///
/// # Errors
/// Why the control plane still lists the agent, in one line.
pub async fn deregister(
    trust: &Trust,
    proxy: Option<&str>,
    stored: &StoredCredential,
    id: &str,
) -> Result<(), String> {
    let http = HttpClient::new(&stored.url, trust, proxy)?;
    match http
        .send::<serde_json::Value>(http.request(
            Method::DELETE,
            &format!("/{id}"),
            &stored.credential,
        ))
        .await
        .0
    {
        Ok(_) | Err(RequestOutcome::Refused { status: 404 | 410, .. }) => Ok(()),
        Err(RequestOutcome::Refused { status, code, message, .. }) => {
            Err(format!("HTTP {status} {code}: {message}"))
        }
        Err(RequestOutcome::Unreachable(why)) => Err(why),
        Err(_) => Err("no answer that can be read".into()),
    }
}

/// Seconds or a date, an hour at most.
fn retry_after(answer: &Response) -> Option<Duration> {
    let text = answer.headers().get(reqwest::header::RETRY_AFTER)?.to_str().ok()?;
    let seconds = match text.trim().parse::<u64>() {
        Ok(seconds) => seconds,
        Err(_) => {
            let then = jiff::fmt::rfc2822::parse(text).ok()?.timestamp().as_second();
            let now = answer
                .headers()
                .get(reqwest::header::DATE)
                .and_then(|d| jiff::fmt::rfc2822::parse(d.to_str().ok()?).ok());
            u64::try_from(
                then - now.map_or_else(
                    || jiff::Timestamp::now().as_second(),
                    |n| n.timestamp().as_second(),
                ),
            )
            .unwrap_or(0)
        }
    };
    Some(Duration::from_secs(seconds.min(3600)))
}
