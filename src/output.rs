//! Output: data on stdout, messages on stderr, progress from the engine's events.
use std::io::{IsTerminal as _, Write as _};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use nix::sys::termios::{LocalFlags, SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};
use serde::Serialize;
use terminal_size::{Height, Width};
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;

use crate::base::error::Failure;
use crate::base::secret::{mask_registered, mask_registered_json};
use crate::base::text::{printable, printable_json, printable_lines};
use crate::install::finding::{Finding, Level};
use crate::install::plan::{CheckedPlan, ProgressEvent, StepStatus};

/// Where the output of a run goes.
pub struct Printer {
    terminal: bool,
    colour: bool,
    json: bool,
    events: bool,
    bar: Option<ProgressBar>,
    title: String,
    /// Whether the one JSON document was written.
    documented: std::cell::Cell<bool>,
    /// Text of the run for its log file.
    log: String,
}

impl Printer {
    /// `json`: the result is JSON. `events`: one JSON object an event on stderr instead of lines
    /// for people.
    pub fn new(json: bool, events: bool, no_color: bool) -> Printer {
        let terminal = std::io::stderr().is_terminal();
        Printer {
            terminal,
            colour: terminal && !no_color,
            json,
            events,
            bar: None,
            title: String::new(),
            documented: std::cell::Cell::new(false),
            log: String::new(),
        }
    }

    pub fn json(&self) -> bool {
        self.json
    }

    /// What was printed so far, for the log.
    pub fn take_log(&mut self) -> String {
        std::mem::take(&mut self.log)
    }

    /// A message line. Control characters in what it quotes are escaped.
    pub fn say(&mut self, line: &str) {
        self.styled("", "", line);
    }

    /// A line that begins with a coloured word.
    fn styled(&mut self, colour: &str, word: &str, line: &str) {
        let line = mask_registered(line);
        let line = printable_lines(&line);
        self.log.push_str(word);
        self.log.push_str(&line);
        self.log.push('\n');
        if !self.events {
            let word = if self.colour && !word.is_empty() {
                format!("\x1b[{colour}m{word}\x1b[0m")
            } else {
                word.to_owned()
            };
            match &self.bar {
                Some(bar) => bar.suspend(|| to_stderr(&format!("{word}{line}\n"))),
                None => to_stderr(&format!("{word}{line}\n")),
            }
        }
    }

    /// A line that is shown elsewhere and belongs into the log as well.
    pub fn log_only(&mut self, line: &str) {
        self.log.push_str(&printable_lines(line));
        self.log.push('\n');
    }

    /// A line of the result.
    pub fn data(&self, line: &str) {
        self.data_with_secrets(&mask_registered(line));
    }

    /// A line of the result that holds a secret because it was asked for.
    pub fn data_with_secrets(&self, line: &str) {
        if !self.json {
            // a closed pipe is the reader's choice
            let _ = writeln!(std::io::stdout(), "{}", printable_lines(line));
        }
    }

    /// The result as one JSON document; the first one counts.
    pub fn document(&self, value: &impl Serialize) {
        if let Ok(mut value) = serde_json::to_value(value) {
            mask_registered_json(&mut value);
            self.document_with_secrets(&value);
        }
    }

    /// The result as one JSON document that holds a secret because it was asked for; the first one
    /// counts.
    pub fn document_with_secrets(&self, value: &impl Serialize) {
        if self.json
            && !self.documented.replace(true)
            && let Ok(text) = serde_json::to_string_pretty(value)
        {
            let _ = writeln!(std::io::stdout(), "{}", printable_json(&text));
        }
    }

    /// Findings, the worst first, each with evidence and next step.
    pub fn findings(&mut self, findings: &[Finding]) {
        for level in [Level::Error, Level::Warning, Level::Info] {
            for finding in findings.iter().filter(|f| f.level == level) {
                let (word, colour) = match level {
                    Level::Error => ("error  ", "31"),
                    Level::Warning if finding.ignored => ("ignored", "33"),
                    Level::Warning => ("warning", "33"),
                    Level::Info => ("note   ", "2"),
                };
                self.styled(colour, word, &format!(" {} {}", finding.code, finding.what));
                self.say(&format!("        {}", finding.evidence));
                for step in &finding.fix {
                    self.say(&format!("        → {step}"));
                }
            }
        }
    }

