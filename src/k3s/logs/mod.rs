//! What a unit's journal says when a start fails: known messages, their cause, and the next step.

mod components;
mod datastore;
mod join;
mod kernel;
mod kubelet;
mod machine;
mod settings;
#[cfg(test)]
mod tests;

use std::time::Duration;

/// How much a message proves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// Waiting does not change it: logged twice, the wait ends.
    Permanent,
    /// May pass once or twice (a port that is just being released); the wait ends with the third
    /// exit.
    Fatal,
    /// Names the component of k3s that ended, where no other line says why.
    Component,
    /// May pass at any time: names the cause at the deadline, and never ends a wait.
    Transient,
    /// A warning: shown beside a cause, and never a cause itself.
    Warning,
}

/// A known cause of a failed start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KnownCause {
    pub code: &'static str,
    pub what: &'static str,
    pub fix: &'static str,
    pub severity: Severity,
}

const fn cause(
    code: &'static str,
    severity: Severity,
    what: &'static str,
    fix: &'static str,
) -> KnownCause {
    KnownCause { code, what, fix, severity }
}

const SETTING: &str =
    "correct it in the [k3s] table, or in /etc/rancher/k3s/config.yaml.d where it came from there";
const MODULES: &str = "install your distribution's extra kernel modules, or a kernel that has it";

/// Message fragments, all of which must stand in one line, in any case, and what they mean. The
/// first match wins.
///
/// Messages are quoted from k3s 1.33 to 1.36, without what differs from run to run and without
/// quotes, which logrus escapes. The file of k3s-io/k3s, kubernetes, kine, flannel, etcd or
/// containerd stands beside each group.
const TABLES: [&[(&[&str], KnownCause)]; 7] = [
    join::TABLE,
    settings::TABLE,
    kubelet::TABLE,
    kernel::TABLE,
    datastore::TABLE,
    machine::TABLE,
    components::TABLE,
];

/// What a journal shows: the cause, the latest line of it without its time, and how often it stands
/// there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Diagnosis {
    pub cause: KnownCause,
    pub line: String,
    pub count: usize,
}

/// Exits of a unit after which a cause that may pass is believed.
const MAX_EXITS: u32 = 3;
/// How long a permanent cause must stand before the wait ends, where the unit keeps running with
/// it.
const HELD: Duration = Duration::from_secs(10);
/// The same for a cause that may pass.
const HELD_LONG: Duration = Duration::from_secs(20);

/// The state of a unit that is waited for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct UnitHealth {
    /// `active` at this moment.
    pub running: bool,
    /// `failed`: systemd does not start it again.
    pub failed: bool,
    /// Restarts by systemd as it counts them.
    pub restarts: u32,
    /// Those of them since the wait began.
    pub restarts_during_wait: u32,
    /// How long the journal has been showing this very cause.
    pub held: Duration,
}

/// Code of a unit that ends again and again for a reason that is not in the table.
pub const START_LOOP: &str = "START_LOOP";

/// What to do about a cause that the table does not know.
pub const UNKNOWN_CAUSE_FIX: &str = "the lines above name the cause: correct it";

/// Why waiting longer is pointless; `None` while the unit may still become ready. `exits` is what
/// [`exit_count`] says of the unit's own journal.
pub fn final_failure(log: &str, exits: u32, health: UnitHealth) -> Option<Diagnosis> {
    let Some(diagnosis) = classify(log) else {
        let (line, count) = last_exit_line(log)?;
        let what = if health.failed {
            "it ended, and systemd starts it no more"
        } else {
            "it ends again and again"
        };
        let why = KnownCause {
            code: START_LOOP,
            what,
            fix: UNKNOWN_CAUSE_FIX,
            severity: Severity::Component,
        };
        return (health.failed || exits >= MAX_EXITS && !is_transient_line(&line))
            .then_some(Diagnosis { cause: why, line, count });
    };
    let again = health.restarts_during_wait.max(if health.running { 0 } else { health.restarts });
    let stuck = !health.running && !progressed_after(log, &diagnosis.line);
    let end = match diagnosis.cause.severity {
        Severity::Permanent => again >= 2 || stuck && health.held >= HELD,
        Severity::Fatal => {
            exits >= MAX_EXITS
                || stuck
                    && health.held >= HELD_LONG
                    && diagnosis.count >= 4
                    && is_retry_line(&diagnosis.line)
        }
        Severity::Component => exits >= MAX_EXITS && !is_transient_line(&diagnosis.line),
        Severity::Transient | Severity::Warning => false,
    };
    (end || health.failed).then_some(diagnosis)
}

