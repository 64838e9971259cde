//! How far each link has come: an LMDB environment of its own.
//!
//! What was sent to somebody else can't be taken back. So it is no part of the database of which a system on
//! probation gets a copy: a gateway that goes back goes on after what the other one has sent.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use heed::types::{Bytes, Str};
use heed::{CommitOrAbort, Database, Env, EnvOpenOptions, WithoutTls};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::{Store, StoreError, database_error, error, fill_up, make_folder};

/// Below the store's folder.
pub(super) const FOLDER: &str = "lmdb-cursors";

const MAP_BYTES: usize = 1 << 20;

/// How far a link has come in the journal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cursor {
    /// All events before this one were taken by the other side, or are none of the link's.
    pub next: u64,
    /// All events before this one may go.
    pub safe: u64,
    /// The last one that the other side has taken.
    pub last: Option<u64>,
    /// The epoch of `next`, which says of which journal this is.
    pub epoch: String,
}

/// What a link has taken of a stream, and may be given again.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Taken {
    /// When the stream was made, in nanoseconds since 1970: another one begins to count anew.
    pub stream_made_ns: i128,
    /// The numbers of messages there that are in the journal, and of which the stream does not know that yet.
    pub open: BTreeSet<u64>,
}

/// The cursors of all links. Cheap to clone. A write is on disk when its call returns.
#[derive(Clone)]
pub struct Cursors {
    path: PathBuf,
    env: Env<WithoutTls>,
    cursors: Database<'static, Str, Bytes>,
}

impl Store {
    /// The cursors beside this store. If they are damaged, they begin anew.
    pub fn cursors(&self) -> Result<Cursors, StoreError> {
        let path = self.path().join(FOLDER);
        match Cursors::open(&path) {
            Err(error @ StoreError::Damaged { .. }) => {
                tracing::error!(%error, "links begin anew: what they had sent may be sent twice");
                let removed = fs::remove_dir_all(&path);
                removed.map_err(|source| error::io(&path, "cannot remove it", source))?;
                Cursors::open(&path)
            }
            opened => opened,
        }
    }
}

impl Cursors {
    fn open(path: &Path) -> Result<Cursors, StoreError> {
        let error = |error| database_error(path, MAP_BYTES, error);
        make_folder(path)?;
        fill_up(&path.join("data.mdb"), MAP_BYTES as u64).map_err(|io| error(io.into()))?;
        let mut options = EnvOpenOptions::new().read_txn_without_tls();
        options.map_size(MAP_BYTES).max_dbs(1);
        // SAFETY: as for the store itself, whose lock is held: nobody else writes to this file.
        #[allow(unsafe_code)]
        let env = unsafe { options.open(path) }.map_err(error)?;
        let txn = env.write_txn().map_err(error)?;
        let cursors = env
            .create_databases_and_commit(txn, |opener, txn| -> heed::Result<_> {
                let cursors = opener.create_database(txn, Some("cursors"))?;
                Ok(CommitOrAbort::<_, ()>::Commit(cursors))
            })
            .map_err(error)?;
        let CommitOrAbort::Commit(cursors) = cursors else {
            unreachable!("nothing aborts it");
        };
        Ok(Cursors {
            path: path.to_owned(),
            env,
            cursors,
        })
    }

    /// None: there is none, or it can't be read.
    pub fn get(&self, link: &str) -> Result<Option<Cursor>, StoreError> {
        self.read(link)
    }

    pub fn put(&self, link: &str, cursor: &Cursor) -> Result<(), StoreError> {
        self.write(link, cursor)
    }

    pub fn taken(&self, link: &str) -> Result<Taken, StoreError> {
        Ok(self.read(&taken_key(link))?.unwrap_or_default())
    }

    pub fn put_taken(&self, link: &str, taken: &Taken) -> Result<(), StoreError> {
        self.write(&taken_key(link), taken)
    }

    fn read<T: DeserializeOwned>(&self, key: &str) -> Result<Option<T>, StoreError> {
        let txn = self.env.read_txn().map_err(|error| self.error(error))?;
        let found = self.cursors.get(&txn, key);
        let Some(bytes) = found.map_err(|error| self.error(error))? else {
            return Ok(None);
        };
        let value = serde_json::from_slice(bytes);
        Ok(value
            .inspect_err(|error| tracing::error!(link = key, %error, "its cursor can't be read"))
            .ok())
    }

    fn write(&self, key: &str, value: &impl Serialize) -> Result<(), StoreError> {
        let bytes = serde_json::to_vec(value).expect("strings and numbers are always JSON");
        let mut txn = self.env.write_txn().map_err(|error| self.error(error))?;
        let put = self.cursors.put(&mut txn, key, &bytes);
        put.and_then(|()| txn.commit())
            .map_err(|error| self.error(error))
    }

    fn error(&self, error: heed::Error) -> StoreError {
        database_error(&self.path, MAP_BYTES, error)
    }
}

/// No name of a link begins so.
fn taken_key(link: &str) -> String {
    format!("<{link}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn damaged_cursors_are_begun_anew() {
        let folder = tempfile::tempdir().unwrap();
        let config = crate::store::StoreConfig {
            path: folder.path().into(),
            map_bytes: 1 << 24,
        };
        let store = Store::open(&config).unwrap();
        let data = folder.path().join(FOLDER).join("data.mdb");
        fs::create_dir(folder.path().join(FOLDER)).unwrap();
        fs::write(data, [7; 40_000]).unwrap();
        let cursors = store.cursors().unwrap();
        assert_eq!(cursors.get("cloud").unwrap(), None);
    }

    #[test]
    fn a_cursor_is_there_after_a_new_start() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(FOLDER);
        let cursor = Cursor {
            next: 7,
            safe: 5,
            last: Some(6),
            epoch: "00000000000000ff".into(),
        };
        let cursors = Cursors::open(&path).unwrap();
        assert_eq!(cursors.get("cloud").unwrap(), None);
        cursors.put("cloud", &cursor).unwrap();
        let taken = Taken {
            stream_made_ns: i128::from(u64::MAX),
            open: [3, 9].into(),
        };
        assert_eq!(cursors.taken("cloud").unwrap(), Taken::default());
        cursors.put_taken("cloud", &taken).unwrap();
        drop(cursors);
        let cursors = Cursors::open(&path).unwrap();
        assert_eq!(cursors.get("cloud").unwrap(), Some(cursor));
        assert_eq!(cursors.taken("cloud").unwrap(), taken);
    }
}
