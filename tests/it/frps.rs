//! Our FRP server half before clients that are not ours: frpc with its defaults, crowds, and the
//! dead.

use std::time::Duration;

use pipeops::base::secret::Secret;
use pipeops::frp::codec::{Duplex, encrypted};
use pipeops::frp::dial::{Connector, Dialer};
use pipeops::frp::server::{Server, ServerConfig};
use pipeops::frp::wire::{
    self, Key, Login, LoginResp, Message, NewProxy, NewWorkConn, Ping, StartWorkConn,
};
use tokio::io::AsyncReadExt as _;
use tokio::net::{TcpListener, TcpSocket};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::fake_control_plane::identity;
use crate::tunnel::{Frpc, Frps, TOKEN, echo, round_trip, settings};
use pipeops::frp::TunnelState;

/// A client by hand: logged in, everything else is the test's.
struct ManualClient {
    connector: Connector,
    control: Box<dyn Duplex>,
    run_id: String,
    _tasks: JoinSet<()>,
}

impl ManualClient {
    async fn login(address: std::net::SocketAddr, pin: &str, run_id: &str) -> ManualClient {
        let mut tasks = JoinSet::new();
        let connector = Dialer::new(&settings(address, true, pin), false)
            .unwrap()
            .connect(&mut tasks)
            .await
            .unwrap();
        let mut control = connector.open().await.unwrap();
        let token = Secret::new(TOKEN);
        let login = Login {
            privilege_key: wire::privilege_key(&token, 7),
            timestamp: 7,
            run_id: run_id.into(),
            ..Login::default()
        };
        wire::write(&mut control, login).await.unwrap();
        let Message::LoginResp(LoginResp { error, run_id, .. }) =
            wire::read(&mut control).await.unwrap()
        else {
            panic!("no answer to the login")
        };
        assert_eq!(error, "");
        ManualClient {
            connector,
            control: Box::new(encrypted(control, &Key::derive(&token))),
            run_id,
            _tasks: tasks,
        }
    }

    async fn open(&mut self, name: &str) {
        let asked = NewProxy {
            proxy_name: name.into(),
            proxy_type: "stcp".into(),
            sk: "sk".into(),
            ..NewProxy::default()
        };
        wire::write(&mut self.control, asked).await.unwrap();
        let Message::NewProxyResp(answer) = wire::read(&mut self.control).await.unwrap() else {
            panic!("no answer to the proxy")
        };
        assert_eq!(answer.error, "");
    }
}

/// frpc proves the token at the login and, unless told to, never again; with the multiplexer it has
/// sent no pings since 0.58.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_proves_itself_once_and_never_pings_is_served() {
    let (tls, pin) = identity();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    // whoever pings has this long for the next one: any wait at all would end a client that does
    // not
    let config = ServerConfig {
        token: Secret::new(TOKEN),
        tls: Some(tls),
        tcp_mux: true,
        tcp_bind: None,
        heartbeat: Duration::from_millis(1),
        authorizer: None,
    };
    let server = Server::new(config);
    tokio::spawn({
        let server = server.clone();
        async move { server.serve(listener, CancellationToken::new()).await }
    });
    let mut client = ManualClient::login(address, &pin, "").await;
    client.open("s").await;
    for _ in 0..20 {
        let users = server.clone();
        let user =
            tokio::spawn(
                async move { round_trip(&mut users.dial("s").await.unwrap(), 1000).await },
            );
        assert!(matches!(wire::read(&mut client.control).await.unwrap(), Message::ReqWorkConn(_)));
        let mut work = client.connector.open().await.unwrap();
        wire::write(
            &mut work,
            NewWorkConn { run_id: client.run_id.clone(), ..NewWorkConn::default() },
        )
        .await
        .unwrap();
        let Message::StartWorkConn(StartWorkConn { error, .. }) =
            wire::read(&mut work).await.unwrap()
        else {
            panic!("no start")
        };
        assert_eq!(error, "");
        tokio::spawn(echo(work));
        user.await.unwrap();
    }
    // a wrong proof is still one too many
    let mut work = client.connector.open().await.unwrap();
    let hello =
        NewWorkConn { run_id: client.run_id.clone(), privilege_key: "wrong".into(), timestamp: 1 };
    wire::write(&mut work, hello).await.unwrap();
    let Message::StartWorkConn(answer) = wire::read(&mut work).await.unwrap() else {
        panic!("no answer")
    };
    assert!(answer.error.contains("token"), "{}", answer.error);
    wire::write(&mut client.control, Ping::default()).await.unwrap();
    let Message::Pong(pong) = wire::read(&mut client.control).await.unwrap() else {
        panic!("no pong")
    };
    assert_eq!(pong.error, "");
    // a client that pings and falls silent is gone, and its connection too
    let Connector::Mux(mux) = &client.connector else { unreachable!() };
    mux.ended().await;
}

