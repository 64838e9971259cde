//! The databases of the MQTT edge: sessions, what is queued for them, retained messages,
//! dead letters.
//!
//! Knows keys, sizes and transactions. The values are bytes to it: the edge encodes them.

use std::ops::ControlFlow;

use heed::byteorder::BE;
use heed::types::{Bytes, DecodeIgnore, Str, U64, U128};
use heed::{Database, RoTxn, RwTxn, WithoutTls};

use super::{Store, StoreError};

/// Longest client id that a session can be kept under: LMDB's longest key. Empty ones can't be
/// keys either.
pub const MAX_CLIENT_ID_BYTES: usize = 511;

#[derive(Clone, Copy)]
pub(super) struct MqttDatabases {
    /// Client id → the session's record.
    pub sessions: Database<'static, Bytes, Bytes>,
    /// Session number and sequence, 64 bits each → one delivery that waits.
    pub queued: Database<'static, U128<BE>, Bytes>,
    /// BLAKE3 of the topic, which can be longer than a key → the message.
    pub retained: Database<'static, Bytes, Bytes>,
    /// Sequence → a dropped message.
    pub dead_letters: Database<'static, U64<BE>, Bytes>,
    /// What is known of the databases as a whole.
    pub counters: Database<'static, Str, U64<BE>>,
}

/// A number that is kept along with the records.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Counter {
    /// How often the store was opened for the edge.
    Runs,
    /// What [`queued_cost`] says of all that is queued.
    QueuedBytes,
    /// The id of the next dead letter.
    NextDeadLetter,
}

impl Counter {
    fn key(self) -> &'static str {
        match self {
            Counter::Runs => "runs",
            Counter::QueuedBytes => "queued_bytes",
            Counter::NextDeadLetter => "next_dead_letter",
        }
    }
}

/// The sequences that wait for one session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Queue {
    pub number: u64,
    pub first: u64,
    pub last: u64,
}

/// What a queued value takes up in the database, in bytes, near enough for a limit.
pub fn queued_cost(value_bytes: usize) -> u64 {
    /// Key, node header and the node's offset in its page.
    const NODE: u64 = 16 + 8 + 2;
    const PAGE: u64 = 4096;
    /// A value that is larger lies in pages of its own: two nodes must fit into a page.
    const LARGE: u64 = PAGE / 2 - 16 - NODE;
    let bytes = value_bytes as u64;
    match bytes > LARGE {
        true => NODE + (bytes + 16).next_multiple_of(PAGE),
        false => NODE + bytes,
    }
}

fn queued_key(number: u64, sequence: u64) -> u128 {
    u128::from(number) << 64 | u128::from(sequence)
}

fn number_and_sequence(key: u128) -> (u64, u64) {
    ((key >> 64) as u64, key as u64)
}

/// What the databases hold at one moment.
pub struct MqttSnapshot<'s> {
    store: &'s Store,
    txn: RoTxn<'s, WithoutTls>,
}

/// Changes that get on disk together, or not at all.
pub struct MqttChanges<'s> {
    store: &'s Store,
    txn: RwTxn<'s>,
}

impl Store {
    pub fn read_mqtt(&self) -> Result<MqttSnapshot<'_>, StoreError> {
        Ok(MqttSnapshot {
            store: self,
            txn: self.read()?,
        })
    }

    /// Waits until nobody else writes.
    pub fn write_mqtt(&self) -> Result<MqttChanges<'_>, StoreError> {
        let txn = self.inner.env.write_txn().map_err(|e| self.error(e))?;
        Ok(MqttChanges { store: self, txn })
    }
}

impl MqttSnapshot<'_> {
    fn databases(&self) -> &MqttDatabases {
        &self.store.inner.mqtt
    }

    fn error(&self, error: heed::Error) -> StoreError {
        self.store.error(error)
    }

    /// Client id and record of each session.
    pub fn each_session(&self, mut take: impl FnMut(&[u8], &[u8])) -> Result<(), StoreError> {
        let sessions = self.databases().sessions.iter(&self.txn);
        for entry in sessions.map_err(|e| self.error(e))? {
            let (client_id, record) = entry.map_err(|e| self.error(e))?;
            take(client_id, record);
        }
        Ok(())
    }

    pub fn each_retained(&self, mut take: impl FnMut(&[u8])) -> Result<(), StoreError> {
        let retained = self.databases().retained.iter(&self.txn);
        for entry in retained.map_err(|e| self.error(e))? {
            take(entry.map_err(|e| self.error(e))?.1);
        }
        Ok(())
    }

    /// Sequence and value of what is queued for a session, in order from `from` on.
    pub fn each_queued(
        &self,
        number: u64,
        from: u64,
        mut take: impl FnMut(u64, &[u8]) -> ControlFlow<()>,
    ) -> Result<(), StoreError> {
        let range = queued_key(number, from)..=queued_key(number, u64::MAX);
        let queued = self.databases().queued.range(&self.txn, &range);
        for entry in queued.map_err(|e| self.error(e))? {
            let (key, value) = entry.map_err(|e| self.error(e))?;
            if take(number_and_sequence(key).1, value).is_break() {
                break;
            }
        }
        Ok(())
    }

    /// For which sessions something is queued. Costs by their number, not by what is queued.
    pub fn queues(&self) -> Result<Vec<Queue>, StoreError> {
        let keys = self.databases().queued.remap_data_type::<DecodeIgnore>();
        let mut queues = Vec::new();
        let mut next = Some(0);
        while let Some(number) = next {
            let first = keys
                .get_greater_than_or_equal_to(&self.txn, &queued_key(number, 0))
                .map_err(|e| self.error(e))?;
            let Some((first, ())) = first else { break };
            let (number, first) = number_and_sequence(first);
            let last = keys
                .get_lower_than_or_equal_to(&self.txn, &queued_key(number, u64::MAX))
                .map_err(|e| self.error(e))?;
            queues.push(Queue {
                number,
                first,
                last: last.map_or(first, |(last, ())| number_and_sequence(last).1),
            });
            next = number.checked_add(1);
        }
        Ok(queues)
    }

    /// Sequence and value of each dead letter, in order.
    pub fn each_dead_letter(&self, mut take: impl FnMut(u64, &[u8])) -> Result<(), StoreError> {
        let letters = self.databases().dead_letters.iter(&self.txn);
        for entry in letters.map_err(|e| self.error(e))? {
            let (sequence, letter) = entry.map_err(|e| self.error(e))?;
            take(sequence, letter);
        }
        Ok(())
    }

    pub fn counter(&self, counter: Counter) -> Result<Option<u64>, StoreError> {
        let counters = self.databases().counters;
        counters
            .get(&self.txn, counter.key())
            .map_err(|e| self.error(e))
    }

    /// [`queued_cost`] of all that is queued, found by looking at all of it.
    pub fn sum_up_queued(&self) -> Result<u64, StoreError> {
        let mut sum = 0;
        let queued = self.databases().queued.iter(&self.txn);
        for entry in queued.map_err(|e| self.error(e))? {
            sum += queued_cost(entry.map_err(|e| self.error(e))?.1.len());
        }
        Ok(sum)
    }
}

