//! The settings that k3s has: which line of it knows which key, on servers and on workers.
//!
//! A server skips what it does not know with one line in its log; an agent ends (k3s-io/k3s,
//! `pkg/configfilearg/parser.go`).

use serde_json::Value;

use super::version::Version;
use crate::base::error::nearest;
use crate::k3s::role::NodeRole;

/// What a value must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ValueType {
    Bool,
    Int,
    Text,
    List,
    /// As Go writes durations: `5m0s`.
    Time,
}
use ValueType::{Bool, Int, List, Text, Time};

/// Key, kind, and the minor since which servers and workers know it; 28 stands for 1.28 and before.
///
/// Made of the flags in k3s-io/k3s, `pkg/cli/cmds/{root,log,config,server,agent}.go`, as they stood
/// where the main branch moved to each of Kubernetes 1.28 to 1.36, and at its head.
#[rustfmt::skip]
const KEYS: &[(&str, ValueType, Option<u32>, Option<u32>)] = &[
    ("advertise-address", Text, Some(28), None),
    ("advertise-port", Int, Some(28), None),
    ("agent-token", Text, Some(28), None),
    ("agent-token-file", Text, Some(28), None),
    ("airgap-extra-registry", List, Some(28), Some(28)),
    ("alsologtostderr", Bool, Some(28), Some(28)),
    ("apiserver-bind-address", Text, Some(31), None),
    ("apiserver-port", Int, Some(31), None),
    ("bind-address", Text, Some(28), Some(30)),
    ("cluster-cidr", List, Some(28), None),
    ("cluster-dns", List, Some(28), None),
    ("cluster-domain", Text, Some(28), None),
    ("cluster-init", Bool, Some(28), None),
    ("cluster-reset", Bool, Some(28), None),
    ("cluster-reset-restore-path", Text, Some(28), None),
    ("config", Text, Some(28), Some(28)),
    ("container-runtime-endpoint", Text, Some(28), Some(28)),
    ("data-dir", Text, Some(28), Some(28)),
    ("datastore-cafile", Text, Some(28), None),
    ("datastore-certfile", Text, Some(28), None),
    ("datastore-endpoint", Text, Some(28), None),
    ("datastore-keyfile", Text, Some(28), None),
    ("debug", Bool, Some(28), Some(28)),
    ("default-local-storage-path", Text, Some(28), None),
    ("default-runtime", Text, Some(28), Some(28)),
    ("disable", List, Some(28), None),
    ("disable-agent", Bool, Some(28), None),
    ("disable-apiserver", Bool, Some(28), None),
    ("disable-apiserver-lb", Bool, None, Some(28)),
    ("disable-cloud-controller", Bool, Some(28), None),
    ("disable-controller-manager", Bool, Some(28), None),
    ("disable-default-registry-endpoint", Bool, Some(29), Some(29)),
    ("disable-etcd", Bool, Some(28), None),
    ("disable-helm-controller", Bool, Some(28), None),
    ("disable-kube-proxy", Bool, Some(28), None),
    ("disable-network-policy", Bool, Some(28), None),
    ("disable-scheduler", Bool, Some(28), None),
    ("docker", Bool, Some(28), Some(28)),
    ("egress-selector-mode", Text, Some(28), None),
    ("embedded-registry", Bool, Some(29), None),
    ("enable-pprof", Bool, Some(28), Some(30)),
    ("etcd-arg", List, Some(28), None),
    ("etcd-disable-snapshots", Bool, Some(28), None),
    ("etcd-expose-metrics", Bool, Some(28), None),
    ("etcd-s3", Bool, Some(28), None),
    ("etcd-s3-access-key", Text, Some(28), None),
    ("etcd-s3-bucket", Text, Some(28), None),
    ("etcd-s3-bucket-lookup-type", Text, Some(33), None),
    ("etcd-s3-config-secret", Text, Some(30), None),
    ("etcd-s3-endpoint", Text, Some(28), None),
    ("etcd-s3-endpoint-ca", Text, Some(28), None),
    ("etcd-s3-folder", Text, Some(28), None),
    ("etcd-s3-insecure", Bool, Some(28), None),
    ("etcd-s3-proxy", Text, Some(30), None),
    ("etcd-s3-region", Text, Some(28), None),
    ("etcd-s3-retention", Int, Some(33), None),
    ("etcd-s3-secret-key", Text, Some(28), None),
    ("etcd-s3-session-token", Text, Some(32), None),
    ("etcd-s3-skip-ssl-verify", Bool, Some(28), None),
    ("etcd-s3-timeout", Time, Some(28), None),
    ("etcd-snapshot-compress", Bool, Some(28), None),
    ("etcd-snapshot-dir", Text, Some(28), None),
    ("etcd-snapshot-name", Text, Some(28), None),
    ("etcd-snapshot-reconcile-interval", Time, Some(32), None),
    ("etcd-snapshot-retention", Int, Some(28), None),
    ("etcd-snapshot-schedule-cron", Text, Some(28), None),
    ("flannel-backend", Text, Some(28), None),
    ("flannel-cni-conf", Text, Some(28), Some(28)),
    ("flannel-conf", Text, Some(28), Some(28)),
    ("flannel-external-ip", Bool, Some(28), None),
    ("flannel-iface", Text, Some(28), Some(28)),
    ("flannel-ipv6-masq", Bool, Some(28), None),
    ("helm-job-image", Text, Some(28), None),
    ("https-listen-port", Int, Some(28), None),
    ("image-credential-provider-bin-dir", Text, Some(28), Some(28)),
    ("image-credential-provider-config", Text, Some(28), Some(28)),
    ("image-service-endpoint", Text, Some(28), Some(28)),
    ("kine-tls", Bool, Some(29), None),
    ("kube-apiserver-arg", List, Some(28), None),
    ("kube-cloud-controller-arg", List, Some(28), None),
    ("kube-cloud-controller-manager-arg", List, Some(28), None),
    ("kube-controller-arg", List, Some(28), None),
    ("kube-controller-manager-arg", List, Some(28), None),
    ("kube-proxy-arg", List, Some(28), Some(28)),
    ("kube-scheduler-arg", List, Some(28), None),
    ("kubelet-arg", List, Some(28), Some(28)),
    ("lb-server-port", Int, Some(28), Some(28)),
    ("log", Text, Some(28), Some(28)),
    ("node-external-dns", List, Some(31), Some(31)),
    ("node-external-ip", List, Some(28), Some(28)),
    ("node-internal-dns", List, Some(31), Some(31)),
    ("node-ip", List, Some(28), Some(28)),
    ("node-label", List, Some(28), Some(28)),
    ("node-name", Text, Some(28), Some(28)),
    ("node-taint", List, Some(28), Some(28)),
    ("nonroot-devices", Bool, Some(31), Some(31)),
    ("pause-image", Text, Some(28), Some(28)),
    ("prefer-bundled-bin", Bool, Some(28), Some(28)),
    ("private-registry", Text, Some(28), Some(28)),
    ("protect-kernel-defaults", Bool, Some(28), Some(28)),
    ("resolv-conf", Text, Some(28), Some(28)),
    ("rootless", Bool, Some(28), Some(28)),
    ("secrets-encryption", Bool, Some(28), None),
    ("secrets-encryption-provider", Text, Some(32), None),
    ("selinux", Bool, Some(28), Some(28)),
    ("server", Text, Some(28), Some(28)),
    ("service-cidr", List, Some(28), None),
    ("service-node-port-range", Text, Some(28), None),
    ("servicelb-namespace", Text, Some(28), None),
    ("snapshotter", Text, Some(28), Some(28)),
    ("supervisor-metrics", Bool, Some(30), None),
    ("supervisor-port", Int, Some(31), None),
    ("system-default-registry", Text, Some(28), None),
    ("tls-san", List, Some(28), None),
    ("tls-san-security", Bool, Some(28), None),
    ("token", Text, Some(28), Some(28)),
    ("token-file", Text, Some(28), Some(28)),
    ("v", Int, Some(28), Some(28)),
    ("vmodule", Text, Some(28), Some(28)),
    ("vpn-auth", Text, Some(28), Some(28)),
    ("vpn-auth-file", Text, Some(28), Some(28)),
    ("with-node-id", Bool, Some(28), Some(28)),
    ("write-kubeconfig", Text, Some(28), None),
    ("write-kubeconfig-group", Text, Some(30), None),
    ("write-kubeconfig-mode", Text, Some(28), None),
];

