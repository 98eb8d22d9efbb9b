//! `nodes`: the machines of a cluster, and what is asked of one.

use serde_json::{Value, json};

use super::apps::show;
use super::operation::{Request, options_of, tell};
use super::{Context, Session, cell, printer};
use crate::agent::status::NodeStatus;
use crate::base::error::Exit;
use crate::cli::{ClusterArgs, FollowArgs, NodesCommand, OutputArgs};
use crate::client::applications::ClusterReader;

/// Longest time of what takes one request, seconds.
const SHORT_TIMEOUT_S: u64 = 300;

/// # Errors
/// What the control plane or the cluster refuses; as an operation ends.
pub(super) async fn nodes(context: &Context, command: NodesCommand) -> anyhow::Result<Exit> {
    match command {
        NodesCommand::List { cluster, output } => list(context, &cluster, &output).await,
        NodesCommand::Drain { node, force, grace_period, timeout, follow, cluster } => {
            let mut spec = json!({"node": node, "force": force, "timeout_s": timeout});
            if let Some(seconds) = grace_period {
                spec["grace_period_s"] = seconds.into();
            }
            let change = Change { kind: "drain", spec, timeout_s: timeout, done: "drained" };
            change.carry_out(context, &follow, &cluster).await
        }
        NodesCommand::Uncordon { node, follow, cluster } => {
            let spec = json!({"node": node});
            let (timeout_s, done) = (SHORT_TIMEOUT_S, "takes pods again");
            let change = Change { kind: "uncordon", spec, timeout_s, done };
            change.carry_out(context, &follow, &cluster).await
        }
        NodesCommand::Remove { node, force, follow, cluster } => {
            let spec = json!({"node": node, "force": force});
            let (timeout_s, done) = (SHORT_TIMEOUT_S, "removed");
            let change = Change { kind: "remove", spec, timeout_s, done };
            change.carry_out(context, &follow, &cluster).await
        }
    }
}

/// What is asked of one machine.
struct Change {
    kind: &'static str,
    spec: Value,
    timeout_s: u64,
    /// What is said of the machine then.
    done: &'static str,
}

impl Change {
    async fn carry_out(
        self,
        context: &Context,
        follow: &FollowArgs,
        args: &ClusterArgs,
    ) -> anyhow::Result<Exit> {
        let session = Session::open(context, args.context.as_deref())?;
        let node = cell(&self.spec["node"]);
        let request = Request {
            cluster: session.cluster(args.cluster.as_deref()).await?,
            title: node.clone(),
            kind: self.kind,
            spec: self.spec,
            timeout_s: self.timeout_s,
            look: format!("pipeops nodes list{}", options_of(args)),
        };
        let mut printer = printer(context, &follow.output);
        match request.carry_out(&session, &mut printer, follow, tell).await? {
            None => Ok(Exit::Done),
            Some(operation) => {
                let summary = [format!("{node}: {}", self.done)];
                request.conclude(&printer, follow, &operation, &summary)
            }
        }
    }
}

async fn list(context: &Context, args: &ClusterArgs, output: &OutputArgs) -> anyhow::Result<Exit> {
    let session = Session::open(context, args.context.as_deref())?;
    let cluster = session.cluster(args.cluster.as_deref()).await?;
    let reader = ClusterReader { api: &session.api, cluster: &cluster.id };
    let listed = reader.list("/api/v1", None, ("nodes", "Node"), "limit=5000");
    let found = context.unless_stopped(listed).await?;
    let nodes: Vec<NodeStatus> = found.iter().map(NodeStatus::from_object).collect();
    let row = |node: &NodeStatus| {
        let state = if node.ready { "Ready" } else { "NotReady" };
        [&node.name[..], state, &node.role, &node.version, &node.address, &node.note]
            .map(|text| cell(&json!(text)))
            .to_vec()
    };
    let lines: Vec<Vec<String>> = nodes.iter().map(row).collect();
    let items: Vec<Value> = nodes.iter().map(|node| json!(node)).collect();
    let head = ["NODE", "STATE", "ROLE", "VERSION", "ADDRESS", "NOTE"];
    show(&printer(context, output), &items, &head, &lines);
    Ok(Exit::Done)
}
