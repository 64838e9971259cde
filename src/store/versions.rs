//! An app's upgrade, and the way back: the version before stays in the store, with what the app had
//! kept by then if the new one writes that in another format.

use heed::RwTxn;

use super::{AppRecord, ComponentId, Store, StoreError};

/// The version that an upgrade has taken the place of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PreviousVersion {
    /// The manifest as it was handed in.
    pub manifest: String,
    pub component: ComponentId,
    pub component_bytes: u64,
}

impl AppRecord {
    /// The version as it will stand in the record of its successor.
    pub fn to_previous(&self) -> PreviousVersion {
        PreviousVersion {
            manifest: self.manifest.clone(),
            component: self.component,
            component_bytes: self.component_bytes,
        }
    }
}

impl Store {
    /// Stores the next version of an app; `record` names the one before. `kept` is what the app has
    /// kept so far, if the next version is going to change its format. Returns the components that
    /// nobody needs any more and that are gone now.
    pub fn upgrade_app<'k>(
        &self,
        name: &str,
        record: &AppRecord,
        component: &[u8],
        kept: impl IntoIterator<Item = (&'k str, &'k [u8])>,
    ) -> Result<Vec<ComponentId>, StoreError> {
        let aside = set_aside(name);
        self.write(|txn| {
            self.inner
                .components
                .put(txn, &record.component.0, component)?;
            self.clear_app_state(txn, &aside)?;
            for (key, value) in kept {
                self.put_app_state(txn, &aside, key, value)?;
            }
            self.inner.apps.put(txn, name, &record.encode())?;
            self.remove_unused_components(txn)
        })
    }

    /// The version `component` of an app has passed its trial. Does nothing if that isn't the one
    /// that is stored.
    pub fn trust_app(&self, name: &str, component: ComponentId) -> Result<(), StoreError> {
        self.write(|txn| {
            if let Some(mut record) = self.version(txn, name, component)? {
                record.on_trial = false;
                self.inner.apps.put(txn, name, &record.encode())?;
            }
            Ok(())
        })
    }

    /// Puts the version before into the place of `component`, and with `restores` what was put aside
    /// into the place of what the app keeps. Returns the components that nobody needs any more and that
    /// are gone now; none if it has done nothing, because that isn't the version that is stored, or
    /// there is none before it.
    pub fn roll_back_app(
        &self,
        name: &str,
        component: ComponentId,
        restores: bool,
    ) -> Result<Option<Vec<ComponentId>>, StoreError> {
        let kept = match restores {
            true => self.state_before_upgrade(name)?,
            false => Vec::new(),
        };
        self.write(|txn| {
            let Some(record) = self.version(txn, name, component)? else {
                return Ok(None);
            };
            let Some(previous) = record.previous else {
                return Ok(None);
            };
            let back = AppRecord {
                manifest: previous.manifest,
                component: previous.component,
                component_bytes: previous.component_bytes,
                desired: record.desired,
                previous: None,
                on_trial: false,
            };
            self.inner.apps.put(txn, name, &back.encode())?;
            if restores {
                self.clear_app_state(txn, name)?;
            }
            for (key, value) in &kept {
                self.put_app_state(txn, name, key, value)?;
            }
            self.clear_state_before_upgrade(txn, name)?;
            self.remove_unused_components(txn).map(Some)
        })
    }

    /// What an app had kept when it was upgraded, by key; nothing if the format stayed the same.
    pub fn state_before_upgrade(&self, name: &str) -> Result<Vec<(String, Vec<u8>)>, StoreError> {
        self.app_state(&set_aside(name))
    }

    pub(super) fn clear_state_before_upgrade(
        &self,
        txn: &mut RwTxn,
        name: &str,
    ) -> heed::Result<()> {
        self.clear_app_state(txn, &set_aside(name))
    }

    /// The record of an app, if it is of this component.
    fn version(
        &self,
        txn: &RwTxn,
        name: &str,
        component: ComponentId,
    ) -> heed::Result<Option<AppRecord>> {
        let Some(bytes) = self.inner.apps.get(txn, name)? else {
            return Ok(None);
        };
        let record =
            AppRecord::decode(bytes).map_err(|error| heed::Error::Decoding(error.into()))?;
        Ok(Some(record).filter(|record| record.component == component))
    }
}

