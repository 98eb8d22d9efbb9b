//! The page for people: three files, a session in a cookie, live changes, and a look into one cluster. Its data is the API's.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use futures_util::stream;
use http::{HeaderMap, Method, Response, header};
use http_body_util::{BodyExt as _, StreamBody};
use hyper::body::{Bytes, Frame};
use serde::Deserialize;
use serde_json::{Value, json};

use super::Hub;
use super::api::answer;
use super::keys::fresh;
use super::registry::{ClusterView, Refused, Who, refused, unwritten};
use crate::base::secret::same;
use crate::control_plane::model::AccessKind;
use crate::kubernetes::answer::plain;
use crate::kubernetes::upstream::Body;

/// Name of the session's cookie. The prefix makes browsers refuse one that is not Secure, or is set for other hosts or paths.
const COOKIE: &str = "__Host-pipeops";
/// Header that tells a call of our page from one that another page made the browser send.
const CSRF: &str = "x-csrf-token";
/// Life of a session, seconds, and how many there may be.
const LIFE: i64 = 12 * 3600;
const MOST: usize = 1000;
/// How often changes are looked for, and how many may listen.
const TICK: Duration = Duration::from_secs(1);
const LISTENERS: usize = 100;
/// How many of them may be one caller's.
const EACH: usize = 20;

const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; base-uri 'none'; \
                      form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'";

/// The files of the page, by path.
const FILES: &[(&str, &str, &str)] = &[
    ("/", "text/html; charset=utf-8", include_str!("page/index.html")),
    ("/page.css", "text/css; charset=utf-8", include_str!("page/page.css")),
    ("/page.js", "text/javascript; charset=utf-8", include_str!("page/page.js")),
    ("/icon.svg", "image/svg+xml", include_str!("page/icon.svg")),
];

/// Who has logged in. Restarting the control plane ends all of them.
#[derive(Default)]
pub(super) struct Sessions {
    /// By the keyed hash of the cookie's value.
    open: Mutex<HashMap<String, Session>>,
    listeners: Arc<Mutex<HashMap<String, usize>>>,
}

/// One who listens, counted until it is gone.
struct Listener {
    all: Arc<Mutex<HashMap<String, usize>>>,
    subject: String,
}

impl Listener {
    /// # Errors
    /// What is full.
    fn enter(all: &Arc<Mutex<HashMap<String, usize>>>, subject: String) -> Result<Listener, Refused> {
        let mut open = super::lock(all);
        let full = |whose: &str, most: usize| {
            let message = format!("{whose} {most} streams of changes open, and more are not served at a time");
            Err(refused(503, "too_many_listeners", message, Some("close some: a page that is open holds one")))
        };
        if open.values().sum::<usize>() >= LISTENERS {
            return full("all callers together have", LISTENERS);
        }
        let mine = open.entry(subject.clone()).or_default();
        if *mine >= EACH {
            return full("this caller has", EACH);
        }
        *mine += 1;
        Ok(Listener { all: all.clone(), subject })
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let mut open = super::lock(&self.all);
        if let Some(mine) = open.get_mut(&self.subject) {
            *mine -= 1;
            if *mine == 0 {
                open.remove(&self.subject);
            }
        }
    }
}

struct Session {
    /// Hash of the token that was shown: what it may is asked anew at each call.
    token: String,
    csrf: String,
    until: i64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Login {
    token: crate::base::secret::Secret,
}

/// What a look into a cluster shows, and where the agent has it.
const INSIDE: &[(&str, &str, bool)] = &[
    ("deployments", "k8s/apis/apps/v1/deployments?limit=500", false),
    ("statefulsets", "k8s/apis/apps/v1/statefulsets?limit=500", false),
    ("daemonsets", "k8s/apis/apps/v1/daemonsets?limit=500", false),
    ("events", "k8s/api/v1/events?limit=200", false),
    ("audit", "api/v1/audit", true),
];

fn cookie(headers: &HeaderMap) -> Option<&str> {
    let all = headers.get_all(header::COOKIE).into_iter().filter_map(|v| v.to_str().ok()).flat_map(|v| v.split(';'));
    let mut ours = all.filter_map(|pair| pair.trim().strip_prefix(COOKIE)?.strip_prefix('='));
    // two of them: somebody else has set one
    ours.next().filter(|value| !value.is_empty() && value.len() <= 128 && ours.next().is_none())
}

impl Sessions {
    fn open(&self) -> MutexGuard<'_, HashMap<String, Session>> {
        super::lock(&self.open)
    }
}

impl Hub {
    /// A file of the page.
    pub(super) fn page(path: &str) -> Result<Response<Body>, Refused> {
        let (_, kind, text) = FILES.iter().find(|f| f.0 == path).ok_or_else(|| refused(404, "not_found", "there is no such path", None))?;
        let mut file = plain(200, kind, (*text).to_owned());
        for (name, value) in [("content-security-policy", POLICY), ("referrer-policy", "no-referrer"), ("cross-origin-opener-policy", "same-origin")]
        {
            file.headers_mut().insert(name, header::HeaderValue::from_static(value));
        }
        Ok(file)
    }

