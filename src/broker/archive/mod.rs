//! What of MQTT outlives the process: the way of sessions, queued deliveries and retained messages
//! to the store and back.
//!
//! A commit is an fsync, so one thread, `mqtt-store`, writes what many connections asked for in one
//! transaction. Until it is on disk it waits here, as the wanted state of each key: what is appended
//! and removed again meanwhile never reaches the disk. Readers see what waits.
//!
//! A write that fails loses nothing but time: what it had to say waits on, and is tried again. It
//! must never stop the gateway, which can do without its disk for as long as it runs.

mod changes;
mod restore;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::ops::{ControlFlow, Range};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use rustc_hash::{FxHashMap, FxHashSet};
use tokio::sync::watch;

use super::message::{Delivery, Message};
use super::stored::{self, Clock, SessionRecord, StoredWill};
use crate::dead_letters::{DeadLetters, Reason, Unsaved};
use crate::event::Topic;
use crate::store::{Counter, MAX_CLIENT_ID_BYTES, MqttChanges, Store, StoreError, queued_cost};
use changes::{Changes, Ranges, Waiting};

/// How long changes that nobody waits for gather before they are written, so that a trickle of them
/// does not wear a flash card out.
const GATHER: Duration = Duration::from_millis(50);

/// After a write that failed.
const RETRY: Duration = Duration::from_secs(1);

/// With so many bytes of deliveries waiting to be written, publishers ought to pause.
const PRESSED_BYTES: usize = 8 << 20;

/// With so many, no more are taken.
const MAX_WAITING_BYTES: usize = 64 << 20;

/// Deliveries of sessions that are gone, removed in one transaction: others must not wait for long.
const REMOVED_AT_ONCE: usize = 10_000;

/// How often dead letters are written, if there are new ones.
const DEAD_LETTERS_EVERY: Duration = Duration::from_secs(10);

/// How full the database may get with what is queued. The rest is for the other records, and for
/// removing: LMDB needs free pages for that too.
const MAX_FILL: f64 = 0.85;

/// Bytes of the disk that are left alone, for the same reason.
const DISK_RESERVE: u64 = 16 << 20;

/// The way to the store. Cheap to clone; the last clone that goes writes the rest.
#[derive(Clone)]
pub struct Archive {
    shared: Arc<Shared>,
    writer: Arc<Writer>,
}

/// What the store had when it was opened. Records that can't be read are left out: they are logged,
/// counted, and stay in the store until others take their place or their session goes.
#[derive(Debug, Default)]
pub struct Restored {
    /// Client id and record. The next sequence is behind all that is queued.
    pub sessions: Vec<(String, SessionRecord)>,
    /// The sequences of what is queued, and its bytes in the store, by the session's number.
    pub queued: FxHashMap<u64, (Range<u64>, usize)>,
    pub retained: Vec<Message>,
    /// Of sessions that ended while no gateway ran; due now.
    pub wills: Vec<StoredWill>,
    /// Numbers from here on have never been given to a session.
    pub first_number: u64,
}

/// Something is not on disk.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ArchiveError {
    #[error("{0}")]
    NotWritten(Arc<str>),
    #[error("the gateway is shutting down and has closed the store")]
    Closed,
}

struct Shared {
    store: Store,
    max_queued_bytes: u64,
    dead_letters: Arc<DeadLetters>,
    state: Mutex<State>,
    /// Tells the writer that there is something to do.
    work: Condvar,
    progress: watch::Sender<Progress>,
    /// How many changes were asked for, and how many of them, in order, are on disk. Changed with
    /// the lock on `state`; here for [`Archive::is_synced`].
    asked: AtomicU64,
    durable: AtomicU64,
    pressed: AtomicBool,
    /// As `State::full` says, for those who ask often.
    full: AtomicBool,
    commits: AtomicU64,
    failures: AtomicU64,
    damaged: AtomicU64,
}

