//! Tokens with which Runners and kubectl reach an agent, and where.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::StatusCode;
use serde::Serialize;
use serde_json::{Value, json};

use super::agent_client::pin;
use super::clock::rfc3339;
use super::error::HttpError;
use super::registry::{ClusterTarget, ClusterView, Principal};
use super::scope::{Scope, TokenRequest, restrict};
use super::state::ControlPlane;
use crate::base::secret::Secret;
use crate::base::text::printable;
use crate::contract::token::{CALLER_TOKEN_TYPE, TOKEN_LIFETIME};

/// Code for a cluster whose agent takes no token of a tenant.
pub(super) const TENANTS_UNSUPPORTED: &str = "tenants_unsupported";

/// For whom a token is signed, and what it allows at which agent.
pub(super) struct CallerTokenRequest<'a> {
    pub(super) principal: &'a Principal,
    pub(super) target: &'a ClusterTarget,
    /// The token gets no higher role than the target's highest.
    pub(super) scope: Scope,
    /// Seconds from `now`.
    pub(super) ttl: i64,
    /// Seconds since 1970.
    pub(super) now: i64,
    /// For this operation alone: see `contract::token::only_operation`.
    pub(super) operation: Option<String>,
}

impl<'a> CallerTokenRequest<'a> {
    /// All that the principal may do, for as long as a token may live.
    ///
    /// # Errors
    /// As [`restrict`].
    pub(super) fn with_own_rights(
        principal: &'a Principal,
        target: &'a ClusterTarget,
        now: i64,
    ) -> Result<CallerTokenRequest<'a>, HttpError> {
        let scope = restrict(principal, &TokenRequest::default())?;
        let (ttl, operation) = (TOKEN_LIFETIME, None);
        Ok(CallerTokenRequest { principal, target, scope, ttl, now, operation })
    }
}

/// An agent of a version before tenants does not read the claim, and would let the token into all
/// namespaces.
///
/// # Errors
/// 409 with the next step.
pub(super) fn check_tenants(target: &ClusterTarget) -> Result<(), HttpError> {
    if target.tenants {
        return Ok(());
    }
    Err(HttpError::new(
        409,
        TENANTS_UNSUPPORTED,
        "the agent of this cluster does not keep tenants apart",
        Some(
            "upgrade it: `pipeops install-server` of this version on its server; tenants need \
             Kubernetes 1.30",
        ),
    ))
}

/// What a 401 of an agent means where the token was of a tenant: an agent of a version before
/// tenants refuses each of them ([`super::keys::Keys::sign`]), also one that went back to it since
/// it registered.
pub(super) fn tenant_refused(said: &str) -> HttpError {
    HttpError::new(
        409,
        TENANTS_UNSUPPORTED,
        format!("the agent of this cluster refuses tokens of tenants: {said}"),
        Some(
            "upgrade it: `pipeops install-server` of this version on its server; where it is of \
             this version, compare the clocks of the node and of the control plane",
        ),
    )
}

/// An answer of an agent's own API to a token of `principal`.
///
/// # Errors
/// As [`tenant_refused`].
pub(super) fn check_answer(
    principal: &Principal,
    (status, value): (StatusCode, Value),
) -> Result<(StatusCode, Value), HttpError> {
    if status == StatusCode::UNAUTHORIZED && principal.tenant().is_some() {
        return Err(tenant_refused(&reason_of(&value)));
    }
    Ok((status, value))
}

/// Why an agent refuses, as it may stand in a message.
pub(super) fn reason_of(refusal: &Value) -> String {
    // below /k8s the plain message is among the causes
    let said = [&refusal["details"]["causes"][0]["message"], &refusal["message"]]
        .into_iter()
        .find_map(Value::as_str)
        .unwrap_or("no reason given");
    printable(said).chars().take(200).collect()
}

/// A token for an agent, and where to go with it.
#[derive(Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(super) struct RunnerToken {
    /// A JWT.
    #[serde(serialize_with = "Secret::serialize_exposed")]
    #[cfg_attr(test, schemars(with = "String"))]
    token: Secret,
    /// RFC 3339.
    expires_at: String,
    endpoints: [Endpoint; 2],
}

