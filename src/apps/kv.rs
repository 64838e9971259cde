//! What apps keep from one call to the next: key-value state, in memory for reading and in the store
//! for good.
//!
//! What a call writes is gathered in a [`StagedState`], which nobody else sees; [`AppState::commit`]
//! puts it into force as a whole. From there one thread, `apps-kv`, brings it to the store, many
//! calls of many apps in one transaction, but never a part of one call. A write that fails is tried
//! again; until it succeeds, what is to be written waits as the wanted state of each key, so that it
//! takes no more memory than the state itself.

use std::collections::BTreeMap;
use std::collections::btree_map;
use std::iter::Peekable;
use std::ops::Bound;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use tokio::sync::Notify;

use crate::event::{Event, Receipt};
use crate::site::{Changes, SharedState};
use crate::store::{MAX_APP_KEY_BYTES, Store, StoreError};

/// Longest key, without the bucket's name.
pub(super) const MAX_KEY_BYTES: usize = 255;
pub(super) const MAX_VALUE_BYTES: usize = 64 << 10;
pub(super) const MAX_BUCKET_NAME: usize = 64;
/// Most buckets of one app.
pub(super) const MAX_BUCKETS: usize = 16;

const _: () = assert!(MAX_BUCKET_NAME + 1 + MAX_KEY_BYTES <= MAX_APP_KEY_BYTES);

/// What an entry takes besides key and value, near enough: nodes in memory and in the database.
const ENTRY_BYTES: usize = 64;

/// Most keys, and bytes of keys, in one page of a listing.
const PAGE_KEYS: usize = 256;
const PAGE_BYTES: usize = 64 << 10;

/// How long changes gather before they are written, so that a trickle of them does not wear a flash
/// card out.
const GATHER: Duration = Duration::from_millis(50);

/// After a write that failed.
const RETRY: Duration = Duration::from_secs(1);

/// Most receipts of events that wait until what was made of them is on disk; beyond that, the events come again
/// at the next start.
const MAX_RECEIPTS: usize = 65_536;

/// So many more keys than there are entries may wait to be written (they were removed); with more,
/// it is less to write all entries anew.
const PENDING_SLACK: usize = 1024;

/// The bucket's name, a NUL, the key. No bucket has a NUL in its name.
type Key = Arc<str>;
/// Under this key stands the version of the format that the app writes, as four bytes,
/// little-endian; where it is missing, the version is 1. No bucket has an empty name.
const VERSION_KEY: &str = "\0version";
type Value = Arc<[u8]>;

/// The way to the store, for all apps.
pub(super) struct KvStore {
    writer: Arc<Writer>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

struct Writer {
    store: Store,
    queue: Mutex<Queue>,
    work: Condvar,
    commits: AtomicU64,
    failures: AtomicU64,
}

#[derive(Default)]
struct Queue {
    /// Who has something to be written, each once.
    apps: Vec<Arc<AppState>>,
    /// When the first of them came.
    since: Option<Instant>,
    /// When to try again after a failure.
    retry_at: Option<Instant>,
    closed: bool,
}

/// The state of one app; or, of one that all gateways of a site share, for one seat.
pub(super) struct AppState {
    app: Arc<str>,
    sink: Sink,
    contents: Mutex<Contents>,
    /// Notified when the writer is done with this app.
    written: Condvar,
}

/// Who brings changes to where they are kept.
enum Sink {
    Store(Arc<Writer>),
    /// Whoever is notified takes them with [`SharedState::take`].
    Site(Arc<Notify>),
}

#[derive(Default)]
struct Contents {
    entries: Kept,
    /// [`cost`] of all entries.
    bytes: usize,
    pending: Pending,
    /// Counts the calls that have changed something, and how many of them are on disk.
    version: u64,
    durable: u64,
    /// Of the events of calls that are not on disk yet, as far as they are not being written.
    receipts: Vec<Arc<dyn Receipt>>,
    /// Is in the writer's queue.
    queued: bool,
    /// The writer is at it.
    writing: bool,
    /// Nothing is written for now.
    closed: bool,
    /// The app is being removed: nothing is written any more.
    retired: bool,
    /// Why the state could not be read. Nobody gets to see or change it then.
    unreadable: Option<Arc<str>>,
}

/// What is not in the store yet.
#[derive(Default)]
struct Pending {
    /// None: to be removed. Empty if all is replaced.
    changes: BTreeMap<Key, Option<Value>>,
    /// All that the store has is to go, and all entries are to be written.
    replace: bool,
}

/// What one call has written, and nobody else sees.
#[derive(Default)]
pub(super) struct StagedState {
    changes: BTreeMap<Key, Option<Value>>,
    /// What the changes add to the app's bytes.
    growth: isize,
}

/// How much an app keeps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Usage {
    pub(super) bytes: usize,
    pub(super) keys: usize,
    /// Whether all of it is on disk.
    pub(super) synced: bool,
}

