//! What the control plane answers to every route in every hand, with good bodies and bad ones: held
//! against a recorded answer.
//!
//! `routes.golden` was first recorded from a router written by hand; a change of it is a change of
//! what callers see. `PIPEOPS_UPDATE=1 cargo test --test it every_answer` records it anew.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use reqwest::{Certificate, Client, ClientBuilder, RequestBuilder, Response};
use serde_json::{Value, json};

use crate::control_plane::{ControlPlane, DATA, SimulatedAgent};
use crate::world::serve_kube;

/// Path, and the methods that it takes. `{agent}` and `{cluster}` are ones that exist; what is
/// asked of `none` by those who may would take the ground from under the rest.
const PATHS: &[(&str, &[&str])] = &[
    ("/", &["GET"]),
    ("/page.js", &["GET"]),
    ("/page.css", &["GET"]),
    ("/icon.svg", &["GET"]),
    ("/session", &["GET", "POST", "DELETE"]),
    ("/metrics", &["GET"]),
    ("/frp/handler/guessed?op=Login", &["POST"]),
    ("/api/v1/health", &["GET"]),
    ("/api/v1/openapi.json", &["GET"]),
    ("/api/v1/ca", &["GET"]),
    ("/api/v1/backup", &["GET"]),
    ("/api/v1/frps", &["GET"]),
    ("/api/v1/agents/register", &["POST", "DELETE"]),
    ("/api/v1/agents/{agent}/config", &["GET"]),
    ("/api/v1/agents/{agent}/heartbeat", &["POST"]),
    ("/api/v1/agents/{agent}/status", &["POST"]),
    ("/api/v1/agents/{agent}/operations/o-1/result", &["POST"]),
    ("/api/v1/agents/{agent}/credential", &["POST"]),
    ("/api/v1/agents/none", &["DELETE"]),
    ("/api/v1/agents/none/heartbeat", &["POST"]),
    ("/api/v1/projects", &["GET", "POST"]),
    ("/api/v1/tokens", &["GET", "POST"]),
    ("/api/v1/tokens/none", &["DELETE"]),
    ("/api/v1/runners", &["GET", "POST"]),
    ("/api/v1/runners/none", &["DELETE"]),
    ("/api/v1/admins", &["GET", "POST"]),
    ("/api/v1/admins/none", &["DELETE"]),
    ("/api/v1/clusters", &["GET"]),
    ("/api/v1/clusters/{cluster}", &["GET"]),
    ("/api/v1/clusters/none", &["GET", "DELETE"]),
    ("/api/v1/clusters/none/revoke", &["POST"]),
    ("/api/v1/clusters/none/labels", &["PATCH"]),
    ("/api/v1/clusters/{cluster}/token", &["POST"]),
    ("/api/v1/clusters/{cluster}/kubeconfig", &["POST"]),
    ("/api/v1/clusters/{cluster}/operations", &["GET", "POST"]),
    ("/api/v1/clusters/{cluster}/operations/o-1", &["GET", "DELETE"]),
    ("/api/v1/clusters/none/operations/o-1", &["GET", "DELETE"]),
    ("/api/v1/clusters/{cluster}/inside/events", &["GET"]),
    ("/api/v1/clusters/{cluster}/inside/secrets", &["GET"]),
    ("/api/v1/rollouts", &["GET", "POST"]),
    ("/api/v1/rollouts/none", &["GET", "DELETE"]),
    ("/api/v1/rollouts/none/resume", &["POST"]),
    ("/api/v1/job-tokens", &["POST"]),
    ("/api/v1/jobs", &["POST"]),
    ("/api/v1/jobs/none", &["GET"]),
    ("/api/v1/jobs/none/answered", &["POST"]),
    ("/api/v1/sealing-key", &["GET", "PUT"]),
    ("/api/v1/projects/none/sealing-key", &["DELETE"]),
    ("/api/v1/changes", &["GET"]),
    ("/clusters/{cluster}/k8s/api/v1/pods", &["GET", "POST", "DELETE", "PATCH", "OPTIONS", "FOO"]),
    ("/clusters/{cluster}/api/v1/status", &["GET", "POST"]),
    ("/clusters/none/k8s/api/v1/pods", &["GET", "POST"]),
];

