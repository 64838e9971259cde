//! Where what was published differs from what was expected.

use std::fmt::Display;

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
    let between = between(expected, published, Line::is_met_by)?;
    let mut text = match between.left.first() {
        Some(line) => format!("{file}, line {}:", line.number),
        None if between.after > 0 => {
            format!("{file}, after {} lines that fit:", between.before)
        }
        None => format!("{file}, after its last line:"),
    };
    show(&mut text, '-', between.left.iter());
    let published = between.right.iter();
    show(&mut text, '+', published.map(|event| writer.line(event)));
    Some(text)
}

/// What one version has and another one has not, and the other way round.
#[derive(Debug, PartialEq)]
pub(super) struct Change<'a> {
    pub(super) before: Vec<&'a str>,
    pub(super) after: Vec<&'a str>,
}

/// None if both are the same, in the same order. Of as many lines on either side, those count that are not the
/// same as the one in their place; else all between the first and the last difference.
pub(super) fn change<'a>(before: &'a [String], after: &'a [String]) -> Option<Change<'a>> {
    let Between { left, right, .. } = between(before, after, |a, b| a == b)?;
    let lines = |lines: &'a [String], others: &[String]| {
        let pairs = lines.len() == others.len();
        let lines = lines.iter().enumerate();
        let differing = lines.filter(|(at, line)| !pairs || **line != others[*at]);
        differing.map(|(_, line)| line.as_str()).collect()
    };
    Some(Change {
        before: lines(left, right),
        after: lines(right, left),
    })
}

impl Change<'_> {
    /// As lines that begin with `-` and `+`.
    pub(super) fn text(&self) -> String {
        let mut text = String::new();
        show(&mut text, '-', self.before.iter());
        show(&mut text, '+', self.after.iter());
        text
    }
}

/// What is left of two lists without what is the same at their beginnings and ends.
struct Between<'a, A, B> {
    /// How many are the same.
    before: usize,
    left: &'a [A],
    right: &'a [B],
    after: usize,
}

/// None if nothing is left.
fn between<'a, A, B>(
    left: &'a [A],
    right: &'a [B],
    is_same: impl Fn(&A, &B) -> bool,
) -> Option<Between<'a, A, B>> {
    let same = |(a, b): &(&A, &B)| is_same(a, b);
    let before = left.iter().zip(right).take_while(same).count();
    let (left, right) = (&left[before..], &right[before..]);
    if left.is_empty() && right.is_empty() {
        return None;
    }
    let backwards = left.iter().rev().zip(right.iter().rev());
    let after = backwards.take_while(same).count();
    Some(Between {
        before,
        left: &left[..left.len() - after],
        right: &right[..right.len() - after],
        after,
    })
}

fn show(text: &mut String, sign: char, lines: impl ExactSizeIterator<Item: Display>) {
    let left = lines.len().saturating_sub(MOST_SHOWN);
    for line in lines.take(MOST_SHOWN) {
        text.push_str(&format!("\n{sign} {line}"));
    }
    if left > 0 {
        text.push_str(&format!("\n{sign} (and {left} more)"));
    }
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
    fn of_two_versions_lines_are_compared_in_their_places_if_there_are_as_many() {
        let lines = |text: &str| text.chars().map(String::from).collect::<Vec<_>>();
        for (before, after, gone, new) in [
            ("abcde", "axcye", "bd", "xy"),
            ("abc", "abxc", "", "x"),
            ("abcd", "axd", "bc", "x"),
            ("", "a", "", "a"),
        ] {
            let (before, after) = (lines(before), lines(after));
            let change = change(&before, &after).unwrap();
            assert_eq!(change.before.concat(), gone, "{before:?} {after:?}");
            assert_eq!(change.after.concat(), new, "{before:?} {after:?}");
        }
        assert_eq!(change(&lines("ab"), &lines("ab")), None);
        let (before, after) = (lines("ab"), lines("ac"));
        assert_eq!(change(&before, &after).unwrap().text(), "\n- b\n+ c");
    }

    #[test]
    fn a_long_difference_is_cut() {
        let text = compare(&["a"; 25], &[]).unwrap();
        assert!(text.ends_with("\n- (and 5 more)"), "{text}");
        assert_eq!(text.lines().count(), 22);
    }
}
