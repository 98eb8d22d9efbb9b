//! Waiting for something to be true, with the reason why it is not yet.

use std::time::{Duration, Instant};

use jiff::Timestamp;
use tokio_util::sync::CancellationToken;

use super::start::UnitStart;
use crate::base::error::{Exit, Failure};
use crate::base::http::explain;
use crate::base::secret::{Secret, mask};
use crate::host::paths::CREDENTIAL;
use crate::host::{Host, HostWriter};
use crate::install::plan::{WaitCondition, documents};
use crate::k3s::paths::ADMIN_KUBECONFIG;
use crate::kubernetes::client::Cluster;
use crate::kubernetes::readiness::workload::{JobCounts, WorkloadKind};
use crate::kubernetes::readiness::{condition, node};

const AGENT_UNIT: &str = "pipeops-agent.service";
/// Longest life of the agent's token, seconds; see `credential`.
const CREDENTIAL_LIFE: i64 = 24 * 3600;

/// Why a condition is not met yet; `None` when it is.
pub async fn unmet(host: &Host, what: &WaitCondition) -> Option<String> {
    check_condition(host, what, &mut None).await
}

/// The same, with the node's heartbeats as they were when the wait began.
async fn check_condition(
    host: &Host,
    what: &WaitCondition,
    first: &mut Option<node::NodeHeartbeats>,
) -> Option<String> {
    match what {
        WaitCondition::Node { name, kubeconfig, unit, version } => {
            node_problem(host, [name, kubeconfig, unit, version], first).await
        }
        WaitCondition::Deployment { namespace, name } => {
            let path = format!("/apis/apps/v1/namespaces/{namespace}/deployments/{name}");
            match object(host, &path).await {
                Ok((cluster, object)) => {
                    cluster.workload_problem(WorkloadKind::Deployment, namespace, &object).await
                }
                Err(why) => Some(why),
            }
        }
        WaitCondition::ApiService { name } => {
            in_cluster(
                host,
                &format!("/apis/apiregistration.k8s.io/v1/apiservices/{name}"),
                |object| match condition(object, "Available") {
                    Some(available) if available.is_true() => None,
                    Some(available) => Some(available.message.to_owned()),
                    None => Some("not reported yet".into()),
                },
            )
            .await
        }
        WaitCondition::StorageClass { name } => {
            in_cluster(host, &format!("/apis/storage.k8s.io/v1/storageclasses/{name}"), |_| None)
                .await
        }
        WaitCondition::Chart { namespace, name } => chart(host, namespace, name).await.err(),
        WaitCondition::Accepts { yaml } => {
            let Ok(Some(object)) = documents(yaml).map(|mut d| d.pop()) else {
                return Some("nothing to try".into());
            };
            match Cluster::open(host, ADMIN_KUBECONFIG) {
                Ok(cluster) => cluster.apply(&object, true).await.err().map(|e| format!("{e:#}")),
                Err(e) => Some(e.to_string()),
            }
        }
        WaitCondition::Http { port } => {
            let client =
                reqwest::Client::builder().timeout(Duration::from_secs(3)).no_proxy().build();
            match client {
                Ok(client) => client
                    .get(format!("http://127.0.0.1:{port}/"))
                    .send()
                    .await
                    .err()
                    .map(|e| explain(&e)),
                Err(e) => Some(e.to_string()),
            }
        }
        WaitCondition::Credential => match host.modified(CREDENTIAL) {
            None => Some("not minted yet".into()),
            Some(then) if jiff::Timestamp::now().as_second() - then > CREDENTIAL_LIFE => {
                Some("it is older than its token's life".into())
            }
            Some(_) => None,
        },
        WaitCondition::Agent => match host.unit(AGENT_UNIT).await {
            Ok(unit) if unit.running() => None,
            Ok(unit) => Some(format!("its unit is {} ({})", unit.active, unit.sub)),
            Err(e) => Some(e.to_string()),
        },
    }
}

