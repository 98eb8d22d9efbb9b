//! The rules on machines as the field shows them: `rows` has one of each code, `cases` what people
//! met, `addresses` machines with several.

use std::collections::BTreeSet;

use super::*;
use crate::install::components;
use crate::install::effective_settings::read_file;
use crate::install::facts::{
    Clock, Disk, Interface, Iptables, Listener, Mount, ResolvConf, Route, SettingsFile, User, parse,
};
use crate::install::finding::{Finding, has_errors};
use crate::install::settings::Options;

const GIB: u64 = 1 << 30;

fn set(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|n| (*n).to_owned()).collect()
}

fn route(to: &str, device: &str) -> Route {
    Route {
        to: to.into(),
        device: device.into(),
        kind: "unicast".into(),
        preference: 1,
        ..Route::default()
    }
}

fn resolv(text: &str) -> Option<ResolvConf> {
    Some(parse::resolv_conf(text))
}

/// A file of k3s' settings beside ours; by its name it is read before or after.
fn beside(case: &mut Case, name: &str, text: &str) {
    let after_ours = name > "50-pipeops.yaml" && name != "config.yaml";
    case.facts.k3s.files.push(SettingsFile {
        path: name.into(),
        after_ours,
        entries: read_file(text).unwrap(),
        fault: None,
    });
}

fn k3s(case: &mut Case, key: &str, value: impl Into<serde_json::Value>) {
    case.options.k3s = [(key.to_owned(), value.into())]
        .into_iter()
        .collect::<crate::install::settings::k3s_table::K3sTable>()
        .layered_over(case.options.k3s.clone());
}

/// Debian 12 with two processors and 4 GiB.
fn healthy() -> Facts {
    let disk = |path: &str| Disk {
        path: path.into(),
        available_bytes: 40 * GIB,
        total_bytes: 80 * GIB,
        inodes_free: 1_000_000,
        inodes_total: 2_000_000,
        device: 1,
    };
    let mut facts = Facts {
        init: "systemd".into(),
        machine: "x86_64".into(),
        hostname: "vm1".into(),
        cpus: 2,
        memory_bytes: 4 * GIB,
        disks: ["/var/lib/rancher", "/var/lib/kubelet", "/usr/local/bin", "/var/log"]
            .map(disk)
            .to_vec(),
        fsync_p99_us: Some(4_000),
        clock: Clock {
            now: 1_800_000_000,
            synchronized: Some(true),
            offset: Some((2, "x".into())),
        },
        routes: vec![
            Route { metric: 100, source: Some("10.0.0.5".into()), ..route("0.0.0.0/0", "eth0") },
            route("10.0.0.0/24", "eth0"),
        ],
        interfaces: vec![Interface::new("eth0", &["10.0.0.5/24"])],
        iptables: Some(Iptables { version: "1.8.9".into(), backend: "nft".into() }),
        kmsg: true,
        trust_store: true,
        ..Facts::default()
    };
    facts.os.id = "debian".into();
    facts.resolv_confs.etc = resolv("nameserver 10.0.0.1\n");
    facts.modules.readable = true;
    facts.modules.available =
        set(&["br_netfilter", "overlay", "nf_conntrack", "vxlan", "wireguard"]);
    let mount = |path: &str| Mount {
        path: path.into(),
        mount_point: "/".into(),
        fs_type: "ext4".into(),
        entry_types: Some(true),
        ..Mount::default()
    };
    facts.mounts = ["/var/lib/rancher", "/usr/local/bin", "/etc", "/run"].map(mount).to_vec();
    facts.cgroup.version = 2;
    facts.cgroup.controllers = set(&["cpu", "cpuset", "io", "memory", "pids"]);
    facts.selinux.mode = "disabled".into();
    facts.programs = ["modprobe", "mount", "umount", "useradd", "ip"]
        .iter()
        .map(|p| ((*p).to_owned(), format!("/sbin/{p}")))
        .collect();
    facts
}

/// Machine and options of one case.
struct Case {
    facts: Facts,
    options: Options,
    role: NodeRole,
    version: &'static str,
}

fn case() -> Case {
    Case {
        facts: healthy(),
        options: Options::default(),
        role: NodeRole::Server,
        version: "v1.36.2+k3s1",
    }
}

fn found(case: &Case) -> Vec<Finding> {
    let settings =
        Settings::resolve(case.options.clone(), case.role, &codes(), &components::names()).unwrap();
    let selected = if case.role == NodeRole::Server {
        components::selected(settings.components.as_deref(), false)
    } else {
        Vec::new()
    };
    run(
        &case.facts,
        &InstallTarget {
            settings: &settings,
            version: Some(&case.version.parse().unwrap()),
            components: &selected,
        },
    )
}

fn listener(port: u16, address: &str) -> Listener {
    Listener {
        protocol: "tcp".into(),
        address: address.into(),
        port,
        pid: Some(812),
        process: Some("nginx".into()),
    }
}

type Change = fn(&mut Case);

