//! `scripts/install.sh` and `join-worker.sh` under three shells, from a web server that plays the release site.

use std::process::{Command, Stdio};

use crate::release::{Mood, Site};
use crate::support::{Said, said, sha256};

const SCRIPTS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts");
/// Plays pipeops: tells how it was called and what it was handed.
const PROGRAM: &str = "#!/bin/sh\necho \"args: $*\"\ncase \"$*\" in *' -'*) echo \"input: $(cat)\" ;; esac\nenv | grep -c planted-4711 | sed 's/^/in env: /'\nexit ${FAKE_EXIT:-0}\n";

/// Shells on this machine; a missing one is said, not passed over.
fn shells() -> Vec<Vec<&'static str>> {
    let all = [vec!["dash"], vec!["bash"], vec!["busybox", "sh"]];
    all.into_iter()
        .filter(|shell| {
            let there = Command::new(shell[0]).args(&shell[1..]).args(["-c", "true"]).stderr(Stdio::null()).status().is_ok_and(|s| s.success());
            if !there {
                println!("NOT RUN: {} is not on this machine", shell.join(" "));
            }
            there
        })
        .collect()
}

fn site() -> Site {
    let site = Site::start();
    let list = ["amd64", "arm64", "arm"].map(|a| format!("{}  pipeops-linux-{a}\n", sha256(PROGRAM.as_bytes()))).concat();
    site.put("/sha256sums.txt", list.as_bytes(), Mood::Good);
    for arch in ["amd64", "arm64", "arm"] {
        site.put(&format!("/pipeops-linux-{arch}"), PROGRAM.as_bytes(), Mood::Good);
    }
    site
}

/// A directory with programs in front of the machine's own: who we are, and sudo.
fn programs(uid: u32) -> tempfile::TempDir {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    for (name, text) in
        [("id", format!("#!/bin/sh\necho {uid}\n")), ("sudo", "#!/bin/sh\necho \"sudo: yes\"\nexec env -i PATH=/usr/bin:/bin \"$@\"\n".to_owned())]
    {
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    }
    dir
}

/// busybox' shell asks its own `id`, not the one of the test: as root it sees no need for sudo.
fn by_sudo(shell: &[&str]) -> &'static str {
    if shell[0] == "busybox" && nix::unistd::geteuid().is_root() { "" } else { "sudo: yes\n" }
}

fn run(shell: &[&str], script: &str, args: &[&str], url: &str, env: &[(&str, &str)], uid: u32) -> Said {
    let programs = programs(uid);
    let path = format!("{}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", programs.path().display());
    let mut command = Command::new(shell[0]);
    command.args(&shell[1..]).arg(format!("{SCRIPTS}/{script}")).args(args);
    command.env_clear().env("PATH", path).env("PIPEOPS_RELEASE_URL", url).envs(env.iter().copied()).stdin(Stdio::null());
    said(command.output().unwrap())
}

#[test]
fn a_good_release_is_verified_and_handed_over_to() {
    let site = site();
    for shell in shells() {
        let plain = run(&shell, "install.sh", &[], &site.url, &[], 0).ended(0);
        assert!(plain.out.contains("args: install-server --yes\n"), "{shell:?} {}", plain.out);
        let env = [
            ("AGENT_TOKEN", "planted-4711"),
            ("CLUSTER_NAME", "prod"),
            ("PIPEOPS_CONTROL_PLANE_URL", "https://cp"),
            ("PIPEOPS_CONTROL_PLANE_PIN", "sha256:x"),
            ("LOG_LEVEL", "debug"),
        ];
        let server = run(&shell, "install.sh", &[], &site.url, &env, 0).ended(0);
        let wanted = "args: install-server --control-plane-url https://cp --control-plane-pin sha256:x --cluster-name prod --agent-token-file - --yes --log-level debug\ninput: planted-4711\nin env: 0\n";
        assert_eq!(server.out, wanted, "{shell:?}");
        let env = [("NODE_TYPE", "agent"), ("K3S_URL", "https://m:6443"), ("K3S_TOKEN", "planted-4711")];
        let worker = run(&shell, "install.sh", &[], &site.url, &env, 1000).ended(0);
        let wanted = "args: join-worker https://m:6443 --token-file - --yes\ninput: planted-4711\nin env: 0\n";
        assert_eq!(worker.out, format!("{}{wanted}", by_sudo(&shell)), "{shell:?}");
        let info = run(&shell, "install.sh", &["cluster-info", "--join"], &site.url, &[], 0).ended(0);
        assert!(info.out.starts_with("args: cluster-info --join\n"), "{}", info.out);
    }
}

