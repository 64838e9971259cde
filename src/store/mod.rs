//! The durable state of a gateway: one LMDB environment and its typed databases.
//!
//! Owns the store's folder, its lock (one gateway a store) and its schema version. Does not know
//! what the records mean to those who ask for them. A write is on disk when its call returns.

mod app_state;
mod cursors;
mod error;
mod lock;
mod mappings;
mod mqtt;
mod trial;
mod versions;

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use heed::types::{Bytes, DecodeIgnore, Str, Unit};
use heed::{CommitOrAbort, Database, Env, EnvOpenOptions, RoTxn, RwTxn, WithoutTls};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use app_state::AppStateDatabase;
pub use app_state::{AppStateChanges, MAX_APP_KEY_BYTES};
pub use cursors::{Cursor, Cursors, Taken};
pub use error::StoreError;
use mappings::MappingDatabases;
pub use mappings::VariableChange;
use mqtt::MqttDatabases;
pub use mqtt::{Counter, MAX_CLIENT_ID_BYTES, MqttChanges, MqttSnapshot, Queue, queued_cost};
pub use trial::Standing;
pub use versions::PreviousVersion;

/// The layout of the databases below. Counts up when a change would confuse an older Headgate.
const SCHEMA_VERSION: u32 = 1;

/// Under this key in the database `meta` stands the schema version, as four bytes, little-endian.
const SCHEMA_KEY: &str = "schema";

/// Thirteen today (`open_databases` has them), and room for those that later versions bring.
const MAX_DATABASES: u32 = 32;

/// Where the store is and how big it may grow.
#[derive(Clone, Debug)]
pub struct StoreConfig {
    pub path: PathBuf,
    /// Most bytes that the database may take. Reserves address space, not memory or disk.
    pub map_bytes: usize,
}

/// The open store. Cheap to clone; the last clone that goes frees the lock.
#[derive(Clone)]
pub struct Store {
    inner: Arc<Inner>,
}

type NamesDatabase = Database<'static, Str, Unit>;

struct Inner {
    path: PathBuf,
    /// Where the database was when it was opened.
    folder: PathBuf,
    map_bytes: usize,
    env: Env<WithoutTls>,
    /// SHA-256 of a component → its bytes. Holds what `apps` refers to and nothing else.
    components: Database<'static, Bytes, Bytes>,
    /// App name → [`AppRecord`] as JSON.
    apps: Database<'static, Str, Bytes>,
    /// Names of the preinstalled apps that are to stay stopped; nothing is kept with them.
    stopped: NamesDatabase,
    /// Of those that are to stay paused.
    paused: NamesDatabase,
    app_state: AppStateDatabase,
    mappings: MappingDatabases,
    mqtt: MqttDatabases,
    /// Held to the end: dropped after `env`, which is closed by then.
    _lock: File,
}

/// SHA-256 of a component: its name in the store.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ComponentId([u8; 32]);

impl ComponentId {
    pub fn of(component: &[u8]) -> ComponentId {
        ComponentId(Sha256::digest(component).into())
    }

    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

/// Not 64 hexadecimal digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a SHA-256 has 64 hexadecimal digits")]
pub struct NotASha256;

impl std::str::FromStr for ComponentId {
    type Err = NotASha256;

    fn from_str(hex: &str) -> Result<ComponentId, NotASha256> {
        let mut id = [0; 32];
        let digits = hex.as_bytes();
        if digits.len() != 2 * id.len() {
            return Err(NotASha256);
        }
        for (byte, pair) in id.iter_mut().zip(digits.chunks_exact(2)) {
            let digit = |digit: u8| char::from(digit).to_digit(16).ok_or(NotASha256);
            *byte = (digit(pair[0])? << 4 | digit(pair[1])?) as u8;
        }
        Ok(ComponentId(id))
    }
}

impl std::fmt::Display for ComponentId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl std::fmt::Debug for ComponentId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{self}")
    }
}

