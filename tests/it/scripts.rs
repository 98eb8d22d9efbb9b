//! `scripts/install.sh` and `join-worker.sh` under three shells, from a web server that plays the
//! release site.

use std::process::{Command, Stdio};

use crate::release::{Behavior, Site};
use crate::support::{RunOutput, run_output, sha256};

const SCRIPTS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts");
/// Plays pipeops: tells how it was called and what it was handed.
const PROGRAM: &str = "#!/bin/sh\necho \"args: $*\"\ncase \"$*\" in *' -'*) echo \"input: $(cat)\" ;; esac\nenv | grep -c planted-canary-4711-in-plain-text | sed 's/^/in env: /'\nexit ${FAKE_EXIT:-0}\n";

/// Shells on this machine; a missing one is said, not passed over.
fn shells() -> Vec<Vec<&'static str>> {
    let all = [vec!["dash"], vec!["bash"], vec!["busybox", "sh"]];
    all.into_iter()
        .filter(|shell| {
            let there = Command::new(shell[0])
                .args(&shell[1..])
                .args(["-c", "true"])
                .stderr(Stdio::null())
                .status()
                .is_ok_and(|s| s.success());
            if !there {
                println!("NOT RUN: {} is not on this machine", shell.join(" "));
            }
            there
        })
        .collect()
}

fn site() -> Site {
    let site = Site::start();
    let list = ["amd64", "arm64", "arm"]
        .map(|a| format!("{}  pipeops-linux-{a}\n", sha256(PROGRAM.as_bytes())))
        .concat();
    site.put("/sha256sums.txt", list.as_bytes(), Behavior::Good);
    for arch in ["amd64", "arm64", "arm"] {
        site.put(&format!("/pipeops-linux-{arch}"), PROGRAM.as_bytes(), Behavior::Good);
    }
    site
}

