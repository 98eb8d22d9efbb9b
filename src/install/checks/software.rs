//! Rules about what is installed already: k3s, other Kubernetes, SELinux, iptables, certificates.

use super::InstallTarget;
use crate::host::paths::AGENT_USER;
use crate::install::effective_settings::EffectiveSettings;
use crate::install::facts::{Facts, iptables_is_faulty};
use crate::install::finding::{Finding, Level};
use crate::k3s::role::NodeRole;
use crate::k3s::version::{OLDEST_MINOR, Version};
use crate::kubernetes::tenant;

pub(super) fn foreign(facts: &Facts, target: &InstallTarget<'_>) -> Vec<Finding> {
    if let Some(role) = facts.k3s.installed_role.filter(|role| *role != target.settings.role) {
        let is = if role == NodeRole::Server { "server" } else { "worker" };
        return vec![
            Finding::new(
                "K3S_FOREIGN",
                Level::Error,
                format!("this machine is a k3s {is} already"),
                "our journal records it",
            )
            .fix("`pipeops uninstall` first, then run this again"),
        ];
    }
    if facts.k3s.installed_role.is_some() || facts.k3s.foreign.is_empty() {
        return Vec::new();
    }
    if facts.k3s.foreign.iter().all(|f| f.starts_with("/etc/rancher/k3s/config.yaml ")) {
        // written before there is a k3s, by cloud-init or by hand
        let to = "/etc/rancher/k3s/config.yaml.d/10-mine.yaml";
        return vec![
            Finding::new(
                "K3S_FOREIGN",
                Level::Error,
                "there are settings for a k3s here, but no k3s",
                facts.k3s.foreign.join("; "),
            )
            .fix(format!(
                "to keep them: mkdir -p /etc/rancher/k3s/config.yaml.d && mv \
                 /etc/rancher/k3s/config.yaml {to}; pipeops and k3s read them there"
            ))
            .fix("or remove the file; then run again"),
        ];
    }
    vec![
        Finding::new(
            "K3S_FOREIGN",
            Level::Error,
            "there is a k3s here that pipeops did not install",
            facts.k3s.foreign.join("; "),
        )
        .fix(
            "pipeops never changes it. To start over, remove it with its own k3s-uninstall.sh or \
             k3s-agent-uninstall.sh, then run again",
        ),
    ]
}

pub(super) fn too_old(_: &Facts, target: &InstallTarget<'_>) -> Vec<Finding> {
    let Some(version) = target.version.filter(|v| v.is_too_old()) else { return Vec::new() };
    vec![
        Finding::new(
            "K3S_TOO_OLD",
            Level::Error,
            format!("{version} is too old"),
            format!("the oldest supported line is v1.{OLDEST_MINOR}"),
        )
        .fix("choose a newer version with --k3s-version or --channel"),
    ]
}

pub(super) fn no_tenants(_: &Facts, target: &InstallTarget<'_>) -> Vec<Finding> {
    let old = |version: &&Version| !tenant::is_supported(&version.to_string());
    let Some(version) = target.version.filter(|v| target.server() && old(v)) else {
        return Vec::new();
    };
    vec![
        Finding::new(
            "TENANTS_NEED_1_30",
            Level::Info,
            format!("{version} has no tenants"),
            format!("what keeps them apart is there from v1.{} on", tenant::MIN_MINOR),
        )
        .fix("for a place for each customer, choose a newer version with --k3s-version"),
    ]
}

pub(super) fn downgrade(facts: &Facts, target: &InstallTarget<'_>) -> Vec<Finding> {
    let Some(have) = facts
        .k3s
        .version
        .as_deref()
        .and_then(|v| v.parse::<Version>().ok())
        .filter(|_| facts.k3s.installed_role.is_some())
    else {
        return Vec::new();
    };
    let Some(version) = target.version.filter(|v| **v < have) else { return Vec::new() };
    vec![
        Finding::new(
            "K3S_DOWNGRADE",
            Level::Error,
            "going back to an older k3s is not possible in place",
            format!("installed {have}, asked for {version}"),
        )
        .fix(format!("keep it with --k3s-version {have}, or uninstall first")),
    ]
}

