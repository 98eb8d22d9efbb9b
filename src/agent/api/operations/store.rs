//! The operations that the agent remembers: each in memory, and in a file of its own.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::super::Api;
use super::requests::ExecutionFailure;
use super::resume::{MAX_RESUMPTIONS, ResumePoint};
use crate::agent::session::client::FinishedOperation;
use crate::base::json;
use crate::base::order;
use crate::contract::types::{ObjectOutcome, Operation, OperationState};
use crate::host::state::StateDir;

/// Operations that run at the same time: all, those of one tenant, and those of all tenants
/// together.
const MAX_RUNNING: usize = 8;
const MAX_RUNNING_OF_TENANT: usize = 3;
const MAX_RUNNING_OF_TENANTS: usize = MAX_RUNNING - 2;
/// What corrects a rollout that hangs is not refused because of it, unless so many change that
/// application already.
const MAX_SUPERSEDED: usize = 4;
/// Ended operations that are remembered: those of one tenant, and those of everybody without one. A
/// second request with their key finds them.
const MAX_REMEMBERED: usize = 256;
const MAX_REMEMBERED_OF_TENANT: usize = 64;
/// And for how long, seconds.
const REMEMBERED_S: i64 = 7 * 86_400;

/// An operation as it is stored.
#[derive(Clone, Serialize, Deserialize)]
pub(super) struct StoredOperation {
    pub(super) operation: Operation,
    /// Digest of the request: the same key with another request is a mistake.
    pub(super) request: String,
    /// The result is in the queue for the control plane.
    #[serde(rename = "told")]
    pub(super) reported: bool,
    /// What it takes to go on after a restart of the agent. None once it has ended, and for one
    /// that does not go on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) resume: Option<ResumePoint>,
}

pub(super) struct TrackedOperation {
    pub(super) stored: StoredOperation,
    /// What happened so far, each event as JSON.
    pub(super) events: Vec<String>,
    pub(super) changes: watch::Sender<()>,
    pub(super) cancel: CancellationToken,
    /// The application that it changes, `namespace/name`.
    application: Option<String>,
    /// It is known that its caller may change it.
    claims: bool,
    /// The order in which operations were taken.
    turn: u64,
    /// The later operation on the same application that ended this one.
    superseded_by: Option<String>,
}

/// What the next operation has as its turn.
static TURNS: AtomicU64 = AtomicU64::new(0);

impl TrackedOperation {
    pub(super) fn new(stored: StoredOperation) -> TrackedOperation {
        TrackedOperation {
            stored,
            events: Vec::new(),
            changes: watch::Sender::new(()),
            cancel: CancellationToken::new(),
            application: None,
            claims: false,
            turn: TURNS.fetch_add(1, Ordering::Relaxed),
            superseded_by: None,
        }
    }
}

impl TrackedOperation {
    pub(super) fn of_application(mut self, application: Option<String>) -> TrackedOperation {
        self.set_application(application);
        self
    }

    pub(super) fn set_application(&mut self, application: Option<String>) {
        self.application = application;
    }

    pub(super) fn changes_application(&self, application: &Option<String>) -> bool {
        application.is_some() && self.application == *application
    }
}

/// What counts of an operation that runs.
pub(super) struct RunningOperation<'a> {
    pub(super) tenant: Option<&'a str>,
    /// It changes the application that the new one changes.
    pub(super) is_of_application: bool,
}

