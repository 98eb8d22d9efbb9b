//! An operation: asked for once, followed to its end, and what that end means for a command.

use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::{Instant, sleep, timeout};

use super::api::Api;
use super::events::EventReader;
use crate::base::error::{Exit, Failure};
use crate::base::json;
use crate::contract::types::{Operation, OperationState};

/// Attempts to ask, where the connection breaks: under the same key it is the same operation.
const TRIES: u32 = 3;
/// What nobody has answered, control plane or agent.
const SILENT: [&str; 2] = ["CONTROL_PLANE_SILENT", "AGENT_SILENT"];
/// Between attempts to ask or to follow.
const RETRY: Duration = Duration::from_secs(2);
/// A stream sends something every 15 s.
const SILENCE: Duration = Duration::from_secs(45);

/// A key that no other invocation has.
pub fn fresh_key() -> String {
    format!("cli-{}", crate::frp::wire::fresh_run_id())
}

/// Asks for an operation on a cluster.
///
/// # Errors
/// What is refused, and by whom.
pub async fn submit(
    api: &Api,
    cluster: &str,
    body: &Value,
    key: &str,
) -> Result<Operation, Failure> {
    parse(&ask(api, &format!("/api/v1/clusters/{cluster}/operations"), body, key).await?)
}

/// Asks for something under a key, again where nobody answers.
///
/// # Errors
/// As [`Api::post`].
pub(super) async fn ask(api: &Api, path: &str, body: &Value, key: &str) -> Result<String, Failure> {
    let mut tries = 1;
    loop {
        match api.post(path, Some(key), body).await {
            Ok(answer) => return Ok(answer),
            Err(failure) if SILENT.contains(&failure.code.as_str()) && tries < TRIES => {
                tries += 1;
                sleep(RETRY).await;
            }
            Err(failure) => return Err(failure),
        }
    }
}

/// Whether a request for an operation that failed so may have begun it: it was on its way, and was
/// not refused.
pub fn may_have_begun(failure: &Failure) -> bool {
    let full = failure.code == "QUEUE_FULL" || failure.code.starts_with("TOO_MANY_");
    matches!(failure.exit, Exit::Network | Exit::Interrupted) && !full
}

/// The operation as the control plane knows it.
///
/// # Errors
/// As [`Api::get`].
pub async fn show(api: &Api, cluster: &str, id: &str) -> Result<Operation, Failure> {
    let answer = api.get(&format!("/api/v1/clusters/{cluster}/operations/{id}")).await?;
    parse(&answer.to_string())
}

fn parse(answer: &str) -> Result<Operation, Failure> {
    json::read(answer).map_err(|_| {
        Failure::new(Exit::Network, "ANSWER_UNREADABLE", "this is no operation that was answered")
            .hint("is this the address of a control plane?")
    })
}

/// Follows an operation to its end, and tells each step. A stream that breaks goes on where it was;
/// the control plane knows the end, also of an agent that is away. That it does not answer itself
/// is told as a step, once until it does.
///
/// # Errors
/// Exit 8 when `limit` is over, 5 when by then nobody answers, 7 when the token is refused.
pub async fn follow(
    api: &Api,
    cluster: &str,
    id: &str,
    limit: Duration,
    mut told: impl FnMut(&Value),
) -> Result<Operation, Failure> {
    let end = Instant::now() + limit;
    let (mut last, mut is_away) = (None, false);
    loop {
        let listened = tokio::time::timeout_at(end, listen(api, cluster, id, &mut last, &mut told));
        if let Ok(Some(operation)) = listened.await {
            return Ok(operation);
        }
        let away = match show(api, cluster, id).await {
            Ok(operation) if operation.state.ended() => return Ok(operation),
            Ok(_) => {
                is_away = false;
                None
            }
            Err(failure) if failure.exit == Exit::Network => {
                if !std::mem::replace(&mut is_away, true) {
                    told(&json!({"message": format!("{}; the operation goes on", failure.what)}));
                }
                Some(failure)
            }
            Err(failure) => return Err(failure),
        };
        if Instant::now() >= end {
            let what = format!("operation {id} has not ended in {} s", limit.as_secs());
            return Err(away.unwrap_or_else(|| {
                Failure::new(Exit::TimedOut, "FOLLOW_TIMED_OUT", what)
                    .hint("it goes on: `pipeops status NAME` shows how far it is")
            }));
        }
        sleep(RETRY).await;
    }
}