/// Newest minor that the table knows.
const NEWEST: u32 = 36;

/// One-letter names of flags, which a config file may use too.
const SHORT: &[(&str, &str)] = &[
    ("c", "config"),
    ("d", "data-dir"),
    ("i", "node-ip"),
    ("l", "log"),
    ("o", "write-kubeconfig"),
    ("s", "server"),
    ("t", "token"),
];

/// Flags that older lines had, and what does it today.
const GONE: &[(&str, &str)] = &[
    ("no-deploy", "disable"),
    ("no-flannel", "flannel-backend = \"none\""),
    ("cluster-secret", "--token-file"),
    ("disable-selinux", "selinux"),
    ("storage-endpoint", "datastore-endpoint"),
    ("storage-cafile", "datastore-cafile"),
    ("storage-certfile", "datastore-certfile"),
    ("storage-keyfile", "datastore-keyfile"),
    ("multi-cluster-cidr", "nothing: it went with 1.30"),
];

/// The key in the form that k3s knows: `--Node_IP+` is `node-ip`, `t` is `token`.
pub fn canonical_key(key: &str) -> String {
    let key = key
        .trim()
        .trim_start_matches('-')
        .trim_end_matches('+')
        .to_ascii_lowercase()
        .replace('_', "-");
    SHORT.iter().find(|(short, _)| *short == key).map_or(key, |(_, long)| (*long).to_owned())
}

