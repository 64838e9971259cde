//! How many calls may be under way at once: one more after as many as that have been answered, a third
//! fewer after a time-out (AIMD, as TCP does it).

use parking_lot::Mutex;
use tokio::sync::{Semaphore, SemaphorePermit};

/// What a time-out leaves of the limit.
const AFTER_TIMEOUT: f64 = 0.67;

pub(super) struct Limit {
    turns: Semaphore,
    state: Mutex<State>,
    most: usize,
}

struct State {
    limit: f64,
    /// Turns that exist, taken or not. Above the limit as long as calls from before it fell run.
    turns: usize,
}

impl Limit {
    pub(super) fn new(most: usize) -> Limit {
        let most = most.max(1);
        Limit {
            turns: Semaphore::new(most),
            state: Mutex::new(State {
                limit: most as f64,
                turns: most,
            }),
            most,
        }
    }

    pub(super) fn now(&self) -> usize {
        self.state.lock().limit as usize
    }

    pub(super) async fn turn(&self) -> Turn<'_> {
        let permit = self
            .turns
            .acquire()
            .await
            .expect("the semaphore is never closed");
        Turn {
            limit: self,
            permit: Some(permit),
        }
    }

    #[cfg(test)]
    pub(super) fn turn_now(&self) -> Option<Turn<'_>> {
        let permit = Some(self.turns.try_acquire().ok()?);
        Some(Turn {
            limit: self,
            permit,
        })
    }

    fn give_back(&self, permit: SemaphorePermit<'_>, change: impl FnOnce(f64) -> f64) {
        let mut state = self.state.lock();
        state.limit = change(state.limit).clamp(1.0, self.most as f64);
        let target = state.limit as usize;
        if state.turns > target {
            // The idle ones first: this one would at once be somebody's who waits.
            state.turns -= self.turns.forget_permits(state.turns - target);
            if state.turns > target {
                permit.forget();
                state.turns -= 1;
            }
        } else {
            self.turns.add_permits(target - state.turns);
            state.turns = target;
        }
    }
}

/// The right to make one call.
pub(super) struct Turn<'a> {
    limit: &'a Limit,
    permit: Option<SemaphorePermit<'a>>,
}

impl Turn<'_> {
    pub(super) fn answered(mut self) {
        self.end(|limit| limit + 1.0 / limit);
    }

    pub(super) fn timed_out(mut self) {
        self.end(|limit| limit * AFTER_TIMEOUT);
    }

    fn end(&mut self, change: impl FnOnce(f64) -> f64) {
        if let Some(permit) = self.permit.take() {
            self.limit.give_back(permit, change);
        }
    }
}

/// A call that was cancelled tells nothing about the server.
impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.end(|limit| limit);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(limit: &Limit) -> Vec<Turn<'_>> {
        std::iter::from_fn(|| limit.turn_now()).collect()
    }

    #[test]
    fn a_time_out_takes_turns_away_and_answers_bring_them_back() {
        let limit = Limit::new(12);
        limit.turn_now().expect("a turn").timed_out();
        assert_eq!(limit.now(), 8);
        assert_eq!(taken(&limit).len(), 8);
        for _ in 0..limit.now() + 1 {
            taken(&limit).remove(0).answered();
        }
        assert_eq!(taken(&limit).len(), 9);
        for _ in 0..100 {
            taken(&limit).remove(0).answered();
        }
        assert_eq!(taken(&limit).len(), 12);
    }

    #[test]
    fn time_outs_leave_one_turn() {
        let limit = Limit::new(4);
        for _ in 0..3 {
            taken(&limit).into_iter().for_each(Turn::timed_out);
        }
        assert_eq!(limit.now(), 1);
        assert_eq!(taken(&limit).len(), 1);
    }

    #[test]
    fn calls_under_way_when_the_limit_falls_are_not_replaced_until_they_are_below_it() {
        let limit = Limit::new(4);
        let mut turns = taken(&limit);
        turns.remove(0).timed_out();
        assert_eq!(limit.now(), 2);
        drop(turns.remove(0));
        assert!(limit.turn_now().is_none());
        drop(turns.remove(0));
        assert!(limit.turn_now().is_some());
    }
}
