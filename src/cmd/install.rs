//! `install-server`: facts, checks, plan, confirmation, engine, verification; `NODE_TYPE=agent`
//! runs `join-worker`.

use super::Context;
use super::installer::Installer;
use crate::base::error::{Exit, Failure};
use crate::cli::{InstallServerArgs, JoinWorkerArgs};
use crate::install::{components, planner, release};
use crate::k3s::role::NodeRole;

/// # Errors
/// As in the table of exit codes.
pub async fn server(context: &Context, args: InstallServerArgs) -> anyhow::Result<Exit> {
    match args.node_type.as_str() {
        "server" => {}
        "agent" => return worker_by_environment(context, args).await,
        other => {
            return Err(Failure::usage(
                "NODE_TYPE",
                format!("NODE_TYPE is `{other}`; it is server or agent"),
            )
            .into());
        }
    }
    let begin =
        Installer::begin(context, "install-server", args.options, args.run, NodeRole::Server);
    let mut installer = context.unless_stopped(begin).await?;
    let result = run_install(&mut installer).await;
    installer.end(result)
}

async fn worker_by_environment(context: &Context, args: InstallServerArgs) -> anyhow::Result<Exit> {
    let missing: Vec<&str> = [
        ("K3S_URL", args.k3s_url.is_none()),
        ("K3S_TOKEN", context.k3s_token.is_none() && args.token_file.is_none()),
    ]
    .iter()
    .filter(|(_, m)| *m)
    .map(|(n, _)| *n)
    .collect();
    let Some(master) = args.k3s_url.filter(|_| missing.is_empty()) else {
        return Err(Failure::usage(
            "NODE_TYPE",
            format!("NODE_TYPE=agent needs K3S_URL and K3S_TOKEN; missing: {}", missing.join(", ")),
        )
        .hint("both stand in the line of `pipeops cluster-info --join` on the server")
        .into());
    };
    let join = JoinWorkerArgs {
        master,
        token: None,
        token_file: args.token_file,
        insecure_token: false,
        options: args.options,
        run: args.run,
    };
    super::join::worker(context, join).await
}

async fn run_install(installer: &mut Installer<'_>) -> anyhow::Result<Exit> {
    let version = release::version(
        &installer.host,
        &installer.settings,
        &installer.facts,
        installer.journal.as_ref(),
        None,
    );
    let version = installer.context.unless_stopped(version).await?;
    let offline = installer.settings.options.offline_dir.is_some();
    let selected = components::selected(
        installer.settings.components.as_deref(),
        offline && installer.settings.components.is_none(),
    );
    let findings = installer.check(Some(&version), &selected)?;
    if offline && installer.settings.components.is_none() {
        installer.printer.say(
            "note: no components: the offline directory has no chart archives (--components names \
             what to try anyway)",
        );
    }
    if installer.settings.options.acme_email.is_some()
        && selected.iter().all(|component| component.name != "cert-manager")
    {
        installer
            .printer
            .say("note: --acme-email does nothing without cert-manager: name it in --components");
    }
    let release = installer.resolve(version).await?;
    let plan = planner::server_plan(&installer.facts, &installer.settings, &release, &selected);
    let Some(outcome) = installer.carry_out(plan, findings).await? else { return Ok(Exit::Done) };
    let name = installer.settings.node_name(&installer.facts.hostname);
    if !installer.printer.json() {
        installer.printer.data(&format!("{name} is a k3s {} server, Ready.", release.version));
        installer
            .printer
            .data("  kubectl get nodes                  (as root; or --kubeconfig-for USER)");
        installer.printer.data("  pipeops cluster-info --join        the line that adds a worker");
        if installer.context.agent_token.is_none()
            && installer.settings.options.agent_token_file.is_none()
        {
            installer
                .printer
                .data("  the agent waits, unenrolled: run again with AGENT_TOKEN to register it");
        }
    }
    Ok(if outcome.failed.is_empty() { Exit::Done } else { Exit::Partial })
}