/// What the value of a key must be; `None` for unknown keys.
pub fn value_type(key: &str) -> Option<ValueType> {
    let key = canonical_key(key);
    KEYS.iter().find(|row| row.0 == key).map(|row| row.1)
}

/// A key that this k3s does not know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnknownKey {
    pub key: String,
    pub why: String,
    pub fix: String,
    /// It may exist after all: in a patch release, or in a line newer than the table.
    pub uncertain: bool,
}

/// The keys that a node of this role and version does not know. Without a version only what no line
/// knows is named.
pub fn unknown_keys<'a>(
    keys: impl IntoIterator<Item = &'a str>,
    role: NodeRole,
    version: Option<&Version>,
) -> Vec<UnknownKey> {
    keys.into_iter().filter_map(|key| check_key(key, role, version)).collect()
}

fn check_key(key: &str, role: NodeRole, version: Option<&Version>) -> Option<UnknownKey> {
    // k3s takes KEY+ for "and these too"
    let plain = key.strip_suffix('+').unwrap_or(key);
    let long = SHORT.iter().find(|(short, _)| *short == plain).map_or(plain, |(_, long)| long);
    let of = |why: String, fix: String| {
        Some(UnknownKey { key: key.to_owned(), why, fix, uncertain: false })
    };
    let Some((name, _, server, agent)) = KEYS.iter().find(|row| row.0 == long) else {
        let newer = version.filter(|v| v.minor > NEWEST);
        let why = match newer {
            Some(version) => format!("{version} is newer than what is known here (1.{NEWEST})"),
            None => match role {
                NodeRole::Server => "a k3s server skips it with one line in its log".to_owned(),
                NodeRole::Worker => "a k3s agent ends with it".to_owned(),
            },
        };
        let fix = match (
            GONE.iter().find(|(old, _)| *old == canonical_key(key)),
            KEYS.iter().find(|row| row.0 == canonical_key(key)),
        ) {
            (Some((_, now)), _) => format!("k3s has no such setting any more; use {now}"),
            (None, Some((name, ..))) => format!("write it `{name}`"),
            (None, None) => match nearest(&canonical_key(key), KEYS.iter().map(|row| row.0)) {
                Some(near) => format!("did you mean `{near}`?"),
                None => "the settings are the flags of `k3s server --help` and `k3s agent --help`"
                    .to_owned(),
            },
        };
        return Some(UnknownKey { key: key.to_owned(), why, fix, uncertain: newer.is_some() });
    };
    let since = match role {
        NodeRole::Server => *server,
        NodeRole::Worker => *agent,
    };
    match (since, version) {
        (None, _) => {
            let (other, end) = match role {
                NodeRole::Server => ("workers", "a server skips it"),
                NodeRole::Worker => ("servers", "an agent ends with it"),
            };
            of(
                format!("it is a setting of {other}: {end}"),
                format!("set `{name}` on {other} only"),
            )
        }
        (Some(since), Some(version)) if version.major == 1 && version.minor < since => {
            Some(UnknownKey {
                key: key.to_owned(),
                why: format!(
                    "it came with k3s 1.{since}; this is {version}, which may have got it in a \
                     patch release"
                ),
                fix: "install a newer k3s, or leave the setting out".to_owned(),
                uncertain: true,
            })
        }
        _ => None,
    }
}

