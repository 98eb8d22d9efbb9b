//! `control-plane`: runs a control plane, or calls the one that runs on this machine.

use std::io::IsTerminal as _;
use std::net::Ipv6Addr;

use http::Method;
use serde_json::{Value, json};

use crate::base::error::{Exit, Failure};
use crate::base::secret::Secret;
use crate::cli::{
    AdminCommand, ClusterCommand, ControlPlaneArgs, ControlPlaneCommand, DataDirArgs, DatabaseArgs,
    OutputArgs, OutputFormat, ProjectCommand, RunnerCommand, Serve, TokenCommand,
};
use crate::cmd::{Context, unreadable};
use crate::control_plane::certificate::CertificateFiles;
use crate::control_plane::frps::ExternalFrps;
use crate::control_plane::outbox::Broker;
use crate::control_plane::settings::{CONFIG, ControlPlaneOptions, parse_file};
use crate::control_plane::{self, ControlPlaneConfig, client};
use crate::host::Host;
use crate::output::{Printer, table};

/// # Errors
/// The error of the control plane that is run or called.
pub async fn control_plane(context: &Context, args: ControlPlaneArgs) -> anyhow::Result<Exit> {
    let Some(command) = args.command else { return serve(context, args.serve).await };
    if args.serve.options != ControlPlaneOptions::default() || args.serve.config.is_some() {
        return Err(Failure::usage("SERVING_OPTION", "before a verb stands an option that is for serving only")
            .hint("a verb is for the control plane that runs here: it takes --data-dir, and its own options behind it (--help)")
            .into());
    }
    verb(context, command, &args.serve.place).await
}

/// Options of the command line over those of the config file.
fn layered(
    host: &Host,
    flags: ControlPlaneOptions,
    config: Option<&str>,
) -> anyhow::Result<ControlPlaneOptions> {
    let text = match config {
        Some(path) => Some(host.users_file(path).map_err(|e| unreadable(path, &e))?),
        None => host.read(CONFIG).map_err(|e| unreadable(CONFIG, &e))?,
    };
    Ok(match text {
        Some(text) => flags.layered_over(parse_file(&text, config.unwrap_or(CONFIG))?),
        None => flags,
    })
}

/// A URL with a password in it. In this order: the file that a flag names, the command line or the
/// environment, the file that the config names.
fn secret_url(
    context: &Context,
    host: &Host,
    flag: Option<&str>,
    given: Option<&Secret>,
    config: Option<&str>,
) -> anyhow::Result<Option<Secret>> {
    match (flag, given, config) {
        (None, Some(given), _) => Ok(Some(given.clone())),
        (Some(path), ..) | (None, None, Some(path)) => context.token_file(host, path).map(Some),
        (None, None, None) => Ok(None),
    }
}

async fn serve(context: &Context, args: Serve) -> anyhow::Result<Exit> {
    let host = context.host(&args.place.root);
    let flags = args.options;
    let (database, amqp) = (flags.database_url_file.clone(), flags.amqp_url_file.clone());
    let options = layered(&host, flags, args.config.as_deref())?;
    let database = secret_url(
        context,
        &host,
        database.as_deref(),
        context.database_url.as_ref(),
        options.database_url_file.as_deref(),
    )?;
    let broker = secret_url(
        context,
        &host,
        amqp.as_deref(),
        context.amqp_url.as_ref(),
        options.amqp_url_file.as_deref(),
    )?;
    let text = |path: &str| host.users_file(path).map_err(|e| unreadable(path, &e));
    let ca = options.amqp_ca.as_deref().map(text).transpose()?;
    let frps = match options.frps {
        Some(address) => {
            let path = options
                .frps_token_file
                .ok_or_else(|| Failure::usage("FRPS_WRONG", "--frps needs --frps-token-file"))?;
            let ca = options.frps_ca.as_deref().map(text).transpose()?;
            Some(ExternalFrps {
                address,
                token: context.token_file(&host, &path)?,
                ca,
                pin: options.frps_pin,
            })
        }
        None => None,
    };
    let mut names = options.public_name;
    if names.is_empty() {
        names.extend(host.outward_address().map(|a| a.to_string()));
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
        data_dir: args.place.data_dir.clone(),
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
    printer.say("to add a server, paste this on it within a day (`pipeops control-plane token create` prints another):");
    printer.say(&format!("  {line}"));
}

struct AdminClient<'a> {
    context: &'a Context,
    host: Host,
    place: &'a DataDirArgs,
    verb: OutputArgs,
}