#[derive(Default)]
struct State {
    /// Not yet given to the writer.
    waiting: Changes,
    /// Since when something is in `waiting`.
    waiting_since: Option<Instant>,
    /// Being written at this moment, or just written.
    writing: Arc<Changes>,
    /// [`queued_cost`] of what is queued in the database.
    committed_bytes: u64,
    /// The number of each session that is kept.
    numbers: FxHashMap<Box<str>, u64>,
    /// Somebody waits for `waiting` to be written.
    awaited: bool,
    /// The database has no room for more deliveries.
    full: bool,
    /// When to look for new dead letters.
    dead_letters_due: Option<Instant>,
    /// When to try again after a failure.
    retry_at: Option<Instant>,
    closing: bool,
    /// There is no writer any more.
    ended: bool,
    /// Deliveries that could not be read, to tell of each only once.
    known_damaged: FxHashSet<(u64, u64)>,
}

/// How far the writer has come, in numbers of changes.
#[derive(Clone, Debug, Default)]
struct Progress {
    durable: u64,
    /// Tried last and not written, and why.
    failed: u64,
    why: Option<Arc<str>>,
    closed: bool,
}

impl State {
    fn queued_bytes(&self) -> u64 {
        self.committed_bytes + self.waiting.cost + self.writing.cost
    }

    fn waiting_bytes(&self) -> usize {
        self.waiting.bytes + self.writing.bytes
    }
}

impl Archive {
    /// Reads what the store has and starts the writer. `max_queued_bytes` bounds what is queued for
    /// all sessions together, as it takes up the database. `dead_letters` gets those of earlier runs,
    /// and is written to the store from time to time.
    pub fn open(
        store: Store,
        max_queued_bytes: u64,
        dead_letters: Arc<DeadLetters>,
    ) -> Result<(Archive, Restored), StoreError> {
        let (state, restored, damaged) = restore::restore(&store, &dead_letters, Clock::read())?;
        let archive = Archive::start(store, max_queued_bytes, dead_letters, state, damaged)?;
        Ok((archive, restored))
    }

    fn start(
        store: Store,
        max_queued_bytes: u64,
        dead_letters: Arc<DeadLetters>,
        mut state: State,
        damaged: u64,
    ) -> Result<Archive, StoreError> {
        if !state.waiting.is_empty() {
            state.waiting_since = Some(Instant::now());
        }
        let shared = Arc::new(Shared {
            store,
            max_queued_bytes,
            dead_letters,
            state: Mutex::new(state),
            work: Condvar::new(),
            progress: watch::Sender::new(Progress::default()),
            asked: AtomicU64::new(0),
            durable: AtomicU64::new(0),
            pressed: AtomicBool::new(false),
            full: AtomicBool::new(false),
            commits: AtomicU64::new(0),
            failures: AtomicU64::new(0),
            damaged: AtomicU64::new(damaged),
        });
        let thread = {
            let shared = shared.clone();
            std::thread::Builder::new()
                .name("mqtt-store".into())
                .spawn(move || Ended(shared).0.write_until_closed())
        };
        let thread = thread.map_err(|source| StoreError::Io {
            path: shared.store.path().to_owned(),
            doing: "cannot start the thread that writes MQTT state",
            source,
            remedy: "raise the limit on the gateway's threads",
        })?;
        Ok(Archive {
            writer: Arc::new(Writer {
                shared: shared.clone(),
                thread: Mutex::new(Some(thread)),
            }),
            shared,
        })
    }

    /// Keeps the session under this client id, in the place of what was kept under it.
    pub fn put_session(&self, client_id: &str, record: SessionRecord) {
        if client_id.is_empty() || client_id.len() > MAX_CLIENT_ID_BYTES {
            tracing::error!(
                client_id,
                "a session can't be stored under such a client id"
            );
            return;
        }
        self.shared.change(|state| {
            match state.numbers.get_mut(client_id) {
                Some(number) => *number = record.number,
                None => {
                    state.numbers.insert(client_id.into(), record.number);
                }
            }
            let record = Some(Arc::new(record));
            match state.waiting.sessions.get_mut(client_id) {
                Some(waiting) => *waiting = record,
                None => {
                    state.waiting.sessions.insert(client_id.into(), record);
                }
            }
        });
    }

