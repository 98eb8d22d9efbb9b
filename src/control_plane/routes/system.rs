//! The control plane itself: health, CA, metrics and backup.

use axum::extract::State;
use axum::response::Response;
use serde_json::json;

use super::Routes;
use crate::base::metrics::CONTENT_TYPE;
use crate::control_plane::answer::{answer, uncached};
use crate::control_plane::auth::{AdminCaller, Anonymous, LocalAdmin};
use crate::control_plane::backup;
use crate::control_plane::clock::now;
use crate::control_plane::error::{HttpError, database_unavailable};
use crate::control_plane::state::ControlPlane;

pub(super) fn routes(routes: Routes) -> Routes {
    let routes = routes.get("/api/v1/health", health).get("/api/v1/ca", ca);
    routes.get("/metrics", metrics).get("/api/v1/backup", copy)
}

async fn health(_: Anonymous) -> Response {
    answer(200, &json!({"status": "ok", "version": env!("CARGO_PKG_VERSION")}))
}

async fn ca(_: Anonymous, State(control_plane): State<ControlPlane>) -> Response {
    uncached(200, "application/x-pem-file", control_plane.client_ca().unwrap_or_default())
}

async fn metrics(_: AdminCaller, State(control_plane): State<ControlPlane>) -> Response {
    uncached(200, CONTENT_TYPE, control_plane.metrics(now()))
}

async fn copy(
    _: LocalAdmin,
    State(control_plane): State<ControlPlane>,
) -> Result<Response, HttpError> {
    let text = backup::text(&control_plane.inner.state, &control_plane.inner.store)
        .await
        .map_err(|e| database_unavailable(&e))?;
    Ok(uncached(200, "application/json", text.expose().to_owned()))
}
