//! Looks for what keeps a workload from being ready, as far as its caller may see it.

use serde_json::Value;

use super::executor::Executor;
use super::requests::{ExecutionError, GET, KubernetesRequest, items};
use crate::base::order;
use crate::base::text::printable;
use crate::contract::operation::Reference;
use crate::kubernetes::readiness::diagnosis::{
    Cause, Evidence, diagnose, is_of, is_owned, newest_replica_set,
};
use crate::kubernetes::readiness::pods::is_ready;
use crate::kubernetes::readiness::workload::{is_observed, selector};

/// Lines of a log that are told, and the longest of them, characters.
const MAX_LOG_LINES: usize = 20;
const MAX_LOG_LINE: usize = 200;
/// Pods whose events are read.
const MAX_PODS: usize = 3;

impl Executor<'_> {
    /// Why an object is not ready, by what is there since `since` (RFC 3339). A request that
    /// Kubernetes refuses or does not answer shows nothing. Only the first look is on record.
    pub(super) async fn diagnose(
        &mut self,
        reference: &Reference,
        object: &Value,
        since: &str,
    ) -> Result<Option<Cause>, ExecutionError> {
        let (Some(namespace), Some(labels)) = (&reference.namespace, selector(object)) else {
            return Ok(None);
        };
        // until then its newest template is the one before
        if reference.kind != "Job" && !is_observed(object) {
            return Ok(None);
        }
        let mut evidence = Evidence { since: since.into(), ..Evidence::default() };
        if reference.kind == "Deployment" {
            let path = format!("/apis/apps/v1/namespaces/{namespace}/replicasets");
            let sets = self.list(&path, &format!("labelSelector={labels}&limit=100")).await?;
            let Some(newest) = newest_replica_set(object, &sets) else { return Ok(None) };
            evidence.replica_set = newest.clone();
        }
        let owner = if evidence.replica_set.is_null() { object } else { &evidence.replica_set };
        // a ReplicaSet's own selector finds the pods of its template alone
        let own = selector(owner).unwrap_or(labels);
        let path = format!("/api/v1/namespaces/{namespace}/pods");
        let pods = self.list(&path, &format!("labelSelector={own}&limit=100")).await?;
        let (newest, former): (Vec<Value>, Vec<Value>) =
            pods.into_iter().filter(|pod| is_owned(pod, owner)).partition(|pod| is_of(pod, owner));
        // a StatefulSet waits for pods of its former template too
        evidence.is_former =
            reference.kind == "StatefulSet" && !former.is_empty() && newest.iter().all(is_ready);
        let uid = |of: &Value| of["metadata"]["uid"].as_str().unwrap_or_default().to_owned();
        let mut uids = vec![uid(owner)];
        evidence.pods = if evidence.is_former { former } else { newest };
        let mut waits: Vec<&Value> = evidence.pods.iter().filter(|pod| !is_ready(pod)).collect();
        let ended = |pod: &Value| {
            pod["status"]["phase"] != "Pending" && pod["status"]["phase"] != "Running"
        };
        order::sort(&mut waits, |a, b| ended(a).cmp(&ended(b)));
        uids.extend(waits.into_iter().take(MAX_PODS).map(uid));
        let path = format!("/api/v1/namespaces/{namespace}/events");
        for uid in uids.iter().filter(|uid| !uid.is_empty()) {
            let query = format!("fieldSelector=involvedObject.uid={uid}&limit=100");
            let events = self.list(&path, &query).await?;
            evidence.events.extend(events);
        }
        self.looked = true;
        Ok(diagnose(&evidence))
    }

    /// The items of a list; none where it is refused.
    async fn list(&mut self, path: &str, query: &str) -> Result<Vec<Value>, ExecutionError> {
        let request = KubernetesRequest { query, recorded: !self.looked, ..GET };
        match self.request(path, request).await {
            Ok((200, answer)) => Ok(items(answer)),
            Ok(_) | Err(ExecutionError::Failed(_)) => Ok(Vec::new()),
            Err(end) => Err(end),
        }
    }

    /// The last lines of the container that a cause names.
    pub(super) async fn last_lines(
        &mut self,
        reference: &Reference,
        cause: Option<&Cause>,
    ) -> Result<Vec<String>, ExecutionError> {
        let (Some(namespace), Some(crashed)) =
            (&reference.namespace, cause.and_then(|cause| cause.crashed.as_ref()))
        else {
            return Ok(Vec::new());
        };
        let path = format!("/api/v1/namespaces/{namespace}/pods/{}/log", crashed.pod);
        let query = format!(
            "container={}&previous={}&tailLines={MAX_LOG_LINES}&limitBytes=65536",
            crashed.container, crashed.previous
        );
        match self.request_bytes(&path, KubernetesRequest { query: &query, ..GET }).await {
            Ok((200, bytes)) => Ok(last_lines(&String::from_utf8_lossy(&bytes))),
            Ok(_) | Err(ExecutionError::Failed(_)) => Ok(Vec::new()),
            Err(end) => Err(end),
        }
    }
}

pub(super) fn last_lines(text: &str) -> Vec<String> {
    let lines: Vec<&str> = text.lines().collect();
    let last = &lines[lines.len().saturating_sub(MAX_LOG_LINES)..];
    last.iter().map(|line| printable(line).chars().take(MAX_LOG_LINE).collect()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_is_told_by_its_last_lines_without_what_a_terminal_obeys() {
        let text: String = (0..30).map(|n| format!("\u{1b}[31mline {n}\n")).collect();
        let lines = last_lines(&text);
        assert_eq!(lines.len(), MAX_LOG_LINES);
        assert!(lines[19].ends_with("line 29") && !lines[19].contains('\u{1b}'), "{lines:?}");
        assert_eq!(last_lines(&"x".repeat(9000))[0].len(), MAX_LOG_LINE);
        assert!(last_lines("").is_empty());
    }
}
