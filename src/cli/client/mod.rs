//! The arguments of the commands against a control plane.

mod rollout;
mod tenant;

use clap::{Args, Subcommand};

use super::common::{OutputArgs, selector};
use crate::base::text::is_label_key;
use crate::install::settings::parse_duration;

pub use rollout::{RolloutArgs, RolloutCommand, RolloutReachArgs};
pub use tenant::{TenantArgs, TenantCommand};

#[derive(Debug, Subcommand)]
pub enum ClientCommand {
    /// Log in to a control plane, with a token from standard input
    Login(LoginArgs),
    /// Forget a token
    Logout {
        /// Name of the context; without: the one in use
        context: Option<String>,
    },
    /// Show the control planes that you are logged in to, or change which one is in use
    Contexts(ContextsArgs),
    /// Deploy an application and watch its rollout
    Deploy(DeployArgs),
    /// Bring a former revision of an application back
    Rollback {
        name: String,
        /// Number of the revision; without: the last other one that ran
        #[arg(long, value_name = "NUMBER")]
        to: Option<u32>,
        /// Secrets as they were then; without it those of today stay
        #[arg(long)]
        with_secrets: bool,
        /// Take fields that another manager has set
        #[arg(long)]
        take_over: bool,
        #[command(flatten)]
        operation: OperationArgs,
        #[command(flatten)]
        rollout: RolloutArgs,
    },
    /// Restart the pods of an application, one after another
    Restart {
        name: String,
        #[command(flatten)]
        operation: OperationArgs,
        #[command(flatten)]
        rollout: RolloutArgs,
    },
    /// Change how many pods an application has
    Scale {
        name: String,
        #[arg(value_parser = clap::value_parser!(u32).range(..=1000))]
        pods: u32,
        #[command(flatten)]
        operation: OperationArgs,
        #[command(flatten)]
        rollout: RolloutArgs,
    },
    /// Delete an application; the data of its volumes stays
    Delete {
        name: String,
        /// The data of its volumes too
        #[arg(long)]
        volumes: bool,
        /// Do not ask
        #[arg(long, short = 'y')]
        yes: bool,
        #[command(flatten)]
        operation: OperationArgs,
        #[command(flatten)]
        rollout: RolloutArgs,
    },
    /// List applications
    Apps {
        #[command(flatten)]
        reach: ReachArgs,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Show one application, what keeps it, and what is going on
    Status {
        name: String,
        #[command(flatten)]
        reach: ReachArgs,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// List the revisions of an application
    History {
        name: String,
        #[command(flatten)]
        reach: ReachArgs,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Print the logs of all pods of an application
    Logs(LogsArgs),
    /// Run a command in a pod of an application that runs already
    Exec(ExecArgs),
    /// Open an application in a browser, at its host
    Open {
        name: String,
        /// Print the URL and open nothing
        #[arg(long)]
        print: bool,
        #[command(flatten)]
        reach: ReachArgs,
    },
    /// Commands that run once
    #[command(subcommand)]
    Job(JobCommand),
    /// Values that pods read by their keys
    #[command(subcommand)]
    Secret(SecretCommand),
    /// List the clusters that your token reaches
    Clusters {
        /// Only those with such labels: env=prod,tier in (web,api),!legacy; or id, name, provider,
        /// region, zone
        #[arg(long, short = 'l', value_name = "SELECTOR", value_parser = selector)]
        selector: Option<String>,
        /// In groups by provider, region, zone or a label
        #[arg(long, value_name = "KEY", value_parser = group_key)]
        group_by: Option<String>,
        /// Context to use in place of the one in use
        #[arg(long, value_name = "NAME")]
        context: Option<String>,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Print a kubeconfig with which kubectl reaches a cluster for a day
    Kubeconfig {
        /// Write it to this file, mode 0600, and print nothing
        #[arg(long, value_name = "FILE")]
        write: Option<String>,
        #[command(flatten)]
        cluster: ClusterArgs,
    },
    /// Machines of a cluster
    #[command(subcommand)]
    Nodes(NodesCommand),
    /// Operations on many clusters at once, in waves
    #[command(subcommand)]
    Rollout(RolloutCommand),
    /// Customers with a place of their own in a cluster: namespaces, and what limits them
    #[command(subcommand)]
    Tenant(TenantCommand),
}

fn group_key(text: &str) -> Result<String, &'static str> {
    if is_label_key(text) { Ok(text.to_owned()) } else { Err("that is no key of a label") }
}

/// Which control plane, and which of its clusters.
#[derive(Clone, Debug, Args)]
pub struct ClusterArgs {
    /// Context to use in place of the one in use
    #[arg(long, value_name = "NAME")]
    pub context: Option<String>,
    /// Cluster, by name or id
    #[arg(long, value_name = "CLUSTER")]
    pub cluster: Option<String>,
}

/// Where applications are looked for.
#[derive(Debug, Args)]
pub struct ReachArgs {
    #[command(flatten)]
    pub cluster: ClusterArgs,
    /// Namespace
    #[arg(long, short, value_name = "NAMESPACE")]
    pub namespace: Option<String>,
}

/// How an operation is asked for and followed.
#[derive(Debug, Args)]
pub struct FollowArgs {
    /// Print the id of the operation and do not wait for its end
    #[arg(long)]
    pub detach: bool,
    /// Under the same key the same request is done once, however often it is sent, and whatever
    /// has come of it
    #[arg(long, value_name = "KEY")]
    pub idempotency_key: Option<String>,
    #[command(flatten)]
    pub output: OutputArgs,
}

/// An operation on an application.
#[derive(Debug, Args)]
pub struct OperationArgs {
    /// Longest time of the operation, seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 300)]
    #[arg(value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub timeout: u64,
    #[command(flatten)]
    pub follow: FollowArgs,
    #[command(flatten)]
    pub reach: ReachArgs,
}

#[derive(Debug, Args)]
pub struct LoginArgs {
    /// https://NAME:PORT of the control plane
    pub url: String,
    /// `sha256:…` of a key in its certificate chain, as `user create` prints it
    #[arg(long, value_name = "PIN", conflicts_with = "ca")]
    pub pin: Option<String>,
    /// Certificate that signs its own, where the system does not trust it
    #[arg(long, value_name = "FILE")]
    pub ca: Option<String>,
    /// Name of the context; without: the control plane's host name
    #[arg(long, value_name = "CONTEXT")]
    pub name: Option<String>,
}

#[derive(Debug, Args)]
pub struct ContextsArgs {
    #[command(subcommand)]
    pub command: Option<ContextsCommand>,
    #[command(flatten)]
    pub output: OutputArgs,
}

#[derive(Debug, Subcommand)]
pub enum ContextsCommand {
    /// Use a context from now on, with a cluster and a namespace where no option says another
    Use {
        context: String,
        /// Cluster, by name or id
        #[arg(long, value_name = "CLUSTER")]
        cluster: Option<String>,
        /// Namespace
        #[arg(long, short, value_name = "NAMESPACE")]
        namespace: Option<String>,
    },
}

#[derive(Debug, Args)]
pub struct DeployArgs {
    /// File that describes the application
    #[arg(default_value = "pipeops.toml")]
    pub file: String,
    /// Image, in place of the file's
    #[arg(long, value_name = "IMAGE")]
    pub image: Option<String>,
    /// Environment variable, over the file's; may be given several times, and is no place for a
    /// secret
    #[arg(long, value_name = "NAME=VALUE")]
    pub set_env: Vec<String>,
    /// Write nothing: Kubernetes answers what it would do
    #[arg(long)]
    pub dry_run: bool,
    /// Take fields that another manager has set
    #[arg(long)]
    pub take_over: bool,
    /// When the rollout fails, bring back the revision that ran before (exit 9)
    #[arg(long)]
    pub auto_rollback: bool,
    #[command(flatten)]
    pub operation: OperationArgs,
    #[command(flatten)]
    pub rollout: RolloutArgs,
}

#[derive(Debug, Args)]
pub struct LogsArgs {
    pub name: String,
    /// Go on with what is written from now on, by new pods too
    #[arg(long, short)]
    pub follow: bool,
    /// Last lines of each container
    #[arg(long, value_name = "NUMBER")]
    pub tail: Option<u32>,
    /// Only what is younger: 90s, 10m, 2h
    #[arg(long, value_name = "TIME", value_parser = since)]
    pub since: Option<u64>,
    #[command(flatten)]
    pub reach: ReachArgs,
}

#[derive(Debug, Args)]
pub struct ExecArgs {
    pub name: String,
    /// Pod; without: one that is ready
    #[arg(long, value_name = "POD")]
    pub pod: Option<String>,
    /// Container; without: the first one of the pod
    #[arg(long, short, value_name = "CONTAINER")]
    pub container: Option<String>,
    /// Pass standard input to the command
    #[arg(long, short = 'i')]
    pub stdin: bool,
    /// A terminal for the command, where standard input is one; with -i
    #[arg(long, short = 't', requires = "stdin")]
    pub tty: bool,
    /// The command with its arguments, after --
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub command: Vec<String>,
    #[command(flatten)]
    pub reach: ReachArgs,
}

#[derive(Debug, Subcommand)]
pub enum JobCommand {
    /// Run a command to its end, with image and environment of an application, and print its log
    Run(JobArgs),
}

#[derive(Debug, Args)]
pub struct JobArgs {
    /// Application that is deployed
    pub name: String,
    /// The command with its arguments, after --
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub command: Vec<String>,
    #[command(flatten)]
    pub operation: OperationArgs,
}

#[derive(Debug, Subcommand)]
pub enum SecretCommand {
    /// Set values of some keys, from standard input or files, and roll out what uses them
    Set(Box<SecretArgs>),
    /// List the names with their keys and who changed them; never a value
    List {
        /// ConfigMaps in place of Secrets
        #[arg(long)]
        config: bool,
        #[command(flatten)]
        reach: ReachArgs,
        #[command(flatten)]
        output: OutputArgs,
    },
}

#[derive(Debug, Args)]
pub struct SecretArgs {
    /// Name, as `{secret = NAME, key = KEY}` in an application has it
    pub name: String,
    /// Key whose value is read from FILE, or from standard input; may be given several times
    #[arg(long, value_name = "KEY[=FILE]")]
    pub key: Vec<String>,
    /// File of lines KEY=VALUE; - is standard input
    #[arg(long, value_name = "FILE")]
    pub env_file: Vec<String>,
    /// Key that goes
    #[arg(long, value_name = "KEY")]
    pub remove: Vec<String>,
    /// A ConfigMap in place of a Secret: values that anybody may read
    #[arg(long)]
    pub config: bool,
    /// What it is for; all keys of image_pull and tls are set together
    #[arg(long = "type", value_name = "TYPE", default_value = "opaque")]
    #[arg(value_parser = ["opaque", "image_pull", "tls"])]
    pub kind: String,
    /// What uses it gets the values when its pods are replaced for another reason
    #[arg(long)]
    pub no_rollout: bool,
    #[command(flatten)]
    pub operation: OperationArgs,
    #[command(flatten)]
    pub rollout: RolloutArgs,
}

#[derive(Debug, Subcommand)]
pub enum NodesCommand {
    /// List them
    List {
        #[command(flatten)]
        cluster: ClusterArgs,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Move the pods of a machine elsewhere, so that it can be worked on or removed
    Drain {
        node: String,
        /// Pods that nothing recreates go too
        #[arg(long)]
        force: bool,
        /// Time that a pod gets to end, seconds; without it, its own
        #[arg(long, value_name = "SECONDS")]
        #[arg(value_parser = clap::value_parser!(u64).range(1..=3600))]
        grace_period: Option<u64>,
        /// Longest time of the operation, seconds
        #[arg(long, value_name = "SECONDS", default_value_t = 300)]
        #[arg(value_parser = clap::value_parser!(u64).range(1..=3600))]
        timeout: u64,
        #[command(flatten)]
        follow: FollowArgs,
        #[command(flatten)]
        cluster: ClusterArgs,
    },
    /// Let pods come to a machine again that was drained
    Uncordon {
        node: String,
        #[command(flatten)]
        follow: FollowArgs,
        #[command(flatten)]
        cluster: ClusterArgs,
    },
    /// Take a machine out of its cluster that is drained, or no longer there
    Remove {
        node: String,
        /// Also one that is ready and was not drained
        #[arg(long)]
        force: bool,
        #[command(flatten)]
        follow: FollowArgs,
        #[command(flatten)]
        cluster: ClusterArgs,
    },
}

fn since(text: &str) -> Result<u64, &'static str> {
    let time = parse_duration(text).map(|time| time.as_secs()).filter(|seconds| *seconds > 0);
    time.ok_or("give a time of a second to a day, such as 90s, 10m or 2h")
}

#[cfg(test)]
mod tests;
