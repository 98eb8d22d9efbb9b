//! What the gateway and the agent say to clients of Kubernetes: refusals that they can read,
//! headers that hold here, many watches.

use std::time::{Duration, Instant};

use pipeops::control_plane::routes::RequiredAuth;
use reqwest::{Client, Response};
use serde_json::{Value, json};

use crate::control_plane::ControlPlane;
use crate::world::{World, serve_kube};

/// Checks that an answer is what kubectl shows the message of, and gives it.
async fn status_of(answer: Response, status: u16, code: &str) -> Value {
    let head = format!("{answer:?}");
    assert_eq!(answer.status(), status, "{code}: {head}");
    assert_eq!(answer.headers()["content-type"], "application/json", "{head}");
    assert_eq!(answer.headers().contains_key("www-authenticate"), status == 401, "{head}");
    let text = answer.text().await.unwrap();
    let body: Value =
        serde_json::from_str(&text).unwrap_or_else(|_| panic!("{code}: {head}: {text}"));
    assert_eq!(
        (&body["kind"], &body["apiVersion"], &body["status"]),
        (&json!("Status"), &json!("v1"), &json!("Failure")),
        "{body}"
    );
    assert_eq!(
        (&body["code"], &body["details"]["causes"][0]["reason"]),
        (&json!(status), &json!(code)),
        "{body}"
    );
    assert!(
        body["message"].as_str().is_some_and(
            |m| m.starts_with(body["details"]["causes"][0]["message"].as_str().unwrap())
        ),
        "{body}"
    );
    body
}

