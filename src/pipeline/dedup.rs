//! Which events have come before: a window over the last keys, bounded in time and in number.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hashbrown::HashTable;
use parking_lot::Mutex;

use crate::event::Topic;

/// Keys are spread over so many parts, each with a lock of its own. A power of two.
const SHARDS: usize = 16;

/// What tells an event from others: half of a BLAKE3 hash, so that two events with one key are nothing
/// to reckon with, however they are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DedupKey(pub [u8; 16]);

impl DedupKey {
    /// Of an event that has nothing but its content to tell it by.
    pub fn of_content(topic: &Topic, payload: &[u8]) -> DedupKey {
        DedupKey::of(b"content", topic, &[payload])
    }

    /// Of an event with an id that is its own among all of its topic.
    pub fn of_id(topic: &Topic, id: &[u8]) -> DedupKey {
        DedupKey::of(b"id", topic, &[id])
    }

    /// Of an event with a number that is its own among those that one client sends.
    pub fn of_number(topic: &Topic, client: &str, number: u64) -> DedupKey {
        DedupKey::of(
            b"number",
            topic,
            &[&number.to_le_bytes(), client.as_bytes()],
        )
    }

    fn of(kind: &[u8], topic: &Topic, parts: &[&[u8]]) -> DedupKey {
        let topic = topic.as_bytes();
        let mut hasher = blake3::Hasher::new();
        hasher.update(kind);
        // So that no topic runs into what follows it.
        hasher.update(&(topic.len() as u32).to_le_bytes());
        hasher.update(topic);
        for part in parts {
            hasher.update(part);
        }
        let hash = hasher.finalize();
        DedupKey(*hash.as_bytes().first_chunk().expect("32 bytes"))
    }

    fn hash(self) -> u64 {
        u64::from_le_bytes(*self.0.first_chunk().expect("16 bytes"))
    }

    fn shard(self) -> usize {
        usize::from(self.0[15]) % SHARDS
    }
}

/// What is known of a key when an event with it comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Claim {
    /// It has not come within the window.
    New,
    /// An event with it is on its way, but may yet be lost.
    InFlight,
    /// An event with it was taken in.
    Duplicate,
}

/// The keys of the events that came last.
#[derive(Debug)]
pub struct DedupWindow {
    shards: [Mutex<Shard>; SHARDS],
    started: Instant,
}

#[derive(Debug)]
struct Shard {
    /// In the order in which they came.
    entries: VecDeque<Entry>,
    /// The sequence of the first of them, modulo 2³².
    first: u32,
    /// Sequences of the entries that count.
    found: HashTable<u32>,
    max_keys: usize,
    window_s: u32,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    key: DedupKey,
    /// Seconds after a window before `started`.
    at: u32,
    state: EntryState,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum EntryState {
    InFlight,
    Kept,
    /// It does not count any more.
    Forgotten,
}

impl DedupWindow {
    /// A key counts for `window`, and no more than `max_keys` do. A key takes up to 40 bytes.
    pub fn new(window: Duration, max_keys: usize, now: Instant) -> DedupWindow {
        let shard = || {
            Mutex::new(Shard {
                entries: VecDeque::new(),
                first: 0,
                found: HashTable::new(),
                max_keys: max_keys.div_ceil(SHARDS),
                window_s: u32::try_from(window.as_secs()).unwrap_or(u32::MAX),
            })
        };
        DedupWindow {
            shards: std::array::from_fn(|_| shard()),
            started: now,
        }
    }

    /// Notes that an event with this key has come, in one step with the look whether one has before.
    /// `safe`: that it can't be lost any more. Else [`DedupWindow::keep`] or [`DedupWindow::forget`] is to
    /// follow.
    pub fn claim(&self, key: DedupKey, safe: bool, now: Instant) -> Claim {
        let elapsed = now.saturating_duration_since(self.started).as_secs() as u32;
        let mut shard = self.shard(key).lock();
        // The clock begins a window before the start, so that keys of an earlier run have a place on it.
        let at = shard.window_s.saturating_add(elapsed);
        shard.claim(key, safe, at)
    }

    /// The event with this key can't be lost any more.
    pub fn keep(&self, key: DedupKey) {
        self.shard(key).lock().set(key, EntryState::Kept);
    }

    /// The event with this key was lost: the next one is new.
    pub fn forget(&self, key: DedupKey) {
        self.shard(key).lock().set(key, EntryState::Forgotten);
    }

