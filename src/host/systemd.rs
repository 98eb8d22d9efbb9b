//! Units by `systemctl`: what they are, and making them so.

use std::collections::BTreeMap;
use std::time::Duration;

use super::{Host, HostWriter};
use crate::base::order;

/// What systemd says of a unit.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Unit {
    pub loaded: bool,
    pub enabled: bool,
    /// `active`, `activating`, `inactive`, `failed`, …
    pub active: String,
    pub sub: String,
    pub main_pid: u32,
    pub restarts: u32,
    /// When its main process was started, microseconds of the monotonic clock (which no step of the
    /// wall clock moves); 0: never.
    pub started: u64,
    pub need_reload: bool,
    pub status: String,
    /// `oneshot`, `notify`, … ; empty for timers.
    pub service_type: String,
    pub result: String,
}

impl Unit {
    pub fn running(&self) -> bool {
        self.active == "active"
    }

    /// When its main process was started, by this machine's clock as it stands now.
    pub fn started_at(&self) -> Option<jiff::Timestamp> {
        let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).ok()?;
        let now = u64::try_from(now.tv_sec()).ok()? * 1_000_000
            + u64::try_from(now.tv_nsec()).ok()? / 1000;
        let age = now.checked_sub(self.started).filter(|_| self.started > 0)?;
        jiff::Timestamp::now().checked_sub(Duration::from_micros(age)).ok()
    }

    /// How it does, for people: `activating (auto-restart)`.
    pub fn state_text(&self) -> String {
        if self.active.is_empty() {
            "not known to systemd".into()
        } else if self.sub.is_empty() || self.sub == self.active {
            self.active.clone()
        } else {
            format!("{} ({})", self.active, self.sub)
        }
    }
}

/// A place in the journal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum JournalPosition {
    /// A cursor: no step of the clock moves it.
    Cursor(String),
    /// Seconds since 1970, where there is no cursor to be had.
    Since(i64),
}

const TIMEOUT: Duration = Duration::from_secs(10);
/// `systemctl stop` waits for the unit's own stop time.
const ACT: Duration = Duration::from_secs(120);

impl Host {
    /// # Errors
    /// When systemctl itself fails; an unknown unit is an answer.
    pub async fn unit(&self, name: &str) -> anyhow::Result<Unit> {
        let properties = "LoadState,UnitFileState,ActiveState,SubState,MainPID,NRestarts,\
                          ExecMainStartTimestampMonotonic,NeedDaemonReload,StatusText,Type,Result";
        let output =
            self.output("systemctl", &["show", "--property", properties, name], TIMEOUT).await?;
        let map = crate::host::systemd::parse_properties(&output.stdout);
        let get = |key: &str| map.get(key).cloned().unwrap_or_default();
        Ok(Unit {
            loaded: get("LoadState") == "loaded",
            enabled: get("UnitFileState") == "enabled",
            active: get("ActiveState"),
            sub: get("SubState"),
            main_pid: get("MainPID").parse().unwrap_or(0),
            restarts: get("NRestarts").parse().unwrap_or(0),
            started: get("ExecMainStartTimestampMonotonic").parse().unwrap_or(0),
            need_reload: get("NeedDaemonReload") == "yes",
            status: get("StatusText"),
            service_type: get("Type"),
            result: get("Result"),
        })
    }

    /// Where the unit's journal ends now.
    pub async fn journal_position(&self, name: &str) -> JournalPosition {
        let args = [
            "--unit",
            name,
            "--lines",
            "1",
            "--output",
            "cat",
            "--show-cursor",
            "--no-pager",
            "--quiet",
        ];
        let output =
            self.output("journalctl", &args, TIMEOUT).await.map(|o| o.stdout).unwrap_or_default();
        match output.lines().rev().find_map(|l| l.trim().strip_prefix("-- cursor: ")) {
            Some(cursor) => JournalPosition::Cursor(cursor.to_owned()),
            // from the next second on: what it said before it was started again is not its word now
            None => JournalPosition::Since(jiff::Timestamp::now().as_second() + 1),
        }
    }

    /// The unit's journal since a mark, newest last; empty when it cannot be read.
    pub async fn unit_log(&self, name: &str, since: &JournalPosition, lines: usize) -> String {
        let lines = lines.to_string();
        let (how, from) = match since {
            JournalPosition::Cursor(cursor) => ("--after-cursor", cursor.clone()),
            JournalPosition::Since(second) => ("--since", format!("@{second}")),
        };
        let args = [
            "--unit",
            name,
            how,
            &from,
            "--lines",
            &lines,
            "--output",
            "cat",
            "--no-pager",
            "--quiet",
        ];
        self.output("journalctl", &args, TIMEOUT).await.map(|o| o.stdout).unwrap_or_default()
    }
}

impl HostWriter {
    pub async fn daemon_reload(&self) -> anyhow::Result<()> {
        self.run("systemctl", &["daemon-reload"], ACT).await.map(drop)
    }

    pub async fn enable(&self, name: &str) -> anyhow::Result<()> {
        self.run("systemctl", &["enable", "--quiet", name], ACT).await.map(drop)
    }

    /// Starts without waiting: a `Type=notify` unit may take minutes, and the deadline is ours.
    pub async fn start(&self, name: &str) -> anyhow::Result<()> {
        self.run("systemctl", &["reset-failed", name], ACT).await.ok();
        self.run("systemctl", &["start", "--no-block", name], ACT).await.map(drop)
    }

    /// Restarts, and comes back once the former process is on its way out: what is asked next must
    /// not be answered by it.
    pub async fn restart(&self, name: &str) -> anyhow::Result<()> {
        let former = self.unit(name).await?.main_pid;
        self.run("systemctl", &["restart", "--no-block", name], ACT).await.map(drop)?;
        let begin = std::time::Instant::now();
        while former != 0 && begin.elapsed() < ACT {
            let now = self.unit(name).await?;
            if now.main_pid != former || !now.running() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Ok(())
    }

    pub async fn stop(&self, name: &str) -> anyhow::Result<()> {
        self.run("systemctl", &["stop", name], ACT).await.map(drop)
    }

    /// Stops and disables; a unit that is gone already is fine.
    pub async fn disable(&self, name: &str) -> anyhow::Result<()> {
        let unit = self.unit(name).await?;
        if !unit.loaded {
            return Ok(());
        }
        self.stop(name).await?;
        if unit.enabled {
            self.run("systemctl", &["disable", "--quiet", name], ACT).await.map(drop)?;
        }
        self.run("systemctl", &["reset-failed", name], ACT).await.ok();
        Ok(())
    }
}

/// `key=value` lines, as `systemctl show` prints them.
pub fn parse_properties(text: &str) -> BTreeMap<String, String> {
    let lines = text.lines().filter_map(|l| l.split_once('='));
    order::map(lines.map(|(k, v)| (k.trim().to_owned(), v.trim().to_owned())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn no_answer_of_systemctl_panics(text in "(?s).{0,300}") {
            let _ = parse_properties(&text);
        }
    }
}
