//! Fills `Facts` from the machine, once, without changing it.

mod disks;
mod k3s;
mod links;
mod mounts;
mod sockets;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use crate::base::order;
use crate::host::paths::AGENT_USER;
use crate::host::{Host, program::Output};
use crate::install::effective_settings::EffectiveSettings;
use crate::install::facts::{Account, Clock, Facts, Modules, ResolvConfs, Selinux, User, parse};
use crate::install::settings::Settings;
use crate::k3s::role::NodeRole;

pub use k3s::api_port;

const TIMEOUT: Duration = Duration::from_secs(5);
/// Directories whose file systems must have room.
const DISKS: [&str; 5] =
    ["/var/lib/rancher", "/var/lib/kubelet", "/usr/local/bin", "/var/log", "/tmp"];
/// Where distributions keep the certificates of public authorities.
const TRUST_STORES: [&str; 4] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
];
/// Programs that a check or a step depends on.
const PROGRAMS: [&str; 11] = [
    "modprobe",
    "mount",
    "umount",
    "nft",
    "iptables",
    "kubectl",
    "helm",
    "ip",
    "apparmor_parser",
    "useradd",
    "fuse-overlayfs",
];

/// Whether the machine may be touched for a measurement that leaves no trace.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Probe {
    /// Only read: dry runs.
    ReadOnly,
    /// Also measure fsync with an unnamed file on the data disk.
    Disk,
}

/// Reads everything that checks and plans look at. `installed_role` is what the journal records.
pub async fn gather(
    host: &Host,
    installed_role: Option<NodeRole>,
    env: &BTreeMap<String, String>,
    probe: Probe,
) -> Facts {
    let text = |path: &str| host.text(path);
    let kernel = text("/proc/sys/kernel/osrelease").trim().to_owned();
    let unified = host.read("/sys/fs/cgroup/cgroup.controllers").ok().flatten();
    let ((interfaces, routes, ip_fault), account, iptables, systemd, firewalld) = tokio::join!(
        links::network(host),
        account(host),
        host.output("iptables", &["--version"], TIMEOUT),
        host.output("systemctl", &["--version"], TIMEOUT),
        host.unit("firewalld.service"),
    );
    let stdout = |output: anyhow::Result<Output>| output.map(|o| o.stdout).unwrap_or_default();
    Facts {
        uid: if host.is_running_machine() { nix::unistd::geteuid().as_raw() } else { 0 },
        init: text("/proc/1/comm").trim().to_owned(),
        systemd: systemd_version(&stdout(systemd)),
        machine: machine(host),
        hostname: text("/proc/sys/kernel/hostname").trim().to_owned(),
        machine_id: text("/etc/machine-id").trim().to_owned(),
        os: parse::os_release(&text("/etc/os-release")),
        cpus: parse::cpus(&text("/proc/cpuinfo")),
        memory_bytes: memory(host),
        swap_bytes: parse::meminfo(&text("/proc/meminfo"), "SwapTotal"),
        disks: DISKS.iter().filter_map(|path| disks::disk(host, path)).collect(),
        mounts: mounts::gather(host),
        // another root is a directory of this machine: the disk below it is not the one to measure
        fsync_p99_us: (probe == Probe::Disk && host.is_running_machine())
            .then(|| disks::fsync_p99_us(host))
            .flatten(),
        listeners: sockets::listeners(host),
        clock: clock(host),
        resolv_confs: resolv_confs(host),
        routes,
        interfaces,
        route_to_server: None,
        ip_fault,
        modules: modules(host, &kernel),
        cgroup: parse::cgroups(unified.as_deref(), &text("/proc/cgroups")),
        container: container(host),
        kmsg: host.exists("/dev/kmsg"),
        firewalld_active: firewalld.is_ok_and(|u| u.running()),
        // its init script sources the file
        ufw_active: parse::shell_variable(&text("/etc/ufw/ufw.conf"), "ENABLED")
            .is_some_and(|v| v.eq_ignore_ascii_case("yes")),
        apparmor: apparmor(host),
        cmdline_source: cmdline_source(host),
        account,
        selinux: selinux(host),
        iptables: parse::iptables(&stdout(iptables)),
        proxy: proxy(env),
        trust_store: TRUST_STORES.iter().any(|path| host.exists(path)),
        k3s: k3s::facts(host, installed_role, env).await,
        other_kubernetes: k3s::other_kubernetes(host),
        programs: PROGRAMS
            .iter()
            .filter_map(|p| Some(((*p).to_owned(), host.which(p)?.to_string_lossy().into_owned())))
            .collect(),
        current_hostname: None,
        readable_secrets: Vec::new(),
        retired_ingress: None,
        bundled_traefik: false,
        kernel,
    }
}

