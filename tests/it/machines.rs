//! Symptoms that people reported of other people's machines, through the front door: what the
//! machine has, and what is said of it.

use std::process::Command;

use crate::support::{Sandbox, assert_same_tree, run_output};

/// Codes, levels and evidence of a dry run.
fn findings(sandbox: &Sandbox, more: &[&str]) -> Vec<String> {
    let release = sandbox.path("release");
    let mut args = vec!["install-server", "--offline-dir", &release, "--dry-run", "-o", "json"];
    args.extend(more);
    let said = sandbox.run(&args);
    assert!(matches!(said.code, 0 | 3), "{}\n{}", said.out, said.err);
    let list = said.json()["findings"].as_array().unwrap().clone();
    list.iter()
        .map(|f| {
            format!(
                "{} {}: {} | {} | {}",
                f["code"].as_str().unwrap(),
                f["level"].as_str().unwrap(),
                f["what"],
                f["evidence"],
                f["fix"]
            )
        })
        .collect()
}

/// The drop-in of a plan.
fn drop_in(sandbox: &Sandbox, more: &[&str]) -> String {
    let file = sandbox.path("plan.json");
    let release = sandbox.path("release");
    let mut args = vec!["install-server", "--offline-dir", &release, "--plan-out", &file];
    args.extend(more);
    sandbox.run(&args).ended(0);
    let plan: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(&file).unwrap()).unwrap();
    let steps = plan["plan"]["steps"].as_array().unwrap().clone();
    steps.iter().find(|s| s["id"] == "settings").unwrap()["want"]
        .to_string()
        .replace("\\n", "\n")
        .replace("\\\"", "\"")
}

type Prepare = fn(&Sandbox);

const ETH0: &str = r#"[{"ifname":"eth0","addr_info":[{"local":"10.0.0.5","prefixlen":24}]}]"#;

fn addresses(sandbox: &Sandbox, json: &str) {
    sandbox.beside("ip-address.json", json, 0o644);
}

fn routes(sandbox: &Sandbox, json: &str) {
    sandbox.beside("ip-route.json", json, 0o644);
}

fn wireguard(sandbox: &Sandbox) {
    let list = "/lib/modules/6.1.0-40-amd64/modules.dep";
    let text = format!("{}kernel/drivers/net/wireguard/wireguard.ko.xz:\n", sandbox.read(list));
    sandbox.put(list, &text);
}

