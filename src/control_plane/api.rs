//! The control plane's HTTP API: one table says which route needs whose token, and what it does. A route that is not in it is not there.

use std::net::IpAddr;
use std::time::Duration;

use http::request::Parts;
use http::{HeaderMap, Method, Request, Response, header};
use http_body_util::{BodyExt as _, Limited};
use hyper::body::{Bytes, Incoming};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::contract::token::{LIFE, Role};
use crate::contract::types::{Heartbeat, HeartbeatAnswer, Register, SIGNATURE, StatusReport};
use crate::control_plane::Hub;
use crate::control_plane::model::{Access, AccessKind};
use crate::control_plane::registry::{ClusterView, Refused, Who, refused, unwritten};
use crate::control_plane::routes::{Call, Local, Open, ROUTES, Serves, Token, decoded, matched};
use crate::kubernetes::answer::{Problem, discovery, plain};
use crate::kubernetes::header_policy;
use crate::kubernetes::upstream::Body;

/// Largest body of a call that is not passed through.
const BODY: usize = 1 << 20;
/// Longest registration: what is in it is kept, and written again with every sign of life.
const REGISTRATION: usize = 64 << 10;
/// How long a body may take to come.
const PATIENCE: Duration = Duration::from_secs(15);
/// Longest life of an enrolment token, of a Runner's token and of a kubeconfig, seconds.
const YEAR: i64 = 366 * 86_400;
pub(super) const DAY: i64 = 86_400;

/// Where a request comes from, as far as it matters.
#[derive(Clone, Copy, Debug)]
pub enum Origin {
    Network(IpAddr),
    /// The socket in the data directory: whoever can open it owns the database anyway.
    Local,
}

pub(super) fn answer(status: u16, body: &Value) -> Response<Body> {
    plain(status, "application/json", body.to_string())
}

/// Below a cluster's `/k8s` the caller is a client of Kubernetes, and it is told at once: with a `Retry-After` it would try in
/// silence for most of a minute. Another caller is told when to come again.
fn problem(refused: Refused, below_k8s: Option<bool>) -> Response<Body> {
    let problem = Problem::new(refused.status, refused.code, refused.message, refused.hint);
    match (below_k8s, refused.status) {
        (Some(discovery), _) => problem.status(discovery),
        (None, 429 | 503) => problem.again_after(5).plain(),
        (None, _) => problem.plain(),
    }
}

/// Where a path leads to the Kubernetes API of a cluster: whether it is about what the cluster serves.
fn below_k8s(path: &str) -> Option<bool> {
    let (_, rest) = path.strip_prefix("/clusters/")?.split_once('/')?;
    let below = rest.strip_prefix("k8s").filter(|below| below.is_empty() || below.starts_with('/'))?;
    Some(discovery(below))
}

fn bearer(headers: &HeaderMap) -> Result<&str, Refused> {
    let token = header_policy::bearer(headers).filter(|t| !t.is_empty() && t.len() <= 512);
    token.ok_or_else(|| refused(401, "token_needed", "a bearer token is needed", None))
}

pub(super) async fn body(incoming: Incoming) -> Result<Bytes, Refused> {
    match tokio::time::timeout(PATIENCE, Limited::new(incoming, BODY).collect()).await {
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(e)) if e.is::<http_body_util::LengthLimitError>() => Err(refused(413, "too_large", "the body is larger than 1 MiB", None)),
        Ok(Err(_)) => Err(refused(400, "bad_body", "the body broke off", None)),
        Err(_) => Err(refused(408, "too_slow", "the body took longer than 15 s", None)),
    }
}

