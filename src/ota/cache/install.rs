//! Fetches what is missing and puts it into the store, several paths at once.

use std::io::{self, BufReader, Read};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::thread;

use liblzma::bufread::XzDecoder;
use nix_derivation::{NixHash, StorePath};
use nix_narinfo::{Compression, NarInfo};

use super::ahead::read_ahead;
use super::download::Download;
use super::fault::{CacheError, Fault};
use super::nar::{Metered, UnpackError, check_hash, unpack};
use super::narinfo::hash_part;
use super::plan::{Missing, Plan};
use super::spool::{LEAST_BYTES, Spooled};
use super::{Cache, Caches, Counted, Progress};
use crate::ota::store_dir::{StoreDir, Temporary};

/// Bytes that are unpacked before they are forced to disk and the paths put in place.
const GROUP_BYTES: u64 = 64 * 1024 * 1024;

/// Compressed bytes that are read at once.
const BUFFER_BYTES: usize = 64 * 1024;

/// The largest window that a decompressor may ask for: 8 MiB, what zstd takes up to level 19 and xz by
/// default. With four at once, memory stays below 64 MB.
const ZSTD_WINDOW_LOG: u32 = 23;
const XZ_MEMORY: u64 = 10 * 1024 * 1024;

/// A path whose files are ready.
struct Ready<'a> {
    temporary: Temporary<'a>,
    info: NarInfo,
}

/// Fetches what a plan says is missing, and puts it into the store. What is complete stays when there is an
/// error, so that the next time less is missing.
pub fn install(
    caches: &Caches,
    store: &StoreDir,
    plan: &Plan,
    progress: &Progress,
) -> Result<(), CacheError> {
    if !plan.described.is_empty() {
        let described: Vec<&NarInfo> = plan.described.iter().collect();
        store.describe(&described, store.as_fd())?;
    }
    fetch_all(caches, store, plan.missing.clone(), progress)
}

/// Fetches paths anew that are damaged, and puts them in the place of what is there.
pub fn repair(
    caches: &Caches,
    store: &StoreDir,
    damaged: &[StorePath],
    progress: &Progress,
) -> Result<(), CacheError> {
    caches.begin();
    let mut missing = Vec::new();
    let mut failed = None;
    for path in damaged {
        match caches.narinfo(path, &progress.cancel) {
            Ok((cache, info)) => missing.push(Missing { info, cache }),
            // The others are mended nevertheless.
            Err(error) => failed = failed.or(Some(error)),
        }
    }
    fetch_all(caches, store, missing, progress)?;
    failed.map_or(Ok(()), Err)
}

fn fetch_all(
    caches: &Caches,
    store: &StoreDir,
    mut missing: Vec<Missing>,
    progress: &Progress,
) -> Result<(), CacheError> {
    let bytes = missing
        .iter()
        .map(Missing::download_bytes)
        .fold(0, u64::saturating_add);
    progress.bytes_total.store(bytes, Ordering::Relaxed);
    progress
        .paths_total
        .store(missing.len() as u64, Ordering::Relaxed);
    // The largest first, so that all threads end at about the same time.
    missing.sort_by_key(|missing| std::cmp::Reverse(missing.download_bytes()));
    let next = AtomicUsize::new(0);
    // Few wait, so that little is unpacked that is not in place.
    let (sender, receiver) = mpsc::sync_channel(caches.jobs);
    thread::scope(|scope| {
        for _ in 0..caches.jobs {
            let sender = sender.clone();
            let (missing, next) = (&missing, &next);
            scope.spawn(move || {
                while let Some(missing) = missing.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let fetched = caches.fetch(store, missing, progress);
                    if fetched.is_err() {
                        next.store(usize::MAX / 2, Ordering::Relaxed);
                    }
                    // Nobody takes it any more after an error on this machine.
                    if sender.send(fetched).is_err() {
                        return;
                    }
                }
            });
        }
        drop(sender);
        let placed = place_all(store, receiver, progress);
        next.store(usize::MAX / 2, Ordering::Relaxed);
        placed
    })
}