/// Why k3s could not read a value; `None` when it can.
pub fn value_fault(key: &str, value: &Value) -> Option<String> {
    let list = matches!(value, Value::Array(_));
    if value.is_object()
        || value
            .as_array()
            .is_some_and(|items| items.iter().any(|i| i.is_object() || i.is_array() || i.is_null()))
    {
        return Some("it must be a value or a list of values, not a table".into());
    }
    let value_type = value_type(key)?;
    if list && value_type != List {
        return Some("it takes one value, not a list: k3s would take the last one".into());
    }
    // a value may be a secret: it is not quoted
    let text = value.as_str();
    match value_type {
        Bool => {
            let go = |t: &str| {
                ["1", "t", "T", "TRUE", "true", "True", "0", "f", "F", "FALSE", "false", "False"]
                    .contains(&t)
            };
            let fine =
                value.is_boolean() || text.is_some_and(go) || value.as_u64().is_some_and(|n| n < 2);
            (!fine).then(|| "it is true or false".into())
        }
        Int => {
            (!(value.is_i64() || value.is_u64() || text.is_some_and(|t| t.parse::<i64>().is_ok())))
                .then(|| "it is a whole number".into())
        }
        Time => (!text.is_some_and(is_go_duration))
            .then(|| "it is a time with its unit, such as 30s, 5m or 1h30m".into()),
        Text | List => None,
    }
    .or_else(|| choice_fault(&canonical_key(key), text?))
}

/// Settings with a closed set of values (`pkg/agent/flannel/setup.go`, `pkg/cli/server/server.go`,
/// `pkg/secretsencrypt`).
fn choice_fault(key: &str, text: &str) -> Option<String> {
    let values: &[&str] = match key {
        "flannel-backend" => &["vxlan", "host-gw", "wireguard-native", "none", "tailscale"],
        "egress-selector-mode" => &["agent", "cluster", "pod", "disabled"],
        "secrets-encryption-provider" => &["aescbc", "secretbox"],
        "etcd-s3-bucket-lookup-type" => &["auto", "dns", "path"],
        _ => return None,
    };
    if values.contains(&text) {
        return None;
    }
    let near = nearest(text, values.iter().copied())
        .map(|n| format!("; did you mean `{n}`?"))
        .unwrap_or_default();
    Some(format!("`{text}` is none of {}{near}", values.join(", ")))
}

