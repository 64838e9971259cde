//! The EFI system partition: what is on it, and changes that each leave it whole.
//!
//! FAT has no journal. A file is written under a name that means nothing to anybody, is made to last, and
//! then gets its own name; which is one sector, unless the name is in two. What a power cut leaves
//! otherwise, both names or none, fsck.fat and the next run put right.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::fs::{self, File, TryLockError};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, CWD, StatVfsMountFlags, StatxAttributes, StatxFlags, statvfs, statx, syncfs,
};

use super::entry::{self, Entry, Parsed, parse_name};
use super::{BootError, Doing};

/// Below the partition: entries of everybody, and kernels of ours.
pub(super) const ENTRIES: &str = "loader/entries";
pub(super) const KERNELS: &str = "EFI/headgate";

/// What is being written. There is one writer, so one name will do, and what a power cut leaves is
/// overwritten. systemd-boot looks at no file that begins with a dot.
const UNFINISHED: &str = ".headgate-unfinished";

/// An entry is a file of some hundred bytes: systemd-boot itself reads no more than 1 MiB.
const MAX_ENTRY_BYTES: u64 = 1 << 20;
const BUFFER_BYTES: usize = 1 << 16;

/// Where the EFI system partition is mounted.
#[derive(Clone, Debug)]
pub struct Esp {
    path: PathBuf,
    is_image: bool,
}

impl Esp {
    /// A mounted partition. That it is one is looked at before anything else.
    pub fn new(path: impl Into<PathBuf>) -> Esp {
        Esp {
            path: path.into(),
            is_image: false,
        }
    }

    /// A folder of which an image is to be made, or a test's.
    pub fn offline(path: impl Into<PathBuf>) -> Esp {
        Esp {
            path: path.into(),
            is_image: true,
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The entries of ours, in the order in which systemd-boot takes them: the first is what the machine
    /// boots next.
    pub fn entries(&self) -> Result<Vec<Entry>, BootError> {
        self.check_mounted()?;
        let mut entries = Vec::new();
        for (file, parsed) in self.all_entries()? {
            let name = file.file_name().and_then(OsStr::to_str);
            let Some((generation, tries)) = name.and_then(parse_name) else {
                continue;
            };
            let broken = self.flaw(&parsed);
            let Parsed {
                title, toplevel, ..
            } = parsed;
            entries.push(Entry {
                generation,
                tries,
                file,
                title,
                toplevel,
                broken,
            });
        }
        entries.sort_by(Entry::order);
        Ok(entries)
    }

    /// Why an entry of ours does not boot.
    fn flaw(&self, parsed: &Parsed) -> Option<String> {
        if !parsed.starts_something {
            return Some("it names no kernel".into());
        }
        if parsed.toplevel.is_none() {
            return Some("it names no system".into());
        }
        parsed.files.iter().find_map(|file| {
            let is_there = entry::below(&self.path, file)
                .and_then(|path| path.metadata().ok())
                .is_some_and(|file| file.is_file() && file.len() > 0);
            (!is_there).then(|| format!("{file} is missing or empty"))
        })
    }

    /// Everybody's entries. One that can't be read is an error: it may name a kernel.
    fn all_entries(&self) -> Result<Vec<(PathBuf, Parsed)>, BootError> {
        let folder = self.path.join(ENTRIES);
        let mut entries = Vec::new();
        for file in files(&folder)? {
            if file.extension() != Some(OsStr::new("conf")) || !file.is_file() {
                continue;
            }
            let mut text = Vec::new();
            File::open(&file)
                .and_then(|opened| opened.take(MAX_ENTRY_BYTES).read_to_end(&mut text))
                .doing("reading", &file)?;
            entries.push((file, entry::parse(&text)));
        }
        Ok(entries)
    }

    fn check_mounted(&self) -> Result<(), BootError> {
        let esp = || self.path.clone();
        match self.path.metadata() {
            Ok(own) if own.is_dir() => {}
            Ok(_) => return Err(BootError::Missing { esp: esp() }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(BootError::Missing { esp: esp() });
            }
            Err(error) => return Err(error).doing("looking at", &self.path),
        }
        let flags = AtFlags::empty();
        let about = statx(CWD, &self.path, flags, StatxFlags::BASIC_STATS)
            .doing("looking at", &self.path)?;
        if !self.is_image && !about.stx_attributes.contains(StatxAttributes::MOUNT_ROOT) {
            return Err(BootError::NotMounted { esp: esp() });
        }
        Ok(())
    }

    /// Only who has the result writes.
    pub(super) fn writer(&self) -> Result<Writer<'_>, BootError> {
        self.check_mounted()?;
        let esp = || self.path.clone();
        let mounted = statvfs(&self.path).doing("looking at", &self.path)?;
        if mounted.f_flag.contains(StatVfsMountFlags::RDONLY) {
            return Err(BootError::ReadOnly { esp: esp() });
        }
        let folder = File::open(&self.path).doing("opening", &self.path)?;
        match folder.try_lock() {
            Ok(()) => Ok(Writer { esp: self, folder }),
            Err(TryLockError::WouldBlock) => Err(BootError::Busy { esp: esp() }),
            Err(TryLockError::Error(error)) => Err(error).doing("locking", &self.path),
        }
    }
}

/// The files of a folder; none if there is no such folder.
fn files(folder: &Path) -> Result<Vec<PathBuf>, BootError> {
    let listed = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        listed => listed.doing("listing", folder)?,
    };
    let mut files = Vec::new();
    for file in listed {
        files.push(file.doing("listing", folder)?.path());
    }
    files.sort();
    Ok(files)
}

/// Changes the partition; it is locked meanwhile.
pub(super) struct Writer<'a> {
    esp: &'a Esp,
    folder: File,
}

