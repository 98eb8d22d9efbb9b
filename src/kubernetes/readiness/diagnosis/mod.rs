//! Why a workload does not get ready: what the cluster shows of it, judged by the messages of
//! kubelet, scheduler, controllers and admission. Nothing is requested here.
//!
//! The texts are those of Kubernetes 1.28 to 1.36 with containerd: `pkg/kubelet/images/types.go`
//! and `pkg/kubelet/container/sync_result.go` for the reasons of waiting containers,
//! `pkg/kubelet/kuberuntime/security_context_others.go` for users, `plugin/pkg/admission` for pods
//! that are refused.

mod container;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::pods::{containers, is_leaving, is_ready, unscheduled};
use super::{condition, text};
use crate::base::text::printable;

/// Longest part of a foreign message that is repeated, characters.
const MAX_MESSAGE: usize = 400;

/// What keeps a workload from being ready. Its code is stable; programs decide by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// The registry does not have the image.
    ImageNotFound,
    /// The registry wants other credentials, or hides that the image is not there.
    ImageUnauthorized,
    /// That is no name of an image.
    ImageNameInvalid,
    /// The image cannot be pulled for another reason: registry not reached, disk full.
    ImagePullFailed,
    /// The image runs as root, and the pod must not.
    RunsAsRoot,
    /// The image has no such program, or it cannot be started.
    CommandNotFound,
    /// A Secret, ConfigMap or service account that the pod names is not there.
    ConfigMissing,
    /// A container used more memory than its limit.
    OutOfMemory,
    /// A container ends again and again.
    CrashLoop,
    /// A container ended with an error, and is not started again.
    ExitedWithError,
    /// A probe fails: the container runs and is not ready, or is restarted for it.
    ProbeFailed,
    /// No node takes the pod.
    Unschedulable,
    /// A volume is not there yet, or cannot be mounted.
    VolumePending,
    /// A quota of the namespace is used up.
    QuotaExceeded,
    /// The pod asks for more than a LimitRange of the namespace allows.
    LimitExceeded,
    /// The Pod Security level of the namespace refuses the pod.
    PodSecurity,
    /// An admission webhook does not answer.
    WebhookFailed,
    /// An admission webhook or policy refuses the pod.
    AdmissionDenied,
    /// The node cannot set up the pod's network or sandbox.
    SandboxFailed,
    /// The node took the pod's resources back.
    Evicted,
}

impl Reason {
    pub const ALL: [Reason; 20] = [
        Reason::ImageNotFound,
        Reason::ImageUnauthorized,
        Reason::ImageNameInvalid,
        Reason::ImagePullFailed,
        Reason::RunsAsRoot,
        Reason::CommandNotFound,
        Reason::ConfigMissing,
        Reason::OutOfMemory,
        Reason::CrashLoop,
        Reason::ExitedWithError,
        Reason::ProbeFailed,
        Reason::Unschedulable,
        Reason::VolumePending,
        Reason::QuotaExceeded,
        Reason::LimitExceeded,
        Reason::PodSecurity,
        Reason::WebhookFailed,
        Reason::AdmissionDenied,
        Reason::SandboxFailed,
        Reason::Evicted,
    ];

    /// Whether it can end without a change of what was asked for. Where it can't, waiting is of no
    /// use.
    pub fn can_heal(self) -> bool {
        !matches!(
            self,
            Reason::ImageNameInvalid
                | Reason::RunsAsRoot
                | Reason::PodSecurity
                | Reason::LimitExceeded
        )
    }

