//! What people type and paste: names of settings, ranges, labels, addresses, tokens,
//! registries.yaml. Each wrong one is told by its name before anything is written.

use crate::join::{Behavior, Server, join};
use crate::support::{RunOutput, Sandbox, assert_same_tree};

fn plan(sandbox: &Sandbox, more: &[&str]) -> RunOutput {
    let release = sandbox.path("release");
    let mut args = vec!["install-server", "--offline-dir", &release, "--dry-run"];
    args.extend(more);
    sandbox.run(&args)
}

fn with_table(sandbox: &Sandbox, table: &str, more: &[&str]) -> RunOutput {
    sandbox.beside("typed.toml", &format!("[k3s]\n{table}\n"), 0o600);
    let config = sandbox.path("typed.toml");
    plan(sandbox, &[&["--config", &config], more].concat())
}

#[test]
fn a_key_that_k3s_does_not_know_stops_the_run_unless_it_is_overruled() {
    let sandbox = Sandbox::new();
    for (table, says) in [
        ("cluster-cird = \"10.52.0.0/16\"", "did you mean `cluster-cidr`?"),
        ("kubelet_arg = [\"v=2\"]", "write it `kubelet-arg`"),
        ("\"--disable\" = [\"traefik\"]", "write it `disable`"),
        ("etcd-snapshot-retension = 5", "did you mean `etcd-snapshot-retention`?"),
        ("no-deploy = \"traefik\"", "use disable"),
        ("disable-apiserver-lb = true", "on workers only"),
    ] {
        let said = with_table(&sandbox, table, &[]).ended(3);
        assert!(
            said.err.contains("K3S_SETTING_UNKNOWN") && said.err.contains(says),
            "{table}: {}",
            said.err
        );
        let said = with_table(&sandbox, table, &["--ignore", "K3S_SETTING_UNKNOWN"]).ended(0);
        assert!(said.err.contains("ignored K3S_SETTING_UNKNOWN"), "{}", said.err);
    }
    with_table(
        &sandbox,
        "kubelet-arg = [\"v=2\"]\nsupervisor-metrics = true\nflannel-ipv6-masq = true",
        &[],
    )
    .ended(0);
    // one that came later than the line is only warned of: patch releases got some
    sandbox.beside(
        "release/k3s",
        &std::fs::read_to_string(sandbox.path("release/k3s"))
            .unwrap()
            .replace("v1.36.2", "v1.30.4"),
        0o755,
    );
    let list = format!(
        "{}  k3s\n{}  k3s-airgap-images-amd64.tar\n",
        crate::support::sha256(&std::fs::read(sandbox.path("release/k3s")).unwrap()),
        crate::support::sha256(b"images")
    );
    sandbox.beside("release/sha256sum-amd64.txt", &list, 0o644);
    let said = with_table(&sandbox, "nonroot-devices = true", &[]).ended(0);
    assert!(
        said.err.contains("warning K3S_SETTING_UNKNOWN")
            && said.err.contains("it came with k3s 1.31"),
        "{}",
        said.err
    );
}

#[test]
fn values_that_k3s_cannot_read_are_refused() {
    let sandbox = Sandbox::new();
    for (table, says) in [
        ("node_ip = \"10.0.0.5\"", "pipeops owns this setting; use --node-ip"),
        ("\"--Node-Name\" = \"x\"", "pipeops owns this setting; use --node-name"),
        ("t = \"planted-token-0123456789\"", "pipeops owns this setting; use --token-file"),
        ("cluster-cidr = \"10.42/16\"", "as in 10.42.0.0/16"),
        ("service-cidr = \"10.43.0.0\"", "as in 10.43.0.0/16"),
        ("disable-network-policy = \"yes\"", "true or false"),
        ("flannel-backend = \"wireguard\"", "did you mean `wireguard-native`"),
        ("etcd-s3-timeout = 300", "with its unit"),
        ("[k3s.kubelet-arg]\nmax-pods = 200", "not a table"),
    ] {
        let said = with_table(&sandbox, table, &[]).ended(2);
        assert!(
            said.err.contains("SETTINGS_INVALID")
                && said.err.contains(says)
                && !said.err.contains("planted"),
            "{table}: {}",
            said.err
        );
    }
    let odd =
        with_table(&sandbox, "cluster-cidr = \"10.52.7.0/16\"", &["--tls-san", "*.example.com"])
            .ended(0);
    assert!(
        odd.err.contains("k3s takes it as 10.52.0.0/16")
            && odd.err.contains("*.example.com has no effect"),
        "{}",
        odd.err
    );
}