/// All that an app keeps, as it was at one time.
pub(super) type Kept = BTreeMap<Key, Value>;

/// The state would be larger than it may.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct TooMuch;

impl KvStore {
    pub(super) fn start(store: Store) -> std::io::Result<KvStore> {
        let writer = Arc::new(Writer {
            store,
            queue: Mutex::default(),
            work: Condvar::new(),
            commits: AtomicU64::new(0),
            failures: AtomicU64::new(0),
        });
        let thread = thread::Builder::new().name("apps-kv".into()).spawn({
            let writer = writer.clone();
            move || writer.write_until_closed()
        })?;
        Ok(KvStore {
            writer,
            thread: Mutex::new(Some(thread)),
        })
    }

    /// Reads what an app has kept.
    pub(super) fn open(&self, app: &Arc<str>) -> Arc<AppState> {
        let contents = match self.writer.store.app_state(app) {
            Ok(state) => {
                let entries = kept(state);
                Contents {
                    bytes: cost_of_all(&entries),
                    entries,
                    ..Contents::default()
                }
            }
            Err(error) => {
                tracing::error!(app = &**app, %error, "the state of the app {app} can't be read");
                Contents {
                    unreadable: Some(error.to_string().into()),
                    ..Contents::default()
                }
            }
        };
        Arc::new(AppState {
            app: app.clone(),
            sink: Sink::Store(self.writer.clone()),
            contents: Mutex::new(contents),
            written: Condvar::new(),
        })
    }

    /// Writes the rest and ends the thread. What comes after that is not written.
    pub(super) fn close(&self) {
        self.writer.queue.lock().closed = true;
        self.writer.work.notify_one();
        if let Some(thread) = self.thread.lock().take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that stores the apps' state has panicked");
        }
    }

    /// Transactions that are on disk, and those that failed.
    pub(super) fn commits_and_failures(&self) -> (u64, u64) {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        (get(&self.writer.commits), get(&self.writer.failures))
    }
}

impl Drop for KvStore {
    fn drop(&mut self) {
        self.close();
    }
}

impl AppState {
    /// What the site keeps for the app. Its changes are for whoever is notified.
    pub(super) fn shared(app: Arc<str>, entries: Kept, changed: Arc<Notify>) -> Arc<AppState> {
        Arc::new(AppState {
            app,
            sink: Sink::Site(changed),
            contents: Mutex::new(Contents {
                bytes: cost_of_all(&entries),
                entries,
                ..Contents::default()
            }),
            written: Condvar::new(),
        })
    }

    pub(super) fn usage(&self) -> Usage {
        let contents = self.contents.lock();
        Usage {
            bytes: contents.bytes,
            keys: contents.entries.len() - usize::from(contents.stored_version().is_some()),
            synced: contents.durable == contents.version,
        }
    }

    /// Why the state could not be read, if so.
    pub(super) fn unreadable(&self) -> Option<Arc<str>> {
        self.contents.lock().unreadable.clone()
    }

    /// The version of the format that what is kept was written in. None: nothing is kept.
    pub(super) fn version(&self) -> Option<u32> {
        let contents = self.contents.lock();
        let is_empty = contents.entries.is_empty();
        contents.stored_version().or((!is_empty).then_some(1))
    }

    /// The instance that is starting writes in this version of the format.
    pub(super) fn stage_version(&self, staged: &mut StagedState, version: u32) {
        let before = self.contents.lock().stored_version().unwrap_or(1);
        if version != before {
            let bytes = version.to_le_bytes();
            staged
                .changes
                .insert(VERSION_KEY.into(), Some(bytes.as_slice().into()));
        }
    }

    /// All that is kept now.
    pub(super) fn kept(&self) -> Kept {
        self.contents.lock().entries.clone()
    }

    /// Puts what was kept at another time into the place of all that is kept now. Nothing is written
    /// from here on, until [`AppState::reopen`]: who calls this brings it to the store, together with
    /// what goes with it.
    pub(super) fn restore(&self, kept: Kept) {
        let mut contents = self.contents.lock();
        contents.bytes = cost_of_all(&kept);
        contents.entries = kept;
        contents.pending = Pending::default();
        contents.closed = true;
    }

