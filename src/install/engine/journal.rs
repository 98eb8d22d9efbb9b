//! The journal: what was there before and what we did, written ahead of every change.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::base::error::{Exit, Failure};
use crate::base::json;
use crate::base::text::unquoted_json_error;
use crate::host::paths::STATE;
use crate::host::{Host, HostWriter, Owner};
use crate::install::plan::Resource;
use crate::install::settings::recorded_k3s_table;
use crate::k3s::role::NodeRole;

pub const PATH: &str = "/var/lib/pipeops/journal.json";
/// Raised when the meaning of a field changes; every version ever written must still load.
const VERSION: u32 = 1;

/// What was there before the first change of a step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "was", rename_all = "snake_case")]
pub enum PriorState {
    /// Nothing; undoing removes it. `made` are the parent directories that came with it, outermost
    /// first.
    Absent {
        #[serde(default)]
        made: Vec<String>,
    },
    /// A copy is kept in our state directory.
    File {
        backup: String,
        mode: u32,
    },
    /// It was there and was left, or was as wanted.
    Present,
    Unit {
        enabled: bool,
        active: bool,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EntryState {
    /// Written before the change: it may or may not have happened.
    Intent,
    Done,
}

/// One step that was begun.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct JournalEntry {
    pub id: String,
    pub title: String,
    pub want: Resource,
    pub before: PriorState,
    pub state: EntryState,
    /// sha256 of what we wrote; a different one means that the file was edited since.
    #[serde(default)]
    pub digest: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Journal {
    pub version: u32,
    pub role: NodeRole,
    pub node: String,
    pub k3s_version: String,
    /// Options of the last run, without secrets.
    pub options: BTreeMap<String, String>,
    pub entries: Vec<JournalEntry>,
    /// Digest of the inputs that each unit was last started with.
    #[serde(default)]
    pub units: BTreeMap<String, String>,
    /// Whether the last run came to its end.
    #[serde(default)]
    pub complete: bool,
    /// Kernel settings and modules before k3s was installed: uninstall lists what changed.
    #[serde(default)]
    pub kernel: BTreeMap<String, String>,
    /// It held secrets when it was read and has not been written since.
    #[serde(skip)]
    pub scrubbed: bool,
}

impl Journal {
    pub fn new(role: NodeRole, node: &str, k3s_version: &str) -> Journal {
        Journal {
            version: VERSION,
            role,
            node: node.into(),
            k3s_version: k3s_version.into(),
            options: BTreeMap::new(),
            entries: Vec::new(),
            units: BTreeMap::new(),
            complete: false,
            kernel: BTreeMap::new(),
            scrubbed: false,
        }
    }

    /// The journal of this machine, `None` when pipeops has not been here.
    ///
    /// # Errors
    /// A damaged journal is a named failure: it is never taken for an empty one.
    pub fn load(host: &Host) -> anyhow::Result<Option<Journal>> {
        let Some(text) = host.read(PATH)? else { return Ok(None) };
        let damaged = |why: String| {
            Failure::new(Exit::Internal, "JOURNAL_DAMAGED", format!("{PATH} cannot be read"))
                .why(why)
                .hint("keep a copy of it and ask for help; without it nothing can be undone safely")
        };
        let value: serde_json::Value =
            serde_json::from_str(&text).map_err(|e| damaged(unquoted_json_error(&e)))?;
        let version = value.get("version").and_then(serde_json::Value::as_u64).unwrap_or(0);
        if version > u64::from(VERSION) {
            return Err(damaged(format!(
                "it was written by a newer pipeops (format {version}, this one knows {VERSION})"
            ))
            .into());
        }
        let mut journal: Journal =
            serde_json::from_value(value).map_err(|e| damaged(unquoted_json_error(&e)))?;
        // the first pipeops kept the [k3s] table as one text, with the secrets in it
        if let Some(table) = journal.options.remove("k3s") {
            journal.options.extend(recorded_k3s_table(&json::read(&table).unwrap_or_default()));
            journal.scrubbed = true;
        }
        Ok(Some(journal))
    }

    /// Durable before it returns.
    pub fn save(&self, writer: &HostWriter) -> anyhow::Result<()> {
        let text = serde_json::to_string_pretty(self)?;
        writer.write(PATH, text.as_bytes(), 0o600, Owner::default())
    }

    pub fn entry(&self, id: &str) -> Option<&JournalEntry> {
        self.entries.iter().find(|e| e.id == id)
    }

    /// Notes that a step begins. What was there before is recorded once and never overwritten by a
    /// later run.
    pub fn record_intent(&mut self, entry: JournalEntry) {
        match self.entries.iter_mut().find(|e| e.id == entry.id) {
            Some(known) => {
                known.title = entry.title;
                known.want = entry.want;
                known.state = EntryState::Intent;
            }
            None => self.entries.push(entry),
        }
    }

    pub fn finish(&mut self, id: &str, digest: Option<String>) {
        if let Some(entry) = self.entries.iter_mut().find(|e| e.id == id) {
            entry.state = EntryState::Done;
            entry.digest = digest.or(entry.digest.take());
        }
    }

    pub fn forget(&mut self, id: &str) {
        self.entries.retain(|e| e.id != id);
    }
}

/// Where the former content of a file is kept.
pub fn backup_path(id: &str) -> String {
    format!("{STATE}/backup/{id}")
}

/// Keeps it there, for root alone. Gives the path.
///
/// # Errors
/// When it cannot be written.
pub fn back_up(writer: &HostWriter, id: &str, bytes: &[u8]) -> anyhow::Result<String> {
    let path = backup_path(id);
    writer.mkdir(path.rsplit_once('/').map_or("/", |(dir, _)| dir), 0o700)?;
    writer.write(&path, bytes, 0o600, Owner::default())?;
    Ok(path)
}
