//! `join-worker`: the server is checked over the wire before the first local write.

use std::io::Read as _;

use super::installer::Installer;
use super::{Context, UNASKED};
use crate::base::cidr::Cidr;
use crate::base::encoding::hex;
use crate::base::error::{Exit, Failure};
use crate::base::resolve::lookup;
use crate::base::secret::{Secret, register_secret};
use crate::base::text::quoted;
use crate::cli::JoinWorkerArgs;
use crate::host::paths::JOIN_TOKEN;
use crate::install::checks::InstallTarget;
use crate::install::engine::journal::Journal;
use crate::install::facts::Facts;
use crate::install::finding::{Finding, Level};
use crate::install::join::{self, JoinClient};
use crate::install::plan::{FileContent, Plan, Resource, SCHEMA, SecretName, Step};
use crate::install::planner::config::JoinServer;
use crate::install::{planner, release};
use crate::k3s::paths::NODE_PASSWORD;
use crate::k3s::role::NodeRole;
use crate::k3s::token::{Token, trimmed};
use crate::k3s::user_input;
use crate::k3s::version::Version;

/// # Errors
/// As in the table of exit codes.
pub async fn worker(context: &Context, args: JoinWorkerArgs) -> anyhow::Result<Exit> {
    let url = user_input::server_url(&args.master)
        .map_err(|why| Failure::usage("MASTER_INVALID", why))?;
    let insecure = args.insecure_token;
    let begin = Installer::begin(context, "join-worker", args.options, args.run, NodeRole::Worker);
    let mut installer = context.unless_stopped(begin).await?;
    installer.typed.insert(0, quoted(&args.master));
    installer.typed.insert(
        1,
        match &args.token_file {
            Some(path) => {
                format!("--token-file {}", quoted(&installer.host.absolute_user_path(path)))
            }
            None => "TOKEN".into(),
        },
    );
    installer.typed.extend(insecure.then(|| "--insecure-token".to_owned()));
    let result = async {
        joins(&installer, &url)?;
        let token = token(&installer, args.token.as_deref(), args.token_file.as_deref()).await?;
        join(&mut installer, &url, token, insecure).await
    }
    .await;
    installer.end(result)
}

/// Where the token comes from: the argument or `-`, a file, the environment; on a re-run the one
/// that is there.
async fn token(
    installer: &Installer<'_>,
    argument: Option<&str>,
    file: Option<&str>,
) -> anyhow::Result<Secret> {
    // main has put a token typed as argument, or K3S_TOKEN, out of sight already
    if let Some(path) = file {
        return installer.context.token_file(&installer.host, path).await;
    }
    if let Some(secret) = &installer.context.k3s_token {
        return Ok(secret.clone());
    }
    if argument == Some("-") {
        return installer.context.token_file(&installer.host, "-").await;
    }
    match installer.host.read(JOIN_TOKEN) {
        Ok(Some(text)) => Ok(Secret::new(text.trim())),
        _ => Err(Failure::usage("TOKEN_MISSING", "a join token is needed")
            .hint(
                "give it as second argument, as - on standard input, with --token-file, or in \
                 K3S_TOKEN; `pipeops cluster-info --join` on the server prints it",
            )
            .into()),
    }
}

async fn join(
    installer: &mut Installer<'_>,
    url: &str,
    secret: Secret,
    insecure: bool,
) -> anyhow::Result<Exit> {
    // what goes into k3s' token file is the token alone
    let secret = Secret::new(trimmed(secret.expose()));
    register_secret(secret.expose());
    let token = Token::parse(secret.expose()).map_err(|why| {
        Failure::usage("JOIN_TOKEN_MALFORMED", "this is not a k3s join token")
            .why(why)
            .hint("get a fresh line on the server with `pipeops cluster-info --join`")
    })?;
    installer.secrets.insert(SecretName::K3sToken, secret);
    let context = installer.context;
    context.unless_stopped(choose_route(&mut installer.facts, url)).await?;
    // local checks that need no version come first: they cost the server nothing
    let provisional = release::version(
        &installer.host,
        &installer.settings,
        &installer.facts,
        installer.journal.as_ref(),
        None,
    );
    let provisional = context.unless_stopped(provisional).await?;
    let joined = installer.journal.is_some()
        && installer.host.exists(JOIN_TOKEN)
        && installer.facts.k3s.active;
    let server = match context.unless_stopped(join::connect(url, token, insecure)).await {
        // a worker that is up already can be checked and changed while its server is away
        Err(error) if joined && Failure::from_error(&error).exit == Exit::Network => {
            installer.printer.say(&format!("note: {error} – going on with what is known"));
            return install(installer, url, provisional, None, joined).await;
        }
        other => other?,
    };
    installer.facts.clock.offset = server.clock_offset.map(|offset| (offset, url.to_owned()));
    if !joined {
        context.unless_stopped(server.authorize()).await?;
    }
    install(installer, url, provisional, Some(&server), joined).await
}

