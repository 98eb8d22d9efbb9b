//! Rollouts: one operation on many clusters, in waves, with one result, whatever dies on the way.
//! The agents are played: each holds a tunnel of its own, does what it is asked for once for each
//! key, and reports the end until somebody has taken it.

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use http_body_util::{BodyExt as _, Full};
use hyper::body::{Bytes, Incoming};
use hyper_util::rt::TokioIo;
use pipeops::agent::session::identity::Identity;
use pipeops::contract::types::{Registered, tenant_operation_id};
use pipeops::frp::TunnelState;
use serde_json::{Value, json};
use tokio_rustls::TlsAcceptor;

use crate::client::Person;
use crate::control_plane::{ControlPlane, SimulatedAgent};
use crate::tenant_tokens::claims;
use crate::tunnel::Frpc;

/// What all agents of a fleet have done, and what goes wrong at whom.
#[derive(Default)]
struct Played {
    /// Cluster and key of each operation, when it had its effect.
    done: Mutex<Vec<(String, String)>>,
    /// By id: whoever asks under a key again gets the same one.
    operations: Mutex<BTreeMap<String, Value>>,
    /// Names of clusters whose operations fail.
    failing: Mutex<BTreeSet<String>>,
    /// Names of clusters whose agents take what they are sent, and never answer.
    mute: Mutex<BTreeSet<String>>,
}

struct Player {
    name: String,
    identity: Arc<Identity>,
    registered: Registered,
    client: reqwest::Client,
    url: String,
    played: Arc<Played>,
}

struct Fleet {
    players: Vec<Arc<Player>>,
    played: Arc<Played>,
    tunnels: Vec<Frpc>,
    _dir: tempfile::TempDir,
}

impl Fleet {
    /// Clusters with a name and a label `env` each; none has a tunnel yet.
    async fn new(control_plane: &ControlPlane, clusters: &[(String, &str)]) -> Fleet {
        let args = ["control-plane", "token", "create", "--uses", "0"];
        let line = control_plane.sandbox.subcommand(&args).ended(0).out;
        let token = line.split_whitespace().nth(1).unwrap().to_owned();
        let (dir, played) = (tempfile::tempdir().unwrap(), Arc::new(Played::default()));
        let players = clusters.iter().map(|(name, env)| {
            Player::register(control_plane, dir.path(), &token, &played, (name.as_str(), *env))
        });
        let players = join_all(players).await;
        Fleet { players, played, tunnels: Vec::new(), _dir: dir }
    }

    /// Agents open their tunnels.
    async fn connect(&mut self, which: impl Fn(usize) -> bool) {
        let players = self.players.iter().enumerate().filter(|(n, _)| which(*n));
        let tunnels = players.map(|(_, player)| player.clone().connect());
        self.tunnels.extend(join_all(tunnels).await);
    }

    /// The clusters where something was done for a rollout, in their order.
    fn done(&self, rollout: &str) -> Vec<String> {
        let done = self.played.done.lock().unwrap();
        let of = done.iter().filter(|(_, key)| key.starts_with(rollout));
        of.map(|(cluster, _)| cluster.clone()).collect()
    }

    fn fail(&self, names: &[&str]) {
        *self.played.failing.lock().unwrap() = names.iter().map(|n| (*n).to_owned()).collect();
    }
}

impl Player {
    async fn register(
        control_plane: &ControlPlane,
        dir: &Path,
        token: &str,
        played: &Arc<Played>,
        (name, env): (&str, &str),
    ) -> Arc<Player> {
        let identity: Arc<Identity> = SimulatedAgent::identity(&dir.join(name)).into();
        let mut body: Value = serde_json::from_str(&SimulatedAgent::body(&identity, "m")).unwrap();
        (body["cluster"]["name"], body["cluster"]["labels"]) = (name.into(), json!({"env": env}));
        let (client, url) = (&control_plane.client, &control_plane.url);
        let body = body.to_string();
        let answer = SimulatedAgent::try_register(client, url, &identity, token, body).await;
        let answer = answer.unwrap();
        let (status, text) = (answer.status(), answer.text().await.unwrap());
        assert_eq!(status, 200, "{text}");
        Arc::new(Player {
            name: name.to_owned(),
            identity,
            registered: serde_json::from_str(&text).unwrap(),
            client: client.clone(),
            url: url.clone(),
            played: played.clone(),
        })
    }

