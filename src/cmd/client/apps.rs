//! `apps`, `status`, `history` and `kubeconfig`: what is there.

use serde_json::{Value, json};

use super::{Context, Session, cell, printer};
use crate::base::error::{Exit, Failure};
use crate::cli::{ClusterArgs, OutputArgs, ReachArgs};
use crate::client::applications::{ApplicationRow, ClusterReader, state};
use crate::client::operations::may_have_begun;
use crate::contract::types::Operation;
use crate::host::Host;
use crate::kubernetes::readiness::pods::is_ready;
use crate::kubernetes::readiness::workload::{PodCounts, WorkloadKind};
use crate::output::{Printer, table};

/// A list as JSON, or as a table.
pub(super) fn show(printer: &Printer, items: &[Value], head: &[&str], rows: &[Vec<String>]) {
    printer.document(&json!({"items": items}));
    let text = table(head, rows);
    printer.data(if rows.is_empty() { "none" } else { text.trim_end() });
}

/// # Errors
/// What the control plane or the cluster refuses.
pub(super) async fn apps(
    context: &Context,
    reach: &ReachArgs,
    output: &OutputArgs,
) -> anyhow::Result<Exit> {
    let session = Session::open(context, reach.cluster.context.as_deref())?;
    let namespace = session.namespace(reach.namespace.as_deref())?.map(str::to_owned);
    let cluster = session.cluster(reach.cluster.cluster.as_deref()).await?;
    let reader = ClusterReader { api: &session.api, cluster: &cluster.id };
    let mut rows = Vec::new();
    for place in session.places(&cluster, namespace).await? {
        rows.extend(context.unless_stopped(reader.applications(place.as_deref())).await?);
    }
    let row = |row: &ApplicationRow| {
        vec![
            row.namespace.clone(),
            row.name.clone(),
            row.revision.map_or_else(|| "-".into(), |number| number.to_string()),
            row.image.clone(),
            format!("{}/{}", row.ready, row.wanted),
            if row.host.is_empty() { "-".into() } else { row.host.clone() },
            row.state.to_owned(),
        ]
    };
    let head = ["NAMESPACE", "NAME", "REVISION", "IMAGE", "READY", "HOST", "STATE"];
    let lines: Vec<Vec<String>> = rows.iter().map(row).collect();
    let items: Vec<Value> = rows.iter().map(|row| json!(row)).collect();
    show(&printer(context, output), &items, &head, &lines);
    Ok(Exit::Done)
}

/// # Errors
/// What the control plane or the cluster refuses; exit 7 where there is no such application.
pub(super) async fn status(
    context: &Context,
    name: &str,
    reach: &ReachArgs,
    output: &OutputArgs,
) -> anyhow::Result<Exit> {
    let session = Session::open(context, reach.cluster.context.as_deref())?;
    let (cluster, namespace) = session.find(name, reach).await?;
    let reader = ClusterReader { api: &session.api, cluster: &cluster.id };
    // the agent's own list: it knows what those that run have touched
    let path = format!("/clusters/{}/api/v1/operations", cluster.id);
    let (deployment, revisions, pods, operations) = context
        .unless_stopped(async {
            tokio::try_join!(
                reader.deployment(&namespace, name),
                reader.revisions(&namespace, name),
                reader.pods(&namespace, name),
                session.api.get(&path),
            )
        })
        .await?;
    let (state, note) = state(&deployment);
    let cause = match state {
        "ready" | "stopped" => None,
        _ => context.unless_stopped(reader.diagnose(&deployment)).await?,
    };
    let newest = revisions.first();
    let made_by = newest.map(|row| row.status.operation.clone()).unwrap_or_default();
    let operation = running(&operations, &format!("{namespace}/{name}"), &made_by);
    let counts = PodCounts::of(WorkloadKind::Deployment, &deployment);
    let pods: Vec<Value> = pods.iter().map(pod_row).collect();
    let keeps = cause.as_ref().map(|c| json!({"reason": c.reason, "message": c.message}));
    let document = json!({
        "cluster": {"id": cluster.id, "name": cluster.name},
        "namespace": namespace, "name": name, "state": state, "note": note,
        "revision": newest, "ready": counts.ready, "wanted": counts.wanted,
        "keeps": keeps, "operation": operation, "pods": pods,
    });
    let printer = printer(context, output);
    printer.document(&document);
    for line in status_lines(&document) {
        printer.data(&line);
    }
    let is_well = cause.is_none() && state != "failed";
    Ok(if is_well { Exit::Done } else { Exit::Problems })
}

