//! Who gets a message: subscriptions, retained messages, and the way into the subscribers'
//! mailboxes.
//!
//! This is the broker's own fan-out and not rumqttd's router; `docs/architecture.md` has the
//! measurements behind that.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Mutex, RwLock};
use rumqttd::protocol::QoS;
use rustc_hash::FxHashMap;

use super::access::Permissions;
use super::archive::Archive;
use super::mailbox::Mailbox;
use super::message::{Delivery, Message, SessionKey};
use super::retained::RetainedTree;
use super::session::lower;
use super::share_group::ShareGroup;
use super::subscription::{Subscription, SubscriptionKey, SubscriptionOptions};
use crate::event::{Topic, TopicFilter, TopicTrie};

/// Matched topics that one publisher remembers.
const CACHED_TOPICS: usize = 1024;

/// Distinct lists of targets that one publisher remembers, so that topics with the same subscribers
/// share one list and go into the mailboxes together.
const CACHED_LISTS: usize = 16;

/// Everything that subscriptions and retained messages need, shared by all connections.
#[derive(Debug)]
pub struct Fanout {
    subscriptions: RwLock<Subscriptions>,
    /// Counts up with each change of `subscriptions`, so that caches know when they are stale.
    generation: AtomicU64,
    retained: Mutex<Retained>,
    /// What the gateway itself says, below `$SYS`; retained, too.
    system: Mutex<RetainedTree>,
    topics: Mutex<FxHashMap<Topic, Arc<TopicTraffic>>>,
    pub delivered: AtomicU64,
}

/// What was published on one topic.
#[derive(Debug, Default)]
pub struct TopicTraffic {
    pub messages: AtomicU64,
    pub bytes: AtomicU64,
}

/// Topics whose traffic is counted.
const COUNTED_TOPICS: usize = 4096;

#[derive(Debug, Default)]
struct Subscriptions {
    trie: TopicTrie<Entry>,
    /// Those in the trie, by name.
    groups: FxHashMap<SubscriptionKey, Arc<ShareGroup>>,
    /// How many clients' subscriptions there are; each member of a group has one. Changed with the
    /// lock only.
    len: Arc<AtomicUsize>,
}

#[derive(Clone, Debug)]
enum Entry {
    One(Subscriber),
    Group(Arc<ShareGroup>),
}

#[derive(Debug)]
struct Retained {
    tree: RetainedTree,
    max: usize,
    max_bytes: usize,
    archive: Option<Archive>,
    /// When expired messages were looked for last.
    swept: Option<Instant>,
}

/// A client with one of its subscriptions.
#[derive(Clone, Debug)]
pub struct Subscriber {
    pub key: SessionKey,
    pub mailbox: Arc<Mailbox>,
    pub permissions: Arc<Permissions>,
    pub options: SubscriptionOptions,
}

/// Who gets the messages of a topic.
#[derive(Debug, Default)]
struct Targets {
    clients: Vec<Target>,
    /// One member of each.
    groups: Vec<Arc<ShareGroup>>,
}

impl PartialEq for Targets {
    fn eq(&self, other: &Self) -> bool {
        let same_groups = || {
            let pairs = self.groups.iter().zip(&other.groups);
            self.groups.len() == other.groups.len()
                && pairs.into_iter().all(|(a, b)| Arc::ptr_eq(a, b))
        };
        self.clients == other.clients && same_groups()
    }
}

impl Targets {
    fn is_empty(&self) -> bool {
        self.clients.is_empty() && self.groups.is_empty()
    }
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
    "a message is not retained: there are {max} already, or they would take more than {max_bytes} \
     bytes, or the store is nearly full; raise mqtt.max_retained_messages or mqtt.max_retained_bytes, or delete some by \
     publishing an empty retained message"
)]
pub struct RetainedFull {
    max: usize,
    max_bytes: usize,
}

