//! `exec` and `open` of the command line, with a kubelet's end of an exec in this process.

use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::PermissionsExt as _;
use std::process::{Command, Stdio};
use std::time::Duration;

use axum::extract::Request;
use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};
use base64::Engine as _;
use futures_util::{SinkExt as _, StreamExt as _};
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use nix::sys::signal::{Signal, kill};
use nix::sys::termios::tcgetattr;
use nix::unistd::Pid;
use serde_json::{Value, json};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::Role;

use crate::client::Person;
use crate::control_plane::ControlPlane;
use crate::interrupts::{Terminal, ends};
use crate::support::run_output;
use crate::world::{Kube, serve_kube};

const SOON: Duration = Duration::from_secs(20);

type Socket = WebSocketStream<TokioIo<Upgraded>>;

/// Switches to v5 of the protocol, and runs what the first word of the command says.
pub(crate) fn answer(mut request: Request) -> Response {
    if request.uri().path().ends_with("/pods/gone/exec") {
        let status = json!({"kind": "Status", "reason": "NotFound", "message": "pods not found"});
        return (StatusCode::NOT_FOUND, axum::Json(status)).into_response();
    }
    let query = request.uri().query().unwrap_or_default().to_owned();
    let key = request.headers()["sec-websocket-key"].to_str().unwrap();
    let text = format!("{key}258EAFA5-E914-47DA-95CA-C5AB0DC85B11");
    let digest = ring::digest::digest(&ring::digest::SHA1_FOR_LEGACY_USE_ONLY, text.as_bytes());
    let accept = base64::engine::general_purpose::STANDARD.encode(digest);
    let upgrade = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        let io = TokioIo::new(upgrade.await.unwrap());
        let mut socket = WebSocketStream::from_raw_socket(io, Role::Server, None).await;
        if let Some(status) = run(&mut socket, &query).await {
            write(&mut socket, 3, status.to_string().as_bytes()).await;
            let _ = socket.close(None).await;
        }
    });
    let headers = [
        ("connection", "Upgrade"),
        ("upgrade", "websocket"),
        ("sec-websocket-protocol", "v5.channel.k8s.io"),
        ("sec-websocket-accept", &accept),
    ];
    (StatusCode::SWITCHING_PROTOCOLS, headers).into_response()
}

async fn write(socket: &mut Socket, stream: u8, bytes: &[u8]) {
    let frame = [&[stream], bytes].concat();
    let _ = socket.send(Message::Binary(frame.into())).await;
}

/// The next frame; none where the other side is gone.
async fn read(socket: &mut Socket) -> Option<Vec<u8>> {
    loop {
        match socket.next().await?.ok()? {
            Message::Binary(frame) => return Some(frame.to_vec()),
            Message::Close(_) => return None,
            _ => {}
        }
    }
}

/// What a command does; gives the Status of its end.
async fn run(socket: &mut Socket, query: &str) -> Option<Value> {
    let words: Vec<String> = url::form_urlencoded::parse(query.as_bytes())
        .filter(|(name, _)| name == "command")
        .map(|(_, word)| word.into_owned())
        .collect();
    let exit = |code: &str| {
        json!({"status": "Failure", "reason": "NonZeroExitCode", "message": "it failed",
            "details": {"causes": [{"reason": "ExitCode", "message": code}]}})
    };
    let success = json!({"status": "Success"});
    match words[0].as_str() {
        "say" => {
            for word in &words[1..] {
                write(socket, 1, format!("{word}\n").as_bytes()).await;
            }
            write(socket, 2, b"warned\n").await;
            Some(success)
        }
        "fail" => Some(exit(&words[1])),
        "cat" => loop {
            match read(socket).await?[..] {
                [0, ref bytes @ ..] => write(socket, 1, bytes).await,
                [255, 0] => return Some(success),
                ref other => panic!("{other:?}"),
            }
        },
        // tells the size of its terminal and the keys, and ends with q
        "top" => {
            write(socket, 1, b"top of ").await;
            write(socket, 1, query.split("&command").next().unwrap().as_bytes()).await;
            loop {
                match read(socket).await?[..] {
                    [0, b'q'] => return Some(exit("130")),
                    [0, ref keys @ ..] => {
                        write(socket, 1, format!("keys {keys:?} ").as_bytes()).await;
                    }
                    [4, ref size @ ..] => write(socket, 1, size).await,
                    ref other => panic!("{other:?}"),
                }
            }
        }
        "hang" => {
            write(socket, 1, b"it hangs\n").await;
            while read(socket).await.is_some() {}
            None
        }
        // the connection ends first
        "vanish" => None,
        other => Some(json!({"status": "Failure", "reason": "InternalError",
            "message": format!("exec: {other}: executable file not found")})),
    }
}

