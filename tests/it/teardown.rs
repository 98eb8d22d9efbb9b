//! What k3s leaves in the kernel and in systemd, taken away by programs that record; k3s' own
//! `k3s-killall.sh` is the measure.

use crate::support::Sandbox;

const SAVED: &str = "*filter
:INPUT ACCEPT [0:0]
:FORWARD ACCEPT [0:0]
:KUBE-ROUTER-INPUT - [0:0]
-A INPUT -m comment --comment \"kube-router netpol - 4IA2OSFRMVNDXBVV\" -j KUBE-ROUTER-INPUT
-A INPUT -m comment --comment \"KUBE-ROUTER rule to explicitly ACCEPT traffic that comply to network policies\" -m mark --mark 0x20000/0x20000 -j ACCEPT
-A INPUT -p tcp -m tcp --dport 22 -j ACCEPT
-A FORWARD -m comment --comment \"flanneld forward\" -j FLANNEL-FWD
COMMIT
";

/// A node whose kernel k3s has filled; `ipset destroy` is refused for a set that somebody else
/// uses.
fn filled() -> Sandbox {
    let sandbox = Sandbox::new();
    sandbox.put("/proc/sys/net/ipv4/conf/all/route_localnet", "0\n");
    sandbox.install(&[]).ended(0);
    sandbox.beside("saved", SAVED, 0o644);
    let log = "echo \"$(/usr/bin/basename $0) $*\" >> \"$PIPEOPS_ROOT/../calls.log\"";
    for (name, does) in [
        ("iptables-save", r#"case "$*" in *filter*) /bin/cat "$PIPEOPS_ROOT/../saved" ;; esac"#),
        ("iptables", ":"),
        (
            "ipset",
            r#"case "$*" in "list -name") printf 'KUBE-SRC-AAAA\ninet6:KUBE-DST-BBBB\noffice\nKUBE-SRC-BUSY\n' ;; *BUSY*) exit 1 ;; esac"#,
        ),
        (
            "nft",
            r#"case "$*" in "list tables") printf 'table ip filter\ntable ip kube-proxy\ntable inet mine\n' ;; "list table ip filter") printf 'table ip filter {\n\tchain INPUT {\n\t\ttype filter hook input priority filter; policy accept;\n\t}\n}\n' ;; esac"#,
        ),
    ] {
        sandbox.beside(&format!("bin/{name}"), &format!("#!/bin/sh\n{log}\n{does}\n"), 0o755);
    }
    sandbox.put("/proc/sys/net/ipv4/conf/all/route_localnet", "1\n");
    // of a kernel module that a later pipeops looks at, and of one that came with k3s
    sandbox.put("/proc/sys/net/ipv4/vs/conntrack", "1\n");
    for path in ["/run/nri/nri.sock", "/run/k3s/x", "/run/flannel/subnet.env"] {
        sandbox.put(path, "");
    }
    sandbox
}

#[test]
fn rules_sets_slices_and_sockets_of_pods_go_and_foreign_ones_stay() {
    let sandbox = filled();
    let before = sandbox.calls().len();
    let said = sandbox.run(&["uninstall", "--yes"]).ended(0);
    let calls = sandbox.calls()[before..].to_owned();
    for call in [
        "iptables -w -t filter -D INPUT -m comment --comment KUBE-ROUTER rule to explicitly ACCEPT traffic that comply to network policies",
        "iptables -w -t filter -D INPUT -m comment --comment kube-router netpol - 4IA2OSFRMVNDXBVV -j KUBE-ROUTER-INPUT",
        "iptables -w -t filter -D FORWARD -m comment --comment flanneld forward -j FLANNEL-FWD",
        "iptables -w -t filter -F KUBE-ROUTER-INPUT",
        "iptables -w -t filter -X KUBE-ROUTER-INPUT",
        "ipset destroy KUBE-SRC-AAAA",
        "ipset destroy inet6:KUBE-DST-BBBB",
        "nft delete table ip filter",
        "nft delete table ip kube-proxy",
        "systemctl stop kubepods.slice",
    ] {
        assert!(calls.contains(call), "{call}:\n{calls}");
    }
    for foreign in ["dport 22", "destroy office", "inet mine"] {
        assert!(!calls.contains(foreign), "{calls}");
    }
    // sets hang on rules, and tables are empty only without them
    let at = |text: &str| calls.find(text).unwrap();
    assert!(
        at("-X KUBE-ROUTER-INPUT") < at("ipset destroy")
            && at("ipset destroy") < at("nft delete table ip filter"),
        "{calls}"
    );
    for path in ["/run/nri", "/run/k3s", "/run/flannel"] {
        assert!(!sandbox.root().join(path.trim_start_matches('/')).exists(), "{path}");
    }
    for line in [
        "ipset KUBE-SRC-BUSY: another program's rule uses it",
        "kernel: sysctl net.ipv4.conf.all.route_localnet = 1, was 0",
        "kernel: sysctl net.ipv4.vs.conntrack = 1, was not there",
    ] {
        assert!(said.out.contains(line), "{line}:\n{}", said.out);
    }
}

/// A journal of a version that did not look at a sysctl says nothing about it, rather than
/// something false.
#[test]
fn what_was_never_looked_at_is_not_called_new() {
    let sandbox = filled();
    let path = "/var/lib/pipeops/journal.json";
    let mut journal: serde_json::Value = serde_json::from_str(&sandbox.read(path)).unwrap();
    let kernel = journal["kernel"].as_object_mut().unwrap();
    kernel.remove("sysctls");
    kernel.remove("sysctl net.ipv4.conf.all.route_localnet");
    sandbox.put(path, &journal.to_string());
    let said = sandbox.run(&["uninstall", "--yes"]).ended(0);
    assert!(
        !said.out.contains("route_localnet") && !said.out.contains("vs.conntrack"),
        "{}",
        said.out
    );
}

#[test]
fn undoing_counts_its_steps_up() {
    let sandbox = Sandbox::new();
    sandbox.install(&[]).ended(0);
    let said = sandbox.run(&["uninstall", "--yes", "--events", "json"]).ended(0).err;
    let started: Vec<(u64, u64)> = said
        .lines()
        .filter_map(|l| serde_json::from_str::<serde_json::Value>(l).ok())
        .filter(|e| e["event"] == "started")
        .map(|e| (e["number"].as_u64().unwrap(), e["of"].as_u64().unwrap()))
        .collect();
    let of = started.len() as u64;
    assert!(of > 20, "{said}");
    assert_eq!(started, (1..=of).map(|n| (n, of)).collect::<Vec<_>>());
}

/// k3s keeps each version that it ever unpacked; the current and the former stay, and what a pod's
/// shim runs from.
#[test]
fn what_versions_before_the_former_unpacked_goes_once_the_node_is_ready() {
    let sandbox = Sandbox::new();
    sandbox.install(&[]).ended(0);
    let data = |name: &str| format!("/var/lib/rancher/k3s/data/{name}");
    let hash = |c: char| c.to_string().repeat(64);
    for c in ['a', 'b', 'c', 'd', 'e'] {
        sandbox.put(&format!("{}/bin/k3s", data(&hash(c))), "k3s");
    }
    for name in ["cni/bridge", ".lock", "mine/file"] {
        sandbox.put(&data(name), "");
    }
    let link = |to: char, name: &str| {
        std::os::unix::fs::symlink(data(&hash(to)), sandbox.root().join(&data(name)[1..])).unwrap()
    };
    sandbox.put(
        "/proc/4711/cmdline",
        &format!("{}/bin/containerd-shim-runc-v2\0-namespace\0k8s.io\0", data(&hash('c'))),
    );
    let release = sandbox.path("release");
    let look = || sandbox.run(&["install-server", "--offline-dir", &release, "--dry-run"]).ended(0);
    // without a current one nobody can tell
    assert!(!look().err.contains("of a former k3s"), "{}", look().err);
    link('a', "current");
    link('b', "previous");
    let said = look().err;
    assert_eq!(said.matches("of a former k3s").count(), 2, "{said}");
    sandbox.install(&[]).ended(0);
    let mut left: Vec<String> = std::fs::read_dir(sandbox.root().join(&data("")[1..]))
        .unwrap()
        .flatten()
        .map(|e| e.file_name().to_string_lossy().into_owned())
        .collect();
    left.sort();
    assert_eq!(
        left,
        [
            ".lock".to_owned(),
            hash('a'),
            hash('b'),
            hash('c'),
            "cni".into(),
            "current".into(),
            "mine".into(),
            "previous".into()
        ]
    );
    assert!(sandbox.install(&[]).ended(0).out.contains("nothing to do"));
}
