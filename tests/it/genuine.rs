//! Genuine frp, five generations of it, on either side of ours.

use std::path::Path;
use std::time::{Duration, Instant};

use futures_util::{FutureExt as _, StreamExt as _};
use pipeops::base::secret::Secret;
use pipeops::base::trust::Pin;
use pipeops::frp::client::{WorkConnection, visit};
use pipeops::frp::dial::Dialer;
use pipeops::frp::{Proxy, ProxyKind, TunnelAuth, TunnelConfig, TunnelState, TunnelTls};
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;

use crate::control_plane::{ControlPlane, SimulatedAgent, certificate};
use crate::fake_control_plane::{free_port, identity};
use crate::generations::Release;
use crate::tunnel::{Frpc, Frps, TOKEN, echo, round_trip, try_round_trip};
use crate::world::serve_kube;

/// For a program that starts; the machine may be busy with other tests.
const TIMEOUT: Duration = Duration::from_secs(60);

/// More than all buffers on a way through frps hold, bytes.
const PAUSED: u64 = 32_000_000;

/// Settings of an frps.
fn frps_settings(
    bind: u16,
    vhost: u16,
    tcp_mux: bool,
    certificate: Option<(&Path, &Path)>,
) -> String {
    let tls = certificate.map(|(crt, key)| {
        format!(
            "transport.tls.certFile = \"{}\"\ntransport.tls.keyFile = \"{}\"\n",
            crt.display(),
            key.display()
        )
    });
    format!(
        "bindAddr = \"127.0.0.1\"\nbindPort = {bind}\nvhostHTTPPort = {vhost}\nauth.method = \"token\"\nauth.token = \"{TOKEN}\"\n\
         transport.tcpMux = {tcp_mux}\n{}",
        tls.unwrap_or_default()
    )
}

/// Settings of a client with a tcp proxy on `remote`, an stcp proxy `s` and its visitor, before
/// what echoes.
fn frpc_settings(
    port: u16,
    (remote, visitor, echoing): (u16, u16, u16),
    tcp_mux: bool,
    with_tls: bool,
) -> String {
    format!(
        "log.level = \"trace\"\nserverAddr = \"127.0.0.1\"\nserverPort = {port}\nauth.method = \"token\"\nauth.token = \"{TOKEN}\"\n\
         transport.tcpMux = {tcp_mux}\ntransport.tls.enable = {with_tls}\n{}\
         [[proxies]]\nname = \"t\"\ntype = \"tcp\"\nlocalIP = \"127.0.0.1\"\nlocalPort = {echoing}\nremotePort = {remote}\n\
         transport.useEncryption = true\ntransport.useCompression = true\n\
         [[proxies]]\nname = \"s\"\ntype = \"stcp\"\nsecretKey = \"sk\"\nlocalIP = \"127.0.0.1\"\nlocalPort = {echoing}\n\
         [[visitors]]\nname = \"v\"\ntype = \"stcp\"\nserverName = \"s\"\nsecretKey = \"sk\"\nbindAddr = \"127.0.0.1\"\nbindPort = {visitor}\n",
        if with_tls { "auth.additionalScopes = [\"HeartBeats\", \"NewWorkConns\"]\n" } else { "" }
    )
}

/// Tells which of many fails.
async fn named(name: String, run: impl Future<Output = ()>) {
    if let Err(failed) = std::panic::AssertUnwindSafe(run).catch_unwind().await {
        println!("FAILED: {name}");
        std::panic::resume_unwind(failed);
    }
}