    /// A session for whoever shows an administrator's or a Runner's token.
    pub(super) fn login(&self, address: IpAddr, bytes: &[u8], now: i64) -> Result<Response<Body>, Refused> {
        let asked: Login = super::api::parsed(bytes)?;
        let hash = self.keys().hashed(asked.token.expose().trim());
        self.guard(address, &hash, now)?;
        let who = self.registry().who(&hash, now).inspect_err(|_| self.failed(address, now))?;
        match &who {
            Who::Admin(_) => self.admin_seen(),
            Who::Access(access) if access.kind == AccessKind::Runner => {}
            _ => {
                return Err(refused(
                    403,
                    "forbidden",
                    "this token is for something else",
                    Some("log in with an administrator's or a Runner's token"),
                ));
            }
        }
        self.succeeded(hash.clone());
        let (value, csrf) = (fresh().map_err(|e| unwritten(&e))?, fresh().map_err(|e| unwritten(&e))?);
        {
            let mut open = self.inner.sessions.open();
            open.retain(|_, s| s.until > now);
            if open.len() >= MOST {
                return Err(refused(503, "too_many_sessions", "too many people are logged in", Some("log out elsewhere, or wait")));
            }
            open.insert(self.keys().hashed(&value), Session { token: hash, csrf: csrf.clone(), until: now + LIFE });
        }
        let mut done = answer(200, &about(&who, &csrf));
        let set = format!("{COOKIE}={value}; Path=/; Secure; HttpOnly; SameSite=Strict; Max-Age={LIFE}");
        done.headers_mut().insert(header::SET_COOKIE, header::HeaderValue::try_from(set).map_err(|e| unwritten(&e.into()))?);
        Ok(done)
    }

    pub(super) fn logout(&self, headers: &HeaderMap) -> Response<Body> {
        if let Some(value) = cookie(headers) {
            self.inner.sessions.open().remove(&self.keys().hashed(value));
        }
        let mut done = answer(200, &json!({}));
        let gone = "__Host-pipeops=; Path=/; Secure; HttpOnly; SameSite=Strict; Max-Age=0";
        done.headers_mut().insert(header::SET_COOKIE, header::HeaderValue::from_static(gone));
        done
    }

    /// Who is logged in, to a page that was loaded anew.
    pub(super) fn session(&self, who: &Who, headers: &HeaderMap) -> Response<Body> {
        let csrf = cookie(headers).and_then(|v| self.inner.sessions.open().get(&self.keys().hashed(v)).map(|s| s.csrf.clone()));
        answer(200, &about(who, &csrf.unwrap_or_default()))
    }

    /// The hash of the token behind a request's cookie, if it has one.
    ///
    /// # Errors
    /// 401 when the session is over, 403 for a request that another page made the browser send.
    pub(super) fn by_cookie(&self, method: &Method, headers: &HeaderMap, now: i64) -> Result<Option<String>, Refused> {
        let Some(value) = cookie(headers) else { return Ok(None) };
        let open = self.inner.sessions.open();
        let session = open.get(&self.keys().hashed(value)).filter(|s| s.until > now);
        let session = session.ok_or_else(|| refused(401, "session_over", "the session is over", Some("log in again")))?;
        let text = |name: &str| headers.get(name).and_then(|v| v.to_str().ok());
        // browsers say where a request comes from, and a page cannot change what they say
        let foreign = text("sec-fetch-site").is_some_and(|site| site != "same-origin");
        let safe = matches!(*method, Method::GET | Method::HEAD);
        if foreign || (!safe && !text(CSRF).is_some_and(|shown| same(shown, &session.csrf))) {
            return Err(refused(403, "foreign_request", "this request does not come from the control plane's page", None));
        }
        Ok(Some(session.token.clone()))
    }

    /// The clusters that somebody sees.
    pub(super) fn visible(&self, who: &Who, now: i64) -> Vec<ClusterView> {
        let reached = |c: &ClusterView| !matches!(who, Who::Access(access) if !access.includes(&c.id));
        self.registry().clusters(who.project(), now).into_iter().filter(reached).map(|c| self.seen(c)).collect()
    }