/// What is kept of an app.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AppRecord {
    /// The manifest as it was handed in.
    pub manifest: String,
    pub component: ComponentId,
    pub component_bytes: u64,
    pub desired: Desired,
    /// What there is to go back to.
    pub previous: Option<PreviousVersion>,
    /// Goes back by itself if it fails.
    pub on_trial: bool,
}

/// A record, or why it can't be read.
pub type ReadRecord = Result<AppRecord, String>;

/// What an app's operator wants of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Desired {
    Running,
    /// Up, but handed nothing.
    Paused,
    Stopped,
}

/// [`AppRecord`] as it stands in the database.
#[derive(Serialize, Deserialize)]
struct StoredApp {
    manifest: String,
    component: [u8; 32],
    component_bytes: u64,
    desired: Desired,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    previous: Option<StoredVersion>,
    #[serde(default)]
    on_trial: bool,
}

#[derive(Serialize, Deserialize)]
struct StoredVersion {
    manifest: String,
    component: [u8; 32],
    component_bytes: u64,
}

impl AppRecord {
    fn encode(&self) -> Vec<u8> {
        serde_json::to_vec(&StoredApp {
            manifest: self.manifest.clone(),
            component: self.component.0,
            component_bytes: self.component_bytes,
            desired: self.desired,
            previous: self.previous.as_ref().map(|previous| StoredVersion {
                manifest: previous.manifest.clone(),
                component: previous.component.0,
                component_bytes: previous.component_bytes,
            }),
            on_trial: self.on_trial,
        })
        .expect("strings and numbers are always JSON")
    }

    fn decode(bytes: &[u8]) -> serde_json::Result<AppRecord> {
        let stored: StoredApp = serde_json::from_slice(bytes)?;
        Ok(AppRecord {
            manifest: stored.manifest,
            component: ComponentId(stored.component),
            component_bytes: stored.component_bytes,
            desired: stored.desired,
            previous: stored.previous.map(|previous| PreviousVersion {
                manifest: previous.manifest,
                component: ComponentId(previous.component),
                component_bytes: previous.component_bytes,
            }),
            on_trial: stored.on_trial,
        })
    }

    /// All that the record refers to.
    pub fn components(&self) -> impl Iterator<Item = ComponentId> {
        let previous = self.previous.as_ref().map(|previous| previous.component);
        std::iter::once(self.component).chain(previous)
    }
}

impl Store {
    /// Opens the store of a gateway whose system stays; see [`Store::open_as`].
    pub fn open(config: &StoreConfig) -> Result<Store, StoreError> {
        Store::open_as(config, &Standing::Unknown { system: None })
    }

    /// Opens the store, makes it if it isn't there, and locks it for this process. A system on probation gets
    /// a copy of the database.
    pub fn open_as(config: &StoreConfig, standing: &Standing) -> Result<Store, StoreError> {
        let path = &config.path;
        make_folder(path)?;
        let lock = lock::acquire(path)?;
        let folder = trial::folder(config, standing)?;
        fill_up(&folder.join("data.mdb"), config.map_bytes as u64)
            .map_err(|error| open_error(config, error.into()))?;

        let mut options = EnvOpenOptions::new().read_txn_without_tls();
        // LMDB wants whole pages; 64 KiB is a multiple of every page size that Linux has.
        options
            .map_size(config.map_bytes.next_multiple_of(64 * 1024))
            .max_dbs(MAX_DATABASES);
        // SAFETY: the map may change under LMDB only if somebody else writes the file. The lock
        // above keeps other gateways out, the folder is the gateway's own, and no LMDB flags that
        // give up safety are set.
        #[allow(unsafe_code)]
        let env = unsafe { options.open(&folder) }.map_err(|error| open_error(config, error))?;
        let [
            components,
            apps,
            stopped,
            sessions,
            queued,
            retained,
            dead_letters,
            counters,
            app_state,
            mappings,
            variables,
            paused,
        ] = open_databases(config, &env)?;
        let store = Store {
            inner: Arc::new(Inner {
                path: path.clone(),
                folder,
                map_bytes: config.map_bytes,
                env,
                components,
                apps: apps.remap_key_type(),
                stopped: stopped.remap_types(),
                paused: paused.remap_types(),
                app_state,
                mappings: MappingDatabases {
                    configs: mappings.remap_key_type(),
                    variables,
                },
                mqtt: MqttDatabases {
                    sessions,
                    queued: queued.remap_key_type(),
                    retained,
                    dead_letters: dead_letters.remap_key_type(),
                    counters: counters.remap_types(),
                },
                _lock: lock,
            }),
        };
        store.check_references()?;
        Ok(store)
    }

