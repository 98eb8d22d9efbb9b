//! Downloads, from a web server that plays the release site and its moods.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::support::{RunOutput, Sandbox, VERSION, assert_same_tree, sha256};

/// How the server treats one path.
#[derive(Clone, Debug)]
pub(crate) enum Behavior {
    Good,
    Status(u16),
    /// Sends half, then closes; a request with a range goes well.
    CutOnce,
    /// Sends half, then nothing for ever.
    Stall,
    /// Sends nothing beyond half of the whole, however often asked.
    StallAlways,
    /// Redirects.
    To(String),
}

/// Path → body and how it is served.
type Files = Arc<Mutex<BTreeMap<String, (Vec<u8>, Behavior)>>>;

/// A web server that speaks just enough HTTP to be rude.
pub(crate) struct Site {
    pub(crate) url: String,
    files: Files,
    pub(crate) log: Arc<Mutex<Vec<String>>>,
}

impl Site {
    pub(crate) fn start() -> Site {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let site = Site { url, files: Arc::default(), log: Arc::default() };
        let (files, log) = (site.files.clone(), site.log.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (files, log) = (files.clone(), log.clone());
                std::thread::spawn(move || serve(stream, &files, &log));
            }
        });
        site
    }

    /// What is served under a path.
    pub(crate) fn body(&self, path: &str) -> Vec<u8> {
        self.files.lock().unwrap()[path].0.clone()
    }

    pub(crate) fn put(&self, path: &str, body: &[u8], mood: Behavior) {
        self.files.lock().unwrap().insert(path.into(), (body.to_vec(), mood));
    }
}

fn serve(
    mut stream: TcpStream,
    files: &Mutex<BTreeMap<String, (Vec<u8>, Behavior)>>,
    log: &Mutex<Vec<String>>,
) {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") && stream.read(&mut byte).is_ok_and(|n| n == 1) {
        head.push(byte[0]);
    }
    let head = String::from_utf8_lossy(&head).into_owned();
    let path = head.split(' ').nth(1).unwrap_or_default().to_owned();
    let range = head.lines().find_map(|l| {
        l.to_lowercase().strip_prefix("range: bytes=")?.trim_end_matches('-').parse::<usize>().ok()
    });
    log.lock().unwrap().push(format!("{path} {}", range.unwrap_or(0)));
    let found = files.lock().unwrap().get(&path).cloned();
    let Some((body, mood)) = found else {
        let _ = stream
            .write_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
        return;
    };
    let from = range.unwrap_or(0).min(body.len());
    let rest = &body[from..];
    let status = if from > 0 {
        format!(
            "206 Partial Content\r\nContent-Range: bytes {from}-{}/{}",
            body.len() - 1,
            body.len()
        )
    } else {
        "200 OK".into()
    };
    let mut answer = |first: &str, length: usize, body: &[u8]| {
        let head =
            format!("HTTP/1.1 {first}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n");
        stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body))
    };
    let half = match mood {
        Behavior::CutOnce | Behavior::Stall => rest.len() / 2,
        Behavior::StallAlways => (body.len() / 2).saturating_sub(from),
        _ => rest.len(),
    };
    let _ = match mood {
        Behavior::Status(code) => answer(&format!("{code} No"), 0, b""),
        Behavior::To(target) => answer(&format!("302 Found\r\nLocation: {target}"), 0, b""),
        Behavior::CutOnce if from == 0 => answer(&status, rest.len(), &rest[..half]),
        Behavior::Stall | Behavior::StallAlways => {
            let _ = answer(&status, rest.len(), &rest[..half]);
            std::thread::sleep(Duration::from_secs(120));
            Ok(())
        }
        _ => answer(&status, rest.len(), rest),
    };
}

const ESCAPED: &str = "v1.36.2%2Bk3s1";

/// A sandbox, and a site with the release in it.
fn site() -> (Sandbox, Site, Vec<u8>) {
    let (sandbox, site) = (Sandbox::new(), Site::start());
    let k3s = std::fs::read(sandbox.path("release/k3s")).unwrap();
    site.put(&format!("/{ESCAPED}/k3s"), &k3s, Behavior::Good);
    site.put(
        &format!("/{ESCAPED}/sha256sum-amd64.txt"),
        format!("{}  k3s\n", sha256(&k3s)).as_bytes(),
        Behavior::Good,
    );
    (sandbox, site, k3s)
}

