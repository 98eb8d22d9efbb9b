//! Everything done to a host, as data: steps, what each wants, and what a check of them says.

use std::collections::BTreeMap;

use anyhow::Context as _;
use serde::{Deserialize, Serialize};

use crate::base::yaml::{self, EqualKeys};
use crate::host::fetch::Artifact;
use crate::install::finding::Finding;
use crate::k3s::role::NodeRole;

/// Format of plans and their checks; raised when a field changes its meaning.
pub const SCHEMA: &str = "pipeops.plan/v1";

/// What one run wants the machine to be.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    pub schema: String,
    pub command: String,
    pub role: NodeRole,
    pub node: String,
    pub k3s_version: String,
    /// machine-id of the host it was made for.
    pub machine_id: String,
    /// The user's options, for the comparison with the next run.
    pub options: BTreeMap<String, String>,
    /// Files that the secrets came from, which are in no plan: option → path. They are read again
    /// when the plan is carried out.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub inputs: BTreeMap<String, String>,
    pub steps: Vec<Step>,
}

/// One thing that would be undone as one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Step {
    pub id: String,
    pub title: String,
    pub why: String,
    pub want: Resource,
    /// A failure leaves the rest healthy and ends the run as partly done.
    #[serde(default)]
    pub optional: bool,
}

/// The closed set of things a step can want.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Resource {
    Dir {
        path: String,
        mode: u32,
    },
    File {
        path: String,
        content: FileContent,
        mode: u32,
        #[serde(default)]
        group: Option<String>,
    },
    /// This very program, copied to `path`; the former one is kept beside it as `.old`.
    Program {
        path: String,
    },
    Fetch(Artifact),
    /// Only where nothing of that name is on the path already.
    Link {
        path: String,
        target: String,
    },
    /// A system user with a group of the same name and no login.
    User {
        name: String,
    },
    /// From here on k3s fills these directories; undoing it takes the node down and removes them.
    Node {
        role: NodeRole,
        dirs: Vec<String>,
    },
    /// What k3s unpacked for versions before the former one is gone.
    OldData,
    /// A unit enabled and running; restarted when one of `inputs` is not what it was started with.
    Unit {
        name: String,
        inputs: Vec<String>,
    },
    /// Loads an nftables file now; the unit loads it at boot.
    Firewall {
        path: String,
        table: String,
    },
    Objects {
        yaml: String,
    },
    Ready {
        what: Vec<WaitCondition>,
        within_s: u64,
    },
    /// A copy of the admin kubeconfig for a local user.
    Kubeconfig {
        user: String,
        server: String,
    },
}

/// Ids of steps that other code looks for. They stand in journals and saved plans, so none ever
/// changes.
pub mod step_id {
    pub const NODE_READY: &str = "node-ready";
    pub const AGENT_TOKEN: &str = "agent-token";
    const COMPONENT: &str = "component-";

    /// The id of one part of a component's installation.
    pub fn component(name: &str, part: &str) -> String {
        format!("{COMPONENT}{name}-{part}")
    }

    /// The component that a step belongs to; `None` for all other steps.
    pub fn component_of(id: &str) -> Option<&str> {
        id.strip_prefix(COMPONENT)?.rsplit_once('-').map(|(name, _)| name)
    }
}

impl Step {
    /// The component that it is a part of.
    pub fn component(&self) -> Option<&str> {
        step_id::component_of(&self.id)
    }
}

impl Resource {
    /// Whether it leaves something that undoing would take away.
    pub(super) fn leaves_state(&self) -> bool {
        !matches!(self, Resource::Ready { .. } | Resource::OldData)
    }
}

/// What a file holds. Secrets are named, never in the plan.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FileContent {
    Text(String),
    Secret(SecretName),
    /// Text with a hole for each secret value in it.
    Filled {
        text: String,
        from: SecretName,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SecretName {
    /// Enrolment token of the agent; the file exists, empty, without one.
    AgentToken,
    /// Token that a worker joins with.
    K3sToken,
    /// Password that ties a worker's name to this machine; made once, then read back.
    NodePassword,
    /// Environment of k3s with proxy variables, which may carry passwords.
    ProxyEnvironment,
    /// registries.yaml as the user gave it.
    Registries,
    /// Secret values of the `[k3s]` table.
    K3sSettings,
    /// URL of a mirror with its login; written nowhere.
    ArtifactLogin,
}

impl SecretName {
    /// The flag or variable that it comes from, for messages.
    pub fn comes_from(self) -> &'static str {
        match self {
            SecretName::AgentToken => "--agent-token-file, or AGENT_TOKEN",
            SecretName::K3sToken => "the TOKEN argument, --token-file, or K3S_TOKEN",
            SecretName::NodePassword => "/etc/rancher/node/password",
            SecretName::ProxyEnvironment => {
                "the proxy variables of the environment (HTTPS_PROXY, HTTP_PROXY, ALL_PROXY)"
            }
            SecretName::Registries => "--registries",
            SecretName::K3sSettings => "the [k3s] table of the config (--config FILE)",
            SecretName::ArtifactLogin => "--artifact-url",
        }
    }
}

