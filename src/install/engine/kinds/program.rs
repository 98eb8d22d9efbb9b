//! This very program, copied to its place; the former one is kept beside it as `.old`.

use std::path::Path;

use crate::host::{Host, HostWriter};
use crate::install::engine::context::StepContext;
use crate::install::engine::files::{self, back_up_edit, make_parent};
use crate::install::engine::journal::{JournalEntry, PriorState};
use crate::install::plan::StepStatus;

const SELF: &str = "/proc/self/exe";

pub(super) fn check(host: &Host, path: &str) -> anyhow::Result<StepStatus> {
    Ok(match host.sha256(path)? {
        Some(have) if have == host.user_file_sha256(SELF)? => StepStatus::Done,
        Some(_) => StepStatus::todo(format!("replace {path}, keep the former one as {path}.old")),
        None => StepStatus::todo(format!("create {path}")),
    })
}

pub(super) fn before(writer: &HostWriter, id: &str, path: &str) -> anyhow::Result<PriorState> {
    files::prior_state(writer, id, path)
}

pub(super) fn apply(writer: &HostWriter, path: &str) -> anyhow::Result<String> {
    make_parent(writer, path)?;
    writer.copy(Path::new(SELF), path, 0o755, true)?;
    writer.user_file_sha256(SELF)
}

pub(super) fn undo(
    context: &mut StepContext<'_>,
    entry: &JournalEntry,
    path: &str,
) -> anyhow::Result<()> {
    back_up_edit(context, path, entry.digest.as_deref())?;
    files::undo(context.writer, entry, path)
}
