//! `exec`: a command in a pod that runs already, with the streams and the terminal of this one.

use std::io::IsTerminal as _;

use tokio::io::{stderr, stdin, stdout};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc::{Receiver, channel};

use super::operation::look_at;
use super::{Context, Session};
use crate::base::error::{Exit, Failure};
use crate::base::task::boxed;
use crate::cli::ExecArgs;
use crate::client::applications::ClusterReader;
use crate::client::exec::{ExecEnd, ExecRequest, LocalStreams, choose, pod_gone, start};
use crate::output::{Printer, RawTerminal, terminal_size};

/// Runs a command to its end. Its own exit code is told, and is not that of this program, whose
/// numbers have their meanings: 13 where the command fails.
///
/// # Errors
/// What the control plane or the cluster refuses; how the command has failed; exit 130 when
/// interrupted.
pub(super) async fn exec(context: &Context, args: ExecArgs) -> anyhow::Result<Exit> {
    let mut printer = Printer::new(false, false, context.no_color());
    let terminal = args.tty && std::io::stdin().is_terminal();
    if args.tty && !terminal {
        printer.say("without -t: standard input is no terminal");
    }
    let session = Session::open(context, args.reach.cluster.context.as_deref())?;
    let (cluster, namespace) = session.find(&args.name, &args.reach).await?;
    let reader = ClusterReader { api: &session.api, cluster: &cluster.id };
    let look = look_at(&namespace, &args.name, &args.reach.cluster);
    let title = format!("{namespace}/{}", args.name);
    let of_application = |mut failure: Failure| {
        failure.what = format!("{title}: {}", failure.what);
        failure.hint = failure.hint.or(Some(format!("to look: {look}")));
        failure
    };
    let pods = context.unless_stopped(reader.pods(&namespace, &args.name)).await?;
    let (pod, container) = (args.pod.as_deref(), args.container.as_deref());
    let target = choose(&pods, pod, container).map_err(of_application)?;
    if let [_, _, ..] = &target.chosen_of[..] {
        let all = target.chosen_of.join(", ");
        printer.say(&format!("in the container {} of {all}", target.container));
    }
    let request =
        ExecRequest { target: &target, command: &args.command, input: args.stdin, terminal };
    let base = reader.path(&format!("/api/v1/namespaces/{namespace}"));
    let started = start(&session.api, &base, &request);
    let started = context.unless_stopped(async { started.await.map_err(of_pod) }).await?;
    let running = started.ok_or_else(|| of_application(pod_gone(&target.pod)))?;
    if args.stdin && !terminal && !running.ends_input {
        printer.say(
            "this cluster is older than Kubernetes 1.30: the command is not told where its input \
             ends; Ctrl-C ends the wait",
        );
    }
    let raw = terminal.then(RawTerminal::begin).flatten();
    let local = LocalStreams {
        input: args.stdin.then(stdin),
        output: stdout(),
        errors: stderr(),
        sizes: sizes(terminal),
    };
    let end = tokio::select! {
        biased;
        () = context.stop.cancelled() => None,
        () = hung_up(), if terminal => None,
        end = running.run(local) => Some(end),
    };
    drop(raw);
    let Some(end) = end else {
        let interrupted = Failure::new(Exit::Interrupted, "INTERRUPTED", "interrupted");
        let goes_on = "the command may go on in its pod: nothing tells it that nobody waits";
        return Err(if terminal { interrupted } else { interrupted.why(goes_on) }.into());
    };
    if let ExecEnd::Cut(why) = end {
        if terminal {
            printer.say("");
        }
        // a token that was revoked is why, and is told by the next call
        context.unless_stopped(session.api.get("/api/v1/clusters")).await?;
        return Err(cut(why).hint(format!("run it again; to look: {look}")).into());
    }
    ended(end, &target.pod, terminal, &mut printer).map_err(Into::into)
}