    /// The names of the buckets that have something in them.
    pub(super) fn buckets(&self) -> Vec<String> {
        let contents = self.contents.lock();
        let mut names = Vec::new();
        // Behind the keys without a bucket.
        let mut from = Bound::Included("\u{1}".to_owned());
        while let Some((key, _)) = contents
            .entries
            .range::<str, _>((from.as_ref().map(String::as_str), Bound::Unbounded))
            .next()
        {
            let name = key.split('\0').next().unwrap_or_default().to_owned();
            // The first text behind all keys of this bucket.
            from = Bound::Included(format!("{name}\u{1}"));
            names.push(name);
        }
        names
    }

    pub(super) fn get(&self, staged: &StagedState, key: &str) -> Option<Value> {
        match staged.changes.get(key) {
            Some(change) => change.clone(),
            None => self.contents.lock().entries.get(key).cloned(),
        }
    }

    pub(super) fn set(
        &self,
        staged: &mut StagedState,
        most_bytes: usize,
        key: &str,
        value: &[u8],
    ) -> Result<(), TooMuch> {
        let (before, bytes) = self.cost_before(staged, key);
        let growth = cost(key, value) as isize - before.map_or(0, |before| before as isize);
        let total = bytes as isize + staged.growth + growth;
        // What makes the state smaller is always allowed: the limit may be a new one.
        if growth > 0 && total > most_bytes as isize {
            return Err(TooMuch);
        }
        staged.growth += growth;
        staged.changes.insert(key.into(), Some(value.into()));
        Ok(())
    }

    pub(super) fn remove(&self, staged: &mut StagedState, key: &str) {
        if let (Some(before), _) = self.cost_before(staged, key) {
            staged.growth -= before as isize;
            staged.changes.insert(key.into(), None);
        }
    }

    /// What the entry under `key` costs as the call sees it, if there is one; and what all did
    /// before the call.
    fn cost_before(&self, staged: &StagedState, key: &str) -> (Option<usize>, usize) {
        let contents = self.contents.lock();
        let before = match staged.changes.get(key) {
            Some(change) => change.as_ref(),
            None => contents.entries.get(key),
        };
        (before.map(|value| cost(key, value)), contents.bytes)
    }

    /// The next keys that begin with `prefix`, in order, behind `after`. The keys come without the
    /// prefix. Whether there are more.
    pub(super) fn list(
        &self,
        staged: &StagedState,
        prefix: &str,
        after: Option<&str>,
    ) -> (Vec<String>, bool) {
        let contents = self.contents.lock();
        let behind;
        let from = match after {
            Some(after) => {
                behind = format!("{prefix}{after}");
                Bound::Excluded(behind.as_str())
            }
            None => Bound::Included(prefix),
        };
        let range = (from, Bound::Unbounded);
        let mut merged = Merged {
            entries: contents.entries.range::<str, _>(range).peekable(),
            changes: staged.changes.range::<str, _>(range).peekable(),
        };
        let mut keys = Vec::new();
        let mut bytes = 0;
        while let Some(key) = merged.next().and_then(|key| key.strip_prefix(prefix)) {
            if keys.len() == PAGE_KEYS || bytes + key.len() > PAGE_BYTES {
                return (keys, true);
            }
            bytes += key.len();
            keys.push(key.to_owned());
        }
        (keys, false)
    }

    /// The call about these events has ended well: what it has written is in force, and will be kept. Until it
    /// is, the events are not finished.
    pub(super) fn commit(self: &Arc<Self>, staged: StagedState, events: &[Event]) {
        let receipts = || events.iter().filter_map(|event| event.receipt.as_ref());
        if staged.changes.is_empty() && receipts().next().is_none() {
            return;
        }
        let mut contents = self.contents.lock();
        // Of what is shared it is kept, too, up to where its events were handled.
        let changes = !staged.changes.is_empty() || matches!(self.sink, Sink::Site(_));
        for (key, value) in staged.changes {
            contents.apply(key, value);
        }
        contents.version += u64::from(changes);
        contents.hold(receipts());
        if contents.closed || !changes {
            return;
        }
        contents.bound_pending();
        let enlist = !std::mem::replace(&mut contents.queued, true);
        drop(contents);
        if enlist {
            self.enlist();
        }
    }

