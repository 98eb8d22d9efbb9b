//! `control-plane`: runs a control plane, or calls the one that runs on this machine.

mod subcommands;

use std::io::IsTerminal as _;
use std::net::Ipv6Addr;

use http::Method;

use crate::base::error::{Exit, Failure};
use crate::base::secret::Secret;
use crate::broker::Broker;
use crate::cli::{ControlPlaneArgs, ControlPlaneCommand, DataDirArgs, DatabaseArgs, ServeArgs};
use crate::cmd::Context;
use crate::control_plane::certificate::CertificateFiles;
use crate::control_plane::frps::ExternalFrps;
use crate::control_plane::settings::{CONFIG, ControlPlaneOptions, parse_file};
use crate::control_plane::{self, ControlPlaneConfig, client};
use crate::host::Host;
use crate::host::user_files::unreadable;
use crate::output::Printer;

/// # Errors
/// The error of the control plane that is run or called.
pub async fn control_plane(context: &Context, args: ControlPlaneArgs) -> anyhow::Result<Exit> {
    let mut args = args;
    let location = &mut args.serve.location;
    location.data_dir = context.host(&location.root).typed_path(&location.data_dir);
    let Some(command) = args.command else { return serve(context, args.serve).await };
    if args.serve.options != ControlPlaneOptions::default() || args.serve.config.is_some() {
        return Err(Failure::usage(
            "SERVING_OPTION",
            "an option that is for serving only stands before a subcommand",
        )
        .hint(
            "a subcommand is for the control plane that runs here: it takes --data-dir, and its \
             own options after it (--help)",
        )
        .into());
    }
    subcommand(context, command, &args.serve.location).await
}

/// Options of the command line over those of the config file.
fn layered(
    host: &Host,
    flags: ControlPlaneOptions,
    config: Option<&str>,
) -> anyhow::Result<ControlPlaneOptions> {
    let text = match config {
        Some(path) => Some(host.read_user_file(path).map_err(|e| unreadable(path, &e))?),
        None => host.read(CONFIG).map_err(|e| unreadable(CONFIG, &e))?,
    };
    Ok(match text {
        Some(text) => flags.layered_over(parse_file(&text, config.unwrap_or(CONFIG))?),
        None => flags,
    })
}

/// A URL with a password in it. In this order: the file that a flag names, the command line or the
/// environment, the file that the config names.
async fn secret_url(
    context: &Context,
    host: &Host,
    flag: Option<&str>,
    given: Option<&Secret>,
    config: Option<&str>,
) -> anyhow::Result<Option<Secret>> {
    match (flag, given, config) {
        (None, Some(given), _) => Ok(Some(given.clone())),
        (Some(path), ..) | (None, None, Some(path)) => {
            context.token_file(host, path).await.map(Some)
        }
        (None, None, None) => Ok(None),
    }
}

