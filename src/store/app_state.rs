//! What apps keep: the key-value state of all of them in one database.
//!
//! Knows keys and transactions. What a key is made of, behind the app's name, is up to the apps' host.

use std::ops::Bound;

use heed::types::Bytes;
use heed::{Database, RwTxn};

use super::{Store, StoreError};

/// The app's name, a NUL, the key → the value. No app has a NUL in its name.
pub(super) type AppStateDatabase = Database<'static, Bytes, Bytes>;

/// Longest key, in bytes. LMDB's own limit is 511, and an app's name has 64 at most, or
/// one more where its state is put aside.
pub const MAX_APP_KEY_BYTES: usize = 511 - 65 - 1;

/// How full the database may get with what apps keep. The rest is for removing, which needs free
/// pages, and for what the operator does.
const MAX_FILL: f64 = 0.9;

/// Changes that get on disk together, or not at all.
pub struct AppStateChanges<'s> {
    store: &'s Store,
    txn: RwTxn<'s>,
    grows: bool,
}

impl Store {
    /// All that is kept of an app, by key. Keys that are no text are left out.
    pub fn app_state(&self, app: &str) -> Result<Vec<(String, Vec<u8>)>, StoreError> {
        let txn = self.read()?;
        let all = prefix(app);
        let entries = self.inner.app_state.prefix_iter(&txn, &all);
        let mut found = Vec::new();
        for entry in entries.map_err(|e| self.error(e))? {
            let (key, value) = entry.map_err(|e| self.error(e))?;
            if let Ok(key) = std::str::from_utf8(&key[all.len()..]) {
                found.push((key.to_owned(), value.to_vec()));
            }
        }
        Ok(found)
    }

    /// Waits until nobody else writes.
    pub fn write_app_state(&self) -> Result<AppStateChanges<'_>, StoreError> {
        let txn = self.inner.env.write_txn().map_err(|e| self.error(e))?;
        Ok(AppStateChanges {
            store: self,
            txn,
            grows: false,
        })
    }

    pub(super) fn put_app_state(
        &self,
        txn: &mut RwTxn,
        app: &str,
        key: &str,
        value: &[u8],
    ) -> heed::Result<()> {
        self.inner.app_state.put(txn, &full_key(app, key), value)
    }

    pub(super) fn clear_app_state(&self, txn: &mut RwTxn, app: &str) -> heed::Result<()> {
        let first = prefix(app);
        let mut behind = first.clone();
        *behind.last_mut().expect("a NUL, at the least") += 1;
        let range: (Bound<&[u8]>, Bound<&[u8]>) =
            (Bound::Included(&first), Bound::Excluded(&behind));
        self.inner.app_state.delete_range(txn, &range).map(drop)
    }
}

impl AppStateChanges<'_> {
    /// Removes all that is kept of an app.
    pub fn clear(&mut self, app: &str) -> Result<(), StoreError> {
        let cleared = self.store.clear_app_state(&mut self.txn, app);
        cleared.map_err(|e| self.store.error(e))
    }

    pub fn put(&mut self, app: &str, key: &str, value: &[u8]) -> Result<(), StoreError> {
        self.grows = true;
        let put = self.store.put_app_state(&mut self.txn, app, key, value);
        put.map_err(|e| self.store.error(e))
    }

    pub fn remove(&mut self, app: &str, key: &str) -> Result<(), StoreError> {
        let database = self.store.inner.app_state;
        let removed = database.delete(&mut self.txn, &full_key(app, key));
        removed.map(drop).map_err(|e| self.store.error(e))
    }

    /// On disk when it returns.
    pub fn commit(self) -> Result<(), StoreError> {
        if self.grows && self.store.fill(&self.txn)? > MAX_FILL {
            return Err(StoreError::Full {
                path: self.store.inner.path.clone(),
                map_bytes: self.store.inner.map_bytes,
            });
        }
        let store = self.store;
        self.txn.commit().map_err(|e| store.error(e))
    }
}

fn prefix(app: &str) -> Vec<u8> {
    full_key(app, "")
}

