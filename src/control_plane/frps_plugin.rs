//! The auth plugin of an external frps (frp `doc/server_plugin.md`), and its configuration.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;

use super::error::HttpError;
use super::frps::Frps;
use super::state::ControlPlane;
use super::tunnel::authorize_proxy;
use crate::base::secret::{Secret, constant_time_eq};
use crate::frp::wire::NewProxy;

/// The parts of a plugin call that matter here. On Login the metas are in the content, later in its
/// user.
#[derive(Default, Deserialize)]
#[serde(default)]
pub(super) struct PluginContent {
    metas: Option<BTreeMap<String, String>>,
    user: PluginUser,
    proxy_name: String,
    proxy_type: String,
}

/// On Login `user` is a name, later an object.
#[derive(Deserialize)]
#[serde(untagged)]
enum PluginUser {
    WithMetas {
        #[serde(default)]
        metas: Option<BTreeMap<String, String>>,
    },
    Other(#[expect(dead_code, reason = "its shape is all that counts")] Value),
}

impl Default for PluginUser {
    fn default() -> PluginUser {
        PluginUser::Other(Value::Null)
    }
}

/// A call of the plugin.
#[derive(Deserialize)]
pub(super) struct PluginRequest {
    #[serde(default)]
    pub(super) content: PluginContent,
}

impl ControlPlane {
    /// Whether this is the secret in the path that an external frps calls.
    pub(super) fn is_frps(&self, secret: &str) -> bool {
        matches!(self.inner.frps, Frps::External(_))
            && constant_time_eq(secret, self.frp_secret().expose())
    }

    /// Whether frps may let a client in, or why not.
    pub(super) fn plugin(&self, op: &str, content: PluginContent) -> Result<(), String> {
        // a proxy that is closed needs no permission
        if op == "CloseProxy" {
            return Ok(());
        }
        let metas = match content.user {
            PluginUser::WithMetas { metas: Some(metas) } => metas,
            _ => content.metas.unwrap_or_default(),
        };
        let (owner, _) = self.inner.agent_authorizer.authorize(&metas)?;
        if op == "NewProxy" {
            let proxy = NewProxy {
                proxy_name: content.proxy_name,
                proxy_type: content.proxy_type,
                ..NewProxy::default()
            };
            return authorize_proxy(&owner, &proxy);
        }
        Ok(())
    }

    fn frp_secret(&self) -> Secret {
        self.keys().derive("frp-handler", "")
    }

    /// What to put into frps' configuration.
    pub(super) fn frps_config(&self) -> Result<String, HttpError> {
        let Frps::External(external) = &self.inner.frps else {
            return Err(HttpError::new(
                409,
                "own_frps",
                "this control plane is its own FRP server",
                Some("start it with --frps HOST:PORT to use another one"),
            ));
        };
        Ok(format!(
            "# for frps 0.52 and newer; its certificate must fit --frps-ca or --frps-pin\n\
             bindPort = {}\n\
             auth.token = \"the one in --frps-token-file\"\n\
             transport.tls.force = true\n\n\
             [[httpPlugins]]\n\
             name = \"pipeops\"\n\
             addr = \"{}\"\n\
             path = \"/frp/handler/{}\"\n\
             ops = [\"Login\", \"NewProxy\", \"Ping\", \"NewWorkConn\"]\n",
            external.config.port,
            self.url(),
            self.frp_secret().expose()
        ))
    }
}
