//! Programs of the machine: asked with a time limit, without our secrets in their environment.
#![expect(clippy::disallowed_types, reason = "part of the door that the lint guards")]

use std::io;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, bail};
use tokio::io::AsyncReadExt as _;

use crate::host::{Host, HostWriter};

/// Most bytes kept of a program's output.
const MAX_OUTPUT: u64 = 4 << 20;

/// Variables that a child process gets from ours.
const PASSED_ON: [&str; 6] =
    ["HOME", "USER", "TMPDIR", "XDG_RUNTIME_DIR", "DBUS_SYSTEM_BUS_ADDRESS", "LD_LIBRARY_PATH"];

/// And those with which a program finds the display and the browser of its user.
const OF_A_DESKTOP: [&str; 6] = [
    "BROWSER",
    "DISPLAY",
    "WAYLAND_DISPLAY",
    "XAUTHORITY",
    "XDG_CURRENT_DESKTOP",
    "XDG_SESSION_TYPE",
];

/// What a program that goes on by itself has said of a failure by then.
const START: Duration = Duration::from_secs(3);

/// How long a program may be busy. While one thread writes a file, another may start a child, and
/// that child holds the file open for writing until it has become its own program; Linux starts no
/// file that somebody holds open so (ETXTBSY).
const BUSY: Duration = Duration::from_secs(1);

/// What a program said.
#[derive(Clone, Debug, Default)]
pub struct Output {
    pub status: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Output {
    pub fn ok(&self) -> bool {
        self.status == 0
    }
}

impl Host {
    /// Runs a program to its end, whatever its status. By convention one that only reports: what
    /// changes the machine is run by a [`HostWriter`], this way only where a failure is no error.
    ///
    /// # Errors
    /// When it is not there, cannot be started, or does not end in time.
    pub async fn output(
        &self,
        program: &str,
        args: &[&str],
        within: Duration,
    ) -> anyhow::Result<Output> {
        let Some(file) = self.which(program) else {
            bail!("the program `{program}` is not on this machine")
        };
        let line = format!("`{program} {}`", args.join(" "));
        let mut command = tokio::process::Command::new(file);
        command
            .args(args)
            // tokens and passwords stand in our environment (proxies, object stores, databases):
            // none of them goes further
            .env_clear()
            .envs(std::env::vars_os().filter(|(name, _)| PASSED_ON.iter().any(|n| name == n)))
            .env("PATH", &self.path)
            .env("LC_ALL", "C")
            .env("PIPEOPS_ROOT", &self.root)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .kill_on_drop(true);
        let mut child = spawn(&mut command).await.with_context(|| format!("starting {line}"))?;
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let streams = (child.stdout.take(), child.stderr.take());
        let work = async {
            let (stdout, stderr) = streams;
            let read_out = async {
                if let Some(s) = stdout {
                    let _ = s.take(MAX_OUTPUT).read_to_end(&mut out).await;
                }
            };
            let read_err = async {
                if let Some(s) = stderr {
                    let _ = s.take(MAX_OUTPUT).read_to_end(&mut err).await;
                }
            };
            tokio::join!(read_out, read_err);
            child.wait().await
        };
        let status = tokio::time::timeout(within, work)
            .await
            .map_err(|_| anyhow::anyhow!("{line} did not end within {} s", within.as_secs()))?
            .with_context(|| format!("waiting for {line}"))?;
        Ok(Output {
            status: status.code().unwrap_or(-1),
            stdout: String::from_utf8_lossy(&out).into_owned(),
            stderr: String::from_utf8_lossy(&err).into_owned(),
        })
    }

    /// Starts a program on the user's desktop that goes on by itself, whatever becomes of ours. One
    /// that ends soon ends with success.
    ///
    /// # Errors
    /// When it is not there, cannot be started, or ends soon with another status than 0.
    pub async fn start_on_desktop(&self, program: &str, args: &[&str]) -> anyhow::Result<()> {
        let Some(file) = self.which(program) else {
            bail!("the program `{program}` is not on this machine")
        };
        let passed = |name: &std::ffi::OsString| {
            PASSED_ON.iter().chain(&OF_A_DESKTOP).any(|passed| name == passed)
        };
        let mut command = tokio::process::Command::new(file);
        command
            .args(args)
            .env_clear()
            .envs(std::env::vars_os().filter(|(name, _)| passed(name)))
            .env("PATH", &self.path)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0);
        let mut child =
            spawn(&mut command).await.with_context(|| format!("starting `{program}`"))?;
        match tokio::time::timeout(START, child.wait()).await {
            Ok(Ok(status)) if !status.success() => bail!("`{program}` ends with {status}"),
            _ => Ok(()),
        }
    }
}

impl HostWriter {
    /// Runs a program that changes the machine.
    ///
    /// # Errors
    /// Also when its status is not 0: the command, the status, the last lines that it said.
    pub async fn run(
        &self,
        program: &str,
        args: &[&str],
        within: Duration,
    ) -> anyhow::Result<String> {
        let output = self.output(program, args, within).await?;
        if output.ok() {
            return Ok(output.stdout);
        }
        let lines: Vec<&str> = output.stderr.lines().chain(output.stdout.lines()).collect();
        let last = lines.iter().rev().take(5).rev().copied().collect::<Vec<_>>().join("\n");
        bail!("`{program} {}` ended with status {}\n{last}", args.join(" "), output.status)
    }
}

async fn spawn(command: &mut tokio::process::Command) -> io::Result<tokio::process::Child> {
    let begin = tokio::time::Instant::now();
    loop {
        match command.spawn() {
            Err(e) if e.kind() == io::ErrorKind::ExecutableFileBusy && begin.elapsed() < BUSY => {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            started => return started,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;
    use std::os::unix::fs::OpenOptionsExt as _;

    use super::*;

    #[tokio::test]
    async fn a_program_that_is_held_open_for_writing_is_tried_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("k3s");
        let open = || OpenOptions::new().append(true).create(true).mode(0o755).open(&path).unwrap();
        std::io::Write::write_all(&mut open(), b"#!/bin/sh\necho k3s version v1.35.0+k3s1\n")
            .unwrap();
        let held = open();
        let release = async {
            // long enough that the first try has failed
            tokio::time::sleep(Duration::from_millis(100)).await;
            drop(held);
        };
        let host = Host::new("/", None);
        let program = path.display().to_string();
        let (said, ()) = tokio::join!(host.output(&program, &[], Duration::from_secs(10)), release);
        assert_eq!(said.unwrap().stdout, "k3s version v1.35.0+k3s1\n");
        // a file that stays busy is named
        let _held = open();
        let said = host.output(&program, &[], Duration::from_secs(10)).await.unwrap_err();
        assert!(format!("{said:#}").contains("Text file busy"), "{said:#}");
    }
}
