//! How an application is reached: its Service, and the way in from outside of the cluster.

use serde_json::{Value, json};

use super::{ConfigSets, metadata, object_of};
use crate::contract::application::{Application, ConfigSource, Host, Port};

/// What the cluster has for a host: found when it is deployed.
#[derive(Clone, Debug, Default)]
pub struct HostDefaults {
    /// IngressClass; none where Kubernetes' own default is to be taken.
    pub class: Option<String>,
    /// ClusterIssuer of cert-manager.
    pub issuer: Option<String>,
}

/// What a port is called by container and Service: old and new pods may listen on different ones.
pub(super) fn port_name(port: &Port) -> String {
    let protocol = port.protocol.name().to_ascii_lowercase();
    port.name.clone().unwrap_or_else(|| {
        format!("{protocol}-{}", port.service_port.unwrap_or(port.container_port))
    })
}

pub(super) fn service(application: &Application) -> Option<Value> {
    if application.ports.is_empty() {
        return None;
    }
    let ports = application.ports.iter().map(|port| {
        json!({
            "name": port_name(port), "protocol": port.protocol.name(),
            "port": port.service_port.unwrap_or(port.container_port),
            "targetPort": port_name(port)
        })
    });
    Some(json!({
        "apiVersion": "v1", "kind": "Service", "metadata": metadata(application),
        "spec": {
            "type": "ClusterIP", "selector": {"app": application.name},
            "ports": ports.collect::<Vec<Value>>()
        }
    }))
}

/// The Service's port that a host leads to.
fn service_port(application: &Application, host: &Host) -> u16 {
    let wanted = |port: &&Port| host.port.is_none_or(|number| number == port.container_port);
    let port = application.ports.iter().find(wanted);
    port.map_or(0, |port| port.service_port.unwrap_or(port.container_port))
}

pub(super) fn way_in(
    application: &Application,
    sets: &ConfigSets,
    defaults: &HostDefaults,
) -> Option<Value> {
    let host = application.host.as_ref()?;
    Some(match host.gateway.as_deref().and_then(|gateway| gateway.split_once('/')) {
        Some(gateway) => http_route(application, host, gateway),
        None => ingress(application, host, sets, defaults),
    })
}

fn ingress(
    application: &Application,
    host: &Host,
    sets: &ConfigSets,
    defaults: &HostDefaults,
) -> Value {
    let mut metadata = metadata(application);
    let mut spec = json!({"rules": [{"host": host.name, "http": {"paths": [{
        "path": host.path.as_deref().unwrap_or("/"), "pathType": "Prefix",
        "backend": {"service": {
            "name": application.name, "port": {"number": service_port(application, host)}
        }}
    }]}}]});
    if let Some(class) = host.class.as_ref().or(defaults.class.as_ref()) {
        spec["ingressClassName"] = class.as_str().into();
    }
    if host.has_tls() {
        let secret = match &host.certificate {
            Some(name) => object_of(sets, &ConfigSource::Secret(name.clone()), "tls.crt"),
            None => format!("{}-tls", application.name),
        };
        let issuer = host.issuer.as_ref().or(defaults.issuer.as_ref());
        // cert-manager's ingress-shim (cert-manager.io/docs/usage/ingress)
        if let (None, Some(issuer)) = (&host.certificate, issuer) {
            metadata["annotations"] = json!({
                "cert-manager.io/cluster-issuer": issuer,
                // a controller that gives a host to one Ingress alone serves no second one for the
                // challenge (cert-manager.io/docs/usage/ingress)
                "acme.cert-manager.io/http01-edit-in-place": "true"
            });
        }
        spec["tls"] = json!([{"hosts": [host.name], "secretName": secret}]);
    }
    json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "Ingress", "metadata": metadata, "spec": spec
    })
}

fn http_route(application: &Application, host: &Host, (namespace, name): (&str, &str)) -> Value {
    json!({
        "apiVersion": "gateway.networking.k8s.io/v1", "kind": "HTTPRoute",
        "metadata": metadata(application),
        "spec": {
            "parentRefs": [{"namespace": namespace, "name": name}],
            "hostnames": [host.name],
            "rules": [{
                "matches": [{"path": {
                    "type": "PathPrefix", "value": host.path.as_deref().unwrap_or("/")
                }}],
                "backendRefs": [{
                    "name": application.name, "port": service_port(application, host)
                }]
            }]
        }
    })
}
