//! The client of Nix binary caches: from a store path's name to its files, verified, in the store.
//!
//! [`plan`] asks for the signed descriptions (narinfos) of a closure, [`install`] fetches the archives
//! (NARs) of the paths that are not there. Both block, and use threads of their own. Nothing that a cache
//! says is believed unless a trusted key has signed it, and nothing is taken that is longer than that says.

mod ahead;
mod download;
mod fault;
mod install;
mod location;
pub mod nar;
pub mod narinfo;
mod plan;
mod spool;
mod throttle;
mod transport;

use std::io;
use std::num::NonZeroU64;
use std::path::PathBuf;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use nix_derivation::{StorePath, store_path::STORE_DIR};
use nix_narinfo::{MAX_NARINFO_SIZE, NarInfo};
use parking_lot::Mutex;

pub use fault::{CacheError, Fault};
pub use install::{install, repair};
pub use nix_narinfo::TrustedPublicKey as PublicKey;
pub use plan::{Missing, Plan, plan};

use download::{Download, Line};
use location::Location;
use throttle::Bucket;
use transport::Transport;

/// Narinfos that are asked for at once: they are small, so it is the way there and back that takes time.
const NARINFO_JOBS_MOST: usize = 8;

/// NARs that are fetched at once: each can take a decompressor of 8 MiB and some buffers, and all of them
/// have to stay below 64 MB.
const JOBS_MOST: usize = 3;

/// What a nix-cache-info may have.
const CACHE_INFO_BYTES: u64 = 64 * 1024;

/// How to reach caches, and whom to believe.
#[derive(Clone, Debug)]
pub struct Settings {
    /// `https://`, `http://` or `file://`, the preferred one first.
    pub urls: Vec<String>,
    pub trusted_keys: Vec<PublicKey>,
    /// Of all downloads together.
    pub bytes_per_second: Option<NonZeroU64>,
    /// The certificates (PEM) to trust instead of the well-known ones.
    pub ca_file: Option<PathBuf>,
    /// If not given, `http_proxy`, `https_proxy` and `no_proxy` of the environment. It has to let tunnels
    /// (CONNECT) through, also to caches without TLS.
    pub proxy: Option<String>,
    /// NARs to fetch at once, 1 to 3.
    pub jobs: usize,
    /// How long a server may send nothing.
    pub stall: Duration,
    /// How often a request is made again in a row without success.
    pub retries: u32,
    /// Where big files are kept while they are on their way, so that a restart goes on with them.
    pub spool: Option<PathBuf>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            urls: Vec::new(),
            trusted_keys: Vec::new(),
            bytes_per_second: None,
            ca_file: None,
            proxy: None,
            jobs: JOBS_MOST,
            stall: Duration::from_secs(30),
            retries: 4,
            spool: None,
        }
    }
}

/// The caches, in the order in which they are asked.
pub struct Caches {
    caches: Vec<Cache>,
    keys: Vec<PublicKey>,
    line: Line,
    jobs: usize,
    spool: Option<PathBuf>,
}

struct Cache {
    root: Location,
    /// Whether it has shown that it is a cache for /nix/store.
    checked: OnceLock<()>,
    /// Why it can't be reached: then it isn't asked any more.
    down: Mutex<Option<String>>,
}

/// How far an installation is; another thread may look at it, and end it.
#[derive(Debug, Default)]
pub struct Progress {
    /// Compressed bytes that have come.
    pub bytes_done: AtomicU64,
    pub bytes_total: AtomicU64,
    /// Paths that are in the store.
    pub paths_done: AtomicU64,
    pub paths_total: AtomicU64,
    /// Set by who wants it to end.
    pub cancel: AtomicBool,
}

impl Caches {
    pub fn new(settings: Settings) -> Result<Self, CacheError> {
        if settings.urls.is_empty() {
            return Err(CacheError::NoCaches);
        }
        if settings.trusted_keys.is_empty() {
            return Err(CacheError::NoKeys);
        }
        let cache = |url: &String| -> Result<Cache, CacheError> {
            Ok(Cache {
                root: Location::parse(url)?,
                checked: OnceLock::new(),
                down: Mutex::new(None),
            })
        };
        if let Some(spool) = &settings.spool {
            spool::sweep(spool, SystemTime::now());
        }
        Ok(Self {
            caches: settings.urls.iter().map(cache).collect::<Result<_, _>>()?,
            line: Line {
                transport: Transport::new(&settings)?,
                bucket: settings
                    .bytes_per_second
                    .map(|rate| Mutex::new(Bucket::new(rate))),
                retries: settings.retries,
            },
            keys: settings.trusted_keys,
            jobs: settings.jobs.clamp(1, JOBS_MOST),
            spool: settings.spool,
        })
    }

