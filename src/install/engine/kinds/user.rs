//! The system user and group that the agent runs as. What of the two was there before stays at the
//! undo.

use std::time::Duration;

use crate::host::{Host, HostWriter};
use crate::install::engine::journal::PriorState;
use crate::install::plan::StepStatus;

const QUICK: Duration = Duration::from_secs(20);
/// What of an account was made here, in the journal.
const USER: &str = "user";
const GROUP: &str = "group";

pub(super) fn check(host: &Host, name: &str) -> StepStatus {
    match (host.id_of("/etc/passwd", name), host.id_of("/etc/group", name)) {
        (Some(_), Some(_)) => StepStatus::Done,
        (None, None) => StepStatus::todo(format!("create the system user and group {name}")),
        (None, Some(_)) => StepStatus::todo(format!(
            "create the system user {name} in the group of that name, which is there"
        )),
        (Some(_), None) => StepStatus::todo(format!(
            "create the group {name} for the user of that name, which is there"
        )),
    }
}

pub(super) fn before(host: &Host, name: &str) -> PriorState {
    let lacks = |file: &str| host.id_of(file, name).is_none();
    let made = [(USER, "/etc/passwd"), (GROUP, "/etc/group")]
        .into_iter()
        .filter(|(_, file)| lacks(file))
        .map(|(what, _)| what.to_owned());
    PriorState::Absent { made: made.collect() }
}

pub(super) async fn apply(writer: &HostWriter, name: &str) -> anyhow::Result<()> {
    let group = writer.id_of("/etc/group", name).is_some();
    if writer.id_of("/etc/passwd", name).is_some() {
        if !group {
            writer.run("groupadd", &["--system", name], QUICK).await?;
        }
        return Ok(());
    }
    let home = format!("/var/lib/{name}");
    let nologin =
        if writer.exists("/usr/sbin/nologin") { "/usr/sbin/nologin" } else { "/sbin/nologin" };
    let mut args = vec!["--system"];
    // useradd uses an existing group of the same name only with --gid
    if group {
        args.extend(["--gid", name])
    } else {
        args.push("--user-group")
    }
    args.extend(["--no-create-home", "--home-dir", &home, "--shell", nologin, name]);
    writer.run("useradd", &args, QUICK).await.map(drop)
}

pub(super) async fn undo(
    writer: &HostWriter,
    name: &str,
    before: &PriorState,
) -> anyhow::Result<()> {
    let made = |what: &str| match before {
        // journals of 0.1.0 name neither: it made both
        PriorState::Absent { made } => made.is_empty() || made.iter().any(|m| m == what),
        _ => false,
    };
    let gid = writer.id_of("/etc/group", name);
    if made(USER) && writer.id_of("/etc/passwd", name).is_some() {
        writer.run("userdel", &[name], QUICK).await?;
    }
    match (made(GROUP), gid, writer.id_of("/etc/group", name)) {
        (true, _, Some(_)) => writer.run("groupdel", &[name], QUICK).await.map(drop),
        // userdel takes the user's own group with it (login.defs, USERGROUPS_ENAB); this one is not
        // ours
        (false, Some(gid), None) => writer
            .run("groupadd", &["--system", "--gid", &gid.to_string(), name], QUICK)
            .await
            .map(drop),
        _ => Ok(()),
    }
}
