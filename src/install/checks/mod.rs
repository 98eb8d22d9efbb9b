//! Facts in, findings out: the rules of preflight, each a pure function with a stable code.

mod config_files;
mod dns;
mod machine;
mod network;
mod ports;
mod ranges;
mod secrets;
mod settings;
mod software;
mod storage;

use crate::install::components::Component;
use crate::install::facts::Facts;
use crate::install::finding::{Finding, Level};
use crate::install::settings::Settings;
use crate::k3s::role::NodeRole;
use crate::k3s::version::Version;

/// What is to be put on the machine that the facts describe.
pub struct InstallTarget<'a> {
    pub settings: &'a Settings,
    /// `None` while it is not known yet: rules about versions then say nothing.
    pub version: Option<&'a Version>,
    /// Components that will run, with their memory; empty on a worker.
    pub components: &'a [&'static Component],
}

impl InstallTarget<'_> {
    fn server(&self) -> bool {
        self.settings.role == NodeRole::Server
    }

    /// Whether a component answers on ports 80 and 443.
    fn ingress(&self) -> bool {
        crate::install::components::ingress_class(self.components).is_some()
    }
}

/// Whether `--ignore` may turn the error into a warning.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Ignore {
    Allowed,
    Never,
}

type Rule = fn(&Facts, &InstallTarget<'_>) -> Vec<Finding>;

/// Every code, in the order of output. A code that the join adds over the wire is a `Failure`, not
/// a row here.
const RULES: &[(&str, Ignore, Rule)] = &[
    ("NOT_ROOT", Ignore::Never, machine::not_root),
    ("NO_SYSTEMD", Ignore::Never, machine::no_systemd),
    ("ARCH_UNSUPPORTED", Ignore::Never, machine::arch),
    ("K3S_FOREIGN", Ignore::Never, software::foreign),
    ("K3S_CONFIG_INVALID", Ignore::Allowed, config_files::unreadable),
    ("K3S_CONFIG_CLASH", Ignore::Allowed, config_files::clash),
    ("K3S_ENVIRONMENT", Ignore::Allowed, config_files::environment),
    ("K3S_TOO_OLD", Ignore::Allowed, software::too_old),
    ("TENANTS_NEED_1_30", Ignore::Allowed, software::no_tenants),
    ("K3S_DOWNGRADE", Ignore::Never, software::downgrade),
    ("DATA_TOKEN_CONFLICT", Ignore::Never, software::token_conflict),
    ("OTHER_KUBERNETES", Ignore::Allowed, software::other_kubernetes),
    ("CPU_LOW", Ignore::Allowed, machine::cpu),
    ("MEMORY_LOW", Ignore::Allowed, machine::memory),
    ("COMPONENTS_DO_NOT_FIT", Ignore::Allowed, machine::components_fit),
    ("SWAP_ON", Ignore::Allowed, machine::swap),
    ("MOUNT_READ_ONLY", Ignore::Allowed, storage::read_only),
    ("MOUNT_NOEXEC", Ignore::Allowed, storage::no_exec),
    ("SNAPSHOTTER_UNFIT", Ignore::Allowed, storage::snapshotter),
    ("DISK_LOW", Ignore::Allowed, machine::disk),
    ("INODES_LOW", Ignore::Allowed, machine::inodes),
    ("DISK_FSYNC_SLOW", Ignore::Allowed, machine::fsync),
    ("CLOCK_SKEW", Ignore::Allowed, machine::clock),
    ("CGROUP_CONTROLLERS", Ignore::Allowed, machine::controllers),
    ("CGROUP_MEMORY_OFF", Ignore::Allowed, machine::cgroup_memory),
    ("CGROUP_V1_UNSUPPORTED", Ignore::Allowed, machine::cgroup_v1),
    ("KMOD_MISSING", Ignore::Allowed, machine::modules),
    ("LXC_FEATURES", Ignore::Allowed, machine::container),
    ("SELINUX_POLICY", Ignore::Allowed, software::selinux),
    ("IPTABLES_BAD", Ignore::Allowed, software::iptables),
    ("TOOL_MISSING", Ignore::Allowed, software::tools),
    ("ACCOUNT_CONFLICT", Ignore::Allowed, software::account),
    ("TRUST_STORE_MISSING", Ignore::Allowed, software::trust_store),
    ("INGRESS_NGINX_RETIRED", Ignore::Allowed, software::retired_ingress),
    ("TRAEFIK_GOES", Ignore::Allowed, software::traefik_goes),
    ("HOSTNAME_BAD", Ignore::Allowed, network::hostname),
    ("HOSTNAME_DEFAULT", Ignore::Allowed, network::image_name),
    ("ROUTE_NONE", Ignore::Allowed, network::no_route),
    ("NIC_AMBIGUOUS", Ignore::Allowed, network::ambiguous),
    ("ADDRESS_UNKNOWN", Ignore::Allowed, network::address_unknown),
    ("ADDRESS_DYNAMIC", Ignore::Allowed, network::dynamic),
    ("CIDR_OVERLAP", Ignore::Allowed, ranges::overlap),
    ("CIDR_MISFIT", Ignore::Allowed, ranges::misfit),
    ("DNS_NONE", Ignore::Allowed, dns::none),
    ("DNS_LOOPBACK", Ignore::Allowed, dns::refused),
    ("DNS_WILDCARD", Ignore::Allowed, dns::wildcard),
    ("DNS_LIMITS", Ignore::Allowed, dns::limits),
    ("PORT_IN_USE", Ignore::Allowed, ports::ports),
    ("INGRESS_PORT_IN_USE", Ignore::Allowed, ports::ingress_ports),
    ("FW_FIREWALLD", Ignore::Allowed, ports::firewalld),
    ("FW_UFW", Ignore::Allowed, ports::ufw),
    ("PROXY_NOPROXY", Ignore::Allowed, ports::proxy),
    ("PROXY_TUNNEL", Ignore::Allowed, ports::proxy_tunnel),
    ("API_PUBLIC", Ignore::Allowed, ports::public),
    ("NODE_RENAMED", Ignore::Allowed, settings::renamed),
    ("K3S_SETTING_UNKNOWN", Ignore::Allowed, settings::unknown),
    ("K3S_SETTING_ODD", Ignore::Allowed, settings::odd),
    ("SECRET_READABLE", Ignore::Allowed, secrets::readable),
];

/// All codes that `--ignore` knows.
pub fn codes() -> Vec<&'static str> {
    RULES.iter().map(|rule| rule.0).collect()
}

