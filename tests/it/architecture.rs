//! The ranks of the rooms: what everybody needs below, the five programs on it, commands on top.

mod reader;

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use reader::{Module, module_of, used};

/// Rooms from the bottom up, a row a rank. A room uses rooms of lower ranks only, so the five
/// programs know nothing of each other.
const ROOMS: Rows = &[
    &["base"],
    &["k3s", "frp"],
    &["broker", "host", "contract"],
    &["kubernetes"],
    &["install", "agent", "control_plane", "client", "runner"],
    &["output", "cli"],
    &["cmd"],
];

/// The same inside of the rooms; `mod` is a room's own file.
const INSIDE: &[(&str, Rows)] = &[
    (
        "base",
        &[
            &[
                "backoff", "cidr", "encoding", "error", "http", "json", "metrics", "order",
                "resolve", "secret", "task", "text", "yaml",
            ],
            &["config_file", "connection", "dsn", "trust"],
        ],
    ),
    (
        "k3s",
        &[
            &["logs", "paths", "role", "user_input", "version"],
            &["keys", "registries", "token"],
            &["values"],
        ],
    ),
    (
        "host",
        &[
            &["digests", "mountinfo", "paths"],
            &["mod"],
            &["download", "lock", "plans", "program", "remove", "state", "systemd", "user_files"],
            &["fetch"],
        ],
    ),
    (
        "contract",
        &[
            &["job", "sealing", "selector", "types"],
            &["application"],
            &["tenant"],
            &["token", "config"],
            &["operation"],
        ],
    ),
    (
        "kubernetes",
        &[
            &["application", "config_set", "path", "readiness", "tenant", "transport"],
            &["client", "header_policy", "pod_references", "upstream"],
            &["answer", "reverse_proxy", "watch"],
        ],
    ),
    (
        "frp",
        &[
            &["config", "wire", "mux", "admission", "socket"],
            &["state_machine"],
            &["mod"],
            &["codec"],
            &["dial"],
            &["client", "server"],
        ],
    ),
    (
        "install",
        &[
            &["settings", "facts", "finding", "join"],
            &["effective_settings", "plan"],
            &["network", "gather", "components"],
            &["checks", "planner", "engine"],
            &["release"],
        ],
    ),
    (
        "agent",
        &[
            &["session"],
            &["status", "credential", "place"],
            &["config"],
            &["local", "api", "merge"],
            &["observer"],
            &["run"],
        ],
    ),
    (
        "control_plane",
        &[
            &["clock", "client", "error", "keys", "model", "settings"],
            &["certificate", "listeners", "rate_limit", "rollout", "sessions", "store"],
            &["frps", "open", "outbox", "registry"],
            &["agent_client", "backup", "answer", "body", "scope", "tunnel"],
            &["job_refusal", "state"],
            &["bootstrap", "caller_token", "frps_plugin", "login", "metrics"],
            &["auth", "gateway", "operations"],
            &["rollouts"],
            &["jobs"],
            &["job_tokens"],
            &["routes"],
            &["listen"],
            &["mod"],
        ],
    ),
    (
        "client",
        &[
            &["application_file", "clusters", "contexts", "events"],
            &["api"],
            &["applications", "exec", "logs", "operations"],
            &["address", "rollouts", "tenants"],
        ],
    ),
    (
        "runner",
        &[
            &["config", "judge", "share", "status", "topology"],
            &["calls", "direct", "message"],
            &["work"],
            &["mod"],
        ],
    ),
    ("broker", &[&["cloud_events", "transport"], &["mod"]]),
    ("cli", &[&["common"], &["client", "control_plane", "runner"], &["mod"]]),
    (
        "cmd",
        &[
            &["mod"],
            &["audit", "client", "control_plane", "explain", "info", "secrets"],
            &["given", "runner"],
            &["installer"],
            &["join", "uninstall"],
            &["install"],
        ],
    ),
];

type Rows = &'static [&'static [&'static str]];

struct Table {
    rooms: Rows,
    inside: &'static [(&'static str, Rows)],
}

const TABLE: Table = Table { rooms: ROOMS, inside: INSIDE };

/// A room is a file; past this it likely holds two ideas.
const MAX_LINES: usize = 500;

/// Files that were longer when the width became 100, with their lines then. None is added and none
/// grows; one that is short enough goes from here.
const TO_SPLIT: &[(&str, usize)] = &[];

