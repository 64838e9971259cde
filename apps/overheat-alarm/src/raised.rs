//! The topics whose alarm is raised, bounded: a device that makes topics up must not fill the
//! app's memory.

use std::collections::{BTreeMap, HashMap};
use std::rc::Rc;

/// How much is remembered at most.
pub struct Bounds {
    pub topics: usize,
    /// Of topic names together; a topic name has up to 65,535.
    pub bytes: usize,
}

/// A bounded set of topics. A topic that is not in it has no alarm, so a quiet plant costs nothing.
///
/// When it is full, the topic that was raised first is forgotten. If it is still hot, its next
/// reading raises its alarm once more: a second alarm is better than a missed one.
pub struct RaisedTopics {
    bounds: Bounds,
    bytes: usize,
    order_of_topic: HashMap<Rc<str>, u64>,
    topic_in_order: BTreeMap<u64, Rc<str>>,
    next_order: u64,
}

impl RaisedTopics {
    pub fn new(bounds: Bounds) -> Self {
        RaisedTopics {
            bounds,
            bytes: 0,
            order_of_topic: HashMap::new(),
            topic_in_order: BTreeMap::new(),
            next_order: 0,
        }
    }

    /// False if `topic` is in the set already.
    pub fn insert(&mut self, topic: &str) -> bool {
        if self.order_of_topic.contains_key(topic) {
            return false;
        }
        while self.is_full_for(topic) {
            let Some((_, oldest)) = self.topic_in_order.pop_first() else {
                break;
            };
            self.bytes -= oldest.len();
            self.order_of_topic.remove(&oldest);
        }
        self.bytes += topic.len();
        let topic: Rc<str> = topic.into();
        self.order_of_topic
            .insert(Rc::clone(&topic), self.next_order);
        self.topic_in_order.insert(self.next_order, topic);
        self.next_order += 1;
        true
    }

    /// False if `topic` is not in the set.
    pub fn remove(&mut self, topic: &str) -> bool {
        let Some(order) = self.order_of_topic.remove(topic) else {
            return false;
        };
        self.topic_in_order.remove(&order);
        self.bytes -= topic.len();
        true
    }

    fn is_full_for(&self, topic: &str) -> bool {
        self.order_of_topic.len() >= self.bounds.topics
            || self.bytes + topic.len() > self.bounds.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bounded(topics: usize, bytes: usize) -> RaisedTopics {
        RaisedTopics::new(Bounds { topics, bytes })
    }

    #[test]
    fn a_full_set_forgets_the_topic_that_was_raised_first() {
        let mut raised = bounded(2, 1_000);
        assert!(raised.insert("a"));
        assert!(raised.insert("b"));
        assert!(!raised.insert("a"));
        assert!(raised.insert("c"));
        assert!(!raised.remove("a"));
        assert!(raised.remove("b"));
        assert!(raised.remove("c"));
    }

    #[test]
    fn long_topics_make_room_by_their_bytes() {
        let mut raised = bounded(100, 10);
        assert!(raised.insert("aaaa"));
        assert!(raised.insert("bbbb"));
        assert!(raised.insert("cccccccc"));
        assert!(!raised.remove("aaaa"));
        assert!(!raised.remove("bbbb"));
        assert!(raised.remove("cccccccc"));
        assert_eq!(raised.bytes, 0);
    }

    #[test]
    fn its_size_never_exceeds_the_bounds() {
        let mut raised = bounded(30, 50);
        for index in 0..1_000 {
            raised.insert(&index.to_string());
            if index % 7 == 0 {
                assert!(raised.remove(&index.to_string()));
            }
            assert!(raised.order_of_topic.len() <= 30 && raised.bytes <= 50);
            assert_eq!(raised.order_of_topic.len(), raised.topic_in_order.len());
            assert_eq!(
                raised.bytes,
                raised
                    .topic_in_order
                    .values()
                    .map(|topic| topic.len())
                    .sum::<usize>()
            );
        }
    }
}