#[test]
fn labels_taints_names_and_interfaces_are_judged_as_the_node_will() {
    let sandbox = Sandbox::new();
    let before = sandbox.tree();
    for (args, exit, says) in [
        (&["--node-label", "node-role.kubernetes.io/worker=true"][..], 2, "node.kubernetes.io/…"),
        (&["--node-label", "k8s.io/role=x"], 2, "the kubelet ends"),
        (&["--node-label", "disk=ssd fast"], 2, "a value is"),
        (&["--node-taint", "a=b:noschedule"], 2, "did you mean NoSchedule"),
        (&["--node-taint", "a=b:NoSchedule,a=c:NoSchedule"], 2, "are there already"),
        (&["--tls-san", "https://api.example.com"], 2, "leave the scheme out"),
        (&["--tls-san", "api.example.com:6443"], 2, "leave the port out"),
        (&["--flannel-iface", "eth9"], 3, "ADDRESS_UNKNOWN there is no interface eth9"),
        (&["--flannel-iface", "enp1s0"], 3, "another name of eth0: --flannel-iface eth0"),
    ] {
        let address = r#"[{"ifname":"eth0","altnames":["enp1s0"],"addr_info":[{"family":"inet","local":"10.0.0.5","prefixlen":24}]}]"#;
        sandbox.beside("ip-address.json", address, 0o644);
        let said = plan(&sandbox, args).ended(exit);
        assert!(said.err.contains(says), "{args:?}: {}", said.err);
    }
    assert_same_tree(&sandbox.tree(), &before, "");
    let sans =
        ["--tls-san", "API.Example.COM", "--tls-san", "a.example.com, b.example.com ,k3s_master"];
    let good = [
        "--node-label",
        "topology.kubernetes.io/zone=a",
        "--node-taint",
        "a:NoExecute",
        "--flannel-iface",
        "eth0",
    ];
    sandbox.install(&[&sans[..], &good].concat()).ended(0);
    let drop_in = sandbox.read("/etc/rancher/k3s/config.yaml.d/50-pipeops.yaml");
    for name in ["api.example.com", "a.example.com", "b.example.com", "k3s_master"] {
        assert!(drop_in.contains(&format!("  - \"{name}\"\n")), "{drop_in}");
    }
}

#[test]
fn a_registries_file_that_has_no_effect_is_refused() {
    let sandbox = Sandbox::new();
    for (text, says) in [
        (
            "mirrros:\n  docker.io:\n    endpoint: [\"https://m\"]\n",
            "mirrros (line 1): there is no such key; did you mean `mirrors`?",
        ),
        (
            "mirrors:\n  docker.io:\n    endpoints: [\"https://m\"]\n",
            "(line 3): there is no such key; did you mean `endpoint`?",
        ),
        ("mirrors:\n  docker.io:\n    endpoint: https://m\n", "it is text, where a list belongs"),
        ("mirrors:\n  docker.io:\n    rewrite: {\"(rancher\": x}\n", "not a regular expression"),
        ("- docker.io\n", "it is a list"),
        ("docker.io\n", "it is text"),
        ("", "it is empty"),
        ("configs: {m: {tls: {ca_file: /etc/ssl/mine.pem}}}\n", "/etc/ssl/mine.pem is not there"),
        (
            "configs: {m: {auth: {pasword: planted-password-0123456789}}}\n",
            "did you mean `password`?",
        ),
    ] {
        sandbox.beside("registries.yaml", text, 0o600);
        let said = plan(&sandbox, &["--registries", &sandbox.path("registries.yaml")]).ended(2);
        assert!(
            said.err.contains("REGISTRIES_INVALID")
                && said.err.contains(says)
                && !said.err.contains("planted"),
            "{text}: {}",
            said.err
        );
    }
    sandbox.put("/etc/ssl/mine.pem", "");
    sandbox.beside("registries.yaml", "configs: {m: {tls: {ca_file: /etc/ssl/mine.pem}}}\n", 0o600);
    plan(&sandbox, &["--registries", &sandbox.path("registries.yaml")]).ended(0);
}

#[test]
fn a_machine_that_was_renamed_keeps_its_node() {
    let sandbox = Sandbox::new();
    sandbox.install(&[]).ended(0);
    sandbox.put("/proc/sys/kernel/hostname", "vm2\n");
    let again = sandbox.install(&[]).ended(0);
    assert!(
        again.out.contains("nothing to do")
            && again
                .err
                .contains("NODE_RENAMED this machine is called vm2 now; its node stays vm1"),
        "{}",
        again.err
    );
    assert!(
        sandbox
            .read("/etc/rancher/k3s/config.yaml.d/50-pipeops.yaml")
            .contains("node-name: \"vm1\"")
    );
    let refused = sandbox.install(&["--node-name", "vm2"]).ended(3);
    assert!(refused.err.contains("kubectl delete node vm1"), "{}", refused.err);
    // one that was named once keeps that name without being told again
    let named = Sandbox::new();
    named.install(&["--node-name", "db1"]).ended(0);
    let again = named.install(&[]).ended(0);
    assert!(
        named.read("/etc/rancher/k3s/config.yaml.d/50-pipeops.yaml").contains("node-name: \"db1\""),
        "{}",
        again.err
    );
    assert!(!again.err.contains("returns to its default"), "{}", again.err);
}