/// Where it was seen, what is raised (start of the line, and words in it), the machine, and one
/// that comes near.
const ROWS: &[(&str, &str, &str, Prepare, Prepare)] = &[
    (
        "k3s#4087",
        "DNS_LOOPBACK error",
        "127.0.0.1 is loopback",
        |s| s.put("/etc/resolv.conf", "nameserver 127.0.0.1\nnameserver 10.0.0.1\n"),
        |s| {
            s.put("/etc/resolv.conf", "nameserver 127.0.0.1\nnameserver 10.0.0.1\n");
            s.put("/run/systemd/resolve/resolv.conf", "nameserver 10.0.0.1\n");
        },
    ),
    (
        "k3s#14184",
        "DNS_LOOPBACK error",
        "fe80::1%eth0 has a zone",
        |s| s.put("/etc/resolv.conf", "nameserver 10.0.0.1\nnameserver fe80::1%eth0\n"),
        |s| {
            s.put("/etc/resolv.conf", "nameserver 10.0.0.1\nnameserver fe80::1%eth0\n");
            s.put("/etc/resolv.pods.conf", "nameserver 10.0.0.1\n");
            s.put("/etc/pipeops/config.toml", "[k3s]\nresolv-conf = \"/etc/resolv.pods.conf\"\n");
        },
    ),
    (
        "k3s#544",
        "DNS_LIMITS info",
        "5 name servers",
        |s| {
            s.put("/etc/resolv.conf", "nameserver 10.0.0.1\nnameserver 10.0.0.2\nnameserver 10.0.0.3\nnameserver 10.0.0.4\nnameserver 10.0.0.5\n")
        },
        |s| {
            s.put(
                "/etc/resolv.conf",
                "nameserver 10.0.0.1\nnameserver 10.0.0.2\nnameserver 10.0.0.3\n",
            )
        },
    ),
    (
        "k3s#532",
        "HOSTNAME_BAD error",
        "every machine calls itself so",
        |s| s.put("/proc/sys/kernel/hostname", "localhost.localdomain\n"),
        |s| s.put("/proc/sys/kernel/hostname", "vm1.localdomain\n"),
    ),
    (
        "kube-vip#1371",
        "NIC_AMBIGUOUS error",
        "eth1 10.1.0.5/24",
        |s| {
            addresses(
                s,
                r#"[{"ifname":"eth0","addr_info":[{"local":"10.0.0.5","prefixlen":24}]},{"ifname":"eth1","addr_info":[{"local":"10.1.0.5","prefixlen":24}]}]"#,
            );
            routes(
                s,
                r#"[{"dst":"default","flags":[],"nexthops":[{"gateway":"10.0.0.1","dev":"eth0","weight":1,"flags":[]},{"gateway":"10.1.0.1","dev":"eth1","weight":1,"flags":[]}]}]"#,
            );
        },
        |s| {
            routes(
                s,
                r#"[{"dst":"default","flags":[],"nexthops":[{"gateway":"10.0.0.1","dev":"eth0","weight":1,"flags":[]},{"gateway":"10.0.0.2","dev":"eth0","weight":1,"flags":[]}]}]"#,
            )
        },
    ),
    (
        "ip without -j",
        "TOOL_MISSING error",
        "iproute2",
        |s| {
            s.beside(
                "bin/ip",
                "#!/bin/sh\necho 'Option \"-j\" is unknown, try \"ip -help\".' >&2\nexit 255\n",
                0o755,
            )
        },
        |_| {},
    ),
    (
        "ip that ignores -j",
        "TOOL_MISSING error",
        "does not answer in JSON",
        |s| routes(s, "default via 10.0.0.1 dev eth0\n"),
        |_| {},
    ),
    (
        "no ip",
        "TOOL_MISSING error",
        "`ip` is not on this machine",
        |s| std::fs::remove_file(s.path("bin/ip")).unwrap(),
        |_| {},
    ),
    (
        "static IPv4 beside SLAAC",
        "ADDRESS_DYNAMIC info",
        "10.0.0.5 on eth0",
        |s| {
            addresses(
                s,
                r#"[{"ifname":"eth0","addr_info":[{"local":"10.0.0.5","prefixlen":24,"dynamic":true}]}]"#,
            )
        },
        |s| {
            addresses(
                s,
                r#"[{"ifname":"eth0","addr_info":[{"local":"10.0.0.5","prefixlen":24},{"local":"2001:db8::5","prefixlen":64,"dynamic":true}]}]"#,
            )
        },
    ),
    (
        "k3s#4627",
        "CIDR_OVERLAP error",
        "10.42.0.1/16 on br-lan",
        |s| {
            addresses(
                s,
                &ETH0.replace(
                    "[{\"ifname\":\"eth0\"",
                    "[{\"ifname\":\"br-lan\",\"addr_info\":[{\"local\":\"10.42.0.1\",\"prefixlen\":16}]},{\"ifname\":\"eth0\"",
                ),
            )
        },
        |s| {
            addresses(
                s,
                &ETH0.replace(
                    "[{\"ifname\":\"eth0\"",
                    "[{\"ifname\":\"br-lan\",\"addr_info\":[{\"local\":\"10.44.0.1\",\"prefixlen\":16}]},{\"ifname\":\"eth0\"",
                ),
            )
        },
    ),
    (
        "coredns#3704",
        "CIDR_OVERLAP error",
        "share addresses",
        |s| s.put("/etc/pipeops/config.toml", "[k3s]\ncluster-cidr = \"10.43.0.0/16\"\n"),
        |s| s.put("/etc/pipeops/config.toml", "[k3s]\ncluster-cidr = \"10.44.0.0/16\"\n"),
    ),
    (
        "a file beside ours",
        "CIDR_OVERLAP error",
        "10.52.0.0/16",
        |s| {
            s.put("/etc/rancher/k3s/config.yaml.d/90-mine.yaml", "cluster-cidr: 10.52.0.0/16\n");
            routes(
                s,
                r#"[{"dst":"default","gateway":"10.0.0.1","dev":"eth0"},{"dst":"10.52.0.0/16","dev":"lan0"}]"#,
            );
        },
        |s| {
            s.put("/etc/rancher/k3s/config.yaml.d/90-mine.yaml", "cluster-cidr: 10.52.0.0/16\n");
            routes(
                s,
                r#"[{"dst":"default","gateway":"10.0.0.1","dev":"eth0"},{"dst":"10.42.0.0/16","dev":"lan0"}]"#,
            );
        },
    ),
    (
        "a file that k3s cannot read",
        "K3S_CONFIG_INVALID error",
        "90-mine.yaml",
        |s| s.put("/etc/rancher/k3s/config.yaml.d/90-mine.yaml", "cluster-cidr: [\n"),
        |s| s.put("/etc/rancher/k3s/config.yaml.d/90-mine.yaml.bak", "cluster-cidr: [\n"),
    ),
    (
        "cloud-init wrote settings",
        "K3S_FOREIGN error",
        "no k3s",
        |s| s.put("/etc/rancher/k3s/config.yaml", "tls-san: [a.example.com]\n"),
        |s| s.put("/etc/rancher/k3s/config.yaml.d/10-mine.yaml", "tls-san: [a.example.com]\n"),
    ),
    (
        "k3s#3406",
        "TOOL_MISSING error",
        "apparmor_parser",
        |s| s.put("/sys/module/apparmor/parameters/enabled", "Y\n"),
        |s| {
            s.put("/sys/module/apparmor/parameters/enabled", "Y\n");
            s.beside("bin/apparmor_parser", "#!/bin/sh\n", 0o755);
        },
    ),
    (
        "k3s#66",
        "SNAPSHOTTER_UNFIT warning",
        "/ is zfs",
        |s| s.put("/proc/self/mountinfo", "1 0 0:1 / / rw - zfs rpool/root rw\n"),
        |s| {
            s.put("/proc/self/mountinfo", "1 0 0:1 / / rw - zfs rpool/root rw\n2 1 8:1 / /var/lib/rancher rw - ext4 /dev/sdb1 rw\n")
        },
    ),
    (
        "root on overlay",
        "SNAPSHOTTER_UNFIT warning",
        "/ is overlay",
        |s| {
            s.put(
                "/proc/self/mountinfo",
                "1 0 0:1 / / rw - overlay overlay rw,lowerdir=/l,upperdir=/u,workdir=/w\n",
            )
        },
        |s| s.put("/proc/self/mountinfo", "1 0 0:1 / / rw - btrfs /dev/sda2 rw\n"),
    ),
    (
        "noexec on /var",
        "MOUNT_NOEXEC error",
        "/var/lib/rancher (mounted on /var)",
        |s| {
            s.put("/proc/self/mountinfo", "1 0 0:1 / / rw - ext4 /dev/sda1 rw\n2 1 8:2 / /var rw,nosuid,noexec - ext4 /dev/sda2 rw\n")
        },
        |s| {
            s.put("/proc/self/mountinfo", "1 0 0:1 / / rw - ext4 /dev/sda1 rw\n2 1 8:2 / /tmp rw,nosuid,noexec - tmpfs t rw\n")
        },
    ),
    (
        "a read-only /usr",
        "MOUNT_READ_ONLY error",
        "/usr/local/bin",
        |s| {
            s.put(
                "/proc/self/mountinfo",
                "1 0 0:1 / / rw - ext4 /dev/sda1 rw\n2 1 8:2 / /usr ro - erofs /dev/sda2 ro\n",
            )
        },
        |s| {
            s.put(
                "/proc/self/mountinfo",
                "1 0 0:1 / / rw - ext4 /dev/sda1 rw\n2 1 8:2 / /usr ro - erofs /dev/sda2 ro\n3 2 8:3 / /usr/local rw - ext4 /dev/sda3 rw\n",
            )
        },
    ),
    (
        "Ubuntu on a Pi",
        "CGROUP_MEMORY_OFF error",
        "/boot/firmware/cmdline.txt",
        |s| {
            s.put("/sys/fs/cgroup/cgroup.controllers", "cpuset cpu io pids\n");
            s.put("/boot/firmware/cmdline.txt", "console=tty1\n");
        },
        |_| {},
    ),
    (
        "Debian for arm64 in a cloud",
        "CGROUP_MEMORY_OFF error",
        "/etc/default/grub",
        |s| {
            s.put("/sys/fs/cgroup/cgroup.controllers", "cpuset cpu io pids\n");
            s.put("/etc/default/grub", "GRUB_CMDLINE_LINUX=\"\"\n");
        },
        |_| {},
    ),
    (
        "Raspberry Pi OS 11",
        "CGROUP_MEMORY_OFF error",
        "the one line of /boot/cmdline.txt",
        |s| {
            s.put("/sys/fs/cgroup/cgroup.controllers", "cpuset cpu io pids\n");
            s.put("/etc/os-release", "ID=raspbian\n");
            s.put("/boot/cmdline.txt", "console=tty1\n");
        },
        |_| {},
    ),
    (
        "ufw's quotes",
        "FW_UFW warning",
        "ufw allow 6443/tcp",
        |s| s.put("/etc/ufw/ufw.conf", "# /etc/ufw/ufw.conf\nENABLED=\"yes\"\nLOGLEVEL=\"low\"\n"),
        |s| s.put("/etc/ufw/ufw.conf", "ENABLED=\"no\" # yes\n"),
    ),
    (
        "containerd's streams",
        "PORT_IN_USE error",
        "10010/tcp",
        |s| {
            s.put("/proc/net/tcp", "  sl  local_address rem_address st\n 0: 0100007F:271A 00000000:0000 0A 0 0 0 0 0 4242 1\n")
        },
        |s| {
            s.put("/proc/net/tcp", "  sl  local_address rem_address st\n 0: 0100007F:271B 00000000:0000 0A 0 0 0 0 0 4242 1\n")
        },
    ),
];

