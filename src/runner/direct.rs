//! Straight through the tunnel: an operation that the Runner brings to the agent itself, as a
//! visitor of the FRP server, over TLS to the agent's own key.

use std::sync::Arc;
use std::time::Duration;

use http::{Request, header};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::judge::short;
use crate::base::secret::Secret;
use crate::base::trust::{Pin, Trust};
use crate::contract::types::IDEMPOTENCY_KEY_HEADER;
use crate::frp::client::visit;
use crate::frp::dial::Dialer;
use crate::frp::{TunnelConfig, TunnelTls};

/// Longest time of all of it.
const TIMEOUT: Duration = Duration::from_secs(15);
/// Longest answer of an agent, bytes.
const MAX_ANSWER: usize = 1 << 20;

/// Brings an operation to its agent, with what the control plane has given for that.
///
/// # Errors
/// Why the agent has not taken it; the control plane may still bring it.
pub(super) async fn bring(direct: &Value) -> Result<(), String> {
    // what was spawned for the connection ends with it
    let mut tasks = JoinSet::new();
    let brought = timeout(TIMEOUT, post(direct, &mut tasks)).await;
    brought.unwrap_or_else(|_| Err(format!("no answer within {} s", TIMEOUT.as_secs())))
}

async fn post(direct: &Value, tasks: &mut JoinSet<()>) -> Result<(), String> {
    let endpoints = direct["endpoints"].as_array().map(Vec::as_slice).unwrap_or_default();
    let endpoint = endpoints.iter().find(|endpoint| endpoint["type"] == "stcp");
    let endpoint = endpoint.ok_or("the agent has no endpoint in a tunnel")?;
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let optional = |name: &str| endpoint[name].as_str().map(str::to_owned);
    let address = text(&endpoint["address"]);
    let (server, port) = address.rsplit_once(':').ok_or("the tunnel has no address")?;
    let config = TunnelConfig {
        server: server.to_owned(),
        port: port.parse().map_err(|_| "the tunnel has no port")?,
        tcp_mux: true,
        tls: TunnelTls {
            pin: optional("server_pin"),
            ca_pem: optional("server_ca"),
            server_name: optional("server_name"),
            ..TunnelTls::default()
        },
        ..TunnelConfig::default()
    };
    let connector = Dialer::new(&config, false)?.connect(tasks).await.map_err(|e| e.why)?;
    let key = Secret::new(text(&endpoint["secret_key"]));
    let proxy = text(&endpoint["proxy"]);
    let stream = visit(&connector, "", &proxy, &key).await.map_err(|e| format!("tunnel: {e}"))?;
    // whoever runs the FRP server sees nothing
    let pins = vec![Pin::parse(&text(&endpoint["agent_pin"]))?];
    let mut tls = Trust { pins, ..Trust::default() }.client_config()?;
    tls.alpn_protocols = vec![b"http/1.1".to_vec()];
    let name = rustls_pki_types::ServerName::try_from("agent.pipeops.internal")
        .map_err(|e| e.to_string())?;
    let stream = tokio_rustls::TlsConnector::from(Arc::new(tls)).connect(name, stream);
    let stream = stream.await.map_err(|e| format!("agent: {e}"))?;
    let handshake = hyper::client::conn::http1::handshake(TokioIo::new(stream));
    let (mut agent, connection) = handshake.await.map_err(|e| format!("agent: {e}"))?;
    tasks.spawn(async move { drop(connection.await) });
    let request = Request::post("/api/v1/operations")
        .header(header::HOST, "agent")
        .header(header::CONTENT_TYPE, "application/json")
        .header(header::AUTHORIZATION, format!("Bearer {}", text(&direct["token"])))
        .header(IDEMPOTENCY_KEY_HEADER, text(&direct["key"]))
        .body(Full::new(Bytes::from(text(&direct["body"]))))
        .map_err(|e| e.to_string())?;
    let answer = agent.send_request(request).await.map_err(|e| format!("agent: {e}"))?;
    let status = answer.status();
    let body = Limited::new(answer.into_body(), MAX_ANSWER).collect().await;
    if status.is_success() {
        return Ok(());
    }
    let said = body.map(http_body_util::Collected::to_bytes).unwrap_or_default();
    let said: Value = serde_json::from_slice(&said).unwrap_or_default();
    let said = short(said["message"].as_str().unwrap_or_default());
    Err(format!("the agent answers with status {}: {said}", status.as_u16()))
}