fn install(sandbox: &Sandbox, official: &str, more: &[&str]) -> RunOutput {
    let mut args = vec!["install-server", "--yes", "--components", "none", "--timeout", "20s"];
    args.extend(more);
    sandbox.run_with(
        &args,
        &[("PIPEOPS_TEST_RELEASES", official), ("PIPEOPS_TEST_CHANNELS", official)],
    )
}

#[test]
fn a_download_is_verified_against_the_official_list_and_says_so() {
    let (sandbox, site, _) = site();
    let said = install(&sandbox, &site.url, &[]).ended(0);
    assert!(said.err.contains("the weaker check"), "{}", said.err);
}

#[test]
fn a_cut_download_is_resumed() {
    let (sandbox, site, k3s) = site();
    site.put(&format!("/{ESCAPED}/k3s"), &k3s, Behavior::CutOnce);
    install(&sandbox, &site.url, &[]).ended(0);
    let log = site.log.lock().unwrap().clone();
    assert!(log.contains(&format!("/{ESCAPED}/k3s {}", k3s.len() / 2)), "{log:?}");
}

#[test]
fn a_mirror_is_not_believed_about_itself() {
    let (sandbox, official, _) = site();
    let mirror = Site::start();
    let evil = b"#!/bin/sh\necho evil\n";
    mirror.put(&format!("/{ESCAPED}/k3s"), evil, Behavior::Good);
    mirror.put(
        &format!("/{ESCAPED}/sha256sum-amd64.txt"),
        format!("{}  k3s\n", sha256(evil)).as_bytes(),
        Behavior::Good,
    );
    let said = install(&sandbox, &official.url, &["--artifact-url", &mirror.url]).ended(6);
    assert!(said.err.contains("DIGEST_MISMATCH"), "{}", said.err);
    assert!(!sandbox.root().join("usr/local/bin/k3s").exists());
    // without the official list nobody vouches
    let other = Sandbox::new();
    let before = other.tree();
    let said = install(&other, "http://127.0.0.1:9", &["--artifact-url", &mirror.url]).ended(6);
    assert!(
        said.err.contains("DIGEST_UNKNOWN") && said.err.contains("--k3s-sha256"),
        "{}",
        said.err
    );
    assert_same_tree(&other.tree(), &before, "");
    // and with a digest by hand the mirror will do
    install(
        &other,
        "http://127.0.0.1:9",
        &["--artifact-url", &mirror.url, "--k3s-sha256", &sha256(evil)],
    )
    .ended(0);
}

#[test]
fn a_k3s_of_the_offline_directory_that_does_not_tell_its_version_says_why() {
    let sandbox = Sandbox::new();
    let before = sandbox.tree();
    for (program, why) in [
        (
            "#!/bin/sh\necho 'k3s: out of memory' >&2; exit 3\n",
            "status 3 and said: k3s: out of memory",
        ),
        ("#!/bin/sh\n", "status 0 and said: nothing"),
        ("#!/there/is/no/shell\n", "No such file or directory"),
    ] {
        sandbox.release_of(program);
        let said = sandbox.install(&[]).ended(2);
        assert!(
            said.err.contains("K3S_VERSION_UNKNOWN") && said.err.contains(why),
            "{why}: {}",
            said.err
        );
        assert_same_tree(&sandbox.tree(), &before, why);
    }
}

