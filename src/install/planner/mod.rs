//! From facts and settings to the plan of a server or a worker: one screen each, read top to
//! bottom.

pub mod config;

use crate::base::cidr::host_in_url;
use crate::host::fetch::Artifact;
use crate::host::paths::{
    AGENT_CONFIG, AGENT_TOKEN, AGENT_USER, DROP_IN, FIREWALL, FIREWALL_TABLE, JOIN_TOKEN, PIPEOPS,
};
use crate::install::components::{self, Component};
use crate::install::effective_settings::EffectiveSettings;
use crate::install::facts::Facts;
use crate::install::network;
use crate::install::plan::{
    FileContent, Plan, Resource, SCHEMA, SecretName, Step, WaitCondition, step_id,
};
use crate::install::planner::config::JoinServer;
use crate::install::settings::Settings;
use crate::k3s::paths::{ADMIN_KUBECONFIG, BINARY, KUBELET_KUBECONFIG, NODE_PASSWORD, REGISTRIES};
use crate::k3s::role::NodeRole;
use crate::k3s::version::Version;
use crate::kubernetes::tenant;

const UNITS: &str = "/etc/systemd/system";

/// What the plan needs to know beyond facts and settings: what was resolved over the network or
/// from a directory.
pub struct Release {
    pub version: Version,
    pub binary: Artifact,
    pub images: Vec<Artifact>,
}

fn step(id: &str, title: impl Into<String>, why: &str, want: Resource) -> Step {
    Step { id: id.into(), title: title.into(), why: why.into(), want, optional: false }
}

fn text(path: &str, content: impl Into<String>, mode: u32) -> Resource {
    Resource::File {
        path: path.into(),
        content: FileContent::Text(content.into()),
        mode,
        group: None,
    }
}

fn secret(path: &str, name: SecretName) -> Resource {
    Resource::File {
        path: path.into(),
        content: FileContent::Secret(name),
        mode: 0o600,
        group: None,
    }
}

fn dir(path: &str, mode: u32) -> Resource {
    Resource::Dir { path: path.into(), mode }
}

/// Steps that put k3s on the machine, in either role.
fn base(facts: &Facts, settings: &Settings, release: &Release, drop_in: String) -> Vec<Step> {
    let mut steps = directories(settings.role);
    steps.extend(k3s_files(settings, release, drop_in));
    steps.extend(k3s_service(facts, settings));
    steps
}

/// What stands on the machine before k3s comes: directories, this program, and a worker's secrets.
fn directories(role: NodeRole) -> Vec<Step> {
    let worker = role == NodeRole::Worker;
    let mut steps = Vec::new();
    if worker {
        // First of all: the server has tied our name to this password already, so it must survive
        // an aborted join.
        steps.push(step(
            "node-password",
            "keep the node password",
            "it ties the node's name to this machine",
            secret(NODE_PASSWORD, SecretName::NodePassword),
        ));
    }
    steps.extend([
        step(
            "dir-etc",
            "create /etc/pipeops",
            "configuration of pipeops",
            dir("/etc/pipeops", 0o755),
        ),
        step(
            "program",
            "install pipeops",
            "the agent and later runs",
            Resource::Program { path: PIPEOPS.into() },
        ),
        step(
            "dir-k3s",
            "create /etc/rancher/k3s",
            "k3s reads its settings there",
            dir("/etc/rancher/k3s", 0o755),
        ),
        step(
            "dir-drop-in",
            "create config.yaml.d",
            "k3s reads its settings there",
            dir("/etc/rancher/k3s/config.yaml.d", 0o700),
        ),
    ]);
    if worker {
        steps.push(step(
            "token",
            "write the join token",
            "k3s reads it from a file, so that it is in no argv",
            secret(JOIN_TOKEN, SecretName::K3sToken),
        ));
    }
    steps.push(step(
        "node-state",
        "take the machine as a node",
        "from here on k3s fills its directories",
        Resource::Node { role, dirs: config::state_dirs(role) },
    ));
    steps
}

