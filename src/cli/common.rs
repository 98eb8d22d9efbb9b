//! Arguments that several commands have.

use clap::{Args, ValueEnum};

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OutputFormat {
    Text,
    Json,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum EventFormat {
    Json,
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
