//! Rolling back to the former settings, when the node does not become Ready with the new ones.

use std::time::Duration;

use super::context::{Secrets, StepContext};
use super::files::digest;
use super::journal::Journal;
use super::kinds::{file, unit};
use super::{save, server_token, wait};
use crate::base::error::{Exit, Failure};
use crate::host::{Host, Owner};
use crate::install::plan::{
    FileContent, Plan, ProgressEvent, Resource, SecretName, Step, WaitCondition,
};

/// Longest wait for the node to become Ready with the former settings.
const TIMEOUT: Duration = Duration::from_secs(180);

/// A file as it was before this run changed it.
pub(super) struct PreviousFile {
    id: String,
    path: String,
    /// `None`: it was not there.
    bytes: Option<Vec<u8>>,
    mode: u32,
}

/// What a step is about to replace, if it writes settings; nothing for other steps.
pub(super) fn previous_file(
    host: &Host,
    step: &Step,
    secrets: &Secrets,
) -> anyhow::Result<Option<PreviousFile>> {
    let Resource::File { path, mode, content: desired, .. } = &step.want else { return Ok(None) };
    let settings = match desired {
        FileContent::Text(_) | FileContent::Filled { .. } => true,
        FileContent::Secret(name) => {
            matches!(name, SecretName::Registries | SecretName::ProxyEnvironment)
        }
    };
    if !settings {
        return Ok(None);
    }
    let bytes = host.read_bytes(path)?;
    let desired = file::content(path, desired, secrets, host)?;
    if desired.is_none() || bytes == desired {
        return Ok(None);
    }
    Ok(Some(PreviousFile {
        id: step.id.clone(),
        path: path.clone(),
        mode: host.mode(path).unwrap_or(*mode),
        bytes,
    }))
}

/// Puts the former files back, restarts the unit with them, and waits until the node is as it was.
/// Gives the failure that ends the run.
pub(super) async fn roll_back(
    context: &mut StepContext<'_>,
    journal: &mut Journal,
    plan: &Plan,
    previous: &[PreviousFile],
    what: &[WaitCondition],
    error: &anyhow::Error,
) -> anyhow::Error {
    let mut failure = Failure::from_error(error);
    let node_unit = what.iter().find_map(|condition| match condition {
        WaitCondition::Node { unit, .. } => Some(unit.clone()),
        _ => None,
    });
    let Some(unit) = node_unit.filter(|_| !previous.is_empty()) else { return failure.into() };
    (context.on_event)(ProgressEvent::Note {
        text: "the node does not come back with the change: going back to the former settings"
            .into(),
    });
    let inputs = plan.steps.iter().find_map(|s| match &s.want {
        Resource::Unit { name, inputs } if *name == unit => Some(inputs.as_slice()),
        _ => None,
    });
    match restore(context, journal, previous, &unit, inputs.unwrap_or_default(), what).await {
        Ok(()) => {
            journal.complete = true;
            if let Err(error) = save(journal, context.writer) {
                return error;
            }
            failure
                .why
                .push("the former settings are back, and the node is Ready with them".into());
            failure.exit = Exit::RolledBack;
            failure.hint = Some("correct the option that was new, then run again".into());
        }
        Err(error) => {
            failure.why.push(format!("going back did not work either: {error:#}"));
            // the files are back: the next run must not take them for somebody's edit
            if let Err(error) = save(journal, context.writer) {
                failure.why.push(format!("{error:#}"));
            }
        }
    }
    failure.into()
}

async fn restore(
    context: &mut StepContext<'_>,
    journal: &mut Journal,
    previous: &[PreviousFile],
    unit: &str,
    inputs: &[String],
    what: &[WaitCondition],
) -> anyhow::Result<()> {
    let writer = context.writer;
    for file in previous {
        match &file.bytes {
            Some(bytes) => {
                writer.write(&file.path, bytes, file.mode, Owner::default())?;
                journal.finish(&file.id, Some(digest(bytes)));
            }
            None => writer.remove(&file.path)?,
        }
    }
    writer.daemon_reload().await?;
    server_token::keep_and_report(context)?;
    // the wait that failed has stopped it, as a rule
    if writer.unit(unit).await?.main_pid == 0 {
        writer.start(unit).await?;
    } else {
        writer.restart(unit).await?;
    }
    let inputs = unit::inputs_digest(writer, Some(&*journal), inputs)?;
    journal.units.insert(unit.to_owned(), inputs);
    wait::wait_until(writer, what, TIMEOUT, true, context.stop, &[], |_| {}).await
}
