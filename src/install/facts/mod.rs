//! What is known about a machine, as plain data; the parsers of the text it comes from are below
//! it.

pub mod address;
pub mod parse;

use std::collections::{BTreeMap, BTreeSet};

pub use address::{Address, Interface, Route};

use serde::{Deserialize, Serialize};

/// Everything the checks and the planner look at. Gathered once by `install::gather`, read-only
/// afterwards.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Facts {
    pub uid: u32,
    pub init: String,
    /// systemd's major version, 0 when unknown.
    pub systemd: u32,
    /// `uname -m`.
    pub machine: String,
    pub kernel: String,
    pub hostname: String,
    pub machine_id: String,
    pub os: Os,
    pub cpus: u32,
    pub memory_bytes: u64,
    pub swap_bytes: u64,
    pub disks: Vec<Disk>,
    pub mounts: Vec<Mount>,
    /// 99th percentile of a small write with fsync on the data disk, microseconds; `None` when not
    /// measured (dry run).
    pub fsync_p99_us: Option<u64>,
    pub listeners: Vec<Listener>,
    pub clock: Clock,
    pub resolv_confs: ResolvConfs,
    pub routes: Vec<Route>,
    pub interfaces: Vec<Interface>,
    /// The route that leads to the server of a worker: it decides before the default route does.
    pub route_to_server: Option<Route>,
    /// Why `ip` did not list addresses and routes; both are unknown then, not absent.
    pub ip_fault: Option<String>,
    pub modules: Modules,
    pub cgroup: Cgroup,
    /// `lxc`, `docker`, `systemd-nspawn`, …; `None` on a machine of its own.
    pub container: Option<String>,
    pub kmsg: bool,
    pub firewalld_active: bool,
    pub ufw_active: bool,
    /// Whether containers get an AppArmor profile loaded.
    pub apparmor: bool,
    /// The file that the kernel's command line comes from, where one of the known ones is there.
    pub cmdline_source: Option<String>,
    pub account: Account,
    pub selinux: Selinux,
    pub iptables: Option<Iptables>,
    /// Proxy variables of this environment, upper-case names.
    pub proxy: BTreeMap<String, String>,
    pub trust_store: bool,
    pub k3s: K3s,
    /// Other Kubernetes or container software that would be in the way.
    pub other_kubernetes: Vec<String>,
    /// Programs of the node that checks or steps depend on, name → path.
    pub programs: BTreeMap<String, String>,
    /// IngressClass controllers and images found in a running cluster that are retired.
    pub retired_ingress: Option<u32>,
    /// A k3s of ours runs its own traefik, which its settings do not turn off yet.
    pub bundled_traefik: bool,
    /// The name that the machine has now, where its node was installed under another one.
    pub current_hostname: Option<String>,
    /// Files with secrets that every user may read.
    pub readable_secrets: Vec<ReadableSecret>,
}

/// A file that lays secrets open.
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq)]
pub struct ReadableSecret {
    pub path: String,
    /// Permission bits as they were found.
    pub mode: u32,
    /// What it holds, without the secrets themselves.
    pub holds: Vec<String>,
    /// Whether this run has made it private.
    pub made_private: bool,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq)]
#[serde(default)]
pub struct Os {
    pub id: String,
    pub id_like: String,
    pub version: String,
    pub pretty: String,
}

/// The file system that holds `path`, or would hold it once made.
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq)]
pub struct Disk {
    pub path: String,
    pub available_bytes: u64,
    pub total_bytes: u64,
    pub inodes_free: u64,
    /// 0 on file systems without a fixed table of inodes.
    pub inodes_total: u64,
    /// Identifies the file system, so that paths on the same one are summed.
    pub device: u64,
}

/// How the place of a path is mounted.
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq)]
#[serde(default)]
pub struct Mount {
    /// A path that we or k3s write to.
    pub path: String,
    /// Where its file system is mounted.
    pub mount_point: String,
    /// `ext4`, `overlay`, `nfs4`, …; empty when unknown.
    pub fs_type: String,
    /// Nothing can be written there: mounted so, or the directory is immutable.
    pub read_only: bool,
    pub no_exec: bool,
    /// Whether directory entries carry their type, which overlayfs requires of the file system
    /// below it; `None` when unknown.
    pub entry_types: Option<bool>,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq)]
pub struct Listener {
    /// `tcp` or `udp`.
    pub protocol: String,
    pub address: String,
    pub port: u16,
    pub pid: Option<u32>,
    pub process: Option<String>,
}

