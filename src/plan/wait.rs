//! Waiting for something to be true, with the reason why it is not yet; a failed start of k3s is explained from its journal.

use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use super::{Ready, documents};
use crate::cluster::{Cluster, condition};
use crate::error::{Exit, Failure};
use crate::host::{Hands, Host};
use crate::k3s::{ADMIN_KUBECONFIG, CREDENTIAL, logs};
use crate::secret::{Secret, mask};

/// Longest life of the agent's token, seconds; see `credential`.
const CREDENTIAL_LIFE: i64 = 24 * 3600;

/// `None` when it is so, else why not yet.
pub async fn missing(host: &Host, what: &Ready) -> Option<String> {
    let at = |deployment: &str, namespace: &str| format!("/apis/apps/v1/namespaces/{namespace}/deployments/{deployment}");
    match what {
        Ready::Node { name, kubeconfig, unit } => {
            // the Node object outlives a stopped kubelet by 40 seconds: the unit is asked first
            match host.unit(unit).await {
                Ok(state) if !state.running() => return Some(format!("{unit} is {}", state.active)),
                _ => {}
            }
            let cluster = match Cluster::open(host, kubeconfig) {
                Ok(cluster) => cluster,
                Err(e) => return Some(e.to_string()),
            };
            match cluster.get(&format!("/api/v1/nodes/{name}")).await {
                Ok(Some(node)) => match condition(&node, "Ready") {
                    Some((state, _)) if state == "True" => None,
                    Some((_, message)) => Some(message),
                    None => Some("the node has no state yet".into()),
                },
                Ok(None) => Some("the node has not registered yet".into()),
                Err(e) => Some(format!("the API server does not answer yet ({})", short(&e))),
            }
        }
        Ready::Deployment { namespace, name } => {
            in_cluster(host, &at(name, namespace), |object| {
                let (wanted, have) = (object["spec"]["replicas"].as_i64().unwrap_or(1), object["status"]["readyReplicas"].as_i64().unwrap_or(0));
                let seen = object["status"]["observedGeneration"].as_i64().unwrap_or(0) >= object["metadata"]["generation"].as_i64().unwrap_or(0);
                (have < wanted || !seen).then(|| format!("{have} of {wanted} pods are ready"))
            })
            .await
        }
        Ready::ApiService { name } => {
            in_cluster(host, &format!("/apis/apiregistration.k8s.io/v1/apiservices/{name}"), |object| match condition(object, "Available") {
                Some((state, _)) if state == "True" => None,
                Some((_, message)) => Some(message),
                None => Some("not reported yet".into()),
            })
            .await
        }
        Ready::StorageClass { name } => in_cluster(host, &format!("/apis/storage.k8s.io/v1/storageclasses/{name}"), |_| None).await,
        Ready::Chart { namespace, name } => {
            let chart = in_cluster(host, &format!("/apis/helm.cattle.io/v1/namespaces/{namespace}/helmcharts/{name}"), |object| {
                match condition(object, "Failed") {
                    Some((state, message)) if state == "True" => Some(format!("the chart failed: {message}")),
                    _ => object["status"]["jobName"].as_str().is_none().then(|| "its job has not been made yet".into()),
                }
            })
            .await;
            if chart.is_some() {
                return chart;
            }
            in_cluster(host, &format!("/apis/batch/v1/namespaces/{namespace}/jobs/helm-install-{name}"), |job| {
                (job["status"]["succeeded"].as_i64().unwrap_or(0) < 1).then(|| {
                    let failed = job["status"]["failed"].as_i64().unwrap_or(0);
                    if failed > 0 {
                        format!("its job failed {failed} times (kubectl -n {namespace} logs job/helm-install-{name})")
                    } else {
                        "its job is at work".into()
                    }
                })
            })
            .await
        }
        Ready::Accepts { yaml } => {
            let Ok(Some(object)) = documents(yaml).map(|mut d| d.pop()) else { return Some("nothing to try".into()) };
            match Cluster::open(host, ADMIN_KUBECONFIG) {
                Ok(cluster) => cluster.apply(&object, true).await.err().map(|e| format!("{e:#}")),
                Err(e) => Some(e.to_string()),
            }
        }
        Ready::Http { port } => {
            let client = reqwest::Client::builder().timeout(Duration::from_secs(3)).no_proxy().build();
            match client {
                Ok(client) => client.get(format!("http://127.0.0.1:{port}/")).send().await.err().map(|e| crate::host::fetch::explain(&e)),
                Err(e) => Some(e.to_string()),
            }
        }
        Ready::Credential => match host.modified(CREDENTIAL) {
            None => Some("not minted yet".into()),
            Some(then) if jiff::Timestamp::now().as_second() - then > CREDENTIAL_LIFE => Some("it is older than its token's life".into()),
            Some(_) => None,
        },
        Ready::Agent => match host.unit("pipeops-agent.service").await {
            Ok(unit) if unit.running() => None,
            Ok(unit) => Some(format!("its unit is {} ({})", unit.active, unit.sub)),
            Err(e) => Some(e.to_string()),
        },
    }
}

