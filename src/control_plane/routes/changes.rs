//! Live changes: server-sent events with the clusters that a caller sees.

use std::collections::{HashMap, HashSet};
use std::convert::Infallible;
use std::time::Duration;

use axum::body::Body;
use axum::extract::State;
use axum::response::Response;
use futures_util::stream;
use http::{HeaderValue, header};
use hyper::body::Bytes;
use serde_json::json;

use super::Routes;
use crate::control_plane::auth::RunnerCaller;
use crate::control_plane::clock::now;
use crate::control_plane::error::HttpError;
use crate::control_plane::listeners::{ChangesListener, Listener};
use crate::control_plane::registry::{ClusterView, Principal};
use crate::control_plane::state::ControlPlane;

/// How often changes are looked for.
const TICK: Duration = Duration::from_secs(1);

pub(super) fn routes(routes: Routes) -> Routes {
    routes.get("/api/v1/changes", changes)
}

/// All clusters at first, then each second those that have changed, until the caller is revoked.
async fn changes(
    caller: RunnerCaller,
    State(control_plane): State<ControlPlane>,
) -> Result<Response, HttpError> {
    let principal = &caller.principal;
    let listener = match (principal.project(), principal.tenant()) {
        (Some(project), Some(tenant)) => Listener::Tenant(project.into(), tenant.into()),
        _ => Listener::Caller(principal.subject()),
    };
    let place = ChangesListener::enter(&control_plane.inner.listeners, listener)?;
    let stream =
        Changes { control_plane, caller, known: HashMap::new(), first: true, _place: place };
    let events = stream::unfold(stream, async |mut stream| {
        Some((Ok::<_, Infallible>(stream.next().await?), stream))
    });
    let mut response = Response::new(Body::from_stream(events));
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    Ok(response)
}

struct Changes {
    control_plane: ControlPlane,
    caller: RunnerCaller,
    /// By id, each cluster as it was sent last.
    known: HashMap<String, String>,
    first: bool,
    _place: ChangesListener,
}

impl Changes {
    async fn next(&mut self) -> Option<Bytes> {
        for quiet in 1.. {
            if !self.first {
                tokio::select! {
                    () = tokio::time::sleep(TICK) => {}
                    () = self.control_plane.inner.shutdown.cancelled() => return None,
                }
            }
            let now = now();
            // the token is checked each time; a caller on the local socket has none
            let principal = match (&self.caller.token, &self.caller.principal) {
                (Some(token), _) => self.control_plane.registry().authenticate(token, now).ok()?,
                (None, Principal::Local) => Principal::Local,
                (None, _) => return None,
            };
            let text =
                difference(&self.control_plane.visible(&principal, now), &mut self.known, now);
            let first = std::mem::take(&mut self.first);
            if let Some(text) = text {
                return Some(Bytes::from(text));
            }
            // a listener that is gone is noticed when something is sent to it
            if quiet >= 15 || first {
                return Some(Bytes::from_static(b": quiet\n\n"));
            }
        }
        None
    }
}

/// One event with the clusters that have changed, and those that were removed.
fn difference(
    items: &[ClusterView],
    known: &mut HashMap<String, String>,
    now: i64,
) -> Option<String> {
    let mut changed = Vec::new();
    let first = known.is_empty();
    for item in items {
        let mut steady = item.clone();
        // these move with every heartbeat and say nothing new
        (steady.seen_at, steady.uptime_s) = (0, 0);
        if !item.reason.is_empty() {
            steady.seen_at = item.seen_at;
            // the page itself counts "for 31 s" on
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
    let data = json!({"all": first, "changed": changed, "gone": gone, "now": now});
    Some(format!("event: clusters\ndata: {data}\n\n"))
}
