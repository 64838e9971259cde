//! What a gateway has of the uplink: its journal, the window over it, and the cursor on its disk.

use std::ops::RangeInclusive;
use std::time::{Duration, Instant};

use super::Bug;
use crate::uplink::window::{BATCH_MESSAGES, Resumed, SafePoint, Tail, Window};

const EVENT: usize = 6000;
const IN_FLIGHT: usize = 64 << 10;
const PATIENCE: Duration = Duration::from_secs(2);
const HOLD: Duration = Duration::from_secs(3);

pub(super) struct Shipper {
    exclusive: bool,
    bug: Bug,
    /// Events on the disk, by their sequences from 0 on.
    pub(super) journaled: u64,
    /// On the disk: the cursor, and the last event that the stream is known to have.
    kept: (u64, Option<u64>),
    /// All before it may be removed from the journal.
    pub(super) safe: u64,
    running: Option<Running>,
}

struct Running {
    window: Window<()>,
    safe_point: SafePoint,
    /// The end of the stream is to be asked for.
    asks_tail: bool,
    /// How often and when it was: the answer to the last time is of use.
    asked_tail: u64,
    asked_tail_at: Option<Instant>,
    highest: u64,
}

impl Running {
    fn go_back(&mut self, exclusive: bool) {
        self.window.go_back();
        self.asks_tail = exclusive;
        self.asked_tail_at = None;
    }
}

/// What is to be sent, together.
pub(super) struct Batch {
    pub(super) sequences: RangeInclusive<u64>,
    pub(super) attempt: u64,
    pub(super) follows: Option<u64>,
}

impl Shipper {
    pub(super) fn new(exclusive: bool, bug: Bug) -> Shipper {
        Shipper {
            exclusive,
            bug,
            journaled: 0,
            kept: (0, None),
            safe: 0,
            running: None,
        }
    }

    pub(super) fn start(&mut self) {
        let (cursor, last) = self.kept;
        self.running = Some(Running {
            window: Window::new(self.exclusive, cursor, last, IN_FLIGHT),
            safe_point: SafePoint::new(HOLD, self.safe),
            asks_tail: self.exclusive,
            asked_tail: 0,
            asked_tail_at: None,
            highest: 0,
        });
    }

    pub(super) fn crash(&mut self) {
        self.running = None;
    }

    /// All that may be sent now.
    pub(super) fn send(&mut self, now: Instant) -> Vec<Batch> {
        let Some(running) = &mut self.running else {
            return Vec::new();
        };
        if running
            .window
            .deadline(PATIENCE)
            .is_some_and(|deadline| deadline <= now)
        {
            running.go_back(self.exclusive);
        }
        while running.window.has_room() && running.window.next() < self.journaled {
            let next = running.window.next();
            running.window.push(next, EVENT, ());
        }
        let window = &mut running.window;
        // All go to its stream, so that there are no gaps in a batch.
        let most = if self.exclusive { BATCH_MESSAGES } else { 1 };
        let next = || {
            let batch = window.send_batch(most, |()| true, now)?;
            Some(Batch {
                sequences: batch.sequences,
                attempt: batch.attempt,
                follows: batch.follows,
            })
        };
        std::iter::from_fn(next).collect()
    }

    /// The number under which the end of the stream is to be asked for now.
    pub(super) fn ask_tail(&mut self, now: Instant) -> Option<u64> {
        let running = self.running.as_mut().filter(|running| running.asks_tail)?;
        if running.asked_tail_at.is_some_and(|at| now < at + PATIENCE) {
            return None;
        }
        running.asked_tail_at = Some(now);
        running.asked_tail += 1;
        Some(running.asked_tail)
    }

    /// When to send again if nothing comes.
    pub(super) fn next(&self) -> Option<Instant> {
        let running = self.running.as_ref()?;
        let tail = running.asked_tail_at.map(|at| at + PATIENCE);
        running
            .window
            .deadline(PATIENCE)
            .into_iter()
            .chain(tail.filter(|_| running.asks_tail))
            .min()
    }

    /// Each attempt has an inbox of its own, so that answers to an earlier one do not come.
    pub(super) fn acknowledged(&mut self, batch: &RangeInclusive<u64>, attempt: u64) {
        let Some(running) = &mut self.running else {
            return;
        };
        if !running.window.is_current(attempt) {
            return;
        }
        running.window.acknowledge_batch(batch);
        running.highest = running.highest.max(batch.end() + 1);
    }

    pub(super) fn refused(&mut self, attempt: u64) {
        let Some(running) = &mut self.running else {
            return;
        };
        if running.window.is_current(attempt) {
            running.go_back(self.exclusive);
        }
    }

    pub(super) fn found_tail(&mut self, asked: u64, tail: Tail) {
        let Some(running) = &mut self.running else {
            return;
        };
        if !running.asks_tail || asked != running.asked_tail {
            return;
        }
        running.asks_tail = false;
        assert_eq!(
            running.window.resume(tail),
            Resumed::Onward,
            "the stream keeps what it has"
        );
    }

    /// Writes the cursor down.
    pub(super) fn keep(&mut self, now: Instant) {
        let Some(running) = &mut self.running else {
            return;
        };
        let cursor = match self.bug {
            Bug::HighestCursor => running.highest.max(running.window.cursor()),
            _ => running.window.cursor(),
        };
        self.kept = (cursor, running.window.last());
        self.safe = running.safe_point.note(cursor, now);
    }
}
