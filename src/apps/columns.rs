//! Batches of events, column by column: the way in and out of an app that costs least. Each column
//! crosses in one copy, and the app allocates once for it instead of twice for each event.

use std::borrow::Cow;

use wasmtime::component::{ComponentType, Lift, Lower};

use super::host::EventOut;
use crate::event::Event;

/// Most bytes of a buffer that an instance keeps between its calls.
const KEPT_BYTES: usize = 64 << 10;

/// `event-columns` on its way into an app.
#[derive(Clone, Copy, ComponentType, Lower)]
#[component(record)]
pub(super) struct ColumnsIn<'a> {
    topics: &'a str,
    #[component(name = "topic-ends")]
    topic_ends: &'a [u32],
    payloads: &'a [u8],
    #[component(name = "payload-ends")]
    payload_ends: &'a [u32],
    timestamps: &'a [u64],
}

/// `event-columns` as an app hands it out.
#[derive(Clone, ComponentType, Lift)]
#[component(record)]
pub(super) struct ColumnsOut {
    topics: String,
    #[component(name = "topic-ends")]
    topic_ends: Vec<u32>,
    payloads: Vec<u8>,
    #[component(name = "payload-ends")]
    payload_ends: Vec<u32>,
    timestamps: Vec<u64>,
}

/// Where the columns of a batch are put together.
#[derive(Default)]
pub(super) struct ColumnBuffers {
    topics: String,
    topic_ends: Vec<u32>,
    payloads: Vec<u8>,
    payload_ends: Vec<u32>,
    timestamps: Vec<u64>,
}

impl ColumnBuffers {
    pub(super) fn fill(&mut self, batch: &[Event]) -> ColumnsIn<'_> {
        self.topics.clear();
        self.payloads.clear();
        self.topics.shrink_to(KEPT_BYTES);
        self.payloads.shrink_to(KEPT_BYTES);
        self.topic_ends.clear();
        self.payload_ends.clear();
        self.timestamps.clear();
        for event in batch {
            self.topics.push_str(event.topic.as_str());
            self.payloads.extend_from_slice(&event.payload);
            // A call gets no more than fits into the memory of a module, which has 4 GiB.
            self.topic_ends.push(self.topics.len() as u32);
            self.payload_ends.push(self.payloads.len() as u32);
            self.timestamps.push(event.timestamp_ns);
        }
        ColumnsIn {
            topics: &self.topics,
            topic_ends: &self.topic_ends,
            payloads: &self.payloads,
            payload_ends: &self.payload_ends,
            timestamps: &self.timestamps,
        }
    }
}

impl ColumnsOut {
    /// Says what is wrong with the columns, if something is.
    pub(super) fn check(&self) -> Result<(), &'static str> {
        let count = self.timestamps.len();
        if self.topic_ends.len() != count || self.payload_ends.len() != count {
            return Err("the columns are not of one length");
        }
        let topics = self.topics.as_str();
        let (mut topic_start, mut payload_start) = (0, 0);
        for (&topic_end, &payload_end) in self.topic_ends.iter().zip(&self.payload_ends) {
            let (topic_end, payload_end) = (topic_end as usize, payload_end as usize);
            let fits = topic_start <= topic_end
                && topics.is_char_boundary(topic_end)
                && payload_start <= payload_end
                && payload_end <= self.payloads.len();
            if !fits {
                return Err("an entry of the columns does not end where it can");
            }
            (topic_start, payload_start) = (topic_end, payload_end);
        }
        match topic_start == topics.len() && payload_start == self.payloads.len() {
            true => Ok(()),
            false => Err("the columns hold more than their events"),
        }
    }

    /// The events in columns that were checked. None is copied before somebody takes it.
    pub(super) fn events(&self) -> impl ExactSizeIterator<Item = EventOut<'_>> {
        let (mut topic_start, mut payload_start) = (0, 0);
        let ends = self.topic_ends.iter().zip(&self.payload_ends);
        let ends = ends.zip(&self.timestamps);
        ends.map(move |((&topic_end, &payload_end), &timestamp)| {
            let topic = topic_start..topic_end as usize;
            let payload = payload_start..payload_end as usize;
            (topic_start, payload_start) = (topic.end, payload.end);
            EventOut {
                topic: Cow::Borrowed(&self.topics[topic]),
                payload: Cow::Borrowed(&self.payloads[payload]),
                timestamp,
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use proptest::prelude::*;

    use super::*;
    use crate::event::Topic;

    fn handed_out(
        topics: &str,
        topic_ends: &[u32],
        payloads: &[u8],
        payload_ends: &[u32],
        timestamps: &[u64],
    ) -> ColumnsOut {
        ColumnsOut {
            topics: topics.into(),
            topic_ends: topic_ends.into(),
            payloads: payloads.into(),
            payload_ends: payload_ends.into(),
            timestamps: timestamps.into(),
        }
    }

    #[test]
    fn wrong_columns_are_refused() {
        let length = "the columns are not of one length";
        let end = "an entry of the columns does not end where it can";
        let more = "the columns hold more than their events";
        for (columns, why) in [
            (handed_out("a", &[1], b"", &[0], &[]), length),
            (handed_out("a", &[], b"", &[0], &[0]), length),
            (handed_out("a", &[1], b"", &[], &[0]), length),
            (handed_out("a", &[2], b"", &[0], &[0]), end),
            (handed_out("a", &[1], b"", &[u32::MAX], &[0]), end),
            (handed_out("ab", &[2, 1], b"", &[0, 0], &[0, 0]), end),
            (handed_out("ab", &[1, 2], b"xy", &[2, 1], &[0, 0]), end),
            (handed_out("\u{e4}", &[1, 2], b"", &[0, 0], &[0, 0]), end),
            (handed_out("ab", &[1], b"", &[0], &[0]), more),
            (handed_out("a", &[1], b"x", &[0], &[0]), more),
            (handed_out("a", &[], b"", &[], &[]), more),
        ] {
            assert_eq!(columns.check(), Err(why), "{:?}", columns.topics);
        }
        let none = handed_out("", &[], b"", &[], &[]);
        assert_eq!((none.check(), none.events().count()), (Ok(()), 0));
    }

    proptest! {
        #[test]
        fn events_come_out_as_they_went_in(
            events in prop::collection::vec(("[a-z\u{e4}/]{1,9}", any::<Vec<u8>>(), any::<u64>()), 0..9)
        ) {
            let batch: Vec<_> = events
                .iter()
                .map(|(topic, payload, timestamp)| Event {
                    timestamp_ns: *timestamp,
                    ..Event::new(
                        Topic::new(topic.clone()).unwrap(),
                        payload.clone().into(),
                        Instant::now(),
                    )
                })
                .collect();
            let mut buffers = ColumnBuffers::default();
            buffers.fill(&batch);
            let columns = buffers.fill(&batch);
            let columns = handed_out(
                columns.topics,
                columns.topic_ends,
                columns.payloads,
                columns.payload_ends,
                columns.timestamps,
            );
            prop_assert_eq!(columns.check(), Ok(()));
            let out: Vec<_> = columns
                .events()
                .map(|event| (event.topic.into(), event.payload.into(), event.timestamp))
                .collect();
            prop_assert_eq!(out, events);
        }
    }
}
