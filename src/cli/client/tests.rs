//! What an argument is read as.

use clap::Parser as _;
use serde_json::json;

use super::tenant::quota;
use crate::cli::{Cli, ClientCommand, Command};

#[test]
fn a_quota_is_read_by_its_names() {
    for (text, name, value) in [
        ("cpu=2", "cpu", json!("2")),
        ("memory=4Gi", "memory", json!("4Gi")),
        ("pods=50", "pods", json!(50)),
        ("load-balancers=0", "load_balancers", json!(0)),
        ("node-ports=1", "node_ports", json!(1)),
    ] {
        assert_eq!(quota(text), Ok((name, value)), "{text}");
    }
    for (text, said) in [
        ("cpu", "NAME=QUANTITY"),
        ("disk=1Gi", "`disk` is not one of cpu,"),
        ("pods=many", "pods is a whole number"),
        ("node-ports=-1", "whole number"),
    ] {
        assert!(quota(text).unwrap_err().contains(said), "{text}");
    }
}

#[test]
fn many_clusters_are_named_by_labels_or_all_together_and_by_nothing_else() {
    let parsed = |more: &str| {
        let text = format!("pipeops restart web {more}");
        match Cli::try_parse_from(text.split_whitespace()).map(|cli| cli.command) {
            Ok(Command::Client(ClientCommand::Restart { rollout, .. })) => Ok(rollout),
            Ok(other) => panic!("{other:?}"),
            Err(error) => Err(error),
        }
    };
    assert!(!parsed("--cluster eu").unwrap().is_given());
    let many = parsed("-l env=prod --waves 1,10%,all --ttl 2h").unwrap();
    assert_eq!(many.selector.as_deref(), Some("env=prod"));
    assert_eq!((many.waves.as_deref(), many.ttl), (Some("1,10%,all"), Some(7200)));
    assert!(parsed("--all-clusters").unwrap().is_given());
    for wrong in [
        "-l env=prod --cluster eu",
        "--all-clusters --cluster eu",
        "--all-clusters -l env=prod",
        "--waves 1,all",
        "--cluster eu --ttl 10m",
        "-l env=prod --ttl 0",
    ] {
        assert!(parsed(wrong).is_err(), "{wrong}");
    }
}
