//! A Runner's way: control plane, tunnel, TLS to the agent, Kubernetes API. The real executable in
//! the middle.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::world::{Scripted, TOKEN, World};

fn status(answer: &str) -> u16 {
    answer.split(' ').nth(1).and_then(|s| s.parse().ok()).unwrap_or(0)
}

fn audit(world: &World) -> Vec<Value> {
    let path = world.agent.sandbox.root().join("var/lib/pipeops-agent/audit/audit.jsonl");
    std::fs::read_to_string(path)
        .unwrap_or_default()
        .lines()
        .map(|l| serde_json::from_str(l).unwrap())
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_runner_reaches_the_cluster_as_what_it_is_and_nobody_sees_a_secret() {
    let world = World::new().await.up().await;
    assert_eq!(
        status(&world.raw(b"GET /healthz HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").await),
        200
    );
    // without a token nothing else
    for path in
        ["/readyz", "/version", "/metrics", "/api/v1/status", "/k8s/api", "/", "/k8s", "/nothing"]
    {
        let answer = world
            .raw(format!("GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").as_bytes())
            .await;
        assert_eq!(status(&answer), 401, "{path}: {answer}");
        let other = world
            .ask("GET", path, &world.control_plane.token("another-agent", "viewer", None))
            .await;
        assert_eq!(status(&other), 401, "{path}: {other}");
    }
    let token = world.token("deployer");
    for (path, expected) in [
        ("/readyz", 200),
        ("/version", 200),
        ("/metrics", 200),
        ("/api/v1/status", 200),
        ("/api/v1/audit", 403),
        ("/nothing", 404),
    ] {
        let answer = world.ask("GET", path, &token).await;
        assert_eq!(status(&answer), expected, "{path}: {answer}");
        assert!(!answer.contains("canary-4711-in-plain-text"), "{answer}");
    }
    assert_eq!(status(&world.ask("POST", "/version", &token).await), 405);
    let answer = world
        .ask("GET", "/k8s/api/v1/namespaces/beta/pods/caf%C3%A9?labelSelector=a%3Db", &token)
        .await;
    assert_eq!(status(&answer), 200, "{answer}");
    let seen = world.kube.through().pop().unwrap();
    assert_eq!(
        (seen.method.as_str(), seen.uri.as_str()),
        ("GET", "/api/v1/namespaces/beta/pods/caf%C3%A9?labelSelector=a%3Db")
    );
    assert_eq!(seen.all("impersonate-user"), ["pipeops:runner"]);
    assert_eq!(seen.all("impersonate-group"), ["pipeops:deployer"]);
    assert_eq!(seen.all("impersonate-extra-pipeops.io%2fsubject"), ["runner-1"]);
    assert_eq!(seen.all("authorization"), ["Bearer sa-planted-canary-4711-in-plain-text"]);
    // the registration told what it should, and no more
    let (_, bearer, body) = world.control_plane.calls("/register")[0].clone();
    assert_eq!(
        (bearer.as_str(), body["agent"]["id"] == world.id.as_str(), &body["max_role"]),
        (TOKEN, true, &json!("operator"))
    );
    assert_eq!(body["cluster"]["name"], "test");
    for (path, _, body) in world.control_plane.calls("/") {
        assert!(!body.to_string().contains("canary-4711-in-plain-text"), "{path}: {body}");
    }
    let state = world.agent.sandbox.root().join("var/lib/pipeops-agent");
    for file in ["identity.json", "credential.json", "run-id", "audit/audit.jsonl"] {
        use std::os::unix::fs::PermissionsExt as _;
        let mode = std::fs::metadata(state.join(file))
            .unwrap_or_else(|e| panic!("{file}: {e}"))
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600, "{file}");
    }
    let log = audit(&world);
    let record =
        log.iter().find(|r| r["path"] == "/api/v1/namespaces/beta/pods/caf%C3%A9").unwrap();
    assert_eq!(
        (&record["subject"], &record["verdict"], &record["status"], &record["phase"]),
        (&json!("runner-1"), &json!("allowed"), &json!(200), &json!("call"))
    );
    assert!(
        !std::fs::read_to_string(state.join("audit/audit.jsonl"))
            .unwrap()
            .contains("planted-canary-4711-in-plain-text")
    );
}