impl Fanout {
    /// What is retained goes to `archive`, too.
    pub fn new(max_retained: usize, max_retained_bytes: usize, archive: Option<Archive>) -> Self {
        Fanout {
            subscriptions: RwLock::default(),
            generation: AtomicU64::new(1),
            retained: Mutex::new(Retained {
                tree: RetainedTree::default(),
                max: max_retained,
                max_bytes: max_retained_bytes,
                archive,
                swept: None,
            }),
            system: Mutex::default(),
            topics: Mutex::default(),
            delivered: AtomicU64::new(0),
        }
    }

    /// Counts of a topic's messages; none if more topics are in use than are counted.
    fn traffic(&self, topic: &Topic) -> Option<Arc<TopicTraffic>> {
        let mut topics = self.topics.lock();
        if let Some(traffic) = topics.get(topic) {
            return Some(traffic.clone());
        }
        if topics.len() >= COUNTED_TOPICS {
            // Those that no publisher remembers.
            topics.retain(|_, traffic| Arc::strong_count(traffic) > 1);
        }
        if topics.len() >= COUNTED_TOPICS || !topic.is_worth_caching() {
            return None;
        }
        let traffic = Arc::new(TopicTraffic::default());
        topics.insert(topic.clone(), traffic.clone());
        Some(traffic)
    }

    /// Calls `found` with each counted topic.
    pub fn for_each_topic(&self, mut found: impl FnMut(&Topic, &TopicTraffic)) {
        for (topic, traffic) in self.topics.lock().iter() {
            found(topic, traffic);
        }
    }

    /// Calls `found` with each client's subscriptions: the group, the filter, and who.
    pub fn for_each_subscription(&self, mut found: impl FnMut(Option<&str>, &str, &Subscriber)) {
        let subscriptions = self.subscriptions.read();
        subscriptions.trie.for_each(|filter, entry| {
            if let Entry::One(subscriber) = entry {
                found(None, filter, subscriber);
            }
        });
        for (key, group) in &subscriptions.groups {
            let filter = key.filter.as_str();
            group.for_each_member(|member| found(key.group.as_deref(), filter, member));
        }
    }

    /// Calls `found` with what is retained under `filter`.
    pub fn for_each_retained(&self, filter: &TopicFilter, found: impl FnMut(&Arc<Message>)) {
        match filter.as_str().starts_with('$') {
            true => self.system.lock().for_each(filter, found),
            false => self.retained.lock().tree.for_each(filter, found),
        }
    }

    /// Keeps what the gateway itself says, for later subscribers.
    pub fn retain_system(&self, message: Arc<Message>) {
        self.system.lock().insert(message);
    }

    /// Adds a subscription, or puts it in the place of the client's earlier one on that filter.
    pub fn subscribe(&self, key: &SubscriptionKey, subscriber: Subscriber) {
        let mut guard = self.subscriptions.write();
        let subscriptions = &mut *guard;
        if key.group.is_some() {
            let group = match subscriptions.groups.get(key) {
                Some(group) => group.clone(),
                None => {
                    let group = Arc::new(ShareGroup::default());
                    subscriptions.groups.insert(key.clone(), group.clone());
                    let entry = Entry::Group(group.clone());
                    subscriptions.trie.insert(&key.filter, entry);
                    group
                }
            };
            let added = usize::from(group.join(subscriber));
            subscriptions.len.fetch_add(added, Ordering::Relaxed);
        } else {
            if subscriptions.remove(key, subscriber.key) == 0 {
                subscriptions.len.fetch_add(1, Ordering::Relaxed);
            }
            let entry = Entry::One(subscriber);
            subscriptions.trie.insert(&key.filter, entry);
        }
        self.changed();
    }

