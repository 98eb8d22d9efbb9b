//! The page for people: in a real browser, and against callers that use a session that is not
//! theirs.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::browser::Browser;
use crate::control_plane::{ControlPlane, SimulatedAgent, register_many};
use crate::world::serve_kube;

/// A session's cookie and what its page sends with it.
async fn session(control_plane: &ControlPlane, token: &str) -> (String, String) {
    let answer = control_plane.ask("POST", "/session", "", json!({"token": token})).await;
    assert_eq!(answer.status(), 200);
    let set = answer.headers()["set-cookie"].to_str().unwrap().to_owned();
    for attribute in ["__Host-", "Path=/", "Secure", "HttpOnly", "SameSite=Strict"] {
        assert!(set.contains(attribute), "{set}");
    }
    let csrf = answer.json::<Value>().await.unwrap()["csrf"].as_str().unwrap().to_owned();
    (set.split(';').next().unwrap().to_owned(), csrf)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_serves_the_page_that_opened_it_and_nothing_else() {
    let control_plane = ControlPlane::with(&[]);
    let (kube, address) = serve_kube().await;
    let (_agent, cluster) = control_plane.agent(address).await;
    let (cookie, csrf) = session(&control_plane, &control_plane.admin).await;
    let ask = async |method: &str, path: &str, headers: &[(&str, &str)]| {
        let mut request = control_plane
            .client
            .request(method.parse().unwrap(), format!("{}{path}", control_plane.url))
            .header("cookie", &cookie);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        if method == "POST" {
            request = request.json(&json!({}));
        }
        request.send().await.unwrap()
    };
    let ours = [("sec-fetch-site", "same-origin"), ("x-csrf-token", csrf.as_str())];
    assert_eq!(ask("GET", "/api/v1/clusters", &[]).await.status(), 200);
    assert_eq!(ask("POST", "/api/v1/tokens", &ours).await.status(), 201);
    // another page has the cookie sent along, and cannot say the word that ours has
    for headers in [
        &[][..],
        &[("x-csrf-token", "guessed")],
        &[("sec-fetch-site", "same-origin")],
        &[("sec-fetch-site", "cross-site"), ours[1]],
    ] {
        assert_eq!(ask("POST", "/api/v1/tokens", headers).await.status(), 403, "{headers:?}");
    }
    assert_eq!(
        ask("GET", "/api/v1/clusters", &[("sec-fetch-site", "same-site")]).await.status(),
        403
    );
    // what a cluster serves runs in no session: the gateway takes no cookie, and its answers are
    // sandboxed
    let through = format!("/clusters/{cluster}/k8s/api/v1/namespaces/beta/pods");
    let before = kube.through().len();
    let refused = ask("GET", &through, &ours).await;
    assert_eq!(
        (refused.status().as_u16(), refused.headers()["content-security-policy"].to_str().unwrap()),
        (401, "sandbox")
    );
    assert_eq!(kube.through().len(), before);
    // agents' calls and the backup neither
    for path in ["/api/v1/agents/a-0/config", "/api/v1/backup"] {
        assert!(matches!(ask("GET", path, &ours).await.status().as_u16(), 401 | 403), "{path}");
    }
    // what it shows of a cluster it asks as a viewer
    control_plane
        .json(
            "GET",
            &format!("/api/v1/clusters/{cluster}/inside/events"),
            &control_plane.admin,
            json!({}),
        )
        .await;
    assert_eq!(kube.through().pop().unwrap().all("impersonate-group"), ["pipeops:viewer"]);
    let audit = control_plane
        .json(
            "GET",
            &format!("/api/v1/clusters/{cluster}/inside/audit"),
            &control_plane.admin,
            json!({}),
        )
        .await;
    let records = audit["items"].as_array().unwrap();
    assert!(
        records.iter().any(|r| r["path"].as_str().unwrap().starts_with("/api/v1/events")),
        "{audit}"
    );
    assert_eq!(
        control_plane
            .ask(
                "GET",
                &format!("/api/v1/clusters/{cluster}/inside/secrets"),
                &control_plane.admin,
                json!({})
            )
            .await
            .status(),
        404
    );
    // logged out is logged out
    assert_eq!(ask("DELETE", "/session", &ours).await.status(), 200);
    assert_eq!(ask("GET", "/api/v1/clusters", &ours).await.status(), 401);
    // a Runner's session sees what the Runner sees, as long as he is one
    let runner = control_plane.runner_for_nothing("ci").await;
    let (cookie, _) = session(&control_plane, runner["token"].as_str().unwrap()).await;
    let list = async || {
        control_plane
            .client
            .get(format!("{}/api/v1/clusters", control_plane.url))
            .header("cookie", &cookie)
            .send()
            .await
            .unwrap()
    };
    assert_eq!(list().await.json::<Value>().await.unwrap()["items"], json!([]));
    let two = control_plane
        .client
        .get(format!("{}/api/v1/clusters", control_plane.url))
        .header("cookie", format!("{cookie}; {cookie}"))
        .send()
        .await
        .unwrap();
    assert_eq!(two.status(), 401);
    let mut live = control_plane
        .client
        .get(format!("{}/api/v1/changes", control_plane.url))
        .header("cookie", &cookie)
        .send()
        .await
        .unwrap();
    assert!(live.chunk().await.unwrap().is_some());
    control_plane
        .json(
            "DELETE",
            &format!("/api/v1/runners/{}", runner["id"].as_str().unwrap()),
            &control_plane.admin,
            json!({}),
        )
        .await;
    assert_eq!(list().await.status(), 401);
    let ended = tokio::time::timeout(Duration::from_secs(5), async {
        while let Ok(Some(_)) = live.chunk().await {}
    })
    .await;
    assert!(ended.is_ok(), "the live updates go on");
    // nor does an administrator's session outlive the administrator
    let other =
        control_plane.sandbox.subcommand(&["control-plane", "admin", "create", "Ada"]).ended(0).out;
    let (cookie, _) = session(&control_plane, other.trim()).await;
    let list = async || {
        control_plane
            .client
            .get(format!("{}/api/v1/admins", control_plane.url))
            .header("cookie", &cookie)
            .send()
            .await
            .unwrap()
    };
    let admins = list().await.json::<Value>().await.unwrap();
    assert!(!admins.to_string().contains("hash"), "{admins}");
    let id = |name: &str| {
        admins["items"].as_array().unwrap().iter().find(|a| a["name"] == name).unwrap()["id"]
            .as_str()
            .unwrap()
            .to_owned()
    };
    control_plane.sandbox.subcommand(&["control-plane", "admin", "revoke", &id("Ada")]).ended(0);
    assert_eq!(list().await.status(), 401);
    assert_eq!(control_plane.try_get("/api/v1/clusters", other.trim()).await.status(), 401);
    let last = control_plane
        .sandbox
        .subcommand(&["control-plane", "admin", "revoke", &id("first")])
        .ended(7);
    assert!(last.err.contains("LAST_ADMIN"), "{}", last.err);
    // a kubeconfig is no way to log in
    let kubeconfig = control_plane
        .ask(
            "POST",
            &format!("/api/v1/clusters/{cluster}/kubeconfig"),
            &control_plane.admin,
            json!({}),
        )
        .await
        .text()
        .await
        .unwrap();
    let kubeconfig: Value = serde_json::from_str(&kubeconfig).unwrap();
    let answer = control_plane
        .ask("POST", "/session", "", json!({"token": kubeconfig["users"][0]["user"]["token"]}))
        .await;
    assert_eq!(answer.status(), 403);
}

fn log_in(browser: &mut Browser, control_plane: &ControlPlane) {
    browser.open(&format!("{}/", control_plane.url));
    browser.until("document.querySelector('#login')?.hidden === false");
    browser.value("document.querySelector('#token').focus()");
    browser.write(control_plane.admin.trim());
    browser.press("Enter");
    browser.until("!document.querySelector('#fleet').hidden");
}

#[tokio::test(flavor = "multi_thread")]
async fn people_see_the_fleet_live_and_add_a_server_by_keyboard_alone() {
    let control_plane = ControlPlane::with(&[]);
    let pin = control_plane.enrol().1;
    let Some(mut browser) = Browser::start(&pin) else { return };
    let (_kube, address) = serve_kube().await;
    // a name with markup, as control_plane.agent gives
    let (_agent, cluster) = control_plane.agent(address).await;
    browser.size(1200, 800, false);
    browser.open(&format!("{}/", control_plane.url));
    browser.until("document.querySelector('#login')?.hidden === false");
    browser.picture("login");
    // a wrong token is said to be wrong, where it was typed
    browser.value("document.querySelector('#token').focus()");
    browser.write("pom_wrong");
    browser.press("Enter");
    browser.until("document.querySelector('#login-error').textContent.includes('wrong')");
    browser.value("document.querySelector('#token').value = ''");
    log_in(&mut browser, &control_plane);
    browser.until("document.querySelectorAll('#rows tr').length === 1");
    assert_eq!(browser.text("#rows a"), "<b>x</b>");
    assert_eq!(browser.value("document.querySelectorAll('#rows b').length"), 0);
    // the token is in no place that a script could read
    let kept = browser
        .value("[document.cookie, JSON.stringify(localStorage), JSON.stringify(sessionStorage), document.querySelector('#token').value].join('')");
    assert_eq!(kept, "{}{}");
    // who comes is there at once, and who is revoked is shown so
    let dir = tempfile::tempdir().unwrap();
    let token = control_plane.enrol().0;
    let other = SimulatedAgent::new(&control_plane, dir.path(), &token).await;
    browser.until("document.querySelectorAll('#rows tr').length === 2");
    let theirs = control_plane.cluster_of(&other).await["id"].clone();
    control_plane
        .json(
            "POST",
            &format!("/api/v1/clusters/{}/revoke", theirs.as_str().unwrap()),
            &control_plane.admin,
            json!({}),
        )
        .await;
    browser.until(
        "[...document.querySelectorAll('#rows .state')].some((s) => s.textContent === 'revoked')",
    );
    // a server is added without a mouse: tab to the button, Enter, Enter
    browser.value("document.querySelector('.brand').focus()");
    browser.press("Tab");
    assert_eq!(browser.value("document.activeElement.id"), "add");
    browser.press("Enter");
    browser.until("document.querySelector('#adding').open && document.querySelector('#project').options.length === 1");
    browser.value("document.querySelector('#label').focus()");
    browser.press("Enter");
    browser.until("document.querySelector('#install').textContent.includes('poe_')");
    let line = browser.text("#install");
    assert!(
        line.starts_with("echo poe_")
            && line.contains(&format!(
                "--control-plane-url {} --control-plane-pin {pin}",
                control_plane.url
            )),
        "{line}"
    );
    assert_eq!(browser.value("document.activeElement.id"), "copy");
    browser.picture("add");
    browser.press("Escape");
    browser.until("!document.querySelector('#adding').open");
    browser.until("document.querySelector('#install').textContent === ''");
    // in groups, and as before
    let group = |browser: &mut Browser, key: &str| {
        browser.value(&format!(
            "(() => {{ const group = document.querySelector('#group'); group.value = '{key}'; \
             group.dispatchEvent(new Event('change')); }})()"
        ));
    };
    group(&mut browser, "provider");
    browser.until("document.querySelectorAll('#rows tr.group').length === 2");
    let first = browser.text("#rows tr.group");
    assert_eq!(first, "provider not known: 1");
    group(&mut browser, "");
    browser.until("document.querySelectorAll('#rows tr').length === 2");
    // one cluster in depth
    browser.value("document.querySelector('#rows a').focus()");
    browser.press("/");
    assert_eq!(browser.value("document.activeElement.id"), "find");
    browser.write("online");
    browser.until("document.querySelectorAll('#rows tr').length === 1");
    browser.value("document.querySelector('#rows a').focus()");
    browser.press("Enter");
    browser.until("document.querySelector('#cluster-title').textContent === '<b>x</b>'");
    browser.until("document.querySelector('#audit table')");
    let facts = browser.text("#facts");
    assert!(facts.contains(&cluster) && facts.contains("operator"), "{facts}");
    // narrow and dark: nothing stands out of the screen
    for (width, dark) in [(360, false), (360, true), (1200, true), (1200, false)] {
        browser.size(width, 800, dark);
        for hash in ["#/", &format!("#/c/{cluster}")] {
            browser.value(&format!("location.hash = {hash:?}"));
            let there = if hash == "#/" {
                "!document.querySelector('#fleet').hidden"
            } else {
                "document.querySelector('#audit table')"
            };
            browser.until(there);
            browser.picture(&format!(
                "{}-{width}-{}",
                if hash == "#/" { "fleet" } else { "cluster" },
                if dark { "dark" } else { "light" }
            ));
            let wide = browser.value("document.documentElement.scrollWidth");
            assert!(wide.as_u64().unwrap() <= u64::from(width), "{hash} at {width}: {wide}");
        }
    }
    // a restart of the control plane ends the session, and the page says so and lets people in
    // again
    browser.content();
    let mut control_plane = control_plane;
    control_plane.kill_and_restart();
    browser.until("!document.querySelector('#login').hidden");
    log_in(&mut browser, &control_plane);
    browser.until("document.querySelectorAll('#rows tr').length === 2");
    browser.content();
}

/// Who falls silent is judged after 45 s; from then on people have it within five.
#[tokio::test(flavor = "multi_thread")]
async fn a_verdict_of_offline_is_on_the_page_within_seconds() {
    let control_plane = ControlPlane::with(&[]);
    let (token, pin) = control_plane.enrol();
    let Some(mut browser) = Browser::start(&pin) else { return };
    let dir = tempfile::tempdir().unwrap();
    let silent = SimulatedAgent::new(&control_plane, dir.path(), &token).await;
    log_in(&mut browser, &control_plane);
    browser.until("document.querySelectorAll('#rows .state.online').length === 1");
    let begun = Instant::now();
    loop {
        let state = control_plane.cluster_of(&silent).await["state"].clone();
        if state == "offline" {
            break;
        }
        assert!(begun.elapsed() < Duration::from_secs(90), "{state}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let verdict = Instant::now();
    browser.until("document.querySelectorAll('#rows .state.offline').length === 1");
    println!("offline is on the page {:.1} s after the verdict", verdict.elapsed().as_secs_f32());
    assert!(verdict.elapsed() < Duration::from_secs(5));
    browser.content();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_clusters_are_a_page_like_any_other() {
    let control_plane = ControlPlane::with(&[]);
    let pin = control_plane.enrol().1;
    let Some(mut browser) = Browser::start(&pin) else { return };
    let token = control_plane
        .sandbox
        .subcommand(&["control-plane", "token", "create", "--uses", "0"])
        .ended(0)
        .out
        .split_whitespace()
        .nth(1)
        .unwrap()
        .to_owned();
    let dir = tempfile::tempdir().unwrap();
    let mut tasks = register_many(&control_plane, dir.path(), &token, 1000);
    while let Some(done) = tasks.join_next().await {
        done.unwrap();
    }
    browser.size(1200, 800, false);
    log_in(&mut browser, &control_plane);
    browser.until("document.querySelectorAll('#rows tr').length === 1000");
    // loaded anew, with the session that is there
    let begun = Instant::now();
    browser.open(&format!("{}/", control_plane.url));
    browser.until("document.querySelectorAll('#rows tr').length === 1000");
    let usable = begun.elapsed();
    let typed = browser.value("(() => { const t = performance.now(); const f = document.querySelector('#find'); f.value = 'online'; f.dispatchEvent(new Event('input')); document.body.offsetHeight; return performance.now() - t; })()");
    println!(
        "1,000 clusters: usable after {} ms, a letter in the search takes {typed} ms",
        usable.as_millis()
    );
    browser.content();
}

/// `PIPEOPS_PLANE="URL PIN TOKEN CLUSTER" PIPEOPS_PICTURES=deployments/pictures \
/// cargo test --test it -- --ignored the_readmes_pictures`
#[test]
#[ignore = "takes the README's pictures of a control plane that runs, as scripts/try leaves one"]
fn the_readmes_pictures() {
    let control_plane = std::env::var("PIPEOPS_PLANE").expect("PIPEOPS_PLANE");
    let [url, pin, token, cluster] = control_plane.split_whitespace().collect::<Vec<_>>()[..]
    else {
        panic!("URL PIN TOKEN CLUSTER")
    };
    let mut browser = Browser::start(pin).expect("chromium");
    browser.size(1100, 420, false);
    browser.open(&format!("{url}/"));
    browser.until("document.querySelector('#login')?.hidden === false");
    browser.value("document.querySelector('#token').focus()");
    browser.write(token);
    browser.press("Enter");
    browser.until("document.querySelectorAll('#rows tr').length > 0");
    browser.value("document.activeElement.blur()");
    browser.picture("fleet");
    browser.size(1100, 1000, true);
    browser.value(&format!("location.hash = '#/c/{cluster}'"));
    browser.until("document.querySelector('#audit table') && document.querySelector('#components table') && document.querySelector('#nodes table')");
    browser.value("document.activeElement.blur()");
    browser.picture("cluster");
    browser.content();
}
