//! An application, as people and Runners describe it. The names follow those of `DeploymentRequest`
//! of the first PipeOps agent where it had them (`container_port`, `environment`, `resources`).

mod check;
pub mod requests;

use std::collections::BTreeMap;

use serde::de::{Deserializer, Error as _};
use serde::{Deserialize, Serialize};
use serde_json::Value;

pub(crate) use check::is_quantity;

/// What runs: one container image in any number of pods, what it needs, and how it is reached.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Application {
    /// 1 to 52 characters of `a-z0-9-`, beginning with a letter: its objects are named after it.
    pub name: String,
    pub namespace: String,
    pub image: String,
    /// Pods. Where it is not given, 1 at first and then what `scale` made of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub replicas: Option<u32>,
    /// In place of `replicas`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub autoscaling: Option<Autoscaling>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<Port>,
    /// In place of the image's own entry point.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub command: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub args: Vec<String>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub environment: BTreeMap<String, Variable>,
    /// All keys of each become variables.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub environment_from: Vec<ConfigSource>,
    #[serde(skip_serializing_if = "Resources::is_empty")]
    pub resources: Resources,
    #[serde(skip_serializing_if = "Probes::is_empty")]
    pub probes: Probes,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub volumes: Vec<Volume>,
    /// How it is reached from outside of the cluster.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host: Option<Host>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub strategy: Option<Strategy>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
    /// A command that ends well in a pod of the new revision before any of its pods serve: a
    /// migration of a database.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pre_deploy: Option<PreDeploy>,
    /// Secrets with the credentials of registries.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub image_pull_secrets: Vec<String>,
    /// Without one its pods have no token for the Kubernetes API.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub service_account: Option<String>,
    #[serde(skip_serializing_if = "Security::is_default")]
    pub security: Security,
}

/// Pods by the work that they have.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Autoscaling {
    pub min_replicas: u32,
    pub max_replicas: u32,
    /// Mean use of the CPU that is requested, percent; 80 where nothing is given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_percent: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_percent: Option<u32>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub enum Protocol {
    #[default]
    #[serde(rename = "TCP")]
    Tcp,
    #[serde(rename = "UDP")]
    Udp,
    #[serde(rename = "SCTP")]
    Sctp,
}

impl Protocol {
    pub fn name(self) -> &'static str {
        match self {
            Protocol::Tcp => "TCP",
            Protocol::Udp => "UDP",
            Protocol::Sctp => "SCTP",
        }
    }
}

/// A port that the container listens on, and that a Service passes on.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Port {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    pub container_port: u16,
    /// The Service's own; `container_port` where it is not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service_port: Option<u16>,
    #[serde(default)]
    pub protocol: Protocol,
}

/// A Secret or a ConfigMap, by its name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize, Serialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum ConfigSource {
    Secret(String),
    Config(String),
}

/// Value of an environment variable: `"text"`, `{"secret": NAME, "key": KEY}` or
/// `{"config": NAME, "key": KEY}`.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Variable {
    Text(String),
    Secret { secret: String, key: String },
    Config { config: String, key: String },
}

impl<'de> Deserialize<'de> for Variable {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Variable, D::Error> {
        let value = Value::deserialize(from)?;
        let field = |name: &str| value[name].as_str().map(str::to_owned);
        let fields = value.as_object().map_or(0, serde_json::Map::len);
        match (&value, field("secret"), field("config"), field("key"), fields) {
            (Value::String(text), ..) => Ok(Variable::Text(text.clone())),
            (Value::Number(number), ..) if number.is_f64() => Err(D::Error::custom(
                "a number with a point or an exponent would become another text, as 1.20 becomes \
                 1.2: write it in quotes",
            )),
            // as people write them in TOML; Kubernetes knows text alone
            (Value::Number(_) | Value::Bool(_), ..) => Ok(Variable::Text(value.to_string())),
            (_, Some(secret), None, Some(key), 2) => Ok(Variable::Secret { secret, key }),
            (_, None, Some(config), Some(key), 2) => Ok(Variable::Config { config, key }),
            _ => Err(D::Error::custom(
                // no quotes: what stands in them is left out where a file may hold secrets
                "a variable is text, {secret = NAME, key = KEY} or {config = NAME, key = KEY}",
            )),
        }
    }
}

