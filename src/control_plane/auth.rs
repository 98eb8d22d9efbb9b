//! Who asks: a type for each kind of caller, which a handler names as its first argument. One that names nobody is told of nobody.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::sync::MutexGuard;

use axum::extract::FromRequestParts;
use axum::response::Response;
use http::request::Parts;
use http::{HeaderMap, header};

use super::Hub;
use super::answer::problem;
use super::body::{named, not_here, segments};
use super::model::AccessKind;
use super::registry::{Refused, Who, refused};
use crate::frp::admission::rate_limit_key;
use crate::kubernetes::header_policy;

/// Wrong tokens from one address within a minute, after which unknown ones are not looked at for the rest of it.
const FAILURES: u32 = 30;
/// Addresses and tokens remembered for that, at most.
const REMEMBERED: usize = 10_000;

/// Where a request comes from, as far as it matters.
#[derive(Clone, Copy, Debug)]
pub(super) enum Origin {
    Network(IpAddr),
    /// The socket in the data directory: whoever can open it owns the database anyway.
    Local,
}

/// What a route needs of whoever calls it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// Anybody may call it. What some of these need stands in the body, or in the path.
    Nobody,
    /// Only the socket in the data directory answers it.
    Local,
    /// An enrolment token, or the credential of the agent that registers again.
    Enrol,
    /// The credential of the agent that the path names.
    Agent,
    Admin,
    /// An administrator, or a Runner whose reach the cluster of the path is in.
    Runner,
    /// The same, or a kubeconfig; never a cookie.
    Gateway,
    /// Whoever has logged in on the page.
    Session,
}

/// A kind of caller: made of the head of a request, before its body is looked at, or not at all.
pub(super) trait Caller: FromRequestParts<Hub> {
    const NEED: Need;
}

/// Anybody.
pub(super) struct Anonymous(());

/// Anybody who comes over the network, from there.
pub(super) struct AnonymousPeer {
    pub(super) address: IpAddr,
}

/// The frps of somebody, whose auth plugin we are: it has no token to show, its secret stands in the path.
pub(super) struct FrpsCaller(());

/// Whoever can open the socket in the data directory, by that socket alone.
pub(super) struct LocalAdmin(());

pub(super) struct EnrolmentCaller {
    pub(super) who: Who,
}

/// The agent that the path names.
pub(super) struct AgentCaller {
    pub(super) id: String,
}

/// An administrator, by token, session or socket.
pub(super) struct AdminCaller(());

pub(super) struct RunnerCaller {
    pub(super) who: Who,
    /// Hash of what was shown: the local socket shows nothing.
    pub(super) token: Option<String>,
}

pub(super) struct GatewayCaller {
    pub(super) who: Who,
}

pub(super) struct SessionCaller {
    pub(super) who: Who,
}

/// How each kind of caller is made of a request's head.
macro_rules! callers {
    ($($caller:ident needs $need:ident: $made:expr;)*) => {$(
        impl Caller for $caller {
            const NEED: Need = Need::$need;
        }

        impl FromRequestParts<Hub> for $caller {
            type Rejection = Response;

            async fn from_request_parts(parts: &mut Parts, hub: &Hub) -> Result<$caller, Response> {
                let made: fn(&Hub, &Parts) -> Result<$caller, Refused> = $made;
                let made = named(parts).and_then(|()| {
                    hub.count_request();
                    made(hub, parts)
                });
                made.map_err(|refused| problem(refused, parts.uri.path()))
            }
        }
    )*};
}

callers! {
    Anonymous needs Nobody: |_, _| Ok(Anonymous(()));
    AnonymousPeer needs Nobody: |_, parts| match origin(parts)? {
        Origin::Network(address) => Ok(AnonymousPeer { address }),
        Origin::Local => Err(refused(403, "not_here", "people come over the network", None)),
    };
    FrpsCaller needs Nobody: |hub, parts| match segments(parts).next() {
        Some(secret) if hub.is_frps(&secret) => Ok(FrpsCaller(())),
        _ => Err(not_here()),
    };
    LocalAdmin needs Local: |_, parts| match origin(parts)? {
        Origin::Local => Ok(LocalAdmin(())),
        Origin::Network(_) => Err(refused(403, "forbidden", "only the socket in the data directory answers this", None)),
    };
    EnrolmentCaller needs Enrol: |hub, parts| Ok(EnrolmentCaller { who: hub.authorised(Need::Enrol, parts)?.0 });
    AgentCaller needs Agent: |hub, parts| match hub.authorised(Need::Agent, parts)?.0 {
        Who::Agent(id) => Ok(AgentCaller { id }),
        _ => Err(forbidden()),
    };
    AdminCaller needs Admin: |hub, parts| hub.authorised(Need::Admin, parts).map(|_| AdminCaller(()));
    RunnerCaller needs Runner: |hub, parts| hub.authorised(Need::Runner, parts).map(|(who, token)| RunnerCaller { who, token });
    GatewayCaller needs Gateway: |hub, parts| Ok(GatewayCaller { who: hub.authorised(Need::Gateway, parts)?.0 });
    SessionCaller needs Session: |hub, parts| Ok(SessionCaller { who: hub.authorised(Need::Session, parts)?.0 });
}