    /// Takes over a key of an earlier run, `age` after it came. To be called in the order of their ages,
    /// oldest first, before anything is claimed: behind one that is out of order, the others count for as long.
    pub fn restore(&self, key: DedupKey, age: Duration) {
        let mut shard = self.shard(key).lock();
        let age = u32::try_from(age.as_secs()).unwrap_or(u32::MAX);
        if age < shard.window_s {
            let at = shard.window_s - age;
            shard.claim(key, true, at);
        }
    }

    /// Keys that count.
    pub fn known(&self) -> usize {
        self.shards
            .iter()
            .map(|shard| shard.lock().found.len())
            .sum()
    }

    fn shard(&self, key: DedupKey) -> &Mutex<Shard> {
        &self.shards[key.shard()]
    }
}

/// Keys of events that may yet be lost. When it is dropped they were.
#[derive(Debug)]
pub struct Claims {
    window: Arc<DedupWindow>,
    keys: Vec<DedupKey>,
}

impl Claims {
    pub fn new(window: Arc<DedupWindow>) -> Claims {
        Claims {
            window,
            keys: Vec::new(),
        }
    }

    pub fn push(&mut self, key: DedupKey) {
        self.keys.push(key);
    }

    pub fn contains(&self, key: DedupKey) -> bool {
        self.keys.contains(&key)
    }

    /// Their events can't be lost any more.
    pub fn keep(mut self) {
        for key in self.keys.drain(..) {
            self.window.keep(key);
        }
    }
}

impl Drop for Claims {
    fn drop(&mut self) {
        for key in self.keys.drain(..) {
            self.window.forget(key);
        }
    }
}

impl Shard {
    fn claim(&mut self, key: DedupKey, safe: bool, now: u32) -> Claim {
        while let Some(oldest) = self.entries.front()
            && now.saturating_sub(oldest.at) >= self.window_s
        {
            self.drop_oldest();
        }
        if let Some(entry) = self.find(key) {
            return match entry.state {
                EntryState::Kept => Claim::Duplicate,
                _ => Claim::InFlight,
            };
        }
        if self.entries.len() >= self.max_keys {
            self.drop_oldest();
        }
        if self.entries.len() == self.entries.capacity() {
            // Twice as much as ever, but never more than there can be.
            let most = self.max_keys - self.entries.len();
            self.entries
                .reserve_exact(self.entries.len().clamp(64, most.max(64)));
        }
        let sequence = self.first.wrapping_add(self.entries.len() as u32);
        self.entries.push_back(Entry {
            key,
            at: now,
            state: match safe {
                true => EntryState::Kept,
                false => EntryState::InFlight,
            },
        });
        let (entries, first) = (&self.entries, self.first);
        self.found.insert_unique(key.hash(), sequence, |sequence| {
            entries[sequence.wrapping_sub(first) as usize].key.hash()
        });
        Claim::New
    }

    fn find(&mut self, key: DedupKey) -> Option<&mut Entry> {
        let (entries, first) = (&self.entries, self.first);
        let at = |sequence: &u32| sequence.wrapping_sub(first) as usize;
        let sequence = self
            .found
            .find(key.hash(), |sequence| entries[at(sequence)].key == key)?;
        let index = at(sequence);
        Some(&mut self.entries[index])
    }

    fn set(&mut self, key: DedupKey, state: EntryState) {
        if let Some(entry) = self.find(key) {
            entry.state = state;
            if state == EntryState::Forgotten {
                self.unlist(key);
            }
        }
    }

    fn unlist(&mut self, key: DedupKey) {
        let (entries, first) = (&self.entries, self.first);
        let is_it = |sequence: &u32| entries[sequence.wrapping_sub(first) as usize].key == key;
        if let Ok(found) = self.found.find_entry(key.hash(), is_it) {
            found.remove();
        }
    }

