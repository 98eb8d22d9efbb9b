//! `cluster-info`: what there is, from each part that still answers.

use std::time::Duration;

use serde::Serialize;
use serde_json::Value;

use super::Context;
use crate::agent::local;
use crate::agent::session::ControlPlaneState;
use crate::agent::status::{KubernetesState, NodeStatus, Notice};
use crate::base::cidr::host_in_url;
use crate::base::error::{Exit, Failure};
use crate::base::text::printable;
use crate::cli::{ClusterInfoArgs, OutputFormat};
use crate::frp;
use crate::host::Host;
use crate::host::paths::AGENT_SOCKET;
use crate::install::components::{self, CATALOGUE};
use crate::install::engine::journal::Journal;
use crate::install::engine::unmet;
use crate::install::plan::step_id;
use crate::k3s::paths::{ADMIN_KUBECONFIG, KUBELET_KUBECONFIG, SERVER_TOKEN};
use crate::k3s::role::NodeRole;
use crate::kubernetes::client::Cluster;
use crate::output::{Printer, table};

/// Longest time for any one part.
const PART: Duration = Duration::from_secs(4);
/// Marks our join tokens among the cluster's.
const TOKEN_NOTE: &str = "pipeops join line";
const BOOTSTRAP_TOKENS: &str =
    "/api/v1/namespaces/kube-system/secrets?fieldSelector=type%3Dbootstrap.kubernetes.io%2Ftoken";

/// Everything that the command knows; the JSON document is this.
#[derive(Debug, Default, Serialize)]
struct Info {
    schema: &'static str,
    node: String,
    role: Option<NodeRole>,
    k3s_version: String,
    k3s: String,
    api: String,
    nodes: Vec<NodeStatus>,
    components: Vec<Component>,
    agent: Option<AgentInfo>,
    #[serde(skip_serializing_if = "Option::is_none")]
    join: Option<String>,
    problems: Vec<Problem>,
}

#[derive(Debug, Serialize)]
struct Component {
    name: String,
    ready: bool,
    note: String,
}

#[derive(Debug, Serialize)]
struct AgentInfo {
    unit: String,
    control: Option<ControlPlaneState>,
    tunnel: Option<frp::TunnelState>,
    notices: Vec<Notice>,
    kubernetes: Option<KubernetesState>,
    note: String,
}

/// A part that is not as it should be, why, and what to do.
#[derive(Debug, Serialize)]
struct Problem {
    part: String,
    what: String,
    next: String,
}

/// # Errors
/// Only for wrong usage; a part that is down is a line, and exit 13.
pub async fn info(context: &Context, args: ClusterInfoArgs) -> anyhow::Result<Exit> {
    let host = context.existing_host(&args.root.root)?;
    let printer = Printer::new(args.output == OutputFormat::Json, false, context.no_color());
    // only root can read the journal: for others a hidden one looks like none
    if host.is_running_machine() && !nix::unistd::geteuid().is_root() {
        return Err(Failure::new(
            Exit::Preflight,
            "NOT_ROOT",
            "the state of this node can be read by root only",
        )
        .hint("run the same command with sudo")
        .into());
    }
    let Some(journal) = Journal::load(&host)? else {
        return Err(Failure::new(
            Exit::Problems,
            "NOT_INSTALLED",
            "pipeops has not made this machine a node",
        )
        .hint("`pipeops install-server`, or `pipeops join-worker MASTER TOKEN`")
        .into());
    };
    let terminal = std::io::IsTerminal::is_terminal(&std::io::stdout());
    let join = args.join || terminal && args.output == OutputFormat::Text;
    let info = async { Ok::<_, Failure>(collect(&host, &journal, join).await) };
    let info = context.unless_stopped(info).await?;
    printer.document_with_secrets(&info);
    printer.data_with_secrets(render(&info).trim_end());
    Ok(if info.problems.is_empty() { Exit::Done } else { Exit::Problems })
}

