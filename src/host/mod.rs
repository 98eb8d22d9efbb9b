//! The one way to the machine: files under a root, programs on a path. Reading and changing are two
//! types.
#![expect(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "this is the door that the lint guards"
)]

mod digests;
pub mod download;
pub mod fetch;
mod lock;
pub mod mountinfo;
pub mod paths;
pub mod plans;
pub mod program;
mod remove;
pub mod state;
pub mod systemd;
pub mod user_files;

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use nix::fcntl::Flock;

use crate::host::digests::Digests;

/// A machine, or a directory that stands for one; can only be read.
#[derive(Clone, Debug)]
pub struct Host {
    root: PathBuf,
    path: OsString,
    digests: Digests,
}

/// Owner of a file by name, looked up in the machine's own `passwd` and `group`: a static program
/// has no NSS.
#[derive(Clone, Copy, Debug, Default)]
pub struct Owner<'a> {
    pub user: Option<&'a str>,
    pub group: Option<&'a str>,
}

/// Raises the limit of open files to what the system allows: the default is 1,024, and every
/// connection needs one.
pub fn raise_descriptor_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        // what is refused leaves things as they are
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}

/// Beside each `bin` its `sbin`: a plain `su` on Debian leaves those out, and modprobe, useradd or
/// nft are there.
fn with_sbin(path: OsString) -> OsString {
    let dirs: Vec<PathBuf> =
        std::env::split_paths(&path).filter(|d| !d.as_os_str().is_empty()).collect();
    let missing = dirs
        .iter()
        .filter(|d| d.ends_with("bin"))
        .map(|d| d.with_file_name("sbin"))
        .filter(|d| !dirs.contains(d));
    std::env::join_paths(dirs.iter().cloned().chain(missing)).unwrap_or(path)
}

