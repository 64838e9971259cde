//! Where what was published differs from what was expected.

use crate::cli::events::{Line, Writer};
use crate::event::Event;

/// Most lines that are shown of either side.
const MOST_SHOWN: usize = 20;

/// None if all is as expected, in the same order. Else what is between the first and the last
/// difference, as lines that begin with `-` (expected) and `+` (published).
pub(super) fn difference(
    file: &str,
    expected: &[Line],
    published: &[Event],
    writer: &Writer,
) -> Option<String> {
    let same = |(line, event): &(&Line, &Event)| line.is_met_by(event);
    let before = expected.iter().zip(published).take_while(same).count();
    let (expected, published) = (&expected[before..], &published[before..]);
    if expected.is_empty() && published.is_empty() {
        return None;
    }
    let backwards = expected.iter().rev().zip(published.iter().rev());
    let after = backwards.take_while(same).count();
    let expected = &expected[..expected.len() - after];
    let published = &published[..published.len() - after];

    let mut text = match expected.first() {
        Some(line) => format!("{file}, line {}:", line.number),
        None if after > 0 => format!("{file}, after {before} lines that fit:"),
        None => format!("{file}, after its last line:"),
    };
    let mut show = |sign: char, lines: &mut dyn ExactSizeIterator<Item = String>| {
        let left = lines.len().saturating_sub(MOST_SHOWN);
        for line in lines.take(MOST_SHOWN) {
            text.push_str(&format!("\n{sign} {line}"));
        }
        if left > 0 {
            text.push_str(&format!("\n{sign} (and {left} more)"));
        }
    };
    show('-', &mut expected.iter().map(Line::to_string));
    show('+', &mut published.iter().map(|event| writer.line(event)));
    Some(text)
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::cli::events::Payload;
    use crate::event::Topic;

    fn compare(expected: &[&str], published: &[&str]) -> Option<String> {
        let topic = || Topic::new("t").unwrap();
        let writer = Writer::new();
        let expected: Vec<_> = expected
            .iter()
            .zip(1..)
            .map(|(text, number)| Line {
                number,
                topic: topic(),
                payload: Payload::Bytes(text.as_bytes().to_vec()),
                timestamp_ns: None,
            })
            .collect();
        let published: Vec<_> = published
            .iter()
            .map(|text| Event::new(topic(), text.as_bytes().to_vec().into(), Instant::now()))
            .collect();
        difference("expected.jsonl", &expected, &published, &writer)
    }

    #[test]
    fn what_is_the_same_has_none() {
        assert_eq!(compare(&[], &[]), None);
        assert_eq!(compare(&["a", "b"], &["a", "b"]), None);
    }

    #[test]
    fn only_what_differs_is_shown_with_its_line() {
        assert_eq!(
            compare(&["a", "b", "c"], &["a", "x", "c"]).unwrap(),
            "expected.jsonl, line 2:\n\
             - {\"topic\":\"t\",\"payload\":\"b\"}\n\
             + {\"topic\":\"t\",\"payload\":\"x\"}"
        );
    }

    #[test]
    fn what_is_missing_and_what_is_too_much_is_shown() {
        assert_eq!(
            compare(&["a", "a"], &["a"]).unwrap(),
            "expected.jsonl, line 2:\n- {\"topic\":\"t\",\"payload\":\"a\"}"
        );
        assert_eq!(
            compare(&["a"], &["a", "b"]).unwrap(),
            "expected.jsonl, after its last line:\n+ {\"topic\":\"t\",\"payload\":\"b\"}"
        );
        assert_eq!(
            compare(&["a", "c"], &["a", "b", "c"]).unwrap(),
            "expected.jsonl, after 1 lines that fit:\n+ {\"topic\":\"t\",\"payload\":\"b\"}"
        );
    }

    #[test]
    fn a_long_difference_is_cut() {
        let text = compare(&["a"; 25], &[]).unwrap();
        assert!(text.ends_with("\n- (and 5 more)"), "{text}");
        assert_eq!(text.lines().count(), 22);
    }
}
