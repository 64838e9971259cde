//! When a batch closes: a state machine without a clock.

use std::time::{Duration, Instant};

use crate::event::{Batch, Event};

/// Collects the events of one outlet. A batch closes when it is full, when its oldest event has
/// waited for the longest delay, or as soon as the outlet has nothing to do: a lone event never
/// waits for company.
#[derive(Debug)]
pub struct Batcher {
    pending: Batch,
    /// When the oldest event in `pending` came.
    opened: Option<Instant>,
    max_events: usize,
    max_delay: Duration,
}

impl Batcher {
    pub fn new(max_events: usize, max_delay: Duration) -> Self {
        Batcher {
            pending: Batch::new(),
            opened: None,
            max_events,
            max_delay,
        }
    }

    /// Adds an event. The caller takes the batch when [`Batcher::is_full`].
    pub fn push(&mut self, event: Event, now: Instant) {
        self.opened.get_or_insert(now);
        self.pending.push(event);
    }

    pub fn is_empty(&self) -> bool {
        self.pending.is_empty()
    }

    pub fn is_full(&self) -> bool {
        self.pending.len() >= self.max_events
    }

    /// Whether the batch is to be handed over now.
    pub fn is_due(&self, now: Instant, outlet_is_idle: bool) -> bool {
        !self.is_empty()
            && (outlet_is_idle
                || self.is_full()
                || self.deadline().is_some_and(|deadline| deadline <= now))
    }

    /// When the batch is due even if nothing else happens.
    pub fn deadline(&self) -> Option<Instant> {
        self.opened.map(|opened| opened + self.max_delay)
    }

    /// The batch so far; the next one begins.
    pub fn take(&mut self) -> Batch {
        self.opened = None;
        // After a full one comes another, most likely: it need not grow step by step.
        let expected = if self.is_full() { self.max_events } else { 0 };
        std::mem::replace(&mut self.pending, Batch::with_capacity(expected))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::Topic;
    use bytes::Bytes;

    fn event(now: Instant) -> Event {
        Event::new(Topic::new("t").unwrap(), Bytes::new(), now)
    }

    #[test]
    fn a_lone_event_does_not_wait_for_an_idle_outlet() {
        let now = Instant::now();
        let mut batcher = Batcher::new(64, Duration::from_millis(1));
        assert!(!batcher.is_due(now, true));
        batcher.push(event(now), now);
        assert!(batcher.is_due(now, true));
        assert!(!batcher.is_due(now, false));
    }

    #[test]
    fn a_batch_closes_when_full_or_when_its_oldest_event_has_waited_long_enough() {
        let now = Instant::now();
        let delay = Duration::from_millis(1);
        let mut batcher = Batcher::new(2, delay);
        batcher.push(event(now), now);
        assert_eq!(batcher.deadline(), Some(now + delay));
        assert!(!batcher.is_due(now + delay / 2, false));
        assert!(batcher.is_due(now + delay, false));
        batcher.push(event(now), now + delay / 2);
        assert!(batcher.is_full() && batcher.is_due(now + delay / 2, false));
        assert_eq!(batcher.take().len(), 2);
        assert!(batcher.is_empty());
        assert_eq!(batcher.deadline(), None);
    }
}
