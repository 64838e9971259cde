//! What waits for one app: a queue for each lane, bounded in events and bytes. Without I/O and locks.

use std::collections::VecDeque;

use crate::event::{Batch, Event, Lane};
use crate::pipeline::Pressure;

/// Most bytes of topics and payloads that may wait in a lane, whatever their number.
const MAX_QUEUE_BYTES: usize = 64 << 20;

/// Where all lanes have something, the batch lane has one call of so many.
const BATCH_LANE_SHARE: u32 = 8;

/// What waits, the oldest first.
#[derive(Default)]
pub(super) struct Queue {
    lanes: [LaneQueue; 3],
    /// Calls in a row in which the batch lane had to wait.
    passed_over: u32,
    pressure: Pressure,
}

#[derive(Default)]
struct LaneQueue {
    batches: VecDeque<Queued>,
    events: usize,
    bytes: usize,
}

/// A batch, as it was handed over.
pub(super) struct Queued {
    pub(super) batch: Batch,
    pub(super) bytes: usize,
}

impl Queue {
    /// Events that wait.
    pub(super) fn len(&self) -> usize {
        self.lanes.iter().map(|lane| lane.events).sum()
    }

    pub(super) fn lane_len(&self, lane: Lane) -> usize {
        self.lanes[lane as usize].events
    }

    pub(super) fn oldest(&self, lane: Lane) -> Option<&Event> {
        self.lanes[lane as usize].batches.front()?.batch.first()
    }

    /// Whether there is anything that [`Queue::pop`] gives out now.
    pub(super) fn is_ready(&self) -> bool {
        Lane::ALL
            .into_iter()
            .any(|lane| self.lane_len(lane) > 0 && !self.stands_back(lane))
    }

    pub(super) fn set_pressure(&mut self, pressure: Pressure) {
        self.pressure = pressure;
    }

    fn stands_back(&self, lane: Lane) -> bool {
        match lane {
            Lane::Realtime => false,
            Lane::Transactional => self.pressure >= Pressure::Critical,
            Lane::Batch => self.pressure >= Pressure::Degraded,
        }
    }

    /// A batch that is larger than the whole queue is taken when the queue is empty.
    pub(super) fn has_room(&self, lane: Lane, events: usize, bytes: usize, bound: usize) -> bool {
        let lane = &self.lanes[lane as usize];
        lane.events == 0 || (lane.events + events <= bound && lane.bytes + bytes <= MAX_QUEUE_BYTES)
    }

    pub(super) fn push(&mut self, lane: Lane, queued: Queued) {
        let lane = &mut self.lanes[lane as usize];
        lane.events += queued.batch.len();
        lane.bytes += queued.bytes;
        lane.batches.push_back(queued);
    }

    /// What has waited longest in a lane.
    pub(super) fn pop_oldest(&mut self, lane: Lane) -> Option<Batch> {
        let lane = &mut self.lanes[lane as usize];
        let oldest = lane.batches.pop_front()?;
        lane.events -= oldest.batch.len();
        lane.bytes -= oldest.bytes;
        Some(oldest.batch)
    }

    /// The next events for one call, all of one lane: as many whole batches as make at most `most` events;
    /// part of a batch only if it has more than `most_bytes`. A window of the batch lane is whole, and
    /// alone.
    pub(super) fn pop(&mut self, most: usize, most_bytes: usize) -> Option<Batch> {
        let has = |lane| self.lane_len(lane) > 0 && !self.stands_back(lane);
        let lane = if has(Lane::Realtime) {
            Lane::Realtime
        } else if has(Lane::Transactional)
            && !(has(Lane::Batch) && self.passed_over + 1 >= BATCH_LANE_SHARE)
        {
            Lane::Transactional
        } else if has(Lane::Batch) {
            Lane::Batch
        } else {
            return None;
        };
        self.passed_over = match lane {
            Lane::Batch => 0,
            _ if self.lane_len(Lane::Batch) > 0 => self.passed_over.saturating_add(1),
            _ => 0,
        };
        let is_window = lane == Lane::Batch;
        let lane = &mut self.lanes[lane as usize];
        let mut first = lane.batches.pop_front()?;
        if first.bytes > most_bytes
            && let Some(rest) = first.split(most_bytes)
        {
            lane.batches.push_front(rest);
        }
        let Queued {
            mut batch,
            mut bytes,
        } = first;
        while !is_window
            && let Some(next) = lane.batches.front()
            && batch.len() + next.batch.len() <= most
            && bytes + next.bytes <= most_bytes
            && let Some(next) = lane.batches.pop_front()
        {
            batch.extend(next.batch);
            bytes += next.bytes;
        }
        lane.events -= batch.len();
        lane.bytes -= bytes;
        Some(batch)
    }