fn public(case: &mut Case) {
    case.facts.interfaces[0] = Interface::new("eth0", &["203.0.113.7/24"]);
    case.facts.routes[0].source = Some("203.0.113.7".into());
}

mod addresses;
mod cases;
mod rows;

use rows::ROWS;

#[test]
fn every_code_is_raised_by_its_fault_and_not_by_the_near_miss() {
    for (code, fault, near) in ROWS {
        let (mut bad, mut good) = (case(), case());
        fault(&mut bad);
        near(&mut good);
        assert!(
            found(&bad).iter().any(|f| f.code == *code),
            "{code} is not raised: {:?}",
            found(&bad)
        );
        assert!(!found(&good).iter().any(|f| f.code == *code), "{code} is raised by its near miss");
        for finding in found(&bad) {
            assert!(
                !finding.fix.is_empty() && !finding.evidence.is_empty(),
                "{code} says what to do"
            );
        }
    }
}

#[test]
fn every_code_has_a_row() {
    let rows: Vec<&str> = ROWS.iter().map(|r| r.0).collect();
    assert_eq!(rows, codes());
}

#[test]
fn a_healthy_machine_raises_nothing() {
    assert_eq!(found(&case()), []);
    assert_eq!(found(&Case { role: NodeRole::Worker, ..case() }), []);
}

#[test]
fn ignoring_works_by_code_and_not_for_everything() {
    let mut ignored = case();
    ignored.facts.resolv_confs.etc = resolv("nameserver 127.0.0.53\n");
    assert!(has_errors(&found(&ignored)));
    ignored.options.ignore = vec!["DNS_LOOPBACK".into()];
    let findings = found(&ignored);
    assert!(!has_errors(&findings) && findings.iter().any(|f| f.ignored));
    ignored.facts.uid = 1000;
    ignored.options.ignore.push("NOT_ROOT".into());
    assert!(has_errors(&found(&ignored)), "nobody but root can do it");
}

#[test]
fn a_public_address_lists_exactly_what_will_answer() {
    let mut case = case();
    public(&mut case);
    case.facts.listeners = vec![listener(22, "0.0.0.0"), listener(5432, "127.0.0.1")];
    let findings = found(&case);
    let finding = findings.iter().find(|f| f.code == "API_PUBLIC").unwrap();
    assert_eq!(
        finding.evidence,
        "will answer from outside: 22/tcp, 80/tcp, 443/tcp, 6443/tcp, 10250/tcp"
    );
}

#[test]
fn a_port_names_its_holder() {
    let mut case = case();
    case.facts.listeners = vec![listener(6443, "0.0.0.0")];
    assert_eq!(found(&case)[0].evidence, "held by `nginx` (pid 812) on 0.0.0.0");
}

/// k3s' own ingress counts as one: its ports are looked at, and told to who may be reached from the
/// internet.
#[test]
fn traefik_opens_what_ingress_opens() {
    for (components, counted) in [("traefik", true), ("ingress", true), ("metrics", false)] {
        let mut facts = healthy();
        facts.listeners = vec![listener(443, "0.0.0.0")];
        facts.interfaces[0] = Interface::new("eth0", &["8.8.4.4/24"]);
        facts.routes[0].source = Some("8.8.4.4".into());
        let options = Options { components: vec![components.into()], ..Options::default() };
        let settings =
            Settings::resolve(options, NodeRole::Server, &codes(), &components::names()).unwrap();
        let selected = components::selected(settings.components.as_deref(), false);
        let found = run(
            &facts,
            &InstallTarget { settings: &settings, version: None, components: &selected },
        );
        let of = |code: &str| found.iter().find(|f| f.code == code);
        assert_eq!(of("INGRESS_PORT_IN_USE").is_some(), counted, "{components}");
        assert_eq!(
            of("API_PUBLIC").unwrap().evidence.contains("80/tcp"),
            counted,
            "{components}: {}",
            of("API_PUBLIC").unwrap().evidence
        );
    }
}

/// An upgrade unpacks a whole k3s beside the old one; a re-run needs nothing.
#[test]
fn an_upgrade_asks_for_its_own_room() {
    for (installed, free, found) in [
        ("v1.36.2+k3s1", GIB / 2, false),
        ("v1.35.0+k3s1", GIB / 2, true),
        ("v1.35.0+k3s1", 2 * GIB, false),
    ] {
        let mut facts = healthy();
        facts.k3s.installed_role = Some(NodeRole::Server);
        facts.k3s.version = Some(installed.into());
        facts.disks.iter_mut().for_each(|d| d.available_bytes = free);
        let settings =
            Settings::resolve(Options::default(), NodeRole::Server, &codes(), &components::names())
                .unwrap();
        let version = "v1.36.2+k3s1".parse().unwrap();
        let low = run(
            &facts,
            &InstallTarget { settings: &settings, version: Some(&version), components: &[] },
        )
        .iter()
        .any(|f| f.code == "DISK_LOW");
        assert_eq!(low, found, "{installed} with {free} bytes free");
    }
}
