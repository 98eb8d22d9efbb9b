//! Names to addresses, in one way for everybody: /etc/hosts and DNS, as getaddrinfo takes names,
//! each family by itself.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use hickory_resolver::TokioResolver;
use hickory_resolver::config::{LookupIpStrategy, ResolverConfig, ResolverOpts};
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::proto::rr::Name;
use hickory_resolver::system_conf::read_system_conf;

/// Longest time for a name; less than what any caller gives a whole connection.
const WHOLE: Duration = Duration::from_millis(4500);
/// How long the answer of one family waits for the other's: some servers drop the question for
/// AAAA, and none should make others wait.
const OTHER: Duration = Duration::from_millis(300);
/// After this long without an answer the question is sent again.
const AGAIN: Duration = Duration::from_millis(1500);

/// Why a name has no address; begins with `dns:`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LookupError {
    pub why: String,
    /// No name server answered at all.
    pub silent: bool,
}

impl fmt::Display for LookupError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "dns: {}", self.why)
    }
}

impl std::error::Error for LookupError {}

/// The addresses of a name, or the address itself; with the resolver configuration of this moment.
///
/// # Errors
/// Why there is none.
pub async fn lookup(host: &str) -> Result<Vec<IpAddr>, LookupError> {
    if let Ok(address) = host.trim_matches(['[', ']']).parse() {
        return Ok(vec![address]);
    }
    // without a usable /etc/resolv.conf there is still /etc/hosts
    let nobody =
        |_| (ResolverConfig::from_parts(None, Vec::new(), Vec::new()), ResolverOpts::default());
    let (config, options) = read_system_conf().unwrap_or_else(nobody);
    ask(host, &config, &options).await
}

async fn ask(
    host: &str,
    config: &ResolverConfig,
    options: &ResolverOpts,
) -> Result<Vec<IpAddr>, LookupError> {
    let no = |why: String, silent| LookupError { why: format!("{host}: {why}"), silent };
    // relaxed: DNS and /etc/hosts know names with `_`, and so does getaddrinfo
    let name =
        Name::from_str_relaxed(host).map_err(|e| no(format!("it cannot be a name: {e}"), false))?;
    let family = |strategy| {
        let mut builder =
            TokioResolver::builder_with_config(config.clone(), TokioRuntimeProvider::default());
        *builder.options_mut() = options.clone();
        builder.options_mut().ip_strategy = strategy;
        // two tries fit into the time that there is
        builder.options_mut().timeout = options.timeout.min(AGAIN);
        builder.options_mut().attempts = options.attempts.max(2);
        let (resolver, name) = (builder.build(), name.clone());
        async move {
            let found = resolver?.lookup_ip(name).await?;
            Ok::<Vec<IpAddr>, hickory_resolver::net::NetError>(found.iter().collect())
        }
    };
    let (v4, v6) = (family(LookupIpStrategy::Ipv4Only), family(LookupIpStrategy::Ipv6Only));
    tokio::pin!(v4, v6);
    let both = async {
        let (first, other_is_v4) =
            tokio::select! { found = &mut v4 => (found, false), found = &mut v6 => (found, true) };
        let good = first.as_ref().is_ok_and(|list| !list.is_empty());
        let second = async { if other_is_v4 { v4.await } else { v6.await } };
        let second =
            if good { tokio::time::timeout(OTHER, second).await.ok() } else { Some(second.await) };
        // IPv4 first: a cluster's own addresses are that as a rule
        if other_is_v4 { (second, Some(first)) } else { (Some(first), second) }
    };
    let servers =
        || config.name_servers().iter().map(|s| s.ip.to_string()).collect::<Vec<_>>().join(", ");
    let silent = || no(format!("no name server answered ({})", servers()), true);
    let (v4, v6) = tokio::time::timeout(WHOLE, both).await.map_err(|_| silent())?;
    let found: Vec<IpAddr> =
        [&v4, &v6].into_iter().flatten().flatten().flatten().copied().collect();
    if !found.is_empty() {
        return Ok(found);
    }
    let errors: Vec<String> = [v4, v6]
        .into_iter()
        .flatten()
        .filter_map(Result::err)
        .map(|e| without_query(&e.to_string()))
        .collect();
    if errors.iter().any(|e| e.contains("timed out") || e.contains("no connections available")) {
        return Err(silent());
    }
    Err(no(
        format!("there is no such name ({})", errors.first().map_or("no address", String::as_str)),
        false,
    ))
}

