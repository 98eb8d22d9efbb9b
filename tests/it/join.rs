//! `join-worker` against a supervisor of its own: what is refused, when, and that nothing is
//! written then.

use std::convert::Infallible;
use std::sync::{Arc, Mutex};

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};

use crate::support::{RunOutput, Sandbox, VERSION, assert_same_tree, each_kill_point, sha256};

/// How the server behaves.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) enum Behavior {
    #[default]
    Good,
    /// Its certificate comes from another CA than the one that it shows.
    OtherCa,
    TokenExpired,
    NameTaken,
    ClockAhead,
    Silent,
    PlainHttp,
    Starting,
}

pub(crate) struct Server {
    pub(crate) url: String,
    ca: String,
    asked: Arc<Mutex<Vec<String>>>,
    expired: Arc<std::sync::atomic::AtomicBool>,
}

pub(crate) fn authority(name: &str) -> CertifiedIssuer<'static, KeyPair> {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.distinguished_name.push(rcgen::DnType::CommonName, name);
    CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
}

impl Server {
    pub(crate) fn start(mood: Behavior) -> Server {
        let (ca, other) = (authority("k3s-server-ca@1"), authority("someone-else"));
        let signer = if mood == Behavior::OtherCa { &other } else { &ca };
        let key = KeyPair::generate().unwrap();
        let cert = CertificateParams::new(vec!["127.0.0.1".into(), "localhost".into()])
            .unwrap()
            .signed_by(&key, signer)
            .unwrap();
        let node_key = KeyPair::generate().unwrap();
        let node =
            CertificateParams::new(vec!["node".into()]).unwrap().signed_by(&node_key, &ca).unwrap();
        let kubelet = format!("{}{}", node.pem(), node_key.serialize_pem());
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(
                vec![cert.der().clone()],
                rustls_pki_types::PrivateKeyDer::Pkcs8(key.serialize_der().into()),
            )
            .unwrap();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let expired = Arc::new(std::sync::atomic::AtomicBool::new(mood == Behavior::TokenExpired));
        let (pem, log, gone) = (ca.pem(), asked.clone(), expired.clone());
        let (send, receive) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async move {
                let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
                send.send(listener.local_addr().unwrap().port()).unwrap();
                let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
                let mut held = Vec::new();
                loop {
                    let (stream, _) = listener.accept().await.unwrap();
                    if mood == Behavior::Silent {
                        held.push(stream);
                        continue;
                    }
                    let (acceptor, pem, kubelet, log, gone) =
                        (acceptor.clone(), pem.clone(), kubelet.clone(), log.clone(), gone.clone());
                    tokio::spawn(async move {
                        let service = hyper::service::service_fn(move |r| {
                            std::future::ready(answer(
                                mood,
                                gone.load(std::sync::atomic::Ordering::Relaxed),
                                &r,
                                &pem,
                                &kubelet,
                                &log,
                            ))
                        });
                        let builder = hyper::server::conn::http1::Builder::new();
                        if mood == Behavior::PlainHttp {
                            let _ = builder.serve_connection(TokioIo::new(stream), service).await;
                        } else if let Ok(stream) = acceptor.accept(stream).await {
                            let _ = builder.serve_connection(TokioIo::new(stream), service).await;
                        }
                    });
                }
            });
        });
        let port = receive.recv().unwrap();
        Server { url: format!("https://127.0.0.1:{port}"), ca: ca.pem(), asked, expired }
    }

    pub(crate) fn token(&self) -> String {
        format!("K10{}::abcdef.0123456789abcdef", sha256(self.ca.as_bytes()))
    }

    fn asked(&self, path: &str) -> bool {
        self.asked.lock().unwrap().iter().any(|p| p == path)
    }
}

