//! Rules about the machine itself: processor, memory, disks, clock, kernel.

use super::InstallTarget;
use super::format_size;
use crate::install::effective_settings::EffectiveSettings;
use crate::install::facts::{Disk, Facts};
use crate::install::finding::{Finding, Level};
use crate::install::{components, network};
use crate::k3s::version;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
/// 2026-11-01: no clock of a running pipeops is earlier than its own source.
const EARLIEST: i64 = 1_793_491_200;
/// Longest offset that certificates made now survive on the other side, seconds.
pub(crate) const CLOCK_LEEWAY: i64 = 30;

pub(super) fn not_root(facts: &Facts, _: &InstallTarget<'_>) -> Vec<Finding> {
    if facts.uid == 0 {
        return Vec::new();
    }
    vec![
        Finding::new(
            "NOT_ROOT",
            Level::Error,
            "this needs root",
            format!("running as uid {}", facts.uid),
        )
        .fix("run the same command with sudo"),
    ]
}

pub(super) fn no_systemd(facts: &Facts, _: &InstallTarget<'_>) -> Vec<Finding> {
    if facts.init == "systemd" {
        return Vec::new();
    }
    vec![
        Finding::new(
            "NO_SYSTEMD",
            Level::Error,
            "systemd is not the init system",
            format!("process 1 is `{}`", facts.init),
        )
        .fix("use a distribution that boots with systemd"),
    ]
}

pub(super) fn arch(facts: &Facts, _: &InstallTarget<'_>) -> Vec<Finding> {
    if version::arch(&facts.machine).is_some() {
        return Vec::new();
    }
    vec![
        Finding::new(
            "ARCH_UNSUPPORTED",
            Level::Error,
            "k3s has no build for this processor",
            format!("uname -m says `{}`", facts.machine),
        )
        .fix("use an x86_64, aarch64 or armv7l machine"),
    ]
}

pub(super) fn cpu(facts: &Facts, target: &InstallTarget<'_>) -> Vec<Finding> {
    if facts.cpus >= 2 || !target.server() {
        return Vec::new();
    }
    vec![
        Finding::new(
            "CPU_LOW",
            Level::Warning,
            "a server should have 2 processors",
            format!("{} found", facts.cpus),
        )
        .fix("expect slow starts, or give the machine a second processor"),
    ]
}

pub(super) fn memory(facts: &Facts, target: &InstallTarget<'_>) -> Vec<Finding> {
    // machines sold as "2 GB" report some 100 MB less
    let (least, good) =
        if target.server() { (900 * MIB, 1700 * MIB) } else { (420 * MIB, 420 * MIB) };
    let level = match facts.memory_bytes {
        have if have < least => Level::Error,
        have if have < good => Level::Warning,
        _ => return Vec::new(),
    };
    let role = if target.server() { "server" } else { "worker" };
    vec![
        Finding::new(
            "MEMORY_LOW",
            level,
            format!("little memory for a k3s {role}"),
            format!("{} in all", format_size(facts.memory_bytes)),
        )
        .fix("k3s asks for 2 GB on a server and 512 MB on a worker; use a larger machine"),
    ]
}

pub(super) fn components_fit(facts: &Facts, target: &InstallTarget<'_>) -> Vec<Finding> {
    if !target.server() || target.components.iter().all(|c| c.memory_mib == 0) {
        return Vec::new();
    }
    let sum: u64 =
        components::SERVER_MEMORY_MIB + target.components.iter().map(|c| c.memory_mib).sum::<u64>();
    let have = facts.memory_bytes / MIB;
    if have >= sum {
        return Vec::new();
    }
    let mut table = format!("k3s server {} MiB", components::SERVER_MEMORY_MIB);
    for component in target.components.iter().filter(|c| c.memory_mib > 0) {
        table.push_str(&format!(" + {} {} MiB", component.name, component.memory_mib));
    }
    vec![
        Finding::new(
            "COMPONENTS_DO_NOT_FIT",
            Level::Error,
            "the chosen components need more memory than there is",
            format!("{table} = {sum} MiB of {have} MiB"),
        )
        .fix("choose fewer with --components, or none with --components none"),
    ]
}

