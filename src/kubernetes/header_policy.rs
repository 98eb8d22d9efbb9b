//! Which headers of a caller pass, and which requests are refused for their headers.

use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::request::Parts;
use http::{Method, StatusCode, Version};

use crate::contract::tenant::{TENANT_DEPLOYER, TENANT_VIEWER};
use crate::contract::token::{Caller, Role};
use crate::kubernetes::path;

/// Most bytes of all headers together.
const MAX_HEADER_BYTES: usize = 16 * 1024;

/// A refusal: status, code, message.
pub type Rejection = (u16, &'static str, &'static str);

/// Meant for one connection, never passed on (RFC 9110 §7.6.1).
const HOP_BY_HOP: &[&str] = &[
    "connection",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
];

/// Dropped: some servers trust what they say about the caller.
const DROPPED: &[&str] = &[
    "authorization",
    "host",
    "cookie",
    "forwarded",
    "via",
    "audit-id",
    "http2-settings",
    "expect",
];
const DROPPED_PREFIXES: &[&str] = &["x-remote-", "x-forwarded-", "x-real-ip", "proxy-"];

/// Checks the framing and form of a request before its body is read.
///
/// # Errors
/// What is wrong with it.
pub fn check_framing(parts: &Parts) -> Result<(), Rejection> {
    let bad = |message| Err((400, "bad_request", message));
    if parts.method == Method::CONNECT {
        return Err(if parts.version == Version::HTTP_2 {
            (400, "use_http1", "upgrades need HTTP/1.1")
        } else {
            (400, "bad_request", "CONNECT is not served")
        });
    }
    if parts.version != Version::HTTP_2 {
        if parts.uri.authority().is_some() || parts.uri.scheme().is_some() {
            return bad("the request target must be a path");
        }
        if parts.version == Version::HTTP_11
            && parts.headers.get_all(header::HOST).iter().count() != 1
        {
            return bad("a request has one Host");
        }
    }
    if parts.uri.authority().is_some_and(|a| a.as_str().contains('@')) {
        return bad("the request target must hold no user");
    }
    let host = parts.headers.get(header::HOST).map_or(Ok(""), |h| h.to_str()).unwrap_or("@");
    if host.contains(['@', '/', '\\', '?', '#', ',', ' ']) {
        return bad("the Host is none");
    }
    let mut encodings = parts.headers.get_all(header::TRANSFER_ENCODING).iter();
    let chunked = match (encodings.next(), encodings.next()) {
        (None, _) => false,
        (Some(value), None) if value.as_bytes().eq_ignore_ascii_case(b"chunked") => true,
        _ => return bad("the only transfer encoding is chunked"),
    };
    let mut lengths = parts.headers.get_all(header::CONTENT_LENGTH).iter();
    match (lengths.next(), lengths.next()) {
        (None, _) => {}
        (Some(_), _) if chunked => return bad("a body has a length or is chunked, not both"),
        (Some(value), None)
            if !value.is_empty() && value.as_bytes().iter().all(u8::is_ascii_digit) => {}
        _ => return bad("a body has one length"),
    }
    let size: usize =
        parts.headers.iter().map(|(name, value)| name.as_str().len() + value.len() + 4).sum();
    if size > MAX_HEADER_BYTES {
        return Err((431, "headers_too_large", "the headers are longer than 16 KiB"));
    }
    Ok(())
}

/// The protocol that a request asks to switch to.
///
/// # Errors
/// One that is not passed through.
pub fn requested_upgrade(parts: &Parts) -> Result<Option<HeaderValue>, Rejection> {
    let named = listed(&parts.headers, header::CONNECTION).iter().any(|token| token == "upgrade");
    match parts.headers.get(header::UPGRADE) {
        Some(value) if named => {
            let known = value.as_bytes().eq_ignore_ascii_case(b"websocket")
                || value.as_bytes().eq_ignore_ascii_case(b"SPDY/3.1");
            if known && parts.headers.get_all(header::UPGRADE).iter().count() == 1 {
                Ok(Some(value.clone()))
            } else {
                Err((400, "bad_upgrade", "only websocket and SPDY/3.1 are passed through"))
            }
        }
        _ => Ok(None),
    }
}

