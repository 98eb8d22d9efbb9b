//! The machine-wide lock: who holds it may change the machine.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};

use nix::fcntl::{Flock, FlockArg};

use super::paths::STATE;
use super::{Host, HostWriter};
use crate::base::error::{Exit, Failure};

impl Host {
    /// Takes the machine-wide lock, and with it the right to change things.
    ///
    /// # Errors
    /// Exit 12 when another run holds it.
    pub fn lock(&self) -> anyhow::Result<HostWriter> {
        let made = !self.exists(STATE);
        let state = self.real_path(STATE);
        let fresh = || -> io::Result<File> {
            fs::create_dir_all(&state)?;
            fs::set_permissions(&state, fs::Permissions::from_mode(0o700))?;
            OpenOptions::new()
                .create(true)
                .truncate(false)
                .write(true)
                .mode(0o600)
                .open(state.join("lock"))
        };
        let file = fresh().map_err(|error| match error.kind() {
            io::ErrorKind::ReadOnlyFilesystem => Failure::new(
                Exit::Preflight,
                "MOUNT_READ_ONLY",
                format!("nothing can be written to {STATE}"),
            )
            .why("its file system is mounted read-only; nothing was changed")
            .hint(format!(
                "mount it writable (`findmnt -T {STATE}` shows what is there), then run again"
            ))
            .into(),
            _ => anyhow::Error::from(error).context(format!("opening {STATE}/lock")),
        })?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => Ok(HostWriter { host: self.clone(), _lock: lock, made_state: made }),
            Err(_) => Err(Failure::new(
                Exit::Locked,
                "LOCKED",
                "another pipeops is at work on this machine",
            )
            .why(format!("{STATE}/lock is held"))
            .hint("wait until it has ended, then run again")
            .into()),
        }
    }
}

impl Drop for HostWriter {
    /// The lock goes back; a run that wrote no journal leaves not even its directory behind,
    /// however it ends.
    fn drop(&mut self) {
        if self.made_state && !self.exists(&format!("{STATE}/journal.json")) {
            self.forget_state();
        }
    }
}

impl HostWriter {
    /// Removes our state directory, which by now holds nothing but the lock.
    pub fn forget_state(&self) {
        let _ = fs::remove_file(self.real_path(STATE).join("lock"));
        let _ = fs::remove_dir(self.real_path(STATE));
    }
}