    pub fn unsubscribe<'a>(
        &self,
        key: SessionKey,
        subscriptions: impl IntoIterator<Item = &'a SubscriptionKey>,
    ) {
        let mut guard = self.subscriptions.write();
        for subscription in subscriptions {
            let removed = guard.remove(subscription, key);
            guard.len.fetch_sub(removed, Ordering::Relaxed);
        }
        self.changed();
    }

    /// What publishers remember is stale.
    pub fn changed(&self) {
        self.generation.fetch_add(1, Ordering::Release);
    }

    pub fn subscription_count(&self) -> usize {
        self.subscriptions.read().len.load(Ordering::Relaxed)
    }

    /// The same, for those who want to know it often.
    pub fn subscription_counter(&self) -> Arc<AtomicUsize> {
        self.subscriptions.read().len.clone()
    }

    /// Gives what one member of a share group did not get to another one. What nobody else may
    /// have is returned.
    pub fn pass_on(
        &self,
        deliveries: Vec<Delivery>,
        from: SessionKey,
        now: Instant,
    ) -> Vec<Delivery> {
        let mut left = Vec::new();
        for delivery in deliveries {
            let passed = delivery.group.as_ref().and_then(|group| {
                group.next_for(delivery.message.topic.as_str(), Some(from), |member| {
                    let again = member.deliver(&delivery.message, Some(group.clone()));
                    member.mailbox.push(std::iter::once(again), now);
                })
            });
            if passed.is_none() {
                left.push(delivery);
            }
        }
        left
    }

    /// Removes retained messages that have expired.
    pub fn sweep_retained(&self, now: Instant) {
        self.retained.lock().sweep(now);
    }

    pub fn retained_count(&self) -> usize {
        self.retained.lock().tree.len()
    }

    /// How many messages are retained, and their bytes as they are counted in queues.
    pub fn retained_size(&self) -> (usize, usize) {
        let retained = self.retained.lock();
        (retained.tree.len(), retained.tree.bytes())
    }

    /// Puts in what was retained in an earlier run of the gateway.
    pub fn restore_retained(&self, messages: Vec<Message>) {
        let mut retained = self.retained.lock();
        for message in messages {
            retained.tree.insert(Arc::new(message));
        }
    }

    /// Keeps a message that says so; an empty one deletes (MQTT 5.0, 3.3.1.3).
    pub fn retain(&self, message: &Message, now: Instant) -> Result<(), RetainedFull> {
        let mut retained = self.retained.lock();
        if message.payload.is_empty() {
            if retained.tree.remove(&message.topic)
                && let Some(archive) = &retained.archive
            {
                archive.forget_retained(&message.topic);
            }
            return Ok(());
        }
        if !retained.has_room(message) {
            retained.sweep(now);
        }
        if !retained.has_room(message) {
            // Better none than one that is no longer true.
            if retained.tree.remove(&message.topic)
                && let Some(archive) = &retained.archive
            {
                archive.forget_retained(&message.topic);
            }
            return Err(RetainedFull {
                max: retained.max,
                max_bytes: retained.max_bytes,
            });
        }
        let kept = Message {
            topic: message.topic.clone(),
            payload: bytes::Bytes::copy_from_slice(&message.payload),
            properties: message.properties.clone(),
            ..*message
        };
        let kept = Arc::new(kept);
        if let Some(archive) = &retained.archive {
            archive.retain(kept.clone());
        }
        retained.tree.insert(kept);
        Ok(())
    }

    /// What is retained under a new subscription's filter, added to `found`.
    pub fn retained_for(
        &self,
        subscription: &Subscription,
        permissions: &Permissions,
        now: Instant,
        found: &mut VecDeque<Delivery>,
    ) {
        let options = subscription.options;
        let ids = options.id.map(|id| Arc::from([id].as_slice()));
        self.for_each_retained(&subscription.key.filter, |message| {
            if !message.is_expired(now) && permissions.may_receive(message.topic.as_str()) {
                found.push_back(Delivery {
                    message: message.clone(),
                    qos: lower(message.qos, options.qos),
                    retain: true,
                    subscription_ids: ids.clone(),
                    group: None,
                    sequence: 0,
                    is_stored: false,
                });
            }
        });
    }

    fn targets(&self, topic: &str) -> Targets {
        let mut targets = Targets::default();
        let subscriptions = self.subscriptions.read();
        subscriptions.trie.for_each_match(topic, |entry| {
            let Entry::One(subscriber) = entry else {
                if let Entry::Group(group) = entry {
                    targets.groups.push(group.clone());
                }
                return;
            };
            if !subscriber.permissions.may_receive(topic) {
                return;
            }
            let options = subscriber.options;
            let mut clients = targets.clients.iter_mut();
            match clients.find(|known| known.key == subscriber.key) {
                None => targets.clients.push(Target {
                    key: subscriber.key,
                    mailbox: subscriber.mailbox.clone(),
                    qos: options.qos,
                    no_local: options.no_local,
                    retain_as_published: options.retain_as_published,
                    ids: options.id.map(|id| Arc::from([id].as_slice())),
                }),
                // A client with overlapping subscriptions gets a message once, at the highest QoS.
                Some(target) => {
                    target.qos = higher(target.qos, options.qos);
                    target.no_local &= options.no_local;
                    target.retain_as_published |= options.retain_as_published;
                    let ids = target.ids.iter().flat_map(|ids| ids.iter().copied());
                    let ids: Arc<[u32]> = ids.chain(options.id).collect();
                    target.ids = (!ids.is_empty()).then_some(ids);
                }
            }
        });
        targets
    }
}

