//! Drains a node, and takes it out of the cluster.
//!
//! A node is cordoned and removed with the agent's own rights, its pods are evicted with the
//! caller's. As `kubectl drain` does (kubernetes/kubectl `pkg/drain/drain.go`) an eviction that a
//! PodDisruptionBudget refuses is asked for again every 5 s.

use std::collections::BTreeSet;
use std::time::Duration;

use http::Method;
use serde_json::{Value, json};
use tokio::time::Instant;

use super::eviction::{Evicted, Verdict, budget, choose, first_of, is_terminating, verdict};
use super::executor::Executor;
use super::requests::{
    ExecutionError, GET, KubernetesRequest, REVIEWS, describe_refusal, failed, failed_for,
    refusal_reason,
};
use crate::base::order;
use crate::contract::operation::{Drain, Remove};
use crate::kubernetes::readiness::node;

/// Between two tries to evict a pod (kubectl's `EvictErrorRetryDelay`).
const RETRY: Duration = Duration::from_secs(5);
/// Pods of one answer.
const PAGE: usize = 100;

/// A pod that goes, and how far it is.
struct Eviction {
    pod: Evicted,
    accepted: bool,
    /// Why it was not accepted the last time, and the code of that.
    blocked: (String, &'static str),
}

impl Executor<'_> {
    pub(super) async fn drain(&mut self, drain: &Drain) -> Result<(), ExecutionError> {
        let title = format!("Node {}", drain.node);
        // what cannot be done is found before anything is changed
        let pods = self.pods_to_evict(drain).await?;
        self.check_rights_to_evict(&pods).await?;
        self.cordon(&drain.node, &json!({"spec": {"unschedulable": true}}), "cordoned").await?;
        let pods = self.pods_to_evict(drain).await?;
        let mut left: Vec<Eviction> = pods
            .into_iter()
            .map(|pod| Eviction { pod, accepted: false, blocked: (String::new(), "") })
            .collect();
        let end = self.end(drain.timeout_s);
        let (mut next, mut last) = (Instant::now(), String::new());
        loop {
            // none is evicted once the time is over
            if Instant::now() >= next && self.before.left != Some(Duration::ZERO) {
                for eviction in left.iter_mut().filter(|eviction| !eviction.accepted) {
                    self.evict(eviction, drain.grace_period_s).await?;
                }
                next = Instant::now() + RETRY;
            }
            if let Some(pods) = self.pods_on(&drain.node).await? {
                let there =
                    order::set(pods.iter().filter_map(|pod| pod["metadata"]["uid"].as_str()));
                for gone in left.iter().filter(|one| !there.contains(one.pod.uid.as_str())) {
                    self.progress.touched(&gone.pod.title(), "absent");
                }
                left.retain(|one| there.contains(one.pod.uid.as_str()));
            }
            if left.is_empty() {
                self.progress.touched(&title, "drained");
                return Ok(());
            }
            if !drain.wait && left.iter().all(|eviction| eviction.accepted) {
                return Ok(());
            }
            let (why, reason) = what_is_left(&left);
            if Instant::now() > end {
                let reason = if reason.is_empty() { "timed_out" } else { reason };
                return failed_for(
                    reason,
                    format!("{title} is not drained after {} s: {why}", drain.timeout_s),
                );
            }
            if why != last {
                self.progress.message(format!("{title}: {why}"), reason);
                last = why;
            }
            self.pause().await?;
        }
    }

    /// The pods of a node that go.
    async fn pods_to_evict(&mut self, drain: &Drain) -> Result<Vec<Evicted>, ExecutionError> {
        let Some(pods) = self.pods_on(&drain.node).await? else {
            return failed("the Kubernetes API does not answer");
        };
        choose(&pods, drain)
            .or_else(|why| failed_for("not_evictable", format!("Node {}: {why}", drain.node)))
    }

    /// All pods of a node; none while the API server does not answer.
    async fn pods_on(&mut self, node: &str) -> Result<Option<Vec<Value>>, ExecutionError> {
        let (mut pods, mut next) = (Vec::new(), String::new());
        loop {
            let query = format!("fieldSelector=spec.nodeName={node}&limit={PAGE}{next}");
            let recorded = !std::mem::replace(&mut self.looked, true);
            let request = KubernetesRequest { query: &query, recorded, ..GET };
            let mut list = match self.request("/api/v1/pods", request).await {
                Ok((200, list)) => list,
                // 410: the list changed too much between its pages
                Ok((410 | 429 | 500.., _)) | Err(ExecutionError::Failed(_)) => return Ok(None),
                Ok((status, answer)) => return refused_node(node, status, &answer),
                Err(end) => return Err(end),
            };
            if let Value::Array(items) = list["items"].take() {
                pods.extend(items);
            }
            match list["metadata"]["continue"].as_str() {
                Some(token) if !token.is_empty() => next = format!("&continue={token}"),
                _ => return Ok(Some(pods)),
            }
        }
    }

