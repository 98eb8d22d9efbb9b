//! Clusters: their state, what runs in one, and tokens to reach it.

use std::collections::BTreeMap;

use axum::extract::State;
use axum::response::Response;
use http::Uri;
use serde::Deserialize;
use serde_json::{Value, json};

use super::Routes;
use crate::contract::token::TOKEN_LIFETIME;
use crate::control_plane::answer::{answer, uncached};
use crate::control_plane::auth::{AdminCaller, ProjectCaller, RunnerCaller};
use crate::control_plane::body::{JsonBody, PathSegments, RawBody};
use crate::control_plane::caller_token::{CallerTokenRequest, check_tenants};
use crate::control_plane::clock::now;
use crate::control_plane::error::HttpError;
use crate::control_plane::model::{AccessKind, AccessToken};
use crate::control_plane::registry::{ClusterView, Principal, parse_selector};
use crate::control_plane::scope::{DAY, TokenRequest, checked_ttl, restrict};
use crate::control_plane::state::ControlPlane;
use crate::kubernetes::readiness::workload::{PodCounts, WorkloadKind};

/// The views into a cluster, and the path at its agent.
pub(super) const CLUSTER_VIEWS: &[(&str, &str, bool)] = &[
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
        .patch("/api/v1/clusters/{id}/labels", label)
        .delete("/api/v1/clusters/{id}", remove)
        .post("/api/v1/clusters/{id}/revoke", revoke)
        .post("/api/v1/clusters/{id}/token", token)
        .post("/api/v1/clusters/{id}/kubeconfig", kubeconfig)
        .get("/api/v1/clusters/{id}/inside/{what}", look_inside)
}

/// Labels to set; those that are null are taken away.
#[derive(Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub(super) struct LabelChanges {
    labels: BTreeMap<String, Option<String>>,
}

/// Whoever logs in learns by this which tenant the token is limited to.
async fn list(
    caller: RunnerCaller,
    State(control_plane): State<ControlPlane>,
    uri: Uri,
) -> Result<Response, HttpError> {
    let query = url::form_urlencoded::parse(uri.query().unwrap_or_default().as_bytes());
    let selector = query.into_owned().find(|(name, _)| name == "selector");
    let mut items = control_plane.visible(&caller.principal, now());
    if let Some((_, text)) = selector {
        let selector = parse_selector(&text)?;
        items.retain(|cluster| cluster.is_meant(&selector));
    }
    let mut all = json!({"items": items});
    if let Some(tenant) = caller.principal.tenant() {
        all["tenant"] = tenant.into();
    }
    Ok(answer(200, &all))
}

async fn label(
    _: AdminCaller,
    State(control_plane): State<ControlPlane>,
    PathSegments([id]): PathSegments<1>,
    JsonBody(request): JsonBody<LabelChanges>,
) -> Result<Response, HttpError> {
    control_plane.registry().set_labels(&id, request.labels).await?;
    let cluster = control_plane.registry().cluster(&id, None, now())?;
    Ok(answer(200, &control_plane.seen(cluster, &Principal::Local)))
}

async fn show(
    caller: RunnerCaller,
    State(control_plane): State<ControlPlane>,
    PathSegments([id]): PathSegments<1>,
) -> Result<Response, HttpError> {
    let cluster = control_plane.registry().cluster(&id, caller.principal.project(), now())?;
    Ok(answer(200, &control_plane.seen(cluster, &caller.principal)))
}

async fn remove(
    _: AdminCaller,
    State(control_plane): State<ControlPlane>,
    PathSegments([id]): PathSegments<1>,
    _: RawBody,
) -> Result<Response, HttpError> {
    let now = now();
    let agent = control_plane.registry().cluster(&id, None, now)?.agent_id;
    control_plane.registry().remove_agent(&agent, now).await?;
    Ok(answer(200, &json!({})))
}

async fn revoke(
    _: AdminCaller,
    State(control_plane): State<ControlPlane>,
    PathSegments([id]): PathSegments<1>,
    _: RawBody,
) -> Result<Response, HttpError> {
    control_plane.registry().revoke_agent(&id).await?;
    Ok(answer(200, &json!({})))
}

/// A caller token for the agent itself.
async fn token(
    caller: RunnerCaller,
    State(control_plane): State<ControlPlane>,
    PathSegments([id]): PathSegments<1>,
    JsonBody(request): JsonBody<TokenRequest>,
) -> Result<Response, HttpError> {
    let ttl = checked_ttl(request.ttl_s, TOKEN_LIFETIME, TOKEN_LIFETIME)?;
    let scope = restrict(&caller.principal, &request)?;
    let target = control_plane.registry().target(&id, caller.principal.project())?;
    let request = CallerTokenRequest {
        principal: &caller.principal,
        target: &target,
        scope,
        ttl,
        now: now(),
        operation: None,
    };
    Ok(answer(200, &control_plane.runner_token(&request, &caller.principal)?))
}

