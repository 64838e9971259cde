//! A circuit breaker: an app that fails with most of what it gets is left alone for a while, then
//! tried with one batch. Counts batches, without I/O; the pauses are the supervisor's.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

/// Batches that are looked back on, and how many there must be before anything is concluded.
const WINDOW: usize = 20;
const FEWEST: usize = 10;

/// Whether an app gets batches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BreakerState {
    #[default]
    Closed,
    /// It gets one batch, and that decides.
    HalfOpen,
    Open,
}

impl BreakerState {
    pub const ALL: [BreakerState; 3] = [
        BreakerState::Closed,
        BreakerState::HalfOpen,
        BreakerState::Open,
    ];

    pub fn as_str(self) -> &'static str {
        match self {
            BreakerState::Closed => "closed",
            BreakerState::HalfOpen => "half-open",
            BreakerState::Open => "open",
        }
    }
}

/// The last batches of an app.
#[derive(Debug, Default)]
pub(super) struct Breaker {
    state: BreakerState,
    /// Whether each has failed, oldest first.
    last: VecDeque<bool>,
}

impl Breaker {
    pub(super) fn state(&self) -> BreakerState {
        self.state
    }

    /// A batch was handled.
    pub(super) fn succeeded(&mut self) {
        if self.state == BreakerState::HalfOpen {
            self.reset();
        }
        self.note(false);
    }

    /// An event could not be handled. Returns whether the app is to be left alone now.
    pub(super) fn failed(&mut self) -> bool {
        self.note(true);
        let failures = self.last.iter().filter(|failed| **failed).count();
        let most = self.last.len() >= FEWEST && failures * 2 > self.last.len();
        let opens = self.state == BreakerState::HalfOpen || most;
        if opens {
            self.state = BreakerState::Open;
        }
        opens
    }

    /// The pause is over: the next batch decides.
    pub(super) fn retry(&mut self) {
        if self.state == BreakerState::Open {
            self.state = BreakerState::HalfOpen;
        }
    }

    /// Somebody starts the app with a clean slate.
    pub(super) fn reset(&mut self) {
        *self = Breaker::default();
    }

    fn note(&mut self, failed: bool) {
        if self.last.len() == WINDOW {
            self.last.pop_front();
        }
        self.last.push_back(failed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn opened() -> Breaker {
        let mut breaker = Breaker::default();
        for _ in 0..FEWEST - 1 {
            assert!(!breaker.failed(), "too few to say anything");
        }
        assert!(breaker.failed());
        assert_eq!(breaker.state(), BreakerState::Open);
        breaker
    }

    #[test]
    fn it_stays_closed_while_most_batches_go_well() {
        let mut breaker = Breaker::default();
        for _ in 0..100 {
            breaker.succeeded();
            assert!(!breaker.failed());
        }
        assert_eq!(breaker.state(), BreakerState::Closed);
    }

    #[test]
    fn one_batch_after_the_pause_decides() {
        let mut breaker = opened();
        breaker.retry();
        assert_eq!(breaker.state(), BreakerState::HalfOpen);
        assert!(breaker.failed(), "one failure opens it again");
        breaker.retry();
        breaker.succeeded();
        assert_eq!(breaker.state(), BreakerState::Closed);
        assert!(!breaker.failed(), "what was before is forgotten");
    }
}
