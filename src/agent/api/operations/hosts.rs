//! What the cluster has for the host of an application, where the application does not say it.

use serde_json::Value;

use super::executor::Executor;
use super::requests::{
    ExecutionError, GET, KubernetesRequest, describe_refusal, failed_for, items, refusal_reason,
};
use crate::contract::application::Application;
use crate::kubernetes::application::HostDefaults;

/// Annotations of a cluster's default IngressClass.
const DEFAULT_CLASS: &str = "ingressclass.kubernetes.io/is-default-class";

/// Issuers that are taken without being named, the best first: those that pipeops installs.
const ISSUERS: &[&str] = &["letsencrypt", "pipeops-ca"];

impl Executor<'_> {
    /// What the cluster has for the application's host, where it does not say so itself.
    pub(super) async fn host_defaults(
        &mut self,
        application: &Application,
    ) -> Result<HostDefaults, ExecutionError> {
        let mut defaults = HostDefaults::default();
        let Some(host) = &application.host else { return Ok(defaults) };
        if host.gateway.is_some() {
            return Ok(defaults);
        }
        if host.class.is_none() {
            let classes = self.cluster_list("/apis/networking.k8s.io/v1/ingressclasses").await?;
            let is_default =
                |class: &&Value| class["metadata"]["annotations"][DEFAULT_CLASS] == "true";
            let names: Vec<&str> =
                classes.iter().filter_map(|c| c["metadata"]["name"].as_str()).collect();
            match (classes.iter().find(is_default), names.as_slice()) {
                // Kubernetes sets it
                (Some(_), _) => {}
                (None, [only]) => defaults.class = Some((*only).to_owned()),
                (None, []) => {
                    return failed_for(
                        "no_ingress_class",
                        "host: this cluster has no IngressClass: nothing would serve it; install \
                         an ingress controller, or name a Gateway in host.gateway",
                    );
                }
                (None, several) => {
                    return failed_for(
                        "no_ingress_class",
                        format!(
                            "host.class: none of this cluster's is the default: {}",
                            several.join(", ")
                        ),
                    );
                }
            }
        }
        if host.has_tls() && host.issuer.is_none() && host.certificate.is_none() {
            let issuers = self.cluster_list("/apis/cert-manager.io/v1/clusterissuers").await?;
            let names: Vec<&str> =
                issuers.iter().filter_map(|c| c["metadata"]["name"].as_str()).collect();
            let known = ISSUERS.iter().copied().find(|name| names.contains(name));
            let Some(issuer) = known.or(if let [only] = names[..] { Some(only) } else { None })
            else {
                return failed_for(
                    "no_issuer",
                    "host.issuer: name the ClusterIssuer that signs the certificate, name a Secret \
                     with one in host.certificate, or set host.tls to false",
                );
            };
            defaults.issuer = Some(issuer.to_owned());
        }
        Ok(defaults)
    }

    /// The cluster's own objects, with the agent's rights: a caller for some namespaces may not ask
    /// for them. Where nothing serves them there are none.
    async fn cluster_list(&mut self, path: &str) -> Result<Vec<Value>, ExecutionError> {
        let request = KubernetesRequest { as_agent: true, query: "limit=100", ..GET };
        let (status, list) = self.request(path, request).await?;
        match status {
            200 => Ok(items(list)),
            404 => Ok(Vec::new()),
            403 => failed_for(
                "rights_missing",
                format!(
                    "the agent may not read {path}: its rights are of an earlier version; run \
                     `pipeops install-server` on the server again"
                ),
            ),
            _ => failed_for(
                refusal_reason(status, &list),
                format!("{path}: {}", describe_refusal("", status, &list)),
            ),
        }
    }
}
