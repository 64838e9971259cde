//! What operators can see of the edge, and do about it.

use std::cmp::Reverse;
use std::sync::atomic::Ordering;
use std::time::Instant;

use rumqttd::protocol::QoS;
use rustc_hash::FxHashMap;
use serde::{Deserialize, Serialize};

use super::Broker;
use super::mailbox::Mailbox;
use super::message::SessionKey;
use super::registry::Eviction;
use crate::event::{TopicFilter, unix_time_ns};

/// One client, connected or away.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ClientInfo {
    pub client_id: String,
    pub connected: bool,
    /// Where it connects from; none while it is away.
    pub address: Option<String>,
    pub version: String,
    /// None while it is away.
    pub connected_since_unix_ms: Option<u64>,
    /// None: it has none, or is away.
    pub keep_alive_s: Option<u64>,
    /// How long its session is kept after the connection; 0: not at all.
    pub session_expiry_s: u64,
    /// When the session of one that is away ends.
    pub session_ends_unix_ms: Option<u64>,
    pub subscriptions: usize,
    /// QoS 1 and 2 messages that it has to acknowledge.
    pub inflight_messages: usize,
    /// Messages that wait for it, in memory and on disk.
    pub queued_messages: usize,
    /// Bytes of those in memory.
    pub queued_bytes: usize,
    /// Of `queued_messages`, about how many wait on disk.
    pub stored_messages: usize,
}

/// One client's subscription.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SubscriptionInfo {
    pub client_id: String,
    pub filter: String,
    /// The name of the share group, if it is one.
    pub group: Option<String>,
    pub qos: u8,
    pub no_local: bool,
    pub retain_as_published: bool,
    pub id: Option<u32>,
}

/// A retained message, without its payload.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RetainedInfo {
    pub topic: String,
    pub qos: u8,
    pub payload_bytes: usize,
    /// The payload, if it is text of at most 256 bytes.
    pub payload: Option<String>,
    /// Seconds until it is gone.
    pub expires_in_s: Option<u32>,
}

/// What was published on a topic since the start, or since the topic was first seen again.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct TopicInfo {
    pub topic: String,
    pub messages: u64,
    pub payload_bytes: u64,
}

/// Up to as many as were asked for.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Listed<T> {
    pub items: Vec<T>,
    /// There are more.
    pub truncated: bool,
}

impl<T> Listed<T> {
    fn new(mut items: Vec<T>, max: usize) -> Self {
        let truncated = items.len() > max;
        items.truncate(max);
        Listed { items, truncated }
    }
}

impl Broker {
    /// Clients by client id, with and without a connection.
    pub fn clients(&self, max: usize) -> Listed<ClientInfo> {
        let mut subscriptions: FxHashMap<SessionKey, usize> = FxHashMap::default();
        let fanout = &self.shared.fanout;
        fanout.for_each_subscription(|_, _, subscriber| {
            *subscriptions.entry(subscriber.key).or_default() += 1;
        });
        let count = |key: SessionKey| subscriptions.get(&key).copied().unwrap_or(0);
        let now = Instant::now();
        let unix_ms = unix_time_ns() / 1_000_000;
        let mut clients = Vec::new();
        let mut away = Vec::new();
        self.shared.registry.for_each(
            |client_id, details| {
                clients.push(ClientInfo {
                    client_id: client_id.to_owned(),
                    connected: true,
                    address: Some(details.peer.to_string()),
                    version: details.version.as_str().to_owned(),
                    connected_since_unix_ms: Some(details.since_unix_ms),
                    keep_alive_s: details.keep_alive.map(|keep_alive| keep_alive.as_secs()),
                    session_expiry_s: details.session_expiry.as_secs(),
                    session_ends_unix_ms: None,
                    subscriptions: count(details.key),
                    inflight_messages: details.inflight.load(Ordering::Relaxed),
                    ..ClientInfo::waiting(&details.mailbox)
                });
            },
            |client_id, parked| {
                let left = parked.expires.saturating_duration_since(now);
                away.push(ClientInfo {
                    client_id: client_id.to_owned(),
                    version: parked.session.version().as_str().to_owned(),
                    session_expiry_s: parked.session.session_expiry().as_secs(),
                    session_ends_unix_ms: Some(unix_ms.saturating_add(left.as_millis() as u64)),
                    subscriptions: count(parked.session.key()),
                    inflight_messages: parked.session.inflight(),
                    ..ClientInfo::waiting(&parked.mailbox)
                });
            },
        );
        clients.extend(away);
        clients.sort_by(|a, b| a.client_id.cmp(&b.client_id));
        Listed::new(clients, max)
    }

