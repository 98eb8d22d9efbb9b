//! Secrets and configuration by their keys: set, merged, rolled out, pruned; a value stands nowhere
//! but in its object.

use std::sync::atomic::Ordering::Relaxed;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use crate::operations::{apply, deployment, texts, written};
use crate::support::sha256;
use crate::world::{Fault, Kube, World};

const CANARY: &str = "planted-canary-5521-in-plain-text";
const SECRETS: &str = "/api/v1/namespaces/beta/secrets";
const CONFIG_MAPS: &str = "/api/v1/namespaces/beta/configmaps";
const DEPLOYMENTS: &str = "/apis/apps/v1/namespaces/beta/deployments";

/// An action on the set `db`.
fn asked(kind: &str, action: &str, more: Value) -> Value {
    let mut spec = json!({"action": action, "namespace": "beta", "name": "db"});
    spec.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    json!({"kind": kind, "spec": spec})
}

fn set(kind: &str, data: Value) -> Value {
    asked(kind, "set", json!({"data": data}))
}

/// The version that an operation makes.
fn version(operation: &Value) -> String {
    format!("db-{}", &sha256(operation["id"].as_str().unwrap().as_bytes())[..10])
}

impl World {
    /// What an operation came to.
    async fn done(&self, token: &str, key: &str, body: &Value) -> Value {
        let (status, taken) = self.operate(token, key, body).await;
        assert_eq!(status, 202, "{taken}");
        self.ended(token, taken["id"].as_str().unwrap()).await
    }

    async fn succeeded(&self, token: &str, key: &str, body: &Value) -> Value {
        let end = self.done(token, key, body).await;
        assert_eq!(end["state"], "succeeded", "{key}: {end}");
        end
    }

    async fn refused(&self, token: &str, key: &str, body: &Value, reason: &str, part: &str) {
        let end = self.done(token, key, body).await;
        assert_eq!((&end["state"], &end["reason"]), (&json!("failed"), &json!(reason)), "{end}");
        assert!(end["message"].as_str().unwrap().contains(part), "{part}: {end}");
    }
}

fn object(kube: &Kube, list: &str, name: &str) -> Value {
    kube.objects.lock().unwrap().get(&format!("{list}/{name}")).cloned().unwrap_or_default()
}

/// The names of the versions that are there.
fn versions(kube: &Kube, list: &str) -> Vec<String> {
    let objects = kube.objects.lock().unwrap();
    let names = objects.keys().filter_map(|path| path.strip_prefix(&format!("{list}/db-")));
    names.map(|digits| format!("db-{digits}")).collect()
}

fn inventory(kube: &Kube, name: &str) -> Value {
    let object = object(kube, CONFIG_MAPS, name);
    serde_json::from_str(object["data"]["inventory"].as_str().unwrap_or("null")).unwrap()
}

/// A Deployment whose variables are keys of these objects.
fn user(name: &str, manager: &str, kind: &str, keys: &[(&str, &str)]) -> Value {
    let variables: Vec<Value> = keys
        .iter()
        .map(|(key, object)| {
            let reference = json!({kind: {"name": object, "key": key}});
            json!({"name": key.to_uppercase(), "valueFrom": reference})
        })
        .collect();
    let mut user = deployment(name);
    user["metadata"]["labels"] = json!({"app.kubernetes.io/managed-by": manager});
    user["spec"]["template"]["spec"] = json!({"containers": [{"name": "c", "env": variables}]});
    user
}

fn env(deployment: &Value) -> Vec<&str> {
    let env = deployment["spec"]["template"]["spec"]["containers"][0]["env"].as_array().unwrap();
    let named =
        env.iter().map(|env| env["valueFrom"].as_object().unwrap().values().next().unwrap());
    named.map(|reference| reference["name"].as_str().unwrap()).collect()
}

