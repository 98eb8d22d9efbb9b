//! Following the objects of a kind: a list in small pages, then a watch, repeated.

use futures_util::TryStreamExt as _;
use http::Request;
use kube::core::WatchEvent;
use serde_json::Value;

use crate::kubernetes::client::{Cluster, status};

/// What happened to the objects of a kind.
pub enum Change {
    /// A new list begins: what was known is no longer valid.
    Reset,
    Applied(Value),
    Deleted(Value),
    /// The list is complete.
    Synced,
}

/// Objects in a page of a list: what is parsed at once bounds the memory that the agent takes.
const PAGE_SIZE: usize = 25;
/// Seconds after which the API server ends a watch by itself.
const WATCH_TIMEOUT_S: u32 = 290;

/// Follows until something fails. A kind that the server does not have, or that may not be read,
/// counts as empty.
///
/// # Errors
/// Whatever ends the list or the watch but its time.
pub async fn follow(
    cluster: &Cluster,
    path: &str,
    mut on: impl FnMut(Change),
) -> Result<(), kube::Error> {
    loop {
        on(Change::Reset);
        let mut version = list(cluster, path, &mut on).await?;
        on(Change::Synced);
        let Some(version) = &mut version else {
            // no such kind, or no right to see it
            return Ok(());
        };
        loop {
            let uri = format!(
                "{path}?watch=1&allowWatchBookmarks=true&timeoutSeconds={WATCH_TIMEOUT_S}\
                 &resourceVersion={version}"
            );
            let request = Request::get(uri).body(Vec::new()).map_err(kube::Error::HttpError)?;
            let mut events = std::pin::pin!(cluster.client.request_events::<Value>(request).await?);
            let mut expired = false;
            while let Some(event) = events.try_next().await? {
                match event {
                    WatchEvent::Added(object) | WatchEvent::Modified(object) => {
                        remember(version, &object);
                        on(Change::Applied(object));
                    }
                    WatchEvent::Deleted(object) => {
                        remember(version, &object);
                        on(Change::Deleted(object));
                    }
                    WatchEvent::Bookmark(mark) => {
                        version.clone_from(&mark.metadata.resource_version)
                    }
                    WatchEvent::Error(error) if error.code == 410 => expired = true,
                    WatchEvent::Error(error) => return Err(kube::Error::Api(error)),
                }
            }
            if expired {
                break;
            }
        }
    }
}

fn remember(version: &mut String, object: &Value) {
    if let Some(seen) = object["metadata"]["resourceVersion"].as_str() {
        seen.clone_into(version);
    }
}

/// The resource version of a complete list; `None` when there is nothing to follow.
async fn list(
    cluster: &Cluster,
    path: &str,
    on: &mut impl FnMut(Change),
) -> Result<Option<String>, kube::Error> {
    let mut more = String::new();
    loop {
        let mut page = match cluster.get(&format!("{path}?limit={PAGE_SIZE}{more}")).await {
            Ok(Some(page)) => page,
            Ok(None) => return Ok(None),
            Err(e) if status(&e) == Some(403) => return Ok(None),
            Err(e) => return Err(e),
        };
        if let Value::Array(items) = page["items"].take() {
            items.into_iter().for_each(|item| on(Change::Applied(item)));
        }
        match page["metadata"]["continue"].as_str() {
            Some(token) if !token.is_empty() => {
                more = format!(
                    "&continue={}",
                    url::form_urlencoded::byte_serialize(token.as_bytes()).collect::<String>()
                )
            }
            _ => {
                return Ok(Some(
                    page["metadata"]["resourceVersion"].as_str().unwrap_or("0").to_owned(),
                ));
            }
        }
    }
}
