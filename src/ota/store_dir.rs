//! The store on disk: which paths are there, what they should be, and which are not needed any more.
//!
//! A path that is there is whole: [`StoreDir::place`] puts it there only after its data are on disk. What
//! is on its way has a name that begins with `.headgate-`; whoever begins, under the update's lock, sweeps
//! what an interruption has left of those.

mod registration;
mod scrub;

use std::collections::{BTreeSet, HashMap};
use std::fs::{self, File, Permissions};
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use nix_archive::nar::{CaseHack, REFERENCE_LENGTH, ReferencePattern};
use nix_derivation::{NixHash, StorePath};
use nix_narinfo::{MAX_NARINFO_SIZE, NarInfo};
use rustix::fs::{Mode, OFlags, RenameFlags};
use thiserror::Error;

use crate::ota::cache::narinfo;

pub use scrub::Scrubbed;

const TEMPORARY: &str = ".headgate-";

/// What went wrong on this machine.
#[derive(Debug, Error)]
pub enum StoreError {
    #[error(
        "can't {what} {}: no space is left; remove what is not needed (`headgate ota gc`), then try again",
        path.display()
    )]
    Full { what: &'static str, path: PathBuf },
    #[error("can't {what} {}: {error}", path.display())]
    Io {
        what: &'static str,
        path: PathBuf,
        error: io::Error,
    },
    #[error("{}, line {line}: {why}", file.display())]
    Registration {
        file: PathBuf,
        line: usize,
        why: String,
    },
    #[error("can't read {}: {error}", path.display())]
    Nar {
        path: PathBuf,
        error: nix_archive::nar::Error,
    },
}

impl StoreError {
    pub(super) fn new(what: &'static str, path: &Path, error: io::Error) -> Self {
        let path = path.to_owned();
        match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::Full { what, path },
            _ => Self::Io { what, path, error },
        }
    }
}

/// What a path should be, and what it needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Known {
    pub nar_hash: NixHash,
    pub nar_size: u64,
    pub references: Vec<StorePath>,
}

/// The store below a root folder.
#[derive(Debug)]
pub struct StoreDir {
    path: PathBuf,
    folder: OwnedFd,
    /// Where the narinfo of each path is that was fetched.
    narinfos: PathBuf,
    /// The paths that the image came with.
    registered: HashMap<StorePath, Known>,
}

impl StoreDir {
    /// Opens the store below `root`, which is `/` on a gateway. Changes nothing.
    pub fn open(root: &Path) -> Result<Self, StoreError> {
        let path = root.join("nix/store");
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let folder = rustix::fs::open(&path, flags, Mode::empty())
            .map_err(|error| StoreError::new("open the store", &path, error.into()))?;
        let state = root.join("nix/var/headgate");
        Ok(Self {
            path,
            folder,
            narinfos: state.join("narinfo"),
            registered: registration::load(&state.join("registration"))?,
        })
    }

    /// Whether a path is there, which means that all of it is.
    pub fn contains(&self, path: &StorePath) -> bool {
        self.place_of(path).symlink_metadata().is_ok()
    }

    /// Where a path is on this machine.
    pub fn place_of(&self, path: &StorePath) -> PathBuf {
        self.path.join(path.to_basename())
    }

    /// All paths that are there.
    pub fn paths(&self) -> Result<BTreeSet<StorePath>, StoreError> {
        let wrong = |error| StoreError::new("list", &self.path, error);
        let mut paths = BTreeSet::new();
        for entry in fs::read_dir(&self.path).map_err(wrong)? {
            let name = entry.map_err(wrong)?.file_name();
            // Others keep things there too: locks, links, what is on its way.
            paths.extend(StorePath::from_basename(name.as_encoded_bytes()).ok());
        }
        Ok(paths)
    }

