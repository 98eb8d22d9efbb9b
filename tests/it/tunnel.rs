//! The FRP client against our own server half, and servers that misbehave.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::fake_control_plane::{free_port, identity};
use pipeops::base::secret::Secret;
use pipeops::frp::client::{Client, WorkConnection};
use pipeops::frp::codec::Io;
use pipeops::frp::server::{Server, ServerConfig};
use pipeops::frp::{
    Proxy, ProxyKind, TunnelAuth, TunnelConfig, TunnelState, TunnelStatus, TunnelTls,
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

pub(crate) const TOKEN: &str = "my_secret_token";

/// A server half on a port of its own; dropped, it is gone with its connections.
pub(crate) struct Frps {
    pub(crate) server: Server,
    pub(crate) address: SocketAddr,
    stop: CancellationToken,
}

impl Frps {
    async fn start(tls: &Arc<rustls::ServerConfig>, tcp_mux: bool, port: u16) -> Frps {
        Frps::with(Some(tls), tcp_mux, port).await
    }

    pub(crate) async fn with(
        tls: Option<&Arc<rustls::ServerConfig>>,
        tcp_mux: bool,
        port: u16,
    ) -> Frps {
        // it may come back where it was
        let port = if port == 0 { free_port() } else { port };
        let listener = loop {
            match TcpListener::bind(("127.0.0.1", port)).await {
                Ok(listener) => break listener,
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        };
        let address = listener.local_addr().unwrap();
        let config = ServerConfig {
            token: Secret::new(TOKEN),
            tls: tls.cloned(),
            tcp_mux,
            tcp_bind: Some([127, 0, 0, 1].into()),
            heartbeat: Duration::from_secs(30),
            authorizer: None,
        };
        let (server, stop) = (Server::new(config), CancellationToken::new());
        tokio::spawn({
            let (server, stop) = (server.clone(), stop.clone());
            async move { server.serve(listener, stop).await }
        });
        Frps { server, address, stop }
    }
}

impl Drop for Frps {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

/// A client whose streams echo what they get.
pub(crate) struct Frpc {
    status: watch::Receiver<TunnelStatus>,
    settings: watch::Sender<Option<TunnelConfig>>,
    run_ids: mpsc::Receiver<String>,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

pub(crate) async fn echo(mut io: Io) {
    let mut buffer = vec![0; 32 * 1024];
    while let Ok(n @ 1..) = io.read(&mut buffer).await {
        if io.write_all(&buffer[..n]).await.is_err() || io.flush().await.is_err() {
            return;
        }
    }
}

impl Frpc {
    pub(crate) fn start(config: TunnelConfig, run_id: &str) -> Frpc {
        let (frpc, mut work) = Frpc::with_work(config, run_id);
        tokio::spawn(async move {
            while let Some(work) = work.recv().await {
                tokio::spawn(echo(work.io));
            }
        });
        frpc
    }

    fn with_work(config: TunnelConfig, run_id: &str) -> (Frpc, mpsc::Receiver<WorkConnection>) {
        Frpc::insecure(config, run_id, false)
    }

    /// One that may believe anybody.
    pub(crate) fn insecure(
        config: TunnelConfig,
        run_id: &str,
        allow_insecure: bool,
    ) -> (Frpc, mpsc::Receiver<WorkConnection>) {
        let (settings, receiver) = watch::channel(Some(config));
        let (publish, status) = watch::channel(TunnelStatus {
            state: TunnelState::Off,
            reason: String::new(),
            since: tokio::time::Instant::now(),
        });
        let (ids, run_ids) = mpsc::channel(8);
        let (work_connections, works) = mpsc::channel(8);
        let stop = CancellationToken::new();
        let client = Client {
            hostname: "vm".into(),
            allow_insecure,
            proxied: false,
            settings: receiver,
            publish,
            run_ids: ids,
            work_connections,
            drain: CancellationToken::new(),
            stop: stop.clone(),
        };
        let task = tokio::spawn(client.run(run_id.into()));
        (Frpc { status, settings, run_ids, stop, task }, works)
    }

    /// Waits for a state; gives the reason.
    pub(crate) async fn until(&mut self, state: TunnelState) -> String {
        self.wait(|s| s.state == state).await.reason
    }

    /// The next one that is given to it.
    pub(crate) async fn run_id(&mut self) -> String {
        self.run_ids.recv().await.unwrap()
    }

    pub(crate) fn status(&self) -> TunnelStatus {
        self.status.borrow().clone()
    }

    /// Waits for any other state; gives the reason.
    pub(crate) async fn until_not(&mut self, state: TunnelState) -> String {
        self.wait(|s| s.state != state).await.reason
    }

    /// Waits for a reason that holds `text`; gives it.
    async fn until_reason(&mut self, text: &str) -> String {
        self.wait(|s| s.reason.contains(text)).await.reason
    }

    async fn wait(&mut self, expected: impl FnMut(&TunnelStatus) -> bool) -> TunnelStatus {
        let found = tokio::time::timeout(Duration::from_secs(40), self.status.wait_for(expected))
            .await
            .map(|s| s.unwrap().clone());
        found.unwrap_or_else(|_| panic!("it stays {:?}", *self.status.borrow()))
    }
}

impl Drop for Frpc {
    fn drop(&mut self) {
        self.stop.cancel();
        self.task.abort();
    }
}

pub(crate) fn settings(address: SocketAddr, tcp_mux: bool, pin: &str) -> TunnelConfig {
    let proxy = |name: &str, kind| Proxy {
        name: name.into(),
        kind,
        secret_key: Secret::new("sk"),
        ..Proxy::default()
    };
    TunnelConfig {
        server: address.ip().to_string(),
        port: address.port(),
        tcp_mux,
        pool_count: 1,
        tls: TunnelTls {
            pin: Some(pin.into()),
            server_name: Some("frps.test".into()),
            ..TunnelTls::default()
        },
        auth: TunnelAuth { token: Secret::new(TOKEN), user: None, metas: BTreeMap::new() },
        proxies: vec![proxy("s", ProxyKind::Stcp), proxy("t", ProxyKind::Tcp)],
    }
}

/// Sends bytes through what echoes them, while they come back.
pub(crate) async fn try_round_trip(
    io: &mut (impl tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin),
    bytes: usize,
) -> std::io::Result<()> {
    let period: Vec<u8> = (0..251).collect();
    let mut sent = period.repeat(bytes / period.len() + 1);
    sent.truncate(bytes);
    let (mut r, mut w) = tokio::io::split(io);
    let mut got = vec![0; bytes];
    let write = async {
        w.write_all(&sent).await?;
        w.flush().await
    };
    let (read, wrote) = tokio::join!(r.read_exact(&mut got), write);
    read.and(wrote)?;
    assert!(got == sent);
    Ok(())
}

#[track_caller]
pub(crate) fn round_trip(
    io: &mut (impl tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin),
    bytes: usize,
) -> impl Future<Output = ()> {
    let caller = std::panic::Location::caller();
    async move {
        try_round_trip(io, bytes)
            .await
            .unwrap_or_else(|e| panic!("{caller}: of {bytes} bytes: {e}"))
    }
}

/// Somebody who scrolls back, or a debugger at a stop: every window on the way is closed for longer
/// than a dead peer is waited for.
#[tokio::test(flavor = "multi_thread")]
async fn a_reader_who_pauses_is_waited_for() {
    const BYTES: u64 = 64_000_000;
    let paused = async |tcp_mux| {
        let (tls, pin) = identity();
        let frps = Frps::start(&tls, tcp_mux, 0).await;
        let mut config = settings(frps.address, tcp_mux, &pin);
        let port = free_port();
        config.proxies.iter_mut().for_each(|p| p.remote_port = port);
        let (mut frpc, mut works) = Frpc::with_work(config, "");
        frpc.until(TunnelState::Up).await;
        tokio::spawn(async move {
            while let Some(mut work) = works.recv().await {
                tokio::spawn(async move {
                    let _ =
                        tokio::io::copy(&mut tokio::io::repeat(7).take(BYTES), &mut work.io).await;
                    let _ = work.io.shutdown().await;
                });
            }
        });
        let mut user = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
        let mut visitor = frps.server.dial("s").await.unwrap();
        tokio::time::sleep(Duration::from_secs(16)).await;
        for (who, io) in [
            ("at a port", &mut user as &mut (dyn tokio::io::AsyncRead + Unpin + Send)),
            ("by the gateway", &mut visitor),
        ] {
            let got = tokio::io::copy(io, &mut tokio::io::sink()).await;
            assert!(matches!(got, Ok(BYTES)), "tcpMux {tcp_mux}, {who}: {got:?}");
        }
    };
    tokio::join!(paused(true), paused(false));
}

/// What waits in the kernel cannot be overtaken, so little waits there: the server is behind a slow
/// line.
#[tokio::test(flavor = "multi_thread")]
async fn a_small_answer_does_not_queue_behind_megabytes_of_a_copy() {
    let (tls, pin) = identity();
    let frps = Frps::start(&tls, true, 0).await;
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    // taken over by what is accepted
    socket.set_recv_buffer_size(32 * 1024).unwrap();
    socket.bind(([127, 0, 0, 1], 0).into()).unwrap();
    let line = socket.listen(8).unwrap();
    let mut config = settings(line.local_addr().unwrap(), true, &pin);
    let server = frps.address;
    tokio::spawn(async move {
        while let Ok((client, _)) = line.accept().await {
            let (mut from_client, mut to_client) = client.into_split();
            let (mut from_server, mut to_server) =
                TcpStream::connect(server).await.unwrap().into_split();
            tokio::spawn(async move { tokio::io::copy(&mut from_server, &mut to_client).await });
            tokio::spawn(async move {
                let mut buffer = vec![0; 16 * 1024];
                while let Ok(n @ 1..) = from_client.read(&mut buffer).await {
                    if to_server.write_all(&buffer[..n]).await.is_err() {
                        break;
                    }
                    tokio::time::sleep(Duration::from_millis(2)).await;
                }
            });
        }
    });
    let port = free_port();
    config.proxies.iter_mut().for_each(|p| p.remote_port = port);
    let (mut frpc, mut works) = Frpc::with_work(config, "");
    frpc.until(TunnelState::Up).await;
    tokio::spawn(async move {
        while let Some(mut work) = works.recv().await {
            tokio::spawn(async move {
                while let Ok(asked) = work.io.read_u8().await {
                    let more = if asked == b'c' { u64::MAX } else { 1 };
                    let _ =
                        tokio::io::copy(&mut tokio::io::repeat(7).take(more), &mut work.io).await;
                    let _ = work.io.flush().await;
                }
            });
        }
    });
    let connected = async || TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    let (mut copy, mut shell) = (connected().await, connected().await);
    // its stream is there before the line is full
    shell.write_u8(b'k').await.unwrap();
    shell.read_u8().await.unwrap();
    copy.write_u8(b'c').await.unwrap();
    let (tell, mut copied) = watch::channel(0_usize);
    tokio::spawn(async move {
        let mut buffer = vec![0; 16 * 1024];
        while let Ok(n @ 1..) = copy.read(&mut buffer).await {
            tell.send_modify(|copied| *copied += n);
        }
    });
    let mut queued = Vec::new();
    for _ in 0..5 {
        let begin = *copied.borrow();
        let before = *copied.wait_for(|now| *now > begin + (3 << 20)).await.unwrap();
        shell.write_u8(b'k').await.unwrap();
        shell.read_u8().await.unwrap();
        queued.push(*copied.borrow() - before);
    }
    queued.sort_unstable();
    assert!(queued[2] < 500 * 1024, "bytes of the copy before the answer: {queued:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_combination_carries_bytes_both_ways() {
    let (tls, pin) = identity();
    for tcp_mux in [true, false] {
        for (custom_first_byte, encryption, compression, user) in [
            (false, false, false, None),
            (true, true, false, Some("u")),
            (false, false, true, None),
            (true, true, true, None),
        ] {
            let frps = Frps::start(&tls, tcp_mux, 0).await;
            let mut config = settings(frps.address, tcp_mux, &pin);
            config.tls.custom_first_byte = custom_first_byte;
            config.auth.user = user.map(str::to_owned);
            let port = free_port();
            for proxy in &mut config.proxies {
                (proxy.use_encryption, proxy.use_compression) = (encryption, compression);
                proxy.remote_port = port;
            }
            let mut frpc = Frpc::start(config, "");
            frpc.until(TunnelState::Up).await;
            let name = if user.is_some() { "u.s" } else { "s" };
            assert_eq!(frps.server.proxies().len(), 2);
            let mut stcp = frps.server.dial(name).await.unwrap();
            round_trip(&mut stcp, 3_000_000).await;
            let mut tcp = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
            round_trip(&mut tcp, 3_000_000).await;
            // and several at once
            let mut users = tokio::task::JoinSet::new();
            for _ in 0..50 {
                let server = frps.server.clone();
                users.spawn(async move {
                    round_trip(&mut server.dial(name).await.unwrap(), 10_000).await
                });
            }
            while let Some(done) = users.join_next().await {
                done.unwrap();
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_server_has_its_client_back_within_a_second_or_so() {
    let (tls, pin) = identity();
    let frps = Frps::start(&tls, true, 0).await;
    let address = frps.address;
    let mut frpc = Frpc::start(settings(address, true, &pin), "");
    frpc.until(TunnelState::Up).await;
    let run_id = frpc.run_id().await;
    assert_eq!(run_id.len(), 32);
    let begun = Instant::now();
    drop(frps);
    let reason = frpc.until(TunnelState::Waiting).await;
    assert!(reason.contains("connection lost"), "{reason}");
    println!("loss noticed after {:?}", begun.elapsed());
    let begun = Instant::now();
    let frps = Frps::start(&tls, true, address.port()).await;
    frpc.until(TunnelState::Up).await;
    println!("back {:?} after the server listened again", begun.elapsed());
    round_trip(&mut frps.server.dial("s").await.unwrap(), 1000).await;
    // the run id is kept
    assert!(frpc.run_ids.try_recv().is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_run_id_takes_over_without_a_conflict() {
    let (tls, pin) = identity();
    let frps = Frps::start(&tls, true, 0).await;
    let mut first = Frpc::start(settings(frps.address, true, &pin), "r");
    first.until(TunnelState::Up).await;
    first.task.abort();
    let mut second = Frpc::start(settings(frps.address, true, &pin), "r");
    second.until(TunnelState::Up).await;
    round_trip(&mut frps.server.dial("s").await.unwrap(), 1000).await;
    // another run id finds the names taken, and says so
    let mut third = Frpc::start(settings(frps.address, true, &pin), "other");
    let reason = third.until(TunnelState::Conflict).await;
    assert!(reason.contains("already exists"), "{reason}");
}

/// Two with one run id push each other out; both notice, and get themselves another.
#[tokio::test(flavor = "multi_thread")]
async fn clones_stop_fighting() {
    let (tls, pin) = identity();
    let frps = Frps::start(&tls, true, 0).await;
    let mut first = Frpc::start(settings(frps.address, true, &pin), "r");
    let mut second = Frpc::start(settings(frps.address, true, &pin), "r");
    let fresh = tokio::select! {
        id = first.run_ids.recv() => id,
        id = second.run_ids.recv() => id,
        () = tokio::time::sleep(Duration::from_secs(60)) => panic!("they fight for ever"),
    };
    assert_ne!(fresh.unwrap(), "r");
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_credentials_and_trust_are_states_with_a_reason() {
    let (tls, pin) = identity();
    let frps = Frps::start(&tls, true, 0).await;
    let good = settings(frps.address, true, &pin);
    let mut config = good.clone();
    config.auth.token = Secret::new("wrong-canary-4711-in-plain-text");
    let mut frpc = Frpc::start(config, "");
    let reason = frpc.until(TunnelState::Unauthorized).await;
    assert!(reason.contains("token") && !reason.contains("canary-4711-in-plain-text"), "{reason}");
    // the right one heals it at once, without a restart
    frpc.settings.send_replace(Some(good.clone()));
    frpc.until(TunnelState::Up).await;

    let mut config = good.clone();
    config.tls.pin = Some(identity().1);
    let reason = Frpc::start(config, "").until(TunnelState::Waiting).await;
    assert!(reason.starts_with("tls_pin") && reason.contains("not pinned"), "{reason}");

    let mut config = good.clone();
    config.tls.pin = None;
    let reason = Frpc::start(config.clone(), "").until(TunnelState::Refused).await;
    assert!(reason.contains("neither CA nor pin"), "{reason}");
    config.tls.pin = Some("sha256:x".into());
    let reason = Frpc::start(config, "").until(TunnelState::Refused).await;
    assert!(reason.contains("is no pin"), "{reason}");

    let mut config = good.clone();
    config.tls.enable = false;
    let reason = Frpc::start(config, "").until(TunnelState::Refused).await;
    assert!(reason.contains("without TLS"), "{reason}");

    let mut config = good.clone();
    config.server = "no-such-name.invalid".into();
    let reason = Frpc::start(config, "").until(TunnelState::Waiting).await;
    assert!(reason.starts_with("dns"), "{reason}");

    let mut config = good;
    config.port = free_port();
    let reason = Frpc::start(config, "").until(TunnelState::Waiting).await;
    assert!(reason.starts_with("tcp") && reason.contains("refused"), "{reason}");
}

/// Accepts and, after `tls`, says nothing.
async fn mute(tls: Option<Arc<rustls::ServerConfig>>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let mut held: Vec<Box<dyn Send>> = Vec::new();
        while let Ok((stream, _)) = listener.accept().await {
            match &tls {
                Some(tls) => held.push(Box::new(
                    tokio_rustls::TlsAcceptor::from(tls.clone()).accept(stream).await,
                )),
                None => held.push(Box::new(stream)),
            }
        }
    });
    address
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_accepts_and_never_answers_holds_nobody() {
    let (tls, pin) = identity();
    let begun = Instant::now();
    let address = mute(None).await;
    let mut at_tls = Frpc::start(settings(address, true, &pin), "");
    let address = mute(Some(tls)).await;
    let mut at_login = Frpc::start(settings(address, true, &pin), "r");
    let reason = at_tls.until_reason("handshake in 5 s").await;
    println!("silent at TLS: {reason}, after {:?}", begun.elapsed());
    at_login.until_reason("does not answer the login").await;
    println!("silent at login: after {:?}", begun.elapsed());
    // twice silent with a run id: a fresh one is tried
    let fresh = tokio::time::timeout(Duration::from_secs(30), at_login.run_ids.recv())
        .await
        .unwrap()
        .unwrap();
    assert_ne!(fresh, "r");
}

/// A relay whose directions can be stopped without closing anything.
struct Relay {
    address: SocketAddr,
    up: watch::Sender<bool>,
    down: watch::Sender<bool>,
}

async fn relay(to: SocketAddr) -> Relay {
    async fn pump(
        mut from: tokio::net::tcp::OwnedReadHalf,
        mut to: tokio::net::tcp::OwnedWriteHalf,
        mut open: watch::Receiver<bool>,
    ) {
        let mut buffer = vec![0; 16 * 1024];
        loop {
            let Ok(n @ 1..) = from.read(&mut buffer).await else { return };
            // what comes while the path is cut is lost
            if *open.borrow_and_update() && to.write_all(&buffer[..n]).await.is_err() {
                return;
            }
        }
    }
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let ((up, up_open), (down, down_open)) = (watch::channel(true), watch::channel(true));
    tokio::spawn(async move {
        while let Ok((user, _)) = listener.accept().await {
            let Ok(server) = TcpStream::connect(to).await else { continue };
            let ((ur, uw), (sr, sw)) = (user.into_split(), server.into_split());
            tokio::spawn(pump(ur, sw, up_open.clone()));
            tokio::spawn(pump(sr, uw, down_open.clone()));
        }
    });
    Relay { address, up, down }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_link_that_dies_silently_is_noticed_and_healed() {
    let (tls, pin) = identity();
    let both = async |cut_up: bool, cut_down: bool| {
        let frps = Frps::start(&tls, true, 0).await;
        let relay = relay(frps.address).await;
        let mut frpc = Frpc::start(settings(relay.address, true, &pin), "");
        frpc.until(TunnelState::Up).await;
        let begun = Instant::now();
        relay.up.send_replace(!cut_up);
        relay.down.send_replace(!cut_down);
        let reason = frpc.until(TunnelState::Waiting).await;
        println!("cut up {cut_up}, down {cut_down}: noticed after {:?}: {reason}", begun.elapsed());
        assert!(reason.contains("nothing heard"), "{reason}");
        let begun = Instant::now();
        relay.up.send_replace(true);
        relay.down.send_replace(true);
        frpc.until(TunnelState::Up).await;
        println!("back {:?} after it healed", begun.elapsed());
    };
    tokio::join!(both(true, true), both(true, false), both(false, true));
}

/// Hangs up on whoever begins with `unwanted`, passes the others on.
async fn choosy(unwanted: &'static [u8], to: SocketAddr) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut user, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut first = [0];
                if user.peek(&mut first).await.is_ok() && !unwanted.contains(&first[0]) {
                    let mut server = TcpStream::connect(to).await.unwrap();
                    let _ = tokio::io::copy_bidirectional(&mut user, &mut server).await;
                }
            });
        }
    });
    address
}

/// Old frps knows TLS by the byte 0x17 before it, and takes anything else for something else.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_wants_the_byte_before_tls_gets_it() {
    let (tls, pin) = identity();
    for tcp_mux in [true, false] {
        let frps = Frps::start(&tls, tcp_mux, 0).await;
        let mut frpc =
            Frpc::start(settings(choosy(&[0x16], frps.address).await, tcp_mux, &pin), "");
        frpc.until(TunnelState::Up).await;
        round_trip(&mut frps.server.dial("s").await.unwrap(), 100_000).await;
        // a peer that hangs up either way is reported as it is
        let mut frpc =
            Frpc::start(settings(choosy(&[0x16, 0x17], frps.address).await, tcp_mux, &pin), "");
        let reason = frpc.until(TunnelState::Waiting).await;
        assert!(reason.starts_with("tls: "), "{reason}");
    }
    // one that was only restarting, and takes the byte for broken TLS
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let mut first = [0];
            if stream.peek(&mut first).await.is_ok() && first != [0x16] {
                let _ = tokio_rustls::TlsAcceptor::from(tls.clone()).accept(stream).await;
            }
        }
    });
    let reason = Frpc::start(settings(address, true, &pin), "").until(TunnelState::Waiting).await;
    assert!(reason.starts_with("tls: ") && !reason.contains("alert"), "{reason}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_visitor_with_the_wrong_key_is_refused_and_the_right_one_served() {
    let (tls, pin) = identity();
    let frps = Frps::start(&tls, true, 0).await;
    let config = settings(frps.address, true, &pin);
    let mut frpc = Frpc::start(config.clone(), "r");
    frpc.until(TunnelState::Up).await;
    let target = pipeops::frp::dial::Dialer::new(&config, false).unwrap();
    let mut tasks = tokio::task::JoinSet::new();
    let connector = target.connect(&mut tasks).await.unwrap();
    for (name, key, refused) in
        [("s", "wrong", true), ("nobody", "sk", true), ("t", "sk", true), ("s", "sk", false)]
    {
        match pipeops::frp::client::visit(&connector, "", name, &Secret::new(key)).await {
            Ok(mut io) => {
                assert!(!refused, "{name} {key}");
                round_trip(&mut io, 100_000).await;
            }
            Err(e) => assert!(
                refused && e.kind() == std::io::ErrorKind::PermissionDenied,
                "{name} {key}: {e}"
            ),
        }
    }
}
