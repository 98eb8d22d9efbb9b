//! Starts that go wrong, starts that only take their time, and what is told of them: a machine
//! whose unit is played by the clock.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::join::{Behavior, Server};
use crate::support::{RunOutput, Sandbox, VERSION, sha256};

/// Plays `k3s.service` or `k3s-agent.service` from its (re)start on: `act` is shell that sees
/// `$age`, in tenths of a second, and prints what `systemctl show` prints of its state; `journal`
/// prints the journal.
fn play(sandbox: &Sandbox, act: &str, journal: &str) {
    let real = std::fs::read_to_string(sandbox.path("bin/systemctl")).unwrap();
    if !real.contains("# played") {
        sandbox.beside("systemctl-real", &real, 0o755);
    }
    let age = "since=$(cat \"$PIPEOPS_ROOT/../started\" 2>/dev/null || echo 0); age=$(( ($(date +%s%N) - since) / 100000000 ))";
    let systemctl = format!(
        "#!/bin/sh\n# played\nPATH=/usr/bin:/bin\ncase $1 in start|restart) date +%s%N > \"$PIPEOPS_ROOT/../started\" ;; esac\n\
         case \"$1 $4\" in 'show k3s.service' | 'show k3s-agent.service')\n\
         if [ -e \"$PIPEOPS_ROOT/../started\" ]; then echo LoadState=loaded; echo UnitFileState=enabled; echo Type=notify; {age}\n{act}\nexit; fi ;; esac\n\
         exec \"$PIPEOPS_ROOT/../systemctl-real\" \"$@\"\n"
    );
    sandbox.beside("bin/systemctl", &systemctl, 0o755);
    sandbox.beside(
        "bin/journalctl",
        &format!("#!/bin/sh\nPATH=/usr/bin:/bin\n{age}\n{journal}\n"),
        0o755,
    );
}

/// Dies every half second; each time it says `line`.
const DIES: &str =
    "echo ActiveState=activating; echo SubState=auto-restart; echo NRestarts=$((age / 5))";
fn says(line: &str) -> String {
    format!(
        "n=0; while [ $n -lt $((age / 5 + 1)) ]; do echo 'time=\"2026-11-27T05:00:0'$((n % 10))'Z\" {line}'; n=$((n + 1)); done"
    )
}
const UP: &str = "echo ActiveState=active; echo SubState=running; echo NRestarts=0";
const ACTIVATING: &str = "echo ActiveState=activating; echo SubState=start; echo NRestarts=0";

/// Most of a case is waiting: all of them wait together.
fn in_parallel<T: Send>(cases: impl IntoIterator<Item = T>, one: impl Fn(T) + Sync) {
    std::thread::scope(|scope| {
        let all: Vec<_> = cases.into_iter().map(|case| scope.spawn(|| one(case))).collect();
        all.into_iter().for_each(|t| t.join().unwrap());
    });
}

/// It ended early, with this code and without a word of waiting longer.
#[track_caller]
fn ended_early(said: &RunOutput, begin: Instant, code: i32, word: &str) {
    assert_eq!(said.code, code, "{}\n{}", said.out, said.err);
    assert!(
        begin.elapsed() < Duration::from_secs(30),
        "it took {} s\n{}",
        begin.elapsed().as_secs(),
        said.err
    );
    assert!(said.err.contains(word), "{word}\n{}", said.err);
    for wait in ["--timeout", "longer"] {
        assert!(!said.err.contains(wait), "{wait}\n{}", said.err);
    }
}

