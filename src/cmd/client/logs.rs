//! `logs`: the lines of all pods of an application, as they come.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::Value;
use tokio::sync::mpsc::{Sender, channel};
use tokio::time::sleep;

use super::{Context, Session};
use crate::base::error::{Exit, Failure};
use crate::base::task::boxed;
use crate::cli::LogsArgs;
use crate::client::applications::ClusterReader;
use crate::client::logs::{LogLine, LogOptions, LogSource, read, sources};
use crate::output::Printer;

/// Between looks for pods that are new.
const LOOK: Duration = Duration::from_secs(5);
/// Lines that wait to be printed.
const WAITING: usize = 256;

/// Where the lines of all containers go, each with the number of its container.
type Lines = Sender<(usize, LogLine)>;

/// The containers that are read, by the number that colours their lines.
#[derive(Default)]
struct Readers {
    numbers: BTreeMap<LogSource, usize>,
    titles: Vec<String>,
}

impl Readers {
    /// The containers that are not read yet.
    fn fresh(&mut self, found: Vec<LogSource>) -> Vec<(usize, LogSource)> {
        let mut fresh = Vec::new();
        for source in found {
            if !self.numbers.contains_key(&source) {
                let number = self.titles.len();
                self.titles.push(source.title.clone());
                self.numbers.insert(source.clone(), number);
                fresh.push((number, source));
            }
        }
        fresh
    }
}

/// # Errors
/// What the control plane or the cluster refuses, also where only one log is not read to its end;
/// exit 130 when interrupted.
pub(super) async fn logs(context: &Context, args: LogsArgs) -> anyhow::Result<Exit> {
    let session = Session::open(context, args.reach.cluster.context.as_deref())?;
    let (cluster, namespace) = session.find(&args.name, &args.reach).await?;
    let reader = ClusterReader { api: &session.api, cluster: &cluster.id };
    let options =
        LogOptions { follow: args.follow, tail: args.tail, since_s: args.since, once: false };
    let base = reader.path(&format!("/api/v1/namespaces/{namespace}"));
    let spawn = |(number, source): (usize, LogSource), options: LogOptions, lines: &Lines| {
        let (api, base) = (session.api.clone(), base.clone());
        tokio::spawn(boxed(read(api, base, source, options, (number, lines.clone()))));
    };
    let mut readers = Readers::default();
    let (lines, mut said) = channel(WAITING);
    let pods = context.unless_stopped(reader.pods(&namespace, &args.name)).await?;
    let found = readers.fresh(sources(&pods));
    if found.is_empty() && !args.follow {
        let what = format!("{namespace}/{} has no pods", args.name);
        return Err(Failure::new(Exit::Problems, "NO_PODS", what)
            .hint(format!("pipeops status {} -n {namespace} says why", args.name))
            .into());
    }
    found.into_iter().for_each(|source| spawn(source, options.clone(), &lines));
    // as long as new pods may come, somebody may still say something
    let lines = args.follow.then_some(lines);
    let (looked, mut new_pods) = channel(1);
    let look = look_for_pods(&reader, &namespace, &args.name, looked);
    tokio::pin!(look);
    let mut printed = Printed::new(Printer::new(false, false, context.no_color()), args.follow);
    loop {
        tokio::select! {
            () = context.stop.cancelled() => {
                return Err(Failure::new(Exit::Interrupted, "INTERRUPTED", "interrupted").into());
            }
            line = said.recv() => match line {
                None => return printed.end().map_err(Into::into),
                Some(line) => if let Some(end) = printed.line(&readers, line) {
                    return end.map_err(Into::into);
                }
            },
            Some(pods) = new_pods.recv() => {
                // all that they have said is new
                let options = LogOptions { tail: None, ..options.clone() };
                let Some(lines) = &lines else { continue };
                let found = readers.fresh(sources(&pods));
                found.into_iter().for_each(|source| spawn(source, options.clone(), lines));
            }
            refused = &mut look, if lines.is_some() => return Err(refused.into()),
        }
    }
}

