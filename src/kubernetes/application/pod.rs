//! The pods of an application: its container with what it needs, as `restricted` Pod Security wants
//! it unless the application says otherwise.

use serde_json::{Map, Value, json};

use super::route::port_name;
use super::{ConfigSets, object_of};
use crate::contract::application::{Application, ConfigSource, Probe, Variable, Volume};

/// Key of a Secret with a registry's credentials.
const PULL_KEY: &str = ".dockerconfigjson";

/// The template of the pods that serve.
pub(super) fn template(application: &Application, labels: &Value, sets: &ConfigSets) -> Value {
    let mut spec = spec(application, sets);
    let container = &mut spec["containers"][0];
    if !application.ports.is_empty() {
        let ports = application.ports.iter().map(|port| {
            json!({
                "name": port_name(port), "containerPort": port.container_port,
                "protocol": port.protocol.name()
            })
        });
        container["ports"] = ports.collect();
    }
    for (name, wanted) in application.probes.each() {
        container[format!("{name}Probe")] = probe(wanted, application);
    }
    let mut metadata = json!({"labels": labels});
    if !application.annotations.is_empty() {
        metadata["annotations"] = json!(application.annotations);
    }
    json!({"metadata": metadata, "spec": spec})
}

/// The template of a pod that carries out one command of the application.
pub fn job_template(
    application: &Application,
    labels: &Value,
    sets: &ConfigSets,
    command: &[String],
    args: &[String],
) -> Value {
    let mut spec = spec(application, sets);
    spec["restartPolicy"] = "Never".into();
    let container = &mut spec["containers"][0];
    for (field, given) in [("command", command), ("args", args)] {
        // a command of its own does not get the arguments of the application's
        if !given.is_empty() {
            container[field] = json!(given);
        } else if !command.is_empty()
            && let Some(container) = container.as_object_mut()
        {
            container.remove(field);
        }
    }
    json!({"metadata": {"labels": labels}, "spec": spec})
}

fn spec(application: &Application, sets: &ConfigSets) -> Value {
    let security = &application.security;
    let mut pod_security = json!({"seccompProfile": {"type": "RuntimeDefault"}});
    if !security.allow_root {
        pod_security["runAsNonRoot"] = true.into();
    }
    if let Some(user) = security.user {
        pod_security["runAsUser"] = user.into();
        // or a fresh volume belongs to root, and the application can't write to it
        pod_security["fsGroup"] = user.into();
    }
    let mut spec = json!({
        "enableServiceLinks": false,
        "automountServiceAccountToken": application.service_account.is_some(),
        "securityContext": pod_security,
        "containers": [container(application, sets)]
    });
    if let Some(account) = &application.service_account {
        spec["serviceAccountName"] = account.as_str().into();
    }
    if !application.image_pull_secrets.is_empty() {
        let secrets = application.image_pull_secrets.iter().map(
            |name| json!({"name": object_of(sets, &ConfigSource::Secret(name.clone()), PULL_KEY)}),
        );
        spec["imagePullSecrets"] = secrets.collect();
    }
    if !application.volumes.is_empty() {
        let volumes = application.volumes.iter().enumerate();
        spec["volumes"] = volumes.map(|(n, volume)| source(application, n, volume, sets)).collect();
    }
    spec
}

/// As Kubernetes decides once, when an object is made; it does not when the image changes later.
fn pull_policy(image: &str) -> &'static str {
    let name = image.rsplit('/').next().unwrap_or(image);
    let moves = !name.contains([':', '@']) || name.ends_with(":latest");
    if moves { "Always" } else { "IfNotPresent" }
}

fn container(application: &Application, sets: &ConfigSets) -> Value {
    let security = &application.security;
    let mut context = json!({"allowPrivilegeEscalation": false});
    // root needs some of them; NET_RAW is for packets under the address of another pod
    let dropped = if security.allow_root { "NET_RAW" } else { "ALL" };
    context["capabilities"] = json!({"drop": [dropped]});
    if security.read_only_root {
        context["readOnlyRootFilesystem"] = true.into();
    }
    let mut container = json!({
        "name": application.name, "image": application.image,
        "imagePullPolicy": pull_policy(&application.image), "securityContext": context
    });
    for (field, words) in [("command", &application.command), ("args", &application.args)] {
        if !words.is_empty() {
            container[field] = json!(words);
        }
    }
    let (from, mut env) = environment_from(application, sets);
    env.extend(application.environment.iter().map(|(name, variable)| {
        let reference = |field: &str, source: ConfigSource, key: &str| {
            json!({"name": name, "valueFrom": {field: {
                "name": object_of(sets, &source, key), "key": key
            }}})
        };
        match variable {
            Variable::Text(text) => json!({"name": name, "value": text}),
            Variable::Secret { secret, key } => {
                reference("secretKeyRef", ConfigSource::Secret(secret.clone()), key)
            }
            Variable::Config { config, key } => {
                reference("configMapKeyRef", ConfigSource::Config(config.clone()), key)
            }
        }
    }));
    for (field, values) in [("envFrom", from), ("env", env)] {
        if !values.is_empty() {
            container[field] = values.into();
        }
    }
    if !application.resources.is_empty() {
        container["resources"] = json!(application.resources);
    }
    if !application.volumes.is_empty() {
        let mounts = application.volumes.iter().enumerate().map(|(n, volume)| {
            let mut mount = json!({"name": volume_name(n, volume), "mountPath": volume.mount_path});
            if volume.read_only {
                mount["readOnly"] = true.into();
            }
            mount
        });
        container["volumeMounts"] = mounts.collect();
    }
    container
}