    async fn connect(self: Arc<Player>) -> Frpc {
        let settings = self.registered.config.tunnel.clone().unwrap();
        let (mut tunnel, mut streams) = Frpc::insecure(settings, "", false);
        let acceptor = TlsAcceptor::from(Arc::new(self.identity.tls_config().unwrap()));
        tokio::spawn(async move {
            while let Some(stream) = streams.recv().await {
                let (acceptor, player) = (acceptor.clone(), self.clone());
                tokio::spawn(async move {
                    let Ok(tls) = acceptor.accept(stream.io).await else { return };
                    let service =
                        hyper::service::service_fn(move |request| answer(player.clone(), request));
                    let _ = hyper::server::conn::http1::Builder::new()
                        .serve_connection(TokioIo::new(tls), service)
                        .await;
                });
            }
        });
        tunnel.until(TunnelState::Up).await;
        tunnel
    }

    /// Does what is asked for, once for each key.
    fn begin(self: &Arc<Player>, key: &str, claims: &Value, kind: &Value) -> (u16, Value) {
        let (subject, tenant) = (claims["sub"].as_str().unwrap(), claims["tenant"].as_str());
        let id = tenant_operation_id(subject, tenant, key);
        let mut operations = self.played.operations.lock().unwrap();
        if let Some(known) = operations.get(&id) {
            return (200, known.clone());
        }
        self.played.done.lock().unwrap().push((self.name.clone(), key.to_owned()));
        let operation = json!({"id": id, "kind": kind, "state": "running", "subject": subject,
            "created_at": "2026-01-01T00:00:00Z"});
        operations.insert(id, operation.clone());
        tokio::spawn(self.clone().end(operation.clone()));
        (202, operation)
    }

