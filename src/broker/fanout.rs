//! Who gets a message: subscriptions, retained messages, and the way into the subscribers'
//! mailboxes.
//!
//! This is the broker's own fan-out and not rumqttd's router; `docs/architecture.md` has the
//! measurements behind that.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use parking_lot::{Mutex, RwLock};
use rumqttd::protocol::QoS;
use rustc_hash::FxHashMap;

use super::mailbox::Mailbox;
use super::message::{Delivery, Message, SessionKey};
use super::retained::RetainedTree;
use super::session::{Subscription, lower};
use crate::event::{Topic, TopicFilter, TopicTrie};

/// Matched topics that one publisher remembers.
const CACHED_TOPICS: usize = 1024;

/// Distinct lists of targets that one publisher remembers, so that topics with the same subscribers
/// share one list and go into the mailboxes together.
const CACHED_LISTS: usize = 16;

/// Everything that subscriptions and retained messages need, shared by all connections.
#[derive(Debug)]
pub struct Fanout {
    subscriptions: RwLock<TopicTrie<Subscriber>>,
    /// Counts up with each change of `subscriptions`, so that caches know when they are stale.
    generation: AtomicU64,
    retained: Mutex<Retained>,
    pub delivered: AtomicU64,
}

#[derive(Debug)]
struct Retained {
    tree: RetainedTree,
    max: usize,
}

#[derive(Clone, Debug)]
struct Subscriber {
    key: SessionKey,
    mailbox: Arc<Mailbox>,
    qos: QoS,
    no_local: bool,
    retain_as_published: bool,
    id: Option<u32>,
}

/// One client that gets the messages of a topic, all its matching subscriptions taken together.
#[derive(Debug)]
struct Target {
    /// Of the session that `mailbox` belongs to.
    key: SessionKey,
    mailbox: Arc<Mailbox>,
    qos: QoS,
    /// All matching subscriptions say no-local.
    no_local: bool,
    retain_as_published: bool,
    ids: Option<Arc<[u32]>>,
}

/// The session's key stands for its mailbox.
impl PartialEq for Target {
    fn eq(&self, other: &Self) -> bool {
        let rest = |target: &Target| {
            (
                target.key,
                target.qos,
                target.no_local,
                target.retain_as_published,
            )
        };
        rest(self) == rest(other) && self.ids == other.ids
    }
}

/// A retained message found no place.
#[derive(Debug, thiserror::Error)]
#[error(
    "a message is not retained: there are {max} already; raise mqtt.max_retained_messages or \
     delete some by publishing an empty retained message"
)]
pub struct RetainedFull {
    max: usize,
}

impl Fanout {
    pub fn new(max_retained: usize) -> Self {
        Fanout {
            subscriptions: RwLock::default(),
            generation: AtomicU64::new(1),
            retained: Mutex::new(Retained {
                tree: RetainedTree::default(),
                max: max_retained,
            }),
            delivered: AtomicU64::new(0),
        }
    }

    /// Adds a subscription, or puts it in the place of the client's earlier one on that filter.
    pub fn subscribe(&self, key: SessionKey, mailbox: &Arc<Mailbox>, subscription: &Subscription) {
        let mut subscriptions = self.subscriptions.write();
        subscriptions.remove(&subscription.filter, |known| known.key == key);
        subscriptions.insert(
            &subscription.filter,
            Subscriber {
                key,
                mailbox: mailbox.clone(),
                qos: subscription.qos,
                no_local: subscription.no_local,
                retain_as_published: subscription.retain_as_published,
                id: subscription.id,
            },
        );
        self.generation.fetch_add(1, Ordering::Release);
    }

    pub fn unsubscribe<'a>(
        &self,
        key: SessionKey,
        filters: impl IntoIterator<Item = &'a TopicFilter>,
    ) {
        let mut subscriptions = self.subscriptions.write();
        for filter in filters {
            subscriptions.remove(filter, |known| known.key == key);
        }
        self.generation.fetch_add(1, Ordering::Release);
    }

    pub fn subscription_count(&self) -> usize {
        self.subscriptions.read().len()
    }

    pub fn retained_count(&self) -> usize {
        self.retained.lock().tree.len()
    }

    /// Keeps a message that says so; an empty one deletes (MQTT 5.0, 3.3.1.3).
    pub fn retain(&self, message: &Message) -> Result<(), RetainedFull> {
        let mut retained = self.retained.lock();
        if message.payload.is_empty() {
            retained.tree.remove(&message.topic);
            return Ok(());
        }
        let full = retained.tree.len() >= retained.max;
        if full && !retained.tree.contains(&message.topic) {
            return Err(RetainedFull { max: retained.max });
        }
        let kept = Message {
            topic: message.topic.clone(),
            payload: bytes::Bytes::copy_from_slice(&message.payload),
            properties: message.properties.clone(),
            ..*message
        };
        retained.tree.insert(Arc::new(kept));
        Ok(())
    }

    /// What is retained under a new subscription's filter, added to `found`.
    pub fn retained_for(
        &self,
        subscription: &Subscription,
        now: Instant,
        found: &mut VecDeque<Delivery>,
    ) {
        let ids = subscription.id.map(|id| Arc::from([id].as_slice()));
        self.retained
            .lock()
            .tree
            .for_each(&subscription.filter, |message| {
                if !message.is_expired(now) {
                    found.push_back(Delivery {
                        message: message.clone(),
                        qos: lower(message.qos, subscription.qos),
                        retain: true,
                        subscription_ids: ids.clone(),
                    });
                }
            });
    }

    fn targets(&self, topic: &str) -> Vec<Target> {
        let mut targets: Vec<Target> = Vec::new();
        let subscriptions = self.subscriptions.read();
        subscriptions.for_each_match(topic, |subscriber| {
            match targets.iter_mut().find(|known| known.key == subscriber.key) {
                None => targets.push(Target {
                    key: subscriber.key,
                    mailbox: subscriber.mailbox.clone(),
                    qos: subscriber.qos,
                    no_local: subscriber.no_local,
                    retain_as_published: subscriber.retain_as_published,
                    ids: subscriber.id.map(|id| Arc::from([id].as_slice())),
                }),
                // A client with overlapping subscriptions gets a message once, at the highest QoS.
                Some(target) => {
                    target.qos = higher(target.qos, subscriber.qos);
                    target.no_local &= subscriber.no_local;
                    target.retain_as_published |= subscriber.retain_as_published;
                    let ids = target.ids.iter().flat_map(|ids| ids.iter().copied());
                    let ids: Arc<[u32]> = ids.chain(subscriber.id).collect();
                    target.ids = (!ids.is_empty()).then_some(ids);
                }
            }
        });
        targets
    }
}

