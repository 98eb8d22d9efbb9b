//! Disks: room, inodes, and how long a durable write takes.
#![expect(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "part of the door to the machine"
)]

use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::time::{Duration, Instant};

use crate::host::Host;
use crate::install::facts::Disk;

/// The file system that holds the nearest existing parent of `path`.
pub(super) fn disk(host: &Host, path: &str) -> Option<Disk> {
    let real = existing(host, path);
    let stat = nix::sys::statvfs::statvfs(&real).ok()?;
    let block = stat.fragment_size();
    Some(Disk {
        path: path.to_owned(),
        available_bytes: stat.blocks_available().saturating_mul(block),
        total_bytes: stat.blocks().saturating_mul(block),
        inodes_free: stat.files_available(),
        inodes_total: stat.files(),
        device: fs::metadata(&real).ok()?.dev(),
    })
}

/// The path itself, or its nearest parent that is there.
pub(super) fn existing(host: &Host, path: &str) -> std::path::PathBuf {
    let mut real = host.real_path(path);
    while !real.exists() && real.pop() {}
    real
}

/// 99th percentile of 60 durable writes to an unnamed file: nothing appears in the tree, nothing is
/// left after a crash.
pub(super) fn fsync_p99_us(host: &Host) -> Option<u64> {
    let dir = existing(host, "/var/lib/rancher");
    let mut file = OpenOptions::new()
        .write(true)
        .custom_flags(nix::fcntl::OFlag::O_TMPFILE.bits())
        .mode(0o600)
        .open(dir)
        .ok()?;
    let (block, start) = ([0x5a; 2300], Instant::now());
    let mut times = Vec::new();
    while times.len() < 60 && start.elapsed() < Duration::from_secs(3) {
        let before = Instant::now();
        file.write_all(&block).ok()?;
        file.sync_data().ok()?;
        times.push(u64::try_from(before.elapsed().as_micros()).unwrap_or(u64::MAX));
    }
    times.sort_unstable();
    times.get(times.len().saturating_sub(1).min(times.len() * 99 / 100)).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durable_writes_are_timed_and_leave_nothing() {
        let dir = tempfile::tempdir().unwrap();
        assert!(fsync_p99_us(&Host::new(dir.path(), None)).is_some_and(|micros| micros > 0));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
