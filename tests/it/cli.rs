//! The command line as users meet it: help, names, exit codes, documentation that agrees.

use std::process::Command;

use clap::CommandFactory;
use pipeops::base::error::EXITS;
use pipeops::cli::Cli;

use crate::support::{program, run_output};

fn readme() -> String {
    std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/README.md")).unwrap()
}

#[test]
fn no_help_line_is_wider_than_a_terminal() {
    let mut commands = vec![vec!["--help".to_owned()]];
    commands.extend(
        Cli::command()
            .get_subcommands()
            .map(|c| vec![c.get_name().to_owned(), "--help".to_owned()]),
    );
    for args in commands {
        let help =
            run_output(Command::new(program()).args(&args).env("COLUMNS", "100").output().unwrap())
                .ended(0);
        for line in help.out.lines() {
            assert!(line.chars().count() <= 110, "{args:?}: {line}");
        }
    }
}

#[test]
fn every_option_and_exit_code_stands_in_the_readme() {
    let text = readme();
    for command in Cli::command().get_subcommands().filter(|c| !c.is_hide_set()) {
        assert!(text.contains(&format!("`{}", command.get_name())), "{}", command.get_name());
        let mut deep = vec![command];
        while let Some(command) = deep.pop() {
            for long in
                command.get_arguments().filter(|a| !a.is_hide_set()).filter_map(|a| a.get_long())
            {
                assert!(
                    text.contains(&format!("--{long}")) || long == "root",
                    "--{long} of {}",
                    command.get_name()
                );
            }
            deep.extend(command.get_subcommands());
        }
    }
    for (_, number, meaning) in EXITS {
        assert!(text.contains(&format!("| {number} | {meaning} |")), "exit code {number}");
    }
    for variable in [
        "PIPEOPS_CONTROL_PLANE_URL",
        "PIPEOPS_CONTROL_PLANE_PIN",
        "AGENT_TOKEN",
        "CLUSTER_NAME",
        "CLUSTER_LABELS",
        "NODE_TYPE",
        "K3S_URL",
        "K3S_TOKEN",
        "LOG_LEVEL",
    ] {
        assert!(text.contains(variable), "{variable}");
    }
}

#[test]
fn every_component_stands_in_the_readme_and_in_the_help() {
    let text = readme();
    let help =
        run_output(Command::new(program()).args(["install-server", "--help"]).output().unwrap());
    for component in pipeops::install::components::CATALOGUE {
        assert!(text.contains(&format!("\n| {} | ", component.name)), "{}", component.name);
        assert!(help.out.contains(component.name), "{}: {}", component.name, help.out);
    }
}

#[test]
fn every_finding_code_is_explained() {
    let text = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/src/cmd/explain.md"))
        .unwrap();
    for code in pipeops::install::checks::codes() {
        assert!(text.contains(&format!("\n## {code}\n")), "{code}");
    }
}

#[test]
fn a_code_is_explained_listed_or_unknown() {
    let explain = |args: &[&str]| {
        run_output(Command::new(program()).arg("explain").args(args).env_clear().output().unwrap())
    };
    let one = explain(&["clock-skew"]).ended(0);
    assert!(one.out.starts_with("CLOCK_SKEW\n\nThe clock of this machine"), "{}", one.out);
    assert!(one.out.contains("timedatectl set-ntp true") && one.err.is_empty(), "{}", one.out);
    // an example of a URL is no secret
    let url = explain(&["DATABASE_URL_WRONG"]).ended(0);
    assert!(url.out.contains("postgres://USER:PASSWORD@HOST"), "{}", url.out);

    let all = explain(&[]).ended(0);
    for code in pipeops::install::checks::codes().into_iter().chain(["crash_loop"]) {
        let line = all.out.lines().find(|line| line.split(' ').next() == Some(code));
        assert!(line.is_some_and(|line| line.ends_with('.')), "{code}: {}", all.out);
    }
    assert!(all.out.lines().all(|line| line.chars().count() <= 100), "{}", all.out);

    let json = |args: &[&str]| -> serde_json::Value {
        serde_json::from_str(&explain(args).ended(0).out).unwrap()
    };
    let one = json(&["out_of_memory", "-o", "json"]);
    assert_eq!(one["code"], "out_of_memory");
    assert!(one["text"].as_str().unwrap().contains("OOMKilled"), "{one}");
    let list = json(&["--output", "json"]);
    assert_eq!(list.as_array().unwrap().len(), all.out.lines().count());

    let unknown = explain(&["CLOCK_SKW"]).ended(2);
    assert!(unknown.out.is_empty(), "{}", unknown.out);
    assert!(unknown.err.contains("did you mean `CLOCK_SKEW`?"), "{}", unknown.err);
    assert!(unknown.err.contains("[CODE_UNKNOWN]"), "{}", unknown.err);
    let far = explain(&["qqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqq"]).ended(2);
    assert!(!far.err.contains("did you mean"), "{}", far.err);
}

