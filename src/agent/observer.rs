//! The agent's view of the cluster: its credential as it changes, the state, counters kept by
//! watches.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use serde_json::{Value, json};
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::agent::local::ObserverLiveness;
use crate::agent::status::{AgentStatus, KubernetesState, NodeStatus, Notice};
use crate::base::task::boxed;
use crate::host::Host;
use crate::kubernetes::client::{Cluster, status};
use crate::kubernetes::readiness::pods;
use crate::kubernetes::readiness::workload::{self, WorkloadKind};
use crate::kubernetes::tenant;
use crate::kubernetes::upstream::Upstream;
use crate::kubernetes::watch::{Change, follow};

/// How often the API server is asked for its version; sooner while it does not answer.
const POLL_INTERVAL: Duration = Duration::from_secs(10);
const POLL_WAITING: Duration = Duration::from_secs(3);
/// Time for one answer.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
/// Between looks at rights and components; sooner while the API server does not say whether tenants
/// can be made.
const LOOK_INTERVAL: Duration = Duration::from_secs(300);
const LOOK_AGAIN: Duration = Duration::from_secs(5);

pub(super) struct Observer {
    pub host: Host,
    pub credential: String,
    pub max_role: String,
    pub agent_status: watch::Sender<AgentStatus>,
    /// Whether tenants can be made here; `None` until it is known.
    pub tenants: watch::Sender<Option<bool>>,
    pub upstream: watch::Sender<Option<Upstream>>,
    pub liveness: ObserverLiveness,
    pub stop: CancellationToken,
}

/// The cluster, as one credential opens it.
struct ClusterConnection {
    written: (u64, i64, i64),
    cluster: Cluster,
    upstream: Upstream,
}

impl Observer {
    /// Looks at the cluster until `stop`; a failure is a state, and none ends the task.
    pub(super) async fn run(self) -> anyhow::Result<()> {
        let mut machine = sysinfo::System::new().context("reading this machine")?;
        let mut connection: Option<ClusterConnection> = None;
        let mut followers = JoinSet::new();
        let trouble = Arc::new(Notify::new());
        loop {
            self.liveness.touch();
            machine.refresh_memory();
            let checked = self.check_cluster(&mut connection, &mut followers).await;
            let connected = checked.is_ok();
            self.agent_status.send_modify(|agent| {
                agent.memory_used = machine.used_memory();
                agent.memory_total = machine.total_memory();
                match &checked {
                    Ok(version) => {
                        agent.kubernetes = KubernetesState::Connected;
                        agent.reason.clear();
                        agent.seen_at = jiff::Timestamp::now().as_second();
                        agent.api_version.clone_from(version);
                    }
                    Err(error) => {
                        let refused = error
                            .downcast_ref::<kube::Error>()
                            .and_then(status)
                            .is_some_and(|code| code == 401 || code == 403);
                        agent.kubernetes = if refused {
                            KubernetesState::Refused
                        } else {
                            KubernetesState::Waiting
                        };
                        agent.reason = error
                            .root_cause()
                            .to_string()
                            .lines()
                            .next()
                            .unwrap_or_default()
                            .chars()
                            .take(200)
                            .collect();
                        // what is no longer known is not reported
                        agent.nodes.clear();
                    }
                }
            });
            match (&connection, connected) {
                (Some(connection), true) => {
                    if self.upstream.borrow().is_none() {
                        self.upstream.send_replace(Some(connection.upstream.clone()));
                    }
                    if followers.is_empty() {
                        self.follow_all(connection, &mut followers, &trouble);
                    }
                }
                _ => {
                    self.upstream.send_replace(None);
                    followers.abort_all();
                    followers = JoinSet::new();
                }
            }
            let pause = if connected { POLL_INTERVAL } else { POLL_WAITING };
            tokio::select! {
                () = self.stop.cancelled() => return Ok(()),
                () = tokio::time::sleep(pause) => {}
                () = trouble.notified() => {
                    followers.abort_all();
                    followers = JoinSet::new();
                    // a server that ends every watch at once is not asked without a pause
                    tokio::time::sleep(Duration::from_millis(500)).await;
                }
            }
        }
    }

