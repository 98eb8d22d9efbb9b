//! Limits how many connections of a listener are being admitted at a time. Each address has its own
//! queue, so that a burst from one of them makes no other wait.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;

use parking_lot::{Mutex, MutexGuard};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Connections being admitted at a time: enough for every agent to come back within seconds, few
/// enough for the memory of their handshakes.
const MAX_ADMITTED: usize = 256;
/// Of these, from one address.
const MAX_PER_ADDRESS: usize = 64;
/// Waiting or being admitted, from one address: a fleet behind one router fits. What comes beyond
/// that is closed.
const MAX_WAITING: usize = 4096;

/// Clones are the same limiter.
#[derive(Clone)]
pub struct AdmissionLimiter {
    all: Arc<Semaphore>,
    queues: Arc<Mutex<HashMap<IpAddr, AddressQueue>>>,
}

struct AddressQueue {
    permits: Arc<Semaphore>,
    admitted: usize,
}

/// The right to be admitted, until it is dropped.
pub struct AdmissionPermit {
    _all: OwnedSemaphorePermit,
    _permit: OwnedSemaphorePermit,
    _slot: QueueSlot,
}

/// A place in the queue of an address, until it is dropped.
struct QueueSlot {
    limiter: AdmissionLimiter,
    from: IpAddr,
}

impl Drop for QueueSlot {
    fn drop(&mut self) {
        let mut queues = self.limiter.queues();
        if let Some(queue) = queues.get_mut(&self.from) {
            queue.admitted -= 1;
            if queue.admitted == 0 {
                queues.remove(&self.from);
            }
        }
    }
}

/// The key that addresses of one user share: with IPv6 a network is assigned to one user.
pub fn rate_limit_key(from: IpAddr) -> IpAddr {
    match from.to_canonical() {
        IpAddr::V6(v6) => IpAddr::V6(Ipv6Addr::from_bits(v6.to_bits() >> 64 << 64)),
        v4 @ IpAddr::V4(_) => v4,
    }
}

impl Default for AdmissionLimiter {
    fn default() -> AdmissionLimiter {
        AdmissionLimiter { all: Arc::new(Semaphore::new(MAX_ADMITTED)), queues: Arc::default() }
    }
}

impl AdmissionLimiter {
    fn queues(&self) -> MutexGuard<'_, HashMap<IpAddr, AddressQueue>> {
        self.queues.lock()
    }

    /// Waits until it is admitted; `None` when too many of the same address wait already.
    pub async fn acquire(&self, from: IpAddr) -> Option<AdmissionPermit> {
        let from = rate_limit_key(from);
        let permits = {
            let mut queues = self.queues();
            let queue = queues.entry(from).or_insert_with(|| AddressQueue {
                permits: Arc::new(Semaphore::new(MAX_PER_ADDRESS)),
                admitted: 0,
            });
            if queue.admitted >= MAX_WAITING {
                return None;
            }
            queue.admitted += 1;
            queue.permits.clone()
        };
        let slot = QueueSlot { limiter: self.clone(), from };
        let permit = permits.acquire_owned().await.ok()?;
        let all = self.all.clone().acquire_owned().await.ok()?;
        Some(AdmissionPermit { _all: all, _permit: permit, _slot: slot })
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use futures_util::FutureExt as _;

    use super::*;

    fn address(n: u8) -> IpAddr {
        Ipv4Addr::new(192, 0, 2, n).into()
    }

    #[test]
    fn one_address_fills_its_own_part_only_and_what_leaves_makes_room() {
        let limiter = AdmissionLimiter::default();
        let mut inside: Vec<AdmissionPermit> = (0..MAX_PER_ADDRESS)
            .map(|_| limiter.acquire(address(1)).now_or_never().unwrap().unwrap())
            .collect();
        let mut waiting: Vec<_> = (0..MAX_WAITING - MAX_PER_ADDRESS)
            .map(|_| Box::pin(limiter.acquire(address(1))))
            .collect();
        assert!(waiting.iter_mut().all(|w| w.now_or_never().is_none()), "they wait");
        assert!(limiter.acquire(address(1)).now_or_never().unwrap().is_none(), "the queue is full");
        assert!(
            limiter.acquire(address(2)).now_or_never().unwrap().is_some(),
            "another address does not wait"
        );
        inside.pop();
        let (first, rest) = waiting.split_first_mut().unwrap();
        assert!(rest[0].as_mut().now_or_never().is_none(), "in turn");
        assert!(first.now_or_never().unwrap().is_some());
        drop((inside, waiting));
        assert!(limiter.queues().is_empty(), "no address is remembered");
    }

    #[test]
    fn an_ipv6_network_is_rate_limited_as_one() {
        let text = |t: &str| rate_limit_key(t.parse().unwrap());
        assert_eq!(text("2001:db8:1:2:3::4"), text("2001:db8:1:2::9"));
        assert_ne!(text("2001:db8:1:2::1"), text("2001:db8:1:3::1"));
        assert_eq!(text("::ffff:192.0.2.1"), text("192.0.2.1"));
        assert_ne!(text("192.0.2.1"), text("192.0.2.2"));
    }
}
