//! Tenants: made, changed and deleted with the agent's own rights, which the cluster's admission
//! policies hold to namespaces of tenants.

use http::Method;
use serde_json::{Value, json};
use tokio::sync::MutexGuard;
use tokio::time::{Instant, sleep_until};

use super::executor::{Executor, FIELD_MANAGER};
use super::requests::{
    ExecutionError, KubernetesRequest, REVIEWS, describe_refusal, failed, failed_for, items,
    refusal_reason, refused,
};
use crate::agent::api::tenant_scope::{self, NAMESPACES};
use crate::contract::application::Application;
use crate::contract::operation::Reference;
use crate::contract::tenant::{DeleteTenant, SetTenant, TENANT_LABEL, TenantSpec, covers};
use crate::kubernetes::client::path_of;
use crate::kubernetes::tenant::{
    BINDINGS, POLICIES, check_set, host_left, host_taken, hosts_of, is_supported, namespace_object,
    objects, tenant_of,
};

/// The kinds that may have host names of a tenant, by group and name.
const ROUTES: &[(&str, &str)] = &[
    ("/apis/networking.k8s.io/v1", "ingresses"),
    ("/apis/gateway.networking.k8s.io/v1", "httproutes"),
];

const AS_AGENT: KubernetesRequest<'_> = KubernetesRequest {
    method: Method::GET,
    query: "",
    body: None,
    as_agent: true,
    recorded: true,
};

impl<'a> Executor<'a> {
    /// Waits until no other operation takes host names, or deletes a tenant.
    async fn turn(
        &self,
        end: Instant,
        timeout_s: u64,
    ) -> Result<MutexGuard<'a, ()>, ExecutionError> {
        let api = self.api;
        tokio::select! {
            biased;
            turn = api.operations().tenants.lock() => Ok(turn),
            () = self.cancel.cancelled() => Err(ExecutionError::Cancelled),
            () = self.abort.cancelled() => Err(ExecutionError::Interrupted),
            () = sleep_until(end) => failed_for(
                "timed_out",
                format!("other tenants were being changed for {timeout_s} s"),
            ),
        }
    }
}