    /// The plan with what its check said.
    pub fn plan(&mut self, checked: &CheckedPlan) {
        for (step, check) in checked.plan.steps.iter().zip(&checked.checks) {
            match check {
                StepStatus::Done => {}
                StepStatus::Todo { changes } => {
                    changes.iter().for_each(|c| self.say(&format!("  + {c}")))
                }
                StepStatus::Later { until } => {
                    self.say(&format!("  … {} (once {until})", step.title))
                }
            }
        }
        for id in &checked.remove {
            self.say(&format!("  - take back {id}"));
        }
        for path in &checked.drift {
            self.say(&format!("  ! CONFIG_DRIFT {path} was edited outside pipeops"));
        }
    }

    /// One event of the engine.
    pub fn event(&mut self, event: &ProgressEvent) {
        if self.events
            && let Ok(mut event) = serde_json::to_value(event)
        {
            mask_registered_json(&mut event);
            to_stderr(&format!("{}\n", printable_json(&event.to_string())));
        }
        match event {
            ProgressEvent::Started { title, number, of, .. } => {
                self.title = format!("[{number}/{of}] {}", printable(title));
                if self.terminal && !self.events {
                    self.bar = Some(spinner(mask_registered(&self.title)));
                }
            }
            ProgressEvent::Progress { done, total, note, .. } => {
                if let Some(bar) = &self.bar {
                    match (note, total) {
                        (Some(note), _) => bar.set_message(mask_registered(&format!(
                            "{} – {}",
                            self.title,
                            printable(note)
                        ))),
                        (None, Some(total)) => {
                            if bar.length() != Some(*total) {
                                bar.set_length(*total);
                                bar.set_style(style(
                                    "{spinner} {msg} {bar:30} {bytes}/{total_bytes} \
                                     {bytes_per_sec} {eta}",
                                ));
                            }
                            bar.set_position(*done);
                        }
                        (None, None) => bar.set_message(format!("{} – {done} bytes", self.title)),
                    }
                } else if let Some(note) = note {
                    self.say(&format!("      … {note}"));
                }
            }
            ProgressEvent::Finished { changed, duration_ms, .. } => {
                self.end();
                let time = if *duration_ms >= 100 {
                    format!(" ({:.1} s)", *duration_ms as f64 / 1000.0)
                } else {
                    String::new()
                };
                if *changed {
                    self.styled("32", "ok", &format!(" {}{time}", self.title));
                }
            }
            ProgressEvent::Failed { what, optional, .. } => {
                self.end();
                let (colour, word) = if *optional { ("33", "left") } else { ("31", "failed") };
                self.styled(colour, word, &format!(" {} – {what}", self.title));
            }
            ProgressEvent::Undone { title, .. } => {
                self.end();
                self.say(&format!("took back: {title}"));
            }
            ProgressEvent::Note { text } => self.say(&format!("note: {text}")),
        }
    }

    /// What is waited for now: beside a spinner on a terminal, a line of its own elsewhere.
    pub fn waiting(&mut self, text: &str) {
        if !self.terminal {
            return self.say(&format!("… {text}"));
        }
        let text = mask_registered(&printable(text));
        match &self.bar {
            Some(bar) => bar.set_message(text),
            None => self.bar = Some(spinner(text)),
        }
    }

    /// The wait is over.
    pub fn waited(&mut self) {
        self.end();
    }

