//! The command line as types, and the table of names that the program answers to.

mod client;
mod common;
mod control_plane;
mod runner;

use clap::{Args, Parser, Subcommand, ValueEnum};

pub use client::{
    ClientCommand, ClusterArgs, ContextsArgs, ContextsCommand, DeployArgs, ExecArgs, FollowArgs,
    JobArgs, JobCommand, LoginArgs, LogsArgs, NodesCommand, OperationArgs, ReachArgs, RolloutArgs,
    RolloutCommand, RolloutReachArgs, SecretArgs, SecretCommand, TenantArgs, TenantCommand,
};
pub use common::{EventFormat, OutputArgs, OutputFormat, RootArgs};
pub use control_plane::{
    AccessArgs, AdminCommand, ClusterCommand, ControlPlaneArgs, ControlPlaneCommand, DataDirArgs,
    DatabaseArgs, ProjectCommand, RunnerCommand, ServeArgs, TokenCommand, UserCommand,
};
pub use runner::{JobRunnerCommand, RunnerArgs, SendArgs};

use crate::install::settings::Options;

/// Turns bare VMs into managed k3s clusters.
#[derive(Debug, Parser)]
#[command(name = "pipeops", version, max_term_width = 100, disable_help_subcommand = true)]
#[command(after_help = EXIT_HELP)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
    /// Verbosity of logs
    #[arg(
        long,
        global = true,
        env = "LOG_LEVEL",
        hide_env_values = true,
        value_name = "LEVEL",
        default_value = "info",
        ignore_case = true
    )]
    pub log_level: LogLevel,
}

const EXIT_HELP: &str = "Exit codes: 0 done, 1 internal, 2 usage, 3 preflight, 5 network, 6 verification, 7 refused, 8 timed out, 9 rolled back,
10 partly done (run again), 11 declined, 12 locked, 13 problems found, 14 reboot needed, 130/143 interrupted";

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogLevel {
    Debug,
    Info,
    Warn,
    Error,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make this machine a k3s server with PipeOps' namespaces, rights, controllers and agent
    InstallServer(InstallServerArgs),
    /// Make this machine a worker of a server
    JoinWorker(JoinWorkerArgs),
    /// Show nodes, versions, components, the agent, and how to join
    ClusterInfo(ClusterInfoArgs),
    /// Run the agent in the foreground
    Run(RunArgs),
    /// Undo what install-server or join-worker did
    Uninstall(UninstallArgs),
    /// Run a control plane of your own, or manage one that runs on this machine
    ControlPlane(ControlPlaneArgs),
    /// Run a Runner, which does jobs from RabbitMQ, or send it one
    Runner(RunnerArgs),
    #[command(flatten)]
    Client(ClientCommand),
    /// Check or show the record of what was done through the tunnel
    Audit(AuditArgs),
    /// Explain a code of a finding, an error or an operation
    Explain(Explain),
    /// Print shell completions
    Completions {
        /// bash, elvish, fish, powershell, zsh
        shell: clap_complete::Shell,
    },
    /// Print the manual page
    Man,
    /// Mint the agent's Kubernetes credential; run by its unit
    #[command(hide = true)]
    MintCredential(RootArgs),
}

/// How a run talks and how far it goes.
#[derive(Debug, Args)]
pub struct InstallerArgs {
    /// Show what would be done; write nothing
    #[arg(long, help_heading = "Run")]
    pub dry_run: bool,
    /// Save the checked plan; write nothing else
    #[arg(long, value_name = "FILE", help_heading = "Run")]
    pub plan_out: Option<String>,
    /// Carry out exactly a saved plan; refused when the host has changed since
    #[arg(long, value_name = "FILE", conflicts_with = "plan_out", help_heading = "Run")]
    pub apply_plan: Option<String>,
    /// Do not ask
    #[arg(long, short = 'y', help_heading = "Run")]
    pub yes: bool,
    /// Format of the result on standard output
    #[arg(long, short, value_name = "FORMAT", default_value = "text", help_heading = "Run")]
    pub output: OutputFormat,
    /// Also write one JSON object per event to standard error
    #[arg(long, value_name = "FORMAT", help_heading = "Run")]
    pub events: Option<EventFormat>,
    /// Read this config file as well, over those in /etc/pipeops
    #[arg(long, value_name = "FILE", help_heading = "Run")]
    pub config: Option<String>,
    /// Work in a directory that stands for the machine
    #[arg(
        long,
        value_name = "DIR",
        default_value = "/",
        hide_default_value = true,
        help_heading = "Run"
    )]
    pub root: String,
}

#[derive(Debug, Args)]
pub struct InstallServerArgs {
    #[command(flatten)]
    pub options: Options,
    #[command(flatten)]
    pub run: InstallerArgs,
    /// What to make of this machine: server, or agent (a worker; needs K3S_URL and K3S_TOKEN)
    #[arg(
        long,
        env = "NODE_TYPE",
        hide_env_values = true,
        value_name = "TYPE",
        default_value = "server",
        help_heading = "Node"
    )]
    pub node_type: String,
    /// Server to join with --node-type agent
    #[arg(
        long,
        env = "K3S_URL",
        hide_env_values = true,
        value_name = "URL",
        help_heading = "Node"
    )]
    pub k3s_url: Option<String>,
    /// File with the join token for --node-type agent [env: K3S_TOKEN holds the token itself]
    #[arg(long, value_name = "FILE", help_heading = "Node")]
    pub token_file: Option<String>,
}