impl AdminClient<'_> {
    fn new<'a>(context: &'a Context, place: &'a DataDirArgs, verb: OutputArgs) -> AdminClient<'a> {
        AdminClient { context, host: context.host(&place.root), place, verb }
    }

    async fn call(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
    ) -> anyhow::Result<String> {
        client::call(&self.host, &self.place.data_dir, method, path, body).await
    }

    fn printer(&self) -> Printer {
        Printer::new(self.verb.output == OutputFormat::Json, false, self.context.no_color())
    }

    /// Prints the answer: as JSON where requested, else as `text` formats it.
    fn show(&self, answer: &str, text: impl FnOnce(&Value) -> String) -> anyhow::Result<Exit> {
        let value: Value = serde_json::from_str(answer)?;
        if self.verb.output == OutputFormat::Json {
            self.printer().document_with_secrets(&value);
        } else {
            for line in text(&value).lines() {
                self.printer().data_with_secrets(line);
            }
        }
        Ok(Exit::Done)
    }

    async fn list(
        &self,
        path: &str,
        head: &[&str],
        row: fn(&Value) -> Vec<String>,
    ) -> anyhow::Result<Exit> {
        let answer = self.call(Method::GET, path, None).await?;
        self.show(&answer, |value| {
            let rows: Vec<Vec<String>> =
                value["items"].as_array().into_iter().flatten().map(row).collect();
            if rows.is_empty() { "none yet".into() } else { table(head, &rows) }
        })
    }

    /// Creates what has a name only; prints one field of the answer.
    async fn create(&self, path: &str, name: &str, field: &str) -> anyhow::Result<Exit> {
        let answer = self.call(Method::POST, path, Some(&json!({"name": name}))).await?;
        self.show(&answer, |v| text(&v[field]))
    }

    async fn act(&self, method: Method, path: &str, said: &str) -> anyhow::Result<Exit> {
        let answer = self.call(method, path, None).await?;
        self.show(&answer, |_| said.to_owned())
    }
}

fn text(value: &Value) -> String {
    match value {
        // text of an agent cannot add lines
        Value::String(text) => crate::base::text::printable(text).into_owned(),
        Value::Null => "-".into(),
        Value::Array(list) => list.iter().map(text).collect::<Vec<_>>().join(","),
        other => other.to_string(),
    }
}

fn time_text(value: &Value) -> String {
    value
        .as_i64()
        .and_then(|s| jiff::Timestamp::from_second(s).ok())
        .map_or_else(|| "-".into(), |t| t.to_string())
}

/// One segment of a path, encoded.
fn segment(text: &str) -> anyhow::Result<String> {
    if text.is_empty() || text.contains('/') {
        return Err(Failure::usage("BAD_NAME", format!("`{text}` is no name or id")).into());
    }
    Ok(url::form_urlencoded::byte_serialize(text.as_bytes())
        .collect::<String>()
        .replace('+', "%20"))
}

fn host_and_database(
    context: &Context,
    args: &DatabaseArgs,
    place: &DataDirArgs,
) -> anyhow::Result<(Host, Option<Secret>)> {
    let host = context.host(&place.root);
    let database = secret_url(
        context,
        &host,
        args.database_url_file.as_deref(),
        context.database_url.as_ref(),
        None,
    )?;
    Ok((host, database))
}