    fn enlist(self: &Arc<Self>) {
        match &self.sink {
            Sink::Store(writer) => writer.enlist(self.clone()),
            Sink::Site(changed) => changed.notify_one(),
        }
    }

    /// Waits until all is on disk.
    pub(super) fn wait_until_synced(&self, deadline: Instant) {
        let mut contents = self.contents.lock();
        while contents.durable < contents.version && !contents.closed {
            if self.written.wait_until(&mut contents, deadline).timed_out() {
                return;
            }
        }
    }

    /// Nothing of this app is written from here on, and nothing is being written when this returns.
    pub(super) fn close(&self) {
        let mut contents = self.contents.lock();
        contents.closed = true;
        contents.pending = Pending::default();
        while contents.writing {
            self.written.wait(&mut contents);
        }
    }

    /// What is committed from here on goes nowhere.
    pub(super) fn seal(&self) {
        self.contents.lock().closed = true;
    }

    /// [`AppState::close`], whoever may want to open it again meanwhile.
    pub(super) fn retire(&self) {
        self.contents.lock().retired = true;
        self.close();
    }

    /// Takes [`AppState::retire`] back.
    pub(super) fn bring_back(self: &Arc<Self>) {
        self.contents.lock().retired = false;
        self.reopen();
    }

    /// Takes [`AppState::close`] back.
    pub(super) fn reopen(self: &Arc<Self>) {
        let mut contents = self.contents.lock();
        if contents.retired {
            return;
        }
        contents.closed = false;
        // What could not be read must not be overwritten.
        if contents.unreadable.is_some() {
            return;
        }
        contents.pending.replace = true;
        contents.version += 1;
        let enlist = !std::mem::replace(&mut contents.queued, true);
        drop(contents);
        if enlist {
            self.enlist();
        }
    }

    fn begin_writing(&self) -> Option<Written> {
        let mut contents = self.contents.lock();
        contents.queued = false;
        if contents.closed {
            return None;
        }
        contents.writing = true;
        let pending = std::mem::take(&mut contents.pending);
        Some(Written {
            version: contents.version,
            replace: pending.replace.then(|| contents.entries.clone()),
            changes: pending.changes,
            receipts: std::mem::take(&mut contents.receipts),
        })
    }

    fn end_writing(self: &Arc<Self>, mut written: Written, is_durable: bool) {
        let mut contents = self.contents.lock();
        contents.writing = false;
        let mut enlist = false;
        if is_durable {
            contents.durable = written.version;
            if written.version == contents.version {
                // Some may have come while it was being written.
                written.receipts.append(&mut contents.receipts);
            }
        } else {
            contents.receipts.append(&mut written.receipts);
        }
        if !is_durable && !contents.closed {
            contents.pending.add_earlier(&mut written);
            contents.bound_pending();
            enlist = !std::mem::replace(&mut contents.queued, true);
        }
        drop(contents);
        self.written.notify_all();
        // Their events are finished.
        drop(written);
        if enlist && let Sink::Store(writer) = &self.sink {
            writer.queue.lock().apps.push(self.clone());
        }
    }
}

impl SharedState for Arc<AppState> {
    fn take(&self, all: bool) -> Option<Changes> {
        {
            let mut contents = self.contents.lock();
            if contents.writing || !(contents.queued || all) {
                return None;
            }
            contents.pending.replace |= all;
        }
        let written = self.begin_writing()?;
        Some(Changes {
            replaces: written.replace.is_some(),
            entries: match written.replace {
                Some(all) => all
                    .into_iter()
                    .map(|(key, value)| (key, Some(value)))
                    .collect(),
                None => written.changes,
            },
            receipts: written.receipts,
            version: written.version,
        })
    }

    fn written(&self, changes: Changes, safe: bool) {
        let written = Written {
            version: changes.version,
            changes: changes.entries,
            replace: None,
            receipts: changes.receipts,
        };
        self.end_writing(written, safe);
    }
}

impl Contents {
    fn stored_version(&self) -> Option<u32> {
        let bytes = self.entries.get(VERSION_KEY)?;
        // Nobody but the host writes it, four bytes long; anything else is read as no known version.
        Some(<[u8; 4]>::try_from(&**bytes).map_or(u32::MAX, u32::from_le_bytes))
    }

