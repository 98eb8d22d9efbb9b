//! Hostile, broken and slow clients at the control plane's two ports: each gets a clear answer or
//! is hung up on, nobody else notices.

use std::sync::Arc;
use std::time::{Duration, Instant};

use pipeops::base::secret::Secret;
use pipeops::base::trust::{Pin, Trust};
use pipeops::frp::dial::Dialer;
use pipeops::frp::wire::{self, Login, Message, NewProxy, NewVisitorConn, NewWorkConn};
use pipeops::frp::{TunnelAuth, TunnelConfig, TunnelTls};
use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use crate::control_plane::ControlPlane;
use crate::world::serve_kube;

/// Longest that an intruder is borne.
const BORNE: Duration = Duration::from_secs(30);

async fn tls(control_plane: &ControlPlane) -> tokio_rustls::client::TlsStream<TcpStream> {
    let ca =
        ControlPlane::stored(&control_plane.sandbox)["ca_certificate"].as_str().unwrap().to_owned();
    let config = Trust { ca_pem: Some(ca), ..Default::default() }.client_config().unwrap();
    let address = control_plane.url.trim_start_matches("https://");
    let name = rustls_pki_types::ServerName::try_from("127.0.0.1").unwrap();
    tokio_rustls::TlsConnector::from(Arc::new(config))
        .connect(name, TcpStream::connect(address).await.unwrap())
        .await
        .unwrap()
}

