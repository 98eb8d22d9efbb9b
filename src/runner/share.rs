//! How Runners share the partitions of a project. The broker gives a partition to whoever has
//! waited longest for it: one that has more than its part of those that are in use lets one of them
//! go, and waits for it behind the others.

use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

use crate::contract::job::PARTITIONS;

/// A partition is in use while it has had a job within this time.
const RECENT: Duration = Duration::from_secs(10);
/// The part of each, for two Runners: with less in use there is nothing to let go.
const HALF: u32 = (PARTITIONS as u32).div_ceil(2);

/// When each partition had a job here.
#[derive(Default)]
pub(super) struct Shares(Mutex<[Option<Instant>; PARTITIONS as usize]>);

impl Shares {
    pub(super) fn took(&self, partition: u8, now: Instant) {
        self.0.lock()[usize::from(partition)] = Some(now);
    }

    /// Whether there is something to share, if there is another Runner.
    pub(super) fn has_many(&self, now: Instant) -> bool {
        in_use(&*self.0.lock(), now) > HALF
    }

    /// Whether a partition is let go; it counts as gone then.
    pub(super) fn lets_go(&self, partition: u8, runners: u32, now: Instant) -> bool {
        let mut taken = self.0.lock();
        let lets_go = runners > 1 && in_use(&*taken, now) > u32::from(PARTITIONS).div_ceil(runners);
        if lets_go {
            taken[usize::from(partition)] = None;
        }
        lets_go
    }
}

fn in_use(taken: &[Option<Instant>], now: Instant) -> u32 {
    let recent = |at: &&Option<Instant>| at.is_some_and(|at| now - at < RECENT);
    taken.iter().filter(recent).map(|_| 1).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_runner_keeps_its_part_of_the_partitions_in_use() {
        let now = Instant::now();
        for (runners, kept) in [(0, 8), (1, 8), (2, 4), (3, 3), (4, 2), (8, 1), (20, 1)] {
            let shares = Shares::default();
            (0..PARTITIONS).for_each(|partition| shares.took(partition, now));
            let let_go = (0..PARTITIONS).filter(|p| shares.lets_go(*p, runners, now)).count();
            assert_eq!(let_go, 8 - kept, "{runners}");
        }
        let shares = Shares::default();
        (0..5).for_each(|partition| shares.took(partition, now));
        assert!(shares.has_many(now) && !shares.has_many(now + RECENT));
        assert!(!shares.lets_go(0, 2, now + RECENT));
        assert!(shares.lets_go(0, 2, now) && !shares.lets_go(1, 2, now));
    }
}
