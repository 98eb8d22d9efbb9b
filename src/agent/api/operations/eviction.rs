//! Which pods of a node a drain evicts, which stay, and which keep it from beginning: by the rules
//! of `kubectl drain` (kubernetes/kubectl `pkg/drain/filters.go`).

use serde_json::Value;

use crate::contract::operation::Drain;

/// What a drain does with a pod.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Evict,
    /// It belongs to the node and ends with it.
    Stays,
    /// Nothing is evicted: why, and the option that allows it.
    Refused(&'static str),
}

/// The first rule that fits. One of kubectl's is left out: a pod whose DaemonSet is gone stays too,
/// for the garbage collector of Kubernetes deletes it.
pub(super) fn verdict(pod: &Value, drain: &Drain) -> Verdict {
    let metadata = &pod["metadata"];
    let controller = metadata["ownerReferences"]
        .as_array()
        .and_then(|owners| owners.iter().find(|owner| owner["controller"] == true));
    let has_emptydir = pod["spec"]["volumes"]
        .as_array()
        .is_some_and(|volumes| volumes.iter().any(|volume| !volume["emptyDir"].is_null()));
    let is_finished = matches!(pod["status"]["phase"].as_str(), Some("Succeeded" | "Failed"));
    let is_of_daemonset = controller
        .is_some_and(|owner| owner["kind"] == "DaemonSet" && owner["apiVersion"] == "apps/v1");
    // the node's own, from a file there: the API server shows a mirror of it
    if !metadata["annotations"]["kubernetes.io/config.mirror"].is_null() {
        Verdict::Stays
    } else if is_finished {
        Verdict::Evict
    } else if is_of_daemonset && drain.ignore_daemonsets {
        Verdict::Stays
    } else if is_of_daemonset {
        Verdict::Refused("a DaemonSet keeps it on the node, and ignore_daemonsets is false")
    } else if has_emptydir && !drain.delete_emptydir_data {
        Verdict::Refused("it has an emptyDir, and delete_emptydir_data is false")
    } else if controller.is_none() && !drain.force {
        Verdict::Refused("no controller recreates it, and force is false")
    } else {
        Verdict::Evict
    }
}

/// A pod that is to go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Evicted {
    pub(super) namespace: String,
    pub(super) name: String,
    pub(super) uid: String,
}

impl Evicted {
    pub(super) fn title(&self) -> String {
        format!("Pod {}/{}", self.namespace, self.name)
    }
}

/// The pods that go.
///
/// # Errors
/// The first pods that keep the drain from beginning, each with the reason.
pub(super) fn choose(pods: &[Value], drain: &Drain) -> Result<Vec<Evicted>, String> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let (mut going, mut refused) = (Vec::new(), Vec::new());
    for pod in pods {
        let metadata = &pod["metadata"];
        let (namespace, name) = (text(&metadata["namespace"]), text(&metadata["name"]));
        let evicted = Evicted { namespace, name, uid: text(&metadata["uid"]) };
        match verdict(pod, drain) {
            Verdict::Evict => going.push(evicted),
            Verdict::Stays => {}
            Verdict::Refused(why) => refused.push(format!("{}: {why}", evicted.title())),
        }
    }
    if refused.is_empty() { Ok(going) } else { Err(first_of(&refused)) }
}

/// The first of many lines, as one.
pub(super) fn first_of(lines: &[String]) -> String {
    const MOST: usize = 10;
    let mut text = lines.iter().take(MOST).map(String::as_str).collect::<Vec<_>>().join("; ");
    if lines.len() > MOST {
        text.push_str(&format!("; and {} more", lines.len() - MOST));
    }
    text
}

/// Which PodDisruptionBudget keeps a pod, in the words of the API server (kubernetes
/// `pkg/registry/core/pod/storage/eviction.go`: a cause `DisruptionBudget` whose message names it).
pub(super) fn budget(answer: &Value) -> Option<&str> {
    cause(answer, "DisruptionBudget")?["message"].as_str()
}

/// Whether a request is refused because the namespace is going, and its pods with it.
pub(super) fn is_terminating(answer: &Value) -> bool {
    cause(answer, "NamespaceTerminating").is_some()
}