async fn collect(host: &Host, journal: &Journal, join: bool) -> Info {
    let mut info = Info {
        schema: "pipeops.cluster-info/v1",
        node: journal.node.clone(),
        role: Some(journal.role),
        k3s_version: journal.k3s_version.clone(),
        ..Info::default()
    };
    if !journal.complete {
        info.problems.push(problem(
            "installation",
            "the last run did not come to its end".into(),
            "run the same installer command again: it resumes",
        ));
    }
    let unit = journal.role.unit();
    k3s_state(host, unit, &mut info).await;
    let server = journal.role == NodeRole::Server;
    let kubeconfig = if server { ADMIN_KUBECONFIG } else { KUBELET_KUBECONFIG };
    let cluster = match host.read(kubeconfig) {
        Ok(Some(_)) => Cluster::open(host, kubeconfig).map_err(|e| e.context("it is not valid")),
        Ok(None) => Err(anyhow::anyhow!("it is not there")),
        Err(error) => Err(error),
    };
    let (nodes, components, agent) = tokio::join!(
        async {
            match &cluster {
                Ok(cluster) => within(nodes(cluster, server, &journal.node)).await,
                Err(_) => Ok(Vec::new()),
            }
        },
        async {
            if server && cluster.is_ok() { components(host, journal).await } else { Vec::new() }
        },
        async { if server { Some(agent(host).await) } else { None } },
    );
    match &cluster {
        Ok(_) => api_state(nodes, unit, &mut info),
        Err(error) => {
            info.api = "unknown".into();
            info.problems.push(problem(
                "kubeconfig",
                format!("{kubeconfig}: {error:#}"),
                &format!("k3s writes it at start: systemctl restart {unit}"),
            ));
        }
    }
    info.components = components;
    if info.api == "answers" {
        let next = "run install-server again: it repairs what is not ready";
        info.problems.extend(info.components.iter().filter(|c| !c.ready).map(|component| {
            problem("component", format!("{}: {}", component.name, component.note), next)
        }));
    }
    if let Some(agent) = agent {
        info.problems.extend(agent_problem(&agent));
        for notice in &agent.notices {
            info.problems.push(problem(
                "agent",
                format!("{}: {}", notice.code, notice.text),
                "run install-server again: it repairs what is ours",
            ));
        }
        info.agent = Some(agent);
    }
    if join && server {
        match within(join_line(host, &cluster, &info)).await {
            Ok(line) => info.join = Some(line),
            Err(error) => info.problems.push(problem(
                "join",
                format!("no join line can be made: {error}"),
                "bring the API back first",
            )),
        }
    }
    info
}

fn problem(part: &str, what: String, next: &str) -> Problem {
    Problem { part: part.into(), what, next: next.into() }
}

async fn k3s_state(host: &Host, unit: &str, info: &mut Info) {
    match host.unit(unit).await {
        Ok(state) if state.running() => info.k3s = "running".into(),
        Ok(state) => {
            info.k3s = state.active.clone();
            info.problems.push(problem(
                "k3s",
                format!("{unit} is {} ({})", state.active, state.sub),
                &format!("journalctl -u {unit} -n 50; systemctl start {unit}"),
            ));
        }
        Err(error) => {
            info.problems.push(problem("k3s", format!("{error:#}"), "is systemd running?"))
        }
    }
}

fn api_state(nodes: Result<Vec<NodeStatus>, String>, unit: &str, info: &mut Info) {
    match nodes {
        Ok(nodes) => {
            info.api = "answers".into();
            for node in nodes.iter().filter(|n| !n.ready) {
                info.problems.push(problem(
                    "node",
                    format!("{} is not Ready: {}", node.name, node.note),
                    &format!("kubectl describe node {}", node.name),
                ));
            }
            info.nodes = nodes;
        }
        Err(error) => {
            info.api = "away".into();
            info.problems.push(problem(
                "api",
                format!("the Kubernetes API does not answer: {error}"),
                &format!("journalctl -u {unit} -n 50"),
            ));
        }
    }
}