/// A session in a connection that is dead but not closed: it does not read, and its queue of orders
/// is full.
#[tokio::test(flavor = "multi_thread")]
async fn a_takeover_does_not_wait_for_the_dead() {
    let (tls, pin) = identity();
    let frps = Frps::with(Some(&tls), true, 0).await;
    let mut dead = ManualClient::login(frps.address, &pin, "r").await;
    dead.open("s").await;
    let mut users = JoinSet::new();
    for _ in 0..200 {
        let server = frps.server.clone();
        users.spawn(async move { server.dial("s").await.map(drop) });
    }
    // its users give up with it, and the name is free for the next one at once
    let mut alive = ManualClient::login(frps.address, &pin, "r").await;
    alive.open("s").await;
    while let Some(user) = users.join_next().await {
        assert!(user.unwrap().is_err());
    }
    assert_eq!(frps.server.proxies(), ["s"]);
    let Connector::Mux(mux) = &dead.connector else { unreachable!() };
    mux.ended().await;
}

/// Connections that say nothing fill the part of their own address; from another one a client comes
/// in.
#[tokio::test(flavor = "multi_thread")]
async fn a_crowd_from_one_address_keeps_nobody_else_out() {
    let (tls, pin) = identity();
    let frps = Frps::with(Some(&tls), true, 0).await;
    let mut crowd = Vec::new();
    for _ in 0..300 {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.3:0".parse().unwrap()).unwrap();
        crowd.push(socket.connect(frps.address).await.unwrap());
    }
    let mut frpc = Frpc::start(settings(frps.address, true, &pin), "");
    frpc.until(TunnelState::Up).await;
    // and those who say nothing for ten seconds are hung up on
    let mut byte = [0];
    assert_eq!(crowd.remove(0).read(&mut byte).await.unwrap_or(0), 0);
}

/// Of an answer and a hang-up that come together hashicorp/yamux may give its reader only the
/// latter: frpc hangs up itself.
#[tokio::test(flavor = "multi_thread")]
async fn whoever_is_refused_has_time_to_read_it() {
    let (tls, pin) = identity();
    let frps = Frps::with(Some(&tls), true, 0).await;
    let mut tasks = JoinSet::new();
    for again in [false, true] {
        let connector = Dialer::new(&settings(frps.address, true, &pin), false)
            .unwrap()
            .connect(&mut tasks)
            .await
            .unwrap();
        let wrong = || Login { privilege_key: "wrong".into(), timestamp: 7, ..Login::default() };
        let mut control = connector.open().await.unwrap();
        wire::write(&mut control, wrong()).await.unwrap();
        let Message::LoginResp(answer) = wire::read(&mut control).await.unwrap() else {
            panic!("no answer to the login")
        };
        assert!(answer.error.contains("token"), "{}", answer.error);
        let Connector::Mux(mux) = &connector else { unreachable!() };
        tokio::time::timeout(Duration::from_millis(500), mux.ended())
            .await
            .expect_err("the connection is closed at once");
        // nor is that time for another guess
        if again {
            let mut second = connector.open().await.unwrap();
            wire::write(&mut second, wrong()).await.unwrap();
            assert!(wire::read(&mut second).await.is_err(), "a second login is answered");
        }
        mux.ended().await;
    }
}

/// Nothing comes of a connection without a stream, or of one whose first stream says nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_connection_of_which_nothing_comes_is_closed() {
    let (tls, pin) = identity();
    let frps = Frps::with(Some(&tls), true, 0).await;
    let mut tasks = JoinSet::new();
    let Connector::Mux(mux) = Dialer::new(&settings(frps.address, true, &pin), false)
        .unwrap()
        .connect(&mut tasks)
        .await
        .unwrap()
    else {
        unreachable!()
    };
    mux.ended().await;
}
