//! Disks of the emulated machine.

use crate::child;
use anyhow::{Context, Result, ensure};
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

/// Holes stay holes.
pub fn copy(from: &Path, to: &Path) -> Result<()> {
    child::run(
        Command::new("cp")
            .args(["--sparse=always", "--"])
            .args([from, to]),
    )
}

/// Does what the guest would: writes down what ext4's own journal has, and checks the file system. An error if
/// that finds what no power cut leaves.
pub fn recover(image: &Path) -> Result<()> {
    let mut e2fsck = e2fsprogs("e2fsck");
    let output = e2fsck.args(["-f", "-p"]).arg(image).output();
    let output = output.context("cannot start e2fsck")?;
    // 1: it has mended something, of its own accord.
    ensure!(
        matches!(output.status.code(), Some(0 | 1)),
        "e2fsck says: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}

/// Copies a folder with all that is in it out of the file system on `image`, into the folder `to`.
pub fn take_out(image: &Path, folder: &str, to: &Path) -> Result<()> {
    let mut debugfs = e2fsprogs("debugfs");
    debugfs
        .args(["-R", &format!("rdump {folder} .")])
        .arg(image)
        .current_dir(to)
        // It says its version there, and ends with 0 whatever happens.
        .stderr(Stdio::null());
    child::run(&mut debugfs)?;
    ensure!(
        to.join(folder).is_dir(),
        "there is no folder {folder} on {}",
        image.display()
    );
    Ok(())
}

pub fn e2fsprogs(program: &str) -> Command {
    let mut command = Command::new(program);
    // Not on everybody's path.
    command.env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin");
    command
}

fn make(image: &Path, bytes: u64, content: Option<&Path>) -> Result<()> {
    File::create(image)
        .and_then(|file| file.set_len(bytes))
        .with_context(|| format!("cannot create {}", image.display()))?;
    let mut mke2fs = e2fsprogs("mke2fs");
    mke2fs.args(["-q", "-F", "-t", "ext4"]);
    if let Some(content) = content {
        mke2fs.arg("-d").arg(content);
    }
    child::run(mke2fs.arg(image).stdin(Stdio::null()))
}
