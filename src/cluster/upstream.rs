//! The Kubernetes API as bytes: requests and answers pass through as streams, with the agent's credential put on.

use std::time::Duration;

use anyhow::Context as _;
use futures_util::future::BoxFuture;
use http::{Request, Response};
use http_body_util::combinators::UnsyncBoxBody;
use hyper::body::{Bytes, Incoming};
use hyper_util::client::legacy::Client;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use kube::client::ConfigExt as _;
use tower::util::BoxCloneSyncService;
use tower::{BoxError, ServiceBuilder, ServiceExt as _};

use crate::cluster::configuration;
use crate::host::Host;

/// A body of unknown length, in either direction.
pub type Body = UnsyncBoxBody<Bytes, BoxError>;

type Service = BoxCloneSyncService<Request<Body>, Response<Incoming>, BoxError>;

/// An API server as one identity. Never follows a redirect, never tries again, has no time-out but for the connection.
#[derive(Clone)]
pub struct Upstream {
    pooled: Service,
    /// For upgrades: a connection of its own, closed when the answer is another than 101.
    single: Service,
}

impl Upstream {
    /// # Errors
    /// When the file is absent or no kubeconfig.
    pub async fn open(host: &Host, kubeconfig: &str) -> anyhow::Result<Upstream> {
        let config = configuration(host, kubeconfig).await?;
        let service = |idle: usize| -> anyhow::Result<Service> {
            let connector = config.rustls_https_connector().context("making a TLS connector")?;
            let client: Client<_, Body> = Client::builder(TokioExecutor::new())
                .pool_timer(TokioTimer::new())
                .pool_idle_timeout(Duration::from_secs(60))
                .pool_max_idle_per_host(idle)
                .retry_canceled_requests(false)
                .build(connector);
            let auth = config.auth_layer().context("reading the credential")?;
            let service = ServiceBuilder::new().layer(config.base_uri_layer()).option_layer(auth).map_err(BoxError::from).service(client);
            Ok(BoxCloneSyncService::new(service))
        };
        Ok(Upstream { pooled: service(32)?, single: service(0)? })
    }

    /// Sends on; the answer's head comes back, its body streams.
    ///
    /// # Errors
    /// When the API server cannot be reached or breaks off before its head.
    pub fn send(&self, request: Request<Body>, upgrade: bool) -> BoxFuture<'static, Result<Response<Incoming>, BoxError>> {
        let service = if upgrade { self.single.clone() } else { self.pooled.clone() };
        Box::pin(service.oneshot(request))
    }
}