    /// The version of the API server. The credential is read again when its file was replaced.
    async fn check_cluster(
        &self,
        connection: &mut Option<ClusterConnection>,
        followers: &mut JoinSet<()>,
    ) -> anyhow::Result<String> {
        let Some(written) = self.host.revision(&self.credential) else {
            *connection = None;
            anyhow::bail!("{} is not there yet", self.host.real_path(&self.credential).display());
        };
        let current = match connection {
            Some(current) if current.written == written => current,
            _ => {
                // the file and what is wrong with it, in one line
                let wrong = |error: anyhow::Error| anyhow::anyhow!("{error:#}");
                let opened = ClusterConnection {
                    written,
                    cluster: Cluster::open(&self.host, &self.credential).map_err(wrong)?,
                    upstream: Upstream::open(&self.host, &self.credential).map_err(wrong)?,
                };
                // open streams continue with the former credential; new ones use this one
                self.upstream.send_replace(None);
                followers.abort_all();
                *followers = JoinSet::new();
                connection.insert(opened)
            }
        };
        let version = tokio::time::timeout(REQUEST_TIMEOUT, current.cluster.version())
            .await
            .context("the API server does not answer")??;
        Ok(version)
    }

    fn follow_all(
        &self,
        connection: &ClusterConnection,
        followers: &mut JoinSet<()>,
        trouble: &Arc<Notify>,
    ) {
        let mut follow = |path, on_change| {
            let (cluster, trouble) = (connection.cluster.clone(), trouble.clone());
            followers.spawn(boxed(follow_until_trouble(
                cluster,
                path,
                on_change,
                trouble,
                self.stop.clone(),
            )));
        };
        follow("/api/v1/nodes", self.on_nodes());
        follow("/api/v1/namespaces", self.on_namespaces());
        for (path, healthy, set) in WORKLOAD_COUNTERS {
            follow(path, self.on_workloads(healthy, set));
        }
        let (cluster, agent_status, max_role) =
            (connection.cluster.clone(), self.agent_status.clone(), self.max_role.clone());
        let tenants = self.tenants.clone();
        let stop = self.stop.clone();
        followers.spawn(boxed(async move {
            loop {
                match notices(&cluster, &max_role).await {
                    Ok(found) => drop(agent_status.send_if_modified(|a| {
                        std::mem::replace(&mut a.notices, found.clone()) != found
                    })),
                    Err(error) => tracing::debug!(error = format!("{error:#}"), "checking rights"),
                }
                let pause = match can_make_tenants(&cluster).await {
                    Ok(can) => {
                        tenants.send_if_modified(|known| known.replace(can) != Some(can));
                        LOOK_INTERVAL
                    }
                    Err(error) => {
                        tracing::debug!(error = format!("{error:#}"), "whether there are tenants");
                        LOOK_AGAIN
                    }
                };
                tokio::select! {
                    () = stop.cancelled() => return,
                    () = tokio::time::sleep(pause) => {}
                }
            }
        }));
    }

    fn on_nodes(&self) -> OnChange {
        let agent_status = self.agent_status.clone();
        let mut nodes = BTreeMap::new();
        Box::new(move |change| {
            match change {
                Change::Reset => nodes.clear(),
                Change::Applied(v) => drop(nodes.insert(name_of(&v), NodeStatus::from_object(&v))),
                Change::Deleted(v) => drop(nodes.remove(&name_of(&v))),
                Change::Synced => {}
            }
            let list: Vec<NodeStatus> = nodes.values().cloned().collect();
            agent_status.send_if_modified(|a| {
                let changed = a.nodes != list && a.kubernetes == KubernetesState::Connected;
                if changed {
                    a.nodes = list;
                }
                changed
            });
        })
    }

    fn on_namespaces(&self) -> OnChange {
        let agent_status = self.agent_status.clone();
        let mut names = BTreeSet::new();
        Box::new(move |change| {
            match change {
                Change::Reset => names.clear(),
                Change::Applied(v) => drop(names.insert(name_of(&v))),
                Change::Deleted(v) => drop(names.remove(&name_of(&v))),
                Change::Synced => {}
            }
            agent_status.send_modify(|a| a.namespaces = names.iter().cloned().collect());
        })
    }

    fn on_workloads(&self, healthy: IsHealthy, set: SetCounts) -> OnChange {
        let agent_status = self.agent_status.clone();
        // by uid: whether the object is healthy
        let mut known: HashMap<String, bool> = HashMap::new();
        let mut synced = false;
        Box::new(move |change| {
            let uid = |v: &Value| v["metadata"]["uid"].as_str().unwrap_or_default().to_owned();
            match change {
                Change::Reset => {
                    synced = false;
                    known.clear();
                }
                Change::Applied(v) => drop(known.insert(uid(&v), healthy(&v))),
                Change::Deleted(v) => drop(known.remove(&uid(&v))),
                Change::Synced => synced = true,
            }
            if synced {
                let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
                let all = count(known.len());
                let fine = count(known.values().filter(|healthy| **healthy).count());
                agent_status.send_if_modified(|a| set(a, all, fine));
            }
        })
    }
}

