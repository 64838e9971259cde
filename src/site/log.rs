//! What a worker keeps for its site, as a log of changes that whoever acts for it next can read. Without I/O.
//!
//! A message of the log is a part of a change: a change that is too large for one message has several, and is in
//! force with the last of them. A change says, too, up to where in each stream its events have been handled, so
//! that what is kept and what was handled never differ. Now and then one replaces all before it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{Entries, Key, Value};

/// The first byte of each message.
const FORMAT: u8 = 1;

/// Up to where the events of a stream have been handled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    /// When the stream was made, in seconds since 1970: one that is made anew counts anew.
    pub made: i64,
    /// The number of the last message.
    pub number: u64,
}

pub type Positions = BTreeMap<String, Position>;

/// A part of a change, as it is in a message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// Who has written it: the fencing token of its right to do so, and what it was called.
    pub token: u64,
    pub gateway: String,
    /// Counts the changes of this sitting.
    pub change: u64,
    /// Others of this change follow.
    pub more: bool,
    /// What was before it is void.
    pub replaces: bool,
    entries: Vec<(Key, Option<Value>)>,
    /// Those that have changed; only in the last part.
    positions: Vec<(String, Position)>,
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unreadable {
    #[error(
        "it is of format {0}, and this version of Headgate knows {FORMAT}: update this gateway"
    )]
    Format(u8),
    #[error("it can't be read: {0}")]
    Damaged(#[from] postcard::Error),
    #[error("it is empty")]
    Empty,
}

impl Part {
    pub fn encode(&self) -> Vec<u8> {
        let bytes = postcard::to_extend(self, vec![FORMAT]);
        bytes.expect("what it is made of can be encoded")
    }

    pub fn decode(bytes: &[u8]) -> Result<Part, Unreadable> {
        match bytes {
            [] => Err(Unreadable::Empty),
            [FORMAT, part @ ..] => Ok(postcard::from_bytes(part)?),
            [other, ..] => Err(Unreadable::Format(*other)),
        }
    }
}

/// A change that is to be written.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Change {
    pub replaces: bool,
    pub entries: BTreeMap<Key, Option<Value>>,
    pub positions: Positions,
}

impl Change {
    /// In parts of about `most_bytes` each, the last of which puts it into force.
    pub fn into_parts(
        self,
        token: u64,
        gateway: &str,
        change: u64,
        most_bytes: usize,
    ) -> Vec<Part> {
        let part = |replaces, entries| Part {
            token,
            gateway: gateway.to_owned(),
            change,
            more: true,
            replaces,
            entries,
            positions: Vec::new(),
        };
        let (mut parts, mut entries, mut bytes) = (Vec::new(), Vec::new(), 0);
        for (key, value) in self.entries {
            let size = key.len() + value.as_ref().map_or(0, |value| value.len()) + 8;
            if bytes > 0 && bytes + size > most_bytes {
                parts.push(part(self.replaces, std::mem::take(&mut entries)));
                bytes = 0;
            }
            bytes += size;
            entries.push((key, value));
        }
        let mut last = part(self.replaces, entries);
        last.more = false;
        last.positions = self.positions.into_iter().collect();
        parts.push(last);
        parts
    }
}

/// What there is to go on from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Image {
    pub entries: Entries,
    pub positions: Positions,
    /// Of the last who has written anything.
    pub token: u64,
    pub gateway: String,
}

/// Reads a log from its beginning.
#[derive(Debug, Default)]
pub struct Replay {
    image: Image,
    /// Of a change whose last part has not come.
    parts: Vec<Part>,
}

impl Replay {
    pub fn add(&mut self, part: Part) {
        self.image.token = self.image.token.max(part.token);
        self.image.gateway.clone_from(&part.gateway);
        // Who wrote those has not come to their end.
        self.parts
            .retain(|other| (other.token, other.change) == (part.token, part.change));
        let more = part.more;
        self.parts.push(part);
        if more {
            return;
        }
        let parts = std::mem::take(&mut self.parts);
        let image = &mut self.image;
        if parts[0].replaces {
            image.entries.clear();
            image.positions.clear();
        }
        for part in parts {
            for (key, value) in part.entries {
                match value {
                    Some(value) => image.entries.insert(key, value),
                    None => image.entries.remove(&key),
                };
            }
            image.positions.extend(part.positions);
        }
    }

