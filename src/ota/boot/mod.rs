//! What the machine boots: an entry for each generation on the EFI system partition, written so that a
//! power cut at any moment leaves one that boots.
//!
//! One writer for images (`--offline`), for NixOS's `boot.loader.external.installHook` and for updates.
//! The entries are those of the Boot Loader Specification, type #1
//! (<https://uapi-group.org/specifications/specs/boot_loader_specification/>), and count their tries in
//! their names (<https://systemd.io/AUTOMATIC_BOOT_ASSESSMENT/>). What there is:
//!
//! - `loader/entries/headgate-GENERATION[+LEFT[-DONE]].conf`; without a counter it is good, with no tries
//!   left it is bad, and systemd-boot takes it only if there is no other;
//! - `EFI/headgate/`, kernels and initrds named after their store paths, so that generations share them;
//! - `loader/loader.conf` and systemd-boot itself, which only [`install_loader`] writes: no update does,
//!   as they can't go back.
//!
//! Never `bootctl set-default`: it names one entry, which is then taken when it is bad, too. `loader.conf`
//! has a pattern instead.

mod bootspec;
mod efi_vars;
mod entry;
mod esp;
mod install;
#[cfg(test)]
mod tests;

use std::io;
use std::path::{Path, PathBuf};

pub use bootspec::Bootspec;
pub use efi_vars::{Booted, Counting, booted};
pub use entry::{Entry, Tries};
pub use esp::Esp;
pub use install::{
    CONDEMNED, Install, Installed, Loader, bless, condemn, install, install_loader, remove, retain,
};

/// Why the machine's boot files are not as they should be. Each message names the file.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    #[error(
        "{esp} is not there: mount the EFI system partition, or name its mount point (ota.esp, --esp)"
    )]
    Missing { esp: PathBuf },
    #[error(
        "{esp} is a folder of the root file system: the EFI system partition is not mounted there. Mount it \
         (on NixOS, without `nofail` or automounting)"
    )]
    NotMounted { esp: PathBuf },
    #[error(
        "{esp} is read-only: the kernel remounts a damaged FAT so. Check it (fsck.fat -a), and mount it again"
    )]
    ReadOnly { esp: PathBuf },
    #[error(
        "{esp} is full: {needed} bytes are needed and {free} free. Remove old generations (`headgate ota gc`, \
         nix-collect-garbage --delete-older-than), or make the partition larger"
    )]
    Full {
        esp: PathBuf,
        needed: u64,
        free: u64,
    },
    #[error("another program is writing to {esp}: try again when it is done")]
    Busy { esp: PathBuf },
    #[error("{file}: {problem}")]
    Bootspec { file: PathBuf, problem: String },
    #[error(
        "{file} starts {there} already, not {wanted}: generation {generation} can't be both. Take a higher number"
    )]
    Clash {
        file: PathBuf,
        there: String,
        wanted: String,
        generation: u64,
    },
    #[error("{esp} has no entry for generation {generation} that boots")]
    NoEntry { esp: PathBuf, generation: u64 },
    #[error("{esp} has no other entry that boots than generation {generation}: it stays")]
    LastEntry { esp: PathBuf, generation: u64 },
    #[error("{doing} {path}: {source}")]
    Io {
        doing: &'static str,
        path: PathBuf,
        source: io::Error,
    },
}

/// Says what was tried, and on which file.
trait Doing<T> {
    fn doing(self, doing: &'static str, path: &Path) -> Result<T, BootError>;
}

impl<T, E: Into<io::Error>> Doing<T> for Result<T, E> {
    fn doing(self, doing: &'static str, path: &Path) -> Result<T, BootError> {
        self.map_err(|source| BootError::Io {
            doing,
            path: path.to_owned(),
            source: source.into(),
        })
    }
}
