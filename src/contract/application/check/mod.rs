//! Whether an application can be what it says, before anything of it is written. What only a
//! cluster knows (a quota, an image, a class) is Kubernetes' to say.

use std::collections::{BTreeMap, BTreeSet};

use super::{Application, Host, Port, Probe, Resources, Strategy, Variable, Volume};
use crate::base::text::{is_dns_label, is_dns_name, is_label_key, is_label_value};

/// Ours are named after an application with a suffix, and its name is a label: 63 characters.
const MAX_NAME: usize = 52;
const MAX_VARIABLES: usize = 500;
const MAX_PORTS: usize = 50;
const MAX_VOLUMES: usize = 50;
const MAX_REPLICAS: u32 = 1000;
/// All of it as JSON: it is kept in a ConfigMap, which holds 1 MiB.
const MAX_SIZE: usize = 256 << 10;
/// Longest time that a field may name, seconds.
const MAX_SECONDS: u32 = 86_400;

/// A refusal names the field.
type Checked = Result<(), String>;

fn demand(holds: bool, field: &str, why: &str) -> Checked {
    if holds { Ok(()) } else { Err(format!("{field}: {why}")) }
}

/// Name of a variable, key of a Secret: what they have in common.
fn is_plain(text: &str) -> bool {
    text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
}

/// A quantity above zero, as Kubernetes reads one (apimachinery `pkg/api/resource/quantity.go`).
pub(crate) fn is_quantity(text: &str) -> bool {
    let digits = text.bytes().take_while(|b| b.is_ascii_digit() || *b == b'.').count();
    let (number, suffix) = text.split_at(digits);
    let known = matches!(
        suffix,
        "" | "n"
            | "u"
            | "m"
            | "k"
            | "M"
            | "G"
            | "T"
            | "P"
            | "E"
            | "Ki"
            | "Mi"
            | "Gi"
            | "Ti"
            | "Pi"
            | "Ei"
    );
    let exponent = suffix.strip_prefix(['e', 'E']).is_some_and(|e| e.parse::<i8>().is_ok());
    number.parse::<f64>().is_ok_and(|n| n > 0.0) && number != "." && (known || exponent)
}

fn seconds(value: Option<u32>, field: &str, least: u32) -> Checked {
    let fits = value.is_none_or(|s| (least..=MAX_SECONDS).contains(&s));
    demand(fits, field, &format!("{least} to {MAX_SECONDS} seconds"))
}

impl Application {
    /// # Errors
    /// The field, and what it may be.
    pub fn check(&self) -> Checked {
        let size = serde_json::to_string(self).map_or(usize::MAX, |text| text.len());
        demand(size <= MAX_SIZE, "application", "larger than 256 KiB")?;
        let name = is_dns_label(&self.name)
            && self.name.len() <= MAX_NAME
            && self.name.starts_with(|c: char| c.is_ascii_lowercase());
        demand(
            name,
            "name",
            &format!("1 to {MAX_NAME} of a-z, 0-9 and -, beginning with a letter"),
        )?;
        demand(is_dns_label(&self.namespace), "namespace", "1 to 63 of a-z, 0-9 and -")?;
        check_image(&self.image)?;
        demand(
            self.replicas.is_none_or(|n| n <= MAX_REPLICAS),
            "replicas",
            &format!("0 to {MAX_REPLICAS}"),
        )?;
        self.check_autoscaling()?;
        check_ports(&self.ports)?;
        self.check_environment()?;
        check_resources(&self.resources)?;
        for (name, probe) in self.probes.each() {
            check_probe(probe, name, &self.ports)?;
        }
        check_volumes(&self.volumes)?;
        let own = self.volumes.iter().any(|volume| volume.name.is_some());
        let several = self.autoscaling.is_some() || self.replicas.is_some_and(|n| n > 1);
        demand(
            !(own && several),
            "volumes",
            "one with name and size is for one pod alone: for more name a claim that all may write \
             to",
        )?;
        if let Some(host) = &self.host {
            check_host(host, &self.ports)?;
        }
        if let Some(strategy) = &self.strategy {
            check_strategy(strategy)?;
        }
        self.check_metadata()?;
        if let Some(job) = &self.pre_deploy {
            demand(!job.command.is_empty(), "pre_deploy.command", "what runs before the rollout")?;
            seconds(job.timeout_s, "pre_deploy.timeout_s", 1)?;
        }
        for secret in &self.image_pull_secrets {
            demand(is_dns_name(secret), "image_pull_secrets", "names of Secrets")?;
        }
        let account = self.service_account.as_deref();
        demand(account.is_none_or(is_dns_name), "service_account", "the name of a ServiceAccount")?;
        demand(
            self.security.user != Some(0) || self.security.allow_root,
            "security.user",
            "0 is root: it needs allow_root",
        )
    }

