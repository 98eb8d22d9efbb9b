//! The arguments of `control-plane` and its subcommands.

use clap::{Args, Subcommand};

use super::common::{OutputArgs, selector};
use crate::base::text::is_label_key;
use crate::contract::selector::parse_label;
use crate::control_plane::LONGEST_TTL;
use crate::control_plane::settings::ControlPlaneOptions;

#[derive(Debug, Args)]
#[command(subcommand_negates_reqs = true)]
pub struct ControlPlaneArgs {
    #[command(subcommand)]
    pub command: Option<ControlPlaneCommand>,
    #[command(flatten)]
    pub serve: ServeArgs,
}

/// Without a subcommand: serve.
#[derive(Debug, Args)]
pub struct ServeArgs {
    #[command(flatten)]
    pub options: ControlPlaneOptions,
    /// Read this config file instead of /etc/pipeops/control-plane.toml
    #[arg(long, value_name = "FILE")]
    pub config: Option<String>,
    #[command(flatten)]
    pub location: DataDirArgs,
}

/// Which control plane: before a subcommand or after it.
#[derive(Debug, Args)]
pub struct DataDirArgs {
    /// Directory with its keys and database
    #[arg(long, value_name = "DIR", default_value = crate::control_plane::STATE, global = true)]
    pub data_dir: String,
    /// Work in a directory that stands for the machine
    #[arg(long, value_name = "DIR", default_value = "/", hide_default_value = true, global = true)]
    pub root: String,
}

#[derive(Debug, Subcommand)]
pub enum ControlPlaneCommand {
    /// Tokens that let new servers in
    #[command(subcommand)]
    Token(TokenCommand),
    /// Clusters that have registered
    #[command(subcommand)]
    Cluster(ClusterCommand),
    /// Programs that drive clusters through this control plane
    #[command(subcommand)]
    Runner(RunnerCommand),
    /// People who use the command line against this control plane
    #[command(subcommand)]
    User(UserCommand),
    /// Owners of tokens, clusters and Runners
    #[command(subcommand)]
    Project(ProjectCommand),
    /// People who may do everything here, on the page as well
    #[command(subcommand)]
    Admin(AdminCommand),
    /// Print what an external frps needs in its configuration; there is a secret in it
    FrpsConfig,
    /// Write all that it knows and its keys into a file; it may go on running
    Backup {
        /// A new file
        file: String,
        #[command(flatten)]
        database: DatabaseArgs,
    },
    /// Make what a backup holds of an empty data directory and database
    Restore {
        file: String,
        #[command(flatten)]
        database: DatabaseArgs,
    },
}

/// Where a control plane keeps what it knows.
#[derive(Debug, Args)]
pub struct DatabaseArgs {
    /// File with the URL of its PostgreSQL database, where it has one
    #[arg(long, value_name = "FILE")]
    pub database_url_file: Option<String>,
}

/// What the control plane would refuse is refused with the name of the flag.
fn ttl() -> clap::builder::RangedI64ValueParser<i64> {
    clap::value_parser!(i64).range(1..=LONGEST_TTL)
}

fn label(text: &str) -> Result<String, String> {
    parse_label(text).map(|_| text.to_owned())
}

fn label_change(text: &str) -> Result<String, String> {
    match text.strip_suffix('-') {
        Some(key) if is_label_key(key) => Ok(text.to_owned()),
        _ => label(text),
    }
}

