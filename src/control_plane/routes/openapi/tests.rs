//! The document is what the routes and the types of requests and answers say.

mod agents;
mod jobs;
mod rollouts;

use std::collections::BTreeSet;

use schemars::generate::SchemaSettings;
use schemars::{JsonSchema, SchemaGenerator};
use serde_json::{Map, Value, json};

use crate::contract::types::{IDEMPOTENCY_KEY_HEADER, Operation, Problem};
use crate::control_plane::auth::RequiredAuth;
use crate::control_plane::caller_token::RunnerToken;
use crate::control_plane::model::{AccessToken, Admin, Enrolment, Project};
use crate::control_plane::operations::OperationRequest;
use crate::control_plane::registry::ClusterView;
use crate::control_plane::routes::{NameRequest, clusters, page, runners, table, tokens};
use crate::control_plane::scope::TokenRequest;

/// Routes that are not documented: the files of the page, and one that only gives another
/// error.
const LEFT_OUT: &[(&str, &str)] = &[
    ("GET", "/"),
    ("GET", "/page.css"),
    ("GET", "/page.js"),
    ("GET", "/icon.svg"),
    ("DELETE", "/api/v1/agents/register"),
];

/// The methods that OpenAPI knows; the gateway passes on these and all others.
const METHODS: &[&str] = &["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"];

/// A call as the document shows it, under the method and the path of its route.
struct Call {
    method: &'static str,
    path: &'static str,
    shown: Value,
}

fn call(method: &'static str, path: &'static str, summary: &str) -> Call {
    Call { method, path, shown: json!({"summary": summary}) }
}

impl Call {
    fn parameter(mut self, parameter: Value) -> Call {
        let mut all = self.shown["parameters"].as_array().cloned().unwrap_or_default();
        all.push(parameter);
        self.shown["parameters"] = all.into();
        self
    }

    fn header(self, name: &str, description: &str) -> Call {
        self.parameter(json!({
            "name": name, "in": "header", "required": true, "description": description,
            "schema": {"type": "string"},
        }))
    }

    fn takes(mut self, body: Value) -> Call {
        self.shown["requestBody"] = json!({"required": true, "content": body});
        self
    }

    fn gives(mut self, status: &str, description: &str, body: Value) -> Call {
        self.shown["responses"][status] = json!({"description": description, "content": body});
        self
    }

    fn lists<T: JsonSchema>(self, s: &mut Schemas) -> Call {
        self.gives("200", "all of them", s.list::<T>())
    }

    /// A call that has nothing to tell.
    fn done(self) -> Call {
        self.gives("200", "done", object(json!({})))
    }
}

fn typed(kind: &str, schema: Value) -> Value {
    json!({kind: {"schema": schema}})
}

fn text(kind: &str) -> Value {
    typed(kind, json!({"type": "string"}))
}

fn object(properties: Value) -> Value {
    typed("application/json", json!({"type": "object", "properties": properties}))
}

fn items(of: Value) -> Value {
    typed(
        "application/json",
        json!({
            "type": "object", "properties": {"items": {"type": "array", "items": of}},
            "required": ["items"],
        }),
    )
}

struct Schemas(SchemaGenerator);

impl Schemas {
    fn of<T: JsonSchema>(&mut self) -> Value {
        typed("application/json", json!(self.0.subschema_for::<T>()))
    }

    fn list<T: JsonSchema>(&mut self) -> Value {
        items(json!(self.0.subschema_for::<T>()))
    }

    /// A row with more beside it: names and what they are.
    fn with<T: JsonSchema>(&mut self, more: &[(&str, &str)]) -> Value {
        let row = self.0.subschema_for::<T>();
        let more: Map<String, Value> = more
            .iter()
            .map(|(name, what)| {
                ((*name).to_owned(), json!({"type": "string", "description": what}))
            })
            .collect();
        typed("application/json", json!({"allOf": [row, {"type": "object", "properties": more}]}))
    }
}