/// The root cause of a transport error, short enough for one line.
fn short(error: &kube::Error) -> String {
    let mut text = error.to_string();
    let mut at: Option<&dyn std::error::Error> = std::error::Error::source(error);
    while let Some(cause) = at {
        text = cause.to_string();
        at = cause.source();
    }
    text.lines().next().unwrap_or_default().chars().take(120).collect()
}

/// The Node, as the kubelet that this start of the unit brought reports it.
async fn node_problem(
    host: &Host,
    [name, kubeconfig, unit, version]: [&String; 4],
    first: &mut Option<node::NodeHeartbeats>,
) -> Option<String> {
    // the Node object outlives a stopped kubelet by 40 seconds: the unit is asked first
    let mut started = None;
    match host.unit(unit).await {
        Ok(state) if !state.running() => {
            let again = if state.restarts > 0 {
                format!(", restarted {} times", state.restarts)
            } else {
                String::new()
            };
            return Some(format!("{unit} is {}{again}", state.state_text()));
        }
        Ok(state) => started = state.started_at(),
        Err(_) => {}
    }
    let cluster = match Cluster::open(host, kubeconfig) {
        Ok(cluster) => cluster,
        Err(e) => return Some(e.to_string()),
    };
    let object = match cluster.get(&format!("/api/v1/nodes/{name}")).await {
        Ok(Some(object)) => object,
        Ok(None) => return Some("the node has not registered yet".into()),
        Err(e) => return Some(format!("the API server does not answer yet ({})", short(&e))),
    };
    if let Some(why) = node::problem(&object).or_else(|| node::version_problem(&object, version)) {
        return Some(why);
    }
    let lease = cluster
        .get(&format!("/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases/{name}"))
        .await
        .ok()
        .flatten();
    let beats = node::heartbeats(&object, lease.as_ref());
    // a heartbeat that came during the wait is of this start, whatever the clocks say
    let came = *first.get_or_insert(beats) != beats;
    let fresh = came || node::is_current(beats, started, Timestamp::now());
    (!fresh).then(|| format!("the kubelet has given no sign of life since {unit} was started"))
}

/// # Errors
/// Why the chart is not installed yet: its job restarts a container that fails, and counts no
/// failure for that.
async fn chart(host: &Host, namespace: &str, name: &str) -> Result<(), String> {
    let (cluster, chart) =
        object(host, &format!("/apis/helm.cattle.io/v1/namespaces/{namespace}/helmcharts/{name}"))
            .await?;
    if let Some(failure) = condition(&chart, "Failed")
        && failure.is_true()
    {
        return Err(format!("the chart failed: {}", failure.message));
    }
    let job = chart["status"]["jobName"].as_str().ok_or("its job has not been made yet")?;
    let path = format!("/apis/batch/v1/namespaces/{namespace}/jobs/{job}");
    let job_object = cluster
        .get(&path)
        .await
        .map_err(|e| format!("the API server does not answer ({})", short(&e)))?
        .ok_or("it is not there yet")?;
    let JobCounts { succeeded, failed } = JobCounts::of(&job_object);
    if succeeded > 0 {
        return Ok(());
    }
    let logs = format!("kubectl -n {namespace} logs job/{job}");
    Err(match cluster.pods_problem(namespace, &format!("job-name={job}")).await {
        Some(why) => format!("its job does not get through: {why} ({logs})"),
        None if failed > 0 => format!("its job failed {failed} times ({logs})"),
        None => "its job is at work".into(),
    })
}

/// # Errors
/// Why it cannot be read.
async fn object(host: &Host, path: &str) -> Result<(Cluster, serde_json::Value), String> {
    let cluster = Cluster::open(host, ADMIN_KUBECONFIG).map_err(|e| e.to_string())?;
    match cluster.get(path).await {
        Ok(Some(object)) => Ok((cluster, object)),
        Ok(None) => Err("it is not there yet".into()),
        Err(e) => Err(format!("the API server does not answer ({})", short(&e))),
    }
}