/// The higher of two QoS.
fn higher(a: QoS, b: QoS) -> QoS {
    if a < b { b } else { a }
}

/// One publisher's way into the fan-out. Collects messages and puts them into the mailboxes in one
/// go, so that a subscriber's lock and wake-up are paid once a batch.
#[derive(Debug)]
pub struct Publisher {
    fanout: Arc<Fanout>,
    generation: u64,
    cache: FxHashMap<Topic, Arc<[Target]>>,
    lists: Vec<Arc<[Target]>>,
    pending: Vec<(Arc<Message>, Arc<[Target]>)>,
}

impl Publisher {
    pub fn new(fanout: Arc<Fanout>) -> Self {
        Publisher {
            fanout,
            generation: 0,
            cache: FxHashMap::default(),
            lists: Vec::new(),
            pending: Vec::new(),
        }
    }

    /// Whether one of the last topics' subscribers asks for a pause; these are added to `pressed`.
    pub fn find_pressed(&self, pressed: &mut Vec<Arc<Mailbox>>) {
        for target in self.lists.iter().flat_map(|list| list.iter()) {
            if target.mailbox.is_pressed() {
                pressed.push(target.mailbox.clone());
            }
        }
    }

    /// Collects a message for those who are to get it: what `message` makes, if there are any.
    pub fn add(&mut self, topic: &Topic, message: impl FnOnce() -> Message) {
        let generation = self.fanout.generation.load(Ordering::Acquire);
        if generation != self.generation || self.cache.len() >= CACHED_TOPICS {
            self.cache.clear();
            self.lists.clear();
            self.generation = generation;
        }
        let targets = match self.cache.get(topic) {
            Some(targets) => targets.clone(),
            None => {
                let targets = self.fanout.targets(topic.as_str());
                let list = match self.lists.iter().find(|list| ***list == *targets) {
                    Some(list) => list.clone(),
                    None => {
                        let list: Arc<[Target]> = targets.into();
                        if self.lists.len() < CACHED_LISTS {
                            self.lists.push(list.clone());
                        }
                        list
                    }
                };
                if topic.is_worth_caching() {
                    self.cache.insert(topic.clone(), list.clone());
                }
                list
            }
        };
        if !targets.is_empty() {
            self.pending.push((Arc::new(message()), targets));
        }
    }

    /// Hands over what was collected. Returns the mailboxes that ask for a pause.
    pub fn flush(&mut self, now: Instant) -> Vec<Arc<Mailbox>> {
        let mut pressed = Vec::new();
        let mut delivered = 0;
        let mut rest = self.pending.as_slice();
        // Runs of messages with the same targets go into each mailbox together.
        while let Some((_, targets)) = rest.first() {
            let run = rest
                .iter()
                .take_while(|(_, other)| Arc::ptr_eq(other, targets))
                .count();
            let (messages, others) = rest.split_at(run);
            rest = others;
            for target in targets.iter() {
                let deliveries = messages
                    .iter()
                    .filter(|(message, _)| !(target.no_local && message.publisher == target.key))
                    .map(|(message, _)| Delivery {
                        message: message.clone(),
                        qos: lower(message.qos, target.qos),
                        retain: message.retain && target.retain_as_published,
                        subscription_ids: target.ids.clone(),
                    });
                delivered += target.mailbox.push(deliveries, now) as u64;
                if target.mailbox.is_pressed()
                    && !pressed
                        .iter()
                        .any(|known| Arc::ptr_eq(known, &target.mailbox))
                {
                    pressed.push(target.mailbox.clone());
                }
            }
        }
        self.pending.clear();
        self.fanout
            .delivered
            .fetch_add(delivered, Ordering::Relaxed);
        pressed
    }
}
