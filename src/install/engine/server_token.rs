//! The server's token. k3s writes it again at each start, and empties the file first: a process
//! that dies, a full disk or a power cut in between loses it, and no later start succeeds
//! (k3s-io/k3s `pkg/server/handlers/token.go`, `WriteToken`; seen with v1.33.1).

use super::context::StepContext;
use super::journal::{back_up, backup_path};
use crate::host::{HostWriter, Owner};
use crate::install::plan::ProgressEvent;
use crate::k3s::paths::SERVER_TOKEN;

/// Its name among the backups.
const COPY: &str = "server-token";

/// Keeps a copy of the token, or restores an emptied one from it and says so. Called right before
/// k3s is started, and once its node is Ready.
pub(super) fn keep_and_report(context: &mut StepContext<'_>) -> anyhow::Result<()> {
    if let Some(text) = keep(context.writer)? {
        (context.on_event)(ProgressEvent::Note { text });
    }
    Ok(())
}

/// Gives a sentence when it restored the token.
fn keep(writer: &HostWriter) -> anyhow::Result<Option<String>> {
    // no file: a worker, or a server before its first start
    let Some(token) = writer.read(SERVER_TOKEN)? else { return Ok(None) };
    let copy = writer.read(&backup_path(COPY))?.filter(|copy| !copy.trim().is_empty());
    if token.trim().is_empty() {
        let Some(copy) = copy else { return Ok(None) };
        writer.write(SERVER_TOKEN, copy.as_bytes(), 0o600, Owner::default())?;
        return Ok(Some(format!(
            "k3s had emptied {SERVER_TOKEN} when it ended: restored from a copy"
        )));
    }
    if copy.as_ref() != Some(&token) {
        back_up(writer, COPY, token.as_bytes())?;
    }
    Ok(None)
}
