//! Messages that a policy dropped: what they were, whose they were, and why.
//!
//! The last ones are kept, for an operator to look at. A policy that drops may drop a million a
//! second: each is counted, but only as many are kept as a meter lets through, so that a flood costs
//! its publisher next to nothing and the disk a bounded amount of writing. [`DeadLetters`] does not
//! know the disk: whoever writes asks it from time to time what has changed.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;

use crate::event::{Topic, TopicFilter, unix_time_ns};

/// Kept of a payload.
pub const MAX_PAYLOAD_BYTES: usize = 64 << 10;

/// Kept of all letters.
const MAX_LETTERS: usize = 1_000;
const MAX_BYTES: usize = 16 << 20;

/// What a letter takes beside its topic, payload and source.
const OVERHEAD: usize = 160;

/// Letters that are kept at once, and how often another one is in a flood that lasts.
const LETTERS: Meter = Meter {
    burst: Duration::from_secs(100),
    per_unit: Duration::from_millis(100),
};

/// The same for their bytes: 4 MiB at once and 16 KiB a second, 1.4 GB a day at the very most,
/// which a flash card stands.
const BYTES: Meter = Meter {
    burst: Duration::from_secs(256),
    per_unit: Duration::from_nanos(1_000_000_000 / (16 << 10)),
};

/// The policy that dropped a message. Stored by its place here: new ones come last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// Its subscriber's queue was full, in memory and on disk; or its app's; or its lane.
    QueueFull,
    /// It expired while it waited.
    Expired,
    /// It is larger than the packets that its subscriber takes.
    TooLarge,
    /// It waited for a session that ended.
    SessionEnded,
    /// Its publisher must not publish to the topic, or its subscriber must not have it any more.
    Denied,
    /// There were too many retained messages to retain it, too. It was passed on.
    RetainedFull,
    /// The app that it was for could not handle it, not even alone.
    AppFailed,
    /// It came for the batch lane while the realtime lane could not keep up.
    Shed,
    /// It came through too many apps, one after the other.
    Looped,
    /// No mapping that it was for could read it.
    Unreadable,
    /// The other side of a link does not take it.
    NotShipped,
}

impl Reason {
    const ALL: [Reason; 11] = [
        Reason::QueueFull,
        Reason::Expired,
        Reason::TooLarge,
        Reason::SessionEnded,
        Reason::Denied,
        Reason::RetainedFull,
        Reason::AppFailed,
        Reason::Shed,
        Reason::Looped,
        Reason::Unreadable,
        Reason::NotShipped,
    ];

    /// Whether the source of such a letter is the app that it was for.
    pub fn is_of_app(self) -> bool {
        matches!(self, Reason::AppFailed)
    }

    pub fn as_str(self) -> &'static str {
        match self {
            Reason::QueueFull => "queue_full",
            Reason::Expired => "expired",
            Reason::TooLarge => "too_large",
            Reason::SessionEnded => "session_ended",
            Reason::Denied => "denied",
            Reason::RetainedFull => "retained_full",
            Reason::AppFailed => "app_failed",
            Reason::Shed => "shed",
            Reason::Looped => "looped",
            Reason::Unreadable => "unreadable",
            Reason::NotShipped => "not_shipped",
        }
    }
}

/// One dropped message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeadLetter {
    /// When it was dropped: milliseconds since the Unix epoch.
    pub time_ms: u64,
    pub reason: Reason,
    /// The client or app that it was for, or that it came from if nobody else was to get it.
    pub source: String,
    pub topic: Topic,
    pub qos: u8,
    /// How long the payload was.
    pub payload_bytes: u64,
    /// The beginning of the payload.
    pub payload: Bytes,
    /// What the app said, or how it trapped and where.
    pub error: Option<String>,
}

impl DeadLetter {
    /// Dropped now.
    pub fn new(reason: Reason, source: &str, topic: &Topic, payload: &[u8], qos: u8) -> DeadLetter {
        let beginning = &payload[..payload.len().min(MAX_PAYLOAD_BYTES)];
        DeadLetter {
            time_ms: unix_time_ns() / 1_000_000,
            reason,
            source: source.to_owned(),
            topic: topic.clone(),
            qos,
            payload_bytes: payload.len() as u64,
            // Copied, so that it does not keep a connection's read buffer from being freed.
            payload: Bytes::copy_from_slice(beginning),
            error: None,
        }
    }

