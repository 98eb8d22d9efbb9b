//! An operation of a command: asked for, watched to its end, and what a command says of it.

use std::time::Duration;

use serde_json::{Value, json};

use super::Session;
use crate::base::error::{Exit, Failure};
use crate::cli::{ClusterArgs, FollowArgs};
use crate::client::clusters::Cluster;
use crate::client::operations::{self, Step};
use crate::contract::types::Operation;
use crate::output::Printer;

/// Beside the time of the operation itself: a rollback that follows it has 120 s.
const GRACE: Duration = Duration::from_secs(180);

/// What is asked for, and of what.
pub(super) struct Request {
    /// Of a rollout over many it is empty.
    pub(super) cluster: Cluster,
    /// What is changed: `production/web`.
    pub(super) title: String,
    pub(super) kind: &'static str,
    pub(super) spec: Value,
    /// Longest time of the operation, seconds.
    pub(super) timeout_s: u64,
    /// The command that shows how far it is.
    pub(super) look: String,
}

/// The command that shows an application, with the options that say where it is.
pub(super) fn look_at(namespace: &str, name: &str, cluster: &ClusterArgs) -> String {
    format!("pipeops status {name} -n {namespace}{}", options_of(cluster))
}

/// The options that were given, for another command at the same place.
pub(super) fn options_of(cluster: &ClusterArgs) -> String {
    let option = |name: &str, value: &Option<String>| {
        value.as_ref().map(|value| format!(" --{name} {value}")).unwrap_or_default()
    };
    format!("{}{}", option("cluster", &cluster.cluster), option("context", &cluster.context))
}

