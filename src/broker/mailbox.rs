//! What waits for one subscriber, between the threads that publish and the task that sends.
//!
//! A mailbox is bounded. How a full one is felt, from mild to hard:
//! 1. Above a quarter of its bounds it is *pressed*: publishers pause until it has fallen to an
//!    eighth. So nothing is lost while a subscriber can keep a reasonable pace.
//! 2. Pressed for [`PATIENCE`] in which it took less than a thirty-second of its bounds, the
//!    subscriber is *slow*: nobody waits for it any more, until it is at an eighth.
//! 3. From half of its bounds on, QoS 1 and 2 messages for a session that is kept go to disk, and
//!    with them all that come after, until these have been sent. While the client is away, that is
//!    where they go at once.
//! 4. At its bounds, what comes is dropped and counted.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Mutex, MutexGuard};
use rumqttd::protocol::QoS;
use tokio::sync::Notify;
use tokio::time::timeout_at;

use super::archive::Archive;
use super::bell::Bell;
use super::message::{Delivery, Message, SessionKey};
use crate::dead_letters::{DeadLetter, DeadLetters, Reason};
use crate::store::StoreError;

/// How long publishers wait for a pressed mailbox before they look what its subscriber has taken
/// meanwhile. One that takes nothing, or next to nothing, costs them one such pause and no more; one
/// that is waited for on takes, with the default bounds, some 6,000 messages a second or more.
pub const PATIENCE: Duration = Duration::from_millis(500);

#[derive(Debug)]
pub struct Mailbox {
    /// Of its session.
    key: SessionKey,
    client_id: Box<str>,
    queue: Mutex<Queue>,
    /// The session outlives its connections: what finds no room in memory goes to disk.
    is_kept: bool,
    /// Mirrors of the queue's state, for publishers to look at without the lock.
    pressed: AtomicBool,
    slow: AtomicBool,
    offline: AtomicBool,
    /// Tells the connection's task that there is something to send.
    pub filled: Bell,
    /// Tells publishers that the mailbox is no longer pressed, or no longer waited for.
    eased: Notify,
    all: Arc<Mailboxes>,
}

/// What all mailboxes have in common.
#[derive(Debug)]
pub struct Mailboxes {
    pub bounds: Bounds,
    /// Where QoS 1 and 2 messages go that are not to be kept in memory.
    pub archive: Option<Archive>,
    /// Deliveries that found no room.
    pub dropped: AtomicU64,
    pub dead_letters: Arc<DeadLetters>,
    /// Mailboxes that are pressed, now.
    pub pressed: AtomicUsize,
    /// In memory, in all mailboxes together.
    pub queued_bytes: AtomicUsize,
}

#[derive(Clone, Debug)]
pub struct Bounds {
    /// In memory and on disk.
    pub max_messages: usize,
    /// In memory.
    pub max_bytes: usize,
    /// In the memory of all mailboxes together.
    pub max_total_bytes: usize,
    /// On disk.
    pub max_stored_bytes: usize,
}

#[derive(Debug, Default)]
struct Queue {
    deliveries: VecDeque<Delivery>,
    bytes: usize,
    /// Of the next QoS 1 or 2 message for a session that is kept.
    next_sequence: u64,
    /// On disk are those of this range. They come after what is in memory.
    stored: Range<u64>,
    stored_bytes: usize,
    /// Since when the mailbox is above its high mark.
    pressed_since: Option<Instant>,
    /// Deliveries and bytes taken out since then.
    taken_since: (usize, usize),
    slow: bool,
    /// Nobody is connected: QoS 0 messages are not kept.
    offline: bool,
    /// The session has ended: nothing is kept.
    closed: bool,
}

/// What [`Mailbox::push`] has done.
#[derive(Clone, Copy, Debug, Default)]
pub struct Pushed {
    /// Put in, in memory or on disk.
    pub added: usize,
    /// Something is on its way to the disk.
    pub stored: bool,
}