    /// A small file of any URL: a release and its signature.
    pub fn document(&self, url: &str, max_bytes: usize) -> Result<Vec<u8>, CacheError> {
        let location = Location::parse(url)?;
        let never = AtomicBool::new(false);
        Download::new(&self.line, &never, &location, None, max_bytes as u64, None)
            .whole()
            .map_err(|fault| CacheError::Document {
                url: url.to_owned(),
                fault,
            })
    }

    /// A path's narinfo from the first cache that has one which can be believed, and which cache that is.
    fn narinfo(
        &self,
        path: &StorePath,
        cancel: &AtomicBool,
    ) -> Result<(usize, NarInfo), CacheError> {
        let mut faults = Vec::new();
        for (index, cache) in self.caches.iter().enumerate() {
            match self.narinfo_of(cache, path, cancel) {
                Ok(info) => return Ok((index, info)),
                Err((_, Fault::Cancelled)) => return Err(CacheError::Cancelled),
                Err(fault) => faults.push(fault),
            }
        }
        Err(CacheError::Path {
            path: path.clone(),
            faults,
        })
    }

    /// A path's narinfo from one cache, or which of its files is wrong.
    fn narinfo_of(
        &self,
        cache: &Cache,
        path: &StorePath,
        cancel: &AtomicBool,
    ) -> Result<NarInfo, (String, Fault)> {
        self.check(cache, cancel)?;
        let name = narinfo::file_name(path);
        self.small(cache, &name, MAX_NARINFO_SIZE as u64, cancel)
            .and_then(|bytes| narinfo::verify(&bytes, path, &self.keys))
            .map_err(|fault| (format!("{}/{name}", cache.root), fault))
    }

    /// Whether it is a cache at all, and for the right store directory. Asked once.
    fn check(&self, cache: &Cache, cancel: &AtomicBool) -> Result<(), (String, Fault)> {
        if cache.checked.get().is_some() {
            return Ok(());
        }
        let name = "nix-cache-info";
        let checked = match self.small(cache, name, CACHE_INFO_BYTES, cancel) {
            Ok(bytes) => check_cache_info(&bytes),
            Err(Fault::Missing(_) | Fault::NoFile) => Err(Fault::NoCache),
            Err(fault) => Err(fault),
        };
        checked.map_err(|fault| (format!("{}/{name}", cache.root), fault))?;
        cache.checked.get_or_init(|| ());
        Ok(())
    }

    fn small(
        &self,
        cache: &Cache,
        name: &str,
        limit: u64,
        cancel: &AtomicBool,
    ) -> Result<Vec<u8>, Fault> {
        if let Some(why) = &*cache.down.lock() {
            return Err(Fault::Down(why.clone()));
        }
        let location = cache.root.file(name)?;
        Download::new(&self.line, cancel, &location, None, limit, None)
            .whole()
            .inspect_err(|fault| {
                if fault.is_unreachable() {
                    *cache.down.lock() = Some(fault.to_string());
                }
            })
    }

    /// Forgets which caches could not be reached.
    fn begin(&self) {
        for cache in &self.caches {
            *cache.down.lock() = None;
        }
    }
}

fn check_cache_info(bytes: &[u8]) -> Result<(), Fault> {
    let text = str::from_utf8(bytes).map_err(|_| Fault::CacheInfo)?;
    let mut fields = text.lines().filter_map(|line| line.split_once(':'));
    match fields.find(|(name, _)| *name == "StoreDir") {
        Some((_, store)) if store.trim() != STORE_DIR => {
            Err(Fault::StoreDir(format!("{:?}", store.trim())))
        }
        _ => Ok(()),
    }
}

/// Counts bytes on their way.
struct Counted<'a, R> {
    inner: R,
    count: &'a AtomicU64,
    counted: u64,
}

impl<R: io::Read> io::Read for Counted<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.counted += read as u64;
        self.count.fetch_add(read as u64, Ordering::Relaxed);
        Ok(read)
    }
}