/// A directory with programs in front of the machine's own: who we are, and sudo.
fn programs(uid: u32) -> tempfile::TempDir {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    for (name, text) in [
        ("id", format!("#!/bin/sh\necho {uid}\n")),
        (
            "sudo",
            "#!/bin/sh\necho \"sudo: yes\"\nexec env -i PATH=/usr/bin:/bin \"$@\"\n".to_owned(),
        ),
    ] {
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

fn run(
    shell: &[&str],
    script: &str,
    args: &[&str],
    url: &str,
    env: &[(&str, &str)],
    uid: u32,
) -> RunOutput {
    let programs = programs(uid);
    let path =
        format!("{}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", programs.path().display());
    let mut command = Command::new(shell[0]);
    command.args(&shell[1..]).arg(format!("{SCRIPTS}/{script}")).args(args);
    command
        .env_clear()
        .env("PATH", path)
        .env("PIPEOPS_RELEASE_URL", url)
        .envs(env.iter().copied())
        .stdin(Stdio::null());
    run_output(command.output().unwrap())
}

#[test]
fn a_good_release_is_verified_and_handed_over_to() {
    let site = site();
    for shell in shells() {
        let plain = run(&shell, "install.sh", &[], &site.url, &[], 0).ended(0);
        assert!(plain.out.contains("args: install-server --yes\n"), "{shell:?} {}", plain.out);
        let env = [
            ("AGENT_TOKEN", "planted-canary-4711-in-plain-text"),
            ("CLUSTER_NAME", "prod"),
            ("CLUSTER_LABELS", "env=prod,tier=web"),
            ("PIPEOPS_CONTROL_PLANE_URL", "https://cp"),
            ("PIPEOPS_CONTROL_PLANE_PIN", "sha256:x"),
            ("LOG_LEVEL", "debug"),
        ];
        let server = run(&shell, "install.sh", &[], &site.url, &env, 0).ended(0);
        let expected = "args: install-server --control-plane-url https://cp --control-plane-pin sha256:x --cluster-name prod --cluster-label env=prod,tier=web --agent-token-file - --yes --log-level debug\ninput: planted-canary-4711-in-plain-text\nin env: 0\n";
        assert_eq!(server.out, expected, "{shell:?}");
        let env = [
            ("NODE_TYPE", "agent"),
            ("K3S_URL", "https://m:6443"),
            ("K3S_TOKEN", "planted-canary-4711-in-plain-text"),
        ];
        let worker = run(&shell, "install.sh", &[], &site.url, &env, 1000).ended(0);
        let expected = "args: join-worker https://m:6443 --token-file - --yes\ninput: planted-canary-4711-in-plain-text\nin env: 0\n";
        assert_eq!(worker.out, format!("{}{expected}", by_sudo(&shell)), "{shell:?}");
        let info =
            run(&shell, "install.sh", &["cluster-info", "--join"], &site.url, &[], 0).ended(0);
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
            .env("AGENT_TOKEN", "planted-canary-4711-in-plain-text");
        command.stdin(std::fs::File::open(format!("{SCRIPTS}/install.sh")).unwrap());
        let answer = run_output(command.output().unwrap()).ended(0);
        assert!(
            answer.out.starts_with(by_sudo(&shell))
                && answer.out.contains("input: planted-canary-4711-in-plain-text"),
            "{shell:?} {}",
            answer.out
        );
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
        assert!(!run_output(command.output().unwrap()).out.contains("args:"), "{shell:?}");
    }
}

#[test]
fn a_bad_release_is_refused() {
    for (path, body, mood, code, text) in [
        (
            "/pipeops-linux-amd64",
            &PROGRAM.as_bytes()[..40],
            Behavior::Good,
            6,
            "damaged or not genuine",
        ),
        (
            "/pipeops-linux-amd64",
            b"#!/bin/sh\necho evil\n",
            Behavior::Good,
            6,
            "damaged or not genuine",
        ),
        ("/sha256sums.txt", b"nothing\n", Behavior::Good, 6, "does not list"),
        ("/sha256sums.txt", b"", Behavior::Status(404), 5, "cannot download"),
        ("/pipeops-linux-amd64", b"", Behavior::Status(500), 5, "cannot download"),
        ("/pipeops-linux-amd64", PROGRAM.as_bytes(), Behavior::CutOnce, 5, "cannot download"),
    ] {
        let site = site();
        for arch in ["amd64", "arm64", "arm"] {
            site.put(&path.replace("amd64", arch), body, mood.clone());
        }
        for shell in shells() {
            let answer = run(&shell, "install.sh", &[], &site.url, &[], 0);
            assert_eq!(answer.code, code, "{shell:?} {path} {}", answer.err);
            assert!(answer.err.contains(text), "{shell:?} {}", answer.err);
            assert!(
                !answer.out.contains("args:") && !answer.out.contains("evil"),
                "{}",
                answer.out
            );
        }
    }
}

/// Three tries of 15 s each: one shell has to do.
#[test]
fn a_release_site_that_stalls_is_given_up() {
    let site = site();
    for arch in ["amd64", "arm64", "arm"] {
        site.put(&format!("/pipeops-linux-{arch}"), PROGRAM.as_bytes(), Behavior::Stall);
    }
    let answer = run(&["sh"], "install.sh", &[], &site.url, &[], 0).ended(5);
    assert!(
        answer.err.contains("cannot download") && !answer.out.contains("args:"),
        "{}",
        answer.err
    );
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
        let swapped = run(
            &shell,
            "join-worker.sh",
            &["K10planted-canary-4711-in-plain-text", "10.0.0.1"],
            &site.url,
            &[],
            0,
        )
        .ended(2);
        assert!(
            swapped.err.contains("MASTER comes first")
                && !swapped.err.contains("canary-4711-in-plain-text"),
            "{}",
            swapped.err
        );
        for (typed, url) in [
            ("10.0.0.1", "https://10.0.0.1:6443"),
            ("fd00::1", "https://[fd00::1]:6443"),
            ("cp:7443", "https://cp:7443"),
            ("[fd00::1]:7443", "https://[fd00::1]:7443"),
        ] {
            let answer = run(
                &shell,
                "join-worker.sh",
                &[typed, "planted-canary-4711-in-plain-text"],
                &site.url,
                &[],
                0,
            )
            .ended(0);
            assert!(
                answer.out.contains(&format!("args: join-worker {url} --token-file - --yes\ninput: planted-canary-4711-in-plain-text")),
                "{}",
                answer.out
            );
        }
    }
}

#[test]
fn shellcheck_is_content() {
    let mut files = Vec::new();
    for dir in ["scripts", "tests/vm", "tests/vm/scenarios", ".ci"] {
        let entries =
            std::fs::read_dir(std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(dir)).unwrap();
        files.extend(entries.map(|entry| entry.unwrap().path()).filter(|path| path.is_file()));
    }
    assert!(files.len() > 20, "{files:?}");
    match Command::new("shellcheck").args(["-S", "warning"]).args(files).output() {
        Err(_) => println!("NOT RUN: shellcheck is not on this machine"),
        Ok(output) => {
            let answer = run_output(output);
            assert_eq!(answer.code, 0, "{}", answer.out);
        }
    }
}

/// A directory that someone else prepared: whatever a script could stumble over, each telling that
/// it ran, and with what.
fn hostile() -> tempfile::TempDir {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let evil = "#!/bin/sh\necho \"evil: $0 $*\"\nenv\n";
    let names = [
        "install.sh",
        "join-worker.sh",
        "agent",
        "pipeops",
        "pipeops-linux-amd64",
        "sh",
        "bash",
        "dash",
        "busybox",
        "curl",
        "wget",
        "sudo",
        "id",
        "mktemp",
        "ls",
        "readlink",
        "awk",
        "sha256sum",
        "uname",
        "df",
        "rc",
        "main",
    ];
    for name in names {
        std::fs::write(dir.path().join(name), evil).unwrap();
        std::fs::set_permissions(dir.path().join(name), std::fs::Permissions::from_mode(0o755))
            .unwrap();
    }
    dir
}

/// The scripts as a release site serves them, laid out by `scripts/release-site`.
fn laid_out() -> (Site, tempfile::TempDir) {
    let (site, dir) = (Site::start(), tempfile::tempdir().unwrap());
    let program = dir.path().join("built");
    std::fs::write(&program, PROGRAM).unwrap();
    let out = dir.path().join("site");
    let programs = ["amd64", "arm64", "arm"].map(|a| format!("{a}={}", program.display()));
    let status =
        Command::new(format!("{SCRIPTS}/release-site")).arg(&out).args(programs).status().unwrap();
    assert!(status.success());
    for file in std::fs::read_dir(&out).unwrap().flatten() {
        let name = file.file_name().into_string().unwrap();
        site.put(&format!("/{name}"), &std::fs::read(file.path()).unwrap(), Behavior::Good);
    }
    (site, dir)
}

/// `SHELL -s ARGS < script`, as `curl … | SHELL -s ARGS` runs it.
fn piped(
    shell: &[&str],
    script: &[u8],
    args: &[&str],
    cwd: &std::path::Path,
    path: &str,
    env: &[(&str, &str)],
) -> RunOutput {
    use std::io::Write as _;
    let mut command = Command::new(format!("/usr/bin/{}", shell[0]));
    command
        .args(&shell[1..])
        .arg("-s")
        .args(args)
        .current_dir(cwd)
        .env_clear()
        .env("PATH", path)
        .envs(env.iter().copied());
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(script).unwrap();
    run_output(child.wait_with_output().unwrap())
}

const CANARY: &str = "K10planted-4711-canary-of-a-join-token::server:pw";
const JOINED: &str = "args: join-worker https://10.0.0.1:6443 --token-file - --yes\ninput: K10planted-4711-canary-of-a-join-token::server:pw\nin env: 0\n";

#[test]
fn the_one_liners_run_nothing_of_the_current_directory() {
    let (site, _dir) = laid_out();
    let get = |name: &str| site.body(name);
    for shell in shells() {
        let cwd = hostile();
        let programs = programs(0);
        let fine = format!("{}:/usr/bin:/bin", programs.path().display());
        let env = |more: &[(&'static str, &'static str)]| {
            let mut env = vec![
                ("PIPEOPS_RELEASE_URL", site.url.as_str()),
                ("CDPATH", "."),
                ("ENV", "./rc"),
                ("OLDPWD", "/"),
                ("HOME", "."),
            ];
            env.extend(more);
            env
        };
        for path in [
            fine.clone(),
            format!(".:{fine}"),
            format!(":{fine}:"),
            format!("{fine}::.:./"),
            ".".to_owned(),
        ] {
            let answer = piped(
                &shell,
                &get("/join-worker"),
                &["10.0.0.1", CANARY],
                cwd.path(),
                &path,
                &env(&[]),
            )
            .ended(0);
            assert_eq!(answer.out, JOINED, "{shell:?} {path}\n{}", answer.err);
            let answer = piped(
                &shell,
                &get("/join-worker"),
                &["10.0.0.1"],
                cwd.path(),
                &path,
                &env(&[("K3S_TOKEN", CANARY)]),
            )
            .ended(0);
            assert_eq!(answer.out, JOINED, "{shell:?} {path}\n{}", answer.err);
            let answer = piped(
                &shell,
                &get("/agent"),
                &[],
                cwd.path(),
                &path,
                &env(&[("AGENT_TOKEN", CANARY)]),
            )
            .ended(0);
            assert_eq!(
                answer.out,
                format!(
                    "args: install-server --agent-token-file - --yes\ninput: {CANARY}\nin env: 0\n"
                ),
                "{shell:?} {path}"
            );
        }
        // a trace of the shell shows no token that came by variable
        let mut traced = shell.clone();
        traced.push("-x");
        let answer = piped(
            &traced,
            &get("/agent"),
            &[],
            cwd.path(),
            &fine,
            &env(&[("AGENT_TOKEN", CANARY)]),
        )
        .ended(0);
        assert!(!answer.err.contains("canary"), "{shell:?} {}", answer.err);
    }
}

#[test]
fn a_script_uses_the_one_beside_it_only_where_nobody_else_can_change_it() {
    use std::os::unix::fs::{PermissionsExt, symlink};
    let (site, _dir) = laid_out();
    let mode = |path: &std::path::Path, mode: u32| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap()
    };
    for shell in shells() {
        let home = tempfile::tempdir().unwrap();
        let dir = home.path().join("with blanks");
        std::fs::create_dir(&dir).unwrap();
        let script = dir.join("join-worker.sh");
        std::fs::write(&script, site.body("/join-worker")).unwrap();
        let beside = dir.join("install.sh");
        std::fs::write(
            &beside,
            "echo \"beside: $NODE_TYPE $K3S_URL $K3S_TOKEN; $(env | grep -c canary)\"\nexit 0\n",
        )
        .unwrap();
        mode(&dir, 0o755);
        mode(&script, 0o755);
        let programs = programs(0);
        let path = format!("{}:/usr/bin:/bin", programs.path().display());
        let cwd = hostile();
        let run = |script: &std::path::Path, cwd: &std::path::Path| {
            let mut command = Command::new(format!("/usr/bin/{}", shell[0]));
            command
                .args(&shell[1..])
                .arg(script)
                .args(["10.0.0.1", CANARY])
                .current_dir(cwd)
                .env_clear()
                .env("PATH", &path);
            run_output(
                command
                    .env("PIPEOPS_RELEASE_URL", &site.url)
                    .stdin(Stdio::null())
                    .output()
                    .unwrap(),
            )
            .ended(0)
        };
        let used = format!("beside: agent https://10.0.0.1:6443 {CANARY}; 0\n");
        assert_eq!(run(&script, cwd.path()).out, used, "{shell:?}");
        assert_eq!(run(std::path::Path::new("join-worker.sh"), &dir).out, used, "{shell:?}");
        // a link leads to the real one, never to what lies beside the link
        let link = cwd.path().join("link");
        symlink(&script, &link).unwrap();
        assert_eq!(run(&link, cwd.path()).out, used, "{shell:?}");
        // others can change it, its directory, or one above
        for (what, bad) in [
            (&beside, 0o666),
            (&beside, 0o664),
            (&dir, 0o777),
            (&dir, 0o1777),
            (&dir, 0o775),
            (&home.path().to_owned(), 0o777),
        ] {
            let good = std::fs::metadata(what).unwrap().permissions().mode();
            mode(what, bad);
            let answer = run(&script, cwd.path());
            assert_eq!(answer.out, JOINED, "{shell:?} {} {bad:o}", what.display());
            assert!(
                answer.err.contains("is not used: others than you and root can change it"),
                "{shell:?} {}",
                answer.err
            );
            mode(what, good);
        }
        // a link may point anywhere, also where others can write
        std::fs::rename(&beside, dir.join("other.sh")).unwrap();
        symlink("other.sh", &beside).unwrap();
        assert_eq!(run(&script, cwd.path()).out, JOINED, "{shell:?}");
        std::fs::remove_file(&beside).unwrap();
        std::fs::rename(dir.join("other.sh"), &beside).unwrap();
        if nix::unistd::geteuid().is_root() {
            std::os::unix::fs::chown(&beside, Some(12345), None).unwrap();
            assert_eq!(run(&script, cwd.path()).out, JOINED, "{shell:?}");
        } else {
            println!("NOT RUN: a file of somebody else's, which only root can make");
        }
        // through a pipe from within that very directory, it is not looked at
        assert_eq!(
            piped(
                &shell,
                &site.body("/join-worker"),
                &["10.0.0.1", CANARY],
                &dir,
                &path,
                &[("PIPEOPS_RELEASE_URL", &site.url)]
            )
            .out,
            JOINED
        );
    }
}

