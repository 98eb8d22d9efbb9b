//! How many requests one caller, and all together, may have open. Each class of request is counted
//! apart, so that those that stay open do not starve the others.

use std::collections::HashMap;

use http::Method;
use http::request::Parts;

use super::Api;
use crate::kubernetes::answer::ApiError;
use crate::kubernetes::path::KubernetesPath;

/// Requests that end by themselves, and upgrades, of one caller and in all; the settings can change
/// it.
pub const STREAMS_PER_CALLER: usize = 64;
pub const STREAMS_TOTAL: usize = 512;
/// Watches and followed logs of one caller and in all: a tool like Argo CD holds one watch for each
/// kind of object, a few hundred.
pub const WATCHES_PER_CALLER: usize = 512;
pub const WATCHES_TOTAL: usize = 2048;

/// How many may be open.
#[derive(Clone, Copy, Debug)]
pub struct StreamLimits {
    pub per_caller: usize,
    pub total: usize,
    pub watches_per_caller: usize,
    pub watches_total: usize,
}

impl Default for StreamLimits {
    fn default() -> StreamLimits {
        StreamLimits {
            per_caller: STREAMS_PER_CALLER,
            total: STREAMS_TOTAL,
            watches_per_caller: WATCHES_PER_CALLER,
            watches_total: WATCHES_TOTAL,
        }
    }
}

/// How a request is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum StreamClass {
    /// It ends by itself.
    Short,
    /// exec, attach, port-forward.
    Upgrade,
    /// It stays open until the client closes it: a watch, a followed log, the events of an
    /// operation.
    Watch,
}

impl StreamClass {
    /// As the Kubernetes API decides what is long-running (kubernetes/apiserver
    /// `pkg/endpoints/request`, kubernetes `cmd/kube-apiserver` `BasicLongRunningRequestCheck`).
    pub(crate) fn classify(parts: &Parts, target: &KubernetesPath, upgrade: bool) -> StreamClass {
        if upgrade {
            return StreamClass::Upgrade;
        }
        if !matches!(parts.method, Method::GET | Method::HEAD) {
            return StreamClass::Short;
        }
        // the first value of a name counts, and whatever is not false is true (apimachinery
        // `pkg/runtime/converter.go`)
        let asked = |name: &str| {
            let query = parts.uri.query().unwrap_or_default();
            let value = query.split('&').find_map(|pair| {
                let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
                (key == name).then_some(value)
            });
            value.is_some_and(|value| !value.eq_ignore_ascii_case("false") && value != "0")
        };
        let log = target.subresource.as_deref() == Some("log");
        if (log && asked("follow")) || (!log && asked("watch")) {
            StreamClass::Watch
        } else {
            StreamClass::Short
        }
    }

    fn index(self) -> usize {
        self as usize
    }
}

#[derive(Default)]
pub(super) struct OpenStreams {
    all: [usize; 3],
    callers: HashMap<String, [usize; 3]>,
    /// Each token of a tenant is a caller of its own.
    tenants: HashMap<String, [usize; 3]>,
}

fn add(open: &mut HashMap<String, [usize; 3]>, name: &str, at: usize) {
    if let Some(count) = open.get_mut(name) {
        count[at] += 1;
        return;
    }
    let mut count = [0; 3];
    count[at] = 1;
    open.insert(name.to_owned(), count);
}

fn remove(open: &mut HashMap<String, [usize; 3]>, name: &str, at: usize) {
    if let Some(count) = open.get_mut(name) {
        count[at] -= 1;
        if *count == [0; 3] {
            open.remove(name);
        }
    }
}

impl OpenStreams {
    pub(super) fn total(&self) -> usize {
        self.all.iter().sum()
    }

    /// # Errors
    /// What is full.
    fn take(
        &mut self,
        limits: &StreamLimits,
        subject: &str,
        tenant: Option<&str>,
        stream: StreamClass,
    ) -> Result<(), ApiError> {
        let (each, all, keys) = match stream {
            StreamClass::Short | StreamClass::Upgrade => {
                (limits.per_caller, limits.total, ["streams-per-caller", "streams"])
            }
            StreamClass::Watch => {
                (limits.watches_per_caller, limits.watches_total, ["watches-per-caller", "watches"])
            }
        };
        let at = stream.index();
        if self.callers.get(subject).is_some_and(|mine| mine[at] >= each) || each == 0 {
            return Err(limit_reached(stream, "this caller has", each, keys[0]));
        }
        let half = (all / 2).max(1);
        let of_tenant = tenant.and_then(|tenant| self.tenants.get(tenant));
        if of_tenant.is_some_and(|count| count[at] >= half) {
            let key = format!("half of {}", keys[1]);
            return Err(limit_reached(stream, "the callers of this tenant have", half, &key));
        }
        if self.all[at] >= all {
            return Err(limit_reached(stream, "all callers together have", all, keys[1]));
        }
        self.all[at] += 1;
        add(&mut self.callers, subject, at);
        if let Some(tenant) = tenant {
            add(&mut self.tenants, tenant, at);
        }
        Ok(())
    }

    fn release(&mut self, subject: &str, tenant: Option<&str>, stream: StreamClass) {
        let at = stream.index();
        self.all[at] -= 1;
        remove(&mut self.callers, subject, at);
        if let Some(tenant) = tenant {
            remove(&mut self.tenants, tenant, at);
        }
    }
}

