//! The client of the Kubernetes API: objects by server-side apply, readiness, tokens.

use std::time::Duration;

use crate::kubernetes::readiness::pods;
use crate::kubernetes::readiness::workload::{self, WorkloadKind};
use crate::kubernetes::transport::Transport;
use anyhow::Context as _;
use http::{Method, Request};
use serde_json::{Value, json};
use tokio::time::{sleep, timeout};

use crate::base::connection::Body;
use crate::base::error::{Exit, Failure};
use crate::host::Host;

/// Field manager of everything that the installer applies.
pub const FIELD_MANAGER: &str = "pipeops";
/// Time for a request and its whole answer; watches have their own.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(20);
/// Waits before a request is repeated when the API server is busy or starting.
const RETRIES: [Duration; 3] =
    [Duration::from_millis(500), Duration::from_secs(1), Duration::from_secs(2)];

/// An API server, as one identity.
#[derive(Clone)]
pub struct Cluster {
    pub(super) client: kube::Client,
}

/// Kinds without a namespace among those that we use.
const CLUSTER_SCOPED: &[&str] = &[
    "Namespace",
    "ClusterRole",
    "ClusterRoleBinding",
    "ClusterIssuer",
    "Node",
    "StorageClass",
    "APIService",
    "IngressClass",
    "CustomResourceDefinition",
    "ValidatingAdmissionPolicy",
    "ValidatingAdmissionPolicyBinding",
];

/// URL path of an object. Every kind that we use has the plain English plural.
pub fn path_of(object: &Value) -> anyhow::Result<String> {
    let field = |value: &Value, name: &str| {
        value.as_str().map(str::to_owned).with_context(|| format!("an object without {name}"))
    };
    let (version, kind) =
        (field(&object["apiVersion"], "apiVersion")?, field(&object["kind"], "kind")?);
    let name = field(&object["metadata"]["name"], "metadata.name")?;
    let base =
        if version.contains('/') { format!("/apis/{version}") } else { format!("/api/{version}") };
    let lower = kind.to_lowercase();
    let plural = match (lower.strip_suffix("cy"), lower.ends_with("ss")) {
        (Some(stem), _) => format!("{stem}cies"),
        (None, true) => format!("{lower}es"),
        (None, false) => format!("{lower}s"),
    };
    if CLUSTER_SCOPED.contains(&kind.as_str()) {
        return Ok(format!("{base}/{plural}/{name}"));
    }
    let namespace = object["metadata"]["namespace"].as_str().unwrap_or("default");
    Ok(format!("{base}/namespaces/{namespace}/{plural}/{name}"))
}

/// `Kind name` or `Kind namespace/name`, for people.
pub fn title_of(object: &Value) -> String {
    let text = |v: &Value| v.as_str().unwrap_or("?").to_owned();
    let name = text(&object["metadata"]["name"]);
    match object["metadata"]["namespace"].as_str() {
        Some(namespace) => format!("{} {namespace}/{name}", text(&object["kind"])),
        None => format!("{} {name}", text(&object["kind"])),
    }
}

impl Cluster {
    /// # Errors
    /// When the file is absent or no kubeconfig.
    pub fn open(host: &Host, kubeconfig: &str) -> anyhow::Result<Cluster> {
        let transport = Transport::open(host, kubeconfig, 4)?;
        let service = tower::service_fn(move |request: Request<kube::client::Body>| {
            let transport = transport.clone();
            transport.send(request.map(Body::new))
        });
        Ok(Cluster { client: kube::Client::new(service, "default") })
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        content_type: &str,
        body: Vec<u8>,
    ) -> Result<Value, kube::Error> {
        let mut waits = RETRIES.iter();
        loop {
            let request = Request::builder()
                .method(method.clone())
                .uri(path)
                .header("Content-Type", content_type)
                .header("Accept", "application/json")
                .body(body.clone())
                .map_err(kube::Error::HttpError)?;
            let answer = match timeout(REQUEST_TIMEOUT, self.client.request::<Value>(request)).await
            {
                Ok(answer) => answer,
                Err(_) => Err(kube::Error::Service(
                    format!("no answer for {} s", REQUEST_TIMEOUT.as_secs()).into(),
                )),
            };
            match (&answer, waits.next()) {
                (Err(e), Some(wait)) if status(e).is_some_and(is_transient) => sleep(*wait).await,
                _ => return answer,
            }
        }
    }

