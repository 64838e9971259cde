//! Unpacks a NAR as it arrives: in the form that store paths have, and never more than was signed for.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, BufReader, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use nix_archive::nar::{self, Event, FileContents};
use ring::digest::{Context, Digest, SHA256};
use rustix::fs::{AtFlags, Mode, OFlags, Timespec, Timestamps};
use thiserror::Error;

use super::fault::Fault;
use crate::ota::store_dir::StoreError;

/// Few large writes rather than many small ones. Always of the same size, whatever the NAR's: an allocator
/// keeps memory for each size that was ever asked for.
const WRITE_BYTES: usize = 128 * 1024;

/// Bytes of a file after which they begin to be written to the disk.
const WRITE_BACK_BYTES: u64 = 8 * 1024 * 1024;
const READ_BYTES: usize = 64 * 1024;

/// More files than any path of a system has, and fewer than would take all inodes of a disk.
const MOST_FILES: u64 = 2_000_000;

/// What file systems take.
const NAME_BYTES: usize = 255;
const TARGET_BYTES: usize = 4095;

/// All that is in a store was last changed one second after the epoch.
const TIMES: Timestamps = Timestamps {
    last_access: Timespec {
        tv_sec: 1,
        tv_nsec: 0,
    },
    last_modification: Timespec {
        tv_sec: 1,
        tv_nsec: 0,
    },
};

/// Why a NAR is not unpacked.
#[derive(Debug, Error)]
pub enum UnpackError {
    /// The NAR is to blame, or what it comes from.
    #[error(transparent)]
    Fault(#[from] Fault),
    /// This machine is: another cache would be no better.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// A stream that is hashed and counted on its way, and that ends in an error rather than be too long.
pub(super) struct Metered<R> {
    inner: R,
    digest: Context,
    count: u64,
    limit: u64,
}

impl<R> Metered<R> {
    pub(super) fn new(inner: R, limit: u64) -> Self {
        Self {
            inner,
            digest: Context::new(&SHA256),
            count: 0,
            limit,
        }
    }

    pub(super) fn finish(self) -> (R, Digest, u64) {
        (self.inner, self.digest.finish(), self.count)
    }
}

impl<R: Read> Read for Metered<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.count += read as u64;
        if self.count > self.limit {
            return Err(Fault::TooLong { limit: self.limit }.into());
        }
        self.digest.update(&buffer[..read]);
        Ok(read)
    }
}

/// Unpacks the NAR that `reader` gives, and nothing else, as `name` in `folder`, and checks its size and
/// SHA-256. If there is an error, part of it can be there.
pub fn unpack(
    reader: impl Read,
    size: u64,
    hash: &[u8; 32],
    folder: BorrowedFd<'_>,
    name: &str,
) -> Result<(), UnpackError> {
    let mut reader = BufReader::with_capacity(READ_BYTES, Metered::new(reader, size));
    let mut files = Files {
        folder,
        name,
        open: Vec::new(),
        path: PathBuf::from(name),
        count: 0,
        buffer: vec![0; WRITE_BYTES],
        failed: None,
    };
    let decoded = nar::decode_events_reader(&mut reader, |event| files.add(event));
    if let Some(failed) = files.failed {
        return Err(failed);
    }
    decoded.map_err(|error| match error {
        nar::Error::Io(error) => {
            Fault::from_io(error, |error| Fault::Decompression(error.to_string()))
        }
        error => Fault::Nar(error),
    })?;
    let (_, digest, count) = reader.into_inner().finish();
    if count != size {
        return Err(Fault::Hash {
            what: "NarSize",
            got: count.to_string(),
            expected: size.to_string(),
        }
        .into());
    }
    check_hash("NarHash", digest.as_ref(), hash)?;
    Ok(())
}

pub(super) fn check_hash(what: &'static str, got: &[u8], expected: &[u8]) -> Result<(), Fault> {
    if got == expected {
        return Ok(());
    }
    let written = |hash| format!("sha256:{}", nix_derivation::nixbase32::encode(hash));
    Err(Fault::Hash {
        what,
        got: written(got),
        expected: written(expected),
    })
}

/// The tree that is being written. All is made relative to open folders, so nothing can lead out of it.
struct Files<'a> {
    folder: BorrowedFd<'a>,
    name: &'a str,
    /// The folders that are being filled, the innermost last.
    open: Vec<OwnedFd>,
    /// Where that is, for errors.
    path: PathBuf,
    count: u64,
    buffer: Vec<u8>,
    /// Why no more is written: the decoder's errors say too little.
    failed: Option<UnpackError>,
}

