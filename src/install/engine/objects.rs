//! Kubernetes objects of a step: are they as wanted, apply them, take them away.

use anyhow::Context as _;

use crate::base::error::Failure;
use crate::install::plan::{StepStatus, documents};
use crate::kubernetes::client::{CONFLICT, Cluster, path_of, status, title_of};

/// # Errors
/// When the API server refuses something other than by absence.
pub(super) async fn check(cluster: &Cluster, yaml: &str) -> anyhow::Result<StepStatus> {
    let mut changes = Vec::new();
    for object in documents(yaml)? {
        let state = match cluster.is_applied(&object).await {
            Ok(state) => state,
            // an object in a namespace that is not there yet, or of a kind that is not known yet
            Err(e) if e.downcast_ref::<kube::Error>().and_then(status) == Some(404) => None,
            // it is told when the step has its turn: one object of a component must not end the look at all the others
            Err(e) if contested(&e) => {
                changes.push(format!(
                    "change {}, where somebody else has set fields: {CONFLICT}",
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

fn contested(error: &anyhow::Error) -> bool {
    error.downcast_ref::<Failure>().is_some_and(|f| f.code == CONFLICT)
}

pub(super) async fn apply(cluster: &Cluster, yaml: &str) -> anyhow::Result<()> {
    for object in documents(yaml)? {
        cluster.apply(&object, false).await?;
    }
    Ok(())
}

/// Last first, so that a namespace goes after what is in it.
pub(super) async fn remove(cluster: &Cluster, yaml: &str) -> anyhow::Result<()> {
    for object in documents(yaml)?.iter().rev() {
        cluster
            .delete(&path_of(object)?)
            .await
            .with_context(|| format!("deleting {}", title_of(object)))?;
    }
    Ok(())
}
