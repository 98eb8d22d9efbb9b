//! The named result of a check, as people, plans and logs see it.

use serde::{Deserialize, Serialize};

/// How much a finding matters: an error stops the run before anything is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    Info,
    Warning,
    Error,
}

/// The named result of a check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    pub code: String,
    pub level: Level,
    /// What is wrong, one line.
    pub what: String,
    /// What was seen that says so.
    pub evidence: String,
    /// What to do about it, one step each.
    pub fix: Vec<String>,
    /// The user said `--ignore` and an error became a warning.
    #[serde(default)]
    pub ignored: bool,
}

impl Finding {
    pub fn new(
        code: &str,
        level: Level,
        what: impl Into<String>,
        evidence: impl Into<String>,
    ) -> Finding {
        Finding {
            code: code.into(),
            level,
            what: what.into(),
            evidence: evidence.into(),
            fix: Vec::new(),
            ignored: false,
        }
    }

    #[must_use]
    pub fn fix(mut self, step: impl Into<String>) -> Finding {
        self.fix.push(step.into());
        self
    }
}

/// Whether anything stops the run.
pub fn has_errors(findings: &[Finding]) -> bool {
    findings.iter().any(|f| f.level == Level::Error)
}