    /// Its code on the wire.
    pub fn code(self) -> &'static str {
        match self {
            Reason::ImageNotFound => "image_not_found",
            Reason::ImageUnauthorized => "image_unauthorized",
            Reason::ImageNameInvalid => "image_name_invalid",
            Reason::ImagePullFailed => "image_pull_failed",
            Reason::RunsAsRoot => "runs_as_root",
            Reason::CommandNotFound => "command_not_found",
            Reason::ConfigMissing => "config_missing",
            Reason::OutOfMemory => "out_of_memory",
            Reason::CrashLoop => "crash_loop",
            Reason::ExitedWithError => "exited_with_error",
            Reason::ProbeFailed => "probe_failed",
            Reason::Unschedulable => "unschedulable",
            Reason::VolumePending => "volume_pending",
            Reason::QuotaExceeded => "quota_exceeded",
            Reason::LimitExceeded => "limit_exceeded",
            Reason::PodSecurity => "pod_security",
            Reason::WebhookFailed => "webhook_failed",
            Reason::AdmissionDenied => "admission_denied",
            Reason::SandboxFailed => "sandbox_failed",
            Reason::Evicted => "evicted",
        }
    }
}

/// A container whose last lines may say more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CrashedContainer {
    pub pod: String,
    pub container: String,
    /// It runs again: the log is that of the run before.
    pub previous: bool,
}

/// Why a workload is not ready, in words and for programs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cause {
    pub reason: Reason,
    /// One line: what is wrong and the evidence for it.
    pub message: String,
    /// Waiting is of no use: it can't heal, and it is about the workload as it is now.
    pub is_final: bool,
    pub crashed: Option<CrashedContainer>,
}

/// What the cluster shows of a workload that is not ready.
#[derive(Debug, Default)]
pub struct Evidence {
    /// The ReplicaSet of the template that was asked for, where the workload is a Deployment.
    pub replica_set: Value,
    /// Pods of that template; of the former one where `is_former`.
    pub pods: Vec<Value>,
    pub is_former: bool,
    /// Events of the pods, and of the one that should make them.
    pub events: Vec<Value>,
    /// When the wait began, RFC 3339 to the second: a refusal from before may be about the
    /// namespace as it was.
    pub since: String,
}

fn list<'a>(value: &'a Value, pointer: &str) -> impl Iterator<Item = &'a Value> {
    value.pointer(pointer).and_then(Value::as_array).into_iter().flatten()
}

/// A foreign message on one line.
fn brief(message: &str) -> String {
    let line = message.split_whitespace().collect::<Vec<_>>().join(" ");
    let line = printable(&line);
    let short: String = line.chars().take(MAX_MESSAGE).collect();
    if line.chars().count() > MAX_MESSAGE { format!("{short}…") } else { short }
}

fn cause(reason: Reason, message: String) -> Cause {
    Cause { reason, message, is_final: !reason.can_heal(), crashed: None }
}

/// The ReplicaSet of a Deployment's newest template: the one that it owns with the highest
/// revision.
pub fn newest_replica_set<'a>(deployment: &Value, replica_sets: &'a [Value]) -> Option<&'a Value> {
    let revision = |set: &Value| -> u64 {
        set["metadata"]["annotations"]["deployment.kubernetes.io/revision"]
            .as_str()
            .and_then(|r| r.parse().ok())
            .unwrap_or(0)
    };
    replica_sets.iter().filter(|set| is_owned(set, deployment)).max_by_key(|set| revision(set))
}

/// Whether an object was made by `owner`.
pub fn is_owned(object: &Value, owner: &Value) -> bool {
    let uid = text(owner, "/metadata/uid");
    list(object, "/metadata/ownerReferences").any(|o| o["uid"] == uid)
}

/// Whether a pod was made from the template of its owner as it is now. A ReplicaSet and a Job have
/// one template; a StatefulSet names the revision of its newest, a DaemonSet the number
/// (kubernetes/kubernetes `pkg/controller/daemon/util/daemonset_util.go`).
pub fn is_of(pod: &Value, owner: &Value) -> bool {
    let labels = &pod["metadata"]["labels"];
    let revision = text(owner, "/status/updateRevision");
    let number = &owner["metadata"]["annotations"]["deprecated.daemonset.template.generation"];
    (revision.is_empty() || labels["controller-revision-hash"] == revision)
        && (number.is_null() || labels["pod-template-generation"] == *number)
}