    /// A line of one of several sources, on standard output: before it the source, where there is
    /// one to tell, in a colour of its own. False where nobody reads it any more.
    #[must_use]
    pub fn sourced(&self, source: &str, number: usize, line: &str) -> bool {
        // of the 16 colours of a terminal those that can be read on black and on white
        const COLOURS: [&str; 6] = ["36", "33", "32", "35", "34", "31"];
        let source = match COLOURS.get(number % COLOURS.len()) {
            _ if source.is_empty() => String::new(),
            Some(colour) if self.colour && std::io::stdout().is_terminal() => {
                format!("\x1b[{colour}m{}\x1b[0m ", printable(source))
            }
            _ => format!("{} ", printable(source)),
        };
        let line = mask_registered(line);
        writeln!(std::io::stdout(), "{source}{}", printable_lines(&line)).is_ok()
    }

    fn end(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }

    /// The line that somebody types as an answer. `None` without a terminal. Whoever drops it waits
    /// no longer; the thread that reads the terminal then goes with the process.
    pub async fn ask(&mut self, question: &str) -> Option<String> {
        if !std::io::stdin().is_terminal() || !self.terminal {
            return None;
        }
        to_stderr(&format!("{question} "));
        let read = tokio::task::spawn_blocking(|| {
            let mut answer = String::new();
            std::io::stdin().read_line(&mut answer).map(|_| answer)
        });
        read.await.ok()?.ok().map(|answer| answer.trim().to_owned())
    }
}

/// Asks for a secret on the terminal, and shows nothing of what is typed. `None` without a
/// terminal. Whoever drops it waits no longer, and the terminal is as it was.
pub async fn ask_secret(question: &str) -> Option<String> {
    if !std::io::stdin().is_terminal() {
        return None;
    }
    let _quiet = Quiet::begin()?;
    to_stderr(question);
    let read = tokio::task::spawn_blocking(|| {
        let mut answer = String::new();
        std::io::stdin().read_line(&mut answer).map(|_| answer)
    });
    read.await.ok()?.ok()
}

/// A terminal that does not show what is typed, as long as it lives; not even the end of the line,
/// which comes with its own end.
struct Quiet {
    before: Termios,
}

impl Quiet {
    fn begin() -> Option<Quiet> {
        let before = tcgetattr(std::io::stdin()).ok()?;
        let mut quiet = before.clone();
        quiet.local_flags.remove(LocalFlags::ECHO);
        tcsetattr(std::io::stdin(), SetArg::TCSAFLUSH, &quiet).ok()?;
        Some(Quiet { before })
    }
}

impl Drop for Quiet {
    fn drop(&mut self) {
        let _ = tcsetattr(std::io::stdin(), SetArg::TCSANOW, &self.before);
        to_stderr("\n");
    }
}

/// A terminal that hands over each key as it is typed, Ctrl-C too, and shows what it gets as it is:
/// another terminal is behind it. As before once this is dropped, also by a panic.
pub struct RawTerminal {
    before: Termios,
}

impl RawTerminal {
    /// None where standard input is no terminal.
    pub fn begin() -> Option<RawTerminal> {
        let before = tcgetattr(std::io::stdin()).ok()?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        tcsetattr(std::io::stdin(), SetArg::TCSADRAIN, &raw).ok()?;
        Some(RawTerminal { before })
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        let _ = tcsetattr(std::io::stdin(), SetArg::TCSANOW, &self.before);
    }
}

/// Columns and lines of the terminal.
pub fn terminal_size() -> Option<(u16, u16)> {
    terminal_size::terminal_size_of(std::io::stdin()).map(|(Width(w), Height(h))| (w, h))
}

fn spinner(message: String) -> ProgressBar {
    let bar = ProgressBar::new_spinner().with_message(message);
    bar.set_style(style("{spinner} {msg} {elapsed}"));
    bar.enable_steady_tick(Duration::from_millis(120));
    bar
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_spinner())
}

