//! What comes over the network: FRP messages, multiplexer frames, paths, tokens, HTTP heads.

use hyper_util::rt::TokioIo;
use pipeops::base::secret::Secret;
use pipeops::contract::token::{Caller, Role, verify};
use pipeops::contract::types::{Jwk, Jwks, RunnerAuth};
use pipeops::frp::codec::layered;
use pipeops::frp::mux::{Limits, Mux, Side};
use pipeops::frp::wire::{self, Key, Message};
use pipeops::kubernetes::header_policy;
use pipeops::kubernetes::path;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::{run, run_bytes};

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap_or_else(|e| panic!("{e}"))
}

#[test]
fn frame() {
    let seeds: Vec<Vec<u8>> = [
        Message::from(wire::Login { run_id: "r".into(), timestamp: 7, ..wire::Login::default() }),
        Message::from(wire::NewProxy {
            proxy_name: "a".into(),
            remote_port: 1,
            custom_domains: vec!["x".into()],
            ..wire::NewProxy::default()
        }),
        Message::from(wire::StartWorkConn {
            proxy_name: "a".into(),
            src_port: 9,
            ..wire::StartWorkConn::default()
        }),
        Message::from(wire::Ping::default()),
    ]
    .iter()
    .filter_map(|m| m.encode().ok())
    .collect();
    let seeds: Vec<&[u8]> = seeds.iter().map(Vec::as_slice).collect();
    let runtime = runtime();
    let key = Key::derive(&Secret::new("t"));
    run_bytes("frame", &seeds, |bytes| {
        runtime.block_on(async {
            if let Ok(message) = wire::read(&mut &*bytes).await {
                // what was read can be written again, unless escapes made it longer than the
                // protocol carries
                let _ = message.encode();
            }
            let mut plain = Vec::new();
            let _ = layered(Box::new(std::io::Cursor::new(bytes.to_vec())), Some(&key), true)
                .take(1 << 20)
                .read_to_end(&mut plain)
                .await;
        });
    });
}

#[test]
fn mux() {
    let seeds: [&[u8]; 4] = [
        b"\0\x01\0\x01\0\0\0\x01\0\0\0\0\0\0\0\0\0\0\0\x01\0\0\0\x03abc",
        b"\0\x02\0\x01\0\0\0\0\0\0\0\x07",
        b"\0\x00\0\x01\0\0\0\x03\0\0\0\x01x\0\x01\0\x04\0\0\0\x03\0\0\0\0",
        b"\0\x01\0\x01\0\0\0\x01\0\x5c\0\0\0\x01\0\x08\0\0\0\x01\0\0\0\0\0\x03\0\0\0\0\0\0\0\0\0\0",
    ];
    let runtime = runtime();
    run_bytes("mux", &seeds, |bytes| {
        runtime.block_on(async {
            let (ours, mut theirs) = tokio::io::duplex(1 << 17);
            let (mux, driver) =
                Mux::new(ours, Side::Server, Limits { window: 256 * 1024, streams: 8 });
            let _ = theirs.write_all(bytes).await;
            let _ = theirs.shutdown().await;
            let serve = async {
                while let Some(mut stream) = mux.accept().await {
                    let mut some = [0; 64];
                    let _ = stream.read(&mut some).await;
                    let _ = stream.write(&some).await;
                }
            };
            tokio::join!(driver.run(), serve);
        });
    });
}

#[test]
fn path() {
    let seeds = [
        "/api/v1/namespaces/beta/pods/x/log",
        "/apis/apps/v1/deployments",
        "/api/v1/namespaces/%2e%2e/x",
        "/api/v1/namespaces/a:b/pods/caf%C3%A9",
        "//\\..;/",
    ];
    run("path", &seeds, |text| {
        if let Ok(judged) = path::parse(text) {
            assert!(
                judged.path.is_ascii()
                    && !judged.path.contains("//")
                    && !judged.path.contains('\\')
                    && judged.path.split('/').all(|s| s != ".." && s != ".")
            );
            assert_eq!(path::parse(&judged.path).as_ref(), Ok(&judged));
        }
    });
}

#[test]
fn jwt() {
    let auth = RunnerAuth {
        issuer: "cp".into(),
        audience: "a".into(),
        jwks: Jwks {
            keys: vec![Jwk {
                kid: "k".into(),
                kty: "OKP".into(),
                crv: "Ed25519".into(),
                x: "A".repeat(43),
            }],
        },
    };
    let good = "eyJhbGciOiJFZERTQSJ9.eyJpc3MiOiJjcCJ9.AAAA";
    run("jwt", &[good, "..", "eyJhbGciOiJub25lIn0.e30."], |text| {
        // nobody has signed any of these
        assert!(
            verify(text, &auth, "a", Role::Admin, 1_800_000_000, &parking_lot::Mutex::default())
                .is_err()
        );
    });
}

