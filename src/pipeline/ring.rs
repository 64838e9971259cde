//! The bounded way from many producers to the router.
//!
//! What travels is chunks of events, so that a queue operation and a wake-up are paid once a chunk;
//! what is bounded is the number of events.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread::Thread;

use crossbeam_queue::ArrayQueue;
use tokio::sync::Notify;

use crate::event::Event;

/// Chunks that fit whatever their size. A chunk slot is small, so this bounds next to nothing;
/// the bound that is felt is that on events.
const CHUNKS: usize = 16_384;

/// Payload bytes that wait at most, besides one chunk of any size.
const MAX_BYTES: usize = 64 * 1024 * 1024;

pub(super) fn payload_bytes(chunk: &[Event]) -> usize {
    chunk.iter().map(|event| event.payload.len()).sum()
}

/// What a ring holds: events in the upper 24 bits, bytes of payloads in the lower 40. A ring has 4 million
/// events and 64 MiB at the most, besides a few chunks that are just being refused.
#[derive(Clone, Copy, Debug)]
struct Held(u64);

impl Held {
    const BYTE_BITS: u32 = 40;

    fn new(events: usize, bytes: usize) -> Held {
        Held((events as u64) << Held::BYTE_BITS | bytes as u64)
    }

    fn events(self) -> usize {
        (self.0 >> Held::BYTE_BITS) as usize
    }

    fn bytes(self) -> usize {
        (self.0 & ((1 << Held::BYTE_BITS) - 1)) as usize
    }
}

/// Chunks of events on their way from producers to whoever takes them out.
#[derive(Debug)]
pub struct Ring {
    chunks: ArrayQueue<Vec<Event>>,
    /// Events in `chunks`, and the bytes of their payloads: see [`Held`]. One word, so that a push changes one.
    held: AtomicU64,
    max_events: usize,
    /// Takes nothing, whatever room there is.
    closed: AtomicBool,
    /// The thread that takes what nobody else has taken.
    consumer: OnceLock<Thread>,
    /// A producer waits for room.
    waiting: AtomicUsize,
    room: Notify,
}

impl Ring {
    /// A ring for so many events.
    pub fn new(max_events: usize) -> Self {
        Ring {
            chunks: ArrayQueue::new(CHUNKS),
            held: AtomicU64::new(0),
            max_events,
            closed: AtomicBool::new(false),
            consumer: OnceLock::new(),
            waiting: AtomicUsize::new(0),
            room: Notify::new(),
        }
    }

    /// Events that wait.
    pub fn len(&self) -> usize {
        Held(self.held.load(Ordering::Relaxed)).events()
    }

    /// Puts a chunk in, or gives it back when that would make more than `max_events` and `beyond`.
    /// A ring that is at most half full takes any chunk, so that one larger than the ring gets
    /// through too.
    pub fn push(&self, chunk: Vec<Event>, beyond: usize) -> Result<(), Vec<Event>> {
        let (count, bytes) = (chunk.len(), payload_bytes(&chunk));
        let held = Held::new(count, bytes);
        let before = Held(self.held.fetch_add(held.0, Ordering::SeqCst));
        let (events_before, bytes_before) = (before.events(), before.bytes());
        // A ring that is at most half full takes any chunk: so does one that `room` has waited for.
        // What may not wait is taken even so.
        let full = (beyond == 0 && self.closed.load(Ordering::SeqCst))
            || (events_before + count > self.max_events + beyond
                && events_before > self.max_events / 2)
            || (bytes_before + bytes > MAX_BYTES && bytes_before > MAX_BYTES / 2);
        let refused = match full {
            true => Err(chunk),
            false => self.chunks.push(chunk),
        };
        if refused.is_err() {
            self.take_off(held);
        }
        refused
    }

    fn take_off(&self, held: Held) {
        self.held.fetch_sub(held.0, Ordering::SeqCst);
        if self.waiting.load(Ordering::SeqCst) > 0 && self.has_room() {
            self.room.notify_waiters();
        }
    }

