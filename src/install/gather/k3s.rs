//! What of k3s is on the machine: version, files, settings beside ours, other Kubernetes software.

use std::collections::BTreeMap;

use super::TIMEOUT;
use crate::host::Host;
use crate::host::paths::DROP_IN;
use crate::install::effective_settings::{EffectiveSettings, flag_of_variable, read_file};
use crate::install::facts::{K3s, SettingsFile, parse};
use crate::k3s::paths::{BINARY, NODE_PASSWORD};
use crate::k3s::role::NodeRole;

/// The port of supervisor and API that k3s on this machine is set to, by whichever file; 6443 by
/// default.
pub fn api_port(host: &Host) -> u16 {
    let path = DROP_IN;
    let entries =
        host.read(path).ok().flatten().and_then(|text| read_file(&text).ok()).unwrap_or_default();
    let our_file = SettingsFile { path: path.into(), entries, ..SettingsFile::default() };
    EffectiveSettings::on_machine(&settings_files(host, None), &our_file).api_port()
}

/// What k3s reads beside our own file, in its order: variables of the unit, `config.yaml`,
/// `config.yaml.d` by name.
fn settings_files(host: &Host, installed_role: Option<NodeRole>) -> Vec<SettingsFile> {
    let unit = installed_role.unwrap_or(NodeRole::Server).unit();
    let variables = format!("/etc/systemd/system/{unit}.env");
    let text = host.text(&variables);
    let entries: Vec<(String, serde_json::Value)> = [
        "K3S_DATA_DIR",
        "K3S_NODE_NAME",
        "K3S_RESOLV_CONF",
        "K3S_LB_SERVER_PORT",
        "K3S_SUPERVISOR_PORT",
        "K3S_APISERVER_PORT",
        "K3S_CLUSTER_INIT",
        "K3S_KUBECONFIG_MODE",
    ]
    .into_iter()
    .filter_map(|name| {
        Some((flag_of_variable(name)?.to_owned(), parse::shell_variable(&text, name)?.into()))
    })
    .collect();
    let mut found = Vec::new();
    if !entries.is_empty() {
        found.push(SettingsFile { path: variables, entries, ..SettingsFile::default() });
    }
    let dir = "/etc/rancher/k3s/config.yaml.d";
    let own = DROP_IN.rsplit('/').next().unwrap_or_default().to_owned();
    let mut paths = vec![("/etc/rancher/k3s/config.yaml".to_owned(), false)];
    paths.extend(
        host.list(dir).into_iter().filter(|n| *n != own).map(|n| (format!("{dir}/{n}"), n > own)),
    );
    for (path, after_ours) in paths {
        let lower = path.to_ascii_lowercase();
        if !(lower.ends_with(".yaml") || lower.ends_with(".yml")) || host.is_dir(&path) {
            continue;
        }
        let read = match host.read(&path) {
            Ok(None) => continue,
            Ok(Some(text)) => read_file(&text),
            // unreadable: NOT_ROOT says so
            Err(_) => continue,
        };
        let (entries, fault) = match read {
            Ok(entries) => (entries, None),
            Err(why) => (Vec::new(), Some(why)),
        };
        found.push(SettingsFile { path, after_ours, entries, fault });
    }
    found
}

pub(super) async fn facts(
    host: &Host,
    installed_role: Option<NodeRole>,
    env: &BTreeMap<String, String>,
) -> K3s {
    let version = match host.which("k3s").is_some() && host.exists(BINARY) {
        true => host
            .output("k3s", &["--version"], TIMEOUT)
            .await
            .ok()
            .and_then(|o| o.stdout.split_whitespace().nth(2).map(str::to_owned)),
        false => None,
    };
    let mut foreign = Vec::new();
    if installed_role.is_none() {
        for path in [
            BINARY,
            "/usr/bin/k3s",
            "/opt/bin/k3s",
            "/usr/local/bin/k3s-uninstall.sh",
            "/usr/local/bin/k3s-agent-uninstall.sh",
        ] {
            if host.exists(path) {
                foreign.push(format!("{path} exists"));
            }
        }
        for dir in ["/etc/systemd/system", "/usr/lib/systemd/system", "/lib/systemd/system"] {
            foreign.extend(
                host.list(dir)
                    .iter()
                    .filter(|n| n.starts_with("k3s") && n.ends_with(".service"))
                    .map(|n| format!("unit {n}")),
            );
        }
        foreign.dedup();
        if foreign.is_empty() && host.exists("/etc/rancher/k3s/config.yaml") {
            foreign.push("/etc/rancher/k3s/config.yaml exists".into());
        }
    }
    let unit = installed_role.unwrap_or(NodeRole::Server).unit();
    K3s {
        version,
        // on its way up or down counts: the ports are its own then too
        active: installed_role.is_some()
            && host
                .unit(unit)
                .await
                .is_ok_and(|u| !matches!(u.active.as_str(), "inactive" | "failed" | "")),
        foreign,
        installed_role,
        server_data: host.exists("/var/lib/rancher/k3s/server/db"),
        server_token: host.exists("/var/lib/rancher/k3s/server/token"),
        token_differs: false,
        node_password: host.exists(NODE_PASSWORD),
        files: settings_files(host, installed_role),
        environment: env
            .iter()
            .filter(|(name, value)| !value.is_empty() && flag_of_variable(name).is_some())
            .map(|(n, _)| n.clone())
            .collect(),
    }
}

/// Other Kubernetes distributions on the machine.
pub(super) fn other_kubernetes(host: &Host) -> Vec<String> {
    [
        ("/etc/kubernetes/kubelet.conf", "kubeadm"),
        ("/var/snap/microk8s", "microk8s"),
        ("/etc/k0s", "k0s"),
        ("/etc/rancher/rke2", "rke2"),
        ("/etc/systemd/system/kubelet.service", "a kubelet of its own"),
    ]
    .iter()
    .filter(|(path, _)| host.exists(path))
    .map(|(path, name)| format!("{name} ({path})"))
    .collect()
}
