//! Clusters: what is known of them, what goes on in one, and tokens for the way in.

use axum::extract::State;
use axum::response::Response;
use serde_json::{Value, json};

use super::Routes;
use crate::contract::token::TOKEN_LIFETIME;
use crate::control_plane::Hub;
use crate::control_plane::answer::{answer, plain};
use crate::control_plane::auth::{AdminCaller, RunnerCaller};
use crate::control_plane::body::{Json, Segments, Whole};
use crate::control_plane::model::{Access, AccessKind};
use crate::control_plane::registry::{ClusterView, Refused, Who, refused};
use crate::control_plane::scope::{DAY, Wanted, life, narrowed};

/// What a look into a cluster shows, and where the agent has it.
pub(super) const INSIDE: &[(&str, &str, bool)] = &[
    ("deployments", "k8s/apis/apps/v1/deployments?limit=500", false),
    ("statefulsets", "k8s/apis/apps/v1/statefulsets?limit=500", false),
    ("daemonsets", "k8s/apis/apps/v1/daemonsets?limit=500", false),
    ("events", "k8s/api/v1/events?limit=200", false),
    ("audit", "api/v1/audit", true),
];

pub(super) fn routes(routes: Routes) -> Routes {
    routes
        .get("/api/v1/clusters", list)
        .get("/api/v1/clusters/{id}", show)
        .delete("/api/v1/clusters/{id}", remove)
        .post("/api/v1/clusters/{id}/revoke", revoke)
        .post("/api/v1/clusters/{id}/token", token)
        .post("/api/v1/clusters/{id}/kubeconfig", kubeconfig)
        .get("/api/v1/clusters/{id}/inside/{what}", look_inside)
}

async fn list(caller: RunnerCaller, State(hub): State<Hub>) -> Response {
    answer(200, &json!({"items": hub.visible(&caller.who, crate::control_plane::now())}))
}

async fn show(
    caller: RunnerCaller,
    State(hub): State<Hub>,
    Segments([id]): Segments<1>,
) -> Result<Response, Refused> {
    let cluster = hub.registry().cluster(&id, caller.who.project(), crate::control_plane::now())?;
    Ok(answer(200, &hub.seen(cluster)))
}

async fn remove(
    _: AdminCaller,
    State(hub): State<Hub>,
    Segments([id]): Segments<1>,
    _: Whole,
) -> Result<Response, Refused> {
    let now = crate::control_plane::now();
    let agent = hub.registry().cluster(&id, None, now)?.agent_id;
    hub.registry().remove_agent(&agent, now).await?;
    Ok(answer(200, &json!({})))
}

async fn revoke(
    _: AdminCaller,
    State(hub): State<Hub>,
    Segments([id]): Segments<1>,
    _: Whole,
) -> Result<Response, Refused> {
    hub.registry().revoke_agent(&id).await?;
    Ok(answer(200, &json!({})))
}

/// A JWT with which the agent itself is reached.
async fn token(
    caller: RunnerCaller,
    State(hub): State<Hub>,
    Segments([id]): Segments<1>,
    Json(asked): Json<Wanted>,
) -> Result<Response, Refused> {
    let ttl = life(asked.ttl_s, TOKEN_LIFETIME, TOKEN_LIFETIME)?;
    let (role, namespaces) = narrowed(&caller.who, &asked)?;
    let route = hub.registry().route(&id, caller.who.project())?;
    Ok(answer(
        200,
        &hub.runner_token(&caller.who, &route, role, namespaces, ttl, crate::control_plane::now()),
    ))
}

