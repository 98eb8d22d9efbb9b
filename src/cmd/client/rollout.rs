//! Operations on many clusters: begun, followed cluster by cluster; and `rollout`, which shows and
//! steers those that were begun.

use serde_json::{Value, json};

use super::apps::show;
use super::operation::Request;
use super::{Context, Session, cell, printer};
use crate::base::error::{Exit, Failure};
use crate::base::text::printable;
use crate::cli::{FollowArgs, RolloutArgs, RolloutCommand};
use crate::client::operations::fresh_key;
use crate::client::rollouts;
use crate::output::{Printer, table};

/// The command that lists rollouts, for hints.
pub(super) fn look(context: Option<&str>) -> String {
    let context = context.map(|name| format!(" --context {name}")).unwrap_or_default();
    format!("pipeops rollout list{context}")
}

/// Ids of the clusters that are meant, to be counted before they are changed: then it is they and
/// no others.
///
/// # Errors
/// Exit 2 where there are none; what the control plane refuses.
pub(super) async fn meant(
    session: &Session<'_>,
    rollout: &RolloutArgs,
) -> anyhow::Result<Vec<String>> {
    let mut path = "/api/v1/clusters".to_owned();
    if let Some(selector) = &rollout.selector {
        path += "?selector=";
        path.extend(url::form_urlencoded::byte_serialize(selector.as_bytes()));
    }
    let list = session.context.unless_stopped(session.api.get(&path)).await?;
    let items = list["items"].as_array().into_iter().flatten();
    let items = items.filter(|cluster| cluster["state"] != "revoked");
    let ids: Vec<String> =
        items.filter_map(|cluster| Some(cluster["id"].as_str()?.to_owned())).collect();
    if ids.is_empty() {
        return Err(Failure::usage("NO_CLUSTER_MATCHES", "no cluster is meant")
            .hint("`pipeops clusters` lists those within reach, with their labels")
            .into());
    }
    Ok(ids)
}

/// Asks for an operation on many clusters, and follows it. `clusters`: those, and not all that the
/// options name.
///
/// # Errors
/// What is refused; as the first operation that failed.
pub(super) async fn carry_out(
    session: &Session<'_>,
    request: &Request,
    clusters: Option<Vec<String>>,
    (rollout, follow): (&RolloutArgs, &FollowArgs),
) -> anyhow::Result<Exit> {
    let key = follow.idempotency_key.clone().unwrap_or_else(fresh_key);
    let mut body = json!({"kind": request.kind, "spec": request.spec});
    let is_list = clusters.is_some();
    match (clusters, &rollout.selector) {
        (Some(clusters), _) => body["clusters"] = json!(clusters),
        (None, Some(selector)) => body["selector"] = selector.as_str().into(),
        (None, None) => body["all"] = true.into(),
    }
    if let Some(waves) = &rollout.waves {
        body["waves"] = waves.as_str().into();
    }
    if let Some(ttl) = rollout.ttl {
        body["ttl_s"] = ttl.into();
    }
    let asked = async {
        let asked = rollouts::begin(&session.api, &body, &key).await;
        asked.map_err(|failure| match is_list && failure.code == "IDEMPOTENCY_MISMATCH" {
            // it asks for the clusters that were counted, and not for what names them
            true => failure.hint(
                "another answer than --yes, or a cluster that has come or gone, makes it something \
                 else: `pipeops rollout list` shows whether the first one was begun",
            ),
            false => request.undecided(failure, &key),
        })
    };
    let stopped = Failure::new(Exit::Interrupted, "INTERRUPTED", "interrupted");
    let stopped = || request.undecided(stopped, &key);
    let begun = session.context.or_stopped(asked, stopped).await?;
    let mut printer = printer(session.context, &follow.output);
    let id = begun["id"].as_str().unwrap_or_default();
    if follow.detach {
        printer.document(&begun);
        printer.data(id);
        printer.say(&format!("it goes on by itself; to look: pipeops rollout status {id}"));
        return Ok(Exit::Done);
    }
    let count = &begun["counts"]["total"];
    printer
        .say(&format!("rollout {id}: {} of {} on {count} clusters", request.kind, request.title));
    watch(session, &mut printer, id).await
}