fn systemd_version(text: &str) -> u32 {
    text.split_whitespace()
        .nth(1)
        .and_then(|version| parse::version_numbers(version).first().copied())
        .unwrap_or(0)
}

/// As `uname -m` says it.
fn machine(host: &Host) -> String {
    match host.text("/proc/sys/kernel/arch").trim() {
        "" => nix::sys::utsname::uname()
            .map(|u| u.machine().to_string_lossy().into_owned())
            .unwrap_or_default(),
        known => known.to_owned(),
    }
}

fn resolv_confs(host: &Host) -> ResolvConfs {
    let read = |path: &str| host.read(path).ok().flatten().map(|text| parse::resolv_conf(&text));
    ResolvConfs {
        etc: read("/etc/resolv.conf"),
        systemd: read("/run/systemd/resolve/resolv.conf"),
        chosen: None,
    }
}

fn selinux(host: &Host) -> Selinux {
    let mode = match host.text("/sys/fs/selinux/enforce").trim() {
        "1" => "enforcing",
        "0" => "permissive",
        _ => "disabled",
    };
    Selinux {
        mode: mode.into(),
        k3s_policy: ["targeted", "minimum", "mls"]
            .iter()
            .any(|p| host.exists(&format!("/var/lib/selinux/{p}/active/modules/200/k3s")))
            || host.exists("/usr/share/selinux/packages/k3s.pp"),
    }
}

/// Total memory: what a container is limited to counts, not what its host has.
fn memory(host: &Host) -> u64 {
    let total = parse::meminfo(&host.text("/proc/meminfo"), "MemTotal");
    let limit = ["/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"]
        .iter()
        .find_map(|p| host.text(p).trim().parse::<u64>().ok());
    match limit {
        Some(limit) if limit > 0 && limit < total => limit,
        _ => total,
    }
}

fn clock(host: &Host) -> Clock {
    let synchronized = if host.exists("/run/systemd/timesync/synchronized") {
        Some(true)
    } else if host.is_dir("/run/systemd/timesync") {
        Some(false)
    } else {
        None
    };
    Clock { now: jiff::Timestamp::now().as_second(), synchronized, offset: None }
}

fn modules(host: &Host, kernel: &str) -> Modules {
    let mut loaded = parse::module_names(&host.text("/proc/modules"));
    loaded.extend(host.list("/sys/module").into_iter().map(|m| m.replace('-', "_")));
    // overlay and friends can be built in without a directory in /sys/module
    loaded.extend(
        host.text("/proc/filesystems")
            .lines()
            .filter_map(|l| l.split_whitespace().last())
            .map(str::to_owned),
    );
    let dir = ["/lib/modules", "/usr/lib/modules"]
        .iter()
        .map(|d| format!("{d}/{kernel}"))
        .find(|d| host.exists(&format!("{d}/modules.dep")));
    let mut available = BTreeSet::new();
    if let Some(dir) = &dir {
        available.extend(parse::module_names(&host.text(&format!("{dir}/modules.dep"))));
        available.extend(parse::module_names(&host.text(&format!("{dir}/modules.builtin"))));
    }
    Modules { readable: dir.is_some(), loaded, available }
}

