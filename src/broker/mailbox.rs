//! What waits for one subscriber, between the threads that publish and the task that sends.
//!
//! A mailbox is bounded. How a full one is felt, from mild to hard:
//! 1. Above a quarter of its bounds it is *pressed*: publishers pause until it has fallen to an
//!    eighth. So nothing is lost while a subscriber can keep a reasonable pace.
//! 2. Pressed for [`PATIENCE`] in which it took less than a thirty-second of its bounds, the
//!    subscriber is *slow*: nobody waits for it any more, until it is at an eighth.
//! 3. At its bounds, what comes is dropped and counted.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rumqttd::protocol::QoS;
use tokio::sync::Notify;
use tokio::time::timeout_at;

use super::message::{Delivery, SessionKey};

/// How long publishers wait for a pressed mailbox before they look what its subscriber has taken
/// meanwhile. One that takes nothing, or next to nothing, costs them one such pause and no more; one
/// that is waited for on takes, with the default bounds, some 6,000 messages a second or more.
pub const PATIENCE: Duration = Duration::from_millis(500);

#[derive(Debug)]
pub struct Mailbox {
    queue: Mutex<Queue>,
    max_messages: usize,
    max_bytes: usize,
    /// Mirrors of the queue's state, for publishers to look at without the lock.
    pressed: AtomicBool,
    slow: AtomicBool,
    offline: AtomicBool,
    /// Tells the connection's task that there is something to send.
    filled: Notify,
    /// Tells publishers that the mailbox is no longer pressed, or no longer waited for.
    eased: Notify,
    tally: Arc<Tally>,
}

/// What is counted for all mailboxes together.
#[derive(Debug, Default)]
pub struct Tally {
    /// Deliveries that found no room.
    pub dropped: AtomicU64,
    /// Mailboxes that are pressed, now.
    pub pressed: AtomicUsize,
}

#[derive(Debug, Default)]
struct Queue {
    deliveries: VecDeque<Delivery>,
    bytes: usize,
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

impl Mailbox {
    pub fn new(max_messages: usize, max_bytes: usize, tally: Arc<Tally>) -> Self {
        Mailbox {
            queue: Mutex::default(),
            max_messages,
            max_bytes,
            pressed: AtomicBool::new(false),
            slow: AtomicBool::new(false),
            offline: AtomicBool::new(false),
            filled: Notify::new(),
            eased: Notify::new(),
            tally,
        }
    }

    /// Puts in all of `deliveries`, or drops and counts those that find no room. Returns how many
    /// it put in.
    pub fn push(&self, deliveries: impl Iterator<Item = Delivery>, now: Instant) -> usize {
        let mut guard = self.queue.lock();
        let queue = &mut *guard;
        if queue.closed {
            return 0;
        }
        let before = queue.deliveries.len();
        let mut dropped = 0;
        for delivery in deliveries {
            if queue.offline && delivery.qos == QoS::AtMostOnce {
                continue;
            }
            let bytes = delivery.message.queued_bytes();
            if queue.deliveries.len() >= self.max_messages || queue.bytes + bytes > self.max_bytes {
                dropped += 1;
                continue;
            }
            queue.bytes += bytes;
            queue.deliveries.push_back(delivery);
        }
        let high =
            queue.deliveries.len() > self.max_messages / 4 || queue.bytes > self.max_bytes / 4;
        if high && !queue.offline {
            if queue.pressed_since.is_none() {
                queue.pressed_since = Some(now);
                queue.taken_since = (0, 0);
            }
            self.lose_patience(queue, now);
            self.set_pressed(!queue.slow);
        }
        let added = queue.deliveries.len() - before;
        drop(guard);
        if before == 0 && added > 0 {
            self.filled.notify_one();
        }
        if dropped > 0 {
            self.tally.dropped.fetch_add(dropped, Ordering::Relaxed);
        }
        added
    }

    /// Takes up to `max` deliveries out, in order, into `taken`.
    pub fn take(&self, max: usize, taken: &mut VecDeque<Delivery>) {
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
        let low =
            queue.deliveries.len() <= self.max_messages / 8 && queue.bytes <= self.max_bytes / 8;
        if low && queue.pressed_since.take().is_some() {
            queue.slow = false;
            self.slow.store(false, Ordering::Relaxed);
            self.set_pressed(false);
            drop(guard);
            self.eased.notify_waiters();
        }
    }

    /// Puts back in front what was taken out last and not used.
    pub fn put_back(&self, taken: VecDeque<Delivery>) {
        let mut queue = self.queue.lock();
        for delivery in taken.into_iter().rev() {
            queue.bytes += delivery.message.queued_bytes();
            queue.deliveries.push_front(delivery);
        }
    }

