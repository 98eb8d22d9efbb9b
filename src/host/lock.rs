//! The machine-wide lock: who holds it may change the machine.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::Path;

use nix::fcntl::{Flock, FlockArg};

use super::paths::STATE;
use super::{Host, HostWriter};
use crate::base::error::{Exit, Failure};

/// How often a lock file is opened: each further time another run has just ended and removed it.
const ATTEMPTS: usize = 8;

impl Host {
    /// Takes the machine-wide lock, and with it the right to change things.
    ///
    /// # Errors
    /// Exit 12 when another run holds it.
    pub fn lock(&self) -> anyhow::Result<HostWriter> {
        let state = self.real_path(STATE);
        for _ in 0..ATTEMPTS {
            let file = match open(&state) {
                Ok(file) => file,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(unwritable(error)),
            };
            let Ok(lock) = Flock::lock(file, FlockArg::LockExclusiveNonblock) else { break };
            // a file that its holder has removed meanwhile guards nothing
            if is_at(&lock, &state.join("lock")) {
                return Ok(HostWriter { host: self.clone(), _lock: lock });
            }
        }
        Err(Failure::new(Exit::Locked, "LOCKED", "another pipeops is at work on this machine")
            .why(format!("{STATE}/lock is held"))
            .hint("wait until it has ended, then run again")
            .into())
    }
}

fn open(state: &Path) -> io::Result<File> {
    fs::create_dir_all(state)?;
    fs::set_permissions(state, fs::Permissions::from_mode(0o700))?;
    let path = state.join("lock");
    OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(path)
}

fn unwritable(error: io::Error) -> anyhow::Error {
    if error.kind() != io::ErrorKind::ReadOnlyFilesystem {
        return anyhow::Error::from(error).context(format!("opening {STATE}/lock"));
    }
    let what = format!("nothing can be written to {STATE}");
    Failure::new(Exit::Preflight, "MOUNT_READ_ONLY", what)
        .why("its file system is mounted read-only; nothing was changed")
        .hint(format!(
            "mount it writable (`findmnt -T {STATE}` shows what is there), then run again"
        ))
        .into()
}

/// Whether `file` is what `path` names.
fn is_at(file: &File, path: &Path) -> bool {
    match (file.metadata(), fs::metadata(path)) {
        (Ok(open), Ok(named)) => (open.dev(), open.ino()) == (named.dev(), named.ino()),
        _ => false,
    }
}

impl Drop for HostWriter {
    /// The lock goes back. Where there is no journal not even its directory is left behind, however
    /// this run ends, and whatever one before left that was killed.
    fn drop(&mut self) {
        let state = self.real_path(STATE);
        if !state.join("journal.json").exists() {
            let _ = fs::remove_file(state.join("lock"));
            let _ = fs::remove_dir(state);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn without_a_journal_nothing_is_left() {
        let dir = tempfile::tempdir().unwrap();
        let host = Host::new(dir.path(), None);
        drop(host.lock().unwrap());
        assert!(!host.exists(STATE));
        // what a run left that was killed
        fs::create_dir_all(host.real_path(STATE)).unwrap();
        fs::write(host.real_path(STATE).join("lock"), "").unwrap();
        drop(host.lock().unwrap());
        assert!(!host.exists(STATE));
        let writer = host.lock().unwrap();
        fs::write(host.real_path(STATE).join("journal.json"), "{}").unwrap();
        drop(writer);
        assert!(host.exists(&format!("{STATE}/lock")));
    }

    #[test]
    fn a_lock_has_one_holder_though_its_file_comes_and_goes() {
        let dir = tempfile::tempdir().unwrap();
        let host = Host::new(dir.path(), None);
        let (holders, taken) = (AtomicUsize::new(0), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..500 {
                        let Ok(writer) = host.lock() else { continue };
                        assert_eq!(holders.fetch_add(1, Ordering::SeqCst), 0);
                        taken.fetch_add(1, Ordering::SeqCst);
                        holders.fetch_sub(1, Ordering::SeqCst);
                        drop(writer);
                    }
                });
            }
        });
        assert!(taken.into_inner() > 0);
        assert!(!host.exists(STATE));
    }
}
