//! A secret in every place that takes one, and then in none that shows it.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use serde_json::{Value, json};

use crate::support::{RunOutput, Sandbox};

/// Ends every planted secret: 20 characters and more, so that no digest holds it by chance.
const CANARY: &str = "canary-0123456789-abcdef";

/// `[k3s]` settings with a secret each, in the forms that k3s takes.
const TABLE: &str = r#"
artifact-url = "https://mirror:artifact-canary-0123456789-abcdef@mirror.invalid/k3s"

[k3s]
datastore-endpoint = "postgres://k3s:p/w#d@db-canary-0123456789-abcdef@db.invalid:5432/k3s?sslpassword=ssl-canary-0123456789-abcdef"
vpn-auth = "name=tailscale,joinKey=vpn-canary-0123456789-abcdef"
etcd-s3-access-key = "s3-access-canary-0123456789-abcdef"
etcd-s3-secret-key = "s3-secret-canary-0123456789-abcdef"
etcd-s3-proxy = "http://u:s3-proxy-canary-0123456789-abcdef@proxy.invalid:3128"
kubelet-arg = ["v=2", "volume-plugin-url=https://u:kubelet-canary-0123456789-abcdef@h.invalid"]
kube-apiserver-arg = ["oidc-client-secret=oidc-canary-0123456789-abcdef", "--basic-auth-password=apiserver-canary-0123456789-abcdef"]
"#;

const REGISTRIES: &str = r#"
configs:
  a.invalid: {auth: {username: u, password: registry-canary-0123456789-abcdef}}
  b.invalid: {auth: {identity_token: identity-canary-0123456789-abcdef}}
  c.invalid: {auth: {auth: dTpyZWdpc3RyeS1jYW5hcnktMDEyMzQ1Njc4OS1hYmNkZWY=}}
"#;

const ENV: &[(&str, &str)] = &[
    ("AGENT_TOKEN", "enrolment-canary-0123456789-abcdef"),
    ("HTTPS_PROXY", "http://u:proxy-canary-0123456789-abcdef@proxy.invalid:3128"),
    ("https_proxy", "http://u:proxy-canary-0123456789-abcdef@proxy.invalid:3128"),
    ("NO_PROXY", "127.0.0.1,localhost"),
    ("AWS_SECRET_ACCESS_KEY", "aws-canary-0123456789-abcdef"),
    ("K3S_DATASTORE_ENDPOINT", "mysql://u:environ-canary-0123456789-abcdef@tcp(db.invalid)/k3s"),
];

/// A sandbox whose programs also write down their environment and the arguments of whoever called
/// them.
fn watched() -> Sandbox {
    let sandbox = Sandbox::new();
    sandbox.beside("mine.toml", TABLE, 0o600);
    sandbox.beside("registries.yaml", REGISTRIES, 0o600);
    for name in ["systemctl", "ip", "journalctl"] {
        let script = fs::read_to_string(sandbox.path(&format!("bin/{name}"))).unwrap();
        let spy =
            "(env; tr '\\0' ' ' < /proc/$PPID/cmdline; echo) >> \"$PIPEOPS_ROOT/../seen.log\"\n";
        sandbox.beside(
            &format!("bin/{name}"),
            &script.replacen("case ", &format!("{spy}case "), 1),
            0o755,
        );
    }
    let script = fs::read_to_string(sandbox.path("bin/systemctl")).unwrap();
    assert!(script.contains("seen.log"));
    sandbox
}

fn planted(text: &str) -> bool {
    text.contains(CANARY) || text.contains("dTpyZWdpc3RyeS1jYW5hcnk")
}