/// What is done with the changes of a kind.
type OnChange = Box<dyn FnMut(Change) + Send>;

fn name_of(object: &Value) -> String {
    object["metadata"]["name"].as_str().unwrap_or_default().to_owned()
}

/// Follows the objects of a kind; when that fails, `trouble` is notified.
async fn follow_until_trouble(
    cluster: Cluster,
    path: &'static str,
    mut on_change: OnChange,
    trouble: Arc<Notify>,
    stop: CancellationToken,
) {
    match follow(&cluster, path, &mut on_change).await {
        // nothing to follow: the task stays, so that the others are not started again
        Ok(()) => stop.cancelled().await,
        Err(error) => {
            tracing::debug!(%error, path, "watch");
            trouble.notify_one();
        }
    }
}

type IsHealthy = fn(&Value) -> bool;
type SetCounts = fn(&mut AgentStatus, u32, u32) -> bool;

/// Sets a count; gives whether it has changed.
fn set_count(place: &mut u32, value: u32) -> bool {
    std::mem::replace(place, value) != value
}

fn deployment_serves(v: &Value) -> bool {
    workload::serves(WorkloadKind::Deployment, v)
}

const WORKLOAD_COUNTERS: [(&str, IsHealthy, SetCounts); 6] = [
    ("/api/v1/pods", pods::is_running, |a, all, good| {
        set_count(&mut a.workloads.pods, all) | set_count(&mut a.workloads.pods_running, good)
    }),
    ("/apis/apps/v1/deployments", deployment_serves, |a, all, good| {
        set_count(&mut a.workloads.deployments, all)
            | set_count(&mut a.workloads.deployments_ready, good)
    }),
    (
        "/apis/apps/v1/statefulsets",
        |_| true,
        |a, all, _| set_count(&mut a.workloads.statefulsets, all),
    ),
    ("/apis/apps/v1/daemonsets", |_| true, |a, all, _| set_count(&mut a.workloads.daemonsets, all)),
    ("/api/v1/services", |_| true, |a, all, _| set_count(&mut a.workloads.services, all)),
    (
        "/apis/networking.k8s.io/v1/ingresses",
        |_| true,
        |a, all, _| set_count(&mut a.workloads.ingresses, all),
    ),
];

/// Namespaces that the installer creates.
const NAMESPACES: &[&str] = &["production", "beta", "pipeops", "monitoring"];

/// Rights that the agent's own identity should not have: verb, group, resource, namespace.
const EXCESSIVE_RIGHTS: &[(&str, &str, &str, &str)] = &[
    ("*", "*", "*", ""),
    ("list", "", "secrets", ""),
    ("create", "", "pods", "kube-system"),
    ("create", "rbac.authorization.k8s.io", "clusterrolebindings", ""),
    ("escalate", "rbac.authorization.k8s.io", "clusterroles", ""),
    ("impersonate", "", "users", ""),
    ("create", "", "serviceaccounts/token", "kube-system"),
    ("get", "", "nodes/proxy", ""),
];

/// The components that the installer has installed.
const CHARTS: &str = "/apis/helm.cattle.io/v1/helmcharts?\
                      labelSelector=app.kubernetes.io/managed-by%3Dpipeops";