    /// The events with these receipts are finished when all that has been changed so far is kept.
    fn hold<'a>(&mut self, receipts: impl Iterator<Item = &'a Arc<dyn Receipt>>) {
        if self.durable == self.version {
            return;
        }
        for receipt in receipts {
            if self.receipts.len() >= MAX_RECEIPTS {
                receipt.abandon();
            } else if !self
                .receipts
                .last()
                .is_some_and(|last| Arc::ptr_eq(last, receipt))
            {
                self.receipts.push(receipt.clone());
            }
        }
    }

    fn apply(&mut self, key: Key, value: Option<Value>) {
        let before = match &value {
            Some(value) => {
                self.bytes += cost(&key, value);
                self.entries.insert(key.clone(), value.clone())
            }
            None => self.entries.remove(&key),
        };
        if let Some(before) = before {
            self.bytes -= cost(&key, &before);
        }
        if !self.closed && !self.pending.replace {
            self.pending.changes.insert(key, value);
        }
    }

    /// Keeps what waits from growing beyond what there is.
    fn bound_pending(&mut self) {
        let pending = &mut self.pending;
        if pending.changes.len() > self.entries.len() + PENDING_SLACK {
            pending.replace = true;
        }
        if pending.replace {
            pending.changes.clear();
        }
    }
}

impl Pending {
    /// Adds what could not be written, where nothing else is wanted since.
    fn add_earlier(&mut self, earlier: &mut Written) {
        self.replace |= earlier.replace.is_some();
        for (key, value) in std::mem::take(&mut earlier.changes) {
            self.changes.entry(key).or_insert(value);
        }
    }
}

/// On its way to the store.
struct Written {
    version: u64,
    changes: BTreeMap<Key, Option<Value>>,
    replace: Option<Kept>,
    receipts: Vec<Arc<dyn Receipt>>,
}

impl Writer {
    fn enlist(&self, app: Arc<AppState>) {
        let mut queue = self.queue.lock();
        if queue.closed {
            return;
        }
        queue.apps.push(app);
        if queue.since.is_none() {
            queue.since = Some(Instant::now());
            drop(queue);
            self.work.notify_one();
        }
    }

    fn write_until_closed(&self) {
        let mut failing = false;
        while let Some((apps, last)) = self.next() {
            let taken: Vec<_> = apps
                .into_iter()
                .filter_map(|app| app.begin_writing().map(|written| (app, written)))
                .collect();
            let result = self.write(&taken);
            let is_durable = result.is_ok();
            for (app, written) in taken {
                app.end_writing(written, is_durable);
            }
            match result {
                Ok(()) => {
                    self.commits.fetch_add(1, Ordering::Relaxed);
                    if std::mem::take(&mut failing) {
                        tracing::info!("the apps' state is written again");
                    }
                }
                Err(error) => {
                    self.failures.fetch_add(1, Ordering::Relaxed);
                    if last {
                        tracing::error!(%error, "the last changes of the apps' state are lost");
                    } else if !std::mem::replace(&mut failing, true) {
                        tracing::error!(%error, "the apps' state can't be written; trying again every second");
                    }
                    let mut queue = self.queue.lock();
                    queue.retry_at = Some(Instant::now() + RETRY);
                    queue.since = Some(Instant::now());
                    if last {
                        queue.apps.clear();
                    }
                }
            }
        }
        self.queue.lock().apps.clear();
    }

    /// Waits until it is time to write for some apps; whether they are the last ones. None: closed,
    /// and all is written.
    fn next(&self) -> Option<(Vec<Arc<AppState>>, bool)> {
        let mut queue = self.queue.lock();
        loop {
            if queue.apps.is_empty() {
                queue.since = None;
                queue.retry_at = None;
                if queue.closed {
                    return None;
                }
                self.work.wait(&mut queue);
                continue;
            }
            let due = match (queue.closed, queue.retry_at, queue.since) {
                (true, ..) => break,
                (false, Some(retry_at), _) => retry_at,
                (false, None, since) => since.map_or_else(Instant::now, |since| since + GATHER),
            };
            if due <= Instant::now() {
                break;
            }
            self.work.wait_until(&mut queue, due);
        }
        queue.since = None;
        queue.retry_at = None;
        Some((std::mem::take(&mut queue.apps), queue.closed))
    }

    /// One transaction.
    fn write(&self, apps: &[(Arc<AppState>, Written)]) -> Result<(), StoreError> {
        if apps.is_empty() {
            return Ok(());
        }
        let mut txn = self.store.write_app_state()?;
        for (state, written) in apps {
            let app = &state.app;
            if let Some(entries) = &written.replace {
                txn.clear(app)?;
                for (key, value) in entries {
                    txn.put(app, key, value)?;
                }
            }
            for (key, value) in &written.changes {
                match value {
                    Some(value) => txn.put(app, key, value)?,
                    None => txn.remove(app, key)?,
                }
            }
        }
        txn.commit()
    }
}

