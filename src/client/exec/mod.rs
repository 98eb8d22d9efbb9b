//! A command in a container: which one, the frames of its connection, and how it has ended
//! (Kubernetes 1.36, `staging/src/k8s.io/apimachinery/pkg/util/remotecommand/constants.go` and
//! `staging/src/k8s.io/client-go/tools/remotecommand/websocket.go`).

use std::convert::Infallible;
use std::future::pending;
use std::io;
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt as _, StreamExt as _};
use reqwest::Upgraded;
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::sync::mpsc::Receiver;
use tokio::time::{Instant, MissedTickBehavior, interval_at, timeout};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::Role;

use super::api::Api;
use crate::base::error::{Exit, Failure};
use crate::base::text::printable;
use crate::kubernetes::readiness::pods::{is_ready, is_running};

/// Since Kubernetes 1.30; it can say that the input has ended.
const V5: &str = "v5.channel.k8s.io";
const V4: &str = "v4.channel.k8s.io";

/// First byte of a frame: which stream it is of.
const INPUT: u8 = 0;
const OUTPUT: u8 = 1;
const ERRORS: u8 = 2;
/// How the command has ended, as a Status.
const STATUS: u8 = 3;
const RESIZE: u8 = 4;
/// The next byte is a stream that has ended; v5 only.
const CLOSE: u8 = 255;

/// Most bytes of input in a frame.
const PIECE: usize = 32 << 10;
/// Proxies give up connections on which nothing moves, the first of them after 30 s or so.
const PING: Duration = Duration::from_secs(10);
/// After so long without a byte, also as answer to a ping, a terminal no longer waits. Elsewhere
/// it is no proof: a server reads no ping while a command does not read its input.
const SILENCE: Duration = Duration::from_secs(60);
/// From the status to the end of the connection.
const GRACE: Duration = Duration::from_secs(2);
/// Longest foreign message that is repeated, characters.
const MAX_MESSAGE: usize = 1000;

/// The container that a command runs in.
#[derive(Debug, PartialEq, Eq)]
pub struct ExecTarget {
    pub pod: String,
    pub container: String,
    /// The containers that it was chosen from, where none was named.
    pub chosen_of: Vec<String>,
}

fn name(value: &Value) -> &str {
    value["name"].as_str().unwrap_or_default()
}

fn names<'a>(spec: &'a Value, field: &str) -> Vec<&'a str> {
    spec[field].as_array().into_iter().flatten().map(name).collect()
}

/// The container that is meant: without a name the first one of a pod that is ready, or at least
/// runs.
///
/// # Errors
/// Exit 13 where there is no such pod, 2 where it has no such container.
pub fn choose(
    pods: &[Value],
    pod: Option<&str>,
    container: Option<&str>,
) -> Result<ExecTarget, Failure> {
    let title = |pod: &Value| name(&pod["metadata"]).to_owned();
    let stays = |pod: &&Value| pod["metadata"]["deletionTimestamp"].is_null();
    let found = match pod {
        Some(wanted) => {
            pods.iter().find(|pod| name(&pod["metadata"]) == wanted).ok_or_else(|| {
                let there: Vec<String> = pods.iter().map(title).collect();
                let gone = pod_gone(wanted);
                if there.is_empty() {
                    gone
                } else {
                    gone.why(format!("it has {}", there.join(", ")))
                }
            })?
        }
        None => {
            let ready = pods.iter().filter(stays).find(|pod| is_ready(pod));
            ready.or_else(|| pods.iter().filter(stays).find(|pod| is_running(pod))).ok_or_else(
                || Failure::new(Exit::Problems, "NO_RUNNING_POD", "it has no pod that runs"),
            )?
        }
    };
    let spec = &found["spec"];
    let own = names(spec, "containers");
    let others = [names(spec, "initContainers"), names(spec, "ephemeralContainers")].concat();
    let (container, chosen_of) = match container {
        Some(wanted) if own.contains(&wanted) || others.contains(&wanted) => (wanted, vec![]),
        Some(wanted) => {
            let what = format!("{} has no container `{wanted}`", title(found));
            return Err(Failure::usage("CONTAINER_UNKNOWN", what)
                .why(format!("it has {}", [own, others].concat().join(", "))));
        }
        None => (own.first().copied().unwrap_or_default(), own.clone()),
    };
    let chosen_of = chosen_of.into_iter().map(str::to_owned).collect();
    Ok(ExecTarget { pod: title(found), container: container.to_owned(), chosen_of })
}

