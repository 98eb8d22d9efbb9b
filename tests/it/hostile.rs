//! Requests that try to be somebody else, to mean something else, or to smuggle: every row at least
//! ten times, each by name. A recorder stands in front of the Kubernetes API; what the agent
//! refuses never gets there, what it passes carries its own identity.

use crate::world::{RecordedRequest, World};

/// The token's namespace is beta: this word reaches the API in no request.
const FORBIDDEN: &str = "kube-system";
const EVIL: &str = "evil-canary-4711-in-plain-text";

struct HostileRequest {
    name: String,
    bytes: Vec<u8>,
    /// Statuses that are right; 0 stands for a connection that is closed without an answer.
    right: &'static [u16],
}

fn corpus(token: &str) -> Vec<HostileRequest> {
    let mut all = Vec::new();
    let mut add = |row: &str, n: usize, right: &'static [u16], head: String| {
        all.push(HostileRequest { name: format!("{row} {n}"), bytes: head.into_bytes(), right })
    };
    let auth = format!("Authorization: Bearer {token}");
    let get = |target: &str, more: &str| {
        format!("GET {target} HTTP/1.1\r\nHost: agent\r\n{auth}\r\n{more}Connection: close\r\n\r\n")
    };

    // target: only a path, only for us
    let targets = [
        "http://evil.test/k8s/api/v1/namespaces/kube-system/secrets",
        "https://agent/k8s/api/v1/namespaces/kube-system/secrets",
        "http://user:pw@agent/k8s/api/v1/pods",
        "http://169.254.169.254/latest/meta-data",
        "http://127.0.0.1:10250/pods",
        "http://agent@evil.test/k8s/version",
        "ftp://agent/k8s/version",
        "k8s/api/v1/namespaces/kube-system/secrets",
        "*",
        "agent:443",
        "http:///k8s/version",
        "http://[::1]:6443/k8s/version",
    ];
    for (n, target) in targets.iter().enumerate() {
        add("target", n, &[400, 404, 0], get(target, ""));
        let host = [
            "evil@agent",
            "a/b",
            "a, b",
            "a b",
            "a\\b",
            "a?b",
            "a#b",
            "",
            "a\r\nHost: b",
            "http://x",
            "u:p@x",
            "//x",
        ][n];
        let head = format!(
            "GET /k8s/api/v1/namespaces/kube-system/secrets HTTP/1.1\r\nHost: {host}\r\n{auth}\r\nConnection: close\r\n\r\n"
        );
        add("host", n, &[400, 403, 0], head);
        add(
            "connect",
            n,
            &[400, 404, 405, 0],
            format!(
                "CONNECT {} HTTP/1.1\r\nHost: x\r\n{auth}\r\n\r\n",
                ["kube-system:443", "127.0.0.1:6443", "evil.test:80"][n % 3]
            ),
        );
    }

    // path: what is judged is what is sent
    let climbs = [
        "..",
        "%2e%2e",
        "%2E%2E",
        ".%2e",
        "%2e.",
        "..%2f",
        "%2e%2e%2f",
        "%252e%252e",
        "..%5c",
        "..\\",
        "%c0%ae%c0%ae",
        "..;",
        "%00",
        "%2e%2e%00",
        "..%00",
        "%ff",
        "..%c0%af",
    ];
    for (n, climb) in climbs.iter().enumerate() {
        add(
            "climb",
            n,
            &[400, 403, 0],
            get(&format!("/k8s/api/v1/namespaces/beta/{climb}/kube-system/secrets"), ""),
        );
        add(
            "climb in front",
            n,
            &[400, 401, 403, 404, 0],
            get(&format!("/{climb}/k8s/api/v1/namespaces/kube-system/secrets"), ""),
        );
        add(
            "climb out",
            n,
            &[400, 403, 0],
            get(&format!("/k8s/{climb}/api/v1/namespaces/kube-system/secrets"), ""),
        );
    }
    let doubles =
        ["//", "///", "/./", "/%2f", "%2f", "%2F", "%5c", "\\", "/.//", "//./", "/%2e/", "/%2F/"];
    for (n, double) in doubles.iter().enumerate() {
        add(
            "double slash",
            n,
            &[400, 403, 0],
            get(&format!("/k8s/api/v1/namespaces{double}kube-system{double}secrets"), ""),
        );
        add(
            "prefix",
            n,
            &[400, 401, 403, 404, 0],
            get(&format!("/k8s{double}api{double}v1{double}secrets"), ""),
        );
    }
    for n in 0..12_usize {
        let long = "a".repeat(4100 + n * 100);
        add(
            "long path",
            n,
            &[400, 414, 431],
            get(&format!("/k8s/api/v1/namespaces/kube-system/{long}"), ""),
        );
        let sub = [
            "pods/p/proxy",
            "services/s/proxy/x",
            "services/https:s:443/proxy/",
            "pods/p:80/proxy/run",
            "pods/p/proxy/exec",
        ][n % 5];
        add("proxy", n, &[403], get(&format!("/k8s/api/v1/namespaces/beta/{sub}?n={n}"), ""));
        let node = [
            "nodes/n/proxy",
            "nodes/n:10250/proxy/run",
            "proxy/nodes/n",
            "watch/namespaces/kube-system/secrets",
            "watch/secrets",
        ][n % 5];
        add("node proxy", n, &[400, 403], get(&format!("/k8s/api/v1/{node}?n={n}"), ""));
        let outside = [
            "/api/v1/secrets",
            "/api/v1/namespaces",
            "/api/v1/namespaces/kube-system",
            "/api/v1/namespaces/kube-system/secrets/x",
            "/apis/apps/v1/deployments",
            "/api/v1/nodes",
            "/apis/rbac.authorization.k8s.io/v1/clusterroles",
            "/metrics",
            "/logs/kube-system",
            "/debug/pprof",
            "/api/v1/namespaces/beta/status",
            "/api/v1/namespaces/beta/finalize",
        ][n];
        let method = if outside.starts_with("/api/v1/namespaces/beta") { "PUT" } else { "GET" };
        add(
            "other namespace",
            n,
            &[403],
            get(&format!("/k8s{outside}"), "").replacen("GET", method, 1),
        );
    }

    // framing
    let framings = [
        "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
        "Transfer-Encoding: chunked\r\nContent-Length: 5\r\n",
        "Content-Length: 5\r\nContent-Length: 6\r\n",
        "Content-Length: 5, 6\r\n",
        "Content-Length: +5\r\n",
        "Content-Length: -1\r\n",
        "Content-Length: 0x5\r\n",
        "Content-Length: 5 5\r\n",
        "Content-Length: \r\n",
        "Content-Length: 99999999999999999999999\r\n",
        "Transfer-Encoding: gzip, chunked\r\n",
        "Transfer-Encoding: chunked, chunked\r\n",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n",
        "Transfer-Encoding: xchunked\r\n",
        "Transfer-Encoding : chunked\r\n",
        "Transfer-Encoding: chunked\r\n folded: x\r\n",
        "X-Fold: a\r\n b\r\n",
        "X-Bare: a\rb\r\n",
        "X Space: a\r\n",
        "X-Nul: a\0b\r\n",
        ": empty\r\n",
    ];
    for (n, framing) in framings.iter().enumerate() {
        let smuggled = format!(
            "0\r\n\r\nGET /k8s/api/v1/namespaces/{FORBIDDEN}/secrets HTTP/1.1\r\nHost: agent\r\n{auth}\r\nImpersonate-User: {EVIL}\r\n\r\n"
        );
        let head = format!(
            "POST /k8s/api/v1/namespaces/beta/pods HTTP/1.1\r\nHost: agent\r\n{auth}\r\n{framing}\r\n{smuggled}"
        );
        // length and chunked together: hyper reads it as chunked, as RFC 9112 §6.3 allows, and what
        // goes on is framed anew; the request behind it is judged as one of its own
        add("framing", n, if n < 2 { &[400, 200] } else { &[400, 0] }, head);
    }

    // identity
    let names = [
        "Impersonate-User",
        "impersonate-user",
        "IMPERSONATE-USER",
        "Impersonate-Group",
        "impersonate-GROUP",
        "Impersonate-Uid",
        "Impersonate-Extra-scopes",
        "Impersonate-Extra-pipeops.io%2fsubject",
        "impersonate-extra-x",
        "Impersonatepersonate-User",
        "Impersonate_User",
        "Impersonate_Group",
    ];
    for (n, name) in names.iter().enumerate() {
        add(
            "impersonation",
            n,
            &[400],
            get("/k8s/api/v1/namespaces/beta/pods", &format!("{name}: {EVIL}\r\n")),
        );
        add("impersonation named by Connection", n, &[400], {
            format!(
                "GET /k8s/api/v1/namespaces/beta/pods HTTP/1.1\r\nHost: agent\r\n{auth}\r\n{name}: {EVIL}\r\nConnection: close, {name}\r\n\r\n"
            )
        });
        add(
            "doubled impersonation",
            n,
            &[400],
            get(
                "/k8s/api/v1/namespaces/beta/pods",
                &format!("{name}: {EVIL}\r\n{name}: {EVIL}2\r\n"),
            ),
        );
        let named = [
            "authorization",
            "Authorization",
            "impersonate-user",
            "Impersonate-Group",
            "AUTHORIZATION",
            "impersonate-extra-x",
        ][n % 6];
        add("identity named by Connection", n, &[400], {
            format!(
                "GET /k8s/api/v1/namespaces/beta/pods?n={n} HTTP/1.1\r\nHost: agent\r\n{auth}\r\nConnection: close, {named}\r\n\r\n"
            )
        });
        let protocol = format!("base64url.bearer.authorization.k8s.io.ZXZpbA{n}");
        let mixed = if n % 2 == 0 {
            format!("v4.channel.k8s.io, {protocol}")
        } else {
            protocol.replace("bearer", "BEARER")
        };
        add("token in a WebSocket protocol", n, &[400], {
            format!(
                "GET /k8s/api/v1/namespaces/beta/pods/p/exec HTTP/1.1\r\nHost: agent\r\n{auth}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Protocol: {mixed}\r\n\r\n"
            )
        });
        let upgrade = [
            "h2c",
            "TLS/1.0",
            "websocket, h2c",
            "SPDY/2",
            "foo",
            "HTTP/2.0",
            "SPDY/3.1, websocket",
            "web socket",
            "IRC",
            "h2",
            "spdy",
            "websocket/13",
        ][n];
        add(
            "upgrade",
            n,
            &[400],
            format!(
                "GET /k8s/api/v1/namespaces/beta/pods/p/exec HTTP/1.1\r\nHost: agent\r\n{auth}\r\nConnection: Upgrade\r\nUpgrade: {upgrade}\r\n\r\n"
            ),
        );
        // dropped, and served as who the caller is
        let dropped = [
            "X-Remote-User",
            "X-Remote-Group",
            "X-Remote-Extra-x",
            "X-Forwarded-For",
            "X-Forwarded-User",
            "Forwarded",
            "Via",
            "Cookie",
            "Proxy-Authorization",
            "X-Real-Ip",
            "X_Remote_User",
            "Audit-ID",
        ][n];
        add(
            "header of a proxy",
            n,
            &[200],
            get(
                &format!("/k8s/api/v1/namespaces/beta/pods?n={n}"),
                &format!("{dropped}: {EVIL}\r\n"),
            ),
        );
        add("named by Connection", n, &[200], {
            format!(
                "GET /k8s/api/v1/namespaces/beta/pods?n={n} HTTP/1.1\r\nHost: agent\r\n{auth}\r\nX-Own-{n}: {EVIL}\r\nConnection: close, x-own-{n}, te\r\nTE: trailers\r\nTrailer: {EVIL}\r\nKeep-Alive: {EVIL}\r\n\r\n"
            )
        });
    }

    // tokens
    let mangled: Vec<String> = vec![
        String::new(),
        "x".into(),
        "a.b.c".into(),
        token.to_uppercase(),
        token[..token.len() - 4].into(),
        format!("{token}.x"),
        token.replacen('.', "..", 1),
        format!("{}.", token.rsplit_once('.').unwrap().0),
        format!("eyJhbGciOiJub25lIn0.{}.", token.split('.').nth(1).unwrap()),
        format!("eyJhbGciOiJIUzI1NiJ9.{}", token.split_once('.').unwrap().1),
        "enrol-planted-canary-4711-in-plain-text".into(),
        "sa-planted-canary-4711-in-plain-text".into(),
    ];
    for (n, wrong) in mangled.iter().enumerate() {
        add(
            "token",
            n,
            &[401, 400],
            format!(
                "GET /k8s/api/v1/namespaces/beta/pods HTTP/1.1\r\nHost: agent\r\nAuthorization: Bearer {wrong}\r\nConnection: close\r\n\r\n"
            ),
        );
        let scheme = ["Basic", "Token", "Digest", "", "Bearer:", "bear"][n % 6];
        add(
            "scheme",
            n,
            &[401, 400],
            format!(
                "GET /k8s/api/v1/namespaces/beta/pods?n={n} HTTP/1.1\r\nHost: agent\r\nAuthorization: {scheme} {token}\r\nConnection: close\r\n\r\n"
            ),
        );
        add(
            "two tokens",
            n,
            &[401],
            format!(
                "GET /k8s/api/v1/namespaces/beta/pods?n={n} HTTP/1.1\r\nHost: agent\r\nAuthorization: Bearer {wrong}\r\n{auth}\r\nConnection: close\r\n\r\n"
            ),
        );
    }
    all
}

