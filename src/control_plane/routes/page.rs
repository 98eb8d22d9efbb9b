//! The page for people: its files, and logging in. Its data is the API's.

use axum::extract::State;
use axum::response::Response;
use http::{HeaderMap, HeaderValue, header};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::Routes;
use crate::base::secret::Secret;
use crate::control_plane::answer::{answer, uncached};
use crate::control_plane::auth::{Anonymous, AnonymousPeer, SessionCaller};
use crate::control_plane::body::{JsonBody, RawBody};
use crate::control_plane::clock::now;
use crate::control_plane::error::{HttpError, database_unavailable};
use crate::control_plane::registry::Principal;
use crate::control_plane::state::ControlPlane;

const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; \
                      connect-src 'self'; img-src 'self'; base-uri 'none'; form-action 'none'; \
                      frame-ancestors 'none'; require-trusted-types-for 'script'; \
                      trusted-types 'none'";

#[derive(Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "Login"))]
#[serde(deny_unknown_fields)]
pub(super) struct LoginRequest {
    #[cfg_attr(test, schemars(with = "String"))]
    token: Secret,
}

/// Who has logged in.
#[derive(Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "Session"))]
pub(super) struct SessionInfo<'a> {
    name: &'a str,
    /// An administrator; a Runner otherwise.
    admin: bool,
    /// What each call but GET carries in `X-CSRF-Token`.
    csrf: &'a str,
    /// Of the control plane.
    version: &'static str,
}

pub(super) fn routes(routes: Routes) -> Routes {
    let routes = routes
        .get("/", async |_: Anonymous| {
            file("text/html; charset=utf-8", include_str!("../page/index.html"))
        })
        .get("/page.css", async |_: Anonymous| {
            file("text/css; charset=utf-8", include_str!("../page/page.css"))
        })
        .get("/page.js", async |_: Anonymous| {
            file("text/javascript; charset=utf-8", include_str!("../page/page.js"))
        })
        .get("/icon.svg", async |_: Anonymous| {
            file("image/svg+xml", include_str!("../page/icon.svg"))
        });
    routes.post("/session", login).get("/session", session).delete("/session", logout)
}

fn file(kind: &'static str, text: &'static str) -> Response {
    let mut file = uncached(200, kind, text);
    for (name, value) in [
        ("content-security-policy", POLICY),
        ("referrer-policy", "no-referrer"),
        ("cross-origin-opener-policy", "same-origin"),
    ] {
        file.headers_mut().insert(name, HeaderValue::from_static(value));
    }
    file
}

/// A session for an administrator's or a Runner's token.
async fn login(
    peer: AnonymousPeer,
    State(control_plane): State<ControlPlane>,
    JsonBody(request): JsonBody<LoginRequest>,
) -> Result<Response, HttpError> {
    let done = control_plane.login(peer.address, &request.token, now())?;
    with_cookie(answer(200, &session_info(&done.principal, &done.csrf)), &done.cookie)
}

/// The session of a page that was loaded again.
async fn session(
    caller: SessionCaller,
    State(control_plane): State<ControlPlane>,
    headers: HeaderMap,
) -> Response {
    answer(200, &session_info(&caller.principal, &control_plane.csrf(&headers)))
}

async fn logout(
    _: SessionCaller,
    State(control_plane): State<ControlPlane>,
    headers: HeaderMap,
    _: RawBody,
) -> Result<Response, HttpError> {
    with_cookie(answer(200, &json!({})), &control_plane.logout(&headers))
}

fn with_cookie(mut answer: Response, cookie: &str) -> Result<Response, HttpError> {
    answer.headers_mut().insert(
        header::SET_COOKIE,
        HeaderValue::try_from(cookie).map_err(|e| database_unavailable(&e.into()))?,
    );
    Ok(answer)
}

fn session_info<'a>(principal: &'a Principal, csrf: &'a str) -> SessionInfo<'a> {
    let (name, admin) = match principal {
        Principal::Admin(name) => (name.as_str(), true),
        Principal::Local => ("local", true),
        Principal::AccessToken(access) => (access.name.as_str(), false),
        Principal::Agent(_) | Principal::Enrolment(_) => ("", false),
    };
    SessionInfo { name, admin, csrf, version: env!("CARGO_PKG_VERSION") }
}
