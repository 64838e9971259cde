//! What can be wrong: with what one cache gives, and with an update because of that.

use std::fmt::Write as _;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use nix_archive::nar;
use nix_derivation::StorePath;
use thiserror::Error;

use crate::ota::store_dir::StoreError;

/// Why one cache could not give one file.
#[derive(Debug, Error)]
pub enum Fault {
    #[error("there is no such file (status {0})")]
    Missing(u16),
    #[error("there is no such file")]
    NoFile,
    #[error("the server answered with status {0}")]
    Status(u16),
    #[error("the connection failed: {0}")]
    Connection(String),
    #[error("hardly a byte came within {} s", .0.as_secs_f32())]
    Stalled(Duration),
    #[error("it ended after {got} of {expected} bytes")]
    Short { got: u64, expected: u64 },
    #[error("it is {got} bytes long instead of {expected}: the server has another file there")]
    Length { got: u64, expected: u64 },
    #[error("it is longer than {limit} bytes, which is all that it may have")]
    TooLong { limit: u64 },
    #[error("the server answered a request for the bytes from {asked} on with {got:?}")]
    Range { asked: u64, got: String },
    #[error("it redirects more than {0} times")]
    Redirects(u32),
    #[error(
        "it redirects from https to {0}, which is not safe: use https there, or http from the start"
    )]
    Downgrade(String),
    #[error("it redirects to what is no URL of a web server: {0}")]
    BadRedirect(String),
    #[error("it is encoded as {0:?}, which was not asked for")]
    ContentEncoding(String),
    #[error("can't read it: {0}")]
    File(io::Error),
    #[error("it is no regular file")]
    NotAFile,
    #[error("{0} is no URL of a file in a cache: only relative ones without `..` are taken")]
    Url(String),
    #[error("the cache is for the store directory {0}, not for /nix/store")]
    StoreDir(String),
    #[error("it is no Nix binary cache: nix-cache-info is missing there")]
    NoCache,
    #[error("nix-cache-info is no text")]
    CacheInfo,
    #[error("it is no narinfo: {0}")]
    NarInfo(#[from] nix_narinfo::ParseError),
    #[error("it describes {got}, not {asked}")]
    OtherPath { asked: StorePath, got: StorePath },
    #[error("no trusted key ({trusted}) has signed it; signed by: {by}")]
    Untrusted { trusted: String, by: String },
    #[error("its NarHash is no SHA-256")]
    HashKind,
    #[error(
        "it has other references than the cache before said: the caches hold different builds of this path"
    )]
    OtherReferences,
    #[error("it is compressed with {0}; only zstd, xz and none are taken")]
    Compression(String),
    #[error(
        "it can't be decompressed: {0} (windows of more than 8 MiB are not taken: zstd up to level 19, xz up to -6)"
    )]
    Decompression(String),
    #[error("it is no NAR: {0}")]
    Nar(nar::Error),
    #[error("it has more than {0} files")]
    TooManyFiles(u64),
    #[error("it has a name or link target that no file system takes: {0}")]
    Name(String),
    #[error("its {what} is {got}, but the narinfo says {expected}")]
    Hash {
        what: &'static str,
        got: String,
        expected: String,
    },
    #[error("the cache was not reachable before: {0}")]
    Down(String),
    #[error("cancelled")]
    Cancelled,
}

impl Fault {
    /// Whether the same request can have another outcome in a moment.
    pub(super) fn is_passing(&self) -> bool {
        match self {
            Self::Connection(_) | Self::Stalled(_) | Self::Short { .. } => true,
            Self::Status(status) => *status >= 500 || matches!(status, 408 | 429),
            _ => false,
        }
    }

    /// Whether the cache itself can't be talked to, so that asking it for more is a waste of time.
    pub(super) fn is_unreachable(&self) -> bool {
        matches!(
            self,
            Self::Connection(_) | Self::Stalled(_) | Self::Status(500..)
        )
    }

    /// Takes a fault out of the error that it travelled in through a decompressor.
    pub(super) fn from_io(error: io::Error, otherwise: impl FnOnce(io::Error) -> Self) -> Self {
        error.downcast::<Self>().unwrap_or_else(otherwise)
    }
}

impl From<Fault> for io::Error {
    fn from(fault: Fault) -> Self {
        Self::other(fault)
    }
}

/// Why an update can't go on.
#[derive(Debug, Error)]
pub enum CacheError {
    #[error("{url}: {fault}")]
    Document { url: String, fault: Fault },
    #[error("no binary cache is configured: set ota.caches")]
    NoCaches,
    #[error("no trusted key is configured, so nothing could be believed: set ota.trusted_keys")]
    NoKeys,
    #[error("{url} is no URL of a cache: {why}")]
    Url { url: String, why: &'static str },
    #[error("the proxy {proxy:?} can't be used: {why}")]
    Proxy { proxy: String, why: String },
    #[error("{}: {why}", file.display())]
    CaFile { file: PathBuf, why: String },
    #[error("no cache gives {path}: {}", list(faults))]
    Path {
        path: StorePath,
        /// Of each cache, in their order: which file, and why not.
        faults: Vec<(String, Fault)>,
    },
    #[error("the closure of {toplevel} has more than {limit} paths")]
    ClosureTooLarge { toplevel: StorePath, limit: usize },
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("cancelled")]
    Cancelled,
}

fn list(faults: &[(String, Fault)]) -> String {
    let mut text = String::new();
    for (url, fault) in faults {
        let separator = if text.is_empty() { "" } else { "; " };
        let _ = write!(text, "{separator}{url}: {fault}");
    }
    text
}
