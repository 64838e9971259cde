//! One gateway a store: an advisory lock on a file in the store's folder, which goes with the
//! process however that ends.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Write};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use super::StoreError;
use super::error::io;

pub(super) const FILE: &str = "lock";

/// A gateway that was killed while it started its compiler leaves a child that has the lock, too, until it
/// has become another program.
const PATIENCE: Duration = Duration::from_millis(300);

/// Locks the store in `folder` until the returned file is dropped, and leaves this process's id in
/// the file for those who come later.
pub(super) fn acquire(folder: &Path) -> Result<File, StoreError> {
    let path = folder.join(FILE);
    let error = |source| io(&path, "cannot lock the store", source);
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path)
        .map_err(error)?;
    let deadline = Instant::now() + PATIENCE;
    let locked = loop {
        match file.try_lock() {
            Err(TryLockError::WouldBlock) if Instant::now() < deadline => {
                thread::sleep(Duration::from_millis(5));
            }
            locked => break locked,
        }
    };
    match locked {
        Ok(()) => {
            file.set_len(0).map_err(error)?;
            writeln!(file, "{}", std::process::id()).map_err(error)?;
            Ok(file)
        }
        Err(TryLockError::WouldBlock) => {
            let mut pid = String::new();
            // The holder may not have got around to writing its id yet.
            let holder = match file.read_to_string(&mut pid) {
                Ok(read) if read > 0 => format!("process {}", pid.trim()),
                _ => "of unknown process id".into(),
            };
            Err(StoreError::InUse {
                path: folder.to_owned(),
                holder,
            })
        }
        Err(TryLockError::Error(source)) => Err(error(source)),
    }
}
