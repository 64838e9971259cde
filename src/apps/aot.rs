//! The cache of compiled components: one file for each, sealed with a key of this host.
//!
//! A compiled component is native code. Whoever could slip one in would run as the gateway; so a
//! file counts only if its seal, a keyed hash over its bytes, its component and the engine's
//! configuration, is right. Anything else (tampered, cut short, from another host, of another
//! engine) is as good as not there, and is compiled anew.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memfd::{FileSeal, Memfd, MemfdOptions};
use parking_lot::Mutex;

use crate::regular_file::{ReadError, RegularFile};
use crate::store::ComponentId;

use super::AppError;

const KEY_BYTES: usize = 32;
const SEAL_BYTES: usize = 32;

/// What is read at once: little enough to be in the CPU's cache still when it is hashed and copied.
const CHUNK_BYTES: usize = 128 << 10;

/// Begins each file; its last byte is the version of this layout: magic, length of the compiled component (8
/// bytes, little-endian), seal, compiled component.
const MAGIC: &[u8; 8] = b"HGAOT\0\0\x02";
const LENGTH_BYTES: usize = 8;
const HEADER_BYTES: usize = MAGIC.len() + LENGTH_BYTES + SEAL_BYTES;

/// Code in a file that has no name and that can't be changed any more: not even by whoever may change
/// the cache. It can be mapped, which costs less than a copy.
#[derive(Debug)]
pub(super) struct CodeFile {
    file: Memfd,
    bytes: usize,
}

pub(super) struct AotCache {
    folder: PathBuf,
    key: [u8; KEY_BYTES],
    /// Stands for all that decides whether compiled code fits the engine.
    engine: String,
    recent: Mutex<Recent>,
}

/// Code that was used last, the latest at the end: what is started again need not be read and checked
/// again. It takes memory only where the app does not run, for else that has it mapped anyway.
#[derive(Default)]
struct Recent {
    code: Vec<(ComponentId, Arc<CodeFile>)>,
}

/// Most bytes and most files of code that is kept because it was used last.
const RECENT_BYTES: usize = 16 << 20;
const RECENT_FILES: usize = 16;

impl Recent {
    fn get(&mut self, id: ComponentId) -> Option<Arc<CodeFile>> {
        let index = self.code.iter().position(|(known, _)| *known == id)?;
        let found = self.code.remove(index);
        self.code.push(found);
        self.code.last().map(|(_, code)| code.clone())
    }

    fn put(&mut self, id: ComponentId, code: &Arc<CodeFile>) {
        self.code.retain(|(known, _)| *known != id);
        self.code.push((id, code.clone()));
        let mut left = RECENT_BYTES;
        let kept = self
            .code
            .iter()
            .rev()
            .take(RECENT_FILES)
            .take_while(|(_, code)| {
                let fits = code.bytes <= left;
                left = left.saturating_sub(code.bytes);
                fits
            });
        let gone = self.code.len() - kept.count();
        self.code.drain(..gone);
    }
}

/// What was found in the cache.
#[derive(Debug)]
pub(super) enum Cached {
    /// Compiled code, sealed by this host for this component and this engine.
    Hit(Arc<CodeFile>),
    Missing,
    /// There is a file, and it can't be trusted.
    Rejected {
        path: PathBuf,
        why: String,
    },
}