fn answer(
    mood: Behavior,
    expired: bool,
    request: &Request<Incoming>,
    ca: &str,
    kubelet: &str,
    log: &Mutex<Vec<String>>,
) -> Result<Response<Full<Bytes>>, Infallible> {
    let path = request.uri().path().to_owned();
    log.lock().unwrap().push(path.clone());
    let (status, body) = match path.as_str() {
        "/ping" if mood == Behavior::Starting => (503, "starting".to_owned()),
        "/ping" => (200, "pong".to_owned()),
        "/cacerts" => (200, ca.to_owned()),
        path if expired && path.starts_with("/v1-k3s/") => (401, String::new()),
        "/v1-k3s/config"
            if request
                .headers()
                .get("authorization")
                .is_some_and(|a| a == "Bearer abcdef.0123456789abcdef") =>
        {
            (200, "{}".to_owned())
        }
        "/v1-k3s/config" => (401, String::new()),
        "/v1-k3s/client-kubelet.crt" if mood == Behavior::NameTaken => {
            (403, "Node password rejected".to_owned())
        }
        "/v1-k3s/client-kubelet.crt" => (200, kubelet.to_owned()),
        "/version" => (200, format!("{{\"gitVersion\":\"{VERSION}\"}}")),
        _ => (404, String::new()),
    };
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = StatusCode::from_u16(status).unwrap();
    let now = jiff::Timestamp::now()
        + jiff::SignedDuration::from_secs(if mood == Behavior::ClockAhead { 300 } else { 0 });
    let date = now.strftime("%a, %d %b %Y %H:%M:%S GMT").to_string();
    response.headers_mut().insert("date", date.parse().unwrap());
    Ok(response)
}

pub(crate) fn join(sandbox: &Sandbox, master: &str, token: &str, more: &[&str]) -> RunOutput {
    let release = sandbox.path("release");
    let mut args =
        vec!["join-worker", master, token, "--offline-dir", &release, "--yes", "--timeout", "20s"];
    args.extend(more);
    sandbox.run(&args)
}

#[test]
fn a_join_a_second_run_and_an_uninstall() {
    let (sandbox, server) = (Sandbox::new(), Server::start(Behavior::Good));
    let before = sandbox.tree();
    let said = join(&sandbox, &server.url, &server.token(), &[]).ended(0);
    assert!(
        said.out.contains(&format!("vm1 is a k3s {VERSION} worker of {}, Ready.", server.url)),
        "{}",
        said.out
    );
    let drop_in = sandbox.read("/etc/rancher/k3s/config.yaml.d/50-pipeops.yaml");
    assert!(
        drop_in.contains("token-file: \"/etc/rancher/k3s/pipeops-token\"")
            && !drop_in.contains("abcdef.0123456789abcdef"),
        "{drop_in}"
    );
    for server_only in
        ["flannel-backend", "tls-san", "secrets-encryption", "write-kubeconfig-mode", "disable"]
    {
        assert!(!drop_in.contains(server_only), "{drop_in}");
    }
    let tree = sandbox.tree();
    assert!(tree["/etc/rancher/k3s/pipeops-token"].starts_with("file 600"));
    assert!(tree["/etc/rancher/node/password"].starts_with("file 600"));
    assert!(!sandbox.calls().contains("abcdef.0123456789abcdef"), "no argv holds the token");
    let again = join(&sandbox, &server.url, &server.token(), &[]).ended(0);
    assert!(again.out.contains("nothing to do"), "{}", again.err);
    assert_same_tree(&sandbox.tree(), &tree, "");
    let left = sandbox.run(&["uninstall", "--yes"]).ended(0);
    assert!(
        left.out.contains("kubectl delete node vm1") || left.out.contains("everything"),
        "{}",
        left.out
    );
    assert_same_tree(&sandbox.tree(), &before, "");
}

