//! An agent as the registry holds it in memory, how alive it is, and its cluster as it is shown.

use std::collections::BTreeMap;

use serde::Serialize;
use tokio_util::sync::CancellationToken;

use crate::contract::selector::Selector;
use crate::contract::types::StatusReport;
use crate::control_plane::model::{Agent, Liveness};

/// A heartbeat is late after this many seconds, and the agent offline after these.
const LATE: i64 = 25;
const OFFLINE: i64 = 45;
/// Longest reason of an agent that is shown in lists, characters.
const MAX_REASON: usize = 200;

/// An agent in memory: its row, and what is not written with each heartbeat.
pub(super) struct Entry {
    pub(super) row: Agent,
    pub(super) seen_at: i64,
    /// It must be written at the next flush.
    pub(super) dirty: bool,
    pub(super) draining: bool,
    pub(super) conflict_until: i64,
    pub(super) tunnel: String,
    pub(super) uptime_s: u64,
    pub(super) report: Option<StatusReport>,
    /// The report came after the last one that was announced.
    pub(super) report_unannounced: bool,
    /// Cancelled when it is revoked or removed: its open streams end.
    pub(super) revocation: CancellationToken,
    /// By the id of an access with a selector, what ends its streams to here.
    pub(super) selected: BTreeMap<String, CancellationToken>,
}

/// A cluster as the API and the page show it.
#[derive(Clone, Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "Cluster"))]
pub struct ClusterView {
    pub id: String,
    pub name: String,
    pub project: String,
    pub agent_id: String,
    pub state: Liveness,
    pub reason: String,
    pub version: String,
    pub agent_version: String,
    pub provider: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub region: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub zone: String,
    /// Those that its agent reports, and those that were set at the control plane, which win.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// The keys of those that were set at the control plane: they alone count in rights.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub labels_set: Vec<String>,
    /// Told to nobody of a tenant.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nodes: Option<u32>,
    pub max_role: String,
    pub tunnel: String,
    pub seen_at: i64,
    pub registered_at: i64,
    pub uptime_s: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub report: Option<StatusReport>,
}

impl ClusterView {
    /// What somebody of a tenant may know: which cluster it is, whether it is reached, and the
    /// versions; nothing of its machines or of what runs there.
    #[must_use]
    pub fn for_tenant(self) -> ClusterView {
        // of one that is online it is about its Kubernetes
        let is_online = self.state == Liveness::Online;
        let reason = if is_online { String::new() } else { self.reason };
        let (provider, region, zone) = Default::default();
        let (labels, labels_set) = Default::default();
        let (nodes, report) = (None, None);
        ClusterView { reason, provider, region, zone, labels, labels_set, nodes, report, ..self }
    }

    /// A label or fact, as a selector sees it; none where it is not known.
    fn label(&self, key: &str) -> Option<String> {
        let fact = match key {
            "id" => &self.id,
            "name" => &self.name,
            "provider" => &self.provider,
            "region" => &self.region,
            "zone" => &self.zone,
            _ => return self.labels.get(key).cloned(),
        };
        (!fact.is_empty()).then(|| fact.clone())
    }

    /// Whether a selector names it, by what is shown of it here.
    pub(in crate::control_plane) fn is_meant(&self, selector: &Selector) -> bool {
        selector.matches(&|key| self.label(key))
    }
}

impl Entry {
    pub(super) fn new(row: Agent) -> Entry {
        let seen_at = row.seen_at;
        Entry {
            row,
            seen_at,
            dirty: false,
            draining: false,
            conflict_until: 0,
            tunnel: String::new(),
            uptime_s: 0,
            report: None,
            report_unannounced: false,
            revocation: CancellationToken::new(),
            selected: BTreeMap::new(),
        }
    }

    pub(super) fn liveness(&self, now: i64, started: i64) -> (Liveness, String) {
        let silent = now - self.seen_at;
        let judged = now - self.seen_at.max(started);
        if self.row.revoked {
            return (Liveness::Revoked, "revoked by an administrator".into());
        }
        if self.conflict_until > now {
            return (
                Liveness::Duplicate,
                "two machines show this identity: remove the copied disk's /var/lib/pipeops-agent"
                    .into(),
            );
        }
        if judged > OFFLINE && self.row.credentials.iter().all(|c| c.expires_at <= now) {
            return (
                Liveness::Expired,
                format!(
                    "silent for {silent} s, and its credential's time is over: \
                     enrol it again with a token"
                ),
            );
        }
        if self.draining {
            let state = if judged <= OFFLINE { Liveness::Draining } else { Liveness::Offline };
            return (state, "it said that it stops".into());
        }
        let overdue = format!("no heartbeat for {silent} s");
        if judged <= LATE {
            (Liveness::Online, String::new())
        } else if judged <= OFFLINE {
            (Liveness::Late, overdue)
        } else {
            (Liveness::Offline, overdue)
        }
    }