    /// The system has passed its probation: its copy of the database takes the original's place. False if there
    /// is none.
    pub fn pass_trial(&self) -> Result<bool, StoreError> {
        match trial::copy_in_use(&self.inner.path, &self.inner.folder) {
            Some((original, copy)) if copy.exists() => {
                trial::promote(&original, &copy)?;
                Ok(true)
            }
            _ => Ok(false),
        }
    }

    /// How much room there is on the disk for this process.
    #[allow(unsafe_code)]
    pub fn free_disk_bytes(&self) -> Result<u64, StoreError> {
        let path = &self.inner.path;
        let name = std::ffi::CString::new(path.as_os_str().as_encoded_bytes())
            .expect("a path that was opened has no NUL");
        // SAFETY: all bits zero are a valid value of this struct of integers.
        let mut found: libc::statvfs = unsafe { std::mem::zeroed() };
        // SAFETY: `name` ends with a NUL, and `found` is a valid place for what the call writes.
        if unsafe { libc::statvfs(name.as_ptr(), &mut found) } != 0 {
            let source = io::Error::last_os_error();
            return Err(error::io(path, "cannot ask how much room there is", source));
        }
        Ok(found.f_bavail.saturating_mul(found.f_frsize))
    }

    /// The store's folder. Files beside the database (caches, keys, sockets) may live there too.
    pub fn path(&self) -> &Path {
        &self.inner.path
    }

    /// All apps by name.
    pub fn apps(&self) -> Result<Vec<(String, ReadRecord)>, StoreError> {
        let txn = self.read()?;
        let apps = self.inner.apps.iter(&txn).map_err(|e| self.error(e))?;
        apps.map(|entry| {
            let (name, bytes) = entry.map_err(|e| self.error(e))?;
            let record = AppRecord::decode(bytes).map_err(|error| error.to_string());
            Ok((name.to_owned(), record))
        })
        .collect()
    }

    /// The app with this name, if there is one.
    pub fn app(&self, name: &str) -> Result<Option<ReadRecord>, StoreError> {
        let txn = self.read()?;
        let found = self.inner.apps.get(&txn, name).map_err(|e| self.error(e))?;
        Ok(found.map(|bytes| AppRecord::decode(bytes).map_err(|error| error.to_string())))
    }

    /// The bytes of a component, checked against its name.
    pub fn component(&self, id: ComponentId) -> Result<Vec<u8>, StoreError> {
        let txn = self.read()?;
        let bytes = self
            .inner
            .components
            .get(&txn, &id.0)
            .map_err(|e| self.error(e))?
            .ok_or_else(|| self.damaged(format!("the component {id} is missing")))?;
        if ComponentId::of(bytes) != id {
            return Err(self.damaged(format!("the bytes of the component {id} have changed")));
        }
        Ok(bytes.to_vec())
    }

    /// Stores an app with its component, in the place of one of the same name, whose state it gets.
    /// Returns the components that nobody needs any more and that are gone now.
    pub fn put_app(
        &self,
        name: &str,
        record: &AppRecord,
        component: &[u8],
    ) -> Result<Vec<ComponentId>, StoreError> {
        assert_eq!(
            ComponentId::of(component),
            record.component,
            "a record is stored with its own component"
        );
        self.write(|txn| {
            self.inner
                .components
                .put(txn, &record.component.0, component)?;
            if self.inner.apps.get(txn, name)?.is_none() {
                self.clear_app_state(txn, name)?;
            }
            self.clear_state_before_upgrade(txn, name)?;
            self.inner.apps.put(txn, name, &record.encode())?;
            self.remove_unused_components(txn)
        })
    }