impl MqttChanges<'_> {
    fn databases(&self) -> MqttDatabases {
        self.store.inner.mqtt
    }

    fn error(&self, error: heed::Error) -> StoreError {
        self.store.error(error)
    }

    pub fn put_session(&mut self, client_id: &str, record: &[u8]) -> Result<(), StoreError> {
        let sessions = self.databases().sessions;
        sessions
            .put(&mut self.txn, client_id.as_bytes(), record)
            .map_err(|e| self.error(e))
    }

    pub fn remove_session(&mut self, client_id: &str) -> Result<(), StoreError> {
        let sessions = self.databases().sessions;
        sessions
            .delete(&mut self.txn, client_id.as_bytes())
            .map(drop)
            .map_err(|e| self.error(e))
    }

    pub fn put_retained(&mut self, topic: &str, message: &[u8]) -> Result<(), StoreError> {
        let retained = self.databases().retained;
        let key = blake3::hash(topic.as_bytes());
        retained
            .put(&mut self.txn, key.as_bytes(), message)
            .map_err(|e| self.error(e))
    }

    pub fn remove_retained(&mut self, topic: &str) -> Result<(), StoreError> {
        let retained = self.databases().retained;
        let key = blake3::hash(topic.as_bytes());
        retained
            .delete(&mut self.txn, key.as_bytes())
            .map(drop)
            .map_err(|e| self.error(e))
    }

    pub fn put_queued(
        &mut self,
        number: u64,
        sequence: u64,
        delivery: &[u8],
    ) -> Result<(), StoreError> {
        let queued = self.databases().queued;
        queued
            .put(&mut self.txn, &queued_key(number, sequence), delivery)
            .map_err(|e| self.error(e))
    }

    /// What is queued under this sequence.
    pub fn queued(&self, number: u64, sequence: u64) -> Result<Option<&[u8]>, StoreError> {
        let queued = self.databases().queued;
        queued
            .get(&self.txn, &queued_key(number, sequence))
            .map_err(|e| self.error(e))
    }

    /// Removes what is queued for a session from `first` to `last`, `max` at the most. Returns how
    /// many it removed and what they cost.
    pub fn remove_queued(
        &mut self,
        number: u64,
        (first, last): (u64, u64),
        max: usize,
    ) -> Result<(usize, u64), StoreError> {
        let queued = self.databases().queued;
        let range = queued_key(number, first)..=queued_key(number, last);
        let mut keys = Vec::new();
        let mut cost = 0;
        let found = queued.range(&self.txn, &range);
        for entry in found.map_err(|e| self.error(e))?.take(max) {
            let (key, value) = entry.map_err(|e| self.error(e))?;
            keys.push(key);
            cost += queued_cost(value.len());
        }
        for key in &keys {
            queued
                .delete(&mut self.txn, key)
                .map_err(|e| self.error(e))?;
        }
        Ok((keys.len(), cost))
    }

    pub fn put_dead_letter(&mut self, sequence: u64, letter: &[u8]) -> Result<(), StoreError> {
        let letters = self.databases().dead_letters;
        letters
            .put(&mut self.txn, &sequence, letter)
            .map_err(|e| self.error(e))
    }

    pub fn remove_dead_letters_before(&mut self, sequence: u64) -> Result<(), StoreError> {
        let letters = self.databases().dead_letters;
        letters
            .delete_range(&mut self.txn, &(..sequence))
            .map(drop)
            .map_err(|e| self.error(e))
    }

    pub fn remove_dead_letter(&mut self, sequence: u64) -> Result<(), StoreError> {
        let letters = self.databases().dead_letters;
        letters
            .delete(&mut self.txn, &sequence)
            .map(drop)
            .map_err(|e| self.error(e))
    }

    pub fn set_counter(&mut self, counter: Counter, value: u64) -> Result<(), StoreError> {
        let counters = self.databases().counters;
        counters
            .put(&mut self.txn, counter.key(), &value)
            .map_err(|e| self.error(e))
    }

    /// Which part of the database's pages is in use with these changes, from 0 to 1.
    pub fn fill(&self) -> Result<f64, StoreError> {
        self.store.fill(&self.txn)
    }

    /// On disk when it returns.
    pub fn commit(self) -> Result<(), StoreError> {
        let store = self.store;
        self.txn.commit().map_err(|e| store.error(e))
    }
}
