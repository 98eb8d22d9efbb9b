//! Calls of a control plane over HTTPS, and what its answers mean for a command.

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use reqwest::{Client, Method, RequestBuilder, Response, StatusCode, Upgraded};
use ring::rand::SecureRandom as _;
use serde_json::Value;
use tokio::time::timeout;

use super::contexts::LoginContext;
use crate::base::error::{Exit, Failure};
use crate::base::http::{self, check_url};
use crate::base::json;
use crate::base::resolve::Resolver;
use crate::base::secret::{Secret, register_secret};
use crate::base::text::{json_error, printable};
use crate::base::trust;
use crate::contract::types::IDEMPOTENCY_KEY_HEADER;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// For a call that is answered at once; an agent that is silent is reported within 7 s.
const CALL_TIMEOUT: Duration = Duration::from_secs(30);
const KEEPALIVE: Duration = Duration::from_secs(30);
/// Longest answer, bytes: a list of a large cluster.
const MAX_ANSWER: usize = 32 << 20;
/// Longest foreign message that is repeated, characters.
const MAX_MESSAGE: usize = 400;
/// What a server appends to a key to prove that it speaks WebSocket (RFC 6455 §1.3).
const WEB_SOCKET_GUID: &str = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11";
/// Code of a refusal that is not one of ours: of Kubernetes, or of something in between.
const FOREIGN: &str = "REMOTE_REFUSES";

/// A control plane, as one token sees it.
#[derive(Clone)]
pub struct Api {
    client: Client,
    base: String,
    token: Secret,
}

impl Api {
    /// # Errors
    /// Exit 2 for an address or a trust that cannot be used.
    pub fn new(login: &LoginContext) -> Result<Api, Failure> {
        let unusable = |why: String| {
            Failure::usage("URL_WRONG", "the control plane cannot be called")
                .why(why)
                .hint("log in again: pipeops login URL")
        };
        check_url(&login.url).map_err(unusable)?;
        register_secret(login.token.expose());
        let tls = login.trust().and_then(|trust| trust.client_config()).map_err(unusable)?;
        let mut client = Client::builder();
        // this machine itself: a proxy would send the token on in clear
        if url::Url::parse(&login.url).is_ok_and(|url| url.scheme() == "http") {
            client = client.no_proxy();
        }
        let client = client
            .tls_backend_preconfigured(tls)
            .connect_timeout(CONNECT_TIMEOUT)
            // a log may be silent for as long as it likes
            .tcp_keepalive(KEEPALIVE)
            .dns_resolver(Resolver::shared())
            .redirect(reqwest::redirect::Policy::none())
            .user_agent(concat!("pipeops/", env!("CARGO_PKG_VERSION")))
            .build()
            .map_err(|e| unusable(http::explain(&e)))?;
        let base = login.url.trim_end_matches('/').to_owned();
        Ok(Api { client, base, token: login.token.clone() })
    }

    fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.client
            .request(method, format!("{}{path}", self.base))
            .bearer_auth(self.token.expose())
            .header("Content-Type", "application/json")
    }

    /// A JSON document.
    ///
    /// # Errors
    /// As [`refusal`]; exit 5 when nobody answers.
    pub async fn get(&self, path: &str) -> Result<Value, Failure> {
        self.call(Method::GET, path).await
    }

    /// A JSON document of a cluster that need not be there.
    ///
    /// # Errors
    /// As [`Api::get`].
    pub async fn find(&self, path: &str) -> Result<Option<Value>, Failure> {
        self.find_as(path, "application/json").await
    }

    /// The same in a form that `accept` asks for.
    ///
    /// # Errors
    /// As [`Api::get`].
    pub async fn find_as(&self, path: &str, accept: &str) -> Result<Option<Value>, Failure> {
        let request = self.request(Method::GET, path).header("Accept", accept);
        let sent = request.timeout(CALL_TIMEOUT).send().await;
        let answer = sent.map_err(|e| self.unreachable(&e))?;
        match self.there(answer).await? {
            Some(answer) => self.json(answer).await.map(Some),
            None => Ok(None),
        }
    }

    /// The text that a call is answered with.
    ///
    /// # Errors
    /// As [`Api::get`].
    pub async fn post(
        &self,
        path: &str,
        key: Option<&str>,
        body: &Value,
    ) -> Result<String, Failure> {
        let mut request =
            self.request(Method::POST, path).timeout(CALL_TIMEOUT).body(body.to_string());
        if let Some(key) = key {
            request = request.header(IDEMPOTENCY_KEY_HEADER, key);
        }
        let answer = self.send(request).await?;
        Ok(String::from_utf8_lossy(&self.body(answer).await?).into_owned())
    }

    /// The document that a call without a body is answered with, such as DELETE.
    ///
    /// # Errors
    /// As [`Api::get`].
    pub async fn call(&self, method: Method, path: &str) -> Result<Value, Failure> {
        let answer = self.send(self.request(method, path).timeout(CALL_TIMEOUT)).await?;
        self.json(answer).await
    }

    /// An answer that goes on until somebody ends it, of what need not be there. It may begin late:
    /// the log of a container that says nothing has not even a head.
    ///
    /// # Errors
    /// As [`Api::get`].
    pub async fn open(
        &self,
        path: &str,
        last_event: Option<&str>,
    ) -> Result<Option<Response>, Failure> {
        let mut request = self.request(Method::GET, path);
        if let Some(last) = last_event {
            request = request.header("Last-Event-ID", last);
        }
        let answer = request.send().await.map_err(|e| self.unreachable(&e))?;
        self.there(answer).await
    }

    /// A connection that the server has switched to WebSocket (RFC 6455 §4), and which of
    /// `protocols` it speaks there; of what need not be there.
    ///
    /// # Errors
    /// As [`Api::get`]; exit 5 for a server that does not switch.
    pub async fn web_socket(
        &self,
        path: &str,
        protocols: &[&'static str],
    ) -> Result<Option<(Upgraded, &'static str)>, Failure> {
        let other = |why: &str| {
            let what = format!("{} does not switch to WebSocket", self.base);
            Failure::new(Exit::Network, "ANSWER_UNREADABLE", what)
                .why(why)
                .hint("a proxy between has to pass upgrades; `kubectl exec` needs them too")
        };
        let mut nonce = [0; 16];
        let random = ring::rand::SystemRandom::new().fill(&mut nonce);
        random.map_err(|_| other("the system gives no random numbers"))?;
        let key = STANDARD.encode(nonce);
        let request = self
            .request(Method::GET, path)
            .header("Connection", "Upgrade")
            .header("Upgrade", "websocket")
            .header("Sec-WebSocket-Version", "13")
            .header("Sec-WebSocket-Key", &key)
            .header("Sec-WebSocket-Protocol", protocols.join(", "));
        let sent = timeout(CALL_TIMEOUT, request.send()).await;
        let sent = sent.map_err(|_| self.silent(format!("no answer within {CALL_TIMEOUT:?}")))?;
        let answer = sent.map_err(|e| self.unreachable(&e))?;
        if answer.status() != StatusCode::SWITCHING_PROTOCOLS {
            return match self.there(answer).await? {
                Some(answer) => Err(other(&format!("it answers with {}", answer.status()))),
                None => Ok(None),
            };
        }
        let header = |name: &str| answer.headers().get(name).and_then(|value| value.to_str().ok());
        if header("sec-websocket-accept") != Some(&*web_socket_accept(&key)) {
            return Err(other("its answer does not belong to the request"));
        }
        let spoken = header("sec-websocket-protocol").unwrap_or_default();
        let Some(protocol) = protocols.iter().find(|known| **known == spoken) else {
            return Err(other(&format!("it speaks `{}` there", printable(spoken))));
        };
        let upgraded = answer.upgrade().await.map_err(|e| self.unreachable(&e))?;
        Ok(Some((upgraded, *protocol)))
    }

    /// None where Kubernetes knows no such object, or serves none of its kind. That the cluster
    /// itself is not there is said by the control plane, with a code.
    async fn there(&self, answer: Response) -> Result<Option<Response>, Failure> {
        let absent = answer.status().as_u16() == 404;
        match self.checked(answer).await {
            Err(failure) if absent && failure.code == FOREIGN => Ok(None),
            checked => checked.map(Some),
        }
    }

    async fn send(&self, request: RequestBuilder) -> Result<Response, Failure> {
        let answer = request.send().await.map_err(|e| self.unreachable(&e))?;
        self.checked(answer).await
    }

    async fn checked(&self, answer: Response) -> Result<Response, Failure> {
        let status = answer.status();
        if status.is_success() {
            return Ok(answer);
        }
        let body = self.body(answer).await.unwrap_or_default();
        Err(refusal(status.as_u16(), &body, &self.base))
    }

    async fn json(&self, answer: Response) -> Result<Value, Failure> {
        let body = self.body(answer).await?;
        json::read(&body).map_err(|e| {
            Failure::new(
                Exit::Network,
                "ANSWER_UNREADABLE",
                format!("{} speaks otherwise", self.base),
            )
            .why(json_error(&e))
            .hint("is this the address of a control plane?")
        })
    }

    async fn body(&self, mut answer: Response) -> Result<Vec<u8>, Failure> {
        let mut body = Vec::new();
        while let Some(piece) = answer.chunk().await.map_err(|e| self.unreachable(&e))? {
            if body.len() + piece.len() > MAX_ANSWER {
                let what = format!("an answer of {} is longer than 32 MiB", self.base);
                return Err(Failure::new(Exit::Network, "ANSWER_UNREADABLE", what)
                    .hint("ask for one namespace: -n NAMESPACE"));
            }
            body.extend_from_slice(&piece);
        }
        Ok(body)
    }

    /// What a connection that failed means.
    pub fn unreachable(&self, error: &reqwest::Error) -> Failure {
        let text = http::explain(error);
        match trust::explain(&text) {
            Some((_, remedy)) => Failure::new(
                Exit::Refused,
                "CONTROL_PLANE_FOREIGN",
                format!("{} does not prove to be the control plane", self.base),
            )
            .why(text)
            .hint(format!("{remedy}; pipeops login URL --pin PIN, or --ca FILE")),
            None => self.silent(text),
        }
    }

    fn silent(&self, why: String) -> Failure {
        let what = format!("{} does not answer", self.base);
        Failure::new(Exit::Network, "CONTROL_PLANE_SILENT", what)
            .why(why)
            .hint("check the address and the way there; clusters run on meanwhile")
    }
}

