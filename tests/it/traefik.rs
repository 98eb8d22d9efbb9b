//! k3s brings traefik unasked; here it is a component like any other.

use serde_json::json;

use crate::support::Sandbox;

const DROP_IN: &str = "/etc/rancher/k3s/config.yaml.d/50-pipeops.yaml";
const OFF: &str = "disable:\n  - \"traefik\"\n";

#[test]
fn it_is_off_unless_asked_for_and_the_plan_says_so() {
    for args in [&[][..], &["--components", "none"], &["--components", "metrics,storage"]] {
        let sandbox = Sandbox::new();
        let release = sandbox.path("release");
        let plan = sandbox
            .run(
                &[&["install-server", "--offline-dir", &release, "--dry-run", "-o", "json"], args]
                    .concat(),
            )
            .ended(0)
            .json();
        let settings =
            plan["plan"].as_array().unwrap().iter().find(|s| s["id"] == "settings").unwrap();
        assert!(settings["why"].as_str().unwrap().contains("--components traefik"), "{settings}");
        sandbox.install(args).ended(0);
        assert!(sandbox.read(DROP_IN).contains(OFF), "{args:?}: {}", sandbox.read(DROP_IN));
    }
}

#[test]
fn asked_for_it_is_waited_for_and_its_ports_are_looked_at() {
    let sandbox = Sandbox::new();
    sandbox.beside("disable.toml", "[k3s]\ndisable = [\"servicelb\"]\n", 0o644);
    // it never answers in the sandbox: the base is healthy, and the component is named
    let said = sandbox
        .install(&[
            "--components",
            "traefik",
            "--config",
            &sandbox.path("disable.toml"),
            "--timeout",
            "1s",
        ])
        .ended(10);
    assert!(said.err.contains("wait for traefik"), "{}", said.err);
    let drop_in = sandbox.read(DROP_IN);
    assert!(!drop_in.contains("traefik") && drop_in.contains("servicelb"), "{drop_in}");
    let sandbox = Sandbox::new();
    sandbox.put(
        "/proc/net/tcp",
        "  sl  local_address rem_address st\n 0: 00000000:0050 00000000:0000 0A 0 0 0 0 0 4242 1\n",
    );
    let said = sandbox.install(&["--components", "traefik"]).ended(3);
    assert!(said.err.contains("INGRESS_PORT_IN_USE"), "{}", said.err);
    sandbox.install(&["--components", "none"]).ended(0);
}

#[test]
fn two_for_the_same_ports_are_refused() {
    let sandbox = Sandbox::new();
    let before = sandbox.tree();
    let said = sandbox.install(&["--components", "metrics,traefik,ingress"]).ended(2);
    assert!(said.err.contains("80 and 443; choose one"), "{}", said.err);
    crate::support::assert_same_tree(&sandbox.tree(), &before, "");
}

/// A node of a version that let k3s bring it: nobody's ingress goes without a word.
#[test]
fn one_that_runs_already_does_not_go_in_silence() {
    let sandbox = Sandbox::new();
    sandbox.install(&[]).ended(0);
    sandbox.put(DROP_IN, &sandbox.read(DROP_IN).replace(OFF, ""));
    let chart = "/apis/helm.cattle.io/v1/namespaces/kube-system/helmcharts/traefik";
    sandbox.api.objects.lock().unwrap().insert(chart.into(), json!({"kind": "HelmChart"}));
    let release = sandbox.path("release");
    let look = |args: &[&str]| {
        sandbox
            .run(&[&["install-server", "--offline-dir", &release, "--dry-run"], args].concat())
            .ended(0)
            .err
    };
    assert!(look(&[]).contains("TRAEFIK_GOES"), "{}", look(&[]));
    assert!(!look(&["--components", "traefik"]).contains("TRAEFIK_GOES"));
    sandbox.install(&[]).ended(0);
    assert!(!look(&[]).contains("TRAEFIK_GOES"), "k3s takes a while to remove it");
}
