//! The machine as a node: from here on k3s fills its directories. The undo takes the node down.

use crate::host::Host;
use crate::install::engine::context::StepContext;
use crate::install::engine::journal::{Journal, JournalEntry, PriorState};
use crate::install::engine::leftover::Leftover;
use crate::install::engine::teardown;
use crate::install::plan::StepStatus;

pub(super) fn check(entry: Option<&JournalEntry>) -> StepStatus {
    match entry {
        Some(_) => StepStatus::Done,
        None => StepStatus::todo("let k3s fill its directories"),
    }
}

pub(super) fn before(host: &Host, dirs: &[String]) -> PriorState {
    PriorState::Absent { made: dirs.iter().filter(|d| !host.exists(d)).cloned().collect() }
}

pub(super) async fn apply(host: &Host, journal: &mut Journal) {
    journal.kernel = teardown::kernel::state(host).await;
}

pub(super) async fn undo(
    context: &mut StepContext<'_>,
    journal: &Journal,
    dirs: &[String],
    before: &PriorState,
    purge: bool,
) -> anyhow::Result<Vec<Leftover>> {
    let PriorState::Absent { made } = before else { return Ok(Vec::new()) };
    teardown::node(context, journal, dirs, made, purge).await
}
