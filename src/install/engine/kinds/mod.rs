//! What each kind of resource means on a machine: one file a kind, with its check, what was there
//! before, its apply and its undo. Here is only which file answers for which resource.

mod dir;
mod fetch;
pub(super) mod file;
mod firewall;
mod kubeconfig;
mod link;
mod node;
mod objects;
mod old_data;
mod program;
mod ready;
pub(super) mod unit;
mod user;

use super::context::{Secrets, StepContext};
use super::journal::{Journal, JournalEntry, PriorState};
use super::leftover::Leftover;
use crate::host::{Host, HostWriter};
use crate::install::plan::{Resource, Step, StepStatus};

/// Compares a step with the machine; never writes.
pub(super) async fn check(
    host: &Host,
    journal: Option<&Journal>,
    secrets: &Secrets,
    step: &Step,
) -> anyhow::Result<StepStatus> {
    let entry = journal.and_then(|j| j.entry(&step.id));
    Ok(match &step.want {
        Resource::Dir { path, mode } => dir::check(host, entry, path, *mode),
        Resource::File { path, content, mode, .. } => {
            file::check(host, entry, secrets, path, content, *mode)?
        }
        Resource::Program { path } => program::check(host, path)?,
        Resource::Fetch(artifact) => fetch::check(host, artifact)?,
        Resource::Link { path, target } => link::check(host, path, target),
        Resource::User { name } => user::check(host, name),
        Resource::Node { .. } => node::check(entry),
        Resource::OldData => old_data::check(host),
        Resource::Unit { name, inputs } => unit::check(host, journal, name, inputs).await?,
        Resource::Firewall { path, table } => firewall::check(host, journal, path, table).await?,
        Resource::Objects { yaml } => objects::check(host, yaml).await?,
        Resource::Ready { what, .. } => ready::check(host, what).await,
        Resource::Kubeconfig { user, server } => kubeconfig::check(host, user, server)?,
    })
}

/// What is there now, in the form that an undo needs. Called right before the first change of a
/// step.
pub(super) async fn before(writer: &HostWriter, step: &Step) -> anyhow::Result<PriorState> {
    Ok(match &step.want {
        Resource::Dir { path, .. } => dir::before(writer, path),
        Resource::File { path, .. } => file::before(writer, &step.id, path)?,
        Resource::Program { path } => program::before(writer, &step.id, path)?,
        Resource::Fetch(artifact) => fetch::before(writer, &step.id, artifact)?,
        Resource::User { name } => user::before(writer, name),
        Resource::Node { dirs, .. } => node::before(writer, dirs),
        Resource::Unit { name, .. } => unit::before(writer, name).await?,
        Resource::Kubeconfig { user, .. } => kubeconfig::before(writer, &step.id, user)?,
        Resource::Link { .. }
        | Resource::Firewall { .. }
        | Resource::Objects { .. }
        | Resource::Ready { .. }
        | Resource::OldData => PriorState::Absent { made: Vec::new() },
    })
}

/// Applies a step. Gives the digest of what was written; later a different one means that the file
/// was edited.
pub(super) async fn apply(
    context: &mut StepContext<'_>,
    journal: &mut Journal,
    step: &Step,
) -> anyhow::Result<Option<String>> {
    let writer = context.writer;
    match &step.want {
        Resource::Dir { path, mode } => dir::apply(writer, path, *mode)?,
        Resource::File { path, content, mode, group } => {
            return file::apply(context, journal, step, path, content, *mode, group.as_deref());
        }
        Resource::Program { path } => return program::apply(writer, path).map(Some),
        Resource::Fetch(artifact) => {
            return fetch::apply(context, journal, step, artifact).await.map(Some);
        }
        Resource::Link { path, target } => link::apply(writer, path, target)?,
        Resource::User { name } => user::apply(writer, name).await?,
        Resource::Node { .. } => node::apply(writer, journal).await,
        Resource::OldData => old_data::apply(writer)?,
        Resource::Unit { name, inputs } => unit::apply(context, journal, name, inputs).await?,
        Resource::Firewall { path, .. } => firewall::apply(writer, journal, path).await?,
        Resource::Objects { yaml } => objects::apply(writer, yaml).await?,
        Resource::Ready { what, within_s } => ready::apply(context, step, what, *within_s).await?,
        Resource::Kubeconfig { user, server } => {
            return kubeconfig::apply(writer, user, server).map(Some);
        }
    }
    Ok(None)
}

/// The digest of a step that is done already, as its apply would have given it.
pub(super) fn written_digest(host: &Host, step: &Step) -> anyhow::Result<Option<String>> {
    match &step.want {
        Resource::File { path, content, .. } => file::written_digest(host, path, content),
        Resource::Fetch(artifact) => host.sha256(&artifact.path),
        _ => Ok(None),
    }
}

/// Undoes one entry of the journal; gives what is left. `whole`: the node itself is removed, and
/// its Kubernetes objects with it.
pub(super) async fn undo(
    context: &mut StepContext<'_>,
    journal: &Journal,
    entry: &JournalEntry,
    whole: bool,
    purge: bool,
) -> anyhow::Result<Vec<Leftover>> {
    let writer = context.writer;
    match &entry.want {
        Resource::Dir { path, .. } => return Ok(dir::undo(writer, path, &entry.before)),
        Resource::File { path, content, .. } => file::undo(context, entry, path, content)?,
        Resource::Program { path } => program::undo(context, entry, path)?,
        Resource::Fetch(artifact) => fetch::undo(context, entry, artifact)?,
        Resource::Link { path, target } => link::undo(writer, path, target)?,
        Resource::User { name } => user::undo(writer, name, &entry.before).await?,
        Resource::Node { dirs, .. } => {
            return node::undo(context, journal, dirs, &entry.before, purge).await;
        }
        Resource::Unit { name, .. } => unit::undo(writer, name, &entry.before).await?,
        Resource::Firewall { table, .. } => firewall::undo(writer, table).await?,
        Resource::Objects { yaml } if !whole => objects::undo(writer, yaml).await?,
        Resource::Kubeconfig { user, .. } => kubeconfig::undo(writer, user, &entry.before)?,
        Resource::Objects { .. } | Resource::Ready { .. } | Resource::OldData => {}
    }
    Ok(Vec::new())
}
