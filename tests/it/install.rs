//! `install-server`, `cluster-info` and `uninstall` in a sandbox.

use crate::support::{RunOutput, Sandbox, VERSION, assert_same_tree, each_kill_point, sha256};

#[test]
fn a_fresh_install_a_second_run_and_an_uninstall() {
    let sandbox = Sandbox::new();
    let before = sandbox.tree();
    let said = sandbox.install(&[]).ended(0);
    assert!(said.out.contains(&format!("vm1 is a k3s {VERSION} server, Ready.")), "{}", said.out);
    let objects: Vec<String> = sandbox.api.objects.lock().unwrap().keys().cloned().collect();
    for namespace in ["production", "beta", "pipeops", "monitoring"] {
        assert!(objects.contains(&format!("/api/v1/namespaces/{namespace}")), "{objects:?}");
    }
    assert_eq!(
        objects
            .iter()
            .filter(|o| o.starts_with("/api/v1/namespaces/") && o.split('/').count() == 5)
            .count(),
        4
    );
    assert!(
        objects.contains(&"/api/v1/namespaces/pipeops/serviceaccounts/pipeops-agent".to_owned())
    );
    let drop_in = sandbox.read("/etc/rancher/k3s/config.yaml.d/50-pipeops.yaml");
    for line in [
        "secrets-encryption: true",
        "write-kubeconfig-mode: \"0600\"",
        "node-ip: \"10.0.0.5\"",
        "flannel-iface: \"eth0\"",
        "  - \"10.0.0.5\"",
    ] {
        assert!(drop_in.contains(line), "{drop_in}");
    }

    let (tree, calls, writes) =
        (sandbox.tree(), sandbox.calls(), sandbox.api.writes.lock().unwrap().len());
    let again = sandbox.install(&[]).ended(0);
    assert!(again.out.contains("nothing to do"), "{}\n{}", again.out, again.err);
    assert_same_tree(&sandbox.tree(), &tree, "");
    assert_eq!(sandbox.api.writes.lock().unwrap().len(), writes);
    let new_calls = sandbox.calls()[calls.len()..].to_owned();
    for verb in
        ["systemctl start", "systemctl restart", "systemctl enable", "systemctl daemon-reload"]
    {
        assert!(!new_calls.contains(verb), "{new_calls}");
    }

    sandbox.run(&["uninstall", "--yes"]).ended(0);
    assert_same_tree(&sandbox.tree(), &before, "");
}

/// What stands before an API server that begins or ends answers 502.
#[test]
fn an_api_server_that_falters_is_asked_again() {
    let sandbox = Sandbox::new();
    sandbox.install(&[]).ended(0);
    *sandbox.api.faltering.lock().unwrap() = 2;
    let again = sandbox.install(&[]).ended(0);
    assert!(again.out.contains("nothing to do"), "{}\n{}", again.out, again.err);
    // longer than it is waited for while looking: what it is then comes out when the step has its
    // turn
    *sandbox.api.faltering.lock().unwrap() = 8;
    sandbox.install(&[]).ended(0);
}

#[test]
fn a_dry_run_writes_nothing_and_lists_everything() {
    let sandbox = Sandbox::new();
    let before = sandbox.tree();
    let release = sandbox.path("release");
    let said = sandbox
        .run(&["install-server", "--offline-dir", &release, "--dry-run", "-o", "json"])
        .ended(0);
    let json = said.json();
    assert_eq!(json["result"], "dry_run");
    assert!(json["plan"].as_array().unwrap().len() > 20);
    assert_same_tree(&sandbox.tree(), &before, "");
    assert!(!sandbox.root().join("var/lib/pipeops").exists());
    assert!(!sandbox.root().join("var/log/pipeops").exists());
}