/// What the API server calls a bad request is a pod that takes no command, and no wrong use of
/// this one.
fn of_pod(mut failure: Failure) -> Failure {
    if failure.exit == Exit::Usage {
        failure.exit = Exit::Problems;
    }
    failure
}

fn cut(why: String) -> Failure {
    Failure::new(Exit::Network, "EXEC_CUT", "the connection to the command has ended before it")
        .why(why)
        .why("it is not known whether the command goes on in its pod")
}

/// How this program ends after the command. In a terminal, whoever has left a shell has read what
/// its last command said.
fn ended(end: ExecEnd, pod: &str, terminal: bool, printer: &mut Printer) -> Result<Exit, Failure> {
    match end {
        ExecEnd::Succeeded | ExecEnd::Unread => Ok(Exit::Done),
        ExecEnd::Exited(code) if terminal => {
            printer.say(&format!("the command ended with exit code {code}"));
            Ok(Exit::Problems)
        }
        ExecEnd::Exited(code) => {
            let what = format!("{pod}: the command ended with exit code {code}");
            Err(Failure::new(Exit::Problems, "COMMAND_FAILED", what))
        }
        ExecEnd::Failed(why) => {
            let what = format!("{pod}: the command could not be run");
            Err(Failure::new(Exit::Problems, "EXEC_FAILED", what)
                .why(why)
                .hint("is the program in the image, and does the container run?"))
        }
        ExecEnd::Cut(why) => Err(cut(why)),
    }
}

/// The size of the terminal now, and whenever it changes; none where there is no terminal.
fn sizes(terminal: bool) -> Receiver<(u16, u16)> {
    let (sender, sizes) = channel(1);
    if terminal {
        tokio::spawn(boxed(async move {
            let Ok(mut changes) = signal(SignalKind::window_change()) else { return };
            loop {
                if let Some(size) = terminal_size()
                    && sender.send(size).await.is_err()
                {
                    return;
                }
                changes.recv().await;
            }
        }));
    }
    sizes
}

/// The signals of a terminal that goes away would end the program before it has put the terminal
/// back.
async fn hung_up() {
    let [hang_up, quit] = [SignalKind::hangup(), SignalKind::quit()].map(signal);
    let (Ok(mut hang_up), Ok(mut quit)) = (hang_up, quit) else {
        return std::future::pending().await;
    };
    tokio::select! {
        _ = hang_up.recv() => {}
        _ = quit.recv() => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_that_fails_is_13_and_its_own_code_is_told() {
        let mut printer = Printer::new(false, false, true);
        let mut end = |end, terminal| ended(end, "web-1", terminal, &mut printer);
        for (given, terminal, exit, code, said) in [
            (ExecEnd::Exited(3), false, Exit::Problems, "COMMAND_FAILED", "exit code 3"),
            (ExecEnd::Failed("no sh".into()), true, Exit::Problems, "EXEC_FAILED", "no sh"),
            (ExecEnd::Cut("reset".into()), false, Exit::Network, "EXEC_CUT", "reset"),
        ] {
            let failure = end(given, terminal).unwrap_err();
            assert_eq!((failure.exit, failure.code.as_str()), (exit, code));
            assert!(failure.render().contains(said), "{}", failure.render());
        }
        for (given, terminal, exit) in [
            (ExecEnd::Succeeded, false, Exit::Done),
            (ExecEnd::Unread, false, Exit::Done),
            // a shell that was left after something failed in it
            (ExecEnd::Exited(130), true, Exit::Problems),
        ] {
            assert_eq!(end(given, terminal).unwrap(), exit);
        }
    }

    #[test]
    fn a_pod_that_takes_no_command_is_no_wrong_use() {
        let exit = |exit| of_pod(Failure::new(exit, "REMOTE_REFUSES", "no")).exit;
        assert_eq!(exit(Exit::Usage), Exit::Problems);
        assert_eq!(exit(Exit::Refused), Exit::Refused);
    }
}
