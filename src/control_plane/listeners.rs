//! Who listens for changes: counted, so that one caller does not take the place of all.

use std::collections::HashMap;
use std::sync::Arc;

use super::error::HttpError;
use parking_lot::Mutex;

/// Listeners at once, those of all tenants together, and those of one caller or tenant.
const MAX_LISTENERS: usize = 100;
const MAX_OF_TENANTS: usize = MAX_LISTENERS / 2;
const MAX_PER_CALLER: usize = 20;

/// Whose listeners are counted together.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Listener {
    /// A caller of no tenant, by subject.
    Caller(String),
    /// All who call with tokens of a tenant, by project and name.
    Tenant(String, String),
}

/// The number of listeners.
#[derive(Clone, Default)]
pub(super) struct ChangesListeners(Arc<Mutex<HashMap<Listener, usize>>>);

/// One listener, counted until it is dropped.
pub(super) struct ChangesListener {
    all: ChangesListeners,
    listener: Listener,
}

impl ChangesListener {
    /// # Errors
    /// 503 when there are too many listeners.
    pub(super) fn enter(
        all: &ChangesListeners,
        listener: Listener,
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
        let is_tenant = |listener: &Listener| matches!(listener, Listener::Tenant(..));
        let of_tenants = open.iter().filter(|(other, _)| is_tenant(other)).map(|(_, n)| n);
        if is_tenant(&listener) && of_tenants.sum::<usize>() >= MAX_OF_TENANTS {
            return full("all tenants together have", MAX_OF_TENANTS);
        }
        let mine = open.entry(listener.clone()).or_default();
        if *mine >= MAX_PER_CALLER {
            let whose = if is_tenant(&listener) { "this tenant has" } else { "this caller has" };
            return full(whose, MAX_PER_CALLER);
        }
        *mine += 1;
        Ok(ChangesListener { all: all.clone(), listener })
    }
}

impl Drop for ChangesListener {
    fn drop(&mut self) {
        let mut open = self.all.0.lock();
        if let Some(mine) = open.get_mut(&self.listener) {
            *mine -= 1;
            if *mine == 0 {
                open.remove(&self.listener);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tenants_leave_half_of_the_places_to_others() {
        let all = ChangesListeners::default();
        let tenant = |name: &str| Listener::Tenant("default".into(), name.into());
        let enter = |listener: Listener| {
            ChangesListener::enter(&all, listener).map_err(|error| error.message)
        };
        let many = |listener: &Listener, count: usize| -> Vec<ChangesListener> {
            (0..count).map(|_| enter(listener.clone()).unwrap()).collect()
        };
        let said = |listener: Listener| enter(listener).err().unwrap_or_default();
        // whoever of a tenant it is, they are counted together
        let acme = many(&tenant("acme"), 20);
        assert!(said(tenant("acme")).starts_with("this tenant has 20 "));
        let others = (many(&tenant("globex"), 20), many(&tenant("initech"), 10));
        assert!(said(tenant("initech")).starts_with("all tenants together have 50 "));
        assert!(said(tenant("umbrella")).starts_with("all tenants together have 50 "));
        for caller in ["user:a", "user:b"] {
            let of_nobody = many(&Listener::Caller(caller.into()), 20);
            assert!(said(Listener::Caller(caller.into())).starts_with("this caller has 20 "));
            drop(of_nobody);
        }
        drop((acme, others));
        enter(tenant("umbrella")).unwrap();
        assert!(all.0.lock().is_empty());
    }
}
