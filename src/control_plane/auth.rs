//! Authentication: one extractor type for each kind of caller. The first argument of a handler is
//! one of them, so a handler cannot be reached by another caller.

use std::net::IpAddr;

use axum::extract::FromRequestParts;
use axum::response::Response;
use http::request::Parts;
use http::{HeaderMap, header};

use super::answer::error_answer;
use super::body::{check_segments, path_not_found, segments};
use super::error::HttpError;
use super::model::{AccessKind, AccessToken};
use super::registry::Principal;
use super::state::ControlPlane;
use crate::contract::job::NOT_FOR_JOBS;
use crate::kubernetes::header_policy;

/// Answer to a login on the socket of the machine itself.
const NOT_LOCAL: &str = "log in over HTTPS; this socket is for the machine itself";

/// Paths whose first parameter names no cluster: who may see what it names is up to their handlers.
const OF_NO_CLUSTER: [&str; 2] = ["/api/v1/jobs/", "/api/v1/rollouts/"];

/// Where a request comes from.
#[derive(Clone, Copy, Debug)]
pub(super) enum Origin {
    Network(IpAddr),
    /// The socket in the data directory: a process that can open it can read the database anyway.
    Local,
}

/// The authentication that a route requires.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequiredAuth {
    /// None in the headers. Some routes take a secret in the body or in the path instead.
    None,
    /// Only the socket in the data directory answers it.
    Local,
    /// An enrolment token, or the credential of the agent that registers again.
    Enrolment,
    /// The credential of the agent that the path names.
    Agent,
    Admin,
    /// An administrator, or a Runner whose reach the cluster of the path is in. What it answers a
    /// token of a tenant is of that tenant.
    Runner,
    /// The same without tokens of tenants: it answers of all that is in a cluster.
    Project,
    /// A Runner that was made to bring jobs, whatever its role: others answer for what these do.
    /// Never a cookie.
    Jobs,
    /// As [`RequiredAuth::Runner`], or a kubeconfig; never a cookie.
    Gateway,
    /// A session of the page, which no tenant has.
    Session,
}

/// A kind of caller: extracted from the head of a request, before its body is read.
pub(super) trait CallerExtractor: FromRequestParts<ControlPlane> {
    const REQUIRED_AUTH: RequiredAuth;
}

/// Any caller.
pub(super) struct Anonymous(());

/// Any caller over the network.
pub(super) struct AnonymousPeer {
    pub(super) address: IpAddr,
}

/// An external frps, which calls us as its auth plugin: it has no token, its secret is in the path.
pub(super) struct FrpsCaller(());

/// A caller on the socket in the data directory.
pub(super) struct LocalAdmin(());

pub(super) struct EnrolmentCaller {
    pub(super) principal: Principal,
}

/// The agent that the path names.
pub(super) struct AgentCaller {
    pub(super) id: String,
}

/// An administrator, by token, session or socket.
pub(super) struct AdminCaller(());

pub(super) struct RunnerCaller {
    pub(super) principal: Principal,
    /// Hash of the token. A call over the local socket has none.
    pub(super) token: Option<String>,
}

/// A Runner of more than a tenant.
pub(super) struct ProjectCaller {
    pub(super) principal: Principal,
}

/// A Runner that brings jobs.
pub(super) struct JobsCaller {
    pub(super) access: Box<AccessToken>,
    /// Hash of its token.
    pub(super) token: String,
}

pub(super) struct GatewayCaller {
    pub(super) principal: Principal,
}

pub(super) struct SessionCaller {
    pub(super) principal: Principal,
}