fn plant(kube: &Kube) {
    let pod = |name: &str, ready: &str, containers: Value| {
        json!({"metadata": {"name": name, "namespace": "beta"}, "spec": {"containers": containers},
            "status": {"phase": "Running", "conditions": [{"type": "Ready", "status": ready}]}})
    };
    let one = json!([{"name": "web"}]);
    let pods = json!({"items": [
        pod("gone", "False", one.clone()),
        pod("web-1", "True", one),
        pod("web-2", "True", json!([{"name": "web"}, {"name": "proxy"}])),
    ]});
    let ingress = json!({"spec": {"rules": [{"host": "web.example", "http": {"paths": [
        {"path": "/shop"}]}}], "tls": [{"hosts": ["web.example"]}]}});
    kube.planted.lock().unwrap().extend([
        ("/api/v1/namespaces/beta/pods", "labelSelector=app=web", pods),
        ("/apis/networking.k8s.io/v1/namespaces/beta/ingresses/web", "", ingress),
    ]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_runs_in_a_pod_with_its_streams_and_its_exit_code() {
    let control_plane = ControlPlane::with(&[]);
    let (kube, address) = serve_kube().await;
    let (_agent, _) = control_plane.agent(address).await;
    plant(&kube);
    let eve = Person::logged_in(&control_plane, "eve", &[]);
    let start = ["exec", "web", "-n", "beta"];
    let exec = |args: &[&str]| eve.run(&[&start, args].concat());

    let said = exec(&["--", "say", "one two", "a=b&c", "\u{1b}[31m-n"]).ended(0);
    assert_eq!(said.out, "one two\na=b&c\n\u{1b}[31m-n\n");
    assert_eq!(said.err, "warned\n");
    let asked = kube.through().into_iter().rfind(|r| r.uri.contains("/exec?")).unwrap();
    assert!(asked.uri.starts_with("/api/v1/namespaces/beta/pods/web-1/exec?container=web&stdout"));
    exec(&["--pod", "web-2", "-c", "proxy", "--", "say"]).ended(0);
    let asked = kube.through().into_iter().rfind(|r| r.uri.contains("/exec?")).unwrap();
    assert!(asked.uri.contains("/pods/web-2/exec?container=proxy&"), "{}", asked.uri);
    let first = exec(&["--pod", "web-2", "--", "say"]).ended(0);
    assert!(first.err.contains("in the container web of web, proxy\n"), "{}", first.err);

    // what is piped arrives, and its end too
    let long = format!("{}\u{1b}[0m", "0123456789".repeat(4000));
    let echo = eve.types(&[&start[..], &["-i", "--", "cat"]].concat(), &long).ended(0);
    assert!(echo.out == long, "{} bytes of {}", echo.out.len(), long.len());
    let echo = eve.types(&[&start[..], &["-it", "--", "cat"]].concat(), "text").ended(0);
    assert_eq!(echo.out, "text");
    assert!(echo.err.contains("without -t: standard input is no terminal"), "{}", echo.err);

    for (args, code, said) in [
        (
            &["--", "fail", "3"][..],
            13,
            "web-1: the command ended with exit code 3 [COMMAND_FAILED]",
        ),
        (&["--", "nosuch"], 13, "exec: nosuch: executable file not found"),
        (&["--", "vanish"], 5, "EXEC_CUT"),
        (&["--", "deny"], 7, "REMOTE_REFUSES"),
        (&["--pod", "gone", "--", "say"], 13, "beta/web: there is no pod gone of it [POD_GONE]"),
        (&["--pod", "web-9", "--", "say"], 13, "it has gone, web-1, web-2"),
        (&["-c", "db", "--", "say"], 2, "CONTAINER_UNKNOWN"),
        (&["-t", "--", "say"], 2, "--stdin"),
        (&[], 2, "COMMAND"),
    ] {
        let refused = exec(args).ended(code);
        assert!(refused.err.contains(said), "{args:?}: {}", refused.err);
    }
    let none = eve.run(&["exec", "none", "-n", "beta", "--", "say"]).ended(13);
    assert!(none.err.contains("beta/none: it has no pod that runs"), "{}", none.err);

    // a token that is revoked ends what runs
    let ann = Person::logged_in(&control_plane, "ann", &[]);
    let mut cut_off = ann.command(&[&start[..], &["--", "hang"]].concat()).spawn().unwrap();
    let cut_off = tokio::task::block_in_place(|| {
        let mut line = String::new();
        let mut said = BufReader::new(cut_off.stdout.take().unwrap());
        said.read_line(&mut line).unwrap();
        assert_eq!(line, "it hangs\n");
        let revoke = ["control-plane", "user", "revoke", "ann"];
        control_plane.sandbox.subcommand(&revoke).ended(0);
        run_output(cut_off.wait_with_output().unwrap())
    });
    let cut_off = cut_off.ended(7);
    assert!(cut_off.err.contains("TOKEN_UNKNOWN"), "{}", cut_off.err);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_terminal_is_the_commands_own_and_as_before_when_it_ends() {
    let control_plane = ControlPlane::with(&[]);
    let (kube, address) = serve_kube().await;
    let (_agent, _) = control_plane.agent(address).await;
    plant(&kube);
    let eve = Person::logged_in(&control_plane, "eve", &[]);
    let top = ["exec", "web", "-n", "beta", "-it", "--", "top"];
    tokio::task::block_in_place(|| {
        let mut terminal = Terminal::start(eve.command(&top));
        let before = {
            let fresh = nix::pty::openpty(None, None).unwrap();
            tcgetattr(&fresh.slave).unwrap()
        };
        terminal.until("top of container=web&stdin=true&stdout=true&tty=true");
        let raw = tcgetattr(&terminal.keyboard).unwrap();
        assert_ne!(raw.local_flags, before.local_flags);
        // Ctrl-C is a key like others
        terminal.types("\u{3}");
        terminal.until("keys [3] ");
        let sized = Command::new("stty")
            .args(["cols", "100", "rows", "40"])
            .stdin(Stdio::from(terminal.keyboard.try_clone().unwrap()))
            .status();
        assert!(sized.unwrap().success());
        let pid = |terminal: &Terminal| Pid::from_raw(terminal.child.id().try_into().unwrap());
        kill(pid(&terminal), Signal::SIGWINCH).unwrap();
        terminal.until(r#"{"Width":100,"Height":40}"#);
        terminal.types("q");
        terminal.until("the command ended with exit code 130");
        assert_eq!(ends(&mut terminal.child, SOON), Some(13));
        let after = tcgetattr(&terminal.keyboard).unwrap();
        assert_eq!(
            (after.local_flags, after.input_flags, after.output_flags),
            (before.local_flags, before.input_flags, before.output_flags)
        );
        for (signal, code) in [(Signal::SIGTERM, 143), (Signal::SIGHUP, 130)] {
            let mut terminal = Terminal::start(eve.command(&top));
            terminal.until("top of ");
            kill(pid(&terminal), signal).unwrap();
            assert_eq!(ends(&mut terminal.child, SOON), Some(code), "{signal}");
            let after = tcgetattr(&terminal.keyboard).unwrap();
            assert_eq!(after.local_flags, before.local_flags, "{signal}");
        }
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn an_application_is_opened_at_its_host() {
    let control_plane = ControlPlane::with(&[]);
    let (kube, address) = serve_kube().await;
    let (_agent, _) = control_plane.agent(address).await;
    plant(&kube);
    let eve = Person::logged_in(&control_plane, "eve", &[]);
    let web = ["open", "web", "-n", "beta"];
    assert_eq!(eve.run(&web).ended(0).out, "https://web.example/shop\n");
    let none = eve.run(&["open", "api", "-n", "beta"]).ended(13);
    assert!(none.err.contains("[NO_HOST]") && none.err.contains("pipeops.toml"), "{}", none.err);
    // on a terminal with a display, unless only the URL is asked for
    let opener = eve.home.path().join("xdg-open");
    let script = "#!/bin/sh\necho \"$1 on $DISPLAY\" > \"$HOME/opened\"\n";
    std::fs::write(&opener, script).unwrap();
    std::fs::set_permissions(&opener, std::fs::Permissions::from_mode(0o755)).unwrap();
    let opened = eve.home.path().join("opened");
    let run = |args: &[&str], display: &str| {
        let mut command = eve.command(args);
        command.env("PATH", eve.home.path()).env("DISPLAY", display);
        let mut terminal = Terminal::start(command);
        terminal.until("https://web.example/shop");
        assert_eq!(ends(&mut terminal.child, SOON), Some(0));
    };
    tokio::task::block_in_place(|| {
        run(&web, "");
        run(&[&web[..], &["--print"]].concat(), ":7");
        assert!(!opened.exists());
        run(&web, ":7");
        assert_eq!(std::fs::read_to_string(&opened).unwrap(), "https://web.example/shop on :7\n");
    });
}
