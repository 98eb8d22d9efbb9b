//! The revisions of an application: what was deployed, kept in ConfigMaps, so that any of it can be
//! had back as it was.

use std::collections::BTreeMap;

use crate::base::json;
use crate::base::order;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// Revisions of an application that are kept.
pub const KEPT: usize = 10;
/// Label of all that belongs to an application: its name.
pub const APPLICATION_LABEL: &str = "pipeops.io/application";
/// Label of a revision: its number.
pub const NUMBER_LABEL: &str = "pipeops.io/revision";
const STATUS_ANNOTATION: &str = "pipeops.io/status";
/// Beyond it there is no next one.
const MAX_NUMBER: u32 = 1_000_000_000;

/// How far a revision came.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum RevisionState {
    #[default]
    Deploying,
    Deployed,
    Failed,
    /// One that this version does not know.
    #[serde(other)]
    Unknown,
}

/// What is said of a revision; all but its content, which never changes.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default)]
pub struct RevisionStatus {
    pub state: RevisionState,
    /// The operation that made it.
    pub operation: String,
    /// Who asked for it.
    pub subject: String,
    /// RFC 3339.
    pub created_at: String,
    /// The revision that it brings back.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rollback_to: Option<u32>,
    /// Why it failed.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub message: String,
    /// Digest of the image that ran in each container: `sha256:…`. A tag may mean another one
    /// later.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub images: BTreeMap<String, String>,
}

#[derive(Clone, Debug, Default, PartialEq)]
pub struct Revision {
    /// From 1, in the order in which they were asked for.
    pub number: u32,
    pub status: RevisionStatus,
    /// An [`Application`](crate::contract::application::Application), perhaps of a later version
    /// with fields that this one does not know.
    pub application: Value,
    /// As they were applied.
    pub objects: Vec<Value>,
}

/// Name of the ConfigMap of a revision. With a dot: nobody's application has one in its name.
pub fn object_name(application: &str, number: u32) -> String {
    format!("{application}.revision-{number}")
}

impl Revision {
    /// As it is kept. Its content cannot be changed.
    pub fn config_map(&self, namespace: &str, application: &str) -> Value {
        let text = |value: Value| value.to_string();
        json!({
            "apiVersion": "v1", "kind": "ConfigMap",
            "metadata": {
                "name": object_name(application, self.number), "namespace": namespace,
                "labels": {
                    "app.kubernetes.io/managed-by": "pipeops",
                    APPLICATION_LABEL: application, NUMBER_LABEL: self.number.to_string()
                },
                "annotations": {STATUS_ANNOTATION: text(json!(self.status))}
            },
            "immutable": true,
            "data": {
                "application.json": text(self.application.clone()),
                "objects.json": text(json!(self.objects))
            }
        })
    }

    /// A change of what is said of it, as a merge patch.
    pub fn status_patch(&self) -> Value {
        json!({"metadata": {"annotations": {STATUS_ANNOTATION: json!(self.status).to_string()}}})
    }

    /// One that is kept. None if it is somebody else's: whoever may write ConfigMaps could plant one
    /// that names objects which only a later caller may change.
    pub fn parse(object: &Value, namespace: &str, application: &str) -> Option<Revision> {
        let text = |pointer: &str| object.pointer(pointer).and_then(Value::as_str);
        let number: u32 = text("/metadata/labels/pipeops.io~1revision")?.parse().ok()?;
        let content: Value = serde_json::from_str(text("/data/application.json")?).ok()?;
        let objects: Vec<Value> = json::read(text("/data/objects.json")?).ok()?;
        let is_named = number <= MAX_NUMBER
            && text("/metadata/name")? == object_name(application, number)
            && content["name"] == application
            && content["namespace"] == namespace;
        (is_named && objects.iter().all(|o| is_part(o, namespace, application))).then_some(())?;
        let status = text("/metadata/annotations/pipeops.io~1status")?;
        Some(Revision { number, status: json::read(status).ok()?, application: content, objects })
    }
}

