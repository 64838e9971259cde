//! What is asked of the store and not yet in it.

use std::collections::BTreeMap;
use std::sync::Arc;

use rustc_hash::{FxHashMap, FxHashSet};

use crate::broker::message::{Delivery, Message};
use crate::broker::stored::SessionRecord;
use crate::dead_letters::Unsaved;
use crate::event::Topic;

/// What a waiting delivery takes beside its message.
const ENTRY_BYTES: usize = 96;

/// The wanted state of some keys. Later ones take the place of earlier ones.
#[derive(Clone, Default)]
pub(super) struct Changes {
    /// None: to be removed.
    pub sessions: FxHashMap<Box<str>, Option<Arc<SessionRecord>>>,
    pub retained: FxHashMap<Topic, Option<Arc<Message>>>,
    /// By session number and sequence.
    pub queued: BTreeMap<(u64, u64), Waiting>,
    pub removed: Ranges,
    /// Numbers of sessions that are gone, with all that is queued for them.
    pub gone: FxHashSet<u64>,
    pub run: Option<u64>,
    /// Not put back when it could not be written: it will be asked for anew.
    pub dead_letters: Option<Unsaved>,
    /// Sum of the costs in `queued`.
    pub cost: u64,
    /// Memory that `queued` holds, near enough.
    pub bytes: usize,
}

#[derive(Clone)]
pub(super) struct Waiting {
    pub delivery: Delivery,
    /// An estimate of [`queued_cost`].
    pub cost: u64,
    /// A write of it has failed in a way that may have left it on disk.
    pub maybe_written: bool,
}

impl Waiting {
    pub fn bytes(&self) -> usize {
        ENTRY_BYTES + self.delivery.message.queued_bytes()
    }
}

impl Changes {
    pub fn is_empty(&self) -> bool {
        self.sessions.is_empty()
            && self.retained.is_empty()
            && self.queued.is_empty()
            && self.removed.is_empty()
            && self.gone.is_empty()
            && self.run.is_none()
    }

    pub fn append(&mut self, key: (u64, u64), waiting: Waiting) {
        self.cost += waiting.cost;
        self.bytes += waiting.bytes();
        if let Some(before) = self.queued.insert(key, waiting) {
            self.cost -= before.cost;
            self.bytes -= before.bytes();
        }
    }

    pub fn take_back(&mut self, key: (u64, u64)) -> Option<Waiting> {
        let waiting = self.queued.remove(&key)?;
        self.cost -= waiting.cost;
        self.bytes -= waiting.bytes();
        Some(waiting)
    }

    /// What waits for a session, in order from the sequence `from` on.
    pub fn queued_from(&self, number: u64, from: u64) -> impl Iterator<Item = (u64, &Delivery)> {
        let queued = self.queued.range((number, from)..=(number, u64::MAX));
        queued.map(|(key, waiting)| (key.1, &waiting.delivery))
    }

    /// Takes back all that waits for a session. Returns how many there were. What is to be removed
    /// stays so: it must not be found, and counted, with the rest of what the session has on disk.
    pub fn take_back_queue(&mut self, number: u64) -> u64 {
        let keys: Vec<_> = self
            .queued
            .range((number, 0)..=(number, u64::MAX))
            .map(|(key, _)| *key)
            .collect();
        let count = keys.len() as u64;
        for key in keys {
            let waiting = self.take_back(key);
            if waiting.is_some_and(|waiting| waiting.maybe_written) {
                self.removed.insert(number, (key.1, key.1));
            }
        }
        count
    }

    /// Adds what was wanted before, where nothing else is wanted since.
    pub fn add_earlier(&mut self, earlier: Changes) {
        for (client_id, record) in earlier.sessions {
            self.sessions.entry(client_id).or_insert(record);
        }
        for (topic, message) in earlier.retained {
            self.retained.entry(topic).or_insert(message);
        }
        for (key, waiting) in earlier.queued {
            if !self.removed.contains(key) && !self.gone.contains(&key.0) {
                let maybe_written = true;
                self.append(
                    key,
                    Waiting {
                        maybe_written,
                        ..waiting
                    },
                );
            }
        }
        for (number, range) in earlier.removed.iter() {
            self.removed.insert(number, range);
        }
        self.gone.extend(earlier.gone);
        self.run = self.run.or(earlier.run);
    }
}

/// Sequences of sessions, as ranges: a client that catches up removes long runs of them.
#[derive(Clone, Debug, Default)]
pub(super) struct Ranges {
    /// Number and first sequence → last sequence. No two overlap or touch.
    ranges: BTreeMap<(u64, u64), u64>,
}

impl Ranges {
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    pub fn insert(&mut self, number: u64, (mut first, mut last): (u64, u64)) {
        // All that overlap or touch: at most one begins before, the others begin inside.
        if let Some((start, end)) = self.at_or_before(number, first)
            && end.saturating_add(1) >= first
        {
            first = start;
            last = last.max(end);
            self.ranges.remove(&(number, start));
        }
        while let Some((&(_, start), &end)) = self
            .ranges
            .range((number, first)..=(number, last.saturating_add(1)))
            .next()
        {
            last = last.max(end);
            self.ranges.remove(&(number, start));
        }
        self.ranges.insert((number, first), last);
    }

    fn at_or_before(&self, number: u64, sequence: u64) -> Option<(u64, u64)> {
        let mut before = self.ranges.range((number, 0)..=(number, sequence));
        before.next_back().map(|(&(_, start), &end)| (start, end))
    }

    pub fn contains(&self, (number, sequence): (u64, u64)) -> bool {
        self.at_or_before(number, sequence)
            .is_some_and(|(_, end)| end >= sequence)
    }

    /// Number, and first and last sequence.
    pub fn iter(&self) -> impl Iterator<Item = (u64, (u64, u64))> {
        self.ranges
            .iter()
            .map(|(&(number, first), &last)| (number, (first, last)))
    }

    /// Those of one session that go beyond `from`.
    pub fn of(&self, number: u64, from: u64) -> impl Iterator<Item = (u64, u64)> {
        let before = self.at_or_before(number, from);
        let after = self.ranges.range((number, from)..=(number, u64::MAX));
        let after = after.map(|(&(_, first), &last)| (first, last));
        before.into_iter().chain(after)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn ranges_hold_what_was_put_in_and_nothing_else(
            inserted in prop::collection::vec((0..3u64, 0..40u64, 0..6u64), 0..30),
        ) {
            let mut ranges = Ranges::default();
            let mut model = BTreeSet::new();
            for (number, first, length) in inserted {
                ranges.insert(number, (first, first + length));
                model.extend((first..=first + length).map(|sequence| (number, sequence)));
            }
            for number in 0..3 {
                for sequence in 0..50 {
                    let key = (number, sequence);
                    prop_assert_eq!(ranges.contains(key), model.contains(&key));
                }
            }
            let all: Vec<_> = ranges.iter().collect();
            for pair in all.windows(2) {
                let [(number, (_, last)), (next, (first, _))] = pair else { unreachable!() };
                prop_assert!(number < next || last + 1 < *first, "{:?}", all);
            }
        }
    }

    #[test]
    fn the_last_sequence_is_one_like_others() {
        let mut ranges = Ranges::default();
        ranges.insert(1, (u64::MAX, u64::MAX));
        ranges.insert(1, (u64::MAX - 1, u64::MAX - 1));
        assert_eq!(
            ranges.iter().collect::<Vec<_>>(),
            [(1, (u64::MAX - 1, u64::MAX))]
        );
    }
}