impl Host {
    /// `root` is `/` in production, or a directory, as seen from the current one; `path` is where
    /// programs are looked for.
    pub fn new(root: impl Into<PathBuf>, path: Option<OsString>) -> Host {
        let root = root.into();
        // programs are looked for and started from elsewhere
        let root = std::path::absolute(&root).unwrap_or(root);
        let mut path = with_sbin(path.unwrap_or_default());
        if !path.is_empty() {
            path.push(":");
        }
        if root == Path::new("/") {
            // sudo and cron may leave out sbin
            path.push("/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
        } else {
            path.push(root.join("usr/local/bin"));
        }
        Host { root, path, digests: Digests::default() }
    }

    /// Whether this is the running machine itself.
    pub fn is_running_machine(&self) -> bool {
        self.root == Path::new("/")
    }

    /// The real place of a path of the machine.
    pub fn real_path(&self, path: &str) -> PathBuf {
        self.root.join(path.trim_start_matches('/'))
    }

    /// The text of a file, `None` when it is not there.
    ///
    /// # Errors
    /// When it is there and cannot be read; the message names it.
    pub fn read(&self, path: &str) -> anyhow::Result<Option<String>> {
        Ok(self.read_bytes(path)?.map(|bytes| String::from_utf8_lossy(&bytes).into_owned()))
    }

    /// The last bytes of a file that may be long; nothing when it cannot be read.
    pub fn tail(&self, path: &str, max: u64) -> Option<String> {
        use std::io::{Read as _, Seek as _};
        let mut file = fs::File::open(self.real_path(path)).ok()?;
        let length = file.metadata().ok()?.len();
        file.seek(io::SeekFrom::Start(length.saturating_sub(max))).ok()?;
        let mut bytes = Vec::new();
        file.take(max).read_to_end(&mut bytes).ok()?;
        Some(String::from_utf8_lossy(&bytes).into_owned())
    }

    pub fn read_bytes(&self, path: &str) -> anyhow::Result<Option<Vec<u8>>> {
        match fs::read(self.real_path(path)) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(e)
                if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) =>
            {
                Ok(None)
            }
            Err(e) => Err(e).with_context(|| format!("reading {path}")),
        }
    }

    /// The text, or nothing: for facts, where unreadable and absent mean the same.
    pub fn text(&self, path: &str) -> String {
        self.read(path).ok().flatten().unwrap_or_default()
    }

    /// Whether anything is there, dangling links included.
    pub fn exists(&self, path: &str) -> bool {
        fs::symlink_metadata(self.real_path(path)).is_ok()
    }

    pub fn is_dir(&self, path: &str) -> bool {
        fs::metadata(self.real_path(path)).is_ok_and(|m| m.is_dir())
    }

    /// Permission bits.
    pub fn mode(&self, path: &str) -> Option<u32> {
        fs::metadata(self.real_path(path)).ok().map(|m| m.permissions().mode() & 0o7777)
    }

    /// Seconds since 1970 of the last change.
    pub fn modified(&self, path: &str) -> Option<i64> {
        fs::metadata(self.real_path(path)).ok().map(|m| m.mtime())
    }

    /// Differs when a file was replaced or written again, also within one second.
    pub fn revision(&self, path: &str) -> Option<(u64, i64, i64)> {
        fs::metadata(self.real_path(path)).ok().map(|m| (m.ino(), m.mtime(), m.mtime_nsec()))
    }

    /// Numeric owner and group.
    pub fn owner(&self, path: &str) -> Option<(u32, u32)> {
        fs::metadata(self.real_path(path)).ok().map(|m| (m.uid(), m.gid()))
    }

    pub fn link_target(&self, path: &str) -> Option<String> {
        fs::read_link(self.real_path(path)).ok().map(|t| t.to_string_lossy().into_owned())
    }

    /// Names in a directory, sorted; empty when it is not there.
    pub fn list(&self, path: &str) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(self.real_path(path))
            .into_iter()
            .flatten()
            .flatten()
            .map(|e| e.file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }

    /// sha256 of a file, streamed; `None` when it is not there. A large file that has not changed
    /// since is not read again.
    pub fn sha256(&self, path: &str) -> anyhow::Result<Option<String>> {
        let digest = match File::open(self.real_path(path)) {
            Ok(file) => self.digests.sha256(file).map(Some),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e),
        };
        digest.with_context(|| format!("reading {path}"))
    }

    /// Where a program is, by the path that this host was given.
    pub fn which(&self, program: &str) -> Option<PathBuf> {
        which::which_in(program, Some(&self.path), "/").ok()
    }

    /// Numeric id of a name in `passwd` or `group`.
    pub fn id_of(&self, file: &str, name: &str) -> Option<u32> {
        self.text(file).lines().find_map(|line| {
            let mut fields = line.split(':');
            (fields.next()? == name).then(|| fields.nth(1)?.parse().ok())?
        })
    }

    /// Home directory of a local user.
    pub fn home_of(&self, user: &str) -> Option<String> {
        self.text("/etc/passwd").lines().find_map(|line| {
            let fields: Vec<&str> = line.split(':').collect();
            (fields.first() == Some(&user)).then(|| fields.get(5).map(|h| (*h).to_owned()))?
        })
    }

    /// The address from which this machine reaches others. Nothing is sent: the kernel is asked for
    /// the route.
    pub fn outbound_address(&self) -> Option<std::net::IpAddr> {
        let socket = std::net::UdpSocket::bind("0.0.0.0:0").ok()?;
        socket.connect("192.0.2.1:9").ok()?;
        socket.local_addr().ok().map(|a| a.ip()).filter(|a| !a.is_unspecified())
    }

    /// Mount points at or below `dir`, deepest first, with their types.
    pub fn mounts_under(&self, dir: &str) -> Vec<(String, String)> {
        crate::host::mountinfo::mounts_under(&self.text("/proc/self/mountinfo"), dir)
    }

    fn write_whole(
        &self,
        path: &str,
        content: &[u8],
        mode: u32,
        owner: Owner<'_>,
    ) -> anyhow::Result<()> {
        let target = self.real_path(path);
        let beside = beside(&target);
        let attempt = || -> anyhow::Result<()> {
            let _ = fs::remove_file(&beside);
            let mut file =
                OpenOptions::new().create_new(true).write(true).mode(mode).open(&beside)?;
            file.set_permissions(fs::Permissions::from_mode(mode))?;
            self.chown(&beside, owner)?;
            file.write_all(content)?;
            file.sync_all()?;
            fs::rename(&beside, &target)?;
            sync_dir(&target)?;
            Ok(())
        };
        attempt()
            .inspect_err(|_| drop(fs::remove_file(&beside)))
            .with_context(|| format!("writing {path}"))
    }

    fn chown(&self, path: &Path, owner: Owner<'_>) -> anyhow::Result<()> {
        if !self.is_running_machine()
            || !nix::unistd::geteuid().is_root()
            || owner.user.is_none() && owner.group.is_none()
        {
            return Ok(());
        }
        let lookup = |file: &str, name: &str| {
            self.id_of(file, name).with_context(|| format!("`{name}` is not in {file}"))
        };
        let uid = owner.user.map(|u| lookup("/etc/passwd", u)).transpose()?;
        let gid = owner.group.map(|g| lookup("/etc/group", g)).transpose()?;
        std::os::unix::fs::lchown(path, uid, gid)?;
        Ok(())
    }

    /// Replaces a file under `/run` that the caller's unit owns; needs no lock, for it is no step
    /// of an installation.
    ///
    /// # Errors
    /// Names the file; the former one stays.
    pub fn replace(
        &self,
        path: &str,
        content: &[u8],
        mode: u32,
        owner: Owner<'_>,
        dir: &str,
        dir_mode: u32,
    ) -> anyhow::Result<()> {
        let real = self.real_path(dir);
        fs::create_dir_all(&real).with_context(|| format!("creating {dir}"))?;
        fs::set_permissions(&real, fs::Permissions::from_mode(dir_mode))
            .with_context(|| format!("setting the mode of {dir}"))?;
        self.chown(&real, owner).with_context(|| format!("setting the owner of {dir}"))?;
        self.write_whole(path, content, mode, owner)
    }
}

