//! A file with a text or a secret in it.

use crate::base::error::Failure;
use crate::base::secret::Secret;
use crate::host::{Host, HostWriter, Owner};
use crate::install::engine::context::{Secrets, StepContext};
use crate::install::engine::files::{
    self, back_up_edit, back_up_edit_before_write, digest, make_parent,
};
use crate::install::engine::journal::{Journal, JournalEntry, PriorState};
use crate::install::plan::{FileContent, SecretName, Step, StepStatus};
use crate::install::settings::k3s_table::fill_placeholders;

const AGENT_TOKEN: FileContent = FileContent::Secret(SecretName::AgentToken);

/// What the journal keeps of the agent's token. The file itself is emptied once the agent is
/// registered.
fn token_digest(secrets: &Secrets) -> Option<String> {
    secrets.get(&SecretName::AgentToken).map(|token| digest(token.expose().as_bytes()))
}

/// What the file must hold; `None`: whatever it holds already.
pub(in crate::install::engine) fn content(
    path: &str,
    content: &FileContent,
    secrets: &Secrets,
    host: &Host,
) -> anyhow::Result<Option<Vec<u8>>> {
    let missing = |name: SecretName| {
        Failure::usage(
            "PLAN_SECRET_MISSING",
            format!("what goes into {path} is a secret, and this run was not given it"),
        )
        .why("a plan names its secrets and holds none of them")
        .hint(format!("give it as when the plan was made: {}", name.comes_from()))
    };
    let name = match content {
        FileContent::Text(text) => return Ok(Some(text.clone().into_bytes())),
        FileContent::Filled { text, from } => {
            let fill = |values: &Secret| fill_placeholders(text, values);
            let filled = secrets.get(from).and_then(fill).ok_or_else(|| missing(*from))?;
            return Ok(Some(filled.into_bytes()));
        }
        FileContent::Secret(name) => name,
    };
    match (secrets.get(name), name) {
        (Some(secret), _) => Ok(Some(secret.expose().as_bytes().to_vec())),
        (None, SecretName::AgentToken) if !host.exists(path) => Ok(Some(Vec::new())),
        (None, _) if host.exists(path) => Ok(None),
        (None, name) => Err(missing(*name).into()),
    }
}

pub(super) fn check(
    host: &Host,
    entry: Option<&JournalEntry>,
    secrets: &Secrets,
    path: &str,
    desired: &FileContent,
    mode: u32,
) -> anyhow::Result<StepStatus> {
    let Some(bytes) = content(path, desired, secrets, host)? else { return Ok(StepStatus::Done) };
    if *desired == AGENT_TOKEN {
        let delivered = entry.and_then(|e| e.digest.clone());
        let unchanged =
            host.exists(path) && delivered == token_digest(secrets).or(delivered.clone());
        return Ok(if unchanged && entry.is_some() {
            StepStatus::Done
        } else {
            StepStatus::todo(format!("write {path}"))
        });
    }
    Ok(match host.read_bytes(path)? {
        None => StepStatus::todo(format!("create {path}")),
        Some(have) if have != bytes => StepStatus::todo(format!("change {path}")),
        Some(_) if host.mode(path) != Some(mode) => {
            StepStatus::todo(format!("set the mode of {path} to {mode:o}"))
        }
        Some(_) => StepStatus::Done,
    })
}

pub(super) fn before(writer: &HostWriter, id: &str, path: &str) -> anyhow::Result<PriorState> {
    files::prior_state(writer, id, path)
}

pub(super) fn apply(
    context: &mut StepContext<'_>,
    journal: &Journal,
    step: &Step,
    path: &str,
    desired: &FileContent,
    mode: u32,
    group: Option<&str>,
) -> anyhow::Result<Option<String>> {
    let writer = context.writer;
    let Some(bytes) = content(path, desired, context.secrets, writer)? else { return Ok(None) };
    make_parent(writer, path)?;
    back_up_edit_before_write(context, journal, step, path)?;
    writer.write(path, &bytes, mode, Owner { user: None, group })?;
    Ok(Some(if *desired == AGENT_TOKEN {
        token_digest(context.secrets).unwrap_or_else(|| digest(b""))
    } else {
        digest(&bytes)
    }))
}

/// The token's file may be emptied by now, so that its digest says nothing.
pub(super) fn written_digest(
    host: &Host,
    path: &str,
    content: &FileContent,
) -> anyhow::Result<Option<String>> {
    if *content == AGENT_TOKEN { Ok(None) } else { host.sha256(path) }
}

pub(super) fn undo(
    context: &mut StepContext<'_>,
    entry: &JournalEntry,
    path: &str,
    content: &FileContent,
) -> anyhow::Result<()> {
    if *content != AGENT_TOKEN {
        back_up_edit(context, path, entry.digest.as_deref())?;
    }
    files::undo(context.writer, entry, path)
}