fn check(seen: &RecordedRequest) {
    assert_eq!(seen.all("impersonate-user"), ["pipeops:runner"], "{seen:?}");
    assert_eq!(seen.all("impersonate-group"), ["pipeops:deployer"], "{seen:?}");
    assert_eq!(seen.all("impersonate-extra-pipeops.io%2fsubject"), ["runner-1"], "{seen:?}");
    assert_eq!(
        seen.all("authorization"),
        ["Bearer sa-planted-canary-4711-in-plain-text"],
        "{seen:?}"
    );
    let own = ["impersonate-user", "impersonate-group", "impersonate-extra-pipeops.io%2fsubject"];
    for (name, value) in &seen.headers {
        assert!(!name.starts_with("impersonate") || own.contains(&name.as_str()), "{seen:?}");
        assert!(!value.contains(EVIL), "{seen:?}");
    }
    assert!(
        !seen.uri.contains(FORBIDDEN) && !seen.uri.contains("..") && !seen.uri.contains("//"),
        "{seen:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn nothing_hostile_arrives_as_somebody_else_or_for_something_else() {
    let world = World::with("streams-per-caller = 512\n", |_| {}).await.up().await;
    let token = world.control_plane.token(&world.id, "deployer", Some(&["beta"]));
    let corpus = corpus(&token);
    let total = corpus.len();
    assert!(total >= 300, "{total}");
    let mut wrong = Vec::new();
    let mut asks = futures_util::StreamExt::buffer_unordered(
        futures_util::stream::iter(corpus.into_iter().map(|hostile| {
            let world = &world;
            async move {
                let answer = world.raw(&hostile.bytes).await;
                let status =
                    answer.split(' ').nth(1).and_then(|s| s.parse::<u16>().ok()).unwrap_or(0);
                (hostile, status, answer)
            }
        })),
        8,
    );
    while let Some((hostile, status, answer)) = futures_util::StreamExt::next(&mut asks).await {
        if !hostile.right.contains(&status)
            || answer.contains("canary-4711-in-plain-text")
                && !answer.contains("evil-canary-4711-in-plain-text")
        {
            wrong.push(format!(
                "{}: {status}: {}\n  {}",
                hostile.name,
                String::from_utf8_lossy(&hostile.bytes).lines().next().unwrap_or_default(),
                answer.lines().next().unwrap_or_default()
            ));
        }
    }
    let through = world.kube.through();
    through.iter().for_each(check);
    println!(
        "{total} hostile requests, {} reached the API, as the caller that they are",
        through.len()
    );
    assert!(wrong.is_empty(), "{} of {total}:\n{}", wrong.len(), wrong.join("\n"));
    // 12 of each of the two rows that are cleaned and served, the two that are framed anew, and no
    // more
    assert_eq!(through.len(), 26, "{:?}", through.iter().map(|s| &s.uri).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_hundred_odd_and_legitimate_requests_all_pass() {
    let world = World::with("streams-per-caller = 512\n", |_| {}).await.up().await;
    let token = world.control_plane.token(&world.id, "deployer", Some(&["beta", "production"]));
    let mut asks: Vec<(String, String)> = Vec::new();
    for n in 0..10 {
        let mut get = |path: String| asks.push(("GET".into(), path));
        get(format!("/api/v1/namespaces/beta/configmaps/caf%C3%A9-{n}"));
        get(format!("/api/v1/namespaces/beta/configmaps/a:b-{n}"));
        get(format!(
            "/api/v1/namespaces/beta/pods?labelSelector={}%20in%20(a,b)",
            "x".repeat(100 * (n + 1))
        ));
        get(format!(
            "/api/v1/namespaces/production/pods?fieldSelector=status.phase%3DRunning&limit={n}&continue=a%2Bb%3D%3D"
        ));
        get(format!("/apis/apps/v1/namespaces/beta/deployments/web-{n}/scale"));
        get(format!(
            "/apis/rbac.authorization.k8s.io/v1/namespaces/beta/rolebindings/system:x:{n}"
        ));
        get([
            "/api",
            "/apis",
            "/version",
            "/openapi/v2",
            "/openapi/v3",
            "/apis/apps",
            "/apis/apps/v1",
            "/api/v1",
            "/api/",
            "/apis/",
        ][n]
            .into());
        asks.push((
            "PATCH".into(),
            format!(
                "/apis/apps/v1/namespaces/beta/deployments/d{n}?fieldManager=kubectl&force=false"
            ),
        ));
        asks.push(("POST".into(), "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews".into()));
        asks.push((
            ["PUT", "DELETE"][n % 2].into(),
            format!("/api/v1/namespaces/beta/pods/p~{n}!$'()*+,;=@"),
        ));
    }
    assert_eq!(asks.len(), 100);
    for (method, path) in &asks {
        let review = "{\"spec\":{\"resourceAttributes\":{}}}";
        let body = if method == "GET" { "" } else { review };
        let head = format!(
            "{method} /k8s{path} HTTP/1.1\r\nHost: agent\r\nAuthorization: Bearer {token}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
            body.len()
        );
        let answer = world.raw(head.as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{method} {path}: {answer}");
        let seen = world.kube.through().pop().unwrap();
        assert_eq!((&seen.method, &seen.uri), (method, path));
        check(&seen);
    }
}