#[test]
fn what_is_installed_is_used_without_a_network() {
    use std::os::unix::fs::PermissionsExt;
    for shell in shells() {
        let programs = programs(0);
        let installed = programs.path().join("pipeops");
        std::fs::write(&installed, PROGRAM.replace("args:", "installed:")).unwrap();
        std::fs::set_permissions(&installed, std::fs::Permissions::from_mode(0o755)).unwrap();
        let ask = |script: &str, args: &[&str], url: &str, more: &[(&str, &str)]| {
            let mut command = Command::new(shell[0]);
            command
                .args(&shell[1..])
                .arg(format!("{SCRIPTS}/{script}"))
                .args(args)
                .env_clear()
                .envs(more.iter().copied());
            command
                .env("PATH", format!("{}:/usr/bin:/bin", programs.path().display()))
                .env("PIPEOPS_RELEASE_URL", url)
                .stdin(Stdio::null());
            run_output(command.output().unwrap())
        };
        let nobody = "http://127.0.0.1:9";
        for args in [
            &["cluster-info", "--join"][..],
            &["uninstall", "--purge-data"],
            &["doctor"],
            &["--help"],
        ] {
            let answer = ask("install.sh", args, nobody, &[]).ended(0);
            assert!(
                answer.out.starts_with(&format!("installed: {}\n", args.join(" "))),
                "{shell:?} {}",
                answer.out
            );
        }
        ask("install.sh", &["cluster-info"], nobody, &[("FAKE_EXIT", "13")]).ended(13);
        let again = ask("install.sh", &[], nobody, &[("AGENT_TOKEN", CANARY)]).ended(0);
        assert!(
            again.out.starts_with("installed: install-server --agent-token-file - --yes\n"),
            "{shell:?} {}",
            again.out
        );
        let join = ask("join-worker.sh", &["10.0.0.1", CANARY], nobody, &[]).ended(0);
        assert_eq!(join.out, JOINED.replace("args:", "installed:"), "{shell:?}");
        let (site, _dir) = laid_out();
        let update =
            ask("install.sh", &["cluster-info"], &site.url, &[("PIPEOPS_UPDATE", "1")]).ended(0);
        assert!(update.out.starts_with("args: cluster-info\n"), "{shell:?} {}", update.out);
        // one that cannot run, or that others can change, is passed over
        std::fs::write(&installed, b"\x7fELF of another machine").unwrap();
        assert!(
            ask("install.sh", &["cluster-info"], &site.url, &[])
                .ended(0)
                .out
                .starts_with("args: cluster-info\n"),
            "{shell:?}"
        );
        std::fs::write(&installed, PROGRAM.replace("args:", "installed:")).unwrap();
        std::fs::set_permissions(&installed, std::fs::Permissions::from_mode(0o777)).unwrap();
        assert!(
            ask("install.sh", &["cluster-info"], &site.url, &[])
                .ended(0)
                .out
                .starts_with("args: cluster-info\n"),
            "{shell:?}"
        );
    }
}