/// Whole objects by reference, config sets key by key, as each key has an object of its own.
fn environment_from(application: &Application, sets: &ConfigSets) -> (Vec<Value>, Vec<Value>) {
    let (mut from, mut env) = (Vec::new(), Vec::new());
    for source in &application.environment_from {
        let (whole, one, name) = match source {
            ConfigSource::Secret(name) => ("secretRef", "secretKeyRef", name),
            ConfigSource::Config(name) => ("configMapRef", "configMapKeyRef", name),
        };
        let Some(keys) = sets.get(source) else {
            from.push(json!({whole: {"name": name}}));
            continue;
        };
        for (key, object) in keys {
            // what the application says itself counts, as with envFrom
            if !application.environment.contains_key(key) {
                env.retain(|other: &Value| other["name"] != key.as_str());
                env.push(json!({"name": key, "valueFrom": {one: {"name": object, "key": key}}}));
            }
        }
    }
    (from, env)
}

fn volume_name(n: usize, volume: &Volume) -> String {
    volume.name.clone().unwrap_or_else(|| format!("volume-{n}"))
}

/// Name of the claim that a volume with a size has.
pub(super) fn claim_name(application: &Application, volume: &str) -> String {
    // with a dot: no name of another application and its volume makes the same
    format!("{}.{volume}", application.name)
}

fn source(application: &Application, n: usize, volume: &Volume, sets: &ConfigSets) -> Value {
    let mut ours = json!({"name": volume_name(n, volume)});
    let config = |source: ConfigSource, field: &str, name_field: &str, name: &str| {
        let Some(keys) = sets.get(&source) else { return json!({name_field: name}) };
        // one object after the other, each with its keys
        let mut objects: Vec<(&String, Vec<Value>)> = Vec::new();
        for (key, object) in keys {
            let item = json!({"key": key, "path": key});
            match objects.iter_mut().find(|(known, _)| *known == object) {
                Some((_, items)) => items.push(item),
                None => objects.push((object, vec![item])),
            }
        }
        let sources =
            objects.iter().map(|(object, items)| json!({field: {"name": object, "items": items}}));
        json!({"sources": sources.collect::<Vec<Value>>()})
    };
    let (field, value) = if let Some(name) = &volume.name {
        let claim = claim_name(application, name);
        ("persistentVolumeClaim", json!({"claimName": claim}))
    } else if let Some(claim) = &volume.claim {
        ("persistentVolumeClaim", json!({"claimName": claim}))
    } else if let Some(name) = &volume.secret {
        ("secret", config(ConfigSource::Secret(name.clone()), "secret", "secretName", name))
    } else if let Some(name) = &volume.config {
        ("configMap", config(ConfigSource::Config(name.clone()), "configMap", "name", name))
    } else {
        ("emptyDir", json!({}))
    };
    let field = if value["sources"].is_array() { "projected" } else { field };
    ours[field] = value;
    ours
}

fn probe(wanted: &Probe, application: &Application) -> Value {
    let port = wanted.port.or_else(|| application.ports.first().map(|p| p.container_port));
    let mut ours = Map::new();
    match (&wanted.path, wanted.command.is_empty()) {
        (_, false) => ours.insert("exec".into(), json!({"command": wanted.command})),
        (Some(path), _) => ours.insert("httpGet".into(), json!({"path": path, "port": port})),
        (None, _) => ours.insert("tcpSocket".into(), json!({"port": port})),
    };
    for (field, seconds) in [
        ("initialDelaySeconds", wanted.initial_delay_s),
        ("periodSeconds", wanted.period_s),
        ("timeoutSeconds", wanted.timeout_s),
        ("failureThreshold", wanted.failure_threshold),
    ] {
        if let Some(seconds) = seconds {
            ours.insert(field.into(), seconds.into());
        }
    }
    ours.into()
}
