//! The control plane itself: its health, its CA, its metrics, and what only its own machine is told.

use axum::extract::State;
use axum::response::Response;
use serde_json::json;

use super::Routes;
use crate::control_plane::answer::{answer, plain};
use crate::control_plane::auth::{AdminCaller, Anonymous, LocalAdmin};
use crate::control_plane::registry::{Refused, unwritten};
use crate::control_plane::{Hub, backup};

pub(super) fn routes(routes: Routes) -> Routes {
    let routes = routes.get("/api/v1/health", health).get("/api/v1/ca", ca);
    routes.get("/metrics", metrics).get("/api/v1/backup", copy)
}

async fn health(_: Anonymous) -> Response {
    answer(200, &json!({"status": "ok", "version": env!("CARGO_PKG_VERSION")}))
}

async fn ca(_: Anonymous, State(hub): State<Hub>) -> Response {
    plain(200, "application/x-pem-file", hub.shown_ca().unwrap_or_default())
}

async fn metrics(_: AdminCaller, State(hub): State<Hub>) -> Response {
    plain(200, "text/plain; version=0.0.4", hub.metrics(crate::control_plane::now()))
}

async fn copy(_: LocalAdmin, State(hub): State<Hub>) -> Result<Response, Refused> {
    let text = backup::text(&hub.inner.state, &hub.inner.store).await.map_err(|e| unwritten(&e))?;
    Ok(plain(200, "application/json", text.expose().to_owned()))
}