/// Puts what is ready in place, in groups: forcing each path to disk on its own would take far longer.
fn place_all(
    store: &StoreDir,
    ready: Receiver<Result<Ready<'_>, CacheError>>,
    progress: &Progress,
) -> Result<(), CacheError> {
    let mut failed = None;
    let mut group = Vec::new();
    let mut bytes = 0u64;
    for fetched in ready {
        match fetched {
            Ok(ready) => {
                bytes = bytes.saturating_add(ready.info.nar_size());
                group.push(ready);
            }
            Err(error @ CacheError::Store(_)) => return Err(error),
            // Another thread that ends because of the same is no news.
            Err(error) => failed = failed.or(Some(error)),
        }
        if bytes >= GROUP_BYTES {
            place(store, &mut group, progress)?;
            bytes = 0;
        }
    }
    place(store, &mut group, progress)?;
    failed.map_or(Ok(()), Err)
}

fn place(
    store: &StoreDir,
    group: &mut Vec<Ready<'_>>,
    progress: &Progress,
) -> Result<(), CacheError> {
    if group.is_empty() {
        return Ok(());
    }
    let (temporaries, infos): (Vec<Temporary<'_>>, Vec<NarInfo>) = group
        .drain(..)
        .map(|ready| (ready.temporary, ready.info))
        .unzip();
    store.place(temporaries.into_iter().zip(&infos).collect())?;
    progress
        .paths_done
        .fetch_add(infos.len() as u64, Ordering::Relaxed);
    Ok(())
}

impl Caches {
    /// Fetches one path from the cache that has described it, or else from the others.
    fn fetch<'a>(
        &self,
        store: &'a StoreDir,
        missing: &Missing,
        progress: &Progress,
    ) -> Result<Ready<'a>, CacheError> {
        let path = missing.info.store_path();
        let mut faults = Vec::new();
        let first = std::iter::once(missing.cache);
        for index in first.chain((0..self.caches.len()).filter(|index| *index != missing.cache)) {
            let cache = &self.caches[index];
            let info = if index == missing.cache {
                Ok(missing.info.clone())
            } else {
                self.narinfo_of(cache, path, &progress.cancel)
            };
            let fetched = info.and_then(|info| {
                if info.references() != missing.info.references() {
                    return Err((cache.root.to_string(), Fault::OtherReferences));
                }
                match self.fetch_from(cache, store, &info, progress) {
                    Ok(temporary) => Ok(Ok(Ready { temporary, info })),
                    Err(UnpackError::Store(error)) => Ok(Err(CacheError::Store(error))),
                    Err(UnpackError::Fault(fault)) => {
                        Err((format!("{}/{}", cache.root, info.url()), fault))
                    }
                }
            });
            match fetched {
                Ok(outcome) => return outcome,
                Err((_, Fault::Cancelled)) => return Err(CacheError::Cancelled),
                Err(fault) => faults.push(fault),
            }
        }
        Err(CacheError::Path {
            path: path.clone(),
            faults,
        })
    }

    fn fetch_from<'a>(
        &self,
        cache: &Cache,
        store: &'a StoreDir,
        info: &NarInfo,
        progress: &Progress,
    ) -> Result<Temporary<'a>, UnpackError> {
        let (first, pieced) = self.try_from(cache, store, info, progress);
        match first {
            // The pieces may be of different files.
            Err(UnpackError::Fault(fault)) if pieced && !fault.is_passing() => {
                self.try_from(cache, store, info, progress).0
            }
            first => first,
        }
    }

    /// Fetches a path once. Says too whether what came was of several pieces.
    fn try_from<'a>(
        &self,
        cache: &Cache,
        store: &'a StoreDir,
        info: &NarInfo,
        progress: &Progress,
    ) -> (Result<Temporary<'a>, UnpackError>, bool) {
        let location = match cache.root.file(info.url()) {
            Ok(location) => location,
            Err(fault) => return (Err(fault.into()), false),
        };
        // Compressing can make it longer, but not by much.
        let limit = info.file_size().unwrap_or_else(|| {
            info.nar_size()
                .saturating_add(info.nar_size() / 8 + 64 * 1024)
        });
        let spool = self
            .spool
            .as_deref()
            .filter(|_| limit >= LEAST_BYTES)
            .and_then(|folder| {
                let hash = info.file_hash().unwrap_or(info.nar_hash());
                let name = nix_derivation::nixbase32::encode(hash.digest_as_bytes());
                Spooled::open(
                    folder,
                    &format!("{}-{name}", hash_part(info.store_path())),
                    limit,
                )
            });
        let mut download = Download::new(
            &self.line,
            &progress.cancel,
            &location,
            info.file_size(),
            limit,
            spool,
        );
        let temporary = store.begin();
        let mut counted = Counted {
            inner: &mut download,
            count: &progress.bytes_done,
            counted: 0,
        };
        let unpacked = unpack_file(&mut counted, limit, info, store, &temporary);
        let came = counted.counted;
        let pieced = download.is_pieced();
        match unpacked {
            Ok(()) => {
                download.forget();
                (Ok(temporary), pieced)
            }
            Err(error) => {
                progress.bytes_done.fetch_sub(came, Ordering::Relaxed);
                if let UnpackError::Fault(fault) = &error
                    && !fault.is_passing()
                    && !matches!(fault, Fault::Cancelled)
                {
                    download.forget();
                }
                (Err(error), pieced)
            }
        }
    }
}

