//! The trie finds what trying every filter finds, also after some have been removed. The first line
//! is the topic, each further one a filter.
#![no_main]

use headgate::event::{Topic, TopicFilter, TopicTrie};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let mut lines = text.split('\n');
    let Ok(topic) = Topic::new(lines.next().unwrap_or_default().to_owned()) else {
        return;
    };
    let filters: Vec<TopicFilter> = lines
        .filter_map(|line| TopicFilter::new(line).ok())
        .collect();
    let mut trie = TopicTrie::default();
    for (number, filter) in filters.iter().enumerate() {
        trie.insert(filter, number);
    }
    let matching = |kept: fn(usize) -> bool| -> Vec<usize> {
        let matches = |number: &usize| filters[*number].matches(topic.as_str()) && kept(*number);
        (0..filters.len()).filter(matches).collect()
    };
    assert_eq!(found(&trie, &topic), matching(|_| true));
    assert_eq!(trie.len(), filters.len());

    for (number, filter) in filters.iter().enumerate().step_by(2) {
        trie.remove(filter, |value| *value == number);
    }
    assert_eq!(found(&trie, &topic), matching(|number| number % 2 == 1));

    for filter in &filters {
        trie.remove(filter, |_| true);
    }
    assert!(trie.is_empty());
});

fn found(trie: &TopicTrie<usize>, topic: &Topic) -> Vec<usize> {
    let mut found = Vec::new();
    trie.for_each_match(topic.as_str(), |number| found.push(*number));
    found.sort_unstable();
    found
}