    /// Forgets the session with all that is queued for it. Another one that is kept under the client
    /// id by now stays. Nothing may be appended to a session that was removed.
    pub fn remove_session(&self, client_id: &str, number: u64) {
        self.shared.change(|state| {
            let lost = state.waiting.take_back_queue(number);
            self.shared.dead_letters.count(Reason::SessionEnded, lost);
            state.waiting.gone.insert(number);
            if state.numbers.get(client_id) == Some(&number) {
                state.numbers.remove(client_id);
                state.waiting.sessions.insert(client_id.into(), None);
            }
        });
    }

    /// Keeps a retained message in the place of the one that its topic had.
    pub fn retain(&self, message: Arc<Message>) {
        self.shared.change(|state| {
            let topic = message.topic.clone();
            state.waiting.retained.insert(topic, Some(message));
        });
    }

    pub fn forget_retained(&self, topic: &Topic) {
        self.shared.change(|state| {
            state.waiting.retained.insert(topic.clone(), None);
        });
    }

    /// Queues a delivery for a session. Sequences of one session count up and are never used again.
    /// False: there is no room, and nothing was taken.
    #[must_use]
    pub fn append(&self, number: u64, sequence: u64, delivery: Delivery) -> bool {
        let waiting = Waiting {
            cost: queued_cost(stored::delivery_bytes(&delivery)),
            delivery,
            maybe_written: false,
        };
        let mut taken = false;
        self.shared.change_if(|state| {
            let queued = state.queued_bytes() + waiting.cost;
            let bytes = state.waiting_bytes() + waiting.bytes();
            taken = !state.full
                && !state.closing
                && queued <= self.shared.max_queued_bytes
                && bytes <= MAX_WAITING_BYTES;
            if taken {
                state.waiting.append((number, sequence), waiting);
            }
            taken
        });
        taken
    }

    /// Removes deliveries from what is queued for a session.
    pub fn remove(&self, number: u64, sequences: impl Iterator<Item = u64>) {
        self.shared.change(|state| {
            for sequence in sequences {
                let key = (number, sequence);
                let never_written = state
                    .waiting
                    .take_back(key)
                    .is_some_and(|waiting| !waiting.maybe_written);
                if !never_written {
                    state.waiting.removed.insert(number, (sequence, sequence));
                }
            }
        });
    }

    /// What is queued for a session, in order from the sequence `from` on: up to `max` deliveries,
    /// and no more after `max_bytes`. Sees everything that was asked for before, on disk or not.
    /// Leaves out what can't be read. May wait for the disk.
    pub fn read(
        &self,
        number: u64,
        from: u64,
        max: usize,
        max_bytes: usize,
    ) -> Result<Vec<(u64, Delivery)>, StoreError> {
        let (snapshot, removed, mut found) = {
            let state = self.shared.state.lock();
            let writing = state.writing.queued_from(number, from);
            let writing = writing
                .filter(|(sequence, _)| !state.waiting.removed.contains((number, *sequence)));
            let waiting: BTreeMap<_, _> = writing
                .take(max)
                .chain(state.waiting.queued_from(number, from).take(max))
                .map(|(sequence, delivery)| (sequence, delivery.clone()))
                .collect();
            let removed: Vec<_> = [&state.writing.removed, &state.waiting.removed]
                .into_iter()
                .flat_map(|ranges| ranges.of(number, from))
                .collect();
            // With the lock: what the writer is done with is in here, the rest is in `waiting`.
            (self.shared.store.read_mqtt()?, removed, waiting)
        };
        let clock = Clock::read();
        let mut bytes = 0;
        let mut count = 0;
        let mut damaged = Vec::new();
        snapshot.each_queued(number, from, |sequence, record| {
            if removed
                .iter()
                .any(|(first, last)| (first..=last).contains(&&sequence))
            {
                return ControlFlow::Continue(());
            }
            match stored::decode_delivery(record, clock) {
                Ok(delivery) => {
                    bytes += delivery.message.queued_bytes();
                    count += 1;
                    found.insert(sequence, delivery);
                }
                Err(error) => damaged.push((sequence, error)),
            }
            match count < max && bytes < max_bytes {
                true => ControlFlow::Continue(()),
                false => ControlFlow::Break(()),
            }
        })?;
        drop(snapshot);
        self.shared.report_damaged(number, damaged);
        let mut bytes = 0;
        let within = found.into_iter().take(max).take_while(|(_, delivery)| {
            let before = bytes;
            bytes += delivery.message.queued_bytes();
            before < max_bytes
        });
        Ok(within.collect())
    }

