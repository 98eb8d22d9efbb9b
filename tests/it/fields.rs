//! Fields of Kubernetes objects that somebody else owns: controllers that write values back in
//! their own form, and people.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::support::Sandbox;

/// Owners of fields other than the installer: by path of the object and JSON pointer of the field.
#[derive(Default)]
pub(crate) struct Fields {
    owners: BTreeMap<(String, String), String>,
    /// A controller answers each write of an object by writing it back whole, from its Go types.
    pub(crate) controllers: bool,
}

/// What an object sets: pointer and value of each leaf, without what names the object.
fn leaves(at: &str, value: &Value, found: &mut Vec<(String, Value)>) {
    let step = |key: &str| format!("{at}/{}", key.replace('~', "~0").replace('/', "~1"));
    match value {
        Value::Object(map) => map.iter().for_each(|(key, value)| leaves(&step(key), value, found)),
        Value::Array(items) => items
            .iter()
            .enumerate()
            .for_each(|(n, value)| leaves(&step(&n.to_string()), value, found)),
        _ if ["/apiVersion", "/kind", "/metadata/name", "/metadata/namespace"].contains(&at) => {}
        _ => found.push((at.to_owned(), value.clone())),
    }
}

fn fields_of(object: &Value) -> Vec<(String, Value)> {
    let mut found = Vec::new();
    leaves("", object, &mut found);
    found
}

impl Fields {
    /// Somebody's `kubectl edit`.
    fn set(sandbox: &Sandbox, path: &str, pointer: &str, value: Value, manager: &str) {
        *sandbox.api.objects.lock().unwrap().get_mut(path).unwrap().pointer_mut(pointer).unwrap() =
            value;
        sandbox
            .api
            .fields
            .lock()
            .unwrap()
            .owners
            .insert((path.into(), pointer.into()), manager.into());
    }

    /// As an API server refuses an apply without force (k8s.io/apimachinery, `NewApplyConflict`).
    pub(crate) fn conflict(&self, path: &str, known: &Value, desired: &Value) -> Option<Value> {
        let causes: Vec<Value> = fields_of(desired)
            .into_iter()
            .filter(|(pointer, value)| known.pointer(pointer) != Some(value))
            .filter_map(|(pointer, _)| {
                let manager = self.owners.get(&(path.to_owned(), pointer.clone()))?;
                let message = format!(
                    "conflict with \"{manager}\" using {}",
                    desired["apiVersion"].as_str()?
                );
                Some(json!({"reason": "FieldManagerConflict", "message": message,
                    "field": pointer.replace('/', ".")}))
            })
            .collect();
        let message =
            format!("Apply failed with {} conflict: planted-value-of-a-field-8315", causes.len());
        let status = json!({"kind": "Status", "apiVersion": "v1", "metadata": {},
            "status": "Failure", "reason": "Conflict", "code": 409,
            "message": message, "details": {"causes": causes}});
        (!causes.is_empty()).then_some(status)
    }

    /// What others set stays.
    pub(crate) fn keep(&self, path: &str, known: &Value, object: &mut Value) {
        for (_, pointer) in self.owners.keys().filter(|(p, _)| p == path) {
            if let (Some(theirs), Some(field)) =
                (known.pointer(pointer), object.pointer_mut(pointer))
            {
                *field = theirs.clone();
            }
        }
    }

    /// The controller of the kind reads the object and writes it back: what has another form in its
    /// types is its own from then on.
    pub(crate) fn rewrite(&mut self, path: &str, object: &mut Value) {
        if !self.controllers {
            return;
        }
        let manager = match object["kind"].as_str().unwrap_or_default() {
            "HelmChart" => "helm-controller@vm1",
            "Certificate" | "ClusterIssuer" => "cert-manager-certificates-trigger",
            _ => "kube-controller-manager",
        };
        let form = if object["kind"] == "LimitRange" { quantity } else { duration };
        for (pointer, value) in fields_of(object) {
            let Some(kept) = value.as_str().and_then(form).filter(|kept| value != **kept) else {
                continue;
            };
            *object.pointer_mut(&pointer).unwrap() = json!(kept);
            self.owners.insert((path.to_owned(), pointer), manager.to_owned());
        }
    }
}

