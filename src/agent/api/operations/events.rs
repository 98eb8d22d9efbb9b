//! The events of an operation, as a stream that a client follows.

use std::time::Duration;

use futures_util::stream;
use http::{HeaderMap, HeaderValue, Response, header};
use http_body_util::StreamBody;
use hyper::body::{Bytes, Frame};
use tokio::sync::watch;
use tokio::time::sleep;

use super::super::Api;
use super::super::permits::{StreamClass, StreamPermit};
use super::not_found;
use crate::base::connection::Body;
use crate::contract::token::Caller;

/// A listener that is gone is noticed when something is sent to it.
const KEEPALIVE: Duration = Duration::from_secs(15);

impl Api {
    /// Server-sent events (WHATWG HTML §9.2): each step, then `end` with the operation. With
    /// `Last-Event-ID` they continue where another listener stopped.
    pub(super) fn events(
        &self,
        caller: &Caller,
        id: String,
        headers: &HeaderMap,
    ) -> Response<Body> {
        let permit =
            match self.permit(&caller.subject, caller.tenant.as_deref(), StreamClass::Watch) {
                Ok(permit) => permit,
                Err(problem) => return problem.plain(),
            };
        let known = self.operations().all.lock().get(&id).map(|l| {
            let events = l.events.len();
            (l.changes.subscribe(), events)
        });
        let Some((mut changes, events)) = known else {
            return not_found();
        };
        changes.mark_changed();
        let last = headers
            .get("last-event-id")
            .and_then(|v| v.to_str().ok())
            .and_then(|v| v.parse::<usize>().ok())
            // a restart of the agent counts from the beginning
            .filter(|last| *last <= events);
        let begin = EventListener {
            api: self.clone(),
            id,
            changes,
            next: last.unwrap_or(0),
            ended: false,
            _permit: permit,
        };
        let events = stream::unfold(begin, |mut listener| async move {
            let text = listener.next().await?;
            Some((Ok::<_, tower::BoxError>(Frame::data(Bytes::from(text))), listener))
        });
        let mut response = Response::new(Body::new(StreamBody::new(events)));
        for (name, value) in
            [(header::CONTENT_TYPE, "text/event-stream"), (header::CACHE_CONTROL, "no-store")]
        {
            response.headers_mut().insert(name, HeaderValue::from_static(value));
        }
        response
    }
}

/// A client that follows an operation.
struct EventListener {
    api: Api,
    id: String,
    changes: watch::Receiver<()>,
    /// Number of the next event to send.
    next: usize,
    ended: bool,
    _permit: StreamPermit,
}

impl EventListener {
    async fn next(&mut self) -> Option<String> {
        if self.ended {
            return None;
        }
        loop {
            tokio::select! {
                changed = self.changes.changed() => changed.ok()?,
                () = sleep(KEEPALIVE) => return Some(": quiet\n\n".into()),
                () = self.api.inner.context.abort.cancelled() => return None,
            }
            let all = self.api.operations().all.lock();
            let live = all.get(&self.id)?;
            let mut text = String::new();
            for event in live.events.iter().skip(self.next) {
                self.next += 1;
                text.push_str(&format!("id: {}\nevent: step\ndata: {event}\n\n", self.next));
            }
            if live.stored.operation.state.ended() {
                self.ended = true;
                text.push_str(&format!(
                    "event: end\ndata: {}\n\n",
                    serde_json::to_string(&live.stored.operation).unwrap_or_default()
                ));
            }
            if !text.is_empty() {
                return Some(text);
            }
        }
    }
}
