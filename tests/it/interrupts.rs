//! Runs that are interrupted where they wait, and runs whose output nobody reads.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal::{SIGINT, SIGTERM};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::support::{Sandbox, assert_same_tree};

/// A program that somebody sits in front of.
pub(crate) struct Terminal {
    pub(crate) child: Child,
    pub(crate) keyboard: File,
    pub(crate) screen: Arc<Mutex<String>>,
}

impl Terminal {
    pub(crate) fn start(mut command: Command) -> Terminal {
        let pty = nix::pty::openpty(None, None).unwrap();
        let end = || Stdio::from(pty.slave.try_clone().unwrap());
        let child = command.stdin(end()).stdout(end()).stderr(end()).spawn().unwrap();
        let screen = Arc::new(Mutex::new(String::new()));
        let (shown, mut master) = (screen.clone(), File::from(pty.master.try_clone().unwrap()));
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(n @ 1..) = master.read(&mut bytes) {
                shown.lock().unwrap().push_str(&String::from_utf8_lossy(&bytes[..n]));
            }
        });
        Terminal { child, keyboard: File::from(pty.master), screen }
    }

    #[track_caller]
    pub(crate) fn until(&self, word: &str) {
        let begin = Instant::now();
        while !self.screen.lock().unwrap().contains(word) {
            let shown = self.screen.lock().unwrap().clone();
            assert!(begin.elapsed() < Duration::from_secs(30), "no `{word}` in:\n{shown}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    pub(crate) fn types(&mut self, text: &str) {
        self.keyboard.write_all(text.as_bytes()).unwrap();
    }
}

fn send(child: &Child, signal: Signal) {
    kill(Pid::from_raw(child.id().try_into().unwrap()), signal).unwrap();
}

/// It ends by itself, soon; gives the exit code.
#[track_caller]
pub(crate) fn ends(child: &mut Child, soon: Duration) -> Option<i32> {
    let begin = Instant::now();
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status.code();
        }
        if begin.elapsed() > soon {
            child.kill().unwrap();
            child.wait().unwrap();
            panic!("it still ran after {} s", soon.as_secs());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Waits until the program has a handler for the signal (proc_pid_status(5), SigCgt).
fn until_it_listens(child: &Child) {
    let status = format!("/proc/{}/status", child.id());
    let caught = || {
        let text = std::fs::read_to_string(&status).unwrap();
        let mask = text.lines().find_map(|l| l.strip_prefix("SigCgt:")).unwrap().trim();
        u64::from_str_radix(mask, 16).unwrap() & (1_u64 << (SIGINT as u64 - 1)) != 0
    };
    let begin = Instant::now();
    while !caught() {
        assert!(begin.elapsed() < Duration::from_secs(30), "it never listens");
        std::thread::sleep(Duration::from_millis(5));
    }
}

const SOON: Duration = Duration::from_secs(5);

#[test]
fn a_signal_at_the_question_ends_the_run_and_changes_nothing() {
    for (signal, code) in [(SIGINT, 130), (SIGTERM, 143)] {
        let sandbox = Sandbox::new();
        let before = sandbox.tree();
        let release = sandbox.path("release");
        let install =
            || sandbox.command(&["install-server", "--offline-dir", &release, "--timeout", "20s"]);
        let mut terminal = Terminal::start(install());
        terminal.until("go on? [y/N]");
        send(&terminal.child, signal);
        assert_eq!(ends(&mut terminal.child, SOON), Some(code));
        terminal.until("nothing was changed");
        assert_same_tree(&sandbox.tree(), &before, "");
        assert!(!sandbox.root().join("var/lib/pipeops").exists(), "not even the lock is left");

        let mut terminal = Terminal::start(install());
        terminal.until("go on? [y/N]");
        terminal.types("n\n");
        assert_eq!(ends(&mut terminal.child, SOON), Some(11));
        let mut terminal = Terminal::start(install());
        terminal.until("go on? [y/N]");
        terminal.types("y\n");
        assert_eq!(ends(&mut terminal.child, Duration::from_secs(60)), Some(0));

        let tree = sandbox.tree();
        let mut terminal = Terminal::start(sandbox.command(&["uninstall"]));
        terminal.until("go on? [y/N]");
        send(&terminal.child, signal);
        assert_eq!(ends(&mut terminal.child, SOON), Some(code));
        assert_same_tree(&sandbox.tree(), &tree, "");
        sandbox.run(&["uninstall", "--yes"]).ended(0);
        assert_same_tree(&sandbox.tree(), &before, "");
    }
}

/// Somebody who takes a connection and then says nothing.
fn silent() -> TcpListener {
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    silent.set_nonblocking(true).unwrap();
    silent
}

#[track_caller]
fn accepted(silent: &TcpListener) -> TcpStream {
    let begin = Instant::now();
    loop {
        match silent.accept() {
            Ok((stream, _)) => return stream,
            Err(_) => std::thread::sleep(Duration::from_millis(5)),
        }
        assert!(begin.elapsed() < Duration::from_secs(30), "nobody asks");
    }
}

#[test]
fn a_signal_ends_the_wait_for_an_api_that_says_nothing() {
    let (sandbox, silent) = (Sandbox::new(), silent());
    let before = sandbox.tree();
    let release = sandbox.path("release");
    sandbox.beside("api", &format!("http://{}", silent.local_addr().unwrap()), 0o644);
    let args = ["install-server", "--offline-dir", &release, "--yes", "-o", "json"];
    let mut command = sandbox.command(&args);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let held = accepted(&silent);
    send(&child, SIGTERM);
    assert_eq!(ends(&mut child, SOON), Some(143));
    drop(held);
    let mut said = String::new();
    child.stdout.take().unwrap().read_to_string(&mut said).unwrap();
    let result: serde_json::Value = serde_json::from_str(&said).unwrap();
    assert_eq!((&result["exit"], &result["error"]["code"]), (&143.into(), &"INTERRUPTED".into()));
    assert!(sandbox.read("/var/lib/pipeops/journal.json").contains("\"complete\": false"));
    sandbox.run(&["uninstall", "--yes"]).ended(0);
    assert_same_tree(&sandbox.tree(), &before, "");
}

#[test]
fn a_signal_ends_a_run_that_waits_for_an_answer() {
    let silent = silent();
    let address = silent.local_addr().unwrap().to_string();
    let (url, token) =
        (format!("http://{address}"), format!("K10{}::abcdef.0123456789abcdef", "a".repeat(64)));
    for (signal, code) in [(SIGINT, 130), (SIGTERM, 143)] {
        for args in [
            ["join-worker", &address, &token, "--yes"],
            ["install-server", "--channel", "stable", "--yes"],
        ] {
            let sandbox = Sandbox::new();
            let before = sandbox.tree();
            let mut command = sandbox.command(&args);
            command.env("PIPEOPS_TEST_CHANNELS", &url).stderr(Stdio::null());
            let mut child = command.spawn().unwrap();
            let held = accepted(&silent);
            send(&child, signal);
            assert_eq!(ends(&mut child, SOON), Some(code), "{args:?}");
            drop(held);
            assert_same_tree(&sandbox.tree(), &before, args[0]);
            assert!(!sandbox.root().join("var/lib/pipeops").exists(), "{args:?}");
        }
    }
}

#[test]
fn a_signal_ends_a_run_that_waits_for_a_token() {
    for args in [
        &["join-worker", "192.0.2.1", "-", "--yes"][..],
        &["install-server", "--agent-token-file", "-", "--yes"],
    ] {
        let sandbox = Sandbox::new();
        let before = sandbox.tree();
        let mut command = sandbox.command(args);
        let mut child = command.stdin(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        until_it_listens(&child);
        send(&child, SIGINT);
        assert_eq!(ends(&mut child, SOON), Some(130), "{args:?}");
        assert_same_tree(&sandbox.tree(), &before, args[0]);
    }
}

/// What no program can leave in order ends at the second signal.
#[test]
fn a_second_signal_ends_a_run_that_is_held_up() {
    let sandbox = Sandbox::new();
    let fifo = sandbox.path("config.toml");
    nix::unistd::mkfifo(fifo.as_str(), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let mut command = sandbox.command(&["install-server", "--config", &fifo, "--yes"]);
    let mut child = command.stderr(Stdio::null()).spawn().unwrap();
    until_it_listens(&child);
    send(&child, SIGINT);
    // two signals at once may be one
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(child.try_wait().unwrap(), None, "it waits for the file");
    send(&child, SIGINT);
    assert_eq!(ends(&mut child, SOON), Some(130));
}

/// A pipe that nobody reads any more, and a disk without room.
fn unread() -> [Stdio; 2] {
    let (_, writer) = std::io::pipe().unwrap();
    [writer.into(), File::options().write(true).open("/dev/full").unwrap().into()]
}

#[test]
fn output_that_nobody_takes_stops_no_run() {
    for (out, err) in unread().into_iter().zip(unread()) {
        let sandbox = Sandbox::new();
        let before = sandbox.tree();
        let release = sandbox.path("release");
        let args = ["install-server", "--offline-dir", &release, "--yes", "--timeout", "20s"];
        let mut command = sandbox.command(&args);
        assert_eq!(command.stdout(out).stderr(err).status().unwrap().code(), Some(0));
        let log = std::fs::read_dir(sandbox.root().join("var/log/pipeops")).unwrap().next();
        let log = std::fs::read_to_string(log.unwrap().unwrap().path()).unwrap();
        assert!(log.contains("start k3s.service"), "{log}");

        for (args, code) in [
            (&["cluster-info"][..], 13),
            (&["install-server", "--no-such-flag"][..], 2),
            (&["install-server", "--events", "json", "--node-type", "x"][..], 2),
            (&["uninstall", "--yes", "--events", "json"][..], 0),
        ] {
            let [out, err] = unread();
            let mut command = sandbox.command(args);
            let ended = command.stdout(out).stderr(err).status().unwrap().code();
            assert_eq!(ended, Some(code), "{args:?}");
        }
        assert_same_tree(&sandbox.tree(), &before, "");
    }
}

/// Logs go the same way: the agent writes its own for as long as it lives.
#[test]
fn an_agent_whose_log_nobody_takes_goes_on() {
    for err in unread() {
        let sandbox = Sandbox::new();
        let mut child = sandbox.command(&["run"]).stderr(err).spawn().unwrap();
        let socket = sandbox.root().join(&pipeops::host::paths::AGENT_SOCKET[1..]);
        let begin = Instant::now();
        while !socket.exists() {
            assert_eq!(child.try_wait().unwrap(), None, "it ended");
            assert!(begin.elapsed() < Duration::from_secs(30), "it never served");
            std::thread::sleep(Duration::from_millis(20));
        }
        send(&child, SIGTERM);
        assert_eq!(ends(&mut child, Duration::from_secs(20)), Some(0));
    }
}