#[test]
fn committed_completions_and_manual_are_fresh() {
    let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/completions");
    for (args, file) in [
        (vec!["completions", "bash"], "pipeops.bash"),
        (vec!["completions", "zsh"], "_pipeops"),
        (vec!["completions", "fish"], "pipeops.fish"),
        (vec!["man"], "pipeops.1"),
    ] {
        let made = run_output(Command::new(program()).args(&args).env_clear().output().unwrap())
            .ended(0)
            .out;
        let path = format!("{dir}/{file}");
        if std::env::var_os("PIPEOPS_UPDATE").is_some() {
            std::fs::write(&path, &made).unwrap();
        }
        assert!(
            std::fs::read_to_string(&path).unwrap_or_default() == made,
            "{file} is stale: PIPEOPS_UPDATE=1 cargo test makes it anew"
        );
    }
}

#[test]
fn the_name_of_the_program_selects_the_command() {
    let dir = tempfile::tempdir().unwrap();
    for (name, _) in pipeops::cli::PROGRAM_NAMES {
        let link = dir.path().join(name);
        std::os::unix::fs::symlink(program(), &link).unwrap();
        let help = run_output(Command::new(&link).arg("--help").output().unwrap()).ended(0);
        let command = pipeops::cli::PROGRAM_NAMES.iter().find(|(n, _)| n == name).unwrap().1;
        assert!(help.out.contains(&format!(" {command} ")), "{name}: {}", help.out);
    }
}

#[test]
fn unknown_options_end_with_two() {
    run_output(Command::new(program()).args(["install-server", "--nonsense"]).output().unwrap())
        .ended(2);
    run_output(Command::new(program()).args(["cluster-info", "-o", "yaml"]).output().unwrap())
        .ended(2);
    run_output(Command::new(program()).output().unwrap()).ended(2);
}

#[test]
fn a_root_that_is_not_there_is_wrong_before_a_verb_and_behind_it() {
    for args in [
        &["audit", "verify", "--root", "/no/such/directory"][..],
        &["audit", "tail", "--root", "/no/such/directory"],
        &["audit", "--root", "/no/such/directory", "verify"],
    ] {
        let refused = run_output(Command::new(program()).args(args).output().unwrap()).ended(2);
        assert!(refused.err.contains("ROOT_MISSING"), "{args:?}: {}", refused.err);
    }
}

#[test]
fn the_program_is_static() {
    let bytes = std::fs::read(program()).unwrap();
    // PT_INTERP is program header type 3 (elf(5))
    let (offset, size, count) = (u64_at(&bytes, 32), u16_at(&bytes, 54), u16_at(&bytes, 56));
    for n in 0..count {
        let at = usize::try_from(offset).unwrap() + usize::from(n) * usize::from(size);
        assert_ne!(
            u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()),
            3,
            "the program names an interpreter"
        );
    }
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(bytes[at..at + 2].try_into().unwrap())
}

/// Needs root for chroot; without it the static test above has to do, and that is said.
#[test]
fn it_runs_in_an_empty_chroot() {
    if !nix::unistd::geteuid().is_root() {
        println!("NOT RUN: chroot needs root");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    // by another process: what this one has open for writing a child of another test inherits
    // until it executes its program, and a file that is open for writing can't be started
    let copy = dir.path().join("pipeops");
    let copied = Command::new("cp").arg(program()).arg(copy).status().unwrap();
    assert!(copied.success());
    let answer = run_output(
        Command::new("chroot")
            .arg(dir.path())
            .args(["/pipeops", "--version"])
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .output()
            .unwrap(),
    )
    .ended(0);
    assert_eq!(answer.out, format!("pipeops {}\n", env!("CARGO_PKG_VERSION")));
}
