//! Known failures that come from the machine: ports, disks, memory, and programs that cannot run.

use super::Severity::{Fatal, Permanent};
use super::{KnownCause, cause};

pub(super) const TABLE: &[(&[&str], KnownCause)] = &[
    // the machine
    (
        &["address already in use"],
        cause(
            "PORT_IN_USE",
            Fatal,
            "a port that k3s needs is taken",
            "`ss -ltnp` names the program; stop it",
        ),
    ),
    (
        &["no space left on device"],
        cause("DISK_LOW", Fatal, "a disk is full", "free space under /var/lib/rancher"),
    ),
    (
        &["read-only file system"],
        cause(
            "DISK_READ_ONLY",
            Fatal,
            "a disk is mounted read-only",
            "mount it writable; `dmesg` shows when the kernel made it read-only",
        ),
    ),
    (
        &["input/output error"],
        cause(
            "DISK_FAILING",
            Fatal,
            "a disk reports errors",
            "look at `dmesg` and at the disk's health",
        ),
    ),
    (
        &["too many open files"],
        cause(
            "INOTIFY_LIMIT",
            Fatal,
            "a limit on open files or watches is reached",
            "raise fs.inotify.max_user_instances (sysctl), for example to 512",
        ),
    ),
    (
        &["cannot allocate memory"],
        cause("MEMORY_LOW", Fatal, "memory is used up", "free some, or add swap or memory"),
    ),
    (
        &["killed by the OOM killer"],
        cause(
            "MEMORY_LOW",
            Fatal,
            "the kernel ended k3s for want of memory",
            "free some, or add swap or memory",
        ),
    ),
    (
        &["status=4/ILL"],
        cause(
            "CPU_UNSUPPORTED",
            Permanent,
            "this processor lacks an instruction",
            "install the build for this machine's architecture",
        ),
    ),
    // systemd, and cmd/k3s/main_linux.go
    (
        &["Failed at step EXEC", "Exec format error"],
        cause(
            "K3S_NOT_RUNNABLE",
            Permanent,
            "/usr/local/bin/k3s is built for another machine",
            "install the build for this machine's architecture",
        ),
    ),
    (
        &["/usr/local/bin/k3s", "Exec format error"],
        cause(
            "K3S_NOT_RUNNABLE",
            Permanent,
            "/usr/local/bin/k3s is built for another machine",
            "install the build for this machine's architecture",
        ),
    ),
    (
        &["/usr/local/bin/k3s", "Permission denied"],
        cause(
            "K3S_NOT_RUNNABLE",
            Permanent,
            "/usr/local/bin/k3s may not be run",
            "mount /usr/local without noexec; with SELinux: restorecon /usr/local/bin/k3s",
        ),
    ),
    (
        &["/usr/local/bin/k3s", "No such file or directory"],
        cause(
            "K3S_NOT_RUNNABLE",
            Permanent,
            "/usr/local/bin/k3s is not there",
            "look at what takes it away",
        ),
    ),
    (
        &["k3s-server", "executable file not found"],
        cause(
            "DATA_NOEXEC",
            Permanent,
            "no program runs below /var/lib/rancher",
            "mount it without noexec; with SELinux: install k3s-selinux",
        ),
    ),
    (
        &["exec /var/lib/rancher", "permission denied"],
        cause(
            "DATA_NOEXEC",
            Permanent,
            "no program runs below /var/lib/rancher",
            "mount it without noexec; with SELinux: install k3s-selinux",
        ),
    ),
];