impl Mailboxes {
    pub fn new(bounds: Bounds, archive: Option<Archive>, dead_letters: Arc<DeadLetters>) -> Self {
        Mailboxes {
            bounds,
            archive,
            dead_letters,
            dropped: AtomicU64::new(0),
            pressed: AtomicUsize::new(0),
            queued_bytes: AtomicUsize::new(0),
        }
    }
}

impl Mailbox {
    /// For a new session, `is_kept` if it outlives its connections.
    pub fn new(key: SessionKey, client_id: &str, is_kept: bool, all: Arc<Mailboxes>) -> Self {
        Mailbox {
            key,
            client_id: client_id.into(),
            queue: Mutex::default(),
            is_kept,
            pressed: AtomicBool::new(false),
            slow: AtomicBool::new(false),
            offline: AtomicBool::new(false),
            filled: Bell::default(),
            eased: Notify::new(),
            all,
        }
    }

    /// For a session of an earlier run, whose client is away: of `stored` is on disk for it, and takes
    /// so many bytes.
    pub fn restored(
        key: SessionKey,
        client_id: &str,
        next_sequence: u64,
        stored: Option<(Range<u64>, usize)>,
        all: Arc<Mailboxes>,
    ) -> Self {
        let mailbox = Mailbox::new(key, client_id, true, all);
        mailbox.offline.store(true, Ordering::Relaxed);
        let (stored, stored_bytes) = stored.unwrap_or_default();
        *mailbox.queue.lock() = Queue {
            next_sequence,
            stored,
            stored_bytes,
            offline: true,
            ..Queue::default()
        };
        mailbox
    }

    /// Where messages go that are not to be kept in memory, if the session is kept at all.
    pub fn archive(&self) -> Option<&Archive> {
        self.all.archive.as_ref().filter(|_| self.is_kept)
    }

    /// Puts in all of `deliveries`, or drops and counts those that find no room.
    pub fn push(&self, deliveries: impl Iterator<Item = Delivery>, now: Instant) -> Pushed {
        let bounds = &self.all.bounds;
        let mut guard = self.queue.lock();
        let queue = &mut *guard;
        let mut pushed = Pushed::default();
        if queue.closed {
            return pushed;
        }
        let was_empty = queue.deliveries.is_empty() && queue.stored.is_empty();
        let bytes_before = queue.bytes;
        let total_before = self.all.queued_bytes.load(Ordering::Relaxed);
        let mut dropped = 0;
        for mut delivery in deliveries {
            let is_acknowledged = delivery.qos != QoS::AtMostOnce;
            if queue.offline && !is_acknowledged {
                continue;
            }
            let bytes = delivery.message.queued_bytes();
            let stored_messages = (queue.stored.end - queue.stored.start) as usize;
            let has_place = queue.deliveries.len() + stored_messages < bounds.max_messages;
            let total = total_before + (queue.bytes - bytes_before) + bytes;
            let archive = self.archive().filter(|_| is_acknowledged);
            if archive.is_some() {
                delivery.sequence = queue.next_sequence;
                queue.next_sequence += 1;
            }
            let to_disk = archive.filter(|_| {
                queue.offline
                    || !queue.stored.is_empty()
                    || queue.deliveries.len() >= bounds.max_messages / 2
                    || queue.bytes + bytes > bounds.max_bytes / 2
                    || total > bounds.max_total_bytes
            });
            let taken = match to_disk {
                Some(archive) => {
                    let taken = has_place
                        && queue.stored_bytes + bytes <= bounds.max_stored_bytes
                        && archive.append(self.key, delivery.sequence, delivery.clone());
                    if taken {
                        queue.extend_stored(delivery.sequence, bytes);
                        pushed.stored = true;
                        Ok(())
                    } else {
                        Err(delivery)
                    }
                }
                None => {
                    let taken = has_place
                        && queue.bytes + bytes <= bounds.max_bytes
                        && total <= bounds.max_total_bytes;
                    if taken {
                        queue.bytes += bytes;
                        queue.deliveries.push_back(delivery);
                        Ok(())
                    } else {
                        Err(delivery)
                    }
                }
            };
            match taken {
                Ok(()) => pushed.added += 1,
                Err(delivery) => {
                    dropped += 1;
                    self.dead_letter(Reason::QueueFull, &delivery.message, now);
                }
            }
        }
        self.count_bytes(bytes_before, queue.bytes);
        let high = queue.deliveries.len() > bounds.max_messages / 4
            || queue.bytes > bounds.max_bytes / 4
            || !queue.stored.is_empty();
        if high && !queue.offline {
            if queue.pressed_since.is_none() {
                queue.pressed_since = Some(now);
                queue.taken_since = (0, 0);
            }
            self.lose_patience(queue, now);
            self.set_pressed(!queue.slow);
        }
        drop(guard);
        if was_empty && pushed.added > 0 {
            self.filled.ring();
        }
        if dropped > 0 {
            self.all.dropped.fetch_add(dropped, Ordering::Relaxed);
        }
        pushed
    }