/// The settings of k3s, its program, its images, and the names under which it is called.
fn k3s_files(settings: &Settings, release: &Release, drop_in: String) -> Vec<Step> {
    let why = match settings.role {
        NodeRole::Server if drop_in.contains("traefik") => {
            "every setting that we own, in one file; traefik is off: --components traefik asks for \
             it"
        }
        _ => "every setting that we own, in one file",
    };
    let content = match settings.options.k3s.secret_values() {
        Some(_) => FileContent::Filled { text: drop_in, from: SecretName::K3sSettings },
        None => FileContent::Text(drop_in),
    };
    let want = Resource::File { path: DROP_IN.into(), content, mode: 0o600, group: None };
    let mut steps = vec![step("settings", "write the k3s settings", why, want)];
    if settings.options.registries.is_some() {
        steps.push(step(
            "registries",
            "write registries.yaml",
            "asked for by --registries",
            secret(REGISTRIES, SecretName::Registries),
        ));
    }
    steps.push(step(
        "k3s",
        format!("install k3s {}", release.version),
        "verified before it is put in place",
        Resource::Fetch(release.binary.clone()),
    ));
    for (number, images) in release.images.iter().enumerate() {
        let file = images.path.rsplit('/').next().unwrap_or_default();
        steps.push(step(
            &format!("images-{number}"),
            format!("place {file}"),
            "k3s imports images from there at start",
            Resource::Fetch(images.clone()),
        ));
    }
    for name in ["kubectl", "crictl", "ctr"] {
        let path = format!("/usr/local/bin/{name}");
        steps.push(step(
            &format!("link-{name}"),
            format!("link {name}"),
            "k3s carries it",
            Resource::Link { path, target: "k3s".into() },
        ));
    }
    steps
}

/// What surrounds the unit of k3s, the unit itself, and its start.
fn k3s_service(facts: &Facts, settings: &Settings) -> Vec<Step> {
    let unit = settings.role.unit();
    let mut steps = Vec::new();
    let env = format!("{UNITS}/{unit}.env");
    let mut inputs = vec![
        BINARY.to_owned(),
        DROP_IN.into(),
        format!("{UNITS}/{unit}"),
        REGISTRIES.into(),
        env.clone(),
    ];
    if !facts.proxy.is_empty() {
        steps.push(step(
            "proxy",
            "write the proxy environment",
            "a proxy is set here",
            secret(&env, SecretName::ProxyEnvironment),
        ));
    }
    if !settings.options.api_allow.is_empty() {
        let rules = config::firewall_rules(&settings.options.api_allow, settings, facts);
        steps.push(step(
            "firewall-file",
            "write the firewall table",
            "asked for by --api-allow",
            text(FIREWALL, rules, 0o600),
        ));
        let load = Resource::Firewall { path: FIREWALL.into(), table: FIREWALL_TABLE.into() };
        steps.push(step("firewall", "load the firewall table", "before anything listens", load));
    }
    steps.push(step(
        "k3s-unit",
        format!("write {unit}"),
        "k3s under systemd",
        text(&format!("{UNITS}/{unit}"), config::k3s_unit(settings), 0o644),
    ));
    if settings.role == NodeRole::Worker {
        inputs.push(JOIN_TOKEN.into());
    }
    steps.push(step(
        "k3s-start",
        format!("start {unit}"),
        "enabled for the next boot too",
        Resource::Unit { name: unit.into(), inputs },
    ));
    steps
}

fn node_ready(
    name: String,
    kubeconfig: &str,
    settings: &Settings,
    release: &Release,
) -> WaitCondition {
    WaitCondition::Node {
        name,
        kubeconfig: kubeconfig.into(),
        unit: settings.role.unit().into(),
        version: release.version.to_string(),
    }
}

/// After the node is Ready with what it runs now.
fn old_data() -> Step {
    step(
        "old-data",
        "remove what former versions of k3s unpacked",
        "it keeps every one; the current and the former stay",
        Resource::OldData,
    )
}

