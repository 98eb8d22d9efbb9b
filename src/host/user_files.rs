//! Files of the user's, by the path that was typed: never below another root.

use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::PathBuf;

use anyhow::Context as _;

use super::Host;
use crate::base::error::Failure;

impl Host {
    /// Text of a file of the user's (offline directory, token file), outside any sandbox root.
    ///
    /// # Errors
    /// Names the file.
    pub fn users_file(&self, path: &str) -> anyhow::Result<String> {
        let bytes = fs::read(path).with_context(|| format!("reading {path}"))?;
        String::from_utf8(bytes).ok().with_context(|| format!("{path} is not text"))
    }

    /// Writes a new file of the user's with secrets in it, mode 0600: durable, or not there.
    ///
    /// # Errors
    /// Exit 2 when it exists; else names the file.
    pub fn users_new_file(&self, path: &str, content: &str) -> anyhow::Result<()> {
        let opened = OpenOptions::new().create_new(true).write(true).mode(0o600).open(path);
        let mut file = opened.map_err(|e| match e.kind() {
            std::io::ErrorKind::AlreadyExists => anyhow::Error::new(
                Failure::usage("FILE_EXISTS", format!("{path} exists already"))
                    .hint("name a new file"),
            ),
            _ => anyhow::Error::new(e).context(format!("writing {path}")),
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
    pub fn users_dir(&self, path: &str) -> anyhow::Result<Vec<String>> {
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
    pub fn users_sha256(&self, path: &str) -> anyhow::Result<String> {
        let machine = Host { root: "/".into(), ..self.clone() };
        machine.sha256(&self.users_path(path))?.with_context(|| format!("{path} is not there"))
    }

    /// Writes a file for the user, for example a saved plan: mode 0600, also where one of another
    /// mode was there.
    ///
    /// # Errors
    /// Names the file.
    pub fn write_for_user(&self, path: &str, text: &str) -> anyhow::Result<()> {
        let attempt = || -> std::io::Result<()> {
            // a link keeps its place; a pipe or a terminal is written to as it is
            let real = fs::canonicalize(path).unwrap_or_else(|_| PathBuf::from(path));
            if fs::metadata(&real).is_ok_and(|m| !m.is_file()) {
                return OpenOptions::new().write(true).open(&real)?.write_all(text.as_bytes());
            }
            let name = real
                .file_name()
                .ok_or(std::io::ErrorKind::InvalidInput)?
                .to_string_lossy()
                .into_owned();
            let beside = real.with_file_name(format!(".{name}.{}.new", std::process::id()));
            let mut file =
                OpenOptions::new().create_new(true).write(true).mode(0o600).open(&beside)?;
            let written = file
                .write_all(text.as_bytes())
                .and_then(|()| file.sync_all())
                .and_then(|()| fs::rename(&beside, &real));
            written.inspect_err(|_| drop(fs::remove_file(&beside)))
        };
        attempt().with_context(|| format!("writing {path}"))
    }

    /// A path of the user's from the root on, so that it means the same in another directory; `-`
    /// stays standard input.
    pub fn users_path(&self, path: &str) -> String {
        match std::path::absolute(path) {
            Ok(absolute) if path != "-" => absolute.display().to_string(),
            _ => path.to_owned(),
        }
    }

    /// A path that the user typed for one of the machine: below another root it is that machine's.
    pub fn typed_path(&self, path: &str) -> String {
        if self.is_machine() { self.users_path(path) } else { path.to_owned() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
            assert_eq!(machine.users_path(path), wanted);
            assert_eq!(other.users_path(path), wanted);
        }
        assert_eq!(machine.typed_path("data"), format!("{here}/data"));
        assert_eq!(other.typed_path("data"), "data");
        assert_eq!(other.at("/etc").display().to_string(), format!("{here}/below/etc"));
        assert_eq!(machine.users_sha256("Cargo.toml").unwrap().len(), 64);
    }
}