/// An error of the resolver's without the query that it prints, as Rust sees it: the name stands
/// before it already.
fn without_query(error: &str) -> String {
    error.split(" for Query {").next().unwrap_or_default().to_owned()
}

/// For reqwest.
#[derive(Clone, Copy, Debug, Default)]
pub struct Resolver;

impl Resolver {
    pub fn shared() -> Arc<Resolver> {
        Arc::new(Resolver)
    }
}

impl reqwest::dns::Resolve for Resolver {
    fn resolve(&self, name: reqwest::dns::Name) -> reqwest::dns::Resolving {
        Box::pin(async move {
            let found = lookup(name.as_str()).await?;
            let addresses: reqwest::dns::Addrs =
                Box::new(found.into_iter().map(|ip| SocketAddr::new(ip, 0)));
            Ok(addresses)
        })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use hickory_resolver::config::{ConnectionConfig, NameServerConfig};
    use tokio::net::UdpSocket;

    use super::*;

    /// A name server that answers A with 10.0.0.5 and AAAA with fd00::5, or drops the questions of
    /// a type.
    async fn server(drops: &'static [u8]) -> ResolverConfig {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let port = socket.local_addr().unwrap().port();
        tokio::spawn(async move {
            let mut packet = [0; 512];
            while let Ok((length, from)) = socket.recv_from(&mut packet).await {
                // header of 12 bytes, labels, a zero, then type and class (RFC 1035, 4.1)
                let end = 12 + packet[12..length].iter().position(|b| *b == 0).unwrap();
                let kind = packet[end + 2];
                if drops.contains(&kind) {
                    continue;
                }
                let data: &[u8] = match kind {
                    1 => &[10, 0, 0, 5],
                    _ => &[0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 5],
                };
                let mut answer = packet[..2].to_vec();
                answer.extend([0x81, 0x80, 0, 1, 0, 1, 0, 0, 0, 0]);
                answer.extend(&packet[12..end + 5]);
                answer.extend([
                    0xc0,
                    12,
                    0,
                    kind,
                    0,
                    1,
                    0,
                    0,
                    0,
                    60,
                    0,
                    u8::try_from(data.len()).unwrap(),
                ]);
                answer.extend(data);
                socket.send_to(&answer, from).await.unwrap();
            }
        });
        let mut connection = ConnectionConfig::udp();
        connection.port = port;
        let server = NameServerConfig::new("127.0.0.1".parse().unwrap(), true, vec![connection]);
        ResolverConfig::from_parts(None, Vec::new(), vec![server])
    }

    fn addresses(list: &[&str]) -> Vec<IpAddr> {
        list.iter().map(|a| a.parse().unwrap()).collect()
    }

    #[tokio::test]
    async fn a_server_that_drops_one_family_delays_nobody() {
        for (drops, found) in
            [(&[][..], &["10.0.0.5", "fd00::5"][..]), (&[28], &["10.0.0.5"]), (&[1], &["fd00::5"])]
        {
            let config = server(drops).await;
            let begin = Instant::now();
            assert_eq!(
                ask("k3s_master.example.com", &config, &ResolverOpts::default()).await,
                Ok(addresses(found)),
                "{drops:?}"
            );
            assert!(begin.elapsed() < Duration::from_secs(3), "{drops:?}: {:?}", begin.elapsed());
        }
        let silent = ask("k3s.example.com", &server(&[1, 28]).await, &ResolverOpts::default())
            .await
            .unwrap_err();
        assert!(
            silent.silent
                && silent.to_string()
                    == "dns: k3s.example.com: no name server answered (127.0.0.1)",
            "{silent}"
        );
    }

    #[test]
    fn an_error_has_no_query_of_rust() {
        let said = "no records found for Query { name: Name(\"github.com.\"), query_type: A }";
        assert_eq!(without_query(said), "no records found");
        assert_eq!(without_query("request refused"), "request refused");
    }

    #[tokio::test]
    async fn addresses_and_hosts_need_no_server() {
        assert_eq!(lookup("10.0.0.1").await, Ok(addresses(&["10.0.0.1"])));
        assert_eq!(lookup("[fd00::1]").await, Ok(addresses(&["fd00::1"])));
        assert!(lookup("localhost").await.unwrap().contains(&"127.0.0.1".parse().unwrap()));
        assert!(
            lookup("two..dots")
                .await
                .unwrap_err()
                .to_string()
                .starts_with("dns: two..dots: it cannot be a name")
        );
    }
}
