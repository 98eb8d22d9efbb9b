//! One engine for every plan: check, apply, undo; the journal is written before and after each step.

mod account;
mod context;
pub mod journal;
mod objects;
mod old_data;
mod resource;
mod server_token;
mod start;
mod teardown;
mod wait;

use std::time::Instant;

use tokio_util::sync::CancellationToken;

use crate::base::error::{Exit, Failure};
use crate::host::{Host, HostWriter};
use crate::install::finding::Finding;
use crate::install::plan::{
    CheckedPlan, FileContent, Plan, ProgressEvent, Resource, SecretName, Step, StepStatus,
    WaitCondition,
};
use context::StepContext;
use journal::{EntryState, Journal, JournalEntry};

pub use context::Secrets;
pub use wait::unmet;

/// How a run of the engine ended.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Titles of the steps that changed something.
    pub changed: Vec<String>,
    /// Optional steps that failed: title and reason.
    pub failed: Vec<(String, String)>,
    /// What uninstall could not or would not remove.
    pub left: Vec<String>,
}

/// Compares the plan with the machine. Never writes.
///
/// # Errors
/// When a check itself fails, with the step's title.
pub async fn check(
    host: &Host,
    plan: Plan,
    journal: Option<&Journal>,
    secrets: &Secrets,
    findings: Vec<Finding>,
) -> anyhow::Result<CheckedPlan> {
    let mut checks = Vec::new();
    for step in &plan.steps {
        checks.push(
            resource::check(host, journal, secrets, step)
                .await
                .map_err(|e| e.context(format!("checking: {}", step.title)))?,
        );
    }
    let remove = journal
        .map(|j| {
            j.entries
                .iter()
                .filter(|e| !plan.steps.iter().any(|s| s.id == e.id))
                .map(|e| e.id.clone())
                .collect()
        })
        .unwrap_or_default();
    let drift = journal.map(|j| resource::drift(host, j)).transpose()?.unwrap_or_default();
    Ok(CheckedPlan { plan, checks, remove, drift, findings })
}

/// Makes the machine as the plan wants it. Run again after any interruption: the machine is asked what is done, not the journal.
///
/// # Errors
/// The first step that is not optional and fails ends the run; what was done is in the journal.
pub async fn apply(
    writer: &HostWriter,
    plan: &Plan,
    secrets: &Secrets,
    journal: &mut Journal,
    stop: &CancellationToken,
    on_event: &mut dyn FnMut(ProgressEvent),
) -> anyhow::Result<Outcome> {
    let mut outcome = Outcome::default();
    // a change to a node that was healthy can be taken back; a new k3s cannot, for its datastore may have moved on
    let mut previous = (journal.complete && journal.k3s_version == plan.k3s_version).then(Vec::new);
    journal.complete = false;
    journal.k3s_version.clone_from(&plan.k3s_version);
    let stale: Vec<JournalEntry> = journal
        .entries
        .iter()
        .rev()
        .filter(|e| !plan.steps.iter().any(|s| s.id == e.id))
        .cloned()
        .collect();
    let mut context = StepContext { writer, secrets, stop, on_event };
    for entry in stale {
        interrupted(stop)?;
        resource::undo(&mut context, journal, &entry, false, false)
            .await
            .map_err(|e| e.context(format!("taking back: {}", entry.title)))?;
        journal.forget(&entry.id);
        save(journal, writer)?;
        (context.on_event)(ProgressEvent::Undone { id: entry.id, title: entry.title.clone() });
        outcome.changed.push(entry.title);
    }
    let of = plan.steps.len();
    let mut broken: Option<String> = None;
    for (number, step) in plan.steps.iter().enumerate() {
        interrupted(stop)?;
        // the parts of one component stand on each other: when the first fails, the rest is not tried
        let family =
            step.id.rsplit_once('-').map(|(head, _)| head.to_owned()).filter(|_| step.optional);
        if family.is_some() && family == broken {
            continue;
        }
        (context.on_event)(ProgressEvent::Started {
            id: step.id.clone(),
            title: step.title.clone(),
            number: number + 1,
            of,
        });
        let begin = Instant::now();
        if let Some(previous) = &mut previous {
            previous.extend(resource::previous_file(writer, step, secrets)?);
        }
        let result = run_step(&mut context, journal, step).await;
        let duration_ms = u64::try_from(begin.elapsed().as_millis()).unwrap_or(u64::MAX);
        match result {
            Ok(changed) => {
                if changed && !matches!(step.want, Resource::Ready { .. }) {
                    outcome.changed.push(step.title.clone());
                }
                (context.on_event)(ProgressEvent::Finished {
                    id: step.id.clone(),
                    changed,
                    duration_ms,
                });
            }
            Err(error) if step.optional && Failure::of(&error).exit != Exit::Interrupted => {
                let what = Failure::of(&error).line();
                (context.on_event)(ProgressEvent::Failed {
                    id: step.id.clone(),
                    what: what.clone(),
                    optional: true,
                });
                outcome.failed.push((step.title.clone(), what));
                broken = family;
            }
            Err(error) => {
                (context.on_event)(ProgressEvent::Failed {
                    id: step.id.clone(),
                    what: format!("{error:#}"),
                    optional: false,
                });
                if let (Some(previous), Resource::Ready { what, .. }) = (&previous, &step.want)
                    && Failure::of(&error).exit == Exit::TimedOut
                {
                    return Err(
                        roll_back(&mut context, journal, plan, previous, what, &error).await
                    );
                }
                return Err(if error.downcast_ref::<Failure>().is_some() {
                    error
                } else {
                    error.context(step.title.clone())
                });
            }
        }
    }
    let complete = outcome.failed.is_empty();
    // a run that changed nothing writes nothing
    if journal.complete != complete
        || journal.options != plan.options
        || !outcome.changed.is_empty()
    {
        journal.options.clone_from(&plan.options);
        journal.complete = complete;
        save(journal, writer)?;
    }
    Ok(outcome)
}

