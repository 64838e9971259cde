//! What singleton mappings keep in one sitting, on its way to the site's log. Without I/O.
//!
//! Values, and the receipts of the events that have led to them, go in together and are taken together: so the
//! log never says that an event was handled whose value it does not have.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use tokio::sync::Notify;

use super::read_stored;
use crate::event::Receipt;
use crate::mappings::Stored;
use crate::site::{Changes, Entries, Key, SharedState, Value};

/// The site's mappings, as long as this gateway has them.
pub(super) struct Sitting {
    number: u64,
    changed: Arc<Notify>,
    is_over: AtomicBool,
    kept: Mutex<Kept>,
}

/// A key is the mapping's name, a NUL, and the alias of the source.
#[derive(Default)]
struct Kept {
    entries: Entries,
    /// What was not taken yet. None: is removed.
    changes: BTreeMap<Key, Option<Value>>,
    receipts: Vec<Arc<dyn Receipt>>,
    /// Mappings that were removed, until the log has nothing of them, each with the version since when.
    removed: BTreeMap<String, u64>,
    /// Counts what was removed.
    version: u64,
}

impl Sitting {
    /// Goes on from `entries`, without what was removed in the sitting `before` and may be in the log yet.
    pub(super) fn new(
        number: u64,
        entries: Entries,
        changed: Arc<Notify>,
        before: Option<&Sitting>,
    ) -> Sitting {
        let removed = before.map(|before| std::mem::take(&mut before.kept.lock().removed));
        let sitting = Sitting {
            number,
            changed,
            is_over: AtomicBool::new(false),
            kept: Mutex::new(Kept {
                entries,
                ..Kept::default()
            }),
        };
        for mapping in removed.unwrap_or_default().keys() {
            sitting.forget(mapping);
        }
        sitting
    }

    pub(super) fn number(&self) -> u64 {
        self.number
    }

    /// What is made of its events from here on is nobody's.
    pub(super) fn end(&self) {
        self.is_over.store(true, Ordering::Release);
    }

    pub(super) fn is_over(&self) -> bool {
        self.is_over.load(Ordering::Acquire)
    }

    /// The values of a mapping's sources. What can't be read is left out.
    pub(super) fn values(&self, mapping: &str) -> Vec<Stored> {
        let kept = self.kept.lock();
        let values = kept.of(mapping);
        let read = values.filter_map(|(key, value)| read_stored(mapping, alias(key), value));
        read.collect()
    }

    /// Values have changed, and by that these events are finished, if any.
    pub(super) fn keep(&self, values: Vec<(&str, Stored)>, receipts: Vec<Arc<dyn Receipt>>) {
        if values.is_empty() && receipts.is_empty() {
            return;
        }
        let mut kept = self.kept.lock();
        for (mapping, stored) in values {
            let key: Key = format!("{mapping}\0{}", stored.alias).into();
            let value = serde_json::to_vec(&stored).expect("text and numbers are always JSON");
            let value: Value = value.into();
            kept.entries.insert(key.clone(), value.clone());
            kept.changes.insert(key, Some(value));
        }
        kept.receipts.extend(receipts);
        drop(kept);
        self.changed.notify_one();
    }

    /// Whether the log may have something of a mapping that was removed.
    pub(super) fn is_to_forget(&self) -> bool {
        !self.kept.lock().removed.is_empty()
    }

    /// The mapping was removed.
    pub(super) fn forget(&self, mapping: &str) {
        let mut kept = self.kept.lock();
        let keys: Vec<Key> = kept.of(mapping).map(|(key, _)| key.clone()).collect();
        if keys.is_empty() {
            return;
        }
        for key in keys {
            kept.entries.remove(&key);
            kept.changes.insert(key, None);
        }
        kept.version += 1;
        let version = kept.version;
        kept.removed.insert(mapping.to_owned(), version);
        drop(kept);
        self.changed.notify_one();
    }
}

impl SharedState for Arc<Sitting> {
    fn take(&self, all: bool) -> Option<Changes> {
        let mut kept = self.kept.lock();
        if !all && kept.changes.is_empty() && kept.receipts.is_empty() {
            return None;
        }
        let changes = std::mem::take(&mut kept.changes);
        let whole = || {
            let entries = kept.entries.iter();
            entries.map(|(key, value)| (key.clone(), Some(value.clone())))
        };
        Some(Changes {
            replaces: all,
            entries: if all { whole().collect() } else { changes },
            version: kept.version,
            receipts: std::mem::take(&mut kept.receipts),
        })
    }

    fn written(&self, mut changes: Changes, safe: bool) {
        let mut kept = self.kept.lock();
        if safe {
            kept.removed.retain(|_, since| *since > changes.version);
            drop(kept);
            // Their events are finished.
            drop(changes);
            return;
        }
        for (key, value) in changes.entries {
            kept.changes.entry(key).or_insert(value);
        }
        changes.receipts.append(&mut kept.receipts);
        kept.receipts = changes.receipts;
    }
}

