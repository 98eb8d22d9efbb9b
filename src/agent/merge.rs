//! Merges what the tasks report into one status of the agent, and into the report for the control
//! plane.

use std::time::Duration;

use serde_json::json;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::agent::config::AgentConfig;
use crate::agent::place::Place;
use crate::agent::session::ControlPlaneStatus;
use crate::agent::status::{AgentStatus, KubernetesState, NodeStatus};
use crate::contract::types::{ClusterInfo, Config, NodeReport, StatusReport, Usage, Workloads};
use crate::frp::{TunnelConfig, TunnelStatus};

pub(super) struct StatusMerger {
    pub(super) status: watch::Sender<AgentStatus>,
    pub(super) control: watch::Receiver<ControlPlaneStatus>,
    pub(super) tunnel: watch::Receiver<TunnelStatus>,
    pub(super) configs: watch::Receiver<Option<Config>>,
    pub(super) tunnel_settings: watch::Sender<Option<TunnelConfig>>,
    pub(super) cluster: watch::Sender<ClusterInfo>,
    pub(super) report: watch::Sender<StatusReport>,
    /// What of the cluster does not change while the agent runs.
    pub(super) fixed: ClusterInfo,
    pub(super) stop: CancellationToken,
}

impl StatusMerger {
    /// Merges whenever something changes, until `stop`.
    pub(super) async fn run(mut self) -> anyhow::Result<()> {
        let mut statuses = self.status.subscribe();
        loop {
            self.merge(&mut statuses);
            let changed = tokio::select! {
                () = self.stop.cancelled() => return Ok(()),
                changed = self.control.changed() => changed,
                changed = self.tunnel.changed() => changed,
                changed = self.configs.changed() => changed,
                changed = statuses.changed() => changed,
            };
            if changed.is_err() {
                // a task has ended: `Agent::wait` names it
                self.stop.cancelled().await;
            }
            // a burst of events is merged once
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    fn merge(&mut self, statuses: &mut watch::Receiver<AgentStatus>) {
        let control = self.control.borrow_and_update().clone();
        let tunnel = self.tunnel.borrow_and_update().clone();
        self.status.send_if_modified(|status| {
            let changed = status.control != control.state
                || status.control_reason != control.reason
                || status.clock_offset != control.clock_offset
                || status.tunnel != tunnel.state
                || status.tunnel_reason != tunnel.reason;
            if changed {
                (status.control, status.clock_offset, status.tunnel) =
                    (control.state, control.clock_offset, tunnel.state);
                status.control_reason.clone_from(&control.reason);
                status.tunnel_reason.clone_from(&tunnel.reason);
            }
            changed
        });
        // without an answer of the control plane the last settings stay valid
        let latest = self.configs.borrow_and_update().clone();
        if let Some(settings) = latest.map(|config| config.tunnel) {
            self.tunnel_settings.send_if_modified(|current| {
                let changed = *current != settings;
                if changed {
                    *current = settings;
                }
                changed
            });
        }
        let status = statuses.borrow_and_update().clone();
        self.cluster.send_replace(cluster_info(&status, &self.fixed));
        // a new time alone is no change of the cluster
        self.report.send_if_modified(|former| {
            let report = status_report(&status);
            former.at.clear();
            let changed = *former != StatusReport { at: String::new(), ..report.clone() };
            *former = report;
            changed
        });
    }
}

pub(super) fn hostname() -> String {
    nix::unistd::gethostname().ok().and_then(|h| h.into_string().ok()).unwrap_or_default()
}

/// What of the cluster does not change while the agent runs: its name and labels, and where it is.
/// An empty provider is not known.
pub(super) fn fixed_info(config: &AgentConfig, place: Place) -> ClusterInfo {
    let known = |text: String| Some(text).filter(|text| !text.is_empty());
    ClusterInfo {
        name: config.cluster_name.clone().unwrap_or_else(hostname),
        provider: place.provider,
        region: known(place.region),
        zone: known(place.zone),
        labels: config.labels.clone(),
        ..ClusterInfo::default()
    }
}

/// The labels of a cluster and where it is, as a text by which a change is seen; empty where there
/// is nothing of it.
pub(super) fn facts(fixed: &ClusterInfo) -> String {
    if fixed.provider.is_empty() && fixed.labels.is_empty() {
        return String::new();
    }
    json!([fixed.provider, fixed.region, fixed.zone, fixed.labels]).to_string()
}

pub(super) fn cluster_info(a: &AgentStatus, fixed: &ClusterInfo) -> ClusterInfo {
    let mut info = ClusterInfo {
        version: a.api_version.clone(),
        node_count: u32::try_from(a.nodes.len()).unwrap_or(u32::MAX),
        ..fixed.clone()
    };
    if info.provider.is_empty() {
        info.provider = if a.api_version.contains("+k3s") { "k3s" } else { "kubernetes" }.into();
    }
    info
}

fn status_report(a: &AgentStatus) -> StatusReport {
    let node = |n: &NodeStatus| NodeReport {
        name: n.name.clone(),
        ready: n.ready,
        role: n.role.clone(),
        version: n.version.clone(),
        address: n.address.clone(),
        note: n.note.clone(),
    };
    let w = &a.workloads;
    StatusReport {
        at: jiff::Timestamp::from_second(jiff::Timestamp::now().as_second() - a.clock_offset)
            .unwrap_or_default()
            .to_string(),
        kubernetes: match a.kubernetes {
            KubernetesState::Connected => "connected",
            KubernetesState::Waiting => "waiting",
            KubernetesState::Refused => "refused",
        }
        .into(),
        reason: a.reason.clone(),
        nodes: a.nodes.iter().map(node).collect(),
        namespaces: a.namespaces.clone(),
        workloads: Workloads {
            pods: w.pods,
            pods_running: w.pods_running,
            deployments: w.deployments,
            deployments_ready: w.deployments_ready,
            statefulsets: w.statefulsets,
            daemonsets: w.daemonsets,
            services: w.services,
            ingresses: w.ingresses,
        },
        usage: Usage { memory_used_bytes: a.memory_used, memory_total_bytes: a.memory_total },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cluster_is_where_its_machine_is_and_a_change_of_that_is_seen() {
        let config = AgentConfig { cluster_name: Some("c".into()), ..AgentConfig::default() };
        let home = fixed_info(&config, Place::default());
        let status = |api_version: &str| AgentStatus {
            api_version: api_version.into(),
            ..AgentStatus::default()
        };
        let provider =
            |fixed: &ClusterInfo, version| cluster_info(&status(version), fixed).provider;
        assert_eq!(provider(&home, ""), "kubernetes");
        assert_eq!(provider(&home, "v1.36.2+k3s1"), "k3s");
        let place = Place { provider: "aws".into(), region: "eu-1".into(), zone: String::new() };
        let away = fixed_info(&config, place);
        assert_eq!(provider(&away, "v1.36.2+k3s1"), "aws");
        assert_eq!((away.region.as_deref(), away.zone.as_deref()), (Some("eu-1"), None));
        // a version before wrote nothing of it
        assert_eq!(facts(&home), "");
        let labels = [("env".to_owned(), "prod".to_owned())].into();
        let labelled = fixed_info(&AgentConfig { labels, ..config }, Place::default());
        assert!(!facts(&labelled).is_empty() && facts(&labelled) != facts(&away));
    }
}