impl AotCache {
    /// `engine` is a short hash of the engine's configuration, fit for a file name.
    pub(super) fn open(folder: &Path, key: &Path, engine: String) -> Result<AotCache, AppError> {
        fs::create_dir_all(folder).map_err(|source| file_error(folder, source))?;
        Ok(AotCache {
            folder: folder.to_owned(),
            key: host_key(key).map_err(|source| file_error(key, source))?,
            engine,
            recent: Mutex::default(),
        })
    }

    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }

    /// Reads once and judges the very bytes that it returns.
    pub(super) fn get(&self, id: ComponentId) -> Cached {
        if let Some(code) = self.recent.lock().get(id) {
            return Cached::Hit(code);
        }
        let path = self.path(id);
        match self.unseal(id, &path) {
            Ok(code) => {
                let code = Arc::new(code);
                self.recent.lock().put(id, &code);
                Cached::Hit(code)
            }
            Err(ReadError::Io(error)) if error.kind() == io::ErrorKind::NotFound => Cached::Missing,
            Err(error) => Cached::Rejected {
                path,
                why: error.to_string(),
            },
        }
    }

    fn unseal(&self, id: ComponentId, path: &Path) -> Result<CodeFile, ReadError> {
        let file = RegularFile::open(path, libc::O_NOFOLLOW)?;
        let bytes = file.metadata().len();
        let mut file = file.into_file();
        let mut header = [0; HEADER_BYTES];
        file.read_exact(&mut header)
            .map_err(|error| match error.kind() {
                io::ErrorKind::UnexpectedEof => invalid("it has no seal"),
                _ => error,
            })?;
        let (magic, rest) = header.split_at(MAGIC.len());
        let (length, seal) = rest.split_at(LENGTH_BYTES);
        if magic != MAGIC {
            return Err(invalid("it has no seal").into());
        }
        let length = u64::from_le_bytes(length.try_into().expect("8 bytes"));
        // Before it takes memory.
        if bytes != HEADER_BYTES as u64 + length {
            return Err(invalid("its length is wrong").into());
        }
        let seal = blake3::Hash::from_slice(seal).expect("as long as a hash");
        let code = MemfdOptions::default()
            .allow_sealing(true)
            .create("headgate-app")
            .map_err(no_copy)?;
        let mut hasher = self.sealer(id);
        let mut chunk = vec![0; CHUNK_BYTES];
        let mut left = length as usize;
        while left > 0 {
            let part = &mut chunk[..left.min(CHUNK_BYTES)];
            file.read_exact(part)?;
            hasher.update(part);
            code.as_file().write_all(part).map_err(no_copy)?;
            left -= part.len();
        }
        // Compares in constant time.
        if hasher.finalize() != seal {
            return Err(invalid("its seal is wrong").into());
        }
        let seals = [
            FileSeal::SealWrite,
            FileSeal::SealGrow,
            FileSeal::SealShrink,
            FileSeal::SealSeal,
        ];
        code.add_seals(&seals).map_err(no_copy)?;
        Ok(CodeFile {
            file: code,
            bytes: length as usize,
        })
    }

    /// Keeps compiled code. The file appears whole or not at all.
    pub(super) fn put(&self, id: ComponentId, compiled: &[u8]) -> io::Result<()> {
        self.remove(id);
        let mut file = tempfile::Builder::new()
            .prefix(TEMPORARY)
            .tempfile_in(&self.folder)?;
        file.write_all(MAGIC)?;
        file.write_all(&(compiled.len() as u64).to_le_bytes())?;
        let seal = self.sealer(id).update(compiled).finalize();
        file.write_all(seal.as_bytes())?;
        file.write_all(compiled)?;
        file.as_file().sync_data()?;
        file.persist(self.path(id))?;
        Ok(())
    }

    /// Removes the files of a component, those for other engines too. A file that stays is useless
    /// but harmless.
    pub(super) fn remove(&self, id: ComponentId) {
        self.recent.lock().code.retain(|(known, _)| *known != id);
        let id = id.to_string();
        self.remove_where(|name| name.starts_with(&id));
    }

    /// Removes all that doesn't belong to one of `used`, and what a crash has left behind.
    pub(super) fn keep_only(&self, used: &[ComponentId]) {
        let used: Vec<_> = used.iter().map(|id| self.file_name(*id)).collect();
        self.remove_where(|name| {
            name.starts_with(TEMPORARY)
                || (name.ends_with(".cwasm") && !used.iter().any(|used| used == name))
        });
    }

    fn remove_where(&self, which: impl Fn(&str) -> bool) {
        for entry in fs::read_dir(&self.folder).into_iter().flatten().flatten() {
            if entry.file_name().to_str().is_some_and(&which)
                && let Err(error) = fs::remove_file(entry.path())
            {
                tracing::warn!(path = %entry.path().display(), %error, "can't remove a stale file");
            }
        }
    }

    fn file_name(&self, id: ComponentId) -> String {
        format!("{id}-{}.cwasm", self.engine)
    }

    fn path(&self, id: ComponentId) -> PathBuf {
        self.folder.join(self.file_name(id))
    }

    /// What makes the seal, but for the compiled code.
    fn sealer(&self, id: ComponentId) -> blake3::Hasher {
        let mut hasher = blake3::Hasher::new_keyed(&self.key);
        hasher.update(id.as_bytes());
        hasher.update(&(self.engine.len() as u64).to_le_bytes());
        hasher.update(self.engine.as_bytes());
        hasher
    }
}