    /// Server-sent events: all clusters at first, then what has changed each second, until the right to it ends.
    pub(super) fn changes(&self, who: &Who, token: Option<String>) -> Result<Response<Body>, Refused> {
        let place = Listener::enter(&self.inner.sessions.listeners, who.subject())?;
        let hub = self.clone();
        let known: HashMap<String, String> = HashMap::new();
        let who = who.clone();
        let events = stream::unfold((hub, known, true, 0_u32, place), move |(hub, mut known, first, quiet, place)| {
            let (who, token) = (who.clone(), token.clone());
            async move {
                let mut quiet = quiet;
                loop {
                    if !first {
                        tokio::select! {
                            () = tokio::time::sleep(TICK) => {}
                            () = hub.inner.ending.cancelled() => return None,
                        }
                    }
                    let now = super::now();
                    // what was shown is asked about each time; the local socket shows nothing, and needs not to
                    let who = match (&token, &who) {
                        (Some(token), _) => hub.registry().who(token, now).ok()?,
                        (None, Who::Local) => Who::Local,
                        (None, _) => return None,
                    };
                    let items = hub.visible(&who, now);
                    let text = difference(&items, &mut known);
                    if let Some(text) = text {
                        return Some((Ok::<_, tower::BoxError>(Frame::data(Bytes::from(text))), (hub, known, false, 0, place)));
                    }
                    quiet += 1;
                    // a listener that is gone is noticed when something is sent to it
                    if quiet >= 15 || first {
                        return Some((Ok(Frame::data(Bytes::from_static(b": quiet\n\n"))), (hub, known, false, 0, place)));
                    }
                }
            }
        });
        let mut response = Response::new(StreamBody::new(events).boxed_unsync());
        response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static("text/event-stream"));
        Ok(response)
    }

    /// What goes on in a cluster, as its own API tells the caller.
    pub(super) async fn inside(&self, who: &Who, id: &str, what: &str, now: i64) -> Result<Response<Body>, Refused> {
        let (_, path, audit) =
            INSIDE.iter().find(|i| i.0 == what).ok_or_else(|| refused(404, "not_found", format!("there is no view {what}"), None))?;
        let value = self.look_into(who, id, path, *audit, now).await?;
        let items = value["items"].as_array().map(Vec::as_slice).unwrap_or_default();
        let rows: Vec<Value> = if *audit { items.to_vec() } else { items.iter().map(|item| row(what, item)).collect() };
        Ok(answer(200, &json!({"items": rows})))
    }
}

fn about(who: &Who, csrf: &str) -> Value {
    let (name, admin) = match who {
        Who::Admin(name) => (name.as_str(), true),
        Who::Local => ("local", true),
        Who::Access(access) => (access.name.as_str(), false),
        Who::Agent(_) | Who::Enrolment(_) => ("", false),
    };
    json!({"name": name, "admin": admin, "csrf": csrf, "version": env!("CARGO_PKG_VERSION")})
}

/// One event with the clusters that are not as they were, and those that are gone.
fn difference(items: &[ClusterView], known: &mut HashMap<String, String>) -> Option<String> {
    let mut changed = Vec::new();
    let first = known.is_empty();
    for item in items {
        let mut steady = item.clone();
        // these move with every heartbeat and say nothing new
        (steady.seen_at, steady.uptime_s) = (0, 0);
        if !item.reason.is_empty() {
            steady.seen_at = item.seen_at;
            // "for 31 s" is counted on by the page
            steady.reason = String::new();
        }
        let text = json!(steady).to_string();
        if known.get(&item.id) != Some(&text) {
            known.insert(item.id.clone(), text);
            changed.push(json!(item));
        }
    }
    let mut gone = Vec::new();
    if known.len() > items.len() {
        let there: HashSet<&str> = items.iter().map(|i| i.id.as_str()).collect();
        gone.extend(known.keys().filter(|id| !there.contains(id.as_str())).cloned());
        known.retain(|id, _| there.contains(id.as_str()));
    }
    if changed.is_empty() && gone.is_empty() {
        return None;
    }
    let data = json!({"all": first, "changed": changed, "gone": gone, "now": super::now()});
    Some(format!("event: clusters\ndata: {data}\n\n"))
}

/// What the page shows of an object: text and numbers, nothing else of it leaves here.
fn row(what: &str, item: &Value) -> Value {
    let meta = &item["metadata"];
    match what {
        "events" => json!({
            "at": ([&item["lastTimestamp"], &item["eventTime"], &meta["creationTimestamp"]].into_iter().find(|v| v.is_string())),
            "kind": item["type"], "reason": item["reason"], "message": item["message"], "count": item["count"],
            "object": format!("{}/{}", text(&item["involvedObject"]["kind"]), text(&item["involvedObject"]["name"])),
            "namespace": meta["namespace"],
        }),
        _ => {
            let (spec, status) = (&item["spec"], &item["status"]);
            let number = |v: &Value| v.as_i64().unwrap_or(0);
            let (wanted, ready) = if what == "daemonsets" {
                (number(&status["desiredNumberScheduled"]), number(&status["numberReady"]))
            } else {
                (spec["replicas"].as_i64().unwrap_or(1), number(&status["readyReplicas"]))
            };
            let images: Vec<&Value> = spec["template"]["spec"]["containers"].as_array().into_iter().flatten().map(|c| &c["image"]).collect();
            json!({"namespace": meta["namespace"], "name": meta["name"], "wanted": wanted, "ready": ready, "images": images, "created": meta["creationTimestamp"]})
        }
    }
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}