impl Writer<'_> {
    pub(super) fn path(&self, below: &str) -> PathBuf {
        self.esp.path.join(below)
    }

    pub(super) fn entries(&self) -> Result<Vec<Entry>, BootError> {
        self.esp.entries()
    }

    /// Fails if `files` of these sizes do not fit.
    pub(super) fn check_room(&self, sizes: &[u64]) -> Result<(), BootError> {
        let esp = &self.esp.path;
        let mounted = statvfs(esp).doing("looking at", esp)?;
        let cluster = mounted.f_frsize.max(1);
        // A folder may grow by a cluster for each of its files.
        let needed = (sizes
            .iter()
            .map(|size| size.next_multiple_of(cluster) + cluster))
        .sum();
        let free = mounted.f_bavail.saturating_mul(cluster);
        if needed > free {
            return Err(BootError::Full {
                esp: esp.clone(),
                needed,
                free,
            });
        }
        Ok(())
    }

    /// Writes what `source` has to `target`, which before has nothing or what it had.
    pub(super) fn put(&self, mut source: impl Read, target: &Path) -> Result<(), BootError> {
        let folder = target.parent().unwrap_or(&self.esp.path);
        self.make_folder(folder)?;
        let unfinished = folder.join(UNFINISHED);
        let mut file = File::create(&unfinished).doing("making", &unfinished)?;
        step("made")?;
        let written = io::copy(&mut source, &mut file).and_then(|_| {
            file.flush()?;
            file.sync_all()
        });
        if written.is_err() {
            // It takes room that whatever comes next may need; a sweep would find it, too.
            let _ = fs::remove_file(&unfinished);
        }
        written.doing("writing", target)?;
        step("written")?;
        drop(file);
        self.rename(&unfinished, target)
    }

    /// A new name for a file, which lasts when this returns.
    pub(super) fn rename(&self, from: &Path, to: &Path) -> Result<(), BootError> {
        fs::rename(from, to).doing("renaming to", to)?;
        step("renamed")?;
        self.sync_folder(to)
    }

    pub(super) fn remove(&self, file: &Path) -> Result<(), BootError> {
        fs::remove_file(file).doing("removing", file)?;
        step("removed")?;
        self.sync_folder(file)
    }

    fn sync_folder(&self, file: &Path) -> Result<(), BootError> {
        // An image is made anew if its build was cut short.
        if !self.esp.is_image {
            let folder = file.parent().unwrap_or(&self.esp.path);
            File::open(folder)
                .and_then(|folder| folder.sync_all())
                .doing("syncing", folder)?;
            // The allocation table belongs to no file: all of the partition, then.
            syncfs(&self.folder).doing("syncing", &self.esp.path)?;
        }
        step("synced")
    }

    fn make_folder(&self, folder: &Path) -> Result<(), BootError> {
        if folder.is_dir() {
            return Ok(());
        }
        fs::create_dir_all(folder).doing("making", folder)?;
        step("folder made")?;
        self.sync_folder(folder)
    }

    /// Removes kernels and initrds which no entry names, anybody's, other than `wanted`; and what an
    /// interrupted run has left.
    pub(super) fn sweep(&self, wanted: &[PathBuf]) -> Result<(), BootError> {
        let named: HashSet<PathBuf> = (self.esp.all_entries()?.iter())
            .flat_map(|(_, parsed)| &parsed.files)
            .filter_map(|file| entry::below(&self.esp.path, file))
            .collect();
        for file in files(&self.path(KERNELS))? {
            if !named.contains(&file) && !wanted.contains(&file) && file.is_file() {
                self.remove(&file)?;
            }
        }
        for folder in [ENTRIES, "loader", "EFI/BOOT", "EFI/systemd"] {
            let unfinished = self.path(folder).join(UNFINISHED);
            if unfinished.is_file() {
                self.remove(&unfinished)?;
            }
        }
        Ok(())
    }
}

/// Whether `file` has just what `other` has.
pub(super) fn is_same(file: &Path, other: &mut File) -> io::Result<bool> {
    let mut file = match File::open(file) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        file => file?,
    };
    if file.metadata()?.len() != other.metadata()?.len() {
        return Ok(false);
    }
    let (mut one, mut two) = (vec![0; BUFFER_BYTES], vec![0; BUFFER_BYTES]);
    loop {
        let read = file.read(&mut one)?;
        if read == 0 {
            return Ok(true);
        }
        match other.read_exact(&mut two[..read]) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(false),
            result => result?,
        }
        if one[..read] != two[..read] {
            return Ok(false);
        }
    }
}

#[cfg(not(test))]
fn step(_done: &'static str) -> Result<(), BootError> {
    Ok(())
}

/// A test can end the writer after any change, as a power cut does.
#[cfg(test)]
pub(super) use interruption::step;
#[cfg(test)]
pub(super) mod interruption {
    use std::cell::Cell;
    use std::io;
    use std::path::PathBuf;

    use super::BootError;

    thread_local!(static STEPS_LEFT: Cell<Option<usize>> = const { Cell::new(None) });

    /// Ends what writes in this thread after so many changes.
    pub fn after(steps: Option<usize>) {
        STEPS_LEFT.set(steps);
    }

    pub fn step(done: &'static str) -> Result<(), BootError> {
        match STEPS_LEFT.get() {
            None => Ok(()),
            Some(0) => Err(BootError::Io {
                doing: done,
                path: PathBuf::from("(interrupted here)"),
                source: io::ErrorKind::Interrupted.into(),
            }),
            Some(left) => {
                STEPS_LEFT.set(Some(left - 1));
                Ok(())
            }
        }
    }
}