/// Follows a rollout, and ends as it ends. Ctrl-C ends the command, never the rollout.
async fn watch(session: &Session<'_>, printer: &mut Printer, id: &str) -> anyhow::Result<Exit> {
    printer.waiting("waiting for the clusters");
    let told = |cluster: &Value| printer.say(&cluster_line(cluster));
    let followed = tokio::select! {
        biased;
        () = session.context.stop.cancelled() => {
            let what = "stopped watching; the rollout goes on";
            Err(Failure::new(Exit::Interrupted, "DETACHED", what))
        }
        followed = rollouts::follow(&session.api, id, told) => followed,
    };
    printer.waited();
    let rollout = followed.map_err(|failure| {
        let look = format!("to look how far it is: pipeops rollout status {id}");
        failure.why(format!("rollout {id} goes on by itself")).hint(look)
    })?;
    printer.document(&rollout);
    printer.data(&rollouts::summary(&rollout));
    match rollouts::failure(&rollout) {
        Some(failure) => Err(failure.into()),
        None => Ok(Exit::Done),
    }
}

/// `eu-1: failed (crash_loop): exits with 1`.
fn cluster_line(cluster: &Value) -> String {
    let more = |field: &str, before: &str, after: &str| match cluster[field].as_str() {
        Some(text) if !text.is_empty() => format!("{before}{text}{after}"),
        _ => String::new(),
    };
    let (reason, message) = (more("reason", " (", ")"), more("message", ": ", ""));
    // what went well says nothing of itself
    let message = if cluster["state"] == "succeeded" { String::new() } else { message };
    let line = format!("{}: {}{reason}{message}", cell(&cluster["name"]), cell(&cluster["state"]));
    // an agent's words are one line
    format!("  {}", printable(&line))
}

/// # Errors
/// What the control plane refuses; as the rollout ends, where it is followed.
pub(super) async fn rollout(context: &Context, command: RolloutCommand) -> anyhow::Result<Exit> {
    match command {
        RolloutCommand::List { limit, context: name, output } => {
            let session = Session::open(context, name.as_deref())?;
            let path = format!("/api/v1/rollouts?limit={limit}");
            let list = context.unless_stopped(session.api.get(&path)).await?;
            let items = list["items"].as_array().cloned().unwrap_or_default();
            let row = |row: &Value| {
                let fields = ["id", "kind", "created_at", "subject"];
                [fields.map(|field| cell(&row[field])).to_vec(), vec![rollouts::summary(row)]]
                    .concat()
            };
            let lines: Vec<Vec<String>> = items.iter().map(row).collect();
            let head = ["ID", "KIND", "CREATED", "BY", "STATE"];
            show(&printer(context, &output), &items, &head, &lines);
            Ok(Exit::Done)
        }
        RolloutCommand::Status(reach) => {
            let session = Session::open(context, reach.context.as_deref())?;
            let shown = rollouts::show(&session.api, path_id(&reach.id)?);
            let rollout = context.unless_stopped(shown).await?;
            let printer = printer(context, &reach.output);
            printer.document(&rollout);
            status_lines(&rollout).iter().for_each(|line| printer.data(line));
            let is_well = matches!(rollout["state"].as_str(), Some("running" | "succeeded"));
            Ok(if is_well { Exit::Done } else { Exit::Problems })
        }
        RolloutCommand::Resume { detach, reach } => {
            let session = Session::open(context, reach.context.as_deref())?;
            let resumed = rollouts::resume(&session.api, path_id(&reach.id)?);
            let rollout = context.unless_stopped(resumed).await?;
            let mut printer = printer(context, &reach.output);
            if detach {
                printer.document(&rollout);
                printer.data(&rollouts::summary(&rollout));
                return Ok(Exit::Done);
            }
            watch(&session, &mut printer, &reach.id).await
        }
        RolloutCommand::Cancel(reach) => {
            let session = Session::open(context, reach.context.as_deref())?;
            let cancelled = rollouts::cancel(&session.api, path_id(&reach.id)?);
            let rollout = context.unless_stopped(cancelled).await?;
            let printer = printer(context, &reach.output);
            printer.document(&rollout);
            printer.data(&rollouts::summary(&rollout));
            Ok(Exit::Done)
        }
    }
}