/// On an http proxy whoever runs the FRP server reads along: there it says that it lives, and
/// nothing else.
#[tokio::test(flavor = "multi_thread")]
async fn on_a_plain_way_nothing_but_healthz_is_served() {
    let world = World::with("", |control_plane| {
        let web = json!({"name": "web", "type": "http", "custom_domains": ["agent.test"]});
        control_plane.config.lock().unwrap()["tunnel"]["proxies"].as_array_mut().unwrap().push(web);
    })
    .await;
    let frps = world.frps.clone();
    world.control_plane.until("both proxies", |_| frps.proxies() == ["agent", "web"]).await;
    for (path, expected) in [
        ("/healthz", "200"),
        ("/readyz", "403"),
        ("/k8s/api", "403"),
        ("/", "403"),
        ("/api/v1/status", "403"),
    ] {
        let mut io = world.frps.dial("web").await.unwrap();
        let head = format!(
            "GET {path} HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer x\r\nConnection: close\r\n\r\n"
        );
        io.write_all(head.as_bytes()).await.unwrap();
        io.flush().await.unwrap();
        let mut answer = String::new();
        let _ = io.read_to_string(&mut answer).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {expected}")), "{path}: {answer}");
        assert_eq!(answer.contains("plain_transport"), expected == "403", "{answer}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_changes_something_is_put_on_record_before_and_after() {
    let world = World::new().await.up().await;
    let token = world.token("deployer");
    assert_eq!(
        status(&world.ask("DELETE", "/k8s/api/v1/namespaces/beta/pods/p", &token).await),
        200
    );
    let log = audit(&world);
    let phases: Vec<&Value> =
        log.iter().filter(|r| r["method"] == "DELETE").map(|r| &r["phase"]).collect();
    assert_eq!(phases, [&json!("start"), &json!("end")]);
    // the head of the chain is told in heartbeats, and the log verifies
    let head = world.control_plane.calls("/heartbeat").len();
    let control_plane = world.control_plane.clone();
    world
        .control_plane
        .until("a later heartbeat", |_| control_plane.calls("/heartbeat").len() > head + 1)
        .await;
    let told = world.control_plane.calls("/heartbeat").pop().unwrap().2["audit_head"].clone();
    let answer = crate::support::run_output(
        world.agent.sandbox.command(&["audit", "verify", "-o", "json"]).output().unwrap(),
    )
    .ended(0);
    let verified: Value = serde_json::from_str(&answer.out).unwrap();
    assert_eq!(verified["head"], told);
    // a record that was changed is found
    let path = world.agent.sandbox.root().join("var/lib/pipeops-agent/audit/audit.jsonl");
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, text.replacen("\"status\":200", "\"status\":404", 1)).unwrap();
    let answer = crate::support::run_output(
        world.agent.sandbox.command(&["audit", "verify"]).output().unwrap(),
    )
    .ended(6);
    assert!(answer.err.contains("the record was changed"), "{}", answer.err);
    assert!(
        crate::support::run_output(
            world.agent.sandbox.command(&["audit", "tail", "-n", "1"]).output().unwrap()
        )
        .ended(0)
        .out
        .contains("\"seq\":")
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn upgrades_pass_after_a_real_101_and_only_then() {
    let world = World::new().await.up().await;
    let token = world.token("deployer");
    for protocol in ["websocket", "SPDY/3.1"] {
        let mut io = world.dial(b"http/1.1").await;
        let head = format!(
            "POST /k8s/api/v1/namespaces/beta/pods/p/exec?command=sh HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {token}\r\nConnection: Upgrade\r\nUpgrade: {protocol}\r\n\r\nearly"
        );
        io.write_all(head.as_bytes()).await.unwrap();
        io.flush().await.unwrap();
        let mut got = String::new();
        let mut buffer = vec![0; 4096];
        while !got.contains("early") {
            let n = tokio::time::timeout(Duration::from_secs(10), io.read(&mut buffer))
                .await
                .unwrap()
                .unwrap();
            assert!(n > 0, "closed after {got}");
            got.push_str(&String::from_utf8_lossy(&buffer[..n]));
        }
        assert!(
            got.starts_with("HTTP/1.1 101")
                && got.to_lowercase().contains(&format!("upgrade: {}", protocol.to_lowercase())),
            "{got}"
        );
        io.write_all(b"keys BYE").await.unwrap();
        io.flush().await.unwrap();
        let mut rest = String::new();
        let _ = tokio::time::timeout(Duration::from_secs(10), io.read_to_string(&mut rest))
            .await
            .unwrap();
        assert_eq!(rest, "keys BYE");
    }
    let deny = |query: &str| {
        format!(
            "POST /k8s/api/v1/namespaces/beta/pods/p/exec?{query} HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {token}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
        )
    };
    let answer = world.raw(deny("deny=1").as_bytes()).await;
    assert!(status(&answer) == 403 && answer.contains("no exec for you"), "{answer}");
    let log = audit(&world);
    let phases: Vec<&str> = log
        .iter()
        .filter(|r| r["path"].as_str().unwrap().ends_with("/exec"))
        .map(|r| r["phase"].as_str().unwrap())
        .collect();
    assert_eq!(phases.iter().filter(|p| **p == "start").count(), 3, "{phases:?}");
    assert!(!log.iter().any(|r| r.to_string().contains("command")));
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_of_the_cluster_that_lead_elsewhere_or_blame_the_caller_are_not_passed_on() {
    let world = World::new().await.up().await;
    let token = world.token("viewer");
    let answer = world.ask("GET", "/k8s/api/v1/namespaces/beta/pods/redirect", &token).await;
    assert!(
        status(&answer) == 502 && answer.contains("redirect_refused") && !answer.contains("evil"),
        "{answer}"
    );
    // a 401 means the agent's credential, and its caller can do nothing about that
    let answer = world.ask("GET", "/k8s/api/v1/namespaces/beta/pods/unauthorized", &token).await;
    assert!(
        status(&answer) == 503
            && answer.contains("kubernetes_credential")
            && !answer.to_lowercase().contains("retry-after"),
        "{answer}"
    );
    // nor does a client of Kubernetes wait in silence for one that is away
    world.agent.sandbox.put("/run/pipeops-credential/kubeconfig", "");
    let begun = Instant::now();
    loop {
        let answer = world.ask("GET", "/k8s/api/v1/pods", &token).await;
        if answer.contains("kubernetes_waiting") {
            assert!(
                status(&answer) == 503 && !answer.to_lowercase().contains("retry-after"),
                "{answer}"
            );
            break;
        }
        assert!(begun.elapsed() < Duration::from_secs(30), "{answer}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn too_many_watches_of_a_caller_are_refused_and_nothing_else_is() {
    let world =
        World::with("watches-per-caller = 3\nstreams-per-caller = 2\n", |_| {}).await.up().await;
    let token = world.token("viewer");
    let head = format!(
        "GET /k8s/api/v1/pods?watch=true HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {token}\r\n\r\n"
    );
    let mut held = Vec::new();
    for _ in 0..3 {
        let mut io = world.dial(b"http/1.1").await;
        io.write_all(head.as_bytes()).await.unwrap();
        io.flush().await.unwrap();
        let mut first = [0; 12];
        io.read_exact(&mut first).await.unwrap();
        assert_eq!(&first, b"HTTP/1.1 200");
        held.push(io);
    }
    // what is full is named, and kubectl says so at once instead of trying again in silence
    let follow = "/k8s/api/v1/namespaces/beta/pods/p/log?follow=true";
    for full in [
        "/k8s/api/v1/pods?watch=1",
        "/k8s/apis/apps/v1/deployments?allowWatchBookmarks=true&watch=true",
        follow,
    ] {
        let answer = world.ask("GET", full, &token).await;
        assert!(
            status(&answer) == 429
                && answer.contains("too_many_watches")
                && answer.contains("3 watches and followed logs open"),
            "{answer}"
        );
        assert!(
            answer.contains("watches-per-caller") && !answer.to_lowercase().contains("retry-after"),
            "{answer}"
        );
    }
    // the caller goes on with everything else, and others with theirs
    for open in [
        "/k8s/api/v1/pods",
        "/k8s/api/v1/pods?watch=false",
        "/k8s/api/v1/namespaces/beta/pods/p/log",
        "/k8s/version",
    ] {
        assert_eq!(status(&world.ask("GET", open, &token).await), 200, "{open}");
    }
    // shells are counted by themselves too
    let exec = format!(
        "POST /k8s/api/v1/namespaces/beta/pods/p/exec HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {}\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n\r\n",
        world.token("deployer")
    );
    let mut shells = Vec::new();
    for expected in ["101", "101", "429"] {
        let mut io = world.dial(b"http/1.1").await;
        io.write_all(exec.as_bytes()).await.unwrap();
        io.flush().await.unwrap();
        let mut first = [0; 12];
        io.read_exact(&mut first).await.unwrap();
        assert_eq!(std::str::from_utf8(&first[9..]).unwrap(), expected);
        shells.push(io);
    }
    assert_eq!(status(&world.ask("GET", "/k8s/api/v1/pods", &token).await), 200);
    // one let go: room again
    drop(held.pop());
    let begun = Instant::now();
    while status(&world.ask("HEAD", "/k8s/api/v1/pods?watch=1", &token).await) != 200 {
        assert!(begun.elapsed() < Duration::from_secs(10), "the stream is never given back");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn large_bodies_stream_in_little_memory() {
    let world = World::new().await.up().await;
    let token = world.token("deployer");
    let pid = world.agent.child.id();
    let rss = || -> u64 {
        let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        text.lines()
            .find(|l| l.starts_with("VmRSS"))
            .unwrap()
            .split_whitespace()
            .nth(1)
            .unwrap()
            .parse()
            .unwrap()
    };
    let download = async |n: u64| {
        let mut io = world.dial(b"http/1.1").await;
        let head = format!(
            "GET /k8s/api/v1/namespaces/beta/pods/bulk/log?n={n} HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {token}\r\nConnection: close\r\n\r\n"
        );
        io.write_all(head.as_bytes()).await.unwrap();
        io.flush().await.unwrap();
        let (mut got, mut most, mut buffer) = (0_u64, 0, vec![0; 64 * 1024]);
        while let Ok(n @ 1..) = io.read(&mut buffer).await {
            if (got >> 24) != ((got + n as u64) >> 24) {
                most = most.max(rss());
            }
            got += n as u64;
        }
        (got, most)
    };
    download(8 << 20).await;
    let before = rss();
    let (got, most) = download(256 << 20).await;
    assert!(got > 256 << 20, "{got}");
    println!("256 MiB: {} KiB before, at most {most} KiB", before);
    assert!(most < before + 8 * 1024, "{before} KiB before, {most} KiB at most");
    let upload = 64_usize << 20;
    let mut io = world.dial(b"http/1.1").await;
    let head = format!(
        "POST /k8s/api/v1/namespaces/beta/upload HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {token}\r\nContent-Length: {upload}\r\nConnection: close\r\n\r\n"
    );
    io.write_all(head.as_bytes()).await.unwrap();
    for _ in 0..upload / 65536 {
        io.write_all(&[b'y'; 65536]).await.unwrap();
    }
    io.flush().await.unwrap();
    let mut answer = String::new();
    let _ = io.read_to_string(&mut answer).await;
    assert!(answer.contains(&format!("{{\"bytes\":{upload}}}")), "{answer}");
    assert!(rss() < before + 8 * 1024);
}

#[tokio::test(flavor = "multi_thread")]
async fn over_h2_requests_go_together_and_upgrades_are_told_where_to_go() {
    let world = World::new().await.up().await;
    let token = world.token("viewer");
    let io = world.dial(b"h2").await;
    let (mut sender, connection) = hyper::client::conn::http2::handshake(
        hyper_util::rt::TokioExecutor::new(),
        hyper_util::rt::TokioIo::new(io),
    )
    .await
    .unwrap();
    tokio::spawn(connection);
    let mut get = |path: &str| {
        let request = hyper::Request::get(format!("https://agent{path}"))
            .header("authorization", format!("Bearer {token}"));
        sender
            .send_request(request.body(http_body_util::Empty::<hyper::body::Bytes>::new()).unwrap())
    };
    let (one, two, exec) = tokio::join!(
        get("/k8s/api/v1/pods"),
        get("/version"),
        get("/k8s/api/v1/namespaces/beta/pods/p/exec")
    );
    assert_eq!(
        (one.unwrap().status(), two.unwrap().status(), exec.unwrap().status()),
        (hyper::StatusCode::OK, hyper::StatusCode::OK, hyper::StatusCode::BAD_REQUEST)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_is_told_first_finishes_what_is_short_and_refuses_what_is_new() {
    let mut world = World::new().await.up().await;
    let token = world.token("viewer");
    let slow = {
        let mut io = world.dial(b"http/1.1").await;
        let head = format!(
            "GET /k8s/api/v1/namespaces/beta/pods/slow HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {token}\r\nConnection: close\r\n\r\n"
        );
        io.write_all(head.as_bytes()).await.unwrap();
        io.flush().await.unwrap();
        tokio::spawn(async move {
            let mut answer = String::new();
            let _ = io.read_to_string(&mut answer).await;
            answer
        })
    };
    let kube = world.kube.clone();
    world
        .control_plane
        .until("the slow call", |_| kube.through().iter().any(|s| s.uri.ends_with("/slow")))
        .await;
    let begun = Instant::now();
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(world.agent.child.id().try_into().unwrap()),
        nix::sys::signal::Signal::SIGTERM,
    )
    .unwrap();
    let answer = slow.await.unwrap();
    assert!(status(&answer) == 200 && answer.contains("\"slow\":true"), "{answer}");
    let ended = tokio::task::block_in_place(|| world.agent.child.wait().unwrap());
    assert_eq!(ended.code(), Some(0));
    println!("stopped after {:?}", begun.elapsed());
    assert_eq!(world.control_plane.calls("/heartbeat").last().unwrap().2["state"], "draining");
    assert!(world.frps.proxies().is_empty());
    assert_eq!(
        audit(&world).iter().filter(|r| r["path"].as_str().unwrap().ends_with("/slow")).count(),
        1
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_identity_outlives_a_restart_and_the_token_is_used_once() {
    let mut world = World::new().await.up().await;
    world.agent.child.kill().unwrap();
    world.agent.child.wait().unwrap();
    let run_id =
        std::fs::read_to_string(world.agent.sandbox.root().join("var/lib/pipeops-agent/run-id"))
            .unwrap();
    let registrations = world.control_plane.calls("/register").len();
    let mut again =
        world.agent.sandbox.command(&["run"]).env("AGENT_TOKEN", TOKEN).spawn().unwrap();
    let beats = world.control_plane.calls("/heartbeat").len();
    let control_plane = world.control_plane.clone();
    world
        .control_plane
        .until("heartbeats again", |_| control_plane.calls("/heartbeat").len() > beats)
        .await;
    assert_eq!(world.control_plane.calls("/register").len(), registrations);
    assert!(world.control_plane.calls("/heartbeat").last().unwrap().0.contains(&world.id));
    let frps = world.frps.clone();
    world.control_plane.until("the tunnel again", |_| frps.proxies() == ["agent"]).await;
    assert_eq!(
        std::fs::read_to_string(world.agent.sandbox.root().join("var/lib/pipeops-agent/run-id"))
            .unwrap(),
        run_id
    );
    again.kill().unwrap();
    again.wait().unwrap();
    // the same disk in another machine is another agent
    world.agent.sandbox.put("/etc/machine-id", "ffffffffffffffffffffffffffffffff\n");
    let mut clone =
        world.agent.sandbox.command(&["run"]).env("AGENT_TOKEN", TOKEN).spawn().unwrap();
    world
        .control_plane
        .until("a registration of its own", |_| {
            control_plane.calls("/register").len() > registrations
        })
        .await;
    assert_ne!(
        world.control_plane.calls("/register").last().unwrap().2["agent"]["id"],
        world.id.as_str()
    );
    clone.kill().unwrap();
    clone.wait().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn refusals_and_faults_of_the_control_plane_become_states_and_heal() {
    let busy = |path, status, times, headers: &[(&'static str, &str)]| Scripted {
        path,
        status,
        body: json!({"code": "busy", "message": "later"}),
        headers: headers.iter().map(|(n, v)| (*n, (*v).to_owned())).collect(),
        times,
    };
    let begun = Instant::now();
    let world = World::with("", |control_plane| {
        control_plane.script.lock().unwrap().push(busy(
            "/register",
            503,
            1,
            &[("retry-after", "3")],
        ))
    })
    .await
    .up()
    .await;
    assert!(begun.elapsed() >= Duration::from_secs(3), "Retry-After was not obeyed");
    // nonsense, an error of the server, a redirect: nothing of it ends the agent or its tunnel
    for script in [
        busy("/heartbeat", 500, 2, &[]),
        busy("/heartbeat", 302, 1, &[("location", "http://127.0.0.1:1/")]),
        busy("/heartbeat", 200, 1, &[]),
    ] {
        world.control_plane.script.lock().unwrap().push(script);
        let beats = world.control_plane.calls("/heartbeat").len();
        let control_plane = world.control_plane.clone();
        world
            .control_plane
            .until("more heartbeats", |_| control_plane.calls("/heartbeat").len() > beats + 4)
            .await;
    }
    assert_eq!(world.frps.proxies(), ["agent"]);
    // revoked: registers again with the token by itself
    world.control_plane.revoke();
    let registrations = world.control_plane.calls("/register").len();
    let control_plane = world.control_plane.clone();
    world
        .control_plane
        .until("a new registration", |_| control_plane.calls("/register").len() > registrations + 1)
        .await;
    assert_eq!(world.control_plane.calls("/register").last().unwrap().1, TOKEN);
    // asked to rotate
    world.control_plane.directives.lock().unwrap().push("rotate_credential");
    world
        .control_plane
        .until("a rotation", |_| !control_plane.calls("/credential").is_empty())
        .await;
    let beats = world.control_plane.calls("/heartbeat").len();
    world
        .control_plane
        .until("heartbeats with the new one", |_| {
            control_plane.calls("/heartbeat").len() > beats + 1
        })
        .await;
    // the clock of the control plane jumps by an hour: named, tolerated, and its tokens stay good
    *world.control_plane.clock.lock().unwrap() = 3600;
    world.agent.until("3600 s behind");
    assert_eq!(status(&world.ask("GET", "/version", &world.token("viewer")).await), 200);
    // a duplicate
    *world.control_plane.clock.lock().unwrap() = 0;
    world.control_plane.script.lock().unwrap().push(busy("/heartbeat", 409, 1, &[]));
    world.agent.until("STATUS=conflict");
    assert_eq!(world.frps.proxies(), ["agent"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn status_reports_wait_on_the_disk_while_nobody_takes_them() {
    let world = World::with("", |control_plane| {
        control_plane.script.lock().unwrap().push(Scripted {
            path: "/status",
            status: 503,
            body: json!({}),
            headers: vec![],
            times: 2,
        });
    })
    .await
    .up()
    .await;
    let queue = world.agent.sandbox.root().join("var/lib/pipeops-agent/queue");
    let waiting = || std::fs::read_dir(&queue).map_or(0, Iterator::count);
    let control_plane = world.control_plane.clone();
    world
        .control_plane
        .until("the reports", |_| control_plane.calls("/status").len() >= 4 && waiting() == 0)
        .await;
    let last = world.control_plane.calls("/status").pop().unwrap().2;
    assert_eq!(
        (&last["kubernetes"], &last["nodes"][0]["name"]),
        (&json!("connected"), &json!("vm1"))
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn another_control_plane_gets_nothing_that_was_for_the_former_one() {
    let mut world = World::new().await.up().await;
    let state = world.agent.sandbox.root().join("var/lib/pipeops-agent");
    let own = std::fs::read_to_string(state.join("queue-url")).unwrap();
    for (url, taken) in [("https://former.test", false), (own.as_str(), true)] {
        world.agent.child.kill().unwrap();
        std::fs::write(state.join("queue-url"), url).unwrap();
        std::fs::write(state.join("queue/0000000000000001-result-o-1.json"), "{}").unwrap();
        let beats = world.control_plane.calls("/heartbeat").len();
        world.agent.restart(&[]);
        let control_plane = world.control_plane.clone();
        let empty = || std::fs::read_dir(state.join("queue")).is_ok_and(|mut d| d.next().is_none());
        world
            .control_plane
            .until("it is back and has nothing left to tell", |_| {
                control_plane.calls("/heartbeat").len() > beats + 1 && empty()
            })
            .await;
        assert_eq!(!world.control_plane.calls("/operations/o-1/result").is_empty(), taken, "{url}");
    }
}
