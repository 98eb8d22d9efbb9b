//! Rules about settings of k3s: those that this line does not know, and those that it takes in
//! another way than they look.

use super::InstallTarget;
use crate::install::facts::Facts;
use crate::install::finding::{Finding, Level};
use crate::k3s::{keys, values};

/// A node keeps the name that it was installed with: under another one it would be a second Node,
/// and the first one an orphan.
pub(super) fn renamed(facts: &Facts, target: &InstallTarget<'_>) -> Vec<Finding> {
    let Some(now) = &facts.current_hostname else { return Vec::new() };
    let node = &facts.hostname;
    let requested = target.settings.node_name(node);
    if requested == *node {
        let what = format!("this machine is called {now} now; its node stays {node}");
        let finding =
            Finding::new("NODE_RENAMED", Level::Info, what, format!("it was installed as {node}"));
        return vec![
            finding
                .fix("nothing to do; for the new name: uninstall, delete the Node, install again"),
        ];
    }
    vec![
        Finding::new(
            "NODE_RENAMED",
            Level::Error,
            format!(
                "this machine is the node {node} of its cluster, and --node-name wants {requested}"
            ),
            format!(
                "a second Node would come, and {node} with its volumes and certificates would be \
                 left behind"
            ),
        )
        .fix(format!(
            "leave --node-name out; or `pipeops uninstall`, `kubectl delete node {node}`, and \
             install again"
        )),
    ]
}

pub(super) fn unknown(_: &Facts, target: &InstallTarget<'_>) -> Vec<Finding> {
    let table = &target.settings.options.k3s;
    keys::unknown_keys(table.keys().map(String::as_str), target.settings.role, target.version)
        .into_iter()
        .map(|key| {
            let level = if key.uncertain { Level::Warning } else { Level::Error };
            Finding::new(
                "K3S_SETTING_UNKNOWN",
                level,
                format!("k3s does not know the setting `{}`", key.key),
                key.why,
            )
            .fix(key.fix)
        })
        .collect()
}

pub(super) fn odd(_: &Facts, target: &InstallTarget<'_>) -> Vec<Finding> {
    let stars =
        target.settings.options.tls_san.iter().filter(|name| name.starts_with("*.")).map(|name| {
            Finding::new(
                "K3S_SETTING_ODD",
                Level::Warning,
                format!("--tls-san {name} has no effect"),
                "k3s leaves names with a `*` out of its certificate, with one line in its log",
            )
            .fix("give the names themselves")
        });
    let ranges = values::ranges_with_host_bits(&target.settings.options.k3s).into_iter().map(
        |(key, given, taken)| {
            let what = format!("[k3s] {key}: {given} has bits beyond its length");
            Finding::new(
                "K3S_SETTING_ODD",
                Level::Warning,
                what,
                format!("k3s takes it as {taken}"),
            )
            .fix(format!("write {taken}, if that is meant"))
        },
    );
    stars.chain(ranges).collect()
}