/// Go's `time.ParseDuration`.
fn is_go_duration(text: &str) -> bool {
    let mut rest = text.strip_prefix(['+', '-']).unwrap_or(text);
    if rest == "0" {
        return true;
    }
    while !rest.is_empty() {
        let number =
            rest.len() - rest.trim_start_matches(|c: char| c.is_ascii_digit() || c == '.').len();
        let (digits, after) = rest.split_at(number);
        let Some(unit) = ["ns", "us", "µs", "ms", "s", "m", "h"].into_iter().find(|u| {
            after.strip_prefix(u).is_some_and(|next| {
                next.is_empty() || next.starts_with(|c: char| c.is_ascii_digit() || c == '.')
            })
        }) else {
            return false;
        };
        if !digits.contains(|c: char| c.is_ascii_digit()) || digits.matches('.').count() > 1 {
            return false;
        }
        rest = &after[unit.len()..];
    }
    !text.is_empty()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn at(version: &str) -> Version {
        version.parse().unwrap()
    }

    #[test]
    fn every_key_is_known_once_and_in_order() {
        assert!(KEYS.windows(2).all(|pair| pair[0].0 < pair[1].0));
        for (key, ..) in KEYS {
            assert!(
                check_key(key, NodeRole::Server, Some(&at("v1.36.2+k3s1"))).is_none()
                    || *key == "disable-apiserver-lb",
                "{key}"
            );
        }
        assert_eq!(KEYS.iter().filter(|row| row.3.is_some()).count(), 46);
    }

    #[test]
    fn an_unknown_key_is_named_with_what_was_meant() {
        for (key, role, version, fix, uncertain) in [
            (
                "cluster-cird",
                NodeRole::Server,
                "v1.36.2+k3s1",
                "did you mean `cluster-cidr`?",
                false,
            ),
            ("kubelet_arg", NodeRole::Server, "v1.36.2+k3s1", "write it `kubelet-arg`", false),
            ("--disable", NodeRole::Server, "v1.36.2+k3s1", "write it `disable`", false),
            (
                "Flannel-Backend",
                NodeRole::Server,
                "v1.36.2+k3s1",
                "write it `flannel-backend`",
                false,
            ),
            (
                "etcd-s3-buckt",
                NodeRole::Server,
                "v1.36.2+k3s1",
                "did you mean `etcd-s3-bucket`?",
                false,
            ),
            (
                "datastoreendpoint",
                NodeRole::Server,
                "v1.36.2+k3s1",
                "did you mean `datastore-endpoint`?",
                false,
            ),
            (
                "no-deploy",
                NodeRole::Server,
                "v1.36.2+k3s1",
                "k3s has no such setting any more; use disable",
                false,
            ),
            (
                "multi-cluster-cidr",
                NodeRole::Server,
                "v1.34.1+k3s1",
                "use nothing: it went with 1.30",
                false,
            ),
            ("zzzzzzzzzzzz", NodeRole::Server, "v1.36.2+k3s1", "k3s server --help", false),
            ("zzzzzzzzzzzz", NodeRole::Server, "v1.37.0+k3s1", "k3s server --help", true),
            ("disable-apiserver-lb", NodeRole::Server, "v1.36.2+k3s1", "on workers only", false),
            ("cluster-cidr", NodeRole::Worker, "v1.36.2+k3s1", "on servers only", false),
            ("nonroot-devices", NodeRole::Worker, "v1.30.4+k3s1", "install a newer k3s", true),
            ("supervisor-metrics", NodeRole::Server, "v1.29.1+k3s1", "install a newer k3s", true),
        ] {
            let found = check_key(key, role, Some(&at(version))).unwrap_or_else(|| panic!("{key}"));
            assert!(found.fix.contains(fix) && found.uncertain == uncertain, "{key}: {found:?}");
        }
        for (key, role) in [
            ("cluster-cidr", NodeRole::Server),
            ("kubelet-arg+", NodeRole::Worker),
            ("v", NodeRole::Worker),
            ("supervisor-port", NodeRole::Server),
        ] {
            assert_eq!(check_key(key, role, Some(&at("v1.34.1+k3s1"))), None, "{key}");
        }
        assert_eq!(check_key("nonroot-devices", NodeRole::Server, None), None);
    }

    #[test]
    fn values_are_what_k3s_can_read() {
        for (key, value) in [
            ("debug", json!(true)),
            ("debug", json!("True")),
            ("https-listen-port", json!(6443)),
            ("https-listen-port", json!("6443")),
            ("etcd-s3-timeout", json!("5m0s")),
            ("etcd-s3-timeout", json!("1.5h")),
            ("kubelet-arg", json!("a=b")),
            ("kubelet-arg", json!(["a=b", 3])),
            ("flannel-backend", json!("host-gw")),
            ("nobody-knows", json!("x")),
        ] {
            assert_eq!(value_fault(key, &value), None, "{key} {value}");
        }
        for (key, value, why) in [
            ("debug", json!("yes"), "true or false"),
            ("disable-kube-proxy", json!("on"), "true or false"),
            ("etcd-snapshot-retention", json!("five"), "whole number"),
            ("https-listen-port", json!(6443.5), "whole number"),
            ("etcd-s3-timeout", json!(300), "with its unit"),
            ("etcd-snapshot-reconcile-interval", json!("5 min"), "with its unit"),
            ("etcd-s3-timeout", json!("5d"), "with its unit"),
            ("resolv-conf", json!(["/a", "/b"]), "one value"),
            ("kubelet-arg", json!({"max-pods": 1}), "not a table"),
            ("kubelet-arg", json!([{"max-pods": 1}]), "not a table"),
            ("flannel-backend", json!("wireguard"), "did you mean `wireguard-native`"),
            ("flannel-backend", json!("VXLAN"), "did you mean `vxlan`"),
            ("egress-selector-mode", json!("pods"), "did you mean `pod`"),
        ] {
            assert!(
                value_fault(key, &value).is_some_and(|w| w.contains(why)),
                "{key} {value}: {:?}",
                value_fault(key, &value)
            );
        }
    }
}