#[derive(Debug, Args)]
pub struct JoinWorkerArgs {
    /// Address, name or URL of the server; port 6443 unless said
    pub master: String,
    /// Join token, or - to read it from standard input [env: K3S_TOKEN]
    pub token: Option<String>,
    /// Read the token from this file
    #[arg(long, value_name = "FILE", conflicts_with = "token")]
    pub token_file: Option<String>,
    /// Accept a token without the hash of the server's CA: whoever answers is trusted
    #[arg(long)]
    pub insecure_token: bool,
    #[command(flatten)]
    pub options: Options,
    #[command(flatten)]
    pub run: InstallerArgs,
}

#[derive(Debug, Args)]
pub struct ClusterInfoArgs {
    /// Print the line that joins a worker, with a token for workers only
    #[arg(long)]
    pub join: bool,
    /// Format on standard output
    #[arg(long, short, value_name = "FORMAT", default_value = "text")]
    pub output: OutputFormat,
    #[command(flatten)]
    pub root: RootArgs,
}

#[derive(Debug, Args)]
#[command(after_help = crate::agent::config::keys_help())]
pub struct RunArgs {
    /// Settings of the agent
    #[arg(long, value_name = "FILE", default_value = crate::host::paths::AGENT_CONFIG)]
    pub config: String,
    /// Kubernetes credential, over the one in the settings
    #[arg(long, value_name = "FILE")]
    pub kubeconfig: Option<String>,
    /// Taken only to say what was meant
    #[arg(hide = true)]
    pub words: Vec<String>,
    #[command(flatten)]
    pub root: RootArgs,
}

#[derive(Debug, Args)]
pub struct UninstallArgs {
    /// Show what would be undone; write nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Do not ask
    #[arg(long, short = 'y')]
    pub yes: bool,
    /// Remove the data of volumes too
    #[arg(long)]
    pub purge_data: bool,
    /// Format of the result on standard output
    #[arg(long, short, value_name = "FORMAT", default_value = "text")]
    pub output: OutputFormat,
    /// Also write one JSON object per event to standard error
    #[arg(long, value_name = "FORMAT")]
    pub events: Option<EventFormat>,
    #[command(flatten)]
    pub root: RootArgs,
}

#[derive(Debug, Args)]
pub struct AuditArgs {
    #[command(subcommand)]
    pub command: AuditCommand,
    /// Work in a directory that stands for the machine
    #[arg(long, value_name = "DIR", default_value = "/", hide_default_value = true, global = true)]
    pub root: String,
}

#[derive(Debug, Subcommand)]
pub enum AuditCommand {
    /// Walk over the whole log: each record must follow the one before it
    Verify {
        /// Format on standard output
        #[arg(long, short, value_name = "FORMAT", default_value = "text")]
        output: OutputFormat,
    },
    /// Show the last records, as JSON lines
    Tail {
        /// How many
        #[arg(long = "lines", short = 'n', value_name = "NUMBER", default_value_t = 20)]
        lines: usize,
    },
}

#[derive(Debug, Args)]
pub struct Explain {
    /// Code of a finding, an error, a notice or an operation; without one all are listed
    pub code: Option<String>,
    #[command(flatten)]
    pub verb: OutputArgs,
}

/// Other names of the program, and the command that each stands for.
pub const PROGRAM_NAMES: &[(&str, &str)] = &[
    ("pipeops-agent", "run"),
    ("pipeops-install-server", "install-server"),
    ("pipeops-join-worker", "join-worker"),
    ("pipeops-cluster-info", "cluster-info"),
];

/// The arguments with the command that the program's name stands for put in.
pub fn expand_program_name(mut args: Vec<String>) -> Vec<String> {
    let name = args.first().and_then(|a| a.rsplit('/').next()).unwrap_or_default().to_owned();
    if let Some((_, command)) = PROGRAM_NAMES.iter().find(|(n, _)| *n == name) {
        args.insert(1, (*command).to_owned());
    }
    args
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_name_stands_for_a_command_that_exists() {
        for (name, command) in PROGRAM_NAMES {
            let args = expand_program_name(vec![format!("/usr/bin/{name}"), "--help".into()]);
            assert_eq!(args[1], *command);
            assert!(Cli::command().find_subcommand(command).is_some());
        }
        assert_eq!(expand_program_name(vec!["pipeops".into(), "run".into()]), ["pipeops", "run"]);
        // a plugin of kubectl (kubernetes.io/docs/tasks/extend-kubectl/kubectl-plugins) is the
        // program itself
        let plugin = ["/usr/bin/kubectl-pipeops", "apps"].map(str::to_owned).to_vec();
        assert_eq!(expand_program_name(plugin.clone()), plugin);
    }
}