    pub fn image(self) -> Image {
        self.image
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn change(entries: &[(&str, Option<&str>)], positions: &[(&str, u64)]) -> Change {
        let value = |value: &Option<&str>| value.map(|text| text.as_bytes().into());
        let position = |number: &u64| Position {
            made: 1,
            number: *number,
        };
        Change {
            replaces: false,
            entries: entries
                .iter()
                .map(|(key, text)| ((*key).into(), value(text)))
                .collect(),
            positions: positions
                .iter()
                .map(|(name, at)| ((*name).into(), position(at)))
                .collect(),
        }
    }

    fn replay(parts: impl IntoIterator<Item = Part>) -> Image {
        let mut replay = Replay::default();
        for part in parts {
            replay.add(Part::decode(&part.encode()).unwrap());
        }
        replay.image()
    }

    fn entries(image: &Image) -> Vec<(&str, &[u8])> {
        image
            .entries
            .iter()
            .map(|(key, value)| (&**key, &**value))
            .collect()
    }

    #[test]
    fn what_is_kept_and_up_to_where_it_counts_come_back_together() {
        let one = change(&[("a", Some("1")), ("b", Some("2"))], &[("s", 4)]);
        let two = change(&[("a", None), ("c", Some("3"))], &[("t", 9)]);
        let parts = one
            .into_parts(7, "press", 0, 1000)
            .into_iter()
            .chain(two.into_parts(7, "press", 1, 1000));
        let image = replay(parts);
        assert_eq!(entries(&image), [("b", &b"2"[..]), ("c", b"3")]);
        assert_eq!(image.positions["s"].number, 4);
        assert_eq!(image.positions["t"].number, 9);
        assert_eq!((image.token, image.gateway.as_str()), (7, "press"));
    }

    #[test]
    fn a_change_without_its_last_part_never_was() {
        let before = change(&[("a", Some("1"))], &[("s", 1)]).into_parts(7, "press", 0, 1000);
        let mut broken =
            change(&[("a", Some("2")), ("b", Some("2"))], &[("s", 2)]).into_parts(7, "press", 1, 1);
        assert_eq!(broken.len(), 2);
        broken.pop();
        let next = change(&[("c", Some("3"))], &[("s", 3)]).into_parts(8, "oven", 0, 1000);
        let image = replay(before.into_iter().chain(broken).chain(next));
        assert_eq!(entries(&image), [("a", &b"1"[..]), ("c", b"3")]);
        assert_eq!((image.positions["s"].number, image.token), (3, 8));
    }

    #[test]
    fn what_replaces_all_does_so_with_its_last_part() {
        let before = change(&[("a", Some("1")), ("b", Some("1"))], &[("s", 1)])
            .into_parts(7, "press", 0, 1000);
        let snapshot = Change {
            replaces: true,
            ..change(&[("b", Some("2")), ("c", Some("3"))], &[("t", 5)])
        };
        let mut parts = snapshot.into_parts(7, "press", 1, 1);
        assert!(parts.len() > 1);
        let whole = replay(before.iter().cloned().chain(parts.iter().cloned()));
        assert_eq!(entries(&whole), [("b", &b"2"[..]), ("c", b"3")]);
        assert_eq!(whole.positions.keys().collect::<Vec<_>>(), ["t"]);
        // The same, if what was before has been removed already.
        assert_eq!(entries(&replay(parts.clone())), entries(&whole));
        parts.pop();
        let half = replay(before.into_iter().chain(parts));
        assert_eq!(entries(&half), [("a", &b"1"[..]), ("b", b"1")]);
    }

    #[test]
    fn what_is_no_message_of_a_log_is_told() {
        assert_eq!(Part::decode(&[]), Err(Unreadable::Empty));
        assert_eq!(Part::decode(&[9, 1]), Err(Unreadable::Format(9)));
        assert!(matches!(
            Part::decode(&[FORMAT, 1]),
            Err(Unreadable::Damaged(_))
        ));
    }

    proptest! {
        #[test]
        fn whatever_is_no_message_is_refused_or_read(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(part) = Part::decode(&bytes) {
                let mut replay = Replay::default();
                replay.add(part);
            }
        }

        #[test]
        fn however_a_change_is_parted_it_is_the_same(
            changes in prop::collection::vec(
                prop::collection::btree_map("[a-d]", prop::option::of("[a-z]{0,9}"), 0..4), 1..6),
            most in 1..40usize,
        ) {
            let all = |most| {
                let parts = changes.iter().enumerate().flat_map(|(number, entries)| {
                    let entries: Vec<_> = entries.iter().map(|(key, value)| (key.as_str(), value.as_deref())).collect();
                    change(&entries, &[("s", number as u64)]).into_parts(1, "g", number as u64, most)
                });
                replay(parts)
            };
            prop_assert_eq!(all(most), all(100_000));
        }
    }
}
