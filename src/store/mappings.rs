//! Mappings: their configurations, and the last values of their sources.
//!
//! Knows keys and transactions. What a configuration says and how a value is written is up to the mappings.

use std::ops::Bound;

use heed::types::{Bytes, Str};
use heed::{Database, RwTxn};

use super::{Store, StoreError};

#[derive(Clone, Copy)]
pub(super) struct MappingDatabases {
    /// Name → the configuration as it was handed in.
    pub(super) configs: Database<'static, Str, Bytes>,
    /// The mapping's name, a NUL, the source → its last value. No mapping has a NUL in its name.
    pub(super) variables: Database<'static, Bytes, Bytes>,
}

/// The last value of a source, to be written.
pub struct VariableChange<'a> {
    pub mapping: &'a str,
    pub source: &'a str,
    pub value: &'a [u8],
}

impl Store {
    /// All configurations, by name.
    pub fn mappings(&self) -> Result<Vec<(String, Vec<u8>)>, StoreError> {
        let txn = self.read()?;
        let all = self.inner.mappings.configs.iter(&txn);
        let all = all.map_err(|e| self.error(e))?;
        all.map(|entry| entry.map(|(name, config)| (name.to_owned(), config.to_vec())))
            .collect::<Result<_, _>>()
            .map_err(|e| self.error(e))
    }

    /// Stores a configuration, in the place of one of the same name, whose values it gets.
    pub fn put_mapping(&self, name: &str, config: &[u8]) -> Result<(), StoreError> {
        self.write(|txn| self.inner.mappings.configs.put(txn, name, config))
    }

    /// Forgets a configuration and the values of its sources. Whether there was one.
    pub fn remove_mapping(&self, name: &str) -> Result<bool, StoreError> {
        self.write(|txn| {
            self.clear_variables(txn, name)?;
            self.inner.mappings.configs.delete(txn, name)
        })
    }

    /// The last values of a mapping's sources.
    pub fn variables(&self, mapping: &str) -> Result<Vec<(String, Vec<u8>)>, StoreError> {
        let txn = self.read()?;
        let prefix = full_key(mapping, "");
        let entries = self.inner.mappings.variables.prefix_iter(&txn, &prefix);
        let mut found = Vec::new();
        for entry in entries.map_err(|e| self.error(e))? {
            let (key, value) = entry.map_err(|e| self.error(e))?;
            if let Ok(source) = std::str::from_utf8(&key[prefix.len()..]) {
                found.push((source.to_owned(), value.to_vec()));
            }
        }
        Ok(found)
    }

    /// All or nothing; on disk when it returns.
    pub fn put_variables(&self, changes: &[VariableChange]) -> Result<(), StoreError> {
        self.write(|txn| {
            for change in changes {
                let key = full_key(change.mapping, change.source);
                let variables = &self.inner.mappings.variables;
                variables.put(txn, &key, change.value)?;
            }
            Ok(())
        })
    }

    fn clear_variables(&self, txn: &mut RwTxn, mapping: &str) -> heed::Result<()> {
        let first = full_key(mapping, "");
        let mut behind = first.clone();
        *behind.last_mut().expect("a NUL, at the least") += 1;
        let range: (Bound<&[u8]>, Bound<&[u8]>) =
            (Bound::Included(&first), Bound::Excluded(&behind));
        let variables = &self.inner.mappings.variables;
        variables.delete_range(txn, &range).map(drop)
    }
}

fn full_key(mapping: &str, source: &str) -> Vec<u8> {
    [mapping.as_bytes(), b"\0", source.as_bytes()].concat()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::StoreConfig;

    #[test]
    fn a_mapping_goes_with_its_values_and_leaves_those_of_others() {
        let folder = tempfile::tempdir().unwrap();
        let config = StoreConfig {
            path: folder.path().to_owned(),
            map_bytes: 16 << 20,
        };
        let store = Store::open(&config).unwrap();
        for name in ["a", "ab"] {
            store.put_mapping(name, b"yaml").unwrap();
        }
        let change = |mapping, source| VariableChange {
            mapping,
            source,
            value: b"1",
        };
        let changes = [change("a", "x"), change("a", "y"), change("ab", "x")];
        store.put_variables(&changes).unwrap();
        drop(store);
        let store = Store::open(&config).unwrap();
        let both = [("x".into(), b"1".to_vec()), ("y".into(), b"1".to_vec())];
        assert_eq!(store.variables("a").unwrap(), both);
        assert!(store.remove_mapping("a").unwrap());
        assert!(!store.remove_mapping("a").unwrap());
        assert_eq!(store.variables("a").unwrap(), []);
        assert_eq!(store.variables("ab").unwrap(), both[..1]);
        assert_eq!(store.mappings().unwrap(), [("ab".into(), b"yaml".to_vec())]);
    }
}
