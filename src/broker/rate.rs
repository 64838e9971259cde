//! How fast clients may send: a token bucket, with time passed in.

use std::time::{Duration, Instant};

/// Lets `per_second` messages or bytes through a second, and up to a second's worth at once from who
/// has sent nothing for so long. Nothing is given in advance: who connects anew gains nothing by it.
#[derive(Debug)]
pub struct RateLimit {
    /// 0: no limit.
    per_second: u64,
    /// Below zero after a burst that was larger than what was left.
    tokens: f64,
    refilled: Instant,
}

impl RateLimit {
    pub fn new(per_second: u64, now: Instant) -> Self {
        RateLimit {
            per_second,
            tokens: 0.0,
            refilled: now,
        }
    }

    /// How many more may come before there is a pause.
    pub fn room(&self) -> u64 {
        match self.per_second {
            0 => u64::MAX,
            _ if self.tokens < 0.0 => 0,
            _ => self.tokens as u64 + 1,
        }
    }

    pub fn spend(&mut self, count: u64, now: Instant) {
        if self.per_second > 0 {
            self.refill(now);
            self.tokens -= count as f64;
        }
    }

    pub fn refill(&mut self, now: Instant) {
        let gained = now.duration_since(self.refilled).as_secs_f64() * self.per_second as f64;
        self.tokens = (self.tokens + gained).min(self.per_second as f64);
        self.refilled = now;
    }

    /// Until when nothing more is to be read from the client.
    pub fn paused_until(&self) -> Option<Instant> {
        (self.tokens < 0.0).then(|| {
            let missing = -self.tokens / self.per_second as f64;
            self.refilled + Duration::from_secs_f64(missing) + Duration::from_millis(1)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_is_let_through_and_then_paid_for() {
        let start = Instant::now();
        let mut rate = RateLimit::new(100, start);
        let start = start + Duration::from_secs(5);
        rate.refill(start);
        assert_eq!(rate.room(), 101);
        rate.spend(100, start);
        assert_eq!(rate.paused_until(), None);
        rate.spend(50, start);
        assert_eq!(rate.room(), 0);
        let until = rate.paused_until().unwrap();
        let pause = until - start;
        assert!(pause >= Duration::from_millis(500) && pause < Duration::from_millis(510));
        rate.refill(until);
        assert_eq!(rate.paused_until(), None);
    }

    #[test]
    fn a_new_one_has_nothing_in_advance() {
        let start = Instant::now();
        let mut rate = RateLimit::new(100, start);
        assert_eq!(rate.room(), 1);
        rate.spend(1, start);
        assert_eq!(rate.room(), 0);
        assert!(rate.paused_until() > Some(start));
    }

    #[test]
    fn without_a_limit_there_is_no_pause() {
        let start = Instant::now();
        let mut rate = RateLimit::new(0, start);
        rate.spend(u64::MAX, start);
        assert_eq!(rate.room(), u64::MAX);
        rate.refill(start + Duration::from_secs(1));
        assert_eq!(rate.paused_until(), None);
    }
}