/// A pod that is not there, or no longer.
pub fn pod_gone(pod: &str) -> Failure {
    Failure::new(Exit::Problems, "POD_GONE", format!("there is no pod {pod} of it"))
}

/// What runs, and which of its streams are wanted.
pub struct ExecRequest<'a> {
    pub target: &'a ExecTarget,
    pub command: &'a [String],
    pub input: bool,
    /// In a terminal of its own: that has one output for both.
    pub terminal: bool,
}

impl ExecRequest<'_> {
    /// The path below that of a namespace.
    fn path(&self) -> String {
        let mut query = url::form_urlencoded::Serializer::new(String::new());
        query.append_pair("container", &self.target.container);
        let streams = [
            ("stdin", self.input),
            ("stdout", true),
            ("stderr", !self.terminal),
            ("tty", self.terminal),
        ];
        for (stream, _) in streams.into_iter().filter(|(_, wanted)| *wanted) {
            query.append_pair(stream, "true");
        }
        for word in self.command {
            query.append_pair("command", word);
        }
        format!("/pods/{}/exec?{}", self.target.pod, query.finish())
    }
}

/// A command that runs.
pub struct ExecSession<S> {
    socket: WebSocketStream<S>,
    /// Whether it can be told that its input has ended.
    pub ends_input: bool,
    terminal: bool,
}

/// Starts a command; `base` is the path of its namespace. None where the pod is gone.
///
/// # Errors
/// As [`Api::get`].
pub async fn start(
    api: &Api,
    base: &str,
    request: &ExecRequest<'_>,
) -> Result<Option<ExecSession<Upgraded>>, Failure> {
    let path = format!("{base}{}", request.path());
    Ok(match api.web_socket(&path, &[V5, V4]).await? {
        Some((io, spoken)) => Some(ExecSession::new(io, spoken == V5, request.terminal).await),
        None => None,
    })
}

/// What a command reads and writes on this side.
pub struct LocalStreams<I, O, E> {
    pub input: Option<I>,
    pub output: O,
    pub errors: E,
    /// Columns and lines of the terminal, whenever they change.
    pub sizes: Receiver<(u16, u16)>,
}

/// How a command has ended.
#[derive(Debug, PartialEq, Eq)]
pub enum ExecEnd {
    Succeeded,
    /// With another exit code than 0.
    Exited(i64),
    /// It was not started, and why.
    Failed(String),
    /// The connection has ended before it, and why.
    Cut(String),
    /// Nobody reads its output any more.
    Unread,
}

impl<S: AsyncRead + AsyncWrite + Unpin> ExecSession<S> {
    async fn new(io: S, ends_input: bool, terminal: bool) -> ExecSession<S> {
        let socket = WebSocketStream::from_raw_socket(io, Role::Client, None).await;
        ExecSession { socket, ends_input, terminal }
    }

    /// Passes input and output on until the command has ended. The two ways do not wait for each
    /// other: a command may write before it reads.
    pub async fn run<I, O, E>(self, local: LocalStreams<I, O, E>) -> ExecEnd
    where
        I: AsyncRead + Unpin,
        O: AsyncWrite + Unpin,
        E: AsyncWrite + Unpin,
    {
        let (sink, stream) = self.socket.split();
        let LocalStreams { input, output, errors, sizes } = local;
        let silence = if self.terminal { SILENCE } else { Duration::MAX };
        tokio::select! {
            end = receive(stream, output, errors, silence) => end,
            never = send(sink, input, sizes, self.ends_input) => match never {},
        }
    }
}

