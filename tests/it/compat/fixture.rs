//! What a version of pipeops left behind, kept as files: how it is put away, and how a sandbox gets
//! it back.
//!
//! A part is a directory of files, as they stood below `/`, and `modes`, which names each of them
//! with its mode, and directories and links.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::support::{Sandbox, sha256};

/// Stands for pipeops itself, which is too large to keep.
const PROGRAM: &str = "#!/bin/sh\n# the pipeops that left these files stood here\n";
/// No file of a fixture but the program is as large as this.
const LARGE: u64 = 1 << 20;

pub(super) const DIR: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it/fixtures");

/// Texts that are others in each sandbox (ports, its directory), and what stands in the fixture for
/// them.
pub(super) type Names = Vec<(String, String)>;

/// A directory of `fixtures/`.
pub(super) struct Fixture {
    pub(super) dir: PathBuf,
}

impl Fixture {
    /// Those of all versions.
    pub(super) fn all() -> Vec<Fixture> {
        let dirs = fs::read_dir(DIR)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.is_dir());
        let mut all: Vec<Fixture> = dirs.map(|dir| Fixture { dir }).collect();
        all.sort_by(|a, b| a.dir.cmp(&b.dir));
        assert!(!all.is_empty(), "there are no fixtures");
        all
    }

    pub(super) fn text(&self, file: &str) -> String {
        let path = self.dir.join(file);
        fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
    }

    pub(super) fn json(&self, file: &str) -> Value {
        serde_json::from_str(&self.text(file)).unwrap()
    }

    pub(super) fn write(&self, file: &str, text: &str) {
        fs::create_dir_all(&self.dir).unwrap();
        fs::write(self.dir.join(file), text).unwrap();
    }

    pub(super) fn write_json(&self, file: &str, value: &Value) {
        self.write(file, &format!("{value:#}\n"));
    }

    /// A text of the fixture as it would stand in a sandbox with these names.
    pub(super) fn named(&self, file: &str, names: &Names) -> String {
        renamed(&self.text(file), names, true)
    }

    /// Puts a part into a sandbox.
    pub(super) fn put(&self, part: &str, sandbox: &Sandbox, names: &Names) {
        let (from, root) = (self.dir.join(part), sandbox.root());
        let modes = fs::read_to_string(from.join("modes")).unwrap();
        let mut dirs = Vec::new();
        for line in modes.lines() {
            let mut words = line.splitn(3, ' ');
            let (mode, kind, name) =
                (words.next().unwrap(), words.next().unwrap(), words.next().unwrap());
            let mode = fs::Permissions::from_mode(u32::from_str_radix(mode, 8).unwrap());
            match kind {
                "link" => {
                    let (name, target) = name.split_once(" -> ").unwrap();
                    symlink(target, root.join(name)).unwrap();
                }
                "dir" => {
                    fs::create_dir_all(root.join(name)).unwrap();
                    dirs.push((root.join(name), mode));
                }
                _ => {
                    let bytes = fs::read(from.join(name)).unwrap();
                    let bytes = String::from_utf8(bytes).map_or_else(
                        |e| e.into_bytes(),
                        |text| renamed(&text, names, true).into_bytes(),
                    );
                    // a new file each time: one that was there may be linked to elsewhere
                    let _ = fs::remove_file(root.join(name));
                    fs::write(root.join(name), bytes).unwrap();
                    fs::set_permissions(root.join(name), mode).unwrap();
                }
            }
        }
        for (dir, mode) in dirs {
            fs::set_permissions(dir, mode).unwrap();
        }
    }

    /// Puts away what stands in `sandbox` below `places` and does not stand in a sandbox that
    /// nobody has used.
    pub(super) fn keep(&self, part: &str, sandbox: &Sandbox, places: &[&str], names: &Names) {
        let (to, root, fresh) = (self.dir.join(part), sandbox.root(), Sandbox::new());
        let mut found = BTreeSet::new();
        for place in places {
            below(&root.join(place), &mut found);
        }
        let mut names = names.clone();
        for path in found.iter().filter(|path| large(path)) {
            names.push((sha256(&fs::read(path).unwrap()), sha256(PROGRAM.as_bytes())));
        }
        let mut modes = String::new();
        for path in found {
            let name = path.strip_prefix(&root).unwrap();
            let meta = fs::symlink_metadata(&path).unwrap();
            let (mode, shown) = (meta.permissions().mode() & 0o7777, name.display());
            if meta.is_symlink() {
                writeln!(
                    modes,
                    "{mode:o} link {shown} -> {}",
                    fs::read_link(&path).unwrap().display()
                )
                .unwrap();
            } else if meta.is_dir() {
                writeln!(modes, "{mode:o} dir {shown}").unwrap();
            } else if meta.is_file() {
                let bytes = if large(&path) { PROGRAM.into() } else { fs::read(&path).unwrap() };
                if fs::read(fresh.root().join(name)).is_ok_and(|known| known == bytes) {
                    continue;
                }
                let bytes = String::from_utf8(bytes).map_or_else(
                    |e| e.into_bytes(),
                    |text| renamed(&text, &names, false).into_bytes(),
                );
                fs::create_dir_all(to.join(name).parent().unwrap()).unwrap();
                fs::write(to.join(name), bytes).unwrap();
                writeln!(modes, "{mode:o} file {shown}").unwrap();
            }
        }
        fs::write(to.join("modes"), modes).unwrap();
    }
}

pub(super) fn renamed(text: &str, names: &Names, back: bool) -> String {
    names.iter().fold(text.to_owned(), |text, (here, kept)| {
        if back { text.replace(kept, here) } else { text.replace(here, kept) }
    })
}

fn large(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|meta| meta.is_file() && meta.len() > LARGE)
}

fn below(path: &Path, found: &mut BTreeSet<PathBuf>) {
    let Ok(meta) = fs::symlink_metadata(path) else { return };
    found.insert(path.to_owned());
    if meta.is_dir() {
        for entry in fs::read_dir(path).unwrap() {
            below(&entry.unwrap().path(), found);
        }
    }
}

/// Name, type and label names of everything in a text of Prometheus, a line each.
pub(super) fn metrics(text: &str) -> String {
    let mut rows = BTreeSet::new();
    let types: Vec<(&str, &str)> = text
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE "))
        .map(|line| line.split_once(' ').unwrap())
        .collect();
    for line in text.lines().filter(|line| !line.starts_with('#') && !line.is_empty()) {
        let end = line.find(['{', ' ']).unwrap();
        let kind = types
            .iter()
            .find(|(name, _)| *name == &line[..end])
            .map_or("untyped", |(_, kind)| *kind);
        let (mut labels, mut rest) =
            (BTreeSet::new(), line[end..].strip_prefix('{').unwrap_or_default());
        while let Some((label, value)) = rest.split_once("=\"") {
            labels.insert(label.trim_start_matches(','));
            let closing =
                value.match_indices('"').find(|(at, _)| !value[..*at].ends_with('\\')).unwrap().0;
            rest = &value[closing + 1..];
        }
        let labels: Vec<&str> = labels.into_iter().collect();
        rows.insert(
            format!("{} {kind} {}", &line[..end], labels.join(",")).trim_end().to_owned() + "\n",
        );
    }
    rows.into_iter().collect()
}
