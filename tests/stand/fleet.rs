//! Many simulated agents at one real control plane on this machine: registrations, heartbeats,
//! memory, a restart.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use pipeops::agent::session::identity::{Identity, LoadedIdentity};
use pipeops::host::Host;
use serde_json::{Value, json};
use tokio::task::JoinSet;

struct Agent {
    id: String,
    credential: String,
    client: reqwest::Client,
}

fn spawn(pipeops: &str, root: &str, port: u16) -> Child {
    let address = format!("127.0.0.1:{port}");
    let args = [
        "control-plane",
        "--root",
        root,
        "--listen",
        &address,
        "--tunnel-listen",
        "127.0.0.1:0",
        "--public-name",
        "127.0.0.1",
    ];
    // another database than a file of its own, where one is named
    let database = std::env::var("PIPEOPS_BENCH_DATABASE").ok();
    Command::new(pipeops)
        .args(args)
        .envs(database.map(|url| ("PIPEOPS_DATABASE_URL", url)))
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

fn rss(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    status
        .lines()
        .find(|l| l.starts_with("VmRSS"))
        .unwrap()
        .split_whitespace()
        .nth(1)
        .unwrap()
        .parse()
        .unwrap()
}

fn percentile(times: &mut [Duration], part: usize) -> f64 {
    times.sort();
    times[(times.len() * part / 100).min(times.len() - 1)].as_secs_f64() * 1000.0
}

fn client(ca: &reqwest::Certificate) -> reqwest::Client {
    reqwest::Client::builder()
        .tls_certs_only([ca.clone()])
        .no_proxy()
        .timeout(Duration::from_secs(20))
        .build()
        .unwrap()
}

/// What a fleet of simulated agents met.
pub(crate) struct Fleet {
    /// A second.
    pub(crate) registrations: f64,
    pub(crate) registrations_p99_ms: f64,
    /// A second.
    pub(crate) heartbeats: f64,
    pub(crate) heartbeats_p99_ms: f64,
    pub(crate) kib_an_agent: f64,
    /// From the restart of the control plane to the last agent's heartbeat.
    pub(crate) back_s: f64,
}

pub(crate) async fn fleet(pipeops: &str, agents: usize) -> Fleet {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().to_str().unwrap().to_owned();
    let port = crate::fake_control_plane::free_port();
    let url = format!("https://127.0.0.1:{port}");
    let mut control_plane = spawn(pipeops, &root, port);
    let mut line = String::new();
    for _ in 0..200 {
        let made = Command::new(pipeops)
            .args(["control-plane", "token", "create", "--uses", "0", "--root", &root])
            .output()
            .unwrap();
        line = String::from_utf8_lossy(&made.stdout).into_owned();
        if !line.is_empty() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let token = line.split_whitespace().nth(1).unwrap().to_owned();
    let keys: Value = serde_json::from_str(
        &std::fs::read_to_string(dir.path().join("var/lib/pipeops-control-plane/keys.json"))
            .unwrap(),
    )
    .unwrap();
    let ca = reqwest::Certificate::from_pem(keys["ca_certificate"].as_str().unwrap().as_bytes())
        .unwrap();
    let bodies: Vec<(String, String, String)> = (0..agents)
        .map(|n| {
            let state = Host::new(dir.path().join(format!("agents/{n}")), None).state_dir("/s").unwrap();
            let LoadedIdentity::Own(identity) = Identity::load(&state, "m").unwrap() else { panic!("a clone") };
            let identity: Identity = *identity;
            let body = json!({"agent": {"id": identity.id, "public_key": identity.public_key, "name": format!("n{n}"), "machine": "m", "version": "0.1.0"},
                "cluster": {"name": format!("n{n}"), "provider": "k3s", "version": "v1.36.2+k3s1", "node_count": 1}, "capabilities": [], "max_role": "operator"});
            let body = body.to_string();
            (identity.id.clone(), identity.sign(body.as_bytes()).unwrap(), body)
        })
        .collect();
    let before = rss(control_plane.id());
    let begun = Instant::now();
    let mut tasks = JoinSet::new();
    let (mut fleet, mut times) = (Vec::new(), Vec::new());
    let mut waiting = bodies.into_iter();
    loop {
        while tasks.len() < 32
            && let Some((id, signature, body)) = waiting.next()
        {
            let (url, token, client) = (url.clone(), token.clone(), client(&ca));
            tasks.spawn(async move {
                let begun = Instant::now();
                let request = client
                    .post(format!("{url}/api/v1/agents/register"))
                    .bearer_auth(token)
                    .header("pipeops-signature", signature);
                let answer: Value = request
                    .body(body)
                    .send()
                    .await
                    .unwrap()
                    .error_for_status()
                    .unwrap()
                    .json()
                    .await
                    .unwrap();
                (
                    Agent {
                        id,
                        credential: answer["credential"].as_str().unwrap().to_owned(),
                        client,
                    },
                    begun.elapsed(),
                )
            });
        }
        let Some(done) = tasks.join_next().await else { break };
        let (agent, time) = done.unwrap();
        fleet.push(agent);
        times.push(time);
    }
    let rate = agents as f64 / begun.elapsed().as_secs_f64();
    let registrations_p99_ms = percentile(&mut times, 99);
    println!(
        "{agents} registrations, 32 at once, a TLS connection each: {rate:.0}/s (budget 200), p50 {:.1} ms, p99 {registrations_p99_ms:.1} ms (budget 50)",
        percentile(&mut times, 50)
    );
    let held = rss(control_plane.id());
    let kib_an_agent = (held - before) as f64 / agents as f64;
    println!(
        "memory: {before} kB before, {held} kB with {agents} agents connected: {kib_an_agent:.1} KiB an agent (budget 100)"
    );
    let beat = |agent: &Agent| {
        agent
            .client
            .post(format!("{url}/api/v1/agents/{}/heartbeat", agent.id))
            .bearer_auth(&agent.credential)
            .json(&json!({"seq": 1, "sent_at": "2026-01-01T00:00:00Z", "state": "online", "uptime_s": 1}))
            .send()
    };
    let fleet: Vec<std::sync::Arc<Agent>> = fleet.into_iter().map(std::sync::Arc::new).collect();
    let mut times = Vec::new();
    let begun = Instant::now();
    let mut tasks = JoinSet::new();
    let mut turn = fleet.iter().cycle();
    while begun.elapsed() < Duration::from_secs(10) {
        while tasks.len() < 32 {
            let agent = turn.next().unwrap().clone();
            let request = beat(&agent);
            tasks.spawn(async move {
                let begun = Instant::now();
                assert_eq!(request.await.unwrap().status(), 200);
                begun.elapsed()
            });
        }
        times.push(tasks.join_next().await.unwrap().unwrap());
    }
    let heartbeats = times.len() as f64 / begun.elapsed().as_secs_f64();
    let heartbeats_p99_ms = percentile(&mut times, 99);
    println!(
        "heartbeats, 32 at once over {agents} connections: {heartbeats:.0}/s (budget 1000), p50 {:.1} ms, p99 {heartbeats_p99_ms:.1} ms (budget 50)",
        percentile(&mut times, 50)
    );
    while tasks.join_next().await.is_some() {}
    control_plane.kill().unwrap();
    control_plane.wait().unwrap();
    let begun = Instant::now();
    let mut control_plane = spawn(pipeops, &root, port);
    let mut tasks = JoinSet::new();
    for agent in fleet {
        let request = agent
            .client
            .post(format!("{url}/api/v1/agents/{}/heartbeat", agent.id))
            .bearer_auth(&agent.credential)
            .json(&json!({"seq": 2}));
        let request = request.build().unwrap();
        tasks.spawn(async move {
            loop {
                // as an agent does: 0.2 to 1 s at first
                tokio::time::sleep(
                    Duration::from_millis(200)
                        + Duration::from_secs_f64(0.8 * pipeops::base::backoff::random()),
                )
                .await;
                if let Ok(answer) = agent.client.execute(request.try_clone().unwrap()).await
                    && answer.status() == 200
                {
                    return;
                }
            }
        });
    }
    while let Some(done) = tasks.join_next().await {
        done.unwrap();
    }
    let back_s = begun.elapsed().as_secs_f64();
    println!(
        "killed and started again: all {agents} agents back after {back_s:.1} s (budget 60 s for 1,000)"
    );
    control_plane.kill().unwrap();
    control_plane.wait().unwrap();
    Fleet {
        registrations: rate,
        registrations_p99_ms,
        heartbeats,
        heartbeats_p99_ms,
        kib_an_agent,
        back_s,
    }
}
