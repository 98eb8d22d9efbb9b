//! What an undo could not or would not remove, and why.

/// One thing that stays.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Leftover {
    /// `WHAT: WHY`.
    pub(super) line: String,
    /// It may be possible later: the step stays in the journal, and the next run tries again.
    pub(super) retry: bool,
}

impl Leftover {
    /// It stays for good.
    pub(super) fn kept(line: String) -> Leftover {
        Leftover { line, retry: false }
    }

    /// A mount that is busy or does not answer.
    pub(super) fn busy(path: &str, why: &str) -> Leftover {
        Leftover { line: format!("{path}: MOUNT_STILL_BUSY: {why}"), retry: true }
    }

    /// Whether it is about this path.
    pub(super) fn is_of(&self, path: &str) -> bool {
        self.line.strip_prefix(path).is_some_and(|rest| rest.starts_with(": "))
    }
}
