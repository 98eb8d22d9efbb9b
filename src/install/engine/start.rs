//! How a unit comes up: its deaths, what its journal says, and when waiting for it is pointless.

use std::time::{Duration, Instant};

use crate::base::error::{Exit, Failure};
use crate::base::secret::{Secret, mask};
use crate::host::Hands;
use crate::host::systemd::Mark;
use crate::k3s::logs::{self, Pulse, Seen};

/// Between two looks at the journal.
const LOOK: Duration = Duration::from_secs(3);
/// Lines of it that are looked at.
const LINES: usize = 1000;
/// Where containerd writes what k3s' own journal does not have.
const CONTAINERD_LOG: &str = "/var/lib/rancher/k3s/agent/containerd/containerd.log";
/// As much of it as is looked at, bytes.
const CONTAINERD_TAIL: u64 = 64 * 1024;

/// A unit that is being waited for.
pub(super) struct Start<'a> {
    hands: &'a Hands,
    pub(super) unit: &'a str,
    secrets: &'a [Secret],
    begin: Instant,
    /// The same by the wall clock, for logs that have no other.
    wall: jiff::Timestamp,
    /// Where the journal stood when the wait began: what the unit said before is not its word now.
    mark: Mark,
    /// Restarts that systemd had counted by then.
    before: Option<u32>,
    looked: Option<Instant>,
    /// The cause that the journal shows, and since when.
    shown: Option<(&'static str, Instant)>,
}

impl<'a> Start<'a> {
    pub(super) async fn begin(hands: &'a Hands, unit: &'a str, secrets: &'a [Secret]) -> Start<'a> {
        let before = hands.unit(unit).await.ok().map(|u| u.restarts);
        let mark = hands.journal_mark(unit).await;
        Start {
            hands,
            unit,
            secrets,
            begin: Instant::now(),
            wall: jiff::Timestamp::now(),
            mark,
            before,
            looked: None,
            shown: None,
        }
    }

    async fn journal(&self) -> String {
        self.hands.unit_log(self.unit, &self.mark, LINES).await
    }

    /// The journal, and what containerd wrote since the wait began where it is containerd that ends.
    fn with_containerd(&self, journal: &str) -> String {
        if !["containerd exited", "failed to start container runtime"]
            .iter()
            .any(|m| journal.contains(m))
        {
            return journal.to_owned();
        }
        let tail = self.hands.tail(CONTAINERD_LOG, CONTAINERD_TAIL).unwrap_or_default();
        let time = |line: &str| {
            line.strip_prefix("time=\"")?.split_once('"')?.0.parse::<jiff::Timestamp>().ok()
        };
        let now: Vec<&str> =
            tail.lines().skip_while(|l| time(l).is_none_or(|t| t < self.wall)).collect();
        format!("{journal}\n{}", now.join("\n"))
    }

    /// Why the wait is over already; `None` while the unit may still come. The unit is stopped then, so that it is not left in a
    /// restart loop; the next run starts it again.
    pub(super) async fn look(&mut self) -> Option<Failure> {
        if self.looked.is_some_and(|l| l.elapsed() < LOOK) {
            return None;
        }
        self.looked = Some(Instant::now());
        let unit = self.hands.unit(self.unit).await.ok()?;
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
        let pulse = Pulse {
            running: unit.running(),
            failed,
            restarts: unit.restarts,
            since: unit.restarts.saturating_sub(before),
            held,
        };
        let died = logs::deaths(&journal, pulse);
        let seen = logs::hopeless(&log, died, pulse)?;
        self.stop().await;
        let mut failure = Failure::new(
            Exit::TimedOut,
            seen.cause.code,
            format!("{} does not start: {}", self.unit, seen.cause.what),
        );
        if died > 0 {
            failure = failure.why(format!(
                "it ended {} within {} s",
                if died == 1 { "once".into() } else { format!("{died} times") },
                self.begin.elapsed().as_secs()
            ));
        }
        Some(self.told(failure, &log, Some(&seen)).hint(self.hint(&seen)))
    }

    fn hint(&self, seen: &Seen) -> String {
        let more = if seen.cause.code == logs::LOOP {
            format!(" (`journalctl -u {}` has all of them)", self.unit)
        } else {
            String::new()
        };
        format!("{}{more}, then run the same command again", seen.cause.fix)
    }

    /// The line that decides, what else is telling, and a warning beside it; each once.
    fn told(&self, mut failure: Failure, log: &str, seen: Option<&Seen>) -> Failure {
        let deciding = seen.map(|s| s.line.as_str());
        if let Some(seen) = seen {
            failure = failure.why(mask(&logs::times(&seen.line, seen.count), self.secrets));
        }
        for line in logs::telling(log, 12) {
            if deciding.is_none_or(|d| !line.starts_with(d)) {
                failure = failure.why(mask(&line, self.secrets));
            }
        }
        match logs::beside(log).filter(|_| seen.is_none()) {
            Some(weak) => failure.why(format!("perhaps: {} ({})", weak.cause.what, weak.cause.fix)),
            None => failure,
        }
    }

    /// At the deadline: what the journal has to say to it.
    pub(super) async fn late(&mut self, failure: Failure, optional: bool) -> Failure {
        let log = self.with_containerd(&self.journal().await);
        let seen = logs::classify(&log);
        let died =
            self.hands.unit(self.unit).await.is_ok_and(|u| u.restarts > self.before.unwrap_or(0));
        let mut failure = failure;
        if let Some(seen) = &seen {
            seen.cause.code.clone_into(&mut failure.code);
            failure = failure.why(seen.cause.what).hint(self.hint(seen));
        } else if died {
            failure = failure.hint(format!(
                "{}, then run the same command again; `journalctl -u {}` has all of it",
                logs::LOOK,
                self.unit
            ));
        }
        if !optional {
            self.stop().await;
        }
        self.told(failure, &log, seen.as_ref())
    }

    /// k3s is not left in a restart loop; the agent goes on trying by itself.
    async fn stop(&self) {
        if self.unit.starts_with("k3s")
            && let Err(error) = self.hands.stop(self.unit).await
        {
            tracing::warn!(unit = self.unit, error = %error, "cannot stop the unit");
        }
    }
}
