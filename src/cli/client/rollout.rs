//! The arguments of operations on many clusters.

use clap::{Args, Subcommand};

use super::{OutputArgs, selector, since};

/// Many clusters in place of one.
#[derive(Debug, Default, Args)]
pub struct RolloutArgs {
    /// On all clusters with such labels: env=prod,tier in (web,api),!legacy; or id, name, provider,
    /// region, zone. Labels that agents report count unless the control plane has set that key
    #[arg(long, short = 'l', value_name = "SELECTOR", group = "many", conflicts_with = "cluster")]
    #[arg(value_parser = selector)]
    pub selector: Option<String>,
    /// On all clusters that your token reaches
    #[arg(long, group = "many", conflicts_with = "cluster")]
    pub all_clusters: bool,
    /// How many clusters at a time, as in 1,10%,all; without: all at once. The first failure stops
    /// what has not begun
    #[arg(long, value_name = "WAVES", requires = "many")]
    pub waves: Option<String>,
    /// How long a cluster that is offline may take to come back: 90s, 10m, 2h; without: it fails
    #[arg(long, value_name = "TIME", requires = "many", value_parser = since)]
    pub ttl: Option<u64>,
}

impl RolloutArgs {
    /// Whether many clusters are meant.
    pub fn is_given(&self) -> bool {
        self.all_clusters || self.selector.is_some()
    }
}

#[derive(Debug, Subcommand)]
pub enum RolloutCommand {
    /// List them, the newest first
    List {
        /// How many at most
        #[arg(long, value_name = "NUMBER", default_value_t = 50)]
        #[arg(value_parser = clap::value_parser!(u32).range(1..=500))]
        limit: u32,
        /// Context to use in place of the one in use
        #[arg(long, value_name = "NAME")]
        context: Option<String>,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Show one with each of its clusters
    Status(RolloutReachArgs),
    /// Go on with the clusters that wait since an operation has failed
    Resume {
        /// Do not wait for its end
        #[arg(long)]
        detach: bool,
        #[command(flatten)]
        reach: RolloutReachArgs,
    },
    /// Begin on no more clusters; what runs ends by itself
    Cancel(RolloutReachArgs),
}

/// A rollout that was begun.
#[derive(Debug, Args)]
pub struct RolloutReachArgs {
    /// Its id, as `rollout list` shows it
    pub id: String,
    /// Context to use in place of the one in use
    #[arg(long, value_name = "NAME")]
    pub context: Option<String>,
    #[command(flatten)]
    pub output: OutputArgs,
}
