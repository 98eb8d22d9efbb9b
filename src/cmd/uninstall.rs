//! `uninstall`: the journal backwards, then a look at what is left and why.

use serde_json::json;

use super::installer::plural;
use super::{Context, UNASKED};
use crate::base::error::{Exit, Failure};
use crate::cli::{OutputFormat, UninstallArgs};
use crate::host::paths::{JOIN_TOKEN, LOGS, STATE};
use crate::host::{Host, HostWriter, Owner};
use crate::install::engine::journal::{Journal, PATH, PriorState};
use crate::install::engine::{self, Outcome};
use crate::install::plan::{ProgressEvent, Resource, step_id};
use crate::k3s::paths::{KUBELET_KUBECONFIG, NODE_PASSWORD, VOLUMES};
use crate::k3s::role::NodeRole;
use crate::kubernetes::client::Cluster;
use crate::output::Printer;

/// # Errors
/// As in the table of exit codes; 10 when something had to stay.
pub async fn uninstall(context: &Context, args: UninstallArgs) -> anyhow::Result<Exit> {
    let host = context.existing_host(&args.root.root)?;
    if host.is_running_machine() && !nix::unistd::geteuid().is_root() {
        return Err(Failure::new(Exit::Preflight, "NOT_ROOT", "this needs root")
            .hint("run the same command with sudo")
            .into());
    }
    let mut printer =
        Printer::new(args.output == OutputFormat::Json, args.events.is_some(), context.no_color());
    let Some(mut journal) = Journal::load(&host)? else {
        // of a node that is gone, or of a k3s that is not ours: nothing tells them apart
        if args.purge_data && !host.list(VOLUMES).is_empty() {
            let what = format!("{VOLUMES} is there, and no journal says that it is ours");
            return Err(Failure::new(Exit::Preflight, "VOLUMES_UNKNOWN", what)
                .why("nothing was changed")
                .hint(format!("only `rm -rf {VOLUMES}` removes it now"))
                .into());
        }
        printer.data("nothing to do: pipeops has not installed anything here");
        printer.document(
            &json!({"schema": "pipeops.result/v1", "command": "uninstall", "result": "unchanged"}),
        );
        return Ok(Exit::Done);
    };
    announce(&mut printer, &host, &journal, args.purge_data);
    if args.dry_run {
        printer.data(&format!(
            "{} would be undone; nothing was written",
            plural(journal.entries.len(), "step")
        ));
        let steps: Vec<&String> = journal.entries.iter().rev().map(|e| &e.title).collect();
        printer.document(&json!({
            "schema": "pipeops.result/v1",
            "command": "uninstall",
            "result": "dry_run",
            "steps": steps,
        }));
        return Ok(Exit::Done);
    }
    let writer = host.lock()?;
    if !args.yes {
        let question = "this takes the node down and removes it; go on?";
        context.confirm(&mut printer, question, UNASKED).await?;
    }
    let farewell = tokio::select! {
        farewell = leave_cluster(&writer, &journal) => farewell,
        // the engine says so
        () = context.stop.cancelled() => None,
    };
    let agent = crate::agent::config::Deregistration::read(&writer);
    let mut on_event = |event: ProgressEvent| printer.event(&event);
    let outcome =
        engine::undo_all(&writer, &mut journal, args.purge_data, &context.stop, &mut on_event)
            .await?;
    let mut left = outcome.leftovers.clone();
    // after the agent has ended: one that lives would register again
    if let Some(agent) = agent {
        match agent.send().await {
            Ok(url) => printer.say(&format!("taken off {url}")),
            Err(why) => left.push(why),
        }
    }
    left.extend(
        outcome
            .failed
            .iter()
            .filter(|(_, why)| !outcome.leftovers.iter().any(|l| why.contains(l.as_str())))
            .map(|(title, why)| format!("{title}: {why}")),
    );
    let done = outcome.failed.is_empty();
    if done {
        writer.remove(PATH)?;
        writer.remove_tree(&format!("{STATE}/backup"), &[])?;
    }
    left.extend(residue(&writer, &left));
    left.extend(farewell);
    report(&mut printer, &writer, &outcome, &left)?;
    Ok(if done { Exit::Done } else { Exit::Partial })
}