/// Whether a header is meant for one connection and never passed on: the known ones, and those that
/// `Connection` names.
pub fn hop_by_hop(headers: &HeaderMap) -> impl Fn(&str) -> bool + use<> {
    let named = listed(headers, header::CONNECTION);
    move |name| is_hop_by_hop(&named, name)
}

fn is_hop_by_hop(named: &[String], name: &str) -> bool {
    HOP_BY_HOP.contains(&name) || named.iter().any(|n| n == name)
}

/// The one bearer token of a request; none when there are two.
pub fn bearer(headers: &HeaderMap) -> Option<&str> {
    let mut values = headers.get_all(header::AUTHORIZATION).iter();
    let (Some(value), None) = (values.next(), values.next()) else { return None };
    let (scheme, token) = value.to_str().ok()?.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then_some(token.trim())
}

fn listed(headers: &HeaderMap, name: HeaderName) -> Vec<String> {
    let values = headers.get_all(name).into_iter().filter_map(|v| v.to_str().ok());
    values
        .flat_map(|v| v.split(','))
        .map(|t| t.trim().to_ascii_lowercase())
        .filter(|t| !t.is_empty())
        .collect()
}

/// Whom Kubernetes takes a caller for: a user, and its group where it has one of ours. A caller of
/// a tenant has rights inside of a namespace alone, as a ServiceAccount there; of the cluster it
/// reads what every user does.
fn identity(caller: &Caller, namespace: Option<&str>) -> (String, Option<String>) {
    let runner = "pipeops:runner".to_owned();
    match (&caller.tenant, namespace) {
        (None, _) => (runner, Some(format!("pipeops:{}", caller.role.name()))),
        (Some(_), None) => (runner, None),
        (Some(_), Some(namespace)) => {
            let viewer = caller.role < Role::Deployer;
            let account = if viewer { TENANT_VIEWER } else { TENANT_DEPLOYER };
            (format!("system:serviceaccount:{namespace}:{account}"), None)
        }
    }
}

/// The headers that go to the API server: those of the caller that pass, then its identity in this
/// namespace. Identity in a caller's header is refused, not dropped: dropping would hide the
/// attack.
///
/// # Errors
/// A header that claims an identity.
pub fn request_headers(
    headers: &HeaderMap,
    caller: &Caller,
    namespace: Option<&str>,
    request: &str,
    upgrade: Option<HeaderValue>,
) -> Result<HeaderMap, Rejection> {
    let named = listed(headers, header::CONNECTION);
    if named.iter().any(|n| n == "authorization" || n.starts_with("impersonate")) {
        return Err((400, "identity_header", "Connection names a header that carries an identity"));
    }
    let mut out = HeaderMap::with_capacity(headers.len() + 6);
    for (name, value) in headers {
        let text = name.as_str();
        // whatever follows: no legitimate client sends a header that begins like this
        if text.starts_with("impersonate") {
            return Err((
                400,
                "identity_header",
                "who a request is from is decided here, and no Impersonate header is taken: leave \
                 out --as, --as-group and --as-uid",
            ));
        }
        // the API server takes a bearer token from this one too (kubernetes/apiserver,
        // authentication/request/websocket)
        if name == header::SEC_WEBSOCKET_PROTOCOL
            && value
                .as_bytes()
                .to_ascii_lowercase()
                .windows(25)
                .any(|w| w == b"base64url.bearer.authoriz")
        {
            return Err((400, "identity_header", "a WebSocket protocol that carries a token"));
        }
        let dropped = is_hop_by_hop(&named, text)
            || DROPPED.contains(&text)
            || DROPPED_PREFIXES.iter().any(|p| text.starts_with(p))
            || text.contains('_');
        if !dropped {
            out.append(name, value.clone());
        }
    }
    let set = |out: &mut HeaderMap, name: &'static str, value: &str| {
        if let Ok(value) = HeaderValue::from_str(value) {
            out.append(HeaderName::from_static(name), value);
        }
    };
    let (user, group) = identity(caller, namespace);
    set(&mut out, "impersonate-user", &user);
    if let Some(group) = group {
        set(&mut out, "impersonate-group", &group);
    }
    set(&mut out, "impersonate-extra-pipeops.io%2fsubject", &caller.subject);
    set(&mut out, "audit-id", request);
    // RFC 9110 §7.6.3
    set(&mut out, "via", "1.1 pipeops");
    if let Some(protocol) = upgrade {
        out.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
        out.insert(header::UPGRADE, protocol);
    }
    Ok(out)
}

