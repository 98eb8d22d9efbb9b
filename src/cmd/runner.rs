//! `runner`: runs a Runner, or says how the one on this machine is.

use super::{Context, client};
use crate::base::error::{Exit, Failure};
use crate::cli::{JobRunnerCommand, OutputFormat, RunnerArgs};
use crate::output::Printer;
use crate::runner::config::{RunnerConfig, state_dir};
use crate::runner::status::RunnerStatus;

/// # Errors
/// Exit 2 for settings that are wrong; as the subcommand ends.
pub async fn runner(context: &Context, args: RunnerArgs) -> anyhow::Result<Exit> {
    let host = context.host("/");
    match args.command {
        None => {
            let amqp_url = context.amqp_url.clone();
            let config = RunnerConfig::load(&host, &args.config, &context.env, amqp_url)?;
            crate::runner::run(host, config, context.stop.clone()).await?;
            Ok(Exit::Done)
        }
        Some(JobRunnerCommand::Status { output }) => {
            let json = output.output == OutputFormat::Json;
            let printer = Printer::new(json, false, context.no_color());
            let state = host.read_only_state_dir(&state_dir(&context.env));
            let status = RunnerStatus::read(&state).ok_or_else(|| {
                let what = "no Runner is at work on this machine, or it hangs";
                Failure::new(Exit::Problems, "RUNNER_SILENT", what)
                    .why("its state was not written within the last minute")
                    .hint("systemctl status pipeops-runner")
            })?;
            printer.document(&status);
            printer.data(&status.line());
            Ok(Exit::Done)
        }
        Some(JobRunnerCommand::Seal { key, project, maker, context: name }) => {
            let given = key.zip(project).zip(maker);
            let given = given.map(|((key, project), maker)| [key, project, maker]);
            client::seal(context, given, name.as_deref()).await
        }
        Some(JobRunnerCommand::Send(args)) => client::send(context, args).await,
    }
}