async fn verb(
    context: &Context,
    command: ControlPlaneCommand,
    place: &DataDirArgs,
) -> anyhow::Result<Exit> {
    let printer = || Printer::new(false, false, context.no_color());
    match command {
        ControlPlaneCommand::Token(command) => token(context, place, command).await,
        ControlPlaneCommand::Cluster(command) => cluster(context, place, command).await,
        ControlPlaneCommand::Runner(command) => runner(context, place, command).await,
        ControlPlaneCommand::Admin(command) => admin(context, place, command).await,
        ControlPlaneCommand::Project(command) => project(context, place, command).await,
        ControlPlaneCommand::FrpsConfig => {
            let host = context.host(&place.root);
            let text =
                client::call(&host, &place.data_dir, Method::GET, "/api/v1/frps", None).await?;
            for line in text.lines() {
                printer().data_with_secrets(line);
            }
            Ok(Exit::Done)
        }
        ControlPlaneCommand::Backup { file, database: args } => {
            let (host, database) = host_and_database(context, &args, place)?;
            let message =
                control_plane::backup::write(&host, &place.data_dir, database, &file).await?;
            printer().say(&message);
            Ok(Exit::Done)
        }
        ControlPlaneCommand::Restore { file, database: args } => {
            let (host, database) = host_and_database(context, &args, place)?;
            let text = host.users_file(&file).map_err(|e| unreadable(&file, &e))?;
            let message =
                control_plane::backup::restore(&host, &place.data_dir, database, &file, &text)
                    .await?;
            printer().say(&message);
            Ok(Exit::Done)
        }
    }
}

async fn token(
    context: &Context,
    place: &DataDirArgs,
    command: TokenCommand,
) -> anyhow::Result<Exit> {
    match command {
        TokenCommand::Create { project, name, ttl, uses, verb } => {
            let client = AdminClient::new(context, place, verb);
            let body = json!({"project": project, "name": name, "ttl_s": ttl, "uses": uses});
            let answer = client.call(Method::POST, "/api/v1/tokens", Some(&body)).await?;
            client.show(&answer, |v| text(&v["install"]))
        }
        TokenCommand::List { verb } => {
            AdminClient::new(context, place, verb)
                .list(
                    "/api/v1/tokens",
                    &["ID", "NAME", "PROJECT", "USES LEFT", "EXPIRES", "REVOKED"],
                    |v| {
                        let fields = ["id", "name", "project", "uses_left"];
                        fields
                            .iter()
                            .map(|f| text(&v[f]))
                            .chain([time_text(&v["expires_at"]), text(&v["revoked"])])
                            .collect()
                    },
                )
                .await
        }
        TokenCommand::Revoke { id, verb } => {
            AdminClient::new(context, place, verb)
                .act(Method::DELETE, &format!("/api/v1/tokens/{}", segment(&id)?), "revoked")
                .await
        }
    }
}

async fn cluster(
    context: &Context,
    place: &DataDirArgs,
    command: ClusterCommand,
) -> anyhow::Result<Exit> {
    let path =
        |cluster: &str| Ok::<_, anyhow::Error>(format!("/api/v1/clusters/{}", segment(cluster)?));
    match command {
        ClusterCommand::List { verb } => {
            AdminClient::new(context, place, verb)
                .list(
                    "/api/v1/clusters",
                    &["ID", "NAME", "STATE", "VERSION", "NODES", "TUNNEL", "SEEN", "REASON"],
                    |v| {
                        let fields = ["id", "name", "state", "version", "nodes", "tunnel"];
                        fields
                            .iter()
                            .map(|f| text(&v[f]))
                            .chain([time_text(&v["seen_at"]), text(&v["reason"])])
                            .collect()
                    },
                )
                .await
        }
        ClusterCommand::Show { cluster, verb } => {
            let client = AdminClient::new(context, place, verb);
            let answer = client.call(Method::GET, &path(&cluster)?, None).await?;
            client.show(&answer, cluster_details)
        }
        ClusterCommand::Kubeconfig { cluster, role, namespaces, verb } => {
            let client = AdminClient::new(context, place, verb);
            let body = json!({"role": role, "namespaces": namespaces});
            let path = format!("{}/kubeconfig", path(&cluster)?);
            let answer = client.call(Method::POST, &path, Some(&body)).await?;
            client.show(&answer, |_| answer.clone())
        }
        ClusterCommand::Revoke { cluster, verb } => {
            let path = format!("{}/revoke", path(&cluster)?);
            AdminClient::new(context, place, verb)
                .act(Method::POST, &path, "revoked; its streams have ended")
                .await
        }
        ClusterCommand::Remove { cluster, verb } => {
            AdminClient::new(context, place, verb)
                .act(Method::DELETE, &path(&cluster)?, "removed")
                .await
        }
    }
}