    /// Notes what is wanted of an app. Does nothing if there is no such app.
    pub fn set_desired(&self, name: &str, desired: Desired) -> Result<(), StoreError> {
        self.write(|txn| {
            let Some(bytes) = self.inner.apps.get(txn, name)? else {
                return Ok(());
            };
            let mut record =
                AppRecord::decode(bytes).map_err(|error| heed::Error::Decoding(error.into()))?;
            if record.desired != desired {
                record.desired = desired;
                self.inner.apps.put(txn, name, &record.encode())?;
            }
            Ok(())
        })
    }

    /// Forgets an app and its state. Returns the components that nobody needs any more and that are
    /// gone now.
    pub fn remove_app(&self, name: &str) -> Result<Vec<ComponentId>, StoreError> {
        self.write(|txn| {
            self.inner.apps.delete(txn, name)?;
            self.clear_app_state(txn, name)?;
            self.clear_state_before_upgrade(txn, name)?;
            self.remove_unused_components(txn)
        })
    }

    /// Notes what is wanted of a preinstalled app. Such an app need not exist: when it comes back with
    /// another version of the system, what was said of it still counts.
    pub fn set_preinstalled(&self, name: &str, desired: Desired) -> Result<(), StoreError> {
        self.write(|txn| {
            for (state, names) in self.preinstalled_names() {
                match state == desired {
                    true => names.put(txn, name, &())?,
                    false => names.delete(txn, name).map(drop)?,
                }
            }
            Ok(())
        })
    }

    /// What is wanted of preinstalled apps that are not to run.
    pub fn preinstalled(&self) -> Result<BTreeMap<String, Desired>, StoreError> {
        let txn = self.read()?;
        let mut found = BTreeMap::new();
        for (state, names) in self.preinstalled_names() {
            for entry in names.iter(&txn).map_err(|e| self.error(e))? {
                let (name, ()) = entry.map_err(|e| self.error(e))?;
                found.insert(name.to_owned(), state);
            }
        }
        Ok(found)
    }

    fn preinstalled_names(&self) -> [(Desired, NamesDatabase); 2] {
        [
            (Desired::Stopped, self.inner.stopped),
            (Desired::Paused, self.inner.paused),
        ]
    }

    fn remove_unused_components(&self, txn: &mut RwTxn) -> heed::Result<Vec<ComponentId>> {
        let mut used = Vec::new();
        for entry in self.inner.apps.iter(txn)? {
            match AppRecord::decode(entry?.1) {
                Ok(record) => used.extend(record.components()),
                // Who knows what an unreadable record refers to: keep everything.
                Err(_) => return Ok(Vec::new()),
            }
        }
        let mut unused = Vec::new();
        let keys = self.inner.components.remap_data_type::<DecodeIgnore>();
        for entry in keys.iter(txn)? {
            let id = <[u8; 32]>::try_from(entry?.0).map(ComponentId);
            unused.extend(id.ok().filter(|id| !used.contains(id)));
        }
        for id in &unused {
            self.inner.components.delete(txn, &id.0)?;
        }
        Ok(unused)
    }

    /// Walks both databases, so that a damaged file is found at the start and not at some later
    /// time. Leaves out the components' bytes: those are checked when they are read.
    fn check_references(&self) -> Result<(), StoreError> {
        let apps = self.apps()?;
        let txn = self.read()?;
        let components = self.inner.components.remap_data_type::<DecodeIgnore>();
        for (name, record) in apps {
            let Ok(record) = record else { continue };
            for component in record.components() {
                let found = components.get(&txn, &component.0);
                if found.map_err(|e| self.error(e))?.is_none() {
                    return Err(self.damaged(format!("a component of the app {name} is missing")));
                }
            }
        }
        Ok(())
    }