/// Whether an object is one that an application consists of.
fn is_part(object: &Value, namespace: &str, application: &str) -> bool {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let name = text(&object["metadata"]["name"]);
    let is_ours = match (text(&object["apiVersion"]).as_str(), text(&object["kind"]).as_str()) {
        ("v1", "PersistentVolumeClaim") => {
            name.split_once('.').is_some_and(|(owner, _)| owner == application)
        }
        ("v1", "Service")
        | ("apps/v1", "Deployment")
        | ("autoscaling/v2", "HorizontalPodAutoscaler")
        | ("policy/v1", "PodDisruptionBudget")
        | ("networking.k8s.io/v1", "Ingress")
        | ("gateway.networking.k8s.io/v1", "HTTPRoute") => name == application,
        _ => false,
    };
    is_ours && object["metadata"]["namespace"] == namespace
}

/// Those that a rollback without a number may bring back, the last one first: they ran, and were
/// others than the newest.
pub fn former(revisions: &[Revision]) -> Vec<&Revision> {
    let Some(newest) = revisions.iter().max_by_key(|revision| revision.number) else {
        return Vec::new();
    };
    let mut ran: Vec<&Revision> = revisions
        .iter()
        .filter(|r| r.number < newest.number && r.status.state == RevisionState::Deployed)
        .filter(|r| restored(r) != restored(newest))
        .collect();
    order::sort(&mut ran, |a, b| b.number.cmp(&a.number));
    ran
}

/// The one that runs.
pub fn last_that_ran(revisions: &[Revision]) -> Option<&Revision> {
    let ran = revisions.iter().filter(|r| r.status.state == RevisionState::Deployed);
    ran.max_by_key(|revision| revision.number)
}

/// Those that are no longer kept: the oldest, but never the last one that ran.
pub fn expired(revisions: &[Revision]) -> Vec<&Revision> {
    let mut sorted: Vec<&Revision> = revisions.iter().collect();
    order::sort(&mut sorted, |a, b| b.number.cmp(&a.number));
    let last = last_that_ran(revisions).map(|revision| revision.number);
    sorted.into_iter().skip(KEPT).filter(|revision| Some(revision.number) != last).collect()
}

/// An image by the digest that ran, its tag still readable: `web:1@sha256:…`.
pub fn pinned(image: &str, digest: &str) -> String {
    let name = image.split_once('@').map_or(image, |(name, _)| name);
    format!("{name}@{digest}")
}

/// The digest that ran for an image, by a pod's `imageID`. None for an image that names one itself,
/// that no registry has, or that was pulled under another name: there it may be absent.
pub fn digest<'a>(image: &str, image_id: &'a str) -> Option<&'a str> {
    let (repository, digest) = image_id.rsplit_once('@')?;
    let name = image.split_once('/').map_or((image, 0), |(host, rest)| (rest, host.len() + 1));
    let tag = name.0.rfind(':').map_or(image.len(), |at| name.1 + at);
    let wanted = &image[..tag];
    let same = repository == wanted || repository.ends_with(&format!("/{wanted}"));
    (same && !image.contains('@') && digest.starts_with("sha256:")).then_some(digest)
}

/// The objects of a revision, with the images that ran.
pub fn restored(revision: &Revision) -> Vec<Value> {
    let mut objects = revision.objects.clone();
    for object in objects.iter_mut().filter(|object| object["kind"] == "Deployment") {
        let containers = object.pointer_mut("/spec/template/spec/containers");
        for container in containers.and_then(Value::as_array_mut).into_iter().flatten() {
            let name = container["name"].as_str().unwrap_or_default();
            if let (Some(digest), Some(image)) =
                (revision.status.images.get(name), container["image"].as_str())
            {
                container["image"] = pinned(image, digest).into();
            }
        }
    }
    objects
}

#[cfg(test)]
mod tests {
    use super::*;

    fn revision(number: u32, state: RevisionState, image: &str) -> Revision {
        Revision {
            number,
            status: RevisionStatus { state, ..RevisionStatus::default() },
            application: json!({"name": "web", "namespace": "beta", "image": image}),
            objects: vec![json!({"apiVersion": "apps/v1", "kind": "Deployment",
                "metadata": {"name": "web", "namespace": "beta"},
                "spec": {"template": {"spec": {"containers": [{"name": "web", "image": image}]}}}
            })],
        }
    }