/// One open request of a caller, counted until it is dropped.
pub(crate) struct StreamPermit {
    api: Api,
    subject: String,
    tenant: Option<String>,
    stream: StreamClass,
}

impl Drop for StreamPermit {
    fn drop(&mut self) {
        let mut open = self.api.inner.open.lock();
        open.release(&self.subject, self.tenant.as_deref(), self.stream);
    }
}

fn limit_reached(stream: StreamClass, whose: &str, limit: usize, key: &str) -> ApiError {
    let what = match stream {
        StreamClass::Short => "requests",
        StreamClass::Upgrade => "exec, attach and port-forward streams",
        StreamClass::Watch => "watches and followed logs",
    };
    let message = format!(
        "{whose} {limit} {what} open, and more are not served at a time ({key} in the agent's \
         agent.toml)"
    );
    match stream {
        // other requests end by themselves
        StreamClass::Short => {
            ApiError::new(429, "too_many_streams", message, Some("try again in a moment"))
                .retry_after_s(1)
        }
        StreamClass::Upgrade => ApiError::new(429, "too_many_streams", message, Some("close some")),
        StreamClass::Watch => ApiError::new(429, "too_many_watches", message, Some("close some")),
    }
}

impl Api {
    /// # Errors
    /// What is full.
    pub(crate) fn permit(
        &self,
        subject: &str,
        tenant: Option<&str>,
        stream: StreamClass,
    ) -> Result<StreamPermit, ApiError> {
        let limits = &self.inner.context.limits;
        self.inner.open.lock().take(limits, subject, tenant, stream)?;
        let (subject, tenant) = (subject.to_owned(), tenant.map(str::to_owned));
        Ok(StreamPermit { api: self.clone(), subject, tenant, stream })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kubernetes::path;

    #[test]
    fn the_callers_of_a_tenant_have_half_of_all_streams_together() {
        let limits =
            StreamLimits { per_caller: 3, total: 8, watches_per_caller: 1, watches_total: 2 };
        let (acme, globex) = (Some("acme"), Some("globex"));
        let mut open = OpenStreams::default();
        let mut take = |subject: &str, tenant, stream| {
            open.take(&limits, subject, tenant, stream).err().map(|e| e.message.into_owned())
        };
        for subject in ["a", "a", "a", "b"] {
            assert_eq!(take(subject, acme, StreamClass::Short), None, "{subject}");
        }
        let full = take("c", acme, StreamClass::Short).unwrap();
        assert!(full.contains("of this tenant have 4 requests"), "{full}");
        assert!(full.contains("half of streams in"), "{full}");
        // of another class, another tenant, and of none, whatever it is called
        assert_eq!(take("c", acme, StreamClass::Watch), None);
        assert!(take("d", acme, StreamClass::Watch).is_some());
        assert_eq!(take("d", globex, StreamClass::Watch), None);
        for subject in ["acme", "acme", "acme", "d"] {
            assert_eq!(take(subject, None, StreamClass::Short), None, "{subject}");
        }
        let full = take("e", globex, StreamClass::Short).unwrap();
        assert!(full.contains("all callers together have 8"), "{full}");
        open.release("a", acme, StreamClass::Short);
        assert!(open.take(&limits, "c", acme, StreamClass::Short).is_ok());
        for (subject, tenant, stream) in [
            ("a", acme, StreamClass::Short),
            ("a", acme, StreamClass::Short),
            ("b", acme, StreamClass::Short),
            ("c", acme, StreamClass::Short),
            ("c", acme, StreamClass::Watch),
            ("d", globex, StreamClass::Watch),
        ] {
            open.release(subject, tenant, stream);
        }
        assert!(open.tenants.is_empty() && open.total() == 4);
    }

    #[test]
    fn what_stays_open_is_known_by_its_request() {
        let of = |method: &str, uri: &str| {
            let (parts, ()) =
                http::Request::builder().method(method).uri(uri).body(()).unwrap().into_parts();
            let target = path::parse(parts.uri.path()).unwrap();
            StreamClass::classify(&parts, &target, false)
        };
        for uri in [
            "/api/v1/pods?watch=true",
            "/api/v1/pods?watch=1&allowWatchBookmarks=true",
            "/api/v1/pods?resourceVersion=7&watch",
            "/api/v1/pods?watch=",
            "/apis/apps/v1/namespaces/beta/deployments?watch=True",
            "/api/v1/namespaces/beta/pods/p/log?follow&tailLines=1",
            "/api/v1/namespaces/beta/pods/p/log?container=c&follow=true",
        ] {
            assert_eq!(of("GET", uri), StreamClass::Watch, "{uri}");
        }
        for uri in [
            "/api/v1/pods",
            "/api/v1/pods?watch=false",
            "/api/v1/pods?watch=0",
            "/api/v1/pods?watch=false&watch=true",
            "/api/v1/pods?labelSelector=watch%3Dtrue",
            "/api/v1/namespaces/watch/pods/watch",
            "/api/v1/namespaces/beta/pods/p/log?follow=false",
            "/api/v1/namespaces/beta/pods/p/log?watch=true",
            "/api/v1/pods?follow=true",
        ] {
            assert_eq!(of("GET", uri), StreamClass::Short, "{uri}");
        }
        assert_eq!(of("POST", "/api/v1/namespaces/beta/pods?watch=true"), StreamClass::Short);
        assert_eq!(of("DELETE", "/api/v1/namespaces/beta/pods?watch=true"), StreamClass::Short);
    }
}