    fn read(&self) -> Result<RoTxn<'_, WithoutTls>, StoreError> {
        self.inner.env.read_txn().map_err(|e| self.error(e))
    }

    fn write<T>(
        &self,
        change: impl FnOnce(&mut RwTxn) -> heed::Result<T>,
    ) -> Result<T, StoreError> {
        let result = self.inner.env.write_txn().and_then(|mut txn| {
            let result = change(&mut txn)?;
            txn.commit()?;
            Ok(result)
        });
        result.map_err(|error| self.error(error))
    }

    /// Which part of the database's pages is in use with the changes in `txn`, from 0 to 1.
    fn fill(&self, txn: &RwTxn) -> Result<f64, StoreError> {
        let inner = &self.inner;
        let mqtt = &inner.mqtt;
        let stats = [
            inner.components.stat(txn),
            inner.apps.stat(txn),
            inner.app_state.stat(txn),
            inner.mappings.configs.stat(txn),
            inner.mappings.variables.stat(txn),
            mqtt.sessions.stat(txn),
            mqtt.queued.stat(txn),
            mqtt.retained.stat(txn),
            mqtt.dead_letters.stat(txn),
        ];
        let mut used = 0;
        for stat in stats {
            let stat = stat.map_err(|e| self.error(e))?;
            let pages = stat.branch_pages + stat.leaf_pages + stat.overflow_pages;
            used += pages * stat.page_size as usize;
        }
        Ok(used as f64 / inner.map_bytes as f64)
    }

    fn error(&self, error: heed::Error) -> StoreError {
        database_error(&self.inner.path, self.inner.map_bytes, error)
    }

    fn damaged(&self, what: String) -> StoreError {
        StoreError::Damaged {
            path: self.inner.path.clone(),
            what,
        }
    }
}

/// Checks the schema version before it touches anything else; makes what isn't there.
fn open_databases(
    config: &StoreConfig,
    env: &Env<WithoutTls>,
) -> Result<[Database<'static, Bytes, Bytes>; 12], StoreError> {
    let error = |error| database_error(&config.path, config.map_bytes, error);
    let txn = env.write_txn().map_err(error)?;
    let opened = env
        .create_databases_and_commit(txn, |opener, txn| -> heed::Result<_> {
            let meta = opener.create_database::<Str, Bytes>(txn, Some("meta"))?;
            let found = meta.get(txn, SCHEMA_KEY)?.map(<[u8; 4]>::try_from);
            match found {
                None => meta.put(txn, SCHEMA_KEY, &SCHEMA_VERSION.to_le_bytes())?,
                Some(Ok(version)) => {
                    let version = u32::from_le_bytes(version);
                    if version > SCHEMA_VERSION {
                        return Ok(CommitOrAbort::Abort(Some(version)));
                    }
                }
                Some(Err(_)) => return Ok(CommitOrAbort::Abort(None)),
            }
            let mut create = |name| opener.create_database::<Bytes, Bytes>(txn, Some(name));
            // Those that an older Headgate does not know are no trouble to it.
            Ok(CommitOrAbort::Commit([
                create("components")?,
                create("apps")?,
                create("stopped")?,
                create("mqtt_sessions")?,
                create("mqtt_queued")?,
                create("mqtt_retained")?,
                create("mqtt_dead_letters")?,
                create("mqtt_counters")?,
                create("app_state")?,
                create("mappings")?,
                create("mapping_variables")?,
                create("paused_preinstalled")?,
            ]))
        })
        .map_err(error)?;
    match opened {
        CommitOrAbort::Commit(databases) => Ok(databases),
        CommitOrAbort::Abort(Some(found)) => Err(StoreError::NewerSchema {
            path: config.path.clone(),
            found,
            supported: SCHEMA_VERSION,
        }),
        CommitOrAbort::Abort(None) => Err(StoreError::Damaged {
            path: config.path.clone(),
            what: "its schema version can't be read".into(),
        }),
    }
}

