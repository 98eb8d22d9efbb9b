//! The text has an entry for each code, and no other.

use std::collections::BTreeSet;
use std::path::Path;

use super::*;
use crate::contract::job;
use crate::install::checks;
use crate::kubernetes::readiness::diagnosis::Reason;

/// Reasons of operations that are not of the diagnosis.
const OTHER_REASONS: &[&str] = &[
    "agent_offline",
    "bad_operation",
    "caller_revoked",
    "cluster_gone",
    "conflict",
    "delivery_unknown",
    "disruption_budget",
    "draining",
    "forbidden",
    "host_not_allowed",
    "host_taken",
    "idempotency_mismatch",
    "in_use",
    "invalid",
    "inventory_damaged",
    "job_failed",
    "kubernetes_waiting",
    "namespace_scope",
    "namespace_taken",
    "namespaces_left",
    "no_ingress_class",
    "no_issuer",
    "no_revision",
    "not_drained",
    "not_evictable",
    "not_found",
    "out_of_reach",
    "progress_deadline",
    "queue_full",
    "refused",
    "rights_missing",
    "role_exceeded",
    "sealed_foreign",
    "server_node",
    "superseded",
    "tenants_need_1_30",
    "timed_out",
    "too_many_operations",
];

/// Why a job is refused.
const JOB_CODES: [&str; 13] = [
    job::BAD_JOB,
    job::BODY_CHANGED,
    job::CLUSTER_EXCEEDED,
    job::CLUSTER_UNKNOWN,
    job::MAKER_REVOKED,
    job::NOT_FOR_JOBS,
    job::PROJECT_FOREIGN,
    job::REPLAYED,
    job::SECRET_IN_CLEAR,
    job::TOKEN_EXPIRED,
    job::TOKEN_FORGED,
    "job_unknown",
    "sealing_key_differs",
];
/// Why a Runner does not do a job.
const RUNNER_REASONS: &[&str] = &["reply_queue_foreign", "sealed_unreadable", "token_missing"];

/// Before the literal of a code, where it is not `Exit::KIND,`.
const CONSTRUCTORS: &[&str] =
    &["Failure::usage(", "Finding::new(", "cause(", "joining(", "notice(", "stale(", "wrong("];

/// Below `src`, without tests.
#[expect(clippy::disallowed_methods, reason = "a test reads the sources")]
fn sources(dir: &Path, found: &mut Vec<String>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        if path.is_dir() && name != "tests" {
            sources(&path, found);
        } else if name.ends_with(".rs") && name != "tests.rs" {
            let text = std::fs::read_to_string(&path).unwrap();
            found.push(text.split("#[cfg(test)]").next().unwrap().to_owned());
        }
    }
}

