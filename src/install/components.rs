//! The catalogue of controllers: what each brings, what it needs, and how one knows that it works.
//!
//! One reviewed file each under `deployments/components/`, embedded; versions are pinned there and
//! nowhere else.

use serde::Serialize;

use crate::install::plan::WaitCondition;

/// Memory of a k3s server with SQLite, coredns, metrics-server and local-path, MiB (k3s
/// documentation, resource profiling).
pub const SERVER_MEMORY_MIB: u64 = 770;

/// A controller that `--components` can name.
#[derive(Debug, Serialize)]
pub struct Component {
    pub name: &'static str,
    pub summary: &'static str,
    /// Memory that its pods ask for or are known to use, MiB; 0 where k3s' own sum has it already.
    pub memory_mib: u64,
    /// Chart and version, empty where k3s bundles it.
    pub source: &'static str,
    /// Whether it comes where nothing is chosen.
    pub by_default: bool,
    /// Objects applied first.
    #[serde(skip)]
    pub objects: &'static str,
    /// Proof that the controller itself works.
    #[serde(skip)]
    pub ready: fn() -> Vec<WaitCondition>,
    /// Objects that need the controller to be working.
    #[serde(skip)]
    pub objects_when_ready: fn(acme_email: Option<&str>) -> String,
}

/// Every component, in the order of installation. The order is a dependency order: certificates
/// before what may ask for them.
pub const CATALOGUE: &[Component] = &[
    Component {
        name: "metrics",
        summary: "metrics-server, as bundled with k3s",
        memory_mib: 0,
        source: "",
        by_default: true,
        objects: "",
        ready: || {
            vec![
                WaitCondition::Deployment {
                    namespace: "kube-system".into(),
                    name: "metrics-server".into(),
                },
                WaitCondition::ApiService { name: "v1beta1.metrics.k8s.io".into() },
            ]
        },
        objects_when_ready: |_| String::new(),
    },
    Component {
        name: "storage",
        summary: "local-path volumes, as bundled with k3s (directories of this node; not a CSI \
                  driver, sizes are not enforced)",
        memory_mib: 0,
        source: "",
        by_default: true,
        objects: "",
        ready: || {
            vec![
                WaitCondition::Deployment {
                    namespace: "kube-system".into(),
                    name: "local-path-provisioner".into(),
                },
                WaitCondition::StorageClass { name: "local-path".into() },
            ]
        },
        objects_when_ready: |_| String::new(),
    },
    Component {
        name: "cert-manager",
        summary: "cert-manager with the issuers pipeops-ca and, with --acme-email, letsencrypt and \
                  letsencrypt-staging",
        memory_mib: 150,
        source: "oci://quay.io/jetstack/charts/cert-manager v1.21.1",
        by_default: true,
        objects: include_str!("../../deployments/components/cert-manager.yaml"),
        ready: || {
            vec![
                WaitCondition::Chart {
                    namespace: "kube-system".into(),
                    name: "cert-manager".into(),
                },
                WaitCondition::Deployment {
                    namespace: "cert-manager".into(),
                    name: "cert-manager".into(),
                },
                WaitCondition::Deployment {
                    namespace: "cert-manager".into(),
                    name: "cert-manager-webhook".into(),
                },
                WaitCondition::Accepts {
                    yaml: include_str!("../../deployments/components/cert-manager-probe.yaml")
                        .into(),
                },
            ]
        },
        objects_when_ready: |email| {
            let mut yaml =
                include_str!("../../deployments/components/cert-manager-issuers.yaml").to_owned();
            if let Some(email) = email {
                yaml.push_str(
                    &include_str!("../../deployments/components/cert-manager-acme.yaml")
                        .replace("ACME_EMAIL", email),
                );
            }
            yaml
        },
    },
    Component {
        name: "ingress",
        summary: "F5 NGINX ingress controller on ports 80 and 443, class nginx",
        memory_mib: 128,
        source: "oci://ghcr.io/nginx/charts/nginx-ingress 2.6.4",
        by_default: true,
        objects: include_str!("../../deployments/components/ingress.yaml"),
        ready: || {
            vec![
                WaitCondition::Chart {
                    namespace: "kube-system".into(),
                    name: "nginx-ingress".into(),
                },
                WaitCondition::Deployment {
                    namespace: "nginx-ingress".into(),
                    name: "nginx-ingress-controller".into(),
                },
                WaitCondition::Http { port: 80 },
            ]
        },
        objects_when_ready: |_| String::new(),
    },
    Component {
        name: "traefik",
        summary: "traefik on ports 80 and 443, class traefik, as bundled with k3s; instead of \
                  ingress",
        memory_mib: 64,
        source: "",
        by_default: false,
        objects: "",
        ready: || {
            vec![
                WaitCondition::Chart { namespace: "kube-system".into(), name: "traefik".into() },
                WaitCondition::Deployment {
                    namespace: "kube-system".into(),
                    name: "traefik".into(),
                },
                WaitCondition::Http { port: 80 },
            ]
        },
        objects_when_ready: |_| String::new(),
    },
];

