//! Calls of the administrator on this machine, over the socket in the data directory.

use http::{Method, Request, StatusCode, header};
use http_body_util::BodyExt as _;
use serde_json::Value;
use tokio::net::UnixStream;

use crate::base::connection::{self, Body};
use crate::base::error::{Exit, Failure};
use crate::base::json;
use crate::contract::types::Problem;
use crate::host::Host;

/// Socket for calls of the administrator on this machine, in the data directory.
pub const SOCKET: &str = "admin.sock";

/// One call; returns the body of the answer.
///
/// # Errors
/// Exit 2 when the request itself is wrong, 7 when the control plane refuses it for another reason,
/// 5 when none runs on this machine.
pub async fn call(
    host: &Host,
    data_dir: &str,
    method: Method,
    path: &str,
    body: Option<&Value>,
) -> anyhow::Result<String> {
    let socket = host.real_path(data_dir).join(SOCKET);
    let away = |why: String| {
        Failure::new(
            Exit::Network,
            "CONTROL_PLANE_AWAY",
            "no control plane answers on this machine",
        )
        .why(format!("{}: {why}", socket.display()))
        .hint(
            "start it: pipeops control-plane; its owner and root may use it; \
             another place: --data-dir",
        )
    };
    let stream = UnixStream::connect(&socket).await.map_err(|e| away(e.to_string()))?;
    let text = body.map(Value::to_string).unwrap_or_default();
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header(header::HOST, "localhost")
        .header(header::CONTENT_TYPE, "application/json");
    let answer = connection::send(Box::new(stream), request.body(Body::from(text))?)
        .await
        .map_err(|e| away(e.to_string()))?;
    let status = answer.status();
    let bytes = answer.into_body().collect().await?.to_bytes();
    let text = String::from_utf8_lossy(&bytes).into_owned();
    if status.is_success() {
        return Ok(text);
    }
    let problem: Problem = json::read(&text).unwrap_or_default();
    // what the caller wrote is wrong, or could mean several things
    let usage = status == StatusCode::BAD_REQUEST || problem.code == "name_ambiguous";
    let exit = if usage { Exit::Usage } else { Exit::Refused };
    let mut failure = Failure::new(exit, &problem.code.to_uppercase(), problem.message);
    failure.hint = problem.hint;
    Err(failure.into())
}
