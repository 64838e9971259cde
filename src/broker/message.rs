//! A published message as it travels from the publisher's session to the subscribers'.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use rumqttd::protocol::{PublishProperties, QoS};

use super::share_group::ShareGroup;
use crate::event::Topic;

/// Tells the sessions of one run of the gateway apart. Client ids are reused, these are not.
pub type SessionKey = u64;

/// The publisher of what apps and the gateway itself send.
pub const NO_SESSION: SessionKey = 0;

/// One published message. Shared by all who get it.
#[derive(Debug)]
pub struct Message {
    pub topic: Topic,
    pub payload: Bytes,
    /// As published. A subscriber gets the lower of this and its subscription's.
    pub qos: QoS,
    pub retain: bool,
    pub publisher: SessionKey,
    /// Without topic alias, expiry and subscription ids: these are each session's own.
    pub properties: Option<Box<PublishProperties>>,
    /// From when on nobody is to get it any more (MQTT 5.0, 3.3.2.3.3).
    pub expires: Option<Instant>,
}

impl Message {
    /// A QoS 0 message of the gateway's own.
    pub fn new(topic: Topic, payload: Bytes) -> Self {
        Message {
            topic,
            payload,
            qos: QoS::AtMostOnce,
            retain: false,
            publisher: NO_SESSION,
            properties: None,
            expires: None,
        }
    }

    /// The memory that it holds while queued, in bytes, near enough for a limit.
    pub fn queued_bytes(&self) -> usize {
        const OVERHEAD: usize = size_of::<Message>() + size_of::<Delivery>();
        let properties = self.properties.as_ref().map_or(0, |properties| {
            let user = properties.user_properties.iter();
            size_of::<PublishProperties>()
                + user
                    .map(|(key, value)| key.len() + value.len())
                    .sum::<usize>()
                + properties.correlation_data.as_ref().map_or(0, Bytes::len)
                + properties.response_topic.as_ref().map_or(0, String::len)
                + properties.content_type.as_ref().map_or(0, String::len)
        });
        OVERHEAD + self.topic.as_str().len() + self.payload.len() + properties
    }

    /// The first user property of this name.
    pub fn user_property(&self, name: &str) -> Option<&str> {
        let mut properties = self.properties.iter().flat_map(|all| &all.user_properties);
        let (_, value) = properties.find(|(key, _)| key == name)?;
        Some(value)
    }

    pub fn is_expired(&self, now: Instant) -> bool {
        self.expires.is_some_and(|expires| expires <= now)
    }

    /// Whole seconds of life left, rounded up.
    pub fn expires_in(&self, now: Instant) -> Option<u32> {
        self.expires.map(|expires| {
            let left = expires.saturating_duration_since(now) + Duration::from_millis(999);
            left.as_secs() as u32
        })
    }
}

/// A message on its way to one subscriber.
#[derive(Clone, Debug)]
pub struct Delivery {
    pub message: Arc<Message>,
    /// The lower of the message's and the subscription's.
    pub qos: QoS,
    pub retain: bool,
    /// Of all the subscriber's subscriptions that match and have one.
    pub subscription_ids: Option<Arc<[u32]>>,
    /// The share group that it was sent to, of which the subscriber is a member.
    pub group: Option<Arc<ShareGroup>>,
    /// Its place in the order of what is sent to a session that is kept, and its name in the
    /// archive. Given by the mailbox, to QoS 1 and 2 messages.
    pub sequence: u64,
    /// It is in the archive.
    pub is_stored: bool,
}