/// The IngressClass of the controller that answers on ports 80 and 443, where one of `components`
/// does.
pub fn ingress_class(components: &[&Component]) -> Option<&'static str> {
    let has = |name: &str| components.iter().any(|c| c.name == name);
    [("ingress", "nginx"), ("traefik", "traefik")]
        .into_iter()
        .find(|(name, _)| has(name))
        .map(|(_, class)| class)
}

/// Names that `--components` accepts.
pub fn names() -> Vec<&'static str> {
    CATALOGUE.iter().map(|c| c.name).collect()
}

/// The chosen components in catalogue order. Nothing chosen means those that come by default, or,
/// offline, none.
pub fn selected(names: Option<&[String]>, offline: bool) -> Vec<&'static Component> {
    CATALOGUE
        .iter()
        .filter(|c| match names {
            Some(list) => list.iter().any(|n| n == c.name),
            None => c.by_default && !offline,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn documents() -> Vec<serde_json::Value> {
        CATALOGUE
            .iter()
            .flat_map(|c| {
                crate::install::plan::documents(&format!(
                    "{}\n---\n{}",
                    c.objects,
                    (c.objects_when_ready)(Some("ops@example.com"))
                ))
                .unwrap()
            })
            .collect()
    }

    #[test]
    fn charts_are_pinned_and_never_uninstall_on_failure() {
        let charts: Vec<_> = documents().into_iter().filter(|d| d["kind"] == "HelmChart").collect();
        assert_eq!(charts.len(), 2);
        for chart in charts {
            let version = chart["spec"]["version"].as_str().unwrap();
            assert!(
                version.trim_start_matches('v').split('.').all(|p| p.parse::<u32>().is_ok()),
                "{version}"
            );
            assert_eq!(
                chart["spec"]["failurePolicy"], "abort",
                "the default of helm-controller is to uninstall"
            );
            let name = chart["spec"]["chart"].as_str().unwrap();
            assert!(
                CATALOGUE.iter().any(|c| c.source == format!("{name} {version}")),
                "{name} {version} stands in the table"
            );
        }
    }

    #[test]
    fn no_password_no_latest_and_no_retired_controller() {
        let text = serde_json::to_string(&documents()).unwrap().to_lowercase();
        for word in [
            "password",
            "latest",
            "kubernetes.github.io/ingress-nginx",
            "registry.k8s.io/ingress-nginx",
        ] {
            assert!(!text.contains(word), "{word}");
        }
    }

    #[test]
    fn offline_brings_nothing_that_needs_a_chart_server() {
        assert!(selected(None, true).is_empty());
        assert_eq!(
            selected(None, false).iter().map(|c| c.name).collect::<Vec<_>>(),
            ["metrics", "storage", "cert-manager", "ingress"]
        );
        assert_eq!(ingress_class(&selected(None, false)), Some("nginx"));
        assert_eq!(ingress_class(&selected(Some(&["traefik".to_owned()]), true)), Some("traefik"));
        assert_eq!(ingress_class(&selected(Some(&["metrics".to_owned()]), true)), None);
        assert_eq!(
            selected(Some(&["ingress".to_owned(), "metrics".to_owned()]), false)
                .iter()
                .map(|c| c.name)
                .collect::<Vec<_>>(),
            ["metrics", "ingress"]
        );
    }
}