fn plant(world: &World, list: &'static str, items: &[Value]) {
    let mut planted = world.kube.planted.lock().unwrap();
    planted.retain(|(path, _, _)| *path != list);
    planted.push((list, "limit=", json!({"items": items})));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_secret_is_merged_and_rolled_out_and_its_values_stand_nowhere_else() {
    let world = World::new().await.up().await;
    world.kube.ready.store(true, Relaxed);
    let token = world.token("deployer");
    // another's Secret of that name
    let theirs = json!({"kind": "Secret", "data": {"password": "dGhlaXJz"}});
    world.kube.objects.lock().unwrap().insert(format!("{SECRETS}/db"), theirs.clone());
    let body = set("secret", json!({"password": CANARY, "user": "web"}));
    let first = world.succeeded(&token, "k-1", &body).await;
    let one = version(&first);
    assert_eq!(
        first["objects"],
        json!([{"object": format!("Secret beta/{one}"), "outcome": "created"},
            {"object": "ConfigMap beta/db.secrets.pipeops.io", "outcome": "written"}])
    );
    let made = object(&world.kube, SECRETS, &one);
    assert_eq!(
        (&made["immutable"], &made["type"], &made["data"]),
        (
            &json!(true),
            &json!("Opaque"),
            &json!({"password": STANDARD.encode(CANARY), "user": STANDARD.encode("web")})
        )
    );
    // an application gets them key by key, another one is not ours to change
    let keys = [("password", &*one), ("user", &*one)];
    let web = user("web", "pipeops", "secretKeyRef", &keys);
    let foreign = user("foreign", "Helm", "secretKeyRef", &keys);
    world.succeeded(&token, "k-2", &apply(&[web.clone(), foreign.clone()])).await;
    plant(&world, DEPLOYMENTS, &[web, foreign]);
    // between the two looks somebody else changes it: it is read again
    world.kube.faults.lock().unwrap().push(Fault {
        method: "PATCH",
        part: "/deployments/web",
        status: 422,
        done: false,
    });
    let canary = format!("{CANARY}-again");
    let second = world.succeeded(&token, "k-3", &set("secret", json!({"password": canary}))).await;
    let two = version(&second);
    let objects = second["objects"].as_array().unwrap();
    assert_eq!(objects[2], json!({"object": "Deployment beta/web", "outcome": "ready"}));
    assert_eq!(objects.len(), 3, "{second}");
    assert_eq!(env(&object(&world.kube, DEPLOYMENTS, "web")), [&*two, &*one]);
    assert_eq!(env(&object(&world.kube, DEPLOYMENTS, "foreign")), [&*one, &*one]);
    let known = inventory(&world.kube, "db.secrets.pipeops.io");
    assert_eq!(known["keys"], json!({"password": two, "user": one}));
    let by = &known["versions"][1];
    assert_eq!(
        (&by["number"], &by["object"], &by["keys"], &by["by"]),
        (&json!(2), &json!(two), &json!(["password"]), &json!("runner-1"))
    );
    // the same request again is the same operation, and has no second effect
    let (status, again) = world.operate(&token, "k-1", &body).await;
    assert_eq!((status, &again["id"]), (200, &first["id"]));
    assert_eq!(inventory(&world.kube, "db.secrets.pipeops.io"), known);
    assert_eq!(object(&world.kube, SECRETS, "db"), theirs);
    // all of it as the caller, and no Secret is read
    for seen in world.kube.through() {
        assert_eq!(seen.all("impersonate-group"), ["pipeops:deployer"]);
        assert!(seen.method != "GET" || !seen.uri.contains("/secrets"), "{seen:?}");
    }
    // no value anywhere else, in no shape
    let encoded = STANDARD.encode(CANARY);
    let (_, list) = world.call("GET", "/api/v1/operations", &token, "", "").await;
    let told = [world.told(first["id"].as_str().unwrap()).await, list];
    for text in [
        texts(&world.state()),
        world.agent.log(),
        json!(world.control_plane.calls("/")).to_string(),
        json!(told).to_string(),
        world.events(&token, second["id"].as_str().unwrap()).await,
    ] {
        assert!(!text.is_empty() && !text.contains(CANARY) && !text.contains(&encoded[..36]));
    }
}

impl World {
    /// The events of an operation that has ended.
    async fn events(&self, token: &str, id: &str) -> String {
        let text = self.ask("GET", &format!("/api/v1/operations/{id}/events"), token).await;
        assert!(text.contains("event: end"), "{text}");
        text
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_is_sent_twice_has_one_effect_and_parallel_sets_stay() {
    let world = World::new().await.up().await;
    let token = world.token("deployer");
    // Kubernetes does it, and its answers are lost
    let lost = |method, part| Fault { method, part, status: 503, done: true };
    world.kube.faults.lock().unwrap().extend([
        lost("PATCH", "/secrets/db-"),
        lost("POST", "/configmaps/db.secrets"),
        lost("PUT", "/configmaps/db.secrets"),
    ]);
    let first = world.succeeded(&token, "k-1", &set("secret", json!({"a": "1"}))).await;
    let second = world.succeeded(&token, "k-2", &set("secret", json!({"b": "2"}))).await;
    let known = inventory(&world.kube, "db.secrets.pipeops.io");
    assert_eq!(known["keys"], json!({"a": version(&first), "b": version(&second)}));
    assert_eq!(known["versions"].as_array().unwrap().len(), 2, "{known}");
    assert_eq!(versions(&world.kube, SECRETS).len(), 2);
    assert!(world.kube.faults.lock().unwrap().is_empty());
    // somebody else is faster
    let faster = |method| Fault { method, part: "/configmaps/db.", status: 409, done: false };
    world.kube.faults.lock().unwrap().extend([faster("POST"), faster("PUT"), faster("PUT")]);
    let names: Vec<String> = (0..6).map(|n| format!("key-{n}")).collect();
    let sets = names.iter().map(|name| {
        let (world, token) = (&world, &token);
        async move { world.succeeded(token, name, &set("configmap", json!({name: name}))).await }
    });
    let ends = futures_util::future::join_all(sets).await;
    let known = inventory(&world.kube, "db.configs.pipeops.io");
    for (name, end) in names.iter().zip(&ends) {
        assert_eq!(known["keys"][name], version(end), "{known}");
        assert_eq!(object(&world.kube, CONFIG_MAPS, &version(end))["data"], json!({name: name}));
    }
    assert_eq!(known["versions"].as_array().unwrap().len(), 6);
    // what Kubernetes refuses for good leaves no object behind
    let full = Fault { method: "PUT", part: "/configmaps/db.", status: 403, done: false };
    world.kube.faults.lock().unwrap().push(full);
    let before = versions(&world.kube, CONFIG_MAPS);
    let body = set("configmap", json!({"late": "x"}));
    world.refused(&token, "late", &body, "forbidden", "ConfigMap beta/db.configs.pipeops.io").await;
    assert_eq!(versions(&world.kube, CONFIG_MAPS), before);
    // and a version of that name with other values is not taken for ours
    let id = pipeops::contract::types::operation_id("runner-1", "k-9");
    let path = format!("{CONFIG_MAPS}/{}", version(&json!({"id": id})));
    let other = json!({"kind": "ConfigMap", "immutable": true, "data": {"late": "y"}});
    world.kube.objects.lock().unwrap().insert(path.clone(), other.clone());
    world.refused(&token, "k-9", &body, "invalid", "ConfigMap beta/db-").await;
    assert_eq!(world.kube.objects.lock().unwrap()[&path], other);
    assert_eq!(inventory(&world.kube, "db.configs.pipeops.io"), known);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_used_is_not_taken_away_and_what_nothing_needs_is_pruned() {
    let world = World::new().await.up().await;
    let token = world.token("deployer");
    let mut made = Vec::new();
    for (key, data) in [
        ("k-1", json!({"a": "1", "b": "1"})),
        ("k-2", json!({"a": "2"})),
        ("k-3", json!({"a": "3"})),
        ("k-4", json!({"a": "4"})),
    ] {
        made.push(version(&world.succeeded(&token, key, &set("configmap", data)).await));
    }
    let web = user("web", "pipeops", "configMapKeyRef", &[("a", &*made[3]), ("b", &*made[0])]);
    let mut revision = user("web-1", "pipeops", "configMapKeyRef", &[("a", &*made[2])]);
    revision["metadata"]["ownerReferences"] = json!([{"uid": "u"}]);
    plant(&world, DEPLOYMENTS, &[web]);
    plant(&world, "/apis/apps/v1/namespaces/beta/replicasets", &[revision]);
    // refused before anything is written
    let before = written(&world.kube).len();
    let remove = asked("configmap", "set", json!({"remove": ["b"], "data": {"c": "1"}}));
    world.refused(&token, "r-1", &remove, "in_use", "`b` is in use: Deployment beta/web").await;
    let delete = asked("configmap", "delete", json!({}));
    world.refused(&token, "r-2", &delete, "in_use", "beta/db is in use: Deployment beta/web").await;
    assert_eq!(written(&world.kube).len(), before, "{:?}", written(&world.kube));
    // an object of an operation that died, and one that is being made at the moment
    let left = |name: &str, made: &str| {
        let labels = json!({"app.kubernetes.io/managed-by": "pipeops", "pipeops.io/config": "db"});
        json!({"metadata": {"name": name, "creationTimestamp": made, "labels": labels}})
    };
    let now = jiff::Timestamp::now().to_string();
    let items = [
        left("db-aaaaaaaaaa", "2026-01-01T00:00:00Z"),
        left("db-bbbbbbbbbb", &now),
        left("db", ""),
    ];
    world.kube.planted.lock().unwrap().push((
        CONFIG_MAPS,
        "labelSelector=pipeops.io/config=db",
        json!({"items": items}),
    ));
    // the application has the fourth and the first, its former revision the third
    let pruned =
        world.succeeded(&token, "p-1", &asked("configmap", "prune", json!({"keep": 1}))).await;
    assert_eq!(
        pruned["objects"],
        json!([{"object": format!("ConfigMap beta/{}", made[1]), "outcome": "deleted"},
            {"object": "ConfigMap beta/db-aaaaaaaaaa", "outcome": "absent"},
            {"object": "ConfigMap beta/db.configs.pipeops.io", "outcome": "written"}])
    );
    let known = inventory(&world.kube, "db.configs.pipeops.io");
    assert_eq!(known["keys"], json!({"a": made[3], "b": made[0]}));
    let left: Vec<&Value> =
        known["versions"].as_array().unwrap().iter().map(|v| &v["object"]).collect();
    assert_eq!(left, [&json!(made[0]), &json!(made[2]), &json!(made[3])]);
    assert_eq!(versions(&world.kube, CONFIG_MAPS).len(), 3);
    // a prune that finds no version of the inventory does not write it
    let again = world.succeeded(&token, "p-2", &asked("configmap", "prune", json!({}))).await;
    assert!(!again["objects"].to_string().contains("pipeops.io"), "{again}");
    // asked for by force
    world.succeeded(&token, "d-1", &asked("configmap", "delete", json!({"force": true}))).await;
    assert_eq!(versions(&world.kube, CONFIG_MAPS), Vec::<String>::new());
    assert_eq!(object(&world.kube, CONFIG_MAPS, "db.configs.pipeops.io"), Value::Null);
    let absent = world.succeeded(&token, "d-2", &asked("secret", "delete", json!({}))).await;
    assert_eq!(absent["objects"][0]["outcome"], "absent");
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_sets_are_refused_by_their_field_and_foreign_inventories_are_not_obeyed() {
    let world = World::new().await.up().await;
    let token = world.token("deployer");
    for (body, part) in [
        (set("secret", json!({"a b": CANARY})), "data: `a b` is no key"),
        (set("secret", json!({"a": [CANARY]})), "invalid type: sequence, expected a string"),
        (asked("secret", "set", json!({"data": CANARY})), "invalid type: string, expected a map"),
        (asked("secret", "set", json!({"value": CANARY})), "unknown field `value`"),
        (asked("secret", "show", json!({})), "unknown variant `show`"),
        (asked("secret", "set", json!({"type": "tls", "data": {"tls.crt": CANARY}})), "`tls.key`"),
        (asked("configmap", "set", json!({"binary": {"a": CANARY}})), "binary: `a` is no base64"),
        (asked("configmap", "prune", json!({"keep": -1})), "expected usize"),
    ] {
        let (status, answer) = world.operate(&token, "k", &body).await;
        assert_eq!((status, &answer["code"]), (400, &json!("bad_operation")), "{answer}");
        let message = answer["message"].as_str().unwrap();
        assert!(message.contains(part) && !message.contains(CANARY), "{part}: {message}");
    }
    assert!(written(&world.kube).is_empty());
    // of another namespace
    let scoped = world.control_plane.token(&world.id, "deployer", Some(&["production"]));
    let body = set("secret", json!({"a": CANARY}));
    world.refused(&scoped, "s-1", &body, "namespace_scope", "production").await;
    // what is called like an inventory and is none
    let path = format!("{CONFIG_MAPS}/db.secrets.pipeops.io");
    let listed = json!({"keys": {}, "versions": [{"object": "theirs", "keys": [],
        "created_at": "", "by": ""}]});
    let ours = json!({"app.kubernetes.io/managed-by": "pipeops"});
    for (key, labels, part) in
        [("i-1", json!({}), "no label"), ("i-2", ours, "`theirs` is no version of db")]
    {
        let object = json!({"metadata": {"labels": labels, "resourceVersion": "1"},
            "data": {"inventory": listed.to_string()}});
        world.kube.objects.lock().unwrap().insert(path.clone(), object);
        world.refused(&token, key, &body, "inventory_damaged", part).await;
        let delete = asked("secret", "delete", json!({"force": true}));
        world.refused(&token, &format!("{key}-d"), &delete, "inventory_damaged", part).await;
    }
    assert!(written(&world.kube).is_empty(), "{:?}", written(&world.kube));
    // a set keeps its type
    world.kube.objects.lock().unwrap().remove(&path);
    let login = json!({".dockerconfigjson": "{\"auths\": {}}"});
    let pull = asked("secret", "set", json!({"type": "image_pull", "data": login}));
    let end = world.succeeded(&token, "t-1", &pull).await;
    let made = object(&world.kube, SECRETS, &version(&end));
    assert_eq!(made["type"], "kubernetes.io/dockerconfigjson");
    world.refused(&token, "t-2", &body, "conflict", "Secret beta/db has another type").await;
}