/// Extracts each kind of caller from the head of a request.
macro_rules! callers {
    ($($caller:ident requires $required_auth:ident: $extracted:expr;)*) => {$(
        impl CallerExtractor for $caller {
            const REQUIRED_AUTH: RequiredAuth = RequiredAuth::$required_auth;
        }

        impl FromRequestParts<ControlPlane> for $caller {
            type Rejection = Response;

            async fn from_request_parts(
                parts: &mut Parts,
                control_plane: &ControlPlane,
            ) -> Result<$caller, Response> {
                let extracted: fn(&ControlPlane, &Parts) -> Result<$caller, HttpError> = $extracted;
                let extracted = check_segments(parts).and_then(|()| {
                    control_plane.count_request();
                    extracted(control_plane, parts)
                });
                extracted.map_err(|error| error_answer(error, parts.uri.path()))
            }
        }
    )*};
}

callers! {
    Anonymous requires None: |_, _| Ok(Anonymous(()));
    AnonymousPeer requires None: |_, parts| match origin(parts)? {
        Origin::Network(address) => Ok(AnonymousPeer { address }),
        Origin::Local => Err(HttpError::new(403, "not_here", NOT_LOCAL, None)),
    };
    FrpsCaller requires None: |control_plane, parts| match segments(parts).next() {
        Some(secret) if control_plane.is_frps(&secret) => Ok(FrpsCaller(())),
        _ => Err(path_not_found()),
    };
    LocalAdmin requires Local: |_, parts| match origin(parts)? {
        Origin::Local => Ok(LocalAdmin(())),
        Origin::Network(_) => {
            let message = "only the socket in the data directory answers this";
            Err(HttpError::new(403, "forbidden", message, None))
        }
    };
    EnrolmentCaller requires Enrolment: |control_plane, parts| {
        let (principal, _) = control_plane.authorize(RequiredAuth::Enrolment, parts)?;
        Ok(EnrolmentCaller { principal })
    };
    AgentCaller requires Agent: |control_plane, parts| {
        match control_plane.authorize(RequiredAuth::Agent, parts)?.0 {
            Principal::Agent(id) => Ok(AgentCaller { id }),
            _ => Err(forbidden()),
        }
    };
    AdminCaller requires Admin: |control_plane, parts| {
        control_plane.authorize(RequiredAuth::Admin, parts).map(|_| AdminCaller(()))
    };
    RunnerCaller requires Runner: |control_plane, parts| {
        let (principal, token) = control_plane.authorize(RequiredAuth::Runner, parts)?;
        Ok(RunnerCaller { principal, token })
    };
    ProjectCaller requires Project: |control_plane, parts| {
        let (principal, _) = control_plane.authorize(RequiredAuth::Project, parts)?;
        Ok(ProjectCaller { principal })
    };
    JobsCaller requires Jobs: |control_plane, parts| {
        match control_plane.authorize(RequiredAuth::Jobs, parts)? {
            (Principal::AccessToken(access), Some(token)) => Ok(JobsCaller { access, token }),
            _ => Err(forbidden()),
        }
    };
    GatewayCaller requires Gateway: |control_plane, parts| {
        let (principal, _) = control_plane.authorize(RequiredAuth::Gateway, parts)?;
        Ok(GatewayCaller { principal })
    };
    SessionCaller requires Session: |control_plane, parts| {
        let (principal, _) = control_plane.authorize(RequiredAuth::Session, parts)?;
        Ok(SessionCaller { principal })
    };
}

fn origin(parts: &Parts) -> Result<Origin, HttpError> {
    let origin = parts.extensions.get::<Origin>().copied();
    origin.ok_or_else(|| {
        HttpError::new(500, "internal", "the origin of this request is not known", None)
    })
}

fn forbidden() -> HttpError {
    HttpError::new(403, "forbidden", "this token is for something else", None)
}

fn not_for_jobs() -> HttpError {
    let hint = "make one for it: pipeops control-plane runner create NAME --jobs --role viewer";
    HttpError::new(403, NOT_FOR_JOBS, "this token is not one of a Runner for jobs", Some(hint))
}