/// The keys of entries with changes over them, in order.
struct Merged<'a> {
    entries: Peekable<btree_map::Range<'a, Key, Value>>,
    changes: Peekable<btree_map::Range<'a, Key, Option<Value>>>,
}

impl<'a> Iterator for Merged<'a> {
    type Item = &'a str;

    fn next(&mut self) -> Option<&'a str> {
        loop {
            let changed = match (self.entries.peek(), self.changes.peek()) {
                (Some((entry, _)), Some((change, _))) => {
                    let changed = change <= entry;
                    if entry == change {
                        self.entries.next();
                    }
                    changed
                }
                (_, change) => change.is_some(),
            };
            if !changed {
                return self.entries.next().map(|(key, _)| &**key);
            }
            if let Some((key, Some(_))) = self.changes.next() {
                return Some(key);
            }
        }
    }
}

fn cost(key: &str, value: &[u8]) -> usize {
    key.len() + value.len() + ENTRY_BYTES
}

fn cost_of_all(entries: &Kept) -> usize {
    entries.iter().map(|(key, value)| cost(key, value)).sum()
}

/// What the store has, as it is in memory.
pub(super) fn kept(stored: Vec<(String, Vec<u8>)>) -> Kept {
    let entries = stored.into_iter();
    entries
        .map(|(key, value)| (key.into(), value.into()))
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tempfile::TempDir;

    use super::*;
    use crate::event::Topic;
    use crate::store::StoreConfig;

    const ROOM: usize = 1 << 20;

    struct Kept {
        _folder: TempDir,
        store: Store,
        kv: KvStore,
        state: Arc<AppState>,
    }

    fn kept_in(map_bytes: usize) -> Kept {
        let folder = tempfile::tempdir().unwrap();
        let config = StoreConfig {
            path: folder.path().join("store"),
            map_bytes,
        };
        let store = Store::open(&config).unwrap();
        let kv = KvStore::start(store.clone()).unwrap();
        Kept {
            state: kv.open(&"app".into()),
            _folder: folder,
            store,
            kv,
        }
    }

    fn kept() -> Kept {
        kept_in(16 << 20)
    }

    impl Kept {
        /// One call: `None` removes.
        fn call(&self, changes: &[(&str, Option<&[u8]>)]) {
            self.call_about(&[], changes);
        }

        /// One about these events.
        fn call_about(&self, events: &[Event], changes: &[(&str, Option<&[u8]>)]) {
            let mut staged = StagedState::default();
            for (key, value) in changes {
                match value {
                    Some(value) => self.state.set(&mut staged, ROOM, key, value).unwrap(),
                    None => self.state.remove(&mut staged, key),
                }
            }
            self.state.commit(staged, events);
        }

        fn until(&self, what: &str, condition: impl Fn(&Kept) -> bool) {
            let deadline = Instant::now() + Duration::from_secs(30);
            while !condition(self) {
                assert!(
                    Instant::now() < deadline,
                    "{what}: {:?}",
                    self.state.usage()
                );
                thread::sleep(Duration::from_millis(1));
            }
        }

        fn until_synced(&self) {
            self.until("synced", |kept| kept.state.usage().synced);
        }

        fn stored(&self) -> Vec<(String, Vec<u8>)> {
            self.store.app_state("app").unwrap()
        }
    }

    fn all(state: &AppState, staged: &StagedState, prefix: &str) -> Vec<String> {
        let mut all = Vec::new();
        loop {
            let after = all.last().cloned();
            let (keys, more) = state.list(staged, prefix, after.as_deref());
            all.extend(keys);
            if !more {
                return all;
            }
        }
    }

    #[test]
    fn what_a_call_has_staged_is_seen_by_nobody_else_until_it_is_committed() {
        let kept = kept();
        kept.call(&[("b\0old", Some(b"1"))]);
        let mut staged = StagedState::default();
        kept.state.set(&mut staged, ROOM, "b\0new", b"2").unwrap();
        kept.state.remove(&mut staged, "b\0old");
        assert_eq!(
            kept.state.get(&staged, "b\0new").as_deref(),
            Some(&b"2"[..])
        );
        assert_eq!(kept.state.get(&staged, "b\0old"), None);
        assert_eq!(all(&kept.state, &staged, "b\0"), ["new"]);
        let nothing = StagedState::default();
        assert_eq!(kept.state.get(&nothing, "b\0new"), None);
        assert_eq!(all(&kept.state, &nothing, "b\0"), ["old"]);
        drop(staged);
        kept.until_synced();
        assert_eq!(kept.stored(), [("b\0old".to_owned(), b"1".to_vec())]);
    }

    #[test]
    fn the_limit_counts_what_is_there_and_what_is_staged() {
        let kept = kept();
        let most = 3 * cost("b\0k1", b"12345678");
        let mut staged = StagedState::default();
        for key in ["b\0k1", "b\0k2", "b\0k3"] {
            kept.state.set(&mut staged, most, key, b"12345678").unwrap();
        }
        assert_eq!(
            kept.state.set(&mut staged, most, "b\0k4", b""),
            Err(TooMuch)
        );
        kept.state.commit(staged, &[]);
        assert_eq!(kept.state.usage().bytes, most);
        let mut staged = StagedState::default();
        assert_eq!(
            kept.state.set(&mut staged, most, "b\0k1", b"123456789"),
            Err(TooMuch)
        );
        kept.state.set(&mut staged, 10, "b\0k1", b"1").unwrap();
        kept.state.remove(&mut staged, "b\0k2");
        kept.state.set(&mut staged, most, "b\0k4", b"1").unwrap();
        kept.state.commit(staged, &[]);
        let usage = kept.state.usage();
        assert_eq!((usage.keys, usage.bytes), (3, most - 14));
    }

    #[test]
    fn buckets_are_those_with_something_in_them() {
        let kept = kept();
        kept.call(&[
            ("a\0k", Some(b"")),
            ("a\0l", Some(b"")),
            ("a-b\0k", Some(b"")),
            ("b\0k", Some(b"")),
        ]);
        assert_eq!(kept.state.buckets(), ["a", "a-b", "b"]);
        kept.call(&[("b\0k", None)]);
        assert_eq!(kept.state.buckets(), ["a", "a-b"]);
        let nothing = StagedState::default();
        assert_eq!(all(&kept.state, &nothing, "a\0"), ["k", "l"]);
    }

    #[test]
    fn a_full_store_is_tried_again_until_there_is_room() {
        let kept = kept_in(1 << 20);
        let big = vec![7; 60_000];
        for name in 0..16 {
            kept.call(&[(&format!("b\0{name}"), Some(&big))]);
        }
        kept.until("a failure", |kept| kept.kv.commits_and_failures().1 > 0);
        assert!(!kept.state.usage().synced);
        // The whole state is there to be read meanwhile.
        let staged = StagedState::default();
        assert_eq!(all(&kept.state, &staged, "b\0").len(), 16);
        for name in 4..16 {
            kept.call(&[(&format!("b\0{name}"), None)]);
        }
        kept.until_synced();
        assert_eq!(kept.stored().len(), 4);
    }

    #[test]
    fn keys_that_come_and_go_do_not_pile_up_while_nothing_can_be_written() {
        let kept = kept();
        {
            let _held = kept.store.write_app_state().unwrap();
            for number in 0..5 * PENDING_SLACK {
                let key = format!("b\0{number}");
                kept.call(&[(&key, Some(b"")), ("b\0last", Some(key.as_bytes()))]);
                kept.call(&[(&key, None)]);
                let contents = kept.state.contents.lock();
                assert!(contents.pending.changes.len() <= 2 + PENDING_SLACK);
            }
        }
        kept.until_synced();
        let last = format!("b\0{}", 5 * PENDING_SLACK - 1);
        assert_eq!(kept.stored(), [("b\0last".to_owned(), last.into_bytes())]);
    }

    #[test]
    fn what_is_closed_is_not_written_and_all_of_it_is_when_it_is_opened_again() {
        let kept = kept();
        kept.call(&[("b\0k", Some(b"1"))]);
        kept.state.close();
        kept.call(&[("b\0l", Some(b"2"))]);
        let mut txn = kept.store.write_app_state().unwrap();
        txn.clear("app").unwrap();
        txn.commit().unwrap();
        kept.state.reopen();
        kept.until_synced();
        assert_eq!(kept.stored().len(), 2);
    }

    #[test]
    fn closing_the_store_writes_what_waits() {
        let kept = kept();
        kept.call(&[("b\0k", Some(b"1"))]);
        kept.kv.close();
        assert_eq!(kept.stored().len(), 1);
        let reopened = kept.kv.open(&"app".into());
        assert_eq!(reopened.usage().keys, 1);
    }

    /// Says at its end how many keys were on disk then.
    struct Told(Store, Arc<Mutex<Option<usize>>>);

    impl std::fmt::Debug for Told {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("Told")
        }
    }

    impl Receipt for Told {
        fn abandon(&self) {}
    }

    impl Drop for Told {
        fn drop(&mut self) {
            *self.1.lock() = Some(self.0.app_state("app").unwrap().len());
        }
    }

    fn event(receipt: Arc<dyn Receipt>) -> Event {
        Event {
            receipt: Some(receipt),
            ..Event::new(Topic::new("t").unwrap(), "".into(), Instant::now())
        }
    }

    #[test]
    fn an_event_is_finished_when_what_its_call_has_written_is_on_disk() {
        let kept = kept();
        for call in 1..=3 {
            let ended = Arc::<Mutex<Option<usize>>>::default();
            let told: Arc<dyn Receipt> = Arc::new(Told(kept.store.clone(), ended.clone()));
            kept.call_about(
                &[event(told.clone()), event(told)],
                &[(&format!("b\0{call}"), Some(b""))],
            );
            kept.until("the end", |_| ended.lock().is_some());
            assert_eq!(*ended.lock(), Some(call));
        }
        // One that has written nothing waits for nothing.
        let ended = Arc::<Mutex<Option<usize>>>::default();
        let told: Arc<dyn Receipt> = Arc::new(Told(kept.store.clone(), ended.clone()));
        kept.until_synced();
        kept.call_about(&[event(told)], &[]);
        assert_eq!(*ended.lock(), Some(3));
    }

    #[derive(Clone, Debug)]
    enum Step {
        Set(u8, usize),
        Remove(u8),
        End { well: bool },
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            3 => (0..20u8, 0..40usize).prop_map(|(key, len)| Step::Set(key, len)),
            2 => (0..20u8).prop_map(Step::Remove),
            1 => any::<bool>().prop_map(|well| Step::End { well }),
        ];
        prop::collection::vec(step, 0..80)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        /// A map that is copied at the beginning of each call, and put back when it fails.
        #[test]
        fn state_is_like_a_map_that_only_calls_which_end_well_change(steps in steps()) {
            let kept = kept();
            let most = 12 * (64 + 4 + 20);
            let mut model: BTreeMap<String, Vec<u8>> = BTreeMap::new();
            let mut before = model.clone();
            let mut staged = StagedState::default();
            for step in steps {
                match step {
                    Step::Set(key, len) => {
                        let key = format!("b\0{key:02}");
                        let mut after = model.clone();
                        after.insert(key.clone(), vec![1; len]);
                        let sum = |map: &BTreeMap<String, Vec<u8>>| map.iter().map(|(k, v)| cost(k, v)).sum::<usize>();
                        let fits = sum(&after) <= most || sum(&after) <= sum(&model);
                        let set = kept.state.set(&mut staged, most, &key, &vec![1; len]);
                        prop_assert_eq!(set.is_ok(), fits);
                        if fits { model = after; }
                    }
                    Step::Remove(key) => {
                        let key = format!("b\0{key:02}");
                        kept.state.remove(&mut staged, &key);
                        model.remove(&key);
                    }
                    Step::End { well } => {
                        let staged = std::mem::take(&mut staged);
                        if well {
                            kept.state.commit(staged, &[]);
                            before = model.clone();
                        } else {
                            model = before.clone();
                        }
                    }
                }
                let keys: Vec<_> = model.keys().map(|key| key[2..].to_owned()).collect();
                prop_assert_eq!(all(&kept.state, &staged, "b\0"), keys);
                for key in 0..20 {
                    let key = format!("b\0{key:02}");
                    let value = kept.state.get(&staged, &key);
                    prop_assert_eq!(value.as_deref(), model.get(&key).map(|v| &v[..]));
                }
            }
            let usage = kept.state.usage();
            prop_assert_eq!(usage.keys, before.len());
            prop_assert_eq!(usage.bytes, before.iter().map(|(k, v)| cost(k, v)).sum::<usize>());
            kept.kv.close();
            let stored: BTreeMap<_, _> = kept.stored().into_iter().collect();
            prop_assert_eq!(stored, before);
        }
    }
}