#[test]
fn it_works_through_a_pipe() {
    let site = site();
    for shell in shells() {
        let programs = programs(1000);
        let mut command = Command::new(shell[0]);
        command
            .args(&shell[1..])
            .env_clear()
            .env("PATH", format!("{}:/usr/bin:/bin", programs.path().display()))
            .env("PIPEOPS_RELEASE_URL", &site.url)
            .env("AGENT_TOKEN", "planted-4711");
        command.stdin(std::fs::File::open(format!("{SCRIPTS}/install.sh")).unwrap());
        let answer = said(command.output().unwrap()).ended(0);
        assert!(answer.out.starts_with(by_sudo(&shell)) && answer.out.contains("input: planted-4711"), "{shell:?} {}", answer.out);
        // cut off on the way: nothing runs
        let half = std::fs::read_to_string(format!("{SCRIPTS}/install.sh")).unwrap();
        let cut = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(cut.path(), &half[..half.len() / 2]).unwrap();
        let mut command = Command::new(shell[0]);
        command
            .args(&shell[1..])
            .env_clear()
            .env("PATH", "/usr/bin:/bin")
            .env("PIPEOPS_RELEASE_URL", &site.url)
            .stdin(std::fs::File::open(cut.path()).unwrap());
        assert!(!said(command.output().unwrap()).out.contains("args:"), "{shell:?}");
    }
}

#[test]
fn a_bad_release_is_refused() {
    for (path, body, mood, code, text) in [
        ("/pipeops-linux-amd64", &PROGRAM.as_bytes()[..40], Mood::Good, 6, "damaged or not genuine"),
        ("/pipeops-linux-amd64", b"#!/bin/sh\necho evil\n", Mood::Good, 6, "damaged or not genuine"),
        ("/sha256sums.txt", b"nothing\n", Mood::Good, 6, "does not list"),
        ("/sha256sums.txt", b"", Mood::Status(404), 5, "cannot download"),
        ("/pipeops-linux-amd64", b"", Mood::Status(500), 5, "cannot download"),
        ("/pipeops-linux-amd64", PROGRAM.as_bytes(), Mood::CutOnce, 5, "cannot download"),
    ] {
        let site = site();
        for arch in ["amd64", "arm64", "arm"] {
            site.put(&path.replace("amd64", arch), body, mood.clone());
        }
        for shell in shells() {
            let answer = run(&shell, "install.sh", &[], &site.url, &[], 0);
            assert_eq!(answer.code, code, "{shell:?} {path} {}", answer.err);
            assert!(answer.err.contains(text), "{shell:?} {}", answer.err);
            assert!(!answer.out.contains("args:") && !answer.out.contains("evil"), "{}", answer.out);
        }
    }
}

/// Three tries of 15 s each: one shell has to do.
#[test]
fn a_release_site_that_stalls_is_given_up() {
    let site = site();
    for arch in ["amd64", "arm64", "arm"] {
        site.put(&format!("/pipeops-linux-{arch}"), PROGRAM.as_bytes(), Mood::Stall);
    }
    let answer = run(&["sh"], "install.sh", &[], &site.url, &[], 0).ended(5);
    assert!(answer.err.contains("cannot download") && !answer.out.contains("args:"), "{}", answer.err);
}

#[test]
fn wrong_variables_and_exit_codes_come_through() {
    let site = site();
    for shell in shells() {
        run(&shell, "install.sh", &[], &site.url, &[("NODE_TYPE", "boss")], 0).ended(2);
        run(&shell, "install.sh", &[], &site.url, &[("NODE_TYPE", "agent")], 0).ended(2);
        run(&shell, "install.sh", &[], &site.url, &[("FAKE_EXIT", "12")], 0).ended(12);
        run(&shell, "join-worker.sh", &[], &site.url, &[], 0).ended(2);
        run(&shell, "join-worker.sh", &["10.0.0.1"], &site.url, &[], 0).ended(2);
        for (typed, url) in [("10.0.0.1", "https://10.0.0.1:6443"), ("fd00::1", "https://[fd00::1]:6443"), ("cp:7443", "https://cp:7443")] {
            let answer = run(&shell, "join-worker.sh", &[typed, "planted-4711"], &site.url, &[], 0).ended(0);
            assert!(answer.out.contains(&format!("args: join-worker {url} --token-file - --yes\ninput: planted-4711")), "{}", answer.out);
        }
    }
}

#[test]
fn shellcheck_is_content() {
    let files = ["install.sh", "join-worker.sh", "vm", "try", "kube-parts", "parts", "bench", "release-digests"].map(|f| format!("{SCRIPTS}/{f}"));
    match Command::new("shellcheck").args(["-S", "warning"]).args(files).output() {
        Err(_) => println!("NOT RUN: shellcheck is not on this machine"),
        Ok(output) => {
            let answer = said(output);
            assert_eq!(answer.code, 0, "{}", answer.out);
        }
    }
}
