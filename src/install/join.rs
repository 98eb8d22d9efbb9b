//! The server seen from a machine that wants to join: everything is checked over the wire before a
//! local write.
//!
//! Endpoints and answers as in k3s-io/k3s `pkg/server/handlers` and `pkg/clientaccess` (v1.36).

use std::time::Duration;

use reqwest::{Certificate, Client, Identity, StatusCode};

use crate::base::error::{Exit, Failure};
use crate::base::http::{clock_offset, explain};
use crate::base::resolve::Resolver;
use crate::base::secret::Secret;
use crate::k3s::token::{Token, TokenCredential, ca_hash};
use crate::k3s::version::Version;

const CONNECT: Duration = Duration::from_secs(5);
const WHOLE: Duration = Duration::from_secs(10);

/// A server whose CA is the one that the token names.
pub struct JoinClient {
    url: String,
    client: Client,
    ca: Vec<u8>,
    token: Token,
    /// This clock minus the server's, seconds.
    pub clock_offset: Option<i64>,
}

fn joining(exit: Exit, code: &str, what: impl Into<String>) -> Failure {
    Failure::new(exit, code, what)
}

const NEW_LINE: &str = "get a fresh line on the server with `pipeops cluster-info --join`";

/// Whether the port takes connections at all, for addresses; a name would have to be resolved
/// again.
async fn accepts(url: &str) -> bool {
    let address = url.strip_prefix("https://").and_then(|a| a.parse::<std::net::SocketAddr>().ok());
    match address {
        Some(address) => {
            tokio::time::timeout(Duration::from_secs(2), tokio::net::TcpStream::connect(address))
                .await
                .is_ok_and(|c| c.is_ok())
        }
        None => false,
    }
}

/// Sorts a transport error into what an operator can act on.
async fn unreachable(url: &str, error: &reqwest::Error) -> Failure {
    let text = explain(error);
    let lower = text.to_lowercase();
    let late = error.is_timeout() || lower.contains("timed out");
    // a time-out of the whole handshake: did TCP come through, or nothing at all?
    let silent = late && (!error.is_connect() || accepts(url).await);
    let (code, what, hint) = if lower.contains("no name server answered") {
        (
            "SERVER_NAME_UNKNOWN",
            "cannot be found by name: no name server answers",
            "check the name servers in /etc/resolv.conf and the way to them, or use the address",
        )
    } else if lower.contains("dns: ") {
        (
            "SERVER_NAME_UNKNOWN",
            "cannot be found by name",
            "check the name and /etc/resolv.conf, or use the address",
        )
    } else if lower.contains("refused") {
        (
            "SERVER_REFUSES",
            "refuses connections",
            "check that k3s runs there and that the port is right",
        )
    } else if lower.contains("corrupt message")
        || lower.contains("invalidcontenttype")
        || lower.contains("not tls")
    {
        (
            "SERVER_NOT_TLS",
            "does not speak TLS",
            "the port belongs to something else; a k3s server listens on 6443 with TLS",
        )
    } else if silent {
        (
            "SERVER_SILENT",
            "accepts the connection and then says nothing",
            "check that k3s runs there, and that no proxy is in between",
        )
    } else if late {
        (
            "SERVER_UNREACHABLE",
            "cannot be reached: packets are lost on the way",
            "check the address, routes and firewalls for 6443/tcp",
        )
    } else {
        (
            "SERVER_UNREACHABLE",
            "cannot be reached",
            "check the address, routes and firewalls for 6443/tcp",
        )
    };
    joining(Exit::Network, code, format!("{url} {what}")).why(text).hint(hint)
}