#[test]
fn a_unit_that_ends_again_and_again_is_told_soon() {
    let refused = "level=info msg=\"Waiting to retrieve agent configuration; server is not ready: \\\"overlayfs\\\" snapshotter cannot be enabled for \\\"/var/lib/rancher/k3s/agent/containerd\\\", try using \\\"fuse-overlayfs\\\" or \\\"native\\\": failed to mount overlay: invalid argument\"";
    let cases = [
        (DIES, says("level=fatal msg=\"Error: trouble that no table knows 4711\""), "START_LOOP"),
        (
            DIES,
            says(
                "level=fatal msg=\"Error: invalid cluster-cidr 10.42/16: invalid CIDR address: 10.42/16\"",
            ),
            "K3S_SETTING_INVALID",
        ),
        (
            DIES,
            says(
                "level=error msg=\"Shutdown request received: \\\"kubelet exited: failed to validate kubelet flags: unknown labels specified with --node-labels: [x]\\\"\"",
            ),
            "NODE_LABEL_INVALID",
        ),
        (
            DIES,
            says(
                "level=fatal msg=\"Failed to start networking: listen tcp 0.0.0.0:6444: bind: address already in use\"",
            ),
            "PORT_IN_USE",
        ),
        (
            DIES,
            "echo 'k3s.service: Main process exited, code=exited, status=1/FAILURE'".into(),
            "START_LOOP",
        ),
        (ACTIVATING, format!("echo '{refused}'"), "SNAPSHOTTER_REFUSED"),
        (ACTIVATING, says(refused), "SNAPSHOTTER_REFUSED"),
    ];
    in_parallel(cases, |(act, journal, code)| {
        let sandbox = Sandbox::new();
        play(&sandbox, act, &journal);
        let begin = Instant::now();
        let said = sandbox.install(&["--timeout", "120s"]);
        ended_early(&said, begin, 8, code);
        assert!(sandbox.calls().contains("systemctl stop k3s.service"), "it is not left in a loop");
        // one line each, with its number, whatever the time in front
        for line in ["4711", "invalid CIDR address", "address already in use", "snapshotter cannot"]
        {
            assert!(said.err.matches(line).count() <= 1, "{line}\n{}", said.err);
        }
        if act == DIES && code != "START_LOOP" {
            assert!(said.err.contains(" times)"), "{}", said.err);
        }
    });
}

#[test]
fn a_start_that_takes_its_time_or_heals_is_waited_for() {
    let up_after = |tenths: u32, before: &str| {
        format!("if [ $age -ge {tenths} ]; then {UP}; else {before}; fi")
    };
    let quiet = "echo 'level=info msg=\"Starting k3s v1.36.2+k3s1\"'; echo 'level=info msg=\"Importing images from /var/lib/rancher/k3s/agent/images/a.tar\"'; echo 'level=info msg=\"Waiting for API server to become available\"'; echo '{\"level\":\"warn\",\"msg\":\"apply request took too long\",\"took\":\"9.1s\"}'";
    let twice = "echo ActiveState=activating; echo SubState=auto-restart; n=$((age / 10)); [ $n -lt 2 ] || n=2; echo NRestarts=$n";
    let port = "echo 'level=fatal msg=\"listen tcp :6443: bind: address already in use\"'; echo 'level=fatal msg=\"listen tcp :6443: bind: address already in use\"'";
    let unknown = "echo 'level=fatal msg=\"Error: trouble that no table knows\"'; echo 'level=fatal msg=\"Error: trouble that no table knows\"'";
    let slow =
        "for n in 1 2 3 4 5 6; do echo 'level=fatal msg=\"leaderelection lost for k3s\"'; done";
    let refused = "echo 'level=info msg=\"Waiting to retrieve agent configuration; server is not ready: \\\"overlayfs\\\" snapshotter cannot be enabled for \\\"/x\\\": failed to mount overlay: no such device\"'; [ $age -lt 40 ] || echo 'level=info msg=\"Running containerd -c /x\"'";
    let cases = [
        (up_after(150, ACTIVATING), quiet),
        (up_after(90, twice), port),
        (up_after(90, twice), unknown),
        (up_after(90, DIES), slow),
        (up_after(150, ACTIVATING), refused),
    ];
    in_parallel(cases, |(act, journal)| {
        let sandbox = Sandbox::new();
        play(&sandbox, &act, journal);
        sandbox.install(&["--timeout", "60s"]).ended(0);
        assert!(!sandbox.calls().contains("systemctl stop k3s.service"), "{journal}");
    });
}

