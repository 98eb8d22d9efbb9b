//! What k3s unpacked for former versions: it keeps every one for good, some 230 MiB each.
//!
//! k3s unpacks its programs into `data/<sha256>` and moves the links `current` and `previous` at
//! each new version (k3s-io/k3s `cmd/k3s/main.go`, `extract`). Those two stay, and whatever a
//! process still runs from: pods outlive a restart with the shim that started them. There is
//! nothing to undo.

use crate::base::order;
use crate::host::{Host, HostWriter};
use crate::install::plan::StepStatus;

const DATA: &str = "/var/lib/rancher/k3s/data";

/// Directories that nothing uses any more; empty while k3s has no current one.
fn removable(host: &Host) -> Vec<String> {
    let linked = |name: &str| {
        host.link_target(&format!("{DATA}/{name}"))
            .and_then(|t| Some(t.rsplit_once('/')?.1.to_owned()))
    };
    let Some(current) = linked("current") else { return Vec::new() };
    let mut kept = order::set(linked("previous").into_iter().chain([current]));
    for pid in host.list("/proc").into_iter().filter(|n| n.bytes().all(|b| b.is_ascii_digit())) {
        let program = host.link_target(&format!("/proc/{pid}/exe")).unwrap_or_default();
        let words = format!("{program}\0{}", host.text(&format!("/proc/{pid}/cmdline")));
        kept.extend(words.split(DATA).skip(1).filter_map(|rest| {
            Some(rest.strip_prefix('/')?.split(['/', '\0', ' ']).next()?.to_owned())
        }));
    }
    let unpacked = |name: &String| name.len() == 64 && name.bytes().all(|b| b.is_ascii_hexdigit());
    host.list(DATA)
        .into_iter()
        .filter(|name| unpacked(name) && !kept.contains(name))
        .map(|name| format!("{DATA}/{name}"))
        .filter(|path| host.is_dir(path))
        .collect()
}

pub(super) fn check(host: &Host) -> StepStatus {
    let changes: Vec<String> =
        removable(host).iter().map(|dir| format!("remove {dir}, of a former k3s")).collect();
    if changes.is_empty() { StepStatus::Done } else { StepStatus::Todo { changes } }
}

pub(super) fn apply(writer: &HostWriter) -> anyhow::Result<()> {
    for dir in removable(writer) {
        writer.remove_tree(&dir, &[])?;
    }
    Ok(())
}