/// A text that Go reads as a duration, as Go writes it: `5m` is `5m0s`.
fn duration(text: &str) -> Option<String> {
    let (mut ms, mut rest) = (0_u64, text);
    while !rest.is_empty() {
        let unit = rest.trim_start_matches(|c: char| c.is_ascii_digit());
        let number: u64 = rest[..rest.len() - unit.len()].parse().ok()?;
        let (each, after) = [("ms", 1), ("h", 3_600_000), ("m", 60_000), ("s", 1000)]
            .iter()
            .find_map(|(u, n)| Some((n, unit.strip_prefix(u)?)))?;
        (ms, rest) = (ms + number * each, after);
    }
    let (hours, minutes, seconds) = (ms / 3_600_000, ms / 60_000 % 60, ms / 1000 % 60);
    match (text.is_empty(), hours, minutes) {
        (true, ..) => None,
        (_, 0, 0) => Some(format!("{seconds}s")),
        (_, 0, _) => Some(format!("{minutes}m{seconds}s")),
        _ => Some(format!("{hours}h{minutes}m{seconds}s")),
    }
}

/// A quantity as the API server writes it, as far as it is used here: the largest unit that leaves
/// a whole number.
fn quantity(text: &str) -> Option<String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = &text[digits.len()..];
    let number: f64 = digits.parse().ok()?;
    let (mut thousandths, binary) = match unit {
        "m" => (number, false),
        "" => (number * 1000.0, false),
        "Ki" | "Mi" | "Gi" => (number, true),
        _ => return None,
    };
    if !binary {
        return Some(if thousandths % 1000.0 == 0.0 {
            format!("{}", thousandths / 1000.0)
        } else {
            format!("{thousandths}m")
        });
    }
    let mut at = ["Ki", "Mi", "Gi", "Ti"].iter().position(|u| *u == unit)?;
    while thousandths % 1024.0 == 0.0 && at < 3 {
        (thousandths, at) = (thousandths / 1024.0, at + 1);
    }
    Some(format!("{thousandths}{}", ["Ki", "Mi", "Gi", "Ti"][at]))
}

#[test]
fn the_forms_are_those_of_go() {
    for (text, kept) in [
        ("5m", "5m0s"),
        ("5m0s", "5m0s"),
        ("87600h", "87600h0m0s"),
        ("90s", "1m30s"),
        ("1h30m", "1h30m0s"),
    ] {
        assert_eq!(duration(text).as_deref(), Some(kept));
    }
    assert!(["", "5", "m", "v1.21.1", "abort", "2.6.4"].iter().all(|t| duration(t).is_none()));
    for (text, kept) in [
        ("1000m", "1"),
        ("0.5", "500m"),
        ("50m", "50m"),
        ("1024Mi", "1Gi"),
        ("512Mi", "512Mi"),
        ("64Mi", "64Mi"),
    ] {
        assert_eq!(quantity(text).as_deref(), Some(kept));
    }
}

const CHART: &str = "/apis/helm.cattle.io/v1/namespaces/kube-system/helmcharts/cert-manager";

/// What helm and the pods would bring to be.
pub(crate) fn charts_come_up(sandbox: &Sandbox) {
    let mut objects = sandbox.api.objects.lock().unwrap();
    let mut status = |path: String, status: Value| {
        let object = objects
            .entry(path)
            .or_insert_with(|| json!({"metadata": {"generation": 1}, "spec": {"replicas": 1}}));
        object["status"] = status;
    };
    for chart in ["cert-manager", "nginx-ingress", "traefik", "traefik-crd"] {
        let job = format!("helm-install-{chart}");
        status(
            format!("/apis/helm.cattle.io/v1/namespaces/kube-system/helmcharts/{chart}"),
            json!({"jobName": job}),
        );
        status(
            format!("/apis/batch/v1/namespaces/kube-system/jobs/{job}"),
            json!({"succeeded": 1}),
        );
    }
    for (namespace, name) in [
        ("cert-manager", "cert-manager"),
        ("cert-manager", "cert-manager-webhook"),
        ("nginx-ingress", "nginx-ingress-controller"),
    ] {
        let path = format!("/apis/apps/v1/namespaces/{namespace}/deployments/{name}");
        status(
            path,
            json!({"readyReplicas": 1, "updatedReplicas": 1, "availableReplicas": 1, "replicas": 1,
                "observedGeneration": 1}),
        );
    }
}

const ALL: &[&str] = &[
    "--components",
    "metrics,storage,cert-manager",
    "--acme-email",
    "ops@example.com",
    "--max-role",
    "admin",
];