/// What tells a browser something about the server's own origin: here it would apply to the origin
/// of the proxy.
const ORIGIN_BOUND: &[&str] = &[
    "alt-svc",
    "clear-site-data",
    "link",
    "nel",
    "public-key-pins",
    "refresh",
    "report-to",
    "reporting-endpoints",
    "service-worker-allowed",
    "set-cookie",
    "set-cookie2",
    "strict-transport-security",
];
const ORIGIN_BOUND_PREFIXES: &[&str] = &["access-control-"];

/// A location of the server, as the caller sees it below `prefix`: only a path, and nothing that
/// another reader could take for another server.
fn rewrite_location(value: &HeaderValue, prefix: &str) -> Option<HeaderValue> {
    let text = value.to_str().ok()?;
    let path = text.split(['?', '#']).next()?;
    path::parse(path).ok().filter(|_| path.starts_with('/') && !text.contains('\\'))?;
    HeaderValue::from_str(&format!("{prefix}{text}")).ok()
}

/// The headers of an answer that go to the caller, who sees the server below `prefix`. `None` for a
/// redirect that leads elsewhere; without a redirect, a location that the caller cannot reach is
/// left out (RFC 9110 §10.2.2, §8.7).
pub fn response_headers(
    status: StatusCode,
    headers: &HeaderMap,
    prefix: &str,
) -> Option<HeaderMap> {
    let named = listed(headers, header::CONNECTION);
    let mut out = HeaderMap::with_capacity(headers.len() + 2);
    for (name, value) in headers {
        let text = name.as_str();
        if name == header::LOCATION || name == header::CONTENT_LOCATION {
            match rewrite_location(value, prefix) {
                Some(place) => drop(out.append(name, place)),
                None if status.is_redirection() && name == header::LOCATION => return None,
                None => {}
            }
            continue;
        }
        let left = is_hop_by_hop(&named, text)
            || ORIGIN_BOUND.contains(&text)
            || ORIGIN_BOUND_PREFIXES.iter().any(|p| text.starts_with(p));
        if !left {
            out.append(name, value.clone());
        }
    }
    // for a browser, what a cluster answers is data
    out.insert("content-security-policy", HeaderValue::from_static("sandbox"));
    out.insert("x-content-type-options", HeaderValue::from_static("nosniff"));
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_caller_acts_as_its_role_and_one_of_a_tenant_as_an_account_of_the_namespace() {
        let acts_as = |role, tenant: Option<&str>, namespace| {
            let caller = Caller {
                subject: "r-1".into(),
                role,
                namespaces: None,
                tenant: tenant.map(str::to_owned),
                token_id: "t".into(),
                operation: None,
            };
            let headers =
                request_headers(&HeaderMap::new(), &caller, namespace, "id", None).unwrap();
            let text = |name: &str| headers.get(name).map_or("", |v| v.to_str().unwrap());
            assert_eq!(text("impersonate-extra-pipeops.io%2fsubject"), "r-1");
            format!("{} {}", text("impersonate-user"), text("impersonate-group"))
        };
        for role in Role::ALL {
            let expected = format!("pipeops:runner pipeops:{}", role.name());
            assert_eq!(acts_as(role, None, None), expected);
            assert_eq!(acts_as(role, None, Some("beta")), expected);
            assert_eq!(acts_as(role, Some("acme"), None), "pipeops:runner ");
            let account = if role == Role::Viewer { "viewer" } else { "deployer" };
            assert_eq!(
                acts_as(role, Some("acme"), Some("acme-web")),
                format!("system:serviceaccount:acme-web:pipeops-tenant-{account} ")
            );
        }
    }
}
