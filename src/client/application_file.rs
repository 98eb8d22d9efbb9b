//! `pipeops.toml`: an application as people keep it beside its source.

use serde_path_to_error::{Path, Segment};
use toml::de::{DeArray, DeTable, DeValue};

use crate::base::config_file::{plain, unquoted};
use crate::base::error::{Failure, nearest};
use crate::base::json;
use crate::contract::application::Application;

/// How a message begins whose names in backticks are a key, and those that are known there
/// (serde_core `de/mod.rs`: unknown field `a`, expected one of `b`, `c`).
const UNKNOWN: &str = "unknown field";

/// What the file holds: the fields of an application, and where it belongs.
#[derive(Debug, PartialEq)]
pub struct ApplicationFile {
    pub application: Application,
    /// Name or id of the cluster.
    pub cluster: Option<String>,
}

/// # Errors
/// Exit 2 with line, column and, for an unknown key, the nearest one. Values are not quoted.
pub fn parse(text: &str, origin: &str) -> Result<ApplicationFile, Failure> {
    let mut root = DeTable::parse(text)
        .map_err(|e| wrong(text, origin, e.span().map(|span| span.start), e.message()))?;
    let cluster = match root.get_mut().remove("cluster") {
        None => None,
        Some(value) => match value.get_ref() {
            DeValue::String(name) => Some(name.clone().into_owned()),
            _ => {
                let what =
                    format!("{origin}, {}: `cluster` is text", place(text, value.span().start));
                return Err(Failure::usage("APPLICATION_INVALID", what)
                    .hint("the name or the id of a cluster, as `pipeops clusters` lists them"));
            }
        },
    };
    let application = json::fields(plain(root.get_ref()).into()).map_err(|e| {
        let message = e.inner().to_string();
        let start = start(root.get_ref(), e.path(), message.starts_with(UNKNOWN));
        wrong(text, origin, start, &message)
    })?;
    Ok(ApplicationFile { application, cluster })
}

/// Where the value of a field begins, or its key.
fn start(root: &DeTable<'_>, path: &Path, of_key: bool) -> Option<usize> {
    let (mut found, mut table, mut list): (_, _, Option<&DeArray<'_>>) = (None, Some(root), None);
    for segment in path {
        let value = match segment {
            Segment::Map { key } => {
                let (name, value) = table?.iter().find(|(name, _)| name.get_ref() == key)?;
                found = Some(if of_key { name.span().start } else { value.span().start });
                value
            }
            Segment::Seq { index } => {
                let value = list?.get(*index)?;
                found = Some(value.span().start);
                value
            }
            Segment::Enum { .. } | Segment::Unknown => break,
        };
        (table, list) = match value.get_ref() {
            DeValue::Table(inner) => (Some(inner), None),
            DeValue::Array(inner) => (None, Some(inner)),
            _ => (None, None),
        };
    }
    found
}

/// Line and column of a byte, from 1.
fn place(text: &str, at: usize) -> String {
    let before = text.get(..at).unwrap_or(text);
    let line = before.matches('\n').count() + 1;
    let column = before.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
    format!("line {line}, column {column}")
}

fn wrong(text: &str, origin: &str, start: Option<usize>, message: &str) -> Failure {
    let place = start.map(|start| format!(", {}", place(text, start))).unwrap_or_default();
    let message = unquoted(message);
    let names: Vec<&str> = message.split('`').skip(1).step_by(2).collect();
    let (Some((key, fields)), true) = (names.split_first(), message.starts_with(UNKNOWN)) else {
        let what = format!("{origin}{place}: this is no application");
        return Failure::usage("APPLICATION_INVALID", what)
            .why(message)
            .hint("the README lists the fields under Applications");
    };
    let mut known = fields.to_vec();
    // it is no field of an application, and stands beside them
    if fields.contains(&"pre_deploy") {
        known.push("cluster");
    }
    let near = nearest(key, known.iter().copied());
    Failure::usage("APPLICATION_INVALID", format!("{origin}{place}: unknown key `{key}`")).hint(
        match near {
            Some(near) => format!("did you mean `{near}`?"),
            None => format!("the keys there are: {}", known.join(", ")),
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::contract::application::{Probe, Variable};

    #[test]
    fn a_file_is_the_application_that_the_api_takes() {
        let text = r#"
name = "shop"
namespace = "production"
cluster = "eu"
image = "registry.example.com/shop:43"
replicas = 2
ports = [{container_port = 8080}]
host = {name = "shop.example.com"}

[environment]
MODE = "fast"
WORKERS = 4
DATABASE_URL = {secret = "db", key = "url"}

[probes.readiness]
path = "/ready"
"#;
        let file = parse(text, "pipeops.toml").unwrap();
        assert_eq!(file.cluster.as_deref(), Some("eu"));
        let application = file.application;
        assert_eq!(application.check(), Ok(()));
        assert_eq!(application.ports[0].container_port, 8080);
        assert_eq!(application.environment["WORKERS"], Variable::Text("4".into()));
        let secret = Variable::Secret { secret: "db".into(), key: "url".into() };
        assert_eq!(application.environment["DATABASE_URL"], secret);
        let readiness = Probe { path: Some("/ready".into()), ..Probe::default() };
        assert_eq!(application.probes.readiness, Some(readiness));
    }

    #[test]
    fn a_fault_is_named_with_its_place_and_the_nearest_key() {
        for (text, said) in [
            ("name = \"a\"\nimgae = \"b\"\n", &["line 2, column 1", "did you mean `image`?"][..]),
            (
                "name = \"a\"\nports = [{contaner_port = 1}]\n",
                &["line 2, column 11", "did you mean `container_port`?"],
            ),
            ("clustr = \"eu\"\n", &["line 1, column 1", "did you mean `cluster`?"]),
            ("[probes.readines]\npath = \"/\"\n", &["line 1", "did you mean `readiness`?"]),
            ("replicas = \"planted-canary-4711-in-plain-text\"\n", &["line 1, column 12"]),
            ("cluster = 5\n", &["line 1, column 11", "`cluster` is text"]),
            ("environment = {VERSION = 1.20}\n", &["line 1", "write it in quotes"]),
            ("environment = {A = {secret = \"s\"}}\n", &["text, {secret = NAME, key = KEY} or {"]),
            ("name = \"a\" x\n", &["line 1"]),
            ("zzzzzzzzzzzzzzzz = 1\n", &["the keys there are: name, namespace, image", "cluster"]),
        ] {
            let failure = parse(text, "app.toml").unwrap_err();
            let shown = failure.render();
            assert_eq!((failure.exit.number(), failure.code.as_str()), (2, "APPLICATION_INVALID"));
            assert!(
                shown.contains("app.toml") && !shown.contains("canary-4711-in-plain-text"),
                "{shown}"
            );
            for word in said {
                assert!(shown.contains(word), "{text}: {shown}");
            }
        }
    }
}
