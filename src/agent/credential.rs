//! The agent's Kubernetes credential: a 24-hour token of its ServiceAccount, minted by root,
//! replaced by rename.

use std::time::Duration;

use anyhow::Context as _;
use serde_json::json;
use tokio_util::sync::CancellationToken;

use crate::base::yaml::{self, EqualKeys};
use crate::host::paths::{AGENT_TOKEN, AGENT_USER, CREDENTIAL};
use crate::host::{Host, Owner};
use crate::k3s::paths::ADMIN_KUBECONFIG;
use crate::kubernetes::client::Cluster;

/// Lifetime of a token, seconds.
const LIFETIME: i64 = 24 * 3600;
const RETRY: Duration = Duration::from_secs(5);

/// Mints once. It waits for the API server as long as it takes: the unit has no start time-out.
/// After a failure the old file stays.
///
/// # Errors
/// When the file cannot be written.
pub async fn mint(host: &Host, stop: &CancellationToken) -> anyhow::Result<()> {
    empty_used_token(host);
    let mut last_reason = String::new();
    loop {
        match mint_once(host).await {
            Ok(kubeconfig) => return write(host, &kubeconfig),
            Err(error) => {
                let why = format!("{error:#}");
                if why != last_reason {
                    tracing::info!(why, "waiting for the API server");
                    last_reason = why;
                }
            }
        }
        tokio::select! {
            () = stop.cancelled() => return Ok(()),
            () = tokio::time::sleep(RETRY) => {}
        }
    }
}

/// Empties the enrolment token that the agent has registered with. One that was delivered later
/// stays.
fn empty_used_token(host: &Host) {
    let registered = host.modified("/var/lib/pipeops-agent/credential.json");
    let delivered = host.modified(AGENT_TOKEN);
    let used =
        registered.zip(delivered).is_some_and(|(registered, delivered)| registered > delivered);
    if used && host.read(AGENT_TOKEN).ok().flatten().is_some_and(|token| !token.is_empty()) {
        let dir = AGENT_TOKEN.rsplit_once('/').map_or("/", |(d, _)| d);
        match host.replace(AGENT_TOKEN, b"", 0o600, Owner::default(), dir, 0o755) {
            Ok(()) => tracing::info!("the enrolment token is used up and emptied"),
            Err(error) => tracing::warn!(
                error = format!("{error:#}"),
                "the enrolment token could not be emptied"
            ),
        }
    }
}

async fn mint_once(host: &Host) -> anyhow::Result<String> {
    let cluster = Cluster::open(host, ADMIN_KUBECONFIG)?;
    let request = json!({
        "apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest",
        "spec": {"expirationSeconds": LIFETIME}
    });
    let answer = cluster
        .post(&format!("/api/v1/namespaces/pipeops/serviceaccounts/{AGENT_USER}/token"), &request)
        .await
        .context("asking for a token of the agent's ServiceAccount")?;
    let token = answer["status"]["token"].as_str().context("the API server gave no token")?;
    let admin = host.read(ADMIN_KUBECONFIG)?.context("the admin kubeconfig is gone")?;
    let admin = yaml::parse(&admin, EqualKeys::Refused)
        .with_context(|| format!("reading {ADMIN_KUBECONFIG}"))?;
    let cluster = &admin["clusters"][0]["cluster"];
    let kubeconfig = json!({
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "pipeops",
        "clusters": [{"name": "local", "cluster": cluster}],
        "contexts": [{"name": "pipeops", "context": {"cluster": "local", "user": "pipeops-agent"}}],
        "users": [{"name": "pipeops-agent", "user": {"token": token}}],
    });
    Ok(serde_json::to_string_pretty(&kubeconfig)?)
}

/// Root and the agent's group may read it.
fn write(host: &Host, kubeconfig: &str) -> anyhow::Result<()> {
    let owner = Owner { user: None, group: Some(AGENT_USER) };
    let dir = CREDENTIAL.rsplit_once('/').map_or("/", |(d, _)| d);
    host.replace(CREDENTIAL, kubeconfig.as_bytes(), 0o640, owner, dir, 0o750)
}