impl Subscriptions {
    /// Returns how many were removed.
    fn remove(&mut self, key: &SubscriptionKey, session: SessionKey) -> usize {
        if key.group.is_none() {
            let before = self.trie.len();
            self.trie.remove(
                &key.filter,
                |entry| matches!(entry, Entry::One(known) if known.key == session),
            );
            return before - self.trie.len();
        }
        let Some(group) = self.groups.get(key) else {
            return 0;
        };
        let removed = group.leave(session);
        if group.is_empty() {
            self.trie.remove(
                &key.filter,
                |entry| matches!(entry, Entry::Group(known) if Arc::ptr_eq(known, group)),
            );
            self.groups.remove(key);
        }
        usize::from(removed)
    }
}

impl Subscriber {
    /// A message as this subscription gets it.
    fn deliver(&self, message: &Arc<Message>, group: Option<Arc<ShareGroup>>) -> Delivery {
        Delivery {
            message: message.clone(),
            qos: lower(message.qos, self.options.qos),
            retain: message.retain && self.options.retain_as_published,
            subscription_ids: self.options.id.map(|id| Arc::from([id].as_slice())),
            group,
            sequence: 0,
            is_stored: false,
        }
    }
}

impl Retained {
    fn has_room(&self, message: &Message) -> bool {
        let before = self.tree.get(&message.topic);
        let bytes_before = before.map_or(0, |before| before.queued_bytes());
        let bytes = message.queued_bytes();
        let is_stored = self
            .archive
            .as_ref()
            .is_none_or(|archive| !archive.is_full());
        let has_place = before.is_some() || self.tree.len() < self.max && is_stored;
        let has_bytes =
            bytes <= bytes_before || self.tree.bytes() - bytes_before + bytes <= self.max_bytes;
        has_place && has_bytes
    }

    /// Removes what has expired. Looks at all messages, so it is not done more often than is worth it.
    fn sweep(&mut self, now: Instant) {
        const PAUSE: Duration = Duration::from_secs(1);
        if self.swept.is_some_and(|swept| now < swept + PAUSE) {
            return;
        }
        self.swept = Some(now);
        for topic in self.tree.take_expired(now) {
            if let Some(archive) = &self.archive {
                archive.forget_retained(&topic);
            }
        }
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
    cache: FxHashMap<Topic, Known>,
    lists: Vec<Arc<Targets>>,
    pending: Vec<(Arc<Message>, Arc<Targets>)>,
}

/// What a publisher remembers of a topic.
#[derive(Clone, Debug)]
struct Known {
    targets: Arc<Targets>,
    traffic: Option<Arc<TopicTraffic>>,
}

/// What [`Publisher::flush`] has done.
#[derive(Debug)]
pub struct Flushed {
    /// Mailboxes that ask for a pause.
    pub pressed: Vec<Arc<Mailbox>>,
    /// Something is on its way to the disk.
    pub stored: bool,
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
        for list in &self.lists {
            for target in &list.clients {
                if target.mailbox.is_pressed() {
                    pressed.push(target.mailbox.clone());
                }
            }
            for group in &list.groups {
                find_all_pressed(group, pressed);
            }
        }
    }

