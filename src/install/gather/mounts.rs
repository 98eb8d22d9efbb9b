//! How the places are mounted that we and k3s write to.

use nix::fcntl::OFlag;
use nix::sys::stat::Mode;
use nix::sys::statvfs::{FsFlags, statvfs};

use crate::host::Host;
use crate::install::facts::Mount;

/// Directories that get something of ours or of k3s'. The first is the data directory.
const WRITTEN: &[&str] = &[
    "/var/lib/rancher",
    "/var/lib/kubelet",
    "/var/lib/pipeops",
    "/var/log",
    "/usr/local/bin",
    "/etc/rancher",
    "/etc/pipeops",
    "/etc/systemd/system",
    "/etc",
    "/run",
];

/// One entry for each of them, whether it is there already or not.
pub(super) fn gather(host: &Host) -> Vec<Mount> {
    let mountinfo = host.text("/proc/self/mountinfo");
    WRITTEN.iter().map(|path| mount(host, &mountinfo, path)).collect()
}

fn mount(host: &Host, mountinfo: &str, path: &str) -> Mount {
    let there = super::disks::existing(host, path);
    let rest = host
        .real_path(path)
        .strip_prefix(&there)
        .map(std::path::Path::to_owned)
        .unwrap_or_default();
    // a link may lead to another disk
    let real = std::fs::canonicalize(&there).unwrap_or(there);
    let root = std::fs::canonicalize(host.real_path("/")).unwrap_or_else(|_| host.real_path("/"));
    let named = real
        .strip_prefix(&root)
        .map_or_else(|_| path.to_owned(), |p| format!("/{}", p.join(rest).display()));
    let (mount_point, fs_type, options) =
        crate::host::mountinfo::mount_of(mountinfo, &named).unwrap_or_default();
    let flags = statvfs(&real).map(|s| s.flags()).unwrap_or(FsFlags::empty());
    let has = |option: &str| options.iter().any(|o| o == option);
    Mount {
        path: path.to_owned(),
        read_only: flags.contains(FsFlags::ST_RDONLY) || has("ro") || immutable(&real),
        no_exec: flags.contains(FsFlags::ST_NOEXEC) || has("noexec"),
        entry_types: (path == WRITTEN[0]).then(|| entry_types(&real)).flatten(),
        mount_point,
        fs_type,
    }
}

/// Refused to root too: the file system is read-only, or the directory has the immutable attribute.
fn immutable(dir: &std::path::Path) -> bool {
    use nix::errno::Errno;
    matches!(
        nix::unistd::access(dir, nix::unistd::AccessFlags::W_OK),
        Err(Errno::EROFS | Errno::EPERM)
    )
}

/// XFS made with ftype=0 has no types, and overlayfs does not work on it.
fn entry_types(dir: &std::path::Path) -> Option<bool> {
    let mut opened =
        nix::dir::Dir::open(dir, OFlag::O_RDONLY | OFlag::O_DIRECTORY, Mode::empty()).ok()?;
    let mut told =
        opened.iter().filter_map(Result::ok).map(|entry| entry.file_type().is_some()).peekable();
    told.peek()?;
    Some(told.all(|t| t))
}
