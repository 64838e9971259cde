//! How batches cross between app and gateway.

pub use crate::bindings::headgate::app::types::EventColumns as Columns;

use crate::Event;

/// Makes events of columns. The gateway's always fit each other.
pub fn split(columns: &Columns) -> Vec<Event> {
    let (mut topics, mut payloads) = (&*columns.topics, &*columns.payloads);
    let (mut topic_end, mut payload_end) = (0, 0);
    let ends = columns.topic_ends.iter().zip(&columns.payload_ends);
    ends.zip(&columns.timestamps)
        .map(|((&topic, &payload), &timestamp)| {
            let event;
            (event, topics) = topics.split_at((topic - topic_end) as usize);
            let bytes;
            (bytes, payloads) = payloads.split_at((payload - payload_end) as usize);
            (topic_end, payload_end) = (topic, payload);
            Event {
                topic: event.to_owned(),
                payload: bytes.to_owned(),
                timestamp,
            }
        })
        .collect()
}

/// Makes columns of events.
pub fn join(events: Vec<Event>) -> Columns {
    let topics = events.iter().map(|event| event.topic.len()).sum();
    let payloads = events.iter().map(|event| event.payload.len()).sum();
    let mut columns = Columns {
        topics: String::with_capacity(topics),
        topic_ends: Vec::with_capacity(events.len()),
        payloads: Vec::with_capacity(payloads),
        payload_ends: Vec::with_capacity(events.len()),
        timestamps: Vec::with_capacity(events.len()),
    };
    for event in events {
        columns.topics.push_str(&event.topic);
        columns.payloads.extend_from_slice(&event.payload);
        // A module's memory has 4 GiB.
        columns.topic_ends.push(columns.topics.len() as u32);
        columns.payload_ends.push(columns.payloads.len() as u32);
        columns.timestamps.push(event.timestamp);
    }
    columns
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_the_same_after_columns() {
        let event = |topic: &str, payload: &[u8], timestamp| Event {
            topic: topic.into(),
            payload: payload.into(),
            timestamp,
        };
        let events = vec![
            event("a/\u{e4}", b"\0\xff", 7),
            event("b", b"", u64::MAX),
            event("", b"xyz", 0),
        ];
        assert_eq!(split(&join(events.clone())), events);
        assert_eq!(split(&join(Vec::new())), []);
    }
}
