//! What k3s' journal says when a start goes wrong: known messages, their cause, and the next step.

/// A known cause of a failed start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cause {
    pub code: &'static str,
    pub what: &'static str,
    pub fix: &'static str,
    /// Waiting longer cannot help.
    pub fatal: bool,
}

/// Message fragments, all of which must stand in one line, and what they mean. First match wins; the most telling come first.
const CATALOGUE: &[(&[&str], Cause)] = &[
    (
        &["bootstrap data", "different token"],
        Cause {
            code: "DATA_TOKEN_CONFLICT",
            what: "the datastore was made with another token",
            fix: "restore the former token, or move /var/lib/rancher/k3s away",
            fatal: true,
        },
    ),
    (
        &["Node password rejected"],
        Cause {
            code: "NODE_NAME_TAKEN",
            what: "the server knows another machine of this name",
            fix: "on the server: kubectl delete node NAME, or choose another --node-name",
            fatal: true,
        },
    ),
    (
        &["token CA hash does not match"],
        Cause {
            code: "JOIN_CA_MISMATCH",
            what: "the token belongs to another cluster",
            fix: "get a fresh line with `pipeops cluster-info --join` on the server",
            fatal: true,
        },
    ),
    (
        &["not authorized"],
        Cause {
            code: "JOIN_TOKEN_REJECTED",
            what: "the server refuses the token",
            fix: "get a fresh line with `pipeops cluster-info --join` on the server",
            fatal: true,
        },
    ),
    (
        &["401 Unauthorized"],
        Cause {
            code: "JOIN_TOKEN_REJECTED",
            what: "the server refuses the token",
            fix: "get a fresh line with `pipeops cluster-info --join` on the server",
            fatal: true,
        },
    ),
    (
        &["certificate has expired or is not yet valid"],
        Cause {
            code: "CLOCK_SKEW",
            what: "a certificate is outside its time: a clock is wrong",
            fix: "set the clock (`timedatectl set-ntp true`), then run again",
            fatal: true,
        },
    ),
    (
        &["x509: certificate is valid for", "not"],
        Cause {
            code: "TLS_SAN_MISSING",
            what: "the server's certificate does not name the address used",
            fix: "on the server: pipeops install-server --tls-san THAT_ADDRESS",
            fatal: true,
        },
    ),
    (
        &["x509: certificate signed by unknown authority"],
        Cause {
            code: "JOIN_CA_MISMATCH",
            what: "something else answers in the server's place, or its CA changed",
            fix: "check the address, and for a proxy that opens TLS",
            fatal: true,
        },
    ),
    (
        &["flag provided but not defined"],
        Cause {
            code: "K3S_SETTING_UNKNOWN",
            what: "this k3s does not know one of the settings",
            fix: "remove it from the [k3s] table or from /etc/rancher/k3s/config.yaml.d",
            fatal: true,
        },
    ),
    (
        &["unknown flag: --"],
        Cause {
            code: "K3S_SETTING_UNKNOWN",
            what: "this k3s does not know one of the settings",
            fix: "remove it from the [k3s] table or from /etc/rancher/k3s/config.yaml.d",
            fatal: true,
        },
    ),
    (
        &["cgroup v1", "unsupported"],
        Cause {
            code: "CGROUP_V1_UNSUPPORTED",
            what: "this Kubernetes does not start on cgroup v1",
            fix: "boot with systemd.unified_cgroup_hierarchy=1, or use --channel v1.34",
            fatal: true,
        },
    ),
    (
        &["kubelet is configured to not run on a host using cgroup v1"],
        Cause {
            code: "CGROUP_V1_UNSUPPORTED",
            what: "this Kubernetes does not start on cgroup v1",
            fix: "boot with systemd.unified_cgroup_hierarchy=1, or use --channel v1.34",
            fatal: true,
        },
    ),
    (
        &["failed to find memory cgroup"],
        Cause {
            code: "CGROUP_MEMORY_OFF",
            what: "the memory cgroup controller is off",
            fix: "append `cgroup_memory=1 cgroup_enable=memory` to the kernel command line and reboot",
            fatal: true,
        },
    ),
    (
        &["address already in use"],
        Cause { code: "PORT_IN_USE", what: "a port that k3s needs is taken", fix: "`ss -ltnp` names the program; stop it", fatal: true },
    ),
    (&["no default routes found"], Cause { code: "ROUTE_NONE", what: "there is no default route", fix: "add one, then run again", fatal: true }),
    (
        &["no space left on device"],
        Cause { code: "DISK_LOW", what: "a disk is full", fix: "free space under /var/lib/rancher, then run again", fatal: true },
    ),
    (
        &["/dev/kmsg", "no such file"],
        Cause { code: "LXC_FEATURES", what: "/dev/kmsg is missing in this container", fix: "let the host bind /dev/kmsg into it", fatal: true },
    ),
    (
        &["failed to create overlay", "operation not permitted"],
        Cause { code: "LXC_FEATURES", what: "the host does not allow overlay mounts in this container", fix: "turn nesting on for it", fatal: true },
    ),
    (
        &["critical configuration value mismatch"],
        Cause {
            code: "SERVER_CONFIG_MISMATCH",
            what: "this server's settings differ from the other servers'",
            fix: "give it the same cluster-cidr, service-cidr and disable settings",
            fatal: true,
        },
    ),
    (
        &["database disk image is malformed"],
        Cause { code: "DATASTORE_DAMAGED", what: "the datastore is damaged", fix: "restore /var/lib/rancher/k3s/server/db from a copy", fatal: true },
    ),
    (
        &["failed to load kernel module", "br_netfilter"],
        Cause { code: "KMOD_MISSING", what: "a kernel module is missing", fix: "install your distribution's extra kernel modules", fatal: false },
    ),
    (
        &["connection refused", "/cacerts"],
        Cause {
            code: "SERVER_UNREACHABLE",
            what: "the server refuses connections",
            fix: "check that k3s runs there and the port is 6443",
            fatal: false,
        },
    ),
    (
        &["context deadline exceeded", "/cacerts"],
        Cause { code: "SERVER_UNREACHABLE", what: "the server does not answer", fix: "check the address and firewalls for 6443/tcp", fatal: false },
    ),
    (
        &["toomanyrequests"],
        Cause {
            code: "REGISTRY_RATE_LIMIT",
            what: "the image registry limits downloads",
            fix: "wait, or use --registries with a mirror",
            fatal: false,
        },
    ),
    (
        &["failed to pull", "no such host"],
        Cause {
            code: "DNS_BROKEN",
            what: "names cannot be resolved, so images cannot be pulled",
            fix: "check /etc/resolv.conf, or use --offline-dir",
            fatal: false,
        },
    ),
    (
        &["failed to pull image"],
        Cause {
            code: "IMAGE_PULL_FAILED",
            what: "an image cannot be pulled",
            fix: "check the way to the registry, or use --offline-dir",
            fatal: false,
        },
    ),
    (
        &["apply request took too long"],
        Cause { code: "DISK_FSYNC_SLOW", what: "the data disk is too slow", fix: "use a local SSD for /var/lib/rancher", fatal: false },
    ),
];

