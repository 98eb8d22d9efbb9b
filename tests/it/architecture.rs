//! The table of allowed edges: pure things below, doors in the middle, engines on the doors, commands on top.

mod reader;

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use reader::{Module, module_of, used};

/// Rooms that are open to all.
const OPEN: &[&str] = &["cidr", "config_file", "encoding", "error", "finding", "http", "text"];

/// Room → rooms that it may use, beside those.
const EDGES: &[(&str, &[&str])] = &[
    ("cidr", &[]),
    ("encoding", &[]),
    ("config_file", &[]),
    ("finding", &[]),
    ("http", &[]),
    ("error", &[]),
    ("text", &[]),
    ("secret", &[]),
    ("facts", &["k3s"]),
    ("settings", &["facts", "k3s", "secret"]),
    ("k3s", &["facts", "host", "settings", "plan", "components", "checks", "secret"]),
    ("components", &["plan"]),
    ("checks", &["facts", "host", "settings", "components", "k3s"]),
    ("backoff", &[]),
    ("resolve", &[]),
    ("trust", &[]),
    ("tunnel", &["backoff", "resolve", "secret", "trust"]),
    ("control", &["backoff", "host", "k3s", "resolve", "secret", "trust", "tunnel"]),
    ("api", &["cluster", "control", "host", "k3s", "status", "tunnel"]),
    ("status", &["cluster", "control", "tunnel"]),
    ("host", &["facts", "k3s", "plan", "resolve", "secret", "settings"]),
    ("cluster", &["host", "secret", "trust"]),
    ("supervisor", &["host", "k3s", "resolve", "secret"]),
    ("output", &["checks", "plan", "secret"]),
    ("plan", &["facts", "host", "cluster", "checks", "settings", "k3s", "secret"]),
    ("credential", &["cluster", "host", "k3s"]),
    ("agent", &["api", "cluster", "control", "host", "k3s", "secret", "settings", "status", "trust", "tunnel"]),
    ("hub", &["api", "backoff", "cluster", "control", "host", "k3s", "secret", "trust", "tunnel"]),
    ("cli", &["host", "hub", "settings", "k3s"]),
    (
        "cmd",
        &[
            "agent",
            "api",
            "checks",
            "cli",
            "cluster",
            "components",
            "control",
            "facts",
            "host",
            "hub",
            "k3s",
            "output",
            "plan",
            "resolve",
            "secret",
            "settings",
            "status",
            "supervisor",
            "tunnel",
        ],
    ),
];

/// A room is a file; past this it likely holds two ideas.
const MOST_LINES: usize = 560;

fn sources(dir: &Path, found: &mut Vec<(String, String)>) {
    for entry in fs::read_dir(dir).unwrap().flatten() {
        let path = entry.path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|e| e == "rs") {
            let name = path.strip_prefix(concat!(env!("CARGO_MANIFEST_DIR"), "/src")).unwrap().display().to_string();
            found.push((name, fs::read_to_string(&path).unwrap()));
        }
    }
}

fn all() -> Vec<(String, String)> {
    let mut found = Vec::new();
    sources(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/src")), &mut found);
    found
}

/// Edges that the table does not allow.
fn wrong(files: &[(String, String)], table: &[(&str, &[&str])]) -> BTreeSet<String> {
    let modules: BTreeSet<Module> = files.iter().map(|(file, _)| module_of(file)).filter(|m| !m.is_empty()).collect();
    let mut wrong = BTreeSet::new();
    for (file, text) in files {
        let module = module_of(file);
        if module.is_empty() || module.iter().any(|name| name == "tests") {
            continue;
        }
        let room = &module[0];
        let allowed = table.iter().find(|(name, _)| name == room).unwrap_or_else(|| panic!("{file}: the table has no row for {room}")).1;
        for target in used(&module, text, &modules).into_iter().map(|module| module[0].clone()) {
            if target != *room && !OPEN.contains(&target.as_str()) && !allowed.contains(&target.as_str()) {
                wrong.insert(format!("{file}: {room} -> {target}"));
            }
        }
    }
    wrong
}

#[test]
fn no_room_uses_one_that_the_table_does_not_allow() {
    let wrong = wrong(&all(), EDGES);
    assert!(wrong.is_empty(), "edges that the table does not allow:\n{}", wrong.into_iter().collect::<Vec<_>>().join("\n"));
}

#[test]
fn a_planted_edge_is_found_however_it_is_written() {
    let table: &[(&str, &[&str])] = &[("below", &[]), ("above", &["below"])];
    for (file, text) in [
        ("below.rs", "use crate::above::X;"),
        ("below.rs", "use crate::{below::{self, Y}, above::{part::X, Z}};"),
        ("below.rs", "use super::above;"),
        ("below.rs", "fn f() -> u8 { crate::above::X }"),
        ("below/part.rs", "use super::super::above::X;"),
        ("below/part.rs", "struct Y(super::super::above::X);"),
    ] {
        let files = [("above.rs", "use crate::below::Z;"), ("above/part.rs", ""), ("below.rs", ""), (file, text)];
        let files = files.map(|(file, text)| (file.to_owned(), text.to_owned()));
        assert_eq!(Vec::from_iter(wrong(&files, table)), [format!("{file}: below -> above")], "{text}");
    }
}

#[test]
fn every_room_says_what_it_is_and_stays_small() {
    for (file, text) in all() {
        assert!(text.starts_with("//! "), "{file} does not say what lives there");
        assert!(text.lines().count() <= MOST_LINES, "{file} has {} lines", text.lines().count());
    }
}

/// Four digits stand in some random hash of every 25th run; a planted secret that is looked for afterwards is 20 characters or more.
#[test]
fn a_planted_secret_is_too_long_to_be_found_by_chance() {
    let marks = [concat!("planted", "-"), concat!("canary", "-"), concat!("clear-", "text-")];
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let (mut dirs, mut seen) = (vec![root.join("src"), root.join("tests")], 0);
    while let Some(dir) = dirs.pop() {
        for path in fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()) {
            if path.is_dir() {
                dirs.push(path);
                continue;
            }
            // programs in other languages too, nothing that is no text
            let Ok(text) = fs::read_to_string(&path) else { continue };
            for looked in text.split("contains(\"").skip(1).filter_map(|rest| rest.split_once("\")").map(|(looked, _)| looked)) {
                let digits = looked.len() >= 4 && looked.bytes().all(|b| b.is_ascii_digit());
                assert!(!digits || looked.len() >= 20, "{}: `{looked}` is found by chance: look for all of it", path.display());
            }
            let words = text.split(|c: char| !c.is_ascii_alphanumeric() && !"-_{}".contains(c));
            // a value; a name that is planted has no digits
            for word in words.filter(|w| w.contains(|c: char| c.is_ascii_digit()) && marks.iter().any(|mark| w.contains(mark))) {
                seen += 1;
                assert!(word.len() >= 20, "{}: `{word}` is found by chance: make it 20 characters or more", path.display());
            }
        }
    }
    assert!(seen > 20, "only {seen} planted secrets were seen: the marks have changed");
}
