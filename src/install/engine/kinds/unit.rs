//! A systemd unit, enabled and running; restarted when one of its inputs is not what it was started
//! with.

use sha2::{Digest as _, Sha256};

use crate::base::encoding::hex;
use crate::host::paths::AGENT_TOKEN;
use crate::host::{Host, HostWriter};
use crate::install::engine::context::StepContext;
use crate::install::engine::journal::{Journal, PriorState};
use crate::install::engine::server_token;
use crate::install::plan::{StepStatus, step_id};

/// Digest over what a unit reads when it starts. The agent's token is emptied once it is used up:
/// what was delivered counts, not what is left.
pub(in crate::install::engine) fn inputs_digest(
    host: &Host,
    journal: Option<&Journal>,
    inputs: &[String],
) -> anyhow::Result<String> {
    let mut all = Sha256::new();
    for path in inputs {
        all.update(path.as_bytes());
        let delivered = journal
            .filter(|_| path == AGENT_TOKEN)
            .and_then(|j| j.entry(step_id::AGENT_TOKEN)?.digest.clone());
        let now = if path == AGENT_TOKEN { delivered } else { host.sha256(path)? };
        all.update(now.unwrap_or_default().as_bytes());
    }
    Ok(hex(&all.finalize()))
}

pub(super) async fn check(
    host: &Host,
    journal: Option<&Journal>,
    name: &str,
    inputs: &[String],
) -> anyhow::Result<StepStatus> {
    let unit = host.unit(name).await?;
    let started = journal.and_then(|j| j.units.get(name));
    let finished = unit.service_type == "oneshot" && unit.result == "success";
    let up = unit.running() || unit.active == "activating" || finished;
    Ok(if !unit.loaded {
        StepStatus::todo(format!("enable and start {name}"))
    } else if started != Some(&inputs_digest(host, journal, inputs)?) {
        let verb = if started.is_some() && unit.running() { "restart" } else { "start" };
        StepStatus::todo(format!("{verb} {name}"))
    } else if !unit.enabled || !up {
        StepStatus::todo(format!("enable and start {name}"))
    } else {
        StepStatus::Done
    })
}

pub(super) async fn before(host: &Host, name: &str) -> anyhow::Result<PriorState> {
    let unit = host.unit(name).await?;
    Ok(PriorState::Unit { enabled: unit.enabled, active: unit.running() })
}

pub(super) async fn apply(
    context: &mut StepContext<'_>,
    journal: &mut Journal,
    name: &str,
    inputs: &[String],
) -> anyhow::Result<()> {
    let writer = context.writer;
    writer.daemon_reload().await?;
    writer.enable(name).await?;
    let unit = writer.unit(name).await?;
    let inputs = inputs_digest(writer, Some(&*journal), inputs)?;
    server_token::keep_and_report(context)?;
    if journal.units.get(name) != Some(&inputs) && unit.running() {
        writer.restart(name).await?;
    } else if !unit.running() && unit.active != "activating" || unit.service_type == "oneshot" {
        writer.start(name).await?;
    }
    journal.units.insert(name.to_owned(), inputs);
    Ok(())
}

pub(super) async fn undo(
    writer: &HostWriter,
    name: &str,
    before: &PriorState,
) -> anyhow::Result<()> {
    // a unit that was enabled or active before stays as it is
    if matches!(before, PriorState::Unit { enabled: false, active: false }) {
        writer.disable(name).await?;
    }
    Ok(())
}
