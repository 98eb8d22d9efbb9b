//! How long to wait before the next try. Random numbers come from outside, so that a test can
//! choose them. Crates such as `backon` have no curve that stays quick for a time and then grows.

use std::time::Duration;

/// Quick for the first seconds of a trouble, then decorrelated up to half a minute.
#[derive(Clone, Debug, Default)]
pub struct Backoff {
    waited: Duration,
    last: Duration,
}

/// While a trouble is younger than this, tries come every 0.2 to 1 s.
const QUICK: Duration = Duration::from_secs(10);
const CAP: Duration = Duration::from_secs(30);

impl Backoff {
    /// The next wait; `random` is in 0 to 1.
    pub fn next(&mut self, random: f64) -> Duration {
        let random = random.clamp(0.0, 1.0);
        let span = |from: Duration, to: Duration| from + to.saturating_sub(from).mul_f64(random);
        let (low, high) = (Duration::from_millis(200), Duration::from_secs(1));
        let wait = if self.waited < QUICK {
            span(low, high)
        } else {
            span(high, (self.last * 3).max(high * 3)).min(CAP)
        };
        self.waited += wait;
        self.last = wait;
        wait
    }

    /// The trouble is over.
    pub fn reset(&mut self) {
        *self = Backoff::default();
    }
}

/// A random number in 0 to 1 for [`Backoff::next`].
pub fn random() -> f64 {
    use ring::rand::SecureRandom as _;
    let mut bytes = [0; 4];
    let _ = ring::rand::SystemRandom::new().fill(&mut bytes);
    f64::from(u32::from_le_bytes(bytes)) / f64::from(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn quick_at_first_and_never_over_half_a_minute(
            randoms in prop::collection::vec(0.0_f64..=1.0, 1..60)
        ) {
            let mut backoff = Backoff::default();
            let mut waited = Duration::ZERO;
            for r in randoms {
                let wait = backoff.next(r);
                prop_assert!(wait >= Duration::from_millis(200) && wait <= CAP);
                prop_assert!(waited >= QUICK || wait <= Duration::from_secs(1));
                waited += wait;
            }
        }
    }
}