/// What will be undone, which directories go with it, and what becomes of the volumes in them.
fn announce(printer: &mut Printer, host: &Host, journal: &Journal, purge: bool) {
    printer.say(&format!("uninstall on {}:", journal.node));
    for entry in
        journal.entries.iter().rev().filter(|e| !matches!(e.want, Resource::Objects { .. }))
    {
        printer.say(&format!("  - undo: {}", entry.title));
        if let Resource::Node { dirs, .. } = &entry.want {
            dirs.iter().for_each(|d| printer.say(&format!("      {d}")));
        }
    }
    if !host.list(VOLUMES).is_empty() {
        let (sign, verb) = if purge && ours(journal) { ('-', "remove") } else { ('=', "keep") };
        printer.say(&format!("  {sign} {verb} {VOLUMES} (volumes)"));
    }
}

/// Whether the directory of the volumes was made by the install that the journal tells of.
fn ours(journal: &Journal) -> bool {
    journal.entries.iter().any(|entry| match (&entry.want, &entry.before) {
        (Resource::Node { .. }, PriorState::Absent { made }) => {
            made.iter().any(|dir| VOLUMES.starts_with(dir.as_str()))
        }
        _ => false,
    })
}

/// Says what is left, and keeps the text of the run in a log that stays.
fn report(
    printer: &mut Printer,
    writer: &HostWriter,
    outcome: &Outcome,
    left: &[String],
) -> anyhow::Result<()> {
    let done = outcome.failed.is_empty();
    if left.is_empty() {
        printer.data("everything that pipeops installed is gone");
    } else {
        printer.data(if done {
            "pipeops is gone; what is left, and why:"
        } else {
            "not everything could be removed; what is left, and why:"
        });
        left.iter().for_each(|line| printer.data(&format!("  {line}")));
    }
    printer.data(&format!("  {LOGS}: logs of what was done here"));
    printer.document(&json!({
        "schema": "pipeops.result/v1",
        "command": "uninstall",
        "result": if done { "done" } else { "partial" },
        "undone": outcome.changed,
        "left": left,
    }));
    let time = jiff::Timestamp::now().strftime("%Y%m%dT%H%M%SZ");
    let path = format!("{LOGS}/{time}-uninstall.log");
    writer.mkdir(LOGS, 0o700)?;
    writer.write(&path, printer.take_log().as_bytes(), 0o600, Owner::default())
}

/// A worker takes its Node and node password off the server; when it cannot, the line to do it
/// there.
async fn leave_cluster(writer: &HostWriter, journal: &Journal) -> Option<String> {
    if journal.role == NodeRole::Server || journal.node.is_empty() {
        return None;
    }
    let name = &journal.node;
    // the password Secret is owned by the Node and goes with it; a kubelet may not delete itself on
    // every cluster
    let manual = format!(
        "on the server: kubectl delete node {name}; kubectl -n kube-system delete secret \
         {name}.node-password.k3s --ignore-not-found"
    );
    if journal.entry(step_id::NODE_READY).is_none()
        && !writer.exists(KUBELET_KUBECONFIG)
        && !writer.exists(JOIN_TOKEN)
        && !writer.exists(NODE_PASSWORD)
    {
        return None;
    }
    let cluster = Cluster::open(writer, KUBELET_KUBECONFIG).ok();
    let deleted = match cluster {
        Some(cluster) => cluster.delete(&format!("/api/v1/nodes/{name}")).await.is_ok(),
        None => false,
    };
    (!deleted).then(|| {
        format!("the cluster's Node {name}: Kubernetes lets no worker delete its own; {manual}")
    })
}

/// What looks like ours and is still there, beyond what was named already.
fn residue(host: &Host, named: &[String]) -> Vec<String> {
    let mut found = Vec::new();
    let mut look = |path: String, why: &str| {
        if host.exists(&path)
            && !named.iter().any(|n| {
                n.starts_with(&path)
                    || n.split(": ").next().is_some_and(|p| p.starts_with(&format!("{path}/")))
            })
        {
            found.push(format!("{path}: {why}"));
        }
    };
    for path in [
        "/etc/rancher",
        "/var/lib/rancher",
        "/var/lib/kubelet",
        "/var/lib/cni",
        "/run/k3s",
        "/run/flannel",
        "/run/nri",
        "/etc/pipeops",
        "/var/lib/pipeops-agent",
        "/usr/local/bin/k3s",
        "/usr/local/bin/pipeops",
    ] {
        look(path.into(), "was there before, or holds files of another program");
    }
    for name in ["kubectl", "crictl", "ctr"] {
        let path = format!("/usr/local/bin/{name}");
        if host.link_target(&path).as_deref() == Some("k3s") {
            look(path, "a link that pipeops did not make");
        }
    }
    let links = ["cni0", "flannel.1", "flannel-wg"].map(|n| format!("/sys/class/net/{n}"));
    for path in links {
        look(path, "a network interface that could not be removed");
    }
    found
}
