//! What a request to the Kubernetes API means, by its decoded path, and whether the namespaces of a
//! token allow it.
//!
//! Reading of paths as in kubernetes/apiserver `pkg/endpoints/request/requestinfo.go`.

use http::Method;

use crate::base::text::is_dns_label;

/// Longest path, bytes.
const MAX_LENGTH: usize = 4096;

/// A request to the Kubernetes API.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KubernetesPath {
    /// The path that is sent on: what was checked, encoded again.
    pub path: String,
    /// Empty for paths that are no resource.
    pub resource: String,
    pub group: String,
    pub namespace: Option<String>,
    pub name: Option<String>,
    pub subresource: Option<String>,
}

/// Why a path is not sent on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PathError {
    #[error("the path cannot be read: {0}")]
    Invalid(&'static str),
    #[error("proxying through the API server is refused")]
    Proxy,
    #[error("the token is for other namespaces")]
    Scope,
}

/// Decodes and checks the raw path below `/k8s`.
///
/// # Errors
/// A path that two readers could read differently, or that leads through the API server to
/// something else.
pub fn parse(raw: &str) -> Result<KubernetesPath, PathError> {
    if raw.len() > MAX_LENGTH {
        return Err(PathError::Invalid("it is longer than 4096 bytes"));
    }
    if raw.is_empty() || raw == "/" {
        return Ok(KubernetesPath { path: "/".into(), ..KubernetesPath::default() });
    }
    let Some(rest) = raw.strip_prefix('/') else {
        return Err(PathError::Invalid("it does not begin with a slash"));
    };
    // one slash at the end is what some clients write
    let segments: Vec<String> = rest
        .strip_suffix('/')
        .unwrap_or(rest)
        .split('/')
        .map(decode_segment)
        .collect::<Result<_, _>>()?;
    let mut path: String = segments.iter().flat_map(|s| ["/".to_owned(), encode(s)]).collect();
    if rest.ends_with('/') {
        path.push('/');
    }
    let mut target = KubernetesPath { path, ..KubernetesPath::default() };
    parse_resource(&segments, &mut target)?;
    Ok(target)
}

fn decode_segment(raw: &str) -> Result<String, PathError> {
    if raw.is_empty() {
        return Err(PathError::Invalid("a segment is empty"));
    }
    let mut bytes = Vec::with_capacity(raw.len());
    let mut rest = raw.bytes();
    while let Some(b) = rest.next() {
        let decoded = if b == b'%' {
            let digit = |b: Option<u8>| {
                b.and_then(|b| char::from(b).to_digit(16)).and_then(|d| u8::try_from(d).ok())
            };
            let (Some(high), Some(low)) = (digit(rest.next()), digit(rest.next())) else {
                return Err(PathError::Invalid("a percent sign without two digits"));
            };
            let decoded = high << 4 | low;
            if matches!(decoded, b'.' | b'/' | b'\\' | b'%') {
                return Err(PathError::Invalid("an encoded dot, slash, backslash or percent sign"));
            }
            decoded
        } else {
            b
        };
        if decoded == b'\\' || decoded < 0x20 || decoded == 0x7f {
            return Err(PathError::Invalid("a backslash or control character"));
        }
        bytes.push(decoded);
    }
    let text = String::from_utf8(bytes).map_err(|_| PathError::Invalid("it is not UTF-8"))?;
    // also with parameters, which some servers remove before they resolve the dots
    if matches!(text.split(';').next(), Some("." | "..")) {
        return Err(PathError::Invalid("a dot segment"));
    }
    Ok(text)
}

/// RFC 3986: what may stand in a segment stays, everything else is encoded.
fn encode(segment: &str) -> String {
    let mut text = String::with_capacity(segment.len());
    for b in segment.bytes() {
        if b.is_ascii_alphanumeric() || b"-._~!$&'()*+,;=:@".contains(&b) {
            text.push(char::from(b));
        } else {
            text.push_str(&format!("%{b:02X}"));
        }
    }
    text
}