pub(super) fn token_conflict(facts: &Facts, target: &InstallTarget<'_>) -> Vec<Finding> {
    if !target.server() || facts.k3s.installed_role.is_some() || !facts.k3s.server_data {
        return Vec::new();
    }
    let evidence = match (facts.k3s.token_differs, facts.k3s.server_token) {
        (true, _) => "the token given is not the one in /var/lib/rancher/k3s/server/token",
        (false, false) => "/var/lib/rancher/k3s/server/db is there, but its token is gone",
        (false, true) => return Vec::new(),
    };
    vec![
        Finding::new(
            "DATA_TOKEN_CONFLICT",
            Level::Error,
            "the data of a former cluster is here and cannot be opened",
            evidence,
        )
        .fix(
            "restore its token to /var/lib/rancher/k3s/server/token, or move the data away: mv \
             /var/lib/rancher/k3s /var/lib/rancher/k3s.old",
        ),
    ]
}

pub(super) fn other_kubernetes(facts: &Facts, _: &InstallTarget<'_>) -> Vec<Finding> {
    if facts.other_kubernetes.is_empty() {
        return Vec::new();
    }
    vec![
        Finding::new(
            "OTHER_KUBERNETES",
            Level::Error,
            "another Kubernetes lives here",
            facts.other_kubernetes.join("; "),
        )
        .fix("use a machine of its own, or remove the other one first"),
    ]
}

pub(super) fn selinux(facts: &Facts, _: &InstallTarget<'_>) -> Vec<Finding> {
    if facts.selinux.mode != "enforcing" || facts.selinux.k3s_policy {
        return Vec::new();
    }
    vec![
        Finding::new(
            "SELINUX_POLICY",
            Level::Error,
            "SELinux is enforcing and the policy for k3s is missing",
            "no module k3s under /var/lib/selinux or /usr/share/selinux",
        )
        .fix(
            "dnf install container-selinux and k3s-selinux (https://rpm.rancher.io), then run \
             again",
        ),
    ]
}

pub(super) fn iptables(facts: &Facts, _: &InstallTarget<'_>) -> Vec<Finding> {
    let Some(tool) = facts.iptables.as_ref().filter(|_| iptables_is_faulty(facts)) else {
        return Vec::new();
    };
    vec![
        Finding::new(
            "IPTABLES_BAD",
            Level::Warning,
            "this iptables version duplicates rules",
            format!("iptables {} ({})", tool.version, tool.backend),
        )
        .fix("nothing to do: k3s is configured to use its own (prefer-bundled-bin)"),
    ]
}

pub(super) fn tools(facts: &Facts, target: &InstallTarget<'_>) -> Vec<Finding> {
    let options = &target.settings.options;
    let effective = EffectiveSettings::planned(facts, target.settings);
    let firewall = !options.api_allow.is_empty();
    let agent =
        target.server() && facts.account.user.is_none() && facts.k3s.installed_role.is_none();
    let fuse = effective.bundled_containerd() && effective.snapshotter() == "fuse-overlayfs";
    let red_hat = ["rhel", "fedora", "centos", "rocky", "almalinux", "ol", "amzn"]
        .iter()
        .any(|id| facts.os.id == *id || facts.os.id_like.contains(id));
    let iproute = if red_hat { "iproute" } else { "iproute2" };
    let expected = [
        ("modprobe", true, "kmod"),
        ("mount", true, "mount"),
        ("umount", true, "mount"),
        ("nft", firewall, "nftables"),
        ("apparmor_parser", facts.apparmor && effective.bundled_containerd(), "apparmor"),
        ("useradd", agent, if red_hat { "shadow-utils" } else { "passwd" }),
        ("fuse-overlayfs", fuse, "fuse-overlayfs"),
    ];
    let missing: Vec<_> = expected
        .iter()
        .filter(|(name, needed, _)| *needed && !facts.programs.contains_key(*name))
        .collect();
    let mut evidence: Vec<String> = Vec::new();
    let mut packages: Vec<&str> = missing.iter().map(|m| m.2).collect();
    if !missing.is_empty() {
        evidence.push(format!(
            "not found: {}",
            missing.iter().map(|m| m.0).collect::<Vec<_>>().join(", ")
        ));
    }
    if let Some(fault) = &facts.ip_fault {
        evidence.push(format!(
            "{fault}; addresses and routes are read by `ip -j`, of iproute2 4.17 or newer"
        ));
        packages.push(iproute);
    }
    if evidence.is_empty() {
        return Vec::new();
    }
    packages.dedup();
    let mut finding = Finding::new(
        "TOOL_MISSING",
        Level::Error,
        "programs that the node needs are missing",
        evidence.join("; "),
    );
    if missing.iter().any(|m| m.0 == "apparmor_parser") {
        finding =
            finding.fix("AppArmor is on in the kernel: without its parser no container starts");
    }
    vec![finding.fix(format!("install them (packages {}), then run again", packages.join(", ")))]
}