fn origin(parts: &Parts) -> Result<Origin, Refused> {
    let origin = parts.extensions.get::<Origin>().copied();
    origin
        .ok_or_else(|| refused(500, "internal", "nobody knows where this request comes from", None))
}

fn forbidden() -> Refused {
    refused(403, "forbidden", "this token is for something else", None)
}

fn bearer(headers: &HeaderMap) -> Result<&str, Refused> {
    let token = header_policy::bearer(headers).filter(|t| !t.is_empty() && t.len() <= 512);
    token.ok_or_else(|| refused(401, "token_needed", "a bearer token is needed", None))
}

/// Wrong tokens of this minute, and which tokens were right.
#[derive(Default)]
pub(super) struct Failures {
    minute: i64,
    by: HashMap<IpAddr, u32>,
    /// Hashes that were good since the start: those pass however many wrong ones come from the same address.
    good: HashSet<String>,
}

impl Hub {
    /// Who asks, if it may, and the hash of what it showed: the local socket shows nothing.
    fn authorised(&self, need: Need, parts: &Parts) -> Result<(Who, Option<String>), Refused> {
        let Origin::Network(address) = origin(parts)? else {
            return match need {
                Need::Admin | Need::Runner | Need::Gateway => Ok((Who::Local, None)),
                Need::Enrol | Need::Agent => {
                    Err(refused(403, "not_here", "agents come over the network", None))
                }
                Need::Session | Need::Nobody | Need::Local => {
                    Err(refused(403, "not_here", "people come over the network", None))
                }
            };
        };
        let (now, id) = (super::now(), segments(parts).next().unwrap_or_default());
        // a cookie counts where the page calls, and nowhere else: what a cluster serves cannot use it
        let cookie = match need {
            Need::Session | Need::Admin | Need::Runner
                if !parts.headers.contains_key(header::AUTHORIZATION) =>
            {
                self.by_cookie(&parts.method, &parts.headers, now)?
            }
            _ => None,
        };
        let hash = match cookie {
            Some(hash) => hash,
            None if need == Need::Session => {
                return Err(refused(401, "login_needed", "nobody is logged in", None));
            }
            None => self.keys().hashed(bearer(&parts.headers)?),
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
            (Who::Enrolment(_) | Who::Agent(_), Need::Enrol) => true,
            (Who::Agent(own), Need::Agent) => *own == id,
            (Who::Admin(_), Need::Admin | Need::Runner | Need::Gateway | Need::Session) => true,
            (Who::Access(access), Need::Runner | Need::Session) => {
                access.kind == AccessKind::Runner
            }
            (Who::Access(_), Need::Gateway) => true,
            _ => false,
        };
        if !fine {
            return Err(forbidden());
        }
        if matches!(who, Who::Admin(_)) {
            self.admin_seen();
        }
        // a cluster outside its reach is not there for a Runner
        if let (Who::Access(access), false) = (&who, id.is_empty()) {
            self.registry().reaches(access, &id)?;
        }
        Ok((who, Some(hash)))
    }

    fn failures(&self) -> MutexGuard<'_, Failures> {
        super::lock(&self.inner.failures)
    }

    /// # Errors
    /// 429 for an unknown token from an address that has shown many wrong ones.
    pub(super) fn guard(&self, address: IpAddr, hash: &str, now: i64) -> Result<(), Refused> {
        let address = rate_limit_key(address);
        let mut failures = self.failures();
        if failures.minute != now / 60 {
            failures.minute = now / 60;
            failures.by.clear();
        }
        if failures.by.get(&address).is_some_and(|n| *n >= FAILURES)
            && !failures.good.contains(hash)
        {
            return Err(refused(
                429,
                "too_many_failures",
                "too many wrong tokens from this address",
                Some("wait a minute"),
            ));
        }
        Ok(())
    }

    pub(super) fn failed(&self, address: IpAddr, now: i64) {
        let address = rate_limit_key(address);
        let mut failures = self.failures();
        if failures.by.len() < REMEMBERED || failures.by.contains_key(&address) {
            *failures.by.entry(address).or_default() += 1;
        }
        if failures.by.get(&address) == Some(&FAILURES) {
            tracing::warn!(%address, minute = now / 60, "many wrong tokens");
        }
    }

    pub(super) fn succeeded(&self, hash: String) {
        let mut failures = self.failures();
        if failures.good.len() < REMEMBERED {
            failures.good.insert(hash);
        }
    }
}