    /// For what runs and ends: fields that would have no effect are refused too.
    ///
    /// # Errors
    /// The field, and what it may be.
    pub fn check_for_job(&self) -> Checked {
        self.check()?;
        for (field, given) in [
            ("replicas", self.replicas.is_some()),
            ("autoscaling", self.autoscaling.is_some()),
            ("ports", !self.ports.is_empty()),
            ("probes", self.probes.each().next().is_some()),
            ("host", self.host.is_some()),
            ("strategy", self.strategy.is_some()),
            ("pre_deploy", self.pre_deploy.is_some()),
        ] {
            demand(!given, field, "a job has none")?;
        }
        let own = self.volumes.iter().any(|volume| volume.name.is_some());
        demand(!own, "volumes", "a job has no volume of its own: name a claim")
    }

    fn check_autoscaling(&self) -> Checked {
        let Some(scaling) = &self.autoscaling else { return Ok(()) };
        demand(self.replicas.is_none(), "replicas", "autoscaling decides on them: leave one out")?;
        let order = scaling.min_replicas >= 1
            && scaling.min_replicas <= scaling.max_replicas
            && scaling.max_replicas <= MAX_REPLICAS;
        demand(
            order,
            "autoscaling",
            &format!("min_replicas ≤ max_replicas, both 1 to {MAX_REPLICAS}"),
        )?;
        for (field, percent, resource) in [
            ("autoscaling.cpu_percent", scaling.cpu_percent, "cpu"),
            ("autoscaling.memory_percent", scaling.memory_percent, "memory"),
        ] {
            demand(percent.is_none_or(|p| (1..=1000).contains(&p)), field, "1 to 1000 percent")?;
            let by_default = resource == "cpu" && scaling.memory_percent.is_none();
            // the autoscaler divides by what is requested, and does nothing without
            let requested = self.resources.requests.contains_key(resource)
                || self.resources.limits.contains_key(resource);
            demand(
                requested || !(percent.is_some() || by_default),
                &format!("resources.requests.{resource}"),
                "autoscaling is a percentage of it: give it",
            )?;
        }
        Ok(())
    }

    fn check_environment(&self) -> Checked {
        let count = self.environment.len();
        demand(
            count <= MAX_VARIABLES,
            "environment",
            &format!("{count} variables, {MAX_VARIABLES} at most"),
        )?;
        for (name, variable) in &self.environment {
            let field = format!("environment.{name}");
            let valid = !name.is_empty()
                && is_plain(name)
                && !name.starts_with(|c: char| c.is_ascii_digit());
            demand(valid, &field, "a name is of letters, digits, _, - and .")?;
            match variable {
                Variable::Text(text) => demand(!text.contains('\0'), &field, "it holds a NUL")?,
                Variable::Secret { secret: name, key } | Variable::Config { config: name, key } => {
                    demand(is_dns_name(name), &field, "that is no name of a Secret or ConfigMap")?;
                    let key = !key.is_empty() && key.len() <= 253 && is_plain(key);
                    demand(key, &field, "that is no key of a Secret or ConfigMap")?;
                }
            }
        }
        for source in &self.environment_from {
            let (super::ConfigSource::Secret(name) | super::ConfigSource::Config(name)) = source;
            demand(is_dns_name(name), "environment_from", "names of Secrets and ConfigMaps")?;
        }
        Ok(())
    }

    fn check_metadata(&self) -> Checked {
        for (key, value) in &self.labels {
            let field = format!("labels.{key}");
            demand(is_label_key(key), &field, "that is no key of a label")?;
            demand(
                is_label_value(value),
                &field,
                "a value is of letters, digits, _, - and ., 63 at most",
            )?;
            demand(!is_ours(key), &field, "pipeops sets this one")?;
        }
        for key in self.annotations.keys() {
            let field = format!("annotations.{key}");
            demand(is_label_key(key), &field, "that is no key of an annotation")?;
            demand(!is_ours(key), &field, "pipeops sets this one")?;
        }
        Ok(())
    }
}

fn is_ours(key: &str) -> bool {
    matches!(key, "app" | "app.kubernetes.io/name" | "app.kubernetes.io/managed-by")
        || key.starts_with("pipeops.io/")
}

fn check_image(image: &str) -> Checked {
    demand(!image.is_empty(), "image", "REGISTRY/NAME:TAG or NAME@sha256:…")?;
    demand(!image.contains("://"), "image", "a name of an image has no scheme: leave it out")?;
    demand(
        is_image(image),
        "image",
        "that is no name of an image: [HOST[:PORT]/]name[:TAG], in lower case",
    )
}