async fn connected(port: u16, what: &str, dir: &Path) -> TcpStream {
    let begun = Instant::now();
    loop {
        if let Ok(stream) = TcpStream::connect(("127.0.0.1", port)).await {
            return stream;
        }
        let log = || {
            std::fs::read_dir(dir)
                .unwrap()
                .flatten()
                .filter(|e| e.path().extension().is_some_and(|x| x == "log"))
        };
        let texts = || {
            log().map(|e| std::fs::read_to_string(e.path()).unwrap_or_default()).collect::<String>()
        };
        assert!(begun.elapsed() < TIMEOUT, "{what} never listens: {}", texts());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Echoes on tcp and stcp; on http answers as a server does.
fn serve(mut works: mpsc::Receiver<WorkConnection>) {
    tokio::spawn(async move {
        while let Some(mut work) = works.recv().await {
            tokio::spawn(async move {
                if work.kind != ProxyKind::Http {
                    return echo(work.io).await;
                }
                let (mut head, mut byte) = (Vec::new(), [0]);
                while !head.ends_with(b"\r\n\r\n") && work.io.read_exact(&mut byte).await.is_ok() {
                    head.push(byte[0]);
                }
                let answer =
                    b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nheard";
                let _ = work.io.write_all(answer).await;
                let _ = work.io.flush().await;
            });
        }
    });
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Tls {
    Pinned,
    /// The server shows what nobody can know, and is believed.
    Unknown,
    Off,
}

/// Eight pairs of programs at a time: with all of them at once, on two busy cores, frp's own ten
/// seconds for a work connection pass, and a user is turned away.
async fn some_at_once(runs: impl Iterator<Item = impl Future<Output = ()>>) {
    futures_util::stream::iter(runs).for_each_concurrent(8, |run| run).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn our_client_behind_somebody_elses_frps() {
    let (pem, key) = certificate(10);
    let der = rustls_pki_types::pem::PemObject::from_pem_slice(pem.as_bytes())
        .map(|c: rustls_pki_types::CertificateDer<'_>| c.into_owned())
        .unwrap();
    let pin = Pin::from_certificate(&der).unwrap().to_string();
    let all = Release::all("our client behind a genuine frps", "frps");
    let combinations = |release| {
        [Tls::Pinned, Tls::Unknown, Tls::Off]
            .into_iter()
            .flat_map(move |tls| [(release, true, tls), (release, false, tls)])
    };
    let runs = all.iter().flat_map(combinations).map(|(release, tcp_mux, tls)| {
        named(
            format!("{}: tcpMux {tcp_mux}, TLS {tls:?}", release.name),
            behind(release, tcp_mux, tls, (&pem, &key, &pin)),
        )
    });
    some_at_once(runs).await;
}

async fn behind(release: &Release, tcp_mux: bool, tls: Tls, (pem, key, pin): (&str, &str, &str)) {
    let dir = tempfile::tempdir().unwrap();
    let (crt, private) = (dir.path().join("tls.crt"), dir.path().join("tls.key"));
    std::fs::write(&crt, pem).unwrap();
    std::fs::write(&private, key).unwrap();
    let (bind, vhost, remote) = (free_port(), free_port(), free_port());
    let pinned = tls == Tls::Pinned;
    let settings = frps_settings(bind, vhost, tcp_mux, pinned.then_some((&crt, &private)));
    let _frps = release.run("frps", dir.path(), &settings);
    drop(connected(bind, "frps", dir.path()).await);
    let proxy = |name: &str, kind| Proxy {
        name: name.into(),
        kind,
        secret_key: Secret::new("sk"),
        remote_port: remote,
        ..Proxy::default()
    };
    let mut web = proxy("h", ProxyKind::Http);
    web.custom_domains = vec!["agent.test".into()];
    for (use_encryption, use_compression) in [(false, false), (true, true)] {
        let mut config = TunnelConfig {
            server: "127.0.0.1".into(),
            port: bind,
            tcp_mux,
            pool_count: 1,
            tls: TunnelTls {
                enable: tls != Tls::Off,
                pin: pinned.then(|| pin.to_owned()),
                ..TunnelTls::default()
            },
            auth: TunnelAuth { token: Secret::new(TOKEN), ..TunnelAuth::default() },
            proxies: vec![proxy("s", ProxyKind::Stcp), proxy("t", ProxyKind::Tcp), web.clone()],
        };
        for proxy in &mut config.proxies {
            (proxy.use_encryption, proxy.use_compression) = (use_encryption, use_compression);
        }
        let (mut frpc, works) = Frpc::insecure(config.clone(), "", !pinned);
        serve(works);
        frpc.until(TunnelState::Up).await;
        let mut tcp = connected(remote, "the tcp proxy", dir.path()).await;
        round_trip(&mut tcp, 10_000_000).await;
        let mut http = connected(vhost, "the http port", dir.path()).await;
        http.write_all(b"GET / HTTP/1.1\r\nHost: agent.test\r\nConnection: close\r\n\r\n")
            .await
            .unwrap();
        let mut answer = String::new();
        let _ = http.read_to_string(&mut answer).await;
        assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("heard"), "{answer}");
        // many at once, more than a pool holds
        let mut users = tokio::task::JoinSet::new();
        let attempts = if use_compression && release.before(51) { 5 } else { 1 };
        for _ in 0..50 {
            users.spawn(user(remote, attempts));
        }
        while let Some(done) = users.join_next().await {
            done.unwrap();
        }
        // our own visitor; what encrypts the stream is a matter of both its ends
        if !use_encryption {
            let mut tasks = tokio::task::JoinSet::new();
            let connector =
                Dialer::new(&config, !pinned).unwrap().connect(&mut tasks).await.unwrap();
            round_trip(
                &mut visit(&connector, "", "s", &Secret::new("sk")).await.unwrap(),
                1_000_000,
            )
            .await;
            assert!(visit(&connector, "", "s", &Secret::new("wrong")).await.is_err());
        }
        if tls == Tls::Unknown && !use_encryption {
            its_own_key(release, &config, pem).await;
        }
        // a user who reads nothing for longer than it takes to call a peer dead: every window on
        // the way is closed
        let paused = (tls == Tls::Off && !use_encryption).then(async || {
            let (r, mut w) = connected(remote, "the tcp proxy", dir.path()).await.into_split();
            // its half of the stream is kept: the end of one direction is the end of both
            let writes = tokio::spawn(async move {
                tokio::io::copy(&mut tokio::io::repeat(7).take(PAUSED), &mut w).await.map(|_| w)
            });
            (r, writes)
        });
        let mut paused = futures_util::future::OptionFuture::from(paused).await;
        // pings are answered for longer than that too
        tokio::time::sleep(Duration::from_secs(if use_encryption { 0 } else { 14 })).await;
        if let Some((paused, _)) = &mut paused {
            assert_eq!(
                tokio::io::copy(&mut paused.take(PAUSED), &mut tokio::io::sink()).await.unwrap(),
                PAUSED
            );
        }
        assert_eq!(frpc.until(TunnelState::Up).await, "");
        println!(
            "{}: tcpMux {tcp_mux}, TLS {tls:?}, encryption and compression {use_encryption}: tcp, http, stcp carried",
            release.name
        );
    }
}

/// One of many users at once. More than one attempt is for a fault of the peer itself: with
/// compression, frp 0.34.3 gives the reader and writer of a connection that ends to the next one
/// while they are still in use, and so breaks somebody's stream (fatedier/golib 1f870741e185,
/// `io/io.go`, `WithCompression`; later ones do not).
async fn user(port: u16, attempts: u32) {
    for attempt in 1..=attempts {
        let mut io = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
        match try_round_trip(&mut io, 10_000).await {
            Ok(()) => return,
            Err(e) if attempt < attempts => println!(
                "a fault of frp 0.34.3 itself, with compression: a user's stream ends: {e}"
            ),
            Err(e) => panic!("one of many users at once, attempt {attempt}: {e}"),
        }
    }
}

/// A certificate that frps makes for itself at its start: nobody is proven by it, and the reason
/// says so; a pin of it holds till the next start, unless it is none that can be checked.
async fn its_own_key(release: &Release, config: &TunnelConfig, pem: &str) {
    let refused = async |tls: TunnelTls| {
        let mut config = config.clone();
        config.tls = tls;
        Frpc::insecure(config, "", false).0.until(TunnelState::Waiting).await
    };
    let reason = refused(TunnelTls { ca_pem: Some(pem.to_owned()), ..config.tls.clone() }).await;
    assert!(reason.starts_with("tls_untrusted"), "{reason}");
    assert_eq!(release.before(65), reason.contains("makes for itself"), "{reason}");
    let wrong = Some(format!("sha256:{}=", "A".repeat(43)));
    let reason = refused(TunnelTls { pin: wrong, ..config.tls.clone() }).await;
    let shown = reason
        .split_whitespace()
        .find(|word| word.starts_with("sha256:"))
        .map(|word| word.trim_end_matches(',').to_owned());
    let mut pinned = config.clone();
    pinned.tls.pin = Some(shown.unwrap_or_else(|| panic!("it shows no key: {reason}")));
    // names that are open already are another's; this one only wants to be let in
    pinned.proxies.clear();
    let mut frpc = Frpc::insecure(pinned, "", false).0;
    // 1024 bits, until 0.36 or so
    let weak = release.before(36);
    let reason = frpc.until(if weak { TunnelState::Waiting } else { TunnelState::Up }).await;
    assert_eq!(weak, reason.starts_with("tls_key"), "{reason}");
    println!(
        "{}: tcpMux {}: the key that it made for itself, pinned: {}",
        release.name,
        config.tcp_mux,
        if weak { &reason } else { "let in" }
    );
}

/// What a client is told that opens the tcp proxy `t`.
fn one_proxy(port: u16, tcp_mux: bool, remote_port: u16) -> TunnelConfig {
    TunnelConfig {
        server: "127.0.0.1".into(),
        port,
        tcp_mux,
        pool_count: 1,
        auth: TunnelAuth { token: Secret::new(TOKEN), ..TunnelAuth::default() },
        proxies: vec![Proxy {
            name: "t".into(),
            kind: ProxyKind::Tcp,
            remote_port,
            ..Proxy::default()
        }],
        ..TunnelConfig::default()
    }
}

/// One that wants every message proven, is killed, and comes back; what it refuses has the state
/// that it should.
#[tokio::test(flavor = "multi_thread")]
async fn a_genuine_frps_is_restarted_and_refuses() {
    let all = Release::all("a genuine frps that is restarted and refuses", "frps");
    futures_util::future::join_all(
        all.iter().map(|release| named(release.name.clone(), restarted_and_refuses(release))),
    )
    .await;
}

async fn restarted_and_refuses(release: &Release) {
    let (bind, remote, dir) = (free_port(), free_port(), tempfile::tempdir().unwrap());
    let settings = format!(
        "bindAddr = \"127.0.0.1\"\nbindPort = {bind}\nauth.token = \"{TOKEN}\"\nauth.additionalScopes = [\"HeartBeats\", \"NewWorkConns\"]\n\
             transport.heartbeatTimeout = 10\n"
    );
    let frps = release.run("frps", dir.path(), &settings);
    drop(connected(bind, "frps", dir.path()).await);
    let config = one_proxy(bind, true, remote);
    let (mut frpc, works) = Frpc::insecure(config.clone(), "", true);
    serve(works);
    frpc.until(TunnelState::Up).await;
    let run_id = frpc.run_id().await;
    let refused = async |change: &dyn Fn(&mut TunnelConfig), state| {
        let mut config = config.clone();
        change(&mut config);
        Frpc::insecure(config, "", true).0.until(state).await
    };
    let reason = refused(&|c| c.auth.token = Secret::new("wrong"), TunnelState::Unauthorized).await;
    assert!(reason.contains("token"), "{reason}");
    let reason = refused(&|_| (), TunnelState::Conflict).await;
    assert!(reason.contains("already"), "{reason}");
    let reason = refused(&|c| c.proxies[0].name = "another".into(), TunnelState::Conflict).await;
    assert!(reason.contains("already used"), "{reason}");
    // longer than it hears nothing
    tokio::time::sleep(Duration::from_secs(14)).await;
    assert_eq!(frpc.until(TunnelState::Up).await, "");
    drop(frps);
    frpc.until(TunnelState::Waiting).await;
    let frps = release.run("frps", dir.path(), &settings);
    frpc.until(TunnelState::Up).await;
    round_trip(&mut connected(remote, "the tcp proxy", dir.path()).await, 1_000_000).await;
    let said = frps.log();
    assert!(said.contains(&run_id), "another run id: {said}");
    println!("  {}: scopes proven, refusals told apart, back with its run id", release.name);
}

/// A way to `to` that can break without either end being told: what is open then carries nothing
/// any more, and is never closed.
async fn breakable(to: u16, broken: tokio::sync::watch::Receiver<u32>) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        let mut held = Vec::new();
        while let Ok((mut client, _)) = listener.accept().await {
            let mut broken = broken.clone();
            broken.mark_unchanged();
            let server = TcpStream::connect(("127.0.0.1", to)).await;
            held.push(tokio::spawn(async move {
                let mut server = server.unwrap();
                tokio::select! {
                    _ = tokio::io::copy_bidirectional(&mut client, &mut server) => {}
                    _ = broken.changed() => std::future::pending().await,
                }
            }));
        }
    });
    port
}

/// frps 0.65 to 0.70 may never answer a login with the run id of a session that it does not know to
/// be dead (fatedier/frp issue 5391).
#[tokio::test(flavor = "multi_thread")]
async fn back_at_a_genuine_frps_that_still_believes_in_the_former_session() {
    let all = Release::all("a genuine frps that believes in a dead session", "frps");
    let runs = all.iter().flat_map(|release| [(release, true), (release, false)]);
    let runs = runs.map(|(release, tcp_mux)| {
        named(format!("{}: tcpMux {tcp_mux}", release.name), believes_in_the_dead(release, tcp_mux))
    });
    futures_util::future::join_all(runs).await;
}

async fn believes_in_the_dead(release: &Release, tcp_mux: bool) {
    let (bind, remote, dir) = (free_port(), free_port(), tempfile::tempdir().unwrap());
    let settings = format!(
        "bindAddr = \"127.0.0.1\"\nbindPort = {bind}\nauth.token = \"{TOKEN}\"\ntransport.tcpMux = {tcp_mux}\n"
    );
    let _frps = release.run("frps", dir.path(), &settings);
    drop(connected(bind, "frps", dir.path()).await);
    let (breaks, broken) = tokio::sync::watch::channel(0);
    let config = one_proxy(breakable(bind, broken).await, tcp_mux, remote);
    let (mut frpc, works) = Frpc::insecure(config, "", true);
    serve(works);
    frpc.until(TunnelState::Up).await;
    breaks.send_modify(|n| *n += 1);
    let begun = Instant::now();
    let noticed = frpc.until_not(TunnelState::Up).await;
    let noticed = (begun.elapsed().as_secs_f32(), noticed);
    loop {
        // names and ports are free only when the server misses the former session
        assert!(begun.elapsed() < Duration::from_secs(180), "never back: {:?}", frpc.status());
        if frpc.status().state == TunnelState::Up
            && try_round_trip(&mut connected(remote, "the tcp proxy", dir.path()).await, 1000)
                .await
                .is_ok()
        {
            break;
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    println!(
        "  {}: tcpMux {tcp_mux}: noticed after {:.1} s ({}), back after {:.1} s",
        release.name,
        noticed.0,
        noticed.1,
        begun.elapsed().as_secs_f32()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn somebody_elses_frpc_before_our_server() {
    let all = Release::all("a genuine frpc before our server", "frpc");
    let runs = all.iter().flat_map(|release| {
        [(true, true), (false, true), (true, false), (false, false)]
            .map(|(mux, tls)| (release, mux, tls))
    });
    let runs = runs.map(|(release, tcp_mux, tls)| {
        named(
            format!("{}: tcpMux {tcp_mux}, TLS {tls}", release.name),
            before(release, tcp_mux, tls),
        )
    });
    some_at_once(runs).await;
}

/// frpc turns away whoever comes before it has heard that the proxy is open.
async fn carries(remote: u16, dir: &Path) {
    let begun = Instant::now();
    while let Err(e) = try_round_trip(&mut connected(remote, "the tcp proxy", dir).await, 1).await {
        assert!(begun.elapsed() < TIMEOUT, "the tcp proxy never carries: {e}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn before(release: &Release, tcp_mux: bool, with_tls: bool) {
    let (tls, _) = identity();
    let frps = Frps::with(with_tls.then_some(&tls), tcp_mux, 0).await;
    let dir = tempfile::tempdir().unwrap();
    let local = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let echoing = local.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((stream, _)) = local.accept().await {
            tokio::spawn(echo(Box::new(stream)));
        }
    });
    let (remote, visitor) = (free_port(), free_port());
    let settings =
        frpc_settings(frps.address.port(), (remote, visitor, echoing), tcp_mux, with_tls);
    let mut frpc = release.run("frpc", dir.path(), &settings);
    carries(remote, dir.path()).await;
    round_trip(&mut connected(remote, "the tcp proxy", dir.path()).await, 10_000_000).await;
    round_trip(&mut frps.server.dial("s").await.unwrap(), 1_000_000).await;
    round_trip(&mut connected(visitor, "the visitor", dir.path()).await, 1_000_000).await;
    // several at once, through compression, and it stays
    let attempts = if release.before(51) { 5 } else { 1 };
    for _ in 0..3 {
        let mut users = tokio::task::JoinSet::new();
        for _ in 0..20 {
            users.spawn(user(remote, attempts));
        }
        while let Some(done) = users.join_next().await {
            done.unwrap();
        }
    }
    // killed and back where it was
    let at = frps.address.port();
    drop(frps);
    let frps = Frps::with(with_tls.then_some(&tls), tcp_mux, at).await;
    carries(remote, dir.path()).await;
    round_trip(&mut frps.server.dial("s").await.unwrap(), 1_000_000).await;
    assert!(frpc.child.try_wait().unwrap().is_none(), "frpc ended");
    println!(
        "{}: tcpMux {tcp_mux}, TLS {with_tls}: every message proven {with_tls}: tcp, stcp, visitor carried, back when we were killed",
        release.name
    );
}

/// What answers in clear as the control plane does; gives HOST:PORT.
async fn in_clear(control_plane: &ControlPlane) -> String {
    let (client, url) = (control_plane.client.clone(), control_plane.url.clone());
    let relay = async move |request: axum::extract::Request| {
        let (parts, body) = request.into_parts();
        let body = axum::body::to_bytes(body, 1_000_000).await.unwrap();
        let answer = client.post(format!("{url}{}", parts.uri)).body(body).send().await.unwrap();
        (answer.status(), answer.bytes().await.unwrap())
    };
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, axum::Router::new().fallback(relay)).await });
    address.to_string()
}

/// The control plane with somebody's frps: it is the auth plugin, and its gateway a visitor.
#[tokio::test(flavor = "multi_thread")]
async fn a_control_plane_beside_a_genuine_frps() {
    let (pem, key) = certificate(10);
    let der: rustls_pki_types::CertificateDer<'_> =
        rustls_pki_types::pem::PemObject::from_pem_slice(pem.as_bytes()).unwrap();
    let pin = Pin::from_certificate(&der).unwrap().to_string();
    for release in Release::all("a control plane beside a genuine frps", "frps") {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, text).unwrap();
            path.to_str().unwrap().to_owned()
        };
        let (crt, private, token) =
            (file("tls.crt", &pem), file("tls.key", &key), file("token", TOKEN));
        let address = format!("127.0.0.1:{}", free_port());
        let control_plane = ControlPlane::with(&[
            "--frps",
            &address,
            "--frps-token-file",
            &token,
            "--frps-pin",
            &pin,
        ]);
        // the settings that the verb prints, with what only their owner knows
        let settings =
            control_plane.sandbox.subcommand(&["control-plane", "frps-config"]).ended(0).out;
        let tls = format!(
            "transport.tls.force = true\ntransport.tls.certFile = \"{crt}\"\ntransport.tls.keyFile = \"{private}\""
        );
        // plugins are called over HTTPS from 0.36 on; an older frps needs something that terminates
        // TLS between
        let settings = if release.before(36) {
            settings.replace(&control_plane.url, &in_clear(&control_plane).await)
        } else {
            settings
        };
        let settings = format!("bindAddr = \"127.0.0.1\"\n{settings}")
            .replace("the one in --frps-token-file", TOKEN)
            .replace("transport.tls.force = true", &tls);
        let _frps = release.run("frps", dir.path(), &settings);
        let (_kube, kube) = serve_kube().await;
        let (_agent, cluster) = control_plane.agent(kube).await;
        let bulk = control_plane
            .ask(
                "GET",
                &format!("/clusters/{cluster}/k8s/api/v1/namespaces/beta/pods/bulk/log?n=1048576"),
                &control_plane.admin,
                json!({}),
            )
            .await;
        assert_eq!(bulk.bytes().await.unwrap().len(), 1_048_576);
        control_plane
            .sandbox
            .subcommand(&["control-plane", "cluster", "revoke", &cluster])
            .ended(0);
        assert_eq!(control_plane.version(&cluster).await, 404);
        let way =
            if release.before(36) { " (in clear through a proxy: it knows no https)" } else { "" };
        println!("  {}: plugin asked{way}, gateway through it, revoked", release.name);
    }
}

