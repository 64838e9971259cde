//! Compares what is in the store with what was signed.

use std::io::{self, Write};

use nix_archive::nar::{CaseHack, encode_path};
use nix_derivation::StorePath;
use ring::digest::{Context, SHA256};

use super::{StoreDir, StoreError};

/// What came out for one path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scrubbed {
    Sound,
    /// Its content is another one than was signed, or can't be read.
    Damaged,
    /// Nobody has written down what it should be.
    Unknown,
}

impl StoreDir {
    /// Reads a path and compares it with its narinfo or registration.
    pub fn scrub(&self, path: &StorePath) -> Result<Scrubbed, StoreError> {
        let Some(known) = self.known(path)? else {
            return Ok(Scrubbed::Unknown);
        };
        let mut digest = Digest(Context::new(&SHA256));
        // A disk that can't read it has damaged it, too.
        if encode_path(&mut digest, &self.place_of(path), CaseHack::Disabled).is_err() {
            return Ok(Scrubbed::Damaged);
        }
        let sound = digest.0.finish().as_ref() == known.nar_hash.digest_as_bytes();
        Ok(if sound {
            Scrubbed::Sound
        } else {
            Scrubbed::Damaged
        })
    }
}

struct Digest(Context);

impl Write for Digest {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