    /// What all that is queued takes up in the database, or will.
    pub fn queued_bytes(&self) -> u64 {
        self.shared.state.lock().queued_bytes()
    }

    /// Whether there is no room for more: what is left is for removing.
    pub fn is_full(&self) -> bool {
        self.shared.full.load(Ordering::Relaxed)
    }

    /// Whether so much waits to be written that publishers ought to pause.
    pub fn is_pressed(&self) -> bool {
        self.shared.pressed.load(Ordering::Relaxed)
    }

    /// Whether everything that was asked for is on disk.
    pub fn is_synced(&self) -> bool {
        let asked = self.shared.asked.load(Ordering::Acquire);
        self.shared.durable.load(Ordering::Acquire) >= asked
    }

    /// Waits until everything that was asked for before is on disk. An error if that failed: it
    /// will be tried again, but who knows for how long.
    pub async fn synced(&self) -> Result<(), ArchiveError> {
        if self.is_synced() {
            return Ok(());
        }
        let target = self.shared.await_writing();
        let mut progress = self.shared.progress.subscribe();
        let reached = progress.wait_for(|progress| progress.result(target).is_some());
        match reached.await {
            Ok(progress) => progress.result(target).unwrap_or(Ok(())),
            Err(_) => Err(ArchiveError::Closed),
        }
    }

    /// Writes the rest and ends the thread. What is asked for after that is not written.
    pub fn close(self) {
        self.writer.end();
    }

    /// Puts the counters into the `metrics` crate's recorder. To be called before a scrape.
    pub fn record_metrics(&self) {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let shared = &self.shared;
        metrics::gauge!("headgate_mqtt_store_queued_bytes").set(self.queued_bytes() as f64);
        metrics::counter!("headgate_mqtt_store_commits_total").absolute(get(&shared.commits));
        metrics::counter!("headgate_mqtt_store_failures_total").absolute(get(&shared.failures));
        metrics::counter!("headgate_mqtt_store_damaged_records_total")
            .absolute(get(&shared.damaged));
    }
}

impl std::fmt::Debug for Archive {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Archive").finish_non_exhaustive()
    }
}

impl Progress {
    /// What became of the changes up to `target`; none: not known yet.
    fn result(&self, target: u64) -> Option<Result<(), ArchiveError>> {
        if self.durable >= target {
            return Some(Ok(()));
        }
        match &self.why {
            Some(why) if self.failed >= target => Some(Err(ArchiveError::NotWritten(why.clone()))),
            _ if self.closed => Some(Err(ArchiveError::Closed)),
            _ => None,
        }
    }
}

/// The thread, which ends with the last [`Archive`].
struct Writer {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Writer {
    fn end(&self) {
        self.shared.state.lock().closing = true;
        self.shared.work.notify_one();
        if let Some(thread) = self.thread.lock().take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that stores MQTT state has panicked");
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.end();
    }
}

/// Nobody is to wait for a writer that is gone, however it went.
struct Ended(Arc<Shared>);

impl Drop for Ended {
    fn drop(&mut self) {
        let mut state = self.0.state.lock();
        state.ended = true;
        state.waiting = Changes::default();
        state.writing = Arc::default();
        self.0
            .progress
            .send_modify(|progress| progress.closed = true);
        self.0.pressed.store(false, Ordering::Relaxed);
    }
}

impl Shared {
    fn change(&self, change: impl FnOnce(&mut State)) {
        self.change_if(|state| {
            change(state);
            true
        });
    }