    /// Ends a client's connection; its session stays, if it is one that is kept. False: no client of
    /// that id is connected.
    pub fn disconnect(&self, client_id: &str) -> bool {
        self.shared.registry.evict(client_id, Eviction::ByOperator)
    }

    /// Ends the connection of a client, if it has one, and its session, on disk too. Returns whether
    /// there was either.
    pub async fn forget(&self, client_id: &str) -> bool {
        let registry = &self.shared.registry;
        let was_there = match registry.take_parked(client_id) {
            Some(parked) => {
                self.shared.end_parked(client_id, parked).await;
                true
            }
            None => {
                registry
                    .evict_and_wait(client_id, Eviction::Forgotten)
                    .await
            }
        };
        if let Some(archive) = self.shared.mailboxes.archive.as_ref().filter(|_| was_there) {
            // What can't be written is logged and counted by the archive, and is tried again.
            drop(archive.synced().await);
        }
        was_there
    }

    /// Subscriptions by client id and filter; of one client, if there is a `client_id`.
    pub fn subscriptions(&self, client_id: Option<&str>, max: usize) -> Listed<SubscriptionInfo> {
        let mut client_ids: FxHashMap<SessionKey, String> = FxHashMap::default();
        let mut found = Vec::new();
        let wanted = |id: &str| client_id.is_none_or(|wanted| wanted == id);
        let mut keys = Vec::new();
        self.shared.registry.for_each(
            |id, details| keys.push((details.key, id.to_owned())),
            |id, parked| client_ids.extend([(parked.session.key(), id.to_owned())]),
        );
        client_ids.extend(keys);
        let fanout = &self.shared.fanout;
        fanout.for_each_subscription(|group, filter, subscriber| {
            // A client that has just gone has none.
            let Some(id) = client_ids.get(&subscriber.key).filter(|id| wanted(id)) else {
                return;
            };
            let options = subscriber.options;
            found.push(SubscriptionInfo {
                client_id: id.clone(),
                filter: filter.to_owned(),
                group: group.map(str::to_owned),
                qos: options.qos as u8,
                no_local: options.no_local,
                retain_as_published: options.retain_as_published,
                id: options.id,
            });
        });
        found.sort_by(|a, b| (&a.client_id, &a.filter).cmp(&(&b.client_id, &b.filter)));
        Listed::new(found, max)
    }

    /// Retained messages under `filter`, by topic.
    pub fn retained(&self, filter: &TopicFilter, max: usize) -> Listed<RetainedInfo> {
        const SHOWN_BYTES: usize = 256;
        let now = Instant::now();
        let mut found = Vec::new();
        self.shared.fanout.for_each_retained(filter, |message| {
            let text = std::str::from_utf8(&message.payload).ok();
            let payload = text.filter(|text| text.len() <= SHOWN_BYTES);
            if !message.is_expired(now) {
                found.push(RetainedInfo {
                    topic: message.topic.to_string(),
                    qos: message.qos as u8,
                    payload_bytes: message.payload.len(),
                    payload: payload.map(str::to_owned),
                    expires_in_s: message.expires_in(now),
                });
            }
        });
        found.sort_by(|a, b| a.topic.cmp(&b.topic));
        Listed::new(found, max)
    }

    /// Topics under `filter`, those with the most messages first.
    pub fn topics(&self, filter: &TopicFilter, max: usize) -> Listed<TopicInfo> {
        let mut found = Vec::new();
        self.shared.fanout.for_each_topic(|topic, traffic| {
            if filter.matches(topic.as_str()) {
                found.push(TopicInfo {
                    topic: topic.to_string(),
                    messages: traffic.messages.load(Ordering::Relaxed),
                    payload_bytes: traffic.bytes.load(Ordering::Relaxed),
                });
            }
        });
        found.sort_by(|a, b| (Reverse(a.messages), &a.topic).cmp(&(Reverse(b.messages), &b.topic)));
        Listed::new(found, max)
    }
}

impl ClientInfo {
    /// What a mailbox says; the rest as of a client that is away.
    fn waiting(mailbox: &Mailbox) -> ClientInfo {
        let (messages, bytes, stored) = mailbox.lengths();
        ClientInfo {
            client_id: String::new(),
            connected: false,
            address: None,
            version: String::new(),
            connected_since_unix_ms: None,
            keep_alive_s: None,
            session_expiry_s: 0,
            session_ends_unix_ms: None,
            subscriptions: 0,
            inflight_messages: 0,
            queued_messages: messages + stored,
            queued_bytes: bytes,
            stored_messages: stored,
        }
    }
}

const _: () = assert!(QoS::ExactlyOnce as u8 == 2, "shown as MQTT writes it");