impl Files<'_> {
    fn add<R: Read>(&mut self, event: Event<'_, FileContents<'_, R>>) -> Result<(), nar::Error> {
        self.write(event).map_err(|error| {
            self.failed = Some(error);
            nar::Error::Io(io::ErrorKind::Other.into())
        })
    }

    fn write<R: Read>(&mut self, event: Event<'_, FileContents<'_, R>>) -> Result<(), UnpackError> {
        match event {
            Event::DirectoryStart { name } => {
                self.enter(name)?;
                let folder = self.local(|parent, name| {
                    rustix::fs::mkdirat(parent, name, Mode::RWXU)?;
                    let flags =
                        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                    Ok(rustix::fs::openat(parent, name, flags, Mode::empty())?)
                })?;
                self.open.push(folder);
            }
            Event::DirectoryEnd { .. } => {
                if let Some(folder) = self.open.pop() {
                    settle(&folder, 0o555).map_err(|error| self.error(error))?;
                }
                self.leave();
            }
            Event::Regular {
                name,
                executable,
                contents,
            } => {
                self.enter(name)?;
                let mut file = self.local(|parent, name| {
                    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
                    let file = rustix::fs::openat(parent, name, flags, Mode::RUSR | Mode::WUSR)?;
                    Ok(File::from(file))
                })?;
                self.fill(&mut file, contents)?;
                settle(&file, if executable { 0o555 } else { 0o444 })
                    .map_err(|error| self.error(error))?;
                self.leave();
            }
            Event::Symlink { name, target } => {
                if target.is_empty() || target.len() > TARGET_BYTES || target.contains(&0) {
                    return Err(Fault::Name(shorten(target)).into());
                }
                self.enter(name)?;
                self.local(|parent, name| {
                    rustix::fs::symlinkat(OsStr::from_bytes(target), parent, name)?;
                    rustix::fs::utimensat(parent, name, &TIMES, AtFlags::SYMLINK_NOFOLLOW)?;
                    Ok(())
                })?;
                self.leave();
            }
        }
        Ok(())
    }

    fn enter(&mut self, name: Option<&[u8]>) -> Result<(), Fault> {
        self.count += 1;
        if self.count > MOST_FILES {
            return Err(Fault::TooManyFiles(MOST_FILES));
        }
        if let Some(name) = name {
            if name.len() > NAME_BYTES {
                return Err(Fault::Name(shorten(name)));
            }
            self.path.push(OsStr::from_bytes(name));
        }
        Ok(())
    }

    fn leave(&mut self) {
        if !self.open.is_empty() {
            self.path.pop();
        }
    }

    /// Makes something where the path leads now.
    fn local<T>(
        &self,
        make: impl FnOnce(BorrowedFd<'_>, &OsStr) -> io::Result<T>,
    ) -> Result<T, StoreError> {
        let made = match self.open.last() {
            Some(folder) => make(folder.as_fd(), self.path.file_name().unwrap_or_default()),
            None => make(self.folder, OsStr::new(self.name)),
        };
        made.map_err(|error| self.error(error))
    }

    fn fill<R: Read>(
        &mut self,
        file: &mut File,
        mut contents: FileContents<'_, R>,
    ) -> Result<(), UnpackError> {
        let (mut written, mut begun) = (0, 0);
        loop {
            if written - begun >= WRITE_BACK_BYTES {
                begin_write_back(file, begun, written - begun);
                begun = written;
            }
            let read = match contents.read(&mut self.buffer) {
                Ok(0) => return Ok(()),
                Ok(read) => read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    return Err(Fault::from_io(error, |error| {
                        Fault::Decompression(error.to_string())
                    })
                    .into());
                }
            };
            file.write_all(&self.buffer[..read])
                .map_err(|error| self.error(error))?;
            written += read as u64;
        }
    }

    fn error(&self, error: io::Error) -> StoreError {
        StoreError::new("write", &self.path, error)
    }
}

/// Has the kernel write what it would write anyway when the path is put in place, so that less is left to wait for.
fn begin_write_back(file: &File, offset: u64, length: u64) {
    // SAFETY: the descriptor is open, and the call reads and writes no memory of ours.
    #[allow(unsafe_code)]
    unsafe {
        // Where it is not possible, it takes place later.
        libc::sync_file_range(
            file.as_raw_fd(),
            offset as i64,
            length as i64,
            libc::SYNC_FILE_RANGE_WRITE,
        );
    }
}

fn settle(file: impl AsFd, mode: u32) -> io::Result<()> {
    rustix::fs::fchmod(&file, Mode::from_raw_mode(mode))?;
    rustix::fs::futimens(&file, &TIMES)?;
    Ok(())
}

fn shorten(name: &[u8]) -> String {
    let shown = &name[..name.len().min(64)];
    format!(
        "{:?} ({} bytes)",
        String::from_utf8_lossy(shown),
        name.len()
    )
}