async fn serve(context: &Context, args: ServeArgs) -> anyhow::Result<Exit> {
    let host = context.host(&args.location.root);
    let flags = args.options;
    let (database, amqp) = (flags.database_url_file.clone(), flags.amqp_url_file.clone());
    let options = layered(&host, flags, args.config.as_deref())?;
    let database = secret_url(
        context,
        &host,
        database.as_deref(),
        context.database_url.as_ref(),
        options.database_url_file.as_deref(),
    )
    .await?;
    let broker = secret_url(
        context,
        &host,
        amqp.as_deref(),
        context.amqp_url.as_ref(),
        options.amqp_url_file.as_deref(),
    )
    .await?;
    let text = |path: &str| host.read_user_file(path).map_err(|e| unreadable(path, &e));
    let ca = options.amqp_ca.as_deref().map(text).transpose()?;
    let frps = match options.frps {
        Some(address) => {
            let path = options
                .frps_token_file
                .ok_or_else(|| Failure::usage("FRPS_WRONG", "--frps needs --frps-token-file"))?;
            let ca = options.frps_ca.as_deref().map(text).transpose()?;
            Some(ExternalFrps {
                address,
                token: context.token_file(&host, &path).await?,
                ca,
                pin: options.frps_pin,
            })
        }
        None => None,
    };
    let mut names = options.public_name;
    if names.is_empty() {
        names.extend(host.outbound_address().map(|a| a.to_string()));
        names.extend(nix::unistd::gethostname().ok().and_then(|h| h.into_string().ok()));
    }
    names.extend(["localhost".into(), "127.0.0.1".into()]);
    let terminal = std::io::stderr().is_terminal();
    let first = names[0].clone();
    let config = ControlPlaneConfig {
        listen: options.listen.unwrap_or((Ipv6Addr::UNSPECIFIED, 8443).into()),
        tunnel_listen: options.tunnel_listen.unwrap_or((Ipv6Addr::UNSPECIFIED, 7000).into()),
        names,
        database,
        broker: broker.map(|url| Broker { url, ca }),
        frps,
        certificate: options.tls_cert.zip(options.tls_key).map(|(chain, key)| CertificateFiles {
            chain,
            key,
            ca: options.tls_ca,
        }),
        data_dir: args.location.data_dir.clone(),
        show: if terminal { Some(show_bootstrap_token) } else { None },
    };
    let ready = move |https: std::net::SocketAddr, tunnel: Option<std::net::SocketAddr>| {
        let tunnel = tunnel.map_or_else(|| "at an external frps".to_owned(), |t| t.to_string());
        tracing::info!(%https, %tunnel, name = first, "serving");
        // outside of systemd this does nothing
        let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    };
    control_plane::run(&host, config, context.stop.clone(), ready).await?;
    Ok(Exit::Done)
}

/// Shows the first token on a terminal, once.
fn show_bootstrap_token(token: &str, line: &str) {
    let mut printer = Printer::new(false, false, true);
    printer.say(&format!(
        "first administrator's token, for the page and the API (shown once): {token}"
    ));
    printer.say(
        "to add a server, paste this on it within a day (`pipeops control-plane token create` \
         prints another):",
    );
    printer.say(&format!("  {line}"));
}

async fn host_and_database(
    context: &Context,
    args: &DatabaseArgs,
    location: &DataDirArgs,
) -> anyhow::Result<(Host, Option<Secret>)> {
    let host = context.host(&location.root);
    let database = secret_url(
        context,
        &host,
        args.database_url_file.as_deref(),
        context.database_url.as_ref(),
        None,
    )
    .await?;
    Ok((host, database))
}

async fn subcommand(
    context: &Context,
    command: ControlPlaneCommand,
    location: &DataDirArgs,
) -> anyhow::Result<Exit> {
    let printer = || Printer::new(false, false, context.no_color());
    match command {
        ControlPlaneCommand::Token(command) => subcommands::token(context, location, command).await,
        ControlPlaneCommand::Cluster(command) => {
            subcommands::cluster(context, location, command).await
        }
        ControlPlaneCommand::Runner(command) => {
            subcommands::runner(context, location, command).await
        }
        ControlPlaneCommand::User(command) => subcommands::user(context, location, command).await,
        ControlPlaneCommand::Admin(command) => subcommands::admin(context, location, command).await,
        ControlPlaneCommand::Project(command) => {
            subcommands::project(context, location, command).await
        }
        ControlPlaneCommand::FrpsConfig => {
            let host = context.host(&location.root);
            let text =
                client::call(&host, &location.data_dir, Method::GET, "/api/v1/frps", None).await?;
            for line in text.lines() {
                printer().data_with_secrets(line);
            }
            Ok(Exit::Done)
        }
        ControlPlaneCommand::Backup { file, database: args } => {
            let (host, database) = host_and_database(context, &args, location).await?;
            let message =
                control_plane::backup::write(&host, &location.data_dir, database, &file).await?;
            printer().say(&message);
            Ok(Exit::Done)
        }
        ControlPlaneCommand::Restore { file, database: args } => {
            let (host, database) = host_and_database(context, &args, location).await?;
            let text = host.read_user_file(&file).map_err(|e| unreadable(&file, &e))?;
            let message =
                control_plane::backup::restore(&host, &location.data_dir, database, &file, &text)
                    .await?;
            printer().say(&message);
            Ok(Exit::Done)
        }
    }
}