/// Rows in columns as kubectl prints them: upper-case heads, three spaces, no borders.
pub fn table(head: &[&str], rows: &[Vec<String>]) -> String {
    // a cell is foreign text: control characters are escaped, so that a row stays one line
    let rows: Vec<Vec<String>> =
        rows.iter().map(|row| row.iter().map(|c| printable(c).into_owned()).collect()).collect();
    let mut widths: Vec<usize> = head.iter().map(|h| h.chars().count()).collect();
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let line = |cells: Vec<&str>| {
        let mut text = String::new();
        for (cell, width) in cells.iter().zip(&widths) {
            text.push_str(&format!("{cell:width$}   "));
        }
        format!("{}\n", text.trim_end())
    };
    let mut text = line(head.to_vec());
    for row in &rows {
        text.push_str(&line(row.iter().map(String::as_str).collect()));
    }
    text
}

/// Text for standard error. Nobody may be there to read it, or its disk be full: a run goes on
/// without, and its log file has what was said.
fn to_stderr(text: &str) {
    let _ = std::io::stderr().write_all(text.as_bytes());
}

/// Standard error with secrets masked and control characters escaped: one event is one write.
#[derive(Default)]
struct Masked;

impl std::io::Write for Masked {
    // the layer writes each event whole, its end of line included
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let event = mask_registered(&String::from_utf8_lossy(bytes));
        // an error would be printed by the layer, and that panics
        to_stderr(&printable_lines(&event));
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// What libraries may log: warnings at most.
fn targets(level: LevelFilter) -> Targets {
    // sqlx logs at each start that its tables exist already
    let quiet = [
        "hyper",
        "reqwest",
        "rustls",
        "kube",
        "hickory_resolver",
        "hickory_net",
        "tower",
        "sqlx",
        "lapin",
    ];
    Targets::new()
        .with_default(level)
        .with_targets(quiet.map(|target| (target, level.min(LevelFilter::WARN))))
        // an error line for each handshake, without the server and the next step: whoever called
        // says both
        .with_target("rustls_platform_verifier", LevelFilter::OFF)
        // the whole of a message that no queue takes: of a job, its token
        .with_target("lapin::returned_messages", LevelFilter::OFF)
}

/// Logs of the library go to stderr, without time stamps under systemd, which has its own.
pub fn logging(level: &str, journal: bool) {
    let level = level.parse().unwrap_or(LevelFilter::INFO);
    let filter = targets(level);
    let plain = tracing_subscriber::fmt::layer()
        .with_writer(Masked::default)
        .with_ansi(false)
        .with_target(false);
    // global, not per layer: a per-layer filter is left in a wrong state by `enabled` checks, as
    // sqlx makes them
    let registry = tracing_subscriber::registry().with(filter);
    let _ = if journal {
        registry.with(plain.without_time()).try_init()
    } else {
        registry.with(plain).try_init()
    };
}

/// Prints generated text: completions, the manual.
pub fn raw(bytes: &[u8]) {
    let _ = std::io::stdout().write_all(bytes);
}

/// A text for people that stands outside of a run.
pub fn note(text: &str) {
    to_stderr(&printable_lines(&mask_registered(text)));
}

/// The failure that ends a run: text for people, or one more event where events were asked for.
pub fn fatal(failure: &Failure, events: bool) {
    if events {
        let mut event = serde_json::json!({"event": "error", "error": failure});
        mask_registered_json(&mut event);
        to_stderr(&format!("{}\n", printable_json(&event.to_string())));
    } else {
        to_stderr(&printable_lines(&mask_registered(&failure.render())));
    }
}

#[cfg(test)]
mod tests {
    use tracing_subscriber::filter::LevelFilter;

    #[test]
    fn a_library_does_not_log_what_its_caller_says() {
        let targets = super::targets(LevelFilter::DEBUG);
        let logs = |target: &str, level| targets.would_enable(target, &level);
        assert!(logs("pipeops::agent::local", tracing::Level::DEBUG));
        assert!(logs("rustls::client", tracing::Level::WARN));
        assert!(!logs("rustls::client", tracing::Level::INFO));
        // rustls-platform-verifier 0.7, src/verification/others.rs
        let verifier = "rustls_platform_verifier::verification::others";
        assert!(!logs(verifier, tracing::Level::ERROR));
    }
}
