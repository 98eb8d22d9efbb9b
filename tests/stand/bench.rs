//! The real executable under load, from a Runner's side: what it carries, what it costs, what it
//! leaves behind.

use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::{Body, Bytes};
use axum::extract::Request;
use axum::response::{IntoResponse, Response};
use hyper_util::rt::TokioIo;
use pipeops::base::secret::Secret;
use pipeops::frp::server::{Server, ServerConfig};
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::fake_control_plane::{FRP_TOKEN, FakeControlPlane, TOKEN, identity, listen};

pub(crate) struct Rig {
    control_plane: Arc<FakeControlPlane>,
    frps: Server,
    agent: Agent,
    id: String,
}

/// A real `pipeops run` in a directory of its own, ended with the bench.
pub(crate) struct Agent {
    child: Child,
    dir: tempfile::TempDir,
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Agent {
    pub(crate) async fn start(pipeops: &str, control_plane: &Arc<FakeControlPlane>) -> Agent {
        let control = control_plane.clone().serve().await;
        Agent::start_at(pipeops, control).await
    }

    async fn start_at(pipeops: &str, control: std::net::SocketAddr) -> Agent {
        let kube = listen(axum::Router::new().fallback(kube), ()).await;
        let dir = tempfile::tempdir().unwrap();
        let put = |path: &str, text: String| {
            let path = dir.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        put("etc/machine-id", "0123456789abcdef0123456789abcdef\n".into());
        put(
            "etc/pipeops/agent.toml",
            format!(
                "control-plane-url = \"http://{control}\"\nstreams-per-caller = 4096\nstreams = 4096\nwatches-per-caller = 4096\nwatches = 4096\n"
            ),
        );
        let kubeconfig = json!({"apiVersion": "v1", "kind": "Config", "current-context": "c",
            "clusters": [{"name": "l", "cluster": {"server": format!("http://{kube}")}}],
            "contexts": [{"name": "c", "context": {"cluster": "l", "user": "u"}}], "users": [{"name": "u", "user": {"token": "t"}}]});
        put("run/pipeops-credential/kubeconfig", kubeconfig.to_string());
        let child = Command::new(pipeops)
            .args(["run", "--root", dir.path().to_str().unwrap()])
            .env("AGENT_TOKEN", TOKEN)
            .env("LOG_LEVEL", "error")
            .env("MALLOC_ARENA_MAX", "1")
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        Agent { child, dir }
    }

    /// Tasks that live in it, as its metrics say.
    fn tasks(&self) -> usize {
        use std::io::{Read as _, Write as _};
        let mut stream =
            std::os::unix::net::UnixStream::connect(self.dir.path().join("run/pipeops/agent.sock"))
                .unwrap();
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        text.lines().find_map(|l| l.strip_prefix("pipeops_tasks ")?.trim().parse().ok()).unwrap()
    }
}

/// 52 bytes of JSON, or as many bytes as the query says.
pub(crate) async fn kube(request: Request) -> Response {
    let query = request.uri().query().unwrap_or_default();
    if let Some(n) = query.strip_prefix("bulk=") {
        let piece = Bytes::from(vec![b'x'; 64 * 1024]);
        let pieces = n.parse::<u64>().unwrap() / (64 * 1024);
        return Response::new(Body::from_stream(futures_util::stream::iter(
            (0..pieces).map(move |_| Ok::<_, std::io::Error>(piece.clone())),
        )));
    }
    if query.contains("watch=") {
        return Response::new(Body::from_stream(futures_util::stream::pending::<
            Result<Bytes, std::io::Error>,
        >()));
    }
    axum::Json(
        json!({"gitVersion": "v1.36.2+k3s1", "metadata": {"resourceVersion": "7"}, "items": []}),
    )
    .into_response()
}

impl Rig {
    pub(crate) async fn new(pipeops: &str) -> Rig {
        let (tls, pin) = identity();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let config = ServerConfig {
            token: Secret::new(FRP_TOKEN),
            tls: Some(tls),
            tcp_mux: true,
            tcp_bind: None,
            heartbeat: Duration::from_secs(30),
            authorizer: None,
        };
        let frps = Server::new(config);
        tokio::spawn({
            let frps = frps.clone();
            async move { frps.serve(listener, CancellationToken::new()).await }
        });
        let control_plane = Arc::new(FakeControlPlane::new(address, &pin));
        let control = control_plane.clone().serve().await;
        let agent = Agent::start_at(pipeops, control).await;
        let mut rig = Rig { control_plane, frps, agent, id: String::new() };
        rig.up().await;
        rig.id =
            rig.control_plane.calls("/register")[0].2["agent"]["id"].as_str().unwrap().to_owned();
        tokio::time::sleep(Duration::from_secs(2)).await;
        rig
    }

    async fn up(&self) {
        let begun = Instant::now();
        while self.frps.proxies() != ["agent"] {
            assert!(begun.elapsed() < Duration::from_secs(60), "the tunnel does not come up");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// A token of the role deployer.
    pub(crate) fn deployer(&self) -> String {
        self.control_plane.token(&self.id, "deployer", None)
    }

    /// Memory of the agent.
    pub(crate) fn rss_kib(&self) -> f64 {
        self.proc(self.agent.child.id()).0 as f64
    }

    /// What the agent has used of a processor.
    pub(crate) fn cpu_seconds(&self) -> f64 {
        self.proc(self.agent.child.id()).1
    }

    fn proc(&self, pid: u32) -> (u64, f64, usize) {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let rss = status
            .lines()
            .find(|l| l.starts_with("VmRSS"))
            .unwrap()
            .split_whitespace()
            .nth(1)
            .unwrap()
            .parse()
            .unwrap();
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
        let ticks: f64 = fields[11].parse::<f64>().unwrap() + fields[12].parse::<f64>().unwrap();
        (rss, ticks / 100.0, std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count())
    }

    /// One keep-alive HTTP/1.1 connection through the tunnel.
    pub(crate) async fn client(
        &self,
    ) -> hyper::client::conn::http1::SendRequest<http_body_util::Empty<Bytes>> {
        let io = self
            .control_plane
            .tls(self.frps.dial("agent").await.unwrap(), b"http/1.1")
            .await
            .unwrap();
        let (sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(io)).await.unwrap();
        tokio::spawn(connection);
        sender
    }
}

pub(crate) struct Load {
    requests: u64,
    seconds: f64,
    p50: Duration,
    p99: Duration,
}

impl Load {
    pub(crate) fn rate(&self) -> f64 {
        self.requests as f64 / self.seconds
    }

    pub(crate) fn seconds(&self) -> f64 {
        self.seconds
    }

    pub(crate) fn p99_ms(&self) -> f64 {
        self.p99.as_secs_f64() * 1000.0
    }
}

/// NaN where nothing was measured.
pub(crate) fn median(mut all: Vec<f64>) -> f64 {
    all.sort_by(f64::total_cmp);
    all.get(all.len() / 2).copied().unwrap_or(f64::NAN)
}

/// `clients` keep-alive callers for `length`.
pub(crate) async fn load<F, R>(
    clients: usize,
    length: Duration,
    connect: F,
    host: &str,
    path: &str,
    token: &str,
) -> Load
where
    F: Fn() -> R,
    R: Future<Output = hyper::client::conn::http1::SendRequest<http_body_util::Empty<Bytes>>>,
{
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..clients {
        let mut sender = connect().await;
        let (host, path, token) = (host.to_owned(), path.to_owned(), token.to_owned());
        tasks.spawn(async move {
            let end = Instant::now() + length;
            let mut times = Vec::new();
            while Instant::now() < end {
                let begun = Instant::now();
                let request = hyper::Request::get(&path)
                    .header("host", &host)
                    .header("authorization", format!("Bearer {token}"));
                sender.ready().await.unwrap();
                let answer = sender
                    .send_request(request.body(http_body_util::Empty::new()).unwrap())
                    .await
                    .unwrap();
                assert!(answer.status().is_success(), "{}", answer.status());
                http_body_util::BodyExt::collect(answer.into_body()).await.unwrap();
                times.push(begun.elapsed());
            }
            times
        });
    }
    let begun = Instant::now();
    let mut times = Vec::new();
    while let Some(done) = tasks.join_next().await {
        times.extend(done.unwrap());
    }
    let seconds = begun.elapsed().as_secs_f64();
    times.sort();
    Load {
        requests: times.len() as u64,
        seconds,
        p50: times[times.len() / 2],
        p99: times[times.len() * 99 / 100],
    }
}

/// Bytes a second of one download.
pub(crate) async fn bulk(rig: &Rig, bytes: u64, token: &str) -> f64 {
    download(|| rig.client(), "a", BULK, bytes, token).await
}

/// What the API in miniature answers with as many bytes as are asked for.
pub(crate) const BULK: &str = "/k8s/api/v1/namespaces/beta/pods/p/log";

/// Bytes a second of one download, its connection included.
pub(crate) async fn download<F, R>(
    connect: F,
    host: &str,
    path: &str,
    bytes: u64,
    token: &str,
) -> f64
where
    F: Fn() -> R,
    R: Future<Output = hyper::client::conn::http1::SendRequest<http_body_util::Empty<Bytes>>>,
{
    let begun = Instant::now();
    let mut sender = connect().await;
    let request = hyper::Request::get(format!("{path}?bulk={bytes}")).header("host", host);
    let request = request
        .header("authorization", format!("Bearer {token}"))
        .body(http_body_util::Empty::new())
        .unwrap();
    let answer = sender.send_request(request).await.unwrap();
    assert!(
        answer.status().is_success(),
        "{host}: {:?}",
        http_body_util::BodyExt::collect(answer.into_body()).await.unwrap().to_bytes()
    );
    let mut body = answer.into_body();
    let mut got = 0_u64;
    while let Some(frame) = http_body_util::BodyExt::frame(&mut body).await {
        got += frame.unwrap().data_ref().map_or(0, Bytes::len) as u64;
    }
    assert_eq!(got, bytes / 65536 * 65536);
    got as f64 / begun.elapsed().as_secs_f64()
}

pub(crate) async fn bench(pipeops: &str, parts: &[&str]) {
    let rig = Rig::new(pipeops).await;
    let token = rig.deployer();
    let wanted = |part: &str| parts.is_empty() || parts.contains(&part);
    if wanted("idle") {
        idle(&rig).await;
    }
    if wanted("held") {
        held(&rig, &token).await;
    }
    if wanted("requests") {
        requests(&rig, &token).await;
    }
    if wanted("bulk") {
        mixed(&rig, &token).await;
    }
}

async fn idle(rig: &Rig) {
    let pid = rig.agent.child.id();
    let (rss, cpu, _) = rig.proc(pid);
    tokio::time::sleep(Duration::from_secs(10)).await;
    let idle = rig.proc(pid).1 - cpu;
    println!(
        "idle                     RSS {rss} kB, {:.2} % of a core (budgets 12288 kB, 0.1 %)",
        idle * 10.0
    );
}

async fn requests(rig: &Rig, token: &str) {
    let pid = rig.agent.child.id();
    let second = Duration::from_secs(1);
    let mut ours = Vec::new();
    let mut theirs = Vec::new();
    // kubectl's own way to the same API, for the cost of a request
    let socket = rig.agent.dir.path().join("kubectl.sock");
    let kubeconfig = rig.agent.dir.path().join("run/pipeops-credential/kubeconfig");
    let mut proxy = Command::new("kubectl")
        .args([
            "proxy",
            "--kubeconfig",
            kubeconfig.to_str().unwrap(),
            "--unix-socket",
            socket.to_str().unwrap(),
        ])
        .stdout(Stdio::null())
        .spawn()
        .ok();
    for _ in 0..100 {
        if socket.exists() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    if !socket.exists() {
        println!("NOT RUN: kubectl proxy (there is no kubectl)");
    }
    for round in 0..6 {
        let before = rig.proc(pid).1;
        let run = load(
            50,
            3 * second,
            || rig.client(),
            "localhost",
            "/k8s/api/v1/namespaces/beta/pods",
            token,
        )
        .await;
        let cost = rig.proc(pid).1 - before;
        if round > 0 {
            ours.push((
                run.requests as f64 / run.seconds,
                run.requests as f64 / cost,
                run.p50,
                run.p99,
            ));
        }
        if let (Some(proxy), true) = (&proxy, socket.exists()) {
            // the program may hand over to another: its children count
            let worker = child_of(proxy.id()).unwrap_or(proxy.id());
            let before = rig.proc(worker).1;
            let connect = || async {
                let stream = tokio::net::UnixStream::connect(&socket).await.unwrap();
                let (sender, connection) =
                    hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
                tokio::spawn(connection);
                sender
            };
            let run =
                load(50, 3 * second, connect, "localhost", "/api/v1/namespaces/beta/pods", token)
                    .await;
            let cost = rig.proc(worker).1 - before;
            if round > 0 {
                theirs.push((
                    run.requests as f64 / run.seconds,
                    run.requests as f64 / cost,
                    run.p50,
                    run.p99,
                ));
            }
        }
    }
    let median = |list: &[(f64, f64, Duration, Duration)],
                  of: fn(&(f64, f64, Duration, Duration)) -> f64| {
        median(list.iter().map(of).collect())
    };
    println!("raw: ours {ours:?}\nraw: kubectl proxy {theirs:?}");
    println!(
        "50 callers, through FRP server half, TLS twice, JWT, audit: {:.0} requests/s, p99 {:.1} ms, {:.0} requests a CPU second of the agent",
        median(&ours, |r| r.0),
        median(&ours, |r| r.3.as_secs_f64() * 1000.0),
        median(&ours, |r| r.1)
    );
    if !theirs.is_empty() {
        println!(
            "kubectl proxy on a unix socket: {:.0} requests/s, {:.0} requests a CPU second; ratio {:.2} (budget 2.2)",
            median(&theirs, |r| r.0),
            median(&theirs, |r| r.1),
            median(&ours, |r| r.1) / median(&theirs, |r| r.1)
        );
    }
    // where the agent's time goes: each way does a little more than the one before
    let mut former = 0.0;
    for (what, path) in [
        ("two layers of TLS, multiplexer, HTTP", "/healthz"),
        ("and JWT and audit", "/version"),
        ("and rights, headers, and a request to the API", "/k8s/api/v1/namespaces/beta/pods"),
    ] {
        let before = rig.proc(pid).1;
        let run = load(50, 3 * second, || rig.client(), "localhost", path, token).await;
        let cost = (rig.proc(pid).1 - before) * 1e6 / run.requests as f64;
        println!(
            "  {path}: {cost:.0} us of CPU a request, {:.0} more than the line above: {what}",
            cost - former
        );
        former = cost;
    }
    if let Some(proxy) = &mut proxy {
        let _ = proxy.kill();
        let _ = proxy.wait();
    }
}

async fn mixed(rig: &Rig, token: &str) {
    let pid = rig.agent.child.id();
    let second = Duration::from_secs(1);
    let quiet = load(
        50,
        3 * second,
        || rig.client(),
        "localhost",
        "/k8s/api/v1/namespaces/beta/pods",
        token,
    )
    .await;
    let before = rig.proc(pid).0;
    let mut rates = Vec::new();
    for _ in 0..5 {
        rates.push(bulk(rig, 256 << 20, token).await);
    }
    println!("one bulk stream: {:.0} MB/s", median(rates) / 1e6);
    let (_, small) = tokio::join!(
        bulk(rig, 1 << 30, token),
        load(
            50,
            3 * second,
            || rig.client(),
            "localhost",
            "/k8s/api/v1/namespaces/beta/pods",
            token
        )
    );
    println!(
        "50 callers beside 1 GiB: p99 {:.1} ms, alone {:.1} ms, ratio {:.1} (budget 2); memory {} kB more (budget 8192)",
        small.p99.as_secs_f64() * 1000.0,
        quiet.p99.as_secs_f64() * 1000.0,
        small.p99.as_secs_f64() / quiet.p99.as_secs_f64(),
        rig.proc(pid).0.saturating_sub(before)
    );
}

async fn held(rig: &Rig, token: &str) {
    let empty = rig.rss_kib();
    let [secured, watched] = hold(rig, token).await;
    println!(
        "1,000 held streams: RSS {empty} kB without, {secured} kB with TLS and no request, {watched} kB each with a watch on a connection of its own (budget 32768)"
    );
}

/// The agent's memory in KiB with a thousand connections: with TLS and no request, with a watch each.
pub(crate) async fn hold(rig: &Rig, token: &str) -> [f64; 2] {
    let mut held = Vec::new();
    for _ in 0..1000 {
        held.push(
            rig.control_plane
                .tls(rig.frps.dial("agent").await.unwrap(), b"http/1.1")
                .await
                .unwrap(),
        );
    }
    let secured = rig.rss_kib();
    for io in &mut held {
        io.write_all(format!("GET /k8s/api/v1/pods?watch=1 HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {token}\r\n\r\n").as_bytes()).await.unwrap();
        io.flush().await.unwrap();
        io.read_exact(&mut [0; 12]).await.unwrap();
    }
    [secured, rig.rss_kib()]
}

fn child_of(pid: u32) -> Option<u32> {
    std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))
        .ok()?
        .split_whitespace()
        .next()?
        .parse()
        .ok()
}

/// Exit code: 0 when memory and descriptors are where they were.
pub(crate) async fn soak(pipeops: &str, n: u32) -> i32 {
    let rig = Rig::new(pipeops).await;
    let pid = rig.agent.child.id();
    let mut wrong = 0;
    let mut verdict =
        |what: &str, before: (u64, f64, usize), after: (u64, f64, usize), tasks: (usize, usize)| {
            let fine = after.0 <= before.0 + 2048 && after.2 <= before.2 && tasks.1 <= tasks.0;
            let word = if fine { "ok    " } else { "WRONG " };
            println!(
                "{word} {what}: RSS {} → {} kB, descriptors {} → {}, tasks at most {} → {}",
                before.0, after.0, before.2, after.2, tasks.0, tasks.1
            );
            wrong += i32::from(!fine);
        };
    let aborted = async |n: u32| {
        for _ in 0..n {
            let token = rig.control_plane.token(&rig.id, "deployer", None);
            let mut io = rig
                .control_plane
                .tls(rig.frps.dial("agent").await.unwrap(), b"http/1.1")
                .await
                .unwrap();
            let head = format!(
                "GET /k8s/api/v1/namespaces/beta/pods/p/log?bulk=104857600 HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {token}\r\n\r\n"
            );
            io.write_all(head.as_bytes()).await.unwrap();
            io.flush().await.unwrap();
            io.read_exact(&mut [0; 1000]).await.unwrap();
        }
    };
    let reconnects = async |n: u32| {
        for _ in 0..n {
            rig.frps.end_sessions();
            while !rig.frps.proxies().is_empty() {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
            rig.up().await;
        }
    };
    aborted(50).await;
    reconnects(3).await;
    tokio::time::sleep(Duration::from_secs(10)).await;
    let (before, tasks) = (rig.proc(pid), rig.agent.tasks());
    let begun = Instant::now();
    aborted(n).await;
    tokio::time::sleep(Duration::from_secs(10)).await;
    let what = format!("{n} aborted downloads in {:.0} s", begun.elapsed().as_secs_f64() - 10.0);
    verdict(&what, before, rig.proc(pid), (tasks, rig.agent.tasks()));
    // each waits as the agent waits, up to half a minute: a few of them
    let few = (n / 200).max(3);
    let (before, tasks) = (rig.proc(pid), rig.agent.tasks());
    let begun = Instant::now();
    reconnects(few).await;
    tokio::time::sleep(Duration::from_secs(10)).await;
    let what = format!(
        "{few} sessions ended by the server in {:.0} s",
        begun.elapsed().as_secs_f64() - 10.0
    );
    verdict(&what, before, rig.proc(pid), (tasks, rig.agent.tasks()));
    let here = std::process::id();
    let client = Reconnecting::new(&rig);
    client.change(50).await;
    tokio::time::sleep(Duration::from_secs(10)).await;
    let alive = || tokio::runtime::Handle::current().metrics().num_alive_tasks();
    let (before, tasks) = (rig.proc(here), alive());
    let begun = Instant::now();
    client.change(n).await;
    tokio::time::sleep(Duration::from_secs(10)).await;
    let what = format!(
        "{n} reconnects of client and server in this process in {:.0} s",
        begun.elapsed().as_secs_f64() - 10.0
    );
    // connections of the rig's own servers come and go here too; a leak would be one a round
    let some = usize::try_from(n / 100).unwrap();
    verdict(&what, before, rig.proc(here), (tasks + some, alive()));
    wrong
}

/// A client in this process: new settings make it connect anew at once, without the waits between
/// tries.
struct Reconnecting {
    settings: tokio::sync::watch::Sender<Option<pipeops::frp::TunnelConfig>>,
    status: tokio::sync::watch::Receiver<pipeops::frp::TunnelStatus>,
    base: pipeops::frp::TunnelConfig,
}

impl Reconnecting {
    fn new(rig: &Rig) -> Reconnecting {
        use pipeops::frp::client::Client;
        use pipeops::frp::{TunnelConfig, TunnelState, TunnelStatus};
        let mut base: TunnelConfig =
            serde_json::from_value(rig.control_plane.config.lock().unwrap()["tunnel"].clone())
                .unwrap();
        base.proxies[0].name = "here".into();
        let (settings, receiver) = tokio::sync::watch::channel(Some(base.clone()));
        let (publish, status) = tokio::sync::watch::channel(TunnelStatus {
            state: TunnelState::Off,
            reason: String::new(),
            since: tokio::time::Instant::now(),
        });
        let (run_ids, mut kept) = tokio::sync::mpsc::channel(4);
        let (work_connections, mut works) = tokio::sync::mpsc::channel(4);
        tokio::spawn(async move { while kept.recv().await.is_some() {} });
        tokio::spawn(async move { while works.recv().await.is_some() {} });
        let client = Client {
            hostname: "here".into(),
            allow_insecure: false,
            proxied: false,
            settings: receiver,
            publish,
            run_ids,
            work_connections,
            drain: CancellationToken::new(),
            stop: CancellationToken::new(),
        };
        tokio::spawn(client.run(String::new()));
        Reconnecting { settings, status, base }
    }

    async fn change(&self, n: u32) {
        let mut status = self.status.clone();
        for round in 0..n {
            let up = |s: &pipeops::frp::TunnelStatus| s.state == pipeops::frp::TunnelState::Up;
            let since = status.wait_for(up).await.unwrap().since;
            self.settings.send_replace(Some(pipeops::frp::TunnelConfig {
                pool_count: u16::try_from(round % 3).unwrap(),
                ..self.base.clone()
            }));
            status.wait_for(|s| up(s) && s.since > since).await.unwrap();
        }
    }
}