    /// What a path should be, from its narinfo or from the image's registration.
    pub fn known(&self, path: &StorePath) -> Result<Option<Known>, StoreError> {
        let file = self.narinfos.join(narinfo::file_name(path));
        match fs::metadata(&file) {
            Ok(metadata) if metadata.len() <= MAX_NARINFO_SIZE as u64 => {}
            _ => return Ok(self.registered.get(path).cloned()),
        }
        let bytes = fs::read(&file).map_err(|error| StoreError::new("read", &file, error))?;
        let kept = NarInfo::parse_in(&nix_derivation::StoreDir::default(), &bytes)
            .ok()
            // A file that was damaged must not make references disappear.
            .filter(|info| info.store_path() == path)
            .filter(|info| !info.signatures().is_empty() && info.to_canonical_bytes() == bytes)
            .map(|info| Known {
                nar_hash: info.nar_hash().clone(),
                nar_size: info.nar_size(),
                references: info.references().iter().cloned().collect(),
            });
        Ok(kept.or_else(|| self.registered.get(path).cloned()))
    }

    /// What a path refers to. Where nobody has written that down, those paths of the store whose names are
    /// in it.
    pub fn references(&self, path: &StorePath) -> Result<Vec<StorePath>, StoreError> {
        if let Some(known) = self.known(path)? {
            return Ok(known.references);
        }
        let all: Vec<StorePath> = self.paths()?.into_iter().collect();
        let hashes: Vec<String> = all.iter().map(narinfo::hash_part).collect();
        debug_assert!(hashes.iter().all(|hash| hash.len() == REFERENCE_LENGTH));
        let place = self.place_of(path);
        let pattern = ReferencePattern::new(&hashes).map_err(|error| {
            StoreError::new("look for references in", &place, io::Error::other(error))
        })?;
        let found = pattern
            .scan_path(&place, CaseHack::Disabled)
            .map_err(|error| StoreError::Nar { path: place, error })?;
        Ok(found
            .matches
            .into_iter()
            .map(|index| all[index].clone())
            .collect())
    }

    /// The paths that none of the roots needs.
    pub fn unreachable(&self, roots: &[StorePath]) -> Result<Vec<StorePath>, StoreError> {
        let mut unreachable = self.paths()?;
        let mut waiting: Vec<StorePath> = roots.to_vec();
        let mut seen: BTreeSet<StorePath> = waiting.iter().cloned().collect();
        while let Some(path) = waiting.pop() {
            if unreachable.remove(&path) || self.contains(&path) {
                for reference in self.references(&path)? {
                    if seen.insert(reference.clone()) {
                        waiting.push(reference);
                    }
                }
            }
        }
        Ok(unreachable.into_iter().collect())
    }

    /// Removes paths. Each is gone at once, whatever happens while its files are being removed.
    pub fn remove(&self, paths: &[StorePath]) -> Result<(), StoreError> {
        for path in paths {
            if !self.contains(path) {
                continue;
            }
            let name = temporary_name();
            rustix::fs::renameat(&self.folder, path.to_basename(), &self.folder, &name)
                .map_err(|error| StoreError::new("remove", &self.place_of(path), error.into()))?;
            self.delete(&name)?;
            self.forget(path)?;
        }
        Ok(())
    }

    /// Removes what an interruption has left. Nobody else may be at work.
    pub fn sweep(&self) -> Result<(), StoreError> {
        for folder in [&self.path, &self.narinfos] {
            for entry in fs::read_dir(folder).into_iter().flatten() {
                let entry = entry.map_err(|error| StoreError::new("list", folder, error))?;
                if entry
                    .file_name()
                    .as_encoded_bytes()
                    .starts_with(TEMPORARY.as_bytes())
                {
                    delete(&entry.path())?;
                }
            }
        }
        Ok(())
    }