/// By the grammar of distribution/reference: a host, components in lower case, tag, digest.
fn is_image(image: &str) -> bool {
    let (name, digest) = image.split_once('@').map_or((image, None), |(n, d)| (n, Some(d)));
    let digest = digest.is_none_or(|digest| {
        digest.strip_prefix("sha256:").is_some_and(|hex| {
            hex.len() == 64 && hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
        })
    });
    let (host, path) = match name.split_once('/') {
        Some((host, path)) if host.contains(['.', ':']) || host == "localhost" => {
            (Some(host), path)
        }
        _ => (None, name),
    };
    let (path, tag) = path.rsplit_once(':').map_or((path, None), |(path, tag)| (path, Some(tag)));
    let tag = tag.is_none_or(|tag| {
        (1..=128).contains(&tag.len()) && is_plain(tag) && !tag.starts_with(['.', '-'])
    });
    let host = host.is_none_or(|host| {
        host.bytes().all(|b| b.is_ascii_alphanumeric() || b".-:[]".contains(&b))
    });
    let edge = |b: Option<&u8>| b.is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
    let component = |part: &str| {
        let bytes = part.as_bytes();
        is_plain(part)
            && !part.bytes().any(|b| b.is_ascii_uppercase())
            && edge(bytes.first())
            && edge(bytes.last())
    };
    image.len() <= 512 && digest && tag && host && path.split('/').all(component)
}

