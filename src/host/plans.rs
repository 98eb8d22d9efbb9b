//! Saved plans on disk: the first pipeops let every user read them, with the passwords that were in
//! them.
#![expect(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "part of the door to the machine"
)]

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use super::{Host, HostWriter};

use crate::base::order;

/// Stands at the beginning of every plan, see `install::plan::SCHEMA`.
const MARK: &str = "\"schema\": \"pipeops.plan/";
/// A plan has some 100 KiB.
const LARGEST: u64 = 8 << 20;
/// Entries that are looked at, so that a directory of a million files costs no time.
const MAX_FILES: usize = 5000;
/// File systems that may not answer.
const REMOTE: [&str; 6] = ["nfs", "cifs", "smb", "autofs", "fuse", "9p"];

/// A saved plan.
#[derive(Debug)]
pub struct SavedPlan {
    pub path: PathBuf,
    /// Permission bits.
    pub mode: u32,
    pub text: String,
}

impl Host {
    /// Saved plans of this user that others may read: where people keep files, in this directory,
    /// and beside `named`.
    pub fn plans_readable_by_others(&self, named: &[&str]) -> Vec<SavedPlan> {
        let mut left = MAX_FILES;
        let mut found = Vec::new();
        let remote: Vec<PathBuf> = self
            .mounts_under("/")
            .into_iter()
            .filter(|(_, kind)| REMOTE.iter().any(|r| kind.starts_with(r)))
            .map(|(mount, _)| self.real_path(&mount))
            .collect();
        for path in named {
            look(Path::new(path), &mut found);
            walk(
                Path::new(path)
                    .parent()
                    .filter(|p| !p.as_os_str().is_empty())
                    .unwrap_or(Path::new(".")),
                0,
                &remote,
                &mut left,
                &mut found,
            );
        }
        walk(Path::new("."), 0, &remote, &mut left, &mut found);
        for (dir, depth) in [
            ("/root", 2),
            ("/home", 3),
            ("/etc/pipeops", 1),
            ("/var/lib/pipeops", 1),
            ("/tmp", 1),
            ("/var/tmp", 1),
            ("/opt", 1),
            ("/srv", 1),
        ] {
            walk(&self.real_path(dir), depth, &remote, &mut left, &mut found);
        }
        let mut plans: Vec<SavedPlan> = found
            .into_iter()
            .filter_map(|p| Some(SavedPlan { path: fs::canonicalize(&p.path).ok()?, ..p }))
            .collect();
        order::sort(&mut plans, |a, b| a.path.cmp(&b.path));
        plans.dedup_by(|a, b| a.path == b.path);
        plans
    }
}

impl HostWriter {
    /// Makes a file of this user's readable for its owner only. A file that was put in its place
    /// meanwhile is left alone.
    ///
    /// # Errors
    /// Names the file.
    pub fn make_private(&self, path: &Path) -> anyhow::Result<()> {
        use anyhow::Context as _;
        let close =
            || -> io::Result<()> { open(path)?.set_permissions(fs::Permissions::from_mode(0o600)) };
        close().with_context(|| format!("closing {}", path.display()))
    }
}

/// Opens a regular file of this user's; never follows a link, never waits for a pipe.
fn open(path: &Path) -> io::Result<File> {
    let flags = nix::fcntl::OFlag::O_NOFOLLOW | nix::fcntl::OFlag::O_NONBLOCK;
    let file = OpenOptions::new().read(true).custom_flags(flags.bits()).open(path)?;
    let meta = file.metadata()?;
    if !meta.is_file() || meta.uid() != nix::unistd::geteuid().as_raw() {
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    Ok(file)
}

fn walk(dir: &Path, depth: u32, remote: &[PathBuf], left: &mut usize, found: &mut Vec<SavedPlan>) {
    if remote.iter().any(|r| r == dir) {
        return;
    }
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if *left == 0 {
            return;
        }
        *left -= 1;
        match entry.file_type() {
            Ok(kind) if kind.is_file() => look(&entry.path(), found),
            Ok(kind)
                if kind.is_dir()
                    && depth > 0
                    && !entry.file_name().to_string_lossy().starts_with('.') =>
            {
                walk(&entry.path(), depth - 1, remote, left, found);
            }
            _ => {}
        }
    }
}

fn look(path: &Path, found: &mut Vec<SavedPlan>) {
    let Ok(meta) = fs::symlink_metadata(path) else { return };
    if !meta.is_file() || meta.mode() & 0o077 == 0 || !(64..LARGEST).contains(&meta.len()) {
        return;
    }
    let Ok(mut file) = open(path) else { return };
    let mut head = [0; 128];
    let read = file.read(&mut head).unwrap_or(0);
    if !String::from_utf8_lossy(&head[..read]).contains(MARK) {
        return;
    }
    let mut text = String::from_utf8_lossy(&head[..read]).into_owned();
    if file.take(LARGEST).read_to_string(&mut text).is_ok() {
        found.push(SavedPlan { path: path.to_owned(), mode: meta.mode() & 0o7777, text });
    }
}
