//! The commands of people and CI: which control plane, cluster and namespace are meant, and what
//! they show.

mod apps;
mod clusters;
mod deploy;
mod exec;
mod job;
mod login;
mod logs;
mod nodes;
mod open;
mod operation;
mod rollout;
mod secret;
mod send;
mod tenant;
mod tenant_change;

pub use job::check_run_is_meant;
pub(super) use send::{seal, send};
use serde_json::Value;

use super::Context;
use crate::base::error::{Exit, Failure};
use crate::base::text::is_dns_label;
use crate::cli::{ClientCommand, JobCommand, OutputArgs, OutputFormat, ReachArgs};
use crate::client::api::Api;
use crate::client::applications::ClusterReader;
use crate::client::clusters::{Cluster, choose};
use crate::client::contexts::{ContextStore, LoginContext};
use crate::client::tenants;
use crate::output::Printer;

/// # Errors
/// What the control plane or the cluster refuses, or that it is not reached.
pub async fn client(context: &Context, command: ClientCommand) -> anyhow::Result<Exit> {
    match command {
        ClientCommand::Login(args) => login::login(context, args).await,
        ClientCommand::Logout { context: name } => login::logout(context, name.as_deref()).await,
        ClientCommand::Contexts(args) => login::contexts(context, args).await,
        ClientCommand::Deploy(args) => deploy::deploy(context, args).await,
        ClientCommand::Rollback { name, to, with_secrets, take_over, operation, rollout } => {
            let options = (to, with_secrets, take_over);
            deploy::rollback(context, &name, options, (&operation, &rollout)).await
        }
        ClientCommand::Restart { name, operation, rollout } => {
            deploy::restart(context, &name, (&operation, &rollout)).await
        }
        ClientCommand::Scale { name, pods, operation, rollout } => {
            deploy::scale(context, &name, pods, (&operation, &rollout)).await
        }
        ClientCommand::Delete { name, volumes, yes, operation, rollout } => {
            deploy::delete(context, &name, (volumes, yes), (&operation, &rollout)).await
        }
        ClientCommand::Apps { reach, output } => apps::apps(context, &reach, &output).await,
        ClientCommand::Status { name, reach, output } => {
            apps::status(context, &name, &reach, &output).await
        }
        ClientCommand::History { name, reach, output } => {
            apps::history(context, &name, &reach, &output).await
        }
        ClientCommand::Logs(args) => logs::logs(context, args).await,
        ClientCommand::Exec(args) => exec::exec(context, args).await,
        ClientCommand::Open { name, print, reach } => {
            open::open(context, &name, print, &reach).await
        }
        ClientCommand::Job(JobCommand::Run(args)) => job::run(context, args).await,
        ClientCommand::Clusters { selector, group_by, context: name, output } => {
            let name = name.as_deref();
            clusters::clusters(context, name, selector.as_deref(), group_by.as_deref(), &output)
                .await
        }
        ClientCommand::Kubeconfig { write, cluster } => {
            apps::kubeconfig(context, write.as_deref(), &cluster).await
        }
        ClientCommand::Secret(command) => secret::secret(context, command).await,
        ClientCommand::Nodes(command) => nodes::nodes(context, command).await,
        ClientCommand::Rollout(command) => rollout::rollout(context, command).await,
        ClientCommand::Tenant(command) => tenant::tenant(context, command).await,
    }
}

/// A control plane that this user is logged in to.
struct Session<'a> {
    context: &'a Context,
    login: LoginContext,
    api: Api,
}

/// A name in a path of the Kubernetes API.
fn checked_name(name: &str) -> Result<&str, Failure> {
    if is_dns_label(name) {
        return Ok(name);
    }
    Err(Failure::usage("BAD_NAME", format!("`{name}` is no name of an application or namespace"))
        .hint("a name has 1 to 63 lower-case letters, digits and -, as in web-1"))
}

fn namespace_needed(hint: &str) -> Failure {
    Failure::usage("NAMESPACE_NEEDED", "in which namespace is it?").hint(hint)
}