    /// Half a node is not drained for want of a right in one namespace.
    async fn check_rights_to_evict(&mut self, pods: &[Evicted]) -> Result<(), ExecutionError> {
        let mut known = BTreeSet::new();
        for pod in pods.iter().filter(|pod| known.insert(pod.namespace.as_str())) {
            let attributes = json!({"namespace": pod.namespace, "verb": "create",
                "resource": "pods", "subresource": "eviction"});
            let review = json!({"apiVersion": "authorization.k8s.io/v1",
                "kind": "SelfSubjectAccessReview", "spec": {"resourceAttributes": attributes}});
            let request = KubernetesRequest {
                method: Method::POST,
                body: Some(("application/json", &review)),
                ..GET
            };
            let path = format!("{REVIEWS}selfsubjectaccessreviews");
            let (status, answer) = self.request(&path, request).await?;
            if !matches!(status, 200 | 201) {
                let why = describe_refusal("", status, &answer);
                return failed_for(refusal_reason(status, &answer), format!("its rights: {why}"));
            }
            if answer["status"]["allowed"] != true {
                let (title, role) = (pod.title(), self.caller.role.name());
                return failed_for(
                    "rights_missing",
                    format!(
                        "{title}: the role {role} may not `create` `pods/eviction` in namespace \
                         {}: an operator may, once `pipeops install-server` of this version has \
                         run on the server",
                        pod.namespace
                    ),
                );
            }
        }
        Ok(())
    }

    /// Asks for one eviction. The pod that was seen is meant, never one that has its name since.
    async fn evict(
        &mut self,
        eviction: &mut Eviction,
        grace_period_s: Option<u64>,
    ) -> Result<(), ExecutionError> {
        let Evicted { namespace, name, uid } = &eviction.pod;
        let mut body = json!({"apiVersion": "policy/v1", "kind": "Eviction",
            "metadata": {"namespace": namespace, "name": name},
            "deleteOptions": {"preconditions": {"uid": uid}}});
        if let Some(seconds) = grace_period_s {
            body["deleteOptions"]["gracePeriodSeconds"] = seconds.into();
        }
        let path = format!("/api/v1/namespaces/{namespace}/pods/{name}/eviction");
        let request = KubernetesRequest {
            method: Method::POST,
            body: Some(("application/json", &body)),
            ..GET
        };
        let title = eviction.pod.title();
        let (status, answer) = match self.request(&path, request).await {
            Ok(answer) => answer,
            // it is asked again, within the time
            Err(ExecutionError::Failed(failure)) => {
                eviction.blocked = (failure.message, "");
                return Ok(());
            }
            Err(end) => return Err(end),
        };
        eviction.blocked = match status {
            200 | 201 => {
                eviction.accepted = true;
                self.progress.touched(&title, "evicted");
                (String::new(), "")
            }
            // it is gone, or another one has its name: the next look shows it
            404 | 409 => (describe_refusal("Pod", status, &answer), ""),
            429 => match budget(&answer) {
                Some(budget) => (budget.to_owned(), "disruption_budget"),
                None => (describe_refusal("Pod", status, &answer), ""),
            },
            403 if is_terminating(&answer) => ("its namespace is going".into(), ""),
            502..=504 => ("the Kubernetes API does not answer".into(), ""),
            _ => {
                let why = describe_refusal("Pod", status, &answer);
                return failed_for(refusal_reason(status, &answer), format!("{title}: {why}"));
            }
        };
        Ok(())
    }