pub(super) fn swap(facts: &Facts, _: &InstallTarget<'_>) -> Vec<Finding> {
    if facts.swap_bytes == 0 {
        return Vec::new();
    }
    vec![
        Finding::new(
            "SWAP_ON",
            Level::Info,
            "swap is on",
            format!("{} of swap", format_size(facts.swap_bytes)),
        )
        .fix(
            "k3s tolerates it; pods may get slow instead of being ended. `swapoff -a` turns it off",
        ),
    ]
}

/// A new k3s beside the one that runs: the program, what it unpacks, its image archive and the
/// images.
const UPGRADE: u64 = GIB;

/// What is put where: path, bytes for a fresh node, inodes.
fn needs(facts: &Facts, target: &InstallTarget<'_>) -> [(String, u64, u64); 4] {
    let data = if target.server() { 3 * GIB } else { 2 * GIB };
    let kubelet = EffectiveSettings::planned(facts, target.settings).kubelet_dir();
    [
        ("/var/lib/rancher".into(), data, 40_000),
        (kubelet, 100 * MIB, 2_000),
        ("/usr/local/bin".into(), 150 * MIB, 20),
        ("/var/log".into(), 100 * MIB, 500),
    ]
}

/// Sums needs by file system, so that one disk is asked once; gives `(paths, need bytes, need
/// inodes, disk)`.
fn by_disk<'a>(facts: &'a Facts, target: &InstallTarget<'_>) -> Vec<(String, u64, u64, &'a Disk)> {
    let mut sums: Vec<(String, u64, u64, &Disk)> = Vec::new();
    for (path, bytes, inodes) in needs(facts, target) {
        let Some(disk) = facts.disks.iter().find(|d| d.path == path) else { continue };
        match sums.iter_mut().find(|(_, _, _, d)| d.device == disk.device) {
            Some(sum) => {
                sum.0.push_str(&format!(", {path}"));
                sum.1 += bytes;
                sum.2 += inodes;
            }
            None => sums.push((path, bytes, inodes, disk)),
        }
    }
    sums
}

pub(super) fn disk(facts: &Facts, target: &InstallTarget<'_>) -> Vec<Finding> {
    let mut sums = by_disk(facts, target);
    if facts.k3s.installed_role.is_some() {
        // what would fill the disk is there already, and the kubelet watches the rest; a new
        // version is unpacked beside the old one
        let same =
            target.version.is_none_or(|v| facts.k3s.version.as_deref() == Some(&v.to_string()));
        sums.retain(|(paths, ..)| {
            !same && (paths.contains("/var/lib/rancher") || paths.contains("/usr/local/bin"))
        });
        sums.iter_mut().for_each(|sum| sum.1 = UPGRADE);
    }
    sums.into_iter()
        .filter(|(_, need, _, disk)| disk.available_bytes < *need)
        .map(|(paths, need, _, disk)| {
            Finding::new(
                "DISK_LOW",
                Level::Error,
                format!("too little space for {paths}"),
                format!("{} free, {} needed", format_size(disk.available_bytes), format_size(need)),
            )
            .fix("free space or mount a larger disk there, then run again")
        })
        .collect()
}

pub(super) fn inodes(facts: &Facts, target: &InstallTarget<'_>) -> Vec<Finding> {
    by_disk(facts, target)
        .into_iter()
        .filter(|(_, _, need, disk)| disk.inodes_total > 0 && disk.inodes_free < *need)
        .map(|(paths, _, need, disk)| {
            Finding::new(
                "INODES_LOW",
                Level::Error,
                format!("too few free inodes for {paths}"),
                format!("{} free, {need} needed", disk.inodes_free),
            )
            .fix("remove small files there (`df -i` shows where), then run again")
        })
        .collect()
}

pub(super) fn fsync(facts: &Facts, target: &InstallTarget<'_>) -> Vec<Finding> {
    let Some(micros) = facts.fsync_p99_us.filter(|_| target.server()) else { return Vec::new() };
    let level = match micros {
        slow if slow > 500_000 => Level::Error,
        slow if slow > 20_000 => Level::Warning,
        _ => return Vec::new(),
    };
    vec![
        Finding::new(
            "DISK_FSYNC_SLOW",
            level,
            "the data disk is slow to make writes durable",
            format!("99 % of fsyncs within {} ms; 10 ms is good", micros / 1000),
        )
        .fix("the API will stall under load: use a local SSD for /var/lib/rancher"),
    ]
}

