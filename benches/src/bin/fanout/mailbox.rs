//! Fan-out through Headgate's trie: a bounded mailbox a subscriber, and a publisher that waits while
//! one is full. Straightforward on purpose; what it gives is a lower bound.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use headgate::event::{Topic, TopicFilter, TopicTrie};
use parking_lot::{Condvar, Mutex, RwLock};

use crate::scenarios::{Hub, Publisher, Subscriber};

/// Most messages that wait in a mailbox.
const CAPACITY: usize = 20_000;

struct Message {
    _topic: Topic,
    payload: Bytes,
}

#[derive(Default)]
struct Mailbox {
    waiting: Mutex<Vec<Arc<Message>>>,
    /// Signalled when messages have come.
    filled: Condvar,
    /// Signalled when the subscriber has taken all messages out.
    emptied: Condvar,
}

type Subscriptions = RwLock<TopicTrie<Arc<Mailbox>>>;

#[derive(Default)]
pub struct TrieHub {
    subscriptions: Arc<Subscriptions>,
}

impl Hub for TrieHub {
    type Publisher = MailboxPublisher;
    type Subscriber = MailboxSubscriber;

    fn publisher(&self, _name: &str) -> MailboxPublisher {
        MailboxPublisher {
            subscriptions: self.subscriptions.clone(),
            outgoing: Vec::new(),
        }
    }

    fn subscriber(&self, _name: &str, filter: &TopicFilter) -> MailboxSubscriber {
        let mut subscriber = MailboxSubscriber {
            subscriptions: self.subscriptions.clone(),
            mailbox: Arc::default(),
            taken: Vec::new(),
        };
        subscriber.subscribe(filter);
        subscriber
    }

    fn lossless_window(&self) -> Option<u64> {
        None
    }
}

pub struct MailboxPublisher {
    subscriptions: Arc<Subscriptions>,
    /// What one batch gives each mailbox, so that its lock is taken once. Kept for its memory.
    outgoing: Vec<(Arc<Mailbox>, Vec<Arc<Message>>)>,
}

impl Publisher for MailboxPublisher {
    fn publish(&mut self, batch: &mut Vec<(Topic, Bytes)>) {
        let subscriptions = self.subscriptions.read();
        for (topic, payload) in batch.drain(..) {
            let message = Arc::new(Message {
                _topic: topic.clone(),
                payload,
            });
            subscriptions.for_each_match(topic.as_str(), |mailbox| {
                let known = self
                    .outgoing
                    .iter_mut()
                    .find(|(other, _)| Arc::ptr_eq(mailbox, other));
                match known {
                    Some((_, messages)) => messages.push(message.clone()),
                    None => self.outgoing.push((mailbox.clone(), vec![message.clone()])),
                }
            });
        }
        drop(subscriptions);
        // Mailboxes that this batch did not reach are let go, so that they can be freed.
        self.outgoing.retain(|(_, messages)| !messages.is_empty());
        for (mailbox, messages) in &mut self.outgoing {
            let mut waiting = mailbox.waiting.lock();
            while waiting.len() >= CAPACITY {
                mailbox.emptied.wait(&mut waiting);
            }
            waiting.append(messages);
            drop(waiting);
            mailbox.filled.notify_one();
        }
    }

    fn close(self) {}
}

pub struct MailboxSubscriber {
    subscriptions: Arc<Subscriptions>,
    mailbox: Arc<Mailbox>,
    taken: Vec<Arc<Message>>,
}

impl Subscriber for MailboxSubscriber {
    fn receive(&mut self, patience: Duration, each: &mut dyn FnMut(&[u8])) -> bool {
        let mut waiting = self.mailbox.waiting.lock();
        if waiting.is_empty() {
            let deadline = Instant::now() + patience;
            while waiting.is_empty() {
                if self
                    .mailbox
                    .filled
                    .wait_until(&mut waiting, deadline)
                    .timed_out()
                {
                    return false;
                }
            }
        }
        std::mem::swap(&mut *waiting, &mut self.taken);
        drop(waiting);
        self.mailbox.emptied.notify_all();
        for message in self.taken.drain(..) {
            each(&message.payload);
        }
        true
    }

    fn subscribe(&mut self, filter: &TopicFilter) {
        self.subscriptions
            .write()
            .insert(filter, self.mailbox.clone());
    }

    fn unsubscribe(&mut self, filter: &TopicFilter) {
        self.subscriptions
            .write()
            .remove(filter, |mailbox| Arc::ptr_eq(mailbox, &self.mailbox));
    }
}
