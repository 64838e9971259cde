//! Finding the topic filters that match a topic without looking at all of them.

use rustc_hash::FxHashMap;

use super::TopicFilter;

/// Values under topic filters, found by topic name. Looking a topic up costs in the order of its
/// levels, not of the number of filters.
#[derive(Clone, Debug)]
pub struct TopicTrie<T> {
    root: Node<T>,
    len: usize,
}

#[derive(Clone, Debug)]
struct Node<T> {
    children: FxHashMap<Box<str>, Node<T>>,
    /// The child for the level `+`.
    plus: Option<Box<Node<T>>>,
    /// Values whose filter ends here.
    here: Vec<T>,
    /// Values whose filter ends in `#` below this node.
    below: Vec<T>,
}

impl<T> Default for TopicTrie<T> {
    fn default() -> Self {
        TopicTrie {
            root: Node::default(),
            len: 0,
        }
    }
}

impl<T> Default for Node<T> {
    fn default() -> Self {
        Node {
            children: FxHashMap::default(),
            plus: None,
            here: Vec::new(),
            below: Vec::new(),
        }
    }
}

impl<T> TopicTrie<T> {
    /// How many values there are.
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Adds `value` under `filter`, beside what is there already.
    pub fn insert(&mut self, filter: &TopicFilter, value: T) {
        let mut node = &mut self.root;
        self.len += 1;
        for level in filter.as_str().split('/') {
            match level {
                "#" => return node.below.push(value),
                "+" => node = node.plus.get_or_insert_default(),
                _ => node = node.children.entry(level.into()).or_default(),
            }
        }
        node.here.push(value);
    }

    /// Removes the values under `filter` that `which` says yes to, and nodes that became empty.
    pub fn remove(&mut self, filter: &TopicFilter, mut which: impl FnMut(&T) -> bool) {
        let levels: Vec<&str> = filter.as_str().split('/').collect();
        self.len -= self.root.remove(&levels, &mut which);
    }

    /// Calls `found` with each value and its filter.
    pub fn for_each<'a>(&'a self, mut found: impl FnMut(&str, &'a T)) {
        self.root.walk(&mut String::new(), true, &mut found);
    }

    /// Calls `found` with each value whose filter matches `topic`.
    pub fn for_each_match<'a>(&'a self, topic: &str, mut found: impl FnMut(&'a T)) {
        // A leading wildcard does not match a topic that starts with `$` (MQTT 5.0, 4.7.2).
        if topic.starts_with('$') {
            let (first, rest) = match topic.split_once('/') {
                Some((first, rest)) => (first, Some(rest)),
                None => (topic, None),
            };
            if let Some(child) = self.root.children.get(first) {
                child.visit(rest, &mut found);
            }
        } else {
            self.root.visit(Some(topic), &mut found);
        }
    }
}

impl<T> Node<T> {
    fn is_empty(&self) -> bool {
        self.children.is_empty()
            && self.plus.is_none()
            && self.here.is_empty()
            && self.below.is_empty()
    }

    fn remove(&mut self, levels: &[&str], which: &mut impl FnMut(&T) -> bool) -> usize {
        let values = match levels {
            [] => &mut self.here,
            ["#"] => &mut self.below,
            ["+", rest @ ..] => {
                let Some(child) = &mut self.plus else {
                    return 0;
                };
                let removed = child.remove(rest, which);
                if child.is_empty() {
                    self.plus = None;
                }
                return removed;
            }
            [level, rest @ ..] => {
                let Some(child) = self.children.get_mut(*level) else {
                    return 0;
                };
                let removed = child.remove(rest, which);
                if child.is_empty() {
                    self.children.remove(*level);
                }
                return removed;
            }
        };
        let before = values.len();
        values.retain(|value| !which(value));
        before - values.len()
    }

    /// `filter`: the levels on the way here.
    fn walk<'a>(&'a self, filter: &mut String, is_root: bool, found: &mut impl FnMut(&str, &'a T)) {
        let length = filter.len();
        let mut below = |level: &str, visit: &mut dyn FnMut(&mut String)| {
            if !is_root {
                filter.push('/');
            }
            filter.push_str(level);
            visit(filter);
            filter.truncate(length);
        };
        for (level, child) in &self.children {
            below(level, &mut |filter| child.walk(filter, false, found));
        }
        if let Some(child) = &self.plus {
            below("+", &mut |filter| child.walk(filter, false, found));
        }
        if !self.below.is_empty() {
            below("#", &mut |filter| {
                self.below.iter().for_each(|value| found(filter, value));
            });
        }
        self.here.iter().for_each(|value| found(filter, value));
    }

    /// `rest`: the levels still to match, or none when the topic has ended.
    fn visit<'a>(&'a self, rest: Option<&str>, found: &mut impl FnMut(&'a T)) {
        // `a/#` matches `a` as well as what lies below it.
        self.below.iter().for_each(&mut *found);
        let Some(rest) = rest else {
            self.here.iter().for_each(&mut *found);
            return;
        };
        let (level, rest) = match rest.split_once('/') {
            Some((level, rest)) => (level, Some(rest)),
            None => (rest, None),
        };
        if let Some(child) = self.children.get(level) {
            child.visit(rest, found);
        }
        if let Some(child) = &self.plus {
            child.visit(rest, found);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn filter(text: &str) -> TopicFilter {
        TopicFilter::new(text).unwrap()
    }

    fn matches(trie: &TopicTrie<usize>, topic: &str) -> Vec<usize> {
        let mut found = Vec::new();
        trie.for_each_match(topic, |value| found.push(*value));
        found.sort();
        found
    }

    #[test]
    fn removing_leaves_no_nodes_behind() {
        let mut trie = TopicTrie::default();
        let filters = ["a/+/c", "a/b/#", "#", "a/b/c", "+"];
        for (value, text) in filters.iter().enumerate() {
            trie.insert(&filter(text), value);
            trie.insert(&filter(text), value + 100);
        }
        for text in filters {
            trie.remove(&filter(text), |value| *value < 100);
        }
        assert_eq!(matches(&trie, "a/b/c"), [100, 101, 102, 103]);
        for text in filters {
            trie.remove(&filter(text), |_| true);
        }
        assert!(trie.is_empty() && trie.root.is_empty());
    }

    proptest! {
        /// The trie finds what trying every filter finds.
        #[test]
        fn the_trie_agrees_with_trying_every_filter(
            filters in prop::collection::vec("(\\+|\\$?a|b|)(/(\\+|a|b|)){0,3}(/#)?|#", 0..12),
            topic in "(\\$?a|b|)(/(a|b|)){0,4}",
        ) {
            let filters: Vec<_> = filters.iter().filter_map(|f| TopicFilter::new(f.as_str()).ok()).collect();
            let mut trie = TopicTrie::default();
            for (value, filter) in filters.iter().enumerate() {
                trie.insert(filter, value);
            }
            let expected: Vec<_> = (0..filters.len()).filter(|i| filters[*i].matches(&topic)).collect();
            prop_assert_eq!(matches(&trie, &topic), expected);
            let mut walked = Vec::new();
            trie.for_each(|filter, value| walked.push((*value, filter.to_owned())));
            walked.sort();
            let all: Vec<_> = filters.iter().map(|f| f.as_str().to_owned()).enumerate().collect();
            prop_assert_eq!(walked, all);
        }
    }
}