/// The plan that makes this machine a server.
pub fn server_plan(
    facts: &Facts,
    settings: &Settings,
    release: &Release,
    components: &[&'static Component],
) -> Plan {
    let node = settings.node_name(&facts.hostname);
    let within_s = settings.timeout.as_secs();
    let mut steps = base(
        facts,
        settings,
        release,
        config::server_drop_in(facts, settings, &release.version, components),
    );
    let mut system = vec![node_ready(node, ADMIN_KUBECONFIG, settings, release)];
    system.extend(
        config::system_deployments(facts, settings)
            .into_iter()
            .map(|name| WaitCondition::Deployment { namespace: "kube-system".into(), name }),
    );
    steps.push(step(
        step_id::NODE_READY,
        "wait for the node",
        "Ready, and the system deployments answer",
        Resource::Ready { what: system, within_s },
    ));
    steps.push(old_data());
    steps.extend(agent(facts, settings, release));
    if let Some(user) = &settings.options.kubeconfig_for {
        let host = network::node_address(facts, settings)
            .map_or_else(|| "127.0.0.1".to_owned(), |a| host_in_url(&a.to_string()));
        let want = Resource::Kubeconfig {
            user: user.clone(),
            server: format!(
                "https://{host}:{}",
                EffectiveSettings::planned(facts, settings).api_port()
            ),
        };
        steps.push(step(
            "kubeconfig",
            format!("write a kubeconfig for {user}"),
            "asked for by --kubeconfig-for",
            want,
        ));
    }
    for component in components {
        let mut parts = Vec::new();
        if !component.objects.is_empty() {
            parts.push((
                "objects",
                format!("apply {}", component.name),
                Resource::Objects { yaml: component.objects.into() },
            ));
        }
        parts.push((
            "ready",
            format!("wait for {}", component.name),
            Resource::Ready { what: (component.ready)(), within_s },
        ));
        let class = components::ingress_class(components).unwrap_or("nginx");
        let after = (component.objects_when_ready)(settings.options.acme_email.as_deref())
            .replace("ACME_CLASS", class);
        if !after.is_empty() {
            parts.push((
                "after",
                format!("configure {}", component.name),
                Resource::Objects { yaml: after },
            ));
        }
        for (part, title, want) in parts {
            steps.push(Step {
                optional: true,
                ..step(&step_id::component(component.name, part), title, component.summary, want)
            });
        }
    }
    plan("install-server", facts, settings, release, steps)
}

/// Namespaces, rights, the agent's user, its files and units.
fn agent(facts: &Facts, settings: &Settings, release: &Release) -> Vec<Step> {
    let tenants = tenant::is_supported(&release.version.to_string());
    let objects = |yaml: &str| Resource::Objects { yaml: yaml.into() };
    let mut steps = vec![
        step(
            "namespaces",
            "create the namespaces",
            "where PipeOps runs applications",
            objects(include_str!("../../../deployments/namespaces.yaml")),
        ),
        step(
            "rights",
            "create the access rights",
            "what the agent may do, enforced by Kubernetes",
            objects(&config::rbac(settings.max_role, tenants)),
        ),
    ];
    if tenants {
        steps.push(step(
            "tenants",
            "create the rights for tenants",
            "a place for each customer, kept apart by admission policies",
            objects(include_str!("../../../deployments/tenants.yaml")),
        ));
    }
    steps.extend([
        step(
            "user",
            format!("create the user {AGENT_USER}"),
            "the agent runs without root",
            Resource::User { name: AGENT_USER.into() },
        ),
        step(
            "agent-config",
            "write the agent's settings",
            "control plane and names",
            text(AGENT_CONFIG, config::agent_toml(facts, settings), 0o644),
        ),
        step(
            step_id::AGENT_TOKEN,
            "write the agent's token file",
            "read by its unit only",
            secret(AGENT_TOKEN, SecretName::AgentToken),
        ),
    ]);
    steps.extend(agent_units());
    steps.extend(agent_starts());
    steps
}

fn agent_units() -> impl Iterator<Item = Step> {
    [
        (
            "agent-unit",
            "pipeops-agent.service",
            include_str!("../../../systemd/pipeops-agent.service"),
        ),
        (
            "credential-unit",
            "pipeops-agent-credential.service",
            include_str!("../../../systemd/pipeops-agent-credential.service"),
        ),
        (
            "credential-path-unit",
            "pipeops-agent-credential.path",
            include_str!("../../../systemd/pipeops-agent-credential.path"),
        ),
        (
            "credential-timer-unit",
            "pipeops-agent-credential.timer",
            include_str!("../../../systemd/pipeops-agent-credential.timer"),
        ),
    ]
    .into_iter()
    .map(|(id, name, content)| {
        let file = text(&format!("{UNITS}/{name}"), content, 0o644);
        step(id, format!("write {name}"), "the agent under systemd", file)
    })
}

/// The starts of the agent's units, and the wait for it.
fn agent_starts() -> Vec<Step> {
    let unit = |name: &str| format!("{UNITS}/{name}");
    let credential_inputs = vec![unit("pipeops-agent-credential.service"), PIPEOPS.to_owned()];
    let agent_inputs = vec![
        unit("pipeops-agent.service"),
        PIPEOPS.to_owned(),
        AGENT_CONFIG.into(),
        AGENT_TOKEN.into(),
    ];
    let start = |name: &str, inputs: Vec<String>| Resource::Unit { name: name.into(), inputs };
    let ready = Resource::Ready {
        what: vec![WaitCondition::Credential, WaitCondition::Agent],
        within_s: 60,
    };
    vec![
        step(
            "credential-start",
            "mint the agent's credential",
            "24 hours, renewed by a timer",
            start("pipeops-agent-credential.service", credential_inputs),
        ),
        step(
            "credential-timer",
            "start the credential timer",
            "every 8 hours",
            start("pipeops-agent-credential.timer", vec![unit("pipeops-agent-credential.timer")]),
        ),
        step(
            "credential-path",
            "watch for the agent's registration",
            "its enrolment token is emptied then",
            start("pipeops-agent-credential.path", vec![unit("pipeops-agent-credential.path")]),
        ),
        step(
            "agent-start",
            "start the agent",
            "enabled for the next boot too",
            start("pipeops-agent.service", agent_inputs),
        ),
        step("agent-ready", "wait for the agent", "it answers on its socket", ready),
    ]
}

/// The plan that makes this machine a worker of `server`.
pub fn worker_plan(
    facts: &Facts,
    settings: &Settings,
    release: &Release,
    server: &JoinServer,
) -> Plan {
    let node = settings.node_name(&facts.hostname);
    let mut steps = base(
        facts,
        settings,
        release,
        config::worker_drop_in(facts, settings, &release.version, server),
    );
    let what = vec![node_ready(node, KUBELET_KUBECONFIG, settings, release)];
    steps.push(step(
        step_id::NODE_READY,
        "wait for the node",
        "Ready, as its own kubelet sees it",
        Resource::Ready { what, within_s: settings.timeout.as_secs() },
    ));
    steps.push(old_data());
    let mut plan = plan("join-worker", facts, settings, release, steps);
    plan.options.insert("server".into(), server.url.clone());
    plan
}

fn plan(
    command: &str,
    facts: &Facts,
    settings: &Settings,
    release: &Release,
    steps: Vec<Step>,
) -> Plan {
    Plan {
        schema: SCHEMA.into(),
        command: command.into(),
        role: settings.role,
        node: settings.node_name(&facts.hostname),
        k3s_version: release.version.to_string(),
        machine_id: facts.machine_id.clone(),
        options: settings.options.recorded(),
        inputs: std::collections::BTreeMap::new(),
        steps,
    }
}