fn http1(control_plane: &ControlPlane) -> Client {
    let ca =
        ControlPlane::stored(&control_plane.sandbox)["ca_certificate"].as_str().unwrap().to_owned();
    Client::builder()
        .tls_certs_only([reqwest::Certificate::from_pem(ca.as_bytes()).unwrap()])
        .no_proxy()
        .http1_only()
        .build()
        .unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_of_kubernetes_can_read_why_it_is_refused() {
    let control_plane = ControlPlane::with(&[]);
    let (_kube, address) = serve_kube().await;
    let (agent, cluster) = control_plane.agent(address).await;
    let runner = control_plane.runner("operator").await;
    let token = runner["token"].as_str().unwrap();
    let answer = control_plane
        .ask(
            "POST",
            &format!("/api/v1/clusters/{cluster}/kubeconfig"),
            token,
            json!({"namespaces": ["beta"]}),
        )
        .await;
    let config: Value = serde_json::from_str(&answer.text().await.unwrap()).unwrap();
    let beta = config["users"][0]["user"]["token"].as_str().unwrap();
    let k8s = format!("/clusters/{cluster}/k8s");
    let (enrolment, _) = control_plane.enrol();
    let long = "x".repeat(20_000);
    let long = [("x-long", long.as_str())];
    // method, path, token, headers of the client; status, code, reason, and a word of the message
    type Case<'a> =
        (&'a str, String, &'a str, &'a [(&'a str, &'a str)], u16, &'a str, &'a str, &'a str);
    let cases: Vec<Case> = vec![
        ("GET", format!("{k8s}/api"), "", &[], 401, "token_needed", "Unauthorized", "bearer token"),
        (
            "GET",
            format!("{k8s}/api"),
            "por_wrong",
            &[],
            401,
            "token_unknown",
            "Unauthorized",
            "wrong, revoked",
        ),
        (
            "GET",
            format!("{k8s}/api/v1/pods"),
            &enrolment,
            &[],
            403,
            "forbidden",
            "Forbidden",
            "something else",
        ),
        (
            "GET",
            "/clusters/c-0/k8s/apis".into(),
            token,
            &[],
            404,
            "not_found",
            "NotFound",
            "no cluster c-0",
        ),
        (
            "GET",
            "/clusters/c-0/k8s".into(),
            token,
            &[],
            404,
            "not_found",
            "NotFound",
            "no cluster c-0",
        ),
        (
            "GET",
            format!("{k8s}/api/v1/namespaces/production/pods"),
            beta,
            &[],
            403,
            "namespace_scope",
            "Forbidden",
            "than production: beta",
        ),
        (
            "GET",
            format!("{k8s}/api/v1/pods"),
            beta,
            &[],
            403,
            "namespace_scope",
            "Forbidden",
            "namespaces alone (beta)",
        ),
        (
            "DELETE",
            format!("{k8s}/api/v1/namespaces/beta"),
            beta,
            &[],
            403,
            "namespace_scope",
            "Forbidden",
            "namespaces alone (beta)",
        ),
        (
            "GET",
            format!("{k8s}/api/v1/pods"),
            token,
            &[("impersonate-user", "root")],
            400,
            "identity_header",
            "BadRequest",
            "leave out --as",
        ),
        (
            "GET",
            format!("{k8s}/api"),
            token,
            &[("impersonate-group", "system:masters")],
            400,
            "identity_header",
            "BadRequest",
            "--as",
        ),
        (
            "GET",
            format!("{k8s}/api/v1/namespaces/beta/services/x/proxy/"),
            token,
            &[],
            403,
            "proxy_refused",
            "Forbidden",
            "port-forward",
        ),
        (
            "GET",
            format!("{k8s}/api/v1/watch/pods"),
            token,
            &[],
            400,
            "bad_path",
            "BadRequest",
            "watch=true",
        ),
        (
            "GET",
            format!("{k8s}/api/v1/namespaces/beta/pods/unauthorized"),
            token,
            &[],
            503,
            "kubernetes_credential",
            "ServiceUnavailable",
            "minted",
        ),
        (
            "GET",
            format!("{k8s}/api/v1/namespaces/beta/pods/redirect"),
            token,
            &[],
            502,
            "redirect_refused",
            "InternalError",
            "somewhere else",
        ),
        ("GET", format!("{k8s}/api"), token, &long, 431, "headers_too_large", "", "16 KiB"),
    ];
    // whatever is asked for, the answer is what every client decodes
    let accepts = [
        "application/json",
        "application/vnd.kubernetes.protobuf,application/json",
        "application/json;as=Table;v=v1;g=meta.k8s.io,application/json",
        "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList,application/json",
        "application/json, */*;stream=watch",
    ];
    let client = http1(&control_plane);
    let ask = |method: &str, path: &str, token: &str, headers: &[(&str, &str)]| {
        let request =
            client.request(method.parse().unwrap(), format!("{}{path}", control_plane.url));
        let request = if token.is_empty() { request } else { request.bearer_auth(token) };
        headers.iter().fold(request, |request, (name, value)| request.header(*name, *value)).send()
    };
    for (method, path, token, headers, status, code, reason, word) in &cases {
        for accept in accepts {
            let headers: Vec<(&str, &str)> =
                headers.iter().copied().chain([("accept", accept)]).collect();
            let body =
                status_of(ask(method, path, token, &headers).await.unwrap(), *status, code).await;
            assert_eq!(body["reason"].as_str().unwrap_or_default(), *reason, "{body}");
            assert!(body["message"].as_str().unwrap().contains(word), "{body}");
        }
    }
    // of discovery kubectl reads no body: it shows the warning
    let refused = ask("GET", &format!("{k8s}/api"), "por_wrong", &[]).await.unwrap();
    assert!(
        refused.headers()["warning"].to_str().unwrap().starts_with("299 - \"the token is wrong"),
        "{refused:?}"
    );
    for path in ["/apis", "/api/v1", "/apis/apps/v1", "/openapi/v3", "/version"] {
        let refused = ask("GET", &format!("{k8s}{path}"), token, &[("impersonate-user", "root")])
            .await
            .unwrap();
        assert!(
            refused.headers()["warning"].to_str().unwrap().contains("leave out --as"),
            "{refused:?}"
        );
    }
    assert!(
        !ask("GET", &format!("{k8s}/api/v1/pods"), "por_wrong", &[])
            .await
            .unwrap()
            .headers()
            .contains_key("warning")
    );
    // an upgrade that is refused is read as well: exec in both of its protocols
    let exec = format!("{k8s}/api/v1/namespaces/production/pods/p/exec?command=sh");
    let upgrade = |protocol| [("connection", "Upgrade"), ("upgrade", protocol)];
    for protocol in ["SPDY/3.1", "websocket"] {
        status_of(
            ask("POST", &exec, beta, &upgrade(protocol)).await.unwrap(),
            403,
            "namespace_scope",
        )
        .await;
        status_of(
            ask("POST", &exec, "por_wrong", &upgrade(protocol)).await.unwrap(),
            401,
            "token_unknown",
        )
        .await;
    }
    status_of(ask("POST", &exec, token, &upgrade("h2c")).await.unwrap(), 400, "bad_upgrade").await;
    // calls of our own say it in their own words
    let own = control_plane.try_get("/api/v1/clusters/c-0", token).await;
    let own: Value = own.json().await.unwrap();
    assert_eq!((&own["code"], own.get("kind")), (&json!("not_found"), None));
    let own: Value = control_plane
        .ask("GET", &format!("/clusters/{cluster}/api/v1/nothing"), token, json!({}))
        .await
        .json()
        .await
        .unwrap();
    assert_eq!((&own["code"], own.get("kind")), (&json!("not_found"), None));
    // one whose cluster takes its time is not silent
    let begun = Instant::now();
    let slow = ask("GET", &format!("{k8s}/api/v1/namespaces/beta/pods/sleeps?for=8"), token, &[])
        .await
        .unwrap();
    assert!(slow.status() == 200 && begun.elapsed() >= Duration::from_secs(8), "{slow:?}");
    // an agent that is stopped holds its tunnel: that is said soon, and without a Retry-After, with
    // which clients go on in silence
    let pid = nix::unistd::Pid::from_raw(agent.child.id().try_into().unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGSTOP).unwrap();
    // its threads stop one after the other: on a busy machine the last of them could still answer
    let stopped =
        nix::sys::wait::waitpid(pid, Some(nix::sys::wait::WaitPidFlag::WUNTRACED)).unwrap();
    assert!(matches!(stopped, nix::sys::wait::WaitStatus::Stopped(..)), "{stopped:?}");
    for (method, path, headers) in [
        ("GET", format!("{k8s}/api/v1/pods?watch=1"), vec![]),
        ("POST", exec.clone(), upgrade("SPDY/3.1").to_vec()),
    ] {
        let begun = Instant::now();
        let answer = ask(method, &path, token, &headers).await.unwrap();
        assert!(begun.elapsed() < Duration::from_secs(9), "{:?}", begun.elapsed());
        assert!(!answer.headers().contains_key("retry-after"), "{answer:?}");
        let body = status_of(answer, 504, "agent_silent").await;
        assert_eq!(body["reason"], "Timeout", "{body}");
    }
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGCONT).unwrap();
    drop(agent);
    let begun = Instant::now();
    let answer = ask("GET", &format!("{k8s}/api/v1/pods"), token, &[]).await.unwrap();
    assert!(
        begun.elapsed() < Duration::from_secs(9) && !answer.headers().contains_key("retry-after"),
        "{:?} {answer:?}",
        begun.elapsed()
    );
    status_of(answer, 503, "agent_offline").await;
    control_plane
        .sandbox
        .subcommand(&["control-plane", "runner", "revoke", runner["id"].as_str().unwrap()])
        .ended(0);
    status_of(ask("GET", &format!("{k8s}/api"), token, &[]).await.unwrap(), 401, "token_unknown")
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_and_fifty_watches_leave_their_user_everything_else() {
    let control_plane = ControlPlane::with(&[]);
    let (_kube, address) = serve_kube().await;
    let (_agent, cluster) = control_plane.agent(address).await;
    let answer = control_plane
        .ask(
            "POST",
            &format!("/api/v1/clusters/{cluster}/kubeconfig"),
            &control_plane.admin,
            json!({}),
        )
        .await;
    let config: Value = serde_json::from_str(&answer.text().await.unwrap()).unwrap();
    let token = config["users"][0]["user"]["token"].as_str().unwrap();
    let k8s = format!("/clusters/{cluster}/k8s");
    // one after the other and all on one HTTP/2 connection, as a tool written in Go holds them; and
    // as many by HTTP/1.1
    let client = http1(&control_plane);
    let mut held = Vec::new();
    for n in 0..150 {
        let path =
            format!("{k8s}/apis/group{n}.example/v1/things?allowWatchBookmarks=true&watch=true");
        let client = if n % 3 == 0 { &client } else { &control_plane.client };
        let watch = client
            .get(format!("{}{path}", control_plane.url))
            .bearer_auth(token)
            .send()
            .await
            .unwrap();
        assert_eq!(watch.status(), 200, "watch {n}");
        held.push(watch);
    }
    // and logs that are followed
    for _ in 0..20 {
        let path = format!("{k8s}/api/v1/namespaces/beta/pods/p/log?follow=true&watch=1");
        let log = control_plane
            .client
            .get(format!("{}{path}", control_plane.url))
            .bearer_auth(token)
            .send()
            .await
            .unwrap();
        assert_eq!(log.status(), 200);
        held.push(log);
    }
    let begun = Instant::now();
    for n in 0..40 {
        let client = if n % 2 == 0 { &client } else { &control_plane.client };
        let pods = client
            .get(format!("{}{k8s}/api/v1/namespaces/beta/pods", control_plane.url))
            .bearer_auth(token)
            .send()
            .await
            .unwrap();
        assert_eq!(pods.status(), 200, "{n}");
    }
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn headers_of_an_answer_hold_on_the_way_that_it_came() {
    let control_plane = ControlPlane::with(&[]);
    let (kube, address) = serve_kube().await;
    let (_agent, cluster) = control_plane.agent(address).await;
    let client = Client::builder()
        .tls_certs_only([reqwest::Certificate::from_pem(
            ControlPlane::stored(&control_plane.sandbox)["ca_certificate"]
                .as_str()
                .unwrap()
                .as_bytes(),
        )
        .unwrap()])
        .no_proxy()
        .redirect(reqwest::redirect::Policy::none())
        .build()
        .unwrap();
    let ask = async |method: &str, query: &[(&str, &str)]| {
        let query: String =
            url::form_urlencoded::Serializer::new(String::new()).extend_pairs(query).finish();
        let url = format!(
            "{}/clusters/{cluster}/k8s/api/v1/namespaces/beta/pods/answers?{query}",
            control_plane.url
        );
        client
            .request(method.parse().unwrap(), url)
            .bearer_auth(&control_plane.admin)
            .send()
            .await
            .unwrap()
    };
    let here = format!("/clusters/{cluster}/k8s");
    // something was made, and the answer says so: where it is said to be is told where that can be
    // said from here
    for (location, expected) in [
        ("https://10.0.0.5:6443/api/v1/namespaces/beta/pods/x", None),
        ("http://elsewhere.test/", None),
        ("//elsewhere.test/api", None),
        ("pods/x", None),
        (
            "/api/v1/namespaces/beta/pods/x?a=b",
            Some(format!("{here}/api/v1/namespaces/beta/pods/x?a=b")),
        ),
        ("/api/../../../api/v1/tokens", None),
        ("/api/%2e%2e/tokens", None),
        ("/\\elsewhere.test/", None),
    ] {
        for status in ["200", "201", "202"] {
            let answer = ask(
                "POST",
                &[("status", status), ("location", location), ("content-location", location)],
            )
            .await;
            assert_eq!(answer.status().as_str(), status, "{location}");
            for name in ["location", "content-location"] {
                let told = answer.headers().get(name).map(|v| v.to_str().unwrap().to_owned());
                assert_eq!(told, expected, "{status} {name} {location}");
            }
            assert_eq!(answer.json::<Value>().await.unwrap(), json!({"made": true}));
        }
        // a redirect to elsewhere goes to nobody
        for status in ["301", "302", "303", "307", "308"] {
            let answer = ask("GET", &[("status", status), ("location", location)]).await;
            match &expected {
                Some(place) => assert_eq!(
                    (answer.status().as_str(), answer.headers()["location"].to_str().unwrap()),
                    (status, place.as_str())
                ),
                None => drop(status_of(answer, 502, "redirect_refused").await),
            }
        }
    }
    // what a server says to a browser about its own name is not said here; what it says to the
    // caller is
    let dropped = [
        ("set-cookie", "a=b"),
        ("set-cookie2", "a=b"),
        ("alt-svc", "h3=\"elsewhere.test:443\""),
        ("strict-transport-security", "max-age=1"),
        ("clear-site-data", "\"*\""),
        ("refresh", "0; url=https://elsewhere.test/"),
        ("access-control-allow-origin", "*"),
        ("access-control-allow-credentials", "true"),
        ("link", "<https://elsewhere.test/>; rel=preload"),
        ("report-to", "{}"),
        ("service-worker-allowed", "/"),
        ("connection", "x-private"),
        ("x-private", "1"),
        ("proxy-authenticate", "Basic"),
        ("keep-alive", "timeout=5"),
    ];
    let kept = [
        ("warning", "299 - \"v1 Thing is deprecated\""),
        ("date", "Sun, 06 Nov 1994 08:49:37 GMT"),
        ("etag", "\"7\""),
        ("vary", "Accept"),
        ("audit-id", "42"),
        ("x-kubernetes-pf-flowschema-uid", "f"),
        ("content-type", "application/json"),
        ("last-modified", "Sun, 06 Nov 1994 08:49:37 GMT"),
    ];
    let all: Vec<(&str, &str)> = dropped.iter().chain(&kept).copied().collect();
    let answer = ask("GET", &all).await;
    for (name, _) in dropped {
        assert!(!answer.headers().contains_key(name), "{name}: {answer:?}");
    }
    for (name, value) in kept {
        assert_eq!(answer.headers().get_all(name).iter().collect::<Vec<_>>(), [value], "{name}");
    }
    for (name, value) in
        [("x-content-type-options", "nosniff"), ("content-security-policy", "sandbox")]
    {
        assert_eq!(answer.headers()[name], value);
    }
    // a length is a length on both ways, for HEAD too; what has no body has none
    assert_eq!(answer.headers()["content-length"], "13");
    let head = ask("HEAD", &[]).await;
    assert_eq!(
        (head.status().as_u16(), &head.headers()["content-length"]),
        (200, &"13".parse().unwrap())
    );
    assert!(head.bytes().await.unwrap().is_empty());
    for status in ["204", "304"] {
        let answer = ask("GET", &[("status", status), ("etag", "\"7\""), ("empty", "")]).await;
        assert_eq!(
            (answer.status().as_str(), &answer.headers()["etag"]),
            (status, &"\"7\"".parse().unwrap())
        );
        assert!(answer.bytes().await.unwrap().is_empty());
    }
    // on the way in: whoever passes it on says so, once, and what was meant for the first server
    // stays there
    let seen = kube.through().pop().unwrap();
    assert_eq!(seen.all("via"), ["1.1 pipeops"]);
    for name in ["forwarded", "x-forwarded-for", "cookie", "te", "connection"] {
        assert!(seen.all(name).is_empty(), "{seen:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_of_the_agent_is_readable_without_a_gateway_too() {
    let world = World::with("watches-per-caller = 1\n", |_| {}).await.up().await;
    let token = world.token("viewer");
    for (path, token, status, code) in [
        ("/k8s/api", "wrong", 401, "unauthorized"),
        ("/k8s", "", 401, "unauthorized"),
        ("/k8s/api/%2e%2e/x", token.as_str(), 400, "bad_path"),
        ("/k8s/api/v1/nodes/n/proxy/logs", token.as_str(), 403, "proxy_refused"),
    ] {
        let (got, body) = world.call("GET", path, token, "", "").await;
        assert_eq!(
            (got, &body["kind"], &body["details"]["causes"][0]["reason"]),
            (status, &json!("Status"), &json!(code)),
            "{path}: {body}"
        );
    }
    // ours are ours
    for (path, token, status, code) in [
        ("/api/v1/status", "wrong", 401, "unauthorized"),
        ("/k8sx", token.as_str(), 404, "not_found"),
    ] {
        let (got, body) = world.call("GET", path, token, "", "").await;
        assert_eq!(
            (got, &body["code"], body.get("kind")),
            (status, &json!(code), None),
            "{path}: {body}"
        );
    }
}

/// Nobody is somebody: no route that needs nobody tells more for a token, a cookie, or the lack of
/// both.
#[tokio::test(flavor = "multi_thread")]
async fn what_anybody_may_call_is_told_of_nobody() {
    let control_plane = ControlPlane::with(&[]);
    let mut routes = 0;
    for route in pipeops::control_plane::routes::table()
        .iter()
        .filter(|route| route.required_auth == RequiredAuth::None)
    {
        let (method, path) = (route.method, route.path);
        routes += 1;
        let path = path.replace("{secret}", "guessed");
        let mut answers = Vec::new();
        for token in ["", "pom_wrong", control_plane.admin.as_str()] {
            for cookie in ["", "__Host-pipeops=guessed"] {
                let request = control_plane
                    .client
                    .request(method.parse().unwrap(), format!("{}{path}", control_plane.url))
                    .header("cookie", cookie)
                    .json(&json!({}));
                let answer = if token.is_empty() { request } else { request.bearer_auth(token) }
                    .send()
                    .await
                    .unwrap();
                let (status, cookies) =
                    (answer.status().as_u16(), answer.headers().contains_key("set-cookie"));
                answers.push((status, cookies, answer.text().await.unwrap()));
            }
        }
        let expected = match path.as_str() {
            "/session" => 400,
            "/frp/handler/guessed" => 404,
            _ => 200,
        };
        assert!(
            answers.iter().all(|a| *a == answers[0] && a.0 == expected && !a.1),
            "{method} {path}: {answers:?}"
        );
        let text = &answers[0].2;
        assert!(
            !text.contains("admin:")
                && !text.contains("\"admin\":true")
                && !text.contains(&control_plane.admin),
            "{path}: {text}"
        );
    }
    assert_eq!(routes, 9);
    // the socket is nobody's namesake: no administrator can be called as it is on record
    let taken = control_plane
        .ask("POST", "/api/v1/admins", &control_plane.admin, json!({"name": "local"}))
        .await;
    assert_eq!(taken.status(), 409);
    // and what only the socket answers is refused to an administrator
    for path in ["/api/v1/backup", "/api/v1/frps"] {
        for token in ["", control_plane.admin.as_str()] {
            assert_eq!(control_plane.try_get(path, token).await.status(), 403, "{path}");
        }
    }
}

/// Names that a terminal would obey, that nobody can see, or that turn the text around them.
#[tokio::test(flavor = "multi_thread")]
async fn a_name_that_hurts_a_terminal_is_refused_and_what_agents_report_is_shown_harmless() {
    let control_plane = ControlPlane::with(&[]);
    let (enrolment, _) = control_plane.enrol();
    let bad = [
        "\u{202e}txt.exe",
        "a\u{200b}b",
        "   ",
        " a",
        "a ",
        "\u{3164}",
        "a\u{2028}b",
        "\u{1b}[2J",
        "a\rb",
        "so\u{ad}ft",
        "\u{2066}x",
        "\u{e000}",
    ];
    for name in bad.iter().copied().chain([&*"x".repeat(64)]) {
        for (path, body) in [
            ("projects", json!({"name": name})),
            ("tokens", json!({"name": name})),
            ("runners", json!({"name": name})),
            ("admins", json!({"name": name})),
        ] {
            let answer = control_plane
                .ask("POST", &format!("/api/v1/{path}"), &control_plane.admin, body)
                .await;
            assert_eq!(answer.status(), 400, "{path} {name:?}");
            let text = answer.text().await.unwrap();
            assert!(
                text.contains("bad_name") && !text.contains(pipeops::base::text::is_unprintable),
                "{text}"
            );
        }
    }
    for good in ["prod eu-1", "Łódź", "東京", "🚀"] {
        control_plane
            .json("POST", "/api/v1/projects", &control_plane.admin, json!({"name": good}))
            .await;
    }
    // what an agent says of itself
    let dir = tempfile::tempdir().unwrap();
    let identity = crate::control_plane::SimulatedAgent::identity(dir.path());
    let plain: Value =
        serde_json::from_str(&crate::control_plane::SimulatedAgent::body(&identity, "m")).unwrap();
    for (pointer, field) in [
        ("/cluster", "name"),
        ("/cluster", "region"),
        ("/cluster", "provider"),
        ("/agent", "name"),
        ("/agent", "hostname"),
        ("/agent", "os"),
        ("/agent", "arch"),
        ("/agent", "version"),
        ("/agent", "labels"),
    ] {
        for name in ["\u{202e}evil", "   ", "\u{1b}]0;title\u{7}"] {
            let mut body = plain.clone();
            body.pointer_mut(pointer).unwrap()[field] =
                if field == "labels" { json!({"zone": name}) } else { name.into() };
            let answer = crate::control_plane::SimulatedAgent::try_register(
                &control_plane.client,
                &control_plane.url,
                &identity,
                &enrolment,
                body.to_string(),
            )
            .await
            .unwrap();
            assert_eq!(answer.status(), 400, "{pointer}/{field} {name:?}");
            assert!(answer.text().await.unwrap().contains("bad_name"));
        }
    }
    let agent =
        crate::control_plane::SimulatedAgent::new(&control_plane, dir.path(), &enrolment).await;
    // what it reports of others' objects is kept as it is, and shown so that it does nothing
    let report = json!({"at": "", "kubernetes": "connected",
        "nodes": [{"name": "vm\u{202e}1", "ready": false, "role": "server\nnode          vm2 ready",
        "version": "v1", "address": "10.0.0.5", "note": "\u{1b}[2J\u{9b}31m\u{200b}"}]});
    let told = control_plane
        .ask("POST", &format!("/api/v1/agents/{}/status", agent.id), &agent.credential, report)
        .await;
    assert_eq!(told.status(), 200);
    let cluster = control_plane.clusters().await["items"][0]["id"].as_str().unwrap().to_owned();
    let text = control_plane
        .sandbox
        .subcommand(&["control-plane", "cluster", "show", &cluster])
        .ended(0)
        .out;
    assert!(
        text.contains("vm\\u{202e}1") && text.contains("\\u{1b}[2J\\u{9b}31m\\u{200b}"),
        "{text}"
    );
    assert_eq!(text.lines().filter(|l| l.starts_with("node ")).count(), 1, "{text}");
    let json = control_plane
        .sandbox
        .subcommand(&["control-plane", "cluster", "show", &cluster, "-o", "json"])
        .ended(0)
        .out;
    let value: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(value["report"]["nodes"][0]["name"], "vm\u{202e}1");
    for shown in [text, json] {
        assert!(
            !shown.contains(|c: char| pipeops::base::text::is_unprintable(c) && c != '\n'),
            "{shown:?}"
        );
    }
    // a cluster is found by its name, blanks and all
    let mut body = plain.clone();
    body["cluster"]["name"] = "prod eu-1 ✓".into();
    let again = crate::control_plane::SimulatedAgent::try_register(
        &control_plane.client,
        &control_plane.url,
        &identity,
        &agent.credential,
        body.to_string(),
    )
    .await
    .unwrap();
    assert_eq!(again.status(), 200);
    let text = control_plane
        .sandbox
        .subcommand(&["control-plane", "cluster", "show", "prod eu-1 ✓"])
        .ended(0)
        .out;
    assert!(text.contains(&cluster), "{text}");
    // in an error as well, and what was typed
    let refused = control_plane.sandbox.subcommand(&[
        "control-plane",
        "cluster",
        "show",
        "x\u{202e}\u{1b}[31m",
    ]);
    let refused = refused.ended(7).err;
    assert!(refused.contains("x\\u{202e}\\u{1b}[31m") && !refused.contains('\u{1b}'), "{refused}");
}

/// A proxy that lets everybody through and counts.
async fn connect_proxy() -> (std::net::SocketAddr, std::sync::Arc<std::sync::Mutex<Vec<String>>>) {
    use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _};
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (address, seen) = (
        listener.local_addr().unwrap(),
        std::sync::Arc::<std::sync::Mutex<Vec<String>>>::default(),
    );
    let kept = seen.clone();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let kept = kept.clone();
            tokio::spawn(async move {
                let mut stream = tokio::io::BufReader::new(stream);
                let mut head = String::new();
                while !head.ends_with("\r\n\r\n") {
                    if stream.read_line(&mut head).await.unwrap_or(0) == 0 {
                        return;
                    }
                }
                let place = head.split(' ').nth(1).unwrap_or_default().to_owned();
                kept.lock().unwrap().push(head.lines().next().unwrap_or_default().to_owned());
                let Ok(mut there) = tokio::net::TcpStream::connect(&place).await else { return };
                stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.unwrap();
                let _ = tokio::io::copy_bidirectional(&mut stream, &mut there).await;
            });
        }
    });
    (address, seen)
}

