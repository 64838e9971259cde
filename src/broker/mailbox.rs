//! What waits for one subscriber, between the threads that publish and the task that sends.
//!
//! A mailbox is bounded. How a full one is felt, from mild to hard:
//! 1. Above a quarter of its bounds it is *pressed*: publishers pause until it has fallen to an
//!    eighth. So nothing is lost while a subscriber can keep a reasonable pace.
//! 2. Pressed for longer than [`PATIENCE`], the subscriber is *slow*: nobody waits for it any more.
//! 3. At its bounds, what comes is dropped and counted.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rumqttd::protocol::QoS;
use tokio::sync::Notify;
use tokio::time::timeout_at;

use super::message::Delivery;

/// How long publishers wait for a pressed mailbox to fall below its low mark. A subscriber that is
/// waited for thus takes at least an eighth of its bounds in this time; one that is slower costs
/// the publishers one such pause and then no more.
pub const PATIENCE: Duration = Duration::from_millis(500);

#[derive(Debug)]
pub struct Mailbox {
    queue: Mutex<Queue>,
    max_messages: usize,
    max_bytes: usize,
    /// Mirrors of the queue's state, for publishers to look at without the lock.
    pressed: AtomicBool,
    /// Tells the connection's task that there is something to send.
    filled: Notify,
    /// Tells publishers that the mailbox is no longer pressed, or no longer waited for.
    eased: Notify,
    /// Counts, for all mailboxes together, what found no room.
    dropped: Arc<AtomicU64>,
}

#[derive(Debug, Default)]
struct Queue {
    deliveries: VecDeque<Delivery>,
    bytes: usize,
    /// Since when the mailbox is above its high mark.
    pressed_since: Option<Instant>,
    slow: bool,
    /// Nobody is connected: QoS 0 messages are not kept.
    offline: bool,
    /// The session has ended: nothing is kept.
    closed: bool,
}

impl Mailbox {
    pub fn new(max_messages: usize, max_bytes: usize, dropped: Arc<AtomicU64>) -> Self {
        Mailbox {
            queue: Mutex::default(),
            max_messages,
            max_bytes,
            pressed: AtomicBool::new(false),
            filled: Notify::new(),
            eased: Notify::new(),
            dropped,
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
            let since = *queue.pressed_since.get_or_insert(now);
            queue.slow |= now.duration_since(since) > PATIENCE;
            self.pressed.store(!queue.slow, Ordering::Relaxed);
        }
        let added = queue.deliveries.len() - before;
        drop(guard);
        if before == 0 && added > 0 {
            self.filled.notify_one();
        }
        if dropped > 0 {
            self.dropped.fetch_add(dropped, Ordering::Relaxed);
        }
        added
    }

    /// Takes up to `max` deliveries out, in order, into `taken`.
    pub fn take(&self, max: usize, taken: &mut VecDeque<Delivery>) {
        let mut guard = self.queue.lock();
        let queue = &mut *guard;
        if queue.deliveries.len() <= max && taken.is_empty() {
            std::mem::swap(&mut queue.deliveries, taken);
            queue.bytes = 0;
        } else {
            for delivery in queue.deliveries.drain(..max.min(queue.deliveries.len())) {
                queue.bytes -= delivery.message.queued_bytes();
                taken.push_back(delivery);
            }
        }
        let low =
            queue.deliveries.len() <= self.max_messages / 8 && queue.bytes <= self.max_bytes / 8;
        if low && queue.pressed_since.take().is_some() {
            queue.slow = false;
            self.pressed.store(false, Ordering::Relaxed);
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

    /// Waits while the mailbox is pressed, at most until it has been so for [`PATIENCE`]. May be
    /// dropped at any time.
    pub async fn eased(&self) {
        let eased = self.eased.notified();
        tokio::pin!(eased);
        eased.as_mut().enable();
        let Some(since) = self.queue.lock().pressed_since else {
            return;
        };
        if self.is_pressed() && timeout_at((since + PATIENCE).into(), eased).await.is_err() {
            self.give_up_waiting();
        }
    }

    /// The same for a thread that runs no tasks.
    pub fn eased_blocking(&self) {
        // Rare and short: a poll is simpler than a second way of being woken, and costs the
        // publisher at most a millisecond.
        let start = Instant::now();
        while self.is_pressed() {
            if start.elapsed() >= PATIENCE {
                self.give_up_waiting();
            }
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    fn give_up_waiting(&self) {
        let mut queue = self.queue.lock();
        if queue.pressed_since.is_some() {
            queue.slow = true;
        }
        self.pressed.store(false, Ordering::Relaxed);
        drop(queue);
        self.eased.notify_waiters();
    }

    /// The connection has ended and the session goes on without it.
    pub fn set_offline(&self, offline: bool) {
        let mut queue = self.queue.lock();
        queue.offline = offline;
        if offline {
            queue.pressed_since = None;
            queue.slow = false;
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
        drop(queue);
        self.pressed.store(false, Ordering::Relaxed);
        self.eased.notify_waiters();
        if !offline {
            self.filled.notify_one();
        }
    }

    /// The session has ended.
    pub fn close(&self) {
        let mut queue = self.queue.lock();
        queue.closed = true;
        queue.deliveries = VecDeque::new();
        queue.bytes = 0;
        drop(queue);
        self.pressed.store(false, Ordering::Relaxed);
        self.eased.notify_waiters();
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
                mailbox.dropped.load(Ordering::Relaxed)
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
                mailbox.dropped.load(Ordering::Relaxed)
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