/// Longest wait for the former state to come back.
const ROLLBACK_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(180);

/// Puts the former files back, restarts the unit with them, and waits until the node is as it was.
async fn roll_back(
    context: &mut StepContext<'_>,
    journal: &mut Journal,
    plan: &Plan,
    previous: &[resource::PreviousFile],
    what: &[WaitCondition],
    error: &anyhow::Error,
) -> anyhow::Error {
    let mut failure = Failure::of(error);
    let Some(unit) = what.iter().find_map(|r| match r {
        WaitCondition::Node { unit, .. } => Some(unit.clone()),
        _ => None,
    }) else {
        return failure.into();
    };
    if previous.is_empty() {
        return failure.into();
    }
    (context.on_event)(ProgressEvent::Note {
        text: "the node does not come back with the change: going back to the former settings"
            .into(),
    });
    let inputs = plan.steps.iter().find_map(|s| match &s.want {
        Resource::Unit { name, inputs } if *name == unit => Some(inputs.as_slice()),
        _ => None,
    });
    match resource::restore_previous(
        context,
        journal,
        previous,
        &unit,
        inputs.unwrap_or_default(),
        what,
        ROLLBACK_TIMEOUT,
    )
    .await
    {
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

/// One step: look; note the intent; do; note that it is done.
async fn run_step(
    context: &mut StepContext<'_>,
    journal: &mut Journal,
    step: &Step,
) -> anyhow::Result<bool> {
    let state = resource::check(context.writer, Some(journal), context.secrets, step).await?;
    if state == StepStatus::Done {
        // a step that was done but not noted as such before a crash
        if journal
            .entry(&step.id)
            .is_some_and(|e| e.state == EntryState::Intent || e.want != step.want)
        {
            mark_done(journal, context.writer, step)?;
        }
        return Ok(false);
    }
    let lasting = step.want.leaves_state();
    if lasting {
        let before = match journal.entry(&step.id) {
            Some(known) => known.before.clone(),
            None => resource::before(context.writer, step).await?,
        };
        journal.intend(JournalEntry {
            id: step.id.clone(),
            title: step.title.clone(),
            want: step.want.clone(),
            before,
            state: EntryState::Intent,
            digest: None,
        });
        save(journal, context.writer)?;
    }
    let digest = resource::apply(context, journal, step).await?;
    if lasting {
        journal.finish(&step.id, digest);
        save(journal, context.writer)?;
    }
    Ok(true)
}

fn mark_done(journal: &mut Journal, writer: &HostWriter, step: &Step) -> anyhow::Result<()> {
    let digest = match &step.want {
        Resource::File {
            path, content: FileContent::Text(_) | FileContent::Filled { .. }, ..
        }
        | Resource::Fetch(crate::host::fetch::Artifact { path, .. }) => writer.sha256(path)?,
        Resource::File { path, content: FileContent::Secret(name), .. }
            if *name != SecretName::AgentToken =>
        {
            writer.sha256(path)?
        }
        _ => None,
    };
    if let Some(entry) = journal.entries.iter_mut().find(|e| e.id == step.id) {
        entry.want = step.want.clone();
    }
    journal.finish(&step.id, digest);
    save(journal, writer)
}

/// Undoes the whole journal, last entry first. What cannot be undone is named and does not stop the rest.
///
/// # Errors
/// When interrupted, or the journal cannot be written.
pub async fn undo_all(
    writer: &HostWriter,
    journal: &mut Journal,
    purge: bool,
    stop: &CancellationToken,
    on_event: &mut dyn FnMut(ProgressEvent),
) -> anyhow::Result<Outcome> {
    let mut outcome = Outcome::default();
    let secrets = Secrets::new();
    let mut context = StepContext { writer, secrets: &secrets, stop, on_event };
    let kernel = journal.kernel.clone();
    journal.complete = false;
    save(journal, writer)?;
    let (mut number, of) = (0, journal.entries.len());
    while let Some(entry) = journal
        .entries
        .iter()
        .rev()
        .find(|e| !outcome.failed.iter().any(|(title, _)| *title == e.title))
        .cloned()
    {
        interrupted(stop)?;
        number += 1;
        // while something could not be undone, the program stays to try again
        if !outcome.failed.is_empty()
            && matches!(entry.want, Resource::Program { .. } | Resource::Dir { .. })
        {
            outcome.failed.push((entry.title.clone(), "kept until the rest is gone".into()));
            continue;
        }
        let title = format!("undo: {}", entry.title);
        (context.on_event)(ProgressEvent::Started { id: entry.id.clone(), title, number, of });
        let begin = Instant::now();
        match resource::undo(&mut context, journal, &entry, true, purge).await {
            Ok(left) => {
                let busy = left.iter().any(|l| l.contains("MOUNT_STILL_BUSY"));
                outcome.left.extend(left.clone());
                let duration_ms = u64::try_from(begin.elapsed().as_millis()).unwrap_or(u64::MAX);
                (context.on_event)(ProgressEvent::Finished {
                    id: entry.id.clone(),
                    changed: true,
                    duration_ms,
                });
                if busy {
                    outcome.failed.push((entry.title.clone(), left.join("; ")));
                } else {
                    outcome.changed.push(entry.title.clone());
                    journal.forget(&entry.id);
                    save(journal, writer)?;
                }
            }
            Err(error) => {
                let what = format!("{error:#}");
                (context.on_event)(ProgressEvent::Failed {
                    id: entry.id.clone(),
                    what: what.clone(),
                    optional: true,
                });
                outcome.failed.push((entry.title.clone(), what));
            }
        }
    }
    writer.daemon_reload().await.ok();
    outcome.left.extend(
        teardown::kernel_changes(writer, &kernel).into_iter().map(|c| format!("kernel: {c}")),
    );
    Ok(outcome)
}

fn interrupted(stop: &CancellationToken) -> Result<(), Failure> {
    if stop.is_cancelled() {
        return Err(Failure::new(
            Exit::Interrupted,
            "INTERRUPTED",
            "interrupted between two steps",
        ));
    }
    Ok(())
}

fn save(journal: &Journal, writer: &HostWriter) -> anyhow::Result<()> {
    journal.save(writer)?;
    #[cfg(debug_assertions)]
    failpoint();
    Ok(())
}

/// In debug builds `PIPEOPS_KILL_AT=N` kills the process, as a power cut would, right after the Nth write of the journal.
#[cfg(debug_assertions)]
#[expect(clippy::disallowed_methods, reason = "a switch for tests, compiled out of releases")]
fn failpoint() {
    use std::sync::atomic::{AtomicU64, Ordering};
    static WRITES: AtomicU64 = AtomicU64::new(0);
    let at = std::env::var("PIPEOPS_KILL_AT").ok().and_then(|n| n.parse::<u64>().ok());
    if at == Some(WRITES.fetch_add(1, Ordering::Relaxed) + 1) {
        let _ = nix::sys::signal::kill(nix::unistd::getpid(), nix::sys::signal::Signal::SIGKILL);
        std::thread::sleep(std::time::Duration::from_secs(5));
    }
}