/// Steps 1 and 2: does a k3s server answer, and is it the one that the token means?
///
/// # Errors
/// Exit 5 when it cannot be reached, 7 when it is not the one. Nothing local is written.
pub async fn connect(url: &str, token: Token, insecure: bool) -> Result<JoinClient, Failure> {
    let builder = || {
        Client::builder()
            .dns_resolver(Resolver::shared())
            .connect_timeout(CONNECT)
            .timeout(WHOLE)
            .no_proxy()
            .redirect(reqwest::redirect::Policy::none())
    };
    let internal = |e: reqwest::Error| {
        joining(Exit::Internal, "INTERNAL", "making an HTTP client").why(explain(&e))
    };
    // only two answers are read this way, and the second is compared with the token's hash
    let blind = builder().tls_danger_accept_invalid_certs(true).build().map_err(internal)?;
    let ping = match blind.get(format!("{url}/ping")).send().await {
        Ok(v) => v,
        Err(e) => return Err(unreachable(url, &e).await),
    };
    if ping.status() != StatusCode::OK {
        return Err(joining(
            Exit::Network,
            "SERVER_NOT_K3S",
            format!("{url} is not a k3s server, or not ready yet"),
        )
        .why(format!("/ping answered {}", ping.status()))
        .hint("check the address and the port; a server that starts needs a minute"));
    }
    let answer = match blind.get(format!("{url}/cacerts")).send().await {
        Ok(v) => v,
        Err(e) => return Err(unreachable(url, &e).await),
    };
    let ca = match answer.bytes().await {
        Ok(v) => v,
        Err(e) => return Err(unreachable(url, &e).await),
    }
    .to_vec();
    let hash = ca_hash(&ca).map_err(|why| {
        joining(Exit::Network, "SERVER_NOT_K3S", format!("{url} is not a k3s server")).why(why)
    })?;
    match &token.ca_hash {
        Some(expected) if *expected != hash => {
            return Err(joining(
                Exit::Refused,
                "JOIN_CA_MISMATCH",
                "the token belongs to another cluster",
            )
            .why(format!(
                "the token names CA {}…, the server shows {}…",
                &expected[..8],
                &hash[..8]
            ))
            .why(
                "usual causes: the server was rebuilt, the address is another cluster's, or a \
                 proxy opens TLS",
            )
            .hint(NEW_LINE));
        }
        None if !insecure => {
            return Err(joining(
                Exit::Refused,
                "JOIN_TOKEN_UNPINNED",
                "this token does not say which server it is for",
            )
            .why("a short token trusts any server at that address")
            .hint(format!("{NEW_LINE}, or accept the risk with --insecure-token")));
        }
        _ => {}
    }
    let roots = Certificate::from_pem_bundle(&ca).map_err(internal)?;
    let client = builder().tls_certs_only(roots).build().map_err(internal)?;
    let mut server = JoinClient { url: url.to_owned(), client, ca, token, clock_offset: None };
    let again = match server.client.get(format!("{url}/ping")).send().await {
        Ok(v) => v,
        Err(e) => return Err(server.untrusted(&e).await),
    };
    server.clock_offset = clock_offset(&again);
    Ok(server)
}

impl JoinClient {
    async fn untrusted(&self, error: &reqwest::Error) -> Failure {
        let text = explain(error);
        let lower = text.to_lowercase();
        if lower.contains("expired")
            || lower.contains("notvalidyet")
            || lower.contains("not valid yet")
        {
            return joining(
                Exit::Refused,
                "CLOCK_SKEW",
                "the server's certificate is outside its time: a clock is wrong",
            )
            .why(text)
            .hint("set both clocks (`timedatectl set-ntp true`), then run again");
        }
        if lower.contains("notvalidforname") || lower.contains("not valid for name") {
            return joining(
                Exit::Refused,
                "TLS_SAN_MISSING",
                format!("the server's certificate does not name {}", self.url),
            )
            .why(text)
            .hint(
                "on the server: pipeops install-server --tls-san THAT_ADDRESS; or join by an \
                 address that it names",
            );
        }
        if lower.contains("certificate") || lower.contains("unknownissuer") {
            return joining(
                Exit::Refused,
                "JOIN_CA_MISMATCH",
                "the server's certificate is not made by the CA that the token names",
            )
            .why(text)
            .hint(NEW_LINE);
        }
        unreachable(&self.url, error).await
    }