async fn install(
    installer: &mut Installer<'_>,
    url: &str,
    provisional: Version,
    server: Option<&JoinClient>,
    joined: bool,
) -> anyhow::Result<Exit> {
    // what needs no version stops the run before the name is reserved; the version is the server's,
    // unless said
    let known = installer.journal.is_some()
        || installer.settings.version.is_some()
        || installer.settings.channel.is_some();
    let mut findings = installer.check(known.then_some(&provisional), &[])?;
    let Some(server) = server else {
        return finish(installer, url, provisional, &mut findings).await;
    };
    let node = installer.settings.node_name(&installer.facts.hostname);
    installer.secrets.insert(SecretName::NodePassword, node_password(installer)?);
    if installer.run.read_only() {
        if !known {
            installer.printer.say(
                "note: a dry run does not reserve the name, so it cannot ask for the server's \
                 version; the default is shown",
            );
        }
        return finish(installer, url, provisional, &mut findings).await;
    }
    if !installer.run.yes && installer.run.apply_plan.is_none() && installer.journal.is_none() {
        let question = format!("reserve the name {node} at {url} and plan the join?");
        installer.context.confirm(&mut installer.printer, &question, UNASKED).await?;
    }
    let mut result = match reserve(installer, server, &node).await {
        Ok(version) => finish(installer, url, version, &mut findings).await,
        // a worker that is up needs its token no more: it may have expired since
        Err(error)
            if joined
                && !["VERSION_SKEW", "INTERRUPTED"]
                    .contains(&Failure::from_error(&error).code.as_str()) =>
        {
            installer
                .printer
                .say(&format!("note: the server's version was not asked for: {error}"));
            finish(installer, url, provisional, &mut findings).await
        }
        Err(error) => Err(error),
    };
    let refused = |error: &anyhow::Error| Failure::from_error(error).code == "NODE_NAME_TAKEN";
    if installer.journal.is_none() && result.as_ref().is_err_and(|e| !refused(e)) {
        // the name is ours on the server: keep the password, or this machine could not come back
        // under it
        keep_password(installer, url).await;
        result = result.map_err(|error| {
            let mut failure = Failure::from_error(&error);
            failure.why.retain(|why| why != "nothing was changed");
            failure.into()
        });
    }
    result
}

/// Whether a saved plan joins the server that is named now.
fn joins(installer: &Installer<'_>, url: &str) -> Result<(), Failure> {
    let planned = installer.saved.as_ref().and_then(|saved| saved.plan.options.get("server"));
    match planned.filter(|planned| *planned != url) {
        Some(planned) => {
            let what = format!("this plan joins {planned}, not {url}");
            let hint = "name that server, or make a new plan with --plan-out";
            Err(Failure::usage("PLAN_OPTIONS", what).hint(hint))
        }
        None => Ok(()),
    }
}

/// Ties the name to this machine on the server, and settles the version.
async fn reserve(
    installer: &mut Installer<'_>,
    server: &JoinClient,
    node: &str,
) -> anyhow::Result<Version> {
    let Some(password) = installer.secrets.get(&SecretName::NodePassword).cloned() else {
        anyhow::bail!("no node password")
    };
    let server_version = tokio::select! {
        version = server.reserve(node, &password) => version?,
        // the server may have taken the name by then
        () = installer.context.stop.cancelled() => {
            let what = "interrupted while the server was asked for the name";
            return Err(Failure::new(Exit::Interrupted, "INTERRUPTED", what).into());
        }
    };
    if installer
        .settings
        .version
        .as_ref()
        .is_some_and(|ours| (ours.major, ours.minor) > (server_version.major, server_version.minor))
    {
        return Err(Failure::new(
            Exit::Preflight,
            "VERSION_SKEW",
            format!("a worker must not be newer than its server ({server_version})"),
        )
        .why(format!(
            "asked for {}",
            installer.settings.version.as_ref().map(ToString::to_string).unwrap_or_default()
        ))
        .hint("leave --k3s-version out: the server's version is taken")
        .into());
    }
    installer.printer.say(&format!(
        "the server has reserved the name {node} for this machine; it runs k3s {server_version}"
    ));
    let version = release::version(
        &installer.host,
        &installer.settings,
        &installer.facts,
        None,
        Some(&server_version),
    );
    installer.context.unless_stopped(version).await
}