    /// Makes a change, unless `change` says that it made none.
    fn change_if(&self, change: impl FnOnce(&mut State) -> bool) {
        let mut state = self.state.lock();
        if state.ended {
            // So that nobody takes it for written.
            self.asked.fetch_add(1, Ordering::Release);
            return;
        }
        if !change(&mut state) {
            return;
        }
        self.asked.fetch_add(1, Ordering::Release);
        let mut wake = false;
        if state.waiting_since.is_none() {
            state.waiting_since = Some(Instant::now());
            wake = true;
        }
        if state.waiting_bytes() > PRESSED_BYTES && !self.pressed.swap(true, Ordering::Relaxed) {
            wake = true;
        }
        drop(state);
        if wake {
            self.work.notify_one();
        }
    }

    /// Makes the writer write soon. Returns up to which change.
    fn await_writing(&self) -> u64 {
        let mut state = self.state.lock();
        if !std::mem::replace(&mut state.awaited, true) {
            self.work.notify_one();
        }
        self.asked.load(Ordering::Acquire)
    }

    fn write_until_closed(&self) {
        let mut record = Vec::new();
        while let Some((changes, target)) = self.next_changes() {
            let written = self.write(changes, target, &mut record);
            if !written && self.state.lock().closing {
                break;
            }
        }
        let state = self.state.lock();
        if !state.waiting.is_empty() {
            tracing::error!(
                sessions = state.waiting.sessions.len(),
                retained = state.waiting.retained.len(),
                deliveries = state.waiting.queued.len(),
                "the last changes of the MQTT state are lost: they could not be written",
            );
        }
    }

    /// Waits for changes and takes them. None: the archive is closed, and no more will be written.
    fn next_changes(&self) -> Option<(Arc<Changes>, u64)> {
        let mut state = self.state.lock();
        loop {
            let now = Instant::now();
            if state.waiting.is_empty() {
                // Changes that took each other back are on disk as they are.
                state.waiting_since = None;
                state.awaited = false;
                self.advance(self.asked.load(Ordering::Acquire));
                if let Some(letters) = self.new_dead_letters(&mut state, now) {
                    state.waiting.dead_letters = Some(letters);
                    break;
                }
                if state.closing {
                    return None;
                }
                self.work.wait_for(&mut state, DEAD_LETTERS_EVERY);
                continue;
            }
            let hurry = state.closing || state.awaited || self.pressed.load(Ordering::Relaxed);
            let due = match state.retry_at {
                Some(_) if state.closing => now,
                Some(retry_at) => retry_at,
                None if hurry => now,
                None => state.waiting_since.map_or(now, |since| since + GATHER),
            };
            if due <= now {
                state.waiting.dead_letters = self.new_dead_letters(&mut state, now);
                break;
            }
            self.work.wait_until(&mut state, due);
        }
        state.waiting_since = None;
        state.awaited = false;
        let changes = Arc::new(std::mem::take(&mut state.waiting));
        state.writing = changes.clone();
        Some((changes, self.asked.load(Ordering::Acquire)))
    }

    /// If it is time to write them.
    fn new_dead_letters(&self, state: &mut State, now: Instant) -> Option<Unsaved> {
        if state.dead_letters_due.is_some_and(|due| now < due) && !state.closing {
            return None;
        }
        state.dead_letters_due = Some(now + DEAD_LETTERS_EVERY);
        self.dead_letters.unsaved()
    }

