//! Fills `Facts` from the machine, once, without changing it.
#![expect(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "part of the door to the machine"
)]

mod links;
mod mounts;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::time::{Duration, Instant};

use crate::host::paths::AGENT_USER;
use crate::host::{Host, program::Output};
use crate::install::effective_settings::{EffectiveSettings, flag_of_variable, read_file};
use crate::install::facts::{
    Account, Clock, Disk, Facts, K3s, Listener, Modules, Resolver, Selinux, SettingsFile, User,
    parse,
};
use crate::install::settings::Settings;
use crate::k3s::role::NodeRole;

const ASK: Duration = Duration::from_secs(5);

/// Whether the machine may be touched for a measurement that leaves no trace.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Probe {
    /// Only read: dry runs.
    ReadOnly,
    /// Also measure fsync with an unnamed file on the data disk.
    Disk,
}

/// Reads everything that checks and plans look at. `ours` is what the journal records.
pub async fn gather(
    host: &Host,
    ours: Option<NodeRole>,
    env: &BTreeMap<String, String>,
    probe: Probe,
) -> Facts {
    let text = |path: &str| host.text(path);
    let kernel = text("/proc/sys/kernel/osrelease").trim().to_owned();
    let selinux = match text("/sys/fs/selinux/enforce").trim() {
        "1" => "enforcing",
        "0" => "permissive",
        _ => "disabled",
    };
    let resolver = |path: &str| host.read(path).ok().flatten().map(|t| parse::resolv_conf(&t));
    let resolver = Resolver {
        etc: resolver("/etc/resolv.conf"),
        systemd: resolver("/run/systemd/resolve/resolv.conf"),
        chosen: None,
    };
    let unified = host.read("/sys/fs/cgroup/cgroup.controllers").ok().flatten();
    let ((interfaces, routes, ip_fault), account, iptables, systemd, firewalld) = tokio::join!(
        links::network(host),
        account(host),
        host.ask("iptables", &["--version"], ASK),
        host.ask("systemctl", &["--version"], ASK),
        host.unit("firewalld.service"),
    );
    let said = |output: anyhow::Result<Output>| output.map(|o| o.stdout).unwrap_or_default();
    let systemd = said(systemd);
    let machine = text("/proc/sys/kernel/arch");
    let uname = nix::sys::utsname::uname();
    let machine = match machine.trim() {
        "" => uname.map(|u| u.machine().to_string_lossy().into_owned()).unwrap_or_default(),
        known => known.to_owned(),
    };
    Facts {
        uid: if host.is_machine() { nix::unistd::geteuid().as_raw() } else { 0 },
        init: text("/proc/1/comm").trim().to_owned(),
        systemd: systemd
            .split_whitespace()
            .nth(1)
            .and_then(|v| parse::numbers(v).first().copied())
            .unwrap_or(0),
        machine,
        hostname: text("/proc/sys/kernel/hostname").trim().to_owned(),
        machine_id: text("/etc/machine-id").trim().to_owned(),
        os: parse::os_release(&text("/etc/os-release")),
        cpus: parse::cpus(&text("/proc/cpuinfo")),
        memory_bytes: memory(host),
        swap_bytes: parse::meminfo(&text("/proc/meminfo"), "SwapTotal"),
        disks: ["/var/lib/rancher", "/var/lib/kubelet", "/usr/local/bin", "/var/log", "/tmp"]
            .iter()
            .filter_map(|p| disk(host, p))
            .collect(),
        mounts: mounts::gather(host),
        // below another root lies some directory of this machine, whose disk says nothing about the other's
        fsync_p99_us: (probe == Probe::Disk && host.is_machine()).then(|| fsync(host)).flatten(),
        listeners: listeners(host),
        clock: clock(host),
        resolver,
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
        cmdline_source: boot(host),
        account,
        selinux: Selinux {
            mode: selinux.into(),
            k3s_policy: ["targeted", "minimum", "mls"]
                .iter()
                .any(|p| host.exists(&format!("/var/lib/selinux/{p}/active/modules/200/k3s")))
                || host.exists("/usr/share/selinux/packages/k3s.pp"),
        },
        iptables: parse::iptables(&said(iptables)),
        proxy: proxy(env),
        trust_store: [
            "/etc/ssl/certs/ca-certificates.crt",
            "/etc/pki/tls/certs/ca-bundle.crt",
            "/etc/ssl/ca-bundle.pem",
            "/etc/ssl/cert.pem",
        ]
        .iter()
        .any(|p| host.exists(p)),
        k3s: k3s_facts(host, ours, env).await,
        other_kubernetes: other(host),
        programs: [
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
        ]
        .iter()
        .filter_map(|p| Some(((*p).to_owned(), host.which(p)?.to_string_lossy().into_owned())))
        .collect(),
        current_hostname: None,
        readable: Vec::new(),
        retired_ingress: None,
        traefik: false,
        kernel,
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

/// The file system that holds the nearest existing parent of `path`.
fn disk(host: &Host, path: &str) -> Option<Disk> {
    let real = existing(host, path);
    let stat = nix::sys::statvfs::statvfs(&real).ok()?;
    let block = stat.fragment_size();
    Some(Disk {
        path: path.to_owned(),
        available_bytes: stat.blocks_available().saturating_mul(block),
        total_bytes: stat.blocks().saturating_mul(block),
        inodes_free: stat.files_available(),
        inodes_total: stat.files(),
        device: fs::metadata(&real).ok()?.dev(),
    })
}

fn existing(host: &Host, path: &str) -> std::path::PathBuf {
    let mut real = host.at(path);
    while !real.exists() && real.pop() {}
    real
}

/// 99th percentile of 60 durable writes to an unnamed file: nothing appears in the tree, nothing is left after a crash.
fn fsync(host: &Host) -> Option<u64> {
    let dir = existing(host, "/var/lib/rancher");
    let mut file = OpenOptions::new()
        .write(true)
        .custom_flags(nix::fcntl::OFlag::O_TMPFILE.bits())
        .mode(0o600)
        .open(dir)
        .ok()?;
    let (block, start) = ([0x5a; 2300], Instant::now());
    let mut times = Vec::new();
    while times.len() < 60 && start.elapsed() < Duration::from_secs(3) {
        let before = Instant::now();
        file.write_all(&block).ok()?;
        file.sync_data().ok()?;
        times.push(u64::try_from(before.elapsed().as_micros()).unwrap_or(u64::MAX));
    }
    times.sort_unstable();
    times.get(times.len().saturating_sub(1).min(times.len() * 99 / 100)).copied()
}

fn listeners(host: &Host) -> Vec<Listener> {
    let mut found = Vec::new();
    for (file, protocol) in [("tcp", "tcp"), ("tcp6", "tcp"), ("udp", "udp"), ("udp6", "udp")] {
        found.extend(parse::sockets(&host.text(&format!("/proc/net/{file}")), protocol));
    }
    let wanted: BTreeSet<u64> = found.iter().map(|(_, inode)| *inode).collect();
    let owners = if wanted.is_empty() { BTreeMap::new() } else { owners(host, &wanted) };
    found
        .into_iter()
        .map(|(mut listener, inode)| {
            if let Some((pid, name)) = owners.get(&inode) {
                listener.pid = Some(*pid);
                listener.process = Some(name.clone());
            }
            listener
        })
        .collect()
}

/// Which process holds each socket, by the links in `/proc/PID/fd`.
fn owners(host: &Host, wanted: &BTreeSet<u64>) -> BTreeMap<u64, (u32, String)> {
    let mut found = BTreeMap::new();
    for pid in host.list("/proc").iter().filter_map(|n| n.parse::<u32>().ok()) {
        for fd in host.list(&format!("/proc/{pid}/fd")) {
            let inode = host
                .link_target(&format!("/proc/{pid}/fd/{fd}"))
                .and_then(|t| t.strip_prefix("socket:[")?.strip_suffix(']')?.parse::<u64>().ok())
                .filter(|i| wanted.contains(i));
            if let Some(inode) = inode {
                found.entry(inode).or_insert_with(|| {
                    (pid, host.text(&format!("/proc/{pid}/comm")).trim().to_owned())
                });
            }
        }
    }
    found
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
    Modules { known: dir.is_some(), loaded, available }
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
    ["HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"]
        .iter()
        .filter_map(|name| {
            let value = env
                .get(&name.to_lowercase())
                .or_else(|| env.get(*name))
                .filter(|v| !v.is_empty())?;
            Some(((*name).to_owned(), value.clone()))
        })
        .collect()
}

/// Whether containerd will load a profile for each container (containerd, pkg/apparmor, hostSupports).
fn apparmor(host: &Host) -> bool {
    let security = host.list("/sys/kernel/security");
    host.text("/sys/module/apparmor/parameters/enabled").starts_with('Y')
        && (security.is_empty() || security.iter().any(|n| n == "apparmor"))
}

/// The file that the kernel's command line comes from.
fn boot(host: &Host) -> Option<String> {
    let found = [
        // Raspberry Pi OS 12 and Ubuntu; what Raspberry Pi OS 12 keeps at the old place only says so
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

/// What has the name of the agent's account already. Directories such as LDAP are asked too: useradd refuses a name that they know.
async fn account(host: &Host) -> Account {
    let of = |text: &str| {
        text.lines().map(str::to_owned).find(|l| l.split(':').next() == Some(AGENT_USER))
    };
    let local = of(&host.text("/etc/passwd"));
    let remote = match &local {
        None if host.which("getent").is_some() => host
            .ask("getent", &["passwd", AGENT_USER], ASK)
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
            directory,
        },
    );
    let gid =
        of(&host.text("/etc/group")).and_then(|l| l.split(':').nth(2).and_then(|g| g.parse().ok()));
    Account { user, gid }
}

/// The port of supervisor and API that k3s on this machine was told, by us or by anybody; 6443 when by nobody.
pub fn api_port(host: &Host) -> u16 {
    let path = crate::host::paths::DROP_IN;
    let entries =
        host.read(path).ok().flatten().and_then(|text| read_file(&text).ok()).unwrap_or_default();
    let ours = SettingsFile { path: path.into(), entries, ..SettingsFile::default() };
    EffectiveSettings::on_machine(&settings_files(host, None), &ours).api_port()
}

/// What k3s reads beside our own file, in its order: variables of the unit, `config.yaml`, `config.yaml.d` by name.
fn settings_files(host: &Host, ours: Option<NodeRole>) -> Vec<SettingsFile> {
    let unit = ours.unwrap_or(NodeRole::Server).unit();
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
    let own = crate::host::paths::DROP_IN.rsplit('/').next().unwrap_or_default().to_owned();
    let mut paths = vec![("/etc/rancher/k3s/config.yaml".to_owned(), false)];
    paths.extend(
        host.list(dir).into_iter().filter(|n| *n != own).map(|n| (format!("{dir}/{n}"), n > own)),
    );
    for (path, after) in paths {
        let lower = path.to_ascii_lowercase();
        if !(lower.ends_with(".yaml") || lower.ends_with(".yml")) || host.is_dir(&path) {
            continue;
        }
        let read = match host.read(&path) {
            Ok(None) => continue,
            Ok(Some(text)) => read_file(&text),
            // who is not root is told so first
            Err(_) => continue,
        };
        let (entries, fault) = match read {
            Ok(entries) => (entries, None),
            Err(why) => (Vec::new(), Some(why)),
        };
        found.push(SettingsFile { path, after, entries, fault });
    }
    found
}

/// The second look, once it is known what was chosen: the file of name servers and directories elsewhere.
pub fn gather_configured(host: &Host, facts: &mut Facts, settings: &Settings) {
    let effective = EffectiveSettings::of(facts, settings);
    facts.resolver.chosen = effective.resolv_conf().map(|path| {
        let read = host.read(&path).ok().flatten().map(|text| parse::resolv_conf(&text));
        (path, read)
    });
    let kubelet = effective.kubelet_dir();
    if facts.disks.iter().all(|d| d.path != kubelet) {
        facts.disks.extend(disk(host, &kubelet));
    }
}

async fn k3s_facts(host: &Host, ours: Option<NodeRole>, env: &BTreeMap<String, String>) -> K3s {
    let version = match host.which("k3s").is_some() && host.exists(crate::k3s::paths::BINARY) {
        true => host
            .ask("k3s", &["--version"], ASK)
            .await
            .ok()
            .and_then(|o| o.stdout.split_whitespace().nth(2).map(str::to_owned)),
        false => None,
    };
    let mut foreign = Vec::new();
    if ours.is_none() {
        for path in [
            crate::k3s::paths::BINARY,
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
    let unit = ours.unwrap_or(NodeRole::Server).unit();
    K3s {
        version,
        // on its way up or down counts: the ports are its own then too
        active: ours.is_some()
            && host
                .unit(unit)
                .await
                .is_ok_and(|u| !matches!(u.active.as_str(), "inactive" | "failed" | "")),
        foreign,
        ours,
        server_data: host.exists("/var/lib/rancher/k3s/server/db"),
        server_token: host.exists("/var/lib/rancher/k3s/server/token"),
        token_differs: false,
        node_password: host.exists(crate::k3s::paths::NODE_PASSWORD),
        files: settings_files(host, ours),
        environment: env
            .iter()
            .filter(|(name, value)| !value.is_empty() && flag_of_variable(name).is_some())
            .map(|(n, _)| n.clone())
            .collect(),
    }
}

fn other(host: &Host) -> Vec<String> {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durable_writes_are_timed_and_leave_nothing() {
        let dir = tempfile::tempdir().unwrap();
        assert!(fsync(&Host::new(dir.path(), None)).is_some_and(|micros| micros > 0));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
