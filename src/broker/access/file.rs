//! What the files that decide on access have in common.

use std::io::ErrorKind;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use super::AccessError;
use crate::regular_file::{ReadError, RegularFile};

/// A line for each of 100,000 users has about 12 MB.
const MAX_FILE_BYTES: u64 = 32 << 20;

/// What is wrong with a file's contents.
#[derive(Debug)]
pub(super) struct Flaw {
    /// From 1 on, where one can tell.
    pub line: Option<usize>,
    pub reason: String,
}

/// Reads the file that `key` of the configuration names, and makes of it what `parse` does.
pub(super) fn load<T>(
    key: &'static str,
    path: &Path,
    parse: impl FnOnce(&[u8]) -> Result<T, Flaw>,
) -> Result<T, AccessError> {
    let contents = RegularFile::open(path, 0).and_then(|file| file.read(MAX_FILE_BYTES));
    let contents = contents.map_err(|error| AccessError {
        key,
        place: path.display().to_string(),
        reason: match (&error, key) {
            (ReadError::Io(cause), "mqtt.auth.password_file")
                if cause.kind() == ErrorKind::NotFound =>
            {
                format!("{error}; make it with `headgate user add NAME`")
            }
            (ReadError::Io(cause), _) if cause.kind() == ErrorKind::NotFound => {
                format!("{error}; make it, or set the key to \"\"")
            }
            _ => error.to_string(),
        },
    })?;
    parse(&contents).map_err(|Flaw { line, reason }| AccessError {
        key,
        place: match line {
            Some(line) => format!("{}:{line}", path.display()),
            None => path.display().to_string(),
        },
        reason,
    })
}

/// A secret that others can read may be known to them.
pub(super) fn warn_if_open(key: &'static str, path: &Path) {
    let mode = path.metadata().map_or(0, |file| file.permissions().mode());
    if mode & 0o007 != 0 {
        tracing::warn!(
            path = %path.display(),
            "everybody on this machine can get at the file of {key} (mode {:o}); run: chmod o= FILE",
            mode & 0o777
        );
    }
}

/// The line of the byte at `offset`, from 1 on.
pub(super) fn line_of(contents: &[u8], offset: usize) -> usize {
    let before = &contents[..offset.min(contents.len())];
    1 + before.iter().filter(|byte| **byte == b'\n').count()
}
