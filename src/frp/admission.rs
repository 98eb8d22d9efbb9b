//! The door of a listener: strangers come in a few at a time, each address in its own queue, so that a storm from one of them
//! makes nobody else wait.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Strangers inside at once: enough for every agent to come back within seconds, few enough for the memory of their handshakes.
const INSIDE: usize = 256;
/// Of these, from one address.
const EACH: usize = 64;
/// Before the door and inside, from one address: a fleet behind one router fits, what is beyond is hung up on.
const QUEUE: usize = 4096;

/// Clones are the same door.
#[derive(Clone)]
pub struct Door {
    all: Arc<Semaphore>,
    queues: Arc<Mutex<HashMap<IpAddr, Queue>>>,
}

struct Queue {
    turns: Arc<Semaphore>,
    people: usize,
}

/// The right to be inside, until it is dropped.
pub struct Pass {
    _all: OwnedSemaphorePermit,
    _turn: OwnedSemaphorePermit,
    _place: Place,
}

/// A place before the door or inside.
struct Place {
    door: Door,
    from: IpAddr,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut queues = self.door.queues();
        if let Some(queue) = queues.get_mut(&self.from) {
            queue.people -= 1;
            if queue.people == 0 {
                queues.remove(&self.from);
            }
        }
    }
}

/// Whom an address stands for: with IPv6 a network of its own.
pub fn household(from: IpAddr) -> IpAddr {
    match from.to_canonical() {
        IpAddr::V6(v6) => IpAddr::V6(Ipv6Addr::from_bits(v6.to_bits() >> 64 << 64)),
        v4 @ IpAddr::V4(_) => v4,
    }
}

impl Default for Door {
    fn default() -> Door {
        Door { all: Arc::new(Semaphore::new(INSIDE)), queues: Arc::default() }
    }
}

impl Door {
    fn queues(&self) -> MutexGuard<'_, HashMap<IpAddr, Queue>> {
        // a panic inside leaves plain data behind
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for its turn; `None` when too many of the same address wait already.
    pub async fn enter(&self, from: IpAddr) -> Option<Pass> {
        let from = household(from);
        let turns = {
            let mut queues = self.queues();
            let queue = queues
                .entry(from)
                .or_insert_with(|| Queue { turns: Arc::new(Semaphore::new(EACH)), people: 0 });
            if queue.people >= QUEUE {
                return None;
            }
            queue.people += 1;
            queue.turns.clone()
        };
        let place = Place { door: self.clone(), from };
        let turn = turns.acquire_owned().await.ok()?;
        let all = self.all.clone().acquire_owned().await.ok()?;
        Some(Pass { _all: all, _turn: turn, _place: place })
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
        let door = Door::default();
        let mut inside: Vec<Pass> =
            (0..EACH).map(|_| door.enter(address(1)).now_or_never().unwrap().unwrap()).collect();
        let mut waiting: Vec<_> =
            (0..QUEUE - EACH).map(|_| Box::pin(door.enter(address(1)))).collect();
        assert!(waiting.iter_mut().all(|w| w.now_or_never().is_none()), "they wait");
        assert!(door.enter(address(1)).now_or_never().unwrap().is_none(), "the queue is full");
        assert!(
            door.enter(address(2)).now_or_never().unwrap().is_some(),
            "another address does not wait"
        );
        inside.pop();
        let (first, rest) = waiting.split_first_mut().unwrap();
        assert!(rest[0].as_mut().now_or_never().is_none(), "in turn");
        assert!(first.now_or_never().unwrap().is_some());
        drop((inside, waiting));
        assert!(door.queues().is_empty(), "nobody is remembered");
    }

    #[test]
    fn an_ipv6_network_is_one_household() {
        let text = |t: &str| household(t.parse().unwrap());
        assert_eq!(text("2001:db8:1:2:3::4"), text("2001:db8:1:2::9"));
        assert_ne!(text("2001:db8:1:2::1"), text("2001:db8:1:3::1"));
        assert_eq!(text("::ffff:192.0.2.1"), text("192.0.2.1"));
        assert_ne!(text("192.0.2.1"), text("192.0.2.2"));
    }
}