async fn in_cluster(
    host: &Host,
    path: &str,
    wrong: impl FnOnce(&serde_json::Value) -> Option<String>,
) -> Option<String> {
    match object(host, path).await {
        Ok((_, object)) => wrong(&object),
        Err(why) => Some(why),
    }
}

/// Waits until all is true, or says which is not and why.
///
/// # Errors
/// Exit 8 at the deadline, or earlier when the unit ends again and again or its journal shows a
/// cause that waiting does not fix. The unit is then stopped, so that it is not left in a restart
/// loop; the next run starts it again.
pub(super) async fn wait_until(
    writer: &HostWriter,
    what: &[WaitCondition],
    within: Duration,
    optional: bool,
    stop: &CancellationToken,
    secrets: &[Secret],
    progress: impl FnMut(String),
) -> anyhow::Result<()> {
    tokio::select! {
        biased;
        () = stop.cancelled() => {
            let what = "interrupted while waiting";
            Err(Failure::new(Exit::Interrupted, "INTERRUPTED", what).into())
        }
        met = all_met(writer, what, within, optional, secrets, progress) => met,
    }
}

async fn all_met(
    writer: &HostWriter,
    what: &[WaitCondition],
    within: Duration,
    optional: bool,
    secrets: &[Secret],
    mut progress: impl FnMut(String),
) -> anyhow::Result<()> {
    let begin = Instant::now();
    let mut start: Option<UnitStart> = None;
    let mut first = None;
    for item in what {
        // what runs on a node is waited for with an eye on the node's unit
        if let Some(unit) = unit_of(item)
            && start.as_ref().is_none_or(|s| s.unit != unit)
        {
            start = Some(UnitStart::begin(writer, unit, secrets).await);
        }
        loop {
            let Some(why) = check_condition(writer, item, &mut first).await else { break };
            let why = mask(&why, secrets);
            progress(format!("{}: {why}", item.title()));
            // minting is tried again by its own timer and after each start of k3s
            if let Some(start) =
                start.as_mut().filter(|_| !matches!(item, WaitCondition::Credential))
                && let Some(failure) = start.check().await
            {
                return Err(failure.into());
            }
            if begin.elapsed() >= within {
                return Err(timeout_failure(item, why, within, start.as_mut(), optional)
                    .await
                    .into());
            }
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    }
    Ok(())
}

/// The unit whose start an item waits for.
fn unit_of(item: &WaitCondition) -> Option<&str> {
    match item {
        WaitCondition::Node { unit, .. } => Some(unit),
        WaitCondition::Credential => Some("pipeops-agent-credential.service"),
        WaitCondition::Agent => Some(AGENT_UNIT),
        _ => None,
    }
}

/// At the deadline. A unit explains what it should have brought; what runs on a node that is there
/// explains itself.
async fn timeout_failure(
    item: &WaitCondition,
    why: String,
    within: Duration,
    start: Option<&mut UnitStart<'_>>,
    optional: bool,
) -> Failure {
    let pods =
        ["BackOff", "Err", "no node takes", " ended", "Config"].iter().any(|w| why.contains(w));
    let failure = Failure::new(
        Exit::TimedOut,
        "START_TIMEOUT",
        format!("{} did not come within {} s", item.title(), within.as_secs()),
    )
    .why(why);
    match (start, item) {
        (
            _,
            WaitCondition::Deployment { namespace, .. } | WaitCondition::Chart { namespace, .. },
        ) if pods => failure.hint(format!(
            "correct what its pod says (`kubectl -n {namespace} get events`), then run the same \
             command again"
        )),
        (Some(start), item) if unit_of(item).is_some() => {
            start
                .at_deadline(
                    failure.hint("run the same command again; --timeout gives it longer"),
                    optional,
                )
                .await
        }
        _ => failure.hint("run the same command again; --timeout gives it longer"),
    }
}