    pub fn info(&self, id: u64) -> DeadLetterInfo {
        let is_shown = |c: char| !c.is_control() || matches!(c, '\n' | '\r' | '\t');
        let text = std::str::from_utf8(&self.payload)
            .ok()
            .filter(|text| text.chars().all(is_shown));
        DeadLetterInfo {
            id,
            time_ms: self.time_ms,
            reason: self.reason,
            source: self.source.clone(),
            topic: self.topic.to_string(),
            qos: self.qos,
            payload_bytes: self.payload_bytes,
            payload: text.map(str::to_owned),
            payload_base64: text.is_none().then(|| STANDARD.encode(&self.payload)),
            error: self.error.clone(),
        }
    }

    /// Whether the end of its payload was not kept.
    pub fn is_cut(&self) -> bool {
        self.payload_bytes > self.payload.len() as u64
    }

    fn bytes(&self) -> usize {
        OVERHEAD
            + self.topic.as_str().len()
            + self.payload.len()
            + self.source.len()
            + self.error.as_ref().map_or(0, String::len)
    }
}

/// A [`DeadLetter`] as the admin API and `headgate dead-letters` show it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeadLetterInfo {
    /// It keeps it, and no other one gets it.
    pub id: u64,
    pub time_ms: u64,
    pub reason: Reason,
    pub source: String,
    pub topic: String,
    pub qos: u8,
    /// How long the payload was. What is shown of it ends after [`MAX_PAYLOAD_BYTES`].
    pub payload_bytes: u64,
    /// If it is text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub payload: Option<String>,
    /// If it is anything else.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub payload_base64: Option<String>,
    /// What the app said, or how it trapped and where.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// A rate with a burst, as the time up to which what has passed is paid for.
struct Meter {
    burst: Duration,
    per_unit: Duration,
}

impl Meter {
    /// When the next unit may pass.
    fn opens(&self, paid_until: Duration) -> Duration {
        paid_until.saturating_sub(self.burst)
    }

    /// The time up to which it is paid for after `units` more.
    fn pay(&self, paid_until: Duration, now: Duration, units: usize) -> Duration {
        let units = u32::try_from(units).unwrap_or(u32::MAX);
        paid_until.max(now) + self.per_unit.saturating_mul(units)
    }
}

/// The last dropped messages, shared by all who drop.
#[derive(Debug)]
pub struct DeadLetters {
    started: Instant,
    /// By reason, in the order of [`Reason::ALL`].
    counts: [AtomicU64; Reason::ALL.len()],
    /// Counted, but not kept.
    left_out: AtomicU64,
    retried: AtomicU64,
    /// None is kept before that: nanoseconds since `started`. Looked at without the lock.
    opens: AtomicU64,
    kept: Mutex<Kept>,
    /// Tells whoever publishes letters that there are new ones.
    added: Notify,
}

#[derive(Debug, Default)]
struct Kept {
    /// By id, which counts up.
    letters: BTreeMap<u64, Arc<DeadLetter>>,
    /// The id of the next one.
    next: u64,
    bytes: usize,
    /// What is on disk, as the first id and the next one,
    saved: (u64, u64),
    /// and which of them are there still and not here.
    taken_out: Vec<u64>,
    letters_paid_until: Duration,
    bytes_paid_until: Duration,
}

impl Kept {
    /// The first id, or the next if there is none.
    fn first(&self) -> u64 {
        self.letters
            .first_key_value()
            .map_or(self.next, |(id, _)| *id)
    }

    fn push(&mut self, id: u64, letter: DeadLetter) {
        self.next = id + 1;
        self.bytes += letter.bytes();
        self.letters.insert(id, Arc::new(letter));
        while self.letters.len() > MAX_LETTERS || self.bytes > MAX_BYTES {
            let Some((_, first)) = self.letters.pop_first() else {
                return;
            };
            self.bytes -= first.bytes();
        }
    }

    fn take_out(&mut self, id: u64) {
        if let Some(letter) = self.letters.remove(&id) {
            self.bytes -= letter.bytes();
            self.taken_out.push(id);
        }
    }
}

/// What the disk does not have yet.
#[derive(Clone, Debug)]
pub struct Unsaved {
    /// New ones, with their ids.
    pub letters: Vec<(u64, Arc<DeadLetter>)>,
    /// Those before this id are gone,
    pub first: u64,
    /// and so are these.
    pub taken_out: Vec<u64>,
    /// The id of the next one.
    pub next: u64,
}