/// Sends the pods of an application again and again, until a look is refused. One that fails
/// otherwise is made again.
async fn look_for_pods(
    reader: &ClusterReader<'_>,
    namespace: &str,
    name: &str,
    pods: Sender<Vec<Value>>,
) -> Failure {
    loop {
        sleep(LOOK).await;
        match reader.pods(namespace, name).await {
            Ok(found) => drop(pods.send(found).await),
            Err(failure) if failure.exit == Exit::Refused => return failure,
            Err(_) => {}
        }
    }
}

/// What was printed, and what has failed so far.
struct Printed {
    printer: Printer,
    follow: bool,
    failed: Option<Failure>,
}

impl Printed {
    fn new(printer: Printer, follow: bool) -> Printed {
        Printed { printer, follow, failed: None }
    }

    /// Prints a line; how the command ends, where it ends with it.
    fn line(
        &mut self,
        readers: &Readers,
        (number, line): (usize, LogLine),
    ) -> Option<Result<Exit, Failure>> {
        match line {
            LogLine::Said(line) => {
                let several = readers.titles.len() > 1;
                let title = readers.titles.get(number).filter(|_| several);
                let title = title.map_or("", String::as_str);
                // whoever read it has enough
                (!self.printer.sourced(title, number, &line)).then_some(Ok(Exit::Done))
            }
            LogLine::Failed(failure) if self.follow => Some(Err(failure)),
            LogLine::Gone(why) if self.follow => {
                self.printer.say(&why);
                None
            }
            LogLine::Failed(failure) => self.fails(failure),
            LogLine::Gone(why) => self.fails(Failure::new(Exit::Problems, "POD_GONE", why)),
        }
    }

    /// The others are read to their ends all the same.
    fn fails(&mut self, failure: Failure) -> Option<Result<Exit, Failure>> {
        match &self.failed {
            None => self.failed = Some(failure),
            Some(_) => self.printer.say(&failure.line()),
        }
        None
    }

    /// All logs have ended.
    fn end(self) -> Result<Exit, Failure> {
        self.failed.map_or(Ok(Exit::Done), Err)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_container_is_read_once_and_keeps_its_number() {
        let source =
            |pod: &str| LogSource { pod: pod.into(), container: "web".into(), title: pod.into() };
        let mut readers = Readers::default();
        let numbers = |fresh: Vec<(usize, LogSource)>| -> Vec<(usize, String)> {
            fresh.into_iter().map(|(number, source)| (number, source.pod)).collect()
        };
        let first = numbers(readers.fresh(vec![source("b"), source("a")]));
        assert_eq!(first, [(0, "b".into()), (1, "a".into())]);
        let second = numbers(readers.fresh(vec![source("a"), source("c")]));
        assert_eq!(second, [(2, "c".into())]);
        assert_eq!(readers.titles, ["b", "a", "c"]);
    }

    #[test]
    fn a_log_that_is_not_whole_is_no_success() {
        let readers = Readers::default();
        let printed = |follow| Printed::new(Printer::new(false, false, true), follow);
        let failed = |exit| LogLine::Failed(Failure::new(exit, "CODE", "web-1: no"));
        let gone = || LogLine::Gone("web-2: the pod is gone".into());
        let exit = |end: Result<Exit, Failure>| end.unwrap_or_else(|failure| failure.exit);
        // once: the others go on, and the first failure is what the command ends with
        let mut once = printed(false);
        assert!(once.line(&readers, (0, failed(Exit::Network))).is_none());
        assert!(once.line(&readers, (1, gone())).is_none());
        assert_eq!(exit(once.end()), Exit::Network);
        let mut once = printed(false);
        assert!(once.line(&readers, (0, gone())).is_none());
        assert_eq!(exit(once.end()), Exit::Problems);
        assert_eq!(exit(printed(false).end()), Exit::Done);
        // followed: pods come and go, a token that is refused ends it
        let mut followed = printed(true);
        assert!(followed.line(&readers, (0, gone())).is_none());
        let end = followed.line(&readers, (0, failed(Exit::Refused)));
        assert_eq!(end.map(exit), Some(Exit::Refused));
    }
}
