//! Taking a node down: pods, mounts, interfaces, rules, directories. Nothing here crosses a mount
//! or waits without a limit.

pub(super) mod kernel;
mod network;
mod pods;
mod rules;

use std::time::Duration;

use super::context::StepContext;
use super::journal::Journal;
use super::leftover::Leftover;
use crate::host::HostWriter;
use crate::install::plan::ProgressEvent;
use crate::k3s::paths::VOLUMES;

const QUICK: Duration = Duration::from_secs(10);
/// Hundreds of slices end in this time.
const STOP: Duration = Duration::from_secs(60);
/// A network mount whose server is gone never answers; after this it is left and named.
const UNMOUNT: Duration = Duration::from_secs(15);
/// Where k3s and the kubelet mount, beside the data directories.
const MOUNT_ROOTS: &[&str] =
    &["/run/k3s", "/var/lib/rancher/k3s", "/var/lib/kubelet", "/run/netns/cni-"];
/// Slice of all pods where the kubelet uses systemd's cgroup driver.
const SLICE: &str = "kubepods.slice";

/// Takes the node down and removes what k3s filled. Gives what is left, each with its reason.
///
/// `made` are the directories that were not there before us; others keep their content.
pub(super) async fn node(
    context: &mut StepContext<'_>,
    journal: &Journal,
    dirs: &[String],
    made: &[String],
    purge: bool,
) -> anyhow::Result<Vec<Leftover>> {
    let writer = context.writer;
    writer.disable(journal.role.unit()).await?;
    if writer.is_running_machine() {
        pods::kill(writer).await;
    }
    let mut left = unmount(writer).await;
    left.extend(network::remove(writer).await);
    if let Some(before) = journal.kernel.get(kernel::TABLES) {
        network::drop_tables(writer, before).await;
    }
    // with systemd's cgroup driver each pod has a transient unit below this one; an error says that
    // there is none
    let _ = writer.output("systemctl", &["stop", SLICE], STOP).await;
    // the cgroups of killed processes are busy until those are gone, which takes a moment
    for _ in 0..50 {
        if remove_cgroups(writer) {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let mut keep = Vec::new();
    if !purge && !writer.list(VOLUMES).is_empty() {
        keep.push(VOLUMES.to_owned());
        (context.on_event)(ProgressEvent::Note { text: format!("volumes are kept in {VOLUMES}") });
    }
    for dir in dirs.iter().filter(|dir| made.contains(dir)) {
        for path in writer.remove_tree(dir, &keep)? {
            if left.iter().any(|l| l.is_of(&path)) {
                continue;
            }
            left.push(if keep.contains(&path) {
                // the journal goes, and with it what --purge-data needs to know
                Leftover::kept(format!(
                    "{path}: volumes, kept without --purge-data; `rm -rf {path}` removes them now"
                ))
            } else {
                Leftover::busy(&path, "something is mounted there, nothing on it was touched")
            });
        }
    }
    Ok(left)
}

/// Unmounts what k3s and the kubelet mounted, deepest first. A mount that is busy or does not
/// answer stays and is named.
async fn unmount(writer: &HostWriter) -> Vec<Leftover> {
    let mut left = Vec::new();
    for root in MOUNT_ROOTS {
        let (dir, prefix) = root
            .rsplit_once('/')
            .filter(|(_, last)| last.ends_with('-'))
            .map_or((*root, None), |(dir, prefix)| (dir, Some(prefix)));
        for (path, kind) in writer.mounts_under(dir) {
            let selected = prefix.is_none_or(|p| {
                path.strip_prefix(dir)
                    .is_some_and(|rest| rest.trim_start_matches('/').starts_with(p))
            });
            if !selected {
                continue;
            }
            if let Err(e) = writer.run("umount", &[&path], UNMOUNT).await {
                let reason = e.to_string().lines().last().unwrap_or_default().to_owned();
                left.push(Leftover::busy(&path, &format!("{kind} mount, {reason}")));
            }
        }
    }
    left
}

/// Removes the kubelet's cgroups, which are empty by now. Says whether all are gone.
fn remove_cgroups(writer: &HostWriter) -> bool {
    let mut gone = true;
    let mut roots = vec!["/sys/fs/cgroup".to_owned()];
    roots.extend(writer.list("/sys/fs/cgroup").into_iter().map(|n| format!("/sys/fs/cgroup/{n}")));
    for root in roots {
        for name in ["kubepods", SLICE, "k8s.io"] {
            let path = format!("{root}/{name}");
            remove_cgroup(writer, &path);
            gone &= !writer.exists(&path);
        }
    }
    gone
}

fn remove_cgroup(writer: &HostWriter, path: &str) {
    for name in writer.list(path) {
        let below = format!("{path}/{name}");
        if writer.is_dir(&below) {
            remove_cgroup(writer, &below);
        }
    }
    writer.remove_empty(path);
}