/// The right to change the machine, as [`Host::lock`] gives it: one holder at a time.
#[derive(Debug)]
pub struct HostWriter {
    host: Host,
    _lock: Flock<File>,
}

impl std::ops::Deref for HostWriter {
    type Target = Host;
    fn deref(&self) -> &Host {
        &self.host
    }
}

impl HostWriter {
    /// Writes a file as a whole: beside it first, durable, then renamed.
    ///
    /// # Errors
    /// Names the file; a half-written one never stands under its name.
    pub fn write(
        &self,
        path: &str,
        content: &[u8],
        mode: u32,
        owner: Owner<'_>,
    ) -> anyhow::Result<()> {
        self.host.write_whole(path, content, mode, owner)
    }

    /// Puts a finished file in place; the former one is kept as `PATH.old` when `keep` says so.
    pub fn move_into_place(
        &self,
        from: &Path,
        path: &str,
        mode: u32,
        keep: bool,
    ) -> anyhow::Result<()> {
        let target = self.real_path(path);
        let attempt = || -> io::Result<()> {
            fs::set_permissions(from, fs::Permissions::from_mode(mode))?;
            File::open(from)?.sync_all()?;
            if keep && target.exists() {
                let old = PathBuf::from(format!("{}.old", target.display()));
                let _ = fs::remove_file(&old);
                fs::hard_link(&target, &old)?;
            }
            fs::rename(from, &target)?;
            sync_dir(&target)
        };
        attempt().with_context(|| format!("putting {path} in place"))
    }

    /// Copies a file beside its destination, then renames.
    pub fn copy(&self, from: &Path, path: &str, mode: u32, keep: bool) -> anyhow::Result<()> {
        let beside = beside(&self.real_path(path));
        let _ = fs::remove_file(&beside);
        let copied = fs::copy(from, &beside)
            .with_context(|| format!("copying {} to {path}", from.display()))
            .map(drop);
        copied
            .and_then(|()| self.move_into_place(&beside, path, mode, keep))
            .inspect_err(|_| drop(fs::remove_file(&beside)))
    }

    /// Makes a directory and its parents; gives those that were not there, outermost first.
    pub fn mkdir(&self, path: &str, mode: u32) -> anyhow::Result<Vec<String>> {
        let mut made = Vec::new();
        let mut missing = Vec::new();
        let mut at = path.trim_end_matches('/');
        while !at.is_empty() && !self.exists(at) {
            missing.push(at.to_owned());
            at = at.rsplit_once('/').map_or("", |(parent, _)| parent);
        }
        for dir in missing.into_iter().rev() {
            let real = self.real_path(&dir);
            fs::create_dir(&real).with_context(|| format!("creating {dir}"))?;
            let mode = if dir == path { mode } else { 0o755 };
            fs::set_permissions(&real, fs::Permissions::from_mode(mode))
                .with_context(|| format!("setting the mode of {dir}"))?;
            made.push(dir);
        }
        Ok(made)
    }

    pub fn chmod(&self, path: &str, mode: u32) -> anyhow::Result<()> {
        fs::set_permissions(self.real_path(path), fs::Permissions::from_mode(mode))
            .with_context(|| format!("setting the mode of {path}"))
    }

    /// Owner of an existing file.
    pub fn set_owner(&self, path: &str, owner: Owner<'_>) -> anyhow::Result<()> {
        self.chown(&self.real_path(path), owner)
            .with_context(|| format!("setting the owner of {path}"))
    }

    /// Removes a file or link; absent is fine.
    pub fn remove(&self, path: &str) -> anyhow::Result<()> {
        match fs::remove_file(self.real_path(path)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                Err(e).with_context(|| format!("removing {path}"))
            }
            _ => Ok(()),
        }
    }

    /// Removes a directory if it is empty; says whether it is gone.
    pub fn remove_empty(&self, path: &str) -> bool {
        let _ = fs::remove_dir(self.real_path(path));
        !self.exists(path)
    }

    /// A symbolic link.
    pub fn link(&self, path: &str, target: &str) -> anyhow::Result<()> {
        std::os::unix::fs::symlink(target, self.real_path(path))
            .with_context(|| format!("linking {path}"))
    }

    /// Appends to a file, mode 0600 when made.
    pub fn append(&self, path: &str, text: &str) -> anyhow::Result<()> {
        let mut file = OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(self.real_path(path))
            .with_context(|| format!("opening {path}"))?;
        file.write_all(text.as_bytes()).with_context(|| format!("writing {path}"))
    }
}

fn beside(target: &Path) -> PathBuf {
    let name = target.file_name().unwrap_or_default().to_string_lossy().into_owned();
    target.with_file_name(format!(".{name}.pipeops-new"))
}

fn sync_dir(target: &Path) -> io::Result<()> {
    match target.parent() {
        Some(dir) => File::open(dir)?.sync_all(),
        None => Ok(()),
    }
}