    /// Waits until the ring is half empty, or returns at once if it is. A chunk that is pushed then
    /// most likely finds room, but others may be faster. May be dropped at any time.
    pub async fn room(&self) {
        struct Waiting<'a>(&'a AtomicUsize);
        impl Drop for Waiting<'_> {
            fn drop(&mut self) {
                self.0.fetch_sub(1, Ordering::SeqCst);
            }
        }
        self.waiting.fetch_add(1, Ordering::SeqCst);
        let _waiting = Waiting(&self.waiting);
        let room = self.room.notified();
        tokio::pin!(room);
        room.as_mut().enable();
        // Room may have come up before the wait was announced.
        if !self.has_room() {
            room.await;
        }
    }

    fn has_room(&self) -> bool {
        let held = Held(self.held.load(Ordering::SeqCst));
        !self.closed.load(Ordering::SeqCst)
            && held.events() <= self.max_events / 2
            && held.bytes() <= MAX_BYTES / 2
            && self.chunks.len() <= CHUNKS / 2
    }

    /// Puts a chunk in, whatever it takes: the oldest chunks are given back until there is room for it.
    pub fn push_over(&self, mut chunk: Vec<Event>) -> Vec<Vec<Event>> {
        let mut dropped = Vec::new();
        while let Err(back) = self.push(chunk, 0) {
            chunk = back;
            // Where there is nothing left to take out, others are at it, or have just been.
            dropped.extend(self.pop());
        }
        dropped
    }

    /// Has it take nothing, or take chunks again.
    pub fn set_closed(&self, closed: bool) {
        self.closed.store(closed, Ordering::SeqCst);
        if !closed {
            self.room.notify_waiters();
        }
    }

    /// Says whom [`Ring::wake`] wakes. For the first call only.
    pub fn set_consumer(&self, thread: Thread) {
        // There is one consumer, and it never changes.
        let _ = self.consumer.set(thread);
    }

    /// The next chunk.
    pub fn pop(&self) -> Option<Vec<Event>> {
        let chunk = self.chunks.pop()?;
        self.take_off(Held::new(chunk.len(), payload_bytes(&chunk)));
        Some(chunk)
    }

    pub fn is_empty(&self) -> bool {
        self.chunks.is_empty()
    }

    /// Wakes the consumer, or keeps it from its next sleep.
    pub fn wake(&self) {
        if let Some(consumer) = self.consumer.get() {
            consumer.unpark();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::Topic;
    use bytes::Bytes;
    use std::sync::Arc;
    use std::time::Instant;

    fn chunk(count: usize) -> Vec<Event> {
        let event = Event::new(Topic::new("t").unwrap(), Bytes::new(), Instant::now());
        vec![event; count]
    }

    #[test]
    fn a_full_ring_gives_the_chunk_back() {
        let ring = Ring::new(10);
        assert!(ring.push(chunk(8), 0).is_ok());
        assert_eq!(ring.push(chunk(3), 0).unwrap_err().len(), 3);
        assert!(ring.push(chunk(3), 1).is_ok());
        assert_eq!(ring.len(), 11);
        assert_eq!(ring.pop().unwrap().len(), 8);
        assert_eq!(ring.len(), 3);
    }

    #[test]
    fn where_the_oldest_make_room_the_newest_always_get_in() {
        let ring = Ring::new(10);
        for _ in 0..2 {
            assert!(ring.push_over(chunk(5)).is_empty());
        }
        let dropped = ring.push_over(chunk(3));
        assert_eq!(dropped.iter().map(Vec::len).collect::<Vec<_>>(), [5]);
        assert_eq!(ring.len(), 8);
        let dropped = ring.push_over(chunk(100));
        assert_eq!(dropped.iter().map(Vec::len).sum::<usize>(), 5);
        assert_eq!(ring.len(), 103);
    }

    #[test]
    fn a_closed_ring_takes_nothing_from_who_can_wait() {
        let ring = Ring::new(10);
        ring.set_closed(true);
        assert!(ring.push(chunk(1), 0).is_err());
        assert!(ring.push(chunk(1), 1).is_ok(), "an app can't wait");
        ring.set_closed(false);
        assert!(ring.push(chunk(1), 0).is_ok());
    }

    #[test]
    fn a_chunk_larger_than_the_ring_gets_through_alone() {
        let ring = Ring::new(10);
        assert!(ring.push(chunk(100), 0).is_ok());
        assert!(ring.push(chunk(1), 0).is_err());
        ring.pop();
        assert!(ring.push(chunk(1), 0).is_ok());
    }

    #[test]
    fn payload_bytes_are_bounded_too() {
        let ring = Ring::new(1000);
        let payload = Bytes::from(vec![0; MAX_BYTES / 3]);
        let event = Event::new(Topic::new("t").unwrap(), payload, Instant::now());
        for _ in 0..3 {
            assert!(ring.push(vec![event.clone()], 0).is_ok());
        }
        assert!(ring.push(vec![event.clone()], 0).is_err());
        ring.pop();
        assert!(ring.push(vec![event], 0).is_ok());
    }

    #[test]
    fn producers_that_wait_all_get_their_events_through() {
        let ring = Arc::new(Ring::new(16));
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .build()
            .unwrap();
        for _ in 0..4 {
            let ring = ring.clone();
            runtime.spawn(async move {
                for _ in 0..1000 {
                    let mut chunk = chunk(7);
                    while let Err(back) = ring.push(chunk, 0) {
                        chunk = back;
                        ring.room().await;
                    }
                }
            });
        }
        let deadline = Instant::now() + std::time::Duration::from_secs(60);
        let mut seen = 0;
        while seen < 4 * 1000 * 7 {
            match ring.pop() {
                Some(chunk) => seen += chunk.len(),
                None => std::thread::yield_now(),
            }
            assert!(Instant::now() < deadline, "stuck at {seen}");
        }
    }
}
