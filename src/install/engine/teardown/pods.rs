//! The processes of pods: found by their containerd-shim, and ended.

use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use nix::unistd::Pid;

use super::QUICK;
use crate::host::{Host, HostWriter};

/// Ends every process in a pod: k3s starts a containerd-shim for each, and each shim is the head of
/// its pod's tree.
///
/// The tree is taken down once as a list: once its shim is gone, a process belongs to init, and its
/// pod is no longer known.
pub(super) async fn kill(writer: &HostWriter) {
    for _ in 0..5 {
        let all = pod_processes(writer);
        if all.is_empty() {
            break;
        }
        let alive = |pids: &[(String, bool)], shims: bool| -> Vec<String> {
            pids.iter()
                .filter(|(pid, shim)| (shims || !shim) && writer.exists(&format!("/proc/{pid}")))
                .map(|(pid, _)| pid.clone())
                .collect()
        };
        signal(Signal::SIGTERM, &alive(&all, false));
        let until = Instant::now() + Duration::from_secs(3);
        while !alive(&all, false).is_empty() && Instant::now() < until {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        signal(Signal::SIGKILL, &alive(&all, true));
        let until = Instant::now() + QUICK;
        while !alive(&all, true).is_empty() && Instant::now() < until {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

/// Some may have ended between the look and the signal, which is as good.
fn signal(signal: Signal, pids: &[String]) {
    for pid in pids.iter().filter_map(|p| p.parse().ok()) {
        let _ = nix::sys::signal::kill(Pid::from_raw(pid), signal);
    }
}

/// The shims of this k3s, by where they live and which socket they were given, and everything below
/// them; `true` for a shim.
fn pod_processes(host: &Host) -> Vec<(String, bool)> {
    let mut parents: Vec<(String, String, bool)> = Vec::new();
    for pid in host.list("/proc").into_iter().filter(|n| n.bytes().all(|b| b.is_ascii_digit())) {
        let command = host.text(&format!("/proc/{pid}/cmdline"));
        let shim = command.contains("containerd-shim")
            && (command.contains("/run/k3s/") || command.contains("/var/lib/rancher/k3s/"));
        // "pid (name) state ppid": the name may hold anything, so count from the last bracket
        let stat = host.text(&format!("/proc/{pid}/stat"));
        let parent = stat
            .rsplit(')')
            .next()
            .and_then(|rest| rest.split_whitespace().nth(1))
            .unwrap_or_default()
            .to_owned();
        parents.push((pid, parent, shim));
    }
    let mut doomed: Vec<(String, bool)> = parents
        .iter()
        .filter(|(_, _, shim)| *shim)
        .map(|(pid, _, _)| (pid.clone(), true))
        .collect();
    let mut at = 0;
    while at < doomed.len() {
        let below: Vec<String> = parents
            .iter()
            .filter(|(_, parent, _)| *parent == doomed[at].0)
            .map(|(pid, _, _)| pid.clone())
            .collect();
        for pid in below {
            if !doomed.iter().any(|(known, _)| *known == pid) {
                doomed.push((pid, false));
            }
        }
        at += 1;
    }
    doomed
}
