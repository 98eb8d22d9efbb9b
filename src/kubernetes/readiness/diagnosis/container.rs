//! Containers that do not run: images, configuration, programs that end.

use serde_json::Value;

use super::super::number;
use super::super::pods::{after_colon, bad_end};
use super::{Cause, CrashedContainer, Reason, brief, cause, list, newest, seen_at, text};

/// What keeps a container from running, or from being ready.
pub(super) fn cause_of(pod: &Value, state: &Value, events: &[&Value]) -> Option<Cause> {
    // it runs well now, or has done its work: how it ended before keeps nothing
    if state["ready"] == true {
        return None;
    }
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
    let ended = bad_end(state);
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
    let code = number(ended, "/exitCode");
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
        return Some(Cause { crashed, ..cause(Reason::OutOfMemory, message) });
    }
    // restarted by the kubelet, because of a probe
    if let Some(why) = newest(events, &["Killing"])
        && (why.contains("failed liveness probe") || why.contains("failed startup probe"))
        && why.contains(&format!("Container {name} "))
    {
        let said = newest(events, &["Unhealthy", "ProbeError"]).unwrap_or(why);
        let message = format!("{of} is restarted for a failed probe ({times}): {}", brief(said));
        return Some(Cause { crashed, ..cause(Reason::ProbeFailed, message) });
    }
    let said = after_colon(&brief(text(ended, "/message")));
    if waiting == "CrashLoopBackOff" || restarts > 0 {
        let message =
            format!("{of} ends again and again: exit code {code}, restarted {times}{said}");
        return Some(Cause { crashed, ..cause(Reason::CrashLoop, message) });
    }
    let message = format!("{of} ended with exit code {code}{said}");
    Some(Cause { crashed, ..cause(Reason::ExitedWithError, message) })
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
    if message.contains("runAsNonRoot") || message.contains("non-root policy") {
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