/// How often the unit exited since the wait began: as systemd counts, or by its last lines where
/// that count is older.
pub fn exit_count(log: &str, health: UnitHealth) -> u32 {
    let lines = |mark: &str| log.lines().filter(|l| l.contains(mark)).count();
    let exits =
        ["level=fatal", "level=panic", "Shutdown request received: ", "Main process exited"]
            .map(lines)
            .into_iter()
            .max()
            .unwrap_or(0);
    health.restarts_during_wait.max(if health.running {
        0
    } else {
        u32::try_from(exits).unwrap_or(u32::MAX).min(health.restarts)
    })
}

/// The cause that `log` shows: lines of a process that ended come first, then errors, then what may
/// pass.
pub fn classify(log: &str) -> Option<Diagnosis> {
    let ended = log.lines().filter(|l| is_exit_line(l));
    let of = |at_most: Severity| move |c: &KnownCause| c.severity <= at_most;
    find(ended.clone(), of(Severity::Fatal))
        // the component that ended says more than what others logged meanwhile
        .or_else(|| find(ended, of(Severity::Component)))
        .or_else(|| find(log.lines().filter(|l| is_error_line(l)), of(Severity::Component)))
        .or_else(|| find(log.lines(), |c| c.severity == Severity::Transient))
}

/// A warning that may be related.
pub fn related_warning(log: &str) -> Option<Diagnosis> {
    find(log.lines(), |c| c.severity == Severity::Warning)
}

fn find<'a>(
    lines: impl DoubleEndedIterator<Item = &'a str>,
    filter: impl Fn(&KnownCause) -> bool,
) -> Option<Diagnosis> {
    let lower: Vec<(&str, String)> = lines.map(|l| (l, l.to_lowercase())).collect();
    TABLES.into_iter().flatten().filter(|(_, cause)| filter(cause)).find_map(
        |(fragments, cause)| {
            let mut hits = lower
                .iter()
                .rev()
                .filter(|(_, lower)| fragments.iter().all(|f| lower.contains(&f.to_lowercase())));
            let (line, _) = hits.next()?;
            Some(Diagnosis {
                cause: *cause,
                line: without_time(line).to_owned(),
                count: 1 + hits.count(),
            })
        },
    )
}

/// Logged by a process as it ends, or by systemd about one that ended.
fn is_exit_line(line: &str) -> bool {
    const MARKS: [&str; 8] = [
        "level=fatal",
        "level=panic",
        "Shutdown request received: ",
        "Incorrect Usage:",
        "Main process exited",
        "Failed at step EXEC",
        "killed by the OOM killer",
        "Failed to locate executable",
    ];
    MARKS.iter().any(|m| line.contains(m))
        || ["panic: ", "Error: ", "error: ", "containerd: "].iter().any(|m| line.starts_with(m))
}

/// Not a warning or chatter: what k3s waits for is at level info, and counts.
fn is_error_line(line: &str) -> bool {
    let (weak, info) = (
        ["level=warning", "level=debug", "\"level\":\"warn\"", "\"level\":\"info\""],
        line.contains("level=info"),
    );
    let klog = line.as_bytes();
    let klog = matches!(klog.first(), Some(b'W' | b'I'))
        && klog.get(1..5).is_some_and(|d| d.iter().all(u8::is_ascii_digit));
    !klog && !weak.iter().any(|w| line.contains(w)) && (!info || line.contains("msg=\"Waiting "))
}

