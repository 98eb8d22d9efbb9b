//! A verified file of a release.

use crate::base::error::{Exit, Failure};
use crate::base::secret::Secret;
use crate::host::fetch::{self, Artifact, ArtifactSource};
use crate::host::{Host, HostWriter, download};
use crate::install::engine::context::{Secrets, StepContext};
use crate::install::engine::files::{self, back_up_edit, back_up_edit_before_write, make_parent};
use crate::install::engine::journal::{Journal, JournalEntry, PriorState};
use crate::install::plan::{ProgressEvent, SecretName, Step, StepStatus};

/// The login for a mirror, and for nothing else.
fn login<'a>(artifact: &Artifact, secrets: &'a Secrets) -> Option<&'a Secret> {
    let login = secrets.get(&SecretName::ArtifactLogin)?;
    let ArtifactSource::Url(url) = &artifact.source else { return None };
    let base = download::without_login(login.expose());
    url.starts_with(&format!("{}/", base.trim_end_matches('/'))).then_some(login)
}

pub(super) fn check(host: &Host, artifact: &Artifact) -> anyhow::Result<StepStatus> {
    let Artifact { path, sha256, trust, .. } = artifact;
    Ok(match host.sha256(path)? {
        Some(have) if have == *sha256 => StepStatus::Done,
        Some(_) => StepStatus::todo(format!("replace {path}, verified by {trust}")),
        None => StepStatus::todo(format!("create {path}, verified by {trust}")),
    })
}

pub(super) fn before(
    writer: &HostWriter,
    id: &str,
    artifact: &Artifact,
) -> anyhow::Result<PriorState> {
    files::prior_state(writer, id, &artifact.path)
}

pub(super) async fn apply(
    context: &mut StepContext<'_>,
    journal: &Journal,
    step: &Step,
    artifact: &Artifact,
) -> anyhow::Result<String> {
    let writer = context.writer;
    make_parent(writer, &artifact.path)?;
    back_up_edit_before_write(context, journal, step, &artifact.path)?;
    let (on_event, stop) = (&mut *context.on_event, context.stop);
    let progress = |done, total| {
        on_event(ProgressEvent::Progress { id: step.id.clone(), done, total, note: None });
    };
    let (executable, login) = (artifact.mode == 0o755, login(artifact, context.secrets));
    tokio::select! {
        result = fetch::fetch(writer, artifact, executable, login, progress) => result?,
        // what was downloaded stays, and the next run resumes there
        () = stop.cancelled() => {
            let what = "interrupted while downloading";
            return Err(Failure::new(Exit::Interrupted, "INTERRUPTED", what).into());
        }
    }
    Ok(artifact.sha256.clone())
}

pub(super) fn undo(
    context: &mut StepContext<'_>,
    entry: &JournalEntry,
    artifact: &Artifact,
) -> anyhow::Result<()> {
    back_up_edit(context, &artifact.path, entry.digest.as_deref())?;
    files::undo(context.writer, entry, &artifact.path)
}