/// No output, child or world-readable file holds a secret.
#[track_caller]
fn unseen(sandbox: &Sandbox, said: &RunOutput, what: &str) {
    for (name, text) in
        [("stdout", said.out.clone()), ("stderr", said.err.clone()), ("argv", sandbox.calls())]
    {
        assert!(!planted(&text), "{what}: {name}: {text}");
    }
    let seen = fs::read_to_string(sandbox.path("seen.log")).unwrap_or_default();
    assert!(
        !planted(&seen),
        "{what}: argv or environment: {}",
        seen.lines().filter(|l| planted(l)).collect::<Vec<_>>().join("\n")
    );
    let journal = sandbox.read("/var/lib/pipeops/journal.json");
    assert!(
        !planted(&journal),
        "{what}: the journal: {}",
        journal.lines().filter(|l| planted(l)).collect::<Vec<_>>().join("\n")
    );
    closed(Path::new(&sandbox.path(".")), what);
}

#[track_caller]
fn closed(dir: &Path, what: &str) {
    for entry in fs::read_dir(dir).unwrap().flatten() {
        let meta = entry.metadata().unwrap();
        if meta.is_dir() {
            closed(&entry.path(), what);
        } else if meta.is_file() {
            let text = String::from_utf8_lossy(&fs::read(entry.path()).unwrap()).into_owned();
            let mode = meta.permissions().mode() & 0o777;
            assert!(
                !planted(&text) || mode & 0o077 == 0,
                "{what}: {} has mode {mode:o}",
                entry.path().display()
            );
            let log = entry.path().to_string_lossy().contains("/var/log/pipeops");
            assert!(!log || !planted(&text), "{what}: {}", entry.path().display());
        }
    }
}

fn install(sandbox: &Sandbox, more: &[&str]) -> RunOutput {
    let release = sandbox.path("release");
    let mut args = vec!["install-server", "--offline-dir", &release];
    if !more.contains(&"--timeout") {
        args.extend(["--timeout", "20s"]);
    }
    args.extend(more);
    sandbox.run_with(&args, ENV)
}

#[test]
fn a_secret_in_every_place_that_takes_one_is_shown_by_none() {
    let sandbox = watched();
    let (config, registries, plan) =
        (sandbox.path("mine.toml"), sandbox.path("registries.yaml"), sandbox.path("plan.json"));
    let given = ["--config", &config, "--registries", &registries];
    let dry =
        install(&sandbox, &[&given[..], &["--dry-run", "-o", "json", "--events", "json"]].concat())
            .ended(0);
    unseen(&sandbox, &dry, "dry run");
    sandbox.beside("plan.json", "an older file that everybody may read", 0o644);
    let out = install(&sandbox, &[&given[..], &["--plan-out", &plan]].concat()).ended(0);
    unseen(&sandbox, &out, "plan");
    let text = fs::read_to_string(&plan).unwrap();
    assert!(!planted(&text), "{text}");
    assert!(
        text.contains("postgres://k3s:••••@db.invalid:5432/k3s?sslpassword=••••"),
        "what may be seen is there to be looked at"
    );
    assert_eq!(fs::metadata(&plan).unwrap().permissions().mode() & 0o777, 0o600);
    // the plan names the files that the secrets come from
    let done =
        install(&sandbox, &["--apply-plan", &plan, "--events", "json", "-o", "json"]).ended(0);
    unseen(&sandbox, &done, "apply");
    let drop_in = sandbox.read("/etc/rancher/k3s/config.yaml.d/50-pipeops.yaml");
    let expected: toml::Table = TABLE.parse().unwrap();
    for (key, value) in expected["k3s"].as_table().unwrap() {
        let shown = match value {
            toml::Value::Array(items) => items
                .iter()
                .map(|i| format!("  - {}", json!(i.as_str().unwrap())))
                .collect::<Vec<_>>()
                .join("\n"),
            one => format!("{key}: {}", json!(one.as_str().unwrap())),
        };
        assert!(drop_in.contains(&shown), "{shown}\n{drop_in}");
    }
    assert_eq!(sandbox.read("/etc/rancher/k3s/registries.yaml"), REGISTRIES);
    let again = install(&sandbox, &[&given[..], &["--yes"]].concat()).ended(0);
    assert!(again.out.contains("nothing to do"), "{}", again.err);
    unseen(&sandbox, &again, "again");
    // k3s may print what it likes when it does not start
    sandbox.beside("broken.toml", &TABLE.replace("[\"v=2\"", "[\"planted-broken=1\""), 0o600);
    let log = format!(
        "Incorrect Usage: flag provided but not defined: -planted-broken in p/w#d@db-{CANARY}, s3-secret-{CANARY}\n"
    );
    sandbox.beside("journal.log", &log, 0o600);
    let failed = install(&sandbox, &["--config", &sandbox.path("broken.toml"), "--yes"]).ended(9);
    assert!(failed.err.contains("-planted-broken in ••••, ••••"), "{}", failed.err);
    unseen(&sandbox, &failed, "a failed start");
    assert_eq!(sandbox.read("/etc/rancher/k3s/config.yaml.d/50-pipeops.yaml"), drop_in);
    let release = sandbox.path("release");
    let without = sandbox
        .run(&["install-server", "--offline-dir", &release, "--yes", "--timeout", "20s"])
        .ended(0);
    assert!(
        without
            .err
            .contains("! [k3s] datastore-endpoint was `postgres://k3s:••••@db.invalid:5432/k3s"),
        "{}",
        without.err
    );
    unseen(&sandbox, &without, "not given any more");
    unseen(&sandbox, &sandbox.run(&["uninstall", "--yes"]).ended(0), "uninstall");
}

