//! Our client beside a genuine frpc, both behind the same genuine frps; without one, both halves ours, and the rest NOT RUN.

use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::Bytes;
use hyper_util::rt::TokioIo;
use hyper_util::service::TowerToHyperService;
use pipeops::secret::Secret;
use pipeops::trust::{Pin, Trust};
use pipeops::tunnel::layer::Io;
use pipeops::tunnel::server::{Server, ServerConfig};
use serde_json::json;
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;

use crate::bench::{Agent, BULK, Load, download, kube, load, median};
use crate::plane::{FRP_TOKEN, Plane, free_port};

type Sender = hyper::client::conn::http1::SendRequest<http_body_util::Empty<Bytes>>;

/// A program of frp's, ended with the bench.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

async fn sender(io: Io) -> Sender {
    let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(io)).await.unwrap();
    tokio::spawn(connection);
    sender
}

/// What stands behind frpc: the API in miniature, over TLS and plain.
async fn targets() -> (SocketAddr, SocketAddr, String) {
    let (tls, pin) = crate::plane::identity();
    let router = axum::Router::new().fallback(kube);
    let plain = crate::plane::listen(router.clone(), ()).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let acceptor = tokio_rustls::TlsAcceptor::from(tls);
    tokio::spawn(async move {
        loop {
            let Ok((stream, _)) = listener.accept().await else { continue };
            let (acceptor, router) = (acceptor.clone(), router.clone());
            tokio::spawn(async move {
                let Ok(stream) = acceptor.accept(stream).await else { return };
                let service = TowerToHyperService::new(router);
                let _ = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
            });
        }
    });
    (address, plain, pin)
}

fn said(what: &str, runs: &[Load]) -> (f64, f64) {
    let rates: Vec<f64> = runs.iter().map(Load::rate).collect();
    let tails: Vec<f64> = runs.iter().map(Load::p99_ms).collect();
    println!("raw: {what}: requests/s {rates:.0?}, p99 ms {tails:.1?}");
    (median(rates), median(tails))
}

