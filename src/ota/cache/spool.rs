//! Keeps what has come of big files, so that not even a power cut makes it come twice.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

/// Smaller files come again faster than it is worth to write them twice.
pub(super) const LEAST_BYTES: u64 = 4 * 1024 * 1024;

/// What nobody has asked for in that time belongs to an update that is not wanted any more.
const OLD: Duration = Duration::from_secs(7 * 24 * 3600);

/// The compressed bytes of one file that is on its way. Nothing depends on it: where it can't be written,
/// nothing is kept, and what is wrong in it comes out when hashes are compared.
pub(super) struct Spooled {
    path: PathBuf,
    /// What is there from the last time, as far as it was not read yet.
    old: Option<std::io::Take<File>>,
    kept: u64,
    new: Option<File>,
}

impl Spooled {
    /// `name` says which bytes these are: a hash of them.
    pub(super) fn open(folder: &Path, name: &str, length: u64) -> Option<Self> {
        fs::create_dir_all(folder).ok()?;
        let path = folder.join(name);
        let new = OpenOptions::new()
            .append(true)
            .create(true)
            .open(&path)
            .ok()?;
        let kept = new.metadata().ok()?.len();
        if kept > length {
            new.set_len(0).ok()?;
        }
        let kept = if kept > length { 0 } else { kept };
        let old = File::open(&path).ok()?.take(kept);
        Some(Self {
            path,
            old: Some(old),
            kept,
            new: Some(new),
        })
    }

    pub(super) fn kept(&self) -> u64 {
        self.kept
    }

    /// Reads on in what is there from the last time. 0 at its end.
    pub(super) fn replay(&mut self, buffer: &mut [u8]) -> usize {
        let read = self
            .old
            .as_mut()
            .and_then(|old| old.read(buffer).ok())
            .unwrap_or(0);
        if read == 0 {
            self.old = None;
        }
        read
    }

    pub(super) fn keep(&mut self, bytes: &[u8]) {
        if let Some(file) = &mut self.new
            && file.write_all(bytes).is_err()
        {
            // A disk that is full needs the place for other things.
            self.new = None;
            let _ = fs::remove_file(&self.path);
        }
    }

    pub(super) fn remove(self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// Removes what is left of downloads that nobody has gone on with for a week.
pub(super) fn sweep(folder: &Path, now: SystemTime) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let age = entry.metadata().and_then(|metadata| metadata.modified());
        if age.is_ok_and(|modified| now.duration_since(modified).is_ok_and(|age| age > OLD)) {
            let _ = fs::remove_file(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_kept_is_read_first_and_what_comes_is_added() {
        let folder = tempfile::tempdir().unwrap();
        let mut first = Spooled::open(folder.path(), "x", 10).unwrap();
        assert_eq!((first.kept(), first.replay(&mut [0; 8])), (0, 0));
        first.keep(b"abc");
        drop(first);
        let mut second = Spooled::open(folder.path(), "x", 10).unwrap();
        let mut buffer = [0; 8];
        assert_eq!(second.replay(&mut buffer), 3);
        assert_eq!(&buffer[..3], b"abc");
        second.keep(b"def");
        assert_eq!(second.replay(&mut buffer), 0);
        drop(second);
        assert_eq!(fs::read(folder.path().join("x")).unwrap(), b"abcdef");
        assert_eq!(
            Spooled::open(folder.path(), "x", 5).unwrap().kept(),
            0,
            "too long to be it"
        );
    }

    #[test]
    fn old_leftovers_are_swept() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("x"), "x").unwrap();
        sweep(folder.path(), SystemTime::now());
        assert!(folder.path().join("x").exists());
        sweep(folder.path(), SystemTime::now() + OLD * 2);
        assert!(!folder.path().join("x").exists());
    }
}