impl<'a> Session<'a> {
    /// # Errors
    /// Exit 2 where nobody is logged in.
    fn open(context: &'a Context, name: Option<&str>) -> anyhow::Result<Session<'a>> {
        let contexts = ContextStore::new(&context.env)?.load()?;
        let login = contexts.select(name)?.1.clone();
        let api = Api::new(&login)?;
        Ok(Session { context, login, api })
    }

    /// The cluster that is meant, by an option, a file or the context.
    ///
    /// # Errors
    /// Exit 2 with the names, where that is not clear.
    async fn cluster(&self, wanted: Option<&str>) -> anyhow::Result<Cluster> {
        let list = self.context.unless_stopped(self.api.get("/api/v1/clusters")).await?;
        let items = list["items"].as_array().map(Vec::as_slice).unwrap_or_default();
        Ok(choose(items, wanted.or(self.login.cluster.as_deref()))?)
    }

    /// The namespace of an option, or of the context.
    fn namespace<'b>(&'b self, given: Option<&'b str>) -> Result<Option<&'b str>, Failure> {
        given.or(self.login.namespace.as_deref()).map(checked_name).transpose()
    }

    /// Cluster and namespace of an application.
    async fn find(&self, name: &str, reach: &ReachArgs) -> anyhow::Result<(Cluster, String)> {
        checked_name(name)?;
        let given = self.namespace(reach.namespace.as_deref())?.map(str::to_owned);
        let cluster = self.cluster(reach.cluster.cluster.as_deref()).await?;
        let reader = ClusterReader { api: &self.api, cluster: &cluster.id };
        let places = self.places(&cluster, given).await?;
        let namespace = match &places[..] {
            [Some(only)] => only.clone(),
            _ => self.context.unless_stopped(reader.namespace_of(name, &places)).await?,
        };
        Ok((cluster, namespace))
    }

    /// Where something may be: in the namespace that is given, in those of the token's tenant, or
    /// anywhere in the cluster, which is none.
    ///
    /// # Errors
    /// As [`Session::tenant_namespaces`].
    async fn places(
        &self,
        cluster: &Cluster,
        given: Option<String>,
    ) -> anyhow::Result<Vec<Option<String>>> {
        match (given, &self.login.tenant) {
            (Some(given), _) => Ok(vec![Some(given)]),
            (None, None) => Ok(vec![None]),
            (None, Some(tenant)) => {
                let hint = "say -n NAMESPACE, or once for all: `pipeops contexts use CONTEXT -n …`";
                let own = self.tenant_namespaces(cluster, tenant, hint).await?;
                Ok(own.into_iter().map(Some).collect())
            }
        }
    }

    /// The namespaces of the tenant that the token is limited to, one at least.
    ///
    /// # Errors
    /// Exit 7 where the tenant has none in this cluster, 2 where the token may not list them.
    async fn tenant_namespaces(
        &self,
        cluster: &Cluster,
        tenant: &str,
        hint: &str,
    ) -> anyhow::Result<Vec<String>> {
        let reader = ClusterReader { api: &self.api, cluster: &cluster.id };
        let listed = async {
            match tenants::namespaces(&reader, tenant).await {
                Ok(none) if none.is_empty() => Err(tenants::unknown(tenant)),
                Err(e) if matches!(&*e.code, "NAMESPACE_SCOPE" | "REMOTE_REFUSES") => {
                    let why = format!("your token is for namespaces of the tenant {tenant}");
                    Err(namespace_needed(hint).why(why))
                }
                listed => listed,
            }
        };
        self.context.unless_stopped(listed).await
    }

    /// The namespace where none is said: the only one of the token's tenant.
    ///
    /// # Errors
    /// Exit 2, with those there are where they are known; as [`Session::tenant_namespaces`].
    async fn only_namespace(&self, cluster: Option<&str>, hint: &str) -> anyhow::Result<String> {
        let needed = namespace_needed(hint);
        let Some(tenant) = &self.login.tenant else { return Err(needed.into()) };
        let cluster = self.cluster(cluster).await?;
        let names = self.tenant_namespaces(&cluster, tenant, hint).await?;
        match &names[..] {
            [only] => Ok(only.clone()),
            _ => Err(needed.why(format!("the tenant {tenant} has {}", names.join(", "))).into()),
        }
    }
}

fn printer(context: &Context, output: &OutputArgs) -> Printer {
    Printer::new(output.output == OutputFormat::Json, false, context.no_color())
}

/// A field as it stands in a column.
fn cell(value: &Value) -> String {
    match value {
        Value::String(text) if !text.is_empty() => text.clone(),
        Value::Null | Value::String(_) => "-".into(),
        other => other.to_string(),
    }
}

fn time_cell(seconds: Option<i64>) -> String {
    let time = seconds.and_then(|s| jiff::Timestamp::from_second(s).ok());
    time.map_or_else(|| "-".into(), |time| time.to_string())
}
