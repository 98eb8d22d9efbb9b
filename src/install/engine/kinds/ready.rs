//! Conditions to wait for; nothing to undo.

use std::time::Duration;

use crate::base::secret::Secret;
use crate::host::Host;
use crate::install::engine::context::StepContext;
use crate::install::engine::{server_token, wait};
use crate::install::plan::{ProgressEvent, Step, StepStatus, WaitCondition};

pub(super) async fn check(host: &Host, what: &[WaitCondition]) -> StepStatus {
    for condition in what {
        if let Some(why) = wait::unmet(host, condition).await {
            return StepStatus::Later { until: format!("{}: {why}", condition.title()) };
        }
    }
    StepStatus::Done
}

pub(super) async fn apply(
    context: &mut StepContext<'_>,
    step: &Step,
    what: &[WaitCondition],
    within_s: u64,
) -> anyhow::Result<()> {
    let on_event = &mut *context.on_event;
    let mut last = String::new();
    let progress = |note: String| {
        if note != last {
            last.clone_from(&note);
            let (id, note) = (step.id.clone(), Some(note));
            on_event(ProgressEvent::Progress { id, done: 0, total: None, note });
        }
    };
    let secrets: Vec<Secret> = context.secrets.values().cloned().collect();
    let within = Duration::from_secs(within_s);
    let (writer, stop) = (context.writer, context.stop);
    wait::wait_until(writer, what, within, step.optional, stop, &secrets, progress).await?;
    server_token::keep_and_report(context)
}
