//! The auth plugin of an external frps, and its configuration.

use axum::extract::State;
use axum::response::Response;
use http::Uri;
use serde_json::json;

use super::Routes;
use crate::control_plane::answer::{answer, uncached};
use crate::control_plane::auth::{FrpsCaller, LocalAdmin};
use crate::control_plane::body::JsonBody;
use crate::control_plane::error::HttpError;
use crate::control_plane::frps_plugin::PluginRequest;
use crate::control_plane::state::ControlPlane;

pub(super) fn routes(routes: Routes) -> Routes {
    routes.post("/frp/handler/{secret}", handler).get("/api/v1/frps", config)
}

/// A call of frps before it lets a client in. Every answer has `unchange`: without it frps would
/// use our `content` instead of the client's.
async fn handler(
    _: FrpsCaller,
    State(control_plane): State<ControlPlane>,
    uri: Uri,
    JsonBody(request): JsonBody<PluginRequest>,
) -> Response {
    let query = uri.query().unwrap_or_default();
    let op = url::form_urlencoded::parse(query.as_bytes())
        .find(|(k, _)| k == "op")
        .map(|(_, v)| v.into_owned())
        .unwrap_or_default();
    let verdict = control_plane.plugin(&op, request.content);
    let reason = verdict.as_ref().err().cloned().unwrap_or_default();
    answer(200, &json!({"reject": verdict.is_err(), "reject_reason": reason, "unchange": true}))
}

async fn config(
    _: LocalAdmin,
    State(control_plane): State<ControlPlane>,
) -> Result<Response, HttpError> {
    Ok(uncached(200, "application/toml", control_plane.frps_config()?))
}