/// Rights that are too many or missing, and namespaces that are missing, by code.
async fn notices(cluster: &Cluster, max_role: &str) -> anyhow::Result<Vec<Notice>> {
    let mut found = Vec::new();
    let notice = |code: &str, text: String| Notice { code: code.into(), text };
    for (verb, group, resource, namespace) in EXCESSIVE_RIGHTS {
        if has_right(cluster, verb, group, resource, namespace, "").await? {
            found.push(notice(
                "RIGHTS_EXCESS",
                format!(
                    "the agent's credential may `{verb} {resource}`: give it the ServiceAccount \
                     pipeops:pipeops-agent"
                ),
            ));
        }
    }
    for (resource, name) in
        [("users", "pipeops:runner".to_owned()), ("groups", format!("pipeops:{max_role}"))]
    {
        if !has_right(cluster, "impersonate", "", resource, "", &name).await? {
            found.push(notice(
                "RIGHTS_MISSING",
                format!(
                    "the agent's credential may not act as {name}: callers of that role get 403"
                ),
            ));
        }
    }
    for verb in ["list", "watch"] {
        if !has_right(cluster, verb, "", "pods", "", "").await? {
            found.push(notice(
                "RIGHTS_MISSING",
                format!("the agent's credential may not {verb} pods: the status is incomplete"),
            ));
        }
    }
    for namespace in NAMESPACES {
        if cluster.get(&format!("/api/v1/namespaces/{namespace}")).await?.is_none() {
            found.push(notice("NAMESPACE_MISSING", format!("namespace {namespace} is not there")));
        }
    }
    // a component that was installed has a HelmChart of ours, and in its namespace a controller
    for chart in cluster.list(CHARTS).await.unwrap_or_default() {
        let name = chart["metadata"]["name"].as_str().unwrap_or_default();
        let namespace = chart["spec"]["targetNamespace"].as_str().unwrap_or("default");
        let apps = format!("/apis/apps/v1/namespaces/{namespace}");
        let deployments = cluster.list(&format!("{apps}/deployments")).await?;
        let daemonsets = cluster.list(&format!("{apps}/daemonsets")).await?;
        if deployments.is_empty() && daemonsets.is_empty() {
            found.push(notice(
                "CONTROLLER_MISSING",
                format!("{name} is to be installed in {namespace}, and nothing of it is there"),
            ));
        } else if let Some(late) = deployments.iter().find(|d| !deployment_serves(d)) {
            let why = cluster
                .workload_problem(WorkloadKind::Deployment, namespace, late)
                .await
                .unwrap_or_default();
            let text = format!("{name} in {namespace} is not ready: {why}");
            found.push(notice("CONTROLLER_NOT_READY", text));
        }
    }
    Ok(found)
}

/// Whether this cluster keeps tenants apart, and the agent has the rights to make them.
///
/// # Errors
/// When the API server does not say it.
async fn can_make_tenants(cluster: &Cluster) -> anyhow::Result<bool> {
    let roles = "rbac.authorization.k8s.io";
    let has_rights = tenant::is_supported(&cluster.version().await?)
        && has_right(cluster, "create", "", "namespaces", "", "").await?
        && has_right(cluster, "bind", roles, "clusterroles", "", "pipeops:tenant-deployer").await?;
    if !has_rights {
        return Ok(false);
    }
    // what keeps tenants apart: without it the rights alone reach further than tenants
    for name in tenant::POLICIES {
        match cluster.get(&format!("{}/{name}", tenant::BINDINGS)).await {
            Ok(Some(_)) => {}
            Ok(None) => return Ok(false),
            Err(error) if status(&error) == Some(403) => return Ok(false),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(true)
}

async fn has_right(
    cluster: &Cluster,
    verb: &str,
    group: &str,
    resource: &str,
    namespace: &str,
    name: &str,
) -> anyhow::Result<bool> {
    let (resource, sub) = resource.split_once('/').unwrap_or((resource, ""));
    let attributes = json!({
        "verb": verb, "group": group, "resource": resource, "subresource": sub,
        "namespace": namespace, "name": name
    });
    let review = json!({
        "apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview",
        "spec": {"resourceAttributes": attributes}
    });
    let answer =
        cluster.post("/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", &review).await?;
    Ok(answer["status"]["allowed"] == true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_credential_that_is_absent_and_one_that_is_no_kubeconfig_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let observer = Observer {
            host: Host::new(dir.path(), None),
            credential: "/s/name".into(),
            max_role: "operator".into(),
            agent_status: watch::Sender::new(AgentStatus::default()),
            tenants: watch::Sender::new(None),
            upstream: watch::Sender::new(None),
            liveness: ObserverLiveness::default(),
            stop: CancellationToken::new(),
        };
        let why = async || {
            let error = observer.check_cluster(&mut None, &mut JoinSet::new()).await.unwrap_err();
            error.root_cause().to_string()
        };
        let path = dir.path().join("s/name");
        assert_eq!(why().await, format!("{} is not there yet", path.display()));
        observer.host.state_dir("/s").unwrap().write("name", "vm1\n").unwrap();
        assert_eq!(why().await, "/s/name: it is no kubeconfig in YAML");
    }
}