impl Request {
    /// Asks for the operation and watches it to its end. None where nobody waits for that. Ctrl-C
    /// ends the command, never the operation.
    ///
    /// # Errors
    /// What is refused; what becomes of an operation that is no longer watched.
    pub(super) async fn carry_out(
        &self,
        session: &Session<'_>,
        printer: &mut Printer,
        args: &FollowArgs,
        mut told: impl FnMut(&mut Printer, Step<'_>),
    ) -> anyhow::Result<Option<Operation>> {
        let key = args.idempotency_key.clone().unwrap_or_else(operations::fresh_key);
        let (api, cluster) = (&session.api, &self.cluster.id);
        let body = json!({"kind": self.kind, "spec": self.spec});
        let asked = async {
            let asked = operations::submit(api, cluster, &body, &key).await;
            asked.map_err(|failure| self.undecided(failure, &key))
        };
        let stopped = Failure::new(Exit::Interrupted, "INTERRUPTED", "interrupted");
        let stopped = || self.undecided(stopped, &key);
        let begun = session.context.or_stopped(asked, stopped).await?;
        if args.detach {
            printer.document(&begun);
            printer.data(&begun.id);
            printer.say(&format!("it goes on by itself; to look: {}", self.look));
            return Ok(None);
        }
        printer.waiting(&format!("{}: {} on {}", self.title, self.kind, self.cluster.name));
        let limit = Duration::from_secs(self.timeout_s) + GRACE;
        let told = |event: &Value| {
            if let Some(step) = Step::of(event) {
                told(printer, step);
            }
        };
        let followed = tokio::select! {
            biased;
            () = session.context.stop.cancelled() => {
                let what = "stopped watching; the operation goes on";
                Err(Failure::new(Exit::Interrupted, "DETACHED", what))
            }
            followed = operations::follow(api, cluster, &begun.id, limit, told) => followed,
        };
        printer.waited();
        Ok(Some(followed.map_err(|failure| self.unwatched(failure, &begun.id))?))
    }

    /// A request that failed on its way may have begun something all the same.
    pub(super) fn undecided(&self, failure: Failure, key: &str) -> Failure {
        if !operations::may_have_begun(&failure) {
            return failure;
        }
        let again = format!(
            "the same command with --idempotency-key {key} asks for the same, and never twice; to \
             look: {}",
            self.look
        );
        let mut failure = failure.why("it may have begun all the same");
        failure.hint = Some(joined(failure.hint, &again));
        failure
    }

    /// A failure to watch an operation says nothing about the operation.
    fn unwatched(&self, failure: Failure, id: &str) -> Failure {
        let mut failure =
            failure.why(format!("operation {id} on {} goes on by itself", self.cluster.name));
        failure.hint = Some(joined(failure.hint, &format!("to look how far it is: {}", self.look)));
        failure
    }

    /// Prints what has come of an operation, and ends the command as it ended.
    ///
    /// # Errors
    /// The failure of the operation.
    pub(super) fn conclude(
        &self,
        printer: &Printer,
        args: &FollowArgs,
        operation: &Operation,
        summary: &[String],
    ) -> anyhow::Result<Exit> {
        printer.document(operation);
        let Some(mut failure) = operations::failure(operation) else {
            summary.iter().for_each(|line| printer.data(line));
            return Ok(Exit::Done);
        };
        let mut next = vec![format!("to look: {}", self.look)];
        next.extend(failure.hint.take());
        if args.idempotency_key.is_some() {
            let used = "the key stands for this operation for good: to try again, take another one";
            next.push(used.into());
        }
        failure.hint = Some(next.join("; "));
        Err(failure.into())
    }
}

/// A hint with what can be done besides.
fn joined(hint: Option<String>, more: &str) -> String {
    hint.map_or_else(|| more.to_owned(), |hint| format!("{hint}; {more}"))
}

/// Tells a step: what is waited for beside a spinner, what was done in a line of its own.
pub(super) fn tell(printer: &mut Printer, step: Step<'_>) {
    match step {
        Step::Waits(message) => printer.waiting(message),
        Step::Touched { object, outcome } => printer.say(&format!("  {object} {outcome}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::contract::types::OperationState;

    fn request() -> Request {
        let args = ClusterArgs { context: None, cluster: Some("eu".into()) };
        Request {
            cluster: Cluster { id: "c-1".into(), name: "eu".into() },
            title: "beta/web".into(),
            kind: "scale",
            spec: json!({}),
            timeout_s: 300,
            look: look_at("beta", "web", &args),
        }
    }

    #[test]
    fn who_no_longer_watches_knows_what_may_go_on_and_how_to_ask_again() {
        let request = request();
        let silent = || Failure::new(Exit::Network, "CONTROL_PLANE_SILENT", "no").hint("wait");
        let undecided = request.undecided(silent(), "k-1").render();
        for said in [
            "it may have begun",
            "hint: wait; ",
            "--idempotency-key k-1",
            "pipeops status web -n beta --cluster eu",
        ] {
            assert!(undecided.contains(said), "{undecided}");
        }
        let refused = Failure::new(Exit::Refused, "ROLE_EXCEEDED", "no");
        assert!(!request.undecided(refused, "k-1").render().contains("begun"));
        let unwatched = request.unwatched(silent(), "o-1").render();
        assert!(unwatched.contains("operation o-1 on eu goes on"), "{unwatched}");
        assert!(unwatched.contains("; to look how far it is: pipeops status"), "{unwatched}");
    }

    #[test]
    fn a_key_of_the_callers_own_is_used_up() {
        let request = request();
        let failed = Operation { state: OperationState::Failed, ..Operation::default() };
        let hint = |key: Option<&str>| {
            let args = FollowArgs {
                detach: false,
                idempotency_key: key.map(str::to_owned),
                output: crate::cli::OutputArgs { output: crate::cli::OutputFormat::Text },
            };
            let printer = Printer::new(false, false, true);
            let ended = request.conclude(&printer, &args, &failed, &[]).unwrap_err();
            Failure::from_error(&ended).hint.unwrap()
        };
        assert!(hint(Some("k")).contains("take another one"));
        assert!(!hint(None).contains("another one"));
    }
}
