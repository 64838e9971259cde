//! Why the store can't be opened, read or written.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

/// Names the file and what to do.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("store {}: {doing}: {source}; {remedy}", .path.display())]
    Io {
        path: PathBuf,
        doing: &'static str,
        source: std::io::Error,
        remedy: &'static str,
    },
    #[error("store {}: is not a folder; set `store.path` to a folder", .path.display())]
    NotAFolder { path: PathBuf },
    #[error(
        "store {}: another gateway ({holder}) uses it; stop that one, or give this one a \
         `store.path` of its own",
        .path.display()
    )]
    InUse { path: PathBuf, holder: String },
    #[error(
        "store {}: its schema is version {found}, and this Headgate knows versions up to \
         {supported}; run the newer Headgate that wrote it, or set `store.path` to another folder",
        .path.display()
    )]
    NewerSchema {
        path: PathBuf,
        found: u32,
        supported: u32,
    },
    #[error(
        "store {}: damaged: {what}; put a backup in its place, or move the folder away to begin \
         with an empty store",
        .path.display()
    )]
    Damaged { path: PathBuf, what: String },
    #[error(
        "store {}: full ({map_bytes} bytes); raise `store.max_bytes`, or remove apps or MQTT sessions",
        .path.display()
    )]
    Full { path: PathBuf, map_bytes: usize },
    #[error("store {}: {what}", .path.display())]
    Database { path: PathBuf, what: String },
}

/// An I/O error with what to do about it.
pub(super) fn io(path: &Path, doing: &'static str, source: std::io::Error) -> StoreError {
    let remedy = match source.kind() {
        ErrorKind::PermissionDenied => {
            "let the gateway's user read and write it, or set `store.path` to a folder of its own"
        }
        ErrorKind::ReadOnlyFilesystem => "set `store.path` to a folder that can be written",
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => "make room on the disk",
        _ => "see that `store.path` is on a working local file system",
    };
    StoreError::Io {
        path: path.to_owned(),
        doing,
        source,
        remedy,
    }
}