#[test]
fn six_planted_faults_are_reported_at_once_and_nothing_is_written() {
    let sandbox = Sandbox::new();
    sandbox.put(
        "/proc/net/tcp",
        "  sl  local_address rem_address st\n 0: 00000000:192B 00000000:0000 0A 0 0 0 0 0 4242 1\n",
    );
    sandbox.put("/proc/812/comm", "nginx\n");
    std::fs::create_dir_all(sandbox.root().join("proc/812/fd")).unwrap();
    std::os::unix::fs::symlink("socket:[4242]", sandbox.root().join("proc/812/fd/3")).unwrap();
    sandbox.put("/etc/resolv.conf", "nameserver 127.0.0.53\n");
    sandbox.put("/proc/meminfo", "MemTotal:         300000 kB\nSwapTotal: 0 kB\n");
    sandbox.put("/sys/fs/cgroup/cgroup.controllers", "cpuset cpu io pids\n");
    sandbox.beside("ip-route.json", r#"[{"dst":"default","dev":"eth0","prefsrc":"10.0.0.5"},{"dst":"10.42.0.0/15","dev":"vpn0"}]"#, 0o644);
    sandbox.put("/lib/modules/6.1.0-40-amd64/modules.dep", "kernel/net/br_netfilter.ko:\n");
    let before = sandbox.tree();
    let said = sandbox.install(&["-o", "json"]).ended(3);
    let json = said.json();
    let codes: Vec<&str> = json["findings"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|f| f["level"] == "error")
        .map(|f| f["code"].as_str().unwrap())
        .collect();
    for code in [
        "PORT_IN_USE",
        "DNS_LOOPBACK",
        "MEMORY_LOW",
        "CGROUP_MEMORY_OFF",
        "CIDR_OVERLAP",
        "KMOD_MISSING",
    ] {
        assert!(codes.contains(&code), "{codes:?}");
    }
    assert!(said.err.contains("`nginx` (pid 812)"), "{}", said.err);
    assert_same_tree(&sandbox.tree(), &before, "");
}

#[test]
fn killed_after_every_write_of_the_journal_a_rerun_ends_the_same() {
    let whole = Sandbox::new();
    whole.install(&[]).ended(0);
    let expected = normal(&whole);
    let points = each_kill_point(|at| {
        let sandbox = Sandbox::new();
        let before = sandbox.tree();
        let release = sandbox.path("release");
        let args = ["install-server", "--offline-dir", &release, "--yes", "--timeout", "20s"];
        let said = sandbox.run_with(&args, &[("PIPEOPS_KILL_AT", &at.to_string())]);
        if said.code == 0 {
            return false;
        }
        assert_eq!(said.code, -1, "killed by a signal\n{}", said.err);
        sandbox.install(&[]).ended(0);
        let now = normal(&sandbox);
        assert_same_tree(&now.0, &expected.0, &format!("killed after write {at}"));
        assert_eq!((&now.1, &now.2), (&expected.1, &expected.2), "killed after write {at}");
        if at % 4 == 0 {
            sandbox.run(&["uninstall", "--yes"]).ended(0);
            assert_same_tree(
                &sandbox.tree(),
                &before,
                &format!("killed after write {at}, then uninstalled"),
            );
        }
        true
    });
    assert!(points > 40, "the run was killed at {points} points");
}

/// The tree, with the journal's own text left out but for its entries' ids, and the objects.
fn normal(
    sandbox: &Sandbox,
) -> (std::collections::BTreeMap<String, String>, Vec<String>, Vec<String>) {
    let mut tree = sandbox.tree();
    tree.remove("/var/lib/pipeops/journal.json");
    // they name the port of this sandbox's API
    for path in ["/etc/rancher/k3s/k3s.yaml", "/var/lib/rancher/k3s/kubeconfig"] {
        assert!(tree.remove(path).is_some(), "{path}");
    }
    let journal: serde_json::Value =
        serde_json::from_str(&sandbox.read("/var/lib/pipeops/journal.json")).unwrap();
    assert_eq!(journal["complete"], true);
    let ids = journal["entries"]
        .as_array()
        .unwrap()
        .iter()
        .map(|e| format!("{} {}", e["id"], e["state"]))
        .collect();
    (tree, ids, sandbox.api.objects.lock().unwrap().keys().cloned().collect())
}

#[test]
fn uninstall_can_be_killed_too() {
    let sandbox = Sandbox::new();
    let before = sandbox.tree();
    for at in [1, 2, 5, 9, 14, 19] {
        sandbox.install(&[]).ended(0);
        let killed =
            sandbox.run_with(&["uninstall", "--yes"], &[("PIPEOPS_KILL_AT", &at.to_string())]);
        assert_eq!(killed.code, -1, "{}", killed.err);
        sandbox.run(&["uninstall", "--yes"]).ended(0);
        assert_same_tree(&sandbox.tree(), &before, &format!("killed after write {at}"));
    }
}

#[test]
fn one_more_san_changes_one_file_and_restarts_once() {
    let sandbox = Sandbox::new();
    sandbox.install(&["--node-label", "a=b"]).ended(0);
    sandbox.put("/etc/rancher/k3s/config.yaml.d/99-mine.yaml", "debug: true\n");
    let (tree, calls) = (sandbox.tree(), sandbox.calls());
    let said = sandbox
        .install(&["--node-label", "a=b", "--tls-san", "api.example.com", "-o", "json"])
        .ended(0);
    assert_eq!(
        said.json()["changes"],
        serde_json::json!(["write the k3s settings", "start k3s.service"])
    );
    let changed: Vec<String> = sandbox
        .tree()
        .into_iter()
        .filter(|(k, v)| tree.get(k) != Some(v))
        .map(|(k, _)| k)
        .collect();
    assert_eq!(
        changed,
        ["/etc/rancher/k3s/config.yaml.d/50-pipeops.yaml", "/var/lib/pipeops/journal.json"]
    );
    assert_eq!(
        sandbox.calls()[calls.len()..].matches("systemctl restart --no-block k3s.service").count(),
        1
    );
    assert!(sandbox.read("/etc/rancher/k3s/config.yaml.d/50-pipeops.yaml").contains("a=b"));
}

#[test]
fn another_token_or_control_plane_changes_only_the_agent_and_a_spent_token_nothing() {
    let sandbox = Sandbox::new();
    let release = sandbox.path("release");
    let install = |token: &str, url: &str| {
        let args = [
            "install-server",
            "--yes",
            "--offline-dir",
            &release,
            "--timeout",
            "20s",
            "-o",
            "json",
        ];
        sandbox
            .run_with(&args, &[("AGENT_TOKEN", token), ("PIPEOPS_CONTROL_PLANE_URL", url)])
            .ended(0)
            .json()["changes"]
            .clone()
    };
    let none: Vec<String> = Vec::new();
    install("first-canary-4711-in-plain-text", "https://one.test");
    assert_eq!(
        install("first-canary-4711-in-plain-text", "https://one.test"),
        serde_json::json!(none)
    );
    // root's unit empties it once it is used
    sandbox.put("/etc/pipeops/agent-token", "");
    assert_eq!(
        install("first-canary-4711-in-plain-text", "https://one.test"),
        serde_json::json!(none)
    );
    assert_eq!(
        install("second-canary-4711-in-plain-text", "https://one.test"),
        serde_json::json!(["write the agent's token file", "start the agent"])
    );
    assert_eq!(sandbox.read("/etc/pipeops/agent-token"), "second-canary-4711-in-plain-text");
    assert_eq!(
        install("second-canary-4711-in-plain-text", "https://two.test"),
        serde_json::json!(["write the agent's settings", "start the agent"])
    );
    assert!(!sandbox.calls().contains("restart --no-block k3s.service"));
}

#[test]
fn fewer_options_are_shown_and_asked_about() {
    let sandbox = Sandbox::new();
    sandbox.install(&["--tls-san", "api.example.com"]).ended(0);
    let release = sandbox.path("release");
    let said = sandbox.run(&["install-server", "--offline-dir", &release]).ended(11);
    assert!(
        said.err.contains("tls-san was `api.example.com` and is not given now"),
        "{}",
        said.err
    );
    assert!(
        sandbox.read("/etc/rancher/k3s/config.yaml.d/50-pipeops.yaml").contains("api.example.com")
    );
    sandbox.install(&[]).ended(0);
    assert!(
        !sandbox.read("/etc/rancher/k3s/config.yaml.d/50-pipeops.yaml").contains("api.example.com")
    );
}

/// A run that names no k3s keeps the one that is there, and must not say that it goes back.
#[test]
fn a_version_that_is_not_named_again_stays_and_is_said_to() {
    let sandbox = Sandbox::new();
    sandbox.install(&["--k3s-version", VERSION]).ended(0);
    let release = sandbox.path("release");
    let said = sandbox
        .run(&["install-server", "--offline-dir", &release, "--tls-san", "a.example.com"])
        .ended(11);
    assert!(
        said.err.contains(&format!(
            "k3s-version was `{VERSION}` and is not given now: k3s stays at {VERSION}"
        )),
        "{}",
        said.err
    );
    assert!(!said.err.contains("returns to its default"), "{}", said.err);
}

#[test]
fn somebodys_edit_of_an_owned_file_is_reported_and_kept() {
    let sandbox = Sandbox::new();
    sandbox.install(&[]).ended(0);
    let path = "/etc/rancher/k3s/config.yaml.d/50-pipeops.yaml";
    let edited = format!("{}debug: true\n", sandbox.read(path));
    sandbox.put(path, &edited);
    let said = sandbox.install(&[]).ended(0);
    assert!(said.err.contains("CONFIG_DRIFT"), "{}", said.err);
    let kept: Vec<_> =
        std::fs::read_dir(sandbox.root().join("var/log/pipeops/kept")).unwrap().flatten().collect();
    assert_eq!(std::fs::read_to_string(kept[0].path()).unwrap(), edited);
    assert!(!sandbox.read(path).contains("debug"));
}

#[test]
fn a_saved_plan_is_carried_out_exactly_or_not_at_all() {
    let sandbox = Sandbox::new();
    let (release, plan) = (sandbox.path("release"), sandbox.path("plan.json"));
    let before = sandbox.tree();
    sandbox.run(&["install-server", "--offline-dir", &release, "--plan-out", &plan]).ended(0);
    assert_same_tree(&sandbox.tree(), &before, "");

    let other = Sandbox::new();
    other.put("/etc/machine-id", "ffffffffffffffffffffffffffffffff\n");
    let said =
        other.run(&["install-server", "--offline-dir", &release, "--apply-plan", &plan]).ended(3);
    assert!(said.err.contains("PLAN_OTHER_HOST"), "{}", said.err);

    sandbox.put("/usr/local/bin/kubectl", "mine");
    let said =
        sandbox.run(&["install-server", "--offline-dir", &release, "--apply-plan", &plan]).ended(3);
    assert!(said.err.contains("PLAN_STALE") && said.err.contains("link kubectl"), "{}", said.err);
    std::fs::remove_file(sandbox.root().join("usr/local/bin/kubectl")).unwrap();

    sandbox
        .run(&[
            "install-server",
            "--offline-dir",
            &release,
            "--apply-plan",
            &plan,
            "--timeout",
            "20s",
        ])
        .ended(0);
    sandbox.beside("broken.json", "{", 0o644);
    sandbox
        .run(&[
            "install-server",
            "--apply-plan",
            &sandbox.path("broken.json"),
            "--offline-dir",
            &release,
        ])
        .ended(2);
}

/// The line that is printed is the one that works, and nothing beside a plan is ignored.
#[test]
fn a_saved_plan_says_how_it_is_carried_out_and_takes_no_other_options() {
    let sandbox = Sandbox::new();
    sandbox.put("/etc/resolv.conf", "nameserver 127.0.0.53\n");
    let (release, plan) = (sandbox.path("release"), sandbox.path("it's a plan.json"));
    let given = ["--cluster-name", "prod eu", "--ignore", "DNS_LOOPBACK,DISK_LOW"];
    let base = ["install-server", "--offline-dir", &release, "--timeout", "20s"];
    let out = [&base[..], &given, &["--plan-out", &plan]].concat();
    let said = sandbox.run(&out).ended(0);
    let line = said.err.lines().find(|l| l.contains("--apply-plan")).unwrap().trim().to_owned();

    for (more, named) in [
        (&["--components", "metrics"][..], "--components"),
        (&["--node-name", "zzz"][..], "--node-name"),
        (&["--cluster-name", "other"][..], "--cluster-name"),
    ] {
        let args = [&base[..], &["--apply-plan", &plan, "--dry-run"], more].concat();
        let said = sandbox.run(&args).ended(2);
        assert!(said.err.contains("PLAN_OPTIONS") && said.err.contains(named), "{}", said.err);
    }

    let edited = std::fs::read_to_string(&plan).unwrap();
    let edited = edited.replace("\"node\": \"vm1\"", "\"node\": \"vm2\"");
    sandbox.beside("edited.json", &edited, 0o600);
    let other = sandbox.path("edited.json");
    let args = [&base[..], &given[2..], &["--apply-plan", &other, "--dry-run"]].concat();
    let said = sandbox.run(&args).ended(3);
    assert!(said.err.contains("PLAN_OTHER_HOST") && said.err.contains("vm2"), "{}", said.err);

    let typed = line.replacen("pipeops", &sandbox.program.display().to_string(), 1);
    let mut shell = std::process::Command::new("/bin/sh");
    shell.arg("-c").arg(typed).env_clear().env("PATH", sandbox.path("bin"));
    crate::support::run_output(shell.output().unwrap()).ended(0);
}

/// What a user types is meant from the directory where it is typed, and stays so in a plan.
#[test]
fn paths_are_meant_from_the_current_directory() {
    let sandbox = Sandbox::new();
    let before = sandbox.tree();
    sandbox.beside("registries.yaml", "mirrors: {}\n", 0o600);
    sandbox.beside("mine.toml", "node-label = [\"a=b\"]\n", 0o600);
    sandbox.beside("token", "enrolment-token-0001", 0o600);
    let run = |dir: &str, args: &[&str]| {
        let mut command = std::process::Command::new(&sandbox.program);
        command.args(args).env_clear().env("PATH", sandbox.path("bin")).current_dir(dir);
        crate::support::run_output(command.stdin(std::process::Stdio::null()).output().unwrap())
    };
    let given = ["--offline-dir", "release", "--registries", "registries.yaml"];
    let files = ["--config", "mine.toml", "--agent-token-file", "./token", "--plan-out", "p.json"];
    let here = [&["install-server", "--root", "root"][..], &given, &files].concat();
    run(&sandbox.path("."), &here).ended(0);
    let plan = std::fs::read_to_string(sandbox.path("p.json")).unwrap();
    assert!(plan.contains(&sandbox.path("release/k3s")), "{plan}");
    let (root, release, file) =
        (sandbox.path("root"), sandbox.path("release"), sandbox.path("p.json"));
    let there = ["install-server", "--root", &root, "--offline-dir", &release, "--yes"];
    let plan = ["--apply-plan", &file, "--timeout", "20s"];
    run("/", &[&there[..], &plan].concat()).ended(0);
    assert_eq!(sandbox.read("/etc/pipeops/agent-token"), "enrolment-token-0001");
    assert!(sandbox.read("/etc/rancher/k3s/config.yaml.d/50-pipeops.yaml").contains("a=b"));
    run(&sandbox.path("."), &["uninstall", "--root", "root", "--yes"]).ended(0);
    assert_same_tree(&sandbox.tree(), &before, "");
}

#[test]
fn a_place_that_is_not_there_is_wrong_usage() {
    let sandbox = Sandbox::new();
    let before = sandbox.tree();
    let (release, nowhere) = (sandbox.path("release"), sandbox.path("nowhere"));
    let plan = format!("{nowhere}/p.json");
    for (args, code) in [
        (
            &["install-server", "--offline-dir", &release, "--plan-out", &plan][..],
            "FILE_UNWRITABLE",
        ),
        (&["install-server", "--offline-dir", &nowhere, "--yes"][..], "OFFLINE_DIR_MISSING"),
    ] {
        let said = sandbox.run(args).ended(2);
        assert!(said.err.contains(code) && said.err.contains("hint:"), "{}", said.err);
    }
    for command in ["install-server", "uninstall", "cluster-info"] {
        let mut program = std::process::Command::new(&sandbox.program);
        let output = program.args([command, "--root", &nowhere]).output().unwrap();
        let said = crate::support::run_output(output).ended(2);
        assert!(said.err.contains("ROOT_MISSING"), "{}", said.err);
    }
    assert_same_tree(&sandbox.tree(), &before, "");
}

#[test]
fn what_has_no_effect_is_said() {
    let sandbox = Sandbox::new();
    let said = sandbox.install(&["--acme-email", "ops@example.com", "--dry-run"]).ended(0);
    assert!(said.err.contains("--acme-email does nothing without cert-manager"), "{}", said.err);
    sandbox.put("/proc/1/comm", "init\n");
    let said = sandbox.install(&["--ignore", "NO_SYSTEMD"]).ended(3);
    assert!(said.err.contains("--ignore has no effect on NO_SYSTEMD"), "{}", said.err);
    assert!(!said.err.contains("can be overruled"), "{}", said.err);
}

#[test]
fn a_step_that_fails_leaves_a_run_that_resumes() {
    let sandbox = Sandbox::new();
    let real = std::fs::read_to_string(sandbox.path("bin/systemctl")).unwrap();
    let fails = "#!/bin/sh\n[ $1 = daemon-reload ] && { echo planted trouble >&2; exit 1; }\n\
                 exec \"$PIPEOPS_ROOT/../systemctl-real\" \"$@\"\n";
    sandbox.beside("systemctl-real", &real, 0o755);
    sandbox.beside("bin/systemctl", fails, 0o755);
    let said = sandbox.install(&[]).ended(10);
    assert!(said.err.contains("STEP_FAILED") && said.err.contains("planted"), "{}", said.err);
    assert!(said.err.contains("it resumes"), "{}", said.err);
    sandbox.beside("bin/systemctl", &real, 0o755);
    sandbox.install(&[]).ended(0);
}

#[test]
fn a_second_run_at_the_same_time_is_refused() {
    let sandbox = Sandbox::new();
    std::fs::create_dir_all(sandbox.root().join("var/lib/pipeops")).unwrap();
    let file = std::fs::File::create(sandbox.root().join("var/lib/pipeops/lock")).unwrap();
    let lock = nix::fcntl::Flock::lock(file, nix::fcntl::FlockArg::LockExclusive).unwrap();
    sandbox.install(&[]).ended(12);
    drop(lock);
    sandbox.install(&[]).ended(0);
}

#[test]
fn a_start_that_fails_is_explained_and_stopped() {
    let sandbox = Sandbox::new();
    sandbox.beside("broken-k3s.service", "", 0o644);
    let said = {
        sandbox.beside(
            "journal.log",
            "level=fatal msg=\"starting kubernetes: preparing server: bootstrap data already found and encrypted with different token\"\n",
            0o644,
        );
        sandbox.install(&["--timeout", "6s"]).ended(8)
    };
    assert_eq!(said.err.matches("error: ").count(), 1, "told once: {}", said.err);
    assert!(said.err.contains("DATA_TOKEN_CONFLICT"), "{}", said.err);
    assert!(sandbox.calls().contains("systemctl stop k3s.service"));
    std::fs::remove_file(sandbox.path("broken-k3s.service")).unwrap();
    sandbox.install(&[]).ended(0);
}

#[test]
fn a_component_that_cannot_come_leaves_the_base_healthy() {
    let sandbox = Sandbox::new();
    let said = sandbox
        .install(&["--components", "metrics,storage,cert-manager", "--timeout", "2s"])
        .ended(10);
    assert!(said.err.contains("the base is healthy"), "{}", said.err);
    let info = sandbox.run(&["cluster-info", "-o", "json"]);
    assert_eq!(info.code, 13);
    let parts: Vec<String> = info.json()["problems"]
        .as_array()
        .unwrap()
        .iter()
        .map(|p| p["part"].as_str().unwrap().to_owned())
        .collect();
    assert!(parts.contains(&"component".to_owned()), "{parts:?}");
    // its source comes back
    for (path, object) in [
        (
            "/apis/helm.cattle.io/v1/namespaces/kube-system/helmcharts/cert-manager",
            serde_json::json!({"status": {"jobName": "helm-install-cert-manager"}}),
        ),
        (
            "/apis/batch/v1/namespaces/kube-system/jobs/helm-install-cert-manager",
            serde_json::json!({"status": {"succeeded": 1}}),
        ),
        (
            "/apis/apps/v1/namespaces/cert-manager/deployments/cert-manager",
            serde_json::json!({"spec": {"replicas": 1}, "status": {"readyReplicas": 1}}),
        ),
        (
            "/apis/apps/v1/namespaces/cert-manager/deployments/cert-manager-webhook",
            serde_json::json!({"spec": {"replicas": 1}, "status": {"readyReplicas": 1}}),
        ),
    ] {
        let mut objects = sandbox.api.objects.lock().unwrap();
        let known = objects.entry(path.into()).or_insert_with(|| serde_json::json!({}));
        known["status"] = object["status"].clone();
        if let Some(spec) = object.get("spec") {
            known["spec"] = spec.clone();
        }
    }
    sandbox.install(&["--components", "metrics,storage,cert-manager"]).ended(0);
    let issuers: Vec<String> = sandbox
        .api
        .objects
        .lock()
        .unwrap()
        .keys()
        .filter(|k| k.contains("clusterissuers"))
        .cloned()
        .collect();
    assert_eq!(issuers.len(), 2, "{issuers:?}");
}

#[test]
fn wrong_inputs_leave_nothing_behind() {
    let sandbox = Sandbox::new();
    sandbox.beside("typo.toml", "tls-sn = [\"a\"]\n", 0o644);
    sandbox.beside("owned.toml", "[k3s]\ntoken = \"abc\"\n", 0o644);
    let (typo, owned) = (sandbox.path("typo.toml"), sandbox.path("owned.toml"));
    let before = sandbox.tree();
    let cases: &[(&[&str], i32, &str)] = &[
        (&["--config", &typo], 2, "did you mean `tls-san`"),
        (&["--config", &owned], 2, "--token-file"),
        (&["--config", "/nonexistent.toml"], 2, "FILE_UNREADABLE"),
        (&["--ignore", "CLOCK_SKW"], 2, "did you mean CLOCK_SKEW"),
        (&["--k3s-version", "latest"], 2, "not a k3s version"),
        (&["--components", "ingres"], 2, "did you mean ingress"),
        (&["--control-plane-url", "http://example.com"], 2, "must be https"),
        (&["--node-ip", "10.0.0.77"], 3, "ADDRESS_UNKNOWN"),
        (&["--k3s-version", "v1.20.2+k3s1"], 3, "K3S_TOO_OLD"),
        (&["--kubeconfig-for", "nobody-here"], 2, "USER_UNKNOWN"),
        (&["--k3s-sha256", &"0".repeat(64)], 6, "DIGEST_MISMATCH"),
    ];
    for (args, code, text) in cases {
        let said: RunOutput = sandbox.install(args);
        assert_eq!(said.code, *code, "{args:?}\n{}\n{}", said.out, said.err);
        assert!(said.err.contains(text), "{args:?}\n{}", said.err);
        assert_same_tree(&sandbox.tree(), &before, &format!("{args:?}"));
    }
    let said = sandbox.run_with(&["install-server", "--yes"], &[("NODE_TYPE", "agent")]).ended(2);
    assert!(said.err.contains("missing: K3S_URL, K3S_TOKEN"), "{}", said.err);
    sandbox.run_with(&["install-server", "--yes"], &[("NODE_TYPE", "boss")]).ended(2);
    sandbox.run(&["install-server", "--offline-dir", &sandbox.path("release")]).ended(11);
    assert_same_tree(&sandbox.tree(), &before, "");
}

#[test]
fn an_incomplete_or_damaged_offline_directory_is_refused_before_writing() {
    for (change, exit) in [("list", 6), ("images", 6), ("binary", 6), ("both", 6)] {
        let sandbox = Sandbox::new();
        let before = sandbox.tree();
        match change {
            "list" => std::fs::remove_file(sandbox.path("release/sha256sum-amd64.txt")).unwrap(),
            "images" => {
                std::fs::remove_file(sandbox.path("release/k3s-airgap-images-amd64.tar")).unwrap()
            }
            "binary" => sandbox.beside("release/k3s", "#!/bin/sh\nexit 0\n", 0o755),
            _ => {
                sandbox.beside("release/k3s-airgap-images-amd64.tar", "others", 0o644);
                let good = std::fs::read(sandbox.path("release/k3s")).unwrap();
                sandbox.beside(
                    "release/sha256sum-amd64.txt",
                    &format!(
                        "{}  k3s\n{}  k3s-airgap-images-amd64.tar\n",
                        sha256(&good),
                        sha256(b"images")
                    ),
                    0o644,
                );
            }
        }
        let said = sandbox.install(&[]);
        assert_eq!(said.code, exit, "{change}: {}", said.err);
        assert_same_tree(&sandbox.tree(), &before, change);
    }
}

#[test]
fn cluster_info_names_the_part_that_is_down() {
    let sandbox = Sandbox::new();
    sandbox.run(&["cluster-info"]).ended(13);
    sandbox.install(&[]).ended(0);
    let part = |args: &[&str]| -> Vec<String> {
        let said = sandbox.run(args);
        let json = said.json();
        assert_eq!(said.code, 13, "{}", said.out);
        json["problems"]
            .as_array()
            .unwrap()
            .iter()
            .map(|p| p["part"].as_str().unwrap().to_owned())
            .collect()
    };
    // the agent is not really there in the sandbox: its socket says nothing
    assert_eq!(part(&["cluster-info", "-o", "json"]), ["agent"]);
    std::fs::remove_file(sandbox.root().join("run/fake-systemd/k3s.service.active")).unwrap();
    assert!(part(&["cluster-info", "-o", "json"]).contains(&"k3s".to_owned()));
    sandbox.put("/etc/rancher/k3s/k3s.yaml", "{");
    assert!(part(&["cluster-info", "-o", "json"]).contains(&"kubeconfig".to_owned()));
}

#[test]
fn the_join_line_carries_a_full_token() {
    let sandbox = Sandbox::new();
    sandbox.install(&[]).ended(0);
    let said = sandbox.run(&["cluster-info", "--join", "-o", "json"]);
    let line = said.json()["join"].as_str().unwrap().to_owned();
    assert_eq!(
        line,
        format!(
            "sudo pipeops join-worker https://10.0.0.5:6443 K10{}::abcdef.0123456789abcdef",
            "a".repeat(64)
        )
    );
}

/// k3s has one port for supervisor and API, and a worker must find it.
#[test]
fn the_join_line_names_the_port_that_was_chosen_wherever_it_was() {
    for (file, text) in [
        ("/etc/pipeops/config.toml", "[k3s]\nhttps-listen-port = 7443\n"),
        ("/etc/rancher/k3s/config.yaml.d/99-mine.yaml", "https-listen-port: 7443\n"),
    ] {
        let sandbox = Sandbox::new();
        sandbox.put(file, text);
        sandbox.install(&[]).ended(0);
        let line = sandbox.run(&["cluster-info", "--join", "-o", "json"]).json()["join"]
            .as_str()
            .unwrap()
            .to_owned();
        assert!(
            line.starts_with("sudo pipeops join-worker https://10.0.0.5:7443 K10"),
            "{file}: {line}"
        );
    }
}

#[test]
fn secrets_reach_no_text_and_no_world_readable_file() {
    let sandbox = Sandbox::new();
    let token = "planted-enrolment-token-canary-4711-in-plain-text";
    let release = sandbox.path("release");
    let proxy = "http://user:planted-proxy-canary-4711-in-plain-text@proxy:3128";
    let said = sandbox
        .run_with(
            &[
                "install-server",
                "--offline-dir",
                &release,
                "--yes",
                "--timeout",
                "20s",
                "-o",
                "json",
                "--events",
                "json",
            ],
            &[("AGENT_TOKEN", token), ("HTTPS_PROXY", proxy), ("NO_PROXY", "127.0.0.1,localhost")],
        )
        .ended(0);
    for text in
        [&said.out, &said.err, &sandbox.calls(), &sandbox.read("/var/lib/pipeops/journal.json")]
    {
        assert!(!text.contains("canary-4711-in-plain-text"), "{text}");
    }
    assert_eq!(sandbox.read("/etc/pipeops/agent-token"), token);
    let env = sandbox.read("/etc/systemd/system/k3s.service.env");
    assert!(env.contains(proxy) && env.contains("10.42.0.0/16") && env.contains(".svc"), "{env}");
    for (path, what) in sandbox.tree() {
        let Some(mode) = what.strip_prefix("file ").and_then(|w| w.split(' ').next()) else {
            continue;
        };
        let text = sandbox.read(&path);
        assert!(
            !text.contains("canary-4711-in-plain-text") || mode.ends_with("00"),
            "{path} has mode {mode}"
        );
    }
    // the agent empties the file once it is registered; a re-run with the same token leaves it so
    sandbox.put("/etc/pipeops/agent-token", "");
    let again = sandbox
        .run_with(
            &["install-server", "--offline-dir", &release, "--yes", "--timeout", "20s"],
            &[("AGENT_TOKEN", token), ("HTTPS_PROXY", proxy), ("NO_PROXY", "127.0.0.1,localhost")],
        )
        .ended(0);
    assert!(again.out.contains("nothing to do"), "{}", again.err);
    assert_eq!(sandbox.read("/etc/pipeops/agent-token"), "");
}

#[test]
fn what_was_there_before_comes_back() {
    let sandbox = Sandbox::new();
    sandbox.put("/etc/rancher/k3s/registries.yaml", "mirrors: {}\n");
    sandbox.put("/usr/local/bin/kubectl", "mine");
    sandbox.beside(
        "registries.yaml",
        "mirrors: {docker.io: {endpoint: [\"https://mirror\"]}}\n",
        0o644,
    );
    let before = sandbox.tree();
    sandbox.install(&["--registries", &sandbox.path("registries.yaml")]).ended(0);
    assert!(sandbox.read("/etc/rancher/k3s/registries.yaml").contains("mirror"));
    assert_eq!(sandbox.read("/usr/local/bin/kubectl"), "mine");
    sandbox.run(&["uninstall", "--yes"]).ended(0);
    assert_same_tree(&sandbox.tree(), &before, "");
}

#[test]
fn volumes_survive_an_uninstall_unless_purged() {
    let sandbox = Sandbox::new();
    let before = sandbox.tree();
    sandbox.install(&[]).ended(0);
    let file = "/var/lib/rancher/k3s/storage/pvc-1_production_db/data";
    sandbox.put(file, "precious");
    let plan = sandbox.run(&["uninstall", "--dry-run"]).ended(0);
    assert!(plan.err.contains("= keep /var/lib/rancher/k3s/storage (volumes)"), "{}", plan.err);
    let plan = sandbox.run(&["uninstall", "--dry-run", "--purge-data"]).ended(0);
    assert!(plan.err.contains("- remove /var/lib/rancher/k3s/storage (volumes)"), "{}", plan.err);
    let said = sandbox.run(&["uninstall", "--yes"]).ended(0);
    assert!(said.out.contains("volumes, kept"), "{}", said.out);
    let remove = "rm -rf /var/lib/rancher/k3s/storage";
    assert!(said.out.contains(remove), "{}", said.out);
    assert_eq!(sandbox.read(file), "precious");
    // whose they are is known no more: they are left, and that is no success
    let late = sandbox.run(&["uninstall", "--yes", "--purge-data"]).ended(3);
    assert!(late.err.contains("VOLUMES_UNKNOWN") && late.err.contains(remove), "{}", late.err);
    assert_eq!(sandbox.read(file), "precious");
    sandbox.run(&["uninstall", "--yes"]).ended(0);
    std::fs::remove_dir_all(sandbox.root().join("var/lib/rancher")).unwrap();
    sandbox.install(&[]).ended(0);
    sandbox.put(file, "precious");
    sandbox.run(&["uninstall", "--yes", "--purge-data"]).ended(0);
    assert_same_tree(&sandbox.tree(), &before, "");
}

#[test]
fn api_allow_writes_a_table_of_its_own() {
    let sandbox = Sandbox::new();
    let before = sandbox.tree();
    sandbox.install(&["--api-allow", "192.0.2.0/24"]).ended(0);
    let rules = sandbox.read("/etc/pipeops/api-allow.nft");
    assert!(
        rules.contains("ip saddr 192.0.2.0/24 accept") && rules.contains("table inet pipeops"),
        "{rules}"
    );
    assert!(
        sandbox
            .read("/etc/systemd/system/k3s.service")
            .contains("ExecStartPre=nft -f /etc/pipeops/api-allow.nft")
    );
    sandbox.run(&["uninstall", "--yes"]).ended(0);
    assert_same_tree(&sandbox.tree(), &before, "");
}

#[test]
fn a_kubeconfig_for_a_user_is_his_alone_and_names_the_node() {
    let sandbox = Sandbox::new();
    std::fs::create_dir_all(sandbox.root().join("home/ops")).unwrap();
    let before = sandbox.tree();
    sandbox.install(&["--kubeconfig-for", "ops"]).ended(0);
    assert!(sandbox.tree()["/home/ops/.kube/pipeops.yaml"].starts_with("file 600"));
    assert!(sandbox.install(&["--kubeconfig-for", "ops"]).ended(0).out.contains("nothing to do"));
    // without the option it goes again
    sandbox.install(&[]).ended(0);
    assert!(!sandbox.root().join("home/ops/.kube").exists());
    sandbox.run(&["uninstall", "--yes"]).ended(0);
    assert_same_tree(&sandbox.tree(), &before, "");
}

#[test]
fn with_json_every_failure_is_one_document() {
    let sandbox = Sandbox::new();
    let release = sandbox.path("release");
    let declined =
        sandbox.run(&["install-server", "--offline-dir", &release, "-o", "json"]).ended(11).json();
    assert_eq!(
        (declined["error"]["code"].as_str(), declined["exit"].as_u64()),
        (Some("DECLINED"), Some(11))
    );
    std::fs::remove_file(sandbox.path("release/sha256sum-amd64.txt")).unwrap();
    assert_eq!(
        sandbox.install(&["-o", "json"]).ended(6).json()["error"]["code"],
        "OFFLINE_INCOMPLETE"
    );
    let events = sandbox.install(&["--events", "json"]).ended(6).err;
    for line in events.lines() {
        assert!(serde_json::from_str::<serde_json::Value>(line).is_ok(), "not an event: {line}");
    }
    assert!(events.contains("OFFLINE_INCOMPLETE"));
}

#[test]
fn a_mount_that_answers_nobody_is_bounded_and_loses_nothing() {
    let sandbox = Sandbox::new();
    sandbox.install(&[]).ended(0);
    let file = "/var/lib/kubelet/pods/x/volumes/nfs/data";
    sandbox.put(file, "precious");
    sandbox.put("/proc/self/mountinfo", "1 0 8:1 / / rw - ext4 /dev/sda1 rw\n2 1 0:9 / /var/lib/kubelet/pods/x/volumes/nfs rw - nfs4 gone:/x rw\n");
    sandbox.beside("bin/umount", "#!/bin/sh\nPATH=/usr/bin:/bin\nexec sleep 300\n", 0o755);
    let begin = std::time::Instant::now();
    let said = sandbox.run(&["uninstall", "--yes"]).ended(10);
    assert!(begin.elapsed().as_secs() < 60);
    assert!(
        said.out.contains("/var/lib/kubelet/pods/x/volumes/nfs: MOUNT_STILL_BUSY: nfs4"),
        "{}",
        said.out
    );
    assert_eq!(sandbox.read(file), "precious");
    // it comes back to life: the next run finishes
    sandbox.put("/proc/self/mountinfo", "1 0 8:1 / / rw - ext4 /dev/sda1 rw\n");
    sandbox.run(&["uninstall", "--yes"]).ended(0);
}

#[test]
fn without_systemd_nothing_is_tried() {
    let sandbox = Sandbox::new();
    sandbox.put("/proc/1/comm", "init\n");
    let before = sandbox.tree();
    let said = sandbox.install(&["--ignore", "NO_SYSTEMD"]).ended(3);
    assert!(said.err.contains("NO_SYSTEMD"), "{}", said.err);
    assert_same_tree(&sandbox.tree(), &before, "");
}

#[test]
fn a_machine_of_the_other_role_or_of_somebody_else_is_left_alone() {
    let sandbox = Sandbox::new();
    sandbox.put("/etc/systemd/system/k3s.service", "[Service]\n");
    let before = sandbox.tree();
    let said = sandbox.install(&["--ignore", "K3S_FOREIGN"]).ended(3);
    assert!(said.err.contains("K3S_FOREIGN"), "{}", said.err);
    assert_same_tree(&sandbox.tree(), &before, "");
}

/// k3s empties the file of its token before it writes it again, at each start; one that dies in
/// between never starts again.
#[test]
fn a_token_that_k3s_lost_when_it_died_is_restored() {
    let sandbox = Sandbox::new();
    sandbox.install(&[]).ended(0);
    let token = sandbox.read("/var/lib/rancher/k3s/server/token");
    sandbox.beside("bad.toml", "[k3s]\nkubelet-arg = [\"planted-broken=1\"]\n", 0o644);
    sandbox.beside(
        "journal.log",
        "Incorrect Usage: flag provided but not defined: -planted-broken\n",
        0o644,
    );
    sandbox.beside("dies-while-it-writes", "", 0o644);
    let said = sandbox.install(&["--config", &sandbox.path("bad.toml")]).ended(9);
    assert!(
        said.out.contains("restored from a copy") || said.err.contains("restored from a copy"),
        "{}{}",
        said.out,
        said.err
    );
    assert_eq!(sandbox.read("/var/lib/rancher/k3s/server/token"), token);
    assert!(!said.out.contains(token.trim()) && !said.err.contains(token.trim()));
    // and without any change of ours: the machine went down while k3s wrote
    std::fs::remove_file(sandbox.path("journal.log")).unwrap();
    sandbox.put("/var/lib/rancher/k3s/server/token", "");
    std::fs::remove_file(sandbox.root().join("run/fake-systemd/k3s.service.active")).unwrap();
    sandbox.install(&[]).ended(0);
    assert_eq!(sandbox.read("/var/lib/rancher/k3s/server/token"), token);
    sandbox.run(&["uninstall", "--yes"]).ended(0);
}

#[test]
fn a_change_that_the_node_does_not_survive_is_taken_back() {
    let sandbox = Sandbox::new();
    sandbox.install(&[]).ended(0);
    let drop_in = sandbox.read("/etc/rancher/k3s/config.yaml.d/50-pipeops.yaml");
    sandbox.beside("bad.toml", "[k3s]\nkubelet-arg = [\"planted-broken=1\"]\n", 0o644);
    sandbox.beside(
        "journal.log",
        "Incorrect Usage: flag provided but not defined: -planted-broken\n",
        0o644,
    );
    let said = sandbox.install(&["--config", &sandbox.path("bad.toml")]).ended(9);
    assert!(
        said.err.contains("K3S_SETTING_UNKNOWN")
            && said.err.contains("the former settings are back"),
        "{}",
        said.err
    );
    assert_eq!(sandbox.read("/etc/rancher/k3s/config.yaml.d/50-pipeops.yaml"), drop_in);
    std::fs::remove_file(sandbox.path("journal.log")).unwrap();
    let again = sandbox.install(&[]).ended(0);
    assert!(again.out.contains("nothing to do"), "{}", again.err);
    sandbox.run(&["uninstall", "--yes"]).ended(0);
}