fn check_ports(ports: &[Port]) -> Checked {
    demand(ports.len() <= MAX_PORTS, "ports", &format!("{MAX_PORTS} at most"))?;
    let (mut names, mut numbers, mut services) =
        (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
    for (n, port) in ports.iter().enumerate() {
        let field = format!("ports[{n}]");
        let service = port.service_port.unwrap_or(port.container_port);
        demand(port.container_port > 0 && service > 0, &field, "a port is 1 to 65535")?;
        if let Some(name) = &port.name {
            // RFC 6335 §5.1
            let valid = name.len() <= 15
                && is_dns_label(name)
                && !name.contains("--")
                && name.bytes().any(|b| b.is_ascii_lowercase());
            demand(valid, &format!("{field}.name"), "1 to 15 of a-z, 0-9 and -, with a letter")?;
            demand(names.insert(name), &format!("{field}.name"), "it is there twice")?;
        }
        let protocol = port.protocol.name();
        demand(numbers.insert((port.container_port, protocol)), &field, "it is there twice")?;
        demand(services.insert((service, protocol)), &field, "its service_port is there twice")?;
    }
    Ok(())
}

fn check_resources(resources: &Resources) -> Checked {
    let each = |of: &BTreeMap<String, String>, field: &str| {
        of.iter().try_for_each(|(name, quantity)| {
            let field = format!("resources.{field}.{name}");
            let known = matches!(name.as_str(), "cpu" | "memory" | "ephemeral-storage")
                || name.starts_with("hugepages-")
                || (name.contains('/') && is_label_key(name));
            demand(known, &field, "cpu, memory, ephemeral-storage or vendor/resource")?;
            demand(is_quantity(quantity), &field, "that is no quantity: 250m, 1, 128Mi, 1Gi")
        })
    };
    each(&resources.limits, "limits")?;
    each(&resources.requests, "requests")
}

fn check_probe(probe: &Probe, name: &str, ports: &[Port]) -> Checked {
    let field = format!("probes.{name}");
    let port = probe.port.or_else(|| ports.first().map(|p| p.container_port));
    match (probe.command.is_empty(), &probe.path) {
        (false, Some(_)) => return Err(format!("{field}: command or path, not both")),
        (false, None) => demand(probe.port.is_none(), &field, "command or port, not both")?,
        (true, _) => demand(port.is_some_and(|p| p > 0), &field, "it needs a port or a command")?,
    }
    if let Some(path) = &probe.path {
        demand(path.starts_with('/'), &format!("{field}.path"), "it begins with a slash")?;
    }
    seconds(probe.initial_delay_s, &format!("{field}.initial_delay_s"), 0)?;
    seconds(probe.period_s, &format!("{field}.period_s"), 1)?;
    seconds(probe.timeout_s, &format!("{field}.timeout_s"), 1)?;
    seconds(probe.failure_threshold, &format!("{field}.failure_threshold"), 1)
}

fn check_volumes(volumes: &[Volume]) -> Checked {
    demand(volumes.len() <= MAX_VOLUMES, "volumes", &format!("{MAX_VOLUMES} at most"))?;
    let (mut paths, mut names) = (BTreeSet::new(), BTreeSet::new());
    for (n, volume) in volumes.iter().enumerate() {
        let field = format!("volumes[{n}]");
        let path = &volume.mount_path;
        demand(
            path.starts_with('/') && path.len() > 1 && !path.contains([':', '\0']),
            &format!("{field}.mount_path"),
            "an absolute path without a colon",
        )?;
        demand(paths.insert(path), &format!("{field}.mount_path"), "it is there twice")?;
        let sources = [
            volume.name.is_some(),
            volume.claim.is_some(),
            volume.secret.is_some(),
            volume.config.is_some(),
            volume.empty,
        ];
        demand(
            sources.iter().filter(|s| **s).count() == 1,
            &field,
            "one of name (with size), claim, secret, config or empty",
        )?;
        demand(
            volume.name.is_some() == volume.size.is_some(),
            &field,
            "name and size go together",
        )?;
        if let (Some(name), Some(size)) = (&volume.name, &volume.size) {
            demand(is_dns_label(name), &field, "name: 1 to 63 of a-z, 0-9 and -")?;
            demand(names.insert(name), &field, "name: it is there twice")?;
            demand(is_quantity(size), &field, "size: that is no quantity: 1Gi")?;
        }
        demand(
            volume.storage_class.is_none() || volume.name.is_some(),
            &field,
            "storage_class is of a claim with name and size",
        )?;
        for name in [&volume.claim, &volume.secret, &volume.config, &volume.storage_class] {
            demand(
                name.as_deref().is_none_or(is_dns_name),
                &field,
                "that is no name of an object",
            )?;
        }
    }
    Ok(())
}

fn check_host(host: &Host, ports: &[Port]) -> Checked {
    let name = host.name.strip_prefix("*.").unwrap_or(&host.name);
    demand(
        is_dns_name(name) && name.contains('.'),
        "host.name",
        "a name of DNS in lower case, with a dot: shop.example.com",
    )?;
    let path = host.path.as_deref();
    demand(
        path.is_none_or(|p| p.starts_with('/') && p.bytes().all(|b| b.is_ascii_graphic())),
        "host.path",
        "it begins with a slash",
    )?;
    demand(!ports.is_empty(), "host", "a host needs one of `ports`")?;
    let known = host.port.is_none_or(|port| ports.iter().any(|p| p.container_port == port));
    demand(known, "host.port", "none of `ports` has it")?;
    let of_ingress = host.issuer.is_some() || host.certificate.is_some() || host.class.is_some();
    match host.gateway.as_deref().map(|g| g.split_once('/')) {
        None => {}
        Some(Some((namespace, name))) if is_dns_label(namespace) && is_dns_name(name) => {
            demand(
                !of_ingress,
                "host.gateway",
                "class, issuer and certificate are the Gateway's own",
            )?;
        }
        Some(_) => return Err("host.gateway: NAMESPACE/NAME of a Gateway".into()),
    }
    let one = host.issuer.is_none() || host.certificate.is_none();
    demand(one, "host", "issuer or certificate, not both")?;
    let tls = host.has_tls() || (host.issuer.is_none() && host.certificate.is_none());
    demand(tls, "host.tls", "without it there is no issuer and no certificate")?;
    for (field, name) in [
        ("host.issuer", &host.issuer),
        ("host.certificate", &host.certificate),
        ("host.class", &host.class),
    ] {
        demand(name.as_deref().is_none_or(is_dns_name), field, "that is no name of an object")?;
    }
    Ok(())
}

fn check_strategy(strategy: &Strategy) -> Checked {
    let parts = [
        ("strategy.max_surge", &strategy.max_surge),
        ("strategy.max_unavailable", &strategy.max_unavailable),
    ];
    for (field, value) in parts {
        let Some(value) = value else { continue };
        demand(!strategy.recreate, field, "with recreate all pods are replaced at once")?;
        let percent = value.as_str().and_then(|p| p.strip_suffix('%')).map(str::parse::<u16>);
        let number = value.as_u64().is_some_and(|n| n <= u64::from(MAX_REPLICAS));
        let valid = number || matches!(percent, Some(Ok(0..=100)));
        demand(valid, field, "a number, or a percentage: \"25%\"")?;
    }
    let none = |value: &Option<serde_json::Value>| {
        value.as_ref().is_some_and(|v| v == 0 || v.as_str().is_some_and(|t| t == "0%"))
    };
    demand(
        !(none(&strategy.max_surge) && none(&strategy.max_unavailable)),
        "strategy",
        "with max_surge and max_unavailable 0 no pod can be replaced",
    )?;
    seconds(strategy.min_ready_s, "strategy.min_ready_s", 0)?;
    seconds(strategy.progress_deadline_s, "strategy.progress_deadline_s", 1)?;
    let (ready, deadline) =
        (strategy.min_ready_s.unwrap_or(0), strategy.progress_deadline_s.unwrap_or(600));
    demand(ready < deadline, "strategy.min_ready_s", "less than progress_deadline_s")
}

#[cfg(test)]
mod tests;
