//! What all kinds that write a file share: what was there before, edits by somebody else, and
//! putting the former content back.

use sha2::{Digest as _, Sha256};

use super::context::StepContext;
use super::journal::{Journal, JournalEntry, PriorState, back_up};
use crate::base::encoding::hex;
use crate::host::paths::LOGS;
use crate::host::{Host, HostWriter, Owner, fetch};
use crate::install::plan::{FileContent, ProgressEvent, Resource, SecretName, Step};

pub(super) fn digest(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// A copy of the file as it is, or which directories are missing on the way to it.
pub(super) fn prior_state(writer: &HostWriter, id: &str, path: &str) -> anyhow::Result<PriorState> {
    let Some(bytes) = writer.read_bytes(path)? else {
        return Ok(PriorState::Absent { made: missing_parents(writer, path) });
    };
    let mode = writer.mode(path).unwrap_or(0o600);
    Ok(PriorState::File { backup: back_up(writer, id, &bytes)?, mode })
}

/// Parent directories that are not there, outermost first.
pub(super) fn missing_parents(host: &Host, path: &str) -> Vec<String> {
    let mut missing = Vec::new();
    let mut at = path;
    while let Some((parent, _)) = at.rsplit_once('/') {
        if parent.is_empty() || host.exists(parent) {
            break;
        }
        missing.insert(0, parent.to_owned());
        at = parent;
    }
    missing
}

pub(super) fn make_parent(writer: &HostWriter, path: &str) -> anyhow::Result<()> {
    let parent = path.rsplit_once('/').map_or("/", |(dir, _)| dir);
    writer.mkdir(if parent.is_empty() { "/" } else { parent }, 0o755).map(drop)
}

/// Parent directories that were created with a file are removed when nothing else is in them.
pub(super) fn remove_created(writer: &HostWriter, made: &[String]) {
    for dir in made.iter().rev() {
        writer.remove_empty(dir);
    }
}

/// Restores what was there, or nothing.
pub(super) fn restore(writer: &HostWriter, path: &str, before: &PriorState) -> anyhow::Result<()> {
    match before {
        PriorState::File { backup, mode } => {
            if let Some(bytes) = writer.read_bytes(backup)? {
                writer.write(path, &bytes, *mode, Owner::default())?;
            }
        }
        PriorState::Absent { made } => {
            writer.remove(path)?;
            remove_created(writer, made);
        }
        PriorState::Present | PriorState::Unit { .. } => {}
    }
    Ok(())
}

/// Undoes a file, and removes what belongs to it: the former program, parts of a download.
pub(super) fn undo(writer: &HostWriter, entry: &JournalEntry, path: &str) -> anyhow::Result<()> {
    restore(writer, path, &entry.before)?;
    writer.remove(&format!("{path}.old"))?;
    fetch::remove_partial_downloads(writer, path)
}

/// Before a file of ours is overwritten: an edit by somebody else is kept.
pub(super) fn back_up_edit_before_write(
    context: &mut StepContext<'_>,
    journal: &Journal,
    step: &Step,
    path: &str,
) -> anyhow::Result<()> {
    let written = journal.entry(&step.id).and_then(|e| e.digest.clone());
    back_up_edit(context, path, written.as_deref())
}

/// Copies the file to the log directory when it is not as it was `written`, and says so.
pub(super) fn back_up_edit(
    context: &mut StepContext<'_>,
    path: &str,
    written: Option<&str>,
) -> anyhow::Result<()> {
    let writer = context.writer;
    let Some(written) = written else { return Ok(()) };
    let Some(now) = writer.sha256(path)? else { return Ok(()) };
    if now == written {
        return Ok(());
    }
    let dir = format!("{LOGS}/kept");
    writer.mkdir(&dir, 0o700)?;
    let kept = format!("{dir}/{}.{}", path.trim_start_matches('/').replace('/', "_"), &now[..12]);
    writer.copy(&writer.real_path(path), &kept, 0o600, false)?;
    (context.on_event)(ProgressEvent::Note {
        text: format!(
            "CONFIG_DRIFT: {path} was edited outside pipeops; that version is kept as {kept}"
        ),
    });
    Ok(())
}

/// Files of ours that are not as we wrote them.
pub(super) fn drift(host: &Host, journal: &Journal) -> anyhow::Result<Vec<String>> {
    let mut found = Vec::new();
    for entry in &journal.entries {
        let Resource::File { path, content, .. } = &entry.want else { continue };
        if *content == FileContent::Secret(SecretName::AgentToken) {
            continue;
        }
        if let (Some(written), Some(now)) = (&entry.digest, host.sha256(path)?)
            && now != *written
        {
            found.push(path.clone());
        }
    }
    Ok(found)
}