fn parse_resource(segments: &[String], target: &mut KubernetesPath) -> Result<(), PathError> {
    let mut parts = segments.iter().map(String::as_str);
    match parts.next() {
        Some("api") => {
            if parts.next().is_none() {
                return Ok(());
            }
        }
        Some("apis") => {
            let (group, version) = (parts.next(), parts.next());
            if version.is_none() {
                return Ok(());
            }
            target.group = group.unwrap_or_default().to_owned();
        }
        _ => return Ok(()),
    }
    let mut rest: Vec<&str> = parts.collect();
    match rest.first().copied() {
        // the old form of watches and of the proxy verb: no client needs its other rules
        Some("watch") => {
            return Err(PathError::Invalid("a path with `watch` in it: use the query watch=true"));
        }
        Some("proxy") => return Err(PathError::Proxy),
        _ => {}
    }
    if rest.first() == Some(&"namespaces") {
        match rest.get(1) {
            Some(namespace)
                if rest.len() > 2
                    && !(rest.len() == 3 && matches!(rest[2], "status" | "finalize")) =>
            {
                target.namespace = Some((*namespace).to_owned());
                rest.drain(..2);
            }
            Some(namespace) => target.namespace = Some((*namespace).to_owned()),
            None => {}
        }
    }
    let mut rest = rest.into_iter();
    target.resource = rest.next().unwrap_or_default().to_owned();
    target.name = rest.next().map(str::to_owned);
    target.subresource = rest.next().map(str::to_owned);
    if target.subresource.as_deref() == Some("proxy") {
        return Err(PathError::Proxy);
    }
    Ok(())
}

impl KubernetesPath {
    /// Whether a caller that is limited to `namespaces` may send this.
    ///
    /// # Errors
    /// [`PathError::Scope`].
    pub fn check_namespaces(
        &self,
        method: &Method,
        namespaces: &[String],
    ) -> Result<(), PathError> {
        let listed = self.namespace.as_ref().is_some_and(|n| namespaces.contains(n));
        let allowed = if self.resource.is_empty() {
            self.reads_discovery(method)
        } else if self.resource == "namespaces" {
            listed && is_reading(method) && self.subresource.is_none()
        } else if self.namespace.is_some() {
            listed
        } else {
            let review = matches!(
                (self.group.as_str(), self.resource.as_str()),
                ("authorization.k8s.io", "selfsubjectaccessreviews" | "selfsubjectrulesreviews")
                    | ("authentication.k8s.io", "selfsubjectreviews")
            );
            review && *method == Method::POST && self.name.is_none()
        };
        if allowed { Ok(()) } else { Err(PathError::Scope) }
    }

    /// The namespace that a caller who is limited to a tenant acts in with this; none where it asks
    /// what the cluster serves. Whether the namespace is the tenant's is not known here.
    ///
    /// # Errors
    /// [`PathError::Scope`] where it is in no namespace.
    pub fn tenant_namespace(&self, method: &Method) -> Result<Option<&str>, PathError> {
        if self.resource.is_empty() && self.reads_discovery(method) {
            return Ok(None);
        }
        let whole = self.resource == "namespaces";
        let allowed = !whole || (is_reading(method) && self.subresource.is_none());
        // it becomes part of a user's name and of a path
        let namespace = self.namespace.as_deref().filter(|name| allowed && is_dns_label(name));
        namespace.map(Some).ok_or(PathError::Scope)
    }

    /// Discovery and the like, by name: what is not listed here may be anything.
    fn reads_discovery(&self, method: &Method) -> bool {
        let first = self.path.trim_matches('/').split('/').next().unwrap_or_default();
        is_reading(method)
            && (matches!(first, "" | "api" | "apis" | "version")
                || self.path.starts_with("/openapi/"))
    }
}