    /// False: it failed, and is to be tried again.
    fn write(&self, changes: Arc<Changes>, target: u64, record: &mut Vec<u8>) -> bool {
        let committed = self.state.lock().committed_bytes;
        let written = match self.commit(&changes, Part::All, committed, record) {
            Ok(written) => {
                self.written(written, target);
                if let Some(letters) = &changes.dead_letters {
                    self.dead_letters.saved(letters);
                }
                true
            }
            Err(error) => {
                // Removing makes room, and must not fail with what finds none.
                let full = matches!(error, StoreError::Full { .. });
                let removed = full
                    && self
                        .commit(&changes, Part::Removals, committed, record)
                        .map(|written| self.state.lock().committed_bytes = written.queued_bytes)
                        .is_ok();
                // The other one is in the state, and not to be copied.
                drop(changes);
                self.not_written(full, removed, target, error);
                false
            }
        };
        self.ease();
        written
    }

    /// One transaction. `committed` is the cost of all that is queued before it.
    fn commit(
        &self,
        changes: &Changes,
        part: Part,
        committed: u64,
        record: &mut Vec<u8>,
    ) -> Result<Written, StoreError> {
        let clock = Clock::read();
        let mut added = 0;
        let mut removed = 0;
        let mut txn = self.store.write_mqtt()?;
        for (number, range) in changes.removed.iter() {
            removed += txn.remove_queued(number, range, usize::MAX)?.1;
        }
        let mut unfinished = Vec::new();
        let mut left = REMOVED_AT_ONCE;
        let mut lost = 0;
        for &number in &changes.gone {
            let (count, cost) = txn.remove_queued(number, (0, u64::MAX), left)?;
            lost += count as u64;
            removed += cost;
            left -= count;
            if left == 0 {
                unfinished.push(number);
            }
        }
        for (client_id, session) in &changes.sessions {
            match session {
                None => txn.remove_session(client_id)?,
                Some(_) if part == Part::Removals => {}
                Some(session) => {
                    stored::encode_session(session, clock, record);
                    txn.put_session(client_id, record)?;
                }
            }
        }
        for (topic, message) in &changes.retained {
            match message {
                None => txn.remove_retained(topic.as_str())?,
                Some(_) if part == Part::Removals => {}
                Some(message) => {
                    stored::encode_message(message, clock, record);
                    txn.put_retained(topic.as_str(), record)?;
                }
            }
        }
        if part == Part::All {
            added = put_queued(&mut txn, &changes.queued, clock, record, &mut removed)?;
            if let Some(letters) = &changes.dead_letters {
                txn.remove_dead_letters_before(letters.first)?;
                for id in &letters.taken_out {
                    txn.remove_dead_letter(*id)?;
                }
                txn.set_counter(Counter::NextDeadLetter, letters.next)?;
                for (sequence, letter) in &letters.letters {
                    stored::encode_dead_letter(letter, record);
                    txn.put_dead_letter(*sequence, record)?;
                }
            }
            if let Some(run) = changes.run {
                txn.set_counter(Counter::Runs, run)?;
            }
        }
        let queued_bytes = (committed + added).saturating_sub(removed);
        if queued_bytes != committed {
            txn.set_counter(Counter::QueuedBytes, queued_bytes)?;
        }
        let nearly_full = txn.fill()? > MAX_FILL || self.store.free_disk_bytes()? < DISK_RESERVE;
        txn.commit()?;
        self.commits.fetch_add(1, Ordering::Relaxed);
        self.dead_letters.count(Reason::SessionEnded, lost);
        Ok(Written {
            queued_bytes,
            unfinished,
            nearly_full,
        })
    }