/// Runs install.sh where `mounts` (shell commands in a mount namespace of its own) have been
/// carried out before; `None` where this machine lets nobody mount.
fn on_a_machine_with(
    mounts: &str,
    shell: &[&str],
    url: &str,
    env: &[(&str, &str)],
    uid: u32,
) -> Option<RunOutput> {
    let can = Command::new("unshare")
        .args(["-m", "true"])
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|s| s.success());
    if !can || !nix::unistd::geteuid().is_root() {
        println!("NOT RUN: mounts of its own need root");
        return None;
    }
    // what the test itself needs must not lie below what is mounted over
    let programs = programs(uid);
    let keep = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let status =
        Command::new("cp").arg("-rT").arg(programs.path()).arg(keep.path()).status().unwrap();
    assert!(status.success());
    let mut command = Command::new("unshare");
    command
        .args(["-m", "/bin/sh", "-c", &format!("set -e\n{mounts}\nexec \"$@\""), "sh"])
        .args(shell)
        .arg(format!("{SCRIPTS}/install.sh"));
    command
        .env_clear()
        .env("PATH", format!("{}:/usr/bin:/bin:/usr/sbin:/sbin", keep.path().display()))
        .env("PIPEOPS_RELEASE_URL", url);
    Some(run_output(command.envs(env.iter().copied()).stdin(Stdio::null()).output().unwrap()))
}

