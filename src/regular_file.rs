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

/// What is wrong with a file's contents.
#[derive(Debug)]
pub(crate) struct Flaw {
    /// From 1 on, where one can tell.
    pub line: Option<usize>,
    pub reason: String,
}

/// A file that can't be used. Names the file and the line.
#[derive(Debug, thiserror::Error)]
#[error("{place}: {reason}")]
pub struct FileError {
    /// `path` or `path:line`.
    pub(crate) place: String,
    pub(crate) reason: String,
}

/// A line for each of 100,000 users has about 12 MB.
const MAX_PARSED_BYTES: u64 = 32 << 20;

/// Reads a file, and makes of it what `parse` does.
pub(crate) fn read_and_parse<T>(
    path: &Path,
    if_missing: &str,
    parse: impl FnOnce(&[u8]) -> Result<T, Flaw>,
) -> Result<T, FileError> {
    let contents = RegularFile::open(path, 0).and_then(|file| file.read(MAX_PARSED_BYTES));
    let contents = contents.map_err(|error| FileError {
        place: path.display().to_string(),
        reason: match &error {
            ReadError::Io(cause) if cause.kind() == io::ErrorKind::NotFound => {
                format!("{error}; {if_missing}")
            }
            _ => error.to_string(),
        },
    })?;
    parse(without_mark(&contents)).map_err(|Flaw { line, reason }| FileError {
        place: match line {
            Some(line) => format!("{}:{line}", path.display()),
            None => path.display().to_string(),
        },
        reason,
    })
}

/// The line of the byte at `offset`, from 1 on.
pub(crate) fn line_of(contents: &[u8], offset: usize) -> usize {
    let before = &contents[..offset.min(contents.len())];
    1 + before.iter().filter(|byte| **byte == b'\n').count()
}

/// Reads TOML; what is wrong has its line.
pub(crate) fn parse_toml<T: serde::de::DeserializeOwned>(contents: &[u8]) -> Result<T, Flaw> {
    let text = std::str::from_utf8(contents).map_err(|error| Flaw {
        line: Some(line_of(contents, error.valid_up_to())),
        reason: "not UTF-8".into(),
    })?;
    toml::from_str(text).map_err(|error| Flaw {
        line: error.span().map(|span| line_of(contents, span.start)),
        reason: match error.span().and_then(|span| key_before(text, span.start)) {
            Some(key) => format!("{key}: {}", error.message()),
            None => error.message().to_owned(),
        },
    })
}

/// The key whose value begins there.
fn key_before(text: &str, value: usize) -> Option<&str> {
    let key = text.get(..value)?.trim_end().strip_suffix('=')?.trim_end();
    let begin = key.rfind(['\n', '{', ',', ' ']).map_or(0, |at| at + 1);
    let is_plain = |part: char| part.is_ascii_alphanumeric() || matches!(part, '_' | '-' | '.');
    Some(&key[begin..]).filter(|key| !key.is_empty() && key.chars().all(is_plain))
}
