//! How a Runner is: one named state with its reason, in the log, for systemd, and in a file that
//! `pipeops runner status` reads.

use std::time::Duration;

use sd_notify::NotifyState;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::base::json;
use crate::host::state::StateDir;

const FILE: &str = "status.json";
/// The file is written this often at least.
const TICK: Duration = Duration::from_secs(15);
/// A Runner whose file is older hangs, or is gone, seconds.
const FRESH: i64 = 60;

/// It takes jobs.
pub(super) const RUNNING: &str = "running";
pub(super) const CONTROL_PLANE_AWAY: &str = "control_plane_away";

/// How a Runner is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunnerStatus {
    /// `running`; else a word for what keeps it: `broker_away`, `token_revoked`, …
    pub state: String,
    pub message: String,
    /// When this was written, seconds since 1970.
    pub at: i64,
}

impl RunnerStatus {
    /// Both in one line.
    pub fn line(&self) -> String {
        let colon = if self.message.is_empty() { "" } else { ": " };
        format!("{}{colon}{}", self.state, self.message)
    }

    /// That of the Runner with this state directory; none where none has written it lately.
    pub fn read(state: &StateDir) -> Option<RunnerStatus> {
        let status: RunnerStatus = json::read(state.read(FILE).ok()??).ok()?;
        let age = jiff::Timestamp::now().as_second() - status.at;
        (age.abs() <= FRESH).then_some(status)
    }
}

/// Where a state is told.
#[derive(Clone)]
pub(super) struct StatusSender(watch::Sender<RunnerStatus>);

impl StatusSender {
    pub(super) fn new() -> StatusSender {
        StatusSender(watch::Sender::new(RunnerStatus {
            state: "starting".into(),
            ..RunnerStatus::default()
        }))
    }

    pub(super) fn set(&self, state: &str, message: &str) {
        self.0.send_if_modified(|status| {
            let changed = status.state != state || status.message != message;
            if changed {
                (status.state, status.message) = (state.into(), message.into());
                match state {
                    RUNNING | "stopping" => tracing::info!("{}", status.line()),
                    _ => tracing::warn!("{}", status.line()),
                }
            }
            changed
        });
    }

    /// A call of the control plane failed, or one succeeded: that counts while jobs are taken.
    pub(super) fn control_plane(&self, away: Option<&str>) {
        let former = self.0.borrow().state.clone();
        match away {
            Some(why) if former == RUNNING => self.set(CONTROL_PLANE_AWAY, why),
            None if former == CONTROL_PLANE_AWAY => self.set(RUNNING, ""),
            _ => {}
        }
    }

    /// Tells systemd and writes the file, until `stop`.
    pub(super) async fn publish(self, state: StateDir, stop: CancellationToken) {
        let mut seen = self.0.subscribe();
        let every = sd_notify::watchdog_enabled().map_or(TICK, |limit| TICK.min(limit / 3));
        // not fatal: outside systemd nothing listens
        let notify = |what: &[NotifyState<'_>]| drop(sd_notify::notify(what));
        notify(&[NotifyState::Ready]);
        let mut told = String::new();
        loop {
            let mut status = seen.borrow_and_update().clone();
            status.at = jiff::Timestamp::now().as_second();
            let line = status.line();
            // at each turn: one that changes again and again does not hang
            notify(&[NotifyState::Watchdog]);
            if line != told {
                notify(&[NotifyState::Status(&line)]);
                told = line;
            }
            let text = serde_json::to_string(&status).unwrap_or_default();
            if let Err(error) = state.write(FILE, &text) {
                tracing::debug!(error = format!("{error:#}"), "the state is not written");
            }
            tokio::select! {
                () = stop.cancelled() => break,
                _ = seen.changed() => {}
                () = tokio::time::sleep(every) => {}
            }
        }
        notify(&[NotifyState::Stopping]);
        state.remove(FILE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::Host;

    #[test]
    fn a_call_that_fails_counts_while_jobs_are_taken() {
        let status = StatusSender::new();
        let state = || status.0.borrow().state.clone();
        status.control_plane(Some("refused"));
        assert_eq!(state(), "starting");
        status.set(RUNNING, "");
        status.control_plane(Some("refused"));
        assert_eq!(state(), "control_plane_away");
        status.control_plane(None);
        assert_eq!(state(), RUNNING);
        status.set("token_revoked", "no");
        status.control_plane(None);
        assert_eq!(state(), "token_revoked");
    }

    #[tokio::test]
    async fn the_file_says_how_it_is_while_somebody_writes_it() {
        let dir = tempfile::tempdir().unwrap();
        let state = Host::new("/", None).state_dir(dir.path().to_str().unwrap()).unwrap();
        assert_eq!(RunnerStatus::read(&state), None);
        let (status, stop) = (StatusSender::new(), CancellationToken::new());
        let task = tokio::spawn(status.clone().publish(state.clone(), stop.clone()));
        status.set("broker_away", "refused");
        let seen = loop {
            match RunnerStatus::read(&state).filter(|seen| seen.state == "broker_away") {
                Some(seen) => break seen,
                None => tokio::task::yield_now().await,
            }
        };
        assert_eq!(seen.line(), "broker_away: refused");
        let old = RunnerStatus { at: seen.at - FRESH - 5, ..seen };
        state.write(FILE, &serde_json::to_string(&old).unwrap()).unwrap();
        assert_eq!(RunnerStatus::read(&state), None);
        stop.cancel();
        task.await.unwrap();
        assert!(state.list().is_empty());
    }
}