const NOEXEC: &str = "mount -t tmpfs -o mode=1777,noexec tmpfs";

#[test]
fn a_tmp_in_which_nothing_runs_is_passed_over() {
    let (site, _dir) = laid_out();
    // it tells from where it runs
    let program = "#!/bin/sh\necho \"from: $0 $(umask)\"\n";
    let list = ["amd64", "arm64", "arm"]
        .map(|a| format!("{}  pipeops-linux-{a}\n", sha256(program.as_bytes())))
        .concat();
    site.put("/sha256sums.txt", list.as_bytes(), Behavior::Good);
    for arch in ["amd64", "arm64", "arm"] {
        site.put(&format!("/pipeops-linux-{arch}"), program.as_bytes(), Behavior::Good);
    }
    let mine = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let mine = mine.path().to_str().unwrap();
    let all = format!("for d in {mine} /tmp /var/tmp; do {NOEXEC} $d; done");
    let every = format!("{all}; for d in /var/lib /usr/local/lib /root; do {NOEXEC} $d; done");
    let full = format!("mount -t tmpfs -o mode=1777,size=1m tmpfs {mine}");
    let read_only = format!("mount -t tmpfs -o ro tmpfs {mine}");
    let without = "mount -t tmpfs tmpfs /mnt; mkdir /mnt/u /mnt/w; mount -t overlay -o lowerdir=/usr/bin,upperdir=/mnt/u,workdir=/mnt/w overlay /usr/bin || exit 77";
    let cases = [
        (format!("{NOEXEC} {mine}"), "from: /tmp/pipeops."),
        (full, "from: /tmp/pipeops."),
        (read_only, "from: /tmp/pipeops."),
        (
            format!("{NOEXEC} {mine}; mount -t tmpfs -o mode=1777,size=1m tmpfs /tmp"),
            "from: /var/tmp/pipeops.",
        ),
        (format!("{without}; rm /usr/bin/mktemp; {NOEXEC} {mine}"), "from: /tmp/pipeops."),
        (format!("{without}; rm /usr/bin/curl"), "from: "),
        ("umask 000".into(), "from: "),
        ("umask 777".into(), "from: "),
        (all.clone(), "from: /var/lib/pipeops."),
        (format!("chmod 0777 {mine}"), "from: /tmp/pipeops."),
    ];
    for shell in shells() {
        for (mounts, expected) in &cases {
            let Some(answer) = on_a_machine_with(mounts, &shell, &site.url, &[("TMPDIR", mine)], 0)
            else {
                return;
            };
            if answer.code == 77 {
                println!(
                    "NOT RUN: this machine cannot mount an overlay, so no program can be taken away"
                );
                continue;
            }
            let answer = answer.ended(0);
            assert!(
                answer.out.starts_with(expected) && answer.out.contains(" 0022\n"),
                "{shell:?} {mounts}\n{}{}",
                answer.out,
                answer.err
            );
        }
        let answer =
            on_a_machine_with(&every, &shell, &site.url, &[("TMPDIR", mine)], 0).unwrap().ended(3);
        for text in [format!("{mine} (noexec)"), "/var/lib (noexec)".into(), "set TMPDIR".into()] {
            assert!(answer.err.contains(&text), "{shell:?} {}", answer.err);
        }
        for tmpdir in ["", "/nonexistent", ".", "relative/dir", "/dev/null"] {
            let answer = on_a_machine_with(":", &shell, &site.url, &[("TMPDIR", tmpdir)], 0)
                .unwrap()
                .ended(0);
            assert!(
                answer.out.starts_with("from: /tmp/pipeops."),
                "{shell:?} {tmpdir}: {}",
                answer.out
            );
        }
        // a person whose own directories run nothing: root has one, and nothing is left of it
        if by_sudo(&shell).is_empty() {
            continue;
        }
        let answer = on_a_machine_with(
            &format!("{all}; ls /var/lib"),
            &shell,
            &site.url,
            &[("TMPDIR", mine)],
            1000,
        )
        .unwrap()
        .ended(0);
        assert!(
            answer.out.contains("from: /var/lib/pipeops."),
            "{shell:?} {}{}",
            answer.out,
            answer.err
        );
    }
    for dir in ["/tmp", "/var/tmp", "/var/lib", "/usr/local/lib", "/root"] {
        let left = std::fs::read_dir(dir).into_iter().flatten().flatten().filter(|e| {
            let name = e.file_name().into_string().unwrap_or_default();
            name.strip_prefix("pipeops.").is_some_and(|n| n.bytes().all(|b| b.is_ascii_digit()))
        });
        assert_eq!(left.count(), 0, "{dir}");
    }
}