/// Quantities as Kubernetes writes them: `{"cpu": "250m", "memory": "128Mi"}`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Resources {
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub limits: BTreeMap<String, String>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub requests: BTreeMap<String, String>,
}

impl Resources {
    pub fn is_empty(&self) -> bool {
        self.limits.is_empty() && self.requests.is_empty()
    }
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Probes {
    /// Until it succeeds the others are not made.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub startup: Option<Probe>,
    /// While it fails the pod gets no requests.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub readiness: Option<Probe>,
    /// When it fails the container is restarted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub liveness: Option<Probe>,
}

impl Probes {
    fn is_empty(&self) -> bool {
        *self == Probes::default()
    }

    /// Each with its name on the wire.
    pub fn each(&self) -> impl Iterator<Item = (&'static str, &Probe)> {
        let all = [
            ("startup", &self.startup),
            ("readiness", &self.readiness),
            ("liveness", &self.liveness),
        ];
        all.into_iter().filter_map(|(name, probe)| probe.as_ref().map(|probe| (name, probe)))
    }
}

/// One of `path` (an HTTP GET on `port`), `command`, or `port` alone (a TCP connection). Times in
/// seconds; what is not given is as Kubernetes has it.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Probe {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub command: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub initial_delay_s: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub period_s: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeout_s: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failure_threshold: Option<u32>,
}

/// Files at `mount_path`, of exactly one source.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Volume {
    pub mount_path: String,
    /// A claim of the application's own, named after it and this; it outlives the application.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Of that claim: `"1Gi"`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size: Option<String>,
    /// Of that claim; the cluster's default where it is not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub storage_class: Option<String>,
    /// A PersistentVolumeClaim that is there already.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub claim: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub secret: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub config: Option<String>,
    /// An empty directory that ends with the pod.
    pub empty: bool,
    pub read_only: bool,
}

/// A name that the world reaches it under.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Host {
    pub name: String,
    /// Requests below this path; `/` where it is not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// Which of `ports`, by its `container_port`; the first where it is not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// Whether it is served over HTTPS; yes where it is not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls: Option<bool>,
    /// cert-manager's ClusterIssuer that signs its certificate.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub issuer: Option<String>,
    /// A Secret with the certificate, in place of `issuer`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub certificate: Option<String>,
    /// IngressClass; the cluster's default where it is not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub class: Option<String>,
    /// A Gateway, `NAMESPACE/NAME`: an HTTPRoute is made in place of an Ingress. Its certificate is
    /// the Gateway's own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gateway: Option<String>,
}

impl Host {
    pub fn has_tls(&self) -> bool {
        self.tls.unwrap_or(true)
    }
}

/// How pods are replaced.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Strategy {
    /// All former pods end before the first new one begins: for what must not run twice.
    pub recreate: bool,
    /// A number or a percentage, as Kubernetes has it: `1`, `"25%"`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_surge: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_unavailable: Option<Value>,
    /// A new pod counts once it has been ready for so long, seconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_ready_s: Option<u32>,
    /// Time without progress until the rollout has failed, seconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub progress_deadline_s: Option<u32>,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct PreDeploy {
    pub command: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub args: Vec<String>,
    /// Longest time, seconds; what the operation has where it is not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeout_s: Option<u32>,
}

/// What the image needs beyond Kubernetes' `restricted` Pod Security, which is the default.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Security {
    /// The image runs as root: `baseline` is what it fits.
    pub allow_root: bool,
    /// Number of the user that it runs as, for an image whose own user is a name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user: Option<u32>,
    pub read_only_root: bool,
}

impl Security {
    fn is_default(&self) -> bool {
        *self == Security::default()
    }
}
