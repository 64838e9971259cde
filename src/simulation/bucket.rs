//! The model of the bucket: entries by key, compare-and-set, revisions that count through all of them.

use std::collections::BTreeMap;

use crate::cluster::claim::Key;
use crate::cluster::lease::{Answer, Ask, Entry};

pub(super) struct Bucket {
    /// None: it was deleted.
    entries: Option<BTreeMap<Key, Entry>>,
    last: u64,
}

impl Bucket {
    pub(super) fn new() -> Bucket {
        Bucket {
            entries: Some(BTreeMap::new()),
            last: 1000,
        }
    }

    pub(super) fn delete(&mut self) {
        self.entries = None;
    }

    /// Makes it if there is none, and says what is in it. A real one begins at the time it is made at.
    pub(super) fn open(&mut self, revisions_go_back: bool) -> Vec<(Key, Entry)> {
        if self.entries.is_none() {
            self.last = if revisions_go_back {
                0
            } else {
                self.last + 1_000_000
            };
        }
        let entries = self.entries.get_or_insert_default();
        entries
            .iter()
            .map(|(key, entry)| (key.clone(), entry.clone()))
            .collect()
    }

    /// The answer, and what those who watch are told.
    pub(super) fn ask(&mut self, key: &Key, ask: Ask) -> (Answer, Option<Entry>) {
        let Some(entries) = &mut self.entries else {
            return (Answer::Unknown, None);
        };
        let now = entries.get(key).cloned().unwrap_or(Entry::MISSING);
        match ask {
            Ask::Read => (Answer::Read(now), None),
            Ask::Write { expected, .. } if expected != now.revision => (Answer::Refused, None),
            Ask::Write { claim, .. } => {
                self.last += 1;
                let entry = Entry {
                    revision: self.last,
                    claim: Some(claim),
                };
                entries.insert(key.clone(), entry.clone());
                (Answer::Written(self.last), Some(entry))
            }
        }
    }
}