    fn drop_oldest(&mut self) {
        if let Some(oldest) = self.entries.front().copied() {
            if oldest.state != EntryState::Forgotten {
                self.unlist(oldest.key);
            }
            self.entries.pop_front();
            self.first = self.first.wrapping_add(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const WINDOW: Duration = Duration::from_secs(60);

    fn key(number: u64) -> DedupKey {
        let topic = Topic::new("t").unwrap();
        DedupKey::of_id(&topic, &number.to_le_bytes())
    }

    /// A key of the first shard, so that bounds can be told exactly.
    fn in_one_shard(count: usize) -> Vec<DedupKey> {
        let keys = (0..).map(key).filter(|key| key.shard() == 0);
        keys.take(count).collect()
    }

    #[test]
    fn a_key_counts_for_as_long_as_the_window_lasts() {
        let start = Instant::now();
        let window = DedupWindow::new(WINDOW, 1024, start);
        assert_eq!(window.claim(key(1), true, start), Claim::New);
        let before_its_end = start + WINDOW - Duration::from_secs(1);
        assert_eq!(window.claim(key(1), true, before_its_end), Claim::Duplicate);
        assert_eq!(window.claim(key(1), true, start + WINDOW), Claim::New);
    }

    #[test]
    fn beyond_its_bound_the_oldest_key_goes() {
        let now = Instant::now();
        let window = DedupWindow::new(WINDOW, 4 * SHARDS, now);
        let keys = in_one_shard(5);
        for key in &keys {
            assert_eq!(window.claim(*key, true, now), Claim::New);
        }
        assert_eq!(window.known(), 4);
        assert_eq!(window.claim(keys[4], true, now), Claim::Duplicate);
        assert_eq!(window.claim(keys[0], true, now), Claim::New);
    }

    #[test]
    fn what_may_yet_be_lost_is_no_duplicate() {
        let now = Instant::now();
        let window = DedupWindow::new(WINDOW, 1024, now);
        assert_eq!(window.claim(key(1), false, now), Claim::New);
        assert_eq!(window.claim(key(1), false, now), Claim::InFlight);
        window.keep(key(1));
        assert_eq!(window.claim(key(1), false, now), Claim::Duplicate);

        assert_eq!(window.claim(key(2), false, now), Claim::New);
        window.forget(key(2));
        assert_eq!(window.claim(key(2), false, now), Claim::New);
    }

    #[test]
    fn keys_of_an_earlier_run_count_unless_they_are_too_old() {
        let now = Instant::now();
        let window = DedupWindow::new(WINDOW, 1024, now);
        window.restore(key(1), WINDOW);
        window.restore(key(2), Duration::from_secs(1));
        assert_eq!(window.claim(key(1), true, now), Claim::New);
        assert_eq!(window.claim(key(2), true, now), Claim::Duplicate);
        let later = now + WINDOW - Duration::from_secs(1);
        assert_eq!(
            window.claim(key(2), true, later),
            Claim::New,
            "not a second longer than in that run"
        );
    }

    #[test]
    fn topic_id_content_and_client_are_told_apart() {
        let (a, ab) = (Topic::new("a").unwrap(), Topic::new("ab").unwrap());
        let keys = [
            DedupKey::of_content(&a, b"bc"),
            DedupKey::of_content(&ab, b"c"),
            DedupKey::of_id(&a, b"bc"),
            DedupKey::of_number(&a, "b", 1),
            DedupKey::of_number(&a, "c", 1),
            DedupKey::of_number(&a, "b", 2),
        ];
        for (index, key) in keys.iter().enumerate() {
            assert!(!keys[index + 1..].contains(key), "{index}");
        }
    }

    proptest! {
        /// The window says what a plain list of all that came says.
        #[test]
        fn the_window_agrees_with_a_list(steps in prop::collection::vec((0..12u64, 0..3u8, 0..30u64), 0..200)) {
            let start = Instant::now();
            let keys = in_one_shard(12);
            let window = DedupWindow::new(WINDOW, 5 * SHARDS, start);
            let mut list: Vec<(u64, u64, EntryState)> = Vec::new();
            let mut seconds = 0;
            for (number, action, pause) in steps {
                seconds += pause;
                let now = start + Duration::from_secs(seconds);
                let key = keys[number as usize];
                let known = list.iter().rposition(|(n, _, state)| *n == number && *state != EntryState::Forgotten);
                match (action, known) {
                    (0, _) => {
                        while list.first().is_some_and(|(_, at, _)| seconds - at >= WINDOW.as_secs()) {
                            list.remove(0);
                        }
                        let known = list.iter().find(|(n, _, state)| *n == number && *state != EntryState::Forgotten);
                        let expected = match known {
                            None => Claim::New,
                            Some((.., EntryState::Kept)) => Claim::Duplicate,
                            Some(_) => Claim::InFlight,
                        };
                        prop_assert_eq!(window.claim(key, false, now), expected);
                        if expected == Claim::New {
                            if list.len() >= 5 {
                                list.remove(0);
                            }
                            list.push((number, seconds, EntryState::InFlight));
                        }
                    }
                    (1, Some(at)) => {
                        window.keep(key);
                        list[at].2 = EntryState::Kept;
                    }
                    (2, Some(at)) => {
                        window.forget(key);
                        list[at].2 = EntryState::Forgotten;
                    }
                    _ => {}
                }
            }
        }
    }
}