/// Through hyper's parser, as on a tunnel stream: whatever passes carries the identity that we give
/// it and no other.
#[test]
fn head() {
    let seeds: [&[u8]; 5] = [
        b"GET /k8s/api HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer x\r\nImpersonate-User: evil\r\n\r\n",
        b"POST /k8s/api HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\nhi",
        b"GET /k8s/x HTTP/1.1\r\nHost: a\r\nConnection: Upgrade, Impersonate-Group\r\nUpgrade: websocket\r\nSec-WebSocket-Protocol: v4.channel.k8s.io\r\n\r\n",
        b"GET http://a@b/ HTTP/1.1\r\nHost: b\r\nImpersonate-Extra-a: b\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0",
    ];
    let caller = Caller {
        subject: "r".into(),
        role: Role::Viewer,
        namespaces: None,
        tenant: None,
        token_id: "t".into(),
        operation: None,
    };
    let runtime = runtime();
    run_bytes("head", &seeds, |bytes| {
        runtime.block_on(async {
            let (ours, mut theirs) = tokio::io::duplex(1 << 17);
            let caller = caller.clone();
            let service = hyper::service::service_fn(
                move |request: hyper::Request<hyper::body::Incoming>| {
                    let (parts, _) = request.into_parts();
                    let upgrade = header_policy::requested_upgrade(&parts).unwrap_or_default();
                    if let (Ok(()), Ok(out)) = (
                        header_policy::check_framing(&parts),
                        header_policy::request_headers(
                            &parts.headers,
                            &caller,
                            None,
                            "id",
                            upgrade,
                        ),
                    ) {
                        let named: Vec<&str> = out
                            .keys()
                            .map(http::HeaderName::as_str)
                            .filter(|n| n.starts_with("impersonate"))
                            .collect();
                        assert_eq!(named.len(), 3, "{named:?}");
                        assert_eq!(out["impersonate-user"], "pipeops:runner");
                        assert!(
                            !out.contains_key("authorization")
                                && !out.contains_key("transfer-encoding")
                        );
                    }
                    std::future::ready(Ok::<_, std::convert::Infallible>(hyper::Response::new(
                        http_body_util::Empty::<hyper::body::Bytes>::new(),
                    )))
                },
            );
            let _ = theirs.write_all(bytes).await;
            let _ = theirs.shutdown().await;
            let read = async {
                let mut all = Vec::new();
                let _ = theirs.read_to_end(&mut all).await;
            };
            let serve = hyper::server::conn::http1::Builder::new()
                .serve_connection(TokioIo::new(ours), service);
            let _ = tokio::join!(serve, read);
        });
    });
}