/// Removes all that is in the store's folder, if no gateway uses it.
pub fn erase(path: &Path) -> Result<(), StoreError> {
    if !path.exists() {
        return Ok(());
    }
    let _lock = lock::acquire(path)?;
    let failed = |source| error::io(path, "cannot empty the folder", source);
    for entry in fs::read_dir(path).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let is_folder = entry.file_type().map_err(failed)?.is_dir();
        // The lock goes with its file's last user.
        if is_folder {
            fs::remove_dir_all(entry.path()).map_err(failed)?;
        } else if entry.file_name() != lock::FILE {
            fs::remove_file(entry.path()).map_err(failed)?;
        }
    }
    Ok(())
}

fn make_folder(path: &Path) -> Result<(), StoreError> {
    match fs::create_dir_all(path) {
        Ok(()) => Ok(()),
        Err(_) if path.exists() && !path.is_dir() => Err(StoreError::NotAFolder {
            path: path.to_owned(),
        }),
        Err(source) => Err(error::io(path, "cannot make the folder", source)),
    }
}

/// Makes a database file at least as long as its header says, with zeros. LMDB reads it through a
/// memory map: past the end of a file that was cut short, that would be a SIGBUS; on a zeroed page
/// it is an error.
fn fill_up(file: &Path, map_bytes: u64) -> io::Result<()> {
    // From LMDB's `MDB_meta`, behind the page header of 16 bytes.
    const MAGIC: std::ops::Range<usize> = 16..20;
    const PAGE_SIZE: std::ops::Range<usize> = 40..44;
    const LAST_PAGE: std::ops::Range<usize> = 136..144;
    const HEADER: usize = 152;

    let file = match OpenOptions::new().read(true).write(true).open(file) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    let len = file.metadata()?.len();
    let mut wanted = len;
    let mut offset = 0;
    for _ in 0..2 {
        let mut header = [0; HEADER];
        // What is no LMDB file is left to LMDB to refuse.
        if file.read_exact_at(&mut header, offset).is_err()
            || header[MAGIC] != [0xde, 0xc0, 0xef, 0xbe]
        {
            return Ok(());
        }
        let page_size = u32::from_le_bytes(header[PAGE_SIZE].try_into().expect("four bytes"));
        let last_page = u64::from_le_bytes(header[LAST_PAGE].try_into().expect("eight bytes"));
        let end = last_page.saturating_add(1).saturating_mul(page_size.into());
        // A header that is damaged itself must not make a file of exabytes.
        if end <= map_bytes {
            wanted = wanted.max(end);
        }
        offset = page_size.into();
    }
    if wanted > len {
        file.set_len(wanted)?;
    }
    Ok(())
}

fn open_error(config: &StoreConfig, error: heed::Error) -> StoreError {
    match error {
        heed::Error::Io(source) => error::io(
            &config.path.join("lmdb"),
            "cannot open the database",
            source,
        ),
        error => database_error(&config.path, config.map_bytes, error),
    }
}