/// What there is under the name of the agent's user and group.
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq)]
#[serde(default)]
pub struct Account {
    pub user: Option<User>,
    /// Number of the group of that name.
    pub gid: Option<u32>,
}

/// A line of `/etc/passwd`, or of a directory.
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq)]
#[serde(default)]
pub struct User {
    pub uid: u32,
    pub gid: u32,
    pub shell: String,
    /// Known to a directory such as LDAP, not to this machine's own file.
    pub from_directory: bool,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq)]
#[serde(default)]
pub struct Clock {
    /// Seconds since 1970 by this machine's clock.
    pub now: i64,
    /// Whether a time service says that it is in sync; `None` when there is none to ask.
    pub synchronized: Option<bool>,
    /// This clock minus a remote one, seconds, and who said so.
    pub offset: Option<(i64, String)>,
}

/// A file of name servers, as two programs read it.
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq)]
#[serde(default)]
pub struct ResolvConf {
    /// Servers that k3s judges (k3s-io/k3s, pkg/agent/config/config.go, isValidResolvConf).
    pub nameservers: Vec<String>,
    /// Search list that the kubelet hands to pods.
    pub search: Vec<String>,
    /// Servers that the kubelet hands to pods: also those whose line is indented.
    pub pod_nameservers: Vec<String>,
}

/// The files of name servers that k3s looks at, in its order; `None` for one that is not there.
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq)]
#[serde(default)]
pub struct ResolvConfs {
    /// `/etc/resolv.conf`.
    pub etc: Option<ResolvConf>,
    /// `/run/systemd/resolve/resolv.conf`, with the servers behind systemd-resolved.
    pub systemd: Option<ResolvConf>,
    /// What the setting `resolv-conf` names, with its path.
    pub chosen: Option<(String, Option<ResolvConf>)>,
}

/// Kernel modules: loaded, built in, or there to be loaded.
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq)]
#[serde(default)]
pub struct Modules {
    pub loaded: BTreeSet<String>,
    pub available: BTreeSet<String>,
    /// Whether the module lists could be read at all; in many containers they cannot.
    pub readable: bool,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq)]
#[serde(default)]
pub struct Cgroup {
    /// 1 or 2; hybrid set-ups count as 1, as the kubelet sees them.
    pub version: u8,
    pub controllers: BTreeSet<String>,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq)]
#[serde(default)]
pub struct Selinux {
    /// `enforcing`, `permissive`, `disabled`.
    pub mode: String,
    pub k3s_policy: bool,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq)]
pub struct Iptables {
    pub version: String,
    /// `nft` or `legacy`.
    pub backend: String,
}

/// What of k3s is on the machine already, and whose it is.
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq)]
#[serde(default)]
pub struct K3s {
    /// Version of `/usr/local/bin/k3s`.
    pub version: Option<String>,
    /// Evidence of a k3s that our journal does not know: units, programs; of its settings only
    /// where there is nothing else.
    pub foreign: Vec<String>,
    /// Whether our journal records an installation, and in which role.
    pub installed_role: Option<crate::k3s::role::NodeRole>,
    pub active: bool,
    /// `server/db` exists under the data directory.
    pub server_data: bool,
    /// `server/token` exists beside it.
    pub server_token: bool,
    /// A token was given that differs from the one in the data.
    pub token_differs: bool,
    pub node_password: bool,
    /// Files of settings beside ours, in the order in which k3s reads them.
    pub files: Vec<SettingsFile>,
    /// `K3S_*` variables of this environment: systemd hands none of them to the unit.
    pub environment: Vec<String>,
}

/// Settings that k3s reads from somewhere else than our own file.
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq)]
#[serde(default)]
pub struct SettingsFile {
    pub path: String,
    /// Read after ours, so that it has the last word.
    pub after_ours: bool,
    /// In the order of the file. Values are kept of keys that something here looks at, for others
    /// may be secrets.
    pub entries: Vec<(String, serde_json::Value)>,
    /// Why k3s could not read it and would stop.
    pub fault: Option<String>,
}

impl Facts {
    pub fn has_module(&self, module: &str) -> bool {
        self.modules.loaded.contains(module) || self.modules.available.contains(module)
    }
}

/// Versions that duplicate or lose rules (k3s documentation, "Known issues"; k3s#3117).
pub fn iptables_is_faulty(facts: &Facts) -> bool {
    facts.iptables.as_ref().is_some_and(|tool| {
        let numbers = parse::version_numbers(&tool.version);
        numbers.starts_with(&[1, 8])
            && numbers.get(2).is_some_and(|patch| *patch <= 4)
            && tool.backend == "nft"
    })
}