/// Whether one more operation, of this tenant or of none, may run beside these.
///
/// # Errors
/// What is full.
pub(super) fn check_room(
    running: &[RunningOperation<'_>],
    tenant: Option<&str>,
) -> Result<(), String> {
    let superseded = running.iter().filter(|other| other.is_of_application).count();
    let counted: Vec<Option<&str>> = running
        .iter()
        .filter(|other| !other.is_of_application || superseded >= MAX_SUPERSEDED)
        .map(|other| other.tenant)
        .collect();
    let full = |count: usize, max: usize, whose: &str| {
        if count < max { Ok(()) } else { Err(format!("{max} operations{whose} run already")) }
    };
    if tenant.is_some() {
        let own = counted.iter().filter(|other| **other == tenant).count();
        full(own, MAX_RUNNING_OF_TENANT, " of the tenant")?;
        let of_tenants = counted.iter().filter(|other| other.is_some()).count();
        full(of_tenants, MAX_RUNNING_OF_TENANTS, " of tenants")?;
    }
    full(counted.len(), MAX_RUNNING, "")
}

/// An ended operation whose result is reported.
struct EndedOperation {
    tenant: Option<String>,
    /// RFC 3339.
    at: String,
    id: String,
}

/// The ids of those that are too old, or too many of their tenant's: the oldest first. No tenant
/// takes the place of another one's.
fn forgotten(mut ended: Vec<EndedOperation>, oldest: &str) -> Vec<String> {
    order::sort(&mut ended, |a, b| (&b.at, &b.id).cmp(&(&a.at, &a.id)));
    let mut kept: BTreeMap<Option<String>, usize> = BTreeMap::new();
    let mut ids = Vec::new();
    for EndedOperation { tenant, at, id } in ended {
        let max = if tenant.is_some() { MAX_REMEMBERED_OF_TENANT } else { MAX_REMEMBERED };
        let kept = kept.entry(tenant).or_default();
        if *kept >= max || *at < *oldest {
            ids.push(id);
        } else {
            *kept += 1;
        }
    }
    ids
}

/// All operations that are remembered, and where their results go.
pub struct Operations {
    dir: StateDir,
    pub(super) all: Mutex<BTreeMap<String, TrackedOperation>>,
    pub(super) results: mpsc::Sender<FinishedOperation>,
    /// One at a time takes host names for a tenant.
    pub(super) tenants: tokio::sync::Mutex<()>,
}

fn file(id: &str) -> String {
    format!("{id}.json")
}

pub(super) fn now() -> String {
    jiff::Timestamp::from_second(jiff::Timestamp::now().as_second()).unwrap_or_default().to_string()
}

impl Operations {
    /// Reads the operations of former runs. One that ran when the agent stopped still runs if it
    /// can be resumed, else it has been interrupted.
    pub fn open(dir: StateDir, results: mpsc::Sender<FinishedOperation>) -> Operations {
        let mut found = Vec::new();
        for name in dir.list() {
            let stored: Option<StoredOperation> =
                dir.read(&name).ok().flatten().and_then(|text| json::read(&text).ok());
            let Some(mut stored) = stored.filter(|s| file(&s.operation.id) == name) else {
                // no crash leaves part of a file, as files are replaced whole: it is not ours
                dir.remove(&name);
                continue;
            };
            if !stored.operation.state.ended() {
                stored.resume = stored.resume.filter(|point| point.attempts < MAX_RESUMPTIONS);
            }
            let operation = &mut stored.operation;
            if !operation.state.ended() && stored.resume.is_none() {
                operation.state = OperationState::Interrupted;
                operation.message = "the agent stopped while it ran: part of it may be done; ask \
                                     again with another key"
                    .into();
                operation.finished_at = now();
            }
            found.push(stored);
        }
        // each has its turn again
        order::sort(&mut found, |a, b| a.operation.created_at.cmp(&b.operation.created_at));
        let tracked = found.into_iter().map(TrackedOperation::new);
        let all = tracked.map(|live| (live.stored.operation.id.clone(), live)).collect();
        Operations { dir, all: Mutex::new(all), results, tenants: tokio::sync::Mutex::default() }
    }

    /// How many run.
    pub fn running(&self) -> usize {
        self.all.lock().values().filter(|l| !l.stored.operation.state.ended()).count()
    }

    /// Removes what is too old or too much, the oldest first; never one that is not reported yet.
    pub(super) fn remove_expired(&self, all: &mut BTreeMap<String, TrackedOperation>) {
        let ended = all.values().filter(|l| l.stored.reported).map(|l| EndedOperation {
            tenant: l.stored.operation.tenant.clone(),
            at: l.stored.operation.finished_at.clone(),
            id: l.stored.operation.id.clone(),
        });
        let oldest =
            jiff::Timestamp::from_second(jiff::Timestamp::now().as_second() - REMEMBERED_S)
                .unwrap_or_default()
                .to_string();
        for id in forgotten(ended.collect(), &oldest) {
            self.dir.remove(&file(&id));
            all.remove(&id);
        }
    }

    /// Ends the earlier operations that change an application: what was asked for last counts, and
    /// a rollout that hangs does not keep the one that corrects it. One that comes too late ends
    /// itself.
    pub(super) fn supersede(&self, id: &str, application: &str) {
        let mut all = self.all.lock();
        let Some(turn) = all.get(id).map(|live| live.turn) else { return };
        let application = Some(application.to_owned());
        let mut later = None;
        for (other, live) in all.iter_mut() {
            let same = live.changes_application(&application);
            if !same || other == id || live.stored.operation.state.ended() {
                continue;
            }
            if live.turn < turn {
                live.superseded_by = Some(id.into());
                live.cancel.cancel();
            } else if live.claims {
                later = Some(other.clone());
            }
        }
        if let Some(live) = all.get_mut(id) {
            live.claims = true;
            if let Some(later) = later {
                live.superseded_by = Some(later);
                live.cancel.cancel();
            }
        }
    }

    /// Waits until those that an operation supersedes have ended: two never write at once.
    pub(super) async fn superseded_ended(&self, id: &str) {
        loop {
            let former = self.all.lock().values().find_map(|live| {
                let is_former = live.superseded_by.as_deref() == Some(id)
                    && !live.stored.operation.state.ended();
                is_former.then(|| live.changes.subscribe())
            });
            let Some(mut changes) = former else { return };
            let _ = changes.changed().await;
        }
    }

    /// What is said of an operation that was cancelled.
    pub(super) fn why_cancelled(&self, id: &str) -> ExecutionFailure {
        let by = self.all.lock().get(id).and_then(|live| live.superseded_by.clone());
        let (reason, why) = match by {
            Some(by) => ("superseded", format!("superseded by {by}")),
            None => ("", "cancelled".to_owned()),
        };
        let message = format!("{why}; the objects listed were changed before that");
        ExecutionFailure { message, reason, log: Vec::new() }
    }

    pub(super) fn store(&self, stored: &StoredOperation) -> anyhow::Result<()> {
        self.dir.write(&file(&stored.operation.id), &serde_json::to_string(stored)?)
    }

    pub(super) fn change(
        &self,
        id: &str,
        change: impl FnOnce(&mut TrackedOperation),
    ) -> Option<StoredOperation> {
        let mut all = self.all.lock();
        let live = all.get_mut(id)?;
        change(live);
        live.changes.send_replace(());
        Some(live.stored.clone())
    }

    /// The same on disk too, for one that runs: what was done is known to the next start.
    pub(super) fn record(&self, id: &str, change: impl FnOnce(&mut TrackedOperation)) {
        let mut all = self.all.lock();
        let Some(live) = all.get_mut(id) else { return };
        change(live);
        live.changes.send_replace(());
        // under the lock: of two changes the later one stays
        if !live.stored.operation.state.ended()
            && let Err(error) = self.store(&live.stored)
        {
            tracing::warn!(
                error = format!("{error:#}"),
                id,
                "how far an operation is cannot be written"
            );
        }
    }
}

/// Where the executor of an operation reports its progress.
pub(super) struct Progress {
    pub(super) api: Api,
    pub(super) id: String,
}

impl Progress {
    /// Sends a message to the listeners, with the code of what is waited for where it has one.
    pub(super) fn message(&self, message: String, reason: &str) {
        self.api.operations().change(&self.id, |live| {
            let mut event = json!({"at": now(), "message": message});
            if !reason.is_empty() {
                event["reason"] = reason.into();
            }
            live.events.push(event.to_string());
            let operation = &mut live.stored.operation;
            (operation.message, operation.reason) = (message, reason.into());
        });
    }

    /// When it was accepted, RFC 3339: the same after a restart of the agent.
    pub(super) fn created_at(&self) -> String {
        let all = self.api.operations().all.lock();
        all.get(&self.id).map_or_else(now, |live| live.stored.operation.created_at.clone())
    }

    /// The revision of an application that the operation makes.
    pub(super) fn revision(&self, number: u32) {
        self.api
            .operations()
            .change(&self.id, |live| live.stored.operation.revision = Some(number));
    }

    /// The revision that runs again.
    pub(super) fn rolled_back(&self, number: u32) {
        self.api
            .operations()
            .change(&self.id, |live| live.stored.operation.rolled_back_to = Some(number));
    }

    /// The command of a job has ended.
    pub(super) fn exited(&self, code: Option<i64>, log: Vec<String>) {
        self.api.operations().change(&self.id, |live| {
            let operation = &mut live.stored.operation;
            (operation.exit_code, operation.log) = (code, log);
        });
    }

    /// An object was changed, or has reached its state.
    pub(super) fn touched(&self, object: &str, outcome: &str) {
        self.api.operations().record(&self.id, |live| {
            let objects = &mut live.stored.operation.objects;
            match objects.iter_mut().find(|t| t.object == object) {
                Some(touched) => touched.outcome = outcome.into(),
                None => {
                    objects.push(ObjectOutcome { object: object.into(), outcome: outcome.into() })
                }
            }
            live.events
                .push(json!({"at": now(), "object": object, "outcome": outcome}).to_string());
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tenant_takes_a_part_of_what_runs_at_once_and_a_correction_is_not_refused() {
        let none: Option<&str> = None;
        let (acme, globex, initech) = (Some("acme"), Some("globex"), Some("initech"));
        let others = [(none, false); 8];
        let same = [(none, true); 4];
        let of_acme = [(acme, false); 3];
        let rollouts = [(acme, true); 4];
        let two = [(acme, false), (acme, false)];
        let tenants = [&[(acme, false); 3][..], &[(globex, false); 3]].concat();
        for (running, tenant, expected) in [
            (&others[..7], none, ""),
            (&others[..], none, "8 operations run"),
            (&others[..], acme, "8 operations run"),
            // its own hang, and are corrected
            (&[&others[..7], &same[..3]].concat()[..], none, ""),
            (&[&others[..7], &same[..]].concat()[..], none, "8 operations run"),
            (&of_acme[..2], acme, ""),
            (&of_acme[..], acme, "3 operations of the tenant"),
            (&of_acme[..], globex, ""),
            (&[&two[..], &rollouts[..3]].concat()[..], acme, ""),
            (&rollouts[..], acme, "3 operations of the tenant"),
            (&tenants[..5], initech, ""),
            (&tenants[..], initech, "6 operations of tenants"),
            (&tenants[..], none, ""),
        ] {
            let seen: Vec<RunningOperation<'_>> = running
                .iter()
                .map(|(tenant, same)| RunningOperation {
                    tenant: *tenant,
                    is_of_application: *same,
                })
                .collect();
            let said = check_room(&seen, tenant).err().unwrap_or_default();
            let fits = if expected.is_empty() { said.is_empty() } else { said.contains(expected) };
            assert!(fits, "{running:?} {tenant:?}: {said}");
        }
    }

    #[test]
    fn what_a_tenant_has_done_does_not_forget_what_others_did() {
        let done = |tenant: Option<&str>, hour: u32, count: usize| -> Vec<EndedOperation> {
            let at = format!("2026-11-02T{hour:02}:00:00Z");
            let id = |n: usize| format!("{}-{hour}-{n:03}", tenant.unwrap_or("all"));
            let make =
                |n| EndedOperation { tenant: tenant.map(String::from), at: at.clone(), id: id(n) };
            (0..count).map(make).collect()
        };
        let forgotten = |all: Vec<EndedOperation>| forgotten(all, "2026-11-01T00:00:00Z");
        let mut all = done(None, 1, 256);
        all.extend(done(Some("globex"), 2, 64));
        all.extend(done(Some("acme"), 3, 1));
        all.extend(done(Some("acme"), 4, 300));
        let gone = forgotten(all);
        assert!(gone.len() == 237 && gone.iter().all(|id| id.starts_with("acme")), "{gone:?}");
        assert!(gone.contains(&"acme-3-000".to_owned()));
        assert_eq!(forgotten(done(None, 1, 258)), ["all-1-001", "all-1-000"]);
        let mut old = done(Some("acme"), 1, 1);
        old[0].at = "2026-10-31T23:00:00Z".into();
        assert_eq!(forgotten(old), ["acme-1-000"]);
    }
}