#[test]
fn a_worker_is_told_soon_too_and_waits_for_a_server_that_is_away() {
    let server = Server::start(Behavior::Good);
    let join = |sandbox: &Sandbox| {
        let release = sandbox.path("release");
        sandbox.run(&[
            "join-worker",
            &server.url,
            &server.token(),
            "--offline-dir",
            &release,
            "--yes",
            "--timeout",
            "120s",
        ])
    };
    let sandbox = Sandbox::new();
    play(&sandbox, DIES, &says("level=fatal msg=\"Error: failed to find cpuset cgroup (v2)\""));
    let begin = Instant::now();
    ended_early(&join(&sandbox), begin, 8, "CGROUP_CONTROLLERS");
    // the server restarts meanwhile, and for a while knows no token
    let away = "for n in 1 2 3 4 5 6 7 8; do echo 'level=error msg=\"Failed to validate connection to cluster at https://10.0.0.1:6443: failed to get CA certs: Get \\\"https://10.0.0.1:6443/cacerts\\\": dial tcp 10.0.0.1:6443: connect: connection refused\"'; echo 'level=info msg=\"Waiting to retrieve agent configuration; server is not ready: https://127.0.0.1:6444/v1-k3s/x: 401 Unauthorized\"'; done";
    let sandbox = Sandbox::new();
    play(&sandbox, &format!("if [ $age -ge 120 ]; then {UP}; else {ACTIVATING}; fi"), away);
    join(&sandbox).ended(0);
}

#[test]
fn a_warning_is_never_the_code() {
    let weak = "echo 'level=warning msg=\"Failed to load kernel module br_netfilter with modprobe\"'; echo 'failed to pull image \"x\": toomanyrequests'; echo 'level=warning msg=\"Failed to load kernel module iptable_nat with modprobe\"'";
    let sandbox = Sandbox::new();
    play(&sandbox, ACTIVATING, weak);
    let said = sandbox.install(&["--timeout", "4s", "-o", "json"]).ended(8);
    assert_eq!(said.json()["error"]["code"], "START_TIMEOUT", "{}", said.out);
    // containerd's own log has what k3s' journal has not
    sandbox.put(
        "/var/lib/rancher/k3s/agent/containerd/containerd.log",
        &format!("time=\"2020-01-01T05:00:00Z\" level=fatal msg=\"no space left on device\"\ntime=\"{}\" level=fatal msg=\"Failed to run CRI service\" error=\"failed to start streaming server: listen tcp 127.0.0.1:10010: bind: address already in use\"\n", at(600)),
    );
    play(
        &sandbox,
        DIES,
        &format!(
            "{weak}; {}",
            says(
                "level=error msg=\"Shutdown request received: \\\"containerd exited: exit status 1\\\"\""
            )
        ),
    );
    let begin = Instant::now();
    let said = sandbox.install(&["--timeout", "120s"]);
    ended_early(&said, begin, 8, "PORT_IN_USE");
    assert!(
        said.err.contains("127.0.0.1:10010") && !said.err.contains("[KMOD_MISSING]"),
        "{}",
        said.err
    );
}

#[test]
fn a_change_that_keeps_killing_the_node_is_taken_back_soon() {
    let sandbox = Sandbox::new();
    sandbox.install(&[]).ended(0);
    let drop_in = sandbox.read("/etc/rancher/k3s/config.yaml.d/50-pipeops.yaml");
    let act = format!(
        "if grep -qs planted-gate \"$PIPEOPS_ROOT/etc/rancher/k3s/config.yaml.d/50-pipeops.yaml\"; then {DIES}; else {UP}; fi"
    );
    play(
        &sandbox,
        &act,
        &says(
            "level=error msg=\"Shutdown request received: \\\"apiserver exited: something of its own\\\"\"",
        ),
    );
    sandbox.beside(
        "bad.toml",
        "[k3s]\nkube-apiserver-arg = [\"feature-gates=planted-gate=true\"]\n",
        0o644,
    );
    let begin = Instant::now();
    let said = sandbox.install(&["--config", &sandbox.path("bad.toml"), "--timeout", "120s"]);
    ended_early(&said, begin, 9, "APISERVER_EXITS");
    assert!(said.err.contains("the former settings are back"), "{}", said.err);
    assert_eq!(sandbox.read("/etc/rancher/k3s/config.yaml.d/50-pipeops.yaml"), drop_in);
}

/// `systemctl show` of a unit that runs since the last (re)start, by the monotonic clock.
const UP_SINCE: &str = "echo ActiveState=active; echo SubState=running; echo NRestarts=0; up=$(cut -d' ' -f1 /proc/uptime | tr -d .)0000; echo ExecMainStartTimestampMonotonic=$((up - age * 100000))";

fn node(beat: &str, version: &str) -> Value {
    json!({"metadata": {"name": "vm1",
        "labels": {"node-role.kubernetes.io/control-plane": "true"}}, "status": {
        "conditions": [{"type": "Ready", "status": "True", "message": "ok",
            "lastHeartbeatTime": beat}],
        "addresses": [{"type": "InternalIP", "address": "10.0.0.5"}],
        "nodeInfo": {"kubeletVersion": version}}})
}