    /// The end of an operation, told until somebody has taken it.
    async fn end(self: Arc<Player>, mut operation: Value) {
        tokio::time::sleep(Duration::from_millis(50)).await;
        let fails = self.played.failing.lock().unwrap().contains(&self.name);
        operation["state"] = json!(if fails { "failed" } else { "succeeded" });
        if fails {
            (operation["reason"], operation["message"]) =
                (json!("crash_loop"), json!("exits with 1"));
        }
        operation["finished_at"] = "2026-01-01T00:00:01Z".into();
        let id = operation["id"].as_str().unwrap().to_owned();
        self.played.operations.lock().unwrap().insert(id.clone(), operation.clone());
        let agent = &self.registered.agent_id;
        let path = format!("{}/api/v1/agents/{agent}/operations/{id}/result", self.url);
        loop {
            let request = self.client.post(&path).bearer_auth(self.registered.credential.expose());
            let answer = request.json(&operation).send().await;
            if answer.is_ok_and(|answer| answer.status() == 200) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
}

async fn answer(
    player: Arc<Player>,
    request: hyper::Request<Incoming>,
) -> Result<hyper::Response<Full<Bytes>>, Infallible> {
    let header = |name: &str| {
        let value = request.headers().get(name).and_then(|value| value.to_str().ok());
        value.unwrap_or_default().to_owned()
    };
    let (token, key) = (header("authorization"), header("idempotency-key"));
    let asked = format!("{} {}", request.method(), request.uri().path());
    let body = request.into_body().collect().await.map(|body| body.to_bytes()).unwrap_or_default();
    let body: Value = serde_json::from_slice(&body).unwrap_or_default();
    let claims = claims(token.trim_start_matches("Bearer "));
    let is_mute = player.played.mute.lock().unwrap().contains(&player.name);
    if is_mute && asked == "POST /api/v1/operations" {
        std::future::pending::<()>().await;
    }
    let (status, answer) = match asked.as_str() {
        "POST /api/v1/operations" => player.begin(&key, &claims, &body["kind"]),
        "GET /healthz" => (200, json!({})),
        _ => (404, json!({"code": "not_found", "message": "there is no such path"})),
    };
    let answer = hyper::Response::builder()
        .status(status)
        .header("content-type", "application/json")
        .body(Full::new(Bytes::from(answer.to_string())));
    Ok(answer.unwrap())
}

/// Asks for a rollout.
pub(crate) async fn begin(
    control_plane: &ControlPlane,
    token: &str,
    key: &str,
    body: &Value,
) -> (u16, Value) {
    crate::operations::ask_under(control_plane, "/api/v1/rollouts", token, key, body).await
}

/// A rollout once it is as expected.
async fn until(control_plane: &ControlPlane, id: &str, expected: impl Fn(&Value) -> bool) -> Value {
    let begun = Instant::now();
    loop {
        let path = format!("/api/v1/rollouts/{id}");
        let mut rollout = control_plane.get(&path, &control_plane.admin).await;
        if expected(&rollout) {
            return rollout;
        }
        rollout["clusters"] = Value::Null;
        assert!(begun.elapsed() < Duration::from_secs(60), "it stays so: {rollout}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

fn is(state: &str) -> impl Fn(&Value) -> bool {
    move |rollout| rollout["state"] == state
}

fn clusters_of_a_wave(rollout: &Value, wave: usize) -> BTreeSet<String> {
    let clusters = rollout["clusters"].as_array().unwrap().iter();
    let clusters = clusters.filter(|cluster| cluster["wave"] == wave);
    clusters.map(|cluster| cluster["name"].as_str().unwrap().to_owned()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn two_hundred_clusters_have_one_result_with_a_failure_with_some_away_and_with_a_kill() {
    let mut control_plane = ControlPlane::with(&[]);
    let mut clusters: Vec<(String, &str)> =
        (0..200).map(|n| (format!("eu-{n:03}"), "prod")).collect();
    clusters.extend([("us-0".into(), "test"), ("us-1".into(), "test")]);
    let mut fleet = Fleet::new(&control_plane, &clusters).await;
    let is_away = |n: usize| [5, 50, 100, 150, 199].contains(&n);
    fleet.connect(|n| !is_away(n)).await;
    let eve = Person::logged_in(&control_plane, "eve", &[]);
    let restart = "restart web -n beta -l env=prod --waves 1,10%,all --ttl 1h";
    let restart: Vec<&str> = restart.split(' ').collect();

    // a failure in the first wave: the second one does not begin
    fleet.fail(&["eu-000"]);
    let failed = eve.run(&restart).ended(13);
    assert!(failed.err.contains("  eu-000: failed (crash_loop): exits with 1\n"), "{}", failed.err);
    let said = "paused: 0 of 200 clusters succeeded, 199 waiting, 1 failed";
    assert_eq!(failed.out.trim(), said);
    assert_eq!(fleet.done("ro-"), ["eu-000"]);
    let listed = eve.run(&["rollout", "list", "-o", "json"]).ended(0).json();
    let id = listed["items"][0]["id"].as_str().unwrap().to_owned();
    assert!(failed.err.contains(&format!("`pipeops rollout resume {id}`")), "{}", failed.err);
    assert!(listed["items"][0].get("clusters").is_none(), "{listed}");
    let status = eve.run(&["rollout", "status", &id]).ended(13).out;
    assert!(status.contains("\nwave 2     20 clusters, waiting\n"), "{status}");
    let cancelled = eve.run(&["rollout", "cancel", &id, "-o", "json"]).ended(0).json();
    let counts = &cancelled["counts"];
    assert_eq!((&counts["failed"], &counts["cancelled"]), (&json!(1), &json!(199)));
    assert_ne!(cancelled["finished_at"], "");
    eve.run(&["rollout", "resume", &id]).ended(7);

    // then all of them: some are away, and the control plane is killed on the way
    fleet.fail(&[]);
    let detached = eve.run(&[&restart[..], &["--detach"]].concat()).ended(0);
    let id = detached.out.trim().to_owned();
    let begun = Instant::now();
    while fleet.done(&id).len() < 40 {
        assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", fleet.done(&id));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    control_plane.kill_and_restart();
    let caught_up = |rollout: &Value| {
        let counts = &rollout["counts"];
        counts["succeeded"] == 195 && counts["queued"] == 5
    };
    let rollout = until(&control_plane, &id, caught_up).await;
    assert_eq!(rollout["state"], "running");
    let waves = json!([{"clusters": 1, "state": "done"}, {"clusters": 20, "state": "running"},
        {"clusters": 179, "state": "running"}]);
    assert_eq!(rollout["waves"], waves);
    fleet.connect(is_away).await;
    let rollout = until(&control_plane, &id, is("succeeded")).await;
    assert_eq!(rollout["message"], "200 of 200 clusters succeeded");
    assert_eq!(
        (&rollout["counts"]["total"], &rollout["counts"]["succeeded"]),
        (&json!(200), &json!(200))
    );

    // each had one effect, nobody else had any, and no wave overtook another one
    let done = fleet.done(&id);
    let names: BTreeSet<String> = clusters[..200].iter().map(|(name, _)| name.clone()).collect();
    assert_eq!(done.len(), 200, "{done:?}");
    assert_eq!(done.iter().cloned().collect::<BTreeSet<_>>(), names);
    assert_eq!(done[0], "eu-000");
    let mut second = clusters_of_a_wave(&rollout, 2);
    assert!(second.remove("eu-005") && second.len() == 19, "{second:?}");
    assert_eq!(done[1..20].iter().cloned().collect::<BTreeSet<_>>(), second);
    // and the same command under another key is another rollout, which is followed to its end
    let all = eve.run(&restart).ended(0);
    assert_eq!(all.out.trim(), "succeeded: 200 of 200 clusters succeeded");
    assert!(all.err.contains("  eu-199: succeeded\n"), "{}", all.err);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_asked_wrongly_begins_nothing_and_what_goes_wrong_is_told() {
    let control_plane = ControlPlane::with(&[]);
    let names: Vec<(String, &str)> =
        [("a", "prod"), ("b", "prod"), ("c", "test")].map(|(n, env)| (n.into(), env)).into();
    let mut fleet = Fleet::new(&control_plane, &names).await;
    fleet.connect(|n| n == 0).await;
    let runner = control_plane.runner("deployer").await;
    let token = runner["token"].as_str().unwrap();
    let with = |more: Value| {
        let mut body = json!({"kind": "restart", "spec": {"object": {}}});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        body
    };
    for (more, status, code) in [
        (json!({}), 400, "bad_rollout"),
        (json!({"clusters": []}), 400, "bad_rollout"),
        (json!({"all": false}), 400, "bad_rollout"),
        (json!({"all": true, "selector": "env=prod"}), 400, "bad_rollout"),
        (json!({"all": true, "clusters": ["a"]}), 400, "bad_rollout"),
        (json!({"all": true, "kind": ""}), 400, "bad_rollout"),
        (json!({"all": true, "kind": "Restart it"}), 400, "bad_rollout"),
        (json!({"all": true, "kind": "x".repeat(41)}), 400, "bad_rollout"),
        (json!({"selector": ""}), 400, "bad_selector"),
        (json!({"selector": "env=prod tier=web"}), 400, "bad_selector"),
        (json!({"selector": "env=nowhere"}), 400, "no_cluster_matches"),
        (json!({"clusters": ["a", "nope"]}), 404, "not_found"),
        (json!({"all": true, "waves": ""}), 400, "bad_waves"),
        (json!({"all": true, "waves": "0"}), 400, "bad_waves"),
        (json!({"all": true, "waves": "1,101%"}), 400, "bad_waves"),
        (json!({"all": true, "waves": "all,1"}), 400, "bad_waves"),
        (json!({"all": true, "ttl_s": 0}), 400, "bad_ttl"),
        (json!({"all": true, "wave": "1"}), 400, "bad_body"),
    ] {
        let (said, answer) = begin(&control_plane, token, "wrong", &with(more.clone())).await;
        assert_eq!((said, &answer["code"]), (status, &json!(code)), "{more}: {answer}");
    }
    let answer = begin(&control_plane, token, "", &with(json!({"all": true}))).await;
    assert_eq!((answer.0, &answer.1["code"]), (400, &json!("idempotency_key_needed")));
    let viewer = control_plane.runner("viewer").await;
    let viewer = viewer["token"].as_str().unwrap();
    let (status, answer) = begin(&control_plane, viewer, "k", &with(json!({"all": true}))).await;
    assert_eq!((status, &answer["code"]), (403, &json!("role_exceeded")));
    assert_eq!(control_plane.get("/api/v1/rollouts", token).await["items"], json!([]));
    assert_eq!(control_plane.try_get("/api/v1/rollouts?limit=0", token).await.status(), 400);

    // one that is offline fails where it may not wait
    let agent = &fleet.players[1].registered;
    let path = format!("/api/v1/agents/{}/heartbeat", agent.agent_id);
    let beat = json!({"seq": 1, "state": "draining"});
    control_plane.json("POST", &path, agent.credential.expose(), beat).await;
    let body = with(json!({"selector": "env=prod"}));
    let (status, taken) = begin(&control_plane, token, "k-1", &body).await;
    assert_eq!((status, taken["counts"]["total"].as_u64()), (202, Some(2)), "{taken}");
    let id = taken["id"].as_str().unwrap().to_owned();
    let ended = until(&control_plane, &id, is("failed")).await;
    assert_eq!(ended["message"], "1 of 2 clusters succeeded; not b (agent_offline)");
    let (status, again) = begin(&control_plane, token, "k-1", &body).await;
    assert_eq!((status, &again["id"], &again["state"]), (200, &json!(id), &json!("failed")));
    let (status, other) = begin(&control_plane, token, "k-1", &with(json!({"all": true}))).await;
    assert_eq!((status, &other["code"]), (409, &json!("idempotency_mismatch")));
    assert_eq!(fleet.done(&id), ["a"]);

    // who did not ask does not see it, who runs the project does
    let path = format!("/api/v1/rollouts/{id}");
    let stranger = control_plane.runner("deployer").await;
    let operator = control_plane.runner("operator").await;
    let status = async |runner: &Value, method: &str, path: &str| {
        let token = runner["token"].as_str().unwrap();
        control_plane.ask(method, path, token, json!({})).await.status().as_u16()
    };
    assert_eq!(status(&stranger, "GET", &path).await, 404);
    assert_eq!(status(&stranger, "DELETE", &path).await, 404);
    assert_eq!(status(&stranger, "POST", &format!("{path}/resume")).await, 404);
    assert_eq!(status(&operator, "GET", &path).await, 200);
    assert_eq!(status(&operator, "POST", &format!("{path}/resume")).await, 409);
    assert_eq!(status(&runner, "DELETE", &path).await, 200);

    // what waits goes with the token that asked
    let body = with(json!({"clusters": ["b", "c"], "ttl_s": 3600, "waves": "1"}));
    let (_, taken) = begin(&control_plane, token, "k-2", &body).await;
    let id = taken["id"].as_str().unwrap().to_owned();
    until(&control_plane, &id, |r| r["counts"]["queued"] == 2).await;
    let runner_id = runner["id"].as_str().unwrap();
    control_plane.sandbox.subcommand(&["control-plane", "runner", "revoke", runner_id]).ended(0);
    let ended = until(&control_plane, &id, |r| r["finished_at"] != "").await;
    assert_eq!((&ended["state"], &ended["counts"]["cancelled"]), (&json!("cancelled"), &json!(2)));
    assert!(ended["message"].as_str().unwrap().starts_with("caller_revoked"), "{ended}");
    fleet.connect(|n| n > 0).await;
    // nothing of what was asked for is told to anybody
    let all = control_plane.get("/api/v1/rollouts", &control_plane.admin).await.to_string();
    assert!(!all.contains("\"object\"") && !all.contains("\"spec\""), "{all}");
    assert!(fleet.done(&id).is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn where_an_answer_is_lost_nobody_says_that_nothing_was_changed() {
    let control_plane = ControlPlane::with(&[]);
    let mut fleet = Fleet::new(&control_plane, &[("a".into(), "prod")]).await;
    fleet.connect(|_| true).await;
    fleet.played.mute.lock().unwrap().insert("a".into());
    // it is not waited for: it stops
    let agent = &fleet.players[0].registered;
    let path = format!("/api/v1/agents/{}/heartbeat", agent.agent_id);
    let beat = json!({"seq": 1, "state": "draining"});
    control_plane.json("POST", &path, agent.credential.expose(), beat).await;
    let body = json!({"kind": "restart", "spec": {}, "all": true});
    let (status, taken) = begin(&control_plane, &control_plane.admin, "k", &body).await;
    assert_eq!(status, 202, "{taken}");
    let ended = until(&control_plane, taken["id"].as_str().unwrap(), is("failed")).await;
    let cluster = &ended["clusters"][0];
    assert_eq!(
        (&cluster["state"], &cluster["reason"]),
        (&json!("interrupted"), &json!("delivery_unknown")),
        "{ended}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_again_and_again_each_cluster_has_one_effect_also_where_nothing_may_wait() {
    let mut control_plane = ControlPlane::with(&[]);
    let names: Vec<(String, &str)> = (0..12).map(|n| (format!("n-{n:02}"), "prod")).collect();
    let mut fleet = Fleet::new(&control_plane, &names).await;
    fleet.connect(|_| true).await;
    let admin = control_plane.admin.clone();
    let body = json!({"kind": "restart", "spec": {}, "all": true, "waves": "25%,25%,all"});
    let (status, taken) = begin(&control_plane, &admin, "k", &body).await;
    assert_eq!(status, 202, "{taken}");
    let id = taken["id"].as_str().unwrap().to_owned();
    // at no particular line: after its answer, and whenever some more were begun
    for begun in [0, 1, 4, 7] {
        let since = Instant::now();
        while fleet.done(&id).len() < begun {
            assert!(since.elapsed() < Duration::from_secs(40), "{:?}", fleet.done(&id));
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        control_plane.kill_and_restart();
    }
    let (status, again) = begin(&control_plane, &admin, "k", &body).await;
    assert_eq!((status, &again["id"]), (200, &json!(id)));
    let ended = until(&control_plane, &id, |r| r["finished_at"] != "").await;
    assert_eq!(ended["state"], "succeeded", "{ended}");
    let mut done = fleet.done(&id);
    done.sort();
    let names: Vec<String> = names.into_iter().map(|(name, _)| name).collect();
    assert_eq!(done, names);
}
