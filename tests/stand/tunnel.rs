//! Our client beside a genuine frpc, both behind the same genuine frps; both halves ours beside two
//! nginx stream proxies with TLS between them, and beside rathole with TLS. One load generator, in
//! this program, for all; so are the API that the others stand before and our server half.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::Bytes;
use hyper_util::rt::TokioIo;
use hyper_util::service::TowerToHyperService;
use pipeops::base::secret::Secret;
use pipeops::base::trust::{Pin, Trust};
use pipeops::frp::codec::Io;
use pipeops::frp::server::{Server, ServerConfig};
use serde_json::json;
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;

use crate::bench::{Agent, BULK, Load, download, kube, load, median};
use crate::fake_control_plane::{FRP_TOKEN, FakeControlPlane, free_port};

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
    let (sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(io)).await.unwrap();
    tokio::spawn(connection);
    sender
}

/// What stands behind frpc: the API in miniature, over TLS and plain.
async fn targets() -> (SocketAddr, SocketAddr, String) {
    let (tls, pin) = crate::fake_control_plane::identity();
    let router = axum::Router::new().fallback(kube);
    let plain = crate::fake_control_plane::listen(router.clone(), ()).await;
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
                let _ = hyper::server::conn::http1::Builder::new()
                    .serve_connection(TokioIo::new(stream), service)
                    .await;
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

/// Where everything of a bench stands.
pub(crate) struct Site {
    dir: tempfile::TempDir,
    made: rcgen::CertifiedKey<rcgen::KeyPair>,
    /// The API in miniature over TLS, the same in clear, and the pin of the former.
    tls_target: SocketAddr,
    plain_target: SocketAddr,
    trust: tokio_rustls::TlsConnector,
}

impl Site {
    pub(crate) async fn new() -> Site {
        let made = rcgen::generate_simple_self_signed(vec!["frps.test".into()]).unwrap();
        let (tls_target, plain_target, pin) = targets().await;
        let trust = Trust { pins: vec![Pin::parse(&pin).unwrap()], ..Trust::default() };
        let trust = tokio_rustls::TlsConnector::from(Arc::new(trust.client_config().unwrap()));
        Site { dir: tempfile::tempdir().unwrap(), made, tls_target, plain_target, trust }
    }

    fn put(&self, name: &str, text: &str) -> String {
        let path = self.dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    }

    /// Paths of certificate and key of the servers in the middle.
    fn identity(&self) -> (String, String) {
        (
            self.put("server.crt", &self.made.cert.pem()),
            self.put("server.key", &self.made.signing_key.serialize_pem()),
        )
    }

    /// A caller of the TLS target through whatever listens on a port.
    async fn through(&self, port: u16) -> Sender {
        let stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
        let name = rustls_pki_types::ServerName::try_from("frps.test").unwrap();
        sender(Box::new(self.trust.connect(name, stream).await.unwrap())).await
    }

    /// nginx, once at the callers' end, once before the target, TLS between them; the port that
    /// callers use.
    async fn nginx(&self, program: &str, module: &str) -> (u16, [Running; 2]) {
        let (near, far) = (free_port(), free_port());
        let (certificate, key) = self.identity();
        let start = |name: &str, server: &str| {
            let dir = self.dir.path();
            let text = format!(
                "daemon off;\nworker_processes auto;\nload_module {module};\npid {}/{name}.pid;\nevents {{ worker_connections 1024; }}\n\
                 stream {{ server {{ {server} }} }}\n",
                dir.display()
            );
            let config = self.put(&format!("{name}.conf"), &text);
            Running(
                Command::new(program)
                    .args(["-e", "stderr", "-c", &config])
                    .stdout(Stdio::null())
                    .spawn()
                    .unwrap(),
            )
        };
        let server = format!(
            "listen 127.0.0.1:{far} ssl; ssl_protocols TLSv1.3; ssl_certificate {certificate}; ssl_certificate_key {key}; proxy_pass {};",
            self.tls_target
        );
        let behind = start("far", &server);
        answers(far).await;
        let tls = format!(
            "proxy_ssl on; proxy_ssl_verify on; proxy_ssl_trusted_certificate {certificate}; proxy_ssl_name frps.test;"
        );
        let server = format!(
            "listen 127.0.0.1:{near}; proxy_pass 127.0.0.1:{far}; {tls} proxy_ssl_protocols TLSv1.3;"
        );
        let before = start("near", &server);
        answers(near).await;
        (near, [before, behind])
    }

    /// rathole with TLS: its server on this machine, its client before the target; the port that
    /// callers use.
    async fn rathole(&self, program: &str) -> (u16, [Running; 2]) {
        let (bind, exposed, target) = (free_port(), free_port(), self.tls_target);
        let (certificate, key) = self.identity();
        let identity = self.dir.path().join("rathole.pfx").to_str().unwrap().to_owned();
        let export = [
            "pkcs12",
            "-export",
            "-in",
            &certificate,
            "-inkey",
            &key,
            "-out",
            &identity,
            "-passout",
            "pass:p",
        ];
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
            Running(
                Command::new(program)
                    .args([kind, config])
                    .env("RUST_LOG", "error")
                    .stdout(Stdio::null())
                    .stderr(Stdio::null())
                    .spawn()
                    .unwrap(),
            )
        };
        let server = start("--server", &self.put("rathole-server.toml", &server));
        answers(bind).await;
        let client = start("--client", &self.put("rathole-client.toml", &client));
        answers(exposed).await;
        (exposed, [server, client])
    }

    /// frps, and frpc before both targets, its tcp proxy on `peer_tcp`.
    async fn frp(&self, dir: &Path, bind: u16, vhost: u16, peer_tcp: u16) -> [Running; 2] {
        let start = |program: &str, config: &str| {
            Running(
                Command::new(dir.join(program))
                    .args(["-c", config])
                    .stdout(Stdio::null())
                    .stderr(Stdio::null())
                    .spawn()
                    .unwrap(),
            )
        };
        let (certificate, key) = self.identity();
        let config = format!(
            "bindAddr = \"127.0.0.1\"\nbindPort = {bind}\nvhostHTTPPort = {vhost}\nauth.token = \"{FRP_TOKEN}\"\n\
             transport.tls.certFile = \"{certificate}\"\ntransport.tls.keyFile = \"{key}\"\n"
        );
        let frps = start("frps", &self.put("frps.toml", &config));
        answers(bind).await;
        let config = format!(
            "serverAddr = \"127.0.0.1\"\nserverPort = {bind}\nauth.token = \"{FRP_TOKEN}\"\n\
             [[proxies]]\nname = \"peer-tcp\"\ntype = \"tcp\"\nlocalIP = \"127.0.0.1\"\nlocalPort = {}\nremotePort = {peer_tcp}\n\
             [[proxies]]\nname = \"peer-http\"\ntype = \"http\"\nlocalIP = \"127.0.0.1\"\nlocalPort = {}\ncustomDomains = [\"peer.test\"]\n",
            self.tls_target.port(),
            self.plain_target.port()
        );
        let frpc = start("frpc", &self.put("frpc.toml", &config));
        answers(peer_tcp).await;
        [frps, frpc]
    }
}

