//! Which events of the journal are finished: those of which no outlet has a copy any more.

use std::collections::VecDeque;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;

use crate::event;

/// What was handed over to the journal together. When the last of its events is dropped, all are finished.
/// Clones are the same.
#[derive(Clone)]
pub struct Receipt(Arc<Chunk>);

struct Chunk {
    tracker: Arc<Tracker>,
    /// Set when it is in the journal.
    first: OnceLock<u64>,
    /// Some outlet was to handle some event of it yet.
    abandoned: AtomicBool,
}

impl Receipt {
    pub(super) fn new(tracker: Arc<Tracker>) -> Receipt {
        Receipt(Arc::new(Chunk {
            tracker,
            first: OnceLock::new(),
            abandoned: AtomicBool::new(false),
        }))
    }

    /// For each of the events.
    pub fn hold(&self) -> Arc<dyn event::Receipt> {
        self.0.clone()
    }

    /// These events are in the journal from now on. To be called in the order of the sequences.
    pub(super) fn begin(&self, first: u64, next: u64) {
        if self.0.first.set(first).is_ok() {
            self.0.tracker.begin(first, next);
        }
    }
}

impl event::Receipt for Chunk {
    fn abandon(&self) {
        self.abandoned.store(true, Ordering::Relaxed);
    }
}

impl fmt::Debug for Chunk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Receipt({:?})", self.first.get())
    }
}

impl Drop for Chunk {
    fn drop(&mut self) {
        if let Some(first) = self.first.get() {
            match self.abandoned.load(Ordering::Relaxed) {
                true => self.tracker.abandon(*first),
                false => self.tracker.finish(*first),
            }
        }
    }
}

#[derive(Default)]
pub(super) struct Tracker(Mutex<State>);

#[derive(Default)]
struct State {
    /// Of an earlier run, in the order of their sequences. While some of them have not begun, nothing behind them
    /// counts.
    again: VecDeque<Open>,
    all_begun: bool,
    /// The first sequence of this run.
    own: u64,
    /// Of this run, in the order of their sequences.
    open: VecDeque<Open>,
    /// All events before this one are finished.
    cursor: u64,
    /// The first that is never finished: what comes behind it makes no difference any more.
    stuck_at: Option<u64>,
    frozen: bool,
}

struct Open {
    first: u64,
    next: u64,
    finished: bool,
}

impl Tracker {
    /// What is from `cursor` to `own` comes again, until [`Tracker::all_begun`].
    pub(super) fn new(cursor: u64, own: u64) -> Tracker {
        Tracker(Mutex::new(State {
            cursor,
            own,
            all_begun: cursor >= own,
            ..State::default()
        }))
    }

    fn begin(&self, first: u64, next: u64) {
        let mut state = self.0.lock();
        if state.stuck_at.is_none_or(|stuck| first < stuck) {
            state.all_with(first).push_back(Open {
                first,
                next,
                finished: false,
            });
        }
    }

    /// All of the earlier run that there is to come again has begun.
    pub(super) fn all_begun(&self) {
        let mut state = self.0.lock();
        state.all_begun = true;
        state.advance();
    }

    fn finish(&self, first: u64) {
        let mut state = self.0.lock();
        if state.frozen {
            return;
        }
        let all = state.all_with(first);
        let index = all.partition_point(|open| open.first < first);
        if let Some(open) = all.get_mut(index).filter(|open| open.first == first) {
            open.finished = true;
        }
        state.advance();
    }

    /// What began there is never finished.
    fn abandon(&self, first: u64) {
        let mut state = self.0.lock();
        if state.stuck_at.is_none_or(|stuck| first < stuck) {
            state.stuck_at = Some(first);
            state.again.retain(|open| open.first < first);
            state.open.retain(|open| open.first < first);
        }
    }

    pub(super) fn cursor(&self) -> u64 {
        self.0.lock().cursor
    }

    /// From now on what is dropped was not finished: the gateway ends.
    pub(super) fn freeze(&self) {
        self.0.lock().frozen = true;
    }
}