/// Something to wait for, checked at the source each time.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum WaitCondition {
    /// The Node object is Ready, read with this kubeconfig, and reported by the kubelet of this
    /// start of the unit.
    Node {
        name: String,
        kubeconfig: String,
        unit: String,
        /// Version that its kubelet reports; empty for any.
        #[serde(default)]
        version: String,
    },
    Deployment {
        namespace: String,
        name: String,
    },
    ApiService {
        name: String,
    },
    StorageClass {
        name: String,
    },
    /// A HelmChart's job has done its work.
    Chart {
        namespace: String,
        name: String,
    },
    /// A dry run of this object is accepted.
    Accepts {
        yaml: String,
    },
    /// Any HTTP answer on the node's port.
    Http {
        port: u16,
    },
    /// The agent's credential file is there and not older than its token's life.
    Credential,
    /// The agent answers on its socket.
    Agent,
}

impl WaitCondition {
    /// What is waited for, for people.
    pub fn title(&self) -> String {
        match self {
            WaitCondition::Node { name, .. } => format!("node {name} Ready"),
            WaitCondition::Deployment { namespace, name } => {
                format!("deployment {namespace}/{name}")
            }
            WaitCondition::ApiService { name } => format!("API {name}"),
            WaitCondition::StorageClass { name } => format!("storage class {name}"),
            WaitCondition::Chart { name, .. } => format!("chart {name}"),
            WaitCondition::Accepts { .. } => "the webhook".into(),
            WaitCondition::Http { port } => format!("an answer on port {port}"),
            WaitCondition::Credential => "the agent's credential".into(),
            WaitCondition::Agent => "the agent".into(),
        }
    }
}

/// What a check says of one step on this machine now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum StepStatus {
    Done,
    Todo {
        changes: Vec<String>,
    },
    /// Cannot be known before an earlier step ran.
    Later {
        until: String,
    },
}

impl StepStatus {
    pub fn todo(change: impl Into<String>) -> StepStatus {
        StepStatus::Todo { changes: vec![change.into()] }
    }
}

/// A plan together with what its check said, as `--plan-out` writes it and `--apply-plan` holds
/// against the host.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CheckedPlan {
    pub plan: Plan,
    pub checks: Vec<StepStatus>,
    /// Ids of journal entries that the plan no longer wants.
    pub remove: Vec<String>,
    /// Files of ours that were edited by somebody else.
    pub drift: Vec<String>,
    pub findings: Vec<Finding>,
}

impl CheckedPlan {
    /// Steps that would change something.
    pub fn changes(&self) -> usize {
        self.checks.iter().filter(|c| matches!(c, StepStatus::Todo { .. })).count()
            + self.remove.len()
    }

    /// Nothing to do, as far as can be known.
    pub fn done(&self) -> bool {
        self.remove.is_empty() && self.checks.iter().all(|c| *c == StepStatus::Done)
    }
}

/// Progress of the engine; bars, plain lines and JSON lines are made of these.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum ProgressEvent {
    Started {
        id: String,
        title: String,
        number: usize,
        of: usize,
    },
    /// Bytes of a download, or a sentence of a wait.
    Progress {
        id: String,
        done: u64,
        total: Option<u64>,
        note: Option<String>,
    },
    Finished {
        id: String,
        changed: bool,
        duration_ms: u64,
    },
    Failed {
        id: String,
        what: String,
        optional: bool,
    },
    Undone {
        id: String,
        title: String,
    },
    Note {
        text: String,
    },
}

/// Splits YAML into its documents, empty ones left out.
///
/// # Errors
/// The parser's message.
pub fn documents(yaml: &str) -> anyhow::Result<Vec<serde_json::Value>> {
    let mut found = Vec::new();
    for part in yaml.split("\n---") {
        let part = part.trim_start_matches("---");
        if part.lines().all(|l| l.trim().is_empty() || l.trim_start().starts_with('#')) {
            continue;
        }
        let value = yaml::parse(part, EqualKeys::Refused).context("reading a manifest")?;
        if !value.is_null() {
            found.push(value);
        }
    }
    Ok(found)
}
