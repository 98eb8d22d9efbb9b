//! What the user asks for: flags over config files, beside a saved plan; and the line that asks for
//! it once more.

use super::{Context, secrets, unreadable};
use crate::base::error::Failure;
use crate::cli::RunFlags;
use crate::host::Host;
use crate::install::checks;
use crate::install::components;
use crate::install::plan::CheckedPlan;
use crate::install::settings::{Options, Settings, parse_file};
use crate::k3s::role::NodeRole;
use crate::k3s::values::normalized_sans;

/// The settings of a run, of all places that they may come from.
///
/// # Errors
/// Exit 2 for what is wrong in them, and for flags that a saved plan leaves no room for.
pub(super) fn settings(
    context: &Context,
    host: &Host,
    flags: &Options,
    run: &RunFlags,
    role: NodeRole,
    saved: Option<&CheckedPlan>,
) -> anyhow::Result<Settings> {
    secrets::note(flags, &context.env);
    if let Some(saved) = saved {
        fits(flags, saved)?;
    }
    let mut options = merged(host, flags.clone(), run.config.as_deref())?;
    secrets::from_plan(&mut options, saved);
    options.paths_mut().for_each(|path| *path = host.users_path(path));
    secrets::note(&options, &context.env);
    Ok(Settings::resolve(options, role, &checks::codes(), &components::names())?)
}

/// Options of the files, lowest layer first, under those of the command line.
fn merged(host: &Host, flags: Options, config: Option<&str>) -> anyhow::Result<Options> {
    let mut files =
        vec!["/usr/lib/pipeops/config.toml".to_owned(), "/etc/pipeops/config.toml".into()];
    files.extend(
        host.list("/etc/pipeops/config.d")
            .into_iter()
            .filter(|n| n.ends_with(".toml"))
            .map(|n| format!("/etc/pipeops/config.d/{n}")),
    );
    let mut lower = Options::default();
    for path in &files {
        if let Some(text) = host.read(path)? {
            lower = parse_file(&text, path)?.layered_over(lower);
        }
    }
    if let Some(path) = config {
        let text = host.users_file(path).map_err(|e| unreadable(path, &e))?;
        lower = parse_file(&text, path)?.layered_over(lower);
    }
    Ok(flags.layered_over(lower))
}

/// Whether the flags say what the saved plan was made with: it is carried out as it is, and another
/// value would be ignored.
fn fits(flags: &Options, saved: &CheckedPlan) -> Result<(), Failure> {
    let mut flags = flags.clone();
    flags.tls_san = normalized_sans(&flags.tls_san);
    let (mut names, mut why) = (Vec::new(), Vec::new());
    for (key, value) in flags.recorded() {
        let then = saved.plan.options.get(&key);
        if then != Some(&value) {
            let then = then.map_or("without it".into(), |then| format!("with `{then}`"));
            why.push(format!("--{key} is `{value}` now; the plan was made {then}"));
            names.push(format!("--{key}"));
        }
    }
    if names.is_empty() {
        return Ok(());
    }
    let mut failure = Failure::usage(
        "PLAN_OPTIONS",
        format!("a saved plan is carried out as it is, without {}", names.join(", ")),
    )
    .hint("leave the flags out, or make a new plan with --plan-out");
    failure.why = why;
    Err(failure)
}

/// The flags as they would be typed for a shell, those of a saved plan left out.
pub(super) fn typed(flags: &Options, run: &RunFlags) -> Vec<String> {
    let mut words: Vec<String> = flags
        .as_flags()
        .into_iter()
        .map(|(key, value)| format!("--{key} {}", quoted(&value)))
        .collect();
    if run.root != "/" {
        words.push(format!("--root {}", quoted(&run.root)));
    }
    words
}

/// A word as POSIX' shell reads it (XCU 2.2).
pub(super) fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "_-./:=,@%+".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', "'\\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_is_quoted_where_a_shell_would_read_something_else() {
        for (word, wanted) in [
            ("/opt/release", "/opt/release"),
            ("a=b,c=d", "a=b,c=d"),
            ("", "''"),
            ("prod eu", "'prod eu'"),
            ("it's $HOME", "'it'\\''s $HOME'"),
        ] {
            assert_eq!(quoted(word), wanted);
        }
    }
}
