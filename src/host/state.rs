//! The agent's own directory: small files replaced as a whole, and one that only grows.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::PathBuf;

use anyhow::Context as _;
use nix::fcntl::{Flock, FlockArg};

use super::Host;
use crate::base::error::{Exit, Failure};

/// Longest line of a file that only grows, bytes.
const LINE: u64 = 64 * 1024;

/// A directory of mode 0700 whose files have mode 0600. Clones are the same directory.
#[derive(Clone, Debug)]
pub struct StateDir {
    dir: PathBuf,
}

impl Host {
    /// Opens, and where needed makes, a directory of the caller's.
    ///
    /// # Errors
    /// Names the directory.
    pub fn state_dir(&self, path: &str) -> anyhow::Result<StateDir> {
        let dir = self.real_path(path);
        fs::create_dir_all(&dir).with_context(|| format!("creating {path}"))?;
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o700))
            .with_context(|| format!("setting the mode of {path}"))?;
        Ok(StateDir { dir })
    }
}

impl Host {
    /// A directory to read from; it need not be there.
    pub fn read_only_state_dir(&self, path: &str) -> StateDir {
        StateDir { dir: self.real_path(path) }
    }
}

impl StateDir {
    /// Takes the directory for this process, as long as the answer lives.
    ///
    /// # Errors
    /// Exit 12 when another process has it.
    pub fn lock(&self) -> anyhow::Result<Flock<File>> {
        let path = self.dir.join("lock");
        let file =
            OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&path);
        let file = file.with_context(|| format!("opening {}", path.display()))?;
        Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|_| {
            Failure::new(
                Exit::Locked,
                "LOCKED",
                format!("another process works in {}", self.dir.display()),
            )
            .hint("stop it first, or give this one a directory of its own")
            .into()
        })
    }

    /// A directory inside.
    ///
    /// # Errors
    /// Names the directory.
    pub fn subdir(&self, name: &str) -> anyhow::Result<StateDir> {
        let dir = self.dir.join(name);
        fs::create_dir_all(&dir).with_context(|| format!("creating {}", dir.display()))?;
        Ok(StateDir { dir })
    }

    /// A file, `None` when it is not there.
    ///
    /// # Errors
    /// Names the file.
    pub fn read(&self, name: &str) -> anyhow::Result<Option<String>> {
        match fs::read_to_string(self.dir.join(name)) {
            Ok(text) => Ok(Some(text)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e).with_context(|| format!("reading {}", self.dir.join(name).display())),
        }
    }

    /// Replaces a file: durable, or as it was.
    ///
    /// # Errors
    /// Names the file.
    pub fn write(&self, name: &str, content: &str) -> anyhow::Result<()> {
        let (path, beside) = (self.dir.join(name), self.dir.join(format!(".{name}.new")));
        let attempt = || -> io::Result<()> {
            let _ = fs::remove_file(&beside);
            let mut file =
                OpenOptions::new().create_new(true).write(true).mode(0o600).open(&beside)?;
            file.write_all(content.as_bytes())?;
            file.sync_all()?;
            fs::rename(&beside, &path)?;
            File::open(&self.dir)?.sync_all()
        };
        attempt()
            .inspect_err(|_| drop(fs::remove_file(&beside)))
            .with_context(|| format!("writing {}", path.display()))
    }

    /// Creates an empty file where there is none, for a reader that opens it by its name.
    ///
    /// # Errors
    /// Names the file.
    pub fn touch(&self, name: &str) -> anyhow::Result<()> {
        let path = self.dir.join(name);
        let opened =
            OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&path);
        opened.map(drop).with_context(|| format!("writing {}", path.display()))
    }

    /// Renames a file over another.
    ///
    /// # Errors
    /// Names the file.
    pub fn rename(&self, from: &str, to: &str) -> anyhow::Result<()> {
        fs::rename(self.dir.join(from), self.dir.join(to))
            .with_context(|| format!("renaming {}", self.dir.join(from).display()))
    }

    /// Removes a file; absent is fine.
    pub fn remove(&self, name: &str) {
        let _ = fs::remove_file(self.dir.join(name));
    }

    /// Names of the finished files, sorted.
    pub fn list(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.dir).into_iter().flatten().flatten();
        let mut names: Vec<String> = entries
            .filter_map(|e| e.file_name().into_string().ok())
            .filter(|n| !n.starts_with('.'))
            .collect();
        names.sort();
        names
    }

    /// Bytes of a file, 0 when it is not there.
    pub fn size(&self, name: &str) -> u64 {
        fs::metadata(self.dir.join(name)).map_or(0, |m| m.len())
    }

    /// The last whole line of a file; what a crash left after it is cut off.
    ///
    /// # Errors
    /// Names the file.
    pub fn last_line(&self, name: &str) -> anyhow::Result<Option<String>> {
        let path = self.dir.join(name);
        let attempt = || -> io::Result<Option<String>> {
            let mut file = match OpenOptions::new().read(true).write(true).open(&path) {
                Ok(file) => file,
                Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
                Err(e) => return Err(e),
            };
            let size = file.metadata()?.len();
            let from = size.saturating_sub(LINE);
            file.seek(SeekFrom::Start(from))?;
            let mut end = Vec::new();
            file.read_to_end(&mut end)?;
            let whole = end.iter().rposition(|b| *b == b'\n').map_or(0, |at| at + 1);
            if whole < end.len() {
                file.set_len(from + whole as u64)?;
            }
            let text = String::from_utf8_lossy(&end[..whole]);
            Ok(text.lines().next_back().map(str::to_owned))
        };
        attempt().with_context(|| format!("reading {}", path.display()))
    }

    /// Whole lines at the end of a file, at most 64 KiB of them; none when it is not there.
    ///
    /// # Errors
    /// Names the file.
    pub fn last_lines(&self, name: &str) -> anyhow::Result<Vec<String>> {
        let path = self.dir.join(name);
        let attempt = || -> io::Result<Vec<String>> {
            let mut file = match File::open(&path) {
                Ok(file) => file,
                Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
                Err(e) => return Err(e),
            };
            let from = file.metadata()?.len().saturating_sub(LINE);
            file.seek(SeekFrom::Start(from))?;
            let mut end = Vec::new();
            file.take(LINE).read_to_end(&mut end)?;
            let text = String::from_utf8_lossy(&end);
            let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
            // the first one is cut where the reading began in it
            Ok(whole.lines().skip(usize::from(from > 0)).map(str::to_owned).collect())
        };
        attempt().with_context(|| format!("reading {}", path.display()))
    }

    /// Opens a file that only grows.
    ///
    /// # Errors
    /// Names the file.
    pub fn appender(&self, name: &str) -> anyhow::Result<Appender> {
        let path = self.dir.join(name);
        let file = OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(&path)
            .with_context(|| format!("opening {}", path.display()))?;
        let end = file.metadata().map_or(0, |m| m.len());
        Ok(Appender { file, end })
    }
}

/// A file that only grows, by whole lines.
#[derive(Debug)]
pub struct Appender {
    file: File,
    end: u64,
}

impl Appender {
    /// Appends a line, all of it or nothing.
    ///
    /// # Errors
    /// As the file system says; a line that was half-written is taken back.
    pub fn append_line(&mut self, text: &str) -> io::Result<()> {
        let bytes = format!("{text}\n");
        match self.file.write_all(bytes.as_bytes()) {
            Ok(()) => {
                self.end += bytes.len() as u64;
                Ok(())
            }
            Err(e) => {
                let _ = self.file.set_len(self.end);
                Err(e)
            }
        }
    }

    /// Bytes so far.
    pub fn size(&self) -> u64 {
        self.end
    }
}