/// Every kind of object that a plan applies is applied twice beside controllers that own what they
/// rewrite.
#[test]
fn a_second_run_beside_controllers_that_rewrite_what_they_read_changes_nothing() {
    let sandbox = Sandbox::new();
    sandbox.api.fields.lock().unwrap().controllers = true;
    charts_come_up(&sandbox);
    sandbox.install(ALL).ended(0);
    let kinds: std::collections::BTreeSet<String> = sandbox
        .api
        .objects
        .lock()
        .unwrap()
        .values()
        .filter_map(|o| o["kind"].as_str().map(str::to_owned))
        .collect();
    for kind in [
        "Namespace",
        "LimitRange",
        "ServiceAccount",
        "ClusterRole",
        "ClusterRoleBinding",
        "RoleBinding",
        "HelmChart",
        "ClusterIssuer",
        "Certificate",
    ] {
        assert!(kinds.contains(kind), "{kinds:?}");
    }
    let written = sandbox.api.writes.lock().unwrap().len();
    let again = sandbox.install(ALL).ended(0);
    assert!(again.out.contains("nothing to do"), "{}\n{}", again.out, again.err);
    assert_eq!(sandbox.api.writes.lock().unwrap().len(), written);
    assert!(
        sandbox.api.fields.lock().unwrap().owners.is_empty(),
        "no field is written in another form than its controller's"
    );
}

/// The chart of ingress waits for an answer on port 80 of this machine, so its objects are looked
/// at by themselves.
#[test]
fn every_object_is_written_in_the_form_in_which_it_is_kept() {
    let mut looked = 0;
    for component in pipeops::install::components::CATALOGUE {
        for yaml in
            [component.objects.to_owned(), (component.objects_when_ready)(Some("ops@example.com"))]
        {
            for object in pipeops::install::plan::documents(&yaml).unwrap() {
                let (mut fields, mut kept) =
                    (Fields { controllers: true, ..Fields::default() }, object.clone());
                fields.rewrite("", &mut kept);
                assert!(
                    fields.owners.is_empty(),
                    "{}: {:?}",
                    object["metadata"]["name"],
                    fields.owners
                );
                looked += 1;
            }
        }
    }
    assert!(looked >= 7, "{looked}");
}

/// An update over a version that wrote `5m`: the controller owns the field by then.
#[test]
fn a_chart_of_the_version_before_is_taken_up_again() {
    let sandbox = Sandbox::new();
    charts_come_up(&sandbox);
    sandbox.install(ALL).ended(0);
    Fields::set(&sandbox, CHART, "/spec/timeout", json!("5m0s"), "helm-controller@vm1");
    let again = sandbox.install(ALL).ended(0);
    assert!(again.out.contains("nothing to do"), "{}\n{}", again.out, again.err);
}

#[test]
fn what_somebody_else_set_is_told_in_words_and_left() {
    for (path, pointer, args, exit) in [
        (CHART, "/spec/version", ALL, 10),
        (CHART, "/spec/valuesContent", ALL, 10),
        (
            "/api/v1/namespaces/production",
            "/metadata/labels/pod-security.kubernetes.io~1enforce",
            &[][..],
            10,
        ),
    ] {
        let sandbox = Sandbox::new();
        charts_come_up(&sandbox);
        sandbox.install(args).ended(0);
        Fields::set(&sandbox, path, pointer, json!("privileged"), "kubectl-edit");
        // a look says it too, and does not end with an error
        let release = sandbox.path("release");
        let look = sandbox
            .run(&[&["install-server", "--offline-dir", &release, "--dry-run"], args].concat())
            .ended(0);
        assert!(
            look.err.contains("another manager has set fields: FIELD_CONFLICT"),
            "{}",
            look.err
        );
        let said = sandbox.install(args).ended(exit);
        let last = pointer.rsplit('/').next().unwrap().replace("~1", "/");
        for text in [
            "FIELD_CONFLICT",
            "belongs to \"kubectl-edit\"",
            last.split('/').next_back().unwrap(),
            "--show-managed-fields",
        ] {
            assert!(said.err.contains(text), "{text}: {}", said.err);
        }
        assert!(
            !said.err.contains("INTERNAL") && !said.err.contains("planted-value-of-a-field-8315"),
            "no value of a field: {}",
            said.err
        );
        assert_eq!(
            sandbox.api.objects.lock().unwrap()[path].pointer(pointer),
            Some(&json!("privileged"))
        );
    }
}
