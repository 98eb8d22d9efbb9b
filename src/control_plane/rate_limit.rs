//! Wrong tokens are counted by address: an address that shows many is refused for a while.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;

use super::error::HttpError;
use crate::frp::admission::rate_limit_key;
use parking_lot::Mutex;

/// Wrong tokens from one address within a minute, after which unknown ones are refused unread for
/// the rest of it.
const FAILURES: u32 = 30;
/// Addresses and tokens remembered for that, at most.
const REMEMBERED: usize = 10_000;

#[derive(Default)]
pub(super) struct FailureLimiter {
    inner: Mutex<Failures>,
}

#[derive(Default)]
struct Failures {
    minute: i64,
    by_address: HashMap<IpAddr, u32>,
    /// Hashes of tokens that were valid since the start: those pass, however many wrong ones come
    /// from the same address.
    valid: HashSet<String>,
}

impl FailureLimiter {
    /// # Errors
    /// 429 for an unknown token from an address that has shown many wrong ones.
    pub(super) fn check(&self, address: IpAddr, hash: &str, now: i64) -> Result<(), HttpError> {
        let address = rate_limit_key(address);
        let mut failures = self.inner.lock();
        if failures.minute != now / 60 {
            failures.minute = now / 60;
            failures.by_address.clear();
        }
        if failures.by_address.get(&address).is_some_and(|n| *n >= FAILURES)
            && !failures.valid.contains(hash)
        {
            return Err(HttpError::new(
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
        let mut failures = self.inner.lock();
        if failures.by_address.len() < REMEMBERED || failures.by_address.contains_key(&address) {
            *failures.by_address.entry(address).or_default() += 1;
        }
        if failures.by_address.get(&address) == Some(&FAILURES) {
            tracing::warn!(%address, minute = now / 60, "many wrong tokens");
        }
    }

    pub(super) fn succeeded(&self, hash: String) {
        let mut failures = self.inner.lock();
        if failures.valid.len() < REMEMBERED {
            failures.valid.insert(hash);
        }
    }
}