pub(super) fn parsed<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Refused> {
    let bytes = if bytes.is_empty() { b"{}" } else { bytes };
    serde_json::from_slice(bytes).map_err(|e| refused(400, "bad_body", format!("the body is not what this call takes: {e}"), None))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Named {
    name: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct AddToken {
    project: Option<String>,
    name: Option<String>,
    ttl_s: Option<i64>,
    uses: Option<u32>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct AddRunner {
    project: Option<String>,
    name: String,
    role: Option<String>,
    clusters: Option<Vec<String>>,
    namespaces: Option<Vec<String>>,
    ttl_s: Option<i64>,
}

/// For a Runner's JWT and for a kubeconfig alike.
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Wanted {
    pub(super) role: Option<String>,
    pub(super) namespaces: Option<Vec<String>>,
    pub(super) ttl_s: Option<i64>,
}

fn role(name: Option<&str>, otherwise: Role) -> Result<Role, Refused> {
    let Some(name) = name else { return Ok(otherwise) };
    Role::of(name).ok_or_else(|| refused(400, "bad_role", "a role is viewer, deployer, operator or admin", None))
}

pub(super) fn life(asked: Option<i64>, otherwise: i64, most: i64) -> Result<i64, Refused> {
    let ttl = asked.unwrap_or(otherwise);
    if (1..=most).contains(&ttl) { Ok(ttl) } else { Err(refused(400, "bad_ttl", format!("ttl_s is 1 to {most}"), None)) }
}

/// Role and namespaces of what is asked for, never more than the asker has.
pub(super) fn narrowed(who: &Who, asked: &Wanted) -> Result<(Role, Option<Vec<String>>), Refused> {
    let (most, limits) = match who {
        Who::Access(access) => (access.role, access.namespaces.clone()),
        _ => (Role::Operator, None),
    };
    let wanted = role(asked.role.as_deref(), most)?;
    if wanted > most && !who.all() {
        return Err(refused(403, "role_exceeded", format!("this token's role is {}", most.name()), None));
    }
    let namespaces = match (asked.namespaces.clone(), limits) {
        (Some(asked), Some(limits)) if asked.iter().any(|n| !limits.contains(n)) => {
            return Err(refused(403, "namespace_exceeded", format!("this token is for {}", limits.join(", ")), None));
        }
        (Some(asked), _) => Some(asked),
        (None, limits) => limits,
    };
    Ok((wanted, namespaces))
}

impl Hub {
    /// Answers one request. Nothing that a client sends ends more than its own connection.
    pub(super) async fn respond(self, origin: Origin, request: Request<Incoming>) -> Response<Body> {
        let below_k8s = below_k8s(request.uri().path());
        let mut response = match self.dispatch(origin, request).await {
            Ok(response) => response,
            Err(refused) => problem(refused, below_k8s),
        };
        let headers = response.headers_mut();
        for (name, value) in [("cache-control", "no-store"), ("x-content-type-options", "nosniff"), ("content-security-policy", "sandbox")] {
            headers.entry(name).or_insert(header::HeaderValue::from_static(value));
        }
        response
    }

    async fn dispatch(&self, origin: Origin, request: Request<Incoming>) -> Result<Response<Body>, Refused> {
        let path = request.uri().path().to_owned();
        let candidates: Vec<_> = ROUTES.iter().filter_map(|route| Some((route, matched(route.1, &path)?))).collect();
        if candidates.is_empty() {
            return Err(refused(404, "not_found", "there is no such path", None));
        }
        let fits = |method: &str| method == "*" || method == request.method().as_str();
        let Some(((_, _, serves), open)) = candidates.into_iter().find(|(route, _)| fits(route.0)) else {
            return Err(refused(405, "method_not_allowed", "this path takes another method", None));
        };
        let open: Vec<String> = open.into_iter().map(decoded).collect();
        let open: Vec<&str> = open.iter().map(String::as_str).collect();
        let id = open.first().copied().unwrap_or_default();
        let now = self.now();
        let (need, call) = match *serves {
            Serves::Nobody(call) => return self.open(call, origin, id, request, now).await,
            Serves::Local(call) => return self.on_the_socket(call, origin).await,
            Serves::Known(need, call) => (need, call),
        };
        let (who, token) = self.authorised(origin, need, id, request.method(), request.headers(), now)?;
        if call == Call::Gateway {
            return self.pass(request, id, &who, now).await;
        }
        let (parts, incoming) = request.into_parts();
        let bytes = if parts.method == Method::GET { Bytes::new() } else { body(incoming).await? };
        match call {
            Call::Session => Ok(self.session(&who, &parts.headers)),
            Call::Logout => Ok(self.logout(&parts.headers)),
            Call::Changes => self.changes(&who, token),
            Call::OperationResult | Call::AskOperation | Call::Operations | Call::Operation | Call::CancelOperation => {
                self.operation(call, &who, &open, &parts, &bytes, now).await
            }
            Call::Inside => self.inside(&who, id, open.get(1).copied().unwrap_or_default(), now).await,
            _ => self.call(call, id, &who, &parts, &bytes, now).await,
        }
    }

    /// What anybody may call. It is told of nobody: there is no `Who` here that a mistake could take for an administrator.
    async fn open(&self, call: Open, origin: Origin, id: &str, request: Request<Incoming>, now: i64) -> Result<Response<Body>, Refused> {
        match call {
            Open::Page => Hub::page(request.uri().path()),
            Open::Health => Ok(answer(200, &json!({"status": "ok", "version": env!("CARGO_PKG_VERSION")}))),
            Open::Ca => Ok(plain(200, "application/x-pem-file", self.shown_ca().unwrap_or_default())),
            Open::FrpHandler => self.frp_handler(id, request).await,
            Open::Login => match origin {
                Origin::Network(address) => self.login(address, &body(request.into_body()).await?, now),
                Origin::Local => Err(refused(403, "not_here", "people come over the network", None)),
            },
        }
    }

    /// What only the socket in the data directory answers.
    async fn on_the_socket(&self, call: Local, origin: Origin) -> Result<Response<Body>, Refused> {
        if !matches!(origin, Origin::Local) {
            return Err(refused(403, "forbidden", "only the socket in the data directory answers this", None));
        }
        match call {
            Local::Backup => {
                let text = super::backup::text(&self.inner.state, &self.inner.store).await.map_err(|e| unwritten(&e))?;
                Ok(plain(200, "application/json", text.expose().to_owned()))
            }
            Local::FrpsConfig => Ok(plain(200, "application/toml", self.frps_config()?)),
        }
    }

    /// Who asks, if it may, and the hash of what it showed: the local socket shows nothing.
    fn authorised(
        &self,
        origin: Origin,
        need: Token,
        id: &str,
        method: &Method,
        headers: &HeaderMap,
        now: i64,
    ) -> Result<(Who, Option<String>), Refused> {
        let Origin::Network(address) = origin else {
            return match need {
                Token::Admin | Token::Runner | Token::Gateway => Ok((Who::Local, None)),
                Token::Enrol | Token::Agent => Err(refused(403, "not_here", "agents come over the network", None)),
                Token::Session => Err(refused(403, "not_here", "people come over the network", None)),
            };
        };
        // a cookie counts where the page calls, and nowhere else: what a cluster serves cannot use it
        let cookie = match need {
            Token::Session | Token::Admin | Token::Runner if !headers.contains_key(header::AUTHORIZATION) => self.by_cookie(method, headers, now)?,
            _ => None,
        };
        let hash = match cookie {
            Some(hash) => hash,
            None if need == Token::Session => return Err(refused(401, "login_needed", "nobody is logged in", None)),
            None => self.keys().hashed(bearer(headers)?),
        };
        self.guard(address, &hash, now)?;
        let who = match self.registry().who(&hash, now) {
            Ok(who) => who,
            Err(error) => {
                if error.code == "token_unknown" {
                    self.failed(address, now);
                }
                return Err(error);
            }
        };
        self.succeeded(hash.clone());
        let fine = match (&who, need) {
            (Who::Enrolment(_) | Who::Agent(_), Token::Enrol) => true,
            (Who::Agent(own), Token::Agent) => own == id,
            (Who::Admin(_), Token::Admin | Token::Runner | Token::Gateway | Token::Session) => true,
            (Who::Access(access), Token::Runner | Token::Session) => access.kind == AccessKind::Runner,
            (Who::Access(_), Token::Gateway) => true,
            _ => false,
        };
        if !fine {
            return Err(refused(403, "forbidden", "this token is for something else", None));
        }
        if matches!(who, Who::Admin(_)) {
            self.admin_seen();
        }
        // a cluster outside its reach is not there for a Runner
        if let (Who::Access(access), false) = (&who, id.is_empty()) {
            self.registry().reaches(access, id)?;
        }
        Ok((who, Some(hash)))
    }

    async fn call(&self, call: Call, id: &str, who: &Who, parts: &Parts, bytes: &[u8], now: i64) -> Result<Response<Body>, Refused> {
        let registry = self.registry();
        let project = who.project();
        match call {
            Call::Metrics => Ok(plain(200, "text/plain; version=0.0.4", self.metrics(now))),
            Call::Register if bytes.len() > REGISTRATION => Err(refused(413, "too_large", "a registration is at most 64 KiB long", None)),
            Call::Register => {
                let asked: Register = parsed(bytes)?;
                let signature = parts.headers.get(SIGNATURE).and_then(|v| v.to_str().ok()).unwrap_or_default();
                let done = registry.register(self.keys(), who, asked, bytes, signature, now).await?;
                let config = self.config(&done.agent_id);
                Ok(answer(
                    200,
                    &json!({"agent_id": done.agent_id, "cluster_id": done.cluster_id, "credential": done.credential.expose(),
                        "credential_expires_at": stamp(done.expires_at), "config": config}),
                ))
            }
            Call::Config => Ok(answer(200, &serde_json::to_value(self.config(id)).unwrap_or_default())),
            Call::Heartbeat => {
                let beat: Heartbeat = parsed(bytes)?;
                let directives = registry.heartbeat(id, &beat, now)?;
                let reply = HeartbeatAnswer { config_version: self.config(id).config_version, directives };
                Ok(answer(200, &serde_json::to_value(reply).unwrap_or_default()))
            }
            Call::Status => {
                registry.report(id, parsed::<StatusReport>(bytes)?)?;
                Ok(answer(200, &json!({})))
            }
            Call::Rotate => {
                let (credential, expires_at) = registry.rotate(self.keys(), id, now).await?;
                Ok(answer(200, &json!({"credential": credential.expose(), "credential_expires_at": stamp(expires_at)})))
            }
            Call::Deregister => {
                registry.remove_agent(id, now).await?;
                Ok(answer(200, &json!({})))
            }
            Call::Projects => Ok(answer(200, &json!({"items": registry.projects()}))),
            Call::Admins => {
                let items: Vec<Value> = registry.admins().iter().map(|a| without_hash(json!(a))).collect();
                Ok(answer(200, &json!({"items": items})))
            }
            Call::AddAdmin => {
                let asked: Named = parsed(bytes)?;
                let (row, token) = registry.add_admin(self.keys(), &asked.name, now).await?;
                let mut shown = without_hash(json!(row));
                shown["token"] = token.expose().into();
                Ok(answer(201, &shown))
            }
            Call::RemoveAdmin => {
                registry.remove_admin(id).await?;
                Ok(answer(200, &json!({})))
            }
            Call::AddProject => {
                let asked: Named = parsed(bytes)?;
                Ok(answer(201, &json!(registry.add_project(&asked.name, now).await?)))
            }
            Call::Tokens => {
                let items: Vec<Value> = registry.enrolments().iter().map(|e| without_hash(json!(e))).collect();
                Ok(answer(200, &json!({"items": items})))
            }
            Call::AddToken => {
                let asked: AddToken = parsed(bytes)?;
                let ttl = life(asked.ttl_s, DAY, YEAR)?;
                let (name, project) = (asked.name.unwrap_or_else(|| "token".into()), asked.project.unwrap_or_else(|| "default".into()));
                let (row, token) = registry.add_enrolment(self.keys(), &project, &name, ttl, asked.uses.or(Some(1)).filter(|n| *n > 0), now).await?;
                let mut shown = without_hash(json!(row));
                shown["token"] = token.expose().into();
                shown["install"] = self.install_line(&token).into();
                Ok(answer(201, &shown))
            }
            Call::RevokeToken => {
                registry.revoke_enrolment(id).await?;
                Ok(answer(200, &json!({})))
            }
            Call::Runners => {
                let items: Vec<Value> = registry.accesses().iter().map(|a| without_hash(json!(a))).collect();
                Ok(answer(200, &json!({"items": items})))
            }
            Call::AddRunner => {
                let asked: AddRunner = parsed(bytes)?;
                let expires_at = asked.ttl_s.map(|ttl| life(Some(ttl), DAY, YEAR)).transpose()?.map(|ttl| now + ttl);
                let row = Access {
                    id: String::new(),
                    project: asked.project.unwrap_or_else(|| "default".into()),
                    name: asked.name,
                    kind: AccessKind::Runner,
                    hash: String::new(),
                    role: role(asked.role.as_deref(), Role::Deployer)?,
                    clusters: asked.clusters,
                    namespaces: asked.namespaces,
                    created_at: now,
                    expires_at,
                    revoked: false,
                    maker: None,
                };
                let (row, token) = registry.add_access(self.keys(), row).await?;
                let mut shown = without_hash(json!(row));
                shown["token"] = token.expose().into();
                Ok(answer(201, &shown))
            }
            Call::RevokeRunner => {
                registry.revoke_access(id).await?;
                Ok(answer(200, &json!({})))
            }
            Call::Clusters => {
                let items = self.visible(who, now);
                Ok(answer(200, &json!({"items": items})))
            }
            Call::Cluster => Ok(answer(200, &json!(self.seen(registry.cluster(id, project, now)?)))),
            Call::RevokeCluster => {
                registry.revoke_agent(id).await?;
                Ok(answer(200, &json!({})))
            }
            Call::RemoveCluster => {
                let agent = registry.cluster(id, None, now)?.agent_id;
                registry.remove_agent(&agent, now).await?;
                Ok(answer(200, &json!({})))
            }
            Call::ClusterToken => {
                let asked: Wanted = parsed(bytes)?;
                let ttl = life(asked.ttl_s, LIFE, LIFE)?;
                let (role, namespaces) = narrowed(who, &asked)?;
                let route = registry.route(id, project)?;
                Ok(answer(200, &self.runner_token(who, &route, role, namespaces, ttl, now)))
            }
            Call::Kubeconfig => {
                let asked: Wanted = parsed(bytes)?;
                let ttl = life(asked.ttl_s, DAY, DAY)?;
                let (role, namespaces) = narrowed(who, &asked)?;
                let cluster = registry.cluster(id, project, now)?;
                // not longer than whoever makes it may do anything himself
                let own_end = if let Who::Access(own) = who { own.expires_at } else { None };
                let row = Access {
                    id: String::new(),
                    project: cluster.project.clone(),
                    name: format!("kubeconfig of {}", cluster.id),
                    kind: AccessKind::Kubeconfig,
                    hash: String::new(),
                    role,
                    clusters: Some(vec![cluster.id.clone()]),
                    namespaces,
                    created_at: now,
                    expires_at: Some(own_end.map_or(now + ttl, |end| end.min(now + ttl))),
                    revoked: false,
                    maker: Some(who.subject()),
                };
                let (_, token) = registry.add_access(self.keys(), row).await?;
                Ok(plain(201, "application/yaml", self.kubeconfig(&cluster, &token)))
            }
            Call::Gateway
            | Call::Session
            | Call::Logout
            | Call::Changes
            | Call::Inside
            | Call::OperationResult
            | Call::AskOperation
            | Call::Operations
            | Call::Operation
            | Call::CancelOperation => Err(refused(500, "internal", "this route answers for itself", None)),
        }
    }
}

impl Hub {
    /// With the tunnel as this end of it knows, not as the agent said at its last heartbeat.
    pub(super) fn seen(&self, mut cluster: ClusterView) -> ClusterView {
        match self.tunnel_open(&cluster.agent_id) {
            Some(true) => cluster.tunnel = "up".into(),
            Some(false) if cluster.tunnel == "up" => cluster.tunnel = "down".into(),
            _ => {}
        }
        cluster
    }
}

fn without_hash(mut row: Value) -> Value {
    if let Some(fields) = row.as_object_mut() {
        fields.remove("hash");
    }
    row
}

/// RFC 3339.
pub(super) fn stamp(seconds: i64) -> String {
    jiff::Timestamp::from_second(seconds).unwrap_or_default().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_asks_for_more_than_he_has() {
        let access = |role, namespaces: Option<&[&str]>| {
            let namespaces = namespaces.map(|n| n.iter().map(|s| (*s).to_owned()).collect());
            Who::Access(Box::new(Access {
                id: "r-1".into(),
                project: "p".into(),
                name: "ci".into(),
                kind: AccessKind::Runner,
                hash: String::new(),
                role,
                clusters: None,
                namespaces,
                created_at: 0,
                expires_at: None,
                revoked: false,
                maker: None,
            }))
        };
        let wanted = |role: Option<&str>, namespaces: Option<&[&str]>| Wanted {
            role: role.map(str::to_owned),
            namespaces: namespaces.map(|n| n.iter().map(|s| (*s).to_owned()).collect()),
            ttl_s: None,
        };
        let deployer = access(Role::Deployer, Some(&["beta"]));
        assert_eq!(narrowed(&deployer, &wanted(None, None)).unwrap(), (Role::Deployer, Some(vec!["beta".into()])));
        assert_eq!(narrowed(&deployer, &wanted(Some("viewer"), Some(&["beta"]))).unwrap().0, Role::Viewer);
        assert_eq!(narrowed(&deployer, &wanted(Some("operator"), None)).unwrap_err().code, "role_exceeded");
        assert_eq!(narrowed(&deployer, &wanted(None, Some(&["beta", "production"]))).unwrap_err().code, "namespace_exceeded");
        assert_eq!(narrowed(&deployer, &wanted(Some("root"), None)).unwrap_err().code, "bad_role");
    }
}
