//! Rules about files that show a secret to everybody on the machine.

use super::InstallTarget;
use crate::install::facts::Facts;
use crate::install::finding::{Finding, Level};

pub(super) fn readable(facts: &Facts, _: &InstallTarget<'_>) -> Vec<Finding> {
    facts
        .readable_secrets
        .iter()
        .map(|file| {
            let (what, close) = match file.made_private {
                true => ("could be read", "it is closed now (mode 0600)".to_owned()),
                false => ("can be read", format!("close it: chmod 600 {}", file.path)),
            };
            let evidence = format!("mode {:o}, with {}", file.mode, file.holds.join(", "));
            Finding::new(
                "SECRET_READABLE",
                Level::Warning,
                format!("{} {what} by every user of this machine", file.path),
                evidence,
            )
            .fix(close)
            .fix(
                "change that password or key where it is checked, then give the new one here: the \
                 old one may have been read",
            )
        })
        .collect()
}