/// The most telling cause, if there is one. A workload that only takes its time has none.
pub fn diagnose(evidence: &Evidence) -> Option<Cause> {
    let refused = refusal(evidence);
    if refused.as_ref().is_some_and(|cause| cause.is_final) {
        return refused;
    }
    let waits = |p: &&Value| !is_leaving(p) && !is_ready(p);
    let (ended, active): (Vec<&Value>, Vec<&Value>) =
        evidence.pods.iter().filter(waits).partition(|pod| has_ended(pod));
    // how pods ended explains only where none is left that may still get ready
    let pods = if active.is_empty() { ended } else { active };
    let causes = pods.into_iter().filter_map(|pod| {
        let uid = text(pod, "/metadata/uid");
        let events: Vec<&Value> = evidence
            .events
            .iter()
            .filter(|e| !uid.is_empty() && text(e, "/involvedObject/uid") == uid)
            .collect();
        pod_cause(pod, &events)
    });
    let mut found = causes.max_by_key(|cause| weight(cause.reason)).or(refused)?;
    if evidence.is_former {
        found.is_final = false;
        found.message += " (a pod of the former template, which is waited for: delete it)";
    }
    Some(found)
}

/// Why pods are not made, where that is so.
fn refusal(evidence: &Evidence) -> Option<Cause> {
    let failed = |e: &&Value| text(e, "/reason") == "FailedCreate";
    let newest = evidence.events.iter().filter(failed).max_by_key(|e| seen_at(e));
    let failure = condition(&evidence.replica_set, "ReplicaFailure").filter(|c| c.is_true());
    // workloads without such a condition say it in events alone
    let by_event = newest.filter(|_| evidence.replica_set.is_null() && evidence.pods.is_empty());
    let message = failure.map(|c| c.message).or_else(|| by_event.map(|e| text(e, "/message")));
    let mut found = admission_cause(message?)?;
    // the condition keeps the time and the words of the first refusal, the event those of the last
    found.is_final &= newest.is_some_and(|event| seen_at(event) >= evidence.since.as_str());
    Some(found)
}

fn has_ended(pod: &Value) -> bool {
    matches!(text(pod, "/status/phase"), "Failed" | "Succeeded")
}

/// How much a reason explains.
fn weight(reason: Reason) -> u8 {
    match reason {
        Reason::ImageNameInvalid
        | Reason::RunsAsRoot
        | Reason::PodSecurity
        | Reason::LimitExceeded => 9,
        Reason::OutOfMemory | Reason::CommandNotFound => 8,
        Reason::ImageNotFound | Reason::ImageUnauthorized | Reason::ConfigMissing => 7,
        Reason::CrashLoop | Reason::ExitedWithError => 6,
        Reason::ImagePullFailed | Reason::Evicted => 5,
        Reason::ProbeFailed => 4,
        Reason::Unschedulable
        | Reason::VolumePending
        | Reason::QuotaExceeded
        | Reason::WebhookFailed
        | Reason::AdmissionDenied => 3,
        Reason::SandboxFailed => 2,
    }
}

/// When an event was seen last; RFC 3339, so that texts compare as times.
fn seen_at(event: &Value) -> &str {
    ["/series/lastObservedTime", "/lastTimestamp", "/eventTime", "/metadata/creationTimestamp"]
        .iter()
        .map(|at| text(event, at))
        .find(|t| !t.is_empty())
        .unwrap_or_default()
}

/// The newest event with one of the reasons.
fn newest<'a>(events: &[&'a Value], reasons: &[&str]) -> Option<&'a str> {
    let of = events.iter().filter(|e| reasons.contains(&text(e, "/reason")));
    of.max_by_key(|e| seen_at(e)).map(|e| text(e, "/message"))
}