#[test]
fn a_wrong_server_or_token_is_refused_before_a_write() {
    let good = Server::start(Behavior::Good);
    let token = good.token();
    let refused = format!("127.0.0.1:{}", crate::fake_control_plane::free_port());
    let cases: Vec<(String, String, i32, &str)> = vec![
        (
            good.url.clone(),
            format!("K10{}::abcdef.0123456789abcdef", "0".repeat(64)),
            7,
            "JOIN_CA_MISMATCH",
        ),
        (good.url.clone(), token.replace("abcdef.", "zzzzzz."), 7, "JOIN_TOKEN_EXPIRED"),
        (good.url.clone(), token.replace("::", ":"), 2, "JOIN_TOKEN_MALFORMED"),
        (good.url.clone(), token[..50].to_owned(), 2, "JOIN_TOKEN_MALFORMED"),
        (good.url, "short-password".into(), 7, "JOIN_TOKEN_UNPINNED"),
        (refused, token.clone(), 5, "SERVER_REFUSES"),
        ("http://127.0.0.1".into(), token.clone(), 2, "MASTER_INVALID"),
        ("no-such-host.invalid".into(), token.clone(), 5, "SERVER_"),
    ];
    for (master, token, code, text) in cases {
        let sandbox = Sandbox::new();
        let before = sandbox.tree();
        let said = join(&sandbox, &master, &token, &[]);
        assert_eq!(said.code, code, "{master} {text}\n{}", said.err);
        assert!(said.err.contains(text), "{}", said.err);
        assert!(!said.err.contains("abcdef.0123456789abcdef"), "{}", said.err);
        assert_same_tree(&sandbox.tree(), &before, text);
    }
}

#[test]
fn a_server_in_a_bad_mood_is_told_apart() {
    for (mood, code, text) in [
        (Behavior::OtherCa, 7, "JOIN_CA_MISMATCH"),
        (Behavior::TokenExpired, 7, "expired or was deleted"),
        (Behavior::NameTaken, 7, "kubectl delete node vm1"),
        (Behavior::ClockAhead, 3, "CLOCK_SKEW"),
        (Behavior::PlainHttp, 5, "SERVER_NOT_TLS"),
        (Behavior::Starting, 5, "SERVER_NOT_K3S"),
        (Behavior::Silent, 5, "SERVER_SILENT"),
    ] {
        let (sandbox, server) = (Sandbox::new(), Server::start(mood));
        let before = sandbox.tree();
        let said = join(&sandbox, &server.url, &server.token(), &[]);
        assert_eq!(said.code, code, "{mood:?}\n{}", said.err);
        assert!(said.err.contains(text), "{mood:?}\n{}", said.err);
        assert_same_tree(&sandbox.tree(), &before, &format!("{mood:?}"));
    }
}

#[test]
fn a_token_comes_as_argument_input_file_or_variable() {
    let server = Server::start(Behavior::Good);
    let token = server.token();
    let dry = |sandbox: &Sandbox, more: &[&str], env: &[(&str, &str)]| {
        let release = sandbox.path("release");
        let mut args = vec!["join-worker", &server.url, "--offline-dir", &release, "--dry-run"];
        args.extend(more);
        sandbox.run_with(&args, env)
    };
    let sandbox = Sandbox::new();
    sandbox.beside("token", &format!("{token}\n"), 0o600);
    dry(&sandbox, &["--token-file", &sandbox.path("token")], &[]).ended(0);
    dry(&sandbox, &[], &[("K3S_TOKEN", &token)]).ended(0);
    let missing = dry(&sandbox, &[], &[]).ended(2);
    assert!(missing.err.contains("TOKEN_MISSING"), "{}", missing.err);
    let mut command = sandbox.command(&[
        "join-worker",
        &server.url,
        "-",
        "--offline-dir",
        &sandbox.path("release"),
        "--dry-run",
    ]);
    command.stdin(std::fs::File::open(sandbox.path("token")).unwrap());
    crate::support::run_output(command.output().unwrap()).ended(0);
    assert!(!server.asked("/v1-k3s/client-kubelet.crt"), "a dry run reserves no name");
}

#[test]
fn a_join_that_fails_after_the_name_was_reserved_can_be_repeated() {
    let (sandbox, server) = (Sandbox::new(), Server::start(Behavior::Good));
    let before = sandbox.tree();
    sandbox.beside("release/k3s-airgap-images-amd64.tar", "damaged", 0o644);
    let said = join(&sandbox, &server.url, &server.token(), &[]).ended(6);
    assert!(said.err.contains("the name stays reserved"), "{}", said.err);
    let password = sandbox.read("/etc/rancher/node/password");
    assert_eq!(password.trim().len(), 32);
    sandbox.beside("release/k3s-airgap-images-amd64.tar", "images", 0o644);
    join(&sandbox, &server.url, &server.token(), &[]).ended(0);
    assert_eq!(sandbox.read("/etc/rancher/node/password"), password);
    sandbox.run(&["uninstall", "--yes"]).ended(0);
    assert_same_tree(&sandbox.tree(), &before, "");
}