    pub fn is_empty(&self) -> bool {
        self.queue.lock().deliveries.is_empty()
    }

    /// Waits for the mailbox to be filled from empty. A fill that came before the call counts.
    pub async fn filled(&self) {
        self.filled.notified().await;
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
        if messages >= (self.max_messages / 32).max(1) || bytes >= self.max_bytes / 32 {
            queue.pressed_since = Some(now);
            queue.taken_since = (0, 0);
        } else {
            queue.slow = true;
            self.slow.store(true, Ordering::Relaxed);
        }
    }

    fn set_pressed(&self, pressed: bool) {
        if self.pressed.swap(pressed, Ordering::Relaxed) != pressed {
            let count = &self.tally.pressed;
            match pressed {
                true => count.fetch_add(1, Ordering::Relaxed),
                false => count.fetch_sub(1, Ordering::Relaxed),
            };
        }
    }

    /// The connection has ended and the session goes on without it.
    pub fn set_offline(&self, offline: bool) {
        let mut queue = self.queue.lock();
        queue.offline = offline;
        self.offline.store(offline, Ordering::Relaxed);
        if offline {
            queue.pressed_since = None;
            queue.slow = false;
            self.slow.store(false, Ordering::Relaxed);
            let queue = &mut *queue;
            queue
                .deliveries
                .retain(|delivery| delivery.qos != QoS::AtMostOnce);
            queue.bytes = queue
                .deliveries
                .iter()
                .map(|delivery| delivery.message.queued_bytes())
                .sum();
        }
        self.set_pressed(false);
        drop(queue);
        self.eased.notify_waiters();
        if !offline {
            self.filled.notify_one();
        }
    }

    /// Takes out what other connected members of a share group can have in the place of `key`.
    pub fn take_shared(&self, key: SessionKey) -> Vec<Delivery> {
        let mut queue = self.queue.lock();
        let (shared, kept): (VecDeque<Delivery>, _) = std::mem::take(&mut queue.deliveries)
            .into_iter()
            .partition(|delivery| {
                let group = delivery.group.as_ref();
                group.is_some_and(|group| group.has_others(key))
            });
        queue.deliveries = kept;
        let shared = Vec::from(shared);
        let bytes = shared
            .iter()
            .map(|delivery| delivery.message.queued_bytes());
        queue.bytes -= bytes.sum::<usize>();
        shared
    }

    /// The session has ended. What was sent to share groups is returned.
    pub fn close(&self) -> Vec<Delivery> {
        let mut queue = self.queue.lock();
        queue.closed = true;
        let mut left = Vec::from(std::mem::take(&mut queue.deliveries));
        queue.bytes = 0;
        self.set_pressed(false);
        drop(queue);
        self.eased.notify_waiters();
        left.retain(|delivery| delivery.group.is_some());
        left
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::broker::message::Message;
    use crate::event::Topic;
    use bytes::Bytes;

    fn mailbox(max_messages: usize, max_bytes: usize) -> Mailbox {
        Mailbox::new(max_messages, max_bytes, Arc::default())
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
                mailbox.tally.dropped.load(Ordering::Relaxed)
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
                mailbox.tally.dropped.load(Ordering::Relaxed)
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
        mailbox.take(10, &mut taken);
        assert!(mailbox.is_pressed());
        mailbox.take(1, &mut taken);
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
        mailbox.take(3, &mut taken);
        mailbox.push(deliveries(3, QoS::AtMostOnce), now + PATIENCE);
        assert!(mailbox.is_pressed());
        // In the time that this gave it, it takes nothing.
        mailbox.push(deliveries(1, QoS::AtMostOnce), now + 2 * PATIENCE);
        assert!(!mailbox.is_pressed());
        assert_eq!(mailbox.tally.pressed.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn an_absent_subscriber_keeps_only_what_is_acknowledged() {
        let mailbox = mailbox(80, usize::MAX);
        let now = Instant::now();
        mailbox.push(deliveries(2, QoS::AtMostOnce), now);
        mailbox.push(deliveries(3, QoS::AtLeastOnce), now);
        mailbox.set_offline(true);
        assert_eq!(mailbox.queue.lock().deliveries.len(), 3);
        mailbox.push(deliveries(2, QoS::AtMostOnce), now);
        mailbox.push(deliveries(1, QoS::ExactlyOnce), now);
        assert_eq!(mailbox.queue.lock().deliveries.len(), 4);
    }
}