/// Whether `--ignore` turns an error of this code into a warning.
pub fn can_be_ignored(code: &str) -> bool {
    RULES.iter().any(|(known, ignore, _)| *known == code && *ignore == Ignore::Allowed)
}

/// Runs every rule; `--ignore` is applied here.
pub fn run(facts: &Facts, target: &InstallTarget<'_>) -> Vec<Finding> {
    let mut found = Vec::new();
    for (code, ignore, rule) in RULES {
        for mut finding in rule(facts, target) {
            debug_assert_eq!(&finding.code, code, "a rule speaks only for its own code");
            if finding.level == Level::Error
                && *ignore == Ignore::Allowed
                && target.settings.options.ignore.iter().any(|c| c == code)
            {
                finding.level = Level::Warning;
                finding.ignored = true;
            }
            found.push(finding);
        }
    }
    found
}

/// `1.5 GiB`: for evidence.
pub(crate) fn format_size(bytes: u64) -> String {
    let mut value = bytes as f64;
    for unit in ["B", "KiB", "MiB", "GiB"] {
        if value < 1024.0 {
            return if unit == "B" { format!("{value} B") } else { format!("{value:.1} {unit}") };
        }
        value /= 1024.0;
    }
    format!("{value:.1} TiB")
}

#[cfg(test)]
mod tests;