    #[test]
    fn a_revision_is_read_as_it_was_kept() {
        let mut kept = revision(7, RevisionState::Deployed, "web:1");
        kept.status.images.insert("web".into(), "sha256:ab".into());
        let object = kept.config_map("beta", "web");
        assert_eq!(object["metadata"]["name"], "web.revision-7");
        assert_eq!(Revision::parse(&object, "beta", "web"), Some(kept.clone()));
        let restored = restored(&kept);
        let image = restored[0].pointer("/spec/template/spec/containers/0/image");
        assert_eq!(image, Some(&json!("web:1@sha256:ab")));
    }

    #[test]
    fn what_was_planted_is_no_revision() {
        let kept = revision(7, RevisionState::Deployed, "web:1");
        let changed = |change: &dyn Fn(&mut Revision)| {
            let mut planted = kept.clone();
            change(&mut planted);
            planted.config_map("beta", "web")
        };
        let object = |change: &'static str, value: &'static str| {
            changed(&|r| *r.objects[0].pointer_mut(change).unwrap() = value.into())
        };
        let mut renamed = kept.config_map("beta", "web");
        renamed["metadata"]["name"] = "web.revision-8".into();
        for planted in [
            renamed,
            changed(&|r| r.number = u32::MAX),
            changed(&|r| r.application["namespace"] = "production".into()),
            changed(&|r| r.application["name"] = "other".into()),
            object("/kind", "ClusterRoleBinding"),
            object("/apiVersion", "v1"),
            object("/metadata/name", "other"),
            object("/metadata/namespace", "monitoring"),
            json!({"kind": "ConfigMap", "metadata": {"name": "web.revision-1"}}),
        ] {
            assert_eq!(Revision::parse(&planted, "beta", "web"), None, "{planted}");
        }
    }

    #[test]
    fn a_rollback_goes_to_the_last_other_one_that_ran() {
        use RevisionState::{Deployed, Failed};
        let number = |all: &[Revision]| former(all).first().map(|revision| revision.number);
        let first = revision(1, Deployed, "web:1");
        assert_eq!(number(std::slice::from_ref(&first)), None);
        let second = revision(2, Deployed, "web:2");
        assert_eq!(number(&[first.clone(), second.clone()]), Some(1));
        let broken = revision(3, Failed, "web:3");
        assert_eq!(number(&[broken.clone(), first.clone(), second.clone()]), Some(2));
        // twice goes back and forth, not to what failed
        let back = revision(4, Deployed, "web:2");
        assert_eq!(number(&[first, second, broken, back]), Some(1));
    }

    #[test]
    fn ten_are_kept_and_what_runs_is_never_lost() {
        let mut all: Vec<Revision> =
            (2..=14).map(|n| revision(n, RevisionState::Failed, "web:1")).collect();
        all.push(revision(1, RevisionState::Deployed, "web:1"));
        let numbers: Vec<u32> = expired(&all).iter().map(|revision| revision.number).collect();
        assert_eq!(numbers, [4, 3, 2]);
        assert!(expired(&all[..10]).is_empty());
    }

    #[test]
    fn an_image_is_pinned_by_what_ran() {
        for (image, id, wanted) in [
            ("web:1", "docker.io/library/web@sha256:ab", Some("sha256:ab")),
            ("web", "docker.io/library/web@sha256:ab", Some("sha256:ab")),
            ("r.example:5000/a/web:1", "r.example:5000/a/web@sha256:ab", Some("sha256:ab")),
            ("r.example:5000/a/web", "r.example:5000/a/web@sha256:ab", Some("sha256:ab")),
            ("web:1", "sha256:ab", None),
            ("web:1", "r.example/myweb@sha256:ab", None),
            ("web@sha256:00", "docker.io/library/web@sha256:ab", None),
        ] {
            assert_eq!(digest(image, id), wanted, "{image} {id}");
        }
        assert_eq!(pinned("r.example:5000/web:1", "sha256:ab"), "r.example:5000/web:1@sha256:ab");
        assert_eq!(pinned("web@sha256:00", "sha256:ab"), "web@sha256:ab");
    }
}
