//! Files as the writer sees them: through io_uring where the kernel lets us, else with plain system calls.
//!
//! Buffers are not registered with io_uring: that saves pinning pages for direct I/O, while a write through the
//! page cache pins none, and would be copied once more into a registered buffer.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use io_uring::opcode;

use crate::uring;

/// How files are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Io {
    Uring,
    Blocking,
}

impl Io {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Io::Uring => "io_uring",
            Io::Blocking => "blocking",
        }
    }

    /// Io_uring if the kernel has what it takes and lets us use it; else why not.
    pub(super) fn choose() -> Result<Io, String> {
        uring::probe(&[opcode::Write::CODE, opcode::Fsync::CODE])?;
        Ok(Io::Uring)
    }
}

/// A file that is written at its end.
pub(super) enum Log {
    Uring(tokio_uring::fs::File),
    Blocking(File),
}

impl Log {
    /// Makes an empty file, in the place of one that may be there.
    pub(super) fn create(io: Io, path: &Path) -> io::Result<Log> {
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .open(path)?;
        Ok(match io {
            Io::Uring => Log::Uring(tokio_uring::fs::File::from_std(file)),
            Io::Blocking => Log::Blocking(file),
        })
    }

    /// Writes all of `bytes` at `at`, has the disk have them, and gives them back.
    pub(super) async fn write(&self, bytes: Vec<u8>, at: u64) -> (io::Result<()>, Vec<u8>) {
        match self {
            Log::Uring(file) => {
                let (result, bytes) = file.write_all_at(bytes, at).await;
                match result {
                    Ok(()) => (file.sync_data().await, bytes),
                    Err(error) => (Err(error), bytes),
                }
            }
            Log::Blocking(file) => {
                let result = file.write_all_at(&bytes, at);
                (result.and_then(|()| file.sync_data()), bytes)
            }
        }
    }
}

/// Has the disk know the names in a folder.
pub(super) fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}