/// What a server answers to a key (RFC 6455 §4.2.2).
fn web_socket_accept(key: &str) -> String {
    let text = format!("{key}{WEB_SOCKET_GUID}");
    let digest = ring::digest::digest(&ring::digest::SHA1_FOR_LEGACY_USE_ONLY, text.as_bytes());
    STANDARD.encode(digest)
}

/// What an answer other than success means: exit 7 where the token may not, 2 where the request is
/// wrong, 5 where the way is not there at the moment.
fn refusal(status: u16, body: &[u8], base: &str) -> Failure {
    let answer: Value = serde_json::from_slice(body).unwrap_or_default();
    // below the gateway's `/k8s` an error is one of Kubernetes, with our code among the causes
    let code = match answer["kind"].as_str() {
        Some("Status") => &answer["details"]["causes"][0]["reason"],
        _ => &answer["code"],
    };
    let is_ours =
        |code: &&str| !code.is_empty() && code.bytes().all(|b| b.is_ascii_lowercase() || b == b'_');
    let code = code.as_str().filter(is_ours).map(str::to_uppercase);
    let usage = matches!(status, 400 | 422) || code.as_deref() == Some("NAME_AMBIGUOUS");
    let exit = match status {
        _ if usage => Exit::Usage,
        429 | 500.. => Exit::Network,
        _ => Exit::Refused,
    };
    let said = answer["message"].as_str().map(|text| printable(text).into_owned());
    let what: String = said
        .unwrap_or_else(|| format!("{base} answers with status {status}"))
        .chars()
        .take(MAX_MESSAGE)
        .collect();
    let mut failure = Failure::new(Exit::Refused, "REMOTE_REFUSES", what);
    failure.exit = exit;
    failure.code = code.unwrap_or_else(|| FOREIGN.into());
    failure.hint = answer["hint"].as_str().map(|hint| printable(hint).into_owned());
    // the control plane's own next step is for those who are on its machine
    let next = match failure.code.as_str() {
        _ if status == 401 => Some("log in again with a token that is valid: pipeops login URL"),
        "AGENT_OFFLINE" => Some("`pipeops clusters` says since when"),
        _ => None,
    };
    failure.hint = next.map(str::to_owned).or(failure.hint);
    failure
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_key_is_answered_as_the_standard_has_it() {
        // RFC 6455 §1.3
        assert_eq!(web_socket_accept("dGhlIHNhbXBsZSBub25jZQ=="), "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
    }

    #[test]
    fn an_answer_ends_a_command_with_the_code_that_it_means() {
        let ours = |code: &str| json!({"code": code, "message": "m", "hint": "h"});
        let status = |reason: &str| {
            json!({"kind": "Status", "message": "m", "reason": "Forbidden",
                "details": {"causes": [{"reason": reason}]}})
        };
        for (number, body, exit, code) in [
            (401, ours("token_unknown"), 7, "TOKEN_UNKNOWN"),
            (403, ours("role_exceeded"), 7, "ROLE_EXCEEDED"),
            (403, status("namespace_scope"), 7, "NAMESPACE_SCOPE"),
            (403, status("FieldValueInvalid"), 7, "REMOTE_REFUSES"),
            (404, ours("not_found"), 7, "NOT_FOUND"),
            (400, ours("bad_operation"), 2, "BAD_OPERATION"),
            (409, ours("name_ambiguous"), 2, "NAME_AMBIGUOUS"),
            (409, ours("idempotency_mismatch"), 7, "IDEMPOTENCY_MISMATCH"),
            (429, ours("too_many_operations"), 5, "TOO_MANY_OPERATIONS"),
            (503, ours("agent_offline"), 5, "AGENT_OFFLINE"),
            (502, json!("<html>"), 5, "REMOTE_REFUSES"),
        ] {
            let failure = refusal(number, body.to_string().as_bytes(), "https://cp");
            assert_eq!((failure.exit.number(), failure.code.as_str()), (exit, code), "{body}");
        }
        let odd = refusal(502, b"\xff", "https://cp");
        assert_eq!(odd.what, "https://cp answers with status 502");
        let hint = refusal(401, ours("token_expired").to_string().as_bytes(), "").hint.unwrap();
        assert!(hint.contains("pipeops login"), "{hint}");
        let away = refusal(503, ours("agent_offline").to_string().as_bytes(), "").hint.unwrap();
        assert!(away.contains("`pipeops clusters`"), "{away}");
    }
}