/// The first thing that is wrong with the agent, from its unit outward.
fn agent_problem(agent: &AgentInfo) -> Option<Problem> {
    use ControlPlaneState as State;
    let found = |what: String, next: &str| Some(problem("agent", what, next));
    if agent.unit != "active" {
        return found(
            format!("pipeops-agent.service is {}", agent.unit),
            "journalctl -u pipeops-agent -n 50; systemctl start pipeops-agent",
        );
    }
    if agent.kubernetes != Some(KubernetesState::Connected) {
        return found(
            format!("the agent has no view of the cluster: {}", agent.note),
            "systemctl start pipeops-agent-credential, then look again",
        );
    }
    if !matches!(agent.control, Some(State::Unenrolled | State::Online | State::Skewed)) {
        let next = match agent.control {
            Some(State::Unauthorized | State::Expired) => {
                "run install-server again with a fresh AGENT_TOKEN"
            }
            Some(State::Conflict) => {
                "on a copied machine: run install-server again with an AGENT_TOKEN of its own"
            }
            _ => {
                "check the way from this machine to the control plane; the agent goes on trying by \
                 itself"
            }
        };
        return found(format!("the control plane is not reached: {}", agent.note), next);
    }
    if agent.control != Some(State::Unenrolled) && agent.tunnel != Some(frp::TunnelState::Up) {
        return found(
            format!("the tunnel is not up: {}", agent.note),
            "the agent goes on trying by itself; the reason above says what to fix",
        );
    }
    None
}

/// Bounds a part, and flattens its error to one line.
async fn within<T>(part: impl Future<Output = anyhow::Result<T>>) -> Result<T, String> {
    match tokio::time::timeout(PART, part).await {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(error.root_cause().to_string()),
        Err(_) => Err(format!("no answer within {} s", PART.as_secs())),
    }
}

async fn nodes(cluster: &Cluster, server: bool, own: &str) -> anyhow::Result<Vec<NodeStatus>> {
    if server {
        return Ok(cluster
            .list("/api/v1/nodes")
            .await?
            .iter()
            .map(NodeStatus::from_object)
            .collect());
    }
    // a kubelet may read its own node
    Ok(cluster
        .get(&format!("/api/v1/nodes/{own}"))
        .await?
        .iter()
        .map(NodeStatus::from_object)
        .collect())
}

async fn components(host: &Host, journal: &Journal) -> Vec<Component> {
    let selected = CATALOGUE.iter().filter(|c| {
        journal.entries.iter().any(|e| step_id::component_of(&e.id) == Some(c.name))
            || wanted(journal, c)
    });
    let looks = selected.map(|component| async move {
        let look = async {
            for item in (component.ready)() {
                if let Some(why) = unmet(host, &item).await {
                    return Some(format!("{}: {why}", item.title()));
                }
            }
            None
        };
        let note =
            tokio::time::timeout(PART, look).await.unwrap_or_else(|_| Some("no answer".into()));
        Component {
            name: component.name.into(),
            ready: note.is_none(),
            note: note.unwrap_or_default(),
        }
    });
    futures_util::future::join_all(looks).await
}

/// Bundled components leave no journal entry: what was asked for stands in the options.
fn wanted(journal: &Journal, component: &components::Component) -> bool {
    match journal.options.get("components") {
        Some(list) => list.split(',').any(|n| n == component.name),
        None => {
            component.by_default
                && journal.entries.iter().any(|e| step_id::component_of(&e.id).is_some())
        }
    }
}

async fn agent(host: &Host) -> AgentInfo {
    let unit = host
        .unit("pipeops-agent.service")
        .await
        .map(|u| u.active)
        .unwrap_or_else(|e| e.to_string());
    match within(local::ask_status(&host.real_path(AGENT_SOCKET))).await {
        Ok(agent) => AgentInfo {
            unit,
            control: Some(agent.control),
            tunnel: Some(agent.tunnel),
            kubernetes: Some(agent.kubernetes),
            note: agent.summary(),
            notices: agent.notices,
        },
        Err(error) => AgentInfo {
            unit,
            control: None,
            tunnel: None,
            kubernetes: None,
            note: format!("its socket does not answer: {error}"),
            notices: Vec::new(),
        },
    }
}