/// The operation that changes an application now: the one that made its newest revision, or one
/// that has touched its Deployment.
fn running(operations: &Value, title: &str, made_by: &str) -> Option<Operation> {
    let deployment = format!("Deployment {title}");
    let all = operations["items"].as_array().into_iter().flatten();
    all.filter_map(|item| serde_json::from_value::<Operation>(item.clone()).ok())
        .filter(|operation| !operation.state.ended())
        .find(|operation| {
            operation.id == made_by || operation.objects.iter().any(|o| o.object == deployment)
        })
}

fn pod_row(pod: &Value) -> Value {
    let statuses = pod["status"]["containerStatuses"].as_array();
    let restarts: u64 =
        statuses.into_iter().flatten().filter_map(|s| s["restartCount"].as_u64()).sum();
    let ending = !pod["metadata"]["deletionTimestamp"].is_null();
    json!({
        "name": pod["metadata"]["name"], "ready": is_ready(pod),
        "state": if ending { json!("Terminating") } else { pod["status"]["phase"].clone() },
        "restarts": restarts, "node": pod["spec"]["nodeName"],
    })
}

fn status_lines(status: &Value) -> Vec<String> {
    let note = match status["note"].as_str() {
        Some(note) if !note.is_empty() => format!(" ({note})"),
        _ => String::new(),
    };
    let mut lines = vec![format!(
        "{}/{} on {}: {}{note}",
        cell(&status["namespace"]),
        cell(&status["name"]),
        cell(&status["cluster"]["name"]),
        cell(&status["state"]),
    )];
    let revision = &status["revision"];
    if !revision.is_null() {
        lines.push(format!(
            "revision   {} {}, of {} by {}",
            revision["revision"],
            cell(&revision["state"]),
            cell(&revision["created_at"]),
            cell(&revision["subject"])
        ));
        lines.push(format!("image      {}", cell(&revision["image"])));
    }
    lines.push(format!("pods       {} of {} ready", status["ready"], status["wanted"]));
    let keeps = &status["keeps"];
    if !keeps.is_null() {
        lines.push(format!("keeps it   {}: {}", cell(&keeps["reason"]), cell(&keeps["message"])));
    }
    let operation = &status["operation"];
    if !operation.is_null() {
        lines.push(format!(
            "going on   {} {} ({}): {}",
            cell(&operation["kind"]),
            cell(&operation["id"]),
            cell(&operation["state"]),
            cell(&operation["message"])
        ));
    }
    let pods: Vec<Vec<String>> = status["pods"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|pod| ["name", "ready", "state", "restarts", "node"].map(|f| cell(&pod[f])).to_vec())
        .collect();
    if !pods.is_empty() {
        lines.push(String::new());
        let text = table(&["POD", "READY", "STATE", "RESTARTS", "NODE"], &pods);
        lines.extend(text.lines().map(str::to_owned));
    }
    lines
}