async fn answers(port: u16) {
    let begun = Instant::now();
    while TcpStream::connect(("127.0.0.1", port)).await.is_err() {
        assert!(begun.elapsed() < Duration::from_secs(60), "nothing listens on port {port}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// The real agent with a tcp proxy, and one of type http for `ours.test`.
pub(crate) struct Ours {
    control_plane: Arc<FakeControlPlane>,
    port: u16,
    token: String,
    _agent: Agent,
}

impl Ours {
    async fn start(site: &Site, pipeops: &str, bind: u16) -> Ours {
        let (pin, port) =
            (Pin::from_certificate(site.made.cert.der()).unwrap().to_string(), free_port());
        let control_plane =
            Arc::new(FakeControlPlane::new(SocketAddr::from(([127, 0, 0, 1], bind)), &pin));
        control_plane.config.lock().unwrap()["tunnel"]["proxies"] = json!([
            {"name": "agent-tcp", "type": "tcp", "remote_port": port},
            {"name": "agent-http", "type": "http", "custom_domains": ["ours.test"]},
        ]);
        let agent = Agent::start(pipeops, &control_plane).await;
        answers(port).await;
        tokio::time::sleep(Duration::from_secs(3)).await;
        let id = control_plane.calls("/register")[0].2["agent"]["id"].as_str().unwrap().to_owned();
        let token = control_plane.token(&id, "deployer", None);
        Ours { control_plane, port, token, _agent: agent }
    }

    pub(crate) fn token(&self) -> &str {
        &self.token
    }

    pub(crate) async fn caller(&self) -> Sender {
        let stream = TcpStream::connect(("127.0.0.1", self.port)).await.unwrap();
        sender(Box::new(self.control_plane.tls(Box::new(stream), b"http/1.1").await.unwrap())).await
    }
}

/// Our client behind a genuine frps of its own.
pub(crate) struct Behind {
    agent: Ours,
    /// Where frps serves its proxies of type http.
    vhost: u16,
    /// Where its peer, a genuine frpc, has its tcp proxy.
    peer_tcp: u16,
    _running: [Running; 2],
}

impl Behind {
    pub(crate) async fn start(site: &Site, pipeops: &str, dir: &Path) -> Behind {
        let (bind, vhost, peer_tcp) = (free_port(), free_port(), free_port());
        let running = site.frp(dir, bind, vhost, peer_tcp).await;
        let agent = Ours::start(site, pipeops, bind).await;
        Behind { agent, vhost, peer_tcp, _running: running }
    }

    pub(crate) fn token(&self) -> &str {
        self.agent.token()
    }

    /// Through our tcp proxy, with TLS to the agent.
    pub(crate) async fn tcp(&self) -> Sender {
        self.agent.caller().await
    }

    /// To the http proxies, in clear.
    pub(crate) async fn http(&self) -> Sender {
        sender(Box::new(TcpStream::connect(("127.0.0.1", self.vhost)).await.unwrap())).await
    }
}

/// 50 callers, six times in turn; the first round warms up.
const CALLERS: usize = 50;
const LENGTH: Duration = Duration::from_secs(3);

pub(crate) async fn tunnel(pipeops: &str) {
    let site = Site::new().await;
    match std::env::var_os("PIPEOPS_BENCH_FRP").map(PathBuf::from) {
        Some(dir) => behind_frps(&site, pipeops, &dir).await,
        None => {
            println!("NOT RUN: beside frpc behind a genuine frps (PIPEOPS_BENCH_FRP names none)")
        }
    }
    both_halves(&site, pipeops).await;
}

async fn behind_frps(site: &Site, pipeops: &str, dir: &Path) {
    let said_by = Command::new(dir.join("frps")).arg("-v").output().unwrap();
    println!("frps and frpc {}", String::from_utf8_lossy(&said_by.stdout).trim());
    let behind = Behind::start(site, pipeops, dir).await;
    let token = behind.token();
    let (ours, peer) = (|| behind.tcp(), || site.through(behind.peer_tcp));
    let plain = || behind.http();
    let (mut a, mut b, mut c, mut d) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for _ in 0..6 {
        a.push(load(CALLERS, LENGTH, ours, "localhost", "/healthz", token).await);
        b.push(load(CALLERS, LENGTH, peer, "localhost", "/healthz", token).await);
        c.push(load(CALLERS, LENGTH, plain, "ours.test", "/healthz", token).await);
        d.push(load(CALLERS, LENGTH, plain, "peer.test", "/healthz", token).await);
    }
    compared("tcp with TLS inside behind the same frps", ("ours", &a[1..]), ("frpc", &b[1..]), 1.6);
    compared("http behind the same frps", ("ours", &c[1..]), ("frpc", &d[1..]), 2.0);
    // the API is not served where the owner of the FRP server reads along, which is http's way
    let (mut ours_bulk, mut peer_bulk) = (Vec::new(), Vec::new());
    for _ in 0..5 {
        ours_bulk.push(download(ours, "localhost", BULK, 256 << 20, token).await / 1e6);
        peer_bulk.push(download(peer, "localhost", BULK, 256 << 20, token).await / 1e6);
    }
    println!("raw: one bulk stream, tcp: MB/s, ours {ours_bulk:.0?}, frpc {peer_bulk:.0?}");
    let (quick, theirs) = (median(ours_bulk), median(peer_bulk));
    println!(
        "one bulk stream, tcp: ours {quick:.0} MB/s, frpc {theirs:.0} MB/s; ratio {:.2} (budget 1.3)",
        quick / theirs
    );
    let mut beside = Vec::new();
    for _ in 0..5 {
        let bulk = async {
            loop {
                download(ours, "localhost", BULK, 256 << 20, token).await;
            }
        };
        tokio::select! {
            () = bulk => {}
            small = load(CALLERS, LENGTH, ours, "localhost", "/healthz", token) => beside.push(small),
        }
    }
    let ((_, idle), (_, busy)) =
        (said("callers alone, ours", &a[1..]), said("callers beside a bulk stream, ours", &beside));
    println!(
        "p99 of {CALLERS} callers: alone {idle:.1} ms, beside a bulk stream {busy:.1} ms; ratio {:.2} (budget 2, or less)",
        busy / idle
    );
}

/// Our client at our server half, which runs in this program.
pub(crate) async fn own_halves(site: &Site, pipeops: &str) -> Ours {
    let bind = free_port();
    let key =
        rustls_pki_types::PrivateKeyDer::try_from(site.made.signing_key.serialize_der()).unwrap();
    let tls = rustls::ServerConfig::builder()
        .with_no_client_auth()
        .with_single_cert(vec![site.made.cert.der().clone()], key)
        .unwrap();
    let config = ServerConfig {
        token: Secret::new(FRP_TOKEN),
        tls: Some(Arc::new(tls)),
        tcp_mux: true,
        tcp_bind: Some([127, 0, 0, 1].into()),
        heartbeat: Duration::from_secs(30),
        authorizer: None,
    };
    let listener = TcpListener::bind(("127.0.0.1", bind)).await.unwrap();
    tokio::spawn(
        async move { Server::new(config).serve(listener, CancellationToken::new()).await },
    );
    Ours::start(site, pipeops, bind).await
}

async fn both_halves(site: &Site, pipeops: &str) {
    let agent = own_halves(site, pipeops).await;
    let nginx =
        match (std::env::var("PIPEOPS_BENCH_NGINX"), std::env::var("PIPEOPS_BENCH_NGINX_STREAM")) {
            (Ok(program), Ok(module)) => Some(site.nginx(&program, &module).await),
            _ => None,
        };
    let rathole = match std::env::var("PIPEOPS_TEST_RATHOLE") {
        Ok(program) => Some(site.rathole(&program).await),
        Err(_) => None,
    };
    let (mut ours, mut proxied, mut holed) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..6 {
        ours.push(
            load(CALLERS, LENGTH, || agent.caller(), "localhost", "/healthz", &agent.token).await,
        );
        for (port, runs) in [
            (nginx.as_ref().map(|n| n.0), &mut proxied),
            (rathole.as_ref().map(|r| r.0), &mut holed),
        ] {
            let Some(port) = port else { continue };
            runs.push(
                load(CALLERS, LENGTH, || site.through(port), "localhost", "/healthz", &agent.token)
                    .await,
            );
        }
    }
    if nginx.is_some() {
        compared(
            "both halves",
            ("ours", &ours[1..]),
            ("two nginx stream proxies, TLS between", &proxied[1..]),
            1.2,
        );
    } else {
        println!("NOT RUN: two nginx stream proxies (nginx with its stream module is not here)");
    }
    if rathole.is_some() {
        compared("both halves", ("ours", &ours[1..]), ("rathole with TLS", &holed[1..]), 1.8);
    } else {
        println!("NOT RUN: rathole with TLS (PIPEOPS_TEST_RATHOLE names no program)");
    }
    if nginx.is_none() && rathole.is_none() {
        said("both halves, ours", &ours[1..]);
    }
}

fn compared(what: &str, (us, ours): (&str, &[Load]), (them, theirs): (&str, &[Load]), budget: f64) {
    let (rate, tail) = said(&format!("{what}, {us}"), ours);
    let (their_rate, their_tail) = said(&format!("{what}, {them}"), theirs);
    println!(
        "{what}: {us} {rate:.0} requests/s, p99 {tail:.1} ms; {them} {their_rate:.0}, {their_tail:.1} ms; ratio {:.2} (budget {budget})",
        rate / their_rate
    );
}
