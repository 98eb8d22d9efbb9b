//! The text of what we write for k3s: settings drop-in, units, firewall table, the agent's
//! settings.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde_json::{Value, json};

use crate::base::http::credential_free_proxy;
use crate::base::order;
use crate::contract::tenant::{TENANT_DEPLOYER, TENANT_VIEWER};
use crate::contract::token::Role;
use crate::host::paths::{AGENT_SOCKET, CREDENTIAL};
use crate::install::components::Component;
use crate::install::effective_settings::EffectiveSettings;
use crate::install::facts::{Facts, iptables_is_faulty};
use crate::install::network;
use crate::install::settings::Settings;
use crate::k3s::role::NodeRole;
use crate::k3s::version::Version;

const HEADER: &str = "# Written by pipeops; change it by running pipeops again. Further settings \
                      go into files of other names beside it.\n";

/// A worker's server.
pub struct JoinServer {
    pub url: String,
}

/// Settings of both roles.
fn common(facts: &Facts, settings: &Settings, version: &Version) -> BTreeMap<String, Value> {
    let options = &settings.options;
    let mut map = BTreeMap::new();
    map.insert("node-name".into(), json!(settings.node_name(&facts.hostname)));
    let addresses: Vec<String> =
        network::node_addresses(facts, settings).iter().map(ToString::to_string).collect();
    if !addresses.is_empty() {
        map.insert("node-ip".into(), json!(addresses.join(",")));
    }
    if let Some(interface) = network::flannel_iface(facts, settings) {
        map.insert("flannel-iface".into(), json!(interface));
    }
    for (key, list) in [("node-label", &options.node_label), ("node-taint", &options.node_taint)] {
        if !list.is_empty() {
            map.insert(key.into(), json!(list));
        }
    }
    if iptables_is_faulty(facts) {
        map.insert("prefer-bundled-bin".into(), json!(true));
    }
    let mut kubelet = Vec::new();
    if facts.cgroup.version == 1 && version.minor >= 35 {
        // only reached when CGROUP_V1_UNSUPPORTED was ignored
        kubelet.push("fail-cgroupv1=false".to_owned());
    }
    if facts.container.as_deref() == Some("lxc") {
        kubelet.push("feature-gates=KubeletInUserNamespace=true".to_owned());
    }
    if !kubelet.is_empty() {
        map.insert("kubelet-arg".into(), json!(kubelet));
    }
    map
}

/// Adds the `[k3s]` table, with holes for its secrets: lists of the same key are joined, for
/// everything else the user's value wins.
fn pass_through(map: &mut BTreeMap<String, Value>, table: &BTreeMap<String, Value>) {
    for (key, value) in table {
        match (map.get_mut(key), value) {
            (Some(Value::Array(ours)), Value::Array(theirs)) => {
                for item in theirs {
                    if !ours.contains(item) {
                        ours.push(item.clone());
                    }
                }
            }
            (Some(Value::Array(ours)), Value::String(one)) => {
                ours.extend(one.split(',').map(|s| json!(s.trim())))
            }
            _ => {
                map.insert(key.clone(), value.clone());
            }
        }
    }
}

/// A list that a file before ours has too is appended to it: a plain key would silently drop the
/// user's items.
fn join_lists(map: &mut BTreeMap<String, Value>, facts: &Facts) {
    let before = facts
        .k3s
        .files
        .iter()
        .filter(|f| !f.after_ours)
        .flat_map(|f| &f.entries)
        .map(|(key, _)| key.trim_end_matches('+'));
    let known = order::set(before);
    let lists: Vec<String> = map
        .iter()
        .filter(|(key, value)| value.is_array() && known.contains(key.as_str()))
        .map(|(key, _)| key.clone())
        .collect();
    for key in lists {
        if let Some(value) = map.remove(&key) {
            map.insert(format!("{key}+"), value);
        }
    }
}

/// JSON scalars and lists are YAML; one line a value keeps diffs readable.
fn yaml(map: &BTreeMap<String, Value>) -> String {
    let mut text = HEADER.to_owned();
    for (key, value) in map {
        match value {
            Value::Array(items) => {
                let _ = writeln!(text, "{key}:");
                for item in items {
                    let _ = writeln!(text, "  - {item}");
                }
            }
            scalar => {
                let _ = writeln!(text, "{key}: {scalar}");
            }
        }
    }
    text
}