#[tokio::test(flavor = "multi_thread")]
async fn behind_a_proxy_calls_go_through_it_and_a_tunnel_that_cannot_says_so() {
    let control_plane = ControlPlane::with(&[]);
    let (_kube, kube) = serve_kube().await;
    let (proxy, seen) = connect_proxy().await;
    let (token, pin) = control_plane.enrol();
    let sandbox = crate::support::Sandbox::new();
    crate::world::credential(&sandbox, kube);
    let settings = format!(
        "control-plane-url = \"{}\"\ncontrol-plane-pin = [\"{pin}\"]\nhttps-proxy = \"http://{proxy}\"\n",
        control_plane.url
    );
    sandbox.put("/etc/pipeops/agent.toml", &settings);
    let agent = crate::agent::Agent::start(sandbox, &[("AGENT_TOKEN", &token)]);
    tokio::task::block_in_place(|| agent.until("tunnel up"));
    let asked = seen.lock().unwrap().clone();
    let place = control_plane.url.trim_start_matches("https://");
    // its calls, and nothing but its calls
    assert!(
        !asked.is_empty() && asked.iter().all(|line| *line == format!("CONNECT {place} HTTP/1.1")),
        "{asked:?}"
    );
    // where only the proxy leads out, the way out is named
    let world = World::with("https-proxy = \"http://127.0.0.1:1\"\n", |_| {}).await.up().await;
    world.stop_frps.cancel();
    tokio::task::block_in_place(|| world.agent.until("proxy_only"));
    let ready = tokio::task::block_in_place(|| world.agent.get("/readyz"));
    assert!(ready.contains("proxy_only") && ready.contains("directly"), "{ready}");
}