const LEASE: &str = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases/vm1";

fn at(offset: i64) -> String {
    (jiff::Timestamp::now() + jiff::SignedDuration::from_secs(offset)).to_string()
}

#[test]
fn ready_from_before_the_restart_is_not_ready() {
    let cases = [
        ("a heartbeat of the former process, and none since", at(-30), None, 8),
        ("the lease is renewed", at(-30), Some(2), 0),
        ("by a clock that was set back since", at(3600), None, 8),
        ("the same, and the lease changes", at(3600), Some(-7200), 0),
        ("a day old, as a node object that outlived its machine's time", at(-86_400), Some(5), 0),
    ];
    in_parallel(cases, |(name, first, then, expected)| {
        let sandbox = Sandbox::new();
        play(&sandbox, UP_SINCE, "");
        let objects = sandbox.api.objects.clone();
        objects.lock().unwrap().insert("/api/v1/nodes/vm1".into(), node(&first, VERSION));
        objects.lock().unwrap().insert(LEASE.into(), json!({"spec": {"renewTime": first}}));
        let renewal = then.map(|offset| {
            let started = sandbox.path("started");
            std::thread::spawn(move || {
                while !std::path::Path::new(&started).exists() {
                    std::thread::sleep(Duration::from_millis(20));
                }
                std::thread::sleep(Duration::from_secs(3));
                objects
                    .lock()
                    .unwrap()
                    .insert(LEASE.into(), json!({"spec": {"renewTime": at(offset)}}));
            })
        });
        let begin = Instant::now();
        let said = sandbox.install(&["--timeout", "12s"]);
        assert_eq!(said.code, expected, "{name}\n{}\n{}", said.out, said.err);
        assert!(begin.elapsed() > Duration::from_secs(2), "{name}: it did not wait");
        if expected != 0 {
            assert!(
                said.err.contains("no sign of life since k3s.service was started"),
                "{name}\n{}",
                said.err
            );
        }
        renewal.into_iter().for_each(|r| r.join().unwrap());
    });
}

#[test]
fn after_an_upgrade_the_node_reports_the_new_version_or_is_not_ready() {
    let sandbox = Sandbox::new();
    sandbox.install(&[]).ended(0);
    let k3s = std::fs::read_to_string(sandbox.path("release/k3s"))
        .unwrap()
        .replace("v1.36.2+k3s1", "v1.36.3+k3s1");
    sandbox.beside("release/k3s", &k3s, 0o755);
    let list = format!(
        "{}  k3s\n{}  k3s-airgap-images-amd64.tar\n",
        sha256(k3s.as_bytes()),
        sha256(b"images")
    );
    sandbox.beside("release/sha256sum-amd64.txt", &list, 0o644);
    play(&sandbox, UP_SINCE, "");
    let objects = sandbox.api.objects.clone();
    objects.lock().unwrap().insert("/api/v1/nodes/vm1".into(), node(&at(60), VERSION));
    let said = sandbox.install(&["--k3s-version", "v1.36.3+k3s1", "--timeout", "4s"]).ended(8);
    assert!(said.err.contains("still reports v1.36.2+k3s1"), "{}", said.err);
    objects.lock().unwrap().insert("/api/v1/nodes/vm1".into(), node(&at(20), "v1.36.3+k3s1"));
    sandbox.install(&["--k3s-version", "v1.36.3+k3s1"]).ended(0);
}