    /// Collects a message for those who are to get it: what `message` makes, if there are any.
    pub fn add(&mut self, topic: &Topic, payload_bytes: usize, message: impl FnOnce() -> Message) {
        let generation = self.fanout.generation.load(Ordering::Acquire);
        if generation != self.generation || self.cache.len() >= CACHED_TOPICS {
            self.cache.clear();
            self.lists.clear();
            self.generation = generation;
        }
        let looked_up;
        let known = match self.cache.get(topic) {
            Some(known) => known,
            None => {
                looked_up = self.look_up(topic);
                &looked_up
            }
        };
        if let Some(traffic) = &known.traffic {
            traffic.messages.fetch_add(1, Ordering::Relaxed);
            let bytes = payload_bytes as u64;
            traffic.bytes.fetch_add(bytes, Ordering::Relaxed);
        }
        if !known.targets.is_empty() {
            let targets = known.targets.clone();
            self.pending.push((Arc::new(message()), targets));
        }
    }

    fn look_up(&mut self, topic: &Topic) -> Known {
        let targets = self.fanout.targets(topic.as_str());
        let same = self.lists.iter().find(|list| ***list == targets);
        let targets = same.cloned().unwrap_or_else(|| {
            let list = Arc::new(targets);
            if self.lists.len() < CACHED_LISTS {
                self.lists.push(list.clone());
            }
            list
        });
        let known = Known {
            targets,
            traffic: self.fanout.traffic(topic),
        };
        if topic.is_worth_caching() {
            self.cache.insert(topic.clone(), known.clone());
        }
        known
    }

    /// Hands over what was collected.
    pub fn flush(&mut self, now: Instant) -> Flushed {
        let mut pressed = Vec::new();
        let mut delivered = 0;
        let mut stored = false;
        let mut rest = self.pending.as_slice();
        // Runs of messages with the same targets go into each mailbox together.
        while let Some((_, targets)) = rest.first() {
            let run = rest
                .iter()
                .take_while(|(_, other)| Arc::ptr_eq(other, targets))
                .count();
            let (messages, others) = rest.split_at(run);
            rest = others;
            for target in &targets.clients {
                let deliveries = messages
                    .iter()
                    .filter(|(message, _)| !(target.no_local && message.publisher == target.key))
                    .map(|(message, _)| Delivery {
                        message: message.clone(),
                        qos: lower(message.qos, target.qos),
                        retain: message.retain && target.retain_as_published,
                        subscription_ids: target.ids.clone(),
                        group: None,
                        sequence: 0,
                        is_stored: false,
                    });
                let pushed = target.mailbox.push(deliveries, now);
                delivered += pushed.added as u64;
                stored |= pushed.stored;
                if target.mailbox.is_pressed() {
                    note(&target.mailbox, &mut pressed);
                }
            }
            for group in &targets.groups {
                for (message, _) in messages {
                    let topic = message.topic.as_str();
                    let taken = group.next_for(topic, None, |member| {
                        let delivery = member.deliver(message, Some(group.clone()));
                        member.mailbox.push(std::iter::once(delivery), now)
                    });
                    let pushed = taken.unwrap_or_default();
                    delivered += pushed.added as u64;
                    stored |= pushed.stored;
                }
                find_all_pressed(group, &mut pressed);
            }
        }
        self.pending.clear();
        self.fanout
            .delivered
            .fetch_add(delivered, Ordering::Relaxed);
        Flushed { pressed, stored }
    }
}

fn note(mailbox: &Arc<Mailbox>, pressed: &mut Vec<Arc<Mailbox>>) {
    if !pressed.iter().any(|known| Arc::ptr_eq(known, mailbox)) {
        pressed.push(mailbox.clone());
    }
}

/// A share group asks for a pause when each of its connected members does: then for the first's.
fn find_all_pressed(group: &ShareGroup, pressed: &mut Vec<Arc<Mailbox>>) {
    let mut first = None;
    let mut all = true;
    group.for_each_member(|member| {
        if !member.mailbox.is_offline() {
            all &= member.mailbox.is_pressed();
            first.get_or_insert_with(|| member.mailbox.clone());
        }
    });
    if let Some(mailbox) = first.filter(|_| all) {
        note(&mailbox, pressed);
    }
}