/// A control plane that runs: whole requests, damaged, by somebody who may do everything;
/// afterwards it is as it was.
#[test]
fn plane() {
    use std::io::{Read as _, Write as _};
    use std::os::unix::net::UnixStream;
    use std::time::Duration;

    let dir = tempfile::tempdir().unwrap_or_else(|e| panic!("{e}"));
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap_or_else(|e| panic!("{e}"));
    let stop = tokio_util::sync::CancellationToken::new();
    let (said, ready) = std::sync::mpsc::channel();
    let host = pipeops::host::Host::new(dir.path(), None);
    let (served, halt) = (host.clone(), stop.clone());
    let task = runtime.spawn(async move {
        let config = pipeops::control_plane::ControlPlaneConfig {
            listen: ([127, 0, 0, 1], 0).into(),
            tunnel_listen: ([127, 0, 0, 1], 0).into(),
            names: vec!["127.0.0.1".into()],
            database: None,
            broker: None,
            frps: None,
            certificate: None,
            data_dir: "/d".into(),
            show: None,
        };
        pipeops::control_plane::run(&served, config, halt, move |_, _| {
            said.send(()).unwrap_or_default()
        })
        .await
    });
    ready
        .recv_timeout(Duration::from_secs(30))
        .unwrap_or_else(|e| panic!("it does not serve: {e}"));
    let socket = dir.path().join("d").join(pipeops::control_plane::SOCKET);
    let body = |method: &str, path: &str, body: &str| {
        format!(
            "{method} {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
            body.len()
        )
    };
    let seeds = [
        body("POST", "/api/v1/tokens", r#"{"project":"default","name":"t","ttl_s":60,"uses":1}"#),
        body("POST", "/api/v1/runners", r#"{"name":"ci","role":"deployer","clusters":["c-1"],"namespaces":["beta"],"ttl_s":60}"#),
        body("POST", "/api/v1/projects", r#"{"name":"p"}"#),
        body("POST", "/api/v1/clusters/c-1/token", r#"{"role":"viewer","ttl_s":60}"#),
        body("PATCH", "/api/v1/clusters/c-1/labels", r#"{"labels":{"env":"prod","old":null}}"#),
        body("GET", "/api/v1/clusters?selector=env%3Dprod,tier%20in%20(a,b)", ""),
        body("GET", "/api/v1/clusters/c-1/inside/events", ""),
        body("GET", "/clusters/c-1/k8s/api/v1/pods?watch=1", ""),
        body("POST", "/session", r#"{"token":"pom_x"}"#).replace("content-type", "cookie: __Host-pipeops=x; a=b\r\nx-csrf-token: y\r\ncontent-type"),
        body("POST", "/frp/handler/x?op=Login&version=0.1.0", r#"{"content":{"metas":{"agent":"a","token":"t"},"user":{"metas":null}}}"#),
        "POST /api/v1/tokens HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n".to_owned(),
    ];
    let seeds: Vec<&[u8]> = seeds.iter().map(String::as_bytes).collect();
    run_bytes("plane", &seeds, |bytes| {
        let Ok(mut io) = UnixStream::connect(&socket) else {
            panic!("it takes no connection any more")
        };
        let _ = io.set_read_timeout(Some(Duration::from_millis(200)));
        let _ = io.write_all(bytes);
        let _ = io.shutdown(std::net::Shutdown::Write);
        let _ = io.take(1 << 20).read_to_end(&mut Vec::new());
    });
    let health = runtime.block_on(pipeops::control_plane::client::call(
        &host,
        "/d",
        http::Method::GET,
        "/api/v1/health",
        None,
    ));
    assert!(health.is_ok_and(|text| text.contains("ok")));
    stop.cancel();
    let ended = runtime.block_on(task);
    assert!(matches!(ended, Ok(Ok(()))), "{ended:?}");
}

/// What Runners ask for: taken, or refused with a code; what is taken names objects that a path can
/// hold.
#[test]
fn operations() {
    use pipeops::contract::operation::OperationRequest;
    let caller = Caller {
        subject: "r".into(),
        role: Role::Operator,
        namespaces: None,
        tenant: None,
        token_id: "t".into(),
        operation: None,
    };
    let seeds = [
        r#"{"kind":"apply","spec":{"objects":[{"apiVersion":"apps/v1","kind":"Deployment","metadata":{"name":"w","namespace":"beta"}}],"wait":false,"timeout_s":9}}"#,
        r#"{"kind":"delete","spec":{"objects":[{"apiVersion":"v1","kind":"ConfigMap","name":"c","namespace":"b"}]}}"#,
        r#"{"kind":"scale","spec":{"object":{"apiVersion":"apps/v1","kind":"Deployment","name":"w","namespace":"b"},"replicas":3}}"#,
        r#"{"kind":"cordon","spec":{"node":"n1"}}"#,
        r#"{"kind":"tenant","spec":{"action":"set","tenant":"a","namespaces":["a"],"hosts":["*.a.io"],"egress":["10.0.0.0/8"]}}"#,
        r#"{"kind":"secret","spec":{"action":"set","namespace":"b","name":"db","data":{"a":"1"},"binary":{"c":"AA=="},"remove":["d"],"type":"opaque"}}"#,
    ];
    run("operations", &seeds, |text| match OperationRequest::parse(text.as_bytes(), &caller) {
        Ok(wanted) => assert!(!wanted.kind().is_empty()),
        Err((status, code, message)) => {
            assert!(matches!(status, 400 | 403) && !code.is_empty() && !message.is_empty())
        }
    });
}

/// What agents send: read, or refused with words.
#[test]
fn agents_bodies() {
    use pipeops::contract::types::{Heartbeat, Operation, Register, StatusReport};
    let seeds = [
        r#"{"agent":{"id":"a-1","public_key":"x","name":"n","machine":"m","labels":{"a":"b"}},"cluster":{"name":"c","node_count":1},"capabilities":["x"],"max_role":"viewer"}"#,
        r#"{"seq":1,"sent_at":"2026-11-24T00:00:00Z","state":"online","tunnel":{"state":"up","since":""},"uptime_s":7,"audit_head":{"seq":1,"hash":""}}"#,
        r#"{"id":"o-0a","kind":"apply","state":"failed","subject":"r","message":"m","objects":[{"object":"Pod b/p","outcome":"created"}]}"#,
        r#"{"at":"","kubernetes":"connected","nodes":[{"name":"n","ready":true}],"workloads":{"pods":1},"usage":{"memory_used_bytes":1}}"#,
    ];
    run("agents_bodies", &seeds, |text| {
        let _ = serde_json::from_str::<Register>(text);
        let _ = serde_json::from_str::<Heartbeat>(text);
        let _ = serde_json::from_str::<StatusReport>(text);
        let _ = serde_json::from_str::<Operation>(text);
        let _ = pipeops::control_plane::registry::enrol::spki(text);
    });
}
