//! How two topic filters lie to each other. A rule is a filter, and so is a subscription: what both
//! match is a filter again.

use crate::event::TopicFilter;

/// What `a` and `b` both match; none if that is nothing.
pub(super) fn intersection(a: &TopicFilter, b: &TopicFilter) -> Option<TopicFilter> {
    let (mut left, mut right) = (a.as_str().split('/'), b.as_str().split('/'));
    let mut common = Vec::new();
    loop {
        let first = common.is_empty();
        match (left.next(), right.next()) {
            (None, None) => break,
            (Some(l), Some(r)) if first && (hides(l, r) || hides(r, l)) => return None,
            // `#` stands for the level above it, too.
            (Some("#"), level) => {
                common.extend(level.into_iter().chain(right));
                break;
            }
            (level, Some("#")) => {
                common.extend(level.into_iter().chain(left));
                break;
            }
            (Some("+"), Some(level)) | (Some(level), Some("+")) => common.push(level),
            (Some(l), Some(r)) if l == r => common.push(l),
            _ => return None,
        }
    }
    // As deep as the deeper one, and no longer than both: always valid in practice, and where it
    // isn't, nobody can have such a topic.
    TopicFilter::new(common.join("/")).ok()
}

/// Whether `outer` matches every topic that `inner` matches.
pub(super) fn covers(outer: &TopicFilter, inner: &TopicFilter) -> bool {
    // Every topic has a first level, and one with nothing but an empty level is none, so these match
    // the same.
    let outer = match outer.as_str() {
        "+/#" => "#",
        "/+/#" => "/#",
        text => text,
    };
    let (mut outer, mut inner) = (outer.split('/'), inner.as_str().split('/'));
    let mut first = true;
    loop {
        match (outer.next(), inner.next()) {
            (None, None) => return true,
            (Some(o), Some(i)) if first && hides(o, i) => return false,
            (Some("#"), _) => return true,
            (_, Some("#")) => return false,
            (Some("+"), Some(_)) => {}
            (Some(o), Some(i)) if o == i => {}
            _ => return false,
        }
        first = false;
    }
}

/// A leading wildcard does not match a topic that starts with `$` (MQTT 5.0, 4.7.2).
fn hides(wildcard: &str, level: &str) -> bool {
    matches!(wildcard, "+" | "#") && level.starts_with('$')
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn filter(text: &str) -> TopicFilter {
        TopicFilter::new(text.to_owned()).unwrap()
    }

    fn meet(a: &str, b: &str) -> Option<String> {
        intersection(&filter(a), &filter(b)).map(|common| common.to_string())
    }

    #[test]
    fn what_two_filters_have_in_common_is_a_filter() {
        assert_eq!(meet("a/+", "+/b").as_deref(), Some("a/b"));
        assert_eq!(meet("a/#", "+/b/+").as_deref(), Some("a/b/+"));
        assert_eq!(meet("a/#", "a").as_deref(), Some("a"));
        assert_eq!(meet("a/b", "a/c"), None);
        assert_eq!(meet("#", "$SYS/#"), None);
        assert_eq!(meet("+/x", "$SYS/x"), None);
        assert_eq!(meet("$SYS/+", "$SYS/#").as_deref(), Some("$SYS/+"));
    }

    #[test]
    fn a_wildcard_for_what_is_always_there_covers_no_less() {
        assert!(covers(&filter("+/#"), &filter("#")));
        assert!(covers(&filter("/+/#"), &filter("/#")));
        assert!(!covers(&filter("a/+/#"), &filter("a/#")));
    }

    /// Topics of up to four levels: one deeper than the filters, and with a level that none names.
    fn topics() -> Vec<String> {
        let mut all = Vec::new();
        let mut last: Vec<String> = ["", "a", "b", "c", "$s"].map(str::to_owned).into();
        for _ in 0..4 {
            all.extend(last.iter().filter(|topic| !topic.is_empty()).cloned());
            let deeper = last.iter().flat_map(|topic| {
                ["", "a", "b", "c", "$s"].map(|level| format!("{topic}/{level}"))
            });
            last = deeper.collect();
        }
        all
    }

    fn any_filter() -> impl Strategy<Value = TopicFilter> {
        let level = prop_oneof![Just(""), Just("a"), Just("b"), Just("+"), Just("$s")];
        let levels = proptest::collection::vec(level, 0..3);
        (
            levels,
            prop_oneof![Just("#"), Just("+"), Just("a"), Just("")],
        )
            .prop_filter_map("an empty filter is none", |(mut levels, last)| {
                levels.push(last);
                TopicFilter::new(levels.join("/")).ok()
            })
    }

    proptest! {
        #[test]
        fn both_agree_with_trying_every_topic(a in any_filter(), b in any_filter()) {
            let topics = topics();
            let common = intersection(&a, &b);
            for topic in &topics {
                let both = a.matches(topic) && b.matches(topic);
                let met = common.as_ref().is_some_and(|common| common.matches(topic));
                prop_assert_eq!(both, met, "{} and {} on {}: {:?}", a, b, topic, common);
            }
            let covered = topics.iter().all(|topic| !b.matches(topic) || a.matches(topic));
            prop_assert_eq!(covers(&a, &b), covered, "{} over {}", a, b);
        }
    }
}