async fn kubeconfig(
    RunnerCaller { who, .. }: RunnerCaller,
    State(hub): State<Hub>,
    Segments([id]): Segments<1>,
    Json(asked): Json<Wanted>,
) -> Result<Response, Refused> {
    let now = crate::control_plane::now();
    let ttl = life(asked.ttl_s, DAY, DAY)?;
    let (role, namespaces) = narrowed(&who, &asked)?;
    let cluster = hub.registry().cluster(&id, who.project(), now)?;
    // not longer than whoever makes it may do anything himself
    let own_end = if let Who::Access(own) = &who { own.expires_at } else { None };
    let row = Access {
        id: String::new(),
        project: cluster.project.clone(),
        name: format!("kubeconfig of {}", cluster.id),
        kind: AccessKind::Kubeconfig,
        hash: String::new(),
        role,
        clusters: Some(vec![cluster.id.clone()]),
        namespaces,
        created_at: now,
        expires_at: Some(own_end.map_or(now + ttl, |end| end.min(now + ttl))),
        revoked: false,
        maker: Some(who.subject()),
    };
    let (_, token) = hub.registry().add_access(hub.keys(), row).await?;
    Ok(plain(201, "application/yaml", hub.kubeconfig(&cluster, &token)))
}

/// What goes on in a cluster, as its own API tells the caller.
async fn look_inside(
    caller: RunnerCaller,
    State(hub): State<Hub>,
    Segments([id, what]): Segments<2>,
) -> Result<Response, Refused> {
    let found = INSIDE.iter().find(|i| i.0 == what);
    let (_, path, audit) =
        found.ok_or_else(|| refused(404, "not_found", format!("there is no view {what}"), None))?;
    let value = hub.look_into(&caller.who, &id, path, *audit, crate::control_plane::now()).await?;
    let items = value["items"].as_array().map(Vec::as_slice).unwrap_or_default();
    let rows: Vec<Value> =
        if *audit { items.to_vec() } else { items.iter().map(|item| row(&what, item)).collect() };
    Ok(answer(200, &json!({"items": rows})))
}

impl Hub {
    /// The clusters that somebody sees.
    pub(in crate::control_plane) fn visible(&self, who: &Who, now: i64) -> Vec<ClusterView> {
        let reached =
            |c: &ClusterView| !matches!(who, Who::Access(access) if !access.includes(&c.id));
        self.registry()
            .clusters(who.project(), now)
            .into_iter()
            .filter(reached)
            .map(|c| self.seen(c))
            .collect()
    }

    /// With the tunnel as this end of it knows, not as the agent said at its last heartbeat.
    fn seen(&self, mut cluster: ClusterView) -> ClusterView {
        match self.tunnel_open(&cluster.agent_id) {
            Some(true) => cluster.tunnel = "up".into(),
            Some(false) if cluster.tunnel == "up" => cluster.tunnel = "down".into(),
            _ => {}
        }
        cluster
    }
}

/// What the page shows of an object: text and numbers, nothing else of it leaves here.
fn row(what: &str, item: &Value) -> Value {
    let meta = &item["metadata"];
    match what {
        "events" => json!({
            "at": ([&item["lastTimestamp"], &item["eventTime"], &meta["creationTimestamp"]].into_iter().find(|v| v.is_string())),
            "kind": item["type"], "reason": item["reason"], "message": item["message"], "count": item["count"],
            "object": format!("{}/{}", text(&item["involvedObject"]["kind"]), text(&item["involvedObject"]["name"])),
            "namespace": meta["namespace"],
        }),
        _ => {
            let (spec, status) = (&item["spec"], &item["status"]);
            let number = |v: &Value| v.as_i64().unwrap_or(0);
            let (wanted, ready) = if what == "daemonsets" {
                (number(&status["desiredNumberScheduled"]), number(&status["numberReady"]))
            } else {
                (spec["replicas"].as_i64().unwrap_or(1), number(&status["readyReplicas"]))
            };
            let images: Vec<&Value> = spec["template"]["spec"]["containers"]
                .as_array()
                .into_iter()
                .flatten()
                .map(|c| &c["image"])
                .collect();
            json!({"namespace": meta["namespace"], "name": meta["name"], "wanted": wanted, "ready": ready, "images": images, "created": meta["creationTimestamp"]})
        }
    }
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}