fn cluster_details(cluster: &Value) -> String {
    let fields = [
        "id",
        "name",
        "project",
        "state",
        "reason",
        "tunnel",
        "version",
        "provider",
        "agent_id",
        "agent_version",
        "max_role",
    ];
    let mut lines: Vec<String> =
        fields.map(|field| format!("{field:<14}{}", text(&cluster[field]))).into();
    lines.push(format!("{:<14}{}", "seen", time_text(&cluster["seen_at"])));
    for node in cluster["report"]["nodes"].as_array().into_iter().flatten() {
        let ready = if node["ready"] == true { "ready" } else { "not ready" };
        lines.push(format!(
            "node          {} {ready} {} {} {}",
            text(&node["name"]),
            text(&node["role"]),
            text(&node["version"]),
            text(&node["note"])
        ));
    }
    lines.join("\n")
}

async fn runner(
    context: &Context,
    place: &DataDirArgs,
    command: RunnerCommand,
) -> anyhow::Result<Exit> {
    match command {
        RunnerCommand::Create { name, project, role, clusters, namespaces, ttl, verb } => {
            let client = AdminClient::new(context, place, verb);
            let body = json!({
                "name": name, "project": project, "role": role,
                "clusters": clusters, "namespaces": namespaces, "ttl_s": ttl,
            });
            let answer = client.call(Method::POST, "/api/v1/runners", Some(&body)).await?;
            client.show(&answer, |v| text(&v["token"]))
        }
        RunnerCommand::List { verb } => {
            AdminClient::new(context, place, verb)
                .list(
                    "/api/v1/runners",
                    &["ID", "NAME", "KIND", "ROLE", "CLUSTERS", "NAMESPACES", "EXPIRES", "REVOKED"],
                    |v| {
                        let fields = ["id", "name", "kind", "role", "clusters", "namespaces"];
                        fields
                            .iter()
                            .map(|f| text(&v[f]))
                            .chain([time_text(&v["expires_at"]), text(&v["revoked"])])
                            .collect()
                    },
                )
                .await
        }
        RunnerCommand::Revoke { id, verb } => {
            let path = format!("/api/v1/runners/{}", segment(&id)?);
            AdminClient::new(context, place, verb)
                .act(Method::DELETE, &path, "revoked; its streams have ended")
                .await
        }
    }
}

async fn admin(
    context: &Context,
    place: &DataDirArgs,
    command: AdminCommand,
) -> anyhow::Result<Exit> {
    match command {
        AdminCommand::Create { name, verb } => {
            AdminClient::new(context, place, verb).create("/api/v1/admins", &name, "token").await
        }
        AdminCommand::List { verb } => {
            AdminClient::new(context, place, verb)
                .list("/api/v1/admins", &["ID", "NAME", "CREATED"], created_row)
                .await
        }
        AdminCommand::Revoke { id, verb } => {
            let path = format!("/api/v1/admins/{}", segment(&id)?);
            AdminClient::new(context, place, verb)
                .act(Method::DELETE, &path, "revoked; its sessions have ended")
                .await
        }
    }
}

async fn project(
    context: &Context,
    place: &DataDirArgs,
    command: ProjectCommand,
) -> anyhow::Result<Exit> {
    match command {
        ProjectCommand::Create { name, verb } => {
            AdminClient::new(context, place, verb).create("/api/v1/projects", &name, "id").await
        }
        ProjectCommand::List { verb } => {
            AdminClient::new(context, place, verb)
                .list("/api/v1/projects", &["ID", "NAME", "CREATED"], created_row)
                .await
        }
    }
}

fn created_row(value: &Value) -> Vec<String> {
    vec![text(&value["id"]), text(&value["name"]), time_text(&value["created_at"])]
}