fn cause<'a>(answer: &'a Value, reason: &str) -> Option<&'a Value> {
    answer["details"]["causes"].as_array()?.iter().find(|cause| cause["reason"] == reason)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn drain(options: &Value) -> Drain {
        let mut spec = options.clone();
        spec["node"] = "n".into();
        serde_json::from_value(spec).unwrap()
    }

    fn pod(name: &str, kind: &str, more: &Value) -> Value {
        let mut pod = json!({"metadata": {"name": name, "namespace": "beta", "uid": name},
            "spec": {}, "status": {"phase": "Running"}});
        if !kind.is_empty() {
            pod["metadata"]["ownerReferences"] =
                json!([{"apiVersion": "apps/v1", "kind": kind, "controller": true}]);
        }
        for (key, value) in more.as_object().unwrap() {
            let (parent, field) = key.rsplit_once('/').unwrap();
            pod.pointer_mut(parent).unwrap()[field] = value.clone();
        }
        pod
    }

    #[test]
    fn each_pod_goes_stays_or_keeps_the_drain_from_beginning() {
        let none = json!({});
        let emptydir = json!({"/spec/volumes": [{"name": "v", "emptyDir": {}}]});
        let claim = json!({"/spec/volumes": [{"name": "v", "persistentVolumeClaim": {}}]});
        let finished = |phase: &str| json!({"/status/phase": phase});
        let keep = json!({"delete_emptydir_data": false});
        let strict = json!({"ignore_daemonsets": false});
        let force = json!({"force": true});
        let (goes, stays) = (Some(true), Some(false));
        for (kind, more, options, expected) in [
            ("ReplicaSet", &none, &none, goes),
            ("Job", &none, &none, goes),
            ("StatefulSet", &claim, &keep, goes),
            ("ReplicaSet", &emptydir, &none, goes),
            ("ReplicaSet", &emptydir, &keep, None),
            ("DaemonSet", &none, &none, stays),
            ("DaemonSet", &emptydir, &keep, stays),
            ("DaemonSet", &none, &force, stays),
            ("DaemonSet", &none, &strict, None),
            ("DaemonSet", &finished("Failed"), &strict, goes),
            ("", &none, &none, None),
            ("", &none, &force, goes),
            ("", &emptydir, &force, goes),
            ("", &finished("Succeeded"), &none, goes),
            ("", &finished("Failed"), &keep, goes),
        ] {
            let is = match verdict(&pod("p", kind, more), &drain(options)) {
                Verdict::Evict => goes,
                Verdict::Stays => stays,
                Verdict::Refused(_) => None,
            };
            assert_eq!(is, expected, "{kind} {more} {options}");
        }
        // a mirror of a file on the node, which the node owns
        let mut mirror = pod("p", "Node", &none);
        mirror["metadata"]["annotations"] = json!({"kubernetes.io/config.mirror": "x"});
        assert_eq!(verdict(&mirror, &drain(&none)), Verdict::Stays);
        // an owner that is no controller recreates nothing
        let mut owned = pod("p", "ReplicaSet", &none);
        owned["metadata"]["ownerReferences"][0]["controller"] = false.into();
        assert!(matches!(verdict(&owned, &drain(&none)), Verdict::Refused(_)));
    }

    #[test]
    fn all_that_keep_it_are_named() {
        let none = json!({});
        let pods = [pod("a", "ReplicaSet", &none), pod("d", "DaemonSet", &none)];
        let going = choose(&pods, &drain(&none)).unwrap();
        assert_eq!(going.iter().map(Evicted::title).collect::<Vec<_>>(), ["Pod beta/a"]);
        let mut pods = Vec::from(pods);
        pods.extend((0..12).map(|n| pod(&format!("bare-{n}"), "", &none)));
        let why = choose(&pods, &drain(&none)).unwrap_err();
        assert!(why.starts_with("Pod beta/bare-0: no controller recreates it"), "{why}");
        assert!(why.contains("bare-9") && why.ends_with("; and 2 more"), "{why}");
    }

    #[test]
    fn a_refusal_names_its_budget() {
        let refused = |reason: &str| {
            json!({"reason": "TooManyRequests", "details": {"causes": [{"reason": reason,
                "message": "The disruption budget web needs 2 healthy pods and has 2 currently"}]}})
        };
        let answer = refused("DisruptionBudget");
        assert!(budget(&answer).unwrap().contains("disruption budget web"), "{answer}");
        assert_eq!((budget(&refused("Other")), budget(&json!({}))), (None, None));
        assert!(is_terminating(&refused("NamespaceTerminating")) && !is_terminating(&answer));
    }
}