/// A genuine frpc with what the control plane tells an agent: its own proxy is let in, nobody
/// else's, and it ends when it is revoked.
#[tokio::test(flavor = "multi_thread")]
async fn a_genuine_frpc_before_a_control_plane() {
    for release in Release::all("a genuine frpc before a control plane", "frpc") {
        let (control_plane, dir) = (ControlPlane::with(&[]), tempfile::tempdir().unwrap());
        let (token, _) = control_plane.enrol();
        let agent = SimulatedAgent::new(&control_plane, dir.path(), &token).await;
        let config = control_plane
            .json(
                "GET",
                &format!("/api/v1/agents/{}/config", agent.id),
                &agent.credential,
                json!({}),
            )
            .await;
        let tunnel: TunnelConfig = serde_json::from_value(config["tunnel"].clone()).unwrap();
        let ca = dir.path().join("ca.pem");
        std::fs::write(&ca, control_plane.try_get("/api/v1/ca", "").await.bytes().await.unwrap())
            .unwrap();
        let behind = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let metas: String = tunnel
            .auth
            .metas
            .iter()
            .map(|(k, v)| format!("metadatas.\"{k}\" = {}\n", json!(v)))
            .collect();
        let own = &tunnel.proxies[0];
        let proxy = |name: &str| {
            let (key, port) = (json!(own.secret_key.expose()), behind.local_addr().unwrap().port());
            format!(
                "[[proxies]]\nname = \"{name}\"\ntype = \"stcp\"\nsecretKey = {key}\nlocalIP = \"127.0.0.1\"\nlocalPort = {port}\n"
            )
        };
        let settings = format!(
            "log.level = \"trace\"\nserverAddr = \"127.0.0.1\"\nserverPort = {}\nauth.token = {}\ntransport.tls.enable = true\ntransport.tls.trustedCaFile = \"{}\"\n\
             transport.tls.serverName = \"127.0.0.1\"\n{metas}{}{}",
            tunnel.port,
            json!(tunnel.auth.token.expose()),
            ca.display(),
            proxy(&own.name),
            proxy("another"),
        );
        let frpc = release.run("frpc", dir.path(), &settings);
        let said = async |expected: &str| {
            let begun = Instant::now();
            loop {
                let text = frpc.log();
                if text.contains(expected) {
                    return;
                }
                assert!(begun.elapsed() < TIMEOUT, "it never says `{expected}`: {text}");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        said(&format!("[{}] start proxy success", own.name)).await;
        said("[another] start error").await;
        let clusters = control_plane.clusters().await;
        let cluster = clusters["items"][0]["id"].as_str().unwrap();
        assert_eq!(clusters["items"][0]["tunnel"], "up", "{clusters}");
        // the gateway's hello to the agent arrives behind it
        let path = format!("/clusters/{cluster}/k8s/version");
        let (answer, first) =
            tokio::join!(control_plane.try_get(&path, &control_plane.admin), async {
                let (mut stream, _) = behind.accept().await.unwrap();
                let mut first = [0];
                stream.read_exact(&mut first).await.unwrap();
                first
            });
        assert_eq!((answer.status().as_u16(), first[0]), (503, 0x16));
        control_plane
            .json(
                "POST",
                &format!("/api/v1/clusters/{cluster}/revoke"),
                &control_plane.admin,
                json!({}),
            )
            .await;
        said("this agent may not hold a tunnel here").await;
        println!(
            "  {}: let in by its name alone, reached by the gateway, turned away when it was revoked",
            release.name
        );
    }
}