fn full_key(app: &str, key: &str) -> Vec<u8> {
    let mut full = Vec::with_capacity(app.len() + 1 + key.len());
    full.extend_from_slice(app.as_bytes());
    full.push(0);
    full.extend_from_slice(key.as_bytes());
    full
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{AppRecord, ComponentId, Desired, StoreConfig};

    fn store(folder: &std::path::Path, map_bytes: usize) -> Store {
        Store::open(&StoreConfig {
            path: folder.join("store"),
            map_bytes,
        })
        .unwrap()
    }

    fn put(store: &Store, app: &str, key: &str, value: &[u8]) -> Result<(), StoreError> {
        let mut changes = store.write_app_state()?;
        changes.put(app, key, value)?;
        changes.commit()
    }

    fn keys(store: &Store, app: &str) -> Vec<String> {
        let state = store.app_state(app).unwrap();
        state.into_iter().map(|(key, _)| key).collect()
    }

    #[test]
    fn apps_do_not_see_each_others_state_whatever_their_names() {
        let folder = tempfile::tempdir().unwrap();
        let store = store(folder.path(), 16 << 20);
        for app in ["a", "a-b", "a.b", "ab"] {
            put(&store, app, "key", app.as_bytes()).unwrap();
        }
        put(&store, "a", &"k".repeat(MAX_APP_KEY_BYTES), b"long").unwrap();
        let mut changes = store.write_app_state().unwrap();
        changes.clear("a").unwrap();
        changes.commit().unwrap();
        assert_eq!(keys(&store, "a"), [""; 0]);
        for app in ["a-b", "a.b", "ab"] {
            assert_eq!(
                store.app_state(app).unwrap(),
                [("key".to_owned(), app.as_bytes().to_vec())]
            );
        }
    }

    #[test]
    fn changes_that_are_not_committed_leave_no_trace() {
        let folder = tempfile::tempdir().unwrap();
        let store = store(folder.path(), 16 << 20);
        put(&store, "a", "old", b"").unwrap();
        let mut changes = store.write_app_state().unwrap();
        changes.put("a", "new", b"").unwrap();
        changes.remove("a", "old").unwrap();
        drop(changes);
        assert_eq!(keys(&store, "a"), ["old"]);
    }

    #[test]
    fn state_goes_with_the_app_and_an_app_that_is_new_begins_without() {
        let folder = tempfile::tempdir().unwrap();
        let store = store(folder.path(), 16 << 20);
        let record = AppRecord {
            manifest: "m".into(),
            component: ComponentId::of(b"c"),
            component_bytes: 1,
            desired: Desired::Running,
            previous: None,
            on_trial: false,
        };
        // Left by somebody of the same name.
        put(&store, "a", "left", b"").unwrap();
        store.put_app("a", &record, b"c").unwrap();
        assert_eq!(keys(&store, "a"), [""; 0]);
        put(&store, "a", "own", b"").unwrap();
        store.put_app("a", &record, b"c").unwrap();
        assert_eq!(keys(&store, "a"), ["own"], "an upgrade keeps it");
        store.remove_app("a").unwrap();
        assert_eq!(keys(&store, "a"), [""; 0]);
    }

    #[test]
    fn a_store_that_is_nearly_full_takes_no_more_but_lets_remove() {
        let folder = tempfile::tempdir().unwrap();
        let store = store(folder.path(), 1 << 20);
        let mut taken = 0;
        let error = loop {
            match put(&store, "a", &format!("{taken}"), &[7; 30_000]) {
                Ok(()) => taken += 1,
                Err(error) => break error.to_string(),
            }
        };
        assert!(error.contains("store.max_bytes"), "{error}");
        assert!(taken > 10, "{taken}");
        let mut changes = store.write_app_state().unwrap();
        for key in 0..taken {
            changes.remove("a", &key.to_string()).unwrap();
        }
        changes.commit().unwrap();
        put(&store, "a", "again", &[7; 30_000]).unwrap();
    }
}