    pub(super) async fn remove(&mut self, remove: &Remove) -> Result<(), ExecutionError> {
        let title = format!("Node {}", remove.node);
        let path = format!("/api/v1/nodes/{}", remove.node);
        let as_agent = KubernetesRequest { as_agent: true, ..GET };
        let (status, object) = self.request(&path, as_agent).await?;
        match status {
            200 => {}
            404 => {
                self.progress.touched(&title, "absent");
                return Ok(());
            }
            _ => return refused_node(&remove.node, status, &object),
        }
        if is_server(&object) {
            return failed_for(
                "server_node",
                format!("{title} is a server: run `pipeops uninstall` on that machine"),
            );
        }
        if !remove.force && node::problem(&object).is_none() {
            self.check_drained(&remove.node, &object).await?;
        }
        let body = json!({"preconditions": {"uid": object["metadata"]["uid"]}});
        let request = KubernetesRequest {
            method: Method::DELETE,
            body: Some(("application/json", &body)),
            as_agent: true,
            ..GET
        };
        let (status, answer) = self.request(&path, request).await?;
        match status {
            200 | 202 => self.progress.touched(&title, "removed"),
            404 => self.progress.touched(&title, "absent"),
            403 if refusal_reason(status, &answer) == "forbidden" => {
                return failed_for(
                    "rights_missing",
                    format!(
                        "{title}: the agent may not `delete` `nodes`: run `pipeops \
                         install-server` of this version on the server"
                    ),
                );
            }
            _ => return refused_node(&remove.node, status, &answer),
        }
        Ok(())
    }

    /// A node that is ready is removed once a drain has nothing more to do there.
    async fn check_drained(&mut self, name: &str, object: &Value) -> Result<(), ExecutionError> {
        let refused = |why: String| failed_for("not_drained", format!("Node {name} {why}"));
        if object["spec"]["unschedulable"] != true {
            return refused("is ready and takes pods: drain it first, or force it".into());
        }
        let Some(pods) = self.pods_on(name).await? else {
            return failed("the Kubernetes API does not answer");
        };
        let options = Drain {
            node: name.into(),
            grace_period_s: None,
            delete_emptydir_data: true,
            ignore_daemonsets: true,
            force: true,
            wait: true,
            timeout_s: 1,
        };
        let count = pods.iter().filter(|pod| verdict(pod, &options) == Verdict::Evict).count();
        if count > 0 {
            return refused(format!(
                "is ready and still has pods ({count}): drain it first, or force it"
            ));
        }
        Ok(())
    }
}

/// Which pods are left, and why; with the code of the first that has one.
fn what_is_left(left: &[Eviction]) -> (String, &'static str) {
    let lines: Vec<String> = left
        .iter()
        .map(|eviction| {
            let why = match (eviction.accepted, eviction.blocked.0.as_str()) {
                (true, _) => "it was evicted and has not ended yet",
                (false, "") => "its eviction was not asked for",
                (false, why) => why,
            };
            format!("{}: {why}", eviction.pod.title())
        })
        .collect();
    let reason = left.iter().map(|one| one.blocked.1).find(|reason| !reason.is_empty());
    (first_of(&lines), reason.unwrap_or_default())
}

/// Whether a node is one of k3s' servers: without it the cluster may lose its database.
fn is_server(node: &Value) -> bool {
    let labels = &node["metadata"]["labels"];
    ["control-plane", "etcd", "master"]
        .iter()
        .any(|role| !labels[format!("node-role.kubernetes.io/{role}")].is_null())
}

/// The failure of an operation on a node that Kubernetes refuses.
pub(super) fn refused_node<T>(
    node: &str,
    status: u16,
    answer: &Value,
) -> Result<T, ExecutionError> {
    let why = describe_refusal("Node", status, answer);
    failed_for(refusal_reason(status, answer), format!("Node {node}: {why}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_is_told_with_the_budget_that_keeps_it() {
        let eviction = |name: &str, accepted, why: &str, reason| Eviction {
            pod: Evicted { namespace: "beta".into(), name: name.into(), uid: name.into() },
            accepted,
            blocked: (why.into(), reason),
        };
        let left = [
            eviction("a", true, "", ""),
            eviction("b", false, "The disruption budget web", "disruption_budget"),
            eviction("c", false, "", ""),
        ];
        let (why, reason) = what_is_left(&left);
        assert_eq!(
            why,
            "Pod beta/a: it was evicted and has not ended yet; \
             Pod beta/b: The disruption budget web; Pod beta/c: its eviction was not asked for"
        );
        assert_eq!((reason, what_is_left(&left[..1]).1), ("disruption_budget", ""));
    }

    #[test]
    fn a_server_is_known_by_its_role() {
        let labelled = |label: &str| json!({"metadata": {"labels": {label: "true"}}});
        for role in ["control-plane", "etcd", "master"] {
            assert!(is_server(&labelled(&format!("node-role.kubernetes.io/{role}"))), "{role}");
        }
        assert!(!is_server(&labelled("node-role.kubernetes.io/worker")) && !is_server(&json!({})));
    }
}
