//! Callers of a tenant: whether a namespace is the tenant's, and which are. The label of a
//! namespace says so, as it is when it is asked for; nothing is remembered. While a stream stays
//! open it is asked again.

use std::time::Duration;

use http::Request;
use http_body_util::{BodyExt as _, Limited};
use hyper::body::Bytes;
use serde_json::{Map, Value};
use tokio::time::{sleep, timeout};

use crate::base::connection::Body;
use crate::base::json;
use crate::base::text::is_dns_label;
use crate::contract::tenant::TENANT_LABEL;
use crate::kubernetes::answer::ApiError;
use crate::kubernetes::tenant::tenant_of;
use crate::kubernetes::upstream::Upstream;

const LOOK_TIMEOUT: Duration = Duration::from_secs(10);
/// Largest answer: one namespace, and all of a tenant.
const MAX_NAMESPACE: usize = 1 << 20;
const MAX_LIST: usize = 8 << 20;
/// How often the namespace of an open stream is looked at, and after how many looks without an
/// answer the stream ends.
const RECHECK_INTERVAL: Duration = Duration::from_secs(15);
const MAX_UNANSWERED: u32 = 4;

/// Where the namespaces are.
pub(super) const NAMESPACES: &str = "/api/v1/namespaces";

/// Reads with the agent's own rights; gives status and body.
async fn read(upstream: &Upstream, uri: &str, max: usize) -> Result<(u16, Bytes), String> {
    let asked = async {
        let mut request = Request::new(Body::empty());
        *request.uri_mut() = uri.parse().map_err(text)?;
        request
            .headers_mut()
            .insert(http::header::ACCEPT, http::HeaderValue::from_static("application/json"));
        let answer = upstream.send(request, false).await.map_err(text)?;
        let status = answer.status().as_u16();
        let body = Limited::new(answer.into_body(), max).collect().await.map_err(text)?;
        Ok((status, body.to_bytes()))
    };
    timeout(LOOK_TIMEOUT, asked).await.unwrap_or_else(|_| Err("no answer for 10 s".into()))
}