impl CodeFile {
    /// Where it can be opened, as long as this is there.
    pub(super) fn path(&self) -> PathBuf {
        format!("/proc/self/fd/{}", self.file.as_raw_fd()).into()
    }
}

fn invalid(why: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

fn no_copy(error: impl fmt::Display) -> io::Error {
    io::Error::other(format!("no copy of it can be made in memory: {error}"))
}

/// Files that begin so are being written, or were when a gateway died.
pub(super) const TEMPORARY: &str = ".tmp-";

/// Reads this host's key, or makes one. A key that others could read is worth nothing: it is
/// replaced, and everything is compiled anew.
fn host_key(path: &Path) -> io::Result<[u8; KEY_BYTES]> {
    match File::open(path) {
        Ok(mut file) => {
            let mut bytes = Vec::new();
            Read::by_ref(&mut file)
                .take(KEY_BYTES as u64 + 1)
                .read_to_end(&mut bytes)?;
            let open_to_others = file.metadata()?.permissions().mode() & 0o077 != 0;
            match <[u8; KEY_BYTES]>::try_from(bytes) {
                Ok(key) if !open_to_others => return Ok(key),
                _ => tracing::warn!(
                    path = %path.display(),
                    "the host key is damaged or readable by others; made a new one"
                ),
            }
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let mut key = [0; KEY_BYTES];
    File::open("/dev/urandom")?.read_exact(&mut key)?;
    let temporary = path.with_extension("tmp");
    match fs::remove_file(&temporary) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&temporary)?;
    file.write_all(&key)?;
    file.sync_all()?;
    fs::rename(&temporary, path)?;
    Ok(key)
}

pub(super) fn file_error(path: &Path, source: io::Error) -> AppError {
    AppError::File {
        path: path.to_owned(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStringExt;

    use super::*;

    fn cache(folder: &Path, engine: &str) -> AotCache {
        AotCache::open(&folder.join("aot"), &folder.join("host.key"), engine.into()).unwrap()
    }

    #[test]
    fn what_was_put_is_found_again_after_reopening() {
        let folder = tempfile::tempdir().unwrap();
        let id = ComponentId::of(b"wasm");
        assert!(matches!(cache(folder.path(), "e").get(id), Cached::Missing));
        let code: Vec<u8> = (0..CHUNK_BYTES * 2 + 3).map(|byte| byte as u8).collect();
        cache(folder.path(), "e").put(id, &code).unwrap();
        let Cached::Hit(found) = cache(folder.path(), "e").get(id) else {
            panic!("not found");
        };
        assert!(fs::read(found.path()).unwrap() == code);
        fs::write(found.path(), "other").unwrap_err();
    }

    #[test]
    fn what_is_no_file_or_of_the_wrong_length_is_not_read() {
        let folder = tempfile::tempdir().unwrap();
        let cache = cache(folder.path(), "e");
        let id = ComponentId::of(b"wasm");
        let rejected = || match cache.get(id) {
            Cached::Rejected { why, .. } => why,
            other => panic!("{other:?}"),
        };
        // A pipe that nobody writes to: reading it would never end.
        let path = std::ffi::CString::new(cache.path(id).into_os_string().into_vec()).unwrap();
        // SAFETY: the path ends with a NUL.
        #[allow(unsafe_code)]
        let made = unsafe { libc::mkfifo(path.as_ptr(), 0o600) };
        assert_eq!(made, 0);
        assert_eq!(rejected(), "not a regular file");
        fs::remove_file(cache.path(id)).unwrap();

        cache.put(id, b"code").unwrap();
        let file = OpenOptions::new().write(true).open(cache.path(id)).unwrap();
        file.set_len(1 << 40).unwrap();
        assert_eq!(rejected(), "its length is wrong");
    }

    #[test]
    fn code_that_was_used_last_is_kept_as_long_as_it_is_little() {
        let folder = tempfile::tempdir().unwrap();
        let cache = cache(folder.path(), "e");
        let ids: Vec<_> = (0..RECENT_FILES as u8 + 1)
            .map(|number| ComponentId::of(&[number]))
            .collect();
        for id in &ids {
            cache.put(*id, b"code").unwrap();
            let Cached::Hit(code) = cache.get(*id) else {
                panic!("not found");
            };
            // The same, not a copy.
            assert!(matches!(cache.get(*id), Cached::Hit(again) if Arc::ptr_eq(&again, &code)));
        }
        let is_kept = |id: &ComponentId| {
            fs::remove_file(cache.path(*id)).unwrap();
            matches!(cache.get(*id), Cached::Hit(_))
        };
        let kept: Vec<_> = ids.iter().map(is_kept).collect();
        assert!(!kept[0] && kept[1..].iter().all(|kept| *kept), "{kept:?}");

        cache.remove(ids[1]);
        assert!(matches!(cache.get(ids[1]), Cached::Missing));

        let large = ComponentId::of(b"large");
        cache.put(large, &vec![0; RECENT_BYTES + 1]).unwrap();
        assert!(matches!(cache.get(large), Cached::Hit(_)));
        fs::remove_file(cache.path(large)).unwrap();
        assert!(matches!(cache.get(large), Cached::Missing));
    }

    #[test]
    fn a_changed_byte_anywhere_breaks_the_seal() {
        let folder = tempfile::tempdir().unwrap();
        let cache = cache(folder.path(), "e");
        let id = ComponentId::of(b"wasm");
        cache.put(id, b"code").unwrap();
        let path = cache.path(id);
        let whole = fs::read(&path).unwrap();
        for position in 0..whole.len() {
            let mut changed = whole.clone();
            changed[position] ^= 1;
            fs::write(&path, changed).unwrap();
            assert!(
                matches!(cache.get(id), Cached::Rejected { .. }),
                "byte {position}"
            );
            fs::write(&path, &whole[..position]).unwrap();
            assert!(
                matches!(cache.get(id), Cached::Rejected { .. }),
                "cut at {position}"
            );
        }
    }

    #[test]
    fn a_file_counts_only_for_its_component_its_engine_and_its_host() {
        let folder = tempfile::tempdir().unwrap();
        let here = cache(folder.path(), "e");
        let (id, other) = (ComponentId::of(b"wasm"), ComponentId::of(b"other"));
        here.put(id, b"code").unwrap();

        fs::copy(here.path(id), here.path(other)).unwrap();
        assert!(matches!(here.get(other), Cached::Rejected { .. }));

        let newer = cache(folder.path(), "e2");
        fs::copy(here.path(id), newer.path(id)).unwrap();
        assert!(matches!(newer.get(id), Cached::Rejected { .. }));

        let elsewhere = tempfile::tempdir().unwrap();
        let elsewhere = cache(elsewhere.path(), "e");
        fs::copy(here.path(id), elsewhere.path(id)).unwrap();
        assert!(matches!(elsewhere.get(id), Cached::Rejected { .. }));
    }

    #[test]
    fn stale_files_go() {
        let folder = tempfile::tempdir().unwrap();
        let cache = cache(folder.path(), "e");
        let (kept, gone) = (ComponentId::of(b"kept"), ComponentId::of(b"gone"));
        cache.put(kept, b"code").unwrap();
        cache.put(gone, b"code").unwrap();
        fs::write(cache.folder().join(format!("{kept}-older.cwasm")), "").unwrap();
        fs::write(cache.folder().join(".tmp-abc"), "").unwrap();
        fs::write(cache.folder().join("README"), "").unwrap();
        cache.keep_only(&[kept]);
        let mut left: Vec<_> = fs::read_dir(cache.folder())
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .collect();
        left.sort();
        let mut expected = [cache.path(kept), cache.folder().join("README")];
        expected.sort();
        assert_eq!(left, expected);
    }

    #[test]
    fn the_host_key_is_secret_and_stays() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("host.key");
        let key = host_key(&path).unwrap();
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
        assert_eq!(host_key(&path).unwrap(), key);
    }

    #[test]
    fn a_host_key_that_others_can_read_or_that_is_damaged_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("host.key");
        let first = host_key(&path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        let second = host_key(&path).unwrap();
        assert_ne!(first, second);
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
        fs::write(&path, "short").unwrap();
        assert_ne!(host_key(&path).unwrap(), second);
    }
}
