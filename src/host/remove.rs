//! Removing a tree without crossing a mount or following a link.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;

use anyhow::Context as _;

use super::HostWriter;

impl HostWriter {
    /// Removes a tree without leaving its file system and without following links; `keep` names
    /// subtrees that stay.
    ///
    /// Gives what is left: paths on other file systems, and the kept ones.
    pub fn remove_tree(&self, path: &str, keep: &[String]) -> anyhow::Result<Vec<String>> {
        // read from the table of mounts, never from the mount: one whose server is gone blocks even
        // a stat
        let mounts: Vec<String> =
            self.mounts_under(path).into_iter().map(|(mount, _)| mount).collect();
        if mounts.iter().any(|m| m == path) {
            return Ok(vec![path.to_owned()]);
        }
        let Ok(top) = fs::symlink_metadata(self.real_path(path)) else { return Ok(Vec::new()) };
        let mut left = Vec::new();
        if top.is_dir() {
            self.remove_below(path, top.dev(), &mounts, keep, &mut left)?;
        } else {
            self.remove(path)?;
        }
        Ok(left)
    }

    fn remove_below(
        &self,
        path: &str,
        device: u64,
        mounts: &[String],
        keep: &[String],
        left: &mut Vec<String>,
    ) -> anyhow::Result<()> {
        if keep.iter().any(|k| k == path) {
            left.push(path.to_owned());
            return Ok(());
        }
        let entries =
            fs::read_dir(self.real_path(path)).with_context(|| format!("reading {path}"))?;
        for entry in entries {
            let entry = entry.with_context(|| format!("reading {path}"))?;
            let name =
                format!("{}/{}", path.trim_end_matches('/'), entry.file_name().to_string_lossy());
            if mounts.contains(&name) {
                left.push(name);
                continue;
            }
            let meta = match fs::symlink_metadata(entry.path()) {
                Ok(meta) => meta,
                Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                Err(e) => return Err(e).with_context(|| format!("looking at {name}")),
            };
            if meta.is_dir() {
                if meta.dev() == device {
                    self.remove_below(&name, device, mounts, keep, left)?;
                } else {
                    left.push(name);
                }
            } else if let Err(e) = fs::remove_file(entry.path())
                && e.kind() != io::ErrorKind::NotFound
            {
                return Err(e).with_context(|| format!("removing {name}"));
            }
        }
        let below = format!("{}/", path.trim_end_matches('/'));
        if !left.iter().any(|l| l.starts_with(&below)) {
            match fs::remove_dir(self.real_path(path)) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => {
                    return Err(e).with_context(|| format!("removing {path}"));
                }
                _ => {}
            }
        }
        Ok(())
    }
}