    /// An object or list, `None` when it is not there.
    pub async fn get(&self, path: &str) -> Result<Option<Value>, kube::Error> {
        match self.send(Method::GET, path, "application/json", Vec::new()).await {
            Ok(value) => Ok(Some(value)),
            Err(e) if status(&e) == Some(404) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// The items of a list, empty when the kind is not there.
    pub async fn list(&self, path: &str) -> Result<Vec<Value>, kube::Error> {
        Ok(self
            .get(path)
            .await?
            .and_then(|mut v| v["items"].take().as_array().cloned())
            .unwrap_or_default())
    }

    /// Server-side apply without force: a field that another manager owns is a conflict.
    ///
    /// # Errors
    /// [`FIELD_CONFLICT`] as a [`Failure`] when another manager set a field to another value; else
    /// what the API server said.
    pub async fn apply(&self, object: &Value, dry: bool) -> anyhow::Result<Value> {
        let dry = if dry { "&dryRun=All" } else { "" };
        let path = format!("{}?fieldManager={FIELD_MANAGER}&force=false{dry}", path_of(object)?);
        let body = serde_json::to_vec(object)?;
        match self.send(Method::PATCH, &path, "application/apply-patch+yaml", body).await {
            Ok(applied) => Ok(applied),
            Err(e) => match field_conflicts(&e) {
                Some(owned) => Err(conflict_failure(object, &owned).into()),
                None => Err(e).with_context(|| format!("applying {}", title_of(object))),
            },
        }
    }

    pub async fn post(&self, path: &str, body: &Value) -> Result<Value, kube::Error> {
        self.send(Method::POST, path, "application/json", body.to_string().into_bytes()).await
    }

    /// Deletes. An object that is absent is no error.
    pub async fn delete(&self, path: &str) -> Result<(), kube::Error> {
        let body = json!({"propagationPolicy": "Background"}).to_string().into_bytes();
        match self.send(Method::DELETE, path, "application/json", body).await {
            Ok(_) => Ok(()),
            Err(e) if status(&e) == Some(404) => Ok(()),
            Err(e) => Err(e),
        }
    }

    /// Whether the object is as it would be applied: a dry run of the apply changes nothing. `None`
    /// when it is not there.
    pub async fn is_applied(&self, object: &Value) -> anyhow::Result<Option<bool>> {
        let Some(now) = self
            .get(&path_of(object)?)
            .await
            .with_context(|| format!("reading {}", title_of(object)))?
        else {
            return Ok(None);
        };
        let then = self.apply(object, true).await?;
        Ok(Some(without_server_fields(now) == without_server_fields(then)))
    }

    /// Why the pods with these labels do not run; `None` also when they cannot be read.
    pub async fn pods_problem(&self, namespace: &str, selector: &str) -> Option<String> {
        let selector: String = url::form_urlencoded::byte_serialize(selector.as_bytes()).collect();
        pods::problem(
            &self
                .list(&format!("/api/v1/namespaces/{namespace}/pods?labelSelector={selector}"))
                .await
                .ok()?,
        )
    }

    /// Why a workload does not serve, and which of its pods is the cause.
    pub async fn workload_problem(
        &self,
        kind: WorkloadKind,
        namespace: &str,
        object: &Value,
    ) -> Option<String> {
        let why = workload::problem(kind, object)?;
        let pods = match workload::selector(object) {
            Some(selector) => self.pods_problem(namespace, &selector).await,
            None => None,
        };
        Some(pods.map_or_else(|| why.clone(), |pods| format!("{why}: {pods}")))
    }

    /// Version of the API server, for example `v1.36.2+k3s1`.
    pub async fn version(&self) -> Result<String, kube::Error> {
        let value = self.get("/version").await?.unwrap_or_default();
        Ok(value["gitVersion"].as_str().unwrap_or_default().to_owned())
    }

    /// Whether the API server says that it is ready.
    pub async fn ready(&self) -> bool {
        let Ok(request) = Request::get("/readyz").body(Vec::new()) else { return false };
        self.client.request_text(request).await.is_ok_and(|text| text.trim() == "ok")
    }
}

/// Whether a status is likely to pass: an API server that is too busy, or one that starts or stops
/// behind a proxy.
pub fn is_transient(status: u16) -> bool {
    matches!(status, 429 | 502..=504)
}

/// HTTP status that the API server answered with.
pub fn status(error: &kube::Error) -> Option<u16> {
    match error {
        kube::Error::Api(status) => Some(status.code),
        _ => None,
    }
}

/// Code of the failure when another manager has set a field that we apply.
pub const FIELD_CONFLICT: &str = "FIELD_CONFLICT";

/// A field that another manager owns: its path and that manager.
#[derive(Clone, Debug, PartialEq, Eq)]
struct OwnedField {
    field: String,
    manager: String,
}

/// The fields of a refused apply (`FieldManagerConflict` in the causes of a Status, kubernetes.io
/// "Server-Side Apply").
fn field_conflicts(error: &kube::Error) -> Option<Vec<OwnedField>> {
    let kube::Error::Api(status) = error else { return None };
    let causes = status
        .details
        .iter()
        .flat_map(|d| &d.causes)
        .filter(|c| c.reason == "FieldManagerConflict");
    // conflict with "helm-controller@vm1" using helm.cattle.io/v1
    let manager = |message: &str| message.split('"').nth(1).unwrap_or("another manager").to_owned();
    let owned: Vec<OwnedField> = causes
        .map(|c| OwnedField { field: c.field.clone(), manager: manager(&c.message) })
        .collect();
    (status.code == 409 && !owned.is_empty()).then_some(owned)
}

/// A conflict as a failure: who owns which field, and what to do. Values are left out: a field may
/// hold a secret.
fn conflict_failure(object: &Value, owned: &[OwnedField]) -> Failure {
    let title = title_of(object);
    let mut failure = Failure::new(
        Exit::Partial,
        FIELD_CONFLICT,
        format!("{title}: another manager has set fields that pipeops sets"),
    );
    for OwnedField { field, manager } in owned {
        failure = failure.why(format!("{field} belongs to \"{manager}\" and has another value"));
    }
    let kind = object["kind"].as_str().unwrap_or_default().to_lowercase();
    let name = object["metadata"]["name"].as_str().unwrap_or_default();
    let namespace =
        object["metadata"]["namespace"].as_str().map(|n| format!(" -n {n}")).unwrap_or_default();
    failure.why("nothing of this object was changed").hint(format!(
        "see who set it: `kubectl{namespace} get {kind} {name} --show-managed-fields -o yaml`. \
         Set the field to the value in `pipeops install-server --dry-run --plan-out FILE` (or \
         remove it), then run the same command again"
    ))
}

/// An object without what the server records about writes.
fn without_server_fields(mut object: Value) -> Value {
    if let Some(meta) = object.get_mut("metadata").and_then(Value::as_object_mut) {
        for key in ["managedFields", "resourceVersion", "generation"] {
            meta.remove(key);
        }
    }
    object
}