/// The agent's user or group belongs to something else, so that the agent would run with its rights
/// or not at all.
pub(super) fn account(facts: &Facts, target: &InstallTarget<'_>) -> Vec<Finding> {
    // what an earlier run made is as it should be
    if !target.server() || facts.k3s.installed_role.is_some() {
        return Vec::new();
    }
    let (mut level, mut evidence) = (Level::Warning, Vec::new());
    if let Some(user) = &facts.account.user {
        if user.uid == 0 {
            level = Level::Error;
            evidence.push("its number is 0: it is root".to_owned());
        }
        if user.from_directory {
            level = Level::Error;
            evidence.push(
                "a directory such as LDAP has it, and the agent reads /etc/passwd alone".to_owned(),
            );
        }
        let shell = user.shell.rsplit('/').next().unwrap_or_default();
        if !matches!(shell, "nologin" | "false" | "sync") {
            evidence.push(format!(
                "it can log in ({})",
                if user.shell.is_empty() { "the default shell" } else { &user.shell }
            ));
        }
        if facts.account.gid.is_some_and(|gid| gid != user.gid) {
            evidence.push(format!("its group is {}, not the one of the same name", user.gid));
        }
    }
    if facts.account.gid == Some(0) {
        level = Level::Error;
        evidence.push("the group of that name has the number 0".to_owned());
    }
    if evidence.is_empty() {
        return Vec::new();
    }
    vec![
        Finding::new(
            "ACCOUNT_CONFLICT",
            level,
            format!("the account {AGENT_USER} is there already and is not made for a service"),
            evidence.join("; "),
        )
        .fix(format!(
            "remove or rename it (`userdel {AGENT_USER}`); pipeops makes one without a shell. What \
             stays is used as it is"
        )),
    ]
}

pub(super) fn trust_store(facts: &Facts, target: &InstallTarget<'_>) -> Vec<Finding> {
    if facts.trust_store || target.settings.options.offline_dir.is_some() {
        return Vec::new();
    }
    vec![
        Finding::new(
            "TRUST_STORE_MISSING",
            Level::Error,
            "there are no root certificates, so no download can be trusted",
            "no CA bundle in /etc/ssl or /etc/pki",
        )
        .fix("install the package ca-certificates, then run again"),
    ]
}

pub(super) fn retired_ingress(facts: &Facts, _: &InstallTarget<'_>) -> Vec<Finding> {
    let Some(annotated) = facts.retired_ingress else { return Vec::new() };
    vec![
        Finding::new(
            "INGRESS_NGINX_RETIRED",
            Level::Warning,
            "the cluster runs the community's ingress-nginx, retired in March 2026",
            format!("{annotated} ingresses use its nginx.ingress.kubernetes.io annotations"),
        )
        .fix("move to the F5 controller (--components ingress); its annotations are nginx.org/*"),
    ]
}

pub(super) fn traefik_goes(facts: &Facts, target: &InstallTarget<'_>) -> Vec<Finding> {
    if !facts.bundled_traefik
        || !target.server()
        || target.components.iter().any(|c| c.name == "traefik")
    {
        return Vec::new();
    }
    vec![
        Finding::new(
            "TRAEFIK_GOES",
            Level::Warning,
            "k3s' own traefik runs here and will be removed: it is off unless asked for",
            "HelmChart kube-system/traefik; ingresses of the class traefik will get no answer",
        )
        .fix("keep it with --components LIST,traefik (instead of ingress)"),
    ]
}
