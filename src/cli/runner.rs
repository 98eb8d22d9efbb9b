//! The arguments of `runner`.

use clap::{Args, Subcommand};

use super::common::OutputArgs;
use crate::runner::config::{CONFIG, keys_help};

#[derive(Debug, Args)]
#[command(after_help = keys_help())]
pub struct RunnerArgs {
    #[command(subcommand)]
    pub command: Option<JobRunnerCommand>,
    /// Settings of the Runner
    #[arg(long, value_name = "FILE", default_value = CONFIG)]
    pub config: String,
}

/// Without one of these: take jobs.
#[derive(Debug, Subcommand)]
pub enum JobRunnerCommand {
    /// Say how the Runner on this machine is; fails where there is none
    Status {
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Seal a value from standard input for a job of yours: the project's Runners alone can read it
    Seal {
        /// Public key of the Runners; without: the one that the control plane has
        #[arg(long, value_name = "BASE64", requires_all = ["project", "maker"])]
        key: Option<String>,
        /// Id of the project, with --key
        #[arg(long, value_name = "ID", requires = "key")]
        project: Option<String>,
        /// Id of who makes the job, with --key
        #[arg(long, value_name = "ID", requires = "key")]
        maker: Option<String>,
        /// Name of the control plane that you are logged in to
        #[arg(long, value_name = "NAME")]
        context: Option<String>,
    },
    /// Publish a job and wait for its answer
    Send(SendArgs),
}

#[derive(Debug, Args)]
pub struct SendArgs {
    /// The job, JSON; - is standard input
    pub file: String,
    /// File with the URL of the broker [env: PIPEOPS_AMQP_URL holds the URL itself]
    #[arg(long, value_name = "FILE")]
    pub amqp_url_file: Option<String>,
    /// File with the CA of the broker, PEM
    #[arg(long, value_name = "FILE")]
    pub amqp_ca: Option<String>,
    /// How long the job may be begun, seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 3600,
        value_parser = clap::value_parser!(u32).range(1..=86_400))]
    pub ttl: u32,
    /// Do not wait: the answer goes to the queue of the project
    #[arg(long)]
    pub detach: bool,
    /// Name of the control plane that you are logged in to
    #[arg(long, value_name = "NAME")]
    pub context: Option<String>,
    #[command(flatten)]
    pub output: OutputArgs,
}