#[test]
fn a_chart_or_a_deployment_that_fails_says_what_its_pod_says() {
    let pod = |name: &str, status: Value| {
        json!({"kind": "PodList",
            "items": [{"metadata": {"name": name}, "status": status}]})
    };
    let crash = json!({"phase": "Running", "containerStatuses": [{"restartCount": 6,
        "state": {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 5m0s"}},
        "lastState": {"terminated": {"exitCode": 1, "reason": "Error",
            "message": "+ helm install\nError: INSTALLATION FAILED: planted trouble\n"}}}]});
    let pull = json!({"phase": "Pending",
        "containerStatuses": [{"state": {"waiting": {"reason": "ImagePullBackOff",
        "message": "Back-off pulling image \"quay.io/x\""}}}]});
    let nowhere = json!({"phase": "Pending",
        "conditions": [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable",
        "message": "0/1 nodes are available: 1 Insufficient cpu."}]});
    let chart = "/apis/helm.cattle.io/v1/namespaces/kube-system/helmcharts/cert-manager";
    let job = "/apis/batch/v1/namespaces/kube-system/jobs/helm-install-cert-manager";
    let deployment = "/apis/apps/v1/namespaces/cert-manager/deployments/cert-manager";
    let cases = [
        (
            0,
            "kube-system",
            crash.clone(),
            "exit code 1: Error: INSTALLATION FAILED: planted trouble",
        ),
        (0, "kube-system", pull.clone(), "ImagePullBackOff: Back-off pulling image"),
        (0, "kube-system", nowhere.clone(), "1 Insufficient cpu"),
        (
            1,
            "cert-manager",
            crash,
            "0 of 1 pods are ready: web-1 ends again and again (CrashLoopBackOff, restarted 6 times): exit code 1",
        ),
        (1, "cert-manager", pull, "0 of 1 pods are ready: web-1: ImagePullBackOff"),
        (
            1,
            "cert-manager",
            nowhere,
            "0 of 1 pods are ready: no node takes web-1: 0/1 nodes are available",
        ),
    ];
    in_parallel(cases, |(done, namespace, status, expected)| {
        let sandbox = Sandbox::new();
        {
            let mut objects = sandbox.api.objects.lock().unwrap();
            objects
                .insert(chart.into(), json!({"status": {"jobName": "helm-install-cert-manager"}}));
            objects.insert(job.into(), json!({"status": {"active": 1 - done, "succeeded": done}}));
            let spec = json!({"replicas": 1, "selector": {"matchLabels": {"app": "cert-manager"}}});
            objects
                .insert(deployment.into(), json!({"spec": spec, "status": {"readyReplicas": 0}}));
            objects.insert(format!("/api/v1/namespaces/{namespace}/pods"), pod("web-1", status));
        }
        let said = sandbox.install(&["--components", "cert-manager", "--timeout", "3s"]).ended(10);
        assert!(said.err.contains(expected), "{expected}\n{}", said.err);
        let info = sandbox.run(&["cluster-info"]);
        assert!(info.out.contains(expected), "{expected}\n{}", info.out);
    });
}

#[test]
fn an_agent_that_ends_again_and_again_or_for_good_is_told_too() {
    let cases = [
        (
            "echo ActiveState=failed; echo SubState=failed; echo Result=exit-code; echo NRestarts=0",
            "error: /etc/pipeops/agent.toml: unknown key planted-trouble-4711-canary [CONFIG_INVALID]",
        ),
        (
            "echo ActiveState=activating; echo SubState=auto-restart; n=$(cat \"$PIPEOPS_ROOT/../asked\" 2>/dev/null || echo 0); n=$((n + 1)); echo $n > \"$PIPEOPS_ROOT/../asked\"; echo NRestarts=$n",
            "error: the state directory is planted-trouble-4711-canary [INTERNAL]",
        ),
    ];
    in_parallel(cases, |(act, line)| {
        let sandbox = Sandbox::new();
        let real = std::fs::read_to_string(sandbox.path("bin/systemctl")).unwrap();
        sandbox.beside("systemctl-real", &real, 0o755);
        let shown = format!(
            "#!/bin/sh\nPATH=/usr/bin:/bin\nif [ \"$1 $4\" = 'show pipeops-agent.service' ] && [ -e \"$PIPEOPS_ROOT/etc/systemd/system/$4\" ]; then echo LoadState=loaded; echo UnitFileState=enabled; {act}; exit; fi\nexec \"$PIPEOPS_ROOT/../systemctl-real\" \"$@\"\n"
        );
        sandbox.beside("bin/systemctl", &shown, 0o755);
        sandbox.beside(
            "bin/journalctl",
            &format!("#!/bin/sh\ncase \"$*\" in *pipeops-agent.service*) echo '{line}' ;; esac\n"),
            0o755,
        );
        let begin = Instant::now();
        let said = sandbox.install(&[]);
        ended_early(&said, begin, 8, "START_LOOP");
        assert!(
            said.err.contains(line) && !sandbox.calls().contains("systemctl stop pipeops-agent"),
            "{}",
            said.err
        );
    });
}