fn sources(dir: &Path, found: &mut Vec<(String, String)>) {
    for entry in fs::read_dir(dir).unwrap().flatten() {
        let path = entry.path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|e| e == "rs") {
            let name = path
                .strip_prefix(concat!(env!("CARGO_MANIFEST_DIR"), "/src"))
                .unwrap()
                .display()
                .to_string();
            found.push((name, fs::read_to_string(&path).unwrap()));
        }
    }
}

fn all() -> Vec<(String, String)> {
    let mut found = Vec::new();
    sources(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/src")), &mut found);
    found
}

fn rank(rows: Rows, name: &str) -> Option<usize> {
    rows.iter().position(|row| row.contains(&name))
}

/// Edges that go up or sideways, as `(file, room -> room)`, and rooms without a rank.
fn wrong(files: &[(String, String)], table: &Table) -> BTreeSet<(String, String)> {
    let modules: BTreeSet<Module> =
        files.iter().map(|(file, _)| module_of(file)).filter(|m| !m.is_empty()).collect();
    let mut wrong = BTreeSet::new();
    for (file, text) in files {
        let module = module_of(file);
        if module.is_empty() || module.iter().any(|name| name == "tests") {
            continue;
        }
        for target in used(&module, text, &modules) {
            let (rows, from, to) = if module[0] == target[0] {
                let Some((_, rows)) = table.inside.iter().find(|(room, _)| *room == module[0])
                else {
                    continue;
                };
                let sub = |module: &Module| module.get(1).map_or("mod", String::as_str).to_owned();
                (*rows, sub(&module), sub(&target))
            } else {
                (table.rooms, module[0].clone(), target[0].clone())
            };
            let (above, below) = (rank(rows, &from), rank(rows, &to));
            if from != to && (above <= below || below.is_none()) {
                let inside =
                    if module[0] == target[0] { format!("{}/", module[0]) } else { String::new() };
                wrong.insert((file.clone(), format!("{inside}{from} -> {inside}{to}")));
            }
        }
    }
    wrong
}

#[test]
fn a_room_uses_only_rooms_below_it() {
    let new: Vec<_> =
        wrong(&all(), &TABLE).into_iter().map(|(file, edge)| format!("{file}: {edge}")).collect();
    assert!(
        new.is_empty(),
        "edges that do not go down, or rooms that no row names:\n{}",
        new.join("\n")
    );
    for room in fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/src"))
        .unwrap()
        .map(|entry| entry.unwrap())
    {
        let name = room.file_name().into_string().unwrap();
        assert!(
            !room.path().is_dir() || INSIDE.iter().any(|(known, _)| *known == name),
            "there are no ranks for the inside of {name}"
        );
    }
}

#[test]
fn a_planted_edge_is_found_however_it_is_written() {
    let table = Table {
        rooms: &[&["below"], &["above", "beside"]],
        inside: &[("above", &[&["low"], &["mid", "high"]])],
    };
    let find = |planted: &[(&str, &str)]| {
        let files = [
            "above/mod.rs",
            "above/low.rs",
            "above/mid/mod.rs",
            "above/mid/deep.rs",
            "above/high.rs",
            "below.rs",
            "below/part.rs",
            "beside.rs",
        ];
        let files = files.map(|file| (file, "")).into_iter().chain(planted.iter().copied());
        let files: Vec<(String, String)> =
            files.map(|(file, text)| (file.to_owned(), text.to_owned())).collect();
        wrong(&files, &table).into_iter().map(|(_, edge)| edge).collect::<Vec<_>>().join(", ")
    };
    // up
    for (file, text) in [
        ("below.rs", "use crate::above::X;"),
        ("below.rs", "use crate::{below::{self, Y}, above::{mid::X, Z}};"),
        ("below.rs", "use super::above;"),
        ("below.rs", "fn f() -> u8 { crate::above::X }"),
        ("below/part.rs", "use super::super::above::X;"),
        ("below/part.rs", "struct Y(super::super::above::X);"),
    ] {
        assert_eq!(find(&[(file, text)]), "below -> above", "{text}");
    }
    assert_eq!(find(&[("above/low.rs", "use super::mid::deep::X;")]), "above/low -> above/mid");
    assert_eq!(
        find(&[("above/mid/deep.rs", "use super::super::high::X;")]),
        "above/mid -> above/high"
    );
    assert_eq!(find(&[("new.rs", "use crate::below::X;")]), "new -> below");
    // a circle has an edge that does not go down, whatever the ranks are
    let circle = [
        ("above/low.rs", "use crate::above::mid::X;"),
        ("above/mid/deep.rs", "use super::super::low::Y;"),
    ];
    assert_eq!(find(&circle), "above/low -> above/mid");
    let circle = [
        ("above/high.rs", "use crate::beside; fn f() { beside::run() }"),
        ("beside.rs", "type X = crate::above::high::X;"),
    ];
    assert_eq!(find(&circle), "above -> beside, beside -> above");
    // who may see an item is no edge; what comes after it is
    let seen = "pub(in crate::above) fn f() { super::high::X }";
    assert_eq!(find(&[("above/low.rs", seen)]), "above/low -> above/high");
    // down, and within one room
    assert_eq!(
        find(&[(
            "above/mid/deep.rs",
            "use super::super::low::X; use super::Y; use crate::below::part;"
        )]),
        ""
    );
}

/// The map has each room with its rank, and the files and functions on its walks exist.
#[test]
fn the_map_shows_what_is_there() {
    let root = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/src"));
    let map = fs::read_to_string(root.join("README.md")).unwrap();
    for (rank, row) in ROOMS.iter().enumerate() {
        for room in *row {
            let name =
                if root.join(room).is_dir() { format!("{room}/") } else { format!("{room}.rs") };
            assert!(
                map.contains(&format!("\n| {rank} | `{name}` |")),
                "the table of the map lacks `{name}` with rank {rank}"
            );
        }
    }
    for named in map.split('`').skip(1).step_by(2).filter(|text| {
        text.contains(".rs")
            && !text.contains(char::is_whitespace)
            && !text.starts_with("tests/")
            && *text != "mod.rs"
    }) {
        let (file, function) = named.split_once("::").unwrap_or((named, ""));
        let text = fs::read_to_string(root.join(file))
            .unwrap_or_else(|e| panic!("the map names {named}: {e}"));
        let there = [format!("fn {function}("), format!("fn {function}<")]
            .iter()
            .any(|start| text.contains(start));
        assert!(function.is_empty() || there, "the map names {named}, which is not there");
    }
}

#[test]
fn every_room_says_what_it_is_and_stays_small() {
    for (file, text) in all() {
        assert!(text.starts_with("//! "), "{file} does not say what lives there");
        let lines = text.lines().count();
        match TO_SPLIT.iter().find(|(name, _)| *name == file) {
            Some((_, then)) => {
                assert!(lines <= *then, "{file} has grown from {then} to {lines} lines");
                assert!(lines > MAX_LINES, "{file} is short enough now: take it off TO_SPLIT");
            }
            None => assert!(lines <= MAX_LINES, "{file} has {lines} lines"),
        }
    }
}

/// A name there that no longer fits costs the agent memory, and nobody would see it.
#[test]
fn what_the_linker_sets_apart_is_there() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let layout = fs::read_to_string(root.join(".cargo/layout.ld")).unwrap();
    let mut seen = 0;
    for rest in layout.split("_$LT$pipeops..").skip(1) {
        let path = rest.split("..*").next().unwrap().replace("..", "/");
        let there = root.join("src").join(&path);
        assert!(there.is_dir() || there.with_extension("rs").is_file(), "{path} is not in src");
        seen += 1;
    }
    assert!(seen > 4, "only {seen} rooms are set apart");
}

/// Four digits stand in some random hash of every 25th run; a planted secret that is looked for
/// afterwards is 20 characters or more.
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
            for looked in text
                .split("contains(\"")
                .skip(1)
                .filter_map(|rest| rest.split_once("\")").map(|(looked, _)| looked))
            {
                let digits = looked.len() >= 4 && looked.bytes().all(|b| b.is_ascii_digit());
                assert!(
                    !digits || looked.len() >= 20,
                    "{}: `{looked}` is found by chance: look for all of it",
                    path.display()
                );
            }
            let words = text.split(|c: char| !c.is_ascii_alphanumeric() && !"-_{}".contains(c));
            // a value; a name that is planted has no digits
            for word in words.filter(|w| {
                w.contains(|c: char| c.is_ascii_digit())
                    && marks.iter().any(|mark| w.contains(mark))
            }) {
                seen += 1;
                assert!(
                    word.len() >= 20,
                    "{}: `{word}` is found by chance: make it 20 characters or more",
                    path.display()
                );
            }
        }
    }
    assert!(seen > 20, "only {seen} planted secrets were seen: the marks have changed");
}
