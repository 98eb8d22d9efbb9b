//! `job run`: a command in the surroundings of an application, with its log as it is written.

use std::time::Duration;

use serde_json::json;
use tokio::sync::mpsc::channel;
use tokio::time::{sleep, timeout};

use super::deploy::found;
use super::{Context, printer};
use crate::base::error::{Exit, Failure};
use crate::base::task::boxed;
use crate::cli::{JobArgs, RolloutArgs};
use crate::client::api::Api;
use crate::client::applications::ClusterReader;
use crate::client::logs::{LogLine, LogOptions, read, sources};
use crate::client::operations::Step;
use crate::output::Printer;

/// Between looks for the pod of a job.
const LOOK: Duration = Duration::from_secs(1);
/// The end of the log may come later than that of the operation.
const GRACE: Duration = Duration::from_secs(5);
/// Lines that wait to be printed.
const WAITING: usize = 256;

/// Runs a command to its end. Its own exit code is told, and is not that of this program, whose
/// numbers have their meanings: 13 where the command fails.
///
/// # Errors
/// As the operation ends.
pub(super) async fn run(context: &Context, args: JobArgs) -> anyhow::Result<Exit> {
    let follow = &args.operation.follow;
    let one = RolloutArgs::default();
    let (session, mut request) = found(context, &args.name, "job", (&args.operation, &one)).await?;
    request.spec["command"] = json!(args.command);
    let mut printer = printer(context, &follow.output);
    // a document has standard output for itself, and the last lines in it
    let (shows, no_color) = (!printer.json(), context.no_color());
    let mut log = None;
    let told = |printer: &mut Printer, step: Step<'_>| {
        // lines of the log have no spinner beside them
        printer.waited();
        match step {
            Step::Waits(message) => printer.say(&format!("… {message}")),
            Step::Touched { object, outcome } => {
                printer.say(&format!("  {object} {outcome}"));
                if let Some((namespace, job)) = job_of(object)
                    && shows
                {
                    log.get_or_insert_with(|| {
                        let log = JobLog {
                            api: session.api.clone(),
                            cluster: request.cluster.id.clone(),
                            namespace: namespace.to_owned(),
                            job: job.to_owned(),
                        };
                        tokio::spawn(boxed(log.print(Printer::new(false, false, no_color))))
                    });
                }
            }
        }
    };
    let Some(mut operation) = request.carry_out(&session, &mut printer, follow, told).await? else {
        return Ok(Exit::Done);
    };
    if shows {
        let whole = match log {
            Some(mut log) => match timeout(GRACE, &mut log).await {
                Ok(printed) => printed.unwrap_or(false),
                Err(_) => {
                    log.abort();
                    false
                }
            },
            None => false,
        };
        let last = std::mem::take(&mut operation.log);
        if !whole && !last.is_empty() {
            printer.say("the end of its log, as the agent has read it:");
            last.iter().for_each(|line| printer.data(line));
        }
    }
    request.conclude(&printer, follow, &operation, &[])
}

/// Namespace and name of a Job, as an operation tells of it.
fn job_of(object: &str) -> Option<(&str, &str)> {
    object.strip_prefix("Job ")?.split_once('/')
}

/// The log of a Job that runs.
struct JobLog {
    api: Api,
    cluster: String,
    namespace: String,
    job: String,
}

impl JobLog {
    /// Prints it to the end of its container; false where not all of it was read.
    async fn print(self, printer: Printer) -> bool {
        let reader = ClusterReader { api: &self.api, cluster: &self.cluster };
        let base = reader.path(&format!("/api/v1/namespaces/{}", self.namespace));
        let query = format!("labelSelector=batch.kubernetes.io/job-name={}&limit=10", self.job);
        let source = loop {
            let pods = reader.list("/api/v1", Some(&self.namespace), ("pods", "Pod"), &query).await;
            match pods.map(|pods| sources(&pods).into_iter().next()) {
                Ok(Some(source)) => break source,
                Err(failure) if failure.exit == Exit::Refused => return false,
                Ok(None) | Err(_) => sleep(LOOK).await,
            }
        };
        let (lines, mut said) = channel(WAITING);
        let options = LogOptions { follow: true, once: true, ..LogOptions::default() };
        tokio::spawn(boxed(read(self.api.clone(), base, source, options, (0, lines))));
        while let Some((_, line)) = said.recv().await {
            match line {
                LogLine::Said(line) if printer.sourced("", 0, &line) => {}
                // whoever read it has enough
                LogLine::Said(_) => return true,
                LogLine::Gone(_) | LogLine::Failed(_) => return false,
            }
        }
        true
    }
}

/// What `pipeops run` is refused with where somebody seems to mean `job run`: it was given words,
/// or was typed where nobody set up an agent.
///
/// # Errors
/// Exit 2.
pub fn check_run_is_meant(words: &[String], may_be_agent: bool) -> Result<(), Failure> {
    if words.is_empty() && may_be_agent {
        return Ok(());
    }
    let what = match words {
        [] => "there are no settings of an agent here",
        _ => "`pipeops run` is the agent itself, and takes no name",
    };
    let name = words.first().map_or("NAME", String::as_str);
    Err(Failure::usage("RUN_WITHOUT_AGENT", what).hint(format!(
        "did you mean `job run`? pipeops job run {name} -- COMMAND; an agent is set up by pipeops \
         install-server"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn run_is_not_taken_for_a_job() {
        assert!(check_run_is_meant(&[], true).is_ok());
        for (words, may_be_agent, said) in [
            (&[][..], false, "pipeops job run NAME -- COMMAND"),
            (&["web".to_owned(), "migrate".to_owned()], true, "pipeops job run web -- COMMAND"),
        ] {
            let refused = check_run_is_meant(words, may_be_agent).unwrap_err();
            assert_eq!((refused.exit, refused.code.as_str()), (Exit::Usage, "RUN_WITHOUT_AGENT"));
            let hint = refused.hint.unwrap();
            assert!(hint.starts_with("did you mean `job run`?") && hint.contains(said), "{hint}");
        }
    }

    #[test]
    fn the_job_of_an_operation_is_the_one_that_it_tells_of() {
        assert_eq!(job_of("Job beta/web-job-1"), Some(("beta", "web-job-1")));
        assert_eq!(job_of("CronJob beta/web"), None);
        assert_eq!(job_of("Deployment beta/web"), None);
    }
}