    /// Begins a path: the place where it is made ready.
    pub(super) fn begin(&self) -> Temporary<'_> {
        Temporary {
            store: self,
            name: Some(temporary_name()),
        }
    }

    /// Puts paths that are ready into the store, with what is signed about them. When this returns, they
    /// are there for good, and a power cut before that leaves each there as a whole or not at all.
    pub(super) fn place(&self, ready: Vec<(Temporary<'_>, &NarInfo)>) -> Result<(), StoreError> {
        let infos: Vec<&NarInfo> = ready.iter().map(|(_, info)| *info).collect();
        // A description without its path does no harm; a path without description would.
        self.describe(&infos, &self.folder)?;
        for (temporary, info) in ready {
            let to = info.store_path().to_basename();
            let name = temporary.keep();
            let renamed = match rustix::fs::renameat_with(
                &self.folder,
                &name,
                &self.folder,
                &to,
                RenameFlags::NOREPLACE,
            ) {
                // It is there, and is being repaired: the two change places.
                Err(rustix::io::Errno::EXIST) => rustix::fs::renameat_with(
                    &self.folder,
                    &name,
                    &self.folder,
                    &to,
                    RenameFlags::EXCHANGE,
                )
                .map(|()| true),
                renamed => renamed.map(|()| false),
            };
            let replaced = renamed.map_err(|error| {
                let _ = self.delete(&name);
                StoreError::new("put in place", &self.path.join(&to), error.into())
            })?;
            if replaced {
                self.delete(&name)?;
            }
        }
        rustix::fs::fsync(&self.folder)
            .map_err(|error| StoreError::new("write", &self.path, error.into()))
    }

    /// Keeps descriptions, and sees to it that they are on disk, as well as all that was written in the
    /// file system of `also`.
    pub(super) fn describe(&self, infos: &[&NarInfo], also: impl AsFd) -> Result<(), StoreError> {
        let wrong = |error| StoreError::new("write", &self.narinfos, error);
        fs::create_dir_all(&self.narinfos).map_err(wrong)?;
        let folder = File::open(&self.narinfos).map_err(wrong)?;
        let mut written = Vec::new();
        for info in infos {
            let name = temporary_name();
            let made = File::create_new(self.narinfos.join(&name))
                .and_then(|mut file| file.write_all(&info.to_canonical_bytes()));
            written.push((name, narinfo::file_name(info.store_path())));
            if let Err(error) = made {
                for (name, _) in written {
                    let _ = fs::remove_file(self.narinfos.join(name));
                }
                return Err(wrong(error));
            }
        }
        let sync = |folder: BorrowedFd<'_>| {
            rustix::fs::syncfs(folder)
                .map_err(|error| StoreError::new("write", &self.path, error.into()))
        };
        sync(also.as_fd())?;
        let device = |folder: BorrowedFd<'_>| rustix::fs::fstat(folder).map(|stat| stat.st_dev);
        if device(also.as_fd()) != device(folder.as_fd()) {
            sync(folder.as_fd())?;
        }
        for (from, to) in written {
            fs::rename(self.narinfos.join(from), self.narinfos.join(to)).map_err(wrong)?;
        }
        folder.sync_all().map_err(wrong)
    }

    fn forget(&self, path: &StorePath) -> Result<(), StoreError> {
        let file = self.narinfos.join(narinfo::file_name(path));
        match fs::remove_file(&file) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(StoreError::new("remove", &file, error))
            }
            _ => Ok(()),
        }
    }

    fn delete(&self, name: &str) -> Result<(), StoreError> {
        delete(&self.path.join(name))
    }

    pub(super) fn as_fd(&self) -> BorrowedFd<'_> {
        self.folder.as_fd()
    }
}

/// A place for what is being made ready; nothing is left of it unless it is kept.
#[derive(Debug)]
pub(super) struct Temporary<'a> {
    store: &'a StoreDir,
    name: Option<String>,
}

impl Temporary<'_> {
    pub(super) fn name(&self) -> &str {
        self.name.as_deref().unwrap_or_default()
    }

    fn keep(mut self) -> String {
        self.name.take().unwrap_or_default()
    }
}

impl Drop for Temporary<'_> {
    fn drop(&mut self) {
        if let Some(name) = &self.name {
            // What can't be removed now is swept at the next start.
            let _ = self.store.delete(name);
        }
    }
}

fn temporary_name() -> String {
    format!("{TEMPORARY}{:016x}", fastrand::u64(..))
}

/// Removes a file or a tree, also one whose folders can't be written to.
fn delete(path: &Path) -> Result<(), StoreError> {
    let removed = remove(path).or_else(|error| match error.kind() {
        io::ErrorKind::PermissionDenied => make_writable(path).and_then(|()| remove(path)),
        _ => Err(error),
    });
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(StoreError::new("remove", path, error))
        }
        _ => Ok(()),
    }
}

fn remove(path: &Path) -> io::Result<()> {
    if path.symlink_metadata()?.is_dir() {
        fs::remove_dir_all(path)
    } else {
        fs::remove_file(path)
    }
}

fn make_writable(folder: &Path) -> io::Result<()> {
    fs::set_permissions(folder, Permissions::from_mode(0o700))?;
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            make_writable(&entry.path())?;
        }
    }
    Ok(())
}