/// The line that joins a worker, with a token for workers only; a valid one is used again.
async fn join_line(
    host: &Host,
    cluster: &anyhow::Result<Cluster>,
    info: &Info,
) -> anyhow::Result<String> {
    let Ok(cluster) = cluster else { anyhow::bail!("the kubeconfig cannot be used") };
    let own = info
        .nodes
        .iter()
        .find(|n| n.name == info.node)
        .map(|n| n.address.clone())
        .filter(|a| !a.is_empty());
    let Some(address) = own else { anyhow::bail!("this node's address is not known") };
    let address = host_in_url(&address);
    let token = match live_token(host, cluster).await? {
        Some(token) => token,
        None => {
            let args = ["token", "create", "--ttl", "24h", "--description", TOKEN_NOTE];
            let made = host.output("k3s", &args, PART).await?;
            let token = made.stdout.trim().to_owned();
            anyhow::ensure!(
                made.ok() && !token.is_empty(),
                "`k3s token create` failed: {}",
                made.stderr.trim()
            );
            token
        }
    };
    let port = crate::install::gather::api_port(host);
    Ok(format!("sudo pipeops join-worker https://{address}:{port} {token}"))
}

async fn live_token(host: &Host, cluster: &Cluster) -> anyhow::Result<Option<String>> {
    use base64::Engine as _;
    let decode = |v: &Value| {
        let bytes = base64::engine::general_purpose::STANDARD
            .decode(v.as_str().unwrap_or_default())
            .unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    };
    let Some(prefix) =
        host.read(SERVER_TOKEN)?.and_then(|t| t.split_once("::").map(|(head, _)| head.to_owned()))
    else {
        return Ok(None);
    };
    let secrets = cluster.list(BOOTSTRAP_TOKENS).await?;
    let soon = jiff::Timestamp::now().as_second() + 3600;
    Ok(secrets
        .iter()
        .filter(|s| decode(&s["data"]["description"]) == TOKEN_NOTE)
        .filter(|s| {
            decode(&s["data"]["expiration"])
                .parse::<jiff::Timestamp>()
                .is_ok_and(|t| t.as_second() > soon)
        })
        .map(|s| {
            format!(
                "{prefix}::{}.{}",
                decode(&s["data"]["token-id"]),
                decode(&s["data"]["token-secret"])
            )
        })
        .next())
}

fn render(info: &Info) -> String {
    let role = if info.role == Some(NodeRole::Server) { "server" } else { "worker" };
    let mut text = format!(
        "{} – k3s {} {role}, {}; API {}\n",
        info.node, info.k3s_version, info.k3s, info.api
    );
    if !info.nodes.is_empty() {
        let row = |n: &NodeStatus| {
            vec![
                n.name.clone(),
                if n.ready { "Ready".into() } else { "NotReady".into() },
                n.role.clone(),
                n.version.clone(),
                n.address.clone(),
                n.note.clone(),
            ]
        };
        text.push('\n');
        text.push_str(&table(
            &["NODE", "STATE", "ROLE", "VERSION", "ADDRESS", "NOTE"],
            &info.nodes.iter().map(row).collect::<Vec<_>>(),
        ));
    }
    if !info.components.is_empty() {
        let row = |c: &Component| {
            vec![
                c.name.clone(),
                if c.ready { "ready".into() } else { "not ready".into() },
                c.note.clone(),
            ]
        };
        text.push('\n');
        text.push_str(&table(
            &["COMPONENT", "STATE", "NOTE"],
            &info.components.iter().map(row).collect::<Vec<_>>(),
        ));
    }
    if let Some(agent) = &info.agent {
        text.push_str(&format!("\nagent {}: {}\n", agent.unit, printable(&agent.note)));
    }
    if let Some(join) = &info.join {
        text.push_str(&format!(
            "\nadd a worker (the token is for workers only and lives a day at most):\n  {join}\n"
        ));
    }
    if !info.problems.is_empty() {
        text.push_str("\nproblems:\n");
        for problem in &info.problems {
            text.push_str(&format!(
                "  {} – {}\n      → {}\n",
                problem.part,
                printable(&problem.what),
                printable(&problem.next)
            ));
        }
    }
    text
}