/// A route that is not in [`PATHS`] would be on no record.
#[test]
fn every_route_is_asked() {
    let asked = |method: &str, path: &str| {
        PATHS.iter().any(|(template, methods)| {
            let template = template.split('?').next().unwrap();
            let (mut there, mut expected) = (template.split('/'), path.split('/'));
            let same = loop {
                match (expected.next(), there.next()) {
                    (None, None) | (Some("*"), Some(_)) => break true,
                    (Some(segment), Some(given))
                        if segment == given || segment.starts_with('{') && !given.is_empty() => {}
                    _ => break false,
                }
            };
            same && (method == "*" || methods.contains(&method))
        })
    };
    let missing: Vec<_> = pipeops::control_plane::routes::table()
        .into_iter()
        .filter(|route| !asked(route.method, route.path))
        .map(|route| format!("{} {}", route.method, route.path))
        .collect();
    assert!(missing.is_empty(), "PATHS lacks {missing:?}");
}

/// Not one of them is a route as it stands, or it stands at its edge.
const ODD: &[&str] = &[
    "/index.html",
    "/page",
    "//",
    "//session",
    "/session/",
    "/metrics/",
    "/api",
    "/api/v1",
    "/api/v1/",
    "/api/v1/health/",
    "/api/v1/%68ealth",
    "/api/v2/health",
    "/api/v1/clusters/",
    "/api/v1/clusters//token",
    "/api/v1/clusters/{cluster}/",
    "/api/v1/clusters/{cluster}/secrets",
    "/api/v1/clusters/%ff",
    "/api/v1/clusters/100%",
    "/api/v1/clusters/%zz%4",
    "/api/v1/clusters/a%2Fb",
    "/api/v1/clusters/prod%20eu",
    "/api/v1/clusters/%C5%81%c3%b3d%C5%BA",
    "/api/v1/clusters/%63-1",
    "/api/v1/clusters/{cluster}/operations/",
    "/api/v1/clusters/{cluster}/operations/%ff",
    "/api/v1/clusters/{cluster}/inside/a%2fb",
    "/api/v1/agents",
    "/api/v1/agents/",
    "/api/v1/agents/register/",
    "/api/v1/agents/register/config",
    "/api/v1/agents/%ff/config",
    "/api/v1/agents//config",
    "/frp/handler",
    "/frp/handler/",
    "/frp/handler/a/b",
    "/clusters",
    "/clusters/",
    "/clusters/none",
    "/clusters/{cluster}",
    "/clusters/{cluster}/",
    "/clusters/{cluster}/k8s",
    "/clusters/{cluster}/k8s/",
    "/clusters/{cluster}/k8s//api",
    "/clusters/{cluster}/k8s/a//b/",
    "/clusters/{cluster}/k8sx/api",
    "/clusters/{cluster}/api",
    "/clusters/{cluster}/api/",
    "/clusters/{cluster}/secrets",
    "/clusters//k8s/api",
    "/clusters//api/x",
    "/clusters/none/k8s",
    "/clusters/none/k8s/apis",
    "/clusters/%ff/k8s/api/v1/pods",
    "/clusters/a%2Fb/k8s/api/v1/pods",
];