fn container(host: &Host) -> Option<String> {
    let named = host.text("/run/systemd/container");
    if !named.trim().is_empty() {
        return Some(named.trim().to_owned());
    }
    let environ = host.text("/proc/1/environ");
    let from_init =
        environ.split('\0').find_map(|v| v.strip_prefix("container=")).filter(|v| !v.is_empty());
    from_init.map(str::to_owned).or_else(|| host.exists("/.dockerenv").then(|| "docker".to_owned()))
}

/// Proxy variables under their upper-case names; the lower-case spelling wins, as with curl.
fn proxy(env: &BTreeMap<String, String>) -> BTreeMap<String, String> {
    let names = ["HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"].into_iter();
    order::map(names.filter_map(|name| {
        let value =
            env.get(&name.to_lowercase()).or_else(|| env.get(name)).filter(|v| !v.is_empty())?;
        Some((name.to_owned(), value.clone()))
    }))
}

/// Whether containerd will load a profile for each container (containerd, pkg/apparmor,
/// hostSupports).
fn apparmor(host: &Host) -> bool {
    let security = host.list("/sys/kernel/security");
    host.text("/sys/module/apparmor/parameters/enabled").starts_with('Y')
        && (security.is_empty() || security.iter().any(|n| n == "apparmor"))
}

/// The file that the kernel's command line comes from.
fn cmdline_source(host: &Host) -> Option<String> {
    let found = [
        // Raspberry Pi OS 12 and Ubuntu; what Raspberry Pi OS 12 keeps at the old place only says
        // so
        "/boot/firmware/cmdline.txt",
        "/boot/cmdline.txt",
        "/boot/armbianEnv.txt",
        "/boot/firmware/extlinux/extlinux.conf",
        "/boot/extlinux/extlinux.conf",
        "/etc/default/grub",
        "/etc/kernel/cmdline",
    ]
    .into_iter()
    .find(|p| host.exists(p))
    .map(str::to_owned);
    found.or_else(|| host.is_dir("/boot/loader/entries").then(|| "/boot/loader/entries".to_owned()))
}

/// What has the name of the agent's account already. Directories such as LDAP are asked too:
/// useradd refuses a name that they know.
async fn account(host: &Host) -> Account {
    let of = |text: &str| {
        text.lines().map(str::to_owned).find(|l| l.split(':').next() == Some(AGENT_USER))
    };
    let local = of(&host.text("/etc/passwd"));
    let remote = match &local {
        None if host.which("getent").is_some() => host
            .output("getent", &["passwd", AGENT_USER], TIMEOUT)
            .await
            .ok()
            .filter(Output::ok)
            .and_then(|o| of(&o.stdout)),
        _ => None,
    };
    let directory = local.is_none() && remote.is_some();
    let user = local.or(remote).map(|l| l.split(':').map(str::to_owned).collect::<Vec<_>>()).map(
        |fields| User {
            uid: fields.get(2).and_then(|u| u.parse().ok()).unwrap_or(u32::MAX),
            gid: fields.get(3).and_then(|g| g.parse().ok()).unwrap_or(u32::MAX),
            shell: fields.get(6).cloned().unwrap_or_default(),
            from_directory: directory,
        },
    );
    let gid =
        of(&host.text("/etc/group")).and_then(|l| l.split(':').nth(2).and_then(|g| g.parse().ok()));
    Account { user, gid }
}

/// Facts that depend on the settings: the file of name servers, and directories elsewhere.
pub fn gather_configured(host: &Host, facts: &mut Facts, settings: &Settings) {
    let effective = EffectiveSettings::planned(facts, settings);
    facts.resolv_confs.chosen = effective.resolv_conf().map(|path| {
        let read = host.read(&path).ok().flatten().map(|text| parse::resolv_conf(&text));
        (path, read)
    });
    let kubelet = effective.kubelet_dir();
    if facts.disks.iter().all(|d| d.path != kubelet) {
        facts.disks.extend(disks::disk(host, &kubelet));
    }
}
