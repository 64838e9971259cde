//! Disks of the emulated machine.

use crate::child;
use anyhow::{Context, Result};
use std::fs::File;
use std::path::Path;
use std::process::{Command, Stdio};

const ROOT_BYTES: u64 = 1 << 30;
/// More than the store may grow to; it takes space as it fills.
const STATE_BYTES: u64 = 2 << 30;

/// The root file system, with what is in `tree`.
pub fn make_root(tree: &Path, image: &Path) -> Result<()> {
    make(image, ROOT_BYTES, Some(tree))
}

/// The empty file system of the store.
pub fn make_state(image: &Path) -> Result<()> {
    make(image, STATE_BYTES, None)
}

fn make(image: &Path, bytes: u64, content: Option<&Path>) -> Result<()> {
    File::create(image)
        .and_then(|file| file.set_len(bytes))
        .with_context(|| format!("cannot create {}", image.display()))?;
    let mut mke2fs = Command::new("mke2fs");
    // Not on everybody's path.
    mke2fs.env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin");
    mke2fs.args(["-q", "-F", "-t", "ext4"]);
    if let Some(content) = content {
        mke2fs.arg("-d").arg(content);
    }
    child::run(mke2fs.arg(image).stdin(Stdio::null()))
}
