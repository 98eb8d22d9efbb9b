//! One engine for every plan: check, apply, undo; the journal is written before and after each
//! step.

mod context;
mod files;
pub mod journal;
mod kinds;
mod leftover;
mod rollback;
mod server_token;
mod start;
mod teardown;
mod wait;

use std::time::Instant;

use tokio_util::sync::CancellationToken;

use crate::base::error::{Exit, Failure};
use crate::host::{Host, HostWriter};
use crate::install::finding::Finding;
use crate::install::plan::{CheckedPlan, Plan, ProgressEvent, Resource, Step, StepStatus};
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
    pub leftovers: Vec<String>,
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
            kinds::check(host, journal, secrets, step)
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
    let drift = journal.map(|j| files::drift(host, j)).transpose()?.unwrap_or_default();
    Ok(CheckedPlan { plan, checks, remove, drift, findings })
}

/// Makes the machine as the plan wants it. It can run again after any interruption: what is done is
/// read from the machine, not from the journal.
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
    // a change to a node that was healthy can be rolled back; a new k3s cannot, for its datastore
    // may have moved on
    let mut previous = (journal.complete && journal.k3s_version == plan.k3s_version).then(Vec::new);
    journal.complete = false;
    journal.k3s_version.clone_from(&plan.k3s_version);
    let mut context = StepContext { writer, secrets, stop, on_event };
    undo_unwanted(&mut context, plan, journal, &mut outcome).await?;
    let of = plan.steps.len();
    let mut failed_component = None;
    for (number, step) in (1..).zip(&plan.steps) {
        interrupted(stop)?;
        // the steps of a component build on each other: when one fails, the rest is not tried
        let component = step.component().filter(|_| step.optional);
        if component.is_some() && component == failed_component {
            continue;
        }
        let (id, title) = (step.id.clone(), step.title.clone());
        (context.on_event)(ProgressEvent::Started { id, title, number, of });
        let begin = Instant::now();
        if let Some(previous) = &mut previous {
            previous.extend(rollback::previous_file(writer, step, secrets)?);
        }
        let error = match run_step(&mut context, journal, step).await {
            Ok(changed) => {
                if changed && !matches!(step.want, Resource::Ready { .. }) {
                    outcome.changed.push(step.title.clone());
                }
                finished(&mut context, &step.id, changed, begin);
                continue;
            }
            Err(error) => error,
        };
        let failure = Failure::from_error(&error);
        if step.optional && failure.exit != Exit::Interrupted {
            let what = failure.line();
            failed(&mut context, &step.id, &what, true);
            outcome.failed.push((step.title.clone(), what));
            failed_component = component;
            continue;
        }
        failed(&mut context, &step.id, &format!("{error:#}"), false);
        if let (Some(previous), Resource::Ready { what, .. }) = (&previous, &step.want)
            && failure.exit == Exit::TimedOut
        {
            return Err(
                rollback::roll_back(&mut context, journal, plan, previous, what, &error).await
            );
        }
        let named = error.downcast_ref::<Failure>().is_some();
        return Err(if named { error } else { error.context(step.title.clone()) });
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

/// Undoes what earlier runs did and the plan no longer wants, last entry first.
async fn undo_unwanted(
    context: &mut StepContext<'_>,
    plan: &Plan,
    journal: &mut Journal,
    outcome: &mut Outcome,
) -> anyhow::Result<()> {
    let unwanted: Vec<JournalEntry> = journal
        .entries
        .iter()
        .rev()
        .filter(|e| !plan.steps.iter().any(|s| s.id == e.id))
        .cloned()
        .collect();
    for entry in unwanted {
        interrupted(context.stop)?;
        kinds::undo(context, journal, &entry, false, false)
            .await
            .map_err(|e| e.context(format!("taking back: {}", entry.title)))?;
        journal.forget(&entry.id);
        save(journal, context.writer)?;
        (context.on_event)(ProgressEvent::Undone { id: entry.id, title: entry.title.clone() });
        outcome.changed.push(entry.title);
    }
    Ok(())
}

fn finished(context: &mut StepContext<'_>, id: &str, changed: bool, begin: Instant) {
    let duration_ms = u64::try_from(begin.elapsed().as_millis()).unwrap_or(u64::MAX);
    (context.on_event)(ProgressEvent::Finished { id: id.to_owned(), changed, duration_ms });
}

fn failed(context: &mut StepContext<'_>, id: &str, what: &str, optional: bool) {
    let (id, what) = (id.to_owned(), what.to_owned());
    (context.on_event)(ProgressEvent::Failed { id, what, optional });
}

/// One step: compare it with the machine, note the intent, apply it, note that it is done. Says
/// whether it changed something.
async fn run_step(
    context: &mut StepContext<'_>,
    journal: &mut Journal,
    step: &Step,
) -> anyhow::Result<bool> {
    let state = tokio::select! {
        state = kinds::check(context.writer, Some(journal), context.secrets, step) => state?,
        () = context.stop.cancelled() => return Err(between_steps().into()),
    };
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
            None => kinds::before(context.writer, step).await?,
        };
        journal.record_intent(JournalEntry {
            id: step.id.clone(),
            title: step.title.clone(),
            want: step.want.clone(),
            before,
            state: EntryState::Intent,
            digest: None,
        });
        save(journal, context.writer)?;
    }
    let digest = kinds::apply(context, journal, step).await?;
    if lasting {
        journal.finish(&step.id, digest);
        save(journal, context.writer)?;
    }
    Ok(true)
}

/// A step that was done in an earlier run, which did not come to note it.
fn mark_done(journal: &mut Journal, writer: &HostWriter, step: &Step) -> anyhow::Result<()> {
    let digest = kinds::written_digest(writer, step)?;
    if let Some(entry) = journal.entries.iter_mut().find(|e| e.id == step.id) {
        entry.want = step.want.clone();
    }
    journal.finish(&step.id, digest);
    save(journal, writer)
}

/// Undoes the whole journal, last entry first. What cannot be undone is named and does not stop the
/// rest.
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
        match kinds::undo(&mut context, journal, &entry, true, purge).await {
            Ok(left) => {
                finished(&mut context, &entry.id, true, begin);
                let lines: Vec<String> = left.iter().map(|l| l.line.clone()).collect();
                if left.iter().any(|l| l.retry) {
                    outcome.failed.push((entry.title.clone(), lines.join("; ")));
                } else {
                    outcome.changed.push(entry.title.clone());
                    journal.forget(&entry.id);
                    save(journal, writer)?;
                }
                outcome.leftovers.extend(lines);
            }
            Err(error) => {
                let what = format!("{error:#}");
                failed(&mut context, &entry.id, &what, true);
                outcome.failed.push((entry.title.clone(), what));
            }
        }
    }
    writer.daemon_reload().await.ok();
    outcome.leftovers.extend(
        teardown::kernel::changes(writer, &kernel).into_iter().map(|c| format!("kernel: {c}")),
    );
    Ok(outcome)
}

fn interrupted(stop: &CancellationToken) -> Result<(), Failure> {
    if stop.is_cancelled() { Err(between_steps()) } else { Ok(()) }
}

fn between_steps() -> Failure {
    Failure::new(Exit::Interrupted, "INTERRUPTED", "interrupted between two steps")
}

fn save(journal: &Journal, writer: &HostWriter) -> anyhow::Result<()> {
    journal.save(writer)?;
    #[cfg(debug_assertions)]
    failpoint();
    Ok(())
}

/// In debug builds `PIPEOPS_KILL_AT=N` kills the process, as a power cut would, right after the Nth
/// write of the journal.
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