async fn finish(
    installer: &mut Installer<'_>,
    url: &str,
    version: Version,
    findings: &mut Vec<Finding>,
) -> anyhow::Result<Exit> {
    let late: Vec<Finding> = crate::install::checks::run(
        &installer.facts,
        &InstallTarget { settings: &installer.settings, version: Some(&version), components: &[] },
    )
    .into_iter()
    .filter(|f| f.level == Level::Error && !findings.contains(f))
    .collect();
    if !late.is_empty() {
        *findings = installer.check(Some(&version), &[])?;
    }
    let release = installer.resolve(version).await?;
    let plan = planner::worker_plan(
        &installer.facts,
        &installer.settings,
        &release,
        &JoinServer { url: url.to_owned() },
    );
    let Some(_) = installer.carry_out(plan, findings.clone()).await? else { return Ok(Exit::Done) };
    let name = installer.settings.node_name(&installer.facts.hostname);
    installer.printer.data(&format!("{name} is a k3s {} worker of {url}, Ready.", release.version));
    Ok(Exit::Done)
}

/// The password that ties the name to this machine: the one that is there, or a new one (format as
/// in k3s, pkg/agent/config).
fn node_password(installer: &Installer<'_>) -> anyhow::Result<Secret> {
    if let Some(text) = installer.host.read(NODE_PASSWORD)? {
        return Ok(Secret::new(text));
    }
    Ok(Secret::new(format!("{}\n", hex(&random()?))))
}

#[expect(clippy::disallowed_types, reason = "the kernel's random source is no file of the machine")]
fn random() -> anyhow::Result<[u8; 16]> {
    let mut bytes = [0; 16];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// Writes the node password, and nothing else, through the engine, so that uninstall knows of it.
async fn keep_password(installer: &mut Installer<'_>, url: &str) {
    let Some(writer) = &installer.writer else { return };
    let want = Resource::File {
        path: NODE_PASSWORD.into(),
        content: FileContent::Secret(SecretName::NodePassword),
        mode: 0o600,
        group: None,
    };
    let step = Step {
        id: "node-password".into(),
        title: "keep the node password".into(),
        why: "the name is reserved".into(),
        want,
        optional: false,
    };
    let plan = Plan {
        schema: SCHEMA.into(),
        command: "join-worker".into(),
        role: NodeRole::Worker,
        node: installer.settings.node_name(&installer.facts.hostname),
        k3s_version: String::new(),
        machine_id: installer.facts.machine_id.clone(),
        options: std::iter::once(("server".to_owned(), url.to_owned())).collect(),
        inputs: std::collections::BTreeMap::new(),
        steps: vec![step],
    };
    let mut journal = Journal::new(NodeRole::Worker, &plan.node, "");
    let stop = tokio_util::sync::CancellationToken::new();
    let done = crate::install::engine::apply(
        writer,
        &plan,
        &installer.secrets,
        &mut journal,
        &stop,
        &mut |_| {},
    )
    .await;
    match done {
        Ok(_) => installer.printer.say(&format!(
            "note: the name stays reserved; its password is kept in {NODE_PASSWORD} (`pipeops \
             uninstall` removes it)"
        )),
        Err(error) => installer.printer.say(&format!(
            "note: the name stays reserved, and its password could not be kept: {error:#}; before \
             a new try, on the server: kubectl delete node {}",
            plan.node
        )),
    }
}

/// A worker takes the address that leads to its server: `ip route get` would say the same. A name
/// is looked up first; where it cannot be found, the connection says so.
async fn choose_route(facts: &mut Facts, url: &str) -> anyhow::Result<()> {
    let Some(host) = url::Url::parse(url).ok().and_then(|u| u.host_str().map(str::to_owned)) else {
        return Ok(());
    };
    let leads = |master: std::net::IpAddr| {
        let ways = facts.routes.iter().filter(|r| {
            r.kind == "unicast" && Cidr::parse(&r.to).is_some_and(|c| c.contains(master))
        });
        ways.min_by_key(|r| {
            (std::cmp::Reverse(Cidr::parse(&r.to).map_or(0, |c| c.prefix)), r.metric)
        })
        .cloned()
    };
    // what leads there decides about address and interface before the default route does
    facts.route_to_server = lookup(&host).await.unwrap_or_default().into_iter().find_map(leads);
    Ok(())
}
