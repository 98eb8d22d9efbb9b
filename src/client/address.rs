//! Where an application is reached from outside: the host of its Ingress or HTTPRoute.

use serde_json::Value;
use url::Url;

use super::applications::ClusterReader;
use crate::base::error::{Exit, Failure};
use crate::base::text::is_dns_name;

/// A host of an application.
#[derive(Debug, PartialEq, Eq)]
pub struct Address {
    pub url: String,
    /// The Gateway that says whether it has TLS and may not be read.
    pub unread_gateway: Option<String>,
}

/// None where the application has no host, or none that a browser can open.
///
/// # Errors
/// As [`super::api::Api::get`].
pub async fn address(
    reader: &ClusterReader<'_>,
    namespace: &str,
    name: &str,
) -> Result<Option<Address>, Failure> {
    let find = async |group: &str, namespace: &str, resource: &str, name: &str| {
        let path = format!("/apis/{group}/v1/namespaces/{namespace}/{resource}/{name}");
        let found = reader.api.find(&reader.path(&path)).await;
        // what a role may not see is not there for it
        found.or_else(|e| if e.exit == Exit::Refused { Ok(None) } else { Err(e) })
    };
    if let Some(ingress) = find("networking.k8s.io", namespace, "ingresses", name).await? {
        let rule = &ingress["spec"]["rules"][0];
        let path = &rule["http"]["paths"][0]["path"];
        let url = url_of(&rule["host"], path, has_tls(&ingress));
        return Ok(url.map(|url| Address { url, unread_gateway: None }));
    }
    let gateways = "gateway.networking.k8s.io";
    let Some(route) = find(gateways, namespace, "httproutes", name).await? else { return Ok(None) };
    let parent = &route["spec"]["parentRefs"][0];
    let at = parent["namespace"].as_str().unwrap_or(namespace);
    let gateway_name = parent["name"].as_str().unwrap_or_default();
    let gateway = find(gateways, at, "gateways", gateway_name).await?;
    let host = &route["spec"]["hostnames"][0];
    let tls = gateway.as_ref().is_some_and(|gateway| listens_with_tls(gateway, parent, host));
    let path = &route["spec"]["rules"][0]["matches"][0]["path"]["value"];
    let unread_gateway = gateway.is_none().then(|| format!("{at}/{gateway_name}"));
    Ok(url_of(host, path, tls).map(|url| Address { url, unread_gateway }))
}

/// A name comes from the cluster: what is none never gets to a browser.
fn url_of(host: &Value, path: &Value, tls: bool) -> Option<String> {
    let host = host.as_str().filter(|host| is_dns_name(host))?;
    let mut url = Url::parse(&format!("{}://{host}", if tls { "https" } else { "http" })).ok()?;
    url.set_path(path.as_str().unwrap_or("/"));
    Some(url.into())
}

/// Whether the first host of an Ingress has TLS; without names it is for all of them.
fn has_tls(ingress: &Value) -> bool {
    let host = &ingress["spec"]["rules"][0]["host"];
    let mut all = ingress["spec"]["tls"].as_array().into_iter().flatten();
    all.any(|tls| tls["hosts"].as_array().is_none_or(|hosts| hosts.contains(host)))
}

/// Whether a listener with TLS takes a route in for this host (gateway-api.sigs.k8s.io,
/// `reference/spec`, Listener: `*.NAME` is any name below).
fn listens_with_tls(gateway: &Value, parent: &Value, host: &Value) -> bool {
    let host = host.as_str().unwrap_or_default();
    let takes = |listener: &Value| match listener["hostname"].as_str() {
        None | Some("") => true,
        Some(name) => match name.strip_prefix('*') {
            Some(end) => host.ends_with(end),
            None => host == name,
        },
    };
    let is_meant = |listener: &Value, field: &str, of: &str| {
        parent[field].is_null() || parent[field] == listener[of]
    };
    gateway["spec"]["listeners"].as_array().into_iter().flatten().any(|listener| {
        listener["protocol"] == "HTTPS"
            && takes(listener)
            && is_meant(listener, "sectionName", "name")
            && is_meant(listener, "port", "port")
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_url_is_made_of_what_is_a_name_and_of_nothing_else() {
        for (host, path, tls, url) in [
            (json!("web.example"), json!("/"), true, Some("https://web.example/")),
            (json!("web.example"), json!("/a b"), false, Some("http://web.example/a%20b")),
            (json!("web.example"), json!(null), false, Some("http://web.example/")),
            (json!("*.example"), json!("/"), true, None),
            (json!("a@evil.example"), json!("/"), true, None),
            (json!("--help"), json!("/"), true, None),
            (json!(null), json!("/"), true, None),
        ] {
            assert_eq!(url_of(&host, &path, tls).as_deref(), url, "{host}");
        }
    }

    #[test]
    fn an_ingress_has_tls_for_the_hosts_that_it_names() {
        let ingress =
            |tls: Value| json!({"spec": {"rules": [{"host": "web.example"}], "tls": tls}});
        for (tls, has) in [
            (json!(null), false),
            (json!([]), false),
            (json!([{"hosts": ["other.example"]}]), false),
            (json!([{"hosts": ["other.example"]}, {"hosts": ["web.example"]}]), true),
            (json!([{"secretName": "all"}]), true),
        ] {
            assert_eq!(has_tls(&ingress(tls.clone())), has, "{tls}");
        }
    }

    #[test]
    fn a_route_has_tls_by_the_listener_that_takes_it_in() {
        let gateway = json!({"spec": {"listeners": [
            {"name": "web", "port": 80, "protocol": "HTTP"},
            {"name": "secure", "port": 443, "protocol": "HTTPS", "hostname": "*.example"},
        ]}});
        for (parent, host, has) in [
            (json!({}), "web.example", true),
            (json!({"sectionName": "secure"}), "web.example", true),
            (json!({"sectionName": "web"}), "web.example", false),
            (json!({"port": 80}), "web.example", false),
            (json!({}), "web.other", false),
        ] {
            assert_eq!(listens_with_tls(&gateway, &parent, &json!(host)), has, "{parent} {host}");
        }
    }
}