/// What comes back for `bytes`, until the server hangs up or has said enough.
async fn said(control_plane: &ControlPlane, bytes: &[u8]) -> String {
    let mut io = tls(control_plane).await;
    // it may hang up before it has heard all
    let _ = io.write_all(bytes).await;
    let _ = io.flush().await;
    let mut answer = Vec::new();
    let mut buffer = [0; 4096];
    let end = Instant::now() + BORNE;
    while let Ok(Ok(n @ 1..)) =
        tokio::time::timeout(end.saturating_duration_since(Instant::now()), io.read(&mut buffer))
            .await
    {
        answer.extend_from_slice(&buffer[..n]);
        let text = String::from_utf8_lossy(&answer);
        if text
            .split_once("\r\n\r\n")
            .is_some_and(|(_, body)| body.is_empty() || body.ends_with('}'))
        {
            break;
        }
    }
    assert!(
        Instant::now() < end,
        "borne for too long: {:?}",
        String::from_utf8_lossy(bytes).chars().take(200).collect::<String>()
    );
    String::from_utf8_lossy(&answer).into_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn hostile_requests_get_a_clear_error() {
    let control_plane = ControlPlane::with(&[]);
    let (enrolment, _) = control_plane.enrol();
    let head = |method: &str, path: &str, token: &str, more: &str| {
        format!(
            "{method} {path} HTTP/1.1\r\nHost: cp\r\nAuthorization: Bearer {token}\r\n{more}\r\n"
        )
        .into_bytes()
    };
    let with = |mut head: Vec<u8>, body: &[u8]| {
        head.extend_from_slice(body);
        head
    };
    let admin = control_plane.admin.as_str();
    let length = |n: usize| format!("Content-Length: {n}\r\n");
    let large = vec![b' '; 70_000];
    let deep = "[".repeat(100_000);
    let cases: Vec<(&str, Vec<u8>, &str, &str)> = vec![
        ("no HTTP at all", b"\x00\x01\x02\x03\r\n\r\n".to_vec(), "400", ""),
        ("no version", b"GET /\r\n\r\n".to_vec(), "400", ""),
        (
            "a header without a colon",
            b"GET /api/v1/health HTTP/1.1\r\nHost: cp\r\nnonsense\r\n\r\n".to_vec(),
            "400",
            "",
        ),
        (
            "headers without end",
            head("GET", "/api/v1/health", admin, &format!("X-A: {}\r\n", "a".repeat(100_000))),
            "431",
            "",
        ),
        (
            "a length that is none",
            head("POST", "/api/v1/projects", admin, "Content-Length: -5\r\n"),
            "400",
            "",
        ),
        (
            "two lengths",
            head("POST", "/api/v1/projects", admin, "Content-Length: 5\r\nContent-Length: 6\r\n"),
            "400",
            "",
        ),
        (
            "another transfer encoding",
            head("POST", "/api/v1/projects", admin, "Transfer-Encoding: gzip\r\n"),
            "400",
            "",
        ),
        (
            "chunks that are none",
            with(
                head("POST", "/api/v1/projects", admin, "Transfer-Encoding: chunked\r\n"),
                b"zz\r\n",
            ),
            "400",
            "bad_body",
        ),
        (
            "more than 1 MiB",
            with(head("POST", "/api/v1/projects", admin, &length(2 << 20)), &vec![b' '; 2 << 20]),
            "413",
            "too_large",
        ),
        (
            "a registration of 70 kB",
            with(head("POST", "/api/v1/agents/register", &enrolment, &length(large.len())), &large),
            "413",
            "too_large",
        ),
        (
            "no JSON",
            with(head("POST", "/api/v1/projects", admin, &length(3)), b"{{{"),
            "400",
            "bad_body",
        ),
        (
            "JSON without end",
            with(head("POST", "/api/v1/projects", admin, &length(deep.len())), deep.as_bytes()),
            "400",
            "bad_body",
        ),
        (
            "a wrong type",
            with(head("POST", "/api/v1/projects", admin, &length(10)), br#"{"name":7}"#),
            "400",
            "bad_body",
        ),
        (
            "an unknown key",
            with(head("POST", "/api/v1/projects", admin, &length(21)), br#"{"name":"a","evil":1}"#),
            "400",
            "bad_body",
        ),
        (
            "markup for a name",
            with(head("POST", "/api/v1/projects", admin, &length(19)), b"{\"name\":\"a\\u0000b\"}"),
            "400",
            "",
        ),
        (
            "a registration of nothing",
            with(head("POST", "/api/v1/agents/register", &enrolment, &length(2)), b"{}"),
            "400",
            "",
        ),
        (
            "another method",
            head("PATCH", "/api/v1/projects", admin, ""),
            "405",
            "method_not_allowed",
        ),
        ("no such path", head("GET", "/api/v1/../../etc/passwd", admin, ""), "404", "not_found"),
        ("a cluster that is none", head("GET", "/clusters/c-0/k8s/api", admin, ""), "404", ""),
        (
            "a body that does not come",
            head("POST", "/api/v1/projects", admin, &length(10)),
            "408",
            "too_slow",
        ),
    ];
    let answers = futures_util::future::join_all(
        cases.iter().map(|(_, bytes, _, _)| said(&control_plane, bytes)),
    )
    .await;
    for ((name, _, status, code), answer) in cases.iter().zip(answers) {
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{name}: {answer}");
        assert!(answer.contains(code), "{name}: {answer}");
        assert!(!answer.contains(admin) && !answer.contains(&enrolment), "{name}");
    }
    assert_eq!(control_plane.try_get("/api/v1/health", "").await.status(), 200);
    assert_eq!(
        control_plane.get("/api/v1/projects", admin).await["items"].as_array().unwrap().len(),
        1
    );
    // no TLS, and TLS that breaks off
    for bytes in [
        &b"GET / HTTP/1.1\r\nHost: cp\r\n\r\n"[..],
        b"\x16\x03\x01\xff\xff\x01",
        b"\x80\x80\x80\x80",
    ] {
        let mut io =
            TcpStream::connect(control_plane.url.trim_start_matches("https://")).await.unwrap();
        io.write_all(bytes).await.unwrap();
        let ended = tokio::time::timeout(BORNE, io.read_to_end(&mut Vec::new())).await;
        assert!(ended.is_ok(), "{bytes:?}");
    }
    assert_eq!(control_plane.try_get("/api/v1/health", "").await.status(), 200);
}

fn message(kind: u8, length: i64, body: &[u8]) -> Vec<u8> {
    let mut bytes = vec![kind];
    bytes.extend_from_slice(&length.to_be_bytes());
    bytes.extend_from_slice(body);
    bytes
}

/// Frames that break the protocol, and messages that break the peace, from somebody who knows what
/// every agent knows.
#[tokio::test(flavor = "multi_thread")]
async fn hostile_frames_at_the_tunnel_end_their_own_connection() {
    let control_plane = ControlPlane::with(&[]);
    let (_kube, kube) = serve_kube().await;
    let (agent, cluster) = control_plane.agent(kube).await;
    let kept = agent.sandbox.root().join("var/lib/pipeops-agent/credential.json");
    let kept: Value = serde_json::from_str(&std::fs::read_to_string(kept).unwrap()).unwrap();
    let known: TunnelConfig = serde_json::from_value(kept["config"]["tunnel"].clone()).unwrap();
    let token = known.auth.token.expose().to_owned();
    let config = TunnelConfig {
        tcp_mux: true,
        tls: TunnelTls { pin: known.tls.pin.clone(), ..TunnelTls::default() },
        auth: TunnelAuth { token: Secret::new(token.clone()), ..TunnelAuth::default() },
        proxies: Vec::new(),
        ..known.clone()
    };
    let address = (known.server.clone(), known.port);
    // before TLS
    for bytes in [
        &b"GET / HTTP/1.1\r\n\r\n"[..],
        b"\x00\x01\x00\x01\x00\x00\x00\x01\x00\x00\x00\x00",
        b"o\x00\x00\x00\x00\x00\x00\x00\x02{}",
        b"\x17\x17",
    ] {
        let mut io = TcpStream::connect((address.0.as_str(), address.1)).await.unwrap();
        io.write_all(bytes).await.unwrap();
        assert!(
            tokio::time::timeout(BORNE, io.read_to_end(&mut Vec::new())).await.is_ok(),
            "{bytes:?}"
        );
    }
    // under TLS, no multiplexer: version, kind, flags, a stream of the other side, one that is
    // taken, more than the window
    let frame = |version: u8, kind: u8, flags: u16, stream: u32, length: u32| {
        let mut bytes = vec![version, kind];
        bytes.extend_from_slice(&flags.to_be_bytes());
        bytes.extend_from_slice(&stream.to_be_bytes());
        bytes.extend_from_slice(&length.to_be_bytes());
        bytes
    };
    let open = frame(0, 1, 1, 1, 0);
    for bytes in [
        frame(9, 0, 0, 0, 0),
        frame(0, 7, 0, 0, 0),
        frame(0, 1, 1, 2, 0),
        frame(0, 1, 1, 0, 0),
        [open.clone(), open.clone()].concat(),
        [open.clone(), frame(0, 0, 0, 1, u32::MAX)].concat(),
        frame(0, 3, 0, 0, 0),
    ] {
        let tls = Trust {
            pins: vec![Pin::parse(known.tls.pin.as_deref().unwrap()).unwrap()],
            ..Default::default()
        }
        .client_config()
        .unwrap();
        let tcp = TcpStream::connect((address.0.as_str(), address.1)).await.unwrap();
        let name = rustls_pki_types::ServerName::try_from("127.0.0.1").unwrap();
        let mut io =
            tokio_rustls::TlsConnector::from(Arc::new(tls)).connect(name, tcp).await.unwrap();
        io.write_all(&bytes).await.unwrap();
        assert!(
            tokio::time::timeout(BORNE, io.read_to_end(&mut Vec::new())).await.is_ok(),
            "{bytes:?}"
        );
    }
    // first messages that are none
    let mut tasks = JoinSet::new();
    let connector = async |tasks: &mut JoinSet<()>| {
        Dialer::new(&config, false).unwrap().connect(tasks).await.unwrap()
    };
    for bytes in [
        message(b'z', 2, b"{}"),
        message(b'o', -1, b""),
        message(b'o', i64::MAX, b""),
        message(b'o', 10_241, b""),
        message(b'o', 2, b"[]"),
        message(b'o', 13, br#"{"run_id": 7}"#),
        message(b'o', 9999, "[".repeat(9999).as_bytes()),
        message(b'h', 2, b"{}"),
        message(b'4', 2, b"{}"),
    ] {
        let mut stream = connector(&mut tasks).await.open().await.unwrap();
        stream.write_all(&bytes).await.unwrap();
        stream.flush().await.unwrap();
        let mut rest = Vec::new();
        assert!(
            tokio::time::timeout(BORNE, stream.read_to_end(&mut rest)).await.is_ok(),
            "{bytes:?}"
        );
        assert!(rest.is_empty(), "{bytes:?} is answered with {rest:?}");
    }
    // what is well formed and not theirs
    let id = control_plane.clusters().await["items"][0]["agent_id"].as_str().unwrap().to_owned();
    let mut proof = known.auth.metas.clone();
    proof.insert("token".into(), "guessed".into());
    let login = |metas, run_id: &str| Login {
        privilege_key: wire::privilege_key(&Secret::new(token.clone()), 7),
        timestamp: 7,
        run_id: run_id.into(),
        metas,
        ..Login::default()
    };
    let own_run =
        std::fs::read_to_string(agent.sandbox.root().join("var/lib/pipeops-agent/run-id")).unwrap();
    let asked: [(&str, Message, &str); 6] = [
        (
            "a wrong token",
            Login { privilege_key: "x".into(), ..login(known.auth.metas.clone(), "") }.into(),
            "token",
        ),
        ("no proof", login(Default::default(), "").into(), "may not hold"),
        ("a guessed proof", login(proof, own_run.trim()).into(), "may not hold"),
        (
            "a work connection of nobody",
            NewWorkConn { run_id: "guessed".into(), ..NewWorkConn::default() }.into(),
            "no client control",
        ),
        (
            "a visitor with a wrong key",
            NewVisitorConn {
                proxy_name: format!("agent-{id}"),
                sign_key: "x".into(),
                ..NewVisitorConn::default()
            }
            .into(),
            "auth failed",
        ),
        (
            "a visitor of nobody",
            NewVisitorConn {
                proxy_name: "agent-a-0.r-0".into(),
                sign_key: "x".into(),
                ..NewVisitorConn::default()
            }
            .into(),
            "doesn't exist",
        ),
    ];
    for (name, message, why) in asked {
        let mut stream = connector(&mut tasks).await.open().await.unwrap();
        wire::write(&mut stream, message).await.unwrap();
        let error =
            match tokio::time::timeout(BORNE, wire::read(&mut stream)).await.unwrap().unwrap() {
                Message::LoginResp(r) => r.error,
                Message::StartWorkConn(r) => r.error,
                Message::NewVisitorConnResp(r) => r.error,
                other => panic!("{name}: {other:?}"),
            };
        assert!(error.contains(why), "{name}: {error}");
    }
    // an agent that is let in opens nothing but its own
    let mut control = connector(&mut tasks).await.open().await.unwrap();
    wire::write(&mut control, login(known.auth.metas.clone(), "")).await.unwrap();
    let Message::LoginResp(answer) = wire::read(&mut control).await.unwrap() else {
        panic!("no answer")
    };
    assert_eq!(answer.error, "");
    let mut control =
        pipeops::frp::codec::encrypted(control, &wire::Key::derive(&Secret::new(token.clone())));
    for (name, kind) in [
        ("agent-a-0", "stcp"),
        ("t", "tcp"),
        ("h", "http"),
        (&*format!("agent-{id}"), "tcp"),
        ("x", "udp"),
    ] {
        wire::write(
            &mut control,
            NewProxy { proxy_name: name.into(), proxy_type: kind.into(), ..NewProxy::default() },
        )
        .await
        .unwrap();
        let error = loop {
            match wire::read(&mut control).await.unwrap() {
                Message::NewProxyResp(answer) => break answer.error,
                Message::ReqWorkConn(_) => {}
                other => panic!("{other:?}"),
            }
        };
        assert!(error.contains("nothing else"), "{name} {kind}: {error}");
    }
    // whoever comes now is taken
    connector(&mut tasks).await;
    assert_eq!(control_plane.version(&cluster).await, 200, "the agent's own tunnel");
}