async fn kubeconfig(
    RunnerCaller { principal, .. }: RunnerCaller,
    State(control_plane): State<ControlPlane>,
    PathSegments([id]): PathSegments<1>,
    JsonBody(request): JsonBody<TokenRequest>,
) -> Result<Response, HttpError> {
    let now = now();
    let ttl = checked_ttl(request.ttl_s, DAY, DAY)?;
    let scope = restrict(&principal, &request)?;
    let cluster = control_plane.registry().cluster(&id, principal.project(), now)?;
    if scope.tenant.is_some() {
        check_tenants(&control_plane.registry().target(&id, principal.project())?)?;
    }
    // not longer than the token of its maker is valid
    let own_end = if let Principal::AccessToken(own) = &principal { own.expires_at } else { None };
    let own =
        if let Principal::AccessToken(own) = &principal { own.selector.as_ref() } else { None };
    let selector = own.map(|own| format!("{own},id={}", cluster.id));
    let row = AccessToken {
        id: String::new(),
        project: cluster.project.clone(),
        name: format!("kubeconfig of {}", cluster.id),
        kind: AccessKind::Kubeconfig,
        hash: String::new(),
        role: scope.role,
        // a selector says it too, and a version that does not read it shall not reach the cluster
        clusters: Some(if selector.is_some() { Vec::new() } else { vec![cluster.id.clone()] }),
        namespaces: scope.stored_namespaces(),
        tenant: scope.tenant,
        created_at: now,
        expires_at: Some(own_end.map_or(now + ttl, |end| end.min(now + ttl))),
        revoked: false,
        maker: Some(principal.id()),
        person: false,
        selector,
        jobs: false,
    };
    let (_, token) = control_plane.registry().add_access_token(control_plane.keys(), row).await?;
    Ok(uncached(201, "application/yaml", control_plane.kubeconfig(&cluster, &token)))
}

/// A view into a cluster, with the rights of the caller.
async fn look_inside(
    caller: ProjectCaller,
    State(control_plane): State<ControlPlane>,
    PathSegments([id, what]): PathSegments<2>,
) -> Result<Response, HttpError> {
    let found = CLUSTER_VIEWS.iter().find(|i| i.0 == what);
    let (_, path, audit) = found.ok_or_else(|| {
        HttpError::new(404, "not_found", format!("there is no view {what}"), None)
    })?;
    let value = control_plane.get_from_agent(&caller.principal, &id, path, *audit, now()).await?;
    let items = value["items"].as_array().map(Vec::as_slice).unwrap_or_default();
    let rows: Vec<Value> =
        if *audit { items.to_vec() } else { items.iter().map(|item| row(&what, item)).collect() };
    Ok(answer(200, &json!({"items": rows})))
}

impl ControlPlane {
    /// The clusters that a principal may see.
    pub(in crate::control_plane) fn visible(
        &self,
        principal: &Principal,
        now: i64,
    ) -> Vec<ClusterView> {
        let reached = self.registry().reached(principal, now).into_iter();
        reached.map(|c| self.seen(c, principal)).collect()
    }

    /// With the state of the tunnel as seen here, not as in the agent's last heartbeat; for a
    /// tenant without what goes on in it.
    fn seen(&self, mut cluster: ClusterView, principal: &Principal) -> ClusterView {
        if principal.tenant().is_some() {
            cluster = cluster.for_tenant();
        }
        match self.tunnel_open(&cluster.agent_id) {
            Some(true) => cluster.tunnel = "up".into(),
            Some(false) if cluster.tunnel == "up" => cluster.tunnel = "down".into(),
            _ => {}
        }
        cluster
    }
}

/// The fields of an object that the page shows.
fn row(what: &str, item: &Value) -> Value {
    let (meta, object) = (&item["metadata"], &item["involvedObject"]);
    let times = [&item["lastTimestamp"], &item["eventTime"], &meta["creationTimestamp"]];
    match what {
        "events" => json!({
            "at": (times.into_iter().find(|v| v.is_string())),
            "kind": item["type"],
            "reason": item["reason"],
            "message": item["message"],
            "count": item["count"],
            "object": format!("{}/{}", text(&object["kind"]), text(&object["name"])),
            "namespace": meta["namespace"],
        }),
        _ => {
            let kind = match what {
                "daemonsets" => WorkloadKind::DaemonSet,
                "statefulsets" => WorkloadKind::StatefulSet,
                _ => WorkloadKind::Deployment,
            };
            let PodCounts { wanted: desired, ready, .. } = PodCounts::of(kind, item);
            let images: Vec<&Value> = item["spec"]["template"]["spec"]["containers"]
                .as_array()
                .into_iter()
                .flatten()
                .map(|c| &c["image"])
                .collect();
            json!({
                "namespace": meta["namespace"], "name": meta["name"],
                "wanted": desired, "ready": ready,
                "images": images, "created": meta["creationTimestamp"],
            })
        }
    }
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}
