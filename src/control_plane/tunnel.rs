//! Who may open a tunnel, and who may visit one.

use std::collections::BTreeMap;
use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use super::clock::now;
use super::frps::proxy_name;
use super::keys::Keys;
use super::registry::Registry;
use crate::base::secret::constant_time_eq;
use crate::frp::server::{TunnelAuthorizer, Visitor, signed_by};
use crate::frp::wire::{Login, NewProxy};

/// The purpose for which an agent's proof at the FRP server is derived.
pub(super) const TUNNEL_PROOF: &str = "tunnel";

/// Authorizes tunnels: of an agent that is registered, with its own proof, for its own proxy.
pub(super) struct AgentAuthorizer {
    pub(super) registry: Arc<Registry>,
    pub(super) keys: Arc<Keys>,
}

impl AgentAuthorizer {
    /// The agent whose proof is in the metas of a login, and what ends its session.
    pub(super) fn authorize(
        &self,
        metas: &BTreeMap<String, String>,
    ) -> Result<(String, CancellationToken), String> {
        let agent = metas.get("agent").cloned().unwrap_or_default();
        let shown = metas.get("token").map(String::as_str).unwrap_or_default();
        let proof = self.keys.derive(TUNNEL_PROOF, &agent);
        let revocation = if constant_time_eq(shown, proof.expose()) {
            self.registry.tunnel_revocation(&agent, now())
        } else {
            None
        };
        revocation
            .map(|revocation| (agent, revocation))
            .ok_or_else(|| "this agent may not hold a tunnel here".to_owned())
    }
}

/// An agent may open its own proxy only, of the type that needs a key to be visited.
pub(super) fn authorize_proxy(owner: &str, request: &NewProxy) -> Result<(), String> {
    if request.proxy_type == "stcp" && request.proxy_name == proxy_name(owner) {
        Ok(())
    } else {
        Err(format!("{owner} may open the stcp proxy {} and nothing else", proxy_name(owner)))
    }
}

impl TunnelAuthorizer for AgentAuthorizer {
    fn login(&self, login: &Login) -> Result<(String, CancellationToken), String> {
        self.authorize(&login.metas)
    }

    fn proxy(&self, owner: &str, request: &NewProxy) -> Result<(), String> {
        authorize_proxy(owner, request)
    }

    fn visitor(&self, name: &str, sign_key: &str, timestamp: i64) -> Option<Visitor> {
        // each Runner has a name and a key of its own, so that its streams end when it is revoked
        let (proxy, runner) = name.split_once('.')?;
        let agent = proxy.strip_prefix(&proxy_name(""))?;
        let revoked = self.registry.runner_revocation(agent, runner, now())?;
        let key = self.keys.stcp_key(agent, Some(runner));
        signed_by(&key, sign_key, timestamp).then(|| Visitor { proxy: proxy.into(), key, revoked })
    }
}