    /// A message that was to go to the client does not.
    pub fn dead_letter(&self, reason: Reason, message: &Message, now: Instant) {
        self.all.dead_letters.add(reason, now, || {
            let Message { topic, payload, .. } = message;
            DeadLetter::new(reason, &self.client_id, topic, payload, message.qos as u8)
        });
    }

    /// Counts dead letters of which nothing is kept.
    pub fn count_dead_letters(&self, reason: Reason, count: u64) {
        self.all.dead_letters.count(reason, count);
    }

    /// Keeps the count of all mailboxes' bytes.
    fn count_bytes(&self, before: usize, after: usize) {
        let total = &self.all.queued_bytes;
        match after >= before {
            true => total.fetch_add(after - before, Ordering::Relaxed),
            false => total.fetch_sub(before - after, Ordering::Relaxed),
        };
    }

    /// Takes up to `max` deliveries out, in order, into `taken`: what is in memory, then what is on
    /// disk.
    pub fn take(&self, max: usize, taken: &mut VecDeque<Delivery>) -> Result<(), StoreError> {
        if self.take_from_memory(max, taken) && taken.len() < max {
            self.load(max - taken.len(), taken)?;
        }
        Ok(())
    }

    /// Takes what is on disk. It stays there until [`Archive::remove`]. Only for the one who sends
    /// it: there must not be two.
    fn load(&self, max: usize, taken: &mut VecDeque<Delivery>) -> Result<(), StoreError> {
        /// Taken at once, about.
        const MAX_BYTES: usize = 1 << 20;
        let stored = self.queue.lock().stored.clone();
        let Some(archive) = self.archive().filter(|_| !stored.is_empty()) else {
            return Ok(());
        };
        // Without the lock: this may wait for the disk.
        let found = archive.read(self.key, stored.start, max, MAX_BYTES)?;
        let mut guard = self.queue.lock();
        let queue = &mut *guard;
        queue.stored.start = found.last().map_or(stored.end, |(last, _)| last + 1);
        for (sequence, delivery) in found {
            let bytes = delivery.message.queued_bytes();
            queue.taken_since.0 += 1;
            queue.taken_since.1 += bytes;
            queue.stored_bytes = queue.stored_bytes.saturating_sub(bytes);
            taken.push_back(Delivery {
                sequence,
                is_stored: true,
                ..delivery
            });
        }
        if queue.stored.is_empty() {
            queue.stored_bytes = 0;
            self.ease(guard);
        }
        Ok(())
    }

    /// Publishers need not wait any more, if there is little left.
    fn ease(&self, mut queue: MutexGuard<'_, Queue>) {
        let bounds = &self.all.bounds;
        let low = queue.deliveries.len() <= bounds.max_messages / 8
            && queue.bytes <= bounds.max_bytes / 8
            && queue.stored.is_empty();
        if low && queue.pressed_since.take().is_some() {
            queue.slow = false;
            self.slow.store(false, Ordering::Relaxed);
            self.set_pressed(false);
            drop(queue);
            self.eased.notify_waiters();
        }
    }