/// The end of an operation, if the stream of its events lasts until then.
async fn listen(
    api: &Api,
    cluster: &str,
    id: &str,
    last: &mut Option<String>,
    told: &mut impl FnMut(&Value),
) -> Option<Operation> {
    let path = format!("/clusters/{cluster}/api/v1/operations/{id}/events");
    let mut stream = timeout(SILENCE, api.open(&path, last.as_deref())).await.ok()?.ok()??;
    let mut reader = EventReader::default();
    while let Ok(Ok(Some(piece))) = timeout(SILENCE, stream.chunk()).await {
        for event in reader.read(&piece).ok()? {
            if event.name == "end" {
                return json::read(&event.data).ok();
            }
            *last = event.id.or(last.take());
            if let Ok(step) = json::read(&event.data) {
                told(&step);
            }
        }
    }
    None
}

/// A step of an operation.
#[derive(Debug, PartialEq, Eq)]
pub enum Step<'a> {
    /// What it waits for, or what keeps it.
    Waits(&'a str),
    /// An object was changed, or has reached its state.
    Touched { object: &'a str, outcome: &'a str },
}

impl Step<'_> {
    pub fn of(event: &Value) -> Option<Step<'_>> {
        match (event["message"].as_str(), event["object"].as_str(), event["outcome"].as_str()) {
            (Some(message), ..) => Some(Step::Waits(message)),
            (None, Some(object), Some(outcome)) => Some(Step::Touched { object, outcome }),
            _ => None,
        }
    }
}