#[test]
fn missing_and_refused_files_have_their_own_words() {
    let (sandbox, site, k3s) = site();
    let before = sandbox.tree();
    let said = install(&sandbox, &site.url, &["--k3s-version", "v1.36.9+k3s1"]).ended(5);
    assert!(said.err.contains("K3S_VERSION_UNKNOWN"), "{}", said.err);
    assert_same_tree(&sandbox.tree(), &before, "");
    site.put(&format!("/{ESCAPED}/sha256sum-amd64.txt"), b"nothing here\n", Behavior::Good);
    let said = install(&sandbox, &site.url, &[]).ended(6);
    assert!(said.err.contains("DIGEST_UNKNOWN"), "{}", said.err);
    assert_same_tree(&sandbox.tree(), &before, "");
    site.put(
        &format!("/{ESCAPED}/sha256sum-amd64.txt"),
        format!("{}  k3s\n", sha256(&k3s)).as_bytes(),
        Behavior::Status(500),
    );
    let said = install(&sandbox, &site.url, &[]).ended(5);
    assert!(said.err.contains("500"), "{}", said.err);
    assert_same_tree(&sandbox.tree(), &before, "");
}

#[test]
fn a_stalling_server_is_given_up_and_a_rerun_resumes() {
    let (sandbox, site, k3s) = site();
    site.put(&format!("/{ESCAPED}/k3s"), &k3s, Behavior::Stall);
    let mut child = sandbox
        .command(&["install-server", "--yes", "--components", "none", "--timeout", "20s"])
        .envs([("PIPEOPS_TEST_RELEASES", &site.url)])
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    // in the middle of the download: half of it is on disk
    let part = || {
        std::fs::read_dir(sandbox.root().join("usr/local/bin")).unwrap().flatten().any(|e| {
            e.file_name().to_string_lossy().ends_with(".part")
                && e.metadata().unwrap().len() == (k3s.len() / 2) as u64
        })
    };
    while !part() {
        assert!(child.try_wait().unwrap().is_none(), "it ended before the download");
        std::thread::sleep(Duration::from_millis(20));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    site.put(&format!("/{ESCAPED}/k3s"), &k3s, Behavior::Good);
    install(&sandbox, &site.url, &[]).ended(0);
    let log = site.log.lock().unwrap().clone();
    assert!(log.contains(&format!("/{ESCAPED}/k3s {}", k3s.len() / 2)), "{log:?}");
    assert!(!sandbox.tree().keys().any(|k| k.ends_with(".part")));
}

/// Takes the real time-outs: a stall is 15 s, a few in a row are the end.
#[test]
fn a_server_that_always_stalls_ends_the_run() {
    let (sandbox, site, k3s) = site();
    site.put(&format!("/{ESCAPED}/k3s"), &k3s, Behavior::StallAlways);
    let said = install(&sandbox, &site.url, &[]).ended(5);
    assert!(said.err.contains("the download resumes"), "{}", said.err);
    assert!(!sandbox.root().join("usr/local/bin/k3s").exists());
}

#[test]
fn a_channel_is_a_redirect_or_an_error() {
    let (sandbox, site, _) = site();
    site.put(
        "/stable",
        b"",
        Behavior::To(format!("https://github.com/k3s-io/k3s/releases/tag/{VERSION}")),
    );
    site.put("/latest", b"stable", Behavior::Good);
    let said = install(&sandbox, &site.url, &["--channel", "latest"]).ended(5);
    assert!(said.err.contains("instead of a redirect"), "{}", said.err);
    let said = install(&sandbox, &site.url, &["--channel", "stable"]).ended(0);
    assert!(said.out.contains(VERSION), "{}", said.out);
}

#[test]
fn sigint_in_a_download_ends_with_130_and_says_how_to_go_on() {
    let (sandbox, site, k3s) = site();
    site.put(&format!("/{ESCAPED}/k3s"), &k3s, Behavior::Stall);
    let child = sandbox
        .command(&["install-server", "--yes", "--components", "none"])
        .envs([("PIPEOPS_TEST_RELEASES", &site.url)])
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    while !site.log.lock().unwrap().iter().any(|l| l.contains("/k3s ")) {
        std::thread::sleep(Duration::from_millis(20));
    }
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(child.id().try_into().unwrap()),
        nix::sys::signal::Signal::SIGINT,
    )
    .unwrap();
    let said = crate::support::run_output(child.wait_with_output().unwrap()).ended(130);
    assert!(said.err.contains("run the same command again"), "{}", said.err);
    site.put(&format!("/{ESCAPED}/k3s"), &k3s, Behavior::Good);
    install(&sandbox, &site.url, &[]).ended(0);
}