/// Whether a route answers this caller; `agent` is the agent that its path names.
fn may_call(principal: &Principal, required_auth: RequiredAuth, agent: &str) -> bool {
    match (principal, required_auth) {
        (Principal::Enrolment(_) | Principal::Agent(_), RequiredAuth::Enrolment) => true,
        (Principal::Agent(own), RequiredAuth::Agent) => own == agent,
        (
            Principal::Admin(_),
            RequiredAuth::Admin
            | RequiredAuth::Runner
            | RequiredAuth::Project
            | RequiredAuth::Gateway
            | RequiredAuth::Session,
        ) => true,
        (Principal::AccessToken(access), RequiredAuth::Runner) => access.kind == AccessKind::Runner,
        (Principal::AccessToken(access), RequiredAuth::Project | RequiredAuth::Session) => {
            access.kind == AccessKind::Runner && access.tenant.is_none()
        }
        (Principal::AccessToken(access), RequiredAuth::Jobs) => {
            access.jobs
                && access.kind == AccessKind::Runner
                && access.tenant.is_none()
                && !access.person
        }
        (Principal::AccessToken(_), RequiredAuth::Gateway) => true,
        _ => false,
    }
}

fn bearer(headers: &HeaderMap) -> Result<&str, HttpError> {
    let token = header_policy::bearer(headers).filter(|t| !t.is_empty() && t.len() <= 512);
    token.ok_or_else(|| HttpError::new(401, "token_needed", "a bearer token is needed", None))
}

impl ControlPlane {
    /// The caller, if it may call this route, and the hash of its token. A call over the local
    /// socket has none.
    fn authorize(
        &self,
        required_auth: RequiredAuth,
        parts: &Parts,
    ) -> Result<(Principal, Option<String>), HttpError> {
        let Origin::Network(address) = origin(parts)? else {
            return match required_auth {
                RequiredAuth::Admin
                | RequiredAuth::Runner
                | RequiredAuth::Project
                | RequiredAuth::Gateway => Ok((Principal::Local, None)),
                RequiredAuth::Enrolment | RequiredAuth::Agent | RequiredAuth::Jobs => {
                    let message = "agents and Runners come over the network";
                    Err(HttpError::new(403, "not_here", message, None))
                }
                RequiredAuth::Session | RequiredAuth::None | RequiredAuth::Local => {
                    Err(HttpError::new(403, "not_here", NOT_LOCAL, None))
                }
            };
        };
        let (now, id) = (super::clock::now(), segments(parts).next().unwrap_or_default());
        let is_cluster = !id.is_empty()
            && !OF_NO_CLUSTER.iter().any(|start| parts.uri.path().starts_with(start));
        // a cookie is accepted on the routes of the page only: a web page served by a cluster
        // cannot use it
        let cookie = match required_auth {
            RequiredAuth::Session
            | RequiredAuth::Admin
            | RequiredAuth::Runner
            | RequiredAuth::Project
                if !parts.headers.contains_key(header::AUTHORIZATION) =>
            {
                self.inner.sessions.token(self.keys(), &parts.method, &parts.headers, now)?
            }
            _ => None,
        };
        let hash = match cookie {
            Some(hash) => hash,
            None if required_auth == RequiredAuth::Session => {
                return Err(HttpError::new(401, "login_needed", "not logged in", None));
            }
            None => self.keys().token_hash(bearer(&parts.headers)?),
        };
        self.inner.failures.check(address, &hash, now)?;
        let principal = match self.registry().authenticate(&hash, now) {
            Ok(principal) => principal,
            Err(error) => {
                if error.code == "token_unknown" {
                    self.inner.failures.failed(address, now);
                }
                return Err(error);
            }
        };
        self.inner.failures.succeeded(hash.clone());
        if !may_call(&principal, required_auth, &id) {
            let is_jobs = required_auth == RequiredAuth::Jobs;
            return Err(if is_jobs { not_for_jobs() } else { forbidden() });
        }
        if matches!(principal, Principal::Admin(_)) {
            self.remove_bootstrap_token();
        }
        // for a Runner, a cluster outside its reach does not exist
        if let (Principal::AccessToken(access), true) = (&principal, is_cluster) {
            self.registry().check_access(access, &id)?;
        }
        Ok((principal, Some(hash)))
    }
}
