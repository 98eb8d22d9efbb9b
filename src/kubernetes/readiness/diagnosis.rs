//! Why a workload does not get ready: what the cluster shows of it, judged by the messages of
//! kubelet, scheduler, controllers and admission. Nothing is requested here.
//!
//! The texts are those of Kubernetes 1.28 to 1.36 with containerd: `pkg/kubelet/images/types.go`
//! and `pkg/kubelet/container/sync_result.go` for the reasons of waiting containers,
//! `pkg/kubelet/kuberuntime/security_context_others.go` for users, `plugin/pkg/admission` for pods
//! that are refused.

use serde::{Deserialize, Serialize};
use serde_json::Value;

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
    pub crashed: Option<CrashedContainer>,
}

/// What the cluster shows of a workload that is not ready.
#[derive(Debug, Default)]
pub struct Evidence {
    /// The ReplicaSet of the template that was asked for, where the workload is a Deployment.
    pub replica_set: Value,
    /// Pods of that template.
    pub pods: Vec<Value>,
    /// Events of the pods, and of the one that should make them.
    pub events: Vec<Value>,
}

fn text<'a>(value: &'a Value, pointer: &str) -> &'a str {
    value.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
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
    Cause { reason, message, crashed: None }
}

/// The ReplicaSet of a Deployment's newest template: the one that it owns with the highest
/// revision.
pub fn newest_replica_set<'a>(deployment: &Value, replica_sets: &'a [Value]) -> Option<&'a Value> {
    let uid = text(deployment, "/metadata/uid");
    let revision = |set: &Value| -> u64 {
        set["metadata"]["annotations"]["deployment.kubernetes.io/revision"]
            .as_str()
            .and_then(|r| r.parse().ok())
            .unwrap_or(0)
    };
    replica_sets
        .iter()
        .filter(|set| list(set, "/metadata/ownerReferences").any(|owner| owner["uid"] == uid))
        .max_by_key(|set| revision(set))
}

/// Whether a pod was made from the template of `owner`: a ReplicaSet, a Job, or a workload that
/// makes its pods itself and names their revision.
pub fn is_of(pod: &Value, owner: &Value) -> bool {
    let uid = text(owner, "/metadata/uid");
    let owned = list(pod, "/metadata/ownerReferences").any(|o| o["uid"] == uid);
    let revision = text(owner, "/status/updateRevision");
    let current = revision.is_empty()
        || pod["metadata"]["labels"]["controller-revision-hash"].as_str() == Some(revision);
    owned && current
}