/// A way to an agent. Behind each of them stands the key that `agent_pin` names.
#[derive(Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(tag = "type", rename_all = "lowercase")]
enum Endpoint {
    /// HTTPS, by way of the control plane.
    Gateway { address: String, server_name: String, agent_pin: String },
    /// As a visitor of the FRP server.
    Stcp {
        address: String,
        server_name: String,
        agent_pin: String,
        proxy: String,
        #[serde(serialize_with = "Secret::serialize_exposed")]
        #[cfg_attr(test, schemars(with = "String"))]
        secret_key: Secret,
        #[serde(skip_serializing_if = "Option::is_none")]
        server_pin: Option<String>,
        #[serde(skip_serializing_if = "Option::is_none")]
        server_ca: Option<String>,
    },
}

impl ControlPlane {
    /// A token for one agent, and when it ends.
    ///
    /// # Errors
    /// Of a tenant, for an agent that would not see to it.
    pub(super) fn caller_token(
        &self,
        request: &CallerTokenRequest<'_>,
    ) -> Result<(Secret, i64), HttpError> {
        let (target, scope) = (request.target, &request.scope);
        let subject = request.principal.subject();
        let expires = request.now + request.ttl;
        let id = crate::frp::wire::fresh_run_id();
        let role = scope.role.min(target.max_role);
        let mut claims = json!({
            "iss": self.issuer(), "aud": target.agent, "sub": subject, "role": role.name(),
            "iat": request.now, "exp": expires, "jti": id,
        });
        if let Some(namespaces) = &scope.namespaces {
            claims["namespaces"] = json!(namespaces);
        }
        if let Some(tenant) = &scope.tenant {
            check_tenants(target)?;
            claims["tenant"] = json!(tenant);
        }
        if let Some(operation) = &request.operation {
            claims["operation"] = operation.as_str().into();
        }
        Ok((self.keys().sign(CALLER_TOKEN_TYPE, &claims), expires))
    }

    /// A Runner's token, with the endpoints that accept it. `visitor` comes through the tunnel with
    /// it: not always who the token is of.
    ///
    /// # Errors
    /// As [`ControlPlane::caller_token`].
    pub(super) fn runner_token(
        &self,
        request: &CallerTokenRequest<'_>,
        visitor: &Principal,
    ) -> Result<RunnerToken, HttpError> {
        let target = request.target;
        let (token, expires) = self.caller_token(request)?;
        let agent_pin = pin(&target.public_key).map(|p| p.to_string()).unwrap_or_default();
        let server = self.tunnel_endpoint();
        let runner = if let Principal::AccessToken(access) = visitor {
            Some(access.id.as_str())
        } else {
            None
        };
        let (proxy, secret_key) = self.visitor_credentials(&target.agent, runner);
        let gateway = Endpoint::Gateway {
            address: format!("{}/clusters/{}", self.url(), target.cluster),
            server_name: self.inner.names[0].clone(),
            agent_pin: agent_pin.clone(),
        };
        let tunnel = Endpoint::Stcp {
            address: format!("{}:{}", server.server, server.port),
            server_name: server.server,
            agent_pin,
            proxy,
            secret_key,
            server_pin: server.tls.pin,
            server_ca: server.tls.ca_pem,
        };
        Ok(RunnerToken { token, expires_at: rfc3339(expires), endpoints: [gateway, tunnel] })
    }

    /// A kubeconfig for kubectl.
    pub(super) fn kubeconfig(&self, cluster: &ClusterView, token: &Secret) -> String {
        let name = &cluster.id;
        let mut server = json!({"server": format!("{}/clusters/{name}/k8s", self.url())});
        if let Some(ca) = self.client_ca() {
            server["certificate-authority-data"] = STANDARD.encode(ca).into();
        }
        // JSON is YAML, and needs no quoting of our own
        let file = json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": name, "cluster": server}],
            "users": [{"name": name, "user": {"token": token.expose()}}],
            "contexts": [{"name": name, "context": {"cluster": name, "user": name}}],
            "current-context": name,
        });
        serde_json::to_string_pretty(&file).unwrap_or_default() + "\n"
    }
}
