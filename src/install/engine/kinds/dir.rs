//! A directory.

use crate::host::{Host, HostWriter};
use crate::install::engine::files::{missing_parents, remove_created};
use crate::install::engine::journal::{JournalEntry, PriorState};
use crate::install::engine::leftover::Leftover;
use crate::install::plan::StepStatus;

pub(super) fn check(
    host: &Host,
    entry: Option<&JournalEntry>,
    path: &str,
    mode: u32,
) -> StepStatus {
    let ours = entry.is_some_and(|e| matches!(e.before, PriorState::Absent { .. }));
    match host.mode(path) {
        None => StepStatus::todo(format!("create {path}")),
        // a directory that was there before keeps its mode
        Some(have) if have != mode && ours => {
            StepStatus::todo(format!("set the mode of {path} to {mode:o}"))
        }
        Some(_) => StepStatus::Done,
    }
}

pub(super) fn before(host: &Host, path: &str) -> PriorState {
    if host.exists(path) {
        PriorState::Present
    } else {
        PriorState::Absent { made: missing_parents(host, path) }
    }
}

pub(super) fn apply(writer: &HostWriter, path: &str, mode: u32) -> anyhow::Result<()> {
    if writer.mkdir(path, mode)?.is_empty() {
        writer.chmod(path, mode)?;
    }
    Ok(())
}

pub(super) fn undo(writer: &HostWriter, path: &str, before: &PriorState) -> Vec<Leftover> {
    let PriorState::Absent { made } = before else { return Vec::new() };
    if !writer.remove_empty(path) {
        return vec![Leftover::kept(format!(
            "{path}: not empty, it holds files that pipeops did not write"
        ))];
    }
    remove_created(writer, made);
    Vec::new()
}
