//! What an argument is read as.

use serde_json::json;

use super::*;

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
