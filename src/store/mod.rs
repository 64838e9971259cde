//! The durable state of a gateway: one LMDB environment and its typed databases.
//!
//! Owns the store's folder, its lock (one gateway a store) and its schema version. Does not know
//! what the records mean to those who ask for them.

mod error;

use std::path::{Path, PathBuf};

pub use error::StoreError;

/// Where the store is and how big it may grow.
#[derive(Clone, Debug)]
pub struct StoreConfig {
    pub path: PathBuf,
    /// Most bytes that the database may take. Reserves address space, not memory or disk.
    pub map_bytes: usize,
}

/// The open store. Cheap to clone; the last clone that goes frees the lock.
#[derive(Clone)]
pub struct Store {}

impl Store {
    /// Opens the store, makes it if it isn't there, and locks it for this process.
    pub fn open(config: &StoreConfig) -> Result<Store, StoreError> {
        let _ = config;
        unimplemented!()
    }

    pub fn path(&self) -> &Path {
        unimplemented!()
    }
}
