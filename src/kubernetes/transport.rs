//! HTTP to the API server that a kubeconfig describes: its address, its CA, our identity.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::uri::PathAndQuery;
use http::{HeaderValue, Request, Response, Uri, header};
use hyper::body::Incoming;
use hyper_util::client::legacy::connect::HttpConnector;
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::Value;
use tokio_rustls::TlsConnector;
use tower::{BoxError, Service as _};

use crate::base::connection::{self, Body, Client, Connector, Io};
use crate::base::secret::Secret;
use crate::base::trust::{ClientIdentity, Trust};
use crate::base::yaml::{self, EqualKeys};
use crate::host::Host;

const CONNECT: Duration = Duration::from_secs(4);
/// How long a connection is kept for later requests.
const IDLE_TIME: Duration = Duration::from_secs(60);

/// The fields of a kubeconfig (kubernetes/client-go `tools/clientcmd/api/v1/types.go`) that an
/// agent without a user at the keyboard can use.
#[derive(Default, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
struct Kubeconfig {
    current_context: String,
    contexts: Vec<Named<ContextRef>>,
    clusters: Vec<Named<Cluster>>,
    users: Vec<Named<User>>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Named<T> {
    name: String,
    #[serde(alias = "context", alias = "cluster", alias = "user")]
    what: T,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct ContextRef {
    cluster: String,
    user: String,
}

#[derive(Default, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
struct Cluster {
    server: String,
    certificate_authority: Option<String>,
    certificate_authority_data: Option<String>,
    insecure_skip_tls_verify: bool,
    tls_server_name: Option<String>,
}

#[derive(Default, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
struct User {
    token: Option<Secret>,
    #[serde(rename = "tokenFile")]
    token_file: Option<String>,
    client_certificate: Option<String>,
    client_certificate_data: Option<String>,
    client_key: Option<String>,
    client_key_data: Option<Secret>,
    exec: Option<IgnoredAny>,
    auth_provider: Option<IgnoredAny>,
    username: Option<IgnoredAny>,
}

/// What YAML leaves open, as the fields of a kubeconfig are read: a field without a value is not
/// there, and a number is a text (kubernetes-sigs/yaml `yaml.go`, `convertToJSONableObject`).
fn as_fields(value: &mut Value) {
    match value {
        Value::Object(map) => {
            map.retain(|_, field| !field.is_null());
            map.values_mut().for_each(as_fields);
        }
        Value::Array(list) => list.iter_mut().for_each(as_fields),
        Value::Number(number) => *value = number.to_string().into(),
        _ => {}
    }
}

/// The content of a file, or of a field in base64.
fn text(host: &Host, data: Option<&str>, file: Option<&str>) -> anyhow::Result<Option<String>> {
    match (data, file) {
        (Some(data), _) if !data.is_empty() => {
            let bytes = STANDARD.decode(data.trim()).context("its base64 is wrong")?;
            Ok(Some(String::from_utf8(bytes).context("it is no text")?))
        }
        (_, Some(file)) if !file.is_empty() => {
            Ok(Some(host.read(file)?.with_context(|| format!("{file} is not there"))?))
        }
        _ => Ok(None),
    }
}

impl Kubeconfig {
    fn current(self) -> anyhow::Result<(Cluster, User)> {
        let context = self.contexts.into_iter().find(|c| c.name == self.current_context);
        let context =
            context.with_context(|| format!("it has no context `{}`", self.current_context))?.what;
        let cluster = self.clusters.into_iter().find(|c| c.name == context.cluster);
        let cluster =
            cluster.with_context(|| format!("it has no cluster `{}`", context.cluster))?.what;
        let user = self
            .users
            .into_iter()
            .find(|u| u.name == context.user)
            .map(|u| u.what)
            .unwrap_or_default();
        Ok((cluster, user))
    }
}

impl User {
    fn identity(&self, host: &Host) -> anyhow::Result<Option<ClientIdentity>> {
        let certificate =
            text(host, self.client_certificate_data.as_deref(), self.client_certificate.as_deref())
                .context("the client certificate")?;
        let key = text(
            host,
            self.client_key_data.as_ref().map(Secret::expose),
            self.client_key.as_deref(),
        )
        .context("the client key")?;
        let (Some(certificate), Some(key)) = (certificate, key.map(Secret::new)) else {
            return Ok(None);
        };
        let chain: Result<Vec<_>, _> =
            CertificateDer::pem_slice_iter(certificate.as_bytes()).collect();
        let key = PrivateKeyDer::from_pem_slice(key.expose().as_bytes())
            .map_err(|e| anyhow::anyhow!("the client key: {e}"))?;
        Ok(Some((chain.context("the client certificate")?, key)))
    }

    /// The token at this moment: one in a file is replaced from time to time.
    fn bearer(&self, host: &Host) -> anyhow::Result<Option<HeaderValue>> {
        let token = match (&self.token, &self.token_file) {
            (Some(token), _) if !token.is_empty() => token.clone(),
            (_, Some(file)) => Secret::new(
                host.read(file)?.with_context(|| format!("{file} is not there"))?.trim(),
            ),
            _ => return Ok(None),
        };
        let mut value = HeaderValue::try_from(format!("Bearer {}", token.expose()))
            .map_err(|_| anyhow::anyhow!("the token holds characters that no token has"))?;
        value.set_sensitive(true);
        Ok(Some(value))
    }
}

/// Connects to an API server, with TLS where it has a name for that.
fn connector(tls: Option<(TlsConnector, ServerName<'static>)>) -> Connector {
    let mut http = HttpConnector::new();
    http.enforce_http(false);
    http.set_connect_timeout(Some(CONNECT));
    http.set_nodelay(true);
    Connector::new(move |uri| {
        let (mut http, tls) = (http.clone(), tls.clone());
        async move {
            let tcp = http.call(uri).await?.into_inner();
            let io: Io = match tls {
                Some((tls, name)) => Box::new(tls.connect(name, tcp).await?),
                None => Box::new(tcp),
            };
            Ok(io)
        }
    })
}

/// Requests to one API server as one identity. It follows no redirect, repeats nothing, and has no
/// time-out but for the connection.
#[derive(Clone)]
pub(super) struct Transport {
    client: Client,
    base: Uri,
    /// Where a token in a file is read from for each request.
    host: Option<Host>,
    user: Arc<User>,
    bearer: Option<HeaderValue>,
}

impl Transport {
    /// Keeps at most `idle` connections for later requests.
    ///
    /// # Errors
    /// The file is absent, is no kubeconfig, or needs something that is not supported; the text
    /// says which.
    pub(super) fn open(host: &Host, kubeconfig: &str, idle: usize) -> anyhow::Result<Transport> {
        let yaml =
            host.read(kubeconfig)?.with_context(|| format!("{kubeconfig} is not there yet"))?;
        Transport::from_yaml(host, &yaml, idle).with_context(|| kubeconfig.to_owned())
    }

    fn from_yaml(host: &Host, yaml: &str, idle: usize) -> anyhow::Result<Transport> {
        // what is wrong there is not said: it may be a secret
        let no_kubeconfig = || anyhow::anyhow!("it is no kubeconfig in YAML");
        let mut parsed = yaml::parse(yaml, EqualKeys::Refused).map_err(|_| no_kubeconfig())?;
        as_fields(&mut parsed);
        let parsed: Kubeconfig = serde_json::from_value(parsed).map_err(|_| no_kubeconfig())?;
        let (cluster, user) = parsed.current()?;
        anyhow::ensure!(
            !cluster.insecure_skip_tls_verify,
            "it asks not to verify the API server: give its CA instead"
        );
        anyhow::ensure!(
            user.exec.is_none() && user.auth_provider.is_none() && user.username.is_none(),
            "its user needs a plugin or a password: only tokens and client certificates work here"
        );
        let base: Uri = cluster
            .server
            .parse()
            .ok()
            .filter(|u: &Uri| {
                u.host().is_some() && matches!(u.scheme_str(), Some("http" | "https"))
            })
            .with_context(|| format!("`{}` is no URL of a server", cluster.server))?;
        let ca = text(
            host,
            cluster.certificate_authority_data.as_deref(),
            cluster.certificate_authority.as_deref(),
        )
        .context("the CA")?;
        let tls = Trust { ca_pem: ca, ..Trust::default() }
            .client_config_with(user.identity(host)?)
            .map_err(anyhow::Error::msg)?;
        let name = cluster
            .tls_server_name
            .unwrap_or_else(|| base.host().unwrap_or_default().trim_matches(['[', ']']).to_owned());
        let tls = match base.scheme_str() {
            Some("https") => {
                let name = name.try_into().context("tls-server-name, or the server's own name")?;
                Some((TlsConnector::from(Arc::new(tls)), name))
            }
            _ => None,
        };
        let client = connection::client(connector(tls), idle, IDLE_TIME);
        let bearer = user.bearer(host)?;
        let host = (user.token.is_none() && user.token_file.is_some()).then(|| host.clone());
        Ok(Transport { client, base, host, user: user.into(), bearer })
    }

    /// # Errors
    /// When the API server cannot be reached, or closes the connection before it has answered.
    pub(super) async fn send(
        self,
        mut request: Request<Body>,
    ) -> Result<Response<Incoming>, BoxError> {
        let mut parts = self.base.clone().into_parts();
        let before = self.base.path().trim_end_matches('/');
        parts.path_and_query = match request.uri().path_and_query() {
            // what was parsed once is not read again for every request
            Some(path) if before.is_empty() => Some(path.clone()),
            path => Some(format!("{before}{}", path.map_or("/", PathAndQuery::as_str)).parse()?),
        };
        *request.uri_mut() = Uri::from_parts(parts)?;
        let bearer = match &self.host {
            Some(host) => self.user.bearer(host)?,
            None => self.bearer.clone(),
        };
        if let Some(bearer) = bearer {
            request.headers_mut().insert(header::AUTHORIZATION, bearer);
        }
        Ok(self.client.request(request).await?)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn config(cluster: Value, user: Value) -> String {
        json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "c", "preferences": {},
            "contexts": [
                {"name": "other", "context": {"cluster": "x", "user": "y"}},
                {"name": "c", "context": {"cluster": "l", "user": "u"}}
            ],
            "clusters": [{"name": "l", "cluster": cluster}], "users": [{"name": "u", "user": user}]
        })
        .to_string()
    }

    fn refusal(yaml: &str) -> String {
        let root = tempfile::tempdir().unwrap();
        let host = Host::new(root.path(), None);
        match Transport::from_yaml(&host, yaml, 1) {
            Ok(_) => panic!("taken"),
            Err(e) => format!("{e:#}"),
        }
    }

    #[tokio::test]
    async fn what_cannot_work_is_named_and_shows_nothing() {
        let server = json!({"server": "https://127.0.0.1:6443"});
        let insecure = json!({"server": "https://h", "insecure-skip-tls-verify": true});
        let bad_ca = json!({"server": "https://h", "certificate-authority-data": "%%"});
        let bad_token = json!({"token": "planted-canary-4711-in-plain-text with spaces\n"});
        let bad_key = json!({
            "client-certificate-data": "cGxhaW4=",
            "client-key-data": "cGxhbnRlZC00NzEx"
        });
        let list = "current-context: c\n\
                    users: [{name: u, user: {token: [planted-canary-4711-in-plain-text]}}]";
        for (yaml, text) in [
            ("{".to_owned(), "no kubeconfig"),
            ("current-context: gone".into(), "no context `gone`"),
            (config(json!({"server": "nowhere at all"}), json!({})), "no URL"),
            (config(insecure, json!({})), "not to verify"),
            (config(server.clone(), json!({"exec": {"command": "aws"}})), "plugin"),
            (config(server.clone(), bad_token), "characters"),
            (config(server.clone(), json!({"tokenFile": "/gone"})), "/gone is not there"),
            (config(bad_ca, json!({})), "the CA: its base64"),
            (config(server, bad_key), "the client key"),
            (list.into(), "no kubeconfig"),
        ] {
            let said = refusal(&yaml);
            assert!(said.contains(text) && !said.contains("canary-4711-in-plain-text"), "{said}");
        }
    }

    #[tokio::test]
    async fn what_yaml_leaves_open_is_read_as_kubectl_does() {
        let host = Host::new("/nowhere", None);
        let yaml = "current-context: c\nusers:\npreferences: ~\n\
                    contexts: [{name: c, context: {cluster: 5, user:}}]\n\
                    clusters:\n- name: 5\n  cluster:\n    server: https://[::1]:6443\n\
                    \x20   insecure-skip-tls-verify: false\n    tls-server-name:\n";
        let transport = Transport::from_yaml(&host, yaml, 1).unwrap();
        assert_eq!(transport.base, "https://[::1]:6443/");
        assert!(transport.bearer.is_none());
    }

    #[tokio::test]
    async fn a_token_in_a_file_is_the_one_that_stands_there_now() {
        let root = tempfile::tempdir().unwrap();
        let host = Host::new(root.path(), None);
        let dir = host.state_dir("/s").unwrap();
        dir.write("token", "first\n").unwrap();
        let transport = Transport::from_yaml(
            &host,
            &config(
                json!({"server": "http://127.0.0.1:1/base/"}),
                json!({"tokenFile": "/s/token"}),
            ),
            1,
        )
        .unwrap();
        dir.write("token", "second\n").unwrap();
        assert_eq!(transport.user.bearer(&host).unwrap().unwrap(), "Bearer second");
        assert!(transport.host.is_some());
    }
}