#[test]
fn a_master_by_name_takes_the_route_that_its_address_takes() {
    let server = Server::start(Behavior::Good);
    for master in [
        server.url.clone(),
        server.url.replace("127.0.0.1", "localhost"),
        server.url.replace("https", "HTTPS"),
    ] {
        let sandbox = Sandbox::new();
        let address = r#"[{"ifname":"eth0","addr_info":[{"family":"inet","local":"198.51.100.7","prefixlen":24}]},{"ifname":"eth1","addr_info":[{"family":"inet","local":"10.9.0.5","prefixlen":24}]}]"#;
        sandbox.beside("ip-address.json", address, 0o644);
        let route = r#"[{"dst":"default","gateway":"198.51.100.1","dev":"eth0","prefsrc":"198.51.100.7"},{"dst":"127.0.0.0/8","dev":"eth1","prefsrc":"10.9.0.5"}]"#;
        sandbox.beside("ip-route.json", route, 0o644);
        join(&sandbox, &master, &server.token(), &[]).ended(0);
        let drop_in = sandbox.read("/etc/rancher/k3s/config.yaml.d/50-pipeops.yaml");
        assert!(
            drop_in.contains("node-ip: \"10.9.0.5\"")
                && drop_in.contains("flannel-iface: \"eth1\""),
            "{master}: {drop_in}"
        );
    }
}

#[test]
fn a_master_that_is_none_is_told_by_its_fault() {
    let sandbox = Sandbox::new();
    let before = sandbox.tree();
    for (master, says) in [
        ("fe80::1%eth0", "the zone (%eth0)"),
        ("\"https://10.0.0.1\"", "there is a quote in it"),
        ("\u{feff}10.0.0.1", "U+FEFF"),
        ("10.0.0.1\u{200b}", "U+200B"),
        ("010.000.000.005", "is 10.0.0.5 meant?"),
        ("https://10.0.0.1:6443/cacerts", "nothing comes after the port"),
        ("10.0.0.1, 10.0.0.2", "a blank"),
    ] {
        let said = join(&sandbox, master, "K10x::node:planted-password-0123456789", &[]).ended(2);
        assert!(
            said.err.contains("MASTER_INVALID") && said.err.contains(says),
            "{master}: {}",
            said.err
        );
    }
    let swapped =
        join(&sandbox, "K10x::node:planted-password-0123456789", "10.0.0.1", &[]).ended(2);
    assert!(
        swapped.err.contains("MASTER comes first") && !swapped.err.contains("planted"),
        "{}",
        swapped.err
    );
    assert_same_tree(&sandbox.tree(), &before, "");
    // names that DNS and /etc/hosts may have are asked for, not judged
    let asked = join(&sandbox, "https://k3s_master.invalid:16443", "K10x::node:y", &[]);
    assert!(!asked.err.contains("invalid characters"), "{}", asked.err);
}

#[test]
fn a_token_with_what_pasting_leaves_around_it_is_taken() {
    let server = Server::start(Behavior::Good);
    let token = server.token();
    for around in ["\"_\"", "'_'", "\u{feff}_", "_\u{200b}", "_\r\n"] {
        let sandbox = Sandbox::new();
        sandbox.beside("token", &around.replace('_', &token), 0o600);
        let release = sandbox.path("release");
        let file = sandbox.path("token");
        let args = [
            "join-worker",
            &server.url,
            "--token-file",
            &file,
            "--offline-dir",
            &release,
            "--yes",
            "--timeout",
            "20s",
        ];
        sandbox.run(&args).ended(0);
        assert_eq!(sandbox.read("/etc/rancher/k3s/pipeops-token").trim(), token, "{around}");
    }
    let sandbox = Sandbox::new();
    for (typed, says) in [
        (format!("K3S_TOKEN={token}"), "begins with `K3S_TOKEN=`"),
        (token.replace("K10", "k10"), "begins with k10"),
        (token.replace("::", ":::"), "three colons"),
        (token.replace("::", "\u{200b}::"), "U+200B"),
    ] {
        let said = join(&sandbox, &server.url, &typed, &[]).ended(2);
        assert!(
            said.err.contains("JOIN_TOKEN_MALFORMED") && said.err.contains(says),
            "{}",
            said.err
        );
        assert!(!said.err.contains("0123456789abcdef"), "{}", said.err);
    }
}