    /// Returns whether nothing is left in memory.
    fn take_from_memory(&self, max: usize, taken: &mut VecDeque<Delivery>) -> bool {
        let mut guard = self.queue.lock();
        let queue = &mut *guard;
        let before = (queue.deliveries.len(), queue.bytes);
        if queue.deliveries.len() <= max && taken.is_empty() {
            std::mem::swap(&mut queue.deliveries, taken);
            queue.bytes = 0;
        } else {
            for delivery in queue.deliveries.drain(..max.min(queue.deliveries.len())) {
                queue.bytes -= delivery.message.queued_bytes();
                taken.push_back(delivery);
            }
        }
        queue.taken_since.0 += before.0 - queue.deliveries.len();
        queue.taken_since.1 += before.1 - queue.bytes;
        self.count_bytes(before.1, queue.bytes);
        let is_empty = queue.deliveries.is_empty();
        self.ease(guard);
        is_empty
    }

    /// Puts back in front what was taken out last and not used.
    pub fn put_back(&self, taken: VecDeque<Delivery>) {
        let mut queue = self.queue.lock();
        let before = queue.bytes;
        for delivery in taken.into_iter().rev() {
            queue.bytes += delivery.message.queued_bytes();
            queue.deliveries.push_front(delivery);
        }
        self.count_bytes(before, queue.bytes);
    }

    pub fn is_empty(&self) -> bool {
        let queue = self.queue.lock();
        queue.deliveries.is_empty() && queue.stored.is_empty()
    }

    /// How many messages and bytes wait in memory, and about how many messages on disk.
    pub fn lengths(&self) -> (usize, usize, usize) {
        let queue = self.queue.lock();
        let stored = queue.stored.end - queue.stored.start;
        (queue.deliveries.len(), queue.bytes, stored as usize)
    }

    /// Of the next message that goes to disk.
    pub fn next_sequence(&self) -> u64 {
        self.queue.lock().next_sequence
    }

    /// Whether publishers ought to pause.
    pub fn is_pressed(&self) -> bool {
        self.pressed.load(Ordering::Relaxed)
    }

    /// Whether what is put in now had better go to somebody else, if it can.
    pub fn is_behind(&self) -> bool {
        self.is_pressed() || self.slow.load(Ordering::Relaxed)
    }

    /// Whether the client is away.
    pub fn is_offline(&self) -> bool {
        self.offline.load(Ordering::Relaxed)
    }

    /// Waits while the mailbox is pressed and its subscriber takes enough to be waited for. May be
    /// dropped at any time.
    pub async fn eased(&self) {
        let eased = self.eased.notified();
        tokio::pin!(eased);
        eased.as_mut().enable();
        let Some(since) = self.queue.lock().pressed_since else {
            return;
        };
        if self.is_pressed() && timeout_at((since + PATIENCE).into(), eased).await.is_err() {
            self.look_at_progress();
        }
    }

    /// The same for a thread that runs no tasks.
    pub fn eased_blocking(&self) {
        // Rare and short: a poll is simpler than a second way of being woken, and costs the
        // publisher at most a millisecond.
        while self.is_pressed() {
            std::thread::sleep(Duration::from_micros(200));
            self.look_at_progress();
        }
    }

    fn look_at_progress(&self) {
        let mut queue = self.queue.lock();
        self.lose_patience(&mut queue, Instant::now());
        if queue.slow {
            self.set_pressed(false);
            drop(queue);
            self.eased.notify_waiters();
        }
    }

    /// Marks the subscriber as slow if its time is up, or gives it more if it has made use of it.
    fn lose_patience(&self, queue: &mut Queue, now: Instant) {
        let Some(since) = queue.pressed_since else {
            return;
        };
        if queue.slow || now.duration_since(since) < PATIENCE {
            return;
        }
        let (messages, bytes) = queue.taken_since;
        let bounds = &self.all.bounds;
        if messages >= (bounds.max_messages / 32).max(1) || bytes >= bounds.max_bytes / 32 {
            queue.pressed_since = Some(now);
            queue.taken_since = (0, 0);
        } else {
            queue.slow = true;
            self.slow.store(true, Ordering::Relaxed);
        }
    }

