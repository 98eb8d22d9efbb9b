//! One function a command, over a shared beginning: host, config files, secrets.

pub mod audit;
pub mod client;
pub mod control_plane;
pub mod explain;
mod given;
pub mod info;
pub mod install;
mod installer;
pub mod join;
pub mod runner;
mod secrets;
pub mod uninstall;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use tokio_util::sync::CancellationToken;

use crate::base::error::{Exit, Failure};
use crate::base::secret::Secret;
use crate::host::Host;
use crate::host::user_files::unreadable;
use crate::output::Printer;

/// The next step of an installer that cannot ask.
pub(crate) const UNASKED: &str = "run again with --yes, or look with --dry-run";

/// What `main` hands to a command.
pub struct Context {
    /// The environment, without secrets.
    pub env: BTreeMap<String, String>,
    /// Join token from the command line or the environment.
    pub k3s_token: Option<Secret>,
    /// Enrolment token from the environment.
    pub agent_token: Option<Secret>,
    /// URLs of a control plane's database and message broker, from the command line or the
    /// environment.
    pub database_url: Option<Secret>,
    pub amqp_url: Option<Secret>,
    /// Cancelled by the first SIGINT or SIGTERM.
    pub stop: CancellationToken,
    /// The signal was SIGTERM.
    pub terminated: Arc<AtomicBool>,
}

impl Context {
    pub(crate) fn host(&self, root: &str) -> Host {
        Host::new(root, self.env.get("PATH").map(Into::into))
    }

    /// The machine below `root`.
    ///
    /// # Errors
    /// Exit 2 when there is no such directory.
    pub(crate) fn existing_host(&self, root: &str) -> anyhow::Result<Host> {
        let host = self.host(root);
        if host.is_dir("/") {
            return Ok(host);
        }
        let what = format!("--root {root}: there is no such directory");
        Err(Failure::usage("ROOT_MISSING", what).into())
    }

    pub(crate) fn no_color(&self) -> bool {
        self.env.get("NO_COLOR").is_some_and(|v| !v.is_empty())
    }

    /// The result of `work`, unless the user interrupts it: for all that waits before the first
    /// change.
    ///
    /// # Errors
    /// Exit 130 when interrupted, else that of `work`.
    pub(crate) async fn unless_stopped<T, E: Into<anyhow::Error>>(
        &self,
        work: impl Future<Output = Result<T, E>>,
    ) -> anyhow::Result<T> {
        let stopped = || {
            Failure::new(Exit::Interrupted, "INTERRUPTED", "interrupted").why("nothing was changed")
        };
        self.or_stopped(work, stopped).await
    }

    /// The same of work that may have changed something by then: `stopped` says what.
    ///
    /// # Errors
    /// `stopped` when interrupted, else that of `work`.
    pub(crate) async fn or_stopped<T, E: Into<anyhow::Error>>(
        &self,
        work: impl Future<Output = Result<T, E>>,
        stopped: impl FnOnce() -> Failure,
    ) -> anyhow::Result<T> {
        tokio::select! {
            biased;
            () = self.stop.cancelled() => Err(stopped().into()),
            done = work => done.map_err(Into::into),
        }
    }

    /// Asks whether to go on. `unasked` is the next step where there is nobody to ask.
    ///
    /// # Errors
    /// Exit 11 unless the answer is yes, 130 when interrupted.
    pub(crate) async fn confirm(
        &self,
        printer: &mut Printer,
        question: &str,
        unasked: &str,
    ) -> anyhow::Result<()> {
        let is_yes = |answer: &str| matches!(answer.to_ascii_lowercase().as_str(), "y" | "yes");
        self.confirm_by(printer, &format!("{question} [y/N]"), unasked, is_yes).await
    }

    /// The same with another answer than `y` as the yes.
    ///
    /// # Errors
    /// As [`Context::confirm`].
    pub(crate) async fn confirm_by(
        &self,
        printer: &mut Printer,
        question: &str,
        unasked: &str,
        is_yes: impl Fn(&str) -> bool,
    ) -> anyhow::Result<()> {
        let declined =
            |what: &str| Failure::new(Exit::Declined, "DECLINED", what).why("nothing was changed");
        let answer = async { Ok::<_, Failure>(printer.ask(question).await) };
        match self.unless_stopped(answer).await {
            Ok(Some(answer)) if is_yes(&answer) => Ok(()),
            Ok(Some(_)) => Err(declined("declined").into()),
            Ok(None) => Err(declined("there is no terminal to ask on").hint(unasked).into()),
            Err(interrupted) => {
                // the question has left the cursor in its line
                printer.say("");
                Err(interrupted)
            }
        }
    }

    /// A token file of the user's; `-` is standard input.
    pub(crate) async fn token_file(&self, host: &Host, path: &str) -> anyhow::Result<Secret> {
        let (from, name) =
            if path == "-" { ("/dev/stdin", "standard input") } else { (path, path) };
        let (host, from) = (host.clone(), from.to_owned());
        // a terminal or a pipe gives nothing for as long as it likes
        let read = tokio::task::spawn_blocking(move || host.read_user_file(&from));
        let text = self.unless_stopped(read).await?.map_err(|e| unreadable(name, &e))?;
        match text.trim() {
            "" => Err(Failure::usage("TOKEN_EMPTY", format!("there is no token in {name}"))
                .hint("put the token, and nothing else, into it")
                .into()),
            token => Ok(Secret::new(token)),
        }
    }
}

/// The exit code of a failure; SIGTERM has another one than SIGINT.
pub fn exit_of(failure: &Failure, terminated: bool) -> Exit {
    match failure.exit {
        Exit::Interrupted if terminated => Exit::Terminated,
        exit => exit,
    }
}