/// The most telling cause, if there is one. A workload that only takes its time has none.
pub fn diagnose(evidence: &Evidence) -> Option<Cause> {
    let refused = list(&evidence.replica_set, "/status/conditions")
        .find(|c| c["type"] == "ReplicaFailure" && c["status"] == "True")
        .map(|c| text(c, "/message"))
        .or_else(|| {
            // workloads without such a condition say it in events alone
            let none = evidence.pods.is_empty();
            let failed = |e: &&Value| none && text(e, "/reason") == "FailedCreate";
            evidence
                .events
                .iter()
                .filter(failed)
                .max_by_key(|e| seen_at(e))
                .map(|e| text(e, "/message"))
        })
        .and_then(admission_cause);
    if let Some(cause) = &refused
        && !cause.reason.can_heal()
    {
        return refused;
    }
    let alive = evidence.pods.iter().filter(|p| p["metadata"]["deletionTimestamp"].is_null());
    let causes = alive.filter_map(|pod| {
        let uid = text(pod, "/metadata/uid");
        let events: Vec<&Value> = evidence
            .events
            .iter()
            .filter(|e| !uid.is_empty() && text(e, "/involvedObject/uid") == uid)
            .collect();
        pod_cause(pod, &events)
    });
    causes.max_by_key(|cause| weight(cause.reason)).or(refused)
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
    } else if lower.contains(" usage per ") || lower.contains(" limit to request ratio per ") {
        Reason::LimitExceeded
    } else if lower.contains("failed calling webhook") {
        Reason::WebhookFailed
    } else if lower.contains("denied the request") || lower.contains("denied request") {
        Reason::AdmissionDenied
    } else if lower.contains("serviceaccount") && lower.contains("not found") {
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

fn pod_cause(pod: &Value, events: &[&Value]) -> Option<Cause> {
    let name = text(pod, "/metadata/name");
    if text(pod, "/status/phase") == "Failed" && text(pod, "/status/reason") == "Evicted" {
        let why = brief(text(pod, "/status/message"));
        return Some(cause(Reason::Evicted, format!("pod {name} was evicted: {why}")));
    }
    let scheduled = list(pod, "/status/conditions").find(|c| c["type"] == "PodScheduled");
    if let Some(condition) = scheduled.filter(|c| c["status"] == "False") {
        let why = text(condition, "/message");
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
    let containers = ["/status/initContainerStatuses", "/status/containerStatuses"];
    let states = containers.iter().flat_map(|at| list(pod, at));
    let found = states.filter_map(|state| container_cause(pod, state, events));
    let found = found.max_by_key(|cause| weight(cause.reason));
    found.or_else(|| preparation_cause(name, events)).or_else(|| probe_cause(pod, events))
}

/// Why the containers of a pod were not begun: volumes and network.
fn preparation_cause(pod: &str, events: &[&Value]) -> Option<Cause> {
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

fn is_ready(pod: &Value) -> bool {
    list(pod, "/status/conditions").any(|c| c["type"] == "Ready" && c["status"] == "True")
}

/// Containers run, and the pod is not ready.
fn probe_cause(pod: &Value, events: &[&Value]) -> Option<Cause> {
    let name = text(pod, "/metadata/name");
    if is_ready(pod) {
        return None;
    }
    let why = newest(events, &["Unhealthy", "ProbeError"])?;
    Some(cause(Reason::ProbeFailed, format!("pod {name} is not ready: {}", brief(why))))
}

fn container_cause(pod: &Value, state: &Value, events: &[&Value]) -> Option<Cause> {
    let (pod_name, name) = (text(pod, "/metadata/name"), text(state, "/name"));
    let of = format!("container {name} of pod {pod_name}");
    let waiting = text(state, "/state/waiting/reason");
    let message = text(state, "/state/waiting/message");
    match waiting {
        "ErrImagePull"
        | "ImagePullBackOff"
        | "ErrImageNeverPull"
        | "ImageInspectError"
        | "InvalidImageName"
        | "RegistryUnavailable"
        | "SignatureValidationFailed" => {
            return Some(image_cause(state, &of, waiting, message, events));
        }
        "CreateContainerConfigError" => return Some(config_cause(&of, message)),
        _ => {}
    }
    // how it ended: this time, or the last
    let ended = [&state["state"]["terminated"], &state["lastState"]["terminated"]]
        .into_iter()
        .find(|t| t.is_object() && t["exitCode"] != 0);
    let restarts = state["restartCount"].as_u64().unwrap_or(0);
    let times = if restarts == 1 { "once".to_owned() } else { format!("{restarts} times") };
    let starts = |t: &&Value| {
        matches!(text(t, "/reason"), "StartError" | "ContainerCannotRun" | "RunContainerError")
    };
    if let Some(why) = ended.filter(starts).map(|t| text(t, "/message")).or_else(|| {
        matches!(waiting, "RunContainerError" | "CreateContainerError").then_some(message)
    }) {
        return Some(start_cause(&of, why));
    }
    let ended = ended?;
    let code = ended["exitCode"].as_i64().unwrap_or(0);
    let again = state["state"]["terminated"].is_null();
    let crashed = Some(CrashedContainer {
        pod: pod_name.into(),
        container: name.into(),
        previous: again && waiting.is_empty() || waiting == "CrashLoopBackOff",
    });
    if text(ended, "/reason") == "OOMKilled" {
        let limit = list(pod, "/spec/containers")
            .chain(list(pod, "/spec/initContainers"))
            .find(|c| c["name"] == name)
            .and_then(|c| c["resources"]["limits"]["memory"].as_str())
            .map_or_else(String::new, |limit| format!(" of {limit}"));
        let message = format!("{of} was killed: it used more memory than its limit{limit}");
        return Some(Cause { reason: Reason::OutOfMemory, message, crashed });
    }
    // restarted by the kubelet, because of a probe
    if let Some(why) = newest(events, &["Killing"])
        && (why.contains("failed liveness probe") || why.contains("failed startup probe"))
        && why.contains(&format!("Container {name} "))
    {
        let said = newest(events, &["Unhealthy", "ProbeError"]).unwrap_or(why);
        let message = format!("{of} is restarted for a failed probe ({times}): {}", brief(said));
        return Some(Cause { reason: Reason::ProbeFailed, message, crashed });
    }
    let said = brief(text(ended, "/message"));
    let said = if said.is_empty() { said } else { format!(": {said}") };
    if waiting == "CrashLoopBackOff" || restarts > 0 {
        let message =
            format!("{of} ends again and again: exit code {code}, restarted {times}{said}");
        return Some(Cause { reason: Reason::CrashLoop, message, crashed });
    }
    let message = format!("{of} ended with exit code {code}{said}");
    Some(Cause { reason: Reason::ExitedWithError, message, crashed })
}

/// Why an image is not there. While the kubelet backs off, older versions say only that; the event
/// of the failure says why.
fn image_cause(state: &Value, of: &str, waiting: &str, message: &str, events: &[&Value]) -> Cause {
    let image = brief(text(state, "/image"));
    if waiting == "InvalidImageName" {
        let message = format!("`{image}` is no name of an image ({of})");
        return cause(Reason::ImageNameInvalid, message);
    }
    let pull = events.iter().filter(|e| {
        text(e, "/reason") == "Failed" && text(e, "/message").starts_with("Failed to pull image")
    });
    let pull = pull.max_by_key(|e| seen_at(e)).map(|e| text(e, "/message"));
    let vague = waiting == "ImagePullBackOff" && !message.contains("ErrImagePull");
    let why = if vague { pull.unwrap_or(message) } else { message };
    let lower = why.to_lowercase();
    let has = |parts: &[&str]| parts.iter().any(|part| lower.contains(part));
    let unauthorized = [
        "unauthorized",
        "authorization failed",
        "authentication required",
        "may require authorization",
        "no basic auth credentials",
        "forbidden",
        "denied",
    ];
    let absent = ["not found", "manifest unknown", "name unknown"];
    let (reason, what) = if has(&unauthorized) {
        let what = format!("the registry refuses `{image}`: it is private or does not exist");
        (Reason::ImageUnauthorized, what)
    } else if has(&absent) && !has(&["no such host", "lookup "]) {
        (Reason::ImageNotFound, format!("the registry does not have the image `{image}`"))
    } else if waiting == "ErrImageNeverPull" {
        let what = format!("the image `{image}` is not on the node, and must not be pulled");
        (Reason::ImageNotFound, what)
    } else {
        (Reason::ImagePullFailed, format!("the image `{image}` cannot be pulled"))
    };
    cause(reason, format!("{what} ({of}): {}", brief(why)))
}

/// Why a container's configuration cannot be made.
fn config_cause(of: &str, message: &str) -> Cause {
    if message.contains("runAsNonRoot") {
        let message = format!("the image of {of} runs as root, and must not: {}", brief(message));
        return cause(Reason::RunsAsRoot, message);
    }
    let message = format!("something that {of} needs is not there: {}", brief(message));
    cause(Reason::ConfigMissing, message)
}

/// Why the runtime cannot start a container.
fn start_cause(of: &str, why: &str) -> Cause {
    let missing = ["executable file not found", "no such file or directory", "permission denied"];
    let exec = why.contains("exec: ") || why.contains("exec format error");
    let reason = if exec && (missing.iter().any(|m| why.contains(m)) || why.contains("format")) {
        Reason::CommandNotFound
    } else {
        Reason::CrashLoop
    };
    // runc's own words come last
    let why = why.rsplit_once("error during container init: ").map_or(why, |(_, last)| last);
    cause(reason, format!("{of} cannot be started: {}", brief(why)))
}

#[cfg(test)]
mod tests;
