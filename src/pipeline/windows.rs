//! The batch lane's windows: the events of one topic, until there are enough of them or the oldest has
//! waited long enough. A state machine without a clock.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::{Duration, Instant};

use rustc_hash::FxHashMap;

use crate::event::{Batch, Event, Topic};

impl Default for WindowLimits {
    fn default() -> Self {
        WindowLimits {
            events: 1_000,
            bytes: 256 << 10,
            age: Duration::from_secs(5),
        }
    }
}

/// When a window closes: as soon as one of these is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WindowLimits {
    pub events: usize,
    /// Of payloads.
    pub bytes: usize,
    /// Of its oldest event.
    pub age: Duration,
}

/// All windows that are open.
#[derive(Debug, Default)]
pub struct Windows {
    open: FxHashMap<Topic, Window>,
    /// When windows are due, and the number of each. Some have closed since.
    due: BinaryHeap<Reverse<(Instant, u64, Topic)>>,
    events: usize,
    /// Of payloads.
    bytes: usize,
    next_number: u64,
}

#[derive(Debug)]
struct Window {
    number: u64,
    limits: WindowLimits,
    events: Batch,
    bytes: usize,
}

impl Windows {
    /// Adds an event to the window of its topic, which begins with it if there is none. Returns the
    /// window's events if it is full now.
    /// `limits` says when a window that begins is to close.
    pub fn push(
        &mut self,
        event: Event,
        now: Instant,
        limits: impl FnOnce(&Topic) -> WindowLimits,
    ) -> Option<Batch> {
        let topic = event.topic.clone();
        let window = self.open.entry(topic.clone()).or_insert_with(|| {
            let limits = limits(&topic);
            self.next_number += 1;
            let due = now + limits.age;
            self.due
                .push(Reverse((due, self.next_number, topic.clone())));
            Window {
                number: self.next_number,
                limits,
                events: Batch::new(),
                bytes: 0,
            }
        });
        window.bytes += event.payload.len();
        self.bytes += event.payload.len();
        window.events.push(event);
        self.events += 1;
        let limits = window.limits;
        let is_full = window.events.len() >= limits.events || window.bytes >= limits.bytes;
        is_full.then(|| self.close(&topic)).flatten()
    }

    /// A window that is due.
    pub fn pop_due(&mut self, now: Instant) -> Option<Batch> {
        while self.next_due()? <= now {
            if let Some(window) = self.pop_first() {
                return Some(window);
            }
        }
        None
    }

    /// The window that is due next.
    pub fn pop_oldest(&mut self) -> Option<Batch> {
        while self.events > 0 {
            if let Some(window) = self.pop_first() {
                return Some(window);
            }
        }
        None
    }

    /// The window that is due first, unless it has closed before.
    fn pop_first(&mut self) -> Option<Batch> {
        let Reverse((_, number, topic)) = self.due.pop()?;
        let window = self.open.get(&topic)?;
        (window.number == number)
            .then(|| self.close(&topic))
            .flatten()
    }

    /// When [`Windows::pop_due`] is to be asked again. There may be nothing then.
    pub fn next_due(&self) -> Option<Instant> {
        self.due.peek().map(|Reverse((due, ..))| *due)
    }

    /// Events in all windows.
    pub fn len(&self) -> usize {
        self.events
    }

    /// Bytes of payloads in all windows.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    fn close(&mut self, topic: &Topic) -> Option<Batch> {
        let window = self.open.remove(topic)?;
        self.events -= window.events.len();
        self.bytes -= window.bytes;
        // Windows that fill up long before their time would leave more and more here.
        if self.due.len() > 2 * self.open.len() + 64 {
            let open = &self.open;
            self.due.retain(|Reverse((_, number, topic))| {
                open.get(topic)
                    .is_some_and(|window| window.number == *number)
            });
        }
        Some(window.events)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;

    const LIMITS: WindowLimits = WindowLimits {
        events: 3,
        bytes: 100,
        age: Duration::from_secs(5),
    };

    fn event(topic: &'static str, bytes: usize, now: Instant) -> Event {
        Event::new(Topic::new(topic).unwrap(), Bytes::from(vec![0; bytes]), now)
    }

    #[test]
    fn a_window_closes_when_it_has_enough_events_of_its_topic() {
        let now = Instant::now();
        let mut windows = Windows::default();
        for topic in ["a", "b", "a"] {
            assert!(
                windows
                    .push(event(topic, 1, now), now, |_| LIMITS)
                    .is_none()
            );
        }
        let full = windows.push(event("a", 1, now), now, |_| LIMITS).unwrap();
        assert_eq!(full.len(), 3);
        assert!(full.iter().all(|event| event.topic.as_str() == "a"));
        assert_eq!(windows.len(), 1);
    }

    #[test]
    fn a_window_closes_when_it_has_enough_bytes() {
        let now = Instant::now();
        let mut windows = Windows::default();
        assert!(windows.push(event("a", 60, now), now, |_| LIMITS).is_none());
        let full = windows.push(event("a", 60, now), now, |_| LIMITS).unwrap();
        assert_eq!(full.len(), 2);
    }

    #[test]
    fn an_idle_window_closes_when_its_oldest_event_has_waited_long_enough() {
        let start = Instant::now();
        let later = start + Duration::from_secs(3);
        let mut windows = Windows::default();
        windows.push(event("a", 1, start), start, |_| LIMITS);
        windows.push(event("b", 1, later), later, |_| LIMITS);
        windows.push(event("a", 1, later), later, |_| LIMITS);
        assert_eq!(windows.next_due(), Some(start + LIMITS.age));
        let just_before = start + LIMITS.age - Duration::from_nanos(1);
        assert!(windows.pop_due(just_before).is_none());
        assert_eq!(windows.pop_due(start + LIMITS.age).unwrap().len(), 2);
        assert!(windows.pop_due(start + LIMITS.age).is_none());
        assert_eq!(windows.pop_due(later + LIMITS.age).unwrap().len(), 1);
        assert_eq!(
            (windows.len(), windows.bytes(), windows.next_due()),
            (0, 0, None)
        );
    }

    #[test]
    fn a_window_that_was_full_does_not_close_the_next_one_of_its_topic() {
        let start = Instant::now();
        let later = start + Duration::from_secs(3);
        let mut windows = Windows::default();
        for _ in 0..3 {
            windows.push(event("a", 1, start), start, |_| LIMITS);
        }
        windows.push(event("a", 1, later), later, |_| LIMITS);
        assert!(windows.pop_due(start + LIMITS.age).is_none());
        assert_eq!(windows.pop_due(later + LIMITS.age).unwrap().len(), 1);
    }

    #[test]
    fn windows_that_fill_up_leave_nothing_behind() {
        let now = Instant::now();
        let mut windows = Windows::default();
        for _ in 0..10_000 {
            windows.push(event("a", 1, now), now, |_| LIMITS);
        }
        assert!(windows.due.len() <= 128, "{}", windows.due.len());
    }
}
