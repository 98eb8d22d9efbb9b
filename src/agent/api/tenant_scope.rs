//! Callers of a tenant: whether a namespace is the tenant's. The label of the namespace says so, as
//! it is when it is asked for; nothing is remembered.

use std::time::Duration;

use http::Request;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Bytes;
use serde_json::Value;
use tokio::time::timeout;

use crate::base::text::is_dns_label;
use crate::kubernetes::answer::ApiError;
use crate::kubernetes::tenant::tenant_of;
use crate::kubernetes::upstream::Upstream;

const LOOK_TIMEOUT: Duration = Duration::from_secs(10);
const MAX_NAMESPACE: usize = 1 << 20;

/// A namespace, read with the agent's own rights; `None` where there is none.
///
/// # Errors
/// Why the API server gave no answer that says so.
pub(super) async fn namespace(upstream: &Upstream, name: &str) -> Result<Option<Value>, String> {
    if !is_dns_label(name) {
        return Ok(None);
    }
    let asked = async {
        let body = Full::new(Bytes::new()).map_err(|never| match never {}).boxed_unsync();
        let mut request = Request::new(body);
        *request.uri_mut() = format!("/api/v1/namespaces/{name}").parse().map_err(text)?;
        request
            .headers_mut()
            .insert(http::header::ACCEPT, http::HeaderValue::from_static("application/json"));
        let answer = upstream.send(request, false).await.map_err(text)?;
        let status = answer.status().as_u16();
        let body = Limited::new(answer.into_body(), MAX_NAMESPACE).collect().await.map_err(text)?;
        match status {
            200 => serde_json::from_slice(&body.to_bytes()).map(Some).map_err(text),
            404 => Ok(None),
            _ => Err(format!("it answers {status}")),
        }
    };
    timeout(LOOK_TIMEOUT, asked).await.unwrap_or_else(|_| Err("no answer for 10 s".into()))
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// What the caller of a tenant is told of everything that is not the tenant's: it is the same
/// whether it is there or not.
pub(super) fn outside(tenant: &str) -> ApiError {
    ApiError::new(
        403,
        "namespace_scope",
        format!("the token is for the tenant {tenant}, and this is not in one of its namespaces"),
        Some("name a namespace of the tenant with -n, or ask for another token"),
    )
}

/// # Errors
/// [`outside`], or that the API server does not say it.
pub(super) async fn check(upstream: &Upstream, tenant: &str, name: &str) -> Result<(), ApiError> {
    match namespace(upstream, name).await {
        Ok(Some(found)) if tenant_of(&found) == Some(tenant) => Ok(()),
        Ok(_) => Err(outside(tenant)),
        Err(error) => {
            tracing::debug!(error, "the tenant of a namespace");
            let hint = Some("the tunnel stays up; try again soon");
            let message = "the Kubernetes API does not say of which tenant the namespace is";
            Err(ApiError::new(503, "kubernetes_unavailable", message, hint))
        }
    }
}