/// The cause that `log` shows, the latest telling line with it.
pub fn classify(log: &str) -> Option<(Cause, String)> {
    for (fragments, cause) in CATALOGUE {
        let hit = log.lines().rev().find(|line| {
            let lower = line.to_lowercase();
            fragments.iter().all(|f| lower.contains(&f.to_lowercase()))
        });
        if let Some(line) = hit {
            return Some((*cause, line.trim().to_owned()));
        }
    }
    None
}

/// The last lines worth showing: errors and warnings before chatter.
pub fn telling(log: &str, most: usize) -> Vec<String> {
    let marked: Vec<&str> =
        log.lines().filter(|l| ["level=error", "level=fatal", "level=warning", "Error:", "failed"].iter().any(|m| l.contains(m))).collect();
    let from = if marked.is_empty() { log.lines().collect() } else { marked };
    from.iter().rev().take(most).rev().map(|l| l.trim().to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lines as k3s and the kubelet print them, each with the code it must get.
    const FIXTURES: &[(&str, &str)] = &[
        (
            "DATA_TOKEN_CONFLICT",
            r#"level=fatal msg="starting kubernetes: preparing server: bootstrap data already found and encrypted with different token""#,
        ),
        (
            "NODE_NAME_TAKEN",
            r#"level=error msg="Node password rejected, duplicate hostname or contents of '/etc/rancher/node/password' may not match server node-passwd entry, try enabling a unique node name with the --with-node-id flag""#,
        ),
        ("JOIN_CA_MISMATCH", r#"level=fatal msg="Error: token CA hash does not match the Cluster CA certificate hash: 1111 != 2222""#),
        ("JOIN_TOKEN_REJECTED", r#"level=error msg="Failed to retrieve agent configuration: https://10.0.0.1:6443/v1-k3s/config: 401 Unauthorized""#),
        ("JOIN_TOKEN_REJECTED", r#"level=fatal msg="starting kubernetes: preparing server: failed to validate token: not authorized""#),
        (
            "CLOCK_SKEW",
            r#"level=error msg="failed to get CA certs: Get \"https://127.0.0.1:6444/cacerts\": x509: certificate has expired or is not yet valid: current time 2020-01-01T00:00:00Z is before 2026-01-01T00:00:00Z""#,
        ),
        (
            "TLS_SAN_MISSING",
            r#"level=error msg="Get \"https://203.0.113.7:6443/v1-k3s/config\": tls: failed to verify certificate: x509: certificate is valid for 10.0.0.1, 10.43.0.1, 127.0.0.1, not 203.0.113.7""#,
        ),
        ("JOIN_CA_MISMATCH", r#"level=error msg="x509: certificate signed by unknown authority""#),
        ("K3S_SETTING_UNKNOWN", r#"Incorrect Usage: flag provided but not defined: -flannel-backend"#),
        (
            "CGROUP_V1_UNSUPPORTED",
            r#"E0101 kubelet.go:1 "Failed to run kubelet" err="failed to run Kubelet: kubelet is configured to not run on a host using cgroup v1. cgroup v1 support is unsupported""#,
        ),
        (
            "CGROUP_MEMORY_OFF",
            r#"level=fatal msg="failed to find memory cgroup, you may need to add \"cgroup_memory=1 cgroup_enable=memory\" to your linux cmdline (/boot/cmdline.txt on a Raspberry Pi)""#,
        ),
        ("PORT_IN_USE", r#"level=fatal msg="Failed to start networking: unable to listen: listen tcp 0.0.0.0:6443: bind: address already in use""#),
        ("ROUTE_NONE", r#"level=fatal msg="no default routes found in \"/proc/net/route\" or \"/proc/net/ipv6_route\"""#),
        ("DISK_LOW", r#"level=fatal msg="extracting data: write /var/lib/rancher/k3s/data/.x/bin/containerd: no space left on device""#),
        (
            "LXC_FEATURES",
            r#"E0101 server.go:1 "Failed to run kubelet" err="failed to run Kubelet: failed to create kubelet: open /dev/kmsg: no such file or directory""#,
        ),
        (
            "SERVER_CONFIG_MISMATCH",
            r#"level=fatal msg="starting kubernetes: preparing server: failed to validate server configuration: critical configuration value mismatch between servers""#,
        ),
        ("DATASTORE_DAMAGED", r#"level=error msg="error while range on /registry/health: database disk image is malformed""#),
        (
            "SERVER_UNREACHABLE",
            r#"level=error msg="failed to get CA certs: Get \"https://127.0.0.1:6444/cacerts\": dial tcp 127.0.0.1:6444: connect: connection refused /cacerts""#,
        ),
        (
            "REGISTRY_RATE_LIMIT",
            r#"failed to pull and unpack image "docker.io/rancher/mirrored-pause:3.6": 429 Too Many Requests - toomanyrequests: You have reached your unauthenticated pull rate limit"#,
        ),
        ("DNS_BROKEN", r#"Failed to pull image "rancher/mirrored-coredns-coredns:1.14.4": dial tcp: lookup registry-1.docker.io: no such host"#),
        ("DISK_FSYNC_SLOW", r#"{"level":"warn","msg":"apply request took too long","took":"2.1s"}"#),
    ];

    #[test]
    fn every_fixture_gets_its_code() {
        for (code, line) in FIXTURES {
            let log = format!("level=info msg=\"Starting k3s\"\n{line}\nlevel=info msg=\"later chatter\"\n");
            assert_eq!(classify(&log).map(|(cause, _)| cause.code), Some(*code), "{line}");
        }
    }

    #[test]
    fn a_healthy_start_has_no_cause() {
        let log = "level=info msg=\"Starting k3s v1.36.2+k3s1\"\nlevel=info msg=\"Waiting for API server to become available\"\n\
                   level=info msg=\"k3s is up and running\"\n";
        assert_eq!(classify(log), None);
    }
}
