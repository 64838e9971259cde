//! Events, topics, topic filters and batches: the words that every room shares.
//!
//! Knows nothing else of Headgate. Topic names and filters follow MQTT 5.0, section 4.7
//! (<https://docs.oasis-open.org/mqtt/mqtt/v5.0/os/mqtt-v5.0-os.html#_Toc3901241>).

mod topic;
mod trie;
pub mod via;

use std::fmt;
use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use bytes::Bytes;

pub use topic::{FilterError, Topic, TopicError, TopicFilter, matches};
pub use trie::TopicTrie;

/// One message on its way through the gateway. Cheap to clone: topic and payload are shared.
#[derive(Clone, Debug)]
pub struct Event {
    pub topic: Topic,
    pub payload: Bytes,
    /// Nanoseconds since the Unix epoch: when the gateway took the event in, or what the app that
    /// made it says.
    pub timestamp_ns: u64,
    /// When the gateway took in the event that this one goes back to. Latencies count from here.
    pub received: Instant,
    /// How many apps this event has come through. Bounds loops of apps that feed each other.
    pub hops: u8,
    pub lane: Lane,
    /// How often a batch with it that failed is tried again; none leaves that to the app.
    pub retries: Option<u8>,
    /// Kept as long as the event or a copy of it is somewhere: whoever made it is told by its end.
    pub receipt: Option<Arc<dyn Receipt>>,
}

impl Event {
    /// The sitting in which it was read, if it comes out of what the gateways of a site share.
    pub fn sitting(&self) -> Option<u64> {
        Some(self.receipt.as_ref()?.place()?.sitting)
    }

    /// An event as it comes in from outside.
    pub fn new(topic: Topic, payload: Bytes, received: Instant) -> Self {
        Event::at(topic, payload, received, unix_time_ns())
    }

    /// The same, where the wall clock has been read already.
    pub fn at(topic: Topic, payload: Bytes, received: Instant, timestamp_ns: u64) -> Self {
        Event {
            topic,
            payload,
            timestamp_ns,
            received,
            hops: 0,
            lane: Lane::default(),
            retries: None,
            receipt: None,
        }
    }
}

/// What is to happen to an event when there is more than can be handled.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum Lane {
    /// Comes before all others; what has waited longest is dropped.
    Realtime,
    /// Its publisher waits; nothing is dropped.
    #[default]
    Transactional,
    /// Comes after all others, in windows by topic; what comes last is dropped.
    Batch,
}

impl Lane {
    pub const ALL: [Lane; 3] = [Lane::Realtime, Lane::Transactional, Lane::Batch];

    pub fn as_str(self) -> &'static str {
        match self {
            Lane::Realtime => "realtime",
            Lane::Transactional => "transactional",
            Lane::Batch => "batch",
        }
    }
}

/// What tells whoever made an event that nobody has it any more.
pub trait Receipt: fmt::Debug + Send + Sync {
    /// It was dropped although somebody was to handle it yet: its end does not mean that it is finished.
    fn abandon(&self);

    /// Where it stands, if it comes out of what the gateways of a site share.
    fn place(&self) -> Option<Place> {
        None
    }
}

/// Where an event stands in what the gateways of a site share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The sitting in which it was read. Nobody handles it in another one.
    pub sitting: u64,
    /// Which stream it comes out of, as counted in that sitting, and its number there.
    pub stream: u32,
    pub number: u64,
}

/// Events that are handled together, in the order of their arrival.
pub type Batch = Vec<Event>;

/// The wall clock, in nanoseconds since the Unix epoch; 0 if it stands before that.
pub fn unix_time_ns() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_nanos() as u64)
}
