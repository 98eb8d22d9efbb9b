//! The OpenAPI document of this API, served as it is committed. A test generates it from the routes
//! and from the types of requests and answers.

use axum::response::Response;

use super::Routes;
use crate::control_plane::answer::uncached;
use crate::control_plane::auth::Anonymous;

const DOCUMENT: &str = include_str!("../../../../deployments/openapi.json");

pub(super) fn routes(routes: Routes) -> Routes {
    routes.get("/api/v1/openapi.json", document)
}

async fn document(_: Anonymous) -> Response {
    uncached(200, "application/json", DOCUMENT)
}

#[cfg(test)]
mod tests;