impl Executor<'_> {
    pub(super) async fn tenant(&mut self, spec: &TenantSpec) -> Result<(), ExecutionError> {
        self.check_cluster_for_tenants().await?;
        self.supersede_changes_of(&spec.title()).await?;
        match spec {
            TenantSpec::Set(set) => self.set_tenant(set).await,
            TenantSpec::Delete(delete) => self.delete_tenant(delete).await,
        }
    }

    /// Whether this cluster keeps tenants apart, before anything is changed.
    async fn check_cluster_for_tenants(&mut self) -> Result<(), ExecutionError> {
        let (status, version) = self.request_until_answered("/version", AS_AGENT).await?;
        let version = version["gitVersion"].as_str().unwrap_or_default();
        if status != 200 || version.is_empty() {
            return failed("the Kubernetes API does not say which version it is");
        }
        if !is_supported(version) {
            return failed_for(
                "tenants_need_1_30",
                format!(
                    "this cluster runs {version}: tenants need Kubernetes 1.30 or newer; run \
                     `pipeops install-server --k3s-version` with one on the server"
                ),
            );
        }
        let attributes = json!({"verb": "create", "resource": "namespaces"});
        let review = json!({"apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectAccessReview", "spec": {"resourceAttributes": attributes}});
        let request = KubernetesRequest {
            method: Method::POST,
            body: Some(("application/json", &review)),
            ..AS_AGENT
        };
        let path = format!("{REVIEWS}selfsubjectaccessreviews");
        let (_, answer) = self.request_until_answered(&path, request).await?;
        if answer["status"]["allowed"] != true {
            return rights_missing("the agent may not `create` `namespaces`");
        }
        // without them the rights would reach further than tenants
        for name in POLICIES {
            let path = format!("{BINDINGS}/{name}");
            match self.request_until_answered(&path, AS_AGENT).await? {
                (200, _) => {}
                (403 | 404, _) => {
                    return rights_missing(&format!("the admission policy {name} is not there"));
                }
                (status, answer) => {
                    let why = describe_refusal("", status, &answer);
                    return failed_for(refusal_reason(status, &answer), format!("{name}: {why}"));
                }
            }
        }
        self.check_policies_act().await
    }

    /// The names of bindings do not say what they bind: the policies refuse what they must refuse,
    /// or nothing is made that relies on them. Nothing is written by it.
    async fn check_policies_act(&mut self) -> Result<(), ExecutionError> {
        if self.is_over() {
            return Ok(());
        }
        let unlabelled = json!({"apiVersion": "v1", "kind": "Namespace",
            "metadata": {"name": "stand-in-of-no-tenant"}});
        let request = KubernetesRequest {
            method: Method::POST,
            query: "dryRun=All",
            body: Some(("application/json", &unlabelled)),
            ..AS_AGENT
        };
        let (status, answer) = self.request_until_answered(NAMESPACES, request).await?;
        let said = answer["message"].as_str().unwrap_or_default();
        if status >= 400 && said.contains(POLICIES[0]) {
            return Ok(());
        }
        rights_missing(&format!("the admission policy {} refuses nothing", POLICIES[0]))
    }

    async fn set_tenant(&mut self, set: &SetTenant) -> Result<(), ExecutionError> {
        let end = self.end(set.timeout_s);
        // two tenants that ask for one host name at a time
        let (turn, labelled) = loop {
            let turn = self.turn(end, set.timeout_s).await?;
            let labelled = self.tenant_namespaces(TENANT_LABEL).await?;
            if let Err((reason, why)) = check_set(set, &labelled) {
                return failed_for(reason, why);
            }
            let going = labelled.iter().filter(|n| !n["metadata"]["deletionTimestamp"].is_null());
            let going = going.filter_map(|n| n["metadata"]["name"].as_str());
            let going = going.filter(|name| set.namespaces.iter().any(|wanted| wanted == name));
            let going: Vec<(Reference, String)> = going.map(namespace_at).collect();
            if going.is_empty() {
                break (turn, labelled);
            }
            // the others do not wait for them
            drop(turn);
            self.wait_gone(going, end, set.timeout_s).await?;
        };
        let own: Vec<&Value> =
            labelled.iter().filter(|n| tenant_of(n) == Some(&*set.tenant)).collect();
        let found = |name: &str| own.iter().find(|n| n["metadata"]["name"] == name);
        self.check_hosts_free(set, &own).await?;
        for name in set.namespaces.iter().filter(|name| found(name).is_none()) {
            self.check_namespace_is_free(name).await?;
        }
        for namespace in set.namespaces.iter().filter(|name| found(name).is_some()) {
            self.check_hosts_left(namespace, &set.hosts).await?;
        }
        // the host names are its own from here on
        for namespace in &set.namespaces {
            self.apply_as_agent(&namespace_object(set, namespace)).await?;
        }
        // what used one between the look and the change is there for good
        for namespace in set.namespaces.iter().filter(|name| found(name).is_some()) {
            self.check_hosts_left(namespace, &set.hosts).await?;
        }
        drop(turn);
        for namespace in &set.namespaces {
            let Ok(objects) = objects(set, namespace) else {
                return failed("spec.egress: that is no private range");
            };
            for object in &objects {
                self.apply_as_agent(object).await?;
            }
        }
        for namespace in &set.namespaces {
            self.wait_for_default_account(namespace, end, set.timeout_s).await?;
        }
        let removed: Vec<Value> = own
            .into_iter()
            .filter(|n| set.remove_namespaces.iter().any(|name| n["metadata"]["name"] == **name))
            .cloned()
            .collect();
        let going = self.delete_namespaces(&removed).await?;
        self.wait_gone(going, end, set.timeout_s).await?;
        let hosts = if set.hosts.is_empty() { "none".into() } else { set.hosts.join(", ") };
        self.note(&format!(
            "tenant {}: namespaces {}; Pod Security {}; hosts {hosts}",
            set.tenant,
            set.namespaces.join(", "),
            set.pod_security.name(),
        ));
        Ok(())
    }

    async fn delete_tenant(&mut self, delete: &DeleteTenant) -> Result<(), ExecutionError> {
        let selector = format!("{TENANT_LABEL}={}", delete.tenant);
        let end = self.end(delete.timeout_s);
        let turn = self.turn(end, delete.timeout_s).await?;
        let mut own = self.tenant_namespaces(&selector).await?;
        if self.before.left.is_some() {
            // what was made while the agent was away is not what was to be deleted
            let asked = self.progress.created_at();
            let made = |n: &Value| n["metadata"]["creationTimestamp"].as_str().map(str::to_owned);
            own.retain(|namespace| made(namespace).unwrap_or_default() <= asked);
        }
        if own.is_empty() {
            self.progress.touched(&format!("Tenant {}", delete.tenant), "absent");
            return Ok(());
        }
        let going = self.delete_namespaces(&own).await?;
        drop(turn);
        self.wait_gone(going, end, delete.timeout_s).await
    }

    /// The namespaces that a selector of labels names: all of them, in one answer.
    async fn tenant_namespaces(&mut self, selector: &str) -> Result<Vec<Value>, ExecutionError> {
        let query = format!("labelSelector={}", selector.replace('=', "%3D"));
        let request = KubernetesRequest { query: &query, ..AS_AGENT };
        match self.request_until_answered(NAMESPACES, request).await? {
            (200, list) => Ok(items(list)),
            (status, answer) => {
                let why = describe_refusal("", status, &answer);
                failed_for(refusal_reason(status, &answer), format!("the namespaces: {why}"))
            }
        }
    }

    /// A namespace that is there and of no tenant becomes none of one: what runs in it was not made
    /// for it.
    async fn check_namespace_is_free(&mut self, name: &str) -> Result<(), ExecutionError> {
        let (reference, path) = namespace_at(name);
        match self.request_until_answered(&path, AS_AGENT).await? {
            (404, _) => Ok(()),
            (200, _) => failed_for(
                "namespace_taken",
                format!("namespace {name} is there and is of no tenant: choose another name"),
            ),
            (status, answer) => refused(&reference, status, &answer),
        }
    }

    /// A host name that is taken away and still used would be served all the same.
    async fn check_hosts_left(
        &mut self,
        namespace: &str,
        hosts: &[String],
    ) -> Result<(), ExecutionError> {
        for (group, kind) in ROUTES {
            let path = format!("{group}/namespaces/{namespace}/{kind}");
            for route in &self.routes(&path, kind).await? {
                if let Some(host) = host_left(route, hosts) {
                    let name = route["metadata"]["name"].as_str().unwrap_or_default();
                    return failed_for(
                        "in_use",
                        format!(
                            "host {host}: {namespace}/{name} of the {kind} uses it; delete that \
                             first, or leave the host to the tenant"
                        ),
                    );
                }
            }
        }
        Ok(())
    }

    /// Those of a kind; none where nothing serves it.
    async fn routes(&mut self, path: &str, kind: &str) -> Result<Vec<Value>, ExecutionError> {
        match self.request_until_answered(path, AS_AGENT).await? {
            (200, list) => Ok(items(list)),
            (404, _) => Ok(Vec::new()),
            (403, _) => rights_missing(&format!("the agent may not `list` `{kind}`")),
            (status, answer) => {
                let why = describe_refusal("", status, &answer);
                failed_for(refusal_reason(status, &answer), format!("{kind}: {why}"))
            }
        }
    }

    /// A host name that a route outside of the tenant has is not given to the tenant: whichever
    /// route is the older one would get the requests. What the tenant has had before stays its own.
    async fn check_hosts_free(
        &mut self,
        set: &SetTenant,
        own: &[&Value],
    ) -> Result<(), ExecutionError> {
        let had: Vec<&str> = own.iter().flat_map(|namespace| hosts_of(namespace)).collect();
        let asked = set.hosts.iter().map(String::as_str);
        let new: Vec<&str> = asked.filter(|host| !had.contains(host)).collect();
        if new.is_empty() {
            return Ok(());
        }
        for (group, kind) in ROUTES {
            for route in &self.routes(&format!("{group}/{kind}"), kind).await? {
                let at = &route["metadata"];
                if own.iter().any(|namespace| namespace["metadata"]["name"] == at["namespace"]) {
                    continue;
                }
                if let Some((host, used)) = host_taken(route, &new) {
                    let text = |field: &str| at[field].as_str().unwrap_or_default();
                    let (namespace, name) = (text("namespace"), text("name"));
                    return failed_for(
                        "host_taken",
                        format!("host {host}: {namespace}/{name} of the {kind} uses {used}"),
                    );
                }
            }
        }
        Ok(())
    }

    /// Server-side apply with the agent's own rights. A field of another manager stays.
    async fn apply_as_agent(&mut self, object: &Value) -> Result<(), ExecutionError> {
        let (Ok(reference), Ok(path)) = (Reference::from_object(object), path_of(object)) else {
            return failed("an object of the tenant has no name");
        };
        let query = format!("fieldManager={FIELD_MANAGER}&force=false");
        let request = KubernetesRequest {
            method: Method::PATCH,
            query: &query,
            body: Some(("application/apply-patch+yaml", object)),
            ..AS_AGENT
        };
        let (status, answer) = self.request_until_answered(&path, request).await?;
        let title = reference.title();
        match status {
            200 => self.progress.touched(&title, "applied"),
            201 => self.progress.touched(&title, "created"),
            403 if refusal_reason(status, &answer) == "forbidden" => {
                let why = describe_refusal(&reference.kind, status, &answer);
                return rights_missing(&format!("{title}: {why}"));
            }
            _ => return refused(&reference, status, &answer),
        }
        Ok(())
    }

    /// Kubernetes makes it a moment after the namespace, and takes no pod before.
    async fn wait_for_default_account(
        &mut self,
        namespace: &str,
        end: Instant,
        timeout_s: u64,
    ) -> Result<(), ExecutionError> {
        let path = format!("/api/v1/namespaces/{namespace}/serviceaccounts/default");
        let mut recorded = true;
        loop {
            let request = KubernetesRequest { recorded, ..AS_AGENT };
            if let (200, _) = self.request_until_answered(&path, request).await? {
                return Ok(());
            }
            recorded = false;
            if Instant::now() > end {
                return failed_for(
                    "timed_out",
                    format!("{namespace} has no ServiceAccount default after {timeout_s} s"),
                );
            }
            self.pause().await?;
        }
    }

    /// Deletes these namespaces, none that has such a name since; gives those that are going.
    async fn delete_namespaces(
        &mut self,
        namespaces: &[Value],
    ) -> Result<Vec<(Reference, String)>, ExecutionError> {
        let mut going = Vec::new();
        for namespace in namespaces {
            let name = namespace["metadata"]["name"].as_str().unwrap_or_default();
            let (reference, path) = namespace_at(name);
            let body = json!({"preconditions": {"uid": namespace["metadata"]["uid"]}});
            let request = KubernetesRequest {
                method: Method::DELETE,
                body: Some(("application/json", &body)),
                ..AS_AGENT
            };
            let (status, answer) = self.request_until_answered(&path, request).await?;
            match status {
                200 | 202 => {
                    self.progress.touched(&reference.title(), "deleted");
                    going.push((reference, path));
                }
                404 => self.progress.touched(&reference.title(), "absent"),
                403 if refusal_reason(status, &answer) == "forbidden" => {
                    return rights_missing("the agent may not `delete` `namespaces`");
                }
                _ => return refused(&reference, status, &answer),
            }
        }
        Ok(going)
    }

    /// Whether the host of an application is one of its tenant's, where the caller is limited to a
    /// tenant. The cluster's admission policy holds whoever writes an Ingress himself to the same.
    pub(super) async fn check_host_of_tenant(
        &self,
        application: &Application,
    ) -> Result<(), ExecutionError> {
        let (Some(tenant), Some(host)) = (&self.caller.tenant, &application.host) else {
            return Ok(());
        };
        let found = tenant_scope::namespace(&self.upstream, &application.namespace).await;
        let Ok(found) = found else { return failed("the Kubernetes API does not answer") };
        let found = found.unwrap_or_default();
        let hosts = hosts_of(&found);
        if hosts.iter().any(|own| covers(own, &host.name)) {
            return Ok(());
        }
        let own = if hosts.is_empty() { "none".to_owned() } else { hosts.join(", ") };
        failed_for(
            "host_not_allowed",
            format!("host.name: {} is no host of the tenant {tenant}: {own}", host.name),
        )
    }
}

fn namespace_at(name: &str) -> (Reference, String) {
    let reference = Reference {
        api_version: "v1".into(),
        kind: "Namespace".into(),
        name: name.into(),
        namespace: None,
    };
    (reference, format!("/api/v1/namespaces/{name}"))
}

fn rights_missing<T>(what: &str) -> Result<T, ExecutionError> {
    failed_for(
        "rights_missing",
        format!("{what}: run `pipeops install-server` of this version on the server"),
    )
}