    /// Why an agent that is online cannot serve: what its last report says of Kubernetes, or
    /// nothing.
    fn kubernetes_reason(&self) -> String {
        let Some(report) = &self.report else { return String::new() };
        match report.kubernetes.as_str() {
            "" | "connected" => String::new(),
            state => {
                let reason: String = report.reason.chars().take(MAX_REASON).collect();
                format!("kubernetes {state}: {reason}")
            }
        }
    }

    pub(super) fn view(&self, now: i64, started: i64, deep: bool) -> ClusterView {
        let (state, mut reason) = self.liveness(now, started);
        if reason.is_empty() {
            reason = self.kubernetes_reason();
        }
        let row = &self.row;
        // what it runs now, not what it ran at registration
        let server = self.report.as_ref().and_then(|r| r.nodes.iter().find(|n| n.role == "server"));
        let reported = server.map(|n| n.version.clone()).filter(|v| !v.is_empty());
        ClusterView {
            id: row.cluster_id.clone(),
            name: row.cluster.name.clone(),
            project: row.project.clone(),
            agent_id: row.id.clone(),
            state,
            reason,
            version: reported.unwrap_or_else(|| row.cluster.version.clone()),
            agent_version: row.info.version.clone(),
            provider: row.cluster.provider.clone(),
            region: row.cluster.region.clone().unwrap_or_default(),
            zone: row.cluster.zone.clone().unwrap_or_default(),
            labels: row.cluster.labels.iter().chain(&row.labels).map(owned).collect(),
            labels_set: row.labels.keys().cloned().collect(),
            nodes: Some(self.report.as_ref().map_or(row.cluster.node_count, |r| {
                u32::try_from(r.nodes.len()).unwrap_or(u32::MAX)
            })),
            max_role: row.max_role.clone(),
            tunnel: if state == Liveness::Online { self.tunnel.clone() } else { String::new() },
            seen_at: self.seen_at,
            registered_at: row.registered_at,
            uptime_s: self.uptime_s,
            report: self.report.clone().filter(|_| deep),
        }
    }
}

fn owned((key, value): (&String, &String)) -> (String, String) {
    (key.clone(), value.clone())
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::contract::types::{AgentInfo, ClusterInfo};

    pub(in crate::control_plane::registry) fn agent() -> Agent {
        Agent {
            id: "a-1".into(),
            cluster_id: "c-1".into(),
            project: "p-1".into(),
            info: AgentInfo::default(),
            cluster: ClusterInfo::default(),
            capabilities: Vec::new(),
            max_role: "operator".into(),
            credentials: Vec::new(),
            registered_at: 0,
            seen_at: 100,
            revoked: false,
            online: true,
            labels: BTreeMap::new(),
        }
    }

    #[test]
    fn an_agent_that_is_online_says_why_its_cluster_cannot_be_reached() {
        let mut entry = Entry::new(agent());
        let reason = |entry: &Entry, now| entry.view(now, 0, false).reason;
        assert_eq!(reason(&entry, 101), "");
        let report = |kubernetes: &str, reason: &str| {
            Some(StatusReport {
                kubernetes: kubernetes.into(),
                reason: reason.into(),
                ..StatusReport::default()
            })
        };
        entry.report = report("connected", "");
        assert_eq!(reason(&entry, 101), "");
        entry.report = report("waiting", "/k is not there yet");
        assert_eq!(reason(&entry, 101), "kubernetes waiting: /k is not there yet");
        // of one that is silent nobody knows
        assert_eq!(reason(&entry, 100 + LATE + 1), "no heartbeat for 26 s");
        // of a tenant nobody hears more than that
        let told = |now| entry.view(now, 0, true).for_tenant();
        let view = told(101);
        assert!(view.reason.is_empty() && view.nodes.is_none() && view.report.is_none());
        assert_eq!(told(100 + LATE + 1).reason, "no heartbeat for 26 s");
    }
}