fn database_error(path: &Path, map_bytes: usize, error: heed::Error) -> StoreError {
    use heed::MdbError;
    let path = path.to_owned();
    match error {
        heed::Error::Io(source) => error::io(&path, "cannot read or write the database", source),
        heed::Error::Mdb(MdbError::MapFull) => StoreError::Full { path, map_bytes },
        heed::Error::Mdb(
            error @ (MdbError::Invalid
            | MdbError::Corrupted
            | MdbError::PageNotFound
            | MdbError::VersionMismatch
            | MdbError::Incompatible
            | MdbError::Panic),
        ) => StoreError::Damaged {
            path,
            what: format!("LMDB says {error}"),
        },
        heed::Error::Decoding(error) => StoreError::Damaged {
            path,
            what: error.to_string(),
        },
        error => StoreError::Database {
            path,
            what: error.to_string(),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(folder: &Path) -> StoreConfig {
        StoreConfig {
            path: folder.join("store"),
            map_bytes: 16 << 20,
        }
    }

    fn record(component: &[u8], desired: Desired) -> AppRecord {
        AppRecord {
            manifest: "name = \"a\"".into(),
            component: ComponentId::of(component),
            component_bytes: component.len() as u64,
            desired,
            previous: None,
            on_trial: false,
        }
    }

    fn open_error(config: &StoreConfig) -> String {
        match Store::open(config) {
            Ok(_) => panic!("{} was opened", config.path.display()),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn what_was_stored_is_there_after_reopening() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&config(folder.path())).unwrap();
        let app = record(b"wasm", Desired::Running);
        store.put_app("a", &app, b"wasm").unwrap();
        store.set_desired("a", Desired::Stopped).unwrap();
        drop(store);

        let store = Store::open(&config(folder.path())).unwrap();
        let stopped = record(b"wasm", Desired::Stopped);
        assert_eq!(store.apps().unwrap(), [("a".into(), Ok(stopped))]);
        assert_eq!(store.component(app.component).unwrap(), b"wasm");
    }

    #[test]
    fn a_component_goes_when_the_last_app_that_has_it_goes() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&config(folder.path())).unwrap();
        let old = record(b"old", Desired::Running);
        let new = record(b"new", Desired::Running);
        assert_eq!(store.put_app("a", &old, b"old").unwrap(), []);
        assert_eq!(store.put_app("b", &old, b"old").unwrap(), []);
        assert_eq!(store.put_app("a", &new, b"new").unwrap(), []);
        assert_eq!(store.remove_app("b").unwrap(), [old.component]);
        assert!(store.component(old.component).is_err());
        assert_eq!(store.component(new.component).unwrap(), b"new");
        assert_eq!(store.remove_app("a").unwrap(), [new.component]);
        assert_eq!(store.apps().unwrap(), []);
    }

    #[test]
    fn a_second_gateway_is_told_who_holds_the_store() {
        let folder = tempfile::tempdir().unwrap();
        let first = Store::open(&config(folder.path())).unwrap();
        let error = open_error(&config(folder.path()));
        assert!(
            error.contains(&format!("process {}", std::process::id())),
            "{error}"
        );
        assert!(error.contains("stop that one"), "{error}");
        drop(first);
        Store::open(&config(folder.path())).unwrap();
    }

    #[test]
    fn a_store_of_a_newer_schema_is_refused_and_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let config = config(folder.path());
        drop(Store::open(&config).unwrap());
        set_schema(&config, &7u32.to_le_bytes());
        for _ in 0..2 {
            let error = open_error(&config);
            assert!(error.contains("its schema is version 7"), "{error}");
            assert!(error.contains("versions up to 1"), "{error}");
            assert!(error.contains(config.path.to_str().unwrap()), "{error}");
        }
    }

    #[test]
    fn an_unreadable_schema_version_is_damage() {
        let folder = tempfile::tempdir().unwrap();
        let config = config(folder.path());
        drop(Store::open(&config).unwrap());
        set_schema(&config, b"x");
        assert!(open_error(&config).contains("schema version can't be read"));
    }

    #[allow(unsafe_code)]
    fn set_schema(config: &StoreConfig, version: &[u8]) {
        let mut options = EnvOpenOptions::new();
        options.max_dbs(MAX_DATABASES);
        // SAFETY: nobody else has the file open.
        let env = unsafe { options.open(config.path.join("lmdb")) }.unwrap();
        let txn = env.write_txn().unwrap();
        env.create_databases_and_commit(txn, |opener, txn| -> heed::Result<_> {
            let meta = opener.create_database::<Str, Bytes>(txn, Some("meta"))?;
            meta.put(txn, SCHEMA_KEY, version)?;
            Ok(CommitOrAbort::<_, ()>::Commit(meta))
        })
        .unwrap();
    }

    #[allow(unsafe_code)]
    #[test]
    fn a_store_from_before_mqtt_state_gets_the_databases_for_it() {
        let folder = tempfile::tempdir().unwrap();
        let config = config(folder.path());
        let app = record(b"wasm", Desired::Running);
        fs::create_dir_all(config.path.join("lmdb")).unwrap();
        {
            let mut options = EnvOpenOptions::new();
            options.max_dbs(MAX_DATABASES);
            // SAFETY: nobody else has the file open.
            let env = unsafe { options.open(config.path.join("lmdb")) }.unwrap();
            let txn = env.write_txn().unwrap();
            env.create_databases_and_commit(txn, |opener, txn| -> heed::Result<_> {
                let meta = opener.create_database::<Str, Bytes>(txn, Some("meta"))?;
                meta.put(txn, SCHEMA_KEY, &1u32.to_le_bytes())?;
                let apps = opener.create_database::<Str, Bytes>(txn, Some("apps"))?;
                apps.put(txn, "a", &app.encode())?;
                let components = opener.create_database::<Bytes, Bytes>(txn, Some("components"))?;
                components.put(txn, app.component.as_bytes(), b"wasm")?;
                Ok(CommitOrAbort::<_, ()>::Commit(meta))
            })
            .unwrap();
        }
        for _ in 0..2 {
            let store = Store::open(&config).unwrap();
            assert_eq!(store.apps().unwrap(), [("a".into(), Ok(app.clone()))]);
            let mut changes = store.write_mqtt().unwrap();
            changes.put_queued(1, 2, b"delivery").unwrap();
            changes.commit().unwrap();
            let queue = Queue {
                number: 1,
                first: 2,
                last: 2,
            };
            assert_eq!(store.read_mqtt().unwrap().queues().unwrap(), [queue]);
        }
    }

    #[test]
    fn a_path_that_is_a_file_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let config = config(folder.path());
        fs::write(&config.path, "").unwrap();
        let error = open_error(&config);
        assert!(error.contains("is not a folder"), "{error}");
    }

    #[test]
    fn a_path_that_cannot_be_made_is_named() {
        // Nobody, root included, makes folders there.
        let config = StoreConfig {
            path: "/proc/headgate".into(),
            map_bytes: 1 << 20,
        };
        let error = open_error(&config);
        assert!(
            error.contains("/proc/headgate: cannot make the folder"),
            "{error}"
        );
        assert!(error.contains("store.path"), "{error}");
    }

    #[test]
    fn a_file_of_rubbish_is_damage() {
        let folder = tempfile::tempdir().unwrap();
        let config = config(folder.path());
        drop(Store::open(&config).unwrap());
        fs::write(config.path.join("lmdb/data.mdb"), [0x5a; 20_000]).unwrap();
        let error = open_error(&config);
        assert!(
            error.contains("damaged") && error.contains("backup"),
            "{error}"
        );
    }

    #[test]
    fn a_file_that_was_cut_short_is_damage() {
        let component = vec![7; 100_000];
        let id = ComponentId::of(&component);
        // Only the header is left; the end of the component is gone.
        for keep in [|_| 2 * 4096, |len| len - 8192] {
            let folder = tempfile::tempdir().unwrap();
            let config = config(folder.path());
            let store = Store::open(&config).unwrap();
            let record = record(&component, Desired::Running);
            store.put_app("a", &record, &component).unwrap();
            drop(store);
            let file = config.path.join("lmdb/data.mdb");
            let file = OpenOptions::new().write(true).open(file).unwrap();
            let keep: fn(u64) -> u64 = keep;
            file.set_len(keep(file.metadata().unwrap().len())).unwrap();

            let opened = Store::open(&config).and_then(|store| store.component(id));
            let error = opened.unwrap_err().to_string();
            assert!(error.contains("damaged"), "{error}");
        }
    }

    #[test]
    fn a_full_store_says_which_setting_to_raise() {
        let folder = tempfile::tempdir().unwrap();
        let config = StoreConfig {
            map_bytes: 256 * 1024,
            ..config(folder.path())
        };
        let store = Store::open(&config).unwrap();
        let big = vec![0; 1 << 20];
        let error = store
            .put_app("a", &record(&big, Desired::Running), &big)
            .unwrap_err()
            .to_string();
        assert!(error.contains("store.max_bytes"), "{error}");
        assert_eq!(store.apps().unwrap(), []);
        store
            .put_app("b", &record(b"small", Desired::Running), b"small")
            .unwrap();
    }
}