    fn set_pressed(&self, pressed: bool) {
        if self.pressed.swap(pressed, Ordering::Relaxed) != pressed {
            let count = &self.all.pressed;
            match pressed {
                true => count.fetch_add(1, Ordering::Relaxed),
                false => count.fetch_sub(1, Ordering::Relaxed),
            };
        }
    }

    /// The connection has ended and the session goes on without it. What is in memory goes to disk,
    /// as far as there is room.
    pub fn set_offline(&self) {
        let mut guard = self.queue.lock();
        let queue = &mut *guard;
        queue.offline = true;
        self.offline.store(true, Ordering::Relaxed);
        queue.pressed_since = None;
        queue.slow = false;
        self.slow.store(false, Ordering::Relaxed);
        let before = queue.bytes;
        queue
            .deliveries
            .retain(|delivery| delivery.qos != QoS::AtMostOnce);
        if let Some(archive) = self.archive() {
            // The newest first: what finds no room are the oldest, which come before all on disk.
            while let Some(delivery) = queue.deliveries.pop_back() {
                let (sequence, bytes) = (delivery.sequence, delivery.message.queued_bytes());
                let is_stored =
                    delivery.is_stored || archive.append(self.key, sequence, delivery.clone());
                if !is_stored {
                    queue.deliveries.push_back(delivery);
                    break;
                }
                queue.extend_stored(sequence, bytes);
            }
        }
        let left = queue.deliveries.iter();
        queue.bytes = left.map(|delivery| delivery.message.queued_bytes()).sum();
        self.count_bytes(before, queue.bytes);
        self.set_pressed(false);
        drop(guard);
        self.eased.notify_waiters();
    }

    /// The client is back.
    pub fn set_online(&self) {
        self.queue.lock().offline = false;
        self.offline.store(false, Ordering::Relaxed);
        self.filled.ring();
    }

    /// Takes out what other connected members of a share group can have instead.
    pub fn take_shared(&self) -> Vec<Delivery> {
        let mut queue = self.queue.lock();
        let (shared, kept): (VecDeque<Delivery>, _) = std::mem::take(&mut queue.deliveries)
            .into_iter()
            .partition(|delivery| {
                let group = delivery.group.as_ref();
                group.is_some_and(|group| group.has_others(self.key))
            });
        queue.deliveries = kept;
        let shared = Vec::from(shared);
        let bytes = shared
            .iter()
            .map(|delivery| delivery.message.queued_bytes());
        let bytes = bytes.sum::<usize>();
        queue.bytes -= bytes;
        self.count_bytes(bytes, 0);
        shared
    }

    /// The session has ended. Returns what was in memory for it.
    pub fn close(&self) -> Vec<Delivery> {
        let mut queue = self.queue.lock();
        queue.closed = true;
        self.count_bytes(queue.bytes, 0);
        let left = Vec::from(std::mem::take(&mut queue.deliveries));
        queue.bytes = 0;
        self.set_pressed(false);
        drop(queue);
        self.eased.notify_waiters();
        left
    }
}