fn of_the_control_plane(s: &mut Schemas) -> Vec<Call> {
    let health =
        object(json!({"status": {"type": "string", "const": "ok"}, "version": {"type": "string"}}));
    let verdict = object(json!({
        "reject": {"type": "boolean"}, "reject_reason": {"type": "string"},
        "unchange": {"type": "boolean", "const": true},
    }));
    let cookie = "the cookie of a session is set";
    vec![
        call("GET", "/api/v1/health", "Whether the control plane is up").gives("200", "up", health),
        call("GET", "/api/v1/openapi.json", "This document").gives(
            "200",
            "OpenAPI 3.1",
            object(json!({})),
        ),
        call("GET", "/api/v1/ca", "The CA by which clients know the control plane").gives(
            "200",
            "PEM; empty where the certificate is one that systems know",
            text("application/x-pem-file"),
        ),
        call("GET", "/metrics", "Metrics for Prometheus").gives(
            "200",
            "text format 0.0.4",
            text("text/plain"),
        ),
        call(
            "GET",
            "/api/v1/backup",
            "All that a restore needs, the keys of the control plane too",
        )
        .gives("200", "for `restore`", object(json!({}))),
        call(
            "GET",
            "/api/v1/frps",
            "What the configuration of an external frps says of its auth plugin",
        )
        .gives("200", "TOML", text("application/toml")),
        call(
            "POST",
            "/frp/handler/{secret}",
            "Auth plugin of an external frps, under the secret that its configuration names",
        )
        .parameter(json!({
            "name": "op", "in": "query", "description": "`Login`, `NewProxy`, …",
            "schema": {"type": "string"},
        }))
        .takes(object(json!({"content": {"type": "object"}})))
        .gives("200", "the verdict", verdict),
        call("POST", "/session", "Log in with the token of an administrator or a Runner")
            .takes(s.of::<page::LoginRequest>())
            .gives("200", cookie, s.of::<page::SessionInfo>()),
        call("GET", "/session", "Who has logged in").gives(
            "200",
            "who",
            s.of::<page::SessionInfo>(),
        ),
        call("DELETE", "/session", "Log out").done(),
    ]
}

fn of_administrators(s: &mut Schemas) -> Vec<Call> {
    let token = ("token", "shown this once");
    let install = ("install", "the line that installs an agent with it");
    let login = ("login", "of a user: the line to send to that person");
    vec![
        call("GET", "/api/v1/projects", "Projects").lists::<Project>(s),
        call("POST", "/api/v1/projects", "Make a project").takes(s.of::<NameRequest>()).gives(
            "201",
            "made",
            s.of::<Project>(),
        ),
        call("GET", "/api/v1/tokens", "Enrolment tokens").lists::<Enrolment>(s),
        call("POST", "/api/v1/tokens", "Make an enrolment token")
            .takes(s.of::<tokens::NewEnrolmentToken>())
            .gives("201", "made", s.with::<Enrolment>(&[token, install])),
        call("DELETE", "/api/v1/tokens/{id}", "Revoke an enrolment token").done(),
        call("GET", "/api/v1/runners", "Tokens of Runners and users, and those in kubeconfigs")
            .lists::<AccessToken>(s),
        call("POST", "/api/v1/runners", "Make a Runner or a user")
            .takes(s.of::<runners::NewRunner>())
            .gives("201", "made", s.with::<AccessToken>(&[token, login])),
        call(
            "DELETE",
            "/api/v1/runners/{id}",
            "Revoke a Runner or a user (`user:NAME`) with the kubeconfigs that it made, or one kubeconfig",
        )
        .done(),
        call("GET", "/api/v1/admins", "Administrators").lists::<Admin>(s),
        call("POST", "/api/v1/admins", "Make an administrator").takes(s.of::<NameRequest>()).gives(
            "201",
            "made",
            s.with::<Admin>(&[token]),
        ),
        call("DELETE", "/api/v1/admins/{id}", "Remove an administrator, but not the last one")
            .done(),
    ]
}