/// The last telling cause of a transport error, short enough for one line.
fn short(error: &kube::Error) -> String {
    let mut text = error.to_string();
    let mut at: Option<&dyn std::error::Error> = std::error::Error::source(error);
    while let Some(cause) = at {
        text = cause.to_string();
        at = cause.source();
    }
    text.lines().next().unwrap_or_default().chars().take(120).collect()
}

async fn in_cluster(host: &Host, path: &str, wrong: impl FnOnce(&serde_json::Value) -> Option<String>) -> Option<String> {
    let cluster = match Cluster::open(host, ADMIN_KUBECONFIG) {
        Ok(cluster) => cluster,
        Err(e) => return Some(e.to_string()),
    };
    match cluster.get(path).await {
        Ok(Some(object)) => wrong(&object),
        Ok(None) => Some("it is not there yet".into()),
        Err(e) => Some(format!("the API server does not answer ({})", short(&e))),
    }
}

/// Waits until all is true, or says which is not and why.
///
/// # Errors
/// Exit 8 at the deadline, or earlier when the unit's journal shows a cause that waiting cannot mend. The unit is then stopped,
/// so that it is not left in a restart loop; the next run starts it again.
pub(super) async fn until(
    hands: &Hands,
    what: &[Ready],
    within: Duration,
    optional: bool,
    stop: &CancellationToken,
    secrets: &[Secret],
    mut progress: impl FnMut(String),
) -> anyhow::Result<()> {
    // from the next second on: what the unit said before it was started anew is not its word now
    let (begin, since) = (Instant::now(), jiff::Timestamp::now().as_second() + 1);
    let mut looked = Instant::now();
    for item in what {
        loop {
            let Some(why) = missing(hands, item).await else { break };
            progress(format!("{}: {why}", item.title()));
            let unit = match item {
                Ready::Node { unit, .. } => Some(unit.as_str()),
                _ => None,
            };
            // the journal is read every few seconds, not at every look
            if let Some(unit) = unit.filter(|_| looked.elapsed() > Duration::from_secs(3)) {
                looked = Instant::now();
                if let Some((cause, line)) = logs::classify(&hands.unit_log(unit, since, 400).await)
                    && cause.fatal
                    && hands.unit(unit).await.is_ok_and(|u| u.restarts > 0 || !u.running() && u.active != "activating")
                {
                    stop_unit(hands, unit).await;
                    return Err(Failure::new(Exit::TimedOut, cause.code, format!("{unit} does not start: {}", cause.what))
                        .why(mask(&line, secrets))
                        .hint(format!("{}, then run the same command again", cause.fix))
                        .into());
                }
            }
            if begin.elapsed() >= within {
                return Err(late(hands, item, &why, within, unit, since, optional, secrets).await);
            }
            tokio::select! {
                () = stop.cancelled() => return Err(Failure::new(Exit::Interrupted, "INTERRUPTED", "interrupted while waiting").into()),
                () = tokio::time::sleep(Duration::from_millis(500)) => {}
            }
        }
    }
    Ok(())
}

async fn stop_unit(hands: &Hands, unit: &str) {
    if let Err(error) = hands.stop(unit).await {
        tracing::warn!(unit, error = %error, "cannot stop the unit");
    }
}

#[expect(clippy::too_many_arguments, reason = "one call, split off only to keep the loop readable")]
async fn late(
    hands: &Hands,
    item: &Ready,
    why: &str,
    within: Duration,
    unit: Option<&str>,
    since: i64,
    optional: bool,
    secrets: &[Secret],
) -> anyhow::Error {
    let mut code = "START_TIMEOUT".to_owned();
    let mut failure = Failure::new(Exit::TimedOut, &code, format!("{} did not come within {} s", item.title(), within.as_secs())).why(why.to_owned());
    let mut hint = "run the same command again; --timeout gives it longer".to_owned();
    if let Some(unit) = unit {
        let log = hands.unit_log(unit, since, 400).await;
        if let Some((cause, line)) = logs::classify(&log) {
            cause.code.clone_into(&mut code);
            failure = failure.why(format!("{}: {}", cause.what, mask(&line, secrets)));
            hint = format!("{}, then run the same command again", cause.fix);
        }
        for line in logs::telling(&log, 20) {
            failure = failure.why(mask(&line, secrets));
        }
        if !optional {
            stop_unit(hands, unit).await;
        }
    }
    failure.code = code;
    failure.hint(hint).into()
}
