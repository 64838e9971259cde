//! Retained messages, found by topic filter without looking at all of them.

use std::sync::Arc;
use std::time::Instant;

use rustc_hash::FxHashMap;

use super::message::Message;
use crate::event::{Topic, TopicFilter};

/// Messages by topic, in a tree of levels. Beyond a fixed depth the rest of a topic is one level,
/// so that no topic makes the walk deep.
#[derive(Debug, Default)]
pub struct RetainedTree {
    root: Node,
    len: usize,
    /// Of all messages, as they are counted in queues.
    bytes: usize,
}

#[derive(Debug, Default)]
struct Node {
    children: FxHashMap<Box<str>, Node>,
    message: Option<Arc<Message>>,
}

/// As many levels as a filter can have; see [`TopicFilter`].
const MAX_DEPTH: usize = 201;

fn levels(topic: &str) -> impl Iterator<Item = &str> {
    topic.splitn(MAX_DEPTH, '/')
}

impl RetainedTree {
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }

    pub fn get(&self, topic: &Topic) -> Option<&Arc<Message>> {
        let mut node = &self.root;
        for level in levels(topic.as_str()) {
            match node.children.get(level) {
                Some(child) => node = child,
                None => return None,
            }
        }
        node.message.as_ref()
    }

    /// Puts the message in the place of its topic's.
    pub fn insert(&mut self, message: Arc<Message>) {
        let topic = message.topic.clone();
        let mut node = &mut self.root;
        for level in levels(topic.as_str()) {
            node = node.children.entry(level.into()).or_default();
        }
        self.bytes += message.queued_bytes();
        match node.message.replace(message) {
            Some(before) => self.bytes -= before.queued_bytes(),
            None => self.len += 1,
        }
    }

    /// Returns whether there was a message.
    pub fn remove(&mut self, topic: &Topic) -> bool {
        let levels: Vec<&str> = levels(topic.as_str()).collect();
        let Some(removed) = self.root.remove(&levels) else {
            return false;
        };
        self.len -= 1;
        self.bytes -= removed.queued_bytes();
        true
    }

    /// Removes what has expired, and returns the topics.
    pub fn take_expired(&mut self, now: Instant) -> Vec<Topic> {
        let mut expired = Vec::new();
        self.root.visit(&["#"], &mut |message: &Arc<Message>| {
            if message.is_expired(now) {
                expired.push(message.topic.clone());
            }
        });
        for topic in &expired {
            self.remove(topic);
        }
        expired
    }

    /// Calls `found` with each message that a subscription to `filter` gets.
    pub fn for_each(&self, filter: &TopicFilter, mut found: impl FnMut(&Arc<Message>)) {
        let levels: Vec<&str> = filter.as_str().split('/').collect();
        // A leading wildcard does not match a topic that starts with `$`; none is retained.
        self.root.visit(&levels, &mut found);
    }
}

impl Node {
    fn remove(&mut self, levels: &[&str]) -> Option<Arc<Message>> {
        let Some((level, rest)) = levels.split_first() else {
            return self.message.take();
        };
        let child = self.children.get_mut(*level)?;
        let removed = child.remove(rest);
        if child.children.is_empty() && child.message.is_none() {
            self.children.remove(*level);
        }
        removed
    }

    fn visit(&self, levels: &[&str], found: &mut impl FnMut(&Arc<Message>)) {
        match levels {
            [] => self.message.iter().for_each(found),
            ["#"] => {
                self.message.iter().for_each(&mut *found);
                for child in self.children.values() {
                    child.visit(levels, found);
                }
            }
            ["+", rest @ ..] => {
                for child in self.children.values() {
                    child.visit(rest, found);
                }
            }
            [level, rest @ ..] => {
                if let Some(child) = self.children.get(*level) {
                    child.visit(rest, found);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;
    use proptest::prelude::*;

    proptest! {
        /// The tree finds what trying every topic finds, also after some were removed.
        #[test]
        fn the_tree_agrees_with_trying_every_topic(
            topics in prop::collection::vec("(a|b|)(/(a|b|)){0,4}", 0..12),
            removed in prop::collection::vec(any::<prop::sample::Index>(), 0..4),
            filter in "(\\+|a|b|)(/(\\+|a|b|)){0,3}(/#)?|#",
        ) {
            let Ok(filter) = TopicFilter::new(filter) else { return Ok(()) };
            let mut topics: Vec<Topic> = topics.into_iter().filter_map(|t| Topic::new(t).ok()).collect();
            topics.sort();
            topics.dedup();
            let mut tree = RetainedTree::default();
            for topic in &topics {
                tree.insert(Arc::new(Message::new(topic.clone(), Bytes::from_static(b"x"))));
                prop_assert!(tree.get(topic).is_some());
            }
            for index in removed {
                if !topics.is_empty() {
                    let topic = topics.remove(index.index(topics.len()));
                    tree.remove(&topic);
                    tree.remove(&topic);
                }
            }
            prop_assert_eq!(tree.len(), topics.len());
            let bytes = topics.iter().map(|topic| tree.get(topic).unwrap().queued_bytes());
            prop_assert_eq!(tree.bytes(), bytes.sum::<usize>());
            let mut found = Vec::new();
            tree.for_each(&filter, |message| found.push(message.topic.clone()));
            found.sort();
            topics.retain(|topic| filter.matches(topic.as_str()));
            prop_assert_eq!(found, topics);
        }
    }
}
