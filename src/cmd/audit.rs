//! `audit verify` and `audit tail`: the log of who did what through the tunnel.

use crate::agent::api::audit;
use crate::agent::config::STATE_DIR;
use crate::base::error::{Exit, Failure};
use crate::cli::{AuditArgs, AuditCommand, OutputFormat};
use crate::cmd::Context;
use crate::output::Printer;

/// # Errors
/// Exit 6 when the chain is broken, 3 when the log cannot be read, 2 for a root that is not there.
pub fn audit(context: &Context, args: &AuditArgs) -> anyhow::Result<Exit> {
    let host = context.existing_host(&args.root)?;
    let dir = host.read_only_state_dir(&format!("{STATE_DIR}/audit"));
    let unreadable = |why: String| {
        Failure::new(Exit::Preflight, "AUDIT_UNREADABLE", "the audit log cannot be read")
            .why(why)
            .hint("run it as root on the server")
    };
    match &args.command {
        AuditCommand::Verify { output } => {
            let mut printer =
                Printer::new(*output == OutputFormat::Json, false, context.no_color());
            let found = audit::verify(&dir).map_err(|broken| {
                // bytes that are no text were not written by the agent
                if broken.starts_with("reading ") && !broken.contains("valid UTF-8") {
                    unreadable(broken)
                } else {
                    Failure::new(Exit::Verification, "AUDIT_BROKEN", "the audit log was changed")
                        .why(broken)
                        .hint(
                            "what came before the break is as it was written; keep a copy of \
                             /var/lib/pipeops-agent/audit before it is rotated away",
                        )
                }
            })?;
            if printer.json() {
                printer.document(&found);
            } else if found.records == 0 {
                printer.data("no records yet");
            } else {
                printer.data(&format!(
                    "{} records, from {} on, each following the one before; head {} {}",
                    found.records, found.first, found.head.seq, found.head.hash
                ));
                // a chain does not show what is missing behind its last record
                printer.say("what was cut off at the end shows only in a head noted before");
            }
        }
        AuditCommand::Tail { lines } => {
            let printer = Printer::new(false, false, context.no_color());
            for line in audit::tail(&dir, *lines).map_err(unreadable)? {
                printer.data(&line);
            }
        }
    }
    Ok(Exit::Done)
}