/// Under which name the state of an app is put aside. No app can have it.
fn set_aside(name: &str) -> String {
    format!("{name}\u{1}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{Desired, StoreConfig};

    fn record(component: &[u8], previous: Option<&AppRecord>) -> AppRecord {
        AppRecord {
            manifest: String::from_utf8_lossy(component).into_owned(),
            component: ComponentId::of(component),
            component_bytes: component.len() as u64,
            desired: Desired::Running,
            previous: previous.map(AppRecord::to_previous),
            on_trial: previous.is_some(),
        }
    }

    fn stored(store: &Store) -> AppRecord {
        let mut apps = store.apps().unwrap();
        apps.pop().unwrap().1.unwrap()
    }

    #[test]
    fn the_version_before_stays_until_the_next_upgrade() {
        let folder = tempfile::tempdir().unwrap();
        let config = StoreConfig {
            path: folder.path().join("store"),
            map_bytes: 16 << 20,
        };
        let store = Store::open(&config).unwrap();
        let first = record(b"one", None);
        let second = record(b"two", Some(&first));
        let third = record(b"three", Some(&second));
        store.put_app("a", &first, b"one").unwrap();
        let kept = [("key", b"value".as_slice())];
        assert_eq!(store.upgrade_app("a", &second, b"two", kept).unwrap(), []);
        assert_eq!(store.component(first.component).unwrap(), b"one");
        let before = store.state_before_upgrade("a").unwrap();
        assert_eq!(before, [("key".to_owned(), b"value".to_vec())]);
        assert_eq!(store.app_state("a").unwrap(), []);

        drop(store);
        let store = Store::open(&config).unwrap();
        assert_eq!(stored(&store), second);
        store.trust_app("a", first.component).unwrap();
        assert!(stored(&store).on_trial, "of another version");
        store.trust_app("a", second.component).unwrap();
        assert!(!stored(&store).on_trial);

        let gone = store.upgrade_app("a", &third, b"three", []).unwrap();
        assert_eq!(gone, [first.component]);
        assert_eq!(store.state_before_upgrade("a").unwrap(), []);
        let gone = store.roll_back_app("a", third.component, false).unwrap();
        assert_eq!(gone, Some(vec![third.component]));
        assert_eq!(stored(&store).component, second.component);
        let gone = store.roll_back_app("a", second.component, true).unwrap();
        assert_eq!(gone, None);
        assert_eq!(stored(&store).component, second.component);
    }

    #[test]
    fn going_back_brings_back_what_was_put_aside() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&StoreConfig {
            path: folder.path().join("store"),
            map_bytes: 16 << 20,
        })
        .unwrap();
        let first = record(b"one", None);
        let second = record(b"two", Some(&first));
        let keep = |key, value: &[u8]| {
            let mut changes = store.write_app_state().unwrap();
            changes.put("a", key, value).unwrap();
            changes.commit().unwrap();
        };
        let kept = [("key", b"before".as_slice())];
        for (restores, expected) in [(true, vec!["key"]), (false, vec!["key", "new"])] {
            store.put_app("a", &first, b"one").unwrap();
            store.upgrade_app("a", &second, b"two", kept).unwrap();
            keep("key", b"after");
            keep("new", b"");
            store
                .roll_back_app("a", second.component, restores)
                .unwrap();
            let state = store.app_state("a").unwrap();
            let keys: Vec<_> = state.iter().map(|(key, _)| key.as_str()).collect();
            assert_eq!(keys, expected);
            assert_eq!(state[0].1 == b"before", restores);
            assert_eq!(store.state_before_upgrade("a").unwrap(), []);
        }
    }

    #[test]
    fn what_was_put_aside_goes_with_the_app() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&StoreConfig {
            path: folder.path().join("store"),
            map_bytes: 16 << 20,
        })
        .unwrap();
        let first = record(b"one", None);
        let second = record(b"two", Some(&first));
        store.put_app("a", &first, b"one").unwrap();
        let kept = [("key", b"value".as_slice())];
        store.upgrade_app("a", &second, b"two", kept).unwrap();
        let mut gone = store.remove_app("a").unwrap();
        gone.sort();
        let mut both = [first.component, second.component];
        both.sort();
        assert_eq!(gone, both);
        assert_eq!(store.state_before_upgrade("a").unwrap(), []);
    }
}