/// What keeps pods from being made, by the answer of the API server.
pub fn admission_cause(message: &str) -> Option<Cause> {
    let lower = message.to_lowercase();
    let reason = if lower.contains("violates podsecurity") {
        Reason::PodSecurity
    } else if lower.contains("exceeded quota") || lower.contains("failed quota") {
        Reason::QuotaExceeded
    } else if lower.contains("failed calling webhook") {
        Reason::WebhookFailed
    } else if lower.contains("denied the request") || lower.contains("denied request") {
        Reason::AdmissionDenied
    } else if lower.contains(" usage per ") || lower.contains(" limit to request ratio per ") {
        Reason::LimitExceeded
    } else if lower.contains("error looking up service account") {
        Reason::ConfigMissing
    } else {
        return None;
    };
    let what = match reason {
        Reason::PodSecurity => "the namespace's Pod Security level refuses the pods",
        Reason::QuotaExceeded => "a quota of the namespace is used up",
        Reason::LimitExceeded => "a LimitRange of the namespace refuses the pods",
        Reason::WebhookFailed => "an admission webhook does not answer",
        Reason::AdmissionDenied => "an admission rule refuses the pods",
        _ => "the pods cannot be made",
    };
    Some(cause(reason, format!("{what}: {}", brief(message))))
}

/// What keeps a pod that is not ready.
fn pod_cause(pod: &Value, events: &[&Value]) -> Option<Cause> {
    let name = text(pod, "/metadata/name");
    if text(pod, "/status/phase") == "Failed" && text(pod, "/status/reason") == "Evicted" {
        let why = brief(text(pod, "/status/message"));
        return Some(cause(Reason::Evicted, format!("pod {name} was evicted: {why}")));
    }
    if let Some(unscheduled) = unscheduled(pod) {
        let why = unscheduled.message;
        let lower = why.to_lowercase();
        let volume =
            lower.contains("persistentvolumeclaim") || lower.contains("volume node affinity");
        let (reason, what) = if volume {
            (Reason::VolumePending, "waits for its volume")
        } else {
            (Reason::Unschedulable, "fits on no node")
        };
        return Some(cause(reason, format!("pod {name} {what}: {}", brief(why))));
    }
    let found = containers(pod).filter_map(|state| container::cause_of(pod, state, events));
    let found = found.max_by_key(|cause| weight(cause.reason));
    found.or_else(|| preparation_cause(name, events)).or_else(|| probe_cause(name, events))
}

/// Why the containers of a pod were not begun: volumes and network.
fn preparation_cause(pod: &str, events: &[&Value]) -> Option<Cause> {
    // what came after it shows that it has healed
    let steps = [
        "FailedMount",
        "FailedAttachVolume",
        "FailedCreatePodSandBox",
        "Pulling",
        "Pulled",
        "Created",
        "Started",
    ];
    let known = events.iter().filter(|e| steps.contains(&text(e, "/reason")));
    let last = known.max_by_key(|e| seen_at(e))?;
    if !text(last, "/reason").starts_with("Failed") {
        return None;
    }
    if let Some(why) = newest(events, &["FailedMount", "FailedAttachVolume"]) {
        let missing = (why.contains("secret \"") || why.contains("configmap \""))
            && why.contains("not found")
            || why.contains("references non-existent");
        let reason = if missing { Reason::ConfigMissing } else { Reason::VolumePending };
        return Some(cause(
            reason,
            format!("a volume of pod {pod} cannot be mounted: {}", brief(why)),
        ));
    }
    let why = newest(events, &["FailedCreatePodSandBox"])?;
    let message = format!("the node cannot set up the network of pod {pod}: {}", brief(why));
    Some(cause(Reason::SandboxFailed, message))
}

/// Containers run, and the pod is not ready.
fn probe_cause(name: &str, events: &[&Value]) -> Option<Cause> {
    let why = newest(events, &["Unhealthy", "ProbeError"])?;
    Some(cause(Reason::ProbeFailed, format!("pod {name} is not ready: {}", brief(why))))
}

#[cfg(test)]
mod tests;