/// Sends input, sizes and pings. What has come of a connection that broke, the other way tells.
async fn send<S: AsyncRead + AsyncWrite + Unpin, I: AsyncRead + Unpin>(
    mut sink: SplitSink<WebSocketStream<S>, Message>,
    mut input: Option<I>,
    mut sizes: Receiver<(u16, u16)>,
    ends_input: bool,
) -> Infallible {
    let mut buffer = vec![0; PIECE];
    let mut ping = interval_at(Instant::now() + PING, PING);
    ping.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let message = tokio::select! {
            read = read_some(&mut input, &mut buffer) => match read {
                Ok(count @ 1..) => Message::Binary(frame(INPUT, &buffer[..count])),
                Ok(0) | Err(_) => {
                    input = None;
                    if !ends_input {
                        continue;
                    }
                    Message::Binary(frame(CLOSE, &[INPUT]))
                }
            },
            Some(size) = sizes.recv() => Message::Binary(resize(size)),
            _ = ping.tick() => Message::Ping(Bytes::new()),
        };
        if sink.send(message).await.is_err() {
            return pending().await;
        }
    }
}

async fn read_some<I: AsyncRead + Unpin>(
    input: &mut Option<I>,
    buffer: &mut [u8],
) -> io::Result<usize> {
    match input {
        Some(input) => input.read(buffer).await,
        None => pending().await,
    }
}

fn frame(stream: u8, bytes: &[u8]) -> Bytes {
    [&[stream], bytes].concat().into()
}

fn resize((columns, lines): (u16, u16)) -> Bytes {
    frame(RESIZE, json!({"Width": columns, "Height": lines}).to_string().as_bytes())
}

/// Writes what the command writes, until its connection ends.
async fn receive<S: AsyncRead + AsyncWrite + Unpin>(
    mut stream: SplitStream<WebSocketStream<S>>,
    mut output: impl AsyncWrite + Unpin,
    mut errors: impl AsyncWrite + Unpin,
    silence: Duration,
) -> ExecEnd {
    let mut end = None;
    let mut why = "it was closed".to_owned();
    loop {
        let limit = if end.is_some() { GRACE } else { silence };
        let message = match timeout(limit, stream.next()).await {
            Ok(Some(Ok(message))) => message,
            Ok(None) => return end.unwrap_or(ExecEnd::Cut(why)),
            Ok(Some(Err(error))) => return end.unwrap_or(ExecEnd::Cut(error.to_string())),
            Err(_) => {
                let silent = || ExecEnd::Cut(format!("nothing was heard for {limit:?}"));
                return end.unwrap_or_else(silent);
            }
        };
        let frame = match message {
            Message::Binary(frame) => frame,
            Message::Close(Some(close)) if !close.reason.is_empty() => {
                why = shortened(close.reason.as_str());
                continue;
            }
            _ => continue,
        };
        match frame.split_first() {
            Some((&OUTPUT, bytes)) if write(&mut output, bytes).await.is_err() => {
                return ExecEnd::Unread;
            }
            // output that is read counts, also where nobody reads the errors
            Some((&ERRORS, bytes)) => drop(write(&mut errors, bytes).await),
            Some((&STATUS, status)) if !status.is_empty() => end = Some(end_of(status)),
            _ => {}
        }
    }
}

async fn write(to: &mut (impl AsyncWrite + Unpin), bytes: &[u8]) -> io::Result<()> {
    to.write_all(bytes).await?;
    to.flush().await
}

fn shortened(text: &str) -> String {
    printable(text).chars().take(MAX_MESSAGE).collect()
}

/// What the Status says of a command (Kubernetes, `k8s.io/apimachinery/pkg/util/remotecommand`:
/// `NonZeroExitCodeReason` with a cause `ExitCode`).
fn end_of(status: &[u8]) -> ExecEnd {
    let Ok(status) = serde_json::from_slice::<Value>(status) else {
        return ExecEnd::Failed(shortened(&String::from_utf8_lossy(status)));
    };
    if status["status"] == "Success" {
        return ExecEnd::Succeeded;
    }
    let mut causes = status["details"]["causes"].as_array().into_iter().flatten();
    let code = causes
        .find(|cause| cause["reason"] == "ExitCode")
        .and_then(|cause| cause["message"].as_str()?.parse().ok());
    match code {
        Some(code) if status["reason"] == "NonZeroExitCode" => ExecEnd::Exited(code),
        _ => ExecEnd::Failed(shortened(status["message"].as_str().unwrap_or("no reason given"))),
    }
}

#[cfg(test)]
mod tests;
