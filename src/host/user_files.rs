//! Files of the user's, by the path that was typed: never below another root.

use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::PathBuf;

use anyhow::Context as _;

use super::Host;
use crate::base::error::Failure;

/// A file of the user's that cannot be read.
pub fn unreadable(path: &str, error: &anyhow::Error) -> Failure {
    Failure::usage("FILE_UNREADABLE", format!("cannot read {path}"))
        .why(format!("{:#}", error.root_cause()))
        .hint("check the path and who may read it")
}

/// A path of the user's that cannot be written to is a wrong value; anything else, as a full disk,
/// is not.
fn unwritable(path: &str, error: io::Error) -> anyhow::Error {
    use io::ErrorKind as Kind;
    let wrong = matches!(
        error.kind(),
        Kind::NotFound
            | Kind::NotADirectory
            | Kind::IsADirectory
            | Kind::InvalidInput
            | Kind::PermissionDenied
            | Kind::ReadOnlyFilesystem
    );
    if !wrong {
        return anyhow::Error::new(error).context(format!("writing {path}"));
    }
    Failure::usage("FILE_UNWRITABLE", format!("cannot write {path}"))
        .why(error.to_string())
        .hint("check that its directory is there, and who may write it")
        .into()
}

impl Host {
    /// Text of a file of settings: one that was named must be there, the usual one may be absent.
    ///
    /// # Errors
    /// As [`unreadable`].
    pub fn read_settings(&self, path: &str, usual: &str) -> Result<Option<String>, Failure> {
        let text =
            if path == usual { self.read(path) } else { self.read_user_file(path).map(Some) };
        text.map_err(|e| unreadable(path, &e))
    }

    /// Text of a file of the user's (offline directory, token file), outside any sandbox root.
    ///
    /// # Errors
    /// Names the file.
    pub fn read_user_file(&self, path: &str) -> anyhow::Result<String> {
        let bytes = self.read_user_bytes(path)?;
        String::from_utf8(bytes).ok().with_context(|| format!("{path} is not text"))
    }

    /// The same of a file that need not be text.
    ///
    /// # Errors
    /// Names the file.
    pub fn read_user_bytes(&self, path: &str) -> anyhow::Result<Vec<u8>> {
        fs::read(path).with_context(|| format!("reading {path}"))
    }

    /// Writes a new file of the user's with secrets in it, mode 0600: durable, or not there.
    ///
    /// # Errors
    /// Exit 2 when it exists or its directory is not there; else names the file.
    pub fn create_user_file(&self, path: &str, content: &str) -> anyhow::Result<()> {
        let opened = OpenOptions::new().create_new(true).write(true).mode(0o600).open(path);
        let mut file = opened.map_err(|e| match e.kind() {
            io::ErrorKind::AlreadyExists => anyhow::Error::new(
                Failure::usage("FILE_EXISTS", format!("{path} exists already"))
                    .hint("name a new file"),
            ),
            _ => unwritable(path, e),
        })?;
        let written = file.write_all(content.as_bytes()).and_then(|()| file.sync_all());
        written
            .inspect_err(|_| drop(fs::remove_file(path)))
            .with_context(|| format!("writing {path}"))
    }

    /// Names in a directory of the user's.
    ///
    /// # Errors
    /// Names the directory.
    pub fn list_user_dir(&self, path: &str) -> anyhow::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(path).with_context(|| format!("reading {path}"))? {
            names.push(
                entry
                    .with_context(|| format!("reading {path}"))?
                    .file_name()
                    .to_string_lossy()
                    .into_owned(),
            );
        }
        names.sort();
        Ok(names)
    }

    /// sha256 of a file of the user's.
    ///
    /// # Errors
    /// Names the file.
    pub fn user_file_sha256(&self, path: &str) -> anyhow::Result<String> {
        let machine = Host { root: "/".into(), ..self.clone() };
        machine
            .sha256(&self.absolute_user_path(path))?
            .with_context(|| format!("{path} is not there"))
    }

    /// Writes a file for the user, for example a saved plan: mode 0600, also where one of another
    /// mode was there.
    ///
    /// # Errors
    /// Exit 2 when its directory is not there; else names the file.
    pub fn write_user_file(&self, path: &str, text: &str) -> anyhow::Result<()> {
        let attempt = || -> io::Result<()> {
            // a link keeps its place; a pipe or a terminal is written to as it is
            let real = fs::canonicalize(path).unwrap_or_else(|_| PathBuf::from(path));
            if fs::metadata(&real).is_ok_and(|m| !m.is_file()) {
                return OpenOptions::new().write(true).open(&real)?.write_all(text.as_bytes());
            }
            let name =
                real.file_name().ok_or(io::ErrorKind::InvalidInput)?.to_string_lossy().into_owned();
            let beside = real.with_file_name(format!(".{name}.{}.new", std::process::id()));
            let mut file =
                OpenOptions::new().create_new(true).write(true).mode(0o600).open(&beside)?;
            let written = file
                .write_all(text.as_bytes())
                .and_then(|()| file.sync_all())
                .and_then(|()| fs::rename(&beside, &real));
            written.inspect_err(|_| drop(fs::remove_file(&beside)))
        };
        attempt().map_err(|error| unwritable(path, error))
    }

    /// A path of the user's from the root on, so that it means the same in another directory; `-`
    /// stays standard input.
    pub fn absolute_user_path(&self, path: &str) -> String {
        match std::path::absolute(path) {
            Ok(absolute) if path != "-" => absolute.display().to_string(),
            _ => path.to_owned(),
        }
    }

    /// A path that the user typed for one of the machine: below another root it is that machine's.
    pub fn typed_path(&self, path: &str) -> String {
        if self.is_running_machine() { self.absolute_user_path(path) } else { path.to_owned() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::error::Exit;

    #[test]
    fn a_path_is_meant_from_the_current_directory() {
        let here = std::env::current_dir().unwrap().display().to_string();
        let (machine, other) = (Host::new("/", None), Host::new("below", None));
        for (path, wanted) in [
            ("off", format!("{here}/off")),
            ("./off", format!("{here}/off")),
            ("/off", "/off".into()),
            ("-", "-".into()),
        ] {
            assert_eq!(machine.absolute_user_path(path), wanted);
            assert_eq!(other.absolute_user_path(path), wanted);
        }
        assert_eq!(machine.typed_path("data"), format!("{here}/data"));
        assert_eq!(other.typed_path("data"), "data");
        assert_eq!(other.real_path("/etc").display().to_string(), format!("{here}/below/etc"));
        assert_eq!(machine.user_file_sha256("Cargo.toml").unwrap().len(), 64);
    }

    #[test]
    fn a_file_in_no_directory_is_a_wrong_value_and_a_full_disk_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let host = Host::new("/", None);
        let path = dir.path().join("none/x").display().to_string();
        for written in [host.create_user_file(&path, "x"), host.write_user_file(&path, "x")] {
            let failure = Failure::from_error(&written.unwrap_err());
            assert_eq!((failure.exit, failure.code.as_str()), (Exit::Usage, "FILE_UNWRITABLE"));
            assert!(failure.what.contains(&path) && failure.hint.is_some(), "{failure:?}");
        }
        let full = Failure::from_error(&unwritable("/x", io::ErrorKind::StorageFull.into()));
        assert_eq!(full.code, "DISK_FULL");
    }
}