fn of_clusters(s: &mut Schemas) -> Vec<Call> {
    let key = "1 to 128 printable characters: the same for each try of the same thing";
    let operation = s.with::<Operation>(&[
        ("cluster_id", "which cluster it is for"),
        ("expires_at", "RFC 3339: until when it waits for the agent, while it does"),
    ]);
    let what = clusters::CLUSTER_VIEWS.iter().map(|(what, ..)| *what).collect::<Vec<_>>();
    let one_operation = "/api/v1/clusters/{id}/operations/{op}";
    let passed = |path, summary| {
        call("*", path, summary).parameter(json!({
            "name": "path", "in": "path", "required": true,
            "description": "all that follows, with its slashes", "schema": {"type": "string"},
        }))
    };
    vec![
        call("GET", "/api/v1/clusters", "Clusters within reach")
            .parameter(json!({
                "name": "selector", "in": "query", "schema": {"type": "string"},
                "description": "only those that it names, as a label selector of Kubernetes: \
                    `env=prod,tier in (web,api),!legacy`; `id`, `name`, `provider`, `region` and \
                    `zone` count as labels",
            }))
            .gives(
                "200",
                "without their reports; beside `items` the `tenant` that the token is limited to",
                s.list::<ClusterView>(),
            ),
        call("PATCH", "/api/v1/clusters/{id}/labels", "Set labels of a cluster, or take them away")
            .takes(s.of::<clusters::LabelChanges>())
            .gives("200", "the cluster", s.of::<ClusterView>()),
        call("GET", "/api/v1/clusters/{id}", "One cluster, by id or name").gives(
            "200",
            "with its report",
            s.of::<ClusterView>(),
        ),
        call("DELETE", "/api/v1/clusters/{id}", "Forget a cluster and its agent").done(),
        call("POST", "/api/v1/clusters/{id}/revoke", "Refuse an agent from now on").done(),
        call(
            "POST",
            "/api/v1/clusters/{id}/token",
            "A token for the agent's own API, of 300 s at most",
        )
        .takes(s.of::<TokenRequest>())
        .gives("200", "the token, and where to go with it", s.of::<RunnerToken>()),
        call("POST", "/api/v1/clusters/{id}/kubeconfig", "A kubeconfig, of a day at most")
            .takes(s.of::<TokenRequest>())
            .gives("201", "a file with which plain kubectl works", text("application/yaml")),
        call("GET", "/api/v1/clusters/{id}/inside/{what}", "What goes on in a cluster")
            .parameter(json!({
                "name": "what", "in": "path", "required": true,
                "schema": {"type": "string", "enum": what},
            }))
            .gives(
                "200",
                "rows: of workloads, of events, or of the agent's audit log",
                items(inside()),
            ),
        call("GET", "/api/v1/clusters/{id}/operations", "Operations that the caller may see")
            .lists::<Operation>(s),
        call("POST", "/api/v1/clusters/{id}/operations", "Ask for an operation")
            .header(IDEMPOTENCY_KEY_HEADER, key)
            .takes(s.of::<OperationRequest>())
            .gives("200", "known already, under the same key", operation.clone())
            .gives("202", "taken", operation.clone()),
        call("GET", one_operation, "One operation").gives("200", "as it is now", operation.clone()),
        call("DELETE", one_operation, "Call an operation off").gives(
            "200",
            "as it is now",
            operation,
        ),
        call("GET", "/api/v1/changes", "Clusters within reach, and what changes of them").gives(
            "200",
            "Server-sent events named `clusters`: `{all, changed, gone, now}`, all clusters at \
             first",
            text("text/event-stream"),
        ),
        passed("/clusters/{id}/k8s/*", "The Kubernetes API of a cluster"),
        passed("/clusters/{id}/api/*", "The API of the agent of a cluster"),
    ]
}

/// A row of what goes on in a cluster.
fn inside() -> Value {
    let (text, number) =
        (json!({"type": ["string", "null"]}), json!({"type": ["integer", "null"]}));
    json!({"anyOf": [
        {"title": "Workload", "type": "object", "properties": {
            "namespace": text, "name": text, "wanted": number, "ready": number,
            "images": {"type": "array", "items": text}, "created": text}},
        {"title": "Event", "type": "object", "properties": {
            "at": text, "kind": text, "reason": text, "message": text, "count": number,
            "object": text, "namespace": text}},
        {"title": "AuditRecord", "type": "object"},
    ]})
}

/// Who may call, in words and as the document's kinds of credentials.
fn security_of(required_auth: RequiredAuth, method: &str) -> (&'static str, Value) {
    let bearer = json!({"bearer": []});
    let session =
        if method == "GET" { json!({"session": []}) } else { json!({"session": [], "csrf": []}) };
    match required_auth {
        RequiredAuth::None => ("Needs no credential in a header.", json!([])),
        RequiredAuth::Local => ("Only the socket in the data directory answers it.", json!([])),
        RequiredAuth::Enrolment => (
            "With an enrolment token, or the credential of the agent that registers again.",
            json!([bearer]),
        ),
        RequiredAuth::Agent => {
            ("With the credential of the agent that the path names.", json!([bearer]))
        }
        RequiredAuth::Admin => ("For administrators.", json!([bearer, session])),
        RequiredAuth::Runner => {
            ("For administrators, and for Runners within their reach.", json!([bearer, session]))
        }
        RequiredAuth::Project => (
            "For administrators, and for Runners within their reach that are of no tenant.",
            json!([bearer, session]),
        ),
        RequiredAuth::Jobs => {
            ("For Runners that were made to bring jobs, of whatever role.", json!([bearer]))
        }
        RequiredAuth::Gateway => (
            "For administrators, for Runners within their reach, and for kubeconfigs.",
            json!([bearer]),
        ),
        RequiredAuth::Session => ("For a logged-in user.", json!([session])),
    }
}

