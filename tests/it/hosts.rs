//! Machines as five distributions ship them, modelled from their documentation: none raises an
//! error.

use crate::support::Sandbox;

/// One distribution: name, os-release, where modules lie, and the files that are special.
type Distribution =
    (&'static str, &'static str, &'static str, &'static [(&'static str, &'static str)]);

const HOSTS: &[Distribution] = &[
    ("debian-12", "ID=debian\nVERSION_ID=\"12\"\n", "/lib/modules", &[]),
    (
        "ubuntu-24.04",
        "ID=ubuntu\nID_LIKE=debian\nVERSION_ID=\"24.04\"\n",
        "/lib/modules",
        &[
            (
                "/etc/resolv.conf",
                "nameserver 127.0.0.53\noptions edns0 trust-ad\nsearch example.com\n",
            ),
            ("/run/systemd/resolve/resolv.conf", "nameserver 10.0.0.1\n"),
            ("/etc/ufw/ufw.conf", "ENABLED=no\nLOGLEVEL=low\n"),
        ],
    ),
    (
        "rocky-9",
        "ID=\"rocky\"\nID_LIKE=\"rhel centos fedora\"\nVERSION_ID=\"9.5\"\n",
        "/usr/lib/modules",
        &[
            ("/sys/fs/selinux/enforce", "1"),
            ("/var/lib/selinux/targeted/active/modules/200/k3s/cil", ""),
            ("/etc/systemd/system/firewalld.service", ""),
            ("/run/fake-systemd/firewalld.service.active", "active"),
            ("/etc/pki/tls/certs/ca-bundle.crt", ""),
        ],
    ),
    (
        "opensuse-leap-15.6",
        "ID=\"opensuse-leap\"\nID_LIKE=\"suse opensuse\"\nVERSION_ID=\"15.6\"\n",
        "/lib/modules",
        &[
            ("/etc/ssl/ca-bundle.pem", ""),
            ("/proc/meminfo", "MemTotal:  8000000 kB\nSwapTotal:  2000000 kB\n"),
        ],
    ),
    (
        "amazon-2023",
        "ID=\"amzn\"\nID_LIKE=\"fedora\"\nVERSION_ID=\"2023\"\n",
        "/usr/lib/modules",
        &[("/sys/fs/selinux/enforce", "0"), ("/etc/pki/tls/certs/ca-bundle.crt", "")],
    ),
];

#[test]
fn five_healthy_distributions_raise_no_error() {
    for (name, os_release, modules, files) in HOSTS {
        let sandbox = Sandbox::new();
        sandbox.put("/etc/os-release", os_release);
        let dep = sandbox.read("/lib/modules/6.1.0-40-amd64/modules.dep");
        std::fs::remove_dir_all(sandbox.root().join("lib/modules")).unwrap();
        sandbox.put(&format!("{modules}/6.1.0-40-amd64/modules.dep"), &dep);
        for (path, text) in *files {
            sandbox.put(path, text);
        }
        let release = sandbox.path("release");
        let said = sandbox
            .run(&["install-server", "--offline-dir", &release, "--dry-run", "-o", "json"])
            .ended(0);
        let errors: Vec<String> = said.json()["findings"]
            .as_array()
            .unwrap()
            .iter()
            .filter(|f| f["level"] == "error")
            .map(|f| f["code"].to_string())
            .collect();
        assert!(errors.is_empty(), "{name}: {errors:?}");
        if *name == "rocky-9" {
            assert!(
                said.err.contains("FW_FIREWALLD") && said.err.contains("--add-port=6443/tcp"),
                "{}",
                said.err
            );
        }
    }
}
