//! The router: each resource has a file with its routes and their handlers. The first argument of a
//! handler says who may call it.

mod admins;
mod agents;
mod changes;
mod clusters;
mod frps;
mod gateway;
mod jobs;
mod openapi;
mod operations;
mod page;
mod projects;
mod rollouts;
mod runners;
mod system;
mod tokens;

use std::collections::BTreeMap;
use std::convert::Infallible;

use axum::Router;
use axum::extract::Request;
use axum::handler::Handler;
use axum::response::Response;
use axum::routing::{MethodFilter, MethodRouter, any};
use http::request::Parts;
use http::{HeaderValue, Uri};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tower::Service as _;

use super::answer::error_answer;
use super::auth::{CallerExtractor, Origin};
use super::body::{check_segments, path_not_found};
use super::error::HttpError;
use super::state::ControlPlane;
use crate::base::secret::Secret;

pub use super::auth::RequiredAuth;

/// A route in the table: `{id}` stands for one segment of a path, `*` for every method, or at the
/// end for all that follows.
#[derive(Clone, Copy, Debug)]
pub struct Route {
    pub method: &'static str,
    pub path: &'static str,
    pub required_auth: RequiredAuth,
}

/// The authentication that a handler requires, by its first argument. A function whose first
/// argument is not a [`CallerExtractor`] is no handler.
trait HandlerAuth {
    const REQUIRED_AUTH: RequiredAuth;
}

macro_rules! handler_auth {
    ($($more:ident)*) => {
        impl<Via, C: CallerExtractor, $($more),*> HandlerAuth for (Via, C, $($more),*) {
            const REQUIRED_AUTH: RequiredAuth = C::REQUIRED_AUTH;
        }
    };
}

handler_auth!();
handler_auth!(A);
handler_auth!(A B);
handler_auth!(A B D);
handler_auth!(A B D E);

/// Routes with their handlers, and the table of them.
#[derive(Default)]
struct Routes {
    table: Vec<Route>,
    /// By path. All other methods of a path get the same error.
    paths: BTreeMap<&'static str, MethodRouter<ControlPlane>>,
}

impl Routes {
    fn get<H: Handler<T, ControlPlane>, T: HandlerAuth + 'static>(
        self,
        path: &'static str,
        handler: H,
    ) -> Routes {
        // axum would answer HEAD with it too
        self.on("GET", MethodFilter::GET, path, handler)
            .change(path, |methods| methods.head(wrong_method))
    }

    fn post<H: Handler<T, ControlPlane>, T: HandlerAuth + 'static>(
        self,
        path: &'static str,
        handler: H,
    ) -> Routes {
        self.on("POST", MethodFilter::POST, path, handler)
    }

    fn patch<H: Handler<T, ControlPlane>, T: HandlerAuth + 'static>(
        self,
        path: &'static str,
        handler: H,
    ) -> Routes {
        self.on("PATCH", MethodFilter::PATCH, path, handler)
    }

    fn put<H: Handler<T, ControlPlane>, T: HandlerAuth + 'static>(
        self,
        path: &'static str,
        handler: H,
    ) -> Routes {
        self.on("PUT", MethodFilter::PUT, path, handler)
    }

    fn delete<H: Handler<T, ControlPlane>, T: HandlerAuth + 'static>(
        self,
        path: &'static str,
        handler: H,
    ) -> Routes {
        self.on("DELETE", MethodFilter::DELETE, path, handler)
    }

    fn on<H: Handler<T, ControlPlane>, T: HandlerAuth + 'static>(
        mut self,
        method: &'static str,
        filter: MethodFilter,
        path: &'static str,
        handler: H,
    ) -> Routes {
        self.table.push(Route { method, path, required_auth: T::REQUIRED_AUTH });
        self.change(path, |methods| methods.on(filter, handler))
    }

    /// Every method of a path, of the same path with a slash, and of all below; `shown` stands for
    /// the three in the table.
    fn below<H: Handler<T, ControlPlane>, T: HandlerAuth + 'static>(
        mut self,
        shown: &'static str,
        paths: [&'static str; 3],
        handler: H,
    ) -> Routes {
        self.table.push(Route { method: "*", path: shown, required_auth: T::REQUIRED_AUTH });
        for path in paths {
            self.paths.insert(path, any(handler.clone()));
        }
        self
    }

    fn change(
        mut self,
        path: &'static str,
        change: impl FnOnce(MethodRouter<ControlPlane>) -> MethodRouter<ControlPlane>,
    ) -> Routes {
        let methods = self.paths.remove(path).unwrap_or_else(|| any(wrong_method));
        self.paths.insert(path, change(methods));
        self
    }

    fn all() -> Routes {
        let parts = [
            page::routes,
            system::routes,
            openapi::routes,
            frps::routes,
            agents::routes,
            projects::routes,
            tokens::routes,
            runners::routes,
            admins::routes,
            clusters::routes,
            operations::routes,
            jobs::routes,
            rollouts::routes,
            changes::routes,
            gateway::routes,
        ];
        parts.into_iter().fold(Routes::default(), |routes, part| part(routes))
    }
}

/// All routes and the authentication that they require.
pub fn table() -> Vec<Route> {
    Routes::all().table
}

/// The router of a control plane.
pub(super) fn router(control_plane: ControlPlane) -> Router {
    let paths = Routes::all().paths.into_iter();
    paths
        .fold(Router::new(), |router, (path, methods)| router.route(path, methods))
        .fallback(no_such_path)
        .with_state(control_plane)
}

/// What is made here by its name alone.
#[derive(Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema), schemars(rename = "Named"))]
#[serde(deny_unknown_fields)]
struct NameRequest {
    name: String,
}

/// A row without its hash.
fn without_hash(row: &impl Serialize) -> Value {
    let mut row = json!(row);
    if let Some(fields) = row.as_object_mut() {
        fields.remove("hash");
    }
    row
}

/// A new row with its token, which is shown this once.
fn with_token(row: &impl Serialize, token: &Secret) -> Value {
    let mut shown = without_hash(row);
    shown["token"] = token.expose().into();
    shown
}

async fn wrong_method(parts: Parts) -> Response {
    let wrong = HttpError::new(405, "method_not_allowed", "this path takes another method", None);
    error_answer(check_segments(&parts).err().unwrap_or(wrong), parts.uri.path())
}

async fn no_such_path(uri: Uri) -> Response {
    error_answer(path_not_found(), uri.path())
}

/// Answers one request.
pub(super) async fn respond(
    mut router: Router,
    origin: Origin,
    request: http::Request<hyper::body::Incoming>,
) -> Result<Response, Infallible> {
    let mut request: Request = request.map(axum::body::Body::new);
    request.extensions_mut().insert(origin);
    let mut response = router.call(request).await?;
    let headers = response.headers_mut();
    for (name, value) in [
        ("cache-control", "no-store"),
        ("x-content-type-options", "nosniff"),
        ("content-security-policy", "sandbox"),
    ] {
        headers.entry(name).or_insert(HeaderValue::from_static(value));
    }
    Ok(response)
}
