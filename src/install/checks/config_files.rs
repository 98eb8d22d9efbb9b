//! Rules about settings of k3s that stand beside ours: files in its directory, variables of the
//! environment.

use super::InstallTarget;
use crate::host::paths::DROP_IN;
use crate::install::facts::{Facts, SettingsFile};
use crate::install::finding::{Finding, Level};
use crate::install::settings::owned_k3s_key;
use crate::k3s::paths::DATA_DIR;

/// Flags of `k3s server` that `k3s agent` does not have: it ends at once over one of them, where a
/// server skips what it does not know (k3s-io/k3s, pkg/cli/cmds/server.go and agent.go;
/// pkg/configfilearg/defaultparser.go has no list for the agent).
const SERVER_ONLY: &[&str] = &[
    "advertise-address",
    "advertise-port",
    "agent-token",
    "agent-token-file",
    "apiserver-bind-address",
    "apiserver-port",
    "cluster-cidr",
    "cluster-dns",
    "cluster-domain",
    "cluster-init",
    "cluster-reset",
    "cluster-reset-restore-path",
    "datastore-cafile",
    "datastore-certfile",
    "datastore-endpoint",
    "datastore-keyfile",
    "default-local-storage-path",
    "disable",
    "disable-agent",
    "disable-apiserver",
    "disable-cloud-controller",
    "disable-controller-manager",
    "disable-etcd",
    "disable-helm-controller",
    "disable-kube-proxy",
    "disable-network-policy",
    "disable-scheduler",
    "egress-selector-mode",
    "embedded-registry",
    "flannel-backend",
    "flannel-external-ip",
    "flannel-ipv6-masq",
    "helm-job-image",
    "https-listen-port",
    "kine-tls",
    "kube-apiserver-arg",
    "kube-cloud-controller-arg",
    "kube-cloud-controller-manager-arg",
    "kube-controller-arg",
    "kube-controller-manager-arg",
    "kube-scheduler-arg",
    "secrets-encryption",
    "service-cidr",
    "service-node-port-range",
    "servicelb-namespace",
    "supervisor-metrics",
    "supervisor-port",
    "system-default-registry",
    "tls-san",
    "tls-san-security",
    "write-kubeconfig",
    "write-kubeconfig-group",
    "write-kubeconfig-mode",
];

fn server_only(key: &str) -> bool {
    SERVER_ONLY.contains(&key) || key.starts_with("etcd-")
}

pub(super) fn unreadable(facts: &Facts, _: &InstallTarget<'_>) -> Vec<Finding> {
    let broken = facts.k3s.files.iter().filter_map(|f| Some((f, f.fault.as_deref()?)));
    broken
        .map(|(file, why)| {
            Finding::new(
                "K3S_CONFIG_INVALID",
                Level::Error,
                format!("k3s cannot read {}, and would not start", file.path),
                why,
            )
            .fix(format!("correct {} or move it away", file.path))
        })
        .collect()
}

/// Settings that plans, checks and later runs count on.
pub(super) fn clash(facts: &Facts, target: &InstallTarget<'_>) -> Vec<Finding> {
    let mut found = Vec::new();
    for file in &facts.k3s.files {
        for (key, value) in &file.entries {
            found.extend(entry(facts, target, file, key, value));
        }
    }
    found
}

fn entry(
    facts: &Facts,
    target: &InstallTarget<'_>,
    file: &SettingsFile,
    key: &str,
    value: &serde_json::Value,
) -> Option<Finding> {
    let (name, appends) = (key.trim_end_matches('+'), key.ends_with('+'));
    let options = &target.settings.options;
    let text = value.as_str().unwrap_or_default().trim();
    let finding = |level, what: String| {
        Finding::new("K3S_CONFIG_CLASH", level, what, format!("{}: {key}", file.path))
    };
    if name == "data-dir" {
        // only the user's files set it, so that it applies whichever of them has it
        let same = text.trim_end_matches('/') == DATA_DIR;
        let what = format!(
            "k3s is configured to keep its data elsewhere, and pipeops looks in {DATA_DIR}"
        );
        let fix = format!(
            "take it out of {}; to use another disk mount it on {DATA_DIR}, or make that a link",
            file.path
        );
        return (!same).then(|| finding(Level::Error, what).fix(fix));
    }
    if !target.server() && server_only(name) && !file.path.ends_with(".env") {
        let what =
            format!("`{name}` is a setting of servers, and a worker's k3s ends at once over it");
        return Some(
            finding(Level::Error, what)
                .fix(format!("take it out of {}; it belongs on the server", file.path)),
        );
    }
    let lists = match name {
        // these follow the file
        "node-ip" | "flannel-iface" => return None,
        "tls-san" => !options.tls_san.is_empty(),
        "node-label" => !options.node_label.is_empty(),
        "node-taint" => !options.node_taint.is_empty(),
        "disable" => target.components.iter().all(|c| c.name != "traefik"),
        _ => false,
    };
    let is_list = matches!(name, "tls-san" | "node-label" | "node-taint" | "disable");
    if is_list {
        // before ours it is appended to
        return (file.after_ours && !appends && lists).then(|| {
            finding(Level::Warning, format!("`{name}` of a later file replaces what pipeops sets"))
                .fix(format!("write `{name}+:` there, so that the items are added"))
        });
    }
    let flag = owned_k3s_key(name)?;
    let unchanged = match name {
        "node-name" => text.to_ascii_lowercase() == target.settings.node_name(&facts.hostname),
        "secrets-encryption" => value == &serde_json::Value::Bool(true) || text == "true",
        "write-kubeconfig-mode" => matches!(text, "0600" | "600"),
        _ => false,
    };
    if unchanged {
        return None;
    }
    let fix = format!("take it out of {}; instead: {flag}", file.path);
    Some(if file.after_ours {
        finding(
            Level::Error,
            format!(
                "`{name}` of a later file overrules what pipeops sets, and later runs would not \
                 find the node"
            ),
        )
        .fix(fix)
    } else {
        let ours = DROP_IN.rsplit('/').next().unwrap_or_default();
        finding(
            Level::Warning,
            format!("`{name}` has no effect there: {ours} comes later and sets it"),
        )
        .fix(fix)
    })
}

pub(super) fn environment(facts: &Facts, _: &InstallTarget<'_>) -> Vec<Finding> {
    if facts.k3s.environment.is_empty() {
        return Vec::new();
    }
    vec![
        Finding::new(
            "K3S_ENVIRONMENT",
            Level::Info,
            "variables of k3s are set here and have no effect: systemd starts it without them",
            facts.k3s.environment.join(", "),
        )
        .fix("put the setting of the same name into the [k3s] table of /etc/pipeops/config.toml"),
    ]
}
