//! The Kubernetes API as bytes: requests and answers pass through as streams, with the agent's
//! credential added.

use http::{Request, Response};
use hyper::body::Incoming;
use tower::BoxError;

use super::transport::Transport;
use crate::base::connection::Body;
use crate::host::Host;

/// Connections kept for later requests.
const IDLE: usize = 32;

/// An API server as one identity. It follows no redirect, repeats nothing, and has no time-out but
/// for the connection.
#[derive(Clone)]
pub struct Upstream {
    pooled: Transport,
    /// For upgrades: a connection of its own, closed when the answer is not 101.
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

    /// Sends a request; the answer is given as soon as its headers are there, its body streams.
    ///
    /// # Errors
    /// When the API server cannot be reached, or closes the connection before it has answered.
    pub async fn send(
        &self,
        request: Request<Body>,
        upgrade: bool,
    ) -> Result<Response<Incoming>, BoxError> {
        let transport = if upgrade { self.single.clone() } else { self.pooled.clone() };
        transport.send(request).await
    }
}