/// `50-pipeops.yaml` of a server.
pub fn server_drop_in(
    facts: &Facts,
    settings: &Settings,
    version: &Version,
    components: &[&'static Component],
) -> String {
    let mut map = common(facts, settings, version);
    map.insert("write-kubeconfig-mode".into(), json!("0600"));
    map.insert("secrets-encryption".into(), json!(true));
    // k3s would bring it unasked, and it opens ports 80 and 443
    if !components.iter().any(|c| c.name == "traefik") {
        map.insert("disable".into(), json!(["traefik"]));
    }
    let mut sans = settings.options.tls_san.clone();
    sans.extend(network::node_addresses(facts, settings).iter().map(ToString::to_string));
    sans.sort();
    sans.dedup();
    map.insert("tls-san".into(), json!(sans));
    if network::needs_wireguard(facts, settings) {
        map.insert("flannel-backend".into(), json!("wireguard-native"));
    }
    pass_through(&mut map, &settings.options.k3s.with_placeholders());
    join_lists(&mut map, facts);
    yaml(&map)
}

/// `50-pipeops.yaml` of a worker. Server-only settings stop an agent at once, so none is ever
/// written here.
pub fn worker_drop_in(
    facts: &Facts,
    settings: &Settings,
    version: &Version,
    server: &JoinServer,
) -> String {
    let mut map = common(facts, settings, version);
    map.insert("server".into(), json!(server.url));
    map.insert("token-file".into(), json!(crate::host::paths::JOIN_TOKEN));
    pass_through(&mut map, &settings.options.k3s.with_placeholders());
    join_lists(&mut map, facts);
    yaml(&map)
}

/// Deployments that k3s itself brings, less what the user disabled.
pub fn system_deployments(facts: &Facts, settings: &Settings) -> Vec<String> {
    let disabled = EffectiveSettings::planned(facts, settings).list("disable");
    [
        ("coredns", "coredns"),
        ("local-path-provisioner", "local-storage"),
        ("metrics-server", "metrics-server"),
    ]
    .into_iter()
    .filter(|(_, switch)| !disabled.iter().any(|d| d == switch))
    .map(|(name, _)| name.to_owned())
    .collect()
}

/// What k3s and its pods fill, directories for the most part. `/var/lib/rancher/k3s/storage` inside
/// them holds volumes.
pub fn state_dirs(role: NodeRole) -> Vec<String> {
    let mut dirs = vec![
        "/run/k3s",
        "/run/flannel",
        "/var/lib/cni",
        "/var/lib/kubelet",
        "/var/log/pods",
        "/var/log/containers",
        "/etc/cni/net.d",
        "/etc/cni",
        "/usr/libexec/kubernetes",
        "/var/lib/rancher/k3s",
        "/var/lib/rancher",
        // not the directory: the user's own settings may lie beside it
        "/etc/rancher/k3s/k3s.yaml",
        "/etc/rancher/node",
        "/run/containerd",
        "/run/nri",
        "/run/netns",
    ];
    if role == NodeRole::Server {
        dirs.extend(["/run/pipeops-credential", "/run/pipeops", "/var/lib/pipeops-agent"]);
    }
    dirs.into_iter().map(str::to_owned).collect()
}

/// The unit of k3s; `systemd/` holds the templates. The firewall table is loaded before anything
/// listens, or k3s stays down.
pub fn k3s_unit(settings: &Settings) -> String {
    let template = match settings.role {
        NodeRole::Server => include_str!("../../../systemd/k3s.service"),
        NodeRole::Worker => include_str!("../../../systemd/k3s-agent.service"),
    };
    let firewall = if settings.options.api_allow.is_empty() {
        String::new()
    } else {
        format!("ExecStartPre=nft -f {}\n", crate::host::paths::FIREWALL)
    };
    template.replace("# FIREWALL\n", &firewall)
}

/// An nftables table of our own: everything that is not loopback, pods, an answer, ICMP, 80, 443 or
/// an allowed network is dropped. Only ports of k3s are closed, so that ssh stays reachable.
pub fn firewall_rules(allow: &[String], settings: &Settings, facts: &Facts) -> String {
    let mut text = format!(
        "# Written by pipeops (--api-allow). A table of its own: other tables are not touched.\n\
         table inet {t} {{}}\ndelete table inet {t}\ntable inet {t} {{\n  chain input {{\n    type filter hook input priority -10; policy accept;\n    \
         iif \"lo\" accept\n    ct state established,related accept\n    iifname {{ \"cni0\", \"flannel*\", \"veth*\" }} accept\n",
        t = crate::host::paths::FIREWALL_TABLE
    );
    let ranges = network::ranges(facts, settings)
        .into_iter()
        .map(|(_, r)| format!("{}/{}", r.address, r.prefix));
    let own = network::node_addresses(facts, settings).into_iter().map(|a| a.to_string());
    let api = EffectiveSettings::planned(facts, settings).api_port();
    let api =
        if api == 6443 { String::new() } else { format!("{api}, {}, ", api.saturating_add(1)) };
    for source in ranges.chain(own).chain(allow.iter().cloned()) {
        let family = if source.contains(':') { "ip6" } else { "ip" };
        let _ = writeln!(text, "    {family} saddr {source} accept");
    }
    let _ = writeln!(
        text,
        "    tcp dport {{ {api}6443, 6444, 10250, 10256, 2379-2381, 5001, 30000-32767 }} drop"
    );
    text.push_str("    udp dport { 8472, 51820, 51821, 30000-32767 } drop\n  }\n}\n");
    text
}

/// The environment of k3s behind a proxy: the user's variables, with `NO_PROXY` completed.
pub fn proxy_environment(facts: &Facts, settings: &Settings) -> String {
    let mut text = String::new();
    for (key, value) in facts.proxy.iter().filter(|(key, _)| *key != "NO_PROXY") {
        let _ = writeln!(text, "{key}={value}");
    }
    let given = facts.proxy.get("NO_PROXY").cloned().unwrap_or_default();
    let mut list: Vec<String> =
        given.split(',').map(|s| s.trim().to_owned()).filter(|s| !s.is_empty()).collect();
    for entry in network::no_proxy(facts, settings) {
        if !list.contains(&entry) {
            list.push(entry);
        }
    }
    let _ = writeln!(text, "NO_PROXY={}", list.join(","));
    text
}

/// `/etc/pipeops/agent.toml`: what `pipeops run` needs to know; free of secrets.
pub fn agent_toml(facts: &Facts, settings: &Settings) -> String {
    let options = &settings.options;
    let mut text = String::from("# Written by pipeops install-server; read by pipeops run.\n");
    let _ = writeln!(text, "control-plane-url = {}", json!(settings.control_plane_url));
    if !options.control_plane_pin.is_empty() {
        let _ = writeln!(text, "control-plane-pin = {}", json!(options.control_plane_pin));
    }
    if let Some(name) = &options.cluster_name {
        let _ = writeln!(text, "cluster-name = {}", json!(name));
    }
    if !options.cluster_label.is_empty() {
        let _ = writeln!(text, "cluster-labels = {}", json!(options.cluster_label));
    }
    if let Some(proxy) = settings
        .control_plane_host()
        .and_then(|host| network::https_proxy(facts, &host))
        .and_then(credential_free_proxy)
    {
        let _ = writeln!(text, "https-proxy = {}", json!(proxy));
    }
    let _ = writeln!(text, "max-role = {}", json!(settings.max_role.name()));
    let _ = writeln!(text, "kubeconfig = {}", json!(CREDENTIAL));
    let _ = writeln!(text, "socket = {}", json!(AGENT_SOCKET));
    text
}

/// The rights of the agent, and of each role up to `max_role`.
pub fn rbac(max_role: Role, tenants: bool) -> String {
    let mut text = include_str!("../../../deployments/rbac.yaml").to_owned();
    text.push_str("\n---\n");
    text.push_str(&impersonation_rbac(max_role, tenants));
    if max_role == Role::Admin {
        text.push_str("\n---\n");
        text.push_str(include_str!("../../../deployments/rbac-admin.yaml"));
    }
    text
}

/// The right to impersonate exactly the groups up to `max_role`, where the cluster has tenants also
/// their ServiceAccounts of these roles, and nobody else.
fn impersonation_rbac(max_role: Role, tenants: bool) -> String {
    let groups: Vec<String> = Role::ALL
        .into_iter()
        .filter(|r| *r <= max_role)
        .map(|r| format!("pipeops:{}", r.name()))
        .collect();
    let text = include_str!("../../../deployments/rbac-impersonate.yaml")
        .replace("[GROUPS]", &json!(groups).to_string());
    let mut accounts = vec![TENANT_VIEWER];
    if max_role >= Role::Deployer {
        accounts.push(TENANT_DEPLOYER);
    }
    match text.split_once("  # for callers of tenants\n") {
        // a rule without names would be about all of them
        Some((rest, _)) if !tenants => rest.to_owned(),
        _ => text.replace("[ACCOUNTS]", &json!(accounts).to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::install::plan::documents;

    #[test]
    fn the_users_lists_join_ours_and_his_scalars_win() {
        let mut map = BTreeMap::from([
            ("disable".to_owned(), json!(["traefik"])),
            ("flannel-backend".to_owned(), json!("vxlan")),
        ]);
        let table = BTreeMap::from([
            ("disable".to_owned(), json!(["servicelb", "traefik"])),
            ("flannel-backend".to_owned(), json!("host-gw")),
        ]);
        pass_through(&mut map, &table);
        assert_eq!(map["disable"], json!(["traefik", "servicelb"]));
        assert_eq!(map["flannel-backend"], "host-gw");
    }

    #[test]
    fn admin_may_be_impersonated_only_when_asked_for() {
        assert!(!impersonation_rbac(Role::Operator, true).contains("pipeops:admin"));
        assert!(impersonation_rbac(Role::Admin, true).contains("pipeops:admin"));
        assert!(!impersonation_rbac(Role::Viewer, true).contains("pipeops:deployer"));
    }

    #[test]
    fn what_keeps_tenants_apart_comes_before_the_rights_to_make_them() {
        use crate::kubernetes::tenant::POLICIES;
        let yaml = include_str!("../../../deployments/tenants.yaml");
        let all = documents(yaml).unwrap();
        let of = |kind: &str| -> Vec<&Value> { all.iter().filter(|o| o["kind"] == kind).collect() };
        let (policies, bindings) =
            (of("ValidatingAdmissionPolicy"), of("ValidatingAdmissionPolicyBinding"));
        assert_eq!((policies.len(), bindings.len()), (POLICIES.len(), POLICIES.len()));
        let group = "/apis/admissionregistration.k8s.io/v1";
        for (object, plural) in [
            (policies[0], "validatingadmissionpolicies"),
            (bindings[0], "validatingadmissionpolicybindings"),
        ] {
            let path = crate::kubernetes::client::path_of(object).unwrap();
            assert_eq!(path, format!("{group}/{plural}/{}", POLICIES[0]));
        }
        for ((name, policy), binding) in POLICIES.iter().zip(policies).zip(bindings) {
            assert_eq!(policy["metadata"]["name"], *name);
            assert_eq!(binding["metadata"]["name"], *name);
            assert_eq!(binding["spec"]["policyName"], *name);
            assert_eq!(binding["spec"]["validationActions"], json!(["Deny"]));
            assert_eq!(policy["spec"]["failurePolicy"], "Fail");
        }
        let right = all.iter().position(|o| o["kind"] == "ClusterRoleBinding").unwrap();
        assert_eq!(right, all.len() - 1);
        let last = all.iter().rposition(|o| o["apiVersion"] == "admissionregistration.k8s.io/v1");
        assert_eq!(last, Some(2 * POLICIES.len() - 1));
        let agent = all.iter().find(|o| o["metadata"]["name"] == "pipeops:tenants").unwrap();
        let read = agent["rules"].as_array().unwrap().last().unwrap();
        assert_eq!(read["resourceNames"], json!(POLICIES));
        // nobody gets all of anything
        assert!(!serde_json::to_string(&of("ClusterRole")).unwrap().contains("\"*\""));
    }

    #[test]
    fn a_rule_of_impersonation_names_whom_it_is_about() {
        for role in Role::ALL {
            for tenants in [false, true] {
                let yaml = impersonation_rbac(role, tenants);
                let role_object = documents(&yaml).unwrap().remove(0);
                let rules = role_object["rules"].as_array().unwrap();
                let about = |resource: &str| {
                    let named = rules.iter().find(|rule| rule["resources"][0] == resource);
                    named.map_or(json!([]), |rule| rule["resourceNames"].clone())
                };
                assert_eq!(about("users"), json!(["pipeops:runner"]));
                let accounts = match (tenants, role) {
                    (false, _) => json!([]),
                    (true, Role::Viewer) => json!([TENANT_VIEWER]),
                    (true, _) => json!([TENANT_VIEWER, TENANT_DEPLOYER]),
                };
                assert_eq!(about("serviceaccounts"), accounts, "{role:?}");
                assert_eq!(rules.len(), if tenants { 4 } else { 3 });
            }
        }
    }
}
