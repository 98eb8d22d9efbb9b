//! The one table of exit codes, and the failure that every command ends with: what, why, next step.

use serde::Serialize;

/// How a run ended, as scripts see it. The numbers are a contract; see [`EXITS`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Exit {
    Done,
    Internal,
    Usage,
    Preflight,
    Network,
    Verification,
    Refused,
    TimedOut,
    RolledBack,
    Partial,
    Declined,
    Locked,
    Problems,
    Reboot,
    Interrupted,
    Terminated,
}

/// Every exit code with its number and meaning; README and the help text are held against it by a
/// test. 4 is reserved.
pub const EXITS: &[(Exit, u8, &str)] = &[
    (Exit::Done, 0, "done, or nothing to do"),
    (Exit::Internal, 1, "internal error"),
    (Exit::Usage, 2, "usage: unknown option or bad value"),
    (Exit::Preflight, 3, "preflight or guard failed, nothing changed"),
    (Exit::Network, 5, "network or download failed"),
    (Exit::Verification, 6, "verification failed"),
    (Exit::Refused, 7, "the remote refused: token, CA or name"),
    (Exit::TimedOut, 8, "timed out waiting"),
    (Exit::RolledBack, 9, "rolled back to the former state"),
    (Exit::Partial, 10, "partly done, a re-run resumes"),
    (Exit::Declined, 11, "declined, or no terminal and no --yes"),
    (Exit::Locked, 12, "locked by another run"),
    (Exit::Problems, 13, "problems found"),
    (Exit::Reboot, 14, "reboot needed, a re-run resumes"),
    (Exit::Interrupted, 130, "interrupted, journal closed"),
    (Exit::Terminated, 143, "terminated, journal closed"),
];

impl Exit {
    /// The process exit code.
    pub fn number(self) -> u8 {
        EXITS.iter().find(|row| row.0 == self).map_or(1, |row| row.1)
    }
}

/// An expected failure: caused by the world or the user, with a stable code and the next step.
///
/// Travels inside `anyhow::Error`; [`Failure::from_error`] finds it again below any later context.
#[derive(Clone, Debug, Serialize, thiserror::Error)]
#[error("{what}")]
pub struct Failure {
    pub exit: Exit,
    /// Stable upper-case code, for example `JOIN_CA_MISMATCH`.
    pub code: String,
    pub what: String,
    /// Evidence, one line each.
    pub why: Vec<String>,
    /// The command or action that comes next.
    pub hint: Option<String>,
}

impl Failure {
    pub fn new(exit: Exit, code: &str, what: impl Into<String>) -> Self {
        Failure { exit, code: code.into(), what: what.into(), why: Vec::new(), hint: None }
    }

    pub fn usage(code: &str, what: impl Into<String>) -> Self {
        Failure::new(Exit::Usage, code, what)
    }

    #[must_use]
    pub fn why(mut self, line: impl Into<String>) -> Self {
        self.why.push(line.into());
        self
    }

    #[must_use]
    pub fn hint(mut self, text: impl Into<String>) -> Self {
        self.hint = Some(text.into());
        self
    }

    /// The failure inside `error`, or an internal error that carries the whole chain as evidence.
    pub fn from_error(error: &anyhow::Error) -> Failure {
        if let Some(found) = error.downcast_ref::<Failure>() {
            return found.clone();
        }
        let mut chain = error.chain().map(ToString::to_string);
        let what = chain.next().unwrap_or_default();
        let no_space = error.chain().any(|cause| {
            cause
                .downcast_ref::<std::io::Error>()
                .is_some_and(|io| io.kind() == std::io::ErrorKind::StorageFull)
        });
        let mut failure = if no_space {
            Failure::new(Exit::Partial, "DISK_FULL", what)
                .hint("free space on that file system, then run the same command again")
        } else {
            Failure::new(Exit::Internal, "INTERNAL", what)
        };
        failure.why = chain.collect();
        failure
    }

    /// All of it in one line, for a list of what failed: what, code, causes, next step. An internal
    /// error has no code to look up.
    pub fn line(&self) -> String {
        let code =
            if self.exit == Exit::Internal { String::new() } else { format!(" [{}]", self.code) };
        let hint = self.hint.iter().map(|h| format!("; {h}")).collect::<String>();
        let why = self.why.iter().map(|w| format!(": {w}")).collect::<String>();
        format!("{}{code}{why}{hint}", self.what)
    }

    /// The text for people: `error:`, causes, and the hint after a blank line.
    pub fn render(&self) -> String {
        let mut text = format!("error: {} [{}]\n", self.what, self.code);
        for line in self.why.iter().flat_map(|why| why.lines()) {
            text.push_str("  ");
            text.push_str(line);
            text.push('\n');
        }
        if let Some(hint) = &self.hint {
            text.push_str("\nhint: ");
            text.push_str(hint);
            text.push('\n');
        }
        text
    }
}

/// The name nearest to `wrong`, when one is near enough to be worth suggesting.
pub fn nearest<'a>(wrong: &str, names: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let wrong = wrong.to_ascii_lowercase();
    let names: Vec<&str> = names.into_iter().collect();
    let near = names
        .iter()
        .map(|name| (strsim::levenshtein(&wrong, &name.to_ascii_lowercase()), *name))
        .min_by_key(|(far, _)| *far);
    // or the beginning of a long one
    let begins = || {
        names
            .iter()
            .find(|name| wrong.len() >= 4 && name.to_ascii_lowercase().starts_with(&wrong))
            .copied()
    };
    near.filter(|(far, name)| *far <= name.len().max(3) / 2).map(|(_, name)| name).or_else(begins)
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context;

    #[test]
    fn numbers_are_unique_and_four_stays_reserved() {
        let mut numbers: Vec<u8> = EXITS.iter().map(|row| row.1).collect();
        assert!(!numbers.contains(&4));
        numbers.dedup();
        assert_eq!(numbers.len(), EXITS.len());
    }

    #[test]
    fn a_failure_is_found_below_later_contexts() {
        let error = Err::<(), _>(
            anyhow::Error::new(Failure::new(Exit::Refused, "X", "no")).context("outer"),
        )
        .context("outermost")
        .unwrap_err();
        assert_eq!(Failure::from_error(&error).exit, Exit::Refused);
    }

    #[test]
    fn suggests_only_what_is_near() {
        assert_eq!(nearest("tls-sn", ["tls-san", "node-ip"]), Some("tls-san"));
        assert_eq!(
            nearest("insecure", ["ca_file", "insecure_skip_verify"]),
            Some("insecure_skip_verify")
        );
        assert_eq!(nearest("zzzzzzzzzz", ["tls-san", "node-ip"]), None);
    }
}
