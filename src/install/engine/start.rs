//! How a unit starts: how often it exited, what its journal says, and when to stop waiting for it.

use std::time::{Duration, Instant};

use crate::base::error::{Exit, Failure};
use crate::base::secret::{Secret, mask};
use crate::host::HostWriter;
use crate::host::systemd::JournalPosition;
use crate::k3s::logs::{self, Diagnosis, UnitHealth};

/// Time between two reads of the journal.
const CHECK_INTERVAL: Duration = Duration::from_secs(3);
/// Lines of it that are read.
const LINES: usize = 1000;
/// Where containerd writes what k3s' own journal does not have.
const CONTAINERD_LOG: &str = "/var/lib/rancher/k3s/agent/containerd/containerd.log";
/// As much of its end as is read, bytes.
const CONTAINERD_TAIL: u64 = 64 * 1024;

/// A unit that is being waited for.
pub(super) struct UnitStart<'a> {
    writer: &'a HostWriter,
    pub(super) unit: &'a str,
    secrets: &'a [Secret],
    begin: Instant,
    /// The same by the wall clock, for logs that have no other.
    wall: jiff::Timestamp,
    /// Where the journal ended when the wait began: earlier lines are of an earlier start.
    mark: JournalPosition,
    /// Restarts that systemd had counted by then.
    before: Option<u32>,
    checked_at: Option<Instant>,
    /// The cause that the journal shows, and since when.
    shown: Option<(&'static str, Instant)>,
}

impl<'a> UnitStart<'a> {
    pub(super) async fn begin(
        writer: &'a HostWriter,
        unit: &'a str,
        secrets: &'a [Secret],
    ) -> UnitStart<'a> {
        let before = writer.unit(unit).await.ok().map(|u| u.restarts);
        let mark = writer.journal_position(unit).await;
        UnitStart {
            writer,
            unit,
            secrets,
            begin: Instant::now(),
            wall: jiff::Timestamp::now(),
            mark,
            before,
            checked_at: None,
            shown: None,
        }
    }

    async fn journal(&self) -> String {
        self.writer.unit_log(self.unit, &self.mark, LINES).await
    }

    /// The journal, and what containerd wrote since the wait began where it is containerd that
    /// ends.
    fn with_containerd(&self, journal: &str) -> String {
        if !["containerd exited", "failed to start container runtime"]
            .iter()
            .any(|m| journal.contains(m))
        {
            return journal.to_owned();
        }
        let tail = self.writer.tail(CONTAINERD_LOG, CONTAINERD_TAIL).unwrap_or_default();
        let time = |line: &str| {
            line.strip_prefix("time=\"")?.split_once('"')?.0.parse::<jiff::Timestamp>().ok()
        };
        let now: Vec<&str> =
            tail.lines().skip_while(|l| time(l).is_none_or(|t| t < self.wall)).collect();
        format!("{journal}\n{}", now.join("\n"))
    }

    /// Why the wait is over already; `None` while the unit may still come. The unit is stopped
    /// then, so that it is not left in a restart loop; the next run starts it again.
    pub(super) async fn check(&mut self) -> Option<Failure> {
        if self.checked_at.is_some_and(|l| l.elapsed() < CHECK_INTERVAL) {
            return None;
        }
        self.checked_at = Some(Instant::now());
        let unit = self.writer.unit(self.unit).await.ok()?;
        let before = *self.before.get_or_insert(unit.restarts);
        let journal = self.journal().await;
        let log = self.with_containerd(&journal);
        let code = logs::classify(&log).map(|s| s.cause.code);
        if self.shown.map(|(shown, _)| shown) != code {
            self.shown = code.map(|code| (code, Instant::now()));
        }
        let held = self.shown.map(|(_, since)| since.elapsed()).unwrap_or_default();
        // the count starts again at 0 when somebody starts the unit by hand
        let failed = unit.active == "failed";
        let health = UnitHealth {
            running: unit.running(),
            failed,
            restarts: unit.restarts,
            restarts_during_wait: unit.restarts.saturating_sub(before),
            held,
        };
        let exits = logs::exit_count(&journal, health);
        let diagnosis = logs::final_failure(&log, exits, health)?;
        self.stop().await;
        let mut failure = Failure::new(
            Exit::TimedOut,
            diagnosis.cause.code,
            format!("{} does not start: {}", self.unit, diagnosis.cause.what),
        );
        if exits > 0 {
            failure = failure.why(format!(
                "it ended {} within {} s",
                if exits == 1 { "once".into() } else { format!("{exits} times") },
                self.begin.elapsed().as_secs()
            ));
        }
        Some(self.with_evidence(failure, &log, Some(&diagnosis)).hint(self.hint(&diagnosis)))
    }

    fn hint(&self, diagnosis: &Diagnosis) -> String {
        let more = if diagnosis.cause.code == logs::START_LOOP {
            format!(" (`journalctl -u {}` has all of them)", self.unit)
        } else {
            String::new()
        };
        format!("{}{more}, then run the same command again", diagnosis.cause.fix)
    }

    /// Adds the evidence: the line that decides, other lines worth showing, and a related warning;
    /// each once.
    fn with_evidence(
        &self,
        mut failure: Failure,
        log: &str,
        diagnosis: Option<&Diagnosis>,
    ) -> Failure {
        let deciding = diagnosis.map(|s| s.line.as_str());
        if let Some(diagnosis) = diagnosis {
            failure = failure
                .why(mask(&logs::with_count(&diagnosis.line, diagnosis.count), self.secrets));
        }
        for line in logs::notable_lines(log, 12) {
            if deciding.is_none_or(|d| !line.starts_with(d)) {
                failure = failure.why(mask(&line, self.secrets));
            }
        }
        match logs::related_warning(log).filter(|_| diagnosis.is_none()) {
            Some(weak) => failure.why(format!("perhaps: {} ({})", weak.cause.what, weak.cause.fix)),
            None => failure,
        }
    }

    /// The failure at the deadline, with what the journal says about it.
    pub(super) async fn at_deadline(&mut self, failure: Failure, optional: bool) -> Failure {
        let log = self.with_containerd(&self.journal().await);
        let diagnosis = logs::classify(&log);
        let exits =
            self.writer.unit(self.unit).await.is_ok_and(|u| u.restarts > self.before.unwrap_or(0));
        let mut failure = failure;
        if let Some(diagnosis) = &diagnosis {
            diagnosis.cause.code.clone_into(&mut failure.code);
            failure = failure.why(diagnosis.cause.what).hint(self.hint(diagnosis));
        } else if exits {
            failure = failure.hint(format!(
                "{}, then run the same command again; `journalctl -u {}` has all of it",
                logs::UNKNOWN_CAUSE_FIX,
                self.unit
            ));
        }
        if !optional {
            self.stop().await;
        }
        self.with_evidence(failure, &log, diagnosis.as_ref())
    }

    /// k3s is not left in a restart loop; the agent goes on trying by itself.
    async fn stop(&self) {
        if self.unit.starts_with("k3s")
            && let Err(error) = self.writer.stop(self.unit).await
        {
            tracing::warn!(unit = self.unit, error = %error, "cannot stop the unit");
        }
    }
}