    /// Forgets all that waits. Returns how many events that were.
    pub(super) fn clear(&mut self) -> usize {
        let events = self.len();
        self.lanes = Default::default();
        events
    }
}

impl Queued {
    pub(super) fn new(batch: Batch) -> Queued {
        Queued {
            bytes: batch.iter().map(event_bytes).sum(),
            batch,
        }
    }

    /// Keeps the first events, of at most `most` bytes together but at least one, and returns the
    /// others.
    fn split(&mut self, most: usize) -> Option<Queued> {
        let mut kept = 0;
        let fits = |event: &&Event| {
            kept += event_bytes(event);
            kept <= most
        };
        let count = self.batch.iter().take_while(fits).count().max(1);
        if count == self.batch.len() {
            return None;
        }
        let batch = self.batch.split_off(count);
        let bytes = batch.iter().map(event_bytes).sum();
        self.bytes -= bytes;
        Some(Queued { batch, bytes })
    }
}

/// What an event counts as, for bounds.
pub(super) fn event_bytes(event: &Event) -> usize {
    event.topic.as_str().len() + event.payload.len()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::Topic;
    use bytes::Bytes;
    use std::time::Instant;

    /// Events with their lane's initial and a number as payload.
    fn push(queue: &mut Queue, lane: Lane, payloads: &[&'static str]) {
        let event = |payload: &&'static str| Event {
            lane,
            ..Event::new(
                Topic::new("t").unwrap(),
                Bytes::from_static(payload.as_bytes()),
                Instant::now(),
            )
        };
        queue.push(lane, Queued::new(payloads.iter().map(event).collect()));
    }

    fn pop(queue: &mut Queue) -> Vec<String> {
        let batch = queue.pop(4, 1 << 20).unwrap_or_default();
        let payloads = batch.iter().map(|event| event.payload.to_vec());
        payloads.map(|p| String::from_utf8(p).unwrap()).collect()
    }

    #[test]
    fn realtime_comes_first_and_the_lanes_do_not_mix() {
        let mut queue = Queue::default();
        push(&mut queue, Lane::Batch, &["b1"]);
        push(&mut queue, Lane::Transactional, &["t1", "t2"]);
        push(&mut queue, Lane::Transactional, &["t3"]);
        push(&mut queue, Lane::Realtime, &["r1"]);
        assert_eq!(queue.len(), 5);
        assert_eq!(pop(&mut queue), ["r1"]);
        assert_eq!(pop(&mut queue), ["t1", "t2", "t3"]);
        assert_eq!(pop(&mut queue), ["b1"]);
        assert!(pop(&mut queue).is_empty() && queue.len() == 0);
    }

    #[test]
    fn the_batch_lane_has_its_turn_even_if_others_always_have_something() {
        let mut queue = Queue::default();
        push(&mut queue, Lane::Batch, &["b1"]);
        let mut calls = 0;
        loop {
            push(&mut queue, Lane::Transactional, &["t"]);
            calls += 1;
            if pop(&mut queue) == ["b1"] {
                break;
            }
            assert!(calls < 100);
        }
        assert_eq!(calls, BATCH_LANE_SHARE);
    }

    #[test]
    fn a_window_is_one_call_however_large() {
        let mut queue = Queue::default();
        push(&mut queue, Lane::Batch, &["b1"; 10]);
        push(&mut queue, Lane::Batch, &["b2"]);
        assert_eq!(pop(&mut queue).len(), 10);
        assert_eq!(pop(&mut queue), ["b2"]);
    }

    #[test]
    fn under_pressure_lanes_stand_back_and_lose_nothing() {
        let mut queue = Queue::default();
        push(&mut queue, Lane::Batch, &["b"]);
        push(&mut queue, Lane::Transactional, &["t"]);
        queue.set_pressure(Pressure::Critical);
        assert!(!queue.is_ready() && pop(&mut queue).is_empty());
        queue.set_pressure(Pressure::Degraded);
        assert_eq!(pop(&mut queue), ["t"]);
        assert!(!queue.is_ready() && pop(&mut queue).is_empty());
        queue.set_pressure(Pressure::Healthy);
        assert_eq!(pop(&mut queue), ["b"]);
    }

    #[test]
    fn each_lane_has_a_bound_of_its_own() {
        let mut queue = Queue::default();
        push(&mut queue, Lane::Realtime, &["r"; 4]);
        assert!(!queue.has_room(Lane::Realtime, 1, 1, 4));
        assert!(queue.has_room(Lane::Transactional, 4, 1, 4));
        assert_eq!(queue.pop_oldest(Lane::Realtime).unwrap().len(), 4);
        assert!(queue.has_room(Lane::Realtime, 400, 1, 4), "it is empty");
    }
}