const METHODS: &[&str] =
    &["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "FOO"];

const BODIES: &[(&str, &str)] = &[
    ("empty", ""),
    ("{}", "{}"),
    ("broken", "{\"name\":"),
    ("list", "[]"),
    ("unknown", "{\"planted\": 1}"),
    ("types", "{\"name\": 7, \"ttl_s\": \"x\", \"role\": [], \"token\": null, \"kind\": 1}"),
    ("limits", "{\"name\": \"n\", \"role\": \"root\", \"ttl_s\": 99999999999}"),
    ("operation", "{\"kind\": \"cordon\", \"spec\": {}}"),
];

/// Shows the same for what is the same: ids, tokens and addresses of one run by name.
struct Plain(Vec<(String, &'static str)>);

impl Plain {
    fn text(&self, text: &str) -> String {
        self.0
            .iter()
            .fold(text.to_owned(), |text, (value, name)| text.replace(value.as_str(), name))
    }
}

/// The names and types in a value, an object in its order; of a list each that differs from the
/// others, as rows come by a random id.
fn shape(value: &Value) -> Value {
    match value {
        Value::Object(fields) => {
            fields.iter().map(|(name, value)| (name.clone(), shape(value))).collect()
        }
        Value::Array(items) => {
            let shapes: BTreeMap<String, Value> =
                items.iter().map(shape).map(|shape| (shape.to_string(), shape)).collect();
            shapes.into_values().collect()
        }
        Value::String(_) => "text".into(),
        Value::Number(_) => 0.into(),
        other => other.clone(),
    }
}

/// Status and code, and all of what was said: headers and body. An answer to HEAD has no body to
/// read.
async fn heard(mut answer: Response, head: bool, plain: &Plain) -> (String, String) {
    let status = answer.status().as_u16();
    let mut headers: Vec<String> = Vec::new();
    for (name, value) in answer.headers().iter().filter(|(name, _)| *name != "date") {
        let value = match name.as_str() {
            "content-length" if value != "0" => "some",
            "x-request-id" => "one",
            // the first word of a cookie is its secret
            "set-cookie" => value.to_str().unwrap().split_once(';').unwrap().1,
            _ => value.to_str().unwrap(),
        };
        headers.push(format!("{name}: {}", plain.text(value)));
    }
    headers.sort();
    let kind = answer
        .headers()
        .get("content-type")
        .map(|v| v.to_str().unwrap().to_owned())
        .unwrap_or_default();
    let (code, body) = if head {
        (String::new(), String::new())
    } else if kind == "text/event-stream" {
        let first = answer.chunk().await.unwrap().unwrap();
        let text = String::from_utf8(first.to_vec()).unwrap();
        // who sees no cluster hears a comment
        let said = match text.split_once("data: ") {
            Some((event, data)) => {
                format!("{event}data: {}", shape(&serde_json::from_str(data).unwrap()))
            }
            None => text,
        };
        (String::new(), said)
    } else {
        let text = answer.text().await.unwrap();
        match serde_json::from_str::<Value>(&text) {
            Ok(value) if status >= 400 => {
                let code = [&value["code"], &value["details"]["causes"][0]["reason"]]
                    .into_iter()
                    .find_map(Value::as_str);
                (code.unwrap_or_default().to_owned(), plain.text(&text))
            }
            // a document with a test of its own
            Ok(value) if value["openapi"].is_string() => (String::new(), "OpenAPI".to_owned()),
            Ok(value) => (String::new(), shape(&value).to_string()),
            // a page, a certificate, metrics: their first line says which
            Err(_) => (String::new(), plain.text(text.lines().next().unwrap_or_default())),
        }
    };
    let said = format!("{status} {code}").trim().to_owned();
    let all = format!("{said}\n    {}\n    {body}", headers.join("\n    "));
    (said, all)
}

/// Cases by answer, and all answers that there were.
#[derive(Default)]
struct Golden {
    lines: Vec<String>,
    answers: BTreeSet<String>,
}

impl Golden {
    fn put(&mut self, what: &str, cases: BTreeMap<String, Vec<String>>) {
        let mut line = what.to_owned();
        for (said, who) in cases {
            let _ = write!(line, "\n    {said}: {}", who.join(", "));
        }
        self.lines.push(line);
    }

    fn held(self, name: &str) {
        let mut text = format!(
            "# what was asked, and who was answered how\n\n{}\n\n# all answers, word for word\n\n",
            self.lines.join("\n")
        );
        text += &self.answers.into_iter().collect::<Vec<_>>().join("\n");
        text += "\n";
        let path = format!("{}/tests/it/{name}", env!("CARGO_MANIFEST_DIR"));
        if std::env::var_os("PIPEOPS_UPDATE").is_some() {
            std::fs::write(&path, &text).unwrap();
        }
        let recorded = std::fs::read_to_string(&path).unwrap_or_default();
        if recorded != text {
            let (was, is): (BTreeSet<&str>, BTreeSet<&str>) =
                (recorded.lines().collect(), text.lines().collect());
            let lines = |mark: &str, lines: Vec<&&str>| {
                lines.into_iter().fold(String::new(), |all, line| format!("{all}{mark} {line}\n"))
            };
            panic!(
                "{name}:\n{}{}",
                lines("-", was.difference(&is).collect()),
                lines("+", is.difference(&was).collect())
            );
        }
    }
}

fn client(
    control_plane: &ControlPlane,
    set: impl FnOnce(ClientBuilder) -> ClientBuilder,
) -> Client {
    let ca =
        ControlPlane::stored(&control_plane.sandbox)["ca_certificate"].as_str().unwrap().to_owned();
    let builder = Client::builder()
        .tls_certs_only([Certificate::from_pem(ca.as_bytes()).unwrap()])
        .no_proxy();
    set(builder.redirect(reqwest::redirect::Policy::none())).build().unwrap()
}

/// Somebody who asks.
struct Caller {
    name: &'static str,
    client: Client,
    url: String,
    token: String,
    /// Cookie and the word of its page.
    session: Option<(String, String)>,
}

impl Caller {
    fn request(&self, method: &str, path: &str) -> RequestBuilder {
        let request = self.client.request(method.parse().unwrap(), format!("{}{path}", self.url));
        let request =
            if self.token.is_empty() { request } else { request.bearer_auth(&self.token) };
        match &self.session {
            Some((cookie, csrf)) => request.header("cookie", cookie).header("x-csrf-token", csrf),
            None => request,
        }
    }
}

async fn session(control_plane: &ControlPlane) -> (String, String) {
    let answer =
        control_plane.ask("POST", "/session", "", json!({"token": control_plane.admin})).await;
    let cookie =
        answer.headers()["set-cookie"].to_str().unwrap().split(';').next().unwrap().to_owned();
    (cookie, answer.json::<Value>().await.unwrap()["csrf"].as_str().unwrap().to_owned())
}

struct RouteTester {
    control_plane: ControlPlane,
    callers: Vec<Caller>,
    agent: String,
    cluster: String,
    plain: Plain,
    golden: Golden,
    _dir: tempfile::TempDir,
}

impl RouteTester {
    async fn new() -> RouteTester {
        let control_plane = ControlPlane::with(&[]);
        let dir = tempfile::tempdir().unwrap();
        let agent = SimulatedAgent::new(&control_plane, dir.path(), &control_plane.enrol().0).await;
        let cluster = control_plane.clusters().await["items"][0]["id"].as_str().unwrap().to_owned();
        let other = control_plane
            .json("POST", "/api/v1/projects", &control_plane.admin, json!({"name": "other"}))
            .await["id"]
            .as_str()
            .unwrap()
            .to_owned();
        let make = async |body: Value| {
            control_plane.json("POST", "/api/v1/runners", &control_plane.admin, body).await["token"]
                .as_str()
                .unwrap()
                .to_owned()
        };
        let runner = make(json!({"name": "mine", "jobs": true})).await;
        let viewer = make(json!({"name": "viewer", "role": "viewer"})).await;
        let foreign = make(json!({"name": "foreign", "project": other})).await;
        let tenant = make(json!({"name": "tenant", "tenant": "acme"})).await;
        let kubeconfig = control_plane
            .ask("POST", &format!("/api/v1/clusters/{cluster}/kubeconfig"), &runner, json!({}))
            .await;
        let kubeconfig: Value = serde_json::from_str(&kubeconfig.text().await.unwrap()).unwrap();
        let kubeconfig = kubeconfig["users"][0]["user"]["token"].as_str().unwrap().to_owned();
        let plain = Plain(vec![
            (agent.id.clone(), "AGENT"),
            (cluster.clone(), "CLUSTER"),
            (control_plane.url.clone(), "URL"),
            ("-----BEGIN CERTIFICATE-----".into(), "CERTIFICATE"),
        ]);
        let tokens = [
            ("none", String::new()),
            ("enrolment", control_plane.enrol().0),
            ("agent", agent.credential.clone()),
            ("kubeconfig", kubeconfig),
            ("foreign", foreign),
            ("viewer", viewer),
            ("tenant", tenant),
            ("runner", runner),
            ("admin", control_plane.admin.clone()),
        ];
        let network = |name, token: String, session| Caller {
            name,
            client: control_plane.client.clone(),
            url: control_plane.url.clone(),
            token,
            session,
        };
        let mut callers: Vec<Caller> =
            tokens.into_iter().map(|(name, token)| network(name, token, None)).collect();
        let (cookie, csrf) = session(&control_plane).await;
        callers.push(network("cookie", String::new(), Some((cookie.clone(), csrf))));
        callers.push(network("foreign page", String::new(), Some((cookie, "guessed".into()))));
        callers.push(network(
            "guessed cookie",
            String::new(),
            Some(("__Host-pipeops=guessed".into(), "guessed".into())),
        ));
        let socket = control_plane.sandbox.root().join(DATA).join("admin.sock");
        let local = Client::builder().no_proxy().unix_socket(socket.as_path()).build().unwrap();
        callers.push(Caller {
            name: "socket",
            client: local,
            url: "http://localhost".into(),
            token: String::new(),
            session: None,
        });
        RouteTester {
            control_plane,
            callers,
            agent: agent.id,
            cluster,
            plain,
            golden: Golden::default(),
            _dir: dir,
        }
    }

    fn path(&self, template: &str) -> String {
        template.replace("{agent}", &self.agent).replace("{cluster}", &self.cluster)
    }

    /// Every caller with every body.
    async fn route(&mut self, method: &str, template: &str) {
        let path = self.path(template);
        let mut cases: BTreeMap<String, Vec<String>> = BTreeMap::new();
        let bodies = if method == "GET" { &BODIES[..2] } else { BODIES };
        for at in 0..self.callers.len() {
            let mut same: Vec<(String, Vec<&str>)> = Vec::new();
            for (kind, body) in bodies {
                if method == "DELETE" && template == "/session" && self.callers[at].name == "cookie"
                {
                    self.callers[at].session = Some(session(&self.control_plane).await);
                }
                let caller = &self.callers[at];
                let request = caller.request(method, &path).body(*body);
                let answer = request.send().await.unwrap();
                // another credential replaces the one before it
                let rotated = template.ends_with("/credential") && answer.status() == 200;
                let (said, all) = if rotated {
                    let text = answer.text().await.unwrap();
                    let value: Value = serde_json::from_str(&text).unwrap();
                    self.callers[at].token = value["credential"].as_str().unwrap().to_owned();
                    ("200".into(), format!("200 credential\n    {}", shape(&value)))
                } else {
                    heard(answer, method == "HEAD", &self.plain).await
                };
                self.golden.answers.insert(all);
                match same.iter_mut().find(|(s, _)| *s == said) {
                    Some((_, kinds)) => kinds.push(kind),
                    None => same.push((said, vec![kind])),
                }
            }
            let name = self.callers[at].name;
            for (said, kinds) in same {
                let which = if kinds.len() == bodies.len() {
                    String::new()
                } else {
                    format!(" ({})", kinds.join(", "))
                };
                cases.entry(said).or_default().push(format!("{name}{which}"));
            }
        }
        self.golden.put(&format!("{method} {template}"), cases);
        // a new session where the last one was logged out
        if method == "DELETE" && template == "/session" {
            let (cookie, csrf) = session(&self.control_plane).await;
            for caller in &mut self.callers {
                match caller.name {
                    "cookie" => caller.session = Some((cookie.clone(), csrf.clone())),
                    "foreign page" => caller.session = Some((cookie.clone(), "guessed".into())),
                    _ => {}
                }
            }
        }
    }

    /// One request after the other, by some callers.
    async fn some(&mut self, what: &str, names: &[&str], requests: Vec<(String, Request)>) {
        let mut cases: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for (title, request) in requests {
            for caller in self.callers.iter().filter(|c| names.contains(&c.name)) {
                let (client, request) = request(caller).build_split();
                let request = request.unwrap();
                let head = request.method() == "HEAD";
                let (said, all) =
                    heard(client.execute(request).await.unwrap(), head, &self.plain).await;
                self.golden.answers.insert(all);
                cases.entry(said).or_default().push(format!("{title} {}", caller.name));
            }
        }
        self.golden.put(what, cases);
    }
}

type Request = Box<dyn Fn(&Caller) -> RequestBuilder>;

fn with(
    method: &'static str,
    path: String,
    change: impl Fn(RequestBuilder) -> RequestBuilder + 'static,
) -> Request {
    Box::new(move |caller| change(caller.request(method, &path)))
}

#[tokio::test(flavor = "multi_thread")]
async fn every_answer_of_every_route_is_the_one_on_record() {
    let mut tester = RouteTester::new().await;
    for (template, methods) in PATHS {
        for method in *methods {
            tester.route(method, template).await;
        }
    }
    // a method that a path does not take; the gateway takes all
    for (template, methods) in PATHS {
        let path = tester.path(template);
        // an administrator's DELETE of the cluster would be obeyed
        let takes = |m: &str| {
            methods.contains(&m) || (m == "DELETE" && *template == "/api/v1/clusters/{cluster}")
        };
        let others = METHODS.iter().filter(|m| !takes(m) && !template.starts_with("/clusters/"));
        let requests = others.map(|m| ((*m).to_owned(), with(m, path.clone(), |r| r))).collect();
        tester
            .some(
                &format!("another method {template}"),
                &["none", "agent", "admin", "socket"],
                requests,
            )
            .await;
    }
    for template in ODD {
        let path = tester.path(template);
        let requests = ["GET", "POST", "DELETE", "HEAD"]
            .iter()
            .map(|m| ((*m).to_owned(), with(m, path.clone(), |r| r)))
            .collect();
        tester.some(template, &["none", "agent", "runner", "socket"], requests).await;
    }
    // an unknown token; after thirty of them an address is not listened to for a minute, so each
    // route has its own
    for (n, (template, methods)) in PATHS.iter().enumerate() {
        let from = IpAddr::from(Ipv4Addr::new(127, 0, 1, n.try_into().unwrap()));
        let client = client(&tester.control_plane, |builder| builder.local_address(from));
        let path = tester.path(template);
        let send = move |request: RequestBuilder, client: &Client| {
            let request = request.build().unwrap();
            client
                .request(request.method().clone(), request.url().clone())
                .bearer_auth("por_wrong")
                .body("{}")
        };
        let requests = methods.iter().map(|m| {
            let client = client.clone();
            ((*m).to_owned(), with(m, path.clone(), move |r| send(r, &client)))
        });
        tester.some(&format!("an unknown token {template}"), &["none"], requests.collect()).await;
    }
    // a body that is too long; who may not is told that first
    for (template, methods) in PATHS {
        for (size, length) in
            [("1 MiB and a byte", (1 << 20) + 1), ("64 KiB and a byte", (64 << 10) + 1)]
        {
            if template.starts_with("/clusters/")
                || (length < 1 << 20 && *template != "/api/v1/agents/register")
            {
                continue;
            }
            let path = tester.path(template);
            let requests = methods.iter().filter(|m| **m != "GET").map(|m| {
                let long = move |r: RequestBuilder| r.body(" ".repeat(length));
                ((*m).to_owned(), with(m, path.clone(), long))
            });
            tester
                .some(
                    &format!("{size} {template}"),
                    &["none", "enrolment", "agent", "runner", "admin"],
                    requests.collect(),
                )
                .await;
        }
    }
    tester.headers().await;
    tester.login().await;
    std::mem::take(&mut tester.golden).held("routes.golden");
}

impl RouteTester {
    /// Credentials that are odd, and headers that change what a body is worth.
    async fn headers(&mut self) {
        let admin = self.control_plane.admin.clone();
        let set = |name: &'static str, value: String| {
            move |r: RequestBuilder| r.header(name, value.clone())
        };
        let both = {
            let admin = admin.clone();
            move |r: RequestBuilder| r.bearer_auth(&admin).bearer_auth(&admin)
        };
        let list = || "/api/v1/projects".to_owned();
        let requests: Vec<(String, Request)> = vec![
            ("basic".into(), with("GET", list(), set("authorization", "Basic eDp5".into()))),
            ("empty".into(), with("GET", list(), set("authorization", "Bearer ".into()))),
            (
                "lower case".into(),
                with("GET", list(), set("authorization", format!("bearer  {admin} "))),
            ),
            (
                "long".into(),
                with("GET", list(), set("authorization", format!("Bearer {}", "x".repeat(513)))),
            ),
            ("two".into(), with("GET", list(), both)),
            (
                "two cookies".into(),
                with("GET", list(), set("cookie", "__Host-pipeops=a; __Host-pipeops=b".into())),
            ),
            (
                "a form".into(),
                with("POST", list(), |r| {
                    r.header("content-type", "application/x-www-form-urlencoded").body("name=x")
                }),
            ),
        ];
        self.some("odd credentials", &["none"], requests).await;
        let foreign = |r: RequestBuilder| r.header("sec-fetch-site", "cross-site").body("{}");
        let requests: Vec<(String, Request)> = vec![
            ("GET".into(), with("GET", list(), foreign)),
            ("POST".into(), with("POST", list(), foreign)),
            ("GET session".into(), with("GET", "/session".into(), foreign)),
        ];
        self.some("from another page", &["cookie", "guessed cookie", "admin"], requests).await;
        let key = |r: RequestBuilder| r.header("idempotency-key", "k").body(BODIES[7].1);
        let wait = |r: RequestBuilder| {
            r.header("idempotency-key", "k2")
                .body("{\"kind\": \"cordon\", \"spec\": {}, \"ttl_s\": 60}")
        };
        let other = |r: RequestBuilder| {
            r.header("idempotency-key", "k2")
                .body("{\"kind\": \"drain\", \"spec\": {}, \"ttl_s\": 60}")
        };
        let long =
            |r: RequestBuilder| r.header("idempotency-key", "x".repeat(4096)).body(BODIES[7].1);
        let path = format!("/api/v1/clusters/{}/operations", self.cluster);
        let requests: Vec<(String, Request)> = vec![
            ("at once".into(), with("POST", path.clone(), key)),
            ("waits".into(), with("POST", path.clone(), wait)),
            ("again".into(), with("POST", path.clone(), wait)),
            ("another".into(), with("POST", path.clone(), other)),
            ("long key".into(), with("POST", path.clone(), long)),
            ("list".into(), with("GET", path, |r| r)),
        ];
        self.some("operations with a key", &["viewer", "runner", "admin", "kubeconfig"], requests)
            .await;
        // a registration that nobody signed, one that is signed by nobody, and one that is too long
        let register = |header: &'static str, body: String| {
            with("POST", "/api/v1/agents/register".into(), move |r| {
                r.header("pipeops-signature", header).body(body.clone())
            })
        };
        let dir = tempfile::tempdir().unwrap();
        let body = SimulatedAgent::body(&SimulatedAgent::identity(dir.path()), "m");
        let requests: Vec<(String, Request)> = vec![
            ("no signature".into(), register("", body.clone())),
            ("wrong signature".into(), register("AAAA", body)),
            ("list".into(), register("AAAA", "[]".into())),
        ];
        self.some("register", &["enrolment", "agent", "runner", "none"], requests).await;
    }

    /// What is shown at the page's door.
    async fn login(&mut self) {
        let from = client(&self.control_plane, |builder| {
            builder.local_address(IpAddr::from(Ipv4Addr::new(127, 0, 2, 1)))
        });
        let tokens: Vec<(&str, String)> = self
            .callers
            .iter()
            .filter(|c| !c.token.is_empty())
            .map(|c| (c.name, c.token.clone()))
            .collect();
        let mut requests: Vec<(String, Request)> = Vec::new();
        for (name, token) in
            tokens.into_iter().chain([("wrong", "por_wrong".into()), ("empty", String::new())])
        {
            let (from, url) = (from.clone(), self.control_plane.url.clone());
            let body = json!({"token": token}).to_string();
            requests.push((
                name.into(),
                Box::new(move |_| from.post(format!("{url}/session")).body(body.clone())),
            ));
        }
        self.some("log in", &["none"], requests).await;
        let mut tried = BTreeSet::new();
        for _ in 0..100 {
            let answer = from
                .get(format!("{}/api/v1/projects", self.control_plane.url))
                .bearer_auth("por_wrong")
                .send()
                .await;
            let (said, all) = heard(answer.unwrap(), false, &self.plain).await;
            self.golden.answers.insert(all);
            if !tried.insert(said) && tried.len() > 1 {
                break;
            }
        }
        assert!(tried.contains("429 too_many_failures"), "{tried:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_never_ends_is_given_up_after_fifteen_seconds() {
    let control_plane = ControlPlane::with(&[]);
    let endless = futures_util::stream::unfold(0_u8, |n| async move {
        tokio::time::sleep(Duration::from_millis(500)).await;
        Some((Ok::<_, std::io::Error>(vec![b' '; 10]), n))
    });
    let request = control_plane
        .client
        .post(format!("{}/api/v1/projects", control_plane.url))
        .bearer_auth(&control_plane.admin);
    let answer = request.body(reqwest::Body::wrap_stream(endless)).send().await.unwrap();
    assert_eq!(
        (answer.status().as_u16(), answer.json::<Value>().await.unwrap()["code"].as_str()),
        (408, Some("too_slow"))
    );
}

/// Headers but those that are never the same.
fn names(answer: &Response) -> Vec<String> {
    let same = answer.headers().iter().filter(|h| !matches!(h.0.as_str(), "date" | "x-request-id"));
    let mut headers: Vec<String> =
        same.map(|(name, value)| format!("{name}: {}", value.to_str().unwrap())).collect();
    headers.sort();
    headers
}

/// What an agent answers goes on as it is: no header is added to an answer without a body, none is
/// lost.
#[tokio::test(flavor = "multi_thread")]
async fn every_answer_that_is_passed_on_is_the_one_on_record() {
    let control_plane = ControlPlane::with(&[]);
    let (_kube, address) = serve_kube().await;
    let (_agent, cluster) = control_plane.agent(address).await;
    let plain = Plain(vec![(cluster.clone(), "CLUSTER"), (control_plane.url.clone(), "URL")]);
    let mut golden = Golden::default();
    let path = format!("/clusters/{cluster}/k8s/api/v1/namespaces/beta/pods");
    for (version, client) in [
        ("h2", client(&control_plane, |b| b)),
        ("http/1.1", client(&control_plane, ClientBuilder::http1_only)),
    ] {
        let mut cases: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for method in ["GET", "HEAD", "POST", "OPTIONS"] {
            for query in [
                "status=200",
                "status=204&empty=",
                "status=304&empty=&etag=7",
                "status=200&empty=",
                "status=205&empty=",
                "status=404",
                "status=405&allow=GET",
                "status=500",
                "status=503&retry-after=3",
                "status=200&cache-control=private&x-content-type-options=none",
            ] {
                let answer = client
                    .request(
                        method.parse().unwrap(),
                        format!("{}{path}/answers?{query}", control_plane.url),
                    )
                    .bearer_auth(&control_plane.admin);
                let (said, all) =
                    heard(answer.send().await.unwrap(), method == "HEAD", &plain).await;
                golden.answers.insert(format!("{version} {method} {query}: {all}"));
                cases.entry(said).or_default().push(format!("{method} {query}"));
            }
            // one without a length
            let answer = client
                .request(
                    method.parse().unwrap(),
                    format!("{}{path}/bulk/log?n=65536", control_plane.url),
                )
                .bearer_auth(&control_plane.admin);
            let mut answer = answer.send().await.unwrap();
            let headers = names(&answer);
            let mut length = 0;
            while let Ok(Some(piece)) = answer.chunk().await {
                length += piece.len();
            }
            golden.answers.insert(format!(
                "{version} {method} no length: {} {length} bytes {headers:?}",
                answer.status()
            ));
        }
        golden.put(version, cases);
    }
    // an upgrade
    let client = client(&control_plane, ClientBuilder::http1_only);
    let exec = client
        .get(format!("{}{path}/p/exec?command=sh", control_plane.url))
        .bearer_auth(&control_plane.admin);
    let answer =
        exec.header("connection", "Upgrade").header("upgrade", "SPDY/3.1").send().await.unwrap();
    let headers = names(&answer);
    golden.answers.insert(format!("upgrade: {} {headers:?}", answer.status()));
    golden.held("passed.golden");
}
