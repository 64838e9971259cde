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
    /// In the order of their sequences.
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
    pub(super) fn new(cursor: u64) -> Tracker {
        Tracker(Mutex::new(State {
            cursor,
            ..State::default()
        }))
    }

    fn begin(&self, first: u64, next: u64) {
        let mut state = self.0.lock();
        if state.stuck_at.is_none() {
            state.open.push_back(Open {
                first,
                next,
                finished: false,
            });
        }
    }

    fn finish(&self, first: u64) {
        let mut state = self.0.lock();
        if state.frozen {
            return;
        }
        let index = state.open.partition_point(|open| open.first < first);
        let open = state.open.get_mut(index);
        if let Some(open) = open.filter(|open| open.first == first) {
            open.finished = true;
        }
        while let Some(open) = state.open.pop_front_if(|open| open.finished) {
            state.cursor = open.next;
        }
    }

    /// What began there is never finished.
    fn abandon(&self, first: u64) {
        let mut state = self.0.lock();
        let index = state.open.partition_point(|open| open.first < first);
        if index < state.open.len() {
            state.open.truncate(index);
            state.stuck_at = Some(first);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cursor_moves_over_what_is_finished_in_the_order_of_the_sequences() {
        let tracker = Arc::new(Tracker::new(5));
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
        let tracker = Arc::new(Tracker::new(5));
        drop(Receipt::new(tracker.clone()));
        assert_eq!(tracker.cursor(), 5);
    }

    #[test]
    fn what_was_dropped_before_somebody_could_handle_it_is_not_finished() {
        let tracker = Arc::new(Tracker::new(0));
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
    fn when_it_is_frozen_nothing_is_finished_any_more() {
        let tracker = Arc::new(Tracker::new(0));
        let receipt = Receipt::new(tracker.clone());
        receipt.begin(0, 1);
        tracker.freeze();
        drop(receipt);
        assert_eq!(tracker.cursor(), 0);
    }
}
