//! Arguments that several commands have.

use clap::{Args, ValueEnum};

use crate::contract::selector::Selector;

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OutputFormat {
    Text,
    Json,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum EventFormat {
    Json,
}

/// A selector of clusters, as it is written from then on.
pub(super) fn selector(text: &str) -> Result<String, String> {
    Selector::parse(text).map(|selector| selector.to_string())
}

#[derive(Debug, Args)]
pub struct RootArgs {
    /// Work in a directory that stands for the machine
    #[arg(long, value_name = "DIR", default_value = "/", hide_default_value = true)]
    pub root: String,
}

#[derive(Debug, Args)]
pub struct OutputArgs {
    /// Format on standard output
    #[arg(long, short, value_name = "FORMAT", default_value = "text")]
    pub output: OutputFormat,
}
