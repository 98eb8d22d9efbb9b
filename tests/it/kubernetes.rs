//! The agent's way to Kubernetes over TLS: the CA and the token change under it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use rcgen::{CertificateParams, KeyPair, SanType};
use serde_json::json;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;

use crate::world::{World, serve_kube};

/// A CA, and a server's settings with a certificate of it.
fn served() -> (String, Arc<rustls::ServerConfig>) {
    let ca = crate::join::authority("kubernetes");
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.subject_alt_names.push(SanType::IpAddress([127, 0, 0, 1].into()));
    let key = KeyPair::generate().unwrap();
    let leaf = params.signed_by(&key, &ca).unwrap();
    let key = rustls_pki_types::PrivatePkcs8KeyDer::from(key.serialize_der()).into();
    let builder = rustls::ServerConfig::builder_with_provider(Arc::new(
        rustls::crypto::ring::default_provider(),
    ));
    let config = builder
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![leaf.der().clone()], key);
    (ca.pem(), Arc::new(config.unwrap()))
}

/// TLS before `kube`; with other settings it begins anew, and every connection ends.
async fn front(
    kube: std::net::SocketAddr,
    mut settings: watch::Receiver<Arc<rustls::ServerConfig>>,
) -> std::net::SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let mut open = JoinSet::new();
        loop {
            tokio::select! {
                changed = settings.changed() => match changed {
                    Ok(()) => open = JoinSet::new(),
                    Err(_) => return,
                },
                Ok((stream, _)) = listener.accept() => {
                    let acceptor = TlsAcceptor::from(settings.borrow().clone());
                    open.spawn(async move {
                        let Ok(mut stream) = acceptor.accept(stream).await else { return };
                        let mut kube = TcpStream::connect(kube).await.unwrap();
                        let _ = tokio::io::copy_bidirectional(&mut stream, &mut kube).await;
                    });
                }
            }
        }
    });
    address
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rotated_ca_and_token_are_picked_up_while_the_tunnel_stays() {
    use base64::Engine as _;
    let world = World::new().await.up().await;
    let (kube, plain) = serve_kube().await;
    let (first_ca, first) = served();
    let (second_ca, second) = served();
    let (settings, receiver) = watch::channel(first);
    let address = front(plain, receiver).await;
    let credential = |ca: &str, token: &str| {
        let ca = base64::engine::general_purpose::STANDARD.encode(ca);
        let text = json!({"apiVersion": "v1", "kind": "Config", "current-context": "c",
            "clusters": [{"name": "l", "cluster": {"server": format!("https://{address}"),
                "certificate-authority-data": ca}}],
            "contexts": [{"name": "c", "context": {"cluster": "l", "user": "u"}}],
            "users": [{"name": "u", "user": {"token": token}}]});
        // as whoever mints it does: a new file in the place of the old one
        world.agent.sandbox.put("/run/pipeops-credential/fresh", &text.to_string());
        let dir = world.agent.sandbox.root().join("run/pipeops-credential");
        std::fs::rename(dir.join("fresh"), dir.join("kubeconfig")).unwrap();
    };
    let token = world.token("viewer");
    let until = async |expected: u16, bearer: &str| {
        let begun = Instant::now();
        loop {
            let (status, body) = world.call("GET", "/k8s/version", &token, "", "").await;
            let seen =
                kube.through().pop().map(|s| s.all("authorization").concat()).unwrap_or_default();
            if status == expected && (expected != 200 || seen == bearer) {
                return;
            }
            assert!(
                begun.elapsed() < Duration::from_secs(60),
                "{status} {body} as {seen:?}: {}",
                world.agent.log()
            );
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let run_id = || {
        std::fs::read_to_string(world.agent.sandbox.root().join("var/lib/pipeops-agent/run-id"))
            .unwrap()
    };
    let before = run_id();
    credential(&first_ca, "one");
    until(200, "Bearer one").await;
    // the API server has another CA from now on: nobody is believed, and the tunnel stays
    settings.send_replace(second);
    until(503, "").await;
    assert_eq!(world.frps.proxies(), ["agent"]);
    credential(&second_ca, "two");
    until(200, "Bearer two").await;
    // the token alone, twice within a moment
    credential(&second_ca, "three");
    credential(&second_ca, "four");
    until(200, "Bearer four").await;
    assert_eq!(run_id(), before);
}