fn all_sources() -> Vec<String> {
    let mut found = Vec::new();
    sources(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/src")), &mut found);
    assert!(found.len() > 100, "only {} files", found.len());
    found
}

fn is_code(text: &str) -> bool {
    text.len() > 3
        && text.starts_with(|c: char| c.is_ascii_uppercase())
        && text.chars().all(|c| c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_')
}

/// Whether `text` ends with a kind of exit and a comma.
fn after_exit(text: &str) -> bool {
    text.strip_suffix(',')
        .map(|rest| rest.trim_end_matches(|c: char| c.is_ascii_alphanumeric()))
        .is_some_and(|rest| rest.ends_with("Exit::"))
}

/// Codes that a file gives to findings, causes, notices and failures.
fn codes_of(source: &str) -> BTreeSet<String> {
    // such a file chooses a code first, and its literals with a `_` are codes
    let mut chosen = source.match_indices("code,").map(|(at, _)| source[..at].trim_end());
    let chosen = chosen.any(after_exit);
    let mut found = BTreeSet::new();
    // the end of a string looks like the beginning of one, and no code follows it
    for (at, _) in source.match_indices('"') {
        let before = source[..at].trim_end();
        let literal = source[at + 1..].split('"').next().unwrap_or_default();
        let constructed =
            CONSTRUCTORS.iter().any(|name| before.ends_with(name)) || after_exit(before);
        if is_code(literal) && (constructed || chosen && literal.contains('_')) {
            found.insert(literal.to_owned());
        }
    }
    found
}

/// All codes: of checks, logs, failures, notices and reasons.
fn all_codes() -> BTreeSet<String> {
    let mut all: BTreeSet<String> =
        all_sources().iter().flat_map(|source| codes_of(source)).collect();
    assert!(all.len() > 150, "{all:?}");
    all.extend(checks::codes().into_iter().map(str::to_owned));
    all.extend(
        [crate::kubernetes::client::FIELD_CONFLICT, crate::k3s::logs::START_LOOP].map(Into::into),
    );
    all.extend(JOB_CODES.map(str::to_owned));
    // in the text of a plan, and what a control plane answers
    all.extend(["CONFIG_DRIFT", "TENANTS_UNSUPPORTED", "TOO_MANY_KUBECONFIGS"].map(Into::into));
    let of_rollouts = ["BAD_ROLLOUT", "BAD_WAVES", "ROLLOUT_ENDED", "TOO_MANY_ROLLOUTS"];
    all.extend(of_rollouts.map(Into::into));
    all.extend(["BAD_LIMIT", "BAD_SELECTOR"].map(Into::into));
    let reasons = Reason::ALL.iter().map(|reason| reason.code());
    let others = OTHER_REASONS.iter().chain(RUNNER_REASONS).copied();
    all.extend(reasons.chain(others).map(str::to_owned));
    all
}

#[test]
fn every_code_has_an_entry_and_no_entry_is_of_another() {
    let (all, there) = (all_codes(), entries().map(|e| e.code.to_owned()).collect());
    let missing: Vec<_> = all.difference(&there).collect();
    assert!(missing.is_empty(), "explain.md lacks {missing:?}");
    let stale: Vec<_> = there.difference(&all).collect();
    assert!(stale.is_empty(), "explain.md explains what no code is: {stale:?}");
}

#[test]
fn the_other_reasons_are_those_of_operations() {
    let text = [
        include_str!("../../agent/api/operations/config.rs"),
        include_str!("../../agent/api/operations/deploy.rs"),
        include_str!("../../agent/api/operations/executor.rs"),
        include_str!("../../agent/api/operations/hosts.rs"),
        include_str!("../../agent/api/operations/mod.rs"),
        include_str!("../../agent/api/operations/nodes.rs"),
        include_str!("../../agent/api/operations/requests.rs"),
        include_str!("../../agent/api/operations/store.rs"),
        include_str!("../../agent/api/operations/tenants.rs"),
        include_str!("../../contract/operation/mod.rs"),
        include_str!("../../control_plane/registry/operations/mod.rs"),
        include_str!("../../control_plane/rollout/state_machine.rs"),
        include_str!("../../control_plane/rollouts.rs"),
        include_str!("../../kubernetes/tenant/mod.rs"),
    ]
    .concat();
    for reason in OTHER_REASONS {
        assert!(text.contains(&format!("\"{reason}\"")), "{reason}");
    }
    let text = include_str!("../../runner/judge.rs");
    for reason in RUNNER_REASONS {
        assert!(text.contains(&format!("\"{reason}\"")), "{reason}");
    }
}

#[test]
fn codes_are_found_in_a_source() {
    let source = "Failure::new(\n  Exit::Usage,\n  \"FIRST\", x) y(\"PATH\") \
                  Failure::usage(\"SECOND_B\", if b { \"THIRD_C\" } else { \"it's\" }) \
                  notice(\"FOURTH\", 'x')";
    let codes = |text: &str| codes_of(text).into_iter().collect::<Vec<_>>().join(" ");
    assert_eq!(codes(source), "FIRST FOURTH SECOND_B");
    let chosen = format!("{source} Failure::new(Exit::Usage, code, what)");
    assert_eq!(codes(&chosen), "FIRST FOURTH SECOND_B THIRD_C");
}

#[test]
fn the_text_is_sorted_and_an_entry_has_two_to_six_lines() {
    let codes: Vec<_> = entries().map(|entry| entry.code).collect();
    assert!(codes.is_sorted(), "{codes:?}");
    let width = codes.iter().map(|code| code.len()).max().unwrap();
    for entry in entries() {
        let lines = entry.text.lines().count();
        assert!((2..=6).contains(&lines), "{}: {lines} lines", entry.code);
        let first = entry.first_sentence();
        assert!(width + 2 + first.chars().count() <= 100, "{}: {first}", entry.code);
        assert!(entry.text.ends_with('.'), "{}", entry.code);
        assert_eq!(entry.text.matches('`').count() % 2, 0, "{}", entry.code);
    }
    assert!(TEXT.lines().all(|line| line.chars().count() <= 100));
}

/// What `--ignore` does stands in each entry of a finding.
#[test]
fn the_text_agrees_with_the_checks_about_ignore() {
    let table = include_str!("../../install/checks/mod.rs");
    for code in checks::codes() {
        let text = find(code).unwrap().text.replace('\n', " ");
        let never = table.contains(&format!("(\"{code}\", Ignore::Never,"));
        assert!(text.contains("--ignore"), "{code}");
        assert_eq!(text.contains("`--ignore` has no effect on it"), never, "{code}");
        let turns = text.contains(&format!("`--ignore {code}` turns "));
        assert!(!turns || !never, "{code}");
    }
}

#[test]
fn a_code_may_be_written_in_any_case_and_with_dashes() {
    for (given, wanted) in [
        ("SWAP_ON", "SWAP_ON"),
        ("swap-on", "SWAP_ON"),
        ("Swap_On", "SWAP_ON"),
        ("crash-loop", "crash_loop"),
        ("CRASH_LOOP", "crash_loop"),
        ("NOT_FOUND", "NOT_FOUND"),
        ("not-found", "not_found"),
    ] {
        assert_eq!(find(given).map(|entry| entry.code), Some(wanted), "{given}");
    }
    assert_eq!(find("SWAP"), None);
}