fn is_reading(method: &Method) -> bool {
    matches!(*method, Method::GET | Method::HEAD)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn paths_mean_what_the_api_server_reads_in_them() {
        let cases = [
            (
                "/api/v1/namespaces/beta/pods/web/log",
                "pods",
                Some("beta"),
                Some("web"),
                Some("log"),
            ),
            ("/apis/apps/v1/namespaces/beta/deployments", "deployments", Some("beta"), None, None),
            ("/api/v1/namespaces/beta", "namespaces", Some("beta"), Some("beta"), None),
            (
                "/api/v1/namespaces/beta/status",
                "namespaces",
                Some("beta"),
                Some("beta"),
                Some("status"),
            ),
            ("/api/v1/namespaces", "namespaces", None, None, None),
            ("/api/v1/nodes/n1", "nodes", None, Some("n1"), None),
            ("/api/v1", "", None, None, None),
            ("/apis/apps", "", None, None, None),
            ("/version", "", None, None, None),
            ("/", "", None, None, None),
        ];
        for (path, resource, namespace, name, sub) in cases {
            let t = parse(path).unwrap();
            assert_eq!((t.path.as_str(), t.resource.as_str()), (path, resource), "{path}");
            assert_eq!(
                (t.namespace.as_deref(), t.name.as_deref(), t.subresource.as_deref()),
                (namespace, name, sub),
                "{path}"
            );
        }
        // odd and right
        assert_eq!(
            parse("/api/v1/namespaces/b/configmaps/caf%C3%A9").unwrap().path,
            "/api/v1/namespaces/b/configmaps/caf%C3%A9"
        );
        assert_eq!(
            parse("/apis/rbac.authorization.k8s.io/v1/clusterroles/system:node")
                .unwrap()
                .name
                .unwrap(),
            "system:node"
        );
        assert_eq!(parse("/api/v1/%70ods").unwrap().path, "/api/v1/pods");
    }

    #[test]
    fn paths_that_can_be_read_in_two_ways_are_refused() {
        for path in [
            "/api/v1/namespaces/beta/../kube-system/secrets",
            "/api/v1/namespaces/beta/%2e%2e/kube-system/secrets",
            "/api/v1/namespaces/beta/%2E%2e/x",
            "/api/v1/namespaces/beta%2fsecrets",
            "/api/v1/namespaces/beta%5csecrets",
            "/api/v1/namespaces/beta\\secrets",
            "/api/v1//namespaces/beta/secrets",
            "//api/v1/secrets",
            "/api/v1/./secrets",
            "/api/v1/namespaces/beta/..;/kube-system/secrets",
            "/api/v1/namespaces/%252e%252e/secrets",
            "/api/v1/namespaces/a%00b/secrets",
            "/api/v1/namespaces/a%0ab/secrets",
            "/api/v1/namespaces/%ff/secrets",
            "/api/v1/namespaces/%g0/secrets",
            "/api/v1/namespaces/%2",
            "api/v1/secrets",
            "/api/v1/watch/secrets",
        ] {
            assert!(matches!(parse(path), Err(PathError::Invalid(_))), "{path}: {:?}", parse(path));
        }
        for path in [
            "/api/v1/nodes/n/proxy/run",
            "/api/v1/namespaces/b/services/s:80/proxy/x",
            "/api/v1/namespaces/b/pods/p/proxy",
            "/api/v1/proxy/nodes/n",
        ] {
            assert_eq!(parse(path), Err(PathError::Proxy), "{path}");
        }
    }

    #[test]
    fn a_namespace_claim_lets_only_its_own_through() {
        let own = ["beta".to_owned()];
        let verdict = |method: Method, path: &str| {
            parse(path).unwrap().check_namespaces(&method, &own).is_ok()
        };
        for (method, path) in [
            (Method::GET, "/api"),
            (Method::GET, "/apis/apps/v1"),
            (Method::GET, "/openapi/v3"),
            (Method::GET, "/version"),
            (Method::GET, "/api/v1/namespaces/beta"),
            (Method::GET, "/api/v1/namespaces/beta/pods"),
            (Method::DELETE, "/apis/apps/v1/namespaces/beta/deployments/x"),
            (Method::POST, "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"),
        ] {
            assert!(verdict(method.clone(), path), "{method} {path}");
        }
        for (method, path) in [
            (Method::GET, "/api/v1/pods"),
            (Method::GET, "/api/v1/nodes"),
            (Method::GET, "/api/v1/namespaces"),
            (Method::GET, "/api/v1/namespaces/kube-system"),
            (Method::GET, "/api/v1/namespaces/kube-system/pods"),
            (Method::PATCH, "/api/v1/namespaces/beta"),
            (Method::PUT, "/api/v1/namespaces/beta/finalize"),
            (Method::DELETE, "/api/v1/namespaces/beta"),
            (Method::POST, "/apis/authorization.k8s.io/v1/subjectaccessreviews"),
            (Method::GET, "/metrics"),
            (Method::GET, "/logs/x"),
            (Method::POST, "/api"),
            (Method::GET, "/apis/apps/v1/deployments"),
        ] {
            assert!(!verdict(method.clone(), path), "{method} {path}");
        }
    }

    #[test]
    fn a_caller_of_a_tenant_acts_in_one_namespace_or_reads_what_is_served() {
        let verdict = |method: Method, path: &str| {
            let target = parse(path).unwrap();
            target.tenant_namespace(&method).map(|namespace| namespace.map(str::to_owned))
        };
        for path in ["/", "/api", "/api/v1", "/apis/apps/v1", "/openapi/v3", "/version"] {
            assert_eq!(verdict(Method::GET, path), Ok(None), "{path}");
        }
        for (method, path) in [
            (Method::GET, "/api/v1/namespaces/beta"),
            (Method::GET, "/api/v1/namespaces/beta/pods"),
            (Method::POST, "/api/v1/namespaces/beta/pods/p/exec"),
            (Method::DELETE, "/apis/apps/v1/namespaces/beta/deployments/x"),
        ] {
            assert_eq!(verdict(method.clone(), path), Ok(Some("beta".into())), "{method} {path}");
        }
        for (method, path) in [
            (Method::GET, "/api/v1/pods"),
            (Method::GET, "/api/v1/nodes"),
            (Method::GET, "/api/v1/namespaces"),
            (Method::GET, "/apis/apps/v1/deployments"),
            (Method::GET, "/apis/rbac.authorization.k8s.io/v1/clusterroles/x"),
            (Method::PATCH, "/api/v1/namespaces/beta"),
            (Method::GET, "/api/v1/namespaces/beta/status"),
            (Method::PUT, "/api/v1/namespaces/beta/finalize"),
            (Method::DELETE, "/api/v1/namespaces/beta"),
            (Method::POST, "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"),
            (Method::GET, "/metrics"),
            (Method::GET, "/logs/x"),
            (Method::POST, "/api"),
            (Method::GET, "/api/v1/namespaces/a:b/pods"),
            (Method::GET, "/api/v1/namespaces/Beta/pods"),
            (Method::GET, "/api/v1/namespaces/b%20c/pods"),
        ] {
            assert_eq!(verdict(method.clone(), path), Err(PathError::Scope), "{method} {path}");
        }
    }

    proptest! {
        #[test]
        fn what_is_sent_on_is_what_was_judged(raw in "(/[a-z%0-9./\\\\:é-]{0,12}){0,6}") {
            if let Ok(judged) = parse(&raw) {
                let path = &judged.path;
                prop_assert!(!path.contains("..") || path.split('/').all(|s| s != ".."));
                prop_assert!(!path.contains("//") && !path.contains('\\') && path.is_ascii());
                // judged again, it means the same
                prop_assert_eq!(parse(&judged.path), Ok(judged));
            }
        }
    }
}
