//! A copy of the admin kubeconfig for a local user.

use anyhow::Context as _;

use crate::base::error::Failure;
use crate::host::{Host, HostWriter, Owner};
use crate::install::engine::files::{self, digest, make_parent};
use crate::install::engine::journal::PriorState;
use crate::install::plan::StepStatus;
use crate::k3s::paths::ADMIN_KUBECONFIG;

fn path_for(host: &Host, user: &str) -> anyhow::Result<String> {
    let home = host.home_of(user).ok_or_else(|| {
        Failure::usage("USER_UNKNOWN", format!("there is no local user `{user}`"))
            .hint("create it first, or leave --kubeconfig-for out")
    })?;
    Ok(format!("{}/.kube/pipeops.yaml", home.trim_end_matches('/')))
}

/// The admin kubeconfig with an address that works from elsewhere.
fn with_server(admin: &str, server: &str) -> String {
    // it names the port of this k3s, and `[::1]` on a machine without IPv4
    let port = server.rsplit_once(':').map_or("6443", |(_, port)| port);
    ["127.0.0.1", "[::1]"].iter().fold(admin.to_owned(), |text, host| {
        text.replace(&format!("https://{host}:{port}"), server)
    })
}

pub(super) fn check(host: &Host, user: &str, server: &str) -> anyhow::Result<StepStatus> {
    let path = path_for(host, user)?;
    let Some(admin) = host.read(ADMIN_KUBECONFIG)? else {
        return Ok(StepStatus::Later { until: format!("{ADMIN_KUBECONFIG} is there") });
    };
    let unchanged = host.read(&path)?.as_deref() == Some(with_server(&admin, server).as_str());
    Ok(if unchanged && host.mode(&path) == Some(0o600) {
        StepStatus::Done
    } else {
        StepStatus::todo(format!("write {path}"))
    })
}

pub(super) fn before(writer: &HostWriter, id: &str, user: &str) -> anyhow::Result<PriorState> {
    files::prior_state(writer, id, &path_for(writer, user)?)
}

pub(super) fn apply(writer: &HostWriter, user: &str, server: &str) -> anyhow::Result<String> {
    let path = path_for(writer, user)?;
    let admin = writer
        .read(ADMIN_KUBECONFIG)?
        .with_context(|| format!("{ADMIN_KUBECONFIG} is not there"))?;
    make_parent(writer, &path)?;
    let owner = Owner { user: Some(user), group: None };
    if let Some((dir, _)) = path.rsplit_once('/') {
        writer.set_owner(dir, owner)?;
    }
    let text = with_server(&admin, server);
    writer.write(&path, text.as_bytes(), 0o600, owner)?;
    Ok(digest(text.as_bytes()))
}

pub(super) fn undo(writer: &HostWriter, user: &str, before: &PriorState) -> anyhow::Result<()> {
    files::restore(writer, &path_for(writer, user)?, before)
}
