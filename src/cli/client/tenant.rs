//! The arguments of `tenant`.

use clap::{Args, Subcommand};

use super::{ClusterArgs, FollowArgs, OutputArgs};

#[derive(Debug, Subcommand)]
pub enum TenantCommand {
    /// Make a tenant, or change one: what is given is all that it has afterwards
    Set(TenantArgs),
    /// List them with their namespaces, and what those use
    List {
        #[command(flatten)]
        cluster: ClusterArgs,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Show one, with all of its quota and hosts
    Show {
        name: String,
        #[command(flatten)]
        cluster: ClusterArgs,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Delete one: its namespaces with all that is in them, data too
    Delete {
        name: String,
        /// Do not ask for the name again
        #[arg(long, short = 'y')]
        yes: bool,
        /// Longest time of the operation, seconds
        #[arg(long, value_name = "SECONDS", default_value_t = 300)]
        #[arg(value_parser = clap::value_parser!(u64).range(1..=3600))]
        timeout: u64,
        #[command(flatten)]
        follow: FollowArgs,
        #[command(flatten)]
        cluster: ClusterArgs,
    },
}

#[derive(Debug, Args)]
pub struct TenantArgs {
    /// 1 to 40 lower-case letters, digits and -
    pub name: String,
    /// Namespaces that it has, each with the whole quota; they are made where they are not there
    #[arg(long, short, value_name = "NAMESPACES", value_delimiter = ',', required = true)]
    pub namespace: Vec<String>,
    /// cpu, memory, storage, pods, load-balancers and node-ports of each namespace; of the last two
    /// 0 where nothing is said, the others without a limit
    #[arg(long, value_name = "NAME=QUANTITY", value_delimiter = ',', value_parser = quota)]
    pub quota: Vec<(&'static str, serde_json::Value)>,
    /// Level that Pod Security enforces
    #[arg(long, value_name = "LEVEL", default_value = "baseline")]
    #[arg(value_parser = ["baseline", "restricted"])]
    pub pod_security: String,
    /// Host names that its applications may have, `*.NAME` too
    #[arg(long, value_name = "HOSTS", value_delimiter = ',')]
    pub host: Vec<String>,
    /// Private ranges that its pods may reach
    #[arg(long, value_name = "CIDRS", value_delimiter = ',')]
    pub egress: Vec<String>,
    /// Namespaces of the tenant that are deleted, with all that is in them
    #[arg(long, value_name = "NAMESPACES", value_delimiter = ',')]
    pub remove_namespace: Vec<String>,
    /// Do not ask whether something is to be deleted, taken away or loosened
    #[arg(long, short = 'y')]
    pub yes: bool,
    /// Longest time of the operation, seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 300)]
    #[arg(value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub timeout: u64,
    #[command(flatten)]
    pub follow: FollowArgs,
    #[command(flatten)]
    pub cluster: ClusterArgs,
}

/// A quantity of a quota under its name in an operation; a number is counted, a text is one of
/// Kubernetes.
pub(super) fn quota(text: &str) -> Result<(&'static str, serde_json::Value), String> {
    const QUANTITIES: [&str; 3] = ["cpu", "memory", "storage"];
    const COUNTS: [(&str, &str); 3] =
        [("pods", "pods"), ("load-balancers", "load_balancers"), ("node-ports", "node_ports")];
    let (name, value) = text.split_once('=').ok_or("a quantity is NAME=QUANTITY, as in cpu=2")?;
    if let Some(known) = QUANTITIES.into_iter().find(|known| *known == name) {
        return Ok((known, value.into()));
    }
    let known = COUNTS.into_iter().find(|(known, _)| *known == name);
    let names = "cpu, memory, storage, pods, load-balancers or node-ports";
    let (_, known) = known.ok_or(format!("`{name}` is not one of {names}"))?;
    let count: u32 = value.parse().map_err(|_| format!("{name} is a whole number"))?;
    Ok((known, count.into()))
}
