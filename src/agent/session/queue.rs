//! Results and status reports on disk until the control plane has them. When there is no room,
//! status reports are dropped, results never.

use crate::host::state::StateDir;

/// Most status reports that are kept while the control plane does not take them.
const MAX_STATUS_REPORTS: usize = 32;

/// Entries in the order in which they were added.
pub struct Queue {
    dir: StateDir,
    next: u64,
    /// Status reports that were dropped because there was no room.
    pub dropped: u64,
}

/// The kind of an entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EntryKind {
    Status,
    Result { operation: String },
}

impl Queue {
    pub fn open(dir: StateDir) -> Queue {
        let next = dir
            .list()
            .last()
            .and_then(|n| n.split('-').next()?.parse::<u64>().ok())
            .map_or(1, |n| n + 1);
        Queue { dir, next, dropped: 0 }
    }

    fn statuses(&self) -> Vec<String> {
        self.dir.list().into_iter().filter(|n| n.ends_with("-status.json")).collect()
    }

    /// Adds an entry. On a full disk the oldest reports are dropped, one after the other.
    ///
    /// # Errors
    /// When there is still no room; the caller then drops a report, and tries a result again.
    pub fn push(&mut self, what: &EntryKind, body: &str) -> anyhow::Result<()> {
        let kind = match what {
            EntryKind::Status => "status".to_owned(),
            EntryKind::Result { operation } => format!("result-{operation}"),
        };
        let mut old = self.statuses();
        if *what == EntryKind::Status && old.len() >= MAX_STATUS_REPORTS {
            let excess = old.len() + 1 - MAX_STATUS_REPORTS;
            for name in old.drain(..excess) {
                self.dir.remove(&name);
                self.dropped += 1;
            }
        }
        let name = format!("{:016}-{kind}.json", self.next);
        loop {
            match self.dir.write(&name, body) {
                Ok(()) => {
                    self.next += 1;
                    return Ok(());
                }
                Err(e) if old.is_empty() => return Err(e),
                Err(_) => {
                    self.dir.remove(&old.remove(0));
                    self.dropped += 1;
                }
            }
        }
    }

    /// The oldest entry: its name, kind and body. One that cannot be read is removed and skipped.
    pub fn oldest(&self) -> Option<(String, EntryKind, String)> {
        for name in self.dir.list() {
            let stem = name
                .strip_suffix(".json")
                .and_then(|n| n.split_once('-'))
                .map(|(_, kind)| kind.to_owned());
            let what = match stem.as_deref() {
                Some("status") => EntryKind::Status,
                Some(kind) if kind.starts_with("result-") => {
                    EntryKind::Result { operation: kind["result-".len()..].to_owned() }
                }
                _ => continue,
            };
            match self.dir.read(&name) {
                Ok(Some(body)) => return Some((name, what, body)),
                _ => self.dir.remove(&name),
            }
        }
        None
    }

    /// Removes an entry that was taken, or never will be.
    pub fn remove(&self, name: &str) {
        self.dir.remove(name);
    }

    /// Removes all entries.
    pub fn clear(&self) {
        for name in self.dir.list() {
            self.dir.remove(&name);
        }
    }

    pub fn len(&self) -> usize {
        self.dir.list().len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::Host;

    #[test]
    fn reports_give_way_results_never_and_order_survives_a_restart() {
        let root = tempfile::tempdir().unwrap();
        let open = || Queue::open(Host::new(root.path(), None).state_dir("/q").unwrap());
        let mut queue = open();
        queue.push(&EntryKind::Result { operation: "o-1".into() }, "{}").unwrap();
        for n in 0..MAX_STATUS_REPORTS + 5 {
            queue.push(&EntryKind::Status, &n.to_string()).unwrap();
        }
        assert_eq!((queue.len(), queue.dropped), (MAX_STATUS_REPORTS + 1, 5));
        let mut queue = open();
        queue.push(&EntryKind::Status, "last").unwrap();
        let (name, what, _) = queue.oldest().unwrap();
        assert_eq!(what, EntryKind::Result { operation: "o-1".into() });
        queue.remove(&name);
        assert_eq!(queue.oldest().unwrap().2, "6");
    }
}