    /// Step 3: does the server accept the token?
    ///
    /// # Errors
    /// Exit 7 when it does not.
    pub async fn authorize(&self) -> Result<(), Failure> {
        let request = self
            .client
            .get(format!("{}/v1-k3s/config", self.url))
            .header("Authorization", self.token.authorization().expose());
        let answer = match request.send().await {
            Ok(v) => v,
            Err(e) => return Err(self.untrusted(&e).await),
        };
        match answer.status() {
            StatusCode::OK => Ok(()),
            StatusCode::UNAUTHORIZED => {
                let bootstrap = matches!(self.token.credential, TokenCredential::Bootstrap { .. });
                let what = if bootstrap {
                    "the server does not know this token: it has expired or was deleted"
                } else {
                    "the server refuses the token: its password is wrong"
                };
                let code = if bootstrap { "JOIN_TOKEN_EXPIRED" } else { "JOIN_TOKEN_REJECTED" };
                Err(joining(Exit::Refused, code, what).hint(NEW_LINE))
            }
            StatusCode::FORBIDDEN => Err(joining(
                Exit::Refused,
                "JOIN_TOKEN_KIND",
                "the server knows the token, but it is not one for joining",
            )
            .hint(NEW_LINE)),
            other => Err(joining(
                Exit::Network,
                "SERVER_NOT_READY",
                "the server cannot take workers now",
            )
            .why(format!("/v1-k3s/config answered {other}"))
            .hint("wait until it is Ready, then run again")),
        }
    }

    /// Step 4: is the name free, and which version does the server run? Reserves the name for
    /// `password` on the server.
    ///
    /// # Errors
    /// Exit 7 `NODE_NAME_TAKEN` when the server has tied the name to another password.
    pub async fn reserve(&self, node: &str, password: &Secret) -> Result<Version, Failure> {
        let request = self
            .client
            .get(format!("{}/v1-k3s/client-kubelet.crt", self.url))
            .header("Authorization", self.token.authorization().expose())
            .header("k3s-Node-Name", node)
            .header("k3s-Node-Password", password.expose().trim());
        let answer = match request.send().await {
            Ok(v) => v,
            Err(e) => return Err(self.untrusted(&e).await),
        };
        match answer.status() {
            StatusCode::OK => {}
            StatusCode::FORBIDDEN => {
                return Err(joining(
                    Exit::Refused,
                    "NODE_NAME_TAKEN",
                    format!("the cluster has a node `{node}` that is another machine"),
                )
                .why(
                    "the server ties each name to a password in /etc/rancher/node/password, and \
                     this machine's is another",
                )
                .hint(format!(
                    "is this that machine, newly installed? on the server: kubectl delete node \
                     {node}; else choose another name with --node-name"
                )));
            }
            other => {
                return Err(joining(
                    Exit::Network,
                    "SERVER_NOT_READY",
                    "the server cannot take workers now",
                )
                .why(format!("/v1-k3s/client-kubelet.crt answered {other}"))
                .hint("wait until it is Ready, then run again"));
            }
        }
        let pem = match answer.bytes().await {
            Ok(v) => v,
            Err(e) => return Err(self.untrusted(&e).await),
        };
        let internal = |e: reqwest::Error| {
            joining(Exit::Internal, "INTERNAL", "using the node's certificate").why(explain(&e))
        };
        let identity = Identity::from_pem(&pem).map_err(internal)?;
        let roots = Certificate::from_pem_bundle(&self.ca).map_err(internal)?;
        let client = Client::builder()
            .dns_resolver(Resolver::shared())
            .connect_timeout(CONNECT)
            .timeout(WHOLE)
            .no_proxy()
            .tls_certs_only(roots)
            .identity(identity)
            .build()
            .map_err(internal)?;
        let answer = match client.get(format!("{}/version", self.url)).send().await {
            Ok(v) => v,
            Err(e) => return Err(self.untrusted(&e).await),
        };
        let status = answer.status();
        let body: serde_json::Value = answer.json().await.unwrap_or_default();
        let version = body["gitVersion"].as_str().unwrap_or_default();
        version.parse().map_err(|why: String| {
            joining(Exit::Network, "SERVER_VERSION", "the server's version cannot be read")
                .why(format!("/version answered {status}"))
                .why(why)
                .hint("name it with --k3s-version")
        })
    }
}