/// The methods and the path of a route as the document has them.
fn documented_path(method: &'static str, path: &str) -> (Vec<&'static str>, String) {
    match path.strip_suffix('*') {
        Some(start) => (METHODS.to_vec(), format!("{start}{{path}}")),
        None => (vec![method], path.to_owned()),
    }
}

fn whole() -> Value {
    let mut settings = SchemaSettings::draft2020_12();
    settings.definitions_path = "/components/schemas".into();
    let s = &mut Schemas(settings.into_generator());
    let problem =
        json!({"description": "refused, with a stable code", "content": s.of::<Problem>()});
    let passed = json!({"description": "As it was answered in the cluster. The control plane \
        itself refuses with a `Status` of Kubernetes below `/k8s`, and with a `Problem` \
        elsewhere."});
    let mut paths = json!({});
    let all = [
        of_the_control_plane(s),
        agents::of_agents(s),
        of_administrators(s),
        of_clusters(s),
        rollouts::of_rollouts(s),
        jobs::calls(s),
    ];
    for part in all {
        for Call { method, path, shown } in part {
            let route =
                table().into_iter().find(|route| (route.method, route.path) == (method, path));
            let required_auth =
                route.unwrap_or_else(|| panic!("there is no route {method} {path}")).required_auth;
            let (methods, path) = documented_path(method, path);
            // a segment that no call describes is a name or an id
            for name in path.split('/').filter_map(|part| part.strip_prefix('{')?.strip_suffix('}'))
            {
                let described =
                    shown["parameters"].as_array().into_iter().flatten().any(|p| p["name"] == name);
                let known = paths[&path]["parameters"]
                    .as_array()
                    .into_iter()
                    .flatten()
                    .any(|p| p["name"] == name);
                if !described && !known {
                    let mut all =
                        paths[&path]["parameters"].as_array().cloned().unwrap_or_default();
                    all.push(json!({
                        "name": name, "in": "path", "required": true,
                        "schema": {"type": "string"},
                    }));
                    paths[&path]["parameters"] = all.into();
                }
            }
            for method in methods {
                let (description, security) = security_of(required_auth, method);
                let mut shown = shown.clone();
                (shown["description"], shown["security"]) = (description.into(), security);
                shown["responses"]["default"] = if required_auth == RequiredAuth::Gateway {
                    passed.clone()
                } else {
                    problem.clone()
                };
                paths[&path][method.to_lowercase()] = shown;
            }
        }
    }
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "pipeops control plane", "version": "1",
            "description": "The socket in the data directory needs no credential: it answers as \
                administrators are answered. Agents and the page come over HTTPS.",
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "paths": paths,
        "components": {
            "schemas": s.0.take_definitions(true),
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "session": {"type": "apiKey", "in": "cookie", "name": "__Host-pipeops"},
                "csrf": {"type": "apiKey", "in": "header", "name": "X-CSRF-Token"},
            },
        },
    })
}

#[test]
fn the_openapi_document_is_fresh() {
    crate::base::json::assert_committed("openapi.json", &whole(), "openapi");
}

#[test]
fn the_document_has_every_route_and_no_other() {
    let document = whole();
    let mut described = BTreeSet::new();
    for (path, calls) in document["paths"].as_object().unwrap() {
        let methods = calls.as_object().unwrap().keys().filter(|key| *key != "parameters");
        described.extend(methods.map(|method| format!("{} {path}", method.to_uppercase())));
    }
    let (left_out, routes): (Vec<_>, Vec<_>) =
        table().into_iter().partition(|route| LEFT_OUT.contains(&(route.method, route.path)));
    assert_eq!(left_out.len(), LEFT_OUT.len(), "what is left out is there: {left_out:?}");
    let mut there = BTreeSet::new();
    for route in routes {
        let (methods, path) = documented_path(route.method, route.path);
        there.extend(methods.iter().map(|method| format!("{method} {path}")));
    }
    assert_eq!(described, there);
}

#[test]
fn a_schema_that_the_document_names_is_in_it() {
    let document = whole();
    let text = document.to_string();
    let named: BTreeSet<&str> =
        text.split("\"#").skip(1).filter_map(|rest| rest.split('"').next()).collect();
    assert!(named.len() > 30, "{named:?}");
    let missing: Vec<_> =
        named.into_iter().filter(|name| document.pointer(name).is_none()).collect();
    assert!(missing.is_empty(), "{missing:?}");
}