#[test]
fn what_is_wrong_is_said_without_the_secret() {
    let sandbox = watched();
    let url = format!("https://u:{CANARY}@h.invalid");
    let bad = |name: &str, text: String| {
        sandbox.beside(name, &text, 0o600);
        sandbox.path(name)
    };
    let files = [
        bad("a.toml", format!("[k3s]\ndatastore-endpoint = \"postgres://u:{CANARY}@h\n")),
        bad("b.toml", format!("k3s = \"postgres://u:{CANARY}@h\"\n")),
        bad("c.toml", format!("tls-san = 'x'\ntimeout = [\"{CANARY}\"]\n")),
        bad("d.toml", format!("[k3s]\ntoken = \"{CANARY}\"\nserver = \"{url}\"\n")),
        bad("e.toml", format!("agent-token = \"{CANARY}\"\n")),
        bad(
            "f.toml",
            format!(
                "control-plane-url = \"http://u:{CANARY}@h.invalid\"\nartifact-url = \"ftp://u:{CANARY}@h\"\n"
            ),
        ),
    ];
    for file in &files {
        let said = install(&sandbox, &["--config", file, "--dry-run", "-o", "json"]).ended(2);
        assert!(said.err.contains("CONFIG") || said.err.contains("SETTINGS"), "{}", said.err);
        unseen(&sandbox, &said, file);
    }
    let registries = bad("bad.yaml", format!("configs: {{a: {{auth: {{password: \"{CANARY}\n"));
    unseen(
        &sandbox,
        &install(&sandbox, &["--registries", &registries, "--dry-run"]).ended(2),
        "registries",
    );
    let plan = bad("bad.json", format!("{{\"plan\": \"{CANARY}\"}}"));
    unseen(&sandbox, &install(&sandbox, &["--apply-plan", &plan]).ended(2), "plan");
    let token = format!("K10{}::server:{CANARY}", "a".repeat(64));
    for args in [
        vec!["join-worker", &url, "-"],
        vec!["join-worker", &token, "10.0.0.1"],
        vec!["join-worker", "10.0.0.1", "-", &token],
        vec!["join-worker", "10.0.0.1", "-", "--bad", &url],
        vec!["install-server", "--artifact-url", &url, "--tls-san", &url],
        vec!["install-server", "--control-plane-url", &url],
    ] {
        let said = sandbox.run(&args);
        assert_ne!(said.code, 0, "{args:?}");
        unseen(&sandbox, &said, &args.join(" ").replace(CANARY, "…"));
    }
}

/// A login typed into a URL stands in no list of processes, and reaches the mirror.
#[test]
fn a_url_with_a_login_is_in_no_argv() {
    for password in [CANARY.to_owned(), format!("a\"{CANARY}")] {
        let sandbox = watched();
        let url = format!("https://u:{password}@mirror.invalid/k3s");
        let said = install(&sandbox, &["--artifact-url", &url, "--yes"]).ended(0);
        unseen(&sandbox, &said, "a mirror");
        assert!(
            fs::read_to_string(sandbox.path("seen.log"))
                .unwrap()
                .contains("https://u:••••@mirror.invalid/k3s")
        );
    }
}

