//! The objects that an application consists of in Kubernetes. Pure: nothing is requested here.

pub mod ownership;
mod pod;
pub mod revision;
mod route;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::contract::application::{Application, Autoscaling, ConfigSource, Volume};
pub use pod::job_template;
pub use route::HostDefaults;

/// Config sets that pipeops versions: for each key the object that holds it now. A Secret or
/// ConfigMap that is not among them is meant by its own name.
pub type ConfigSets = BTreeMap<ConfigSource, BTreeMap<String, String>>;

/// Former ReplicaSets that Kubernetes keeps, as many as it has by itself.
const REVISION_HISTORY: u32 = 10;
/// Without a readiness probe a container is ready once it runs: one that ends at once would count.
const MIN_READY_S: u32 = 5;

/// The object that holds a key.
fn object_of(sets: &ConfigSets, source: &ConfigSource, key: &str) -> String {
    let (ConfigSource::Secret(name) | ConfigSource::Config(name)) = source;
    sets.get(source).and_then(|keys| keys.get(key)).unwrap_or(name).clone()
}

/// The Secrets and ConfigMaps that an application names, each with the keys that it needs; a whole
/// one is asked for without a key.
pub fn sources(application: &Application) -> BTreeMap<ConfigSource, Vec<String>> {
    use crate::contract::application::Variable;
    let mut all: BTreeMap<ConfigSource, Vec<String>> = BTreeMap::new();
    let whole = |volume: &Volume| {
        let secret = volume.secret.clone().map(ConfigSource::Secret);
        secret.or_else(|| volume.config.clone().map(ConfigSource::Config))
    };
    let pull = application.image_pull_secrets.iter().cloned().map(ConfigSource::Secret);
    let certificate = application.host.iter().filter_map(|host| host.certificate.clone());
    for source in application
        .environment_from
        .iter()
        .cloned()
        .chain(application.volumes.iter().filter_map(whole))
        .chain(pull)
        .chain(certificate.map(ConfigSource::Secret))
    {
        all.entry(source).or_default();
    }
    for variable in application.environment.values() {
        let (source, key) = match variable {
            Variable::Text(_) => continue,
            Variable::Secret { secret, key } => (ConfigSource::Secret(secret.clone()), key),
            Variable::Config { config, key } => (ConfigSource::Config(config.clone()), key),
        };
        all.entry(source).or_default().push(key.clone());
    }
    all
}

fn labels(application: &Application) -> Value {
    let mut labels = json!(application.labels);
    // `app` is what the first PipeOps agent selected by: its Deployments are taken over
    for (key, value) in [
        ("app", application.name.as_str()),
        ("app.kubernetes.io/name", &application.name),
        ("app.kubernetes.io/managed-by", "pipeops"),
        (revision::APPLICATION_LABEL, &application.name),
    ] {
        labels[key] = value.into();
    }
    labels
}

fn metadata(application: &Application) -> Value {
    json!({
        "name": application.name, "namespace": application.namespace, "labels": labels(application)
    })
}

/// All objects of an application, in the order in which they are applied.
pub fn objects(
    application: &Application,
    sets: &ConfigSets,
    defaults: &HostDefaults,
) -> Vec<Value> {
    let mut all: Vec<Value> = claims(application).collect();
    all.extend(route::service(application));
    all.push(deployment(application, sets));
    all.extend(application.autoscaling.as_ref().map(|scaling| autoscaler(application, scaling)));
    let pods = application.autoscaling.as_ref().map(|scaling| scaling.min_replicas);
    if pods.or(application.replicas).is_some_and(|pods| pods > 1) {
        all.push(disruption_budget(application));
    }
    all.extend(route::way_in(application, sets, defaults));
    all
}

fn claims(application: &Application) -> impl Iterator<Item = Value> {
    application.volumes.iter().filter_map(|volume| {
        let mut metadata = metadata(application);
        metadata["name"] = pod::claim_name(application, volume.name.as_ref()?).into();
        let mut spec = json!({
            "accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": volume.size}}
        });
        if let Some(class) = &volume.storage_class {
            spec["storageClassName"] = class.as_str().into();
        }
        Some(json!({
            "apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": metadata, "spec": spec
        }))
    })
}

fn deployment(application: &Application, sets: &ConfigSets) -> Value {
    let strategy = application.strategy.clone().unwrap_or_default();
    let rolls = strategy.max_surge.is_some() || strategy.max_unavailable.is_some();
    // two pods on one volume would both write to it
    let owns_volume = application.volumes.iter().any(|volume| volume.name.is_some());
    let mut spec = json!({
        "selector": {"matchLabels": {"app": application.name}},
        "revisionHistoryLimit": REVISION_HISTORY,
        "template": pod::template(application, &labels(application), sets)
    });
    if let Some(replicas) = application.replicas {
        spec["replicas"] = replicas.into();
    }
    spec["strategy"] = if strategy.recreate || (owns_volume && !rolls) {
        json!({"type": "Recreate"})
    } else {
        // Kubernetes' own defaults, written down: they can be changed later only if they are ours
        let quarter = || Value::from("25%");
        json!({"type": "RollingUpdate", "rollingUpdate": {
            "maxSurge": strategy.max_surge.unwrap_or_else(quarter),
            "maxUnavailable": strategy.max_unavailable.unwrap_or_else(quarter)
        }})
    };
    let unproven = application.probes.readiness.is_none().then_some(MIN_READY_S);
    if let Some(seconds) = strategy.min_ready_s.or(unproven) {
        spec["minReadySeconds"] = seconds.into();
    }
    if let Some(seconds) = strategy.progress_deadline_s {
        spec["progressDeadlineSeconds"] = seconds.into();
    }
    json!({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": metadata(application),
        "spec": spec
    })
}

fn autoscaler(application: &Application, scaling: &Autoscaling) -> Value {
    let memory = scaling.memory_percent;
    let cpu = scaling.cpu_percent.or(if memory.is_none() { Some(80) } else { None });
    let metrics = [("cpu", cpu), ("memory", memory)].into_iter().filter_map(|(name, percent)| {
        Some(json!({"type": "Resource", "resource": {
            "name": name, "target": {"type": "Utilization", "averageUtilization": percent?}
        }}))
    });
    json!({
        "apiVersion": "autoscaling/v2", "kind": "HorizontalPodAutoscaler",
        "metadata": metadata(application),
        "spec": {
            "scaleTargetRef": {
                "apiVersion": "apps/v1", "kind": "Deployment", "name": application.name
            },
            "minReplicas": scaling.min_replicas, "maxReplicas": scaling.max_replicas,
            "metrics": metrics.collect::<Vec<Value>>()
        }
    })
}

/// A node that is drained takes one pod at a time; pods that do not run hold nobody up.
fn disruption_budget(application: &Application) -> Value {
    json!({
        "apiVersion": "policy/v1", "kind": "PodDisruptionBudget",
        "metadata": metadata(application),
        "spec": {
            "maxUnavailable": 1, "unhealthyPodEvictionPolicy": "AlwaysAllow",
            "selector": {"matchLabels": {"app": application.name}}
        }
    })
}
