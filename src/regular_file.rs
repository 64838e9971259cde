//! Files that somebody has named: opened only if they are files, read only up to a bound.
//!
//! A pipe in a file's place would make everybody wait for whoever writes to it, and a device may never
//! end.

use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// A regular file, open for reading.
pub struct RegularFile {
    file: File,
    metadata: Metadata,
}

/// Why a file can't be read. Doesn't name it.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("not a regular file")]
    NotRegular,
    #[error("larger than {max} bytes")]
    TooLarge { max: u64 },
}

impl RegularFile {
    /// `flags` are further ones of open(2).
    pub fn open(path: &Path, flags: i32) -> Result<RegularFile, ReadError> {
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK | flags)
            .open(path)?;
        let metadata = file.metadata()?;
        match metadata.is_file() {
            true => Ok(RegularFile { file, metadata }),
            false => Err(ReadError::NotRegular),
        }
    }

    /// Of the file that is open, whatever has become of its name.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    pub fn into_file(self) -> File {
        self.file
    }

    /// All of it, if that is at most `max` bytes.
    pub fn read(self, max: u64) -> Result<Vec<u8>, ReadError> {
        let mut contents = Vec::new();
        self.file.take(max + 1).read_to_end(&mut contents)?;
        match contents.len() as u64 > max {
            true => Err(ReadError::TooLarge { max }),
            false => Ok(contents),
        }
    }
}

/// Text without the byte-order mark that editors of Windows put before it.
pub fn without_mark(text: &[u8]) -> &[u8] {
    text.strip_prefix("\u{feff}".as_bytes()).unwrap_or(text)
}