/// What became of letters that were to be handed over again.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Retried {
    /// Handed over, and kept no longer.
    pub retried: u64,
    pub refused: Vec<Refused>,
}

/// A letter that could not be handed over again.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refused {
    pub id: u64,
    /// Why, and what to do.
    pub error: String,
}

impl DeadLetters {
    pub fn new(now: Instant) -> DeadLetters {
        DeadLetters {
            started: now,
            counts: Default::default(),
            left_out: AtomicU64::new(0),
            retried: AtomicU64::new(0),
            opens: AtomicU64::new(0),
            kept: Mutex::default(),
            added: Notify::new(),
        }
    }

    /// Counts a dropped message, and keeps what `letter` makes unless there are too many. Cheap
    /// enough for any path.
    pub fn add(&self, reason: Reason, now: Instant, letter: impl FnOnce() -> DeadLetter) {
        self.counts[reason as usize].fetch_add(1, Ordering::Relaxed);
        let now = now.saturating_duration_since(self.started);
        if (now.as_nanos() as u64) < self.opens.load(Ordering::Relaxed) {
            self.left_out.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let letter = letter();
        let mut kept = self.kept.lock();
        kept.letters_paid_until = LETTERS.pay(kept.letters_paid_until, now, 1);
        kept.bytes_paid_until = BYTES.pay(kept.bytes_paid_until, now, letter.bytes());
        let opens = LETTERS
            .opens(kept.letters_paid_until)
            .max(BYTES.opens(kept.bytes_paid_until));
        self.opens.store(opens.as_nanos() as u64, Ordering::Relaxed);
        let id = kept.next;
        kept.push(id, letter);
        drop(kept);
        self.added.notify_one();
    }

    /// Returns when one was kept since it last did. For one to wait.
    pub async fn added(&self) {
        self.added.notified().await;
    }

    /// The id that the next one gets.
    pub fn next_id(&self) -> u64 {
        self.kept.lock().next
    }

    /// Those from this id on.
    pub fn since(&self, id: u64) -> Vec<(u64, Arc<DeadLetter>)> {
        let kept = self.kept.lock();
        let letters = kept.letters.range(id..);
        letters.map(|(id, letter)| (*id, letter.clone())).collect()
    }

    /// Counts dropped messages of which nothing is kept.
    pub fn count(&self, reason: Reason, count: u64) {
        self.counts[reason as usize].fetch_add(count, Ordering::Relaxed);
        self.left_out.fetch_add(count, Ordering::Relaxed);
    }

    /// Takes over what an earlier run has saved, with ids that count up; `next` is the one that it would have
    /// given next, as far as that is known.
    pub fn restore(&self, letters: Vec<(u64, DeadLetter)>, next: u64) {
        let mut kept = self.kept.lock();
        for (id, letter) in letters {
            kept.push(id, letter);
        }
        kept.next = kept.next.max(next);
        kept.saved = (kept.first(), kept.next);
    }

    /// The last `last` of those whose topic matches, oldest first, with their ids.
    pub fn list(&self, filter: Option<&TopicFilter>, last: usize) -> Vec<(u64, Arc<DeadLetter>)> {
        let kept = self.kept.lock();
        let matching = kept.letters.iter().rev().filter(|(_, letter)| {
            filter.is_none_or(|filter| filter.matches(letter.topic.as_str()))
        });
        let matching = matching.map(|(id, letter)| (*id, letter.clone()));
        let mut found: Vec<_> = matching.take(last).collect();
        drop(kept);
        found.reverse();
        found
    }

    pub fn get(&self, id: u64) -> Option<Arc<DeadLetter>> {
        self.kept.lock().letters.get(&id).cloned()
    }

    /// Hands letters over again, one after the other; those that `hand_over` takes are kept no longer. To be
    /// called by one at a time: else a letter could go twice.
    pub fn retry(
        &self,
        ids: impl IntoIterator<Item = u64>,
        hand_over: impl Fn(&DeadLetter) -> Result<(), String>,
    ) -> Retried {
        let mut outcome = Retried::default();
        for id in ids {
            let handed_over = match self.get(id) {
                None => Err(no_such_letter(id)),
                Some(letter) if letter.is_cut() => Err(format!(
                    "only the first {} of its {} bytes of payload were kept, so it can't be sent again",
                    letter.payload.len(),
                    letter.payload_bytes
                )),
                Some(letter) => hand_over(&letter),
            };
            match handed_over {
                Ok(()) => {
                    self.kept.lock().take_out(id);
                    outcome.retried += 1;
                }
                Err(error) => outcome.refused.push(Refused { id, error }),
            }
        }
        self.retried.fetch_add(outcome.retried, Ordering::Relaxed);
        outcome
    }

    /// Forgets all. Returns how many there were.
    pub fn purge(&self) -> usize {
        let mut kept = self.kept.lock();
        let count = kept.letters.len();
        kept.letters.clear();
        kept.bytes = 0;
        count
    }

    /// How many were counted and not kept.
    pub fn left_out(&self) -> u64 {
        self.left_out.load(Ordering::Relaxed)
    }

    /// What has changed since [`DeadLetters::saved`], if anything has.
    pub fn unsaved(&self) -> Option<Unsaved> {
        let kept = self.kept.lock();
        let (first, next) = (kept.first(), kept.next);
        if kept.saved == (first, next) && kept.taken_out.is_empty() {
            return None;
        }
        let new = kept.letters.range(kept.saved.1..);
        Some(Unsaved {
            letters: new.map(|(id, letter)| (*id, letter.clone())).collect(),
            first,
            taken_out: kept.taken_out.clone(),
            next,
        })
    }

    /// `unsaved` is on disk.
    pub fn saved(&self, unsaved: &Unsaved) {
        let mut kept = self.kept.lock();
        kept.saved = (unsaved.first, unsaved.next);
        kept.taken_out.drain(..unsaved.taken_out.len());
    }

    /// Puts the counters into the `metrics` crate's recorder. To be called before a scrape.
    pub fn record_metrics(&self) {
        for (reason, count) in Reason::ALL.into_iter().zip(&self.counts) {
            metrics::counter!("headgate_dead_letters_total", "reason" => reason.as_str())
                .absolute(count.load(Ordering::Relaxed));
        }
        metrics::counter!("headgate_dead_letters_left_out_total").absolute(self.left_out());
        metrics::counter!("headgate_dead_letters_retried_total")
            .absolute(self.retried.load(Ordering::Relaxed));
    }
}

/// What to say about an id that no letter has.
pub fn no_such_letter(id: u64) -> String {
    format!("no dead letter has the id {id}; `headgate dead-letters` shows those that are kept")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn letter(topic: &'static str, payload: &[u8]) -> DeadLetter {
        let topic = Topic::new(topic).unwrap();
        DeadLetter::new(Reason::QueueFull, "pump", &topic, payload, 1)
    }

    fn payloads(letters: &DeadLetters) -> Vec<String> {
        let list = letters.list(None, usize::MAX);
        let payloads = list.iter().map(|(_, letter)| letter.payload.to_vec());
        payloads.map(|p| String::from_utf8(p).unwrap()).collect()
    }

    fn add(letters: &DeadLetters, now: Instant, payload: &str) {
        letters.add(Reason::QueueFull, now, || letter("a/b", payload.as_bytes()));
    }

    #[test]
    fn the_last_ones_are_kept() {
        let now = Instant::now();
        let letters = DeadLetters::new(now);
        for number in 0..MAX_LETTERS + 5 {
            // So slowly that all could be kept.
            let now = now + Duration::from_secs(number as u64);
            add(&letters, now, &number.to_string());
        }
        let payloads = payloads(&letters);
        assert_eq!(payloads.len(), MAX_LETTERS);
        assert_eq!(payloads[0], "5");
        assert_eq!(letters.left_out(), 0);
    }

    #[test]
    fn large_ones_are_kept_in_part_and_in_bounds() {
        let now = Instant::now();
        let letters = DeadLetters::new(now);
        let payload = vec![7; 3 * MAX_PAYLOAD_BYTES];
        for minute in 0..MAX_LETTERS as u64 {
            let now = now + Duration::from_secs(60 * minute);
            letters.add(Reason::TooLarge, now, || letter("a/b", &payload));
        }
        let list = letters.list(None, usize::MAX);
        assert!((200..=256).contains(&list.len()), "{}", list.len());
        let letter = &list[0].1;
        assert_eq!(letter.payload.len(), MAX_PAYLOAD_BYTES);
        assert_eq!(letter.payload_bytes, payload.len() as u64);
    }

    #[test]
    fn of_a_flood_the_first_ones_are_kept_and_then_some() {
        let start = Instant::now();
        let letters = DeadLetters::new(start);
        let mut made = 0;
        const SECONDS: u32 = 10;
        for second in 0..SECONDS {
            for drop in 0..10_000 {
                let now = start + Duration::from_secs(second.into()) + Duration::from_micros(drop);
                letters.add(Reason::QueueFull, now, || {
                    made += 1;
                    letter("a/b", b"x")
                });
            }
        }
        let kept = 1_000 + 10 * (SECONDS - 1);
        assert!((kept..kept + 10).contains(&made), "{made}");
        assert_eq!(letters.left_out(), u64::from(10_000 * SECONDS - made));
        assert_eq!(
            letters.counts[0].load(Ordering::Relaxed),
            u64::from(10_000 * SECONDS)
        );
        // After a pause a flood is seen from its beginning again.
        let before = made;
        let now = start + Duration::from_secs(1_000);
        for _ in 0..2_000 {
            letters.add(Reason::QueueFull, now, || {
                made += 1;
                letter("a/b", b"x")
            });
        }
        assert!((1_000..1_010).contains(&(made - before)), "{made}");
    }

    #[test]
    fn a_flood_of_large_ones_is_held_to_a_rate_in_bytes() {
        let start = Instant::now();
        let letters = DeadLetters::new(start);
        let payload = vec![7; MAX_PAYLOAD_BYTES];
        let mut bytes = 0;
        for second in 0..1_000 {
            let now = start + Duration::from_secs(second);
            letters.add(Reason::QueueFull, now, || {
                bytes += payload.len();
                letter("a/b", &payload)
            });
        }
        let bound = (4 << 20) + 1_000 * (16 << 10) + MAX_PAYLOAD_BYTES;
        assert!((bound / 2..=bound).contains(&bytes), "{bytes} of {bound}");
    }

    #[test]
    fn they_are_found_by_topic() {
        let now = Instant::now();
        let letters = DeadLetters::new(now);
        for topic in ["plant/a", "plant/b", "other", "plant/c"] {
            letters.add(Reason::Expired, now, || letter(topic, b""));
        }
        let filter = TopicFilter::new("plant/#").unwrap();
        let topics = |last| {
            let list = letters.list(Some(&filter), last);
            let topics = list.iter().map(|(_, letter)| letter.topic.to_string());
            topics.collect::<Vec<_>>()
        };
        assert_eq!(topics(10), ["plant/a", "plant/b", "plant/c"]);
        assert_eq!(topics(2), ["plant/b", "plant/c"]);
    }

    /// A disk that does as it is told.
    #[derive(Default)]
    struct Disk {
        letters: BTreeMap<u64, DeadLetter>,
        next: u64,
    }

    impl Disk {
        fn save(&mut self, letters: &DeadLetters) {
            if let Some(unsaved) = letters.unsaved() {
                self.write(&unsaved);
                letters.saved(&unsaved);
            }
        }

        fn write(&mut self, unsaved: &Unsaved) {
            for (id, letter) in &unsaved.letters {
                self.letters.insert(*id, (**letter).clone());
            }
            self.letters = self.letters.split_off(&unsaved.first);
            self.letters.retain(|id, _| !unsaved.taken_out.contains(id));
            self.next = unsaved.next;
        }

        fn restored(&self) -> DeadLetters {
            let letters = DeadLetters::new(Instant::now());
            letters.restore(self.letters.clone().into_iter().collect(), self.next);
            letters
        }
    }

    #[test]
    fn the_disk_follows() {
        let mut disk = Disk::default();
        let letters = disk.restored();
        let now = Instant::now();
        assert!(letters.unsaved().is_none());
        add(&letters, now, "1");
        add(&letters, now, "2");
        disk.save(&letters);
        assert!(letters.unsaved().is_none());
        add(&letters, now, "3");
        assert_eq!(letters.unsaved().unwrap().letters.len(), 1);
        disk.save(&letters);
        assert_eq!(payloads(&disk.restored()), ["1", "2", "3"]);

        let letters = disk.restored();
        assert!(letters.unsaved().is_none());
        for number in 4..MAX_LETTERS + 4 {
            let now = now + Duration::from_secs(number as u64);
            add(&letters, now, &number.to_string());
        }
        disk.save(&letters);
        assert_eq!(disk.letters.len(), MAX_LETTERS);
        assert_eq!(payloads(&disk.restored()), payloads(&letters));

        // One in the middle can't be read any more.
        let middle = *disk.letters.keys().nth(500).unwrap();
        disk.letters.remove(&middle);
        let letters = disk.restored();
        assert_eq!(payloads(&letters).len(), MAX_LETTERS - 1);
        add(&letters, now, "last");
        disk.save(&letters);
        let restored = payloads(&disk.restored());
        assert_eq!(restored.last().unwrap(), "last");

        assert_eq!(letters.purge(), MAX_LETTERS);
        add(&letters, now, "new");
        disk.save(&letters);
        assert_eq!(payloads(&disk.restored()), ["new"]);
        assert_eq!(disk.letters.len(), 1);
    }

    fn ids(letters: &DeadLetters) -> Vec<u64> {
        let list = letters.list(None, usize::MAX);
        list.iter().map(|(id, _)| *id).collect()
    }

    #[test]
    fn an_id_is_kept_over_restarts_and_never_given_again() {
        let mut disk = Disk::default();
        let letters = disk.restored();
        let now = Instant::now();
        for payload in ["a", "b", "c"] {
            add(&letters, now, payload);
        }
        let before = ids(&letters);
        disk.save(&letters);
        let letters = disk.restored();
        assert_eq!(ids(&letters), before);
        assert_eq!(letters.get(before[1]).unwrap().payload, "b");
        letters.purge();
        disk.save(&letters);
        let letters = disk.restored();
        add(&letters, now, "d");
        assert_eq!(ids(&letters), [before[2] + 1]);
        assert_eq!(letters.get(before[1]), None);
    }

    #[test]
    fn what_is_retried_is_handed_over_once_and_gone_here_and_on_disk() {
        let mut disk = Disk::default();
        let letters = disk.restored();
        let now = Instant::now();
        for payload in ["a", "b", "c", "d"] {
            add(&letters, now, payload);
        }
        disk.save(&letters);
        add(&letters, now, "e");
        let all = ids(&letters);
        let handed_over = Mutex::new(Vec::new());
        let hand_over = |letter: &DeadLetter| match &letter.payload[..] {
            b"c" => Err("not this one".to_owned()),
            _ => {
                handed_over.lock().push(letter.payload.clone());
                Ok(())
            }
        };
        // While the first letters are on their way to the disk, one that is new goes.
        let unsaved = letters.unsaved().unwrap();
        let outcome = letters.retry([all[1], all[2], all[4], 77], hand_over);
        disk.write(&unsaved);
        letters.saved(&unsaved);
        assert_eq!(outcome.retried, 2);
        let refused: Vec<_> = outcome.refused.iter().map(|one| one.id).collect();
        assert_eq!(refused, [all[2], 77]);
        assert_eq!(outcome.refused[0].error, "not this one");
        assert!(
            outcome.refused[1]
                .error
                .contains("no dead letter has the id 77")
        );
        assert_eq!(*handed_over.lock(), ["b", "e"]);
        assert_eq!(payloads(&letters), ["a", "c", "d"]);
        disk.save(&letters);
        assert_eq!(payloads(&disk.restored()), ["a", "c", "d"]);
        assert!(letters.unsaved().is_none());
    }

    #[test]
    fn a_letter_of_which_not_all_was_kept_is_not_handed_over() {
        let now = Instant::now();
        let letters = DeadLetters::new(now);
        let payload = vec![7; MAX_PAYLOAD_BYTES + 1];
        letters.add(Reason::TooLarge, now, || letter("a/b", &payload));
        let outcome = letters.retry(ids(&letters), |_| panic!("it was cut"));
        let error = &outcome.refused[0].error;
        assert!(
            error.contains("only the first 65536 of its 65537 bytes"),
            "{error}"
        );
        assert_eq!(ids(&letters).len(), 1);
    }

    #[test]
    fn a_payload_is_shown_as_text_if_it_is_text() {
        let shown = |payload: &[u8]| serde_json::to_value(letter("a/b", payload).info(3)).unwrap();
        let text = shown("21,5 °C\n".as_bytes());
        assert_eq!(text["payload"], "21,5 °C\n");
        assert_eq!(text["topic"], "a/b");
        assert_eq!(text["reason"], "queue_full");
        assert_eq!(text["payload_bytes"], 9);
        for binary in [&b"\xff\x00"[..], b"\x1b[2J"] {
            let shown = shown(binary);
            assert_eq!(shown["payload_base64"], STANDARD.encode(binary));
            assert!(shown.get("payload").is_none());
        }
    }

    #[test]
    fn each_reason_has_a_count_of_its_own() {
        for (index, reason) in Reason::ALL.into_iter().enumerate() {
            assert_eq!(reason as usize, index);
            let json = serde_json::to_value(reason).unwrap();
            assert_eq!(json, reason.as_str());
        }
    }
}