    fn written(&self, written: Written, target: u64) {
        let mut state = self.state.lock();
        state.committed_bytes = written.queued_bytes;
        state.writing = Arc::default();
        if !written.unfinished.is_empty() {
            state.waiting.gone.extend(written.unfinished);
            state.waiting_since.get_or_insert_with(Instant::now);
        }
        if state.retry_at.take().is_some() {
            tracing::info!("MQTT state can be written to the store again");
        }
        if state.full != written.nearly_full {
            state.full = written.nearly_full;
            self.full.store(state.full, Ordering::Relaxed);
            match state.full {
                true => tracing::error!(
                    queued_bytes = written.queued_bytes,
                    "the store, or the disk that it is on, is nearly full: no more is queued in it for \
                     MQTT clients, and no more retained; raise store.max_bytes, make room on the disk, \
                     or remove sessions or retained messages"
                ),
                false => tracing::info!("the store has room again for what MQTT clients wait for"),
            }
        }
        self.advance(target);
    }

    /// All changes up to `target` are on disk. To be called with the lock on the state.
    fn advance(&self, target: u64) {
        if self.durable.fetch_max(target, Ordering::AcqRel) >= target {
            return;
        }
        self.progress.send_modify(|progress| {
            progress.durable = target;
            progress.why = None;
        });
    }

    fn not_written(&self, full: bool, removed: bool, target: u64, error: StoreError) {
        let mut state = self.state.lock();
        let mut changes = Arc::unwrap_or_clone(std::mem::take(&mut state.writing));
        if removed {
            changes.removed = Ranges::default();
        }
        state.waiting.add_earlier(changes);
        state.waiting_since.get_or_insert_with(Instant::now);
        state.full |= full;
        self.full.store(state.full, Ordering::Relaxed);
        let first = state.retry_at.replace(Instant::now() + RETRY).is_none();
        if first {
            tracing::error!(
                %error,
                "MQTT state can't be written; it is kept in memory and tried again every second",
            );
        }
        self.fail(target, error.to_string());
    }

    /// The changes up to `target` could not be written. To be called with the lock on the state.
    fn fail(&self, target: u64, why: String) {
        self.failures.fetch_add(1, Ordering::Relaxed);
        self.progress.send_modify(|progress| {
            progress.failed = target;
            progress.why = Some(why.into());
        });
    }

    fn ease(&self) {
        if self.state.lock().waiting_bytes() <= PRESSED_BYTES / 2 {
            self.pressed.store(false, Ordering::Relaxed);
        }
    }

    /// Says and counts, once each, which deliveries could not be read.
    fn report_damaged(&self, number: u64, damaged: Vec<(u64, stored::Unreadable)>) {
        /// More of them remembered would not tell anybody more.
        const KNOWN: usize = 10_000;
        if damaged.is_empty() {
            return;
        }
        let mut state = self.state.lock();
        let client_id = state
            .numbers
            .iter()
            .find(|(_, known)| **known == number)
            .map(|(client_id, _)| client_id.clone());
        for (sequence, error) in damaged {
            if state.known_damaged.len() < KNOWN && state.known_damaged.insert((number, sequence)) {
                self.damaged.fetch_add(1, Ordering::Relaxed);
                tracing::error!(
                    client_id = client_id.as_deref(),
                    sequence,
                    %error,
                    "a message that waits for a client in the store can't be read and is left out",
                );
            }
        }
    }
}

/// What of some changes is written.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    All,
    Removals,
}

/// What a transaction has come to.
struct Written {
    queued_bytes: u64,
    /// Sessions that are gone, and for which something is still queued.
    unfinished: Vec<u64>,
    nearly_full: bool,
}

/// Returns what is queued now, and adds to `removed` what it took the place of.
fn put_queued(
    txn: &mut MqttChanges,
    queued: &BTreeMap<(u64, u64), Waiting>,
    clock: Clock,
    record: &mut Vec<u8>,
    removed: &mut u64,
) -> Result<u64, StoreError> {
    let mut added = 0;
    for (&(number, sequence), waiting) in queued {
        if waiting.maybe_written
            && let Some(before) = txn.queued(number, sequence)?
        {
            *removed += queued_cost(before.len());
        }
        stored::encode_delivery(&waiting.delivery, clock, record);
        txn.put_queued(number, sequence, record)?;
        added += queued_cost(record.len());
    }
    Ok(added)
}