/// What the first pipeops left: a plan for everybody to read, a journal with the table as it was
/// given.
#[test]
fn what_an_earlier_pipeops_laid_open_is_closed() {
    let sandbox = watched();
    let (config, plan) = (sandbox.path("mine.toml"), sandbox.path("new.json"));
    install(&sandbox, &["--config", &config, "--plan-out", &plan]).ended(0);
    install(&sandbox, &["--config", &config, "--yes"]).ended(0);
    let table: toml::Table = TABLE.parse().unwrap();
    let table = serde_json::to_string(&table["k3s"]).unwrap();
    let drop_in = sandbox.read("/etc/rancher/k3s/config.yaml.d/50-pipeops.yaml");
    let old = |value: &mut Value, steps: &str| {
        let options = value["options"].as_object_mut().unwrap();
        options.retain(|key, _| !key.starts_with("[k3s]"));
        options.insert("k3s".into(), json!(table));
        let step = value[steps]
            .as_array_mut()
            .unwrap()
            .iter_mut()
            .find(|s| s["id"] == "settings")
            .unwrap();
        step["want"]["content"] = json!({"text": drop_in});
    };
    let mut journal: Value =
        serde_json::from_str(&sandbox.read("/var/lib/pipeops/journal.json")).unwrap();
    old(&mut journal, "entries");
    sandbox.beside("root/var/lib/pipeops/journal.json", &format!("{journal:#}"), 0o600);
    let mut saved: Value = serde_json::from_str(&fs::read_to_string(&plan).unwrap()).unwrap();
    old(&mut saved["plan"], "steps");
    saved["plan"].as_object_mut().unwrap().remove("inputs");
    let text = format!("{saved:#}\n");
    assert!(planted(&text));
    for place in ["root/root/plan.json", "root/home/ops/infra/k3s.plan", "root/tmp/p", "old.json"] {
        sandbox.beside(place, &text, 0o644);
    }
    sandbox.beside(
        "root/etc/pipeops/config.toml",
        "[k3s]\nvpn-auth = \"name=tailscale,joinKey=vpn-canary-0123456789-abcdef\"\n",
        0o644,
    );
    sandbox.beside("root/etc/rancher/k3s/config.yaml", "debug: false\n", 0o644);
    // a dry run says so, and changes nothing
    let dry = install(&sandbox, &["--config", &config, "--dry-run"]).ended(0);
    assert!(dry.err.contains("SECRET_READABLE") && dry.err.contains("chmod 600"), "{}", dry.err);
    let mode = |path: &str| fs::metadata(sandbox.path(path)).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode("root/root/plan.json"), 0o644);
    // the user names the plan that lies elsewhere
    let stale = install(&sandbox, &["--apply-plan", &sandbox.path("old.json"), "--yes"]).ended(3);
    assert!(stale.err.contains("PLAN_STALE"), "{}", stale.err);
    assert!(!planted(&stale.err) && !planted(&stale.out), "{}", stale.err);
    for place in [
        "root/root/plan.json",
        "root/home/ops/infra/k3s.plan",
        "root/tmp/p",
        "old.json",
        "root/etc/pipeops/config.toml",
    ] {
        assert_eq!(mode(place), 0o600, "{place}");
    }
    assert_eq!(stale.err.matches("SECRET_READABLE").count(), 5, "{}", stale.err);
    assert!(
        stale.err.contains("postgres://k3s:••••@db.invalid")
            && stale.err.contains("change that password"),
        "{}",
        stale.err
    );
    let same = install(&sandbox, &["--config", &config, "--yes"]).ended(0);
    assert!(
        same.out.contains("nothing to do") && !same.err.contains("SECRET_READABLE"),
        "{}\n{}",
        same.out,
        same.err
    );
    unseen(&sandbox, &same, "after");
}
