//! The OpenAPI document of this API, served as it is committed. A test generates it from the routes
//! and from the types of requests and answers.

use std::sync::LazyLock;

use axum::response::Response;

use super::Routes;
use crate::base::packed_text::unpacked;
use crate::control_plane::answer::uncached;
use crate::control_plane::auth::Anonymous;

static DOCUMENT: LazyLock<String> =
    LazyLock::new(|| unpacked(include_bytes!(concat!(env!("OUT_DIR"), "/openapi.json.snappy"))));

pub(super) fn routes(routes: Routes) -> Routes {
    routes.get("/api/v1/openapi.json", document)
}

async fn document(_: Anonymous) -> Response {
    uncached(200, "application/json", DOCUMENT.as_str())
}

#[cfg(test)]
mod tests;