/// rathole with TLS: its server on this machine, its client before `target`; the port that callers use.
async fn rathole(program: &str, dir: &Path, made: &rcgen::CertifiedKey<rcgen::KeyPair>, target: SocketAddr) -> (u16, [Running; 2]) {
    let (bind, exposed) = (free_port(), free_port());
    let put = |name: &str, text: &str| {
        let path = dir.join(name);
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let (certificate, key) = (put("rathole.crt", &made.cert.pem()), put("rathole.key", &made.signing_key.serialize_pem()));
    let identity = dir.join("rathole.pfx").to_str().unwrap().to_owned();
    let export = ["pkcs12", "-export", "-in", &certificate, "-inkey", &key, "-out", &identity, "-passout", "pass:p"];
    assert!(Command::new("openssl").args(export).status().unwrap().success());
    let server = format!(
        "[server]\nbind_addr = \"127.0.0.1:{bind}\"\ndefault_token = \"t\"\n[server.transport]\ntype = \"tls\"\n[server.transport.tls]\n\
         pkcs12 = \"{identity}\"\npkcs12_password = \"p\"\n[server.services.s]\nbind_addr = \"127.0.0.1:{exposed}\"\n"
    );
    let client = format!(
        "[client]\nremote_addr = \"127.0.0.1:{bind}\"\ndefault_token = \"t\"\n[client.transport]\ntype = \"tls\"\n[client.transport.tls]\n\
         trusted_root = \"{certificate}\"\nhostname = \"frps.test\"\n[client.services.s]\nlocal_addr = \"{target}\"\n"
    );
    let start = |kind: &str, config: &str| {
        Running(Command::new(program).args([kind, config]).env("RUST_LOG", "error").stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap())
    };
    let server = start("--server", &put("rathole-server.toml", &server));
    while TcpStream::connect(("127.0.0.1", bind)).await.is_err() {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let client = start("--client", &put("rathole-client.toml", &client));
    while TcpStream::connect(("127.0.0.1", exposed)).await.is_err() {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    (exposed, [server, client])
}

pub(crate) async fn tunnel(pipeops: &str, frp: Option<&str>) {
    let dir = tempfile::tempdir().unwrap();
    let made = rcgen::generate_simple_self_signed(vec!["frps.test".into()]).unwrap();
    let pin = Pin::of(made.cert.der()).unwrap().to_string();
    let (bind, vhost, ours_tcp, peer_tcp) = (free_port(), free_port(), free_port(), free_port());
    let put = |name: &str, text: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let start = |program: &str, config: &str| {
        Running(Command::new(Path::new(frp.unwrap()).join(program)).args(["-c", config]).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap())
    };
    let (tls_target, plain_target, target_pin) = targets().await;
    let mut running = Vec::new();
    if frp.is_some() {
        let (certificate, key) = (put("frps.crt", &made.cert.pem()), put("frps.key", &made.signing_key.serialize_pem()));
        let config = format!(
            "bindAddr = \"127.0.0.1\"\nbindPort = {bind}\nvhostHTTPPort = {vhost}\nauth.token = \"{FRP_TOKEN}\"\n\
             transport.tls.certFile = \"{certificate}\"\ntransport.tls.keyFile = \"{key}\"\n"
        );
        running.push(start("frps", &put("frps.toml", &config)));
        let config = format!(
            "serverAddr = \"127.0.0.1\"\nserverPort = {bind}\nauth.token = \"{FRP_TOKEN}\"\n\
             [[proxies]]\nname = \"peer-tcp\"\ntype = \"tcp\"\nlocalIP = \"127.0.0.1\"\nlocalPort = {}\nremotePort = {peer_tcp}\n\
             [[proxies]]\nname = \"peer-http\"\ntype = \"http\"\nlocalIP = \"127.0.0.1\"\nlocalPort = {}\ncustomDomains = [\"peer.test\"]\n",
            tls_target.port(),
            plain_target.port()
        );
        while TcpStream::connect(("127.0.0.1", bind)).await.is_err() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        running.push(start("frpc", &put("frpc.toml", &config)));
    } else {
        let key = rustls_pki_types::PrivateKeyDer::try_from(made.signing_key.serialize_der()).unwrap();
        let tls = rustls::ServerConfig::builder().with_no_client_auth().with_single_cert(vec![made.cert.der().clone()], key).unwrap();
        let config = ServerConfig {
            token: Secret::new(FRP_TOKEN),
            tls: Some(Arc::new(tls)),
            tcp_mux: true,
            tcp_bind: Some([127, 0, 0, 1].into()),
            heartbeat: Duration::from_secs(30),
            admit: None,
        };
        let listener = TcpListener::bind(("127.0.0.1", bind)).await.unwrap();
        tokio::spawn(async move { Server::new(config).serve(listener, CancellationToken::new()).await });
    }
    let plane = Arc::new(Plane::new(SocketAddr::from(([127, 0, 0, 1], bind)), &pin));
    plane.config.lock().unwrap()["tunnel"]["proxies"] = json!([
        {"name": "agent-tcp", "type": "tcp", "remote_port": ours_tcp},
        {"name": "agent-http", "type": "http", "custom_domains": ["ours.test"]},
    ]);
    let agent = Agent::start(pipeops, &plane).await;
    let begun = Instant::now();
    while TcpStream::connect(("127.0.0.1", ours_tcp)).await.is_err() {
        assert!(begun.elapsed() < Duration::from_secs(60), "the tunnel does not come up");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    tokio::time::sleep(Duration::from_secs(3)).await;
    let id = plane.calls("/register")[0].2["agent"]["id"].as_str().unwrap().to_owned();
    let token = plane.token(&id, "deployer", None);
    let length = Duration::from_secs(3);
    let ours = || async {
        sender(Box::new(plane.tls(Box::new(TcpStream::connect(("127.0.0.1", ours_tcp)).await.unwrap()), b"http/1.1").await.unwrap())).await
    };
    let trust = Trust { pins: vec![Pin::parse(&target_pin).unwrap()], ..Trust::default() };
    let client = tokio_rustls::TlsConnector::from(Arc::new(trust.client().unwrap()));
    let through = async |port: u16| {
        let stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
        let name = rustls_pki_types::ServerName::try_from("frps.test").unwrap();
        sender(Box::new(client.connect(name, stream).await.unwrap())).await
    };
    let rathole = match std::env::var("PIPEOPS_TEST_RATHOLE") {
        Ok(program) => Some(rathole(&program, dir.path(), &made, tls_target).await),
        Err(_) => None,
    };
    let hole = rathole.as_ref().map(|(port, _)| *port);
    let peer = || through(peer_tcp);
    let plain = || async { sender(Box::new(TcpStream::connect(("127.0.0.1", vhost)).await.unwrap())).await };
    let (mut a, mut b, mut c, mut d, mut e) = (Vec::new(), Vec::new(), Vec::new(), Vec::new(), Vec::new());
    // the first round warms up
    for round in 0..6 {
        let runs = [load(50, length, ours, "localhost", "/healthz", &token).await].into_iter().skip(usize::from(round == 0));
        a.extend(runs);
        if let Some(port) = hole {
            e.extend([load(50, length, || through(port), "localhost", "/healthz", &token).await].into_iter().skip(usize::from(round == 0)));
        }
        if frp.is_some() {
            let skip = usize::from(round == 0);
            b.extend([load(50, length, peer, "localhost", "/healthz", &token).await].into_iter().skip(skip));
            c.extend([load(50, length, plain, "ours.test", "/healthz", &token).await].into_iter().skip(skip));
            d.extend([load(50, length, plain, "peer.test", "/healthz", &token).await].into_iter().skip(skip));
        }
    }
    let (rate, tail) = said("tcp with TLS inside, ours", &a);
    if frp.is_some() {
        let (theirs, their_tail) = said("tcp before the same TLS server, frpc", &b);
        println!("tcp: ours {rate:.0} requests/s, p99 {tail:.1} ms; frpc {theirs:.0}, {their_tail:.1} ms; ratio {:.2}", rate / theirs);
        let ((rate, tail), (theirs, their_tail)) = (said("http, ours", &c), said("http, frpc", &d));
        println!("http: ours {rate:.0} requests/s, p99 {tail:.1} ms; frpc {theirs:.0}, {their_tail:.1} ms; ratio {:.2} (budget 1.5)", rate / theirs);
        // the API is not served where the owner of the FRP server reads along, which is http's way
        let (mut ours_bulk, mut peer_bulk) = (Vec::new(), Vec::new());
        for _ in 0..5 {
            ours_bulk.push(download(ours, "localhost", BULK, 256 << 20, &token).await / 1e6);
            peer_bulk.push(download(peer, "localhost", BULK, 256 << 20, &token).await / 1e6);
        }
        println!("raw: one bulk stream, tcp: MB/s, ours {ours_bulk:.0?}, frpc {peer_bulk:.0?}");
        let (ours, theirs) = (median(ours_bulk), median(peer_bulk));
        println!("one bulk stream, tcp: ours {ours:.0} MB/s, frpc {theirs:.0} MB/s; ratio {:.2} (budget 1.2)", ours / theirs);
    } else {
        println!("tcp with TLS inside, both halves ours, 50 callers: {rate:.0} requests/s, p99 {tail:.1} ms");
        println!("NOT RUN: a genuine frps and frpc (PIPEOPS_TEST_FRP_DIR is not set)");
    }
    if hole.is_some() {
        let (theirs, their_tail) = said("tcp before the same TLS server, rathole with TLS", &e);
        let kind = if frp.is_some() { "behind frps" } else { "both halves" };
        println!(
            "ours ({kind}) {rate:.0} requests/s, p99 {tail:.1} ms; rathole {theirs:.0}, {their_tail:.1} ms; ratio {:.2} (budget 0.9)",
            rate / theirs
        );
    } else {
        println!("NOT RUN: rathole with TLS (PIPEOPS_TEST_RATHOLE names no program)");
    }
    drop((agent, running, rathole));
}
