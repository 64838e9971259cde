//! The bandwidth limit: one token bucket for all downloads. It knows no clock.

use std::num::NonZeroU64;
use std::time::{Duration, Instant};

/// What may pass at once after a rest.
const BURST: Duration = Duration::from_millis(100);

#[derive(Debug)]
pub(super) struct Bucket {
    bytes_per_second: NonZeroU64,
    /// When all that was taken so far will have been paid for.
    paid: Option<Instant>,
}

impl Bucket {
    pub(super) fn new(bytes_per_second: NonZeroU64) -> Self {
        Self {
            bytes_per_second,
            paid: None,
        }
    }

    /// Takes bytes that have come. Returns how long to wait before more are asked for.
    pub(super) fn take(&mut self, bytes: usize, now: Instant) -> Duration {
        let rested = now.checked_sub(BURST).unwrap_or(now);
        let from = self.paid.map_or(now, |paid| paid.max(rested));
        let price = Duration::from_secs_f64(bytes as f64 / self.bytes_per_second.get() as f64);
        let paid = from + price;
        self.paid = Some(paid);
        paid.saturating_duration_since(now)
    }

    /// As much as should be asked for at once, so that it flows evenly.
    pub(super) fn portion(&self) -> usize {
        usize::try_from(self.bytes_per_second.get() / 10).map_or(usize::MAX, |bytes| bytes.max(512))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_kept_over_any_mixture_of_portions() {
        let mut bucket = Bucket::new(NonZeroU64::new(1000).unwrap());
        let start = Instant::now();
        let mut now = start;
        let mut bytes = 0;
        for portion in (1..200).cycle().take(2000) {
            now += bucket.take(portion, now);
            bytes += portion;
        }
        let rate = bytes as f64 / (now - start).as_secs_f64();
        assert!((990.0..=1010.0).contains(&rate), "{rate}");
    }

    #[test]
    fn a_rest_is_not_saved_up() {
        let mut bucket = Bucket::new(NonZeroU64::new(1000).unwrap());
        let start = Instant::now();
        bucket.take(1000, start);
        let later = start + Duration::from_secs(3600);
        assert!(bucket.take(1000, later) >= Duration::from_millis(899));
    }
}
