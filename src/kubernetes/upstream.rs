//! The Kubernetes API as bytes: requests and answers pass through as streams, with the agent's credential put on.

use http::{Request, Response};
use hyper::body::Incoming;
use tower::BoxError;

pub use super::transport::Body;
use super::transport::Transport;
use crate::host::Host;

/// Connections kept for later requests.
const IDLE: usize = 32;

/// An API server as one identity. Never follows a redirect, never tries again, has no time-out but for the connection.
#[derive(Clone)]
pub struct Upstream {
    pooled: Transport,
    /// For upgrades: a connection of its own, closed when the answer is another than 101.
    single: Transport,
}

impl Upstream {
    /// # Errors
    /// When the file is absent or no kubeconfig.
    pub fn open(host: &Host, kubeconfig: &str) -> anyhow::Result<Upstream> {
        Ok(Upstream {
            pooled: Transport::open(host, kubeconfig, IDLE)?,
            single: Transport::open(host, kubeconfig, 0)?,
        })
    }

    /// Sends on; the answer's head comes back, its body streams.
    ///
    /// # Errors
    /// When the API server cannot be reached or breaks off before its head.
    pub async fn send(
        &self,
        request: Request<Body>,
        upgrade: bool,
    ) -> Result<Response<Incoming>, BoxError> {
        let transport = if upgrade { self.single.clone() } else { self.pooled.clone() };
        transport.send(request).await
    }
}