#[derive(Debug, Subcommand)]
pub enum TokenCommand {
    /// Make one and print the line to paste on a VM
    Create {
        /// Project that its servers belong to
        #[arg(long, default_value = "default")]
        project: String,
        /// What it is for
        #[arg(long, default_value = "token")]
        name: String,
        /// How long it lets servers in, seconds
        #[arg(long, value_name = "SECONDS", default_value_t = 86_400, value_parser = ttl())]
        ttl: i64,
        /// How many servers it lets in; 0: any number
        #[arg(long, value_name = "NUMBER", default_value_t = 1)]
        uses: u32,
        /// Label that a new cluster gets here, KEY=VALUE
        #[arg(long, value_name = "LABEL", value_delimiter = ',', value_parser = label)]
        cluster_label: Vec<String>,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Show all; never the tokens themselves
    List {
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Let nobody in with it from now on
    Revoke {
        id: String,
        #[command(flatten)]
        output: OutputArgs,
    },
}

#[derive(Debug, Subcommand)]
pub enum ClusterCommand {
    /// Show all with their state
    List {
        /// Only those with such labels: env=prod,tier in (web,api),!legacy; or id, name, provider,
        /// region, zone
        #[arg(long, short = 'l', value_name = "SELECTOR", value_parser = selector)]
        selector: Option<String>,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Show one, with what its agent sees
    Show {
        /// Id or name
        cluster: String,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Set labels of one here, or take them away: rights and selectors follow from them
    Label {
        /// Id or name
        cluster: String,
        /// KEY=VALUE sets one, KEY- takes it away
        #[arg(required = true, value_name = "LABEL", value_parser = label_change)]
        labels: Vec<String>,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Print a kubeconfig with which kubectl reaches it for a day
    Kubeconfig {
        /// Id or name
        cluster: String,
        /// viewer, deployer, operator or admin
        #[arg(long, default_value = "operator")]
        role: String,
        /// Only these namespaces
        #[arg(long, value_name = "NAMES", value_delimiter = ',')]
        namespaces: Option<Vec<String>>,
        /// Write it to this file, mode 0600, and print nothing
        #[arg(long, value_name = "FILE")]
        write: Option<String>,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Refuse its agent from now on and end its streams
    Revoke {
        /// Id or name
        cluster: String,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Forget it; its agent needs a token to come back
    Remove {
        /// Id or name
        cluster: String,
        #[command(flatten)]
        output: OutputArgs,
    },
}

/// What a new token of the Runner side may do, for how long.
#[derive(Debug, Args)]
pub struct AccessArgs {
    #[arg(long, default_value = "default")]
    pub project: String,
    /// Highest role that it acts in: viewer, deployer, operator or admin
    #[arg(long, default_value = "deployer")]
    pub role: String,
    /// Only these clusters, by id or name
    #[arg(long, value_name = "IDS", value_delimiter = ',')]
    pub clusters: Option<Vec<String>>,
    /// Only clusters with such labels, set with `cluster label`: env=prod,!legacy; or id in (A,B)
    #[arg(
        long,
        short = 'l',
        value_name = "SELECTOR",
        value_parser = selector,
        conflicts_with = "clusters"
    )]
    pub selector: Option<String>,
    /// Only these namespaces
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    pub namespaces: Option<Vec<String>>,
    /// Only the namespaces of this tenant
    #[arg(long, value_name = "TENANT")]
    pub tenant: Option<String>,
    /// How long it is good, seconds; without: until it is revoked
    #[arg(long, value_name = "SECONDS", value_parser = ttl())]
    pub ttl: Option<i64>,
}

#[derive(Debug, Subcommand)]
pub enum RunnerCommand {
    /// Make one and print its token
    Create {
        name: String,
        #[command(flatten)]
        access: AccessArgs,
        /// It brings jobs from RabbitMQ (`pipeops runner`); of the roles viewer is enough then
        #[arg(long, conflicts_with = "tenant")]
        jobs: bool,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Show all, users and kubeconfigs too
    List {
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Refuse it from now on and end its streams
    Revoke {
        /// Id or name
        runner: String,
        #[command(flatten)]
        output: OutputArgs,
    },
}

#[derive(Debug, Subcommand)]
pub enum UserCommand {
    /// Make one and print the line that logs in, and below it the token, shown this once
    Create {
        /// One user has it, whatever the project
        name: String,
        #[command(flatten)]
        access: AccessArgs,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Show all
    List {
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Refuse the token from now on, with the kubeconfigs that were made with it
    Revoke {
        name: String,
        #[command(flatten)]
        output: OutputArgs,
    },
}

#[derive(Debug, Subcommand)]
pub enum AdminCommand {
    /// Make one and print the token, shown this once
    Create {
        name: String,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Show all
    List {
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Refuse the token from now on and end its sessions
    Revoke {
        id: String,
        #[command(flatten)]
        output: OutputArgs,
    },
}

#[derive(Debug, Subcommand)]
pub enum ProjectCommand {
    /// Make one
    Create {
        name: String,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Forget what values in its jobs are sealed to: the next Runner that starts tells its key
    ResetSealingKey {
        /// Id or name
        project: String,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Show all
    List {
        #[command(flatten)]
        output: OutputArgs,
    },
}
