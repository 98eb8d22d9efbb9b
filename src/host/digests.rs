//! Digests of large files that this process has read already: a run asks for those of k3s and of
//! its own program many times.
#![expect(clippy::disallowed_types, reason = "part of the door that the lint guards")]

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read as _};
use std::os::unix::fs::MetadataExt as _;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use parking_lot::Mutex;
use sha2::{Digest as _, Sha256};

use crate::base::encoding::hex;

/// Smaller files are read faster than they are remembered.
const LARGE: u64 = 1 << 20;

/// Age of a change from which a later one can't bear the same time: the kernel's clock for files
/// ticks every 10 ms at the slowest.
const SETTLED: Duration = Duration::from_millis(100);

/// The same where the file system keeps whole seconds only, or two at a time.
const SETTLED_COARSE: Duration = Duration::from_secs(4);

/// A file as it was when it was opened. Each change changes its ctime, which no program can set.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct FileIdentity {
    device: u64,
    inode: u64,
    size: u64,
    mtime_ns: (i64, i64),
    ctime_ns: (i64, i64),
}

impl FileIdentity {
    /// `None` for a file that is small, or changed so lately that the next change could look the
    /// same.
    fn of(file: &File, now: SystemTime) -> io::Result<Option<FileIdentity>> {
        let metadata = file.metadata()?;
        let changed = Duration::new(
            u64::try_from(metadata.ctime()).unwrap_or_default(),
            u32::try_from(metadata.ctime_nsec()).unwrap_or_default(),
        );
        let now = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let age = now.saturating_sub(changed);
        let coarse = metadata.ctime_nsec() == 0;
        let settled = age > if coarse { SETTLED_COARSE } else { SETTLED };
        Ok((metadata.is_file() && metadata.len() >= LARGE && settled).then(|| FileIdentity {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            mtime_ns: (metadata.mtime(), metadata.mtime_nsec()),
            ctime_ns: (metadata.ctime(), metadata.ctime_nsec()),
        }))
    }
}

/// What is known of the files of one run.
#[derive(Clone, Debug, Default)]
pub(super) struct Digests(Arc<Mutex<HashMap<FileIdentity, String>>>);

impl Digests {
    /// sha256 of the whole file, in hexadecimal.
    pub(super) fn sha256(&self, mut file: File) -> io::Result<String> {
        let identity = FileIdentity::of(&file, SystemTime::now())?;
        if let Some(known) = identity.as_ref().and_then(|identity| self.get(identity)) {
            return Ok(known);
        }
        let mut digest = Sha256::new();
        let mut buffer = vec![0; 1 << 16];
        loop {
            match file.read(&mut buffer)? {
                0 => break,
                n => digest.update(&buffer[..n]),
            }
        }
        let digest = hex(&digest.finalize());
        if let Some(identity) = identity {
            self.put(identity, digest.clone());
        }
        Ok(digest)
    }

    fn get(&self, identity: &FileIdentity) -> Option<String> {
        self.0.lock().get(identity).cloned()
    }

    fn put(&self, identity: FileIdentity, digest: String) {
        self.0.lock().insert(identity, digest);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[test]
    fn a_file_is_taken_for_the_same_only_while_nobody_has_changed_it() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&vec![1; 1 << 20]).unwrap();
        let later = SystemTime::now() + Duration::from_secs(60);
        assert_eq!(
            FileIdentity::of(&file, SystemTime::now()).unwrap(),
            None,
            "it has just been written"
        );
        assert_eq!(
            FileIdentity::of(&file, SystemTime::UNIX_EPOCH).unwrap(),
            None,
            "the clock was set back"
        );
        let before = FileIdentity::of(&file, later).unwrap().unwrap();
        let digests = Digests::default();
        digests.put(before.clone(), "one".into());
        assert_eq!(
            digests.get(&FileIdentity::of(&file, later).unwrap().unwrap()),
            Some("one".into())
        );
        // of the same size, with the old time set again; the kernel's clock may tick only every 10
        // ms
        let modified = file.metadata().unwrap().modified().unwrap();
        let after = loop {
            file.set_modified(modified).unwrap();
            let now = FileIdentity::of(&file, later).unwrap().unwrap();
            if now.ctime_ns != before.ctime_ns {
                break now;
            }
        };
        assert_eq!((after.size, after.mtime_ns), (before.size, before.mtime_ns));
        assert_eq!(digests.get(&after), None);

        let mut small = tempfile::tempfile().unwrap();
        small.write_all(b"small").unwrap();
        assert_eq!(FileIdentity::of(&small, later).unwrap(), None);
    }
}