/// A namespace; `None` where there is none.
///
/// # Errors
/// Why the API server gave no answer that says so.
pub(super) async fn namespace(upstream: &Upstream, name: &str) -> Result<Option<Value>, String> {
    if !is_dns_label(name) {
        return Ok(None);
    }
    match read(upstream, &format!("{NAMESPACES}/{name}"), MAX_NAMESPACE).await? {
        (200, body) => serde_json::from_slice(&body).map(Some).map_err(text),
        (404, _) => Ok(None),
        (status, _) => Err(format!("it answers {status}")),
    }
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

/// The API server does not say it.
fn unanswered(error: String) -> ApiError {
    tracing::debug!(error, "the tenant of a namespace");
    let hint = Some("the tunnel stays up; try again soon");
    let message = "the Kubernetes API does not say of which tenant the namespace is";
    ApiError::new(503, "kubernetes_unavailable", message, hint)
}

/// A namespace of a tenant, as it was found.
#[derive(Clone, Debug)]
pub(super) struct TenantNamespace {
    pub(super) name: String,
    tenant: String,
    uid: String,
}

fn uid_of(namespace: &Value) -> &str {
    namespace["metadata"]["uid"].as_str().unwrap_or_default()
}

/// # Errors
/// [`outside`], or that the API server does not say it.
pub(super) async fn check(
    upstream: &Upstream,
    tenant: &str,
    name: &str,
) -> Result<TenantNamespace, ApiError> {
    match namespace(upstream, name).await {
        Ok(Some(found)) if tenant_of(&found) == Some(tenant) => {
            let uid = uid_of(&found).to_owned();
            Ok(TenantNamespace { name: name.into(), tenant: tenant.into(), uid })
        }
        Ok(_) => Err(outside(tenant)),
        Err(error) => Err(unanswered(error)),
    }
}

impl TenantNamespace {
    /// Completes when the namespace is gone, is another one of that name or is not the tenant's any
    /// more; also when `look` fails for a minute, as it may be so then.
    pub(super) async fn lost<F, L>(&self, look: F)
    where
        F: Fn() -> L,
        L: Future<Output = Result<Option<Value>, String>>,
    {
        let mut unanswered = 0;
        while unanswered < MAX_UNANSWERED {
            sleep(RECHECK_INTERVAL).await;
            match look().await {
                Ok(Some(found))
                    if tenant_of(&found) == Some(&*self.tenant) && uid_of(&found) == self.uid =>
                {
                    unanswered = 0;
                }
                Ok(_) => return,
                Err(error) => {
                    tracing::debug!(error, "the tenant of the namespace of a stream");
                    unanswered += 1;
                }
            }
        }
    }
}

/// The selector of a tenant's namespaces and, where the query has one, of its caller: the comma
/// between the two is an AND, so that the second one takes away only. Nothing else of the query
/// passes.
fn selector(tenant: &str, query: &str) -> String {
    let mut selector = format!("{TENANT_LABEL}={tenant}");
    let mut pairs = url::form_urlencoded::parse(query.as_bytes());
    if let Some((_, asked)) = pairs.find(|(name, _)| name == "labelSelector")
        && !asked.is_empty()
    {
        selector.push(',');
        selector.push_str(&asked);
    }
    url::form_urlencoded::byte_serialize(selector.as_bytes()).collect()
}

/// Of a list of namespaces those of the tenant, and of `only` where that is given.
fn own(list: &mut Map<String, Value>, tenant: &str, only: Option<&[String]>) {
    let mut items = match list.remove("items") {
        Some(Value::Array(items)) => items,
        _ => Vec::new(),
    };
    items.retain(|namespace| {
        let listed = |only: &[String]| only.iter().any(|n| namespace["metadata"]["name"] == **n);
        tenant_of(namespace) == Some(tenant) && only.is_none_or(listed)
    });
    list.insert("items".into(), Value::Array(items));
}

/// The namespaces of a tenant, JSON: those of `only` where that is given. Its callers have no right
/// to list any, so the agent does it for them.
///
/// # Errors
/// A selector that is none, or that the API server does not say it.
pub(super) async fn list(
    upstream: &Upstream,
    tenant: &str,
    only: Option<&[String]>,
    query: &str,
) -> Result<String, ApiError> {
    let uri = format!("{NAMESPACES}?labelSelector={}", selector(tenant, query));
    let (status, body) = read(upstream, &uri, MAX_LIST).await.map_err(unanswered)?;
    match status {
        200 => {}
        400 => {
            let message = "the label selector cannot be read";
            return Err(ApiError::new(400, "bad_path", message, None));
        }
        _ => return Err(unanswered(format!("it answers {status}"))),
    }
    let mut list = json::read(&body).map_err(|error| unanswered(text(error)))?;
    own(&mut list, tenant, only);
    Ok(Value::Object(list).to_string())
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use serde_json::json;
    use tokio::time::Instant;

    use super::*;

    fn found(tenant: &str, uid: &str) -> Result<Option<Value>, String> {
        Ok(Some(json!({"metadata": {"uid": uid, "labels": {TENANT_LABEL: tenant}}})))
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_ends_with_the_namespace_that_it_was_opened_for() {
        let seen =
            TenantNamespace { name: "beta".into(), tenant: "acme".into(), uid: "u-1".into() };
        let away = || Err("connection refused".into());
        for (looks, seconds) in [
            (vec![found("acme", "u-1"), found("acme", "u-1"), found("globex", "u-1")], 45),
            (vec![found("acme", "u-1"), found("acme", "u-2")], 30),
            (vec![found("", "u-1")], 15),
            (vec![Ok(Some(json!({"metadata": {"uid": "u-1"}})))], 15),
            (vec![Ok(None)], 15),
            // an API server that is back in time ends nothing
            (vec![away(), away(), away(), found("acme", "u-1"), away(), Ok(None)], 90),
            (vec![found("acme", "u-1"), away(), away(), away(), away()], 75),
        ] {
            let (begun, mut looks) = (Instant::now(), looks);
            looks.reverse();
            let looks = RefCell::new(looks);
            seen.lost(|| std::future::ready(looks.borrow_mut().pop().unwrap())).await;
            assert_eq!(begun.elapsed().as_secs(), seconds);
            assert!(looks.borrow().is_empty());
        }
    }

    #[test]
    fn what_a_caller_selects_takes_away_only() {
        let own_only = "pipeops.io%2Ftenant%3Dacme";
        for (query, expected) in [
            ("", own_only),
            ("labelSelector=", own_only),
            ("limit=1&continue=x&fieldSelector=metadata.name%3Dkube-system&watch=0", own_only),
            ("labelSelector=a%3Db&labelSelector=c", "pipeops.io%2Ftenant%3Dacme%2Ca%3Db"),
            ("labelSelector=x%26watch%3D1", "pipeops.io%2Ftenant%3Dacme%2Cx%26watch%3D1"),
            (
                "%6cabelSelector=pipeops.io/tenant=globex",
                "pipeops.io%2Ftenant%3Dacme%2Cpipeops.io%2Ftenant%3Dglobex",
            ),
        ] {
            assert_eq!(selector("acme", query), expected, "{query}");
        }
        let namespace = |name: &str, tenant: &str| {
            let labels = json!({TENANT_LABEL: tenant});
            json!({"metadata": {"name": name, "labels": labels}})
        };
        let items = [
            namespace("acme", "acme"),
            namespace("acme-2", "acme"),
            namespace("globex", "globex"),
            json!({"metadata": {"name": "acme"}}),
            json!("acme"),
        ];
        let all = json!({"kind": "NamespaceList", "items": items});
        let names = |all: &Value, only: Option<&[String]>| {
            let mut list = all.as_object().unwrap().clone();
            own(&mut list, "acme", only);
            let items = list["items"].as_array().unwrap().clone();
            items.iter().map(|n| n["metadata"]["name"].clone()).collect::<Vec<_>>()
        };
        assert_eq!(names(&all, None), ["acme", "acme-2"]);
        assert_eq!(names(&all, Some(&["acme-2".into(), "globex".into()])), ["acme-2"]);
        assert!(names(&all, Some(&[])).is_empty());
        assert!(names(&json!({"items": null}), None).is_empty());
        assert!(names(&json!({}), None).is_empty());
    }
}