/// Decompresses and unpacks. Returns whether something comes after the NAR.
fn decode(
    file: impl Read,
    info: &NarInfo,
    store: &StoreDir,
    temporary: &Temporary<'_>,
) -> Result<bool, UnpackError> {
    let mut file = BufReader::with_capacity(BUFFER_BYTES, file);
    let wrong = |error: io::Error| Fault::Decompression(error.to_string());
    let NixHash::Sha256(hash) = info.nar_hash() else {
        return Err(Fault::HashKind.into());
    };
    let (size, folder, name) = (info.nar_size(), store.as_fd(), temporary.name());
    match info.compression() {
        Compression::None => unpack(&mut file, size, hash, folder, name)?,
        Compression::Zstd => {
            let mut decoder = zstd::Decoder::with_buffer(&mut file).map_err(wrong)?;
            decoder.window_log_max(ZSTD_WINDOW_LOG).map_err(wrong)?;
            unpack(decoder, size, hash, folder, name)?;
        }
        Compression::Xz => {
            let stream = liblzma::stream::Stream::new_stream_decoder(XZ_MEMORY, 0)
                .map_err(|error| wrong(error.into()))?;
            let decoder = XzDecoder::new_stream(&mut file, stream);
            unpack(decoder, size, hash, folder, name)?;
        }
        other => return Err(Fault::Compression(other.to_string()).into()),
    }
    let extra = file
        .read(&mut [0])
        .map_err(|error| Fault::from_io(error, Fault::File))?;
    Ok(extra > 0)
}

/// Decompresses and unpacks, and checks all that a narinfo says about its file and its NAR.
fn unpack_file(
    file: impl Read + Send,
    limit: u64,
    info: &NarInfo,
    store: &StoreDir,
    temporary: &Temporary<'_>,
) -> Result<(), UnpackError> {
    let metered = Metered::new(file, limit);
    let ((_, digest, count), extra) = if limit >= LEAST_BYTES {
        let (metered, extra) = read_ahead(metered, |file| decode(file, info, store, temporary));
        (metered.finish(), extra?)
    } else {
        let mut metered = metered;
        let extra = decode(&mut metered, info, store, temporary)?;
        (metered.finish(), extra)
    };
    // What comes after the NAR belongs to nothing.
    if extra {
        return Err(Fault::TooLong { limit: count - 1 }.into());
    }
    if let Some(expected) = info.file_size()
        && count != expected
    {
        return Err(Fault::Short {
            got: count,
            expected,
        }
        .into());
    }
    if let Some(NixHash::Sha256(expected)) = info.file_hash() {
        check_hash("FileHash", digest.as_ref(), expected)?;
    }
    Ok(())
}
