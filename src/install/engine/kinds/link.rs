//! A symbolic link, where nothing of its name is on the path already.

use crate::host::{Host, HostWriter};
use crate::install::engine::files::make_parent;
use crate::install::plan::StepStatus;

pub(super) fn check(host: &Host, path: &str, target: &str) -> StepStatus {
    let name = path.rsplit('/').next().unwrap_or_default();
    if host.exists(path) || host.which(name).is_some() {
        StepStatus::Done
    } else {
        StepStatus::todo(format!("link {path} to {target}"))
    }
}

pub(super) fn apply(writer: &HostWriter, path: &str, target: &str) -> anyhow::Result<()> {
    make_parent(writer, path)?;
    writer.link(path, target)
}

pub(super) fn undo(writer: &HostWriter, path: &str, target: &str) -> anyhow::Result<()> {
    if writer.link_target(path).as_deref() == Some(target) {
        writer.remove(path)?;
    }
    Ok(())
}
