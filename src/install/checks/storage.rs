//! Rules about how the places are mounted that we and k3s write to.

use super::InstallTarget;
use crate::install::effective_settings::EffectiveSettings;
use crate::install::facts::Facts;
use crate::install::finding::{Finding, Level};

pub(super) fn read_only(facts: &Facts, _: &InstallTarget<'_>) -> Vec<Finding> {
    let shut: Vec<&str> =
        facts.mounts.iter().filter(|m| m.read_only).map(|m| m.path.as_str()).collect();
    if shut.is_empty() {
        return Vec::new();
    }
    vec![
        Finding::new(
            "MOUNT_READ_ONLY",
            Level::Error,
            "nothing can be written where the node's files belong",
            format!("read-only: {}", shut.join(", ")),
        )
        .fix(
            "mount it writable, or a writable file system over it (`findmnt -T PATH` shows what is \
             there), then run again",
        )
        .fix(
            "a distribution with a read-only /usr needs a writable /usr/local; an error of the \
             disk makes Linux remount it so: see `dmesg`",
        ),
    ]
}

pub(super) fn no_exec(facts: &Facts, _: &InstallTarget<'_>) -> Vec<Finding> {
    // k3s unpacks its programs below its data directory
    let shut: Vec<String> = facts
        .mounts
        .iter()
        .filter(|m| m.no_exec && matches!(m.path.as_str(), "/var/lib/rancher" | "/usr/local/bin"))
        .map(|m| {
            format!(
                "{} (mounted on {})",
                m.path,
                if m.mount_point.is_empty() { "?" } else { &m.mount_point }
            )
        })
        .collect();
    if shut.is_empty() {
        return Vec::new();
    }
    vec![
        Finding::new(
            "MOUNT_NOEXEC",
            Level::Error,
            "no program may run where those of k3s lie",
            format!("mounted noexec: {}", shut.join(", ")),
        )
        .fix(
            "take noexec out of /etc/fstab for it and `mount -o remount,exec PATH`, or mount a \
             disk of its own there",
        ),
    ]
}

/// File systems that overlayfs cannot keep its upper layer on, or only from some version on (Linux,
/// Documentation/filesystems/overlayfs.rst).
const NO_UPPER: &[&str] = &[
    "overlay",
    "zfs",
    "nfs",
    "nfs4",
    "cifs",
    "smb3",
    "9p",
    "ceph",
    "glusterfs",
    "ecryptfs",
    "vfat",
    "exfat",
    "ntfs",
    "ntfs3",
    "fuseblk",
    "aufs",
];

pub(super) fn snapshotter(facts: &Facts, target: &InstallTarget<'_>) -> Vec<Finding> {
    let effective = EffectiveSettings::planned(facts, target.settings);
    let Some(mount) = facts
        .mounts
        .iter()
        .find(|m| m.path == "/var/lib/rancher")
        .filter(|_| effective.bundled_containerd())
    else {
        return Vec::new();
    };
    let (snapshotter, kind) = (effective.snapshotter(), mount.fs_type.as_str());
    let alike = NO_UPPER.contains(&kind) || kind.starts_with("fuse.");
    let why = match snapshotter.as_str() {
        "overlayfs" | "stargz" if alike => {
            format!(
                "{} is {kind}",
                if mount.mount_point.is_empty() { "/" } else { &mount.mount_point }
            )
        }
        "overlayfs" | "stargz" if mount.entry_types == Some(false) => {
            format!("the {kind} on {} was made with ftype=0", mount.mount_point)
        }
        "btrfs" | "zfs" if kind != snapshotter && !kind.is_empty() => {
            format!("{} is {kind}", mount.mount_point)
        }
        _ => return Vec::new(),
    };
    let instead = match (kind, snapshotter.as_str()) {
        ("zfs", "overlayfs") => {
            "\"zfs\" (with a dataset on /var/lib/rancher/k3s/agent/containerd), or \"native\", \
             which needs more space"
        }
        (_, "overlayfs" | "stargz") => "\"native\", which needs more space, or \"fuse-overlayfs\"",
        _ => "\"overlayfs\", or \"native\"",
    };
    vec![
        Finding::new(
            "SNAPSHOTTER_UNFIT",
            Level::Warning,
            format!(
                "the snapshotter {snapshotter} may not work on the file system of \
                 /var/lib/rancher; k3s does not start then"
            ),
            why,
        )
        .fix("mount a disk with ext4, XFS or Btrfs on /var/lib/rancher")
        .fix(format!("or choose in the [k3s] table of the config: snapshotter = {instead}")),
    ]
}