pub(super) fn clock(facts: &Facts, _: &InstallTarget<'_>) -> Vec<Finding> {
    let sync = "set the clock: `timedatectl set-ntp true`, wait until `timedatectl` says \
                synchronized, then run again";
    if let Some((offset, source)) = &facts.clock.offset
        && offset.abs() > CLOCK_LEEWAY
    {
        let direction = if *offset > 0 { "ahead of" } else { "behind" };
        return vec![
            Finding::new(
                "CLOCK_SKEW",
                Level::Error,
                "this machine's clock is wrong",
                format!("{} s {direction} {source}", offset.abs()),
            )
            .fix(sync),
        ];
    }
    if facts.clock.now < EARLIEST {
        return vec![
            Finding::new(
                "CLOCK_SKEW",
                Level::Error,
                "this machine's clock is wrong",
                "it shows a date before this program was written",
            )
            .fix(sync),
        ];
    }
    if facts.clock.synchronized == Some(false) {
        return vec![
            Finding::new(
                "CLOCK_SKEW",
                Level::Warning,
                "no time service keeps this clock in sync",
                "the time service reports unsynchronized",
            )
            .fix(sync),
        ];
    }
    Vec::new()
}

/// Where the kernel's command line is set on this machine, and what makes a change there take
/// effect.
fn cmdline_file(facts: &Facts) -> String {
    match facts.cmdline_source.as_deref() {
        Some(file @ ("/boot/firmware/cmdline.txt" | "/boot/cmdline.txt")) => {
            format!("the one line of {file}")
        }
        Some("/etc/default/grub") => {
            "GRUB_CMDLINE_LINUX in /etc/default/grub, run `update-grub` (`grub2-mkconfig -o \
             /boot/grub2/grub.cfg` where that is absent)"
                .into()
        }
        Some(file @ "/etc/kernel/cmdline") => {
            format!("{file}, run `kernel-install add $(uname -r) /lib/modules/$(uname -r)/vmlinuz`")
        }
        Some(file @ "/boot/loader/entries") => {
            format!("the `options` line of the entries in {file}")
        }
        Some(file) if file.ends_with("extlinux.conf") => {
            format!(
                "the `append` line of {file} (`u-boot-update` writes it from /etc/default/u-boot \
                 where that is there)"
            )
        }
        Some(file @ "/boot/armbianEnv.txt") => format!("`extraargs=` in {file}"),
        _ => "the command line of the kernel, where its boot loader has it".into(),
    }
}

pub(super) fn controllers(facts: &Facts, _: &InstallTarget<'_>) -> Vec<Finding> {
    let missing: Vec<&str> = ["cpu", "cpuset", "pids"]
        .into_iter()
        .filter(|c| !facts.cgroup.controllers.contains(*c))
        .collect();
    if missing.is_empty() {
        return Vec::new();
    }
    vec![
        Finding::new(
            "CGROUP_CONTROLLERS",
            Level::Error,
            "cgroup controllers are missing",
            format!("not enabled: {}", missing.join(", ")),
        )
        .fix(format!("remove `cgroup_disable=` from {}, reboot, run again", cmdline_file(facts))),
    ]
}

pub(super) fn cgroup_memory(facts: &Facts, _: &InstallTarget<'_>) -> Vec<Finding> {
    if facts.cgroup.controllers.contains("memory") {
        return Vec::new();
    }
    vec![
        Finding::new(
            "CGROUP_MEMORY_OFF",
            Level::Error,
            "the memory cgroup controller is off",
            "`memory` is not among the enabled controllers",
        )
        .fix(format!(
            "append `cgroup_memory=1 cgroup_enable=memory` to {}, reboot, run again",
            cmdline_file(facts)
        )),
    ]
}