impl Kept {
    /// What is kept for a mapping.
    fn of(&self, mapping: &str) -> impl Iterator<Item = (&Key, &Value)> {
        let prefix = format!("{mapping}\0");
        let from = (Bound::Included(prefix.as_str()), Bound::Unbounded);
        let from = self.entries.range::<str, _>(from);
        from.take_while(move |(key, _)| key.starts_with(&prefix))
    }
}

fn alias(key: &str) -> &str {
    key.split_once('\0').map_or("", |(_, alias)| alias)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct Finished(Arc<AtomicBool>);

    impl Receipt for Finished {
        fn abandon(&self) {}
    }

    impl Drop for Finished {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }

    fn stored(alias: &str, value: u64) -> Stored {
        Stored {
            alias: alias.to_owned(),
            topic: format!("umh.v1.{alias}"),
            value: value.to_string(),
            timestamp_ms: 1,
            arrived_ms: 2,
        }
    }

    fn sitting(entries: Entries, before: Option<&Sitting>) -> Arc<Sitting> {
        Arc::new(Sitting::new(1, entries, Arc::default(), before))
    }

    /// The keys with a dot for the NUL, and the value of the source; without one if it is removed.
    fn shown(changes: &Changes) -> Vec<String> {
        let shown = |(key, value): (&Key, &Option<Value>)| {
            let key = key.replace('\0', ".");
            match value {
                Some(value) => {
                    let stored: Stored = serde_json::from_slice(value).unwrap();
                    format!("{key}={}", stored.value)
                }
                None => key,
            }
        };
        changes.entries.iter().map(shown).collect()
    }

    fn entries(of: &[(&str, Stored)]) -> Entries {
        let sitting = sitting(Entries::new(), None);
        sitting.keep(of.to_vec(), Vec::new());
        sitting.kept.lock().entries.clone()
    }

    #[test]
    fn what_has_changed_is_taken_once_with_its_events_and_these_are_finished_when_it_is_written() {
        let sitting = sitting(entries(&[("m", stored("a", 1))]), None);
        assert!(sitting.take(false).is_none());
        let finished = Arc::new(AtomicBool::new(false));
        let receipt = Arc::new(Finished(finished.clone()));
        sitting.keep(vec![("m", stored("b", 2))], vec![receipt]);
        let changes = sitting.take(false).unwrap();
        assert_eq!(
            (shown(&changes), changes.replaces),
            (vec!["m.b=2".to_owned()], false)
        );
        assert_eq!(changes.receipts.len(), 1);
        assert!(sitting.take(false).is_none());
        assert!(!finished.load(Ordering::Relaxed));
        sitting.written(changes, true);
        assert!(finished.load(Ordering::Relaxed));
        let all = sitting.take(true).unwrap();
        assert_eq!(
            (shown(&all), all.replaces),
            (vec!["m.a=1".to_owned(), "m.b=2".to_owned()], true)
        );
    }

    #[test]
    fn what_could_not_be_written_comes_again_unless_there_is_something_newer() {
        let sitting = sitting(Entries::new(), None);
        let finished = Arc::new(AtomicBool::new(false));
        let receipt = Arc::new(Finished(finished.clone()));
        sitting.keep(
            vec![("m", stored("a", 1)), ("m", stored("b", 1))],
            vec![receipt],
        );
        let changes = sitting.take(false).unwrap();
        sitting.keep(vec![("m", stored("b", 2))], Vec::new());
        sitting.written(changes, false);
        let again = sitting.take(false).unwrap();
        assert_eq!(shown(&again), ["m.a=1", "m.b=2"]);
        assert_eq!(again.receipts.len(), 1);
        assert!(!finished.load(Ordering::Relaxed));
    }

    #[test]
    fn a_mapping_begins_with_its_own_values_and_what_cannot_be_read_is_left_out() {
        let mut kept = entries(&[
            ("m", stored("a", 1)),
            ("m-2", stored("a", 2)),
            ("n", stored("a", 3)),
        ]);
        kept.insert("m\0b".into(), b"{".as_slice().into());
        let sitting = sitting(kept, None);
        assert_eq!(sitting.values("m"), [stored("a", 1)]);
        assert_eq!(sitting.values("m-2"), [stored("a", 2)]);
        assert_eq!(sitting.values("none"), []);
    }

    #[test]
    fn what_was_removed_goes_from_the_log_even_if_the_sitting_ends_before_it_is_written() {
        let kept = entries(&[("m", stored("a", 1)), ("n", stored("a", 2))]);
        let first = sitting(kept.clone(), None);
        first.forget("m");
        assert_eq!(shown(&first.take(false).unwrap()), ["m.a"]);
        // Taken, and not written: the log has it still.
        let second = sitting(kept, Some(&first));
        let changes = second.take(false).unwrap();
        assert_eq!(shown(&changes), ["m.a"]);
        assert_eq!(second.values("m"), []);
        second.written(changes, true);
        // Another gateway may have kept something for a mapping of that name since.
        let third = sitting(entries(&[("m", stored("a", 9))]), Some(&second));
        assert!(third.take(false).is_none());
        assert_eq!(third.values("m"), [stored("a", 9)]);
    }
}