/// # Errors
/// What the control plane or the cluster refuses.
pub(super) async fn history(
    context: &Context,
    name: &str,
    reach: &ReachArgs,
    output: &OutputArgs,
) -> anyhow::Result<Exit> {
    let session = Session::open(context, reach.cluster.context.as_deref())?;
    let (cluster, namespace) = session.find(name, reach).await?;
    let reader = ClusterReader { api: &session.api, cluster: &cluster.id };
    let revisions = context.unless_stopped(reader.revisions(&namespace, name)).await?;
    let items: Vec<Value> = revisions.iter().map(|revision| json!(revision)).collect();
    let row = |row: &Value| {
        let note = match row["rollback_to"].as_u64() {
            Some(number) => format!("brings {number} back"),
            None => "-".into(),
        };
        let fields = ["revision", "state", "created_at", "subject", "image"];
        [fields.map(|field| cell(&row[field])).to_vec(), vec![note]].concat()
    };
    let lines: Vec<Vec<String>> = items.iter().map(row).collect();
    let head = ["REVISION", "STATE", "CREATED", "BY", "IMAGE", "NOTE"];
    show(&printer(context, output), &items, &head, &lines);
    Ok(Exit::Done)
}

/// # Errors
/// What the control plane refuses; exit 2 for a file that cannot be written.
pub(super) async fn kubeconfig(
    context: &Context,
    write: Option<&str>,
    args: &ClusterArgs,
) -> anyhow::Result<Exit> {
    let session = Session::open(context, args.context.as_deref())?;
    let cluster = session.cluster(args.cluster.as_deref()).await?;
    let path = format!("/api/v1/clusters/{}/kubeconfig", cluster.id);
    let stopped = || undelivered(Failure::new(Exit::Interrupted, "INTERRUPTED", "interrupted"));
    let asked = async { session.api.post(&path, None, &json!({})).await.map_err(undelivered) };
    let text = context.or_stopped(asked, stopped).await?;
    let mut printer = Printer::new(false, false, context.no_color());
    match write {
        Some(file) => {
            Host::new("/", None).write_user_file(file, &text)?;
            printer.say(&format!("{file} (mode 0600) opens {} for a day", cluster.name));
        }
        None => printer.data_with_secrets(text.trim_end()),
    }
    Ok(Exit::Done)
}

/// A request that failed on its way may have been carried out all the same.
fn undelivered(failure: Failure) -> Failure {
    if !may_have_begun(&failure) {
        return failure;
    }
    failure.why(
        "a kubeconfig may have been made all the same: nobody has it, and it ends with the day, or \
         with your own token",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_goes_on_is_the_operation_of_this_application() {
        let item = |id: &str, state: &str, object: &str| {
            json!({"id": id, "kind": "scale", "state": state,
                "objects": [{"object": object, "outcome": "scaled"}]})
        };
        let all = json!({"items": [
            item("o-1", "succeeded", "Deployment beta/web"),
            item("o-2", "running", "Deployment beta/api"),
            item("o-3", "running", "Deployment beta/web"),
            item("o-4", "queued", ""),
        ]});
        let found = |title: &str, made: &str| running(&all, title, made).map(|o| o.id);
        assert_eq!(found("beta/web", ""), Some("o-3".into()));
        assert_eq!(found("beta/new", "o-4"), Some("o-4".into()));
        assert_eq!(found("beta/none", "o-1"), None);
    }

    #[test]
    fn a_status_says_what_keeps_it_and_what_goes_on() {
        let status = json!({
            "cluster": {"id": "c", "name": "eu"}, "namespace": "beta", "name": "web",
            "state": "rolling out", "note": "1 of 2 pods available", "ready": 1, "wanted": 2,
            "revision": {"revision": 4, "state": "deploying", "created_at": "t",
                "subject": "user:eve", "image": "web:4"},
            "keeps": {"reason": "crash_loop", "message": "exits with 1"},
            "operation": {"id": "o-1", "kind": "deploy", "state": "running", "message": "waits"},
            "pods": [{"name": "web-1", "ready": true, "state": "Running", "restarts": 0,
                "node": null}],
        });
        let text = status_lines(&status).join("\n");
        for line in [
            "beta/web on eu: rolling out (1 of 2 pods available)\n",
            "\nrevision   4 deploying, of t by user:eve\n",
            "\nkeeps it   crash_loop: exits with 1\n",
            "\ngoing on   deploy o-1 (running): waits\n",
            "\nPOD     READY   STATE     RESTARTS   NODE\nweb-1   true    Running   0          -",
        ] {
            assert!(text.contains(line), "{text}");
        }
    }
}