#[test]
fn sudo_that_cannot_ask_is_said_before_anything_is_fetched() {
    use std::os::unix::fs::PermissionsExt;
    let (site, _dir) = laid_out();
    for shell in shells() {
        if by_sudo(&shell).is_empty() {
            continue;
        }
        let programs = programs(1000);
        let sudo = programs.path().join("sudo");
        std::fs::write(
            &sudo,
            "#!/bin/sh\necho 'sudo: a terminal is required to read the password' >&2\nexit 1\n",
        )
        .unwrap();
        std::fs::set_permissions(&sudo, std::fs::Permissions::from_mode(0o755)).unwrap();
        let before = site.log.lock().unwrap().len();
        let mut command = Command::new("setsid");
        command
            .arg("-w")
            .args(&shell)
            .arg(format!("{SCRIPTS}/install.sh"))
            .env_clear()
            .env("PIPEOPS_RELEASE_URL", &site.url);
        command
            .env("PATH", format!("{}:/usr/bin:/bin", programs.path().display()))
            .stdin(Stdio::null());
        let answer = run_output(command.output().unwrap()).ended(3);
        assert!(
            answer.err.contains("without a terminal to ask on: run it as root"),
            "{shell:?} {}",
            answer.err
        );
        assert_eq!(site.log.lock().unwrap().len(), before);
    }
}