impl State {
    fn all_with(&mut self, first: u64) -> &mut VecDeque<Open> {
        match first < self.own {
            true => &mut self.again,
            false => &mut self.open,
        }
    }

    fn advance(&mut self) {
        if self.frozen {
            return;
        }
        while let Some(open) = self.again.pop_front_if(|open| open.finished) {
            self.cursor = open.next;
        }
        let is_stuck = self.stuck_at.is_some_and(|stuck| stuck < self.own);
        if !self.again.is_empty() || !self.all_begun || is_stuck {
            return;
        }
        // What could not be read of the earlier run is not waited for.
        self.cursor = self.cursor.max(self.own);
        while let Some(open) = self.open.pop_front_if(|open| open.finished) {
            self.cursor = open.next;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_made_of_events_that_come_again_does_not_count_before_all_of_these() {
        let tracker = Arc::new(Tracker::new(5, 20));
        let receipt = |first, next| {
            let receipt = Receipt::new(tracker.clone());
            receipt.begin(first, next);
            receipt
        };
        let first = receipt(5, 8);
        let made = receipt(20, 22);
        drop(first);
        drop(made);
        assert_eq!(tracker.cursor(), 8);
        let (second, third) = (receipt(8, 9), receipt(9, 19));
        drop(third);
        tracker.all_begun();
        assert_eq!(tracker.cursor(), 8);
        drop(second);
        assert_eq!(tracker.cursor(), 22);
    }

    #[test]
    fn the_cursor_moves_over_what_is_finished_in_the_order_of_the_sequences() {
        let tracker = Arc::new(Tracker::new(5, 5));
        let receipt = |first, next| {
            let receipt = Receipt::new(tracker.clone());
            receipt.begin(first, next);
            receipt
        };
        let (a, b, c) = (receipt(5, 7), receipt(7, 8), receipt(9, 20));
        let also_a = a.clone();
        drop(b);
        assert_eq!(tracker.cursor(), 5);
        drop(a);
        assert_eq!(tracker.cursor(), 5, "a copy is left");
        drop(also_a);
        assert_eq!(tracker.cursor(), 8);
        drop(c);
        assert_eq!(tracker.cursor(), 20);
    }

    #[test]
    fn what_never_came_into_the_journal_moves_nothing() {
        let tracker = Arc::new(Tracker::new(5, 5));
        drop(Receipt::new(tracker.clone()));
        assert_eq!(tracker.cursor(), 5);
    }

    #[test]
    fn what_was_dropped_before_somebody_could_handle_it_is_not_finished() {
        let tracker = Arc::new(Tracker::new(0, 0));
        let receipts = [(0, 1), (1, 2)].map(|(first, next)| {
            let receipt = Receipt::new(tracker.clone());
            receipt.begin(first, next);
            receipt
        });
        receipts[0].hold().abandon();
        drop(receipts);
        assert_eq!(tracker.cursor(), 0);
        for first in 2..1000 {
            let receipt = Receipt::new(tracker.clone());
            receipt.begin(first, first + 1);
        }
        assert_eq!(tracker.cursor(), 0);
        assert!(
            tracker.0.lock().open.is_empty(),
            "nothing piles up behind it"
        );
    }

    #[test]
    fn behind_what_comes_again_and_is_never_finished_nothing_is() {
        let tracker = Arc::new(Tracker::new(0, 10));
        let receipt = |first, next| {
            let receipt = Receipt::new(tracker.clone());
            receipt.begin(first, next);
            receipt
        };
        let (again, own) = (receipt(0, 10), receipt(10, 20));
        tracker.all_begun();
        again.hold().abandon();
        drop(again);
        drop(own);
        drop(receipt(20, 30));
        assert_eq!(tracker.cursor(), 0);
    }

    #[test]
    fn when_it_is_frozen_nothing_is_finished_any_more() {
        let tracker = Arc::new(Tracker::new(0, 0));
        let receipt = Receipt::new(tracker.clone());
        receipt.begin(0, 1);
        tracker.freeze();
        drop(receipt);
        assert_eq!(tracker.cursor(), 0);
    }
}