/// An id as it may stand in a path.
fn path_id(id: &str) -> Result<&str, Failure> {
    if id.strip_prefix("ro-").is_some_and(|rest| rest.bytes().all(|b| b.is_ascii_alphanumeric())) {
        return Ok(id);
    }
    let what = format!("`{id}` is no id of a rollout");
    Err(Failure::usage("ROLLOUT_UNKNOWN", what).hint("`pipeops rollout list` shows them"))
}

fn status_lines(rollout: &Value) -> Vec<String> {
    let mut lines = vec![format!(
        "{} of {}, by {}: {}",
        cell(&rollout["kind"]),
        cell(&rollout["created_at"]),
        cell(&rollout["subject"]),
        rollouts::summary(rollout)
    )];
    if let Some(message) = rollout["message"].as_str().filter(|message| !message.is_empty()) {
        lines.push(printable(message).into_owned());
    }
    for (n, wave) in rollout["waves"].as_array().into_iter().flatten().enumerate() {
        let (clusters, state) = (&wave["clusters"], cell(&wave["state"]));
        lines.push(format!("wave {}     {clusters} clusters, {state}", n + 1));
    }
    let clusters = rollout["clusters"].as_array().into_iter().flatten();
    let fields = ["name", "id", "wave", "state", "operation", "reason", "message"];
    let rows: Vec<Vec<String>> =
        clusters.map(|cluster| fields.map(|field| cell(&cluster[field])).to_vec()).collect();
    let head = ["CLUSTER", "ID", "WAVE", "STATE", "OPERATION", "REASON", "MESSAGE"];
    lines.push(String::new());
    lines.extend(table(&head, &rows).lines().map(str::to_owned));
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cluster_that_ends_has_a_line() {
        let line = |state: &str, reason: &str, message: &str| {
            cluster_line(&json!({"name": "eu-1", "state": state, "reason": reason,
                "message": message}))
        };
        assert_eq!(line("succeeded", "", "1 of 1"), "  eu-1: succeeded");
        let failed = line("failed", "crash_loop", "exits with 1");
        assert_eq!(failed, "  eu-1: failed (crash_loop): exits with 1");
        assert_eq!(line("expired", "", "was not there"), "  eu-1: expired: was not there");
        // no answer adds a line by what it says
        let forged = line("failed", "crash_loop", "no\n  eu-2: succeeded");
        assert_eq!(forged.lines().count(), 1, "{forged}");
    }

    #[test]
    fn a_status_has_the_waves_and_each_cluster() {
        let rollout = json!({
            "kind": "restart", "created_at": "t", "subject": "user:eve", "state": "paused",
            "message": "eu-1: crash_loop; 1 cluster waits\neu-1      c-1   1      succeeded",
            "counts": {"total": 2, "succeeded": 0, "failed": 1, "waiting": 1},
            "waves": [{"clusters": 1, "state": "done"}, {"clusters": 1, "state": "waiting"}],
            "clusters": [{"id": "c-1", "name": "eu-1", "wave": 1, "state": "failed",
                "operation": "o-1", "reason": "crash_loop", "message": "exits with 1"},
                {"id": "c-2", "name": "eu-2", "wave": 2, "state": "waiting"}],
        });
        let text = status_lines(&rollout).join("\n");
        for line in [
            "restart of t, by user:eve: paused: 0 of 2 clusters succeeded, 1 failed, 1 waiting\n",
            "\neu-1: crash_loop; 1 cluster waits\\u{a}eu-1 ",
            "\nwave 2     1 clusters, waiting\n",
            "\neu-1      c-1   1      failed",
        ] {
            assert!(text.contains(line), "{text}");
        }
    }

    #[test]
    fn an_id_is_no_path() {
        assert!(path_id("ro-0123456789abcdef").is_ok());
        for wrong in ["", "o-1", "ro-1/resume", "ro-1?x", "ro-../clusters"] {
            assert_eq!(path_id(wrong).unwrap_err().code, "ROLLOUT_UNKNOWN", "{wrong}");
        }
    }
}
