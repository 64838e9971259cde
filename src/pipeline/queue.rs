//! What waits for one outlet: a queue for each lane, bounded in events and bytes. Without I/O and locks.

use std::collections::VecDeque;
use std::time::Instant;

use super::Pressure;
use crate::event::{Batch, Event, Lane};

/// Most bytes of topics and payloads that may wait in a lane, whatever their number.
const MAX_QUEUE_BYTES: usize = 64 << 20;

/// Of so many calls in a row, a lane that has something has one, whatever comes before it.
const SHARE: u32 = 8;

/// What waits, the oldest first.
#[derive(Default)]
pub struct Queue {
    lanes: [LaneQueue; 3],
    pressure: Pressure,
}

#[derive(Default)]
struct LaneQueue {
    batches: VecDeque<Queued>,
    events: usize,
    bytes: usize,
    /// Calls in a row in which it had something and was passed over.
    passed_over: u32,
}

/// A batch, as it was handed over.
pub struct Queued {
    pub batch: Batch,
    pub bytes: usize,
    /// When it was.
    pub since: Instant,
}

impl Queue {
    /// Events that wait.
    pub fn len(&self) -> usize {
        self.lanes.iter().map(|lane| lane.events).sum()
    }

    pub fn lane_len(&self, lane: Lane) -> usize {
        self.lanes[lane as usize].events
    }

    /// Since when the oldest event of a lane has waited.
    pub fn since(&self, lane: Lane) -> Option<Instant> {
        let oldest = self.lanes[lane as usize].batches.front()?;
        Some(oldest.since)
    }

    /// Whether there is anything that [`Queue::pop`] gives out now.
    pub fn is_ready(&self) -> bool {
        Lane::ALL.into_iter().any(|lane| self.is_ready_in(lane))
    }

    fn is_ready_in(&self, lane: Lane) -> bool {
        self.lane_len(lane) > 0 && !self.stands_back(lane)
    }

    pub fn set_pressure(&mut self, pressure: Pressure) {
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
    pub fn has_room(&self, lane: Lane, events: usize, bytes: usize, bound: usize) -> bool {
        let lane = &self.lanes[lane as usize];
        lane.events == 0 || (lane.events + events <= bound && lane.bytes + bytes <= MAX_QUEUE_BYTES)
    }

    pub fn push(&mut self, lane: Lane, queued: Queued) {
        let lane = &mut self.lanes[lane as usize];
        lane.events += queued.batch.len();
        lane.bytes += queued.bytes;
        lane.batches.push_back(queued);
    }

    /// Up to `most` events that have waited longest in a lane.
    pub fn pop_oldest(&mut self, lane: Lane, most: usize) -> Option<Batch> {
        let lane = &mut self.lanes[lane as usize];
        let mut oldest = lane.batches.pop_front()?;
        if oldest.batch.len() > most {
            let rest = oldest.split_at(most);
            lane.batches.push_front(rest);
        }
        lane.events -= oldest.batch.len();
        lane.bytes -= oldest.bytes;
        Some(oldest.batch)
    }

    /// The next events for one call, all of one lane: as many whole batches as make at most `most` events;
    /// part of a batch only if it has more than `most_bytes`. A window of the batch lane is whole, and
    /// alone. Also, since when the first of them has waited.
    pub fn pop(&mut self, most: usize, most_bytes: usize) -> Option<(Batch, Instant)> {
        let mut ready = Lane::ALL.map(|lane| self.is_ready_in(lane).then_some(lane));
        let starved = |lane: &Lane| self.lanes[*lane as usize].passed_over + 1 >= SHARE;
        let last_starved = ready.into_iter().flatten().rfind(starved);
        let lane = last_starved.or(ready.into_iter().flatten().next())?;
        ready[lane as usize] = None;
        for other in ready.into_iter().flatten() {
            self.lanes[other as usize].passed_over += 1;
        }
        self.lanes[lane as usize].passed_over = 0;
        let is_window = lane == Lane::Batch;
        let lane = &mut self.lanes[lane as usize];
        let mut first = lane.batches.pop_front()?;
        if first.bytes > most_bytes
            && let Some(rest) = first.split_off(most_bytes)
        {
            lane.batches.push_front(rest);
        }
        let Queued {
            mut batch,
            mut bytes,
            since,
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
        Some((batch, since))
    }
}

impl Queued {
    pub fn new(batch: Batch) -> Queued {
        Queued {
            bytes: batch.iter().map(event_bytes).sum(),
            batch,
            since: Instant::now(),
        }
    }

    /// Keeps the first events, of at most `most` bytes together but at least one, and returns the
    /// others.
    fn split_off(&mut self, most: usize) -> Option<Queued> {
        let mut kept = 0;
        let fits = |event: &&Event| {
            kept += event_bytes(event);
            kept <= most
        };
        let count = self.batch.iter().take_while(fits).count().max(1);
        (count < self.batch.len()).then(|| self.split_at(count))
    }

    /// Keeps so many events, and returns the others.
    fn split_at(&mut self, count: usize) -> Queued {
        let batch = self.batch.split_off(count);
        let bytes = batch.iter().map(event_bytes).sum();
        self.bytes -= bytes;
        Queued {
            batch,
            bytes,
            since: self.since,
        }
    }
}

/// What an event counts as, for bounds.
pub fn event_bytes(event: &Event) -> usize {
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
        let batch = queue
            .pop(4, 1 << 20)
            .map_or_else(Batch::new, |(batch, _)| batch);
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
    fn each_lane_has_its_turn_even_if_others_always_have_something() {
        let mut queue = Queue::default();
        let mut calls = Vec::new();
        for _ in 0..3 * SHARE + 1 {
            for (lane, payload) in [
                (Lane::Realtime, "r"),
                (Lane::Transactional, "t"),
                (Lane::Batch, "b"),
            ] {
                push(&mut queue, lane, &[payload]);
            }
            calls.push(pop(&mut queue)[0].clone());
        }
        let count = |of: &str| calls.iter().filter(|lane| *lane == of).count();
        assert_eq!((count("t"), count("b")), (3, 3), "{calls:?}");
        assert_eq!(&calls[..3], ["r", "r", "r"]);
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
        assert_eq!(queue.pop_oldest(Lane::Realtime, 1).unwrap().len(), 1);
        assert_eq!(queue.lane_len(Lane::Realtime), 3);
        assert!(queue.has_room(Lane::Realtime, 1, 1, 4));
        assert_eq!(queue.pop_oldest(Lane::Realtime, 9).unwrap().len(), 3);
        assert!(queue.has_room(Lane::Realtime, 400, 1, 4), "it is empty");
    }
}