/// Logged by a k3s that keeps running and asks again every few seconds (pkg/agent/config/config.go,
/// pkg/agent/run.go).
fn is_retry_line(line: &str) -> bool {
    ["Waiting to retrieve agent configuration", "Failed to validate connection to cluster"]
        .iter()
        .any(|w| line.contains(w))
}

/// Words of troubles that pass: after an unknown last line with them the next start may succeed.
fn is_transient_line(line: &str) -> bool {
    const WORDS: [&str; 7] = [
        "connection refused",
        "deadline exceeded",
        "i/o timeout",
        "timed out",
        "no route to host",
        "connection reset",
        "leaderelection lost",
    ];
    WORDS.iter().any(|w| line.contains(w))
}

/// Whether k3s went on after it logged `line`: it has the node's settings then, so that trouble is
/// over.
fn progressed_after(log: &str, line: &str) -> bool {
    let after = log.lines().rev().take_while(|l| without_time(l) != line);
    let mut after = after.filter(|l| l.contains("level=info"));
    after.any(|l| {
        [
            "msg=\"Running containerd",
            "msg=\"Running kubelet",
            "is up and running",
            "msg=\"Connecting to proxy",
        ]
        .iter()
        .any(|m| l.contains(m))
    })
}

/// The last line with which the unit ended, and how often it stands there.
fn last_exit_line(log: &str) -> Option<(String, usize)> {
    let line = log
        .lines()
        .rev()
        .find(|l| is_exit_line(l) && !l.contains("Main process exited"))
        .or_else(|| log.lines().rev().find(|l| is_exit_line(l)))?;
    let (key, count) =
        (normalized(line), |key: &str| log.lines().filter(|l| normalized(l) == key).count());
    Some((without_time(line).to_owned(), count(&key)))
}

/// A line without the timestamp of logrus.
fn without_time(line: &str) -> &str {
    let line = line.trim();
    line.strip_prefix("time=\"")
        .and_then(|rest| rest.split_once("\" "))
        .map_or(line, |(_, rest)| rest)
}

/// Equal for lines that differ in times, ports and process ids only.
fn normalized(line: &str) -> String {
    let mut key = String::new();
    for c in without_time(line).chars() {
        match c {
            '0'..='9' if key.ends_with('#') => {}
            '0'..='9' => key.push('#'),
            c if c.is_whitespace() && key.ends_with(' ') => {}
            c => key.push(if c.is_whitespace() { ' ' } else { c }),
        }
    }
    key
}

/// `text`, with how often it was logged.
pub fn with_count(text: &str, count: usize) -> String {
    if count > 1 { format!("{text} ({count} times)") } else { text.to_owned() }
}

/// The last lines worth showing: errors and warnings, or all where there are none; equal ones once,
/// with their number.
pub fn notable_lines(log: &str, max: usize) -> Vec<String> {
    let marks = [
        "level=error",
        "level=fatal",
        "level=warning",
        "level=panic",
        "Error:",
        "error:",
        "failed",
        "Failed",
        "msg=\"Waiting ",
        "panic:",
    ];
    let marked: Vec<&str> = log.lines().filter(|l| marks.iter().any(|m| l.contains(m))).collect();
    let from = if marked.is_empty() { log.lines().collect() } else { marked };
    let mut shown: Vec<(String, &str, usize)> = Vec::new();
    for line in from.into_iter().filter(|l| !l.trim().is_empty()).rev() {
        let key = normalized(line);
        match shown.iter_mut().find(|(known, _, _)| *known == key) {
            Some((_, _, count)) => *count += 1,
            None => shown.push((key, line, 1)),
        }
    }
    shown.truncate(max);
    shown.iter().rev().map(|(_, line, count)| with_count(without_time(line), *count)).collect()
}
