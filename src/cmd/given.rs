//! What the user asks for: flags over config files, beside a saved plan; and the line that asks for
//! it once more.

use super::{Context, secrets};
use crate::base::config_file::line_of;
use crate::base::error::Failure;
use crate::base::secret::mask_registered;
use crate::base::text::quoted;
use crate::cli::InstallerArgs;
use crate::host::Host;
use crate::host::user_files::unreadable;
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
    run: &InstallerArgs,
    role: NodeRole,
    saved: Option<&CheckedPlan>,
) -> anyhow::Result<Settings> {
    secrets::register(flags, &context.env);
    if let Some(saved) = saved {
        fits(flags, saved)?;
    }
    let files = config_files(host, run.config.as_deref())?;
    let mut options = flags.clone().layered_over(layered(&files));
    secrets::adopt_paths(&mut options, saved);
    options.paths_mut().for_each(|path| *path = host.absolute_user_path(path));
    secrets::register(&options, &context.env);
    Ok(resolve(options, role).map_err(|failure| located(failure, flags, &files, role))?)
}

fn resolve(options: Options, role: NodeRole) -> Result<Settings, Failure> {
    Settings::resolve(options, role, &checks::codes(), &components::names())
}

/// A config file of the installers.
struct ConfigFile {
    path: String,
    text: String,
    options: Options,
}

impl ConfigFile {
    fn parse(path: &str, text: String) -> Result<ConfigFile, Failure> {
        Ok(ConfigFile { path: path.to_owned(), options: parse_file(&text, path)?, text })
    }
}

/// The config files, lowest layer first.
fn config_files(host: &Host, config: Option<&str>) -> anyhow::Result<Vec<ConfigFile>> {
    let mut paths =
        vec!["/usr/lib/pipeops/config.toml".to_owned(), "/etc/pipeops/config.toml".into()];
    paths.extend(
        host.list("/etc/pipeops/config.d")
            .into_iter()
            .filter(|n| n.ends_with(".toml"))
            .map(|n| format!("/etc/pipeops/config.d/{n}")),
    );
    let mut files = Vec::new();
    for path in &paths {
        if let Some(text) = host.read(path)? {
            files.push(ConfigFile::parse(path, text)?);
        }
    }
    if let Some(path) = config {
        let text = host.read_user_file(path).map_err(|e| unreadable(path, &e))?;
        files.push(ConfigFile::parse(path, text)?);
    }
    Ok(files)
}

/// What the files say together.
fn layered(files: &[ConfigFile]) -> Options {
    files.iter().fold(Options::default(), |lower, file| file.options.clone().layered_over(lower))
}

/// A fault is told in the words of the flag; one that comes from a config file gets its place.
fn located(mut failure: Failure, flags: &Options, files: &[ConfigFile], role: NodeRole) -> Failure {
    let has = |options: &Options, fault: &String| {
        resolve(options.clone(), role).is_err_and(|f| f.what == *fault || f.why.contains(fault))
    };
    let place = |fault: &mut String| {
        if has(flags, fault) {
            return;
        }
        let Some(file) = files.iter().rev().find(|file| has(&file.options, fault)) else { return };
        let told = fault.trim_start_matches("--");
        let key = told
            .trim_start_matches("[k3s] ")
            .split(|c: char| !(c.is_ascii_alphanumeric() || c == '-'))
            .next()
            .unwrap_or_default();
        *fault = format!("{told} ({}, line {})", file.path, line_of(&file.text, key));
    };
    match failure.why.as_mut_slice() {
        [] => place(&mut failure.what),
        faults => faults.iter_mut().for_each(place),
    }
    failure
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
pub(super) fn typed(flags: &Options, run: &InstallerArgs) -> Vec<String> {
    let mut words: Vec<String> = flags
        .as_flags()
        .into_iter()
        // masked before it is quoted, which may take a secret apart
        .map(|(key, value)| format!("--{key} {}", quoted(&mask_registered(&value))))
        .collect();
    if run.root != "/" {
        words.push(format!("--root {}", quoted(&run.root)));
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_names_the_file_that_it_comes_from() {
        let file = |path: &str, text: &str| ConfigFile::parse(path, text.to_owned()).unwrap();
        let files = [
            file("/etc/pipeops/config.toml", "# ours\nmax-role = \"king\"\n"),
            file("/tmp/mine.toml", "[k3s]\ndebug = true\ntoken = \"x\"\n"),
        ];
        let told = |flags: &Options| {
            let options = flags.clone().layered_over(layered(&files));
            let failure = resolve(options, NodeRole::Server).unwrap_err();
            located(failure, flags, &files, NodeRole::Server).render()
        };
        let all = told(&Options::default());
        for line in
            ["  max-role: `king`", "(/etc/pipeops/config.toml, line 2)", "mine.toml, line 3"]
        {
            assert!(all.contains(line), "{line}:\n{all}");
        }
        let flag = told(&Options { max_role: Some("emperor".into()), ..Options::default() });
        assert!(flag.contains("--max-role: `emperor` is none of"), "{flag}");
        assert!(!flag.contains("config.toml"), "{flag}");
    }
}
