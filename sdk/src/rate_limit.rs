//! Keeps an app that meets bad input again and again from flooding the log.

/// Lets so many things a second through and counts the others.
///
/// It knows no clock: the caller hands in the time, for instance that of the event at hand.
///
/// ```
/// use headgate_sdk::RateLimit;
///
/// let mut limit = RateLimit::per_second(1);
/// assert_eq!(limit.allow(0), Some(0));
/// assert_eq!(limit.allow(1), None);
/// assert_eq!(limit.allow(1_000_000_000), Some(1)); // one was held back since
/// ```
#[derive(Debug, Clone)]
pub struct RateLimit {
    per_second: u32,
    /// When the current second began, in nanoseconds; none before the first call.
    window_start: Option<u64>,
    used: u32,
    held_back: u64,
}

const SECOND_NS: u64 = 1_000_000_000;

impl RateLimit {
    /// At most `per_second` in each second.
    pub const fn per_second(per_second: u32) -> Self {
        RateLimit {
            per_second,
            window_start: None,
            used: 0,
            held_back: 0,
        }
    }

    /// None if it is too much; else how many were held back since the last that went through.
    /// `now` is in nanoseconds. A clock that goes back begins a new second.
    pub fn allow(&mut self, now: u64) -> Option<u64> {
        let same_second = self
            .window_start
            .is_some_and(|start| (start..start.saturating_add(SECOND_NS)).contains(&now));
        if !same_second {
            self.window_start = Some(now);
            self.used = 0;
        }
        if self.used >= self.per_second {
            self.held_back += 1;
            return None;
        }
        self.used += 1;
        Some(std::mem::take(&mut self.held_back))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_exceeds_the_rate_is_held_back_and_counted_until_the_next_second() {
        let mut limit = RateLimit::per_second(2);
        let start = 5 * SECOND_NS;
        assert_eq!(limit.allow(start), Some(0));
        assert_eq!(limit.allow(start + 1), Some(0));
        assert_eq!(limit.allow(start + 2), None);
        assert_eq!(limit.allow(start + SECOND_NS - 1), None);
        assert_eq!(limit.allow(start + SECOND_NS), Some(2));
        assert_eq!(limit.allow(start + SECOND_NS), Some(0));
    }

    #[test]
    fn a_clock_that_goes_back_does_not_silence_the_app() {
        let mut limit = RateLimit::per_second(1);
        assert_eq!(limit.allow(u64::MAX), Some(0));
        assert_eq!(limit.allow(7), Some(0));
    }
}