#[test]
fn without_a_terminal_and_yes_nothing_is_reserved() {
    let (sandbox, server) = (Sandbox::new(), Server::start(Behavior::Good));
    let release = sandbox.path("release");
    sandbox
        .run(&["join-worker", &server.url, &server.token(), "--offline-dir", &release])
        .ended(11);
    assert!(!server.asked("/v1-k3s/client-kubelet.crt"));
}

#[test]
fn a_worker_is_never_newer_than_its_server() {
    let (sandbox, server) = (Sandbox::new(), Server::start(Behavior::Good));
    let said =
        join(&sandbox, &server.url, &server.token(), &["--k3s-version", "v1.37.0+k3s1"]).ended(3);
    assert!(said.err.contains("VERSION_SKEW"), "{}", said.err);
}

#[test]
fn node_type_agent_joins_by_environment() {
    let (sandbox, server) = (Sandbox::new(), Server::start(Behavior::Good));
    let release = sandbox.path("release");
    let env =
        [("NODE_TYPE", "agent"), ("K3S_URL", server.url.as_str()), ("K3S_TOKEN", &server.token())];
    sandbox
        .run_with(&["install-server", "--offline-dir", &release, "--yes", "--timeout", "20s"], &env)
        .ended(0);
    assert!(sandbox.read("/etc/systemd/system/k3s-agent.service").contains("k3s agent"));
}

#[test]
fn killed_after_every_write_of_the_journal_a_join_resumes() {
    let server = Server::start(Behavior::Good);
    let points = each_kill_point(|at| {
        let sandbox = Sandbox::new();
        let before = sandbox.tree();
        let (release, token) = (sandbox.path("release"), server.token());
        let args = [
            "join-worker",
            &server.url,
            &token,
            "--offline-dir",
            &release,
            "--yes",
            "--timeout",
            "20s",
        ];
        if sandbox.run_with(&args, &[("PIPEOPS_KILL_AT", &at.to_string())]).code == 0 {
            return false;
        }
        let password = sandbox.read("/etc/rancher/node/password");
        sandbox.run(&args).ended(0);
        assert!(
            password.is_empty() || sandbox.read("/etc/rancher/node/password") == password,
            "killed after write {at}"
        );
        sandbox.run(&["uninstall", "--yes"]).ended(0);
        assert_same_tree(&sandbox.tree(), &before, &format!("killed after write {at}"));
        true
    });
    assert!(points > 20, "the run was killed at {points} points");
}

#[test]
fn what_depends_on_the_version_waits_for_the_servers() {
    // cgroup v1 is nothing to a server of 1.34; here it runs 1.36, so the finding comes, but only
    // once that is known
    let (sandbox, server) = (Sandbox::new(), Server::start(Behavior::Good));
    std::fs::remove_file(sandbox.root().join("sys/fs/cgroup/cgroup.controllers")).unwrap();
    sandbox.put("/proc/cgroups", "#subsys_name\thierarchy\tnum_cgroups\tenabled\ncpu\t1\t1\t1\ncpuset\t2\t1\t1\nmemory\t3\t1\t1\npids\t4\t1\t1\n");
    let said = join(&sandbox, &server.url, &server.token(), &[]).ended(3);
    assert!(said.err.contains("CGROUP_V1_UNSUPPORTED"), "{}", said.err);
    assert!(server.asked("/version"), "the server was asked first");
    // a version that was named is held against what the directory holds
    let said =
        join(&sandbox, &server.url, &server.token(), &["--k3s-version", "v1.34.1+k3s1"]).ended(6);
    assert!(said.err.contains("OFFLINE_VERSION"), "{}", said.err);
}

#[test]
fn a_worker_that_is_up_is_content_with_an_expired_token() {
    let (sandbox, server) = (Sandbox::new(), Server::start(Behavior::Good));
    join(&sandbox, &server.url, &server.token(), &[]).ended(0);
    server.expired.store(true, std::sync::atomic::Ordering::Relaxed);
    let again = join(&sandbox, &server.url, &server.token(), &[]).ended(0);
    assert!(again.out.contains("nothing to do"), "{}", again.err);
}