/// Why a command ends with another code than 0; none where the operation succeeded.
pub fn failure(operation: &Operation) -> Option<Failure> {
    let reason = operation.reason.as_str();
    let exit = match operation.state {
        OperationState::Succeeded => return None,
        OperationState::Failed if operation.rolled_back_to.is_some() => Exit::RolledBack,
        OperationState::Failed if reason == "timed_out" => Exit::TimedOut,
        OperationState::Failed if matches!(reason, "forbidden" | "namespace_scope") => {
            Exit::Refused
        }
        OperationState::Expired => Exit::TimedOut,
        OperationState::Interrupted => Exit::Partial,
        _ => Exit::Problems,
    };
    let what = match operation.message.as_str() {
        "" => format!("the operation is {}", operation.state.name()),
        message => message.to_owned(),
    };
    let mut failure = Failure::new(Exit::Problems, "OPERATION_FAILED", what);
    failure.exit = exit;
    let code = operation.exit_code.filter(|code| *code != 0);
    failure.why.extend(code.map(|code| format!("the command ended with exit code {code}")));
    failure.why.extend(operation.log.iter().cloned());
    if !reason.is_empty() {
        reason.clone_into(&mut failure.code);
        failure.hint = Some(format!("`pipeops explain {reason}` says what helps"));
    }
    Some(failure)
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;
    use crate::base::secret::Secret;
    use crate::client::contexts::LoginContext;

    /// A control plane that gives these answers, one after the other, and has no events.
    async fn control_plane(answers: Vec<(u16, Value)>) -> Api {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        tokio::spawn(async move {
            let mut answers = answers.into_iter();
            'next: loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                // a connection that is closed with a body unread takes the answer with it
                let (mut seen, mut request) = ([0; 1024], String::new());
                let whole = |request: &str| match request.starts_with("POST") {
                    true => request.ends_with("\r\n\r\n{}"),
                    false => request.ends_with("\r\n\r\n"),
                };
                while !whole(&request) {
                    let n = stream.read(&mut seen).await.unwrap();
                    // a connection that was opened ahead, and is not needed
                    if n == 0 {
                        continue 'next;
                    }
                    request.push_str(&String::from_utf8_lossy(&seen[..n]));
                }
                let events = request.contains("/events ");
                let next = if events { None } else { answers.next() };
                let (status, body) = next.unwrap_or((503, json!({"code": "agent_offline"})));
                let body = body.to_string();
                let answer = format!(
                    "HTTP/1.1 {status} X\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
                    body.len()
                );
                stream.write_all(answer.as_bytes()).await.unwrap();
            }
        });
        let token = Secret::new("pou_planted");
        // with a pin no certificates of the system are needed
        let pin = Some(format!("sha256:{}=", "A".repeat(43)));
        Api::new(&LoginContext { url, token, pin, ..LoginContext::default() }).unwrap()
    }

    #[tokio::test]
    async fn an_outage_is_told_once_and_a_refused_token_ends_the_watching() {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let away = || (502, json!({"message": "the proxy is alone"}));
        let ended = (200, json!({"id": "o-1", "state": "succeeded"}));
        let api = control_plane(vec![away(), away(), ended]).await;
        let mut told = Vec::new();
        let tell = |event: &Value| told.push(event["message"].clone());
        let limit = Duration::from_secs(60);
        let operation = follow(&api, "c", "o-1", limit, tell).await.unwrap();
        assert_eq!(operation.state, OperationState::Succeeded);
        assert_eq!(told, ["the proxy is alone; the operation goes on"]);
        let api = control_plane(vec![(401, json!({"code": "token_unknown"}))]).await;
        let refused = follow(&api, "c", "o-1", limit, |_| ()).await.unwrap_err();
        assert_eq!((refused.exit, refused.code.as_str()), (Exit::Refused, "TOKEN_UNKNOWN"));
    }

    #[tokio::test]
    async fn what_nobody_answered_is_asked_again_under_the_same_key() {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let silent = (504, json!({"code": "agent_silent"}));
        let begun = (202, json!({"id": "o-1", "state": "running"}));
        let api = control_plane(vec![silent, begun]).await;
        assert_eq!(submit(&api, "c", &json!({}), "k").await.unwrap().id, "o-1");
        let api = control_plane(vec![(429, json!({"code": "queue_full"}))]).await;
        let refused = submit(&api, "c", &json!({}), "k").await.unwrap_err();
        assert!(refused.exit == Exit::Network && !may_have_begun(&refused));
        let silent = Failure::new(Exit::Network, "AGENT_SILENT", "");
        assert!(may_have_begun(&silent));
    }

    #[test]
    fn the_end_of_an_operation_is_the_end_of_the_command() {
        use OperationState::{Cancelled, Expired, Failed, Interrupted, Succeeded, Unknown};
        let operation = |state, reason: &str, back| Operation {
            state,
            reason: reason.into(),
            rolled_back_to: back,
            ..Operation::default()
        };
        assert_eq!(failure(&operation(Succeeded, "", None)).map(|f| f.code), None);
        for (state, reason, back, exit, code) in [
            (Failed, "crash_loop", None, 13, "crash_loop"),
            (Failed, "crash_loop", Some(3), 9, "crash_loop"),
            (Failed, "timed_out", None, 8, "timed_out"),
            (Failed, "forbidden", None, 7, "forbidden"),
            (Failed, "", None, 13, "OPERATION_FAILED"),
            (Cancelled, "superseded", None, 13, "superseded"),
            (Interrupted, "", None, 10, "OPERATION_FAILED"),
            (Expired, "", None, 8, "OPERATION_FAILED"),
            (Unknown, "", None, 13, "OPERATION_FAILED"),
        ] {
            let failure = failure(&operation(state, reason, back)).unwrap();
            assert_eq!((failure.exit.number(), failure.code.as_str()), (exit, code), "{state:?}");
        }
        let told = Operation {
            message: "Deployment beta/web: exits with 1".into(),
            log: vec!["no such table".into()],
            ..operation(Failed, "crash_loop", None)
        };
        let job = Operation { exit_code: Some(3), ..operation(Failed, "job_failed", None) };
        assert!(
            failure(&job).unwrap().render().contains("\n  the command ended with exit code 3\n")
        );
        let shown = failure(&told).unwrap().render();
        assert!(shown.contains("exits with 1") && shown.contains("\n  no such table\n"), "{shown}");
    }

    #[test]
    fn a_step_is_a_wait_or_an_object() {
        let object = json!({"at": "t", "object": "Service beta/web", "outcome": "applied"});
        let touched = Step::Touched { object: "Service beta/web", outcome: "applied" };
        assert_eq!(Step::of(&object), Some(touched));
        let waits = json!({"at": "t", "message": "0 of 2", "reason": "crash_loop"});
        assert_eq!(Step::of(&waits), Some(Step::Waits("0 of 2")));
        assert_eq!(Step::of(&json!({"at": "t"})), None);
    }

    #[test]
    fn a_key_is_one_that_the_control_plane_takes_and_never_the_same() {
        let (one, other) = (fresh_key(), fresh_key());
        assert_ne!(one, other);
        assert!(crate::contract::types::check_idempotency_key(Some(&one)).is_ok());
    }
}