pub(super) fn cgroup_v1(facts: &Facts, target: &InstallTarget<'_>) -> Vec<Finding> {
    let Some(version) = target.version.filter(|v| facts.cgroup.version == 1 && v.minor >= 35)
    else {
        return Vec::new();
    };
    vec![
        Finding::new(
            "CGROUP_V1_UNSUPPORTED",
            Level::Error,
            format!("Kubernetes {}.{} does not start on cgroup v1", version.major, version.minor),
            "the machine booted with the v1 or hybrid hierarchy",
        )
        .fix("boot with `systemd.unified_cgroup_hierarchy=1`, or use a newer distribution")
        .fix("or install the last line that works: --channel v1.34")
        .fix(
            "or go on for now with --ignore CGROUP_V1_UNSUPPORTED, which sets the kubelet's \
             fail-cgroupv1=false",
        ),
    ]
}

/// What k3s loads or needs, with the pod network that was chosen.
pub(crate) fn needed_modules(facts: &Facts, target: &InstallTarget<'_>) -> Vec<&'static str> {
    let effective = EffectiveSettings::planned(facts, target.settings);
    let mut modules = vec!["br_netfilter", "nf_conntrack"];
    if effective.bundled_containerd() && effective.snapshotter() == "overlayfs" {
        modules.push("overlay");
    }
    match network::flannel_backend(facts, target.settings).as_str() {
        "vxlan" => modules.push("vxlan"),
        backend if backend.starts_with("wireguard") => modules.push("wireguard"),
        _ => {}
    }
    modules
}

pub(super) fn modules(facts: &Facts, target: &InstallTarget<'_>) -> Vec<Finding> {
    if !facts.modules.readable {
        return Vec::new();
    }
    let missing: Vec<&str> =
        needed_modules(facts, target).into_iter().filter(|m| !facts.has_module(m)).collect();
    if missing.is_empty() {
        return Vec::new();
    }
    // a worker follows its server, which may have chosen another pod network
    let unsure = !target.server() && missing == ["wireguard"];
    let package = match facts.os.id.as_str() {
        "ubuntu" => "apt install linux-modules-extra-$(uname -r)",
        "rhel" | "rocky" | "almalinux" | "centos" | "fedora" | "ol" => {
            "dnf install kernel-modules-extra"
        }
        "debian" => {
            "install the full kernel: apt install linux-image-amd64 (not the cloud flavour)"
        }
        _ => "install your distribution's package of extra kernel modules",
    };
    let level = if unsure { Level::Warning } else { Level::Error };
    let mut finding = Finding::new(
        "KMOD_MISSING",
        level,
        "kernel modules are missing",
        format!("neither built in nor installed: {}", missing.join(", ")),
    );
    if missing.contains(&"wireguard") {
        // Linux has it since 5.6
        let package =
            if matches!(facts.os.id.as_str(), "rhel" | "rocky" | "almalinux" | "centos" | "ol") {
                "dnf install kmod-wireguard (from ELRepo)"
            } else {
                package
            };
        finding = finding
            .fix(format!("{package}: the address is public, so the pod network is encrypted"))
            .fix(
                "or use a private address: --node-ip; or, where others cannot listen, set in the \
                 [k3s] table: flannel-backend = \"vxlan\"",
            );
    }
    if missing != ["wireguard"] {
        finding = finding.fix(package);
    }
    vec![finding]
}

pub(super) fn container(facts: &Facts, _: &InstallTarget<'_>) -> Vec<Finding> {
    let Some(kind) = &facts.container else { return Vec::new() };
    let mut finding = Finding::new(
        "LXC_FEATURES",
        Level::Warning,
        format!("this is a container ({kind}), not a machine of its own"),
        "k3s needs the host to allow what it does",
    );
    if !facts.kmsg {
        finding.level = Level::Error;
        finding.evidence = "/dev/kmsg is missing; the kubelet does not start without it".into();
        finding = finding.fix(
            "on the host add `lxc.mount.entry = /dev/kmsg dev/kmsg none bind,create=file` to the \
             container",
        );
    }
    if kind == "lxc" {
        finding = finding.fix(
            "on the host: nesting and keyctl on, `lxc.apparmor.profile = unconfined`, \
             `lxc.cap.drop =`",
        );
    }
    if finding.fix.is_empty() {
        finding = finding.fix("nothing to do if the host grants all capabilities and devices");
    }
    vec![finding]
}