#[test]
fn each_symptom_is_named_and_a_near_miss_is_not() {
    let mut wrong = Vec::new();
    for (seen, start, words, fault, near) in ROWS {
        let (bad, good) = (Sandbox::new(), Sandbox::new());
        fault(&bad);
        near(&good);
        let (raised, missed) = (findings(&bad, &[]), findings(&good, &[]));
        let has = |list: &[String]| list.iter().any(|f| f.starts_with(start) && f.contains(words));
        println!(
            "{start:28} {seen:30} raised {:5} near miss {}",
            has(&raised),
            if has(&missed) { "RAISED" } else { "silent" }
        );
        if !has(&raised) || has(&missed) {
            wrong.push(format!(
                "{seen}: {start} with `{words}`\n  raised: {raised:#?}\n  near miss: {missed:#?}"
            ));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn no_ip_is_no_missing_route() {
    let sandbox = Sandbox::new();
    std::fs::remove_file(sandbox.path("bin/ip")).unwrap();
    assert!(!findings(&sandbox, &[]).iter().any(|f| f.starts_with("ROUTE_NONE")));
}

#[test]
fn addresses_of_a_plan() {
    let sandbox = Sandbox::new();
    wireguard(&sandbox);
    // a virtual address of another machine's making comes first in the list
    addresses(
        &sandbox,
        r#"[{"ifname":"eth0","addr_info":[{"local":"10.0.0.100","prefixlen":32},{"local":"10.0.0.5","prefixlen":24},{"local":"2001:db8:1::5","prefixlen":64}]}]"#,
    );
    routes(&sandbox, r#"[{"dst":"default","gateway":"10.0.0.1","dev":"eth0"}]"#);
    sandbox.beside("ip-route6.json", r#"[{"dst":"default","gateway":"fe80::1","dev":"eth0","protocol":"ra","metric":100,"pref":"medium"}]"#, 0o644);
    let ip = "#!/bin/sh\nPATH=/usr/bin:/bin\ncase \"$*\" in *address*) cat \"$PIPEOPS_ROOT/../ip-address.json\" ;; *\"-4 route\"*) cat \"$PIPEOPS_ROOT/../ip-route.json\" ;; *) cat \"$PIPEOPS_ROOT/../ip-route6.json\" ;; esac\n";
    sandbox.beside("bin/ip", ip, 0o755);
    let text = drop_in(&sandbox, &[]);
    assert!(
        text.contains("node-ip: \"10.0.0.5\"\n") && text.contains("  - \"10.0.0.5\"\n"),
        "{text}"
    );

    sandbox.put("/etc/pipeops/config.toml", "[k3s]\ncluster-cidr = \"10.42.0.0/16,fd42::/56\"\nservice-cidr = \"10.43.0.0/16,fd43::/112\"\n");
    let text = drop_in(&sandbox, &[]);
    assert!(
        text.contains("node-ip: \"10.0.0.5,2001:db8:1::5\"\n")
            && text.contains("  - \"2001:db8:1::5\"\n"),
        "{text}"
    );

    sandbox.put("/etc/pipeops/config.toml", "");
    routes(&sandbox, "[]");
    let text = drop_in(&sandbox, &[]);
    assert!(text.contains("node-ip: \"2001:db8:1::5\"\n"), "{text}");
}

#[test]
fn a_public_address_needs_the_module_of_its_pod_network() {
    let sandbox = Sandbox::new();
    addresses(
        &sandbox,
        r#"[{"ifname":"eth0","addr_info":[{"local":"198.51.100.7","prefixlen":24}]}]"#,
    );
    routes(&sandbox, r#"[{"dst":"default","gateway":"198.51.100.1","dev":"eth0"}]"#);
    let found = findings(&sandbox, &[]);
    assert!(
        found.iter().any(|f| f.starts_with("KMOD_MISSING error") && f.contains("wireguard")),
        "{found:#?}"
    );
    wireguard(&sandbox);
    assert!(!findings(&sandbox, &[]).iter().any(|f| f.starts_with("KMOD_MISSING")));
    assert!(drop_in(&sandbox, &[]).contains("flannel-backend: \"wireguard-native\""));
    // what a file before ours chose is not overruled by what we would choose
    sandbox.put(
        "/etc/rancher/k3s/config.yaml.d/10-mine.yaml",
        "flannel-backend: host-gw\ntls-san: [a.example.com]\n",
    );
    let text = drop_in(&sandbox, &[]);
    assert!(!text.contains("flannel-backend") && text.contains("tls-san+:\n"), "{text}");
}

#[test]
fn programs_beside_the_path_are_found() {
    let sandbox = Sandbox::new();
    for name in ["modprobe", "useradd"] {
        std::fs::create_dir_all(sandbox.path("sbin")).unwrap();
        std::fs::rename(
            sandbox.path(&format!("bin/{name}")),
            sandbox.path(&format!("sbin/{name}")),
        )
        .unwrap();
    }
    assert!(!findings(&sandbox, &[]).iter().any(|f| f.starts_with("TOOL_MISSING")));
    sandbox.install(&[]).ended(0);
    assert!(sandbox.calls().contains("useradd --system"));
}

#[test]
fn a_group_or_user_of_the_agents_name_is_taken_and_stays() {
    let installs = |change: &dyn Fn(&Sandbox)| {
        let sandbox = Sandbox::new();
        change(&sandbox);
        let before = sandbox.tree();
        sandbox.install(&[]).ended(0);
        for file in ["/etc/passwd", "/etc/group"] {
            let text = sandbox.read(file);
            assert_eq!(
                text.lines().filter(|l| l.starts_with("pipeops-agent:")).count(),
                1,
                "{text}"
            );
        }
        sandbox.run(&["uninstall", "--yes"]).ended(0);
        assert_same_tree(&sandbox.tree(), &before, "");
    };
    installs(&|s| s.put("/etc/group", "root:x:0:\npipeops-agent:x:555:\n"));
    installs(&|s| {
        s.put("/etc/passwd", "root:x:0:0:root:/root:/bin/bash\npipeops-agent:x:555:100::/nonexistent:/usr/sbin/nologin\n")
    });
    let sandbox = Sandbox::new();
    sandbox.put(
        "/etc/passwd",
        "root:x:0:0:root:/root:/bin/bash\npipeops-agent:x:1001:1001::/home/p:/bin/bash\n",
    );
    assert!(
        findings(&sandbox, &[])
            .iter()
            .any(|f| f.starts_with("ACCOUNT_CONFLICT warning")
                && f.contains("can log in (/bin/bash)"))
    );
}

/// Real mounts, in a mount namespace of its own: needs root, which CI has.
#[test]
fn a_directory_that_is_really_read_only_ends_in_preflight() {
    for dir in ["/usr/local", "/etc", "/var/lib"] {
        let sandbox = Sandbox::new();
        let before = sandbox.tree();
        let at = sandbox.root().join(&dir[1..]);
        let program = crate::support::program();
        let script = format!(
            "/bin/mount --bind '{0}' '{0}' && /bin/mount -o remount,bind,ro '{0}' && exec '{1}' install-server --root '{2}' --offline-dir '{3}' --yes",
            at.display(),
            program.display(),
            sandbox.root().display(),
            sandbox.path("release")
        );
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "private", "sh", "-c", &script]);
        command.env("PATH", format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", sandbox.path("bin")));
        let Ok(output) = command.output() else {
            println!("NOT RUN: no unshare here");
            return;
        };
        let said = run_output(output);
        if said.err.contains("unshare failed")
            || said.err.contains("permission denied")
            || said.err.contains("must be superuser")
        {
            println!("NOT RUN: no right to mount here: {}", said.err.trim());
            return;
        }
        assert_eq!(said.code, 3, "{dir}\n{}\n{}", said.out, said.err);
        assert!(said.err.contains("MOUNT_READ_ONLY"), "{dir}\n{}", said.err);
        assert_same_tree(&sandbox.tree(), &before, dir);
    }
}
