//! `clusters`: those that the token reaches, selected and grouped by their labels.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use url::form_urlencoded::byte_serialize;

use super::{Context, Session, apps, cell, printer, time_cell};
use crate::base::error::Exit;
use crate::base::text::printable;
use crate::cli::OutputArgs;
use crate::contract::selector::FACTS;
use crate::output::table;

const HEAD: [&str; 10] =
    ["ID", "NAME", "STATE", "PROVIDER", "REGION", "VERSION", "NODES", "TUNNEL", "SEEN", "REASON"];

/// # Errors
/// What the control plane refuses.
pub(super) async fn clusters(
    context: &Context,
    name: Option<&str>,
    selector: Option<&str>,
    group_by: Option<&str>,
    output: &OutputArgs,
) -> anyhow::Result<Exit> {
    let session = Session::open(context, name)?;
    let path = match selector {
        Some(text) => {
            let text: String = byte_serialize(text.as_bytes()).collect();
            format!("/api/v1/clusters?selector={text}")
        }
        None => "/api/v1/clusters".to_owned(),
    };
    let list = context.unless_stopped(session.api.get(&path)).await?;
    let items = list["items"].as_array().cloned().unwrap_or_default();
    let printer = printer(context, output);
    let Some(key) = group_by else {
        let lines: Vec<Vec<String>> = items.iter().map(row).collect();
        apps::show(&printer, &items, &HEAD, &lines);
        return Ok(Exit::Done);
    };
    let (mut groups, mut text) = (Vec::new(), Vec::new());
    for (value, items) in grouped(items, key) {
        let shown = if value.is_empty() { "-".into() } else { printable(&value) };
        let lines: Vec<Vec<String>> = items.iter().map(row).collect();
        text.push(format!("{key} {shown}: {}\n{}", items.len(), table(&HEAD, &lines)));
        groups.push(json!({"value": value, "items": items}));
    }
    printer.document(&json!({"group_by": key, "groups": groups}));
    let text = text.join("\n");
    printer.data(if text.is_empty() { "none" } else { text.trim_end() });
    Ok(Exit::Done)
}

/// By the value of a fact or label; those without it under an empty one.
fn grouped(items: Vec<Value>, key: &str) -> BTreeMap<String, Vec<Value>> {
    let mut groups: BTreeMap<String, Vec<Value>> = BTreeMap::new();
    for item in items {
        let value = if FACTS.contains(&key) { &item[key] } else { &item["labels"][key] };
        let value = value.as_str().unwrap_or_default().to_owned();
        groups.entry(value).or_default().push(item);
    }
    groups
}

fn row(row: &Value) -> Vec<String> {
    let fields = ["id", "name", "state", "provider", "region", "version", "nodes", "tunnel"];
    let seen = time_cell(row["seen_at"].as_i64());
    [fields.map(|field| cell(&row[field])).to_vec(), vec![seen, cell(&row["reason"])]].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clusters_stand_in_the_group_of_their_value() {
        let items = || {
            vec![
                json!({"id": "c-1", "provider": "aws", "labels": {"env": "prod"}}),
                json!({"id": "c-2", "provider": "gcp", "labels": {"env": "test"}}),
                json!({"id": "c-3", "provider": "aws"}),
            ]
        };
        let by = |key: &str| -> Vec<(String, usize)> {
            let groups = grouped(items(), key).into_iter();
            groups.map(|(value, items)| (value, items.len())).collect()
        };
        let of = |groups: &[(&str, usize)]| -> Vec<(String, usize)> {
            groups.iter().map(|(value, n)| ((*value).to_owned(), *n)).collect()
        };
        assert_eq!(by("provider"), of(&[("aws", 2), ("gcp", 1)]));
        assert_eq!(by("env"), of(&[("", 1), ("prod", 1), ("test", 1)]));
        assert_eq!(by("zone"), of(&[("", 3)]));
    }
}
