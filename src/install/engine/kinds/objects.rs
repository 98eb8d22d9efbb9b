//! Kubernetes objects, by server-side apply.

use anyhow::Context as _;

use crate::base::error::Failure;
use crate::host::Host;
use crate::install::plan::{StepStatus, documents};
use crate::k3s::paths::ADMIN_KUBECONFIG;
use crate::kubernetes::client::{Cluster, FIELD_CONFLICT, is_transient, path_of, status, title_of};

/// Whether the API server did not answer: no answer at all, or one of what stands in front of it.
fn unanswered(error: &anyhow::Error) -> bool {
    error.downcast_ref::<kube::Error>().is_some_and(|e| status(e).is_none_or(is_transient))
}

fn is_conflict(error: &anyhow::Error) -> bool {
    error.downcast_ref::<Failure>().is_some_and(|f| f.code == FIELD_CONFLICT)
}

/// # Errors
/// When the API server refuses something other than by absence.
pub(super) async fn check(host: &Host, yaml: &str) -> anyhow::Result<StepStatus> {
    let later = || StepStatus::Later { until: "the API server answers".into() };
    match Cluster::open(host, ADMIN_KUBECONFIG) {
        Ok(cluster) if cluster.ready().await => match compare(&cluster, yaml).await {
            // it was ready a moment ago and is starting or stopping: the step itself looks again
            Err(e) if unanswered(&e) => Ok(later()),
            checked => checked,
        },
        _ => Ok(later()),
    }
}

async fn compare(cluster: &Cluster, yaml: &str) -> anyhow::Result<StepStatus> {
    let mut changes = Vec::new();
    for object in documents(yaml)? {
        let state = match cluster.is_applied(&object).await {
            Ok(state) => state,
            // an object in a namespace that is not there yet, or of a kind that is not known yet
            Err(e) if e.downcast_ref::<kube::Error>().and_then(status) == Some(404) => None,
            // the step itself fails over it; here it must not hide the state of all other steps
            Err(e) if is_conflict(&e) => {
                changes.push(format!(
                    "change {}, where another manager has set fields: {FIELD_CONFLICT}",
                    title_of(&object)
                ));
                continue;
            }
            Err(e) => return Err(e),
        };
        match state {
            Some(true) => {}
            Some(false) => changes.push(format!("change {}", title_of(&object))),
            None => changes.push(format!("create {}", title_of(&object))),
        }
    }
    Ok(if changes.is_empty() { StepStatus::Done } else { StepStatus::Todo { changes } })
}

pub(super) async fn apply(host: &Host, yaml: &str) -> anyhow::Result<()> {
    let cluster = Cluster::open(host, ADMIN_KUBECONFIG)?;
    for object in documents(yaml)? {
        cluster.apply(&object, false).await?;
    }
    Ok(())
}

/// Last first, so that a namespace is deleted after what is in it.
pub(super) async fn undo(host: &Host, yaml: &str) -> anyhow::Result<()> {
    let cluster = Cluster::open(host, ADMIN_KUBECONFIG)?;
    for object in documents(yaml)?.iter().rev() {
        cluster
            .delete(&path_of(object)?)
            .await
            .with_context(|| format!("deleting {}", title_of(object)))?;
    }
    Ok(())
}