impl Queue {
    fn extend_stored(&mut self, sequence: u64, bytes: usize) {
        if self.stored.is_empty() {
            self.stored = sequence..sequence;
        }
        self.stored.start = self.stored.start.min(sequence);
        self.stored.end = self.stored.end.max(sequence + 1);
        self.stored_bytes += bytes;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::broker::message::Message;
    use crate::event::Topic;
    use bytes::Bytes;

    fn mailbox(max_messages: usize, max_bytes: usize) -> Mailbox {
        let bounds = Bounds {
            max_messages,
            max_bytes,
            max_total_bytes: usize::MAX,
            max_stored_bytes: usize::MAX,
        };
        let dead_letters = Arc::new(DeadLetters::new(Instant::now()));
        let all = Mailboxes::new(bounds, None, dead_letters);
        Mailbox::new(1, "c", true, Arc::new(all))
    }

    fn deliveries(count: usize, qos: QoS) -> impl Iterator<Item = Delivery> {
        let message = Arc::new(Message::new(
            Topic::new("t").unwrap(),
            Bytes::from_static(b"x"),
        ));
        std::iter::repeat_n(
            Delivery {
                message,
                qos,
                retain: false,
                subscription_ids: None,
                group: None,
                sequence: 0,
                is_stored: false,
            },
            count,
        )
    }

    #[test]
    fn what_finds_no_room_is_dropped_and_counted() {
        let mailbox = mailbox(10, usize::MAX);
        mailbox.push(deliveries(15, QoS::AtMostOnce), Instant::now());
        assert_eq!(
            (
                mailbox.queue.lock().deliveries.len(),
                mailbox.all.dropped.load(Ordering::Relaxed)
            ),
            (10, 5)
        );
    }

    #[test]
    fn the_bytes_are_bounded_too() {
        let one = deliveries(1, QoS::AtMostOnce)
            .next()
            .unwrap()
            .message
            .queued_bytes();
        let mailbox = mailbox(1000, 3 * one);
        mailbox.push(deliveries(5, QoS::AtMostOnce), Instant::now());
        assert_eq!(
            (
                mailbox.queue.lock().deliveries.len(),
                mailbox.all.dropped.load(Ordering::Relaxed)
            ),
            (3, 2)
        );
    }

    #[test]
    fn publishers_pause_above_a_quarter_and_go_on_at_an_eighth() {
        let mailbox = mailbox(80, usize::MAX);
        let now = Instant::now();
        mailbox.push(deliveries(20, QoS::AtMostOnce), now);
        assert!(!mailbox.is_pressed());
        mailbox.push(deliveries(1, QoS::AtMostOnce), now);
        assert!(mailbox.is_pressed());
        let mut taken = VecDeque::new();
        mailbox.take(10, &mut taken).unwrap();
        assert!(mailbox.is_pressed());
        mailbox.take(1, &mut taken).unwrap();
        assert!(!mailbox.is_pressed());
        assert_eq!(taken.len(), 11);
    }

    #[test]
    fn nobody_waits_for_a_slow_subscriber() {
        let mailbox = mailbox(80, usize::MAX);
        let now = Instant::now();
        mailbox.push(deliveries(30, QoS::AtMostOnce), now);
        assert!(mailbox.is_pressed());
        mailbox.push(
            deliveries(1, QoS::AtMostOnce),
            now + PATIENCE + Duration::from_millis(1),
        );
        assert!(!mailbox.is_pressed());
    }

    #[test]
    fn a_subscriber_that_makes_progress_is_waited_for() {
        let mailbox = mailbox(80, usize::MAX);
        let now = Instant::now();
        mailbox.push(deliveries(60, QoS::AtMostOnce), now);
        let mut taken = VecDeque::new();
        mailbox.take(3, &mut taken).unwrap();
        mailbox.push(deliveries(3, QoS::AtMostOnce), now + PATIENCE);
        assert!(mailbox.is_pressed());
        // In the time that this gave it, it takes nothing.
        mailbox.push(deliveries(1, QoS::AtMostOnce), now + 2 * PATIENCE);
        assert!(!mailbox.is_pressed());
        assert_eq!(mailbox.all.pressed.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn an_absent_subscriber_keeps_only_what_is_acknowledged() {
        let mailbox = mailbox(80, usize::MAX);
        let now = Instant::now();
        mailbox.push(deliveries(2, QoS::AtMostOnce), now);
        mailbox.push(deliveries(3, QoS::AtLeastOnce), now);
        mailbox.set_offline();
        assert_eq!(mailbox.queue.lock().deliveries.len(), 3);
        mailbox.push(deliveries(2, QoS::AtMostOnce), now);
        mailbox.push(deliveries(1, QoS::ExactlyOnce), now);
        assert_eq!(mailbox.queue.lock().deliveries.len(), 4);
    }
}