#[test]
fn an_interrupted_download_leaves_nothing() {
    use std::os::unix::process::CommandExt as _;
    let (site, _dir) = laid_out();
    for arch in ["amd64", "arm64", "arm"] {
        site.put(&format!("/pipeops-linux-{arch}"), PROGRAM.as_bytes(), Behavior::Stall);
    }
    for shell in shells() {
        let tmp = tempfile::tempdir().unwrap();
        let seen = site.log.lock().unwrap().len();
        // a shell cannot trap what was ignored when it began, as it is in whatever a script starts
        // with `&`
        let mut command = Command::new("env");
        command.arg("--default-signal=INT").args(&shell).arg(format!("{SCRIPTS}/install.sh"));
        command.env_clear().env("PATH", "/usr/bin:/bin").env("TMPDIR", tmp.path());
        command
            .env("PIPEOPS_RELEASE_URL", &site.url)
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        if !nix::unistd::geteuid().is_root() {
            println!("NOT RUN: without root and sudo it ends before");
            return;
        }
        let child = command.spawn().unwrap();
        while !site.log.lock().unwrap()[seen..].iter().any(|l| l.starts_with("/pipeops-linux-")) {
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        let group = nix::unistd::Pid::from_raw(child.id().try_into().unwrap());
        nix::sys::signal::killpg(group, nix::sys::signal::Signal::SIGINT).unwrap();
        let answer = run_output(child.wait_with_output().unwrap());
        assert!(
            answer.code == 130 && !answer.out.contains("args:"),
            "{shell:?} {} {}",
            answer.code,
            answer.out
        );
        assert_eq!(std::fs::read_dir(tmp.path()).unwrap().count(), 0, "{shell:?}");
    }
}

/// All scenarios are read into one shell: a function that two of them define is the later one's for
/// both.
#[test]
fn no_two_scenarios_define_the_same_function() {
    let vm = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/vm");
    let scenarios = std::fs::read_dir(vm.join("scenarios")).unwrap();
    let mut files: Vec<_> = scenarios.map(|entry| entry.unwrap().path()).collect();
    files.push(vm.join("lib.sh"));
    let mut known = std::collections::BTreeMap::new();
    for file in files {
        let text = std::fs::read_to_string(&file).unwrap();
        for line in text.lines() {
            let Some((name, _)) = line.trim_start().split_once("()") else { continue };
            if name.is_empty() || !name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_') {
                continue;
            }
            let former = known.insert(name.to_owned(), file.clone());
            assert!(former.is_none(), "{name} of {former:?} is another one in {}", file.display());
        }
    }
    assert!(known.len() > 50, "{} functions", known.len());
}
