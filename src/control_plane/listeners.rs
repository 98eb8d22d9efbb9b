//! Who listens for changes: counted, so that one caller does not take the place of all.

use std::collections::HashMap;
use std::sync::Arc;

use super::error::HttpError;
use parking_lot::Mutex;

/// Listeners at once, and those of one caller.
const MAX_LISTENERS: usize = 100;
const MAX_PER_CALLER: usize = 20;

/// The number of listeners, by subject.
#[derive(Clone, Default)]
pub(super) struct ChangesListeners(Arc<Mutex<HashMap<String, usize>>>);

/// One listener, counted until it is dropped.
pub(super) struct ChangesListener {
    all: ChangesListeners,
    subject: String,
}

impl ChangesListener {
    /// # Errors
    /// 503 when there are too many listeners.
    pub(super) fn enter(
        all: &ChangesListeners,
        subject: String,
    ) -> Result<ChangesListener, HttpError> {
        let mut open = all.0.lock();
        let full = |whose: &str, max: usize| {
            let message =
                format!("{whose} {max} streams of changes open, and more are not served at a time");
            Err(HttpError::new(
                503,
                "too_many_listeners",
                message,
                Some("close some: a page that is open holds one"),
            ))
        };
        if open.values().sum::<usize>() >= MAX_LISTENERS {
            return full("all callers together have", MAX_LISTENERS);
        }
        let mine = open.entry(subject.clone()).or_default();
        if *mine >= MAX_PER_CALLER {
            return full("this caller has", MAX_PER_CALLER);
        }
        *mine += 1;
        Ok(ChangesListener { all: all.clone(), subject })
    }
}

impl Drop for ChangesListener {
    fn drop(&mut self) {
        let mut open = self.all.0.lock();
        if let Some(mine) = open.get_mut(&self.subject) {
            *mine -= 1;
            if *mine == 0 {
                open.remove(&self.subject);
            }
        }
    }
}
